"""Memory that the C library keeps and nobody uses: mallopt(3) and malloc_trim(3) of glibc; nothing with another one."""

from __future__ import annotations

import contextlib
import ctypes

_ARENA_MAX = -8  # M_ARENA_MAX, malloc.h


def share_one_arena() -> None:
    """From now on threads share one heap, and none has an arena of its own; for a program whose threads take turns."""
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).mallopt(_ARENA_MAX, 1)


def give_back() -> None:
    """Gives back to the system what is free, as after handshakes and imports."""
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
