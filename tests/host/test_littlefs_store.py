"""The store for littlefs: its contract on a folder, and what it does with damage, newer formats and full storage."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from contracts.store import RULES, error_of, payload_of
from dps_hal.contracts import IDENTITY
from dps_hal.errors import AskOperator, RetryLater
from dps_hal.store import littlefs
from dps_hal.store.littlefs import LittleFsStore
from dps_hal.store.slots import encode_slot


class VfsLfs2:
    """A file system of this name."""


class VfsFat:
    """Another."""


class Board:
    """The module os of a board with a littlefs, or with these file systems."""

    def __init__(self, *mounts: tuple[object, str], folder: str = "/") -> None:
        self._mounts = mounts or ((VfsLfs2(), "/"),)
        self._folder = folder

    def mount(self) -> tuple[tuple[object, str], ...]:
        return self._mounts

    def getcwd(self) -> str:
        return self._folder

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_store_contract_holds(rule: Callable[[Callable[[], LittleFsStore]], None], tmp_path: Path) -> None:
    rule(lambda: LittleFsStore(str(tmp_path / "state"), Board()))


def test_a_damaged_file_is_none_and_the_next_commit_works(tmp_path: Path) -> None:
    store = LittleFsStore(str(tmp_path), Board())
    for content in (b"", b"x", encode_slot(5, b"hub A")[:-1]):
        (tmp_path / IDENTITY).write_bytes(content)
        assert store.load(IDENTITY) is None
    store.commit(IDENTITY, b"hub B")
    assert payload_of(store) == b"hub B"


@pytest.mark.parametrize(("number", "times"), [(84, 2), (84, 9), (errno.EIO, 2), (errno.EIO, 9)])
def test_what_littlefs_finds_corrupt_is_damaged_and_what_it_cannot_read_an_error_unless_it_passes(
    number: int, times: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = [times]

    def failing(path: str, mode: str) -> Any:
        if mode == "rb" and path.endswith(IDENTITY) and left[0]:
            left[0] -= 1
            raise OSError(number, "as the test asked")
        return open(path, mode)

    store = LittleFsStore(str(tmp_path), Board())
    store.commit(IDENTITY, b"hub A")
    monkeypatch.setattr(littlefs, "open", failing, raising=False)
    if times == 2:
        assert payload_of(store) == b"hub A"
    elif number == 84:
        assert store.load(IDENTITY) is None
        store.commit(IDENTITY, b"hub B")
        left[0] = 0
        assert payload_of(store) == b"hub B"
    else:
        for action in (lambda: store.load(IDENTITY), lambda: store.commit(IDENTITY, b"hub B")):
            error = error_of(action)
            assert isinstance(error, RetryLater) and error.code == "store.io", error
        left[0] = 0
        assert payload_of(store) == b"hub A"


def test_a_newer_format_stops_load_and_commit_and_only_a_reset_goes_on(tmp_path: Path) -> None:
    from dps_hal.store.slots import crc32

    header = b"DPSr" + (2).to_bytes(4) + (7).to_bytes(4) + (4).to_bytes(4)
    newer = header + crc32(header).to_bytes(4) + b"who knows"
    (tmp_path / IDENTITY).write_bytes(newer)
    store = LittleFsStore(str(tmp_path), Board())
    for action in (lambda: store.load(IDENTITY), lambda: store.commit(IDENTITY, b"mine")):
        error = error_of(action)
        assert isinstance(error, AskOperator) and error.code == "store.unknown_version"
    assert (tmp_path / IDENTITY).read_bytes() == newer
    store.erase(IDENTITY)
    assert store.load(IDENTITY) is None and list(tmp_path.iterdir()) == []


class Failing(Board):
    """The module os, but renaming and removing fail."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def __getattr__(self, name: str) -> Any:
        if name in ("rename", "remove"):
            return self.fail
        return getattr(os, name)

    def fail(self, *_: str) -> None:
        raise OSError(self.number, "as the test asked")


@pytest.mark.parametrize(
    ("number", "kind", "code"),
    [
        (errno.ENOSPC, RetryLater, "store.full"),
        (errno.EROFS, AskOperator, "store.read_only"),
        (errno.EIO, RetryLater, "store.io"),
    ],
)
def test_failures_are_the_stores_errors_and_the_old_record_stays(
    number: int, kind: type[Exception], code: str, tmp_path: Path
) -> None:
    LittleFsStore(str(tmp_path), Board()).commit(IDENTITY, b"old")
    failing = LittleFsStore(str(tmp_path), Failing(number))
    for action in (lambda: failing.commit(IDENTITY, b"new"), lambda: failing.erase(IDENTITY)):
        error = error_of(action)
        assert isinstance(error, kind) and error.code == code, error
    assert payload_of(LittleFsStore(str(tmp_path), Board())) == b"old"


ON_BOTH = ((VfsFat(), "/sd"), (VfsLfs2(), "/"))


@pytest.mark.parametrize(
    ("folder", "board", "kind"),
    [
        ("/dps-agent", Board((VfsFat(), "/")), "VfsFat"),
        ("/flash/dps-agent", Board((VfsFat(), "/flash")), "VfsFat"),
        ("/sd", Board(*ON_BOTH), "VfsFat"),
        ("/sd/dps-agent", Board(*ON_BOTH), "VfsFat"),
        ("sd/dps-agent", Board(*ON_BOTH), "VfsFat"),
        ("dps-agent", Board(*ON_BOTH, folder="/sd"), "VfsFat"),
        ("/flash/dps-agent", Board((VfsLfs2(), "/other")), "nothing"),
    ],
)
def test_a_folder_on_another_file_system_is_refused(folder: str, board: Board, kind: str) -> None:
    error = error_of(lambda: LittleFsStore(folder, board))
    assert isinstance(error, AskOperator) and error.code == "store.unsuitable", error
    assert f"came {kind}:" in error.message and folder in error.message


@pytest.mark.parametrize("folder", ["/dps-agent", "dps-agent", "/sdcard", "/"])
def test_a_folder_on_the_littlefs_beside_others_is_taken(folder: str) -> None:
    LittleFsStore(folder, Board(*ON_BOTH))


def test_a_firmware_that_does_not_say_what_is_mounted_is_refused() -> None:
    class Old(Board):
        def mount(self) -> tuple[tuple[object, str], ...]:
            raise TypeError("function missing 2 required positional arguments")

    error = error_of(lambda: LittleFsStore("/dps-agent", Old()))
    assert isinstance(error, AskOperator) and error.code == "store.unsuitable", error
