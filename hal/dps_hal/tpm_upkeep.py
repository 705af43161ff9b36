"""What every back end of a real TPM does alike beyond a registration: certificate, condition, keys for others."""

import struct

from dps_hal.contracts import TpmCondition
from dps_hal.errors import AskOperator
from dps_hal.tpm_rules import PT_LOCKOUT_COUNTER, PT_LOCKOUT_INTERVAL

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

EK_CERTIFICATE_INDEX: "Final" = 0x01C00002  # TCG EK Credential Profile, 2.2.1.4: RSA-2048 EK certificate
NV_CHUNK_BYTES: "Final" = 512  # at most TPM_PT_NV_BUFFER_MAX, which the PC Client profile lets be this small

PT_MANUFACTURER: "Final" = 0x105  # TPM_PT, TPM 2.0 Library Part 2, table 24, with the next three
PT_FIRMWARE_VERSION_1: "Final" = 0x10B
PT_PERMANENT: "Final" = 0x200
PT_HR_TRANSIENT_AVAIL: "Final" = 0x207
_OWNER_AUTH_SET = 1  # TPMA_PERMANENT, Part 2, table 36, with the next
_ENDORSEMENT_AUTH_SET = 2


def check_owner_handle(handle: int) -> None:
    """AskOperator `config.invalid` unless the owner may persist at `handle` (Part 2, 7.5)."""
    if not 0x81000000 <= handle < 0x81800000:
        raise AskOperator("config.invalid", f"persist_at: expected 0x81000000 to 0x817fffff; came 0x{handle:08x}")


def check_replaceable(public: bytes, handle: int, former: bytes) -> None:
    """AskOperator `tpm.handle_taken` unless the TPM2B_PUBLIC at `handle` is that of the wrapped key `former`.

    Other programs keep HMAC keys of the same kind, Azure's own clients at the very same handle.
    """
    if not former or former[: len(public)] != public:
        raise AskOperator(
            "tpm.handle_taken",
            f"persist_at: expected a free handle or this agent's earlier key at 0x{handle:08x}; came another",
        )


def without_padding(certificate: bytes) -> bytes:
    """The DER at the start of what an NV index holds."""
    if certificate[:2] == b"\x30\x82":  # an ASN.1 SEQUENCE that says its own length in two bytes
        return certificate[: 4 + int.from_bytes(certificate[2:4], "big")]
    return certificate


def condition_of(properties: "dict[int, int]") -> TpmCondition:
    """The condition that these TPM properties describe."""
    firmware = properties.get(PT_FIRMWARE_VERSION_1, 0)
    permanent = properties.get(PT_PERMANENT, 0)
    return TpmCondition(
        maker="".join([chr(letter) for letter in struct.pack(">I", properties.get(PT_MANUFACTURER, 0))]).strip("\0 "),
        firmware=f"{firmware >> 16}.{firmware & 0xFFFF}",
        lockout_counter=properties.get(PT_LOCKOUT_COUNTER, 0),
        lockout_maximum=properties.get(PT_LOCKOUT_COUNTER + 1, 0),
        recovery_s=properties.get(PT_LOCKOUT_INTERVAL, 0),
        free_slots=properties.get(PT_HR_TRANSIENT_AVAIL, 0),
        owner_has_password=permanent & _OWNER_AUTH_SET != 0,
        endorsement_has_password=permanent & _ENDORSEMENT_AUTH_SET != 0,
    )
