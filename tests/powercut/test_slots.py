"""Every power cut at every operation of commits and erases, on simulated flash; faulty writers are caught."""

from dps_hal import slots as slots_module
from dps_hal.slots import OVERHEAD_BYTES, SlotStore, decode_slot, encode_slot
from support.flash import RECORD, FlashSlots, committing, erasing, sweep

TYPE_CHECKING = False
if TYPE_CHECKING:
    from dps_hal.contracts import StoredRecord
    from support.flash import Step

# Where a nested sweep tears: each field's border, in the middle of a field, and in the payload.
TEARS = (1, 4, 8, 12, 15, 16, 19, 20, 22)


def new_store(device: FlashSlots) -> SlotStore:
    return SlotStore({RECORD: device})


def life() -> "list[Step]":
    """First commits, enough to use each slot twice, a reset, and a new life after it."""
    return [
        committing(b"press-07 at hub A"),
        committing(b"press-07 at hub B"),
        committing(b"short"),
        committing(b"press-07 at hub C"),
        erasing(),
        erasing(),
        committing(b"press-08 at hub A"),
        erasing(),
    ]


def assert_clean(found: "tuple[int, list[str]]", at_least: int) -> None:
    states, wrong = found
    assert not wrong, wrong[0]
    assert states >= at_least, f"only {states} states: the sweep does not sweep"


def test_a_cut_torn_after_any_byte_leaves_the_old_record_or_the_new_one() -> None:
    assert_clean(sweep(new_store, life()), 1000)


def test_flash_that_erases_to_zero_is_as_safe() -> None:
    assert_clean(sweep(new_store, life(), erase_value=0x00), 900)


def test_a_second_cut_while_the_first_is_repaired_loses_nothing() -> None:
    assert_clean(sweep(new_store, life(), depth=2, torn_at=TEARS), 5000)


def test_a_cut_at_the_generation_wrap_around_loses_nothing() -> None:
    start = [("set the counter", lambda store: set_generations(store, 0xFFFFFFFD), b"two before the wrap")]
    steps = [committing(b"one before"), committing(b"at the wrap"), committing(b"behind it"), erasing()]
    assert_clean(sweep(new_store, start + steps, torn_at=TEARS), 200)


def set_generations(store: SlotStore, generation: int) -> None:
    device = store._devices[RECORD]
    device.erase(0)
    device.program(0, encode_slot(generation, b"two before the wrap"))
    device.sync()


def test_a_torn_commit_is_reported_as_rolled_back_and_the_next_commit_clears_it() -> None:
    device = FlashSlots(64)
    store = new_store(device)
    store.commit(RECORD, b"old")
    whole = encode_slot(2, b"new")
    device.program(1, whole[:-1])
    found = store.load(RECORD)
    assert found is not None and found.payload == b"old" and found.rolled_back
    store.commit(RECORD, b"newer")
    found = store.load(RECORD)
    assert found is not None and found.payload == b"newer" and not found.rolled_back


# Writers with a fault: a sweep that lets one of them pass proves nothing.


class WritesInPlace(SlotStore):
    """Keeps one slot only."""

    def commit(self, record: str, payload: bytes) -> None:
        device = self._devices[record]
        device.erase(0)
        device.program(0, encode_slot(1, payload))
        device.sync()


class TakesTurnsWithoutLooking(SlotStore):
    """Begins with slot 0 after each start, whatever is in it."""

    def commit(self, record: str, payload: bytes) -> None:
        found = self.load(record)
        device = self._devices[record]
        device.erase(0)
        device.program(0, encode_slot(1 if found is None else found.generation + 1, payload))
        device.sync()


class NeverSyncs(SlotStore):
    """Believes that what was written is durable."""

    def commit(self, record: str, payload: bytes) -> None:
        device = self._devices[record]
        found = [decode_slot(device.read(slot), device.erase_value) for slot in (0, 1)]
        newest = slots_module._newest(found)
        target = 0 if newest is None else 1 - newest
        generation = 0 if newest is None else found[newest].generation or 0
        device.erase(target)
        device.program(target, encode_slot(generation + 1, payload))


class ForgetsToErase(SlotStore):
    """Programs over what is there."""

    def commit(self, record: str, payload: bytes) -> None:
        device = self._devices[record]
        found = [decode_slot(device.read(slot), device.erase_value) for slot in (0, 1)]
        newest = slots_module._newest(found)
        target = 0 if newest is None else 1 - newest
        generation = 0 if newest is None else found[newest].generation or 0
        device.program(target, encode_slot(generation + 1, payload))
        device.sync()


class TakesTheHeaderForTheWhole(SlotStore):
    """Checks the header's CRC only."""

    def load(self, record: str) -> "StoredRecord | None":
        device = self._devices[record]
        best = None
        for slot in (0, 1):
            content = device.read(slot)
            found = decode_slot(content, device.erase_value)
            if found.generation is not None and (best is None or found.generation > best[0]):
                length = int.from_bytes(content[12:16], "big")
                best = (found.generation, content[20 : 20 + length])
        if best is None:
            return None
        return slots_module.StoredRecord(best[1], best[0], False)


class ErasesTheNewestFirst(SlotStore):
    """Resets without a tombstone."""

    def erase(self, record: str) -> None:
        device = self._devices[record]
        found = [decode_slot(device.read(slot), device.erase_value) for slot in (0, 1)]
        newest = slots_module._newest(found)
        if newest is not None:
            for slot in (newest, 1 - newest):
                device.erase(slot)
                device.sync()


class ErasesBothWithOneSync(SlotStore):
    """Resets oldest first, but leaves the order to the cache."""

    def erase(self, record: str) -> None:
        device = self._devices[record]
        found = [decode_slot(device.read(slot), device.erase_value) for slot in (0, 1)]
        newest = slots_module._newest(found)
        if newest is not None:
            device.erase(1 - newest)
            device.erase(newest)
            device.sync()


FAULTY = (
    WritesInPlace,
    TakesTurnsWithoutLooking,
    NeverSyncs,
    ForgetsToErase,
    TakesTheHeaderForTheWhole,
    ErasesTheNewestFirst,
    ErasesBothWithOneSync,
)


def test_the_sweep_catches_every_faulty_writer() -> None:
    for faulty in FAULTY:
        _, wrong = sweep(lambda device, faulty=faulty: faulty({RECORD: device}), life(), torn_at=TEARS)
        assert wrong, f"{faulty.__name__} passed the sweep"


def test_a_generation_compare_without_wrap_around_is_caught() -> None:
    honest = slots_module._is_later
    start = [("set the counter", lambda store: set_generations(store, 0xFFFFFFFF), b"two before the wrap")]
    try:
        slots_module._is_later = lambda generation, than: generation > than
        start.append(committing(b"behind it"))
        _, wrong = sweep(new_store, start, torn_at=TEARS)
    finally:
        slots_module._is_later = honest
    assert wrong


def test_a_commit_costs_one_erase_and_one_program_of_one_slot() -> None:
    device = FlashSlots(64)
    for number in range(4):
        counts = dict(device.counts)
        new_store(device).commit(RECORD, b"x" * (64 - OVERHEAD_BYTES))
        spent = {name: device.counts[name] - counts[name] for name in counts}
        assert spent["erase"] == 1 and spent["program"] == 1, f"commit {number}: {spent}"


def test_loading_writes_nothing() -> None:
    device = FlashSlots(64)
    new_store(device).commit(RECORD, b"old")
    device.program(1, b"torn")
    before = dict(device.counts)
    new_store(device).load(RECORD)
    for operation in ("erase", "program", "sync"):
        assert device.counts[operation] == before[operation], operation
