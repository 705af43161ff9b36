"""Every power cut at every operation of commits and erases, on simulated flash; faulty writers are caught."""

from dps_hal.store import slots as slots_module
from dps_hal.store.slots import OVERHEAD_BYTES, SlotStore, encode_slot
from support.disk.faulty_writers import FAULTY
from support.disk.flash import RECORD, FlashSlots, committing, erasing, sweep

TYPE_CHECKING = False
if TYPE_CHECKING:
    from support.disk.flash import Step

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


def test_the_sweep_catches_every_faulty_writer() -> None:
    for name in FAULTY:
        _, wrong = sweep(lambda device, faulty=FAULTY[name]: faulty({RECORD: device}), life(), torn_at=TEARS)
        assert wrong, f"{name} passed the sweep"


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
