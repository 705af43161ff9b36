"""EsysTpm and WireTpm on swtpm: the contract, what the bus shows, what stays in the TPM, power cuts."""

from __future__ import annotations

import errno
import grp
import os
import stat
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from contracts.tpm import CLAIMS, KEY, blob_for
from dps_hal.contracts import EK_HANDLE, SRK_HANDLE, Tpm
from dps_hal.errors import AskOperator, DpsError, IdentityStale, RetryLater
from dps_hal.host import tpm_node
from dps_hal.host.esys import EsysCommands, EsysKey, EsysTpm
from dps_hal.host.service_tpm import ServiceTpm
from dps_hal.host.tpm_node import open_device
from dps_hal.platform import hmac_sha256, random_bytes
from dps_hal.tpm.keys import RSA_BYTES, SIGN, USER_WITH_AUTH, check_ek_public, object_name, sized, take_sized, unwrap
from dps_hal.tpm.self_challenge import make_activation
from dps_hal.tpm.sessions import SaltedSession
from dps_hal.tpm.upkeep import EK_CERTIFICATE_INDEX
from support.claims import assert_refused
from support.tpm import swtpm
from support.tpm.backends import BACK_ENDS, OpenTpm
from support.tpm.swtpm import Swtpm
from support.tpm.tap import COMMANDS, TpmTap

COMMANDS_OF_A_REGISTRATION = {"esys": 21, "wire": 18}  # the bounds; the device SDKs of Azure need 26, in clear
DA_KEY = USER_WITH_AUTH | SIGN  # no noDA: each use between power-on and an unannounced power cut counts as a failure


def name_of(wrapped_key: bytes) -> bytes:
    return object_name(unwrap(wrapped_key)[0])


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Swtpm, Swtpm]]:
    with Swtpm(tmp_path_factory.mktemp("tpm")) as first, Swtpm(tmp_path_factory.mktemp("tpm")) as second:
        yield first, second


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.__name__)
def test_contract(claim: Callable[[Tpm, Tpm], None], machines: tuple[Swtpm, Swtpm], open_tpm: OpenTpm) -> None:
    first, second = (open_tpm(each.tcti) for each in machines)
    try:
        claim(first, second)
    finally:
        first.release()
        second.release()
    assert [each.leftovers() for each in machines] == [[], []]


def register(tpm: Tpm, seal_bytes: int = 1500) -> bytes:
    """What a registration asks of a TPM: keys, challenge, token, hub key, seal; returns the wrapped hub key."""
    ek, srk = tpm.endorsement_key(), tpm.storage_root_key()
    challenge_key = tpm.import_key(make_activation(ek, srk, b"challenge"))
    tpm.sign(challenge_key, b"0ne00000000%2Fregistrations%2Fpress-07\n1800000000")
    hub_key = tpm.import_key(make_activation(ek, srk, KEY))
    assert tpm.sign(hub_key, bytes(seal_bytes)) == hmac_sha256(KEY, bytes(seal_bytes))
    return hub_key


@pytest.mark.parametrize("back_end", BACK_ENDS)
def test_a_registration_takes_few_commands(back_end: str, tap: TpmTap) -> None:
    tpm = BACK_ENDS[back_end](tap.tcti)
    register(tpm)
    tpm.release()
    tap.forget()
    register(tpm, seal_bytes=1000)
    print(f"TPM commands per registration, {back_end}: {len(tap.names)}: {' '.join(tap.names)}")
    assert len(tap.names) <= COMMANDS_OF_A_REGISTRATION[back_end], tap.names
    tpm.release()
    assert tap.names[-1] == "FlushContext"


@pytest.mark.parametrize("back_end", BACK_ENDS)
def test_a_start_with_an_assignment_that_holds_takes_six_commands_to_its_seal(back_end: str, tap: TpmTap) -> None:
    first = BACK_ENDS[back_end](tap.tcti)
    wrapped_key = first.import_key(blob_for(first))
    first.release()
    tap.forget()
    tpm = BACK_ENDS[back_end](tap.tcti)
    tpm.endorsement_key(), tpm.storage_root_key()
    assert tpm.sign(wrapped_key, bytes(1000)) == hmac_sha256(KEY, bytes(1000))
    tpm.release()
    print(f"TPM commands of a start, {back_end}: {len(tap.names)}: {' '.join(tap.names)}")
    assert tap.names.index("HMAC") + 1 <= 6, tap.names
    assert tap.names[6:] == ["FlushContext", "FlushContext"], tap.names  # key and session, after the answer


def test_a_message_longer_than_the_tpms_buffer_is_signed(machine: Swtpm, open_tpm: OpenTpm) -> None:
    tpm = open_tpm(machine.tcti)
    wrapped_key = tpm.import_key(blob_for(tpm))
    for length in (1024, 1025, 2048, 2049, 4096, 8192):
        message = bytes(range(256)) * 32
        assert tpm.sign(wrapped_key, message[:length]) == hmac_sha256(KEY, message[:length]), f"length={length}"
    tpm.release()
    assert machine.leftovers() == []


# --- the bus


PASSWORDS = {"owner_auth": b"owner's password", "endorsement_auth": b"endorsement's password"}


def open_in_clear(back_end: str, monkeypatch: pytest.MonkeyPatch) -> OpenTpm:
    """The same with password sessions alone: what the bus would show then."""
    if back_end == "esys":
        monkeypatch.setattr(EsysTpm, "_start_session", lambda self, salt_key: None)
        return EsysTpm

    def authorize(
        self: SaltedSession, name: str, names: tuple[bytes, ...], parameters: bytes, auth: bytes | None
    ) -> tuple[bytes, bytes]:
        return parameters, struct.pack(">IHB", 0x40000009, 0, 0) + sized(auth or b"")

    monkeypatch.setattr(SaltedSession, "authorize", authorize)
    monkeypatch.setattr(SaltedSession, "accept", lambda self, name, parameters, response, offset: parameters)
    return BACK_ENDS[back_end]


def secrets_of_a_first_boot(machine: Swtpm, tcti: str, open_tpm: OpenTpm) -> dict[str, bytes]:
    """What a first boot, a registration and persist_at have that nobody on the bus may see."""
    machine.set_hierarchy_auth(swtpm.OWNER, PASSWORDS["owner_auth"])
    machine.set_hierarchy_auth(swtpm.ENDORSEMENT, PASSWORDS["endorsement_auth"])
    tpm = open_tpm(tcti, **PASSWORDS)
    drawn: list[bytes] = []

    def draw(count: int) -> bytes:
        drawn.append(random_bytes(count))
        return drawn[-1]

    wrapped_key = tpm.import_key(make_activation(tpm.endorsement_key(), tpm.storage_root_key(), KEY, random=draw))
    secrets = {
        **PASSWORDS,
        "inner key": drawn[0],
        "token signature": tpm.sign(wrapped_key, b"token"),
        "seal": tpm.sign(wrapped_key, bytes(1500)),
        "hub key": KEY,
    }
    tpm.sign(wrapped_key, KEY)  # nowhere else does it leave the wrapping that it comes in, not even in clear
    tpm.persist(wrapped_key, 0x81000100)
    tpm.release()
    return secrets


def test_the_bus_of_a_first_boot_shows_no_secret(machine: Swtpm, tap: TpmTap, open_tpm: OpenTpm) -> None:
    secrets = secrets_of_a_first_boot(machine, tap.tcti, open_tpm)
    assert [name for name, secret in secrets.items() if tap.seen(secret)] == []
    assert "CreatePrimary" in tap.names and "EvictControl" in tap.names
    assert machine.leftovers() == []
    assert machine.handles(swtpm.PERSISTENT) == [SRK_HANDLE, 0x81000100, EK_HANDLE]


@pytest.mark.parametrize("back_end", BACK_ENDS)
def test_the_tap_would_see_each_of_these_secrets_in_clear(
    back_end: str, machine: Swtpm, tap: TpmTap, monkeypatch: pytest.MonkeyPatch
) -> None:
    secrets = secrets_of_a_first_boot(machine, tap.tcti, open_in_clear(back_end, monkeypatch))
    assert [name for name, secret in secrets.items() if not tap.seen(secret)] == []


def salts_of_sessions(tap: TpmTap) -> list[bytes]:
    """The salt of each HMAC session that was opened, as it passed; an RSA block where it is encrypted."""
    salts = []
    for exchange in tap.exchanges:
        if exchange.name == "StartAuthSession":
            _, at = take_sized(exchange.command, 18, "nonce")
            salt, at = take_sized(exchange.command, at, "salt")
            if exchange.command[at] == 0:  # TPM_SE_HMAC; a policy session has no secret
                salts.append(salt)
    return salts


def test_every_salt_is_encrypted_and_none_comes_twice(machine: Swtpm, tap: TpmTap, open_tpm: OpenTpm) -> None:
    for _ in range(2):
        machine.clear()
        secrets_of_a_first_boot(machine, tap.tcti, open_tpm)
    salts = salts_of_sessions(tap)
    assert [len(salt) for salt in salts] == [RSA_BYTES] * len(salts)
    assert len(set(salts)) == len(salts) >= 4


def test_a_session_without_salt_would_be_noticed(tap: TpmTap) -> None:
    class Unsalted(EsysCommands):
        def start_session(self, salt_key: EsysKey) -> EsysKey:
            unsalted = EsysKey(*salt_key)
            unsalted.tr = self._tss.ESYS_TR.NONE
            return super().start_session(unsalted)

    tpm = ServiceTpm(Unsalted(tap.tcti, None))
    register(tpm)
    tpm.release()
    assert salts_of_sessions(tap) == [b""]


def test_a_wrong_hierarchy_password_asks_the_operator(machine: Swtpm, open_tpm: OpenTpm) -> None:
    machine.set_hierarchy_auth(swtpm.ENDORSEMENT, b"right")
    for auth in (b"", b"wrong"):
        tpm = open_tpm(machine.tcti, endorsement_auth=auth)
        assert_refused(tpm.endorsement_key, AskOperator, "tpm.hierarchy_auth", reproduce=f"auth={auth!r}")
        tpm.release()
        assert machine.leftovers() == [], f"auth={auth!r}"


# --- nothing stays behind


@pytest.mark.parametrize("first_boot", [False, True], ids=["keys_present", "first_boot"])
def test_nothing_is_left_in_the_tpm_after_a_failure_at_any_command(
    machine: Swtpm, tap: TpmTap, first_boot: bool, open_tpm: OpenTpm
) -> None:
    tpm = open_tpm(tap.tcti, owner_auth=b"o", endorsement_auth=b"e") if first_boot else open_tpm(tap.tcti)
    if not first_boot:
        register(tpm)
        tpm.release()
    for command in range(60):
        if first_boot:
            machine.clear()
            machine.set_hierarchy_auth(swtpm.OWNER, b"o")
            machine.set_hierarchy_auth(swtpm.ENDORSEMENT, b"e")
        tap.forget()
        return_code = 0x9A2 if command % 2 else 0x101
        tap.refuse(return_code, skip=command)
        with suppress(DpsError):
            register(tpm)
        tpm.release()
        reproduce = f"command={command} first_boot={first_boot} rc={return_code:#x} names={tap.names}"
        assert machine.leftovers() == [], reproduce
        if all(exchange.return_code != return_code for exchange in tap.exchanges):
            break
    assert command >= 20


def test_nothing_is_left_in_the_tpm_after_a_lost_connection(machine: Swtpm, tap: TpmTap, open_tpm: OpenTpm) -> None:
    tpm = open_tpm(tap.tcti)
    register(tpm)
    tpm.release()
    for command in range(60):
        tap.forget()
        tap.drop(skip=command)
        register(tpm)
        tpm.release()
        assert machine.leftovers() == [], f"command={command} names={tap.names}"
        if all(exchange.response for exchange in tap.exchanges):
            break
    assert command > 15


def test_nothing_is_left_in_the_tpm_after_a_lost_answer(machine: Swtpm, tap: TpmTap, open_tpm: OpenTpm) -> None:
    tpm = open_tpm(tap.tcti)
    register(tpm)
    tpm.release()
    # Where the lost answer had the handle of a new session or object, only the TPM knows it.
    for command in (
        "ReadPublic",
        "PolicySecret",
        "ActivateCredential",
        "Import",
        "HMAC",
        "SequenceUpdate",
        "FlushContext",
    ):
        tap.forget()
        tap.drop(command=command, after_execution=True)
        register(tpm)
        tpm.release()
        assert machine.leftovers() == [], f"command={command} names={tap.names}"


def test_release_flushes_what_two_lost_answers_left(machine: Swtpm, tap: TpmTap, open_tpm: OpenTpm) -> None:
    tpm = open_tpm(tap.tcti)
    wrapped_key = register(tpm)
    tpm.release()
    for command, size in (("HMAC", 7), ("SequenceUpdate", 3000)):
        tap.forget()
        tap.drop(command=command, after_execution=True)
        tap.drop(command=command, after_execution=True, skip=1)
        tpm = open_tpm(tap.tcti)  # a program that runs once
        assert_refused(partial(tpm.sign, wrapped_key, bytes(size)), RetryLater, "tpm.absent")
        tap.forget()
        tpm.release()
        assert machine.leftovers() == [], f"command={command} names={tap.names}"
        tpm.release()


# --- power cuts


def test_a_wrapped_key_signs_after_any_number_of_power_cuts(machine: Swtpm, open_tpm: OpenTpm) -> None:
    tpm = open_tpm(machine.tcti)
    wrapped_key = register(tpm)
    for cut in range(5):
        machine.restart()
        assert tpm.sign(wrapped_key, b"message") == hmac_sha256(KEY, b"message"), f"cut={cut}"
    tpm.release()
    machine.stop()
    machine.restart()
    assert tpm.sign(wrapped_key, b"message") == hmac_sha256(KEY, b"message")
    tpm.release()
    assert machine.property(swtpm.LOCKOUT_COUNTER) == 0
    assert machine.leftovers() == []


def test_a_tpm_that_is_off_is_absent_until_it_comes_back(machine: Swtpm, open_tpm: OpenTpm) -> None:
    tpm = open_tpm(machine.tcti)
    wrapped_key = register(tpm)
    machine.kill()
    for _ in range(2):
        assert_refused(lambda: tpm.sign(wrapped_key, b"message"), RetryLater, "tpm.absent")
    machine.restart()
    assert tpm.sign(wrapped_key, b"message") == hmac_sha256(KEY, b"message")
    machine.kill()
    tpm.release()
    tpm.release()


def test_a_power_cut_in_the_middle_of_a_command_is_survived(machine: Swtpm, tap: TpmTap, open_tpm: OpenTpm) -> None:
    tpm = open_tpm(tap.tcti)
    wrapped_key = register(tpm)
    tap.on_command = lambda name: machine.kill() if name == "HMAC" else None
    assert_refused(lambda: tpm.sign(wrapped_key, b"message"), RetryLater, "tpm.absent")
    tap.on_command = lambda name: None
    machine.restart()
    assert tpm.sign(wrapped_key, b"message") == hmac_sha256(KEY, b"message")
    tpm.release()


def test_a_key_without_no_da_survives_power_cuts_after_release(machine: Swtpm, open_tpm: OpenTpm) -> None:
    tpm = open_tpm(machine.tcti)
    wrapped_key = tpm.import_key(blob_for(tpm, attributes=DA_KEY))
    for cut in range(5):
        assert tpm.sign(wrapped_key, b"message") == hmac_sha256(KEY, b"message"), f"cut={cut}"
        tpm.release()
        machine.restart()
    assert machine.property(swtpm.LOCKOUT_COUNTER) == 0


def test_a_key_without_no_da_is_not_used_at_the_brink_of_a_lockout(
    machine: Swtpm, tap: TpmTap, open_tpm: OpenTpm
) -> None:
    tpm = open_tpm(tap.tcti)
    wrapped_key = tpm.import_key(blob_for(tpm, attributes=DA_KEY))
    no_da_key = tpm.import_key(blob_for(tpm))
    for cut in range(2):  # of three; each comes before it was announced
        tap.on_command = lambda name: machine.kill() if name == "Shutdown" else None
        assert tpm.sign(wrapped_key, b"message") == hmac_sha256(KEY, b"message"), f"cut={cut}"
        tap.on_command = lambda name: None
        machine.restart()
    error = assert_refused(lambda: tpm.sign(wrapped_key, b"message"), RetryLater, "tpm.locked_out")
    assert error.retry_after_s == 1000
    assert tpm.sign(no_da_key, b"message") == hmac_sha256(KEY, b"message")
    condition = tpm.condition()
    assert (condition.lockout_counter, condition.lockout_maximum, condition.recovery_s) == (2, 3, 1000)
    tpm.release()
    assert machine.leftovers() == []


def test_what_a_crash_left_is_flushed_only_where_the_tpm_is_ours_alone(machine: Swtpm, open_tpm: OpenTpm) -> None:
    null = "40000007"
    machine.command(0x176, bytes.fromhex(null + null + "0010" + "00" * 16 + "0000 00 0010 000b"))  # StartAuthSession
    machine.command(0x176, bytes.fromhex(null + null + "0010" + "00" * 16 + "0000 01 0010 000b"))
    machine.command(0x186, bytes.fromhex("0000 000b"))  # HashSequenceStart
    left = machine.leftovers()
    assert len(left) >= 3
    for exclusive, found in ((False, left), (True, [])):
        tpm = open_tpm(machine.tcti, exclusive=exclusive)
        tpm.condition()
        tpm.release()
        assert machine.leftovers() == found, f"exclusive={exclusive}"


# --- EK, SRK, handles


def test_handles_are_settings(machine: Swtpm, open_tpm: OpenTpm) -> None:
    tpm = open_tpm(machine.tcti, ek_handle=0x81010008, srk_handle=0x81000009)
    register(tpm)
    tpm.release()
    assert machine.handles(swtpm.PERSISTENT) == [0x81000009, 0x81010008]


def test_the_two_ek_templates_give_two_keys(machine: Swtpm, open_tpm: OpenTpm) -> None:
    tcg = open_tpm(machine.tcti)
    azure = open_tpm(machine.tcti, ek_template="azure-c-sdk", ek_handle=EK_HANDLE + 7)
    tcg_key = tcg.endorsement_key()
    tcg.release()
    azure_key = azure.endorsement_key()
    azure.release()
    check_ek_public(azure_key)
    assert azure_key != tcg_key
    assert_refused(lambda: open_tpm(machine.tcti, ek_template="tcg"), AskOperator, "config.invalid")


def test_between_connections_no_key_is_kept_but_the_name_of_the_ek(machine: Swtpm, open_tpm: OpenTpm) -> None:
    tpm = open_tpm(machine.tcti)
    register(tpm)
    name = object_name(tpm.endorsement_key())
    tpm.release()
    assert {value for value in vars(tpm).values() if isinstance(value, bytes)} == {name}


def test_a_cleared_tpm_makes_identity_and_answer_stale(machine: Swtpm, open_tpm: OpenTpm) -> None:
    tpm = open_tpm(machine.tcti)
    wrapped_key = register(tpm)
    activation, ek, srk = blob_for(tpm), tpm.endorsement_key(), tpm.storage_root_key()
    tpm.release()
    machine.clear()
    assert_refused(lambda: tpm.sign(wrapped_key, b"message"), IdentityStale, "tpm.key_stale")
    assert_refused(lambda: tpm.import_key(activation), IdentityStale, "tpm.blob_refused")
    assert tpm.endorsement_key() == ek
    assert tpm.storage_root_key() != srk
    tpm.release()
    assert machine.leftovers() == []


def test_persist_puts_the_key_where_other_programs_find_it(machine: Swtpm, open_tpm: OpenTpm) -> None:
    tpm = open_tpm(machine.tcti)
    former = b""
    for key in (KEY, KEY, b"another key"):
        wrapped_key = tpm.import_key(blob_for(tpm, key))
        tpm.persist(wrapped_key, 0x81000100, former)
        former = name_of(wrapped_key)
    stranger = tpm.import_key(blob_for(tpm))
    for wrong in (b"", name_of(stranger)):  # an HMAC key all the same, as other programs keep them there
        assert_refused(lambda wrong=wrong: tpm.persist(stranger, 0x81000100, wrong), AskOperator, "tpm.handle_taken")
    assert_refused(lambda: tpm.persist(tpm.import_key(blob_for(tpm)), SRK_HANDLE), AskOperator, "tpm.handle_taken")
    assert_refused(lambda: tpm.persist(tpm.import_key(blob_for(tpm)), 0x80000000), AskOperator, "config.invalid")
    tpm.release()
    assert machine.handles(swtpm.PERSISTENT) == [SRK_HANDLE, 0x81000100, EK_HANDLE]
    message = b"message"
    body = (0x81000100).to_bytes(4, "big") + bytes.fromhex("00000009 40000009 0000 00 0000")
    parameters = len(message).to_bytes(2, "big") + message + bytes.fromhex("000b")
    assert machine.command(0x155, body + parameters, tag=0x8002)[6:38] == hmac_sha256(b"another key", message)
    assert machine.leftovers() == []


def test_only_a_key_of_a_name_that_is_ours_is_withdrawn(machine: Swtpm, tap: TpmTap, open_tpm: OpenTpm) -> None:
    tpm = open_tpm(tap.tcti)
    ours, other = tpm.import_key(blob_for(tpm)), tpm.import_key(blob_for(tpm))
    tpm.persist(ours, 0x81000100)
    names = (name_of(ours), name_of(other))
    assert tpm.name_at(0x81000100) == names[0] and tpm.name_at(0x81000101) == b""
    tap.forget()
    for wrong in ((), (b"",), names[1:]):
        tpm.withdraw(0x81000100, wrong)
    tpm.withdraw(0x81000101, names)
    tpm.withdraw(SRK_HANDLE, names)
    assert "EvictControl" not in tap.names
    tpm.withdraw(0x81000100, names)
    assert tap.names[-2:] == ["ReadPublic", "EvictControl"]
    tpm.release()
    assert machine.handles(swtpm.PERSISTENT) == [SRK_HANDLE, EK_HANDLE]
    assert machine.leftovers() == []


def test_a_key_that_cannot_be_loaded_or_stored_costs_no_other(machine: Swtpm, tap: TpmTap, open_tpm: OpenTpm) -> None:
    tpm = open_tpm(tap.tcti)
    former = tpm.import_key(blob_for(tpm, b"former"))
    new = tpm.import_key(blob_for(tpm))
    tpm.persist(former, 0x81000100)
    tpm.release()
    before = machine.public_areas()
    tap.refuse(0x902, command="Load", times=1000)
    assert_refused(lambda: tpm.persist(new, 0x81000100, name_of(former)), RetryLater, "tpm.memory")
    tpm.release()
    assert machine.public_areas() == before  # what is there goes only after the new one was loaded
    tap.forget()
    tap.refuse(0x14B, command="EvictControl", skip=1, times=1000)
    assert_refused(lambda: tpm.persist(new, 0x81000100, name_of(former)), AskOperator, "tpm.nv_full")
    assert tpm.sign(new, b"message") == hmac_sha256(KEY, b"message")
    tap.forget()
    tpm.persist(new, 0x81000100, name_of(former))
    tpm.release()
    assert machine.handles(swtpm.PERSISTENT) == [SRK_HANDLE, 0x81000100, EK_HANDLE]
    assert machine.leftovers() == []


@pytest.mark.parametrize(
    ("kind", "given", "fits"),
    [
        (swtpm.OWNER, {"owner_auth": b"right"}, True),
        (swtpm.OWNER, {"owner_auth": b"wrong"}, False),
        (swtpm.OWNER, {}, True),  # there is none to try
        (swtpm.ENDORSEMENT, {"endorsement_auth": b"right"}, True),
        (swtpm.ENDORSEMENT, {"endorsement_auth": b"wrong"}, False),
    ],
)
def test_passwords_are_tried_and_never_cross_the_bus(
    kind: int, given: dict[str, bytes], fits: bool, machine: Swtpm, tap: TpmTap, open_tpm: OpenTpm
) -> None:
    before = open_tpm(machine.tcti)
    before.storage_root_key()
    before.release()
    machine.set_hierarchy_auth(kind, b"right")
    tpm = open_tpm(tap.tcti, **given)
    if fits:
        tpm.try_passwords()
    else:
        error = assert_refused(tpm.try_passwords, AskOperator, "tpm.hierarchy_auth")
        assert next(iter(given)) + "_file" in error.message
    tpm.release()
    assert tap.names.count("PolicySecret") == (len(given) if fits else 2)  # a refusal is believed the second time
    assert not tap.seen(b"right") and not tap.seen(b"wrong")
    assert machine.property(swtpm.LOCKOUT_COUNTER) == 0
    assert machine.leftovers() == []


def test_the_ek_certificate_is_read_in_chunks_and_its_padding_cut_off(machine: Swtpm, open_tpm: OpenTpm) -> None:
    tpm = open_tpm(machine.tcti)
    assert tpm.endorsement_certificate() is None
    tpm.release()
    certificate = bytes.fromhex("30820300") + bytes(range(256)) * 3
    machine.write_nv(EK_CERTIFICATE_INDEX, certificate + b"\xff" * 200)
    assert tpm.endorsement_certificate() == certificate
    tpm.release()
    assert machine.leftovers() == []


def test_condition_says_what_swtpm_is(machine: Swtpm, open_tpm: OpenTpm) -> None:
    tpm = open_tpm(machine.tcti)
    condition = tpm.condition()
    tpm.release()
    assert condition.maker == "IBM"
    assert [part.isdigit() for part in condition.firmware.split(".")] == [True, True]
    assert (condition.lockout_counter, condition.lockout_maximum, condition.free_slots) == (0, 3, 3)


# --- what is not a TPM


@pytest.mark.parametrize(
    ("tcti", "error_class", "code"),
    [
        ("device:/dev/there-is-none", RetryLater, "tpm.absent"),  # a driver may find its TPM late
        ("device:/dev", AskOperator, "tpm.absent"),
        ("swtpm:host=127.0.0.1,port=1", RetryLater, "tpm.absent"),
        ("mssim:host=127.0.0.1,port=1", RetryLater, "tpm.absent"),
        ("no-such-tcti", AskOperator, "tpm.not_available"),
    ],
)
def test_a_tcti_without_a_tpm_says_so(
    tcti: str, error_class: type[DpsError], code: str, capfd: pytest.CaptureFixture[str]
) -> None:
    tpm = EsysTpm(tcti)
    assert_refused(tpm.endorsement_key, error_class, code, reproduce=f"tcti={tcti!r}")
    tpm.release()
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("number", [errno.ENOENT, errno.ENODEV, errno.ENXIO])
def test_a_node_whose_driver_is_late_is_tried_again(
    number: int, monkeypatch: pytest.MonkeyPatch, open_tpm: OpenTpm
) -> None:
    def refuse(path: str, flags: int) -> int:
        raise OSError(number, os.strerror(number), path)

    tpm = open_tpm("device:/dev/tpmrm9")
    monkeypatch.setattr("dps_hal.host.transports.os.open", refuse)
    assert_refused(tpm.endorsement_key, RetryLater, "tpm.absent")


def test_a_kernel_without_resource_manager_is_named(tmp_path: Path, open_tpm: OpenTpm) -> None:
    (tmp_path / "tpm0").touch()
    error = assert_refused(open_tpm(f"device:{tmp_path}/tpmrm0").endorsement_key, RetryLater, "tpm.absent")
    for words in ("no resource manager", "Linux 4.12", "TPM 1.2", f'tcti = "device:{tmp_path}/tpm0"'):
        assert words in error.message, words


def test_a_forbidden_device_names_file_group_and_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, open_tpm: OpenTpm
) -> None:
    node = tmp_path / "tpmrm0"
    node.touch()
    refuse_to_open(monkeypatch, str(node), 0o660, "tss-of-a-test")
    error = assert_refused(open_tpm(f"device:{node}").endorsement_key, AskOperator, "tpm.denied")
    for word in (str(node), "crw-rw----", "group tss-of-a-test", "sudo usermod -aG tss-of-a-test"):
        assert word in error.message, word


def refuse_to_open(
    monkeypatch: pytest.MonkeyPatch,
    node: str,
    mode: int,
    group: str,
    groups: tuple[int, ...] = (),
    gid: int | None = None,
) -> None:
    """Makes `node` a device of this mode and group that this user may not open."""
    gid = {"root": 0, "nogroup": 65534}.get(group, 987654) if gid is None else gid
    real_stat = os.stat

    def refuse(path: str, flags: int) -> int:
        raise PermissionError(13, "Permission denied", path)

    def stat_of(path: Any, *arguments: Any, **named: Any) -> Any:
        if str(path) == node:
            return os.stat_result((stat.S_IFCHR | mode, 1, 1, 1, 0, gid, 0, 0, 0, 0))
        return real_stat(path, *arguments, **named)

    monkeypatch.delenv("INVOCATION_ID", False)
    monkeypatch.setattr(os, "open", refuse)
    monkeypatch.setattr(os, "stat", stat_of)
    monkeypatch.setattr(tpm_node, "in_container", lambda: False)  # wherever this test runs
    monkeypatch.setattr(os, "getgroups", lambda: list(groups))
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr("grp.getgrgid", lambda number: grp.struct_group((group, "x", number, [])))


@pytest.mark.parametrize(
    ("node", "mode", "group", "groups", "advice", "not_advice"),
    [
        ("/dev/tpmrm9", 0o660, "tss", (), "sudo usermod -aG tss", "udev"),
        ("/dev/tpmrm9", 0o600, "tss", (), 'GROUP="tss"', "tcti ="),  # the group may not
        ("/dev/tpmrm9", 0o660, "root", (), "udev", "usermod -aG root"),  # nobody should be in that one
        ("/dev/tpmrm9", 0o640, "tss", (), "udev", "tcti ="),
        ("/dev/tpmrm9", 0o660, "tss", (987654,), "AppArmor", "usermod"),  # it is in the group already
        ("/dev/tpm9", 0o600, "root", (), 'tcti = "device:/dev/tpmrm9"', "usermod"),
        ("/dev/tpm9", 0o660, "tss", (), "sudo usermod -aG tss", "tcti ="),
    ],
)
def test_what_helps_against_a_forbidden_device_depends_on_its_mode_and_group(
    node: str,
    mode: int,
    group: str,
    groups: tuple[int, ...],
    advice: str,
    not_advice: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    refuse_to_open(monkeypatch, node, mode, group, groups)
    monkeypatch.setattr(os.path, "exists", lambda path: path == "/dev/tpmrm9")
    error = assert_refused(lambda: open_device(node), AskOperator, "tpm.denied")
    assert advice in error.message
    assert not_advice not in error.message


def test_a_service_is_told_how_its_unit_gets_the_group(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_to_open(monkeypatch, "/dev/tpmrm9", 0o660, "tss")
    monkeypatch.setenv("INVOCATION_ID", "0" * 32)
    error = assert_refused(lambda: open_device("/dev/tpmrm9"), AskOperator, "tpm.denied")
    assert "SupplementaryGroups=tss" in error.message and "usermod" not in error.message


def test_a_service_that_cannot_see_the_group_is_told_how_to_look_it_up(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_to_open(monkeypatch, "/dev/tpmrm9", 0o660, "nogroup", (65534,))  # a user namespace maps tss alone
    monkeypatch.setenv("INVOCATION_ID", "0" * 32)
    error = assert_refused(lambda: open_device("/dev/tpmrm9"), AskOperator, "tpm.denied")
    for word in ("ls -l /dev/tpmrm9", "SupplementaryGroups=", "DeviceAllow"):
        assert word in error.message, word


def test_root_is_not_sent_to_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_to_open(monkeypatch, "/dev/tpmrm9", 0o660, "tss")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    error = assert_refused(lambda: open_device("/dev/tpmrm9"), AskOperator, "tpm.denied")
    assert "though root may do all" in error.message
    for word in ("usermod", "container", "unit"):
        assert word not in error.message, word


@pytest.mark.parametrize(("gid", "says"), [(987, "--group-add 987"), (65534, "stat -c %g /dev/tpmrm9"), (0, "stat -c")])
@pytest.mark.parametrize("user", [0, 1000])
def test_in_a_container_the_advice_is_how_to_start_it(
    gid: int, says: str, user: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_to_open(monkeypatch, "/dev/tpmrm9", 0o660, "tss", gid=gid)
    monkeypatch.setattr(tpm_node, "in_container", lambda: True)
    monkeypatch.setattr(os, "geteuid", lambda: user)
    error = assert_refused(lambda: open_device("/dev/tpmrm9"), AskOperator, "tpm.denied")
    assert "--device /dev/tpmrm9" in error.message and says in error.message
    for word in ("usermod", "udev", "systemctl", "AppArmor"):
        assert word not in error.message, word


def test_a_group_without_a_name_is_given_one_first(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_to_open(monkeypatch, "/dev/tpmrm9", 0o660, "987")
    error = assert_refused(lambda: open_device("/dev/tpmrm9"), AskOperator, "tpm.denied")
    assert "groupadd --gid 987 tpm" in error.message and "usermod -aG tpm" in error.message


@pytest.mark.parametrize("name", ["tpmrm9", "tpm9"])
@pytest.mark.parametrize(
    ("place", "advice"), [("container", "--device /dev/"), ("unit", "PrivateDevices"), ("host", "udevadm trigger")]
)
def test_a_tpm_that_the_kernel_has_and_nobody_handed_in_is_told(
    place: str, advice: str, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / name.rstrip("9") / name).mkdir(parents=True)
    monkeypatch.setattr(tpm_node, "_SYSFS", str(tmp_path))
    monkeypatch.setattr(tpm_node, "in_container", lambda: place == "container")
    monkeypatch.delenv("INVOCATION_ID", raising=False)
    if place == "unit":
        monkeypatch.setenv("INVOCATION_ID", "0" * 32)
    error = assert_refused(lambda: open_device(f"/dev/{name}"), RetryLater, "tpm.no_node")
    assert advice in error.message and str(tmp_path / name.rstrip("9") / name) in error.message
    assert_refused(lambda: open_device("/dev/tpmrm8"), RetryLater, "tpm.absent")


@pytest.mark.parametrize("mark", ["file", "variable", "kubernetes", "mount", "nothing"])
def test_a_container_is_known_by_its_marks(mark: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("container", "KUBERNETES_SERVICE_HOST"):
        monkeypatch.delenv(name, raising=False)
    file = tmp_path / "mark"
    monkeypatch.setattr(tpm_node, "_CONTAINER_MARKS", (str(file),))
    monkeypatch.setattr(tpm_node, "_CONTAINER_ROOTS", (" / ",) if mark == "mount" else ())
    if mark == "file":
        file.touch()
    elif mark == "variable":
        monkeypatch.setenv("container", "podman")
    elif mark == "kubernetes":
        monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    assert tpm_node.in_container() is (mark != "nothing")


def test_without_the_package_the_operator_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tpm2_pytss", None)
    error = assert_refused(lambda: EsysTpm("device:/dev/tpmrm0"), AskOperator, "tpm.not_available")
    assert "the extra 'tpm' has it" in error.message


def test_importing_the_module_does_not_import_the_library() -> None:
    program = f"import sys; sys.path[:0] = {sys.path!r}; import dps_hal.host.esys; "
    program += "sys.exit('tpm2_pytss' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_the_tap_knows_every_command_of_a_registration(tap: TpmTap, open_tpm: OpenTpm) -> None:
    tpm = open_tpm(tap.tcti)
    register(tpm)
    tpm.release()
    assert set(tap.names) <= set(COMMANDS.values())
