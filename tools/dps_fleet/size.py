"""The sums of a fleet: how long its services need at best, and which settings fit that."""

import math
from typing import NamedTuple

from dps_agent.fleet import dps_spread_s, hub_spread_s, token_life_s

PUTS = 2  # how many of a registration's the quota counts, as far as anybody outside knows
# New connections a second of a hub, and creations in its registry a minute, by units of each tier.
# Source: Azure IoT Hub quotas and throttling.
HUB_CONNECTS_PER_S = {"S1": (12, 100), "S2": (120, 120), "S3": (6000, 6000)}  # a unit, and at least
REGISTRY_PER_MIN = {"S1": 100, "S2": 100, "S3": 5000}  # a unit


class Size(NamedTuple):
    """What comes out; seconds, but for the quota and the units."""

    dps_floor_s: float  # until the last device has registered, at best
    dps_spread_s: int
    hub_floor_s: float  # until the last device is connected, at best
    hub_spread_s: int
    token_life_s: int
    connected_share_for_an_hour: float  # the part of the fleet that tokens of an hour keep connected
    quota_per_min: float  # the quota to ask Microsoft for, to be back in time
    registry_units: int  # units that DPS needs to create devices as fast as it registers them


def hub_connects_per_s(tier: str, units: int) -> int:
    """New connections a second that a hub takes."""
    each, least = HUB_CONNECTS_PER_S[tier]
    return max(each * units, least)


def size(devices: int, per_minute: int, per_s: int, back_in_s: float, tier: str = "S1") -> Size:
    """The sums for `devices` at so many registrations a minute and new connections a second."""
    fleet = (devices, per_minute, per_s)
    return Size(
        dps_floor_s=PUTS * devices * 60 / per_minute,
        dps_spread_s=dps_spread_s(fleet),
        hub_floor_s=devices / per_s,
        hub_spread_s=hub_spread_s(fleet),
        token_life_s=token_life_s(fleet),
        connected_share_for_an_hour=min(1.0, per_s * 3600 * 0.775 / devices),
        quota_per_min=math.ceil(1.04 * PUTS * devices * 60 / back_in_s),
        registry_units=math.ceil(per_minute / PUTS / REGISTRY_PER_MIN[tier]),
    )
