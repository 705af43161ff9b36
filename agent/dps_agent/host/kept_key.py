"""The hub key at a persistent handle of the TPM, `persist_at`, for other programs.

Power may fail between the commit and the TPM's EvictControl, and between the two EvictControls that replace a key. So
each record says beside its assignment which key of ours was at the handle when it was made. What is there later is
that key, the record's own, or nothing; anything else is somebody else's and stays. A record says so only with its seal.
"""

from __future__ import annotations

from dps_agent.assignment import SEAL_BYTES, decode, seal_message
from dps_agent.driver import TpmCall
from dps_agent.effects import LoadRecord, Sign
from dps_hal.contracts import IDENTITY
from dps_hal.errors import IdentityStale
from dps_hal.platform import from_base64, from_json, same_bytes, to_base64
from dps_hal.tpm.keys import object_name, unwrap

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Generator
    from typing import Any, NamedTuple

    from dps_hal.contracts import StoredRecord, TpmService

    class _Ours(NamedTuple):
        """What the stored record says of its keys in the TPM."""

        wrapped_key: bytes
        handle: int  # `persist_at` when the record was made; 0: nowhere
        names: tuple[bytes, ...]  # of the keys that are ours: the record's own, then its former one if it names one
else:
    from dps_hal.named import namedtuple

    _Ours = namedtuple("_Ours", ("wrapped_key", "handle", "names"))

ENTRY = "persistAt"  # an entry of the record: {"handle": number, "former": base64 of a name or ""}


def persist(tpm: TpmService, handle: int) -> Generator[Any, Any, None]:
    """Makes the stored hub key persistent at `handle` unless it is there; raises what stands in the way."""
    ours: _Ours | None = yield from _ours(handle)
    if ours is not None:
        former = ours.names[-1]
        yield TpmCall(lambda: tpm.persist(ours.wrapped_key, handle, former))


def entry(tpm: TpmService, handle: int) -> Generator[Any, Any, dict[str, Any]]:
    """What the next record is to hold beside its assignment.

    Where the settings name no handle any more (0), what is at the handle of the record before stays known.
    """
    ours: _Ours | None = yield from _ours(handle)
    if ours is None:
        return {ENTRY: {"handle": handle, "former": ""}} if handle else {}
    at = handle or ours.handle
    name: bytes = yield TpmCall(lambda: tpm.name_at(at))
    if name in ours.names:
        return {ENTRY: {"handle": at, "former": to_base64(name)}}
    return {ENTRY: {"handle": handle, "former": ""}} if handle else {}


def withdraw(tpm: TpmService, handle: int) -> Generator[Any, Any, None]:
    """Removes what is ours at `handle`, or where the record says it was put; for use before the record is erased."""
    ours: _Ours | None = yield from _ours(handle)
    if ours is not None:
        at = handle or ours.handle
        names = ours.names
        yield TpmCall(lambda: tpm.withdraw(at, names))


def noted(payload: bytes) -> tuple[int, bytes]:
    """Handle and name in the entry of a stored record, 0 and b"" where it has none; its seal is not looked at."""
    try:
        found = from_json(payload[:-SEAL_BYTES])[ENTRY]
        return int(found["handle"]), from_base64(found["former"])
    except (ValueError, KeyError, TypeError, AttributeError):
        return 0, b""


def _ours(handle: int) -> Generator[Any, Any, _Ours | None]:
    """The stored record's keys; None where it has none, or where `handle` and it name no handle."""
    stored: StoredRecord | None = yield LoadRecord(IDENTITY)
    if stored is None:
        return None
    at, former = noted(stored.payload)
    if not handle and not at:
        return None
    try:
        assignment, text, seal = decode(stored.payload)
        own = object_name(unwrap(assignment.wrapped_key)[0])
        signature: bytes = yield Sign(assignment.wrapped_key, seal_message(text))
    except IdentityStale:
        return None
    if not same_bytes(signature, seal):
        return None
    return _Ours(assignment.wrapped_key, at, (own, former) if former else (own,))
