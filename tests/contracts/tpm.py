"""What every Tpm does, whatever is behind it: simulator, esys, wire.

Each claim takes the TPM and another one (other EK, other SRK). The blobs come from `dps_hal.tpm.self_challenge`.
"""

import struct

from dps_hal.errors import AskOperator, IdentityStale, RetryLater
from dps_hal.platform import aes128_cfb, hmac_sha256, sha256
from dps_hal.tpm.activation import Activation, join_activation, split_activation
from dps_hal.tpm.keys import (
    ALG_KEYEDHASH,
    ALG_RSA,
    DECRYPT,
    FIXED_PARENT,
    FIXED_TPM,
    ID_KEY_ATTRIBUTES,
    NO_DA,
    RESTRICTED,
    SIGN,
    USER_WITH_AUTH,
    check_ek_public,
    check_srk_public,
    oaep_encrypt,
    object_name,
    sized,
)
from dps_hal.tpm.self_challenge import make_activation, outer_wrap
from support.claims import assert_refused, flipped

TYPE_CHECKING = False
if TYPE_CHECKING:
    from dps_hal.contracts import Tpm
    from dps_hal.errors import DpsError

KEY = bytes(range(32))
URI = b"example-hub.azure-devices.net/devices/vector-device"

MALFORMED = (RetryLater, "dps.blob_malformed")
UNSUITABLE = (AskOperator, "dps.key_unsuitable")
REFUSED = (IdentityStale, "tpm.blob_refused")
KEY_REFUSED = (AskOperator, "tpm.key_refused")
STALE = (IdentityStale, "tpm.key_stale")
HARMLESS = None

# Field, offset and size in bytes in the blob of a 32-byte key, what a bit flipped in it must cause.
BLOB_FIELDS = (
    ("credential size", 0, 2, MALFORMED),
    ("credential HMAC size", 2, 2, MALFORMED),
    ("credential HMAC", 4, 32, REFUSED),
    ("encrypted identity", 36, 18, REFUSED),
    ("credential secret size", 54, 2, MALFORMED),
    ("credential secret", 56, 256, REFUSED),
    ("duplicate size", 312, 2, MALFORMED),
    ("duplicate HMAC size", 314, 2, MALFORMED),
    ("duplicate HMAC", 316, 32, REFUSED),
    ("duplicate ciphertext", 348, 108, REFUSED),
    ("duplicate seed size", 456, 2, MALFORMED),
    ("duplicate seed", 458, 256, REFUSED),
    ("public size", 714, 2, MALFORMED),
    ("type", 716, 2, UNSUITABLE),
    ("nameAlg", 718, 2, UNSUITABLE),
    ("attributes", 720, 2, UNSUITABLE),  # the lower half has bits whose change only the TPM can see
    ("authPolicy size", 724, 2, MALFORMED),
    ("scheme", 726, 2, UNSUITABLE),
    ("scheme's hash", 728, 2, UNSUITABLE),
    ("unique size", 730, 2, MALFORMED),
    ("unique", 732, 32, REFUSED),
    ("URI size", 764, 2, MALFORMED),
    ("encrypted URI", 766, len(URI), HARMLESS),
)

# The same for a wrapped 32-byte key; TPM2B_PRIVATE is HMAC, IV, ciphertext (TPM 2.0 Library Part 1, 22).
WRAPPED_KEY_FIELDS = (
    ("public size", 0, 2),
    ("type", 2, 2),
    ("nameAlg", 4, 2),
    ("attributes", 6, 4),
    ("authPolicy size", 10, 2),
    ("scheme", 12, 2),
    ("scheme's hash", 14, 2),
    ("unique size", 16, 2),
    ("unique", 18, 32),
    ("private size", 50, 2),
    ("HMAC size", 52, 2),
    ("HMAC", 54, 32),
    ("IV size", 86, 2),
    ("IV", 88, 16),
    ("ciphertext", 104, 106),
)


def blob_for(tpm: "Tpm", hmac_key: bytes = KEY, attributes: int = ID_KEY_ATTRIBUTES) -> bytes:
    """An activation blob for `tpm`."""
    return make_activation(tpm.endorsement_key(), tpm.storage_root_key(), hmac_key, attributes=attributes, uri=URI)


def badly_built_blob(
    tpm: "Tpm",
    *,
    inner_key: bytes = bytes(16),
    object_type: int = ALG_KEYEDHASH,
    attributes: int = ID_KEY_ATTRIBUTES,
    auth_value: bytes = b"",
    seed_value: bytes = bytes(32),
    unique: bytes = b"",
    inner_integrity: bytes = b"",
    behind_the_key: bytes = b"",
    credential_seed: bytes = bytes(32),
    duplicate_seed: bytes = bytes(32),
) -> bytes:
    """An activation blob for `tpm` with every HMAC right, as built by a service with a mistake in it."""
    ek, srk = tpm.endorsement_key(), tpm.storage_root_key()
    good = split_activation(make_activation(ek, srk, KEY, attributes=attributes))
    public = good.id_key_public[:-32] + (unique or sha256(seed_value + KEY))
    key_name = object_name(public)
    fields = sized(auth_value) + sized(seed_value) + sized(KEY) + behind_the_key
    sensitive = sized(struct.pack(">H", object_type) + fields)
    inner_wrapped = sized(inner_integrity or sha256(sensitive + key_name)) + sensitive
    return join_activation(
        Activation(
            outer_wrap(credential_seed, object_name(srk), sized(inner_key)),
            oaep_encrypt(ek, credential_seed, b"IDENTITY\x00", bytes(32)),
            outer_wrap(duplicate_seed, key_name, aes128_cfb((inner_key + bytes(16))[:16], inner_wrapped, False)),
            oaep_encrypt(srk, duplicate_seed, b"DUPLICATE\x00", bytes(32)),
            public,
            good.encrypted_uri,
        )
    )


def test_the_endorsement_key_and_storage_root_key_fit_their_templates(tpm: "Tpm", other_tpm: "Tpm") -> None:
    check_ek_public(tpm.endorsement_key())
    check_srk_public(tpm.storage_root_key())
    assert len(tpm.endorsement_key()) == 316
    assert len(tpm.storage_root_key()) == 284


def test_the_endorsement_key_and_storage_root_key_are_the_same_each_time(tpm: "Tpm", other_tpm: "Tpm") -> None:
    ek, srk = tpm.endorsement_key(), tpm.storage_root_key()
    tpm.release()
    assert tpm.endorsement_key() == ek
    assert tpm.storage_root_key() == srk
    assert other_tpm.endorsement_key() != ek
    assert other_tpm.storage_root_key() != srk


def test_a_key_of_any_length_up_to_64_bytes_signs_as_itself(tpm: "Tpm", other_tpm: "Tpm") -> None:
    for length in (1, 16, 20, 31, 32, 33, 48, 64):
        hmac_key = bytes(range(1, length + 1))
        wrapped_key = tpm.import_key(blob_for(tpm, hmac_key))
        assert tpm.sign(wrapped_key, b"message") == hmac_sha256(hmac_key, b"message"), f"key length={length}"


def test_messages_of_any_length_up_to_4096_bytes_are_signed(tpm: "Tpm", other_tpm: "Tpm") -> None:
    wrapped_key = tpm.import_key(blob_for(tpm))
    for length in (0, 1, 64, 200, 1023, 1024, 1025, 2048, 2049, 4096):
        message = bytes(length)
        assert tpm.sign(wrapped_key, message) == hmac_sha256(KEY, message), f"message length={length}"


def test_keys_with_and_without_no_da_sign(tpm: "Tpm", other_tpm: "Tpm") -> None:
    for attributes in (USER_WITH_AUTH | SIGN, USER_WITH_AUTH | SIGN | NO_DA, USER_WITH_AUTH | SIGN | NO_DA | 0x800):
        wrapped_key = tpm.import_key(blob_for(tpm, attributes=attributes))
        assert tpm.sign(wrapped_key, b"message") == hmac_sha256(KEY, b"message"), f"attributes={attributes:#x}"


def test_a_wrapped_key_has_210_bytes_and_does_not_show_the_key(tpm: "Tpm", other_tpm: "Tpm") -> None:
    activation = blob_for(tpm)
    wrapped_key = tpm.import_key(activation)
    assert len(wrapped_key) == 210
    assert wrapped_key[:50] == activation[714:764]
    assert KEY not in wrapped_key


def test_a_key_imported_twice_is_usable_twice(tpm: "Tpm", other_tpm: "Tpm") -> None:
    activation = blob_for(tpm)
    first, second = tpm.import_key(activation), tpm.import_key(activation)
    another = tpm.import_key(blob_for(tpm, b"another key"))
    assert first != second
    assert tpm.sign(first, b"message") == tpm.sign(second, b"message") == hmac_sha256(KEY, b"message")
    assert tpm.sign(another, b"message") == hmac_sha256(b"another key", b"message")


def test_release_may_come_twice_and_the_next_call_works(tpm: "Tpm", other_tpm: "Tpm") -> None:
    wrapped_key = tpm.import_key(blob_for(tpm))
    tpm.release()
    tpm.release()
    assert tpm.sign(wrapped_key, b"message") == hmac_sha256(KEY, b"message")
    tpm.release()
    assert len(tpm.import_key(blob_for(tpm))) == 210


def test_a_blob_for_another_endorsement_key_is_refused(tpm: "Tpm", other_tpm: "Tpm") -> None:
    activation = make_activation(other_tpm.endorsement_key(), tpm.storage_root_key(), KEY)
    _assert_import_refused(tpm, activation, REFUSED, "EK of another TPM")


def test_a_blob_for_another_storage_root_key_is_refused(tpm: "Tpm", other_tpm: "Tpm") -> None:
    activation = make_activation(tpm.endorsement_key(), other_tpm.storage_root_key(), KEY)
    _assert_import_refused(tpm, activation, REFUSED, "SRK of another TPM")


def test_a_blob_whose_duplicate_is_for_another_storage_root_key_is_refused(tpm: "Tpm", other_tpm: "Tpm") -> None:
    ours = blob_for(tpm)
    theirs = make_activation(tpm.endorsement_key(), other_tpm.storage_root_key(), KEY, uri=URI)
    _assert_import_refused(tpm, ours[:312] + theirs[312:], REFUSED, "duplicate of another SRK")


def test_a_blob_put_together_from_two_is_refused(tpm: "Tpm", other_tpm: "Tpm") -> None:
    first, second = blob_for(tpm), blob_for(tpm, bytes(32))
    for name, offset in (("credential", 312), ("duplicate", 714)):
        mixed = first[:offset] + second[offset:]
        _assert_import_refused(tpm, mixed, REFUSED, f"two blobs joined behind the {name}")


def test_a_bit_flipped_in_any_field_of_the_blob_is_refused(tpm: "Tpm", other_tpm: "Tpm") -> None:
    activation = blob_for(tpm)
    assert len(activation) == BLOB_FIELDS[-1][1] + BLOB_FIELDS[-1][2]
    for name, offset, size, expected in BLOB_FIELDS:
        for bit in (8 * offset, 8 * (offset + size) - 1):
            altered = flipped(activation, bit)
            reproduce = f"field={name} bit={bit}"
            if expected is None:
                assert tpm.sign(tpm.import_key(altered), b"message") == hmac_sha256(KEY, b"message"), reproduce
            else:
                _assert_import_refused(tpm, altered, expected, reproduce)
    assert tpm.sign(tpm.import_key(activation), b"message") == hmac_sha256(KEY, b"message")


def test_a_flipped_no_da_is_refused(tpm: "Tpm", other_tpm: "Tpm") -> None:
    activation = bytearray(blob_for(tpm))
    activation[722] ^= NO_DA >> 8
    _assert_import_refused(tpm, bytes(activation), REFUSED, "field=attributes noDA")


def test_a_key_that_is_no_importable_signing_key_is_unsuitable(tpm: "Tpm", other_tpm: "Tpm") -> None:
    for attributes in (
        ID_KEY_ATTRIBUTES | FIXED_TPM,
        ID_KEY_ATTRIBUTES | FIXED_PARENT,
        ID_KEY_ATTRIBUTES | FIXED_TPM | FIXED_PARENT,
        ID_KEY_ATTRIBUTES | DECRYPT,
        ID_KEY_ATTRIBUTES | RESTRICTED,
        ID_KEY_ATTRIBUTES & ~SIGN,
        ID_KEY_ATTRIBUTES & ~USER_WITH_AUTH,
        ID_KEY_ATTRIBUTES | 1,  # reserved
    ):
        _assert_import_refused(tpm, blob_for(tpm, attributes=attributes), UNSUITABLE, f"attributes={attributes:#x}")


def test_a_key_with_a_password_of_its_own_is_unsuitable(tpm: "Tpm", other_tpm: "Tpm") -> None:
    for password in (b"p", b"password", bytes(31) + b"p"):
        activation = badly_built_blob(tpm, auth_value=password)
        _assert_unsuitable(tpm, activation, f"password={password!r}")
    assert tpm.sign(tpm.import_key(blob_for(tpm)), b"message") == hmac_sha256(KEY, b"message")


def test_a_key_of_65_bytes_or_more_is_refused(tpm: "Tpm", other_tpm: "Tpm") -> None:
    for length in (65, 128, 129, 200):
        reproduce = f"key length={length}"
        _assert_import_refused(tpm, blob_for(tpm, bytes(length)), KEY_REFUSED, reproduce)


def test_a_badly_built_blob_is_refused(tpm: "Tpm", other_tpm: "Tpm") -> None:
    assert tpm.sign(tpm.import_key(badly_built_blob(tpm)), b"message") == hmac_sha256(KEY, b"message")
    for mistake, expected in (
        ({"inner_key": b""}, REFUSED),
        ({"inner_key": bytes(15)}, REFUSED),
        ({"inner_key": bytes(32)}, REFUSED),
        ({"inner_integrity": bytes(31)}, REFUSED),
        ({"inner_integrity": bytes(32)}, REFUSED),
        ({"behind_the_key": b"\x00"}, REFUSED),
        ({"credential_seed": bytes(33)}, REFUSED),
        ({"duplicate_seed": bytes(33)}, REFUSED),
        ({"object_type": ALG_RSA}, KEY_REFUSED),
        ({"seed_value": bytes(16)}, KEY_REFUSED),
        ({"unique": bytes(32)}, KEY_REFUSED),
    ):
        _assert_import_refused(tpm, badly_built_blob(tpm, **mistake), expected, f"mistake={mistake}")


def test_a_short_blob_is_malformed(tpm: "Tpm", other_tpm: "Tpm") -> None:
    activation = blob_for(tpm)
    for length in (0, 1, 2, 53, 54, 56, 312, 456, 714, 716, 763, 765, 766, len(activation) - 1):
        _assert_import_refused(tpm, activation[:length], MALFORMED, f"length={length}")
    _assert_import_refused(tpm, activation + b"\x00", MALFORMED, "one byte more")


def test_a_blob_without_its_uri_is_taken(tpm: "Tpm", other_tpm: "Tpm") -> None:
    for activation in (blob_for(tpm)[:764], blob_for(tpm)[:764] + b"\x00\x00"):
        assert tpm.sign(tpm.import_key(activation), b"message") == hmac_sha256(KEY, b"message")


def test_a_wrapped_key_of_another_tpm_is_stale(tpm: "Tpm", other_tpm: "Tpm") -> None:
    theirs = other_tpm.import_key(blob_for(other_tpm))
    _assert_stale(tpm, theirs, "wrapped key of another TPM")


def test_a_bit_flipped_in_any_field_of_the_wrapped_key_makes_it_stale(tpm: "Tpm", other_tpm: "Tpm") -> None:
    wrapped_key = tpm.import_key(blob_for(tpm))
    for name, offset, size in WRAPPED_KEY_FIELDS:
        for bit in (8 * offset, 8 * (offset + size) - 1):
            _assert_stale(tpm, flipped(wrapped_key, bit), f"field={name} bit={bit}")
    altered = bytearray(wrapped_key)
    altered[8] ^= NO_DA >> 8
    _assert_stale(tpm, bytes(altered), "field=attributes noDA")
    assert tpm.sign(wrapped_key, b"message") == hmac_sha256(KEY, b"message")


def test_a_wrapped_key_cut_short_or_mixed_is_stale(tpm: "Tpm", other_tpm: "Tpm") -> None:
    wrapped_key = tpm.import_key(blob_for(tpm))
    for length in (0, 1, 49, 50, 52, 86, 209):
        _assert_stale(tpm, wrapped_key[:length], f"length={length}")
    _assert_stale(tpm, wrapped_key + b"\x00", "one byte more")
    another = tpm.import_key(blob_for(tpm, bytes(32)))
    assert object_name(another[:50]) != object_name(wrapped_key[:50])
    _assert_stale(tpm, wrapped_key[:50] + another[50:], "public of one key, private of another")


def _assert_import_refused(
    tpm: "Tpm", activation: bytes, expected: "tuple[type[DpsError], str]", reproduce: str
) -> None:
    assert_refused(lambda: tpm.import_key(activation), expected[0], expected[1], reproduce)


def _assert_unsuitable(tpm: "Tpm", activation: bytes, reproduce: str) -> None:
    """A key that is taken may show it when it is used first."""
    assert_refused(lambda: tpm.sign(tpm.import_key(activation), b"message"), UNSUITABLE[0], UNSUITABLE[1], reproduce)


def _assert_stale(tpm: "Tpm", wrapped_key: bytes, reproduce: str) -> None:
    assert_refused(lambda: tpm.sign(wrapped_key, b"message"), STALE[0], STALE[1], reproduce)


CLAIMS = tuple([claim for name, claim in sorted(globals().items()) if name.startswith("test_")])
