"""An emulator in a thread of this process, for tests and for whatever else wants one beside itself.

with EmulatorInThread() as emulator:
    credentials = emulator.add_device("press-07")             # or provision one: its key is then DPS's
    …  # connect to emulator.hub_connect_to as emulator.azure-devices.net, trusting emulator.ca_file
    emulator.await_hub_log("connected")
    emulator.fault({"operation": "telemetry", "drop": "after", "request": 1})
    …  # publish: the hub keeps the message, its PUBACK is lost
    assert [message["payload"] for message in emulator.await_telemetry(1)] == ["21.5"]
"""

import base64
import os
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, TypeVar
from urllib.parse import quote

from dps_emulator.control_socket import unwrap
from dps_emulator.enrollments import Enrollment
from dps_emulator.faults import Fault, FaultScript
from dps_emulator.hub import HubLine
from dps_emulator.issuing import Issuer
from dps_emulator.server import EmulatorServer, LogLine
from dps_emulator.service import DpsService, Settings
from dps_emulator.state import certificate_authority, issuing_root, open_store, service_secret
from dps_emulator.store import Store
from dps_emulator.tokens import signed_token

HUB = "emulator.azure-devices.net"
Item = TypeVar("Item")
PATIENCE_S = 90.0


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
        return signed_token(self.key, encoded, int(time.time() + life_s))


class HubCommands:
    """What a test asks of the hubs and does to them; failures are `dps_emulator.control_socket.ControlError`.

    `hub` is needed for a device that several hubs know.
    """

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

    def invoke(
        self, device_id: str, method: str, payload: object = None, timeout_s: float = 10.0, hub: str = ""
    ) -> tuple[int, Any]:
        """Calls a direct method; the device's status and payload."""
        request = {"method": method, "payload": payload, "timeoutS": timeout_s, "hub": hub}
        said = self.hub_command("invoke", timeout_s + 5, device=device_id, **request)
        return said["status"], said["payload"]

    def twin(self, device_id: str, hub: str = "") -> dict[str, Any]:
        """`{"desired": {…, "$version"}, "reported": {…, "$version"}}`."""
        properties: dict[str, Any] = self.hub_command("twin", device=device_id, hub=hub)["properties"]
        return properties

    def set_desired(self, device_id: str, changes: dict[str, Any], hub: str = "") -> int:
        """Patches the desired properties; their new version."""
        patched = self.hub_command("twin", device=device_id, hub=hub, desired=changes)
        return int(patched["properties"]["desired"]["$version"])

    def telemetry(self, device_id: str | None = None) -> list[dict[str, Any]]:
        """What has arrived, oldest first: `payload` (text) or `payloadBase64`, `properties`, `qos`, `dup`, …"""
        messages: list[dict[str, Any]] = self.hub_command("messages", device=device_id)["messages"]
        return messages

    def disable(self, device_id: str, hub: str = "") -> None:
        """Ends the device's connection and refuses it (CONNACK 5) until `enable`."""
        self.hub_command("disable", device=device_id, hub=hub)

    def enable(self, device_id: str, hub: str = "") -> None:
        """The inverse of `disable`."""
        self.hub_command("enable", device=device_id, hub=hub)

    def withdraw(self, device_id: str, hub: str = "") -> None:
        """Ends the device's connection and refuses it until DPS assigns it anew."""
        self.hub_command("withdraw", device=device_id, hub=hub)

    def rotate_key(self, device_id: str) -> None:
        """Gives the device another key at its hub; a connection lasts until its token expires."""
        self.hub_command("rotate-key", device=device_id)

    def disconnect(self, device_id: str, hub: str = "") -> bool:
        """Ends the device's connection; whether it had one."""
        return bool(self.hub_command("disconnect", device=device_id, hub=hub)["wasConnected"])

    def fault(self, *entries: dict[str, Any]) -> None:
        """Replaces the fault script by these entries (see dps_emulator/faults.py); without any, nothing is broken."""
        self.hub_command("faults", script=list(entries))

    def await_telemetry(
        self, count: int, device_id: str | None = None, within_s: float = PATIENCE_S
    ) -> list[dict[str, Any]]:
        """Waits until `count` messages have arrived in all; AssertionError shows those that have."""
        return awaited(lambda: self.telemetry(device_id), count, f"messages from {device_id or 'any device'}", within_s)

    def await_reported(self, device_id: str, name: str, value: object, within_s: float = PATIENCE_S) -> None:
        """Waits until the twin has this value of what the agent reports of itself."""

        def reports() -> list[bool]:
            return [True] if self.twin(device_id)["reported"].get("dpsAgent", {}).get(name) == value else []

        awaited(reports, 1, f"reports of {name} as {value!r}", within_s)

    def await_hub_log(
        self, event: str, count: int = 1, device_id: str | None = None, within_s: float = PATIENCE_S
    ) -> list[HubLine]:
        """Waits until the log has `count` lines of this event in all; AssertionError shows the whole log."""

        def lines() -> list[HubLine]:
            return [line for line in self.hub_log if line.event == event and device_id in (None, line.device_id)]

        try:
            return awaited(lines, count, f"'{event}' lines", within_s)
        except AssertionError as error:
            raise AssertionError("\n".join([str(error), *(line.text() for line in self.hub_log)])) from None


def awaited(look: Callable[[], list[Item]], count: int, what: str, within_s: float) -> list[Item]:
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
        web_port: int | None = None,
    ) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="dps-emulator-")
        self.store = Store() if state_dir is None else open_store(state_dir)
        store = self.store
        records = store.enrollments, store.registrations, os.urandom, store.groups
        self.service = DpsService(settings or Settings(), *records, Issuer(os.urandom, issuing_root(state_dir)))
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
            self.store,
            authority,
            state_dir=state_dir,
            faults=FaultScript(faults),
            log=self.log.append,
            hub_log=self._hub_log.append,
            notice=self.notices.append,
            clock=clock,
            web_port=web_port,
            secret=service_secret(state_dir),
        )
        self.addresses = self._server.addresses  # with `web` where there is a page
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
        self.put_in_force(FaultScript(faults))

    def put_in_force(self, script: FaultScript) -> None:
        """Replaces the fault script by one that goes on counting."""
        self._server.set_faults(script)

    def stop(self) -> None:
        """Ends the server and its thread; idempotent."""
        self._server.stop()
        self._thread.join(PATIENCE_S)
        self._folder.cleanup()
        if self._thread.is_alive():
            raise RuntimeError(f"the emulator's thread did not end within {PATIENCE_S} s")
        if self.store.path is not None:
            self.store.close()

    def __enter__(self) -> "EmulatorInThread":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
