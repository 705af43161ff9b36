"""Folders in /tmp for as long as a `with` lasts; what a killed process left there goes when the next one begins."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PREFIX = "powercut-"
PATIENCE_S = 30.0


@contextmanager
def work_folder() -> Iterator[Path]:
    """An empty folder, locked so that others can see that somebody uses it; first removes those that nobody uses."""
    place = Path(tempfile.gettempdir())
    for left in place.glob(PREFIX + "*"):
        _remove_unless_used(left)
    made = Path(tempfile.mkdtemp(prefix=f"new-{PREFIX}"))
    lock = os.open(made, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        folder = made.rename(made.with_name(made.name.removeprefix("new-")))  # others see it with its lock only
        try:
            yield folder
        finally:
            until_s = time.monotonic() + PATIENCE_S
            while folder.exists() and time.monotonic() < until_s:  # a process may be about to end in it
                shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(lock)


def _remove_unless_used(folder: Path) -> None:
    with suppress(OSError):  # somebody else's, or used
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            if os.fstat(lock).st_uid == os.geteuid():
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)
        finally:
            os.close(lock)
