"""What tests of a TPM, and of a service beside a cloud, begin with; a module may have fixtures of its own instead."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from dps_emulator.service import Settings
from support.cloud.emulator import EmulatorInThread
from support.programs.running_agent import RunningAgent
from support.tpm.backends import BACK_ENDS, OpenTpm
from support.tpm.states import copy_state
from support.tpm.swtpm import Swtpm
from support.tpm.tap import TpmTap
from support.tpm.tls import TpmForTls


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Swtpm]:
    with Swtpm(tmp_path / "tpm") as new:
        yield new


@pytest.fixture
def tap(machine: Swtpm) -> Iterator[TpmTap]:
    with TpmTap(machine.port) as new:
        yield new


@pytest.fixture(scope="session")
def tls_tpm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TpmForTls]:
    one = TpmForTls(tmp_path_factory.mktemp("tpm"))
    yield one
    one.close()


@pytest.fixture(params=BACK_ENDS)
def open_tpm(request: pytest.FixtureRequest) -> OpenTpm:
    return BACK_ENDS[request.param]


@pytest.fixture
def emulator() -> Iterator[EmulatorInThread]:
    """A cloud that takes any device."""
    with EmulatorInThread(Settings(enroll_any=True, retry_after_s=0)) as found:
        yield found


@pytest.fixture
def agent(tmp_path: Path, emulator: EmulatorInThread) -> Iterator[RunningAgent]:
    """A device with a simulated TPM; not started."""
    folder = copy_state("press-07", tmp_path / "tpm")
    with RunningAgent(tmp_path, emulator, f'backend = "simulator"\ntcti = "{folder}"') as found:
        yield found
