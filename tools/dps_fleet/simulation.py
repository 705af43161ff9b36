"""A fleet in virtual time: what each device's logic asks for is answered by models of DPS and of its hubs.

One loop over a heap of events; one event for each request, wait or connection. Nothing of the core is changed: a device
is its `Lifecycle` generator, or another generator of the same effects. A device that is done lives on until nothing of
its coming back is left to be written; then it may be forgotten (`retires`), for a million of them want memory. Runs on
MicroPython too, where a few hundred fit.
"""

import array
import heapq
from math import log

from dps_agent import effects, hub_effects
from dps_agent.lifecycle import STEADY_S, Lifecycle
from dps_emulator.quotas import Gate, Quota
from dps_fleet import wire
from dps_hal.contracts import IDENTITY, StoredRecord, Utc

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from typing import Any, TypeAlias

    from dps_agent.effects import Reply
    from dps_agent.settings import Settings

    Make: TypeAlias = Callable[["Device"], Generator[Any, Any, Any]]

PUT, PUT_TOKEN, LOOKUP, OPERATION = range(4)
KINDS = ("PUT", "PUT with token", "lookup", "operation")
LATENCY_S = 0.08  # a way to the service and back
IDLE_CLOSE_S = 60.0  # the Linux runner closes its connection to DPS before longer waits
NAME_LOOKUP_S = 0.05
SETTLES_S = STEADY_S + 60.0  # after it is done: its connection is steady, and that is stored
REQUEST_LIMIT_S = 60.0  # then a device waits for an answer no longer
UNANSWERED = (effects.NoReply("timeout: no answer", True), REQUEST_LIMIT_S)
POLL_LIMIT = (5, 10.0)  # requests in so many seconds; DPS's limit of a device


class Series:
    """Counts by the second."""

    def __init__(self) -> None:
        self.counts = array.array("I")
        self.total = 0

    def add(self, now_s: float) -> None:
        counts = self.counts
        second = int(now_s)
        while len(counts) <= second:
            counts.append(0)
        counts[second] += 1
        self.total += 1

    def within(self, from_s: float, to_s: float) -> int:
        return sum(self.counts[int(from_s) : int(to_s)])

    def peak(self, from_s: float = 0.0) -> int:
        """The most in one second."""
        return max(self.counts[int(from_s) :], default=0)

    def sums(self, width_s: int, end_s: float) -> "list[int]":
        """The counts of each `width_s` seconds up to `end_s`."""
        return [self.within(at, at + width_s) for at in range(0, int(end_s) + 1, width_s)]


class Dps:
    """A DPS with a quota.

    `counted` are the kinds of requests that the quota counts. `retry_after_s`: what a 429 carries; None for nothing, -1
    for the seconds to the next minute. `gate` lets in what DPS has time for; the other requests are not answered.
    `answers_instead` is a function of time and kind that may answer in its stead, with an answer and how long that
    takes; None where it does not.
    """

    def __init__(
        self,
        fleet: "Fleet",
        quota: Quota,
        counted: "tuple[int, ...]" = (PUT, PUT_TOKEN),
        retry_after_s: "int | None" = None,
        assigns_after_s: float = 2.0,
    ) -> None:
        self.fleet = fleet
        self.quota = quota
        self.counted = counted
        self.retry_after_s = retry_after_s
        self.assigns_after_s = assigns_after_s
        self.gate: Gate | None = None
        self.hub = wire.FIRST_HUB
        self.answers_instead: Callable[[float, int], tuple[Any, float] | None] | None = None
        self.requests = Series()
        self.refused = Series()
        self.made = [0] * 4
        self.turned_away = [0] * 4
        self.unanswered = 0
        self.open = self.most_open = 0  # connections
        self.polls_too_fast = 0
        self._throttled: dict[int | None, Reply] = {}

    def request(self, device: "Device", http: effects.Http) -> None:
        """Answers through the event loop."""
        now_s = self.fleet.now_s
        kind = LOOKUP if http.method == "POST" else OPERATION if http.method == "GET" else PUT
        if kind == PUT and http.authorization is not None:
            kind = PUT_TOKEN
        device.requests += 1
        self.made[kind] += 1
        self.requests.add(now_s)
        delay_s = LATENCY_S
        if not device.is_open:
            delay_s = 3 * LATENCY_S  # TCP and TLS first
            device.is_open = True
            self.open += 1
            self.most_open = max(self.most_open, self.open)
        instead = self.answers_instead(now_s, kind) if self.answers_instead else None
        if instead is None:
            wait_s = self.gate.wait_s(now_s) if self.gate else 0.0
            if wait_s is not None:
                self.fleet.at(now_s + wait_s + delay_s, device, self._answer(device, kind, now_s + wait_s))
                return
            instead = UNANSWERED
        answer, delay_s = instead
        if isinstance(answer, effects.NoReply):
            self.unanswered += 1
            self.close(device)
        self.fleet.at(now_s + delay_s, device, answer)

    def close(self, device: "Device") -> None:
        if device.is_open:
            device.is_open = False
            self.open -= 1

    def refusal(self, device: "Device", kind: int, now_s: float) -> "Reply | None":
        """The 429 where the quota has no room for this request."""
        if kind not in self.counted or self.quota.take(now_s):
            return None
        self.refused.add(now_s)
        self.turned_away[kind] += 1
        device.refused += 1
        after_s = self.retry_after_s
        if after_s == -1:
            after_s = int(self.quota.wait_s(now_s)) + 1
        if after_s not in self._throttled:
            self._throttled[after_s] = wire.error(429001, "Throttled", after_s)
        return self._throttled[after_s]

    def _answer(self, device: "Device", kind: int, now_s: float) -> "Reply":
        device.knows_time = True  # each answer has the time in it
        refusal = self.refusal(device, kind, now_s)
        if refusal is not None:
            return refusal
        if kind == PUT:
            device.challenges += 1
            return wire.CHALLENGE
        if kind == PUT_TOKEN:
            device.ready_s = now_s + self.fleet.exponential_s(self.assigns_after_s)
            return wire.ASSIGNING
        most, within_s = POLL_LIMIT
        device.polls.append(now_s)
        if len(device.polls) > most:
            self.polls_too_fast += now_s - device.polls.pop(0) < within_s
        if now_s < device.ready_s:
            return wire.ASSIGNING_LOOKUP if kind == LOOKUP else wire.ASSIGNING_OPERATION
        return self.hub.lookup if kind == LOOKUP else self.hub.operation


class Hub:
    """A hub with a throttle of new connections; `gate` None: without. `answers_instead` as that of `Dps`."""

    def __init__(
        self, fleet: "Fleet", assigned: wire.Assigned, gate: "Gate | None", twins: "Quota | None" = None
    ) -> None:
        self.fleet = fleet
        self.assigned = assigned
        self.gate = gate
        self.twins = twins
        self.answers_instead: Callable[[float], tuple[Any, float] | None] | None = None
        self.connected: dict[Device, None] = {}  # in the order in which they came
        self.connects = Series()
        self.dropped = Series()
        self.accepted = Series()
        self.twin_reads = Series()
        self.twin_refused = Series()

    def connect(self, device: "Device") -> None:
        """Answers through the event loop."""
        now_s = self.fleet.now_s
        self.connects.add(now_s)
        device.connects += 1
        instead = self.answers_instead(now_s) if self.answers_instead else None
        if instead is not None:
            self.dropped.add(now_s)
            self.fleet.at(now_s + instead[1], device, instead[0])
            return
        delay_s = 4 * LATENCY_S  # TCP, TLS, CONNECT
        if self.gate:
            wait_s = self.gate.wait_s(now_s)
            if wait_s is None:
                self.dropped.add(now_s)
                self.fleet.at(now_s + delay_s, device, effects.NoReply("closed: throttled", True))
                return
            delay_s += wait_s
        self.accepted.add(now_s)
        device.hub = self
        self.connected[device] = None
        self.fleet.at(now_s + delay_s, device, _ACCEPTED)

    def leave(self, device: "Device") -> None:
        device.hub = None
        self.connected.pop(device, None)

    def drop_all(self, reason: str = "closed: the network failed") -> None:
        """Ends all connections."""
        for device in list(self.connected):
            self.leave(device)
            device.put(hub_effects.Gone(reason))

    def publish(self, device: "Device", topic: str) -> None:
        """Answers what the agent asks of its twin."""
        now_s = self.fleet.now_s
        request = topic.rpartition("$rid=")[2]
        if topic.startswith("$iothub/twin/GET"):
            self.twin_reads.add(now_s)
            if self.twins and not self.twins.take(now_s):
                self.twin_refused.add(now_s)
                event = hub_effects.Arrived(f"$iothub/twin/res/429/?$rid={request}", b"", 0)
            else:
                device.twins += 1
                event = hub_effects.Arrived(f"$iothub/twin/res/200/?$rid={request}", wire.TWIN, 0)
        elif topic.startswith("$iothub/twin/PATCH"):
            event = hub_effects.Arrived(f"$iothub/twin/res/204/?$rid={request}&$version=2", b"", 0)
        else:
            return
        self.fleet.at(now_s + LATENCY_S, device, (event,))


_ACCEPTED = hub_effects.ConnAck(0, False)
_BOOT = object()
_RETIREMENT = object()
_CLOCK = object()  # somebody but DPS tells the time


class _Timer:
    """The end of one wait for an event."""

    __slots__ = ("number",)

    def __init__(self, number: int) -> None:
        self.number = number


class Device:
    """One device: a generator and what it waits for. `life` counts its starts, so that nothing reaches a later one."""

    __slots__ = (
        "challenges",
        "connects",
        "done_s",
        "events",
        "fleet",
        "generator",
        "hub",
        "identity",
        "identity_writes",
        "is_open",
        "knows_time",
        "life",
        "make",
        "packet_id",
        "polls",
        "progress",
        "progress_writes",
        "ready_s",
        "refused",
        "requests",
        "timer",
        "twins",
        "waits",
    )

    def __init__(self, fleet: "Fleet", make: "Make", identity: "wire.Assigned | None") -> None:
        self.fleet = fleet
        self.make = make
        self.identity = identity
        self.progress: bytes | None = None
        self.generator: Generator[Any, Any, Any] | None = None
        self.hub: Hub | None = None
        self.waits = False  # it waits for an event
        self.timer = 0  # the number of the wait that counts
        self.events: list[Any] = []  # events that came while it did not wait
        self.is_open = False  # its connection to DPS is open
        self.knows_time = True  # somebody has told it the time since it started, or it has a clock
        self.ready_s = 0.0  # when DPS has assigned it
        self.polls: list[float] = []  # the last ones
        self.requests = self.refused = self.challenges = self.connects = self.twins = 0
        self.identity_writes = self.progress_writes = 0
        self.life = self.packet_id = 0
        self.done_s: float | None = None

    def cut_power(self) -> None:
        """All is lost but what was stored."""
        self.life += 1
        if self.generator is not None:
            self.generator.close()
        self.generator = None
        if self.hub is not None:
            self.hub.leave(self)
        self.fleet.dps.close(self)
        self.waits = False
        self.events = []

    def put(self, event: "Any") -> None:
        """An event of the hub."""
        if self.waits:
            self.waits = False
            self.timer += 1
            self.resume(event)
        else:
            self.events.append(event)

    def happen(self, what: "Any") -> None:
        """What the event loop brings: a start, the end of a wait, (an event,) or an answer."""
        kind = type(what)
        if kind is _Timer:
            if self.waits and what.number == self.timer:
                self.waits = False
                self.resume(None)
        elif what is _BOOT:
            self.generator = self.make(self)
            self.knows_time = self.fleet.clock_after_s == 0
            if 0 < self.fleet.clock_after_s < self.fleet.horizon_s:
                self.fleet.at(self.fleet.now_s + self.fleet.clock_after_s, self, _CLOCK)
            self.resume(None)
        elif what is _CLOCK:
            self.knows_time = True
        elif what is _RETIREMENT:
            self.cut_power()
        elif kind is tuple:
            if self.hub is not None:
                self.put(what[0])
        elif what is _ACCEPTED and self.hub is None:
            self.resume(effects.NoReply("closed: the hub is gone", True))
        else:
            self.resume(what)

    def resume(self, answer: "Any") -> None:
        """Goes on until the next effect that takes time."""
        generator = self.generator
        if generator is None:
            return
        fleet = self.fleet
        send = generator.send
        try:
            while True:
                effect = send(answer)
                answer = _ANSWERS[type(effect)](fleet, self, effect)
                if answer is _LATER:
                    return
        except StopIteration:
            self.generator = None


_LATER = object()


def _sleep(fleet: "Fleet", device: Device, effect: effects.Sleep) -> "Any":
    if effect.delay_s > IDLE_CLOSE_S:
        fleet.dps.close(device)
    fleet.at(fleet.now_s + effect.delay_s, device, None)
    return _LATER


def _http(fleet: "Fleet", device: Device, effect: effects.Http) -> "Any":
    fleet.dps.request(device, effect)
    return _LATER


def _next_event(fleet: "Fleet", device: Device, effect: hub_effects.NextEvent) -> "Any":
    if device.events:
        return device.events.pop(0)
    wait_s = effect.until_uptime_s - fleet.now_s
    if wait_s <= 0:
        return None
    if wait_s > IDLE_CLOSE_S:
        fleet.dps.close(device)
    device.waits = True
    device.timer += 1
    fleet.at(effect.until_uptime_s, device, _Timer(device.timer))
    return _LATER


def _load(fleet: "Fleet", device: Device, effect: effects.LoadRecord) -> "Any":
    identity = device.identity
    payload = (identity.record if identity else None) if effect.record == IDENTITY else device.progress
    return None if payload is None else StoredRecord(payload, 1, False)


def _commit(fleet: "Fleet", device: Device, effect: effects.Commit) -> "Any":
    if effect.record == IDENTITY:
        device.identity_writes += 1
        device.identity = fleet.dps.hub
        fleet.registered(device)
    else:
        device.progress_writes += 1
        device.progress = effect.payload
    return None


def _connect(fleet: "Fleet", device: Device, effect: hub_effects.Connect) -> "Any":
    if device.hub is not None:
        device.hub.leave(device)
    device.events = []
    hub = fleet.hubs.get(effect.hub)
    if hub is None:
        fleet.at(fleet.now_s + NAME_LOOKUP_S, device, effects.NoReply("not_found: no such name", False))
    else:
        hub.connect(device)
    return _LATER


def _subscribe(fleet: "Fleet", device: Device, effect: hub_effects.Subscribe) -> "Any":
    if device.hub is None:
        return None
    device.packet_id += 1
    fleet.connected(device)
    granted = hub_effects.Granted(device.packet_id, (1,) * len(effect.filters))
    fleet.at(fleet.now_s + LATENCY_S, device, (granted,))
    return device.packet_id


def _publish(fleet: "Fleet", device: Device, effect: hub_effects.Publish) -> "Any":
    if device.hub is None:
        return None
    device.hub.publish(device, effect.topic)
    return 0


def _disconnect(fleet: "Fleet", device: Device, effect: hub_effects.Disconnect) -> "Any":
    if device.hub is not None:
        device.hub.leave(device)
    return None


_ANSWERS: "dict[Any, Callable[[Fleet, Device, Any], Any]]" = {
    effects.Uptime: lambda fleet, device, effect: fleet.now_s,
    effects.Random: lambda fleet, device, effect: fleet.random(),
    effects.UtcNow: lambda fleet, device, effect: Utc(wire.NOW_S + int(fleet.now_s), device.knows_time, "simulation"),
    effects.Sleep: _sleep,
    effects.Http: _http,
    effects.Sign: lambda fleet, device, effect: wire.SIGNATURE,
    effects.ReadEndorsementKey: lambda fleet, device, effect: wire.ENDORSEMENT_KEY,
    effects.ReadStorageRootKey: lambda fleet, device, effect: wire.STORAGE_ROOT_KEY,
    effects.ImportKey: lambda fleet, device, effect: wire.WRAPPED_KEY,
    effects.LoadRecord: _load,
    effects.Commit: _commit,
    effects.ForgetOlder: lambda fleet, device, effect: None,
    effects.ConfirmClock: lambda fleet, device, effect: None,
    hub_effects.NextEvent: _next_event,
    hub_effects.Connect: _connect,
    hub_effects.Subscribe: _subscribe,
    hub_effects.Publish: _publish,
    hub_effects.Disconnect: _disconnect,
    hub_effects.Tell: lambda fleet, device, effect: True,
}


class Fleet:
    """The event loop and all devices. A device is done once it is `goal`: "registered" or "connected"."""

    def __init__(self, dice: "Callable[[], float]", horizon_s: float) -> None:
        """`dice` gives random numbers from 0 to 1, without 1."""
        self.random: Callable[[], float] = dice
        self.horizon_s = horizon_s
        self.now_s: float = 0.0
        self.devices: list[Device] = []
        self.hubs: dict[str, Hub] = {}
        self.dps = Dps(self, Quota(1e12))
        self.goal = "connected"
        # Seconds after each start from which a device believes a time; before that it does once DPS has answered.
        self.clock_after_s: float = 0.0
        self.retires = False
        self.done = 0
        self.done_at = Series()
        self._heap: list[tuple[float, int, Device | None, int, Any]] = []
        self._serial = 0

    def exponential_s(self, mean_s: float) -> float:
        return -mean_s * log(1 - self.random())

    def at(self, when_s: float, device: Device, what: "Any") -> None:
        """Brings `what` to the device at its time, unless its power was cut meanwhile."""
        self._serial += 1
        heapq.heappush(self._heap, (when_s, self._serial, device, device.life, what))

    def call_at(self, when_s: float, function: "Callable[[], None]") -> None:
        self._serial += 1
        heapq.heappush(self._heap, (when_s, self._serial, None, 0, function))

    def boot(self, device: Device, when_s: float) -> None:
        self.at(when_s, device, _BOOT)

    def boot_all(self, make: "Make", number: int, identity: "wire.Assigned | None", within_s: float) -> None:
        """Makes the devices; they start at random within the next seconds."""
        for _ in range(number):
            device = Device(self, make, identity)
            self.devices.append(device)
            self.boot(device, self.now_s + self.random() * within_s)

    def registered(self, device: Device) -> None:
        if self.goal == "registered":
            self._is_done(device)

    def connected(self, device: Device) -> None:
        if self.goal == "connected":
            self._is_done(device)

    def _is_done(self, device: Device) -> None:
        if device.done_s is None:
            device.done_s = self.now_s
            self.done += 1
            self.done_at.add(self.now_s)
            if self.retires:
                self.at(self.now_s + SETTLES_S, device, _RETIREMENT)

    def forget_counts(self) -> None:
        """Counts from now on."""
        self.done = 0
        for device in self.devices:
            device.done_s = None
            device.requests = device.refused = device.challenges = device.connects = 0
            device.identity_writes = device.progress_writes = 0

    def run(
        self,
        until_s: "float | None" = None,
        until_all_are_done: bool = True,
        progress: "Callable[[int, float], None] | None" = None,
    ) -> None:
        """Runs until then, by default until all devices are done and have settled, at the latest until the horizon."""
        heap = self._heap
        until_s = self.horizon_s if until_s is None else until_s
        number = len(self.devices)
        steps = 0
        while heap and heap[0][0] <= until_s:
            self.now_s, _, device, life, what = heapq.heappop(heap)
            if device is None:
                what()
                continue
            if life != device.life:
                continue
            device.happen(what)
            if until_all_are_done and self.done >= number:
                until_all_are_done = False
                until_s = min(until_s, self.now_s + SETTLES_S)
            steps += 1
            if progress and not steps & 0x3FFF:
                progress(self.done, self.now_s)


def agent(settings: "Settings") -> "Make":
    """The real core, as `dps-agent run` lives it."""
    return lambda device: Lifecycle(settings).live(False, False, True)


def remember_answers() -> None:
    """Has the core's parsers remember what they made of the same bytes: same results in half the time."""
    from dps_agent import assignment, attestation, messages, registration, registration_by_tpm

    def remember(module: "Any", name: str, before: "Any" = None) -> None:
        function = before or getattr(module, name)
        known: dict[Any, Any] = {}

        def quick(*key: "Any") -> "Any":
            if key not in known:
                known[key] = function(*key)
            return known[key]

        setattr(module, name, quick)

    remember(registration, "decode", messages.decode)
    remember(registration_by_tpm, "from_base64")
    remember(attestation, "decode", assignment.decode)
    rooms: Any = registration
    refusal_of = rooms.refusal_of
    refusals: dict[Any, Any] = {}

    def quick_refusal_of(answer: "Reply") -> "Any":  # an error of its own each time, for it carries a traceback
        key = (answer.status, answer.body, answer.headers.get("retry-after"))
        if key not in refusals:
            error = refusal_of(answer)
            refusals[key] = (type(error), (error.code, error.message, error.retry_after_s, error.request_id))
        kind, parts = refusals[key]
        return kind(*parts)

    rooms.refusal_of = quick_refusal_of
