"""The command line without a network: exit statuses, the JSON document, and what must not be loaded or shown."""

import base64
import csv
import errno
import io
import json
import os
import re
import socket
import subprocess
import sys
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from dps_agent import lifecycle
from dps_agent.assignment import Assignment, encode, seal_message
from dps_agent.host import Configuration, hub_token, load
from dps_agent.host import clock as host_clock
from dps_agent.host.cli import config as config_verb
from dps_agent.host.cli import exit_word, main, running, status
from dps_agent.host.cli.verb import UsageError
from dps_agent.host.local import statefile
from dps_agent.host.parts import _stopped_after
from dps_agent.progress import Progress, encode_progress
from dps_agent.sas import string_to_sign
from dps_agent.settings import TPM
from dps_hal.contracts import IDENTITY, PROGRESS
from dps_hal.errors import EXIT_GROUPS, AskOperator, Broken, DpsError, IdentityStale, RetryLater
from dps_hal.host.files import FileStore
from dps_hal.host.simulator import SimulatedTpm
from dps_hal.platform import hmac_sha256
from dps_hal.tpm.keys import object_name, registration_id_from_ek
from dps_hal.tpm.self_challenge import make_activation
from support.tpm.states import copy_state

CHECKOUT = Path(__file__).parents[2]
HUB_KEY = bytes(range(100, 132))
HUB = "emulator.azure-devices.net"
NTP_KEEPS_THE_CLOCK = (
    "from dps_agent.host import clock; clock.is_synchronised = lambda: True; from dps_agent.host.cli import main"
)
HEAVY = (
    "tpm2_pytss",
    "cryptography",
    "ssl",
    "paho",
    "http.client",
    "dps_hal.host.esys",
    "dps_hal.tpm.wire",
    "dps_hal.host.simulator",
)
ENVIRON = {**os.environ, "PYTHONPATH": os.pathsep.join([str(CHECKOUT / "agent"), str(CHECKOUT / "hal")])}


class Desk:
    """One device on a desk: a simulated TPM, a state folder, and the settings that name them."""

    def __init__(self, folder: Path) -> None:
        self.tpm_folder = copy_state("press-07", folder / "tpm")
        self.tpm = SimulatedTpm(self.tpm_folder)
        self.store = FileStore(str(folder / "state"))
        self.state_dir = str(folder / "state")
        self.settings = folder / "given.toml"
        self.settings.write_text(
            f'id_scope = "0ne00000000"\nendpoint = "https://localhost:1"\nstate_dir = "{self.state_dir}"\n'
            f'[tpm]\nbackend = "simulator"\ntcti = "{self.tpm_folder}"\n'
        )

    def run(self, *words: str) -> int:
        return main(["--config", str(self.settings), *words])

    def assign(self, hub: str = HUB) -> Assignment:
        """Stores an assignment whose hub key is HUB_KEY, sealed as the agent seals it."""
        ek, srk = self.tpm.endorsement_key(), self.tpm.storage_root_key()
        assignment = Assignment(
            "0ne00000000",
            "https://localhost:1",
            registration_id_from_ek(ek),
            hub,
            "press-07",
            self.tpm.import_key(make_activation(ek, srk, HUB_KEY)),
            object_name(ek),
            object_name(srk),
            "assigned",
            "initialAssignment",
            "",
            "",
            "",
            1_800_000_000,
            {"line": 3},
            False,
            TPM,
            "",
        )
        text = encode(assignment)
        self.store.commit(IDENTITY, text + self.tpm.sign(assignment.wrapped_key, seal_message(text)))
        return assignment

    def fail(self, code: str, message: str, halted: bool) -> None:
        """Stores a failed attempt."""
        self.store.commit(PROGRESS, encode_progress(Progress(3, 60, 0, halted, code, message, 0, 0)))


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Desk:
    for name in [name for name in os.environ if name.startswith("DPS_AGENT_")]:
        monkeypatch.delenv(name)
    return Desk(tmp_path)


def document(captured: str) -> dict[str, Any]:
    """The one JSON document of an output."""
    assert captured.count("\n") == 1, captured
    parsed: dict[str, Any] = json.loads(captured)
    assert parsed["schema"] == "dps-agent/1"
    assert parsed["code"] in EXIT_GROUPS
    return parsed


def python(code: str, *words: str) -> "subprocess.CompletedProcess[str]":
    """A fresh interpreter: what it loads is what the code needs."""
    return subprocess.run(
        [sys.executable, "-c", code, *words], env=ENVIRON, capture_output=True, text=True, timeout=60, check=False
    )


# --- exit statuses and the document


def test_exit_statuses_are_fixed_for_ever() -> None:
    assert EXIT_GROUPS == ("ok", "failed", "usage", "retry", "refused", "tpm", "config")


@pytest.mark.parametrize(
    ("error", "word"),
    [
        (RetryLater("network.timeout", ""), "retry"),
        (RetryLater("dps.throttled", ""), "retry"),
        (RetryLater("agent.out_of_time", ""), "retry"),
        (AskOperator("dps.not_found", ""), "refused"),
        (AskOperator("tpm.denied", ""), "tpm"),
        (RetryLater("tpm.locked_out", ""), "tpm"),
        (AskOperator("tpm.not_available", ""), "usage"),
        (UsageError(""), "usage"),
        (AskOperator("config.invalid", ""), "config"),
        (AskOperator("record.absent", ""), "failed"),
        (IdentityStale("record.stale", ""), "failed"),
        (AskOperator("store.denied", ""), "failed"),
        (Broken("agent.bug", ""), "failed"),
    ],
)
def test_each_error_has_its_exit_status(error: DpsError, word: str) -> None:
    assert exit_word(error) == word


@pytest.mark.parametrize("words", [["--json", "version"], ["version", "--json"], ["--version", "--json"]])
def test_json_is_understood_before_and_after_the_verb(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 0
    assert document(capsys.readouterr().out)["verb"] == "version"


@pytest.mark.parametrize("words", [[], ["nothing"], ["status", "--nothing"], ["token", "--life", "soon"], ["config"]])
def test_a_wrong_command_line_is_exit_2_in_both_formats(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    text = capsys.readouterr()
    assert (text.out, text.err[:6]) == ("", "usage:")
    assert main([*words, "--json"]) == 2
    captured = capsys.readouterr()
    assert document(captured.out)["code"] == "usage"
    assert document(captured.out)["error"]["code"] == "agent.usage"


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--bogus"], "--bogus"),
        (["--bogus", "status"], "--bogus"),
        (["status", "--bogus"], "--bogus"),
        (["status", "--set", "tpm.backend"], "KEY=VALUE; came 'tpm.backend'"),
        ([], "expected a verb"),
    ],
)
def test_a_wrong_command_line_is_told_what_is_wrong_with_it(
    words: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("dps-agent: ")]
    assert named in line


@pytest.fixture
def hung_service(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> Iterator[Desk]:
    """A desk whose service runs and answers nobody."""
    path = f"{desk.state_dir}.sock"
    live = {**dict.fromkeys(("untilUptimeS", "lastError"), None), "state": "connected", "socket": path, "pid": 1}
    live |= dict.fromkeys(("reason", "since", "assignedHub", "deviceId", "registrationId", "version"), "x")
    live |= {"sinceUptimeS": 0, "connections": 1, "failedAttempts": 0}
    monkeypatch.setattr(statefile, "read_live", lambda _: live)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        yield desk


def test_a_service_that_hangs_is_looked_at_not_given_more_time(
    hung_service: Desk, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert running.ANSWER_LIMIT_S <= 20
    monkeypatch.setattr(running, "ANSWER_LIMIT_S", 0.2)
    assert hung_service.run("token") == 3
    said = capsys.readouterr().err
    assert "did not answer within 0.2 s" in said and "systemctl status dps-agent" in said and "--timeout" not in said
    assert hung_service.run("provision", "--timeout", "1") == 3
    said = capsys.readouterr().err
    assert said.startswith("dps-agent: asks the service that runs, for 1 s at most\n") and "--timeout" in said
    assert "the service did not answer within 1 s; it is connected: x\n" in said


@pytest.mark.parametrize(("reason", "ends"), [("", "within 0.01 s"), ("503", "s; the last wait was for: 503")])
def test_a_provision_that_is_out_of_time_says_what_it_waited_for(reason: str, ends: str) -> None:
    stopped = threading.Event()
    runner = Mock(stop=stopped.set)
    with pytest.raises(RetryLater, match=f"{ends}$"), _stopped_after(runner, 0.01, [reason], lambda: False):
        assert stopped.wait(60)
        raise RetryLater("agent.interrupted", "")


@pytest.mark.parametrize("verb", ["provision", "token", "reset"])
def test_settings_that_a_running_service_does_not_see_are_refused(
    verb: str, hung_service: Desk, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--yes"] if verb == "reset" else []
    assert hung_service.run(verb, *words, "--set", "id_scope=0ne99999999") == 2
    assert "--set id_scope: the service that runs has settings of its own" in capsys.readouterr().err


def test_the_status_of_a_running_service_says_what_it_does_not_see(
    hung_service: Desk, capsys: pytest.CaptureFixture[str]
) -> None:
    assert hung_service.run("status", "--set", "id_scope=0ne99999999") == 0
    assert "--set id_scope: the service that runs" in capsys.readouterr().err
    assert hung_service.run("status", "--set", f"state_dir={hung_service.state_dir}") == 0
    assert capsys.readouterr().err == ""


def test_flags_before_and_after_the_verb_both_count(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    assert desk.run("--set", "hub.keep_alive_s=31", "config", "show", "--set", "poll=operation", "--json") == 0
    settings = document(capsys.readouterr().out)["settings"]
    assert settings["hub.keep_alive_s"] == {"value": 31, "origin": "--set hub.keep_alive_s"}
    assert settings["poll"] == {"value": "operation", "origin": "--set poll"}


def test_wrong_settings_are_exit_6_with_every_problem(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    for verb in (["provision"], ["token"], ["enroll"], ["status"], ["reset"], ["config", "validate"]):
        assert desk.run(*verb, "--set", "hub.keep_alive_s=0", "--set", "poll=x", "--json") == 6, verb
        error = document(capsys.readouterr().out)["error"]
        assert [problem.split(":")[0] for problem in error["problems"]] == ["hub.keep_alive_s", "poll"]
        assert error["code"] == "config.invalid"
        assert error["remedy"]


def test_an_error_as_text_has_message_remedy_and_code(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    assert desk.run("token") == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == (
        f"dps-agent: there is no assignment in {desk.state_dir}\n  run 'dps-agent provision'  [record.absent]\n"
    )


def test_an_unexpected_exception_is_a_bug_report_without_its_text(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(self: FileStore, record: str) -> None:
        raise ZeroDivisionError("hunter2")

    monkeypatch.setattr(FileStore, "load", broken)
    assert desk.run("status", "--json") == 1
    captured = capsys.readouterr()
    error = document(captured.out)["error"]
    assert error["code"] == "agent.bug"
    assert re.search(r"ZeroDivisionError at test_cli\.py:\d+", error["message"])
    assert "hunter2" not in captured.out + captured.err
    assert "Traceback" not in captured.err


def test_ctrl_c_is_exit_3_without_a_traceback(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(self: FileStore, record: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(FileStore, "load", interrupted)
    assert desk.run("status", "--json") == 3
    assert document(capsys.readouterr().out)["error"]["code"] == "agent.interrupted"


def test_a_reader_that_goes_away_is_no_traceback() -> None:
    code = "import sys, time; from dps_agent.host.cli import main; sys.exit(main(['config', 'show']))"
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=ENVIRON, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    with process.stderr as errors:
        assert errors.read() == ""
    assert process.wait(120) == 1


def test_a_full_disk_behind_stdout_is_one_sentence() -> None:
    with open("/dev/full", "w") as full:
        code = "import sys; from dps_agent.host.cli import main; sys.exit(main(['version']))"
        ended = subprocess.run(
            [sys.executable, "-c", code],
            env=ENVIRON,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            check=False,
        )
    assert (ended.returncode, ended.stderr) == (
        1,
        "dps-agent: the output could not be written: No space left on device\n",
    )


def test_control_characters_do_not_reach_the_terminal(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    desk.fail("dps.refused", "DPS said \x1b[2J\x07", True)
    assert desk.run("status") == 4
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert "\\x1b[2J\\x07" in shown


# --- what is loaded


@pytest.mark.parametrize("words", [["--help"], ["version"], ["status"], ["config", "show"], ["reset", "--yes"]])
def test_verbs_without_tpm_and_network_load_neither(words: list[str], tmp_path: Path) -> None:
    code = (
        "import sys\nfrom dps_agent.host.cli import main\nstatus = main(sys.argv[1:])\n"
        f"print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr)\nsys.exit(status)"
    )
    ended = python(code, "--set", f"state_dir={tmp_path}", *words)
    assert ended.stderr == "[]\n", f"dps-agent {' '.join(words)} loads {ended.stderr}"


def test_the_library_loads_neither_tpm_nor_network_when_it_is_imported() -> None:
    code = f"import sys, dps_agent.host; print([name for name in {HEAVY} if name in sys.modules])"
    assert python(code).stdout == "[]\n"


def test_token_does_not_load_tls(desk: Desk) -> None:
    desk.assign()
    code = f"import sys; {NTP_KEEPS_THE_CLOCK}; main(sys.argv[1:]); print('ssl' in sys.modules)"
    assert python(code, "--config", str(desk.settings), "token").stdout.endswith("\nFalse\n")


@pytest.mark.parametrize(("backend", "package"), [("simulator", "cryptography"), ("esys", "tpm2_pytss")])
def test_a_missing_extra_is_one_sentence_and_exit_2(backend: str, package: str, tmp_path: Path) -> None:
    code = (
        f"import sys\nsys.modules['{package}'] = None\n"
        "from dps_agent.host.cli import main\nsys.exit(main(sys.argv[1:]))"
    )
    words = [
        "--set",
        f"tpm.backend={backend}",
        "--set",
        f"tpm.tcti={tmp_path}/tpm",
        "--set",
        "endpoint=https://localhost",
    ]
    ended = python(code, "enroll", *words)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("dps-agent: ")
    assert ended.stderr.count("\n") == 2, ended.stderr
    assert "extra" in ended.stderr


# --- status


def test_the_states_that_status_tells_apart_are_those_of_a_life() -> None:
    states = {lifecycle.PROVISIONED, lifecycle.CONNECTING, lifecycle.CONNECTED, lifecycle.WAITING, lifecycle.HALTED}
    assert set(status._CODES) == states


def test_who_may_not_look_into_the_service_s_folder_is_not_told_to_take_it_over(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(folder: str) -> None:
        advice = f"make the folder yours (sudo install -d -o press -m 0700 {folder})"
        raise AskOperator("store.denied", f"cannot open {folder}/identity.0: Permission denied; {advice}")

    monkeypatch.setattr("dps_hal.host.state_dir.open_store", refuse)
    monkeypatch.setattr("dps_agent.host.cli.os.geteuid", lambda: 1000)
    words = ["--config", os.devnull, "--set", "id_scope=0ne00000000", "--set", "runtime_dir=/nonexistent"]
    assert main(["status", *words, "--set", "state_dir=/var/lib/dps-agent"]) == 1
    said = capsys.readouterr().err
    assert "run it as root: sudo dps-agent status" in said and "[agent.denied]" in said
    assert "install" not in said and "own the state folder" not in said
    assert main(["status", *words, "--set", "state_dir=/home/press/state"]) == 1
    assert "sudo install" in capsys.readouterr().err


def test_status_before_anything_is_exit_3(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    assert desk.run("status", "--json") == 3
    answer = document(capsys.readouterr().out)
    assert (answer["code"], answer["state"], answer["assignment"]) == ("retry", "unprovisioned", None)
    assert answer["error"]["code"] == "record.absent"
    assert not Path(desk.state_dir).exists()


def test_status_of_a_fresh_device_names_the_missing_id_scope_first(
    desk: Desk, capsys: pytest.CaptureFixture[str]
) -> None:
    desk.settings.write_text(desk.settings.read_text().replace('id_scope = "0ne00000000"\n', ""))
    desk.fail("network.dns", "no name", False)
    assert desk.run("status") == 3
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["state            unprovisioned", "why              id_scope is not set"]
    assert lines[2].startswith(f"next             set id_scope in {desk.settings}; ")
    assert desk.run("status", "--json") == 3
    answer = document(capsys.readouterr().out)
    assert (answer["error"]["code"], answer["error"]["remedy"]) == ("config.missing", answer["next"])
    desk.assign()
    assert desk.run("status") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "state            provisioned" and lines[2].startswith("next             set id_scope")


def test_status_leaves_out_what_failed_under_other_settings(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    under = load(str(desk.settings)).settings().under
    for of_record, state in ((under, "halted"), (0, "halted"), (under + 1, "unprovisioned")):
        progress = Progress(3, 60, 0, True, "dps.not_found", "no such scope", 0, of_record)
        desk.store.commit(PROGRESS, encode_progress(progress))
        desk.run("status", "--json")
        assert document(capsys.readouterr().out)["state"] == state


def test_status_of_an_assigned_device_is_exit_0_and_shows_no_key(
    desk: Desk, capsys: pytest.CaptureFixture[str]
) -> None:
    assignment = desk.assign()
    Path(desk.tpm_folder).rename(desk.tpm_folder + "-gone")  # status needs no TPM
    assert desk.run("status", "--json") == 0
    captured = capsys.readouterr().out
    answer = document(captured)
    assert (answer["code"], answer["state"], answer["backend"]) == ("ok", "provisioned", "simulator")
    assert answer["assignment"]["assignedHub"] == HUB
    assert answer["assignment"]["deviceId"] == "press-07"
    assert answer["assignment"]["payload"] == {"line": 3}
    for key in ("assignedHub", "deviceId", "registrationId", "substatus"):
        assert answer[key] == answer["assignment"][key], "where it is while a service runs"
    assert "error" not in answer
    assert base64.b64encode(assignment.wrapped_key).decode() not in captured
    assert desk.run("status") == 0
    text = capsys.readouterr().out
    assert HUB in text
    assert "simulator" in text


@pytest.mark.parametrize(("halted", "exit_status", "state"), [(True, 4, "halted"), (False, 3, "waiting")])
def test_status_after_failures_says_why_and_what_next(
    halted: bool, exit_status: int, state: str, desk: Desk, capsys: pytest.CaptureFixture[str]
) -> None:
    desk.fail("dps.enrollment_disabled", "the enrolment is disabled", halted)
    assert desk.run("status", "--json") == exit_status
    answer = document(capsys.readouterr().out)
    assert (answer["state"], answer["reason"]) == (state, "the enrolment is disabled")
    assert answer["error"]["remedy"] == answer["next"] == "enable the enrolment in DPS"
    assert (answer["failedAttempts"], answer["error"]["retryAfterS"]) == (3, 60)


def test_a_refused_second_registration_leaves_the_device_assigned(
    desk: Desk, capsys: pytest.CaptureFixture[str]
) -> None:
    desk.assign()
    desk.fail("dps.enrollment_disabled", "the enrolment is disabled", True)
    assert desk.run("status", "--json") == 0
    assert document(capsys.readouterr().out)["lastError"]["code"] == "dps.enrollment_disabled"


def test_an_assignment_that_the_tpm_refused_is_not_called_provisioned(
    desk: Desk, capsys: pytest.CaptureFixture[str]
) -> None:
    desk.assign()
    desk.fail("tpm.ek_changed", "the stored assignment belongs to another TPM", True)
    assert desk.run("status", "--json") == 4
    assert document(capsys.readouterr().out)["state"] == "halted"


def test_an_assignment_for_other_settings_is_exit_3(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    desk.assign()
    assert desk.run("status", "--json", "--set", "id_scope=0ne99999999") == 3
    answer = document(capsys.readouterr().out)
    assert answer["error"]["code"] == "record.stale"
    assert "0ne99999999" in answer["reason"]


def test_a_record_without_a_whole_copy_is_damaged_not_absent(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    desk.assign()
    for slot in (0, 1):
        path = Path(desk.state_dir) / f"identity.{slot}"
        content = path.read_bytes() if path.exists() else b""
        path.write_bytes(content[:8] + b"rust" + content[12:])
    for words, exit_status in ((["status"], 3), (["token"], 1)):
        assert desk.run(*words, "--json") == exit_status, words
        error = document(capsys.readouterr().out)["error"]
        assert (error["code"], "damaged" in error["message"]) == ("record.damaged", True), words
    desk.run("check", "--offline", "--only", "record", "--json")
    found = {check["id"]: check for check in document(capsys.readouterr().out)["checks"]}["record"]
    assert (found["result"], "damaged" in found["detail"]) == ("warning", True)
    assert desk.run("reset", "--yes", "--json") == 0
    capsys.readouterr()
    assert desk.run("status", "--json") == 3
    assert document(capsys.readouterr().out)["error"]["code"] == "record.absent"


def test_a_damaged_record_is_exit_3(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    desk.store.commit(IDENTITY, b"{}" + bytes(32))
    assert desk.run("status", "--json") == 3
    assert document(capsys.readouterr().out)["error"]["code"] == "record.damaged"


def test_every_state_of_the_lifecycle_has_its_exit_status() -> None:
    assert {state: EXIT_GROUPS.index(word) for state, word in status._CODES.items()} == {
        "provisioned": 0,
        "connecting": 0,
        "connected": 0,
        "waiting": 3,
        "halted": 4,
    }


# --- enroll


def test_enroll_shows_key_ids_and_backend(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    ek = desk.tpm.endorsement_key()
    assert desk.run("enroll", "--json") == 0
    answer = document(capsys.readouterr().out)
    assert answer["registrationId"] == answer["derivedIds"]["base32"] == registration_id_from_ek(ek)
    assert base64.b64decode(answer["endorsementKey"]) == ek
    assert answer["derivedIds"]["hex"] == object_name(b"\0\0" + ek)[2:].hex()
    assert (answer["backend"], answer["ekCertificate"], answer["ekTemplate"]) == ("simulator", "absent", None)
    assert desk.run("enroll") == 0
    text = capsys.readouterr().out
    for shown in (
        answer["registrationId"],
        answer["endorsementKey"],
        answer["derivedIds"]["hex"],
        "simulator",
    ):
        assert shown in text


def test_enroll_needs_no_id_scope_and_uses_the_registration_id_of_the_settings(
    desk: Desk, capsys: pytest.CaptureFixture[str]
) -> None:
    desk.settings.write_text(
        desk.settings.read_text().replace('id_scope = "0ne00000000"', 'registration_id = "press-07"')
    )
    assert desk.run("enroll", "--json") == 0
    assert document(capsys.readouterr().out)["registrationId"] == "press-07"


def test_enroll_csv_has_a_header_and_one_row(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    assert desk.run("enroll", "--format", "csv") == 0
    (row,) = csv.DictReader(io.StringIO(capsys.readouterr().out))
    assert list(row)[:2] == ["registrationId", "endorsementKey"]
    assert base64.b64decode(row["endorsementKey"]) == desk.tpm.endorsement_key()
    assert row["backend"] == "simulator"


def test_enroll_json_is_the_service_apis_body(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    assert desk.run("enroll", "--format", "json") == 0
    body = json.loads(capsys.readouterr().out)
    ek = base64.b64encode(desk.tpm.endorsement_key()).decode()
    assert body["attestation"] == {"type": "tpm", "tpm": {"endorsementKey": ek}}


@pytest.mark.parametrize("form", ["csv", "json"])
def test_the_emulator_reads_what_enroll_writes(form: str, desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    from dps_emulator.enrollments import read_enrollments

    assert desk.run("enroll", "--format", form) == 0
    (enrollment,) = read_enrollments(capsys.readouterr().out).enrollments
    assert enrollment.endorsement_key == desk.tpm.endorsement_key()
    assert enrollment.registration_id == registration_id_from_ek(enrollment.endorsement_key)


def test_enroll_az_is_one_command_and_says_simulator(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    assert desk.run("enroll", "--format", "az") == 0
    note, command = capsys.readouterr().out.splitlines()
    assert note.startswith("# simulator")
    assert command.startswith("az iot dps enrollment create ")
    assert f"--endorsement-key {base64.b64encode(desk.tpm.endorsement_key()).decode()}" in command
    assert "--attestation-type tpm" in command


def test_json_and_another_format_exclude_each_other(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    assert desk.run("enroll", "--format", "csv", "--json") == 2
    assert document(capsys.readouterr().out)["code"] == "usage"


def test_the_simulator_is_refused_for_azure_with_exit_5(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    azure = ("--set", "endpoint=https://global.azure-devices-provisioning.net", "--json")
    for verb in (["provision"], ["enroll"], ["token"], ["config", "validate"]):
        assert desk.run(*verb, *azure) == 5, verb
        assert document(capsys.readouterr().out)["error"]["code"] == "tpm.simulator_refused"
    assert desk.run("enroll", *azure, "--set", "tpm.i_know_keys_are_in_files=true") == 0
    assert document(capsys.readouterr().out)["backend"] == "simulator"


# --- token


@pytest.fixture(autouse=True)
def kept_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """NTP keeps the clock here: a token without a network."""
    monkeypatch.setattr(host_clock, "is_synchronised", lambda: True)


def checked_token(text: str, key: bytes) -> dict[str, str]:
    """The fields of a token whose signature the key made."""
    import urllib.parse

    scheme, _, rest = text.partition(" ")
    assert scheme == "SharedAccessSignature"
    fields = dict(part.split("=", 1) for part in rest.split("&"))
    signature = base64.b64decode(urllib.parse.unquote(fields["sig"]))
    assert signature == hmac_sha256(key, string_to_sign(fields["sr"], int(fields["se"])))
    return fields


def test_a_token_is_signed_by_the_hub_key_and_alone_on_stdout(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    desk.assign()
    assert desk.run("token", "--life", "60") == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    fields = checked_token(captured.out.removesuffix("\n"), HUB_KEY)
    assert fields["sr"] == f"{HUB}%2Fdevices%2Fpress-07"
    assert desk.run("token", "--json") == 0
    answer = document(capsys.readouterr().out)
    checked_token(answer["token"], HUB_KEY)
    assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ", answer["expiresAt"])
    assert (answer["assignedHub"], answer["deviceId"]) == (HUB, "press-07")


def test_without_network_and_ntp_there_is_no_token(
    desk: Desk, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    desk.assign()
    monkeypatch.setattr(host_clock, "is_synchronised", lambda: False)
    assert desk.run("token") == 3
    said = capsys.readouterr()
    assert said.out == "" and "[clock.not_set]" in said.err
    assert re.search(r"it says 20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ, and DPS could not be asked: connect: ", said.err)


def test_a_status_without_settings_says_that_a_service_goes_on(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    desk.settings.write_text("id_scope = 0ne00000000\n")
    assert desk.run("status") == 6
    said = capsys.readouterr().err
    assert "a service that runs goes on with the settings that it has" in said and "a text needs quotes" in said
    assert desk.run("token") == 6
    assert "goes on" not in capsys.readouterr().err


def test_a_relative_state_folder_is_shown_whole(
    desk: Desk, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(desk.state_dir).parent)
    assert desk.run("status", "--set", "state_dir=state") == 3
    assert f"state folder     {desk.state_dir}\n" in capsys.readouterr().out
    assert desk.run("status", "--set", "state_dir=state", "--json") == 3
    assert document(capsys.readouterr().out)["stateDir"] == desk.state_dir


@pytest.mark.parametrize("words", [["statsu"], ["token", "--life", "soon"], ["metrics", "--textfile", "x"]])
def test_the_remedy_of_a_wrong_command_line_has_nothing_of_the_socket(
    words: list[str], desk: Desk, capsys: pytest.CaptureFixture[str]
) -> None:
    assert desk.run(*words) == 2
    assert "  see 'dps-agent --help'  [agent.usage]\n" in capsys.readouterr().err
    assert desk.run(*words, "--json") == 2
    assert document(capsys.readouterr().out)["error"]["remedy"] == "see 'dps-agent --help'"


def test_the_library_gives_the_same_token(desk: Desk) -> None:
    desk.assign()
    checked_token(hub_token(desk.settings), HUB_KEY)
    checked_token(hub_token(load(desk.settings), life_s=60), HUB_KEY)


@pytest.mark.parametrize("life_s", [0, -1, 365 * 86400 + 1])
def test_a_token_of_no_or_endless_life_is_refused(life_s: int, desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    desk.assign()
    assert desk.run("token", f"--life={life_s}") == 2
    assert "expected whole seconds from 1 to 31536000" in capsys.readouterr().err
    with pytest.raises(AskOperator, match="life_s"):
        hub_token(desk.settings, life_s=life_s)


@pytest.mark.parametrize(("closed", "exit_status"), [("<&- 2>&-", 0), (">&-", 1), ("<&- >&- 2>&-", 1)])
def test_closed_standard_streams_are_no_traceback_and_an_answer_for_nobody_no_success(
    closed: str, exit_status: int, desk: Desk
) -> None:
    desk.assign()
    code = f"{NTP_KEEPS_THE_CLOCK}; raise SystemExit(main())"
    command = f'exec {sys.executable} -c "{code}" --config {desk.settings} token {closed}'
    done = subprocess.run(["sh", "-c", command], env=ENVIRON, timeout=60, check=False, capture_output=True, text=True)
    assert done.returncode == exit_status, done
    said = "dps-agent: the output could not be written: it is closed\n" if closed == ">&-" else ""
    assert done.stderr == said


def test_there_is_no_token_for_a_record_that_was_altered(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    desk.assign()
    stored = desk.store.load(IDENTITY)
    assert stored is not None
    desk.store.commit(IDENTITY, stored.payload.replace(b"emulator.", b"elsewhere."))
    assert desk.run("token", "--json") == 1
    answer = document(capsys.readouterr().out)
    assert answer["error"]["code"] == "record.stale"
    assert "seal" in answer["error"]["message"]
    with pytest.raises(IdentityStale):
        hub_token(str(desk.settings))


def test_there_is_no_token_from_another_tpm(desk: Desk, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    desk.assign()
    other = copy_state("press-08", tmp_path / "other")
    assert desk.run("token", "--json", "--set", f"tpm.tcti={other}") == 5
    assert document(capsys.readouterr().out)["error"]["code"] == "tpm.ek_changed"


# --- reset


def test_reset_asks_first_and_does_nothing_where_nobody_can_be_asked(
    desk: Desk, capsys: pytest.CaptureFixture[str]
) -> None:
    desk.assign()
    assert desk.run("reset") == 2
    assert "--yes" in capsys.readouterr().err
    assert desk.store.load(IDENTITY) is not None


@pytest.mark.parametrize(("answer", "exit_status"), [("y\n", 0), ("yes\n", 0), ("n\n", 1), ("", 1)])
def test_reset_erases_after_a_yes_only(
    answer: str, exit_status: int, desk: Desk, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    desk.assign()
    stdin = io.StringIO(answer)
    monkeypatch.setattr(stdin, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stdin", stdin)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert desk.run("reset") == exit_status
    said = capsys.readouterr().err
    assert f"hub '{HUB}', stored in {desk.state_dir}. Continue? [y/N] " in said
    assert ("nothing was erased" in said and "[agent.declined]" in said) == (exit_status == 1)
    assert (desk.store.load(IDENTITY) is None) == (exit_status == 0)


def test_reset_erases_both_records_without_a_tpm_and_says_so(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    desk.assign()
    desk.fail("dps.refused", "no", True)
    Path(desk.tpm_folder).rename(desk.tpm_folder + "-gone")
    assert desk.run("reset", "--yes", "--json") == 0
    assert document(capsys.readouterr().out)["erased"] == ["identity", "progress"]
    assert desk.store.load(IDENTITY) is None
    assert desk.store.load(PROGRESS) is None
    assert desk.run("reset", "--json", "--yes") == 0
    assert document(capsys.readouterr().out)["erased"] == []


@pytest.mark.parametrize(("live", "code"), [({"pid": 1}, "agent.denied"), (None, "store.denied")])
def test_reset_by_another_user_never_advises_to_own_the_folder_of_a_service_that_runs(
    live: object, code: str, desk: Desk, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(*_: object) -> None:
        raise AskOperator("store.denied", f"{desk.state_dir} is not ours; chown it")

    monkeypatch.setattr("dps_hal.host.files.FileStore.load", denied)
    monkeypatch.setattr("dps_agent.host.local.statefile.read_live", lambda _: live)
    assert desk.run("reset", "--yes", "--json") == 1
    error = document(capsys.readouterr().out)["error"]
    assert error["code"] == code and ("chown" in error["message"]) == (live is None), error


def test_reset_gives_up_a_record_of_which_neither_copy_can_be_read(
    desk: Desk, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    desk.assign()
    bad = {"identity.0", "identity.1"}
    pread, pwrite = os.pread, os.pwrite

    def name_of(fd: int) -> str:
        return os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))

    def unreadable(fd: int, count: int, offset: int) -> bytes:
        if name_of(fd) in bad:
            raise OSError(errno.EIO, "as the test asked")
        return pread(fd, count, offset)

    def healing(fd: int, content: bytes, offset: int) -> int:
        bad.discard(name_of(fd))
        return pwrite(fd, content, offset)

    monkeypatch.setattr(os, "pread", unreadable)
    monkeypatch.setattr(os, "pwrite", healing)
    assert desk.run("status", "--json") == 3
    error = document(capsys.readouterr().out)["error"]
    assert error["code"] == "store.io" and "neither of its two copies can be read" in error["message"]
    assert desk.run("reset", "--yes") == 0
    assert "the record 'identity', which cannot be read" in capsys.readouterr().out
    assert not bad and desk.run("status") == 3
    assert "neither" not in capsys.readouterr().out


def test_reset_erases_a_record_of_another_version(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    desk.assign()
    (slot,) = [path for path in Path(desk.state_dir).glob("identity.*") if path.read_bytes()[:4] == b"DPSr"]
    content = slot.read_bytes()
    header = content[:4] + bytes([0, 0, 0, 99]) + content[8:16]
    slot.write_bytes(header + zlib.crc32(header).to_bytes(4, "big") + content[20:])
    assert desk.run("status", "--json") == 1
    assert document(capsys.readouterr().out)["error"]["code"] == "store.unknown_version"
    assert desk.run("reset", "--yes") == 0
    assert "another version" in capsys.readouterr().out
    assert desk.run("status") == 3


# --- config


def test_config_show_is_a_settings_file_of_the_same_meaning(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--set", 'payload={a = "q\\"\\u0007", b = [1, 2.5, true], "c d" = {}}', "--set", "hub.keep_alive_s=60"]
    assert desk.run("config", "show", *words) == 0
    again = desk.settings.with_name("again.toml")
    again.write_text(capsys.readouterr().out)

    def values(loaded: Configuration) -> list[Any]:
        return [loaded.value(key) for key in loaded.origins]

    assert values(load(again, environ={})) == values(load(desk.settings, overrides=words[1::2], environ={}))


def test_config_show_names_origins_and_what_is_not_read(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    assert desk.run("config", "show", "--set", "poll=operation") == 0
    text = capsys.readouterr().out
    assert re.search(r'^poll = "operation" +# --set poll$', text, re.M)
    assert re.search(rf"^id_scope = .+# {re.escape(str(desk.settings))}$", text, re.M)
    assert re.search(r"^keep_alive_s = 240 +# default$", text, re.M)
    assert "config.d are not read" in text


def test_config_show_hides_the_proxys_password(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    proxy = ("--set", "network.proxy=http://me:hunter2@proxy:3128")
    for words in (["config", "show", *proxy], ["config", "show", "--json", *proxy]):
        assert desk.run(*words) == 0
        text = capsys.readouterr().out
        assert "hunter2" not in text
        assert "http://***@proxy:3128" in text


def test_config_validate_reads_the_files_that_are_named(
    desk: Desk, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert desk.run("config", "validate") == 0
    assert str(desk.settings) in capsys.readouterr().out
    password = tmp_path / "owner"
    password.write_text("hunter2")
    password.chmod(0o644)
    words = ["--set", f"tpm.owner_auth_file={password}", "--set", "ca_file=/nonexistent/ca", "--json"]
    assert desk.run("config", "validate", *words) == 6
    captured = capsys.readouterr()
    problems = document(captured.out)["error"]["problems"]
    assert [problem.split(":")[0] for problem in problems] == ["ca_file", "tpm.owner_auth_file"]
    assert "hunter2" not in captured.out + captured.err


@pytest.mark.parametrize(
    "value", ["", 'a"b\\c', "\x00\x1b\x7f", "grüße\u2028", True, 0, -1, 1.5, [], {}, {"": {"a": [1]}}]
)
def test_what_is_written_as_toml_reads_back_the_same(value: Any) -> None:
    import tomllib

    assert tomllib.loads(f"value = {config_verb.as_toml(value)}") == {"value": value}


def test_version_names_every_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["version", "--json"]) == 0
    answer = document(capsys.readouterr().out)
    bundled = {"cffi", "packaging", "pycparser"}  # they come along in the Debian package for the sake of the others
    assert set(answer["packages"]) == {"dps-agent", "tpm2-pytss", "cryptography", "paho-mqtt", "ujson"} | bundled
    assert answer["python"].count(".") == 2


def test_help_fits_one_screen_and_ends_with_the_commands_one_needs() -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "dps_agent.host.cli", "--help"],
        env={**ENVIRON, "COLUMNS": "80", "FORCE_COLOR": "1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert len(ended.stdout.splitlines()) <= 40
    assert ended.stdout.splitlines()[-1].split()[:2] == ["dps-agent", "help"]
    assert "\x1b" not in ended.stdout
