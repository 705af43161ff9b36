"""How many instructions a command executes until it has ended, counted by callgrind; the neighbours do not count.

    python -m dps_bench.instructions            1: a command executes more than its bound, or does not work

Each count is shown and bounded as a ratio to the same interpreter's `-c 'import ssl'`, counted in the same run with the
same settings: so another build of Python, or another processor, changes little. Hashes are the same in each run, and
modules are compiled beforehand.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from dps_bench.costs import CommandFailed, clean_environ
from fresh_machine import CHECKOUT

DEADLINE_S = 300
# What was counted when this was last noted, as that ratio, with Debian 12's Python, which has the most of its version.
# More than SLACK above it is to be explained, and less to be noted here. Another version of Python has other numbers.
RATIOS = {"--help": 1.212, "status": 0.812}
PYTHON = (3, 11)
SLACK = 1.03


def counted(words: list[str], environ: dict[str, str]) -> int:
    """Instructions of one Python process."""
    ended = subprocess.run(
        ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null", sys.executable, *words],
        env=clean_environ({"PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1", **environ}),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    _, found, rest = ended.stderr.partition("Collected : ")
    if ended.returncode not in (0, 3) or not found:  # 3: a device that has no hub yet
        raise CommandFailed(f"{' '.join(words)} ended with status {ended.returncode}:\n{ended.stderr.rstrip()}")
    return int(rest.split()[0])


def main() -> int:
    """Counts, prints, compares."""
    sources = [str(CHECKOUT / "agent"), str(CHECKOUT / "hal")]
    subprocess.run([sys.executable, "-m", "compileall", "-q", *sources], check=True)
    over = 0
    with tempfile.TemporaryDirectory(prefix="dps-bench-") as folder:
        settings = Path(folder) / "device.toml"
        settings.write_text(f'id_scope = "0ne00000000"\nstate_dir = "{folder}/s"\nruntime_dir = "{folder}/r"\n')
        measure = counted(["-c", "import ssl"], {})
        print(f"{'python -c import ssl':<24}{measure:>14,}")
        for verb, ratio in RATIOS.items():
            words = ["-m", "dps_agent.host.cli", "--config", str(settings), verb]
            found = counted(words, {"PYTHONPATH": ":".join(sources)})
            print(f"{f'dps-agent {verb}':<24}{found:>14,}{found / measure:>8.3f} of it, bound {ratio * SLACK:.3f}")
            over += found > ratio * SLACK * measure
    if sys.version_info[:2] != PYTHON:
        print(f"the bounds are for Python {PYTHON[0]}.{PYTHON[1]}")
        return 0
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main())
