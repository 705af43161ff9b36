"""The assignment of a device to a hub: what is checked before it is stored, how it is stored, when it still holds.

A stored assignment is JSON and behind it a seal of 32 bytes: HMAC-SHA256 by the hub key itself over
`00 || "dps-agent record 1" || JSON`. The leading zero byte keeps that text apart from everything a token can be.
Whoever can write the storage but cannot use the TPM can neither forge a record nor pair a key with another hub.
"""

from dps_agent.effects import ReadEndorsementKey, ReadStorageRootKey, Sign, UtcNow
from dps_agent.sas import SasToken, hub_resource, string_to_sign
from dps_agent.settings import AUTO
from dps_hal.errors import AskOperator, IdentityStale, RetryLater
from dps_hal.platform import from_base64, from_json, same_bytes, to_base64, to_json
from dps_hal.tpm.keys import object_name, registration_id_from_ek

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Generator
    from typing import Any, NamedTuple

    from dps_agent.effects import Effect
    from dps_agent.settings import Settings
    from dps_hal.contracts import StoredRecord, Utc

    class Assignment(NamedTuple):
        """One device at one hub, with the key that belongs to both."""

        id_scope: str
        endpoint: str
        registration_id: str
        assigned_hub: str
        device_id: str
        wrapped_key: bytes  # TPM2B_PUBLIC || TPM2B_PRIVATE of the hub key
        ek_name: bytes  # 34 bytes: nameAlg and SHA-256 of the EK's public area
        srk_name: bytes
        status: str
        substatus: str
        etag: str
        created_utc: str  # as DPS wrote it, RFC 3339; the next one as well
        last_updated_utc: str
        assigned_at_s: int  # the device's own clock, Unix seconds
        payload: Any  # what a custom allocation returned
        payload_omitted: bool  # there was a payload, and it was too large to store
else:
    from collections import namedtuple

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
        ),
    )

PAYLOAD_LIMIT = 2048  # bytes of JSON; a larger custom payload is not stored
SEAL_BYTES = 32
_SEALED_TEXT = b"\x00dps-agent record 1"

# JSON names in the order of the tuple; fields after the marked ones are bytes, kept in base64.
_TEXT_FIELDS = (
    ("idScope", "id_scope"),
    ("endpoint", "endpoint"),
    ("registrationId", "registration_id"),
    ("assignedHub", "assigned_hub"),
    ("deviceId", "device_id"),
    ("status", "status"),
    ("substatus", "substatus"),
    ("etag", "etag"),
    ("createdUtc", "created_utc"),
    ("lastUpdatedUtc", "last_updated_utc"),
)
_BYTES_FIELDS = (("wrappedKey", "wrapped_key"), ("ekName", "ek_name"), ("srkName", "srk_name"))

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
    for name, field in _TEXT_FIELDS:
        value[name] = getattr(assignment, field)
    for name, field in _BYTES_FIELDS:
        value[name] = to_base64(getattr(assignment, field))
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
        value = from_json(text)
        for name, field in _TEXT_FIELDS:
            if not isinstance(value[name], str):
                raise ValueError(f"{name} is no text")
            fields[field] = value[name]
        for name, field in _BYTES_FIELDS:
            fields[field] = from_base64(value[name])
        assigned_at_s = value["assignedAtS"]
        if isinstance(assigned_at_s, bool) or not isinstance(assigned_at_s, int) or not 0 <= assigned_at_s < 2**32:
            raise ValueError("assignedAtS is no time")
        fields["assigned_at_s"] = assigned_at_s
        fields["payload"] = value.get("payload")
        fields["payload_omitted"] = bool(value["payloadOmitted"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise IdentityStale("record.damaged", f"the stored assignment is not readable: {error}")
    return Assignment(**fields), text, seal


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


def sealed(assignment: Assignment, beside: "dict[str, Any] | None" = None) -> "Generator[Effect, Any, bytes]":
    """The payload to store: JSON and seal. The signature also shows that the key loads and signs."""
    text = encode(assignment, beside)
    seal: bytes = yield Sign(assignment.wrapped_key, seal_message(text))
    return text + seal


def difference(assignment: Assignment, settings: "Settings") -> str:
    """Why an assignment does not fit the settings, or "" if it does."""
    for name, ours, theirs in (
        ("id_scope", settings.id_scope, assignment.id_scope),
        ("endpoint", settings.endpoint, assignment.endpoint),
    ):
        if ours != theirs:
            return f"the stored assignment is for {name} {theirs!r}, the settings say {ours!r}"
    ours = settings.registration_id
    if ours not in (AUTO, assignment.registration_id) and ours.lower() != assignment.registration_id.lower():
        return f"the stored assignment is for registration_id {assignment.registration_id!r}, the settings say {ours!r}"
    fault = hub_fault(assignment.assigned_hub, settings.hub_suffixes)
    return f"the stored hub no longer fits hub_suffixes: {fault}" if fault else ""


def load_held(
    settings: "Settings", stored: "StoredRecord | None", wanted: bool = True
) -> "Generator[Effect, Any, tuple[Assignment | None, str]]":
    """The stored record `identity` as an assignment if it holds, else None and the reason in words.

    It holds when settings, EK, SRK and seal fit. AskOperator `tpm.ek_changed`: it was made for another EK. Not
    `wanted`: it will not be used, so that the TPM is not asked for the seal.
    """
    if stored is None:
        return None, "no assignment is stored"
    try:
        assignment, text, seal = decode(stored.payload)
    except IdentityStale as error:
        return None, error.message
    reason = difference(assignment, settings)
    if reason:
        return None, reason
    endorsement_key: bytes = yield ReadEndorsementKey(assignment.ek_name)
    if object_name(endorsement_key) != assignment.ek_name:  # before anything is salted to it
        raise AskOperator(
            "tpm.ek_changed",
            "the stored assignment belongs to another endorsement key: its name begins with"
            f" {_short(assignment.ek_name)}, this TPM's with {_short(object_name(endorsement_key))}",
        )
    if settings.registration_id == AUTO and assignment.registration_id != registration_id_from_ek(endorsement_key):
        return None, f"the stored assignment is for registration_id {assignment.registration_id!r}, not the EK's own"
    storage_root_key: bytes = yield ReadStorageRootKey()
    if object_name(storage_root_key) != assignment.srk_name:
        return None, "the TPM was cleared: it has another storage root key"
    if not wanted:
        return None, "asked to register again"
    try:
        signature: bytes = yield Sign(assignment.wrapped_key, seal_message(text))
    except IdentityStale as error:
        return None, error.message
    if not same_bytes(signature, seal):
        return None, "the stored assignment was altered: its seal does not fit"
    return assignment, ""


def signed_token(
    resource: str, expires_at_s: int, wrapped_key: bytes, key_name: str = ""
) -> "Generator[Effect, Any, SasToken]":
    """Asks the TPM to sign and returns the token; `resource` is already percent-encoded."""
    signature: bytes = yield Sign(wrapped_key, string_to_sign(resource, expires_at_s))
    return SasToken(resource, expires_at_s, signature, key_name)


def hub_token(assignment: Assignment, life_s: int) -> "Generator[Effect, Any, SasToken]":
    """A token for the assigned hub, valid for `life_s` seconds, signed by the hub key in the TPM.

    RetryLater `clock.not_set` while the clock cannot be believed.
    """
    now: Utc = yield UtcNow()
    check_clock(now)
    resource = hub_resource(assignment.assigned_hub, assignment.device_id)
    token: SasToken = yield from signed_token(resource, now.now_s + life_s, assignment.wrapped_key)
    return token


def check_clock(now: "Utc") -> None:
    """RetryLater `clock.not_set` unless `now` can be believed: a token with a wrong expiry is no token."""
    if not now.believable:
        raise RetryLater("clock.not_set", f"the clock is not set ({now.source} says {now.now_s} s since 1970)")


def _short(name: bytes) -> str:
    out = ""
    for byte in name[2:8]:
        out += f"{byte:02x}"
    return out
