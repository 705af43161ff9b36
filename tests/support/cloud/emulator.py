"""The emulator for tests: in a thread of this process, or as the program that users start.

Either has the same commands for the hubs (`HubCommands`). A session's test in short:

    with EmulatorInThread() as emulator:
        credentials = emulator.add_device("press-07")             # or provision one: its key is then DPS's
        …  # connect to emulator.hub_connect_to as emulator.azure-devices.net, trusting emulator.ca_file
        emulator.await_hub_log("connected")
        emulator.fault({"operation": "telemetry", "drop": "after", "request": 1})
        …  # publish: the hub keeps the message, its PUBACK is lost
        assert [message["payload"] for message in emulator.await_telemetry(1)] == ["21.5"]
"""

from __future__ import annotations

import base64
import contextlib
import hmac
import os
import select
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar
from urllib.parse import quote

from dps_emulator.control import call, unwrap
from dps_emulator.enrollments import Enrollment
from dps_emulator.faults import Fault, FaultScript
from dps_emulator.hub import HubLine
from dps_emulator.server import EmulatorServer, LogLine
from dps_emulator.service import DpsService, Settings
from dps_emulator.state import certificate_authority, enrollment_folder, registration_folder

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType
    from typing import Any

HUB = "emulator.azure-devices.net"
Item = TypeVar("Item")
_TOOLS = Path(__file__).parents[3] / "tools"
_PATIENCE_S = 90.0


class DeviceCredentials(NamedTuple):
    """A device at a hub and its symmetric key."""

    hub: str
    device_id: str
    key: bytes

    @property
    def connection_string(self) -> str:
        """As Azure's tools print it."""
        key = base64.b64encode(self.key).decode()
        return f"HostName={self.hub};DeviceId={self.device_id};SharedAccessKey={key}"

    @property
    def user_name(self) -> str:
        """For MQTT."""
        return f"{self.hub}/{self.device_id}/?api-version=2021-04-12"

    def token(self, life_s: float = 3600.0, resource: str | None = None) -> str:
        """A token that expires `life_s` from now, for this device unless `resource` says otherwise."""
        encoded = quote(resource or f"{self.hub}/devices/{self.device_id}", safe="")
        expiry = int(time.time() + life_s)
        signature = base64.b64encode(hmac.digest(self.key, f"{encoded}\n{expiry}".encode(), "sha256")).decode()
        return f"SharedAccessSignature sr={encoded}&sig={quote(signature, safe='')}&se={expiry}"


class HubCommands:
    """What a test asks of the hubs and does to them; failures are `dps_emulator.control.ControlError`."""

    port = 0
    hub_port = 0

    @property
    def url(self) -> str:
        """Where it listens; the certificate covers 127.0.0.1 too."""
        return f"https://127.0.0.1:{self.port}"

    @property
    def connect_to(self) -> str:
        """The same as `host:port`."""
        return f"127.0.0.1:{self.port}"

    @property
    def hub_connect_to(self) -> str:
        """Where the hubs listen, MQTT and WebSocket, as `host:port`; the certificate covers the hubs and 127.0.0.1."""
        return f"127.0.0.1:{self.hub_port}"

    @property
    def hub_log(self) -> list[HubLine]:
        """What has happened at the hubs so far; `HubLine.event` is connected, refused, closed, telemetry, …"""
        raise NotImplementedError

    def hub_command(self, command: str, deadline_s: float = 60.0, **request: Any) -> dict[str, Any]:
        """Any command of `dps_emulator.control.Control`."""
        raise NotImplementedError

    def add_device(self, device_id: str, hub: str = HUB) -> DeviceCredentials:
        """Registers a device with a new symmetric key at a hub, without DPS."""
        added = self.hub_command("add", device=device_id, hub=hub)["connectionString"]
        return DeviceCredentials(hub, device_id, base64.b64decode(added.partition("SharedAccessKey=")[2]))

    def send_c2d(self, device_id: str, payload: bytes, properties: dict[str, str] | None = None, hub: str = "") -> str:
        """Queues a message for the device; its message id."""
        encoded = base64.b64encode(payload).decode()
        sent = self.hub_command("send-c2d", device=device_id, hub=hub, payload=encoded, properties=properties or {})
        return str(sent["messageId"])

    def invoke(self, device_id: str, method: str, payload: object = None, timeout_s: float = 10.0) -> tuple[int, Any]:
        """Calls a direct method; the device's status and payload."""
        request = {"method": method, "payload": payload, "timeoutS": timeout_s}
        said = self.hub_command("invoke", timeout_s + 5, device=device_id, **request)
        return said["status"], said["payload"]

    def twin(self, device_id: str) -> dict[str, Any]:
        """`{"desired": {…, "$version"}, "reported": {…, "$version"}}`."""
        properties: dict[str, Any] = self.hub_command("twin", device=device_id)["properties"]
        return properties

    def set_desired(self, device_id: str, changes: dict[str, Any]) -> int:
        """Patches the desired properties; their new version."""
        return int(self.hub_command("twin", device=device_id, desired=changes)["properties"]["desired"]["$version"])

    def telemetry(self, device_id: str | None = None) -> list[dict[str, Any]]:
        """What has arrived, oldest first: `payload` (text) or `payloadBase64`, `properties`, `qos`, `dup`, …"""
        messages: list[dict[str, Any]] = self.hub_command("messages", device=device_id)["messages"]
        return messages

    def disable(self, device_id: str) -> None:
        """Ends the device's connection and refuses it (CONNACK 5) until `enable`."""
        self.hub_command("disable", device=device_id)

    def enable(self, device_id: str) -> None:
        """The inverse of `disable`."""
        self.hub_command("enable", device=device_id)

    def withdraw(self, device_id: str) -> None:
        """Ends the device's connection and refuses it until DPS assigns it anew."""
        self.hub_command("withdraw", device=device_id)

    def rotate_key(self, device_id: str) -> None:
        """Gives the device another key at its hub; a connection lasts until its token expires."""
        self.hub_command("rotate-key", device=device_id)

    def disconnect(self, device_id: str) -> bool:
        """Ends the device's connection; whether it had one."""
        return bool(self.hub_command("disconnect", device=device_id)["wasConnected"])

    def fault(self, *entries: dict[str, Any]) -> None:
        """Replaces the fault script by these entries (see dps_emulator/faults.py); without any, nothing is broken."""
        self.hub_command("faults", script=list(entries))

    def await_telemetry(
        self, count: int, device_id: str | None = None, within_s: float = _PATIENCE_S
    ) -> list[dict[str, Any]]:
        """Waits until `count` messages have arrived in all; AssertionError shows those that have."""
        return _awaited(
            lambda: self.telemetry(device_id), count, f"messages from {device_id or 'any device'}", within_s
        )

    def await_hub_log(
        self, event: str, count: int = 1, device_id: str | None = None, within_s: float = _PATIENCE_S
    ) -> list[HubLine]:
        """Waits until the log has `count` lines of this event in all; AssertionError shows the whole log."""

        def lines() -> list[HubLine]:
            return [line for line in self.hub_log if line.event == event and device_id in (None, line.device_id)]

        try:
            return _awaited(lines, count, f"'{event}' lines", within_s)
        except AssertionError as error:
            raise AssertionError("\n".join([str(error), *(line.text() for line in self.hub_log)])) from None


def _awaited(look: Callable[[], list[Item]], count: int, what: str, within_s: float) -> list[Item]:
    deadline = time.monotonic() + within_s
    while len(found := look()) < count:
        assert time.monotonic() < deadline, f"{len(found)} of {count} {what} after {within_s} s: {found}"
        time.sleep(0.02)
    return found


class EmulatorInThread(HubCommands):
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
        self._hub_log: list[HubLine] = []
        self.notices: list[str] = []
        self._server = EmulatorServer(
            self.service,
            authority,
            state_dir=state_dir,
            faults=FaultScript(faults),
            log=self.log.append,
            hub_log=self._hub_log.append,
            notice=self.notices.append,
            clock=clock,
        )
        self.port = self._server.port
        self.hub_port = self._server.hub_port
        self._thread = threading.Thread(target=self._server.run, name="dps-emulator", daemon=True)

    @property
    def hub_log(self) -> list[HubLine]:
        """See HubCommands."""
        return list(self._hub_log)

    def hub_command(self, command: str, deadline_s: float = 60.0, **request: Any) -> dict[str, Any]:
        """See HubCommands."""
        return unwrap(self._server.command({"command": command, **request}, deadline_s))

    def script(self, *faults: Fault) -> None:
        """Replaces the fault script; counting starts anew."""
        self._server.set_faults(FaultScript(faults))

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
        return self._process.wait(_PATIENCE_S)

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
