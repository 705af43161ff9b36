"""What arrives from devices as a stream for consumers: server-sent events over HTTPS.

`GET /messages/events` at the port of DPS, with a token of the hubs' shared access policy. An event's `id` is the
message's number, its `data` the document that `watch --json` prints. It begins with the next message, or behind the
number in `after=N` or Last-Event-ID (0: with the oldest that is kept); `deviceId=…` narrows it down, a Host that is a
hub's name to that hub. Source: HTML living standard, 9.2. The path is that of a hub's built-in endpoint, which itself
speaks AMQP and is not emulated.
"""

import asyncio
import json
from collections.abc import AsyncGenerator, Callable
from typing import NamedTuple
from urllib.parse import parse_qs

from dps_emulator.hub_devices import Telemetry
from dps_emulator.hub_service_api import POLICY, UNAUTHORIZED, hub_named
from dps_emulator.service import BAD_REQUEST, METHOD_NOT_ALLOWED, THROTTLED, RefusalError, Request
from dps_emulator.service_api import policy_key, policy_refusal
from dps_emulator.store import Messages
from dps_text import whole_number

PATH = "/messages/events"
SCHEMA = 1
READERS_LIMIT = 32  # at the same time
PAGE = 100  # messages that are read from the store at once
BEAT_S = 15.0


class Asked(NamedTuple):
    """Where a stream begins and what it is narrowed down to; None: every device, or every hub."""

    after: int
    device_id: str | None
    hub: str | None


def document(message: Telemetry) -> str:
    """A message as a JSON document on one line, as `watch --json` and a file of telemetry have it."""
    return json.dumps({"schema": SCHEMA, **message.to_json()})


class TelemetryFeed:
    """The streams of one emulator."""

    def __init__(
        self,
        messages: Messages,
        hub_names: tuple[str, ...],
        secret: bytes,
        clock: Callable[[], float],
        clock_skew_s: int,
    ) -> None:
        self._messages = messages
        self._hub_names = hub_names
        self._key = policy_key(secret, POLICY)
        self._clock = clock
        self._clock_skew_s = clock_skew_s
        self._readers = 0

    @staticmethod
    def takes(path: str) -> bool:
        """Whether a path is the stream's."""
        return path == PATH

    def asked(self, request: Request) -> Asked:
        """What a request asks for; raises RefusalError."""
        if request.method != "GET":
            raise RefusalError(METHOD_NOT_ALLOWED, "This path takes GET.", Allow="GET")
        refusal = policy_refusal(request, POLICY, self._key, self._clock(), self._clock_skew_s)
        if refusal:
            raise RefusalError(UNAUTHORIZED, f"The request is refused: {refusal}.")
        if self._readers >= READERS_LIMIT:
            raise RefusalError(THROTTLED, f"{READERS_LIMIT} streams are open already.")
        query = parse_qs(request.query)
        begin = request.headers.get("last-event-id") or query.get("after", [None])[0]
        last = self._messages.last_number()
        after = last if begin is None else whole_number(begin, 0, 10**18)
        if after is None:
            raise RefusalError(BAD_REQUEST, "after or Last-Event-ID is not the number of a message.")
        if after > last:
            after = 0  # the number is of an emulator that kept its messages elsewhere, or nowhere
        hub = hub_named(request.headers.get("host", ""), self._hub_names)
        return Asked(after, query.get("deviceId", [None])[0], hub)

    async def events(self, asked: Asked) -> AsyncGenerator[bytes, None]:
        """The stream, at the pace of its reader; ends when it is closed."""
        after, happened = asked.after, asyncio.Event()
        self._messages.arrived.append(happened.set)
        self._readers += 1
        try:
            yield b"retry: 2000\n\n"
            while True:
                happened.clear()
                page = self._messages.page(after, asked.device_id, PAGE)
                for kept in page.kept:
                    if asked.hub in (None, kept.message.hub):
                        yield f"id: {kept.number}\ndata: {document(kept.message)}\n\n".encode()
                if page.last > after:
                    after = page.last
                    await asyncio.sleep(0)  # a reader that takes all at once, or nothing of it, holds up nobody
                    continue
                try:
                    async with asyncio.timeout(BEAT_S):
                        await happened.wait()
                except TimeoutError:
                    yield b": still here\n\n"
        finally:
            self._readers -= 1
            self._messages.arrived.remove(happened.set)
