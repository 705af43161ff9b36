"""What programs on this device may ask for: a request and the time in, a value out.

`Routes.begin` looks at a request before its body is read: nothing is read for an id, a route or a share that is none.
What it returns takes the body and gives back one of these:

1. `Reply`: an answer, perhaps with an event that the hub's session is to have first.
2. `Later`: the answer comes from the hub or the service, for which `asked` is to be handed on.
3. `Messages`: many messages for the hub, one answer.
4. `Stream`: the lines of GET /events, for as long as the connection stands.
5. `Text`: an answer that is no JSON.

What is wrong with a request is raised as `Refused`.

What there is stands in `PATHS`.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from dps_agent.host.error_document import error_fields
from dps_agent.host.local.batch import Messages
from dps_agent.host.local.events import is_json
from dps_agent.host.local.shares import Rate, is_trusted
from dps_agent.hub_effects import AnswerMethod, MessageDone, ReadTwin, Report, SendTelemetry, TelemetryDone, TwinDone
from dps_agent.properties import flaw_of
from dps_agent.sas import percent_decode
from dps_agent.session import TELEMETRY_LIMIT, TOPIC_LIMIT, TWIN, telemetry_size, telemetry_topic
from dps_agent.twin import LACKING, NOT_SENT, REPORTED_NAME
from dps_hal.platform import from_json, to_json
from dps_text import whole_number

if TYPE_CHECKING:
    from collections.abc import Callable

    from dps_agent.host.counts import Counts
    from dps_agent.host.local.events import Events

ANSWER_LIMIT = 128 * 1024  # bytes; IoT Hub developer guide: the payload of a direct method
PATCH_LIMIT = 256 * 1024  # bytes of JSON: names and values of 32 KiB, however they are written
TELEMETRY_LIMIT_S = 30.0
TWIN_REQUEST_SIZE = 64  # bytes of the topic of a request to the twin
COMMAND_LIMIT_S = 60.0
REGISTRATION_LIMIT_S = 1200.0  # a registration's largest budget that makes sense, and what its steps may overrun
TOKEN_LIFE_LIMIT_S = 900
TOKENS_A_MINUTE = 16  # for all users who are not trusted: the TPM makes each, and has other work
USER_TOKENS_A_MINUTE = 4
METRICS_TYPE = "application/openmetrics-text; version=1.0.0; charset=utf-8"
SMALL_LIMIT = 4096  # bytes of a body that nothing is looked for in
RETRY_AFTER_S = 5  # what a refusal names where nothing better is known
NDJSON = "application/x-ndjson"
_QOS = {"0": 0, "1": 1}
_COMMANDS = ("provision", "reset", "token", "status")
_USAGE = "GET / lists what the socket has; docs/operators.md says more of each"
PATHS = {
    "GET /": "this list",
    "GET /status": "where the device stands",
    "GET /assignment": "hub and device id; 404 while there is none",
    "POST /telemetry?name=value": "the body goes to the hub as it is, the query as message properties; 200 once the hub"
    " has acknowledged it, with $qos=0 once it is written; application/x-ndjson: a message a line",
    "GET /metrics": "what the service counts, in OpenMetrics' text",
    "GET /twin": "desired and reported properties, as the hub has them",
    "PATCH /twin/reported": "a JSON merge patch to the reported properties; 200 with their version once the hub has it",
    "GET /events": "what the hub sends, one JSON document a line, for as long as the connection stands",
    "POST /events/{id}/done": "the message need not be delivered again",
    "POST /methods/{id}?status=200": "the answer to a direct method, JSON",
    "POST /token?life=900": "a token for this device's hub; only with [api] allow_token",
    "POST /command/{name}": "provision, reset, token; status: whether DPS may be asked; for root and the own user",
}
# Method by the path's words, of which a `*` stands for any one.
_METHODS = {tuple(path[1:].partition("?")[0].split("/")): method for method, path in map(str.split, PATHS)}
_METHODS = {tuple("*" if word[:1] == "{" else word for word in words): _METHODS[words] for words in _METHODS}


class Refused(Exception):
    """A request that is answered at once with an error; `allow` is the method that its path has, if it is another."""

    def __init__(self, status: int, code: str, message: str, retry_after_s: int | None = None, allow: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.allow = allow
        self.document = error_document(code, message, retry_after_s)


class Request(NamedTuple):
    """One request of a user's without its body, which has `length` bytes."""

    method: str
    path: str
    query: str
    length: int
    user: int
    kind: str = ""  # the body's media type


class Begun(NamedTuple):
    """A request that may have its body; with a topic it takes one of the places for telemetry under way."""

    finish: Callable[[bytes], Reply | Later | Messages | Stream | Text]
    topic_size: int = 0  # bytes of the topic that it goes to the hub under; 0: it does not go there


class Command(NamedTuple):
    """What a program asks of the service itself; answered through `LocalServer.answer` with its `request_id`."""

    request_id: int
    name: str  # provision, reset, token, status
    force: bool = False
    life_s: int = 0


class Reply(NamedTuple):
    """An answer, once the hub's session has taken `event` where there is one; `taken` is called then."""

    status: int
    document: dict[str, Any]
    event: MessageDone | AnswerMethod | None = None
    taken: Callable[[], None] | None = None


class Later(NamedTuple):
    """An answer that comes within `limit_s`, under the request id that `asked` gets."""

    asked: SendTelemetry | Report | ReadTwin | Command
    limit_s: float


class Stream(NamedTuple):
    """The chunks of `Events.backlog` come first; what the hub sends later follows."""


class Text(NamedTuple):
    """Metrics, the one answer that is no JSON."""

    text: str


class Snapshot(NamedTuple):
    """What the service said last of itself."""

    status: dict[str, Any]
    assignment: dict[str, Any] | None
    connected: bool
    retry_after_s: int = RETRY_AFTER_S


class Routes:
    """Answers requests out of `snapshot`, which whoever owns this replaces, and `events`."""

    def __init__(self, events: Events, allow_token: bool, counts: Counts) -> None:
        self.snapshot = Snapshot({}, None, False)
        self._counts = counts
        self._events = events
        self._allow_token = allow_token
        self._sized: tuple[str, dict[str, str], int, int] = ("", {"": ""}, 0, 0)  # of the last message's properties
        self._tokens = Rate(TOKENS_A_MINUTE, USER_TOKENS_A_MINUTE, 60.0)

    def begin(self, request: Request, now_s: float) -> Begun:
        """What is to be done with the request's body; Refused where it is not worth reading."""
        parameters = _query(request.query)
        words = request.path.split("/")[1:]
        method = _method_of(words)
        if not method:
            raise Refused(404, "agent.usage", f"there is nothing at {request.path[:80]!r}")
        if request.method != method:
            raise Refused(405, "agent.usage", f"/{words[0]} is asked for with {method}", allow=method)
        match words:
            case ["telemetry"]:
                return self._telemetry(parameters, request)
            case ["methods", event_id]:
                return self._answer_method(event_id, parameters, request.length)
            case ["twin", "reported"]:
                return self._report(request.length)
        if request.length > SMALL_LIMIT:
            raise Refused(413, "agent.too_large", f"expected a body of at most {SMALL_LIMIT} bytes for /{words[0]}")
        match words:
            case [""]:
                return _begun(Reply(200, {"paths": PATHS}))
            case ["twin"]:
                self._expect_twin()
                return Begun(lambda _body: Later(ReadTwin(0), TELEMETRY_LIMIT_S), TWIN_REQUEST_SIZE)
            case ["status"]:
                return _begun(Reply(200, {**self.snapshot.status, "connected": self.snapshot.connected}))
            case ["assignment"]:
                if self.snapshot.assignment is None:
                    raise Refused(404, "record.absent", "this device has no hub yet")
                return _begun(Reply(200, self.snapshot.assignment))
            case ["metrics"]:
                from dps_agent.host.metrics import open_metrics

                return _begun(Text(open_metrics(self.snapshot.status, self._counts, now_s)))
            case ["events"]:
                return _begun(Stream())
            case ["events", event_id, "done"]:
                return Begun(partial(self._end_message, event_id))
            case ["token"]:
                if not self._allow_token:
                    raise Refused(403, "agent.denied", "tokens are not given here: [api] allow_token is false")
                life_s = _number(parameters, "life", TOKEN_LIFE_LIMIT_S, TOKEN_LIFE_LIMIT_S)
                if wait_s := self._tokens.wait_s(request.user, now_s):
                    text = f"expected at most {USER_TOKENS_A_MINUTE} tokens a minute, {TOKENS_A_MINUTE} of all users"
                    raise Refused(429, "agent.busy", text, int(wait_s) + 1)
                return _begun(Later(Command(0, "token", False, life_s), COMMAND_LIMIT_S))
            case ["command", name] if name in _COMMANDS:
                if not is_trusted(request.user):
                    raise Refused(403, "agent.denied", f"/{'/'.join(words)} is for root and the service's own user")
                life_s = _number(parameters, "life", TOKEN_LIFE_LIMIT_S, 365 * 86400)
                limit_s = REGISTRATION_LIMIT_S if name == "provision" else COMMAND_LIMIT_S
                return _begun(Later(Command(0, name, parameters.get("force") == "true", life_s), limit_s))
        raise Refused(404, "agent.usage", f"there is nothing at {request.path[:80]!r}")  # no such command

    def _expect_connection(self) -> None:
        if not self.snapshot.connected:
            text = "it was not sent: the device is not connected to its hub"
            raise Refused(503, "agent.not_connected", text, self.snapshot.retry_after_s)

    def _expect_twin(self) -> None:
        self._expect_connection()
        if TWIN in self.snapshot.status.get("hubLacks", ()):
            raise Refused(*_NO_TWIN)

    def _report(self, length: int) -> Begun:
        self._expect_twin()
        if length > PATCH_LIMIT:
            raise Refused(413, "agent.too_large", f"expected a patch of at most {PATCH_LIMIT} bytes; came {length}")
        return Begun(lambda body: Later(Report(0, _patch_of(body)), TELEMETRY_LIMIT_S), TWIN_REQUEST_SIZE)

    def _telemetry(self, properties: dict[str, str], request: Request) -> Begun:
        snapshot, length = self.snapshot, request.length
        if "" in properties:
            raise Refused(400, "agent.usage", "expected properties as name=value pairs in the query")
        qos = _QOS.get(properties.pop("$qos", "1"))
        if qos is None:
            raise Refused(400, "agent.usage", "$qos: expected 0 or 1")
        self._expect_connection()
        device_id = snapshot.assignment["deviceId"] if snapshot.assignment is not None else ""
        if (device_id, properties) != self._sized[:2]:  # as a rule the next message has the same
            try:
                topic_size = len(telemetry_topic(device_id, properties))
                room = TELEMETRY_LIMIT - telemetry_size(properties, 0)
            except ValueError:
                raise Refused(400, "agent.usage", "expected properties in UTF-8") from None
            self._sized = device_id, dict(properties), topic_size, room  # each message has its own
        _, _, topic_size, room = self._sized
        if topic_size > TOPIC_LIMIT:
            raise Refused(413, "agent.too_large", f"expected properties that make a topic of {TOPIC_LIMIT} bytes")
        event = SendTelemetry(0, properties, b"", request.user, qos)
        if request.kind == NDJSON:
            return Begun(lambda body: _messages_in(Messages(event, body), room), topic_size)
        if length > room:
            raise Refused(
                413, "agent.too_large", f"expected at most {room} bytes beside these properties; came {length}"
            )
        return Begun(lambda body: Later(event._replace(payload=body), TELEMETRY_LIMIT_S), topic_size)

    def _end_message(self, event_id: str, _body: bytes) -> Reply:
        message_id = self._events.message_of(event_id)
        if not message_id:
            raise Refused(404, "agent.unknown_event", f"no message {event_id[:60]!r} is held now")
        done = MessageDone(message_id)
        return Reply(200, {"done": event_id}, done, partial(self._events.end_message, message_id))

    def _answer_method(self, event_id: str, parameters: dict[str, str], length: int) -> Begun:
        status = _number(parameters, "status", 200, 999)
        if length > ANSWER_LIMIT:
            raise Refused(413, "agent.too_large", f"expected an answer of at most {ANSWER_LIMIT} bytes")
        self._waiting_call(event_id)

        def finish(body: bytes) -> Reply:
            if body and not is_json(body):
                raise Refused(400, "agent.usage", "expected the method's answer as JSON")
            call_id = self._waiting_call(event_id)
            answer = AnswerMethod(call_id, status, body)
            return Reply(200, {"answered": event_id}, answer, partial(self._events.end_call, call_id))

        return Begun(finish)

    def _waiting_call(self, event_id: str) -> int:
        call_id = self._events.call_of(event_id)
        if not call_id:
            raise Refused(404, "agent.unknown_event", f"no call {event_id[:60]!r} waits for an answer now")
        return call_id


def _begun(outcome: Reply | Later | Stream | Text) -> Begun:
    """For a request whose body says nothing."""
    return Begun(lambda _body: outcome)


def _messages_in(messages: Messages, room: int) -> Messages | Reply:
    longest = max(map(len, messages.payloads()), default=0)
    if longest > room:
        raise Refused(413, "agent.too_large", f"expected at most {room} bytes a line; came {longest}")
    return messages if longest else Reply(200, {"accepted": 0, "of": 0})


def outcome_of_lines(accepted: int, of: int, failure: Reply) -> Reply:
    """What is answered to whoever has sent many: how many the hub has, and where it has not all, why."""
    counted = {"accepted": accepted, "of": of}
    if accepted == of:
        return Reply(200, counted)
    return Reply(200 if accepted else failure.status, {**counted, **failure.document})


def outcome_of(done: TelemetryDone | TwinDone) -> Reply:
    """What is answered to whoever has asked for this."""
    if isinstance(done, TwinDone):
        return _outcome_of_twin(done)
    if done.accepted:
        return ACCEPTED
    if not done.sent:
        return UNSENT
    return UNKNOWN


def _outcome_of_twin(done: TwinDone) -> Reply:
    match done.status:
        case 204:
            return Reply(200, {"version": done.version})
        case 200:
            twin = _object_in(done.payload)
            if twin is None:
                return Reply(503, error_document("agent.not_sent", "the hub's answer was no twin", RETRY_AFTER_S))
            return Reply(200, twin)
        case 429:
            wait_s = max(int(done.wait_s) + 1, 1)
            text = f"the hub does not have it: it has too much to do for its twins, and may be asked in {wait_s} s"
            return Reply(429, error_document("agent.busy", text, wait_s))
        case status if status == NOT_SENT:
            return UNSENT
        case status if status == LACKING:
            return Reply(_NO_TWIN[0], error_document(*_NO_TWIN[1:]))
        case status if 400 <= status < 500:
            said = (_object_in(done.payload) or {}).get("message")
            words = said[:200] if isinstance(said, str) and said.isprintable() else f"status {status}"
            return Reply(413 if status == 413 else 400, error_document("hub.refused_patch", f"the hub says: {words}"))
    return UNKNOWN


def _patch_of(body: bytes) -> bytes:
    """A patch of reported properties that a hub will take, in the form in which it was looked at; Refused."""
    patch = _object_in(body)
    if patch is None:
        raise Refused(400, "agent.properties", "expected a JSON object")
    status, flaw = flaw_of(patch, REPORTED_NAME)
    if status:
        raise Refused(status, "agent.properties", flaw)
    return to_json(patch).encode()


def _object_in(content: bytes | None) -> dict[str, Any] | None:
    try:
        value = from_json(content or b"")
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def error_document(code: str, message: str, retry_after_s: int | None = None) -> dict[str, Any]:
    """The body of an answer that is an error."""
    fields = error_fields(code, message, retry_after_s)
    return {"error": {**fields, "remedy": _USAGE} if code == "agent.usage" else fields}


ACCEPTED = Reply(200, {"accepted": True})
UNSENT = Reply(503, error_document("agent.not_sent", "it was not sent: the hub does not have it", RETRY_AFTER_S))
UNKNOWN = Reply(
    503,
    error_document("agent.unacknowledged", "the hub did not acknowledge it: it may or may not have it", RETRY_AFTER_S),
)
OUT_OF_TIME = Reply(
    504, error_document("agent.out_of_time", "no answer yet: whether the rest will be done is not known")
)
_NO_TWIN = (501, "hub.no_twin", "this hub has no twin")


def _method_of(words: list[str]) -> str:
    """With which method a path is asked for; empty where there is none such."""
    if method := _METHODS.get(tuple(words), ""):  # it names nothing: looked up, for telemetry comes that way
        return method
    for path, method in _METHODS.items():
        if len(path) == len(words) and all(each in ("*", word) for each, word in zip(path, words, strict=True)):
            return method
    return ""


def _query(text: str) -> dict[str, str]:
    parameters: dict[str, str] = {}
    for pair in text.split("&") if text else ():
        name, _, value = pair.partition("=")
        parameters[percent_decode(name)] = percent_decode(value)
    return parameters


def _number(parameters: dict[str, str], name: str, default: int, highest: int) -> int:
    text = parameters.get(name, str(default))
    number = whole_number(text, 1, highest)
    if number is None:
        raise Refused(400, "agent.usage", f"{name}: expected a whole number from 1 to {highest}; came {text[:20]!r}")
    return number
