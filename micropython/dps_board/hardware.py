"""What of a board's hardware is in use for as long as the agent lives."""

import asyncio
import time

from dps_agent.lifecycle import CONNECTED, CONNECTING, PROVISIONED

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

NOT_LIT = 0
_LIT = 1
_SINCE_2000_S = 946_684_800  # the epoch of some ports
_JOIN_AGAIN_S = 15


def set_rtc(now_s: int) -> None:
    """Sets the board's clock to `now_s`, seconds since 1970; OverflowError for what this port has no time for."""
    import machine  # pyright: ignore[reportMissingImports]

    year, month, day, hour, minute, second, weekday = time.gmtime(now_s - epoch_s(time.gmtime))[:7]
    machine.RTC().datetime((year, month, day, weekday, hour, minute, second, 0))


def epoch_s(gmtime: "Callable[[int], Any]") -> int:
    """When the times of this port's `gmtime` begin, in seconds since 1970."""
    return _SINCE_2000_S if gmtime(0)[0] == 2000 else 0


def shown_by(pin: "Any") -> "Callable[[str], None]":
    """Shows a state by an LED: lit while the identity serves."""
    return lambda state: pin.value(_LIT if state in (PROVISIONED, CONNECTING, CONNECTED) else NOT_LIT)


async def stay_joined(ssid: str, password: str) -> None:
    """See `dps_board.parts.keep_joined`."""
    if not ssid:
        return
    import network  # pyright: ignore[reportMissingImports]

    station = network.WLAN(network.STA_IF)
    station.active(True)
    while True:
        if not station.isconnected():
            try:
                station.connect(ssid, password)
            except (OSError, RuntimeError, MemoryError):  # an ESP32's driver has RuntimeError for what it knows no name
                pass  # the radio is still at it, or there is no room; the next round tries again
        await asyncio.sleep(_JOIN_AGAIN_S)
