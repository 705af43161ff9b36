"""The record store on NOR flash under Linux: an MTD character device such as /dev/mtd3, without a file system.

The partition is the store's own: slots 0 and 1 are `identity`, 2 and 3 `progress`, each in erase blocks of its own.
Requests and structures: Linux, include/uapi/mtd/mtd-abi.h.
"""

import os
import struct
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import NamedTuple

from dps_hal.contracts import IDENTITY, PROGRESS
from dps_hal.errors import AskOperator, RetryLater
from dps_hal.host.files import LockedStore, SystemCalls, is_unreadable, storage_failure, take_lock
from dps_hal.host.ioctl import read_request, write_request

NOR = 3  # MTD_NORFLASH
NAND = (4, 8)  # MTD_NANDFLASH, MTD_MLCNANDFLASH
DATAFLASH = 6
WRITEABLE = 0x400  # MTD_WRITEABLE
_INFO = "=B3xIIIIIQ"  # type, flags, size, erasesize, writesize, oobsize, padding
_ERASE = "=II"  # start, length
_SLOTS = 4
MEMGETINFO = read_request("M", 1, struct.calcsize(_INFO))  # struct mtd_info_user
MEMERASE = write_request("M", 2, struct.calcsize(_ERASE))  # struct erase_info_user


class _Partition(NamedTuple):
    """What MEMGETINFO says, in bytes; `pitch` is from one slot to the next, a whole number of erase blocks."""

    pitch: int
    writesize: int


class MtdSlots:
    """The `SlotDevice` of one record; `first` is its first slot in the partition.

    The driver returns from a write or an erase when the chip has done it, so there is nothing to sync.
    """

    slot_bytes = 4096
    erase_value = 0xFF

    def __init__(self, path: str, calls: SystemCalls, first: int) -> None:
        self.path = path
        self.calls = calls
        self._first = first

    def read(self, slot: int) -> bytes | None:
        """See `SlotDevice.read`."""
        content = b""
        try:
            with self._opened(os.O_RDONLY, "read") as (fd, partition):
                start = (self._first + slot) * partition.pitch
                while part := self.calls.pread(fd, self.slot_bytes - len(content), start + len(content)):
                    content += part
        except RetryLater as error:
            if not is_unreadable(error):
                raise
            return None
        return content

    def erase(self, slot: int) -> None:
        """Erases all blocks of the slot."""
        with self._opened(os.O_RDWR, "erase") as (fd, partition):
            start = (self._first + slot) * partition.pitch
            self.calls.ioctl(fd, MEMERASE, struct.pack(_ERASE, start, partition.pitch))

    def program(self, slot: int, content: bytes) -> None:
        """See `SlotDevice.program`; filled up to a whole number of the chip's write units."""
        with self._opened(os.O_RDWR, "write") as (fd, partition):
            start = (self._first + slot) * partition.pitch
            content += bytes([self.erase_value]) * (-len(content) % partition.writesize)
            done = 0
            while done < len(content):
                taken = self.calls.pwrite(fd, content[done:], start + done)
                if taken == 0:
                    raise OSError("pwrite took nothing")
                done += taken

    def settle(self, slot: int) -> None:
        """Nothing: a read comes from the chip."""

    def renew(self, slot: int) -> None:
        """Nothing: a read comes from the chip."""

    def sync(self) -> None:
        """Nothing waits in a cache."""

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the lock of the partition over all of a block, whose own errors pass as they are."""
        with self._reporting("lock"):
            fd = self.calls.open(self.path, os.O_RDWR | os.O_CLOEXEC)
        try:
            with self._reporting("lock"):
                self._partition(fd, os.O_RDWR)
                take_lock(self.calls, fd, self.path)
            yield
        finally:
            self._close(fd)

    @contextmanager
    def _opened(self, access: int, action: str) -> Iterator[tuple[int, _Partition]]:
        """A descriptor of the partition and what it is; an OSError of the block becomes an error of the store."""
        with self._reporting(action):
            fd = self.calls.open(self.path, access | os.O_CLOEXEC)
            try:
                yield fd, self._partition(fd, access)
            finally:
                self._close(fd)

    def _close(self, fd: int) -> None:
        with suppress(OSError):
            self.calls.close(fd)

    @contextmanager
    def _reporting(self, action: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            advice = ""
            if isinstance(error, PermissionError):
                advice = "give the agent's user access to the partition, and see that it is not mounted read-only"
            elif isinstance(error, FileNotFoundError):
                advice = "there is no such partition: look at /proc/mtd"
            raise storage_failure(error, f"cannot {action} {self.path}", advice) from error

    def _partition(self, fd: int, access: int) -> _Partition:
        try:
            info = self.calls.ioctl(fd, MEMGETINFO, bytes(struct.calcsize(_INFO)))
        except OSError as error:
            raise AskOperator(
                "store.unsuitable", f"{self.path} is no MTD character device (MEMGETINFO: {error})"
            ) from None
        kind, flags, size, erasesize, writesize, _, _ = struct.unpack(_INFO, info)
        if kind in NAND:
            raise AskOperator(
                "store.unsuitable",
                f"{self.path} is NAND flash, which has bad blocks and needs UBI: put a UBI volume with UBIFS on it and"
                " name a folder there in state_dir",
            )
        if kind not in (NOR, DATAFLASH) or not erasesize or not writesize:
            raise AskOperator("store.unsuitable", f"{self.path} is no NOR flash: MTD type {kind}")
        pitch = -(-self.slot_bytes // erasesize) * erasesize
        if size < _SLOTS * pitch:
            raise AskOperator(
                "store.unsuitable",
                f"{self.path} has {size} bytes where {_SLOTS} slots of {pitch} bytes need {_SLOTS * pitch}",
            )
        if access != os.O_RDONLY and not flags & WRITEABLE:
            raise AskOperator("store.read_only", f"{self.path} is marked read-only in the partition table")
        return _Partition(pitch, writesize)


class MtdStore(LockedStore):
    """The `Store` on a NOR partition; who writes holds flock(2) on its device node.

    AskOperator `store.unsuitable`: NAND, no MTD device, or too small. Nothing is opened before the first use.
    """

    def __init__(self, path: str, calls: SystemCalls | None = None) -> None:
        calls = calls or SystemCalls()
        self._slots = MtdSlots(path, calls, 0)
        super().__init__({IDENTITY: self._slots, PROGRESS: MtdSlots(path, calls, 2)})

    def _lock(self) -> AbstractContextManager[None]:
        return self._slots.locked()
