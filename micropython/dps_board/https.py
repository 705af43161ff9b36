"""HTTPS to one endpoint over one kept connection, on asyncio, with every wait and every size bounded.

Sources: RFC 9110, RFC 9112.
"""

import gc

from dps_agent.effects import NO_REPLY_CLOSED, NO_REPLY_MEMORY, NO_REPLY_TOO_LARGE, Failed, NoReply, Reply
from dps_agent.http1 import Reader
from dps_board.tls import Link, Trust, split_address

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from dps_agent.sas import SasToken

BODY_LIMIT = 16 * 1024  # bytes of an answer's body
_ROOM_BYTES = 1600  # what DPS's largest answer takes where the payload is small
_RECEIVE_BYTES = 512
_SEND_BYTES = 1024
_HTTPS_PORT = 443


class Connection:
    """One connection to `endpoint`, "https://name[:port]"; opened when needed and again where the server closed it.

    `trust` says whom to trust. `connect_to`, "host:port", is dialled instead; the name that is
    sent and that the certificate must carry stays the endpoint's. `while_waiting` is called at least once a second
    while a request is under way.
    """

    def __init__(
        self,
        endpoint: str,
        trust: Trust,
        connect_to: str = "",
        while_waiting: "Callable[[], None] | None" = None,
    ) -> None:
        self._authority = endpoint[len("https://") :]
        self._host, port = split_address(self._authority, _HTTPS_PORT)
        self._dial = split_address(connect_to, port) if connect_to else (self._host, port)
        self.link = Link(trust, while_waiting)
        # Where a connection ends well and where it was cut MicroPython does not tell apart.
        self._reader = Reader(BODY_LIMIT)
        self._answered = False  # a byte came since the last request

    async def request(
        self, method: str, path: str, body: bytes, authorization: "SasToken | None", limit_ms: int
    ) -> "Reply | NoReply":
        """One request and its whole answer within `limit_ms`, any repetition included.

        The body of the answer is only to be read before the next request.
        """
        self.link.begin(limit_ms)
        sent = False
        while True:
            reused = self.is_open()
            keep = False
            self._answered = False
            try:
                if not reused:
                    self._make_room()
                    await self.link.open(self._dial[0], self._dial[1], self._host)
                await self._send(self._head_of(method, path, body, authorization))
                await self._send(body)
                sent = True
                reply, keep = await self._answer()
                return reply
            except MemoryError:
                return NoReply(f"{NO_REPLY_TOO_LARGE}: no memory for the answer", True)
            except Failed as failed:
                sent = sent or reused
                # A server may close an idle connection while our request is on its way. Every request of this API
                # may be repeated: registering again with the same body and token asks for the same thing.
                if reused and not self._answered and failed.reason == NO_REPLY_CLOSED and not self.link.is_aborted:
                    continue
                return NoReply(f"{failed.reason}: {failed}", sent)
            finally:
                if not keep:
                    self.close()

    def is_open(self) -> bool:
        """Whether there is a connection with nothing in it, so that it can take a request; another one is closed."""
        if not self.link.is_open():
            return False
        try:
            if self.link.is_shaken and self.link.read(1) is None:
                return True
        except Failed:
            pass  # the peer has gone
        self.close()
        return False

    def abort(self) -> None:
        """Makes a request under way end soon, `closed`; for another task."""
        self.link.abort()

    def close(self) -> None:
        """Ends the connection, if there is one; the next request opens another."""
        self.link.close()
        self._reader.rest = self._reader.room = b""

    def _make_room(self) -> None:
        """Of the answers on a connection, before its handshake: after that there may be no block of this size."""
        try:
            self._reader.room = bytearray(_ROOM_BYTES)
        except MemoryError as error:
            raise Failed(NO_REPLY_MEMORY, f"no room for an answer: {error}")

    async def _send(self, message: bytes) -> None:
        sent = 0
        while sent < len(message):
            count = self.link.write(memoryview(message)[sent : sent + _SEND_BYTES])
            sent += count
            if not count:
                await self.link.pause()

    # --- messages

    def _head_of(self, method: str, path: str, body: bytes, authorization: "SasToken | None") -> bytes:
        head = f"{method} {path} HTTP/1.1\r\nHost: {self._authority}\r\nUser-Agent: dps-agent\r\n"
        head += "Accept: application/json\r\nAccept-Encoding: identity\r\n"
        if body or method != "GET":
            head += f"Content-Type: application/json; charset=utf-8\r\nContent-Length: {len(body)}\r\n"
        if authorization is not None:
            head += f"Authorization: {authorization.header()}\r\n"
        return (head + "\r\n").encode()

    async def _answer(self) -> "tuple[Reply, bool]":
        """The next answer, and whether the connection can take another request."""
        gc.collect()  # so that what stays of a head is not strewn over the room for its body
        reading = self._reader.answer()
        try:
            next(reading)
            while True:
                reading.send(await self._receive())
        except StopIteration as read:
            whole: tuple[Reply, bool] = read.value
            return whole

    async def _receive(self) -> bytes:
        """Waits for more; the other tasks have their turn after each piece, however fast the next one comes."""
        while True:
            received = self.link.read(_RECEIVE_BYTES)
            await self.link.pause(received is None)
            if received is not None:
                self._answered = self._answered or bool(received)
                return received
