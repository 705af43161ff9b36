"""What somebody can do where the device waits: the line `next` of `status`, on the command line and at the socket."""

from __future__ import annotations

from dps_hal.host.codes import REMEDIES

_SOONER = {  # what shortens the wait of a state
    "halted": "'systemctl reload dps-agent' makes it ask at once",
    "waiting": "'dps-agent provision' makes it try at once",
    "provisioning": "'dps-agent provision' ends this wait",
    "provisioned": "it connects by itself, after 'systemctl restart dps-agent' sooner",
}
_DPS_ASKED = "DPS asked for this wait, and nobody can shorten it"


def next_step(state: str, code: str, waits: bool, asked_by_dps: bool) -> str:
    """The remedy of the error `code` and what shortens the wait, where the device `waits`; "" for nothing to do."""
    sooner = _SOONER.get(state, "") if waits else ""
    if waits and asked_by_dps and state == "waiting":
        sooner = _DPS_ASKED
    return "; ".join(filter(None, (REMEDIES.get(code, ""), sooner)))
