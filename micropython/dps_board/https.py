"""HTTPS to one endpoint over one kept connection, on asyncio, with every wait and every size bounded.

Sources: RFC 9110, RFC 9112.
"""

import gc

from dps_agent.effects import NO_REPLY_CLOSED, NO_REPLY_PROTOCOL, NO_REPLY_TOO_LARGE, NoReply, Reply
from dps_agent.utc import http_date_s
from dps_board.tls import FailedError, Link, split_address

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from dps_agent.sas import SasToken

HEAD_LIMIT = 16 * 1024  # bytes of status lines and headers of one answer
BODY_LIMIT = 16 * 1024  # bytes
_HEADERS_LIMIT = 64
_READ_HEADERS = (  # by somebody; the others are not kept
    "connection",
    "content-length",
    "date",
    "retry-after",
    "transfer-encoding",
    "x-ms-error-code",
    "x-ms-request-id",
)
_ROOM_BYTES = 1600  # of DPS's largest answer where the payload is small
_RECEIVE_BYTES = 512
_SEND_BYTES = 1024
_HTTPS_PORT = 443


class Connection:
    """One connection to `endpoint`, "https://name[:port]"; opened when needed and again where the server closed it.

    `roots` are the only certificates to trust, in DER. `connect_to`, "host:port", is dialled instead; the name that is
    sent and that the certificate must carry stays the endpoint's. `while_waiting` is called at least once a second
    while a request is under way.
    """

    def __init__(
        self,
        endpoint: str,
        roots: "list[bytes]",
        connect_to: str = "",
        while_waiting: "Callable[[], None] | None" = None,
    ) -> None:
        self._authority = endpoint[len("https://") :]
        self._host, port = split_address(self._authority, _HTTPS_PORT)
        self._dial = split_address(connect_to, port) if connect_to else (self._host, port)
        self._link = Link(roots, while_waiting)
        self._received = b""
        self._answered = False  # a byte came since the last request
        self._room = bytearray(_ROOM_BYTES)  # for a body: later on there may be no block of that size

    @property
    def handshakes(self) -> int:
        """TLS handshakes so far."""
        return self._link.handshakes

    async def request(
        self, method: str, path: str, body: bytes, authorization: "SasToken | None", limit_ms: int
    ) -> "Reply | NoReply":
        """One request and its whole answer within `limit_ms`, any repetition included.

        The body of the answer is only to be read before the next request.
        """
        self._link.begin(limit_ms)
        sent = False
        while True:
            reused = self.is_open()
            keep = False
            self._answered = False
            try:
                if not reused:
                    await self._link.open(self._dial[0], self._dial[1], self._host)
                await self._send(self._head_of(method, path, body, authorization))
                await self._send(body)
                sent = True
                reply, keep = await self._answer()
                return reply
            except MemoryError:
                return NoReply(f"{NO_REPLY_TOO_LARGE}: no memory for the answer", True)
            except FailedError as failed:
                sent = sent or reused
                # A server may close an idle connection while our request is on its way. Every request of this API
                # may be repeated: registering again with the same body and token asks for the same thing.
                if reused and not self._answered and failed.reason == NO_REPLY_CLOSED and not self._link.is_aborted():
                    continue
                return NoReply(f"{failed.reason}: {failed.text}", sent)
            finally:
                if not keep:
                    self.close()

    def is_open(self) -> bool:
        """Whether there is a connection with nothing in it, so that it can take a request; another one is closed."""
        if not self._link.is_open():
            return False
        try:
            if self._link.is_shaken and self._link.read(1) is None:
                return True
        except FailedError:
            pass  # the peer has gone
        self.close()
        return False

    def abort(self) -> None:
        """Makes a request under way end soon, `closed`; for another task."""
        self._link.abort()

    def close(self) -> None:
        """Ends the connection, if there is one; the next request opens another."""
        self._link.close()
        self._received = b""

    async def _send(self, message: bytes) -> None:
        sent = 0
        while sent < len(message):
            count = self._link.write(memoryview(message)[sent : sent + _SEND_BYTES])
            sent += count
            if not count:
                await self._link.pause()

    # --- messages

    def _head_of(self, method: str, path: str, body: bytes, authorization: "SasToken | None") -> bytes:
        head = f"{method} {path} HTTP/1.1\r\nHost: {self._authority}\r\nUser-Agent: dps-agent\r\n"
        head += "Accept: application/json\r\n"
        if body or method != "GET":
            head += f"Content-Type: application/json; charset=utf-8\r\nContent-Length: {len(body)}\r\n"
        if authorization is not None:
            head += f"Authorization: {authorization.header()}\r\n"
        return (head + "\r\n").encode()

    async def _answer(self) -> "tuple[Reply, bool]":
        """The next answer, and whether the connection can take another request."""
        while True:
            gc.collect()  # so that what stays of a head is not strewn over the room for its body
            status, headers, version = await self._head()
            if status >= 200:  # the answers before are interim
                break
        body: bytes = b""
        if status not in (204, 304):
            body = await self._body(headers)
        connection = headers.get("connection", "").lower()
        keep = "close" not in connection and (version == "HTTP/1.1" or "keep-alive" in connection)
        reply = Reply(status, headers, body, http_date_s(headers.get("date")))
        return reply, keep and not self._received

    async def _head(self) -> "tuple[int, dict[str, str], str]":
        """Status, headers by lower-case name, repeated ones joined, and HTTP version of one answer's head."""
        line = await self._text_line(HEAD_LIMIT)
        left = HEAD_LIMIT - len(line)
        version, _, rest = line.partition(" ")
        status = rest[:3]
        if version not in ("HTTP/1.1", "HTTP/1.0") or not _is_number(status) or rest[3:4] not in ("", " "):
            raise FailedError(NO_REPLY_PROTOCOL, "the answer is not HTTP")
        headers: dict[str, str] = {}
        for _ in range(_HEADERS_LIMIT):
            line = await self._text_line(left)
            left -= len(line) + 2
            if not line:
                return int(status), headers, version
            name, colon, value = line.partition(":")
            if not colon or not name or " " in name or "\t" in name:
                raise FailedError(NO_REPLY_PROTOCOL, "a header is malformed")
            name = name.lower()
            value = value.strip()
            if name in headers and (name != "content-length" or headers[name] != value):
                value = headers[name] + ", " + value
            if name in _READ_HEADERS:
                headers[name] = value
        raise FailedError(NO_REPLY_TOO_LARGE, f"more than {_HEADERS_LIMIT} headers")

    async def _text_line(self, limit: int) -> str:
        line = await self._line(limit)
        try:
            return line.decode()
        except UnicodeError:
            raise FailedError(NO_REPLY_PROTOCOL, "a header is not text")

    async def _body(self, headers: "dict[str, str]") -> "Any":
        """The whole body by RFC 9112, 6.3."""
        coding = headers.get("transfer-encoding")
        length = headers.get("content-length")
        if coding is not None:
            if coding.lower() != "chunked" or length is not None:
                raise FailedError(NO_REPLY_PROTOCOL, "a Transfer-Encoding other than chunked alone")
            return await self._chunks()
        if length is not None:
            if not _is_number(length):
                raise FailedError(NO_REPLY_PROTOCOL, "a Content-Length that is not one number")
            size = int(length[:12])
            _check_size(size)
            return await self._take(size)
        # It would end with the connection, and MicroPython does not say whether that ended well or was cut.
        raise FailedError(NO_REPLY_PROTOCOL, "a body without a length")

    async def _chunks(self) -> "Any":
        body = bytearray()
        while True:
            digits = (await self._line(1024)).split(b";")[0].strip()
            if not digits or len(digits) > 8 or digits.lower().strip(b"0123456789abcdef"):
                raise FailedError(NO_REPLY_PROTOCOL, "a chunk without a size")
            size = int(digits, 16)
            if not size:
                break
            _check_size(len(body) + size)
            body += await self._take(size)
            if await self._line(2):
                raise FailedError(NO_REPLY_PROTOCOL, "a chunk longer than its size")
        left = HEAD_LIMIT
        while True:
            trailer = await self._line(left)
            if not trailer:
                return body
            left -= len(trailer) + 2

    async def _line(self, limit: int) -> bytes:
        """The next line without its end."""
        while True:
            end = self._received.find(b"\n")
            if end > limit or (end < 0 and len(self._received) > limit):
                raise FailedError(NO_REPLY_TOO_LARGE, f"more than {HEAD_LIMIT} bytes of headers, or too long a line")
            if end >= 0:
                line = self._received[:end]
                self._received = self._received[end + 1 :]
                return line[:-1] if line[-1:] == b"\r" else line
            await self._receive()

    async def _take(self, size: int) -> "Any":
        """The next `size` bytes, in `_room` where they fit."""
        content = memoryview(self._room)[:size] if size <= len(self._room) else memoryview(bytearray(size))
        at = min(size, len(self._received))
        content[:at] = self._received[:at]
        self._received = self._received[at:]
        while at < size:
            await self._receive(size - at)
            content[at : at + len(self._received)] = self._received
            at += len(self._received)
            self._received = b""
        return content

    async def _receive(self, limit: int = _RECEIVE_BYTES) -> None:
        """Waits for more."""
        while True:
            received = self._link.read(min(limit, _RECEIVE_BYTES))
            if received:
                self._answered = True
                self._received += received
                return
            if received is not None:
                raise FailedError(NO_REPLY_CLOSED, "the connection ended before the answer was whole")
            await self._link.pause()


def _is_number(text: str) -> bool:
    for character in text:
        if character not in "0123456789":
            return False
    return bool(text)


def _check_size(size: int) -> None:
    if size > BODY_LIMIT:
        raise FailedError(NO_REPLY_TOO_LARGE, f"a body of more than {BODY_LIMIT} bytes")
