"""The client for programs with threads; `steps` has what it does."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from math import inf
from typing import TYPE_CHECKING, Any

from dps_agent.client import steps, values
from dps_agent.client.errors import AgentError, NotDone
from dps_agent.client.steps import Handlers, Line

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from types import TracebackType

    from dps_agent.client.spool import Spool
    from dps_agent.client.steps import Event, Steps

_log = logging.getLogger("dps_agent.client")


class Client(Handlers):
    """Asks the service on this device; may be shared by threads. Use it with `with`, or `close` it.

    `socket_path`: None for $DPS_AGENT_API_SOCKET, else /run/dps-agent/api.sock. `connections`: so many requests at once
    at most; others wait for their turn. With a `spool` telemetry is put there, and sent from there by a thread of its
    own. Every method that asks raises an AgentError, at the latest after its `timeout_s`.
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
        self._closed = threading.Event()
        self._asking = _Lines(connections, self._closed.is_set)
        self._answering = _Lines(1, self._closed.is_set)
        self._listening: set[Line] = set()
        self._more = threading.Event()  # something may have been put into the spool
        self._threads: list[threading.Thread] = []
        if spool is not None:
            self._start("dps-spool", lambda: self._drive(steps.drain()))

    # Telemetry.

    def send(
        self,
        payload: Any,
        properties: Mapping[str, str] | None = None,
        *,
        qos: int = 1,
        at_least_once: bool = False,
        timeout_s: float = 60.0,
    ) -> None:
        """Returns once the hub has the message; with a spool, once the disk has it.

        `payload`: bytes and str go out as they are, everything else as JSON. `properties`: those of the message, system
        properties with "$.". `qos` 0: returns once it is written, without an acknowledgement. MaybeDone, where the hub
        may have it; with `at_least_once` it is sent again instead.
        """
        request = values.telemetry(payload, properties, qos, at_least_once)
        if self._spool is not None:
            self._put([request])
        else:
            self._ask(request, timeout_s)

    def send_many(
        self,
        payloads: Iterable[Any],
        properties: Mapping[str, str] | None = None,
        *,
        at_least_once: bool = False,
        timeout_s: float = 60.0,
    ) -> int:
        """Sends many messages, as JSON, in as few requests as they fit into; returns how many there were.

        What was not accepted is sent again. An error says in `accepted` how many, the first ones, the hub has.
        """
        if self._spool is not None:
            return self._put(values.as_single_messages(payloads, properties))
        sent: int = self._shown(steps.ask_many(payloads, properties, at_least_once, timeout_s))
        return sent

    def flush(self, timeout_s: float = 60.0) -> None:
        """Returns once the spool is empty; NotDone where it is not within `timeout_s`."""
        self._drive(steps.flush(timeout_s))

    # The twin.

    def report(self, patch: Mapping[str, Any], *, timeout_s: float = 60.0) -> int:
        """Merges `patch` into the reported properties, None deletes; the version they have then at the hub."""
        version: int = self._ask(values.reported(patch), timeout_s)["version"]
        return version

    def twin(self, *, timeout_s: float = 60.0) -> values.Twin:
        """The device's twin, as the hub has it."""
        return values.twin_of(self._ask(values.get("/twin"), timeout_s))

    # What the cloud sends.

    def events(self, timeout_s: float | None = None) -> Iterator[Event]:
        """What the cloud sends, for `timeout_s` or until the client is closed; connects again by itself.

        A Message wants `done`, a MethodCall `answer`. `run` does that by itself.
        """
        with steps.listening(timeout_s, self._listening, self._closed.is_set) as listener:
            while (event := self._drive(listener.next())) is not None:
                yield event

    def done(self, message: values.Message, *, timeout_s: float = 20.0) -> None:
        """The message need not be delivered again."""
        self._ask(values.done(message.id), timeout_s)

    def answer(
        self, call: values.MethodCall, payload: Any = None, *, status: int = 200, timeout_s: float = 20.0
    ) -> None:
        """What the method gives back."""
        self._ask(values.answered(call.id, values.MethodAnswer(status, payload)), timeout_s)

    def run(self, timeout_s: float | None = None) -> None:
        """Gives what the cloud sends to the program's functions, one after the other, until the client is closed."""
        for event in self.events(timeout_s):
            self._drive(self._serve(event))

    def start(self) -> None:
        """Does `run` in a thread of its own, which ends with the client."""
        self._start("dps-events", self.run)

    # The device.

    def status(self, *, timeout_s: float = 10.0) -> dict[str, Any]:
        """Where the device stands, as `GET /status` has it."""
        found: dict[str, Any] = self._ask(values.get("/status"), timeout_s)
        return found

    def assignment(self, *, timeout_s: float = 10.0) -> dict[str, Any]:
        """`assignedHub`, `deviceId` and the custom payload; Refused `record.absent` while there is none."""
        found: dict[str, Any] = self._ask(values.get("/assignment"), timeout_s)
        return found

    def close(self) -> None:
        """Ends all that waits, and the connections; idempotent. What is in the spool stays there."""
        self._closed.set()
        self._more.set()
        for line in (*self._asking.all, *self._answering.all, *self._listening):
            with contextlib.suppress(OSError, AttributeError):
                line.socket.shutdown(socket.SHUT_RDWR)  # wakes whoever reads from it
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(5.0)
        for line in (*self._asking.free, *self._answering.free):  # who uses one of the others ends it
            line.end()
        if self._spool is not None:
            self._spool.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # The door.

    def _ask(self, request: values.Request, timeout_s: float) -> Any:
        return self._shown(steps.ask(request, timeout_s))

    def _shown(self, asked: Steps[Any]) -> Any:
        """As `_drive`; an error does not show its way through the steps, which says nothing to a program."""
        try:
            return self._drive(asked)
        except AgentError as error:
            raise error.with_traceback(None) from None

    def _put(self, requests: list[values.Request]) -> int:
        assert self._spool is not None
        self._spool.put(requests)
        self._more.set()
        return len(requests)

    def _drive(self, asked: Steps[Any]) -> Any:
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
                answer = self._do(effect)
            except Exception as error:
                failed = error

    def _do(self, effect: Any) -> Any:
        match effect:
            case steps.Now():
                return time.monotonic()
            case steps.Pause(seconds):
                return self._wait(seconds)
            case steps.Try(request, until_s, is_answer):
                with (self._answering if is_answer else self._asking).turn(until_s) as line:
                    return self._drive(steps.exchange(line, request, until_s))
            case steps.Dial(line, until_s):
                return self._dial(line, until_s)
            case steps.Write(line, content, until_s):
                self._set_limit(line, until_s)
                return line.socket.sendall(content)
            case steps.Read(line, until_s):
                self._set_limit(line, until_s)
                return line.socket.recv(steps.READ_SIZE)
            case steps.Call(function, argument):
                return _called(function, argument)
        return self._spooled(effect)

    def _spooled(self, effect: Any) -> Any:
        match effect:
            case steps.AwaitMore():
                return self._await_more()
            case steps.Waiting():
                return 0 if self._spool is None else len(self._spool)
        assert self._spool is not None
        match effect:
            case steps.First():
                return self._spool.first()
            case steps.Forget(number, reason, why):
                return self._spool.forget(number, reason, why)

    def _dial(self, line: Line, until_s: float) -> None:
        line.end()
        line.path = self._path
        line.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._set_limit(line, until_s)
        line.socket.connect(self._path)

    def _set_limit(self, line: Line, until_s: float) -> None:
        left_s = until_s - time.monotonic()
        if self._closed.is_set() or left_s <= 0:
            raise TimeoutError
        line.socket.settimeout(None if until_s == inf else left_s)

    def _wait(self, seconds: float) -> None:
        if self._closed.wait(seconds):
            raise steps.closed()

    def _await_more(self) -> None:
        self._more.wait()
        self._more.clear()
        self._wait(0.0)

    def _start(self, name: str, work: Callable[[], None]) -> None:
        """A thread that ends with the client; what else ends it is logged."""

        def run() -> None:
            try:
                work()
            except AgentError as error:
                if not self._closed.is_set():
                    _log.error("%s ended: %s", name, error)

        thread = threading.Thread(target=run, name=name, daemon=True)
        self._threads.append(thread)
        thread.start()


class _Lines(steps.Lines):
    """Up to `limit` lines, each one thread's for one exchange."""

    def __init__(self, limit: int, is_closed: Callable[[], bool]) -> None:
        super().__init__(is_closed)
        self._turns = threading.Semaphore(limit)

    @contextlib.contextmanager
    def turn(self, until_s: float) -> Iterator[Line]:
        """A line, the one that was used last; NotDone where none is free in time."""
        if not self._turns.acquire(blocking=False):
            left_s = min(max(until_s - time.monotonic(), 0.0), threading.TIMEOUT_MAX)
            if not self._turns.acquire(timeout=left_s):
                raise NotDone("agent.busy", "all connections of this client are in use")
        try:
            with self.one() as line:
                yield line
        finally:
            self._turns.release()


def _called(function: Callable[[Any], Any], argument: Any) -> steps.Result:
    try:
        value = function(argument)
        if hasattr(value, "__await__"):
            value.close()
            raise TypeError("a coroutine function needs AsyncClient")
        return steps.Result(value, False)
    except Exception:  # whatever it is, the program's function has failed and the client goes on
        _log.exception("the function %s failed", getattr(function, "__name__", function))
        return steps.Result(None, True)
