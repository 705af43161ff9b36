"""A fleet that comes back together, in virtual time: how long it takes, and how often it asks.

The floor is what the quota allows at best: both PUTs of a registration count. 300 devices at three requests a minute
stand for 100,000 at 1,000: only devices for each request a minute matter.
"""

from dps_agent.fleet import TOKEN_LIFE_S
from dps_emulator.quotas import Quota
from dps_fleet.simulation import SETTLES_S, Dps, Fleet, Hub, agent
from dps_fleet.wire import FIRST_HUB
from support.share import part_of
from support.world import settings

DEVICES = 300
PER_MINUTE = 3
FLOOR_S = 2 * DEVICES * 60 / PER_MINUTE


class Dice:
    """Random numbers that are the same in each run, on both runtimes."""

    def __init__(self) -> None:
        self.state = 12345

    def __call__(self) -> float:
        self.state = (self.state * 1103515245 + 12345) & 0x7FFFFFFF
        return (self.state >> 7) / 16777216


def fleet(retry_after_s: "int | None" = None) -> Fleet:
    world = Fleet(Dice(), 3 * FLOOR_S)
    world.dps = Dps(world, Quota(PER_MINUTE), retry_after_s=retry_after_s)
    world.hubs = {FIRST_HUB.hub: Hub(world, FIRST_HUB, None)}
    world.goal = "registered"
    world.retires = True
    return world


def came_back(world: Fleet, spread: float = 0.0) -> "tuple[float, float]":
    """All are switched on within half a minute; how many times the floor that took, and requests a device."""
    world.boot_all(agent(settings(spread_s=int(spread * FLOOR_S))), DEVICES, None, 30.0)
    world.run()
    assert world.done == DEVICES, f"{world.done} of {DEVICES} after three times what it takes"
    assert world.dps.polls_too_fast == 0
    challenges = sum([device.challenges for device in world.devices])
    assert challenges <= 1.02 * DEVICES, f"{challenges} challenges were granted: some were given up"
    assert sum([device.identity_writes for device in world.devices]) == DEVICES, "once each"
    assert DEVICES < sum([device.progress_writes for device in world.devices]) <= 10 * DEVICES, "flash wears out"
    return (world.now_s - SETTLES_S) / FLOOR_S, world.dps.requests.total / DEVICES


def test_a_fleet_that_knows_nothing_comes_back_nearly_as_fast_as_the_quota_allows() -> None:
    for retry_after_s in part_of((None, 5)):
        factor, requests = came_back(fleet(retry_after_s))
        assert factor <= 1.12 and requests <= 27, f"Retry-After {retry_after_s}: {factor} x, {requests} requests"


def test_a_spread_as_long_as_the_floor_survives_that_the_power_fails_again() -> None:
    for fails_at_s in part_of((None, FLOOR_S / 3)):
        world = fleet()

        def power_fails(world: Fleet = world) -> None:
            for device in world.devices:
                if device.done_s is None:
                    device.cut_power()
                    world.boot(device, world.now_s + 30 * world.random())

        if fails_at_s:
            world.call_at(fails_at_s, power_fails)
        factor, requests = came_back(world, 1.04)
        assert factor <= 1.15 and requests <= 7.2, f"{factor} x, {requests} requests"
        refused = world.dps.refused.total / world.dps.requests.total
        assert refused <= 0.45, f"{refused} refused: of three a minute in a spread"


def test_a_fleet_that_was_connected_together_does_not_renew_together() -> None:
    world = Fleet(Dice(), 2 * TOKEN_LIFE_S)
    hub = Hub(world, FIRST_HUB, None)
    world.hubs = {FIRST_HUB.hub: hub}
    world.boot_all(agent(settings()), DEVICES, FIRST_HUB, 30.0)
    world.run(TOKEN_LIFE_S, until_all_are_done=False)
    begin_s, end_s, step_s = 0.3 * TOKEN_LIFE_S, 0.8 * TOKEN_LIFE_S, TOKEN_LIFE_S // 12
    renewals = hub.connects.within(begin_s, TOKEN_LIFE_S)
    counts = [hub.connects.within(at_s, at_s + step_s) for at_s in range(int(begin_s), int(end_s), step_s)]
    assert renewals >= 0.95 * DEVICES and max(counts) <= 2 * renewals / len(counts), counts
