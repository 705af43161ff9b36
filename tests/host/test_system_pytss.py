"""EsysTpm on the distribution's own Python and tpm2-pytss: the same code as on the newest one."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest

from contracts.tpm import CLAIMS
from support.tpm.swtpm import Swtpm

CHECKOUT = Path(__file__).parents[2]
SYSTEM_PYTHON = "/usr/bin/python3"
PROGRAM = "tests/support/tpm/system_pytss.py"


@pytest.fixture
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Swtpm, Swtpm]]:
    with Swtpm(tmp_path_factory.mktemp("tpm")) as first, Swtpm(tmp_path_factory.mktemp("tpm")) as second:
        yield first, second


def run(python: str, *options: str, ports: tuple[int, ...] = ()) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return subprocess.run(
        [python, *options, PROGRAM, *map(str, ports)],
        check=False,
        cwd=CHECKOUT,
        env={**environment, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )


def system_version() -> str:
    """The tpm2-pytss of this distribution: Debian 12 has the oldest that is supported, 1.2.0."""
    release = platform.freedesktop_os_release()
    if (release["ID"], release.get("VERSION_ID")) == ("debian", "12"):
        return "1.2.0"
    return ""  # whichever it has


@pytest.mark.parametrize(
    ("python", "version"),
    [(SYSTEM_PYTHON, system_version()), (sys.executable, version("tpm2-pytss"))],
    ids=["system", "newest"],
)
def test_the_contract_holds_on_each_tpm2_pytss(python: str, version: str, machines: tuple[Swtpm, Swtpm]) -> None:
    ended = run(python, ports=(machines[0].port, machines[1].port))
    print(ended.stdout)
    assert ended.returncode == 0, f"{ended.stdout}\n{ended.stderr}"
    assert ended.stdout.startswith(f"tpm2-pytss {version}")
    assert ended.stdout.splitlines()[-1] == f"{len(CLAIMS) + 1} passed, 0 failed"
    assert [machine.leftovers() for machine in machines] == [[], []]


def test_a_python_without_the_packages_says_which_to_install() -> None:
    ended = run(sys.executable, "-S")  # without site-packages
    assert ended.returncode == 2
    assert "apt-get install python3-tpm2-pytss python3-ujson" in ended.stderr and "Traceback" not in ended.stderr
