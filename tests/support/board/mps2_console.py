"""The emulated board with its console on this program's output, for `tools/demo --board --emulated`.

    python -m support.board.mps2_console MICROPYTHON MBEDTLS LWIP CACHE build
    python -m support.board.mps2_console FOLDER FIRMWARE QEMU WORD… enrol|run

`build` prints the path of the firmware, which has the agent in it; CACHE may have it from an earlier run. `enrol` puts
FOLDER/flash.img on a board's flash, switches it on and prints its line for the enrolment, as mpremote gets it over the
serial port. `run` switches that board on and shows its console until SIGTERM or until its program has ended; it is on
the Ethernet before that begins. The TPM is a swtpm whose state stays in FOLDER. Exit status 0: done; 1: board or
compiler say what failed.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path

from support.board.cortex_firmware import BuildError
from support.board.mps2_firmware import Debian, build_firmware
from support.board.mps2_machine import BoardError, Mps2

PROMPT, PROMPT_S = ">>> ", 300
LINE = b"import dps_board.factory as f; f.print_enrolment(); print('do' + 'ne')\r"


def console_of(board: Mps2) -> None:
    """Shows whole lines as they come, until the board is off or its program has ended."""
    shown = 0
    while board.is_on and not board.console.endswith(PROMPT):
        whole = board.look(1).rpartition("\n")[0]
        for line in whole[shown:].splitlines():
            print(line, flush=True)
        shown = len(whole)


def main(words: list[str]) -> int:
    """Exit status."""
    *rest, what = words
    if what == "build":
        micropython, mbedtls, lwip, cache = (Path(word).resolve() for word in rest)
        print(build_firmware(Debian(micropython, mbedtls, lwip, ()), cache))
        return 0
    folder, firmware, *qemu = rest
    with Mps2(Path(folder), qemu, Path(firmware)) as board:
        if what == "enrol":
            board.flash((Path(folder) / "flash.img").read_bytes())
            board.start(repl=1)
            board.until(PROMPT, PROMPT_S)
            board.enter(LINE)
            board.until("\ndone", PROMPT_S)
            print("\n".join(board.console.partition("\ndone")[0].splitlines()[-2:]))  # a header and the line
        else:
            board.start(joined=1)
            console_of(board)
            print("the program has ended" if board.is_on else "the board is off", flush=True)
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        sys.exit(main(sys.argv[1:]))
    except (BuildError, BoardError) as error:
        print(error, file=sys.stderr)
        sys.exit(1)
