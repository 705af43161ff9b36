"""What survives a restart: a folder with a JSON file for each enrolment, registration and device, and the CA's key.

A folder that is made here is 0700, one that is there stays as it is, and every file is 0600, because registrations hold
hub keys. A file is replaced by rename, so that a reader never sees half of one; each access reads the file again, so
that `enroll-import` and `move` reach a server that is running. Only the server writes what the hubs know (`hubs`,
`messages.jsonl`). A file that is damaged is named, and everything else goes on working.
"""

import contextlib
import fcntl
import json
import os
import stat
import tempfile
from collections.abc import Callable, Iterator, MutableMapping
from pathlib import Path
from typing import Any, TypeVar

import trustme

from dps_emulator.enrollments import Enrollment, enrollment_from_json, is_device_id, is_hub_name
from dps_emulator.hub_devices import HubDevice
from dps_emulator.registrations import Registration, StateError

Record = TypeVar("Record")


class RecordFolder(MutableMapping[str, Record]):
    """A mapping whose values are JSON files; keys are lower-case registration ids or device ids."""

    def __init__(
        self, folder: Path, to_json: Callable[[Record], dict[str, Any]], from_json: Callable[[Any], Record]
    ) -> None:
        self._folder = folder
        self._to_json = to_json
        self._from_json = from_json
        make_private_folder(folder)

    def __getitem__(self, key: str) -> Record:
        path = self._path(key)
        try:
            return self._from_json(json.loads(path.read_bytes()))
        except FileNotFoundError:
            raise KeyError(key) from None
        except OSError as error:
            raise StateError(f"{path}: {error.strerror}") from None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise StateError(f"{path} can't be read back ({error}): repair or delete it") from None

    def __contains__(self, key: object) -> bool:
        return self._path(str(key)).exists()

    def damaged(self) -> Iterator[str]:
        """A sentence for each file that can't be read back; reads all of them."""
        for key in self:
            try:
                self[key]
            except StateError as error:
                yield str(error)
            except KeyError:  # deleted by now
                continue

    def __setitem__(self, key: str, record: Record) -> None:
        write_private_file(self._path(key), json.dumps(self._to_json(record), indent=1).encode() + b"\n")

    def __delitem__(self, key: str) -> None:
        try:
            self._path(key).unlink()
        except FileNotFoundError:
            raise KeyError(key) from None

    def __iter__(self) -> Iterator[str]:
        return (path.stem for path in sorted(self._folder.glob("*.json")))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def _path(self, key: str) -> Path:
        return self._folder / f"{key}.json"


def enrollment_folder(state_dir: Path) -> RecordFolder[Enrollment]:
    """The enrolments kept in `state_dir`."""
    return RecordFolder(state_dir / "enrollments", Enrollment.to_json, enrollment_from_json)


def registration_folder(state_dir: Path) -> RecordFolder[Registration]:
    """The registrations kept in `state_dir`, with the hub keys."""
    return RecordFolder(state_dir / "registrations", Registration.to_json, Registration.from_json)


def hub_folder(state_dir: Path, hub: str) -> RecordFolder[HubDevice]:
    """The devices of one hub kept in `state_dir`; keys are lower-case device ids."""
    make_private_folder(state_dir / "hubs")
    return RecordFolder(state_dir / "hubs" / hub.lower(), HubDevice.to_json, HubDevice.from_json)


def damaged_files(state_dir: Path) -> Iterator[str]:
    """A sentence for each file below `state_dir` that can't be read back; makes nothing there."""
    if (state_dir / "enrollments").is_dir():
        yield from enrollment_folder(state_dir).damaged()
    if (state_dir / "registrations").is_dir():
        yield from registration_folder(state_dir).damaged()
    for folder in sorted((state_dir / "hubs").glob("*")):
        if is_hub_name(folder.name):
            yield from hub_folder(state_dir, folder.name).damaged()


def stored_device(state_dir: Path, hub: str, device_id: str) -> HubDevice | None:
    """What `hub` has written down of a device; None for names that it can't have."""
    if not (is_hub_name(hub) and is_device_id(device_id) and (state_dir / "hubs" / hub.lower()).is_dir()):
        return None
    return hub_folder(state_dir, hub).get(device_id.lower())


def certificate_authority(state_dir: Path | None) -> trustme.CA:
    """The CA kept in `state_dir`, made there the first time; without a folder a new one."""
    if state_dir is None:
        return trustme.CA()
    path = state_dir / "ca.pem"  # key and certificate in one file: never one without the other
    if path.exists():
        try:
            content = path.read_bytes()
            return trustme.CA.from_pem(content, content)
        except (OSError, ValueError) as error:
            raise StateError(f"{path} can't be read back ({error}): repair or delete it") from None
    authority = trustme.CA()
    write_private_file(path, authority.private_key_pem.bytes() + authority.cert_pem.bytes())
    return authority


def make_private_folder(folder: Path) -> None:
    """Makes the folder, 0700, and its parents; one that is there is used as it is, or StateError.

    It must be this user's, and nobody else may write in it: /tmp is no place for keys.
    """
    try:
        folder.mkdir(mode=0o700, parents=True)
    except FileExistsError:
        _check_ours(folder)
    except OSError as error:
        raise StateError(f"{folder}: {error.strerror}") from None


def _check_ours(folder: Path) -> None:
    try:
        there = folder.stat()
    except OSError as error:
        raise StateError(f"{folder}: {error.strerror}") from None
    if not stat.S_ISDIR(there.st_mode):
        raise StateError(f"{folder} is no folder")
    if there.st_uid != os.geteuid():
        raise StateError(f"{folder} belongs to user {there.st_uid}, this is user {os.geteuid()}: name another folder")
    if there.st_mode & 0o022:
        mode = stat.S_IMODE(there.st_mode)
        raise StateError(
            f"others may write in {folder}, whose mode is {mode:o}: name a folder of your own, or one that is not there"
        )


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Keeps every other `serve` out of an existing state folder, until the end or this process's; raises StateError."""
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise StateError(f"{folder}: {error.strerror}") from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StateError(f"{folder} is served by another dps-emulator: stop it, or name another folder") from None
        yield
    finally:
        os.close(handle)


def write_private_file(path: Path, content: bytes) -> None:
    """Replaces `path` by a file of mode 0600 that is on the disk when this returns; raises StateError."""
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".new-")  # 0600 from the start
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise StateError(f"{path}: {error.strerror}") from None
