"""`dps-agent provision`: registers once and shows each step."""

import argparse
import dataclasses
import sys
from typing import Any

from dps_agent.host.cli.verb import Outcome, Verb, backend_shown, configuration_of, seconds_up_to, table
from dps_agent.host.progress import StepLines, printable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """When to register again, and when to give up."""
    parser.add_argument("--force", action="store_true", help="register again although the stored assignment holds")
    parser.add_argument(
        "--timeout",
        type=seconds_up_to(86400),
        default=None,
        metavar="S",
        help="give up after S seconds (exit status 3)",
    )


def run(arguments: argparse.Namespace) -> Outcome:
    """Registers unless the stored assignment holds; progress goes to stderr, the assignment to stdout."""
    configuration = configuration_of(arguments)
    from dps_agent.host.device import provision_once

    provisioned = provision_once(
        configuration,
        force=arguments.force,
        timeout_s=arguments.timeout,
        steps=StepLines(sys.stderr, arguments.verbose),
        with_signals=True,
    )
    for warning in provisioned.warnings:
        print(f"dps-agent: {printable(warning)}", file=sys.stderr)
    document: dict[str, Any] = {_camel(name): value for name, value in dataclasses.asdict(provisioned).items()}
    title = "already provisioned, nothing was done (--force registers again)"
    lines = [
        title if provisioned.already_provisioned else "provisioned",
        *table(
            [
                ("  hub", provisioned.assigned_hub),
                ("  device", provisioned.device_id),
                ("  registration id", provisioned.registration_id),
                ("  substatus", provisioned.substatus),
                ("  TPM", backend_shown(configuration)),
                ("  took", f"{provisioned.duration_s:.2f} s"),
            ]
        ),
    ]
    return Outcome(lines, document)


def _camel(name: str) -> str:
    first, *rest = name.split("_")
    return first + "".join(word.capitalize() for word in rest)


VERB = Verb("provision", "get this device's hub now, once", add_arguments, run)
