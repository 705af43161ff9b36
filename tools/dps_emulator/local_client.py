"""A program on the device: it uses the agent's socket with nothing but the standard library."""

import http.client
import json
import socket
import struct
from collections.abc import Iterator
from types import TracebackType
from typing import Any


class LocalClient:
    """Requests on the socket at `path`, each on a connection of its own."""

    def __init__(self, path: str, patience_s: float = 120.0) -> None:
        self.path = path
        self.patience_s = patience_s
        self.headers: dict[str, str] = {}  # of the last answer, names in lower case

    def connect(self) -> socket.socket:
        """A connection for whoever wants to send something else than HTTP."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            # A timeout of Python's would not wait for room in a full queue but end at once, with EAGAIN.
            patience = struct.pack("ll", int(self.patience_s), int(self.patience_s % 1 * 1e6))
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, patience)
            connection.connect(self.path)
            connection.settimeout(self.patience_s)
        except OSError:
            connection.close()
            raise
        return connection

    def ask(self, method: str, target: str, body: bytes = b"") -> tuple[int, Any]:
        """One request; status and document."""
        status, content = self.read(method, target, body)
        return status, json.loads(content)

    def read(self, method: str, target: str, body: bytes = b"") -> tuple[int, bytes]:
        """One request; status and body."""
        connection = http.client.HTTPConnection("localhost")
        connection.sock = self.connect()
        try:
            connection.request(method, target, body or None, {"Connection": "close"})
            answer = connection.getresponse()
            self.headers = {name.lower(): value for name, value in answer.getheaders()}
            return answer.status, answer.read()
        finally:
            connection.close()

    def events(self) -> "EventReader":
        """Reads the events; use it with `with`."""
        return EventReader(self.connect())


class EventReader:
    """One GET /events."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        connection.sendall(b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n")
        self._answer = http.client.HTTPResponse(connection)
        self._answer.begin()
        self.status = self._answer.status

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while line := self._answer.readline():
            if line.strip():
                yield json.loads(line)

    def next(self, event: str = "") -> dict[str, Any]:
        """The next event, of this kind where one is named."""
        for found in self:
            if event in ("", found["event"]):
                return found
        raise AssertionError(f"the stream ended before an event {event!r}")

    def close(self) -> None:
        """Ends the connection."""
        self._answer.close()
        self._connection.close()

    def __enter__(self) -> "EventReader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
