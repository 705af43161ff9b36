"""X.509 certificates in DER: where their fields are (RFC 5280, 4.1; X.690).

Nothing is verified here. Of a field only the outermost element is looked at.
"""

import binascii

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

INTEGER: "Final" = 0x02  # X.690, 8.1.2
BIT_STRING: "Final" = 0x03
OBJECT_IDENTIFIER: "Final" = 0x06
SEQUENCE: "Final" = 0x30
_VERSION = 0xA0
_FIELDS = (
    ("serialNumber", INTEGER),
    ("signature", SEQUENCE),
    ("issuer", SEQUENCE),
    ("validity", SEQUENCE),
    ("subject", SEQUENCE),
    ("subjectPublicKeyInfo", SEQUENCE),
)


def element(der: bytes, at: int, end: int, tag: int, what: str) -> "tuple[int, int]":
    """Where the content of the element at `at` begins and ends; ValueError unless it is `tag` and ends by `end`."""
    if at + 2 > end or der[at] != tag:
        raise ValueError(f"{what}: expected tag {tag:#04x} at offset {at}; came {binascii.hexlify(der[at : at + 2])!r}")
    start = at + 2
    size = der[at + 1]
    if size > 0x80:  # so many bytes hold the size; 0x80 would be "until a mark", which DER does not have
        start += size & 0x7F
        size = int.from_bytes(der[at + 2 : start], "big")
    elif size == 0x80:
        raise ValueError(f"{what}: expected a definite length at offset {at}")
    if start + size > end:
        raise ValueError(f"{what}: expected {size} bytes at offset {start}; came {end - start}")
    return start, start + size


def field_of(certificate: bytes, wanted: str) -> "tuple[int, int]":
    """Where the content of a field of the certificate begins and ends; ValueError for what is no certificate.

    What follows the certificate is not looked at: NV indices are padded.
    """
    start, end = element(certificate, 0, len(certificate), SEQUENCE, "certificate")
    at, end = element(certificate, start, end, SEQUENCE, "tbsCertificate")
    if certificate[at : min(at + 1, end)] == bytes([_VERSION]):
        _, at = element(certificate, at, end, _VERSION, "version")
    for what, tag in _FIELDS:
        start, at = element(certificate, at, end, tag, what)
        if what == wanted:
            break
    return start, at
