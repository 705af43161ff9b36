"""A disk that records every write and flush: one file of a FUSE file system behind a loop device.

The kernel's FUSE protocol (include/uapi/linux/fuse.h, version 7.31) is spoken here directly, since one regular file is
all that is needed: the root of the file system is the disk. It is served by a process of its own: one that served
itself could not be killed while it waits for its own answer. Everything is mounted in a mount namespace of these
processes alone, and every loop device detaches itself, so that nothing stays behind however they end. Needs root.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import multiprocessing
import os
import pickle
import select
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

DISK_BYTES = 4 << 20
SECTOR_BYTES = 512
BLOCK_BYTES = 1024  # of the file system
_SYSTEM_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"

# mount(2), umount2(2), unshare(2)
_MS_NOATIME, _MS_REC, _MS_PRIVATE = 0x400, 0x4000, 0x40000
_CLONE_NEWNS = 0x20000
# loop(4)
_LOOP_CTL_GET_FREE, _LOOP_CONFIGURE, _AUTOCLEAR = 0x4C82, 0x4C0A, 4
# FUSE operations
_GETATTR, _OPEN, _READ, _WRITE, _RELEASE, _FSYNC, _FLUSH, _INIT = 3, 14, 15, 16, 18, 20, 25, 26
_SETATTR, _FORGET, _INTERRUPT, _BATCH_FORGET = 4, 2, 36, 42
_DIRECT_IO = 1
_SPOILED = b"a sector of this cannot be read"  # in place of an answer
_MAX_PAGES = 1 << 22
_BIG_WRITES = 1 << 5
_MAX_WRITE = 1 << 20

_libc = ctypes.CDLL(None, use_errno=True)


class Unavailable(Exception):
    """This machine cannot record a disk; the text says what is missing."""


class Entry(NamedTuple):
    """What happened to the disk; a flush has no content, a mark no place either."""

    kind: str  # "write", "flush" or "mark"
    offset: int
    content: bytes
    mark: int  # how many steps of the writer were over


class RecordedDisk:
    """A disk with this content at first; what is done to it is recorded by the process that serves it."""

    def __init__(self, content: bytes) -> None:
        self._content = content

    @contextmanager
    def mounted_at(self, place: Path) -> Iterator[Path]:
        """The disk as a file; ends with everything unmounted."""
        place.touch()
        fork = multiprocessing.get_context("fork")
        fuse = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        self._link, servers = fork.Pipe()
        self._answer = os.memfd_create("answer", os.MFD_CLOEXEC)
        try:
            options = f"fd={fuse},rootmode=100600,user_id=0,group_id=0,max_read={_MAX_WRITE}"
            mount("recorded-disk", place, "fuse", 0, options)
            words = (self._content, fuse, place, servers, self._link, self._answer)
            server = fork.Process(target=_serve, args=words, name="recorded-disk", daemon=True)
            server.start()
        finally:
            os.close(fuse)  # the server's alone: when that ends, whoever waits for the disk has an error
            servers.close()
        try:
            yield place
        finally:
            unmount(place)
            server.join(10)
            server.kill()
            server.join()
            self._link.close()
            os.close(self._answer)

    def begin(self) -> bytes:
        """Forgets what was recorded; returns the disk's content."""
        content: bytes = self._ask("begin")
        return content

    def finished(self, step: int) -> None:
        """Notes that the writer's step `step` is over: what it wrote must last."""
        self._ask("finished", step)

    def spoil(self, sector: int) -> None:
        """From now on the sector at this offset cannot be read, until it is written."""
        self._ask("spoil", sector)

    def log(self) -> list[Entry]:
        """What was done to the disk since `begin`."""
        log: list[Entry] = self._ask("log")
        return log

    def _ask(self, *words: Any) -> Any:
        self._link.send(words)
        return pickle.loads(os.pread(self._answer, self._link.recv(), 0))


def _serve(content: bytes, fuse: int, place: Path, link: Connection, askers: Connection, answer: int) -> None:
    """The process: serves until the disk is unmounted, or until nobody is left who could ask.

    However it and its asker are killed, neither may wait for what nobody will do. So it has none of the asker's mounts:
    the kernel unmounts what a killed process leaves before it closes its files, and here its end of the disk is one of
    these. And an answer lies in the file `answer`, only its length goes over the link: whoever writes more than fits
    into a link waits for its reader, and one that was killed waits for the disk before it closes the link.
    """
    askers.close()
    own_mounts()
    unmount(place)
    disk = _Server(content, fuse)
    ready = select.poll()
    ready.register(fuse, select.POLLIN)
    ready.register(link, select.POLLIN)
    while True:
        events = [fd for fd, _ in ready.poll()]
        if fuse in events:
            try:
                disk.serve_one(os.read(fuse, _MAX_WRITE + 4096))
            except OSError as error:
                if error.errno == errno.ENODEV:  # unmounted
                    return
                if error.errno not in (errno.EINTR, errno.EAGAIN, errno.ENOENT):  # ENOENT: was interrupted
                    raise
        elif link.fileno() in events:
            try:
                told = pickle.dumps(disk.told(*link.recv()))
                os.pwrite(answer, told, 0)
                link.send(len(told))
            except (EOFError, ConnectionError):
                return


class _Server:
    """The disk itself, in memory, and what was done to it."""

    def __init__(self, content: bytes, fuse: int) -> None:
        self.content = bytearray(content)
        self.log: list[Entry] = []
        self.mark = 0
        self._spoiled: set[int] = set()
        self._fuse = fuse

    def told(self, what: str, step: int = 0) -> Any:
        """What a method of `RecordedDisk` asks for."""
        if what == "begin":
            self.log.clear()
            return bytes(self.content)
        if what == "finished":
            self.mark = step
            self.log.append(Entry("mark", 0, b"", step))
            return None
        if what == "spoil":
            self._spoiled.add(step)
            return None
        return self.log

    def serve_one(self, request: bytes) -> None:
        """Answers one request of the kernel's."""
        _, operation, unique, _, _, _, _, _ = struct.unpack("<IIQQIIII", request[:40])
        if operation in (_FORGET, _BATCH_FORGET, _INTERRUPT):
            return
        answer = self._answer(operation, request[40:])
        failure = -errno.ENOSYS if answer is None else 0
        if answer == _SPOILED:
            answer, failure = b"", -errno.EIO
        answer = answer or b""
        os.write(self._fuse, struct.pack("<IiQ", 16 + len(answer), failure, unique) + answer)

    def _answer(self, operation: int, body: bytes) -> bytes | None:
        if operation == _INIT:
            flags = _BIG_WRITES | _MAX_PAGES
            return struct.pack("<IIIIHHIIHHI28x", 7, 31, 1 << 17, flags, 16, 12, _MAX_WRITE, 1, _MAX_WRITE >> 12, 0, 0)
        if operation in (_GETATTR, _SETATTR):
            size = len(self.content)
            attributes = (1, size, size // SECTOR_BYTES, 0, 0, 0, 0, 0, 0, 0o100600, 1, 0, 0, 0, 4096, 0)
            return struct.pack("<QII", 1, 0, 0) + struct.pack("<QQQQQQIIIIIIIIII", *attributes)
        if operation == _OPEN:
            return struct.pack("<QII", 1, _DIRECT_IO, 0)
        if operation == _READ:
            _, offset, size = struct.unpack("<QQI", body[:20])
            if any(offset < sector + SECTOR_BYTES and sector < offset + size for sector in self._spoiled):
                return _SPOILED
            return bytes(self.content[offset : offset + size])
        if operation == _WRITE:
            _, offset, size = struct.unpack("<QQI", body[:20])
            content = body[40 : 40 + size]
            self.log.append(Entry("write", offset, content, self.mark))
            self.content[offset : offset + size] = content
            self._spoiled -= {
                sector for sector in self._spoiled if offset <= sector and sector + SECTOR_BYTES <= offset + size
            }
            return struct.pack("<II", size, 0)
        if operation == _FSYNC:
            self.log.append(Entry("flush", 0, b"", self.mark))
            return b""
        if operation in (_RELEASE, _FLUSH):
            return b""
        return None  # nothing that a disk needs


def refuse_unless_able() -> None:
    """Raises Unavailable, with everything that is missing."""
    missing = []
    if os.geteuid() != 0:
        missing.append("root (mounting ext4 needs it)")
    for device in ("/dev/fuse", "/dev/loop-control"):
        if not os.access(device, os.R_OK | os.W_OK):
            missing.append(f"{device}, readable and writable")
    if shutil.which("mkfs.ext4", path=_SYSTEM_PATH) is None:
        missing.append("mkfs.ext4 (package e2fsprogs)")
    if "ext4" not in Path("/proc/filesystems").read_text().split() and not missing:
        subprocess.run(["modprobe", "ext4"], check=False, capture_output=True, env={"PATH": _SYSTEM_PATH})
        if "ext4" not in Path("/proc/filesystems").read_text().split():
            missing.append("ext4 in the kernel")
    if missing:
        raise Unavailable("this needs " + ", ".join(missing))


def own_mounts() -> None:
    """From now on this thread's mounts are seen by this process alone, and end with it."""
    _check(_libc.unshare(_CLONE_NEWNS), "unshare")
    mount("none", Path("/"), "", _MS_REC | _MS_PRIVATE, "")


def mount(source: str, place: Path, kind: str, flags: int, options: str) -> None:
    """mount(2)."""
    _check(
        _libc.mount(source.encode(), os.fsencode(place), kind.encode(), ctypes.c_ulong(flags), options.encode()),
        f"mount {kind} at {place}",
    )


def unmount(place: Path) -> None:
    """umount2(2)."""
    _check(_libc.umount2(os.fsencode(place), 0), f"umount {place}")


def syncfs(fd: int) -> None:
    """syncfs(2): the file system writes all that it has, as any other process's sync would make it do."""
    _check(_libc.syncfs(fd), "syncfs")


@contextmanager
def loop_device(backing: int) -> Iterator[str]:
    """The path of a loop device over the open file `backing`; it goes when nothing uses it any more."""
    control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
    try:
        for _ in range(100):  # others may take the free one first
            path = f"/dev/loop{fcntl.ioctl(control, _LOOP_CTL_GET_FREE)}"
            try:
                loop = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            except FileNotFoundError:
                _make_node(path)
                loop = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            try:
                info = struct.pack("<QQQQQIIII180x", 0, 0, 0, 0, 0, 0, 0, 0, _AUTOCLEAR)
                fcntl.ioctl(loop, _LOOP_CONFIGURE, struct.pack("<II", backing, SECTOR_BYTES) + info + bytes(64))
                break
            except OSError as error:
                os.close(loop)
                if error.errno != errno.EBUSY:
                    raise
        else:
            raise Unavailable("no loop device is free")
    finally:
        os.close(control)
    try:
        yield path
    finally:
        os.close(loop)


def _make_node(path: str) -> None:
    """Where no udev makes the device node (containers)."""
    os.mknod(path, 0o60600, os.makedev(7, int(path.removeprefix("/dev/loop"))))


@contextmanager
def mounted_ext4(backing: int, place: Path) -> Iterator[Path]:
    """The ext4 in the open file `backing`, mounted at `place`; its journal is replayed."""
    with loop_device(backing) as device:
        mount(device, place, "ext4", _MS_NOATIME, "commit=300,noinit_itable")
    try:
        yield place
    finally:
        unmount(place)


def new_ext4() -> bytes:
    """The bytes of an empty ext4."""
    with tempfile.NamedTemporaryFile() as file:
        file.truncate(DISK_BYTES)
        command = ["mkfs.ext4", "-q", "-F", "-b", str(BLOCK_BYTES), "-J", "size=1", "-N", "64", "-m", "0"]
        command += ["-E", "nodiscard,lazy_itable_init=0,lazy_journal_init=0", file.name]
        subprocess.run(command, check=True, capture_output=True, timeout=60, env={"PATH": _SYSTEM_PATH})
        return Path(file.name).read_bytes()


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
