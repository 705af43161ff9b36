"""HTTPS to one endpoint over one kept connection, on asyncio, with every wait and every size bounded.

The socket never blocks and is asked every POLL_S; what does block is the resolver and the arithmetic of a TLS
handshake. mbedTLS verifies certificates under the board's clock, so that has to be set first. Sources: RFC 9110,
RFC 9112.
"""

import asyncio
import select
import socket

try:
    import ssl
except ImportError:  # Debian's MicroPython has the module under its inner name only
    import tls as ssl  # type: ignore[no-redef] # pyright: ignore[reportMissingImports]

from dps_agent.effects import (
    NO_REPLY_CLOSED,
    NO_REPLY_CONNECT,
    NO_REPLY_DNS,
    NO_REPLY_PROTOCOL,
    NO_REPLY_TIMEOUT,
    NO_REPLY_TLS,
    NO_REPLY_TOO_LARGE,
    NoReply,
    Reply,
)
from dps_agent.utc import http_date_s
from dps_hal.platform import ms_since, ticks_ms

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from dps_agent.sas import SasToken

HEAD_LIMIT = 16 * 1024  # bytes of status lines and headers of one answer
BODY_LIMIT = 16 * 1024  # bytes
_HEADERS_LIMIT = 64
POLL_S = 0.005
_RECEIVE_BYTES = 512
_HTTPS_PORT = 443
_MBEDTLS_CONN_EOF = -0x7280  # mbedtls/ssl.h: the peer has gone without a goodbye
_MBEDTLS_ALLOC_FAILED = -0x7F00


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
        self._roots = roots
        self._limit_ms = 0
        self._while_waiting = while_waiting
        self._socket: Any = None
        self._tls: Any = None
        self._read: Any = None
        self._received = b""
        self._is_shaken = False
        self._answered = False  # a byte came since the last request
        self._started_ms = 0
        self._aborted = False
        self.handshakes = 0

    async def request(
        self, method: str, path: str, body: bytes, authorization: "SasToken | None", limit_ms: int
    ) -> "Reply | NoReply":
        """One request and its whole answer within `limit_ms`, any repetition included."""
        self._started_ms = ticks_ms()
        self._limit_ms = limit_ms
        self._aborted = False
        message = self._message(method, path, body, authorization)
        sent = False
        while True:
            reused = self.is_open()
            keep = False
            self._answered = False
            try:
                if not reused:
                    await self._connect()
                await self._handshake_and_send(message)
                sent = True
                reply, keep = await self._answer()
                return reply
            except MemoryError:
                return NoReply(f"{NO_REPLY_TOO_LARGE}: no memory for the answer", True)
            except _FailedError as failed:
                sent = sent or reused
                # A server may close an idle connection while our request is on its way. Every request of this API
                # may be repeated: registering again with the same body and token asks for the same thing.
                if reused and not self._answered and failed.reason == NO_REPLY_CLOSED and not self._aborted:
                    continue
                return NoReply(f"{failed.reason}: {failed.text}", sent)
            finally:
                if not keep:
                    self.close()

    def is_open(self) -> bool:
        """Whether there is a connection with nothing in it, so that it can take a request; another one is closed."""
        if self._tls is None:
            return False
        try:
            if self._is_shaken and self._read(1) is None:
                return True
        except (OSError, ValueError):
            pass  # the peer has gone
        self.close()
        return False

    def abort(self) -> None:
        """Makes a request under way end soon, `closed`; for another task."""
        self._aborted = True

    def close(self) -> None:
        """Ends the connection, if there is one; the next request opens another."""
        for each in (self._tls, self._socket):
            if each is not None:
                try:
                    each.close()
                except OSError:
                    pass  # it is broken, which is as good
        self._tls = self._socket = self._read = None
        self._received = b""
        self._is_shaken = False

    # --- waiting

    async def _pause(self) -> None:
        """Lets the other tasks run; fails once the request's time is over."""
        if self._aborted:
            raise _FailedError(NO_REPLY_CLOSED, "given up")
        if ms_since(self._started_ms) > self._limit_ms:
            raise _FailedError(NO_REPLY_TIMEOUT, f"no whole answer within {self._limit_ms} ms")
        if self._while_waiting is not None:
            self._while_waiting()
        await asyncio.sleep(POLL_S)

    # --- the connection

    async def _connect(self) -> None:
        await self._pause()
        host, port = self._dial
        try:
            addresses = socket.getaddrinfo(host, port, 0, socket.SOCK_STREAM)
        except OSError as error:
            raise _FailedError(NO_REPLY_DNS, f"'{host}': error {error.errno}")
        failure = "no address"
        for family, kind, protocol, _, address in addresses:
            self._socket = socket.socket(family, kind, protocol)
            try:
                self._socket.setblocking(False)
                try:
                    self._socket.connect(address)
                except OSError:
                    pass  # under way; whether it works, poll says
                if await self._is_connected():
                    self._wrap()
                    return
                failure = "refused or unreachable"
            except OSError as error:
                failure = f"error {error.errno}"
            self.close()
        raise _FailedError(NO_REPLY_CONNECT, f"{host} port {port}: {failure}")

    async def _is_connected(self) -> bool:
        poller = select.poll()
        poller.register(self._socket, select.POLLOUT)
        while True:
            for _, event, *_ in poller.poll(0):
                return not event & (select.POLLERR | select.POLLHUP)
            await self._pause()

    def _wrap(self) -> None:
        """Puts TLS over the socket; the handshake itself comes with the first byte that is sent."""
        try:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            for root in self._roots:
                context.load_verify_locations(cadata=root)
            context.verify_mode = ssl.CERT_REQUIRED  # the default verifies nothing
            if context.verify_mode != ssl.CERT_REQUIRED:
                raise ValueError("this MicroPython cannot verify certificates")
            self._tls = context.wrap_socket(self._socket, server_hostname=self._host, do_handshake_on_connect=False)
        except (OSError, ValueError) as error:
            raise self._broken(error, True)
        # `read` goes on until it would have to wait, and forgets an end that it met then; older versions have no other.
        self._read = getattr(self._tls, "recv", self._tls.read)

    async def _handshake_and_send(self, message: bytes) -> None:
        sent = 0
        while sent < len(message):
            try:
                count = self._tls.write(message[sent : sent + 1024])
            except (OSError, ValueError) as error:
                raise self._broken(error, not self._is_shaken)
            if count:
                sent += count
                if not self._is_shaken:
                    self._is_shaken = True
                    self.handshakes += 1
            else:
                await self._pause()

    def _broken(self, error: Exception, in_handshake: bool) -> "_FailedError":
        """What a failure of the TLS module means: it raises ValueError for certificates, its own codes below 0."""
        number = 0 if isinstance(error, ValueError) else getattr(error, "errno", 0)
        if in_handshake and number <= 0 and number not in (_MBEDTLS_CONN_EOF, _MBEDTLS_ALLOC_FAILED):
            return _FailedError(NO_REPLY_TLS, str(error))
        at = "in the TLS handshake" if in_handshake else "before the answer was whole"
        return _FailedError(NO_REPLY_CLOSED, f"the connection ended {at}: {error}")

    # --- messages

    def _message(self, method: str, path: str, body: bytes, authorization: "SasToken | None") -> bytes:
        head = f"{method} {path} HTTP/1.1\r\nHost: {self._authority}\r\nUser-Agent: dps-agent\r\n"
        head += "Accept: application/json\r\n"
        if body or method != "GET":
            head += f"Content-Type: application/json; charset=utf-8\r\nContent-Length: {len(body)}\r\n"
        if authorization is not None:
            head += f"Authorization: {authorization.header()}\r\n"
        return head.encode() + b"\r\n" + body

    async def _answer(self) -> "tuple[Reply, bool]":
        """The next answer, and whether the connection can take another request."""
        while True:
            status, headers, version = await self._head()
            if status >= 200:  # the answers before are interim
                break
        body = b""
        if status not in (204, 304):
            body = await self._body(headers)
        connection = headers.get("connection", "").lower()
        keep = "close" not in connection and (version == "HTTP/1.1" or "keep-alive" in connection)
        reply = Reply(status, headers, body, http_date_s(headers.get("date")))
        return reply, keep and not self._received

    async def _head(self) -> "tuple[int, dict[str, str], str]":
        """Status, headers by lower-case name, repeated ones joined, and HTTP version of one answer's head."""
        left = HEAD_LIMIT
        lines: list[str] = []
        while not lines or lines[-1]:
            line = await self._line(left)
            left -= len(line) + 2
            try:
                lines.append(line.decode())
            except UnicodeError:
                raise _FailedError(NO_REPLY_PROTOCOL, "a header is not text")
            if len(lines) > _HEADERS_LIMIT:
                raise _FailedError(NO_REPLY_TOO_LARGE, f"more than {_HEADERS_LIMIT} headers")
        version, _, rest = lines[0].partition(" ")
        status = rest[:3]
        if version not in ("HTTP/1.1", "HTTP/1.0") or not _is_number(status) or rest[3:4] not in ("", " "):
            raise _FailedError(NO_REPLY_PROTOCOL, "the answer is not HTTP")
        headers: dict[str, str] = {}
        for header in lines[1:-1]:
            name, colon, value = header.partition(":")
            if not colon or not name or " " in name or "\t" in name:
                raise _FailedError(NO_REPLY_PROTOCOL, "a header is malformed")
            name = name.lower()
            value = value.strip()
            if name in headers and (name != "content-length" or headers[name] != value):
                value = headers[name] + ", " + value
            headers[name] = value
        return int(status), headers, version

    async def _body(self, headers: "dict[str, str]") -> bytes:
        """The whole body by RFC 9112, 6.3."""
        coding = headers.get("transfer-encoding")
        length = headers.get("content-length")
        if coding is not None:
            if coding.lower() != "chunked" or length is not None:
                raise _FailedError(NO_REPLY_PROTOCOL, "a Transfer-Encoding other than chunked alone")
            return await self._chunks()
        if length is not None:
            if not _is_number(length):
                raise _FailedError(NO_REPLY_PROTOCOL, "a Content-Length that is not one number")
            size = int(length[:12])
            _check_size(size)
            return await self._take(size)
        # It would end with the connection, and MicroPython does not say whether that ended well or was cut.
        raise _FailedError(NO_REPLY_PROTOCOL, "a body without a length")

    async def _chunks(self) -> bytes:
        body = b""
        while True:
            digits = (await self._line(1024)).split(b";")[0].strip()
            if not digits or len(digits) > 8 or digits.lower().strip(b"0123456789abcdef"):
                raise _FailedError(NO_REPLY_PROTOCOL, "a chunk without a size")
            size = int(digits, 16)
            if not size:
                break
            _check_size(len(body) + size)
            body += await self._take(size)
            if await self._line(2):
                raise _FailedError(NO_REPLY_PROTOCOL, "a chunk longer than its size")
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
                raise _FailedError(NO_REPLY_TOO_LARGE, f"more than {HEAD_LIMIT} bytes of headers, or too long a line")
            if end >= 0:
                line = self._received[:end]
                self._received = self._received[end + 1 :]
                return line[:-1] if line[-1:] == b"\r" else line
            await self._receive()

    async def _take(self, size: int) -> bytes:
        """The next `size` bytes; the only copy of a body while it arrives."""
        content = bytearray(size)
        at = min(size, len(self._received))
        content[:at] = self._received[:at]
        self._received = self._received[at:]
        while at < size:
            await self._receive(size - at)
            content[at : at + len(self._received)] = self._received
            at += len(self._received)
            self._received = b""
        return bytes(content)

    async def _receive(self, limit: int = _RECEIVE_BYTES) -> None:
        """Waits for more."""
        while True:
            try:
                received = self._read(min(limit, _RECEIVE_BYTES))
            except (OSError, ValueError) as error:
                raise self._broken(error, False)
            if received:
                self._answered = True
                self._received += received
                return
            if received is not None:
                raise _FailedError(NO_REPLY_CLOSED, "the connection ended before the answer was whole")
            await self._pause()


class _FailedError(Exception):
    """Why no whole answer came: `reason` is a NO_REPLY_* word, `text` the rest."""

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(reason, text)
        self.reason = reason
        self.text = text


def split_address(text: str, default_port: int) -> "tuple[str, int]":
    """The two parts of "host", "host:port" or "[IPv6]:port", which the settings have checked."""
    host, colon, port = text.rpartition(":")
    if not colon or text[-1:] == "]":
        host, port = text, str(default_port)
    return host.strip("[]"), int(port)


def _is_number(text: str) -> bool:
    for character in text:
        if character not in "0123456789":
            return False
    return bool(text)


def _check_size(size: int) -> None:
    if size > BODY_LIMIT:
        raise _FailedError(NO_REPLY_TOO_LARGE, f"a body of more than {BODY_LIMIT} bytes")
