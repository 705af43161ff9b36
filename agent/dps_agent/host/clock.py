"""The clock of a Linux host."""

import ctypes
import math
import os
import time

from dps_agent.utc import AGREEMENT_S
from dps_hal.contracts import Utc

_BUILD_FLOOR_S = 1_793_491_200  # 2026-11-01T00:00:00Z, this release: an earlier time is a clock that was never set
_CEILING_S = 4_102_444_800  # 2100-01-01T00:00:00Z
_TIMESYNCD_SAYS_SO = "/run/systemd/timesync/synchronized"  # systemd-timesyncd(8); the kernel may say so later
_TIME_ERROR = 5  # what adjtimex(2) returns for a clock that nobody keeps
_TIMEX_SIZE = 512  # bytes; struct timex has 208, `modes` (0: only read) is its first field


class SystemClock:
    """`dps_hal.contracts.Clock` by the kernel's monotonic and real-time clocks.

    A clock that NTP keeps is believed. Any other is a proposal, such as a machine without battery makes from what it
    remembers: it counts until a peer whose certificate was verified under it says otherwise, then the peer's time does.
    """

    def __init__(self) -> None:
        self._heard: tuple[int, float] | None = None  # a time that speaks against the system's, and its uptime
        self._agreed_at_s = -math.inf  # the uptime at which a peer agreed with the system's time

    def uptime_s(self) -> float:
        """Monotonic seconds; they stand still while the machine is suspended."""
        return time.monotonic()

    def utc(self) -> Utc:
        """The time, believed from this release's date up to the year 2100."""
        if self._heard is not None:
            if not is_synchronised():
                date_s, at_s = self._heard
                return Utc(int(date_s + time.monotonic() - at_s), True, "date")
            self._heard = None
        now_s = int(time.time())
        return Utc(now_s, _is_plausible(now_s), "system")

    def is_confirmed(self) -> bool:
        """Whether anybody vouches for the time: NTP, or a peer within the last hour."""
        return time.monotonic() - self._agreed_at_s < 3600 or is_synchronised()

    def heard(self, date_s: int) -> None:
        """Takes the Date of an answer over TLS from a peer that was verified under the system's time."""
        now_s = int(time.time())
        if not (_is_plausible(now_s) and _is_plausible(date_s)):
            return
        self._agreed_at_s = time.monotonic()
        if abs(date_s - now_s) <= AGREEMENT_S:
            self._heard = None
        elif not is_synchronised():
            self._heard = (date_s, self._agreed_at_s)


def _is_plausible(utc_s: int) -> bool:
    return _BUILD_FLOOR_S <= utc_s < _CEILING_S


def is_synchronised() -> bool:
    """Whether something, such as NTP, keeps the system's clock; needs no privilege."""
    if os.path.exists(_TIMESYNCD_SAYS_SO):
        return True
    answer: int = ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(_TIMEX_SIZE))
    return answer not in (_TIME_ERROR, -1)
