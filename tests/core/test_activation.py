"""The activation blob, public areas, names, templates and wrapped keys as bytes."""

from dps_hal.contracts import EK_TEMPLATES
from dps_hal.errors import AskOperator, IdentityStale, RetryLater
from dps_hal.platform import aes128_cfb, hmac_sha256, sha256
from dps_hal.tpm.activation import Activation, join_activation, parse_activation, split_activation
from dps_hal.tpm.keys import (
    check_ek_public,
    check_id_key_public,
    check_srk_public,
    ek_public,
    ek_template,
    has_no_da,
    kdfa,
    object_name,
    registration_id_from_ek,
    rsa_modulus,
    sized,
    srk_public,
    srk_template,
    take_sized,
    unwrap,
    wrap,
)
from support.claims import assert_refused, flipped
from support.vectors import load, unbase64, unhex

VECTOR = load("activation")
PUBLISHED = load("published")
EK = unbase64(VECTOR["ek_public_base64"])
SRK = unbase64(VECTOR["srk_public_base64"])
BLOB = unbase64(VECTOR["blob_base64"])
ID_KEY = sized(unhex(VECTOR["id_key_public"]))


def test_the_vector_decodes_step_by_step():
    inputs = VECTOR["inputs"]
    assert sha256(BLOB) == unhex(VECTOR["blob_sha256"])
    activation = parse_activation(BLOB)

    srk_name = object_name(SRK)
    assert srk_name == unhex(VECTOR["srk_name"])
    credential_seed = unhex(inputs["credential_seed"])
    credential_hmac, offset = take_sized(activation.credential, 0, "HMAC")
    encrypted_identity = activation.credential[offset:]
    assert encrypted_identity == unhex(VECTOR["encrypted_identity"])
    hmac_key = kdfa(credential_seed, b"INTEGRITY", b"", b"", 256)
    assert hmac_key == unhex(VECTOR["credential_hmac_key"])
    assert hmac_sha256(hmac_key, encrypted_identity + srk_name) == credential_hmac == unhex(VECTOR["credential_hmac"])
    symmetric_key = kdfa(credential_seed, b"STORAGE", srk_name, b"", 128)
    assert symmetric_key == unhex(VECTOR["credential_symmetric_key"])
    inner_key = unhex(inputs["inner_key"])
    assert aes128_cfb(symmetric_key, encrypted_identity, True) == sized(inner_key)
    assert sha256(activation.credential_secret) == unhex(VECTOR["credential_secret_sha256"])

    assert activation.id_key_public == ID_KEY
    key_name = object_name(activation.id_key_public)
    assert key_name == unhex(VECTOR["id_key_name"])
    duplicate_seed = unhex(inputs["duplicate_seed"])
    duplicate_hmac, offset = take_sized(activation.duplicate, 0, "HMAC")
    ciphertext = activation.duplicate[offset:]
    assert ciphertext == unhex(VECTOR["duplicate_ciphertext"])
    hmac_key = kdfa(duplicate_seed, b"INTEGRITY", b"", b"", 256)
    assert hmac_key == unhex(VECTOR["duplicate_hmac_key"])
    assert hmac_sha256(hmac_key, ciphertext + key_name) == duplicate_hmac == unhex(VECTOR["duplicate_hmac"])
    symmetric_key = kdfa(duplicate_seed, b"STORAGE", key_name, b"", 128)
    assert symmetric_key == unhex(VECTOR["duplicate_symmetric_key"])
    inner_wrapped = aes128_cfb(symmetric_key, ciphertext, True)
    assert inner_wrapped == unhex(VECTOR["inner_wrapped"])
    assert sha256(activation.duplicate_seed) == unhex(VECTOR["duplicate_seed_sha256"])

    unwrapped = aes128_cfb(inner_key, inner_wrapped, True)
    inner_integrity, offset = take_sized(unwrapped, 0, "integrity")
    sensitive = unwrapped[offset:]
    assert sensitive == unhex(VECTOR["sensitive"])
    assert inner_integrity == sha256(sensitive + key_name) == unhex(VECTOR["inner_integrity"])
    assert sensitive[-32:] == unhex(inputs["hmac_key"])
    assert sha256(unhex(inputs["seed_value"]) + sensitive[-32:]) == unhex(VECTOR["unique"])
    assert activation.encrypted_uri == unhex(VECTOR["encrypted_uri"])
    assert aes128_cfb(inner_key, activation.encrypted_uri, True) == inputs["uri"].encode()


def test_the_published_blobs_parse_and_join_again():
    for published in PUBLISHED["activation"]:
        blob = unbase64(published["blob"])
        activation = parse_activation(blob)
        sizes = [len(field) for field in activation]
        sizes[4] -= 2
        assert sizes == published["sizes"], published["source"]
        assert activation.credential[2:34] == unhex(published["credential_hmac"])
        assert activation.credential[34:] == unhex(published["encrypted_identity"])
        assert activation.id_key_public == unhex(published["id_key_public"])
        assert has_no_da(activation.id_key_public)
        assert join_activation(activation) == blob


def test_a_blob_may_end_before_its_uri_or_have_an_empty_one():
    assert parse_activation(BLOB[:764]).encrypted_uri is None
    assert join_activation(parse_activation(BLOB[:764])) == BLOB[:764]
    assert parse_activation(BLOB[:764] + b"\x00\x00").encrypted_uri == b""
    assert join_activation(parse_activation(BLOB[:764] + b"\x00\x00")) == BLOB[:764] + b"\x00\x00"


def test_every_other_length_is_malformed():
    for length in range(len(BLOB)):
        if length != 764:
            assert_malformed(BLOB[:length], f"length={length}")
    assert_malformed(BLOB + b"\x00", "one byte more")


def test_an_empty_field_is_malformed_where_it_cannot_be_empty():
    for field in ("credential", "credential_secret", "duplicate", "duplicate_seed"):
        fields = [b"" if name == field else content for name, content in named_fields(BLOB)]
        assert_malformed(join_activation(Activation(*fields)), f"field={field}")
    assert_malformed(BLOB[:714] + b"\x00\x00" + BLOB[764:], "field=public")
    assert_malformed(sized(sized(bytes(32))) + BLOB[54:], "credential without identity")
    assert_malformed(BLOB[:312] + sized(sized(bytes(32))) + BLOB[456:], "duplicate without key")


def test_a_malformed_blob_says_what_was_expected_what_came_and_where():
    for blob, expected in (
        (b"", "the key that DPS sent: credential: expected 2 size bytes at offset 0, came 0"),
        (BLOB[:60], "the key that DPS sent: credential secret: expected 256 bytes at offset 56, came 4"),
        (BLOB + b"\x00", "the key that DPS sent: expected the end at offset 817, came 1 more bytes"),
    ):
        assert assert_malformed(blob, f"length={len(blob)}").message == expected


def test_a_blob_with_an_unsuitable_key_says_which_field():
    blob = bytearray(BLOB)
    blob[723] |= 0x12  # fixedTPM and fixedParent
    error = assert_refused(lambda: parse_activation(bytes(blob)), AskOperator, "dps.key_unsuitable")
    assert error.message == "the key's attributes: expected 0x40040; came 0x40052"
    assert split_activation(bytes(blob)).credential_secret == parse_activation(BLOB).credential_secret


def test_an_hmac_key_with_an_authorisation_policy_is_tolerated():
    area = unhex("0008000b00040440") + sized(bytes(32)) + unhex("0005000b") + sized(bytes(32))
    check_id_key_public(sized(area))
    assert not has_no_da(sized(unhex("0008000b00040040") + area[8:]))


def test_registration_ids_are_those_that_were_published():
    for published in PUBLISHED["registration_id"]:
        ek = unbase64(published["endorsement_key"])
        check_ek_public(ek)
        assert registration_id_from_ek(ek) == published["registration_id"], published["source"]
    assert sha256(unbase64(PUBLISHED["registration_id"][0]["endorsement_key"])) == unhex(
        PUBLISHED["registration_id"][0]["sha256"]
    )
    check_srk_public(unbase64(PUBLISHED["registration_id"][1]["storage_root_key"]))
    assert registration_id_from_ek(EK) == VECTOR["registration_id"]


def test_names_are_those_of_the_vector():
    assert object_name(EK) == unhex(VECTOR["ek_name"])
    assert object_name(SRK) == unhex(VECTOR["srk_name"])


def test_kdfa_gives_the_vector():
    vector = VECTOR["kdfa"]
    context_u = vector["context_u"].encode()
    key = kdfa(unhex(vector["key"]), vector["label"].encode(), context_u, b"", vector["bits"])
    assert key == unhex(vector["output"])


def test_templates_differ_from_keys_by_their_unique_alone():
    assert EK_TEMPLATES == ("tcg-l1", "azure-c-sdk")
    assert len(ek_template("tcg-l1")) == len(EK) == 316
    assert ek_template("tcg-l1")[:60] == EK[:60]
    assert ek_template("tcg-l1")[60:] == bytes(256)
    assert ek_template("azure-c-sdk")[2:58] == EK[2:58]
    assert ek_template("azure-c-sdk")[58:] == b"\x00\x00"
    assert srk_template()[:28] == SRK[:28]
    assert srk_template()[28:] == bytes(256)
    assert ek_public(rsa_modulus(EK)) == EK
    assert srk_public(rsa_modulus(SRK)) == SRK
    assert_refused(lambda: ek_template("tcg"), AskOperator, "config.invalid")


def test_an_exponent_of_65537_in_full_is_the_same_key():
    check_ek_public(EK[:54] + b"\x00\x01\x00\x01" + EK[58:])
    check_srk_public(SRK[:22] + b"\x00\x01\x00\x01" + SRK[26:])


def test_a_public_area_that_is_no_ek_or_srk_is_named_by_its_field():
    for public, check, code, fields in (
        (EK, check_ek_public, "tpm.ek_unsuitable", EK_FIELDS),
        (SRK, check_srk_public, "tpm.srk_unsuitable", SRK_FIELDS),
    ):
        check(public)
        for offset in range(2, fields[-1][1] + 2):
            altered = public[:offset] + bytes([public[offset] ^ 0x02]) + public[offset + 1 :]
            error = assert_unsuitable(check, altered, code, f"offset={offset}")
            field = [name for name, start in fields if start <= offset][-1]
            assert f"'s {field}: expected " in error.message, f"offset={offset} {error.message}"
        for length in (0, 1, 2, 40, len(public) - 1):
            assert_unsuitable(check, public[:length], code, f"length={length}")
            assert_unsuitable(check, sized(public[2:length]), code, f"length={length}, its size right")
        assert_unsuitable(check, public + b"\x00", code, "one byte more")
        assert_unsuitable(check, public[:-1] + bytes([public[-1] & 0xFE]), code, "even modulus")
        assert_unsuitable(check, public[:-256] + b"\x7f" + public[-255:], code, "2047-bit modulus")
    assert_unsuitable(check_ek_public, SRK, "tpm.ek_unsuitable", "SRK as EK")
    assert_unsuitable(check_srk_public, EK, "tpm.srk_unsuitable", "EK as SRK")


def test_an_unsuitable_ek_says_what_was_expected_and_what_came():
    error = assert_refused(lambda: check_ek_public(SRK), AskOperator, "tpm.ek_unsuitable")
    assert error.message == "the endorsement key's attributes: expected 000300b2; came 00030472"
    error = assert_refused(lambda: check_srk_public(b""), AskOperator, "tpm.srk_unsuitable")
    assert error.message == "the storage root key: expected a TPM2B_PUBLIC; came 0 bytes of another size"


def test_a_wrapped_key_comes_apart_as_it_was_put_together():
    private = sized(bytes(158))
    wrapped_key = wrap(ID_KEY, private)
    assert len(wrapped_key) == 210
    assert unwrap(wrapped_key) == (ID_KEY, private)


def test_a_malformed_wrapped_key_is_stale():
    wrapped_key = wrap(ID_KEY, sized(bytes(158)))
    for length in range(len(wrapped_key)):
        assert_stale(wrapped_key[:length], f"length={length}")
    assert_stale(wrapped_key + b"\x00", "one byte more")
    for bit in range(8 * 18):
        altered = flipped(wrapped_key, bit)
        if altered[6:10] not in TOLERATED_ATTRIBUTES:  # well-formed; a TPM refuses those by the key's name
            assert_stale(altered, f"bit={bit}")


def test_a_size_over_16_bits_is_refused():
    assert len(sized(bytes(65535))) == 65537
    try:
        sized(bytes(65536))
    except ValueError:
        return
    raise AssertionError("65536 bytes were taken")


# That of the vector (0x40440) with noDA, encryptedDuplication, adminWithPolicy or sensitiveDataOrigin changed.
TOLERATED_ATTRIBUTES = (b"\x00\x04\x00\x40", b"\x00\x04\x0c\x40", b"\x00\x04\x04\xc0", b"\x00\x04\x04\x60")
EK_FIELDS = (
    ("type", 2),
    ("nameAlg", 4),
    ("attributes", 6),
    ("authPolicy", 10),
    ("symmetric", 44),
    ("scheme", 50),
    ("keyBits", 52),
    ("exponent", 54),
    ("modulus", 58),
)
SRK_FIELDS = EK_FIELDS[:4] + tuple([(name, offset - 32) for name, offset in EK_FIELDS[4:]])


def named_fields(blob):
    names = ("credential", "credential_secret", "duplicate", "duplicate_seed", "id_key_public", "encrypted_uri")
    return list(zip(names, parse_activation(blob)))


def assert_malformed(blob, reproduce):
    return assert_refused(lambda: parse_activation(blob), RetryLater, "dps.blob_malformed", reproduce)


def assert_unsuitable(check, public, code, reproduce):
    return assert_refused(lambda: check(public), AskOperator, code, reproduce)


def assert_stale(wrapped_key, reproduce):
    return assert_refused(lambda: unwrap(wrapped_key), IdentityStale, "tpm.key_stale", reproduce)
