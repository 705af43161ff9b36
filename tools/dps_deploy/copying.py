"""Copies files to a board over its serial console, so that a copy that breaks off leaves a board that says so."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from dps_deploy.bundles import BASE, OURS, PHASES
from dps_deploy.error_texts import TABLE
from dps_deploy.heap import shortage
from dps_hal.errors import AskOperator
from dps_hal.store.littlefs import refuse_unless_littlefs

ANSWER_LIMIT_S = 10
CHUNK_BYTES = 512  # the board needs several times that
_LAST = "main.py"
_NEW = "main.new"
_FOLDER = 0x4000  # of a file's mode
_BUNDLES = frozenset(f"lib/{name}.mpy" for name in (BASE, *PHASES, TABLE) if "." not in name)
_GUARD = """\
# Stands in for the program until all of its files are there.
import binascii, hashlib
print("The agent is not complete on this board. Run tools/deploy again.")
for path, digest in {digests!r}:
    try:
        with open(path, "rb") as file:
            here = binascii.hexlify(hashlib.sha256(file.read()).digest()).decode()
        if here[:16] != digest:
            print(path, "is damaged or of another version")
    except OSError:
        print(path, "is missing")
"""


class CopyError(Exception):
    """The copy did not come to its end; the text says where, and what the board does now."""


class Unsuitable(Exception):
    """The board has too small a heap, or no file system for the agent's records; nothing was changed on it."""


def guard(files: Mapping[str, bytes]) -> bytes:
    """A main.py that prints which of `files` are missing or differ; it loads and starts nothing else."""
    digests = tuple((path, hashlib.sha256(files[path]).hexdigest()[:16]) for path in sorted(files) if path != _LAST)
    return _GUARD.format(digests=digests).encode()


def copy(
    files: Mapping[str, bytes], device: str, show: Callable[[str], None], records: str = "", frozen: bool | None = None
) -> int:
    """Makes the files on the board at `device` those of `files`, by path; returns how many differed.

    main.py is written first, as the guard, and last, as itself. A file that is there already is left alone; a source
    beside a module is removed, because the board would load it instead, and so are modules of ours that an earlier
    deployment left there. CopyError; Unsuitable where the folder `records`, if one is named, does not lie on a
    littlefs, and where the heap is too small for the agent, which is in the firmware (`frozen`) or in files (False);
    with None any heap will do.
    """
    from mpremote.transport import TransportError
    from mpremote.transport_serial import SerialTransport

    doing, begun = f"open {device}", False
    try:
        board = SerialTransport(device, timeout=ANSWER_LIMIT_S)
        try:
            doing = "reach MicroPython's prompt (does a firmware run there? does another program use the port?)"
            board.enter_raw_repl(soft_reset=False)
            doing = "look at what is there"
            if frozen is not None and (problem := shortage("this board", _heap_kib(board), frozen)):
                raise Unsuitable(f"{problem}. Nothing was changed")
            if records:
                refuse_unless_littlefs(records, _Mounts(board))
            differing = [path for path in sorted(files) if not _is_there(board, path, files[path])]
            shadows = [f"{path[:-4]}.py" for path in sorted(files) if path.endswith(".mpy")]
            shadows = [path for path in shadows if board.fs_exists(path)]
            for folder in [f"lib/{package}" for package in OURS]:
                if any(path.startswith(f"{folder}/") for path in files):  # else mip has put them there
                    shadows += [path for path in _modules(board, folder) if path not in files]
            if not _BUNDLES.isdisjoint(files):
                shadows += [path for path in sorted(_BUNDLES.difference(files)) if board.fs_exists(path)]
            if differing or shadows:
                doing = f"write {_LAST}"
                begun = True
                _replace(board, _LAST, guard(files))
                for path in shadows:
                    doing = f"remove {path}"
                    board.fs_rmfile(path)
                for path in differing:
                    if path != _LAST:
                        doing = f"write {path}"
                        _make_folders(board, path)
                        _write(board, path, files[path])
                        show(path)
                doing = f"write {_LAST}"
                _replace(board, _LAST, files[_LAST])
                show(_LAST)
            doing = "leave the prompt"
            board.exit_raw_repl()
        finally:
            board.close()
    except (TransportError, OSError) as error:  # pyserial's error is an OSError
        lines = str(error).strip().splitlines() or [type(error).__name__]
        until_then = "until all is copied, the board starts what it had, or says at its start what is missing"
        now = f"Run this again; {until_then}" if begun else "Nothing was changed"
        raise CopyError(f"could not {doing}: {lines[-1]}. {now}") from None
    except AskOperator as error:
        raise Unsuitable(f"{error.message} [{error.code}]. Nothing was changed") from None
    return len(differing)


class _Mounts:
    """What the board's module `os` says of its file systems, before any code of the agent is there."""

    def __init__(self, board: Any) -> None:
        board.exec("import os, vfs\ntry:\n m = vfs.mount()\nexcept TypeError:\n m = []  # before MicroPython 1.25")
        self._mounts = board.eval("[(type(file_system).__name__, place) for file_system, place in m]")
        self._folder = board.eval("os.getcwd()")

    def mount(self) -> list[tuple[object, str]]:
        """As `vfs.mount()`: objects of classes with these names, and where they are mounted."""
        return [(type(kind, (), {})(), place) for kind, place in self._mounts]

    def getcwd(self) -> str:
        """As `os.getcwd()`."""
        return str(self._folder)


def _heap_kib(board: Any) -> int:
    """The whole heap; an ESP32 counts what it may still grow by."""
    board.exec("import gc\ngc.collect()")
    return int(board.eval("gc.mem_alloc() + gc.mem_free()")) // 1024


def _is_there(board: Any, path: str, content: bytes) -> bool:
    return board.fs_exists(path) and bytes(board.fs_hashfile(path, "sha256")) == hashlib.sha256(content).digest()


def _modules(board: Any, folder: str) -> Iterator[str]:
    """The files in a folder of the board, at any depth; none where it is not there."""
    for entry in board.fs_listdir(folder) if board.fs_exists(folder) else ():
        path = f"{folder}/{entry.name}"
        if entry.st_mode & _FOLDER:
            yield from _modules(board, path)
        else:
            yield path


def _make_folders(board: Any, path: str) -> None:
    for at, character in enumerate(path):
        if character == "/" and not board.fs_exists(path[:at]):
            board.fs_mkdir(path[:at])


def _write(board: Any, path: str, content: bytes) -> None:
    board.fs_writefile(path, content, chunk_size=CHUNK_BYTES)
    if not _is_there(board, path, content):
        raise OSError(f"the board holds something else in {path} than was written")


def _replace(board: Any, path: str, content: bytes) -> None:
    """Writes a file that is either the old or the new one at every moment."""
    _write(board, _NEW, content)
    board.exec(f"import os\nos.rename({_NEW!r}, {path!r})")
