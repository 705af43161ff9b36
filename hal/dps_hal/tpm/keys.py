"""TPM 2.0 keys as bytes: templates, public areas and their checks, names, wrapped keys, key derivation.

Every public area here is a marshalled TPM2B_PUBLIC, its two size bytes included. Sources: TPM 2.0 Library Part 1
(names, KDFa, OAEP) and Part 2 (structures); TCG EK Credential Profile, template L-1; Azure IoT device SDKs.
"""

import binascii
import struct

from dps_hal.contracts import EK_TEMPLATES
from dps_hal.errors import AskOperator, IdentityStale
from dps_hal.platform import hmac_sha256, sha256

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final, NamedTuple

    class KeyedHashPublic(NamedTuple):
        """The public area of an HMAC key, parsed."""

        object_type: int
        name_algorithm: int
        attributes: int
        auth_policy: bytes
        scheme: int
        scheme_hash: int
        unique: bytes
else:
    from dps_hal.named import namedtuple

    KeyedHashPublic = namedtuple(
        "KeyedHashPublic",
        ("object_type", "name_algorithm", "attributes", "auth_policy", "scheme", "scheme_hash", "unique"),
    )


ALG_RSA: "Final" = 0x0001  # TPM 2.0 Library Part 2, table 9, with the next seven
ALG_HMAC: "Final" = 0x0005
ALG_AES: "Final" = 0x0006
ALG_KEYEDHASH: "Final" = 0x0008
ALG_SHA256: "Final" = 0x000B
ALG_NULL: "Final" = 0x0010
ALG_CFB: "Final" = 0x0043

FIXED_TPM: "Final" = 0x00000002  # TPMA_OBJECT, Part 2, table 33, with the next nine
FIXED_PARENT: "Final" = 0x00000010
SENSITIVE_DATA_ORIGIN: "Final" = 0x00000020
USER_WITH_AUTH: "Final" = 0x00000040
ADMIN_WITH_POLICY: "Final" = 0x00000080
NO_DA: "Final" = 0x00000400
ENCRYPTED_DUPLICATION: "Final" = 0x00000800
RESTRICTED: "Final" = 0x00010000
DECRYPT: "Final" = 0x00020000
SIGN: "Final" = 0x00040000

EK_ATTRIBUTES: "Final" = FIXED_TPM | FIXED_PARENT | SENSITIVE_DATA_ORIGIN | ADMIN_WITH_POLICY | RESTRICTED | DECRYPT
SRK_ATTRIBUTES: "Final" = (
    FIXED_TPM | FIXED_PARENT | SENSITIVE_DATA_ORIGIN | USER_WITH_AUTH | NO_DA | RESTRICTED | DECRYPT
)
ID_KEY_ATTRIBUTES: "Final" = USER_WITH_AUTH | NO_DA | SIGN  # as in every published answer of DPS
_ID_KEY_REQUIRED = USER_WITH_AUTH | SIGN
_ID_KEY_TOLERATED = SENSITIVE_DATA_ORIGIN | ADMIN_WITH_POLICY | NO_DA | ENCRYPTED_DUPLICATION

# PolicySecret(TPM_RH_ENDORSEMENT), EK Credential Profile, table 2.
EK_AUTH_POLICY: "Final" = binascii.unhexlify("837197674484b3f81a90cc8d46a5d724fd52d76e06520b64f2a1da1b331469aa")

SHA256_BYTES: "Final" = 32
RSA_BYTES: "Final" = 256  # modulus of RSA-2048
MAX_HMAC_KEY_BYTES: "Final" = 64  # SHA-256's block; a TPM imports no longer HMAC key


def sized(content: bytes) -> bytes:
    """`content` behind its size in two big-endian bytes, a TPM2B; ValueError over 65,535 bytes."""
    if len(content) > 0xFFFF:  # MicroPython's struct.pack would truncate the number silently
        raise ValueError(f"a TPM2B holds at most 65535 bytes, not {len(content)}")
    return struct.pack(">H", len(content)) + content


def take_sized(area: bytes, offset: int, what: str) -> "tuple[bytes, int]":
    """The TPM2B at `offset` without its size, and the offset behind it; ValueError where `area` is too short."""
    start = offset + 2
    if start > len(area):
        raise ValueError(f"{what}: expected 2 size bytes at offset {offset}, came {len(area) - offset}")
    end = start + int.from_bytes(area[offset:start], "big")
    if end > len(area):
        raise ValueError(f"{what}: expected {end - start} bytes at offset {start}, came {len(area) - start}")
    return area[start:end], end


def object_name(public: bytes) -> bytes:
    """The TPM name of a TPM2B_PUBLIC with nameAlg SHA-256, 34 bytes (Part 1, 16)."""
    return struct.pack(">H", ALG_SHA256) + sha256(public[2:])


def registration_id_from_ek(ek: bytes) -> str:
    """The default registration id, 52 characters: base32 of SHA-256 of the EK's TPM2B_PUBLIC, as Microsoft's tools."""
    alphabet = "abcdefghijklmnopqrstuvwxyz234567"  # RFC 4648, 6, in lower case; MicroPython has no base64 module
    digest = sha256(ek)
    number = int.from_bytes(digest, "big") << 4  # 256 bits and 4 bits of padding are 52 groups of 5
    text = ""
    for shift in range(255, -1, -5):
        text += alphabet[(number >> shift) & 31]
    return text


def ek_template(name: str) -> bytes:
    """The template of the EK, a TPM2B_PUBLIC: `tcg-l1` has 256 zero bytes as unique, `azure-c-sdk` has none.

    The two give different keys on the same TPM. AskOperator `config.invalid` for any other name.
    """
    if name not in EK_TEMPLATES:
        raise AskOperator("config.invalid", f"ek_template: expected one of {', '.join(EK_TEMPLATES)}; came {name!r}")
    return _rsa_public(EK_ATTRIBUTES, EK_AUTH_POLICY, bytes(RSA_BYTES) if name == "tcg-l1" else b"")


def srk_template() -> bytes:
    """The template of the SRK, a TPM2B_PUBLIC with 256 zero bytes as unique (TCG Provisioning Guidance, 7.5.1)."""
    return _rsa_public(SRK_ATTRIBUTES, b"", bytes(RSA_BYTES))


def ek_public(modulus: bytes) -> bytes:
    """The TPM2B_PUBLIC of the endorsement key with this modulus, 316 bytes."""
    return _rsa_public(EK_ATTRIBUTES, EK_AUTH_POLICY, modulus)


def srk_public(modulus: bytes) -> bytes:
    """The TPM2B_PUBLIC of the storage root key with this modulus, 284 bytes."""
    return _rsa_public(SRK_ATTRIBUTES, b"", modulus)


def check_ek_public(public: bytes) -> None:
    """AskOperator `tpm.ek_unsuitable` unless `public` is an endorsement key of the TCG template."""
    _check_rsa_public(public, EK_ATTRIBUTES, EK_AUTH_POLICY, "endorsement key", "tpm.ek_unsuitable")


def check_srk_public(public: bytes) -> None:
    """AskOperator `tpm.srk_unsuitable` unless `public` is a storage root key of the TCG template."""
    _check_rsa_public(public, SRK_ATTRIBUTES, b"", "storage root key", "tpm.srk_unsuitable")


def makers_template(template: bytes, nonce: bytes) -> bytes:
    """The EK's template, a TPM2B_PUBLIC, from what the TPM's maker left in NV memory; either may be empty.

    Without a template, a TPMT_PUBLIC, it is L-1; a nonce is the start of `unique`, zeros behind it (EK Credential
    Profile, 2.2.1). AskOperator `tpm.ek_template_unsuitable` where it would give a key that `check_ek_public` refuses.
    """
    code = "tpm.ek_template_unsuitable"
    public = sized(template or ek_template("tcg-l1")[2:])
    offset = _check_rsa_fields(public, EK_ATTRIBUTES, EK_AUTH_POLICY, "maker's template", code)
    try:
        unique, _ = take_sized(public, offset, "unique")  # what follows is padding of its NV index
    except ValueError as error:
        raise AskOperator(code, f"the maker's template: {error}")
    if len(nonce) > RSA_BYTES or len(unique) > RSA_BYTES:
        raise AskOperator(code, f"the maker's nonce: expected at most {RSA_BYTES} bytes; came {len(nonce or unique)}")
    if nonce:
        unique = nonce + bytes(RSA_BYTES - len(nonce))
    return sized(public[2:offset] + sized(unique))  # the exponent stays as it is written there: it changes the key


def rsa_modulus(public: bytes) -> bytes:
    """The modulus of a checked EK or SRK, 256 bytes."""
    return public[-RSA_BYTES:]


def _rsa_fields(attributes: int, auth_policy: bytes) -> "tuple[tuple[str, bytes], ...]":
    """The fields of an RSA-2048 storage key's TPMT_PUBLIC before the unique, in their order (Part 2, 12.2.4)."""
    return (
        ("type", struct.pack(">H", ALG_RSA)),
        ("nameAlg", struct.pack(">H", ALG_SHA256)),
        ("attributes", struct.pack(">I", attributes)),
        ("authPolicy", sized(auth_policy)),
        ("symmetric", struct.pack(">HHH", ALG_AES, 128, ALG_CFB)),
        ("scheme", struct.pack(">H", ALG_NULL)),
        ("keyBits", struct.pack(">H", RSA_BYTES * 8)),
        ("exponent", bytes(4)),  # 0 stands for 65537
    )


def _rsa_public(attributes: int, auth_policy: bytes, modulus: bytes) -> bytes:
    return sized(b"".join([field for _, field in _rsa_fields(attributes, auth_policy)]) + sized(modulus))


def _check_rsa_fields(public: bytes, attributes: int, auth_policy: bytes, key: str, code: str) -> int:
    """AskOperator `code` unless the fields before the unique are those of the template; the offset behind them."""
    if len(public) < 2 or int.from_bytes(public[:2], "big") != len(public) - 2:
        raise AskOperator(code, f"the {key}: expected a TPM2B_PUBLIC; came {len(public)} bytes of another size")
    offset = 2
    for name, expected in _rsa_fields(attributes, auth_policy):
        came = public[offset : offset + len(expected)]
        if came != expected and not (name == "exponent" and came == b"\x00\x01\x00\x01"):
            raise AskOperator(code, f"the {key}'s {name}: expected {_hex(expected)}; came {_hex(came) or 'nothing'}")
        offset += len(expected)
    return offset


def _check_rsa_public(public: bytes, attributes: int, auth_policy: bytes, key: str, code: str) -> None:
    offset = _check_rsa_fields(public, attributes, auth_policy, key, code)
    modulus = public[offset + 2 :]
    if public[offset : offset + 2] != struct.pack(">H", RSA_BYTES) or len(modulus) != RSA_BYTES:
        raise AskOperator(code, f"the {key}'s modulus: expected {RSA_BYTES} bytes; came {len(modulus)}")
    if not (modulus[0] & 0x80 and modulus[-1] & 1):
        raise AskOperator(code, f"the {key}'s modulus: expected an odd number of {RSA_BYTES * 8} bits; came another")


def parse_keyedhash_public(public: bytes) -> KeyedHashPublic:
    """The fields of an HMAC key's TPM2B_PUBLIC; ValueError where the bytes are of another layout.

    Where type, nameAlg or scheme are not those of an HMAC-SHA256 key, what follows cannot be told apart: the rest is
    then zero or empty, and `check_id_key_public` refuses it.
    """
    area, end = take_sized(public, 0, "public area")
    if end != len(public):
        raise ValueError(f"public area: expected its end at offset {end}, came {len(public) - end} more bytes")
    if len(area) < 8:
        raise ValueError(f"public area: expected type, nameAlg and attributes, 8 bytes; came {len(area)}")
    object_type, name_algorithm, attributes = struct.unpack(">HHI", area[:8])
    if object_type != ALG_KEYEDHASH or name_algorithm != ALG_SHA256:
        return KeyedHashPublic(object_type, name_algorithm, attributes, b"", 0, 0, b"")
    auth_policy, offset = take_sized(area, 8, "authPolicy")
    if len(auth_policy) not in (0, SHA256_BYTES):
        raise ValueError(f"authPolicy: expected 0 or {SHA256_BYTES} bytes, came {len(auth_policy)}")
    if len(area) < offset + 4:
        raise ValueError(f"scheme: expected 4 bytes at offset {offset}, came {len(area) - offset}")
    scheme, scheme_hash = struct.unpack(">HH", area[offset : offset + 4])
    if scheme != ALG_HMAC or scheme_hash != ALG_SHA256:
        return KeyedHashPublic(object_type, name_algorithm, attributes, auth_policy, scheme, scheme_hash, b"")
    unique, end = take_sized(area, offset + 4, "unique")
    if end != len(area) or len(unique) != SHA256_BYTES:
        raise ValueError(f"unique: expected {SHA256_BYTES} bytes up to the end, came {len(area) - offset - 6}")
    return KeyedHashPublic(object_type, name_algorithm, attributes, auth_policy, scheme, scheme_hash, unique)


def check_id_key_public(public: bytes) -> None:
    """AskOperator `dps.key_unsuitable` unless `public` is an HMAC-SHA256 signing key that can be imported.

    ValueError where the bytes are no such public area at all.
    """
    key = parse_keyedhash_public(public)
    for name, came, expected in (
        ("type", key.object_type, ALG_KEYEDHASH),
        ("nameAlg", key.name_algorithm, ALG_SHA256),
        ("scheme", key.scheme, ALG_HMAC),
        ("scheme's hash", key.scheme_hash, ALG_SHA256),
        ("attributes", key.attributes & ~_ID_KEY_TOLERATED, _ID_KEY_REQUIRED),
    ):
        if came != expected:
            raise AskOperator("dps.key_unsuitable", f"the key's {name}: expected {expected:#06x}; came {came:#06x}")


def has_no_da(public: bytes) -> bool:
    """Whether a key is exempt from the TPM's lockout; one that is not writes TPM NV memory when used."""
    return int.from_bytes(public[6:10], "big") & NO_DA != 0


def wrap(public: bytes, private: bytes) -> bytes:
    """A wrapped key: TPM2B_PUBLIC and TPM2B_PRIVATE, sizes included, one behind the other."""
    return public + private


def unwrap(wrapped_key: bytes) -> "tuple[bytes, bytes]":
    """TPM2B_PUBLIC and TPM2B_PRIVATE, sizes included, of a wrapped key.

    IdentityStale `tpm.key_stale` where it is malformed or no HMAC-SHA256 signing key.
    """
    try:
        _, split = take_sized(wrapped_key, 0, "public area")
        _, end = take_sized(wrapped_key, split, "private area")
        if end != len(wrapped_key):
            raise ValueError(f"expected its end at offset {end}, came {len(wrapped_key) - end} more bytes")
        check_id_key_public(wrapped_key[:split])
    except (ValueError, AskOperator) as error:
        raise IdentityStale("tpm.key_stale", f"the stored key: {error}")
    return wrapped_key[:split], wrapped_key[split:]


def kdfa(key: bytes, label: bytes, context_u: bytes, context_v: bytes, bits: int) -> bytes:
    """KDFa with SHA-256 (Part 1, 11.4.10.2): `bits` / 8 bytes; `label` without its terminating zero."""
    out = b""
    counter = 0
    while len(out) * 8 < bits:
        counter += 1
        out += hmac_sha256(
            key, struct.pack(">I", counter) + label + b"\x00" + context_u + context_v + struct.pack(">I", bits)
        )
    return out[: bits // 8]


def oaep_encrypt(public: bytes, message: bytes, label: bytes, random_seed: bytes) -> bytes:
    """RSA-OAEP with SHA-256 (RFC 8017, 7.1.1) to a checked EK or SRK, 256 bytes.

    `label` ends with a zero byte in every use by a TPM (Part 1, B.4). `random_seed` is 32 bytes of fresh randomness.
    """
    padding = RSA_BYTES - 2 * SHA256_BYTES - 2 - len(message)
    if padding < 0:
        raise ValueError(f"OAEP with RSA-2048 takes at most {padding + len(message)} bytes, not {len(message)}")
    block = sha256(label) + bytes(padding) + b"\x01" + message
    masked_block = _xor(block, _mgf1(random_seed, len(block)))
    masked_seed = _xor(random_seed, _mgf1(masked_block, SHA256_BYTES))
    number = int.from_bytes(b"\x00" + masked_seed + masked_block, "big")
    return pow(number, 65537, int.from_bytes(rsa_modulus(public), "big")).to_bytes(RSA_BYTES, "big")


def _mgf1(seed: bytes, length: int) -> bytes:
    mask = b""
    counter = 0
    while len(mask) < length:
        mask += sha256(seed + struct.pack(">I", counter))
        counter += 1
    return mask[:length]


def _xor(a: bytes, b: bytes) -> bytes:
    out = bytearray(a)  # a list of its bytes would be eight times as long
    for i in range(len(out)):
        out[i] ^= b[i]
    return bytes(out)


def _hex(content: bytes) -> str:
    return binascii.hexlify(content).decode()
