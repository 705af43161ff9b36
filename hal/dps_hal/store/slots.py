"""Records in pairs of slots that no power cut can lose, over any device that has slots.

Each record has two slots. A write goes to the slot that does not hold the current copy, so at every instant one whole
copy is untouched. `hal/SPEC.md` has the bytes; the files of `dps_hal.host.files`, raw flash and block devices are
devices.

Each slot by itself is in one of six states. EMPTY, DAMAGED, FOREIGN, VALID and TOMBSTONE its bytes alone decide:
`decode_slot` has a meaning for every content. UNREADABLE is one whose bytes the medium does not give: a disk or flash
may do that to a sector in which power went, until it is written again. What a record is follows from both slots, each
time anew, for the store remembers nothing: the whole slot with the later generation is the current copy. Generations
wrap, so "later" is by serial-number arithmetic.

What may happen between two instants: power goes, at any byte, and leaves the slot that was being written EMPTY,
DAMAGED, UNREADABLE or whole; the program is killed, and a cache may show what the medium does not have; the medium
reports an error, or reads back something else. A write therefore has one order, and each step has a reason:

1. Settle: what a cache shows as the current copy is on the medium, before the other slot is touched (`_settled`).
2. Choose the slot that may be lost, and a generation that is later than that of the slot which stays (`_write`).
3. Erase it, program it, sync, and read it back.
4. Where there was no current copy: write the other slot again, too, for it may hold more than it shows. Not before: one
   slot at a time is under way, so that a cut never leaves both UNREADABLE, and none goes while the other one is.
5. If that failed, take it back (`_withdraw`): a copy that a cache shows and the medium does not have must not become
   the current one, or the next write would go over the last durable copy.

To erase a record needs a tombstone first, for to erase the current copy would bring the older one back. To forget the
older copy is one erase.

Who pushes whom: nobody. There is no thread, clock or lock here; callers see to it that one program at a time writes.
A slot of another format version (FOREIGN) is never overwritten, only erased on request.
"""

import binascii
import struct

from dps_hal.contracts import StoredRecord
from dps_hal.errors import AskOperator, Broken, DpsError, RetryLater

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Final, NamedTuple, Protocol

    class Slot(NamedTuple):
        """What one slot holds; `generation` is None without a readable header, `payload` None unless VALID."""

        state: int
        generation: int | None
        payload: bytes | None
        version: int

    class SlotDevice(Protocol):
        """Two slots, 0 and 1, of one record. Failures are the `store.*` errors of `Store`."""

        slot_bytes: int
        erase_value: int  # the value of every byte of an erased slot, 0xFF or 0x00

        def read(self, slot: int) -> bytes | None:
            """The slot's content, at most `slot_bytes` long; what is missing at its end counts as erased.

            None: the medium does not give it, though it is there, as of a sector in which power went.
            """
            ...

        def erase(self, slot: int) -> None:
            """Sets every byte of the slot to `erase_value`."""
            ...

        def program(self, slot: int, content: bytes) -> None:
            """Writes `content` at the start of a slot that was erased just before; the rest stays erased."""
            ...

        def settle(self, slot: int) -> None:
            """Syncs what other programs left of the slot; from then on `read` shows what the medium has, not a cache.

            A program that was killed may have left it in a cache alone. After a write that failed Linux shows what was
            to be written, as if it were stored, and no sync stores it. Nothing where reads come from the medium.
            """
            ...

        def renew(self, slot: int) -> None:
            """Writes again what `read` shows of a slot without a whole copy, so that the medium has none either.

            Nothing where reads come from the medium. A slot that cannot be read is erased.
            """
            ...

        def sync(self) -> None:
            """Makes durable what was erased, programmed or renewed since the last sync."""
            ...
else:
    from dps_hal.named import namedtuple

    Slot = namedtuple("Slot", ("state", "generation", "payload", "version"))

MAGIC: "Final" = b"DPSr"
FORMAT_VERSION: "Final" = 1
HEADER_BYTES: "Final" = 20  # magic, version, generation, length, CRC-32 of these 16 bytes
OVERHEAD_BYTES: "Final" = HEADER_BYTES + 4  # and the CRC-32 of header and payload
_FIELDS = ">4sIII"
_TOMBSTONE_LENGTH = 0xFFFFFFFF

EMPTY: "Final" = 0  # erased, or never written
DAMAGED: "Final" = 1  # anything else that cannot be read; what a cut leaves
UNREADABLE: "Final" = 2  # the medium does not give its bytes
FOREIGN: "Final" = 3  # a whole header of a version that this program does not know
VALID: "Final" = 4  # a payload
TOMBSTONE: "Final" = 5  # valid, and says that the record is none
_READINGS = 3  # of a slot that cannot be read: a cable or bus may fail for once


class SlotStore:
    """A `Store` whose records live on slot devices; it remembers nothing between calls."""

    def __init__(self, devices: "Mapping[str, SlotDevice]") -> None:
        self._devices = devices
        self.max_payload = min([devices[record].slot_bytes for record in devices]) - OVERHEAD_BYTES

    def load(self, record: str) -> "StoredRecord | None":
        """The newest valid payload; see `Store.load`.

        1. Neither slot can be read: RetryLater. 2. A slot is of an unknown format: AskOperator. 3. Both slots are
        empty: None. 4. No copy is whole, and one is damaged: an empty payload, which no reader takes for a record.
        5. The newest copy is a tombstone: None. 6. The newest copy; `rolled_back` where the other slot is damaged, or
        cannot be read, and may have been a later one.
        """
        slots = _known(record, _read(self._device(record)))
        newest = _newest(slots)
        if newest is None:
            if slots[0].state == EMPTY and slots[1].state == EMPTY:
                return None
            return StoredRecord(b"", max(slots[0].generation or 0, slots[1].generation or 0), False)
        generation, payload = slots[newest].generation, slots[newest].payload
        if generation is None or payload is None:
            return None
        other = slots[1 - newest]
        damaged = other.state in (DAMAGED, UNREADABLE)
        rolled_back = damaged and (other.generation is None or _is_later(other.generation, generation))
        return StoredRecord(payload, generation, rolled_back)

    def commit(self, record: str, payload: bytes) -> None:
        """Makes `payload` the record's content; see `Store.commit`. One erase and one program of one slot."""
        device = self._device(record)
        largest = device.slot_bytes - OVERHEAD_BYTES
        if len(payload) > largest:
            raise AskOperator(
                "store.too_large", f"record '{record}' has {len(payload)} bytes where at most {largest} fit"
            )
        _write(record, device, _settled_known(record, device), payload)

    def erase(self, record: str) -> None:
        """Makes the record empty; see `Store.erase`. One of an unknown version, or unreadable, is erased as well.

        A tombstone goes over the older copy first: erasing the current copy first would bring the older one back.
        """
        device = self._device(record)
        slots = _settled(device, _read(device))
        if slots[0].state == EMPTY and slots[1].state == EMPTY:
            for slot in (0, 1):
                device.renew(slot)
                device.sync()
            return
        newest = _newest(slots)
        if newest is not None and slots[newest].state == TOMBSTONE:
            tombstone = newest
        else:
            tombstone = _write(record, device, slots, None)
        for slot in (1 - tombstone, tombstone):
            device.erase(slot)
            device.sync()

    def forget_older(self, record: str) -> None:
        """Erases the copy that `load` does not return, if there is one, so that nothing can roll back to it."""
        device = self._device(record)
        slots = _settled_known(record, device)
        newest = _newest(slots)
        if newest is None:
            return
        if slots[1 - newest].state == UNREADABLE:  # for now, perhaps, and then it may be the later one
            raise RetryLater("store.io", f"record '{record}': one of its two copies cannot be read")
        if slots[1 - newest].state == EMPTY:
            device.renew(1 - newest)  # the sync of the call that erased it may have failed
        else:
            device.erase(1 - newest)
        device.sync()

    def _device(self, record: str) -> "SlotDevice":
        if record not in self._devices:
            raise Broken("agent.bug", f"there is no record named '{record}'")
        return self._devices[record]


def encode_slot(generation: int, payload: "bytes | None") -> bytes:
    """The bytes of a slot, without what stays erased behind them; no payload makes a tombstone."""
    length = _TOMBSTONE_LENGTH if payload is None else len(payload)
    header = struct.pack(_FIELDS, MAGIC, FORMAT_VERSION, generation, length)
    content = header + struct.pack(">I", crc32(header)) + (payload or b"")
    return content + struct.pack(">I", crc32(content))


def decode_slot(content: bytes, erase_value: int) -> Slot:
    """What the bytes of one slot mean; every content has a meaning, nothing is raised."""
    if content.count(bytes([erase_value])) == len(content):  # this takes no memory of the size of a slot
        return Slot(EMPTY, None, None, 0)
    if len(content) < OVERHEAD_BYTES:
        return Slot(DAMAGED, None, None, 0)
    magic, version, generation, length = struct.unpack(_FIELDS, content[:16])
    if magic != MAGIC or content[16:HEADER_BYTES] != struct.pack(">I", crc32(content[:16])):
        return Slot(DAMAGED, None, None, 0)
    if version != FORMAT_VERSION:
        return Slot(FOREIGN, generation, None, version)
    # A length of 2 ** 31 or more is no index on a 32-bit board; beyond the slot no CRC follows whatever it is.
    end = HEADER_BYTES + (0 if length == _TOMBSTONE_LENGTH else min(length, len(content)))
    if content[end : end + 4] != struct.pack(">I", crc32(content[:end])):
        return Slot(DAMAGED, generation, None, version)
    if length == _TOMBSTONE_LENGTH:
        return Slot(TOMBSTONE, generation, None, version)
    return Slot(VALID, generation, content[HEADER_BYTES:end], version)


def refuse_foreign(record: str, slot: Slot) -> None:
    """AskOperator `store.unknown_version` if a program with another format wrote the slot."""
    if slot.state == FOREIGN:
        raise AskOperator(
            "store.unknown_version",
            f"record '{record}' has format version {slot.version}, this program knows {FORMAT_VERSION}",
        )


def crc32_by_bits(content: bytes) -> int:
    """CRC-32 (ISO 3309, reflected polynomial 0xEDB88320) for boards whose `binascii` has none."""
    crc = 0xFFFFFFFF
    for byte in content:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0xEDB88320 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


crc32 = getattr(binascii, "crc32", crc32_by_bits)


def _read_slot(device: "SlotDevice", slot: int) -> Slot:
    for _ in range(_READINGS):
        content = device.read(slot)
        if content is not None:
            return decode_slot(content, device.erase_value)
    return Slot(UNREADABLE, None, None, 0)


def _read(device: "SlotDevice") -> "list[Slot]":
    return [_read_slot(device, slot) for slot in (0, 1)]


def _known(record: str, slots: "list[Slot]") -> "list[Slot]":
    """`slots`, unless they say nothing, or what a newer program alone understands."""
    if slots[0].state == UNREADABLE == slots[1].state:
        raise RetryLater("store.io", f"record '{record}' is there, and neither of its two copies can be read")
    for slot in slots:
        refuse_foreign(record, slot)
    return slots


def _settled(device: "SlotDevice", slots: "list[Slot]") -> "list[Slot]":
    """`slots`, read before, once the medium is sure to have the current copy; another one where a cache had it alone.

    It is not written again: while it is the only copy, or the later one, a cut in the middle of that would lose it.
    """
    for _ in slots:  # where one was in a cache alone, the other one is settled as well
        newest = _newest(slots)
        if newest is None:
            break
        device.settle(newest)
        shown = slots[newest]
        slots[newest] = _read_slot(device, newest)
        if slots[newest] == shown:
            break
    return slots


def _settled_known(record: str, device: "SlotDevice") -> "list[Slot]":
    return _known(record, _settled(device, _known(record, _read(device))))  # a cache may have hidden what it is


def _newest(slots: "list[Slot]") -> "int | None":
    """The index of the slot with the latest generation among those that are whole; None where neither is."""
    newest = None
    latest = 0
    for index in (0, 1):
        generation = slots[index].generation
        if slots[index].state < FOREIGN or generation is None:
            continue
        if newest is None or _is_later(generation, latest):
            newest, latest = index, generation
    return newest


def _is_later(generation: int, than: int) -> bool:
    """Whether `generation` was counted after `than`, with wrap-around at 2**32 (RFC 1982)."""
    return generation != than and (generation - than) & 0xFFFFFFFF < 0x80000000


def _write(record: str, device: "SlotDevice", slots: "list[Slot]", payload: "bytes | None") -> int:
    """Programs the slot that does not hold the current copy, durably, and returns its index; `slots` are settled.

    Which slot: 1. There is a current copy: the other one. 2. There is none: the one that cannot be read; else the one
    that is damaged, which would go on looking like a newer copy; else slot 0. Then the copy is written and read back,
    or taken back where that failed.
    """
    newest = _newest(slots)
    target = int(slots[1].state > slots[0].state) if newest is None else 1 - newest
    generation = slots[1 - target].generation or 0  # later than the copy that stays, also where that one is damaged
    content = encode_slot((generation + 1) & 0xFFFFFFFF, payload)
    try:
        device.erase(target)
        device.program(target, content)
        device.sync()
        if _read_slot(device, target) != decode_slot(content, device.erase_value):
            raise RetryLater("store.io", f"record '{record}' was written and read back differently")
        if newest is None:
            device.renew(1 - target)  # a reset whose sync failed may have left a copy there that counts as later
            device.sync()
    except DpsError:
        _withdraw(device, target)
        raise
    return target


def _withdraw(device: "SlotDevice", slot: int) -> None:
    """Takes back a copy whose writing failed, for a cache may show it whole though it is not durable.

    Believed, it would be the current copy, and the next write would go over the last durable one.
    """
    try:
        device.erase(slot)
        device.sync()
    except DpsError:
        pass  # the failure that led here is the one to report
