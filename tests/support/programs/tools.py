"""The programs in tools/ as processes that a test may end, and what they leave."""

import contextlib
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

# A hang-up that the tests themselves ignore, as under nohup(1), would be ignored by what they start as well.
HEARS_HANG_UP = ("env", "--default-signal=HUP")


@contextlib.contextmanager
def begun(
    words: Sequence[str], environ: Mapping[str, str], *, stdout: int | None = None, stderr: int | None = None
) -> Iterator["subprocess.Popen[str]"]:
    """A process that hears every signal whoever started the tests; killed at the end where it has not ended."""
    process = subprocess.Popen([*HEARS_HANG_UP, *words], env=environ, stdout=stdout, stderr=stderr, text=True)
    with process:  # waits for it
        try:
            yield process
        finally:
            process.kill()  # nothing where it has ended


def processes_that_name(folder: Path) -> list[str]:
    """Those whose command line has `folder` in it, each with its words."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes()
        except OSError:
            continue  # it has ended
        if os.fsencode(folder) in words:
            found.append(f"{process.name} {words!r}")
    return found


def until(holds: Callable[[], object], within_s: float = 120) -> bool:
    """Whether it came to hold in time."""
    until_s = time.monotonic() + within_s
    while not holds():
        if time.monotonic() > until_s:
            return False
        time.sleep(0.02)
    return True
