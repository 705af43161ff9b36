"""`dps-agent enroll`: what the Device Provisioning Service must know of this TPM, in the form it is wanted."""

import argparse
import shlex

from dps_agent.host.cli.verb import Outcome, UsageError, Verb, configuration_of, table
from dps_agent.host.config import Configuration, backend_shown
from dps_agent.settings import AUTO

FORMATS = ("text", "csv", "json", "az")
CSV_HEADER = "registrationId,endorsementKey,backend"

CERTIFICATE_SAYS = {  # by the words of dps_hal.ek_certificate
    "match": "match: it names this endorsement key, which is therefore of the template tcg-l1",
    "mismatch": "mismatch: it names another key, as for a key of the template azure-c-sdk",
    "absent": "absent: the TPM holds none",
    "unreadable": "unreadable: what the TPM holds is no X.509 certificate of an RSA key",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The form of the output."""
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default=None,
        help="text (default), a CSV line with its header, the JSON of the service's API, or an Azure CLI command",
    )


def run(arguments: argparse.Namespace) -> Outcome:
    """Reads the endorsement key and says how to enrol it."""
    from dps_agent.host.device import endorsement
    from dps_agent.messages import to_base64
    from dps_hal import ek_certificate
    from dps_hal.platform import sha256, to_json
    from dps_hal.tpm_keys import registration_id_from_ek

    if arguments.json and arguments.format not in (None, "json"):
        raise UsageError(f"--json and --format {arguments.format} exclude each other")
    configuration = configuration_of(arguments, need_id_scope=False)
    endorsement_key, certificate = endorsement(configuration)
    verdict = ek_certificate.compare(certificate, endorsement_key)
    encoded = to_base64(endorsement_key)
    derived = registration_id_from_ek(endorsement_key)
    fingerprint = sha256(endorsement_key).hex()
    registration_id = derived if configuration.registration_id == AUTO else configuration.registration_id
    document = {
        "registrationId": registration_id,
        "endorsementKey": encoded,
        "derivedIds": {"base32": derived, "hex": fingerprint},
        "ekCertificate": verdict,
        "ekTemplate": "tcg-l1" if verdict == ek_certificate.MATCH else None,
        "backend": configuration.tpm.backend,
    }
    if arguments.format == "csv":
        fields = (registration_id, encoded, configuration.tpm.backend)
        return Outcome([CSV_HEADER, ",".join(fields)], document)
    if arguments.format == "json":
        # the body of the service API's "create or update individual enrollment"
        attestation = {"type": "tpm", "tpm": {"endorsementKey": encoded}}
        return Outcome([to_json({"registrationId": registration_id, "attestation": attestation})], document)
    if arguments.format == "az":
        return Outcome(_az(configuration, registration_id, encoded), document)
    rows = [
        ("registration id", registration_id),
        ("endorsement key", encoded),
        ("derived ids", f"{derived} (base32 of SHA-256, as Microsoft's tools)"),
        ("", f"{fingerprint} (hex of SHA-256, as the IoT Edge script)"),
        ("EK certificate", CERTIFICATE_SAYS[verdict]),
        ("TPM", backend_shown(configuration)),
    ]
    return Outcome(table(rows), document)


def _az(configuration: Configuration, registration_id: str, encoded: str) -> list[str]:
    """One command of the Azure CLI's extension azure-iot; names of group and service come from the shell."""
    command = (
        'az iot dps enrollment create --resource-group "$RESOURCE_GROUP" --dps-name "$DPS_NAME"'
        f" --enrollment-id {shlex.quote(registration_id)} --attestation-type tpm"
        f" --endorsement-key {shlex.quote(encoded)}"
    )
    note = ["# simulator: this TPM's keys lie in plain files"] if configuration.tpm.backend == "simulator" else []
    return [*note, command]


VERB = Verb("enroll", "show what to enter in the Device Provisioning Service", add_arguments, run)
