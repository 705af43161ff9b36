"""DPS over MQTT: packets of a device's connection, what is asked of the service by them, and how it answers."""

from __future__ import annotations

import json
import random
import socket
import ssl
from typing import Any

import pytest

from dps_emulator import mqtt
from dps_emulator.attestation import SymmetricKeys
from dps_emulator.dps_mqtt import ANSWERS, DpsLink, is_dps
from dps_emulator.enrollments import Enrollment
from dps_emulator.faults import Fault
from dps_emulator.service import DpsService, Settings
from emulator.device_side import Device, signed_token
from support.cloud.emulator import EmulatorInThread
from support.cloud.memory import PlainRegistrations

NOW = 1_790_000_000.0
KEY = bytes(range(32))
RESOURCE = "0ne00000000%2Fregistrations%2Fpress-07"
USER_NAME = "0ne00000000/registrations/press-07/api-version=2019-03-31&ClientVersion=x%2F1.9.1"
REGISTER = "$dps/registrations/PUT/iotdps-register/?$rid=r-1"
ENROLLMENT = Enrollment("press-07", SymmetricKeys(KEY, KEY))


def connect(user_name: str = USER_NAME, client_id: str = "press-07", **token: Any) -> mqtt.Connect:
    password = signed_token(KEY, RESOURCE, int(NOW) + 3600, **token).encode()
    return mqtt.Connect(mqtt.LEVEL, client_id, user_name, password, clean_session=False, keep_alive_s=60)


class Connection:
    """A device's connection and the service behind it; `sent` is what came back, taken apart."""

    def __init__(self, connect: mqtt.Connect, **settings: Any) -> None:
        self.service = DpsService(Settings(**settings), {}, PlainRegistrations(), random.Random(1).randbytes)
        self.service.enroll(ENROLLMENT)
        self.now, self.sent, self.is_dropped, self.notes = NOW, list[bytes](), False, list[str]()
        self.link = DpsLink(self, connect, lambda event, detail: self.notes.append(f"{event} {detail}"))

    def send(self, packet: bytes) -> None:
        self.sent.append(packet)

    def drop(self) -> None:
        self.is_dropped = True

    def subscribe(self, qos: int = 1) -> None:
        self.link.received(mqtt.Subscribe(1, ((ANSWERS, qos),)))
        assert self.sent.pop() == mqtt.suback(1, [qos])

    def publish(self, topic: str, payload: bytes = b"", qos: int = 1) -> list[mqtt.Publish]:
        """Asks, and the publications that come back."""
        del self.sent[:]
        asked = self.link.received(mqtt.Publish(topic, payload, qos, packet_id=7 if qos else 0))
        if asked:
            self.link.answered(asked, self.service.answer(asked.request, self.now))
        if qos == 1 and not self.is_dropped:
            assert self.sent.pop(0) == mqtt.puback(7)
        return [packet for packet in mqtt.PacketStream().feed(b"".join(self.sent)) if isinstance(packet, mqtt.Publish)]


@pytest.mark.parametrize("key_name", ["registration", None])
@pytest.mark.parametrize(("poll", "qos"), [(b" ", 1), (b"", 0), (b'{"registrationId":"press-07"}', 1)])
def test_a_device_registers_and_polls_as_official_clients_do(key_name: str | None, poll: bytes, qos: int) -> None:
    device = Connection(connect(key_name=key_name), assign_after_s=5, retry_after_s=3)
    assert device.sent == [mqtt.connack(mqtt.ACCEPTED)], "no session is kept"
    device.subscribe(qos)
    (answer,) = device.publish(REGISTER, b'{"payload":{"site":7},"registrationId":"press-07"}', qos)
    assert answer.topic == "$dps/registrations/res/202/?$rid=r-1&retry-after=3" and answer.qos == qos
    assigning = json.loads(answer.payload)
    assert assigning["status"] == "assigning"
    topic = f"$dps/registrations/GET/iotdps-get-operationstatus/?$rid=2&operationId={assigning['operationId']}"
    (answer,) = device.publish(topic, poll, qos)
    assert answer.topic == "$dps/registrations/res/202/?$rid=2&retry-after=3"
    device.now += 5
    (answer,) = device.publish(topic, poll, qos)
    assert answer.topic == "$dps/registrations/res/200/?$rid=2"
    state = json.loads(answer.payload)["registrationState"]
    assert (state["status"], state["symmetricKey"], state["payload"]) == ("assigned", {}, {"site": 7})


def test_a_user_name_tells_dps_from_a_hub() -> None:
    for user_name in (USER_NAME, "0ne1/registrations/a/api-version=2021-10-01", "0ne1/registrations/a/"):
        assert is_dps(connect(user_name))
    for user_name in ("hub/registrations/?api-version=2021-04-12", "hub/press-07", "", "a/registrations/b/?x=1"):
        assert not is_dps(connect(user_name))
    assert not is_dps(mqtt.Connect(5)) and not is_dps(mqtt.Connect(mqtt.LEVEL))


@pytest.mark.parametrize(
    ("given", "body", "code"),
    [
        (connect(key_name="policy"), {"registrationId": "press-07"}, 401002),
        (mqtt.Connect(mqtt.LEVEL, "press-07", USER_NAME), {"registrationId": "press-07"}, 401002),
        (mqtt.Connect(mqtt.LEVEL, "press-07", USER_NAME, b"\xff"), {"registrationId": "press-07"}, 401002),
        (connect("0ne1/registrations/press-07/api-version=2019-03-31"), {}, 404200),
        (connect("0ne00000000/registrations/press-07/x"), {}, 400001),
        (connect(), {"registrationId": "press-08"}, 400001),
        (connect(), {"tpm": Device.of_the_vectors().attestation()}, 400001),
        (connect(), [], 400001),
    ],
)
def test_who_is_refused_connects_and_is_told_by_the_answer(given: mqtt.Connect, body: object, code: int) -> None:
    device = Connection(given)
    assert device.sent == [mqtt.connack(mqtt.ACCEPTED)]
    device.subscribe()
    (answer,) = device.publish(REGISTER, json.dumps(body).encode())
    assert answer.topic == f"$dps/registrations/res/{code // 1000}/?$rid=r-1"
    assert json.loads(answer.payload)["errorCode"] == code and b"authenticationKey" not in answer.payload


def test_another_client_id_than_the_user_names_is_not_let_in() -> None:
    for given in (connect(client_id="press-08"), connect("0ne1/registrations/a b/", "a b")):
        device = Connection(given)
        assert device.sent == [mqtt.connack(mqtt.NOT_AUTHORIZED)] and device.is_dropped
        assert device.notes[0].startswith("refused") and not device.link.is_open


@pytest.mark.parametrize(
    ("topic", "qos"),
    [
        (REGISTER, 2),
        ("$dps/registrations/PUT/iotdps-register/", 1),
        ("$dps/registrations/PUT/iotdps-register/?x=1", 1),
        ("$dps/registrations/GET/iotdps-get-operationstatus/?$rid=1", 1),
        ("devices/press-07/messages/events/", 1),
    ],
)
def test_what_dps_does_not_have_ends_the_connection(topic: str, qos: int) -> None:
    device = Connection(connect())
    device.subscribe()
    assert device.publish(topic, b"{}", qos) == [] and device.is_dropped and not device.link.is_open


def test_only_the_answers_can_be_subscribed_to_and_only_then_do_they_come() -> None:
    device = Connection(connect())
    assert device.publish(REGISTER, b"{}") == []
    device.link.received(mqtt.Subscribe(2, (("#", 1), (ANSWERS, 2))))
    assert device.sent.pop() == mqtt.suback(2, [mqtt.REFUSED_SUBSCRIPTION, 1])
    assert len(device.publish(REGISTER, b"{}")) == 1
    device.link.received(mqtt.Unsubscribe(3, (ANSWERS,)))
    assert device.publish(REGISTER, b"{}") == []
    device.link.received(mqtt.PingRequest())
    assert device.sent.pop() == mqtt.ping_response()
    device.link.received(mqtt.Disconnect())
    assert device.is_dropped and device.notes[-1] == "dps-closed the device said goodbye"


def test_a_client_id_is_told_in_a_line_that_has_an_end() -> None:
    with EmulatorInThread() as emulator:
        context = ssl.create_default_context(cafile=str(emulator.ca_file))
        with (
            socket.create_connection(("127.0.0.1", emulator.hub_port), 60) as plain,
            context.wrap_socket(plain, server_hostname="global.azure-devices-provisioning.net") as client,
        ):
            text = bytes([0, 4]) + b"MQTT" + bytes([4, 0x82, 0, 60])
            for field in (b"x" * 60_000, USER_NAME.encode()):
                text += len(field).to_bytes(2) + field
            client.sendall(bytes([0x10, 0x80 | len(text) % 128, 0x80 | len(text) // 128 % 128, len(text) >> 14]) + text)
            assert client.recv(4) == mqtt.connack(mqtt.NOT_AUTHORIZED)
        (line,) = emulator.await_hub_log("refused")
    assert line.device_id == "x" * 200 and len(line.text()) < 1000


def test_faults_of_dps_reach_its_connections_over_mqtt_as_well() -> None:
    throttled = Fault(operation="register", request=1, status=429, headers={"Retry-After": "7"})
    cut = Fault(operation="register", request=2, cut_after_bytes=-1)
    with EmulatorInThread(Settings(retry_after_s=0), [ENROLLMENT], [throttled, cut]) as emulator:
        context = ssl.create_default_context(cafile=str(emulator.ca_file))
        with (
            socket.create_connection(("127.0.0.1", emulator.hub_port), 60) as plain,
            context.wrap_socket(plain, server_hostname="global.azure-devices-provisioning.net") as client,
        ):
            text = bytes([0, 4]) + b"MQTT" + bytes([4, 0x82, 0, 60])
            for field in (b"press-07", USER_NAME.encode()):
                text += len(field).to_bytes(2) + field
            client.sendall(bytes([0x10, 0x80 | len(text) % 128, len(text) // 128]) + text)
            wanted = len(ANSWERS).to_bytes(2) + ANSWERS.encode() + b"\0"
            client.sendall(bytes([0x82, 2 + len(wanted), 0, 1]) + wanted)
            asked = mqtt.publish(mqtt.Publish(REGISTER, b"{}"))
            client.sendall(asked)
            came = b""
            while b"retry-after=7" not in came:
                came += client.recv(4096)
            assert b"$dps/registrations/res/429/?$rid=r-1&retry-after=7" in came and b'"errorCode":429001' in came
            client.sendall(asked)
            assert client.recv(4096) == b"", "the connection ends without an answer"
        emulator.await_hub_log("dps-closed")
        lines = [(line.method, line.operation, line.fault) for line in emulator.log]
    assert lines == [("PUT", "register", 1), ("PUT", "register", 2)]
