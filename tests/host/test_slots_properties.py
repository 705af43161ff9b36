"""Two-slot records under random lives and over random slots."""

from hypothesis import event, given, settings
from hypothesis import strategies as st

from dps_hal.contracts import IDENTITY
from dps_hal.errors import AskOperator, DpsError
from dps_hal.slots import DAMAGED, VALID, SlotStore, crc32, decode_slot, encode_slot
from support.flash import FlashSlots, PowerCut, Supply

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
        payload = None if found is None else found.payload
        if payload not in self.current:
            assert self.damaged, f"{payload!r} without damage, expected one of {self.current}"
            assert payload is None or payload in self.earlier, f"{payload!r} is older than {self.earlier}"
            assert found is None or found.rolled_back, f"{payload!r} is not reported as rolled back"
            event("rolled back" if found else "lost by damage")
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
        assert found is None or found.payload in payloads
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
