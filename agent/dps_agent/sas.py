"""Shared access signature tokens for DPS and for a hub, and the text that a key signs for one.

Form: `SharedAccessSignature sr={resource}&sig={signature}&se={expiry}[&skn={key name}]`, where the signature is
HMAC-SHA256 over `resource LF expiry` with the resource exactly as it stands in the token. Source: Azure IoT Hub
developer guide, "Control access with shared access signatures"; DPS guide, "symmetric key attestation over HTTPS".
"""

import binascii

DPS_KEY_NAME = "registration"  # the only key name of device registrations
DPS_TOKEN_LIFE_S = 3600
_HEX = "0123456789ABCDEFabcdef"
_UNRESERVED = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~"  # RFC 3986, 2.3


class SasToken:
    """One signed token; its text leaves it only through `header`, its repr shows no signature."""

    def __init__(self, resource: str, expires_at_s: int, signature: bytes, key_name: str = "") -> None:
        self.resource = resource
        self.expires_at_s = expires_at_s
        self.key_name = key_name
        self._signature = signature

    def header(self) -> str:
        """The token as an Authorization header or MQTT password carries it."""
        signature = percent_encode(binascii.b2a_base64(self._signature).decode().strip())
        text = f"SharedAccessSignature sr={self.resource}&sig={signature}&se={self.expires_at_s}"
        if self.key_name:
            text += f"&skn={self.key_name}"
        return text

    def __repr__(self) -> str:
        return f"SasToken(resource={self.resource!r}, expires_at_s={self.expires_at_s})"


def percent_encode(text: str) -> str:
    """`text` in UTF-8 with everything but RFC 3986's unreserved characters as %XX, upper-case hex."""
    raw = text.encode()
    if not raw.lstrip(_UNRESERVED):
        return text
    out = bytearray()  # a text that grows would be copied each time, and a token is made for each connection
    for byte in raw:
        if byte in _UNRESERVED:
            out.append(byte)
        else:
            out += b"%%%02X" % byte
    return bytes(out).decode()


def percent_decode(text: str) -> str:
    """The reverse of `percent_encode`; what is no %XX, or no UTF-8 in all, stays as it is."""
    if "%" not in text:
        return text
    out = bytearray()
    parts = text.split("%")
    out += parts[0].encode()
    for part in parts[1:]:
        if len(part) >= 2 and part[0] in _HEX and part[1] in _HEX:
            out.append(int(part[:2], 16))
            out += part[2:].encode()
        else:
            out += ("%" + part).encode()
    try:
        return bytes(out).decode()
    except ValueError:
        return text


def dps_resource(id_scope: str, registration_id: str) -> str:
    """The resource of a DPS token, percent-encoded."""
    return percent_encode(f"{id_scope}/registrations/{registration_id}")


def hub_resource(hub: str, device_id: str) -> str:
    """The resource of a hub token, percent-encoded."""
    return percent_encode(f"{hub}/devices/{device_id}")


def string_to_sign(resource: str, expires_at_s: int) -> bytes:
    """What the key signs: the encoded resource, a line feed, the expiry in decimal Unix seconds."""
    return f"{resource}\n{expires_at_s}".encode()
