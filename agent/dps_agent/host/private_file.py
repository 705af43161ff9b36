"""New files that only their owner may read."""

from __future__ import annotations

import os

from dps_hal.errors import AskOperator
from dps_hal.host.regular import sync_folder_of


def write_private(path: str, content: bytes) -> None:
    """Makes a file that only its owner may read, and that no cut takes away once this has returned.

    AskOperator `agent.file` where that cannot be, or it exists. What could not be written whole is removed.
    """
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            with open(fd, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(fd)
            sync_folder_of(path)
        except BaseException:
            os.unlink(path)
            raise
    except FileExistsError:
        raise AskOperator("agent.file", f"{path} is there already: name a new file") from None
    except OSError as error:
        raise AskOperator("agent.file", f"{path} cannot be written: {error.strerror}") from None
