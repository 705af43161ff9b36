"""`dps-agent wait`: ends when the device is connected to its hub, or has one, so that no script looks for lines.

It reads the file in which the running service says where it stands: that is replaced once a second at most, and so
often it is read. Where no service runs the stored records say whether there is a hub.
"""

from __future__ import annotations

import time

from dps_agent.host.cli.status import stand
from dps_agent.host.cli.verb import Outcome, Verb, configuration_of, seconds_up_to
from dps_hal.errors import AskOperator, RetryLater

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from dps_agent.host.cli.verb import Arguments, Declared
    from dps_agent.host.config import Configuration

LOOK_EVERY_S = 1.0
_DEFAULT_S = 60
_FOR = {  # what may be waited for, and the states in which it is there
    "connected": ("connected",),
    "assigned": ("provisioned", "connecting", "connected"),
}


def add_arguments(parser: Declared) -> None:
    """What to wait for, and for how long."""
    parser.add_argument(
        "--for",
        dest="wanted",
        choices=tuple(_FOR),
        default="connected",
        help="connected (to its hub, the default) or assigned (it has a hub)",
    )
    parser.add_argument(
        "--timeout",
        type=seconds_up_to(86400),
        default=_DEFAULT_S,
        metavar="S",
        help=f"give up after S seconds, exit status 3 (default: {_DEFAULT_S})",
    )


def run(arguments: Arguments) -> Outcome:
    """Waits; ends at once where nothing can come of it: the service halted, or there is no ID scope to start one."""
    started_s = time.monotonic()
    configuration = configuration_of(arguments, need_id_scope=False)
    while True:
        found = _found(configuration, arguments.wanted)
        gone_s = time.monotonic() - started_s
        if found["state"] in _FOR[arguments.wanted]:
            reached = {"waitedFor": arguments.wanted, "waitedS": round(gone_s, 3)}
            return Outcome([f"{arguments.wanted}: {found['assignedHub']}"], {**found, **reached})
        if not found["running"]:
            configuration_of(arguments)  # says that the ID scope is missing, where it is
        elif found["state"] == "halted" and found["lastError"]:
            error = found["lastError"]
            raise AskOperator(error["code"], error["message"], found["waitsForS"], error["requestId"])
        left_s = arguments.timeout - gone_s
        if left_s <= 0:
            text = f"not {arguments.wanted} within {arguments.timeout} s: {_why(found)}"
            if not found["running"]:
                raise RetryLater("agent.not_running", text)
            raise RetryLater("agent.out_of_time", text, found.get("waitsForS"))
        time.sleep(min(LOOK_EVERY_S, left_s))


def _found(configuration: Configuration, wanted: str) -> dict[str, Any]:
    """Where the device stands; the stored records, which few users may read, are looked at where they can help."""
    from dps_agent.host.local.statefile import read_live

    if wanted == "connected" and read_live(configuration) is None:
        reason = f"no service runs with the state folder {configuration.state_dir}"
        return {"running": False, "state": "", "reason": reason}
    return dict(stand(configuration).document)


def _why(found: dict[str, Any]) -> str:
    return ": ".join(filter(None, (found["state"], found["reason"])))


VERB = Verb("wait", "wait until this device is connected to its hub, or has one", add_arguments, run)
