"""TPM keys as the service sees them: public areas checked field by field, and activation blobs made for them.

Sources: TCG TPM 2.0 Library, part 1 (KDFa, names, credential and duplication wrapping) and part 2 (structures);
TCG EK Credential Profile, template L-1. All integers are big-endian; `TPM2B(x)` is a 16-bit length and x.
"""

import hashlib
import hmac
import struct
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache, lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric import padding, rsa
    from cryptography.hazmat.primitives.ciphers import CipherContext

RandomBytes = Callable[[int], bytes]

ALG_RSA = 0x0001
ALG_HMAC = 0x0005
ALG_AES = 0x0006
ALG_KEYEDHASH = 0x0008
ALG_SHA256 = 0x000B
ALG_NULL = 0x0010
ALG_CFB = 0x0043

EK_ATTRIBUTES = 0x000300B2  # fixedTPM fixedParent sensitiveDataOrigin adminWithPolicy restricted decrypt
SRK_ATTRIBUTES = 0x00030472  # fixedTPM fixedParent sensitiveDataOrigin userWithAuth noDA restricted decrypt
ID_KEY_ATTRIBUTES = 0x00040040  # userWithAuth sign
NO_DA = 0x00000400
EK_POLICY = bytes.fromhex("837197674484b3f81a90cc8d46a5d724fd52d76e06520b64f2a1da1b331469aa")  # PolicySecret(EK)
RSA_BITS = 2048
RSA_EXPONENT = 65537  # what the exponent field 0 means


class UnsuitableKeyError(ValueError):
    """A public area that is not of its template; the message says which field, what was expected and what came."""


@dataclass(frozen=True)
class StorageKey:
    """An RSA-2048 EK or SRK that fits its template."""

    marshalled: bytes  # TPM2B_PUBLIC, size prefix included
    modulus: int

    @property
    def name(self) -> bytes:
        """The object's name, 34 bytes: nameAlg and the digest of the public area without its size prefix."""
        return object_name(self.marshalled[2:])


@dataclass(frozen=True)
class ActivationSecrets:
    """What is random in an activation blob, but for the padding of its seeds; never shown."""

    inner_key: bytes  # 16 bytes
    credential_seed: bytes  # 32 bytes, for the EK
    duplication_seed: bytes  # 32 bytes, for the SRK
    seed_value: bytes  # 32 bytes, the id key's own seed

    def __repr__(self) -> str:
        return "ActivationSecrets(...)"

    @classmethod
    def draw(cls, random_bytes: RandomBytes) -> "ActivationSecrets":
        """Draws all of them, the inner key first."""
        return cls(**{field.name: random_bytes(16 if field.name == "inner_key" else 32) for field in fields(cls)})


@lru_cache(1000)  # a registration meets the same key again and again
def parse_endorsement_key(marshalled: bytes) -> StorageKey:
    """Checks a marshalled TPM2B_PUBLIC against the EK template; raises UnsuitableKeyError."""
    return _parse("endorsementKey", marshalled, EK_ATTRIBUTES, EK_POLICY)


@lru_cache(1000)
def parse_storage_root_key(marshalled: bytes) -> StorageKey:
    """Checks a marshalled TPM2B_PUBLIC against the SRK template; raises UnsuitableKeyError."""
    return _parse("storageRootKey", marshalled, SRK_ATTRIBUTES, b"")


def _parse(what: str, marshalled: bytes, attributes: int, policy: bytes) -> StorageKey:
    at = 0

    def take(count: int, field: str) -> bytes:
        nonlocal at
        piece = marshalled[at : at + count]
        if len(piece) != count:
            raise UnsuitableKeyError(f"{what}: ends within {field} ({len(marshalled)} bytes in all)")
        at += count
        return piece

    def sized(field: str) -> bytes:
        return take(int.from_bytes(take(2, f"the size of {field}")), field)

    def expect(field: str, expected: int, count: int = 2) -> None:
        found = int.from_bytes(take(count, field))
        if found != expected:
            digits = 2 * count
            raise UnsuitableKeyError(f"{what}: {field} is 0x{found:0{digits}x}, expected 0x{expected:0{digits}x}")

    size = int.from_bytes(take(2, "its size"))
    if size != len(marshalled) - 2:
        raise UnsuitableKeyError(
            f"{what}: says {size} bytes but has {len(marshalled) - 2}; expected a TPM2B_PUBLIC with its size prefix"
        )
    expect("type", ALG_RSA)
    expect("nameAlg", ALG_SHA256)
    expect("objectAttributes", attributes, 4)
    found_policy = sized("authPolicy")
    if found_policy != policy:
        raise UnsuitableKeyError(f"{what}: authPolicy is '{found_policy.hex()}', expected '{policy.hex()}'")
    expect("symmetric algorithm", ALG_AES)
    expect("symmetric key bits", 128)
    expect("symmetric mode", ALG_CFB)
    expect("scheme", ALG_NULL)
    expect("keyBits", RSA_BITS)
    exponent = int.from_bytes(take(4, "exponent"))
    if exponent not in (0, RSA_EXPONENT):
        raise UnsuitableKeyError(f"{what}: exponent is {exponent}, expected 0 or {RSA_EXPONENT}, which mean the same")
    unique = sized("unique")
    if at != len(marshalled):
        raise UnsuitableKeyError(f"{what}: {len(marshalled) - at} bytes follow the public area")
    modulus = int.from_bytes(unique)
    if len(unique) != RSA_BITS // 8 or modulus.bit_length() != RSA_BITS or modulus % 2 == 0:
        raise UnsuitableKeyError(f"{what}: unique is no {RSA_BITS}-bit RSA modulus")
    return StorageKey(marshalled, modulus)


def activation_blob(
    ek: StorageKey, srk: StorageKey, key: bytes, secrets: ActivationSecrets, uri: bytes, *, no_da: bool = True
) -> bytes:
    """The `authenticationKey` before base64: an HMAC key that only the TPM with this EK and SRK can recover.

    Six TPM2B fields: TPM2B_ID_OBJECT, TPM2B_ENCRYPTED_SECRET for the EK, TPM2B_PRIVATE (the duplicate),
    TPM2B_ENCRYPTED_SECRET for the SRK, TPM2B_PUBLIC of the id key, and `uri` encrypted by the inner key.
    """
    encrypted_identity, identity_hmac = wrap(secrets.credential_seed, srk.name, tpm2b(secrets.inner_key))
    public = id_key_public(key, secrets.seed_value, no_da=no_da)
    name = object_name(public)
    sensitive = tpm2b(struct.pack(">H", ALG_KEYEDHASH) + tpm2b(b"") + tpm2b(secrets.seed_value) + tpm2b(key))
    inner_integrity = hashlib.sha256(sensitive + name).digest()
    inner = aes_cfb_encrypt(secrets.inner_key, tpm2b(inner_integrity) + sensitive)
    duplicate, outer_hmac = wrap(secrets.duplication_seed, name, inner)
    return b"".join(
        map(
            tpm2b,
            (
                tpm2b(identity_hmac) + encrypted_identity,
                oaep_encrypt(ek.modulus, secrets.credential_seed, b"IDENTITY\0"),
                tpm2b(outer_hmac) + duplicate,
                oaep_encrypt(srk.modulus, secrets.duplication_seed, b"DUPLICATE\0"),
                public,
                aes_cfb_encrypt(secrets.inner_key, uri),
            ),
        )
    )


def id_key_public(key: bytes, seed_value: bytes, *, no_da: bool) -> bytes:
    """The id key's TPMT_PUBLIC, 48 bytes: KEYEDHASH, SHA-256, HMAC-SHA256 scheme, no policy."""
    attributes = ID_KEY_ATTRIBUTES | (NO_DA if no_da else 0)
    head = struct.pack(">HHI", ALG_KEYEDHASH, ALG_SHA256, attributes) + tpm2b(b"")
    return head + struct.pack(">HH", ALG_HMAC, ALG_SHA256) + tpm2b(hashlib.sha256(seed_value + key).digest())


def wrap(seed: bytes, name: bytes, content: bytes) -> tuple[bytes, bytes]:
    """The outer wrap of credential and duplicate: (encrypted content, HMAC over it and the object's name)."""
    encrypted = aes_cfb_encrypt(kdfa(seed, b"STORAGE", name, b"", 128), content)
    return encrypted, hmac.digest(kdfa(seed, b"INTEGRITY", b"", b"", 256), encrypted + name, "sha256")


def tpm2b(content: bytes) -> bytes:
    """`content` behind its 16-bit length."""
    return struct.pack(">H", len(content)) + content


def object_name(public: bytes) -> bytes:
    """The name of a TPMT_PUBLIC: nameAlg SHA-256 and the digest, 34 bytes."""
    return struct.pack(">H", ALG_SHA256) + hashlib.sha256(public).digest()


def kdfa(key: bytes, label: bytes, context_u: bytes, context_v: bytes, bits: int) -> bytes:
    """KDFa with HMAC-SHA256 (TPM 2.0 part 1, 11.4.10.2); `label` without its terminating zero."""
    out = b""
    counter = 0
    while len(out) * 8 < bits:
        counter += 1
        message = struct.pack(">I", counter) + label + b"\0" + context_u + context_v + struct.pack(">I", bits)
        out += hmac.digest(key, message, "sha256")
    return out[: bits // 8]


def aes_cfb_encrypt(key: bytes, plaintext: bytes) -> bytes:
    """AES-CFB with 128-bit feedback and a zero vector, no padding."""
    encryptor = _aes_cfb()(key)
    return encryptor.update(plaintext) + encryptor.finalize()


@cache
def _aes_cfb() -> "Callable[[bytes], CipherContext]":
    """The library's, loaded here because most commands need no cipher, and it takes longer than all they do."""
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

    try:
        from cryptography.hazmat.decrepit.ciphers.modes import CFB  # newer releases count it as retired
    except ImportError:
        from cryptography.hazmat.primitives.ciphers.modes import CFB
    mode = CFB(bytes(16))
    return lambda key: Cipher(algorithms.AES(key), mode).encryptor()


def oaep_encrypt(modulus: int, message: bytes, label: bytes) -> bytes:
    """RSA-OAEP with SHA-256 and MGF1-SHA-256 (RFC 8017, 7.1.1), 256 bytes; `label` with its zero."""
    return _public_key(modulus).encrypt(message, _oaep(label))


@cache
def _oaep(label: bytes) -> "padding.OAEP":
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric.padding import MGF1, OAEP

    return OAEP(MGF1(hashes.SHA256()), hashes.SHA256(), label)


@lru_cache(1000)
def _public_key(modulus: int) -> "rsa.RSAPublicKey":
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicNumbers

    return RSAPublicNumbers(RSA_EXPONENT, modulus).public_key()
