"""WireTpm over a simulated TPM on SPI and I2C, with swtpm behind it: the contract, faults, cuts, and Linux's spidev."""

from __future__ import annotations

import ctypes
import fcntl
import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from contracts.tpm import CLAIMS, KEY, blob_for
from dps_agent.host.config import load
from dps_agent.host.parts import open_tpm
from dps_hal import platform
from dps_hal.contracts import Tpm
from dps_hal.errors import AskOperator, DpsError, RetryLater
from dps_hal.host.transports import transport_for
from dps_hal.platform import hmac_sha256
from dps_hal.tpm import commands
from dps_hal.tpm.i2c import I2cBus
from dps_hal.tpm.spi import SpiBus
from dps_hal.tpm.tis import TisTransport
from dps_hal.tpm.wire import WireTpm
from support.claims import assert_refused
from support.tpm.swtpm import Swtpm
from support.tpm.tis_chip import ChipOnI2c, ChipOnSpi, EchoTpm, TisChip, echo_of, transport_on

if TYPE_CHECKING:
    from dps_hal.tpm.commands import Transport

MESSAGE = b"message"
BUSES = ("spi", "i2c")


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Swtpm, Swtpm]]:
    folder = tmp_path_factory.mktemp("tpms")
    with Swtpm(folder / "first") as first, Swtpm(folder / "second") as second:
        yield first, second


@pytest.fixture(params=BUSES)
def bus(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def chip_of(machine: Swtpm) -> TisChip:
    return TisChip(transport_for(machine.tcti))


def import_and_sign(tpm: Tpm, activation: bytes) -> bytes:
    return tpm.sign(tpm.import_key(activation), MESSAGE)


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.__name__)
def test_the_contract_holds_on_a_bus(
    bus: str, claim: Callable[[Tpm, Tpm], None], machines: tuple[Swtpm, Swtpm]
) -> None:
    chips = [chip_of(machine) for machine in machines]
    for chip in chips:
        chip.bursts = (1, 64, 33, 128)
    tpms = [WireTpm(transport_on(bus, chip)) for chip in chips]
    claim(tpms[0], tpms[1])
    for tpm in tpms:
        tpm.release()
    assert [chip.violations for chip in chips] == [[], []]
    assert [machine.leftovers() for machine in machines] == [[], []]


@pytest.mark.parametrize("burst", [1, 7, 32, 64, 128])
def test_a_registration_takes_few_transfers(burst: int, machine: Swtpm) -> None:
    chip = chip_of(machine)
    chip.bursts = (burst,)
    spi = ChipOnSpi(chip)
    tpm = WireTpm(TisTransport(SpiBus(spi, spi.chip_select)))
    activation = blob_for(tpm)
    tpm.release()
    spi.bytes = spi.frames = 0
    for _ in range(2):  # the challenge, then the hub's key
        assert import_and_sign(tpm, activation) == hmac_sha256(KEY, MESSAGE)
    tpm.release()
    print(f"burst={burst}: {spi.frames} frames, {spi.bytes} bytes, {1000 * spi.bytes * 8 / 1_000_000:.0f} ms at 1 MHz")
    assert spi.frames < (740 if burst >= 32 else 20_000)


def test_bit_errors_cost_time_or_an_error_never_a_wrong_signature(bus: str, machine: Swtpm) -> None:
    seed = random.randrange(1 << 32)
    chance = random.Random(seed)
    noisy = False

    def disturb(byte: int, outgoing: bool) -> int:
        return byte ^ 1 << chance.randrange(8) if noisy and chance.randrange(3000) == 0 else byte

    chip = chip_of(machine)
    on_spi, on_i2c = ChipOnSpi(chip), ChipOnI2c(chip)
    on_spi.disturb = on_i2c.disturb = disturb
    tpm = WireTpm(TisTransport(SpiBus(on_spi, on_spi.chip_select) if bus == "spi" else I2cBus(on_i2c)), exclusive=True)
    activation = blob_for(tpm)
    wrapped_key = tpm.import_key(activation)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(commands, "LEAST_LIMIT_S", 1.0)
        patch.setattr("dps_hal.tpm.operations.COMMAND_LIMIT_S", 1.0)
        refused = 0
        for run in range(12):
            noisy = True
            try:
                assert tpm.sign(wrapped_key, MESSAGE) == hmac_sha256(KEY, MESSAGE), f"seed={seed} run={run}"
            except DpsError as error:
                assert error.code.startswith("tpm."), f"seed={seed} run={run}"
                refused += 1
            noisy = False
            tpm.release()
    print(f"seed={seed} refused={refused}")
    assert tpm.sign(wrapped_key, MESSAGE) == hmac_sha256(KEY, MESSAGE), f"seed={seed}"
    tpm.release()
    assert machine.leftovers() == [], f"seed={seed}"


def test_a_locality_lost_in_the_middle_costs_one_new_connection(bus: str, machine: Swtpm) -> None:
    chip = chip_of(machine)
    tpm = WireTpm(transport_on(bus, chip), exclusive=True)
    activation = blob_for(tpm)
    for after in (0, 3, 10, 25, 40):
        tpm.release()
        chip.lose_locality_after = after
        assert import_and_sign(tpm, activation) == hmac_sha256(KEY, MESSAGE), f"after={after}"
    tpm.release()
    assert machine.leftovers() == []


def test_a_reset_of_the_board_at_any_command_is_recovered_from(bus: str, machine: Swtpm) -> None:
    """The board starts anew, its TPM goes on: what was on its way is still there, leaked sessions included."""

    class Reset(Exception):
        pass

    class UntilReset:
        """A transport whose board dies after so many commands, before it has read the last one's response."""

        def __init__(self, inner: Transport, dies_at: int) -> None:
            self.inner = inner
            self.left = dies_at

        def send(self, command: bytes, limit_s: float, while_waiting: Callable[[], None] | None) -> bytes:
            self.left -= 1
            if self.left < 0:
                chip.spoil_response = die
            return self.inner.send(command, limit_s, while_waiting)

        def close(self) -> None:
            self.inner.close()

    def die(response: bytes) -> bytes:
        raise Reset

    chip = chip_of(machine)
    tpm = WireTpm(transport_on(bus, chip), exclusive=True)
    activation = blob_for(tpm)
    tpm.release()
    for dies_at in range(40):
        board = WireTpm(UntilReset(transport_on(bus, chip), dies_at), exclusive=True)
        try:
            import_and_sign(board, activation)
            died = False
        except Reset:
            died = True
        chip.spoil_response = None
        again = WireTpm(transport_on(bus, chip), exclusive=True)
        assert import_and_sign(again, activation) == hmac_sha256(KEY, MESSAGE), f"dies_at={dies_at}"
        again.release()
        assert chip.violations == [], f"dies_at={dies_at}"
        if not died:
            break
    assert dies_at >= 8
    assert machine.leftovers() == []


def test_a_tpm_that_nobody_has_started_is_started(bus: str, machine: Swtpm) -> None:
    started: list[int] = []

    class Unstarted:
        """swtpm behind a part that lost its power, and wants TPM2_Startup before all else."""

        def __init__(self) -> None:
            self.inner = transport_for(machine.tcti)

        def send(self, command: bytes, limit_s: float, while_waiting: Callable[[], None] | None) -> bytes:
            if command[6:10] == struct.pack(">I", commands.CODES["startup"]):
                started.append(1)
                return struct.pack(">HII", 0x8001, 10, 0)
            if not started:
                return struct.pack(">HII", 0x8001, 10, 0x100)  # TPM_RC_INITIALIZE
            return self.inner.send(command, limit_s, while_waiting)

        def close(self) -> None:
            self.inner.close()

    tpm = WireTpm(transport_on(bus, TisChip(Unstarted())))
    assert import_and_sign(tpm, blob_for(tpm)) == hmac_sha256(KEY, MESSAGE)
    tpm.release()
    assert started == [1]


def test_a_tpm_that_never_answers_is_an_error_of_the_tpm(
    bus: str, machine: Swtpm, monkeypatch: pytest.MonkeyPatch
) -> None:
    chip = chip_of(machine)
    waits: list[int] = []
    tpm = WireTpm(transport_on(bus, chip), while_waiting=lambda: waits.append(1))
    tpm.endorsement_key()
    monkeypatch.setattr(commands, "LEAST_LIMIT_S", 1.5)
    monkeypatch.setattr("dps_hal.tpm.operations.COMMAND_LIMIT_S", 1.5)
    monkeypatch.setattr("dps_hal.tpm.operations.RELEASE_LIMIT_S", 0.5)
    chip.hangs = True
    waits.clear()
    assert_refused(tpm.storage_root_key, RetryLater, "tpm.timeout")
    assert len(waits) >= 1
    tpm.release()
    chip.hangs = False
    assert import_and_sign(tpm, blob_for(tpm)) == hmac_sha256(KEY, MESSAGE)
    tpm.release()
    assert machine.leftovers() == []


def test_no_key_is_used_on_a_board_that_declared_no_random_source(
    machine: Swtpm, monkeypatch: pytest.MonkeyPatch
) -> None:
    tpm = WireTpm(transport_on("spi", chip_of(machine)))
    activation = blob_for(tpm)
    wrapped_key = tpm.import_key(activation)
    tpm.release()
    monkeypatch.setattr(platform, "_random_sources", [])
    assert_refused(lambda: tpm.sign(wrapped_key, MESSAGE), AskOperator, "config.no_random_source")
    assert_refused(lambda: tpm.import_key(activation), AskOperator, "config.no_random_source")
    tpm.release()
    assert machine.leftovers() == []


# --- Linux's spidev


class KernelSpi:
    """What the kernel does with the ioctls of a spidev, for a file that stands for one."""

    def __init__(self, spi: ChipOnSpi, monkeypatch: pytest.MonkeyPatch) -> None:
        self.spi = spi
        self.speeds: set[int] = set()
        self.modes: list[bytes] = []
        self.holds = True  # a controller that keeps the chip select as it is asked to
        self._selected = False
        monkeypatch.setattr(fcntl, "ioctl", self.ioctl)

    def ioctl(self, node: int, request: int, argument: bytes) -> int:
        if request in (0x40016B01, 0x40016B03):
            self.modes.append(argument)
            return 0
        assert request == 0x40206B00 and len(argument) == 32
        transmit, receive, length, speed_hz, delay_us, bits, cs_change = struct.unpack("=QQIIHBB", argument[:28])
        assert (delay_us, bits, argument[28:]) == (0, 8, bytes(4))
        self.speeds.add(speed_hz)
        self._select(True)
        if length:
            into = bytearray(length)
            self.spi.write_readinto(ctypes.string_at(transmit, length), into)
            ctypes.memmove(receive, bytes(into), length)
        if not (cs_change and self.holds):
            self._select(False)
        return length

    def _select(self, selected: bool) -> None:
        if selected != self._selected:
            self._selected = selected
            self.spi.chip_select(0 if selected else 1)


@pytest.fixture
def spidev(tmp_path: Path) -> Path:
    node = tmp_path / "spidev0.0"
    node.touch()
    return node


def test_a_spidev_carries_a_registration(machine: Swtpm, spidev: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spi = ChipOnSpi(chip_of(machine))
    spi.waits = (0, 2, 5)
    kernel = KernelSpi(spi, monkeypatch)
    file = spidev.with_name("config.toml")
    file.write_text(
        f'id_scope = "0ne00000000"\nstate_dir = "{spidev.parent}"\n'
        f'[tpm]\nbackend = "wire"\ntcti = "spi:{spidev}?hz=5000000"\n'
    )
    tpm = open_tpm(load(file, environ={}))
    assert import_and_sign(tpm, blob_for(tpm)) == hmac_sha256(KEY, MESSAGE)
    tpm.release()
    tpm.release()
    assert kernel.speeds == {5_000_000} and kernel.modes[:2] == [b"\x00", b"\x08"]
    assert spi.chip.violations == []
    assert machine.leftovers() == []


def test_a_spidev_has_one_user_at_a_time(spidev: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    KernelSpi(ChipOnSpi(TisChip(EchoTpm())), monkeypatch)
    command = struct.pack(">HII", 0x8001, 10, 0)
    first, second = transport_for(f"spi:{spidev}"), transport_for(f"spi:{spidev}")
    assert first.send(command, 2, None) == echo_of(command)
    assert_refused(lambda: second.send(command, 2, None), RetryLater, "tpm.busy")
    second.close()
    first.close()
    assert second.send(command, 2, None) == echo_of(command)
    second.close()


def test_a_controller_that_lets_go_of_the_chip_select_shows_no_tpm(
    spidev: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = KernelSpi(ChipOnSpi(TisChip(EchoTpm())), monkeypatch)
    kernel.holds = False
    transport = transport_for(f"spi:{spidev}")
    assert_refused(lambda: transport.send(struct.pack(">HII", 0x8001, 10, 0), 5, None), RetryLater, "tpm.absent")
    transport.close()


@pytest.mark.parametrize(
    ("tcti", "code"),
    [
        ("spi:/dev/there-is-none", "tpm.absent"),
        ("spi:/dev/null", "tpm.absent"),
        ("spi:", "config.invalid"),
        ("spi:?hz=1", "config.invalid"),
        ("spi:/dev/spidev0.0?x", "config.invalid"),
        ("spi:/dev/spidev0.0?hz=", "config.invalid"),
        ("spi:/dev/spidev0.0?hz=0", "config.invalid"),
        ("spi:/dev/spidev0.0?hz=-1", "config.invalid"),
        ("spi:/dev/spidev0.0?hz=1000000000", "config.invalid"),
        ("spi:/dev/spidev0.0?speed=1", "config.invalid"),
    ],
)
def test_a_tcti_without_a_spidev_says_so(tcti: str, code: str) -> None:

    error_class = RetryLater if tcti == "spi:/dev/there-is-none" else AskOperator  # its driver may come late
    assert_refused(lambda: WireTpm(transport_for(tcti)).endorsement_key(), error_class, code, f"tcti={tcti!r}")
