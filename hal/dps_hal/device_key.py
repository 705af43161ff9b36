"""A symmetric key that a device was given: how it is written, how it is derived of a group's, and what signs by it.

Source: Azure DPS, "symmetric key attestation": base64 of 16 to 64 bytes; a device of an enrolment group has
HMAC-SHA256 of its registration id by the group's key, 32 bytes, and never the group's key itself.
"""

from dps_hal.platform import from_base64, hmac_sha256

LEAST_BYTES = 16
MOST_BYTES = 64


class DeviceKey:
    """A `Signer` whose key is in this process's memory; its repr shows nothing."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    def sign(self, wrapped_key: bytes, message: bytes) -> bytes:
        """HMAC-SHA256 of `message` by the device's key; there is no other, and `wrapped_key` is empty."""
        return hmac_sha256(self._key, message)

    def release(self) -> None:
        """Nothing is open."""

    def __repr__(self) -> str:
        return "DeviceKey()"


def key_in(text: str) -> bytes:
    """The key that `text`, base64, holds; ValueError where that is none. Its message shows nothing of the text."""
    try:
        key = from_base64(text)
    except ValueError:
        raise ValueError(f"expected base64 of {LEAST_BYTES} to {MOST_BYTES} bytes; came {len(text)} other characters")
    if not LEAST_BYTES <= len(key) <= MOST_BYTES:
        raise ValueError(f"expected base64 of {LEAST_BYTES} to {MOST_BYTES} bytes; came {len(key)} bytes")
    return key


def derived_key(group_key: bytes, registration_id: str) -> bytes:
    """The key of one device of an enrolment group, 32 bytes; `registration_id` is in lower case."""
    return hmac_sha256(group_key, registration_id.encode())
