"""What a device and whoever issues its certificate hand each other: the request with its key, and the certificate.

`dps-agent enroll --x509` makes key and request (PKCS #10), `dps-agent install-certificate` takes what came of it. The
key does not leave the device. Nothing here needs a newer `cryptography` than 38, which Debian 12 has.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, NamedTuple

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from dps_agent.der import validity
from dps_agent.host.config import ConfigurationError, is_sealed, password_file
from dps_agent.host.device_certificates import (
    CHAIN_LIMIT,
    KEY_SETTING,
    SETTING,
    certificates_in,
    chain_in,
    private_key,
    tpm_of,
)
from dps_agent.host.issuers import has_issued
from dps_agent.host.parts import offline_runner, open_tpm
from dps_agent.host.printed import utc_text
from dps_agent.host.private_file import write_private
from dps_agent.settings import X509
from dps_hal.errors import AskOperator
from dps_hal.host.regular import open_regular, read_regular, replace_file, sync_folder_of

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes

    from dps_agent.host.config import Configuration


class Installed(NamedTuple):
    """The device's own certificate, and how many certificates of CAs stand behind it."""

    subject: str
    issuer: str
    not_after: str  # RFC 3339
    sha256: str  # of its DER, hex in upper case
    authorities: int


def request(configuration: Configuration, in_file: bool = False) -> tuple[str, bool]:
    """A request for the device's certificate, PEM, by the key that it has; True: that was made just now.

    The TPM makes it, unless it is to be `in_file`; one that is there stays where it is. ConfigurationError where the
    settings name no certificate, or the key is none, or is not `in_file`; AskOperator `agent.file`,
    `tpm.tls_provider` where TLS could not use the TPM's, and what the TPM raises.
    """
    _require_x509(configuration)
    path, _ = password_file(configuration.device_key_file, os.environ)
    made = not os.path.lexists(path)
    if made and in_file:
        new = ec.generate_private_key(ec.SECP256R1())
        write_private(path, new.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    elif made:
        _make_in_tpm(configuration, path)
    elif in_file and is_sealed(configuration):
        text = f"{KEY_SETTING}: with --key-in-file expected a key in the clear, or none yet; a TPM has that in {path}"
        raise ConfigurationError("config.invalid", [text])
    key = private_key(configuration, open_tpm)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, configuration.registration_id)])

    def sign() -> x509.CertificateSigningRequest:
        return x509.CertificateSigningRequestBuilder().subject_name(name).sign(key, SHA256())

    tpm = tpm_of(key)
    signed = sign() if tpm is None else offline_runner(configuration, tpm).ask_tpm(sign)
    return signed.public_bytes(Encoding.PEM).decode(), made


def _make_in_tpm(configuration: Configuration, path: str) -> None:
    """A key in the TPM, and its file, once it is known that TLS can use both."""
    from dps_agent.host.tpm_private_key import made_by

    tpm, tcti = open_tpm(configuration), configuration.tpm.tcti
    if configuration.tpm.backend == "simulator":
        text = 'expected a TPM, or --key-in-file; came backend = "simulator", with whose keys TLS cannot sign'
        raise ConfigurationError("config.invalid", [f"tpm.backend: {text}"])
    write_private(path, offline_runner(configuration, tpm).ask_tpm(lambda: made_by(tpm, tcti)))


def install(configuration: Configuration, source: str) -> Installed:
    """Makes the chain in the file `source` the device's, once all in it was checked; AskOperator says what is wrong."""
    _require_x509(configuration)
    try:
        content = read_regular(source, CHAIN_LIMIT)
    except OSError as error:
        raise AskOperator("agent.file", f"{source} cannot be read: {error.strerror}") from None
    chain = _checked(configuration, content, source)
    path = configuration.certificate_file
    try:
        if os.path.lexists(path):
            os.close(open_regular(path))  # refuses what is no file, and root a link that another user put there
        path = os.path.realpath(path)
        umask = os.umask(0o022)  # a certificate is no secret, and by root's umask the service might not read it
        try:
            replace_file(path, b"".join(each.public_bytes(Encoding.PEM) for each in chain))
        finally:
            os.umask(umask)
        sync_folder_of(path)
    except OSError as error:
        raise AskOperator("agent.file", f"{path} cannot be written: {error.strerror}") from None
    return _installed(chain)


def installed(configuration: Configuration) -> Installed:
    """What `certificate_file` holds, checked as `install` does; ConfigurationError, AskOperator."""
    return _installed(_checked(configuration, chain_in(configuration), configuration.certificate_file))


def _require_x509(configuration: Configuration) -> None:
    if configuration.attestation != X509:
        text = (
            f'attestation: expected "{X509}", for which a device has a certificate; came "{configuration.attestation}"'
        )
        raise ConfigurationError("config.invalid", [text])


def _checked(configuration: Configuration, content: bytes, source: str) -> list[x509.Certificate]:
    """The chain in `content`, the device's own certificate first; ConfigurationError says what is wrong with it."""
    try:
        ders = certificates_in(content)
        valid_s = {x509.load_der_x509_certificate(each): validity(each) for each in ders}  # first and last second
        rest = list(valid_s)  # each once
    except (ValueError, UnsupportedAlgorithm):
        raise _refused("expected certificates in PEM; it holds none, or one that cannot be read", source) from None
    public = _public(private_key(configuration, open_tpm).public_key())
    own = next((each for each in rest if _public_of(each) == public), None)
    if own is None:
        what = f"expected a certificate for the key in {KEY_SETTING}; none of its {len(rest)} is"
        raise _refused(what, source)
    chain = [own]
    rest.remove(own)
    while (above := next((each for each in rest if has_issued(each, chain[-1])), None)) is not None:
        chain.append(above)
        rest.remove(above)
    if rest:
        strangers = ", ".join(f"'{each.subject.rfc4514_string()}'" for each in rest)
        raise _refused(f"expected what leads from the device's certificate upwards; {strangers} does not", source)
    names = [str(each.value) for each in own.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    wanted = configuration.registration_id
    if names != [wanted]:
        raise _refused(f"expected CN={wanted}, the registration id; came '{own.subject.rfc4514_string()}'", source)
    if not _for_clients(own):
        raise _refused("expected a certificate for TLS clients; its extended key usage has something else", source)
    now_s = int(time.time())
    clock = f"this device's clock says {utc_text(now_s)}"
    for each in chain:
        name, (first_s, last_s) = each.subject.rfc4514_string(), valid_s[each]
        if now_s < first_s:
            raise _refused(f"'{name}' is not valid before {utc_text(first_s)}; {clock}", source)
        if now_s > last_s:
            raise _refused(f"'{name}' has ended at {utc_text(last_s)}; {clock}", source)
    return chain


def _installed(chain: list[x509.Certificate]) -> Installed:
    own = chain[0]
    not_after = utc_text(validity(own.public_bytes(Encoding.DER))[1])
    sha256 = own.fingerprint(SHA256()).hex().upper()
    return Installed(own.subject.rfc4514_string(), own.issuer.rfc4514_string(), not_after, sha256, len(chain) - 1)


def _public_of(certificate: x509.Certificate) -> bytes:
    """The public key in it as DER; empty for one of an unknown kind."""
    try:
        return _public(certificate.public_key())
    except (ValueError, UnsupportedAlgorithm):
        return b""


def _public(key: CertificatePublicKeyTypes) -> bytes:
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def _for_clients(certificate: x509.Certificate) -> bool:
    """Whether a TLS client may show it: extended key usages are not limited, or this is among them."""
    try:
        usages = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    except x509.ExtensionNotFound:
        return True
    except ValueError:
        return False
    return ExtendedKeyUsageOID.CLIENT_AUTH in usages or ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE in usages


def _refused(what: str, source: str) -> ConfigurationError:
    return ConfigurationError("config.invalid", [f"{SETTING}: {what} ({source})"])
