"""What tests of a TPM begin with; a module that shares one among its tests has a `machine` of its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from support.tpm.backends import BACK_ENDS, OpenTpm
from support.tpm.swtpm import Swtpm
from support.tpm.tap import TpmTap


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Swtpm]:
    with Swtpm(tmp_path / "tpm") as new:
        yield new


@pytest.fixture
def tap(machine: Swtpm) -> Iterator[TpmTap]:
    with TpmTap(machine.port) as new:
        yield new


@pytest.fixture(params=BACK_ENDS)
def open_tpm(request: pytest.FixtureRequest) -> OpenTpm:
    return BACK_ENDS[request.param]
