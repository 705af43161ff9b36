"""Whether an endorsement key is the one that its TPM's certificate names.

The certificate's signature is not verified: that takes the manufacturer's roots, and whoever enrols the key has to
decide which of them to trust.
"""

import binascii

from dps_hal.der import BIT_STRING, INTEGER, OBJECT_IDENTIFIER, SEQUENCE, element, field_of
from dps_hal.errors import AskOperator
from dps_hal.platform import sha256
from dps_hal.tpm.keys import rsa_modulus

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final, NamedTuple

    from dps_hal.contracts import TpmService

    class Certified(NamedTuple):
        """What a TPM says of the endorsement key that its maker has certified."""

        verdict: str  # one of the words below, on this endorsement key
        sha256: str  # SHA-256 of the certificate in DER, hex; empty where none could be read
        locked: str  # why it cannot be read, else empty
        template: str  # how the certified key is made, in words
        usable: bool  # whether `ek_template = "tcg-l1"` makes it so
        by_maker: bool  # whether NV says something else than template L-1
else:
    from dps_hal.named import namedtuple

    Certified = namedtuple("Certified", ("verdict", "sha256", "locked", "template", "usable", "by_maker"))

MATCH: "Final" = "match"  # the key is what `ek_template = "tcg-l1"` gives
MISMATCH: "Final" = "mismatch"
ABSENT: "Final" = "absent"
LOCKED: "Final" = "locked"  # the TPM does not let us read it
UNREADABLE: "Final" = "unreadable"  # no X.509 certificate of an RSA key

SAYS: "Final" = {
    MATCH: "match: it names this endorsement key",
    MISMATCH: "mismatch: it names another key than this endorsement key",
    ABSENT: "absent: the TPM holds none",
    LOCKED: "locked: the TPM does not let it be read",
    UNREADABLE: "unreadable: what the TPM holds is no X.509 certificate of an RSA key",
}
OTHER_CERTIFICATES: "Final" = {  # NV indices, EK Credential Profile, 2.2.1.4 and 2.2.1.5
    0x01C0000A: "ECC P-256 (L-2)",
    0x01C00012: "RSA-2048 (H-1)",
    0x01C00014: "ECC P-256 (H-2)",
    0x01C00016: "ECC P-384 (H-3)",
    0x01C00018: "ECC P-521 (H-4)",
    0x01C0001A: "ECC SM2 (H-5)",
    0x01C0001C: "RSA-3072 (H-6)",
    0x01C0001E: "RSA-4096 (H-7)",
}

_RSA_ALGORITHMS = (
    binascii.unhexlify("2a864886f70d010101"),  # rsaEncryption, RFC 8017, A.1
    binascii.unhexlify("2a864886f70d010107"),  # id-RSAES-OAEP, as the EK Credential Profile has it
)
_EXPONENT = 65537


def certified(tpm: "TpmService", ek: bytes) -> Certified:
    """What the TPM's NV memory says of the certified key, and whether `ek` is it; one reader for all who show it.

    What cannot be read says nothing about whether this TPM can register, so AskOperator is an answer here.
    """
    certificate, locked = None, ""
    try:
        certificate = tpm.endorsement_certificate()
    except AskOperator as error:
        locked = error.message
    verdict = LOCKED if locked else compare(certificate, ek)
    template, usable, by_maker = "it is made by the template L-1", True, False
    try:
        if tpm.makers_template():
            template, by_maker = "it is made by the template and nonce in NV (0x01c00004, 0x01c00003)", True
    except AskOperator as error:
        template = f"it is made by a template in NV (0x01c00004, 0x01c00003) that is not used: {error.message}"
        usable, by_maker = False, True
    digest = sha256(certificate).hex() if certificate and verdict in (MATCH, MISMATCH) else ""
    return Certified(verdict, digest, locked, template, usable, by_maker)


def certified_elsewhere(tpm: "TpmService") -> str:
    """The other endorsement keys that the TPM has certificates for, in words; empty where there are none."""
    return ", ".join(
        f"{OTHER_CERTIFICATES[index]} at {index:#010x}" for index in tpm.ek_indices() if index in OTHER_CERTIFICATES
    )


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
    at, end = field_of(certificate, "subjectPublicKeyInfo")
    algorithm, at = element(certificate, at, end, SEQUENCE, "algorithm")
    first, last = element(certificate, algorithm, at, OBJECT_IDENTIFIER, "algorithm's identifier")
    if certificate[first:last] not in _RSA_ALGORITHMS:
        raise ValueError(f"expected an RSA key; came algorithm {binascii.hexlify(certificate[first:last]).decode()}")
    at, end = element(certificate, at, end, BIT_STRING, "subjectPublicKey")
    if certificate[at : at + 1] != b"\x00":
        raise ValueError("expected whole bytes in subjectPublicKey; came unused bits")
    at, end = element(certificate, at + 1, end, SEQUENCE, "RSAPublicKey")
    first, last = element(certificate, at, end, INTEGER, "modulus")
    at, end = element(certificate, last, end, INTEGER, "publicExponent")
    return certificate[first:last].lstrip(b"\x00"), int.from_bytes(certificate[at:end], "big")
