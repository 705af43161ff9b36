"""Enrolments and groups of them: the service API's record, and what of a list of them a service takes.

A record as JSON: `{"registrationId" or "enrollmentGroupId", "deviceId"?, "attestation", "iotHubHostName"?, "iotHubs"?,
"allocationPolicy"?, "credentialPolicyName"?, "provisioningStatus"?, "reprovisionPolicy"?: {"updateHubAssignment",
"migrateDeviceData"}, …}`.
`attestation` is `{"type": "tpm", "tpm": {"endorsementKey"}}`, `{"type": "symmetricKey", "symmetricKey": {"primaryKey",
"secondaryKey"?}}` or `{"type": "x509", "x509": {"clientCertificates": {"primary": {"certificate"}, "secondary"?}}}`, in
which a group has `signingCertificates`. Source: DPS service API, individualEnrollment and enrollmentGroup.
"""

import base64
import binascii
import operator
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from dps_emulator.attestation import Certificates, KeyTextError, SymmetricKeys, key_of
from dps_emulator.certificates import CertificateError, certificate_of, is_authority
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
_POLICY = re.compile(r"[A-Za-z0-9-]{0,64}")  # the length is that of a CN, the rest ours
WAYS = ("tpm", "symmetricKey", "x509")  # of attestation
ALLOCATION_POLICIES = ("static", "hashed", "geoLatency", "custom", "rotate")


class EnrollmentError(ValueError):
    """An enrolment record that can't be used; the message says why."""


Attestation = bytes | SymmetricKeys | Certificates  # bytes: an endorsement key, marshalled TPM2B_PUBLIC


@dataclass(frozen=True)
class Enrollment:
    """One individual enrolment, or a group."""

    registration_id: str  # of a group: its enrollmentGroupId
    attestation: "Attestation"
    device_id: str = ""  # empty: the registration id
    hubs: tuple[str, ...] = ()  # empty: all linked hubs
    allocation_policy: str = ""  # empty: the service's own
    enabled: bool = True
    update_hub_assignment: bool = True
    migrate_device_data: bool = True
    rest: Mapping[str, Any] = field(default_factory=dict)  # fields the emulator keeps but does not act on
    is_group: bool = False
    group: str = ""  # what `member` was asked of
    credential_policy: str = ""  # whose CA issues certificates for its devices; empty: none does

    @property
    def endorsement_key(self) -> bytes | None:
        """Marshalled TPM2B_PUBLIC, or None."""
        return self.attestation if isinstance(self.attestation, bytes) else None

    @property
    def keys(self) -> SymmetricKeys | None:
        """Of a group: those that the keys of its devices are derived from; None where there are none."""
        return self.attestation if isinstance(self.attestation, SymmetricKeys) else None

    @property
    def certificates(self) -> Certificates | None:
        """Of a group: its CAs; None where there are none."""
        return self.attestation if isinstance(self.attestation, Certificates) else None

    def member(self, registration_id: str) -> "Enrollment":
        """What a group is for one device."""
        keys = self.keys.derived(registration_id) if self.keys else self.attestation
        return replace(
            self, registration_id=registration_id, attestation=keys, is_group=False, group=self.registration_id
        )

    def to_json(self, *, with_keys: bool = True) -> dict[str, Any]:
        """The record as the service API prints it; it has symmetric keys only where they are asked for."""
        record = dict(self.rest)
        record["enrollmentGroupId" if self.is_group else "registrationId"] = self.registration_id
        if isinstance(self.attestation, bytes):
            tpm = {"endorsementKey": base64.b64encode(self.attestation).decode()}
            record["attestation"] = {"type": "tpm", "tpm": tpm}
        elif isinstance(self.attestation, Certificates):
            kind = "signingCertificates" if self.is_group else "clientCertificates"
            record["attestation"] = {"type": "x509", "x509": self.attestation.to_json(kind)}
        else:
            keys = self.attestation.to_json() if with_keys else {}
            record["attestation"] = {"type": "symmetricKey", "symmetricKey": keys}
        if self.device_id:
            record["deviceId"] = self.device_id
        if self.hubs:
            record["iotHubs"] = list(self.hubs)
        if self.allocation_policy:
            record["allocationPolicy"] = self.allocation_policy
        if self.credential_policy:
            record["credentialPolicyName"] = self.credential_policy
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
    is_group = "enrollmentGroupId" in rest
    id_name = "enrollmentGroupId" if is_group else "registrationId"
    registration_id = _text(rest.pop(id_name, None), id_name)
    if not is_registration_id(registration_id):
        raise EnrollmentError(f"{id_name} {registration_id!r} is not {REGISTRATION_ID_GRAMMAR}")

    def wrong(field_name: str, expected: str) -> EnrollmentError:
        return EnrollmentError(f"{registration_id}: {field_name} is not {expected}")

    attestation = _attestation(registration_id, rest.pop("attestation", None), is_group)
    if is_group and isinstance(attestation, bytes):
        raise EnrollmentError(f"{registration_id}: attestation is tpm, which groups do not have")
    if is_group and rest.get("deviceId"):
        raise EnrollmentError(f"{registration_id}: deviceId stands in a group, whose devices have their own ids")
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
    credential_policy = rest.pop("credentialPolicyName", "") or ""
    if not isinstance(credential_policy, str) or not _POLICY.fullmatch(credential_policy):
        raise wrong("credentialPolicyName", "a name of at most 64 letters, digits and dashes")
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
        attestation,
        device_id,
        tuple(hubs),
        policy,
        provisioning_status == "enabled",
        update,
        migrate,
        rest,
        is_group,
        credential_policy=credential_policy,
    )


def _attestation(registration_id: str, attestation: object, is_group: bool) -> Attestation:
    """What an enrolment trusts; raises EnrollmentError."""
    kind, content = kind_of(attestation)
    if kind == "tpm":
        try:
            endorsement_key = base64.b64decode(_text(content.get("endorsementKey"), "endorsementKey"), validate=True)
            parse_endorsement_key(endorsement_key)
        except (binascii.Error, ValueError) as error:
            raise EnrollmentError(f"{registration_id}: the endorsement key can't be enrolled: {error}") from None
        return endorsement_key
    if kind == "symmetricKey":
        try:
            primary = key_of(content.get("primaryKey"))
        except KeyTextError as error:
            raise EnrollmentError(f"{registration_id}: symmetricKey.primaryKey {error}") from None
        try:
            secondary = key_of(content["secondaryKey"]) if content.get("secondaryKey") else primary
        except KeyTextError as error:
            raise EnrollmentError(f"{registration_id}: symmetricKey.secondaryKey {error}") from None
        return SymmetricKeys(primary, secondary)
    if kind == "x509":
        return _certificates(registration_id, content, "signingCertificates" if is_group else "clientCertificates")
    forms = ", ".join(f'{{"type": "{way}", "{way}": {{…}}}}' for way in WAYS)
    raise EnrollmentError(f"{registration_id}: attestation is none of {forms}")


def _certificates(registration_id: str, content: dict[str, Any], kind: str) -> Certificates:
    """Those of an attestation by X.509; raises EnrollmentError."""
    listed = content.get(kind)
    if not isinstance(listed, dict):
        why = "; a reference to a CA is of no use here" if content.get("caReferences") else ""
        raise EnrollmentError(f"{registration_id}: x509.{kind} is missing{why}")
    found: list[bytes] = []
    for name in ("primary", "secondary"):
        entry = listed.get(name)
        if entry is None and found:
            continue
        try:
            found.append(certificate_of(entry.get("certificate") if isinstance(entry, dict) else None))
            if kind == "signingCertificates" and not is_authority(found[-1]):
                raise CertificateError("is no CA's, which alone can issue those of a group")
        except CertificateError as error:
            raise EnrollmentError(f"{registration_id}: x509.{kind}.{name}.certificate {error}") from None
    return Certificates(*found)


def kind_of(attestation: object) -> tuple[str, dict[str, Any]]:
    """The way of an enrolment's attestation and what belongs to it; empty where that can't be told."""
    if not isinstance(attestation, dict):
        return "", {}
    kinds = [kind for kind, value in attestation.items() if isinstance(value, dict)]
    kind = attestation.get("type") or (kinds[0] if len(kinds) == 1 else "")
    content = attestation.get(kind) if isinstance(kind, str) else None
    return (kind, content) if isinstance(content, dict) else ("", {})


class Imported(NamedTuple):
    """What a file of enrolments holds, and what it holds besides."""

    enrollments: list[Enrollment]
    others: list[Other]
    odd: list[Odd]


def read_enrollments(text: str) -> Imported:
    """The enrolments of a file, JSON or CSV; ListError where it is neither. `dps_text.enrolments` has both forms."""
    listed = read_enrolments(text)
    found = Imported([], [], list(listed.odd))
    records = [(entry.line, entry.record) for entry in listed.entries]
    for other in listed.others:
        kind, content = kind_of(other.record.get("attestation"))
        hides_keys = kind == "symmetricKey" and content and not any(content.values())  # as Azure's lists do
        if kind in WAYS and not hides_keys:
            records.append((other.line, other.record))
        else:
            found.others.append(other)
    for line, record in sorted(records, key=operator.itemgetter(0)):
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
