"""Thirty days of one device in virtual time: outages, moves, throttling, lockouts, wrong clocks, reboots at random.

Every run prints its seed where it fails; the same seed makes the same month on one runtime.
"""

from dps_agent.effects import Http, Sleep
from dps_agent.hub_effects import (
    AnswerMethod,
    CloudMessage,
    MessageDone,
    MethodCall,
    NextEvent,
    SendTelemetry,
    TelemetryDone,
)
from dps_agent.lifecycle import CONNECTED, Lifecycle
from dps_agent.session import CALL_LIMIT, IN_FLIGHT_LIMIT, MESSAGE_LIMIT
from dps_hal.errors import RetryLater
from support.cloud.fake_hub import FakeHub
from support.share import part_of
from support.world import HUB, World, error_reply, settings

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from dps_agent.hub_effects import Message

SEEDS = (1, 2, 3)
DAY_S = 86400
DAYS = 30
TELEMETRY_EVERY_S = 600
SECOND_HUB = "second.azure-devices.net"
LONGEST_WAIT_S = 2 * 3600 * 1.1 + 1  # Retry-After below, with its jitter
SETTLE_S = 4 * 3600  # without trouble at the end


class Dice:
    """A generator of random numbers that both runtimes have; Knuth's MMIX constants are too wide for a board."""

    def __init__(self, seed: int) -> None:
        self.state = seed

    def below(self, limit: int) -> int:
        """A whole number from 0 on."""
        self.state = (self.state * 1103515245 + 12345) % 2147483648
        return (self.state >> 8) % limit


class Month:
    """One device, two hubs, a DPS and everything that goes wrong between them."""

    def __init__(self, seed: int) -> None:
        self.dice = Dice(seed)
        self.world = world = World()
        world.hubs[SECOND_HUB] = FakeHub(SECOND_HUB)
        world.effect_limit = 10**9
        world.program.keeps = False
        world.program.on_message = self.heard
        self.life: Lifecycle | None = None
        self.number = 0
        self.asked: set[int] = set()  # telemetry that waits for its answer
        self.accepted = 0
        self.refused = 0
        self.troubles: dict[str, int] = {}
        self.requests_by_hour: dict[int, int] = {}
        self.connects_by_hour: dict[int, int] = {}
        self.effects_at_s = -1.0
        self.effects_now = 0
        self.end_s = world.uptime_s + DAYS * DAY_S
        self._answer = world.answer
        world.answer = self.watched  # type: ignore[method-assign]

    def watched(self, effect: "Any") -> "Any":
        """What every effect is checked for."""
        world = self.world
        if isinstance(effect, Sleep):
            world.sleeps.clear()
            assert effect.reason and 0 <= effect.delay_s <= LONGEST_WAIT_S, effect
        if isinstance(effect, NextEvent):
            assert effect.until_uptime_s - world.uptime_s < DAY_S, "a wait without an end"
            self.check_sizes()
        if isinstance(effect, Http):
            hour = int(world.uptime_s) // 3600
            self.requests_by_hour[hour] = self.requests_by_hour.get(hour, 0) + 1
            world.dps.requests.clear()
        self.effects_now = self.effects_now + 1 if world.uptime_s == self.effects_at_s else 0
        self.effects_at_s = world.uptime_s
        assert self.effects_now < 500, f"a busy loop: {effect}"
        world.random = self.dice.below(1000) / 1000
        return self._answer(effect)

    def check_sizes(self) -> None:
        """What a connected device keeps does not grow."""
        session = self.life and self.life._session
        if session:
            assert len(session._in_flight) <= IN_FLIGHT_LIMIT
            assert len(session._calls) <= CALL_LIMIT and len(session._unacknowledged) <= MESSAGE_LIMIT

    def heard(self, message: "Message") -> None:
        """A program that answers, now and then late or never."""
        if isinstance(message, TelemetryDone):
            self.asked.remove(message.request_id)
            if message.accepted:
                payload = b"%d" % message.request_id
                found = [hub for hub in self.world.hubs.values() if payload in [seen for _, seen in hub.received]]
                assert found, f"telemetry {message.request_id} was accepted and is nowhere"
                self.accepted += 1
            else:
                self.refused += 1
        if isinstance(message, CloudMessage) and self.dice.below(10):
            self.world.post(MessageDone(message.message_id))
        if isinstance(message, MethodCall) and self.dice.below(4):
            self.world.post(AnswerMethod(message.call_id, 200, b"{}"))

    def telemetry(self) -> None:
        """What is sent regularly."""
        world = self.world
        if not self.asked:  # a board has no room for a month of it
            world.program.done.clear()
            self.each_hub(lambda hub: hub.received.clear())
        self.send()
        if world.uptime_s + TELEMETRY_EVERY_S < self.end_s:
            world.at(world.uptime_s + TELEMETRY_EVERY_S, self.telemetry)

    def send(self) -> None:
        """Sends while the device is connected; elsewhere nothing is taken."""
        if self.life and self.life.state == CONNECTED:
            self.number += 1
            self.asked.add(self.number)
            self.world.post(SendTelemetry(self.number, {}, b"%d" % self.number, 0, 1))

    def trouble(self) -> None:
        """One thing that goes wrong, and when the next one will."""
        world = self.world
        name, begin, end = self.TROUBLES[self.dice.below(len(self.TROUBLES))]
        self.troubles[name] = self.troubles.get(name, 0) + 1
        lasts_s = (60, 600, 3000, 10000)[self.dice.below(4)]
        world.at(world.uptime_s + self.dice.below(3), self.send)
        self.send()
        begin(self)
        self.send()
        world.at(world.uptime_s + lasts_s, lambda: end(self))
        next_s = world.uptime_s + lasts_s + self.dice.below(8 * 3600)
        if next_s + 10000 < self.end_s - SETTLE_S:
            world.at(next_s, self.trouble)

    def each_hub(self, change: "Callable[[FakeHub], None]") -> None:
        """Does the same to both hubs."""
        for hub in self.world.hubs.values():
            change(hub)

    def absent(self, reason: str) -> None:
        def change(hub: FakeHub) -> None:
            hub.absent = reason
            hub.drop(self.world.uptime_s)

        self.each_hub(change)

    def silent(self) -> None:
        self.each_hub(lambda hub: hub.fall_silent(self.world.uptime_s))

    def drop(self) -> None:
        self.each_hub(lambda hub: hub.drop(self.world.uptime_s))

    def mute(self, mute: bool) -> None:
        self.each_hub(lambda hub: setattr(hub, "mute", mute))

    def lose(self) -> None:
        self.each_hub(lambda hub: setattr(hub, "lose", 1))

    def move(self) -> None:
        self.world.dps.hub = SECOND_HUB if self.world.dps.hub == HUB else HUB
        self.reprovision()

    def withdraw(self) -> None:
        def change(hub: FakeHub) -> None:
            hub.keys = {}
            hub.drop(self.world.uptime_s)

        self.each_hub(change)

    def deleted(self) -> None:
        """The hub of the device is deleted, DPS knows another."""
        self.world.dps.hub = SECOND_HUB if self.world.dps.hub == HUB else HUB
        self.absent("not_found: no such name")
        self.world.hubs[self.world.dps.hub].absent = ""

    def reprovision(self) -> None:
        self.each_hub(lambda hub: hub.call(self.world.uptime_s, "reprovision", "r"))

    def throttle(self) -> None:
        after = ("60", "600", "7200")[self.dice.below(3)]
        self.world.dps.script = [error_reply(429, 429001, retry_after=after)] * (1 + self.dice.below(3))
        self.reprovision()

    def lock_out(self) -> None:
        self.world.refuse["Sign"] = [RetryLater("tpm.locked_out", "locked out", 1000)] * (1 + self.dice.below(5))

    def unlock(self) -> None:
        self.world.refuse.clear()
        self.world.dps.script.clear()

    def clock(self, believable: bool, error_s: int) -> None:
        self.world.believable = believable
        self.world.utc_error_s = error_s

    def reboot(self) -> None:
        self.world.over = True

    def messages(self) -> None:
        world = self.world
        for hub in world.hubs.values():
            hub.send_c2d(world.uptime_s, {"a": "b"}, b"c2d %d" % self.dice.below(10**6))
            hub.call(world.uptime_s, "open-valve", str(self.dice.below(10**6)))
            hub.change_desired(world.uptime_s, "rate", self.dice.below(100), self.dice.below(3) > 0)

    def nothing(self) -> None:
        pass

    TROUBLES = (
        ("offline", lambda month: month.absent("dns: try again"), lambda month: month.absent("")),
        ("hub down", lambda month: month.absent("connect: refused"), lambda month: month.absent("")),
        ("silence", silent, nothing),
        ("dropped", drop, drop),
        ("no answers", lambda month: month.mute(True), lambda month: month.mute(False)),
        ("lost in between", lose, nothing),
        ("moved", move, nothing),
        ("key withdrawn", withdraw, nothing),
        ("hub deleted", deleted, lambda month: month.absent("")),
        ("DPS throttles", throttle, unlock),
        ("TPM locked out", lock_out, unlock),
        ("clock lost", lambda month: month.clock(False, 0), lambda month: month.clock(True, 0)),
        ("clock behind", lambda month: month.clock(True, -2000), lambda month: month.clock(True, 0)),
        ("clock a day behind", lambda month: month.clock(True, -DAY_S), lambda month: month.clock(True, 0)),
        ("clock ahead", lambda month: month.clock(True, DAY_S), lambda month: month.clock(True, 0)),
        ("reboot", reboot, nothing),
        ("messages", messages, messages),
    )

    def lived(self) -> None:
        """The month; a reboot forgets what no program was told yet."""
        world = self.world
        world.at(world.uptime_s + 60, self.telemetry)
        world.at(world.uptime_s + 3600, self.trouble)
        world.end_at(self.end_s)
        while world.uptime_s < self.end_s:
            self.life = Lifecycle(settings())
            world.run(self.life.live(False, False, True))
            if world.uptime_s < self.end_s:
                self.asked.clear()  # the programs saw the agent end


def test_a_month_of_trouble_loses_nothing_that_was_accepted() -> None:
    refused = 0
    for seed in part_of(SEEDS):
        month = Month(seed)
        try:
            month.lived()
            check(month)
        except AssertionError:
            print(f"seed={seed} uptime_s={month.world.uptime_s} {month.troubles}")
            raise
        refused += month.refused
    assert refused > 3 * len(part_of(SEEDS)), "no trouble ever came at the wrong moment"


def check(month: Month) -> None:
    world, life = month.world, month.life
    assert life is not None
    assert life.state == CONNECTED and life.patience.attempts == 0, (life.state, life.reason)
    assert sum(month.troubles.values()) > 100 and len(month.troubles) > 12, month.troubles
    for hub in world.hubs.values():
        assert hub.stale_acknowledgements == 0
    assert month.asked == set(), "never answered"
    assert month.accepted > 0.9 * DAYS * DAY_S / TELEMETRY_EVERY_S, month.accepted
    assert max(month.requests_by_hour.values()) <= 60, "requests to DPS in an hour"
    assert sum(month.requests_by_hour.values()) < 30 * sum(month.troubles.values())
    connections = sum([len(hub.connections) for hub in world.hubs.values()])
    assert connections < DAYS * 24 * 12, connections
