"""The emulator for tests: in a thread of this process, or as the program that users start."""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from dps_emulator.enrollments import Enrollment
from dps_emulator.faults import Fault, FaultScript
from dps_emulator.server import EmulatorServer, LogLine
from dps_emulator.service import DpsService, Settings
from dps_emulator.state import certificate_authority, enrollment_folder, registration_folder

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType

_TOOLS = Path(__file__).parents[2] / "tools"
_PATIENCE_S = 15.0


class EmulatorInThread:
    """A running emulator whose service, log and fault script a test can reach; use it with `with`."""

    def __init__(
        self,
        settings: Settings | None = None,
        enrollments: Sequence[Enrollment] = (),
        faults: Sequence[Fault] = (),
        state_dir: Path | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="dps-emulator-")
        if state_dir is None:
            self.service = DpsService(settings or Settings(), {}, {}, os.urandom)
        else:
            state = enrollment_folder(state_dir), registration_folder(state_dir)
            self.service = DpsService(settings or Settings(), *state, os.urandom)
        for enrollment in enrollments:
            self.service.enroll(enrollment)
        authority = certificate_authority(state_dir)
        self.ca_file = Path(self._folder.name) / "ca.pem"
        authority.cert_pem.write_to_path(str(self.ca_file))
        self.log: list[LogLine] = []  # one a request, in the order they were answered
        self.notices: list[str] = []
        self._server = EmulatorServer(
            self.service,
            authority,
            faults=FaultScript(faults),
            log=self.log.append,
            notice=self.notices.append,
            clock=clock,
        )
        self.port = self._server.port
        self._thread = threading.Thread(target=self._server.run, name="dps-emulator", daemon=True)

    @property
    def url(self) -> str:
        """Where it listens; the certificate covers 127.0.0.1 too."""
        return f"https://127.0.0.1:{self.port}"

    @property
    def connect_to(self) -> str:
        """The same as `host:port`."""
        return f"127.0.0.1:{self.port}"

    def script(self, *faults: Fault) -> None:
        """Replaces the fault script; counting starts anew."""
        self._server.faults = FaultScript(faults)

    def stop(self) -> None:
        """Ends the server and its thread; idempotent."""
        self._server.stop()
        self._thread.join(_PATIENCE_S)
        self._folder.cleanup()
        if self._thread.is_alive():
            raise RuntimeError(f"the emulator's thread did not end within {_PATIENCE_S} s")

    def __enter__(self) -> EmulatorInThread:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


class EmulatorProcess:
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
    def url(self) -> str:
        """Where it listens; the certificate covers 127.0.0.1 too."""
        return f"https://127.0.0.1:{self.port}"

    @property
    def connect_to(self) -> str:
        """The same as `host:port`."""
        return f"127.0.0.1:{self.port}"

    @property
    def stderr(self) -> str:
        """What it has written to stderr so far."""
        return self._log_file.read_text()

    @property
    def log(self) -> list[LogLine]:
        """The requests so far, in the order they were answered."""
        return [line for line in map(LogLine.parse, self.stderr.splitlines()) if line]

    def stop(self) -> int:
        """SIGTERM, then the exit status; killed and TimeoutExpired after some seconds."""
        assert self._process is not None, "never started"
        self._process.terminate()
        return self._process.wait(_PATIENCE_S)

    def __enter__(self) -> EmulatorProcess:
        with self._log_file.open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "dps_emulator.cli", "serve", *self.flags],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, "PYTHONPATH": str(_TOOLS)},
            )
        self._process = process
        try:
            line = self._first_line(process)
            if not line.startswith("listening on https://"):
                raise RuntimeError(f"dps-emulator serve {' '.join(self.flags)} did not start: {line}{self.stderr}")
            self.port = int(line.rsplit(":", 1)[1])
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    @staticmethod
    def _first_line(process: subprocess.Popen[bytes]) -> str:
        assert process.stdout is not None
        ready, _, _ = select.select([process.stdout], [], [], _PATIENCE_S)
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
