"""A key for TLS that a TPM has made and never gives away: EC on P-256 under the SRK; CPython only.

Its file is what OpenSSL's provider tpm2 and its predecessors read: "TSS2 PRIVATE KEY" in PEM, which holds the handle of
the SRK, the public area, and the private one, encrypted to that SRK. Of use to this TPM alone. Sources: TPM 2.0 Library
Part 2, 12.2 (areas); "ASN.1 Specification for TPM 2.0 Key Files", 3.1.
"""

from __future__ import annotations

import binascii
import struct

from dps_hal.der import INTEGER, OBJECT_IDENTIFIER, SEQUENCE, element
from dps_hal.errors import AskOperator
from dps_hal.tpm.keys import (
    ALG_NULL,
    ALG_SHA256,
    FIXED_PARENT,
    FIXED_TPM,
    NO_DA,
    SENSITIVE_DATA_ORIGIN,
    SIGN,
    USER_WITH_AUTH,
    sized,
    take_sized,
)
from dps_hal.tpm.rules import PERSISTENT

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final, NamedTuple

    class KeyFile(NamedTuple):
        """What the file of a key holds."""

        srk_handle: int  # a persistent one
        public: bytes  # TPM2B_PUBLIC and TPM2B_PRIVATE, sizes included
        private: bytes
else:
    from dps_hal.named import namedtuple

    KeyFile = namedtuple("KeyFile", ("srk_handle", "public", "private"))

_BEGIN = b"-----BEGIN TSS2 PRIVATE KEY-----"
_END = b"-----END TSS2 PRIVATE KEY-----"
_LOADABLE_KEY = bytes.fromhex("6781050a0103")  # 2.23.133.10.1.3
_BOOLEAN = 0x01
_OCTET_STRING = 0x04
_EMPTY_AUTH = 0xA0
_ALG_ECC = 0x0023  # TPM_ALG, Part 2, table 9, with the next
_ALG_ECDSA = 0x0018
_NIST_P256 = 0x0003  # TPM_ECC_CURVE
_NUMBER_BYTES = 32  # of either coordinate, and of either number of a signature
# Without noDA a TPM in its lockout would end all connections; no TPM makes another of this key.
_ATTRIBUTES = FIXED_TPM | FIXED_PARENT | SENSITIVE_DATA_ORIGIN | USER_WITH_AUTH | NO_DA | SIGN
# Type, nameAlg, attributes, no policy; no symmetric algorithm, any scheme, the curve, no KDF.
_AREA = struct.pack(">HHIH", _ALG_ECC, ALG_SHA256, _ATTRIBUTES, 0) + struct.pack(
    ">HHHH", ALG_NULL, ALG_NULL, _NIST_P256, ALG_NULL
)
TEMPLATE: Final = sized(_AREA + bytes(4))
SCHEME: Final = struct.pack(">HH", _ALG_ECDSA, ALG_SHA256)  # TPMT_SIG_SCHEME


def point(public: bytes) -> tuple[int, int]:
    """The two coordinates of a key's TPM2B_PUBLIC; ValueError where it is none that `TEMPLATE` gives."""
    area, end = take_sized(public, 0, "public area")
    if end != len(public) or area[: len(_AREA)] != _AREA:
        raise ValueError("expected a signing key on the curve P-256 without a policy; came another")
    x, at = take_sized(area, len(_AREA), "x")
    y, at = take_sized(area, at, "y")
    if at != len(area) or not 0 < len(x) <= _NUMBER_BYTES or not 0 < len(y) <= _NUMBER_BYTES:
        raise ValueError("expected two coordinates up to the end of the public area")
    return int.from_bytes(x, "big"), int.from_bytes(y, "big")


def signature_numbers(signature: bytes) -> tuple[int, int]:
    """The two numbers of a TPMT_SIGNATURE of ECDSA with SHA-256; ValueError for another one."""
    if signature[:4] != SCHEME:
        raise ValueError("expected a signature of ECDSA with SHA-256")
    r, at = take_sized(signature, 4, "r")
    s, at = take_sized(signature, at, "s")
    if at != len(signature):
        raise ValueError("expected the signature's end behind s")
    return int.from_bytes(r, "big"), int.from_bytes(s, "big")


def place_of_srk(found_at: int | None) -> int:
    """The persistent handle of the SRK, see `TpmService.srk_found_at`; AskOperator `tpm.nv_full` where it has none."""
    if not found_at:
        text = "the TPM has no room to keep the storage root key, under which a key for TLS is found again"
        raise AskOperator("tpm.nv_full", text)
    return found_at


def to_pem(key: KeyFile) -> bytes:
    """The file of a key that has no password."""
    handle = b"\x00" + struct.pack(">I", key.srk_handle)  # a number whose highest bit is set is no negative one
    der = _tagged(
        SEQUENCE,
        _tagged(OBJECT_IDENTIFIER, _LOADABLE_KEY)
        + _tagged(_EMPTY_AUTH, _tagged(_BOOLEAN, b"\xff"))
        + _tagged(INTEGER, handle)
        + _tagged(_OCTET_STRING, key.public)
        + _tagged(_OCTET_STRING, key.private),
    )
    text = binascii.b2a_base64(der, newline=False)
    lines = [text[at : at + 64] for at in range(0, len(text), 64)]
    return b"\n".join([_BEGIN, *lines, _END, b""])


def from_pem(content: bytes) -> KeyFile:
    """The key in a file; ValueError where that is damaged, or no key that `TEMPLATE` gives."""
    head, begin, rest = content.partition(_BEGIN)
    body, end, behind = rest.partition(_END)
    if head.strip() or not begin or not end or behind.strip():
        raise ValueError("expected one TSS2 PRIVATE KEY in PEM")
    der = binascii.a2b_base64(body)  # binascii.Error is a ValueError
    at, last = element(der, 0, len(der), SEQUENCE, "key file")
    fields = []
    for what, tag in (
        ("type", OBJECT_IDENTIFIER),
        ("emptyAuth", _EMPTY_AUTH),
        ("parent", INTEGER),
        ("pubkey", _OCTET_STRING),
        ("privkey", _OCTET_STRING),
    ):
        start, at = element(der, at, last, tag, what)
        fields.append(der[start:at])
    kind, empty, parent, public, private = fields
    srk_handle = int.from_bytes(parent, "big")
    if at != len(der) or kind != _LOADABLE_KEY or empty[-1:] in (b"", b"\x00"):
        raise ValueError("expected a loadable key without a password")
    if srk_handle >> 24 != PERSISTENT >> 24:
        raise ValueError(f"expected a key under a persistent handle; came one under 0x{srk_handle:08x}")
    if take_sized(private, 0, "private area")[1] != len(private):
        raise ValueError("expected the private area up to its end")
    point(public)
    return KeyFile(srk_handle, public, private)


def _tagged(tag: int, content: bytes) -> bytes:
    size = len(content)
    if size < 0x80:
        return bytes((tag, size)) + content
    digits = size.to_bytes((size.bit_length() + 7) // 8, "big")
    return bytes((tag, 0x80 | len(digits))) + digits + content
