"""The service API of hubs: what back ends do with devices and twins, and who may."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dps_emulator.hub_service_api import POLICY
from dps_emulator.registrations import StateError
from dps_emulator.service import MAX_BODY_BYTES
from dps_emulator.store import Store
from emulator.device_side import Client, signed_token
from emulator.paho_device import PahoDevice
from fresh_machine import azure_service
from support.cloud.emulator import HUB, DeviceCredentials, EmulatorInThread

CLIENT = Path(__file__).with_name("azure_hub_client.py")
PATIENCE_S = 60
KEY = base64.b64encode(bytes(range(32))).decode()


@pytest.fixture(scope="module")
def emulator() -> Iterator[EmulatorInThread]:
    with EmulatorInThread() as emulator:
        yield emulator


class BackEnd(Client):
    """A back end with the hubs' policy, or a token of its own."""

    def __init__(self, emulator: EmulatorInThread, policy: str = POLICY, key: bytes = b"", host: str = "") -> None:
        super().__init__(emulator.port, emulator.ca_file, PATIENCE_S)
        text = emulator.hub_command("service", ofHubs=True)["connectionString"]
        key = key or base64.b64decode(text.partition("SharedAccessKey=")[2])
        resource = host or f"127.0.0.1%3A{emulator.port}"
        self._token = signed_token(key, resource, int(time.time()) + 60, policy)

    def __enter__(self) -> BackEnd:
        return self

    def ask(self, method: str, path: str, body: object = None, if_match: str = "", **more: str) -> tuple[int, Any]:
        """Status and body; names of further headers have _ for -."""
        headers = {"Authorization": self._token, "Content-Type": "application/json"}
        headers |= {name.replace("_", "-"): text for name, text in more.items()}
        headers |= {"If-Match": if_match} if if_match else {}
        encoded = None if body is None else json.dumps(body).encode()
        self.connection.request(method, f"{path}?api-version=2021-04-12", encoded, headers)
        answer = self.connection.getresponse()
        content = answer.read()
        return answer.status, json.loads(content) if content else None


@pytest.fixture
def back_end(emulator: EmulatorInThread) -> Iterator[BackEnd]:
    with BackEnd(emulator) as back_end:
        yield back_end


def test_only_who_has_the_policys_key_is_answered(emulator: EmulatorInThread) -> None:
    wrongs: list[dict[str, Any]] = [{"policy": "registryRead"}, {"key": bytes(32)}, {"host": "other"}]
    for wrong in wrongs:
        with BackEnd(emulator, **wrong) as refused:
            status, body = refused.ask("GET", "/devices")
            assert status == 401 and body["Message"].startswith("ErrorCode:401002;unauthorised: ")


def test_a_device_is_made_changed_and_deleted(emulator: EmulatorInThread, back_end: BackEnd) -> None:
    status, made = back_end.ask("PUT", "/devices/one", {"deviceId": "one"})
    keys = made["authentication"]["symmetricKey"]
    assert status == 200 and made["connectionState"] == "Disconnected" and made["status"] == "enabled"
    for name in ("primaryKey", "secondaryKey"):
        with PahoDevice(emulator, DeviceCredentials(HUB, "one", base64.b64decode(keys[name]))) as device:
            assert device.connect() == 0
            assert back_end.ask("GET", "/devices/one")[1]["connectionState"] == "Connected"
    assert back_end.ask("PUT", "/devices/one", {})[0] == 409
    assert back_end.ask("PUT", "/devices/one", {}, "AAAA")[0] == 412
    status, changed = back_end.ask("PUT", "/devices/one", {"status": "disabled"}, f'"{made["etag"]}"')
    assert status == 200 and changed["status"] == "disabled" and changed["authentication"] == made["authentication"]
    assert back_end.ask("DELETE", "/devices/one", if_match=f'"{made["etag"]}"')[0] == 412
    assert back_end.ask("DELETE", "/devices/one", if_match="*")[0] == 204
    assert back_end.ask("GET", "/devices/one")[0] == back_end.ask("DELETE", "/devices/one")[0] == 404
    assert back_end.ask("PUT", "/devices/one", {}, "*")[0] == 404


@pytest.mark.parametrize("known", [False, True])
def test_a_device_is_written_down_whole_or_not_at_all(
    known: bool, emulator: EmulatorInThread, back_end: BackEnd, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second write of a request would fail."""
    name = f"whole-{known}"
    before = back_end.ask("PUT", f"/devices/{name}", {}) if known else None
    write_all, writes = Store.write_all, list[int]()

    def once(store: Store, *arguments: Any) -> int:
        writes.append(1)
        if len(writes) > 1:
            raise StateError("the disk is full")
        return write_all(store, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(Store, "write_all", once)
        keys = {"type": "sas", "symmetricKey": {"primaryKey": KEY, "secondaryKey": KEY}}
        status, made = back_end.ask(
            "PUT", f"/devices/{name}", {"status": "disabled", "authentication": keys}, "*" if known else ""
        )
    assert status == 200 and len(writes) == 1 and made["authentication"]["symmetricKey"]["primaryKey"] == KEY
    assert back_end.ask("GET", f"/devices/{name}")[1] == made and made["status"] == "disabled" and made != before


def test_what_a_device_proves_itself_by_stays_where_nothing_is_said_of_it(back_end: BackEnd) -> None:
    authentication = {"type": "selfSigned", "x509Thumbprint": {"primaryThumbprint": "AB" * 32}}
    made = back_end.ask("PUT", "/devices/by-x509", {"authentication": authentication})[1]
    status, changed = back_end.ask("PUT", "/devices/by-x509", {"status": "disabled"}, made["etag"])
    assert status == 200 and changed["status"] == "disabled"
    assert changed["authentication"] == made["authentication"] and made["authentication"]["type"] == "selfSigned"
    status, changed = back_end.ask("PUT", "/devices/by-x509", {"authentication": {"type": "sas"}}, "*")
    assert status == 200 and changed["authentication"]["type"] == "sas"


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("PUT", "/devices/a%20b", {}, 400),
        ("PUT", "/devices/two", {"deviceId": "three"}, 400),
        ("PUT", "/devices/two", {"status": "off"}, 400),
        ("PUT", "/devices/two", {"authentication": {"type": "sas", "symmetricKey": {"primaryKey": "AA=="}}}, 400),
        ("PUT", "/devices/two", {"authentication": {"type": "certificateAuthority"}}, 400),
        ("PUT", "/devices/two", {"authentication": {"type": "selfSigned", "x509Thumbprint": {}}}, 400),
        ("PUT", "/devices/two", [], 400),
        ("GET", "/twins/nobody", None, 404),
        ("POST", "/devices/query", {"query": "SELECT deviceId FROM devices"}, 400),
        ("POST", "/devices/query", {"query": "SELECT * FROM devices WHERE x LIKE 'a'"}, 400),
        ("POST", "/twins/nobody/methods", {}, 400),
        ("POST", "/twins/nobody/methods", {"methodName": "a", "responseTimeoutInSeconds": 301}, 400),
        ("POST", "/twins/nobody/methods", {"methodName": "a"}, 404),
        ("POST", "/jobs/create", {}, 404),
        ("PATCH", "/devices/nobody", {}, 404),
    ],
)
def test_what_makes_no_sense_is_refused(method: str, path: str, body: object, status: int, back_end: BackEnd) -> None:
    assert back_end.ask(method, path, body)[0] == status


def test_tags_are_the_back_ends_and_twins_are_found_by_them(emulator: EmulatorInThread, back_end: BackEnd) -> None:
    for name in ("press-1", "press-2", "press-3"):
        emulator.add_device(name)
        status, twin = back_end.ask(
            "PATCH", f"/twins/{name}", {"tags": {"line": name[-1:]}, "properties": {"desired": {"r": 1}}}
        )
        assert status == 200 and twin["tags"] == {"line": name[-1:]} and twin["properties"]["desired"]["r"] == 1
    assert "line" not in json.dumps(emulator.twin("press-1"))
    assert back_end.ask("PATCH", "/twins/press-1", {"tags": {"line": None}}, "AAAA")[0] == 412
    assert back_end.ask("PATCH", "/twins/press-1", {"tags": {"x": "y" * 5000}})[0] == 400
    assert back_end.ask("PATCH", "/twins/press-1", {"tags": [1]})[0] == 400

    def found(where: str) -> list[str]:
        status, twins = back_end.ask("POST", "/devices/query", {"query": f"select * from devices where {where}"})
        assert status == 200, twins
        return [twin["deviceId"] for twin in twins]

    for part in ({"desired": {"a.b": 1}}, {"desired": {"a": "y" * 5000}}):
        assert back_end.ask("PATCH", "/twins/press-1", {"tags": {"line": "9"}, "properties": part})[0] == 400
    for begin in ("", "x", "9" * 5000):
        every = {"query": "select * from devices"}
        assert back_end.ask("POST", "/devices/query", every, x_ms_continuation=begin)[0] == 400
    assert back_end.ask("POST", "/devices/query", {"query": "x" * MAX_BODY_BYTES})[0] == 413
    began_s = time.process_time()
    spaces = {"query": f"select * from devices where status ={' ' * 90_000}x"}
    assert back_end.ask("POST", "/devices/query", spaces)[0] == 400
    assert time.process_time() - began_s < 10, "of this process, which the emulator is in; a square would take minutes"
    assert found("tags.line = '2'") == found("devices.tags.line='2' AND status != 'disabled'") == ["press-2"]
    assert found("properties.desired.r = 1 and tags.line != '2'") == ["press-1", "press-3"]
    assert found("properties.desired.r = 1 AND tags.line = 2") == found("deviceId = 'nobody'") == []


def test_microsofts_client_manages_devices_and_calls_them(emulator: EmulatorInThread) -> None:
    python = azure_service()
    credentials = emulator.add_device("answering")
    with PahoDevice(emulator, credentials) as device:
        assert device.connect() == 0
        device.subscribe("$iothub/methods/POST/#")
        assert device.publish("$iothub/twin/PATCH/properties/reported/?$rid=1", b'{"firmware":"1.2"}')

        def answer() -> None:
            called = device.next_message()
            request_id = called.topic.rpartition("$rid=")[2]
            device.publish(f"$iothub/methods/res/207/?$rid={request_id}", b'{"echo":' + called.payload + b"}")

        answering = threading.Thread(target=answer)
        answering.start()
        order = {**emulator.hub_command("service", ofHubs=True), "deviceId": "answering"}
        ended = subprocess.run(
            [str(python), "-I", str(CLIENT)],
            input=json.dumps(order) + "\n",
            env={**os.environ, "REQUESTS_CA_BUNDLE": str(emulator.ca_file)},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert ended.returncode == 0, ended.stderr
        answering.join(PATIENCE_S)
    said = json.loads(ended.stdout)
    assert said["made"] == ["press-01", "enabled", "sas"] and len(base64.b64decode(said["key"])) == 64
    assert said["x509"] == "AB" * 32 and said["changed"] == ["disabled", True]
    assert {"press-01", "press-02", "answering"} <= set(said["devices"]) and "press-01" not in said["left"]
    assert said["twin"]["rate"] == 5 and said["method"] == [207, {"echo": {"delay": 5}}]
    assert said["found"] == [["answering", {"site": {"id": 7}}, "1.2"]]
