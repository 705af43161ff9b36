"""The Store contract on a MicroPython block device, and what that device may do wrong."""

from contracts.store import RULES, error_of, payload_of
from dps_hal.contracts import IDENTITY
from dps_hal.errors import AskOperator, RetryLater
from dps_hal.store.block import BLOCK_BYTES, BLOCK_COUNT, ERASE_BLOCK, SYNC, block_store

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable


class Flash:
    """A block device in memory; programming clears bits. `failing` maps a call's name to what it answers."""

    def __init__(self, blocks: int, block_bytes: int, page_bytes: int = 256) -> None:
        self.block_bytes = block_bytes
        self.page_bytes = page_bytes
        self.content = bytearray(b"\xff" * blocks * block_bytes)
        self.failing: dict[str, object] = {}
        self.erased: list[int] = []

    def readblocks(self, block: int, buffer: bytearray, offset: int) -> object:
        start = block * self.block_bytes + offset
        buffer[:] = self.content[start : start + len(buffer)]
        return self._answer("read")

    def writeblocks(self, block: int, buffer: bytes, offset: int) -> object:
        assert len(buffer) % self.page_bytes == 0 and offset + len(buffer) <= self.block_bytes
        if "write" not in self.failing:
            start = block * self.block_bytes + offset
            for i in range(len(buffer)):
                self.content[start + i] &= buffer[i]
        return self._answer("write")

    def ioctl(self, operation: int, argument: int) -> object:
        if operation == BLOCK_COUNT:
            return len(self.content) // self.block_bytes
        if operation == BLOCK_BYTES:
            return self.block_bytes
        if operation == ERASE_BLOCK:
            self.erased.append(argument)
            start = argument * self.block_bytes
            self.content[start : start + self.block_bytes] = b"\xff" * self.block_bytes
            return self._answer("erase")
        assert operation == SYNC
        return self._answer("sync")

    def _answer(self, call: str) -> object:
        failure = self.failing.get(call)
        if isinstance(failure, OSError):
            raise failure
        return failure


def assert_every_rule_holds(new: "Callable[[], Flash]", slot_bytes: int) -> None:
    for rule in RULES:
        flash = new()
        try:
            rule(lambda flash=flash: block_store(flash, 1, slot_bytes))
        except AssertionError as error:
            raise AssertionError(f"{rule.__name__}: {error}")


def test_every_store_rule_holds_where_a_slot_is_a_block() -> None:
    assert_every_rule_holds(lambda: Flash(5, 4096), 4096)


def test_every_store_rule_holds_where_a_slot_is_several_blocks() -> None:
    assert_every_rule_holds(lambda: Flash(40, 512), 4096)


def test_every_store_rule_holds_where_a_slot_is_part_of_a_block() -> None:
    assert_every_rule_holds(lambda: Flash(5, 8192), 4096)


def test_blocks_outside_the_records_are_not_touched() -> None:
    flash = Flash(7, 4096)
    store = block_store(flash, 2)
    for number in range(3):
        store.commit(IDENTITY, b"hub %d" % number)
    assert flash.erased == [2, 3, 2], flash.erased


def test_a_flash_that_is_too_small_is_refused() -> None:
    error = error_of(lambda: block_store(Flash(4, 4096), 1))
    assert isinstance(error, AskOperator) and error.code == "store.unsuitable" and "block 5" in error.message, error


def test_a_block_that_cannot_be_read_is_a_damaged_copy_and_the_next_commit_goes_over_it() -> None:
    for failure in (-5, OSError(5), True):
        for slot, left in ((0, b"hub B"), (1, b"hub A")):
            flash = Unreadable(failure)
            for payload in (b"hub A", b"hub B"):
                block_store(flash).commit(IDENTITY, payload)
            flash.bad = slot
            found = block_store(flash).load(IDENTITY)
            assert found is not None and found.payload == left and found.rolled_back, f"{slot} {failure!r}"
            block_store(flash).commit(IDENTITY, b"hub C")
            assert flash.bad < 0 and payload_of(block_store(flash)) == b"hub C", f"{slot} {failure!r}"
    flash = Flash(5, 4096)
    block_store(flash).commit(IDENTITY, b"hub A")
    flash.failing["read"] = -5
    error = error_of(lambda: block_store(flash).load(IDENTITY))
    assert isinstance(error, RetryLater) and error.code == "store.io", error


class Unreadable(Flash):
    """A device with one block that fails to be read until it is erased."""

    def __init__(self, failure: object) -> None:
        Flash.__init__(self, 5, 4096)
        self.failure = failure
        self.bad = -1

    def readblocks(self, block: int, buffer: bytearray, offset: int) -> object:
        self.failing = {"read": self.failure} if block == self.bad else {}
        return Flash.readblocks(self, block, buffer, offset)

    def ioctl(self, operation: int, argument: int) -> object:
        if operation == ERASE_BLOCK and argument == self.bad:
            self.bad = -1
        return Flash.ioctl(self, operation, argument)


def test_whatever_way_a_flash_fails_it_is_noticed_and_the_old_record_stays() -> None:
    for call in ("write", "erase", "sync"):
        for failure in (-5, OSError(5), True):
            flash = Flash(5, 4096)
            store = block_store(flash)
            store.commit(IDENTITY, b"older")
            store.commit(IDENTITY, b"old")
            flash.failing[call] = failure
            error = error_of(lambda store=store: store.commit(IDENTITY, b"new"))
            assert isinstance(error, RetryLater) and error.code == "store.io", f"{call} {failure!r}: {error}"
            flash.failing.clear()
            assert payload_of(store) == b"old", f"{call} {failure!r}"
