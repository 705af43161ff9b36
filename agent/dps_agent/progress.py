"""The record `progress`: what a restart must not forget of failures, and of what the hub told of the fleet, as JSON."""

from dps_agent.fleet import NAMES, UNKNOWN, WEEK_S, fleet_of
from dps_hal.platform import from_json, to_json

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NamedTuple

    from dps_agent.fleet import Fleet

    class Progress(NamedTuple):
        """The record `progress`: what a restart must not forget of failures."""

        attempts: int  # failed registrations in a row
        next_try_delay_s: int  # chosen after the last of them
        last_believed_s: int  # the last believable time, Unix seconds; 0: none
        halted: bool  # the last failure needs the operator
        code: str  # the error code of the last failure
        message: str  # the text of the last failure
        connects: int  # connections to the hub begun in a row, none of them steady yet
        under: int  # `Settings.under` of what failed; 0: not known
else:
    from dps_hal.named import namedtuple

    Progress = namedtuple(
        "Progress",
        ("attempts", "next_try_delay_s", "last_believed_s", "halted", "code", "message", "connects", "under"),
    )

_NUMBER_LIMIT = 1 << 40  # of what the record may hold: 34,000 years as seconds


def encode_progress(progress: Progress, fleet: "Fleet" = UNKNOWN) -> bytes:
    """The JSON text of the record `progress`; what the hub told of the fleet stands in it where it told something."""
    value: dict[str, Any] = {
        "attempts": progress.attempts,
        "nextTryDelayS": progress.next_try_delay_s,
        "lastBelievedS": progress.last_believed_s,
        "halted": progress.halted,
        "code": progress.code,
        "message": progress.message,
        "connects": progress.connects,
    }
    if progress.under and (progress.attempts or progress.next_try_delay_s):
        value["under"] = progress.under
    if fleet != UNKNOWN:
        value["fleet"] = dict(zip(NAMES, fleet))
    return to_json(value).encode()


def decode_fleet(stored: bytes) -> "Fleet":
    """The fleet in a stored `progress` record; UNKNOWN where there is none that can be used."""
    try:
        return fleet_of(from_json(stored)) or UNKNOWN
    except ValueError:
        return UNKNOWN


def decode_progress(stored: bytes) -> "Progress | None":
    """A stored `progress` record, or None if it is not readable."""
    try:
        value = from_json(stored)
        progress = Progress(
            value["attempts"],
            min(value["nextTryDelayS"], WEEK_S),  # no delay of ours is longer, and nothing vouches for this record
            value["lastBelievedS"],
            bool(value["halted"]),
            value["code"],
            value["message"],
            value.get("connects", 0),  # dps-agent 0.1.0 stored no such count
            value.get("under", 0),
        )
        for number in progress[:3] + progress[6:]:
            if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < _NUMBER_LIMIT:
                return None
        for text in progress[4:6]:
            if not isinstance(text, str):
                return None
    except (ValueError, KeyError, TypeError):
        return None
    return progress
