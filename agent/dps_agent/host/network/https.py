"""HTTPS to one endpoint over one kept connection, with every wait and every size bounded.

What the answers are `dps_agent.http1` reads; here are connection and time. Sources: RFC 9110, RFC 9112.
"""

from __future__ import annotations

import ssl
import time

from dps_agent.effects import NO_REPLY_CLOSED, Failed, NoReply, Reply
from dps_agent.host.network.dial import Dialler
from dps_agent.host.network.heads import seconds_until
from dps_agent.host.network.proxy import NONE, ProxyRule
from dps_agent.host.network.trust import validity_s
from dps_agent.http1 import Reader
from dps_hal.errors import AskOperator
from dps_text.addresses import host_and_port

TYPE_CHECKING = False
if TYPE_CHECKING:
    from dps_agent.host.network.shown import Shown
    from dps_agent.sas import SasToken

BODY_LIMIT = 64 * 1024  # bytes of an answer's body
_HTTPS_PORT = 443
_RECEIVE_SIZE = 16 * 1024  # bytes; the largest TLS record


def peer_of(text: str, setting: str) -> tuple[str, int | None]:
    """Host and port of a peer; AskOperator `config.invalid` names `setting` where they are none."""
    try:
        return host_and_port(text)
    except ValueError:
        wanted = f"{setting}: expected a host name with or without :port, got '{text}'"
        raise AskOperator("config.invalid", wanted) from None


class DpsConnection:
    """One connection to a DPS endpoint, opened when needed, kept between requests, reopened where the server closed it.

    `endpoint` is "https://name[:port]". `connect_to`, "host:port", is dialled instead; the name that is sent and that
    the certificate must carry stays the endpoint's. `ca_file` holds the only roots to trust, in PEM; empty: the
    system's. `timeout_s` bounds one request in all, connecting and any repetition included. `proxy` is the setting
    `network.proxy`. `certificate` is what the device shows whoever asks for one, be it in the first handshake, by
    renegotiation (TLS 1.2) or after it (1.3), up to the first answer where a TPM has the key: see `Trust`.

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
        certificate: Shown | None = None,
    ) -> None:
        scheme, _, authority = endpoint.partition("://")
        self._authority = authority.removesuffix("/")
        if scheme.lower() != "https":
            raise AskOperator("config.invalid", f"endpoint: expected \"https://name\", got '{endpoint}'")
        self._host, port = peer_of(self._authority, "endpoint")
        self._dial_host, self._dial_port = self._host, port or _HTTPS_PORT
        if connect_to:
            self._dial_host, dial_port = peer_of(connect_to, "connect_to")
            self._dial_port = dial_port or self._dial_port
        self._dialler = Dialler(ProxyRule(proxy), ca_file, certificate=certificate, asked_later=True)
        self.trust = self._dialler.trust
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
                reply, keep = stream.answer(deadline_s)
            except (OSError, Failed) as error:
                failed = self._dialler.explain(error, "before the answer was whole")
                unanswered = self._stream is not None and not self._stream.answered
                self.close()
                # A server may close an idle connection while our request is on its way. Every request of this API
                # may be repeated: registering again with the same body and token asks for the same thing.
                if reused and unanswered and failed.reason == NO_REPLY_CLOSED:
                    continue
                return NoReply(f"{failed.reason}: {failed}", sent)
            if not reused:
                self.trust.keep(stream.tls)
                self.trust.take_back()
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
            "Accept-Encoding: identity",
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


class _Stream:
    """A TLS connection on which one answer after the other is read."""

    def __init__(self, tls: ssl.SSLSocket) -> None:
        self.tls = tls
        self._valid_s = validity_s(tls)
        self._reader = Reader(BODY_LIMIT, end_counts=True)  # a cut is an SSLEOFError
        self.answered = False  # a byte came since the last request

    def send(self, message: bytes, deadline_s: float) -> None:
        self.answered = False
        self.tls.settimeout(seconds_until(deadline_s))
        self.tls.sendall(message)

    def answer(self, deadline_s: float) -> tuple[Reply, bool]:
        """The next answer, and whether the connection can take another request."""
        reading = self._reader.answer()
        try:
            next(reading)
            while True:
                self.tls.settimeout(seconds_until(deadline_s))
                received = self.tls.recv(_RECEIVE_SIZE)
                self.answered = self.answered or bool(received)
                reading.send(received)
        except StopIteration as read:
            reply, keep = read.value
        date_s = reply.date_s
        if date_s is not None and date_s not in self._valid_s:
            date_s = None  # at that time the server would not have been verified
        return reply._replace(body=bytes(reply.body), date_s=date_s), keep

    def is_idle(self) -> bool:
        """Whether the connection still stands with nothing in it, so that it can take a request."""
        try:
            self.tls.settimeout(0)
            self.tls.recv(1)
        except ssl.SSLWantReadError:
            return True
        except OSError:
            return False
        return False  # the server said goodbye, or something nobody asked for
