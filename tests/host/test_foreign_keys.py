"""TPMs that somebody else uses too: keys of others, a full memory, an owner who keeps his password."""

from __future__ import annotations

from pathlib import Path

import pytest

from contracts.tpm import KEY, blob_for
from dps_hal.contracts import EK_HANDLE, SRK_HANDLE, TpmService
from dps_hal.errors import AskOperator, DpsError
from dps_hal.platform import hmac_sha256
from dps_hal.tpm.keys import srk_template
from support.claims import assert_refused
from support.tapped_device import Device
from support.tpm import swtpm
from support.tpm.backends import BACK_ENDS, OpenTpm
from support.tpm.swtpm import Swtpm

# TPM2B_PUBLIC: systemd's storage key, ECC on P-256, and a key that signs with RSASSA and SHA-256.
ECC_STORAGE = bytes.fromhex("001a 0023 000b 00030472 0000 0006 0080 0043 0010 0003 0010 0000 0000")
RSA_SIGNING = bytes.fromhex("0018 0001 000b 00040472 0000 0010 0014 000b 0800 00000000 0000")
FOREIGN = {"ecc": ECC_STORAGE, "rsa-signing": RSA_SIGNING}


def signs(tpm: TpmService) -> None:
    """A registration's work with the TPM succeeds, twice from a new start."""
    for _ in range(2):
        assert tpm.sign(tpm.import_key(blob_for(tpm)), bytes(2000)) == hmac_sha256(KEY, bytes(2000))
        tpm.release()


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_key_of_others_at_the_srk_handle_stays_and_ours_goes_to_the_next(
    kind: str, machine: Swtpm, open_tpm: OpenTpm
) -> None:
    machine.persist_primary(swtpm.OWNER, FOREIGN[kind], SRK_HANDLE)
    machine.persist_primary(swtpm.OWNER, FOREIGN[kind], SRK_HANDLE + 1)
    before = machine.public_areas()
    signs(open_tpm(machine.tcti))
    signs(open_tpm(machine.tcti))
    after = machine.public_areas()
    assert sorted(after) == [SRK_HANDLE, SRK_HANDLE + 1, SRK_HANDLE + 2, EK_HANDLE]
    assert {handle: after[handle] for handle in before} == before
    assert machine.leftovers() == []


@pytest.mark.parametrize("kind", [*FOREIGN, "srk"])
def test_a_key_of_others_at_the_ek_handle_stays_and_the_operator_is_asked(
    kind: str, machine: Swtpm, open_tpm: OpenTpm
) -> None:
    machine.persist_primary(swtpm.OWNER, FOREIGN.get(kind, srk_template()), EK_HANDLE)
    before = machine.public_areas()
    tpm = open_tpm(machine.tcti)
    for operation in (tpm.endorsement_key, tpm.storage_root_key):
        assert_refused(operation, AskOperator, "tpm.ek_unsuitable")
    tpm.release()
    assert machine.public_areas() == before
    assert machine.leftovers() == []


def test_keys_of_others_at_persist_at_stay(machine: Swtpm, open_tpm: OpenTpm) -> None:
    machine.persist_primary(swtpm.OWNER, RSA_SIGNING, 0x81000100)
    tpm = open_tpm(machine.tcti)
    wrapped_key = tpm.import_key(blob_for(tpm))
    tpm.release()
    before = machine.public_areas()
    for handle in (0x81000100, SRK_HANDLE):
        assert_refused(lambda handle=handle: tpm.persist(wrapped_key, handle), AskOperator, "tpm.handle_taken")
    tpm.release()
    assert machine.public_areas() == before
    assert machine.leftovers() == []


def test_without_room_for_the_srk_a_transient_one_serves(machine: Swtpm, open_tpm: OpenTpm) -> None:
    first = open_tpm(machine.tcti)
    first.endorsement_key()
    first.release()
    machine.fill_nv(ECC_STORAGE)
    before = machine.public_areas()
    tpm = open_tpm(machine.tcti)
    srk = tpm.storage_root_key()
    wrapped_key = tpm.import_key(blob_for(tpm))
    tpm.release()
    signs(tpm)
    again = open_tpm(machine.tcti)
    assert again.storage_root_key() == srk
    assert again.sign(wrapped_key, b"message") == hmac_sha256(KEY, b"message")
    error = assert_refused(lambda: again.persist(wrapped_key, 0x81000100), AskOperator, "tpm.nv_full")
    assert "0x14b" in error.message
    again.release()
    assert machine.public_areas() == before
    assert machine.leftovers() == []


def test_without_room_for_the_ek_the_operator_is_asked(machine: Swtpm, open_tpm: OpenTpm) -> None:
    machine.fill_nv(ECC_STORAGE)
    before = machine.public_areas()
    tpm = open_tpm(machine.tcti)
    for operation in (tpm.endorsement_key, tpm.storage_root_key):
        assert_refused(operation, AskOperator, "tpm.nv_full")
    tpm.release()
    assert machine.public_areas() == before
    assert machine.leftovers() == []


def test_an_unknown_password_of_the_owner_is_named_as_the_setting_that_lacks_it(
    machine: Swtpm, open_tpm: OpenTpm
) -> None:
    machine.set_hierarchy_auth(swtpm.OWNER, b"unknown")
    for auth in (b"", b"wrong"):
        tpm = open_tpm(machine.tcti, owner_auth=auth)
        for operation in (tpm.endorsement_key, tpm.storage_root_key):
            error = assert_refused(operation, AskOperator, "tpm.hierarchy_auth", f"auth={auth!r}")
            assert "owner_auth_file" in error.message and "endorsement" not in error.message, error.message
        tpm.release()
    assert machine.public_areas() == {}
    assert machine.leftovers() == []


def test_an_unknown_password_of_the_endorsement_is_named_as_the_setting_that_lacks_it(
    machine: Swtpm, open_tpm: OpenTpm
) -> None:
    before = open_tpm(machine.tcti)
    activation = blob_for(before)
    before.release()
    machine.set_hierarchy_auth(swtpm.ENDORSEMENT, b"unknown")
    tpm = open_tpm(machine.tcti)
    with pytest.raises(DpsError) as raised:
        tpm.import_key(activation)
    tpm.release()
    assert raised.value.code == "tpm.hierarchy_auth"
    assert "endorsement_auth_file" in raised.value.message and "owner" not in raised.value.message
    assert machine.leftovers() == []


def test_an_unknown_password_of_the_owner_is_not_needed_where_ek_and_srk_are_there(
    machine: Swtpm, open_tpm: OpenTpm
) -> None:
    before = open_tpm(machine.tcti)
    before.storage_root_key()
    before.release()
    machine.set_hierarchy_auth(swtpm.OWNER, b"unknown")
    keys = machine.public_areas()
    signs(open_tpm(machine.tcti))
    assert machine.public_areas() == keys


def test_a_storage_key_with_a_password_of_its_own_is_named(machine: Swtpm, open_tpm: OpenTpm) -> None:
    machine.persist_primary(swtpm.OWNER, srk_template(), SRK_HANDLE, auth=b"theirs")
    before = machine.public_areas()
    tpm = open_tpm(machine.tcti)
    activation = blob_for(tpm)
    error = assert_refused(lambda: tpm.import_key(activation), AskOperator, "tpm.srk_unsuitable")
    assert "the key at srk_handle has a password of its own: set another srk_handle" in error.message
    tpm.release()
    assert machine.public_areas() == {**before, EK_HANDLE: machine.public_areas()[EK_HANDLE]}
    assert machine.leftovers() == []
    signs(open_tpm(machine.tcti, srk_handle=SRK_HANDLE + 8))


def device_with_passwords(folder: Path, back_end: str) -> Device:
    """A provisioned device whose hierarchies have passwords, which its settings name."""
    device = Device(folder, back_end)
    for name, hierarchy in (("owner", swtpm.OWNER), ("endorsement", swtpm.ENDORSEMENT)):
        password = folder / name
        password.touch(0o600)
        password.write_bytes(name.encode())
        device.swtpm.set_hierarchy_auth(hierarchy, name.encode())
        device.settings.write_text(device.settings.read_text() + f'{name}_auth_file = "{password}"\n')
    assert device.provision().warnings == ()
    return device


@pytest.mark.parametrize("back_end", BACK_ENDS)
def test_a_cleared_tpm_registers_again_by_itself_though_the_settings_have_passwords(
    back_end: str, tmp_path: Path
) -> None:
    with device_with_passwords(tmp_path, back_end) as device:
        before = device.stored()
        device.swtpm.clear()
        device.tap.forget()
        again = device.provision(force=False)
        assert not again.already_provisioned and device.stored() != before
        assert [warning.split()[0] for warning in again.warnings] == ["owner_auth_file", "endorsement_auth_file"]
        assert not device.tap.seen(b"owner") and not device.tap.seen(b"endorsement")
        assert device.tap.names.count("CreatePrimary") <= 4  # for each key, and one to salt to before they are known
        device.tap.forget()
        device.provision(force=False)
        assert "PolicySecret" not in device.tap.names and "GetCapability" not in device.tap.names
        # The owner gives one password again, then another than that of the settings.
        device.swtpm.set_hierarchy_auth(swtpm.ENDORSEMENT, b"endorsement")
        assert device.provision().warnings == ()
        device.swtpm.clear()
        device.swtpm.set_hierarchy_auth(swtpm.ENDORSEMENT, b"another")
        error = assert_refused(device.provision, AskOperator, "tpm.hierarchy_auth")
        assert "the endorsement hierarchy has a password, which is not in endorsement_auth_file" in error.message
        assert device.swtpm.leftovers() == []
        assert device.swtpm.property(swtpm.LOCKOUT_COUNTER) == 0


def test_a_password_that_came_back_is_used_again_in_the_same_process(machine: Swtpm, open_tpm: OpenTpm) -> None:
    tpm = open_tpm(machine.tcti, owner_auth=b"o", endorsement_auth=b"e")
    tpm.import_key(blob_for(tpm))
    assert set(tpm.unneeded_passwords) == {"owner_auth_file", "endorsement_auth_file"}
    tpm.release()
    machine.set_hierarchy_auth(swtpm.ENDORSEMENT, b"e")
    tpm.import_key(blob_for(tpm))
    tpm.release()
    assert machine.leftovers() == []


@pytest.mark.parametrize("back_end", BACK_ENDS)
def test_a_registration_with_a_transient_srk_says_so_once(back_end: str, tmp_path: Path) -> None:
    with Device(tmp_path, back_end) as device:
        tpm = BACK_ENDS[back_end](device.tap.tcti)
        tpm.endorsement_key()
        tpm.release()
        device.tap.refuse(0x14B, command="EvictControl", times=1000)
        for force in (True, False):
            warnings = device.provision(force=force).warnings
            assert [warning for warning in warnings if "no room" in warning] == list(warnings), warnings
            assert len(warnings) == 1, f"force={force}"
        device.tap.forget()
        assert device.provision().warnings == ()
        assert device.swtpm.leftovers() == []
