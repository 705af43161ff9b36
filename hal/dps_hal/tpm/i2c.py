"""A TPM's registers over I2C, on CPython and MicroPython: PTP (see `tis`), the I2C binding.

The bus is set up by the caller: 100 or 400 kHz, and a time limit that lets the TPM stretch the clock.
"""

from dps_hal.platform import ms_since, pause_us, ticks_ms
from dps_hal.tpm.tis import ACCESS, DID_VID, RID

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, Final, Protocol

    class I2c(Protocol):
        """What of `machine.I2C` is used; each ends with a stop condition, and OSError says that nobody acknowledged."""

        def writeto(self, address: int, content: bytes) -> object: ...

        def readfrom_into(self, address: int, into: "bytearray | memoryview") -> object: ...


_ADDRESS: "Final" = 0x2E  # the default of TPM_I2C_DEVICE_ADDRESS
_REGISTERS: "Final" = {ACCESS: 0x04, DID_VID: 0x48, RID: 0x4C}  # PTP, table 51: those with other numbers
_LOCALITY: "Final" = 0x00
_CAPABILITY: "Final" = 0x30
_CHECKSUM_ENABLE: "Final" = 0x40
_CHECKSUM: "Final" = 0x44
_GUARD_US: "Final" = 250  # PTP 8.1.10: before the capability is known, and after a byte that was not acknowledged
_GUARD_FLAGS: "Final" = 0x001E0000  # after which pairs of reads and writes the guard time is needed
_GUARD_SHIFT: "Final" = 9
_BUSY_MS: "Final" = 750  # TIMEOUT_A


class I2cBus:
    """A TPM on I2C, its checksum in use where it has one."""

    name = "I2C"
    frame_bytes = 64

    def __init__(self, i2c: "I2c", address: int = _ADDRESS) -> None:
        self._i2c = i2c
        self._address = address
        self._guard_us = _GUARD_US
        self._has_checksum = False

    def start(self) -> None:
        """As `Bus.start`: guard time, locality 0, checksum."""
        self._guard_us = _GUARD_US
        capability = bytearray(4)
        self.read_into(_CAPABILITY, capability)
        bits = int.from_bytes(capability, "little")
        if bits >> 31:
            raise OSError(f"expected an I2C TPM's interface capability; came 0x{bits:08x}")
        self._guard_us = bits >> _GUARD_SHIFT & 0xFF if bits & _GUARD_FLAGS else 0
        self._transfer(self._i2c.writeto, bytes([_LOCALITY, 0]))
        self.write(_CHECKSUM_ENABLE, b"\x01")
        enabled = bytearray(1)
        self.read_into(_CHECKSUM_ENABLE, enabled)
        self._has_checksum = enabled[0] == 1

    def read_into(self, register: int, into: "bytearray | memoryview") -> None:
        """As `Bus.read_into`."""
        self._transfer(self._i2c.writeto, bytes([_REGISTERS.get(register, register)]))
        self._transfer(self._i2c.readfrom_into, into)

    def write(self, register: int, content: "bytes | memoryview") -> None:
        """As `Bus.write`."""
        self._transfer(self._i2c.writeto, bytes([_REGISTERS.get(register, register)]) + content)

    def agrees(self, content: "bytes | bytearray") -> bool:
        """As `Bus.agrees`."""
        if not self._has_checksum:
            return True
        stated = bytearray(2)
        self.read_into(_CHECKSUM, stated)
        return int.from_bytes(stated, "big") == _crc16(content)

    def _transfer(self, transfer: "Callable[[int, Any], object]", content: "Any") -> None:
        """One transfer, again while the TPM does not acknowledge it: that is how it says that it is busy."""
        started_ms = ticks_ms()
        while True:
            try:
                transfer(self._address, content)
                break
            except OSError as error:
                if ms_since(started_ms) > _BUSY_MS:
                    raise error
                pause_us(_GUARD_US)
        if self._guard_us:
            pause_us(self._guard_us)


def _crc16(content: "bytes | bytearray") -> int:
    """CRC-16 of ITU-T X.25 with start value 0, not inverted, as TPM_DATA_CSUM has it."""
    crc = 0
    for byte in content:
        low = byte ^ crc & 0xFF
        low ^= low << 4 & 0xFF
        crc = crc >> 8 ^ low << 8 ^ low << 3 ^ low >> 4
    return crc
