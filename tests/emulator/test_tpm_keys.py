"""The emulator's activation blobs and key checks against published and computed vectors."""

import base64
import hashlib

import pytest

from dps_emulator.tpm_keys import (
    ActivationSecrets,
    UnsuitableKeyError,
    activation_blob,
    aes_cfb_encrypt,
    id_key_public,
    kdfa,
    object_name,
    parse_endorsement_key,
    parse_storage_root_key,
    tpm2b,
    wrap,
)
from emulator.device_side import Device, take, vector

VECTOR = vector("activation")
INPUTS = {name: bytes.fromhex(text) for name, text in VECTOR["inputs"].items() if name != "uri"}
DEVICE = Device.of_the_vectors()
EK = parse_endorsement_key(DEVICE.ek_public)
SRK = parse_storage_root_key(DEVICE.srk_public)
SECRETS = ActivationSecrets(
    INPUTS["inner_key"],
    INPUTS["credential_seed"],
    INPUTS["duplicate_seed"],
    INPUTS["seed_value"],
)


def test_kdfa_gives_the_vector() -> None:
    given = VECTOR["kdfa"]
    out = kdfa(bytes.fromhex(given["key"]), given["label"].encode(), given["context_u"].encode(), b"", given["bits"])
    assert out.hex() == given["output"]


def test_each_intermediate_value_is_the_vectors() -> None:
    public = id_key_public(INPUTS["hmac_key"], SECRETS.seed_value, no_da=True)
    name = object_name(public)
    sensitive = bytes.fromhex(VECTOR["sensitive"])
    integrity = hashlib.sha256(sensitive + name).digest()
    inner = aes_cfb_encrypt(SECRETS.inner_key, tpm2b(integrity) + sensitive)
    identity, identity_hmac = wrap(SECRETS.credential_seed, SRK.name, tpm2b(SECRETS.inner_key))
    duplicate, outer_hmac = wrap(SECRETS.duplication_seed, name, inner)
    found = {
        "ek_name": EK.name,
        "srk_name": SRK.name,
        "credential_symmetric_key": kdfa(SECRETS.credential_seed, b"STORAGE", SRK.name, b"", 128),
        "encrypted_identity": identity,
        "credential_hmac_key": kdfa(SECRETS.credential_seed, b"INTEGRITY", b"", b"", 256),
        "credential_hmac": identity_hmac,
        "id_key_public": public,
        "id_key_name": name,
        "inner_integrity": integrity,
        "inner_wrapped": inner,
        "duplicate_symmetric_key": kdfa(SECRETS.duplication_seed, b"STORAGE", name, b"", 128),
        "duplicate_ciphertext": duplicate,
        "duplicate_hmac_key": kdfa(SECRETS.duplication_seed, b"INTEGRITY", b"", b"", 256),
        "duplicate_hmac": outer_hmac,
        "encrypted_uri": aes_cfb_encrypt(SECRETS.inner_key, VECTOR["inputs"]["uri"].encode()),
    }
    assert {name: value.hex() for name, value in found.items()} == {name: VECTOR[name] for name in found}


def test_real_published_keys_fit_the_templates() -> None:
    for published in vector("published")["registration_id"]:
        parse_endorsement_key(base64.b64decode(published["endorsement_key"]))
        if "storage_root_key" in published:
            parse_storage_root_key(base64.b64decode(published["storage_root_key"]))


def changed(content: bytes, at: int, to: bytes) -> bytes:
    return content[:at] + to + content[at + len(to) :]


WRONG_EKS = {
    "expected a TPM2B_PUBLIC with its size prefix": DEVICE.ek_public[2:],
    "type is 0x0008": changed(DEVICE.ek_public, 2, b"\0\x08"),
    "nameAlg is 0x000c": changed(DEVICE.ek_public, 4, b"\0\x0c"),
    "objectAttributes is 0x000300b0, expected 0x000300b2": changed(DEVICE.ek_public, 9, b"\xb0"),
    "objectAttributes is 0x000700b2": changed(DEVICE.ek_public, 7, b"\x07"),
    "authPolicy is '93": changed(DEVICE.ek_public, 12, b"\x93"),
    "symmetric key bits is 0x0100": changed(DEVICE.ek_public, 46, b"\1\0"),
    "symmetric mode is 0x0042": changed(DEVICE.ek_public, 48, b"\0\x42"),
    "scheme is 0x0014": changed(DEVICE.ek_public, 50, b"\0\x14"),
    "keyBits is 0x0c00": changed(DEVICE.ek_public, 52, b"\x0c\0"),
    "exponent is 3": changed(DEVICE.ek_public, 54, b"\0\0\0\3"),
    "unique is no 2048-bit RSA modulus": changed(DEVICE.ek_public, 60, bytes(256)),
    "ends within unique": b"\1\x39" + DEVICE.ek_public[2:-1],
    "1 bytes follow the public area": b"\1\x3b" + DEVICE.ek_public[2:] + b"\0",
    "ends within its size": b"\1",
    "ends within type": b"\0\0",
}


@pytest.mark.parametrize("message", WRONG_EKS)
def test_an_ek_off_its_template_is_refused_by_the_field(message: str) -> None:
    with pytest.raises(UnsuitableKeyError) as caught:
        parse_endorsement_key(WRONG_EKS[message])
    assert message in str(caught.value)


def test_an_ek_is_no_srk_and_an_srk_no_ek() -> None:
    with pytest.raises(UnsuitableKeyError, match="objectAttributes is 0x00030472"):
        parse_endorsement_key(DEVICE.srk_public)
    with pytest.raises(UnsuitableKeyError, match="objectAttributes is 0x000300b2"):
        parse_storage_root_key(DEVICE.ek_public)


@pytest.mark.parametrize(("no_da", "attributes"), [(True, 0x40440), (False, 0x40040)])
@pytest.mark.parametrize("size", [1, 32, 64, 65])
def test_a_blob_opens_on_its_device_alone(no_da: bool, attributes: int, size: int) -> None:
    key = bytes(range(size))
    blob = activation_blob(EK, SRK, key, SECRETS, b"somewhere", no_da=no_da)
    opened = DEVICE.activate(base64.b64encode(blob).decode())
    assert (opened.key, opened.attributes, opened.uri) == (key, attributes, "somewhere")


def test_of_a_blob_nothing_but_its_two_encrypted_seeds_is_another_each_time() -> None:
    fields: list[list[bytes]] = []
    for _ in range(2):
        rest, taken = activation_blob(EK, SRK, bytes(32), SECRETS, b"somewhere"), []
        while rest:
            field, rest = take(rest)
            taken.append(field)
        fields.append(taken)
    assert [one == other for one, other in zip(*fields, strict=True)] == [True, False, True, False, True, True]


def test_secrets_are_not_in_the_repr() -> None:
    assert repr(SECRETS) == "ActivationSecrets(...)"
