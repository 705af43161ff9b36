"""The clock of a Linux host."""

from __future__ import annotations

import os
import time

from dps_agent.effects import NO_REPLY_TLS, NoReply
from dps_agent.utc import AGREEMENT_S, CERTIFICATE, BelievedTime
from dps_hal.contracts import Utc

TYPE_CHECKING = False
if TYPE_CHECKING:
    from dps_hal.contracts import Clock

CLOCK_NOT_SET = NoReply(f"{NO_REPLY_TLS}: the clock is not set, so no certificate can be judged", False)
_BUILD_FLOOR_S = 1_793_491_200  # 2026-11-01T00:00:00Z, this release: an earlier time is a clock that was never set
_CEILING_S = 4_102_444_800  # 2100-01-01T00:00:00Z
_TIMESYNCD_SAYS_SO = "/run/systemd/timesync/synchronized"  # systemd-timesyncd(8); the kernel may say so later
_TIME_ERROR = 5  # what adjtimex(2) returns for a clock that nobody keeps
_TIMEX_SIZE = 512  # bytes; struct timex has 208, `modes` (0: only read) is its first field


class SystemClock:
    """`dps_hal.contracts.Clock` by the kernel's clocks and the rule of `dps_agent.utc`.

    A clock that NTP keeps is believed. Any other is a proposal, such as a machine without battery makes from what it
    remembers: a verified peer's Date confirms it or takes its place. From then on the time runs by the kernel's uptime,
    whatever becomes of the system's clock, until NTP keeps that. A peer's certificate without a Date lets a token be
    made, as long as nobody moves the clock: months are right for a certificate, so nothing else is built on them.

    `last_believed_s` is what an earlier run believed, 0 for nothing.
    """

    def __init__(self, last_believed_s: int = 0) -> None:
        self._time = BelievedTime(_BUILD_FLOOR_S, last_believed_s, _CEILING_S, _uptime_s())
        self._certified: tuple[int, int] | None = None  # the time and uptime at which a certificate had its say

    def uptime_s(self) -> float:
        """Monotonic seconds; they stand still while the machine is suspended."""
        return time.monotonic()

    def utc(self) -> Utc:
        """The time; believable once NTP or a verified peer vouches for it."""
        now_s, uptime_s = int(time.time()), _uptime_s()
        if _is_plausible(now_s) and is_synchronised():
            self._time = BelievedTime(_BUILD_FLOOR_S, 0, _CEILING_S, uptime_s)  # what was believed before is forgotten
            self._time.propose(now_s, uptime_s, "system")
            self._time.verified(now_s, uptime_s)
        found = self._time.utc(uptime_s)
        if found.believable:
            return found
        if self._certified and abs(now_s - self._certified[0] - (uptime_s - self._certified[1])) <= AGREEMENT_S:
            return Utc(now_s, True, CERTIFICATE)
        return Utc(now_s, False, "the system, with nobody to confirm it,")

    def may_judge(self) -> bool:
        """Whether the system's time, which TLS goes by, is one under which a certificate may be judged at all."""
        return _is_plausible(int(time.time()))

    def is_confirmed(self) -> bool:
        """Whether anybody vouches for the time to the minute: NTP or a peer's Date, now or within the last hour."""
        return self._time.is_dated(_uptime_s()) or is_synchronised()

    def heard(self, date_s: int | None) -> None:
        """Takes the Date, None for none, of a peer whose certificate was verified under the system's time."""
        now_s, uptime_s = int(time.time()), _uptime_s()
        if not _is_plausible(now_s):
            return
        proposed = self._time.propose(now_s, uptime_s, "system")
        if date_s is None:
            self._time.refused()
            self._certified = (now_s, uptime_s) if proposed else None
            return
        if not proposed or abs(date_s - now_s) > AGREEMENT_S:
            self._time.refused()
            proposed = self._time.propose(date_s, uptime_s, "date")
        if proposed:
            self._time.verified(date_s, uptime_s)


def may_judge(clock: Clock) -> bool:
    """Whether a certificate may be judged under what this clock says now."""
    return clock.may_judge() if isinstance(clock, SystemClock) else clock.utc().believable


def _uptime_s() -> int:
    """Seconds since the boot, those of suspension included."""
    return int(time.clock_gettime(time.CLOCK_BOOTTIME))


def _is_plausible(utc_s: int) -> bool:
    return _BUILD_FLOOR_S <= utc_s < _CEILING_S


def is_synchronised() -> bool:
    """Whether something, such as NTP, keeps the system's clock; needs no privilege.

    Where the kernel may not be asked, as under the packaged unit, only systemd-timesyncd is heard.
    """
    if os.path.exists(_TIMESYNCD_SAYS_SO):
        return True
    import ctypes

    answer: int = ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(_TIMEX_SIZE))
    return answer not in (_TIME_ERROR, -1)
