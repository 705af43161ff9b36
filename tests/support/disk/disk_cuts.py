"""Cuts the power of a simulated Linux disk at every system call of the file store that changes something.

`support.disk.posix_disk` is the disk: it keeps no more than POSIX promises, so that it also tells what one file system
happens to forgive, such as a forgotten fsync of a folder. Five sweeps: a cut; a cut that left a file unreadable, then
another one in what follows; a process that is killed, which leaves the cache, then a cut in the next one; the same
where what the first one left could not be written; and a process whose fsync fails, or that one and the next, then a
cut in the next process. Each once more for a process that goes on: it lives all of a life, and its own fsync fails; or
another process commits, resets or forgets in between, or is killed at it; or somebody empties the folder, or puts a
copy in its place.

How many syncs each commit and reset makes is part of the sweep (`SYNCS`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from copy import deepcopy
from functools import partial
from itertools import count
from typing import Any, NamedTuple

from dps_hal.contracts import IDENTITY, PROGRESS
from dps_hal.errors import DpsError, RetryLater
from dps_hal.host.files import FileSlots, FileStore, StateFolder, SystemCalls
from dps_hal.store.slots import SlotStore
from support.disk.faulty_writers import (
    BelievesItsEyes,
    ErasesBothWithOneSync,
    InPlace,
    Naive,
    RenewsTheCurrentCopy,
    RenewsTheOtherFirst,
    SingleSlot,
    StopsAtTheUnreadable,
    TrustsTheCache,
)
from support.disk.flash import PowerCut, readable
from support.disk.posix_disk import SimulatedDisk, Tree

Writer = Callable[[str, SystemCalls], Any]

FOLDER = "/var/lib/dps-agent"
NESTED = "/var/lib/factory/dps-agent"
FORGET = b""  # a step of a life: `forget_older`
LIFE: tuple[bytes | None, ...] = (b"hub A", b"hub B" * 300, b"hub C", None, None, b"hub D")  # None: a reset
ANOTHERS = b"of another process"


class Plan(NamedTuple):
    """A life in `folder`; with `then` each step is ended by `ended`, and the next process's step `then` is cut.

    `goes_on`: one process lives this life, also what is cut. `ended` is then an fsync of its own that fails, or how
    another process ends that does one of `others` in between. What is done to the folder before that, `to_folder`
    names: a method of `SimulatedDisk`.
    """

    name: str
    folder: str
    life: tuple[bytes | None, ...]
    then: tuple[bytes | None, ...] = ()
    ended: str = ""
    goes_on: bool = False
    others: tuple[bytes | None, ...] = (ANOTHERS, None, FORGET)
    to_folder: str = ""


# By a cut that left a file unreadable; by a kill; by that, and its writes fail; by an fsync that fails.
UNREADABLE, KILLED, LOST, FAILED = "unreadable", "kill", "lose", "fail"
PLANS = (
    Plan("cut", FOLDER, LIFE),
    Plan("cut-in-new-folders", NESTED, LIFE[:2]),
    Plan("unreadable-then-commit", FOLDER, LIFE[:5], (b"second boot",), UNREADABLE),
    Plan("unreadable-then-reset", FOLDER, LIFE[:4], (None, FORGET), UNREADABLE),
    Plan("kill-in-an-emptied-folder", FOLDER, LIFE[:3], (b"same process",), KILLED, True, (ANOTHERS,), "empty"),
    Plan("kill-then-commit", FOLDER, LIFE[:4], (b"second process",), KILLED),
    Plan("kill-then-reset", FOLDER, LIFE[:4], (None,), KILLED),
    Plan("lose-then-commit", FOLDER, LIFE, (b"second process",), LOST),
    Plan("lose-then-reset", FOLDER, LIFE, (None,), LOST),
    Plan("fail-then-commit", FOLDER, LIFE, (b"second process",), FAILED),
    Plan("fail-then-reset", FOLDER, LIFE, (None,), FAILED),
    Plan("cut-in-one-process", FOLDER, (*LIFE, b"hub E", b"hub F"), goes_on=True),
    Plan("fail-and-go-on", FOLDER, LIFE[:3], (b"second try", None), FAILED, True),
    Plan("kill-of-another", FOLDER, LIFE[:3], (b"same process", None, FORGET), KILLED, True),
    Plan("loss-of-another", FOLDER, LIFE[:3], (b"same process", None, FORGET), LOST, True),
    Plan("replaced-folder", FOLDER, LIFE[:2], (b"same process",), KILLED, True, (), "replace"),
)
# fsyncs of one process by what it does: the first commit of a folder; then in the next process, of two records in turn:
# a commit of either, and again; then a reset of the first record, and of the second.
SYNCS = {"first commit": 7, "a process's first": 3, "of the other record": 2, "later": 1, "reset": 3, "first reset": 5}


class OnFiles:
    """A faulty slot store on the product's own files."""

    def __init__(self, faulty: type[SlotStore], folder: str, calls: SystemCalls) -> None:
        self._folder = StateFolder(folder, calls)
        self._store = faulty({record: FileSlots(self._folder, record) for record in (IDENTITY, PROGRESS)})

    def load(self, record: str) -> Any:
        """See `Store.load`."""
        return self._store.load(record)

    def commit(self, record: str, payload: bytes) -> None:
        """Makes the folder, then does as the faulty store."""
        self._folder.make()
        self._store.commit(record, payload)

    def erase(self, record: str) -> None:
        """See `Store.erase`."""
        if self._folder.exists():
            self._store.erase(record)

    def forget_older(self, record: str) -> None:
        """See `SlotStore.forget_older`."""
        self._store.forget_older(record)


class ForgetsTheFolder(FileStore):
    """The product, but no folder is ever synced: files are durable, their names are not."""

    def __init__(self, folder: str, calls: SystemCalls) -> None:
        super().__init__(folder, calls)
        self._folder.sync_folder = lambda path: None  # type: ignore[method-assign]


class KnowsNamesForEver(FileStore):
    """The product, but the folder is synced once by a process that makes no names in it, whatever others do there."""

    def __init__(self, folder: str, calls: SystemCalls) -> None:
        super().__init__(folder, calls)
        self._folder.sync_names = partial(_synced_if_new, self._folder)  # type: ignore[method-assign]


class TrustsOthersNames(KnowsNamesForEver):
    """The product, but the folder is synced only by a process that has made a name in it."""

    def __init__(self, folder: str, calls: SystemCalls) -> None:
        super().__init__(folder, calls)
        self._folder._names_durable = (0, 0, 0)


def _synced_if_new(folder: StateFolder) -> None:
    if folder._names_durable is None:
        StateFolder.sync_names(folder)


class ForgetsTheParent(FileStore):
    """The product, but the name of the folder itself is never made durable."""

    def __init__(self, folder: str, calls: SystemCalls) -> None:
        super().__init__(folder, calls)
        self._folder.sync_folder = partial(_synced_unless_above, self._folder)  # type: ignore[method-assign]


def _synced_unless_above(folder: StateFolder, path: str) -> None:
    if path == folder.path:
        StateFolder.sync_folder(folder, path)


class NeverSettles(FileStore):
    """The product, but the copy that stays is not synced, whoever wrote it."""

    def __init__(self, folder: str, calls: SystemCalls) -> None:
        super().__init__(folder, calls)
        for files in self._files.values():
            files.settle = lambda slot: None  # type: ignore[method-assign]


class KnowsFilesByName(FileStore):
    """The product, but what it has synced once it takes for durable, whatever is there by now."""

    def __init__(self, folder: str, calls: SystemCalls) -> None:
        super().__init__(folder, calls)
        for files in self._files.values():
            files._is_on_disk = partial(_has_synced, files)  # type: ignore[method-assign]


def _has_synced(files: FileSlots, slot: int, marked: Any) -> bool:
    return files._names[slot] in files._folder.on_disk


class KnowsFilesByContent(FileStore):
    """The product, but what it has synced once it takes for durable as long as it looks the same, erased or not."""

    def __init__(self, folder: str, calls: SystemCalls) -> None:
        super().__init__(folder, calls)
        self._folder.forget_what_anybody_writes = lambda: None  # type: ignore[method-assign]
        for files in self._files.values():
            files._is_on_disk = partial(_looks_as_synced, files)  # type: ignore[method-assign]


def _looks_as_synced(files: FileSlots, slot: int, marked: Any) -> bool:
    known = files._folder.on_disk.get(files._names[slot])
    return known is not None and known[1] == marked[1]


class SyncsEachFileOnce(FileStore):
    """The product, but a process that has synced a file does not do so again."""

    def __init__(self, folder: str, calls: SystemCalls) -> None:
        super().__init__(folder, calls)
        for files in self._files.values():
            files._sync_file = partial(_synced_once, files, set())  # type: ignore[method-assign]


def _synced_once(files: FileSlots, synced: set[int], slot: int) -> None:
    if slot not in synced:
        files._folder.calls.fsync(files._written[slot])
        synced.add(slot)


WRITERS: dict[str, Writer] = {
    "": FileStore,
    "naive": partial(OnFiles, Naive),
    "in-place": partial(OnFiles, InPlace),
    "single-slot": partial(OnFiles, SingleSlot),
    "no-directory-fsync": ForgetsTheFolder,
    "trusts-the-cache": partial(OnFiles, TrustsTheCache),
    "believes-its-eyes": partial(OnFiles, BelievesItsEyes),
    "renews-the-current": partial(OnFiles, RenewsTheCurrentCopy),
    "reset-with-one-sync": partial(OnFiles, ErasesBothWithOneSync),
    "trusts-others-names": TrustsOthersNames,
    "no-parent-fsync": ForgetsTheParent,
    "never-settles": NeverSettles,
    "knows-files-by-name": KnowsFilesByName,
    "knows-files-by-content": KnowsFilesByContent,
    "knows-names-for-ever": KnowsNamesForEver,
    "stops-at-the-unreadable": partial(OnFiles, StopsAtTheUnreadable),
    "renews-the-other-first": partial(OnFiles, RenewsTheOtherFirst),
    "syncs-each-file-once": SyncsEachFileOnce,
}

SHOWS_IN = {  # the plan in which a faulty writer is caught soonest, where the first ones let it pass
    "trusts-others-names": "kill-in-an-emptied-folder",
    "knows-names-for-ever": "kill-in-an-emptied-folder",
    "never-settles": "kill-then-commit",
    "knows-files-by-name": "kill-of-another",
    "knows-files-by-content": "kill-of-another",
}


def sweep(writer: str = "", only: str = "", at_first: bool = False) -> tuple[int, list[str]]:
    """Number of states, and the lost ones."""
    states = 0
    lost = [] if writer or only else wrong_counts()
    boots = Boots(WRITERS[writer])
    for plan in sorted(PLANS, key=lambda plan: plan.name != SHOWS_IN.get(writer)):
        cuts = (_going_on if plan.goes_on else _followed if plan.then else _cut)(plan, WRITERS[writer])
        seen: set[tuple[Any, ...]] = set()
        for name, disk, allowed, copies in cuts:
            if only and not only.startswith(name + " "):
                continue
            for left, tree in enumerate(disk.aftermaths(focus=IDENTITY)):
                where = f"{name} left={left}"
                looks = (allowed, copies, *tree.items())
                if looks in seen:
                    continue
                seen.add(looks)
                if only and where != only:
                    continue
                states += 1
                wrong = _fault(boots.of(plan.folder, tree), tree, allowed, copies)
                if wrong:
                    lost.append(f"{where}: {wrong}")
                    if at_first:
                        return states, lost
    return states, lost


Cut = tuple[str, SimulatedDisk, tuple[bytes | None, ...], int]
Disturbed = tuple[str, SimulatedDisk, Any, tuple[bytes | None, ...]]


def _cut(plan: Plan, writer: Writer) -> Iterator[Cut]:
    """Each moment of a cut: its name, the disk then, what may be loaded, and how many copies may be left."""
    disk = SimulatedDisk()
    before = None
    for step, after in enumerate(plan.life):
        for cut, one, finished in _moments(plan.folder, writer, disk, after):
            allowed = (after,) if finished else (before, after)
            yield f"sweep=disk plan={plan.name} step={step} cut={cut}", one, allowed, _copies(after, finished)
        disk = one.copy()  # the cut that came too late
        before = after


def _followed(plan: Plan, writer: Writer) -> Iterator[Cut]:
    """As `_cut`, of the step that the next process does after one was ended."""
    disk = SimulatedDisk()
    before = None
    for step, after in enumerate(plan.life):
        for ended, left in _ended(plan, writer, disk, after):
            for then in plan.then:
                for cut, one, finished in _moments(plan.folder, writer, left, then):
                    allowed = (before, after) if then == FORGET else (then,) if finished else (before, after, then)
                    name = f"sweep=disk plan={plan.name} step={step} {ended} then={_kind(then)} cut={cut}"
                    yield name, one, allowed, _copies(then, finished)
        disk = disk.copy()
        _did(writer(plan.folder, disk), after)
        before = after


def _going_on(plan: Plan, writer: Writer) -> Iterator[Cut]:
    """As `_followed`, but what is cut is done by the process that has lived so far."""
    disk = SimulatedDisk()
    store = writer(plan.folder, disk)
    before = None
    for step, after in enumerate(plan.life):
        for wrong, left, process, may_be in _disturbed(plan, writer, disk, store, before, after):
            for then in plan.then or (after,):
                finished = False
                cut = 0
                while not finished:
                    cut += 1
                    one, going_on = deepcopy((left, process))
                    one.count_anew(cut)
                    finished = _did(going_on, then)
                    allowed = may_be if then == FORGET else (then,) if finished else (*may_be, then)
                    name = f"sweep=disk plan={plan.name} step={step}{wrong} then={_kind(then)} cut={cut}"
                    yield name, one, allowed, _copies(then, finished)
        _did(store, after)
        before = after


def _disturbed(
    plan: Plan, writer: Writer, disk: SimulatedDisk, store: Any, before: bytes | None, payload: bytes | None
) -> Iterator[Disturbed]:
    """Each state that the plan brings the disk and a process to, and what may be loaded then."""
    if plan.ended == FAILED:
        found = _failing_itself(disk, store, before, payload)
    elif plan.ended:
        found = _beside_another(plan, writer, disk, store, before)
    else:
        yield "", disk, store, (before,)
        return
    for name, left, process, may_be in found:
        for way, chosen in enumerate(left.ways()):
            one, going_on = deepcopy((left, process))
            one.choose(chosen)
            yield f"{name} way={way}", one, going_on, may_be


def _failing_itself(
    disk: SimulatedDisk, store: Any, before: bytes | None, payload: bytes | None
) -> Iterator[Disturbed]:
    for number in count(1):
        for failing in ((number,), (number, number + 1)):
            one, process = deepcopy((disk, store))
            one.count_anew()
            one.failing_syncs = failing
            try:
                if _did(process, payload):
                    return
            except DpsError:
                yield f" fail={','.join(map(str, failing))}", one, process, (before, payload)


def _beside_another(
    plan: Plan, writer: Writer, disk: SimulatedDisk, store: Any, before: bytes | None
) -> Iterator[Disturbed]:
    disk, store = deepcopy((disk, store))
    if plan.to_folder:
        if before is None:
            return  # there is no folder yet
        getattr(disk, plan.to_folder)(plan.folder)
    if plan.to_folder == "empty":
        before = None
    if not plan.others:
        yield "", disk, store, (before, None)
    for other in plan.others:
        finished = False
        number = 0
        while not finished:
            number += 1
            one, process = deepcopy((disk, store))
            one.count_anew(number)
            finished = _did(writer(plan.folder, one), other)
            if not finished and plan.ended == LOST:
                one.forget()
            may_be = (before,) if other == FORGET else (other,) if finished else (before, other)
            yield f" other={_kind(other)} kill={number}", one, process, may_be


def _kind(step: bytes | None) -> str:
    return "reset" if step is None else "commit" if step else "forget"


def _copies(step: bytes | None, finished: bool) -> int:
    """How many of the two files may hold something."""
    return 2 if not finished or step else 1 if step == FORGET else 0


def wrong_counts() -> list[str]:
    """Each kind of step whose fsyncs are not as many as `SYNCS` says."""
    disk = SimulatedDisk()
    first, later = FileStore(FOLDER, disk), FileStore(FOLDER, disk)
    steps: tuple[tuple[str, FileStore, str, bytes | None], ...] = (
        ("first commit", first, IDENTITY, b"hub A"),
        ("", first, PROGRESS, b"trying"),
        ("a process's first", later, IDENTITY, b"hub B"),
        ("of the other record", later, PROGRESS, b"calm"),
        ("later", later, IDENTITY, b"hub C"),
        ("later", later, PROGRESS, b"trying"),
        ("reset", later, IDENTITY, None),
        ("first reset", FileStore(FOLDER, disk), PROGRESS, None),
    )
    wrong = []
    for name, store, record, payload in steps:
        disk.count_anew()
        _did(store, payload, record)
        made = disk.counts.get("fsync", 0)
        if made != SYNCS.get(name, made):
            wrong.append(f"sweep=disk step={name!r}: {made} fsyncs where {SYNCS[name]} were expected")
    return wrong


def _ended(
    plan: Plan, writer: Writer, disk: SimulatedDisk, payload: bytes | None
) -> Iterator[tuple[str, SimulatedDisk]]:
    """Each way in which one step ends too early, with what it leaves of the disk and the cache."""
    if plan.ended == UNREADABLE:
        yield from _unreadable(plan, writer, disk, payload)
        return
    for number in count(1):
        one = disk.copy(0 if plan.ended == FAILED else number)
        if plan.ended == FAILED:
            one.failing_syncs = (number,)
        try:
            if _did(writer(plan.folder, one), payload):
                return
        except DpsError:
            yield from _certain(f"fail={number}", one)
            again = disk.copy()
            again.failing_syncs = (number, number + 1)  # what the store does about the first one fails as well
            with suppress(DpsError):
                _did(writer(plan.folder, again), payload)
            yield from _certain(f"fail={number},{number + 1}", again)
            continue
        if plan.ended == LOST:
            one.forget()
        yield from _certain(f"kill={number}", one)


def _unreadable(
    plan: Plan, writer: Writer, disk: SimulatedDisk, payload: bytes | None
) -> Iterator[tuple[str, SimulatedDisk]]:
    seen = set()
    for cut, one, _ in _moments(plan.folder, writer, disk, payload):
        for left, tree in enumerate(one.aftermaths(focus=IDENTITY)):
            looks = tuple(tree.items())
            if looks not in seen and any(content and readable(content) is None for content in tree.values()):
                seen.add(looks)
                yield f"first={cut} was={left}", SimulatedDisk(tree)


def _certain(name: str, disk: SimulatedDisk) -> Iterator[tuple[str, SimulatedDisk]]:
    for way, one in enumerate(disk.certain()):
        yield f"{name} way={way}", one


def _moments(
    folder: str, writer: Writer, disk: SimulatedDisk, payload: bytes | None
) -> Iterator[tuple[int, SimulatedDisk, bool]]:
    """A cut at each of the effects of one step in turn, the disk then, and last the step that came to its end."""
    cut = 0
    finished = False
    while not finished:
        cut += 1
        one = disk.copy(cut)
        finished = _did(writer(folder, one), payload)
        yield cut, one, finished


def _did(store: Any, payload: bytes | None, record: str = IDENTITY) -> bool:
    """Does one step of a life; whether it came to its end before the cut."""
    try:
        if payload is None:
            store.erase(record)
        elif payload == FORGET:
            with suppress(RetryLater):  # beside a copy that cannot be read; the session goes on as well
                store.forget_older(record)
        else:
            store.commit(record, payload)
    except PowerCut:
        return False
    return True


class Boot(NamedTuple):
    """What a process finds that begins with a tree, and what its own commit comes to."""

    found: bytes | None
    error: str = ""
    is_durable: bool = True  # whatever a cut leaves of the further commit


class Boots:
    """Boots of one writer. Each tree is booted once: many cuts leave the same, and a boot knows nothing else."""

    def __init__(self, writer: Writer) -> None:
        self._writer = writer
        self._boots: dict[tuple[Any, ...], Boot] = {}
        self._payloads: dict[tuple[Any, ...], bytes | None] = {}

    def of(self, folder: str, tree: Tree) -> Boot:
        """The boot from this tree."""
        looks = (folder, *tree.items())
        if looks not in self._boots:
            self._boots[looks] = self._boot(folder, tree)
        return self._boots[looks]

    def _boot(self, folder: str, tree: Tree) -> Boot:
        disk = SimulatedDisk(tree)
        try:
            found = _payload(self._writer(folder, disk))
            self._writer(folder, disk).commit(IDENTITY, b"further")
            left = disk.aftermaths(focus=IDENTITY)
            return Boot(found, is_durable=all(self._payload_of(folder, one) == b"further" for one in left))
        except DpsError as error:
            return Boot(None, f"{error.code} after the reboot: {error}")

    def _payload_of(self, folder: str, tree: Tree) -> bytes | None:
        looks = (folder, *tree.items())
        if looks not in self._payloads:
            self._payloads[looks] = _payload(self._writer(folder, SimulatedDisk(tree)))
        return self._payloads[looks]


def _fault(boot: Boot, tree: Tree, allowed: tuple[bytes | None, ...], copies: int) -> str:
    """What is wrong after a boot from this tree, or ""."""
    held = [path for path, content in tree.items() if f"/{IDENTITY}." in path and (content or b"").strip(b"\xff")]
    if copies:  # what cannot be read for now is left alone by all but a reset
        held = [path for path in held if readable(tree[path] or b"") is not None]
    if len(held) > copies:
        return f"something is still in {' and '.join(held)}"
    if boot.error:
        return boot.error
    if boot.found not in allowed:
        return f"{_shown(boot.found)} where {' or '.join(map(_shown, allowed))} was expected"
    return "" if boot.is_durable else "a further commit was not durable"


def _payload(store: Any) -> bytes | None:
    found = store.load(IDENTITY)
    return bytes(found.payload) or None if found is not None else None  # empty: no copy is whole


def _shown(payload: bytes | None) -> str:
    return "none" if payload is None else repr(payload[:14].decode(errors="replace"))
