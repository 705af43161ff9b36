"""The clock of a board: ticks that never wrap, and the rule of `dps_agent.utc` with an RTC and NTP."""

from dps_agent.utc import BelievedTime
from dps_board.memory import forget
from dps_board.tls import split_address
from dps_hal.platform import ms_since, ticks_ms

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from dps_hal.contracts import Utc

ASK_AGAIN_S = 86400  # a believed time: quartz drifts by seconds a day
_ASK_AGAIN_UNSURE_S = 10
_ANCHOR_MS = 86_400_000  # ticks wrap after 12 days, differences are right up to 6
TIMES_TO_TRY = 3  # for one request: under a proposal, under the floor, under the peer's Date


class BoardClock:
    """A `dps_hal.contracts.Clock` that gives TLS the time to verify certificates under.

    `set_rtc(now_s)` sets the clock that mbedTLS reads; it raises OverflowError, ValueError or OSError for a time that
    this clock cannot have. `ntp_server` is "host[:port]", "" for none.
    """

    def __init__(
        self,
        built_s: int,
        roots_end_s: int,
        set_rtc: "Callable[[int], None]",
        ntp_server: str = "",
        while_waiting: "Callable[[], None] | None" = None,
    ) -> None:
        self._built_s = built_s
        self._roots_end_s = roots_end_s
        self._set_rtc = set_rtc
        self._ntp_server, self._ntp_port = split_address(ntp_server, 123)
        self._while_waiting = while_waiting
        self._ticks_ms = ticks_ms()
        self._before_ms = 0  # the uptime at these ticks
        self._uptime_ms = 0
        self._asked_s: int | None = None  # uptime of the last question to NTP
        self.time = BelievedTime(built_s, 0, roots_end_s, 0)

    def restart(self, last_believed_s: int) -> None:
        """Forgets what is believed and begins with what the last start stored, 0 for nothing."""
        self.time = BelievedTime(self._built_s, last_believed_s, self._roots_end_s, self._uptime_s())
        self._asked_s = None

    def uptime_s(self) -> float:
        """As `Clock.uptime_s`; to be called at least every six days, or ticks are lost."""
        self._uptime_s()
        return self._uptime_ms / 1000

    def utc(self) -> "Utc":
        """As `Clock.utc`."""
        return self.time.utc(self._uptime_s())

    async def before_handshake(self) -> None:
        """Asks NTP if that is due and sets the RTC to the time under which the peer is to be verified."""
        uptime_s = self._uptime_s()
        due_s = ASK_AGAIN_S if self.utc().believable else _ASK_AGAIN_UNSURE_S
        if self._ntp_server and (self._asked_s is None or uptime_s - self._asked_s >= due_s):
            self._asked_s = uptime_s
            from dps_board.ntp import ask

            now_s = await ask(self._ntp_server, self._ntp_port, while_waiting=self._while_waiting)
            forget("dps_board.ntp")
            if now_s is not None:
                self.time.propose(now_s, self._uptime_s(), "ntp")
        while True:
            try:
                self._set_rtc(self.time.for_handshake_s(self._uptime_s()))
                break
            except (OverflowError, ValueError, OSError):
                if not self.time.refused():
                    break  # it stays as it is, and TLS says what it makes of that

    def verified(self, date_s: "int | None") -> bool:
        """See `BelievedTime.verified`."""
        return self.time.verified(date_s, self._uptime_s())

    def is_confirmed(self) -> bool:
        """See `BelievedTime.is_dated`; NTP proposes a time and vouches for nothing."""
        return self.time.is_dated(self._uptime_s())

    def needs_date(self) -> bool:
        """See `BelievedTime.needs_date`."""
        return self.time.needs_date(self._uptime_s())

    def refused(self) -> bool:
        """See `BelievedTime.refused`; where nothing else is left to try, NTP is asked before the next handshake."""
        if self.time.refused():
            return True
        self._asked_s = None
        return False

    def _uptime_s(self) -> int:
        gone_ms = ms_since(self._ticks_ms)
        if gone_ms > _ANCHOR_MS:
            self._ticks_ms = ticks_ms()
            self._before_ms += gone_ms
            gone_ms = 0
        self._uptime_ms = self._before_ms + gone_ms
        return self._uptime_ms // 1000
