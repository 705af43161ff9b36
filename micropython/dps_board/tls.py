"""A TLS connection on asyncio, with every wait bounded: what HTTPS and MQTT have in common.

The socket never blocks and is asked every POLL_S; what does block is the resolver and the arithmetic of a TLS
handshake. mbedTLS verifies certificates under the board's clock, so that has to be set first. Runs on CPython too.
"""

import asyncio
import select
import socket

try:  # MicroPython's own module: `ssl` is a layer around it, which takes a KiB and is not everywhere
    ssl = __import__("tls")
except ImportError:
    import ssl

from dps_agent.effects import (
    NO_REPLY_CLOSED,
    NO_REPLY_CONNECT,
    NO_REPLY_DNS,
    NO_REPLY_MEMORY,
    NO_REPLY_NOT_FOUND,
    NO_REPLY_NOT_TLS,
    NO_REPLY_TIMEOUT,
    NO_REPLY_TLS,
    NO_REPLY_TLS_FAILED,
    NO_REPLY_TLS_VERSION,
    Failed,
)
from dps_board.memory import free_block, has_room, hold_block
from dps_hal.platform import ms_since, ticks_ms

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

POLL_S = 0.005
_IS_BARE = ssl.__name__ == "tls"  # this module takes no keyword for roots
_MBEDTLS_ENDS = (-0x7280, -0x7880)  # mbedtls/ssl.h: no goodbye, a goodbye
_ENOMEM = 12
# Their *_ALLOC_FAILED: TLS, X.509, keys, ciphers, digests, curves; big numbers and ASN.1, which stand in the low seven
# bits of a number beside what they made fail.
_MBEDTLS_MEMORY = (-0x7F00, -0x2880, -0x3F80, -0x6180, -0x5180, -0x4D80)
_MBEDTLS_MEMORY_BELOW = (0x10, 0x6A)
_MBEDTLS_X509 = (-0x3000, -0x2080)  # mbedtls/x509.h: from, to; a certificate that cannot be read
_MBEDTLS_REASONS = {-0x7200: NO_REPLY_NOT_TLS, -0x6E80: NO_REPLY_TLS_VERSION}  # a record, a version of no TLS
# Where MicroPython returns None, CPython raises one of these; and it has no numbers for what fails in TLS.
_NOT_YET = (ssl.SSLWantReadError, ssl.SSLWantWriteError) if hasattr(ssl, "SSLError") else ()
_UNNUMBERED = ssl.SSLError if hasattr(ssl, "SSLError") else ()
_open: "list[Link]" = []  # those that have their place in the heap


class Trust:
    """The only certificates to trust, in DER: one TLS context for all connections, made when it is asked for first.

    So what TLS keeps of the roots lies together in the heap, once, below whatever comes and goes.
    """

    def __init__(self, roots: "list[bytes]") -> None:
        self._roots = roots
        self._context: Any = None

    def context(self) -> "Any":
        """The context. OSError, ValueError or MemoryError where it cannot be made."""
        if self._context is None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            for root in self._roots:
                if _IS_BARE:
                    context.load_verify_locations(root)
                else:
                    context.load_verify_locations(cadata=root)
            context.verify_mode = ssl.CERT_REQUIRED  # the default verifies nothing
            if context.verify_mode != ssl.CERT_REQUIRED:
                raise ValueError("this MicroPython cannot verify certificates")
            self._context = context
            self._roots = []  # the context has them
            hold_block()
        return self._context


class Link:
    """One connection after the other, to whom `trust` holds for verified.

    `while_waiting` is called at least once a second while something waits. `begin` starts a time limit, and all that
    waits after it fails with `timeout` once that is over.
    """

    def __init__(self, trust: Trust, while_waiting: "Callable[[], None] | None" = None) -> None:
        self.handshakes = 0  # so far
        self.is_shaken = False  # the peer is verified
        self._trust = trust
        self._lacks_room = False  # the heap had less than a handshake may take: who fails then, fails for that
        self._while_waiting = while_waiting
        self._socket: Any = None
        self._tls: Any = None
        self._read: Any = None
        self._started_ms = 0
        self._limit_ms = 0
        self.is_aborted = False  # since `begin`

    def begin(self, limit_ms: int) -> None:
        """What is to be done now has so much time."""
        self._started_ms = ticks_ms()
        self._limit_ms = limit_ms
        self.is_aborted = False

    def abort(self) -> None:
        """Makes what waits end soon, `closed`; for another task."""
        self.is_aborted = True

    def is_open(self) -> bool:
        """Whether there is a connection, as far as anybody knows."""
        return self._tls is not None

    async def pause(self, waits: bool = True) -> None:
        """Lets the other tasks run, for a moment if it `waits` for something; Failed once the time is over."""
        if self.is_aborted:
            raise Failed(NO_REPLY_CLOSED, "given up")
        if ms_since(self._started_ms) > self._limit_ms:
            raise Failed(NO_REPLY_TIMEOUT, f"no whole answer within {self._limit_ms} ms")
        if self._while_waiting is not None:
            self._while_waiting()
        await asyncio.sleep(POLL_S if waits else 0)

    async def open(self, host: str, port: int, name: str) -> None:
        """Connects; `name` is what the certificate must carry. The handshake comes with the first byte written."""
        await self.pause()
        try:
            addresses = socket.getaddrinfo(host, port, 0, socket.SOCK_STREAM)
        except OSError as error:
            # -3 is EAI_AGAIN of a libc. lwIP has one number for whatever fails: so a hub counts as gone only where DPS
            # is reached just then.
            reason = NO_REPLY_DNS if "-3" in str(error.errno) else NO_REPLY_NOT_FOUND
            raise Failed(reason, f"'{host}': error {error.errno}")
        failure = "no address"
        for place, (family, kind, protocol, _, address) in enumerate(addresses):
            left_ms = self._limit_ms - ms_since(self._started_ms)
            share_ms = left_ms // (len(addresses) - place)  # a silent address leaves the next ones their time
            try:
                self._socket = socket.socket(family, kind, protocol)
                self._socket.setblocking(False)
                try:
                    self._socket.connect(address)
                except OSError:
                    pass  # under way; whether it works, poll says
                if await self._is_connected(share_ms):
                    self._wrap(name)
                    return
                failure = "refused or unreachable"
            except OSError as error:
                failure = f"error {error.errno}"
            self.close()
        raise Failed(NO_REPLY_CONNECT, f"{host} port {port}: {failure}")

    async def _is_connected(self, limit_ms: int) -> bool:
        started_ms = ticks_ms()
        poller = select.poll()
        poller.register(self._socket, select.POLLOUT)
        while True:
            for _, event, *_ in poller.poll(0):
                return not event & (select.POLLERR | select.POLLHUP)
            await self.pause()
            if ms_since(started_ms) > limit_ms:
                return False

    def _wrap(self, name: str) -> None:
        try:
            context = self._trust.context()
            self._lacks_room = not has_room()
            free_block()  # its place is taken now
            self._tls = context.wrap_socket(self._socket, server_hostname=name, do_handshake_on_connect=False)
            _open.append(self)
        except (OSError, ValueError) as error:
            raise self._broken(error)
        except MemoryError as error:
            raise Failed(NO_REPLY_MEMORY, str(error))
        # `read` goes on until it would have to wait, and forgets an end that it met then; older versions have no other.
        self._read = getattr(self._tls, "recv", self._tls.read)

    def write(self, piece: "bytes | memoryview") -> int:
        """How many bytes could be sent now; where not all were, the rest is to be offered again and nothing else."""
        try:
            count: int = self._tls.write(piece) or 0
        except (OSError, ValueError) as error:
            if isinstance(error, _NOT_YET):
                return 0
            raise self._broken(error)
        if count and not self.is_shaken:
            self.is_shaken = True
            self.handshakes += 1
        return count

    def read(self, limit: int) -> "bytes | None":
        """What came, up to `limit` bytes; None while nothing has, b"" at the end."""
        try:
            received: bytes | None = self._read(limit)
        except (OSError, ValueError) as error:
            if isinstance(error, _NOT_YET):
                return None
            raise self._broken(error)
        return received

    def close(self) -> None:
        """Ends the connection, if there is one."""
        for each in (self._tls, self._socket):
            if each is not None:
                try:
                    each.close()
                except OSError:
                    pass  # it is broken, which is as good
        self._tls = self._socket = self._read = None
        self.is_shaken = False
        if self in _open:
            _open.remove(self)
        if not _open:
            hold_block()  # else what is free is the program's

    def _broken(self, error: Exception) -> Failed:
        """What a failure of the TLS module means: it raises ValueError for certificates, its own codes below 0.

        Who lacks memory while a certificate is verified hears that nobody trusted has signed it.
        """
        text = " ".join(str(error).split())  # mbedTLS ends each of its reasons with a line feed
        if isinstance(error, ValueError):
            number = _MBEDTLS_X509[0]
        else:
            number = -1 if isinstance(error, _UNNUMBERED) else getattr(error, "errno", 0)
        if (self._lacks_room and not self.is_shaken) or _is_short(number):
            return Failed(NO_REPLY_MEMORY, f"no room for the TLS handshake: {text}")
        if self.is_shaken or number >= 0 or number in _MBEDTLS_ENDS:
            at = "" if self.is_shaken else " in the TLS handshake"
            return Failed(NO_REPLY_CLOSED, f"the connection ended{at}: {text}")
        if _MBEDTLS_X509[0] <= number <= _MBEDTLS_X509[1]:
            return Failed(NO_REPLY_TLS, text)
        return Failed(_MBEDTLS_REASONS.get(number, NO_REPLY_TLS_FAILED), text)


def _is_short(number: int) -> bool:
    """Whether an error's number says that there was no memory."""
    return number == _ENOMEM or number in _MBEDTLS_MEMORY or (number < -1 and -number & 0x7F in _MBEDTLS_MEMORY_BELOW)


def split_address(text: str, default_port: int) -> "tuple[str, int]":
    """The two parts of "host", "host:port" or "[IPv6]:port", which the settings have checked."""
    host, colon, port = text.rpartition(":")
    if not colon or text[-1:] == "]":
        host, port = text, str(default_port)
    return host.strip("[]"), int(port)
