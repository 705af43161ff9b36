"""New files that only their owner may read."""

from __future__ import annotations

import errno
import os

from dps_hal.errors import AskOperator
from dps_hal.host.regular import sync_folder_of, written_beside


def write_private(path: str, content: bytes) -> None:
    """Makes a file that only its owner may read: there is the whole of it or none, whenever the power is cut.

    It is written under another name, see `written_beside`. No cut takes it away once this has returned. AskOperator
    `agent.file` where that cannot be, or it exists.
    """
    try:
        with written_beside(path, content, 0o600) as part:
            _give_name(part, path)
        sync_folder_of(path)
    except FileExistsError:
        raise AskOperator("agent.file", f"{path} is there already: name a new file") from None
    except OSError as error:
        raise AskOperator("agent.file", f"{path} cannot be written: {error.strerror}") from None


def replace_private(path: str, content: bytes) -> None:
    """As `write_private`, in the place of a file that may be there. Who owns the folder owns what root makes there."""
    folder = os.path.dirname(path) or "."
    try:
        os.makedirs(folder, mode=0o700, exist_ok=True)
        with written_beside(path, content, 0o600) as part:
            if os.geteuid() == 0:
                owner = os.stat(folder)
                os.chown(part, owner.st_uid, owner.st_gid, follow_symlinks=False)
            os.replace(part, path)
        sync_folder_of(path)
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
