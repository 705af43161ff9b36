"""A Linux file system in memory, as the file store's system calls, that loses power or fails at the n-th call.

The model is what POSIX promises and no more: content is durable by fsync of the file, a name by fsync of its folder.
Until then each write and each name may be there or not, on its own; a write may be torn after any sector or byte, have
left garbage in the sector that was under way, have left that sector so that it cannot be read until it is written again
as a whole, or have lengthened the file without its content. A failed fsync, or a
failed write-back of the kernel's own (`forget`), leaves the content in the cache as if it were clean: what of it is on
the disk, nobody knows (`certain` tells the ways), no fsync changes that, and the cache shows it until it is dropped.
`support.disk.disk_cuts` sweeps it.
"""

import errno
import os
from collections.abc import Iterator
from copy import deepcopy
from functools import cache
from itertools import count, product

from dps_hal.host.files import Mark, SystemCalls
from support.disk.flash import SECTOR_BYTES, WHAT_POWER_LEAVES, PowerCut, readable

Tree = dict[str, bytes | None]  # absolute path -> content, None for a folder
_TEARS = (1, 4, 8, 12, 15, 16, 19, 20, 22, 24, 100, 512, 1024, 1536)
_TORN_SECTORS = (0, SECTOR_BYTES)  # of a write's sectors the first, which has the header, and the one behind it
_FOLDERS = ("/", "/var", "/var/lib")
_numbers = count(1)
_parent = cache(os.path.dirname)


class Inode:
    """A file or folder: what may be durable, and the writes since."""

    def __init__(self, content: bytes | None) -> None:
        self.number = next(_numbers)
        self.changes = 0  # stands for the time of the last one
        self.is_folder = content is None
        self.cached = content or b""
        self.durable = {self.cached}
        self.pending: list[tuple[int, bytes]] = []

    def __deepcopy__(self, memo: object) -> "Inode":
        """Contents never change, so that the copy shares them: sweeps make hundreds of thousands."""
        inode = Inode.__new__(Inode)
        inode.__dict__.update(self.__dict__)
        inode.durable, inode.pending = set(self.durable), list(self.pending)
        return inode

    def store(self) -> None:
        """The writes become durable."""
        for offset, part in self.pending:
            self.durable = {_written(content, offset, part) for content in self.durable}
        self.pending.clear()

    def forget(self) -> None:
        """The writes fail, all of them or the later part; the cache shows them."""
        failed, cut_short = set(self.durable), set(self.durable)
        for offset, part in self.pending:
            failed |= {_written(content, offset, part[:512]) for content in cut_short}
            cut_short = {_written(content, offset, part) for content in cut_short}
        self.durable = failed | cut_short
        self.pending.clear()

    def contents_after_a_cut(self) -> set[bytes]:
        """Every content that may be left."""
        left = set()
        chosen_ones = product((False, True), repeat=len(self.pending))
        for durable, chosen in product(self.durable, chosen_ones):
            content = durable
            survivors = [write for write, survives in zip(self.pending, chosen, strict=True) if survives]
            for offset, part in survivors[:-1]:
                content = _written(content, offset, part)
            left.add(content)
            for offset, part in survivors[-1:]:
                left.add(_written(content, offset, part))
                left.update(_written(content, offset, part[:tear]) for tear in _TEARS)
                left.add(_written(content, offset + 512, part[512:]))
                left.update(
                    _with_sector(content, offset, part, start, sector)
                    for start, sector in product(_TORN_SECTORS, WHAT_POWER_LEAVES)
                )
                left.add(content + bytes(max(0, offset + len(part) - len(content))))
        return left


class SimulatedDisk(SystemCalls):
    """See the module; `cut_at` counts calls that change something, from 1; 0 is never. `failing` is (n-th call, errno).

    `failing_syncs` are those fsyncs, counted from 1, that fail with EIO, `missing_syncs` those that nobody makes.
    `room_bytes` is how much all files may grow; None: without end.
    """

    def __init__(self, tree: Tree | None = None) -> None:
        self._inodes = {path: Inode(content) for path, content in (tree or dict.fromkeys(_FOLDERS)).items()}
        self._durable_names = set(self._inodes)
        self._descriptors: dict[int, str] = {}
        self._next_descriptor = 3
        self._locks: set[int] = set()
        self.calls = 0
        self.changes = 0
        self.cut_at = 0
        self.failing = (0, 0)
        self.failing_syncs: tuple[int, ...] = ()
        self.missing_syncs: tuple[int, ...] = ()
        self.room_bytes: int | None = None
        self.counts: dict[str, int] = {}
        self.chowned: list[tuple[str, int, int]] = []
        self.user = 1000
        self.owner_of_all = (1000, 1000)

    def __deepcopy__(self, memo: object) -> "SimulatedDisk":
        """As `Inode` has it."""
        disk = type(self).__new__(type(self))
        disk.__dict__.update(self.__dict__)
        disk._inodes = {path: deepcopy(inode) for path, inode in self._inodes.items()}
        disk._durable_names, disk._locks = set(self._durable_names), set(self._locks)
        disk._descriptors, disk.counts, disk.chowned = dict(self._descriptors), dict(self.counts), list(self.chowned)
        return disk

    def open_descriptors(self) -> int:
        """How many descriptors nobody has closed."""
        return len(self._descriptors)

    def copy(self, cut_at: int = 0) -> "SimulatedDisk":
        """The same disk and cache, after every process on it was killed; then cut at `cut_at`."""
        disk = deepcopy(self)
        disk._descriptors.clear()
        disk._locks.clear()
        disk.count_anew(cut_at)
        return disk

    def count_anew(self, cut_at: int = 0) -> None:
        """From now on calls, changes and syncs count from 1 again, and nothing but the cut is planned."""
        self.counts.clear()
        self.calls = self.changes = 0
        self.cut_at = cut_at
        self.failing = (0, 0)
        self.failing_syncs = self.missing_syncs = ()

    def forget(self) -> None:
        """The kernel's own write-back fails; the next fsync does not know of it."""
        for inode in self._inodes.values():
            inode.forget()

    def certain(self) -> Iterator["SimulatedDisk"]:
        """This disk in each way in which writes that failed may have left it; all show the same."""
        for way in self.ways():
            disk = deepcopy(self)
            disk.choose(way)
            yield disk

    def ways(self) -> "list[tuple[tuple[str, bytes], ...]]":
        """What writes that failed may have left, for `choose`."""
        unsure = {path: inode.durable for path, inode in sorted(self._inodes.items()) if len(inode.durable) > 1}
        return [tuple(zip(unsure, contents, strict=True)) for contents in product(*map(sorted, unsure.values()))]

    def choose(self, way: "tuple[tuple[str, bytes], ...]") -> None:
        """Makes one of `ways` the one that is so."""
        for path, content in way:
            self._inodes[path].durable = {content}

    def aftermaths(self, focus: str = "") -> list[Tree]:
        """Every file tree that may be left when the power goes now, none twice.

        One sector at most becomes unreadable: that which was under way.
        Of files whose name does not begin with `focus` only what is durable and what is cached.
        """
        paths = sorted(self._inodes)
        choices: list[list[tuple[str, bytes | None] | None]] = []
        for path in paths:
            inode = self._inodes[path]
            left: list[tuple[str, bytes | None] | None] = [None] if path not in self._durable_names else []
            if inode.is_folder:
                left.append((path, None))
            else:
                is_looked_at = os.path.basename(path).startswith(focus)
                contents = inode.contents_after_a_cut() if is_looked_at else {*inode.durable, inode.cached}
                left.extend((path, content) for content in sorted(contents))
            choices.append(left)
        trees: dict[tuple[tuple[str, bytes | None], ...], Tree] = {}
        were = {path for path, inode in self._inodes.items() if any(readable(one) is None for one in inode.durable)}
        for chosen in product(*choices):
            if sum(1 for one in chosen if one and one[1] and one[0] not in were and readable(one[1]) is None) > 1:
                continue
            tree: Tree = {}
            for entry in chosen:
                if entry is not None and (entry[0] == "/" or _parent(entry[0]) in tree):
                    tree[entry[0]] = entry[1]
            trees[tuple(tree.items())] = tree
        return list(trees.values())

    def open(self, path: str, flags: int, mode: int = 0) -> int:
        """open(2)."""
        self._fail("open")
        inode = self._inodes.get(path)
        if inode is None:
            if not flags & os.O_CREAT or _parent(path) not in self._inodes:
                raise FileNotFoundError(errno.ENOENT, "no such file", path)
            self._make(path, b"")
        elif flags & os.O_EXCL:
            raise FileExistsError(errno.EEXIST, "exists", path)
        self._next_descriptor += 1
        self._descriptors[self._next_descriptor] = path
        return self._next_descriptor

    def close(self, fd: int) -> None:
        """close(2)."""
        del self._descriptors[fd]
        self._locks.discard(fd)
        self._fail("close")

    def pread(self, fd: int, count: int, offset: int) -> bytes:
        """pread(2)."""
        self._fail("pread")
        content = readable(self._inode(fd).cached[offset : offset + count])
        if content is None:
            raise OSError(errno.EIO, "a sector in which power went")
        return content

    def pwrite(self, fd: int, content: bytes, offset: int) -> int:
        """pwrite(2)."""
        self._fail("pwrite")
        inode = self._inode(fd)
        if self.room_bytes is not None:
            growth = max(0, offset + len(content) - len(inode.cached))
            if growth and not self.room_bytes:
                raise OSError(errno.ENOSPC, "as the test asked")
            content = content[: len(content) - max(0, growth - self.room_bytes)]
            self.room_bytes -= min(growth, self.room_bytes)
        cached = _written(inode.cached, offset, content)
        if readable(cached) is None:
            raise OSError(errno.EIO, "what shares a block with it cannot be read")
        inode.pending.append((offset, content))
        inode.cached = cached
        inode.changes += 1
        self._spend()
        return len(content)

    def fsync(self, fd: int) -> None:
        """fsync(2)."""
        inode = self._inode(fd)
        try:
            self._fail("fsync")
            if self.counts["fsync"] in self.failing_syncs:
                raise OSError(errno.EIO, "as the test asked")
        except OSError:
            inode.forget()
            raise
        self._spend()
        if self.counts["fsync"] in self.missing_syncs:
            return
        if inode.is_folder:
            self._durable_names.update(path for path in self._inodes if _parent(path) == self._descriptors[fd])
        inode.store()

    def drop_cache(self, fd: int) -> None:
        """posix_fadvise(2); of a disk that is not `certain` the one that comes first."""
        self._fail("drop_cache")
        inode = self._inode(fd)
        if not inode.pending:
            inode.cached = min(inode.durable)
            inode.durable = {inode.cached}

    def flock(self, fd: int) -> None:
        """flock(2)."""
        self._fail("flock")
        if any(self._descriptors[held] == self._descriptors[fd] for held in self._locks):
            raise BlockingIOError(errno.EWOULDBLOCK, "locked")
        self._locks.add(fd)

    def file_size(self, fd: int) -> int:
        """fstat(2)."""
        self._fail("file_size")
        return len(self._inode(fd).cached)

    def mark(self, place: int | str) -> Mark:
        """fstat(2) and stat(2)."""
        self._fail("mark")
        inode = self._inode(place) if isinstance(place, int) else self._inodes[place]
        return 0, inode.number, inode.changes

    def owner(self, path: str) -> tuple[int, int]:
        """stat(2)."""
        self._fail("owner")
        if path not in self._inodes:
            raise FileNotFoundError(errno.ENOENT, "no such file", path)
        return self.owner_of_all

    def fchown(self, fd: int, user: int, group: int) -> None:
        """fchown(2)."""
        self._fail("fchown")
        self.chowned.append((self._descriptors[fd], user, group))

    def mkdir(self, path: str, mode: int) -> None:
        """mkdir(2)."""
        self._fail("mkdir")
        there, possible = path in self._inodes, _parent(path) in self._inodes
        if possible and not there:
            self._make(path, None)
        if there:
            raise FileExistsError(errno.EEXIST, "exists", path)
        if not possible:
            raise FileNotFoundError(errno.ENOENT, "no such folder", path)

    def geteuid(self) -> int:
        """geteuid(2)."""
        return self.user

    def empty(self, folder: str) -> None:
        """Somebody removes, durably, all that is in a folder."""
        for path in [path for path in self._inodes if _parent(path) == folder]:
            del self._inodes[path]
            self._durable_names.discard(path)
            self._inodes[folder].changes += 1

    def replace(self, folder: str) -> None:
        """Somebody puts a copy in a folder's place; neither its name is durable then, nor what is in it."""
        copied = {path: inode.cached for path, inode in self._inodes.items() if _parent(path) == folder}
        self.empty(folder)
        self._durable_names.discard(folder)
        self._inodes[folder] = Inode(None)
        for path, content in copied.items():
            self._inodes[path] = Inode(b"")
            self._inodes[path].pending.append((0, content))
            self._inodes[path].cached = content

    def _make(self, path: str, content: bytes | None) -> None:
        self._inodes[path] = Inode(content)
        self._inodes[_parent(path)].changes += 1
        self._spend()

    def _inode(self, fd: int) -> Inode:
        return self._inodes[self._descriptors[fd]]

    def _fail(self, name: str) -> None:
        self.calls += 1
        self.counts[name] = self.counts.get(name, 0) + 1
        if self.calls == self.failing[0]:
            raise OSError(self.failing[1], "as the test asked")

    def _spend(self) -> None:
        self.changes += 1
        if self.changes == self.cut_at:
            raise PowerCut(f"cut={self.cut_at}")


def _with_sector(content: bytes, offset: int, part: bytes, start: int, sector: bytes) -> bytes:
    """The part torn in the sector that begins at `start`, counted from that in which the part begins."""
    begin = offset // SECTOR_BYTES * SECTOR_BYTES + start
    end = min(begin + SECTOR_BYTES, max(len(content), offset + len(part)))
    before = _written(content, offset, part[: max(0, begin - offset)])
    return _written(before, begin, sector[: max(0, end - begin)])


def _written(content: bytes, offset: int, part: bytes) -> bytes:
    if not part:
        return content
    content = content.ljust(offset, b"\x00")
    return content[:offset] + part + content[offset + len(part) :]
