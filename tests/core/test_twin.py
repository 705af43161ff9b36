"""What programs ask of the twin: their patches one after the other, and the twin itself, over whatever happens."""

from dps_agent.hub_effects import ReadTwin, Report, Withdrawn
from dps_agent.lifecycle import Lifecycle
from dps_agent.session import SHORT_S
from dps_agent.twin import ASKED_AGAIN_S, ASKED_LIMIT, ENDS_LIMIT, LACKING, NOT_SENT, TWIN_LIMIT_S, UNANSWERED
from dps_hal.platform import from_json
from support.world import World, settings

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def provisioned() -> World:
    """A device that was registered in an earlier life."""
    world = World()
    world.run(Lifecycle(settings()).live(True, False))
    return world


def live(world: World, seconds: float) -> Lifecycle:
    """A life that ends after so many seconds, like a program that is killed."""
    life = Lifecycle(settings(), {"version": "1.0"})
    world.end_at(world.uptime_s + seconds)
    world.run(life.live(False, False, True))
    return life


def report(number: int, name: str = "count") -> Report:
    return Report(number, b'{"%s":%d}' % (name.encode(), number))


def taken(world: World, name: str = "count") -> "list[Any]":
    """The values of one property that the hub took, in order."""
    return [patch[name] for patch in world.hub.patches if name in patch]


def statuses(world: World) -> "dict[int, int]":
    return {number: world.program.twins[number].status for number in world.program.twins}


def test_each_patch_is_a_request_of_its_own_and_answered_with_the_hubs_version() -> None:
    world = provisioned()
    world.at(world.uptime_s + 20, lambda: world.post(report(1), report(2), report(3, "other")))
    live(world, 30)
    assert taken(world) == [1, 2] and taken(world, "other") == [3]
    assert statuses(world) == {1: 204, 2: 204, 3: 204}
    versions = [world.program.twins[number].version for number in (1, 2, 3)]
    assert versions == [3, 4, 5] and world.hub.reported["$version"] == 5, "the agent's own report was the first"


def told(world: World) -> "list[Any]":
    """What the hub took of the agent itself, in order."""
    return [value.get("lastError", "unsaid") for value in taken(world, "dpsAgent")]


def lived(world: World, error: "Any", seconds: float = 30) -> Lifecycle:
    life = Lifecycle(settings(), {"version": "1.0", "lastError": error})
    world.end_at(world.uptime_s + seconds)
    world.run(life.live(False, False, True))
    return life


def test_what_the_agent_reports_of_itself_is_reported_again_when_it_changes_and_else_never() -> None:
    world = provisioned()
    life = Lifecycle(settings(), {"version": "1.0", "lastError": None})
    broken = {"code": "network.dns"}

    def change() -> None:
        life.report("lastError", broken)
        world.post(report(1))  # else it would be looked at with the next event

    world.at(world.uptime_s + 20, change)
    world.end_at(world.uptime_s + 40)
    world.run(life.live(False, False, True))
    assert told(world) == [None, broken] and world.hub.reported["dpsAgent"]["lastError"] == broken
    lived(world, broken)
    assert len(told(world)) == 2, "the twin says so already"
    lived(world, None)
    assert told(world)[2:] == [None] and "lastError" not in world.hub.reported["dpsAgent"]
    lived(world, None)
    assert len(told(world)) == 3, "what has gone is not taken away again and again"


def test_what_changes_while_it_is_reported_is_reported_once_more() -> None:
    world = provisioned()
    life = Lifecycle(settings(), {"version": "1.0", "lastError": None})
    publish = world.hub.publish

    def noted(effect: "Any", packet_id: int, now_s: float) -> None:
        if "PATCH" in effect.topic and not taken(world, "dpsAgent"):
            life.report("lastError", {"code": "clock.not_set"})
        publish(effect, packet_id, now_s)

    world.hub.publish = noted  # type: ignore[method-assign]
    world.end_at(world.uptime_s + 30)
    world.run(life.live(False, False, True))
    assert told(world) == [None, {"code": "clock.not_set"}]


def test_at_most_one_request_is_under_way() -> None:
    world = provisioned()
    under_way: list[int] = []
    publish, answer = world.hub.publish, world.hub.take_event

    def noted(effect: "Any", packet_id: int, now_s: float) -> None:
        if effect.topic.startswith("$iothub/twin/"):
            under_way.append(1)
            assert len(under_way) == 1
        publish(effect, packet_id, now_s)

    def heard(now_s: float) -> "Any":
        event = answer(now_s)
        if event is not None and getattr(event, "topic", "").startswith("$iothub/twin/res"):
            under_way.clear()
        return event

    world.hub.publish, world.hub.take_event = noted, heard  # type: ignore[method-assign]
    for number in range(1, 20):
        event = ReadTwin(number) if number % 3 == 0 else report(number)
        world.at(world.uptime_s + 10 + number % 7, lambda event=event: world.post(event))  # type: ignore[misc]
    live(world, 60)
    assert len(world.program.twins) == 19


def test_the_twin_comes_from_the_hub_and_who_asks_meanwhile_shares_it() -> None:
    world = provisioned()
    world.hub.desired = {"$version": 7, "rate": 5}
    gets: list[int] = []
    world.at(world.uptime_s + 15, lambda: gets.append(world.hub.twin_gets))
    world.at(world.uptime_s + 20, lambda: world.post(report(1), ReadTwin(2), ReadTwin(3), ReadTwin(4)))
    live(world, 30)
    assert world.hub.twin_gets == gets[0] + 1
    for number in (2, 3, 4):
        done = world.program.twins[number]
        twin = from_json(done.payload or b"")
        assert done.status == 200 and twin["desired"] == {"$version": 7, "rate": 5} and twin["reported"]["count"] == 1


def test_what_waits_is_bounded_and_what_is_beyond_is_not_sent() -> None:
    world = provisioned()
    world.at(world.uptime_s + 20, lambda: world.post(*[report(number) for number in range(1, ASKED_LIMIT + 3)]))
    live(world, 60)
    found = list(statuses(world).values())
    assert found.count(NOT_SENT) == 2 and found.count(204) == ASKED_LIMIT, found


def test_a_flawed_patch_costs_nobody_else_anything() -> None:
    world = provisioned()
    world.at(world.uptime_s + 20, lambda: setattr(world.hub, "twin_statuses", [400, 204]))
    world.at(world.uptime_s + 21, lambda: world.post(report(1), report(2)))
    live(world, 30)
    assert statuses(world) == {1: 400, 2: 204} and taken(world) == [2]


def test_a_hub_that_has_too_much_to_do_is_left_alone_and_programs_hear_for_how_long() -> None:
    for status in (429, 503, 500):
        world = provisioned()
        start_s = world.uptime_s
        world.at(start_s + 20, lambda world=world, status=status: setattr(world.hub, "twin_statuses", [status]))  # type: ignore[misc]
        world.at(start_s + 21, lambda world=world: world.post(report(1), report(2), ReadTwin(3)))  # type: ignore[misc]
        world.at(start_s + 25, lambda world=world: world.post(report(4)))  # type: ignore[misc]
        world.at(start_s + 22 + ASKED_AGAIN_S, lambda world=world: world.post(report(5)))  # type: ignore[misc]
        live(world, 40 + ASKED_AGAIN_S)
        assert statuses(world) == {1: 429, 2: 429, 3: 429, 4: 429, 5: 204} and taken(world) == [5]
        waits = [world.program.twins[number].wait_s for number in (1, 4)]
        assert ASKED_AGAIN_S / 2 - 1 < waits[0] <= ASKED_AGAIN_S and 3 < waits[0] - waits[1] < 5, waits


def test_what_was_under_way_when_the_connection_broke_goes_first_on_the_next() -> None:
    world = provisioned()
    start_s = world.uptime_s
    world.at(start_s + 100, lambda: setattr(world.hub, "lose", 1))
    world.at(start_s + 100, lambda: world.post(report(1), report(2)))
    life = live(world, 160)
    assert statuses(world) == {1: 204, 2: 204} and taken(world) == [1, 2]
    assert life.connections == 2 and life.hub_lacks == []


def test_a_patch_that_ends_every_connection_is_given_up_and_the_next_one_has_its_turn() -> None:
    world = provisioned()
    start_s, publish = world.uptime_s, world.hub.publish

    def hang_up(effect: "Any", packet_id: int, now_s: float) -> None:
        if effect.payload == report(1).patch:
            world.hub.drop(now_s)
        else:
            publish(effect, packet_id, now_s)

    world.hub.publish = hang_up  # type: ignore[method-assign]
    world.at(start_s + 2 * SHORT_S, lambda: world.post(report(1), report(2)))
    life = live(world, 1500)
    assert statuses(world) == {1: UNANSWERED, 2: 204} and life.connections == 1 + ENDS_LIMIT
    assert life.hub_lacks == [], "what programs ask for is held against no feature"


def test_what_nobody_waits_for_is_not_sent_again() -> None:
    world = provisioned()
    start_s = world.uptime_s
    world.at(start_s + 100, lambda: setattr(world.hub, "lose", 1))
    world.at(start_s + 100, lambda: world.post(report(1), report(2), report(3)))
    world.at(start_s + 100.5, lambda: world.post(Withdrawn(1), Withdrawn(2)))
    live(world, 160)
    assert statuses(world) == {3: 204} and taken(world) == [3]


def test_a_request_that_the_hub_leaves_unanswered_ends_and_the_next_one_has_its_turn() -> None:
    world = provisioned()
    world.at(world.uptime_s + 20, lambda: setattr(world.hub, "twin_statuses", [0]))
    world.at(world.uptime_s + 21, lambda: world.post(report(1), report(2)))
    life = live(world, 40 + TWIN_LIMIT_S)
    assert statuses(world) == {1: UNANSWERED, 2: 204} and life.connections == 1


def test_a_hub_without_a_twin_is_named_at_once() -> None:
    for refuses in (False, True):
        world = provisioned()
        world.hub.lacks, world.hub.refuses = ["twin"], refuses
        world.at(world.uptime_s + 100, lambda world=world: world.post(report(1), ReadTwin(2)))  # type: ignore[misc]
        live(world, 110)
        assert statuses(world) == {1: LACKING, 2: LACKING} and world.hub.patches == []


def test_what_waits_when_the_identity_is_left_is_told_so() -> None:
    world = provisioned()
    start_s = world.uptime_s
    world.at(start_s + 20, lambda: setattr(world.hub, "twin_statuses", [0]))
    world.at(start_s + 21, lambda: world.post(report(1), report(2)))
    world.at(start_s + 22, lambda: world.hub.call(world.uptime_s, "reprovision", "9"))
    live(world, 30)
    assert statuses(world) == {1: UNANSWERED, 2: NOT_SENT}


RECONNECTS = 100
PATIENCE_S = 30  # a program's, for its answer


class Reporters:
    """Four programs, each of which reports its next number once it has an answer, or had to wait for too long."""

    def __init__(self, world: World, seed: int) -> None:
        self.world = world
        self.numbers = [0, 0, 0, 0]
        self.waiting: dict[int, tuple[int, float]] = {}  # request id -> program, since when
        self._random = seed
        world.at(world.uptime_s + 10, self.go_on)
        world.at(world.uptime_s + 15, self.fail)

    def go_on(self) -> None:
        world = self.world
        for request_id in list(self.waiting):
            over = world.uptime_s >= self.waiting[request_id][1] + PATIENCE_S
            if over and request_id not in world.program.twins:
                world.post(Withdrawn(request_id))
            if over or request_id in world.program.twins:
                del self.waiting[request_id]
        busy = [program for program, _ in self.waiting.values()]
        for program in range(4):
            if program not in busy and world.connected:
                self.numbers[program] += 1
                request_id = self.numbers[program] * 4 + program
                self.waiting[request_id] = (program, world.uptime_s)
                world.post(Report(request_id, b'{"p%d":%d}' % (program, self.numbers[program])))
        world.at(world.uptime_s + 2, self.go_on)

    def fail(self) -> None:
        world, hub = self.world, self.world.hub
        fault = self._roll(5)
        if fault == 0:
            hub.lose = 1  # what is sent next does not arrive
        elif fault == 1:
            hub.twin_statuses = [0]  # it arrives, and the connection ends before the answer
            world.at(world.uptime_s + 2.01, lambda: hub.drop(world.uptime_s))
        elif fault == 2:
            hub.drop(world.uptime_s, "closed: reset", 0.5)
        elif fault == 3:
            hub.twin_statuses = [503]
        else:
            hub.drop(world.uptime_s)
        if len(hub.connections) > RECONNECTS:
            world.end_at(world.uptime_s + 400)
        else:
            world.at(world.uptime_s + 20 + self._roll(60), self.fail)

    def _roll(self, sides: int) -> int:
        self._random = (self._random * 1103515245 + 12345) % 2147483648
        return (self._random >> 8) % sides


def test_over_a_hundred_reconnects_no_answered_patch_is_lost_and_none_comes_after_a_later_one() -> None:
    for seed in (1, 7919):
        world = provisioned()
        world.effect_limit, world.program.keeps = 1000000, False
        Reporters(world, seed)
        live(world, 1e6)
        took = [patch for patch in world.hub.patches if "dpsAgent" not in patch]
        once = [took[place] for place in range(len(took)) if not place or took[place] != took[place - 1]]
        for program in range(4):
            name = f"p{program}"
            order = [patch[name] for patch in once if name in patch]
            assert order == sorted(set(order)), f"seed={seed}: {name} in another order, or twice"
            assert world.hub.reported[name] == order[-1]
        answered = [number for number in world.program.twins if world.program.twins[number].status == 204]
        versions = [world.program.twins[number].version for number in answered]
        lost = [number for number in answered if {f"p{number % 4}": number // 4} not in once]
        assert not lost and versions == sorted(set(versions)), f"seed={seed}: {lost}"
        assert len(world.hub.connections) > RECONNECTS and len(answered) > RECONNECTS, f"seed={seed}"
        assert len(took) > len(once) or len(once) > len(answered), f"seed={seed}: no answer was lost on its way"
