"""HTTP/1.1 on a Unix socket for other programs on this device.

One thread serves all of them and waits for none: every size, count and time has a bound, and a program that is too slow
loses its connection. What may be asked for stands in `routes`. Nothing is queued here: telemetry is accepted once the
hub has it, and a cloud-to-device message stays the hub's until a program says that it is done with it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import selectors
import socket
import stat
import struct
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Any

from dps_agent.host.journal import INFO, NOTICE, WARNING, Journal
from dps_agent.host.local.events import Events, chunk
from dps_agent.host.local.routes import (
    RETRY_AFTER_S,
    Command,
    Later,
    Refused,
    Reply,
    Request,
    Routes,
    Snapshot,
    Stream,
    error_document,
    outcome_of,
)
from dps_agent.host.local.statefile import make_runtime_folder
from dps_agent.host.runner import bug
from dps_agent.hub_effects import MethodCall, TelemetryDone
from dps_hal.platform import to_json

if TYPE_CHECKING:
    from collections.abc import Callable

    from dps_agent.hub_effects import Event, Message, SendTelemetry

CLIENT_GROUP = "dps-agent-clients"
GROUP_FILE = "/etc/group"
CLIENT_LIMIT = 16  # connections
USER_LIMIT = 8  # of them of one user who is not trusted with commands
KEPT = 2  # of them for who is
BACKLOG = 128  # connections that wait to be looked at
STREAM_LIMIT = 8  # of them with GET /events
HEAD_LIMIT = 8192  # bytes of request line and headers
BODY_LIMIT = 256 * 1024  # bytes; IoT Hub quotas: a device-to-cloud message
PEERS_LIMIT = 256  # processes remembered as seen before
LINES_LIMIT = 128  # events that a reader may be behind
REQUEST_LIMIT_S = 10.0  # from a request's first byte to its last
IDLE_LIMIT_S = 60.0  # between two requests
SEND_LIMIT_S = 10.0  # without any byte taken
HEARTBEAT_S = 60.0  # an empty line, so that both sides notice when the other is gone

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


class _Client:
    """One connection."""

    def __init__(self, connection: socket.socket, peer: tuple[int, int, int], now_s: float) -> None:
        self.socket = connection
        self.peer = peer  # process, user and group number
        self.received = bytearray()
        self.lines: deque[bytes] = deque()  # to send; the same objects for all readers of events
        self.sent = 0  # bytes of the first of them
        self.deadline_s = now_s + IDLE_LIMIT_S
        self.pending: int | None = None  # the request that waits for an answer
        self.streams = False
        self.ends = False  # once all is sent
        self.continued = False  # "100 Continue" was said
        self.over = False  # it sends nothing more, and may wait for an answer


class LocalServer:
    """The socket at `path`; OSError where it cannot be made.

    The service calls `show`, `tell`, `answer` and `forget` from its own thread.
    `post` takes an event for the hub's session, or returns False, and `command` takes a `Command`; both are called from
    the socket's thread and return at once.
    """

    def __init__(
        self,
        path: str,
        *,
        allow_token: bool,
        post: Callable[[Event], bool],
        command: Callable[[Command], None],
        journal: Journal,
    ) -> None:
        self.path = path
        self._events = Events()
        self._routes = Routes(self._events, allow_token)
        self._post = post
        self._command = command
        self._journal = journal
        self._clients: dict[int, _Client] = {}  # by descriptor
        self._streams = 0
        self._inbox: deque[Callable[[], None]] = deque()  # work from other threads
        self._serial = 0
        self._pending: dict[int, _Client] = {}
        self._peers: deque[tuple[int, int]] = deque(maxlen=PEERS_LIMIT)  # processes with their users, seen before
        self._listener = listen(path, journal)
        self._selector = selectors.DefaultSelector()
        self._alarm = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._alarm, selectors.EVENT_READ)
        self._ended = False
        self._thread = threading.Thread(target=self._serve, name="dps-api", daemon=True)

    def start(self) -> None:
        """Answers from now on; what has come to the socket before waits in it. `show` first."""
        self._thread.start()

    def close(self) -> None:
        """Ends it; idempotent."""
        if self._ended:
            return
        self._ended = True
        self._wake()
        self._thread.join(1.0)
        with contextlib.suppress(OSError):
            os.unlink(self.path)

    # For the service's own thread.

    def show(self, snapshot: Snapshot) -> None:
        """What GET /status and GET /assignment answer from now on."""
        self._routes.snapshot = snapshot

    def tell(self, message: Message) -> bool:
        """Hands a message of the hub's session to whom it may concern; False where no program would see it."""
        if isinstance(message, MethodCall) and not self._streams:
            return False
        self._later(lambda: self._take(message))
        return True

    def answer(self, request_id: int, status: int, document: dict[str, Any]) -> None:
        """The answer to a `Command`."""
        self._later(lambda: self._finish(request_id, status, document))

    def forget(self) -> None:
        """The connection to the hub has ended: what was held of it will be delivered again."""
        self._later(self._events.forget)

    def _later(self, call: Callable[[], None]) -> None:
        self._inbox.append(call)
        self._wake()

    def _wake(self) -> None:
        with contextlib.suppress(OSError):
            os.eventfd_write(self._alarm, 1)

    # The thread.

    def _serve(self) -> None:
        while not self._ended:
            for key, events in self._selector.select(self._patience_s()):
                if key.fileobj is self._listener:
                    self._accept(self._listener)
                elif key.fileobj == self._alarm:
                    os.eventfd_read(self._alarm)
                elif (client := self._clients.get(key.fd)) is not None:
                    self._guarded(client, self._move, client, events)
            while self._inbox:
                self._guarded(None, self._inbox.popleft())
            self._guarded(None, self._expire, time.monotonic())
        for client in list(self._clients.values()):
            self._drop(client)
        self._selector.close()
        self._listener.close()
        os.close(self._alarm)

    def _guarded(self, client: _Client | None, work: Callable[..., None], *arguments: object) -> None:
        """Does `work`; an error in it costs that client its connection and nobody else anything."""
        try:
            work(*arguments)
        except OSError:
            if client is not None:
                self._drop(client)
        except Exception as error:
            self._journal.event("warning", bug(error).message, WARNING, code="agent.bug")
            if client is not None:
                self._drop(client)

    def _patience_s(self) -> float | None:
        ends = [client.deadline_s for client in self._clients.values()]
        ends += self._events.ends_s()
        return max(min(ends) - time.monotonic(), 0.0) + 0.01 if ends else None

    def _expire(self, now_s: float) -> None:
        self._events.expire(now_s)
        for client in [client for client in self._clients.values() if client.deadline_s <= now_s]:
            if client.pending is not None:
                outcome = error_document("agent.out_of_time", "no answer yet: whether it will be done is not known")
                self._finish(client.pending, 504, outcome)
            elif client.lines or not (client.streams or client.received):
                self._drop(client)
            elif client.streams:
                client.deadline_s = now_s + HEARTBEAT_S
                self._line(client, chunk(b"\n"))
            else:
                self._reply(client, 408, error_document("agent.usage", "the request did not come to its end in time"))
                client.ends = True

    def _accept(self, listener: socket.socket) -> None:
        try:
            connection, _ = listener.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                time.sleep(0.1)  # no descriptor is left, and the next select would say the same at once
            return
        connection.setblocking(False)
        peer = peer_of(connection)
        if not self._has_room(peer[1]):
            document = error_document("agent.busy", "too many programs are connected", RETRY_AFTER_S)
            with contextlib.suppress(OSError), connection:
                connection.send(_answer(503, document, "Connection: close\r\n"))
            return
        client = _Client(connection, peer, time.monotonic())
        self._clients[connection.fileno()] = client
        self._selector.register(connection, selectors.EVENT_READ)

    def _has_room(self, user: int) -> bool:
        """Whether one more connection of this user may stay, perhaps because an idle one has just made room."""
        if not _is_trusted(user):
            ours = [client for client in self._clients.values() if client.peer[1] == user]
            if len(ours) >= USER_LIMIT and not self._drop_idle(ours):
                return False
            others = [client for client in self._clients.values() if not _is_trusted(client.peer[1])]
            if len(others) >= CLIENT_LIMIT - KEPT and not self._drop_idle(others):
                return False
        clients = list(self._clients.values())
        return len(clients) < CLIENT_LIMIT or self._drop_idle(clients)

    def _drop_idle(self, clients: list[_Client]) -> bool:
        """Drops who of these waits longest between two requests; False where none does."""
        idle = [c for c in clients if c.pending is None and not (c.streams or c.lines or c.received)]
        if idle:
            self._drop(min(idle, key=lambda client: client.deadline_s))
        return bool(idle)

    def _drop(self, client: _Client) -> None:
        if self._clients.pop(client.socket.fileno(), None) is None:
            return
        self._watch(client, 0)
        client.socket.close()
        if client.streams:
            self._streams -= 1
        if client.pending is not None:
            self._pending.pop(client.pending, None)

    def _move(self, client: _Client, events: int) -> None:
        if events & selectors.EVENT_WRITE:
            self._send(client)
        if events & selectors.EVENT_READ and client.socket.fileno() >= 0:
            content = client.socket.recv(65536)
            if not content:
                if _is_gone(client.socket):
                    self._drop(client)
                    return
                client.over = True
                self._watch(client, selectors.EVENT_WRITE if client.lines else 0)
            elif client.streams:
                return  # a reader has nothing more to say
            elif not client.received and client.pending is None:
                client.deadline_s = time.monotonic() + REQUEST_LIMIT_S
            client.received += content
            if len(client.received) > HEAD_LIMIT + BODY_LIMIT:
                self._drop(client)  # it sends on without waiting for an answer
                return
        self._advance(client)

    # Requests.

    def _advance(self, client: _Client) -> None:
        """Answers what was received, one request after the other, each once the answer before has gone."""
        try:
            while not (client.pending or client.ends or client.streams or client.lines) and self._parse(client):
                pass
        except Refused as refused:
            self._reply(client, refused.status, refused.document)
            self._advance(client)
        if client.over and not (client.pending or client.lines or client.streams):
            self._drop(client)

    def _parse(self, client: _Client) -> bool:
        """Takes the first request out of what was received; False where it is not whole yet."""
        head_end = client.received.find(b"\r\n\r\n", 0, HEAD_LIMIT)
        if head_end < 0:
            if len(client.received) >= HEAD_LIMIT:
                client.ends = True
                raise Refused(431, "agent.usage", f"expected at most {HEAD_LIMIT} bytes of headers")
            return False
        try:
            method, target, headers = _parse_head(bytes(client.received[:head_end]))
            length = _content_length(headers)
        except Refused:
            client.ends = True
            raise
        whole = head_end + 4 + length
        if len(client.received) < whole:
            if headers.get("expect", "").lower() == "100-continue" and not client.continued:
                client.continued = True
                self._line(client, b"HTTP/1.1 100 Continue\r\n\r\n")
            return False
        body = bytes(client.received[head_end + 4 : whole])
        del client.received[:whole]
        client.continued = False
        client.ends = headers.get("connection", "").lower() == "close"
        self._route(client, method, target, body)
        return True

    def _route(self, client: _Client, method: str, target: str, body: bytes) -> None:
        path, _, query = target.partition("?")
        if client.peer[:2] not in self._peers:
            self._peers.append(client.peer[:2])
            self._journal.event("local", f"{_described(client)} uses the socket", INFO)
        self._journal.detail(f"{_described(client)}: {method} {path}, {len(body)} bytes")
        request = Request(method, path, query, body, _is_trusted(client.peer[1]))
        match self._routes.answer(request, time.monotonic()):
            case Reply(status, document, event):
                if event is not None:
                    self._post(event)
                self._reply(client, status, document)
            case Later(asked, limit_s):
                self._ask(client, asked, limit_s)
            case Stream(chunks):
                self._stream(client, chunks)

    def _ask(self, client: _Client, asked: SendTelemetry | Command, limit_s: float) -> None:
        if isinstance(asked, Command):
            self._journal.event("local", f"{_described(client)} asks for: {asked.name}", NOTICE)
            self._command(asked._replace(request_id=self._await(client, limit_s)))
            return
        request_id = self._await(client, limit_s)
        if not self._post(asked._replace(request_id=request_id)):
            text = "too much waits to be sent"
            self._finish(request_id, 503, error_document("agent.busy", text, RETRY_AFTER_S))

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
            client.pending = None
            self._guarded(client, self._reply, client, status, document)
            self._guarded(client, self._advance, client)

    # What the hub sends.

    def _take(self, message: Message) -> None:
        if isinstance(message, TelemetryDone):
            outcome = outcome_of(message)
            self._finish(message.request_id, outcome.status, outcome.document)
        elif (content := self._events.take(message)) is not None:
            self._broadcast(content)

    def _stream(self, client: _Client, chunks: list[bytes]) -> None:
        if self._streams >= STREAM_LIMIT:
            raise Refused(503, "agent.busy", f"{STREAM_LIMIT} programs read the events already", RETRY_AFTER_S)
        self._journal.event("local", f"{_described(client)} reads the events", INFO)
        self._streams += 1
        client.streams = True
        client.received.clear()
        client.deadline_s = time.monotonic() + HEARTBEAT_S
        head = "HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\nTransfer-Encoding: chunked\r\n\r\n"
        client.lines.append(head.encode())
        client.lines.extend(chunks)
        self._send(client)

    def _broadcast(self, content: bytes) -> None:
        for client in [client for client in self._clients.values() if client.streams]:
            if len(client.lines) >= LINES_LIMIT:
                self._drop(client)  # too slow; whoever connects again gets what is held
            else:
                self._guarded(client, self._line, client, content)

    # Answers.

    def _reply(self, client: _Client, status: int, document: dict[str, Any]) -> None:
        client.ends = client.ends or status in (408, 413, 431)
        ending = "Connection: close\r\n" if client.ends else ""
        if client.pending is None and not client.streams:
            client.deadline_s = time.monotonic() + IDLE_LIMIT_S
        if status >= 400:
            self._journal.detail(f"{_described(client)}: answered {status}")
        self._line(client, _answer(status, document, ending))

    def _line(self, client: _Client, content: bytes) -> None:
        client.lines.append(content)
        self._send(client)

    def _send(self, client: _Client) -> None:
        """Sends what the client takes now; the rest follows when it is ready, or the connection ends."""
        if client.socket.fileno() < 0:
            return  # dropped meanwhile
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
            self._watch(client, selectors.EVENT_READ | selectors.EVENT_WRITE)
            return
        self._watch(client, selectors.EVENT_READ)
        if client.streams:
            client.deadline_s = now_s + HEARTBEAT_S
        elif client.ends and client.pending is None:
            self._drop(client)

    def _watch(self, client: _Client, events: int) -> None:
        """Waits for these events of the client from now on; 0: for none."""
        if client.over:
            events &= ~selectors.EVENT_READ  # its end could be read for ever
        known = client.socket.fileno() in self._selector.get_map()
        if known and not events:
            self._selector.unregister(client.socket)
        elif known:
            self._selector.modify(client.socket, events)
        elif events:
            self._selector.register(client.socket, events)


def peer_of(connection: socket.socket) -> tuple[int, int, int]:
    """Process, user and group number of who has connected; unix(7), SO_PEERCRED."""
    packed = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    process, user, group = struct.unpack("3i", packed)
    return process, user, group


def listen(path: str, journal: Journal) -> socket.socket:
    """A listening socket at `path`, open to its owner and, where it exists, to the group of the clients.

    It gets its mode and group before it gets its name. OSError; EADDRINUSE where somebody listens there already.
    """
    make_runtime_folder(os.path.dirname(path))
    _check_free(path)
    made = f"{path}.new"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(made)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        listener.setblocking(False)
        listener.bind(made)
        os.chmod(made, 0o600)
        try:
            group = client_group()
            if group is None:
                journal.detail(f"there is no group {CLIENT_GROUP}: the socket is the service's own user's")
            else:
                if os.stat(made).st_gid != group:  # as a rule it is the process's own: chown is no call for a service
                    os.chown(made, -1, group)
                os.chmod(made, 0o660)
        except OSError as error:
            text = f"the socket stays the service's own user's: its group cannot be {CLIENT_GROUP}: {error.strerror}"
            journal.event("warning", text, NOTICE)
        listener.listen(BACKLOG)
        os.rename(made, path)
    except BaseException:
        listener.close()
        raise
    return listener


def client_group() -> int | None:
    """The number of the group of the clients, None where there is none.

    It is the machine's own, so its file is read: the system's own function loads half a megabyte of name services.
    """
    with contextlib.suppress(OSError), open(GROUP_FILE) as groups:
        for line in groups:
            name, _, rest = line.partition(":")
            number = rest.split(":")[1] if rest.count(":") >= 2 else ""
            if name == CLIENT_GROUP and number.isascii() and number.isdecimal():
                return int(number)
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


def _answer(status: int, document: dict[str, Any], more: str = "") -> bytes:
    body = to_json(document).encode() + b"\n"
    retry_after_s = document["error"]["retryAfterS"] if "error" in document else None
    retry = f"Retry-After: {retry_after_s}\r\n" if retry_after_s is not None else ""
    kind = "Content-Type: application/json\r\n"
    head = f"HTTP/1.1 {status} {_REASONS[status]}\r\n{kind}Content-Length: {len(body)}\r\n{retry}{more}\r\n"
    return head.encode() + body


def _parse_head(head: bytes) -> tuple[str, str, dict[str, str]]:
    """Method, target and headers (names in lower case) of a request; Refused where it is none."""
    lines = head.decode("latin-1").split("\r\n")
    words = lines[0].split(" ")
    if len(words) != 3 or words[2] not in ("HTTP/1.1", "HTTP/1.0") or not words[1].startswith("/"):
        raise Refused(400, "agent.usage", "expected a request of HTTP/1.1")
    headers: dict[str, str] = {}
    for line in lines[1:]:
        name, colon, value = line.partition(":")
        if not colon or not name or name != name.strip() or name.lower() in headers:
            raise Refused(400, "agent.usage", f"expected each header once, as 'name: value'; came {line[:60]!r}")
        headers[name.lower()] = value.strip()
    if words[2] == "HTTP/1.0":
        headers["connection"] = "close"
    return words[0], words[1], headers


def _content_length(headers: dict[str, str]) -> int:
    if "transfer-encoding" in headers:
        raise Refused(501, "agent.usage", "expected a body with Content-Length")
    text = headers.get("content-length", "0")
    if not (text.isascii() and text.isdecimal()):
        raise Refused(400, "agent.usage", f"Content-Length: expected a number; came {text[:20]!r}")
    if len(text) > 9 or int(text) > BODY_LIMIT:
        raise Refused(413, "agent.too_large", f"expected a body of at most {BODY_LIMIT} bytes")
    return int(text)


def _is_trusted(user: int) -> bool:
    """Whether commands are for this user: root, and the service's own."""
    return user in (0, os.geteuid())


def _is_gone(connection: socket.socket) -> bool:
    """Whether the other side is closed, not only its way to us."""
    poll = select.poll()
    poll.register(connection, 0)
    return bool(poll.poll(0))  # POLLHUP


def _described(client: _Client) -> str:
    process, user, _ = client.peer
    return f"process {process} of user {user}"
