"""Cuts the power inside MicroPython's own littlefs while `LittleFsStore` commits and erases.

    MICROPYPATH=agent:hal:tests micropython tests/support/disk/littlefs_cuts.py [writer [state]]

Runs under MicroPython only. One life is recorded operation by operation on a flash in memory; then every prefix of the
operations, the last one torn, is mounted and loaded, and must hold a further commit. The same where one of the writes
failed, on which the step ended, and then the power went; and after each step where one block of the record's file is
corrupt, as littlefs says, until it is erased: the record is none then. Prints one JSON document.
"""

import json
import os
import sys

import vfs  # type: ignore[import-not-found]

from dps_hal.contracts import IDENTITY
from dps_hal.errors import DpsError, RetryLater
from dps_hal.store.littlefs import LittleFsStore
from dps_hal.store.slots import encode_slot

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from dps_hal.store.slots import Slot

    NewStore = Callable[[str, Any], LittleFsStore]

_EIO = 5
_CORRUPT = 84  # LFS_ERR_CORRUPT
BLOCKS = 32
BLOCK_BYTES = 512
PAGE_BYTES = 32
MOUNT = "/flash"
FOLDER = MOUNT + "/state"


class Flash:
    """A block device in memory that records what is done to it."""

    def __init__(self, content: bytes, corrupt: int = -1) -> None:
        self.content = bytearray(content)
        self.corrupt = corrupt  # a block that cannot be read until it is erased
        self.operations: list[tuple[int, bytes]] = []  # first byte, content; an erase is all 0xFF
        self.writes = 0
        self.failing = 0  # which of them fails; 0: none

    def readblocks(self, block: int, buffer: bytearray, offset: int = 0) -> int:
        """See vfs.AbstractBlockDev."""
        start = block * BLOCK_BYTES + offset
        buffer[:] = self.content[start : start + len(buffer)]
        return -_CORRUPT if block == self.corrupt else 0

    def writeblocks(self, block: int, buffer: bytearray, offset: int = 0) -> int:
        """See vfs.AbstractBlockDev."""
        self.writes += 1
        if self.writes == self.failing:
            return -_EIO
        start = block * BLOCK_BYTES + offset
        programmed = bytearray(buffer)
        for i in range(len(programmed)):
            programmed[i] &= self.content[start + i]
        self._write(start, bytes(programmed))
        return 0

    def ioctl(self, operation: int, argument: int) -> int:
        """See vfs.AbstractBlockDev."""
        if operation == 4:
            return BLOCKS
        if operation == 5:
            return BLOCK_BYTES
        if operation == 6:
            if argument == self.corrupt:
                self.corrupt = -1
            self._write(argument * BLOCK_BYTES, b"\xff" * BLOCK_BYTES)
        return 0

    def _write(self, start: int, content: bytes) -> None:
        self.operations.append((start, content))
        self.content[start : start + len(content)] = content


class Mounted:
    """A littlefs at MOUNT for as long as a `with` lasts."""

    def __init__(self, flash: Flash) -> None:
        self._flash = flash

    def __enter__(self) -> None:
        vfs.mount(vfs.VfsLfs2(self._flash, progsize=PAGE_BYTES, readsize=PAGE_BYTES), MOUNT)

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        vfs.umount(MOUNT)


class Naive(LittleFsStore):
    """Removes the record, then writes the new one."""

    def commit(self, record: str, payload: bytes) -> None:
        """Two steps, and nothing in between."""
        self._make_folder()
        self._remove(self._path(record), False)
        with open(self._path(record), "wb") as file:
            file.write(encode_slot(1, payload))


class InPlace(LittleFsStore):
    """Writes the record anew, a piece at a time."""

    def commit(self, record: str, payload: bytes) -> None:
        """Truncates, then flushes each piece."""
        self._make_folder()
        content = encode_slot(1, payload)
        with open(self._path(record), "wb") as file:
            for start in range(0, len(content), 256):
                file.write(content[start : start + 256])
                file.flush()


class SingleSlot(LittleFsStore):
    """Keeps one copy in a file of one slot: erases it, then writes over it."""

    def commit(self, record: str, payload: bytes) -> None:
        """As on raw flash with one slot."""
        self._make_folder()
        for content in (b"\xff" * 2048, encode_slot(1, payload)):
            there = record in os.listdir(self._folder)
            with open(self._path(record), "r+b" if there else "wb") as file:
                file.write(content)


class StopsAtTheCorrupt(LittleFsStore):
    """Takes a file that littlefs cannot read for a failure that may pass."""

    def _read(self, record: str) -> "Slot":
        if is_corrupt():
            raise RetryLater("store.io", "the file cannot be read")
        return LittleFsStore._read(self, record)


WRITERS: "dict[str, NewStore]" = {
    "": LittleFsStore,
    "naive": Naive,
    "in-place": InPlace,
    "single-slot": SingleSlot,
    "stops-at-the-corrupt": StopsAtTheCorrupt,
}


def life() -> "list[bytes | None]":
    """Commits of several sizes, enough for littlefs to move and compact its blocks, and resets: payloads or None."""
    steps: list[bytes | None] = []
    for number in range(24):
        steps.append(b"hub %d " % number * (1 + number * 37 % 120))
        if number % 8 == 5:
            steps.append(None)
    return steps


def do(store: LittleFsStore, payload: "bytes | None") -> None:
    """One step of a life."""
    if payload is None:
        store.erase(IDENTITY)
    else:
        store.commit(IDENTITY, payload)


def loaded(store: LittleFsStore) -> "bytes | None":
    """The payload, or None."""
    found = store.load(IDENTITY)
    return None if found is None else found.payload


def is_corrupt() -> bool:
    """Whether littlefs says so of the record's file."""
    try:
        with open(FOLDER + "/" + IDENTITY, "rb") as file:
            file.read()
    except OSError as error:
        return error.errno == _CORRUPT
    return False


def corrupt_blocks(content: bytes) -> "list[int]":
    """Each block without which littlefs mounts, and finds the record's file corrupt."""
    found = []
    for block in range(BLOCKS):
        try:
            with Mounted(Flash(content, block)):
                if is_corrupt():
                    found.append(block)
        except OSError:
            pass  # a block of littlefs's own
    return found


def fault(new_store: "NewStore", content: bytes, allowed: "tuple[bytes | None, ...]", corrupt: int = -1) -> str:
    """What is wrong with a flash after the cut, or ""."""
    flash = Flash(content, corrupt)
    try:
        with Mounted(flash):
            found = loaded(new_store(FOLDER, os))
            if found not in allowed:
                return f"{found and found[:16]!r} where {[a and a[:16] for a in allowed]!r} was expected"
            new_store(FOLDER, os).commit(IDENTITY, b"further")
        with Mounted(Flash(bytes(flash.content), flash.corrupt)):
            if loaded(new_store(FOLDER, os)) != b"further":
                return "a further commit was not durable"
    except DpsError as error:
        return f"{error.code} after the reboot"
    except OSError as error:
        return f"littlefs failed with error {error.errno} after the reboot"
    return ""


def failed(new_store: "NewStore", flash: Flash, number: int, payload: "bytes | None") -> str:
    """What is wrong with a step whose n-th write fails, or ""."""
    with Mounted(flash):
        flash.failing = flash.writes + number
        try:
            do(new_store(FOLDER, os), payload)
        except DpsError:
            return ""
        except OSError as error:
            return f"error {error.errno} came through"
    return "" if flash.writes < flash.failing else "a write failed, and nothing said so"


def tears(content: bytes) -> "list[int]":
    """Where an operation is torn: at every 32nd byte of a page, at a quarter of an erase."""
    step = PAGE_BYTES if len(content) < BLOCK_BYTES else BLOCK_BYTES // 4
    return sorted(set(list(range(0, len(content), step)) + [1, len(content) // 2, len(content) - 1]))


def sweep(writer: str = "", only: str = "") -> "dict[str, Any]":
    """Number of states, the lost ones, and flash operations per commit."""
    new_store = WRITERS[writer]
    blank = Flash(b"\xff" * (BLOCKS * BLOCK_BYTES))
    vfs.VfsLfs2.mkfs(blank, progsize=PAGE_BYTES, readsize=PAGE_BYTES)
    states = erases = programs = commits = 0
    lost: list[str] = []
    before: bytes | None = None
    content = bytes(blank.content)
    for step, after in enumerate(life()):
        flash = Flash(content)
        with Mounted(flash):
            do(new_store(FOLDER, os), after)
        erased = len([1 for _, part in flash.operations if part == b"\xff" * BLOCK_BYTES])
        if after is not None:
            commits += 1
            erases += erased
            programs += len(flash.operations) - erased
        left = bytearray(content)
        for cut, (start, part) in enumerate(flash.operations):
            for torn in tears(part):
                name = f"sweep=littlefs step={step} cut={cut + 1} torn={torn}"
                if only and name != only:
                    continue
                states += 1
                torn_flash = bytearray(left)
                torn_flash[start : start + torn] = part[:torn]
                wrong = fault(new_store, bytes(torn_flash), (before, after))
                if wrong:
                    lost.append(name + ": " + wrong)
            left[start : start + len(part)] = part
        name = f"sweep=littlefs step={step} cut={len(flash.operations) + 1} torn=0"
        if not only or name == only:
            states += 1
            wrong = fault(new_store, bytes(left), (after,))
            if wrong:
                lost.append(name + ": " + wrong)
        for number in range(1, flash.writes + 1):
            name = f"sweep=littlefs step={step} fail={number}"
            if only and name != only:
                continue
            states += 1
            failing = Flash(content)
            wrong = failed(new_store, failing, number, after) or fault(
                new_store, bytes(failing.content), (before, after)
            )
            if wrong:
                lost.append(name + ": " + wrong)
        for block in corrupt_blocks(bytes(left)):
            name = f"sweep=littlefs step={step} corrupt={block}"
            if only and name != only:
                continue
            states += 1
            wrong = fault(new_store, bytes(left), (None,), block)
            if wrong:
                lost.append(name + ": " + wrong)
        if writer and lost:
            break
        content = bytes(left)
        before = after
    return {
        "states": states,
        "lost": lost,
        "perCommit": {"programs": round(programs / commits, 1), "erases": round(erases / commits, 1)},
    }


if __name__ == "__main__":
    print(json.dumps(sweep(*sys.argv[1:])))
