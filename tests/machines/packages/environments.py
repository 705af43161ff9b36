"""Wheel and sdist, installed into fresh environments as users do it, up to a device that has its hub."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from typing import TYPE_CHECKING

from dps_package.distributions import run
from machines.packages.lifecycle import ID_SCOPE, claim, import_enrolment, title
from support.cloud.emulator import EmulatorProcess
from support.documents import CHECKOUT, blocks_of
from support.tpm.swtpm import Swtpm

if TYPE_CHECKING:
    from pathlib import Path

INSTALL_DEADLINE_S = 600


class Installation:
    """A new environment with one distribution; `requirement` is what pip is given."""

    def __init__(self, folder: Path, requirement: str) -> None:
        self._folder = folder
        self._environ = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("DPS_AGENT_", "PYTHON", "VIRTUAL_ENV")) and not name.lower().endswith("_proxy")
        }
        self._environ["PATH"] = f"{folder}/venv/bin:/usr/bin:/bin"
        run([sys.executable, "-m", "venv", str(folder / "venv")])
        print(f"$ pip install '{requirement}'", flush=True)
        self._pip("install", "--quiet", requirement)

    def packages(self) -> set[str]:
        """The names of what is installed, pip and setuptools apart."""
        lines = self._pip("list", "--format=freeze").splitlines()
        return {line.partition("==")[0].lower() for line in lines} - {"pip", "setuptools"}

    def add(self, requirement: str) -> None:
        """Installs something else beside it."""
        self._pip("install", "--quiet", requirement)

    def write(self, name: str, text: str) -> None:
        """A file where the programs are run."""
        (self._folder / name).write_text(text)

    def run(self, command: str) -> str:
        """Runs one of the installed programs and shows its output; BuildFailed where it fails."""
        print(f"$ {command}", flush=True)
        output = run(shlex.split(command), self._environ, self._folder)
        for line in output.splitlines():
            print(f"  {line[:160]}", flush=True)
        return output

    def provision(self, emulator: EmulatorProcess, tpm: str) -> None:
        """Settings, enrolment, registration, against an emulator; `tpm` is the table [tpm]."""
        (self._folder / "config.toml").write_text(
            f'id_scope = "{ID_SCOPE}"\nendpoint = "{emulator.url}"\nca_file = "{emulator.ca_file}"\n'
            f'state_dir = "{self._folder}/device"\n[tpm]\n{tpm}'
        )
        import_enrolment(self.run("dps-agent --config config.toml enroll --format csv"), emulator.state_dir)
        self.run("dps-agent --config config.toml provision")
        claim("provisioned", "assigned" in self.run("dps-agent --config config.toml status"))

    def _pip(self, *words: str) -> str:
        pip = [str(self._folder / "venv/bin/python"), "-m", "pip", "--disable-pip-version-check", "--no-input"]
        done = subprocess.run(
            [*pip, *words],
            env=self._environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            timeout=INSTALL_DEADLINE_S,
        )
        return done.stdout


def try_distributions(folder: Path, wheel: Path, sdist: Path) -> None:
    """Every way to install from Python's index: alone, with the extra `tpm`, with those for a desk without TPM."""
    with EmulatorProcess("--id-scope", ID_SCOPE, "--retry-after", "1") as emulator:
        title("wheel alone: pure Python, TPM back end wire")
        alone = Installation(_made(folder / "alone"), str(wheel))
        claim("it brings paho-mqtt and ujson only", alone.packages() == {"dps-agent", "paho-mqtt", "ujson"})
        alone.run("dps-agent version")
        with Swtpm(folder / "tpm-wire") as tpm:
            alone.provision(emulator, f'backend = "wire"\ntcti = "{tpm.tcti}"\n')

        title("sdist with the extra tpm: tpm2-tss")
        real = Installation(_made(folder / "tpm"), f"{sdist}[tpm]")
        with Swtpm(folder / "tpm-esys") as tpm:
            real.provision(emulator, f'tcti = "{tpm.tcti}"\n')

        title("wheel with the extras simulator and emulator: a desk without any TPM")
        desk = Installation(_made(folder / "desk"), f"{wheel}[simulator,emulator]")
        desk.run("dps-emulator --help")
        desk.provision(emulator, 'backend = "simulator"\ntcti = "keys"\n')

    try_first_test(desk)


def try_first_test(desk: Installation) -> None:
    """The tests that the page about tests shows, by somebody who has the wheel and pytest alone."""
    title("a first test with pytest, as the page about tests has it")
    desk.add("pytest")
    for block in blocks_of(CHECKOUT / "docs" / "testing.md"):
        if block.kind == "file":
            desk.write(block.detail, block.text)
    first = desk.run("python -m pytest -q test_press.py")
    claim("the plugin came with the wheel, and both tests pass", "2 passed" in first)
    slow = desk.run("python -m pytest -q -o dps_emulator_tpm=simulator test_slow.py")
    claim("so do those with settings of their own", "2 passed" in slow)


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder
