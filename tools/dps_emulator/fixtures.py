"""What a test gets from the pytest plugin: a DPS, its hub, a TPM, and a device with the agent on it.

`testing` makes them. Whatever a test waits for comes within a minute, or an AssertionError says what came instead.
"""

import contextlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar
from urllib.parse import quote

from dps_emulator.agent_process import AgentProcess
from dps_emulator.breakages import THROTTLED_HUB
from dps_emulator.embedded import DeviceCredentials, EmulatorInThread, awaited
from dps_emulator.enrollments import Enrollment, enrollment_from_json
from dps_emulator.faults import FaultScript, fault_script
from dps_emulator.hub import HubLine
from dps_emulator.hub_devices import Telemetry
from dps_emulator.registrations import Registration
from dps_emulator.server import LogLine
from dps_emulator.service import Settings
from dps_emulator.swtpm_process import SwtpmProcess

WITHIN_S = 60.0
DEVICE_ID = "press-07"
Item = TypeVar("Item")
Wanted = Callable[[Item], object] | Mapping[str, Any] | str | None
# What a condition raises on a message that is not the one: another form, or a field that it lacks.
_OF_ANOTHER_FORM = (AttributeError, IndexError, KeyError, TypeError, ValueError)


class Message(NamedTuple):
    """One message that a hub has got from a device."""

    time: str
    device_id: str
    payload: bytes
    properties: dict[str, str | None]  # `$.` in front: a system property

    @property
    def text(self) -> str:
        """The payload as UTF-8."""
        return self.payload.decode()

    @property
    def json(self) -> Any:
        """The payload as JSON; raises ValueError."""
        return json.loads(self.payload)


class Awaited(Generic[Item]):
    """What has come so far, oldest first, as a sequence; and a way to wait for what is still to come."""

    def __init__(
        self,
        look: Callable[[], Iterable[Item]],
        what: str,
        document: Callable[[Item], Any],
        text: Callable[[Item], str],
    ) -> None:
        """`look` returns what is there by now, called `what`; `document` and `text` are what a condition is held to."""
        self._look = look
        self._what = what
        self._document = document
        self._text = text

    def __iter__(self) -> Iterator[Item]:
        return iter(list(self._look()))

    def __len__(self) -> int:
        return len(list(self._look()))

    def __getitem__(self, index: int) -> Item:
        return list(self._look())[index]

    def wait_for(self, wanted: Wanted[Item] = None, *, count: int = 1, within_s: float = WITHIN_S) -> Item:
        """Waits until `count` are there that fit, and returns the last of these; AssertionError shows what was there.

        `wanted` is a condition; or an object of which each field has this value; or a text; None: any fits.
        """
        odd: list[Exception] = []

        def fitting() -> list[Item]:
            odd.clear()
            return [item for item in self._look() if self._fits(item, wanted, odd)]

        try:
            return awaited(fitting, count, f"{self._what} as wanted", within_s)[count - 1]
        except AssertionError as error:
            raised = [f"the condition raised {odd[-1]!r}"] if odd else []  # before it is asked for the last time
            lines = [str(error), f"wanted: {wanted!r}", "there were:", *(f"  {item!r}" for item in self._look())]
            raise AssertionError("\n".join([*lines, *raised])) from None

    def _fits(self, item: Item, wanted: Wanted[Item], odd: list[Exception]) -> bool:
        if wanted is None:
            return True
        try:
            if isinstance(wanted, str):
                return self._text(item) == wanted
            return bool(wanted(item)) if callable(wanted) else has_all(self._document(item), wanted)
        except _OF_ANOTHER_FORM as error:
            odd.append(error)
            return False


def has_all(found: Any, wanted: Any) -> bool:
    """Whether `found` is `wanted`, or has each field of it, in objects within objects too."""
    if isinstance(wanted, Mapping):
        return isinstance(found, Mapping) and all(
            name in found and has_all(found[name], value) for name, value in wanted.items()
        )
    return bool(found == wanted)


class Layers(FaultScript):
    """Fault scripts in force at the same time, the newest first; each counts for itself."""

    def __init__(self) -> None:
        super().__init__()
        self._scripts: tuple[FaultScript, ...] = ()

    def take(self, method: str, operation: str, device: str = "") -> tuple[int, Any] | None:
        """See FaultScript."""
        found = (script.take(method, operation, device) for script in self._scripts)
        return next(filter(None, found), None)  # who comes behind is not asked, and does not count

    @contextlib.contextmanager
    def with_script(self, script: FaultScript) -> Iterator[None]:
        """Puts one in force for as long as the block lasts."""
        self._set((script, *self._scripts))
        try:
            yield
        finally:
            self._set(tuple(other for other in self._scripts if other is not script))

    def _set(self, scripts: tuple[FaultScript, ...]) -> None:
        self._scripts = scripts
        self.faults = [fault for script in scripts for fault in script.faults]


class Cloud:
    """One emulator, as the fixtures of one test or session share it."""

    def __init__(self, settings: Mapping[str, Any], web_port: int | None = None) -> None:
        """To be started; `settings` are those of `dps_emulator.service.Settings`, TypeError for others.

        With a `web_port` it has the page of `dps_emulator.web` there.
        """
        self.faults = Layers()
        self.emulator = EmulatorInThread(Settings(**{"retry_after_s": 0, **settings}), web_port=web_port)
        self.emulator.put_in_force(self.faults)
        self.settings = self.emulator.service.settings
        self.message_number = self.request_number = self.event_number = 0  # what was there before the test began

    def begin(self) -> None:
        """A test begins: what has come before does not count for it."""
        self.message_number = int(self.emulator.hub_command("messages", after=2**62)["last"])
        self.request_number = len(self.emulator.log)
        self.event_number = len(self.emulator.hub_log)

    def written(self) -> str:
        """The log, of requests and hubs, since the test began."""
        lines = [line.text() for line in self.emulator.log[self.request_number :]]
        lines += [line.text() for line in self.emulator.hub_log[self.event_number :]]
        return "\n".join(sorted(lines))  # each begins with its time


class Dps:
    """The Device Provisioning Service."""

    def __init__(self, cloud: Cloud) -> None:
        self._cloud = cloud
        self._emulator = cloud.emulator
        self.url = cloud.emulator.url  # https://127.0.0.1:PORT
        self.connect_to = (
            cloud.emulator.connect_to
        )  # 127.0.0.1:PORT, for clients that have the endpoint's name built in
        self.id_scope = cloud.settings.id_scope
        self.ca_file = cloud.emulator.ca_file

    def enroll(self, record: Mapping[str, Any]) -> str:
        """Enrols a device by its record, as the service API has it; its registration id.

        Raises dps_emulator.enrollments.EnrollmentError.
        """
        enrollment: Enrollment = enrollment_from_json(dict(record))
        self._emulator.service.enroll(enrollment)
        return enrollment.registration_id

    def registration(self, registration_id: str) -> Registration | None:
        """What is known of a device that has registered, or None."""
        return self._emulator.service.registrations.get(registration_id.lower())

    def move(self, registration_id: str, hub: str) -> None:
        """Makes the device's next registration go to another of the hubs; KeyError where it is not enrolled."""
        self._emulator.service.move(registration_id, hub)

    @property
    def requests(self) -> Awaited[LogLine]:
        """The requests that were answered: `method`, `operation`, `registration_id`, `status`, `error_code`, …"""
        return Awaited(
            lambda: self._emulator.log[self._cloud.request_number :], "requests", vars, lambda line: line.operation
        )

    def throttled(
        self, *, retry_after_s: int | None = None, times: int | None = None
    ) -> contextlib.AbstractContextManager[None]:
        """Within the block requests are answered with 429, `times` of them or all."""
        headers = {} if retry_after_s is None else {"headers": {"Retry-After": str(retry_after_s)}}
        return self.broken({"status": 429, **headers, **_times(times)})

    def unavailable(self, status: int = 503, *, times: int | None = None) -> contextlib.AbstractContextManager[None]:
        """Within the block requests are answered with this HTTP status."""
        return self.broken({"status": status, **_times(times)})

    def slow(self, seconds: float, *, times: int | None = None) -> contextlib.AbstractContextManager[None]:
        """Within the block answers come so much later."""
        return self.broken({"delayS": seconds, **_times(times)})

    def hanging_up(self, *, times: int | None = None) -> contextlib.AbstractContextManager[None]:
        """Within the block connections end before an answer."""
        return self.broken({"cutAfterBytes": -1, **_times(times)})

    def broken(self, *entries: Mapping[str, Any]) -> contextlib.AbstractContextManager[None]:
        """Within the block these entries of a fault script are in force; raises FaultScriptError."""
        return self._cloud.faults.with_script(fault_script([dict(entry) for entry in entries]))


class Hub:
    """One of the hubs."""

    def __init__(self, cloud: Cloud, name: str) -> None:
        self._cloud = cloud
        self._emulator = cloud.emulator
        self.name = name
        self.connect_to = cloud.emulator.hub_connect_to  # 127.0.0.1:PORT, MQTT and MQTT over WebSocket
        self.ca_file = cloud.emulator.ca_file

    def add_device(self, device_id: str) -> DeviceCredentials:
        """A device with a symmetric key, without DPS: `connection_string`, `user_name`, `token()`."""
        return self._emulator.add_device(device_id, self.name)

    def telemetry(self, device: "Device | str | None" = None) -> Awaited[Message]:
        """The messages of one device or all; a condition of `wait_for` that is no function is held to their JSON."""

        def look() -> list[Message]:
            wanted = None if device is None else _id_of(device)
            after = self._cloud.message_number
            records = self._emulator.hub_command("messages", device=wanted, after=after)["messages"]
            found = [Telemetry.from_json(record) for record in records if record["hub"] == self.name]
            return [Message(each.time, each.device_id, each.payload, dict(each.properties)) for each in found]

        of_whom = "any device" if device is None else _id_of(device)
        return Awaited(look, f"messages from {of_whom}", lambda message: message.json, lambda message: message.text)

    def events(self, device: "Device | str | None" = None) -> Awaited[HubLine]:
        """What has happened at the hub: `event` is connected, refused, closed, telemetry, delivered, twin-get, …"""
        others = {name.lower() for name in self._cloud.settings.hubs} - {self.name.lower()}

        def look() -> list[HubLine]:
            lines = self._emulator.hub_log[self._cloud.event_number :]
            ours = (line for line in lines if line.hub.lower() not in others)  # some are at none, or name none of ours
            return [line for line in ours if device is None or line.device_id == _id_of(device)]

        return Awaited(look, "events", vars, lambda line: line.event)

    def twin(self, device: "Device | str") -> "Twin":
        """The device's twin."""
        return Twin(self._emulator, self.name, _id_of(device))

    def invoke(
        self, device: "Device | str", method: str, payload: object = None, *, timeout_s: float = 30.0
    ) -> tuple[int, Any]:
        """Calls a direct method; the device's status and payload. Raises dps_emulator.control_socket.ControlError."""
        return self._emulator.invoke(_id_of(device), method, payload, timeout_s, self.name)

    def send(self, device: "Device | str", payload: bytes | str, properties: Mapping[str, str] | None = None) -> str:
        """Queues a message for the device; its message id."""
        content = payload.encode() if isinstance(payload, str) else payload
        return self._emulator.send_c2d(_id_of(device), content, dict(properties or {}), self.name)

    def disconnect(self, device: "Device | str") -> bool:
        """Ends the device's connection; whether it had one."""
        return self._emulator.disconnect(_id_of(device), self.name)

    def disable(self, device: "Device | str") -> None:
        """Ends the device's connection and refuses it until `enable`."""
        self._emulator.disable(_id_of(device), self.name)

    def enable(self, device: "Device | str") -> None:
        """The inverse of `disable`."""
        self._emulator.enable(_id_of(device), self.name)

    def withdraw(self, device: "Device | str") -> None:
        """Ends the device's connection and refuses it until DPS assigns it anew."""
        self._emulator.withdraw(_id_of(device), self.name)

    def throttled(self, *, times: int | None = None) -> contextlib.AbstractContextManager[None]:
        """Within the block: as a hub throttles connections, twins and telemetry."""
        return self.broken(*({**entry, **_times(times)} for entry in THROTTLED_HUB))

    def refusing(self, code: int = 5, *, times: int | None = None) -> contextlib.AbstractContextManager[None]:
        """Within the block connections are refused with this code of a CONNACK."""
        return self.broken({"operation": "connect", "connack": code, **_times(times)})

    def dropping(
        self, operation: str, *, after: bool = False, times: int | None = None
    ) -> contextlib.AbstractContextManager[None]:
        """Within the block the connection ends at this operation; `after`: the hub has acted, its answer is unsent."""
        return self.broken({"operation": operation, "drop": "after" if after else "before", **_times(times)})

    def slow(self, seconds: float, *, times: int | None = None) -> contextlib.AbstractContextManager[None]:
        """Within the block the hub acts so much later."""
        return self.broken({"method": "MQTT", "delayS": seconds, **_times(times)})

    def broken(self, *entries: Mapping[str, Any]) -> contextlib.AbstractContextManager[None]:
        """See Dps.broken."""
        return self._cloud.faults.with_script(fault_script([dict(entry) for entry in entries]))


class Twin:
    """A device's twin at its hub."""

    def __init__(self, emulator: EmulatorInThread, hub: str, device_id: str) -> None:
        self._emulator = emulator
        self._hub = hub
        self._device_id = device_id

    @property
    def desired(self) -> dict[str, Any]:
        """With `$version`."""
        return dict(self._emulator.twin(self._device_id, self._hub)["desired"])

    @property
    def reported(self) -> dict[str, Any]:
        """With `$version`."""
        return dict(self._emulator.twin(self._device_id, self._hub)["reported"])

    def set_desired(self, changes: Mapping[str, Any]) -> int:
        """Merges into the desired properties; their new version."""
        return self._emulator.set_desired(self._device_id, dict(changes), self._hub)

    def wait_for(
        self, wanted: Callable[[dict[str, Any]], object] | Mapping[str, Any], *, within_s: float = WITHIN_S
    ) -> dict[str, Any]:
        """Waits until the reported properties fit, and returns them; see Awaited."""
        states: Awaited[dict[str, Any]] = Awaited(
            lambda: [self.reported], f"states of {self._device_id}", lambda found: found, json.dumps
        )
        return states.wait_for(wanted, within_s=within_s)


class Tpm:
    """A TPM in software: swtpm, or the simulator that comes with the agent."""

    def __init__(self, folder: Path, process: SwtpmProcess | None) -> None:
        self.folder = folder
        self.process = process

    @property
    def backend(self) -> str:
        """The agent's setting `tpm.backend`."""
        return "simulator" if self.process is None else "wire"

    @property
    def tcti(self) -> str:
        """The agent's setting `tpm.tcti`; of swtpm the name by which tpm2-tss reaches it too."""
        return str(self.folder) if self.process is None else self.process.tcti

    def cut_power(self) -> None:
        """Off and on again, without a word before; the simulator has no state that would be lost."""
        if self.process is not None:
            self.process.restart()


@contextlib.contextmanager
def software_tpm(kind: str) -> Iterator[Tpm]:
    """A new TPM: `swtpm`, `simulator`, or `auto`, which is swtpm where that is installed."""
    with tempfile.TemporaryDirectory(prefix="dps-tpm-") as name:
        if kind == "simulator" or (kind == "auto" and shutil.which("swtpm") is None):
            yield Tpm(Path(name), None)
            return
        with SwtpmProcess(Path(name)) as process:
            yield Tpm(Path(name), process)


class Device(AgentProcess):
    """A device with the agent on it: enrolled, provisioned, connected; a process of its own."""

    def __init__(self, folder: Path, cloud: Cloud, tpm: Tpm, settings: str) -> None:
        """`settings` are the text of further settings of the agent."""
        emulator = cloud.emulator
        self.id = DEVICE_ID
        self.tpm = tpm
        super().__init__(
            folder,
            f'id_scope = "{cloud.settings.id_scope}"\nregistration_id = "{self.id}"\nendpoint = "{emulator.url}"\n'
            f'ca_file = "{emulator.ca_file}"\n'
            f'[hub]\nconnect_to = "{emulator.hub_connect_to}"\nca_file = "{emulator.ca_file}"\n'
            f"hub_suffixes = {json.dumps(list(cloud.settings.hubs))}\n"
            f'[tpm]\nbackend = "{tpm.backend}"\ntcti = "{tpm.tcti}"\n{settings}',
        )

    @property
    def socket(self) -> Path:
        """Where programs on the device reach the agent; `dps_agent.client.Client(socket)`."""
        return Path(self.client.path)

    def send(self, payload: Any, properties: Mapping[str, str] | None = None) -> None:
        """Sends telemetry through the agent, as a program on the device does; when this returns the hub has it.

        `payload`: bytes or text as they are, anything else as JSON.
        """
        content = payload.encode() if isinstance(payload, str) else payload
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        query = "&".join(
            f"{quote(name, safe='')}={quote(value, safe='')}" for name, value in (properties or {}).items()
        )
        status, answer = self.client.ask("POST", f"/telemetry?{query}", body)
        assert status == 200, f"the agent answered {status}: {answer}"

    def restart(self) -> None:
        """Ends the agent and starts it again; it is connected when this returns."""
        self.end()
        self.start()
        self.await_connected()


@contextlib.contextmanager
def running_device(cloud: Cloud, dps: Dps, tpm: Tpm, settings: str, known: list[Device]) -> Iterator[Device]:
    """A device that is connected; from its start to its end it is one of the `known`."""
    with tempfile.TemporaryDirectory(prefix="dps-device-") as name, Device(Path(name), cloud, tpm, settings) as device:
        known.append(device)
        try:
            endorsement_key = device.command("enroll")["endorsementKey"]
            tpm_attestation = {"type": "tpm", "tpm": {"endorsementKey": endorsement_key}}
            dps.enroll({"registrationId": device.id, "attestation": tpm_attestation})
            device.start()
            device.await_connected()
            yield device
            if device.process is not None:
                device.end()
        finally:
            known.remove(device)


def _id_of(device: Device | str) -> str:
    return device if isinstance(device, str) else device.id


def _times(times: int | None) -> dict[str, int]:
    return {} if times is None else {"times": times}
