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

from fresh_machine import azure_client
from support.cloud.emulator import EmulatorInThread

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
