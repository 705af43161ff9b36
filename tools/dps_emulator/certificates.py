"""Client certificates: whether a chain leads to who is trusted, and what the service API says of a certificate.

Sources: "X.509 certificate attestation"; DPS service API, X509CertificateInfo; RFC 5280. Proof of possession, by which
a CA is verified at the real service, has no counterpart: whoever enrols a CA here is believed. How thumbprints and
names are written is not published; upper-case hex and RFC 4514 are ours.
"""

import base64
import datetime
import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dps_emulator.registrations import utc_text

if TYPE_CHECKING:  # what is asked of a running server needs no `cryptography`, which takes long to load
    from cryptography import x509

MAX_CHAIN = 10  # certificates between a leaf and the enrolled CA
_PEM, _PEM_END = "-----BEGIN CERTIFICATE-----", "-----END CERTIFICATE-----"


class CertificateError(ValueError):
    """A certificate that can't be used or is refused; the message is a sentence without its subject."""


def certificate_of(text: object) -> bytes:
    """DER of a certificate in PEM, or in base64 as the service API has it; raises CertificateError."""
    if not isinstance(text, str):
        raise CertificateError("is missing, or no text")
    try:
        body = text.partition(_PEM)[2].partition(_PEM_END)[0] if _PEM in text else text
        der = base64.b64decode("".join(body.split()), validate=True)
        _loaded(der)
    except ValueError:  # CertificateError and binascii.Error are such
        raise CertificateError("is no certificate, neither PEM nor base64 of DER") from None
    return der


def thumbprints(der: bytes) -> tuple[str, str]:
    """SHA-256 and SHA-1 of a certificate, hex in upper case."""
    return hashlib.sha256(der).hexdigest().upper(), hashlib.sha1(der, usedforsecurity=False).hexdigest().upper()


def common_name(der: bytes) -> str:
    """The last CN of a certificate's subject; empty where it has none, or no certificate that can be read."""
    from cryptography.x509 import NameOID

    try:
        names = _loaded(der).subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    except CertificateError:
        return ""
    return str(names[-1].value) if names else ""


def certificate_info(der: bytes) -> dict[str, Any]:
    """X509CertificateInfo."""
    certificate = _loaded(der)
    sha256, sha1 = thumbprints(der)
    return {
        "subjectName": certificate.subject.rfc4514_string(),
        "sha1Thumbprint": sha1,
        "sha256Thumbprint": sha256,
        "issuerName": certificate.issuer.rfc4514_string(),
        "notBeforeUtc": utc_text(certificate.not_valid_before_utc.timestamp()),
        "notAfterUtc": utc_text(certificate.not_valid_after_utc.timestamp()),
        "serialNumber": f"{certificate.serial_number:X}",
        "version": certificate.version.value + 1,
    }


def require_valid(der: bytes, now: float) -> None:
    """Raises CertificateError unless the certificate's time has come and is not over at `now` (Unix seconds)."""
    certificate = _loaded(der)
    name = certificate.subject.rfc4514_string()
    when = datetime.datetime.fromtimestamp(now, datetime.UTC)
    if when < certificate.not_valid_before_utc:
        raise CertificateError(f"'{name}' is not valid before {certificate.not_valid_before_utc:%Y-%m-%dT%H:%M:%SZ}")
    if when > certificate.not_valid_after_utc:
        raise CertificateError(f"'{name}' has expired at {certificate.not_valid_after_utc:%Y-%m-%dT%H:%M:%SZ}")


def authority_of(chain: Sequence[bytes], authorities: Sequence[bytes], now: float) -> bytes:
    """The first of `authorities` that the leaf's chain comes to, from the leaf upwards; raises CertificateError.

    `chain` is what the device has sent, the leaf first, all in DER. Of constraints those of path length and key usage
    are looked at (RFC 5280, 6.1.4), of the enrolled CA as well.
    """
    trusted = [(der, _loaded(der)) for der in authorities]
    sent = [(der, _loaded(der)) for der in chain]
    der, certificate = sent[0]
    below = 0  # CAs between the issuer and the leaf, without those that issued their own successor
    for _ in range(MAX_CHAIN):
        require_valid(der, now)
        signers = [pair for pair in (*trusted, *sent[1:]) if pair[0] != der and _has_signed(pair[1], certificate)]
        unfit = [_why_no_issuer(loaded, below) for _, loaded in signers]
        if "" not in unfit:
            why = f"may not issue it: {unfit[0]}" if unfit else "is not enrolled, and its certificate did not come"
            raise CertificateError(f"its issuer '{certificate.issuer.rfc4514_string()}' {why}")
        der, certificate = signers[unfit.index("")]
        if der in authorities:
            require_valid(der, now)
            return der
        below += certificate.subject != certificate.issuer
    raise CertificateError(f"more than {MAX_CHAIN} certificates stand between it and a CA")


def is_authority(der: bytes) -> bool:
    """Whether a certificate may issue others."""
    return not _why_no_issuer(_loaded(der), 0)


def _loaded(der: bytes) -> "x509.Certificate":
    from cryptography import x509
    from cryptography.exceptions import UnsupportedAlgorithm

    try:
        certificate = x509.load_der_x509_certificate(der)
        _ = certificate.subject, certificate.issuer  # which are read no sooner than somebody asks
        return certificate
    except (ValueError, TypeError, UnsupportedAlgorithm, x509.InvalidVersion):  # TypeError: a name of bits
        raise CertificateError("it can't be read") from None


def _has_signed(issuer: "x509.Certificate", certificate: "x509.Certificate") -> bool:
    from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm

    try:
        certificate.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
        return False
    return True


def _why_no_issuer(issuer: "x509.Certificate", below: int) -> str:
    """Why it may not issue a certificate with so many CAs below it; empty where it may."""
    from cryptography import x509

    try:
        constraints = issuer.extensions.get_extension_for_class(x509.BasicConstraints).value
        if not constraints.ca:
            return "it is no CA"
        if constraints.path_length is not None and below > constraints.path_length:
            return f"its path length is {constraints.path_length}"
        usage = issuer.extensions.get_extension_for_class(x509.KeyUsage).value
    except x509.ExtensionNotFound as error:
        return "" if error.oid == x509.KeyUsage.oid else "it is no CA"
    except (ValueError, x509.DuplicateExtension):
        return "its extensions can't be read"
    return "" if usage.key_cert_sign else "its key usage has no keyCertSign"
