"""The numbers of Linux's ioctl requests: include/uapi/asm-generic/ioctl.h, and what MIPS and others have instead."""

import platform

_THREE_BITS = ("mips", "ppc", "powerpc", "sparc", "alpha")  # here the direction has three bits, elsewhere two


def read_request(kind: str, number: int, size: int, machine: str = "") -> int:
    """`_IOR(kind, number, size)`: the driver fills a structure of `size` bytes; `machine` as uname names it."""
    return _request(2, 1, kind, number, size, machine)


def write_request(kind: str, number: int, size: int, machine: str = "") -> int:
    """`_IOW(kind, number, size)`: the driver takes a structure of `size` bytes; `machine` as uname names it."""
    return _request(1, 2, kind, number, size, machine)


def _request(direction: int, of_parisc: int, kind: str, number: int, size: int, machine: str) -> int:
    machine = machine or platform.machine()
    lower = size << 16 | ord(kind) << 8 | number
    if machine.startswith(_THREE_BITS):
        return (4 if direction == 1 else 2) << 29 | lower
    return (of_parisc if machine.startswith("parisc") else direction) << 30 | lower
