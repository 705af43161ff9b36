"""The service's lines: structured fields to systemd's journal where that listens, else plain text on stderr.

One line for each event that somebody cares about; the rest only with `verbose`. Every event and every error code has a
MESSAGE_ID, under which `agent/service/dps-agent.catalog` has the remedy for `journalctl -x`.
"""

import contextlib
import hashlib
import io
import os
import select
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping
from typing import TextIO

from dps_agent.host.printed import printable, utc_text
from dps_hal.host.codes import REMEDIES

JOURNAL_SOCKET = "/run/systemd/journal/socket"
ERROR, WARNING, NOTICE, INFO, DEBUG = 3, 4, 5, 6, 7  # syslog(3)
LEVELS = {ERROR: "error", WARNING: "warning", NOTICE: "notice", INFO: "info", DEBUG: "debug"}
KEPT_SIZE = 128 * 1024  # bytes of text that are kept in memory, where anything is
_LINE_SIZE = 200  # bytes that a kept line is counted for beside its text

# Every event that is not named by an error code: what the catalogue says about it.
EVENTS = {
    "started": ("The service has started", "Nothing to do. 'dps-agent status' shows where the device stands."),
    "provisioning": ("The device registers", "Nothing to do. It asks the Device Provisioning Service for its hub."),
    "assigned": ("The device has its hub", "Nothing to do. The assignment is stored and survives a power cut."),
    "connected": ("The device is connected to its hub", "Nothing to do."),
    "lacking": (
        "What the hub offers has changed",
        "Nothing to do where the hub is of the Basic tier: it has no twin, methods or messages to devices. The device "
        "asks for them again now and then.",
    ),
    "disconnected": (
        "The connection to the hub ended",
        "Nothing to do unless it lasts: the device connects again by itself. 'dps-agent check' looks for the cause.",
    ),
    "waiting": ("The device waits", "Nothing to do: it tries again by itself at the time that the line names."),
    "halted": (
        "Somebody must change something",
        "The line says what. The device asks again about once an hour; 'systemctl reload dps-agent' makes it ask now.",
    ),
    "warning": ("Something was not done", "The line says what. The device goes on without it."),
    "reloaded": ("The settings were read again", "Nothing to do."),
    "refused": ("New settings were refused", "Correct what the line names, then reload. The old settings go on."),
    "reset": ("The assignment was erased", "Nothing to do. The device registers again."),
    "local": ("A program on this device asked for something", "Nothing to do if you know the program."),
    "stopped": ("The service has ended", "Nothing to do."),
}


def message_id(name: str) -> str:
    """The MESSAGE_ID of an event or an error code: 32 hex digits, the same for ever."""
    return hashlib.sha256(f"dps-agent {name}".encode()).hexdigest()[:32]


class Journal:
    """Where the lines go; safe to use from any thread, never blocks for long, never fails."""

    def __init__(
        self, stream: TextIO | None = None, verbose: bool = False, environ: Mapping[str, str] | None = None
    ) -> None:
        self.verbose = verbose
        self._stream = sys.stderr if stream is None else stream
        self._socket: socket.socket | None = None
        self._kept: deque[tuple[float, int, str, str, str]] | None = None  # time, level, event, code, text
        self._kept_size = 0
        self._lock = threading.Lock()  # over the stream: what one thread saw room for another may not take
        if _is_the_journal(self._stream, os.environ if environ is None else environ):
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
            self._socket.setblocking(False)

    def event(
        self,
        event: str,
        message: str,
        level: int = INFO,
        *,
        state: str = "",
        code: str = "",
        hub: str = "",
        retry_s: int | None = None,
        request_id: str = "",
    ) -> None:
        """One line; `event` is one of EVENTS, `code` an error code."""
        fields = {
            "DPS_EVENT": event,
            "DPS_STATE": state,
            "DPS_CODE": code,
            "DPS_HUB": hub,
            "DPS_RETRY_S": "" if retry_s is None else str(retry_s),
            "DPS_REQUEST_ID": request_id,
            "MESSAGE_ID": message_id(code if code in REMEDIES else event),
        }
        tail = "".join(f" [{part}]" for part in (code, f"request id {request_id}" if request_id else "") if part)
        self._write(message if self._socket else f"{message}{tail}", level, fields)

    def detail(self, message: str) -> None:
        """One line of what only `verbose` shows."""
        if self.verbose:
            self._write(message, DEBUG, {})

    def keep(self, wanted: bool) -> None:
        """Keeps the last lines in memory, or no lines, from now on."""
        if wanted != (self._kept is not None):
            self._kept, self._kept_size = deque() if wanted else None, 0

    def kept(self, level: int) -> list[dict[str, str]]:
        """The kept lines of this level and of worse ones, the oldest first."""
        with self._lock:
            lines = list(self._kept or ())
        return [
            {"time": utc_text(at_s), "level": LEVELS[each], "event": event, "code": code, "message": text}
            for at_s, each, event, code, text in lines
            if each <= level
        ]

    def _keep(self, level: int, event: str, code: str, text: str) -> None:
        with self._lock:
            kept = self._kept
            if kept is None:
                return
            kept.append((time.time(), level, event, code, text))
            self._kept_size += len(text) + _LINE_SIZE
            while self._kept_size > KEPT_SIZE:
                self._kept_size -= len(kept.popleft()[4]) + _LINE_SIZE

    def write(self, text: str) -> int:
        """For what wants a stream, such as `StepLines`: each line is a detail."""
        for line in text.splitlines():
            self.detail(line)
        return len(text)

    def flush(self) -> None:
        """Nothing is kept back."""

    def close(self) -> None:
        """Ends it; idempotent."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _print(self, line: str) -> None:
        """The line on the stream, unless that is a pipe, or a terminal, that nobody reads: it would block us."""
        with contextlib.suppress(io.UnsupportedOperation, AttributeError):  # no descriptor: it is in memory
            poll = select.poll()
            poll.register(self._stream.fileno(), select.POLLOUT)
            if not poll.poll(0):
                return
        self._stream.write(f"{_fitting(line)}\n")
        self._stream.flush()

    def _write(self, message: str, level: int, fields: Mapping[str, str]) -> None:
        line = printable(message).replace("\n", " | ")
        self._keep(level, fields.get("DPS_EVENT", ""), fields.get("DPS_CODE", ""), line)
        with contextlib.suppress(OSError, ValueError):  # its reader is busy or gone: a line is worth no wait
            if self._socket is None:
                with self._lock:
                    self._print(line)
                return
            shown = {"MESSAGE": line, "PRIORITY": str(level), "SYSLOG_IDENTIFIER": "dps-agent", **fields}
            text = "".join(f"{name}={printable(value)}\n" for name, value in shown.items() if value)
            self._socket.sendto(text.encode(errors="replace"), JOURNAL_SOCKET)


def _fitting(line: str) -> str:
    """The line, cut where a pipe with any room at all might not take it whole: pipe(7), PIPE_BUF."""
    content = line.encode(errors="replace")
    return line if len(content) < select.PIPE_BUF else content[: select.PIPE_BUF - 1].decode(errors="ignore")


def _is_the_journal(stream: TextIO, environ: Mapping[str, str]) -> bool:
    """Whether `stream` is what systemd connected to its journal: $JOURNAL_STREAM, systemd.exec(5)."""
    try:
        status = os.fstat(stream.fileno())
    except (OSError, ValueError, AttributeError):
        return False
    return environ.get("JOURNAL_STREAM", "") == f"{status.st_dev}:{status.st_ino}"
