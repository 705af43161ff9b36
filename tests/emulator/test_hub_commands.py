"""The commands that go to a running emulator, as users type them, and what they refuse."""

from __future__ import annotations

import base64
import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from dps_emulator.cli import main
from dps_emulator.control_socket import SOCKET_NAME, ControlError
from dps_emulator.faults import FaultScriptError, fault_script
from dps_emulator.hub import HubLine
from emulator.device_side import Device
from emulator.paho_device import HUB_SUBSCRIPTIONS, PahoDevice
from support.cloud.emulator import DeviceCredentials, EmulatorProcess

HUB = "emulator.azure-devices.net"


@pytest.fixture(scope="module")
def emulator() -> Iterator[EmulatorProcess]:
    with EmulatorProcess("--hub", HUB, "--hub", "second.azure-devices.net") as emulator:
        yield emulator


def credentials(connection_string: str) -> DeviceCredentials:
    fields = dict(field.split("=", 1) for field in connection_string.split(";"))
    return DeviceCredentials(fields["HostName"], fields["DeviceId"], base64.b64decode(fields["SharedAccessKey"]))


def test_a_device_is_added_spoken_to_and_listened_to(emulator: EmulatorProcess, said: Any) -> None:
    status, text = said("device-add", "press-07")
    assert status == 0
    device = credentials(text)
    assert device.hub == HUB and len(device.key) == 32
    with PahoDevice(emulator, device) as client:
        assert client.connect() == 0
        client.subscribe_to_messages()
        client.subscribe(*HUB_SUBSCRIPTIONS)
        assert client.send(b"21.5", "unit=C") and client.send(b"\xff")
        status, sent = said("send-c2d", "press-07", "wake up", "--property", "a=b=c", "--json")
        assert status == 0 and sent["code"] == "ok"
        message = client.next_message()
        assert message.payload == b"wake up" and f"a=b%3Dc&%24.mid={sent['messageId']}" in message.topic

        def answer() -> None:
            request = client.next_message()
            request_id = request.topic.partition("?$rid=")[2]
            client.publish(f"$iothub/methods/res/200/?$rid={request_id}", b'{"in":5}')

        threading.Thread(target=answer, daemon=True).start()
        assert said("invoke", "press-07", "reboot", '{"delay": 5}') == (0, '200 {"in": 5}')
        status, twin = said("twin", "press-07", "--desired", '{"period": 60}', "--json")
        assert status == 0 and twin["properties"]["desired"] == {"period": 60, "$version": 2}
        assert json.loads(client.next_message().payload) == {"period": 60, "$version": 2}
        status, listed = said("devices", "--json")
        assert next(entry for entry in listed["devices"] if entry["connected"])["deviceId"] == "press-07"
    status, messages = said("messages", "press-07", "--json")
    assert [message.get("payload") for message in messages["messages"]] == ["21.5", None]
    assert said("messages")[1].endswith("press-07 {} /w==")
    assert said("messages", "nobody")[0] == 1


def test_a_token_of_a_device_lets_it_in(emulator: EmulatorProcess, said: Any) -> None:
    device = emulator.add_device("press-token")
    status, token = said("device-token", "press-token", "--life", "60")
    with PahoDevice(emulator, device, token=token) as client:
        assert status == 0 and client.connect() == 0
    status, text = said("device-token", "nobody")
    assert (status, text) == (1, "dps-emulator: no hub has a device 'nobody'")


def test_a_call_waits_for_the_device_and_then_for_its_program(emulator: EmulatorProcess, said: Any) -> None:
    device = emulator.add_device("press-14")
    status, text = said("invoke", "press-14", "open", "--wait", "1")
    assert status == 3 and text == "dps-emulator: 'press-14' is not connected, after 1 s"
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(main, ["invoke", "press-14", "open", "--wait", "60", "--state-dir", str(emulator.state_dir)])
        with PahoDevice(emulator, device) as client:
            assert client.connect() == 0
            client.subscribe(*HUB_SUBSCRIPTIONS)
            for status in (404, 404, 207):
                request_id = client.next_message().topic.partition("?$rid=")[2]
                client.publish(f"$iothub/methods/res/{status}/?$rid={request_id}", b'{"is":"open"}')
            assert call.result(60) == 0


def test_without_waiting_what_a_device_does_not_know_is_its_answer(emulator: EmulatorProcess, said: Any) -> None:
    device = emulator.add_device("press-15")
    with PahoDevice(emulator, device) as client, ThreadPoolExecutor(1) as pool:
        assert client.connect() == 0
        client.subscribe(*HUB_SUBSCRIPTIONS)
        call = pool.submit(said, "invoke", "press-15", "open")
        request_id = client.next_message().topic.partition("?$rid=")[2]
        client.publish(f"$iothub/methods/res/404/?$rid={request_id}", b"{}")
        assert call.result(60) == (0, "404 {}")


def test_waiting_ends_when_it_listens_and_with_a_device_when_that_is_connected(
    emulator: EmulatorProcess, said: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = f"listening on https://127.0.0.1:{emulator.port}\nhubs on mqtts://127.0.0.1:{emulator.hub_port}"
    assert said("wait") == (0, where)
    dps = f"https://127.0.0.1:{emulator.port}"
    assert said("wait", "--json") == (0, {"schema": 1, "code": "ok", "dps": dps, "hubs": where.rpartition(" ")[2]})
    device = credentials(said("device-add", "press-12")[1])
    assert said("wait", "press-12", "--timeout", "1") == (
        3,
        "dps-emulator: 'press-12' is not connected to a hub, after 1 s",
    )
    with PahoDevice(emulator, device) as client, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(main, ["wait", "PRESS-12", "--state-dir", str(emulator.state_dir)])
        assert client.connect() == 0
        assert waiting.result(60) == 0
    assert capsys.readouterr().out == f"press-12 is connected to {HUB}\n"
    assert main(["wait", "--state-dir", str(tmp_path / "none"), "--timeout", "1"]) == 3
    assert capsys.readouterr().err == f"dps-emulator: no emulator serves {tmp_path / 'none'}, after 1 s\n"


def test_a_device_is_disabled_enabled_given_another_key_and_withdrawn(emulator: EmulatorProcess, said: Any) -> None:
    key_file = emulator.state_dir.parent / "key"
    key_file.write_text(base64.b64encode(b"a key of our own").decode() + "\n")
    device = credentials(
        said("device-add", "press-08", "--hub", "second.azure-devices.net", "--key-file", str(key_file))[1]
    )
    assert (device.hub, device.key) == ("second.azure-devices.net", b"a key of our own")

    def code(device: DeviceCredentials) -> int:
        with PahoDevice(emulator, device) as client:
            return client.connect()

    assert code(device) == 0
    assert said("device-disable", "press-08") == (0, "disable: press-08 at second.azure-devices.net")
    assert code(device) == 5 and said("devices")[1].endswith("press-08: not connected, disabled, 0 messages waiting")
    assert said("device-enable", "press-08")[0] == 0 and code(device) == 0
    rotated = credentials(said("device-rotate-key", "press-08")[1])
    token_file = emulator.state_dir.parent / "token"
    for of_device, status in ((device, 1), (rotated, 0)):
        token_file.write_text(of_device.token())
        assert said("verify-token", str(token_file))[0] == status
    assert rotated.key != device.key and (code(device), code(rotated)) == (5, 0)
    assert said("device-disconnect", "press-08")[0] == 0
    assert said("device-withdraw", "press-08")[0] == 0 and code(rotated) == 5
    assert said("twin", "press-08") == (1, "dps-emulator: no hub has a device 'press-08'")


def test_things_break_on_command_and_are_mended(emulator: EmulatorProcess, said: Any, tmp_path: Path) -> None:
    device = credentials(said("device-add", "press-09")[1])

    def telemetry_is_acknowledged() -> bool:
        with PahoDevice(emulator, device) as client:
            assert client.connect() == 0
            return client.send(b"x")

    assert said("break", "refuse", "--code", "3", "--times", "1") == (0, "1 fault entry in force")
    with PahoDevice(emulator, device) as client:
        assert client.connect() == 3
    assert telemetry_is_acknowledged()
    assert said("break", "drop", "--operation", "telemetry", "--device", "press-09", "--after")[0] == 0
    assert not telemetry_is_acknowledged() and len(emulator.telemetry("press-09")) == 2
    assert said("break", "throttle")[1] == "4 fault entries in force"
    with PahoDevice(emulator, device) as client:
        assert client.connect() == 3
    script = tmp_path / "script.json"
    script.write_text('[{"operation": "connect", "connack": 4}]')
    assert said("break", "script", "--file", str(script))[0] == 0
    with PahoDevice(emulator, device) as client:
        assert client.connect() == 4
    assert said("break", "nothing") == (0, "0 fault entries in force") and telemetry_is_acknowledged()
    for words in (("delay", "--seconds", "1", "--operation", "puback"), ("silence", "--operation", "accept")):
        assert said("break", *words)[0] == 0
    said("break", "nothing")


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (("send-c2d", "nobody", "x"), 1, "no hub has a device 'nobody'"),
        (("send-c2d", "press-10", "x", "--hub", "other.azure-devices.net"), 1, "no hub 'other.azure-devices.net' here"),
        (("twin", "press-10", "--desired", "[1]"), 1, "not a JSON object"),
        (("twin", "press-10", "--desired", "{"), 2, "is not valid JSON"),
        (("send-c2d", "press-10", "x", "--property", "a"), 2, "NAME=VALUE"),
        (("invoke", "press-10", "reboot"), 1, "is not connected"),
        (("device-add", "a/b"), 1, "is no device id"),
        (("device-add", "press-10"), 1, "already has a device"),
        (("break", "drop", "--operation", "lunch"), 1, "'operation' is not one of register"),
        (("break", "script"), 2, "--file is missing"),
        (("break", "delay"), 2, "--seconds is missing"),
        (("break", "script", "--file", "absent.json"), 2, "can't read absent.json"),
    ],
)
def test_what_can_not_be_done_is_one_clear_line(
    emulator: EmulatorProcess, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], status: int, message: str
) -> None:
    if not any(line["deviceId"] == "press-10" for line in emulator.hub_command("devices")["devices"]):
        emulator.add_device("press-10")
    try:
        ended = main([*words, "--state-dir", str(emulator.state_dir)])
    except SystemExit as ending:
        ended = int(ending.code or 0)
    error = capsys.readouterr().err
    assert ended == status and message in error.splitlines()[-1] and "Traceback" not in error


def test_without_a_running_emulator_the_commands_say_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["messages", "--state-dir", str(tmp_path)]) == 1
    assert "no emulator serves" in capsys.readouterr().err
    assert main(["messages", "--state-dir", str(tmp_path / "absent")]) == 2
    with EmulatorProcess() as stopped:
        assert stopped.stop() == 0
        assert main(["messages", "--state-dir", str(stopped.state_dir)]) == 1


def test_the_control_socket_takes_nothing_but_requests(emulator: EmulatorProcess) -> None:
    for content in (b"\n", b"{\n", b"[]\n", b'{"command":"lunch"}\n', b'{"command":"twin"}\n', b'{"command":[]}\n'):
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(60)
            client.connect(str(emulator.state_dir / SOCKET_NAME))
            client.sendall(content)
            answer = json.loads(client.makefile("rb").readline())
        assert answer["error"]["code"] == 400004, content
    assert "Traceback" not in emulator.stderr


def test_the_hubs_log_has_no_secret_and_can_be_read_back(emulator: EmulatorProcess) -> None:
    device = emulator.add_device("press-11")
    with PahoDevice(emulator, device) as client:
        assert client.connect() == 0
        assert client.send(b"the payload is no one's business")
    with PahoDevice(emulator, device, token="SharedAccessSignature sr=a&sig=c2VjcmV0&se=1") as client:
        assert client.connect() == 5
    emulator.await_hub_log("refused", 1, "press-11")
    log = emulator.stderr
    assert "c2VjcmV0" not in log and "business" not in log and base64.b64encode(device.key).decode() not in log
    assert [line.event for line in emulator.hub_log if line.device_id == "press-11"][:2] == ["connected", "telemetry"]
    assert {line.text() for line in emulator.hub_log} <= set(log.splitlines())
    assert HubLine.parse("") is None and HubLine.parse("2026 method=PUT operation=-") is None


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"operation": "connect", "connack": 0}, "'connack' is not a number from 1 to 5"),
        ({"operation": "telemetry", "connack": 5}, "only for 'connect'"),
        ({"operation": "telemetry", "drop": "later"}, "'drop' is not before or after"),
        ({"operation": "telemetry", "status": 429}, "only for twin-get, twin-patch, issue-certificate"),
        ({"operation": "telemetry", "body": ""}, "'body' is only for a request to DPS"),
        ({"operation": "register", "silent": "after"}, "only for a hub's packet"),
        ({"method": "MQTT", "operation": "lookup"}, "no operation at a hub"),
        ({"drop": "after"}, "only for a hub's packet"),
        ({"operation": "ping", "reset": True}, "'reset' needs"),
        ({"operation": "ping", "times": 0}, "'times' is not a number from 1"),
    ],
)
def test_a_hub_fault_that_makes_no_sense_is_refused(entry: dict[str, object], message: str) -> None:
    with pytest.raises(FaultScriptError, match="entry 1") as refusal:
        fault_script([entry])
    assert message in str(refusal.value)


def test_faults_of_dps_and_of_hubs_do_not_mix() -> None:
    script = fault_script(
        [{"status": 500, "times": 2}, {"method": "MQTT", "device": "a", "request": 2, "drop": "after"}]
    )
    assert [bool(script.take("PUT", "register")) for _ in range(3)] == [True, True, False]
    assert script.take("MQTT", "ping", "b") is None
    assert [bool(script.take("MQTT", "ping", "a")) for _ in range(3)] == [False, True, False]


def test_an_import_of_one_is_said_in_the_singular(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    csv = tmp_path / "one.csv"
    csv.write_text(
        f"registrationId,endorsementKey\none,{base64.b64encode(Device.of_the_vectors().ek_public).decode()}\n"
    )
    assert main(["enroll-import", str(csv), "--state-dir", str(tmp_path / "state")]) == 0
    assert capsys.readouterr().out == "1 enrolment imported, 0 of them replaced an earlier one\n"


def test_connected_and_silenced_devices_do_not_hold_up_a_stop() -> None:
    with EmulatorProcess() as emulator:
        device, other = emulator.add_device("press-12"), emulator.add_device("press-13")

        def invoked_in_vain() -> None:
            with contextlib.suppress(ControlError):
                emulator.invoke("press-13", "reboot")

        with PahoDevice(emulator, device) as client, PahoDevice(emulator, other, transport="websockets") as silenced:
            assert (client.connect(), silenced.connect()) == (0, 0)
            silenced.subscribe(*HUB_SUBSCRIPTIONS)
            emulator.fault({"operation": "telemetry", "device": "press-13", "silent": "before"})
            silenced.start_publishing("devices/press-13/messages/events/", b"x", 1)
            emulator.await_hub_log("fault")
            call = threading.Thread(target=invoked_in_vain)
            call.start()
            assert emulator.stop() == 0
            assert client.has_ended() and silenced.has_ended()
            call.join(60)
        assert "Traceback" not in emulator.stderr and "never retrieved" not in emulator.stderr


def test_two_hundred_broken_connections_leave_no_descriptor_behind() -> None:
    with EmulatorProcess() as emulator:
        device = emulator.add_device("press-14")
        emulator.fault(
            {"operation": "accept", "request": 5, "drop": "before"},
            {"operation": "connect", "request": 7, "drop": "after", "reset": True},
            {"operation": "telemetry", "device": "press-14", "drop": "after"},
        )
        assert emulator._process is not None
        descriptors = Path(f"/proc/{emulator._process.pid}/fd")
        before = len(list(descriptors.iterdir()))
        for number in range(200):
            with socket.create_connection(("127.0.0.1", emulator.hub_port), 60) as plain, contextlib.suppress(OSError):
                if number % 4:
                    continue  # gone before TLS
                with PahoDevice(emulator, device, transport=("tcp", "websockets")[number % 8 // 4]) as client:
                    if client.connect() == 0:
                        assert not client.send(b"x")
                    assert client.has_ended()
                plain.sendall(b"no TLS")
                plain.recv(100)
        deadline = time.monotonic() + 15
        while len(left := list(descriptors.iterdir())) > before and time.monotonic() < deadline:
            time.sleep(0.1)
        assert len(left) <= before, emulator.stderr[-2000:]
        assert "Traceback" not in emulator.stderr and len(emulator.telemetry()) > 40


def resident_kib(emulator: EmulatorProcess) -> int:
    assert emulator._process is not None
    status = Path(f"/proc/{emulator._process.pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0])


def test_a_connected_idle_device_takes_less_than_120_kib() -> None:
    with EmulatorProcess() as emulator, contextlib.ExitStack() as connected:
        devices = [emulator.add_device(f"press-{number:03}") for number in range(100)]
        before = 0
        for number, device in enumerate(devices):
            if number == 20:
                before = resident_kib(emulator)  # what is loaded once is loaded
            client = connected.enter_context(PahoDevice(emulator, device))
            assert client.connect(looping=False) == 0
        taken = (resident_kib(emulator) - before) / 80
        assert 0 < taken < 120, f"{taken:.0f} KiB each"


def test_answers_do_not_pile_up_for_a_client_that_reads_none_of_them() -> None:
    with EmulatorProcess() as emulator:
        device = emulator.add_device("press-07")
        emulator.set_desired("press-07", dict.fromkeys("abcdefg", "x" * 4000))
        before = resident_kib(emulator)
        with PahoDevice(emulator, device) as client:
            assert client.connect(looping=False) == 0
            connection = client._client.socket()
            connection.settimeout(1)
            topic = b"$iothub/twin/GET/?$rid=1"
            ask = bytes((0x30, 2 + len(topic))) + len(topic).to_bytes(2) + topic
            subscribe = b"\x82\x17\0\1\0\x12$iothub/twin/res/#\0"
            connection.sendall(subscribe)
            with contextlib.suppress(TimeoutError):
                for _ in range(2000):
                    connection.sendall(ask * 100)  # 200,000 answers of 30 kB
            assert resident_kib(emulator) - before < 30_000
        other = emulator.add_device("press-08")
        with PahoDevice(emulator, other) as client:
            assert client.connect() == 0
