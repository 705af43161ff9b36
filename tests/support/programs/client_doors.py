"""Both doors of the client as one: what a test calls, one thread does or one event loop."""

from __future__ import annotations

import asyncio
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from dps_agent.client import AsyncClient, Client

if TYPE_CHECKING:
    from collections.abc import Iterator

PATIENCE_S = 60


class InLoop:
    """AsyncClient in an event loop of its own, with the methods of Client."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._client = self._do(self._open(arguments, options))

    async def _open(self, arguments: Any, options: Any) -> AsyncClient:
        return await AsyncClient(*arguments, **options).__aenter__()

    def _do(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(PATIENCE_S)

    def events(self, timeout_s: float | None = None) -> Iterator[Any]:
        """As `Client.events`."""
        events = self._client.events(timeout_s)

        async def following() -> Any:
            return await anext(events, None)

        try:
            while (event := self._do(following())) is not None:
                yield event
        finally:
            self._do(events.aclose())

    def start(self) -> None:
        """As `Client.start`."""

        async def begin() -> None:
            self._client.start()

        self._do(begin())

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._client, name)
        if name in ("method", "on_desired", "on_message"):
            return found
        return lambda *arguments, **options: self._do(found(*arguments, **options))

    def end(self) -> None:
        """Ends the client and its loop."""
        self._do(self._client.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(PATIENCE_S)
        self._loop.close()


@contextmanager
def opened(door: str, *arguments: Any, **options: Any) -> Iterator[Any]:
    """A client: `door` is "threads" or "asyncio"."""
    if door == "threads":
        with Client(*arguments, **options) as client:
            yield client
        return
    within = InLoop(*arguments, **options)
    try:
        yield within
    finally:
        within.end()
