"""New files that only their owner may read."""

from __future__ import annotations

import contextlib
import errno
import os

from dps_hal.errors import AskOperator
from dps_hal.host.regular import sync_folder_of


def write_private(path: str, content: bytes) -> None:
    """Makes a file that only its owner may read: there is the whole of it or none, whenever the power is cut.

    It is written under another name, which is this process's own and ends in `.new`. No cut takes it away once this has
    returned. AskOperator `agent.file` where that cannot be, or it exists.
    """
    part = f"{path}.{os.getpid()}.new"
    try:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(part)  # of a program with this number that was cut
        fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            with open(fd, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(fd)
            _give_name(part, path)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(part)
        sync_folder_of(path)
    except FileExistsError:
        raise AskOperator("agent.file", f"{path} is there already: name a new file") from None
    except OSError as error:
        raise AskOperator("agent.file", f"{path} cannot be written: {error.strerror}") from None


def _give_name(part: str, path: str) -> None:
    """Lets the file `part` be known by a name that no file has yet."""
    try:
        os.link(part, path)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP):
            raise
        # A file system without second names, such as FAT: for a moment the name is taken, and nothing in it.
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
        os.replace(part, path)
