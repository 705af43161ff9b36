"""A slot device in memory that loses power at the n-th operation and tells every state that may be left.

The model is the worst of flash and of a disk's cache: what was erased or programmed since the last sync may be there or
not, each operation on its own, and the last one that is there may be torn after any byte, or have left garbage in the
sector that was under way, or have left it so that it cannot be read until it is erased. Programming flips bits one way
only, so a slot that was not erased becomes the mixture. A sync that fails takes what waited for it for written, as
Linux does: it can be read, and no later sync makes it durable; nor does one after the kernel's own write-back failed
(`forget_pending`). Runs on both runtimes.
"""

from dps_hal.errors import DpsError, RetryLater
from dps_hal.store.slots import SlotStore

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    Slots = tuple[bytes, bytes]
    # name of the step, what it does, the payload that the record has afterwards
    Step = tuple[str, Callable[[SlotStore], None], bytes | None]

RECORD = "identity"
SECTOR_BYTES = 512
GARBAGE = b"\xa5" * SECTOR_BYTES
UNREADABLE = b"\xeb\x90\xd1\x0e" * (SECTOR_BYTES // 4)  # stands for a sector that cannot be read
WHAT_POWER_LEAVES = (GARBAGE, UNREADABLE)  # in the sector that was under way


class PowerCut(Exception):
    """The supply is gone; no code of the product catches this."""


class Supply:
    """The power: cut at the n-th operation (counted from 1) of all devices that hang on it, or never."""

    def __init__(self, cut_at: int = 0) -> None:
        self.cut_at = cut_at
        self.operations = 0

    def spend(self) -> None:
        """Counts one operation; PowerCut if it is the one."""
        self.operations += 1
        if self.operations == self.cut_at:
            raise PowerCut(f"cut={self.cut_at}")


class FlashSlots:
    """A `SlotDevice` of two slots in memory.

    `failing` names one operation, "erase", "program" or "sync", that raises store.io when its count in
    `failing_after` has run down, `failing_times` times (None: for ever); "late-sync" is a sync that raises it though
    all was stored, "silent" a program that reports success and writes nothing.
    """

    def __init__(
        self,
        slot_bytes: int = 4096,
        erase_value: int = 0xFF,
        content: "Slots | None" = None,
        supply: "Supply | None" = None,
    ) -> None:
        self.slot_bytes = slot_bytes
        self.erase_value = erase_value
        blank = bytes([erase_value]) * slot_bytes
        self._durable = list(content or (blank, blank))
        self._cached = list(self._durable)  # what a reader sees
        self._pending: list[tuple[int, bytes | None, bool]] = []  # slot, content (None: an erase), over what is there
        self.supply = supply or Supply()
        self.counts = {"read": 0, "erase": 0, "program": 0, "renew": 0, "sync": 0}
        self.failing = ""
        self.failing_after = 0
        self.failing_times: int | None = None

    def read(self, slot: int) -> "bytes | None":
        """What a reader sees: the cache, and nothing of a sector that cannot be read."""
        self.counts["read"] += 1
        return readable(self._cached[slot])

    def after_a_kill(self, supply: Supply) -> "FlashSlots":
        """The same flash and cache for the next process; this one stays as it is."""
        flash = FlashSlots(self.slot_bytes, self.erase_value, self.durable(), supply)
        flash._cached = list(self._cached)
        flash._pending = list(self._pending)
        return flash

    def erase(self, slot: int) -> None:
        """See `SlotDevice.erase`."""
        self._do("erase", slot, None)

    def program(self, slot: int, content: bytes) -> None:
        """See `SlotDevice.program`."""
        if len(content) > self.slot_bytes:
            raise ValueError(f"{len(content)} bytes do not fit into a slot of {self.slot_bytes}")
        if self.failing == "silent":
            self.counts["program"] += 1
            return
        self._do("program", slot, content)

    def settle(self, slot: int) -> None:
        """See `SlotDevice.settle`."""
        self.sync()
        self._cached[slot] = self._durable[slot]

    def renew(self, slot: int) -> None:
        """See `SlotDevice.renew`."""
        self._do("renew", slot, self._cached[slot], True)

    def sync(self) -> None:
        """See `SlotDevice.sync`."""
        try:
            self._fail_or_count("sync")
        except RetryLater:
            if self.failing == "late-sync":
                self._store_pending()
            self.forget_pending()
            raise
        self.supply.spend()
        self._store_pending()

    def forget_pending(self) -> None:
        """What waits for a sync is lost, and still shown: a write-back that failed, of which nobody was told."""
        self._pending = []

    def _store_pending(self) -> None:
        for slot, program, over in self._pending:
            self._durable[slot] = self._changed(self._durable[slot], program, self.slot_bytes, over)
        self._pending = []

    def durable(self) -> "Slots":
        """The two slots as they are for certain."""
        return (self._durable[0], self._durable[1])

    def aftermaths(self, torn_at: "tuple[int, ...] | None" = None) -> "list[Slots]":
        """Every pair of slots that may be left when the power goes now, none twice.

        `torn_at` bounds where the last surviving operation is torn (bytes from the slot's start); None: anywhere. It
        leaves garbage in the first of its sectors as well, or makes it unreadable; with None, each.
        """
        left: dict[Slots, bool] = {}
        for chosen in range(1 << len(self._pending)):
            slots = list(self._durable)
            survivors = [self._pending[i] for i in range(len(self._pending)) if chosen >> i & 1]
            for slot, program, over in survivors[:-1]:
                slots[slot] = self._changed(slots[slot], program, self.slot_bytes, over)
            if not survivors:
                left[(slots[0], slots[1])] = True
            for slot, program, over in survivors[-1:]:
                length = self.slot_bytes if program is None else len(program)
                tears = list(range(length) if torn_at is None else torn_at)
                tears.append(length)
                for tear in tears:
                    torn = list(slots)
                    torn[slot] = self._changed(slots[slot], program, tear, over)
                    left[(torn[0], torn[1])] = True
                for start in range(0, length if torn_at is None else 1, SECTOR_BYTES):
                    content = self._changed(slots[slot], program, start, over)
                    end = min(start + SECTOR_BYTES, self.slot_bytes)
                    for sector in WHAT_POWER_LEAVES:
                        torn = list(slots)
                        torn[slot] = content[:start] + sector[: end - start] + content[end:]
                        left[(torn[0], torn[1])] = True
        return list(left)

    def _do(self, operation: str, slot: int, content: "bytes | None", over: bool = False) -> None:
        self._fail_or_count(operation)
        self._pending.append((slot, content, over))
        self._cached[slot] = self._changed(self._cached[slot], content, self.slot_bytes, over)
        self.supply.spend()

    def _fail_or_count(self, operation: str) -> None:
        if operation == self.failing or (operation == "sync" and self.failing == "late-sync"):
            if self.failing_after == 0 and self.failing_times != 0:
                if self.failing_times is not None:
                    self.failing_times -= 1
                raise RetryLater("store.io", f"{operation} failed, as the test asked")
            self.failing_after = max(0, self.failing_after - 1)
        self.counts[operation] += 1

    def _changed(self, content: bytes, program: "bytes | None", length: int, over: bool) -> bytes:
        if program is None:
            return bytes([self.erase_value]) * length + content[length:]
        length = min(length, len(program))
        if over:
            return program[:length] + content[length:]
        before, after = int.from_bytes(content[:length], "big"), int.from_bytes(program[:length], "big")
        mixture = before & after if self.erase_value else before | after
        return mixture.to_bytes(length, "big") + content[length:]


def readable(content: bytes) -> "bytes | None":
    """`content`, or None where one of its sectors cannot be read."""
    return None if UNREADABLE[:16] in content else content


def sweep(
    new_store: "Callable[[FlashSlots], SlotStore]",
    steps: "list[Step]",
    depth: int = 1,
    slot_bytes: int = 48,
    erase_value: int = 0xFF,
    torn_at: "tuple[int, ...] | None" = None,
) -> "tuple[int, list[str]]":
    """Cuts `steps` at every operation and looks at every state that may be left.

    After each cut a new store must load what was durable or what was being written, and a further commit must work.
    With `depth` 2 the interrupted step is done again and cut again. Returns how many states it saw and what was wrong.
    """
    wrong: list[str] = []
    flash = FlashSlots(slot_bytes, erase_value)
    states = 0
    for number in range(len(steps)):
        name, _, _ = steps[number]
        states += _sweep_step(new_store, steps[number], flash, depth, torn_at, f"step={number} ({name})", wrong)
        steps[number][1](new_store(flash))
        flash = FlashSlots(slot_bytes, erase_value, flash.durable())  # done is durable: what is not, is lost here
        if _payload(new_store(flash)) != steps[number][2]:
            wrong.append(f"step={number} ({name}): done, but {_payload(new_store(flash))!r} after the next cut")
    return states, wrong


def _sweep_step(
    new_store: "Callable[[FlashSlots], SlotStore]",
    step: "Step",
    start: FlashSlots,
    depth: int,
    torn_at: "tuple[int, ...] | None",
    line: str,
    wrong: "list[str]",
) -> int:
    _, action, after = step
    before = _payload(new_store(start))
    states = 0
    cut = 0
    while True:
        cut += 1
        flash = FlashSlots(start.slot_bytes, start.erase_value, start.durable(), Supply(cut))
        try:
            action(new_store(flash))
            return states
        except PowerCut:
            pass
        except DpsError as error:
            wrong.append(f"{line}: {error.code} without any failure of the flash")
            return states
        left = flash.aftermaths(torn_at)
        for number in range(len(left)):
            states += 1
            where = f"{line} cut={cut} left={number}"
            rebooted = FlashSlots(start.slot_bytes, start.erase_value, left[number])
            try:
                found = _payload(new_store(rebooted))
                if found not in (before, after):
                    wrong.append(f"{where}: {found!r} is neither {before!r} nor {after!r}")
                    continue
                if depth > 1:
                    states += _sweep_step(new_store, step, rebooted, depth - 1, torn_at, where, wrong)
                new_store(rebooted).commit(RECORD, b"further")
                rebooted = FlashSlots(start.slot_bytes, start.erase_value, rebooted.durable())
                if _payload(new_store(rebooted)) != b"further":
                    wrong.append(f"{where}: a further commit left {_payload(new_store(rebooted))!r}")
            except DpsError as error:
                wrong.append(f"{where}: {error.code} after the reboot")


def _payload(store: SlotStore) -> "bytes | None":
    found = store.load(RECORD)
    return found.payload or None if found is not None else None  # empty: no copy is whole


def committing(payload: bytes) -> "Step":
    """The step that commits `payload`."""
    return (f"commit {payload!r}", lambda store: store.commit(RECORD, payload), payload)


def erasing() -> "Step":
    """The step that erases the record."""
    return ("erase", lambda store: store.erase(RECORD), None)
