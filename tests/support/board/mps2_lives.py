"""Whole lives of the emulated board: from boot to its hub.

    python -m support.board.mps2_lives MICROPYTHON MBEDTLS LWIP CACHE QEMU WORD… [-- NAME…]

The first three are Debian's sources, CACHE a folder of its own, QEMU the first words of its command line. The names are
those of LIVES; `=KIB` behind one is another heap. Without any: `life`. Exit status 0: each went as it should.

Where a device would wait for long, the board's clock goes faster than usual: see HURRY.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import NameOID

import dps_emulator.embedded
from dps_deploy.modules import for_firmware
from dps_emulator.server import DPS_NAMES
from dps_emulator.service import Settings
from support.board.compiled import compiled_into
from support.board.cortex_firmware import BuildError
from support.board.mps2_firmware import Debian, build_firmware, flash_bytes
from support.board.mps2_machine import HOST, I2C_BUS, PICO_W_HEAP, BoardError, Mps2, deployed
from support.cloud.emulator import HUB, EmulatorInThread
from support.cloud.hostile_cloud import DPS_FLOODS, Switchboard, hostile_dps, serving
from support.cloud.ntp import NtpServer
from support.cloud.servers import LOOPBACK, Server

APP = Path(__file__).with_name("mps2_app.py")
DEVICE = "press-07"
KIB = 1024
SECOND_HUB = "second.azure-devices.net"
FROZEN, ROMFS, FILES = "frozen", "in a ROMFS", "in files"  # where the agent's modules lie
HEAPS_KIB = {FROZEN: 96, ROMFS: 120, FILES: 300}  # the smallest on which lives are tried
LEFT_KIB = {FROZEN: 129, ROMFS: 109}  # of a Pico W's heap at the hub, at least
# In use behind a registration's steps on the smallest heap, at most.
REGISTERING_KIB = {FROZEN: 70, ROMFS: 90}
AGENT_FLASH_BYTES = 105_000  # of a firmware's flash, at most, where it has the agent in it
REACH_S = 240.0  # until it is at its hub: what a quiet machine does in 10 s takes a busy one a minute
# How much faster than usual the board's clock goes, by the agent's state: where there is more to wait for than to do.
HURRY = {"waiting": 60, "provisioned": 30, "connected": 60}
OUT_S = 1800  # within which a busy machine's board has gone through those minutes
RENEWAL = {**HURRY, "connected": 20}  # where a hub that answers after seconds has not gone yet
RENEWALS = 5  # connections until one ends for a renewal: on a busy machine another may end before
RECONNECTS = 100
SESSION_S = 610  # a connection that lasted 600 s is a steady one, after which a device waits 5 to 10 s
CABLE_S = (0.1, 1, 10)  # of the host, some of it hurried
CABLE_MINUTES = 30  # of the board
YEAR_S = 365 * 86400.0
TPM_GONE_MS, TPM_GONE_FOR_MS = (1, 1000, 2000, 4000, 8000, 16000), 20_000
FAILURES = 20  # allocations that fail in each phase
BAD_DPS = (
    {"operation": "register", "request": 1, "drip": 20},
    {"operation": "register", "request": 2, "cutAfterBytes": 10},
    {"operation": "register", "request": 3, "status": 503, "headers": {"Retry-After": "2"}},
    {"operation": "operation", "request": 1, "cutAfterBytes": -1, "reset": True},
)
BAD_HUBS = (
    ({"operation": "telemetry", "drop": "after", "times": 1},),
    ({"operation": "telemetry", "drop": "before", "reset": True, "times": 1},),
    ({"operation": "telemetry", "silent": "before", "times": 1},),
    ({"operation": "connect", "silent": "before", "times": 1},),
    ({"operation": "accept", "silent": "before", "times": 1},),
    ({"operation": "accept", "drop": "before", "times": 3},),
    ({"operation": "connect", "connack": 3, "times": 2},),
    ({"operation": "subscribe", "delayS": 2, "times": 2},),
    ({"operation": "twin-get", "status": 429, "times": 1},),
)
CONSOLE_WIDTH = 58  # columns of a transcript
NUMBERS = "at |life |minute "  # how the lines of the program begin that are for the lives alone
STACK_LIMIT = 7 * KIB  # of the 8 KiB that a Pico has
SETTINGS = """\
id_scope = "0ne00000000"
registration_id = "{device}"
connect_to = "{host}:{dps}"
ca_file = "{ca_file}"

[tpm]
tcti = "i2c"

[hub]
connect_to = "{host}:{hub}"
keep_alive_s = 240
token_life_s = 1200

[board]
bus = {bus}
ntp_server = "{ntp}"
watchdog_s = 8
"""


class LargeAuthority:
    """As large as Azure's: a root and an issuing authority of RSA-4096, and servers of RSA-2048."""

    def __init__(self) -> None:
        now = datetime.now(UTC)
        root_key, key = (rsa.generate_private_key(public_exponent=65537, key_size=4096) for _ in range(2))
        names = [
            x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]) for name in ("a root", "an issuing authority")
        ]

        def issued(number: int, public: Any, by: int, signing: Any) -> x509.Certificate:
            return (
                x509.CertificateBuilder()
                .subject_name(names[number])
                .issuer_name(names[by])
                .public_key(public)
                .serial_number(x509.random_serial_number())
                .not_valid_before(now - timedelta(days=1))
                .not_valid_after(now + timedelta(days=3650))
                .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
                .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
                .sign(signing, hashes.SHA256())
            )

        pem = serialization.Encoding.PEM
        root = issued(0, root_key.public_key(), 0, root_key)
        issuing = issued(1, key.public_key(), 0, root_key)
        plain = serialization.NoEncryption()
        self.cert_pem = trustme.Blob(root.public_bytes(pem))
        self._issuing_pem = issuing.public_bytes(pem)
        key_pem = key.private_bytes(pem, serialization.PrivateFormat.TraditionalOpenSSL, plain)
        self._authority = trustme.CA.from_pem(self._issuing_pem, key_pem)

    def issue_cert(self, *names: str) -> trustme.LeafCert:
        """A server's certificate, with that of the issuing authority behind it."""
        leaf = self._authority.issue_cert(*names, key_type=trustme.KeyType.RSA)
        own = leaf.cert_chain_pems[0].bytes()
        return trustme.LeafCert(leaf.private_key_pem.bytes(), own, [self._issuing_pem])


@functools.cache
def large_authority() -> LargeAuthority:
    """One for all: its keys take seconds."""
    return LargeAuthority()


class Row(NamedTuple):
    """One line of a transcript: seconds since it began, what the board's console said, what the cloud logged."""

    after_s: float
    console: str
    cloud: str

    def text(self) -> str:
        """The three side by side."""
        return f"{self.after_s:6.1f}  {self.console:{CONSOLE_WIDTH}}  {self.cloud}".rstrip()


class Transcript:
    """The serial console and the logs of DPS and hubs side by side, line by line as they come."""

    def __init__(self, board: Mps2, cloud: EmulatorInThread) -> None:
        self.rows: list[Row] = []
        self._began_s = time.monotonic()
        self._board = board
        self._cloud = cloud
        self._seen = (0, len(cloud.log), len(cloud.hub_log))  # characters, requests, lines
        board.heard = self.note

    def note(self, happened: str = "") -> None:
        """Takes what has come since the last time; `happened`: what was done to the board just now."""
        characters, requests, lines = self._seen
        dps, hub = self._cloud.log[requests:], self._cloud.hub_log[lines:]
        said, end, _ = self._board.console[characters:].rpartition("\n")
        self._seen = characters + len(said + end), requests + len(dps), lines + len(hub)
        for request in dps:
            self._add("", f"DPS {request.operation or request.method} {request.status}")
        for line in hub:
            self._add("", f"hub {line.event}")
        for console in said.splitlines():
            if not re.match(NUMBERS, console):
                self._add(console.rstrip(), "")
        if happened:
            self._add(f"== {happened}", "")

    def _add(self, console: str, cloud: str) -> None:
        if [(console, cloud)] != [row[1:] for row in self.rows[-1:]]:  # telemetry comes every second
            self.rows.append(Row(time.monotonic() - self._began_s, console, cloud))


class Desk:
    """A board, and DPS, two hubs and NTP for it; `place`: where the agent's modules lie on it."""

    def __init__(
        self, debian: Debian, cache: Path, folder: Path, stack: ExitStack, heap_kib: int, place: str = FROZEN
    ) -> None:
        self.ntp = stack.enter_context(NtpServer())
        settings = Settings(enroll_any=True, retry_after_s=1, hubs=(HUB, SECOND_HUB))
        self.cloud = stack.enter_context(EmulatorInThread(settings))
        self.dps_port = self.cloud.port
        self._folder = folder
        self._images: dict[str, bytes] = {}  # of file systems, by their NTP server
        self.place = place
        self.firmware = functools.partial(build_firmware, debian, cache)  # with the agent in it, or without
        heap_bytes = heap_kib * KIB if heap_kib else PICO_W_HEAP
        self.left_bytes = 0 if heap_kib else LEFT_KIB[place] * KIB  # of a Pico W's heap
        self.registering_bytes = REGISTERING_KIB.get(place, 0) * KIB if heap_kib else 0
        self.board = stack.enter_context(Mps2(folder, debian.qemu, self.firmware(place == FROZEN), heap_bytes))

    def deploy(self, ntp: str = "") -> None:
        """A new board, switched off: its flash as `tools/deploy` makes it."""
        if ntp not in self._images:
            self._images[ntp] = self._image(ntp or f"{HOST}:{self.ntp.address.rpartition(':')[2]}")
        self.board.cut_power()
        self.board.flash(self._images[ntp], self._rom)

    def _image(self, ntp: str) -> bytes:
        values = {
            "device": DEVICE,
            "host": HOST,
            "dps": self.dps_port,
            "hub": self.cloud.hub_port,
            "ca_file": self.cloud.ca_file,
            "bus": I2C_BUS,
            "ntp": ntp,
        }
        flags = () if self.place == FILES else ("--frozen",)
        return deployed(self._folder, SETTINGS.format(**values), APP, *flags)

    @functools.cached_property
    def _rom(self) -> bytes:
        """What lies in the ROMFS."""
        if self.place != ROMFS:
            return b""
        bundles = {f"lib/{path}": source for path, source in for_firmware().items()}
        return compiled_into(self._folder / "rom", bundles).rom.read_bytes()

    def reached(self, more: int = 1, within_s: float = REACH_S) -> dict[str, Any]:
        """Waits for so many further messages of telemetry; the numbers of the last one. BoardError."""
        before = len(self.cloud.telemetry(DEVICE))
        until_s = time.monotonic() + within_s
        while len(found := self.cloud.telemetry(DEVICE)) < before + more:
            if time.monotonic() > until_s or not self.board.is_on:
                raise BoardError(f"no telemetry within {within_s} s:\n{self.board.look()[-3000:]}")
            self.board.look(0.2)
        numbers: dict[str, Any] = json.loads(found[-1]["payload"])
        return numbers

    def connects(self) -> int:
        """How often the hubs took this device in."""
        return sum(line.event == "connected" for line in self.cloud.hub_log)

    def reconnected(self, before: int) -> dict[str, Any]:
        """Waits until the hubs have taken it in more often than `before`, and for telemetry then. BoardError."""
        until_s = time.monotonic() + REACH_S
        while self.connects() <= before:
            if time.monotonic() > until_s or not self.board.is_on:
                raise BoardError(f"no connection within {REACH_S} s:\n{self.board.look()[-3000:]}")
            self.board.look(0.05)
        return self.reached()

    def registrations(self) -> int:
        """How often DPS was asked to register this device."""
        return sum(line.operation == "register" and line.status == 202 for line in self.cloud.log)

    def shallow(self, stack: int) -> None:
        """BoardError where more of the C stack was used than a Pico should."""
        self.expect(stack <= STACK_LIMIT, f"at most {STACK_LIMIT} bytes of C stack; came {stack}")

    def expect(self, holds: bool, what: str) -> None:
        """BoardError with the console where it does not hold."""
        if not holds:
            raise BoardError(f"expected {what}\n{self.board.look()[-3000:]}")


def life(desk: Desk) -> str:
    """Boot, NTP, keys, challenge, assignment, record, power cut, record holds, MQTT and all that a hub does, reset.

    Prints the board's console and the cloud's logs side by side.
    """
    board, cloud = desk.board, desk.cloud
    desk.deploy()
    transcript = Transcript(board, cloud)
    board.start()
    transcript.note("switched on")
    began_s = time.monotonic()
    first = desk.reached(2)  # the first message was written before the connection
    first_s = time.monotonic() - began_s
    desk.expect(desk.registrations() == 1 and desk.ntp.asked > 0, "one registration, after NTP was asked")
    desk.expect(cloud.invoke(DEVICE, "echo", {"a": [1]}, 30) == (200, {"a": [1]}), "a method's answer")
    cloud.send_c2d(DEVICE, b"x" * 3000, {"n": "1"})
    board.until("message 3000")
    cloud.set_desired(DEVICE, {"rate": 5})
    board.until("desired 2")
    desk.expect(cloud.twin(DEVICE)["reported"]["dpsAgent"]["backend"] == "wire", "what the agent reports")
    board.cut_power()
    transcript.note("power cut")
    board.start()
    transcript.note("switched on")
    desk.expect(desk.reached()["life"] == 2 and desk.registrations() == 1, "a second life on the record of the first")
    numbers = cloud.invoke(DEVICE, "numbers", None, 30)[1]
    desk.shallow(first["stack"])
    desk.shallow(numbers["stack"])
    used, most = first["registering"], desk.registering_bytes
    desk.expect(not most or used <= most, f"at most {most} bytes of heap in use while it registers; came {used}")
    free, left = numbers["free"], desk.left_bytes
    desk.expect(free >= left, f"{left} bytes of heap left; came {free}")
    print(*[row.text() for row in transcript.rows], sep="\n", flush=True)
    said = f"first telemetry after {first_s:.0f} s, in use before {used:,} B, C stack {first['stack']:,} B; then "
    return said + told(numbers)


def reconnects(desk: Desk) -> str:
    """The hub ends a hundred sessions, each of which lasted so long that the device comes back at once."""
    desk.deploy()
    desk.board.start(**HURRY)
    numbers = desk.reached()
    least_free, began_ms = numbers["free"], numbers["upMs"]
    for _ in range(RECONNECTS):
        while numbers["upMs"] - began_ms < 1000 * SESSION_S:
            numbers = desk.reached()
            least_free = min(least_free, numbers["free"])
        before = desk.connects()
        desk.cloud.disconnect(DEVICE)
        numbers = desk.reconnected(before)
        began_ms = numbers["upMs"]
    desk.expect(numbers["life"] == 1, f"no reset in {RECONNECTS} reconnects; came life {numbers['life']}")
    return f"{RECONNECTS} reconnects after sessions of {SESSION_S} s, no reset; least free {least_free:,} B"


def cuts(desk: Desk) -> str:
    """The power goes in the middle of each page and each erase of a first life; every next start is at its hub."""
    desk.deploy()
    desk.board.start(**HURRY)
    steps = desk.reached(2)["flashSteps"]
    held = 0
    for step in range(1, steps + 1):
        desk.deploy()
        desk.board.start(**HURRY, cut=step)
        before = len(desk.cloud.telemetry(DEVICE))
        until_s = time.monotonic() + REACH_S
        while desk.board.is_on and len(desk.cloud.telemetry(DEVICE)) < before + 2:
            desk.expect(time.monotonic() < until_s, f"a cut at step {step}")
            desk.board.look(0.1)
        was_connected = len(desk.cloud.telemetry(DEVICE)) > before
        registered = desk.registrations()
        desk.board.cut_power()
        desk.board.start(**HURRY)
        desk.reached()
        again = desk.registrations() - registered
        desk.expect(not was_connected or again == 0, f"the identity of before, after a cut at step {step}")
        held += again == 0
    return f"cut in each of {steps} steps: every next start was at its hub, {held} without another registration"


def cable(desk: Desk) -> str:
    """The cable is out for a second to half an hour."""
    desk.deploy()
    desk.board.start(**HURRY)
    numbers = desk.reached()
    outs = []
    for out_s in (*CABLE_S, None):
        began_ms = numbers["upMs"]
        desk.board.plug(False)
        if out_s is None:
            minutes = len(re.findall("minute", desk.board.console))
            desk.board.until("minute", OUT_S, minutes + 1 + CABLE_MINUTES)
        else:
            until_s = time.monotonic() + out_s
            while (left_s := until_s - time.monotonic()) > 0:
                desk.board.look(min(left_s, 1))
        desk.board.plug(True)
        numbers = desk.reached(2)
        outs.append(f"{(numbers['upMs'] - began_ms) / 1000:.0f} s")
    return f"at its hub again {', '.join(outs)} after the cable was pulled, in life {numbers['life']}"


def hubs(desk: Desk) -> str:
    """A hub that closes, says nothing, answers late, refuses; a DPS that drips, stops short and is overloaded."""
    desk.deploy()
    desk.cloud.fault(*BAD_DPS)
    desk.board.start(**HURRY)
    desk.reached()
    for faults in BAD_HUBS:
        before = desk.connects()
        desk.cloud.fault(*faults)
        if not any(fault["operation"] == "telemetry" for fault in faults):
            desk.cloud.disconnect(DEVICE)
        desk.reconnected(before)
    numbers = desk.reached()
    count = f"{len(BAD_DPS)} faults of DPS, {len(BAD_HUBS)} of hubs"
    return f"{count}: at its hub again each time, in life {numbers['life']}"


def floods(desk: Desk) -> str:
    """DPS sends interim answers, headers, a body and chunks without end; then it is itself again."""
    real = f"{LOOPBACK}:{desk.dps_port}"
    server = Server(hostile_dps(DPS_FLOODS), serving(large_authority(), *DPS_NAMES))
    with server, Switchboard(server.address) as switchboard:
        desk.dps_port = int(switchboard.address.rpartition(":")[2])
        desk.deploy()
        desk.board.start(**HURRY)
        until_s = time.monotonic() + len(DPS_FLOODS) * REACH_S
        while len(server.requests) <= len(DPS_FLOODS):
            desk.expect(time.monotonic() < until_s and desk.board.is_on, "a request after each flood")
            desk.board.look(0.2)
        switchboard.turn_to(real)
        numbers = desk.reached(2)
    desk.expect(numbers["life"] == 1, "no reset")
    return f"{len(server.requests)} answers without end, then at its hub; {told(numbers)}"


def names(desk: Desk) -> str:
    """The name server says nothing; that holds the processor, and the watchdog endures it."""
    desk.deploy(ntp="time.example")
    desk.board.start(deaf=1)
    numbers = desk.reached(2)
    desk.expect(numbers["life"] == 1, "no reset by the watchdog")
    return f"at its hub under a silent name server; longest watchdog gap {numbers['gapMs']} ms"


def clocks(desk: Desk) -> str:
    """NTP is wrong by years, either way, or says nothing: for a new board and for one that has its identity."""
    for offset_s in (-5 * YEAR_S, 5 * YEAR_S, None):
        desk.ntp.offset_s = offset_s
        desk.deploy()
        for _ in range(2):
            desk.board.cut_power()
            desk.board.start(**HURRY)
            desk.reached()
    return "NTP five years behind, five years ahead, silent: at its hub each time"


def tpms(desk: Desk) -> str:
    """The TPM vanishes from the bus at several moments of a first life, and comes back."""
    for gone_ms in TPM_GONE_MS:
        desk.deploy()
        desk.board.start(**HURRY, gone=gone_ms, goneFor=TPM_GONE_FOR_MS)
        numbers = desk.reached()
    return f"gone for {TPM_GONE_FOR_MS} ms at {TPM_GONE_MS} ms: at its hub each time, in life {numbers['life']}"


def memory(desk: Desk) -> str:
    """One allocation fails, evenly spread over each phase of a first life; the device is at its hub all the same."""
    desk.deploy()
    desk.board.start(**HURRY)
    end = desk.reached()["allocations"]
    begin = int(re.findall(r"life 1 (\d+)", desk.board.console)[-1])
    phases = [("start", begin)]
    phases += [(name, int(at)) for name, at in re.findall(r"at (\w+) (\d+)", desk.board.console)]
    resets = 0
    for (name, first), (_, last) in itertools.pairwise([*phases, ("", end)]):
        for share in range(FAILURES):
            desk.deploy()
            allocation = first + 1 + (last - first) * share // FAILURES
            desk.board.start(**HURRY, fail=allocation)
            try:
                resets += desk.reached()["life"] - 1
            except BoardError as error:
                raise BoardError(f"allocation {allocation} of {end}, in {name}: {error}") from None
    said = ", ".join(f"{name} from {at:,}" for name, at in phases)
    return f"{FAILURES} allocations failed in each phase ({said}): at its hub each time, after {resets} resets"


def moved(desk: Desk) -> str:
    """The token is renewed; then DPS sends the device to another hub."""
    desk.deploy()
    desk.board.start(**RENEWAL)
    desk.reached()
    for _ in range(RENEWALS):
        desk.reconnected(desk.connects())
        if "the token is renewed" in desk.board.console:
            break
    desk.expect(desk.registrations() == 1 and "the token is renewed" in desk.board.console, "a renewed token")
    desk.cloud.service.move(DEVICE, SECOND_HUB)
    desk.expect(desk.cloud.invoke(DEVICE, "reprovision", None, 30)[0] == 202, "a registration that begins")
    while [line.hub for line in desk.cloud.hub_log if line.event == "connected"][-1] != SECOND_HUB:
        desk.reconnected(desk.connects())
    numbers = desk.reached()
    desk.shallow(numbers["stack"])
    return f"renewed, then at {SECOND_HUB}; life {numbers['life']}; " + told(numbers)


def flash(desk: Desk) -> str:
    """A firmware with the agent in it, beside the same without."""
    with_agent, without = (flash_bytes(desk.firmware(frozen)) for frozen in (True, False))
    agent, most = with_agent - without, AGENT_FLASH_BYTES
    desk.expect(agent <= most, f"at most {most} bytes of flash for the agent; came {agent}")
    return f"the agent takes {agent:,} B of the flash, beside {without:,} B of MicroPython"


def told(numbers: dict[str, Any]) -> str:
    """The numbers that the README has."""
    return (
        f"heap in use {numbers['inUse']:,} B, free {numbers['free']:,} B;"
        f" C stack {numbers['stack']:,} B; longest watchdog gap {numbers['gapMs']} ms;"
        f" {numbers['flashSteps']} flash steps; {numbers['allocations']:,} allocations"
    )


class Life(NamedTuple):
    """What happens to a board; where its modules lie; KiB of heap, 0: a Pico W's."""

    happens: Callable[[Desk], str]
    place: str = FROZEN
    heap_kib: int = 0


LIVES = {
    "life": Life(life),
    "life-romfs": Life(life, ROMFS),
    "life-files": Life(life, FILES, HEAPS_KIB[FILES]),
    "small": Life(life, FROZEN, HEAPS_KIB[FROZEN]),
    "small-romfs": Life(life, ROMFS, HEAPS_KIB[ROMFS]),
    "flash": Life(flash),
    "reconnects": Life(reconnects, FROZEN, HEAPS_KIB[FROZEN]),
    "reconnects-romfs": Life(reconnects, ROMFS, HEAPS_KIB[ROMFS]),
    "cuts": Life(cuts),
    "cable": Life(cable),
    "hubs": Life(hubs),
    "floods": Life(floods, FROZEN, HEAPS_KIB[FROZEN]),
    "names": Life(names),
    "clocks": Life(clocks),
    "tpms": Life(tpms),
    "memory": Life(memory),
    "moved": Life(moved),
}


@contextmanager
def desk_for(debian: Debian, cache: Path, heap_kib: int, place: str) -> Iterator[Desk]:
    """A desk whose service has a chain as large as Azure's."""
    module = vars(dps_emulator.embedded)
    usual = module["certificate_authority"]
    module["certificate_authority"] = lambda state_dir: large_authority()
    try:
        with tempfile.TemporaryDirectory(prefix="dps-mps2-") as name, ExitStack() as stack:
            yield Desk(debian, cache, Path(name), stack, heap_kib, place)
    finally:
        module["certificate_authority"] = usual


def main(words: list[str]) -> int:
    """Exit status; the last line has the counts."""
    at = words.index("--") if "--" in words else len(words)
    (micropython, mbedtls, lwip, cache), qemu, names = words[:4], words[4:at], words[at + 1 :] or ["life"]
    debian = Debian(Path(micropython).resolve(), Path(mbedtls).resolve(), Path(lwip).resolve(), tuple(qemu))
    failed = 0
    for word in names:
        name, _, heap_kib = word.partition("=")
        happens, place, usual_kib = LIVES[name]
        began_s = time.monotonic()
        try:
            with desk_for(debian, Path(cache).resolve(), int(heap_kib or usual_kib), place) as desk:
                verdict = happens(desk)
        except BuildError:
            raise
        except Exception as error:
            failed += 1
            verdict = f"FAILED: {error}" if isinstance(error, BoardError) else f"FAILED: {traceback.format_exc()}"
        print(f"{word}: {verdict} ({time.monotonic() - began_s:.0f} s)", flush=True)
    print(f"{len(names) - failed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except BuildError as error:
        print(error)
        sys.exit(1)
