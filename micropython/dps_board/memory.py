"""Room on a small heap."""

import gc
import sys

from dps_hal.platform import MICROPYTHON

HANDSHAKE_BYTES = 42_000  # what mbedTLS takes from MicroPython's heap at most, for a chain with an RSA-4096 root
BLOCK_BYTES = 23_000  # its two buffers and what lies between them: room for a record, and for one to be sent
BESIDE_HUB_BYTES = 56_000  # with the modules that talk to the hub, the clock's handshake with DPS
REGISTERS_BESIDE_HUB_BYTES = 76_000  # with them, a registration
# `sys.platform` of ports whose mbedTLS has memory of its own
_TLS_IN_HEAP = MICROPYTHON and sys.platform not in ("esp32", "linux", "darwin")
_block: "list[bytearray]" = []  # what `hold_block` keeps


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
    """Whether a handshake, or what takes `least_bytes`, finds its memory in the heap; true where nobody can tell.

    Where it does, the place of the largest block is kept, see `hold_block`.
    """
    free_block()
    gc.collect()
    return not _TLS_IN_HEAP or (gc.mem_free() >= least_bytes and hold_block())  # type: ignore[attr-defined]


def hold_block() -> bool:
    """Keeps a place for the largest block of TLS while there is no connection; whether there is one.

    What comes to stay meanwhile then lies elsewhere, and not where the next connection needs its room in one piece.
    """
    if _TLS_IN_HEAP and not _block:
        try:
            _block.append(bytearray(BLOCK_BYTES))
        except MemoryError:
            return False
    return True


def free_block() -> None:
    """Gives that place back: to the connection that comes now, or to who has no memory otherwise."""
    _block.clear()
