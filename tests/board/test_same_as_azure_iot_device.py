"""A device does the same to its hub on each client: Microsoft's two, our library beside the agent, a board's.

One scenario a row of `ROWS`, each done by four devices at hubs of their own; what the hub has in the end is compared.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from board.test_hub_on_micropython import Desk
from dps_agent import pnp
from dps_agent.client import Client, Desired, Message, MethodAnswer, acknowledged
from dps_emulator.service import Settings
from emulator.test_azure_iot_device import client_at_work
from fresh_machine import azure_client
from support.board.compiled import Image, micropython
from support.cloud.emulator import EmulatorInThread
from support.documents import CHECKOUT
from support.programs.azure_node import FOLDER, WHERE_NODE_IS
from support.programs.running_agent import RunningAgent
from support.tpm.states import copy_state

MODEL = "dtmi:com:example:Gateway;1"
COMMAND = "thermostat1*getMaxMinReport"
WANTED = {"rate": 5, "thermostat1": {"__t": "c", "target": 21}}
PATIENCE_S = 120

# What the hub has of a device that did everything. Scenario: what of it.
JSON = {"$.ct": "application/json", "$.ce": "utf-8"}
ROWS: dict[str, Any] = {
    "twin": {"firmware": {"version": "1.2"}},
    "model": MODEL,
    "writable properties": {
        "rate": {"value": 6, "ac": 200, "av": 3, "ad": "done"},
        "thermostat1": {"__t": "c", "target": {"value": 21, "ac": 200, "av": 2, "ad": "done"}},
    },
    "telemetry": ['{"t":21.5}', {"$.mid": "m-1", "unit": "°C & more", **JSON}, 1],
    "component telemetry": ['{"temperature":21.5}', {"$.sub": "thermostat1", **JSON}, 1],
    "command of a component": (200, {"max": 22.5}),
    "method": (207, {"echo": {"delay": 5}}),
    "message to the device": {"text": "wake up", "level": "50 % & more"},
    "messages done with": 1,
}

Device: TypeAlias = "Iterator[tuple[EmulatorInThread, str]]"


@contextlib.contextmanager
def on_azure_iot_device(folder: Path, _image: Image) -> Device:
    """Microsoft's client, by a symmetric key."""
    with EmulatorInThread() as emulator:
        device = emulator.add_device("azure-07")
        order = {"connectionString": device.connection_string, "caFile": str(emulator.ca_file), "modelId": MODEL}
        emulator.set_desired("azure-07", WANTED)
        with client_at_work(azure_client(), **order, port=emulator.hub_port, websockets=False) as client:
            client.next("connected")
            yield emulator, "azure-07"
            client.next("done")


@contextlib.contextmanager
def on_azure_iot_device_for_node(_folder: Path, _image: Image) -> Device:
    """Microsoft's client for Node, which npm fetches."""
    modules = FOLDER / "node_modules"
    with EmulatorInThread() as emulator:
        device = emulator.add_device("node-07")
        order = {"connectionString": device.connection_string, "caFile": str(emulator.ca_file), "modelId": MODEL}
        emulator.set_desired("node-07", WANTED)
        with subprocess.Popen(
            ["node", str(CHECKOUT / "tests/emulator/azure_iot_device_client.js")],
            env={**os.environ, "NODE_PATH": str(modules)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write(json.dumps({**order, "port": emulator.hub_port}) + "\n")
            process.stdin.flush()
            late = threading.Timer(3 * PATIENCE_S, process.kill)  # whatever it hangs in: its output ends then
            late.start()
            try:
                assert json.loads(process.stdout.readline())["event"] == "connected"
                yield emulator, "node-07"
                assert json.loads(process.stdout.readline())["event"] == "done"
            finally:
                late.cancel()
                process.kill()


@contextlib.contextmanager
def on_our_library(folder: Path, _image: Image) -> Device:
    """A program with `dps_agent.client` beside the service."""
    tpm = copy_state("press-07", folder / "tpm")
    with (
        EmulatorInThread(Settings(enroll_any=True, retry_after_s=0)) as emulator,
        RunningAgent(folder, emulator, f'backend = "simulator"\ntcti = "{tpm}"') as agent,
    ):
        agent.start(environ={"DPS_AGENT_MODEL_ID": MODEL})
        agent.await_connected()
        emulator.set_desired("press-07", WANTED)
        with Client(agent.client.path) as client:

            @client.method(COMMAND)
            def report_maximum(_since: Any) -> dict[str, Any]:
                return {"max": 22.5}

            @client.method("reboot")
            def reboot(payload: Any) -> MethodAnswer:
                return MethodAnswer(207, {"echo": payload})

            @client.on_message
            def heard(message: Message) -> None:
                client.report({"heard": {"text": message.payload, "level": message.properties["level"]}})

            @client.on_desired
            def wanted(desired: Desired) -> None:
                assert desired.whole is not None and desired.changed is not None
                if "thermostat1" in desired.changed:
                    client.report(pnp.answers(desired.whole, pnp.DONE, "done"))
                    client.report({"firmware": {"version": "1.2"}})
                    client.send({"temperature": 21.5}, {"$.sub": "thermostat1"})
                    client.send({"t": 21.5}, {"$.mid": "m-1", "unit": "°C & more"})
                elif "rate" in desired.changed:
                    client.report({"rate": acknowledged(desired.whole["rate"], desired.version, 200, "done")})

            client.start()
            yield emulator, "press-07"


@contextlib.contextmanager
def on_a_board(folder: Path, image: Image) -> Device:
    """A board's program under MicroPython, with a TPM of its own."""
    desk = Desk(image, folder)
    with desk.stack:
        path = str(desk.configure(model_id=MODEL)), str(desk.folder / "flash.img")
        life = desk.lives.submit(micropython, image, "board_program", *path, "product", heap_kb=1024, timeout_s=120)
        desk.emulator.await_hub_log("connected", 1, "press-07", PATIENCE_S)
        desk.emulator.set_desired("press-07", WANTED)
        yield desk.emulator, "press-07"
        life.result()


def seen_of(emulator: EmulatorInThread, device_id: str) -> Iterator[tuple[str, Any]]:
    """Does what a cloud does, and gives what the hub has of each row."""
    until_s = time.monotonic() + PATIENCE_S

    def reported(name: str, fits: Callable[[Any], object] = bool) -> Any:
        """Waits until the device has reported that."""
        while not fits(found := emulator.twin(device_id)["reported"].get(name)):
            assert time.monotonic() < until_s, f"{name} is {found}"
            time.sleep(0.05)
        return found

    yield "twin", {"firmware": reported("firmware")}
    temperature, plain = emulator.await_telemetry(2, device_id)[:2]
    yield "component telemetry", [temperature[name] for name in ("payload", "properties", "qos")]
    yield "telemetry", [plain[name] for name in ("payload", "properties", "qos")]
    yield "model", emulator.hub_command("twin", device=device_id)["modelId"]
    yield "command of a component", emulator.invoke(device_id, COMMAND, {"since": "today"})
    yield "method", emulator.invoke(device_id, "reboot", {"delay": 5})
    emulator.send_c2d(device_id, b"wake up", {"level": "50 % & more"})
    yield "message to the device", reported("heard")
    emulator.await_hub_log("completed")
    yield "messages done with", sum(line.event == "completed" for line in emulator.hub_log)
    emulator.set_desired(device_id, {"rate": 6})
    rate = reported("rate", lambda found: found and found["value"] == 6)
    yield "writable properties", {"rate": rate, "thermostat1": reported("thermostat1")}


ON_NODE = pytest.param(on_azure_iot_device_for_node, marks=WHERE_NODE_IS)


@pytest.mark.parametrize("device", [on_azure_iot_device, ON_NODE, on_our_library, on_a_board])
def test_a_device_does_the_same_to_its_hub_on_each_client(
    device: Callable[[Path, Image], contextlib.AbstractContextManager[tuple[EmulatorInThread, str]]],
    image: Image,
    tmp_path: Path,
) -> None:
    with device(tmp_path, image) as (emulator, device_id):
        seen = dict(seen_of(emulator, device_id))
    assert seen == ROWS
