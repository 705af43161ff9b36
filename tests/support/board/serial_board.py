"""A board at a serial port: MicroPython's prompt on a pseudo-terminal, and power that can be cut between two bytes."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import sys
import threading
import tty
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import TracebackType

CHECKOUT = Path(__file__).resolve().parents[3]
MICROPYTHON = str(Path(sys.executable).with_name("micropython"))
ENVIRONMENT = {**os.environ, "MICROPYPATH": "agent:hal:tests:.frozen"}
HEAP = "1m"


def boot(image: Path, tpm_port: int, until: str = "", timeout_s: float = 60) -> str:
    """Lets a board with this image start; what it prints, up to its end or to a line with `until` in it.

    AssertionError where that does not come in time, or the program does not end well; the power is off afterwards.
    """
    words = [
        MICROPYTHON,
        "-X",
        f"heapsize={HEAP}",
        "tests/support/board/image_board.py",
        str(image),
        str(tpm_port),
        "run",
    ]
    said = ""
    with subprocess.Popen(
        words, cwd=CHECKOUT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as board:
        limit = threading.Timer(timeout_s, board.kill)
        limit.start()
        assert board.stdout is not None
        for line in board.stdout:
            said += line
            if until and until in line:
                limit.cancel()
                board.kill()
                return said
        limit.cancel()
        assert board.wait() == 0 and not until, f"exit status {board.returncode}, expected {until!r}\n{said}"
    return said


class SerialBoard:
    """The board while its power is on; `device` is the port, `received` counts the bytes that it got.

    `cut_after` bytes it dies, and the port with it. `fat`: its flash is made an empty FAT first.
    `heap`: as MicroPython's heapsize.
    """

    def __init__(self, image: Path, tpm_port: int, cut_after: int = -1, fat: bool = False, heap: str = HEAP) -> None:
        self.received = 0
        self._cut_after = cut_after
        self._board_end, board_side = pty.openpty()
        self._port_end, self._port = pty.openpty()
        for end in (board_side, self._port):
            tty.setraw(end)
        self.device = os.ttyname(self._port)
        words = [
            MICROPYTHON,
            "-X",
            f"heapsize={heap}",
            "-i",
            "tests/support/board/image_board.py",
            str(image),
            str(tpm_port),
        ]
        words += ["fat"] if fat else []
        self._process = subprocess.Popen(
            words, cwd=CHECKOUT, env=ENVIRONMENT, stdin=board_side, stdout=board_side, stderr=board_side
        )
        os.close(board_side)
        greeting = b""
        while b">>> " not in greeting:
            assert select.select([self._board_end], [], [], 20)[0], greeting
            greeting += os.read(self._board_end, 4096)
        self._cable = threading.Thread(target=self._carry, name="test-serial-cable", daemon=True)
        self._cable.start()

    def _carry(self) -> None:
        ends = {self._board_end: self._port_end, self._port_end: self._board_end}
        try:
            while True:
                for end in select.select(list(ends), [], [])[0]:
                    content = os.read(end, 4096)
                    if end == self._port_end:
                        if 0 <= self._cut_after < self.received + len(content):
                            os.write(self._board_end, content[: self._cut_after - self.received])
                            self._process.kill()
                            self._process.wait()
                            os.close(self._port)
                            os.close(self._port_end)
                            return
                        self.received += len(content)
                    os.write(ends[end], content)
        except OSError:
            return  # the board's end is closed

    def __enter__(self) -> SerialBoard:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
        self._cable.join(60)
        os.close(self._board_end)
        if self._cut_after < 0:
            os.close(self._port)
            os.close(self._port_end)
