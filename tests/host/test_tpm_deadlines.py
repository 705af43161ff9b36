"""Who ends a TPM that is slow: its back end, with a clean error, before the runner gives the process up."""

from __future__ import annotations

import time
from collections.abc import Generator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from contracts.tpm import KEY, blob_for
from dps_agent.effects import ImportKey, Sign
from dps_agent.host import runner, worker
from dps_agent.host.clock import SystemClock
from dps_agent.host.parts import NoConnection
from dps_agent.host.runner import Runner
from dps_hal.contracts import Tpm
from dps_hal.errors import AskOperator, DpsError, IdentityStale, RetryLater
from dps_hal.host.files import FileStore
from dps_hal.platform import hmac_sha256
from dps_hal.tpm import commands, operations
from dps_hal.tpm.errors import RC_NV_SPACE
from dps_hal.tpm.rules import COMMAND_LIMIT_S, KEY_CREATION_LIMIT_S
from dps_hal.tpm.verdicts import Doubts
from support.claims import assert_refused
from support.tpm.backends import BACK_ENDS, OpenTpm, open_wire
from support.tpm.swtpm import OWNER, Swtpm
from support.tpm.tap import TpmTap

ALWAYS = 1000
MESSAGE = b"message"


def runner_on(tpm: Tpm, folder: Path) -> Runner:
    return Runner(tpm=tpm, store=FileStore(str(folder)), connection=NoConnection(), clock=SystemClock())


def asking(effect: Any) -> Generator[Any, Any, Any]:
    answer: Any = yield effect
    return answer


@pytest.mark.parametrize("open_tpm", BACK_ENDS.values(), ids=BACK_ENDS)
def test_a_slow_tpm_without_room_for_the_storage_root_key_imports_and_signs(
    open_tpm: OpenTpm, tap: TpmTap, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tpm = open_tpm(tap.tcti)
    tpm.endorsement_key()
    tap.refuse(RC_NV_SPACE, command="EvictControl", times=ALWAYS)
    activation = blob_for(tpm)
    tpm.release()
    assert tpm.srk_found_at == 0
    tap.delay(1.5, command="CreatePrimary", times=ALWAYS)
    monkeypatch.setattr(runner, "TPM_DEADLINE_S", 1.2)
    one = runner_on(tpm, tmp_path)
    wrapped_key = one.run(asking(ImportKey(activation)))
    assert one.run(asking(Sign(wrapped_key, MESSAGE))) == hmac_sha256(KEY, MESSAGE)
    assert not one.stuck
    tap.forget()  # a TPM that has room again, and hangs in what makes no key
    tpm.storage_root_key()
    tap.delay(3.0, command="HMAC")
    assert_refused(lambda: one.run(asking(Sign(wrapped_key, MESSAGE))), RetryLater, "tpm.timeout")
    assert one.stuck
    while worker.worker_hangs():
        time.sleep(0.1)
    tpm.release()


def test_a_command_that_takes_too_long_is_an_error_and_the_process_goes_on(
    tap: TpmTap, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tpm = open_wire(tap.tcti)
    wrapped_key = tpm.import_key(blob_for(tpm))
    monkeypatch.setattr(commands, "LEAST_LIMIT_S", 0.3)
    monkeypatch.setattr(operations, "COMMAND_LIMIT_S", 0.8)
    monkeypatch.setattr(operations, "RELEASE_LIMIT_S", 0.3)
    monkeypatch.setattr(runner, "TPM_DEADLINE_S", 2.5)
    one = runner_on(tpm, tmp_path)
    tap.delay(3.0, command="HMAC")
    assert_refused(lambda: one.run(asking(Sign(wrapped_key, MESSAGE))), RetryLater, "tpm.timeout")
    assert not one.stuck
    tap.forget()
    monkeypatch.setattr(operations, "COMMAND_LIMIT_S", 20.0)
    monkeypatch.setattr(runner, "TPM_DEADLINE_S", 30.0)
    assert one.run(asking(Sign(wrapped_key, MESSAGE))) == hmac_sha256(KEY, MESSAGE)


# --- a verdict that a slow TPM cannot be asked for twice

TOO_SLOW_TO_ASK_AGAIN = "the first asking takes more than half of the time"
TOO_SLOW_THE_SECOND_TIME = "the second asking is over its end"
SLOWNESS = {TOO_SLOW_TO_ASK_AGAIN: (0.6, 0.6), TOO_SLOW_THE_SECOND_TIME: (0.4, 0.7)}


def slow(patch: pytest.MonkeyPatch, tap: TpmTap, command: str, taken_s: list[float]) -> None:
    """Makes `command` take so many seconds, one number for each time, of a time that only this moves on."""
    late_s = 0.0

    def take(name: str) -> None:
        nonlocal late_s
        if name == command and taken_s:
            late_s += taken_s.pop(0)

    tap.on_command = take
    patch.setattr(commands, "ticks_ms", lambda: int(late_s * 1000))
    patch.setattr(commands, "ms_since", lambda started_ms: int(late_s * 1000) - started_ms)


@pytest.mark.parametrize("shares", SLOWNESS.values(), ids=SLOWNESS)
@pytest.mark.parametrize("open_tpm", BACK_ENDS.values(), ids=BACK_ENDS)
@pytest.mark.parametrize("code", ["tpm.hierarchy_auth", "tpm.nv_full"])
def test_what_stops_the_making_of_a_key_is_named_however_slow_the_tpm_is(
    code: str, shares: tuple[float, ...], open_tpm: OpenTpm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Swtpm(tmp_path / "tpm") as machine, TpmTap(machine.port) as tap:
        if code == "tpm.hierarchy_auth":
            machine.set_hierarchy_auth(OWNER, b"secret")
        else:
            tap.refuse(RC_NV_SPACE, command="EvictControl", times=ALWAYS)
        slow(monkeypatch, tap, "CreatePrimary", [KEY_CREATION_LIMIT_S * share for share in shares])
        tpm = open_tpm(tap.tcti)
        assert_refused(tpm.endorsement_key, AskOperator, code)
        assert tap.names.count("CreatePrimary") == (1 if shares[0] > 0.5 else 2)
        tpm.release()
        assert machine.leftovers() == []


@pytest.mark.parametrize("shares", SLOWNESS.values(), ids=SLOWNESS)
@pytest.mark.parametrize("open_tpm", BACK_ENDS.values(), ids=BACK_ENDS)
@pytest.mark.parametrize(
    ("code", "command", "return_code"),
    [("tpm.blob_refused", "ActivateCredential", 0x1DF), ("tpm.key_stale", "Load", 0x1DF)],
)
def test_what_stops_a_registration_is_named_however_slow_the_tpm_is(
    code: str,
    command: str,
    return_code: int,
    shares: tuple[float, ...],
    open_tpm: OpenTpm,
    tap: TpmTap,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tpm = open_tpm(tap.tcti)
    activation = blob_for(tpm)
    wrapped_key = tpm.import_key(activation)
    tpm.release()
    tap.refuse(return_code, command=command, times=ALWAYS)
    policies = [] if command == "Load" else [0.0]  # an import starts a second session, which is fast
    taken_s = [wait_s for share in shares for wait_s in [COMMAND_LIMIT_S * share, *policies]]
    tap.exchanges.clear()
    slow(monkeypatch, tap, "StartAuthSession", taken_s)
    asked = partial(tpm.sign, wrapped_key, MESSAGE) if command == "Load" else partial(tpm.import_key, activation)
    assert_refused(asked, IdentityStale, code)
    if shares[0] > 0.5:
        assert tap.names.count(command) == 1
    tpm.release()


def test_a_verdict_counts_once_only_where_the_time_is_over_and_nothing_contradicts_it() -> None:
    full, gone = AskOperator("tpm.nv_full", "no room"), AskOperator("tpm.failed", "a session was gone")
    late, altered = RetryLater("tpm.timeout", "not in time"), RetryLater("tpm.bus_altered", "altered")
    for told, outcome in (
        (((full, False, False),), full),
        (((full, False, True), (late, False, False)), full),
        (((full, False, True), (altered, False, False)), altered),
        (((gone, True, False), (late, False, False)), late),
        (((full, False, True), (gone, False, False), (late, False, False)), late),
        (((gone, True, False), (full, False, False), (late, False, False)), late),
    ):
        doubts = Doubts()
        answers: list[tuple[DpsError, bool]] = [doubts.weigh(*said) for said in told]
        assert answers[-1] == (outcome, False), told
        assert [again for _, again in answers[:-1]] == [True] * (len(told) - 1), told
