"""What the client does, written once for both doors: generators that yield what they need and are sent the answer.

A door (`blocking.Client`, `tasks.AsyncClient`) owns sockets, time and the program's functions, and knows nothing of
HTTP, of errors or of what is done again. What it is asked for:

    Now()                     seconds of a clock that never goes back
    Pause(seconds)            waits; NotDone is thrown in where the client is closed
    Try(request, until_s)     `exchange` on a line of its own: the document, or an AgentError
    Dial, Write, Read         on one line, until `until_s`; an OSError is thrown in, TimeoutError where time is up
    Call(function, event)     calls the program's function: a Result
    First, Forget             the spool's: its oldest message or None; one that is not to be sent any more
    AwaitMore, Waiting        until there may be more in the spool; how many there are

Three outcomes of a request are told apart, and the kernel helps: on a Unix socket ECONNRESET and EPIPE say that the
service ended without having read all of a request, which is therefore not done. An end in order after a whole request
leaves nobody knowing.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from contextlib import contextmanager
from math import inf
from typing import TYPE_CHECKING, Any, NamedTuple

from dps_agent.client.errors import AgentError, MaybeDone, NotDone, Refused, SpoolFailed, Unreachable
from dps_agent.client.values import (
    Desired,
    Message,
    MethodAnswer,
    MethodCall,
    Request,
    answered,
    batch,
    done,
    error_in,
    event_of,
    get,
    lines_of,
    outcome,
)
from dps_agent.effects import Failed, Reply
from dps_agent.http1 import Reader

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
    from typing import TypeAlias, TypeVar

    from dps_agent.client.spool import Stored
    from dps_agent.http1 import Reading

    Value = TypeVar("Value")
    Steps: TypeAlias = Generator[Any, Any, Value]
    Function = TypeVar("Function", bound=Callable[..., Any])
    Event: TypeAlias = Message | MethodCall | Desired

SOCKET = "/run/dps-agent/api.sock"
SOCKET_NAME = "DPS_AGENT_API_SOCKET"  # the variable of the service's own setting [api] socket
ANSWER_LIMIT = 1024 * 1024  # bytes of an answer, and of a line of events
ANSWER_S = 60.0  # the service answers telemetry within 30 s
METHOD_S = 25.0  # the service waits so long for a method's answer
SILENCE_S = 150.0  # without an event; the service sends an empty line each minute
LEAST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 5.0
FLUSH_PAUSE_S = 0.02
SPOOL_PAUSE_S = 60.0  # after the disk did not do what it should
UNANSWERED_LIMIT = 10  # times that a hub may leave one message of the spool without an answer
READ_SIZE = 64 * 1024
KNOWN_SIZE = 1024  # bytes of an answer that is remembered as long as its line stands
_log = logging.getLogger("dps_agent.client")
_NOT_TAKEN = ("agent.usage", "agent.too_large")  # a message that is refused so is refused for ever


class Now(NamedTuple):
    """Seconds."""


class Pause(NamedTuple):
    """Wait."""

    seconds: float


class Try(NamedTuple):
    """Ask once. `is_answer`: on a line kept for answers, which does not wait for those who ask."""

    request: Request
    until_s: float
    is_answer: bool = False


class Dial(NamedTuple):
    """Connect the line anew."""

    line: Line
    until_s: float


class Write(NamedTuple):
    """Send all of it."""

    line: Line
    content: bytes
    until_s: float


class Read(NamedTuple):
    """What comes next, at most READ_SIZE bytes; b"" at the end."""

    line: Line
    until_s: float


class Call(NamedTuple):
    """The program's function is to have this event, or a method's payload."""

    function: Callable[[Any], Any]
    argument: Any


class Result(NamedTuple):
    """What the function returned; `failed`: it raised an error, and that was logged."""

    value: Any
    failed: bool


class First(NamedTuple):
    """The oldest message in the spool, None where there is none."""


class Forget(NamedTuple):
    """One message is not to be sent any more; `reason` and `why` as `Spool.forget` has them."""

    number: int
    reason: str = ""
    why: str = ""


class AwaitMore(NamedTuple):
    """Until somebody puts a message into the spool."""


class Waiting(NamedTuple):
    """How many messages are in the spool; 0 without one."""


class Line:
    """One connection. `is_open`: it can take a request; the door's own socket, and the path it dials, are beside it."""

    def __init__(self) -> None:
        self.socket: Any = None
        self.path = ""
        self.is_open = False
        self.reader = Reader(ANSWER_LIMIT)
        self.known: tuple[bytes, Reply | None] = (b"", None)  # an answer that came whole, and what it says

    def end(self) -> None:
        """Nobody uses it any more."""
        if self.socket is not None:
            self.socket.close()
        self.is_open = False


class Lines:
    """The lines of a door, each one user's for one exchange; the door sees to it that there are not too many."""

    def __init__(self, is_closed: Callable[[], bool]) -> None:
        self.all: list[Line] = []
        self.free: list[Line] = []
        self._is_closed = is_closed

    @contextmanager
    def one(self) -> Iterator[Line]:
        """A line, the one that was used last; it is ended unless it can take another request."""
        if self._is_closed():
            raise closed()
        line = self.free.pop() if self.free else self._made()
        try:
            yield line
        finally:
            if not line.is_open or self._is_closed():
                line.end()
            self.free.append(line)

    def _made(self) -> Line:
        line = Line()
        self.all.append(line)
        return line


class Pace:
    """How long to wait before the next try: ever longer, or as long as the service asks for, and never less."""

    def __init__(self) -> None:
        self._own_s = LEAST_PAUSE_S

    def after(self, retry_after_s: float | None) -> float:
        """Seconds, up to a quarter more than they have to be: programs that wait together come back apart."""
        least_s, self._own_s = self._own_s, min(2 * self._own_s, LONGEST_PAUSE_S)
        return (least_s if retry_after_s is None else retry_after_s) * (1 + os.urandom(1)[0] / 1024)


class Handlers:
    """The program's functions."""

    def __init__(self) -> None:
        self._methods: dict[str, Callable[[Any], Any]] = {}
        self._desired: Callable[[Any], Any] | None = None
        self._message: Callable[[Any], Any] | None = None

    def method(self, name: str) -> Callable[[Function], Function]:
        """For `@client.method("open")`: the function gets the payload; what it returns is the answer, as JSON.

        A MethodAnswer has another status than 200. A function that raises is logged and answered with 500. It has 25 s.
        """

        def register(function: Function) -> Function:
            self._methods[name] = function
            return function

        return register

    def on_desired(self, function: Function) -> Function:
        """For `@client.on_desired`: the function gets each version of the desired properties once, as Desired."""
        self._desired = function
        return function

    def on_message(self, function: Function) -> Function:
        """For `@client.on_message`: the function gets each Message; the hub is told that it is done when it returns.

        Where it raises, that is logged, and the hub delivers the message again, ten times in all.
        """
        self._message = function
        return function

    def _serve(self, event: Event) -> Steps[None]:
        """Gives one event to the function that is for it, if there is one, and the answer to the service."""
        if isinstance(event, Desired):
            if self._desired is not None:
                yield Call(self._desired, event)
        elif isinstance(event, Message):
            if self._message is not None:
                result: Result = yield Call(self._message, event)
                if not result.failed:
                    yield from _tell(done(event.id))
        elif event.name in self._methods:
            result = yield Call(self._methods[event.name], event.payload)
            answer = MethodAnswer(500, {"error": "the program's function failed"}) if result.failed else result.value
            try:
                request = answered(event.id, answer)
            except Refused:
                request = answered(event.id, MethodAnswer(500, {"error": "the program's answer is no JSON"}))
            yield from _tell(request)


class Listener:
    """Reads the events, on one line and after its end on the next; desired properties count once for each version."""

    def __init__(self, timeout_s: float | None) -> None:
        self.line = Line()
        self._timeout_s = timeout_s
        self._until_s: float | None = None
        self._came = bytearray()  # what is no whole line of text yet
        self._events: deque[Event] = deque()
        self._known: Desired | None = None
        self._pace = Pace()

    def next(self) -> Steps[Event | None]:
        """The next event; None once `timeout_s` is over. Waits and connects again where the service is not there."""
        now_s: float = yield Now()
        if self._until_s is None:
            self._until_s = inf if self._timeout_s is None else now_s + self._timeout_s
        until_s = self._until_s
        while not self._events:
            if now_s >= until_s:
                return None
            try:
                yield from self._read(now_s, until_s)
            except (NotDone, MaybeDone) as error:
                self.line.is_open = False
                pause_s = self._pace.after(error.retry_after_s)
                yield Pause(min(pause_s, max(until_s - (yield Now()), 0.0)))
            now_s = yield Now()
        return self._events.popleft()

    def _read(self, now_s: float, until_s: float) -> Steps[None]:
        if not self.line.is_open:
            yield from _open_events(self.line, min(until_s, now_s + ANSWER_S))
            self._came.clear()
            self._pace = Pace()
        for event in (yield from _next_events(self.line, self._came, until_s)):
            if isinstance(event, Desired):
                if self._known is not None and self._known[:2] == event[:2]:
                    continue
                self._known = event
            self._events.append(event)


@contextmanager
def listening(timeout_s: float | None, lines: set[Line], is_closed: Callable[[], bool]) -> Iterator[Listener]:
    """A listener whose line is one of the door's `lines` meanwhile; what a closed door says to it is no error."""
    listener = Listener(timeout_s)
    lines.add(listener.line)
    try:
        yield listener
    except NotDone:
        if not is_closed():
            raise
    finally:
        lines.discard(listener.line)
        listener.line.end()


def ask(request: Request, timeout_s: float) -> Steps[Any]:
    """The document that answers the request; asks again while it was not done, within `timeout_s`.

    Raises the last reason as soon as no time is left to wait for a better one.
    """
    until_s = (yield Now()) + timeout_s
    pace = Pace()
    while True:
        try:
            return (yield Try(request, until_s))
        except NotDone as error:
            failed: AgentError = error
        except MaybeDone as error:
            if not request.repeats:
                raise
            failed = error
        pause_s = pace.after(failed.retry_after_s)
        if (yield Now()) + pause_s >= until_s:
            raise failed
        yield Pause(pause_s)


def ask_many(
    payloads: Iterable[Any], properties: Mapping[str, str] | None, at_least_once: bool, timeout_s: float
) -> Steps[int]:
    """Sends many messages, and what of them was not accepted again, within `timeout_s`; how many there were.

    The error of one that was not accepted in time says in `accepted` how many before it were.
    """
    until_s = (yield Now()) + timeout_s
    lines = lines_of(payloads)
    accepted = 0
    pace = Pace()
    while accepted < len(lines):
        try:
            answer = yield Try(batch(lines, accepted, properties), until_s)
            accepted += answer["accepted"]
            if answer["accepted"] == answer["of"]:
                continue
            failed = error_in(answer)
        except AgentError as error:
            failed = error
        failed.accepted = accepted
        pause_s = pace.after(failed.retry_after_s)
        is_lasting = isinstance(failed, Refused) or (isinstance(failed, MaybeDone) and not at_least_once)
        if is_lasting or (yield Now()) + pause_s >= until_s:
            raise failed
        yield Pause(pause_s)
    return accepted


def exchange(line: Line, request: Request, until_s: float) -> Steps[Any]:
    """One request on one line, and the document that answers it; AgentError otherwise."""
    content = request.content()
    reply = None
    if line.is_open:  # the service may have ended it meanwhile, to make room for others
        reply = yield from _round(line, content, until_s)
    if reply is None:
        yield from _connect(line, until_s)
        reply = yield from _round(line, content, until_s)
    if reply is None:
        raise NotDone("agent.not_running", "the service ended the connection before it had read the request")
    return outcome(reply)


def drain() -> Steps[None]:
    """Sends what is in the spool, the oldest first, each until the hub has it; ends with the client alone.

    A message that the hub leaves without an answer UNANSWERED_LIMIT times is dropped: the others wait behind it.
    """
    pace = Pace()
    over: Forget | None = None  # done with at the hub; a disk that fails to forget it does not have it sent again
    number = unanswered = 0
    while True:
        try:
            if over is None:
                stored: Stored | None = yield First()
                if stored is None:
                    yield AwaitMore()
                    continue
                number, unanswered = stored.number, unanswered if stored.number == number else 0
                over = yield from _send(stored)
            yield over
            over = None
            pace = Pace()
        except SpoolFailed as error:
            _log.error("the spool waits: %s", error)
            yield Pause(pace.after(SPOOL_PAUSE_S))
        except AgentError as error:
            unanswered += error.code == "agent.unacknowledged"
            if unanswered >= UNANSWERED_LIMIT:
                over = Forget(number, "unanswered", f"{unanswered} times: {error}")
            else:
                yield Pause(pace.after(LONGEST_PAUSE_S if isinstance(error, Refused) else error.retry_after_s))


def _send(stored: Stored) -> Steps[Forget]:
    """Sends a message of the spool; how it is to be forgotten."""
    try:
        yield Try(stored.request, (yield Now()) + ANSWER_S)
    except Refused as error:
        if error.code not in _NOT_TAKEN:
            raise
        return Forget(stored.number, "refused", str(error))
    return Forget(stored.number)


def flush(timeout_s: float) -> Steps[None]:
    """Until the spool is empty; NotDone where it is not within `timeout_s`."""
    until_s = (yield Now()) + timeout_s
    while waiting := (yield Waiting()):
        if (yield Now()) >= until_s:
            raise NotDone("agent.out_of_time", f"{waiting} messages are still in the spool")
        yield Pause(FLUSH_PAUSE_S)


def socket_path(path: str | os.PathLike[str] | None) -> str:
    """Where the service's socket is: as the program says, as the environment says, or where the package has it."""
    return os.fspath(path) if path is not None else os.environ.get(SOCKET_NAME) or SOCKET


def closed() -> NotDone:
    """What is thrown into steps that wait when their client is closed."""
    return NotDone("agent.interrupted", "the client was closed")


def _tell(request: Request) -> Steps[None]:
    """An answer; one that comes too late, or that another program has given, is nobody's concern any more."""
    until_s = (yield Now()) + METHOD_S
    pace = Pace()
    while True:
        try:
            yield Try(request, until_s, True)
            return
        except Refused:
            return
        except (NotDone, MaybeDone) as error:
            pause_s = pace.after(error.retry_after_s)
        if (yield Now()) + pause_s >= until_s:
            return
        yield Pause(pause_s)


def _connect(line: Line, until_s: float) -> Steps[None]:
    line.is_open = False
    line.reader = Reader(ANSWER_LIMIT)
    line.known = b"", None
    try:
        yield Dial(line, until_s)
    except (TimeoutError, BlockingIOError):
        raise NotDone("agent.busy", "too many programs wait at the service's socket") from None
    except PermissionError as error:
        text = f"the service's socket is not for this user, who needs the group dps-agent-clients: {error.strerror}"
        raise Refused("agent.denied", text) from None
    except OSError as error:
        text = f"no service answers at the socket {line.path} (${SOCKET_NAME} names another)"
        raise Unreachable("agent.not_running", f"{text}: {error.strerror or error}") from None


def _round(line: Line, content: bytes, until_s: float) -> Steps[Reply | None]:
    """One request and its answer, which may come although the request was not read; None where there is neither."""
    line.is_open = False
    is_sent = True
    try:
        yield Write(line, content, until_s)
    except TimeoutError:
        raise NotDone("agent.out_of_time", "the service did not take the request in time") from None
    except OSError:
        is_sent = False  # a service that has no room says so and ends the connection
    try:
        reply, line.is_open = yield from _next_answer(line, until_s)
    except ConnectionResetError:
        return None
    except TimeoutError:
        raise MaybeDone("agent.out_of_time", "no answer in time: whether it was done is not known") from None
    except (OSError, Failed) as error:
        if not is_sent:
            return None
        raise MaybeDone("agent.not_running", f"no whole answer: whether it was done is not known: {error}") from None
    return reply


def _next_answer(line: Line, until_s: float) -> Steps[tuple[Reply, bool]]:
    """The next answer, and whether the line can take another request; most are alike, and are read once."""
    came: bytes = yield Read(line, until_s)
    same, known = line.known
    if known is not None and came == same:
        return known, True
    reading = line.reader.answer()
    next(reading)  # nothing is left of the answer before: a line with more than that takes no other request
    try:
        reading.send(came)
    except StopIteration as end:
        reply, is_open = end.value
        if is_open and len(came) <= KNOWN_SIZE:
            line.known = came, reply
        return reply, is_open
    return (yield from _rest(line, reading, until_s))


def _open_events(line: Line, until_s: float) -> Steps[None]:
    yield from _connect(line, until_s)
    reader = line.reader
    try:
        yield Write(line, get("/events").content(), until_s)
        status, headers, version = yield from _read(line, reader.final_head(), until_s)
        if status == 200 and headers.get("transfer-encoding") == "chunked":
            line.is_open = True
            return
        body = yield from _read(line, reader.body(headers, version), until_s)
    except (OSError, Failed) as error:
        raise NotDone("agent.not_running", f"the service did not begin with the events: {error}") from None
    outcome(Reply(status, headers, body, None))
    raise NotDone("agent.bug", "the service's events are no stream")


def _next_events(line: Line, came: bytearray, until_s: float) -> Steps[list[Event]]:
    """The events of the next chunk; `came` holds what is no whole line yet."""
    silent_s = (yield Now()) + SILENCE_S
    try:
        size = yield from _read(line, line.reader.chunk(came), min(until_s, silent_s))
    except TimeoutError:
        if until_s < silent_s:
            return []
        raise NotDone("agent.not_running", f"the service said nothing for {SILENCE_S:.0f} s") from None
    except (OSError, Failed) as error:
        raise NotDone("agent.not_running", f"the service ended the events: {error}") from None
    if not size:
        raise NotDone("agent.not_running", "the service ended the events")
    whole, _, rest = bytes(came).rpartition(b"\n")
    came[:] = rest
    return [event for text in whole.split(b"\n") if (event := event_of(text)) is not None]


def _read(line: Line, reading: Reading[Value], until_s: float) -> Steps[Value]:
    """What the reading makes of what comes on the line."""
    try:
        next(reading)
    except StopIteration as end:
        value: Value = end.value
        return value
    return (yield from _rest(line, reading, until_s))


def _rest(line: Line, reading: Reading[Value], until_s: float) -> Steps[Value]:
    """The same of one that has begun."""
    try:
        while True:
            received: bytes = yield Read(line, until_s)
            reading.send(received)
    except StopIteration as end:
        value: Value = end.value
        return value
