"""The hubs themselves: packets and the time go in, packets come out; no socket, file, clock or thread.

An IoT hub is no broker: a device publishes to the hub, the hub to a device, nothing goes from one device to another,
and who may connect is decided before anything else. Sources: "Use MQTT to establish communication with an IoT hub";
"Control access to IoT Hub with shared access signatures"; "IoT Hub error codes". Where nothing is published about the
real service, the choice made here is marked as ours.
"""

import base64
import contextlib
import functools
import ipaddress
import json
import math
import re
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol
from urllib.parse import quote, unquote
from weakref import WeakValueDictionary

from dps_emulator import mqtt, renewal, topics
from dps_emulator.attestation import Credential
from dps_emulator.certificates import CertificateError, authority_of, common_name, require_valid, thumbprints
from dps_emulator.enrollments import is_device_id
from dps_emulator.hub_devices import CloudMessage, DeviceRecords, HubDevice, MessageLog, Telemetry
from dps_emulator.issuing import FIRST_RENEWAL_API, has_requests, request_of
from dps_emulator.json_text import parse_json
from dps_emulator.limits import METHOD_METER_BYTES, Limits
from dps_emulator.registrations import Assignment, StateError, utc_text
from dps_emulator.service import DpsService
from dps_emulator.tokens import Token, TokenError, device_token_refusal, parse_token
from dps_emulator.tpm_keys import RandomBytes
from dps_emulator.twin import PatchError, Twin, parse_patch

MAX_TELEMETRY_BYTES = 256 * 1024
MAX_CLOUD_MESSAGE_BYTES = 64 * 1024
MAX_METHOD_BYTES = 128 * 1024
MAX_QUEUE = 50  # messages waiting for one device
MAX_DELIVERIES = 10  # deliveries of one message before it is given up
MAX_KEEP_ALIVE_S = 1177  # the hub caps 1.5 times the client's value at 29.45 min
MESSAGE_LIFE_S = 3600

# Hub error codes; HTTP status = code // 1000.
ARGUMENT_INVALID = 400004
KICKED = 400027
QUEUE_FULL = 403004
DEVICE_NOT_FOUND = 404001
NOT_ONLINE = 404103
CLOSED_REMOTELY = 404104
DEVICE_EXISTS = 409001
TOO_LARGE = 413001
THROTTLED = 429001
METHOD_TIMEOUT = 504101
_CODES = {400: ARGUMENT_INVALID, 413: TOO_LARGE, 429: THROTTLED}

_DETAIL_LIMIT = 400  # characters of a line that a client may have chosen
_READABLE = "/:=,;$#'"  # characters that the log shows as they are, besides those that a URL leaves so
# Documented is `{hub}/{deviceId}/?api-version=…`; a hub takes it without the version, the question mark, or both.
_USER_NAME = re.compile(r"(?P<hub>[^/?]+)/(?P<client_id>[^/?]+)(?:/.*)?", re.DOTALL)
_STRICT_USER_NAME = re.compile(r"[^/?]+/[^/?]+/\?(?:.*&)?api-version=[^&]+(?:&.*)?", re.DOTALL)
MAX_IN_FLIGHT = 1000  # unacknowledged messages of QoS 1 to one device, its queue apart; ours
_MAX_TOPIC_BYTES = 0xFFFF


class HubError(Exception):
    """A request to the hub that fails; `code` is one of the hub's error codes."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


class Wire(Protocol):
    """A connection's way back to the device."""

    def send(self, packet: bytes) -> None:
        """Sends bytes, unless the connection has ended."""

    def drop(self) -> None:
        """Ends the connection after what was sent; MQTT 3.1.1 has no word of goodbye for a server."""


@functools.lru_cache(128)  # a device's words are the same for each of its messages
def _shown(text: str, readable: str = "") -> str:
    return quote(text, safe=readable) or "-"


@dataclass(frozen=True)
class HubLine:
    """One thing that happened, as the log shows it; never a token, key or payload."""

    time: str
    hub: str
    device_id: str
    event: str  # connected, refused, closed, telemetry, …
    code: int = 0  # CONNACK, QoS or error code, as the event has it
    detail: str = ""

    def text(self) -> str:
        """The line: the time, then name=value, `-` for what is not there, percent-encoded."""
        return (
            f"{self.time} hub={_shown(self.hub)} device={_shown(self.device_id)}"
            f" event={self.event} code={self.code} detail={_shown(self.detail[:_DETAIL_LIMIT], _READABLE)}"
        )

    @classmethod
    def parse(cls, text: str) -> "HubLine | None":
        """The inverse of `text`; None for any other line."""
        when, *pairs = text.split() or [""]
        values = {name: value for name, _, value in (pair.partition("=") for pair in pairs)}
        if list(values) != ["hub", "device", "event", "code", "detail"]:
            return None
        hub, device_id, event, code, detail = ("" if value == "-" else unquote(value) for value in values.values())
        try:
            return cls(when, hub, device_id, event, int(code), detail)
        except ValueError:
            return None


@dataclass(frozen=True)
class MethodAnswer:
    """What a device said to a direct method."""

    status: int
    payload: Any


MethodAnswered = Callable[[MethodAnswer | HubError], None]


@dataclass(frozen=True)
class HubContext:
    """What all hubs of an emulator share."""

    messages: MessageLog
    random_bytes: RandomBytes
    clock_skew_s: int
    note: Callable[[HubLine], None]
    tier: str = "standard"
    limits: Limits | None = None
    strict: bool = False  # refuses what hubs tolerate of some clients, but nobody documents
    issue_after_s: float = 0.0  # from the 202 for a device's request to its certificate


class Certifies(Protocol):
    """What a hub has to issue certificates with: DPS's own CAs, and the enrolments that name them."""

    def policy_at(self, hub: str, device_id: str) -> str:
        """By which policy that device gets certificates; empty: by none."""
        ...

    def renewed(self, hub: str, device_id: str, request: bytes, now: float) -> tuple[bytes, ...]:
        """Another certificate for that device, and those of its CAs; raises CertificateError."""
        ...


class Hub:
    """One hub: its devices, and those that are connected."""

    def __init__(
        self,
        name: str,
        devices: DeviceRecords,
        issued: Callable[[str], Credential | None],
        context: HubContext,
        certifies: Certifies | None = None,
    ) -> None:
        """`issued(device_id)` is the credential that DPS has given the device here, or None."""
        self.certifies = certifies
        self.name = name
        self.is_basic = context.tier == "basic"  # no twin, methods or messages to devices: it hangs up on who asks
        self.context = context
        self._gates = context.limits.gates() if context.limits else {}
        self.links: dict[str, Link] = {}
        self._stored = devices
        # Devices in use, which this hub alone writes; the others are read when they are asked for.
        self._devices: WeakValueDictionary[str, HubDevice] = WeakValueDictionary()
        self._issued = issued
        self._expires_at_s = math.inf  # no token of a connection ends before
        self.issuing: set[str] = set()  # devices, by their ids in lower case, for which a certificate is under way

    def device(self, device_id: str) -> HubDevice:
        """The device; raises HubError where this hub has none of that name."""
        device = self.find(device_id)
        if device is None or self.credential_of(device) is None:
            raise HubError(DEVICE_NOT_FOUND, f"{self.name} has no device '{device_id}'")
        return device

    def find(self, device_id: str) -> HubDevice | None:
        """The device's record, made for one that DPS has assigned and that nothing is known of yet; raises StateError.

        It may have no credential any more.
        """
        key = device_id.lower()
        device = self._devices.get(key) or self._stored.get(key)
        if device is None:
            if self._issued(device_id) is None:
                return None
            device = HubDevice(device_id)
        self._devices[key] = device
        return device

    def credential_of(self, device: HubDevice) -> Credential | None:
        """What this device proves itself by, or None where it has nothing any more."""
        if device.withdrawn:
            return None
        return device.own_credential or self._issued(device.device_id)

    def add(self, device_id: str, key: bytes) -> None:
        """Registers a device with a symmetric key, as a service would without DPS; raises HubError if it is there."""
        known = self.find(device_id)
        if known and self.credential_of(known) is not None:
            raise HubError(DEVICE_EXISTS, f"{self.name} already has a device '{known.device_id}'")
        self.adopt(HubDevice(device_id, key))

    def save(self, device: HubDevice) -> None:
        """Writes the device down."""
        self._stored[device.device_id.lower()] = device

    def change(self, device: HubDevice, **changes: Any) -> None:
        """Writes the device down with other values, and only then gives it those; raises StateError."""
        self.save(replace(device, **changes))
        for name, value in changes.items():
            setattr(device, name, value)

    def remove(self, device_id: str, now: float) -> HubDevice | None:
        """Forgets a device and ends its connection; what was known of it, or None."""
        device = self.find(device_id)
        self.disconnect(device_id, "the device was removed from the hub", now)
        self._devices.pop(device_id.lower(), None)
        with contextlib.suppress(KeyError):
            del self._stored[device_id.lower()]
        return device

    def receive(self, device_id: str, twin: Twin) -> None:
        """Takes over a device that DPS moved here, with the twin that it arrives with."""
        self.adopt(HubDevice(device_id, twin=twin))

    def admit(self, device_id: str) -> None:
        """Takes a device that DPS has assigned here; of one that was withdrawn nothing of before is left."""
        device = self.find(device_id)
        if device is None or device.withdrawn:
            device = HubDevice(device_id, enabled=device is None or device.enabled)
        device.own_key, device.own_secondary, device.own_thumbprints = None, None, ()  # from now on DPS's counts
        self.adopt(device)

    def withdraw(self, device_id: str, now: float) -> None:
        """Refuses the device until DPS assigns it anew, and ends its connection."""
        device = self.device(device_id)
        if device.own_key is not None:
            self.remove(device_id, now)
            return
        self.change(device, withdrawn=True)
        self.disconnect(device_id, "the device was withdrawn", now)

    def enable(self, device_id: str, enabled: bool, now: float) -> None:
        """Lets the device in again, or refuses it and ends its connection."""
        device = self.device(device_id)
        self.change(device, enabled=enabled)
        if not enabled:
            self.disconnect(device_id, "the device was disabled", now)

    def disconnect(self, device_id: str, reason: str, now: float) -> bool:
        """Ends the device's connection; whether it had one."""
        link = self.links.get(device_id.lower())
        if link:
            link.drop(reason, now)
        return link is not None

    def wait_s(self, operation: str, now_s: float) -> float | None:
        """How long a device's request has to wait where the hub has limits; None: it is refused."""
        gate = self._gates.get(operation)
        return gate.wait_s(now_s) if gate else 0.0

    def send(
        self, device_id: str, payload: bytes, properties: Mapping[str, str], now: float, life_s: float | None = None
    ) -> str:
        """Queues a message for the device and delivers it when it can; its message id. Raises HubError.

        One whose life was asked for says when it ends.
        """
        device = self.device(device_id)
        if self.wait_s("send", now) is None:
            raise HubError(THROTTLED, f"{self.name} is throttled: too many messages to devices")
        if len(payload) > MAX_CLOUD_MESSAGE_BYTES:
            raise HubError(TOO_LARGE, f"{len(payload)} bytes; a message to a device has at most 64 KiB")
        self.expire(device, now)
        if len(device.queue) >= MAX_QUEUE:
            raise HubError(QUEUE_FULL, f"{MAX_QUEUE} messages are waiting for '{device_id}' already")
        message_id = properties.get("$.mid") or self.context.random_bytes(16).hex()
        named = {**properties, "$.mid": message_id, "$.to": f"/devices/{device.device_id}/messages/devicebound"}
        named.setdefault("iothub-ack", "none")  # as in published traces; no feedback is given
        expires_at_s = now + (MESSAGE_LIFE_S if life_s is None else life_s)
        if life_s is not None:
            named["$.exp"] = utc_text(expires_at_s)
        self.change(device, queue=[*device.queue, CloudMessage(message_id, payload, named, expires_at_s)])
        link = self.links.get(device_id.lower())
        if link:
            link.deliver(now)
        return message_id

    def invoke(
        self, device_id: str, name: str, payload: bytes, answered: MethodAnswered, now: float
    ) -> Callable[[], None]:
        """Calls a method; `answered` is called once. Returns what gives it up; raises HubError."""
        self.device(device_id)
        if len(payload) > MAX_METHOD_BYTES:
            raise HubError(TOO_LARGE, f"{len(payload)} bytes; a method takes at most 128 KiB")
        if None in [self.wait_s("invoke", now) for _ in range(max(1, -(-len(payload) // METHOD_METER_BYTES)))]:
            raise HubError(THROTTLED, f"{self.name} is throttled: too many direct methods")
        link = self.links.get(device_id.lower())
        if link is None or topics.METHOD_REQUESTS not in link.subscriptions:
            state = "is not connected" if link is None else "has not subscribed to methods"
            raise HubError(NOT_ONLINE, f"'{device_id}' {state}")
        return link.invoke(name, payload, answered)

    def set_desired(self, device_id: str, changes: dict[str, Any]) -> int:
        """Patches the desired properties and tells the device; the new version. Raises HubError, PatchError."""
        device = self.device(device_id)
        twin = device.twin.patched("desired", changes)
        self.change(device, twin=twin)
        version = twin.desired_version
        link = self.links.get(device_id.lower())
        if link:
            content = json.dumps({**changes, "$version": version}, separators=(",", ":")).encode()
            topic = f"$iothub/twin/PATCH/properties/desired/?$version={version}"
            link.publish(topics.DESIRED_CHANGES, topic, content)
        return version

    def connect(self, wire: Wire, connect: mqtt.Connect, token: Token | None, server_name: str, now: float) -> "Link":
        """Admits a device that the caller has checked; ends its other connection. Without a token by a certificate."""
        device = self.device(connect.client_id)
        other = self.links.get(connect.client_id.lower())
        if other:
            other.drop("another connection of the same device", now, KICKED)
        detail = f"sni={server_name or '-'} keep-alive={connect.keep_alive_s} clean={int(connect.clean_session)}"
        device.model_id = _model_id(connect.user_name or "")
        if device.model_id:
            detail += f" model-id={device.model_id}"
        self.note("connected", device.device_id, now, detail=detail)
        session_present = not connect.clean_session and device.subscriptions is not None
        if not session_present:
            device.subscriptions = None if connect.clean_session else {}
            for message in device.queue:
                message.packet_id = 0
        self.expire(device, now, given_up=lambda message: message.deliveries >= MAX_DELIVERIES)
        self.save(device)
        link = self.links[connect.client_id.lower()] = Link(self, device, wire, connect, token, now)
        self._expires_at_s = min(self._expires_at_s, link.expires_at_s)
        wire.send(mqtt.connack(mqtt.ACCEPTED, session_present=session_present))
        link.redeliver(now)
        link.deliver(now)
        link.deliver_certificate(now)
        return link

    def tick(self, now: float) -> None:
        """Issues the certificates whose time has come, and ends the connections whose token has expired."""
        for device_id in list(self.issuing):
            link = self.links.get(device_id)
            if link:
                link.deliver_certificate(now)
            else:
                self.issuing.discard(device_id)
        if now < self._expires_at_s:
            return
        for link in list(self.links.values()):
            if link.expires_at_s <= now:
                link.drop("the token has expired", now)
        self._expires_at_s = min((link.expires_at_s for link in self.links.values()), default=math.inf)

    def note(self, event: str, device_id: str, now: float, code: int = 0, detail: str = "") -> None:
        """A line for the log."""
        self.context.note(HubLine(utc_text(now), self.name, device_id, event, code, detail))

    def page(self, after: str = "") -> list[tuple[str, HubDevice | StateError]]:
        """The next devices that this hub has a record of; see DeviceRecords."""
        return [(key, self._devices.get(key) or stored) for key, stored in self._stored.page(after)]

    def adopt(self, device: HubDevice) -> None:
        """Takes a device in, whatever was known of it before; raises StateError."""
        self.save(device)
        self._devices[device.device_id.lower()] = device

    def expire(
        self, device: HubDevice, now: float, given_up: Callable[[CloudMessage], bool] = lambda message: False
    ) -> None:
        """Takes out of the queue what is too old, and what is to be given up."""
        for message in list(device.queue):
            if message.expires_at_s <= now or given_up(message):
                device.queue.remove(message)
                self.note("dead-lettered", device.device_id, now, detail=message.message_id)


class Link:
    """One device's connection, from its CONNACK to its end."""

    __slots__ = (
        "_calls",
        "_certificate_packet_id",
        "_in_flight",
        "_last_packet_id",
        "_methods",
        "_persistent",
        "_renews",
        "_will",
        "_wire",
        "device",
        "expires_at_s",
        "has_certificate",
        "hub",
        "is_open",
        "subscriptions",
    )

    def __init__(
        self, hub: Hub, device: HubDevice, wire: Wire, connect: mqtt.Connect, token: Token | None, now: float
    ) -> None:
        self.hub = hub
        self.device = device
        self.is_open = True
        skew_s = hub.context.clock_skew_s
        # A token that was let in although its time was over lives as long as the tolerance.
        self.expires_at_s = math.inf
        if token:
            self.expires_at_s = token.expires_at_s + (0 if token.expires_at_s > now else skew_s)
        self.subscriptions = dict(device.subscriptions or {})
        self._persistent = not connect.clean_session
        self._wire = wire
        self._will = connect.will
        self._methods: dict[str, MethodAnswered] = {}
        self._calls = 0
        self._in_flight: set[int] = set()  # packet ids of everything but messages from the queue
        self._last_packet_id = 0
        if device.pending and not device.pending.status:
            hub.issuing.add(device.device_id.lower())
        self._certificate_packet_id = 0  # of a certificate that was sent with QoS 1, and is not acknowledged
        self._renews = has_requests(_of_query(connect.user_name or "", "api-version"), FIRST_RENEWAL_API)
        self.has_certificate = token is None

    def received(self, packet: mqtt.Packet, now: float) -> None:
        """Acts on one packet."""
        match packet:
            case mqtt.Publish():
                self._published(packet, now)
            case mqtt.PubAck():
                self._acknowledged(packet.packet_id, now)
            case mqtt.Subscribe():
                self._subscribed(packet, now)
            case mqtt.Unsubscribe():
                for topic_filter in packet.filters:
                    self.subscriptions.pop(topic_filter, None)
                self._keep_subscriptions()
                self._wire.send(mqtt.unsuback(packet.packet_id))
            case mqtt.PingRequest():
                self._wire.send(mqtt.ping_response())
            case mqtt.Disconnect():
                self._will = None
                self.drop("the device said goodbye", now)
            case mqtt.Connect():
                self.drop("a second CONNECT", now)

    def drop(self, reason: str, now: float, code: int = 0) -> None:
        """Ends the connection from the hub's side; idempotent."""
        if self.is_open:
            self.ended(reason, now, code)
            self._wire.drop()

    def ended(self, reason: str, now: float, code: int = 0) -> None:
        """The connection is over: delivers the will, gives up the methods under way; idempotent."""
        if not self.is_open:
            return
        self.is_open = False
        if self.hub.links.get(self.device.device_id.lower()) is self:
            del self.hub.links[self.device.device_id.lower()]
        self.hub.note("closed", self.device.device_id, now, code, reason)
        if self._will:
            purpose = topics.purpose_of(self._will.topic, self.device.device_id)
            self._keep(self._will, {**(purpose.properties or {}), "iothub-MessageType": "Will"}, now)
        methods, self._methods = self._methods, {}
        for answered in methods.values():
            answered(HubError(CLOSED_REMOTELY, "the connection ended before the device answered"))

    def publish(self, topic_filter: str, topic: str, content: bytes) -> int | None:
        """Sends to the device if it has subscribed, at the QoS granted; the packet id, 0 of QoS 0, None: not sent."""
        qos = self.subscriptions.get(topic_filter)
        if qos is None:
            return None
        if len(self._in_flight) >= MAX_IN_FLIGHT or len(topic.encode()) > _MAX_TOPIC_BYTES:
            self._wire.drop()  # the link learns of it when the connection has ended
            return None
        packet_id = self._next_packet_id() if qos else 0
        if packet_id:
            self._in_flight.add(packet_id)
        self._send(mqtt.Publish(topic, content, qos, packet_id=packet_id))
        return packet_id

    def deliver_certificate(self, now: float) -> None:
        """Ends the request for a certificate whose time has come, and sends its end to who has subscribed to it."""
        pending, certifies = self.device.pending, self.hub.certifies
        if pending is None or certifies is None or self._certificate_packet_id:
            return
        if not pending.status:
            if pending.ready_at_s > now:
                return
            name = self.device.device_id
            try:
                chain = certifies.renewed(self.hub.name, name, request_of(pending.csr), now)
                encoded = [base64.b64encode(each).decode() for each in chain]
                status, body = 200, renewal.issued(pending, encoded)
            except CertificateError:
                status, body = 400, renewal.not_verified(self._tracking_id(), now)
            pending = replace(pending, status=status, body=body.decode())
            self.hub.issuing.discard(name.lower())
            self.hub.change(self.device, pending=pending)
            self.hub.note("certificate", name, now, status, pending.request_id)
        packet_id = self._answer_credentials(pending.status, pending.request_id, pending.body.encode())
        if packet_id:
            self._certificate_packet_id = packet_id
        elif packet_id == 0:
            self.hub.change(self.device, pending=None)

    def _issue(self, packet: mqtt.Publish, request_id: str, now: float) -> None:
        """A device asks for another certificate."""
        device_id, certifies = self.device.device_id, self.hub.certifies
        try:
            if not self.has_certificate:
                raise renewal.RefusedError(renewal.FORBIDDEN, "The device is not authenticated by a certificate.")
            if certifies is None or not certifies.policy_at(self.hub.name, device_id):
                raise renewal.RefusedError(renewal.NO_POLICY, "The device has no policy for certificates.")
            correlation_id = str(uuid.UUID(bytes=self.hub.context.random_bytes(16), version=4))
            known = self.device.pending
            if known is not None and known.expires_at_s <= now:
                known = None  # its time is over
            after_s = self.hub.context.issue_after_s
            taken = renewal.take(packet.payload, request_id, device_id, known, correlation_id, now, after_s)
        except renewal.RefusedError as error:
            body = renewal.error(error.code, str(error), self._tracking_id(), now, error.info)
            self._answer_credentials(error.code // 1000, request_id, body)
            self.hub.note("issue-certificate", device_id, now, error.code, str(error))
            return
        if taken is not known:
            self._certificate_packet_id = 0
            self.hub.change(self.device, pending=taken)
            self.hub.issuing.add(device_id.lower())
        self._answer_credentials(202, request_id, taken.accepted)
        self.hub.note("issue-certificate", device_id, now, 202, request_id)

    def _answer_credentials(self, status: int, request_id: str, content: bytes) -> int | None:
        topic = f"$iothub/credentials/res/{status}/?$rid={request_id}"
        return self.publish(topics.CREDENTIAL_ANSWERS, topic, content)

    def _tracking_id(self) -> str:
        return self.hub.context.random_bytes(16).hex().upper()

    def redeliver(self, now: float) -> None:
        """Sends again what an earlier connection of this session left unacknowledged."""
        unacknowledged = [message for message in self.device.queue if message.packet_id]
        for message in unacknowledged:
            message.deliveries += 1
            self._send(replace(self._delivery(message), dup=True))
            self.hub.note("delivered", self.device.device_id, now, 1, f"{message.message_id} dup")
        if unacknowledged:
            self.hub.save(self.device)

    def deliver(self, now: float) -> None:
        """Sends what is waiting in the queue, once on each connection."""
        qos = self.subscriptions.get(topics.cloud_to_device(self.device.device_id))
        if qos is None:
            return
        self.hub.expire(self.device, now)
        waiting = [message for message in self.device.queue if not message.packet_id]
        for message in waiting:
            message.deliveries += 1
            if qos:
                message.packet_id = self._next_packet_id()
            else:
                self.device.queue.remove(message)
            self._send(self._delivery(message))
            self.hub.note("delivered", self.device.device_id, now, qos, message.message_id)
        if waiting:
            self.hub.save(self.device)

    def invoke(self, name: str, payload: bytes, answered: MethodAnswered) -> Callable[[], None]:
        """Sends a method request; see Hub.invoke."""
        self._calls += 1
        request_id = f"{self._calls:x}"
        self._methods[request_id] = answered
        topic = f"$iothub/methods/POST/{quote(name, safe='*')}/?$rid={request_id}"
        self.publish(topics.METHOD_REQUESTS, topic, payload)

        def give_up() -> None:
            self._methods.pop(request_id, None)

        return give_up

    def throttle(self, packet: mqtt.Packet, now: float) -> None:
        """Refuses a request that is beyond the hub's limits: telemetry has no answer, and loses its connection."""
        if isinstance(packet, mqtt.Publish) and operation_of(packet, self.device.device_id) != "telemetry":
            self.refuse(packet, 429, now, "the hub is throttled")
        else:
            self.drop("the hub is throttled", now, THROTTLED)

    def refuse(self, packet: mqtt.Publish, status: int, now: float, why: str = "a fault script says so") -> None:
        """Answers a request with an error."""
        purpose = topics.purpose_of(packet.topic, self.device.device_id)
        if purpose.operation == "issue-certificate":
            body = renewal.error(status * 1000 + 1, why, self._tracking_id(), now)
            self._answer_credentials(status, purpose.request_id, body)
        else:
            self._answer_twin(status, purpose.request_id, error=_error(status, why))
        self._take(packet)

    def _published(self, packet: mqtt.Publish, now: float) -> None:
        purpose = topics.purpose_of(packet.topic, self.device.device_id)
        if self.hub.is_basic and purpose.operation != "telemetry":
            self.drop(f"the Basic tier has no {purpose.operation}", now, ARGUMENT_INVALID)
            return
        if packet.qos == 2:
            self.drop("a PUBLISH of QoS 2", now)
            return
        match purpose.operation:
            case "telemetry":
                if _counted(packet.payload, purpose.properties or {}) > MAX_TELEMETRY_BYTES:
                    self.drop(f"telemetry of {len(packet.payload)} bytes", now, TOO_LARGE)
                    return
                retained = {"mqtt-retain": "true"} if packet.retain else {}
                self._keep(packet, {**(purpose.properties or {}), **retained}, now)
            case "twin-get":
                content = json.dumps(self.device.twin.document(), separators=(",", ":")).encode()
                self._answer_twin(200, purpose.request_id, content)
                self.hub.note("twin-get", self.device.device_id, now, 200)
            case "twin-patch":
                self._patch_reported(packet.payload, purpose.request_id, now)
            case "method-answer":
                if len(packet.payload) > MAX_METHOD_BYTES:
                    self.drop(f"a method's answer of {len(packet.payload)} bytes", now, TOO_LARGE)
                    return
                self._method_answered(purpose, packet.payload, now)
            case "issue-certificate" if self._renews and renewal.is_request_id(purpose.request_id):
                self._take(packet)
                self._issue(packet, purpose.request_id, now)
                self.deliver_certificate(now)
                return
            case _:
                self.drop("a PUBLISH to a topic that the hub does not have", now, ARGUMENT_INVALID)
                return
        self._take(packet)

    def _take(self, packet: mqtt.Publish) -> None:
        if packet.qos:
            self._wire.send(mqtt.puback(packet.packet_id))

    def _keep(self, packet: mqtt.Publish, properties: Mapping[str, str | None], now: float) -> None:
        where = utc_text(now), self.hub.name, self.device.device_id
        self.hub.context.messages.append(Telemetry(*where, packet.payload, properties, packet.qos, packet.dup))
        self.hub.note("telemetry", self.device.device_id, now, packet.qos, "dup" if packet.dup else "")

    def _patch_reported(self, content: bytes, request_id: str, now: float) -> None:
        try:
            twin = self.device.twin.patched("reported", parse_patch(content))
        except PatchError as error:
            self._answer_twin(error.status, request_id, error=_error(error.status, str(error)))
            self.hub.note("twin-patch", self.device.device_id, now, error.status, str(error))
            return
        self.hub.change(self.device, twin=twin)
        self._answer_twin(204, f"{request_id}&$version={twin.reported_version}")
        self.hub.note("twin-patch", self.device.device_id, now, 204)

    def _answer_twin(self, status: int, request_id: str, content: bytes = b"", error: bytes = b"") -> None:
        self.publish(topics.TWIN_ANSWERS, f"$iothub/twin/res/{status}/?$rid={request_id}", error or content)

    def _method_answered(self, purpose: topics.Purpose, content: bytes, now: float) -> None:
        self.hub.note("method-answer", self.device.device_id, now, purpose.status, purpose.request_id)
        answered = self._methods.pop(purpose.request_id, None)
        if answered is None:
            return  # too late, or not asked
        try:
            answered(MethodAnswer(purpose.status, parse_json(content) if content else None))
        except ValueError:
            answered(HubError(ARGUMENT_INVALID, "the device's answer is not valid JSON"))

    def _acknowledged(self, packet_id: int, now: float) -> None:
        self._in_flight.discard(packet_id)
        if packet_id and packet_id == self._certificate_packet_id:
            self._certificate_packet_id = 0
            self.hub.change(self.device, pending=None)
        for message in self.device.queue:
            if message.packet_id == packet_id:
                self.device.queue.remove(message)
                self.hub.save(self.device)
                self.hub.note("completed", self.device.device_id, now, detail=message.message_id)
                return

    def _subscribed(self, packet: mqtt.Subscribe, now: float) -> None:
        allowed: tuple[str, ...] = topics.device_filters(self.device.device_id)
        granted = []
        if self._renews:
            allowed = (*allowed, topics.CREDENTIAL_ANSWERS)
        if self.hub.is_basic:
            self.drop(f"the Basic tier has no {packet.filters[0][0]}", now, ARGUMENT_INVALID)
            return
        for topic_filter, qos in packet.filters:
            # Whether the hub refuses an unlisted topic or ends the connection is not published; refusing is ours.
            granted.append(min(qos, 1) if topic_filter in allowed else mqtt.REFUSED_SUBSCRIPTION)
            if topic_filter in allowed:
                self.subscriptions[topic_filter] = min(qos, 1)
            self.hub.note("subscribed", self.device.device_id, now, granted[-1], topic_filter)
        self._keep_subscriptions()
        self._wire.send(mqtt.suback(packet.packet_id, granted))
        self.deliver(now)
        self.deliver_certificate(now)

    def _keep_subscriptions(self) -> None:
        if self._persistent and self.device.subscriptions != self.subscriptions:
            self.hub.change(self.device, subscriptions=dict(self.subscriptions))

    def _delivery(self, message: CloudMessage) -> mqtt.Publish:
        topic = f"devices/{self.device.device_id}/messages/devicebound/{topics.format_properties(message.properties)}"
        return mqtt.Publish(topic, message.payload, min(message.packet_id, 1), packet_id=message.packet_id)

    def _next_packet_id(self) -> int:
        taken = self._in_flight | {message.packet_id for message in self.device.queue}
        self._last_packet_id = self._last_packet_id % 0xFFFF + 1
        while self._last_packet_id in taken:
            self._last_packet_id = self._last_packet_id % 0xFFFF + 1
        return self._last_packet_id

    def _send(self, message: mqtt.Publish) -> None:
        self._wire.send(mqtt.publish(message))


@dataclass(frozen=True)
class Refusal:
    """Why a device is not let in."""

    code: int  # CONNACK
    reason: str
    hub: str = ""
    device_id: str = ""


@dataclass
class Hubs:
    """All hubs that are linked to one service."""

    service: DpsService
    devices: Callable[[str], DeviceRecords] = field(repr=False)  # those of a hub, by its name
    context: HubContext

    def __post_init__(self) -> None:
        self._hubs: dict[str, Hub] = {}
        for name in self.service.settings.hubs:
            self._hubs[name.lower()] = Hub(name, self.devices(name), self._issued(name), self.context, self.service)
        self.service.assigned = self._assigned

    def connect(
        self, wire: Wire, connect: mqtt.Connect, server_name: str, now: float, client_chain: tuple[bytes, ...] = ()
    ) -> Link | None:
        """Answers CONNECT: the link, or None after a refusal. `server_name` is TLS's SNI, empty if there was none.

        `client_chain` is what the client has shown in TLS, its own certificate first.
        """
        try:
            admitted = self._admission(connect, server_name, now, client_chain)
        except StateError as error:
            admitted = Refusal(mqtt.UNAVAILABLE, str(error), device_id=connect.client_id)
        if isinstance(admitted, Refusal):
            self.refuse(wire, admitted, now)
            return None
        hub, token = admitted
        return hub.connect(wire, connect, token, server_name, now)

    def refuse(self, wire: Wire, refusal: Refusal, now: float) -> None:
        """Sends CONNACK with the refusal's code and ends the connection."""
        when = utc_text(now)
        self.context.note(HubLine(when, refusal.hub, refusal.device_id, "refused", refusal.code, refusal.reason))
        wire.send(mqtt.connack(refusal.code))
        wire.drop()

    def note(self, event: str, device_id: str, now: float, code: int = 0, detail: str = "") -> None:
        """A line for the log about a connection that no hub has admitted yet, or about a fault."""
        self.context.note(HubLine(utc_text(now), "", device_id, event, code, detail))

    def tick(self, now: float) -> None:
        """Does what time has made due."""
        for hub in self._hubs.values():
            hub.tick(now)

    def find(self, device_id: str, hub_name: str = "") -> Hub:
        """The hub that has the device, or the one named; raises HubError."""
        if hub_name:
            if hub_name.lower() not in self._hubs:
                raise HubError(DEVICE_NOT_FOUND, f"no hub '{hub_name}' here: {', '.join(self.service.settings.hubs)}")
            return self._hubs[hub_name.lower()]
        found = []
        for hub in self._hubs.values():
            try:
                hub.device(device_id)
            except HubError:
                continue
            found.append(hub)
        if not found:
            raise HubError(DEVICE_NOT_FOUND, f"no hub has a device '{device_id}'")
        if len(found) > 1:
            names = ", ".join(hub.name for hub in found)
            raise HubError(ARGUMENT_INVALID, f"'{device_id}' is at more than one hub, name one: {names}")
        return found[0]

    def rotate_key(self, device_id: str, hub_name: str, key: bytes) -> None:
        """Gives the device another key at its hub, which DPS hands out from now on; raises HubError."""
        hub = self.find(device_id, hub_name)
        device = hub.device(device_id)
        credential = hub.credential_of(device)
        if device.own_key is not None:
            hub.change(device, own_key=key, own_secondary=None, own_thumbprints=())
        elif credential is None or len(credential.keys) != 1:  # a TPM has one, an enrolment's own are two
            raise HubError(ARGUMENT_INVALID, f"'{device_id}' has what it is enrolled with: change its enrolment")
        else:
            self.service.replace_hub_key(hub.name, device_id, key)

    def all(self) -> list[Hub]:
        """The hubs in the order in which the service lists them."""
        return list(self._hubs.values())

    def _admission(
        self, connect: mqtt.Connect, server_name: str, now: float, client_chain: tuple[bytes, ...]
    ) -> tuple[Hub, Token | None] | Refusal:
        """Who this is, or why it is not let in. Codes 1, 2 and 4 are ours; for bad credentials the hub says 5."""
        if connect.level != mqtt.LEVEL:
            return Refusal(mqtt.BAD_LEVEL, f"protocol level {connect.level}: MQTT 3.1.1 is level 4")
        if not is_device_id(connect.client_id):
            return Refusal(mqtt.BAD_CLIENT_ID, "the client id is no device id")
        named = _USER_NAME.fullmatch(connect.user_name or "")
        if named is None:
            form = "{hub}/{deviceId}/?api-version=…"
            return Refusal(mqtt.BAD_USER_NAME, f"the user name is not of the form {form}", device_id=connect.client_id)

        def refused(reason: str) -> Refusal:
            return Refusal(mqtt.NOT_AUTHORIZED, reason, named["hub"], connect.client_id)

        strict = self.context.strict
        if strict and not _STRICT_USER_NAME.fullmatch(connect.user_name or ""):
            return refused("the user name has no /?api-version=…")
        if named["client_id"] != connect.client_id:
            return refused("the client id is not the user name's")
        hub = self._hubs.get(named["hub"].lower())
        if hub is None:
            return refused("the user name's hub is not one of this emulator's")
        if server_name and server_name.lower() != hub.name.lower() and (strict or not _is_address(server_name)):
            return refused(f"the TLS handshake named {server_name}")
        if connect.will and topics.purpose_of(connect.will.topic, connect.client_id).operation != "telemetry":
            return refused("the will's topic is not the device's telemetry topic")
        if client_chain and not connect.password:
            device = hub.find(connect.client_id)
            credential = hub.credential_of(device) if device else None
            if device and device.device_id != connect.client_id:  # ids tell upper from lower case, tokens don't
                credential = None
            refusal = certificate_refusal(client_chain, credential, connect.client_id, now)
            return refused(refusal) if refusal else self._disabled(device, refused) or (hub, None)
        try:
            token = parse_token((connect.password or b"").decode())
        except UnicodeDecodeError:
            return refused("the password is not text")
        except TokenError as error:
            return refused(f"the token {error}")
        if not token.names(f"{hub.name}/devices/{connect.client_id}", strict=strict):  # before anything is looked up
            return refused("its sr is not {hub}/devices/{deviceId}")
        device = hub.find(connect.client_id)
        credential = hub.credential_of(device) if device else None
        keys = credential.keys if credential else None
        refusal = device_token_refusal(token, hub.name, connect.client_id, keys, now, self.context.clock_skew_s)
        if refusal:
            return refused(refusal)
        return self._disabled(device, refused) or (hub, token)

    @staticmethod
    def _disabled(device: HubDevice | None, refused: Callable[[str], Refusal]) -> Refusal | None:
        return refused("the device is disabled") if device is None or not device.enabled else None

    def _issued(self, hub_name: str) -> Callable[[str], Credential | None]:
        return lambda device_id: self.service.credential_at(hub_name, device_id)

    def _assigned(self, previous: Assignment | None, assignment: Assignment, now: float) -> None:
        """DPS has assigned a device: it leaves its previous hub, with or without its twin."""
        new = self._hubs.get(assignment.hub.lower())
        stays = previous and (previous.hub.lower(), previous.device_id) == (
            assignment.hub.lower(),
            assignment.device_id,
        )
        if previous is None or stays:
            if new:
                new.admit(assignment.device_id)
            return
        old = self._hubs.get(previous.hub.lower())
        left = old.remove(previous.device_id, now) if old else None
        if new:
            migrates = left is not None and assignment.substatus == "deviceDataMigrated"
            new.receive(assignment.device_id, left.twin if migrates and left else Twin())


def certificate_refusal(
    client_chain: tuple[bytes, ...], credential: Credential | None, device_id: str, now: float
) -> str | None:
    """Why a hub refuses a client certificate from a device with this credential (None: there is no such device)."""
    if credential is None or not (credential.thumbprints or credential.authorities):
        return f"'{device_id}' has no certificate at this hub"
    try:
        if credential.authorities:
            name = credential.name or device_id
            if common_name(client_chain[0]) != name:
                return f"the certificate's CN is not '{name}'"
            authority_of(client_chain, credential.authorities, now)
            return None
        if not set(thumbprints(client_chain[0])) & set(credential.thumbprints):
            return f"the certificate is not that of '{device_id}'"
        require_valid(client_chain[0], now)
    except CertificateError as error:
        return f"the certificate is refused: {error}"
    return None


def _is_address(server_name: str) -> bool:
    """Whether TLS named an IP address, which is no name for SNI, and which clients send that dial one."""
    try:
        ipaddress.ip_address(server_name.strip("[]"))
    except ValueError:
        return False
    return True


def operation_of(packet: mqtt.Packet, device_id: str) -> str:
    """What a fault script calls this packet."""
    match packet:
        case mqtt.Publish():
            return topics.purpose_of(packet.topic, device_id).operation
        case mqtt.Connect():
            return "connect"
        case mqtt.PubAck():
            return "puback"
        case mqtt.Subscribe():
            return "subscribe"
        case mqtt.Unsubscribe():
            return "unsubscribe"
        case mqtt.PingRequest():
            return "ping"
    return "disconnect"


def _model_id(user_name: str) -> str:
    """The Plug and Play model in a user name, percent-encoded there or not; empty where there is none."""
    return unquote(_of_query(user_name, "model-id"))


def _of_query(user_name: str, wanted: str) -> str:
    """What a user name says by this name; empty where it does not."""
    for pair in user_name.partition("?")[2].split("&"):
        name, _, value = pair.partition("=")
        if name == wanted:
            return value
    return ""


def _counted(payload: bytes, properties: Mapping[str, str | None]) -> int:
    """The bytes of a message as quotas count them: "Create and read IoT Hub messages"."""
    size = len(payload)
    for name, value in properties.items():
        size += len((value or "").encode(errors="replace"))
        size += 0 if name.startswith("$.") else len(name.encode(errors="replace"))
    return size


def silence_limit_s(connect: mqtt.Connect) -> float:
    """How long the hub waits for the client's next packet: 1.5 times its keep-alive, which is capped."""
    asked = connect.keep_alive_s or MAX_KEEP_ALIVE_S  # MQTT: 0 asks for no limit, the hub has one all the same
    return 1.5 * min(asked, MAX_KEEP_ALIVE_S)


def _error(status: int, message: str) -> bytes:
    content = {"errorCode": _CODES.get(status, status * 1000 + 1), "message": message}
    return json.dumps(content, separators=(",", ":")).encode()
