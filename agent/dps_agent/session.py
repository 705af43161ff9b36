"""The hub side of one identity: what is said on each connection to its hub, from the token to the end.

`open` and `stay` are the two halves of one connection, `NextEvent` is their only wait, and each ends with one word: how
the connection ended (LOST, NOT_FOUND, REFUSED, RENEW, REGISTER), or "" where it stands. What must outlive a connection
(telemetry under way, the twin's version) is kept in the `Session` and belongs to its identity alone; what belongs to
one connection is set anew in `_forget_connection`; what the hub lacks, `lacks`, belongs to the hub. Topics, answers and
limits: IoT Hub developer guide, "Communicate with an IoT hub using MQTT".

Four things run side by side on a connection; only a suspect message holds up what the others would ask of the hub:

1. Each feature (methods, twin, messages) is asked for (`_asked`), and then the hub has it (`_has`), refuses it, or
   hangs up on it (`lacks`).
2. The twin is a machine of its own (`dps_agent.twin`): one request at a time, ours or a program's.
3. Each telemetry message is under way (`_in_flight`) until it is acknowledged or given up. It may be `suspect`, which
   decides when it is sent again, and `withdrawn`: nobody waits for it.
4. The next token is made while this one serves; once it is ready the connection ends with RENEW. Of a device without
   tokens the certificate that DPS issued is renewed (`dps_agent.renewal`, a machine of its own), to the same end.

Which events they see. From the hub: Granted (1), Arrived (2, methods and messages), Acknowledged (3), Gone (all). From
programs: SendTelemetry and Withdrawn (3), AnswerMethod, MessageDone. From the driver: Readers (1), where programs begin
or cease to read messages. From whoever wants it: RegisterAgain, which ends the connection. Time is the fifth source:
`_do_what_is_due` looks at all of them, and `_next_due_s` says when it is to look again.

Whom the session pushes. Programs, by `Tell`: a message, a call, desired properties, what became of telemetry. The
life, by the word at the end, and by `keep_fleet`, of which it knows no more than the function.

What blames whom. Methods, twin and messages are optional: a hub of the Basic tier has none of them and hangs up on
whoever asks. So what a connection asked for, or sent, less than SHORT_S before it ended is held against it. A feature
is left out at the next connection and asked for alone once that one has lasted; if the hub hangs up again, ever more
rarely. A message is sent again alone, and given up after SHORT_ENDS_LIMIT such ends in a row. Somebody who sends such
messages again and again has strikes, which time takes away: with more than STRIKES_FREE he sends one message at a time,
ever more rarely, and only while nothing of others is under way.
"""

from dps_agent.assignment import has_tokens
from dps_agent.attestation import shown_to_hub
from dps_agent.effects import (
    NO_REPLY_CLOSED,
    NO_REPLY_NOT_FOUND,
    NO_REPLY_TIMEOUT,
    ConfirmClock,
    ForgetOlder,
    NoReply,
    Random,
    Uptime,
)
from dps_agent.fleet import TOKEN_LIFE_S
from dps_agent.hub_effects import (
    NOT_AUTHORIZED,
    Acknowledge,
    Acknowledged,
    AnswerMethod,
    Arrived,
    CloudMessage,
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
    Withdrawn,
)
from dps_agent.sas import percent_decode, percent_encode
from dps_agent.settings import is_wanted
from dps_agent.signing import hub_token
from dps_agent.twin import NEVER_S, Twin, query_value
from dps_agent.utc import AGREEMENT_S
from dps_hal.contracts import IDENTITY
from dps_hal.errors import AskOperator, RetryLater
from dps_hal.platform import to_json

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from typing import Any

    from dps_agent.assignment import Assignment
    from dps_agent.effects import Effect
    from dps_agent.hub_effects import ConnAck, Event
    from dps_agent.renewal import Renewal
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

# What a hub may do without.
METHODS = "methods"
TWIN = "twin"
MESSAGES = "messages"
FEATURES = (METHODS, TWIN, MESSAGES)

API_VERSION = "2021-04-12"  # model-id needs 2020-09-30 or a later one

RENEW_AT = 0.8  # so much of a token's life at the latest
RENEW_SPREAD = 0.05  # up to so much of it earlier, so that a fleet does not renew together
# The same for the token of a new connection: what has connected together would otherwise renew together for weeks.
CONNECT_SPREAD = 0.5
RENEW_AGAIN_S = 60  # after a token could not be made
SUBSCRIBE_LIMIT_S = 30
TELEMETRY_LIMIT = 262144  # bytes as `telemetry_size` counts; IoT Hub quotas. A hub closes the connection on more
TOPIC_LIMIT = 65535  # bytes; MQTT 3.1.1, 1.5.3
METHOD_LIMIT_S = 25  # for a program's answer to a call; the hub's callers wait 30 s unless they say otherwise
IDLE_AFTER_S = 10  # so long after the subscriptions the older identity may be forgotten
SHORT_S = 60  # a connection that ends so soon after something was sent may have ended because of that
SHORT_ENDS_LIMIT = 3  # of connections in a row, right after one message was sent: with so many it is given up
STRIKE_S = 600  # after so long one strike is forgotten
STRIKES_FREE = 3
STRIKES_LIMIT = 9  # SHORT_S doubled five times, half an hour
SENDERS_LIMIT = 16  # senders whose strikes are remembered
LACKING_GROWTH = 8  # from SHORT_S on: how much longer what the hub hung up on is left out each time
LACKING_LIMIT_S = 86400
IN_FLIGHT_LIMIT = 32  # telemetry messages without acknowledgement
IN_FLIGHT_SIZE = 2621440  # bytes of them, topics included
WAITING_LIMIT = 256  # events taken in one go
MESSAGE_LIMIT = 50  # cloud-to-device messages that programs hold; a hub queues no more for a device
MESSAGE_SIZE = 1048576  # bytes of them, topics included
CALL_LIMIT = 16  # method calls that wait for a program
CALL_SIZE = 524288  # bytes of them
METHOD_LIMIT = 131072  # bytes of one call; IoT Hub quotas
RID_LIMIT = 256  # characters of a request id; a hub's have few

# MQTT 3.1.1, table 3.1
_UNACCEPTABLE = (1, 2)  # return codes: the hub takes neither this protocol version nor this client id
_SUBSCRIPTION_FAILED = 0x80


class _Telemetry:
    """One message without acknowledgement."""

    def __init__(
        self, packet_id: int, request_id: int, sender: int, size: int, sent_at_s: float, suspect: bool
    ) -> None:
        self.packet_id = packet_id
        self.request_id = request_id
        self.sender = sender
        self.suspect = suspect  # the hub may hang up on it: it did before, or its sender has strikes
        self.withdrawn = False  # nobody waits for it any more
        self.size = size
        self.sent_at_s: float | None = sent_at_s  # None: it was not sent on this connection yet
        self.short_ends = 0  # how many connections in a row ended right after it was sent


class Session:
    """The connections of one identity, one after the other. `reason` says in words why the last one ended.

    `about` is reported to the twin. `status` gives what the method of that name answers. `accepted`: the hub took the
    last token. `serial` counts messages, calls and twin requests, from that of the identity before on. Before the
    uptime `dps_not_before_s` DPS does not want to be asked, and nobody's wish to register again is taken. `lacks` is
    what earlier sessions found out that the hub lacks, and is kept up to date: feature -> when to ask for it again, and
    how long that waits; (0.0, 0.0): on each connection, for it was refused.
    """

    def __init__(
        self,
        settings: "Settings",
        assignment: "Assignment",
        about: "dict[str, str]",
        status: "Callable[[], dict[str, Any]]",
        serial: int,
        lacks: "dict[str, tuple[float, float]]",
    ) -> None:
        self.accepted = False
        self.reason = self.code = ""
        self.was_provoked = False  # the last connection ended right after a message that was suspect
        self.has_served = False  # on it the hub acknowledged a message
        self.serial = serial
        self._settings = settings
        self.assignment = assignment  # the identity, which has another certificate once one was renewed
        self.twin = Twin(about, settings.fleet)
        self._client_type = percent_encode("dps-agent/" + about.get("agentVersion", ""))
        self._status = status
        self._token: SasToken | None = None  # the one that the next connection takes
        self._renew_at_s = 0.0
        self.dps_not_before_s = 0.0
        self.token_life_s: int = settings.token_life_s or TOKEN_LIFE_S
        self._expires_at_s = 0.0
        self._expiry_utc_s = 0  # the same moment, as the token says it
        self._in_flight: list[_Telemetry] = []  # in the order in which it was sent first
        self._lacks = lacks
        self._strikes: dict[int, tuple[int, float]] = {}  # sender -> their number, and when the last one came
        self._unasked: dict[int, float] = {}  # sender -> when it last sent with QoS 0 on this connection
        self._doubted: list[
            int
        ] = []  # senders after whose QoS 0 a hub hung up: QoS 1 until one of theirs is acknowledged
        self._struck: list[int] = []  # senders that got a strike for this connection: one each
        self._reads = False  # a program reads messages
        self._cleaned = False  # the older identity is gone
        self._renewal: Renewal | None = None  # of the certificate that DPS issued
        self._forget_connection()

    def _forget_connection(self) -> None:
        # Packet id -> features and when they were asked for, of those not answered yet.
        self._subscriptions: dict[int, tuple[tuple[str, ...], float]] = {}
        self._subscribed: list[str] = []  # features that were asked for
        self._asked: dict[str, float] = {}  # features that the hub has not answered for yet, and since when
        self._ready_at_s = 0.0  # when the first subscriptions were answered
        self._unacknowledged: dict[int, tuple[int, int]] = {}  # message id -> packet id, size; 0: without one
        self._calls: dict[int, tuple[str, float, int]] = {}  # call id -> the hub's request id, latest answer, size
        for telemetry in self._in_flight:
            telemetry.sent_at_s = None
        self._unasked.clear()
        self._renewed_at_s = NEVER_S  # when the next token was ready
        self.twin.forget_connection()
        if self._renewal:
            self._renewal.forget_connection()

    @property
    def renewal_trouble(self) -> str:
        """What went wrong last with the renewal of a certificate that DPS issued; "" for nothing."""
        return self._renewal.reason if self._renewal else ""

    def open(self) -> "Generator[Effect, Any, str]":
        """Connects and subscribes; returns "" if that was done, else how it ended.

        AskOperator `hub.protocol`: the hub does not speak with us. What TPM and clock raise comes through.
        """
        self._forget_connection()
        self.accepted = False
        token, self._token = self._token, None
        shown: SasToken | bytes | None = token
        if not has_tokens(self.assignment):
            self._renew_at_s = NEVER_S
            shown, self._renewal = yield from shown_to_hub(self.assignment, self._renewal)
        elif token is None:
            yield ConfirmClock(self.assignment.assigned_hub)
            shown = yield from self._make_token(CONNECT_SPREAD)
        self.was_provoked = self.has_served = False
        for telemetry in [telemetry for telemetry in self._in_flight if telemetry.withdrawn]:
            yield from self._give_up_unanswered(telemetry)
        hub, device_id = self.assignment.assigned_hub, self.assignment.device_id
        version = self._renewal.api_version if self._renewal else API_VERSION
        user_name = f"{hub}/{device_id}/?api-version={version}&DeviceClientType={self._client_type}"
        if self._settings.model_id:
            user_name += f"&model-id={percent_encode(self._settings.model_id)}"
        fresh = not self._reads  # with an old one the hub delivers at once what an earlier reader left, and counts that
        answer: ConnAck | NoReply = yield Connect(hub, device_id, user_name, shown, self._settings.keep_alive_s, fresh)
        if isinstance(answer, NoReply):
            end = self._ended("was not reached", answer.reason)
            return REFUSED if self._renewal and (yield from self._renewal.is_refused(answer.reason)) else end
        if answer.return_code:
            return self._refused(answer.return_code)
        self.accepted = True
        self._struck.clear()
        now_s: float = yield Uptime()
        self._ready_at_s = now_s
        features = [name for name in FEATURES if not self._hangs_up(name) and (name != MESSAGES or self._reads)]
        yield from self.twin.open(TWIN not in features)
        if not features:
            return ""
        if not (yield from self._subscribe(tuple(features), now_s)):
            return (yield from self._lost("closed the connection", NO_REPLY_CLOSED))
        until_s = now_s + SUBSCRIBE_LIMIT_S
        while True:
            event: Event | None = yield NextEvent(until_s)
            if event is not None:
                end = yield from self._take(event)
                if end or not self._subscriptions:
                    return end
            later_s: float = yield Uptime()
            if later_s >= until_s:
                return (yield from self._lost("did not grant the subscriptions", NO_REPLY_TIMEOUT))

    def stay(self, pause_at_s: "float | None" = None) -> "Generator[Effect, Any, str]":
        """Does what hub and programs ask for until the connection ends; returns how.

        At the uptime `pause_at_s` it returns "": the connection stands, and `stay` again goes on with it.
        """
        end = yield from self._take_what_waits()  # what is due may be over by now
        if end:
            return end
        while True:
            now_s: float = yield Uptime()
            if pause_at_s is not None and now_s >= pause_at_s:
                return ""
            due_s = self._next_due_s()
            if now_s >= due_s:
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
        for telemetry in list(self._in_flight):
            yield from self._give_up(telemetry)
        yield from self.twin.abandon()

    def clock_kept(self, now: "Utc", uptime_s: float) -> bool:
        """Whether the time under which the last token was made is still believed: else its refusal says nothing."""
        if not self._expiry_utc_s:
            return True  # there was none
        token_s = self._expiry_utc_s - (self._expires_at_s - uptime_s)
        return now.believable and abs(now.now_s - token_s) <= AGREEMENT_S

    # What is due.

    def _do_what_is_due(self, now_s: float) -> "Generator[Effect, Any, str]":
        """What time asks for, in this order; returns how the connection ended, or "".

        1. Calls that no program has answered. 2. Telemetry of an earlier connection. 3. A twin request. 4. An end,
        where the hub has not granted the subscriptions in time. 5. A feature that the hub lacked. 6. The older
        identity, which is forgotten. 7. A certificate that is to be renewed. 8. What the next connection shows is
        ready: the end.
        """
        if self._overdue(now_s):  # the answer may have come in time and wait here
            end = yield from self._take_what_waits()
            if end:
                return end
        for call_id in self._overdue(now_s):
            rid = self._calls.pop(call_id)[0]
            yield from self._answer(rid, 504, {"message": f"no program answered within {METHOD_LIMIT_S} s"})
        yield from self._send_rest(now_s)
        if now_s >= self._twin_due_s():
            own: bool = yield from self.twin.ask(now_s)
            if own:
                self._asked[TWIN] = now_s
        if self._subscriptions and now_s >= self._unanswered_s():
            return (yield from self._lost("did not grant the subscriptions", NO_REPLY_TIMEOUT))
        for name in FEATURES:
            if now_s >= self._ask_again_s(name):
                yield from self._subscribe((name,), now_s)
        if not self._cleaned and now_s >= self._ready_at_s + IDLE_AFTER_S:
            try:
                yield ForgetOlder(IDENTITY)
                self._cleaned = True
            except (RetryLater, AskOperator):
                self._cleaned = True  # the next life's turn; what ails the store shows at the next commit
        if self._renewal and now_s >= self._renewal.due_s():
            must_register = yield from self._renewal.ask(now_s, self.dps_not_before_s)
            if must_register:
                self.reason = self._renewal.reason
                return REGISTER
            self._take_renewed(now_s)
        if now_s >= self._renew_due_s():
            return (yield from self._renew(now_s))
        return ""

    def _take_renewed(self, now_s: float) -> None:
        """Once another certificate is stored the next connection shows it."""
        if self._renewal and self._renewal.assignment is not self.assignment:
            self.assignment = self._renewal.assignment
            self._renewed_at_s = now_s
            self._cleaned = False

    def _overdue(self, now_s: float) -> "list[int]":
        return [call_id for call_id in self._calls if self._calls[call_id][1] <= now_s]

    def _renew_due_s(self) -> float:
        """Calls that wait for a program are answered on this connection."""
        due_s = min(self._renew_at_s, self._renewed_at_s)
        return due_s + METHOD_LIMIT_S if self._calls else due_s

    def _next_due_s(self) -> float:
        due_s = min(self._renew_due_s(), self._twin_due_s())
        if self._renewal:
            due_s = min(due_s, self._renewal.due_s())
        for _, until_s, _ in self._calls.values():
            due_s = min(due_s, until_s)
        for name in FEATURES:
            due_s = min(due_s, self._ask_again_s(name))
        if self._subscriptions:
            due_s = min(due_s, self._unanswered_s())
        if not self._cleaned:
            due_s = min(due_s, self._ready_at_s + IDLE_AFTER_S)
        for telemetry in self._in_flight:
            if telemetry.sent_at_s is None:  # what nobody waits for is given up at once
                at_s = 0.0 if telemetry.withdrawn else self._may_be_sent_s(telemetry.sender, telemetry.suspect)
                due_s = min(due_s, at_s)
        return due_s

    def _twin_due_s(self) -> float:
        """When something is asked of the twin; not beside a message that may make the hub hang up."""
        return max(self.twin.due_s(), self._suspect_until_s())

    def _unanswered_s(self) -> float:
        """When the hub has had its time for the subscriptions asked for last."""
        asked_at_s = 0.0
        for _, since_s in self._subscriptions.values():
            asked_at_s = max(asked_at_s, since_s)
        return asked_at_s + SUBSCRIBE_LIMIT_S

    def _ask_again_s(self, name: str) -> float:
        """When to ask for a feature that the hub lacked: on a connection that lasts, beside nothing else."""
        if name not in self._lacks or name in self._subscribed or (name == MESSAGES and not self._reads):
            return NEVER_S
        if not is_wanted(name, self._settings):
            return NEVER_S
        due_s = max(self._lacks[name][0], self._ready_at_s + SHORT_S, self._suspect_until_s())
        for asked_at_s in self._asked.values():
            due_s = max(due_s, asked_at_s + SHORT_S)
        return due_s

    def _suspect_until_s(self) -> float:
        """Until when the hub may hang up because of a message that it was sent; 0.0: there is none."""
        return self._may_be_sent_s(-1, True)

    def _may_be_sent_s(self, sender: int, suspect: bool) -> float:
        """When to send a message.

        1. One that is not suspect: now. 2. A suspect one: beside no other such. 3. One whose sender has more than
        STRIKES_FREE strikes: beside nothing at all, and the later the more strikes there are.
        """
        if not suspect:
            return 0.0
        strikes, due_s = self._strikes.get(sender, (0, 0.0))
        alone = strikes > STRIKES_FREE
        due_s = due_s + SHORT_S * 2 ** (strikes - STRIKES_FREE - 1) if alone else 0.0
        for telemetry in self._in_flight:
            if telemetry.sent_at_s is not None and (alone or telemetry.suspect):
                due_s = max(due_s, telemetry.sent_at_s + SHORT_S)
        return due_s

    def _send_rest(self, now_s: float) -> "Generator[Effect, Any, None]":
        """Sends what has no acknowledgement from an earlier connection; what may have ended that one last and alone."""
        for suspect in (False, True):
            for telemetry in list(self._in_flight):
                if telemetry.sent_at_s is not None or telemetry.suspect is not suspect:
                    continue
                if telemetry.withdrawn:
                    yield from self._give_up_unanswered(telemetry)
                elif now_s >= self._may_be_sent_s(telemetry.sender, suspect):
                    telemetry.sent_at_s = now_s
                    yield SendAgain(telemetry.packet_id)

    def _strikes_of(self, sender: int, now_s: float) -> int:
        strikes, since_s = self._strikes.get(sender, (0, now_s))
        return max(strikes - int((now_s - since_s) / STRIKE_S), 0)

    def _strike(self, sender: int, now_s: float) -> None:
        """The hub hung up on a message of this sender, once more."""
        if sender in self._struck:
            return
        self._struck.append(sender)
        strikes = min(self._strikes_of(sender, now_s) + 1, STRIKES_LIMIT)
        self._strikes[sender] = (strikes, now_s)
        if len(self._strikes) > SENDERS_LIMIT:
            oldest = sender
            for known in self._strikes:
                if self._strikes[known][1] < self._strikes[oldest][1]:
                    oldest = known
            del self._strikes[oldest]

    def _renew(self, now_s: float) -> "Generator[Effect, Any, str]":
        """Makes the next token while this one still serves; without one the connection goes on while it may.

        What has come while the TPM signed is done on this connection: programs were told that it would be.
        """
        if self._token is None and not self._renewal:
            try:
                self._token = yield from self._make_token(RENEW_SPREAD)
            except (RetryLater, AskOperator):
                if now_s >= self._expires_at_s:
                    raise
                self._renew_at_s = min(now_s + RENEW_AGAIN_S, self._expires_at_s)
                return ""
            self._renewed_at_s = now_s
        end = yield from self._take_what_waits()
        if end or now_s < self._renew_due_s():
            return end
        self.reason = "the certificate is renewed" if self._renewal else "the token is renewed"
        return RENEW

    def _make_token(self, spread: float) -> "Generator[Effect, Any, SasToken]":
        life_s = self.token_life_s
        token = yield from hub_token(self.assignment, life_s)
        now_s: float = yield Uptime()
        random: float = yield Random()
        self._expires_at_s = now_s + life_s
        self._expiry_utc_s = token.expires_at_s
        self._renew_at_s = now_s + life_s * (RENEW_AT - spread * random)
        return token

    # What arrives.

    def _take_what_waits(self) -> "Generator[Effect, Any, str]":
        """Takes what has come already; whoever goes on sending does not hold this up."""
        for _ in range(WAITING_LIMIT):
            event: Event | None = yield NextEvent(0.0)
            if event is None:
                break
            end = yield from self._take(event)
            if end:
                return end
        return ""

    def _take(self, event: "Event") -> "Generator[Effect, Any, str]":
        if isinstance(event, Gone):
            return (yield from self._lost("ended the connection", event.reason))
        if isinstance(event, RegisterAgain):
            self.reason = "asked to register again"
            return REGISTER
        if self._renewal and (yield from self._renewal.take(event)):
            taken_s: float = yield Uptime()
            self._take_renewed(taken_s)
            return ""
        if isinstance(event, Granted):
            yield from self._take_granted(event)
        elif isinstance(event, Acknowledged):
            self.has_served = True
            for telemetry in self._in_flight:
                if telemetry.packet_id == event.packet_id:
                    self._in_flight.remove(telemetry)
                    self._doubted = [sender for sender in self._doubted if sender != telemetry.sender]
                    _taken: bool = yield Tell(TelemetryDone(telemetry.request_id, True, True))
                    break
        elif isinstance(event, Readers):
            self._reads = event.number > 0
            if self._reads and MESSAGES not in self._subscribed and not self._hangs_up(MESSAGES):
                now_s: float = yield Uptime()
                yield from self._subscribe((MESSAGES,), now_s)
        elif isinstance(event, Withdrawn):
            for telemetry in self._in_flight:
                if telemetry.request_id == event.request_id:
                    telemetry.withdrawn = True  # its packet id may still be acknowledged on this connection
            self.twin.withdraw(event.request_id)
        elif isinstance(event, Arrived):
            return (yield from self._take_message(event))
        elif isinstance(event, SendTelemetry):
            yield from self._send(event)
        elif isinstance(event, (Report, ReadTwin)):
            yield from self.twin.take(event)
        elif isinstance(event, AnswerMethod):
            call = self._calls.pop(event.call_id, None)
            if call is not None:
                topic = f"$iothub/methods/res/{event.status}/?$rid={call[0]}"
                _sent: int | None = yield Publish(topic, event.payload or b"{}", 0)
        elif isinstance(event, MessageDone):
            packet_id, _ = self._unacknowledged.pop(event.message_id, (0, 0))
            if packet_id:
                yield Acknowledge(packet_id)
        return ""

    # Features.

    def _filters(self, name: str) -> "tuple[tuple[str, int], ...]":
        if name == METHODS:
            return (("$iothub/methods/POST/#", 0),)
        if name == TWIN:
            return (("$iothub/twin/res/#", 0), ("$iothub/twin/PATCH/properties/desired/#", 0))
        return ((f"devices/{self.assignment.device_id}/messages/devicebound/#", 1),)

    def _subscribe(self, features: "tuple[str, ...]", now_s: float) -> "Generator[Effect, Any, bool]":
        """Asks for these features; whether there was a connection to ask on."""
        filters: tuple[tuple[str, int], ...] = ()
        for name in features:
            filters += self._filters(name)
            self._asked[name] = now_s
            self._subscribed.append(name)
        packet_id: int | None = yield Subscribe(filters)
        if packet_id is not None:
            self._subscriptions[packet_id] = (features, now_s)
        return packet_id is not None

    def _take_granted(self, granted: Granted) -> "Generator[Effect, Any, None]":
        features, _ = self._subscriptions.pop(granted.packet_id, ((), 0.0))
        codes = granted.return_codes
        now_s: float = yield Uptime()
        for name in features:
            count = len(self._filters(name))
            if len(codes) < count or _SUBSCRIPTION_FAILED in codes[:count]:
                self._asked.pop(name, None)
                self._lacks[name] = (0.0, 0.0)  # it costs nothing to ask again
                if name == TWIN:
                    yield from self.twin.open(True)
            elif name == TWIN:
                self.twin.grant(now_s)
            else:
                self._has(name)
            codes = codes[count:]

    def _hangs_up(self, name: str) -> bool:
        """Whether the hub may end the connection when it is asked for this feature, or is not to be asked."""
        return self._lacks.get(name, (0.0, 0.0))[1] > 0.0 or not is_wanted(name, self._settings)

    def _has(self, name: str) -> None:
        """The hub has answered for this feature."""
        self._asked.pop(name, None)
        self._lacks.pop(name, None)

    def _take_message(self, message: Arrived) -> "Generator[Effect, Any, str]":
        topic = message.topic
        devicebound = f"devices/{self.assignment.device_id}/messages/devicebound/"
        end = ""
        if topic.startswith(devicebound):
            size = len(topic) + len(message.payload or b"")
            held = size
            for packet_id, held_size in self._unacknowledged.values():
                if packet_id and packet_id == message.packet_id:
                    return ""  # a program has it already
                held += held_size
            if len(self._unacknowledged) >= MESSAGE_LIMIT or held > MESSAGE_SIZE:
                return ""  # the hub keeps it and delivers it on a later connection
            self.serial += 1
            self._unacknowledged[self.serial] = (message.packet_id, size)
            properties = decode_properties(topic[len(devicebound) :])
            taken: bool = yield Tell(CloudMessage(self.serial, properties, message.payload))
            if not taken:
                self._unacknowledged.pop(self.serial, None)  # nobody will be done with it; the hub keeps it
            return ""  # acknowledged once a program is done with it
        if topic.startswith("$iothub/methods/POST/"):
            end = yield from self._call(topic[21:], message.payload)
        elif topic.startswith("$iothub/twin/res/"):
            answered: bool = yield from self.twin.answered(topic[17:], message.payload)
            if answered:
                self._has(TWIN)
        elif topic.startswith("$iothub/twin/PATCH/properties/desired/"):
            yield from self.twin.take_desired(topic, message.payload)
        if message.packet_id:
            yield Acknowledge(message.packet_id)
        return end

    def _call(self, rest: str, payload: "bytes | None") -> "Generator[Effect, Any, str]":
        """A direct method: `rest` is `{name}/?$rid={rid}`."""
        name, _, query = rest.partition("/")
        name = percent_decode(name)
        rid = query_value(query, "$rid")
        if not rid or "+" in rid or "#" in rid or len(rid) > RID_LIMIT:
            return ""  # no topic to answer on
        size = len(rest) + len(payload or b"")
        if payload is None or size > METHOD_LIMIT:
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
        elif len(self._calls) >= CALL_LIMIT or sum([call[2] for call in self._calls.values()]) + size > CALL_SIZE:
            yield from self._answer(rid, 429, {"message": f"{len(self._calls)} calls wait for an answer"})
        else:
            self.serial += 1
            call_id = self.serial
            now_s: float = yield Uptime()
            self._calls[call_id] = (rid, now_s + METHOD_LIMIT_S, size)
            taken: bool = yield Tell(MethodCall(call_id, name, payload))
            if not taken:
                del self._calls[call_id]
                yield from self._answer(rid, 404, {"message": f"no program on this device answers '{name}'"})
        return ""

    def _answer(self, rid: str, status: int, value: "dict[str, Any]") -> "Generator[Effect, Any, None]":
        topic = f"$iothub/methods/res/{status}/?$rid={rid}"
        _sent: int | None = yield Publish(topic, to_json(value).encode(), 0)

    def _send(self, telemetry: SendTelemetry) -> "Generator[Effect, Any, None]":
        topic = self._telemetry_topic(telemetry)
        size = len(topic) + len(telemetry.payload)
        full = len(self._in_flight) >= IN_FLIGHT_LIMIT
        full = full or size + sum([waiting.size for waiting in self._in_flight]) > IN_FLIGHT_SIZE
        sender = telemetry.sender
        now_s: float = yield Uptime()
        strikes = self._strikes_of(sender, now_s)
        if strikes > STRIKES_FREE:
            full = bool(self._in_flight) or now_s < self._may_be_sent_s(sender, True)
        # What comes behind a message that is under suspicion, of the same sender, is no less so.
        same = [waiting for waiting in self._in_flight if waiting.sender == sender and waiting.suspect]
        suspect = strikes > 0 or bool(same)
        if topic and not full:
            qos = telemetry.qos if not suspect and sender not in self._doubted else 1
            packet_id: int | None = yield Publish(topic, telemetry.payload, qos)
            if packet_id == 0:
                self._unasked[sender] = now_s
                _told: bool = yield Tell(TelemetryDone(telemetry.request_id, True, True))
                return
            if packet_id is not None:
                self._in_flight.append(_Telemetry(packet_id, telemetry.request_id, sender, size, now_s, suspect))
                return
        _taken: bool = yield Tell(TelemetryDone(telemetry.request_id, False, False))

    def _give_up(self, telemetry: _Telemetry) -> "Generator[Effect, Any, None]":
        self._in_flight.remove(telemetry)
        yield GiveUp(telemetry.packet_id)
        _taken: bool = yield Tell(TelemetryDone(telemetry.request_id, False, True))

    def _give_up_unanswered(self, telemetry: _Telemetry) -> "Generator[Effect, Any, None]":
        """Gives up what nobody waits for any more; that the hub hung up on it counts as if it had done so again."""
        if telemetry.short_ends:
            now_s: float = yield Uptime()
            self._strike(telemetry.sender, now_s)
        yield from self._give_up(telemetry)

    def _telemetry_topic(self, telemetry: SendTelemetry) -> str:
        """The topic; "" where no hub would take the message."""
        try:
            topic = telemetry_topic(self.assignment.device_id, telemetry.properties)
        except ValueError:  # half a character: no UTF-8
            return ""
        fits = telemetry_size(telemetry.properties, len(telemetry.payload)) <= TELEMETRY_LIMIT
        return topic if fits and len(topic) <= TOPIC_LIMIT else ""

    # How it ends.

    def _lost(self, what: str, reason: str) -> "Generator[Effect, Any, str]":
        """The end of a connection that the hub had accepted, held against what it may be the answer to.

        1. A suspect message was sent just before: its sender gets a strike. 2. Otherwise, features were asked for just
        before: they are left out for a while, ever longer. 3. Otherwise, the connection was short: what it went without
        was not the reason. 4. In any case messages sent just before are suspect, and one that was so too often is given
        up. A hub that has only fallen silent hung up on no message.
        """
        now_s: float = yield Uptime()
        recent: list[_Telemetry] = []
        if reason.partition(":")[0] != NO_REPLY_TIMEOUT:  # a hub that is silent does not hang up on anything
            for telemetry in self._in_flight:
                if telemetry.sent_at_s is not None and now_s < telemetry.sent_at_s + SHORT_S:
                    recent.append(telemetry)
            for sender in self._unasked:
                if now_s < self._unasked[sender] + SHORT_S and sender not in self._doubted:
                    self._doubted = self._doubted[1 - SENDERS_LIMIT :]
                    self._doubted.append(sender)
        for telemetry in recent:
            if telemetry.suspect:
                self.was_provoked = True
                self._strike(telemetry.sender, now_s)
        blamed = self.was_provoked
        for name in () if blamed else FEATURES:
            if name in self._asked and now_s < self._asked[name] + SHORT_S:
                blamed = True
                wait_s = min(max(LACKING_GROWTH * self._lacks.get(name, (0.0, 0.0))[1], SHORT_S), LACKING_LIMIT_S)
                self._lacks[name] = (now_s + wait_s, wait_s)
        if not blamed and now_s < self._ready_at_s + SHORT_S:  # what it went without was not the reason
            for name in [name for name in self._lacks if self._lacks[name][1] == SHORT_S]:
                del self._lacks[name]
        for telemetry in list(self._in_flight):
            if telemetry.sent_at_s is not None:
                telemetry.suspect = telemetry in recent
                telemetry.short_ends = telemetry.short_ends + 1 if telemetry.suspect else 0
            if telemetry.short_ends >= SHORT_ENDS_LIMIT:
                yield from self._give_up(telemetry)
        return self._ended(what, reason)

    def _ended(self, what: str, reason: str) -> str:
        self.reason = f"{self.assignment.assigned_hub} {what} ({reason})"
        word = reason.partition(":")[0]
        self.code = word if "." in word else ""  # a code: this device is the reason, and not the way to the hub
        return NOT_FOUND if word == NO_REPLY_NOT_FOUND else LOST

    def _refused(self, return_code: int) -> str:
        hub, device_id = self.assignment.assigned_hub, self.assignment.device_id
        self.code = ""
        self.reason = f"{hub} refused the connection of {device_id!r} with code {return_code}"
        if return_code in _UNACCEPTABLE:
            raise AskOperator("hub.protocol", self.reason)
        return REFUSED if return_code in NOT_AUTHORIZED else LOST


def telemetry_topic(device_id: str, properties: "dict[str, str]") -> str:
    """The topic of a message with these properties; ValueError where they are no UTF-8."""
    return f"devices/{device_id}/messages/events/{encode_properties(properties)}"


def telemetry_size(properties: "dict[str, str]", payload_size: int) -> int:
    """The bytes of a message as a hub counts them; ValueError where the properties are no UTF-8.

    Of system properties, which begin with "$.", it counts the values alone: IoT Hub developer guide, "Create and read
    IoT Hub messages".
    """
    size = payload_size
    for name in properties:
        size += len(properties[name].encode()) + (0 if name.startswith("$.") else len(name.encode()))
    return size


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
