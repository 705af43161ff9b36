"""What every back end of a real TPM does alike beyond a registration: certificate, condition, keys for others."""

import struct

from dps_hal.contracts import TpmCondition
from dps_hal.errors import AskOperator
from dps_hal.tpm_keys import EK_TEMPLATES, ek_template, object_name
from dps_hal.tpm_rules import (
    ENDORSEMENT_AUTH_SET,
    OWNER_AUTH_SET,
    PT_LOCKOUT_COUNTER,
    PT_LOCKOUT_INTERVAL,
    PT_PERMANENT,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Final

EK_CERTIFICATE_INDEX: "Final" = 0x01C00002  # TCG EK Credential Profile, 2.2.1.4: RSA-2048 EK certificate
_NV_CHUNK_BYTES = 512  # where the TPM does not say; TPM_PT_NV_BUFFER_MAX of the PC Client profile is no smaller
_LEAST_NV_CHUNK_BYTES = 32  # a TPM that states less would take thousands of commands
_MOST_NV_CHUNK_BYTES = 2048  # a response has 4096 bytes at most

PT_MANUFACTURER: "Final" = 0x105  # TPM_PT, TPM 2.0 Library Part 2, table 24, with the next three
PT_FIRMWARE_VERSION_1: "Final" = 0x10B
PT_NV_BUFFER_MAX: "Final" = 0x12C
PT_HR_TRANSIENT_AVAIL: "Final" = 0x207
_NV_AUTHREAD = 1 << 18  # TPMA_NV, Part 2, table 217, with the next: its own password suffices for reading
_NV_NO_DA = 1 << 25  # a wrong password is not counted as a failed guess


def check_owner_handle(handle: int) -> None:
    """AskOperator `config.invalid` unless the owner may persist at `handle` (Part 2, 7.5)."""
    if not 0x81000000 <= handle < 0x81800000:
        raise AskOperator("config.invalid", f"persist_at: expected 0x81000000 to 0x817fffff; came 0x{handle:08x}")


def check_replaceable(public: bytes, handle: int, former: bytes) -> None:
    """AskOperator `tpm.handle_taken` unless the key whose TPM2B_PUBLIC is at `handle` has the name `former`.

    Other programs keep HMAC keys of the same kind, Azure's own clients at the very same handle.
    """
    if object_name(public) != former:
        raise AskOperator(
            "tpm.handle_taken",
            f"persist_at: expected a free handle or this agent's earlier key at 0x{handle:08x}; came another",
        )


def template_of(ek: bytes, likely: bytes, made_from: "Callable[[bytes], bytes]") -> str:
    """Which of EK_TEMPLATES gives this EK, empty for none; the template `likely` is tried first.

    `made_from(template)` is the public area of the key that the TPM makes: always the same from the same template.
    """
    templates = [(name, ek_template(name)) for name in EK_TEMPLATES]
    for name, template in sorted(templates, key=lambda named: named[1] != likely):
        if made_from(template) == ek:
            return name
    return ""


def nv_chunk_bytes(properties: "dict[int, int]") -> int:
    """How many bytes of an NV index one command reads."""
    stated = properties.get(PT_NV_BUFFER_MAX) or _NV_CHUNK_BYTES
    return min(max(stated, _LEAST_NV_CHUNK_BYTES), _MOST_NV_CHUNK_BYTES)


def check_readable(attributes: int) -> None:
    """AskOperator `tpm.certificate_locked` unless trying an empty password on an index of these TPMA_NV is harmless."""
    if attributes & _NV_AUTHREAD == 0:
        raise AskOperator(
            "tpm.certificate_locked", "the index of the EK certificate cannot be read by its own password (no AUTHREAD)"
        )
    if attributes & _NV_NO_DA == 0:
        raise AskOperator(
            "tpm.certificate_locked",
            "the EK certificate is not read: if its index has a password, the try would count as a failed guess (no"
            " NO_DA)",
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
        owner_has_password=permanent & OWNER_AUTH_SET != 0,
        endorsement_has_password=permanent & ENDORSEMENT_AUTH_SET != 0,
    )
