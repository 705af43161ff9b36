"""Records of every version ever released, byte by byte, are read by this one."""

from dps_agent.assignment import decode
from dps_agent.progress import decode_progress
from dps_hal.contracts import CERTIFICATE, IDENTITY
from dps_hal.platform import sha256
from dps_hal.store.slots import FORMAT_VERSION, TOMBSTONE, VALID, SlotStore, decode_slot, encode_slot
from support.disk.flash import FlashSlots
from support.vectors import load, unhex

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def rows() -> "list[dict[str, Any]]":
    return load("records")["slots"]  # type: ignore[no-any-return]


def names_in(payload: bytes) -> "list[str]":
    """Those of the chains in a record, as SPEC.md has them; boards have no reader of it."""
    found = []
    at = 0
    while at < len(payload):
        size = int.from_bytes(payload[at : at + 4], "big")
        found.append(sha256(payload[at + 4 : at + 4 + size]).hex())
        at += 4 + size
    return found


def test_there_is_a_record_of_each_version() -> None:
    assert sorted({row["formatVersion"] for row in rows()}) == list(range(1, FORMAT_VERSION + 1))
    for record in ("identity", "progress"):
        for is_none in (False, True):
            assert [row for row in rows() if row["record"] == record and (row["payload"] is None) == is_none], record


def test_each_released_slot_is_read_as_what_was_written() -> None:
    for row in rows():
        slot = decode_slot(unhex(row["content"]), 0xFF)
        payload = None if row["payload"] is None else unhex(row["payload"])
        assert slot.state == (TOMBSTONE if payload is None else VALID), row["name"]
        assert slot.payload == payload and slot.generation == row["generation"], row["name"]
        assert slot.version == row["formatVersion"], row["name"]


def test_each_released_record_is_loaded_from_either_slot_and_can_be_replaced() -> None:
    for row in rows():
        for place in (0, 1):
            content = unhex(row["content"])
            slots = [b"\xff" * 4096, b"\xff" * 4096]
            slots[place] = content + b"\xff" * (4096 - len(content))
            store = SlotStore({row["record"]: FlashSlots(4096, 0xFF, (slots[0], slots[1]))})
            found = store.load(row["record"])
            wanted = None if row["payload"] is None else unhex(row["payload"])
            assert (None if found is None else found.payload) == wanted, f"{row['name']}, slot {place}"
            store.commit(row["record"], b"next")
            found = store.load(row["record"])
            assert found is not None and found.payload == b"next", f"{row['name']}, slot {place}"


def test_what_is_in_a_released_record_means_what_it_meant() -> None:
    for row in rows():
        if not row["fields"]:
            continue
        payload = unhex(row["payload"])
        if row["record"] == CERTIFICATE:
            assert names_in(payload) == row["fields"]["names"], row["name"]
            continue
        meaning: Any = decode(payload)[0] if row["record"] == IDENTITY else decode_progress(payload)
        for name in row["fields"]:
            wanted = row["fields"][name]
            if name == "wrapped_key_bytes":
                assert len(meaning.wrapped_key) == wanted, row["name"]
            else:
                assert getattr(meaning, name) == wanted, f"{row['name']}: {name}"


def test_this_version_still_writes_the_same_bytes() -> None:
    for row in rows():
        if row["formatVersion"] == FORMAT_VERSION:
            payload = None if row["payload"] is None else unhex(row["payload"])
            assert encode_slot(row["generation"], payload) == unhex(row["content"]), row["name"]
