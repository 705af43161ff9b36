"""The one place where a thread waits: for descriptors, for a time, and for a ring by whoever has something for it.

The main thread of the service waits in one loop, whatever it waits for: an event of the hub, a call on `dps-worker`, or
the end of a pause. Who is `served` by that loop has its turn meanwhile, so the socket for other programs is answered on
the same thread, and nothing is handed from one thread to another on the way between a program and the hub.

A ring is remembered, so none is lost that comes before the wait, and it costs a system call only where somebody waits.
Signal handlers may ring in the middle of anything: no lock is taken.
"""

from __future__ import annotations

import contextlib
import math
import os
import select
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Protocol

    class Served(Protocol):
        """What has its turn while a thread waits; it never blocks."""

        def fileno(self) -> int: ...  # readable where there is something to do
        def due_s(self) -> float: ...  # monotonic seconds at which there is, whatever comes
        def turn(self, readable: bool) -> None: ...


LONGEST_WAIT_S = 3600.0  # in one poll(2), which counts milliseconds in 31 bits


class Loop:
    """One thread calls `wait` and `close`; any thread, and any signal handler, may `ring`."""

    def __init__(self) -> None:
        self.served: Served | None = None
        self._alarm = -1  # an eventfd, from the first wait until `close`
        self._poll = select.poll()
        self._watched = (-1, 0)  # the descriptor beside alarm and socket, and what of it
        self._heard = -1  # the descriptor of who is served
        self._waits = False  # it is in poll(2), or about to
        self._rung = False  # since the last wait

    def ring(self) -> None:
        """Ends the wait of now, or else the next one at once. Note what is to be looked at first."""
        self._rung = True
        if self._waits:
            with contextlib.suppress(OSError):  # it rings already
                os.eventfd_write(self._alarm, 1)

    def wait(self, until_s: float, fileno: int = -1, interest: int = 0) -> int:
        """Waits once, until `until_s` of the monotonic clock at the latest; what poll(2) says of `fileno`.

        It returns after a ring, after a turn of who is served, and where `fileno` is ready: look why, and wait again.
        """
        if self._alarm < 0:
            self._alarm = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            self._poll.register(self._alarm, select.POLLIN)
        served = self.served
        heard = -1 if served is None else served.fileno()
        if heard != self._heard:
            self._heard = self._exchange(self._heard, heard, select.POLLIN)
        if (fileno, interest) != self._watched:
            self._watched = (self._exchange(self._watched[0], fileno, interest), interest)
        if served is not None:
            if (due_s := served.due_s()) <= time.monotonic():
                served.turn(False)
                due_s = served.due_s()
            until_s = min(until_s, due_s)
        self._waits = True
        try:
            within_s = 0.0 if self._rung else min(max(until_s - time.monotonic(), 0.0), LONGEST_WAIT_S)
            ready = dict(self._poll.poll(math.ceil(within_s * 1000)))
        finally:
            self._waits = False
        if self._alarm in ready:
            os.eventfd_read(self._alarm)
        if served is not None and heard in ready:
            served.turn(True)
        self._rung = False  # what was noted before is looked at now
        return ready.get(fileno, 0)

    def close(self) -> None:
        """Gives back what is open; the next wait opens it again."""
        alarm, self._alarm = self._alarm, -1
        if alarm >= 0:
            os.close(alarm)
        # What was watched may be closed, and its number another's by the next wait.
        self._poll, self._watched, self._heard = select.poll(), (-1, 0), -1

    def _exchange(self, former: int, fileno: int, interest: int) -> int:
        """Waits for the one and no longer for the other, which may be closed by now; -1: none."""
        if former >= 0:
            self._poll.unregister(former)
        if fileno >= 0:
            self._poll.register(fileno, interest)
        return fileno
