"""A service at a Unix socket that answers as a test says, byte for byte, and notes what it was asked for."""

from __future__ import annotations

import json
import socket
import threading
import time
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from types import TracebackType

SILENT = b"silent"  # nothing is answered, and the connection stands
CUT = b"\0cut"  # at the end of an answer: the connection ends there


class Asked(NamedTuple):
    """One request that came."""

    line: str  # method and target
    headers: dict[str, str]
    body: bytes
    at_s: float  # of the monotonic clock


class ScriptedService:
    """Listens at `path` in a thread; use it with `with`.

    `answer` gets each request, what it returns is sent: b"" ends the connection in order, CUT behind an answer does so
    in the middle of it, SILENT answers nothing. With `abort_next` a connection is ended as it is when a service is
    killed, without a look at what came; what is in `at_once` it is sent instead, and its connection ended, unread.
    """

    def __init__(self, path: Path, answer: Callable[[Asked], bytes]) -> None:
        self.path = path
        self.asked: list[Asked] = []
        self.connections = 0
        self.abort_next = 0
        self.at_once = b""
        self._answer = answer
        self._open: set[socket.socket] = set()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        self._listener.listen(64)
        self._threads: list[threading.Thread] = []
        self._ended = False
        self._begin(self._accept)

    def drop(self) -> None:
        """Ends every connection of now."""
        for connection in list(self._open):
            self._shut(connection)

    def lines(self) -> list[str]:
        """Method and target of all that came."""
        return [asked.line for asked in self.asked]

    def _begin(self, work: Callable[[], None]) -> None:
        thread = threading.Thread(target=work, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            if self._ended:
                connection.close()
                return
            if self.at_once:
                connection.send(self.at_once)
                connection.close()
                continue
            self.connections += 1
            self._open.add(connection)
            self._begin(lambda connection=connection: self._serve(connection))  # type: ignore[misc]

    def _serve(self, connection: socket.socket) -> None:
        with connection:
            try:
                came = b""
                while True:
                    if self.abort_next:
                        connection.recv(1, socket.MSG_PEEK)  # something is there, and stays unread
                        self.abort_next -= 1
                        break
                    while b"\r\n\r\n" not in came:
                        piece = connection.recv(65536)
                        if not piece:
                            return
                        came += piece
                    head, _, came = came.partition(b"\r\n\r\n")
                    line, *fields = head.decode().split("\r\n")
                    headers = {name.lower(): value for name, _, value in (field.partition(": ") for field in fields)}
                    while len(came) < int(headers.get("content-length", "0")):
                        came += connection.recv(65536)
                    size = int(headers.get("content-length", "0"))
                    asked = Asked(line.removesuffix(" HTTP/1.1"), headers, came[:size], time.monotonic())
                    came = came[size:]
                    self.asked.append(asked)
                    answer = self._answer(asked)
                    if answer == SILENT:
                        connection.recv(1)
                        return
                    connection.sendall(answer.removesuffix(CUT))
                    if not answer or answer.endswith(CUT):
                        return
            except OSError:
                return
            finally:
                self._open.discard(connection)

    @staticmethod
    def _shut(connection: socket.socket) -> None:
        try:
            connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            return

    def close(self) -> None:
        """Ends the service as `systemctl stop` does: the socket is gone."""
        self._ended = True
        self.path.unlink(missing_ok=True)
        self._shut(self._listener)
        self._listener.close()
        self.drop()
        for thread in self._threads:
            thread.join(10)

    def __enter__(self) -> ScriptedService:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def answer(status: int, document: Any, retry_after_s: int | None = None) -> bytes:
    """One whole answer."""
    body = json.dumps(document).encode() + b"\n"
    retry = f"Retry-After: {retry_after_s}\r\n" if retry_after_s is not None else ""
    return f"HTTP/1.1 {status} Said\r\n{retry}Content-Length: {len(body)}\r\n\r\n".encode() + body


def error(status: int, code: str, retry_after_s: int | None = None) -> bytes:
    """One that is an error."""
    return answer(
        status, {"error": {"code": code, "message": f"said {code}", "retryAfterS": retry_after_s}}, retry_after_s
    )


def stream(*documents: Any) -> bytes:
    """The beginning of GET /events, and these events."""
    return b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"".join(map(event, documents))


def event(document: Any) -> bytes:
    """One event of a stream; None is the empty line that shows that both are there."""
    line = b"\n" if document is None else json.dumps(document).encode() + b"\n"
    return b"%x\r\n%b\r\n" % (len(line), line)
