"""MQTT packets and WebSocket frames, byte by byte."""

from __future__ import annotations

import pytest

from dps_emulator import mqtt, websocket
from dps_emulator.topics import format_properties, parse_properties, purpose_of

CONNECT = bytes.fromhex("101b 0004 4d515454 04 c2 003c 0002 6431 0004 75736572 0005 746f6b656e".replace(" ", ""))


def parsed(content: bytes) -> list[mqtt.Packet]:
    return list(mqtt.PacketStream().feed(content))


def test_packets_are_read_however_they_are_cut() -> None:
    publish = mqtt.publish(mqtt.Publish("devices/d1/messages/events/", b"x" * 300, 1, False, True, 7))
    content = CONNECT + publish + b"\xc0\x00" + b"\x40\x02\x00\x09" + b"\xe0\x00"
    expected = [
        mqtt.Connect(4, "d1", "user", b"token", True, 60),
        mqtt.Publish("devices/d1/messages/events/", b"x" * 300, 1, False, True, 7),
        mqtt.PingRequest(),
        mqtt.PubAck(9),
        mqtt.Disconnect(),
    ]
    for step in (1, 2, 3, 7, len(content)):
        stream = mqtt.PacketStream()
        packets = [packet for at in range(0, len(content), step) for packet in stream.feed(content[at : at + step])]
        assert packets == expected, f"step={step}"


def test_a_will_and_a_subscription_are_read() -> None:
    will = bytes.fromhex("1018 0004 4d515454 04 2e 0000 0002 6431 0003 612f62 0003 62796e".replace(" ", ""))
    assert parsed(will) == [
        mqtt.Connect(4, "d1", None, None, True, 0, mqtt.Publish("a/b", b"byn", 1, True)),
    ]
    assert parsed(bytes.fromhex("820b 0001 0001 61 01 0002 6223 02".replace(" ", ""))) == [
        mqtt.Subscribe(1, (("a", 1), ("b#", 2)))
    ]
    assert parsed(bytes.fromhex("a205 0002 0001 61".replace(" ", ""))) == [mqtt.Unsubscribe(2, ("a",))]


@pytest.mark.parametrize(
    "packet",
    [
        "30 02 0000",  # no topic
        "30 04 0002 6123",  # a wildcard
        "32 05 0001 61 0000",  # packet identifier 0
        "36 05 0001 61 0001",  # QoS 3
        "30 03 0001 ff",  # not UTF-8
        "30 03 0001 00",  # U+0000
        "80 06 0001 0001 61 01",  # flags
        "82 02 0001",  # no filter
        "82 06 0001 0001 61 03",  # QoS 3
        "a2 02 0001",
        "c1 00",
        "c0 01 00",  # bytes behind the end
        "20 02 0000",  # CONNACK
        "50 02 0001",  # PUBREC
        "00 00",
        "30 ff ff ff ff",
        "30 80 80 20",  # 512 KiB
        "10 0e 0004 4d515454 04 03 003c 0002 6431",  # reserved connect flag
        "10 0e 0004 4d515454 04 42 003c 0002 6431",  # password without user name
        "10 0e 0004 4d515454 04 0a 003c 0002 6431",  # QoS of no will
    ],
)
def test_what_no_client_may_send_is_a_protocol_error(packet: str) -> None:
    with pytest.raises(mqtt.ProtocolError):
        parsed(bytes.fromhex(packet))


def test_what_the_server_sends_is_bytes_of_the_specification() -> None:
    assert mqtt.connack(5) == bytes.fromhex("20020005")
    assert mqtt.connack(0, session_present=True) == bytes.fromhex("20020100")
    assert mqtt.puback(258) == bytes.fromhex("40020102") and mqtt.unsuback(258) == bytes.fromhex("b0020102")
    assert mqtt.suback(1, [1, 0x80]) == bytes.fromhex("900400010180") and mqtt.ping_response() == b"\xd0\x00"
    assert mqtt.publish(mqtt.Publish("a", b"b")) == bytes.fromhex("3004000161") + b"b"
    assert mqtt.publish(mqtt.Publish("a", bytes(200), 1, packet_id=3))[:8] == bytes.fromhex("32cd010001610003")


def test_property_bags_tell_null_from_empty_and_survive_a_round_trip() -> None:
    assert parse_properties("a&b=&c=1%202&%24.ct=x&d=%26%3D") == {
        "a": None,
        "b": "",
        "c": "1 2",
        "$.ct": "x",
        "d": "&=",
    }
    bag = {"ü &=": "%/+# °", "$.mid": "7"}
    assert parse_properties(format_properties(bag)) == bag


def test_topics_mean_what_the_hub_says_they_mean() -> None:
    assert purpose_of("devices/d/messages/events", "d").operation == "telemetry"
    assert purpose_of("devices/d/messages/events/a=b/", "d").properties == {"a": "b"}
    assert purpose_of("devices/d/messages/eventsx", "d").operation == "unknown"
    answer = purpose_of("$iothub/methods/res/404/?$rid=a-b&x=1", "d")
    assert (answer.operation, answer.status, answer.request_id) == ("method-answer", 404, "a-b")
    assert purpose_of("$iothub/methods/res/abc/?$rid=1", "d").operation == "unknown"


def frame(opcode: int, content: bytes, fin: bool = True) -> bytes:
    """A client's frame; the mask is 1, 2, 3, 4."""
    masked = bytes(byte ^ (at % 4 + 1) for at, byte in enumerate(content))
    size = bytes((0x80 | len(content),)) if len(content) < 126 else b"\xfe" + len(content).to_bytes(2)
    return bytes((fin << 7 | opcode,)) + size + b"\1\2\3\4" + masked


def test_frames_are_read_however_they_are_cut() -> None:
    content = frame(2, b"abc", fin=False) + frame(9, b"hi") + frame(0, b"de") + frame(2, b"") + frame(2, bytes(300))
    for step in (1, 3, len(content)):
        stream, carried, answers = websocket.FrameStream(), b"", b""
        for at in range(0, len(content), step):
            more, answer = stream.feed(content[at : at + step])
            carried, answers = carried + more, answers + answer
        assert (carried, answers) == (b"abcde" + bytes(300), b"\x8a\x02hi"), f"step={step}"
    assert stream.feed(frame(8, b"\x03\xe8bye") + b"rest") == (b"", b"\x88\x05\x03\xe8bye") and stream.closed


@pytest.mark.parametrize(
    "content",
    [
        frame(1, b"text"),
        b"\x82\x01a",  # without a mask
        b"\xc2\x80\1\2\3\4",  # a reserved bit
        b"\x82\xff" + b"\xff" * 8,  # a length of 64 bits
        b"\x82\xfe\x00\x01\1\2\3\4a",  # a length in more bytes than it needs
        frame(9, b"hi", fin=False),  # a control frame in pieces
        frame(0, b"goes on"),  # with what nothing began
        frame(2, b"a", fin=False) + frame(2, b"b"),  # a message within another
        b"\x82\xff" + (2**21).to_bytes(8) + b"\1\2\3\4" + bytes(2**20 + 1),  # a message without end
    ],
)
def test_frames_that_carry_no_mqtt_are_refused(content: bytes) -> None:
    with pytest.raises(websocket.WebSocketError):
        websocket.FrameStream().feed(content)


def test_frames_to_the_client_have_the_lengths_of_the_specification() -> None:
    assert websocket.binary_frame(b"a") == b"\x82\x01a"
    assert websocket.binary_frame(bytes(126))[:4] == b"\x82\x7e\x00\x7e"
    assert websocket.binary_frame(bytes(65_536))[:10] == b"\x82\x7f" + (65_536).to_bytes(8)


def test_only_the_hubs_own_path_and_subprotocol_are_upgraded() -> None:
    head = (
        "GET /$iothub/websocket?iothub-no-client-cert=true HTTP/1.1\r\nHost: x\r\nUpgrade: WebSocket\r\n"
        "Connection: keep-alive, Upgrade\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
        "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Protocol: mqttv3.1, mqtt"
    )
    accepted = websocket.upgrade(head.encode())
    assert accepted.accepted and b"Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n" in accepted.answer
    said = websocket.upgrade(head.replace("mqttv3.1, mqtt", "MQTT").encode())
    assert said.accepted and b"Sec-WebSocket-Protocol: MQTT\r\n" in said.answer, "as the C client offers it"
    assert not websocket.upgrade(head.replace("mqttv3.1, mqtt", "MQTT").encode(), strict=True).accepted
    for old, new, status in (
        ("/$iothub/websocket", "/mqtt", b"404"),
        ("WebSocket\r\n", "h2c\r\n", b"400"),
        ("Version: 13", "Version: 8", b"426"),
        ("Host: x\r\n", "", b"400"),
        ("Host: x\r\n", "Host: x\r\nHost: y\r\n", b"400"),
        ("Host: x\r\n", "Host: \xff..\r\n", b"400"),
        ("Key: dGhl", "Nothing: ", b"400"),
        ("GET ", "POST ", b"400"),
        ("mqttv3.1, mqtt", "mqttv3.1", b"400"),
    ):
        refused = websocket.upgrade(head.replace(old, new).encode())
        assert not refused.accepted and refused.answer.startswith(b"HTTP/1.1 " + status), new
