"""Calls `main` of a module in MicroPython's unix port, with a board's flash in its memory.

    python board_launcher.py FLASH HEAP MODULE [ARGUMENT ...]

FLASH is a ROMFS image, which is mapped into memory as a microcontroller maps its flash, or a folder of .mpy. The
interpreter is a library in this process, so what is mapped here is there for it, outside its heap.
"""

import ctypes
import mmap
import os
import sys

from micropython_unix import run_main

MOUNT = """
import uctypes, vfs
vfs.mount(vfs.VfsRom(uctypes.bytearray_at({address}, {size})), "/rom")
"""
START = """
import sys
sys.path.insert(0, {folder!r})
import {module}
{module}.main(*{arguments!r})
"""


def main(flash: str, heap: str, module: str, *arguments: str) -> int:
    """Exit status of the module."""
    program = START.format(folder=flash if os.path.isdir(flash) else "/rom", module=module, arguments=arguments)
    if os.path.isfile(flash):
        size = os.path.getsize(flash)
        with open(flash, "rb") as file:
            mapped = mmap.mmap(file.fileno(), size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        address = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
        program = MOUNT.format(address=address, size=size) + program
    return int(run_main(["micropython", "-X", f"heapsize={heap}", "-c", program]) or 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
