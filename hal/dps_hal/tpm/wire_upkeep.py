"""EK certificate and condition over a connection: what a registration does not ask for."""

import struct

from dps_hal.tpm.commands import NV_READ, NV_READ_PUBLIC, OWNER, take_field
from dps_hal.tpm.errors import RC_ALTERED, RC_NV_UNINITIALIZED, RefusedError
from dps_hal.tpm.keys import ALG_SHA256, object_name, unwrap
from dps_hal.tpm.rules import PT_LOCKOUT_INTERVAL, PT_PERMANENT
from dps_hal.tpm.upkeep import (
    PT_FIRMWARE_VERSION_1,
    PT_MANUFACTURER,
    PT_NV_BUFFER_MAX,
    check_owner_handle,
    check_replaceable,
    condition_of,
    nv_chunk_bytes,
    nv_locked,
    ways_to_read,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from dps_hal.contracts import TpmCondition
    from dps_hal.tpm.sessions import SaltedSession
    from dps_hal.tpm.wire import Key, WireTpm


def nv_content(tpm: "WireTpm", index: int, session_of: "Callable[[], SaltedSession | None]") -> "bytes | None":
    """What an NV index holds, None where there is none or nothing was written to it.

    Read by its own empty password, else by the owner's, in `session_of()`, which proves it; where that is None, by
    passwords, which have to be empty. AskOperator `tpm.certificate_locked`.
    """
    run = tpm._connection.run
    try:
        _, answer = run(NV_READ_PUBLIC, (index,))
    except RefusedError as refused:
        if refused.unknown_handle:
            return None
        raise refused
    public, end = take_field("nv_read_public", answer, 0)  # index, hash, attributes, policy, size
    name, _ = take_field("nv_read_public", answer, end)
    by_sha256 = public[4:6] == struct.pack(">H", ALG_SHA256)
    if len(public) < 14 or (by_sha256 and name != object_name(answer[:end])):
        raise RefusedError("nv_read_public", RC_ALTERED)
    ways = ways_to_read(index, int.from_bytes(public[6:10], "big"))
    size = int.from_bytes(public[-2:], "big")
    most_bytes = nv_chunk_bytes(tpm._properties(PT_NV_BUFFER_MAX, PT_NV_BUFFER_MAX))
    session = session_of()
    content = b""
    by_owner = ways[0]
    while len(content) < size:
        chunk_bytes = min(most_bytes, size - len(content))
        try:
            _, answer = run(
                NV_READ,
                (OWNER if by_owner else index, index),
                struct.pack(">HH", chunk_bytes, len(content)),
                session=session,
                names=(struct.pack(">I", OWNER) if by_owner else name, name),
                auth=tpm._auth(OWNER) if by_owner else b"",
                password=session is None,
            )
        except RefusedError as refused:
            if refused.code == RC_NV_UNINITIALIZED:
                return None
            if refused.wrong_auth and not by_owner:
                if ways[-1]:
                    by_owner = True
                    continue
                raise nv_locked(index, "it has a password")
            refused.of_owner = by_owner
            raise refused
        chunk, _ = take_field("nv_read", answer, 0)
        if len(chunk) != chunk_bytes:
            raise RefusedError("nv_read", RC_ALTERED)
        content += chunk
    return content


def persist(tpm: "WireTpm", wrapped_key: bytes, handle: int, former: bytes) -> None:
    """As `TpmService.persist`.

    EvictControl overwrites nothing, so for a moment the handle is empty. The new key has been loaded by now, and the
    room that the old one took is free for it.
    """
    public, private = unwrap(wrapped_key)
    check_owner_handle(handle)

    def put(key: "Key") -> None:
        present = tpm._present(handle)
        if present is not None:
            if present.public == key.public:
                return
            check_replaceable(present.public, handle, former)
            tpm._evict_control(present, handle, tpm._salted_session())
        tpm._evict_control(key, handle, tpm._salted_session())

    tpm._operate(lambda: tpm._with_loaded(public, private, put))


def name_at(tpm: "WireTpm", handle: int) -> bytes:
    """As `TpmService.name_at`."""

    def name() -> bytes:
        present = tpm._present(handle)
        return present.name if present else b""

    return tpm._operate(name)


def withdraw(tpm: "WireTpm", handle: int, names: "tuple[bytes, ...]") -> None:
    """As `TpmService.withdraw`."""

    def remove() -> None:
        present = tpm._present(handle)
        if present is not None and present.name in names:
            tpm._evict_control(present, handle, tpm._salted_session())

    tpm._operate(remove)


def condition(properties: "Callable[[int, int], dict[int, int]]") -> "TpmCondition":
    """As `TpmService.condition`; `properties(first, last)` asks the TPM."""
    found = properties(PT_MANUFACTURER, PT_FIRMWARE_VERSION_1)
    found.update(properties(PT_PERMANENT, PT_LOCKOUT_INTERVAL))
    return condition_of(found)
