"""How long to wait: Retry-After as DPS sends it, and our own jittered exponential."""

from dps_agent.effects import Random
from dps_agent.utc import http_date_s

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Generator
    from typing import Any

    from dps_agent.effects import Effect

THROTTLE_LIMIT_S = 86400  # the longest Retry-After obeyed with 429 and 503
POLL_LIMIT_S = 300  # the longest Retry-After obeyed between two polls
POLL_DEFAULT_S = 2  # between two polls when DPS names no delay
POLL_DEFAULT_LIMIT_S = 10  # what that grows to, by POLL_DEFAULT_S with every tenth poll
STEP_FIRST_S = 1  # bounds of our own delays inside one registration
STEP_LIMIT_S = 60
WAITING_FIRST_S = 30  # bounds of our own delays between two registrations
WAITING_LIMIT_S = 3600
# Each refusal for want of quota makes the next wait so much longer. DPS counts by the minute, so before the next minute
# there is nothing to get.
THROTTLED_STEP_S = 60
THROTTLED_STEADY = 30  # refusals, after about seven hours; with the ones after it the wait grows three times as fast
HELD_AGAIN_S = 20  # at most, after a device that holds a challenge was refused: the quota for it is spent already
HUB_FIRST_S = 10  # bounds of our own delays between two connections to the hub
HUB_LIMIT_S = 300
HUB_LEAST = 0.1  # of the longest delay, where a hub let nobody in: between the waves that it drops it has room
HALTED_S = 3600  # a refused device asks again hourly


def retry_after_s(headers: "dict[str, str]", limit_s: int) -> "int | None":
    """What an answer's Retry-After asks for, in seconds rounded up, at most `limit_s`; None where nobody can tell.

    It is a number of seconds or a date: RFC 9110, 10.2.3. A date is measured against the Date of the same answer, since
    no clock of ours need agree with the service's.
    """
    text = headers.get("retry-after", "").strip()
    whole, point, fraction = text.partition(".")
    if whole and bool(point) == bool(fraction) and not (whole + fraction).strip("0123456789"):
        return min(int(whole.lstrip("0")[:12] or "0") + bool(fraction.strip("0")), limit_s)
    until_s, now_s = http_date_s(text), http_date_s(headers.get("date"))
    if until_s is None or now_s is None:
        return None
    return min(max(until_s - now_s, 0), limit_s)


def after_request_s(seconds: int) -> "Generator[Effect, Any, float]":
    """A delay that the service asked for plus up to 10 % (at least 0.2 s unless it asked for none), never less."""
    if seconds == 0:
        return 0.0
    random: float = yield Random()
    return seconds + random * max(seconds * 0.1, 0.2)


def throttled_s(refusals: int, asked_s: int) -> "Generator[Effect, Any, float]":
    """The delay after the n-th refusal in a row for want of quota (n >= 1): n minutes or less, never less than asked.

    What the service asks for is the least, for it does not know how many wait. Steps that stay the same, where doubling
    would be usual: of a fleet that the quota serves in T seconds each member is refused about sqrt(T / 22) times, and
    the last one waits about 16 * sqrt(T) s too long. From `THROTTLED_STEADY` on an hour is little beside T.
    """
    random: float = yield Random()
    steps = refusals + 2 * max(refusals - THROTTLED_STEADY, 0)
    longest_s = max(min(steps * THROTTLED_STEP_S, WAITING_LIMIT_S), 2 * asked_s)
    return (longest_s + random * longest_s) / 2


def exponential_s(failures: int, first_s: float, limit_s: float, least: float = 0.5) -> "Generator[Effect, Any, float]":
    """The delay after the n-th failure in a row (n >= 1): from `least` to all of first * 2**(n-1), at most limit."""
    random: float = yield Random()
    longest_s = 2 * exponential_floor_s(failures, first_s, limit_s)
    return longest_s * (least + random * (1 - least))


def exponential_floor_s(failures: int, first_s: float, limit_s: float) -> float:
    """Half of the longest delay that `exponential_s` chooses after the n-th failure in a row: usually the shortest."""
    ceiling = first_s
    for _ in range(min(failures, 40) - 1):
        ceiling = min(ceiling * 2, limit_s)
    return ceiling / 2


def around_s(seconds: int) -> "Generator[Effect, Any, float]":
    """A delay of `seconds` plus or minus a half, so that refused devices do not come back together."""
    random: float = yield Random()
    return seconds * (0.5 + random)
