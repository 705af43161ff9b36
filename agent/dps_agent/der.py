"""Certificates in DER: where each of those begins that a board keeps one behind the other, and when they are valid.

Nothing is verified here. A board loads it while the settings are read, not longer.
"""

from dps_agent.utc import utc_s, whole_number

_UTC_TIME = 0x17  # X.680, 8.6
_GENERALIZED_TIME = 0x18
_EXPLICIT_VERSION = b"\xa0"


def certificates(content: bytes) -> "list[bytes]":
    """The X.509 certificates in DER that lie one behind the other in `content`; ValueError for anything else."""
    found = []
    at = 0
    while at < len(content):
        if content[at] != 0x30:
            raise ValueError(f"expected a certificate in DER at byte {at}; came 0x{content[at]:02x}")
        _, end = _element(content, at)
        found.append(content[at:end])
        at = end
    return found


def not_after_s(certificate: bytes) -> int:
    """When an X.509 certificate in DER ends; ValueError where it is none."""
    return validity(certificate)[1]


def validity(certificate: bytes) -> "tuple[int, int]":
    """The first and the last second of an X.509 certificate in DER (RFC 5280, 4.1.2.5); ValueError where it is none."""
    at, _ = _element(certificate, 0)
    at, _ = _element(certificate, at)  # tbsCertificate
    skipped = 4 if certificate[at : at + 1] == _EXPLICIT_VERSION else 3
    for _ in range(skipped):  # version, serialNumber, signature, issuer
        _, at = _element(certificate, at)
    at, _ = _element(certificate, at)
    found = []
    for _ in range(2):  # notBefore, notAfter
        start, end = _element(certificate, at)
        found.append(_asn1_time_s(certificate[at], certificate[start:end]))
        at = end
    return found[0], found[1]


def _element(der: bytes, at: int) -> "tuple[int, int]":
    """Where the content of the element at `at` begins and ends."""
    start = at + 2
    if start > len(der):
        raise ValueError("the certificate ends early")
    size = der[at + 1]
    if size & 0x80:
        start += size & 0x7F
        size = int.from_bytes(der[at + 2 : start], "big")
    if start + size > len(der):
        raise ValueError("the certificate ends early")
    return start, start + size


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
