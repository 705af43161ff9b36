"""What keeps the records at the place that the setting `state_dir` names."""

from __future__ import annotations

from dps_hal.host.files import FileStore

TYPE_CHECKING = False
if TYPE_CHECKING:
    from dps_hal.host.files import LockedStore


def open_store(state_dir: str) -> LockedStore:
    """The store there: two files for each record in a folder, or a flash partition such as /dev/mtd3."""
    if state_dir.startswith("/dev/mtd"):
        from dps_hal.host.mtd import MtdStore

        return MtdStore(state_dir)
    return FileStore(state_dir)
