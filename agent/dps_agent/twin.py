"""The twin of one identity, as its session sees it: asked for whole, reported to, and told of by patches.

A `Twin` makes one request at a time, whoever wants it:

1. Our own: the twin is asked for whole (`_known`), then reported to (`_reported`). A patch that was missed begins that
   anew. On a new connection it comes first, for what the hub answers shows that it has a twin.
2. What programs ask for (`_asked`), in the order in which it came: each patch to the reported properties is a request
   of its own, whoever sent it, and answered with the hub's version; one answer brings the twin to all who want it.

What a program asked for outlives a connection and goes first on the next one, before what came later: so what was
answered is at the hub, and no patch is ever applied after one that came behind it. Nobody waits for what was
`Withdrawn`: it is not sent any more. A hub that ends the connection each time is sent it ENDS_LIMIT times.

The session says when (`due_s`, `ask`), what came (`answered`, `take_desired`, `take`) and that a connection is over
(`forget_connection`); it decides whether the hub has a twin at all. Topics: IoT Hub developer guide, "Communicate with
an IoT hub using MQTT".
"""

from dps_agent.backoff import exponential_s
from dps_agent.effects import Uptime
from dps_agent.fleet import fleet_of
from dps_agent.hub_effects import Desired, Publish, Report, Tell, TwinDone
from dps_hal.platform import from_json, to_json

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from typing import Any

    from dps_agent.effects import Effect
    from dps_agent.fleet import Fleet
    from dps_agent.hub_effects import ReadTwin

REPORTED_NAME = "dpsAgent"  # what the agent reports of itself stands under this name in the twin
NEVER_S = 1e18
TWIN_LIMIT_S = 60  # for the hub's answer to a request
TWIN_AGAIN_S = 300  # between our own requests, at least, once the hub left two unanswered or a program took no answer
TWIN_AGAIN_LIMIT_S = 7200  # what the hub refused is asked for ever more rarely, also over connections
ASKED_AGAIN_S = 60  # the same for what programs ask for, at first
ASKED_LIMIT = 32  # requests of programs that wait
ENDS_LIMIT = 3  # of connections in a row, while one patch was under way: with so many it is given up
DESIRED_LIMIT = 131072  # bytes of desired properties and the patches to them; a hub keeps 32 KiB

# What a `TwinDone` says beside the hub's own statuses.
NOT_SENT = 0
LACKING = 501  # the hub has no twin
UNANSWERED = 504  # it was sent, and nobody knows


class _Asked:
    """One request of programs: a patch to the reported properties, or None for the twin."""

    def __init__(self, request_id: int, patch: "bytes | None") -> None:
        self.request_ids = [request_id]
        self.patch = patch
        self.ends = 0  # connections that ended while it was under way


class Twin:
    """The twin over the connections of one identity. `about` is reported of the agent itself.

    The desired properties for the agent itself may say how large the fleet is, beside the `fleet` of the settings.
    """

    def __init__(self, about: "dict[str, Any]", fleet: "Fleet") -> None:
        # Takes the size of the fleet as the hub tells it; None: it was refused.
        self.keep_fleet: Callable[[Fleet | None], Generator[Effect, Any, None]] | None = None
        self._about = about
        self._changed = False  # `about` did, since it was reported
        self._fleet = fleet
        self._serial = 0  # of requests
        self._asked: list[_Asked] = []
        self._desired_version = 0  # the version of the desired properties that programs were told last
        self._desired_size = 0  # bytes of the desired properties when told whole, and of the patches told since
        self._refusals = 0  # requests in a row that the hub refused
        self._not_before_s = 0.0  # until when the last refusal makes us wait, also over connections
        self._lacks = False  # the hub has none, or is not asked for it on this connection
        self._request = ""  # the one that waits for an answer
        self._under_way: _Asked | None = None  # it is this program's, or our own
        self.forget_connection()

    def forget_connection(self) -> None:
        """Begins anew: what was known of an earlier connection counts no more."""
        if self._under_way:
            self._under_way.ends += 1
        self._under_way = None
        self._granted = False  # the hub granted its topics: before that nothing is asked
        self._answers = False  # the hub has answered a request
        self._request = ""
        self._ends_s = NEVER_S  # when the request has had its time
        self._unanswered = 0  # our own requests that had
        self._own_at_s = NEVER_S  # when to ask for ourselves
        self._asked_whole = False  # our own request asks for the twin, else it reports
        self._older = 0  # how many twins in a row were older than the newest patch
        self._newest_version = 0  # the newest version of the desired properties that a patch has named
        self._known = False
        self._reported = False

    def report(self, name: str, value: "Any") -> None:
        """What the agent reports of itself has changed; None: it is to go from the twin."""
        self._about[name] = value
        self._changed = True
        self._reported = False

    def grant(self, now_s: float) -> None:
        """The hub granted the topics; whether it has a twin its answer says."""
        self._granted = True
        self._lacks = False
        self._own_at_s = max(now_s, self._not_before_s)

    def due_s(self) -> float:
        """When `ask` has something to do."""
        if not self._granted:
            return NEVER_S
        if self._request:
            return self._ends_s
        due_s = NEVER_S if self._known and self._reported else self._own_at_s
        return min(due_s, self._not_before_s) if self._asked and self._answers else due_s

    def ask(self, now_s: float) -> "Generator[Effect, Any, bool]":
        """Makes the request that is due, or ends one that had its time; whether it was one of our own that was made."""
        if self._request:
            self._request = ""
            if self._under_way:
                yield from self._end(self._under_way, UNANSWERED, 0, None)
                return False
            self._unanswered += 1
            self._own_at_s = now_s if self._unanswered == 1 else now_s + TWIN_AGAIN_S - TWIN_LIMIT_S
        own = not (self._known and self._reported) and now_s >= self._own_at_s
        if not own and not (self._asked and self._answers):
            return False
        self._under_way = None if own else self._asked[0]
        self._asked_whole = not self._known
        patch = to_json({REPORTED_NAME: self._about}).encode() if own else self._asked[0].patch
        if patch is None or (own and self._asked_whole):
            topic, patch = "$iothub/twin/GET/", b""
        else:
            self._changed = self._changed and not own
            topic = "$iothub/twin/PATCH/properties/reported/"
        self._serial += 1
        self._request = str(self._serial)
        self._ends_s = now_s + TWIN_LIMIT_S
        _sent: int | None = yield Publish(f"{topic}?$rid={self._request}", patch, 0)
        return own

    def answered(self, rest: str, payload: "bytes | None") -> "Generator[Effect, Any, bool]":
        """What `$iothub/twin/res/` brings: `rest` is `{status}/?$rid={rid}[&$version={version}]`.

        Returns whether it answers the request under way; else it is nothing. Then:
        1. It answers a program: that is told. 2. It answers our report: `_reported` says whether the hub took it. 3. It
        brings the twin: `_known` says whether that could be used. And when to go on: 4. The hub refused: ever later,
        also over connections. 5. All is well, or a patch has overtaken the twin for the first time: at once. 6. Else:
        after TWIN_AGAIN_S.
        """
        status, _, query = rest.partition("/")
        if query_value(query, "$rid") != self._request or not self._request:
            return False
        self._request = ""
        self._answers = True
        asked, self._under_way = self._under_way, None
        served = status in ("200", "204")
        if asked:
            yield from self._answer(asked, status, query, payload)
            return True
        older_before = self._older
        done = served
        if not self._asked_whole:
            self._reported = done and not self._changed
        elif done:
            done = yield from self._take_whole(payload)
        if self._asked_whole:
            self._known = done
        now_s: float = yield Uptime()
        at_once = done or (older_before, self._older) == (0, 1)
        self._own_at_s = now_s if at_once else now_s + TWIN_AGAIN_S
        if served:
            self._refusals = 0
        else:
            yield from self._back_off(2 * TWIN_AGAIN_S)
            self._own_at_s = self._not_before_s
        return True

    def take(self, event: "Report | ReadTwin") -> "Generator[Effect, Any, None]":
        """What a program asks for. It waits where there is room, and where the hub has not just refused others."""
        now_s: float = yield Uptime()
        patch = event.patch if isinstance(event, Report) else None
        asked = _Asked(event.request_id, patch)
        if self._lacks:
            yield from self._tell(asked, LACKING, 0, None)
            return
        if now_s < self._not_before_s:
            yield from self._tell(asked, 429, 0, None, self._not_before_s - now_s)
            return
        waiting = 0
        for each in self._asked:
            waiting += len(each.request_ids)
        if waiting >= ASKED_LIMIT:
            yield from self._tell(asked, NOT_SENT, 0, None)
            return
        if patch is None:
            for each in self._asked:
                if each.patch is None:
                    each.request_ids.append(event.request_id)
                    return
        self._asked.append(asked)

    def withdraw(self, request_id: int) -> None:
        """Nobody waits for this any more: it is not sent, or not again."""
        for asked in self._asked:
            if request_id in asked.request_ids:
                asked.request_ids.remove(request_id)
        self._asked = [asked for asked in self._asked if asked.request_ids or asked is self._under_way]

    def open(self, lacks: bool) -> "Generator[Effect, Any, None]":
        """A new connection, or what its hub has said: what becomes of what programs asked for before."""
        self._lacks = lacks
        for asked in list(self._asked):
            if lacks:
                yield from self._end(asked, UNANSWERED if asked.ends else LACKING, 0, None)
            elif asked.ends >= ENDS_LIMIT or not asked.request_ids:
                yield from self._end(asked, UNANSWERED, 0, None)

    def abandon(self) -> "Generator[Effect, Any, None]":
        """Tells the programs that this identity is left."""
        for asked in list(self._asked):
            sent = asked.ends or asked is self._under_way
            yield from self._end(asked, UNANSWERED if sent else NOT_SENT, 0, None)

    def _answer(
        self, asked: _Asked, status: str, query: str, payload: "bytes | None"
    ) -> "Generator[Effect, Any, None]":
        """The hub's answer to a program; one that says "not now" is everybody's, one to a flawed patch is its own."""
        code = _number(status)
        if code == 429 or code >= 500 or code < 200:
            yield from self._back_off(ASKED_AGAIN_S)
            now_s: float = yield Uptime()
            for each in list(self._asked):
                yield from self._end(each, 429, 0, None, self._not_before_s - now_s)
            return
        self._refusals = 0
        if code == 200 and payload is None:
            code = 413  # more than this device has room for
        yield from self._end(asked, code, _number(query_value(query, "$version")), payload)

    def _end(
        self, asked: _Asked, status: int, version: int, payload: "bytes | None", wait_s: float = 0.0
    ) -> "Generator[Effect, Any, None]":
        self._asked.remove(asked)
        if asked is self._under_way:
            self._under_way = None
        yield from self._tell(asked, status, version, payload, wait_s)

    def _tell(
        self, asked: _Asked, status: int, version: int, payload: "bytes | None", wait_s: float = 0.0
    ) -> "Generator[Effect, Any, None]":
        for request_id in asked.request_ids:
            _taken: bool = yield Tell(TwinDone(request_id, status, version, payload, wait_s))

    def _back_off(self, first_s: int) -> "Generator[Effect, Any, None]":
        self._refusals += 1
        delay_s: float = yield from exponential_s(self._refusals, first_s, TWIN_AGAIN_LIMIT_S)
        now_s: float = yield Uptime()
        self._not_before_s = now_s + delay_s

    # The desired properties.

    def _take_whole(self, payload: "bytes | None") -> "Generator[Effect, Any, bool]":
        """Whether `payload` is a twin, no older one than the patches of this connection, and was taken.

        1. It is too large for this device: the program is told, and it is not asked for again before the next patch.
        2. It is no twin: False. 3. It is older than a patch that came meanwhile: False. 4. The programs know this
        version: True. 5. It is news: whether it was taken.
        """
        try:
            if payload is None:
                raise MemoryError
            twin = from_json(payload)
            desired, reported = twin["desired"], twin["reported"]
            version = desired["$version"]
            told = fleet_of(desired.get(REPORTED_NAME), self._fleet)
            self._about["fleetRefused"] = told is None
            about = {name: self._about[name] for name in self._about if self._about[name] is not None}
            self._reported = reported.get(REPORTED_NAME) == about
            text = to_json(desired).encode()
            if len(text) > DESIRED_LIMIT:
                raise MemoryError
        except MemoryError:
            heard: bool = yield Tell(Desired(self._newest_version, None, True))
            return heard
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
            return False
        if not isinstance(version, int):
            return False
        if version < self._newest_version:  # a patch came meanwhile: once more, at once
            self._older += 1
            return False
        self._older = 0
        if self.keep_fleet:
            yield from self.keep_fleet(told)
        if version != self._desired_version:
            taken: bool = yield Tell(Desired(version, text, True))
            if not taken:
                return False
            self._desired_version = version
        self._desired_size = len(text)
        return True

    def take_desired(self, topic: str, payload: "bytes | None") -> "Generator[Effect, Any, None]":
        """A patch to the desired properties.

        1. It is the next one and a program takes it: done. 2. It is the next one and no program takes it: all
        properties are asked for after TWIN_AGAIN_S. 3. One before it was missed, it is too large, or it speaks of the
        agent itself: all properties are asked for at once. 4. Its version is known: nothing.
        """
        version = _number(query_value(topic, "$version"))
        self._newest_version = max(self._newest_version, version)
        now_s: float = yield Uptime()
        again_s = now_s
        size = self._desired_size + len(payload or b"")  # what they may have come to; the whole says how much it is
        ours = payload is not None and REPORTED_NAME.encode() in payload  # the whole says what they have come to
        if payload is not None and not ours and version == self._desired_version + 1 and size <= DESIRED_LIMIT:
            taken: bool = yield Tell(Desired(version, payload, False))
            if taken:
                self._desired_version = version
                self._desired_size = size
                return
            again_s += TWIN_AGAIN_S  # the program took nothing: it has its hands full
        if version != self._desired_version:  # one was missed: ask for all of them
            self._known = False
            if not self._request or self._under_way:
                self._own_at_s = again_s


def query_value(text: str, name: str) -> str:
    """The value of `name` in what follows the "?" of a topic, as it stands there; "" if there is none."""
    for pair in text.partition("?")[2].split("&"):
        key, _, value = pair.partition("=")
        if key == name:
            return value
    return ""


def _number(text: str) -> int:
    """The whole number that a text is; 0 for another one."""
    try:
        return int(text)
    except ValueError:
        return 0
