"""`dps-agent enroll --append`: the file of a factory's line, and who reads it."""

from __future__ import annotations

import base64
import contextlib
import csv
import fcntl
import hashlib
import json
import os
import shlex
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dps_agent.host import enrolment
from dps_agent.host.cli import main
from dps_agent.host.enrolment import CSV_HEADER, Enrolment, append
from dps_board import factory
from dps_emulator import cli as emulator_cli
from dps_emulator.enrollments import Enrollment, read_enrollments
from dps_emulator.state import open_store
from dps_hal.errors import AskOperator, RetryLater
from dps_hal.host.simulator import SimulatedTpm
from dps_text import text_of
from dps_text.enrolments import read_enrolments
from support.programs.running_agent import PROGRAM, _environ
from support.tpm.maker import certificate_for
from support.tpm.states import copy_state
from support.tpm.swtpm import Swtpm

# `az iot dps enrollment create`, extension azure-iot: the options of an individual enrolment.
AZ_OPTIONS = {
    *("--enrollment-id", "--eid", "--attestation-type", "--at", "--endorsement-key", "--ek", "--dps-name", "-n"),
    *("--resource-group", "-g", "--login", "-l", "--device-id", "--provisioning-status", "--iot-hubs"),
    *("--allocation-policy", "--reprovision-policy", "--initial-twin-properties", "--initial-twin-tags"),
}
DEVICES = ("press-07", "press-08")
Words = tuple[str, ...]


def device(number: int) -> Enrolment:
    """One of many devices; the emulator takes only real keys, this is for who does not ask."""
    return Enrolment(f"press-{number:04}", base64.b64encode(b"%d" % number).decode(), "wire", "")


@pytest.fixture
def line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Words]:
    """Flags for two devices."""
    for name in [name for name in os.environ if name.startswith("DPS_AGENT_")]:
        monkeypatch.delenv(name)
    flags = {}
    for name in DEVICES:
        folder = copy_state(name, tmp_path / name)
        settings = tmp_path / f"{name}.toml"
        settings.write_text(
            f'registration_id = "{name}"\nendpoint = "https://localhost"\nstate_dir = "{tmp_path}/state"\n'
            f'[tpm]\nbackend = "simulator"\ntcti = "{folder}"\n'
        )
        flags[name] = ("--config", str(settings), "enroll")
    return flags


def ek_of(name: str, tmp_path: Path) -> bytes:
    return SimulatedTpm(str(tmp_path / name)).endorsement_key()


def test_the_board_prints_the_same_columns() -> None:
    assert factory.CSV_HEADER == CSV_HEADER
    tpm: Any = type("Tpm", (), {"endorsement_key": lambda _: b"ek", "endorsement_certificate": lambda _: b"der"})()
    printed = factory.enrolment_line(tpm, "press-07").split(",")
    ours = Enrolment("press-07", base64.b64encode(b"ek").decode(), "wire", hashlib.sha256(b"der").hexdigest())
    assert ",".join(printed) == ours.csv_row()


@pytest.mark.parametrize("form", ["csv", "json"])
def test_a_line_of_devices_is_imported_as_it_was_written(
    form: str, line: dict[str, Words], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / f"line.{form}"
    for count, name in enumerate(DEVICES, 1):
        assert main([*line[name], "--append", str(path), "--json"]) == 0
        document = json.loads(capsys.readouterr().out)
        assert (document["registrationId"], document["file"], document["devices"]) == (name, str(path), count)
    content = path.read_text()
    if form == "csv":
        assert content.splitlines()[0] == CSV_HEADER
        assert content.count(CSV_HEADER) == 1
        assert [row["backend"] for row in csv.DictReader(content.splitlines())] == ["simulator", "simulator"]
    else:
        assert [record["registrationId"] for record in json.loads(content)] == list(DEVICES)
    state = tmp_path / "cloud"
    assert emulator_cli.main(["enroll-import", str(path), "--state-dir", str(state)]) == 0
    with contextlib.closing(open_store(state)) as store:
        stored = {name: store.enrollments[name].endorsement_key for name in DEVICES}
    assert stored == {name: ek_of(name, tmp_path) for name in DEVICES}
    assert [entry.name for entry in tmp_path.iterdir() if entry.name.endswith(".new")] == []


def test_lines_of_boards_and_gateways_go_into_one_file(line: dict[str, Words], tmp_path: Path) -> None:
    path = tmp_path / "line.csv"
    tpm = SimulatedTpm(str(tmp_path / "press-08"))
    path.write_text(f"{factory.CSV_HEADER}\r\n{factory.enrolment_line(tpm, 'board-01')}")  # as a console was saved
    assert main([*line["press-07"], "--append", str(path)]) == 0
    assert [found.registration_id for found in read_enrollments(path.read_text()).enrollments] == [
        "board-01",
        "press-07",
    ]
    assert main([*line["press-08"], "--append", str(path)]) == 1  # the board's TPM


@pytest.mark.parametrize("form", ["csv", "json", "az"])
def test_a_device_that_is_there_already_is_refused_with_a_sentence(
    form: str, line: dict[str, Words], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "line"
    words = ("--format", form, "--append", str(path))
    assert main([*line["press-07"], *words]) == 0
    before = path.read_bytes()
    same_id, same_key = ("--set", "registration_id=PRESS-07"), ("--set", "registration_id=other")
    expected = {
        (*line["press-07"], *words): f"{path} has this device already, as 'press-07'",
        (*line["press-08"], *words, *same_id): "with another endorsement key",
        (*line["press-07"], *words, *same_key): f"{path} has this TPM already, as 'press-07'",
    }
    capsys.readouterr()
    for command, sentence in expected.items():
        assert main([*command]) == 1
        shown = capsys.readouterr()
        assert shown.out == "" and sentence in shown.err and "[agent.duplicate]" in shown.err, shown.err
    assert path.read_bytes() == before


@pytest.mark.parametrize("registration_id", ["press-07", "a:b.c_d-1"])
def test_the_az_form_is_a_command_that_the_extension_takes(
    registration_id: str, line: dict[str, Words], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "enroll.sh"
    flags = ("--set", f"registration_id={registration_id}")
    assert main([*line["press-07"], "--format", "az", "--append", str(path), *flags]) == 0
    assert main([*line["press-08"], "--format", "az", "--append", str(path)]) == 0
    note, command, *_ = path.read_text().splitlines()
    assert note == "# simulator: this TPM's keys lie in plain files"
    capsys.readouterr()
    assert main([*line["press-07"], "--format", "az", *flags]) == 0
    assert capsys.readouterr().out.splitlines() == [note, command]
    words = shlex.split(command)
    assert words[:5] == ["az", "iot", "dps", "enrollment", "create"]
    options = dict(zip(words[5::2], words[6::2], strict=True))
    assert set(options) <= AZ_OPTIONS
    assert options["--attestation-type"] == "tpm"
    assert options["--enrollment-id"] == registration_id
    assert base64.b64decode(options["--endorsement-key"]) == ek_of("press-07", tmp_path)
    # what a shell makes of the file
    shell = 'az() { printf "%s\\n" "$*"; }; RESOURCE_GROUP=group; DPS_NAME=dps; . "$0"'
    printed = subprocess.run(["sh", "-c", shell, str(path)], capture_output=True, text=True, check=True, timeout=60)
    first, second = printed.stdout.splitlines()
    assert first.startswith("iot dps enrollment create --resource-group group --dps-name dps --enrollment-id")
    assert "--enrollment-id press-08" in second


def test_devices_that_are_enrolled_at_the_same_time_are_all_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "line.csv"
    code = (
        "import sys\nfrom dps_agent.host.enrolment import Enrolment, append\n"
        "for number in range(int(sys.argv[2]), int(sys.argv[2]) + 10):\n"
        "    append(sys.argv[1], 'csv', Enrolment(f'press-{number:04}', f'key{number}', 'wire', ''))\n"
    )
    programs = [
        subprocess.Popen([sys.executable, "-c", code, str(path), str(first)], env=_environ({})) for first in (0, 10, 20)
    ]
    assert [program.wait(60) for program in programs] == [0, 0, 0]
    header, *rows = path.read_text().splitlines()
    assert header == CSV_HEADER
    assert sorted(row.split(",")[0] for row in rows) == [f"press-{number:04}" for number in range(30)]


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_a_disk_that_fails_leaves_the_file_as_it_was(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "line.csv"
    append(str(path), "csv", device(1))
    before = path.read_bytes()

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    if call == "write":
        path.with_name(f"line.csv.{os.getpid()}.new").mkdir()  # nor can another program's name in the way do harm
    else:
        monkeypatch.setattr(os, call, fail)
    with pytest.raises(AskOperator) as caught:
        append(str(path), "csv", device(2))
    assert caught.value.code == "agent.file"
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert call == "write" or not path.with_name(f"line.csv.{os.getpid()}.new").exists()


def test_the_file_keeps_its_mode_and_what_it_links_to(tmp_path: Path) -> None:
    path, link = tmp_path / "line.json", tmp_path / "link.json"
    append(str(path), "json", device(1))
    path.chmod(0o640)
    link.symlink_to(path)
    assert append(str(link), "json", device(2)).devices == 2
    assert link.is_symlink()
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


@pytest.mark.parametrize(
    ("form", "content", "says"),
    [
        ("csv", "press-07,AToA\n", "line 1: expected a header that names the columns"),
        ("csv", "[]\n", "came JSON"),
        ("json", f"{CSV_HEADER}\n", "came CSV"),
        ("json", "{", "line 1: not valid JSON"),
        ("json", '[\n{"registrationId": "press-07"},\n]', "line 3: not valid JSON"),
        ("az", "az iot dps enrollment create --enrollment-id 'x\n", "line 1"),
        ("csv", f"{CSV_HEADER}\n\xff", "expected text in UTF-8; came the byte 0xff at line 2, byte 1"),
        ("csv", "r\0e\0g\0", "came UTF-16"),
    ],
)
def test_a_file_of_another_form_is_left_alone(form: str, content: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "line"
    path.write_text(content, encoding="latin-1")
    with pytest.raises(AskOperator, match=says) as caught:
        append(str(path), form, device(1))
    assert caught.value.code == "agent.file"
    assert path.read_text(encoding="latin-1") == content


def test_a_json_file_of_one_device_becomes_a_list(
    line: dict[str, Words], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*line["press-07"], "--format", "json"]) == 0
    path = tmp_path / "one.json"
    path.write_text(capsys.readouterr().out)
    assert main([*line["press-08"], "--append", str(path)]) == 0
    assert [found.registration_id for found in read_enrollments(path.read_text()).enrollments] == list(DEVICES)


def test_what_is_no_regular_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.csv")
    for path in (tmp_path / "pipe.csv", tmp_path / "none" / "line.csv", tmp_path):
        with pytest.raises(AskOperator) as caught:
            append(str(path), "csv", device(1))
        assert caught.value.code == "agent.file"


def test_a_folder_that_stays_locked_is_reported_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(enrolment, "LOCK_LIMIT_S", 0.1)
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        with pytest.raises(RetryLater, match="locked"):
            append(str(tmp_path / "line.csv"), "csv", device(1))
    finally:
        os.close(fd)


@pytest.mark.parametrize(
    "words",
    [
        ("--append", "line"),
        ("--append", "line.csv", "--format", "text"),
        ("--append", "line.csv", "--format", "az"),
        ("--append", "line.json", "--format", "csv"),
    ],
)
def test_a_file_without_a_form_is_exit_2(
    words: Words, line: dict[str, Words], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*line["press-07"], *words]) == 2
    assert not (tmp_path / "line").exists() and not (tmp_path / "line.csv").exists()


def test_the_digest_of_the_tpms_certificate_is_in_its_column(
    line: dict[str, Words], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    certificate = certificate_for(ek_of("press-07", tmp_path))  # of another TPM, but it is one
    with Swtpm(tmp_path / "swtpm") as machine:
        machine.write_nv(0x01C00002, certificate)
        flags = ("--format", "csv", "--set", "tpm.backend=wire", "--set", f"tpm.tcti={machine.tcti}")
        assert main([*line["press-07"], *flags]) == 0
    (row,) = csv.DictReader(capsys.readouterr().out.splitlines())
    assert row["ekCertificateSha256"] == hashlib.sha256(certificate).hexdigest()
    assert main([*line["press-07"], "--format", "csv"]) == 0  # a simulator has none
    (row,) = csv.DictReader(capsys.readouterr().out.splitlines())
    assert row["ekCertificateSha256"] == ""


def test_a_device_that_is_listed_with_two_keys_is_not_imported_and_the_others_are(
    line: dict[str, Words], tmp_path: Path
) -> None:
    one, other = (base64.b64encode(ek_of(name, tmp_path)).decode() for name in DEVICES)
    text = f"registrationId,endorsementKey\npress-07,{one}\nPRESS-07,{one}\n"
    assert read_enrollments(text).enrollments[1] == Enrollment("PRESS-07", ek_of("press-07", tmp_path))
    found = read_enrollments(f"{text}press-09,{other}\npress-07,{other}\n")
    assert [enrollment.registration_id for enrollment in found.enrollments] == ["press-09"]
    assert [odd.line for odd in found.odd] == [2, 3, 5] and "two endorsement keys, see lines 2, 5" in found.odd[0].why


AZ_LIST = [
    {
        "attestation": {"symmetricKey": {"primaryKey": None}, "tpm": None, "type": "symmetricKey", "x509": None},
        "registrationId": "key-1",
    },
    {
        "attestation": {
            "symmetricKey": None,
            "tpm": {"endorsementKey": device(7).endorsement_key, "storageRootKey": None},
            "type": "tpm",
            "x509": None,
        },
        "registrationId": device(7).registration_id,
    },
]


@pytest.mark.parametrize(
    ("name", "content", "last"),
    [
        ("quoted.csv", '"registrationId","endorsementKey"\n"press-0007","Nw=="\n', "press-0008,OA=="),
        (
            "semicolons.csv",
            "\ufeffEndorsement Key;Registration-ID;x\r\nNw==;press-0007;\r\n",
            "OA==;press-0008;",
        ),
        ("tabs.csv", "registrationId\tendorsementKey\tbackend\npress-0007\tNw==\twire", "press-0008\tOA==\twire"),
        ("excel.csv", "sep=;\r\nregistrationid;endorsementkey\r\npress-0007;Nw==\r\n", "press-0008;OA=="),
        ("az.json", json.dumps(AZ_LIST, indent=2), "]"),
        ("powershell.json", "\ufeff" + json.dumps(AZ_LIST).replace(", ", ",\r\n"), "]"),
    ],
)
def test_append_reads_what_the_import_reads_and_keeps_how_it_was_written(
    name: str, content: str, last: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_bytes(content.encode())
    form = name.rpartition(".")[2]
    with pytest.raises(AskOperator) as caught:
        append(str(path), form, device(7))
    assert caught.value.code == "agent.duplicate" and path.read_bytes() == content.encode()
    count, notes = append(str(path), form, device(8))
    after = path.read_bytes()
    assert count == 2 and after.startswith(content.rstrip("]\r\n").encode()), after
    lines = after.decode().split("\r\n" if "\r\n" in content else "\n")
    assert lines[-2:] == [last, ""] and after.count(b"\n") == len(lines) - 1
    assert [note.partition(": ")[2] for note in notes] == (
        ["'key-1' is an enrolment of the kind symmetricKey"] if form == "json" else []
    )
    assert [entry.registration_id for entry in read_enrolments(text_of(after)).entries] == ["press-0007", "press-0008"]


def test_an_odd_line_is_named_and_keeps_nobody_out(
    line: dict[str, Words], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "line.csv"
    path.write_text(f"{CSV_HEADER}\npress-06\n")
    assert main([*line["press-07"], "--append", str(path)]) == 0
    said = "not counted: line 2: 'press-06': its endorsement key is missing"
    assert capsys.readouterr().out == f"press-07 was added to {path}, which has 1 device now\n{said}\n"
    assert path.read_text().startswith(f"{CSV_HEADER}\npress-06\npress-07,")


X509 = {"registrationId": "Press-0007", "attestation": {"type": "x509", "x509": {}}}


@pytest.mark.parametrize(
    ("form", "content", "says"),
    [
        ("csv", f"{CSV_HEADER}\npress-0007,Nw==\npress-0007,OA==\n", "has this device already, as 'press-0007'"),
        ("csv", f"{CSV_HEADER}\npress-0007,OA==\npress-0007,OQ==\n", "with another endorsement key, in line 2"),
        ("csv", f"{CSV_HEADER}\nx,OA==\nx,Nw==\n", "has this TPM already, as 'x'"),
        ("csv", f"{CSV_HEADER}\nPress-0007\n", "'Press-0007' already, without an endorsement key, in line 2"),
        ("csv", "registrationId,attestationType,endorsementKey\npress-0007,x509\n", "without an endorsement key"),
        ("json", json.dumps([X509]), "has the registration id 'Press-0007' already, without an endorsement key"),
        ("json", '[\n{"registrationId": "press-0007"}]', "without an endorsement key, in line 2"),
        ("json", json.dumps({**X509, "attestation": {"tpm": {"endorsementKey": 7}}}), "without an endorsement key"),
    ],
)
def test_a_device_that_an_odd_entry_names_is_refused_as_well(
    form: str, content: str, says: str, tmp_path: Path
) -> None:
    path = tmp_path / "line"
    path.write_text(content)
    with pytest.raises(AskOperator) as caught:
        append(str(path), form, device(7))
    assert caught.value.code == "agent.duplicate" and says in str(caught.value)
    assert path.read_text() == content
    assert append(str(path), form, device(70)).devices == 1  # the odd entries keep nobody else out


def test_devices_behind_an_open_quote_are_counted_and_refused_again(tmp_path: Path) -> None:
    path = tmp_path / "line.csv"
    path.write_text(f'{CSV_HEADER}\n"press-0001,MQ==\npress-0002,Mg==\n"press-0003","Mw=="\n')
    with pytest.raises(AskOperator, match="has this device already, as 'press-0003'"):
        append(str(path), "csv", device(3))
    assert append(str(path), "csv", device(4)) == (
        3,
        ["line 2: not valid CSV: a quote is opened that does not end well"],
    )


@pytest.mark.parametrize(
    ("form", "content", "added"),
    [
        ("csv", 'registrationId,endorsementKey,x\r\na,b,"two\nlines"\r\n', "press-0008,OA==,\r\n"),
        ("csv", 'registrationId,endorsementKey,x\na,b,"two\r\nlines"', "\npress-0008,OA==,\n"),
        ("csv", "\ufeff\r\nregistrationId,endorsementKey\n", "press-0008,OA==\r\n"),
        ("az", "# made on Windows\r\necho \\\n  x\r\n", f"{device(8).az_lines()[0]}\r\n"),
    ],
)
def test_what_stands_in_a_file_stays_byte_for_byte(form: str, content: str, added: str, tmp_path: Path) -> None:
    path = tmp_path / "line"
    path.write_bytes(content.encode())
    append(str(path), form, device(8))
    assert path.read_bytes().decode() == content + added


def test_what_stands_in_a_json_file_stays_byte_for_byte(tmp_path: Path) -> None:
    path = tmp_path / "line.json"
    content = "\ufeff \r\n[\n" + json.dumps(AZ_LIST[0]) + "\r\n]\r\n"
    path.write_bytes(content.encode())
    append(str(path), "json", device(8))
    after = path.read_bytes().decode()
    assert after.startswith(content.removesuffix("\r\n]\r\n") + ",\r\n{") and after.endswith("}\r\n]\r\n")
    assert [found["registrationId"] for found in json.loads(after[1:])] == ["key-1", "press-0008"]


def test_the_command_appends_as_a_program(line: dict[str, Words], tmp_path: Path) -> None:
    run: Callable[..., Any] = subprocess.run
    words = [*PROGRAM, *line["press-07"], "--append", "line.csv"]
    ended = run(words, cwd=tmp_path, env=_environ({}), capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stdout) == (0, "press-07 was added to line.csv, which has 1 device now\n")


class Counted(str):
    """Text that knows how much of it was searched for line ends."""

    searched = 0

    def count(self, part: str, begin: Any = 0, end: Any = None) -> int:
        self.searched += (len(self) if end is None else end) - begin
        return super().count(part, begin, end)


def test_where_each_of_thousands_stands_is_found_in_one_pass_over_a_json_list() -> None:
    record = {"registrationId": "", "attestation": {"type": "tpm", "tpm": {"endorsementKey": "AToAAQ=="}}}
    records = [{**record, "registrationId": f"press-{number}"} for number in range(1000)]
    text = Counted(json.dumps(records, indent=0))
    lines = text.split("\n")
    for entry in read_enrolments(text).entries:
        assert lines[entry.line - 1] == "{" and entry.registration_id in lines[entry.line]
    assert text.searched <= len(text)
