"""The client for programs with asyncio; `steps` has what it does."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from math import inf
from typing import TYPE_CHECKING, Any

from dps_agent.client import steps, values
from dps_agent.client.errors import AgentError, NotDone
from dps_agent.client.steps import Handlers, Line

if TYPE_CHECKING:
    import os
    from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterable, Mapping
    from types import TracebackType

    from dps_agent.client.spool import Spool
    from dps_agent.client.steps import Event, Steps

_log = logging.getLogger("dps_agent.client")


class AsyncClient(Handlers):
    """`Client` with `async`: the same methods and arguments, in one event loop. Use it with `async with`.

    The program's functions may be coroutine functions. What a spool does to the disk, a thread does.
    """

    def __init__(
        self,
        socket_path: str | os.PathLike[str] | None = None,
        *,
        connections: int = 4,
        spool: Spool | None = None,
    ) -> None:
        super().__init__()
        self._path = steps.socket_path(socket_path)
        self._spool = spool
        self._drains = False
        self._closed = asyncio.Event()
        self._asking = _Lines(connections, self._closed.is_set)
        self._answering = _Lines(1, self._closed.is_set)
        self._more = asyncio.Event()  # something may have been put into the spool
        self._tasks: set[asyncio.Task[None]] = set()
        self._listening: set[Line] = set()

    # Telemetry.

    async def send(
        self,
        payload: Any,
        properties: Mapping[str, str] | None = None,
        *,
        qos: int = 1,
        at_least_once: bool = False,
        timeout_s: float = 60.0,
    ) -> None:
        """See `Client.send`."""
        request = values.telemetry(payload, properties, qos, at_least_once)
        if self._spool is not None:
            await self._put([request])
        else:
            await self._ask(request, timeout_s)

    async def send_many(
        self,
        payloads: Iterable[Any],
        properties: Mapping[str, str] | None = None,
        *,
        at_least_once: bool = False,
        timeout_s: float = 60.0,
    ) -> int:
        """See `Client.send_many`."""
        if self._spool is not None:
            return await self._put(values.as_single_messages(payloads, properties))
        sent: int = await self._shown(steps.ask_many(payloads, properties, at_least_once, timeout_s))
        return sent

    async def flush(self, timeout_s: float = 60.0) -> None:
        """See `Client.flush`."""
        await self._drive(steps.flush(timeout_s))

    # The twin.

    async def report(self, patch: Mapping[str, Any], *, timeout_s: float = 60.0) -> int:
        """See `Client.report`."""
        version: int = (await self._ask(values.reported(patch), timeout_s))["version"]
        return version

    async def twin(self, *, timeout_s: float = 60.0) -> values.Twin:
        """See `Client.twin`."""
        return values.twin_of(await self._ask(values.get("/twin"), timeout_s))

    # What the cloud sends.

    async def events(self, timeout_s: float | None = None) -> AsyncGenerator[Event, None]:
        """See `Client.events`."""
        with steps.listening(timeout_s, self._listening, self._closed.is_set) as listener:
            while (event := await self._drive(listener.next())) is not None:
                yield event

    async def done(self, message: values.Message, *, timeout_s: float = 20.0) -> None:
        """See `Client.done`."""
        await self._ask(values.done(message.id), timeout_s)

    async def answer(
        self, call: values.MethodCall, payload: Any = None, *, status: int = 200, timeout_s: float = 20.0
    ) -> None:
        """See `Client.answer`."""
        await self._ask(values.answered(call.id, values.MethodAnswer(status, payload)), timeout_s)

    async def run(self, timeout_s: float | None = None) -> None:
        """See `Client.run`."""
        async with contextlib.aclosing(self.events(timeout_s)) as events:
            async for event in events:
                await self._drive(self._serve(event))

    def start(self) -> None:
        """Does `run` in a task of its own, which ends with the client."""
        self._start(self.run())

    # The device.

    async def status(self, *, timeout_s: float = 10.0) -> dict[str, Any]:
        """See `Client.status`."""
        found: dict[str, Any] = await self._ask(values.get("/status"), timeout_s)
        return found

    async def assignment(self, *, timeout_s: float = 10.0) -> dict[str, Any]:
        """See `Client.assignment`."""
        found: dict[str, Any] = await self._ask(values.get("/assignment"), timeout_s)
        return found

    async def close(self) -> None:
        """See `Client.close`."""
        self._closed.set()
        self._more.set()
        for line in (*self._asking.all, *self._answering.all, *self._listening):
            with contextlib.suppress(OSError, AttributeError):
                line.socket.shutdown(socket.SHUT_RDWR)  # wakes whoever reads from it
        others = self._tasks - {asyncio.current_task()}
        if others:
            _, late = await asyncio.wait(others, timeout=5.0)
            for task in late:
                task.cancel()
        for line in (*self._asking.free, *self._answering.free):  # who uses one of the others ends it
            line.end()
        if self._spool is not None:
            await asyncio.to_thread(self._spool.close)

    async def __aenter__(self) -> AsyncClient:
        self._begin_to_drain()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    # The door.

    async def _ask(self, request: values.Request, timeout_s: float) -> Any:
        return await self._shown(steps.ask(request, timeout_s))

    def _begin_to_drain(self) -> None:
        """Sends what is in the spool, also what another program has left there, from now on."""
        if self._spool is not None and not self._drains:
            self._drains = True
            self._start(self._drive(steps.drain()))

    async def _shown(self, asked: Steps[Any]) -> Any:
        """As `_drive`; an error does not show its way through the steps, which says nothing to a program."""
        try:
            return await self._drive(asked)
        except AgentError as error:
            raise error.with_traceback(None) from None

    async def _put(self, requests: list[values.Request]) -> int:
        self._begin_to_drain()
        await asyncio.to_thread(self._store, requests, asyncio.get_running_loop())
        return len(requests)

    def _store(self, requests: list[values.Request], loop: asyncio.AbstractEventLoop) -> None:
        """In a thread, which also wakes those who send: whoever waits for it may be cancelled meanwhile."""
        assert self._spool is not None
        self._spool.put(requests)
        with contextlib.suppress(RuntimeError):  # the loop is closed, and nobody sends any more
            loop.call_soon_threadsafe(self._more.set)

    async def _drive(self, asked: Steps[Any]) -> Any:
        """Does what the steps ask for until they end; their value, or their error."""
        answer: Any = None
        failed: Exception | None = None
        while True:
            try:
                effect = asked.send(answer) if failed is None else asked.throw(failed)
            except StopIteration as end:
                return end.value
            answer = failed = None
            try:
                answer = await self._do(effect)
            except Exception as error:
                failed = error

    async def _do(self, effect: Any) -> Any:
        match effect:
            case steps.Now():
                return asyncio.get_running_loop().time()
            case steps.Pause(seconds):
                return await self._wait(seconds)
            case steps.Try(request, until_s, is_answer):
                async with (self._answering if is_answer else self._asking).turn(until_s) as line:
                    return await self._drive(steps.exchange(line, request, until_s))
            case steps.Dial(line, until_s):
                return await self._dial(line, until_s)
            case steps.Write(line, content, until_s):
                async with asyncio.timeout_at(_end_of(until_s)):
                    return await asyncio.get_running_loop().sock_sendall(line.socket, content)
            case steps.Read(line, until_s):
                async with asyncio.timeout_at(_end_of(until_s)):
                    return await asyncio.get_running_loop().sock_recv(line.socket, steps.READ_SIZE)
            case steps.Call(function, argument):
                return await _called(function, argument)
        return await self._spooled(effect)

    async def _spooled(self, effect: Any) -> Any:
        match effect:
            case steps.AwaitMore():
                await self._more.wait()
                self._more.clear()
                return await self._wait(0.0)
            case steps.Waiting():
                return 0 if self._spool is None else len(self._spool)
        assert self._spool is not None
        match effect:
            case steps.First():
                return await asyncio.to_thread(self._spool.first)
            case steps.Forget(number, reason, why):
                return await asyncio.to_thread(self._spool.forget, number, reason, why)

    async def _dial(self, line: Line, until_s: float) -> None:
        line.end()
        line.path = self._path
        line.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        async with asyncio.timeout_at(_end_of(until_s)):
            await asyncio.get_running_loop().sock_connect(line.socket, self._path)

    async def _wait(self, seconds: float) -> None:
        if not self._closed.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._closed.wait()
        if self._closed.is_set():
            raise steps.closed()

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        """A task that ends with the client; what else ends it is logged."""

        async def run() -> None:
            try:
                await work
            except AgentError as error:
                if self._closed.is_set():
                    return
                _log.error("what the client does beside the program ended: %s", error)

        task = asyncio.get_running_loop().create_task(run())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


class _Lines(steps.Lines):
    """Up to `limit` lines, each one task's for one exchange."""

    def __init__(self, limit: int, is_closed: Callable[[], bool]) -> None:
        super().__init__(is_closed)
        self._turns = asyncio.Semaphore(limit)

    @contextlib.asynccontextmanager
    async def turn(self, until_s: float) -> AsyncIterator[Line]:
        """A line, the one that was used last; NotDone where none is free in time."""
        try:
            async with asyncio.timeout_at(until_s):
                await self._turns.acquire()
        except TimeoutError:
            raise NotDone("agent.busy", "all connections of this client are in use") from None
        try:
            with self.one() as line:
                yield line
        finally:
            self._turns.release()


async def _called(function: Callable[[Any], Any], argument: Any) -> steps.Result:
    try:
        value = function(argument)
        return steps.Result(await value if hasattr(value, "__await__") else value, False)
    except Exception:  # whatever it is, the program's function has failed and the client goes on
        _log.exception("the function %s failed", getattr(function, "__name__", function))
        return steps.Result(None, True)


def _end_of(until_s: float) -> float | None:
    return None if until_s == inf else until_s
