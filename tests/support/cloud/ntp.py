"""An NTP server on loopback that tells the time as a test wants it."""

from __future__ import annotations

import socket
import struct
import threading
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import TracebackType

_EPOCH_S = 2_208_988_800  # 1970 in seconds since 1900


class NtpServer:
    """Answers `now + offset_s` (or says nothing while `offset_s` is None); `asked` counts the questions."""

    def __init__(self, offset_s: float | None = 0.0) -> None:
        self.offset_s = offset_s
        self.asked = 0
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(("127.0.0.1", 0))
        self._socket.settimeout(0.1)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="test-ntp")

    @property
    def address(self) -> str:
        """ "host:port"."""
        return f"127.0.0.1:{self._socket.getsockname()[1]}"

    def __enter__(self) -> NtpServer:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.set()
        self._thread.join()
        self._socket.close()

    def _serve(self) -> None:
        while not self._closing.is_set():
            try:
                question, client = self._socket.recvfrom(512)
            except TimeoutError:
                continue
            self.asked += 1
            if self.offset_s is not None and len(question) == 48:
                seconds = int(time.time() + self.offset_s) + _EPOCH_S
                answer = struct.pack(">BBBb11I", 0x24, 2, 6, -20, 0, 0, 0, 0, 0, *struct.unpack(">2I", question[40:]),
                                     seconds % 2**32, 0, seconds % 2**32, 0)  # fmt: skip
                self._socket.sendto(answer, client)
