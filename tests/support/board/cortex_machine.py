"""Runs the agent on an emulated Cortex-M3 with two software TPMs on its UARTs, and says what everything costs.

    python -m support.board.cortex_machine MICROPYTHON MBEDTLS CACHE          (tools/test --board does)

MICROPYTHON and MBEDTLS are Debian's sources, unpacked; CACHE is a folder of its own. Exit status 0: the activation
worked, the contract holds, and every shared test that fits into the board's heap passed.
"""

from __future__ import annotations

import json
import os
import re
import select
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from contracts.tpm import CLAIMS
from dps_deploy.modules import CHECKOUT
from dps_hal.platform import hmac_sha256
from dps_hal.tpm.self_challenge import make_activation
from support.board.cortex_firmware import TEST_FOLDERS, BuildError, build_firmware, build_rom
from support.tpm.swtpm import Swtpm
from support.tpm.tap import TpmTap

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

HEAP_BYTES = 210_048  # that of a Raspberry Pi Pico W
TICKS_HZ = 25_000_000  # of the image's timer
ROM_ADDRESS = 0x21000000  # PSRAM of the mps2-an385
ICOUNT_SHIFT = 3  # an instruction takes 2 ** 3 ns of the machine's time: 125 million a second, as a Pico has
INSTRUCTION_NS = 1 << ICOUNT_SHIFT
LEFT_OUT = {  # files, and single tests
    "contracts/test_tcp_addresses.py": "there is no network",
    "powercut/test_lives.py": "it keeps whole disks in memory, 4 MB",
    "core/test_fleet.py": "three hundred devices have no room in the memory of one",
    "core/test_thirty_days.py": "the log of its month needs more memory, which shows after half a minute",
    "core/test_lifecycle_hub.py::test_no_device_registers_again_after_its_network_had_no_names_for_a_while": (
        "too slow: the hours of 480 devices"
    ),
    **dict.fromkeys(
        (
            "core/test_lifecycle_hub.py::test_a_crash_loop_after_each_connection_hammers_neither_hub_nor_flash",
            "core/test_lifecycle_hub.py::test_a_crash_loop_at_a_dps_that_fails_asks_no_more_often_than_the_back_off_allows",
            "core/test_lifecycle_hub.py::test_a_crash_loop_at_a_hub_that_refuses_every_key_does_not_hammer_dps",
            "core/test_lifecycle_hub.py::test_a_hub_that_is_away_for_days_costs_a_few_writes",
            "core/test_lifecycle_hub.py::test_a_hub_that_refuses_every_key_does_not_make_the_device_hammer_dps",
            "core/test_lifecycle_hub.py::test_a_hub_that_refuses_for_days_and_a_dps_out_of_reach_are_asked_in_turn",
            "core/test_session.py::test_a_message_with_qos_0_that_ends_every_connection_does_not_hold_the_device",
            "core/test_session.py::test_who_sends_what_the_hub_hangs_up_on_again_and_again_does_not_hold_the_device_off_its_hub",
        ),
        "the log of its days needs more memory, which shows after some time",
    ),
    "powercut/test_slots.py::test_a_second_cut_while_the_first_is_repaired_loses_nothing": (
        "too slow: more than 5000 states"
    ),
}
MUST_FIT = 0.95  # of the other tests; a few make bodies of 64 KiB or keep the log of weeks
LONGEST = ("core/test_lifecycle_hub.py", "core/test_session.py")  # of the files' runs
BOARDS_AT_ONCE = 2
START_LIMIT_S = 120
CALL_LIMIT_S = 900  # ends what hangs; a busy machine needs several times as long as a quiet one
MESSAGE_BYTES = 100  # about what a token's text to be signed has
KEY = bytes(range(32))


class BoardError(Exception):
    """The board did not do what it was told; the text has what it printed."""


class CortexM3:
    """One emulated board; `call` runs a piece of Python on it through MicroPython's raw REPL."""

    def __init__(self, firmware: Path, rom: Path, tpm_ports: Sequence[int]) -> None:
        """Starts it, and MicroPython on it; each TPM behind a port is at the other end of a UART."""
        command = [
            *("qemu-system-arm", "-machine", "mps2-an385", "-icount", f"shift={ICOUNT_SHIFT},sleep=off"),
            *("-display", "none", "-monitor", "none", "-semihosting", "-kernel", str(firmware)),
            *("-device", f"loader,file={rom},addr={ROM_ADDRESS:#x},force-raw=on", "-serial", "stdio"),
        ]
        for number, port in enumerate(tpm_ports):
            command += ["-chardev", f"socket,id=tpm{number},host=127.0.0.1,port={port}"]
            command += ["-serial", f"chardev:tpm{number}"]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, bufsize=0
        )
        self._until(b">>> ", START_LIMIT_S)
        self._send(b"\x01")
        self._until(b"raw REPL; CTRL-B to exit\r\n>", START_LIMIT_S)
        self.call(
            "import gc, sys, uctypes, vfs\n"
            f"vfs.mount(vfs.VfsRom(uctypes.bytearray_at({ROM_ADDRESS}, {rom.stat().st_size})), '/rom')\n"
            "sys.path[:] = ['.frozen', '/rom']\n"
            "import support.board.cortex_board as board\n"
        )

    def call(self, program: str, limit_s: float = CALL_LIMIT_S) -> list[dict[str, Any]]:
        """The JSON objects that `program` printed, one a line; BoardError with all that it printed if it failed."""
        self._send(program.encode() + b"\x04")
        answer = self._until(b"\x04>", limit_s)
        printed, _, error = answer.removesuffix(b"\x04>").partition(b"\x04")
        text = printed.removeprefix(b"OK").decode(errors="replace")
        if error:
            raise BoardError(f"{program}\n{text}{error.decode(errors='replace')}")
        for line in text.splitlines():
            if line and not line.startswith("{"):
                print(line)
        return [json.loads(line) for line in text.splitlines() if line.startswith("{")]

    def _send(self, content: bytes) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(content)

    def _until(self, end: bytes, limit_s: float) -> bytes:
        assert self._process.stdout is not None
        until_s = time.monotonic() + limit_s
        output = b""
        while not output.endswith(end):
            left_s = until_s - time.monotonic()
            if left_s <= 0:
                raise BoardError(f"no {end!r} came from the board within {limit_s:.0f} s, but {output[-1000:]!r}")
            if select.select([self._process.stdout], [], [], left_s)[0]:
                piece = os.read(self._process.stdout.fileno(), 4096)
                if not piece:
                    raise BoardError(f"the board has stopped after {output[-1000:]!r}")
                output += piece
        return output

    def stop(self) -> None:
        """Switches it off."""
        self._process.kill()
        self._process.communicate()

    def __enter__(self) -> CortexM3:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


class Verdicts:
    """What became of the tests on a board."""

    def __init__(self) -> None:
        self.passed = 0
        self.failed: list[str] = []
        self.too_large: list[str] = []

    def take(self, reports: Sequence[dict[str, Any]]) -> None:
        """Counts what one call of `run_tests` or `run_contract` reported."""
        for each in reports:
            name = f"{each['file']}::{each['test']}"
            if "failure" in each:
                self.failed.append(f"{name}: {each['failure']}")
            elif "lacks_memory" in each:
                self.too_large.append(f"{name}: {each['lacks_memory']}")
            else:
                self.passed += 1

    def add(self, other: Verdicts) -> None:
        """Takes over what another board came to."""
        self.passed += other.passed
        self.failed += other.failed
        self.too_large += other.too_large


def activate(board: CortexM3, tap: TpmTap) -> list[str]:
    """A new device's first start, an activation and signatures; prints what they cost and returns what was wrong."""
    reports = board.call("board.show_keys()")
    ek, srk = (bytes.fromhex(reports[-1][name]) for name in ("ek", "srk"))
    blob = make_activation(ek, srk, KEY)
    tap.exchanges.clear()
    reports += board.call(f"board.activate('{blob.hex()}', {MESSAGE_BYTES})")
    commands = ", ".join(tap.names)
    print_costs("With a TPM (its own time is left out)", reports)
    print(f"TPM commands of activation, two signatures and release: {commands}\n")
    print_costs("What they are made of", board.call(f"board.measure_parts('{ek.hex()}')"))
    wrong = []
    if reports[-1] != {"signature": hmac_sha256(KEY, bytes(MESSAGE_BYTES)).hex(), "same": True}:
        wrong.append(f"the board signed otherwise than the key's HMAC: {reports[-1]}")
    if tap.seen(KEY):
        wrong.append("the key was seen on the TPM's bus")
    return wrong


def print_costs(title: str, reports: Sequence[dict[str, Any]]) -> None:
    """A table: what the processor did for each step, and how much of the heap the step took while nothing was freed."""
    print(f"{title:42} {'instructions':>14} {'at 125 MIPS':>12} {'heap':>9}")
    for each in reports:
        if "step" in each:
            ns = each["ticks"] * 1_000_000_000 // TICKS_HZ
            heap = f"{each['heap_bytes']} B"
            print(f"{each['step']:42} {ns // INSTRUCTION_NS:14,} {ns / 1e6:9.1f} ms {heap:>9}")
    print(flush=True)


def run_activation_and_contract(firmware: Path, rom: Path, folder: Path) -> tuple[Verdicts, list[str]]:
    """One board with two new TPMs: what `activate` finds wrong, and the contract of Tpm."""
    verdicts = Verdicts()
    with (
        Swtpm(folder / "tpm") as swtpm,
        Swtpm(folder / "other-tpm") as other,
        TpmTap(swtpm.port) as tap,
        TpmTap(other.port) as other_tap,
    ):
        with CortexM3(firmware, rom, [tap.port, other_tap.port]) as board:
            (about,) = board.call("board.start()")
            print(f"MicroPython {about['version']} on {about['machine']}; heap {about['heap_bytes']:,} B", end="")
            print(f", of which {about['free_bytes']:,} B are free\n")
            wrong = activate(board, tap)
            verdicts.take(board.call("board.run_contract()"))
        left = [number for each in (swtpm, other) for number in each.leftovers()]
    if left:
        wrong.append(f"the board left {[hex(number) for number in left]} in its TPMs")
    return verdicts, wrong


def run_test_file(firmware: Path, rom: Path, path: str) -> Verdicts:
    """The tests of one file, named `folder/test_name.py`, on another board, without TPM; none that is left out."""
    folder, _, name = path.rpartition("/")
    left_out = tuple(each.rpartition("::")[2] for each in LEFT_OUT if each.startswith(f"{path}::"))
    verdicts = Verdicts()
    with CortexM3(firmware, rom, []) as board:
        board.call("board.start()")
        verdicts.take(board.call(f"board.run_tests('/rom', '{folder}', '{name.removesuffix('.py')}', {left_out})"))
    return verdicts


def shared_test_files() -> dict[str, int]:
    """The files for `run_test_file`, largest first, and how many tests it runs of each."""
    counts = {}
    for folder in TEST_FOLDERS:
        for path in (CHECKOUT / "tests" / folder).glob("test_*.py"):
            name = f"{folder}/{path.name}"
            tests = re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)
            if name not in LEFT_OUT:
                counts[name] = len([test for test in tests if f"{name}::{test}" not in LEFT_OUT])
    return dict(sorted(counts.items(), key=lambda each: (each[0] not in LONGEST, -each[1])))


def main(micropython: str, mbedtls: str, cache: str) -> int:
    """Exit status; the last line has the counts."""
    sources = Path(micropython).resolve(), Path(mbedtls).resolve()
    files = shared_test_files()
    shared = Verdicts()
    with tempfile.TemporaryDirectory(prefix="dps-cortex-") as name, ThreadPoolExecutor(BOARDS_AT_ONCE) as boards:
        firmware = build_firmware(*sources, HEAP_BYTES, Path(cache).resolve(), Path(name))
        rom = build_rom(Path(name))
        first = boards.submit(run_activation_and_contract, firmware, rom, Path(name))
        for verdicts in boards.map(lambda path: run_test_file(firmware, rom, path), files):
            shared.add(verdicts)
        contract, wrong = first.result()
    print(f"contract of Tpm, over UARTs: {contract.passed} passed, {len(contract.failed)} failed")
    ran = shared.passed + len(shared.failed) + len(shared.too_large)
    print(
        f"shared tests: {shared.passed} passed, {len(shared.failed)} failed, {len(shared.too_large)} need more memory,"
        f" {len(LEFT_OUT)} files and tests left out"
    )
    for line in contract.too_large + shared.too_large:
        print(f"    too large: {line}")
    for path, reason in LEFT_OUT.items():
        print(f"    left out: {path}: {reason}")
    wrong += contract.failed + contract.too_large + shared.failed
    if contract.passed + len(contract.failed) + len(contract.too_large) != len(CLAIMS):
        wrong.append(f"the board did not try all {len(CLAIMS)} claims of the contract")
    if ran != sum(files.values()):
        wrong.append(f"the boards ran {ran} shared tests, the files have {sum(files.values())}")
    if shared.passed < MUST_FIT * ran:
        wrong.append(f"only {shared.passed} of {ran} shared tests fit into {HEAP_BYTES} B, expected {MUST_FIT:.0%}")
    for line in wrong:
        print(f"FAILED {line}")
    print(f"{contract.passed + shared.passed} passed, {len(wrong)} failed")
    return 1 if wrong else 0


if __name__ == "__main__":
    try:
        sys.exit(main(*sys.argv[1:]))
    except (BuildError, BoardError) as error:
        print(error)
        sys.exit(1)
