"""A host with several addresses, of which swtpm listens on one, on both runtimes."""

import socket

from dps_hal.errors import RetryLater
from dps_hal.platform import random_bytes
from dps_hal.tpm import tcp
from dps_hal.tpm.tcp import SwtpmTransport
from support.claims import assert_refused

COMMAND = b"\x80\x01\x00\x00\x00\x0a\x00\x00\x01\x7b"
HOST = "127.0.0.1"


class SeveralAddresses:
    """The module `socket`, but for what a name's addresses are."""

    def __init__(self, ports: "list[int]") -> None:
        self.SOCK_STREAM = socket.SOCK_STREAM
        self.socket = socket.socket
        self._ports = ports

    def getaddrinfo(self, host: bytes, port: int, family: int, kind: int) -> "list[tuple[object, ...]]":
        return [socket.getaddrinfo(HOST, port, family, kind)[0] for port in self._ports]


def listener() -> "tuple[socket.socket, int]":
    """A socket that takes connections, and its port."""
    for _ in range(50):
        port = 20000 + int.from_bytes(random_bytes(2), "big") % 40000
        new = socket.socket()
        try:
            new.bind(socket.getaddrinfo(HOST, port)[0][-1])
            new.listen(1)
            return new, port
        except OSError:
            new.close()
    raise OSError("no free port in 50 tries")


def closed_port() -> int:
    new, port = listener()
    new.close()
    return port


def asks_with(addresses: SeveralAddresses, transport: SwtpmTransport) -> bytes:
    real = tcp.socket
    tcp.socket = addresses  # type: ignore[assignment]
    try:
        return transport.send(COMMAND, 0.3, None)
    finally:
        tcp.socket = real


def test_the_address_that_takes_a_connection_is_found() -> None:
    swtpm, port = listener()
    closed = closed_port()
    for ports in ([port], [closed, port], [closed, closed, port]):
        transport = SwtpmTransport("a-name", port)
        assert_refused(
            lambda ports=ports, transport=transport: asks_with(SeveralAddresses(ports), transport),  # type: ignore[misc]
            RetryLater,
            "tpm.timeout",  # connected; nobody answers the command
            "ports=" + str(ports),
        )
        transport.close()
        swtpm.accept()[0].close()
    swtpm.close()


def test_a_host_none_of_whose_addresses_takes_one_is_absent() -> None:
    for ports in ([], [closed_port()], [closed_port(), closed_port()]):
        transport = SwtpmTransport("a-name", 1)
        assert_refused(
            lambda ports=ports, transport=transport: asks_with(SeveralAddresses(ports), transport),  # type: ignore[misc]
            RetryLater,
            "tpm.absent",
            "ports=" + str(ports),
        )
