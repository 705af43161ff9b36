"""The TPM's lockout: power cuts, which the TPM counts as guesses, never lead this device into it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from contracts.tpm import KEY, badly_built_blob, blob_for
from dps_agent.host import hub_token
from dps_agent.host.network.https import DpsConnection
from dps_emulator import service
from dps_hal.errors import AskOperator, DpsError, RetryLater
from dps_hal.platform import hmac_sha256
from dps_hal.tpm.keys import SIGN, USER_WITH_AUTH
from dps_hal.tpm.rules import PT_LOCKOUT_INTERVAL
from dps_hal.tpm.verdicts import locked_out
from support.claims import assert_refused
from support.tapped_device import Device
from support.tpm.backends import BACK_ENDS
from support.tpm.swtpm import LOCKOUT_COUNTER, Swtpm
from support.tpm.tap import TpmTap

MESSAGE = b"message"
MAXIMUM = 3
LONG_S = 7200
SHORT_S = 1
RC_LOCKOUT = 0x921
RC_RETRY = 0x922
RC_AUTH_FAIL = 0x98E


@pytest.fixture(params=BACK_ENDS)
def device(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Device]:
    """A provisioned device whose hub key the service did not exempt from the lockout."""
    with Device(tmp_path, request.param, no_da=False) as new:
        new.swtpm.set_lockout(MAXIMUM, LONG_S)
        new.provision()
        new.tap.forget()
        yield new


def cut_at(machine: Swtpm, tap: TpmTap, number: int) -> Callable[[], bool]:
    """Plans a power cut before the command after `number` others reaches the TPM; the answer says whether it came."""
    passed = 0

    def kill(_name: str) -> None:
        nonlocal passed
        if passed == number:
            machine.kill()
        passed += 1

    tap.on_command = kill
    return lambda: passed > number


def cut_after_hmac(machine: Swtpm, tap: TpmTap) -> None:
    """Plans a power cut when the TPM has signed and is not yet told of a power-off."""
    tap.on_command = lambda name: machine.kill() if "HMAC" in tap.names and name == "FlushContext" else None


def no_cuts(tap: TpmTap) -> None:
    tap.on_command = lambda _name: None
    tap.forget()


def lockout_answers(tap: TpmTap) -> list[str]:
    return [exchange.name for exchange in tap.exchanges if exchange.return_code == RC_LOCKOUT]


@pytest.mark.parametrize("back_end", BACK_ENDS)
def test_ten_power_cuts_at_any_command_do_not_count_for_an_exempt_key(back_end: str, tmp_path: Path) -> None:
    with Swtpm(tmp_path / "tpm") as machine, TpmTap(machine.port) as tap:
        tpm = BACK_ENDS[back_end](tap.tcti)
        activation = blob_for(tpm)
        wrapped_key = tpm.import_key(activation)
        tpm.release()
        tap.forget()
        tpm.sign(tpm.import_key(activation), MESSAGE)
        tpm.release()
        commands = len(tap.names)
        for cut in range(10):
            number = cut * commands // 10
            cut_came = cut_at(machine, tap, number)
            with pytest.raises(RetryLater) as raised:
                tpm.sign(tpm.import_key(activation), MESSAGE)
                tpm.release()  # never raises
                raise RetryLater("tpm.absent", "the cut came in release")
            assert raised.value.code == "tpm.absent", f"cut before command {number}"
            assert cut_came(), f"cut before command {number}: {tap.names}"
            no_cuts(tap)
            machine.restart()
            tpm.release()
            assert tpm.sign(wrapped_key, MESSAGE) == hmac_sha256(KEY, MESSAGE), f"cut before command {number}"
            tpm.release()
            assert machine.property(LOCKOUT_COUNTER) == 0, f"cut before command {number}"


def test_cuts_after_the_announced_end_do_not_count(device: Device) -> None:
    for cut in range(MAXIMUM + 2):
        assert device.provision(force=cut % 2 == 0).device_id == "press-07"
        names = device.tap.names
        assert "HMAC" not in names[len(names) - names[::-1].index("Shutdown") :], f"cut={cut}: {names}"
        device.swtpm.restart()
        device.tap.forget()
        assert device.swtpm.property(LOCKOUT_COUNTER) == 0, f"cut={cut}"


def test_a_cut_while_the_network_is_waited_for_does_not_count(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    request = DpsConnection.request
    signed = []

    def cut(*words: Any) -> Any:
        if "HMAC" in device.tap.names:
            signed.append(device.tap.names[-1])
            device.tap.forget()
            device.swtpm.restart()
        return request(*words)

    monkeypatch.setattr(DpsConnection, "request", cut)
    for _ in range(MAXIMUM + 1):
        device.provision()
        device.tap.forget()
    assert signed == ["Shutdown"] * len(signed) and len(signed) > MAXIMUM
    assert device.swtpm.property(LOCKOUT_COUNTER) == 0


def test_after_two_lost_signatures_the_end_is_announced_all_the_same(device: Device) -> None:
    device.provision(force=False)
    for cut in range(MAXIMUM + 1):
        device.tap.forget()
        device.tap.drop(command="HMAC", after_execution=True)
        device.tap.drop(command="HMAC", after_execution=True, skip=1)
        with pytest.raises(RetryLater, match="TPM"):
            device.provision()
        assert device.tap.names[-1] == "Shutdown", f"cut={cut}: {device.tap.names}"
        device.tap.forget()
        assert device.swtpm.leftovers() == [], f"cut={cut}"
        device.swtpm.restart()
        assert device.swtpm.property(LOCKOUT_COUNTER) == 0, f"cut={cut}"


def test_an_exempt_key_costs_no_shutdown_and_another_costs_one_for_each_signature(
    device: Device, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    device.provision(force=False)
    assert device.tap.names.count("Shutdown") == 1
    backend = request.node.callspec.params["device"]
    with Device(tmp_path / "exempt", backend) as exempt:
        exempt.provision()
        assert "Shutdown" not in exempt.tap.names


def test_before_a_cut_can_lock_the_tpm_the_device_waits_as_long_as_the_tpm_says_and_then_signs_again(
    device: Device,
) -> None:
    for cut in range(1, MAXIMUM):
        cut_after_hmac(device.swtpm, device.tap)
        with pytest.raises(DpsError) as raised:
            hub_token(device.settings)
            raise RetryLater("tpm.absent", "the cut came in release")
        assert raised.value.code == "tpm.absent"
        no_cuts(device.tap)
        device.swtpm.restart()
        assert device.swtpm.property(LOCKOUT_COUNTER) == cut
    kept, asked = device.stored(), len(device.emulator.log)
    for _ in range(3):
        for call in (lambda: hub_token(device.settings), lambda: device.provision(force=False)):
            error = assert_refused(call, RetryLater, "tpm.locked_out")
            assert error.retry_after_s == LONG_S
    assert lockout_answers(device.tap) == [] and "HMAC" not in device.tap.names
    assert device.swtpm.property(LOCKOUT_COUNTER) == MAXIMUM - 1
    assert device.stored() == kept and len(device.emulator.log) == asked

    device.swtpm.set_lockout(MAXIMUM, SHORT_S)
    until_s = time.monotonic() + 15 * SHORT_S
    while device.swtpm.property(LOCKOUT_COUNTER) and time.monotonic() < until_s:
        time.sleep(0.2)
    assert hub_token(device.settings).startswith("SharedAccessSignature ")
    assert device.provision(force=False).already_provisioned
    assert lockout_answers(device.tap) == []


# --- keys with a password of their own, which only a guess shows

COUNTED = USER_WITH_AUTH | SIGN  # no noDA


@pytest.mark.parametrize("back_end", BACK_ENDS)
def test_keys_with_a_password_cost_one_counted_guess_however_often_they_come(back_end: str, tmp_path: Path) -> None:
    with Swtpm(tmp_path / "tpm") as machine, TpmTap(machine.port) as tap:
        machine.set_lockout(10, LONG_S)
        tpm = BACK_ENDS[back_end](tap.tcti)
        good = tpm.import_key(blob_for(tpm, attributes=COUNTED))
        tap.forget()
        unsuitable = badly_built_blob(tpm, attributes=COUNTED, auth_value=b"password")
        assert_refused(lambda: tpm.import_key(unsuitable), AskOperator, "dps.key_unsuitable")
        for number in range(5):
            tpm.release()
            tpm = BACK_ENDS[back_end](tap.tcti) if number % 2 else tpm  # as after a restart
            another = badly_built_blob(tpm, attributes=COUNTED, auth_value=b"password", seed_value=bytes([number] * 32))
            refused = partial(tpm.import_key, another)
            assert assert_refused(refused, RetryLater, "tpm.locked_out", f"number={number}").retry_after_s == LONG_S
        guesses = [passed.return_code for passed in tap.exchanges if passed.name == "HMAC"]
        assert [return_code for return_code in guesses if return_code != RC_RETRY] == [RC_AUTH_FAIL]
        assert tpm.sign(good, MESSAGE) == hmac_sha256(KEY, MESSAGE)  # one that was tried before is not affected
        assert tpm.sign(tpm.import_key(blob_for(tpm)), MESSAGE) == hmac_sha256(KEY, MESSAGE)
        tpm.release()
        assert machine.property(LOCKOUT_COUNTER) == 1
        assert machine.leftovers() == []


@pytest.mark.parametrize("back_end", BACK_ENDS)
def test_where_the_first_failure_is_a_lockout_no_key_is_tried_out(back_end: str, tmp_path: Path) -> None:
    with Swtpm(tmp_path / "tpm") as machine, TpmTap(machine.port) as tap:
        tpm = BACK_ENDS[back_end](tap.tcti)
        unsuitable = badly_built_blob(tpm, attributes=COUNTED, auth_value=b"password")
        tpm.release()
        machine.set_lockout(1, LONG_S)
        assert_refused(lambda: tpm.import_key(unsuitable), AskOperator, "tpm.lockout_maximum")
        assert_refused(lambda: tpm.import_key(blob_for(tpm, attributes=COUNTED)), AskOperator, "tpm.lockout_maximum")
        assert "HMAC" not in tap.names
        assert tpm.sign(tpm.import_key(blob_for(tpm)), MESSAGE) == hmac_sha256(KEY, MESSAGE)  # with noDA
        tpm.release()
        assert (machine.property(LOCKOUT_COUNTER), machine.leftovers()) == (0, [])
        machine.set_lockout(2, LONG_S)
        assert_refused(lambda: tpm.import_key(unsuitable), AskOperator, "dps.key_unsuitable")
        tpm.release()
        assert machine.property(LOCKOUT_COUNTER) == 1


@pytest.mark.parametrize("answer", ["lost", "altered"])
@pytest.mark.parametrize("back_end", BACK_ENDS)
def test_a_guess_whose_answer_does_not_come_is_not_made_again(back_end: str, answer: str, tmp_path: Path) -> None:
    with Swtpm(tmp_path / "tpm") as machine, TpmTap(machine.port) as tap:
        machine.set_lockout(10, LONG_S)
        tpm = BACK_ENDS[back_end](tap.tcti)
        unsuitable = badly_built_blob(tpm, attributes=COUNTED, auth_value=b"password")
        if answer == "lost":
            tap.drop(command="HMAC", after_execution=True)
        else:
            tap.alter(command="HMAC", place=9)
        with pytest.raises(DpsError) as raised:
            tpm.import_key(unsuitable)
        assert raised.value.code in ("tpm.locked_out", "dps.key_unsuitable")
        tpm.release()
        assert machine.property(LOCKOUT_COUNTER) == 1
        assert machine.leftovers() == []


def test_a_service_that_hands_such_keys_out_changes_neither_identity_nor_counter(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Shown:
        """The keys that the service knows, as `badly_built_blob` asks for them."""

        def __init__(self, ek: Any, srk: Any) -> None:
            self.endorsement_key = lambda: ek.marshalled
            self.storage_root_key = lambda: srk.marshalled

    def with_password(ek: Any, srk: Any, *_words: Any, **_named: Any) -> bytes:
        return badly_built_blob(Shown(ek, srk), attributes=COUNTED, auth_value=b"password")  # type: ignore[arg-type]

    kept = device.stored()
    monkeypatch.setattr(service, "activation_blob", with_password)
    assert_refused(device.provision, AskOperator, "dps.key_unsuitable")
    for _ in range(2):
        error = assert_refused(device.provision, RetryLater, "tpm.locked_out")
        assert error.retry_after_s == LONG_S
    assert device.swtpm.property(LOCKOUT_COUNTER) == 1
    assert device.stored() == kept
    assert device.provision(force=False).already_provisioned
    assert device.swtpm.leftovers() == []


@pytest.mark.parametrize("back_end", BACK_ENDS)
def test_a_proved_key_that_the_tpm_refuses_once_costs_one_count_and_no_operator(back_end: str, tmp_path: Path) -> None:
    with Swtpm(tmp_path / "tpm") as machine, TpmTap(machine.port) as tap:
        machine.set_lockout(10, LONG_S)
        tpm = BACK_ENDS[back_end](tap.tcti)
        wrapped_key = tpm.import_key(blob_for(tpm, attributes=COUNTED))
        tpm.sign(wrapped_key, MESSAGE)
        hmac = bytes.fromhex("00000155")
        tap.redirect = lambda sent: sent[:-3] + bytes([sent[-3] ^ 1]) + sent[-2:] if sent[6:10] == hmac else sent
        assert_refused(lambda: tpm.sign(wrapped_key, MESSAGE), RetryLater, "tpm.bus_altered")
        tap.redirect = lambda sent: sent
        assert machine_counts(machine, tpm) == 1
        assert tpm.sign(wrapped_key, MESSAGE) == hmac_sha256(KEY, MESSAGE)
        assert machine_counts(machine, tpm) == 1


def machine_counts(machine: Swtpm, tpm: Any) -> int:
    tpm.release()
    return machine.property(LOCKOUT_COUNTER)


@pytest.mark.parametrize(("named_s", "asked_s"), [(0xFFFFFFFF, 86400), (86401, 86400), (7200, 7200), (0, None)])
def test_nobody_waits_longer_than_a_day_for_what_an_unproved_answer_says(named_s: int, asked_s: int | None) -> None:
    error = locked_out("the TPM is locked out", {PT_LOCKOUT_INTERVAL: named_s})
    assert error.retry_after_s == asked_s
    assert f"every {named_s or '?'} s" in error.message
