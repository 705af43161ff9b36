"""The head of an HTTP answer, read from a connection whose every wait ends at one deadline."""

from __future__ import annotations

import time

from dps_agent.http1 import Reader

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket

_PIECE = 4096  # bytes that are read in one go


def seconds_until(deadline_s: float) -> float:
    """Seconds until `deadline_s` of the monotonic clock; TimeoutError where there are none."""
    left_s = deadline_s - time.monotonic()
    if left_s <= 0:
        raise TimeoutError
    return left_s


def read_head(
    connection: socket.socket, names: tuple[str, ...], deadline_s: float
) -> tuple[int, dict[str, str], bytes]:
    """Status and those headers of the next HTTP answer, and what came behind its head; raises Failed and OSError."""
    reader = Reader(0, names)
    reading = reader.final_head()
    try:
        next(reading)
        while True:
            connection.settimeout(seconds_until(deadline_s))
            reading.send(connection.recv(_PIECE))
    except StopIteration as read:
        status, headers, _ = read.value
    return status, headers, reader.rest
