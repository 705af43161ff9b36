"""Cuts the power of a real ext4 under the real `FileStore`, block by block.

The writer runs on a recorded disk (`blocklog`). A crash state is: all writes before the last flush, and some of those
after it, the last one torn or not. Each is mounted, so that the kernel replays the journal, and loaded; then a further
commit must work. So it is where the disk does not give the first sector of a copy any more until it is written.
`syncfs` between the writer's system calls does what any other process's sync may do.
"""

from __future__ import annotations

import functools
import os
import random
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from dps_hal.contracts import IDENTITY
from dps_hal.errors import DpsError
from dps_hal.host.files import FileStore, SystemCalls
from dps_hal.store.slots import decode_slot, encode_slot
from support.disk.blocklog import (
    BLOCK_BYTES,
    SECTOR_BYTES,
    Entry,
    RecordedDisk,
    Unavailable,
    mounted_ext4,
    new_ext4,
    own_mounts,
    refuse_unless_able,
    syncfs,
)
from support.disk.disk_cuts import OnFiles, Writer
from support.disk.faulty_writers import SingleSlot, StopsAtTheUnreadable
from support.disk.work_folder import work_folder

SEED = 4  # of the random subsets; a state's name has it
SUBSETS = 6  # random ones of each set of more than three unflushed writes
FORGET = b""  # a step of a life: earlier content goes, the current stays
LIFE: tuple[bytes | None, ...] = (
    b"hub A" * 500,
    b"hub B" * 600,
    b"hub C" * 550,
    None,
    b"hub D" * 500,
    b"hub E" * 700,
    FORGET,
)
HELD = (None, *LIFE[:-1], LIFE[-2])  # after so many steps


class SyncingCalls(SystemCalls):
    """The real system calls, with a syncfs of the whole file system after each one that changes something."""

    def open(self, path: str, flags: int, mode: int = 0) -> int:
        """open(2)."""
        fd = super().open(path, flags, mode)
        if flags & (os.O_CREAT | os.O_TRUNC):
            syncfs(fd)
        return fd

    def pwrite(self, fd: int, content: bytes, offset: int) -> int:
        """pwrite(2)."""
        taken = super().pwrite(fd, content, offset)
        syncfs(fd)
        return taken

    def mkdir(self, path: str, mode: int) -> None:
        """mkdir(2)."""
        super().mkdir(path, mode)
        fd = os.open(path, os.O_RDONLY)
        syncfs(fd)
        os.close(fd)

    def rename(self, old: str, new: str) -> None:
        """rename(2); the product has no use for it, faulty writers do."""
        os.rename(old, new)


class QuietCalls(SystemCalls):
    """The real system calls alone."""

    def rename(self, old: str, new: str) -> None:
        """rename(2)."""
        os.rename(old, new)


class OneFile(FileStore):
    """What many programs do: one file per record. The subclasses say how they write it."""

    def __init__(self, folder: str, calls: SystemCalls) -> None:
        super().__init__(folder, calls)
        self._path = os.path.join(folder, IDENTITY)
        self._calls: Any = calls

    def load(self, record: str) -> Any:
        """See `Store.load`."""
        with suppress(FileNotFoundError):
            slot = decode_slot(Path(self._path).read_bytes(), 0xFF)
            return None if slot.payload is None else slot
        return None

    def forget_older(self, record: str) -> None:
        """There is no older copy."""

    def erase(self, record: str) -> None:
        """Removes the file, durably."""
        with suppress(FileNotFoundError):
            os.remove(self._path)
            self._sync_folder()

    def write(self, path: str, payload: bytes, sync: bool) -> None:
        """Makes or truncates a file and writes it."""
        with suppress(FileExistsError):
            self._calls.mkdir(os.path.dirname(path), 0o700)
        fd = self._calls.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        self._calls.pwrite(fd, encode_slot(1, payload), 0)
        if sync:
            self._calls.fsync(fd)
        self._calls.close(fd)

    def _sync_folder(self) -> None:
        fd = os.open(os.path.dirname(self._path), os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)


class Naive(OneFile):
    """Writes the file and closes it."""

    def commit(self, record: str, payload: bytes) -> None:
        """open, write, close."""
        self.write(self._path, payload, sync=False)


class InPlace(OneFile):
    """Truncates the file, writes it and syncs."""

    def commit(self, record: str, payload: bytes) -> None:
        """open(O_TRUNC), write, fsync, close; then the folder."""
        self.write(self._path, payload, sync=True)
        self._sync_folder()


class NoDirectoryFsync(OneFile):
    """Replaces the file by rename, and takes the rename for durable."""

    def commit(self, record: str, payload: bytes) -> None:
        """Temporary file, fsync, rename."""
        self.write(self._path + ".new", payload, sync=True)
        self._calls.rename(self._path + ".new", self._path)


WRITERS: dict[str, Writer] = {
    "": FileStore,
    "naive": Naive,
    "in-place": InPlace,
    "no-directory-fsync": NoDirectoryFsync,
    "single-slot": partial(OnFiles, SingleSlot),
    "stops-at-the-unreadable": partial(OnFiles, StopsAtTheUnreadable),
}


class CrashState(NamedTuple):
    """What may be left on the disk; `step` steps of the life were over."""

    name: str
    image: bytes
    step: int


def crash_states(start: bytes, log: list[Entry], name: str) -> Iterator[CrashState]:
    """Every prefix of the log; of the writes since its last flush all subsets, or some if there are many."""
    durable = bytearray(start)
    pending: list[Entry] = []
    seen: set[bytes] = set()
    for cut, entry in enumerate(log, 1):
        if entry.kind == "flush":
            for write in pending:
                _apply(durable, write)
            pending = []
        elif entry.kind == "write":
            pending.append(entry)
        step = entry.mark
        for left, chosen in enumerate(_subsets(len(pending), cut)):
            survivors = [write for write, survives in zip(pending, chosen, strict=True) if survives]
            for torn, last in _tears(survivors):
                image = bytearray(durable)
                for write in survivors[:-1]:
                    _apply(image, write)
                if last is not None:
                    _apply(image, last)
                looks = sha256(image + bytes([step])).digest()
                if looks not in seen:
                    seen.add(looks)
                    yield CrashState(f"{name} cut={cut} left={left} torn={torn} seed={SEED}", bytes(image), step)


def _apply(image: bytearray, write: Entry) -> None:
    image[write.offset : write.offset + len(write.content)] = write.content


def _subsets(count: int, cut: int) -> list[tuple[bool, ...]]:
    if count <= 3:
        return [tuple(bool(chosen >> i & 1) for i in range(count)) for chosen in range(1 << count)]
    subsets = [tuple(i < kept for i in range(count)) for kept in (0, count)]
    subsets += [tuple(i != dropped for i in range(count)) for dropped in range(count)]
    subsets.append(tuple(i == count - 1 for i in range(count)))
    choose = random.Random(SEED * 1000 + cut)
    subsets += [tuple(choose.random() < 0.5 for _ in range(count)) for _ in range(SUBSETS)]
    return subsets


def _tears(survivors: list[Entry]) -> Iterator[tuple[int, Entry | None]]:
    if not survivors:
        yield 0, None
        return
    last = survivors[-1]
    yield len(last.content), last
    # Between blocks only: ext4's own superblock, torn within its block, stops any mount, whatever was being written.
    blocks = len(last.content) // BLOCK_BYTES
    for kept in sorted({1, blocks // 2, blocks - 1}) if blocks > 1 else ():
        yield kept * BLOCK_BYTES, last._replace(content=last.content[: kept * BLOCK_BYTES])


def recorded(writer: Writer, calls: SystemCalls, folder: Path) -> tuple[bytes, list[Entry]]:
    """An empty disk and what a whole life of `writer` does to it."""
    start = new_ext4()
    disk = RecordedDisk(start)
    with disk.mounted_at(folder / "disk") as file:
        backing = os.open(file, os.O_RDWR | os.O_CLOEXEC)
        try:
            with mounted_ext4(backing, _folder(folder / "live")) as place:
                root = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
                syncfs(root)
                os.close(root)
                start = disk.begin()
                for step, payload in enumerate(LIFE, 1):
                    store = writer(str(place / "state"), calls)
                    if payload is None:
                        store.erase(IDENTITY)
                    elif payload == FORGET:
                        store.forget_older(IDENTITY)
                    else:
                        store.commit(IDENTITY, payload)
                    disk.finished(step)
                log = disk.log()
        finally:
            os.close(backing)
    return start, log


def unreadable(writer: Writer, folder: Path, copy: int) -> str:
    """What is wrong where one of two copies, the older one (0) or the newer, cannot be read from the disk, or ""."""
    payloads = LIFE[:2]
    disk = RecordedDisk(new_ext4())
    with disk.mounted_at(folder / "disk") as file:
        backing = os.open(file, os.O_RDWR | os.O_CLOEXEC)
        try:
            with mounted_ext4(backing, _folder(folder / "live")) as place:
                for payload in payloads:
                    writer(str(place / "state"), QuietCalls()).commit(IDENTITY, payload or b"")
            spoiled = disk.begin().find(encode_slot(copy + 1, payloads[copy])[:SECTOR_BYTES])
            if spoiled < 0:
                return "the copy is not on the disk"
            disk.spoil(spoiled)
            for expected in (payloads[1 - copy], b"further"):
                with mounted_ext4(backing, folder / "live") as place:
                    store = writer(str(place / "state"), QuietCalls())
                    found = store.load(IDENTITY)
                    if found is None or found.payload != expected or found.rolled_back != (expected != b"further"):
                        return f"{found and _shown(found.payload)} where {_shown(expected)} was expected"
                    if expected != b"further":
                        store.commit(IDENTITY, b"further")
        except (DpsError, OSError) as error:
            return f"after the disk gave a sector no more: {error}"
        finally:
            os.close(backing)
    return ""


def fault(state: CrashState, writer: Writer, place: Path) -> str:
    """What is wrong after a boot from this disk, or ""."""
    allowed = HELD[state.step : state.step + 2]
    backing = os.memfd_create("state", os.MFD_CLOEXEC)
    try:
        os.write(backing, state.image)
        with mounted_ext4(backing, place):
            store = writer(str(place / "state"), QuietCalls())
            found = store.load(IDENTITY)
            payload = found.payload or None if found is not None else None  # empty: no copy is whole
            if payload not in allowed:
                return f"{_shown(payload)} where {' or '.join(map(_shown, allowed))} was expected"
            store.commit(IDENTITY, b"further")
            found = store.load(IDENTITY)
            if found is None or found.payload != b"further":
                return "a further commit failed"
    except (DpsError, OSError) as error:
        return f"after the reboot: {error}"
    finally:
        os.close(backing)
    return ""


def _shown(payload: bytes | None) -> str:
    return "none" if payload is None else repr(payload[:5].decode(errors="replace"))


def _folder(path: Path) -> Path:
    path.mkdir(exist_ok=True)
    return path


def sweep(writer: str = "", only: str = "", at_first: bool = False) -> tuple[int, list[str]]:
    """Number of states, and the lost ones; raises blocklog.Unavailable."""
    prepare()
    states = 0
    lost = []
    with work_folder() as folder:
        place = _folder(folder / "boot")
        for copy in (0, 1) if writer in ("", "stops-at-the-unreadable") else ():  # the others keep no two copies
            name = f"sweep=ext4 unreadable={copy}"
            if only and name != only:
                continue
            states += 1
            wrong = unreadable(WRITERS[writer], folder, copy)
            if wrong:
                lost.append(f"{name}: {wrong}")
                if at_first:
                    return states, lost
        for syncing, calls in (("True", SyncingCalls()), ("False", QuietCalls())):
            start, log = recorded(WRITERS[writer], calls, folder)
            for state in crash_states(start, log, f"sweep=ext4 syncfs={syncing}"):
                if only and state.name != only:
                    continue
                states += 1
                wrong = fault(state, WRITERS[writer], place)
                if wrong:
                    lost.append(f"{state.name}: {wrong}")
                    if at_first:
                        return states, lost
    return states, lost


@functools.cache
def prepare() -> None:
    """Gives this thread mounts of its own, once, and tries one; raises blocklog.Unavailable where that cannot be."""
    refuse_unless_able()
    try:
        own_mounts()
        with (
            work_folder() as folder,
            RecordedDisk(new_ext4()).mounted_at(folder / "disk") as disk,
        ):
            backing = os.open(disk, os.O_RDWR | os.O_CLOEXEC)
            try:
                with mounted_ext4(backing, _folder(folder / "live")):
                    pass
            finally:
                os.close(backing)
    except OSError as error:
        raise Unavailable(f"this needs leave to mount (a container may have none): {error}") from error
