"""What of a board's hardware is in use for as long as the agent lives."""

import asyncio

_JOIN_AGAIN_S = 15


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
