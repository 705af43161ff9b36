"""Opens and replaces files that somebody else may have put there: what is no regular file is named, nobody is held up.

A FIFO without a writer holds up who opens it, a device acts when it is opened, a link leads elsewhere, and a file may
be without end. Root's commands read in folders of the service's user, and the service reads what others left.
"""

import contextlib
import errno
import os
import stat

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

LINKS_LIMIT = 8
_FLAGS = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
_NULL_DEVICE = os.makedev(1, 3)  # Linux, Documentation/admin-guide/devices.txt
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFLNK: "a symbolic link",
}


class NotRegular(OSError):
    """What is at a path is not what may be read there; `strerror` says what it is."""

    def __init__(self, what: str, path: str) -> None:
        super().__init__(errno.EINVAL, what, path)


def read_regular(path: "str | os.PathLike[str]", limit_bytes: int, follow: bool = True) -> bytes:
    """The whole content of a regular file of at most `limit_bytes`; OSError, which for all else is NotRegular.

    The null device counts as an empty file. `follow` is as for `open_regular`.
    """
    with open(open_regular(path, follow), "rb") as file:
        content = file.read(limit_bytes + 1)
    if len(content) > limit_bytes:
        raise NotRegular(f"it has more than {limit_bytes} bytes", os.fspath(path))
    return content


def replace_file(path: str, content: bytes, mode: "int | None" = None) -> None:
    """Writes the file anew under another name and gives it its own; OSError, and then the former is whole.

    With a `mode` it is for a folder in memory. Without, mode and owner stay those that it had, and the content is on
    the disk before the name; whether the name is, is the caller's business.
    """

    def own(fd: int) -> None:
        if mode:
            os.fchmod(fd, mode)
        elif os.path.exists(path):
            former = os.stat(path)
            os.fchmod(fd, stat.S_IMODE(former.st_mode))
            if os.geteuid() == 0:
                os.fchown(fd, former.st_uid, former.st_gid)

    with written_beside(path, content, mode or 0o666, own, sync=not mode) as part:
        os.replace(part, path)


@contextlib.contextmanager
def written_beside(
    path: str, content: bytes, mode: int, own: "Callable[[int], None]" = lambda _: None, sync: bool = True
) -> "Iterator[str]":
    """A file with this content under another name, with `sync` on the disk; the body gives it its own. OSError.

    The other name is this process's own, for two may write the same file at once; it ends in `.new`. `own` is called
    before anything is in the file, and sets who may read that.
    """
    part = f"{path}.{os.getpid()}.new"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(part)  # of a program with this number that was cut
    fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    try:
        with open(fd, "wb") as file:
            own(fd)
            file.write(content)
            file.flush()
            if sync:
                os.fsync(fd)
        yield part
    finally:
        with contextlib.suppress(OSError):  # it has its own name by then, or there is another error to be told
            os.unlink(part)


def sync_folder_of(path: str) -> None:
    """Returns once the name of a file that was made or replaced is on the disk; OSError."""
    folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def open_regular(path: "str | os.PathLike[str]", follow: bool = True) -> int:
    """A descriptor for reading a regular file, or the null device; OSError, which for anything else is NotRegular.

    Without `follow` the last name may be no link, for folders in which others may write. Else links are followed, by
    root those of root alone.
    """
    place = name = os.fspath(path)
    if "\0" in name:
        raise NotRegular("no file can have such a name", name)
    for _ in range(LINKS_LIMIT):
        it = "it" if place == name else place
        fd = os.open(place, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)  # looks, and opens nothing
        try:
            status = os.fstat(fd)
            if stat.S_ISLNK(status.st_mode) and follow:
                if os.geteuid() == 0 and status.st_uid != 0:
                    text = f"{it} is a symbolic link of user {status.st_uid}, which root does not follow"
                    raise NotRegular(text, name)
                place = os.path.join(os.path.dirname(place), os.readlink("", dir_fd=fd))
                continue
        finally:
            os.close(fd)
        refuse_special(status, name, it=it)
        fd = os.open(place, os.O_RDONLY | _FLAGS)
        try:
            refuse_special(os.fstat(fd), name, it=it)  # another one may be there by now
        except BaseException:
            os.close(fd)
            raise
        return fd
    raise NotRegular("it leads from link to link", name)


def refuse_special(status: os.stat_result, name: str, for_writing: bool = False, it: str = "it") -> None:
    """NotRegular for what is no regular file; for root's writing also for a file with a second name.

    The null device may be read.
    """
    is_null = stat.S_ISCHR(status.st_mode) and status.st_rdev == _NULL_DEVICE and not for_writing
    if not stat.S_ISREG(status.st_mode) and not is_null:
        raise NotRegular(f"{it} is {_KINDS.get(stat.S_IFMT(status.st_mode), 'no file')}, no regular file", name)
    if for_writing and status.st_nlink > 1 and os.geteuid() == 0:
        raise NotRegular(f"{it} has a second name somewhere (a hard link), so root does not write to it", name)
