"""A hub in virtual time that verifies who connects and can be told to misbehave, and a program on the device.

Topics, answers and versions: IoT Hub developer guide, "Communicate with an IoT hub using MQTT". A `FakeHub` knows no
clock: `support.world` calls it with its own and carries its events to the device. Runs on both runtimes.
"""

import binascii

from dps_agent.effects import NoReply
from dps_agent.hub_effects import (
    Acknowledged,
    Arrived,
    CloudMessage,
    ConnAck,
    Desired,
    Gone,
    Granted,
    MethodCall,
    TelemetryDone,
    TwinDone,
)
from dps_agent.properties import merged
from dps_agent.sas import percent_decode
from dps_agent.session import decode_properties, encode_properties, telemetry_size
from dps_hal.platform import from_json, hmac_sha256, to_json

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from dps_agent.hub_effects import Connect, Event, Message, Publish, Subscribe

FOREVER_S = 1e12
ANSWER_AFTER_S = 0.05
NOT_AUTHORIZED = 5  # MQTT 3.1.1, table 3.1
SILENT = -1  # in `script`: the hub takes the connection and says nothing
CONNECT_LIMIT_S = 60


class FakeHub:
    """One hub with one device. `keys` are those that it accepts, by device id.

    `script` decides about the next connections instead: a CONNACK code, SILENT, a NoReply, or None for the hub itself.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.keys: dict[str, bytes] = {}
        self.certified: list[str] = []  # devices that it knows by the certificate of their connection
        self.chains: list[bytes] = []  # issued ones that it takes
        self.script: list[Any] = []
        self.absent = ""  # a NoReply reason for every connection
        self.lacks: list[str] = []  # words in filters and topics that it does not serve
        self.refuses = False  # such a subscription, else it ends the connection
        self.poison = b""  # a payload that it ends the connection for
        self.mute = False  # it answers nothing but CONNECT
        self.mute_pubacks = False
        self.puback_after_s = ANSWER_AFTER_S
        self.lose = 0  # so many of the next publishes do not arrive, and the connection ends
        self.twin_statuses: list[int] = []  # for the next twin requests instead of 200 and 204; 0: no answer
        self.desired: dict[str, Any] = {"$version": 1}
        self.reported: dict[str, Any] = {"$version": 1}
        self.patches: list[dict[str, Any]] = []  # to it, in the order in which the hub took them
        self.broken_twin: bytes | None = None  # answers GET instead
        self.connections: list[tuple[float, int]] = []  # when, and what the hub answered; -1: not even CONNACK
        self.received: list[tuple[str, bytes]] = []  # telemetry: properties as in the topic, payload; with repetitions
        self.answers: list[tuple[str, str, bytes]] = []  # to methods: status, rid, payload
        self.twin_gets = 0
        self.stale_acknowledgements = 0
        self.filters: list[str] = []  # of the session that the hub keeps for the device
        self.queued: list[tuple[str, bytes]] = []  # C2D that the device has not acknowledged: topic, payload
        self.deliveries = 0
        self._forget()

    def _forget(self) -> None:
        self.device_id = ""
        self.keep_alive_s = 0
        self.ends_at_s = -1.0  # the connection serves until then
        self.events: list[tuple[float, Event]] = []  # on their way to the device: when they arrive
        self.sent: dict[int, tuple[str, bytes]] = {}  # packet id -> C2D on this connection
        self.packet_id = 0

    # What the device does.

    def connect(self, effect: "Connect", now_s: float, utc_s: int) -> "ConnAck | NoReply":
        """Answers CONNECT; `utc_s` is the true time."""
        self._forget()
        answer: Any = self.script.pop(0) if self.script else None
        if self.absent and answer is None:
            answer = NoReply(self.absent, False)
        if answer == SILENT:
            answer = NoReply("timeout: the hub said nothing", True)
        if answer is None:
            expires_at_s = self._verified(effect, utc_s)
            answer = 0 if expires_at_s else NOT_AUTHORIZED
        else:
            expires_at_s = int(FOREVER_S)
        self.connections.append((now_s, answer if isinstance(answer, int) else -1))
        if isinstance(answer, NoReply):
            return answer
        if answer:
            return ConnAck(answer, False)
        self.device_id = effect.device_id
        self.ends_at_s = now_s + expires_at_s - utc_s
        self.keep_alive_s = effect.keep_alive_s
        self.events.append((self.ends_at_s, Gone("closed: the token expired")))
        if effect.clean_session:
            self.filters = []
        present = bool(self.filters)
        self._deliver(now_s)
        return ConnAck(0, present)

    def _verified(self, effect: "Connect", utc_s: int) -> int:
        """The token's expiry, or 0 where user name or token is not right."""
        user, _, query = effect.user_name.partition("?")
        version = "2025-08-01-preview" if isinstance(effect.token, bytes) else "2021-04-12"
        if user != f"{self.name}/{effect.device_id}/" or not query.startswith(
            f"api-version={version}&DeviceClientType="
        ):
            return 0
        fields: dict[str, str] = {}
        if effect.token is None:
            return int(FOREVER_S) if effect.device_id in self.certified else 0
        if isinstance(effect.token, bytes):
            return int(FOREVER_S) if effect.token in self.chains else 0
        kind, _, text = effect.token.header().partition(" ")
        for pair in text.split("&"):
            name, _, value = pair.partition("=")
            fields[name] = value
        key = self.keys.get(effect.device_id)
        if kind != "SharedAccessSignature" or key is None or "skn" in fields:
            return 0
        wanted = hmac_sha256(key, f"{fields['sr']}\n{fields['se']}".encode())
        if binascii.a2b_base64(percent_decode(fields["sig"])) != wanted or int(fields["se"]) <= utc_s:
            return 0
        expected = f"{self.name}/devices/{effect.device_id}".lower()
        return int(fields["se"]) if percent_decode(fields["sr"]).lower() == expected else 0

    def subscribe(self, effect: "Subscribe", packet_id: int, now_s: float) -> None:
        """Answers SUBSCRIBE."""
        if not self.serves(now_s) or self.mute:
            return
        codes = []
        for topic, qos in effect.filters:
            lacking = self._is_lacking(topic)
            if lacking and not self.refuses:
                self.drop(now_s)
                return
            codes.append(0x80 if lacking else min(qos, 1))
            if not lacking and topic not in self.filters:
                self.filters.append(topic)
        self.events.append((now_s + ANSWER_AFTER_S, Granted(packet_id, tuple(codes))))
        self._deliver(now_s + ANSWER_AFTER_S)

    def _is_lacking(self, topic: str) -> bool:
        return bool([word for word in self.lacks if word in topic])

    def publish(self, effect: "Publish", packet_id: int, now_s: float) -> None:
        """Takes one PUBLISH and answers as the topic asks for."""
        if not self.serves(now_s):
            return
        if self.lose:
            self.lose -= 1
            self.drop(now_s, "closed: the network failed")
            return
        topic = effect.topic
        if self._is_lacking(topic) or (self.poison and self.poison == effect.payload):
            self.drop(now_s)
            return
        assert "+" not in topic and "#" not in topic, topic
        events = f"devices/{self.device_id}/messages/events/"
        if topic.startswith(events):
            counted = telemetry_size(decode_properties(topic[len(events) :]), len(effect.payload))
            assert counted <= 262144, "a hub would end the connection"
            self.received.append((topic[len(events) :], effect.payload))
            if effect.qos and not self.mute and not self.mute_pubacks:
                self.events.append((now_s + self.puback_after_s, Acknowledged(packet_id)))
        elif topic.startswith("$iothub/methods/res/"):
            code, _, rest = topic[20:].partition("/")
            self.answers.append((code, rest[len("?$rid=") :], effect.payload))
        elif topic.startswith("$iothub/twin/GET/"):
            self.twin_gets += 1
            twin = to_json({"desired": self.desired, "reported": self.reported}).encode()
            self._answer_twin(topic, 200, twin if self.broken_twin is None else self.broken_twin, now_s)
        elif topic.startswith("$iothub/twin/PATCH/properties/reported/"):
            if not self._will_refuse():
                self.patches.append(from_json(effect.payload))
                self.reported = merged(self.reported, self.patches[-1])
                self.reported["$version"] += 1
            self._answer_twin(topic, 204, b"", now_s)
        else:
            self.drop(now_s, "closed: an undocumented topic")

    def _answer_twin(self, topic: str, status: int, payload: bytes, now_s: float) -> int:
        if self.twin_statuses:
            status = self.twin_statuses.pop(0)
        if status and not self.mute:
            rid = topic.partition("?$rid=")[2]
            version = f"&$version={self.reported['$version']}" if status == 204 else ""
            answer = Arrived(f"$iothub/twin/res/{status}/?$rid={rid}{version}", payload if status < 300 else b"", 0)
            self.events.append((now_s + ANSWER_AFTER_S, answer))
        return status

    def _will_refuse(self) -> bool:
        return bool(self.twin_statuses) and self.twin_statuses[0] not in (0, 204)

    def acknowledge(self, packet_id: int) -> None:
        """Takes the PUBACK for a C2D message."""
        message = self.sent.pop(packet_id, None)
        if message is None:
            self.stale_acknowledgements += 1
        else:
            self.queued.remove(message)

    def disconnect(self) -> None:
        """The device ends the connection."""
        self._forget()

    # What happens to the device.

    def serves(self, now_s: float) -> bool:
        """Whether there is a connection on which something can still come through."""
        return now_s < self.ends_at_s

    def drop(self, now_s: float, reason: str = "closed: by the hub", notice_after_s: float = 0.0) -> None:
        """Ends the connection; the device notices it after `notice_after_s`."""
        if self.serves(now_s):
            self.ends_at_s = now_s
            self.events = [entry for entry in self.events if entry[0] <= now_s]
            self.events.append((now_s + notice_after_s, Gone(reason)))

    def fall_silent(self, now_s: float) -> None:
        """Nothing comes through any more; the device notices it after 1.5 times its keep-alive."""
        self.drop(now_s, "timeout: the hub was silent", 1.5 * self.keep_alive_s)

    def send(self, now_s: float, topic: str, payload: "bytes | None", packet_id: int = 0) -> None:
        """Delivers a message as it is, where there is a connection."""
        if self.serves(now_s):
            self.events.append((now_s + ANSWER_AFTER_S, Arrived(topic, payload, packet_id)))

    def send_c2d(self, now_s: float, properties: "dict[str, str]", payload: bytes) -> None:
        """Queues a cloud-to-device message until the device acknowledges it."""
        topic = f"devices/{self.device_id}/messages/devicebound/{encode_properties(properties)}"
        self.queued.append((topic, payload))
        self._deliver(now_s)

    def _deliver(self, now_s: float) -> None:
        if self.serves(now_s) and [topic for topic in self.filters if "devicebound" in topic]:
            for message in self.queued:
                if message not in self.sent.values():
                    self.deliveries += 1
                    self.packet_id += 1  # they begin anew with every connection
                    self.sent[self.packet_id] = message
                    self.send(now_s, message[0], message[1], self.packet_id)

    def call(self, now_s: float, name: str, rid: str, payload: "bytes | None" = b"{}") -> None:
        """Invokes a direct method."""
        self.send(now_s, f"$iothub/methods/POST/{name}/?$rid={rid}", payload)

    def change_desired(self, now_s: float, name: str, value: "Any", push: bool = True) -> None:
        """Changes one desired property; without `push` the patch gets lost."""
        version = self.desired["$version"] + 1
        self.desired[name] = value
        self.desired["$version"] = version
        if push and [topic for topic in self.filters if "desired" in topic]:
            patch = to_json({name: value, "$version": version}).encode()
            self.send(now_s, f"$iothub/twin/PATCH/properties/desired/?$version={version}", patch)

    def next_event_at_s(self) -> float:
        """When the next event reaches the device."""
        return min([at_s for at_s, _ in self.events]) if self.events else FOREVER_S

    def take_event(self, now_s: float) -> "Event | None":
        """The first event that has reached the device, in the order in which they were sent."""
        for place, (at_s, event) in enumerate(self.events):
            if at_s <= now_s:
                del self.events[place]
                return event
        return None

    def answer_to(self, rid: str) -> "list[str]":
        """The statuses with which the device answered a call."""
        return [status for status, answered, _ in self.answers if answered == rid]


class FakeProgram:
    """A program on the device: remembers what it is told; `on_message` may act on it. `takes` nothing or all."""

    def __init__(self) -> None:
        self.takes = True
        self.readers = 1  # of messages
        self.told: list[Message] = []
        self.done: dict[int, bool] = {}  # request id -> accepted
        self.sent: dict[int, bool] = {}  # request id -> whether the hub may have it
        self.twins: dict[int, TwinDone] = {}  # request id -> what became of it
        self.on_message: Callable[[Message], None] | None = None
        self.keeps = True  # what it was told; a long life is too long for that

    def tell(self, message: "Message") -> bool:
        """See `Tell`."""
        if self.keeps:
            self.told.append(message)
        if isinstance(message, TelemetryDone):
            assert message.request_id not in self.done, f"answered twice: {message}"
            assert message.sent or not message.accepted, message
            self.done[message.request_id] = message.accepted
            self.sent[message.request_id] = message.sent
        if isinstance(message, TwinDone):
            assert message.request_id not in self.twins, f"answered twice: {message}"
            self.twins[message.request_id] = message
        if self.on_message and self.takes:
            self.on_message(message)
        return self.takes

    def messages(self) -> "list[CloudMessage]":
        """The cloud-to-device messages that it was told."""
        return [message for message in self.told if isinstance(message, CloudMessage)]

    def calls(self) -> "list[MethodCall]":
        """The method calls that it was told."""
        return [message for message in self.told if isinstance(message, MethodCall)]

    def desired(self) -> "list[tuple[int, bool]]":
        """Version of the desired properties that it was told, and whether it was the whole of them."""
        return [(message.version, message.whole) for message in self.told if isinstance(message, Desired)]
