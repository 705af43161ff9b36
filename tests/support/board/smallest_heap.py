"""The smallest heap for the whole job of a board, with the agent in a ROMFS and in files.

    PYTHONPATH=agent:hal:tools:tests:micropython python -m support.board.smallest_heap

The port is a 64-bit one, whose pointers are twice as long as a board's; TLS takes its memory outside the heap. With the
agent frozen into a firmware: `support.board.frozen_unix`.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from dps_emulator.service import Settings
from support.board.compiled import Image, build, micropython
from support.board.frozen_unix import fault_on, print_peaks, write_config
from support.cloud.emulator import EmulatorInThread
from support.cloud.ntp import NtpServer
from support.tpm.swtpm import Swtpm

LEAST_KB, MOST_KB = 100, 260  # what is tried


def smallest(image: Image, in_flash: bool, folder: Path) -> int:
    """KiB; the search halves the range, so what is a matter of luck is settled by the last tries."""
    settings = Settings(enroll_any=True, retry_after_s=1)
    with Swtpm(folder / "tpm") as swtpm, NtpServer() as ntp, EmulatorInThread(settings) as emulator:
        write_config(folder, emulator, swtpm, ntp)
        files = (str(folder / "config.json"), str(folder / "flash.img"), "seconds=15")

        def run(heap_kb: int, *words: str) -> dict[str, Any]:
            try:
                return micropython(image, "board_life", *files, *words, heap_kb=heap_kb, in_flash=in_flash)[-1]
            except AssertionError as error:
                return {"states": [], "reason": str(error).splitlines()[-1]}

        print_peaks(run(8 * MOST_KB, "heap")["peaks"])
        least, most = LEAST_KB, MOST_KB
        while least < most:
            middle = (least + most) // 2
            if fault_on(middle, run, folder, emulator, swtpm):
                least = middle + 1
            else:
                most = middle
    return most


def main() -> None:
    """Measures both; prints what was found."""
    with tempfile.TemporaryDirectory() as name:
        image = build(Path(name) / "image")
        for in_flash, words in ((True, "in a ROMFS"), (False, "in files")):
            folder = Path(name) / words.replace(" ", "-")
            folder.mkdir()
            print(f"the smallest heap for the whole job {words}: {smallest(image, in_flash, folder)} KiB")


if __name__ == "__main__":
    main()
