"""`dps-agent status`: where the device stands, why, and what comes next; offline, from the stored records alone."""

import argparse
from typing import Any

from dps_agent.host.cli.verb import Outcome, Verb, backend_shown, configuration_of, no_arguments, table, time_shown
from dps_agent.host.config import Configuration
from dps_hal.codes import REMEDIES
from dps_hal.contracts import IDENTITY, PROGRESS
from dps_hal.errors import DpsError, IdentityStale

_OF_THE_DEVICE = ("tpm", "store", "record")  # areas of errors that put the stored identity itself in question
_CODES = {"provisioned": "ok", "waiting": "retry", "halted": "refused"}  # anything else is "not yet": retry


def run(arguments: argparse.Namespace) -> Outcome:
    """Reads the records; needs no TPM, no network and no permission to write."""
    from dps_agent.assignment import Assignment, decode, difference
    from dps_agent.lifecycle import HALTED, PROVISIONED, WAITING, Progress, decode_progress
    from dps_hal.files import open_store

    configuration = configuration_of(arguments, need_id_scope=False)
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
    if failed is not None and (not holds or failed.code.split(".")[0] in _OF_THE_DEVICE):
        state, code, reason = HALTED if failed.halted else WAITING, failed.code, failed.message
    elif assignment is not None and holds:
        state, code, reason = PROVISIONED, "", f"assigned to {assignment.assigned_hub}"
    remedy = REMEDIES.get(code, "")
    document: dict[str, Any] = {
        "state": state,
        "reason": reason,
        "next": remedy,
        "backend": configuration.tpm.backend,
        "stateDir": configuration.state_dir,
        "assignment": _assignment_document(assignment) if assignment is not None else None,
        "recordGeneration": stored.generation if stored is not None else None,
        "rolledBack": stored is not None and stored.rolled_back,
        "failedAttempts": failed.attempts if failed is not None else 0,
        "lastError": _last_error(failed) if failed is not None else None,
    }
    if state != PROVISIONED:
        document["error"] = {
            "code": code,
            "message": reason,
            "remedy": remedy,
            "retryAfterS": failed.next_try_delay_s if failed is not None else None,
            "requestId": "",
        }
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
            ("state folder", configuration.state_dir),
            ("record", "a newer copy was damaged, an older one serves" if document["rolledBack"] else ""),
            ("failed attempts", str(document["failedAttempts"] or "")),
            ("last error", f"{last_error['message']} [{last_error['code']}]" if last_error else ""),
        ]
    )


def _assignment_document(assignment: Any) -> dict[str, Any]:
    """What may be shown of an assignment: all but the wrapped key."""
    return {
        "assignedHub": assignment.assigned_hub,
        "deviceId": assignment.device_id,
        "registrationId": assignment.registration_id,
        "idScope": assignment.id_scope,
        "endpoint": assignment.endpoint,
        "substatus": assignment.substatus,
        "assignedAt": time_shown(assignment.assigned_at_s),
        "lastUpdatedUtc": assignment.last_updated_utc,
        "payload": assignment.payload,
        "payloadOmitted": assignment.payload_omitted,
    }


def _last_error(failed: Any) -> dict[str, Any]:
    return {"code": failed.code, "message": failed.message, "remedy": REMEDIES.get(failed.code, "")}


def _progress(store: Any, record: str, decode_progress: Any) -> Any:
    """The record `progress`, None where there is none that can be read: it is expendable."""
    try:
        stored = store.load(record)
    except DpsError:
        return None
    return decode_progress(stored.payload) if stored is not None else None


VERB = Verb("status", "show where this device stands, from its records alone", no_arguments, run)
