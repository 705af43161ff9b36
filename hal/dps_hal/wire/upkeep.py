"""EK certificate and condition over a connection: what a registration does not ask for."""

import struct

from dps_hal.tpm_errors import RC_ALTERED, RC_NV_UNINITIALIZED, RefusedError
from dps_hal.tpm_keys import unwrap
from dps_hal.tpm_rules import PT_LOCKOUT_INTERVAL, PT_PERMANENT
from dps_hal.tpm_upkeep import (
    EK_CERTIFICATE_INDEX,
    PT_FIRMWARE_VERSION_1,
    PT_MANUFACTURER,
    PT_NV_BUFFER_MAX,
    check_owner_handle,
    check_readable,
    check_replaceable,
    condition_of,
    nv_chunk_bytes,
    without_padding,
)
from dps_hal.wire.commands import NV_READ, NV_READ_PUBLIC, take_field

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from dps_hal.contracts import TpmCondition
    from dps_hal.wire import Key, WireTpm
    from dps_hal.wire.commands import Connection


def endorsement_certificate(
    connection: "Connection", properties: "Callable[[int, int], dict[int, int]]"
) -> "bytes | None":
    """As `TpmService.endorsement_certificate`; `properties(first, last)` asks the TPM."""
    index = EK_CERTIFICATE_INDEX
    try:
        _, answer = connection.run(NV_READ_PUBLIC, (index,))
    except RefusedError as refused:
        if refused.unknown_handle:
            return None
        raise refused
    public, _ = take_field("nv_read_public", answer, 0)  # index, hash, attributes, policy, size
    if len(public) < 14:
        raise RefusedError("nv_read_public", RC_ALTERED)
    check_readable(int.from_bytes(public[6:10], "big"))
    size = int.from_bytes(public[-2:], "big")
    most_bytes = nv_chunk_bytes(properties(PT_NV_BUFFER_MAX, PT_NV_BUFFER_MAX))
    content = b""
    while len(content) < size:
        chunk_bytes = min(most_bytes, size - len(content))
        try:  # by the index's empty password: the certificate is public
            parameters = struct.pack(">HH", chunk_bytes, len(content))
            _, answer = connection.run(NV_READ, (index, index), parameters, password=True)
        except RefusedError as refused:
            if refused.code == RC_NV_UNINITIALIZED:
                return None
            raise refused
        chunk, _ = take_field("nv_read", answer, 0)
        if len(chunk) != chunk_bytes:
            raise RefusedError("nv_read", RC_ALTERED)
        content += chunk
    return without_padding(content)


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
