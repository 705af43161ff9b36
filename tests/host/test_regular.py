"""Files that somebody else may have put there: a regular file is read, anything else is named and holds nobody up."""

import errno
import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from dps_hal.host import regular
from dps_hal.host.regular import LINKS_LIMIT, NotRegular, read_regular, replace_file


def refused(path: Path, limit_bytes: int = 100, follow: bool = True) -> str:
    """What is said of what cannot be read."""
    with pytest.raises(NotRegular) as caught:
        read_regular(path, limit_bytes, follow)
    assert caught.value.errno == errno.EINVAL and caught.value.filename == str(path)
    return caught.value.strerror or ""


def test_a_regular_file_is_read_whole(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * 100)
    assert read_regular(tmp_path / "file", 100) == b"x" * 100


def test_a_missing_file_is_what_the_system_says_of_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_regular(tmp_path / "none", 100)


def test_a_larger_file_is_refused_and_not_read(tmp_path: Path) -> None:
    with open(tmp_path / "file", "wb") as file:
        file.truncate(1 << 40)
    assert refused(tmp_path / "file") == "it has more than 100 bytes"


def test_a_fifo_holds_nobody_up(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "file")
    assert refused(tmp_path / "file") == "it is a FIFO, no regular file"


def test_a_folder_and_a_socket_are_named(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        assert refused(tmp_path) == "it is a folder, no regular file"
        assert refused(tmp_path / "socket") == "it is a socket, no regular file"


def test_no_device_is_opened_but_the_null_device(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[int] = []
    system_open = os.open

    def watched(path: str, flags: int, mode: int = 0o777, *, dir_fd: "int | None" = None) -> int:
        opened.append(flags)
        return system_open(path, flags, mode, dir_fd=dir_fd)

    monkeypatch.setattr(os, "open", watched)
    assert refused(Path("/dev/zero")) == "it is a device, no regular file"
    assert all(flags & os.O_PATH for flags in opened)
    assert read_regular("/dev/null", 100) == b""


def test_a_link_is_followed_only_where_that_is_wanted(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "second").symlink_to("../file")
    (tmp_path / "first").symlink_to("folder/second")
    assert read_regular(tmp_path / "first", 100) == b"content"
    assert refused(tmp_path / "first", follow=False) == "it is a symbolic link, no regular file"


def test_what_a_link_leads_to_is_named_where_it_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to("fifo")
    assert refused(tmp_path / "link") == f"{tmp_path}/fifo is a FIFO, no regular file"


def test_links_in_a_circle_come_to_an_end(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    assert refused(tmp_path / "a") == "it leads from link to link"
    for number in range(LINKS_LIMIT):
        (tmp_path / f"{number}").symlink_to(f"{number + 1}")
    (tmp_path / f"{LINKS_LIMIT}").write_bytes(b"")
    assert refused(tmp_path / "0") == "it leads from link to link"
    assert read_regular(tmp_path / "1", 100) == b""


def test_root_follows_links_of_root_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"content")
    (tmp_path / "link").symlink_to("file")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    system_fstat = os.fstat
    owner = 0

    def owned(fd: int) -> os.stat_result:
        found = list(system_fstat(fd))
        found[stat.ST_UID] = owner
        return os.stat_result(found)

    monkeypatch.setattr(os, "fstat", owned)
    assert read_regular(tmp_path / "link", 100) == b"content"
    owner = 1000
    assert refused(tmp_path / "link") == "it is a symbolic link of user 1000, which root does not follow"
    assert read_regular(tmp_path / "file", 100) == b"content"


def test_what_takes_the_place_of_a_file_just_looked_at_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"content")
    system_open = os.open

    def swapped(path: str, flags: int, mode: int = 0o777, *, dir_fd: "int | None" = None) -> int:
        if not flags & os.O_PATH:
            (tmp_path / "file").unlink()
            os.mkfifo(tmp_path / "file")
        return system_open(path, flags, mode, dir_fd=dir_fd)

    before = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(regular.os, "open", swapped)
    assert refused(tmp_path / "file") == "it is a FIFO, no regular file"
    monkeypatch.undo()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_name_that_no_file_can_have_is_no_traceback() -> None:
    assert refused(Path("a\0b")) == "no file can have such a name"


# The commands


def hostile(place: Path, kind: str) -> None:
    """Puts something else than a file at `place`, that leads to, or is, what must not be touched."""
    victim = place.parent / "victim"
    if kind == "fifo":
        os.mkfifo(place)
    elif kind == "link":
        place.symlink_to(victim)
    elif kind == "second name":
        os.link(victim, place)
    elif kind == "folder":
        place.mkdir()
    else:
        with open(place, "wb") as file:
            file.truncate(1 << 40)


@pytest.mark.parametrize(
    "verb", [["status"], ["diag", "--offline", "--output"], ["reset", "--yes"], ["check", "--offline"]]
)
@pytest.mark.parametrize("name", ["identity.0", "progress.1", "lock", "state.json"])
@pytest.mark.parametrize("kind", ["fifo", "link", "folder", "huge", "second name"])
def test_root_s_commands_name_what_took_the_place_of_a_file_and_touch_nothing_else(
    kind: str, name: str, verb: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from dps_agent.host.cli import main

    state = tmp_path / "state"
    state.mkdir()
    (state / "victim").write_bytes(b"another's")
    hostile(state / name, kind)
    words = [f"state_dir={state}", f"runtime_dir={state}", "tpm.backend=simulator", f"tpm.tcti={tmp_path}/tpm"]
    settings = [word for setting in words for word in ("--set", setting)]
    archive = [str(tmp_path / "archive.tar.gz")] if verb[0] == "diag" else []
    status = main(["--config", "/dev/null", *settings, *verb, *archive])
    said = "".join(capfd.readouterr())
    assert "Traceback" not in said and status in (0, 1, 3, 5, 6), said
    assert (state / "victim").read_bytes() == b"another's"
    if verb[0] == "reset" and kind in ("fifo", "link", "folder") and name != "progress.1":
        assert status == 1 and name in said, said


def test_two_processes_that_replace_a_file_at_once_each_put_a_whole_one_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.prom"
    before: list[str] = []
    rename = os.replace

    def late(part: str, name: str) -> None:
        before.extend(os.listdir(tmp_path))
        other = f"import sys; sys.path[:0] = {sys.path!r}\nfrom dps_hal.host.regular import replace_file\n"
        subprocess.run(
            [sys.executable, "-c", f"{other}replace_file({name!r}, b'other', 0o644)"], check=True, timeout=60
        )
        assert path.read_bytes() == b"other"
        rename(part, name)

    monkeypatch.setattr(os, "replace", late)
    replace_file(str(path), b"mine", 0o644)
    assert path.read_bytes() == b"mine" and os.listdir(tmp_path) == ["a.prom"]
    assert before == [f"a.prom.{os.getpid()}.new"]  # which no collector reads
