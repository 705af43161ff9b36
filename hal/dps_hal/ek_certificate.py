"""Whether an endorsement key is the one that its TPM's certificate names.

DER is read as far as the public key goes (RFC 5280, 4.1; X.690). The certificate's signature is not verified: that
takes the manufacturer's roots, and whoever enrols the key has to decide which of them to trust.
"""

import binascii

from dps_hal.tpm_keys import rsa_modulus

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

MATCH: "Final" = "match"  # then the key is of template L-1, as what the index 0x01C00002 certifies always is
MISMATCH: "Final" = "mismatch"
ABSENT: "Final" = "absent"
UNREADABLE: "Final" = "unreadable"  # no X.509 certificate of an RSA key

_INTEGER = 0x02  # X.690, 8.1.2
_BIT_STRING = 0x03
_OBJECT_IDENTIFIER = 0x06
_SEQUENCE = 0x30
_VERSION = 0xA0
_RSA_ALGORITHMS = (
    binascii.unhexlify("2a864886f70d010101"),  # rsaEncryption, RFC 8017, A.1
    binascii.unhexlify("2a864886f70d010107"),  # id-RSAES-OAEP, as the EK Credential Profile has it
)
_EXPONENT = 65537


def compare(certificate: "bytes | None", ek: bytes) -> str:
    """MATCH, MISMATCH, ABSENT (None) or UNREADABLE for a certificate in DER and a checked EK's TPM2B_PUBLIC."""
    if certificate is None:
        return ABSENT
    try:
        modulus, exponent = certified_key(certificate)
    except ValueError:
        return UNREADABLE
    return MATCH if modulus == rsa_modulus(ek) and exponent == _EXPONENT else MISMATCH


def certified_key(certificate: bytes) -> "tuple[bytes, int]":
    """Modulus, without leading zeros, and exponent in an X.509 certificate in DER; ValueError where there are none.

    What follows the certificate is not looked at: NV indices are padded.
    """
    start, end = _element(certificate, 0, len(certificate), _SEQUENCE, "certificate")
    at, end = _element(certificate, start, end, _SEQUENCE, "tbsCertificate")
    if certificate[at:][:1] == bytes([_VERSION]):
        _, at = _element(certificate, at, end, _VERSION, "version")
    for tag, what in (
        (_INTEGER, "serialNumber"),
        (_SEQUENCE, "signature"),
        (_SEQUENCE, "issuer"),
        (_SEQUENCE, "validity"),
        (_SEQUENCE, "subject"),
    ):
        _, at = _element(certificate, at, end, tag, what)
    at, end = _element(certificate, at, end, _SEQUENCE, "subjectPublicKeyInfo")
    algorithm, at = _element(certificate, at, end, _SEQUENCE, "algorithm")
    first, last = _element(certificate, algorithm, at, _OBJECT_IDENTIFIER, "algorithm's identifier")
    if certificate[first:last] not in _RSA_ALGORITHMS:
        raise ValueError(f"expected an RSA key; came algorithm {binascii.hexlify(certificate[first:last]).decode()}")
    at, end = _element(certificate, at, end, _BIT_STRING, "subjectPublicKey")
    if certificate[at : at + 1] != b"\x00":
        raise ValueError("expected whole bytes in subjectPublicKey; came unused bits")
    at, end = _element(certificate, at + 1, end, _SEQUENCE, "RSAPublicKey")
    first, last = _element(certificate, at, end, _INTEGER, "modulus")
    at, end = _element(certificate, last, end, _INTEGER, "publicExponent")
    return certificate[first:last].lstrip(b"\x00"), int.from_bytes(certificate[at:end], "big")


def _element(der: bytes, at: int, end: int, tag: int, what: str) -> "tuple[int, int]":
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
