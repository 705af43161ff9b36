"""Who ends a TPM that is slow: its back end, with a clean error, before the runner gives the process up."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from contracts.tpm import KEY, blob_for
from dps_agent.effects import ImportKey, Sign
from dps_agent.host import runner
from dps_agent.host.clock import SystemClock
from dps_agent.host.parts import NoConnection
from dps_agent.host.runner import Runner
from dps_hal.contracts import Tpm
from dps_hal.errors import RetryLater
from dps_hal.host.files import FileStore
from dps_hal.platform import hmac_sha256
from dps_hal.tpm import commands, operations
from dps_hal.tpm.errors import RC_NV_SPACE
from support.backends import BACK_ENDS, OpenTpm, open_wire
from support.claims import assert_refused
from support.swtpm import Swtpm
from support.tpm_tap import TpmTap

ALWAYS = 1000
MESSAGE = b"message"


@pytest.fixture
def tap(tmp_path: Path) -> Iterator[TpmTap]:
    with Swtpm(tmp_path / "tpm") as machine, TpmTap(machine.port) as new:
        yield new


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
    while runner.worker_hangs():
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
