"""How much heap the agent needs on a board, and what is said where there is less."""

from __future__ import annotations

# KiB of 32-bit heap on which a device registers, lives at its hub and reconnects, with TLS in that heap and chains of
# certificates as large as Azure's: the smallest ones on which that is tried on the emulated Cortex-M3, see "Memory" in
# micropython/README.md. By where the agent's modules lie.
FROZEN_KIB = 96
IN_FILES_KIB = 300


def shortage(board: str, heap_kib: int, frozen: bool) -> str:
    """Why the agent cannot run on a board with such a heap, and what to do; "" where it can."""
    needed_kib = FROZEN_KIB if frozen else IN_FILES_KIB
    if heap_kib >= needed_kib:
        return ""
    remedy = (
        "choose a board with more"
        if frozen or heap_kib < FROZEN_KIB
        else "freeze the agent into the firmware and give --frozen (micropython/README.md, Memory)"
    )
    where = "frozen into the firmware" if frozen else "in files"
    return (
        f"{board} has about {heap_kib} KiB for heap and TLS, and the agent needs {needed_kib} with its modules {where},"
        f" your program aside: {remedy}"
    )
