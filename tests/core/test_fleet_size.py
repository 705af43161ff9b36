"""What a device makes of the size of its fleet, and of a hub that tells it another one."""

from dps_agent.fleet import (
    HUB_SPREAD_LIMIT_S,
    TOKEN_LIFE_S,
    UNKNOWN,
    WEEK_S,
    dps_spread_s,
    fleet_of,
    hub_spread_s,
    merged,
    token_life_s,
)
from dps_agent.lifecycle import START_SPREAD_S, Lifecycle
from dps_agent.patience import Patience
from dps_agent.progress import Progress, decode_fleet, decode_progress, encode_progress
from dps_hal.contracts import PROGRESS
from dps_hal.errors import RetryLater
from dps_hal.platform import from_json
from support.cloud.fake_hub import FakeHub
from support.world import HUB, World, settings

MILLION = (1_000_000, 1000, 100)
TOLD = {"devices": 1_000_000, "dpsQuotaPerMin": 1000, "hubConnectsPerS": 100}


def lived(world: World, hours: float, fleet: "tuple[int, int, int]" = UNKNOWN, spread_s: int = 0) -> Lifecycle:
    life = Lifecycle(settings(fleet=fleet, spread_s=spread_s))
    world.end_at(world.uptime_s + hours * 3600)
    world.run(life.live(False, False, True))
    return life


def registered() -> World:
    world = World()
    assert lived(world, 0.1).connections == 1
    return world


def test_spread_and_token_life_follow_from_the_fleet_and_end_at_a_week() -> None:
    assert (dps_spread_s(UNKNOWN), hub_spread_s(UNKNOWN), token_life_s(UNKNOWN)) == (0, 0, TOKEN_LIFE_S)
    assert (dps_spread_s(MILLION), hub_spread_s(MILLION), token_life_s(MILLION)) == (
        125_000,
        HUB_SPREAD_LIMIT_S,
        26_000,
    )
    small = (30_000, 1000, 200)
    assert (dps_spread_s(small), hub_spread_s(small), token_life_s(small)) == (3750, 150, TOKEN_LIFE_S)
    huge = (100_000_000, 1, 1)
    assert (dps_spread_s(huge), hub_spread_s(huge), token_life_s(huge)) == (WEEK_S, HUB_SPREAD_LIMIT_S, WEEK_S)


def test_the_spread_of_the_settings_wins_and_none_delays_the_hub() -> None:
    for spread_s, fleet, longest_s in ((0, UNKNOWN, START_SPREAD_S), (0, MILLION, 125_000), (400, MILLION, 400)):
        world = World()
        lived(world, 30, fleet, spread_s)
        assert world.slept("fleet") == [longest_s * 0.5]
        world.sleeps.clear()
        started_s = world.uptime_s
        connections = len(world.hub.connections)
        lived(world, 1, fleet, spread_s)
        connected_s = world.hub.connections[connections][0] - started_s
        assert connected_s <= HUB_SPREAD_LIMIT_S, "a reboot waits for the hub alone"


def test_a_hub_may_tell_how_large_the_fleet_is_and_that_outlives_a_restart() -> None:
    world = World()
    world.hub.change_desired(world.uptime_s, "dpsAgent", {"fleet": TOLD}, False)
    life = lived(world, 0.1)
    assert life.fleet == MILLION and decode_fleet(world.store[PROGRESS]) == MILLION
    writes = len(world.commits)
    life = lived(world, 0.1)
    assert life.fleet == MILLION and len(world.commits) - writes <= 2, "what is known is not written again"
    world.hub.change_desired(world.uptime_s, "dpsAgent", None, False)
    assert lived(world, 0.1).fleet == UNKNOWN == decode_fleet(world.store[PROGRESS])
    world.at(world.uptime_s + 60, lambda: world.hub.change_desired(world.uptime_s, "dpsAgent", {"fleet": TOLD}))
    assert lived(world, 0.1).fleet == MILLION, "also by a patch"


def test_what_a_hub_leaves_unsaid_is_as_the_settings_have_it() -> None:
    world = registered()
    world.hub.change_desired(world.uptime_s, "dpsAgent", {"fleet": {"devices": 1_500_000}}, False)
    life = lived(world, 0.1, MILLION)
    assert life.fleet == (1_500_000, 1000, 100) and dps_spread_s(life.fleet) == 187_500
    assert lived(world, 0.1).fleet == (1_500_000, 0, 0), "the record has what was told alone"
    world.hub.change_desired(world.uptime_s, "dpsAgent", {"fleet": {"devices": 5_000_000}}, False)
    few = (1000, 1, 0)
    assert lived(world, 0.1, few).fleet == few, "with the quota of the settings it takes more than a week"


def test_what_a_hub_tells_makes_nobody_wait_for_longer_than_twice_what_the_settings_give() -> None:
    for told in ((3_000_000, 0, 0), (0, 300, 0), (0, 0, 30), (9_000_000, 5000, 100), (1_000_000, 1000, 100)):
        both = merged(told, MILLION)
        assert both is not None and dps_spread_s(both) <= 2 * dps_spread_s(MILLION), told
        assert token_life_s(both) <= 2 * token_life_s(MILLION), told
    assert merged((3_000_000, 0, 0), (1_000_000, 1000, 0)) == (2_000_000, 1000, 0)
    assert merged((3_000_000, 1000, 0), UNKNOWN) == (3_000_000, 1000, 0), "nobody set one"


def test_a_hub_that_tells_another_size_each_second_wears_out_no_flash() -> None:
    world = registered()
    writes = world.commits.count(PROGRESS)
    started_s = world.uptime_s
    for second in range(300):
        own = {"fleet": {"devices": 1000 + second}}
        world.at(started_s + 60 + second, lambda own=own: world.hub.change_desired(world.uptime_s, "dpsAgent", own))  # type: ignore[misc]
    life = lived(world, 0.2)
    assert life.fleet == (1299, 0, 0), "what it told last holds at once"
    assert world.commits.count(PROGRESS) - writes <= 3
    assert decode_fleet(world.store[PROGRESS]) == life.fleet, "stored with the next write that was due"
    started_s = world.uptime_s
    for own, hours in (({"fleet": TOLD}, 1), ({"fleet": {"devices": 7}}, 2)):
        at_s = started_s + hours * 3600
        world.at(at_s, lambda own=own: world.hub.change_desired(world.uptime_s, "dpsAgent", own))  # type: ignore[misc]
    lived(world, 30)
    assert decode_fleet(world.store[PROGRESS]) == (7, 0, 0), "a day later, at the latest with the next token"


def test_the_first_refusal_for_want_of_quota_is_followed_by_a_minute_whatever_failed_before() -> None:
    world, patience = World(), Patience()
    world.run(patience.load())

    def failed(error: RetryLater) -> int:
        world.run(patience.begin_attempt())
        _, delay_s = world.run(patience.fail_attempt(error))
        return int(delay_s)

    for _ in range(10):
        failed(RetryLater("network.unreachable", "no network"))
    throttled = RetryLater("dps.throttled", "DPS answered 429")
    waits = [failed(throttled), failed(RetryLater("network.unreachable", "no network")), failed(throttled)]
    assert waits[0] <= 61 and 60 < waits[2] <= 121, waits
    patience.hold()
    world.run(patience.forgive())
    assert failed(throttled) <= 61


def test_a_fleet_whose_power_fails_again_while_it_comes_back_is_spread_as_before() -> None:
    world = registered()
    for _ in range(2):
        world.sleeps.clear()
        world.random = 0.9
        life = Lifecycle(settings(fleet=MILLION))
        world.end_at(world.uptime_s + 280)  # the power fails soon after the connection
        world.run(life.live(False, False, True))
        assert life.connections == 1 and world.sleeps[0][0] == 0.9 * HUB_SPREAD_LIMIT_S, world.sleeps


def test_a_spread_is_kept_over_a_second_cut_where_the_clock_is_told_a_while_after_each_start() -> None:
    world = World()
    world.store[PROGRESS] = encode_progress(
        Progress(0, 0, world.utc_s() - 86400, False, "", "", 0, 0)
    )  # of another day
    started_s, asks_at_s = world.uptime_s, world.uptime_s + 0.5 * 125_000
    for cut_after_s in (30_000, 30_050):
        world.believable = False
        world.at(world.uptime_s + 40, lambda: setattr(world, "believable", True))
        writes = len(world.commits)
        lived(world, (started_s + cut_after_s - world.uptime_s) / 3600, MILLION)
        assert len(world.commits) - writes <= 1 and world.dps.requests == []
    world.believable = False
    world.at(world.uptime_s + 40, lambda: setattr(world, "believable", True))
    life = Lifecycle(settings(fleet=MILLION))
    world.end_at(asks_at_s + 60)
    world.run(life.live(False, False, True))
    assert life.assignment is not None, "it registers when it would have"
    assert world.uptime_s >= asks_at_s and world.sleeps, world.sleeps


def test_what_a_hub_told_ends_with_its_assignment() -> None:
    for new_hub in (HUB, "second.azure-devices.net"):
        world = registered()
        world.hubs["second.azure-devices.net"] = FakeHub("second.azure-devices.net")
        world.hub.change_desired(world.uptime_s, "dpsAgent", {"fleet": TOLD}, False)
        assert lived(world, 0.1).fleet == MILLION
        world.dps.hub = new_hub
        world.hubs["second.azure-devices.net"].absent = "connect: refused"  # it has told nothing yet
        life = Lifecycle(settings())
        world.end_at(world.uptime_s + 300)
        world.run(life.live(False, True, True))
        assert life.assignment is not None and life.assignment.assigned_hub == new_hub
        wanted = MILLION if new_hub == HUB else UNKNOWN
        assert (life.fleet, decode_fleet(world.store[PROGRESS])) == (wanted, wanted), new_hub


def test_the_next_token_lives_as_long_as_the_hub_told_just_now() -> None:
    world = registered()
    world.hub.change_desired(world.uptime_s, "dpsAgent", {"fleet": TOLD}, False)
    connections = len(world.hub.connections)
    life = Lifecycle(settings(token_life_s=0))
    world.end_at(world.uptime_s + 6 * 3600)
    world.run(life.live(False, False, True))
    assert len(world.hub.connections) - connections == 2, "the token after the first one lives for 26,000 s"


def test_an_absurd_fleet_changes_nothing() -> None:
    for own in (
        {"fleet": 7},
        {"fleet": {"devices": -1}},
        {"fleet": {"devices": True}},
        {"fleet": {"devices": "many"}},
        {"fleet": {"devices": 10**12}},
        {"fleet": dict(TOLD, dpsQuotaPerMin=1)},
        {"fleet": dict(TOLD, hubConnectsPerS=1)},
    ):
        told = fleet_of(own)
        assert told is None or merged(told, UNKNOWN) is None, own
        world = registered()
        world.hub.change_desired(world.uptime_s, "dpsAgent", own, False)
        assert lived(world, 0.1, MILLION).fleet == MILLION and b"fleet" not in world.store[PROGRESS], own
        assert lived(world, 0.1).fleet == UNKNOWN
    assert fleet_of(None) == fleet_of({}) == fleet_of(7) == UNKNOWN


def test_an_absurd_fleet_is_reported_once_and_no_longer_when_it_was_mended() -> None:
    world = registered()

    def reported() -> "tuple[bool | None, int]":
        return world.hub.reported["dpsAgent"].get("fleetRefused"), world.hub.reported["$version"]

    for fleet in ({"devices": -1}, dict(TOLD, dpsQuotaPerMin=1)):
        version = world.hub.reported["$version"]
        world.hub.change_desired(world.uptime_s, "dpsAgent", {"fleet": fleet}, False)
        life = lived(world, 0.1)
        assert life.fleet_refused and reported() == (True, version + 1), fleet
        lived(world, 5)
        assert reported() == (True, version + 1), "neither with the next token nor after a restart"
        world.hub.change_desired(world.uptime_s, "dpsAgent", {"fleet": TOLD}, False)
        assert not lived(world, 0.1).fleet_refused and reported() == (False, version + 2)
    world.hub.change_desired(world.uptime_s, "dpsAgent", {"fleet": 7}, False)
    assert lived(world, 0.1).fleet_refused and reported()[0]
    at_s = world.uptime_s + 60
    world.at(at_s, lambda: world.hub.change_desired(world.uptime_s, "dpsAgent", {"fleet": TOLD}))
    life = lived(world, 0.1)
    assert not life.fleet_refused and not reported()[0] and life.fleet == MILLION, "mended while it is connected"


def test_where_a_hub_tells_nothing_the_settings_hold_whatever_they_are() -> None:
    huge = (100_000_000, 1, 1)
    assert merged(UNKNOWN, huge) == huge and merged((1, 0, 0), huge) == (1, 1, 1)


def test_a_record_without_a_fleet_is_what_it_was() -> None:
    progress = Progress(3, 120, 1800000000, False, "dps.throttled", "DPS answered 429", 1, 0)
    text = (
        b'{"attempts":3,"nextTryDelayS":120,"lastBelievedS":1800000000,"halted":false,"code":"dps.throttled",'
        b'"message":"DPS answered 429","connects":1'
    )
    golden = text + b',"fleet":{"devices":1000000,"dpsQuotaPerMin":1000,"hubConnectsPerS":100}}'
    assert from_json(encode_progress(progress)) == from_json(text + b"}")
    assert from_json(encode_progress(progress, MILLION)) == from_json(golden)
    assert decode_progress(golden) == progress and decode_fleet(golden) == MILLION
    assert decode_fleet(text + b"}") == decode_fleet(b"rubbish") == decode_fleet(b"7") == UNKNOWN
