"""Which time to believe on a device whose clock nobody has set.

Anybody may propose a time: an NTP answer, a battery-backed clock, the `Date` header of a verified peer. A proposal
counts between the floor (when this program was built, or the last time it believed) and the ceiling (when the last of
its roots ends). Only a TLS handshake whose certificates verify under the proposed time, with a peer whose `Date` agrees
with it, confirms it and raises the floor; certificates alone, which hold for months, confirm nothing new. So a forged
time can stop a device for as long as the forgery lasts, never longer.

Pure: no clock is read here. Times are whole seconds, `now_s` since 1970-01-01 UTC, `uptime_s` of a monotonic clock.
"""

from dps_hal.contracts import Utc

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NamedTuple

    class _Time(NamedTuple):
        """`now_s` was right, or is said to have been, at `uptime_s`."""

        now_s: int
        uptime_s: int
        source: str
else:
    from dps_hal.named import namedtuple

    _Time = namedtuple("_Time", ("now_s", "uptime_s", "source"))

AGREEMENT_S = 300  # between our time and a peer's Date; as much as a refused token blames on the clock
DATE_HOLDS_S = 3600  # so long a Date vouches for the time to the minute
CERTIFICATE = "certificate"  # `Utc.source` of a time that nothing else vouches for: good for a token, no floor
LONGEST_STEP_S = 400 * 86400  # a server's certificate is valid for 398 days: CA/Browser Forum BR, 6.3.2

_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")


class BelievedTime:
    """The rule, for one start of the device."""

    def __init__(self, built_s: int, last_believed_s: int, ceiling_s: int, uptime_s: int) -> None:
        """`built_s`: no true time is earlier; `last_believed_s`: what the last start believed, 0 for nothing."""
        # A stored time behind the roots' end was not confirmed by any handshake.
        self.floor_s = max(built_s, last_believed_s if last_believed_s <= ceiling_s else 0)
        self.ceiling_s = ceiling_s
        self._highest_floor_s = self.floor_s + LONGEST_STEP_S
        self._start = _Time(self.floor_s, uptime_s, "floor")
        self._confirmed: _Time | None = None
        self._proposed: _Time | None = None
        self._dated_at_s: int | None = None  # the uptime at which a Date confirmed the time last

    def propose(self, now_s: int, uptime_s: int, source: str) -> bool:
        """Takes `now_s` for the next handshake; False, and nothing changes, where it is out of bounds.

        What was believed before may have run ahead of it by as much as two peers may differ.
        """
        if not self.floor_s - AGREEMENT_S <= now_s <= self.ceiling_s:
            return False
        self._proposed = _Time(now_s, uptime_s, source)
        return True

    def for_handshake_s(self, uptime_s: int) -> int:
        """The time under which the next peer's certificates are to be verified."""
        return _running_s(self._proposed or self._confirmed or self._start, uptime_s)

    def utc(self, uptime_s: int) -> Utc:
        """The time now; believable once a handshake has confirmed it."""
        time = self._confirmed or self._proposed or self._start
        return Utc(_running_s(time, uptime_s), self._confirmed is not None, time.source)

    def verified(self, date_s: "int | None", uptime_s: int) -> bool:
        """The peer was verified under `for_handshake_s` and has answered with this Date, None for none.

        True: a Date has confirmed that time. Without one, what was believed before is confirmed and a proposal waits
        for a Date, see `needs_date`.
        False: the Date speaks against it. The Date, or what was believed without the proposal, is what the next
        handshake is to be made under; make it now.
        """
        if date_s is None and self.needs_date(uptime_s):
            return True
        if date_s is None:
            self._proposed = None  # it agrees with what a Date has confirmed, which stays
        now_s = self.for_handshake_s(uptime_s)
        if date_s is not None and abs(date_s - now_s) > AGREEMENT_S:
            proposed, self._proposed = self._proposed, None
            if self.propose(date_s, uptime_s, "date") or proposed:
                return False
        elif date_s is not None:
            self._dated_at_s = uptime_s
        self._confirmed = self._proposed or self._confirmed or self._start
        self._proposed = None
        self.floor_s = max(self.floor_s, min(now_s, self._highest_floor_s))
        return True

    def is_dated(self, uptime_s: int) -> bool:
        """Whether a Date vouches for the time to the minute: clocks drift, and people set them."""
        return self._dated_at_s is not None and uptime_s - self._dated_at_s < DATE_HOLDS_S

    def needs_date(self, uptime_s: int) -> bool:
        """Whether there is a proposal that only a peer with a Date can confirm: it differs from what is believed."""
        if self._proposed is None:
            return False
        known = self._confirmed
        return known is None or abs(_running_s(self._proposed, uptime_s) - _running_s(known, uptime_s)) > AGREEMENT_S

    def refused(self) -> bool:
        """The peer was not verified under `for_handshake_s`; True where there is another time to try it under."""
        proposed, self._proposed = self._proposed, None
        return proposed is not None


def _running_s(time: _Time, uptime_s: int) -> int:
    return time.now_s + uptime_s - time.uptime_s


def utc_s(year: int, month: int, day: int, hour: int, minute: int, second: int) -> int:
    """Seconds since 1970 of a moment in UTC by the Gregorian calendar; ValueError where there is no such moment."""
    leap = year % 4 == 0 and (year % 100 != 0 or year % 400 == 0)
    lengths = (31, 29 if leap else 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)
    if year < 1 or not 1 <= month <= 12 or not 1 <= day <= lengths[month - 1]:
        raise ValueError(f"no such day: {year}-{month}-{day}")
    if not (0 <= hour < 24 and 0 <= minute < 60 and 0 <= second <= 60):  # 60: a leap second
        raise ValueError(f"no such time: {hour}:{minute}:{second}")
    before = year - 1
    days = before * 365 + before // 4 - before // 100 + before // 400 + sum(lengths[: month - 1]) + day - 719163
    return ((days * 24 + hour) * 60 + minute) * 60 + second


def date_text(now_s: int) -> str:
    """The day of this moment in UTC by the Gregorian calendar, as "2026-11-01"; ValueError before the year 1."""
    year, month = 1971 + now_s // 31556952, 12  # the mean year of the calendar: at most one year too late
    while utc_s(year, 1, 1, 0, 0, 0) > now_s:
        year -= 1
    while utc_s(year, month, 1, 0, 0, 0) > now_s:
        month -= 1
    return f"{year:04d}-{month:02d}-{(now_s - utc_s(year, month, 1, 0, 0, 0)) // 86400 + 1:02d}"


def http_date_s(text: "str | None") -> "int | None":
    """A Date header in its one form of today ("Sun, 06 Nov 1994 08:49:37 GMT", RFC 9110, 5.6.7); None for others."""
    parts = (text or "").split(" ")
    if len(parts) != 6 or parts[5] != "GMT" or parts[2] not in _MONTHS:
        return None
    clock = parts[4].split(":")
    try:
        day, year = whole_number(parts[1], 2), whole_number(parts[3], 4)
        hour, minute, second = [whole_number(part, 2) for part in clock]
        return utc_s(year, _MONTHS.index(parts[2]) + 1, day, hour, minute, second)
    except ValueError:
        return None


def whole_number(text: str, digits: int) -> int:
    """The number that `text` is, written with so many digits; ValueError for anything else."""
    if len(text) != digits:
        raise ValueError(f"expected {digits} digits; came {text!r}")
    for character in text:
        if character not in "0123456789":
            raise ValueError(f"expected {digits} digits; came {text!r}")
    return int(text)
