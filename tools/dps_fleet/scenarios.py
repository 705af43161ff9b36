"""What happens to the fleet. Each scenario runs the simulation and returns when the clock of its figures begins."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from dps_agent import hub_effects
from dps_agent.effects import NoReply
from dps_emulator.quotas import Quota
from dps_fleet import wire
from dps_fleet.simulation import PUT_TOKEN, UNANSWERED, Fleet

if TYPE_CHECKING:
    from dps_fleet.simulation import Make

SETTLED_S = 7200.0  # when what happens to a connected fleet begins
HOUR_S = 3600.0
DAY_S = 86_400.0
_UNTRUSTED = (NoReply("tls: certificate verify failed", False), 0.3)

Progress = Callable[[int, float], None] | None


class Order(NamedTuple):
    """What the scenarios want to know."""

    make: "Make"
    cores: int
    identity: wire.Assigned | None  # a fleet that has registered before boots with it; a peer's devices have none
    hub_per_s: float
    within_s: float  # all are switched on
    progress: Progress


def reset(fleet: Fleet, order: Order) -> float:
    """Everybody boots at once and holds no identity."""
    _register(fleet)
    fleet.boot_all(order.make, order.cores, None, order.within_s)
    fleet.run(progress=order.progress)
    return 0.0


def cut(fleet: Fleet, order: Order) -> float:
    """As reset, and an hour later the power fails again."""

    def fails() -> None:
        for device in fleet.devices:
            if device.done_s is None:
                device.cut_power()
                fleet.boot(device, fleet.now_s + order.within_s * fleet.random())

    fleet.call_at(HOUR_S, fails)
    return reset(fleet, order)


def dps_outage(fleet: Fleet, order: Order) -> float:
    """As reset, and DPS answers nobody in the second and third hour."""
    fleet.dps.answers_instead = lambda now_s, kind: UNANSWERED if HOUR_S <= now_s < 3 * HOUR_S else None
    return reset(fleet, order)


def enrolment(fleet: Fleet, order: Order) -> float:
    """Nobody is enrolled; a day later somebody mends that."""
    fleet.dps.answers_instead = lambda now_s, kind: (wire.NOT_ENROLLED, 0.3) if now_s < DAY_S else None
    reset(fleet, order)
    return DAY_S


def challenge_refused(fleet: Fleet, order: Order) -> float:
    """DPS gives a challenge and refuses each token; a day later somebody mends that."""

    def answers(now_s: float, kind: int) -> tuple[Any, float] | None:
        if now_s >= DAY_S:
            return None
        return (wire.UNAUTHORIZED if kind == PUT_TOKEN else wire.CHALLENGE), 0.3

    fleet.dps.answers_instead = answers
    reset(fleet, order)
    return DAY_S


def blackout(fleet: Fleet, order: Order) -> float:
    """Everybody boots at once with an identity and connects."""
    fleet.boot_all(order.make, order.cores, order.identity, order.within_s)
    fleet.run(progress=order.progress)
    return 0.0


def renewals(fleet: Fleet, order: Order) -> float:
    """What a blackout leaves behind: twelve hours of renewals of tokens, at a hub without a throttle."""
    for hub in fleet.hubs.values():
        hub.gate = None
    fleet.boot_all(order.make, order.cores, order.identity, order.within_s)
    fleet.run(12 * HOUR_S, until_all_are_done=False, progress=order.progress)
    return 0.0


def _settle(fleet: Fleet, order: Order) -> None:
    """Everybody is connected, without throttles and quotas: the peace before the storm."""
    quota, fleet.dps.quota = fleet.dps.quota, Quota(1e12)
    hub = fleet.hubs[wire.FIRST_HUB.hub]
    gate, hub.gate = hub.gate, None
    fleet.boot_all(order.make, order.cores, order.identity, HOUR_S)
    fleet.run(SETTLED_S, until_all_are_done=False)
    fleet.dps.quota, hub.gate = quota, gate
    fleet.forget_counts()


def hub_deleted(fleet: Fleet, order: Order) -> float:
    """The hub is deleted, its name is gone; DPS gives another one."""
    _settle(fleet, order)
    hub = fleet.hubs.pop(wire.FIRST_HUB.hub)
    return _elsewhere(fleet, order, hub.drop_all)


def hub_refuses(fleet: Fleet, order: Order) -> float:
    """The hub's registry is wiped, it refuses everybody; DPS gives another hub."""
    _settle(fleet, order)
    hub = fleet.hubs[wire.FIRST_HUB.hub]
    hub.answers_instead = lambda now_s: (hub_effects.ConnAck(5, False), 0.3)
    return _elsewhere(fleet, order, hub.drop_all)


def _elsewhere(fleet: Fleet, order: Order, happens: Callable[[], None]) -> float:
    fleet.dps.hub = wire.SECOND_HUB
    _register(fleet)
    happens()
    fleet.run(progress=order.progress)
    return SETTLED_S


def tls(fleet: Fleet, order: Order) -> float:
    """For two hours no certificate of hub or DPS is valid."""
    _settle(fleet, order)
    ends_s = SETTLED_S + 2 * HOUR_S
    hub = fleet.hubs[wire.FIRST_HUB.hub]
    hub.answers_instead = lambda now_s: _UNTRUSTED if now_s < ends_s else None
    fleet.dps.answers_instead = lambda now_s, kind: _UNTRUSTED if now_s < ends_s else None
    hub.drop_all()
    fleet.run(progress=order.progress)
    return ends_s


def _register(fleet: Fleet) -> None:
    fleet.goal = "registered"
    fleet.retires = True


# Whether it is the hub's throttle that sets the floor, else DPS's quota.
SCENARIOS: dict[str, tuple[Callable[[Fleet, Order], float], bool]] = {
    "reset": (reset, False),
    "cut": (cut, False),
    "dps-outage": (dps_outage, False),
    "enrolment": (enrolment, False),
    "challenge-refused": (challenge_refused, False),
    "blackout": (blackout, True),
    "renewals": (renewals, True),
    "hub-deleted": (hub_deleted, False),
    "hub-refuses": (hub_refuses, False),
    "tls": (tls, True),
}
