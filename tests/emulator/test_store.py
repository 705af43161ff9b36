"""The database in the state folder: what it keeps, what it takes over, and what is said of one that is damaged."""

from __future__ import annotations

import base64
import json
import os
import shutil
import sqlite3
import stat
import subprocess
import sys
import tracemalloc
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dps_emulator import mqtt
from dps_emulator.attestation import Credential
from dps_emulator.cli import main
from dps_emulator.enrollments import Enrollment
from dps_emulator.hub import HubContext, Hubs
from dps_emulator.hub_devices import MESSAGES_KEPT, HubDevice, Telemetry
from dps_emulator.old_state import has_old_files
from dps_emulator.registrations import Assignment, Operation, Registration, StateError
from dps_emulator.service import DpsService, Settings
from dps_emulator.state import damage, open_store
from dps_emulator.store import DATABASE, Store
from emulator.device_side import Device
from support.cloud.emulator import DeviceCredentials, EmulatorProcess
from support.cloud.memory import PlainRegistrations
from support.cloud.store_cuts import OLD_STATE, RID, Wire, payloads

DEVICE = Device.of_the_vectors()
HUB = "emulator.azure-devices.net"
ROOT = Path(__file__).parents[2]


def registration(name: str, hub: str = HUB, device_id: str = "") -> Registration:
    credential = Credential((name.encode() * 4,))
    assigned = Assignment(hub, device_id or name, credential, "initialAssignment", "e", "t", None)
    return Registration(name, "t", Operation("4.x.y", 0.0, None, finished=True), assigned)


def telemetry(payload: bytes, number: int = 0) -> Telemetry:
    return Telemetry("2026-01-01T00:00:00Z", "hub", f"d{number}", payload, {}, 1, False)


def old_state(folder: Path) -> Path:
    shutil.copytree(OLD_STATE, folder)
    folder.chmod(0o700)
    return folder


@pytest.mark.parametrize("planted", ["", "no-transactions", "early-acknowledgement"])
def test_a_kill_at_any_statement_loses_nothing_that_was_acknowledged_and_leaves_no_halves(planted: str) -> None:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(str(ROOT / name) for name in ("tools", "tests", "agent")),
    }
    command = [sys.executable, "-m", "support.cloud.store_cuts", *([planted] if planted else [])]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    said = json.loads(ended.stdout.splitlines()[-1])
    if planted:
        assert ended.returncode == 1 and said["losses"] > 0, ended.stderr
        return
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert said["cuts"] > 80 and said["told"] == 23 and said["ended"] == 0


def test_files_of_an_earlier_release_are_taken_over_once(tmp_path: Path) -> None:
    state_dir, said = old_state(tmp_path / "state"), list[str]()
    with closing(open_store(state_dir, notice=said.append)) as store:
        assert sorted(store.enrollments) == ["press-08", RID]
        assert store.enrollments[RID].endorsement_key == DEVICE.ek_public and not store.enrollments["press-08"].enabled
        assigned = store.registrations[RID].assignment
        assert assigned is not None and (assigned.hub, assigned.device_id) == (HUB, "press-07")
        assert [len(key) for key in assigned.credential.keys] == [32]
        assert store.registrations.at(HUB, "press-07") == store.registrations[RID]
        device, other = store.devices(HUB)["press-07"], store.devices(HUB)["press-09"]
        assert (device.twin.desired, device.twin.reported, device.queue[0].payload) == (
            {"b": 2},
            {"a": 1},
            b"in flight",
        )
        assert not other.enabled and other.own_key is not None
        assert payloads(store) == [b"21.5", b"\xff"]
        store.messages.clear()
        del store.enrollments["press-08"]
    assert said == ["5 files and 2 messages of an earlier release are in state.db now"]
    assert {path.name for path in state_dir.iterdir()} == {DATABASE}
    with closing(open_store(state_dir, notice=said.append)) as store:
        assert list(store.enrollments) == [RID] and payloads(store) == []
    assert len(said) == 1


@pytest.mark.parametrize("files", range(7))
def test_messages_are_taken_over_once_where_the_end_comes_before_their_files_are_deleted(
    files: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state_dir = old_state(tmp_path / "state")
    older, newer = (state_dir / "messages.jsonl").read_bytes().splitlines()
    (state_dir / "messages.jsonl.1").write_bytes(older)
    (state_dir / "messages.jsonl").write_bytes(newer)
    unlink, deleted = Path.unlink, list[Path]()

    def cut(path: Path, missing_ok: bool = False) -> None:
        if len(deleted) == files:
            raise KeyboardInterrupt
        deleted.append(path)
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", cut)
    with pytest.raises(KeyboardInterrupt):
        open_store(state_dir)
    monkeypatch.undo()
    with closing(open_store(state_dir)) as store:
        assert payloads(store) == [b"21.5", b"\xff"] and len(store.enrollments) == 2
    assert not has_old_files(state_dir)


def test_an_old_file_that_is_damaged_stays_and_is_named_by_serve_and_by_every_command_until_it_is_mended(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state_dir = old_state(tmp_path / "state")
    damaged = state_dir / "enrollments/press-08.json"
    whole = damaged.read_bytes()
    damages = {"x": "{", "deep": "[" * 100_000, "list": "[1]", "null": "null", "binary": "\xff\0"}
    for name, content in damages.items():
        (damaged.parent / f"{name}.json").write_text(content, encoding="latin-1")
    damaged.write_bytes(whole[:50])
    csv = tmp_path / "a.csv"
    csv.write_text(f"registrationId,endorsementKey\nnew,{base64.b64encode(DEVICE.ek_public).decode()}\n")
    warning = f"warning: {damaged} can't be read back"
    (tmp_path / "token").write_text("x")
    with EmulatorProcess(state_dir=state_dir) as emulator:
        assert emulator.stderr.count(warning) == 1 and emulator.stderr.count("can't be read back") == 6
        for words in (
            ["devices"],
            ["wait"],
            ["messages"],
            ["twin", "press-07"],
            ["enroll-import", str(csv)],
            ["move", RID, HUB],
            ["verify-token", str(tmp_path / "token")],
        ):
            main([*words, "--state-dir", str(state_dir)])
            shown = capsys.readouterr().err
            assert shown.count(warning) == 1 and "Traceback" not in shown, (words, shown)
        assert {device["deviceId"] for device in emulator.hub_command("devices")["devices"]} == {"press-07", "press-09"}
    damaged.write_bytes(whole)
    for name in damages:
        (damaged.parent / f"{name}.json").unlink()
    assert list(damage(state_dir)) == [
        f"{damaged} is of an earlier release: the next 'dps-emulator serve' takes it over"
    ]
    with closing(open_store(state_dir)) as store:
        assert not store.enrollments["press-08"].enabled
    assert list(damage(state_dir)) == [] and not damaged.parent.exists()


@pytest.mark.parametrize("what", ["no database", "half a page", "a page", "newer"])
def test_a_damaged_database_is_named_by_serve_and_by_every_command(
    what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state_dir = tmp_path / "state"
    with closing(open_store(state_dir)) as store:
        store.enrollments.put((f"press-{number}", Enrollment("x", DEVICE.ek_public)) for number in range(500))
        if what == "newer":
            store.rows("PRAGMA user_version = 99")
    path = state_dir / DATABASE
    content = bytearray(path.read_bytes())
    if what == "no database":
        content[:16] = b"x" * 16
    if what == "half a page":
        del content[4096 * 3 + 2000 :]
    if what == "a page":
        content[4096 * 20 : 4096 * 60] = b"\xff" * 4096 * 40
    path.write_bytes(content)
    (tmp_path / "a.csv").write_text(f"registrationId,endorsementKey\nn,{base64.b64encode(DEVICE.ek_public).decode()}\n")
    (tmp_path / "token").write_text("SharedAccessSignature sr=a%2Fdevices%2Fb&sig=AA%3D%3D&se=1")
    commands = [["serve"], ["enroll-import", str(tmp_path / "a.csv")], ["move", "press-100", HUB]]
    commands += [["verify-token", str(tmp_path / "token")]]
    commands += [["devices"]] if what == "no database" else []
    for words in commands:
        ended = subprocess.run(
            [sys.executable, "-m", "dps_emulator.cli", *words, "--state-dir", str(state_dir)],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            env={**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT / "tools"), str(ROOT / "agent")))},
        )
        assert "Traceback" not in ended.stderr, ended.stderr
        if what in ("no database", "newer") or words == ["serve"]:
            assert ended.returncode == 1 and str(path) in ended.stderr, (words, ended.stderr)


def test_a_database_that_is_damaged_under_a_running_server_is_named_in_its_answers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with EmulatorProcess(state_dir=tmp_path / "state") as emulator:
        emulator.add_device("press-07")
        path = emulator.state_dir / DATABASE
        with closing(sqlite3.connect(path)) as other:
            other.execute("UPDATE devices SET record = '{'")
            other.commit()
        assert main(["twin", "press-07", "--state-dir", str(emulator.state_dir)]) == 1
        shown = capsys.readouterr().err
        assert f"{path}: the record of 'press-07' in devices can't be read back" in shown and "Traceback" not in shown
        assert main(["devices", "--state-dir", str(emulator.state_dir)]) == 0
        assert emulator.stderr.count("the record of 'press-07' in devices") == 1
        emulator.add_device("press-08")
        assert emulator.stop() == 0
    with EmulatorProcess(state_dir=tmp_path / "state") as emulator:
        assert "warning: " + str(path) + ": the record of 'press-07' in devices can't be read back" in emulator.stderr
        assert [device["deviceId"] for device in emulator.hub_command("devices")["devices"]] == ["press-08"]


def test_commands_beside_a_server_leave_it_the_database_that_it_has_open(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """SQLite's locks end when the process closes the file by itself, and then another one deletes the log in use."""
    csv = tmp_path / "a.csv"
    csv.write_text(f"registrationId,endorsementKey\nnew,{base64.b64encode(DEVICE.ek_public).decode()}\n")
    with EmulatorProcess(state_dir=tmp_path / "state") as emulator:
        assert emulator._process is not None
        commands = ["devices"], ["enroll-import", str(csv)], ["move", "new", HUB], ["messages"]
        for at, words in enumerate(commands):
            assert main([*words, "--state-dir", str(emulator.state_dir)]) == 0
            emulator.add_device(f"press-{at}")
        opened = [os.readlink(path) for path in Path(f"/proc/{emulator._process.pid}/fd").iterdir()]
        assert [path for path in opened if "(deleted)" in path] == []
        emulator._process.kill()
        emulator._process.wait()
    with closing(open_store(tmp_path / "state")) as store:
        assert list(store.devices(HUB)) == [f"press-{at}" for at in range(len(commands))]
        assert list(store.enrollments) == ["new"]


def test_a_folder_that_can_not_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / DATABASE).mkdir()
    with pytest.raises(StateError, match=f"{tmp_path / DATABASE}: "):
        open_store(tmp_path)


def test_records_are_a_mapping_and_private(tmp_path: Path) -> None:
    state_dir = tmp_path / "deep" / "state"
    with closing(open_store(state_dir)) as store, closing(open_store(state_dir)) as second:
        press = Enrollment("Press:07", DEVICE.ek_public)
        store.enrollments["press:07"] = press
        assert dict(second.enrollments) == {"press:07": press} and len(second.enrollments) == 1
        modes = {path: stat.S_IMODE(path.stat().st_mode) for path in [state_dir, *state_dir.rglob("*")]}
        assert all(mode == (0o700 if path.is_dir() else 0o600) for path, mode in modes.items()), modes
        assert len(modes) == 4, "the database and its two companions"
        del second.enrollments["press:07"]
        with pytest.raises(KeyError):
            store.enrollments["press:07"]
        with pytest.raises(KeyError):
            del store.enrollments["press:07"]
        one, two = store.devices("One.net"), store.devices("two.net")
        one["a"] = HubDevice("A", b"key")
        assert (
            "a" in one
            and "a" not in two
            and list(two) == []
            and second.devices("one.NET")["a"] == HubDevice("A", b"key")
        )


def test_a_walk_meets_every_record_once_and_says_which_is_damaged() -> None:
    store = Store()
    store.enrollments.put(
        (f"press-{number:04}", Enrollment(f"press-{number}", DEVICE.ek_public)) for number in range(1203)
    )
    store.rows("UPDATE enrollments SET record = '[]' WHERE key = 'press-0777'")
    met: list[tuple[str, Any]] = []
    while page := store.enrollments.page(met[-1][0] if met else ""):
        met += page
    assert [key for key, _ in met] == list(store.enrollments) and len(met) == 1203
    (damaged,) = [(key, record) for key, record in met if isinstance(record, StateError)]
    assert damaged[0] == "press-0777" and "the memory: the record of 'press-0777' in enrollments" in str(damaged[1])


def test_a_place_belongs_to_whoever_was_assigned_there_last_as_in_the_plain_model() -> None:
    store, model = Store(), PlainRegistrations()
    for registrations in (store.registrations, model):
        registrations["a"] = registration("a", device_id="Press")
        registrations["b"] = registration("b", device_id="press")
        registrations["c"] = registration("c", "two.azure-devices.net", "other")
        assert registrations.at(HUB.upper(), "PRESS") == registrations["b"]
        registrations["a"] = registration("a", device_id="press")
        assert registrations.at(HUB, "press") == registrations["a"]
        registrations["a"] = registration("a", "two.azure-devices.net", "press")
        assert registrations.at(HUB, "press") == registrations["b"]
        del registrations["b"]
        assert registrations.at(HUB, "press") is None and registrations.at(HUB, "") is None
        assert registrations.devices_at("TWO.azure-devices.net") == {"other", "press"}
        registrations["d"] = replace(registration("d"), assignment=None)
        assert registrations.devices_at(HUB) == set()


def test_what_a_transaction_wrote_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    with closing(open_store(tmp_path / "state")) as store, closing(open_store(tmp_path / "state")) as reader:
        with pytest.raises(RuntimeError), store.transaction():
            store.enrollments["a"] = Enrollment("a", DEVICE.ek_public)
            with store.transaction():
                store.registrations["a"] = registration("a")
            assert list(reader.enrollments) == []
            raise RuntimeError
        assert list(store.enrollments) == [] and list(store.registrations) == []
        with store.transaction():
            store.enrollments["a"] = Enrollment("a", DEVICE.ek_public)
        assert list(reader.enrollments) == ["a"]


def cost_of_a_connect(count: int) -> tuple[int, int]:
    """Statements, and steps of SQLite's machine, of one CONNECT where `count` devices are registered."""
    store = Store()
    service = DpsService(Settings(), store.enrollments, store.registrations, os.urandom)
    store.registrations.put((f"press-{number}", registration(f"press-{number}")) for number in range(count))
    store.devices(HUB).put((f"press-{number}", HubDevice(f"press-{number}")) for number in range(count))
    lines = list[Any]()
    hubs = Hubs(service, store.devices, HubContext(store.messages, os.urandom, 300, lines.append))
    device = DeviceCredentials(HUB, "press-7", b"press-7" * 4)
    statements, steps = list[str](), list[int]()
    store._connection.set_trace_callback(statements.append)
    store._connection.set_progress_handler(lambda: steps.append(1), 1)  # type: ignore[arg-type, return-value, func-returns-value]
    connect = mqtt.Connect(mqtt.LEVEL, device.device_id, device.user_name, device.token().encode())
    assert hubs.connect(Wire(lambda number: None), connect, HUB, 0.0), lines
    return len(statements), len(steps)


def test_a_connect_takes_as_many_statements_and_steps_however_many_registrations_there_are() -> None:
    few, many = cost_of_a_connect(10), cost_of_a_connect(5_000)
    assert few[0] == many[0] < 8 and 10 < many[1] <= 2 * few[1], (few, many)


def test_messages_are_bounded_in_number_and_the_newest_are_kept() -> None:
    store = Store()
    for at in range(0, MESSAGES_KEPT + 4000, 100):
        store.messages.put([(f"d{number}", b"x") for number in range(at, at + 100)])
        ((count,),) = store.rows("SELECT count(*) FROM messages")
        assert count <= MESSAGES_KEPT * 1.1
    ((first, last),) = store.rows("SELECT min(number), max(number) FROM messages")
    assert last == MESSAGES_KEPT + 4000 and first <= 4001


@pytest.mark.parametrize(
    ("payload", "properties"),
    [(b"x" * 100, {}), (b"", {"p": "x" * 100}), (b"", {"p" * 50: "y" * 50}), (b"\xff" * 75, {"p": None})],
)
def test_messages_are_bounded_in_bytes_whatever_they_consist_of_also_after_a_restart(
    payload: bytes, properties: dict[str, str | None], tmp_path: Path
) -> None:
    def message(number: int) -> Telemetry:
        return replace(telemetry(payload, number), properties=properties)

    limit = 20 * len(json.dumps(message(10).to_json()))
    for start in (10, 50):
        with closing(open_store(tmp_path / "state", limit)) as store:
            for number in range(start, start + 40):
                store.messages.append(message(number))
                ((kept,),) = store.rows("SELECT sum(length(record)) FROM messages")
                assert kept <= limit
            ids = [kept.message.device_id for kept in store.messages.after()]
            assert ids == [f"d{number}" for number in range(start + 40 - len(ids), start + 40)] and 17 <= len(ids) <= 20
    with closing(open_store(tmp_path / "state", limit)) as store:
        larger = replace(message(90), payload=b"x" * 5 * limit)  # one that is larger is kept all the same
        store.messages.append(larger)
        assert [kept.message for kept in store.messages.after()] == [larger]


def test_messages_that_a_full_disk_refuses_at_the_commit_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    store, run = Store(None, limit := 10_000), Store.rows
    for number in range(50):
        store.messages.append(telemetry(b"x", number))
    kept = store.messages.after()

    def is_full(store: Store, statement: str, *values: object) -> list[tuple[Any, ...]]:
        if statement == "COMMIT":
            raise StateError("database or disk is full")
        return run(store, statement, *values)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "rows", is_full)
        for lines in ([("d", b"y" * 500)] * 2, [("d", b"y" * limit)]):  # the latter trims
            for _ in range(20):
                with pytest.raises(StateError, match="disk is full"):
                    store.messages.put(lines)
    counted = store.rows("SELECT count(*), sum(length(record)) FROM messages")
    assert [(store.messages._count, store.messages._bytes)] == counted
    store.messages.put([("d1", b"z")] * 2)
    assert store.messages.after() == kept and store.messages.last_number() == kept[-1].number + 2


def test_what_messages_in_memory_take_is_the_limit_however_wide_their_characters_are() -> None:
    store = Store(None, 1024 * 1024)
    pages: list[int] = []
    tracemalloc.start()
    try:
        for number in range(300):
            store.messages.append(
                replace(telemetry(b"", number), properties={f"p{number}": "x" * 60_000 + "\U0001f600"})
            )
            pages.append(store.rows("PRAGMA page_count")[0][0] * 4096)
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert max(pages) < 1.3 * 1024 * 1024 and taken < 1024 * 1024 and len(store.messages.after()) in range(14, 18)


def test_messages_have_numbers_that_are_never_used_again() -> None:
    store = Store()
    for number in range(3):
        store.messages.append(telemetry(b"x", number))
    assert [(kept.number, kept.message.device_id) for kept in store.messages.after(1)] == [(2, "d1"), (3, "d2")]
    assert [kept.number for kept in store.messages.after(0, "D1")] == [2]
    assert [kept.number for kept in store.messages.after(0, None, 1)] == [3]
    store.rows("UPDATE messages SET record = '[1]' WHERE number = 2")
    assert [kept.number for kept in store.messages.after()] == [1, 3], "one that is damaged is passed over"
    assert (store.messages.clear("d2"), store.messages.clear(), store.messages.last_number()) == (1, 2, 3)
    store.messages.append(telemetry(b"x"))
    assert store.messages.last_number() == 4
