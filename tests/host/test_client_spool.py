"""The spool of `dps_agent.client`: whatever ends the program nothing accepted is lost, and its bounds hold."""

import ctypes
import itertools
import json
import logging
import os
import random
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dps_agent.client import NotDone, Refused, Spool, SpoolFailed
from dps_agent.client import spool as spool_module
from dps_agent.client.spool import OWN_PROPERTIES, ROW_SIZE, Moment
from dps_agent.client.values import MESSAGE_LIMIT, Request, message_size, telemetry
from dps_agent.session import TELEMETRY_LIMIT, telemetry_size

CHECKOUT = Path(__file__).resolve().parents[2]
KILLS = 1000
NOW_S = 1_800_000_000.0


def message(text: str) -> Request:
    return telemetry(text, None, 1, True)


def texts(spool: Spool) -> list[str]:
    """Sends what is there; in which order it came out."""
    found = []
    while (stored := spool.first()) is not None:
        found.append(stored.request.body.decode())
        spool.forget(stored.number)
    return found


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Moment]]:
    """The moment that counts, which a test replaces."""
    now = [Moment("this start", 100.0, NOW_S)]
    monkeypatch.setattr(spool_module, "moment", lambda: now[0])
    yield now


# What ends a program.


def test_a_thousand_kills_lose_no_accepted_message_and_change_no_order() -> None:
    seed = random.randrange(1 << 30)
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # a kill is none of the disk's business
    with tempfile.TemporaryDirectory(prefix="spool-", dir=memory) as folder:
        words = [sys.executable, "-m", "support.programs.spool_kills", folder, str(KILLS), str(seed)]
        sources = os.pathsep.join(str(CHECKOUT / name) for name in ("agent", "hal", "tests"))
        environ = {**os.environ, "PYTHONPATH": sources}
        done = subprocess.run(words, env=environ, capture_output=True, text=True, check=True, timeout=600)
    found = json.loads(done.stdout)
    hub, reproduce = found["hub"], " ".join(words[1:])
    first_times = list(dict.fromkeys(hub))
    assert found["killed"] == KILLS, reproduce
    assert len(found["accepted"]) > KILLS and set(found["accepted"]) <= set(hub), reproduce
    assert first_times == sorted(first_times), reproduce
    # One that the hub had when the kill came is sent again, once for each kill, and right away.
    assert all(before <= after for before, after in itertools.pairwise(hub)), reproduce
    assert len(hub) - len(first_times) <= KILLS, reproduce


@pytest.mark.parametrize("behind", ["nothing", "zeros", "noise"])
def test_a_power_cut_leaves_what_was_accepted_wherever_it_cuts_the_log(behind: str, tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool")
    log = tmp_path / "spool-wal"
    ends = [log.stat().st_size]
    for number in range(12):
        spool.put([message(str(number) * 100 * (number + 1))])
        ends.append(log.stat().st_size)
    whole, base = log.read_bytes(), (tmp_path / "spool").read_bytes()
    chance = random.Random(1)
    for cut in {*range(ends[0], len(whole) + 1, 1499), *ends, *(end - 1 for end in ends[1:])}:
        torn = {"nothing": b"", "zeros": bytes(len(whole) - cut), "noise": chance.randbytes(len(whole) - cut)}[behind]
        copy = tmp_path / "copy"
        copy.mkdir()
        (copy / "spool").write_bytes(base)
        torn_log = whole[:cut] + torn  # what was cut off may have been zeros itself
        (copy / "spool-wal").write_bytes(torn_log)
        opened = Spool(copy / "spool")
        accepted = sum(torn_log[:end] == whole[:end] for end in ends[1:])
        assert texts(opened) == [str(number) * 100 * (number + 1) for number in range(accepted)], f"cut={cut}"
        opened.close()
        shutil.rmtree(copy)
    spool.close()


def test_every_commit_waits_for_the_disk(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool")
    pragmas = {name: spool._base.execute(f"PRAGMA {name}").fetchone()[0] for name in ("synchronous", "journal_mode")}
    assert pragmas == {"synchronous": 2, "journal_mode": "wal"}  # 2: FULL, which syncs the log with each commit
    spool.close()


# Its bounds.


def test_the_oldest_messages_go_first_and_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    spool = Spool(tmp_path / "spool", max_messages=3)
    with caplog.at_level(logging.WARNING, "dps_agent.client"):
        for number in range(5):
            spool.put([message(str(number))])
    assert len(spool) == 3 and spool.dropped == {"age": 0, "room": 2, "refused": 0, "unanswered": 0}
    assert caplog.text.count("dropped 1 messages") == 2
    assert texts(spool) == ["2", "3", "4"]
    spool.close()
    spool = Spool(tmp_path / "spool")
    assert spool.dropped["room"] == 2, "the count outlives the program"
    spool.close()


def test_bytes_are_bounded_as_well(tmp_path: Path) -> None:
    size = ROW_SIZE + len(message("").target) + 100
    spool = Spool(tmp_path / "spool", max_bytes=3 * size)
    for letter in "abcd":
        spool.put([message(letter * 100)])
    spool.put([message("e" * 150)])
    assert [text[0] for text in texts(spool)] == ["d", "e"]
    with pytest.raises(Refused):
        spool.put([message("x" * 4 * size)])
    spool.close()


def test_where_the_newest_go_first_they_are_refused_all_or_none(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool", max_messages=3, drop_first="newest")
    spool.put([message("0"), message("1")])
    with pytest.raises(NotDone) as refused:
        spool.put([message("2"), message("3")])
    assert refused.value.code == "agent.spool_full"
    spool.put([message("4")])
    assert len(spool) == 3 and texts(spool) == ["0", "1", "4"] and len(spool) == 0
    spool.close()


def test_the_file_does_not_grow_with_what_goes_through_it(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool", max_messages=20)
    for number in range(300):
        spool.put([message("x" * 4000)])
        if number % 2:
            stored = spool.first()
            assert stored is not None
            spool.forget(stored.number)
    held = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert held < 20 * 4200 + 4 * 1024 * 1024 + 200_000, held  # what is held, the log, and what SQLite needs
    spool.close()


def test_what_is_too_old_goes_by_the_clock_that_nobody_sets(tmp_path: Path, clock: list[Moment]) -> None:
    spool = Spool(tmp_path / "spool", max_age_s=60)
    spool.put([message("0")])
    clock[0] = Moment("this start", 150.0, NOW_S + 9000)  # the clock was put forward
    spool.put([message("1")])
    assert len(spool) == 2
    stored = spool.first()
    assert stored is not None and stored.request.body == b"0"
    clock[0] = Moment("this start", 161.0, NOW_S + 9011)
    assert texts(spool) == ["1"] and spool.dropped["age"] == 1
    spool.close()


def test_after_a_restart_of_the_machine_the_age_is_what_the_clocks_said(tmp_path: Path, clock: list[Moment]) -> None:
    spool = Spool(tmp_path / "spool", max_age_s=60)
    spool.put([message("0")])
    clock[0] = Moment("next start", 1.0, NOW_S + 50)
    assert spool.first() is not None
    clock[0] = Moment("next start", 12.0, NOW_S + 61)
    assert spool.first() is None
    spool.close()


def test_a_clock_that_was_never_set_makes_nothing_old_and_dates_nothing(tmp_path: Path, clock: list[Moment]) -> None:
    spool = Spool(tmp_path / "spool", max_age_s=60)
    clock[0] = Moment("this start", 5.0, 5.0)
    spool.put([message("0")])
    clock[0] = Moment("next start", 7.0, NOW_S)
    stored = spool.first()
    assert stored is not None and "ctime" not in stored.request.target
    spool.close()


def test_a_message_is_dated_by_when_it_was_put_in_also_where_the_clock_was_set_later(
    tmp_path: Path, clock: list[Moment]
) -> None:
    spool = Spool(tmp_path / "spool")
    clock[0] = Moment("this start", 5.0, 5.0)
    spool.put([message("0")])
    clock[0] = Moment("this start", 65.25, NOW_S + 60.25)
    stored = spool.first()
    assert stored is not None and "%24.ctime=2027-01-15T08%3A00%3A00.000Z" in stored.request.target
    spool.close()


@pytest.mark.parametrize("behind_s", [8 * 86400.0, 400 * 86400.0])
def test_a_clock_that_nobody_kept_makes_nothing_old_after_a_restart_and_dates_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, behind_s: float
) -> None:
    kept, since_boot_s, utc_s, boot = [False], [100.0], [NOW_S - behind_s], ["this start"]
    monkeypatch.setattr(spool_module, "is_synchronised", lambda: kept[0])
    monkeypatch.setattr(spool_module, "_boot", lambda: boot[0])
    monkeypatch.setattr(spool_module.time, "time", lambda: utc_s[0])
    monkeypatch.setattr(spool_module.time, "clock_gettime", lambda _clock: since_boot_s[0])
    spool = Spool(tmp_path / "spool", max_age_s=60)
    spool.put([message("0")])  # a plausible past, such as the image's
    boot[0], since_boot_s[0], utc_s[0], kept[0] = "next start", 20.0, NOW_S, True
    stored = spool.first()
    assert stored is not None and "ctime" not in stored.request.target and spool.dropped["age"] == 0
    since_boot_s[0] = 61.0
    assert spool.first() is None and spool.dropped["age"] == 1, "it has waited at least since this start"
    spool.put([message("1")])
    boot[0], since_boot_s[0], utc_s[0], kept[0] = "third start", 5.0, NOW_S + 9000, False
    stored = spool.first()
    assert stored is not None and stored.request.body == b"1", "a clock that nobody keeps now drops nothing either"
    spool.close()


def test_within_one_start_the_age_counts_also_where_nobody_keeps_the_clock(tmp_path: Path, clock: list[Moment]) -> None:
    spool = Spool(tmp_path / "spool", max_age_s=60)
    clock[0] = Moment("this start", 5.0, 0.0)
    spool.put([message("0")])
    clock[0] = Moment("this start", 64.0, 0.0)
    assert spool.first() is not None
    clock[0] = Moment("this start", 66.0, 0.0)
    assert spool.first() is None and spool.dropped["age"] == 1
    spool.close()


@pytest.mark.parametrize(
    ("timesyncd", "kernel", "synchronised"), [(True, 5, True), (False, 0, True), (False, 5, False), (False, -1, False)]
)
def test_timesyncd_or_the_kernel_says_that_the_clock_is_kept(
    timesyncd: bool, kernel: int, synchronised: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Kernel:
        def __init__(self, _name: None) -> None: ...

        def adjtimex(self, timex: Any) -> int:
            assert bytes(timex) == bytes(512), "it is only read"
            return kernel

    monkeypatch.setattr(spool_module, "_TIMESYNCD_SAYS_SO", str(tmp_path if timesyncd else tmp_path / "absent"))
    monkeypatch.setattr(ctypes, "CDLL", Kernel)
    assert spool_module.is_synchronised() is synchronised
    assert (spool_module.moment().utc_s > 0) is synchronised


# The file.


def test_a_second_spool_in_one_program_is_refused_and_takes_no_lock_of_the_first(tmp_path: Path) -> None:
    path = tmp_path / "spool"
    spool = Spool(path)
    spool.put([message("0")])
    with pytest.raises(SpoolFailed, match="open"):
        Spool(path)
    program = "import sys\nfrom dps_agent.client import Spool\nSpool(sys.argv[1])"
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(str(CHECKOUT / name) for name in ("agent", "hal"))}
    words = [sys.executable, "-c", program, str(path)]
    done = subprocess.run(words, env=environ, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1 and "another program has it open (agent.file)" in done.stderr
    spool.put([message("1")])
    assert texts(spool) == ["0", "1"]
    spool.close()


def test_the_files_are_their_owner_s_alone_whatever_the_mask_says(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        (tmp_path / "open").touch(0o666)
        for name in ("new", "open"):
            spool = Spool(tmp_path / name)
            spool.put([message("secret")])
            modes = {path.name: oct(path.stat().st_mode & 0o777) for path in tmp_path.glob(f"{name}*")}
            assert set(modes) == {name, f"{name}-wal"} and set(modes.values()) == {"0o600"}, modes
            spool.close()
    finally:
        os.umask(before)


def test_a_second_program_is_told_that_another_one_has_it(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool")
    program = "import sys\nfrom dps_agent.client import Spool\nSpool(sys.argv[1])"
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(str(CHECKOUT / name) for name in ("agent", "hal"))}
    words = [sys.executable, "-c", program, str(tmp_path / "spool")]
    done = subprocess.run(words, env=environ, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1 and "another program has it open (agent.file)" in done.stderr
    spool.close()
    assert subprocess.run(words, env=environ, check=False, timeout=60).returncode == 0


@pytest.mark.parametrize("what", ["folder", "missing folder", "link", "noise", "torn", "newer"])
def test_what_is_no_spool_is_named_and_left_alone(what: str, tmp_path: Path) -> None:
    path = tmp_path / "spool"
    match what:
        case "folder":
            path.mkdir()
        case "missing folder":
            path = tmp_path / "nowhere" / "spool"
        case "link":
            path.symlink_to(tmp_path / "elsewhere")
        case "noise":
            path.write_bytes(b"noise" * 4096)
        case "torn":
            with_one = Spool(path)
            with_one.put([message("x" * 9000)])
            with_one.close()
            path.write_bytes(path.read_bytes()[:8192])
        case "newer":
            base = sqlite3.connect(path)
            base.execute("PRAGMA user_version = 7")
            base.close()
    before = path.read_bytes() if path.is_file() else b""
    with pytest.raises(SpoolFailed) as failed:
        Spool(path)
    assert str(path) in failed.value.message and failed.value.code == "agent.file"
    assert (path.read_bytes() if path.is_file() else b"") == before


def test_a_disk_that_is_full_is_an_error_and_nothing_is_half_in(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool")
    spool.put([message("0")])
    spool._base.execute("PRAGMA max_page_count = 10")
    with pytest.raises(SpoolFailed, match="full"):
        spool.put([message("1"), message("x" * 100_000)])
    spool._base.execute("PRAGMA max_page_count = 10000")
    spool.put([message("2")])
    assert len(spool) == 2 and texts(spool) == ["0", "2"]
    spool.close()


def test_settings_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="drop_first"):
        Spool(tmp_path / "spool", drop_first="largest")
    with pytest.raises(Refused, match="more than 0"):
        Spool(tmp_path / "spool", max_bytes=0)
    spool = Spool(tmp_path / "spool")
    with pytest.raises(Refused, match="QoS 0"):
        spool.put([telemetry(b"", None, 0, True)])
    assert len(spool) == 0
    spool.close()


def test_what_no_hub_takes_is_refused_at_once_and_what_one_takes_is_not(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool")
    properties = {"line": "3 & ö", "$.ct": "text/plain"}
    room = MESSAGE_LIMIT - OWN_PROPERTIES - len("line") - len("3 & ö".encode()) - len("text/plain")
    with pytest.raises(Refused, match=f"at most {MESSAGE_LIMIT - OWN_PROPERTIES} bytes .*; came") as refused:
        spool.put([message("fits"), telemetry(b"x" * (room + 1), properties, 1, True)])
    assert refused.value.code == "agent.too_large" and len(spool) == 0
    spool.put([telemetry(b"x" * room, properties, 1, True)])
    stored = spool.first()
    assert stored is not None and message_size(stored.request) <= TELEMETRY_LIMIT == MESSAGE_LIMIT
    spool.close()


@pytest.mark.parametrize("properties", [{}, {"a": "", "b c": "ü&="}, {"$.mid": "own", "$x": "$.y"}])
def test_a_message_is_measured_as_the_service_does(properties: dict[str, str]) -> None:
    assert message_size(telemetry(b"body", properties, 1, True)) == telemetry_size(properties, 4)
