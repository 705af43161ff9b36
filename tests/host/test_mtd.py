"""The store on a NOR partition, against simulated MTD ioctls: contract, power cuts, and what it refuses."""

import errno
import os
import platform
import struct
from collections.abc import Callable

import pytest

from contracts.store import RULES, payload_of
from dps_hal.contracts import IDENTITY, PROGRESS
from dps_hal.errors import AskOperator, DpsError, RetryLater
from dps_hal.host.files import FileStore, SystemCalls
from dps_hal.host.ioctl import read_request, write_request
from dps_hal.host.mtd import MEMERASE, MEMGETINFO, NAND, NOR, WRITEABLE, MtdStore
from dps_hal.host.state_dir import open_store

PATH = "/dev/mtd3"


class Partition(SystemCalls):
    """A flash partition: programming clears bits, erasing a whole block sets them; fails or cuts at the n-th call."""

    def __init__(self, size: int = 65536, erasesize: int = 4096, writesize: int = 1, kind: int = NOR) -> None:
        self.flash = bytearray(b"\xff" * size)
        self.erasesize, self.writesize, self.kind = erasesize, writesize, kind
        self.flags = WRITEABLE
        self.accesses: dict[int, int] = {}
        self.locked: set[int] = set()
        self.most_at_once = 1 << 30
        self.failing: dict[str, int] = {}
        self.counts: dict[str, int] = {}

    def _count(self, name: str) -> None:
        self.counts[name] = self.counts.get(name, 0) + 1
        if name in self.failing:
            raise OSError(self.failing[name], os.strerror(self.failing[name]))

    def open(self, path: str, flags: int, mode: int = 0) -> int:
        assert path == PATH
        self._count("open")
        fd = 3 + self.counts["open"]
        self.accesses[fd] = flags & os.O_ACCMODE
        return fd

    def close(self, fd: int) -> None:
        del self.accesses[fd]
        self.locked.discard(fd)

    def pread(self, fd: int, count: int, offset: int) -> bytes:
        self._count("pread")
        assert self.accesses[fd] in (os.O_RDONLY, os.O_RDWR)
        return bytes(self.flash[offset : offset + min(count, self.most_at_once)])

    def pwrite(self, fd: int, content: bytes, offset: int) -> int:
        self._count("pwrite")
        assert self.accesses[fd] == os.O_RDWR
        assert offset % self.writesize == 0 and len(content) % self.writesize == 0, (offset, len(content))
        content = content[: self.most_at_once]
        for place, byte in enumerate(content, offset):
            self.flash[place] &= byte
        return len(content)

    def flock(self, fd: int) -> None:
        if self.locked:
            raise BlockingIOError(errno.EWOULDBLOCK, "locked")
        self.locked.add(fd)

    def ioctl(self, fd: int, request: int, argument: bytes) -> bytes:
        self._count(f"ioctl {request:#x}")
        if request == MEMGETINFO:
            info = (self.kind, self.flags, len(self.flash), self.erasesize, self.writesize, 0, 0)
            return struct.pack("=BxxxIIIIIQ", *info)
        assert request == MEMERASE and self.accesses[fd] == os.O_RDWR
        start, length = struct.unpack("=II", argument)
        assert start % self.erasesize == 0 and length % self.erasesize == 0
        assert start + length <= len(self.flash)
        self.flash[start : start + length] = b"\xff" * length
        return argument


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
@pytest.mark.parametrize(
    ("size", "erasesize", "writesize"),
    [(16384, 4096, 1), (262144, 65536, 1), (65536, 512, 16), (4 * 4224, 528, 264)],
    ids=["sectors", "blocks", "small-sectors", "dataflash"],
)
def test_the_store_contract_holds_on_nor(
    rule: Callable[[Callable[[], MtdStore]], None], size: int, erasesize: int, writesize: int
) -> None:
    partition = Partition(size, erasesize, writesize)
    rule(lambda: MtdStore(PATH, partition))
    assert not partition.accesses, "a descriptor stayed open"


@pytest.mark.parametrize(
    ("machine", "get_info", "erase"),  # as strace shows them there
    [
        *((machine, 0x80204D01, 0x40084D02) for machine in ("x86_64", "i686", "armv7l", "aarch64", "riscv64", "s390x")),
        *((machine, 0x40204D01, 0x80084D02) for machine in ("mips", "mips64", "ppc", "ppc64le", "sparc64", "alpha")),
        ("parisc", 0x40204D01, 0x80084D02),
    ],
)
def test_the_requests_are_those_of_the_kernel(machine: str, get_info: int, erase: int) -> None:
    assert read_request("M", 1, struct.calcsize("=BxxxIIIIIQ"), machine) == get_info
    assert write_request("M", 2, struct.calcsize("=II"), machine) == erase
    if machine == platform.machine():
        assert (get_info, erase) == (MEMGETINFO, MEMERASE)


def refusal(action: Callable[[], object]) -> DpsError:
    with pytest.raises((AskOperator, RetryLater)) as caught:
        action()
    return caught.value


@pytest.mark.parametrize("kind", NAND)
def test_nand_is_refused_and_ubi_is_named(kind: int) -> None:
    partition = Partition(kind=kind)
    for action in (
        lambda: MtdStore(PATH, partition).load(IDENTITY),
        lambda: MtdStore(PATH, partition).commit(IDENTITY, b"x"),
        lambda: MtdStore(PATH, partition).erase(IDENTITY),
    ):
        error = refusal(action)
        assert error.code == "store.unsuitable" and "NAND" in error.message and "UBI" in error.message
    assert partition.flash == b"\xff" * len(partition.flash)


def test_a_partition_that_is_too_small_says_what_it_needs() -> None:
    error = refusal(lambda: MtdStore(PATH, Partition(65536, 65536)).load(IDENTITY))
    assert error.code == "store.unsuitable" and "262144" in error.message


def test_what_is_no_flash_is_refused() -> None:
    error = refusal(lambda: MtdStore("/dev/null").load(IDENTITY))
    assert error.code == "store.unsuitable" and "/dev/null is no MTD" in error.message
    assert refusal(lambda: MtdStore(PATH, Partition(kind=7)).load(IDENTITY)).code == "store.unsuitable"
    assert refusal(lambda: MtdStore("/dev/no-such-partition").load(IDENTITY)).code == "store.denied"


def test_a_partition_marked_read_only_can_be_read() -> None:
    partition = Partition()
    MtdStore(PATH, partition).commit(IDENTITY, b"hub A")
    partition.flags = 0
    assert payload_of(MtdStore(PATH, partition)) == b"hub A"
    assert refusal(lambda: MtdStore(PATH, partition).commit(IDENTITY, b"hub B")).code == "store.read_only"


@pytest.mark.parametrize("call", ["pwrite", f"ioctl {MEMERASE:#x}"])
@pytest.mark.parametrize(("number", "code"), [(errno.EIO, "store.io"), (errno.EROFS, "store.read_only")])
def test_a_failing_chip_is_reported_and_the_old_record_stays(call: str, number: int, code: str) -> None:
    partition = Partition()
    for payload in (b"older", b"old"):
        MtdStore(PATH, partition).commit(IDENTITY, payload)
    for _ in range(3):
        partition.failing = {call: number}
        assert refusal(lambda: MtdStore(PATH, partition).commit(IDENTITY, b"new")).code == code
        partition.failing = {}
        assert payload_of(MtdStore(PATH, partition)) == b"old"
    MtdStore(PATH, partition).commit(IDENTITY, b"new")
    assert payload_of(MtdStore(PATH, partition)) == b"new"


@pytest.mark.parametrize("number", [errno.EIO, errno.EBADMSG], ids=errno.errorcode.get)
def test_a_block_that_cannot_be_read_is_a_damaged_copy_and_the_next_commit_goes_over_it(number: int) -> None:
    for slot, left in ((0, b"hub B"), (1, b"hub A")):
        partition = Unreadable(number)
        for payload in (b"hub A", b"hub B"):
            MtdStore(PATH, partition).commit(IDENTITY, payload)
        partition.bad = {slot * 4096}
        found = MtdStore(PATH, partition).load(IDENTITY)
        assert found is not None and found.payload == left and found.rolled_back
        MtdStore(PATH, partition).commit(IDENTITY, b"hub C")
        assert not partition.bad and payload_of(MtdStore(PATH, partition)) == b"hub C"


class Unreadable(Partition):
    """A partition with blocks that give an error of this number until they are erased."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number
        self.bad: set[int] = set()

    def pread(self, fd: int, count: int, offset: int) -> bytes:
        if count and offset in self.bad:
            raise OSError(self.number, os.strerror(self.number))
        return super().pread(fd, count, offset)

    def ioctl(self, fd: int, request: int, argument: bytes) -> bytes:
        if request == MEMERASE:
            self.bad.discard(struct.unpack("=II", argument)[0])
        return super().ioctl(fd, request, argument)


def test_an_error_of_what_is_done_under_the_lock_is_not_the_stores() -> None:
    partition = Partition()
    with pytest.raises(FileNotFoundError, match="something of the caller's"), MtdStore(PATH, partition).exclusive():
        raise FileNotFoundError(errno.ENOENT, "something of the caller's")
    assert not partition.locked and not partition.accesses


def test_a_second_writer_is_told_so() -> None:
    partition = Partition()
    partition.locked.add(99)
    assert refusal(lambda: MtdStore(PATH, partition).commit(IDENTITY, b"x")).code == "store.locked"


def test_short_reads_and_writes_are_continued() -> None:
    partition = Partition()
    partition.most_at_once = 100
    for payload in (b"x" * 1000, b"y" * 1001):
        MtdStore(PATH, partition).commit(IDENTITY, payload)
        assert payload_of(MtdStore(PATH, partition)) == payload


def test_a_commit_erases_one_slot_and_touches_no_other_block() -> None:
    partition = Partition(5 * 65536, 65536)
    partition.flash[4 * 65536 :] = b"\x5a" * 65536
    for number in range(3):
        MtdStore(PATH, partition).commit(IDENTITY, b"hub %d" % number)
        MtdStore(PATH, partition).commit(PROGRESS, b"attempt %d" % number)
    assert partition.counts[f"ioctl {MEMERASE:#x}"] == 6 and partition.counts["pwrite"] == 6
    assert partition.flash[4 * 65536 :] == b"\x5a" * 65536


def test_the_setting_chooses_the_store() -> None:
    assert isinstance(open_store("/dev/mtd3"), MtdStore)
    for folder in ("/var/lib/dps-agent", "/dev/shm/state"):
        assert isinstance(open_store(folder), FileStore)
