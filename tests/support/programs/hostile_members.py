"""Programs on the device that are members of the clients' group and mean harm: what each does to the agent's socket."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

BODY_LIMIT = 256 * 1024  # bytes; what the socket takes of one message
_TURN_S = 10.0  # of one misdeed, then comes another
_PATIENCE_S = 2.0


class Member:
    """One member with his connections; each misdeed returns soon and is repeated until its turn is over."""

    def __init__(self, path: str, seed: int) -> None:
        self._path = path
        self._random = random.Random(seed)
        self._held: list[socket.socket] = []  # connections that stay open until the misdeed's turn is over
        self._misdeeds: tuple[Callable[[], None], ...] = (
            self.floods_and_leaves,
            self.holds_half_requests,
            self.pipelines,
            self.opens_streams_and_leaves,
            self.never_reads_its_stream,
            self.claims_events_of_others,
            self.asks_for_tokens,
            self.connects_only,
            self.sends_endless_heads,
            self.sends_bodies_to_nowhere,
            self.drips,
        )

    def run(self, seconds: float) -> None:
        """Does harm for so long, one misdeed after the other in an order of its own."""
        end_s = time.monotonic() + seconds
        while time.monotonic() < end_s:
            misdeed = self._random.choice(self._misdeeds)
            turn_s = min(time.monotonic() + _TURN_S, end_s)
            while time.monotonic() < turn_s:
                with contextlib.suppress(OSError):
                    misdeed()
            for held in self._held:
                held.close()
            self._held.clear()

    def floods_and_leaves(self) -> None:
        """A message of the largest size, and nobody waits for its answer."""
        with self._connection() as connection:
            connection.sendall(_post("/telemetry?by=hostile", os.urandom(BODY_LIMIT - 200)))

    def holds_half_requests(self) -> None:
        """Requests that never come to their end, as many as there is room for."""
        self._hold(b"POST /telemetry HTTP/1.1\r\nContent-Length: 200000\r\n\r\n" + b"x" * 100_000)

    def pipelines(self) -> None:
        """Thousands of requests in one write."""
        with self._connection() as connection:
            connection.sendall(b"GET /nowhere HTTP/1.1\r\n\r\n" * 2000)
            self._drain(connection)

    def opens_streams_and_leaves(self) -> None:
        """Begins to read the events, and is gone."""
        with self._connection() as connection:
            connection.sendall(b"GET /events HTTP/1.1\r\n\r\n")

    def never_reads_its_stream(self) -> None:
        """Asks for the events and reads none."""
        self._hold(b"GET /events HTTP/1.1\r\n\r\n")

    def claims_events_of_others(self) -> None:
        """Says "done" and answers for messages and calls that it never got."""
        number = self._random.randrange(100)
        with self._connection() as connection:
            for target in (f"/events/0-{number}/done", f"/methods/0-{number}?status=200", "/methods/1"):
                connection.sendall(_post(target, b"{}"))
            self._drain(connection)

    def asks_for_tokens(self) -> None:
        """Tokens, which keep the TPM busy, and commands that are not for it."""
        with self._connection() as connection:
            for target in ("/token", "/command/reset", "/command/provision?force=1", "/command/token"):
                connection.sendall(_post(target, b""))
            self._drain(connection)

    def connects_only(self) -> None:
        """Fills the places of those who wait to be let in."""
        self._hold(b"")

    def sends_endless_heads(self) -> None:
        """A request whose headers have no end."""
        with self._connection() as connection:
            connection.sendall(b"GET /status HTTP/1.1\r\n")
            for _ in range(1000):
                connection.sendall(b"X-More: " + b"y" * 1000 + b"\r\n")

    def sends_bodies_to_nowhere(self) -> None:
        """Large bodies for what does not exist."""
        with self._connection() as connection:
            connection.sendall(_post("/methods/9-9?status=200", b"[" * (BODY_LIMIT - 1000)))
            self._drain(connection)

    def drips(self) -> None:
        """A request at a few bytes a second."""
        with self._connection() as connection:
            for piece in (b"GET", b" /sta", b"tus HT", b"TP/1.1\r", b"\n"):
                connection.sendall(piece)
                time.sleep(0.3)

    def _connection(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.settimeout(_PATIENCE_S)
            connection.connect(self._path)
        except OSError:
            connection.close()
            time.sleep(0.01)
            raise
        return connection

    def _hold(self, content: bytes) -> None:
        connection = self._connection()
        self._held.append(connection)
        if content:
            connection.sendall(content)
        if len(self._held) > 64:
            time.sleep(0.2)
            self._held.pop(0).close()

    def _drain(self, connection: socket.socket) -> None:
        while connection.recv(65536):
            pass


def _post(target: str, body: bytes) -> bytes:
    return f"POST {target} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


def main() -> None:
    """PATH USER SECONDS SEED: becomes that user and does harm for so long; needs root."""
    path, user, seconds, seed = sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4])
    member = Member(path, seed)
    become(user)
    member.run(seconds)


def become(user: int) -> None:
    """Leaves root for a user that needs no account."""
    os.setgroups([])
    os.setgid(user)
    os.setuid(user)


if __name__ == "__main__":
    main()
