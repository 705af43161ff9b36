"""The board's MQTT client for a test in another process: MicroPython, or CPython.

    micropython board_mqtt.py ROOTS CONNECT_TO          (MICROPYPATH=agent:hal:micropython:.frozen)

Reads lines `(method, arguments…)` as Python writes them, and prints what each call returns, in the same form. Besides
the client's methods there are `connect(hub, device_id, keep_alive_s, signature[, expires_at_s[, clean_session]])`,
`limit(ms)`, which changes the time that a connect may take, and `abort(ms)`, which calls it so much later, while the
next call goes on. `take_back` may be asked for an event by its number among those posted, which is that event itself.
"""

import asyncio
import sys

from dps_agent import hub_effects
from dps_agent.sas import SasToken
from dps_board import mqtt
from dps_board.config import roots_in
from dps_board.tls import Trust

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def connecting(
    hub: str,
    device_id: str,
    keep_alive_s: int,
    signature: bytes,
    expires_at_s: int = 1_800_000_000,
    clean_session: bool = False,
) -> hub_effects.Connect:
    """The effect with a token of that signature."""
    token = SasToken(f"{hub}%2Fdevices%2F{device_id}", expires_at_s, signature)
    user_name = f"{hub}/{device_id}/?api-version=2021-04-12"
    return hub_effects.Connect(hub, device_id, user_name, token, keep_alive_s, clean_session)


class Served:
    """One client, called by name."""

    def __init__(self, roots_file: str, connect_to: str) -> None:
        self.client = mqtt.HubConnection(Trust(roots_in("ca_file", roots_file)), connect_to=connect_to)
        self._abort_after_s = 0.0
        self._posted: list[hub_effects.Event] = []

    async def call(self, method: str, *arguments: "Any") -> "Any":
        """What the method returns."""
        if method == "limit":
            mqtt.CONNECT_LIMIT_MS = arguments[0]
            return None
        if method == "abort":
            self._abort_after_s = arguments[0] / 1000
            return None
        if self._abort_after_s:
            asyncio.create_task(self._abort())  # noqa: RUF006
        if method == "connect":
            arguments = connecting(*arguments)
        elif method == "post":
            self._posted.append(arguments[0])
        elif method == "take_back" and isinstance(arguments[0], int):
            arguments = (self._posted[arguments[0]],)
        answer = getattr(self.client, method)(*arguments)
        return await answer if hasattr(answer, "send") else answer

    async def _abort(self) -> None:
        after_s, self._abort_after_s = self._abort_after_s, 0.0
        await asyncio.sleep(after_s)
        self.client.abort()


async def serve(roots_file: str, connect_to: str) -> None:
    """Answers until the lines end."""
    served = Served(roots_file, connect_to)
    while True:
        line = sys.stdin.readline()
        if not line:
            return
        answer = await served.call(*eval(line, hub_effects.__dict__))
        print(repr(answer))


if __name__ == "__main__":
    asyncio.run(serve(*sys.argv[1:3]))
