"""Two-slot records under random lives and over random slots, and the bytes that `SPEC.md` says."""

import contextlib
import re
from pathlib import Path

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from dps_hal.contracts import IDENTITY, PROGRESS
from dps_hal.errors import AskOperator, DpsError, RetryLater
from dps_hal.host.files import FileStore
from dps_hal.store.slots import DAMAGED, VALID, SlotStore, crc32, decode_slot, encode_slot
from support.disk.flash import FlashSlots, PowerCut, Supply

SLOT_BYTES = 64

# What a life is made of; the whole numbers choose a place and are taken modulo the number of places.
PLACE = st.integers(0, 10_000)
EVENTS = st.one_of(
    st.just(("commit",)),
    st.just(("erase",)),
    st.just(("forget older",)),
    st.tuples(st.sampled_from(["commit", "erase"]), st.sampled_from(["cut", "kill"]), st.integers(1, 7), PLACE),
    st.tuples(st.just("flip"), st.integers(0, 1), st.integers(0, SLOT_BYTES * 8 - 1)),
)


class Life:
    """A flash, and what its record may be: `current` on load, `earlier` only after damage and only as rolled back."""

    def __init__(self) -> None:
        self.flash = FlashSlots(SLOT_BYTES)
        self.current: set[bytes | None] = {None}
        self.earlier: set[bytes | None] = {None}
        self.damaged = False
        self.flipped: set[tuple[int, int]] = set()
        self.commits = 0

    def store(self) -> SlotStore:
        return SlotStore({IDENTITY: self.flash})

    def do(self, action: str) -> None:
        """One whole action, which leaves no doubt."""
        if action == "forget older":
            with contextlib.suppress(RetryLater):  # beside a copy that cannot be read, which is left alone
                self.store().forget_older(IDENTITY)
            return
        found = self.look()
        after = self._act(action)
        self.current = {after}
        self.earlier = {None} if after is None else {found}
        self.damaged = False
        now = self.store().load(IDENTITY)
        assert (None if now is None else now.payload) == after
        assert now is None or found is None or not now.rolled_back  # None: the other copy may be damaged as well

    def do_half(self, action: str, how: str, operation: int, place: int) -> None:
        """An action that ends at its n-th operation, by a power cut or by a kill that leaves the cache."""
        found = self.look()
        self.flash.supply = Supply(operation)
        try:
            after = self._act(action)
            self.flash.supply = Supply()
            self.current = {after}
            self.earlier = {None} if after is None else {found}
            self.damaged = False
            return
        except PowerCut:
            after = None if action == "erase" else b"commit %d" % self.commits
        self.flash.supply = Supply()
        event(f"{action} ended by {how}")
        self.earlier |= self.current
        self.current = self.current | {after}
        if how == "cut":
            left = self.flash.aftermaths()
            self.flash = FlashSlots(SLOT_BYTES, content=left[place % len(left)])
            now = self.look()
            if not self.damaged:  # else a torn program may set the flipped bit right, and the copy is whole again
                self.current = {now}

    def flip(self, slot: int, bit: int) -> None:
        """Damages one bit of what is durable, never the same one twice: that would heal; the cache is written first."""
        if (slot, bit) in self.flipped:
            return
        self.flipped.add((slot, bit))
        self.flash.sync()
        slots = [bytearray(content) for content in self.flash.durable()]
        slots[slot][bit >> 3] ^= 1 << (bit & 7)
        self.flash = FlashSlots(SLOT_BYTES, content=(bytes(slots[0]), bytes(slots[1])))
        self.damaged = True

    def look(self) -> bytes | None:
        """Loads, and compares with what may be."""
        found = self.store().load(IDENTITY)
        payload = found.payload or None if found is not None else None  # empty: no copy is whole
        if payload not in self.current:
            assert self.damaged, f"{payload!r} without damage, expected one of {self.current}"
            assert payload is None or payload in self.earlier, f"{payload!r} is older than {self.earlier}"
            reported = found is not None and found.rolled_back
            assert payload is None or reported, f"{payload!r} is not reported as rolled back"
            event("rolled back" if payload else "lost by damage")
            self.earlier |= self.current
            self.current = self.current | {payload}
        return payload

    def _act(self, action: str) -> bytes | None:
        if action == "erase":
            self.store().erase(IDENTITY)
            return None
        self.commits += 1
        payload = b"commit %d" % self.commits
        self.store().commit(IDENTITY, payload)
        return payload


@settings(max_examples=3000, deadline=None)
@given(st.lists(EVENTS, max_size=14))
def test_any_life_of_commits_erases_cuts_kills_and_flips_loads_what_it_may(events: list[tuple]) -> None:
    life = Life()
    for name, *rest in events:
        if name == "flip":
            life.flip(*rest)
        elif rest:
            life.do_half(name, *rest)
        else:
            life.do(name)
        life.look()
    life.do("commit")


@settings(max_examples=2000, deadline=None)
@given(st.integers(1, 6), st.integers(0, 1), st.integers(0, SLOT_BYTES * 8 - 1))
def test_one_flipped_bit_never_loses_both_copies(commits: int, slot: int, bit: int) -> None:
    life = Life()
    for _ in range(commits):
        life.do("commit")
    life.flip(slot, bit)
    found = life.look()
    assert found is not None or commits == 1


def with_header(version: int, generation: int, length: int, rest: bytes) -> bytes:
    header = b"DPSr" + b"".join(field.to_bytes(4, "big") for field in (version, generation, length))
    content = header + crc32(header).to_bytes(4, "big") + rest
    return (content + crc32(content).to_bytes(4, "big"))[:SLOT_BYTES]


U32 = st.one_of(st.sampled_from([0, 1, 2, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF]), st.integers(0, 0xFFFFFFFF))
SLOT_CONTENT = st.one_of(
    st.binary(max_size=SLOT_BYTES),
    st.builds(encode_slot, U32, st.one_of(st.none(), st.binary(max_size=SLOT_BYTES - 24))),
    st.builds(with_header, st.one_of(st.just(1), U32), U32, U32, st.binary(max_size=SLOT_BYTES)),
    st.builds(lambda whole, cut: whole[:cut], st.builds(encode_slot, U32, st.binary(max_size=40)), st.integers(0, 64)),
)


@settings(max_examples=3000, deadline=None)
@given(SLOT_CONTENT, SLOT_CONTENT, st.sampled_from([0x00, 0xFF]))
def test_any_content_of_the_slots_ends_in_a_record_none_or_a_newer_format(
    first: bytes, second: bytes, erase_value: int
) -> None:
    def flash() -> FlashSlots:
        blank = bytes([erase_value]) * SLOT_BYTES
        return FlashSlots(SLOT_BYTES, erase_value, (first + blank[len(first) :], second + blank[len(second) :]))

    def store(device: FlashSlots) -> SlotStore:
        return SlotStore({IDENTITY: device})

    device = flash()
    try:
        found = store(device).load(IDENTITY)
        whole = [decode_slot(device.read(slot), erase_value) for slot in (0, 1)]
        payloads = [slot.payload for slot in whole if slot.state == VALID]
        assert found is None or found.payload in payloads or (found.payload == b"" and not payloads)
        store(device).forget_older(IDENTITY)
        assert (store(device).load(IDENTITY) or (None,))[0] == (found or (None,))[0]
        store(device).commit(IDENTITY, b"new")
        after = store(device).load(IDENTITY)
        assert after is not None and after.payload == b"new"
        assert not after.rolled_back or whole[0].state == whole[1].state == DAMAGED
        store(device).commit(IDENTITY, b"newer")
        after = store(device).load(IDENTITY)
        assert after is not None and after.payload == b"newer" and not after.rolled_back
        event("readable")
    except DpsError as error:
        assert isinstance(error, AskOperator) and error.code == "store.unknown_version", error
        assert device.counts["erase"] == device.counts["program"] == 0
        event("newer format")
    device = flash()
    store(device).erase(IDENTITY)
    assert store(device).load(IDENTITY) is None
    assert set(device.read(0) + device.read(1)) == {erase_value}


# SPEC.md alone: nothing of the product is used to make these bytes.

SPEC = (Path(__file__).parents[2] / "hal" / "SPEC.md").read_text()


def crc32_of_the_specification(content: bytes) -> int:
    """Reflected polynomial 0xEDB88320, start and final XOR 0xFFFFFFFF, bit by bit."""
    crc = 0xFFFFFFFF
    for byte in content:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0xEDB88320 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def slot_of_the_specification(generation: int, payload: bytes | None) -> bytes:
    """A slot by the table "A slot": each row's offset must be where the rows before it end."""
    table = SPEC.partition("## A slot\n")[2].partition("CRC-32 is that of")[0]
    content = b""
    names = []
    for offset, size, name, value in re.findall(r"^\| ([^|]+) \| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", table, re.M)[1:]:
        if offset.startswith("-"):
            continue
        n = 0 if payload is None else len(payload)
        assert eval(offset, {"n": n}) == len(content), name
        names.append(name)
        if name == "magic":
            field = bytes.fromhex(value.partition("`")[2].partition("`")[0])
        elif name == "version":
            field = int(value).to_bytes(4, "big")
        elif name == "generation":
            field = generation.to_bytes(4, "big")
        elif name == "length":
            tombstone = re.search("(0x[0-9A-F]{8}): a tombstone", value)
            assert tombstone
            field = (int(tombstone[1], 16) if payload is None else n).to_bytes(4, "big")
        elif name == "payload":
            field = payload or b""
        else:
            last = re.search(r"CRC-32 of bytes 0 to (15|19 \+ n)", value)
            assert last, value
            field = crc32_of_the_specification(content[: eval(last[1], {"n": n}) + 1]).to_bytes(4, "big")
        assert len(field) == eval(size, {"n": n}), name
        content += field
    assert names == ["magic", "version", "generation", "length", "header CRC", "payload", "CRC"]
    return content


@pytest.mark.parametrize("payload", [None, b"", b"hello", bytes(range(256)) * 15, b"x" * 4072])
@pytest.mark.parametrize("generation", [0, 7, 0xFFFFFFFF])
def test_a_slot_built_by_the_words_of_the_specification_is_ours_and_is_read(
    payload: bytes | None, generation: int, tmp_path: Path
) -> None:
    content = slot_of_the_specification(generation, payload)
    assert encode_slot(generation, payload) == content
    for name in ("identity.0", "identity.1"):
        (tmp_path / name).write_bytes(content.ljust(4096, b"\xff"))
        found = FileStore(str(tmp_path)).load(IDENTITY)
        assert (None if found is None else found.payload) == payload
        assert found is None or found.generation == generation
        (tmp_path / name).unlink()


def test_what_the_specification_shows_in_hex_is_what_it_says_it_is() -> None:
    assert f"{crc32_of_the_specification(b'123456789'):X}" == "CBF43926" and "0xCBF43926" in SPEC
    shown = re.search(r"Generation 7, payload `hello`:\n\n```\n([0-9a-f ]+)\n```", SPEC)
    assert shown and bytes.fromhex(shown[1]) == slot_of_the_specification(7, b"hello")


def test_the_files_are_those_that_the_specification_lists(tmp_path: Path) -> None:
    store = FileStore(str(tmp_path / "state"))
    store.commit(PROGRESS, b"attempt 1")
    for payload in (b"hub A", b"hub B", b"hub C"):
        store.commit(IDENTITY, payload)
    listed = SPEC.partition("{state_dir}/")[2].partition("```")[0]
    for path in (tmp_path / "state").iterdir():
        assert re.search(rf"^    {re.escape(path.name)} ", listed, re.M), f"{path.name} is not listed"
        assert path.name == "lock" or path.stat().st_size == 4096
    # targets: slot 0, then in turn; generations from 1; 0xFF behind the last field
    for slot, generation, payload in ((0, 3, b"hub C"), (1, 2, b"hub B")):
        wanted = slot_of_the_specification(generation, payload).ljust(4096, b"\xff")
        assert (tmp_path / "state" / f"identity.{slot}").read_bytes() == wanted, slot
