"""A TPM's registers over SPI, on CPython and MicroPython: PTP (see `tis`), the SPI binding.

The bus is set up by the caller: mode 0, 8 bits, MSB first, 1 to 10 MHz, and a chip select that is a pin of its own.
"""

import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final, Protocol

    class Spi(Protocol):
        """What of `machine.SPI` is used; all of it leaves the chip select alone."""

        def write_readinto(self, content: bytes, into: bytearray) -> object: ...

        def readinto(self, into: "bytearray | memoryview") -> object: ...

        def write(self, content: "bytes | memoryview") -> object: ...

    class Pin(Protocol):
        """A `machine.Pin`: called with the level to put out."""

        def __call__(self, level: int) -> object: ...


_CAPABILITY: "Final" = 0x014  # TPM_INTF_CAPABILITY_x, with the next two
_FRAME_BYTES: "Final" = (4, 8, 32, 64)  # DataTransferSizeSupport is the index
_CAPABILITY_ZERO: "Final" = 0x0FFFF000
_WAIT_BYTES: "Final" = 250  # of wait states after an SPI header; parts need a few, and other drivers give up after 50


class SpiBus:
    """A TPM on SPI."""

    name = "SPI"
    frame_bytes = 4

    def __init__(self, spi: "Spi", chip_select: "Pin") -> None:
        """`chip_select(0)` selects the TPM; it stays low over a whole frame, wait states included."""
        self._spi = spi
        self._chip_select = chip_select
        self._answer = bytearray(4)
        self._one = bytearray(1)
        chip_select(1)

    def start(self) -> None:
        """As `Bus.start`."""
        capability = bytearray(4)
        self.read_into(_CAPABILITY, capability)
        bits = int.from_bytes(capability, "little")
        if bits & _CAPABILITY_ZERO:
            raise OSError(f"expected a TPM's interface capability; came 0x{bits:08x}")
        self.frame_bytes = _FRAME_BYTES[bits >> 9 & 3]

    def read_into(self, register: int, into: "bytearray | memoryview") -> None:
        """As `Bus.read_into`."""
        try:
            self._begin(0x80, register, len(into))
            self._spi.readinto(into)
        finally:
            self._chip_select(1)

    def write(self, register: int, content: "bytes | memoryview") -> None:
        """As `Bus.write`."""
        try:
            self._begin(0, register, len(content))
            self._spi.write(content)
        finally:
            self._chip_select(1)

    def agrees(self, content: "bytes | bytearray") -> bool:
        """As `Bus.agrees`; SPI has no checksum."""
        return True

    def _begin(self, direction: int, register: int, count: int) -> None:
        """Header and wait states: the last bit of the answer to the header, or to a byte after it, lets data follow."""
        self._chip_select(0)
        answer = self._answer
        self._spi.write_readinto(struct.pack(">BBH", direction | count - 1, 0xD4, register), answer)
        last = answer[3]
        for _ in range(_WAIT_BYTES):
            if last & 1:
                return
            self._spi.readinto(self._one)
            last = self._one[0]
        raise OSError(f"the TPM keeps the SPI bus waiting at register 0x{register:03x}")
