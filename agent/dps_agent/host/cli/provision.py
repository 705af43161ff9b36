"""`dps-agent provision`: registers once and shows each step."""

from __future__ import annotations

import sys
import time

from dps_agent.host.cli.running import ask_service
from dps_agent.host.cli.verb import Outcome, Verb, configuration_of, seconds_up_to, table
from dps_agent.host.config import Configuration, backend_shown
from dps_agent.host.printed import printable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from dps_agent.host.cli.verb import Arguments, Declared


def add_arguments(parser: Declared) -> None:
    """When to register again, and when to give up."""
    parser.add_argument("--force", action="store_true", help="register again although the stored assignment holds")
    parser.add_argument(
        "--timeout",
        type=seconds_up_to(86400),
        default=None,
        metavar="S",
        help="give up after S seconds, exit status 3 (default: registration_budget_s of [retry])",
    )


def run(arguments: Arguments) -> Outcome:
    """Registers unless the stored assignment holds; progress goes to stderr, the assignment to stdout."""
    configuration = configuration_of(arguments)
    started_s = time.monotonic()
    timeout_s = arguments.timeout or configuration.retry.registration_budget_s + 60
    force = "true" if arguments.force else "false"
    answer = ask_service(configuration, f"/command/provision?force={force}", timeout_s)
    if answer is not None:
        own = {
            "backend": configuration.backend,
            "durationS": round(time.monotonic() - started_s, 3),
            "warnings": [],
        }
        return _outcome(configuration, {**answer, **own})
    from dps_agent.host.parts import provision_once
    from dps_agent.host.steps import StepLines

    provisioned = provision_once(
        configuration,
        force=arguments.force,
        timeout_s=arguments.timeout,
        steps=StepLines(sys.stderr, arguments.verbose),
        with_signals=True,
    )
    for warning in provisioned.warnings:
        print(f"dps-agent: {printable(warning)}", file=sys.stderr)
    document: dict[str, Any] = {_camel(name): value for name, value in provisioned._asdict().items()}
    return _outcome(configuration, document)


def _outcome(configuration: Configuration, document: dict[str, Any]) -> Outcome:
    title = "already provisioned, nothing was done (--force registers again)"
    lines = [
        title if document["alreadyProvisioned"] else "provisioned",
        *table(
            [
                ("  hub", document["assignedHub"]),
                ("  device", document["deviceId"]),
                ("  registration id", document["registrationId"]),
                ("  substatus", document["substatus"]),
                ("  TPM", backend_shown(configuration)),
                ("  took", f"{document['durationS']:.2f} s"),
            ]
        ),
    ]
    return Outcome(lines, document)


def _camel(name: str) -> str:
    first, *rest = name.split("_")
    return first + "".join(word.capitalize() for word in rest)


VERB = Verb("provision", "get this device's hub now, once", add_arguments, run)
