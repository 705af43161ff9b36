"""The time as an NTP server says it (RFC 5905): unauthenticated, so a proposal at most."""

import asyncio
import socket

from dps_hal.platform import ms_since, random_bytes, ticks_ms

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

PORT = 123
_POLL_S = 0.02
_EPOCH_S = 2_208_988_800  # 1970 in seconds since 1900
_ERA_S = 1 << 32
_CLIENT = b"\x23" + bytes(39)  # version 4, mode 3; our transmit time follows
_SERVER_MODE = 4
_STRATA = range(1, 16)


async def ask(
    server: str, port: int = PORT, limit_ms: int = 2000, while_waiting: "Callable[[], None] | None" = None
) -> "int | None":
    """Seconds since 1970 by `server`, None where no sound answer came within `limit_ms`.

    Our transmit time is random, and the answer has to carry it: somebody who does not see the request cannot answer it.
    """
    asker = None
    try:
        family, _, _, _, address = socket.getaddrinfo(server, port, 0, socket.SOCK_DGRAM)[0]
        asker = socket.socket(family, socket.SOCK_DGRAM)
        asker.setblocking(False)
        mark = random_bytes(8)
        started_ms = ticks_ms()
        asker.sendto(_CLIENT + mark, address)
        while ms_since(started_ms) < limit_ms:
            if while_waiting is not None:
                while_waiting()
            await asyncio.sleep(_POLL_S)
            try:
                answer = asker.recv(48)
            except OSError:
                continue  # nothing has come yet
            now_s = read_answer(answer, mark)
            if now_s is not None:
                return now_s
    except OSError:
        pass  # no route, no such name: no answer
    finally:
        if asker is not None:
            asker.close()
    return None


def read_answer(answer: bytes, mark: bytes) -> "int | None":
    """The seconds since 1970 in a server's answer to the request with transmit time `mark`; None for anything else."""
    if len(answer) < 48 or answer[0] & 7 != _SERVER_MODE or answer[0] >> 6 == 3 or answer[1] not in _STRATA:
        return None  # 3: the server itself is not synchronised
    if answer[24:32] != mark:
        return None
    seconds = int.from_bytes(answer[40:44], "big")
    if seconds < _EPOCH_S:
        seconds += _ERA_S  # the era that begins in 2036
    return seconds - _EPOCH_S
