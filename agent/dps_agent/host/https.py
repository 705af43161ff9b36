"""HTTPS to one endpoint over one kept connection, with every wait and every size bounded.

`http.client` parses the answers. It takes a head that ends early for a whole one, a Content-Length that is no number
for none, and has no total deadline; so it reads from `_Stream`, which counts, keeps time and knows where the
connection ended, and `_body` checks what it parsed. Sources: RFC 9110, RFC 9112.
"""

from __future__ import annotations

import datetime
import email.utils
import http.client
import ssl
import time
import urllib.parse

from dps_agent.effects import NO_REPLY_CLOSED, NO_REPLY_PROTOCOL, NO_REPLY_TOO_LARGE, Failed, NoReply, Reply
from dps_agent.host.dial import Dialler, seconds_until, validity_s
from dps_agent.host.proxy import NONE, ProxyRule
from dps_hal.errors import AskOperator

TYPE_CHECKING = False
if TYPE_CHECKING:
    from dps_agent.sas import SasToken

HEAD_LIMIT = 16 * 1024  # bytes of status lines and headers of one answer
BODY_LIMIT = 64 * 1024  # bytes
_HTTPS_PORT = 443
_RECEIVE_SIZE = 16 * 1024  # bytes; the largest TLS record


def host_and_port(text: str, setting: str) -> tuple[str, int | None]:
    """The two parts of "host", "host:port" or "[IPv6]:port"; AskOperator `config.invalid` names `setting` if not so."""
    host, port = "", None
    try:
        parts = urllib.parse.urlsplit(f"//{text}")
        host, port = parts.hostname or "", parts.port
        host.encode("idna")  # what getaddrinfo and TLS do with it
        valid = bool(host) and parts.netloc == text and text.isascii() and "@" not in text and port != 0
    except ValueError:  # an unbalanced bracket, a port out of range, a label that is empty or too long
        valid = False
    if not valid:
        raise AskOperator("config.invalid", f"{setting}: expected a host name with or without :port, got '{text}'")
    return host, port


class DpsConnection:
    """One connection to a DPS endpoint, opened when needed, kept between requests, reopened where the server closed it.

    `endpoint` is "https://name[:port]". `connect_to`, "host:port", is dialled instead; the name that is sent and that
    the certificate must carry stays the endpoint's. `ca_file` holds the only roots to trust, in PEM; empty: the
    system's. `timeout_s` bounds one request in all, connecting and any repetition included. `proxy` is the setting
    `network.proxy`.

    One thread calls `request` and `close`; any thread may call `abort`. AskOperator `config.invalid` where one of
    the settings makes no sense.
    """

    def __init__(
        self,
        endpoint: str,
        connect_to: str = "",
        ca_file: str = "",
        timeout_s: float = 60.0,
        user_agent: str = "dps-agent",
        proxy: str = NONE,
    ) -> None:
        scheme, _, authority = endpoint.partition("://")
        self._authority = authority.removesuffix("/")
        if scheme.lower() != "https":
            raise AskOperator("config.invalid", f"endpoint: expected \"https://name\", got '{endpoint}'")
        self._host, port = host_and_port(self._authority, "endpoint")
        self._dial_host, self._dial_port = self._host, port or _HTTPS_PORT
        if connect_to:
            self._dial_host, dial_port = host_and_port(connect_to, "connect_to")
            self._dial_port = dial_port or self._dial_port
        self._dialler = Dialler(ProxyRule(proxy), ca_file)
        self._timeout_s = timeout_s
        self._user_agent = user_agent
        self._stream: _Stream | None = None  # set while a connection can take a request

    def request(self, method: str, path: str, body: bytes, authorization: SasToken | None) -> Reply | NoReply:
        """One request and its whole answer; ValueError for a path that is not percent-encoded."""
        deadline_s = time.monotonic() + self._timeout_s
        message = self._message(method, path, body, authorization)
        self._dialler.begin()
        sent = False
        while True:
            if self._stream is not None and not self._stream.is_idle():
                self.close()
            reused = self._stream is not None
            try:
                stream = self._stream or self._connect(deadline_s)
                sent = True
                stream.send(message, deadline_s)
                reply, keep = _answer(stream, method)
            except (OSError, http.client.HTTPException, Failed) as error:
                failed = self._failed(error)
                unanswered = self._stream is not None and not self._stream.answered
                self.close()
                # A server may close an idle connection while our request is on its way. Every request of this API
                # may be repeated: registering again with the same body and token asks for the same thing.
                if reused and unanswered and failed.reason == NO_REPLY_CLOSED:
                    continue
                return NoReply(f"{failed.reason}: {failed}", sent)
            if not keep:
                self.close()
            return reply

    def abort(self) -> None:
        """Makes a blocked `request` return at once, `closed`; for another thread, and nothing where none is blocked."""
        self._dialler.abort()

    def close(self) -> None:
        """Ends the connection, if there is one; the next request opens another."""
        self._stream = None
        self._dialler.close()

    def _message(self, method: str, path: str, body: bytes, authorization: SasToken | None) -> bytes:
        lines = [
            f"{method} {path} HTTP/1.1",
            f"Host: {self._authority}",
            f"User-Agent: {self._user_agent}",
            "Accept: application/json",
        ]
        if body or method != "GET":
            lines += ["Content-Type: application/json; charset=utf-8", f"Content-Length: {len(body)}"]
        if authorization is not None:
            lines.append(f"Authorization: {authorization.header()}")
        if " " in path or not all(line.isascii() and line.isprintable() for line in lines):
            raise ValueError("a request's path and headers must be percent-encoded")
        return "\r\n".join([*lines, "", ""]).encode("ascii") + body

    def _connect(self, deadline_s: float) -> _Stream:
        self._stream = _Stream(self._dialler.dial(self._host, self._dial_host, self._dial_port, deadline_s))
        return self._stream

    def _failed(self, error: Exception) -> Failed:
        if not isinstance(error, http.client.HTTPException):
            return self._dialler.explain(error, "before the answer was whole")
        if self._stream is not None and self._stream.ended:
            return Failed(NO_REPLY_CLOSED, "the connection ended before the answer was whole")
        if type(error) is http.client.HTTPException or isinstance(error, http.client.LineTooLong):  # its own bounds
            return Failed(NO_REPLY_TOO_LARGE, "too many headers, or too long a line")
        return Failed(NO_REPLY_PROTOCOL, "the answer is not HTTP")


class _Stream:
    """A TLS connection as the file from which http.client reads one answer after the other.

    It keeps what it received beyond an answer, so that nothing is taken for the next answer unseen.
    """

    def __init__(self, tls: ssl.SSLSocket) -> None:
        self._tls = tls
        self._valid_s = validity_s(tls)
        self._received = bytearray()
        self._deadline_s = 0.0
        self._head_left: int | None = None  # bytes that the head may still have; None: the head is over
        self.answered = False  # a byte came since the last request
        self.ended = False  # the server ended the connection, properly, and a reader has run into that

    def send(self, message: bytes, deadline_s: float) -> None:
        self.answered = False
        self._deadline_s = deadline_s
        self._tls.settimeout(seconds_until(deadline_s))
        self._tls.sendall(message)
        self._head_left = HEAD_LIMIT

    def head_is_over(self) -> None:
        self._head_left = None

    def is_valid_at(self, utc_s: int) -> bool:
        """Whether the server's certificate is valid then."""
        return utc_s in self._valid_s

    def is_clear(self) -> bool:
        """Whether nothing came beyond what was read."""
        return not self._received

    def is_idle(self) -> bool:
        """Whether the connection still stands with nothing in it, so that it can take a request."""
        try:
            self._tls.settimeout(0)
            self._tls.recv(1)
        except ssl.SSLWantReadError:
            return True
        except OSError:
            return False
        return False  # the server said goodbye, or something nobody asked for

    def makefile(self, _mode: str) -> _Stream:
        return self

    def flush(self) -> None: ...

    def close(self) -> None:
        """Called by http.client after each answer; the connection stays."""

    def readline(self, limit: int) -> bytes:
        if self._head_left is not None:
            limit = min(limit, self._head_left + 1)
        while (end := self._received.find(b"\n", 0, limit)) < 0 and len(self._received) < limit and self._receive():
            pass
        line = self._take(end + 1 if end >= 0 else limit)
        if self._head_left is not None:
            self._head_left -= len(line)
            if self._head_left < 0:
                raise Failed(NO_REPLY_TOO_LARGE, f"more than {HEAD_LIMIT} bytes of headers")
        return line

    def read(self, size: int) -> bytes:
        if size < 0:  # http.client takes the size of a chunk with any sign
            raise Failed(NO_REPLY_PROTOCOL, "a chunk of a negative size")
        while len(self._received) < size and self._receive():
            pass
        return self._take(size)

    def _take(self, size: int) -> bytes:
        taken = bytes(self._received[:size])
        del self._received[:size]
        return taken

    def _receive(self) -> bool:
        """Waits for more; False where the server ended the connection properly. A ragged end raises SSLEOFError."""
        self._tls.settimeout(seconds_until(self._deadline_s))
        received = self._tls.recv(_RECEIVE_SIZE)
        self._received += received
        self.answered = self.answered or bool(received)
        self.ended = not received
        return bool(received)


def _answer(stream: _Stream, method: str) -> tuple[Reply, bool]:
    """The next answer, and whether the connection can take another request."""
    while True:
        response = http.client.HTTPResponse(stream, method=method)  # type: ignore[arg-type]
        response.begin()
        if stream.ended:
            raise Failed(NO_REPLY_CLOSED, "the connection ended in the middle of the headers")
        if response.status >= 200:  # http.client passes over 100 by itself, but not over the other interim answers
            break
    stream.head_is_over()
    body = _body(response, stream)
    headers: dict[str, str] = {}
    for name, value in response.headers.items():
        unfolded = " ".join(value.split())
        known = headers.get(name.lower())
        headers[name.lower()] = unfolded if known is None else f"{known}, {unfolded}"
    date_s = _date_s(headers.get("date", ""))
    if date_s is not None and not stream.is_valid_at(date_s):
        date_s = None  # at that time it would not have been verified
    reply = Reply(response.status, headers, body, date_s)
    return reply, not response.will_close and stream.is_clear()


def _body(response: http.client.HTTPResponse, stream: _Stream) -> bytes:
    """The whole body, its framing checked by RFC 9112, section 6.3."""
    lengths = set(response.headers.get_all("content-length", []))
    codings = response.headers.get_all("transfer-encoding", [])
    if response.headers.defects:
        raise Failed(NO_REPLY_PROTOCOL, "a header is malformed")
    if codings and (not response.chunked or len(codings) > 1 or lengths):
        raise Failed(NO_REPLY_PROTOCOL, "a Transfer-Encoding other than chunked alone")
    if lengths and (len(lengths) > 1 or not all(_is_number(length) for length in lengths) or response.length is None):
        raise Failed(NO_REPLY_PROTOCOL, "a Content-Length that is not one number")
    if response.length is not None and response.length > BODY_LIMIT:
        raise Failed(NO_REPLY_TOO_LARGE, f"a body of {response.length} bytes, more than {BODY_LIMIT}")
    framed = response.chunked or response.length is not None
    body = response.read(BODY_LIMIT + 1)
    if len(body) > BODY_LIMIT:
        raise Failed(NO_REPLY_TOO_LARGE, f"a body of more than {BODY_LIMIT} bytes")
    if framed and stream.ended:
        raise Failed(NO_REPLY_CLOSED, "the connection ended in the middle of the body")
    return body


def _is_number(text: str) -> bool:
    text = text.strip()
    return text.isascii() and text.isdigit()


def _date_s(text: str) -> int | None:
    """A Date header (RFC 9110, 5.6.7) as UTC seconds; None for anything else."""
    try:
        moment = email.utils.parsedate_to_datetime(text)
        return int((moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)).timestamp())
    except (ValueError, TypeError, IndexError, OverflowError):
        return None
