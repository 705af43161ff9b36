"""The hub side of one identity: what is said on each connection to its hub, from the token to the end.

`open` and `stay` are the two halves of one connection, `NextEvent` is their only wait. What must outlive a connection
(telemetry under way, messages that programs still hold, the twin's version) is kept in the `Session` and belongs to its
identity alone. Topics, answers and limits: IoT Hub developer guide, "Communicate with an IoT hub using MQTT".
"""

from dps_agent.assignment import hub_token
from dps_agent.effects import (
    NO_REPLY_CLOSED,
    NO_REPLY_NOT_FOUND,
    NO_REPLY_TIMEOUT,
    ForgetOlder,
    NoReply,
    Random,
    Uptime,
)
from dps_agent.hub_effects import (
    NOT_AUTHORIZED,
    Acknowledge,
    Acknowledged,
    AnswerMethod,
    Arrived,
    CloudMessage,
    Connect,
    Desired,
    Gone,
    Granted,
    MessageDone,
    MethodCall,
    NextEvent,
    Publish,
    RegisterAgain,
    SendTelemetry,
    Subscribe,
    TelemetryDone,
    Tell,
)
from dps_agent.sas import percent_decode, percent_encode
from dps_agent.utc import AGREEMENT_S
from dps_hal.contracts import IDENTITY
from dps_hal.errors import AskOperator, RetryLater
from dps_hal.platform import from_json, to_json

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from typing import Any

    from dps_agent.assignment import Assignment
    from dps_agent.effects import Effect
    from dps_agent.hub_effects import ConnAck, Event
    from dps_agent.sas import SasToken
    from dps_agent.settings import Settings
    from dps_hal.contracts import Utc

# How a connection ends.
LOST = "lost"  # the network, or the hub for now
NOT_FOUND = "not found"  # there seems to be no such hub
REFUSED = "refused"  # the hub does not take a token that was made for it just now
RENEW = "renew"  # the next token is ready
REGISTER = "register"  # somebody asks for another registration
PARTED_CODES = {LOST: "hub.lost", NOT_FOUND: "hub.not_found", REFUSED: "hub.refused"}

API_VERSION = "2021-04-12"
REPORTED_NAME = "dpsAgent"  # what the agent reports of itself stands under this name in the twin

RENEW_AT = 0.8  # of a token's life
RENEW_SPREAD = 0.05  # up to so much of it earlier, so that a fleet does not renew together
RENEW_AGAIN_S = 60  # after a token could not be made
SUBSCRIBE_LIMIT_S = 30
TELEMETRY_LIMIT = 262144  # bytes of topic and payload; IoT Hub quotas. A hub closes the connection on more, each time
TOPIC_LIMIT = 65535  # bytes; MQTT 3.1.1, 1.5.3
METHOD_LIMIT_S = 25  # for a program's answer; callers wait 30 s unless they say otherwise
TWIN_LIMIT_S = 60  # for the hub's answer to a twin request
TWIN_AGAIN_S = 300  # after the hub could not answer one, or did not answer two
IDLE_AFTER_S = 10  # after the subscriptions, the older identity may be forgotten
IN_FLIGHT_LIMIT = 32  # telemetry messages without acknowledgement
MESSAGE_LIMIT = 50  # cloud-to-device messages that programs hold; a hub queues no more for a device
CALL_LIMIT = 16  # method calls that wait for a program

# MQTT 3.1.1, table 3.1
_UNACCEPTABLE = (1, 2)  # protocol version, client id
_SUBSCRIPTION_FAILED = 0x80


class Session:
    """The connections of one identity, one after the other. `reason` says in words why the last one ended.

    `about` is reported to the twin. `status` gives what the method of that name answers. `accepted`: the hub took the
    last token. `serial` counts messages, calls and twin requests, from that of the identity before on. Before the
    uptime `dps_not_before_s` DPS does not want to be asked, and nobody's wish to register again is taken.
    """

    def __init__(
        self,
        settings: "Settings",
        assignment: "Assignment",
        about: "dict[str, str]",
        status: "Callable[[], dict[str, Any]]",
        serial: int,
    ) -> None:
        self.accepted = False
        self.reason = ""
        self.serial = serial
        self._settings = settings
        self._assignment = assignment
        self._about = about
        self._status = status
        self._token: SasToken | None = None  # for the next connection
        self._renew_at_s = 0.0
        self.dps_not_before_s = 0.0
        self._expires_at_s = 0.0
        self._expiry_utc_s = 0  # the same moment, as the token says it
        self._in_flight: dict[int, int] = {}  # packet id -> request id of telemetry
        self._desired_version = 0  # as told last
        self._cleaned = False  # the older identity is gone
        self._forget_connection()

    def _forget_connection(self) -> None:
        self._subscription: int | None = None
        self._ready = False  # the subscriptions were granted
        self._ready_at_s = 0.0
        self._unacknowledged: dict[int, int] = {}  # message id -> packet id
        self._calls: dict[int, tuple[str, float]] = {}  # call id -> the hub's request id, latest answer
        self._twin_request = ""  # the one that waits for an answer
        self._twin_at_s = 0.0  # its end, or when to ask again
        self._asked_whole = False  # it asks for the twin, else it reports
        self._older_twins = 0  # in a row, than the newest patch
        self._newest_version = 0  # of the desired properties, as the hub named it in a patch
        self._twin_known = False
        self._reported = False

    def open(self) -> "Generator[Effect, Any, str]":
        """Connects and subscribes; returns "" if that was done, else how it ended.

        AskOperator `hub.protocol`: the hub does not speak with us. What TPM and clock raise comes through.
        """
        self._forget_connection()
        self.accepted = False
        token, self._token = self._token, None
        if token is None:
            token = yield from self._make_token()
        hub, device_id = self._assignment.assigned_hub, self._assignment.device_id
        user_name = f"{hub}/{device_id}/?api-version={API_VERSION}"
        answer: ConnAck | NoReply = yield Connect(hub, device_id, user_name, token, self._settings.keep_alive_s)
        if isinstance(answer, NoReply):
            return self._ended("was not reached", answer.reason)
        if answer.return_code:
            return self._refused(answer.return_code)
        self.accepted = True
        packet_id: int | None = yield Subscribe(
            (
                (f"devices/{device_id}/messages/devicebound/#", 1),
                ("$iothub/methods/POST/#", 0),
                ("$iothub/twin/res/#", 0),
                ("$iothub/twin/PATCH/properties/desired/#", 0),
            )
        )
        if packet_id is None:
            return self._ended("closed the connection", NO_REPLY_CLOSED)
        self._subscription = packet_id
        now_s: float = yield Uptime()
        until_s = now_s + SUBSCRIBE_LIMIT_S
        while True:
            event: Event | None = yield NextEvent(until_s)
            if event is not None:
                end = yield from self._take(event)
                if end or self._ready:
                    return end
            later_s: float = yield Uptime()
            if later_s >= until_s:
                return self._ended("did not grant the subscriptions", NO_REPLY_TIMEOUT)

    def stay(self, pause_at_s: "float | None" = None) -> "Generator[Effect, Any, str]":
        """Does what hub and programs ask for until the connection ends; returns how.

        At the uptime `pause_at_s` it returns "": the connection stands, and `stay` again goes on with it.
        """
        while True:
            now_s: float = yield Uptime()
            if pause_at_s is not None and now_s >= pause_at_s:
                return ""
            end = yield from self._do_what_is_due(now_s)
            if end:
                return end
            due_s = self._next_due_s()
            if pause_at_s is not None:
                due_s = min(due_s, pause_at_s)
            event: Event | None = yield NextEvent(max(due_s, now_s))
            if event is not None:
                end = yield from self._take(event)
                if end:
                    return end

    def abandon(self) -> "Generator[Effect, Any, None]":
        """Tells the programs that nobody will know whether what is under way arrived: this identity is left."""
        for request_id in self._in_flight.values():
            _taken: bool = yield Tell(TelemetryDone(request_id, False, True))

    def clock_kept(self, now: "Utc", uptime_s: float) -> bool:
        """Whether the time under which the last token was made is still believed: else its refusal says nothing."""
        token_s = self._expiry_utc_s - (self._expires_at_s - uptime_s)
        return now.believable and abs(now.now_s - token_s) <= AGREEMENT_S

    # What is due.

    def _do_what_is_due(self, now_s: float) -> "Generator[Effect, Any, str]":
        for call_id in [call_id for call_id in self._calls if self._calls[call_id][1] <= now_s]:
            rid, _ = self._calls.pop(call_id)
            yield from self._answer(rid, 504, {"message": f"no program answered within {METHOD_LIMIT_S} s"})
        if now_s >= self._twin_at_s and not (self._twin_known and self._reported):
            yield from self._ask_twin(now_s)
        if not self._cleaned and now_s >= self._ready_at_s + IDLE_AFTER_S:
            try:
                yield ForgetOlder(IDENTITY)
                self._cleaned = True
            except (RetryLater, AskOperator):
                self._cleaned = True  # the next life's turn; what ails the store shows at the next commit
        if now_s >= self._renew_due_s():
            return (yield from self._renew(now_s))
        return ""

    def _renew_due_s(self) -> float:
        """Calls that wait for a program are answered on this connection."""
        return self._renew_at_s + METHOD_LIMIT_S if self._calls else self._renew_at_s

    def _next_due_s(self) -> float:
        due_s = self._renew_due_s()
        for _, until_s in self._calls.values():
            due_s = min(due_s, until_s)
        if not (self._twin_known and self._reported):
            due_s = min(due_s, self._twin_at_s)
        if not self._cleaned:
            due_s = min(due_s, self._ready_at_s + IDLE_AFTER_S)
        return due_s

    def _renew(self, now_s: float) -> "Generator[Effect, Any, str]":
        """Makes the next token while this one still serves; without one the connection goes on while it may."""
        try:
            self._token = yield from self._make_token()
        except (RetryLater, AskOperator):
            if now_s >= self._expires_at_s:
                raise
            self._renew_at_s = min(now_s + RENEW_AGAIN_S, self._expires_at_s)
            return ""
        self.reason = "the token is renewed"
        return RENEW

    def _make_token(self) -> "Generator[Effect, Any, SasToken]":
        life_s = self._settings.token_life_s
        token = yield from hub_token(self._assignment, life_s)
        now_s: float = yield Uptime()
        random: float = yield Random()
        self._expires_at_s = now_s + life_s
        self._expiry_utc_s = token.expires_at_s
        self._renew_at_s = now_s + life_s * (RENEW_AT - RENEW_SPREAD * random)
        return token

    # What arrives.

    def _take(self, event: "Event") -> "Generator[Effect, Any, str]":
        if isinstance(event, Gone):
            return self._ended("ended the connection", event.reason)
        if isinstance(event, RegisterAgain):
            self.reason = "asked to register again"
            return REGISTER
        if isinstance(event, Granted):
            if event.packet_id == self._subscription:
                if _SUBSCRIPTION_FAILED in event.return_codes:
                    return self._ended("refused a subscription", f"codes {event.return_codes}")
                now_s: float = yield Uptime()
                self._ready = True
                self._ready_at_s = self._twin_at_s = now_s
        elif isinstance(event, Acknowledged):
            request_id = self._in_flight.pop(event.packet_id, None)
            if request_id is not None:
                _taken: bool = yield Tell(TelemetryDone(request_id, True, True))
        elif isinstance(event, Arrived):
            return (yield from self._take_message(event))
        elif isinstance(event, SendTelemetry):
            yield from self._send(event)
        elif isinstance(event, AnswerMethod):
            call = self._calls.pop(event.call_id, None)
            if call is not None:
                topic = f"$iothub/methods/res/{event.status}/?$rid={call[0]}"
                _sent: int | None = yield Publish(topic, event.payload or b"{}", 0)
        elif isinstance(event, MessageDone):
            packet_id = self._unacknowledged.pop(event.message_id, None)
            if packet_id is not None:
                yield Acknowledge(packet_id)
        return ""

    def _take_message(self, message: Arrived) -> "Generator[Effect, Any, str]":
        topic = message.topic
        devicebound = f"devices/{self._assignment.device_id}/messages/devicebound/"
        end = ""
        if topic.startswith(devicebound):
            if len(self._unacknowledged) >= MESSAGE_LIMIT or message.packet_id in self._unacknowledged.values():
                return ""  # the hub keeps it and delivers it on a later connection; a program has it already
            self.serial += 1
            if message.packet_id:
                self._unacknowledged[self.serial] = message.packet_id
            properties = decode_properties(topic[len(devicebound) :])
            taken: bool = yield Tell(CloudMessage(self.serial, properties, message.payload))
            if not taken:
                self._unacknowledged.pop(self.serial, None)  # nobody will be done with it; the hub keeps it
            return ""  # acknowledged once a program is done with it
        if topic.startswith("$iothub/methods/POST/"):
            end = yield from self._call(topic[21:], message.payload)
        elif topic.startswith("$iothub/twin/res/"):
            yield from self._take_twin(topic[17:], message.payload)
        elif topic.startswith("$iothub/twin/PATCH/properties/desired/"):
            yield from self._take_desired(topic, message.payload)
        if message.packet_id:
            yield Acknowledge(message.packet_id)
        return end

    def _call(self, rest: str, payload: "bytes | None") -> "Generator[Effect, Any, str]":
        """A direct method: `rest` is `{name}/?$rid={rid}`."""
        name, _, query = rest.partition("/")
        rid = _query_value(query, "$rid")
        if not rid or "+" in rid or "#" in rid:
            return ""  # no topic to answer on
        if payload is None:
            yield from self._answer(rid, 413, {"message": "the payload is too large for this device"})
        elif name == "ping":
            yield from self._answer(rid, 200, {})
        elif name == "status":
            yield from self._answer(rid, 200, self._status())
        elif name == "reprovision":
            asked_s: float = yield Uptime()
            if asked_s < self.dps_not_before_s:
                wait_s = int(self.dps_not_before_s - asked_s) + 1
                yield from self._answer(rid, 429, {"message": "DPS asked for patience", "retryAfterS": wait_s})
                return ""
            yield from self._answer(rid, 202, {"message": "registering again"})
            self.reason = "asked by direct method to register again"
            return REGISTER
        elif len(self._calls) >= CALL_LIMIT:
            yield from self._answer(rid, 429, {"message": f"{CALL_LIMIT} calls wait for an answer"})
        else:
            self.serial += 1
            call_id = self.serial
            now_s: float = yield Uptime()
            self._calls[call_id] = (rid, now_s + METHOD_LIMIT_S)
            taken: bool = yield Tell(MethodCall(call_id, name, payload))
            if not taken:
                del self._calls[call_id]
                yield from self._answer(rid, 404, {"message": f"no program on this device answers '{name}'"})
        return ""

    def _answer(self, rid: str, status: int, value: "dict[str, Any]") -> "Generator[Effect, Any, None]":
        topic = f"$iothub/methods/res/{status}/?$rid={rid}"
        _sent: int | None = yield Publish(topic, to_json(value).encode(), 0)

    def _send(self, telemetry: SendTelemetry) -> "Generator[Effect, Any, None]":
        topic = ""
        if len(self._in_flight) < IN_FLIGHT_LIMIT:
            topic = self._telemetry_topic(telemetry)
        if topic:
            packet_id: int | None = yield Publish(topic, telemetry.payload, 1)
            if packet_id is not None:
                self._in_flight[packet_id] = telemetry.request_id
                return
        _taken: bool = yield Tell(TelemetryDone(telemetry.request_id, False, False))

    def _telemetry_topic(self, telemetry: SendTelemetry) -> str:
        """The topic; "" where no hub would take the message."""
        try:
            topic = telemetry_topic(self._assignment.device_id, telemetry.properties)
        except ValueError:  # half a character: no UTF-8
            return ""
        fits = len(topic) <= TOPIC_LIMIT and len(topic) + len(telemetry.payload) <= TELEMETRY_LIMIT
        return topic if fits else ""

    # The twin.

    def _ask_twin(self, now_s: float) -> "Generator[Effect, Any, None]":
        """Asks for the twin, or reports; one request at a time, what the hub leaves unanswered is asked again."""
        self.serial += 1
        self._twin_at_s = now_s + (TWIN_AGAIN_S if self._twin_request else TWIN_LIMIT_S)
        self._twin_request = str(self.serial)
        self._asked_whole = not self._twin_known
        if self._asked_whole:
            topic, payload = "$iothub/twin/GET/", b""
        else:
            topic, payload = "$iothub/twin/PATCH/properties/reported/", to_json({REPORTED_NAME: self._about}).encode()
        _sent: int | None = yield Publish(f"{topic}?$rid={self._twin_request}", payload, 0)

    def _take_twin(self, rest: str, payload: "bytes | None") -> "Generator[Effect, Any, None]":
        """The answer to a twin request: `rest` is `{status}/?$rid={rid}[&$version={version}]`."""
        status, _, query = rest.partition("/")
        if _query_value(query, "$rid") != self._twin_request or not self._twin_request:
            return
        self._twin_request = ""
        older_before = self._older_twins
        done = status in ("200", "204")
        if not self._asked_whole:
            self._reported = done
        elif done:
            done = yield from self._take_whole_twin(payload)
        if self._asked_whole:
            self._twin_known = done
        now_s: float = yield Uptime()
        at_once = done or (older_before, self._older_twins) == (0, 1)
        self._twin_at_s = now_s if at_once else now_s + TWIN_AGAIN_S

    def _take_whole_twin(self, payload: "bytes | None") -> "Generator[Effect, Any, bool]":
        """Whether `payload` is a twin, no older one than the patches of this connection, and was taken.

        One that is too large for this device is not asked for again before the next patch; the program is told.
        """
        try:
            if payload is None:
                raise MemoryError
            twin = from_json(payload)
            desired, reported = twin["desired"], twin["reported"]
            version = desired["$version"]
            self._reported = reported.get(REPORTED_NAME) == self._about
            text = to_json(desired).encode()
        except MemoryError:
            told: bool = yield Tell(Desired(self._newest_version, None, True))
            return told
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
            return False
        if not isinstance(version, int):
            return False
        if version < self._newest_version:  # a patch came meanwhile: once more, at once
            self._older_twins += 1
            return False
        self._older_twins = 0
        if version != self._desired_version:
            taken: bool = yield Tell(Desired(version, text, True))
            if not taken:
                return False
            self._desired_version = version
        return True

    def _take_desired(self, topic: str, payload: "bytes | None") -> "Generator[Effect, Any, None]":
        try:
            version = int(_query_value(topic, "$version"))
        except ValueError:
            version = 0
        self._newest_version = max(self._newest_version, version)
        now_s: float = yield Uptime()
        again_s = now_s
        if payload is not None and version == self._desired_version + 1:
            taken: bool = yield Tell(Desired(version, payload, False))
            if taken:
                self._desired_version = version
                return
            again_s += TWIN_AGAIN_S  # the program has its hands full
        if version != self._desired_version:  # one was missed: ask for all of them
            self._twin_known = False
            if not self._twin_request:
                self._twin_at_s = again_s

    # How it ends.

    def _ended(self, what: str, reason: str) -> str:
        self.reason = f"{self._assignment.assigned_hub} {what} ({reason})"
        return NOT_FOUND if reason.partition(":")[0] == NO_REPLY_NOT_FOUND else LOST

    def _refused(self, return_code: int) -> str:
        hub, device_id = self._assignment.assigned_hub, self._assignment.device_id
        self.reason = f"{hub} refused the connection of {device_id!r} with code {return_code}"
        if return_code in _UNACCEPTABLE:
            raise AskOperator("hub.protocol", self.reason)
        return REFUSED if return_code in NOT_AUTHORIZED else LOST


def telemetry_topic(device_id: str, properties: "dict[str, str]") -> str:
    """The topic of a message with these properties; ValueError where they are no UTF-8."""
    return f"devices/{device_id}/messages/events/{encode_properties(properties)}"


def encode_properties(properties: "dict[str, str]") -> str:
    """Message properties as a topic carries them; system properties begin with "$."."""
    return "&".join([f"{percent_encode(name)}={percent_encode(properties[name])}" for name in properties])


def decode_properties(text: str) -> "dict[str, str]":
    """The message properties in a topic; a name without "=" has an empty value."""
    properties: dict[str, str] = {}
    for pair in text.split("&"):
        if pair:
            name, _, value = pair.partition("=")
            properties[percent_decode(name)] = percent_decode(value)
    return properties


def _query_value(text: str, name: str) -> str:
    """The value of `name` in what follows the "?" of a topic, as it stands there; "" if there is none."""
    for pair in text.partition("?")[2].split("&"):
        key, _, value = pair.partition("=")
        if key == name:
            return value
    return ""
