"""Activation blobs made by the device for itself."""

from dps_hal.platform import sha256
from dps_hal.tpm.activation import parse_activation
from dps_hal.tpm.keys import ID_KEY_ATTRIBUTES, oaep_encrypt
from dps_hal.tpm.self_challenge import make_activation
from support.vectors import load, unbase64, unhex

VECTOR = load("activation")
EK = unbase64(VECTOR["ek_public_base64"])
SRK = unbase64(VECTOR["srk_public_base64"])
SEEDS = ("inner_key", "credential_seed", "duplicate_seed", "seed_value", "ek_oaep_seed", "srk_oaep_seed")


class FixedRandom:
    """Answers with the vector's seeds in their order, each once."""

    def __init__(self):
        self.seeds = [unhex(VECTOR["inputs"][name]) for name in SEEDS]

    def __call__(self, count):
        seed = self.seeds.pop(0)
        assert len(seed) == count
        return seed


def test_with_the_seeds_of_the_vector_the_blob_is_the_vector():
    random = FixedRandom()
    uri = VECTOR["inputs"]["uri"].encode()
    blob = make_activation(EK, SRK, unhex(VECTOR["inputs"]["hmac_key"]), uri=uri, random=random)
    assert blob == unbase64(VECTOR["blob_base64"])
    assert sha256(blob) == unhex(VECTOR["blob_sha256"])
    assert not random.seeds


def test_no_two_blobs_for_one_key_share_a_secret_field():
    first, second = (
        parse_activation(make_activation(EK, SRK, bytes(32))),
        parse_activation(make_activation(EK, SRK, bytes(32))),
    )
    for index in range(len(first)):
        assert first[index] != second[index], f"field={index}"


def test_key_length_attributes_and_uri_are_as_asked_for():
    for length in (0, 1, 20, 32, 64, 65, 200):
        activation = parse_activation(make_activation(EK, SRK, bytes(length)))
        assert len(activation.duplicate) == 110 + length, f"key length={length}"
    public = parse_activation(make_activation(EK, SRK, b"k", attributes=0x40040)).id_key_public
    assert public[6:10] == b"\x00\x04\x00\x40"
    assert ID_KEY_ATTRIBUTES == 0x40440
    assert parse_activation(make_activation(EK, SRK, b"k", uri=b"")).encrypted_uri == b""


def test_oaep_takes_what_fits_and_refuses_more():
    assert len(oaep_encrypt(EK, bytes(190), b"IDENTITY\x00", bytes(32))) == 256
    try:
        oaep_encrypt(EK, bytes(191), b"IDENTITY\x00", bytes(32))
    except ValueError as error:
        assert str(error) == "OAEP with RSA-2048 takes at most 190 bytes, not 191"
        return
    raise AssertionError("191 bytes were taken")
