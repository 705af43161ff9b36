"""What programs on this device may ask for: a request and the time in, a value out.

`Routes.begin` looks at a request before its body is read: nothing is read for an id, a route or a share that is none.
What it returns takes the body and gives back one of these:

1. `Reply`: an answer, perhaps with an event that the hub's session is to have first.
2. `Later`: the answer comes from the hub or the service, for which `asked` is to be handed on.
3. `Stream`: the lines of GET /events, for as long as the connection stands.

What is wrong with a request is raised as `Refused`.

    GET  /status                   where the device stands
    GET  /assignment               hub and device id
    POST /telemetry?name=value     the body goes to the hub as it is; 200 once the hub has acknowledged it
    GET  /events                   what the hub sends, one JSON document a line, for as long as the connection stands
    POST /events/{id}/done         the message need not be delivered again
    POST /methods/{id}?status=200  the answer to a direct method, JSON
    POST /token?life=900           a token for this device's hub; only with [api] allow_token
    POST /command/...              provision, reset, token; status: whether DPS may be asked; for root and the own user
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from dps_agent.host.error_document import error_fields
from dps_agent.host.local.events import is_json
from dps_agent.host.local.shares import Rate, is_trusted
from dps_agent.hub_effects import AnswerMethod, MessageDone, SendTelemetry, TelemetryDone
from dps_agent.sas import percent_decode
from dps_agent.session import TELEMETRY_LIMIT, telemetry_topic
from dps_text import whole_number

if TYPE_CHECKING:
    from collections.abc import Callable

    from dps_agent.host.local.events import Events

ANSWER_LIMIT = 128 * 1024  # bytes; IoT Hub developer guide: the payload of a direct method
TELEMETRY_LIMIT_S = 30.0
COMMAND_LIMIT_S = 60.0
REGISTRATION_LIMIT_S = 1200.0  # a registration's largest budget that makes sense, and what its steps may overrun
TOKEN_LIFE_LIMIT_S = 900
TOKENS_A_MINUTE = 16  # for all users who are not trusted: the TPM makes each, and has other work
USER_TOKENS_A_MINUTE = 4
SMALL_LIMIT = 4096  # bytes of a body that nothing is looked for in
RETRY_AFTER_S = 5  # what a refusal names where nothing better is known
_COMMANDS = ("provision", "reset", "token", "status")


class Refused(Exception):
    """A request that is answered at once with an error."""

    def __init__(self, status: int, code: str, message: str, retry_after_s: int | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.document = error_document(code, message, retry_after_s)


class Request(NamedTuple):
    """One request of a user's without its body, which has `length` bytes."""

    method: str
    path: str
    query: str
    length: int
    user: int


class Begun(NamedTuple):
    """A request that may have its body; with a topic it takes one of the places for telemetry under way."""

    finish: Callable[[bytes], Reply | Later | Stream]
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

    asked: SendTelemetry | Command
    limit_s: float


class Stream(NamedTuple):
    """The chunks of `Events.backlog` come first; what the hub sends later follows."""


class Snapshot(NamedTuple):
    """What the service said last of itself."""

    status: dict[str, Any]
    assignment: dict[str, Any] | None
    connected: bool
    retry_after_s: int = RETRY_AFTER_S


class Routes:
    """Answers requests out of `snapshot`, which whoever owns this replaces, and `events`."""

    def __init__(self, events: Events, allow_token: bool) -> None:
        self.snapshot = Snapshot({}, None, False)
        self._events = events
        self._allow_token = allow_token
        self._tokens = Rate(TOKENS_A_MINUTE, USER_TOKENS_A_MINUTE, 60.0)

    def begin(self, request: Request, now_s: float) -> Begun:
        """What is to be done with the request's body; Refused where it is not worth reading."""
        parameters = _query(request.query)
        words = request.path.split("/")[1:]
        match words:
            case ["status" | "assignment" | "events"] if request.method != "GET":
                raise Refused(405, "agent.usage", f"/{words[0]} is asked for with GET")
            case ["telemetry" | "token" | "events" | "methods" | "command", *rest] if request.method != "POST" and (
                rest or words[0] != "events"
            ):
                raise Refused(405, "agent.usage", f"/{words[0]} is asked for with POST")
            case ["telemetry"]:
                return self._telemetry(parameters, request.length, request.user)
            case ["methods", event_id]:
                return self._answer_method(event_id, parameters, request.length)
        if request.length > SMALL_LIMIT:
            raise Refused(413, "agent.too_large", f"expected a body of at most {SMALL_LIMIT} bytes for /{words[0]}")
        match words:
            case ["status"]:
                return _begun(Reply(200, {**self.snapshot.status, "connected": self.snapshot.connected}))
            case ["assignment"]:
                if self.snapshot.assignment is None:
                    raise Refused(404, "record.absent", "this device has no hub yet")
                return _begun(Reply(200, self.snapshot.assignment))
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
        raise Refused(404, "agent.usage", f"there is nothing at {request.path[:80]!r}")

    def _telemetry(self, properties: dict[str, str], length: int, user: int) -> Begun:
        snapshot = self.snapshot
        if "" in properties:
            raise Refused(400, "agent.usage", "expected properties as name=value pairs in the query")
        if not snapshot.connected:
            text = "it was not sent: the device is not connected to its hub"
            raise Refused(503, "agent.not_connected", text, snapshot.retry_after_s)
        device_id = snapshot.assignment["deviceId"] if snapshot.assignment is not None else ""
        try:
            topic_size = len(telemetry_topic(device_id, properties))
        except ValueError:
            raise Refused(400, "agent.usage", "expected properties in UTF-8") from None
        if length > (room := TELEMETRY_LIMIT - topic_size):
            text = f"expected at most {room} bytes beside the device id and these properties; came {length}"
            raise Refused(413, "agent.too_large", text)
        return Begun(lambda body: Later(SendTelemetry(0, properties, body, user), TELEMETRY_LIMIT_S), topic_size)

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


def _begun(outcome: Reply | Later | Stream) -> Begun:
    """For a request whose body says nothing."""
    return Begun(lambda _body: outcome)


def outcome_of(telemetry: TelemetryDone) -> Reply:
    """What is answered to whoever has sent the telemetry."""
    if telemetry.accepted:
        return Reply(200, {"accepted": True})
    if not telemetry.sent:
        return NOT_SENT
    text = "the hub did not acknowledge it: it may or may not have it"
    return Reply(503, error_document("agent.not_connected", text, RETRY_AFTER_S))


def error_document(code: str, message: str, retry_after_s: int | None = None) -> dict[str, Any]:
    """The body of an answer that is an error."""
    return {"error": error_fields(code, message, retry_after_s)}


NOT_SENT = Reply(503, error_document("agent.not_sent", "it was not sent: the hub does not have it", RETRY_AFTER_S))


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
