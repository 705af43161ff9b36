"""What a running service says of itself in a file, so that `status` needs no TPM, no network and no socket.

The file lies in the runtime folder, in memory wherever there is one; it holds no secret and anybody may read it. It
counts only while the process that wrote it lives.
"""

from __future__ import annotations

import contextlib
import os
import time

from dps_agent.host.config import SYSTEM_RUNTIME_DIR, Configuration
from dps_agent.host.printed import utc_text
from dps_hal.errors import AskOperator
from dps_hal.host.regular import NotRegular, read_regular, replace_file
from dps_hal.platform import from_json, to_json

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from dps_agent.assignment import Assignment

SCHEMA = "dps-agent-state/1"
FILE_NAME = "state.json"
SIZE_LIMIT = 65536
WRITE_EVERY_S = 1.0
FLEET_REFUSED = (
    "the desired property dpsAgent.fleet is passed over: expected whole numbers, with which nobody has to wait for more"
    " than a week; docs/fleet.md has their limits"
)
BURST = 8  # a start goes through most of the states within a moment
_FILE_MODE = 0o644
_FOLDER_MODE = 0o755


class StateFile:
    """Writes the file, in the long run at most once a second; `failure` says why it could not."""

    def __init__(self, folder: str) -> None:
        self.failure = ""
        self._path = os.path.join(folder, FILE_NAME) if folder else ""
        self._content: bytes | None = None  # what is still to be written
        self._full_at_s = 0.0  # when BURST writes are free again; each one moves it by WRITE_EVERY_S
        self._process = {"schema": SCHEMA, "pid": os.getpid(), "startTicks": start_ticks(os.getpid())}

    def show(self, document: dict[str, Any]) -> None:
        """Replaces the content, now or by a later `write_if_due`."""
        self._content = to_json({**self._process, **document}).encode()
        self.write_if_due()

    def write_if_due(self) -> None:
        """Writes what `show` left, unless the file was written too often lately."""
        now_s = time.monotonic()
        if self._content is None or not self._path or self._full_at_s - now_s > (BURST - 1) * WRITE_EVERY_S:
            return
        content, self._content = self._content, None
        self._full_at_s = max(self._full_at_s, now_s) + WRITE_EVERY_S
        try:
            make_runtime_folder(os.path.dirname(self._path))
            replace_file(self._path, content, _FILE_MODE)  # the service's umask keeps others out of everything else
            self.failure = ""
        except OSError as error:
            self.failure = f"{self._path} cannot be written: {error.strerror}"

    def remove(self) -> None:
        """Removes the file: the service ends."""
        self._content = None
        if self._path:
            with contextlib.suppress(OSError):
                os.unlink(self._path)


def read_live(configuration: Configuration) -> dict[str, Any] | None:
    """What the service that runs with this state folder says of itself; None where none runs.

    AskOperator `agent.file` where something else than a file of that size is in its place.
    """
    path = os.path.join(configuration.runtime_dir, FILE_NAME)
    try:
        document = from_json(read_regular(path, SIZE_LIMIT, follow=False))
    except NotRegular as error:
        raise AskOperator("agent.file", f"{path}, which the service writes: {error.strerror}; remove it") from None
    except (OSError, ValueError):
        return None
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        return None
    pid, ticks = document.get("pid"), document.get("startTicks")
    if type(pid) is not int or document.get("stateDir") != os.path.abspath(configuration.state_dir):
        return None
    found = start_ticks(pid)
    if found is None and configuration.runtime_dir == SYSTEM_RUNTIME_DIR and _is_anothers(pid):
        return document  # /proc hides others' processes here; only root and the service write into that folder
    return document if ticks is not None and found == ticks else None


def _is_anothers(pid: int) -> bool:
    """Whether there is such a process and it is another user's."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (OSError, OverflowError):
        return False
    return False


def start_ticks(pid: int) -> int | None:
    """When the process began, in clock ticks after boot, which tells it from a later one; None where there is none."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return int(file.read().rpartition(b")")[2].split()[19])  # proc_pid_stat(5), field 22
    except (OSError, IndexError, ValueError):
        return None


def make_runtime_folder(path: str) -> None:
    """Makes the folder, open for reading, where only it is missing; OSError."""
    with contextlib.suppress(FileExistsError):
        os.mkdir(path)
        os.chmod(path, _FOLDER_MODE)


def assignment_document(assignment: Assignment) -> dict[str, Any]:
    """What may be shown of an assignment: all but the wrapped key."""
    return {
        "assignedHub": assignment.assigned_hub,
        "deviceId": assignment.device_id,
        "registrationId": assignment.registration_id,
        "idScope": assignment.id_scope,
        "endpoint": assignment.endpoint,
        "substatus": assignment.substatus,
        "assignedAt": utc_text(assignment.assigned_at_s),
        "lastUpdatedUtc": assignment.last_updated_utc,
        "payload": assignment.payload,
        "payloadOmitted": assignment.payload_omitted,
    }
