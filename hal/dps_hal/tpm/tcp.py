"""A TPM behind a TCP socket, as swtpm serves it: raw commands and responses, one client at a time."""

import select
import socket

from dps_hal.errors import RetryLater
from dps_hal.platform import ms_since, ticks_ms

TYPE_CHECKING = False
if TYPE_CHECKING:
    from dps_hal.contracts import WhileWaiting

_MAX_RESPONSE_BYTES = 4096
_CONNECT_LIMIT_S = 1.0  # each address; the peer's kernel makes a connection, a TPM's slowness does not count here


class SwtpmTransport:
    """One connection to swtpm's data port; it is made by the first command."""

    def __init__(self, host: str, port: int) -> None:
        self._host = host
        self._port = port
        self._socket: socket.socket | None = None

    def send(self, command: bytes, limit_s: float, while_waiting: "WhileWaiting | None") -> bytes:
        """As `Transport.send`."""
        limit_ms = int(limit_s * 1000)
        started_ms = ticks_ms()
        connection = self._socket or self._connect(limit_ms, while_waiting)
        poller = select.poll()
        poller.register(connection, select.POLLOUT)
        sent = 0
        while sent < len(command):
            self._wait(poller, limit_ms - ms_since(started_ms), while_waiting)
            sent += connection.send(command[sent:])
        poller.modify(connection, select.POLLIN)
        response = b""
        wanted = 10
        while len(response) < wanted:
            self._wait(poller, limit_ms - ms_since(started_ms), while_waiting)
            piece = connection.recv(wanted - len(response))
            if not piece:
                raise OSError("the TPM closed the connection")
            response += piece
            if len(response) == 10:
                wanted = int.from_bytes(response[2:6], "big")
                if wanted > _MAX_RESPONSE_BYTES:
                    break  # no TPM gives such a size; the caller refuses it
        return response

    def close(self) -> None:
        """As `Transport.close`."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _connect(self, limit_ms: int, while_waiting: "WhileWaiting | None") -> socket.socket:
        """A connection to the first of the host's addresses that takes one: swtpm listens on one of them alone."""
        started_ms = ticks_ms()
        try:
            # As bytes, which is how tpm2-tss takes it too: for a text CPython loads the IDNA codec.
            found = socket.getaddrinfo(self._host.encode(), self._port, 0, socket.SOCK_STREAM)
        except OSError as error:
            raise RetryLater("tpm.absent", f"no TPM answers at {self._host}:{self._port}: {error}")
        failures: list[str] = []
        for family, kind, protocol, _, address in found:
            if failures and while_waiting is not None:
                while_waiting()
            connection = None
            try:
                connection = socket.socket(family, kind, protocol)
                connection.settimeout(_CONNECT_LIMIT_S)
                connection.connect(address)
                connection.setblocking(False)
            except OSError as error:
                failures.append(str(error))
                if connection is not None:
                    connection.close()
            else:
                self._socket = connection
                return connection
            if ms_since(started_ms) > limit_ms:
                break
        reasons = "; ".join(failures) or "its name has no address"
        raise RetryLater("tpm.absent", f"no TPM answers at {self._host}:{self._port}: {reasons}")

    def _wait(self, poller: select.poll, left_ms: int, while_waiting: "WhileWaiting | None") -> None:
        """Until the socket is ready; RetryLater `tpm.timeout` after `left_ms`."""
        until_ms = left_ms
        started_ms = ticks_ms()
        while until_ms > 0:
            if poller.poll(min(until_ms, 1000)):
                return
            if while_waiting is not None:
                while_waiting()
            until_ms = left_ms - ms_since(started_ms)
        raise RetryLater("tpm.timeout", f"the TPM at {self._host}:{self._port} did not answer in time")
