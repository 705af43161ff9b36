"""The record store on a MicroPython block device: a flash partition of its own, without a file system.

The device is one with the extended interface (`readblocks` and `writeblocks` with an offset), as littlefs needs it:
esp32.Partition, rp2.Flash, pyb.Flash. Source: MicroPython documentation, class vfs.AbstractBlockDev.
"""

from dps_hal.contracts import IDENTITY, PROGRESS
from dps_hal.errors import AskOperator, RetryLater
from dps_hal.store.slots import SlotStore

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, Final

SYNC: "Final" = 3  # an operation of ioctl, as the next are
BLOCK_COUNT: "Final" = 4
BLOCK_BYTES: "Final" = 5
ERASE_BLOCK: "Final" = 6


class BlockSlots:
    """The `SlotDevice` of one record in the blocks from `first_block` on.

    Writes are filled up to a multiple of `program_bytes`: flash pages of 256 bytes are the largest in use. `slot_bytes`
    is a multiple of it.
    """

    erase_value = 0xFF

    def __init__(self, device: "Any", first_block: int, slot_bytes: int = 4096, program_bytes: int = 256) -> None:
        self.slot_bytes = slot_bytes
        self._device = device
        self._first_block = first_block
        self._program_bytes = program_bytes
        self._block_bytes: int = device.ioctl(BLOCK_BYTES, 0)
        self.blocks: int = -(-slot_bytes // self._block_bytes)  # how many make one slot

    def read(self, slot: int) -> "bytes | None":
        """See `SlotDevice.read`; None where the device reports any failure.

        What is erased at the end is left out: a small heap has no block for a whole slot.
        """
        try:
            buffer: Any = bytearray(self._used(slot))
            for start in range(0, len(buffer), self._block_bytes):
                self._read(slot, start, memoryview(buffer)[start : start + self._block_bytes])
        except RetryLater:
            return None
        content: bytes = buffer
        return content

    def erase(self, slot: int) -> None:
        """Erases all blocks of the slot."""
        for block in range(self._block(slot), self._block(slot) + self.blocks):
            self._do("erase", self._device.ioctl, ERASE_BLOCK, block)

    def program(self, slot: int, content: bytes) -> None:
        """See `SlotDevice.program`."""
        content += bytes([self.erase_value]) * (-len(content) % self._program_bytes)
        for start in range(0, len(content), self._block_bytes):
            block = self._block(slot) + start // self._block_bytes
            part = content[start : start + self._block_bytes]
            self._do("write", self._device.writeblocks, block, part, 0)

    def settle(self, slot: int) -> None:
        """Nothing: a read comes from the flash."""

    def renew(self, slot: int) -> None:
        """Nothing: a read comes from the flash."""

    def sync(self) -> None:
        """See `SlotDevice.sync`."""
        self._do("sync", self._device.ioctl, SYNC, 0)

    def _used(self, slot: int) -> int:
        """Bytes of the slot up to the end of its last page that is not erased."""
        page = bytearray(self._program_bytes)
        erased = bytes([self.erase_value]) * len(page)
        end = self.slot_bytes
        while end:
            self._read(slot, end - len(page), page)
            if page != erased:
                break
            end -= len(page)
        return end

    def _read(self, slot: int, start: int, part: "bytearray | memoryview") -> None:
        block, offset = divmod(start, self._block_bytes)
        self._do("read", self._device.readblocks, self._block(slot) + block, part, offset)

    def _block(self, slot: int) -> int:
        return self._first_block + slot * self.blocks

    def _do(self, action: str, call: "Callable[..., Any]", *arguments: "Any") -> None:
        """Calls the device; what it raises or answers but None, False and 0 is a failure."""
        failure: Any = None
        try:
            failure = call(*arguments)
        except OSError as error:
            failure = error
        if failure:
            raise RetryLater("store.io", f"cannot {action} the flash: {failure!r}")


def block_store(device: "Any", first_block: int = 0, slot_bytes: int = 4096, program_bytes: int = 256) -> SlotStore:
    """The `Store` in four slots of a block device, from `first_block` on; nothing else may use these blocks.

    AskOperator `store.unsuitable` if the device is too small.
    """
    identity = BlockSlots(device, first_block, slot_bytes, program_bytes)
    end = first_block + 4 * identity.blocks
    count = device.ioctl(BLOCK_COUNT, 0)
    if count < end:
        raise AskOperator("store.unsuitable", f"the flash has {count} blocks where the records end behind block {end}")
    progress = BlockSlots(device, first_block + 2 * identity.blocks, slot_bytes, program_bytes)
    return SlotStore({IDENTITY: identity, PROGRESS: progress})
