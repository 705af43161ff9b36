"""The firmware of the board that QEMU emulates whole, from Debian's sources; see `mps2_board`."""

from __future__ import annotations

import os
import struct
import subprocess
from pathlib import Path
from typing import NamedTuple

from dps_deploy.modules import CHECKOUT, for_a_board, for_firmware
from support.board.cortex_firmware import made_once, run_to_build

BOARD_DIR = CHECKOUT / "tests" / "support" / "board" / "mps2_board"
CPU = ("-mthumb", "-mcpu=cortex-m3")


class Debian(NamedTuple):
    """Folders with Debian's sources, and QEMU's first words."""

    micropython: Path
    mbedtls: Path
    lwip: Path
    qemu: tuple[str, ...]


def build_firmware(debian: Debian, cache: Path, frozen: bool = True) -> Path:
    """The ELF file for QEMU, with the agent in it as `tools/deploy --freeze` writes it, or without.

    It is made, or was by an earlier run that left it in `cache`, or in a folder beside it.
    """
    if not frozen:
        cache = cache.with_name(cache.name + "-plain")
    staged = {}
    manifest = ['include("$(MPY_DIR)/extmod/asyncio")', f'module("_boot.py", base_path="{BOARD_DIR}", opt=3)']
    for path, source in for_firmware().items() if frozen else ():
        staged[f"frozen/{path}"] = for_a_board(source)
        manifest.append(f'module("{path}", opt=3)')
    staged["frozen/manifest.py"] = "\n".join([*manifest, ""])
    for file in sorted(BOARD_DIR.glob("*.[cm]*")):
        staged[f"modules/mps2/{file.name}"] = file.read_text()
    headers = [
        file.read_text()
        for file in sorted(BOARD_DIR.rglob("*.h")) + sorted(BOARD_DIR.glob("*.ld")) + sorted(BOARD_DIR.glob("*.py"))
    ]

    def make(folder: Path) -> None:
        for name, sources in (("lwip", debian.lwip), ("mbedtls", debian.mbedtls)):
            (folder / "lib").mkdir(exist_ok=True)
            (folder / "lib" / name).symlink_to(sources)
        _make(debian.micropython, folder)

    return made_once(cache, staged, [debian[:3], headers], make)


def flash_bytes(firmware: Path) -> int:
    """What an ELF file takes of a flash: the contents of its segments."""
    content = firmware.read_bytes()
    (table,) = struct.unpack_from("<I", content, 28)
    size, count = struct.unpack_from("<HH", content, 42)
    segments = [struct.unpack_from("<5I", content, table + size * number) for number in range(count)]
    return sum(in_file for kind, _, _, _, in_file in segments if kind == 1)  # PT_LOAD


def _make(micropython: Path, folder: Path) -> None:
    make = ["make", "-s", f"-j{os.cpu_count() or 1}"]
    compiler = folder / "mpy-cross"
    warnings = "-Wno-error -Wno-double-promotion -Wno-float-conversion"  # of lwIP and mbedTLS, and of later compilers
    run_to_build(
        [*make, "-C", str(micropython / "mpy-cross"), f"BUILD={compiler}", "PROG=mpy-cross", "CFLAGS_EXTRA=-Wno-error"]
    )
    libgcc = _asked("-print-libgcc-file-name")
    run_to_build(
        [
            *(*make, "-C", str(micropython / "ports" / "qemu"), f"BUILD={folder / 'build'}"),
            *("BOARD=DPS_MPS2", f"BOARD_DIR={BOARD_DIR}", f"LIBRARIES={folder}"),
            f"LIBC={Path(_asked('-print-file-name=libc_nano.a')).parent}",
            *(f"USER_C_MODULES={folder / 'modules'}", f"FROZEN_MANIFEST={folder / 'frozen' / 'manifest.py'}"),
            *("MICROPY_HEAP_SIZE=1024", f"MICROPY_MPYCROSS={compiler / 'mpy-cross'}"),  # the board makes its own heap
            *(f"LIBS=-Wl,--start-group -lc_nano {libgcc} -Wl,--end-group", f"CFLAGS_EXTRA={warnings}"),
        ]
    )


def _asked(question: str) -> str:
    return subprocess.run(
        ["arm-none-eabi-gcc", *CPU, question], capture_output=True, text=True, check=True, timeout=60
    ).stdout.strip()
