"""What tests of the emulator's commands begin with; each module has an `emulator` of its own."""

import json
from typing import Any

import pytest

from dps_emulator.cli import main
from support.cloud.emulator import EmulatorProcess


@pytest.fixture
def said(emulator: EmulatorProcess, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs a command on the emulator; its exit status and what it printed, parsed with --json."""

    def run(*words: str) -> tuple[int, Any]:
        capsys.readouterr()
        status = main([*words, "--state-dir", str(emulator.state_dir)])
        output = capsys.readouterr()
        assert "Traceback" not in output.err
        text = output.out or output.err
        return status, json.loads(text) if "--json" in words and output.out else text.strip()

    return run
