"""The file store: its contract on a real folder, power cuts and kills at every system call, and every failing call."""

import contextlib
import copy
import errno
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from contracts.store import RULES
from dps_agent.effects import Commit, LoadRecord
from dps_agent.lifecycle import PROVISIONED, WAITING, Lifecycle
from dps_hal.contracts import IDENTITY, PROGRESS
from dps_hal.errors import AskOperator, DpsError, RetryLater
from dps_hal.host.files import FileStore, Mark, SystemCalls
from dps_hal.store.slots import decode_slot, encode_slot
from support.disk import disk_cuts
from support.disk.flash import UNREADABLE, PowerCut
from support.disk.posix_disk import SimulatedDisk
from support.world import World
from support.world import settings as world_settings

FOLDER = "/var/lib/dps-agent"
Action = Callable[[FileStore], None]
Rule = Callable[[Callable[[], FileStore]], None]


def payload_of(store: FileStore) -> bytes | None:
    found = store.load(IDENTITY)
    return found.payload or None if found is not None else None  # empty: no copy is whole


@cache
def payload_left(tree: tuple[tuple[str, bytes | None], ...]) -> bytes | None:
    """What a new process loads where a cut has left this; the long sweeps come to the same tree again and again."""
    return payload_of(FileStore(FOLDER, SimulatedDisk(dict(tree))))


def committing(payload: bytes) -> Action:
    return lambda store: store.commit(IDENTITY, payload)


def erasing(store: FileStore) -> None:
    store.erase(IDENTITY)


def forgetting(store: FileStore) -> None:
    store.forget_older(IDENTITY)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_store_contract_holds_on_a_real_folder(rule: Rule, tmp_path: Path) -> None:
    rule(lambda: FileStore(str(tmp_path / "state")))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_store_contract_holds_on_the_simulated_disk(rule: Rule) -> None:
    disk = SimulatedDisk()
    rule(lambda: FileStore(FOLDER, disk))
    assert disk.open_descriptors() == 0


# Power cuts: `tools/powercut --sweep disk` makes them, with writers of other faults.


@pytest.mark.parametrize("ended", [disk_cuts.LOST, disk_cuts.FAILED])
def test_the_sweep_catches_trust_in_what_could_not_be_written(ended: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_cuts, "PLANS", [plan for plan in disk_cuts.PLANS if plan.ended == ended])
    _, lost = disk_cuts.sweep("believes-its-eyes", at_first=True)
    assert lost and f"plan={ended}-then-commit" in lost[0], lost


def test_a_reset_whose_sync_fails_costs_no_later_identity() -> None:
    for number in range(1, 20):
        disk = disk_with(b"hub A")
        disk.failing_syncs = (number,)
        try:
            erasing(FileStore(FOLDER, disk))
        except DpsError as error:
            assert error.code == "store.io"
        else:
            assert number == 6, "two for the copy that stays; its tombstone, the older copy, the tombstone again"
            return
        FileStore(FOLDER, disk).commit(IDENTITY, b"hub B")
        for left in disk.aftermaths(focus=IDENTITY):
            assert payload_of(FileStore(FOLDER, SimulatedDisk(left))) == b"hub B", f"fsync {number} of the reset failed"
    raise AssertionError("a reset does not end")


def test_forgetting_whose_sync_failed_is_made_sure_of_by_the_next_call() -> None:
    for number in range(1, 20):
        disk = disk_with(b"hub A", b"hub B")
        disk.failing_syncs = (number,)
        try:
            FileStore(FOLDER, disk).forget_older(IDENTITY)
        except DpsError as error:
            assert error.code == "store.io"
        else:
            assert number == 4, "two for the copy that stays, one for the one that goes"
            return
        for left in disk.certain():
            FileStore(FOLDER, left).forget_older(IDENTITY)
            for tree in left.aftermaths(focus=IDENTITY):
                assert payload_of(FileStore(FOLDER, SimulatedDisk(tree))) == b"hub B", f"fsync {number} failed"
                assert not any(b"hub A" in (content or b"") for content in tree.values()), f"fsync {number} failed"
    raise AssertionError("forgetting does not end")


def test_a_cut_that_leaves_garbage_in_the_sector_under_way_loses_no_lone_copy() -> None:
    for action in (committing(b"hub C"), lambda store: store.forget_older(IDENTITY)):
        for payloads in ((b"hub A", b"hub B"), (b"hub B",)):
            start = disk_with(*payloads)
            FileStore(FOLDER, start).forget_older(IDENTITY)
            for cut in range(1, 20):
                disk = start.copy(cut)
                with contextlib.suppress(PowerCut):
                    action(FileStore(FOLDER, disk))
                for tree in disk.aftermaths(focus=IDENTITY):
                    assert payload_of(FileStore(FOLDER, SimulatedDisk(tree))) in (b"hub B", b"hub C"), f"cut={cut}"


def test_a_commit_writes_to_the_file_of_the_copy_that_stays_in_no_case(tmp_path: Path) -> None:
    written = set()

    class Recording(SystemCalls):
        def pwrite(self, fd: int, content: bytes, offset: int) -> int:
            written.add(os.path.basename(os.readlink(f"/proc/self/fd/{fd}")))
            return super().pwrite(fd, content, offset)

    for put_back in (encode_slot(7, b"hub A"), encode_slot(7, b"hub A").ljust(4096, b"\xff")):
        (tmp_path / "identity.1").write_bytes(put_back)
        (tmp_path / "identity.0").write_bytes(b"")
        written.clear()
        store = FileStore(str(tmp_path), Recording())
        store.forget_older(IDENTITY)
        store.commit(IDENTITY, b"hub B")
        assert "identity.1" not in written and "identity.0" in written, len(put_back)
        assert payload_of(store) == b"hub B"


def test_a_copy_that_a_cache_alone_had_is_not_believed_and_the_one_on_the_disk_stays() -> None:
    start = disk_with(b"hub A")
    for cut in range(1, 20):
        disk = start.copy(cut)
        with contextlib.suppress(PowerCut):
            FileStore(FOLDER, disk).commit(IDENTITY, b"hub B")
            assert cut > 4
            return
        disk.forget()
        for left in disk.certain():
            after = left.copy()
            FileStore(FOLDER, after).commit(IDENTITY, b"hub C")
            assert payload_of(FileStore(FOLDER, after.copy())) == b"hub C"
            for again in range(1, 10):
                one = left.copy(again)
                with contextlib.suppress(PowerCut):
                    FileStore(FOLDER, one).commit(IDENTITY, b"hub C")
                found = {payload_of(FileStore(FOLDER, SimulatedDisk(tree))) for tree in one.aftermaths(focus=IDENTITY)}
                assert found <= {b"hub A", b"hub B", b"hub C"}, f"cut={cut} cut={again}: {found}"
    raise AssertionError("a commit does not end")


def test_a_cache_that_can_not_be_dropped_does_not_stop_a_commit(tmp_path: Path) -> None:
    class Without(SystemCalls):
        def drop_cache(self, fd: int) -> None:
            raise OSError(errno.ENOSYS, "a kernel without it")

    store = FileStore(str(tmp_path), Without())
    for payload in (b"hub A", b"hub B"):
        store.commit(IDENTITY, payload)
        assert payload_of(FileStore(str(tmp_path))) == payload


# What cannot be read


def with_an_unreadable(slot: int, *payloads: bytes) -> SimulatedDisk:
    """A disk after a cut that left the first sector of one file of the identity so."""
    (tree,) = disk_with(*payloads).aftermaths()
    path = f"{FOLDER}/{IDENTITY}.{slot}"
    tree[path] = UNREADABLE + (tree[path] or b"")[len(UNREADABLE) :]
    return SimulatedDisk(tree)


@pytest.mark.parametrize("slot", [0, 1])
def test_a_file_that_cannot_be_read_is_a_damaged_copy_and_the_next_commit_heals_it(slot: int) -> None:
    whole = (b"hub A", b"hub B")[1 - slot]
    disk = with_an_unreadable(slot, b"hub A", b"hub B")
    found = FileStore(FOLDER, disk).load(IDENTITY)
    assert found is not None and found.payload == whole and found.rolled_back
    FileStore(FOLDER, disk).commit(IDENTITY, b"hub C")
    found = FileStore(FOLDER, disk.copy()).load(IDENTITY)
    assert found is not None and found.payload == b"hub C" and not found.rolled_back
    (tree,) = disk.aftermaths()
    assert decode_slot(tree[f"{FOLDER}/{IDENTITY}.{1 - slot}"] or b"", 0xFF).payload == whole, "the other one went"


@pytest.mark.parametrize("slot", [0, 1])
def test_a_reset_goes_over_a_file_that_cannot_be_read_and_forgetting_leaves_it_alone(slot: int) -> None:
    disk = with_an_unreadable(slot, b"hub A", b"hub B")
    erasing(FileStore(FOLDER, disk))
    (tree,) = disk.aftermaths()
    assert payload_of(FileStore(FOLDER, SimulatedDisk(tree))) is None
    assert set(tree[f"{FOLDER}/{IDENTITY}.{slot}"] or b"") == {0xFF}
    disk = with_an_unreadable(slot, b"hub A", b"hub B")
    (before,) = disk.aftermaths()
    with pytest.raises(RetryLater, match="one of its two copies cannot be read"):
        forgetting(FileStore(FOLDER, disk))
    assert all(tree == before for tree in disk.aftermaths())


def test_two_files_that_cannot_be_read_are_an_error_that_says_so_and_a_reset_goes_on() -> None:
    (tree,) = with_an_unreadable(0, b"hub A", b"hub B").aftermaths()
    tree[f"{FOLDER}/{IDENTITY}.1"] = UNREADABLE * 8
    for action in (payload_of, committing(b"hub C"), forgetting):
        disk = SimulatedDisk(tree)
        with pytest.raises(RetryLater, match="neither of its two copies can be read") as caught:
            action(FileStore(FOLDER, disk))
        assert caught.value.code == "store.io" and disk.counts.get("pwrite", 0) == 0
    disk = SimulatedDisk(tree)
    erasing(FileStore(FOLDER, disk))
    for left in disk.aftermaths():
        assert FileStore(FOLDER, SimulatedDisk(left)).load(IDENTITY) is None
        FileStore(FOLDER, SimulatedDisk(left)).commit(IDENTITY, b"hub C")


class FailsToRead(SystemCalls):
    """Real files, of which one cannot be opened or read, so many times."""

    def __init__(self, name: str, number: int, times: int) -> None:
        self.name, self.number, self.times = name, number, times

    def pread(self, fd: int, count: int, offset: int) -> bytes:
        if os.readlink(f"/proc/self/fd/{fd}").endswith(self.name) and self.times:
            self.times -= 1
            raise OSError(self.number, os.strerror(self.number))
        return super().pread(fd, count, offset)


@pytest.mark.parametrize("number", [errno.EIO, errno.ENODATA, errno.EBADMSG, errno.EUCLEAN], ids=errno.errorcode.get)
def test_a_newer_copy_that_a_cable_hides_for_a_moment_is_read_again_and_is_not_written_over(
    number: int, tmp_path: Path
) -> None:
    for payload in (b"hub A", b"hub B"):
        FileStore(str(tmp_path)).commit(IDENTITY, payload)
    for times in (1, 2):
        found = FileStore(str(tmp_path), FailsToRead("identity.1", number, times)).load(IDENTITY)
        assert found is not None and found.payload == b"hub B" and not found.rolled_back, times
    store = FileStore(str(tmp_path), calls := FailsToRead("identity.1", number, 3))
    found = store.load(IDENTITY)
    assert found is not None and found.payload == b"hub A" and found.rolled_back and calls.times == 0
    store.commit(IDENTITY, b"hub C")  # the cable is back: the newer copy counts again, and the older one goes
    assert decode_slot((tmp_path / "identity.1").read_bytes(), 0xFF).payload == b"hub B"
    found = FileStore(str(tmp_path)).load(IDENTITY)
    assert found is not None and found.payload == b"hub C" and found.generation == 3


def test_what_says_nothing_of_the_medium_is_an_error_and_no_damage(tmp_path: Path) -> None:
    FileStore(str(tmp_path)).commit(IDENTITY, b"hub A")
    with pytest.raises(RetryLater) as caught:
        FileStore(str(tmp_path), FailsToRead("identity.0", errno.ENOMEM, 9)).load(IDENTITY)
    assert caught.value.code == "store.io"


def test_a_short_file_that_cannot_be_read_is_left_until_its_turn_and_then_made_whole() -> None:
    for slot in (0, 1):
        (tree,) = disk_with(b"hub A", b"hub B").aftermaths()
        tree[f"{FOLDER}/{IDENTITY}.{slot}"] = UNREADABLE
        disk = SimulatedDisk(tree)
        FileStore(FOLDER, disk).commit(PROGRESS, b"trying")
        (tree,) = disk.aftermaths()
        assert tree[f"{FOLDER}/{IDENTITY}.{slot}"] == UNREADABLE
        FileStore(FOLDER, disk).commit(IDENTITY, b"hub C")
        (tree,) = disk.aftermaths()
        assert len(tree[f"{FOLDER}/{IDENTITY}.{slot}"] or b"") == 4096
        assert payload_of(FileStore(FOLDER, SimulatedDisk(tree))) == b"hub C"


# What others did to the files of a process that goes on


class StandingClock(SimulatedDisk):
    """No change of a file shows in its times, as where one follows another within a tick."""

    def mark(self, place: int | str) -> Mark:
        device, number, _ = super().mark(place)
        return device, number, 0


def test_what_another_process_erased_is_not_known_to_be_erased_on_the_disk() -> None:
    for action in (committing(b"hub C"), erasing, forgetting):
        for kill in range(1, 20):
            disk = StandingClock()
            store = FileStore(FOLDER, disk)
            store.commit(PROGRESS, b"trying")
            if action is forgetting:
                store.commit(IDENTITY, b"hub A")
                store.forget_older(IDENTITY)
            FileStore(FOLDER, disk).commit(IDENTITY, b"hub B")
            disk.count_anew(kill)
            finished = False
            with contextlib.suppress(PowerCut):
                (forgetting if action is forgetting else erasing)(FileStore(FOLDER, disk))
                finished = True
            disk.forget()
            disk.count_anew()
            expected = payload_of(store)
            if expected is not None and action is not forgetting and not finished:
                continue  # that process did not come to erase the record
            action(store)
            for left in disk.certain():
                for tree in left.aftermaths(focus=IDENTITY):
                    found = payload_of(FileStore(FOLDER, SimulatedDisk(tree)))
                    assert found == {committing: b"hub C", erasing: None}.get(action, payload_of(store)), f"kill={kill}"
                    copies = [path for path, content in tree.items() if b"hub" in (content or b"")]
                    assert len(copies) <= 1, f"kill={kill}: {copies}"
            if finished:
                break


def test_where_the_folder_was_replaced_nothing_is_known_and_its_own_name_is_synced(tmp_path: Path) -> None:
    synced: list[str] = []

    class Recording(SystemCalls):
        def fsync(self, fd: int) -> None:
            synced.append(os.path.basename(os.readlink(f"/proc/self/fd/{fd}")))
            super().fsync(fd)

    folder = tmp_path / "state"
    store = FileStore(str(folder), Recording())
    for payload in (b"hub A", b"hub B"):
        store.commit(IDENTITY, payload)
    synced.clear()
    store.commit(IDENTITY, b"hub C")
    assert synced == ["identity.0"], "nothing was done to it"
    folder.rename(tmp_path / "old")
    shutil.copytree(tmp_path / "old", folder)
    synced.clear()
    store.commit(IDENTITY, b"hub D")
    assert sorted(synced) == sorted(["identity.0", tmp_path.name, "state", "identity.1"]), (
        "the copy that stays, the names"
    )
    synced.clear()
    store.commit(IDENTITY, b"hub E")
    assert synced == ["identity.0"]
    (folder / "identity.1").unlink()  # what was the copy that stays
    store.commit(IDENTITY, b"hub F")
    assert "state" in synced, "a name was made"


def disk_with(*payloads: bytes) -> SimulatedDisk:
    disk = SimulatedDisk()
    for payload in payloads:
        FileStore(FOLDER, disk).commit(IDENTITY, payload)
    return disk.copy()


def spent_by(action: Action, disk: SimulatedDisk, store: FileStore | None = None) -> dict[str, int]:
    disk.counts.clear()
    action(store or FileStore(FOLDER, disk))
    return {name: disk.counts.get(name, 0) for name in ("mkdir", "pwrite", "fsync")}


def test_what_a_commit_costs() -> None:
    disk = SimulatedDisk()
    # the folder's name; room for two records; the file and the names of all
    assert spent_by(committing(b"hub A"), disk) == {"mkdir": 1, "pwrite": 6, "fsync": 7}
    # the file that stays and the folder; the file; an erase and a program
    for payload in (b"hub B", b"hub C"):
        assert spent_by(committing(payload), disk) == {"mkdir": 0, "pwrite": 2, "fsync": 3}
    assert spent_by(lambda store: store.load(IDENTITY), disk) == {"mkdir": 0, "pwrite": 0, "fsync": 0}


def test_a_process_syncs_again_only_what_it_has_not_made_durable_itself() -> None:
    disk = disk_with(b"hub A", b"hub B")
    FileStore(FOLDER, disk).commit(PROGRESS, b"calm")
    store = FileStore(FOLDER, disk)
    # one process: the first record's file that stays, the folder, the file; the other record's two files; then one each
    actions = [committing(b"hub C"), lambda store: store.commit(PROGRESS, b"trying"), committing(b"hub D")]
    assert [spent_by(action, disk, store)["fsync"] for action in actions] == [3, 2, 1]
    FileStore(FOLDER, disk).commit(IDENTITY, b"hub E")
    assert spent_by(committing(b"hub F"), disk, store)["fsync"] == 2, "of another process's copy nothing is known"
    assert spent_by(committing(b"hub G"), disk, store)["fsync"] == 1
    assert spent_by(erasing, disk, store)["fsync"] == 3, "a tombstone, the older copy, the tombstone"
    assert spent_by(erasing, disk, store)["fsync"] == 2, "what shows as erased may be another process's, and not be so"


def test_after_a_sync_that_failed_a_process_asks_the_disk_for_everything_again() -> None:
    disk = disk_with(b"hub A", b"hub B")
    store = FileStore(FOLDER, disk)
    store.commit(IDENTITY, b"hub C")
    disk.failing_syncs = (disk.counts["fsync"] + 1,)
    with pytest.raises(RetryLater):
        store.commit(PROGRESS, b"trying")
    disk.failing_syncs = ()
    # what stays and the file; the folder was asked for when the failed copy was withdrawn
    assert spent_by(committing(b"hub D"), disk, store)["fsync"] == 2
    assert payload_of(FileStore(FOLDER, disk.copy())) == b"hub D"


def test_a_registration_that_is_forced_syncs_six_times() -> None:
    disk = SimulatedDisk()
    WorldOnFiles(FileStore(FOLDER, disk)).run(Lifecycle(world_settings()).live(True, False))
    disk.counts.clear()
    world = WorldOnFiles(FileStore(FOLDER, disk))
    life = Lifecycle(world_settings())
    world.run(life.live(True, True))
    assert life.committed
    # progress: what stays, the folder, the file; identity: what stays, the file; progress: the file
    assert disk.counts["fsync"] == 6, disk.counts


def starts(payloads: tuple[bytes, ...], same_process: bool) -> list[tuple[SimulatedDisk, FileStore, set[bytes | None]]]:
    """Disks with a process on each, and what may be loaded: the one that committed all, or the next of a killed one."""
    found: list[tuple[SimulatedDisk, FileStore, set[bytes | None]]] = []
    for number, payload in enumerate(payloads if not same_process else ()):
        before = disk_with(*payloads[:number])
        for kill in range(1, 20):
            disk = before.copy(kill)
            with contextlib.suppress(PowerCut):
                FileStore(FOLDER, disk).commit(IDENTITY, payload)
                break
            left = disk.copy()
            found.append((left, FileStore(FOLDER, left), {payload, payloads[number - 1] if number else None}))
    disk = SimulatedDisk()
    store = FileStore(FOLDER, disk)
    for payload in payloads:
        store.commit(IDENTITY, payload)
    found.append((disk, store if same_process else FileStore(FOLDER, disk), {payload_of(store)}))
    return found


def lost_without(number: int, payloads: tuple[bytes, ...], same_process: bool, action: Action) -> str:
    """What a power cut loses, or brings back, where `action` goes without its sync of this number; "" for nothing."""
    for start, process, may_be in starts(payloads, same_process):
        finished = False
        cut = 0
        while not finished:
            cut += 1
            disk, store = copy.deepcopy((start, process))
            disk.count_anew(cut)
            disk.missing_syncs = (number,)
            with contextlib.suppress(PowerCut):
                action(store)
                finished = True
            after = payload_of(store)
            for tree in disk.aftermaths(focus=IDENTITY):
                found = payload_left(tuple(tree.items()))
                if found not in ({after} if finished else {*may_be, after}):
                    return f"cut={cut}: {found!r} where {after!r} was to be"
                left = b"".join(content or b"" for content in tree.values())
                if finished and action is erasing and left.strip(b"\xff"):
                    return f"cut={cut}: something of the record is still there"
                if finished and action is forgetting and b"hub" in left.replace(after or b"-", b""):
                    return f"cut={cut}: an older copy is still there"
    return ""


LIVED = (b"hub A", b"hub B", b"hub C")
ROOM = (2, 3, 4, 5)  # syncs of a folder's first commit that reserve blocks: no record is lost without them
NAMES = (2,)  # that of the folder, in a process's first reset: what is erased may lose its name


@pytest.mark.parametrize(
    ("payloads", "same_process", "action", "spares"),
    [
        ((), False, committing(b"hub D"), ROOM),
        (LIVED, False, committing(b"hub D"), ()),
        (LIVED, True, committing(b"hub D"), ()),
        (LIVED, False, erasing, NAMES),
        (LIVED, True, erasing, ()),
        (LIVED, False, forgetting, ()),
        (LIVED, True, forgetting, ()),
    ],
    ids=["first commit", "commit", "later commit", "reset", "later reset", "forgetting", "later forgetting"],
)
def test_no_sync_can_be_left_out(
    payloads: tuple[bytes, ...], same_process: bool, action: Action, spares: tuple[int, ...]
) -> None:
    disk, store, _ = starts(payloads, same_process)[-1]
    syncs = spent_by(action, disk, store)["fsync"]
    assert lost_without(0, payloads, same_process, action) == ""
    for number in range(1, syncs + 1):
        lost = lost_without(number, payloads, same_process, action)
        assert bool(lost) == (number not in spares), f"sync {number} of {syncs}: {lost}"


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
            for left, tree in enumerate(again.aftermaths(focus=IDENTITY)):
                found = payload_left(tuple(tree.items()))
                assert found in ((b"new",) if finished else (old, b"new")), f"{line} cut={cut} left={left}: {found!r}"
            if finished:
                break
    assert reported > 5, reported


@pytest.mark.parametrize("number", ERRNOS, ids=errno.errorcode.get)
def test_each_failing_call_of_load_and_erase_is_one_of_our_errors(number: int) -> None:
    for name, action in (("load", payload_of), ("erase", erasing)):
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
    names = ["lock", "identity.0", "identity.1", "progress.0", "progress.1"]
    assert disk.chowned == [(f"{FOLDER}/{name}", 4343, 4344) for name in names]


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
    assert names == ["identity.0", "identity.1", "lock", "progress.0", "progress.1"]
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
    for action in (payload_of, committing(b"new")):
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
        for action in (committing(b"new"), erasing, lambda store: store.forget_older(IDENTITY)):
            with pytest.raises(RetryLater) as caught:
                action(store)
            assert caught.value.code == "store.locked" and str(tmp_path) in str(caught.value)
        assert payload_of(store) == b"old"
        other.communicate("\n", timeout=60)
    store.commit(IDENTITY, b"new")
    assert payload_of(store) == b"new"


COMMITS = """
import sys
from dps_hal.errors import RetryLater
from dps_hal.host.files import FileStore
store = FileStore(sys.argv[1])
done = locked = 0
print("ready", flush=True)
input()
while done < 40:
    try:
        with store.exclusive():
            found = store.load("identity")
            store.commit("identity", b"%d" % (1 if found is None else int(found.payload) + 1))
        done += 1
    except RetryLater as error:
        assert error.code == "store.locked", error
        locked += 1
print(locked)
"""


def test_two_processes_that_write_to_one_folder_lose_no_commit_of_each_other(tmp_path: Path) -> None:
    place = tmp_path / "state"
    with contextlib.ExitStack() as stack:
        writers = [
            stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", COMMITS, str(place)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                    env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
                )
            )
            for _ in range(2)
        ]
        for writer in writers:
            assert writer.stdout is not None and writer.stdout.readline() == "ready\n"
        for writer in writers:
            assert writer.stdin is not None
            writer.stdin.write("\n")
            writer.stdin.flush()
        seen = [0]
        while any(writer.poll() is None for writer in writers):
            found = payload_of(FileStore(str(place)))  # a reader beside them, without the lock
            if found is not None:
                seen.append(int(found))
        locked = [int(writer.communicate(timeout=120)[0]) for writer in writers]
    assert [writer.returncode for writer in writers] == [0, 0]
    stored = FileStore(str(place)).load(IDENTITY)
    assert stored is not None and stored.payload == b"80" and stored.generation == 80 and not stored.rolled_back
    assert sum(locked) > 0, "the two never met: the test shows nothing"
    assert set(seen) <= set(range(81)), seen


def test_a_reset_leaves_nothing_of_the_record_in_the_files(tmp_path: Path) -> None:
    store = FileStore(str(tmp_path))
    store.commit(IDENTITY, b"secret hub A")
    store.commit(IDENTITY, b"secret hub B" * 200)
    store.erase(IDENTITY)
    for slot in (0, 1):
        assert set((tmp_path / f"identity.{slot}").read_bytes()) == {0xFF}, slot


def sizes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in folder.iterdir() if path.name != "lock"}


def test_the_first_commit_makes_room_for_every_later_one(tmp_path: Path) -> None:
    whole = dict.fromkeys(("identity.0", "identity.1", "progress.0", "progress.1"), 4096)
    store = FileStore(str(tmp_path))
    store.commit(PROGRESS, b"attempt 1")
    assert sizes(tmp_path) == whole and store.load(IDENTITY) is None
    for payload in (b"x", b"y", b"z" * store.max_payload):
        store.commit(IDENTITY, payload)
        assert sizes(tmp_path) == whole


def test_making_room_changes_no_byte_that_is_there_and_no_file_with_a_whole_copy(tmp_path: Path) -> None:
    store = FileStore(str(tmp_path))
    short = encode_slot(7, b"hub A")
    (tmp_path / "identity.1").write_bytes(short)  # as where somebody put it back without what is erased behind it
    (tmp_path / "identity.0").write_bytes(b"")
    store.commit(PROGRESS, b"attempt 1")
    assert (tmp_path / "identity.1").read_bytes() == short
    assert (tmp_path / "identity.0").read_bytes() == b"\xff" * 4096
    assert payload_of(store) == b"hub A"
    (tmp_path / "identity.1").write_bytes(short[:-1])
    store.commit(PROGRESS, b"attempt 2")
    assert (tmp_path / "identity.1").read_bytes() == short[:-1] + b"\xff" * (4097 - len(short))


def test_a_disk_without_room_for_both_records_refuses_the_progress_and_one_with_room_takes_all() -> None:
    refused = 0
    for room_bytes in range(0, 4 * 4096 + 1, 1024):
        disk = SimulatedDisk()
        disk.room_bytes = room_bytes
        store = FileStore(FOLDER, disk)
        try:
            store.commit(PROGRESS, b"attempt 1")
        except RetryLater as error:
            refused += 1
            assert error.code == "store.full" and store.load(PROGRESS) is store.load(IDENTITY) is None, room_bytes
            disk.room_bytes = None
            store.commit(PROGRESS, b"attempt 1")
        disk.room_bytes = 0
        for payload in (b"hub A", b"hub B" * 700, b"hub C"):
            store.commit(IDENTITY, payload)
            assert payload_of(FileStore(FOLDER, disk)) == payload, room_bytes
        store.erase(IDENTITY)
        store.commit(IDENTITY, b"after the reset")
        assert payload_of(store) == b"after the reset"
    assert refused == 16


def test_dps_is_not_asked_where_the_disk_has_no_room_for_the_answer() -> None:
    disk = SimulatedDisk()
    disk.room_bytes = 4096  # progress alone would fit
    world = WorldOnFiles(FileStore(FOLDER, disk))
    life = Lifecycle(world_settings())
    world.run(life.live(True, False))
    assert life.state == WAITING and life.error is not None and life.error.code == "store.full"
    assert not world.dps.requests
    disk.room_bytes = None
    life = Lifecycle(world_settings())
    world.run(life.live(False, False))
    assert life.state == PROVISIONED and life.committed


def test_a_boot_without_a_registration_writes_nothing() -> None:
    disk = SimulatedDisk()
    world = WorldOnFiles(FileStore(FOLDER, disk))
    world.run(Lifecycle(world_settings()).live(False, False))
    disk.counts.clear()
    disk.changes = 0
    life = Lifecycle(world_settings())
    world.run(life.live(False, False))
    assert life.state == PROVISIONED and not life.committed
    assert disk.changes == 0 and "flock" not in disk.counts, disk.counts


class WorldOnFiles(World):
    """A world whose records are in a file store."""

    def __init__(self, store: FileStore) -> None:
        super().__init__()
        self.files = store

    def answer(self, effect: Any) -> Any:
        if isinstance(effect, LoadRecord):
            return self.files.load(effect.record)
        if isinstance(effect, Commit):
            return self.files.commit(effect.record, effect.payload)
        return super().answer(effect)


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


def test_garbage_files_of_any_length_hold_nothing_and_the_next_commit_works(tmp_path: Path) -> None:
    for length in (0, 1, 23, 24, 4095, 4096, 5000):
        for slot in (0, 1):
            (tmp_path / f"identity.{slot}").write_bytes(bytes(length))
        store = FileStore(str(tmp_path))
        assert payload_of(store) is None
        store.commit(IDENTITY, b"new")
        assert payload_of(store) == b"new", length
