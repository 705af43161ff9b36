"""The parts of a board, made from its settings: TPM, store, clock, watchdog, LED, network.

Loaded while a board starts: what is made here has nothing of this module in it, so that the module can go.
`machine` and `network` are loaded by the parts that need them, so a board without Wi-Fi or LED does without.
"""

import os
import time

from dps_agent.settings import SYMMETRIC_KEY
from dps_board.clock import BoardClock
from dps_board.hardware import NOT_LIT, epoch_s, shown_by, stay_joined
from dps_board.hardware import set_rtc as hardware_set_rtc
from dps_hal.errors import AskOperator
from dps_hal.store.littlefs import LittleFsStore

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from typing import Any

    from dps_board.config import BoardConfiguration
    from dps_hal.contracts import Signer
    from dps_hal.tpm.commands import Transport
    from dps_hal.tpm.tis import Bus
    from dps_hal.tpm.wire import WireTpm

SPI_HZ = 10_000_000  # PTP: every TPM takes 10 MHz
I2C_HZ = 400_000
NO_PIN = -1
set_rtc = hardware_set_rtc  # a program that makes its own clock asks for it here


def make_signer(config: "BoardConfiguration", while_waiting: "Callable[[], None] | None" = None) -> "Signer":
    """What signs for this board: its TPM, or the key in its settings; AskOperator `config.invalid` for none."""
    if config.settings.attestation != SYMMETRIC_KEY:
        return make_tpm(config, while_waiting)
    from dps_hal.device_key import DeviceKey, key_in

    try:
        return DeviceKey(key_in(config.values["device_key"]))
    except ValueError as error:
        raise AskOperator("config.invalid", f"device_key: {error}")


def make_tpm(config: "BoardConfiguration", while_waiting: "Callable[[], None] | None" = None) -> "WireTpm":
    """The TPM that `tpm.tcti` names, used by nobody else."""
    from dps_hal.tpm.wire import WireTpm

    values = config.values
    return WireTpm(
        _transport(values),
        ek_template=values["tpm.ek_template"],
        ek_handle=values["tpm.ek_handle"],
        srk_handle=values["tpm.srk_handle"],
        while_waiting=while_waiting,
        exclusive=True,
    )


def _transport(values: "dict[str, Any]") -> "Transport":
    tcti = values["tpm.tcti"]
    if tcti.startswith("swtpm:"):
        from dps_hal.tpm.tcp import SwtpmTransport

        named = dict([part.split("=") for part in tcti[len("swtpm:") :].split(",") if "=" in part])
        return SwtpmTransport(named.get("host", "127.0.0.1"), int(named.get("port", "2321")))
    import machine  # pyright: ignore[reportMissingImports]

    from dps_hal.tpm.tis import TisTransport

    hz = values["board.bus_hz"]
    reset = None if values["board.reset_pin"] == NO_PIN else _pin(values, "reset_pin", 1)
    try:
        if tcti == "i2c":
            from dps_hal.tpm.i2c import I2cBus

            pins = _named_pins(values, "scl", "sda")
            bus: Bus = I2cBus(machine.I2C(values["board.bus"], freq=hz or I2C_HZ, **pins))
        else:
            from dps_hal.tpm.spi import SpiBus

            pins = _named_pins(values, "sck", "mosi", "miso")
            spi = machine.SPI(values["board.bus"], baudrate=hz or SPI_HZ, **pins)
            bus = SpiBus(spi, _pin(values, "select_pin", 1))
    except ValueError as error:
        raise _not_here(values, "bus", error)
    return TisTransport(bus, reset)


def _named_pins(values: "dict[str, Any]", *names: str) -> "dict[str, Any]":
    """Those pins of a bus that the settings name."""
    return {name: _pin(values, name + "_pin") for name in names if values[f"board.{name}_pin"] != NO_PIN}


def _pin(values: "dict[str, Any]", key: str, level: "int | None" = None) -> "Any":
    """The pin that a setting names, putting out `level` where one is given; AskOperator `config.invalid` for none."""
    import machine  # pyright: ignore[reportMissingImports]

    pin, named = machine.Pin, values["board." + key]
    try:
        return pin(named) if level is None else pin(named, pin.OUT, value=level)
    except ValueError as error:
        raise _not_here(values, key, error)


def _not_here(values: "dict[str, Any]", key: str, error: Exception) -> AskOperator:
    """What is said of a setting that this board cannot meet."""
    came = values["board." + key]
    return AskOperator("config.invalid", f"board.{key}: expected what this board has; came {came}: {error}")


def make_store(config: "BoardConfiguration") -> LittleFsStore:
    """The store in the folder `state_dir`, which must lie on littlefs."""
    return LittleFsStore(config.values["state_dir"], os)


def make_clock(config: "BoardConfiguration", while_waiting: "Callable[[], None] | None" = None) -> BoardClock:
    """The clock, with the RTC that mbedTLS reads."""
    values = config.values
    end_s = latest_s(config.roots_end_s, time.gmtime)
    return BoardClock(values["board.built_at_s"], end_s, set_rtc, values["board.ntp_server"], while_waiting)


def latest_s(end_s: int, gmtime: "Callable[[int], Any]") -> int:
    """`end_s`, or where this port's `gmtime` has no such time the last one that it has; seconds since 1970."""
    try:
        gmtime(end_s - epoch_s(gmtime))
        return end_s
    except (OverflowError, ValueError):
        return epoch_s(gmtime) + 0x7FFFFFFF


def make_watchdog(config: "BoardConfiguration") -> "Callable[[], None] | None":
    """The function that feeds the hardware's watchdog, which runs from now on; None where none is wanted.

    AskOperator `config.invalid` for more than this board's watchdog can have.
    """
    limit_s = config.values["board.watchdog_s"]
    if not limit_s:
        return None
    import machine  # pyright: ignore[reportMissingImports]

    try:
        feed: Callable[[], None] = machine.WDT(timeout=limit_s * 1000).feed
    except (ValueError, OSError) as error:
        raise _not_here(config.values, "watchdog_s", error)
    return feed


def make_led(config: "BoardConfiguration") -> "Callable[[str], None] | None":
    """Shows a state: lit while the identity serves; None where there is no LED."""
    if config.values["board.led_pin"] == NO_PIN:
        return None
    return shown_by(_pin(config.values, "led_pin", NOT_LIT))


def keep_joined(config: "BoardConfiguration") -> "Coroutine[Any, Any, None]":
    """Joins the Wi-Fi and joins it again whenever it is lost; returns at once where none is named. To be awaited.

    Otherwise it never ends by itself: it is for a task that the program starts, and cancels in the end.
    """
    return stay_joined(config.values["board.wifi_ssid"], config.values["board.wifi_password"])
