"""The issuer of device certificates: a request (PKCS #10) goes in, the chain of an own CA comes out.

A preview of the real service: one root, and one issuing CA for each policy that an enrolment names; P-384 with SHA-384,
as documented for Azure Device Registry. What is not published is ours: names, lives of the CAs, extensions.
"""

import base64
import datetime
import functools
import hmac
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dps_emulator.certificates import CertificateError

if TYPE_CHECKING:  # as in `certificates`
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

FIRST_REGISTRATION_API = "2025-07-01"  # of DPS, by its date, and "preview": the first with `csr`
FIRST_RENEWAL_API = "2025-08-01"  # of a hub: the first with `$iothub/credentials`
MAX_REQUEST_BYTES = 8 * 1024  # base64 of a request; documented for hubs, at DPS ours
LEAF_LIFE_S = 30 * 86_400  # documented are 7 to 90 days
_CA_LIFE_DAYS = 20 * 365
_BEGUN = datetime.datetime(2025, 1, 1, tzinfo=datetime.UTC)  # the CAs' own: no clock of a test is before
_P384_ORDER = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFC7634D81F4372DDF581A0DB248B0A77AECEC196ACCC52973


def has_requests(api_version: str, first: str) -> bool:
    """Whether an api-version such as 2025-07-01-preview is the `first` with requests for certificates, or a later one.

    What was withdrawn, 2021-11-01-preview, had them under other names and does not count.
    """
    return api_version[:10] >= first


def request_of(text: object) -> bytes:
    """DER of a request in base64 of one line; raises CertificateError, also where that is no DER at all."""
    if not isinstance(text, str) or not text:
        raise CertificateError("is missing, or no text")
    if len(text) > MAX_REQUEST_BYTES:
        raise CertificateError(f"has {len(text)} characters, more than {MAX_REQUEST_BYTES}")
    try:
        return base64.b64decode(text, validate=True)
    except ValueError:  # binascii.Error is one; text that is not ASCII another
        raise CertificateError("is not base64 of DER in one line") from None


def require_request(der: bytes, name: str) -> None:
    """Raises CertificateError unless the key in this request signed it, and its CN is `name`, letter for letter."""
    names = _names_in(_requested(der))
    if names != [name]:
        raise CertificateError(f"has CN '{', '.join(names)}', expected '{name}'")


def _names_in(request: "x509.CertificateSigningRequest") -> list[str]:
    from cryptography.x509 import NameOID

    return [str(each.value) for each in request.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]


def _requested(der: bytes) -> "x509.CertificateSigningRequest":
    from cryptography import x509
    from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm

    try:
        request = x509.load_der_x509_csr(der)
        _names_in(request)  # which is read no sooner than somebody asks
        is_signed = request.is_signature_valid
    except (ValueError, TypeError, UnsupportedAlgorithm, InvalidSignature, x509.InvalidVersion):
        raise CertificateError("is no PKCS #10 that can be read") from None
    if not is_signed:
        raise CertificateError("is not signed by the key that it names")
    return request


@dataclass(frozen=True)
class _Authority:
    """A CA: what it signs with, and its certificate."""

    key: "EllipticCurvePrivateKey"
    certificate: "x509.Certificate"


class Issuer:
    """Issues; the root is made or read when the first certificate is asked for.

    `kept()` is the root's key and certificate, PEM. The keys of the issuing CAs follow from the root's, so nothing else
    has to be kept.
    """

    def __init__(self, random_bytes: Callable[[int], bytes], kept: Callable[[], bytes] | None = None) -> None:
        self._random_bytes = random_bytes
        self._kept = kept or new_root
        self._authorities: dict[str, _Authority] = {}

    def authority(self, policy: str) -> bytes:
        """The certificate of a policy's issuing CA; DER."""
        return _der(self._authority(policy).certificate)

    def chain(self, policy: str, request: bytes, life_s: int, now: float) -> tuple[bytes, ...]:
        """A certificate for a request, those of the issuing CA and of the root; DER. Raises CertificateError.

        Whose name the request has is the caller's to look at. It is valid from `now` (Unix seconds) for `life_s`.
        """
        from cryptography import x509
        from cryptography.x509.oid import ExtendedKeyUsageOID

        asked = _requested(request)
        authority = self._authority(policy)
        begin = datetime.datetime.fromtimestamp(int(now), datetime.UTC)
        usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH])
        builder = self._builder(asked.subject, authority.certificate.subject, asked.public_key())
        builder = builder.not_valid_before(begin).not_valid_after(begin + datetime.timedelta(seconds=life_s))
        builder = builder.add_extension(x509.BasicConstraints(False, None), True).add_extension(usage, False)
        return _der(_signed(builder, authority.key)), _der(authority.certificate), _der(self._root.certificate)

    @functools.cached_property
    def _root(self) -> _Authority:
        from cryptography import x509
        from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
        from cryptography.hazmat.primitives.serialization import load_pem_private_key

        content = self._kept()
        key = load_pem_private_key(content, None)
        if not isinstance(key, EllipticCurvePrivateKey):
            raise ValueError("expected a key on a curve")
        return _Authority(key, x509.load_pem_x509_certificate(content))

    def _authority(self, policy: str) -> _Authority:
        if policy not in self._authorities:
            from cryptography import x509
            from cryptography.hazmat.primitives.asymmetric import ec

            root = self._root
            secret = root.key.private_numbers().private_value.to_bytes(48)
            number = int.from_bytes(hmac.digest(secret, b"issuing\0" + policy.encode(), "sha384"))
            key = ec.derive_private_key(number % (_P384_ORDER - 1) + 1, ec.SECP384R1())
            subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, policy)])
            builder = _dated(self._builder(subject, root.certificate.subject, key.public_key()))
            self._authorities[policy] = _Authority(key, _signed(_as_authority(builder, 0), root.key))
        return self._authorities[policy]

    def _builder(self, subject: "x509.Name", issuer: "x509.Name", public_key: object) -> "x509.CertificateBuilder":
        from cryptography import x509

        serial_number = int.from_bytes(self._random_bytes(16)) | 1
        builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer)
        return builder.public_key(public_key).serial_number(serial_number)  # type: ignore[arg-type]


def new_root() -> bytes:
    """A root's key and certificate; PEM."""
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    key = ec.generate_private_key(ec.SECP384R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "dps-emulator credential")])
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    builder = _as_authority(_dated(builder.serial_number(x509.random_serial_number())), None)
    secret = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return secret + _signed(builder, key).public_bytes(Encoding.PEM)


def _dated(builder: "x509.CertificateBuilder") -> "x509.CertificateBuilder":
    return builder.not_valid_before(_BEGUN).not_valid_after(_BEGUN + datetime.timedelta(days=_CA_LIFE_DAYS))


def _as_authority(builder: "x509.CertificateBuilder", path_length: int | None) -> "x509.CertificateBuilder":
    from cryptography import x509

    usage = {name: name in ("key_cert_sign", "crl_sign") for name in _USAGES}
    builder = builder.add_extension(x509.BasicConstraints(True, path_length), True)
    return builder.add_extension(x509.KeyUsage(**usage), True)


_USAGES = (
    "digital_signature",
    "content_commitment",
    "key_encipherment",
    "data_encipherment",
    "key_agreement",
    "key_cert_sign",
    "crl_sign",
    "encipher_only",
    "decipher_only",
)


def _signed(builder: "x509.CertificateBuilder", key: "EllipticCurvePrivateKey") -> "x509.Certificate":
    from cryptography.hazmat.primitives.hashes import SHA384

    return builder.sign(key, SHA384())


def _der(certificate: "x509.Certificate") -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding

    return certificate.public_bytes(Encoding.DER)
