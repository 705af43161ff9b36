"""WireTpm on swtpm: what only bytes show. What it has in common with EsysTpm is in test_esys and test_tpm_faults."""

from __future__ import annotations

import os
import random
import struct
import subprocess
import sys
import tty
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa

from contracts.tpm import KEY, blob_for
from dps_hal.contracts import Tpm
from dps_hal.errors import AskOperator, DpsError, RetryLater
from dps_hal.host.transports import DeviceTransport, transport_for
from dps_hal.platform import hmac_sha256, random_bytes
from dps_hal.tpm import commands, operations, rules, sessions
from dps_hal.tpm.keys import (
    RSA_BYTES,
    SIGN,
    USER_WITH_AUTH,
    check_srk_public,
    registration_id_from_ek,
    sized,
    srk_public,
)
from dps_hal.tpm.upkeep import EK_CERTIFICATE_INDEX
from dps_hal.tpm.wire import WireTpm
from support.claims import assert_refused
from support.tpm import swtpm
from support.tpm.swtpm import Swtpm
from support.tpm.tap import DeviceNode, TpmTap

MESSAGE = b"message"


def import_and_sign(tpm: Tpm, activation: bytes) -> bytes:
    return tpm.sign(tpm.import_key(activation), MESSAGE)


# --- the bus


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Every salt and OAEP seed that the sessions draw; nonces are shorter, and no secret."""
    drawn: list[bytes] = []

    def draw(count: int) -> bytes:
        content = random_bytes(count)
        if count == 32:
            drawn.append(content)
        return content

    monkeypatch.setattr(sessions, "random_bytes", draw)
    return drawn


def test_the_bus_of_a_first_boot_shows_no_salt(machine: Swtpm, tap: TpmTap, planted: list[bytes]) -> None:
    machine.set_hierarchy_auth(swtpm.OWNER, b"owner's password")
    tpm = WireTpm(transport_for(tap.tcti), owner_auth=b"owner's password")
    import_and_sign(tpm, blob_for(tpm))
    tpm.release()
    assert len(planted) >= 4 and not any(tap.seen(salt) for salt in planted)


def test_the_tap_would_see_a_salt_in_clear(tap: TpmTap, planted: list[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "oaep_encrypt", lambda public, salt, label, seed: salt + bytes(RSA_BYTES - len(salt)))
    tpm = WireTpm(transport_for(tap.tcti))
    with pytest.raises(DpsError):  # the TPM decrypts it to something else
        import_and_sign(tpm, blob_for(tpm))
    tpm.release()
    assert tap.seen(planted[0])


def test_no_nonce_is_used_twice_and_none_comes_from_the_tpm(tap: TpmTap) -> None:
    tpm = WireTpm(transport_for(tap.tcti))
    import_and_sign(tpm, blob_for(tpm))
    tpm.release()
    nonces = []
    for exchange in tap.exchanges:
        if exchange.name == "StartAuthSession":
            nonces.append(exchange.command[20:36])
            nonces.append(exchange.response[16:32])
    assert len(nonces) == 4 == len(set(nonces))
    assert "GetRandom" not in tap.names


def test_a_password_that_ends_in_zeros_is_the_one_the_tpm_has(machine: Swtpm) -> None:
    password = bytes(range(1, 41)) + bytes(2)  # longer than what HMAC's own padding would make equal
    machine.set_hierarchy_auth(swtpm.OWNER, password)
    tpm = WireTpm(transport_for(machine.tcti), owner_auth=password)
    check_srk_public(tpm.storage_root_key())
    tpm.release()


# --- altered answers


class Interposer:
    """A transport with somebody on it: `change(command, response)` is what arrives instead of `response`."""

    def __init__(self, machine: Swtpm) -> None:
        self.inner = transport_for(machine.tcti)
        self.redirect: Callable[[bytes], bytes] = lambda command: command
        self.change: Callable[[bytes, bytes], bytes] = lambda command, response: response
        self.codes: list[int] = []

    def send(self, command: bytes, limit_s: float, while_waiting: Callable[[], None] | None) -> bytes:
        self.codes.append(int.from_bytes(command[6:10], "big"))
        return self.change(command, self.inner.send(self.redirect(command), limit_s, while_waiting))

    def close(self) -> None:
        self.inner.close()

    def ask(self, code: int, body: bytes, tag: int = 0x8001) -> bytes:
        """One command of the interposer's own."""
        response = self.inner.send(struct.pack(">HII", tag, 10 + len(body), code) + body, 10, None)
        assert response[6:10] == bytes(4), response.hex()
        return response[10:]


ALTERED = (  # every command of a registration
    rules.CODES["read_public"],
    rules.CODES["start_auth_session"],
    rules.CODES["policy_secret"],
    rules.CODES["activate_credential"],
    rules.CODES["import"],
    rules.CODES["load"],
    rules.CODES["hmac"],
    rules.CODES["flush_context"],
)


NOT_KNOWN_AS_ALTERED = (
    (rules.CODES["start_auth_session"], 13, "tpm.failed"),  # the handle of another session, which there could be
)

# What hal/SPEC.md, "On the TPM's bus", names as unproved, as places in an answer of this length.
UNPROVED: dict[int, Callable[[int], range]] = {
    # The policy session's own nonce, attributes and empty HMAC, behind all that the HMAC proves.
    rules.CODES["activate_credential"]: lambda length: range(length - 21, length),
    rules.CODES["flush_context"]: range,  # it says nothing
}


@pytest.mark.parametrize("code", ALTERED, ids=hex)
def test_a_byte_flipped_in_every_answer_is_refused(code: int, machine: Swtpm) -> None:
    bus = Interposer(machine)
    tpm = WireTpm(bus, exclusive=True)
    activation = blob_for(tpm)
    assert import_and_sign(tpm, activation) == hmac_sha256(KEY, MESSAGE)
    tpm.release()
    longest = 0
    offset = 0
    taken: list[int] = []

    def flip(command: bytes, response: bytes) -> bytes:
        nonlocal longest
        if int.from_bytes(command[6:10], "big") != code or len(response) <= offset:
            return response
        longest = max(longest, len(response))
        return response[:offset] + bytes([response[offset] ^ 0x10]) + response[offset + 1 :]

    bus.change = flip
    while offset <= longest:
        try:
            signature = import_and_sign(tpm, activation)
        except DpsError as error:
            altered = (error.code, type(error)) == ("tpm.bus_altered", RetryLater)
            assert altered or (code, offset, error.code) in NOT_KNOWN_AS_ALTERED, (
                f"code={code:#x} offset={offset}: {error.code}"
            )
        else:
            assert signature == hmac_sha256(KEY, MESSAGE), f"code={code:#x} offset={offset}"
            taken.append(offset)
        tpm.release()
        offset += 1
    assert longest >= 10
    unproved = UNPROVED.get(code, lambda _: range(0))(longest)
    assert [offset for offset in taken if offset < longest and offset not in unproved] == [], f"longest={longest}"
    bus.change = lambda command, response: response
    assert import_and_sign(tpm, activation) == hmac_sha256(KEY, MESSAGE)
    tpm.release()
    assert machine.leftovers() == []


@pytest.mark.parametrize("code", [rules.CODES["create_primary"], rules.CODES["evict_control"]], ids=hex)
def test_a_byte_flipped_at_the_first_boot_gives_no_other_key(code: int, machine: Swtpm) -> None:
    """Without a password the first command has a password session: its answer's end is unproved, SPEC names it."""
    bus = Interposer(machine)
    first = WireTpm(bus, exclusive=True)
    ek = first.endorsement_key()
    first.release()
    places = (
        [*range(14), 19, 200, 360, 400, 460, -39, -20, -5, -1] if code == rules.CODES["create_primary"] else range(19)
    )
    for place in places:
        machine.clear()

        def flip(command: bytes, response: bytes, place: int = place) -> bytes:
            if int.from_bytes(command[6:10], "big") != code or not -len(response) <= place < len(response):
                return response
            altered = bytearray(response)
            altered[place] ^= 0x10
            return bytes(altered)

        bus.change = flip
        tpm = WireTpm(bus, exclusive=True)
        try:
            shown = (tpm.endorsement_key(), tpm.storage_root_key())
        except DpsError as error:
            assert error.code in ("tpm.bus_altered", "tpm.failed", "tpm.unsupported"), f"place={place}: {error.code}"
            shown = (b"", b"")
        tpm.release()
        bus.change = lambda command, response: response
        again = WireTpm(bus, exclusive=True)
        true = (again.endorsement_key(), again.storage_root_key())
        again.release()
        assert true[0] == ek and shown in (true, (b"", b"")), f"code={code:#x} place={place}"
        assert machine.leftovers() == [], f"code={code:#x} place={place}"


@pytest.mark.parametrize(
    "code", [rules.CODES["get_capability"], rules.CODES["nv_read_public"], rules.CODES["nv_read"]], ids=hex
)
def test_a_byte_flipped_in_what_only_diagnostics_ask_changes_no_key_and_no_signature(code: int, machine: Swtpm) -> None:
    bus = Interposer(machine)
    tpm = WireTpm(bus, exclusive=True)
    wrapped_key = tpm.import_key(blob_for(tpm))
    ek = tpm.endorsement_key()
    tpm.release()
    certificate = bytes.fromhex("3082000c") + bytes(12)
    machine.write_nv(EK_CERTIFICATE_INDEX, certificate)
    for place in range(60):

        def flip(command: bytes, response: bytes, place: int = place) -> bytes:
            if int.from_bytes(command[6:10], "big") != code or place >= len(response):
                return response
            return response[:place] + bytes([response[place] ^ 0x10]) + response[place + 1 :]

        bus.change = flip
        for ask in (tpm.endorsement_certificate, tpm.condition):
            try:
                ask()
            except DpsError as error:
                assert error.code.startswith("tpm."), f"place={place}"
        try:
            assert tpm.endorsement_key() == ek, f"place={place}"
            assert tpm.sign(wrapped_key, MESSAGE) == hmac_sha256(KEY, MESSAGE), f"place={place}"
        except DpsError as error:  # what an exclusive TPM holds is asked when it is opened
            assert (code, error.code) == (rules.CODES["get_capability"], "tpm.bus_altered"), (
                f"place={place}: {error.code}"
            )
        tpm.release()
    bus.change = lambda command, response: response
    assert tpm.endorsement_certificate() == certificate
    tpm.release()
    assert machine.leftovers() == []


def test_one_flipped_byte_costs_one_new_session(machine: Swtpm) -> None:
    bus = Interposer(machine)
    tpm = WireTpm(bus)
    wrapped_key = tpm.import_key(blob_for(tpm))
    struck: list[int] = []

    def flip_once(command: bytes, response: bytes) -> bytes:
        if command[6:10] != struct.pack(">I", rules.CODES["hmac"]) or struck:
            return response
        struck.append(1)
        return response[:-1] + bytes([response[-1] ^ 1])

    bus.change = flip_once
    assert tpm.sign(wrapped_key, MESSAGE) == hmac_sha256(KEY, MESSAGE)
    tpm.release()
    assert struck and machine.leftovers() == []


def test_an_answer_without_its_proof_is_refused(machine: Swtpm) -> None:
    bus = Interposer(machine)
    tpm = WireTpm(bus)
    wrapped_key = tpm.import_key(blob_for(tpm))
    forged = struct.pack(">HII", 0x8001, 44, 0) + sized(bytes(32))
    bus.change = lambda command, response: (
        forged if command[6:10] == struct.pack(">I", rules.CODES["hmac"]) else response
    )
    assert_refused(lambda: tpm.sign(wrapped_key, MESSAGE), RetryLater, "tpm.bus_altered")
    tpm.release()
    assert machine.leftovers() == []


def test_an_answer_of_an_earlier_session_is_refused(machine: Swtpm) -> None:
    bus = Interposer(machine)
    tpm = WireTpm(bus)
    wrapped_key = tpm.import_key(blob_for(tpm))
    recorded: list[bytes] = []

    def replay(command: bytes, response: bytes) -> bytes:
        if command[6:10] != struct.pack(">I", rules.CODES["hmac"]):
            return response
        recorded.append(response)
        return recorded[0]

    bus.change = replay
    assert tpm.sign(wrapped_key, MESSAGE) == hmac_sha256(KEY, MESSAGE)
    assert_refused(lambda: tpm.sign(wrapped_key, MESSAGE), RetryLater, "tpm.bus_altered")
    tpm.release()


def test_whatever_a_bus_carries_ends_in_one_of_the_four_classes(machine: Swtpm) -> None:
    bus = Interposer(machine)
    tpm = WireTpm(bus, exclusive=True)
    activation = blob_for(tpm)
    seed = random.randrange(1 << 32)
    chance = random.Random(seed)

    def noise(command: bytes, response: bytes) -> bytes:
        kind = chance.randrange(40)
        if kind == 0:
            return response[: chance.randrange(len(response))]
        if kind == 1:
            return chance.randbytes(chance.randrange(60))
        if kind == 2:
            body = chance.randbytes(chance.randrange(40))
            return struct.pack(">HII", chance.choice((0x8001, 0x8002)), 10 + len(body), 0) + body
        return b"\xff" * 4096 if kind == 3 else response

    bus.change = noise
    refused = 0
    for run in range(60):
        try:
            signature = import_and_sign(tpm, activation)
            assert signature == hmac_sha256(KEY, MESSAGE), f"seed={seed} run={run}"
            tpm.endorsement_certificate()
            tpm.condition()
        except DpsError as error:
            assert error.code.startswith("tpm."), f"seed={seed} run={run}"
            refused += 1
        tpm.release()
    assert 0 < refused < 60, f"seed={seed}"


# --- leftovers, cuts, waits


def own_modulus() -> bytes:
    numbers = rsa.generate_private_key(public_exponent=65537, key_size=2048).public_key().public_numbers()
    return numbers.n.to_bytes(RSA_BYTES, "big")


def leave_a_session_and_an_object(machine: Swtpm) -> list[int]:
    start = struct.pack(">II", commands.NULL, commands.NULL) + sized(bytes(16)) + b"\x00\x00"
    for kind in (b"\x00", b"\x01"):  # HMAC, policy
        machine.command(rules.CODES["start_auth_session"], start + kind + bytes.fromhex("0010 000b"))
    loaded = srk_public(own_modulus())[:6] + struct.pack(">I", 0x00030440) + srk_public(own_modulus())[10:]
    machine.command(0x167, b"\x00\x00" + loaded + struct.pack(">I", commands.NULL))
    return machine.leftovers()


def test_only_an_exclusive_tpm_is_freed_of_what_others_left(machine: Swtpm) -> None:
    left = leave_a_session_and_an_object(machine)
    assert len(left) == 3
    shared = WireTpm(transport_for(machine.tcti))
    shared.endorsement_key()
    shared.release()
    assert machine.leftovers() == left
    ours = WireTpm(transport_for(machine.tcti), exclusive=True)
    ours.endorsement_key()
    ours.release()
    assert machine.leftovers() == []


def test_an_exclusive_tpm_starts_up_in_few_commands(tap: TpmTap) -> None:
    for _ in range(2):
        tpm = WireTpm(transport_for(tap.tcti), exclusive=True)
        tap.forget()
        tpm.storage_root_key()
        tpm.release()
    assert tap.names[:3] == ["GetCapability"] * 3
    assert tap.names.index("StartAuthSession") <= 6


def test_an_exclusive_tpm_outlives_lost_answers_of_any_command(machine: Swtpm, tap: TpmTap) -> None:
    tpm = WireTpm(transport_for(tap.tcti), exclusive=True)
    activation = blob_for(tpm)
    for command in ("StartAuthSession", "PolicySecret", "ActivateCredential", "Import", "Load", "HMAC", "FlushContext"):
        tpm.release()
        tap.forget()
        tap.drop(command=command, after_execution=True)
        assert import_and_sign(tpm, activation) == hmac_sha256(KEY, MESSAGE), f"command={command}"
    tpm.release()
    assert machine.leftovers() == []


def test_a_power_cut_at_any_command_costs_nothing_but_time(machine: Swtpm, tap: TpmTap) -> None:
    tpm = WireTpm(transport_for(tap.tcti))
    activation = blob_for(tpm)
    tpm.release()
    for cut in range(40):
        passed = 0

        def kill(name: str, at: int = cut) -> None:
            nonlocal passed
            if passed == at:
                machine.kill()
            passed += 1

        tap.on_command = kill
        try:
            signature = import_and_sign(tpm, activation)
            assert signature == hmac_sha256(KEY, MESSAGE), f"cut={cut}"
        except RetryLater as error:
            assert error.code == "tpm.absent", f"cut={cut}: {error.code}"
        tap.on_command = lambda name: None
        uncut = passed <= cut
        if not uncut:
            machine.restart()
        tpm.release()
        assert machine.leftovers() == [], f"cut={cut}"
        if uncut:
            break
    assert cut >= 10
    assert machine.property(swtpm.LOCKOUT_COUNTER) == 0


def test_keys_without_no_da_count_no_power_cut_after_release(machine: Swtpm) -> None:
    tpm = WireTpm(transport_for(machine.tcti))
    wrapped_key = tpm.import_key(blob_for(tpm, attributes=USER_WITH_AUTH | SIGN))
    for cut in range(10):
        assert tpm.sign(wrapped_key, MESSAGE) == hmac_sha256(KEY, MESSAGE), f"cut={cut}"
        tpm.release()
        machine.restart()
    assert machine.property(swtpm.LOCKOUT_COUNTER) == 0


def test_a_key_without_no_da_is_announced_also_after_a_lost_connection(machine: Swtpm, tap: TpmTap) -> None:
    tpm = WireTpm(transport_for(tap.tcti))
    wrapped_key = tpm.import_key(blob_for(tpm, attributes=USER_WITH_AUTH | SIGN))
    for cut in range(4):
        tap.forget()
        tap.drop(command="Shutdown")
        assert tpm.sign(wrapped_key, MESSAGE) == hmac_sha256(KEY, MESSAGE), f"cut={cut}"
        tpm.release()
        assert tap.names[-1] == "Shutdown", f"cut={cut}: {tap.names}"
        assert machine.leftovers() == [], f"cut={cut}"
        machine.restart()
    assert machine.property(swtpm.LOCKOUT_COUNTER) == 0


def test_a_slow_command_is_waited_for_and_the_caller_is_heard_of_each_second(tap: TpmTap) -> None:
    waits: list[int] = []
    tpm = WireTpm(transport_for(tap.tcti), while_waiting=lambda: waits.append(1))
    tpm.endorsement_key()
    tap.delay(3.5, command="ReadPublic")
    tpm.release()
    waits.clear()
    tpm.endorsement_key()
    tpm.release()
    assert len(waits) == 3


def test_a_late_answer_is_not_taken_for_the_next_one(
    machine: Swtpm, tap: TpmTap, monkeypatch: pytest.MonkeyPatch
) -> None:
    tpm = WireTpm(transport_for(tap.tcti))
    wrapped_key = tpm.import_key(blob_for(tpm))
    monkeypatch.setattr(commands, "LEAST_LIMIT_S", 0.3)
    monkeypatch.setattr(operations, "COMMAND_LIMIT_S", 0.3)
    tap.delay(1.0, command="HMAC")
    error = assert_refused(lambda: tpm.sign(wrapped_key, MESSAGE), RetryLater, "tpm.timeout")
    assert "in time" in error.message
    tpm.release()
    tap.delay(1.0, command="GetCapability")
    assert_refused(tpm.condition, RetryLater, "tpm.timeout")
    monkeypatch.undo()
    assert tpm.condition().lockout_maximum == 3  # no HMAC protects it
    assert tpm.sign(wrapped_key, MESSAGE) == hmac_sha256(KEY, MESSAGE)
    tpm.release()
    assert machine.leftovers() == []


# --- transports


def test_a_device_node_carries_a_registration(machine: Swtpm) -> None:
    node = DeviceNode(machine.port)
    tpm = WireTpm(transport_for(f"device:{node.path}"))
    assert import_and_sign(tpm, blob_for(tpm)) == hmac_sha256(KEY, MESSAGE)
    tpm.release()
    node.close()
    assert machine.leftovers() == []


def test_a_device_node_that_never_answers_times_out() -> None:
    master, slave = os.openpty()
    tty.setraw(slave)
    transport = DeviceTransport(os.ttyname(slave))
    waits: list[int] = []
    command = struct.pack(">HII", 0x8001, 10, 0)
    assert_refused(lambda: transport.send(command, 1.2, lambda: waits.append(1)), RetryLater, "tpm.timeout")
    assert len(waits) >= 1
    transport.close()
    transport.close()
    os.close(slave)
    os.close(master)


@pytest.mark.parametrize(
    ("tcti", "error_class", "code"),
    [
        ("device:/dev/there-is-none", RetryLater, "tpm.absent"),  # a driver may find its TPM late
        ("device:/dev/null", RetryLater, "tpm.absent"),
        ("device:/dev", AskOperator, "tpm.absent"),
        ("swtpm:host=127.0.0.1,port=1", RetryLater, "tpm.absent"),
        ("swtpm:host=name.invalid,port=1", RetryLater, "tpm.absent"),
        ("device:", AskOperator, "config.invalid"),
        ("device", AskOperator, "config.invalid"),
        ("mssim:host=127.0.0.1,port=1", AskOperator, "config.invalid"),
        ("swtpm:host=127.0.0.1,port=x", AskOperator, "config.invalid"),
        ("swtpm:host=,port=1", AskOperator, "config.invalid"),
        ("swtpm:path=/run/swtpm", AskOperator, "config.invalid"),
        ("", AskOperator, "config.invalid"),
    ],
)
def test_a_tcti_without_a_tpm_says_so(tcti: str, error_class: type[DpsError], code: str) -> None:
    assert_refused(lambda: WireTpm(transport_for(tcti)).endorsement_key(), error_class, code, f"tcti={tcti!r}")


def test_the_command_line_needs_no_extra_for_it(machine: Swtpm, tmp_path: Path) -> None:
    program = (
        f"import sys; sys.path[:0] = {sys.path!r}\n"
        "for absent in ('tpm2_pytss', 'cryptography', 'cffi'): sys.modules[absent] = None\n"
        "from dps_agent.host.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    words = ["--set", "tpm.backend=wire", "--set", f"tpm.tcti={machine.tcti}", "--set", f"state_dir={tmp_path}"]
    ended = subprocess.run(
        [sys.executable, "-c", program, "enroll", *words], check=False, capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == 0, ended.stderr
    tpm = WireTpm(transport_for(machine.tcti))
    assert registration_id_from_ek(tpm.endorsement_key()) in ended.stdout
    tpm.release()
    assert machine.leftovers() == []


def test_the_back_end_imports_no_library() -> None:
    program = (
        f"import sys; sys.path[:0] = {sys.path!r}; import dps_hal.host.transports;"
        "sys.exit(', '.join({'tpm2_pytss', 'cryptography', 'cffi', 'ctypes', 'ssl'} & set(sys.modules)) or None)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
