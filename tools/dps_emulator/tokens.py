"""Shared access signature tokens, verified over the text they were received with.

Clients spell the resource differently (`%2F`, `%2f`, a raw slash, all lower case) and sign what they spell, so the
signature is checked over the literal text and only then is the decoded text compared, without case.
"""

import base64
import hmac
from collections.abc import Sequence
from dataclasses import dataclass, field
from urllib.parse import quote, unquote

from dps_emulator.registrations import utc_text
from dps_text import whole_number

SCHEME = "SharedAccessSignature "


class TokenError(ValueError):
    """A token that is not of the form `SharedAccessSignature sr=…&sig=…&se=…[&skn=…]`; never quotes it."""


@dataclass(frozen=True)
class Token:
    """A parsed token; its repr shows no signature."""

    resource: str  # sr as received, still percent-encoded
    expiry: str  # se as received, decimal digits
    signature: bytes = field(repr=False)
    key_name: str  # skn, empty where it is absent

    @property
    def expires_at_s(self) -> int:
        """Unix seconds."""
        return int(self.expiry)

    def signed_by(self, *keys: bytes) -> bool:
        """Whether one of `keys` made the signature: HMAC-SHA256 over `sr LF se`, both as received."""
        signed = f"{self.resource}\n{self.expiry}".encode()
        return any(hmac.compare_digest(hmac.digest(key, signed, "sha256"), self.signature) for key in keys)

    def names(self, resource: str, *, strict: bool = False) -> bool:
        """Whether the token is for `resource` (not encoded), compared without case; `strict`: encoded once."""
        readings = self.readings[:1] if strict else self.readings
        return resource.casefold() in (reading.casefold() for reading in readings)

    @property
    def readings(self) -> tuple[str, str]:
        """What the resource may mean: some clients (the C# SDK, IoT Edge) encode the device id once more by itself."""
        once = unquote(self.resource)
        return once, unquote(once)


def expiry_refusal(token: Token, now: float, skew_s: int) -> str | None:
    """Says that the token had expired `skew_s` before `now` (Unix seconds), or None."""
    if token.expires_at_s <= now - skew_s:
        return f"it expired at {utc_text(token.expires_at_s)}"
    return None


def device_token_refusal(
    token: Token, hub: str, device_id: str, keys: Sequence[bytes] | None, now: float, skew_s: int
) -> str | None:
    """Why `hub` refuses this token from `device_id`, whose keys there are `keys` (None: there is no such device)."""
    if not token.names(f"{hub}/devices/{device_id}"):
        return "its sr is not {hub}/devices/{deviceId}"
    signed = token.signed_by(*(keys or (b"",)))  # it takes as long for one that is not there
    if keys is None:
        return f"no device '{device_id}' is assigned to '{hub}'"
    if not signed or not keys:
        return f"its signature is not by the key of '{device_id}' at '{hub}'"
    if expired := expiry_refusal(token, now, skew_s):
        return expired
    return "its skn names a shared access policy: a device's own key has none" if token.key_name else None


def signed_token(key: bytes, resource: str, expires_at_s: int, key_name: str = "") -> str:
    """A token by `key` over a resource that is percent-encoded already; `key_name` is that of a policy."""
    signature = base64.b64encode(hmac.digest(key, f"{resource}\n{expires_at_s}".encode(), "sha256")).decode()
    tail = f"&skn={key_name}" if key_name else ""
    return f"{SCHEME}sr={resource}&sig={quote(signature, safe='')}&se={expires_at_s}{tail}"


def parse_token(text: str) -> Token:
    """Parses the Authorization header or password; raises TokenError."""
    if not text.startswith(SCHEME):
        raise TokenError(f"does not begin with '{SCHEME}'")
    values: dict[str, str] = {}
    for pair in text.removeprefix(SCHEME).strip().split("&"):
        name, _, value = pair.partition("=")
        if name in values:
            raise TokenError(f"has '{name}' twice" if name in ("sr", "sig", "se", "skn") else "has a field twice")
        values[name] = value
    for name in ("sr", "sig", "se"):
        if not values.get(name):
            raise TokenError(f"has no '{name}'")
    expiry = values["se"]
    if whole_number(expiry, 0, 10**12) is None:
        raise TokenError("has an 'se' that is no number of seconds since 1970")
    try:
        signature = base64.b64decode(unquote(values["sig"]), validate=True)
    except ValueError:  # binascii.Error is one; text that is not ASCII another
        raise TokenError("has a 'sig' that is not percent-encoded base64") from None
    return Token(values["sr"], expiry, signature, values.get("skn", ""))
