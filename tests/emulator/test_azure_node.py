"""Microsoft's clients for Node register, over HTTPS, MQTT and WebSocket, and use the hub that they are assigned."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dps_emulator.attestation import Certificates, SymmetricKeys, derived_key, key_text
from dps_emulator.enrollments import Enrollment
from dps_emulator.service import Settings
from support.cloud.chains import INTERMEDIATE, NO_CA, ROOT, party, written
from support.cloud.emulator import HUB, EmulatorInThread
from support.programs.azure_node import FOLDER, WHERE_NODE_IS

pytestmark = WHERE_NODE_IS
CLIENT = Path(__file__).with_name("azure_node_client.js")
KEY = bytes(range(40))
GROUPS = [
    Enrollment("by-key", SymmetricKeys(KEY, KEY), is_group=True),
    Enrollment("by-certificate", Certificates(ROOT.certificate), is_group=True),
]


@pytest.fixture(scope="module")
def emulator() -> Iterator[EmulatorInThread]:
    with EmulatorInThread(Settings(retry_after_s=1, client_certificates=True), GROUPS) as emulator:
        yield emulator


def said(emulator: EmulatorInThread, transport: str, **order: str) -> Any:
    """What the clients say in the end."""
    whole = {**order, "port": emulator.hub_port, "caFile": str(emulator.ca_file)}
    command = ["node", str(CLIENT), str(FOLDER), transport, json.dumps(whole)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout.splitlines()[-1])


@pytest.mark.parametrize("transport", ["http", "ws"])
def test_a_symmetric_key_registers_and_sends(transport: str, emulator: EmulatorInThread) -> None:
    name = f"key-{transport}"
    order = {"registrationId": name, "key": key_text(derived_key(KEY, name))}
    assert said(emulator, transport, **order) == {"assigned": [HUB, name], "sent": True}
    assert [message["payload"] for message in emulator.telemetry(name)] == ["hello"]


@pytest.mark.parametrize("transport", ["http", "mqtt"])
def test_a_certificate_registers_and_sends(transport: str, emulator: EmulatorInThread, tmp_path: Path) -> None:
    name = f"certificate-{transport}"
    whole = str(written(tmp_path / "whole.pem", party(name, INTERMEDIATE, NO_CA), INTERMEDIATE))
    order = {"registrationId": name, "certificate": whole, "certificateKey": whole}
    assert said(emulator, transport, **order) == {"assigned": [HUB, name], "sent": True}
    assert [message["payload"] for message in emulator.telemetry(name)] == ["hello"]


def test_a_key_of_another_device_is_refused(emulator: EmulatorInThread) -> None:
    order = {"registrationId": "key-other", "key": key_text(derived_key(KEY, "key-http"))}
    assert "UnauthorizedError" in said(emulator, "http", **order)["refused"]
