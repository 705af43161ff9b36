"""The record store on a Linux file system: two files of one slot each per record, in a folder of the agent's own.

Every system call goes through one `SystemCalls` object, so that tests can count, fail and cut each of them. Why two
files, written in place: `hal/SPEC.md`.
"""

import errno
import fcntl
import os
import pwd
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress

from dps_hal.contracts import CERTIFICATE, IDENTITY, PROGRESS
from dps_hal.errors import AskOperator, DpsError, RetryLater
from dps_hal.host.mounts import LOCKLESS, kind_of
from dps_hal.host.regular import NotRegular, refuse_special
from dps_hal.store.slots import DAMAGED, VALID, SlotStore, decode_slot

LOCK_NAME = "lock"
_FILE_MODE = 0o600
_FOLDER_MODE = 0o700
# O_NONBLOCK: a FIFO under one of our names must not hold us up.
_GUARDS = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
_NOT_OFFERED = (errno.ENOSYS, errno.EOPNOTSUPP)  # network file systems and some in user space answer so
# The medium does not give what is there. EIO is what most file systems say then; ENODATA is the block layer's word for
# a medium's error, EBADMSG that of an ECC or a checksum, EUCLEAN that of a file system for its own structures.
_UNREADABLE = (errno.EIO, errno.ENODATA, errno.EBADMSG, errno.EUCLEAN)
_NOT_A_FILE = (errno.ELOOP, errno.EISDIR, errno.ESPIPE, errno.ENXIO)


# st_dev, st_ino and st_ctime_ns: number and time of the last change. A number alone says too little, because the next
# file that is made may get that of one that was removed.
Mark = tuple[int, int, int]


class SystemCalls:
    """The system calls of the file store, one method each; failures are OSError."""

    def open(self, path: str, flags: int, mode: int = 0) -> int:
        """open(2); returns the file descriptor. With O_NOFOLLOW it is that of a regular file, for root's writes with

        no second name: whoever owns the folder may have given another's file a name in it. Else NotRegular.
        """
        fd = os.open(path, flags, mode)
        if flags & os.O_NOFOLLOW:
            try:
                refuse_special(os.fstat(fd), path, flags & os.O_RDWR != 0)
            except BaseException:
                os.close(fd)
                raise
        return fd

    def close(self, fd: int) -> None:
        """close(2)."""
        os.close(fd)

    def pread(self, fd: int, count: int, offset: int) -> bytes:
        """pread(2)."""
        return os.pread(fd, count, offset)

    def pwrite(self, fd: int, content: bytes, offset: int) -> int:
        """pwrite(2); returns how many bytes it took."""
        return os.pwrite(fd, content, offset)

    def fsync(self, fd: int) -> None:
        """fsync(2), of a file or a folder."""
        os.fsync(fd)

    def drop_cache(self, fd: int) -> None:
        """posix_fadvise(2), POSIX_FADV_DONTNEED: the next read asks the disk; of what is not synced nothing goes."""
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def flock(self, fd: int) -> None:
        """flock(2) with LOCK_EX | LOCK_NB; the lock ends with the descriptor."""
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def file_size(self, fd: int) -> int:
        """st_size of fstat(2), in bytes."""
        return os.fstat(fd).st_size

    def mark(self, place: int | str) -> "Mark":
        """What fstat(2) of a descriptor, or stat(2) of a path, says of which file or folder that is, and since when."""
        status = os.stat(place)
        return status.st_dev, status.st_ino, status.st_ctime_ns

    def owner(self, path: str) -> tuple[int, int]:
        """User and group number of stat(2)."""
        status = os.stat(path)
        return status.st_uid, status.st_gid

    def fchown(self, fd: int, user: int, group: int) -> None:
        """fchown(2)."""
        os.fchown(fd, user, group)

    def mkdir(self, path: str, mode: int) -> None:
        """mkdir(2)."""
        os.mkdir(path, mode)

    def geteuid(self) -> int:
        """geteuid(2)."""
        return os.geteuid()

    def ioctl(self, fd: int, request: int, argument: bytes) -> bytes:
        """ioctl(2); returns the argument as the kernel left it."""
        return fcntl.ioctl(fd, request, argument)


class StateFolder:
    """The folder with the records' files: opens them, makes them, and says what went wrong.

    The folder itself may be a symbolic link (systemd's DynamicUser makes it one); the names in it may not.

    It also knows what this process has made durable, so that nothing is synced twice. A file is as it was known only
    while it is the same one, unchanged, with the same content: another process may have written to it, or put another
    file in its place, and may have been killed before its sync. So it is with the folder and the names in it.
    """

    def __init__(self, path: str, calls: SystemCalls) -> None:
        self.path = os.path.abspath(path)
        self.calls = calls
        self.on_disk: dict[str, tuple[Mark, bytes]] = {}  # name -> file and content as a sync of this process left them
        self._names_durable: Mark | None = None  # the folder as it was when this process synced the names in it
        self._place: tuple[int, int] | None = None  # st_dev and st_ino of a folder whose own name is durable

    def open(self, name: str, access: int) -> int | None:
        """A descriptor of an existing file, or None where there is none."""
        path = os.path.join(self.path, name)
        try:
            return self.calls.open(path, access | _GUARDS)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self.failure(error, "open", path) from error

    def open_or_create(self, name: str) -> int:
        """A descriptor for reading and writing; a file that root makes belongs to the folder's owner."""
        fd = self.open(name, os.O_RDWR)
        if fd is not None:
            return fd
        path = os.path.join(self.path, name)
        self._names_durable = None
        with self.reporting("create", path):
            try:
                fd = self.calls.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | _GUARDS, _FILE_MODE)
            except FileExistsError:  # another process was faster
                return self.calls.open(path, os.O_RDWR | _GUARDS)
            try:
                if self.calls.geteuid() == 0:
                    self.calls.fchown(fd, *self.calls.owner(self.path))
            except BaseException:
                self.close(fd)
                raise
        return fd

    def close(self, fd: int) -> None:
        """Closes a descriptor; what could be lost by then, fsync has already reported."""
        with suppress(OSError):
            self.calls.close(fd)

    def exists(self) -> bool:
        """Whether the folder is there."""
        return self._owner(self.path) is not None

    def make(self) -> None:
        """Makes the folder, 0700, and those above it that are missing; durable on return."""
        missing = [self.path]
        while self._owner(missing[-1]) is None:
            missing.append(os.path.dirname(missing[-1]))
        missing.pop()
        for path in reversed(missing):
            with self.reporting("create", path):
                with suppress(FileExistsError):  # another process was faster
                    self.calls.mkdir(path, _FOLDER_MODE)
                self.sync_folder(os.path.dirname(path))
        if not missing:
            self._sync_own_name()  # a process that made the folder may have died before the line above

    def sync_names(self) -> None:
        """Makes the names in the folder durable, unless this process has done so and nobody has changed any since.

        Where it is another folder than before its own name is made durable as well.
        """
        with self.reporting("sync", self.path):
            mark = self.calls.mark(self.path)
            if mark == self._names_durable:
                return
            if self._place not in (None, mark[:2]):
                self._sync_own_name()
            self.sync_folder(self.path)
        self._names_durable, self._place = mark, mark[:2]

    def doubt(self) -> None:
        """Something failed: from now on the disk is asked again for everything."""
        self.on_disk.clear()
        self._names_durable = None

    def forget_what_anybody_writes(self) -> None:
        """Gives up what is known of files without a payload, for one that is erased looks like any other.

        Another process may have written to such a file and erased it again, and the disk may have the first alone.
        """
        for name, (_, content) in list(self.on_disk.items()):
            if decode_slot(content, FileSlots.erase_value).state != VALID:
                del self.on_disk[name]

    def _sync_own_name(self) -> None:
        """Where somebody else made the folder we may not be allowed to open what holds it, and need not."""
        above = os.path.dirname(self.path)
        try:
            self.sync_folder(above)
        except PermissionError:
            pass
        except OSError as error:
            raise self.failure(error, "sync", above) from error

    @contextmanager
    def reporting(self, action: str, path: str) -> Iterator[None]:
        """Turns an OSError of the block into one of the store's errors."""
        try:
            yield
        except OSError as error:
            raise self.failure(error, action, path) from error

    def failure(self, error: OSError, action: str, path: str) -> DpsError:
        """The store's error for `error`, raised while doing `action` to `path`."""
        # ENOLCK alone says nothing of what is offered: memory may be short, or the lock service of an NFS server away.
        lockless = error.errno == errno.ENOLCK and kind_of(self.path) in LOCKLESS
        if lockless or error.errno in _NOT_OFFERED or (error.errno == errno.EINVAL and action in ("sync", "lock")):
            return AskOperator(
                "store.unsuitable",
                f"cannot {action} {path}: {error.strerror}: the file system there does not offer that, so it cannot"
                " keep records: let state_dir name a folder on a disk or flash of this machine, such as one with ext4",
            )
        advice = ""
        if error.errno in (errno.EACCES, errno.EPERM):
            advice = self._whose(path)
        elif isinstance(error, NotRegular):
            advice = "remove it"
        elif error.errno in _NOT_A_FILE:
            advice = "it is no regular file: remove it"
        elif error.errno == errno.ENOTDIR:
            advice = "name a folder in state_dir"
        return storage_failure(error, f"cannot {action} {path}", advice)

    def _whose(self, path: str) -> str:
        """Who owns `path`, or the nearest folder above it that may be looked at, and what to run."""
        owner = None
        while owner is None:
            try:
                owner = self.calls.owner(path)
            except OSError:
                if path == "/":
                    return "ask the owner of the folder"
                path = os.path.dirname(path)
        us = self.calls.geteuid()
        theirs, ours = user_name(owner[0]), user_name(us)
        if owner[0] == us:
            return f"{path} belongs to {theirs}, who this is: look at its mode and its security labels"
        hand_over = f"sudo chown -R {ours} {self.path}"
        if not path.startswith(self.path):
            hand_over = f"sudo install -d -o {ours} -m 0700 {self.path}"
        as_owner = theirs if theirs != str(owner[0]) else f"'#{theirs}'"
        return (
            f"{path} belongs to user {theirs} and this is {ours}: run it as the owner"
            f" (sudo -u {as_owner} dps-agent ...), or make the folder yours ({hand_over})"
        )

    def _owner(self, path: str) -> tuple[int, int] | None:
        with self.reporting("look at", path):
            try:
                return self.calls.owner(path)
            except FileNotFoundError:
                return None

    def sync_folder(self, path: str) -> None:
        """Makes the names in a folder durable, where its file system can; OSError."""
        fd = self.calls.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self.calls.fsync(fd)
        except OSError as error:
            if error.errno != errno.EINVAL:  # EINVAL: this file system has no fsync for folders
                raise
        finally:
            self.close(fd)


def storage_failure(error: OSError, what: str, advice: str = "") -> DpsError:
    """The store's error for `error`: `what` could not be done, `advice` says what to do where somebody must."""
    reason = error.strerror if isinstance(error, NotRegular) else os.strerror(error.errno) if error.errno else error
    text = f"{what}: {reason}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return RetryLater("store.full", text)
    if error.errno == errno.EROFS:
        return AskOperator("store.read_only", text)
    if advice:
        return AskOperator("store.denied", f"{text}; {advice}")
    return RetryLater("store.io", text)


def is_unreadable(error: DpsError) -> bool:
    """Whether an error of the store, raised from an OSError, says that the medium does not give what is there."""
    return isinstance(error.__cause__, OSError) and error.__cause__.errno in _UNREADABLE


CERTIFICATE_SLOT_BYTES = 20480  # of the record `certificate`: two chains


class FileSlots:
    """The `SlotDevice` of one record: files `{record}.0` and `{record}.1`, written in place."""

    slot_bytes = 4096
    erase_value = 0xFF

    def __init__(self, folder: StateFolder, record: str, slot_bytes: int = 4096) -> None:
        self.slot_bytes = slot_bytes
        self._folder = folder
        self._names = (f"{record}.0", f"{record}.1")
        self._written: dict[int, int] = {}  # slot -> descriptor, kept until sync: it is the one that hears of failures

    def read(self, slot: int) -> bytes | None:
        """See `SlotDevice.read`; empty where there is no file. Needs neither lock nor permission to write."""
        return self._marked(slot)[1]

    def _marked(self, slot: int) -> tuple[Mark | None, bytes | None]:
        """Which file the slot is, None without one, and its content, None where it cannot be read."""
        try:
            fd = self._folder.open(self._names[slot], os.O_RDONLY)
            if fd is None:
                return None, b""
            try:
                return self._all_of(fd, slot)
            finally:
                self._folder.close(fd)
        except RetryLater as error:
            if not is_unreadable(error):
                raise
            return None, None

    def _all_of(self, fd: int, slot: int) -> tuple[Mark, bytes]:
        calls = self._folder.calls
        content = b""
        with self._reporting("read", slot):
            mark = calls.mark(fd)
            while part := calls.pread(fd, self.slot_bytes - len(content), len(content)):
                content += part
        return mark, content

    def make_room(self) -> None:
        """Gives both files their whole size, durably, where they lack it; what they hold stays.

        From then on no write needs a new block, so that a full file system cannot stop one. A short file with a whole
        copy, as somebody may have put it back, is not written to before its turn comes: it may be the only one. Nor is
        one beside a file that cannot be read: power that goes may make a file unreadable, never both.
        """
        with self._closing_on_failure():
            for slot in (0, 1):
                self._written[slot] = self._folder.open_or_create(self._names[slot])
                with self._reporting("write", slot):
                    size = self._folder.calls.file_size(self._written[slot])
                    if size < self.slot_bytes and self._may_grow(slot):
                        self._write(slot, bytes([self.erase_value]) * (self.slot_bytes - size), size)
                        self._sync_file(slot)  # the names become durable with the commit that follows
        self._close()

    def erase(self, slot: int) -> None:
        """Overwrites what the file has; its blocks stay.

        One that is short and cannot be read becomes whole, for the kernel would have to read what shares a block with
        the end of what is written.
        """
        with self._closing_on_failure(), self._reporting("erase", slot):
            if self._is_open(slot):
                size = min(self._folder.calls.file_size(self._written[slot]), self.slot_bytes)
                if size < self.slot_bytes and self.read(slot) is None:
                    size = self.slot_bytes
                self._write(slot, bytes([self.erase_value]) * size)

    def settle(self, slot: int) -> None:
        """See `SlotDevice.settle`; nothing where this process has made the content durable before."""
        with self._closing_on_failure():
            if not self._is_on_disk(slot, self._marked(slot)) and self._is_open(slot):
                self.sync()

    def renew(self, slot: int) -> None:
        """See `SlotDevice.renew`; nothing where this process has made the content durable under the same lock."""
        with self._closing_on_failure(), self._reporting("write", slot):
            marked = self._marked(slot)
            content = bytes([self.erase_value]) * self.slot_bytes if marked[1] is None else marked[1]
            if content and not self._is_on_disk(slot, marked) and self._is_open(slot):
                self._write(slot, content)

    def program(self, slot: int, content: bytes) -> None:
        """See `SlotDevice.program`; what stays erased is written as well, so that the file keeps its size."""
        whole = content + bytes([self.erase_value]) * (self.slot_bytes - len(content))
        with self._closing_on_failure():
            if slot not in self._written:
                self._written[slot] = self._folder.open_or_create(self._names[slot])
            with self._reporting("write", slot):
                self._write(slot, whole)

    def sync(self) -> None:
        """Syncs the files, then the folder, for a file's name is durable only then; what is read next is on the disk.

        Not every file system and kernel drops its cache when asked; there reads show it as before.
        """
        with self._closing_on_failure():
            if self._written:
                for slot in sorted(self._written):
                    self._sync_file(slot)
                self._folder.sync_names()
        self._close()

    def _sync_file(self, slot: int) -> None:
        with self._reporting("sync", slot):
            self._folder.calls.fsync(self._written[slot])
        with suppress(OSError):
            self._folder.calls.drop_cache(self._written[slot])
        mark, content = self._marked(slot)
        if mark is not None and content is not None:
            self._folder.on_disk[self._names[slot]] = mark, content

    def _is_on_disk(self, slot: int, marked: tuple[Mark | None, bytes | None]) -> bool:
        return self._folder.on_disk.get(self._names[slot]) == marked

    def _may_grow(self, slot: int) -> bool:
        content, other = self.read(slot), self.read(1 - slot)
        return None not in (content, other) and decode_slot(content or b"", self.erase_value).state <= DAMAGED

    def _is_open(self, slot: int) -> bool:
        """Opens the file for writing; False where there is none."""
        if slot not in self._written:
            fd = self._folder.open(self._names[slot], os.O_RDWR)
            if fd is None:
                return False
            self._written[slot] = fd
        return True

    def _write(self, slot: int, content: bytes, offset: int = 0) -> None:
        self._folder.on_disk.pop(self._names[slot], None)
        done = 0
        while done < len(content):
            taken = self._folder.calls.pwrite(self._written[slot], content[done:], offset + done)
            if taken == 0:
                raise OSError(errno.EIO, "pwrite took nothing")
            done += taken

    def _reporting(self, action: str, slot: int) -> AbstractContextManager[None]:
        return self._folder.reporting(action, os.path.join(self._folder.path, self._names[slot]))

    @contextmanager
    def _closing_on_failure(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self._close()
            self._folder.doubt()
            raise

    def _close(self) -> None:
        while self._written:
            self._folder.close(self._written.popitem()[1])


class LockedStore(SlotStore):
    """A store that holds a lock for as long as a write lasts, or for longer; loading takes none."""

    _held = False

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Holds the lock over all of a block; RetryLater `store.locked` where another process has it.

        For who registers: what it commits at the end must not overwrite what another process committed meanwhile.
        """
        with self._lock():
            self._held = True
            try:
                yield
            finally:
                self._held = False

    def commit(self, record: str, payload: bytes) -> None:
        """See `Store.commit`."""
        with self._lock_for_write():
            super().commit(record, payload)

    def erase(self, record: str) -> None:
        """See `Store.erase`."""
        with self._lock_for_write():
            super().erase(record)

    def forget_older(self, record: str) -> None:
        """See `SlotStore.forget_older`."""
        with self._lock_for_write():
            super().forget_older(record)

    def _lock_for_write(self) -> AbstractContextManager[None]:
        return nullcontext() if self._held else self._lock()

    def _lock(self) -> AbstractContextManager[None]:
        raise NotImplementedError


def take_lock(calls: SystemCalls, fd: int, path: str) -> None:
    """Takes the lock of an open file without waiting; RetryLater `store.locked`, or OSError."""
    try:
        calls.flock(fd)
    except BlockingIOError as error:
        raise RetryLater("store.locked", f"another process is writing to {path}") from error


class FileStore(LockedStore):
    """The `Store` in a folder; loading needs no lock, writing takes one for as long as it lasts.

    RetryLater `store.locked`: another process is writing. The folder is made by the first commit, never by loading.
    """

    def __init__(self, folder: str, calls: SystemCalls | None = None) -> None:
        self._folder = StateFolder(folder, calls or SystemCalls())
        self._files = {record: FileSlots(self._folder, record) for record in (IDENTITY, PROGRESS)}
        self._certificates = FileSlots(self._folder, CERTIFICATE, CERTIFICATE_SLOT_BYTES)
        super().__init__({**self._files, CERTIFICATE: self._certificates})

    def commit(self, record: str, payload: bytes) -> None:
        """See `Store.commit`. The first one makes room for all records, but for `certificate`, which few devices have.

        So a registration, which begins with a commit of `progress`, ends at once where the identity would not fit.
        """
        with self._lock_for_write():
            self.load(record)  # a newer format stops here, before anything is written
            for files in self._files.values():
                files.make_room()
            if record == CERTIFICATE:
                self._certificates.make_room()
            SlotStore.commit(self, record, payload)

    def erase(self, record: str) -> None:
        """See `Store.erase`."""
        if self._folder.exists():
            super().erase(record)

    def forget_older(self, record: str) -> None:
        """See `SlotStore.forget_older`."""
        if self._folder.exists():
            super().forget_older(record)

    @contextmanager
    def _lock(self) -> Iterator[None]:
        fd = self._folder.open(LOCK_NAME, os.O_RDWR)
        if fd is None:
            self._folder.make()  # the lock comes after: where it is, the folder's own name is durable
            fd = self._folder.open_or_create(LOCK_NAME)
        try:
            with self._folder.reporting("lock", os.path.join(self._folder.path, LOCK_NAME)):
                take_lock(self._folder.calls, fd, self._folder.path)
            self._folder.forget_what_anybody_writes()
            yield
        finally:
            self._folder.close(fd)


def user_name(user: int) -> str:
    """What a user is called; the number where nobody is."""
    try:
        return pwd.getpwuid(user).pw_name
    except KeyError:
        return str(user)
