"""A board made of a flash image and a TPM on SPI, under MicroPython's unix port: boots as firmware boots.

    micropython -X heapsize=1m -i image_board.py IMAGE TPM_PORT [run]        (MICROPYPATH=agent:hal:tests)

The image is mounted as the only file system. `machine` has the bus with a simulated TPM in front of the swtpm at
TPM_PORT, and an RTC that sets nothing. `run` runs boot.py and main.py; without it the prompt comes at once, to deploy
over it.
"""

import gc
import os
import sys

from dps_hal.tpm.tcp import SwtpmTransport
from support.board import board_life
from support.tpm.tis_chip import ChipOnSpi, TisChip

chip = TisChip(SwtpmTransport("127.0.0.1", int(sys.argv[2])))
on_spi = ChipOnSpi(chip)
on_spi.waits = (0, 3, 1)


class Pin:
    """The chip's select line, whatever its number."""

    OUT = 1

    def __init__(self, number: int, mode: int, value: int) -> None:
        self.number = number
        self.value(value)

    def value(self, level: int) -> None:
        """Puts out a level."""
        on_spi.chip_select(level)

    __call__ = value


class RTC:
    """The clock of this machine goes right already."""

    def datetime(self, moment: "tuple[int, ...]") -> None:
        """Sets nothing."""


class Machine:
    """The module `machine` of this board."""

    Pin = Pin
    RTC = RTC

    @staticmethod
    def SPI(number: int, baudrate: int) -> ChipOnSpi:
        """The bus of the TPM."""
        return on_spi


def main() -> None:
    """Puts the image in the place of everything that is there."""
    import vfs  # type: ignore[import-not-found]

    board_life.BLOCKS = os.stat(sys.argv[1])[6] // board_life.BLOCK_BYTES
    flash = board_life.FileFlash(sys.argv[1])
    for name in list(sys.modules):  # the board loads its own, from its flash
        if name.split(".")[0] in ("dps_agent", "dps_hal", "dps_board", "support"):
            del sys.modules[name]
    sys.modules["machine"] = Machine  # type: ignore[assignment]
    if sys.argv[3:] == ["fat"]:  # as the firmware of an STM32 makes it
        vfs.VfsFat.mkfs(flash)
        vfs.mount(vfs.VfsFat(flash), "/")
    else:
        vfs.mount(vfs.VfsLfs2(flash, progsize=256, readsize=256), "/")
    os.chdir("/")
    sys.path[:] = ["", ".frozen", "/lib"]
    gc.collect()


main()
if sys.argv[3:] == ["run"]:
    for name in ("boot.py", "main.py"):
        with open(name) as file:
            exec(file.read(), {"__name__": "__main__"})
    if chip.violations:
        print("violations: " + ", ".join(chip.violations))
