"""The Store contract on simulated flash, and what two-slot records add to it."""

import struct

from contracts.store import RULES, error_of, payload_of
from dps_hal.contracts import IDENTITY, PROGRESS
from dps_hal.errors import AskOperator, RetryLater
from dps_hal.store.slots import (
    DAMAGED,
    EMPTY,
    HEADER_BYTES,
    OVERHEAD_BYTES,
    TOMBSTONE,
    VALID,
    SlotStore,
    crc32,
    crc32_by_bits,
    decode_slot,
    encode_slot,
)
from support.disk.flash import UNREADABLE, FlashSlots


def assert_every_rule_holds(slot_bytes: int, erase_value: int) -> None:
    for rule in RULES:
        devices = {IDENTITY: FlashSlots(slot_bytes, erase_value), PROGRESS: FlashSlots(slot_bytes, erase_value)}
        try:
            rule(lambda devices=devices: SlotStore(devices))
        except AssertionError as error:
            raise AssertionError(f"{rule.__name__}, slot_bytes={slot_bytes} erase_value={erase_value}: {error}")


def test_every_store_rule_holds_on_flash() -> None:
    assert_every_rule_holds(4096, 0xFF)


def test_every_store_rule_holds_on_flash_that_erases_to_zero() -> None:
    assert_every_rule_holds(4096, 0x00)


def test_every_store_rule_holds_on_other_slot_sizes() -> None:
    assert_every_rule_holds(512, 0xFF)
    assert_every_rule_holds(65536, 0xFF)


def flash_with(first: bytes, second: bytes = b"") -> FlashSlots:
    blank = b"\xff" * 256
    return FlashSlots(256, 0xFF, (first + blank[len(first) :], second + blank[len(second) :]))


def store_on(device: FlashSlots) -> SlotStore:
    return SlotStore({IDENTITY: device})


def of_version(version: int, generation: int) -> bytes:
    """A slot as a later format would write it: the header as specified, something else behind it."""
    header = b"DPSr" + version.to_bytes(4, "big") + generation.to_bytes(4, "big") + b"\x00\x00\x00\x04"
    return header + crc32(header).to_bytes(4, "big") + b"who knows what"


def test_the_bytes_of_a_slot_are_those_of_the_specification() -> None:
    expected = b"DPSr\x00\x00\x00\x01\x00\x00\x00\x07\x00\x00\x00\x05\xcc\x9e\x0e\x4fhello\x11\x8f\xdd\x04"
    assert encode_slot(7, b"hello") == expected, encode_slot(7, b"hello")
    assert decode_slot(expected, 0xFF).payload == b"hello"


def test_a_flipped_bit_anywhere_in_a_slot_is_refused() -> None:
    whole = encode_slot(7, b"hello")
    for bit in range(len(whole) * 8):
        altered = bytearray(whole)
        altered[bit >> 3] ^= 1 << (bit & 7)
        assert decode_slot(bytes(altered), 0xFF).state == DAMAGED, f"bit={bit}"


def test_a_slot_cut_short_anywhere_is_refused() -> None:
    whole = encode_slot(7, b"hello")
    assert decode_slot(b"", 0xFF).state == EMPTY
    for length in range(1, len(whole)):
        assert decode_slot(whole[:length], 0xFF).state == DAMAGED, f"length={length}"


def test_a_length_beyond_the_slot_is_refused() -> None:
    for length in (6, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE):  # those over 30 bits are no index on a 32-bit board
        header = b"DPSr" + struct.pack(">III", 1, 7, length)
        content = header + struct.pack(">I", crc32(header)) + b"hello" + bytes(9)
        assert decode_slot(content, 0xFF).state == DAMAGED, f"length={length}"


def test_a_new_header_over_an_old_payload_is_refused() -> None:
    old, new = encode_slot(7, b"hello"), encode_slot(9, b"world")
    mixed = new[:HEADER_BYTES] + old[HEADER_BYTES:]
    assert decode_slot(mixed, 0xFF).state == DAMAGED
    assert encode_slot(7, b"hello")[-4:] != encode_slot(9, b"hello")[-4:]


def test_a_tombstone_is_not_an_empty_payload() -> None:
    assert decode_slot(encode_slot(7, None), 0xFF).state == TOMBSTONE
    assert decode_slot(encode_slot(7, b""), 0xFF).state == VALID


def test_both_crc_routines_agree() -> None:
    assert crc32_by_bits(b"123456789") == 0xCBF43926
    for length in range(70):
        content = bytes([i * 37 + length & 0xFF for i in range(length)])
        assert crc32_by_bits(content) == crc32(content), f"length={length}"


def test_a_newer_format_in_either_slot_stops_load_and_commit_and_nothing_is_written() -> None:
    for version in (0, 2, 0xFFFFFFFF):
        for slots in (
            (of_version(version, 5), b""),
            (encode_slot(4, b"old"), of_version(version, 5)),
            (of_version(version, 4), encode_slot(5, b"new")),
        ):
            device = flash_with(slots[0], slots[1])
            for action in (
                lambda device=device: store_on(device).load(IDENTITY),
                lambda device=device: store_on(device).commit(IDENTITY, b"mine"),
                lambda device=device: store_on(device).forget_older(IDENTITY),
            ):
                error = error_of(action)
                assert isinstance(error, AskOperator) and error.code == "store.unknown_version", f"{slots} {error}"
            assert device.counts["erase"] == device.counts["program"] == 0, slots


def test_a_reset_removes_a_newer_format() -> None:
    for slots in (
        (of_version(2, 5), b""),
        (encode_slot(4, b"old"), of_version(2, 5)),
        (of_version(2, 5), of_version(2, 6)),
    ):
        device = flash_with(slots[0], slots[1])
        store_on(device).erase(IDENTITY)
        assert store_on(device).load(IDENTITY) is None
        assert decode_slot(device.read(0), 0xFF).state == decode_slot(device.read(1), 0xFF).state == EMPTY


def test_a_header_with_a_damaged_version_is_damage_not_a_newer_format() -> None:
    torn = bytearray(encode_slot(5, b"new"))
    torn[7] = 2
    found = store_on(flash_with(encode_slot(4, b"old"), bytes(torn))).load(IDENTITY)
    assert found is not None and found.payload == b"old" and found.rolled_back


def test_a_damaged_newer_copy_is_reported_and_a_damaged_older_one_is_not() -> None:
    older, current = encode_slot(4, b"older"), encode_slot(5, b"current")
    found = store_on(flash_with(older, current[:-1] + b"\x00")).load(IDENTITY)
    assert found is not None and found.payload == b"older" and found.rolled_back
    found = store_on(flash_with(older[:-1] + b"\x00", current)).load(IDENTITY)
    assert found is not None and found.payload == b"current" and not found.rolled_back
    found = store_on(flash_with(b"garbage", current)).load(IDENTITY)  # nobody can say how old it was
    assert found is not None and found.payload == b"current" and found.rolled_back


def test_a_record_without_a_whole_copy_is_told_from_none_and_the_next_commit_works() -> None:
    torn = encode_slot(4, b"older")[:-1]
    for first, second in ((torn, b"garbage"), (torn, encode_slot(5, b"current")[:-1]), (torn, b""), (b"", torn)):
        device = flash_with(first, second)
        lost = store_on(device).load(IDENTITY)
        assert lost is not None and lost.payload == b"" and not lost.rolled_back, lost
        store_on(device).commit(IDENTITY, b"new")
        found = store_on(device).load(IDENTITY)
        assert found is not None and found.payload == b"new"


def test_the_first_commit_beside_a_damaged_copy_goes_over_it_and_leaves_the_erased_slot() -> None:
    for damaged in (b"garbage", encode_slot(5, b"torn")[:-1]):
        device = flash_with(b"", damaged)
        store_on(device).commit(IDENTITY, b"new")
        found = store_on(device).load(IDENTITY)
        assert found is not None and found.payload == b"new", found
        assert not found.rolled_back, "the damaged copy still looks like a newer one"
        assert decode_slot(device.read(0), 0xFF).state == EMPTY and decode_slot(device.read(1), 0xFF).state == VALID


def test_where_no_copy_is_whole_the_unreadable_slot_is_written_first_and_the_other_one_after_it() -> None:
    bad = b"\xff" * 16 + UNREADABLE[:64]
    for first, second, target in ((bad, b"", 0), (b"", bad, 1), (b"garbage", bad, 1), (bad, b"garbage", 0)):
        device = flash_with(first, second)
        lost = store_on(device).load(IDENTITY)
        assert lost is not None and lost.payload == b"", lost
        done: list[tuple[str, int]] = []
        for name in ("erase", "program", "renew"):
            watch(device, name, done)
        store_on(device).commit(IDENTITY, b"new")
        assert done == [("erase", target), ("program", target), ("renew", 1 - target)], done
        assert payload_of(store_on(device)) == b"new"


def watch(device: FlashSlots, name: str, done: "list[tuple[str, int]]") -> None:
    call = getattr(device, name)

    def watched(slot: int, *rest: bytes) -> None:
        done.append((name, slot))
        call(slot, *rest)

    setattr(device, name, watched)


def test_a_commit_over_two_damaged_copies_counts_on_from_the_later_one() -> None:
    device = flash_with(encode_slot(4, b"older")[:-1], encode_slot(5, b"current")[:-1])
    store_on(device).commit(IDENTITY, b"new")
    found = store_on(device).load(IDENTITY)
    assert found is not None and found.generation == 6 and not found.rolled_back, found


def test_the_counter_wraps_around() -> None:
    device = flash_with(encode_slot(0xFFFFFFFE, b"zero"))
    generations = []
    for number in range(4):
        store_on(device).commit(IDENTITY, b"commit %d" % number)
        found = store_on(device).load(IDENTITY)
        assert found is not None and found.payload == b"commit %d" % number, found
        generations.append(found.generation)
    assert generations == [0xFFFFFFFF, 0, 1, 2]


def test_a_failing_operation_is_reported_and_the_old_record_stays_also_after_a_retry() -> None:
    for operation, after in (("erase", 0), ("program", 0), ("sync", 0), ("sync", 1)):
        device = flash_with(encode_slot(4, b"older"), encode_slot(5, b"current"))
        for _ in range(3):  # as often as somebody retries
            device.failing, device.failing_after = operation, after
            error = error_of(lambda device=device: store_on(device).commit(IDENTITY, b"new"))
            assert isinstance(error, RetryLater) and error.code == "store.io", f"{operation}: {error}"
            assert payload_of(store_on(device)) == b"current", operation
            for left in device.aftermaths():
                found = payload_of(store_on(FlashSlots(256, 0xFF, left)))
                assert found in (b"current", b"new"), f"{operation}, after a cut: {found!r}"
        device.failing = ""
        store_on(device).commit(IDENTITY, b"new")
        assert payload_of(store_on(device)) == b"new", operation


def test_flash_that_silently_does_not_write_is_noticed() -> None:
    device = flash_with(encode_slot(4, b"older"), encode_slot(5, b"current"))
    device.failing = "silent"
    error = error_of(lambda: store_on(device).commit(IDENTITY, b"new"))
    assert isinstance(error, RetryLater) and error.code == "store.io", error
    assert payload_of(store_on(device)) == b"current"


def test_what_a_killed_process_left_in_the_cache_is_made_durable_before_the_other_copy_goes() -> None:
    device = flash_with(encode_slot(4, b"durable"))
    device.erase(1)
    device.program(1, encode_slot(5, b"in the cache"))  # and killed before its sync
    before = device.counts["sync"]
    store_on(device).commit(IDENTITY, b"new")
    assert device.counts["sync"] - before == 2, "the copy in the cache was not synced before the other was erased"


def test_forget_older_leaves_one_copy() -> None:
    device = flash_with(encode_slot(4, b"older"), encode_slot(5, b"current"))
    store_on(device).forget_older(IDENTITY)
    assert decode_slot(device.read(0), 0xFF).state == EMPTY
    assert payload_of(store_on(device)) == b"current"


def test_forget_older_makes_sure_of_a_slot_that_shows_as_erased_after_its_sync_failed() -> None:
    device = flash_with(encode_slot(4, b"older"), encode_slot(5, b"current"))
    device.failing, device.failing_after, device.failing_times = "sync", 1, 1
    error = error_of(lambda: store_on(device).forget_older(IDENTITY))
    assert isinstance(error, RetryLater) and decode_slot(device.durable()[0], 0xFF).payload == b"older"
    store_on(device).forget_older(IDENTITY)
    assert decode_slot(device.durable()[0], 0xFF).state == EMPTY


def test_forget_older_erases_nothing_that_cannot_be_read_for_now() -> None:
    device = flash_with(encode_slot(4, b"older"), encode_slot(5, b"current"))
    read = device.read
    device.read = lambda slot: None if slot == 1 else read(slot)  # type: ignore[method-assign]
    error = error_of(lambda: store_on(device).forget_older(IDENTITY))
    assert isinstance(error, RetryLater) and error.code == "store.io", error
    device.read = read  # type: ignore[method-assign]
    assert payload_of(store_on(device)) == b"current"


def test_a_later_copy_that_only_a_cache_had_is_given_up_for_the_one_on_the_medium() -> None:
    device = flash_with(encode_slot(4, b"durable"))
    device.erase(1)
    device.program(1, encode_slot(5, b"in the cache"))
    device.forget_pending()
    store_on(device).commit(IDENTITY, b"new")
    assert decode_slot(device.durable()[0], 0xFF).payload == b"durable", "the only copy was written over"
    assert decode_slot(device.durable()[1], 0xFF) == decode_slot(encode_slot(5, b"new"), 0xFF)


def test_the_overhead_is_what_the_specification_says() -> None:
    assert OVERHEAD_BYTES == 24
    assert store_on(FlashSlots()).max_payload == 4072
