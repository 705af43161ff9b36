"""What EsysTpm and WireTpm make of the TPM's return codes: who must act, by code and never by text."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from contracts.tpm import KEY, blob_for
from dps_hal.contracts import TpmService
from dps_hal.errors import AskOperator, DpsError, IdentityStale, RetryLater
from dps_hal.host.codes import REMEDIES
from dps_hal.host.tpm_node import is_managed
from dps_hal.platform import hmac_sha256
from dps_hal.tpm import commands, operations
from dps_hal.tpm.errors import RefusedError
from dps_hal.tpm.verdicts import error_of, locked_out
from support.claims import assert_refused
from support.tpm import swtpm
from support.tpm.backends import OpenTpm
from support.tpm.swtpm import Swtpm
from support.tpm.tap import DeviceNode, TpmTap, UnreliableNode

ALWAYS = 1000
Operation = Callable[[TpmService, bytes, bytes], object]


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Swtpm]:
    with Swtpm(tmp_path_factory.mktemp("tpm")) as new:
        yield new


@pytest.fixture(scope="module")
def shared_tap(machine: Swtpm) -> Iterator[TpmTap]:
    with TpmTap(machine.port) as new:
        yield new


@pytest.fixture
def tap(shared_tap: TpmTap) -> TpmTap:
    shared_tap.forget()
    return shared_tap


@pytest.fixture
def tpm(tap: TpmTap, open_tpm: OpenTpm) -> Iterator[TpmService]:
    new = open_tpm(tap.tcti)
    new.endorsement_key(), new.storage_root_key()
    yield new
    tap.forget()
    new.release()


def set_limit(monkeypatch: pytest.MonkeyPatch, limit_s: float) -> None:
    monkeypatch.setattr(operations, "COMMAND_LIMIT_S", limit_s)


def import_it(tpm: TpmService, activation: bytes, wrapped_key: bytes) -> object:
    return tpm.import_key(activation)


def sign_it(tpm: TpmService, activation: bytes, wrapped_key: bytes) -> object:
    return tpm.sign(wrapped_key, b"message")


def sign_much(tpm: TpmService, activation: bytes, wrapped_key: bytes) -> object:
    return tpm.sign(wrapped_key, bytes(3000))


def persist_it(tpm: TpmService, activation: bytes, wrapped_key: bytes) -> object:
    return tpm.persist(wrapped_key, 0x81000100)


def read_it(tpm: TpmService, activation: bytes, wrapped_key: bytes) -> object:
    return tpm.endorsement_key()


@pytest.mark.parametrize(
    ("operation", "command", "return_code", "error_class", "code"),
    [
        (import_it, "ActivateCredential", 0x1DF, IdentityStale, "tpm.blob_refused"),  # INTEGRITY: another SRK's name
        (import_it, "ActivateCredential", 0x101, IdentityStale, "tpm.blob_refused"),  # libtpms: another EK's secret
        (import_it, "ActivateCredential", 0x2E5, IdentityStale, "tpm.blob_refused"),  # hardware says BINDING to that
        (import_it, "ActivateCredential", 0x2C4, IdentityStale, "tpm.blob_refused"),  # VALUE of the secret
        (import_it, "ActivateCredential", 0x1D5, IdentityStale, "tpm.blob_refused"),  # SIZE of the credential
        (import_it, "Import", 0x3DF, IdentityStale, "tpm.blob_refused"),  # INTEGRITY of the duplicate
        (import_it, "Import", 0x3D5, IdentityStale, "tpm.blob_refused"),  # SIZE after decryption by another key
        (import_it, "Import", 0x4C4, IdentityStale, "tpm.blob_refused"),  # VALUE of the seed: another SRK
        (import_it, "Import", 0x101, IdentityStale, "tpm.blob_refused"),
        (import_it, "Import", 0x2C2, AskOperator, "tpm.key_refused"),  # ATTRIBUTES
        (import_it, "Import", 0x3C7, AskOperator, "tpm.key_refused"),  # KEY_SIZE
        (import_it, "Import", 0x0A5, AskOperator, "tpm.key_refused"),  # BINDING of public and sensitive
        (import_it, "Import", 0x2D2, AskOperator, "tpm.key_refused"),  # SCHEME
        (sign_it, "Load", 0x1DF, IdentityStale, "tpm.key_stale"),
        (sign_it, "Load", 0x1D5, IdentityStale, "tpm.key_stale"),
        (sign_it, "Load", 0x2CB, IdentityStale, "tpm.key_stale"),
        (sign_it, "Load", 0x902, RetryLater, "tpm.memory"),
        (sign_it, "StartAuthSession", 0x903, RetryLater, "tpm.memory"),
        (sign_it, "HMAC", 0x921, RetryLater, "tpm.locked_out"),
        (sign_it, "HMAC", 0x101, AskOperator, "tpm.failure_mode"),
        (sign_it, "Load", 0x101, AskOperator, "tpm.failure_mode"),
        (sign_it, "HMAC", 0x143, AskOperator, "tpm.unsupported"),  # COMMAND_CODE
        (sign_it, "Load", 0x923, RetryLater, "tpm.nv_unavailable"),
        (sign_it, "Load", 0x100, AskOperator, "tpm.not_started"),  # INITIALIZE, also after Startup
        (sign_it, "Load", 0x130, AskOperator, "tpm.not_started"),  # REBOOT
        (sign_it, "Load", 0x12D, AskOperator, "tpm.upgrading"),  # UPGRADE
        (sign_it, "Load", 0x010, RetryLater, "tpm.bus_altered"),  # no return code that a TPM 2.0 has, with the next
        (sign_it, "Load", 0x1000, RetryLater, "tpm.bus_altered"),
        (sign_it, "Load", 0x100000, RetryLater, "tpm.bus_altered"),
        (sign_it, "Load", 0x10000000, RetryLater, "tpm.bus_altered"),
        (sign_it, "HMAC", 0x184, RetryLater, "tpm.bus_altered"),  # VALUE of a handle that it gave itself
        (import_it, "ActivateCredential", 0x12F, AskOperator, "tpm.failed"),  # AUTH_UNAVAILABLE
        (import_it, "ActivateCredential", 0xA9D, AskOperator, "tpm.failed"),  # POLICY_FAIL
        (sign_it, "HMAC", 0x18B, AskOperator, "tpm.failed"),  # HANDLE, rebuilt once in vain
        (sign_it, "HMAC", 0x9A2, AskOperator, "dps.key_unsuitable"),  # BAD_AUTH: the key has a password of its own
        (sign_it, "HMAC", 0x98E, RetryLater, "tpm.bus_altered"),  # AUTH_FAIL: a key that had none when it came
        (sign_much, "HMAC_Start", 0x9A2, AskOperator, "dps.key_unsuitable"),
        (sign_it, "HMAC", 0x918, AskOperator, "tpm.failed"),  # REFERENCE_S0, rebuilt once in vain
        (sign_much, "SequenceUpdate", 0x101, AskOperator, "tpm.failure_mode"),
        (sign_much, "SequenceComplete", 0x921, RetryLater, "tpm.locked_out"),
        (import_it, "PolicySecret", 0x9A2, AskOperator, "tpm.hierarchy_auth"),
        (import_it, "PolicySecret", 0x98E, AskOperator, "tpm.hierarchy_auth"),
        (persist_it, "EvictControl", 0x9A2, AskOperator, "tpm.hierarchy_auth"),
        (persist_it, "EvictControl", 0x14B, AskOperator, "tpm.nv_full"),
        (persist_it, "EvictControl", 0x14C, AskOperator, "tpm.failed"),
        (read_it, "ReadPublic", 0x101, AskOperator, "tpm.failure_mode"),
        (read_it, "ReadPublic", 0x120, AskOperator, "tpm.disabled"),
        (read_it, "ReadPublic", 0x185, AskOperator, "tpm.disabled"),  # HIERARCHY
        (read_it, "ReadPublic", 0x01E, AskOperator, "tpm.unsupported"),  # BAD_TAG, of a TPM 1.2
        (sign_it, "Load", 0x9A2, AskOperator, "tpm.srk_unsuitable"),  # BAD_AUTH of the SRK, rebuilt once in vain
        (read_it, "ReadPublic", 0xB0143, AskOperator, "tpm.unsupported"),  # of the kernel's resource manager
        (read_it, "ReadPublic", 0xC0902, RetryLater, "tpm.memory"),  # of tabrmd, for the TPM
    ],
    ids=lambda value: value.__name__ if callable(value) else hex(value) if isinstance(value, int) else value,
)
def test_a_return_code_says_who_must_act(
    operation: Operation,
    command: str,
    return_code: int,
    error_class: type[DpsError],
    code: str,
    machine: Swtpm,
    tap: TpmTap,
    tpm: TpmService,
) -> None:
    activation = blob_for(tpm)
    wrapped_key = tpm.import_key(activation)
    tpm.release()
    tap.refuse(return_code, command=command, times=ALWAYS)
    reproduce = f"{command} answered 0x{return_code:x}"
    error = assert_refused(lambda: operation(tpm, activation, wrapped_key), error_class, code, reproduce=reproduce)
    if error_class is AskOperator:
        assert f"0x{return_code:x}" in error.message
    tap.forget()
    tpm.release()
    assert machine.leftovers() == [], reproduce
    assert tpm.sign(wrapped_key, b"message") == hmac_sha256(KEY, b"message"), reproduce


@pytest.mark.parametrize("return_code", [0x922, 0x908, 0x90A, 0x920], ids=hex)
def test_a_tpm_that_is_not_ready_is_asked_again(
    return_code: int, tap: TpmTap, tpm: TpmService, open_tpm: OpenTpm
) -> None:
    waits: list[int] = []
    patient = open_tpm(tap.tcti, while_waiting=lambda: waits.append(1))
    wrapped_key = tpm.import_key(blob_for(tpm))
    tpm.release()
    tap.refuse(return_code, command="HMAC", times=6)  # tpm2-tss itself asks five times
    assert patient.sign(wrapped_key, b"message") == hmac_sha256(KEY, b"message")
    patient.release()
    assert waits


def test_a_tpm_that_is_never_ready_times_out(
    machine: Swtpm, tap: TpmTap, tpm: TpmService, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrapped_key = tpm.import_key(blob_for(tpm))
    set_limit(monkeypatch, 0.2)
    tap.refuse(0x922, command="HMAC", times=ALWAYS)
    assert_refused(lambda: tpm.sign(wrapped_key, b"message"), RetryLater, "tpm.timeout")
    tpm.release()
    assert machine.leftovers() == []


def test_a_lockout_says_when_to_come_back_and_is_not_repeated(tap: TpmTap, tpm: TpmService) -> None:
    wrapped_key = tpm.import_key(blob_for(tpm))
    tap.refuse(0x921, command="HMAC", times=ALWAYS)
    error = assert_refused(lambda: tpm.sign(wrapped_key, b"message"), RetryLater, "tpm.locked_out")
    assert error.retry_after_s == 1000
    assert tap.names.count("HMAC") == 1


@pytest.mark.parametrize(
    ("command", "return_code"),
    [
        ("Load", 0x918),  # the session
        ("Load", 0x18B),  # the SRK
        ("Load", 0x9A2),  # a name or nonce that is no longer the TPM's
        ("HMAC", 0x910),  # the key
        ("PolicySecret", 0x911),  # the policy session
        ("ActivateCredential", 0x919),
        ("Import", 0x910),
    ],
)
def test_what_a_restarted_tpm_has_forgotten_is_rebuilt_once(
    command: str, return_code: int, machine: Swtpm, tap: TpmTap, tpm: TpmService
) -> None:
    tap.refuse(return_code, command=command)
    wrapped_key = tpm.import_key(blob_for(tpm))
    assert tpm.sign(wrapped_key, b"message") == hmac_sha256(KEY, b"message")
    assert tap.names.count(command) >= 2
    tpm.release()
    assert machine.leftovers() == [], f"{command} answered 0x{return_code:x}"


def test_a_tpm_that_was_not_started_is_started(tap: TpmTap, tpm: TpmService) -> None:
    tpm.release()
    tap.forget()
    tap.refuse(0x100)
    tpm.endorsement_key()
    assert tap.names == ["ReadPublic", "Startup", "ReadPublic"]


def test_a_slow_tpm_is_waited_for(tap: TpmTap, tpm: TpmService) -> None:
    wrapped_key = tpm.import_key(blob_for(tpm))
    tap.delay(0.3, command="HMAC")
    assert tpm.sign(wrapped_key, b"message") == hmac_sha256(KEY, b"message")


def test_a_second_try_has_no_time_of_its_own(tap: TpmTap, tpm: TpmService, monkeypatch: pytest.MonkeyPatch) -> None:
    """In virtual time: it passes in the pauses between commands, and the first HMAC takes 25 seconds."""
    wrapped_key = tpm.import_key(blob_for(tpm))
    now_ms = 0

    def pass_by(duration_ms: int) -> None:
        nonlocal now_ms
        now_ms += duration_ms

    monkeypatch.setattr(commands, "pause_ms", pass_by)
    monkeypatch.setattr(commands, "ticks_ms", lambda: now_ms)
    monkeypatch.setattr(commands, "ms_since", lambda ticks: now_ms - ticks)
    set_limit(monkeypatch, 30.0)
    tap.refuse(0x910, command="HMAC")  # a session that is gone: all is made anew
    tap.refuse(0x922, command="HMAC", skip=1, times=ALWAYS)
    tap.on_command = lambda name: pass_by(25_000) if name == "HMAC" and now_ms < 25_000 else None
    assert_refused(lambda: tpm.sign(wrapped_key, b"message"), RetryLater, "tpm.timeout")
    assert 25_000 < now_ms <= 30_000


def test_any_return_code_at_any_command_ends_in_one_of_the_four_classes(
    tap: TpmTap, tpm: TpmService, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_limit(monkeypatch, 0.05)
    activation = blob_for(tpm)
    wrapped_key = tpm.import_key(activation)
    for command in ("StartAuthSession", "PolicySecret", "ActivateCredential", "Import", "Load", "HMAC"):
        for return_code in range(0x101, 0xFFF, 331):
            tap.forget()
            tap.refuse(return_code, command=command, times=ALWAYS)
            operation = sign_it if command in ("Load", "HMAC") else import_it
            tpm.release()
            with pytest.raises(DpsError) as raised:
                operation(tpm, activation, wrapped_key)
            code = raised.value.code
            assert code.startswith("tpm.") or code == "dps.key_unsuitable", f"{command} answered 0x{return_code:x}"


# Command, the return code that it ends with, who must act, words of the sentence.
KNOWN_RETURN_CODES = (
    ("read_public", 0x18B, AskOperator, "tpm.failed", "gone twice"),
    ("activate_credential", 0x28B, AskOperator, "tpm.failed", "gone twice"),
    ("evict_control", 0x28B, AskOperator, "tpm.failed", "gone twice"),
    ("hmac", 0x922, RetryLater, "tpm.timeout", "not ready for hmac in time"),
    ("hmac", 0x908, RetryLater, "tpm.timeout", "not ready"),
    ("hmac", 0x90A, RetryLater, "tpm.timeout", "not ready"),
    ("hmac", 0x920, RetryLater, "tpm.timeout", "not ready"),
    ("hmac", 0x921, RetryLater, "tpm.locked_out", "forgets one every 1000 s"),
    ("hmac", 0x923, RetryLater, "tpm.nv_unavailable", "cannot write its memory"),
    ("activate_credential", 0x12F, AskOperator, "tpm.failed", "does not take the proof"),
    ("activate_credential", 0xA9D, AskOperator, "tpm.failed", "does not take the proof"),
    ("policy_secret", 0x9A2, AskOperator, "tpm.hierarchy_auth", "endorsement_auth_file"),
    ("create_primary", 0x9A2, AskOperator, "tpm.hierarchy_auth", "endorsement_auth_file"),
    ("evict_control", 0x9A2, AskOperator, "tpm.hierarchy_auth", "owner_auth_file"),
    ("activate_credential", 0x1DF, IdentityStale, "tpm.blob_refused", "activate_credential with 0x1df"),
    ("activate_credential", 0x101, IdentityStale, "tpm.blob_refused", "activate_credential with 0x101"),
    ("activate_credential", 0x2E5, IdentityStale, "tpm.blob_refused", "activate_credential with 0x2e5"),
    ("import", 0x3DF, IdentityStale, "tpm.blob_refused", "import with 0x3df"),
    ("import", 0x2C2, AskOperator, "tpm.key_refused", "import with 0x2c2"),
    ("import", 0x3C7, AskOperator, "tpm.key_refused", "import with 0x3c7"),
    ("load", 0x902, RetryLater, "tpm.memory", "load with 0x902"),
    ("start_auth_session", 0x903, RetryLater, "tpm.memory", "start_auth_session with 0x903"),
    ("hmac", 0x143, AskOperator, "tpm.unsupported", "does not have this command"),
    ("hmac", 0x101, AskOperator, "tpm.failure_mode", "hmac with 0x101"),
    ("evict_control", 0x14B, AskOperator, "tpm.nv_full", "evict_control with 0x14b"),
    ("hmac", 0x100, AskOperator, "tpm.not_started", "started anew"),
    ("hmac", 0x130, AskOperator, "tpm.not_started", "started anew"),
    ("hmac", 0x12D, AskOperator, "tpm.upgrading", "upgrade of its own firmware"),
    ("hmac", 0x9A2, AskOperator, "dps.key_unsuitable", "expected an empty one"),
    ("hmac_start", 0x9A2, AskOperator, "dps.key_unsuitable", "expected an empty one"),
    ("hmac", 0x98E, RetryLater, "tpm.bus_altered", "altered on its way"),
    ("sequence_update", 0x9A2, AskOperator, "tpm.failed", "the proof that the command is ours"),
    ("nv_read", 0x98E, AskOperator, "tpm.certificate_locked", "has a password"),
    ("read_public", 0x01E, AskOperator, "tpm.unsupported", "this is a TPM 1.2"),
    ("create_primary", 0x185, AskOperator, "tpm.disabled", "firmware setup"),
    ("evict_control", 0x185, AskOperator, "tpm.disabled", "firmware setup"),
    ("hmac", 0x120, AskOperator, "tpm.disabled", "firmware setup"),
    ("activate_credential", 0x9A2, AskOperator, "tpm.srk_unsuitable", "set another srk_handle"),
    ("import", 0x98E, AskOperator, "tpm.srk_unsuitable", "set another srk_handle"),
    ("load", 0x9A2, AskOperator, "tpm.srk_unsuitable", "set another srk_handle"),
)


@pytest.mark.parametrize(
    ("command", "return_code", "error_class", "code", "words"),
    KNOWN_RETURN_CODES,
    ids=[f"{row[0]}-{row[1]:#x}" for row in KNOWN_RETURN_CODES],
)
def test_every_known_return_code_has_a_class_a_sentence_and_a_remedy(
    command: str, return_code: int, error_class: type[DpsError], code: str, words: str
) -> None:
    error = error_of(RefusedError(command, return_code), lambda what: locked_out(what, {0x210: 1000}))
    assert (type(error), error.code) == (error_class, code)
    assert words in error.message
    assert REMEDIES[code]


def test_a_tpm_1_2_is_named(tap: TpmTap, open_tpm: OpenTpm) -> None:
    tap.change = lambda command, response: bytes.fromhex("00c4 0000000a 0000001e")
    tpm = open_tpm(tap.tcti)
    try:
        for operation in (tpm.endorsement_key, tpm.condition):
            error = assert_refused(operation, AskOperator, "tpm.unsupported")
            assert "TPM 1.2" in error.message
    finally:
        tpm.release()
        tap.change = lambda command, response: response


def test_a_disabled_hierarchy_names_the_firmware_setup(tmp_path: Path, open_tpm: OpenTpm) -> None:
    with Swtpm(tmp_path / "tpm") as machine:
        by_platform = struct.pack(">IIIHBH", 0x4000000C, 9, 0x40000009, 0, 0, 0)
        machine.command(0x121, by_platform + struct.pack(">IB", swtpm.ENDORSEMENT, 0), tag=0x8002)  # HierarchyControl
        tpm = open_tpm(machine.tcti)
        error = assert_refused(tpm.endorsement_key, AskOperator, "tpm.disabled")
        assert "0x185" in error.message and "firmware setup" in error.message
        tpm.release()
        assert machine.leftovers() == []


# --- answers that are not the TPM's own

PLACES = (0, 8, 12, 14, 16, 20, -1)  # tag, return code, handle or size, size or nonce, what is in it, its proof


@pytest.mark.parametrize(
    ("operation", "command"),
    [
        (sign_it, "ReadPublic"),
        (sign_it, "StartAuthSession"),
        (import_it, "PolicySecret"),
        (import_it, "ActivateCredential"),
        (import_it, "Import"),
        (sign_it, "Load"),
        (sign_it, "HMAC"),
        (sign_much, "HMAC_Start"),
        (sign_much, "SequenceUpdate"),
        (sign_much, "SequenceComplete"),
    ],
    ids=lambda value: None if callable(value) else value,
)
def test_an_altered_answer_is_refused_and_what_it_kept_from_us_is_flushed(
    operation: Operation, command: str, machine: Swtpm, tap: TpmTap, tpm: TpmService
) -> None:
    activation = blob_for(tpm)
    wrapped_key = tpm.import_key(activation)
    for place in PLACES:
        if (command, place) == ("ActivateCredential", -1):
            continue  # of the policy session, which proves nothing and which nobody reads
        for times in (1, ALWAYS):
            reproduce = f"{command} altered at {place}, {times} times"
            tpm.release()
            tap.forget()
            tap.alter(command=command, place=place, times=times)
            if times == 1:
                operation(tpm, activation, wrapped_key)
            else:
                assert_refused(
                    lambda: operation(tpm, activation, wrapped_key), RetryLater, "tpm.bus_altered", reproduce
                )
            tap.forget()
            tpm.release()
            assert machine.leftovers() == [], reproduce


@pytest.mark.parametrize("place", PLACES[:-1])  # the last byte is of the password session, which proves nothing
def test_an_altered_new_primary_key_is_refused_and_flushed(
    place: int, machine: Swtpm, tap: TpmTap, open_tpm: OpenTpm
) -> None:
    machine.clear()
    for kind in ("EK", "SRK"):
        new = open_tpm(tap.tcti)
        operation = new.endorsement_key if kind == "EK" else new.storage_root_key
        tap.alter(command="CreatePrimary", place=place, times=ALWAYS)
        try:
            assert_refused(operation, RetryLater, "tpm.bus_altered", kind)
        finally:
            tap.forget()
            new.release()
        assert machine.leftovers() == [], kind
        new.endorsement_key()
        new.release()


def leave_something_of_others(machine: Swtpm) -> list[int]:
    null = "40000007"
    machine.command(0x176, bytes.fromhex(null + null + "0010" + "00" * 16 + "0000 00 0010 000b"))  # StartAuthSession
    machine.command(0x186, bytes.fromhex("0000 000b"))  # HashSequenceStart
    return machine.leftovers()


@pytest.mark.parametrize("command", ["StartAuthSession", "Load"])
def test_what_others_left_stays_also_after_an_altered_answer(command: str, tmp_path: Path, open_tpm: OpenTpm) -> None:
    with Swtpm(tmp_path / "tpm") as machine, TpmTap(machine.port) as tap:
        tpm = open_tpm(tap.tcti)
        wrapped_key = tpm.import_key(blob_for(tpm))
        tpm.release()
        theirs = leave_something_of_others(machine)
        tap.alter(command=command, place=-1)
        with suppress(RetryLater):  # of three slots theirs is one and what the altered answer kept from us another
            tpm.sign(wrapped_key, b"message")
        tpm.release()
        assert command in tap.names
        assert set(theirs) <= set(machine.leftovers())


def test_behind_a_device_node_an_altered_answer_costs_what_is_ours_and_nothing_else(
    tmp_path: Path, open_tpm: OpenTpm
) -> None:
    with Swtpm(tmp_path / "tpm") as machine, TpmTap(machine.port) as tap:
        node = DeviceNode(tap.port)
        tpm = open_tpm(f"device:{node.path}")
        wrapped_key = tpm.import_key(blob_for(tpm))
        tap.alter(command="HMAC", place=-1)  # key and session are ours, and known
        assert tpm.sign(wrapped_key, b"message") == hmac_sha256(KEY, b"message")
        tap.alter(command="Load", place=-1, times=2)  # its handle is not known, and others are at work
        tap.exchanges.clear()
        assert_refused(lambda: tpm.sign(wrapped_key, b"message"), RetryLater, "tpm.bus_altered")
        tpm.release()
        flushed = [int.from_bytes(passed.command[10:], "big") for passed in tap.exchanges if "Flush" in passed.name]
        node.close()
        assert [handle for handle in flushed if handle >= 0x80000000] == []
        assert len(machine.leftovers()) == 2


# --- /dev/tpm0, which no resource manager tidies up


@pytest.mark.parametrize("command", ["HMAC", "Import", "ActivateCredential", "SequenceUpdate"])
def test_what_a_lost_answer_left_on_a_direct_node_is_flushed_by_the_next_connection(
    command: str, tmp_path: Path, open_tpm: OpenTpm
) -> None:
    with Swtpm(tmp_path / "tpm") as machine, UnreliableNode(machine.port, tmp_path / "tpm0") as node:
        tpm = open_tpm(f"device:{node.path}")
        activation = blob_for(tpm)
        for _ in range(4):  # one session or object more each time would be too many for the TPM
            node.fail_at(command)
            wrapped_key = tpm.import_key(activation)
            assert tpm.sign(wrapped_key, bytes(3000)) == hmac_sha256(KEY, bytes(3000))
            assert tpm.sign(wrapped_key, b"message") == hmac_sha256(KEY, b"message")
            assert node.failed
        tpm.release()
        node.close()
        assert machine.leftovers() == []


def test_on_a_direct_node_an_object_of_others_at_a_handle_of_ours_stays(tmp_path: Path, open_tpm: OpenTpm) -> None:
    with Swtpm(tmp_path / "tpm") as machine, UnreliableNode(machine.port, tmp_path / "tpm0") as node:
        tpm = open_tpm(f"device:{node.path}")
        wrapped_key = tpm.import_key(blob_for(tpm))

        def others_come() -> None:
            machine.restart()
            machine.command(0x186, bytes.fromhex("0000 000b"))  # HashSequenceStart, at the handle that our key had

        node.fail_at("HMAC", meanwhile=others_come)
        assert tpm.sign(wrapped_key, b"message") == hmac_sha256(KEY, b"message")
        tpm.release()
        node.close()
        assert machine.leftovers() == [swtpm.TRANSIENT]


def test_behind_the_resource_manager_nothing_is_flushed_for_a_lost_connection(
    tmp_path: Path, open_tpm: OpenTpm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os.path, "realpath", lambda path: "/dev/tpmrm0")
    with Swtpm(tmp_path / "tpm") as machine, UnreliableNode(machine.port, tmp_path / "tpm0") as node:
        tpm = open_tpm(f"device:{node.path}")
        wrapped_key = tpm.import_key(blob_for(tpm))
        node.fail_at("HMAC")
        assert tpm.sign(wrapped_key, b"message") == hmac_sha256(KEY, b"message")
        tpm.release()
        node.close()
        assert len(machine.leftovers()) == 3  # swtpm is no resource manager: key and both sessions of the lost one


@pytest.mark.parametrize(
    ("path", "managed"),
    [("/dev/tpmrm0", True), ("/dev/tpmrm12", True), ("/dev/tpm0", False), ("/dev/pts/3", False)],
)
def test_only_nodes_of_the_resource_manager_count_as_such(path: str, managed: bool, tmp_path: Path) -> None:
    assert is_managed(path) is managed
    (tmp_path / "my-tpm").symlink_to(path)
    assert is_managed(str(tmp_path / "my-tpm")) is managed
