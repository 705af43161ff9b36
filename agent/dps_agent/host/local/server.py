"""HTTP/1.1 on a Unix socket for other programs on this device: sockets and limits, and no route.

It serves all programs and waits for none: every size, count and time has a bound, and a program that is too slow loses
its connection. It has its turns in the loop of the service's main thread (`dps_agent.host.loop`), whatever that waits
for, from when it is `served` there to its `close`. What may be asked for stands in `routes`, what the hub sent in
`events`. Nothing is queued here: telemetry is accepted once the hub has it, and a cloud-to-device message stays the
hub's until a program says that it is done with it.

Each connection (`_Client`) is a small machine of its own, whose state is what it has and not a name:

1. Idle: nothing of a request has come. It has IDLE_LIMIT_S.
2. It sends a head (`head`), then a body (`body`); it has REQUEST_LIMIT_S for both together. With the head its user's
   share is taken. It is given back once the request was begun with, that of telemetry once the session is done with it.
3. It waits for us (`pending`): a command is with the service, or telemetry with the hub's session.
4. It is sent to (`lines`): the answer, and then it is idle again; it may take no byte for SEND_LIMIT_S.
5. It reads events (`streams`), to its end.

`ends` says that the connection goes once all is sent, `over` that the program sends nothing more and may still wait for
its answer, `ignored` that what comes of a body is thrown away. A connection may go in any state: `_drop` gives back
what it had, but for telemetry that the session has begun with. Nothing is read of one that waits for us, so that a
program cannot queue.

A turn has six steps: 1. What came on connections, and what they can take. 2. New connections. 3. Requests that were
left over, for each client has REQUESTS_A_TURN. 4. Answers that the service has put into the inbox. 5. Events for
readers. 6. Whoever has had his time.

Who pushes whom. The service calls `show`, `tell`, `answer`, `forget` between two turns; answers wait in the inbox for
the next one, which is due at once, so that no program's next request comes in the middle of what the service does. A
turn calls `post`, `command` and `take_back`, which return at once, and touches nothing else of the service but its
journal.

Users of the socket are not trusted: each has a share of everything that is counted (`shares`), and what a client that
has gone asked for is taken back where nobody has begun with it. A second socket, `path` with ROOT_SUFFIX, is open to
root and the service's own user alone: no crowd at the first one keeps them waiting.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import select
import socket
import stat
import struct
import time
from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple

from dps_agent.effects import NO_REPLY_TOO_LARGE, Failed
from dps_agent.host.config import ROOT_SUFFIX
from dps_agent.host.counts import Counts
from dps_agent.host.journal import NOTICE, WARNING, Journal
from dps_agent.host.local.batch import Batch, Messages
from dps_agent.host.local.events import Events, chunk
from dps_agent.host.local.heads import REQUEST_HEADERS, Head, read_head
from dps_agent.host.local.routes import (
    ACCEPTED,
    METRICS_TYPE,
    OUT_OF_TIME,
    RETRY_AFTER_S,
    TELEMETRY_LIMIT_S,
    UNKNOWN,
    UNSENT,
    Begun,
    Command,
    Later,
    Refused,
    Reply,
    Request,
    Routes,
    Snapshot,
    Stream,
    Text,
    error_document,
    outcome_of,
    outcome_of_lines,
)
from dps_agent.host.local.shares import USE_EVERY_S, Lines, Peer, Places, is_trusted
from dps_agent.host.local.statefile import make_runtime_folder
from dps_agent.host.worker import bug
from dps_agent.http1 import Reader
from dps_agent.hub_effects import (
    MethodCall,
    Readers,
    ReadTwin,
    Report,
    SendTelemetry,
    TelemetryDone,
    TwinDone,
    Withdrawn,
)
from dps_agent.session import IN_FLIGHT_LIMIT, IN_FLIGHT_SIZE
from dps_hal.platform import to_json
from dps_text import whole_number

if TYPE_CHECKING:
    from collections.abc import Callable

    from dps_agent.http1 import Reading
    from dps_agent.hub_effects import Event, Message

FOR_THE_HUB = (SendTelemetry, Report, ReadTwin)  # answered by the hub's session
CLIENT_GROUP = "dps-agent-clients"
GROUP_FILE = "/etc/group"
BACKLOG = 4096  # connections that wait to be looked at; a program that finds it full gets EAGAIN, whoever filled it
ACCEPTS_A_TURN = 256  # connections that are let in before anything else is done
ACCEPT_AGAIN_S = 0.1  # after there was no descriptor left for a connection
REQUESTS_A_TURN = 16  # requests of one client that are done before the others have their turn
KNOWN_SIZE = 1024  # bytes of a head that is remembered as long as its connection stands
READ_SIZE = 20 * 1024  # bytes of heads in one go: one that is too long is read, so that its answer arrives
BODY_LIMIT = 256 * 1024  # bytes; IoT Hub quotas: a device-to-cloud message
LINES_LIMIT = 128  # events that a reader may be behind
READERS_LIMIT = 2 * 1024 * 1024  # bytes that all readers together may be behind, beside what is held anyway
REQUEST_LIMIT_S = 10.0  # from a request's first byte to its last
IDLE_LIMIT_S = 60.0  # between two requests
SEND_LIMIT_S = 10.0  # in which a client takes no byte of what it is sent
HEARTBEAT_S = 60.0  # an empty line, so that both sides notice when the other is gone

# Three numbers each: in all, of one user who is not trusted, kept for root and the service's own user. Four users at
# their limits leave the kept ones alone.
CLIENTS = (32, 7, 4)  # connections
STREAMS = (16, 3, 4)  # connections with GET /events
UNDER_WAY = (IN_FLIGHT_LIMIT, 7, 4)  # telemetry messages, from the end of their heads until the hub has answered
BYTES = (IN_FLIGHT_SIZE, 2 * BODY_LIMIT, 2 * BODY_LIMIT)  # bytes of bodies and their topics, for as long

_REASONS = {
    200: "OK",
    400: "Bad Request",
    403: "Forbidden",
    404: "Not Found",
    405: "Method Not Allowed",
    408: "Request Timeout",
    409: "Conflict",
    411: "Length Required",
    413: "Content Too Large",
    429: "Too Many Requests",
    431: "Request Header Fields Too Large",
    500: "Internal Server Error",
    501: "Not Implemented",
    503: "Service Unavailable",
    504: "Gateway Timeout",
}
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
_STREAM_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\nTransfer-Encoding: chunked\r\n\r\n"


class _Body(NamedTuple):
    """A request whose head was read, and what has come of its body of `size` bytes."""

    begun: Begun
    size: int
    share: int  # bytes, taken of its user's: the body, and the topic that it goes to the hub under
    closes: bool  # once this was answered the connection ends
    content: bytearray


class _UnderWay(NamedTuple):
    """What was handed to the hub's session and was not answered yet; it takes `size` bytes of a share."""

    event: SendTelemetry | Report | ReadTwin
    user: int
    size: int


class _Client:
    """One connection."""

    def __init__(self, connection: socket.socket, peer: Peer, now_s: float) -> None:
        self.socket = connection
        self.peer = peer
        self.reader = Reader(0, REQUEST_HEADERS)
        self.came = b""  # what has come and was not given to the reader yet
        self.head: Reading[Head] | None = None  # a head that has begun and is not whole
        self.body: _Body | None = None
        self.ignored = 0  # bytes still to come of a body that nobody wants
        self.lines: deque[bytes] = deque()  # what is still to be sent; all readers of events share the objects
        self.sent = 0  # bytes of the first line that were sent
        self.deadline_s = now_s + IDLE_LIMIT_S
        self.pending: int | None = None  # the request that waits for an answer
        self.asked: Event | Command | None = None  # what the service or the session has to answer
        self.streams = False
        self.ends = False  # it is closed once all is sent
        self.over = False  # it sends nothing more, and may wait for an answer
        self.queued = False  # it had its turn, has sent more than that, and is in `_unfinished` for the next one
        self.known: tuple[bytes, Head | None] = (b"", None)  # a head that it has sent, and what it says: most are alike
        self.noted = False  # that this user uses the socket
        self.watched = select.EPOLLIN  # what the kernel is to tell of it

    def is_idle(self) -> bool:
        return not (self.pending or self.streams or self.lines or self.has_begun())

    def has_begun(self) -> bool:
        """Whether something of a request has come."""
        return bool(self.came or self.reader.rest or self.head or self.body)

    def waits_for_us(self) -> bool:
        """Whether no request of it is to be begun now."""
        return bool(self.pending or self.streams or self.lines or (self.ends and not self.ignored))

    def is_to_be_read(self) -> bool:
        """Whether more of what it sends is taken now."""
        return not (self.queued or self.over or self.waits_for_us())


class LocalServer:
    """The socket at `path`; OSError where it cannot be made.

    It is `Served` by a loop, on whose thread all methods are called; the service calls `show`, `tell`, `answer` and
    `forget`. `post` takes an event for the hub's session, or returns False; `command` takes a `Command`; `take_back`
    drops one of either that nobody has begun with, and says whether it did. They are called in a turn and return at
    once.
    """

    def __init__(
        self,
        path: str,
        *,
        allow_token: bool,
        post: Callable[[Event], bool],
        command: Callable[[Command], None],
        take_back: Callable[[Event | Command], bool],
        journal: Journal,
        counts: Counts | None = None,
    ) -> None:
        self.path = path
        self._events = Events()
        self._counts = counts or Counts()
        self._routes = Routes(self._events, allow_token, self._counts)
        self._post = post
        self._command = command
        self._take_back = take_back
        self._journal = journal
        self._lines = Lines(journal)
        self._clients: dict[int, _Client] = {}  # by the number of the descriptor
        self._unfinished: list[_Client] = []  # clients whose requests were received and wait for their turn
        self._inbox: deque[Callable[[], None]] = deque()  # answers that came between two turns
        self._serial = 0
        self._pending: dict[int, _Client] = {}
        self._under_way: dict[int, _UnderWay] = {}
        self._batches: dict[int, Batch] = {}  # by the request id under which the program waits
        self._batch_of: dict[int, Batch] = {}  # by the request id of each message under way
        self._places = Places(*CLIENTS)
        self._stream_places = Places(*STREAMS)
        self._streams = 0  # connections with GET /events
        self._hub_places = Places(*UNDER_WAY)
        self._bytes = Places(*BYTES)
        self._poll = select.epoll()
        self._listeners: dict[int, socket.socket] = {}
        try:
            self._listen(listen(path, journal))
            self._listen(listen_for_root(path))
        except BaseException:
            self._close_listeners()
            self._poll.close()
            raise
        self._next_end_s = -math.inf  # when somebody has had his time, as far as is known
        self._accepts_at_s = -math.inf  # when it listens again; -inf: it does

    def close(self) -> None:
        """Ends it; idempotent."""
        if self._poll.closed:
            return
        for client in list(self._clients.values()):
            self._drop(client)
        self._close_listeners()
        self._poll.close()
        for path in (self.path, self.path + ROOT_SUFFIX):
            with contextlib.suppress(OSError):
                os.unlink(path)

    # For the service.

    def show(self, snapshot: Snapshot) -> None:
        """What GET /status and GET /assignment answer from now on."""
        self._routes.snapshot = snapshot

    def is_read(self) -> bool:
        """Whether a program reads the events."""
        return self._streams > 0

    def tell(self, message: Message) -> bool:
        """Hands a message of the hub's session to whom it may concern; False where nobody can take it."""
        if isinstance(message, (TelemetryDone, TwinDone)):
            self._inbox.append(lambda: self._end_asked(message))
            return True
        if isinstance(message, MethodCall) and not self.is_read():
            return False
        return self._events.take(message, time.monotonic())

    def answer(self, request_id: int, status: int, document: dict[str, Any]) -> None:
        """The answer to a `Command`."""
        self._inbox.append(lambda: self._finish(request_id, status, document))

    def forget(self) -> None:
        """The connection to the hub has ended: what was held of it will be delivered again."""
        self._events.forget()

    # For the loop.

    def fileno(self) -> int:
        """Readable where a client, or somebody who wants to be one, has something for us."""
        return self._poll.fileno()

    def due_s(self) -> float:
        """When there is something to do even if nothing comes, in monotonic seconds."""
        if self._unfinished or self._inbox or self._events.has_news():
            return 0.0
        ends = [client.deadline_s for client in self._clients.values()] + self._events.ends_s()
        if self._accepts_at_s > 0.0:
            ends.append(self._accepts_at_s)
        self._next_end_s = min(ends) + 0.01 if ends else math.inf
        return self._next_end_s

    def turn(self, readable: bool) -> None:
        """Does what can be done now; `readable`: somebody has something for us."""
        self._guarded(None, self._take_turn, readable)

    def _take_turn(self, readable: bool) -> None:
        ready = self._poll.poll(0) if readable else []
        # Looked up before anything is done: a descriptor that is closed may be the next connection's in this turn.
        moved = [(client, events) for number, events in ready if (client := self._clients.get(number)) is not None]
        for client, events in moved:
            if client.socket.fileno() >= 0:
                self._guarded(client, self._move, client, events)
        for number, _ in ready:
            if (listener := self._listeners.get(number)) is not None:
                self._guarded(None, self._accept, listener)
        unfinished, self._unfinished = self._unfinished, []
        for client in unfinished:
            client.queued = False
            self._guarded(client, self._advance, client)
        while self._inbox:
            self._guarded(None, self._inbox.popleft())
        if self._events.has_news():
            self._guarded(None, self._broadcast)
        if (now_s := time.monotonic()) >= self._next_end_s:
            self._guarded(None, self._expire, now_s)

    def _listen(self, listener: socket.socket) -> None:
        self._listeners[listener.fileno()] = listener
        self._poll.register(listener, select.EPOLLIN)

    def _close_listeners(self) -> None:
        for listener in self._listeners.values():
            listener.close()

    def _guarded(self, client: _Client | None, work: Callable[..., None], *arguments: object) -> None:
        """Does `work`; an error in it costs that client its connection and nobody else anything."""
        try:
            work(*arguments)
        except OSError:
            if client is not None:
                self._drop(client)
        except Exception as error:
            user = -1 if client is None else client.peer.user
            self._lines.say(user, "bug", bug(error).message, time.monotonic(), WARNING, "agent.bug")
            if client is not None:
                self._drop(client)

    def _expire(self, now_s: float) -> None:
        """What becomes of connections whose time is over.

        1. It waits for us: it is told that it was not done, or that nobody knows. 2. It takes nothing of what it is
        sent, or is idle: it goes. 3. It reads events: an empty line, which shows whether it is there. 4. Its request
        did not come to its end: 408.
        """
        self._events.expire(now_s)
        if 0.0 < self._accepts_at_s <= now_s:
            self._accepts_at_s = -math.inf
            for listener in self._listeners.values():
                self._poll.modify(listener, select.EPOLLIN)
        for client in [client for client in self._clients.values() if client.deadline_s <= now_s]:
            if client.pending is not None:
                self._give_up(client, client.pending)
            elif client.lines or not (client.streams or client.has_begun()):
                self._drop(client)
            elif client.streams:
                client.deadline_s = now_s + HEARTBEAT_S
                self._line(client, chunk(b"\n"))
            else:
                client.ends = True
                self._reply(client, 408, error_document("agent.usage", "the request did not come to its end in time"))

    def _give_up(self, client: _Client, request_id: int) -> None:
        """Answers a request that had its time: whoever is told that it was not done can rely on it."""
        batch = self._batches.get(request_id)
        if batch is not None:
            self._end_batch(batch, OUT_OF_TIME)
            return
        begun = not self._was_taken_back(client)
        self._release(request_id, begun)
        if isinstance(client.asked, SendTelemetry):
            self._counts.telemetry["late" if begun else "refused"] += 1
        if isinstance(client.asked, FOR_THE_HUB) and not begun:
            self._finish(request_id, UNSENT.status, UNSENT.document)
        else:
            text = "no answer yet: whether it will be done is not known" if begun else "it was not begun in time"
            self._finish(request_id, 504, error_document("agent.out_of_time", text))

    def _was_taken_back(self, client: _Client) -> bool:
        return client.asked is not None and self._take_back(client.asked)

    # Connections.

    def _accept(self, listener: socket.socket) -> None:
        for _ in range(ACCEPTS_A_TURN):
            try:
                connection, _ = listener.accept()
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE):  # the next poll would say the same at once
                    self._accepts_at_s = time.monotonic() + ACCEPT_AGAIN_S
                    for deaf in self._listeners.values():
                        self._poll.modify(deaf, 0)
                return
            try:
                self._let_in(connection)
            except BaseException:
                connection.close()
                raise

    def _let_in(self, connection: socket.socket) -> None:
        """Makes a client of a connection, or closes it; what fails leaves nothing of it here."""
        if _is_gone(connection):  # first of all: a program that only knocks must cost us no more than itself
            connection.close()
            return
        connection.setblocking(False)
        peer = peer_of(connection)
        if not self._make_room(peer.user):
            document = error_document("agent.busy", "too many programs are connected", RETRY_AFTER_S)
            with contextlib.suppress(OSError), connection:
                connection.send(_answer(503, document, "Connection: close\r\n"))
            return
        client = _Client(connection, peer, time.monotonic())
        self._poll.register(connection, client.watched)
        self._places.take(peer.user)
        self._clients[connection.fileno()] = client

    def _make_room(self, user: int) -> bool:
        """Whether one more connection of this user may stay, perhaps because another one has just made room.

        A user's own connections make room for it where they are idle. Where there are too many in all, the users with
        the most lose one: the longest idle, else the youngest that has not sent its request yet.
        """
        while not self._places.has_room(user):
            clients = list(self._clients.values())
            own = [client for client in clients if client.peer.user == user]
            others = [client for client in clients if not is_trusted(client.peer.user)]
            most = max((self._places.of(client.peer.user) for client in others), default=0)
            if len(own) + 1 < most:
                largest = [client for client in others if self._places.of(client.peer.user) == most]
                if self._drop_idle(largest) or self._drop_unfinished(largest):
                    continue
            if not self._drop_idle(own):
                return False
        return True

    def _drop_idle(self, clients: list[_Client]) -> bool:
        """Drops the one of these that waits longest between two requests; False where none does."""
        idle = [client for client in clients if client.is_idle()]
        if idle:
            self._drop(min(idle, key=lambda client: client.deadline_s))
        return bool(idle)

    def _drop_unfinished(self, clients: list[_Client]) -> bool:
        """Drops the one of these that has begun a request last and not ended it; False where there is none."""
        unfinished = [client for client in clients if not client.waits_for_us()]
        if unfinished:
            self._drop(max(unfinished, key=lambda client: client.deadline_s))
        return bool(unfinished)

    def _drop(self, client: _Client) -> None:
        """Ends a connection; what was asked for through it, and nobody has begun with, is not done."""
        if self._clients.pop(client.socket.fileno(), None) is None:
            return
        self._poll.unregister(client.socket)
        client.socket.close()
        client.lines.clear()
        self._places.give_back(client.peer.user)
        if client.streams:
            self._stream_places.give_back(client.peer.user)
            self._streams -= 1
            self._post(Readers(self._streams))
        if client.body is not None:
            self._give_back(client, client.body)
        if client.pending is not None:
            self._pending.pop(client.pending, None)
            if (batch := self._batches.get(client.pending)) is not None:
                self._end_batch(batch, UNSENT)
            else:
                self._release(client.pending, not self._was_taken_back(client))

    def _move(self, client: _Client, events: int) -> None:
        if events & (select.EPOLLHUP | select.EPOLLERR):
            self._drop(client)  # it is gone, not only its way to us, and nobody would read an answer
            return
        if events & select.EPOLLOUT:
            self._send(client)
        if events & select.EPOLLIN and not client.is_to_be_read():
            self._watch(client, exactly=True)
        elif events & select.EPOLLIN:
            body = client.body
            content = client.socket.recv(READ_SIZE if body is None else _missing(body))
            client.over = not content
            if client.is_idle():
                client.deadline_s = time.monotonic() + REQUEST_LIMIT_S
            if body is None:
                client.came += content
            else:
                body.content.extend(content)
        self._advance(client)

    # Requests.

    def _advance(self, client: _Client) -> None:
        """Answers what was received, one request after the other, each once the answer before has gone."""
        if client.queued or client.socket.fileno() < 0:
            return  # its turn comes, or it was dropped meanwhile
        for _ in range(REQUESTS_A_TURN):
            if client.waits_for_us() or not self._take_request(client):
                break
            if client.socket.fileno() < 0:
                return
        else:
            client.queued = True
            self._unfinished.append(client)
        if client.over and not (client.pending or client.lines or client.streams or client.queued):
            self._drop(client)
        self._watch(client)

    def _take_request(self, client: _Client) -> bool:
        """Takes the first request out of what was received; False where more has to come first."""
        reader = client.reader
        if client.head is None:
            reader.rest += client.came
            client.came = b""
        try:
            if client.ignored:
                ignored = min(client.ignored, len(reader.rest))
                client.ignored -= ignored
                reader.rest = reader.rest[ignored:]
                if client.ends and not client.ignored:
                    self._drop(client)
            if client.body is None and (client.ignored or client.ends or not self._take_head(client)):
                return False
            body = client.body
            assert body is not None
            missing = _missing(body)
            body.content.extend(reader.rest[:missing])
            reader.rest = reader.rest[missing:]
            if _missing(body):
                return False
            client.body = None
            self._do(client, body)
        except Refused as refused:
            self._reply(client, refused.status, refused.document, refused.allow)
        return True

    def _take_head(self, client: _Client) -> bool:
        """Takes a head out of what was received and begins with its request; False where it is not whole."""
        head = self._read_head(client)
        if head is None:
            return False
        if head.length > BODY_LIMIT:
            client.ends = True
            raise Refused(413, "agent.too_large", f"expected a body of at most {BODY_LIMIT} bytes")
        expects = head.expects and len(client.reader.rest) < head.length
        user = client.peer.user
        now_s = time.monotonic()
        if not client.noted:
            client.noted = True
            self._lines.say(user, "use", f"{client.peer} uses the socket", now_s, every_s=USE_EVERY_S)
        if self._journal.verbose:
            self._journal.detail(f"{client.peer}: {head.method} {head.path}, {head.length} bytes")
        try:
            begun = self._routes.begin(Request(head.method, head.path, head.query, head.length, user, head.kind), now_s)
            if begun.topic_size and not self._hub_places.has_room(user):
                raise Refused(503, "agent.busy", "it was not sent: too much is under way to the hub", RETRY_AFTER_S)
            share = head.length + begun.topic_size
            if not self._bytes.take(user, share):
                raise Refused(503, "agent.busy", "it was not read: too much is under way", RETRY_AFTER_S)
        except Refused:
            self._counts.telemetry["refused"] += head.path == "/telemetry"
            client.ends = head.closes or expects
            client.ignored = 0 if expects else head.length  # a client that is not told to go on does not send it
            raise
        if begun.topic_size:
            self._hub_places.take(user)
        client.body = _Body(begun, head.length, share, head.closes, bytearray())
        if expects:
            self._line(client, _CONTINUE)
        return True

    def _read_head(self, client: _Client) -> Head | None:
        """The next head, None where more has to come; Refused, and the connection ends, where it is none."""
        came: bytes | None = None  # begins the reading of what is there already
        rest = client.reader.rest
        if client.head is None and rest:
            same, known = client.known
            if known is not None and rest.startswith(same):
                client.reader.rest = rest[len(same) :]
                return known
            client.head = read_head(client.reader)
        elif client.head is not None and client.came:
            came, client.came = client.came, b""
        else:
            return None
        try:
            client.head.send(came)  # type: ignore[arg-type]
        except StopIteration as end:
            client.head = None
            head: Head = end.value
            size = len(rest) - len(client.reader.rest)
            if came is None and size <= KNOWN_SIZE:
                client.known = (rest[:size], head)
            return head
        except Failed as failed:
            client.head = None
            client.ends = True
            raise Refused(431 if failed.reason == NO_REPLY_TOO_LARGE else 400, "agent.usage", str(failed)) from None
        return None

    def _do(self, client: _Client, body: _Body) -> None:
        """Does what a whole request asks for."""
        client.ends = body.closes
        try:
            outcome = body.begun.finish(bytes(body.content))
        except BaseException:
            self._give_back(client, body)
            raise
        if isinstance(outcome, Later) and isinstance(outcome.asked, FOR_THE_HUB):
            self._hand_on(client, outcome.asked, outcome.limit_s, body)
            return
        if isinstance(outcome, Messages):
            self._begin_batch(client, outcome, body)
            return
        self._give_back(client, body)
        match outcome:
            case Reply(status, document, event, taken):
                if event is not None and not self._post(event):
                    raise Refused(503, "agent.busy", "it was not taken: ask again", RETRY_AFTER_S)
                if taken is not None:
                    taken()
                self._reply(client, status, document)
            case Later(asked, limit_s):
                assert isinstance(asked, Command)
                text = f"{client.peer} asks for: {asked.name}"
                self._lines.say(client.peer.user, asked.name, text, time.monotonic(), NOTICE)
                client.asked = asked = asked._replace(request_id=self._await(client, limit_s))
                self._command(asked)
            case Stream():
                self._stream(client)
            case Text(text):
                self._reply(client, 200, text)

    def _hand_on(self, client: _Client, event: SendTelemetry | Report | ReadTwin, limit_s: float, body: _Body) -> None:
        """Hands on what is for the hub; its share is given back once the session has answered, or never had it."""
        client.asked = event = event._replace(request_id=self._await(client, limit_s))
        if not self._post(event):
            self._give_back(client, body)
            del self._pending[event.request_id]
            client.pending = client.asked = None
            raise Refused(503, "agent.busy", "it was not sent: too much waits to be sent", RETRY_AFTER_S)
        self._under_way[event.request_id] = _UnderWay(event, client.peer.user, body.share)

    def _give_back(self, client: _Client, body: _Body) -> None:
        self._bytes.give_back(client.peer.user, body.share)
        if body.begun.topic_size:
            self._hub_places.give_back(client.peer.user)

    def _release(self, request_id: int, begun: bool) -> None:
        """Gives back the share of telemetry that is not begun; what was begun keeps it until the hub's session is done.

        That one is not to be sent again: nobody waits for it any more.
        """
        if begun and request_id in self._under_way:
            self._post(Withdrawn(request_id))
        if not begun and (under_way := self._under_way.pop(request_id, None)) is not None:
            self._bytes.give_back(under_way.user, under_way.size)
            self._hub_places.give_back(under_way.user)

    def _end_asked(self, done: TelemetryDone | TwinDone) -> None:
        under_way = self._under_way.get(done.request_id)
        if under_way is not None and isinstance(done, TelemetryDone) and done.sent and not done.accepted:
            what = f"a message of user {under_way.user} was given up: the hub did not acknowledge it, and may have it"
            self._lines.say(under_way.user, "given up", what, time.monotonic(), NOTICE)
        if isinstance(done, TelemetryDone):
            self._counts.telemetry["accepted" if done.accepted else "refused"] += 1
        self._release(done.request_id, False)
        outcome = outcome_of(done)
        if (batch := self._batch_of.pop(done.request_id, None)) is not None:
            batch.end(done.request_id, None if outcome.status == 200 else outcome)
            self._go_on(batch)
            return
        self._finish(done.request_id, outcome.status, outcome.document)

    # Many messages in one request.

    def _begin_batch(self, client: _Client, messages: Messages, body: _Body) -> None:
        """Begins to send; the place and the topic's bytes that came with the head are for the first message."""
        self._give_back(client, body)
        self._bytes.take(client.peer.user, body.size)
        batch = Batch(messages, self._await(client, TELEMETRY_LIMIT_S), body.begun.topic_size, body.size)
        self._batches[batch.request_id] = batch
        self._go_on(batch)

    def _go_on(self, batch: Batch) -> None:
        """Sends as many of a batch as its user's share has room for; answers once nothing is under way any more."""
        user = batch.event.sender
        while (payload := batch.waiting()) is not None and self._hub_places.has_room(user):
            self._serial += 1
            event = batch.event._replace(request_id=self._serial, payload=payload)
            if not self._bytes.take(user, batch.topic_size):
                break
            if not self._post(event):
                self._bytes.give_back(user, batch.topic_size)
                break
            self._hub_places.take(user)
            self._under_way[event.request_id] = _UnderWay(event, user, len(payload) + batch.topic_size)
            self._batch_of[event.request_id] = batch
            batch.send(event.request_id)
        if not batch.under_way:
            self._end_batch(batch, UNSENT)

    def _end_batch(self, batch: Batch, failure: Reply) -> None:
        """Answers a batch; `failure` is why messages are left that did not fail themselves.

        A program sends again from the first message on that was not accepted, so what is said of that one holds for
        all behind it: none of them may be at the hub where it is told that it was not sent.
        """
        del self._batches[batch.request_id]
        told = batch.failures.get(batch.accepted, failure)
        doubtful = bool(batch.ahead) or UNKNOWN in batch.failures.values()
        for request_id in batch.under_way:
            del self._batch_of[request_id]
            begun = not self._take_back(self._under_way[request_id].event)
            doubtful = doubtful or begun
            self._counts.telemetry["late" if begun else "refused"] += 1
            self._release(request_id, begun)
        self._bytes.give_back(batch.event.sender, batch.held)
        told = UNKNOWN if doubtful and told == UNSENT else told
        outcome = outcome_of_lines(batch.accepted, batch.of, told)
        self._finish(batch.request_id, outcome.status, outcome.document)

    def _await(self, client: _Client, limit_s: float) -> int:
        """The id under which `client` is answered later."""
        self._serial += 1
        client.pending = self._serial
        client.deadline_s = time.monotonic() + limit_s
        self._pending[self._serial] = client
        return self._serial

    def _finish(self, request_id: int, status: int, document: dict[str, Any]) -> None:
        client = self._pending.pop(request_id, None)
        if client is not None:
            client.pending = client.asked = None
            self._guarded(client, self._reply, client, status, document)
            self._guarded(client, self._advance, client)

    # Readers of events.

    def _stream(self, client: _Client) -> None:
        if not self._stream_places.take(client.peer.user):
            raise Refused(503, "agent.busy", "too many programs read the events already", RETRY_AFTER_S)
        self._broadcast()  # what is news to the others is in the backlog of this one
        self._lines.say(
            client.peer.user, "events", f"{client.peer} reads the events", time.monotonic(), every_s=USE_EVERY_S
        )
        client.streams = True
        self._streams += 1
        self._post(Readers(self._streams))
        client.ends = False
        client.reader.rest = b""
        client.deadline_s = time.monotonic() + HEARTBEAT_S
        client.lines.append(_STREAM_HEAD)
        client.lines.extend(self._events.backlog())
        self._send(client)

    def _broadcast(self) -> None:
        """Sends what is new to all readers; one that is too slow is dropped, and gets what is held when it is back."""
        for content in self._events.news():
            for client in [client for client in self._clients.values() if client.streams]:
                if len(client.lines) >= LINES_LIMIT:
                    self._drop(client)
                else:
                    self._guarded(client, self._line, client, content)
            while self._behind() > READERS_LIMIT:
                slow = [client for client in self._clients.values() if client.streams]
                self._drop(max(slow, key=lambda client: sum(map(len, client.lines))))

    def _behind(self) -> int:
        """Bytes that readers were not sent yet, each object once, for they share them."""
        kept = set(map(id, self._events.backlog()))
        lines = {id(line): line for client in self._clients.values() if client.streams for line in client.lines}
        return sum(len(line) for number, line in lines.items() if number not in kept)

    # Answers.

    def _reply(self, client: _Client, status: int, document: dict[str, Any] | str, allow: str = "") -> None:
        client.ends = client.ends or status in (408, 413, 431)
        more = (f"Allow: {allow}\r\n" if allow else "") + ("Connection: close\r\n" if client.ends else "")
        client.deadline_s = time.monotonic() + IDLE_LIMIT_S
        if status >= 400:
            self._journal.detail(f"{client.peer}: answered {status}")
        self._line(client, _ACCEPTED if document is ACCEPTED.document and not more else _answer(status, document, more))

    def _line(self, client: _Client, content: bytes) -> None:
        client.lines.append(content)
        self._send(client)

    def _send(self, client: _Client) -> None:
        """Sends what the client takes now; the rest follows when it is ready, or the connection ends."""
        if client.socket.fileno() < 0:
            return  # it was dropped meanwhile
        progress = False
        while client.lines:
            try:
                taken = client.socket.send(memoryview(client.lines[0])[client.sent :])
            except BlockingIOError:
                break
            except OSError:
                self._drop(client)
                return
            progress = True
            client.sent += taken
            if client.sent == len(client.lines[0]):
                client.lines.popleft()
                client.sent = 0
        now_s = time.monotonic()
        if client.lines:
            if progress or client.deadline_s > now_s + SEND_LIMIT_S:
                client.deadline_s = now_s + SEND_LIMIT_S
        elif client.streams:
            client.deadline_s = now_s + HEARTBEAT_S
        elif client.ends and client.pending is None and not client.ignored:
            self._drop(client)
        self._watch(client)

    def _watch(self, client: _Client, exactly: bool = False) -> None:
        """Waits for what the client is to do next; that it is gone is told in any case.

        Where nothing is to be read, it is waited for all the same until something comes: as a rule nothing does, and
        to change what is waited for is a system call.
        """
        if client.socket.fileno() >= 0:
            watched = (select.EPOLLIN if client.is_to_be_read() else 0) | (select.EPOLLOUT if client.lines else 0)
            if not exactly:
                watched |= client.watched & select.EPOLLIN
            if watched != client.watched:
                client.watched = watched
                self._poll.modify(client.socket, watched)


def peer_of(connection: socket.socket) -> Peer:
    """Who has connected; unix(7), SO_PEERCRED."""
    packed = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    process, user, group = struct.unpack("3i", packed)
    return Peer(process, user, group)


def listen(path: str, journal: Journal) -> socket.socket:
    """A listening socket at `path`, open to its owner and, where it exists, to the group of the clients.

    It gets its mode and group before it gets its name. OSError; EADDRINUSE where somebody listens there already.
    """
    return _listening(path, f"{path}.new", lambda made: _open_to_clients(made, journal))


def listen_for_root(path: str) -> socket.socket:
    """The same at `path` with ROOT_SUFFIX, open to its owner, and to root, alone."""
    return _listening(path + ROOT_SUFFIX, f"{path}.new", lambda _made: None)


def _listening(path: str, made: str, prepare: Callable[[str], None]) -> socket.socket:
    make_runtime_folder(os.path.dirname(path))
    _check_free(path)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(made)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        listener.setblocking(False)
        listener.bind(made)
        os.chmod(made, 0o600)
        prepare(made)
        listener.listen(BACKLOG)
        os.rename(made, path)
    except BaseException:
        listener.close()
        raise
    return listener


def _open_to_clients(path: str, journal: Journal) -> None:
    try:
        group = client_group()
        if group is None:
            text = f"there is no group {CLIENT_GROUP}: the socket is the service's own user's"
            journal.event("warning", text, NOTICE)
        else:
            if os.stat(path).st_gid != group:  # as a rule it is the process's own: chown is no call for a service
                os.chown(path, -1, group)
            os.chmod(path, 0o660)
    except OSError as error:
        text = f"the socket stays the service's own user's: its group cannot be {CLIENT_GROUP}: {error.strerror}"
        journal.event("warning", text, NOTICE)


def client_group() -> int | None:
    """The number of the group of the clients, None where there is none.

    It is the machine's own, so its file is read: the system's own function loads half a megabyte of name services.
    """
    with contextlib.suppress(OSError), open(GROUP_FILE) as groups:
        for line in groups:
            name, _, rest = line.partition(":")
            number = rest.split(":")[1] if rest.count(":") >= 2 else ""
            if name == CLIENT_GROUP and (group := whole_number(number, 0, 2**32 - 1)) is not None:
                return group
    return None


def _check_free(path: str) -> None:
    """OSError unless `path` is free, or a socket that nobody listens at."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise OSError(errno.EEXIST, "there is something else than a socket", path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(path)
        except (ConnectionRefusedError, FileNotFoundError):
            return
    raise OSError(errno.EADDRINUSE, "another dps-agent listens there", path)


def _is_gone(connection: socket.socket) -> bool:
    """Whether the other side is closed, not only its way to us."""
    poll = select.poll()
    poll.register(connection, 0)
    return bool(poll.poll(0))  # POLLHUP


# Bytes.


def _missing(body: _Body) -> int:
    return body.size - len(body.content)


def _answer(status: int, document: dict[str, Any] | str, more: str = "") -> bytes:
    retry = ""
    if isinstance(document, str):  # metrics, the one document that is no JSON
        kind, body = METRICS_TYPE, document.encode()
    else:
        kind, body = "application/json", to_json(document).encode() + b"\n"
        retry_after_s = document["error"]["retryAfterS"] if "error" in document else None
        retry = f"Retry-After: {retry_after_s}\r\n" if retry_after_s is not None else ""
    head = f"HTTP/1.1 {status} {_REASONS[status]}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n"
    return f"{head}{retry}{more}\r\n".encode() + body


_ACCEPTED = _answer(ACCEPTED.status, ACCEPTED.document)  # what nearly all are answered
