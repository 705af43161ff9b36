"""The program `dps-emulator` as it is started, fed and stopped."""

from __future__ import annotations

import base64
import errno
import io
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from dps_agent.host.settings_table import KEYS
from dps_emulator import state
from dps_emulator.cli import HUB_SUFFIXES, _Log, _warn, main
from dps_emulator.hub_devices import BoundedFile
from dps_emulator.server import EmulatorServer, LogLine
from dps_emulator.state import open_store
from dps_emulator.store import DATABASE
from emulator.device_side import ActivatedKey, Client, Device, lookup_path, operation_path, register_path
from support.cloud.emulator import EmulatorProcess

DEVICE = Device.of_the_vectors()
RID = DEVICE.registration_id
BODY = {"registrationId": RID, "tpm": DEVICE.attestation()}
CSV = f"registrationId,endorsementKey,serial\n{RID},{base64.b64encode(DEVICE.ek_public).decode()},7\n"


def provision(emulator: EmulatorProcess) -> tuple[dict[str, Any], ActivatedKey]:
    """A whole registration; the finished state and the hub key."""
    with Client(emulator.port, emulator.ca_file) as client:
        _, _, body = client.call("PUT", register_path(RID), BODY)
        key = DEVICE.activate(body["authenticationKey"])
        token = key.token(f"0ne00000000%2Fregistrations%2F{RID}", int(time.time()) + 60)
        status, _, body = client.call("PUT", register_path(RID), BODY, token)
        assert status == 202, body
        _, _, final = client.call("GET", operation_path(RID, body["operationId"]), None, token)
        state: dict[str, Any] = final["registrationState"]
        return state, DEVICE.activate(state["tpm"]["authenticationKey"])


def test_state_survives_a_restart_and_tokens_can_be_verified(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    state_dir, csv = tmp_path / "state", tmp_path / "factory.csv"
    csv.write_text(CSV)
    assert main(["enroll-import", str(csv), "--state-dir", str(state_dir), "--json"]) == 0
    said = {"schema": 1, "code": "ok", "imported": [RID], "replaced": 0, "passedOver": [], "odd": []}
    assert json.loads(capsys.readouterr().out) == said
    hubs = ("--hub", "one.azure-devices.net", "--hub", "two.azure-devices.net")
    with EmulatorProcess(*hubs, state_dir=state_dir) as emulator:
        first, hub_key = provision(emulator)
        ca = emulator.ca_file.read_bytes()
        assert emulator.stop() == 0
    assert first["assignedHub"] == "one.azure-devices.net"

    token_file = tmp_path / "token"
    token = hub_key.token(f"one.azure-devices.net%2Fdevices%2F{RID}", int(time.time()) + 60, None)
    token_file.write_text(token + "\n")
    verify = ["verify-token", str(token_file), "--state-dir", str(state_dir)]
    assert main(verify) == 0
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(token.encode())))
    assert main(["verify-token", "-", "--state-dir", str(state_dir)]) == 0

    with EmulatorProcess(*hubs, state_dir=state_dir) as emulator:
        assert emulator.ca_file.read_bytes() == ca
        again, same_key = provision(emulator)
        assert (again["substatus"], same_key.key) == ("reprovisionedToInitialAssignment", hub_key.key)
        # A running server sees what the other commands write.
        assert main(["move", RID, "two.azure-devices.net", "--state-dir", str(state_dir)]) == 0
        moved, _ = provision(emulator)
        assert (moved["assignedHub"], moved["substatus"]) == ("two.azure-devices.net", "deviceDataMigrated")
        assert [line.status for line in emulator.log] == [401, 202, 200] * 2
    capsys.readouterr()
    assert main([*verify, "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["code"] == "refused"


def test_a_state_folder_in_use_is_refused_and_the_first_server_keeps_its_commands(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with EmulatorProcess() as emulator:
        ca = emulator.ca_file.read_bytes()
        assert main(["serve", "--state-dir", str(emulator.state_dir), "--ca-file", str(emulator.ca_file)]) == 1
        assert f"{emulator.state_dir} is served by another dps-emulator" in capsys.readouterr().err
        assert main(["devices", "--state-dir", str(emulator.state_dir)]) == 0
        assert emulator.ca_file.read_bytes() == ca and emulator.stop() == 0


def test_a_device_is_not_moved_to_a_hub_that_is_not_served(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    csv = tmp_path / "a.csv"
    csv.write_text(CSV)
    move = ["move", RID, "two.azure-devices.net", "--state-dir", str(tmp_path / "state")]
    with EmulatorProcess("--enrollments", str(csv), state_dir=tmp_path / "state") as emulator:
        assert main(move) == 1
        assert "no hub 'two.azure-devices.net' here; there are emulator.azure-devices.net" in capsys.readouterr().err
        assert provision(emulator)[0]["assignedHub"] == "emulator.azure-devices.net"
        assert main([*move[:2], "EMULATOR.azure-devices.net", *move[3:]]) == 0
        assert emulator.stop() == 0
    assert main(move) == 0  # the next `serve` decides which hubs there are


def test_a_hub_that_an_agent_would_refuse_is_warned_of() -> None:
    assert KEYS["hub.hub_suffixes"].default == HUB_SUFFIXES
    with EmulatorProcess("--hub", "hub.plant.example", "--hub", "Own.Azure-Devices.net") as emulator:
        (warning,) = [line for line in emulator.stderr.splitlines() if "warning" in line]
        assert "an agent refuses the hub hub.plant.example unless hub_suffixes" in warning


def test_files_of_the_server_are_private_and_its_log_has_no_secret(tmp_path: Path) -> None:
    log_file = tmp_path / "requests.log"
    with EmulatorProcess("--enroll-any", "--retry-after", "none", "--log-file", str(log_file)) as emulator:
        _, hub_key = provision(emulator)
        private = [path for path in emulator.state_dir.rglob("*") if path.is_file()]
        assert len(private) == 5 and all(path.stat().st_mode & 0o077 == 0 for path in private)
        assert "warning: --enroll-any" in emulator.stderr and f"enrolled '{RID}' at first sight" in emulator.stderr
        assert log_file.read_text().splitlines() == [line.text() for line in emulator.log]
        for text in (emulator.stderr, log_file.read_text()):
            assert base64.b64encode(hub_key.key).decode() not in text and "SharedAccessSignature" not in text


@pytest.mark.parametrize("name", ["none/requests.log", "folder", "link", "fifo"])
def test_a_log_file_that_takes_no_lines_is_a_usage_error_at_once(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(EmulatorServer, "run", lambda _: pytest.fail("it serves"))
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("/dev/stdout")
    os.mkfifo(tmp_path / "fifo")
    flags = ["--ca-file", str(tmp_path / "ca.pem"), "--log-file", str(tmp_path / name)]
    assert main(["serve", *flags]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and f"--log-file {tmp_path / name} can't be used: " in shown.err, shown.err


def test_a_log_that_fails_fails_no_request_and_is_told_of_once(tmp_path: Path) -> None:
    folder = tmp_path / "logs"
    log_file = folder / "requests.log"
    folder.mkdir()
    with EmulatorProcess("--enroll-any", "--retry-after", "none", "--log-file", str(log_file)) as emulator:
        shutil.rmtree(folder)
        provision(emulator)
        assert emulator.stderr.count("warning: the log file misses lines from here on") == 1
        folder.mkdir()
        provision(emulator)
        assert log_file.read_text().splitlines() == [line.text() for line in emulator.log[3:]]
        assert [line.status for line in emulator.log] == [401, 202, 200] * 2 and "Traceback" not in emulator.stderr


def test_a_full_disk_under_stderr_keeps_no_line_out_of_the_log_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = LogLine("2026-01-01T00:00:00Z", "GET", "", "", 404, 0, 0, "1")

    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(sys, "stderr", Full())
    _Log(BoundedFile(tmp_path / "requests.log"))(line)
    _warn("of something")
    monkeypatch.undo()
    assert (tmp_path / "requests.log").read_text() == line.text() + "\n"


def test_a_damaged_record_is_500_and_named_on_stderr() -> None:
    with EmulatorProcess("--enroll-any") as emulator, Client(emulator.port, emulator.ca_file) as client:
        provision(emulator)
        with closing(sqlite3.connect(emulator.state_dir / DATABASE)) as other:
            other.execute("UPDATE enrollments SET record = '{'")
            other.commit()
        status, headers, body = client.call("PUT", register_path(RID), BODY)
        assert (status, headers["x-ms-error-code"], body["errorCode"]) == (500, "500001", 500001)
        named = f"{emulator.state_dir / DATABASE}: the record of '{RID}' in enrollments can't be read back"
        assert f"warning: {named}" in emulator.stderr and "Traceback" not in emulator.stderr


def test_what_libraries_log_is_one_line_of_the_emulators(tmp_path: Path) -> None:
    with EmulatorProcess() as emulator:
        with Client(emulator.port, emulator.ca_file) as client:
            client.connection.connect()
            client.connection.sock.sendall(b"GET /\x00 HTTP/9\r\n\r\n")
            assert client.connection.sock.recv(1000).startswith(b"HTTP/1.1 400 ")
        provisioned = emulator.stderr
    assert "dps-emulator: warning: Invalid HTTP request received.\n" in provisioned


def test_flags_reach_the_service(tmp_path: Path) -> None:
    faults = tmp_path / "faults.json"
    faults.write_text('[{"request": 4, "status": 418}]')
    enrollments = tmp_path / "devices.csv"
    enrollments.write_text(CSV)
    flags = ("--enrollments", str(enrollments), "--faults", str(faults), "--lookup", "404", "--key-bytes", "20")
    with EmulatorProcess(*flags, "--no-noda", "--retry-after", "0") as emulator:
        _, hub_key = provision(emulator)
        assert (hub_key.attributes, len(hub_key.key)) == (0x40040, 20)
        with Client(emulator.port, emulator.ca_file) as client:
            assert client.call("PUT", register_path(RID), BODY)[0] == 418
            assert client.call("POST", lookup_path(RID), BODY)[0] == 404


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_with_0(number: signal.Signals) -> None:
    with EmulatorProcess() as emulator, Client(emulator.port, emulator.ca_file) as client:
        client.call("PUT", register_path(RID), {})  # a connection is open
        assert emulator._process is not None
        os.kill(emulator._process.pid, number)
        assert emulator._process.wait(60) == 0
        assert len(emulator.stderr.splitlines()) == 1, emulator.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "COMMAND"),
        (["serve"], "give --ca-file or --state-dir"),
        (["serve", "--port", "70000"], "'70000' is not a number from 0 to 65535"),
        (["serve", "--retry-after", "soon"], "'soon' is not a number"),
        (["serve", "--assign-after", "nan"], "'nan' is not a number"),
        (["serve", "--lookup", "stale:x"], "none of fresh, stale:N"),
        (["serve", "--hub", "https://x"], "is no DNS name"),
        (["serve", "--ca-file", "ca", "--faults", "absent.json"], "can't read absent.json"),
        (["serve", "--ca-file", "ca", "--enrollments", "absent.csv"], "can't read absent.csv"),
        (["enroll-import", "absent.csv", "--state-dir", "state"], "can't read absent.csv"),
        (["move", "x", "a/b", "--state-dir", "state"], "is no DNS name"),
        (["verify-token", "token", "--state-dir", "absent"], "no state folder at absent"),
    ],
)
def test_wrong_usage_is_one_clear_line_and_2(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    try:
        status = main(arguments)
    except SystemExit as ending:
        status = int(ending.code or 0)
    error = capsys.readouterr().err
    assert status == 2 and message in error, error
    assert list(tmp_path.iterdir()) == [], "nothing is written"


def test_an_import_names_what_it_passes_over_and_its_status_tells(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    listed, state = tmp_path / "line.csv", str(tmp_path / "state")
    listed.write_bytes(b"\xef\xbb\xbf" + f"{CSV},,\npress-08,AAAA,8\n".replace(",", ";").replace("\n", "\r\n").encode())
    assert main(["enroll-import", str(listed), "--state-dir", state]) == 1
    shown = capsys.readouterr()
    assert shown.out == "1 enrolment imported, 0 of them replaced an earlier one; 1 odd\n"
    assert "dps-emulator: warning: line 4: press-08: the endorsement key can't be enrolled" in shown.err
    with closing(open_store(tmp_path / "state")) as store:
        (enrolled,) = store.enrollments.values()
    assert enrolled.registration_id == RID
    kind = {"type": "symmetricKey"}
    as_listed = {"symmetricKey": {"primaryKey": None, "secondaryKey": None}, "tpm": None, "x509": None}
    for attestation in (kind, {**kind, **as_listed}):
        key = {"registrationId": "key-1", "attestation": attestation}
        listed.write_text(json.dumps([key, enrolled.to_json()]))
        assert main(["enroll-import", str(listed), "--state-dir", state, "--json"]) == 0
        shown = capsys.readouterr()
        said = json.loads(shown.out)
        assert said["passedOver"] == [{"line": 1, "registrationId": "key-1", "kind": "symmetricKey"}], said
        assert (said["imported"], said["replaced"]) == ([RID], 1)
        assert "line 1: 'key-1' is an enrolment of the kind symmetricKey" in shown.err


@pytest.mark.parametrize(
    ("content", "says"),
    [(CSV.encode("utf-16"), "came UTF-16: save the file as UTF-8"), (b"registrationId\n", "expected a header")],
)
def test_a_file_that_is_no_list_imports_nothing(
    content: bytes, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.csv").write_bytes(content)
    assert main(["enroll-import", str(tmp_path / "bad.csv"), "--state-dir", str(tmp_path / "state")]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith(f"dps-emulator: {tmp_path}/bad.csv: ") and says in shown
    assert not (tmp_path / "state").exists()


def test_a_server_begins_with_a_list_that_has_an_odd_line(tmp_path: Path) -> None:
    listed = tmp_path / "devices.csv"
    listed.write_text(f"{CSV}press-08,AAAA,8\n")
    with EmulatorProcess("--enrollments", str(listed), "--retry-after", "0") as emulator:
        assert "warning: line 3: press-08: the endorsement key" in emulator.stderr
        assert provision(emulator)[0]["status"] == "assigned"


def test_failures_are_one_line_and_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    csv = tmp_path / "a.csv"
    csv.write_text(CSV)
    assert main(["enroll-import", str(csv), "--state-dir", str(tmp_path / "file")]) == 1
    assert main(["move", "nobody", "one.azure-devices.net", "--state-dir", str(tmp_path)]) == 1
    assert main(["move", "../nobody", "one.azure-devices.net", "--state-dir", str(tmp_path)]) == 1
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 3 and all(line.startswith("dps-emulator: ") for line in errors)


def test_a_port_in_use_is_said_in_one_line(tmp_path: Path) -> None:
    with EmulatorProcess() as emulator:
        command = [sys.executable, "-m", "dps_emulator.cli", "serve", "--port", str(emulator.port)]
        ended = subprocess.run(
            [*command, "--ca-file", str(tmp_path / "ca.pem")],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "tools")},
        )
    assert ended.returncode == 1 and ended.stdout == ""
    words = f"port {emulator.port} at 127.0.0.1 is in use: stop who has it, or give another (0: a free one)"
    assert ended.stderr == f"dps-emulator: {words}\n"


@pytest.mark.parametrize(
    ("listen", "why"), [("192.0.2.1", "Cannot assign requested address"), ("a b", "Name or service not known")]
)
def test_an_address_at_which_it_cannot_listen_is_said_in_words(
    listen: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    assert main(["serve", "--listen", listen, "--ca-file", str(tmp_path / "ca.pem")]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"dps-emulator: can't listen at {listen}, port 0: {why}") and "Errno" not in said, said
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize(
    "command", [["devices"], ["wait"], ["move", "press-07", "one.azure-devices.net"]], ids=" ".join
)
def test_the_folder_of_another_user_is_named_with_both_users(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, owner = tmp_path, tmp_path.stat().st_uid
    really = os.open

    def refuses(path: Any, *words: Any, **named: Any) -> int:
        if str(path).startswith(str(folder)):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return really(path, *words, **named)

    def refuses_too(folder: Path) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied", str(folder / DATABASE))

    monkeypatch.setattr(os, "open", refuses)
    monkeypatch.setattr(state, "damage", refuses_too)
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    assert main([*command, "--state-dir", str(folder)]) == 1
    words = f"{folder} belongs to user {owner}, this is user {owner + 1}: only its owner may command it"
    assert capsys.readouterr().err == f"dps-emulator: {words}\n"


def test_what_the_system_refuses_is_said_without_its_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    (tmp_path / "ca").mkdir()
    assert main(["serve", "--ca-file", str(tmp_path / "ca")]) == 1
    assert capsys.readouterr().err == f"dps-emulator: {tmp_path / 'ca'}: Is a directory\n"


def test_without_a_command_all_of_them_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    for line in ("serve until SIGTERM or SIGINT", "list the devices that the hubs know", "dps-emulator help COMMAND"):
        assert line in shown.err


def test_help_and_version_are_where_they_are_looked_for(capsys: pytest.CaptureFixture[str]) -> None:
    for words, said in {
        ("help", "invoke"): r"usage: dps-emulator invoke .*METHOD",
        ("help",): r"usage: dps-emulator .*COMMAND",
        ("--version",): r"dps-emulator (\d+\.\d+\.\d+|from a checkout, not installed)$",
    }.items():
        with pytest.raises(SystemExit) as ended:
            main(words)
        out = capsys.readouterr().out
        assert not ended.value.code and re.match(said, out, re.S), out
    with pytest.raises(SystemExit) as ended:
        main(["help", "invok"])
    assert ended.value.code == 2 and "did you mean 'invoke'?" in capsys.readouterr().err


def test_a_missing_extra_is_one_sentence_and_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "trustme", None)
    monkeypatch.delitem(sys.modules, "dps_emulator.server")
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    assert main(["serve", "--state-dir", str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        "dps-emulator: needs 'trustme', which is not installed: it comes with the extra 'emulator'\n"
    )
