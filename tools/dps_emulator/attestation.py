"""What stands for a device: at DPS the keys or certificates that it is enrolled with, at a hub its credential.

Sources: "Symmetric key attestation"; "X.509 certificate attestation"; DPS service API, SymmetricKeyAttestation and
X509Attestation.
"""

import base64
import hmac
from dataclasses import dataclass, field
from typing import Any

MIN_KEY_BYTES, MAX_KEY_BYTES = 16, 64  # of a key that somebody enrols
NEW_KEY_BYTES = 64  # of one that the service makes


class KeyTextError(ValueError):
    """A text that is no symmetric key; the message is half a sentence and never quotes it."""


@dataclass(frozen=True)
class SymmetricKeys:
    """The two keys of an enrolment, either of which signs."""

    primary: bytes = field(repr=False)
    secondary: bytes = field(repr=False)

    def derived(self, registration_id: str) -> "SymmetricKeys":
        """Those of one device of a group that has these keys."""
        return SymmetricKeys(derived_key(self.primary, registration_id), derived_key(self.secondary, registration_id))

    @property
    def both(self) -> tuple[bytes, bytes]:
        """The first one first."""
        return self.primary, self.secondary

    def to_json(self) -> dict[str, str]:
        """As the service API has it, with the keys."""
        return {"primaryKey": key_text(self.primary), "secondaryKey": key_text(self.secondary)}


@dataclass(frozen=True)
class Certificates:
    """Those of a device by itself, or the CAs of a group; DER."""

    primary: bytes = field(repr=False)
    secondary: bytes = field(default=b"", repr=False)

    @property
    def all(self) -> tuple[bytes, ...]:
        """The first one first."""
        return (self.primary, self.secondary) if self.secondary else (self.primary,)

    def to_json(self, kind: str) -> dict[str, Any]:
        """As the service API has it; `kind` is clientCertificates or signingCertificates."""
        named = zip(("primary", "secondary"), self.all, strict=False)
        return {kind: {name: {"certificate": base64.b64encode(der).decode()} for name, der in named}}


def derived_key(group_key: bytes, registration_id: str) -> bytes:
    """The key of one device of an enrolment group: 32 bytes.

    The id is taken as it is written: what DPS does with one in upper case is not published, so it wants lower case.
    """
    return hmac.digest(group_key, registration_id.encode(), "sha256")


def key_of(text: object) -> bytes:
    """The bytes of a key in base64; raises KeyTextError."""
    try:
        key = base64.b64decode(text, validate=True) if isinstance(text, str) else None
    except ValueError:  # binascii.Error is one; text that is not ASCII another
        key = None
    if key is None:
        raise KeyTextError("is not base64")
    if not MIN_KEY_BYTES <= len(key) <= MAX_KEY_BYTES:
        raise KeyTextError(f"has {len(key)} bytes: a key has {MIN_KEY_BYTES} to {MAX_KEY_BYTES}")
    return key


def key_text(key: bytes) -> str:
    """A key as base64."""
    return base64.b64encode(key).decode()


@dataclass(frozen=True)
class Credential:
    """What a hub accepts from a device: tokens by one of these keys, or one of these certificates."""

    keys: tuple[bytes, ...] = field(default=(), repr=False)
    thumbprints: tuple[str, ...] = ()  # SHA-256 or SHA-1, hex in upper case
    authorities: tuple[bytes, ...] = field(default=(), repr=False)  # CAs whose certificates name the device; DER
    name: str = ""  # the CN by which they name it; empty: its device id

    def to_json(self) -> dict[str, Any]:
        """For a file; holds the keys."""
        authorities = [base64.b64encode(der).decode() for der in self.authorities]
        keys = [key_text(key) for key in self.keys]
        record = {"keys": keys, "thumbprints": list(self.thumbprints), "authorities": authorities}
        return {**record, "name": self.name} if self.name else record

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> "Credential":
        """The inverse of `to_json`; raises KeyError, TypeError or ValueError on anything else."""
        keys = tuple(base64.b64decode(key, validate=True) for key in record["keys"])
        authorities = tuple(base64.b64decode(der, validate=True) for der in record.get("authorities", ()))
        return cls(keys, tuple(record.get("thumbprints", ())), authorities, str(record.get("name", "")))
