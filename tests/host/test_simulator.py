"""The simulated TPM: the contract of every Tpm, and what is its own (a folder of keys)."""

from __future__ import annotations

import builtins
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from contracts.tpm import CLAIMS, KEY, badly_built_blob, blob_for
from dps_hal.errors import AskOperator, Broken, DpsError, IdentityStale
from dps_hal.host.simulator import SimulatedTpm
from dps_hal.platform import hmac_sha256
from dps_hal.tpm.keys import check_ek_public, object_name, registration_id_from_ek, unwrap
from dps_hal.tpm.self_challenge import make_activation
from support.claims import assert_refused
from support.tpm.states import copy_state
from support.vectors import load, unbase64, unhex

VECTOR = load("activation")


@pytest.fixture
def tpm(tmp_path: Path) -> SimulatedTpm:
    return SimulatedTpm(copy_state("press-07", tmp_path / "press-07"))


@pytest.fixture
def other_tpm(tmp_path: Path) -> SimulatedTpm:
    return SimulatedTpm(copy_state("press-08", tmp_path / "press-08"))


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.__name__)
def test_the_simulator_keeps_the_contract(claim: Any, tpm: SimulatedTpm, other_tpm: SimulatedTpm) -> None:
    claim(tpm, other_tpm)


def test_the_vector_is_taken_by_the_tpm_that_it_was_made_for(tmp_path: Path, tpm: SimulatedTpm) -> None:
    its_tpm = SimulatedTpm(copy_state("vector", tmp_path / "vector"))
    assert its_tpm.endorsement_key() == unbase64(VECTOR["ek_public_base64"])
    assert its_tpm.storage_root_key() == unbase64(VECTOR["srk_public_base64"])
    assert object_name(its_tpm.storage_root_key()) == unhex(VECTOR["srk_name"])
    blob = unbase64(VECTOR["blob_base64"])
    assert its_tpm.sign(its_tpm.import_key(blob), b"message") == hmac_sha256(bytes(range(32)), b"message")
    assert_refused(lambda: tpm.import_key(blob), IdentityStale, "tpm.blob_refused")


def test_a_wrapped_key_outlives_the_process(tmp_path: Path, tpm: SimulatedTpm) -> None:
    wrapped_key = tpm.import_key(blob_for(tpm))
    assert SimulatedTpm(str(tmp_path / "press-07")).sign(wrapped_key, b"m") == hmac_sha256(KEY, b"m")


def test_a_new_folder_gets_new_keys_once_that_only_their_owner_can_read(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "tpm"
    tpm = SimulatedTpm(str(folder))
    assert not folder.exists()
    ek, srk = tpm.endorsement_key(), tpm.storage_root_key()
    check_ek_public(ek)
    again = SimulatedTpm(str(folder))
    assert (again.endorsement_key(), again.storage_root_key()) == (ek, srk)
    tpm.persist(tpm.import_key(blob_for(tpm)), 0x81000100)
    assert sorted(os.listdir(folder)) == ["ek-tcg-l1.pem", "persistent-81000100.key", "srk.pem"]
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    for file in folder.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600, file.name


def test_each_ek_template_has_its_own_ek_and_they_share_the_srk(tmp_path: Path, tpm: SimulatedTpm) -> None:
    azure = SimulatedTpm(str(tmp_path / "press-07"), ek_template="azure-c-sdk")
    assert azure.endorsement_key() != tpm.endorsement_key()
    assert azure.storage_root_key() == tpm.storage_root_key()
    assert azure.sign(azure.import_key(blob_for(azure)), b"m") == hmac_sha256(KEY, b"m")
    assert_refused(lambda: tpm.import_key(blob_for(azure)), IdentityStale, "tpm.blob_refused")
    assert_refused(lambda: SimulatedTpm(str(tmp_path), ek_template="tcg"), AskOperator, "config.invalid")


def test_two_processes_that_meet_an_empty_folder_agree_on_its_keys(tmp_path: Path) -> None:
    program = "import sys; from dps_hal.host.simulator import SimulatedTpm as T; t = T(sys.argv[1]);"
    program += "print(t.endorsement_key().hex(), t.storage_root_key().hex())"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", program, str(tmp_path / "tpm")]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) for _ in range(2)]
    first, second = [process.communicate(timeout=60)[0] for process in both]
    assert first == second != ""
    assert sorted(os.listdir(tmp_path / "tpm")) == ["ek-tcg-l1.pem", "srk.pem"]


def test_clear_changes_the_srk_and_makes_keys_stale_but_keeps_the_ek(tpm: SimulatedTpm) -> None:
    ek, srk = tpm.endorsement_key(), tpm.storage_root_key()
    wrapped_key = tpm.import_key(blob_for(tpm))
    tpm.persist(wrapped_key, 0x81000100)
    tpm.clear()
    assert_refused(lambda: tpm.sign(wrapped_key, b"m"), IdentityStale, "tpm.key_stale")
    assert tpm.endorsement_key() == ek
    assert tpm.storage_root_key() != srk
    blob_of_before = make_activation(ek, srk, KEY)
    assert_refused(lambda: tpm.import_key(blob_of_before), IdentityStale, "tpm.blob_refused")
    assert tpm.sign(tpm.import_key(blob_for(tpm)), b"m") == hmac_sha256(KEY, b"m")


def test_clear_of_a_tpm_that_was_never_used_changes_nothing(tmp_path: Path) -> None:
    SimulatedTpm(str(tmp_path / "none")).clear()
    assert not (tmp_path / "none").exists()


def test_persist_keeps_a_usable_key_alone_and_the_newest(tmp_path: Path, tpm: SimulatedTpm) -> None:
    first, second = tpm.import_key(blob_for(tpm)), tpm.import_key(blob_for(tpm))
    tpm.persist(first, 0x81000100)
    assert_refused(lambda: tpm.persist(second, 0x81000100), AskOperator, "tpm.handle_taken")
    tpm.persist(second, 0x81000100, object_name(unwrap(first)[0]))
    assert (tmp_path / "press-07" / "persistent-81000100.key").read_bytes() == second
    assert_refused(lambda: tpm.persist(first[:-1], 0x81000100), IdentityStale, "tpm.key_stale")
    assert (tmp_path / "press-07" / "persistent-81000100.key").read_bytes() == second


def test_it_says_that_it_is_a_simulator(tpm: SimulatedTpm) -> None:
    assert tpm.condition().maker == "SIMU"
    assert tpm.condition().lockout_counter < tpm.condition().lockout_maximum
    assert tpm.endorsement_certificate() is None


def test_a_message_over_4096_bytes_is_our_own_bug(tpm: SimulatedTpm) -> None:
    wrapped_key = tpm.import_key(blob_for(tpm))
    assert_refused(lambda: tpm.sign(wrapped_key, bytes(4097)), Broken, "agent.bug")


def test_a_key_with_a_password_is_refused(tpm: SimulatedTpm) -> None:
    activation = badly_built_blob(tpm, auth_value=b"pw")
    error = assert_refused(lambda: tpm.import_key(activation), AskOperator, "dps.key_unsuitable")
    assert error.message == "the key's password: expected an empty one; came one of 2 bytes"


def test_no_repr_and_no_error_shows_a_key(tpm: SimulatedTpm) -> None:
    activation = blob_for(tpm)
    tpm.import_key(activation)
    prime = tpm._rsa_key("srk.pem").private_numbers().p
    with pytest.raises(DpsError) as refused:
        tpm.import_key(activation[:-60] + bytes([activation[-60] ^ 1]) + activation[-59:])
    for text in (repr(tpm), str(refused.value), repr(refused.value)):
        assert KEY.hex() not in text and repr(KEY) not in text and str(prime) not in text


@pytest.mark.parametrize("content", [b"", b"no key", b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"])
def test_a_damaged_key_file_is_named_and_left_alone(tmp_path: Path, tpm: SimulatedTpm, content: bytes) -> None:
    file = tmp_path / "press-07" / "srk.pem"
    file.write_bytes(content)
    error = assert_refused(tpm.storage_root_key, AskOperator, "tpm.state_damaged")
    assert str(file) in error.message
    assert file.read_bytes() == content


def test_a_key_of_another_kind_is_refused(tmp_path: Path, tpm: SimulatedTpm) -> None:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec, rsa

    for key in (
        rsa.generate_private_key(public_exponent=65537, key_size=1024),
        rsa.generate_private_key(public_exponent=3, key_size=2048),
        ec.generate_private_key(ec.SECP256R1()),
    ):
        pem = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        (tmp_path / "press-07" / "srk.pem").write_bytes(pem)
        assert_refused(tpm.storage_root_key, AskOperator, "tpm.state_damaged", type(key).__name__)


def test_a_folder_that_cannot_be_used_asks_the_operator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    error = assert_refused(SimulatedTpm(str(tmp_path / "file" / "tpm")).endorsement_key, AskOperator, "tpm.absent")
    assert str(tmp_path / "file" / "tpm") in error.message
    for number, code in ((13, "tpm.denied"), (30, "tpm.denied"), (28, "tpm.nv_full"), (5, "tpm.absent")):

        def fails(*_: Any, number: int = number) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "fsync", fails)
        folder = tmp_path / f"errno-{number}"
        assert_refused(SimulatedTpm(str(folder)).endorsement_key, AskOperator, code, f"errno={number}")
        assert os.listdir(folder) == [], "a half-made key stayed"


def test_without_cryptography_it_is_not_available(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_import = builtins.__import__

    def without_cryptography(name: str, *rest: Any, **more: Any) -> Any:
        if name.startswith("cryptography"):
            raise ImportError(name)
        return real_import(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without_cryptography)
    tpm = SimulatedTpm(str(tmp_path / "tpm"))
    for use in (tpm.endorsement_key, tpm.storage_root_key):
        assert_refused(use, AskOperator, "tpm.not_available")
    assert not (tmp_path / "tpm").exists()


def test_importing_the_simulator_imports_no_cryptography() -> None:
    program = "import sys, dps_hal.host.simulator; sys.exit('cryptography' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60, env=environment)


def test_the_registration_id_stays_after_a_clear(tpm: SimulatedTpm) -> None:
    before = registration_id_from_ek(tpm.endorsement_key())
    tpm.clear()
    assert registration_id_from_ek(tpm.endorsement_key()) == before
