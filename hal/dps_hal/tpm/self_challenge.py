"""Makes an activation blob for a TPM as DPS does, so that a device can be checked without any service.

Source: TPM 2.0 Library Part 1, 23.2 (duplication) and 24 (credential protection).
"""

import struct

from dps_hal.platform import aes128_cfb, hmac_sha256, random_bytes, sha256
from dps_hal.tpm.activation import Activation, join_activation
from dps_hal.tpm.keys import (
    ALG_HMAC,
    ALG_KEYEDHASH,
    ALG_SHA256,
    ID_KEY_ATTRIBUTES,
    kdfa,
    oaep_encrypt,
    object_name,
    sized,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable


def make_activation(
    ek: bytes,
    srk: bytes,
    hmac_key: bytes,
    *,
    attributes: int = ID_KEY_ATTRIBUTES,
    uri: bytes = b"self-challenge",
    random: "Callable[[int], bytes]" = random_bytes,
) -> bytes:
    """An activation blob that gives `hmac_key` to the TPM with these EK and SRK (checked TPM2B_PUBLICs).

    A TPM takes keys of 1 to 64 bytes. `random(count)` is asked for the inner key (16 bytes), the credential's seed,
    the duplicate's seed, the key's seed value, the OAEP seed to the EK and the one to the SRK (32 bytes each), in
    this order.
    """
    inner_key = random(16)
    credential_seed = random(32)
    duplicate_seed = random(32)
    seed_value = random(32)
    ek_oaep_seed = random(32)
    srk_oaep_seed = random(32)

    unique = sha256(seed_value + hmac_key)
    public = sized(
        struct.pack(">HHIHHH", ALG_KEYEDHASH, ALG_SHA256, attributes, 0, ALG_HMAC, ALG_SHA256) + sized(unique)
    )
    key_name = object_name(public)
    sensitive = sized(struct.pack(">HH", ALG_KEYEDHASH, 0) + sized(seed_value) + sized(hmac_key))
    inner_wrapped = aes128_cfb(inner_key, sized(sha256(sensitive + key_name)) + sensitive, False)

    return join_activation(
        Activation(
            outer_wrap(credential_seed, object_name(srk), sized(inner_key)),
            oaep_encrypt(ek, credential_seed, b"IDENTITY\x00", ek_oaep_seed),
            outer_wrap(duplicate_seed, key_name, inner_wrapped),
            oaep_encrypt(srk, duplicate_seed, b"DUPLICATE\x00", srk_oaep_seed),
            public,
            aes128_cfb(inner_key, uri, False),
        )
    )


def outer_wrap(seed: bytes, name: bytes, content: bytes) -> bytes:
    """`content` encrypted and bound to `name` by keys made of `seed`: TPM2B HMAC, ciphertext (Part 1, 22.4)."""
    ciphertext = aes128_cfb(kdfa(seed, b"STORAGE", name, b"", 128), content, False)
    return sized(hmac_sha256(kdfa(seed, b"INTEGRITY", b"", b"", 256), ciphertext + name)) + ciphertext
