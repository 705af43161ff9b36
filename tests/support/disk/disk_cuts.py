"""Cuts the power of a simulated Linux disk at every system call of the file store that changes something.

`support.disk.posix_disk` is the disk: it keeps no more than POSIX promises, so that it also tells what one file system
happens to forgive, such as a forgotten fsync of a folder. Four sweeps: a cut; a process that is killed, which leaves
the cache, then a cut in the next one; the same where what the first one left could not be written; and a process whose
fsync fails, or that one and the next, then a cut in the next process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from itertools import count
from typing import Any, NamedTuple

from dps_hal.contracts import IDENTITY, PROGRESS
from dps_hal.errors import DpsError
from dps_hal.host.files import FileSlots, FileStore, StateFolder, SystemCalls
from dps_hal.store.slots import SlotStore
from support.disk.faulty_writers import (
    BelievesItsEyes,
    InPlace,
    Naive,
    RenewsTheCurrentCopy,
    SingleSlot,
    TrustsTheCache,
)
from support.disk.flash import PowerCut
from support.disk.posix_disk import SimulatedDisk, Tree

Writer = Callable[[str, SystemCalls], Any]

FOLDER = "/var/lib/dps-agent"
NESTED = "/var/lib/factory/dps-agent"
LIFE: tuple[bytes | None, ...] = (b"hub A", b"hub B" * 300, b"hub C", None, None, b"hub D")  # None: a reset


class Plan(NamedTuple):
    """A life in `folder`; with `then` each step is ended by `ended`, and the next process's step `then` is cut."""

    name: str
    folder: str
    life: tuple[bytes | None, ...]
    then: tuple[bytes | None, ...] = ()
    ended: str = ""


KILLED, LOST, FAILED = "kill", "lose", "fail"  # by a kill; by that, and its writes fail; by an fsync that fails
PLANS = (
    Plan("cut", FOLDER, LIFE),
    Plan("cut-in-new-folders", NESTED, LIFE[:2]),
    Plan("kill-then-commit", FOLDER, LIFE[:4], (b"second process",), KILLED),
    Plan("kill-then-reset", FOLDER, LIFE[:4], (None,), KILLED),
    Plan("lose-then-commit", FOLDER, LIFE, (b"second process",), LOST),
    Plan("lose-then-reset", FOLDER, LIFE, (None,), LOST),
    Plan("fail-then-commit", FOLDER, LIFE, (b"second process",), FAILED),
    Plan("fail-then-reset", FOLDER, LIFE, (None,), FAILED),
)


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
        self._folder._sync_folder = lambda path: None  # type: ignore[method-assign]


WRITERS: dict[str, Writer] = {
    "": FileStore,
    "naive": partial(OnFiles, Naive),
    "in-place": partial(OnFiles, InPlace),
    "single-slot": partial(OnFiles, SingleSlot),
    "no-directory-fsync": ForgetsTheFolder,
    "trusts-the-cache": partial(OnFiles, TrustsTheCache),
    "believes-its-eyes": partial(OnFiles, BelievesItsEyes),
    "renews-the-current": partial(OnFiles, RenewsTheCurrentCopy),
}


def sweep(writer: str = "", only: str = "", at_first: bool = False) -> tuple[int, list[str]]:
    """Number of states, and the lost ones."""
    states = 0
    lost: list[str] = []
    for plan in PLANS:
        cuts = _followed(plan, WRITERS[writer]) if plan.then else _cut(plan, WRITERS[writer])
        seen: set[tuple[Any, ...]] = set()
        for name, disk, allowed in cuts:
            if only and not only.startswith(name + " "):
                continue
            for left, tree in enumerate(disk.aftermaths(focus=IDENTITY)):
                where = f"{name} left={left}"
                looks = (allowed, *tree.items())
                if looks in seen:
                    continue
                seen.add(looks)
                if only and where != only:
                    continue
                states += 1
                wrong = _fault(plan.folder, WRITERS[writer], tree, allowed)
                if wrong:
                    lost.append(f"{where}: {wrong}")
                    if at_first:
                        return states, lost
    return states, lost


Cut = tuple[str, SimulatedDisk, tuple[bytes | None, ...]]


def _cut(plan: Plan, writer: Writer) -> Iterator[Cut]:
    """Each moment of a cut: its name, the disk then, and the payloads that may be loaded."""
    disk = SimulatedDisk()
    before = None
    for step, after in enumerate(plan.life):
        cut = 0
        finished = False
        while not finished:
            cut += 1
            one = disk.copy(cut)
            finished = _did(writer(plan.folder, one), after)
            allowed = (after,) if finished else (before, after)
            yield f"sweep=disk plan={plan.name} step={step} cut={cut}", one, allowed
        disk = one.copy()  # the cut that came too late
        before = after


def _followed(plan: Plan, writer: Writer) -> Iterator[Cut]:
    """As `_cut`, of the step that the next process does after one was ended."""
    disk = SimulatedDisk()
    before = None
    for step, after in enumerate(plan.life):
        for ended, left in _ended(plan, writer, disk, after):
            for then in plan.then:
                cut = 0
                finished = False
                while not finished:
                    cut += 1
                    one = left.copy(cut)
                    finished = _did(writer(plan.folder, one), then)
                    allowed = (then,) if finished else (before, after, then)
                    yield f"sweep=disk plan={plan.name} step={step} {ended} cut={cut}", one, allowed
        disk = disk.copy()
        _did(writer(plan.folder, disk), after)
        before = after


def _ended(
    plan: Plan, writer: Writer, disk: SimulatedDisk, payload: bytes | None
) -> Iterator[tuple[str, SimulatedDisk]]:
    """Each way in which one step ends too early, with what it leaves of the disk and the cache."""
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


def _certain(name: str, disk: SimulatedDisk) -> Iterator[tuple[str, SimulatedDisk]]:
    for way, one in enumerate(disk.certain()):
        yield f"{name} way={way}", one


def _did(store: Any, payload: bytes | None) -> bool:
    """Does one step of a life; whether it came to its end before the cut."""
    try:
        if payload is None:
            store.erase(IDENTITY)
        else:
            store.commit(IDENTITY, payload)
    except PowerCut:
        return False
    return True


def _fault(folder: str, writer: Writer, tree: Tree, allowed: tuple[bytes | None, ...]) -> str:
    """What is wrong after a boot from this tree, or ""."""
    disk = SimulatedDisk(tree)
    try:
        found = _payload(writer(folder, disk))
        if found not in allowed:
            return f"{_shown(found)} where {' or '.join(map(_shown, allowed))} was expected"
        writer(folder, disk).commit(IDENTITY, b"further")
        left = disk.aftermaths(focus=IDENTITY)
        if any(_payload(writer(folder, SimulatedDisk(one))) != b"further" for one in left):
            return "a further commit was not durable"
    except DpsError as error:
        return f"{error.code} after the reboot: {error}"
    return ""


def _payload(store: Any) -> bytes | None:
    found = store.load(IDENTITY)
    return bytes(found.payload) or None if found is not None else None  # empty: no copy is whole


def _shown(payload: bytes | None) -> str:
    return "none" if payload is None else repr(payload[:14].decode(errors="replace"))
