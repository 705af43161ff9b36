"""Endorsement key certificates: whose they are, whether a maker that is trusted signed them, and of which TPM.

Sources: TCG EK Credential Profile 2.5, 3.1 and 3.2; RFC 5280. The chain is verified by `cryptography`, whose
algorithms are those of the web: a chain signed with SHA-1 is refused.
"""

from __future__ import annotations

import datetime
import re
from pathlib import Path
from typing import NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509 import verification

from dps_hal.errors import AskOperator
from dps_hal.tpm.ek_certificate import certified_key
from dps_hal.tpm.keys import rsa_modulus

EK_CERTIFICATE = x509.ObjectIdentifier("2.23.133.8.1")  # tcg-kp-EKCertificate
MANUFACTURER = x509.ObjectIdentifier("2.23.133.2.1")
MODEL = x509.ObjectIdentifier("2.23.133.2.2")
FIRMWARE = x509.ObjectIdentifier("2.23.133.2.3")
FILE_LIMIT = 64 * 1024  # bytes of one certificate
EXPONENT = 65537  # of every key that `check_ek_public` takes
_VENDOR = re.compile(r"id:[0-9A-Fa-f]{8}")
_DAMAGED = (ValueError, TypeError, x509.DuplicateExtension, x509.UnsupportedGeneralNameType)  # where a field is read
_PEM = b"-----BEGIN"
_DER = Encoding.DER


class Verdict(NamedTuple):
    """What is to be said of one device's certificate; `why` is empty where it is verified."""

    why: str
    manufacturer: str = ""  # "id:" and four ASCII characters in hex, with the characters behind it
    model: str = ""
    firmware: str = ""

    @property
    def tpm(self) -> str:
        """Maker, model and firmware on one line, empty where the certificate does not say."""
        return " ".join(filter(None, (self.manufacturer, self.model, self.firmware)))


class Certificates:
    """The certificates of a folder, by the keys that they certify, and who is trusted to have signed them.

    `folder` has one certificate a file, in DER or PEM, under any name. AskOperator `config.invalid` where a file can't
    be read as what it is for.
    """

    def __init__(self, folder: Path, roots: Path, intermediates: Path | None, now: datetime.datetime) -> None:
        self._by_modulus: dict[bytes, list[x509.Certificate]] = {}  # a key may have been certified again
        self.unreadable: list[str] = []  # names of files in the folder that are no certificate of an RSA key
        self._used: set[bytes] = set()
        self._intermediates = _bundle(intermediates, "--ek-intermediates") if intermediates else []
        store = verification.Store(_bundle(roots, "--ek-roots"))
        builder = verification.PolicyBuilder().store(store).time(now)
        builder = builder.extension_policies(ca_policy=_ca_policy(), ee_policy=_ee_policy())
        self._verifier = builder.build_client_verifier()
        if not folder.is_dir():
            raise AskOperator("config.invalid", f"--ek-certificates: expected a folder; {folder} is none")
        for path in sorted(folder.iterdir()):
            self._read(path)

    def __len__(self) -> int:
        return sum(map(len, self._by_modulus.values()))

    @property
    def unused(self) -> int:
        """How many certify a key that no verdict was asked for."""
        return sum(len(found) for modulus, found in self._by_modulus.items() if modulus not in self._used)

    def verdict(self, ek: bytes) -> Verdict:
        """On the certificates of a checked EK's TPM2B_PUBLIC: one that is verified, else the last one."""
        modulus = rsa_modulus(ek)
        self._used.add(modulus)
        verdict = Verdict("no certificate in the folder is for this key")
        for certificate in self._by_modulus.get(modulus, ()):
            verdict = self._on(certificate)
            if not verdict.why:
                break
        return verdict

    def _on(self, certificate: x509.Certificate) -> Verdict:
        try:
            said = _attributes(certificate)
        except _DAMAGED as error:
            return Verdict(f"its extensions are damaged: {error}")
        try:
            self._verifier.verify(certificate, self._intermediates)
        except (verification.VerificationError, *_DAMAGED) as error:  # of the chain, too
            return Verdict(f"its chain to the roots is not verified: {error}", *said)
        if not _VENDOR.fullmatch(said[0].partition(" ")[0]):
            return Verdict(f"expected the TPM's manufacturer as id:XXXXXXXX; came {said[0]!r}", *said)
        return Verdict("", *said)

    def _read(self, path: Path) -> None:
        if not path.is_file():
            return
        with path.open("rb") as file:
            content = file.read(FILE_LIMIT + 1)
        try:
            is_pem = content.lstrip().startswith(_PEM)
            certificate = (x509.load_pem_x509_certificate if is_pem else x509.load_der_x509_certificate)(content)
            modulus, exponent = certified_key(certificate.public_bytes(_DER))
            if exponent != EXPONENT:
                raise ValueError("that of an endorsement key is 65537")
        except (ValueError, x509.InvalidVersion):
            self.unreadable.append(path.name)
        else:
            self._by_modulus.setdefault(modulus, []).append(certificate)


def _bundle(path: Path, option: str) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(path.read_bytes())
    except (OSError, ValueError, x509.InvalidVersion) as error:
        raise AskOperator("config.invalid", f"{option}: expected certificates in PEM in {path}; {error}") from None


def _may_sign(policy: verification.Policy, certificate: x509.Certificate, extension: x509.KeyUsage | None) -> None:
    if extension is not None and not extension.key_cert_sign:
        raise ValueError("its key may not sign certificates")


def _certifies_a_key(
    policy: verification.Policy, certificate: x509.Certificate, extension: x509.ExtendedKeyUsage | None
) -> None:
    if extension is not None and EK_CERTIFICATE not in extension:
        raise ValueError(f"its extended key usage is not {EK_CERTIFICATE.dotted_string}, an EK certificate")


def _ca_policy() -> verification.ExtensionPolicy:
    anything, agnostic = verification.ExtensionPolicy.permit_all(), verification.Criticality.AGNOSTIC
    authority = anything.require_present(x509.BasicConstraints, agnostic, None)
    return authority.may_be_present(x509.KeyUsage, agnostic, _may_sign)


def _ee_policy() -> verification.ExtensionPolicy:
    """Extensions of TPMs are unknown to the web, and critical at times."""
    anything, agnostic = verification.ExtensionPolicy.permit_all(), verification.Criticality.AGNOSTIC
    return anything.may_be_present(x509.ExtendedKeyUsage, agnostic, _certifies_a_key)


def _attributes(certificate: x509.Certificate) -> tuple[str, str, str]:
    """Manufacturer, model and firmware of the TPM, as the certificate has them; ValueError for a damaged extension."""
    try:
        extension = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
        names = extension.value.get_values_for_type(x509.DirectoryName)
    except x509.ExtensionNotFound:
        names = []
    found = {attribute.oid: str(attribute.value) for name in names for attribute in name}
    vendor = found.get(MANUFACTURER, "")
    if _VENDOR.fullmatch(vendor):
        letters = bytes.fromhex(vendor[3:]).rstrip(b"\0 ")
        vendor += f" ({letters.decode()})" if letters.isalnum() else ""
    return vendor, found.get(MODEL, ""), found.get(FIRMWARE, "")
