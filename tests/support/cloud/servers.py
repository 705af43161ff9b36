"""HTTPS servers on loopback that behave as a test tells them, mostly badly."""

from __future__ import annotations

import base64
import contextlib
import datetime
import select
import socket
import ssl
import struct
import threading
import warnings
from typing import TYPE_CHECKING

import trustme

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from types import TracebackType

ENDPOINT_NAME = "dps.example"
LOOPBACK = "127.0.0.1"
_PATIENCE_S = 60.0  # no server waits longer for its client


class Certificates:
    """A certificate authority and the TLS contexts of servers that it vouches for, or not."""

    def __init__(self, folder: Path) -> None:
        self._authority = trustme.CA()
        self._folder = folder
        self.ca_file = str(folder / "ca.pem")
        self._authority.cert_pem.write_to_path(self.ca_file)

    def good(self) -> ssl.SSLContext:
        return self._serving(self._authority.issue_cert(ENDPOINT_NAME))

    def of_another_name(self) -> ssl.SSLContext:
        return self._serving(self._authority.issue_cert("other.example"))

    def of_another_authority(self) -> ssl.SSLContext:
        return self._serving(trustme.CA().issue_cert(ENDPOINT_NAME))

    def expired(self) -> ssl.SSLContext:
        yesterday = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1)
        return self._serving(self._authority.issue_cert(ENDPOINT_NAME, not_after=yesterday))

    def self_signed(self) -> ssl.SSLContext:
        alone = trustme.CA()
        chain = self._folder / "self-signed.pem"
        chain.write_bytes(alone.private_key_pem.bytes() + alone.cert_pem.bytes())
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(chain)
        return context

    def of_tls_1_1(self) -> ssl.SSLContext:
        context = self.good()
        context.set_ciphers("ALL:@SECLEVEL=0")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # the version is old: that is the point
            context.minimum_version = ssl.TLSVersion.TLSv1_1
            context.maximum_version = ssl.TLSVersion.TLSv1_1
        return context

    def _serving(self, certificate: trustme.LeafCert) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        certificate.configure_cert(context)
        return context


class Peer:
    """The server's end of one connection."""

    def __init__(self, connection: socket.socket, server: Server) -> None:
        self._connection = connection
        self._server = server
        self._received = b""

    def handshake(self, context: ssl.SSLContext) -> None:
        with self._server.changing:
            self._connection = context.wrap_socket(
                self._connection, server_side=True, do_handshake_on_connect=False, suppress_ragged_eofs=False
            )
        assert isinstance(self._connection, ssl.SSLSocket)
        self._connection.do_handshake()
        self._server.handshakes += 1

    def request(self) -> bytes:
        """The next request, head and body; ConnectionError where the client has gone."""
        while b"\r\n\r\n" not in self._received:
            self._receive()
        head, _, rest = self._received.partition(b"\r\n\r\n")
        length = 0
        for line in head.split(b"\r\n")[1:]:
            name, _, value = line.partition(b":")
            if name.lower() == b"content-length":
                length = int(value)
        while len(rest) < length:
            self._receive()
            rest = self._received.partition(b"\r\n\r\n")[2]
        self._received = rest[length:]
        request = head + b"\r\n\r\n" + rest[:length]
        self._server.requests.append(request)
        return request

    def receive(self) -> bytes:
        """What comes next; ConnectionError where the client has gone."""
        self._receive()
        received, self._received = self._received, b""
        return received

    def pump(self, target: socket.socket) -> None:
        """Carries bytes between the client and `target` until one of them ends."""
        target.sendall(self._received)
        ends = {self._connection: target, target: self._connection}
        while True:
            readable, _, _ = select.select(list(ends), [], [], _PATIENCE_S)
            for end in readable:
                piece = end.recv(65536)
                if not piece:
                    return
                ends[end].sendall(piece)

    def reset(self) -> None:
        """Ends the connection with RST, as a broken middlebox does."""
        self._connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._connection.close()

    def send(self, answer: bytes) -> None:
        self._connection.sendall(answer)

    def say_goodbye(self) -> None:
        """Ends the connection as TLS wants it, with close_notify."""
        assert isinstance(self._connection, ssl.SSLSocket)
        self._connection = self._connection.unwrap()

    def cut(self) -> None:
        """Ends TCP under TLS, as a broken network or an attacker does."""
        socket.socket.shutdown(self._connection, socket.SHUT_RDWR)

    def wait_until_gone(self) -> None:
        """Says nothing until the client gives up."""
        while True:
            self._receive()

    def drip(self, answer: bytes, every_s: float) -> None:
        """Sends a byte at a time until the client gives up."""
        for i in range(len(answer)):
            self.send(answer[i : i + 1])
            self._server.ending.wait(every_s)

    def _receive(self) -> None:
        received = self._connection.recv(65536)
        if not received:
            raise ConnectionError("the client has gone")
        self._received += received

    def drop(self) -> None:
        self._connection.close()

    def interrupt(self) -> None:
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self._connection, socket.SHUT_RDWR)


class Server:
    """Listens on a free port of loopback and lets `behave` deal with each connection, on a thread of its own.

    With `context` each connection begins with a TLS handshake. It ends with the `with` block, and so do its threads;
    what `behave` raises, other than OSError, is raised there.
    """

    def __init__(self, behave: Callable[[Peer], None], context: ssl.SSLContext | None) -> None:
        self._behave = behave
        self._context = context
        self._listener = socket.create_server((LOOPBACK, 0))
        self._threads: list[threading.Thread] = []
        self._peers: list[Peer] = []
        self._failures: list[Exception] = []
        self.port: int = self._listener.getsockname()[1]
        self.connections = 0
        self.handshakes = 0
        self.requests: list[bytes] = []
        self.ending = threading.Event()
        self.changing = threading.Lock()

    @property
    def address(self) -> str:
        """ "host:port", as `connect_to` takes it."""
        return f"{LOOPBACK}:{self.port}"

    def __enter__(self) -> Server:
        self._start(self._accept)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.ending.set()
        self.stop_listening()
        for peer in self._peers:
            with self.changing:
                peer.interrupt()
        for thread in self._threads:
            thread.join(_PATIENCE_S)
            assert not thread.is_alive(), "the server's behaviour does not end with its client"
        if self._failures and kind is None:
            raise self._failures[0]

    def stop_listening(self) -> None:
        """Refuses further connections; those that stand stay."""
        with contextlib.suppress(OSError):  # done before
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _start(self, target: Callable[[], None]) -> None:
        thread = threading.Thread(target=target, name="test-server")
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while not self.ending.is_set():
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            connection.settimeout(_PATIENCE_S)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.connections += 1
            peer = Peer(connection, self)
            self._peers.append(peer)
            self._start(lambda peer=peer: self._deal_with(peer))  # type: ignore[misc]

    def _deal_with(self, peer: Peer) -> None:
        try:
            if self._context is not None:
                peer.handshake(self._context)
            self._behave(peer)
        except OSError:  # the client went away, which is how most of these end
            pass
        except Exception as error:
            self._failures.append(error)
        finally:
            with self.changing:
                peer.drop()


def answer(body: bytes, status: str = "200 OK", headers: str = "") -> bytes:
    """A well-formed HTTP answer; `headers` are further lines, each ended by CR LF."""
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n{headers}\r\n".encode() + body


def answering(*answers: bytes) -> Callable[[Peer], None]:
    """A behaviour: one of `answers` for each request of a connection, the last one for all that follow."""

    def behave(peer: Peer) -> None:
        for number in range(1_000):
            peer.request()
            peer.send(answers[min(number, len(answers) - 1)])

    return behave


def proxying(credentials: str = "") -> Callable[[Peer], None]:
    """The behaviour of an HTTP proxy that takes CONNECT; `credentials` are "user:password", empty: none are wanted."""

    def behave(peer: Peer) -> None:
        head = peer.request().decode()
        method, target, _ = head.split("\r\n")[0].split(" ")
        assert method == "CONNECT"
        wanted = "Proxy-Authorization: Basic " + base64.b64encode(credentials.encode()).decode()
        if credentials and wanted not in head.split("\r\n"):
            peer.send(answer(b"no", "407 Proxy Authentication Required", 'Proxy-Authenticate: Basic realm="x"\r\n'))
            return
        host, _, port = target.rpartition(":")
        try:
            onward = socket.create_connection((host.strip("[]"), int(port)), _PATIENCE_S)
        except OSError:
            peer.send(answer(b"", "502 Bad Gateway"))
            return
        with onward:
            peer.send(b"HTTP/1.1 200 Connection established\r\n\r\n")
            peer.pump(onward)

    return behave
