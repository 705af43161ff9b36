"""Room on a small heap."""

import gc
import sys

from dps_hal.platform import MICROPYTHON

HANDSHAKE_BYTES = 42_000  # what mbedTLS takes from MicroPython's heap at most, for a chain with an RSA-4096 root
BLOCK_BYTES = 17_000  # its largest block: room for a record
BESIDE_HUB_BYTES = 56_000  # with the modules that talk to the hub, the clock's handshake with DPS
REGISTERS_BESIDE_HUB_BYTES = 76_000  # with them, a registration
_TLS_BESIDE_HEAP = ("esp32", "linux", "darwin")  # `sys.platform` of ports whose mbedTLS has memory of its own


def forget(*modules: str) -> None:
    """Lets go of modules whose work is done, so that their memory is free; the next import loads them again.

    On MicroPython only. What they made and somebody still has goes on to work.
    """
    for module in modules if MICROPYTHON else ():
        if sys.modules.pop(module, None) is not None:
            package, _, name = module.rpartition(".")
            if package:
                sys.modules[package].__dict__.pop(name, None)
    gc.collect()


def has_room(least_bytes: int = HANDSHAKE_BYTES) -> bool:
    """Whether a handshake, or what takes `least_bytes`, finds its memory in the heap; true where nobody can tell."""
    gc.collect()
    if not MICROPYTHON or sys.platform in _TLS_BESIDE_HEAP:
        return True
    if gc.mem_free() < least_bytes:  # type: ignore[attr-defined]
        return False
    try:
        bytearray(BLOCK_BYTES)
    except MemoryError:
        return False
    return True
