"""HTTPS requests from a board: MicroPython only.

`main` takes the file of roots, the endpoint, where to connect to, and one word for each step: `get`, `put`, `wait=MS`,
`abort=MS` (aborts the request that follows after so long), `limit=MS` (of the requests that follow). Prints one JSON
line for each request.
"""

import asyncio
import json
import time

from dps_agent.effects import Reply
from dps_board.config import roots_in
from dps_board.https import Connection
from dps_board.tls import Trust

PATH = "/0ne00000000/registrations/press-07/register?api-version=2021-10-01"


def main(roots_file: str, endpoint: str, connect_to: str, *steps: str) -> None:
    """Does the steps in order."""
    asyncio.run(run(Connection(endpoint, Trust(roots_in("ca_file", roots_file)), connect_to), steps))


async def abort_after(connection: Connection, milliseconds: int) -> None:
    """What another task does to a request under way."""
    await asyncio.sleep_ms(milliseconds)  # type: ignore[attr-defined]
    connection.abort()


async def run(connection: Connection, steps: "tuple[str, ...]") -> None:
    """Does the steps in order."""
    limit_ms = 5000
    for step in steps:
        word, _, number = step.partition("=")
        if word == "wait":
            await asyncio.sleep_ms(int(number))  # type: ignore[attr-defined]
        elif word == "limit":
            limit_ms = int(number)
        elif word == "abort":
            asyncio.create_task(abort_after(connection, int(number)))  # noqa: RUF006
        else:
            began = time.ticks_ms()  # type: ignore[attr-defined]
            body = b'{"a":"%d"}' % (len(PATH) * 10) if word == "put" else b""
            reply = await connection.request(word.upper(), PATH, body, None, limit_ms)
            line = {"handshakes": connection.link.handshakes, "ms": time.ticks_diff(time.ticks_ms(), began)}  # type: ignore[attr-defined]
            if isinstance(reply, Reply):
                line["status"] = reply.status
                line["headers"] = reply.headers
                line["body"] = bytes(reply.body).decode()
                line["dateS"] = reply.date_s
            else:
                line["reason"] = reply.reason
                line["sent"] = reply.request_sent
            print(json.dumps(line))
    connection.close()
