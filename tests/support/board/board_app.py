"""The example program as a board runs it, with pins, RTC and watchdog that a unix machine does not have.

`main` takes the folder with config.json, which becomes the current one, the file of the flash, and after how many
seconds the program ends. Prints what the program prints, then one JSON line with what became of the pins.
"""

import asyncio
import json
import os
import sys

from board_life import FileFlash, mount  # type: ignore[import-not-found]

seen: "dict[str, list[object]]" = {"led": [], "rtc": [], "watchdog": []}


class Pin:
    """Notes the levels that are put out."""

    OUT = 1

    def __init__(self, number: int, mode: int, value: int) -> None:
        seen["led"] += [number, value]

    def value(self, level: int) -> None:
        """Puts out a level."""
        seen["led"].append(level)


class RTC:
    """Notes the times that it is set to."""

    def datetime(self, moment: "tuple[int, ...]") -> None:
        """Sets the clock."""
        seen["rtc"].append(moment)


class WDT:
    """Notes its time limit and how often it is fed."""

    def __init__(self, timeout: int) -> None:
        seen["watchdog"] += [timeout, 0]

    def feed(self) -> None:
        """Puts off the reset."""
        seen["watchdog"][1] += 1  # type: ignore[operator]


def main(folder: str, flash_file: str, seconds: str) -> None:
    """Runs the program."""
    sys.modules["machine"] = sys.modules["board_app"]
    mount(FileFlash(flash_file))
    os.chdir(folder)
    import app

    running = app.run

    async def run(path: str = "config.json") -> None:
        try:
            await asyncio.wait_for(running(path), float(seconds))
        except asyncio.TimeoutError:  # noqa: UP041 -- on a board it is not the built-in one, which there is none of
            print("the time is over")

    app.run = run
    app.main()
    print(json.dumps(seen))
