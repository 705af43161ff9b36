"""Which certificate was issued by which: names, signatures, and that it is a CA; neither dates nor trust."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, padding, rsa
from cryptography.x509.oid import SignatureAlgorithmOID

if TYPE_CHECKING:
    from collections.abc import Sequence


def issuers_among(ders: Sequence[bytes]) -> tuple[int, ...]:
    """For each certificate the place of the one whose CA has signed it, -1 where that is none of them."""
    found: list[x509.Certificate | None] = []
    for each in ders:
        try:
            found.append(x509.load_der_x509_certificate(each))
        except (ValueError, UnsupportedAlgorithm):
            found.append(None)

    def place(certificate: x509.Certificate | None) -> int:
        if certificate is None:
            return -1
        above = (at for at, each in enumerate(found) if each is not None and has_issued(each, certificate))
        return next(above, -1)

    return tuple(place(each) for each in found)


def has_issued(issuer: x509.Certificate, certificate: x509.Certificate) -> bool:
    """Whether `issuer` is a CA whose key signed the certificate."""
    if certificate.issuer != issuer.subject:
        return False
    signed = certificate.signature, certificate.tbs_certificate_bytes
    try:
        key, hashed = issuer.public_key(), certificate.signature_hash_algorithm
        if isinstance(key, ec.EllipticCurvePublicKey) and hashed is not None:
            key.verify(*signed, ec.ECDSA(hashed))
        elif isinstance(key, rsa.RSAPublicKey) and hashed is not None:
            is_pss = certificate.signature_algorithm_oid == SignatureAlgorithmOID.RSASSA_PSS
            pss = padding.PSS(padding.MGF1(hashed), padding.PSS.AUTO)
            key.verify(*signed, pss if is_pss else padding.PKCS1v15(), hashed)
        elif isinstance(key, (ed25519.Ed25519PublicKey, ed448.Ed448PublicKey)):
            key.verify(*signed)
        else:
            return False
        return issuer.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except (ValueError, InvalidSignature, UnsupportedAlgorithm, x509.ExtensionNotFound):
        return False
