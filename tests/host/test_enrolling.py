"""`dps-enroll` at the emulator: each device once, whatever is lost on the way, at the pace of the quota."""

from __future__ import annotations

import base64
import csv
import datetime
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from dps_agent.host.network.https import DpsConnection
from dps_enroll import cli, enrol
from dps_enroll.certificates import EK_CERTIFICATE, FIRMWARE, MANUFACTURER, MODEL, Certificates
from dps_enroll.cli import VARIABLE, main
from dps_enroll.enrol import MINUTE_S, Pace, Stopped
from dps_enroll.journal import Journal
from dps_enroll.service import Credentials, credentials_of
from dps_hal.errors import EXIT_GROUPS, AskOperator
from dps_text.enrolments import read_enrolments
from emulator.device_side import EK_HEAD
from support.cloud.emulator import EmulatorInThread
from support.documents import CHECKOUT

FAST = ("--per-minute", "1000000")
PATIENCE_S = 120.0


def key_of(number: int) -> bytes:
    """The TPM2B_PUBLIC of an EK that nobody has the private key of."""
    return EK_HEAD + b"\xc0" + hashlib.shake_256(b"%d" % number).digest(254) + b"\1"


class Line:
    """A list of devices, and what enrols them at an emulator."""

    def __init__(self, folder: Path, emulator: EmulatorInThread) -> None:
        self.folder, self.emulator = folder, emulator
        self.list = folder / "line.csv"
        self.credentials = folder / "credentials"
        self.connection_string = str(emulator.hub_command("service", ofHubs=False)["connectionString"])
        self.credentials.write_text(self.connection_string + "\n")
        self.credentials.chmod(0o600)

    def has(self, devices: int, first: int = 0) -> None:
        lines = [f"press-{number},{base64.b64encode(key_of(number)).decode()}" for number in range(first, devices)]
        self.list.write_text("\n".join(["registrationId,endorsementKey", *lines, ""]))

    @property
    def words(self) -> list[str]:
        ca = str(self.emulator.ca_file)
        return [str(self.list), "--credentials", str(self.credentials), "--ca-file", ca, "--proxy", "none", *FAST]

    def run(self, *more: str) -> int:
        return main([*self.words, *more])

    @property
    def results(self) -> dict[str, str]:
        with self.list.with_name("line.csv.results.csv").open() as file:
            return {row["registrationId"]: row["result"] for row in csv.DictReader(file)}

    @property
    def report(self) -> Any:
        return json.loads(self.list.with_name("line.csv.report.json").read_text())

    def enrolled(self) -> dict[str, Any]:
        return {name: each.to_json() for name, each in self.emulator.store.enrollments.items()}

    @property
    def policies(self) -> dict[str, Any]:
        return {name: each.get("credentialPolicyName") for name, each in self.enrolled().items()}

    @property
    def bulks(self) -> int:
        return sum(line.method == "POST" for line in self.emulator.log)


@pytest.fixture
def line(tmp_path: Path) -> Iterator[Line]:
    with EmulatorInThread() as emulator:
        yield Line(tmp_path, emulator)


def test_a_list_is_enrolled_ten_at_a_time_and_only_once(line: Line, capsys: pytest.CaptureFixture[str]) -> None:
    line.has(25)
    assert line.run() == 0 and line.bulks == 3
    assert set(line.results.values()) == {"created"} and len(line.enrolled()) == 25
    assert capsys.readouterr().out.split() == ["created", "25"]
    assert line.run() == 0 and line.bulks == 3, "what is in the journal is not sent again"
    line.has(31)
    assert line.run() == 0 and line.bulks == 4
    (line.folder / "line.csv.journal").unlink()
    assert line.run() == 0 and set(line.results.values()) == {"present"}, "without the journal they are looked at"
    assert line.report["results"] == {"present": 31} and line.report["enrolledBefore"] == 0


def test_a_folder_without_any_certificate_certifies_no_device(line: Line) -> None:
    line.has(2)
    folder, roots = line.folder / "lot", line.folder / "roots.pem"
    folder.mkdir()
    roots.write_bytes(pem(Authority("root").certificate))
    words = ("--ek-certificates", str(folder), "--ek-roots", str(roots))
    for content in (None, b"no certificate"):
        if content is not None:
            (folder / "1.crt").write_bytes(content)
        assert line.run(*words) == 1
        assert set(line.results.values()) == {"uncertified"} and line.enrolled() == {} and line.bulks == 0
        assert line.report["certificates"]["unreadable"] == ["1.crt"] * (content is not None)


def test_what_could_not_be_written_or_read_is_named_before_anything_is_sent(
    line: Line, capsys: pytest.CaptureFixture[str]
) -> None:
    line.has(1)
    absent, binary = line.folder / "absent/x", line.folder / "binary"
    binary.write_bytes(b"\xff\xfe")
    binary.chmod(0o600)
    for words, said in (
        (("--results", str(absent)), f"--results: expected a folder that can be written to; came {absent.parent}"),
        (("--report", str(absent)), f"--report: expected a folder that can be written to; came {absent.parent}"),
        (("--credentials", str(binary)), f"--credentials: {binary}: expected text in UTF-8"),
    ):
        assert line.run(*words) == EXIT_GROUPS.index("config")
        assert said in capsys.readouterr().err
    assert line.enrolled() == {} and line.bulks == 0


def test_what_is_lost_throttled_or_refused_as_a_whole_costs_a_second_try(line: Line) -> None:
    line.has(40)
    line.emulator.fault(
        {"request": 1, "status": 429, "headers": {"Retry-After": "0"}},
        {"request": 2, "status": 503, "headers": {"Retry-After": "0"}},
        {"request": 3, "cutAfterBytes": -1},
        {"request": 4, "status": 400, "body": {"errorCode": 400004, "message": "no"}},
    )
    assert line.run() == 0
    assert set(line.results.values()) == {"created", "present"} and len(line.enrolled()) == 40
    assert line.report["throttled"] == 2


def test_whoever_watches_a_run_that_waits_is_told_why(
    line: Line, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(enrol, "FIRST_WAIT_S", 0.0)
    monkeypatch.setattr(cli, "PROGRESS_S", 0.0)
    line.has(1)
    line.emulator.fault({"request": 1, "cutAfterBytes": -1})
    assert line.run() == 0
    waits, *_, done = capsys.readouterr().err.splitlines()
    assert waits.startswith("dps-enroll: 0 of 1 devices, waiting: no answer (") and done.endswith("1 of 1 devices")


def test_the_wait_grows_until_a_device_is_done_with_whatever_the_answers_are(
    line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    holds: list[float] = []
    monkeypatch.setattr(Pace, "hold", lambda _, delay_s: holds.append(delay_s))
    line.has(1)
    errors = [{"registrationId": "press-0", "errorCode": 429001, "errorStatus": "later"}]
    later = {"status": 200, "body": {"isSuccessful": False, "errors": errors}}
    asked = {"headers": {"Retry-After": "70"}}
    line.emulator.fault({"request": 1, **later}, {"request": 2, **later}, {"request": 3, **later, **asked})
    assert line.run() == 0
    for delay_s, least_s in zip(holds, (1, 2, 70), strict=True):
        assert least_s <= delay_s <= 1.1 * least_s, holds
    monkeypatch.setattr(enrol, "PATIENCE_S", -1.0)
    (line.folder / "line.csv.journal").unlink()
    line.emulator.fault({**later, "times": 9})
    assert line.run() == 3, "an answer with which nothing is done does not count"


def test_the_pace_is_the_quotas_and_nobody_asks_before_the_time_that_was_named() -> None:
    clock = Clock()
    pace = Pace(610, clock, clock.uptime_s)
    taken = []
    for _ in range(4):
        pace.take(10)
        taken.append(round(clock.now_s, 6))
    assert taken == [0, 1, 2, 3]
    pace.hold(30)
    pace.hold(5)
    pace.take(1)
    assert clock.now_s == 33
    taken = []
    while clock.now_s < 33 + MINUTE_S:
        pace.take(1)
        taken.append(clock.now_s)
    assert 600 < len(taken) <= 611, "a second that is caught up with is within the quota"
    clock.set()
    with pytest.raises(Stopped):
        pace.take(1)


class Clock(threading.Event):
    """Waits in no time."""

    now_s = 0.0

    def uptime_s(self) -> float:
        return self.now_s

    def wait(self, timeout: float | None = None) -> bool:
        self.now_s += timeout or 0
        return self.is_set()


def test_a_run_that_was_killed_is_gone_on_with_and_enrols_each_device_once(line: Line) -> None:
    line.has(100)
    line.emulator.fault({"method": "POST", "delayS": 0.3})
    paths = os.pathsep.join(str(CHECKOUT / name) for name in ("agent", "hal", "tools"))
    words = [sys.executable, "-m", "dps_enroll.cli", *line.words, "--connections", "2"]
    with subprocess.Popen(words, env={**os.environ, "PYTHONPATH": paths}, stdin=subprocess.DEVNULL) as process:
        until(lambda: line.bulks >= 3)
        process.send_signal(signal.SIGKILL)
    line.emulator.script()
    before = line.enrolled()
    assert 30 <= len(before) < 100
    journal = line.folder / "line.csv.journal"
    with journal.open("ab") as file:
        file.write(b'{"id": "press-99", "ek": "')  # as a kill cuts it
    assert line.run() == 0
    assert len(line.results) == len(line.enrolled()) == 100
    assert all(line.enrolled()[name] == each for name, each in before.items()), "none was written again"
    assert len(journal.read_text().splitlines()) == 101, "the head, and each device once"


def until(condition: Any) -> None:
    end_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end_s, "did not come about"
        time.sleep(0.02)


def test_another_key_under_the_same_id_is_a_conflict_until_it_is_to_be_replaced(line: Line) -> None:
    line.has(3)
    assert line.run() == 0
    text = line.list.read_text().replace("press-1,", "old,").replace("press-2,", "press-1,")
    line.list.write_text(text)
    before = line.enrolled()["press-1"]
    assert line.run() == 1
    assert line.results == {"press-0": "created", "old": "created", "press-1": "conflict"}
    assert line.enrolled()["press-1"] == before
    assert line.run("--replace") == 0
    assert line.results["press-1"] == "replaced" and line.enrolled()["press-1"] != before


def test_a_replacement_whose_answer_is_lost_or_put_off_is_none_the_less(
    line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(enrol, "FIRST_WAIT_S", 0.0)

    def answer(code: int) -> dict[str, Any]:
        errors = [{"registrationId": "press-0", "errorCode": code, "errorStatus": "no"}]
        return {"status": 200, "body": {"isSuccessful": False, "errors": errors}}

    for key, fault, result in (
        (1, {"cutAfterBytes": -1}, "present"),
        (2, answer(429001), "replaced"),
        (3, answer(400004), "refused"),
    ):
        line.list.write_text(f"registrationId,endorsementKey\npress-0,{base64.b64encode(key_of(0)).decode()}\n")
        line.run("--replace")
        other = base64.b64encode(key_of(key)).decode()
        line.list.write_text(f"registrationId,endorsementKey\npress-0,{other}\n")
        line.emulator.fault({"request": 3, **fault})  # behind the one that creates and the one that looks
        assert line.run("--replace") == (result == "refused")
        assert line.results == {"press-0": result}
        assert (line.enrolled()["press-0"]["attestation"]["tpm"]["endorsementKey"] == other) == (result != "refused")
        (line.folder / "line.csv.journal").unlink()


def test_what_all_devices_share_is_in_each_enrolment(line: Line) -> None:
    line.has(2)
    common = line.folder / "common.json"
    common.write_text('{"provisioningStatus": "disabled"}')
    assert line.run("--common", str(common)) == 0
    assert {each["provisioningStatus"] for each in line.enrolled().values()} == {"disabled"}
    common.write_text('{"attestation": {}}')
    assert line.run("--common", str(common)) == 6


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The path of each request."""
    paths: list[str] = []
    request = DpsConnection.request

    def noted(connection: DpsConnection, method: str, path: str, body: bytes, *more: Any) -> Any:
        paths.append(path)
        return request(connection, method, path, body, *more)

    monkeypatch.setattr(DpsConnection, "request", noted)
    return paths


@pytest.mark.parametrize("by_list", [False, True])
def test_a_credential_policy_goes_to_the_version_of_the_service_s_api_that_has_it(
    line: Line, asked: list[str], by_list: bool
) -> None:
    common = line.folder / "common.json"
    common.write_text('{"credentialPolicyName": "line-4"}')
    line.has(2)
    shared = ["--common", str(common)]
    if by_list:
        keys = [base64.b64encode(key_of(each)).decode() for each in range(2)]
        records = [
            {"registrationId": f"press-{at}", "attestation": {"type": "tpm", "tpm": {"endorsementKey": key}}}
            for at, key in enumerate(keys)
        ]
        records[1]["credentialPolicyName"] = "line-4"
        line.list.write_text(json.dumps(records))
        shared = []
    assert line.run(*shared) == 0
    assert line.policies == {"press-0": None if by_list else "line-4", "press-1": "line-4"}
    versions = ["2021-10-01"] * by_list + ["2025-07-01-preview"]
    said = sorted(path.partition("?api-version=")[2] for path in asked)  # the two go side by side
    assert said == versions, "without one, no preview is asked"


def test_a_credential_policy_that_is_none_is_not_sent_and_that_of_the_list_wins(line: Line, asked: list[str]) -> None:
    common = line.folder / "common.json"
    common.write_text('{"credentialPolicyName": "line-4"}')
    tpm = {"type": "tpm", "tpm": {"endorsementKey": base64.b64encode(key_of(0)).decode()}}
    line.list.write_text(json.dumps({"registrationId": "press-0", "attestation": tpm, "credentialPolicyName": None}))
    assert line.run("--common", str(common)) == 0
    assert line.policies == {"press-0": None}
    assert asked == ["/enrollments?api-version=2021-10-01"]


def test_another_credential_policy_is_a_conflict_until_it_is_to_be_replaced(line: Line) -> None:
    common = line.folder / "common.json"
    line.has(2)
    common.write_text('{"initialTwin": {"properties": {"desired": {"speed": 3}}}}')
    assert line.run("--common", str(common)) == 0
    for before, policy in ((None, "line-4"), ("line-4", "line-5")):
        common.write_text(f'{{"credentialPolicyName": "{policy}"}}')
        for _ in range(2):  # the journal says that they are enrolled, without the policy; then that it is a conflict
            assert line.run("--common", str(common)) == 1
            assert line.results == {"press-0": "conflict", "press-1": "conflict"}
            assert set(line.policies.values()) == {before}
        assert line.run("--common", str(common), "--replace") == 0
        assert line.results == {"press-0": "replaced", "press-1": "replaced"}
        assert set(line.policies.values()) == {policy}
        bulks = line.bulks
        assert line.run("--common", str(common)) == 0 and line.run() == 0 and line.bulks == bulks
    assert {each["initialTwin"]["properties"]["desired"]["speed"] for each in line.enrolled().values()} == {3}
    (line.folder / "line.csv.journal").unlink()
    assert line.run() == 0, "a list that names no policy leaves that which is there"
    assert line.run("--common", str(common)) == 0 and line.results == {"press-0": "present", "press-1": "present"}


def test_what_is_wrong_in_a_list_is_named_and_the_rest_enrolled(line: Line, capsys: pytest.CaptureFixture[str]) -> None:
    line.has(2)
    ecc = base64.b64encode(b"\0\x04abcd").decode()
    line.list.write_text(line.list.read_text() + f"ecc,{ecc}\nnone,\n")
    assert line.run("--dry-run") == 1 and line.bulks == 0
    assert line.run() == 1
    assert line.results == {"press-0": "created", "press-1": "created", "ecc": "unsuitable"}
    assert "line 5: 'none': its endorsement key is missing" in capsys.readouterr().err
    line.has(1)
    line.list.write_text(line.list.read_text() + "no-ascii,é\nno-base64,%\n", encoding="utf-8")
    assert line.run("--dry-run") == 1, "one of them can't be sent"
    assert line.results == {"press-0": "unsent", "no-ascii": "unsuitable", "no-base64": "unsuitable"}
    line.list.write_text("a,b\n1,2\n")
    assert line.run() == 6 and "expected a header" in capsys.readouterr().err


def test_a_key_under_two_ids_is_named_and_enrolled_under_both(line: Line, capsys: pytest.CaptureFixture[str]) -> None:
    line.has(3)
    header, first, *others = line.list.read_text().splitlines()
    key = first.partition(",")[2]
    line.list.write_text("\n".join([header, first, f"read-twice,{key}", *others, ""]))
    assert line.run() == 0 and len(line.enrolled()) == 4
    assert "one endorsement key under 2 registration ids: press-0, read-twice\n" in capsys.readouterr().err
    assert line.report["ofOneKey"] == [["press-0", "read-twice"]]


def test_no_cell_of_the_results_is_a_formula_and_they_are_a_list_again(line: Line) -> None:
    line.has(1)
    key = line.list.read_text().splitlines()[1].partition(",")[2]
    line.list.write_text(f"registrationId,endorsementKey\n-press,{key}\n=cmd|x,@a\n+b,\t=c\n")
    assert line.run("--dry-run") == 1
    results = line.list.with_name("line.csv.results.csv")
    with results.open() as file:
        rows = list(csv.reader(file))[1:]
    assert [row[0] for row in rows] == ["'-press", "'=cmd|x", "'+b"]
    assert not [cell for row in rows for cell in row if cell[:1] in ("=", "+", "-", "@", "\t")]
    again = read_enrolments(results.read_text()).entries
    assert [entry.registration_id for entry in again][:1] == ["-press"] and again[0].endorsement_key == key


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_no_way_to_separate_cells_finds_a_formula_in_the_results(line: Line, delimiter: str) -> None:
    line.has(1)
    odd = ["press;=cmd|x", 'press;"=cmd|y', "press\t=cmd|z", "press\t\t=a", "a;'=b", "a,=b", "a;b;-c", "'=a", "''=a"]
    listed = [{"registrationId": each, "attestation": {"tpm": {"endorsementKey": f"k{each}"}}} for each in odd]
    line.list.write_text(json.dumps(listed))
    assert line.run("--dry-run") == 1
    results = line.list.with_name("line.csv.results.csv").read_text()
    cells = [cell for row in csv.reader(results.splitlines(), delimiter=delimiter) for cell in row]
    assert any("cmd" in cell for cell in cells)
    assert not [cell for cell in cells if cell.lstrip(' "')[:1] in ("=", "+", "-", "@", "\t")]
    again = {entry.registration_id for entry in read_enrolments(results).entries}
    assert again == {each for each in odd if '"' not in each}, "which no list may have in a cell"


def test_a_dry_run_sends_nothing_and_writes_no_journal(line: Line) -> None:
    line.has(2)
    assert line.run("--dry-run") == 0
    assert set(line.results.values()) == {"unsent"} and line.bulks == 0
    assert not (line.folder / "line.csv.journal").exists()


def test_credentials_are_refused_without_being_shown(
    line: Line, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    line.has(1)
    line.credentials.chmod(0o640)
    assert line.run() == 6 and "chmod 600" in capsys.readouterr().err
    line.credentials.unlink()
    host = line.connection_string.partition(";")[0]
    for text, status, words in (
        (f"{host};SharedAccessKeyName=provisioningserviceowner;SharedAccessKey=c2VjcmV0", 4, "credentials"),
        (f"{host};SharedAccessKeyName=a;SharedAccessKey=s3cr", 4, "credentials"),
        (f"{host};SharedAccessKey=s3cr!", 6, "SharedAccessKeyName is missing"),
        (f"{host};SharedAccessKeyName=a;SharedAccessKey=s3cr!", 6, "no base64"),
        (f"{host};SharedAccessKeyName=a;SharedAccessKey=s3cré", 6, "no base64"),
    ):
        monkeypatch.setenv(VARIABLE, text)
        words_without = [word for word in line.words if word not in ("--credentials", str(line.credentials))]
        assert main(words_without) == status
        said = capsys.readouterr()
        assert words in said.err and text.rpartition("=")[2] not in said.out + said.err
    assert "s3cr" not in repr(credentials_of(f"{host};SharedAccessKeyName=a;SharedAccessKey=s3cr", "x"))
    assert "Key" not in repr(Credentials("h", "p", b"Key"))


def test_an_answer_that_is_no_services_ends_the_run(line: Line, capsys: pytest.CaptureFixture[str]) -> None:
    line.has(1)
    of_another = {"registrationId": "press-1", "errorCode": 400004, "errorStatus": ""}
    for body in (
        "<html>",
        [],
        {"isSuccessful": True, "errors": [{}]},
        {"isSuccessful": False, "errors": []},
        {"isSuccessful": False, "errors": [of_another]},
    ):
        line.emulator.fault({"status": 200, "body": body})
        assert line.run() == 4 and "expected the answer to a bulk" in capsys.readouterr().err
        assert line.results == {"press-0": "unsent"} and line.report["ended"]


def test_a_service_that_is_not_who_it_should_be_is_not_asked_for_ever(
    line: Line, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line.has(1)
    stranger = tmp_path / "stranger.pem"
    trustme.CA().cert_pem.write_to_path(str(stranger))
    words = [str(stranger) if word == str(line.emulator.ca_file) else word for word in line.words]
    assert main(words) == 1
    said = capsys.readouterr().err
    assert "--ca-file names other roots" in said and "waiting" not in said


def test_a_signal_before_anything_is_sent_ends_the_run_without_a_traceback(
    line: Line, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(_: str) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    line.has(1)
    monkeypatch.setattr(cli, "read_enrolments", interrupted)
    assert line.run() == 3 and capsys.readouterr().err == "dps-enroll: ended by a signal\n"


def test_a_journal_is_of_one_service_and_one_run_at_a_time(tmp_path: Path) -> None:
    path = str(tmp_path / "journal")
    with Journal(path, "one"), pytest.raises(AskOperator, match="another dps-enroll"):
        Journal(path, "one")
    with pytest.raises(AskOperator, match="about one, this run about two"):
        Journal(path, "two")
    for other in ("press-07,AToAAQ\n", "press-07,AToAAQ", "press-07,AToAAQ\npress-08,AToAAQ", "x"):
        (tmp_path / "journal").write_text(other)
        with pytest.raises(AskOperator, match="expected a journal"):
            Journal(path, "one")
        assert (tmp_path / "journal").read_text() == other, "what is another program's stays as it is"
    (tmp_path / "journal").write_text('{"dpsEnrollJ')  # as a kill cuts the first line
    with Journal(path, "one") as journal:
        assert len(journal) == 0


# --- certificates

VERSION_3, NO_VERSION = b"\xa0\x03\x02\x01\x02", b"\xa0\x03\x02\x01\x07"  # RFC 5280, 4.1.2.1; none has the number 7
ODD_NAME = b"\x30\x04\xa5\x02\x30\x00"  # GeneralNames with an ediPartyName
NOW = datetime.datetime(2026, 6, 1, tzinfo=datetime.UTC)
YEAR = datetime.timedelta(days=365)


def named(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


class Authority:
    """One that signs certificates."""

    def __init__(self, name: str, signer: Authority | None = None, **wrong: Any) -> None:
        self.name, self.key = named(name), ec.generate_private_key(ec.SECP256R1())
        extensions = [x509.BasicConstraints(wrong.get("ca", True), None)]
        usage = x509.KeyUsage(True, False, False, False, False, wrong.get("signs", True), True, False, False)
        self.certificate = (signer or self).sign(self.name, self.key.public_key(), [*extensions, usage])

    def sign(self, subject: x509.Name, key: Any, extensions: list[Any], until: datetime.datetime = NOW + YEAR) -> Any:
        builder = x509.CertificateBuilder(self.name, subject, key, x509.random_serial_number(), NOW - YEAR, until)
        for extension in extensions:
            builder = builder.add_extension(extension, critical=not isinstance(extension, x509.ExtendedKeyUsage))
        return builder.sign(self.key, hashes.SHA256())

    def of_a_tpm(
        self, key: Any, vendor: str = "id:49465800", usage: x509.ObjectIdentifier = EK_CERTIFICATE, **more: Any
    ) -> Any:
        tpm = [(MANUFACTURER, vendor), (MODEL, "SLB9670"), (FIRMWARE, "id:0755")]
        name = x509.DirectoryName(x509.Name([x509.NameAttribute(oid, text) for oid, text in tpm]))
        return self.sign(
            x509.Name([]), key, [x509.SubjectAlternativeName([name]), x509.ExtendedKeyUsage([usage])], **more
        )


def pem(*certificates: Any) -> bytes:
    return b"".join(each.public_bytes(Encoding.PEM) for each in certificates)


def test_certificates_are_verified_up_to_the_makers_roots_and_those_devices_alone_enrolled(line: Line) -> None:
    root, other = Authority("root"), Authority("other")
    maker = Authority("maker", root)
    no_authority, no_signer = Authority("no authority", root, ca=False), Authority("no signer", root, signs=False)
    keys = [rsa.generate_private_key(65537, 2048).public_key() for _ in range(2)]
    devices = {
        "good": maker.of_a_tpm(keys[0]),
        "pem": maker.of_a_tpm(keys[1]),
    }
    folder = line.folder / "certificates"
    folder.mkdir()
    (folder / "1.crt").write_bytes(devices["good"].public_bytes(Encoding.DER))
    (folder / "2.crt").write_bytes(pem(devices["pem"]))
    (folder / "readme.txt").write_text("not a certificate")
    roots, between = line.folder / "roots.pem", line.folder / "between.pem"
    roots.write_bytes(pem(root.certificate))
    between.write_bytes(pem(maker.certificate, no_authority.certificate, no_signer.certificate))
    eks = [EK_HEAD + key.public_numbers().n.to_bytes(256, "big") for key in keys]

    def verdict(certificate: Any) -> str:
        (folder / "1.crt").write_bytes(certificate.public_bytes(Encoding.DER))
        return Certificates(folder, roots, between, NOW).verdict(eks[0]).why

    assert verdict(devices["good"]) == ""
    for wrong, why in (
        (other.of_a_tpm(keys[0]), "not verified"),
        (no_authority.of_a_tpm(keys[0]), "cA must be asserted"),
        (no_signer.of_a_tpm(keys[0]), "may not sign certificates"),
        (maker.of_a_tpm(keys[0], until=NOW - YEAR / 2), "not verified"),
        (maker.of_a_tpm(keys[0], usage=x509.ExtendedKeyUsageOID.CLIENT_AUTH), "extended key usage"),
        (maker.of_a_tpm(keys[0], vendor="Infineon"), "came 'Infineon'"),
        (maker.sign(named("no TPM"), keys[0], []), "came ''"),
        (maker.of_a_tpm(rsa.generate_private_key(65537, 2048).public_key()), "no certificate in the folder"),
    ):
        assert why in verdict(wrong), why
    (folder / "0.crt").write_bytes(pem(maker.of_a_tpm(keys[0])))
    assert Certificates(folder, roots, between, NOW).verdict(eks[0]).why == "", "one of two for a key is verified"
    (folder / "1.crt").write_bytes(pem(maker.of_a_tpm(keys[0])))
    (folder / "0.crt").write_bytes(pem(maker.of_a_tpm(keys[0], until=NOW - YEAR / 2)))
    assert Certificates(folder, roots, between, NOW).verdict(eks[0]).why == ""
    (folder / "0.crt").write_bytes(devices["good"].public_bytes(Encoding.DER).replace(VERSION_3, NO_VERSION, 1))
    assert Certificates(folder, roots, between, NOW).unreadable == ["0.crt", "readme.txt"]
    odd_name = x509.UnrecognizedExtension(x509.SubjectAlternativeName.oid, ODD_NAME)
    (folder / "0.crt").unlink()
    assert verdict(maker.sign(named("odd"), keys[0], [odd_name])) != ""
    unknown = x509.UnrecognizedExtension(x509.ObjectIdentifier("2.19.29.17"), b"\x30\0")
    whole = maker.sign(named("odd"), keys[0], [unknown]).public_bytes(Encoding.DER)
    (folder / "1.crt").write_bytes(whole.replace(b"\x0c\x03odd", b"\x61\x03odd"))  # a name's text that is no text
    assert "not verified" in Certificates(folder, roots, between, NOW).verdict(eks[0]).why
    verdict(maker.of_a_tpm(rsa.generate_private_key(65537, 2048).public_key()))
    found = Certificates(folder, roots, between, NOW)
    said = found.verdict(eks[1])
    assert (said.why, said.tpm) == ("", "id:49465800 (IFX) SLB9670 id:0755")
    assert found.unused == 1 and found.unreadable == ["readme.txt"]

    names = ("good", "pem")
    lines = [f"{name},{base64.b64encode(ek).decode()}" for name, ek in zip(names, eks, strict=True)]
    line.list.write_text("\n".join(["registrationId,endorsementKey", *lines, ""]))
    words = ("--ek-certificates", str(folder), "--ek-roots", str(roots), "--ek-intermediates", str(between))
    assert line.run(*words) == 1
    assert line.results == {"good": "uncertified", "pem": "created"} and list(line.enrolled()) == ["pem"]
    assert line.report["certificates"]["tpms"] == {"id:49465800 (IFX) SLB9670 id:0755": 1}
    with pytest.raises(SystemExit, match="2"):
        line.run(*words[:2])
