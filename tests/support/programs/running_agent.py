"""`dps-agent run` as a program: its settings, its process, its socket, and all that it ever wrote."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from support.programs.local_client import LocalClient

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from support.cloud.emulator import EmulatorInThread, EmulatorProcess

CHECKOUT = Path(__file__).parents[3]
PROGRAM = [sys.executable, "-m", "dps_agent.host.cli"]
PATIENCE_S = 120.0
SOON_S = 30.0  # what ends by itself, and not because something else gave up, is sooner over on any machine


class RunningAgent:
    """The service of one device at `emulator`; use it with `with`. `tpm` is the content of the table [tpm]."""

    def __init__(self, folder: Path, emulator: EmulatorInThread | EmulatorProcess, tpm: str, more: str = "") -> None:
        self.folder = folder
        self.emulator = emulator
        self.state_dir = folder / "state"
        self.runtime_dir = folder / "run"
        self.settings = folder / "config.toml"
        self.text = (
            f'id_scope = "0ne00000000"\nregistration_id = "press-07"\nendpoint = "{emulator.url}"\n'
            f'ca_file = "{emulator.ca_file}"\nstate_dir = "{self.state_dir}"\nruntime_dir = "{self.runtime_dir}"\n'
            f'[hub]\nconnect_to = "{emulator.hub_connect_to}"\nca_file = "{emulator.ca_file}"\n[tpm]\n{tpm}\n{more}'
        )
        self.settings.write_text(self.text)
        self.client = LocalClient(str(self.runtime_dir / "api.sock"))
        self.process: subprocess.Popen[bytes] | None = None
        self._written = folder / "stderr"

    @property
    def pid(self) -> int:
        """Of the process that runs."""
        assert self.process is not None
        return self.process.pid

    @property
    def written(self) -> str:
        """What the service wrote to stderr so far."""
        return self._written.read_text() if self._written.exists() else ""

    def start(self, *flags: str, environ: dict[str, str] | None = None) -> None:
        """Starts the service; a second start goes on where the first one ended."""
        with self._written.open("ab") as log:
            self.process = subprocess.Popen(
                [*PROGRAM, "run", "--config", str(self.settings), *flags],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=_environ(environ or {}),
            )

    def command(self, *words: str, exit_status: int = 0) -> dict[str, Any]:
        """Another command of the same device, with --json; its document."""
        ended = subprocess.run(
            [*PROGRAM, "--config", str(self.settings), *words, "--json"],
            env=_environ({}),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )
        said = (
            f"{' '.join(words)}: {ended.returncode}\n{ended.stdout}\n{ended.stderr}\nthe service wrote:\n{self.written}"
        )
        assert ended.returncode == exit_status, said
        document: dict[str, Any] = json.loads(ended.stdout)
        return document

    def status(self) -> dict[str, Any]:
        """What GET /status answers; empty while there is no socket."""
        try:
            status, document = self.client.ask("GET", "/status")
        except OSError:
            return {}
        assert status == 200 and document["state"], "an answer without a state"
        found: dict[str, Any] = document
        return found

    def await_status(
        self, condition: Callable[[dict[str, Any]], object], what: str, within_s: float = PATIENCE_S
    ) -> dict[str, Any]:
        """Waits until GET /status fits; AssertionError shows what it was, and what the service wrote."""
        until_s = time.monotonic() + within_s
        while True:
            found = self.status()
            if found and condition(found):
                return found
            ended = self.process is not None and self.process.poll() is not None
            assert time.monotonic() < until_s and not ended, f"not {what}: {found}\n{self.written}"
            time.sleep(0.02)

    def await_connected(self, connections: int = 1) -> dict[str, Any]:
        """Waits until the service is connected, and has been so often."""
        return self.await_status(lambda found: found["connected"] and found["connections"] >= connections, "connected")

    def await_state(self, state: str) -> dict[str, Any]:
        """Waits until the service is in this state."""
        return self.await_status(lambda found: found["state"] == state, state)

    def await_text(self, text: str, times: int = 1, within_s: float = PATIENCE_S) -> None:
        """Waits until the service has written this so often."""
        until_s = time.monotonic() + within_s
        while self.written.count(text) < times:
            assert time.monotonic() < until_s, f"{times} times {text!r} is not in:\n{self.written}"
            time.sleep(0.02)

    def send(self, number: signal.Signals) -> None:
        """Sends a signal to the service."""
        assert self.process is not None
        self.process.send_signal(number)

    def end(self, number: signal.Signals = signal.SIGTERM) -> tuple[int, float]:
        """Ends the service; its exit status and how many seconds that took."""
        assert self.process is not None
        began_s = time.monotonic()
        self.process.send_signal(number)
        try:
            status = self.process.wait(PATIENCE_S)
        finally:
            if self.process.poll() is None:
                self.process.kill()
                self.process.wait()
            self.process = None
        return status, time.monotonic() - began_s

    def __enter__(self) -> RunningAgent:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()


def _environ(more: dict[str, str]) -> dict[str, str]:
    ours = ("DPS_AGENT_", "NOTIFY_SOCKET", "WATCHDOG_", "JOURNAL_STREAM", "STATE_DIRECTORY", "RUNTIME_DIRECTORY")
    environ = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    paths = os.pathsep.join([str(CHECKOUT / "agent"), str(CHECKOUT / "hal")])
    return {**environ, "PYTHONPATH": paths, **more}
