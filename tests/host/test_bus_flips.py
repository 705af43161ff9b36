"""One flipped bit between TPM and agent, wherever it is: the right result, or a later try; nobody is called."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from contracts.tpm import KEY, blob_for
from dps_agent.host import Provisioned
from dps_hal.contracts import TpmService
from dps_hal.errors import AskOperator, DpsError, IdentityStale, RetryLater
from dps_hal.platform import hmac_sha256
from dps_hal.tpm import operations
from dps_hal.tpm.keys import ek_public
from dps_hal.tpm.verdicts import Doubts
from support.claims import assert_refused, flipped
from support.tapped_device import Device
from support.tpm.backends import BACK_ENDS, OpenTpm
from support.tpm.swtpm import Swtpm
from support.tpm.tap import TpmTap

MESSAGE = b"message"
HEAD = (0, 1, 6, 7, 8, 9)  # tag and return or command code; the size between them is for the transport to check
Job = tuple[bytes, bytes, bytes]


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Swtpm]:
    with Swtpm(tmp_path_factory.mktemp("tpm")) as new:
        yield new


@pytest.fixture(autouse=True)
def short_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A size that was flipped is waited for; nothing else here takes as long."""
    monkeypatch.setattr(operations, "COMMAND_LIMIT_S", 10.0)


def main_job(tpm: TpmService, activation: bytes) -> Job:
    """What a registration asks of the TPM, but for the second key."""
    try:
        return tpm.endorsement_key(), tpm.storage_root_key(), tpm.sign(tpm.import_key(activation), MESSAGE)
    finally:
        tpm.release()


def places(length: int, number: int) -> Iterator[int]:
    """One bit in each kind of place of a message of `length` bytes; others in the next message."""
    step = max(1, (length - 10) // 6)
    for place in (*HEAD, *range(10, length, step), length - 1):
        yield 8 * place + (3 * place + number) % 8


@pytest.mark.parametrize("direction", ["answer", "command"])
def test_one_flipped_bit_in_any_message_of_the_main_job_is_no_operators_business(
    direction: str, machine: Swtpm, tap: TpmTap, open_tpm: OpenTpm
) -> None:
    first = open_tpm(tap.tcti)
    activation = blob_for(first)
    first.release()
    tap.forget()
    right = main_job(open_tpm(tap.tcti, exclusive=True), activation)
    assert right[2] == hmac_sha256(KEY, MESSAGE)
    passed = list(tap.exchanges)
    for number, exchange in enumerate(passed):
        content = exchange.response if direction == "answer" else exchange.command
        for bit in list(places(len(content), number))[:: 1 if direction == "answer" else 2]:
            reproduce = f"{direction} {number} ({exchange.name}), bit {bit} of {8 * len(content)}"
            seen = 0

            def flip(message: bytes, at: int = number, flips: int = bit) -> bytes:
                nonlocal seen
                seen += 1
                return flipped(message, min(flips, 8 * len(message) - 1)) if seen == at + 1 else message

            if direction == "answer":
                tap.change = lambda command, response, flip=flip: flip(response)  # type: ignore[misc]
            else:
                tap.redirect = flip
            try:
                assert main_job(open_tpm(tap.tcti, exclusive=True), activation) == right, reproduce
            except RetryLater as error:
                assert error.code.startswith("tpm."), f"{reproduce}: {error.code}"
            except DpsError as error:
                raise AssertionError(f"{reproduce}: {type(error).__name__} {error.code}: {error}") from error
            assert seen > number, reproduce
            tap.change, tap.redirect = lambda command, response: response, lambda command: command
    assert main_job(open_tpm(tap.tcti, exclusive=True), activation) == right
    assert machine.leftovers() == []


@pytest.mark.parametrize("back_end", BACK_ENDS)
def test_one_flipped_bit_in_a_registration_leaves_the_old_identity_or_a_new_one(back_end: str, tmp_path: Path) -> None:
    with Device(tmp_path, back_end) as device:
        device.provision()
        device.tap.forget()
        device.provision()
        messages = len(device.tap.exchanges)
        for number in range(0, messages, 3):
            seen = 0

            def flip(command: bytes, response: bytes, at: int = number) -> bytes:
                nonlocal seen
                seen += 1
                return flipped(response, 8 * (len(response) - 1) + at % 8) if seen == at + 1 else response

            kept = device.stored()
            device.tap.change = flip
            outcome: Provisioned | RetryLater
            try:
                outcome = device.provision()
            except RetryLater as error:
                outcome = error
            device.tap.change = lambda command, response: response
            if isinstance(outcome, RetryLater):
                assert device.stored() == kept, f"answer={number}"
            assert device.provision(force=False).already_provisioned, f"answer={number}"
        assert device.swtpm.leftovers() == []


# --- a verdict counts when it has come twice


@pytest.mark.parametrize(
    ("return_codes", "error_class", "code"),
    [
        ((0x120,), None, ""),
        ((0x143,), None, ""),
        ((0x185,), None, ""),
        ((0x1DF,), None, ""),
        ((0x120, 0x143), None, ""),
        ((0x910, 0x120), None, ""),
        ((0x120, 0x120), AskOperator, "tpm.disabled"),
        ((0x120, 0x143, 0x143), AskOperator, "tpm.unsupported"),
        ((0x1DF, 0x1DF), IdentityStale, "tpm.key_stale"),
        ((0x120, 0x143, 0x12D), RetryLater, "tpm.bus_altered"),
    ],
    ids=lambda value: "-".join(map(hex, value)) if isinstance(value, tuple) else None,
)
def test_what_would_stop_the_device_is_believed_when_the_tpm_says_it_twice(
    return_codes: tuple[int, ...],
    error_class: type[DpsError] | None,
    code: str,
    machine: Swtpm,
    tap: TpmTap,
    open_tpm: OpenTpm,
) -> None:
    tpm = open_tpm(tap.tcti)
    wrapped_key = tpm.import_key(blob_for(tpm))
    for number, return_code in enumerate(return_codes):
        tap.refuse(return_code, command="Load", skip=number)
    if error_class is None:
        assert tpm.sign(wrapped_key, MESSAGE) == hmac_sha256(KEY, MESSAGE)
    else:
        assert_refused(lambda: tpm.sign(wrapped_key, MESSAGE), error_class, code)
    assert tap.names.count("Load") == len(return_codes) + (error_class is None)
    tpm.release()
    assert machine.leftovers() == []


def test_another_endorsement_key_that_is_shown_twice_is_one(machine: Swtpm, tap: TpmTap, open_tpm: OpenTpm) -> None:
    tpm = open_tpm(tap.tcti)
    true = tpm.endorsement_key()
    tpm.release()
    other = ek_public(bytes([0xC1]) + bytes(range(1, 256)))
    for times, verdict in ((1, None), (2, "tpm.ek_changed")):
        left = [other] * times
        tap.change = (
            lambda command, response, left=left: (  # type: ignore[misc]
                show(left.pop()) if left and command[6:10] == bytes.fromhex("00000173") else response
            )
        )
        if verdict is None:
            assert tpm.endorsement_key() == true
        else:
            assert_refused(tpm.endorsement_key, AskOperator, verdict)
        tpm.release()
    tap.change = lambda command, response: response


def show(public: bytes) -> bytes:
    """ReadPublic's answer for this key."""
    from dps_hal.tpm.keys import object_name, sized

    answer = public + 2 * sized(object_name(public))
    return bytes.fromhex("8001") + (10 + len(answer)).to_bytes(4, "big") + bytes(4) + answer


def test_an_error_of_ours_and_one_that_passes_are_never_asked_for_twice() -> None:
    told: list[Callable[[], DpsError]] = [
        lambda: RetryLater("tpm.memory", "no slot"),
        lambda: AskOperator("dps.key_unsuitable", "a password"),
        lambda: AskOperator("config.invalid", "persist_at"),
    ]
    for error in told:
        assert not Doubts().weigh(error(), stale=False, in_time=True)[1]
