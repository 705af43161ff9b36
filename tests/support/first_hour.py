"""The first hour of `docs/firmware.md`: its program, its commands, and what they print.

    python -m support.first_hour --board WORD…

runs `tools/demo` with these words in the environment of this Python, so that it makes none of its own.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType

from support.documents import CHECKOUT, blocks_of

DEMO = CHECKOUT / "tools" / "demo"
PAGE = CHECKOUT / "docs" / "firmware.md"
END = PAGE.read_text().partition("\n## What it takes\n")[0].count("\n")
BLOCKS = [found for found in blocks_of(PAGE) if found.line < END]
PROGRAM = next(found.text for found in BLOCKS if found.detail == "app.py")
EXAMPLE, OWN, EMULATED = (shlex.split(found.text) for found in BLOCKS if found.language == "sh")
OWN_SHOWN, EMULATED_SHOWN = (found.text.splitlines() for found in BLOCKS if found.language == "text")
DEADLINE_S = 3000  # less than whoever runs this has, so that what was printed is seen


def demo_module() -> ModuleType:
    """The program as a module."""
    loader = SourceFileLoader("tools_demo", str(DEMO))
    spec = spec_from_loader("tools_demo", loader)
    assert spec is not None
    module = module_from_spec(spec)
    loader.exec_module(module)
    return module


def run_as_shown(command: list[str], shown: list[str], folder: Path) -> str:
    """What one of the page's commands prints in a folder with the page's program; AssertionError unless as shown."""
    assert command[0] == "tools/demo", command
    (folder / "app.py").write_text(PROGRAM)
    places = os.pathsep.join(str(CHECKOUT / name) for name in ("tools", "tests"))
    try:
        done = subprocess.run(
            [sys.executable, "-m", "support.first_hour", *command[1:]],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": places},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=DEADLINE_S,
            check=False,
        )
    except subprocess.TimeoutExpired as late:
        said = late.output.decode(errors="replace") if isinstance(late.output, bytes) else late.output
        raise AssertionError(f"not at its end within {DEADLINE_S} s:\n{said or ''}") from None
    assert done.returncode == 0, done.stdout
    rest = iter(done.stdout.splitlines())
    for line in shown:
        assert line in rest, f"{line!r} not in\n{done.stdout}"
    return done.stdout


if __name__ == "__main__":
    demo = demo_module()
    vars(demo)["environment"] = lambda name, extras: Path(sys.executable).parent.parent
    sys.argv[0] = str(DEMO)
    sys.exit(demo.main())
