"""A board for tests: its files compiled as for a flash, and MicroPython's unix port with a small heap to run them."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import ssl
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpremote.romfs import make_romfs

from dps_deploy.modules import (
    STARTS,
    Module,
    Sources,
    compiled,
    needed,
    of_any_program,
    packages,
    programs_of,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

CHECKOUT = Path(__file__).resolve().parents[3]
PROGRAMS = (
    "board_app.py",
    "board_https.py",
    "board_hub.py",
    "board_life.py",
    "board_program.py",
)  # for tests, beside this file
TO_SWTPM = Module(CHECKOUT / "hal/dps_hal/tpm/tcp.py", "dps_hal/tpm/tcp.py")  # for tests, not for boards
LIBFAKETIME = next(iter(sorted(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))), None)


@dataclass(frozen=True)
class Image:
    """Compiled files: a folder of .mpy and the same as one ROMFS image."""

    folder: Path
    rom: Path


@functools.cache
def board_sources(texts: bool = True) -> Sources:
    """What a board may load, as it is deployed: the example program, the bundles, and what tests run on them."""
    programs = programs_of(needed(STARTS))
    programs |= {name: Path(__file__).with_name(name).read_text() for name in PROGRAMS}
    return Sources(programs, packages([*of_any_program(), TO_SWTPM], programs.values(), texts))


def build(folder: Path, texts: bool = True) -> Image:
    """Compiles that into `folder`."""
    sources = board_sources(texts)
    return compiled_into(folder, {**sources.programs, **sources.packages})


def compiled_into(folder: Path, sources: Mapping[str, str]) -> Image:
    """Compiles `sources`, by path, into `folder`."""
    code = folder / "mpy"
    for path, source in sources.items():
        target = (code / path).with_suffix(".mpy")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(compiled(source, path))
    with contextlib.redirect_stdout(io.StringIO()):
        image = make_romfs(str(code), mpy_cross=None)
    rom = folder / "rom.img"
    rom.write_bytes(image)
    return Image(code, rom)


def micropython(
    image: Image,
    script: str,
    *arguments: str,
    heap_kb: int = 1024,
    in_flash: bool = True,
    rtc: Path | None = None,
    timeout_s: float = 90,
) -> list[dict[str, Any]]:
    """Calls `main(*arguments)` of one of PROGRAMS on a heap of `heap_kb` and returns the JSON lines it printed.

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
    launcher = [sys.executable, "tests/support/board/launcher.py", str(place), f"{heap_kb}k", script, *arguments]
    done = subprocess.run(
        launcher, cwd=CHECKOUT, env=environ, capture_output=True, text=True, timeout=timeout_s, check=False
    )
    assert done.returncode == 0, f"exit status {done.returncode} of {' '.join(launcher)}\n{done.stdout}{done.stderr}"
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def der(*pem_files: Path) -> bytes:
    """The certificates in PEM files, in DER, one behind the other, as a board keeps its roots."""
    return b"".join(ssl.PEM_cert_to_DER_cert(path.read_text()) for path in pem_files)
