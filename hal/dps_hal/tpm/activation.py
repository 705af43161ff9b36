"""The activation blob, DPS's `authenticationKey` after base64: an HMAC key that one TPM alone can take.

Layout (no header, no count; hal/SPEC.md has it bit by bit): TPM2B_ID_OBJECT, TPM2B_ENCRYPTED_SECRET, TPM2B_PRIVATE,
TPM2B_ENCRYPTED_SECRET, TPM2B_PUBLIC, and a TPM2B with an encrypted text that no client needs. Source: the Azure IoT
device SDKs for C, C#, Java and Node, and two answers published with them.
"""

from dps_hal.errors import RetryLater
from dps_hal.tpm.keys import RSA_BYTES, SHA256_BYTES, check_id_key_public, sized, take_sized

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NamedTuple

    class Activation(NamedTuple):
        """The blob's fields, each without its two size bytes, but `id_key_public` with them."""

        credential: bytes  # TPM2B_ID_OBJECT: TPM2B integrity HMAC (32), encrypted identity
        credential_secret: bytes  # seed of the credential, encrypted to the EK
        duplicate: bytes  # TPM2B_PRIVATE: TPM2B outer HMAC (32), the key under inner and outer wrapping
        duplicate_seed: bytes  # seed of the outer wrapping, encrypted to the SRK
        id_key_public: bytes  # marshalled TPM2B_PUBLIC of the key
        encrypted_uri: bytes | None  # None: the blob ended before it
else:
    from dps_hal.named import namedtuple

    Activation = namedtuple(
        "Activation",
        ("credential", "credential_secret", "duplicate", "duplicate_seed", "id_key_public", "encrypted_uri"),
    )


def parse_activation(blob: bytes) -> Activation:
    """The fields of an activation blob, by its own size fields, with a key that is fit to be imported.

    RetryLater `dps.blob_malformed`: short or trailing bytes, or a size that no RSA-2048 EK and SHA-256 name allow.
    AskOperator `dps.key_unsuitable`: as `check_id_key_public` says.
    """
    try:
        activation = split_activation(blob)
        check_id_key_public(activation.id_key_public)
    except ValueError as error:
        raise RetryLater("dps.blob_malformed", f"the key that DPS sent: {error}")
    return activation


def split_activation(blob: bytes) -> Activation:
    """The fields of an activation blob, whatever key is in it; ValueError where the layout is another."""
    credential, offset = _take_hmac_and_more(blob, 0, "credential")
    credential_secret, offset = _take_secret(blob, offset, "credential secret")
    duplicate, offset = _take_hmac_and_more(blob, offset, "duplicate")
    duplicate_seed, offset = _take_secret(blob, offset, "duplicate seed")
    at = offset
    public, offset = take_sized(blob, offset, "public area")
    if not public:
        raise ValueError(f"public area: expected it at offset {at + 2}, came a size of 0")
    encrypted_uri = None
    if offset < len(blob):
        encrypted_uri, end = take_sized(blob, offset, "encrypted URI")
        if end != len(blob):
            raise ValueError(f"expected the end at offset {end}, came {len(blob) - end} more bytes")
    return Activation(credential, credential_secret, duplicate, duplicate_seed, blob[at:offset], encrypted_uri)


def join_activation(activation: Activation) -> bytes:
    """The activation blob of these fields, the inverse of `split_activation`."""
    blob = (
        sized(activation.credential)
        + sized(activation.credential_secret)
        + sized(activation.duplicate)
        + sized(activation.duplicate_seed)
        + activation.id_key_public
    )
    return blob if activation.encrypted_uri is None else blob + sized(activation.encrypted_uri)


def _take_secret(blob: bytes, offset: int, what: str) -> "tuple[bytes, int]":
    secret, end = take_sized(blob, offset, what)
    if len(secret) != RSA_BYTES:
        raise ValueError(f"{what}: expected {RSA_BYTES} bytes at offset {offset + 2}, came {len(secret)}")
    return secret, end


def _take_hmac_and_more(blob: bytes, offset: int, what: str) -> "tuple[bytes, int]":
    field, end = take_sized(blob, offset, what)
    integrity, hmac_end = take_sized(blob[:end], offset + 2, what + "'s HMAC")
    if len(integrity) != SHA256_BYTES:
        raise ValueError(f"{what}'s HMAC: expected {SHA256_BYTES} bytes at offset {offset + 4}, came {len(integrity)}")
    if hmac_end == end:
        raise ValueError(f"{what}: expected encrypted bytes at offset {end}, came none")
    return field, end
