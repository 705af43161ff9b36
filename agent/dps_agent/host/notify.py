"""What systemd hears of the service, as sd_notify(3) describes; nothing where no systemd listens."""

import contextlib
import os
import socket
import time
from collections.abc import Mapping

TEXT_LIMIT = 400  # characters of the status line that systemd shows


class Notifier:
    """One service's messages to systemd; none ever blocks or fails.

    `watchdog_s` is the time after which systemd ends a service that said nothing, 0 where it does not.
    """

    def __init__(self, environ: Mapping[str, str] | None = None) -> None:
        environ = os.environ if environ is None else environ
        address = environ.get("NOTIFY_SOCKET", "")
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._socket: socket.socket | None = None
        self._status = ""
        self._fed_at_s = 0.0
        if self._address[:1] in ("/", "\0"):
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
            self._socket.setblocking(False)
        wanted = environ.get("WATCHDOG_USEC", "")
        ours = environ.get("WATCHDOG_PID", "") in ("", str(os.getpid()))
        self.watchdog_s = int(wanted) / 1e6 if ours and wanted.isascii() and wanted.isdecimal() else 0.0

    def ready(self) -> None:
        """The service works; also the end of `reloading`."""
        self._send("READY=1")

    def reloading(self) -> None:
        """The settings are read again; `ready` is to follow."""
        self._send(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self) -> None:
        """The service ends."""
        self._send("STOPPING=1")

    def status(self, text: str) -> None:
        """One line for `systemctl status`; sent where it is another one than before."""
        line = text.replace("\n", " ")[:TEXT_LIMIT]
        if line != self._status:
            self._status = line
            self._send(f"STATUS={line}")

    def alive(self) -> None:
        """Feeds the watchdog; may be called as often as one likes."""
        now_s = time.monotonic()
        if self.watchdog_s and now_s - self._fed_at_s >= self.watchdog_s / 4:
            self._fed_at_s = now_s
            self._send("WATCHDOG=1")

    def close(self) -> None:
        """Ends it; idempotent."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _send(self, text: str) -> None:
        if self._socket is not None:
            with contextlib.suppress(OSError):  # systemd restarts, or is too busy: the next message says it again
                self._socket.sendto(text.encode(), self._address)
