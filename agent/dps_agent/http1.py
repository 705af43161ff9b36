"""HTTP/1.1 messages out of bytes, whatever pieces these come in.

A reading is a generator: it yields where it needs more, is sent what came since, b"" where the connection has ended in
order, and returns what it read. So one of three things comes of it: the value, Failed (`protocol`, `too_large`,
`closed`), or it waits for more. What came beyond the value stays in `rest`. Sources: RFC 9110, RFC 9112.

Decided, where those leave a choice or peers differ:

- All that is no body counts against one HEAD_LIMIT and one LINES_LIMIT for each answer: its head, the interim answers
  before it, its trailers.
- A line may end with LF alone, but not inside a chunked body. CR and NUL elsewhere in a line, a folded header and a
  header name that is no token are refused.
- Two framings of one body are refused, also where they agree: Content-Length beside Transfer-Encoding, lengths that
  differ, another transfer coding than chunked alone, and that from HTTP/1.0. The same length twice is one.
- A body with a Content-Encoding is refused, because none was asked for; of an answer that asks for patience (429, 5xx)
  the headers say enough.
"""

from dps_agent.effects import NO_REPLY_CLOSED, NO_REPLY_PROTOCOL, NO_REPLY_TOO_LARGE, Failed, Reply
from dps_agent.utc import http_date_s

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Generator
    from typing import Any, TypeAlias, TypeVar

    Value = TypeVar("Value")
    Reading: TypeAlias = Generator[None, bytes, Value]

HEAD_LIMIT = 16 * 1024  # bytes of a head
LINES_LIMIT = 100
ANSWER_HEADERS = (  # read by somebody; the others are not kept
    "connection",
    "content-encoding",
    "content-length",
    "date",
    "retry-after",
    "transfer-encoding",
    "x-ms-error-code",
    "x-ms-request-id",
)
_CHUNK_LINE_LIMIT = 1024  # bytes of the line before a chunk
_TOKEN = b"!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyz"  # RFC 9110, 5.6.2, in lower case


class Reader:
    """Reads what comes on one connection, one message after the other.

    `names` are the headers to keep, in lower case. A body of up to `body_limit` bytes is taken, into `room` where
    somebody gives one that is large enough. `end_counts`: an end in order is told from a cut, so that a body may end
    with the connection.
    """

    def __init__(
        self,
        body_limit: int,
        names: "tuple[str, ...]" = ANSWER_HEADERS,
        end_counts: bool = False,
    ) -> None:
        self.rest = b""
        self._body_limit = body_limit
        self._names = names
        self.room: bytes | bytearray = b""
        self._end_counts = end_counts
        self._left = self._lines_left = 0  # bytes and lines that may still come

    def answer(self) -> "Reading[tuple[Reply, bool]]":
        """The next answer, and whether the connection can take another request."""
        status, headers, version = yield from self.final_head()
        if status == 101:
            raise Failed(NO_REPLY_PROTOCOL, "the answer switches protocols")
        connection = headers.get("connection", "").lower()
        keep = "close" not in connection and (version == b"HTTP/1.1" or "keep-alive" in connection)
        body: Any = b""
        if status not in (204, 304):
            coding = headers.get("content-encoding", "identity")
            if coding.lower() != "identity" and status != 429 and status < 500:
                raise Failed(NO_REPLY_PROTOCOL, f"Content-Encoding '{coding}', which nobody asked for")
            body = yield from self.body(headers, version)
            keep = keep and ("content-length" in headers or "transfer-encoding" in headers)
        return Reply(status, headers, body, http_date_s(headers.get("date"))), keep and not self.rest

    def final_head(self) -> "Reading[tuple[int, dict[str, str], bytes]]":
        """Status, headers and HTTP version of the next answer that is not interim; 101 is final."""
        self.begin()
        while True:
            line = yield from self.line()
            version, _, line = line.partition(b" ")
            status = int(line[:3]) if _is_number(line[:3]) else 0
            if version not in (b"HTTP/1.1", b"HTTP/1.0") or status < 100 or line[3:4] not in (b"", b" "):
                raise Failed(NO_REPLY_PROTOCOL, "the answer is not HTTP")
            headers = yield from self.headers()
            if status >= 200 or status == 101:
                return status, headers, version

    def begin(self) -> None:
        """What is read from here on has limits of its own."""
        self._left = HEAD_LIMIT
        self._lines_left = LINES_LIMIT

    def headers(self) -> "Reading[dict[str, str]]":
        """The headers up to the empty line, by lower-case name; repeated ones are joined by a comma."""
        headers: dict[str, str] = {}
        while True:
            line = yield from self.line()
            if not line:
                return headers
            token, colon, text = line.partition(b":")
            token = token.lower()
            if not colon or not token or token.strip(_TOKEN):
                raise Failed(NO_REPLY_PROTOCOL, "a header is malformed")
            name = token.decode()
            if name in self._names:
                try:
                    value = text.strip(b" \t").decode()
                except UnicodeError:
                    raise Failed(NO_REPLY_PROTOCOL, "a header is not text")
                if name in headers and (name != "content-length" or headers[name] != value):
                    value = headers[name] + ", " + value
                headers[name] = value

    def body(self, headers: "dict[str, str]", version: bytes) -> "Reading[Any]":
        """The whole body by RFC 9112, 6.3, as bytes, bytearray or memoryview."""
        coding = headers.get("transfer-encoding")
        length = headers.get("content-length")
        if coding is not None:
            if coding.lower() != "chunked" or length is not None or version != b"HTTP/1.1":
                raise Failed(NO_REPLY_PROTOCOL, "a Transfer-Encoding other than chunked alone")
            return (yield from self._chunks())
        if length is not None:
            digits = length.encode()
            if not _is_number(digits):
                raise Failed(NO_REPLY_PROTOCOL, "a Content-Length that is not one number")
            size = int(digits.lstrip(b"0")[:12] or b"0")
            self._check_size(size)
            return (yield from self._take(size))
        if not self._end_counts:
            raise Failed(NO_REPLY_PROTOCOL, "a body without a length")
        while True:
            self._check_size(len(self.rest))
            received: bytes = yield
            if not received:
                body, self.rest = self.rest, b""
                return body
            self.rest += received

    def _chunks(self) -> "Reading[bytearray]":
        body = bytearray()
        left = self._left, self._lines_left
        while (yield from self.chunk(body)):
            pass
        self._left, self._lines_left = left
        while (yield from self.line(False)):
            pass  # trailers
        return body

    def chunk(self, body: bytearray) -> "Reading[int]":
        """Puts the next chunk of a body behind what is there of it, and returns its size; the last one has 0 bytes."""
        self._left, self._lines_left = _CHUNK_LINE_LIMIT, 1
        line = yield from self.line(False)
        digits = line.partition(b";")[0].strip(b" \t").lower()
        if not digits or len(digits) > 16 or digits.strip(b"0123456789abcdef"):
            raise Failed(NO_REPLY_PROTOCOL, "a chunk without a size")
        size = int(digits, 16)
        if size:
            self._check_size(len(body) + size)
            body += yield from self._take(size)
            if bytes((yield from self._take(2))) != b"\r\n":
                raise Failed(NO_REPLY_PROTOCOL, "a chunk longer than its size")
        return size

    def line(self, may_end_with_lf: bool = True) -> "Reading[bytes]":
        """The next line without its end."""
        searched = 0
        while True:
            size = self.rest.find(b"\n", searched) + 1
            searched = len(self.rest)
            if (size or searched + 1) > self._left or not self._lines_left:
                raise Failed(NO_REPLY_TOO_LARGE, "too many headers, or too long a line")
            if size:
                break
            received: bytes = yield
            self.rest += _came(received)
        self._left -= size
        self._lines_left -= 1
        line, self.rest = self.rest[: size - 1], self.rest[size:]
        if line[-1:] == b"\r":
            line = line[:-1]
        elif not may_end_with_lf:
            raise Failed(NO_REPLY_PROTOCOL, "a line of a chunked body without CR")
        if b"\r" in line or b"\0" in line:
            raise Failed(NO_REPLY_PROTOCOL, "CR or NUL inside a line")
        return line

    def _take(self, size: int) -> "Reading[memoryview]":
        """The next `size` bytes."""
        content = memoryview(self.room)[:size] if 0 < size <= len(self.room) else memoryview(bytearray(size))
        at = 0
        while True:
            piece, self.rest = self.rest[: size - at], self.rest[size - at :]
            content[at : at + len(piece)] = piece
            at += len(piece)
            if at == size:
                return content
            received: bytes = yield
            self.rest = _came(received)

    def _check_size(self, size: int) -> None:
        if size > self._body_limit:
            raise Failed(NO_REPLY_TOO_LARGE, f"a body of more than {self._body_limit} bytes")


def _came(received: bytes) -> bytes:
    if not received:
        raise Failed(NO_REPLY_CLOSED, "the connection ended before the answer was whole")
    return received


def _is_number(digits: bytes) -> bool:
    return bool(digits) and not digits.strip(b"0123456789")
