"""The assignment of a device to a hub: what is checked before it is stored, and how it is stored.

A stored assignment is JSON and behind it a seal of 32 bytes: HMAC-SHA256 by the hub key itself over
`00 || "dps-agent record 1" || JSON`. The leading zero byte keeps that text apart from everything a token can be.
Whoever can write the storage but cannot use that key can neither forge a record nor pair a key with another hub. Where
the device has a key of its own that is the hub key, and the record has none; that of a certificate seals by 64 bytes,
an ECDSA signature over the same. With a certificate that DPS has issued there is no hub key: the seal is made by the
device's own key, of a device with a TPM by the certificate's. When a record holds says `load_held` of
`dps_agent.attestation`.
"""

from dps_agent.settings import AUTO, CERTIFICATES, ISSUED, TPM, X509
from dps_hal.errors import IdentityStale
from dps_hal.platform import attribute_of, from_base64, from_json, to_base64, to_json

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NamedTuple

    from dps_agent.settings import Settings

    class Assignment(NamedTuple):
        """One device at one hub, with the key that belongs to both."""

        id_scope: str
        endpoint: str
        registration_id: str
        assigned_hub: str
        device_id: str
        wrapped_key: bytes  # TPM2B_PUBLIC || TPM2B_PRIVATE of the hub key; empty: it is the device's own
        ek_name: bytes  # 34 bytes: nameAlg and SHA-256 of the EK's public area; empty with the key, as the next one
        srk_name: bytes
        status: str
        substatus: str
        etag: str
        created_utc: str  # as DPS wrote it, RFC 3339; the next one as well
        last_updated_utc: str
        assigned_at_s: int  # the device's own clock, Unix seconds
        payload: Any  # what a custom allocation returned
        payload_omitted: bool  # there was a payload, and it was too large to store
        attestation: str  # the way in which the device showed who it is
        chain: str  # SHA-256, in hex, of the certificates that DPS issued, which have a record of their own; or empty
else:
    from dps_hal.named import namedtuple

    Assignment = namedtuple(
        "Assignment",
        (
            "id_scope",
            "endpoint",
            "registration_id",
            "assigned_hub",
            "device_id",
            "wrapped_key",
            "ek_name",
            "srk_name",
            "status",
            "substatus",
            "etag",
            "created_utc",
            "last_updated_utc",
            "assigned_at_s",
            "payload",
            "payload_omitted",
            "attestation",
            "chain",
        ),
    )

PAYLOAD_LIMIT = 2048  # bytes of JSON; a larger custom payload is not stored
SEAL_BYTES = 32
SIGNATURE_BYTES = 64  # of a seal by the key of a certificate: ECDSA over P-256, both numbers
_SEALED_TEXT = b"\x00dps-agent record 1"

# JSON names of fields, in their order in the record; the latter are bytes, kept in base64, of devices with a TPM.
_TEXTS = "idScope endpoint registrationId assignedHub deviceId status substatus etag createdUtc lastUpdatedUtc"
_BYTES = "wrappedKey ekName srkName"

HUB_LIMIT = 253  # characters of a DNS name, RFC 1035
LABEL_LIMIT = 63
DEVICE_ID_LIMIT = 128  # IoT Hub identity registry
_DEVICE_ID_SPECIAL = "-.%_*?!(),:=@$'"  # beside letters and digits; `/ # +` would break MQTT topics


def hub_fault(hub: str, suffixes: "tuple[str, ...]") -> str:
    """What is wrong with an assigned hub's name, or "": a DNS name that is one of `suffixes` or ends in one."""
    if not hub or len(hub) > HUB_LIMIT:
        return f"expected a DNS name of 1 to {HUB_LIMIT} characters, got {len(hub)} characters"
    for label in hub.split("."):
        if not label or len(label) > LABEL_LIMIT or label[0] == "-" or label[-1] == "-":
            return f"expected a DNS name, got {hub!r}"
        for character in label:
            if not (_is_alphanumeric(character) or character == "-"):
                return f"expected a DNS name of letters, digits, hyphens and dots, got {hub!r}"
    name = hub.lower()
    for suffix in suffixes:
        bare = suffix.lower().lstrip(".")
        if bare and (name == bare or name.endswith("." + bare)):
            return ""
    return f"expected a name that ends in one of {', '.join(suffixes)}, got {hub!r}"


def device_id_fault(device_id: str) -> str:
    """What is wrong with a device id, or ""."""
    if not device_id or len(device_id) > DEVICE_ID_LIMIT:
        return f"expected 1 to {DEVICE_ID_LIMIT} characters, got {len(device_id)}"
    for character in device_id:
        if not (_is_alphanumeric(character) or character in _DEVICE_ID_SPECIAL):
            return f"expected letters, digits and {_DEVICE_ID_SPECIAL}, got {device_id!r}"
    return ""


def _is_alphanumeric(character: str) -> bool:
    # On the character as it came: lower() would turn U+212A into a "k".
    return "a" <= character <= "z" or "A" <= character <= "Z" or "0" <= character <= "9"


def encode(assignment: Assignment, beside: "dict[str, Any] | None" = None) -> bytes:
    """The JSON text of an assignment and of what its runtime notes `beside` it, without its seal."""
    value: dict[str, Any] = {"payloadOmitted": assignment.payload_omitted, "assignedAtS": assignment.assigned_at_s}
    value.update(beside or {})
    for name in _TEXTS.split():
        value[name] = getattr(assignment, attribute_of(name))
    if assignment.attestation == TPM:  # as ever
        for name in _BYTES.split():
            value[name] = to_base64(getattr(assignment, attribute_of(name)))
    else:
        value["attestation"] = assignment.attestation
    if assignment.chain:
        value["issuedChain"] = assignment.chain
    if assignment.payload is not None:
        value["payload"] = assignment.payload
    return to_json(value).encode()


def decode(stored: bytes) -> "tuple[Assignment, bytes, bytes]":
    """A stored payload as (assignment, its JSON text, seal); IdentityStale `record.damaged` if it is none.

    The seal is not checked here: that takes the TPM.
    """
    if not stored:
        raise IdentityStale("record.damaged", "the stored assignment is not readable: every copy of it is damaged")
    text, seal = stored[:-SEAL_BYTES], stored[-SEAL_BYTES:]
    fields: dict[str, Any] = {}
    try:
        try:
            value = from_json(text)
        except ValueError:  # the longer seal begins there, and no JSON ends so
            if not CERTIFICATES:
                raise
            text, seal = stored[:-SIGNATURE_BYTES], stored[-SIGNATURE_BYTES:]
            value = from_json(text)
        for name in _TEXTS.split():
            if not isinstance(value[name], str):
                raise ValueError(f"{name} is no text")
            fields[attribute_of(name)] = value[name]
        attestation = fields["attestation"] = value.get("attestation", TPM)
        if not isinstance(attestation, str):
            raise ValueError("attestation is no text")
        chain = fields["chain"] = value.get("issuedChain", "") if CERTIFICATES else ""
        if CERTIFICATES and not isinstance(chain, str):
            raise ValueError("issuedChain is no text")
        if CERTIFICATES and _is_signed(attestation, chain) != (len(seal) == SIGNATURE_BYTES):
            raise ValueError("its seal is none of its attestation")
        for name in _BYTES.split():
            fields[attribute_of(name)] = from_base64(value[name]) if attestation == TPM else b""
        assigned_at_s = value["assignedAtS"]
        if isinstance(assigned_at_s, bool) or not isinstance(assigned_at_s, int) or not 0 <= assigned_at_s < 2**32:
            raise ValueError("assignedAtS is no time")
        fields["assigned_at_s"] = assigned_at_s
        fields["payload"] = value.get("payload")
        fields["payload_omitted"] = bool(value["payloadOmitted"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise IdentityStale("record.damaged", f"the stored assignment is not readable: {error}")
    return Assignment(**fields), text, seal


def _is_signed(attestation: str, chain: str) -> bool:
    """Whether the seal is a signature, because the key that makes it is that of a certificate."""
    return attestation == X509 or (attestation == TPM and chain != "")


def is_signed(assignment: Assignment) -> bool:
    """Whether its seal is looked at by `Verify`."""
    return _is_signed(assignment.attestation, assignment.chain)


def has_tokens(assignment: Assignment) -> bool:
    """Whether the device shows its hub tokens; else the connection shows a certificate."""
    return assignment.attestation != X509 and not assignment.chain


def payload_to_store(payload: "Any") -> "tuple[Any, bool]":
    """A custom payload and whether it was left out because it is too large to store, or cannot be written."""
    try:
        fits = len(to_json(payload).encode()) <= PAYLOAD_LIMIT  # MicroPython does not escape
    except (ValueError, OverflowError, TypeError):
        fits = False
    return (payload, False) if fits else (None, True)


def seal_message(text: bytes) -> bytes:
    """What the hub key signs to seal the JSON `text` of an assignment."""
    return _SEALED_TEXT + text


def difference(assignment: Assignment, settings: "Settings") -> str:
    """Why an assignment does not fit the settings, or "" if it does."""
    for name, ours, theirs in (
        ("id_scope", settings.id_scope, assignment.id_scope),
        ("endpoint", settings.endpoint, assignment.endpoint),
        ("attestation", settings.attestation, assignment.attestation),
        ("certificate", settings.certificate, ISSUED if assignment.chain else ""),
    ):
        if ours != theirs:
            return f"the stored assignment is for {name} {theirs!r}, the settings say {ours!r}"
    ours = settings.registration_id
    if ours not in (AUTO, assignment.registration_id) and ours.lower() != assignment.registration_id.lower():
        return f"the stored assignment is for registration_id {assignment.registration_id!r}, the settings say {ours!r}"
    fault = hub_fault(assignment.assigned_hub, settings.hub_suffixes)
    return f"the stored hub no longer fits hub_suffixes: {fault}" if fault else ""
