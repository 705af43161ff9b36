"""MQTT 3.1.1 packets as a server meets them: bytes to values and back; no socket, no state but half a packet.

Source: MQTT 3.1.1 (OASIS, 29 October 2014). What a server never receives (CONNACK, SUBACK, …) and the packets of QoS 2
are protocol errors here; a PUBLISH of QoS 2 is parsed, because the hub has an opinion on it.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

LEVEL = 4  # MQTT 3.1.1
MAX_PACKET_BYTES = 320 * 1024  # the largest telemetry is 256 KiB, its topic at most 64 KiB
REFUSED_SUBSCRIPTION = 0x80

# CONNACK return codes, 3.2.2.3
ACCEPTED = 0
BAD_LEVEL = 1
BAD_CLIENT_ID = 2
UNAVAILABLE = 3
BAD_USER_NAME = 4
NOT_AUTHORIZED = 5

_CONNECT, _CONNACK, _PUBLISH, _PUBACK, _SUBSCRIBE, _SUBACK = 1, 2, 3, 4, 8, 9
_UNSUBSCRIBE, _UNSUBACK, _PINGREQ, _PINGRESP, _DISCONNECT = 10, 11, 12, 13, 14


class ProtocolError(ValueError):
    """Bytes that are no packet a client may send; the connection can't be used any more."""


@dataclass(frozen=True)
class Publish:
    """An application message on its way; also a connection's will."""

    topic: str
    payload: bytes = field(repr=False)
    qos: int = 0
    retain: bool = False
    dup: bool = False
    packet_id: int = 0  # 0: QoS 0, which has none


@dataclass(frozen=True)
class Connect:
    """A client's first packet; of another protocol level only the level is known."""

    level: int
    client_id: str = ""
    user_name: str | None = None
    password: bytes | None = field(default=None, repr=False)
    clean_session: bool = True
    keep_alive_s: int = 0
    will: Publish | None = None


@dataclass(frozen=True)
class PubAck:
    """The client has a message of QoS 1."""

    packet_id: int


@dataclass(frozen=True)
class Subscribe:
    """Topic filters and the QoS that is asked for each."""

    packet_id: int
    filters: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Unsubscribe:
    """Topic filters that are wanted no more."""

    packet_id: int
    filters: tuple[str, ...]


@dataclass(frozen=True)
class PingRequest:
    """A sign of life."""


@dataclass(frozen=True)
class Disconnect:
    """The client says goodbye: its will is void."""


Packet = Connect | Publish | PubAck | Subscribe | Unsubscribe | PingRequest | Disconnect


class PacketStream:
    """Cuts a byte stream into packets."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def feed(self, content: bytes) -> Iterator[Packet]:
        """The packets that `content` completes; raises ProtocolError after those before the bad one."""
        self._bytes += content
        while True:
            size, length_bytes = _remaining_length(self._bytes)
            if length_bytes == 0 or len(self._bytes) < 1 + length_bytes + size:
                return
            head, start = self._bytes[0], 1 + length_bytes
            body = bytes(self._bytes[start : start + size])
            del self._bytes[: start + size]
            yield parse_packet(head, body)


def _remaining_length(content: bytearray) -> tuple[int, int]:
    """The length field's value and its own size; size 0 where it is not complete yet."""
    value = 0
    for at in range(1, min(len(content), 5)):
        value |= (content[at] & 0x7F) << 7 * (at - 1)
        if not content[at] & 0x80:
            if value > MAX_PACKET_BYTES:
                raise ProtocolError(f"a packet of {value} bytes, at most {MAX_PACKET_BYTES} are taken")
            return value, at
    if len(content) >= 5:
        raise ProtocolError("a length field of more than four bytes")
    return 0, 0


class _Body:
    """A packet's variable header and payload, read from the front."""

    def __init__(self, content: bytes) -> None:
        self._content = content
        self._at = 0

    def take(self, size: int) -> bytes:
        piece = self._content[self._at : self._at + size]
        if len(piece) < size:
            raise ProtocolError("a packet that ends too early")
        self._at += size
        return piece

    def number(self) -> int:
        return int.from_bytes(self.take(2))

    def binary(self) -> bytes:
        return self.take(self.number())

    def text(self) -> str:
        try:
            text = self.binary().decode()
        except UnicodeDecodeError:
            raise ProtocolError("text that is not UTF-8") from None
        if "\0" in text:
            raise ProtocolError("text with U+0000")
        return text

    def packet_id(self) -> int:
        number = self.number()
        if number == 0:
            raise ProtocolError("packet identifier 0")
        return number

    def rest(self) -> bytes:
        return self.take(len(self._content) - self._at)

    def has_more(self) -> bool:
        return self._at < len(self._content)


def parse_packet(head: int, content: bytes) -> Packet:
    """One packet from its first byte and what follows the length; raises ProtocolError."""
    kind, flags, body = head >> 4, head & 15, _Body(content)
    if kind == _PUBLISH:
        return _publish(flags, body)
    if flags != (2 if kind in (_SUBSCRIBE, _UNSUBSCRIBE) else 0):
        raise ProtocolError(f"flags {flags} in a packet of type {kind}")
    packet: Packet
    match kind:
        case 1:
            packet = _connect(body)
        case 4:
            packet = PubAck(body.packet_id())
        case 8:
            packet = _subscribe(body)
        case 10:
            packet = _unsubscribe(body)
        case 12:
            packet = PingRequest()
        case 14:
            packet = Disconnect()
        case _:
            raise ProtocolError(f"a packet of type {kind}")
    if body.has_more():
        raise ProtocolError(f"bytes behind the end of a packet of type {kind}")
    return packet


def _connect(body: _Body) -> Connect:
    name, level = body.text(), body.take(1)[0]
    if name not in ("MQTT", "MQIsdp"):
        raise ProtocolError("a CONNECT of another protocol")
    if (name, level) != ("MQTT", LEVEL):
        body.rest()  # the form of what follows depends on the level
        return Connect(level)
    flags, keep_alive_s, client_id = body.take(1)[0], body.number(), body.text()
    will, will_qos = None, flags >> 3 & 3
    if flags & 1 or will_qos == 3 or (not flags & 4 and flags & 0x38) or (flags & 0x40 and not flags & 0x80):
        raise ProtocolError(f"connect flags {flags:#04x}")
    if flags & 4:
        will_topic = body.text()
        will = Publish(will_topic, body.binary(), will_qos, bool(flags & 0x20))
    user_name = body.text() if flags & 0x80 else None
    password = body.binary() if flags & 0x40 else None
    return Connect(level, client_id, user_name, password, bool(flags & 2), keep_alive_s, will)


def _publish(flags: int, body: _Body) -> Publish:
    qos = flags >> 1 & 3
    if qos == 3:
        raise ProtocolError("a PUBLISH of QoS 3")
    topic = body.text()
    if not topic or "#" in topic or "+" in topic:
        raise ProtocolError("a PUBLISH to a topic with wildcards, or without a topic")
    packet_id = body.packet_id() if qos else 0
    return Publish(topic, body.rest(), qos, bool(flags & 1), bool(flags & 8), packet_id)


def _subscribe(body: _Body) -> Subscribe:
    packet_id = body.packet_id()
    filters = []
    while body.has_more():
        topic_filter, qos = body.text(), body.take(1)[0]
        if qos > 2:
            raise ProtocolError(f"a SUBSCRIBE for QoS {qos}")
        filters.append((topic_filter, qos))
    if not filters:
        raise ProtocolError("a SUBSCRIBE without a topic filter")
    return Subscribe(packet_id, tuple(filters))


def _unsubscribe(body: _Body) -> Unsubscribe:
    packet_id = body.packet_id()
    filters = []
    while body.has_more():
        filters.append(body.text())
    if not filters:
        raise ProtocolError("an UNSUBSCRIBE without a topic filter")
    return Unsubscribe(packet_id, tuple(filters))


def connack(code: int, *, session_present: bool = False) -> bytes:
    """The answer to CONNECT."""
    return bytes((_CONNACK << 4, 2, session_present, code))


def puback(packet_id: int) -> bytes:
    """The answer to a PUBLISH of QoS 1."""
    return struct.pack(">BBH", _PUBACK << 4, 2, packet_id)


def suback(packet_id: int, granted: list[int]) -> bytes:
    """The answer to SUBSCRIBE: for each filter the QoS granted, or REFUSED_SUBSCRIPTION."""
    return _packet(_SUBACK << 4, packet_id.to_bytes(2) + bytes(granted))


def unsuback(packet_id: int) -> bytes:
    """The answer to UNSUBSCRIBE."""
    return struct.pack(">BBH", _UNSUBACK << 4, 2, packet_id)


def ping_response() -> bytes:
    """The answer to PINGREQ."""
    return bytes((_PINGRESP << 4, 0))


def publish(message: Publish) -> bytes:
    """A message as bytes."""
    topic = message.topic.encode()
    head = _PUBLISH << 4 | message.dup << 3 | message.qos << 1 | message.retain
    packet_id = message.packet_id.to_bytes(2) if message.qos else b""
    return _packet(head, len(topic).to_bytes(2) + topic + packet_id + message.payload)


def _packet(head: int, body: bytes) -> bytes:
    length, size = bytearray(), len(body)
    while True:
        size, digit = size >> 7, size & 0x7F
        length.append(digit | (0x80 if size else 0))
        if not size:
            return bytes((head, *length)) + body
