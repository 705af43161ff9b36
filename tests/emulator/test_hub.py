"""The hub on the wire, against paho-mqtt 2: who gets in, what arrives, and how connections end."""

from __future__ import annotations

import json
import queue
import re
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import pytest

from dps_emulator import mqtt
from dps_emulator.control_socket import ControlError
from dps_emulator.enrollments import Enrollment
from dps_emulator.hub import HubLine, Hubs
from dps_emulator.service import Settings
from emulator.device_side import Client, Device, operation_path, register_path
from emulator.paho_device import HUB_SUBSCRIPTIONS, PahoDevice
from support.cloud.emulator import DeviceCredentials, EmulatorInThread
from support.cloud.store_cuts import Wire

HUBS = ("emulator.azure-devices.net", "second.azure-devices.net")
TPM = Device.of_the_vectors()


class Shifted:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.by_s = 0.0

    def __call__(self) -> float:
        return time.time() + self.by_s


@pytest.fixture(scope="module")
def shared() -> Iterator[tuple[EmulatorInThread, Shifted]]:
    clock = Shifted()
    settings = Settings(hubs=HUBS, retry_after_s=0, clock_skew_s=300)
    enrollments = [Enrollment(TPM.registration_id, TPM.ek_public)]
    with EmulatorInThread(settings, enrollments, clock=clock) as emulator:
        yield emulator, clock


@pytest.fixture
def clock(shared: tuple[EmulatorInThread, Shifted]) -> Shifted:
    return shared[1]


@pytest.fixture
def emulator(shared: tuple[EmulatorInThread, Shifted]) -> EmulatorInThread:
    emulator, clock = shared
    clock.by_s = 0.0
    emulator.fault()
    return emulator


@pytest.fixture
def device(emulator: EmulatorInThread, request: pytest.FixtureRequest) -> DeviceCredentials:
    """A device of the test's own."""
    return emulator.add_device(f"press-{abs(hash(request.node.name)):x}")


def provision(emulator: EmulatorInThread) -> DeviceCredentials:
    """A registration with DPS; the device at the hub that it was assigned to."""
    rid = TPM.registration_id
    body = {"registrationId": rid, "tpm": TPM.attestation()}
    with Client(emulator.port, emulator.ca_file) as client:
        _, _, challenge = client.call("PUT", register_path(rid), body)
        key = TPM.activate(challenge["authenticationKey"])
        token = key.token(f"0ne00000000%2Fregistrations%2F{rid}", int(time.time()) + 60)
        _, _, accepted = client.call("PUT", register_path(rid), body, token)
        _, _, final = client.call("GET", operation_path(rid, accepted["operationId"]), None, token)
    state = final["registrationState"]
    hub_key = TPM.activate(state["tpm"]["authenticationKey"]).key
    return DeviceCredentials(state["assignedHub"], state["deviceId"], hub_key)


def closed(emulator: EmulatorInThread, device: DeviceCredentials, count: int = 1) -> str:
    """Why the hub closed the device's `count`-th connection."""
    return emulator.await_hub_log("closed", count, device.device_id)[count - 1].detail


@pytest.mark.parametrize("transport", ["tcp", "websockets"])
def test_telemetry_arrives_with_its_properties(
    emulator: EmulatorInThread, device: DeviceCredentials, transport: str
) -> None:
    with PahoDevice(emulator, device, transport=transport) as client:
        assert client.connect() == 0 and not client.session_present
        assert client.send(b'{"t":21.5}', "unit=%C2%B0C%20%2F%20K&alarm&empty=&%24.ct=application%2Fjson&$.mid=7")
        assert client.send(b"\xff\x00", qos=0) and client.send(bytes(200_000))
        first, second, third = emulator.await_telemetry(3, device.device_id)
    assert first["payload"] == '{"t":21.5}' and second["payloadBase64"] == "/wA=" and len(third["payload"]) == 200_000
    assert first["properties"] == {
        "unit": "°C / K",
        "alarm": None,
        "empty": "",
        "$.ct": "application/json",
        "$.mid": "7",
    }
    assert [message["qos"] for message in (first, second, third)] == [1, 0, 1]
    sni = f"sni={device.hub}"
    assert sni in emulator.await_hub_log("connected", 1, device.device_id)[0].detail


def test_a_provisioned_device_connects_with_the_key_that_dps_issued(emulator: EmulatorInThread) -> None:
    device = provision(emulator)
    assert device.hub == HUBS[0]
    with PahoDevice(emulator, device) as client:
        assert client.connect() == 0
        assert client.send(b"hello")


def test_only_a_right_token_of_this_device_gets_in(emulator: EmulatorInThread, device: DeviceCredentials) -> None:
    other = emulator.add_device(device.device_id + "-b")
    wrong: dict[str, dict[str, Any]] = {
        "not by the key": {"token": device._replace(key=other.key).token()},
        "expired": {"token": device.token(-301)},
        "another device's": {"token": other.token()},
        "another hub's": {"token": device.token(resource=f"{HUBS[1]}/devices/{device.device_id}")},
        "a hub's": {"token": device.token(resource=device.hub)},
        "DPS's": {"token": device.token() + "&skn=registration"},
        "no token": {"token": ""},
        "another client id": {"client_id": other.device_id},
        "another hub's name": {"user_name": f"unknown.azure-devices.net/{device.device_id}/?api-version=2021-04-12"},
        "an unknown device": {
            "client_id": "nobody",
            "user_name": f"{device.hub}/nobody/?api-version=2021-04-12",
            "token": device._replace(device_id="nobody").token(),
        },
        "another name in TLS": {"server_name": HUBS[1]},
    }
    for what, how in wrong.items():
        with PahoDevice(emulator, device, **how) as client:
            assert client.connect() == 5, what
            assert client.has_ended(), what
    assert emulator.telemetry(device.device_id) == []


@pytest.mark.parametrize("device_id", ["plain-1", "AC:DE:48:00:11:22", "n@m.et", "50%off"])
def test_a_hub_takes_every_spelling_that_clients_use(emulator: EmulatorInThread, device_id: str) -> None:
    device = emulator.add_device(device_id)
    once = f"{device.hub}/devices/{device_id}"
    twice = f"{device.hub}/devices/{quote(device_id, safe='')}"
    user = f"{device.hub}/{device_id}"
    spellings: dict[str, dict[str, Any]] = {
        "as documented": {},
        "the device id encoded once more in sr": {"token": device.token(resource=twice)},
        "in lower case": {"token": device.token(resource=once.lower())},
        "no api-version": {"user_name": user},
        "a slash alone": {"user_name": f"{user}/"},
        "a question mark alone": {"user_name": f"{user}/?"},
        "no question mark": {"user_name": f"{user}/api-version=2018-06-30"},
        "only a client type": {"user_name": f"{user}/?DeviceClientType=x%2F1"},
        "TLS to an address": {"server_name": "127.0.0.1"},
    }
    for what, how in spellings.items():
        with PahoDevice(emulator, device, **how) as client:
            assert client.connect() == 0, what
    other = emulator.add_device(f"{device_id}-b")
    with PahoDevice(emulator, device, token=device._replace(key=other.key).token(resource=twice)) as client:
        assert client.connect() == 5


def test_a_strict_hub_refuses_what_others_only_tolerate() -> None:
    with EmulatorInThread(Settings(strict=True)) as strict:
        device = strict.add_device("n@m.et")
        user = f"{device.hub}/{device.device_id}"
        twice = f"{device.hub}/devices/{quote(device.device_id, safe='')}"
        refused: list[dict[str, Any]] = [
            {"token": device.token(resource=twice)},
            *(
                {"user_name": user + rest}
                for rest in ("", "/", "/?", "/api-version=2018-06-30", "/?DeviceClientType=x")
            ),
        ]
        for how in refused:
            with PahoDevice(strict, device, **how) as client:
                assert client.connect() == 5, how
        for rest in ("/?api-version=2021-04-12", "/?api-version=2021-04-12&DeviceClientType=x", "/?a=b&api-version=1"):
            for transport in ("tcp", "websockets"):
                with PahoDevice(strict, device, user_name=user + rest, transport=transport) as client:
                    assert client.connect() == 0, rest
        lines = list[HubLine]()
        context = replace(strict._server.hubs.context, note=lines.append)
        hubs = Hubs(strict.service, strict.store.devices, context)
        connect = mqtt.Connect(mqtt.LEVEL, device.device_id, device.user_name, device.token().encode())
        assert hubs.connect(Wire(lambda number: None), connect, "10.1.2.3", time.time()) is None
        assert lines[-1].detail == "the TLS handshake named 10.1.2.3"
        assert hubs.connect(Wire(lambda number: None), connect, device.hub, time.time())


def test_a_message_says_when_its_life_ends_where_one_was_asked_for(
    emulator: EmulatorInThread, device: DeviceCredentials
) -> None:
    with PahoDevice(emulator, device) as client:
        assert client.connect() == 0
        client.subscribe_to_messages()
        emulator.hub_command("send-c2d", device=device.device_id, payload="", lifeS=3600)
        topic = unquote(client.next_message().topic)
        assert re.search(r"&iothub-ack=none&\$\.exp=\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{7}Z$", topic), topic
        emulator.send_c2d(device.device_id, b"", {"iothub-ack": "full"})
        topic = client.next_message().topic
        assert topic.count("iothub-ack") == 1 and "iothub-ack=full&" in topic and "exp" not in topic


def test_what_is_no_credential_at_all_has_codes_of_its_own(
    emulator: EmulatorInThread, device: DeviceCredentials
) -> None:
    for how, code in (
        ({"user_name": device.device_id}, 4),
        ({"user_name": f"{device.hub}?{device.device_id}"}, 4),
        ({"client_id": "a b"}, 2),
    ):
        with PahoDevice(emulator, device, **how) as client:
            assert (client.connect(), how) == (code, how)


def test_a_token_within_the_tolerance_gets_in_and_lasts_as_long(
    emulator: EmulatorInThread, device: DeviceCredentials, clock: Shifted
) -> None:
    with PahoDevice(emulator, device, token=device.token(-100)) as client:
        assert client.connect() == 0
        clock.by_s = 190
        assert not client.has_ended(0.5)
        clock.by_s = 201
        assert client.has_ended(2)


def test_a_connection_ends_when_its_token_expires(
    emulator: EmulatorInThread, device: DeviceCredentials, clock: Shifted
) -> None:
    with PahoDevice(emulator, device, token=device.token(3600)) as client:
        assert client.connect() == 0
        clock.by_s = 3590
        assert client.send(b"still here")
        clock.by_s = 3601
        assert client.has_ended(2)
    assert closed(emulator, device) == "the token has expired"


def test_a_second_connection_ends_the_first(emulator: EmulatorInThread, device: DeviceCredentials) -> None:
    with PahoDevice(emulator, device) as first, PahoDevice(emulator, device) as second:
        assert first.connect() == 0
        with PahoDevice(emulator, device, token="SharedAccessSignature sr=x&sig=AA&se=1") as impostor:
            assert impostor.connect() == 5
        assert first.send(b"not thrown out by an impostor")
        assert second.connect() == 0
        assert first.has_ended()
        assert second.send(b"only one")
    assert closed(emulator, device) == "another connection of the same device"
    assert emulator.await_hub_log("closed", 1, device.device_id)[0].code == 400027


def test_silence_beyond_one_and_a_half_keep_alives_ends_the_connection(
    emulator: EmulatorInThread, device: DeviceCredentials
) -> None:
    with PahoDevice(emulator, device, keep_alive_s=2) as silent:
        started = time.monotonic()
        assert silent.connect(looping=False) == 0
        assert closed(emulator, device) == "nothing came for 3 s"
        assert time.monotonic() - started > 2.9
    with PahoDevice(emulator, device, keep_alive_s=1) as pinging:
        assert pinging.connect() == 0
        assert not pinging.has_ended(3)


def test_no_qos_2_no_unknown_topic_and_no_other_devices_topic(
    emulator: EmulatorInThread, device: DeviceCredentials
) -> None:
    own = f"devices/{device.device_id}"
    for topic, qos in (
        (f"{own}/messages/events/", 2),
        ("devices/other/messages/events/", 1),
        (f"{own}/messages/devicebound/", 1),
        ("$iothub/twin/PATCH/properties/desired/?$rid=1", 1),
        ("news", 0),
    ):
        with PahoDevice(emulator, device) as client:
            assert client.connect() == 0
            client.start_publishing(topic, b"x", qos)
            assert client.has_ended(), topic
    assert emulator.telemetry(device.device_id) == []


def test_subscriptions_get_at_most_qos_1_and_others_are_refused(
    emulator: EmulatorInThread, device: DeviceCredentials
) -> None:
    with PahoDevice(emulator, device) as client:
        assert client.connect() == 0
        assert client.subscribe_to_messages(qos=2) == [1]
        assert client.subscribe(*HUB_SUBSCRIPTIONS, qos=0) == [0, 0, 0]
        refused = client.subscribe("#", "devices/other/messages/devicebound/#", f"devices/{device.device_id}/#")
        assert refused == [0x80] * 3
        assert client.send(b"x")


@pytest.mark.parametrize("asked", ["methods", "devicebound", "twin", "twin-get"])
def test_a_hub_of_the_basic_tier_takes_telemetry_and_hangs_up_on_who_asks_for_more(asked: str) -> None:
    with EmulatorInThread(Settings(tier="basic")) as emulator:
        device = emulator.add_device("press-07")
        filters = {
            "methods": "$iothub/methods/POST/#",
            "devicebound": "devices/press-07/messages/devicebound/#",
            "twin": "$iothub/twin/res/#",
        }
        with PahoDevice(emulator, device) as client:
            assert client.connect() == 0
            assert client.send(b"21.5")
            if asked in filters:
                client._client.subscribe(filters[asked])
            else:
                client.start_publishing("$iothub/twin/GET/?$rid=1", b"", 0)
            assert client.has_ended()
        assert "Basic tier" in closed(emulator, device)
        assert [message["payload"] for message in emulator.telemetry("press-07")] == ["21.5"]


def test_nothing_is_retained_but_the_flag_is_told(emulator: EmulatorInThread, device: DeviceCredentials) -> None:
    with PahoDevice(emulator, device) as client:
        assert client.connect() == 0
        assert client.send(b"x", "a=b", retain=True)
    assert emulator.telemetry(device.device_id)[0]["properties"] == {"a": "b", "mqtt-retain": "true"}


def test_telemetry_has_at_most_256_kib(emulator: EmulatorInThread, device: DeviceCredentials) -> None:
    with PahoDevice(emulator, device) as client:
        assert client.connect() == 0
        assert not client.send(bytes(256 * 1024 + 1)) and client.has_ended()
    assert emulator.telemetry(device.device_id) == []
    assert emulator.await_hub_log("closed", 1, device.device_id)[0].code == 413001


def test_a_will_is_telemetry_of_a_connection_that_ended_without_goodbye(
    emulator: EmulatorInThread, device: DeviceCredentials
) -> None:
    will = (f"devices/{device.device_id}/messages/events/a=b", b"gone")
    with PahoDevice(emulator, device, will=will) as client:
        assert client.connect() == 0
        client.goodbye()
    closed(emulator, device)
    assert emulator.telemetry(device.device_id) == []
    with PahoDevice(emulator, device, will=will) as client:
        assert client.connect() == 0
        client.vanish()
    (message,) = emulator.await_telemetry(1, device.device_id)
    assert (message["payload"], message["properties"]) == ("gone", {"a": "b", "iothub-MessageType": "Will"})
    with PahoDevice(emulator, device, will=("news", b"gone")) as client:
        assert client.connect() == 5


@pytest.mark.parametrize("transport", ["tcp", "websockets"])
def test_a_message_sent_while_offline_comes_at_reconnect(
    emulator: EmulatorInThread, device: DeviceCredentials, transport: str
) -> None:
    with PahoDevice(emulator, device, transport=transport) as client:
        assert client.connect() == 0 and not client.session_present
        assert client.subscribe_to_messages() == [1]
        client.goodbye()
    closed(emulator, device)
    message_id = emulator.send_c2d(device.device_id, b"wake up", {"level": "50 %", "$.ct": "text/plain"})
    with PahoDevice(emulator, device, transport=transport) as client:
        assert client.connect() == 0 and client.session_present
        message = client.next_message()
        emulator.await_hub_log("completed", 1, device.device_id)
    assert (message.payload, message.qos, message.dup) == (b"wake up", 1, False)
    assert message.topic == (
        f"devices/{device.device_id}/messages/devicebound/level=50%20%25&%24.ct=text%2Fplain&%24.mid={message_id}"
        f"&%24.to=%2Fdevices%2F{device.device_id}%2Fmessages%2Fdevicebound&iothub-ack=none"
    )
    with PahoDevice(emulator, device) as client:
        assert client.connect() == 0
        with pytest.raises(queue.Empty):
            client.next_message(0.3)


def test_an_unacknowledged_message_is_redelivered_with_dup(
    emulator: EmulatorInThread, device: DeviceCredentials
) -> None:
    with PahoDevice(emulator, device, acknowledges=False) as client:
        assert client.connect() == 0
        client.subscribe_to_messages()
        emulator.send_c2d(device.device_id, b"one")
        emulator.send_c2d(device.device_id, b"two")
        first = client.next_message()
        assert not first.dup and client.next_message().payload == b"two"
        client.vanish()
    with PahoDevice(emulator, device) as client:
        assert client.connect() == 0 and client.session_present
        again = client.next_message()
        assert (again.payload, again.dup, again.mid) == (b"one", True, first.mid)
        assert client.next_message().dup
        emulator.await_hub_log("completed", 2, device.device_id)
    assert [entry["waiting"] for entry in devices(emulator, device)] == [0]


def test_a_clean_session_forgets_subscriptions_but_not_messages(
    emulator: EmulatorInThread, device: DeviceCredentials
) -> None:
    with PahoDevice(emulator, device, acknowledges=False) as client:
        assert client.connect() == 0
        client.subscribe_to_messages()
        emulator.send_c2d(device.device_id, b"one")
        client.next_message()
    with PahoDevice(emulator, device, clean=True) as client:
        assert client.connect() == 0 and not client.session_present
        with pytest.raises(queue.Empty):
            client.next_message(0.3)
        client.subscribe_to_messages()
        message = client.next_message()
        assert (message.payload, message.dup) == (b"one", False)
    with PahoDevice(emulator, device) as client:
        assert client.connect() == 0 and not client.session_present


def test_a_message_that_is_never_acknowledged_is_given_up(
    emulator: EmulatorInThread, device: DeviceCredentials
) -> None:
    emulator.send_c2d(device.device_id, b"one")
    for deliveries in range(11):
        with PahoDevice(emulator, device, acknowledges=False) as client:
            assert client.connect() == 0
            client.subscribe_to_messages()
            if deliveries < 10:
                assert client.next_message().payload == b"one", deliveries
            client.vanish()
        closed(emulator, device, deliveries + 1)
    emulator.await_hub_log("dead-lettered", 1, device.device_id)
    assert [entry["waiting"] for entry in devices(emulator, device)] == [0]


def test_the_queue_and_a_message_have_limits(
    emulator: EmulatorInThread, device: DeviceCredentials, clock: Shifted
) -> None:
    for _ in range(50):
        emulator.send_c2d(device.device_id, b"x")
    with pytest.raises(ControlError, match="waiting") as full:
        emulator.send_c2d(device.device_id, b"x")
    assert full.value.code == 403004
    clock.by_s = 3601  # their life is over
    emulator.send_c2d(device.device_id, bytes(65_536))
    with pytest.raises(ControlError, match="64 KiB") as large:
        emulator.send_c2d(device.device_id, bytes(65_537))
    assert large.value.code == 413001
    with pytest.raises(ControlError, match="no hub has a device 'nobody'"):
        emulator.send_c2d("nobody", b"x")


def test_a_method_is_called_and_answered(emulator: EmulatorInThread, device: DeviceCredentials) -> None:
    with pytest.raises(ControlError, match="is not connected") as offline:
        emulator.invoke(device.device_id, "reboot")
    assert offline.value.code == 404103
    with PahoDevice(emulator, device) as client:
        assert client.connect() == 0
        with pytest.raises(ControlError, match="has not subscribed"):
            emulator.invoke(device.device_id, "reboot")
        client.subscribe(*HUB_SUBSCRIPTIONS)
        for answer, expected in ((b'{"in":[5]}', {"in": [5]}), (b"", None)):
            call = Call(emulator, device, "re boot", {"delay": 5})
            request = client.next_message()
            path, _, request_id = request.topic.partition("?$rid=")
            assert path == "$iothub/methods/POST/re%20boot/" and json.loads(request.payload) == {"delay": 5}
            client.publish(f"$iothub/methods/res/-3/?$rid={request_id}", answer)
            assert call.result() == (-3, expected)
        call = Call(emulator, device, "reboot", None)
        request_id = client.next_message().topic.partition("?$rid=")[2]
        client.publish(f"$iothub/methods/res/200/?$rid={request_id}", b"{")
        assert "not valid JSON" in str(call.result())
        call = Call(emulator, device, "reboot", None)
        client.next_message()
        client.vanish()
        assert "ended before" in str(call.result())


def test_a_method_that_is_not_answered_in_time_is_504101(emulator: EmulatorInThread, device: DeviceCredentials) -> None:
    with PahoDevice(emulator, device) as client:
        assert client.connect() == 0
        client.subscribe(*HUB_SUBSCRIPTIONS)
        with pytest.raises(ControlError, match=r"did not answer within 0\.3 s") as late:
            emulator.invoke(device.device_id, "reboot", timeout_s=0.3)
        assert late.value.code == 504101
        request_id = client.next_message().topic.partition("?$rid=")[2]
        assert client.publish(f"$iothub/methods/res/200/?$rid={request_id}", b"1")  # too late, and no harm


def test_twin_get_patch_and_desired_changes_have_their_versions(
    emulator: EmulatorInThread, device: DeviceCredentials
) -> None:
    patch = "$iothub/twin/PATCH/properties/reported/?$rid="
    with PahoDevice(emulator, device) as client:
        assert client.connect() == 0
        client.publish("$iothub/twin/GET/?$rid=0")
        client.subscribe(*HUB_SUBSCRIPTIONS)
        client.publish("$iothub/twin/GET/?$rid=a-1", b" ")
        answer = client.next_message()
        assert answer.topic == "$iothub/twin/res/200/?$rid=a-1"
        assert json.loads(answer.payload) == {"desired": {"$version": 1}, "reported": {"$version": 1}}
        client.publish(patch + "2", b'{"a":{"b":1,"c":2},"d":3}')
        assert client.next_message().topic == "$iothub/twin/res/204/?$rid=2&$version=2"
        client.publish(patch + "3", b'{"a":{"b":null},"d":null,"e":[1]}')
        assert client.next_message().topic == "$iothub/twin/res/204/?$rid=3&$version=3"
        assert emulator.set_desired(device.device_id, {"period": 60, "old": None}) == 2
        change = client.next_message()
        assert change.topic == "$iothub/twin/PATCH/properties/desired/?$version=2"
        assert json.loads(change.payload) == {"period": 60, "old": None, "$version": 2}
        for content in (b"[]", b"{", b'{"a":NaN}', b'{"$a":1}', b'{"a b":1}', b"\xff", deep(12)):
            client.publish(patch + "4", content)
            answer = client.next_message()
            assert answer.topic == "$iothub/twin/res/400/?$rid=4", content
            assert json.loads(answer.payload)["errorCode"] == 400004
        client.publish(patch + "5", json.dumps({str(n): "x" * 4000 for n in range(9)}).encode())
        assert client.next_message().topic == "$iothub/twin/res/413/?$rid=5"
    expected = {"desired": {"period": 60, "$version": 2}, "reported": {"a": {"c": 2}, "e": [1], "$version": 3}}
    assert emulator.twin(device.device_id) == expected
    with pytest.raises(ControlError, match="name"):
        emulator.set_desired(device.device_id, {"$x": 1})


def test_a_disabled_device_is_thrown_out_and_refused(emulator: EmulatorInThread, device: DeviceCredentials) -> None:
    with PahoDevice(emulator, device) as client:
        assert client.connect() == 0
        emulator.disable(device.device_id)
        assert client.has_ended()
    with PahoDevice(emulator, device) as client:
        assert client.connect() == 5
    emulator.enable(device.device_id)
    with PahoDevice(emulator, device) as client:
        assert client.connect() == 0
        assert emulator.disconnect(device.device_id) and client.has_ended()
    assert not emulator.disconnect(device.device_id)


def test_a_rotated_key_is_the_one_that_dps_hands_out_next(emulator: EmulatorInThread) -> None:
    old = provision(emulator)
    with PahoDevice(emulator, old) as client:
        assert client.connect() == 0
        emulator.rotate_key(old.device_id)
        assert client.send(b"a connection outlives its key")
    with PahoDevice(emulator, old) as client:
        assert client.connect() == 5
    new = provision(emulator)
    assert new.key != old.key
    with PahoDevice(emulator, new) as client:
        assert client.connect() == 0


def test_a_withdrawn_device_is_refused_until_it_registers_again(emulator: EmulatorInThread) -> None:
    device = provision(emulator)
    emulator.set_desired(device.device_id, {"period": 60})
    with PahoDevice(emulator, device) as client:
        assert client.connect() == 0
        emulator.withdraw(device.device_id)
        assert client.has_ended()
    with PahoDevice(emulator, device) as client:
        assert client.connect() == 5
    with pytest.raises(ControlError, match="no hub has a device"):
        emulator.twin(device.device_id)
    device = provision(emulator)
    with PahoDevice(emulator, device) as client:
        assert client.connect() == 0
    assert "period" not in emulator.twin(device.device_id)["desired"]


def test_a_moved_device_takes_its_twin_along_and_its_old_hub_forgets_it(emulator: EmulatorInThread) -> None:
    old = provision(emulator)
    emulator.set_desired(old.device_id, {"period": 61})
    other_hub = HUBS[1 - HUBS.index(old.hub)]
    with PahoDevice(emulator, old) as client:
        assert client.connect() == 0
        emulator.service.move(TPM.registration_id, other_hub)
        assert client.send(b"the move is made at the next registration")
        new = provision(emulator)
        assert client.has_ended()
    assert new.hub == other_hub and new.key != old.key
    with PahoDevice(emulator, old) as client:
        assert client.connect() == 5
    with PahoDevice(emulator, new) as client:
        assert client.connect() == 0
    assert emulator.twin(new.device_id)["desired"]["period"] == 61


def test_faults_refuse_delay_lose_and_throttle(emulator: EmulatorInThread, device: DeviceCredentials) -> None:
    me = {"device": device.device_id}
    for code in (2, 3, 4, 5):  # paho keeps 1 to itself
        emulator.fault({**me, "operation": "connect", "connack": code})
        with PahoDevice(emulator, device) as client:
            assert client.connect() == code
    emulator.fault({**me, "operation": "connect", "delayS": 0.5, "times": 1})
    with PahoDevice(emulator, device) as client:
        started = time.monotonic()
        assert client.connect() == 0 and time.monotonic() - started > 0.5
        client.subscribe(*HUB_SUBSCRIPTIONS)
        emulator.fault({**me, "operation": "twin-get", "status": 429, "times": 1})
        for status in (429, 200):
            client.publish("$iothub/twin/GET/?$rid=1")
            assert client.next_message().topic == f"$iothub/twin/res/{status}/?$rid=1"
        emulator.fault({**me, "operation": "telemetry", "drop": "before"})
        assert not client.send(b"lost") and client.has_ended()
    emulator.fault({**me, "operation": "telemetry", "drop": "after", "reset": True})
    with PahoDevice(emulator, device) as client:
        assert client.connect() == 0
        assert not client.send(b"kept, but not acknowledged") and client.has_ended()
    kept = emulator.await_telemetry(1, device.device_id)
    assert [message["payload"] for message in kept] == ["kept, but not acknowledged"]


def test_a_silent_hub_keeps_the_connection_and_says_nothing(
    emulator: EmulatorInThread, device: DeviceCredentials
) -> None:
    with PahoDevice(emulator, device) as client:
        assert client.connect() == 0
        emulator.fault({"operation": "telemetry", "silent": "after", "device": device.device_id})
        client.start_publishing(f"devices/{device.device_id}/messages/events/", b"x", 1)
        emulator.await_telemetry(1, device.device_id)
        emulator.fault()
        client.start_publishing(f"devices/{device.device_id}/messages/events/", b"y", 1)
        assert not client.has_ended(0.5)
        with PahoDevice(emulator, device) as second:
            assert second.connect() == 0
            assert client.has_ended()
    assert len(emulator.telemetry(device.device_id)) == 1


def test_a_hub_that_accepts_tcp_and_says_nothing(emulator: EmulatorInThread) -> None:
    emulator.fault({"operation": "accept", "silent": "before"})
    with socket.create_connection(("127.0.0.1", emulator.hub_port), 5) as plain:
        plain.settimeout(0.5)
        with pytest.raises(TimeoutError):
            tls(emulator).wrap_socket(plain, server_hostname=HUBS[0])
    emulator.fault({"operation": "accept", "drop": "before", "reset": True})
    with (
        pytest.raises(ConnectionResetError),
        socket.create_connection(("127.0.0.1", emulator.hub_port), 60) as plain,
    ):
        plain.recv(1)


@pytest.mark.parametrize(
    "content",
    [
        b"\xc0\x00",  # PINGREQ before CONNECT
        b"\x10\xff\xff\xff\xff\x01",
        b"\x10\x04\x00\x04MQ",
        b"\x10\x0a\x00\x04HTTP\x04\x02\x00\x00",
        b"\x12\x00",
        b"\xf0\x00",
        b"\x10\x80\x80\x80\x01",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET /$iothub/websocket HTTP/1.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
    ],
)
def test_bytes_that_are_no_mqtt_end_the_connection(emulator: EmulatorInThread, content: bytes) -> None:
    with (
        socket.create_connection(("127.0.0.1", emulator.hub_port), 60) as plain,
        tls(emulator).wrap_socket(plain, server_hostname=HUBS[0]) as wrapped,
    ):
        wrapped.sendall(content)
        answer = wrapped.recv(1000)
        assert answer == b"" or answer.startswith(b"HTTP/1.1 4"), answer
    assert emulator.notices == []


def test_another_protocol_level_is_answered_with_1(emulator: EmulatorInThread) -> None:
    with (
        socket.create_connection(("127.0.0.1", emulator.hub_port), 60) as plain,
        tls(emulator).wrap_socket(plain, server_hostname=HUBS[0]) as wrapped,
    ):
        wrapped.sendall(b"\x10\x10\x00\x04MQTT\x05\x02\x00\x3c\x00\x00\x03abc")
        assert wrapped.recv(10) == b"\x20\x02\x00\x01"


def test_the_certificate_covers_every_hub_and_dps(emulator: EmulatorInThread) -> None:
    for name in (*HUBS, "127.0.0.1", "localhost", "global.azure-devices-provisioning.net"):
        with (
            socket.create_connection(("127.0.0.1", emulator.hub_port), 60) as plain,
            tls(emulator).wrap_socket(plain, server_hostname=name) as wrapped,
        ):
            assert wrapped.version() in ("TLSv1.2", "TLSv1.3")
    with (
        socket.create_connection(("127.0.0.1", emulator.hub_port), 60) as plain,
        pytest.raises(ssl.SSLCertVerificationError),
    ):
        tls(emulator).wrap_socket(plain, server_hostname="another.azure-devices.net")


def test_what_the_hub_knows_survives_a_restart(tmp_path: Path) -> None:
    state_dir = tmp_path / ("a-long-name" * 12)  # longer than a Unix socket's address
    with EmulatorInThread(state_dir=state_dir) as emulator:
        device = emulator.add_device("press-07")
        with PahoDevice(emulator, device, acknowledges=False) as client:
            assert client.connect() == 0
            client.subscribe_to_messages()
            emulator.send_c2d("press-07", b"in flight")
            assert not client.next_message().dup
            assert client.send(b"before")
            assert client.publish("$iothub/twin/PATCH/properties/reported/?$rid=1", b'{"a":1}')
        emulator.set_desired("press-07", {"b": 2})
        emulator.disable("press-07")
        twin = emulator.twin("press-07")
    with EmulatorInThread(state_dir=state_dir) as emulator:
        assert emulator.twin("press-07") == twin
        with PahoDevice(emulator, device) as client:
            assert client.connect() == 5
        emulator.enable("press-07")
        with PahoDevice(emulator, device) as client:
            assert client.connect() == 0 and client.session_present
            message = client.next_message()
            assert (message.payload, message.dup) == (b"in flight", True)
            assert client.send(b"after")
        assert [message["payload"] for message in emulator.telemetry()] == ["before", "after"]
    for path in state_dir.rglob("*"):
        assert path.stat().st_mode & 0o077 == 0 or path.is_socket(), path


def test_a_websocket_of_a_hub_may_come_to_the_port_of_dps(
    emulator: EmulatorInThread, device: DeviceCredentials
) -> None:
    with PahoDevice(emulator, device, transport="websockets") as client:
        client._client.address = ("127.0.0.1", emulator.port)
        assert client.connect() == 0
        client.subscribe_to_messages()
        assert client.send(b"x" * 100_000)
        emulator.send_c2d(device.device_id, b"y" * 60_000)
        assert client.next_message().payload == b"y" * 60_000
        lines = [line for line in emulator.hub_log if line.device_id == device.device_id and line.event == "connected"]
        assert f"sni={device.hub}" in lines[-1].detail
        assert emulator.hub_command("disconnect", device=device.device_id)["wasConnected"] and client.has_ended()
    with PahoDevice(emulator, device, transport="websockets", token="no token") as client:
        client._client.address = ("127.0.0.1", emulator.port)
        assert client.connect() == 5


def test_connections_leave_nothing_behind(emulator: EmulatorInThread, device: DeviceCredentials) -> None:
    def descriptors() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    def threads() -> int:
        return threading.active_count()

    for endings in ("goodbye", "vanish"):
        before = None
        for _ in range(12):
            with PahoDevice(emulator, device) as client:
                assert client.connect() == 0
                getattr(client, endings)()
            time.sleep(0.05)
            before = before or (descriptors(), threads())
        deadline = time.monotonic() + 5
        while (descriptors(), threads()) > before and time.monotonic() < deadline:
            time.sleep(0.1)
        assert (descriptors(), threads()) <= before, endings


class Call:
    """A method call under way in a thread."""

    def __init__(self, emulator: EmulatorInThread, device: DeviceCredentials, method: str, payload: object) -> None:
        self._said: queue.Queue[object] = queue.Queue()

        def run() -> None:
            try:
                self._said.put(emulator.invoke(device.device_id, method, payload))
            except ControlError as error:
                self._said.put(error)

        threading.Thread(target=run, daemon=True).start()

    def result(self) -> object:
        return self._said.get(timeout=60)


def devices(emulator: EmulatorInThread, device: DeviceCredentials) -> list[dict[str, Any]]:
    """What the hubs list of this device."""
    listed = emulator.hub_command("devices")["devices"]
    return [entry for entry in listed if entry["deviceId"] == device.device_id]


def tls(emulator: EmulatorInThread) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(emulator.ca_file))


def deep(levels: int) -> bytes:
    return b'{"a":' * levels + b"1" + b"}" * levels
