"""The record store on littlefs: one file per record, written beside it and renamed over it.

There a closed file is durable and a rename is atomic, so one copy is enough. On other file systems it is not, such as
the FAT that some ports make of their flash: they are refused. `dps_hal.host.files` is the store for Linux.
"""

from dps_hal.contracts import IDENTITY, PROGRESS, StoredRecord
from dps_hal.errors import AskOperator, Broken, RetryLater
from dps_hal.store.slots import OVERHEAD_BYTES, VALID, decode_slot, encode_slot, refuse_foreign

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from dps_hal.errors import DpsError
    from dps_hal.store.slots import Slot

_ENOENT = 2
_EEXIST = 17
_ENOSPC = 28
_EROFS = 30
_CORRUPT = 84  # LFS_ERR_CORRUPT


class LittleFsStore:
    """The `Store` in a folder of a littlefs; `system` is the module `os`. The first commit makes the folder.

    AskOperator `store.unsuitable` where something else than a littlefs is mounted there.
    """

    max_payload = 4096 - OVERHEAD_BYTES

    def __init__(self, folder: str, system: "Any") -> None:
        refuse_unless_littlefs(folder, system)
        self._folder = folder
        self._system = system

    def load(self, record: str) -> "StoredRecord | None":
        """See `Store.load`; None also where the file is damaged, by its bytes or by what littlefs says."""
        slot = self._read(record)
        if slot.state != VALID or slot.payload is None or slot.generation is None:
            return None
        return StoredRecord(slot.payload, slot.generation, False)

    def commit(self, record: str, payload: bytes) -> None:
        """See `Store.commit`."""
        if len(payload) > self.max_payload:
            raise AskOperator(
                "store.too_large",
                f"record '{record}' has {len(payload)} bytes where at most {self.max_payload} fit",
            )
        generation = self._read(record).generation or 0
        content = encode_slot((generation + 1) & 0xFFFFFFFF, payload)
        new = self._path(record) + ".new"
        try:
            self._make_folder()
            with open(new, "wb") as file:
                file.write(content)
            with open(new, "rb") as file:
                if file.read() != content:
                    raise RetryLater("store.io", f"record '{record}' was written and read back differently")
            self._system.rename(new, self._path(record))
        except OSError as error:
            self._remove(new, True)
            raise _failure("write", record, error)

    def erase(self, record: str) -> None:
        """See `Store.erase`; a file of an unknown version goes as well."""
        for path in (self._path(record), self._path(record) + ".new"):
            self._remove(path, False)

    def forget_older(self, record: str) -> None:
        """There is no older copy."""
        self._path(record)

    def _path(self, record: str) -> str:
        if record not in (IDENTITY, PROGRESS):
            raise Broken("agent.bug", f"there is no record named '{record}'")
        return self._folder + "/" + record

    def _read(self, record: str) -> "Slot":
        content = b""
        for again in (True, True, False):  # a bus may fail for once
            try:
                with open(self._path(record), "rb") as file:
                    content = file.read()
                break
            except OSError as error:
                if error.errno == _ENOENT:
                    break
                if not again and error.errno != _CORRUPT:
                    raise _failure("read", record, error)
        slot = decode_slot(content, 0xFF)
        refuse_foreign(record, slot)
        return slot

    def _make_folder(self) -> None:
        try:
            self._system.mkdir(self._folder)
        except OSError as error:
            if error.errno != _EEXIST:
                raise

    def _remove(self, path: str, ignoring_failure: bool) -> None:
        try:
            self._system.remove(path)
        except OSError as error:
            if not ignoring_failure and error.errno != _ENOENT:
                raise _failure("erase", path, error)


def refuse_unless_littlefs(folder: str, system: "Any") -> None:
    """AskOperator `store.unsuitable` unless `folder` lies on a littlefs; `system` is the module `os`."""
    vfs = system
    if not hasattr(system, "mount"):
        import vfs  # type: ignore[import-not-found,no-redef]  # where `os` has only what CPython's has
    try:
        mounts = vfs.mount()
    except TypeError:
        mounts = ()  # MicroPython before 1.25 does not say
    path = folder if folder[:1] == "/" else system.getcwd().rstrip("/") + "/" + folder
    kind = "nothing"
    for file_system, place in mounts:  # the first that fits is used
        if (path + "/").startswith(place if place == "/" else place + "/"):
            kind = type(file_system).__name__
            break
    if kind not in ("VfsLfs2", "VfsLfs1"):
        raise AskOperator(
            "store.unsuitable",
            f"expected a littlefs at {folder}, where a power cut loses no record; came {kind}: make its file system a"
            " littlefs, or give the agent a block_store",
        )


def _failure(action: str, what: str, error: OSError) -> "DpsError":
    text = f"cannot {action} '{what}': error {error.errno}"
    if error.errno == _ENOSPC:
        return RetryLater("store.full", text)
    if error.errno == _EROFS:
        return AskOperator("store.read_only", text)
    return RetryLater("store.io", text)
