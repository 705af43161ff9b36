"""The clock of a Linux host."""

import time

from dps_hal.contracts import Utc

_BUILD_FLOOR_S = 1_793_491_200  # 2026-11-01T00:00:00Z, this release: an earlier time is a clock that was never set
_CEILING_S = 4_102_444_800  # 2100-01-01T00:00:00Z


class SystemClock:
    """`dps_hal.contracts.Clock` by the kernel's monotonic and real-time clocks."""

    def uptime_s(self) -> float:
        """Monotonic seconds; they stand still while the machine is suspended."""
        return time.monotonic()

    def utc(self) -> Utc:
        """The system's time, believed from this release's date up to the year 2100."""
        now_s = int(time.time())
        return Utc(now_s, _BUILD_FLOOR_S <= now_s < _CEILING_S, "system")
