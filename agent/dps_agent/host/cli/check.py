"""`dps-agent check`: whether this device can do what a registration takes, without asking any service."""

import argparse
from typing import Any

from dps_agent.host.cli.verb import Outcome, UsageError, Verb, configuration_of, error_document, exit_word


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which checks to run."""
    parser.add_argument(
        "--only", metavar="ID", action="append", default=[], help="run this check and what it needs; may be repeated"
    )
    parser.add_argument(
        "--offline", action="store_true", help="leave the network alone; every check of this version does"
    )


def run(arguments: argparse.Namespace) -> Outcome:
    """Runs the checks; the first that failed decides the exit status."""
    from dps_agent.host.checks import CHECKS, Device, run_checks

    ids = [check.id for check in CHECKS]
    for name in arguments.only:
        if name not in ids:
            raise UsageError(f"--only: expected one of {', '.join(ids)}; came {name!r}")
    found = run_checks(Device(lambda: configuration_of(arguments, need_id_scope=False)), arguments.only)
    width = max(len(check.id) for check, _ in found) + 2
    lines: list[str] = []
    checks: list[dict[str, Any]] = []
    for check, finding in found:
        error = finding.error
        lines.append(f"{finding.result:<9}{check.id:<{width}}{finding.detail}")
        if finding.remedy and finding.result != "ok":
            lines.append(" " * (9 + width) + finding.remedy + (f"  [{error.code}]" if error is not None else ""))
        checks.append(
            {
                "id": check.id,
                "description": check.description,
                "result": finding.result,
                "detail": finding.detail,
                "remedy": finding.remedy,
                "code": error.code if error is not None else "",
            }
        )
    document: dict[str, Any] = {"checks": checks}
    failed = next((finding for _, finding in found if finding.error is not None), None)
    if failed is None or failed.error is None:
        return Outcome(lines, document)
    document["error"] = {**error_document(failed.error), "remedy": failed.remedy}
    return Outcome(lines, document, exit_word(failed.error))


VERB = Verb("check", "check settings and TPM: whether this device can register", add_arguments, run)
