"""The state folder: the database of what survives a restart, the CA's key, and who may use it.

A folder that is made here is 0700, one that is there stays as it is, and every file is 0600, because registrations hold
hub keys.
"""

import contextlib
import fcntl
import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from dps_emulator.hub_devices import FILE_LIMIT_BYTES
from dps_emulator.registrations import StateError

if TYPE_CHECKING:
    import trustme

    from dps_emulator.store import Store


_SECRET_BYTES = 32


def open_store(
    state_dir: Path,
    messages_limit_bytes: int = FILE_LIMIT_BYTES,
    notice: Callable[[str], None] = lambda text: None,
) -> "Store":
    """The database of a state folder, made where there is none, with what an earlier release left; raises StateError.

    `notice` is told of what was taken over.
    """
    from dps_emulator.old_state import has_old_files, take_over
    from dps_emulator.store import DATABASE, Store

    make_private_folder(state_dir)
    store = Store(state_dir / DATABASE, messages_limit_bytes)
    if has_old_files(state_dir):
        taken = take_over(store, state_dir)
        if any(taken):
            notice(f"{taken.records} files and {taken.messages} messages of an earlier release are in {DATABASE} now")
    return store


def damage(state_dir: Path) -> Iterator[str]:
    """A sentence for what is damaged in a state folder at first sight; changes nothing, and reads no whole database."""
    from dps_emulator.store import damage_at_first_sight

    if said := damage_at_first_sight(state_dir):
        yield said
    if any((state_dir / name).exists() for name in ("enrollments", "registrations", "hubs")):
        from dps_emulator.old_state import damaged_files

        yield from damaged_files(state_dir)


def certificate_authority(state_dir: Path | None) -> "trustme.CA":
    """The CA kept in `state_dir`, made there the first time; without a folder a new one."""
    import trustme

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


def issuing_root(state_dir: Path | None) -> Callable[[], bytes] | None:
    """What gives the root of the certificates that are issued for devices, kept in `state_dir`, made when first used.

    Without a folder None; what is given raises StateError.
    """
    if state_dir is None:
        return None
    path = state_dir / "issuing-ca.pem"

    def kept() -> bytes:
        from dps_emulator.issuing import new_root

        try:
            return path.read_bytes()
        except FileNotFoundError:
            content = new_root()
            write_private_file(path, content)
            return content
        except OSError as error:
            raise StateError(f"{path}: {error.strerror}") from None

    return kept


def service_secret(state_dir: Path | None) -> bytes:
    """What the keys of shared access policies come from, kept in `state_dir`; without a folder a new one."""
    if state_dir is None:
        return os.urandom(_SECRET_BYTES)
    path = state_dir / "service.key"
    try:
        secret = path.read_bytes()
    except FileNotFoundError:
        secret = os.urandom(_SECRET_BYTES)
        write_private_file(path, secret)
    except OSError as error:
        raise StateError(f"{path}: {error.strerror}") from None
    if len(secret) != _SECRET_BYTES:
        raise StateError(f"{path} has {len(secret)} bytes, expected {_SECRET_BYTES}: restore or delete it")
    return secret


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
