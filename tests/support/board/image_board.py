"""A board made of a flash image and a TPM on its bus, under MicroPython's unix port: boots as firmware boots.

    micropython -X heapsize=1m -i image_board.py IMAGE TPM_PORT [run|enrol|fat]        (MICROPYPATH=agent:hal:tests)

The image is mounted as the only file system. `machine` has the buses with a simulated TPM in front of the swtpm at
TPM_PORT, pins by any name, an RTC that sets nothing and a watchdog that does not bite; `network` is there already.
`run` runs boot.py and main.py, and a reset ends it; `enrol` prints the line for the enrolment; `fat` makes the flash an
empty FAT. Without `run` and `enrol` the prompt comes at once, to deploy over it.
"""

import gc
import json
import os
import sys

from dps_hal.tpm.tcp import SwtpmTransport
from support.board import board_life
from support.tpm.tis_chip import ChipOnI2c, ChipOnSpi, TisChip

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

HALF = 1 << 15  # of what an ADC reads
chip = TisChip(SwtpmTransport("127.0.0.1", int(sys.argv[2])))
on_spi = ChipOnSpi(chip)
on_spi.waits = (0, 3, 1)
wired: "dict[str, Any]" = {"select_pin": 17}  # of the settings' table `board`: where the TPM's lines end


class Pin:
    """A pin by number or name; it remembers its level. Two of them may end at the TPM."""

    IN = 0
    OUT = 1
    PULL_UP = 1
    PULL_DOWN = 2

    def __init__(self, named: object, mode: int = -1, pull: int = -1, value: int = -1) -> None:
        self._named = named
        self._level = 0
        if value >= 0:
            self.value(value)

    def value(self, level: int = -1) -> int:
        """Puts out a level; the last one."""
        if level >= 0:
            self._level = level
            if self._named == wired["select_pin"]:
                on_spi.chip_select(level)
            elif level and self._named == wired.get("reset_pin", -1):
                chip.power_on()
        return self._level

    __call__ = value

    def on(self) -> None:
        """Puts out the high level."""
        self.value(1)

    def off(self) -> None:
        """Puts out the low level."""
        self.value(0)

    def toggle(self) -> None:
        """Puts out the other level."""
        self.value(1 - self._level)


class ADC:
    """A converter that reads half of what it could."""

    def __init__(self, pin: object) -> None:
        self.pin = pin

    def read_u16(self) -> int:
        """As `machine.ADC`."""
        return HALF


class RTC:
    """The clock of this machine goes right already."""

    def datetime(self, moment: "tuple[int, ...]") -> None:
        """Sets nothing."""


class WDT:
    """Is fed and does not bite: the time of this machine is not that of a board."""

    def __init__(self, timeout: int) -> None:
        self.timeout = timeout

    def feed(self) -> None:
        """Does nothing."""


class Machine:
    """The module `machine` of this board."""

    Pin = Pin
    ADC = ADC
    RTC = RTC
    WDT = WDT

    @staticmethod
    def SPI(number: int, baudrate: int = 0, **pins: "Any") -> ChipOnSpi:
        """The bus of the TPM."""
        return on_spi

    @staticmethod
    def I2C(number: int, freq: int = 0, **pins: "Any") -> ChipOnI2c:
        """The same TPM on the other bus."""
        return ChipOnI2c(chip)

    @staticmethod
    def unique_id() -> bytes:
        """Of this board there is one."""
        return b"the only"

    @staticmethod
    def reset() -> None:
        """Ends the board."""
        print("the board is reset")
        sys.exit(1)


class Network:
    """The module `network` of this board, which is joined for good."""

    STA_IF = AP_IF = 0

    class WLAN:
        """An interface that is up."""

        def __init__(self, interface: int = 0) -> None:
            self.interface = interface

        def active(self, on: bool = True) -> bool:
            """It is."""
            return True

        def isconnected(self) -> bool:
            """It is."""
            return True

        def connect(self, *words: str) -> None:
            """It is joined."""

    LAN = WLAN


def main() -> None:
    """Puts the image in the place of everything that is there."""
    import vfs  # type: ignore[import-not-found]

    board_life.BLOCKS = os.stat(sys.argv[1])[6] // board_life.BLOCK_BYTES
    flash = board_life.FileFlash(sys.argv[1])
    for name in list(sys.modules):  # the board loads its own, from its flash
        if name.split(".")[0] in ("dps_agent", "dps_hal", "dps_board", "support"):
            del sys.modules[name]
    sys.modules["machine"] = Machine  # type: ignore[assignment]
    sys.modules["network"] = Network  # type: ignore[assignment]
    if sys.argv[3:] == ["fat"]:  # as the firmware of an STM32 makes it
        vfs.VfsFat.mkfs(flash)
        vfs.mount(vfs.VfsFat(flash), "/")
    else:
        vfs.mount(vfs.VfsLfs2(flash, progsize=256, readsize=256), "/")
    os.chdir("/")
    try:
        with open("config.json") as file:
            wired.update(json.load(file).get("board", {}))
    except (OSError, ValueError):
        pass  # nothing is deployed yet, or only a part
    sys.path[:] = ["", ".frozen", "/lib"]
    gc.collect()


main()
if sys.argv[3:] == ["enrol"]:
    import dps_board.factory

    dps_board.factory.print_enrolment()
if sys.argv[3:] == ["run"]:
    for name in ("boot.py", "main.py"):
        with open(name) as file:
            exec(file.read(), {"__name__": "__main__"})
    if chip.violations:
        print("violations: " + ", ".join(chip.violations))
