"""Individual TPM enrolments: the service API's record, and what of a list of them a service takes.

A record as JSON: `{"registrationId", "deviceId"?, "attestation": {"type": "tpm", "tpm": {"endorsementKey"}},
"iotHubHostName"?, "iotHubs"?, "allocationPolicy"?, "provisioningStatus"?, "reprovisionPolicy"?:
{"updateHubAssignment", "migrateDeviceData"}, …}`. Source: DPS service API, individualEnrollment.
"""

import base64
import binascii
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from dps_emulator.tpm_keys import parse_endorsement_key
from dps_text.enrolments import Odd, Other, read_enrolments

# Letters, digits and `: . _ -`, at most 128, beginning with a letter or digit. Documents disagree about the last
# character; a dash is taken there, `: . _` are not.
REGISTRATION_ID_GRAMMAR = (
    "1 to 128 letters, digits and : . _ - that begins with a letter or digit, and does not end in : . _"
)
_REGISTRATION_ID = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9:._-]{0,126}[A-Za-z0-9-])?")
_DEVICE_ID = re.compile(r"[A-Za-z0-9\-.%_*?!(),:=@$']{1,128}")
_HUB = re.compile(
    r"(?=.{1,253}$)[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?(?:\.[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?)*"
)
ALLOCATION_POLICIES = ("static", "hashed", "geoLatency", "custom", "rotate")


class EnrollmentError(ValueError):
    """An enrolment record that can't be used; the message says why."""


@dataclass(frozen=True)
class Enrollment:
    """One individual enrolment."""

    registration_id: str
    endorsement_key: bytes  # marshalled TPM2B_PUBLIC
    device_id: str = ""  # empty: the registration id
    hubs: tuple[str, ...] = ()  # empty: all linked hubs
    allocation_policy: str = ""  # empty: the service's own
    enabled: bool = True
    update_hub_assignment: bool = True
    migrate_device_data: bool = True
    rest: Mapping[str, Any] = field(default_factory=dict)  # fields the emulator keeps but does not act on

    def to_json(self) -> dict[str, Any]:
        """The record as the service API prints it."""
        record = dict(self.rest)
        record["registrationId"] = self.registration_id
        record["attestation"] = {
            "type": "tpm",
            "tpm": {"endorsementKey": base64.b64encode(self.endorsement_key).decode()},
        }
        if self.device_id:
            record["deviceId"] = self.device_id
        if self.hubs:
            record["iotHubs"] = list(self.hubs)
        if self.allocation_policy:
            record["allocationPolicy"] = self.allocation_policy
        record["provisioningStatus"] = "enabled" if self.enabled else "disabled"
        record["reprovisionPolicy"] = {
            "updateHubAssignment": self.update_hub_assignment,
            "migrateDeviceData": self.migrate_device_data,
        }
        return record


def registration_key(registration_id: str) -> str:
    """What registrations and enrolments are keyed by: ids are compared without case."""
    return registration_id.lower()


def is_registration_id(text: str) -> bool:
    """Whether `text` follows the grammar of registration ids."""
    return _REGISTRATION_ID.fullmatch(text) is not None


def is_device_id(text: str) -> bool:
    """Whether `text` is within the characters and the length that a hub allows for a device id."""
    return _DEVICE_ID.fullmatch(text) is not None


def is_hub_name(text: str) -> bool:
    """Whether `text` is a DNS name without port or scheme."""
    return _HUB.fullmatch(text) is not None


def enrollment_from_json(record: object) -> Enrollment:
    """Checks one record; raises EnrollmentError that names the field."""
    if not isinstance(record, dict):
        raise EnrollmentError("an enrolment is a JSON object")
    rest = dict(record)
    registration_id = _text(rest.pop("registrationId", None), "registrationId")
    if not is_registration_id(registration_id):
        raise EnrollmentError(f"registrationId {registration_id!r} is not {REGISTRATION_ID_GRAMMAR}")

    def wrong(field_name: str, expected: str) -> EnrollmentError:
        return EnrollmentError(f"{registration_id}: {field_name} is not {expected}")

    attestation = rest.pop("attestation", None)
    tpm = attestation.get("tpm") if isinstance(attestation, dict) else None
    if not isinstance(attestation, dict) or attestation.get("type", "tpm") != "tpm" or not isinstance(tpm, dict):
        raise wrong("attestation", 'of the form {"type": "tpm", "tpm": {"endorsementKey": …}}')
    try:
        endorsement_key = base64.b64decode(_text(tpm.get("endorsementKey"), "endorsementKey"), validate=True)
        parse_endorsement_key(endorsement_key)
    except (binascii.Error, ValueError) as error:
        raise EnrollmentError(f"{registration_id}: the endorsement key can't be enrolled: {error}") from None

    device_id = _text(rest.pop("deviceId", "") or "", "deviceId")
    if device_id and not is_device_id(device_id):
        raise wrong("deviceId", "1 to 128 of the characters a hub allows")
    hubs = rest.pop("iotHubs", None) or []
    hub = rest.pop("iotHubHostName", None)
    if hub and not hubs:
        hubs = [hub]
    if not isinstance(hubs, list) or not all(isinstance(name, str) and is_hub_name(name) for name in hubs):
        raise wrong("iotHubs", "a list of DNS names")
    policy = rest.pop("allocationPolicy", "") or ""
    if policy and policy not in ALLOCATION_POLICIES:
        raise wrong("allocationPolicy", "one of " + ", ".join(ALLOCATION_POLICIES))
    provisioning_status = rest.pop("provisioningStatus", None) or "enabled"
    if provisioning_status not in ("enabled", "disabled"):
        raise wrong("provisioningStatus", "'enabled' or 'disabled'")
    reprovision = rest.pop("reprovisionPolicy", None) or {}
    if not isinstance(reprovision, dict):
        raise wrong("reprovisionPolicy", "an object")
    update = reprovision.get("updateHubAssignment", True)
    migrate = reprovision.get("migrateDeviceData", True)
    if not isinstance(update, bool) or not isinstance(migrate, bool):
        raise wrong("reprovisionPolicy", "of two booleans, updateHubAssignment and migrateDeviceData")
    return Enrollment(
        registration_id,
        endorsement_key,
        device_id,
        tuple(hubs),
        policy,
        provisioning_status == "enabled",
        update,
        migrate,
        rest,
    )


class Imported(NamedTuple):
    """What a file of enrolments holds: those of TPMs, and what is none."""

    enrollments: list[Enrollment]
    others: list[Other]
    odd: list[Odd]


def read_enrollments(text: str) -> Imported:
    """The enrolments of a file, JSON or CSV; ListError where it is neither. `dps_text.enrolments` has both forms."""
    listed = read_enrolments(text)
    found = Imported([], listed.others, list(listed.odd))
    for line, record in listed.entries:
        try:
            found.enrollments.append(enrollment_from_json(record))
        except EnrollmentError as error:
            found.odd.append(Odd(line, str(error)))
    found.odd.sort()
    return found


def _text(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise EnrollmentError(f"{name} is not a string")
    return value
