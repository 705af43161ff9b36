"""HTTP/1.1 on a connection: requests are read by h11, one after the other, and each has to come whole in time.

What is sent is put together here: fault scripts ask for answers that no library would send.
"""

import asyncio
import logging
import math
from collections.abc import Callable, Coroutine, Sequence
from http import HTTPStatus

import h11

from dps_emulator.service import Request

_LOG = logging.getLogger(__name__)
REQUEST_S = 30.0  # from a request's first byte to its last
_AHEAD_BYTES = 64 * 1024  # of further requests, read while one is being answered
_REASONS = {status.value: status.phrase for status in HTTPStatus}
TOO_LATE = b"HTTP/1.1 408 Request Timeout\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
_INVALID = "Invalid HTTP request received."
_BODILESS = (204, 304)
_FRAMING = ("connection", "content-length")


class HttpConnection(asyncio.Protocol):
    """One connection of HTTP, from its first request to its end; `transport` is what it is on.

    An answer is begun, sent in pieces and finished, or all that at once by `answer`.
    """

    transport: asyncio.Transport

    def __init__(
        self,
        respond: "Callable[[Request, HttpConnection], Coroutine[object, object, None] | None]",
        keep_alive_s: float,
        body_limit: int,
    ) -> None:
        """`respond` answers a request, at once or by the coroutine that it returns, which has no exception.

        The connection may rest for `keep_alive_s` between two requests. What is beyond `body_limit` bytes of a body is
        read, but of that no more is kept than came in the piece that went beyond.
        """
        self._respond = respond
        self._keep_alive_s = keep_alive_s
        self._body_limit = body_limit
        self._loop = asyncio.get_running_loop()
        self._reader = h11.Connection(h11.SERVER)  # of one request alone
        self._head: h11.Request | None = None
        self._body = bytearray()
        self._ahead = bytearray()
        self._task: asyncio.Task[None] | None = None  # from `_take` to the end of answer or connection
        self._room = asyncio.Event()  # for what is sent
        self._room.set()
        self._closes = self._is_chunked = self._is_bodiless = self._is_reading = False
        self._deadline = math.inf
        self._timer: asyncio.TimerHandle | None = None

    # --- what the transport calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """There is a connection."""
        assert isinstance(transport, asyncio.Transport), "a stream of bytes"
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        """More of a request, or of several."""
        if self._task is None and self._room.is_set():
            self._take(data)
            return
        self._ahead += data
        if len(self._ahead) > _AHEAD_BYTES:
            self.transport.pause_reading()

    def pause_writing(self) -> None:
        """Answers pile up."""
        self._room.clear()

    def resume_writing(self) -> None:
        """They have left."""
        self._room.set()
        if self._task is None:
            self._go_on()

    def connection_lost(self, exc: Exception | None) -> None:
        """It is over."""
        if self._timer:
            self._timer.cancel()
        if self._task:
            self._task.cancel()

    # --- requests

    def _take(self, data: bytes) -> None:
        """Answers what has come whole; the rest waits for more, or for an answer that takes its time."""
        while data and not self.transport.is_closing():
            if not self._room.is_set():
                self._ahead += data
                return
            try:
                is_whole = self._read(data)
            except h11.RemoteProtocolError:
                _LOG.warning(_INVALID)
                self._closes, self._is_bodiless = True, False
                self.answer(400, [("Content-Type", "text/plain; charset=utf-8")], _INVALID.encode())
                return
            if not is_whole:
                return
            data = self._reader.trailing_data[0]
            request = self._whole()
            self._deadline = math.inf
            if waiting := self._respond(request, self):
                self._ahead += data
                self._task = self._loop.create_task(self._wait(waiting))
                return

    async def _wait(self, answered: Coroutine[object, object, None]) -> None:
        await answered
        self._task = None
        self._go_on()

    def _go_on(self) -> None:
        """Takes up what has been read ahead."""
        if not self.transport.is_closing():
            ahead, self._ahead = bytes(self._ahead), bytearray()
            self.transport.resume_reading()
            self._take(ahead)

    def _read(self, data: bytes) -> bool:
        """Whether a request is whole with `data`; raises h11.RemoteProtocolError."""
        if self._head is None and not self._reader.trailing_data[0]:
            data = data.lstrip(b"\r\n")  # RFC 9112, 2.2
            if not data:  # which h11 would take for the end of the connection
                if self._deadline == math.inf:
                    self._end_after(self._keep_alive_s)
                return False
        self._reader.receive_data(data)
        while True:
            event = self._reader.next_event()
            if isinstance(event, h11.Data):
                if len(self._body) <= self._body_limit:
                    self._body += event.data
            elif isinstance(event, h11.EndOfMessage):
                return True
            elif isinstance(event, h11.Request):
                self._head = event
                if self._reader.they_are_waiting_for_100_continue and not self._reader.trailing_data[0]:
                    self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            else:
                break
        state = self._reader.their_state
        if not self._is_reading and (state is h11.SEND_BODY or self._reader.trailing_data[0]):
            self._is_reading = True
            self._end_after(REQUEST_S)
        return False

    def _whole(self) -> Request:
        """The request that has been read; from here on the next one is."""
        head = self._head
        assert head is not None, "that is what came first"
        path, _, query = head.target.decode("latin-1").partition("?")
        method = head.method.decode("latin-1")
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in reversed(list(head.headers))}
        chain = self.transport.get_extra_info("client_chain") or ()
        request = Request(method, path, query, headers, bytes(self._body), client_chain=chain)
        has_two_lengths = "transfer-encoding" in headers and "content-length" in headers  # RFC 9112, 6.1
        self._closes = self._reader.their_state is h11.MUST_CLOSE or has_two_lengths
        self._is_chunked = head.http_version >= b"1.1"
        self._is_bodiless = method == "HEAD"
        self._reader, self._head, self._is_reading = h11.Connection(h11.SERVER), None, False
        self._body.clear()
        return request

    # --- answers

    def answer(self, status: int, headers: Sequence[tuple[str, str]], body: bytes) -> None:
        """A whole answer."""
        self.begin(status, headers, len(body))
        self.send(body)
        self.finish()

    def begin(self, status: int, headers: Sequence[tuple[str, str]], length: int | None) -> None:
        """The head of an answer; without a length it goes on until it is finished.

        Of the headers a `Connection: close` is obeyed, and a `Content-Length` is sent in place of `length`: where that
        is wrong for the body, the connection ends behind it.
        """
        lines = [f"HTTP/1.1 {status} {_REASONS.get(status, '')}"]
        lines += [f"{name}: {value}" for name, value in headers]
        named = {name.lower(): value.strip().lower() for name, value in headers if name.lower() in _FRAMING}
        says_close = "close" in (token.strip() for token in named.get("connection", "").split(","))
        said = named.get("content-length")
        self._closes = self._closes or says_close
        if status in _BODILESS:
            self._is_bodiless, self._is_chunked = True, False
            self._closes = self._closes or (status == HTTPStatus.NO_CONTENT and said is not None)
        elif length is not None:
            self._is_chunked = False
            if said is None:
                lines.append(f"Content-Length: {length}")
            else:
                self._closes = self._closes or said != str(length)
        elif self._is_chunked:
            lines.append("Transfer-Encoding: chunked")
            self._closes = self._closes or said is not None
        else:
            self._closes = True
        if self._closes and not says_close:
            lines.append("Connection: close")
        self.transport.write("\r\n".join((*lines, "", "")).encode("latin-1"))

    def send(self, piece: bytes) -> None:
        """More of the body."""
        if piece and not self._is_bodiless:
            self.transport.write(b"%x\r\n%b\r\n" % (len(piece), piece) if self._is_chunked else piece)

    async def room(self) -> None:
        """Waits for a client that does not read what has been sent."""
        await self._room.wait()

    def finish(self) -> None:
        """The end of an answer, and of a connection that has no further one."""
        if self._is_chunked and not self._is_bodiless:
            self.transport.write(b"0\r\n\r\n")
        if self._closes:
            self.transport.close()
        else:
            self._end_after(self._keep_alive_s)

    # --- time

    def _end_after(self, seconds: float) -> None:
        """The connection ends then, unless there is another end, or an answer under way."""
        self._deadline = self._loop.time() + seconds
        if self._timer is None or self._timer.when() > self._deadline:
            if self._timer:
                self._timer.cancel()
            self._timer = self._loop.call_at(self._deadline, self._look_at_time)

    def _look_at_time(self) -> None:
        """The one timer, which may fire early."""
        self._timer = None
        left_s = self._deadline - self._loop.time()
        if left_s > 0:
            if left_s < math.inf:
                self._end_after(left_s)
            return
        if self._is_reading:
            self.transport.write(TOO_LATE)
        self.transport.close()
