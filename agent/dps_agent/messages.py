"""The bodies of the DPS Runtime Registration API, 2021-10-01, between JSON and named tuples.

Every field is optional on reading and None where absent or null, so `{}` is a legal message both ways. Fields that
the API does not have are kept under `unknown`, enumeration values that it does not have stay readable text. A field of
the wrong type is RetryLater `dps.malformed_answer`, and the message names the field.
"""

from dps_agent.settings import CERTIFICATES
from dps_hal.errors import RetryLater
from dps_hal.platform import attribute_of, from_json, to_json

# EnrollmentStatus
UNASSIGNED = "unassigned"
ASSIGNING = "assigning"
ASSIGNED = "assigned"
FAILED = "failed"
DISABLED = "disabled"

# AssignedDeviceSubstatus
INITIAL_ASSIGNMENT = "initialAssignment"
DEVICE_DATA_MIGRATED = "deviceDataMigrated"
DEVICE_DATA_RESET = "deviceDataReset"
REPROVISIONED_TO_INITIAL_ASSIGNMENT = "reprovisionedToInitialAssignment"

ERROR_CODE_HEADER = "x-ms-error-code"
REQUEST_ID_HEADER = "x-ms-request-id"

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NamedTuple, TypeVar

    Message = TypeVar("Message")
    Fields = list[tuple[str, Any]]

    class TpmAttestation(NamedTuple):
        """Attestation via TPM: the marshalled TPM2B_PUBLIC of EK and SRK, size prefix included, in base64."""

        endorsement_key: "str | None"
        storage_root_key: "str | None"
        unknown: "dict[str, Any]"  # fields that this version of the API does not have, as they came

    class DeviceRegistration(NamedTuple):
        """The body of a register request and of a status lookup."""

        payload: "Any"
        registration_id: "str | None"
        tpm: "TpmAttestation | None"
        unknown: "dict[str, Any]"  # fields that this version of the API does not have, as they came

    class TpmRegistrationResult(NamedTuple):
        """Result of TPM attestation: the activation blob of the key, in base64."""

        authentication_key: "str | None"
        unknown: "dict[str, Any]"  # fields that this version of the API does not have, as they came

    class X509CertificateInfo(NamedTuple):
        """One X.509 certificate, described."""

        issuer_name: "str | None"
        not_after_utc: "str | None"
        not_before_utc: "str | None"
        serial_number: "str | None"
        sha1_thumbprint: "str | None"
        sha256_thumbprint: "str | None"
        subject_name: "str | None"
        version: "int | None"
        unknown: "dict[str, Any]"  # fields that this version of the API does not have, as they came

    class X509RegistrationResult(NamedTuple):
        """Result of X.509 attestation."""

        certificate_info: "X509CertificateInfo | None"
        enrollment_group_id: "str | None"
        signing_certificate_info: "X509CertificateInfo | None"
        unknown: "dict[str, Any]"  # fields that this version of the API does not have, as they came

    class SymmetricKeyRegistrationResult(NamedTuple):
        """Result of symmetric-key attestation."""

        enrollment_group_id: "str | None"
        unknown: "dict[str, Any]"  # fields that this version of the API does not have, as they came

    class DeviceRegistrationResult(NamedTuple):
        """Where a registration stands; times are RFC 3339 text in UTC with 0 to 7 fractional digits."""

        assigned_hub: "str | None"
        created_date_time_utc: "str | None"
        device_id: "str | None"
        error_code: "int | None"
        error_message: "str | None"
        etag: "str | None"
        last_updated_date_time_utc: "str | None"
        payload: "Any"
        registration_id: "str | None"
        status: "str | None"
        substatus: "str | None"
        symmetric_key: "SymmetricKeyRegistrationResult | None"
        tpm: "TpmRegistrationResult | None"
        x509: "X509RegistrationResult | None"
        unknown: "dict[str, Any]"  # fields that this version of the API does not have, as they came

    class RegistrationOperationStatus(NamedTuple):
        """The answer to a register request and to an operation status request."""

        operation_id: "str | None"
        status: "str | None"
        registration_state: "DeviceRegistrationResult | None"
        unknown: "dict[str, Any]"  # fields that this version of the API does not have, as they came

    class TpmChallenge(NamedTuple):
        """The body of the 401 that answers a register request without a token."""

        message: "str | None"
        authentication_key: "str | None"
        key_name: "str | None"
        unencrypted_authentication_key: "str | None"
        unknown: "dict[str, Any]"  # fields that this version of the API does not have, as they came

    class ProvisioningServiceErrorDetails(NamedTuple):
        """The body of an error answer; `info` maps strings to strings."""

        error_code: "int | None"
        info: "dict[str, str] | None"
        message: "str | None"
        timestamp_utc: "str | None"
        tracking_id: "str | None"
        unknown: "dict[str, Any]"  # fields that this version of the API does not have, as they came


# The kinds of a field; any other is a message.
STRING, INTEGER, ANY, STRINGS = "a string", "a 32-bit integer", "any value", "an object of strings"
_KINDS: "dict[str, Any]" = {"": STRING, "INTEGER": INTEGER, "ANY": ANY, "STRINGS": STRINGS}
# The fields of each message, JSON names and kinds: one text for each, because a board has pairs, and each word, in its
# heap.
FIELDS: "dict[Any, str]" = {}

if not TYPE_CHECKING:
    from dps_hal.named import namedtuple

    def _message(name: str, fields: str) -> "Any":
        """A message of these fields: a named tuple, whose names are the JSON names as Python writes them."""
        names = [attribute_of(word.partition(":")[0]) for word in fields.split()]
        names.append("unknown")
        message = _KINDS[name] = namedtuple(name, names)
        FIELDS[message] = fields
        return message

    TpmAttestation = _message("TpmAttestation", "endorsementKey storageRootKey")
    DeviceRegistration = _message("DeviceRegistration", "payload:ANY registrationId tpm:TpmAttestation")
    TpmRegistrationResult = _message("TpmRegistrationResult", "authenticationKey")
    if CERTIFICATES:
        X509CertificateInfo = _message(
            "X509CertificateInfo",
            "issuerName notAfterUtc notBeforeUtc serialNumber sha1Thumbprint sha256Thumbprint subjectName "
            "version:INTEGER",
        )
        X509RegistrationResult = _message(
            "X509RegistrationResult",
            "certificateInfo:X509CertificateInfo enrollmentGroupId signingCertificateInfo:X509CertificateInfo",
        )
    SymmetricKeyRegistrationResult = _message("SymmetricKeyRegistrationResult", "enrollmentGroupId")
    DeviceRegistrationResult = _message(
        "DeviceRegistrationResult",
        "assignedHub createdDateTimeUtc deviceId errorCode:INTEGER errorMessage etag lastUpdatedDateTimeUtc "
        "payload:ANY registrationId status substatus symmetricKey:SymmetricKeyRegistrationResult "
        "tpm:TpmRegistrationResult" + (" x509:X509RegistrationResult" if CERTIFICATES else ""),
    )
    RegistrationOperationStatus = _message(
        "RegistrationOperationStatus", "operationId status registrationState:DeviceRegistrationResult"
    )
    TpmChallenge = _message("TpmChallenge", "message authenticationKey keyName unencryptedAuthenticationKey")
    ProvisioningServiceErrorDetails = _message(
        "ProvisioningServiceErrorDetails", "errorCode:INTEGER info:STRINGS message timestampUtc trackingId"
    )


def fields_of(message: "Any") -> "Fields":
    """JSON name and kind of each field of a message, in its order."""
    fields = []
    for word in FIELDS[message].split():
        name, _, kind = word.partition(":")
        fields.append((name, _KINDS[kind]))
    return fields


def decode(message: "type[Message]", body: bytes) -> "Message":
    """The JSON object `body` as a `message`; RetryLater `dps.malformed_answer` if it is not one."""
    read: Message = _read(message, _json_object(body, message.__name__), message.__name__)
    return read


def encode(message: "Any") -> bytes:
    """`message` as JSON, absent fields left out."""
    return to_json(_write(message)).encode()


def device_registration(
    registration_id: str,
    payload: "dict[str, Any] | None",
    tpm: "TpmAttestation | None",
    members: "dict[str, Any] | None" = None,
) -> bytes:
    """The JSON body with which a device registers and looks itself up; `members` are of later versions of the API."""
    return encode(DeviceRegistration(payload, registration_id, tpm, members or {}))


def _json_object(body: bytes, where: str) -> "dict[str, Any]":
    try:
        value = from_json(body)
    except ValueError as error:
        raise _malformed(where, f"expected JSON, got {_excerpt(body)} ({error})")
    if not isinstance(value, dict):
        raise _malformed(where, f"expected a JSON object, got {_kind(value)}")
    return value


def _read(message: "Any", value: "dict[str, Any]", where: str) -> "Any":
    unknown = dict(value)
    arguments = []
    for name, kind in fields_of(message):
        arguments.append(_field(unknown.pop(name, None), kind, f"{where}.{name}"))
    arguments.append(unknown)
    return message(*arguments)


def _field(value: "Any", kind: "Any", where: str) -> "Any":
    if value is None or kind == ANY:
        return value
    if not _fits(value, kind):
        raise _malformed(where, f"expected {kind if isinstance(kind, str) else 'an object'}, got {_kind(value)}")
    if kind == STRINGS:
        for name in value:
            _field(value[name], STRING, f"{where}.{name}")
    elif not isinstance(kind, str):
        return _read(kind, value, where)
    return value


def _fits(value: "Any", kind: "Any") -> bool:
    if kind == STRING:
        return isinstance(value, str)
    if kind == INTEGER:
        return isinstance(value, int) and not isinstance(value, bool) and -(2**31) <= value < 2**31
    return isinstance(value, dict)


def _write(message: "Any") -> "dict[str, Any]":
    value = {}
    for (name, kind), field in zip(fields_of(type(message)), message):
        if field is not None:
            value[name] = field if isinstance(kind, str) else _write(field)
    for name in message.unknown:
        value[name] = message.unknown[name]
    return value


def _malformed(where: str, fault: str) -> RetryLater:
    return RetryLater("dps.malformed_answer", f"{where}: {fault}")


def _kind(value: "Any") -> str:
    if isinstance(value, bool):
        return "a boolean"
    if isinstance(value, int):
        return f"the number {value}" if -(2**63) < value < 2**63 else "a huge number"
    if isinstance(value, float):
        return "a number with a fraction"
    if isinstance(value, str):
        return "a string"
    return "a list" if isinstance(value, list) else "an object" if isinstance(value, dict) else "null"


def _excerpt(body: bytes) -> str:
    if not body:
        return "an empty body"
    text = ""
    for byte in body[:24]:
        text += chr(byte) if 32 <= byte < 127 else "."
    return f"{len(body)} bytes that begin with {text!r}"
