"""The file store: its contract on a real folder, power cuts and kills at every system call, and every failing call."""

import errno
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from contracts.store import RULES
from dps_hal import files
from dps_hal.contracts import IDENTITY, PROGRESS
from dps_hal.errors import AskOperator, DpsError, RetryLater
from dps_hal.files import FileStore
from support.disk import SimulatedDisk
from support.flash import PowerCut

FOLDER = "/var/lib/dps-agent"
NESTED = "/var/lib/factory/dps-agent"
Action = Callable[[FileStore], None]
Rule = Callable[[Callable[[], FileStore]], None]
Steps = list[tuple[str, Action, bytes | None]]


def payload_of(store: FileStore) -> bytes | None:
    found = store.load(IDENTITY)
    return None if found is None else found.payload


def committing(payload: bytes) -> tuple[str, Action, bytes | None]:
    return f"commit {payload!r}", lambda store: store.commit(IDENTITY, payload), payload


ERASING = ("erase", lambda store: store.erase(IDENTITY), None)
LIFE: Steps = [
    committing(b"hub A"),
    committing(b"hub B" * 300),
    committing(b"hub C"),
    ERASING,
    ERASING,
    committing(b"hub D"),
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_store_contract_holds_on_a_real_folder(rule: Rule, tmp_path: Path) -> None:
    rule(lambda: FileStore(str(tmp_path / "state")))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_store_contract_holds_on_the_simulated_disk(rule: Rule) -> None:
    disk = SimulatedDisk()
    rule(lambda: FileStore(FOLDER, disk))
    assert disk.open_descriptors() == 0


# Power cuts


def sweep(folder: str, disk: SimulatedDisk, steps: Steps) -> tuple[int, list[str]]:
    """Cuts `steps` at every system call and looks at every tree that may be left; how many, and what was wrong."""
    states = 0
    wrong = []
    for number, (name, action, after) in enumerate(steps):
        before = payload_of(FileStore(folder, disk.copy()))
        cut = 0
        while True:
            cut += 1
            one = disk.copy(cut)
            try:
                action(FileStore(folder, one))
                finished = True
                assert one.calls < cut, f"{name} cut={cut}: somebody caught the power cut"
            except PowerCut:
                finished = False
            for left, tree in enumerate(one.aftermaths()):
                states += 1
                where = f"step={number} ({name}) cut={cut} left={left}"
                rebooted = type(disk)(tree)
                found = payload_of(FileStore(folder, rebooted))
                if found not in ((after,) if finished else (before, after)):
                    wrong.append(f"{where}: {found!r} where {before!r} became {after!r}, finished={finished}")
                    continue
                FileStore(folder, rebooted).commit(IDENTITY, b"further")
                if any(payload_of(FileStore(folder, type(disk)(t))) != b"further" for t in rebooted.aftermaths()):
                    wrong.append(f"{where}: a further commit was not durable")
            if finished:
                break
        action(FileStore(folder, disk))
        disk = disk.copy()
    return states, wrong


def sweep_killed(
    folder: str, disk: SimulatedDisk, steps: Steps, second: tuple[str, Action, bytes | None]
) -> tuple[int, list[str]]:
    """Kills each of `steps` at every system call, which leaves the cache, then cuts `second` of the next process."""
    states = 0
    wrong = []
    for number, (name, action, after) in enumerate(steps):
        before = payload_of(FileStore(folder, disk.copy()))
        kill = 0
        while True:
            kill += 1
            killed = disk.copy(kill)
            try:
                action(FileStore(folder, killed))
                break
            except PowerCut:
                pass
            cut = 0
            finished = False
            while not finished:
                cut += 1
                one = killed.copy(cut)
                try:
                    second[1](FileStore(folder, one))
                    finished = True
                except PowerCut:
                    pass
                allowed = (second[2],) if finished else (before, after, second[2])
                for left, tree in enumerate(one.aftermaths()):
                    states += 1
                    found = payload_of(FileStore(folder, type(disk)(tree)))
                    if found not in allowed:
                        wrong.append(f"step={number} ({name}) kill={kill} cut={cut} left={left}: {found!r}")
        action(FileStore(folder, disk))
        disk = disk.copy()
    return states, wrong


def test_a_cut_at_any_system_call_leaves_the_old_record_or_the_new_one() -> None:
    states, wrong = sweep(FOLDER, SimulatedDisk(), LIFE)
    assert not wrong, wrong[0]
    assert states > 400, states


def test_a_cut_while_nested_folders_are_made_loses_no_finished_commit() -> None:
    states, wrong = sweep(NESTED, SimulatedDisk(), LIFE[:2])
    assert not wrong, wrong[0]
    assert states > 150, states


def test_a_kill_followed_by_a_cut_of_the_next_commit_loses_nothing() -> None:
    states, wrong = sweep_killed(FOLDER, SimulatedDisk(), LIFE[:4], committing(b"second process"))
    assert not wrong, wrong[0]
    assert states > 5000, states


def test_a_kill_followed_by_a_cut_of_the_next_reset_brings_nothing_back() -> None:
    states, wrong = sweep_killed(FOLDER, SimulatedDisk(), LIFE[:4], ERASING)
    assert not wrong, wrong[0]
    assert states > 5000, states


class LyingDisk(SimulatedDisk):
    """fsync does nothing."""

    def fsync(self, fd: int) -> None:
        pass


class DiskWithoutFolderSync(SimulatedDisk):
    """fsync of a folder does nothing."""

    def fsync(self, fd: int) -> None:
        if not self._inode(fd).is_folder:
            super().fsync(fd)


class SyncsOnlyWhatItWrote(files.FileSlots):
    """Trusts what another process left in the cache."""

    def read(self, slot: int) -> bytes:
        content = super().read(slot)
        self._unsynced.discard(slot)
        return content


@pytest.mark.parametrize("faulty", [LyingDisk, DiskWithoutFolderSync])
def test_the_sweep_catches_a_missing_sync(faulty: type[SimulatedDisk]) -> None:
    _, wrong = sweep(FOLDER, faulty(), LIFE[:3])
    assert wrong


def test_the_sweep_catches_trust_in_another_process_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "FileSlots", SyncsOnlyWhatItWrote)
    _, wrong = sweep_killed(FOLDER, SimulatedDisk(), LIFE[:3], committing(b"second process"))
    assert wrong


def disk_with(*payloads: bytes) -> SimulatedDisk:
    disk = SimulatedDisk()
    for payload in payloads:
        FileStore(FOLDER, disk).commit(IDENTITY, payload)
    return disk.copy()


def spent_by(action: Action, disk: SimulatedDisk) -> dict[str, int]:
    disk.counts.clear()
    action(FileStore(FOLDER, disk))
    return {name: disk.counts.get(name, 0) for name in ("mkdir", "pwrite", "fsync")}


def test_what_a_commit_costs() -> None:
    disk = SimulatedDisk()
    # the folder's name, the file, the file's name
    assert spent_by(committing(b"hub A")[1], disk) == {"mkdir": 1, "pwrite": 1, "fsync": 3}
    # the current copy and the folder; the file, the file's name
    assert spent_by(committing(b"hub B")[1], disk) == {"mkdir": 0, "pwrite": 1, "fsync": 4}
    # both files and the folder; the file, the folder; an erase and a program
    assert spent_by(committing(b"hub C")[1], disk) == {"mkdir": 0, "pwrite": 2, "fsync": 5}
    assert spent_by(lambda store: store.load(IDENTITY), disk) == {"mkdir": 0, "pwrite": 0, "fsync": 0}


# Failing calls

ERRNOS = {
    errno.EIO: (RetryLater, "store.io"),
    errno.EMFILE: (RetryLater, "store.io"),
    errno.ENOSPC: (RetryLater, "store.full"),
    errno.EDQUOT: (RetryLater, "store.full"),
    errno.EROFS: (AskOperator, "store.read_only"),
    errno.EACCES: (AskOperator, "store.denied"),
    errno.EPERM: (AskOperator, "store.denied"),
    errno.ELOOP: (AskOperator, "store.denied"),
    errno.EISDIR: (AskOperator, "store.denied"),
    errno.ENOTDIR: (AskOperator, "store.denied"),
}


@pytest.mark.parametrize("number", ERRNOS, ids=errno.errorcode.get)
@pytest.mark.parametrize("payloads", [(), (b"older",), (b"older", b"old")], ids=["first", "second", "third"])
def test_each_failing_call_is_reported_and_the_old_record_stays_also_after_a_retry_and_a_cut(
    number: int, payloads: tuple[bytes, ...]
) -> None:
    old = payloads[-1] if payloads else None
    reported = 0
    call = 0
    while True:
        call += 1
        disk = disk_with(*payloads)
        disk.failing = (call, number)
        line = f"call={call} errno={errno.errorcode[number]}"
        try:
            FileStore(FOLDER, disk).commit(IDENTITY, b"new")
            if disk.calls < call:
                break
        except DpsError as error:
            reported += 1
            assert (type(error), error.code) == ERRNOS[number], f"{line}: {error.code} {error}"
            assert payload_of(FileStore(FOLDER, disk)) == old, line
        assert disk.open_descriptors() == 0, line
        cut = 0
        while cut <= disk.calls:
            cut += 1
            again = disk.copy(cut)
            try:
                FileStore(FOLDER, again).commit(IDENTITY, b"new")
                finished = True
            except PowerCut:
                finished = False
            for left, tree in enumerate(again.aftermaths()):
                found = payload_of(FileStore(FOLDER, SimulatedDisk(tree)))
                assert found in ((b"new",) if finished else (old, b"new")), f"{line} cut={cut} left={left}: {found!r}"
            if finished:
                break
    assert reported > 5, reported


@pytest.mark.parametrize("number", ERRNOS, ids=errno.errorcode.get)
def test_each_failing_call_of_load_and_erase_is_one_of_our_errors(number: int) -> None:
    for name, action in (("load", payload_of), ("erase", ERASING[1])):
        call = 0
        while True:
            call += 1
            disk = disk_with(b"older", b"old")
            disk.failing = (call, number)
            line = f"{name} call={call} errno={errno.errorcode[number]}"
            try:
                action(FileStore(FOLDER, disk))
            except DpsError as error:
                assert (type(error), error.code) == ERRNOS[number], f"{line}: {error.code} {error}"
            assert disk.open_descriptors() == 0, line
            assert payload_of(FileStore(FOLDER, disk.copy())) in (b"old", None), line
            if disk.calls < call:
                break


class ShortWrites(SimulatedDisk):
    """pwrite takes 100 bytes at most."""

    def pwrite(self, fd: int, content: bytes, offset: int) -> int:
        return super().pwrite(fd, content[:100], offset)


def test_a_pwrite_that_takes_less_is_continued() -> None:
    disk = ShortWrites()
    for payload in (b"x" * 1000, b"y" * 1001, b"z" * 999):
        FileStore(FOLDER, disk).commit(IDENTITY, payload)
        assert payload_of(FileStore(FOLDER, disk)) == payload


def test_a_folder_that_we_may_not_write_says_whose_it_is_and_what_to_run() -> None:
    disk = disk_with(b"old")
    disk.user, disk.owner_of_all = 4242, (4343, 4343)
    disk.failing = (1, errno.EACCES)
    with pytest.raises(AskOperator) as caught:
        FileStore(FOLDER, disk).load(IDENTITY)
    for part in (FOLDER, "user 4343", "this is 4242", "sudo -u '#4343' dps-agent", f"sudo chown -R 4242 {FOLDER}"):
        assert part in str(caught.value), part


def test_a_folder_that_we_may_not_make_says_how_to_make_it() -> None:
    disk = SimulatedDisk()
    disk.user, disk.owner_of_all = 4242, (0, 0)
    FileStore(FOLDER, disk.copy())
    for call in range(1, 20):
        one = disk.copy()
        one.failing = (call, errno.EACCES)
        with pytest.raises(AskOperator) as caught:
            FileStore(FOLDER, one).commit(IDENTITY, b"new")
        if "cannot create" in str(caught.value):
            assert f"sudo install -d -o 4242 -m 0700 {FOLDER}" in str(caught.value), caught.value
            assert "user root" in str(caught.value)
            return
    raise AssertionError("no call made the folder")


def test_a_parent_that_we_may_not_open_does_not_matter_where_the_folder_is_there() -> None:
    tree = {"/": None, "/var": None, "/var/lib": None, FOLDER: None}
    calls = 0
    for call in range(1, 30):
        disk = SimulatedDisk(dict(tree))
        disk.failing = (call, errno.EACCES)
        try:
            FileStore(FOLDER, disk).commit(IDENTITY, b"new")
            calls += disk.calls >= call
        except AskOperator:
            pass
    assert calls >= 1, "the open of /var/lib was not forgiven"


def test_files_that_root_makes_get_the_folders_owner() -> None:
    disk = SimulatedDisk()
    disk.user, disk.owner_of_all = 0, (4343, 4344)
    FileStore(FOLDER, disk).commit(IDENTITY, b"new")
    assert disk.chowned == [(f"{FOLDER}/lock", 4343, 4344), (f"{FOLDER}/identity.0", 4343, 4344)]


# A real folder


def test_loading_makes_no_folder(tmp_path: Path) -> None:
    assert FileStore(str(tmp_path / "state")).load(IDENTITY) is None
    FileStore(str(tmp_path / "state")).erase(IDENTITY)
    assert list(tmp_path.iterdir()) == []


def test_folder_and_files_are_the_owners_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        store = FileStore(str(tmp_path / "a" / "b"))
        store.commit(IDENTITY, b"one")
        store.commit(IDENTITY, b"two")
        store.commit(PROGRESS, b"three")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "a" / "b").stat().st_mode) == 0o700
    names = sorted(path.name for path in (tmp_path / "a" / "b").iterdir())
    assert names == ["identity.0", "identity.1", "lock", "progress.0"]
    for name in names:
        assert stat.S_IMODE((tmp_path / "a" / "b" / name).stat().st_mode) == 0o600, name


@pytest.mark.parametrize("name", ["identity.0", "lock"])
def test_a_symbolic_link_under_a_files_name_is_refused(name: str, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"untouched")
    state = tmp_path / "state"
    state.mkdir()
    (state / name).symlink_to(victim)
    with pytest.raises(AskOperator, match="no regular file") as caught:
        FileStore(str(state)).commit(IDENTITY, b"new")
    assert caught.value.code == "store.denied" and name in str(caught.value)
    assert victim.read_bytes() == b"untouched"


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_a_fifo_or_folder_under_a_files_name_is_refused_at_once(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "identity.0")
    for action in (payload_of, committing(b"new")[1]):
        with pytest.raises(AskOperator, match="no regular file"):
            action(FileStore(str(tmp_path)))


def test_the_folder_itself_may_be_a_symbolic_link(tmp_path: Path) -> None:
    (tmp_path / "private").mkdir()
    (tmp_path / "state").symlink_to(tmp_path / "private")
    FileStore(str(tmp_path / "state")).commit(IDENTITY, b"new")
    assert (tmp_path / "private" / "identity.0").exists()


def test_a_file_where_the_folder_should_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "state").write_bytes(b"")
    with pytest.raises(AskOperator, match="state_dir"):
        FileStore(str(tmp_path / "state")).commit(IDENTITY, b"new")


HOLDS_THE_LOCK = "import fcntl, sys; f = open(sys.argv[1]); fcntl.flock(f, fcntl.LOCK_EX); print('held'); input()"


def test_a_second_writer_is_told_and_a_reader_is_not_held_up(tmp_path: Path) -> None:
    store = FileStore(str(tmp_path))
    store.commit(IDENTITY, b"old")
    with subprocess.Popen(
        [sys.executable, "-c", HOLDS_THE_LOCK, str(tmp_path / "lock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        for action in (committing(b"new")[1], ERASING[1], lambda store: store.forget_older(IDENTITY)):
            with pytest.raises(RetryLater) as caught:
                action(store)
            assert caught.value.code == "store.locked" and str(tmp_path) in str(caught.value)
        assert payload_of(store) == b"old"
        other.communicate("\n", timeout=10)
    store.commit(IDENTITY, b"new")
    assert payload_of(store) == b"new"


def test_a_reset_leaves_nothing_of_the_record_in_the_files(tmp_path: Path) -> None:
    store = FileStore(str(tmp_path))
    store.commit(IDENTITY, b"secret hub A")
    store.commit(IDENTITY, b"secret hub B" * 200)
    store.erase(IDENTITY)
    for slot in (0, 1):
        assert set((tmp_path / f"identity.{slot}").read_bytes()) == {0xFF}, slot


def test_a_file_has_its_whole_room_from_its_first_record_on(tmp_path: Path) -> None:
    store = FileStore(str(tmp_path))
    for payload in (b"x", b"y", b"z" * store.max_payload):
        store.commit(IDENTITY, payload)
        assert {path.stat().st_size for path in tmp_path.glob("identity.*")} == {4096}


class FullDisk(SimulatedDisk):
    """Files can be made, but there is no room in them."""

    def pwrite(self, fd: int, content: bytes, offset: int) -> int:
        self.counts["pwrite"] = self.counts.get("pwrite", 0) + 1
        raise OSError(errno.ENOSPC, "full")


def test_a_first_commit_to_a_full_disk_does_not_try_to_erase_what_it_could_not_write() -> None:
    disk = FullDisk()
    with pytest.raises(RetryLater) as caught:
        FileStore(FOLDER, disk).commit(IDENTITY, b"new")
    assert caught.value.code == "store.full"
    assert disk.counts["pwrite"] == 1
    assert payload_of(FileStore(FOLDER, disk)) is None


def test_no_descriptor_stays_open(tmp_path: Path) -> None:
    before = set(os.listdir("/proc/self/fd"))
    store = FileStore(str(tmp_path / "state"))
    for number in range(3):
        store.commit(IDENTITY, b"hub %d" % number)
        store.load(IDENTITY)
    store.forget_older(IDENTITY)
    store.erase(IDENTITY)
    assert set(os.listdir("/proc/self/fd")) == before


def test_garbage_files_of_any_length_are_none_and_the_next_commit_works(tmp_path: Path) -> None:
    for length in (0, 1, 23, 24, 4095, 4096, 5000):
        for slot in (0, 1):
            (tmp_path / f"identity.{slot}").write_bytes(bytes(length))
        store = FileStore(str(tmp_path))
        assert store.load(IDENTITY) is None
        store.commit(IDENTITY, b"new")
        assert payload_of(store) == b"new", length
