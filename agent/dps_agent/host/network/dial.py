"""TLS to a named peer, verified, with every wait bounded and to be ended by another thread.

One thread calls `begin`, `dial`, `let_go` and `close` of a Dialler; any thread may call `abort`.
"""

from __future__ import annotations

import contextlib
import queue
import socket
import ssl
import threading

from dps_agent.effects import (
    NO_REPLY_CLOSED,
    NO_REPLY_CONNECT,
    NO_REPLY_DNS,
    NO_REPLY_NOT_FOUND,
    NO_REPLY_NOT_TLS,
    NO_REPLY_TIMEOUT,
    NO_REPLY_TLS,
    NO_REPLY_TLS_CLIENT,
    NO_REPLY_TLS_FAILED,
    NO_REPLY_TLS_VERSION,
    Failed,
)
from dps_agent.host.network.heads import seconds_until
from dps_agent.host.network.trust import Trust
from dps_hal.errors import AskOperator, DpsError
from dps_text.addresses import is_plain_host

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, TypeAlias

    from dps_agent.host.network.proxy import ProxyRule
    from dps_agent.host.network.shown import Shown

    _Lookup: TypeAlias = "list[tuple[Any, ...]] | OSError | None"  # getaddrinfo's answer, its error, None: abort()


MQTT_PORT = 8883  # every hub's
LOOKUPS_LIMIT = 4  # names that are being looked up at a time: a resolver that hangs has a thread for each
_RESOLVER = "dps-resolver"

# How OpenSSL's name for a failure without a verdict on a certificate ends, the reason, and what it says of the peer.
# Alerts: RFC 8446, 6.2. A peer that dislikes the certificate of a device that shows none wants one.
_WITHOUT_VERDICT = (
    ("WRONG_VERSION_NUMBER", NO_REPLY_NOT_TLS, "what answers there does not speak TLS"),
    ("PACKET_LENGTH_TOO_LONG", NO_REPLY_NOT_TLS, "what answers there does not speak TLS"),  # the same by OpenSSL 3.2
    ("ALERT_PROTOCOL_VERSION", NO_REPLY_TLS_VERSION, "what answers there speaks no TLS 1.2 or newer"),
    ("UNSUPPORTED_PROTOCOL", NO_REPLY_TLS_VERSION, "what answers there speaks no TLS 1.2 or newer"),
    ("ALERT_CERTIFICATE_REQUIRED", NO_REPLY_TLS_CLIENT, "what answers there wants a certificate from this device"),
    ("ALERT_BAD_CERTIFICATE", NO_REPLY_TLS_CLIENT, "what answers there wants a certificate from this device"),
    (
        "ALERT_HANDSHAKE_FAILURE",
        NO_REPLY_TLS_FAILED,
        "what answers there has no cipher, curve or signature in common with this device, or wants its certificate",
    ),
    ("ALERT_INSUFFICIENT_SECURITY", NO_REPLY_TLS_FAILED, "what answers there takes none of this device's ciphers"),
    ("UNRECOGNIZED_NAME", NO_REPLY_TLS_FAILED, "what answers there does not answer for this name"),
)
# How the alerts end by which a peer says what is wrong with the certificate that it was shown; the same source.
_OF_OUR_CERTIFICATE = (
    "ALERT_BAD_CERTIFICATE",
    "ALERT_UNSUPPORTED_CERTIFICATE",
    "ALERT_CERTIFICATE_REVOKED",
    "ALERT_CERTIFICATE_EXPIRED",
    "ALERT_CERTIFICATE_UNKNOWN",
    "ALERT_UNKNOWN_CA",
    "ALERT_ACCESS_DENIED",
)
_OF_OUR_SIGNATURE = "evp lib"  # how OpenSSL calls a key that does not sign


class Dialler:
    """Opens one TLS connection after the other, and can give up the one that is opened last.

    `ca_file` holds the only roots to trust, in PEM; empty: the system's. `setting` is what the operator calls it:
    AskOperator `config.invalid` where it makes no sense. `certificate`, `asked_later`: see `Trust`. A key of a TPM's
    that a connection was lent for its handshake is taken back behind it, or where a peer may ask later by `take_back`;
    it is borrowed before the peer is reached, so no peer has a connection for each try of a device whose TPM is ill.
    """

    def __init__(
        self,
        proxies: ProxyRule,
        ca_file: str,
        setting: str = "ca_file",
        certificate: Shown | None = None,
        asked_later: bool = False,
    ) -> None:
        self._proxies = proxies
        self._asked_later = asked_later
        self.trust = Trust(ca_file, setting, certificate, asked_later)
        if ca_file:
            self.trust.context()  # a wrong file is the operator's to correct: say so at once
        self._lock = threading.Lock()  # over the three below, which `abort` reaches from another thread
        self._socket: socket.socket | None = None
        self._looking_up: queue.SimpleQueue[_Lookup] | None = None
        self.aborted = False  # `abort` was called since `begin`

    def begin(self) -> None:
        """From now on an `abort` counts; one that came before is forgotten."""
        self.aborted = False

    def dial(
        self, name: str, host: str, port: int, deadline_s: float, reach_by_s: float | None = None, afresh: bool = False
    ) -> ssl.SSLSocket:
        """A TLS connection to `host`, through its proxy if it has one, whose certificate is for `name`.

        Both times are of the monotonic clock, `reach_by_s` for what comes before TLS. `afresh`: the peer has to show
        its certificate, so no session is resumed. Raises Failed: `connect` where no TCP connection stood, `tls` where
        the peer was not verified, a code such as `tpm.memory` where there is no key for the handshake now; AskOperator
        where somebody has to change that, RetryLater `tpm.absent` where this process has lost the TPM that has it.
        """
        reach_by_s = deadline_s if reach_by_s is None else min(reach_by_s, deadline_s)
        while True:
            try:
                context = self.trust.context()
            except AskOperator as error:
                raise Failed(NO_REPLY_TLS, error.message) from None
            session = None
            try:
                self.trust.borrow()
            except DpsError as error:
                if isinstance(error, AskOperator) or self.trust.has_lost_tpm(error):
                    raise
                raise Failed(error.code, error.message) from None
            try:
                raw = self.reach(host, port, reach_by_s)
                session = None if afresh else self.trust.session(name)
                return self._shake_hands(context, session, name, raw, deadline_s)
            except (OSError, Failed) as error:
                failed = self.explain(error, "in the TLS handshake")
                self.close()
                # What a peer does not resume it may begin; and no refusal counts before all roots were asked.
                if session is None and not (failed.reason == NO_REPLY_TLS and self.trust.look_further()):
                    raise failed from None
            reach_by_s = deadline_s  # it was reached

    def _shake_hands(
        self, context: ssl.SSLContext, session: ssl.SSLSession | None, name: str, raw: socket.socket, deadline_s: float
    ) -> ssl.SSLSocket:
        with self._lock:
            self._refuse_if_aborted()
            self._socket = tls = context.wrap_socket(
                raw,
                server_hostname=_without_codec(name),
                session=session,
                do_handshake_on_connect=False,
                suppress_ragged_eofs=False,
            )
        self.trust.lend(tls)
        tls.settimeout(seconds_until(deadline_s))
        tls.do_handshake()
        if not self._asked_later:
            self.trust.take_back()
        return tls

    def explain(self, error: Exception, where: str) -> Failed:
        """An error of the connection that was dialled last as Failed; `where` completes "the connection ended …"."""
        if self.aborted:
            return Failed(NO_REPLY_CLOSED, "given up")
        if isinstance(error, Failed):
            return error
        if isinstance(error, TimeoutError):
            return Failed(NO_REPLY_TIMEOUT, f"nothing came in time {where}")
        if _is_end(error) and isinstance(self._socket, ssl.SSLSocket):
            error = _last_words(self._socket) or error
        if isinstance(error, ssl.SSLCertVerificationError):
            return Failed(NO_REPLY_TLS, error.verify_message)
        if isinstance(error, ssl.SSLError) and not _is_end(error):
            if self.trust.asks_tpm and _OF_OUR_SIGNATURE in str(error).lower().replace("_", " "):
                return Failed("tpm.failed", "the TPM did not sign the TLS handshake, for a reason that Python drops")
            return _without_verdict(error, self.trust.shows_certificate)
        return Failed(NO_REPLY_CLOSED, f"the connection ended {where}")

    def abort(self) -> None:
        """Ends what the other thread waits for on the connection that was dialled last, or is being dialled."""
        with self._lock:
            self.aborted = True
            if self._looking_up is not None:
                self._looking_up.put(None)
            if self._socket is not None:
                with contextlib.suppress(OSError):  # it is not connected, or not any more
                    # The socket below TLS: SSLSocket.shutdown would drop the TLS state that the blocked thread uses.
                    socket.socket.shutdown(self._socket, socket.SHUT_RDWR)

    def let_go(self) -> None:
        """The connection is its user's alone now: `abort` and `close` leave it alone."""
        with self._lock:
            self._socket = None

    def close(self) -> None:
        """Ends the connection that was dialled last, if there is one."""
        self.trust.take_back()  # not under the lock, for which `abort` waits: it takes as long as the TPM does
        with self._lock:
            closing, self._socket = self._socket, None
            if isinstance(closing, ssl.SSLSocket):
                say_goodbye(closing)
            if closing is not None:
                closing.close()

    def reach(self, host: str, port: int, deadline_s: float) -> socket.socket:
        """A TCP connection that leads to `host`."""
        proxy = self._proxies.proxy_for(host, port)
        if proxy is None:
            return self._connect(self.addresses(host, port, deadline_s), deadline_s)
        try:
            there = self.addresses(proxy.host, proxy.port, deadline_s)
            raw = self._connect(there, deadline_s)
            if not proxy.open_tunnel(raw, host, port, deadline_s):
                self.close()
                raw = self._connect(there, deadline_s)
                proxy.open_tunnel(raw, host, port, deadline_s, with_credentials=True)
        except TimeoutError:
            raise Failed(NO_REPLY_CONNECT, f"the proxy {proxy} did not answer in time") from None
        except OSError:
            raise Failed(NO_REPLY_CONNECT, f"the proxy {proxy} ended the connection") from None
        except Failed as failed:
            if failed.reason not in (NO_REPLY_DNS, NO_REPLY_NOT_FOUND):
                raise
            raise Failed(NO_REPLY_CONNECT, f"the proxy {failed}") from None  # nothing is known of the peer's name
        return raw

    def addresses(self, host: str, port: int, deadline_s: float) -> list[tuple[Any, ...]]:
        """What the resolver says; asked on a thread of its own, because getaddrinfo can be neither timed nor ended.

        1. The addresses. 2. None of them in time, and what comes later is not read: Failed. 3. `abort` was called:
        Failed. 4. The resolver's error: Failed. 5. So many earlier questions hang that no more are asked: Failed.
        """
        if sum(thread.name == _RESOLVER for thread in threading.enumerate()) >= LOOKUPS_LIMIT:
            raise Failed(
                NO_REPLY_DNS, f"'{host}': the resolver has not answered the last {LOOKUPS_LIMIT} questions yet"
            )
        found: queue.SimpleQueue[_Lookup] = queue.SimpleQueue()
        with self._lock:
            self._refuse_if_aborted()
            self._looking_up = found
        try:
            threading.Thread(target=_look_up, args=(host, port, found), name=_RESOLVER, daemon=True).start()
            addresses = found.get(timeout=seconds_until(deadline_s))
        except queue.Empty:
            raise Failed(NO_REPLY_DNS, f"'{host}': the resolver gave no answer in time") from None
        except RuntimeError:
            raise Failed(NO_REPLY_DNS, f"'{host}': the system has no room for another thread") from None
        finally:
            with self._lock:
                self._looking_up = None
        if addresses is None:
            raise Failed(NO_REPLY_CLOSED, "given up")
        if isinstance(addresses, OSError):
            raise Failed(_lookup_reason(addresses), f"'{host}': {addresses.strerror}")
        return addresses

    def _connect(self, addresses: list[tuple[Any, ...]], deadline_s: float) -> socket.socket:
        """A TCP connection to the first address that takes it; each has its share of the time that is left."""
        failure = ""
        for tried, (family, kind, protocol, _, address) in enumerate(addresses):
            raw = socket.socket(family, kind, protocol)
            with self._lock:
                self._socket = raw
                self._refuse_if_aborted()
            try:
                raw.settimeout(seconds_until(deadline_s) / (len(addresses) - tried))
                raw.connect(address)
                raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            except OSError as error:
                self.close()
                failure = f"{address[0]} port {address[1]}: {error.strerror or error}"
            else:
                return raw
        self._refuse_if_aborted()
        raise Failed(NO_REPLY_CONNECT, failure)

    def _refuse_if_aborted(self) -> None:
        if self.aborted:
            raise Failed(NO_REPLY_CLOSED, "given up")


def broken(error: OSError) -> Failed:
    """Why a connection failed that stood: in TLS 1.3 a peer refuses a certificate behind the handshake."""
    name = (error.reason or "") if isinstance(error, ssl.SSLError) else ""
    return _not_taken(name) if name.endswith(_OF_OUR_CERTIFICATE) else Failed(NO_REPLY_CLOSED, "the connection broke")


def _not_taken(name: str) -> Failed:
    why = name.partition("ALERT_")[2].lower().replace("_", " ")
    return Failed(NO_REPLY_TLS_CLIENT, f"what answers there does not take this device's certificate: {why}")


def say_goodbye(tls: ssl.SSLSocket) -> None:
    """Sends close_notify where that takes no time, and waits for no answer."""
    with contextlib.suppress(OSError, ValueError):  # there was no handshake, or the connection is broken
        tls.settimeout(0)
        tls.unwrap()


def _without_verdict(error: ssl.SSLError, shows_certificate: bool) -> Failed:
    """What a failure of TLS means that is no verdict on a certificate of the peer's."""
    name = error.reason or ""
    if shows_certificate and name.endswith(_OF_OUR_CERTIFICATE):
        return _not_taken(name)
    for ending, reason, words in _WITHOUT_VERDICT:
        if name.endswith(ending):
            return Failed(reason, words)
    # Python has no name for each reason of OpenSSL's: "[SSL] legacy sigalg disallowed or unsupported (_ssl.c:992)".
    text = name.lower().replace("_", " ") or str(error).partition("] ")[2].partition(" (_ssl")[0]
    return Failed(NO_REPLY_TLS_FAILED, f"TLS failed: {text or 'no reason is known'}")


def _last_words(tls: ssl.SSLSocket) -> ssl.SSLError | None:
    """The alert that a peer sent before it ended the connection: in TLS 1.3 it may refuse us after the handshake."""
    try:
        tls.settimeout(0)
        tls.recv(1)
    except ssl.SSLError as error:
        return None if isinstance(error, ssl.SSLWantReadError) else error
    except (OSError, ValueError):
        return None
    return None


def _is_end(error: Exception) -> bool:
    """Whether the connection ended, with close_notify or without; Python 3.11.2 has no class for the latter."""
    ends = (ConnectionError, ssl.SSLEOFError, ssl.SSLZeroReturnError)
    return isinstance(error, ends) or getattr(error, "reason", "") == "UNEXPECTED_EOF_WHILE_READING"


def _lookup_reason(error: OSError) -> str:
    """`not_found` only where the name service said that there is no such name; it was not reached, or failed, else."""
    nothing = (socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME))
    return NO_REPLY_NOT_FOUND if isinstance(error, socket.gaierror) and error.errno in nothing else NO_REPLY_DNS


def _without_codec(host: str) -> str | bytes:
    """A name as resolver and TLS take it: for a text they would load the IDNA codec, which would leave it as it is."""
    return host.encode() if is_plain_host(host) else host


def _look_up(host: str, port: int, found: queue.SimpleQueue[_Lookup]) -> None:
    """The thread `dps-resolver`: started for each name by `Dialler.addresses`, ends when getaddrinfo does.

    One that nobody waits for any more ends likewise, or with the process.
    """
    try:
        found.put(socket.getaddrinfo(_without_codec(host), port, type=socket.SOCK_STREAM))
    except OSError as error:
        found.put(error)
    except UnicodeError:  # a name that DNS cannot have
        found.put(OSError(0, "no host name"))
