"""Microsoft's own device client, azure-iot-device, connects, sends and receives: the hub is not just ours."""

from __future__ import annotations

import contextlib
import json
import queue
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dps_emulator.attestation import Certificates, SymmetricKeys, derived_key, key_text
from dps_emulator.enrollments import Enrollment
from dps_emulator.service import Settings
from fresh_machine import azure_client
from support.cloud.chains import INTERMEDIATE, NO_CA, ROOT, party, written
from support.cloud.emulator import HUB, EmulatorInThread

CLIENT = Path(__file__).with_name("azure_iot_device_client.py")
PATIENCE_S = 120


@pytest.fixture(scope="module")
def client_python() -> Path:
    """The interpreter of an environment with the client."""
    return azure_client()


class AzureClient:
    """The client at work in its own process."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self._events: queue.Queue[dict[str, Any] | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def next(self, event: str) -> Any:
        """The content of what happens next, which must be `event`."""
        said = self._events.get(timeout=PATIENCE_S)
        if said is None or said["event"] != event:
            self._process.kill()
            assert self._process.stderr is not None
            raise AssertionError(f"{said} instead of '{event}'\n{self._process.stderr.read()}")
        return said["content"]

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._events.put(json.loads(line))
        self._events.put(None)


@contextlib.contextmanager
def client_at_work(python: Path, **order: object) -> Iterator[AzureClient]:
    with subprocess.Popen(
        [str(python), "-I", str(CLIENT)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        process.stdin.write(json.dumps(order) + "\n")
        process.stdin.flush()
        try:
            yield AzureClient(process)
        finally:
            process.kill()


@pytest.mark.parametrize("websockets", [False, True])
def test_microsofts_client_does_everything_a_device_does(client_python: Path, websockets: bool) -> None:
    with EmulatorInThread() as emulator:
        device = emulator.add_device("press-07")
        emulator.set_desired("press-07", {"period": 60})
        order = {"connectionString": device.connection_string, "caFile": str(emulator.ca_file)}
        with client_at_work(client_python, **order, port=emulator.hub_port, websockets=websockets) as client:
            assert client.next("connected") is True
            twin = client.next("twin")
            assert twin == {"desired": {"period": 60, "$version": 2}, "reported": {"$version": 1}}
            client.next("sent")
            (telemetry,) = emulator.telemetry("press-07")
            client.next("reported")
            reported = emulator.twin("press-07")["reported"]
            message_id = emulator.send_c2d("press-07", b"wake up", {"level": "50 % & more"})
            assert client.next("message") == ["wake up", {"level": "50 % & more"}, message_id]
            assert emulator.invoke("press-07", "reboot", {"delay": 5}) == (207, {"echo": {"delay": 5}})
            assert client.next("method") == "reboot"
            emulator.set_desired("press-07", {"period": 30})
            assert client.next("desired") == {"period": 30, "$version": 3}
            client.next("done")
        emulator.await_hub_log("completed")
    assert telemetry["payload"] == '{"t":21.5}'
    assert telemetry["properties"] == {
        "$.mid": "m-1",
        "$.ct": "application/json",
        "$.ce": "utf-8",
        "unit": "°C & more",
    }
    assert reported == {"firmware": {"version": "1.2"}, "$version": 2}


@pytest.mark.parametrize(("way", "websockets"), [("individual", False), ("group", True)])
def test_microsofts_client_registers_with_a_symmetric_key_and_uses_its_hub(
    client_python: Path, way: str, websockets: bool
) -> None:
    own_key = bytes(range(40))
    enrollment = Enrollment(
        way if way == "group" else "press-07", SymmetricKeys(own_key, own_key), is_group=way == "group"
    )
    key = own_key if way == "individual" else derived_key(own_key, "press-07")
    with EmulatorInThread(Settings(retry_after_s=0), [enrollment]) as emulator:
        order = {"registrationId": "press-07", "key": key_text(key), "caFile": str(emulator.ca_file)}
        with client_at_work(client_python, **order, port=emulator.hub_port, websockets=websockets) as client:
            registered = client.next("registered")
            assert registered == ["assigned", HUB, "press-07", "initialAssignment", '{"site": 7}']
            assert client.next("connected") is True
            for event in ("twin", "sent", "reported"):
                client.next(event)
        (telemetry,) = emulator.telemetry("press-07")
        assert telemetry["payload"] == '{"t":21.5}'
        requests = [(line.method, line.operation, line.status) for line in emulator.log]
    assert requests == [("PUT", "register", 202), ("GET", "operation", 200)]


@pytest.mark.parametrize("websockets", [False, True])
def test_microsofts_client_registers_with_a_certificate_and_uses_its_hub(
    client_python: Path, websockets: bool, tmp_path: Path
) -> None:
    leaf = party("press-07", INTERMEDIATE, NO_CA)
    chain = str(written(tmp_path / "chain.pem", leaf, INTERMEDIATE))
    enrollment = Enrollment("presses", Certificates(ROOT.certificate), is_group=True)
    with EmulatorInThread(Settings(retry_after_s=0, client_certificates=True), [enrollment]) as emulator:
        order = {"registrationId": "press-07", "certificate": chain, "certificateKey": chain}
        order["caFile"] = str(emulator.ca_file)
        with client_at_work(client_python, **order, port=emulator.hub_port, websockets=websockets) as client:
            assert client.next("registered")[:3] == ["assigned", HUB, "press-07"]
            assert client.next("connected") is True
            for event in ("twin", "sent", "reported"):
                client.next(event)
        (telemetry,) = emulator.telemetry("press-07")
    assert telemetry["payload"] == '{"t":21.5}'


def test_microsofts_client_is_told_that_its_key_is_wrong(client_python: Path) -> None:
    with EmulatorInThread(Settings(), [Enrollment("press-07", SymmetricKeys(bytes(32), bytes(32)))]) as emulator:
        order = {"registrationId": "press-07", "key": key_text(bytes(range(32))), "caFile": str(emulator.ca_file)}
        with client_at_work(client_python, **order, port=emulator.hub_port, websockets=False) as client:
            refused = client.next("refused")
        assert [(line.status, line.error_code) for line in emulator.log] == [(401, 401002)]
    assert "401002" in refused or "Unauthorized" in refused or "401" in refused, refused
