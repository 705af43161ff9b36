"""`dps-agent enroll`: what the Device Provisioning Service must know of this TPM, in the form it is wanted."""

from __future__ import annotations

import argparse

from dps_agent.host.cli.verb import Outcome, UsageError, Verb, configuration_of, table
from dps_agent.host.config import backend_shown
from dps_agent.settings import AUTO

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

FORMATS = ("text", "csv", "json", "az")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The form of the output, and where it goes."""
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default=None,
        help="text (default), a CSV line with its header, the JSON of the service's API, or an Azure CLI command",
    )
    parser.add_argument(
        "--append",
        metavar="FILE",
        default=None,
        help="add this device to a file of many: csv, json or az, by --format or by the end of the file's name",
    )


def run(arguments: argparse.Namespace) -> Outcome:
    """Reads the endorsement key and says how to enrol it, or adds it to a file."""
    from dps_agent.host.enrolment import CSV_HEADER, Enrolment, append
    from dps_agent.host.parts import endorsement
    from dps_hal.platform import sha256, to_base64, to_json
    from dps_hal.tpm import ek_certificate
    from dps_hal.tpm.keys import registration_id_from_ek

    form: str = arguments.format or ""
    if arguments.append is not None:
        form = _file_format(arguments.append, form)
    elif arguments.json and form not in ("", "json"):
        raise UsageError(f"--json and --format {form} exclude each other")
    configuration = configuration_of(arguments, need_id_scope=False)
    endorsement_key, certified = endorsement(configuration)
    derived = registration_id_from_ek(endorsement_key)
    fingerprint = sha256(endorsement_key).hex()
    enrolment = Enrolment(
        derived if configuration.registration_id == AUTO else configuration.registration_id,
        to_base64(endorsement_key),
        configuration.tpm.backend,
        certified.sha256,
    )
    document: dict[str, Any] = {
        "registrationId": enrolment.registration_id,
        "endorsementKey": enrolment.endorsement_key,
        "derivedIds": {"base32": derived, "hex": fingerprint},
        "ekCertificate": certified.verdict,
        "ekCertificateSha256": enrolment.certificate_sha256,
        "ekTemplate": "tcg-l1" if certified.verdict == ek_certificate.MATCH else None,
        "ekTemplateInNv": certified.by_maker,
        "backend": configuration.tpm.backend,
    }
    if arguments.append is not None:
        count, notes = append(arguments.append, form, enrolment)
        text = f"{enrolment.registration_id} was added to {arguments.append}, which has {count}"
        text += " device now" if count == 1 else " devices now"
        lines = [text, *(f"not counted: {note}" for note in notes)]
        return Outcome(lines, {**document, "file": arguments.append, "devices": count, "notCounted": notes})
    if form == "csv":
        return Outcome([CSV_HEADER, enrolment.csv_row()], document)
    if form == "json":
        return Outcome([to_json(enrolment.body())], document)
    if form == "az":
        return Outcome(enrolment.az_lines(), document)
    rows = [
        ("registration id", enrolment.registration_id),
        ("endorsement key", enrolment.endorsement_key),
        ("derived ids", f"{derived} (base32 of SHA-256, as Microsoft's tools)"),
        ("", f"{fingerprint} (hex of SHA-256, as the IoT Edge script)"),
        ("EK certificate", ek_certificate.SAYS[certified.verdict]),
        *([("", certified.locked)] if certified.locked else []),
        *([("certified key", certified.template)] if certified.by_maker else []),
        ("TPM", backend_shown(configuration)),
    ]
    return Outcome(table(rows), document)


def _file_format(path: str, form: str) -> str:
    """How the file is written; UsageError where nothing says so."""
    form = form or path.rpartition(".")[2]
    if form not in FORMATS[1:]:
        raise UsageError("--append: expected --format csv, json or az, or a file whose name ends in .csv or .json")
    return form


VERB = Verb("enroll", "show what to enter in the Device Provisioning Service", add_arguments, run)
