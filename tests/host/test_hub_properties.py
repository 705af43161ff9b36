"""A session whose hub, programs, TPM and clock do anything: it ends in the right class and answers nothing twice."""

from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as effort
from hypothesis import strategies as st

from dps_agent.assignment import decode
from dps_agent.effects import ConfirmClock, ForgetOlder, NoReply, Random, Sign, Uptime, UtcNow
from dps_agent.hub_effects import (
    Acknowledge,
    Acknowledged,
    AnswerMethod,
    Arrived,
    CloudMessage,
    ConnAck,
    Connect,
    GiveUp,
    Gone,
    Granted,
    MessageDone,
    MethodCall,
    NextEvent,
    Publish,
    Readers,
    ReadTwin,
    RegisterAgain,
    Report,
    SendAgain,
    SendTelemetry,
    Subscribe,
    TelemetryDone,
    Tell,
    TwinDone,
    Withdrawn,
)
from dps_agent.lifecycle import Lifecycle
from dps_agent.sas import SasToken
from dps_agent.session import (
    CALL_LIMIT,
    IN_FLIGHT_LIMIT,
    LOST,
    MESSAGE_LIMIT,
    NOT_FOUND,
    REFUSED,
    REGISTER,
    RENEW,
    Session,
    decode_properties,
    encode_properties,
)
from dps_hal.contracts import IDENTITY, Utc
from dps_hal.errors import AskOperator, Broken, DpsError, IdentityStale, RetryLater
from support.world import DEVICE, NOW_S, World, settings

EXAMPLES = 1000
ENDS = {"", LOST, NOT_FOUND, REFUSED, RENEW, REGISTER}
ENDINGS_TO_REACH = ENDS | {"RetryLater", "AskOperator", "IdentityStale", "Broken"}

errors = st.sampled_from(
    (
        RetryLater("tpm.locked_out", "wait", 1000),
        AskOperator("tpm.denied", "denied"),
        IdentityStale("tpm.key_stale", "stale"),
        Broken("agent.bug", "impossible"),
    )
)
rid = st.sampled_from(("1", "2", "3", "a-b", "", "+", "#", "%", "?$rid=1", "\u0000", "x" * 300))
versions = st.sampled_from(("0", "1", "2", "3", "4", "x", "", "-1", "9" * 30, "1.5", " 2"))
payload = (
    st.none()
    | st.binary(max_size=8)
    | st.sampled_from(
        (
            b"",
            b"{}",
            b'{"desired":{"$version":1},"reported":{}}',
            b'{"desired":{"$version":3,"a":1},"reported":{"dpsAgent":{"v":"1"}}}',
            b'{"desired":{"$version":true},"reported":{}}',
            b'{"desired":{"$version":[]},"reported":{}}',
            b'{"desired":{"$version":2,"a":"\\ud800"},"reported":{}}',
            b'{"desired":{"$version":123456789012345678901234567890},"reported":{}}',
            b"[" * 200,
        )
    )
)
devicebound = f"devices/{DEVICE}/messages/devicebound/"
topic = st.one_of(
    st.just(devicebound),
    st.text(max_size=8).map(lambda text: devicebound + text),
    st.text(max_size=20),
    st.builds(
        lambda name, number: f"$iothub/methods/POST/{name}/?$rid={number}",
        st.sampled_from(("ping", "status", "mine", "", "a/b", "\u00e9")),
        rid,
    ),
    st.builds(
        lambda status, number: f"$iothub/twin/res/{status}/?$rid={number}&$version=1",
        st.sampled_from(("200", "204", "400", "429", "", "x")),
        st.integers(0, 6).map(str) | rid,
    ),
    versions.map(lambda version: f"$iothub/twin/PATCH/properties/desired/?$version={version}"),
    st.just("$iothub/methods/POST/reprovision/?$rid=9") | st.just("$iothub/methods/POST/ping"),
)
properties = st.dictionaries(
    st.text(max_size=3) | st.just("\ud800"), st.text(max_size=3) | st.just("\udfff"), max_size=2
)
arrived = st.builds(Arrived, topic, payload, st.integers(0, 6))
telemetry = st.builds(
    SendTelemetry,
    st.just(0),
    properties,
    st.sampled_from((b"", b"x", b"x", bytes(262145), bytes(262000))),
    st.integers(0, 2),
    st.integers(0, 1),
)
of_the_twin = st.builds(Report, st.just(0), st.just(b'{"a":1}')) | st.builds(ReadTwin, st.just(0))
common = (
    arrived
    | telemetry
    | of_the_twin
    | st.builds(Acknowledged, st.integers(1, 12))
    | st.builds(Withdrawn, st.integers(1, 12))
    | st.builds(Readers, st.integers(0, 2))
    | st.none()
)
event = st.one_of(
    common,
    common,
    common,
    st.builds(AnswerMethod, st.integers(0, 12), st.integers(-5, 999), st.binary(max_size=4)),
    st.builds(MessageDone, st.integers(0, 12)),
    st.builds(Granted, st.integers(0, 3), st.lists(st.sampled_from((0, 1, 0x80)), max_size=4).map(tuple)),
    st.sampled_from((Gone("closed"), Gone(""), Gone("dns: x"), Gone("timeout"), RegisterAgain())),
)
connections = st.lists(
    st.tuples(
        st.sampled_from((ConnAck(0, True),) * 9 + (ConnAck(5, False), ConnAck(2, False), ConnAck(3, False)))
        | st.builds(
            NoReply,
            st.sampled_from(("dns: x", "not_found", "connect", "tls: y", "not_tls: y", "timeout")),
            st.booleans(),
        ),
        st.booleans() | st.just(True),  # whether the subscriptions are granted
        st.lists(event, max_size=40),
    ),
    min_size=1,
    max_size=4,
)

reached: set[str] = set()


@pytest.fixture(scope="module", autouse=True)
def _every_ending_was_reached():
    yield
    missed = ENDINGS_TO_REACH - reached
    assert not missed, f"never reached: {missed}"


def assignment() -> Any:
    """The identity of a registered device."""
    world = World()
    world.run(Lifecycle(settings()).live(True, False))
    return decode(world.store[IDENTITY])[0]


ASSIGNMENT = assignment()


class Surroundings:
    """Answers a session's effects from what hypothesis drew, and notes what it says."""

    def __init__(self, waits_s: list[float], failures: list[Any], unsent: list[bool], taken: list[bool]) -> None:
        self.waits_s, self.failures, self.unsent, self.taken = waits_s, failures, unsent, taken
        self.uptime_s = 100.0
        self.connection: Any = None
        self.events: list[Any] = []
        self.connected = False
        self.packet_id = 0
        self.in_flight: set[int] = set()
        self.acknowledged: set[int] = set()  # of no message: drawn, as a hub that confuses its packet ids
        self.arrived: list[int] = []  # packet ids on this connection that a PUBACK may be for
        self.request_id = 0
        self.withdrawn: set[int] = set()
        self.of_the_twin: set[int] = set()
        self.sent: set[int] = set()  # requests of programs that the session has taken
        self.answered: list[int] = []
        self.numbers: list[int] = []
        self.subscribed: list[str] = []

    def run(self, generator: Any) -> str:
        """The end of the generator: what it returned, or the class that it raised."""
        try:
            effect = generator.send(None)
            while True:
                try:
                    answer = self.answer(effect)
                except DpsError as error:
                    effect = generator.throw(error)
                else:
                    effect = generator.send(answer)
        except StopIteration as stop:
            return stop.value or ""
        except DpsError as error:
            return type(error).__name__
        finally:
            generator.close()

    def answer(self, effect: Any) -> Any:
        if isinstance(effect, (Sign, ForgetOlder)):
            failure = self.failures.pop(0) if self.failures else None
            if failure is not None and not (isinstance(effect, ForgetOlder) and isinstance(failure, IdentityStale)):
                raise failure
            return bytes(32)
        if isinstance(effect, Uptime):
            return self.uptime_s
        if isinstance(effect, UtcNow):
            return Utc(NOW_S + int(self.uptime_s), True, "the test")
        if isinstance(effect, Random):
            return 0.5
        if isinstance(effect, ConfirmClock):
            assert effect.hub, "before it dials somebody has to confirm the clock"
            return None
        if isinstance(effect, Connect):
            assert isinstance(effect.token, SasToken)
            answer, granted, self.events = self.connection
            self.connected = isinstance(answer, ConnAck) and answer.return_code == 0
            self.packet_id, self.arrived, self.subscribed = 0, [], []
            self.sent_now: set[int] = set()
            self.granting = granted
            return answer
        if isinstance(effect, GiveUp):
            assert effect.packet_id in self.in_flight or effect.packet_id in self.acknowledged
            self.in_flight.discard(effect.packet_id)
            return None
        assert self.connected or isinstance(effect, Tell), f"without a connection: {effect}"
        if isinstance(effect, Subscribe):
            topics = [topic for topic, _ in effect.filters]
            assert not set(topics) & set(self.subscribed) and len(topics) + len(self.subscribed) <= 5
            self.subscribed += topics
            packet_id = self.next_packet_id()
            if self.granting:
                self.events.insert(0, Granted(packet_id, (0,) * len(topics)))
                self.granting = len(self.subscribed) < 3
            return packet_id
        if isinstance(effect, SendAgain):
            assert effect.packet_id not in self.sent_now, "twice on one connection"
            self.sent_now.add(effect.packet_id)
            return None
        if isinstance(effect, Publish):
            return self.published(effect)
        if isinstance(effect, Acknowledge):
            assert effect.packet_id in self.arrived, f"acknowledges what did not arrive: {effect}"
            self.arrived.remove(effect.packet_id)
            return None
        if isinstance(effect, Tell):
            return self.told(effect.message)
        assert isinstance(effect, NextEvent), effect
        return self.next_event(effect.until_uptime_s)

    def next_packet_id(self) -> int:
        self.packet_id += 1
        while self.packet_id in self.in_flight:
            self.packet_id += 1
        return self.packet_id

    def published(self, effect: Publish) -> int | None:
        assert "+" not in effect.topic and "#" not in effect.topic and len(effect.topic) <= 65535
        assert len(effect.payload) <= 262144 and isinstance(effect.payload, bytes)
        assert effect.topic.startswith((f"devices/{DEVICE}/messages/events/", "$iothub/")), effect.topic
        if self.unsent and self.unsent.pop(0):
            return None
        if not effect.qos:
            return 0
        packet_id = self.next_packet_id()
        self.in_flight.add(packet_id)
        self.sent_now.add(packet_id)
        return packet_id

    def told(self, message: Any) -> bool:
        if isinstance(message, (TelemetryDone, TwinDone)):
            assert message.request_id in self.sent and message.request_id not in self.answered, message
            self.answered.append(message.request_id)
        if isinstance(message, (CloudMessage, MethodCall)):
            number = message.message_id if isinstance(message, CloudMessage) else message.call_id
            assert number not in self.numbers, message
            self.numbers.append(number)
        return self.taken.pop(0) if self.taken else True

    def next_event(self, until_s: float) -> Any:
        assert until_s - self.uptime_s < 86400, "a wait without an end"
        if until_s == 0.0 and (not self.events or self.events[0] is None):
            return None  # a look at what waits
        event = self.events.pop(0) if self.events else Gone("closed: no more events")
        if event is None:
            wait_s = self.waits_s.pop(0) if self.waits_s else 30.0
            self.uptime_s = max(self.uptime_s, until_s) if wait_s < 0 else self.uptime_s + wait_s
            return None if self.uptime_s >= until_s else Acknowledged(60000)
        if isinstance(event, Withdrawn):
            self.withdrawn.add(event.request_id)
        if isinstance(event, (SendTelemetry, Report, ReadTwin)):
            self.request_id += 1
            self.sent.add(self.request_id)
            event = event._replace(request_id=self.request_id)
            self.of_the_twin |= set() if isinstance(event, SendTelemetry) else {self.request_id}
        if isinstance(event, Arrived) and event.packet_id:
            self.arrived.append(event.packet_id)
        if isinstance(event, Acknowledged):
            self.in_flight.discard(event.packet_id)
            self.acknowledged.add(event.packet_id)
        if isinstance(event, Gone):
            self.connected = False
        return event


@given(
    connections=connections,
    waits_s=st.lists(st.sampled_from((-1.0, -1.0, 0.0, 20.0, 3000.0)), max_size=40),
    failures=st.lists(st.none() | st.none() | st.none() | errors, max_size=6),
    unsent=st.lists(st.booleans(), max_size=10),
    taken=st.lists(st.booleans(), max_size=10),
)
@effort(max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_a_session_ends_in_the_right_class_and_answers_each_request_once(
    connections: list[Any], waits_s: list[float], failures: list[Any], unsent: list[bool], taken: list[bool]
) -> None:
    around = Surroundings(list(waits_s), list(failures), list(unsent), list(taken))
    session = Session(settings(), ASSIGNMENT, {"v": "1"}, dict, 0, {})
    for connection in connections:
        around.connection = (connection[0], connection[1], list(connection[2]))
        end = around.run(session.open())
        reached.add(end)
        if not end:
            end = around.run(session.stay())
            reached.add(end)
            assert end, "it stays until the connection ends"
        assert end in ENDINGS_TO_REACH and (end not in ENDS or session.reason), end
        assert len(session._in_flight) <= IN_FLIGHT_LIMIT and len(session._unacknowledged) <= MESSAGE_LIMIT
        assert len(session._calls) <= CALL_LIMIT
        if end == "Broken":
            return
        around.connected = True  # programs can be told things without one
    around.run(session.abandon())
    unheard = around.sent - set(around.answered)
    assert unheard <= around.of_the_twin & around.withdrawn, "a program never heard what became of its request"
    assert session._in_flight == []


@given(
    st.dictionaries(
        st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=9),
        st.text(st.characters(exclude_categories=("Cs",)), max_size=9),
        max_size=5,
    )
)
@effort(max_examples=500, deadline=None, derandomize=True)
def test_message_properties_survive_a_topic(properties: dict[str, str]) -> None:
    text = encode_properties(properties)
    assert decode_properties(text) == properties
    assert text.isascii() and not set("/+#\u0000") & set(text)
