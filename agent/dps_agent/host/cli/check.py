"""`dps-agent check`: whether this device can register and connect, with the cause in the first line where it cannot."""

from __future__ import annotations

from dps_agent.host.cli.verb import (
    Outcome,
    UsageError,
    Verb,
    configuration_of,
    did_you_mean,
    error_document,
    exit_word,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from dps_agent.host.checks import Check, Device, Finding
    from dps_agent.host.cli.verb import Arguments, Declared


def add_arguments(parser: Declared) -> None:
    """Which checks to run."""
    parser.add_argument(
        "--only",
        metavar="ID[,ID]",
        action="append",
        default=[],
        help="run these checks and what they need; may be repeated",
    )
    parser.add_argument("--offline", action="store_true", help="leave the network alone")


def run(arguments: Arguments) -> Outcome:
    """Runs the checks; the first that failed decides the exit status."""
    return examine(arguments)[1]


def examine(arguments: Arguments) -> tuple[Device, Outcome]:
    """Runs the checks; the device as they saw it, and the outcome."""
    from dps_agent.host.checks import CHECKS, Device, run_checks

    online = {check.id: check.online for check in CHECKS}
    only = [name.strip() for names in arguments.only for name in names.split(",")]
    for name in only:
        if name not in online:
            near = did_you_mean(name, online)
            raise UsageError(f"--only: expected some of {', '.join(online)}; came {name!r}{near}")
        if online[name] and arguments.offline:
            raise UsageError(f"--only {name} and --offline exclude each other: {name} uses the network")
    device = Device(lambda: configuration_of(arguments, need_id_scope=False))
    return device, _outcome(run_checks(device, only, arguments.offline))


def _outcome(found: list[tuple[Check, Finding]]) -> Outcome:
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
    before = "".join(f"{finding.detail}; then " for _, finding in found if finding.comes_first)
    for check, finding in found:
        if finding.error is not None:
            document["error"] = {**error_document(finding.error), "remedy": finding.remedy}
            head = [f"failed: {before}{check.id}: {finding.detail}", f"  {finding.remedy}  [{finding.error.code}]"]
            return Outcome([*head, "", *lines], document, exit_word(finding.error))
    warnings = [f"{check.id}: {finding.detail}" for check, finding in found if finding.result == "warning"]
    count = "a warning" if len(warnings) == 1 else f"{len(warnings)} warnings, the first"
    head = [f"ok, with {count}: {warnings[0]}" if warnings else "ok: nothing is in the way"]
    return Outcome([*head, "", *lines], document)


VERB = Verb("check", "look for what keeps this device from its hub", add_arguments, run)
