"""Slot stores with one fault each: a sweep that lets one of them pass proves nothing. For both runtimes."""

from dps_hal.contracts import StoredRecord
from dps_hal.errors import RetryLater
from dps_hal.store import slots as slots_module
from dps_hal.store.slots import SlotStore, decode_slot, encode_slot

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from dps_hal.store.slots import Slot, SlotDevice


class SingleSlot(SlotStore):
    """Keeps one copy: erases it, writes it, syncs."""

    def commit(self, record: str, payload: bytes) -> None:
        """One slot for ever."""
        device = self._devices[record]
        device.erase(0)
        device.program(0, encode_slot(1, payload))
        device.sync()


class Naive(SlotStore):
    """Believes that what was written is durable: never syncs."""

    def commit(self, record: str, payload: bytes) -> None:
        """Two slots in turn, no sync."""
        device = self._devices[record]
        target, generation = _next(device)
        device.erase(target)
        device.program(target, encode_slot(generation, payload))


class InPlace(SlotStore):
    """Writes over the current copy, and over the second one right after it."""

    def commit(self, record: str, payload: bytes) -> None:
        """Both slots, one sync."""
        device = self._devices[record]
        _, generation = _next(device)
        for slot in (0, 1):
            device.erase(slot)
            device.program(slot, encode_slot(generation, payload))
        device.sync()


class TakesTurnsWithoutLooking(SlotStore):
    """Begins with slot 0 after each start, whatever is in it."""

    def commit(self, record: str, payload: bytes) -> None:
        """Slot 0 each time, with the right generation."""
        found = self.load(record)
        device = self._devices[record]
        device.erase(0)
        device.program(0, encode_slot(1 if found is None else found.generation + 1, payload))
        device.sync()


class ForgetsToErase(SlotStore):
    """Programs over what is there."""

    def commit(self, record: str, payload: bytes) -> None:
        """The right slot, not erased."""
        device = self._devices[record]
        target, generation = _next(device)
        device.program(target, encode_slot(generation, payload))
        device.sync()


class TakesTheHeaderForTheWhole(SlotStore):
    """Checks the header's CRC only."""

    def load(self, record: str) -> "StoredRecord | None":
        """The latest header, whatever is behind it."""
        device = self._devices[record]
        best = None
        for slot in (0, 1):
            content = device.read(slot) or b""
            found = decode_slot(content, device.erase_value)
            if found.generation is not None and (best is None or found.generation > best[0]):
                length = min(int.from_bytes(content[12:16], "big"), len(content))
                best = (found.generation, content[20 : 20 + length])
        if best is None:
            return None
        return StoredRecord(best[1], best[0], False)


class ErasesTheNewestFirst(SlotStore):
    """Resets without a tombstone."""

    def erase(self, record: str) -> None:
        """The current copy, then the older one."""
        device = self._devices[record]
        newest = slots_module._newest(_decoded(device))
        if newest is not None:
            for slot in (newest, 1 - newest):
                device.erase(slot)
                device.sync()


class ErasesBothWithOneSync(SlotStore):
    """Resets oldest first, but leaves the order to the cache."""

    def erase(self, record: str) -> None:
        """The older copy, then the current one, then one sync."""
        device = self._devices[record]
        newest = slots_module._newest(_decoded(device))
        if newest is not None:
            device.erase(1 - newest)
            device.erase(newest)
            device.sync()


class TrustsTheCache(SlotStore):
    """Believes that what it can read is durable, whoever wrote it: syncs nothing before the other copy goes."""

    def commit(self, record: str, payload: bytes) -> None:
        """The right slot, one sync at the end."""
        device = self._devices[record]
        target, generation = _next(device)
        device.erase(target)
        device.program(target, encode_slot(generation, payload))
        device.sync()


class LeavesWhatFailed(TrustsTheCache):
    """Reports a sync that failed, and leaves the copy that it failed for."""

    def commit(self, record: str, payload: bytes) -> None:
        """As it should be, but for what follows a failure."""
        self._devices[record].sync()
        TrustsTheCache.commit(self, record, payload)


class BelievesItsEyes(SlotStore):
    """Believes that what was read is durable once it was synced: asks the medium for nothing, writes nothing again."""

    def __init__(self, devices: "Mapping[str, SlotDevice]") -> None:
        SlotStore.__init__(self, devices)
        for record in devices:
            devices[record].renew = lambda slot: None  # type: ignore[method-assign]
            devices[record].settle = lambda slot, device=devices[record]: device.sync()  # type: ignore[method-assign,misc]


class RenewsTheCurrentCopy(SlotStore):
    """Makes sure of the current copy by writing it again, in place, though it may be the only one."""

    def __init__(self, devices: "Mapping[str, SlotDevice]") -> None:
        SlotStore.__init__(self, devices)
        for record in devices:
            devices[record].settle = lambda slot, device=devices[record]: _renew(device, slot)  # type: ignore[method-assign,misc]


class StopsAtTheUnreadable(SlotStore):
    """Takes a slot that cannot be read for a failure of the store, whatever is in the other one."""

    def __init__(self, devices: "Mapping[str, SlotDevice]") -> None:
        SlotStore.__init__(self, devices)
        for record in devices:
            devices[record].read = lambda slot, read=devices[record].read: _given(read(slot))  # type: ignore[method-assign,misc]


class RenewsTheOtherFirst(SlotStore):
    """Where there is no current copy it writes the other slot again before its own: both are under way at once."""

    def commit(self, record: str, payload: bytes) -> None:
        """Both slots, one sync."""
        device = self._devices[record]
        found = _decoded(device)
        if slots_module._newest(found) is None:
            for slot in (0, 1):
                device.renew(slot)
        SlotStore.commit(self, record, payload)


FAULTY: "dict[str, type[SlotStore]]" = {
    "naive": Naive,
    "in-place": InPlace,
    "single-slot": SingleSlot,
    "turns-without-looking": TakesTurnsWithoutLooking,
    "no-erase": ForgetsToErase,
    "header-only": TakesTheHeaderForTheWhole,
    "reset-newest-first": ErasesTheNewestFirst,
    "reset-with-one-sync": ErasesBothWithOneSync,
    "renews-the-current": RenewsTheCurrentCopy,
    "stops-at-the-unreadable": StopsAtTheUnreadable,
}
# Safe from one cut alone: what they do wrong shows after another, after a process was killed, or a sync that failed.
FAULTY_LATER: "dict[str, type[SlotStore]]" = {
    "trusts-the-cache": TrustsTheCache,
    "leaves-what-failed": LeavesWhatFailed,
    "believes-its-eyes": BelievesItsEyes,
    "renews-the-other-first": RenewsTheOtherFirst,
}


def _renew(device: "SlotDevice", slot: int) -> None:
    device.renew(slot)
    device.sync()


def _given(content: "bytes | None") -> bytes:
    if content is None:
        raise RetryLater("store.io", "a slot cannot be read")
    return content


def _decoded(device: "SlotDevice") -> "list[Slot]":
    return slots_module._read(device)


def _next(device: "SlotDevice") -> "tuple[int, int]":
    """The slot and the generation that a sound writer would choose."""
    found = _decoded(device)
    newest = slots_module._newest(found)
    if newest is None:
        return 0, 1
    return 1 - newest, (found[newest].generation or 0) + 1
