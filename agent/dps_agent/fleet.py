"""What follows for one device from the size of its fleet and from the limits of the services that it shares.

A fleet is a tuple of three whole numbers, each 0 where nobody has said it: devices; registrations a minute that the
Device Provisioning Service takes; new connections a second that the hub takes.
"""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, TypeAlias

    Fleet: TypeAlias = tuple[int, int, int]

UNKNOWN = (0, 0, 0)
LIMITS = (100_000_000, 10_000_000, 1_000_000)
NAMES = ("devices", "dpsQuotaPerMin", "hubConnectsPerS")  # as desired properties name them
WEEK_S = 604_800  # neither a spread nor a token's life follows to be longer
TOKEN_LIFE_S = 3600  # it is longer where the hub could not renew the whole fleet in that time
HUB_SPREAD_LIMIT_S = 300  # a device that starts alone waits no longer than after a lost connection


def dps_spread_s(fleet: "Fleet") -> int:
    """Over how many seconds the first contacts with DPS are spread: its quota's floor, both PUTs counted, and 4 %."""
    devices, per_minute, _ = fleet
    return min(devices * 125 // per_minute, WEEK_S) if per_minute else 0


def hub_spread_s(fleet: "Fleet") -> int:
    """Over how many seconds the first connections with the hub are spread."""
    devices, _, per_s = fleet
    return min(devices // per_s, HUB_SPREAD_LIMIT_S) if per_s else 0


def token_life_s(fleet: "Fleet") -> int:
    """A token's life with which renewals take no more than half of the connections that the hub accepts."""
    devices, _, per_s = fleet
    return min(max(devices * 26 // (per_s * 10), TOKEN_LIFE_S), WEEK_S) if per_s else TOKEN_LIFE_S


def fleet_of(desired: "Any", own: "Fleet" = UNKNOWN) -> "Fleet | None":
    """The fleet in the desired properties `dpsAgent`; UNKNOWN where there is none.

    None where it is no fleet, or absurd beside that of the settings, `own`.
    """
    value = (isinstance(desired, dict) and desired.get("fleet")) or {}
    if not isinstance(value, dict):
        return None
    numbers = []
    for name, limit in zip(NAMES, LIMITS):
        number = value.get(name, 0)
        if type(number) is not int or not 0 <= number <= limit:
            return None
        numbers.append(number)
    told: Fleet = tuple(numbers)  # type: ignore[assignment]
    return merged(told, own) and told


def merged(told: "Fleet", own: "Fleet") -> "Fleet | None":
    """The fleet as the hub told it, and as the settings have it where it told nothing; None where that is absurd.

    Nobody waits for longer than a week, nor for longer than twice what the settings give.
    """
    if told == UNKNOWN:
        return own
    devices, per_minute, per_s = [told_number or number for told_number, number in zip(told, own)]
    if devices * 125 > per_minute * WEEK_S > 0 or devices * 26 > per_s * 10 * WEEK_S > 0:
        return None
    for limit, own_limit in ((per_minute, own[1]), (per_s, own[2])):
        if own[0] and own_limit:
            devices = min(devices, 2 * own[0] * limit // own_limit)
    return devices, per_minute, per_s
