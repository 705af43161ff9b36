"""The whole job of a board on the smallest heap: the agent frozen into MicroPython's unix port, as into a firmware.

    python -m support.board.frozen_unix MICROPYTHON MBEDTLS CACHE          (tools/test --board does)

MICROPYTHON and MBEDTLS are Debian's sources, unpacked; CACHE is a folder of its own. The port is a 64-bit one, whose
pointers are twice as long as a board's; TLS takes its memory outside the heap. Exit status 0: on HEAP_KB the device
registered, and held its identity over a reboot.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from dps_deploy.modules import for_a_board
from dps_emulator.service import Settings
from support.board.compiled import board_sources, der
from support.board.cortex_firmware import BuildError, run_to_build
from support.cloud.emulator import EmulatorInThread
from support.cloud.ntp import NtpServer
from support.tpm.swtpm import Swtpm

HEAP_KB = 94  # some more than it takes: what the collector finds differs from run to run
LEAST_KB = 80  # no smaller one is tried
LIFE_LIMIT_S = 120
Life = Callable[..., dict[str, Any]]  # one life on a heap of so many KiB, with words for the program; what it printed


def build(micropython: Path, mbedtls: Path, cache: Path) -> Path:
    """The program, made from the two source folders or found in `cache`."""
    sources = board_sources()
    staged = {path: for_a_board(source) for path, source in sources.programs.items()} | sources.packages
    for start in ("boot.py", "main.py"):
        del staged[start]
    key = hashlib.sha256(repr([staged, micropython, mbedtls]).encode()).hexdigest()[:16]
    program = cache / f"micropython-{key}"
    if program.is_file():
        return program
    for other in cache.glob("micropython-*"):  # of former sources
        other.unlink()
    shutil.rmtree(cache / "source", ignore_errors=True)
    manifest = 'include("$(MPY_DIR)/extmod/asyncio")\n'
    for path, content in staged.items():
        (cache / "source" / path).parent.mkdir(parents=True, exist_ok=True)
        (cache / "source" / path).write_text(content)
        manifest += f'module("{path}", base_path="{cache / "source"}", opt=3)\n'
    (cache / "manifest.py").write_text(manifest)
    library = cache / "mbedtls" / "library"
    make = ["make", "-s", f"-j{os.cpu_count() or 1}"]
    if not (library / "libmbedtls.a").is_file():
        shutil.rmtree(cache / "mbedtls", ignore_errors=True)
        shutil.copytree(mbedtls, cache / "mbedtls")  # it is built where it stands
        run_to_build([*make, "-C", str(library), "static", "GEN_FILES=", "CFLAGS=-Os"])
    run_to_build(
        [*make, "-C", str(micropython / "mpy-cross"), f"BUILD={cache / 'mpy-cross'}", "PROG=mpy-cross"],
    )
    run_to_build(
        [
            *(*make, "-C", str(micropython / "ports" / "unix"), f"BUILD={cache / 'build'}", "VARIANT=standard"),
            *("MICROPY_PY_SSL=1", "MICROPY_SSL_MBEDTLS=1", "MICROPY_PY_BTREE=0", "MICROPY_PY_FFI=0"),
            *("MICROPY_USE_READLINE=0", f"FROZEN_MANIFEST={cache / 'manifest.py'}"),
            *(
                f"MICROPY_MPYCROSS={cache / 'mpy-cross' / 'mpy-cross'}",
                f"CFLAGS_EXTRA=-I{cache / 'mbedtls' / 'include'}",
            ),
            f"LDFLAGS_EXTRA=-L{library}",
        ]
    )
    (cache / "build" / "micropython").replace(program)
    return program


def life(program: Path, folder: Path, heap_kb: int, *words: str) -> dict[str, Any]:
    """What one life of the board prints on a heap of `heap_kb`; where it broke off, only how, under `error`."""
    arguments = (str(folder / "config.json"), str(folder / "flash.img"), "seconds=15", *words)
    code = f"import board_life; board_life.main(*{arguments!r})"
    done = subprocess.run(
        [str(program), "-X", f"heapsize={heap_kb}k", "-c", code],
        env={"MICROPYPATH": ".frozen"},
        capture_output=True,
        text=True,
        timeout=LIFE_LIMIT_S,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    printed: dict[str, Any] = json.loads(lines[-1]) if lines else {"error": done.stdout + done.stderr, "states": []}
    return printed


def write_config(folder: Path, emulator: EmulatorInThread, swtpm: Swtpm, ntp: NtpServer) -> None:
    """The settings and roots of a board that registers with `emulator`."""
    (folder / "roots.der").write_bytes(der(emulator.ca_file))
    config = {
        "id_scope": "0ne00000000",
        "registration_id": "press-07",
        "connect_to": emulator.connect_to,
        "ca_file": str(folder / "roots.der"),
        "state_dir": "/flash/dps-agent",
        "tpm": {"tcti": swtpm.tcti},
        "board": {"ntp_server": ntp.address, "built_at_s": int(time.time()) - 86400},
    }
    (folder / "config.json").write_text(json.dumps(config))


def fault_on(heap_kb: int, run: Life, folder: Path, emulator: EmulatorInThread, swtpm: Swtpm) -> str:
    """What keeps a board from registering on that heap, and from holding its identity over a reboot; "" for nothing."""
    (folder / "flash.img").unlink(missing_ok=True)
    first = run(heap_kb)
    swtpm.kill()
    swtpm.restart()
    second = run(heap_kb)
    lives = [first["states"], second["states"]]
    if lives != [["boot", "provisioning", "provisioned"], ["boot", "provisioned"]]:
        return f"{first.get('reason', first)} ({first.get('error')})"
    refusal = emulator.service.hub_token_refusal(first["token"], time.time())
    return f"the hub refuses the token: {refusal}" if refusal is not None else ""


def print_peaks(peaks: dict[str, float]) -> None:
    """The most in use at each effect, ascending."""
    for phase, used in sorted(peaks.items(), key=lambda row: row[1]):
        print(f"{phase:<24} {used / 1024:6.1f} KiB")


def main(micropython: str, mbedtls: str, cache: str) -> int:
    """Builds and measures; prints what was found."""
    try:
        program = build(Path(micropython), Path(mbedtls), Path(cache))
    except BuildError as error:
        print(error)
        return 1
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        settings = Settings(enroll_any=True, retry_after_s=1)
        with Swtpm(folder / "tpm") as swtpm, NtpServer() as ntp, EmulatorInThread(settings) as emulator:
            write_config(folder, emulator, swtpm, ntp)
            run = partial(life, program, folder)
            print_peaks(run(4 * HEAP_KB, "heap")["peaks"])
            smallest = 0
            for heap_kb in range(HEAP_KB, LEAST_KB, -1):
                fault = fault_on(heap_kb, run, folder, emulator, swtpm)
                if fault:
                    print(f"{heap_kb} KiB of heap: {fault}")
                    break
                smallest = heap_kb
    print(f"the smallest heap for the whole job: {smallest or f'more than {HEAP_KB}'} KiB")
    return 0 if smallest else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
