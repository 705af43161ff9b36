"""The messages to a device one after the other, for a program that has a loop for them: see `Agent.messages`.

A file of its own, loaded by the programs that read in this way.
"""

import asyncio

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NamedTuple

    class Message(NamedTuple):
        """One message; `payload` is None where it was too large for this device."""

        properties: "dict[str, str]"
        payload: "bytes | None"
else:
    from dps_hal.named import namedtuple

    Message = namedtuple("Message", ("properties", "payload"))


class Messages:
    """An asynchronous iterator: a message is done with, for the hub, when the next one is asked for."""

    def __init__(self, agent: "Any") -> None:
        self._waiting: list[Any] = []  # what has come: the message, and the event that says that it is done with
        self._came = asyncio.Event()
        self._done: Any = None  # of the message that the program has in hand
        agent.on_message = self._take

    def __aiter__(self) -> "Messages":
        return self

    async def __anext__(self) -> Message:
        if self._done is not None:
            self._done.set()
        while not self._waiting:
            self._came.clear()
            await self._came.wait()
        message, self._done = self._waiting.pop(0)
        return message  # type: ignore[no-any-return]

    async def _take(self, properties: "dict[str, str]", payload: "bytes | None") -> None:
        """Holds one message until the program is done with it."""
        done = asyncio.Event()
        self._waiting.append((Message(properties, payload), done))
        self._came.set()
        await done.wait()
