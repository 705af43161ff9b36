"""The main job end to end: a real TPM (swtpm, every byte tapped), real HTTPS, real processes."""

import base64
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from dps_agent.assignment import decode
from dps_agent.effects import Commit
from dps_agent.host.clock import SystemClock
from dps_agent.host.config import load
from dps_agent.host.network.https import DpsConnection
from dps_agent.host.parts import open_tpm
from dps_agent.host.runner import Runner
from dps_agent.lifecycle import PROVISIONED, Lifecycle
from dps_emulator.state import open_store
from dps_hal.contracts import IDENTITY
from dps_hal.host.files import FileStore
from support.cloud.emulator import EmulatorProcess
from support.programs.running_agent import RunningAgent
from support.tpm.swtpm import Swtpm
from support.tpm.tap import TpmTap

CHECKOUT = Path(__file__).parents[2]
PATHS = os.pathsep.join([str(CHECKOUT / folder) for folder in ("agent", "hal", "tools")])
BACKENDS = ("esys", "wire")
OFFICIAL_CLIENTS = 26  # TPM commands of a registration, in clear
# TPM commands of a program, from its first to its last; ESAPI itself needs none beside ours.
COMMANDS = {"provision --force": 18, "provision": 8, "token": 11}
# Until it is connected and ends: seal, condition, token; the session anew where the wait before the first connection,
# which is random, is long enough for the TPM to be released.
RUN_COMMANDS = (13, 18)
LOCKOUT_COUNTER = 0x20E  # TPM_PT_LOCKOUT_COUNTER


class Desk:
    """One device with a TPM on a tapped bus, and a service that takes it at first sight."""

    def __init__(self, folder: Path, backend: str) -> None:
        self.folder = folder
        self.backend = backend
        self.stack = ExitStack()
        self.swtpm = self.stack.enter_context(Swtpm(folder / "tpm"))
        self.tap = self.stack.enter_context(TpmTap(self.swtpm.port))
        self.settings = folder / "config.toml"
        self.state_dir = folder / "state"
        self.service_state = folder / "service"

    def serve(self, *flags: str) -> EmulatorProcess:
        """Starts the service and writes the device's settings for it."""
        emulator = EmulatorProcess("--enroll-any", *flags, state_dir=self.service_state)
        self.stack.enter_context(emulator)
        self.settings.write_text(
            f'id_scope = "0ne00000000"\nregistration_id = "press-07"\nendpoint = "{emulator.url}"\n'
            f'ca_file = "{emulator.ca_file}"\nstate_dir = "{self.state_dir}"\n'
            f'[tpm]\nbackend = "{self.backend}"\ntcti = "{self.tap.tcti}"\n'
        )
        return emulator

    def program(self, *words: str, stdin: str = "") -> "subprocess.CompletedProcess[str]":
        environ = {name: value for name, value in os.environ.items() if not name.startswith("DPS_AGENT_")}
        return subprocess.run(
            [sys.executable, "-m", *words],
            check=False,
            env={**environ, "PYTHONPATH": PATHS},
            input=stdin,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def agent(self, *words: str, exit_status: int = 0) -> dict[str, Any]:
        done = self.program("dps_agent.host.cli", *words, "--config", str(self.settings), "--json")
        assert done.returncode == exit_status, f"dps-agent {words}: {done.returncode}\n{done.stdout}{done.stderr}"
        document: dict[str, Any] = json.loads(done.stdout)
        return document

    def token_verifies(self) -> bool:
        """Whether the service finds its own hub key behind a token that the device makes now."""
        token = self.agent("token")["token"]
        words = ("dps_emulator.cli", "verify-token", "-", "--state-dir", str(self.service_state))
        return self.program(*words, stdin=token).returncode == 0

    def stored(self) -> bytes:
        record = FileStore(str(self.state_dir)).load(IDENTITY)
        assert record is not None
        return record.payload

    def store(self, payload: bytes) -> None:
        FileStore(str(self.state_dir)).commit(IDENTITY, payload)


@pytest.fixture(params=BACKENDS)
def desk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Desk]:
    desk = Desk(tmp_path, request.param)
    with desk.stack:
        yield desk


def operations(emulator: EmulatorProcess) -> list[str]:
    return [line.operation for line in emulator.log]


def test_a_tpm_gets_its_hub_and_the_document_says_which(desk: Desk) -> None:
    emulator = desk.serve("--retry-after", "1", "--assign-after", "1.5")
    document = desk.agent("provision")
    assert document["code"] == "ok"
    assert document["assignedHub"] == "emulator.azure-devices.net"
    assert document["deviceId"] == document["registrationId"] == "press-07"
    asked = operations(emulator)
    assert asked[:2] == ["register", "register"] and asked.count("lookup") >= 2
    assert "operation" not in asked, f"an operation GET without need: {asked}"
    assert desk.swtpm.leftovers() == []
    assert desk.token_verifies()


def test_a_stale_lookup_does_not_bring_the_old_hub_back(desk: Desk) -> None:
    desk.serve("--retry-after", "0", "--hub", "one.azure-devices.net", "--hub", "two.azure-devices.net",
               "--allocation", "rotate", "--lookup", "stale:3", "--assign-after", "1")  # fmt: skip
    first = desk.agent("provision")["assignedHub"]
    second = desk.agent("provision", "--force")["assignedHub"]
    assert {first, second} == {"one.azure-devices.net", "two.azure-devices.net"}
    assert decode(desk.stored())[0].assigned_hub == second
    assert desk.token_verifies()


def provision_counted(desk: Desk) -> list[str]:
    """Registers in this process and returns the TPM commands up to the answer before Commit."""
    configuration = load(desk.settings)
    tpm = open_tpm(configuration)
    counted: list[str] = []

    def observe(effect: Any, _answer: object, _seconds: float) -> None:
        if isinstance(effect, Commit) and effect.record == IDENTITY:
            counted.extend(before)
        before[:] = desk.tap.names

    before: list[str] = []
    runner = Runner(
        tpm=tpm,
        store=FileStore(configuration.state_dir),
        connection=DpsConnection(configuration.endpoint, ca_file=configuration.ca_file),
        clock=SystemClock(),
        observe=observe,
    )
    life = Lifecycle(configuration.settings())
    desk.tap.forget()
    runner.run(life.live(once=True, force=False))
    assert life.state == PROVISIONED and life.committed, life.reason
    return counted


def test_a_registration_takes_fewer_tpm_commands_than_the_official_clients(desk: Desk) -> None:
    desk.serve("--retry-after", "0")
    desk.agent("provision")  # EK and SRK are there afterwards
    desk.agent("reset", "--yes")
    counted = provision_counted(desk)
    assert counted[0] == "ReadPublic"
    limit = COMMANDS["provision --force"]
    assert 0 < len(counted) <= limit < OFFICIAL_CLIENTS, f"{len(counted)} commands: {counted}"
    print(f"TPM commands per registration, {desk.backend}: {len(counted)}: {' '.join(counted)}")
    assert desk.swtpm.leftovers() == []


def test_how_many_tpm_commands_each_program_takes_from_first_to_last(desk: Desk) -> None:
    emulator = desk.serve("--retry-after", "0")
    desk.agent("provision")  # EK and SRK are there afterwards
    taken = {}
    for program in ("provision --force", "provision", "token"):
        desk.tap.forget()
        desk.agent(*program.split())
        taken[program] = desk.tap.names
    desk.tap.forget()
    tpm = f'backend = "{desk.backend}"\ntcti = "{desk.tap.tcti}"'
    with RunningAgent(desk.folder, emulator, tpm) as service:
        service.start()
        service.await_connected()
        assert service.end()[0] == 0
    assert {program: len(names) for program, names in taken.items()} == COMMANDS, taken
    assert len(desk.tap.names) in RUN_COMMANDS, desk.tap.names
    assert desk.swtpm.leftovers() == []


def test_no_secret_crosses_the_bus(desk: Desk) -> None:
    desk.serve("--retry-after", "0")
    desk.agent("provision")
    with contextlib.closing(open_store(desk.service_state)) as store:
        (registration,) = store.registrations.values()
    key = hub_key_in(registration.to_json())
    record = desk.stored()
    assert desk.tap.exchanges and not desk.tap.seen(key), "the hub key crossed the bus in clear"
    assert not desk.tap.seen(record[-32:]), "the seal, a signature, crossed the bus in clear"
    token = desk.agent("token")["token"]
    signature = base64.b64decode(
        token.split("sig=")[1].split("&")[0].replace("%2B", "+").replace("%2F", "/").replace("%3D", "=")
    )
    assert len(signature) == 32 and not desk.tap.seen(signature), "a token's signature crossed the bus in clear"


def hub_key_in(registration: Any) -> bytes:
    """The one base64 text of 32 bytes in the service's own record of a registration."""
    found: list[bytes] = []

    def look(value: Any) -> None:
        if isinstance(value, dict):
            for inner in value.values():
                look(inner)
        elif isinstance(value, list):
            for inner in value:
                look(inner)
        elif isinstance(value, str) and len(value) == 44 and value.endswith("="):
            found.append(base64.b64decode(value))

    look(registration)
    assert len(found) >= 1, f"no hub key in {registration}"
    return found[0]


def test_the_key_signs_for_the_hub_after_the_tpm_lost_its_power(desk: Desk) -> None:
    desk.serve("--retry-after", "0")
    desk.agent("provision")
    for _ in range(3):
        desk.swtpm.kill()
        desk.swtpm.restart()
        assert desk.token_verifies()
    assert desk.agent("provision")["alreadyProvisioned"] is True


def test_a_key_that_counts_against_the_lockout_survives_power_cuts(desk: Desk) -> None:
    desk.serve("--retry-after", "0", "--no-noda")
    desk.agent("provision")
    for _ in range(4):  # three would lock swtpm out
        desk.swtpm.kill()
        desk.swtpm.restart()
        assert desk.token_verifies()
    assert desk.swtpm.property(LOCKOUT_COUNTER) == 0


def test_a_record_with_one_byte_changed_is_refused_by_its_seal(desk: Desk) -> None:
    desk.serve("--retry-after", "0")
    desk.agent("provision")
    whole = desk.stored()
    for place in (whole.index(b"emulator.azure"), whole.index(b"press-07"), len(whole) - 1, len(whole) - 40):
        broken = bytearray(whole)
        broken[place] ^= 0x01
        desk.store(bytes(broken))
        answer = desk.agent("token", exit_status=1)
        assert answer["error"]["code"].startswith("record."), f"place={place}: {answer}"
    desk.store(whole)
    assert desk.token_verifies()


def test_a_key_paired_with_another_hub_is_refused_by_its_seal(desk: Desk) -> None:
    desk.serve("--retry-after", "0")
    desk.agent("provision")
    whole = desk.stored()
    desk.store(whole.replace(b"emulator.azure-devices.net", b"attacker.azure-devices.net"))
    answer = desk.agent("token", exit_status=1)
    assert answer["error"]["code"] == "record.stale" and "seal" in answer["error"]["message"]
    assert desk.agent("provision")["assignedHub"] == "emulator.azure-devices.net", "it registers again by itself"
    assert desk.token_verifies()


def test_a_failure_at_any_tpm_command_leaves_nothing_in_the_tpm(desk: Desk) -> None:
    desk.serve("--retry-after", "0")
    desk.agent("provision")
    desk.agent("reset", "--yes")
    commands = len(provision_counted(desk))
    kept = desk.stored()
    for number in range(commands):
        desk.tap.forget()
        desk.tap.refuse(0x1C4, skip=number)  # TPM_RC_VALUE, parameter 1: no command is repeated for it
        document = desk.program("dps_agent.host.cli", "provision", "--force", "--config", str(desk.settings), "--json")
        assert "Traceback" not in document.stderr, f"command={number}: {document.stderr}"
        assert desk.swtpm.leftovers() == [], f"command={number} left {desk.swtpm.leftovers()}"
        if document.returncode:
            assert desk.stored() == kept, f"command={number} changed the record"
        else:
            kept = desk.stored()
    assert desk.token_verifies()


def test_a_tpm_that_never_answers_does_not_keep_the_process_alive(desk: Desk) -> None:
    desk.serve("--retry-after", "0")
    desk.agent("provision")
    desk.tap.hang(command="Load")
    answer = desk.agent("provision", "--force", "--timeout", "2", exit_status=3)
    assert answer["error"]["code"] == "agent.out_of_time"
