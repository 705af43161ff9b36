"""HTTP/1.1 on a connection: uvicorn's reader, with an end to every request that does not come whole."""

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

REQUEST_S = 30.0  # from a request's first byte to its last
_TOO_LATE = b"HTTP/1.1 408 Request Timeout\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"


class BoundedProtocol(H11Protocol):
    """Ends a connection whose request takes longer than REQUEST_S; uvicorn bounds only the time between two."""

    _ends: asyncio.TimerHandle | None = None

    def data_received(self, data: bytes) -> None:
        """More of a request, or of several."""
        super().data_received(data)
        state = self.conn.their_state
        begun = state is h11.SEND_BODY or (state is h11.IDLE and bool(self.conn.trailing_data[0]))
        if not begun:
            self._forget()
        elif self._ends is None:
            self._ends = self.loop.call_later(REQUEST_S, self._give_up)

    def connection_lost(self, exc: Exception | None) -> None:
        """It is over."""
        self._forget()
        super().connection_lost(exc)

    def _forget(self) -> None:
        if self._ends is not None:
            self._ends.cancel()
            self._ends = None

    def _give_up(self) -> None:
        """The rest of a request did not come: that is said where no answer has begun."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.write(_TOO_LATE)
        self.transport.close()
