"""What the file system under the state folder may not keep is seen, and said."""

import errno
import os
from pathlib import Path

import pytest

from dps_hal.contracts import IDENTITY
from dps_hal.errors import AskOperator, RetryLater
from dps_hal.host import files
from dps_hal.host.files import FileStore
from dps_hal.host.mounts import doubt, kind_of
from support.disk.posix_disk import SimulatedDisk

ROOT = "27 1 8:1 / / rw,relatime - ext4 /dev/sda1 rw"
FOLDER = "/var/lib/dps-agent"


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([ROOT], ""),
        ([ROOT, "30 27 0:30 / /var rw - btrfs /dev/sda2 rw"], ""),
        ([ROOT, "30 27 0:30 / /var rw - tmpfs tmpfs rw"], "tmpfs (mounted at /var), which is in memory"),
        ([ROOT, "30 27 0:30 / /var/lib/dps-agent rw shared:4 - ramfs none rw"], "in memory"),
        ([ROOT, "30 27 0:30 / /var/lib/dps rw - tmpfs tmpfs rw"], ""),
        ([ROOT, "30 27 0:30 / /var rw - tmpfs tmpfs rw", "31 30 8:2 / /var/lib rw - ext4 /dev/sdb1 rw"], ""),
        ([ROOT, "30 27 0:30 / /var rw - tmpfs tmpfs rw", "31 30 8:2 / /var rw - ext4 /dev/sdb1 rw"], ""),
        (["27 1 0:20 / / rw - overlay overlay rw,lowerdir=/a,upperdir=/gone/upper,workdir=/w"], "cannot be seen"),
        (["27 1 0:20 / / rw - overlay overlay rw,lowerdir=/a:/b"], "cannot be seen"),
        ([ROOT, "30 27 0:30 / /var rw - nfs4 server:/x rw,vers=4.2"], "what serves it"),
        ([ROOT, "30 27 0:30 / /var rw - fuse.sshfs me@there:/x rw"], "what serves it"),
        ([ROOT, "30 27 0:30 / /var rw - 9p share rw"], "what serves it"),
        (["1 1 0:2 / / rw - rootfs rootfs rw", "20 1 0:20 / /proc rw - proc proc rw"], "in memory"),
        (["1 1 0:2 / / rw - rootfs rootfs rw", ROOT], ""),
        (["what is this", ""], ""),
    ],
)
def test_a_file_system_that_may_not_keep_records_is_named(lines: list[str], words: str, tmp_path: Path) -> None:
    (tmp_path / "mountinfo").write_text("".join(f"{line}\n" for line in lines))
    said = doubt(FOLDER, str(tmp_path / "mountinfo"))
    assert (words in said) if words else said == ""


@pytest.mark.parametrize(("kind", "words"), [("tmpfs", "is in memory"), ("ext4", "")])
def test_the_upper_layer_of_an_overlay_decides_where_it_can_be_seen(kind: str, words: str, tmp_path: Path) -> None:
    upper = tmp_path / "upper layer"
    upper.mkdir()
    escaped = str(upper).replace(" ", "\\040")
    lines = f"27 1 0:20 / / rw - overlay overlay rw,upperdir={escaped}\n30 27 0:3 / {escaped} rw - {kind} x rw\n"
    (tmp_path / "mountinfo").write_text(lines)
    said = doubt(FOLDER, str(tmp_path / "mountinfo"))
    assert (f"its upper layer, {upper}, {words}" in said) if words else said == ""


def test_without_the_list_of_mounts_nothing_is_said(tmp_path: Path) -> None:
    assert doubt(FOLDER, str(tmp_path / "none")) == "" == kind_of(FOLDER, str(tmp_path / "none"))


@pytest.mark.parametrize(
    ("path", "words"), [("/dev/shm/state", "is in memory"), ("/dev/x", "memory"), ("/dev/mtd3", "")]
)
def test_of_what_is_under_dev_only_a_flash_partition_has_no_file_system(path: str, words: str, tmp_path: Path) -> None:
    lines = f"{ROOT}\n25 27 0:6 / /dev rw - devtmpfs udev rw\n26 25 0:24 / /dev/shm rw - tmpfs tmpfs rw\n"
    (tmp_path / "mountinfo").write_text(lines)
    said = doubt(path, str(tmp_path / "mountinfo"))
    assert (words in said) if words else said == ""


def test_the_nearest_mount_tells_the_kind_of_the_file_system(tmp_path: Path) -> None:
    (tmp_path / "mountinfo").write_text(f"{ROOT}\n30 27 0:30 / /var rw - 9p share rw\n")
    assert kind_of(FOLDER, str(tmp_path / "mountinfo")) == "9p"
    assert kind_of("/usr", str(tmp_path / "mountinfo")) == "ext4"


@pytest.mark.parametrize("kind", ["ext4", "nfs", "nfs4", "9p", ""])
def test_a_lock_for_which_there_is_no_room_is_tried_again_but_where_none_is_ever_given(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "kind_of", lambda path: kind)
    with pytest.raises(AskOperator if kind == "9p" else RetryLater) as caught:
        FileStore(FOLDER, Lacking("flock", errno.ENOLCK)).commit(IDENTITY, b"hub A")
    assert caught.value.code == ("store.unsuitable" if kind == "9p" else "store.io")
    assert "cannot lock" in caught.value.message and os.strerror(errno.ENOLCK) in caught.value.message


class Lacking(SimulatedDisk):
    """A disk on which one call is not offered."""

    def __init__(self, call: str, number: int) -> None:
        super().__init__()
        self._lacks = call, number

    def fsync(self, fd: int) -> None:
        if self._lacks[0] == ("fsync of a folder" if self._inode(fd).is_folder else "fsync"):
            raise OSError(self._lacks[1], os.strerror(self._lacks[1]))
        super().fsync(fd)

    def flock(self, fd: int) -> None:
        if self._lacks[0] == "flock":
            raise OSError(self._lacks[1], os.strerror(self._lacks[1]))
        super().flock(fd)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL])
@pytest.mark.parametrize("call", ["fsync", "fsync of a folder", "flock"])
def test_a_call_that_a_file_system_lacks_has_words_of_its_own(call: str, number: int) -> None:
    disk = Lacking(call, number)

    def commit() -> None:
        FileStore(FOLDER, disk).commit(IDENTITY, b"hub A")

    if (call, number) == ("fsync of a folder", errno.EINVAL):
        commit()  # what Linux says where there is nothing to sync in a folder
        return
    with pytest.raises(AskOperator) as caught:
        commit()
    assert caught.value.code == "store.unsuitable" and os.strerror(number) in caught.value.message
    assert ("cannot lock" if call == "flock" else "cannot ") in caught.value.message
    assert "does not offer that" in caught.value.message and disk.open_descriptors() == 0
