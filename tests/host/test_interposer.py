"""Somebody on the TPM's bus who answers ReadPublic with keys of his own: no secret, no registration for him."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from contracts.tpm import KEY, blob_for
from dps_hal.contracts import EK_HANDLE, SRK_HANDLE, TpmService
from dps_hal.errors import AskOperator, DpsError, RetryLater
from dps_hal.platform import hmac_sha256
from dps_hal.tpm.keys import RSA_BYTES, check_ek_public, ek_public, object_name, sized, srk_public
from dps_hal.tpm.self_challenge import make_activation
from support.claims import assert_refused
from support.tapped_device import Device
from support.tpm import swtpm
from support.tpm.backends import BACK_ENDS, OpenTpm
from support.tpm.swtpm import Swtpm
from support.tpm.tap import TpmTap

MESSAGE = b"message"
NULL = struct.pack(">I", 0x40000007)
READ_PUBLIC = struct.pack(">I", 0x173)
WITH_SECRETS = {"ActivateCredential", "Import", "Load", "HMAC"}


@pytest.fixture
def tpm(tap: TpmTap, open_tpm: OpenTpm) -> Iterator[TpmService]:
    """A TPM whose true keys were there before anybody stood on the bus."""
    new = open_tpm(tap.tcti)
    new.storage_root_key()
    new.release()
    yield new
    new.release()


def own_modulus() -> bytes:
    numbers = rsa.generate_private_key(public_exponent=65537, key_size=2048).public_key().public_numbers()
    return numbers.n.to_bytes(RSA_BYTES, "big")


def own_ecc_key() -> bytes:
    """An ECC storage key, to which ESAPI would encrypt a salt as well."""
    point = ec.generate_private_key(ec.SECP256R1()).public_key().public_numbers()
    area = bytes.fromhex("0023 000b 00030472 0000 0006 0080 0043 0010 0003 0010")
    return sized(area + sized(point.x.to_bytes(32, "big")) + sized(point.y.to_bytes(32, "big")))


def without_fixed_tpm(public: bytes) -> bytes:
    return public[:9] + bytes([public[9] ^ 0x02]) + public[10:]


def with_own_policy(public: bytes) -> bytes:
    return sized(public[2:10] + sized(bytes(32)) + public[12:])


def shows(tap: TpmTap, handle: int, *publics: bytes) -> None:
    """Makes ReadPublic of `handle` answer each of `publics` in turn, the last one for ever, with their names."""
    left = list(publics)

    def change(command: bytes, response: bytes) -> bytes:
        asked = command[6:14] == READ_PUBLIC + struct.pack(">I", handle)
        plain = command[:2] == b"\x80\x01"  # in a session nobody can answer without its key
        if not (asked and plain):
            return response
        public = left.pop(0) if len(left) > 1 else left[0]
        answer = public + 2 * sized(object_name(public))
        return struct.pack(">HII", 0x8001, 10 + len(answer), 0) + answer

    tap.change = change


def nobody_on(tap: TpmTap) -> None:
    tap.change = lambda command, response: response
    tap.redirect = lambda command: command


def test_an_exact_srk_of_his_is_refused_before_anything_is_registered(
    machine: Swtpm, tap: TpmTap, tpm: TpmService
) -> None:
    activation = blob_for(tpm)
    wrapped_key = tpm.import_key(activation)
    tpm.release()
    false_srk = srk_public(own_modulus())
    shows(tap, SRK_HANDLE, false_srk)
    for_it = make_activation(tpm.endorsement_key(), false_srk, KEY)
    tap.forget()
    operations: list[Callable[[], object]] = [
        tpm.storage_root_key,
        lambda: tpm.import_key(activation),
        lambda: tpm.import_key(for_it),
        lambda: tpm.sign(wrapped_key, MESSAGE),
        lambda: tpm.persist(wrapped_key, 0x81000100),
    ]
    for number, operation in enumerate(operations):
        assert_refused(operation, RetryLater, "tpm.bus_altered", f"operation={number}")
    assert not WITH_SECRETS & set(tap.names), tap.names
    nobody_on(tap)
    tpm.release()
    assert machine.leftovers() == []


@pytest.mark.parametrize("altered", [without_fixed_tpm, with_own_policy], ids=["attributes", "policy"])
def test_another_srk_of_his_changes_neither_srk_nor_identity(
    altered: Callable[[bytes], bytes], machine: Swtpm, tap: TpmTap, tpm: TpmService
) -> None:
    srk = tpm.storage_root_key()
    wrapped_key = tpm.import_key(blob_for(tpm))
    tpm.release()
    shows(tap, SRK_HANDLE, altered(srk_public(own_modulus())))
    assert tpm.storage_root_key() == srk
    assert tpm.sign(wrapped_key, MESSAGE) == hmac_sha256(KEY, MESSAGE)
    tpm.release()
    assert machine.leftovers() == []
    assert machine.handles(swtpm.PERSISTENT) == [SRK_HANDLE, SRK_HANDLE + 1, EK_HANDLE]


def test_an_external_key_of_his_shown_as_an_srk_is_refused(machine: Swtpm, tap: TpmTap, tpm: TpmService) -> None:
    wrapped_key = tpm.import_key(blob_for(tpm))
    tpm.release()
    shown = srk_public(own_modulus())
    attributes = struct.pack(">I", 0x00030440)  # userWithAuth, noDA, restricted, decrypt: what LoadExternal takes
    handle = machine.command(0x167, b"\x00\x00" + shown[:6] + attributes + shown[10:] + NULL)[:4]
    shows(tap, SRK_HANDLE, shown)
    tap.redirect = lambda command: command[:10] + command[10:].replace(struct.pack(">I", SRK_HANDLE), handle, 1)
    assert_refused(tpm.storage_root_key, RetryLater, "tpm.bus_altered")
    assert_refused(lambda: tpm.sign(wrapped_key, MESSAGE), RetryLater, "tpm.bus_altered")
    nobody_on(tap)


def test_an_ek_of_his_is_never_salted_to_after_the_true_one_was_seen(
    machine: Swtpm, tap: TpmTap, tpm: TpmService
) -> None:
    wrapped_key = tpm.import_key(blob_for(tpm))
    tpm.release()
    shows(tap, EK_HANDLE, ek_public(own_modulus()))
    tap.forget()
    operations: list[Callable[[], object]] = [
        tpm.endorsement_key,
        tpm.storage_root_key,
        lambda: tpm.sign(wrapped_key, MESSAGE),
    ]
    for number, operation in enumerate(operations):
        assert_refused(operation, AskOperator, "tpm.ek_changed", f"operation={number}")
    shows(tap, EK_HANDLE, without_fixed_tpm(ek_public(own_modulus())))
    assert_refused(tpm.endorsement_key, AskOperator, "tpm.ek_unsuitable")
    assert "StartAuthSession" not in tap.names


def test_an_ek_that_he_shows_without_holding_it_gets_no_session(machine: Swtpm, tap: TpmTap, open_tpm: OpenTpm) -> None:
    before = open_tpm(machine.tcti)
    before.endorsement_key()
    before.release()
    shows(tap, EK_HANDLE, ek_public(own_modulus()))
    tpm = open_tpm(tap.tcti)  # which has never seen the true one
    check_ek_public(tpm.endorsement_key())  # it is for DPS and for the record to know better
    tap.forget()
    assert_refused(tpm.storage_root_key, RetryLater, "tpm.bus_altered")
    assert not WITH_SECRETS & set(tap.names), tap.names
    nobody_on(tap)
    tpm.release()


@pytest.mark.parametrize("handle", [EK_HANDLE, SRK_HANDLE], ids=hex)
@pytest.mark.parametrize("kind", ["rsa", "ecc"])
def test_two_answers_to_the_same_question_do_not_slip_a_key_of_his_in(
    kind: str, handle: int, machine: Swtpm, tap: TpmTap, tpm: TpmService
) -> None:
    ek, srk = tpm.endorsement_key(), tpm.storage_root_key()
    wrapped_key = tpm.import_key(blob_for(tpm))
    tpm.release()
    true, false = (ek, ek_public(own_modulus())) if handle == EK_HANDLE else (srk, srk_public(own_modulus()))
    if kind == "ecc":
        false = own_ecc_key()
    tap.forget()
    shows(tap, handle, false, true)
    try:
        assert tpm.sign(wrapped_key, MESSAGE) == hmac_sha256(KEY, MESSAGE)
    except DpsError as error:
        assert error.code in ("tpm.bus_altered", "tpm.ek_changed", "tpm.ek_unsuitable"), error.code
    refused = [exchange.name for exchange in tap.exchanges if exchange.return_code]
    assert "StartAuthSession" not in refused, "a salt was encrypted to his key"
    nobody_on(tap)
    tpm.release()
    assert tpm.sign(wrapped_key, MESSAGE) == hmac_sha256(KEY, MESSAGE)
    tpm.release()
    assert machine.leftovers() == []


def test_a_public_area_that_does_not_fit_its_name_is_refused(tap: TpmTap, tpm: TpmService) -> None:
    tpm.endorsement_key()
    tpm.release()
    false_ek = ek_public(own_modulus())
    tap.change = lambda command, response: (
        response[:10] + false_ek + response[10 + len(false_ek) :] if command[6:10] == READ_PUBLIC else response
    )
    with pytest.raises(DpsError) as raised:
        tpm.endorsement_key()
    assert raised.value.code in ("tpm.bus_altered", "tpm.ek_changed")  # tpm2-tss names keys itself


@pytest.mark.parametrize("back_end", BACK_ENDS)
@pytest.mark.parametrize(
    ("handle", "public"),
    [
        (SRK_HANDLE, srk_public(own_modulus())),
        (EK_HANDLE, ek_public(own_modulus())),
        (EK_HANDLE, without_fixed_tpm(ek_public(own_modulus()))),
        (EK_HANDLE, with_own_policy(srk_public(own_modulus()))),
    ],
    ids=["exact-srk", "exact-ek", "ek-attributes", "ek-policy"],
)
def test_a_provisioned_device_asks_the_service_for_nothing_in_his_presence(
    handle: int, public: bytes, back_end: str, tmp_path: Path
) -> None:
    with Device(tmp_path, back_end) as device:
        device.provision()
        kept, asked = device.stored(), len(device.emulator.log)
        shows(device.tap, handle, public)
        with pytest.raises(DpsError) as raised:
            device.provision(force=False, timeout_s=20)
        assert raised.value.code in ("tpm.bus_altered", "tpm.ek_changed", "tpm.ek_unsuitable")
        assert len(device.emulator.log) == asked, device.emulator.log[asked:]
        assert device.stored() == kept
        nobody_on(device.tap)
        assert device.provision(force=False).already_provisioned
        assert device.swtpm.leftovers() == []
