"""`dps-agent status`: where the device stands, why, and what comes next.

Offline and without the TPM: from what the running service says of itself, else from the stored records alone.
"""

from __future__ import annotations

import os
import sys
import time

from dps_agent.host.cli.running import UNSEEN, ask_service, unseen_settings
from dps_agent.host.cli.verb import Outcome, Verb, configuration_of, table
from dps_agent.host.config import NO_ID_SCOPE, Configuration, ConfigurationError, backend_shown
from dps_agent.host.error_document import error_fields
from dps_agent.settings import X509
from dps_hal.contracts import IDENTITY, PROGRESS
from dps_hal.errors import AskOperator, DpsError, IdentityStale
from dps_hal.host.codes import REMEDIES

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from dps_agent.host.cli.verb import Arguments, Declared

_OF_THE_DEVICE = ("tpm", "store", "record")  # areas of errors that put the stored identity itself in question
_CODES = {  # states of `dps_agent.lifecycle`, which is not loaded for their names; anything else is "not yet": retry
    "provisioned": "ok",
    "connecting": "ok",
    "connected": "ok",
    "waiting": "retry",
    "halted": "refused",
}


def add_arguments(parser: Declared) -> None:
    """Whether to ask DPS."""
    parser.add_argument(
        "--remote",
        action="store_true",
        help="also ask DPS what it has on record; needs TPM and network, and costs a registration from the quota",
    )


def run(arguments: Arguments) -> Outcome:
    """Needs no permission to write, and neither TPM nor network without --remote."""
    try:
        configuration = configuration_of(arguments, need_id_scope=arguments.remote)
    except ConfigurationError:  # they alone say which service is meant
        print("dps-agent: a service that runs goes on with the settings that it has", file=sys.stderr)
        raise
    outcome = stand(configuration)
    if outcome.document["running"] and (unseen := unseen_settings(configuration)):
        print(f"dps-agent: --set {unseen[0]}: {UNSEEN}", file=sys.stderr)
    if not arguments.remote:
        return outcome
    allowed = ask_service(configuration, "/command/status")
    from dps_agent.host.parts import remote_status

    found = remote_status(configuration, service_allows=allowed is not None)
    said = found["remote"]
    rows = [
        ("DPS says", f"{said['status'] or 'nothing'} {said['substatus']}".rstrip()),
        ("hub", said["assignedHub"]),
        ("device", said["deviceId"]),
        ("last updated", said["lastUpdatedUtc"]),
        ("error", f"{said['errorMessage']} [{said['errorCode']}]" if said["errorCode"] else ""),
        *(("differs", text) for text in found["differences"]),
    ]
    return Outcome([*outcome.lines, "", *table(rows)], {**outcome.document, **found}, outcome.code)


def stand(configuration: Configuration) -> Outcome:
    """Where the device stands, by the service that runs, else by the stored records."""
    from dps_agent.host.local.statefile import read_live

    live = read_live(configuration)
    if live is None:
        return _of_records(configuration)
    try:
        return _of_service(configuration, live)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        text = f"the service's file in {configuration.runtime_dir} is damaged: {type(error).__name__}: {error}"
        raise AskOperator("agent.file", text) from None


def _of_service(configuration: Configuration, live: dict[str, Any]) -> Outcome:
    """What the service that runs has said of itself."""
    from dps_agent.host.local.statefile import FLEET_REFUSED

    now_s = time.monotonic()
    waits_until_s = live["untilUptimeS"]
    left_s = max(round(waits_until_s - now_s), 0) if waits_until_s is not None else None
    error = live["lastError"]
    code = _CODES.get(live["state"], "retry")
    document: dict[str, Any] = {
        **{name: value for name, value in live.items() if name not in ("schema", "startTicks")},
        "running": True,
        "forS": max(round(now_s - live["sinceUptimeS"]), 0),
        "waitsForS": left_s,
    }
    if code != "ok" and error is not None:
        document["error"] = {**error, "retryAfterS": left_s}
    rows = [
        ("state", f"{live['state']} for {document['forS']} s, since {live['since']}"),
        ("why", live["reason"]),
        ("until", f"{live['until']} (in {left_s} s)" if left_s is not None else ""),
        ("hub", live["assignedHub"]),
        ("hub lacks", ", ".join(live.get("hubLacks", ()))),
        ("fleet", FLEET_REFUSED if live.get("fleetRefused") else ""),
        ("device", live["deviceId"]),
        ("registration id", live["registrationId"]),
        ("connections", str(live["connections"])),
        ("TPM", backend_shown(configuration)),
        ("certificate", _certificate(configuration)),
        ("state folder", os.path.abspath(configuration.state_dir)),
        ("socket", live["socket"]),
        ("service", f"process {live['pid']}, dps-agent {live['version']}"),
        ("failed attempts", str(live["failedAttempts"] or "")),
        ("last error", f"{error['message']} [{error['code']}]" if error else ""),
        ("next", live.get("next", "")),
    ]
    return Outcome(table(rows), document, code)


def _of_records(configuration: Configuration) -> Outcome:
    """What the stored records say; no service runs."""
    from dps_agent.assignment import Assignment, decode, difference
    from dps_agent.host.local.statefile import assignment_document
    from dps_agent.progress import Progress, decode_progress
    from dps_hal.host.state_dir import open_store

    store = open_store(configuration.state_dir)
    stored = store.load(IDENTITY)
    progress = _progress(store, PROGRESS, decode_progress)
    assignment: Assignment | None = None
    state, code, reason = "unprovisioned", "record.absent", "no assignment is stored"
    if stored is not None:
        try:
            assignment, _, _ = decode(stored.payload)
            reason = difference(assignment, configuration.settings()) if configuration.id_scope else ""
            code = "record.stale"
        except IdentityStale as error:
            code, reason = error.code, error.message
    holds = assignment is not None and not reason
    failed: Progress | None = progress if progress is not None and progress.attempts else None
    if failed and configuration.id_scope and failed.under not in (0, configuration.settings().under):
        failed = None  # under other settings
    if failed is not None and (not holds or failed.code.split(".")[0] in _OF_THE_DEVICE):
        state, code, reason = "halted" if failed.halted else "waiting", failed.code, failed.message
    elif assignment is not None and holds:
        state, code, reason = "provisioned", "", f"assigned to {assignment.assigned_hub}"
    remedy = REMEDIES.get(code, "")
    if not configuration.id_scope:
        remedy = configuration.id_scope_remedy
        if not holds:
            state, code, reason = "unprovisioned", "config.missing", NO_ID_SCOPE
    document: dict[str, Any] = {
        "running": False,
        "state": state,
        "reason": reason,
        "next": remedy,
        "backend": configuration.backend,
        "stateDir": os.path.abspath(configuration.state_dir),
        "assignedHub": assignment.assigned_hub if assignment is not None else "",
        "deviceId": assignment.device_id if assignment is not None else "",
        "registrationId": assignment.registration_id if assignment is not None else "",
        "substatus": assignment.substatus if assignment is not None else "",
        "assignment": assignment_document(assignment) if assignment is not None else None,
        "recordGeneration": stored.generation if stored is not None else None,
        "rolledBack": stored is not None and stored.rolled_back,
        "failedAttempts": failed.attempts if failed is not None else 0,
        "lastError": _last_error(failed) if failed is not None else None,
    }
    if state != "provisioned":
        retry_after_s = failed.next_try_delay_s if failed is not None else None
        document["error"] = {**error_fields(code, reason, retry_after_s), "remedy": remedy}
    return Outcome(_lines(configuration, document), document, _CODES.get(state, "retry"))


def _lines(configuration: Configuration, document: dict[str, Any]) -> list[str]:
    assignment: dict[str, Any] = document["assignment"] or {}
    last_error: dict[str, Any] = document["lastError"] or {}
    return table(
        [
            ("state", document["state"]),
            ("why", document["reason"]),
            ("next", document["next"]),
            ("hub", assignment.get("assignedHub", "")),
            ("device", assignment.get("deviceId", "")),
            ("registration id", assignment.get("registrationId", "")),
            ("ID scope", assignment.get("idScope", "")),
            ("endpoint", assignment.get("endpoint", "")),
            ("assigned at", assignment.get("assignedAt", "")),
            ("TPM", backend_shown(configuration)),
            ("certificate", _certificate(configuration)),
            ("state folder", os.path.abspath(configuration.state_dir)),
            ("record", "a newer copy was damaged, an older one serves" if document["rolledBack"] else ""),
            ("failed attempts", str(document["failedAttempts"] or "")),
            ("last error", f"{last_error['message']} [{last_error['code']}]" if last_error else ""),
        ]
    )


def _certificate(configuration: Configuration) -> str:
    """How long the device's certificate is good; "" for a device that shows none."""
    shown = []
    if configuration.attestation == X509:
        from dps_agent.host.device_certificates import certificate_shown

        shown.append(certificate_shown(configuration))
    if configuration.certificate:
        from dps_agent.host.issued_keys import issued_shown

        shown.append(issued_shown(configuration))
    return "; ".join(shown)


def _last_error(failed: Any) -> dict[str, Any]:
    return {"code": failed.code, "message": failed.message, "remedy": REMEDIES.get(failed.code, "")}


def _progress(store: Any, record: str, decode_progress: Any) -> Any:
    """The record `progress`, None where there is none that can be read: it is expendable."""
    try:
        stored = store.load(record)
    except DpsError:
        return None
    return decode_progress(stored.payload) if stored is not None else None


VERB = Verb("status", "show where this device stands, without TPM and network", add_arguments, run)
