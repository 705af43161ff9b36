"""What lies under a folder on Linux, where that is doubtful: memory, a layer that goes, a server elsewhere.

Source: proc_pid_mountinfo(5), and Linux, Documentation/filesystems/overlayfs.rst.
"""

from __future__ import annotations

import os

MOUNTS_FILE = "/proc/self/mountinfo"
MEMORY = ("tmpfs", "ramfs", "devtmpfs", "rootfs")  # the last is the initramfs, where no other root took its place
NETWORK = ("nfs", "nfs4", "cifs", "smb3", "9p", "ceph", "afs", "virtiofs")
LOCKLESS = ("9p",)  # ENOLCK from flock(2) there: the server takes no locks (Linux, fs/9p/vfs_file.c)


TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NamedTuple

    class Mount(NamedTuple):
        """One line of the file: where, what, and the file system's own options."""

        place: str
        kind: str
        options: tuple[str, ...]
else:
    from dps_hal.named import namedtuple

    Mount = namedtuple("Mount", ("place", "kind", "options"))


def doubt(path: str, mounts_file: str = MOUNTS_FILE) -> str:
    """Why the file system under `path` may not keep what it takes, as a sentence; "" for no reason that can be seen."""
    mounts = _read(mounts_file)
    mount = None if path.startswith("/dev/mtd") else _under(path, mounts)  # there it is a partition without any
    if mount is None:
        return ""
    where = f"{path} is on {mount.kind} (mounted at {mount.place})"
    if mount.kind in MEMORY:
        return f"{where}, which is in memory: the next boot finds no assignment and registers again"
    if mount.kind == "overlay":
        return _doubt_of_overlay(where, mount, mounts)
    if mount.kind in NETWORK or mount.kind.split(".")[0] in ("fuse", "fuseblk"):
        return (
            f"{where}: whether a lock keeps other machines out, and a sync reaches a disk, is up to what serves it, and"
            " cannot be seen from here"
        )
    return ""


def kind_of(path: str, mounts_file: str = MOUNTS_FILE) -> str:
    """The kind of the file system under `path`, such as ext4; "" where that cannot be seen."""
    mount = _under(path, _read(mounts_file))
    return mount.kind if mount else ""


def _read(mounts_file: str) -> list[Mount]:
    try:
        with open(mounts_file, "rb") as file:
            lines = file.read().decode(errors="surrogateescape").splitlines()
    except OSError:
        return []
    return [mount for line in lines if (mount := _of(line))]


def _doubt_of_overlay(where: str, mount: Mount, mounts: list[Mount]) -> str:
    upper = next((option.partition("=")[2] for option in mount.options if option.startswith("upperdir=")), "")
    below = _under(upper, mounts) if upper and os.path.isdir(upper) else None
    if below is None:
        return (
            f"{where}, and what is under it cannot be seen from here: in a container it goes with the container; give"
            " the state folder a volume of its own"
        )
    if below.kind in MEMORY:
        return f"{where}, and its upper layer, {upper}, is in memory: the next boot finds no assignment"
    return ""


def _under(path: str, mounts: list[Mount]) -> Mount | None:
    """The mount that holds `path`: of those above it the nearest, of several at one place the last."""
    real = os.path.realpath(path)
    found = None
    for mount in mounts:
        holds = real == mount.place or real.startswith(mount.place.rstrip("/") + "/")
        if holds and (found is None or len(mount.place) >= len(found.place)):
            found = mount
    return found


def _of(line: str) -> Mount | None:
    before, _, behind = line.partition(" - ")
    left, right = before.split(" "), behind.split(" ")
    if len(left) < 5 or len(right) < 3:
        return None
    return Mount(_unescaped(left[4]), right[0], tuple(_unescaped(option) for option in right[2].split(",")))


def _unescaped(text: str) -> str:
    if "\\" not in text:
        return text
    import re  # costs more than all else here

    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), text)
