"""The recipes of docs/clients.md send to the emulator, where their clients are installed."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from debian_micropython import mosquitto, umqtt_folder
from fresh_machine import azure_client
from support.cloud.emulator import DeviceCredentials, EmulatorInThread
from support.documents import CHECKOUT, blocks_of
from support.programs.azure_node import FOLDER, WHERE_NODE_IS

PAGE = CHECKOUT / "docs" / "clients.md"
MICROPYTHON = str(Path(sys.executable).with_name("micropython"))
PATIENCE_S = 120
SENT = '{"temperature": 21.5}'
# Microsoft's clients dial port 8883 and no other.
REDIRECTED = """
import runpy, socket
connect = socket.create_connection
socket.create_connection = lambda address, *rest, **named: connect((address[0], PORT), *rest, **named)
runpy.run_path("press.py")
"""
REDIRECTED_JS = """
const tls = require("node:tls");
const connect = tls.connect;
tls.connect = (options) => connect({ ...options, port: PORT });
"""


@pytest.fixture
def emulator() -> Iterator[EmulatorInThread]:
    with EmulatorInThread() as found:
        yield found


@pytest.fixture
def device(emulator: EmulatorInThread) -> DeviceCredentials:
    return emulator.add_device("press-07")


@pytest.fixture
def folder(emulator: EmulatorInThread, tmp_path: Path) -> Path:
    """Where the page's commands leave the CA."""
    (tmp_path / "cloud").mkdir()
    shutil.copy(emulator.ca_file, tmp_path / "cloud/ca-cert.pem")
    return tmp_path


def recipe(name: str) -> str:
    (block,) = [found for found in blocks_of(PAGE) if found.detail == name]
    return block.text


def run(words: list[str], folder: Path, device: DeviceCredentials, **environ: str) -> None:
    ended = subprocess.run(
        words,
        cwd=folder,
        env={**os.environ, "DEVICE": device.connection_string, **environ},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr


def test_microsofts_client_for_python(emulator: EmulatorInThread, device: DeviceCredentials, folder: Path) -> None:
    (folder / "press.py").write_text(recipe("press.py"))
    redirected = REDIRECTED.replace("PORT", str(emulator.hub_port))
    run([str(azure_client()), "-I", "-c", redirected], folder, device)
    assert [message["payload"] for message in emulator.telemetry()] == [SENT]
    assert emulator.twin("press-07")["reported"]["firmware"] == "1.2"


@WHERE_NODE_IS
def test_microsofts_client_for_node(emulator: EmulatorInThread, device: DeviceCredentials, folder: Path) -> None:
    (folder / "press.js").write_text(recipe("press.js"))
    (folder / "redirected.js").write_text(REDIRECTED_JS.replace("PORT", str(emulator.hub_port)))
    run(["node", "-r", "./redirected.js", "press.js"], folder, device, NODE_PATH=str(FOLDER / "node_modules"))
    assert [message["payload"] for message in emulator.telemetry()] == [SENT]


@pytest.mark.skipif(not (umqtt_folder() / "complete").is_file(), reason="mip could not fetch umqtt.simple")
def test_umqtt_of_micropython(emulator: EmulatorInThread, device: DeviceCredentials, folder: Path) -> None:
    program = recipe("press_umqtt.py")
    assert "8883" in program
    (folder / "press_umqtt.py").write_text(program.replace("8883", str(emulator.hub_port)))
    token = emulator.hub_command("token", device="press-07", lifeS=3600)["token"]
    run([MICROPYTHON, "press_umqtt.py", token], folder, device, MICROPYPATH=f"{umqtt_folder()}:.frozen")
    assert [message["payload"] for message in emulator.telemetry()] == [SENT]


@contextmanager
def bridge(folder: Path, changes: dict[str, str], password: str) -> Iterator[int]:
    """The page's bridge; the port of its broker."""
    program = mosquitto()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
    text = recipe("bridge.conf").replace("listener 1883", f"listener {port}")
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    user = f"user {os.environ.get('USER', 'root')}"  # as root it would become another one
    (folder / "bridge.conf").write_text(f"{user}\n{text}remote_password {password}\n")
    with (
        (folder / "log").open("wb") as log,
        subprocess.Popen([*program, "-c", "bridge.conf"], cwd=folder, stderr=log) as process,
    ):
        try:
            yield port
        finally:
            process.kill()


def once(act: Callable[[], bool], what: str) -> None:
    until_s = time.monotonic() + PATIENCE_S
    while not act():
        assert time.monotonic() < until_s, what
        time.sleep(0.1)


def test_a_bridge_of_mosquitto(emulator: EmulatorInThread, device: DeviceCredentials, folder: Path) -> None:
    import paho.mqtt.client as paho

    token = emulator.hub_command("token", device="press-07", lifeS=86400)["token"]
    with bridge(folder, {"127.0.0.1:8883": emulator.hub_connect_to}, token) as port:
        came: list[tuple[str, bytes]] = []
        program = paho.Client(paho.CallbackAPIVersion.VERSION2)
        program.on_message = lambda _client, _data, message: came.append((message.topic, message.payload))

        def connected() -> bool:
            try:
                return program.connect("127.0.0.1", port) == 0
            except OSError:
                return False

        once(connected, "the broker did not start")
        program.loop_start()
        try:
            program.subscribe("commands/#", 1)
            emulator.await_hub_log("subscribed", within_s=PATIENCE_S)
            program.publish("telemetry", SENT, 1).wait_for_publish(PATIENCE_S)
            emulator.await_telemetry(1, "press-07", PATIENCE_S)
            emulator.send_c2d("press-07", b"open the door")
            once(lambda: len(came) > 0, "no message to the device came")
        finally:
            program.loop_stop()
    assert [message["payload"] for message in emulator.telemetry()] == [SENT]
    ((topic, payload),) = came
    assert topic.startswith("commands/") and payload == b"open the door"
