"""`dps-agent enroll`: what the Device Provisioning Service must know of this device, in the form it is wanted."""

from __future__ import annotations

import sys

from dps_agent.host.cli.verb import Outcome, UsageError, Verb, configuration_of, table
from dps_agent.host.config import Configuration, backend_shown, secret_in
from dps_agent.host.settings_table import KEY_FILE_LIMIT, is_registration_id
from dps_agent.settings import AUTO, SYMMETRIC_KEY, X509
from dps_hal.errors import AskOperator

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from dps_agent.host.cli.verb import Arguments, Declared

FORMATS = ("text", "csv", "json", "az")


def add_arguments(parser: Declared) -> None:
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
    parser.add_argument(
        "--derive",
        metavar="FILE",
        default=None,
        help="on the maker's side: print the key of one device of an enrolment group, whose own key is in FILE (0600)",
    )
    parser.add_argument(
        "--x509",
        action="store_true",
        help="make the key of the device's certificate, unless it is there, and print the request for the certificate",
    )
    parser.add_argument(
        "--key-in-file",
        action="store_true",
        help="with --x509: the key is to lie in a file, in the clear, for a device whose TPM is not to have it",
    )
    parser.add_argument(
        "--id",
        metavar="ID",
        default=None,
        help="with --derive: the device's registration id (default: registration_id of the settings)",
    )


def run(arguments: Arguments) -> Outcome:
    """Reads the endorsement key and says how to enrol it, or adds it to a file."""
    if arguments.derive is not None:
        return _derived(arguments)
    if arguments.key_in_file and not arguments.x509:
        raise UsageError("--key-in-file goes with --x509: it says where the key of the certificate lies")
    if arguments.id is not None:
        raise UsageError("--id goes with --derive; registration_id of the settings is this device's own")
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
    if arguments.x509:
        return _request(configuration, arguments)
    if configuration.attestation == SYMMETRIC_KEY:
        return _of_key(configuration, form)
    if configuration.attestation == X509:
        return _of_certificate(configuration, form)
    endorsement_key, certified = endorsement(configuration)
    derived = registration_id_from_ek(endorsement_key)
    fingerprint = sha256(endorsement_key).hex()
    enrolment = Enrolment(
        derived if configuration.registration_id == AUTO else configuration.registration_id,
        to_base64(endorsement_key),
        configuration.backend,
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
        "backend": configuration.backend,
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


def _of_key(configuration: Configuration, form: str) -> Outcome:
    """A device with a key of its own: what DPS has to have is that key, which is not shown."""
    _refuse_form(form)
    rows = [
        ("registration id", configuration.registration_id.lower()),
        ("attestation", "symmetric key: enrol the device by its key, or by the group that its key was derived for"),
        ("TPM", backend_shown(configuration)),
    ]
    document = {
        "registrationId": configuration.registration_id.lower(),
        "attestation": SYMMETRIC_KEY,
        "backend": configuration.backend,
    }
    return Outcome(table(rows), document)


def _of_certificate(configuration: Configuration, form: str) -> Outcome:
    """A device with a certificate: DPS has to have that itself, or a CA above it."""
    from dps_agent.host.device_certificates import require_cryptography

    _refuse_form(form)
    require_cryptography()
    from dps_agent.host.certificate_requests import installed

    found = installed(configuration)
    rows = [
        ("registration id", configuration.registration_id),
        ("attestation", "X.509: enrol the device by its certificate, or by a group of a CA that stands above it"),
        ("certificate", configuration.certificate_file),
        ("issued by", found.issuer),
        ("until", found.not_after),
        ("SHA-256", found.sha256),
        ("TPM", backend_shown(configuration)),
    ]
    document = {
        "registrationId": configuration.registration_id,
        "attestation": X509,
        "backend": configuration.backend,
        "issuer": found.issuer,
        "notAfter": found.not_after,
        "sha256": found.sha256,
    }
    return Outcome(table(rows), document)


def _refuse_form(form: str) -> None:
    if form not in ("", "json", "text"):
        raise AskOperator(
            "agent.no_tpm", f"--format {form} is for a TPM's endorsement key: this device has none enrolled"
        )


def _request(configuration: Configuration, arguments: Arguments) -> Outcome:
    """The request for the device's certificate, and nothing else on stdout."""
    from dps_agent.host.device_certificates import require_cryptography

    if arguments.append is not None or arguments.format is not None:
        raise UsageError("--x509 prints a request and nothing else: leave out --format and --append")
    require_cryptography()
    from dps_agent.host.certificate_requests import request

    pem, made = request(configuration, arguments.key_in_file)
    if made:
        by = "" if arguments.key_in_file else " by the TPM, which alone can use it"
        print(f"dps-agent: the key was made{by}, in {configuration.device_key_file}", file=sys.stderr)
    document = {"registrationId": configuration.registration_id, "certificateRequest": pem, "keyMade": made}
    return Outcome(pem.splitlines(), document)


def _derived(arguments: Arguments) -> Outcome:
    """The key of one device of a group; the group's own key stays where it is."""
    from dps_hal.device_key import derived_key, key_in
    from dps_hal.platform import to_base64

    if arguments.append is not None or arguments.format is not None:
        raise UsageError("--derive prints a key and nothing else: leave out --format and --append")
    registration_id = arguments.id
    if registration_id is None:
        registration_id = configuration_of(arguments, need_id_scope=False).registration_id
        if registration_id == AUTO:
            raise UsageError("--derive: expected --id with the device's registration id")
    elif not is_registration_id(registration_id):
        raise UsageError(f"--id: expected a registration id; came {registration_id!r}")
    try:
        group_key = key_in(bytes(secret_in("--derive", arguments.derive, KEY_FILE_LIMIT)).strip().decode("latin-1"))
    except ValueError as error:
        raise AskOperator("config.invalid", f"--derive: {error} ({arguments.derive})") from None
    if registration_id != registration_id.lower():
        print(f"dps-agent: the key is for {registration_id.lower()!r}, as DPS is told", file=sys.stderr)
    key = to_base64(derived_key(group_key, registration_id.lower()))
    return Outcome([key], {"registrationId": registration_id.lower(), "deviceKey": key})


def _file_format(path: str, form: str) -> str:
    """How the file is written; UsageError where nothing says so."""
    ending = path.rpartition(".")[2]
    if form and ending in ("csv", "json") and form != ending:
        raise UsageError(f"--append: {path} is {ending.upper()} by its name; came --format {form}")
    form = form or ending
    if form not in FORMATS[1:]:
        raise UsageError("--append: expected --format csv, json or az, or a file whose name ends in .csv or .json")
    return form


VERB = Verb("enroll", "show what to enter in the Device Provisioning Service", add_arguments, run)
