"""A TPM on SPI or I2C, simulated register by register; what it gets as a command goes to a real one behind a transport.

Written from the PTP, not from the driver: `violations` has every step that a real part need not forgive. It counts
register accesses where a part has time, so that a run is the same each time. It runs on CPython and MicroPython.

    micropython tests/support/tpm/tis_chip.py BUS PORT OTHER_PORT          (in the checkout; BUS: spi or i2c)

runs the contract of every Tpm through it against two swtpm, as `wire_contract.py` does without it.
"""

import struct
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from dps_hal.tpm.commands import Transport

IDLE = "idle"
READY = "ready"
RECEPTION = "reception"
EXECUTION = "execution"
COMPLETION = "completion"

_PATIENCE = 50_000  # readings of the status for one command

INFINEON_SLB9672 = (0x15D1, 0x001D, 0x36)
ST_ST33 = (0x104A, 0x0000, 0x4E)
NUVOTON_NPCT75X = (0x1050, 0x00FC, 0x01)


class EchoTpm:
    """A transport that answers each command by itself: a header of success, then the command's bytes, inverted."""

    def __init__(self) -> None:
        self.commands: list[bytes] = []

    def send(self, command: bytes, limit_s: float, while_waiting: "Callable[[], None] | None") -> bytes:
        """As `Transport.send`."""
        self.commands.append(command)
        return echo_of(command)

    def close(self) -> None:
        """As `Transport.close`."""


def echo_of(command: bytes) -> bytes:
    """What `EchoTpm` answers."""
    return struct.pack(">HII", 0x8001, 10 + len(command), 0) + bytes([byte ^ 0xFF for byte in command])


class TisChip:
    """Registers by their PTP offsets in locality 0, and the state machine of the FIFO interface.

    The attributes without underscore are the part's manners, to be set by a test at any time.
    """

    def __init__(self, tpm: "Transport", identity: "tuple[int, int, int]" = INFINEON_SLB9672) -> None:
        self.identity = identity
        self.bursts: tuple[int, ...] = (64,)  # what it states, in turn
        self.transfer_size = 3  # DataTransferSizeSupport: 64 bytes
        self.polls_until_valid = 0  # of the access register, after power on
        self.polls_until_ready = 0  # of the status, after commandReady
        self.polls_until_done = 0  # of the status, after tpmGo
        self.polls_until_expect = 0  # of the status, after the last byte of a command, while Expect is still set
        self.busy_every = 0  # each so many readings of the status are without stsValid and with a burst of 0
        self.hangs = False  # never finishes a command
        self.ignores_abort = False  # commandReady does nothing while it executes
        self.lose_locality_after = -1  # accesses of the FIFO, then another locality seizes the TPM
        self.other_locality_stays = False
        self.spoil_response: Callable[[bytes], bytes] | None = None  # what goes out the first time, not after retry
        self.spoil_command: Callable[[bytes], bytes] | None = None  # what came in, once
        self.violations: list[str] = []
        self.retries = 0  # responseRetry, asked for
        self.aborts = 0  # executions ended by commandReady
        self.fifo_accesses = 0
        self._tpm = tpm
        self._polls = 0
        self._patience = 0
        self.power_on()

    def power_on(self) -> None:
        """What the bus's reset does: nothing under way, no locality."""
        self.state = IDLE
        self.active = False
        self._command = b""
        self._response = b""
        self._genuine = b""
        self._at = 0
        self._credit = 0
        self._until = 0
        self._expect_until = 0
        self._valid_until = self.polls_until_valid
        self._turn = 0
        self._patience = _PATIENCE

    # --- the bus's side

    def read(self, register: int, count: int) -> bytes:
        """`count` bytes from a register on."""
        if register == 0x000:
            return self._padded(bytes([self._access()]), count)
        if register == 0x014:
            return self._padded(struct.pack("<I", 0x30000097 | self.transfer_size << 9), count)
        if register == 0x018:
            return self._padded(struct.pack("<I", self._status()), count)
        if register == 0x024:
            return self._give(count)
        if register == 0xF00:
            return self._padded(struct.pack("<HH", self.identity[0], self.identity[1]), count)
        if register == 0xF04:
            return self._padded(bytes([self.identity[2]]), count)
        self.violations.append(f"reads register 0x{register:03x}")
        return b"\xff" * count

    def write(self, register: int, content: bytes) -> None:
        """Writes to a register."""
        if register == 0x000 and len(content) == 1:
            self._write_access(content[0])
        elif register == 0x018 and len(content) == 1 and self.active:
            self._write_status(content[0])
        elif register == 0x024 and self.active:
            self._receive(content)
        elif self.active:
            self.violations.append(f"writes {len(content)} bytes to register 0x{register:03x}")

    def checksum(self) -> int:
        """CRC-16/KERMIT of the command as it came, or of the response that it has ready."""
        crc = 0
        for byte in self._genuine if self.state == COMPLETION else self._command:
            crc ^= byte
            for _ in range(8):
                crc = crc >> 1 ^ (0x8408 if crc & 1 else 0)
        return crc

    # --- registers

    @staticmethod
    def _padded(content: bytes, count: int) -> bytes:
        return (content + b"\xff" * count)[:count]

    def _access(self) -> int:
        if self._valid_until:
            self._valid_until -= 1
            return 0x01
        return 0xA1 if self.active else 0x81

    def _write_access(self, value: int) -> None:
        if value == 0x02:
            self.active = self.active or not self.other_locality_stays
        elif value == 0x20:
            self.active = False
            self.state = IDLE
            self._tpm.close()
        else:
            self.violations.append(f"writes 0x{value:02x} to its access register")

    def _status(self) -> int:
        if not self.active:
            return 0xFFFFFFFF
        self._polls += 1
        self._patience -= 1
        if self._patience < 0:
            raise RuntimeError("the driver looks at the status without end")
        if self.busy_every and self._polls % self.busy_every == 0:
            self._credit = 0
            return 0x0
        self._count_down()
        value = 0x84  # stsValid, selfTestDone
        left = 0
        if self.state == READY:
            value |= 0x40
            left = 4096
        elif self.state == RECEPTION:
            left = 4096
            if self._wants_more() or self._expect_until:
                value |= 0x08
        elif self.state == COMPLETION:
            left = len(self._response) - self._at
            if left:
                value |= 0x10
        self._credit = min(left, self.bursts[self._turn % len(self.bursts)])
        self._turn += 1
        return 0x04000000 | self._credit << 8 | value  # tpmFamily: 2.0

    def _count_down(self) -> None:
        """One reading of the status is the unit of time."""
        if self.state == RECEPTION and not self._wants_more() and self._expect_until:
            self._expect_until -= 1
        if self._until:
            self._until -= 1
            if not self._until and self.state == IDLE:
                self.state = READY
            elif not self._until and self.state == EXECUTION:
                self._finish()

    def _write_status(self, value: int) -> None:
        if value == 0x40:
            self._command_ready()
        elif value == 0x20:
            if self.state != RECEPTION or self._wants_more():
                self.violations.append(f"tpmGo in {self.state}")
                return
            self.state = EXECUTION
            self._until = 1 + self.polls_until_done
        elif value == 0x02:
            if self.state != COMPLETION:
                self.violations.append(f"responseRetry in {self.state}")
                return
            self.retries += 1
            self._at = 0
            self._response = self._genuine
        else:
            self.violations.append(f"writes 0x{value:02x} to its status")

    def _command_ready(self) -> None:
        if self.state == EXECUTION:
            if self.ignores_abort:
                return
            self.aborts += 1
        if self.state in (RECEPTION, EXECUTION, COMPLETION):
            self.state = IDLE
            self._until = 0
        elif self.state == IDLE and not self._until:
            self._until = self.polls_until_ready
            if not self._until:
                self.state = READY
        self._command = self._response = self._genuine = b""
        self._at = 0
        self._expect_until = self.polls_until_expect

    def _wants_more(self) -> bool:
        size = int.from_bytes(self._command[2:6], "big") if len(self._command) >= 6 else 10
        return len(self._command) < max(size, 10)

    def _finish(self) -> None:
        if self.hangs:
            self._until = 1
            return
        self._genuine = self._response = self._tpm.send(self._command, 200, None)
        if self.spoil_response is not None:
            self._response = self.spoil_response(self._genuine)
        self._at = 0
        self._patience = _PATIENCE
        self.state = COMPLETION

    # --- the FIFO

    def _used(self, count: int) -> bool:
        """Whether the FIFO may still be used; counts, and loses the locality when its time has come."""
        self.fifo_accesses += 1
        if self.lose_locality_after == 0:
            self.active = False
            self.state = IDLE
        if self.lose_locality_after >= 0:
            self.lose_locality_after -= 1
        if count > self._credit:
            self.violations.append(f"{count} bytes where the burst count was {self._credit}")
        self._credit -= count
        return self.active

    def _receive(self, content: bytes) -> None:
        if not self._used(len(content)):
            return
        if self.state not in (READY, RECEPTION):
            self.violations.append(f"a command in {self.state}")
            return
        self.state = RECEPTION
        if self.spoil_command is not None:
            content = self.spoil_command(content)
            self.spoil_command = None
        if not self._wants_more():
            self.violations.append("more bytes than the command has")
            return
        self._command += content

    def _give(self, count: int) -> bytes:
        if not self.active or not self._used(count):
            return b"\xff" * count
        if self.state != COMPLETION:
            self.violations.append(f"reads a response in {self.state}")
            return b"\xff" * count
        piece = self._response[self._at : self._at + count]
        self._at += len(piece)
        return self._padded(piece, count)


class ChipOnSpi:
    """Shaped as `machine.SPI`; `chip_select` is its pin. Full duplex, byte by byte, wait states behind the header."""

    def __init__(self, chip: TisChip) -> None:
        self.chip = chip
        self.waits: tuple[int, ...] = (0,)  # wait bytes of a frame, in turn; -1: for ever
        self.dead: int | None = None  # what MISO reads where nobody drives it
        self.disturb: Callable[[int, bool], int] = lambda byte, outgoing: byte  # both directions of the wire
        self.frames = 0
        self.bytes = 0
        self._selected = self._released = False
        self._header = self._data = self._out = b""
        self._waits = self._count = 0
        self._register = -1

    def chip_select(self, level: int) -> None:
        """The pin; a frame is done when it goes high."""
        if self._selected and level and self._data:
            self._finish()
        if not level:
            if self._selected:
                self.chip.violations.append("selected twice")
            self.frames += 1
            self._header = b""
            self._data = b""
            self._out = b""
            self._waits = self.waits[self.frames % len(self.waits)]
            self._released = False
        self._selected = not level

    def write_readinto(self, content: bytes, into: bytearray) -> None:
        """As `machine.SPI.write_readinto`."""
        for at, byte in enumerate(content):
            into[at] = self._clock(byte)

    def readinto(self, into: "bytearray | memoryview") -> None:
        """As `machine.SPI.readinto`."""
        for at in range(len(into)):
            into[at] = self._clock(0)

    def write(self, content: "bytes | memoryview") -> None:
        """As `machine.SPI.write`."""
        for byte in content:
            self._clock(byte)

    def _clock(self, byte: int) -> int:
        self.bytes += 1
        if self.dead is not None:
            return self.dead
        if not self._selected:
            self.chip.violations.append("clocks without chip select")
            return 0xFF
        return self.disturb(self._answer(self.disturb(byte, True)), False)

    def _answer(self, byte: int) -> int:
        if len(self._header) < 4:
            self._header += bytes([byte])
            if len(self._header) < 4:
                return 0
            return self._wait_or_go()
        if not self._released:
            return self._wait_or_go()
        self._data += bytes([byte])
        if len(self._data) > self._count:
            self.chip.violations.append(f"more than the {self._count} bytes that the header says")
            return 0xFF
        return self._out[len(self._data) - 1] if self._out else 0xFF

    def _wait_or_go(self) -> int:
        if self._waits:
            self._waits -= 1
            return 0
        self._released = True
        self._count = (self._header[0] & 0x3F) + 1
        self._register = int.from_bytes(self._header[2:4], "big")
        if self._header[0] & 0x40 or self._header[1] != 0xD4:
            self._out = b"\xff" * self._count
            self._register = -1
        elif self._header[0] & 0x80:
            self._out = self.chip.read(self._register, self._count)
        return 1

    def _finish(self) -> None:
        if self._out or self._register < 0:
            return
        if len(self._data) != self._count:
            self.chip.violations.append(f"{len(self._data)} of {self._count} bytes of a frame")
        self.chip.write(self._register, self._data)


class ChipOnI2c:
    """Shaped as `machine.I2C`, the TPM at 0x2E; with TPM_DATA_CSUM unless told otherwise."""

    def __init__(self, chip: TisChip) -> None:
        self.chip = chip
        self.has_checksum = True
        self.busy_every = 0  # each so many transfers are not acknowledged
        self.dead = False  # nobody acknowledges
        self.disturb: Callable[[int, bool], int] = lambda byte, outgoing: byte
        self.capability = 0x1AE00082
        self.transfers = 0
        self.checksums = 0  # read
        self._checksum_enabled = 0
        self._register = -1

    def writeto(self, address: int, content: bytes) -> int:
        """As `machine.I2C.writeto`: the register's number, then what is written to it."""
        self._acknowledge(address)
        content = bytes([self.disturb(byte, True) for byte in content])
        self._register = content[0]
        if len(content) > 1:
            self._write(self._register, content[1:])
        return len(content)

    def readfrom_into(self, address: int, into: "bytearray | memoryview") -> None:
        """As `machine.I2C.readfrom_into`: what the register has that was named last."""
        self._acknowledge(address)
        content = self._read(self._register, len(into))
        for at in range(len(into)):  # a disturbed register number may name a shorter register
            into[at] = self.disturb(content[at] if at < len(content) else 0xFF, False)

    def _acknowledge(self, address: int) -> None:
        self.transfers += 1
        if self.dead or address != 0x2E or (self.busy_every and self.transfers % self.busy_every == 0):
            raise OSError(5)

    def _write(self, register: int, content: bytes) -> None:
        if register == 0x00:
            if content != b"\x00":
                self.chip.violations.append("another locality than 0")
        elif register == 0x40:
            self._checksum_enabled = content[0] if self.has_checksum else 0
        elif register in _FIFO_REGISTERS:
            self.chip.write(_FIFO_REGISTERS[register], content)
        else:
            self.chip.violations.append(f"writes I2C register 0x{register:02x}")

    def _read(self, register: int, count: int) -> bytes:
        if register == 0x30:
            return struct.pack("<I", self.capability)[:count]
        if register == 0x40:
            return bytes([self._checksum_enabled])
        if register == 0x44 and self._checksum_enabled:
            self.checksums += 1
            return struct.pack(">H", self.chip.checksum())
        if register in _FIFO_REGISTERS:
            return self.chip.read(_FIFO_REGISTERS[register], count)
        self.chip.violations.append(f"reads I2C register 0x{register:02x}")
        return b"\xff" * count


_FIFO_REGISTERS = {0x04: 0x000, 0x18: 0x018, 0x24: 0x024, 0x48: 0xF00, 0x4C: 0xF04}


def transport_on(bus: str, chip: TisChip) -> "Transport":
    """The product's driver of a chip on "spi" or "i2c", with nothing in its way."""
    from dps_hal.tpm.tis import TisTransport

    if bus == "spi":
        from dps_hal.tpm.spi import SpiBus

        spi = ChipOnSpi(chip)
        spi.waits = (0, 3, 1)
        return TisTransport(SpiBus(spi, spi.chip_select))
    from dps_hal.tpm.i2c import I2cBus

    i2c = ChipOnI2c(chip)
    i2c.busy_every = 11
    return TisTransport(I2cBus(i2c))


def main(bus: str, ports: "list[str]") -> int:
    """Runs the contract; the count of violations is that of both chips."""
    sys.path[:0] = ["agent", "hal", "tests"]
    from dps_hal.tpm.tcp import SwtpmTransport
    from support.tpm import wire_contract

    chips: list[TisChip] = []

    def on_a_bus(port: int) -> "Transport":
        chips.append(TisChip(SwtpmTransport("127.0.0.1", port)))
        chips[-1].bursts = (128, 31, 7)
        return transport_on(bus, chips[-1])

    status = wire_contract.main(ports, on_a_bus)
    violations = [violation for chip in chips for violation in chip.violations]
    print("violations: " + ", ".join(violations) if violations else "no violations")
    return 1 if status or violations else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
