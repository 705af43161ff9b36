"""State folders of earlier releases: a JSON file for each enrolment, registration and device, and one of messages.

What can be read is taken over into the database once, and its file deleted when it is on the disk there. What can't is
named, and stays until somebody has repaired or deleted it.
"""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from dps_emulator.enrollments import Enrollment, enrollment_from_json, is_hub_name
from dps_emulator.hub_devices import HubDevice, Telemetry
from dps_emulator.registrations import Registration, StateError
from dps_emulator.store import PAGE, Records, Store

_FOLDERS = ("enrollments", "registrations", "hubs")
_MESSAGES = ("messages.jsonl.1", "messages.jsonl")  # the older one first


class TakenOver(NamedTuple):
    """How many files of an earlier release are in the database now."""

    records: int
    messages: int


def has_old_files(state_dir: Path) -> bool:
    """Whether there is anything of an earlier release."""
    return any((state_dir / name).exists() for name in (*_FOLDERS, *_MESSAGES))


def take_over(store: Store, state_dir: Path) -> TakenOver:
    """Moves what can be read into the database; what is there already stays as it is. Raises StateError."""
    done: list[Path] = []
    with store.transaction():
        for records, read, paths in _old_records(store, state_dir):
            for at in range(0, len(paths), PAGE):
                some = [(path, record) for path, record in _readable(read, paths[at : at + PAGE])]
                records.put([(path.stem, record) for path, record in some], replace=False)
                done += [path for path, _ in some]
        listed = [state_dir / name for name in _MESSAGES if (state_dir / name).exists()]
        # A kill may have come between the commit and the end of the files. The last line shows it: what is kept of a
        # file is its end.
        new = [lines for path in listed if (lines := list(_lines(path))) and not store.messages.has(lines[-1])]
        lines = [line for of_file in new for line in of_file]
        store.messages.put(lines)
    store.sync()
    _delete([*done, *listed], state_dir)
    return TakenOver(len(done), len(lines))


def damaged_files(state_dir: Path) -> Iterator[str]:
    """A sentence for each file that was not taken over."""
    for read, paths in _old_files(state_dir):
        for path in paths:
            try:
                read(path)
            except StateError as error:
                yield str(error)
            else:
                yield f"{path} is of an earlier release: the next 'dps-emulator serve' takes it over"


def _old_files(state_dir: Path) -> Iterator[tuple[Callable[[Path], Any], list[Path]]]:
    yield _reader(enrollment_from_json), sorted((state_dir / "enrollments").glob("*.json"))
    yield _reader(Registration.from_json), sorted((state_dir / "registrations").glob("*.json"))
    for folder in sorted((state_dir / "hubs").glob("*")):
        if is_hub_name(folder.name):
            yield _reader(HubDevice.from_json), sorted(folder.glob("*.json"))


def _old_records(store: Store, state_dir: Path) -> Iterator[tuple[Records[Any], Callable[[Path], Any], list[Path]]]:
    for read, paths in _old_files(state_dir):
        if paths:
            folder = paths[0].parent
            of_hub = folder.parent.name == "hubs" and folder.parent.parent == state_dir
            yield store.devices(folder.name) if of_hub else getattr(store, folder.name), read, paths


def _reader(from_json: Callable[[Any], Any]) -> Callable[[Path], Any]:
    def read(path: Path) -> Enrollment | Registration | HubDevice:
        try:
            record: Enrollment | Registration | HubDevice = from_json(json.loads(path.read_bytes()))
        except OSError as error:
            raise StateError(f"{path}: {error.strerror}") from None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise StateError(f"{path} can't be read back ({error}): repair or delete it") from None
        return record

    return read


def _readable(read: Callable[[Path], Any], paths: list[Path]) -> Iterator[tuple[Path, Any]]:
    for path in paths:
        with contextlib.suppress(StateError):  # `damaged_files` names it
            yield path, read(path)


def _lines(path: Path) -> Iterator[tuple[str, bytes]]:
    """The messages in a file, as the database has them; a line that is none is passed over."""
    try:
        with path.open("rb") as file:
            for line in file:
                with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError, RecursionError):
                    message = Telemetry.from_json(json.loads(line))
                    yield message.device_id.lower(), line.strip()
    except OSError as error:
        raise StateError(f"{path}: {error.strerror}") from None


def _delete(paths: list[Path], state_dir: Path) -> None:
    """Deletes files that are taken over, and the folders that are empty then."""
    for path in paths:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise StateError(f"{path}: {error.strerror}") from None
    for folder in [*(state_dir / "hubs").glob("*"), *(state_dir / name for name in _FOLDERS)]:
        with contextlib.suppress(OSError):  # not empty, or not there
            folder.rmdir()
