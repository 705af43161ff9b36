"""The pytest plugin as tests of somebody else use it, and run by a pytest of its own where it has to fail."""

from __future__ import annotations

import os
import ssl
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from http.client import HTTPSConnection
from pathlib import Path
from typing import Any

import pytest

from dps_emulator.control_socket import ControlError
from dps_emulator.enrollments import EnrollmentError
from dps_emulator.fixtures import Cloud, Device, Dps, Hub, has_all
from emulator.paho_device import PahoDevice

CHECKOUT = Path(__file__).parents[2]
DEADLINE_S = 180


@pytest.fixture
def dps_settings() -> dict[str, Any]:
    return {"hubs": ("one.azure-devices.net", "two.azure-devices.net")}


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Callable[..., str]]:
    """Runs tests of somebody's own in a folder of their own; what pytest says. Nothing of theirs may be left."""
    temporary = tempfile.TemporaryDirectory(prefix="own-")  # short: the name of a socket has 107 bytes

    def run(text: str, *options: str, status: int = 0) -> str:
        (tmp_path / "test_own.py").write_text(text)
        (tmp_path / "pytest.ini").write_text("[pytest]\n")
        words = [sys.executable, "-m", "pytest", "-p", "dps_emulator.testing", "-p", "no:cacheprovider", "-q", *options]
        paths = os.pathsep.join(str(CHECKOUT / name) for name in ("agent", "hal", "tools"))
        environ = {**os.environ, "PYTHONPATH": paths, "TMPDIR": temporary.name}
        for name in ("PYTEST_ADDOPTS", "PYTEST_XDIST_WORKER", "PYTEST_CURRENT_TEST"):
            environ.pop(name, None)
        done = subprocess.run(
            words, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=DEADLINE_S, check=False
        )
        assert done.returncode == status, done.stdout + done.stderr
        left = [path.name for path in Path(temporary.name).iterdir() if path.name.startswith("dps-")]
        running = [path.parent.name for path in Path("/proc").glob("[0-9]*/cmdline") if has(path, temporary.name)]
        assert (left, running) == ([], []), done.stdout
        return done.stdout + done.stderr

    with temporary:
        yield run


def has(path: Path, text: str) -> bool:
    """Whether a file of a process, which may be gone by now, has this text in it."""
    try:
        return text.encode() in path.read_bytes()
    except OSError:
        return False


def test_a_device_is_assigned_to_the_hub_of_the_fixture_and_what_it_sends_arrives(
    dps: Dps, hub: Hub, device: Device
) -> None:
    registration = dps.registration(device.id)
    assert registration is not None and registration.assignment is not None
    assert registration.assignment.hub == hub.name == "one.azure-devices.net"
    device.send({"temperature": 21.5, "press": {"line": 3, "speed": 1}}, {"kind": "a b&c"})
    device.send("plain text")
    device.send(b"\xff\x00")
    message = hub.telemetry(device).wait_for({"press": {"line": 3}})
    assert (message.device_id, message.properties["kind"]) == (device.id, "a b&c")
    assert hub.telemetry().wait_for("plain text").text == "plain text"
    assert hub.telemetry(device).wait_for(count=3).payload == b"\xff\x00"
    assert [each.payload for each in hub.telemetry(device)][1:] == [b"plain text", b"\xff\x00"]
    assert len(hub.telemetry("another")) == 0

    hub.twin(device).set_desired({"interval": 30})
    assert hub.twin(device).desired["interval"] == 30
    assert hub.twin(device).wait_for({"dpsAgent": {}})["$version"] >= 1
    assert hub.invoke(device, "ping") == (200, {})
    with pytest.raises(ControlError, match=f"{hub.name} has no device 'press-08'"):
        hub.invoke("press-08", "ping")
    device.restart()
    assert len([line for line in hub.events(device) if line.event == "connected"]) == 2


def test_faults_last_as_long_as_their_block_and_count_for_themselves(dps: Dps, device: Device) -> None:
    with dps.unavailable(times=1), dps.broken({"method": "GET", "status": 500}):
        assert _status(dps, "GET") == 500
        with dps.throttled(retry_after_s=7, times=1):
            assert _status(dps, "GET") == 429
            assert _status(dps, "PUT") == 503
            assert _status(dps, "GET") == 500
        assert _status(dps, "PUT") == 404  # the one 503 was before
    assert _status(dps, "GET") == 404
    assert dps.requests[-1].fault == 0 and dps.requests[-2].fault == 0 and dps.requests[-3].fault == 1


def _status(dps: Dps, method: str) -> int:
    """What DPS answers a request to a path of no meaning."""
    host, _, port = dps.connect_to.partition(":")
    connection = HTTPSConnection(host, int(port), context=ssl.create_default_context(cafile=str(dps.ca_file)))
    try:
        connection.request(method, "/nothing")
        return connection.getresponse().status
    finally:
        connection.close()


def test_a_device_of_another_kind_is_added_and_what_does_not_come_is_told(dps: Dps, hub: Hub) -> None:
    credentials = hub.add_device("press-08")
    assert credentials.connection_string.startswith(f"HostName={hub.name};DeviceId=press-08;SharedAccessKey=")
    with pytest.raises(EnrollmentError, match="registrationId"):
        dps.enroll({"registrationId": "?"})
    assert _status(dps, "GET") == 404
    with pytest.raises(AssertionError, match=r"(?s)0 of 1 requests as wanted.*wanted: \{'status': 429\}.*status=404"):
        dps.requests.wait_for({"status": 429}, within_s=0.1)
    with pytest.raises(AssertionError, match=r"the condition raised KeyError\('nothing'\)"):
        dps.requests.wait_for(lambda line: vars(line)["nothing"], within_s=0.1)


def test_commands_are_for_the_hub_of_the_fixture_where_another_knows_the_device_too(_cloud: Cloud, hub: Hub) -> None:
    other = Hub(_cloud, "two.azure-devices.net")
    for each in (hub, other):
        each.add_device("press-09")
    assert hub.twin("press-09").set_desired({"rate": 1}) == 2 and other.twin("press-09").desired == {"$version": 1}
    other.disable("press-09")
    assert not hub.disconnect("press-09")
    enabled = {device["hub"]: device["enabled"] for device in _cloud.emulator.hub_command("devices")["devices"]}
    assert enabled == {hub.name: True, other.name: False}
    with pytest.raises(ControlError, match="is not connected"):
        hub.invoke("press-09", "ping")


def test_events_are_those_of_the_hub_and_not_of_another(_cloud: Cloud, hub: Hub) -> None:
    other = Hub(_cloud, "two.azure-devices.net")
    with PahoDevice(_cloud.emulator, other.add_device("press-08")) as there:
        assert there.connect() == 0
    with PahoDevice(_cloud.emulator, hub.add_device("press-09")) as here:
        assert here.connect() == 0
    assert other.events().wait_for("connected").device_id == "press-08"
    assert hub.events().wait_for("connected").device_id == "press-09"


def test_an_object_fits_where_each_wanted_field_is_there() -> None:
    assert has_all({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 1}})
    assert not has_all({"a": {"b": 1}}, {"a": {"b": 2}})
    assert not has_all({"a": 1}, {"a": {"b": 2}}) and not has_all([1, 2], [1]) and not has_all({}, {"a": None})


def test_one_cloud_lasts_for_a_session_and_each_test_sees_what_came_for_it(own: Callable[..., str]) -> None:
    said = own(
        "import sys\nimport pytest\nSEEN = []\n\n"
        "def test_nothing_is_loaded_for_a_test_without_use_for_it():\n"
        "    heavy = {'starlette', 'uvicorn', 'cryptography', 'trustme', 'sqlite3', 'dps_agent'}\n"
        "    assert not heavy & set(sys.modules)\n\n"
        "@pytest.mark.parametrize('number', range(3))\ndef test_own(device, hub, dps, number):\n"
        "    SEEN.append(dps.url)\n    device.send(str(number))\n"
        "    assert hub.telemetry(device).wait_for(str(number)) and len(hub.telemetry()) == 1\n"
        "    assert len(set(SEEN)) == 1 and (number == 0 or not len(dps.requests))\n",
        *("-o", "dps_emulator_scope=session", "-o", "dps_emulator_tpm=simulator"),
    )
    assert "4 passed" in said


@pytest.mark.parametrize("setting", ["dps_emulator_scope=test", "dps_emulator_tpm=hardware"])
def test_a_setting_that_does_not_exist_is_refused_with_those_that_do(own: Callable[..., str], setting: str) -> None:
    name, _, value = setting.partition("=")
    said = own("def test_own(tpm):\n    pass\n", "-o", setting, status=4)
    assert f"{name}: expected one of " in said and f"came '{value}'" in said


def test_a_test_that_fails_shows_what_was_written_and_nothing_is_left_when_it_is_over(own: Callable[..., str]) -> None:
    said = own(
        "import os, threading\n\n"
        "def test_fails(device, hub):\n    hub.telemetry(device).wait_for('never', within_s=0.1)\n\n"
        "def test_ends(device, tpm):\n    device.end()\n    tpm.cut_power()\n\n"
        "def test_is_left():\n    assert [each.name for each in threading.enumerate()] == ['MainThread']\n"
        "    kinds = [os.readlink(f'/proc/self/fd/{fd}') for fd in os.listdir('/proc/self/fd')[:-1]]\n"
        "    assert not [kind for kind in kinds if kind.startswith('socket:')]\n",
        status=1,
    )
    assert "1 failed, 2 passed" in said
    assert "0 of 1 messages from press-07 as wanted" in said
    assert "what the emulator wrote" in said and "method=PUT operation=register registration_id=press-07" in said
    assert "what the agent of press-07 wrote" in said and "connected to emulator.azure-devices.net" in said
