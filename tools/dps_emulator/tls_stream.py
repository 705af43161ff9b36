"""The server's side of TLS on one connection: records in, plaintext out, and back; no socket.

asyncio's own keeps a quarter of a MiB for each connection, for as long as it lasts; here an idle one has no buffer.
Python's `ssl` refuses a client certificate in the handshake unless its issuer is known beforehand, and shows no chain
before Python 3.13: a server that wants to see them, and to refuse them by a sentence, speaks TLS through pyOpenSSL.
"""

import contextlib
import ssl
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import trustme

_READ_BYTES = 16 * 1024  # a TLS record holds no more
_FEED_BYTES = 32 * 1024  # at once: a memory BIO never gives back what it once had
_CHAINS_KEPT = 1000  # for connections that resume a session, in which a client shows no certificate again


class Stream(Protocol):
    """One connection; `is_open` after the handshake, `is_ended` when the peer has said goodbye."""

    is_open: bool
    is_ended: bool

    def feed(self, records: memoryview) -> bytes:
        """The plaintext of what the peer has sent; raises ssl.SSLError."""
        ...

    def write(self, plaintext: "bytes | bytearray") -> None:
        """Encrypts; `to_send` has the records. Raises ssl.SSLError."""

    def say_goodbye(self) -> None:
        """Ends this side's half, where there is one."""

    def to_send(self) -> bytes:
        """The records for the peer so far."""
        ...

    @property
    def server_name(self) -> str:
        """What the client's handshake has named, or empty."""
        ...

    @property
    def client_chain(self) -> tuple[bytes, ...]:
        """The certificates that the client has shown, its own first, in DER; nobody has checked them.

        Raises ssl.SSLError for one that can't be read.
        """
        ...


def streams(authority: "trustme.CA", names: Sequence[str], *, asks_clients: bool) -> Callable[[], Stream]:
    """Makes the streams of a server that has a certificate for `names` (DNS names and addresses); TLS 1.2 or newer.

    `asks_clients`: clients may show a certificate, whoever has issued it.
    """
    certificate = authority.issue_cert(*names)
    if asks_clients:
        asking = _AskingContext(certificate)
        return lambda: AskingStream(asking)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    certificate.configure_cert(context)
    named: weakref.WeakKeyDictionary[object, str] = weakref.WeakKeyDictionary()
    context.sni_callback = lambda connection, name, _: named.__setitem__(connection, name or "")
    return lambda: TlsStream(context, named)


class TlsStream:
    """A Stream for which the client shows no certificate."""

    __slots__ = ("_incoming", "_named", "_object", "_outgoing", "is_ended", "is_open")

    def __init__(self, context: ssl.SSLContext, named: "weakref.WeakKeyDictionary[object, str]") -> None:
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._object = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self._named = named
        self.is_open = False
        self.is_ended = False

    @property
    def server_name(self) -> str:
        """See Stream."""
        return self._named.get(self._object, "")

    @property
    def client_chain(self) -> tuple[bytes, ...]:
        """See Stream."""
        return ()

    def feed(self, records: memoryview) -> bytes:
        """See Stream."""
        plaintext = []
        for at in range(0, len(records), _FEED_BYTES):
            self._incoming.write(records[at : at + _FEED_BYTES])
            plaintext += self._read()
        return plaintext[0] if len(plaintext) == 1 else b"".join(plaintext)

    def _read(self) -> list[bytes]:
        pieces = []
        try:
            if not self.is_open:
                self._object.do_handshake()
                self.is_open = True
            while not self.is_ended and (self._incoming.pending or self._object.pending()):
                piece = self._object.read(_READ_BYTES)
                if piece:
                    pieces.append(piece)
                else:
                    self.is_ended = True
        except ssl.SSLWantReadError:
            pass  # a record, or the handshake, is not complete
        except ssl.SSLZeroReturnError:
            self.is_ended = True
        return pieces

    def write(self, plaintext: "bytes | bytearray") -> None:
        """See Stream."""
        self._object.write(plaintext)

    def say_goodbye(self) -> None:
        """See Stream."""
        if self.is_open:
            with contextlib.suppress(ssl.SSLError, ValueError):  # it waits for the peer's goodbye
                self._object.unwrap()

    def to_send(self) -> bytes:
        """See Stream."""
        return self._outgoing.read() if self._outgoing.pending else b""


class _AskingContext:
    """pyOpenSSL's context, and the chains of clients that may resume their sessions."""

    def __init__(self, certificate: "trustme.LeafCert") -> None:
        from OpenSSL import SSL

        self.context = context = SSL.Context(SSL.TLS_SERVER_METHOD)
        context.set_min_proto_version(SSL.TLS1_2_VERSION)
        context.set_options(SSL.OP_NO_COMPRESSION | SSL.OP_NO_RENEGOTIATION)
        context.set_mode(SSL.MODE_RELEASE_BUFFERS)
        context.set_session_id(b"dps-emulator")  # without it no session is resumed by a server that asks
        context.set_verify(SSL.VERIFY_PEER, lambda *_: True)  # who it is, and is trusted, is looked at afterwards
        with TemporaryDirectory() as folder:  # 0700; pyOpenSSL takes keys of `cryptography` or files
            path = Path(folder) / "server.pem"
            path.touch(0o600)
            path.write_bytes(certificate.private_key_and_cert_chain_pem.bytes())
            context.use_certificate_chain_file(str(path))
            context.use_privatekey_file(str(path))
        self.chains: OrderedDict[bytes, tuple[bytes, ...]] = OrderedDict()

    def whole(self, chain: tuple[bytes, ...]) -> tuple[bytes, ...]:
        """The chain as it came with the session's first handshake."""
        if len(chain) > 1:
            self.chains[chain[0]] = chain
            self.chains.move_to_end(chain[0])
            if len(self.chains) > _CHAINS_KEPT:
                self.chains.popitem(last=False)
        return self.chains.get(chain[0], chain) if chain else chain


class AskingStream:
    """A Stream for which the client may show a certificate."""

    __slots__ = ("_connection", "_context", "is_ended", "is_open")

    def __init__(self, context: _AskingContext) -> None:
        from OpenSSL import SSL

        self._context = context
        self._connection: SSL.Connection = SSL.Connection(context.context, None)
        self._connection.set_accept_state()
        self.is_open = False
        self.is_ended = False

    @property
    def server_name(self) -> str:
        """See Stream."""
        return (self._connection.get_servername() or b"").decode(errors="replace")

    @property
    def client_chain(self) -> tuple[bytes, ...]:
        """See Stream."""
        from cryptography.hazmat.primitives.serialization import Encoding
        from cryptography.x509 import InvalidVersion

        try:
            leaf = self._connection.get_peer_certificate(as_cryptography=True)
            if leaf is None:
                return ()
            sent = self._connection.get_peer_cert_chain(as_cryptography=True) or []
        except (ValueError, InvalidVersion):  # OpenSSL takes what `cryptography` does not
            raise ssl.SSLError("the client's certificate can't be read") from None
        ders = [certificate.public_bytes(Encoding.DER) for certificate in (leaf, *sent)]
        return self._context.whole((ders[0], *(der for der in ders[1:] if der != ders[0])))

    def feed(self, records: memoryview) -> bytes:
        """See Stream."""
        plaintext = []
        for at in range(0, len(records), _FEED_BYTES):
            piece = bytes(records[at : at + _FEED_BYTES])
            while piece:
                piece = piece[self._connection.bio_write(piece) :]
            plaintext += self._read()
        return b"".join(plaintext)

    def _read(self) -> list[bytes]:
        from OpenSSL import SSL

        pieces = []
        try:
            if not self.is_open:
                self._connection.do_handshake()
                self.is_open = True
            while not self.is_ended:
                pieces.append(self._connection.recv(_READ_BYTES))
        except SSL.WantReadError:
            pass  # a record, or the handshake, is not complete
        except SSL.ZeroReturnError:
            self.is_ended = True
        except SSL.Error as error:
            raise _as_ssl_error(error) from None
        return pieces

    def write(self, plaintext: "bytes | bytearray") -> None:
        """See Stream."""
        from OpenSSL import SSL

        try:
            self._connection.sendall(bytes(plaintext))
        except SSL.Error as error:
            raise _as_ssl_error(error) from None

    def say_goodbye(self) -> None:
        """See Stream."""
        from OpenSSL import SSL

        if self.is_open:
            with contextlib.suppress(SSL.Error):
                self._connection.shutdown()

    def to_send(self) -> bytes:
        """See Stream."""
        from OpenSSL import SSL

        records = b""
        with contextlib.suppress(SSL.WantReadError):
            while piece := self._connection.bio_read(_FEED_BYTES):
                records += piece
        return records


def _as_ssl_error(error: Exception) -> ssl.SSLError:
    """pyOpenSSL's error with the words of OpenSSL."""
    listed = error.args[0] if error.args and isinstance(error.args[0], list) else []
    return ssl.SSLError("; ".join(entry[-1] for entry in listed) or type(error).__name__)
