"""Certificates in DER: where each of those begins that lie one behind the other, and when they are valid.

Nothing is verified here. A board's certificates are read when it is deployed, not on it.
"""

from dps_agent.utc import utc_s, whole_number
from dps_hal.der import SEQUENCE, element, field_of

_UTC_TIME = 0x17  # X.680, 8.6
_GENERALIZED_TIME = 0x18


def certificates(content: bytes) -> "list[bytes]":
    """The X.509 certificates in DER that lie one behind the other in `content`; ValueError for anything else."""
    found = []
    at = 0
    while at < len(content):
        _, end = element(content, at, len(content), SEQUENCE, "certificate")
        found.append(content[at:end])
        at = end
    return found


def not_after_s(certificate: bytes) -> int:
    """When an X.509 certificate in DER ends; ValueError where it is none."""
    return validity(certificate)[1]


def validity(certificate: bytes) -> "tuple[int, int]":
    """The first and the last second of an X.509 certificate in DER (RFC 5280, 4.1.2.5); ValueError where it is none."""
    at, end = field_of(certificate, "validity")
    found = []
    for what in ("notBefore", "notAfter"):
        tag = certificate[at] if at < end else 0
        start, stop = element(certificate, at, end, tag, what)
        found.append(_asn1_time_s(tag, certificate[start:stop]))
        at = stop
    return found[0], found[1]


def _asn1_time_s(tag: int, content: bytes) -> int:
    text = content.decode()
    if tag == _UTC_TIME and len(text) == 13:
        text = ("19" if text >= "5" else "20") + text  # RFC 5280, 4.1.2.5.1: 50 to 99 are of the last century
    elif tag != _GENERALIZED_TIME:
        raise ValueError(f"expected a time; came tag 0x{tag:02x}")
    if len(text) != 15 or text[14] != "Z":
        raise ValueError(f"expected a time such as 20380119031407Z; came {text!r}")
    month, day, hour, minute, second = [whole_number(text[at : at + 2], 2) for at in range(4, 14, 2)]
    return utc_s(whole_number(text[:4], 4), month, day, hour, minute, second)
