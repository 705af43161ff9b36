"""The driver of a TPM on SPI or I2C, register by register: what a part may do, and what a bus may do to it."""

import struct

from dps_hal import platform
from dps_hal.errors import AskOperator, DpsError, RetryLater
from dps_hal.platform import ms_since, ticks_ms
from dps_hal.tpm.i2c import I2cBus
from dps_hal.tpm.spi import SpiBus
from dps_hal.tpm.tis import TisTransport
from support.claims import assert_refused
from support.tpm.tis_chip import (
    INFINEON_SLB9672,
    NUVOTON_NPCT75X,
    ST_ST33,
    ChipOnI2c,
    ChipOnSpi,
    EchoTpm,
    TisChip,
    echo_of,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    pass

LIMIT_S = 5.0
BUSES = ("spi", "i2c")


def command_of(size: int) -> bytes:
    """A command of `size` bytes whose bytes tell where they belong."""
    return struct.pack(">HII", 0x8001, size, 0x17A) + bytes([(at * 7 + 3) & 0xFF for at in range(size - 10)])


class Setup:
    """A chip with a TPM behind it that answers each command by its inverse, the driver, and what lies between."""

    def __init__(
        self, bus: str, identity: "tuple[int, int, int]" = INFINEON_SLB9672, reset_wired: bool = False
    ) -> None:
        self.tpm = EchoTpm()
        self.chip = TisChip(self.tpm, identity)
        self.spi = ChipOnSpi(self.chip)
        self.i2c = ChipOnI2c(self.chip)
        self.wire = self.spi if bus == "spi" else self.i2c
        self.resets: list[int] = []
        driver = SpiBus(self.spi, self.spi.chip_select) if bus == "spi" else I2cBus(self.i2c)
        self.transport = TisTransport(driver, self.reset_line if reset_wired else None)

    def reset_line(self, level: int) -> None:
        """RST#: the part starts anew when it goes high again."""
        self.resets.append(level)
        if level:
            self.chip.hangs = self.chip.ignores_abort = False
            self.chip.power_on()

    def send(self, size: int, reproduce: str = "", limit_s: float = LIMIT_S) -> None:
        """A command there and its answer back, in full and by the rules."""
        command = command_of(size)
        response = self.transport.send(command, limit_s, None)
        assert response == echo_of(command), reproduce
        assert self.tpm.commands[-1] == command, reproduce
        assert self.chip.violations == [], f"{reproduce}: {self.chip.violations}"


def test_commands_of_every_length_pass_in_bursts_of_every_length() -> None:
    for bus in BUSES:
        for burst in (1, 2, 7, 31, 32, 63, 64, 65, 128):
            setup = Setup(bus)
            setup.chip.bursts = (burst,)
            for size in (10, 11, 12, 63, 64, 65, 74, 75, 128, 129, 300):
                setup.send(size, f"bus={bus} burst={burst} size={size}")


def test_a_burst_count_may_change_at_each_look() -> None:
    for bus in BUSES:
        setup = Setup(bus)
        setup.chip.bursts = (64, 1, 17, 128, 3)
        for size in range(10, 150, 9):
            setup.send(size, f"bus={bus} size={size}")


def test_no_frame_is_longer_than_the_part_says() -> None:
    for transfer_size, frame_bytes in enumerate((4, 8, 32, 64)):
        setup = Setup("spi")
        setup.chip.transfer_size = transfer_size
        setup.chip.bursts = (128,)
        lengths: list[int] = []
        receive = setup.chip.write

        def write(register: int, content: bytes, receive=receive, lengths=lengths) -> None:  # type: ignore[no-untyped-def]
            lengths.append(len(content))
            receive(register, content)

        setup.chip.write = write  # type: ignore[method-assign]
        setup.send(200)
        assert max(lengths) == frame_bytes


def test_wait_states_of_every_length_are_waited_for() -> None:
    for waits in ((0,), (1,), (2, 0), (5, 1, 0), (50,), (200,)):
        setup = Setup("spi")
        setup.spi.waits = waits
        setup.send(100, f"waits={waits}")


def test_a_bus_that_waits_for_ever_ends() -> None:
    setup = Setup("spi")
    setup.spi.waits = (-1,)
    error = assert_refused(lambda: setup.send(10), RetryLater, "tpm.absent")
    assert "waiting" in error.message


def test_a_busy_part_is_waited_for() -> None:
    for bus in BUSES:
        for every in (2, 3, 5):
            setup = Setup(bus)
            setup.chip.busy_every = every
            setup.chip.bursts = (16,)
            setup.i2c.busy_every = every
            setup.chip.polls_until_valid = setup.chip.polls_until_ready = setup.chip.polls_until_done = 3
            setup.chip.polls_until_expect = 4
            setup.chip.power_on()
            for size in (10, 64, 200):
                setup.send(size, f"bus={bus} every={every} size={size}")
            setup.transport.close()


def test_parts_of_the_makers_pass_with_their_manners() -> None:
    for identity, bursts, waits in (
        (INFINEON_SLB9672, (64,), (0,)),
        (ST_ST33, (32,), (1, 2)),
        (NUVOTON_NPCT75X, (64, 1), (3,)),
        ((0x1234, 0x5678, 0x01), (8,), (1,)),  # nobody's that we know of
    ):
        setup = Setup("spi", identity)
        setup.chip.bursts = bursts
        setup.spi.waits = waits
        setup.send(300)
        assert setup.transport.identity == identity


def test_a_bus_without_a_tpm_says_so_within_seconds() -> None:
    for dead in (0x00, 0xFF, 0xA5):
        setup = Setup("spi")
        setup.spi.dead = dead
        started_ms = ticks_ms()
        error = assert_refused(lambda setup=setup: setup.send(10), RetryLater, "tpm.absent", f"dead={dead}")  # type: ignore[misc]
        assert "SPI" in error.message and ms_since(started_ms) < 3000
    setup = Setup("i2c")
    setup.i2c.dead = True
    error = assert_refused(lambda: setup.send(10), RetryLater, "tpm.absent")
    assert "I2C" in error.message


def test_what_is_no_tpm_is_refused() -> None:
    for bus in BUSES:
        for vendor in (0x0000, 0xFFFF):
            setup = Setup(bus, (vendor, 0x1234, 1))
            error = assert_refused(lambda setup=setup: setup.send(10), RetryLater, "tpm.absent", f"vendor={vendor}")  # type: ignore[misc]
            assert "vendor" in error.message
            assert setup.tpm.commands == []


def test_a_tpm_that_comes_later_is_found_then() -> None:
    for bus in BUSES:
        setup = Setup(bus)
        setup.spi.dead = 0xFF
        setup.i2c.dead = True
        assert_refused(lambda setup=setup: setup.send(10), RetryLater, "tpm.absent", f"bus={bus}")  # type: ignore[misc]
        setup.transport.close()
        setup.spi.dead = None
        setup.i2c.dead = False
        setup.send(10, f"bus={bus}")


def test_a_tpm_that_never_answers_is_left_at_the_limit_and_takes_the_next_command() -> None:
    for bus in BUSES:
        setup = Setup(bus)
        waits: list[int] = []
        setup.send(20)
        setup.chip.hangs = True
        started_ms = ticks_ms()
        send = setup.transport.send
        error = assert_refused(
            lambda send=send, waits=waits: send(command_of(20), 2.2, lambda: waits.append(1)),  # type: ignore[misc]
            RetryLater,
            "tpm.timeout",
            f"bus={bus}",
        )
        took_ms = ms_since(started_ms)
        assert 2200 <= took_ms < 3200, f"bus={bus}: {took_ms} ms"
        assert len(waits) >= 2, f"bus={bus}: {waits}"
        assert "answer" in error.message
        setup.transport.close()
        assert setup.chip.aborts == 1 and not setup.chip.active
        setup.chip.hangs = False
        setup.send(33, f"bus={bus}")


def test_a_tpm_that_hangs_is_reset_before_the_next_command_and_one_that_answers_never() -> None:
    for bus in BUSES:
        setup = Setup(bus, reset_wired=True)
        setup.send(20)
        setup.transport.close()
        setup.send(20)
        assert setup.resets == [], f"bus={bus}"
        setup.chip.hangs = setup.chip.ignores_abort = True
        send = setup.transport.send
        assert_refused(lambda send=send: send(command_of(20), 0.3, None), RetryLater, "tpm.timeout", f"bus={bus}")  # type: ignore[misc]
        setup.transport.close()
        assert setup.resets == [], f"bus={bus}: nobody asks it anything"
        setup.send(33, f"bus={bus}")
        assert setup.resets == [0, 1], f"bus={bus}"
        setup.transport.close()
        setup.send(33, f"bus={bus}")
        assert setup.resets == [0, 1], f"bus={bus}"


def test_a_tpm_that_is_not_there_is_reset_too_and_without_the_wire_it_hangs_on() -> None:
    for bus in BUSES:
        setup = Setup(bus, reset_wired=True)
        setup.spi.dead = 0xFF
        setup.i2c.dead = True
        assert_refused(lambda setup=setup: setup.send(10), RetryLater, "tpm.absent", f"bus={bus}")  # type: ignore[misc]
        assert setup.resets == []
        setup.spi.dead = None
        setup.i2c.dead = False
        setup.send(10, f"bus={bus}")
        assert setup.resets == [0, 1]
        other = Setup(bus)
        other.chip.hangs = other.chip.ignores_abort = True
        for _ in range(2):
            send = other.transport.send
            assert_refused(lambda send=send: send(command_of(20), 0.3, None), RetryLater, "tpm.timeout", f"bus={bus}")  # type: ignore[misc]
            other.transport.close()


def test_what_a_reset_left_under_way_is_ended_first() -> None:
    for bus in BUSES:
        for left in ("command", "execution", "response", "idle"):
            setup = Setup(bus)
            setup.chip.write(0x000, b"\x02")
            setup.chip.write(0x018, b"\x40")
            if left != "idle":
                setup.chip.read(0x018, 4)
                setup.chip.write(0x024, command_of(20)[: 9 if left == "command" else 20])
            if left in ("execution", "response"):
                setup.chip.polls_until_done = 0 if left == "response" else 1000
                setup.chip.write(0x018, b"\x20")
                setup.chip.read(0x018, 4)
                setup.chip.polls_until_done = 0
            setup.tpm.commands[:] = []
            setup.send(40, f"bus={bus} left={left}")
            assert len(setup.tpm.commands) == 1


def test_a_command_that_can_not_be_aborted_gets_the_time_of_the_next() -> None:
    for bus in BUSES:
        setup = Setup(bus)
        setup.chip.write(0x000, b"\x02")
        setup.chip.write(0x018, b"\x40")
        setup.chip.read(0x018, 4)
        setup.chip.write(0x024, command_of(20))
        setup.chip.polls_until_done = 60
        setup.chip.write(0x018, b"\x20")
        setup.chip.polls_until_done = 0
        setup.chip.ignores_abort = True
        setup.send(40, f"bus={bus}")
        setup.chip.polls_until_done = 1_000_000
        setup.transport.close()
        setup.chip.write(0x000, b"\x02")
        setup.chip.write(0x018, b"\x40")
        setup.chip.write(0x018, b"\x40")
        setup.chip.read(0x018, 4)
        setup.chip.write(0x024, command_of(20))
        setup.chip.write(0x018, b"\x20")
        send = setup.transport.send
        error = assert_refused(
            lambda send=send: send(command_of(20), 0.6, None),  # type: ignore[misc]
            RetryLater,
            "tpm.timeout",
            f"bus={bus}",
        )
        assert "ready" in error.message


def test_a_locality_that_is_lost_breaks_the_connection_and_comes_back() -> None:
    for bus in BUSES:
        for after in (0, 1, 2, 5, 9):
            setup = Setup(bus)
            setup.chip.bursts = (8,)
            setup.chip.lose_locality_after = after
            try:
                setup.transport.send(command_of(40), LIMIT_S, None)
            except OSError as error:
                assert "locality" in str(error), f"bus={bus} after={after}"
            else:
                raise AssertionError(f"bus={bus} after={after}: it went through")
            setup.transport.close()
            setup.chip.violations[:] = []  # it may have asked a TPM that did not listen
            setup.send(40, f"bus={bus} after={after}")


def test_a_locality_that_another_keeps_is_busy() -> None:
    for bus in BUSES:
        setup = Setup(bus, reset_wired=True)
        setup.chip.other_locality_stays = True
        for _ in range(2):
            assert_refused(lambda setup=setup: setup.send(10), RetryLater, "tpm.busy", f"bus={bus}")  # type: ignore[misc]
            setup.transport.close()
        setup.chip.other_locality_stays = False
        setup.send(10, f"bus={bus}")
        assert setup.resets == [], f"bus={bus}: nobody resets a TPM that another uses"


def test_closing_gives_the_locality_back_and_may_be_done_twice() -> None:
    for bus in BUSES:
        setup = Setup(bus)
        setup.transport.close()
        setup.send(10)
        assert setup.chip.active
        setup.transport.close()
        assert not setup.chip.active
        setup.transport.close()
        setup.send(10)
        setup.spi.dead = 0xFF
        setup.i2c.dead = True
        setup.transport.close()  # what it can't reach any more, it leaves


def test_a_command_whose_size_arrives_damaged_is_written_again() -> None:
    for size in (29, 31, 35, 286):  # the command has 30
        setup = Setup("spi")
        setup.chip.spoil_command = lambda content, size=size: content[:2] + struct.pack(">I", size) + content[6:]  # type: ignore[misc]
        setup.send(30, f"size={size}")
        assert len(setup.tpm.commands) == 1


def test_a_response_that_arrives_damaged_is_asked_for_again() -> None:
    for spoil in (
        lambda response: response[:2] + b"\xff\xff" + response[4:],
        lambda response: response[:5] + b"\x09" + response[6:],
        lambda response: response[:5] + bytes([response[5] - 1]) + response[6:],
        lambda response: response[:5] + bytes([response[5] + 1]) + response[6:],
        lambda response: response[:-3],
    ):
        setup = Setup("spi")
        setup.chip.spoil_response = spoil
        setup.send(30)
        assert setup.chip.retries == 1 and len(setup.tpm.commands) == 1


def test_the_checksum_finds_one_bit_in_command_and_response() -> None:
    for bit in (0, 9, 15, 48, 49, 100, 163, 200, 239):
        setup = Setup("i2c")
        setup.chip.spoil_command = lambda content, bit=bit: flip(content, bit)  # type: ignore[misc]
        setup.chip.spoil_response = lambda content, bit=bit: flip(content, bit)  # type: ignore[misc]
        setup.send(30, f"bit={bit}")
        assert setup.chip.retries == 1 and len(setup.tpm.commands) == 1


def test_a_part_without_checksum_is_used_without() -> None:
    setup = Setup("i2c")
    setup.i2c.has_checksum = False
    setup.send(100)
    assert setup.i2c.checksums == 0
    with_checksum = Setup("i2c")
    with_checksum.send(100)
    assert with_checksum.i2c.checksums == 2


def test_a_checksum_that_never_agrees_ends_in_an_error() -> None:
    for reading in (True, False):
        setup = Setup("i2c")
        setup.send(10)
        checksum = setup.chip.checksum
        chip = setup.chip
        if reading:
            chip.checksum = lambda checksum=checksum: checksum() ^ 1  # type: ignore[method-assign,misc]
        else:
            chip.checksum = lambda chip=chip, checksum=checksum: checksum() ^ (chip.state == "completion")  # type: ignore[method-assign,misc]
        executed = len(setup.tpm.commands)
        try:
            setup.transport.send(command_of(20), LIMIT_S, None)
        except OSError as error:
            assert "checksum" in str(error)
        else:
            raise AssertionError("it went through")
        assert len(setup.tpm.commands) == executed + (0 if reading else 1)  # tpmGo only for what arrived well


def test_the_guard_time_is_the_parts_own() -> None:
    started_ms = ticks_ms()
    setup = Setup("i2c")
    setup.i2c.capability = 0x00020000 | 0xFF << 9 | 0x82  # 255 us between two writes
    setup.send(10)
    slow_ms = ms_since(started_ms)
    assert slow_ms * 1000 >= setup.i2c.transfers * 250


def test_noise_on_the_bus_ends_in_an_answer_or_an_error_never_in_an_endless_wait() -> None:
    for bus in BUSES:
        struck = 0
        for seed in range(5):
            chance = Chance(seed)
            setup = Setup(bus)
            setup.spi.disturb = setup.i2c.disturb = chance.disturb
            started_ms = ticks_ms()
            for _ in range(4):
                try:
                    response = setup.transport.send(command_of(60), 1.5, None)
                    assert bus == "spi" or response == echo_of(command_of(60)), f"seed={seed}"  # it has a checksum
                except (OSError, DpsError) as error:
                    assert getattr(error, "code", "tpm.absent") in ("tpm.absent", "tpm.timeout", "tpm.busy")
                    setup.transport.close()
            struck += chance.struck
            assert ms_since(started_ms) < 4 * 4500, f"bus={bus} seed={seed}"
            setup.spi.disturb = setup.i2c.disturb = lambda byte, outgoing: byte
            setup.transport.close()
            setup.chip.violations[:] = []
            setup.send(60, f"bus={bus} seed={seed}")
        assert struck > 8, f"bus={bus}: the noise was none"


class Chance:
    """Flips a bit of about one byte in 512, the same ones for the same seed."""

    def __init__(self, seed: int) -> None:
        self.struck = 0
        self._state = seed * 7919 + 1

    def disturb(self, byte: int, outgoing: bool) -> int:
        """One byte of the wire."""
        self._state = (self._state * 1103515245 + 12345) & 0x7FFFFFFF
        if self._state >> 12 & 0x1FF:
            return byte
        self.struck += 1
        return byte ^ 1 << (self._state >> 8 & 7)


def flip(content: bytes, bit: int) -> bytes:
    """`content` with one bit changed, counted modulo its length."""
    changed = bytearray(content)
    changed[bit // 8 % len(content)] ^= 1 << (bit & 7)
    return bytes(changed)


def test_a_board_without_a_declared_random_source_draws_no_salt() -> None:
    sources = list(platform._random_sources)
    platform._random_sources[:] = []
    try:
        assert_refused(lambda: platform.random_bytes(16), AskOperator, "config.no_random_source")
        platform.declare_random_source(lambda count: bytes(range(count)))
        assert platform.random_bytes(3) == b"\x00\x01\x02"
    finally:
        platform._random_sources[:] = sources
