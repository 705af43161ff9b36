"""The agent as a process of its own: its settings, its socket, and all that it ever wrote.

Nothing of it is imported here: it is started with this Python, as a user's would be.
"""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from dps_emulator.local_client import LocalClient

PROGRAM = [sys.executable, "-m", "dps_agent.host.cli"]
PATIENCE_S = 120.0
_Process = TypeVar("_Process", bound="AgentProcess")
_PACKAGES = ("dps_agent", "dps_text", "dps_hal")


class AgentProcess:
    """`dps-agent run` with the settings `text`, in `folder`; use it with `with`."""

    def __init__(self, folder: Path, text: str) -> None:
        """Writes the settings, with folders for state and socket in `folder`; `start` starts it."""
        self.folder = folder
        self.state_dir = folder / "state"
        self.runtime_dir = folder / "run"
        self.settings = folder / "config.toml"
        self.text = f'state_dir = "{self.state_dir}"\nruntime_dir = "{self.runtime_dir}"\n{text}'
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
                env=environ_of_agent(environ or {}),
            )

    def command(self, *words: str, exit_status: int = 0) -> dict[str, Any]:
        """Another command of the same device, with --json; its document."""
        ended = subprocess.run(
            [*PROGRAM, "--config", str(self.settings), *words, "--json"],
            env=environ_of_agent({}),
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

    def __enter__(self: _Process) -> _Process:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()


def environ_of_agent(more: dict[str, str]) -> dict[str, str]:
    """This process's environment without what would change the agent's settings; the agent is found where this is."""
    ours = ("DPS_AGENT_", "NOTIFY_SOCKET", "WATCHDOG_", "JOURNAL_STREAM", "STATE_DIRECTORY", "RUNTIME_DIRECTORY")
    environ = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    roots: list[str] = []
    for package in _PACKAGES:
        found = importlib.util.find_spec(package)
        if found is None or found.origin is None:
            raise RuntimeError(f"the agent is not installed beside the emulator: {package} is missing")
        root = str(Path(found.origin).parents[1])
        roots += [root] * (root not in roots)
    return {**environ, "PYTHONPATH": os.pathsep.join(roots), **more}
