"""A stranger's first hour ends on a whole board as `docs/firmware.md` says: the page's program, command and words."""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

from support.first_hour import EMULATED, EMULATED_SHOWN, run_as_shown


def main() -> int:
    """Exit status; the last line is the verdict."""
    began_s = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        try:
            print(run_as_shown(EMULATED, EMULATED_SHOWN, Path(folder)))
        except AssertionError as error:
            print(error)
            return 1
    print(f"the page's own program answers a method on a whole board, after {time.monotonic() - began_s:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
