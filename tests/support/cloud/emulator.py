"""The emulator for tests: in a thread of this process (`dps_emulator.embedded`), or as the program that users start.

Either has the same commands for the hubs (`HubCommands`).
"""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from dps_emulator.control_socket import call
from dps_emulator.embedded import HUB, PATIENCE_S, DeviceCredentials, EmulatorInThread, HubCommands
from dps_emulator.hub import HubLine
from dps_emulator.server import LogLine

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Any

__all__ = ["HUB", "DeviceCredentials", "EmulatorInThread", "EmulatorProcess", "HubCommands"]
_TOOLS = Path(__file__).parents[3] / "tools"


class EmulatorProcess(HubCommands):
    """`dps-emulator serve` with the given flags, on a free port; use it with `with`.

    `state_dir` gets a folder of its own unless the test gives one that is to outlive this process.
    """

    def __init__(self, *flags: str, state_dir: Path | None = None) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="dps-emulator-")
        folder = Path(self._folder.name)
        self.state_dir = state_dir or folder / "state"
        self.ca_file = folder / "ca.pem"
        self._log_file = folder / "stderr.log"
        self.flags = ["--state-dir", str(self.state_dir), "--ca-file", str(self.ca_file), *flags]
        self.port = 0
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def stderr(self) -> str:
        """What it has written to stderr so far."""
        return self._log_file.read_text()

    @property
    def log(self) -> list[LogLine]:
        """The requests so far, in the order they were answered."""
        return [line for line in map(LogLine.parse, self.stderr.splitlines()) if line]

    @property
    def hub_log(self) -> list[HubLine]:
        """See HubCommands."""
        return [line for line in map(HubLine.parse, self.stderr.splitlines()) if line]

    def hub_command(self, command: str, deadline_s: float = 60.0, **request: Any) -> dict[str, Any]:
        """See HubCommands; the way the command line takes."""
        return call(self.state_dir, {"command": command, **request}, deadline_s)

    def stop(self) -> int:
        """SIGTERM, then the exit status; killed and TimeoutExpired after some seconds."""
        assert self._process is not None, "never started"
        self._process.terminate()
        return self._process.wait(PATIENCE_S)

    def __enter__(self) -> EmulatorProcess:
        with self._log_file.open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "dps_emulator.cli", "serve", *self.flags],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                bufsize=0,  # a line that waits in a buffer is none that select sees
                env={**os.environ, "PYTHONPATH": str(_TOOLS)},
            )
        self._process = process
        try:
            line = self._next_line(process)
            if not line.startswith("listening on https://"):
                raise RuntimeError(f"dps-emulator serve {' '.join(self.flags)} did not start: {line}{self.stderr}")
            self.port = int(line.rsplit(":", 1)[1])
            self.hub_port = int(self._next_line(process).rsplit(":", 1)[1])
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    @staticmethod
    def _next_line(process: subprocess.Popen[bytes]) -> str:
        assert process.stdout is not None
        ready, _, _ = select.select([process.stdout], [], [], PATIENCE_S)
        return process.stdout.readline().decode() if ready else "(nothing on stdout)"

    def _end(self) -> None:
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                if self._process.poll() is None:
                    self.stop()
            if self._process.poll() is None:
                self._process.kill()
                self._process.wait()
            if self._process.stdout:
                self._process.stdout.close()
        self._folder.cleanup()
