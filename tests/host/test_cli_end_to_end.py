"""The command line and the library against the emulator, with a simulated TPM: real processes, real HTTPS."""

import base64
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dps_agent.host import Provisioned, hub_token, load, parts, provision
from dps_agent.host.steps import StepLines
from dps_emulator.enrollments import Enrollment
from dps_emulator.faults import Fault
from dps_emulator.service import Settings
from dps_hal.contracts import IDENTITY
from dps_hal.errors import AskOperator
from dps_hal.host.files import FileStore
from dps_hal.host.simulator import SimulatedTpm
from dps_hal.tpm.keys import registration_id_from_ek
from support.cloud.emulator import EmulatorInThread
from support.tpm.states import copy_state
from support.tpm.swtpm import Swtpm
from support.tpm.tap import TpmTap

CHECKOUT = Path(__file__).parents[2]
HUB = "emulator.azure-devices.net"
PATIENCE_S = 120
HEARING = ("env", "--default-signal=INT", sys.executable)  # what runs in the background may have it ignored
NEVER_S = 600.0  # longer than anything waits
PATHS = os.pathsep.join([str(CHECKOUT / "agent"), str(CHECKOUT / "hal")])


class Bench:
    """A device with a simulated TPM, an emulator that has it enrolled, and all that was ever printed."""

    def __init__(self, folder: Path, emulator: EmulatorInThread) -> None:
        self.emulator = emulator
        self.tpm_folder = copy_state("press-07", folder / "tpm")
        self.ek = SimulatedTpm(self.tpm_folder).endorsement_key()
        self.registration_id = registration_id_from_ek(self.ek)
        self.state_dir = folder / "state"
        self.settings = folder / "given.toml"
        self.settings.write_text(
            f'id_scope = "0ne00000000"\nendpoint = "https://localhost"\nconnect_to = "{emulator.connect_to}"\n'
            f'ca_file = "{emulator.ca_file}"\nstate_dir = "{self.state_dir}"\n'
            f'[tpm]\nbackend = "simulator"\ntcti = "{self.tpm_folder}"\n'
        )
        self.printed = ""

    def enroll(self, **fields: Any) -> None:
        self.emulator.service.enroll(Enrollment(self.registration_id, self.ek, device_id="press-07", **fields))

    def start(self, *words: str) -> "subprocess.Popen[str]":
        environ = {**{k: v for k, v in os.environ.items() if not k.startswith("DPS_AGENT_")}, "PYTHONPATH": PATHS}
        return subprocess.Popen(
            [*HEARING, "-m", "dps_agent.host.cli", "--config", str(self.settings), *words],
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *words: str, exit_status: int = 0) -> tuple[str, str]:
        """One command; its stdout and stderr."""
        with self.start(*words) as process:
            out, err = process.communicate(timeout=PATIENCE_S)
        self.printed += out + err
        assert process.returncode == exit_status, f"dps-agent {' '.join(words)}: {process.returncode}\n{out}\n{err}"
        assert "Traceback" not in err
        return out, err

    def json(self, *words: str, exit_status: int = 0) -> dict[str, Any]:
        """One command with --json; its document."""
        out, _ = self.run(*words, "--json", exit_status=exit_status)
        assert out.count("\n") == 1
        document: dict[str, Any] = json.loads(out)
        return document

    def operations(self) -> list[str]:
        return [line.operation for line in self.emulator.log]


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    with EmulatorInThread(Settings(retry_after_s=0)) as emulator:
        yield Bench(tmp_path, emulator)


def test_the_whole_life_of_a_device_and_no_secret_in_any_output(bench: Bench) -> None:
    bench.enroll()
    assert bench.json("status", exit_status=3)["state"] == "unprovisioned"
    first = bench.json("-v", "provision")
    assert (first["code"], first["assignedHub"], first["deviceId"]) == ("ok", HUB, "press-07")
    assert first["registrationId"] == bench.registration_id
    assert (first["alreadyProvisioned"], first["backend"]) == (False, "simulator")
    assert first["durationS"] > 0
    assert bench.json("status")["assignment"]["assignedHub"] == HUB

    asked = len(bench.emulator.log)
    text, _ = bench.run("provision")
    assert text.startswith("already provisioned")
    assert bench.json("provision")["alreadyProvisioned"] is True
    assert len(bench.emulator.log) == asked, "a device that is provisioned asked DPS"
    assert bench.json("provision", "--force", "-v")["alreadyProvisioned"] is False
    assert len(bench.emulator.log) > asked
    bench.run("enroll")
    bench.run("config", "show")

    stored = FileStore(str(bench.state_dir)).load(IDENTITY)
    assert stored is not None
    wrapped_key = json.loads(stored.payload[:-32])["wrappedKey"]
    hub_key = bench.emulator.service.hub_key(HUB, "press-07")
    assert hub_key is not None
    for secret in (hub_key, base64.b64decode(wrapped_key), stored.payload[-32:]):
        for form in (base64.b64encode(secret).decode(), secret.hex(), secret.hex().upper(), repr(secret)):
            assert form not in bench.printed
    assert "SharedAccessSignature" not in bench.printed
    assert "sig=" not in bench.printed
    assert "authenticationKey" not in bench.printed

    token = bench.json("token")
    assert bench.emulator.service.hub_token_refusal(token["token"], time.time()) is None
    assert bench.run("token")[0].startswith("SharedAccessSignature sr=")
    assert "deviceId" not in bench.run("reset", "--yes")[0]
    assert bench.json("status", exit_status=3)["state"] == "unprovisioned"
    assert bench.json("token", exit_status=1)["error"]["code"] == "record.absent"


def test_each_step_is_one_line_with_its_duration(bench: Bench) -> None:
    bench.enroll()
    _, progress = bench.run("provision")
    steps = [re.sub(r" +\d[\d.]* m?s$", "", line) for line in progress.splitlines()]
    assert all(re.search(r" \d[\d.]* m?s$|^wait ", line) for line in progress.splitlines()), progress
    wanted = [
        "read endorsement key",
        "register → 401 challenge",
        "import challenge key",
        "sign token",
        "register → 202 assigning",
        "status lookup → 200 assigned",
        "import hub key",
        "sign seal",
        "store assignment",
    ]
    positions = [steps.index(step) for step in wanted]
    assert positions == sorted(positions), progress


def test_verbose_shows_method_path_status_and_request_id_but_no_body(bench: Bench) -> None:
    bench.enroll()
    _, progress = bench.run("-v", "provision")
    shown = re.findall(r"(?m)^    (\w+) (/\S+) \d+ B(?: with token)? → (\d+) \d+ B request id (\S+)$", progress)
    assert [(method, int(status), request_id) for method, _, status, request_id in shown] == [
        (line.method, line.status, line.request_id) for line in bench.emulator.log
    ]
    assert all("/registrations/" in path for _, path, _, _ in shown)
    assert "endorsementKey" not in progress


def test_poll_operation_makes_no_lookup_and_lookup_no_operation(bench: Bench) -> None:
    bench.enroll()
    service = bench.emulator.service
    service.settings = dataclasses.replace(service.settings, assign_after_s=0.1)
    bench.run("provision")
    assert "lookup" in bench.operations()
    assert "operation" not in bench.operations()
    bench.emulator.log.clear()
    bench.run("provision", "--force", "--set", "poll=operation")
    assert "operation" in bench.operations()
    assert "lookup" not in bench.operations()


def test_a_payload_goes_there_and_comes_back_in_the_document(bench: Bench) -> None:
    bench.enroll()
    answer = bench.json("provision", "--set", "payload={line = 3}")
    assert "payload" in answer
    assert answer["payloadOmitted"] is False


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--set", "id_scope=0ne99999999"], "dps.not_found"),
        (["--set", "registration_id=nobody"], "dps.not_found"),
    ],
)
def test_an_unknown_scope_or_enrolment_is_exit_4(words: list[str], code: str, bench: Bench) -> None:
    bench.enroll()
    answer = bench.json("provision", *words, exit_status=4)
    assert (answer["code"], answer["error"]["code"]) == ("refused", code)
    assert answer["error"]["remedy"]
    assert answer["error"]["requestId"]
    assert bench.json("status", *words, exit_status=4)["state"] == "halted"


def test_a_disabled_enrolment_is_exit_4_and_the_text_says_what_to_do(bench: Bench) -> None:
    bench.enroll(enabled=False)
    _, err = bench.run("provision", exit_status=4)
    assert "the enrolment" in err.splitlines()[-2], err
    assert "request id" in err


def test_another_endorsement_key_is_exit_4(bench: Bench, tmp_path: Path) -> None:
    other = SimulatedTpm(copy_state("press-08", tmp_path / "other")).endorsement_key()
    bench.emulator.service.enroll(Enrollment(bench.registration_id, other))
    assert bench.json("provision", exit_status=4)["code"] == "refused"


def test_no_network_until_the_time_is_up_is_exit_3(bench: Bench) -> None:
    bench.enroll()
    answer = bench.json("provision", "--timeout", "2", "--set", "connect_to=127.0.0.1:1", exit_status=3)
    assert answer["code"] == "retry"
    assert answer["error"]["code"].split(".")[0] in ("network", "agent")


def test_the_first_wait_says_once_how_long_it_goes_on(bench: Bench) -> None:
    bench.enroll()
    bench.emulator.script(*[Fault(status=503, headers={"Retry-After": "1"}, request=number) for number in (1, 2)])
    _, err = bench.run("provision")
    lines = [line for line in err.splitlines() if line.startswith(("goes on", "wait"))]
    assert lines[0] == "goes on for 900 s at most, waits included" and len(lines) >= 3, err
    assert all(line.startswith("wait") for line in lines[1:])


def test_a_server_that_never_answers_is_exit_3_when_the_time_is_up(bench: Bench) -> None:
    bench.enroll()
    bench.emulator.script(Fault(delay_s=NEVER_S))
    answer = bench.json("provision", "--timeout", "1", exit_status=3)
    assert answer["error"]["code"] == "agent.out_of_time"


def test_an_unverified_server_is_not_talked_to(bench: Bench) -> None:
    bench.enroll()
    answer = bench.json("provision", "--timeout", "2", "--set", "ca_file=", exit_status=3)
    assert answer["error"]["code"] in ("network.tls", "agent.out_of_time")
    assert bench.emulator.log == []


@pytest.mark.parametrize(
    "fault",
    [Fault(status=429, headers={"Retry-After": "120"}), Fault(status=429, retry_after_date_s=120)],
    ids=["seconds", "a date"],
)
def test_throttling_tells_when_to_come_back(bench: Bench, fault: Fault) -> None:
    bench.enroll()
    bench.emulator.script(fault)
    answer = bench.json("provision", "--timeout", "2", exit_status=3)
    assert answer["code"] == "retry"
    assert 120 <= answer["error"]["retryAfterS"] <= 134


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_at_once_with_exit_3(number: signal.Signals, bench: Bench) -> None:
    bench.enroll()
    bench.emulator.script(Fault(delay_s=NEVER_S))
    with bench.start("provision", "--json") as process:
        assert process.stderr is not None
        while "load" not in (line := process.stderr.readline()) and line:
            if "endorsement" in line:
                break
        process.send_signal(number)
        out, err = process.communicate(timeout=30)  # half of what the request itself may take
    assert process.returncode == 3, err
    assert json.loads(out)["error"]["code"] == "agent.interrupted"


def test_a_failed_second_registration_keeps_the_first(bench: Bench) -> None:
    bench.enroll()
    bench.run("provision")
    before = FileStore(str(bench.state_dir)).load(IDENTITY)
    bench.enroll(enabled=False)
    assert bench.json("provision", "--force", exit_status=4)["code"] == "refused"
    assert FileStore(str(bench.state_dir)).load(IDENTITY) == before
    bench.json("token")


def test_a_closed_stderr_does_not_end_a_registration(bench: Bench) -> None:
    bench.enroll()
    with bench.start("provision", "--json") as process:
        assert process.stderr is not None
        assert process.stdout is not None
        process.stderr.close()
        assert json.loads(process.stdout.read())["code"] == "ok"
    assert process.returncode == 0


def test_the_hub_key_is_made_persistent_where_the_settings_say_so(bench: Bench) -> None:
    bench.enroll()
    bench.run("provision", "--set", "tpm.persist_at=0x81000100")
    stored = FileStore(str(bench.state_dir)).load(IDENTITY)
    assert stored is not None
    persistent = (Path(bench.tpm_folder) / "persistent-81000100.key").read_bytes()
    assert base64.b64encode(persistent).decode() == json.loads(stored.payload[:-32])["wrappedKey"]


def test_a_tpm_with_passwords_through_esys_survives_a_power_cut_and_signs_for_the_hub(
    bench: Bench, tmp_path: Path
) -> None:
    with Swtpm(tmp_path / "swtpm") as machine:
        words = ["--set", "tpm.backend=esys", "--set", f"tpm.tcti={machine.tcti}"]
        for hierarchy, key in ((0x40000001, "owner_auth_file"), (0x4000000B, "endorsement_auth_file")):
            password = tmp_path / key
            password.touch(0o600)
            password.write_bytes(b"hunter2\n")
            machine.set_hierarchy_auth(hierarchy, b"hunter2")
            words += ["--set", f"tpm.{key}={password}"]
        enrolled = bench.json("enroll", *words)
        assert enrolled["backend"] == "esys"
        key = base64.b64decode(enrolled["endorsementKey"])
        bench.emulator.service.enroll(Enrollment(enrolled["registrationId"], key, device_id="press-07"))
        assert bench.json("-v", "provision", *words)["deviceId"] == "press-07"
        assert machine.leftovers() == []
        machine.kill()
        machine.restart()
        token = bench.json("token", *words)["token"]
        assert bench.emulator.service.hub_token_refusal(token, time.time()) is None
        assert "hunter2" not in bench.printed
        machine.kill()
        answer = bench.json("token", *words, exit_status=5)
        assert answer["error"]["code"] == "tpm.absent"


def test_the_library_does_the_same_and_raises_what_the_command_reports(bench: Bench) -> None:
    with pytest.raises(AskOperator) as caught:
        provision(bench.settings)
    assert caught.value.code == "dps.not_found"
    bench.enroll()
    provisioned = provision(load(bench.settings), timeout_s=30)
    assert isinstance(provisioned, Provisioned)
    assert (provisioned.assigned_hub, provisioned.device_id) == (HUB, "press-07")
    assert not provisioned.already_provisioned
    assert provision(str(bench.settings)).already_provisioned
    assert bench.emulator.service.hub_token_refusal(hub_token(bench.settings, life_s=60), time.time()) is None


def test_an_error_of_a_progress_line_is_no_error_of_the_registration(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Gone:
        def write(self, text: str) -> int:
            raise BrokenPipeError

    bench.enroll()
    steps = StepLines(Gone(), True)  # type: ignore[arg-type]
    assert not parts.provision_once(load(bench.settings), steps=steps).already_provisioned


def test_a_second_provision_cannot_overtake_the_first(bench: Bench) -> None:
    bench.enroll()
    bench.emulator.script(Fault(operation="register", request=2, delay_s=3))
    with bench.start("provision", "--json") as first:
        wait_for(lambda: bench.operations().count("register") >= 1)
        answer = bench.json("provision", exit_status=3)
        assert answer["error"]["code"] == "store.locked"
        out, _ = first.communicate(timeout=PATIENCE_S)
    assert first.returncode == 0 and json.loads(out)["assignedHub"] == HUB
    token = bench.json("token")["token"]
    assert bench.emulator.service.hub_token_refusal(token, time.time()) is None


def test_a_key_that_cannot_be_persisted_is_a_warning_and_the_next_run_tries_again(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.enroll()
    handle = 0x81000200
    configuration = load(bench.settings, overrides=[f"tpm.persist_at={handle:#x}"])
    path = Path(bench.tpm_folder) / f"persistent-{handle:08x}.key"
    with monkeypatch.context() as patch:
        patch.setattr(SimulatedTpm, "persist", refuse_to_persist)
        refused = provision(configuration)
    assert refused.assigned_hub == HUB and "no room" in refused.warnings[0] and not path.exists()
    again = provision(configuration)
    assert again.already_provisioned and again.warnings == () and path.exists()


def refuse_to_persist(tpm: SimulatedTpm, wrapped_key: bytes, handle: int, former: bytes = b"") -> None:
    raise AskOperator("tpm.nv_full", "the TPM has no room")


def test_out_of_time_after_the_commit_is_a_success(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.enroll()
    commit = FileStore.commit

    ends: list[Callable[[], None]] = []

    class TimeIsUpLater:
        def __init__(self, _interval_s: float, end: Callable[[], None]) -> None:
            ends.append(end)

        def start(self) -> None: ...
        def cancel(self) -> None: ...

    def slow(store: FileStore, record: str, payload: bytes) -> None:
        commit(store, record, payload)
        if record == IDENTITY:
            ends[0]()

    monkeypatch.setattr(FileStore, "commit", slow)
    monkeypatch.setattr(parts.threading, "Timer", TimeIsUpLater)
    assert provision(bench.settings, timeout_s=900).assigned_hub == HUB
    assert len(ends) == 1


def test_deep_or_odd_answers_of_the_service_are_malformed_answers(bench: Bench) -> None:
    bench.enroll()
    for body in ("[" * 1005, '{"operationId":"\\ud800","status":"assigning"}', '{"operationId":"\\u0000"}'):
        bench.emulator.script(*[Fault(operation="register", request=n, status=200, body=body) for n in range(1, 9)])
        answer = bench.json("provision", exit_status=3)
        assert answer["error"]["code"] == "dps.malformed_answer", body[:40]


def test_enroll_ends_at_a_signal_though_the_tpm_hangs(bench: Bench, tmp_path: Path) -> None:
    with Swtpm(tmp_path / "swtpm") as machine, TpmTap(machine.port) as tap:
        tap.hang(command="ReadPublic")
        with bench.start("enroll", "--set", "tpm.backend=esys", "--set", f"tpm.tcti={tap.tcti}") as process:
            assert tap.hanging.wait(PATIENCE_S), process.poll()
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 3 and "[agent.interrupted]" in err and "Traceback" not in err, err


def wait_for(condition: Any, within_s: float = PATIENCE_S) -> None:
    until_s = time.monotonic() + within_s
    while not condition() and time.monotonic() < until_s:
        time.sleep(0.02)
