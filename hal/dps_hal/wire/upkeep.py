"""EK certificate and condition over a connection: what a registration does not ask for."""

import struct

from dps_hal.tpm_errors import FMT1_HANDLE, RC_ALTERED, RC_NV_UNINITIALIZED, RefusedError
from dps_hal.tpm_rules import PT_LOCKOUT_INTERVAL
from dps_hal.tpm_upkeep import (
    EK_CERTIFICATE_INDEX,
    NV_CHUNK_BYTES,
    PT_FIRMWARE_VERSION_1,
    PT_MANUFACTURER,
    PT_PERMANENT,
    condition_of,
    without_padding,
)
from dps_hal.wire.commands import NV_READ, NV_READ_PUBLIC, take_field

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from dps_hal.contracts import TpmCondition
    from dps_hal.wire.commands import Connection


def endorsement_certificate(connection: "Connection") -> "bytes | None":
    """As `TpmService.endorsement_certificate`."""
    index = EK_CERTIFICATE_INDEX
    try:
        _, answer = connection.run(NV_READ_PUBLIC, (index,))
    except RefusedError as refused:
        if refused.base == FMT1_HANDLE:
            return None
        raise refused
    public, _ = take_field("nv_read_public", answer, 0)
    size = int.from_bytes(public[-2:], "big")
    content = b""
    while len(content) < size:
        chunk_bytes = min(NV_CHUNK_BYTES, size - len(content))
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


def condition(properties: "Callable[[int, int], dict[int, int]]") -> "TpmCondition":
    """As `TpmService.condition`; `properties(first, last)` asks the TPM."""
    found = properties(PT_MANUFACTURER, PT_FIRMWARE_VERSION_1)
    found.update(properties(PT_PERMANENT, PT_LOCKOUT_INTERVAL))
    return condition_of(found)
