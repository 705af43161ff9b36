"""Certificates as private authorities and inspecting proxies make them, and what TLS says of them, in memory."""

from __future__ import annotations

import datetime
import ssl
from typing import TYPE_CHECKING, NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtensionOID, NameOID

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path
    from typing import TypeAlias

    Extensions: TypeAlias = Sequence[tuple[x509.ExtensionType, bool]]

PEER = "dps.example"
SEQUENCE, GENERALIZED_TIME, UTC_TIME = 0x30, 0x18, 0x17  # X.680, 8.6

CA: Extensions = [(x509.BasicConstraints(True, None), True)]
CA_NOT_CRITICAL: Extensions = [(x509.BasicConstraints(True, None), False)]
NO_CA: Extensions = [(x509.BasicConstraints(False, None), True)]
SIGNS_CERTIFICATES = (x509.KeyUsage(*(name == "sign" for name in ("", "", "", "", "", "sign", "", "", ""))), True)
SIGNS_MESSAGES = (x509.KeyUsage(*(name == "sign" for name in ("sign", "", "", "", "", "", "", "", ""))), True)
FOR_PEER: Extensions = [(x509.SubjectAlternativeName([x509.DNSName(PEER)]), False)]


class Party(NamedTuple):
    """Whose name and key a certificate has, and that certificate in DER."""

    name: x509.Name
    key: ec.EllipticCurvePrivateKey
    certificate: bytes

    @property
    def pem(self) -> str:
        """The certificate as a file has it."""
        return ssl.DER_cert_to_PEM_cert(self.certificate)


def party(
    name: str,
    issuer: Party | None,
    extensions: Extensions,
    names_issuers_key: bool = True,
    dates: tuple[tuple[int, bytes], tuple[int, bytes]] | None = None,
) -> Party:
    """Somebody new, certified by `issuer` (None: by itself) for a day; `dates` are tags and texts of other times."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    key = ec.generate_private_key(ec.SECP256R1())
    by = Party(subject, key, b"") if issuer is None else issuer
    now = datetime.datetime.now(datetime.UTC)
    day = datetime.timedelta(days=1)
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(by.name).public_key(key.public_key())
    builder = builder.serial_number(x509.random_serial_number()).not_valid_before(now - day).not_valid_after(now + day)
    builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)
    if names_issuers_key:
        named = x509.AuthorityKeyIdentifier.from_issuer_public_key(by.key.public_key())
        builder = builder.add_extension(named, False)
    for extension, critical in extensions:
        builder = builder.add_extension(extension, critical)
    made = builder.sign(by.key, hashes.SHA256())
    der = made.public_bytes(serialization.Encoding.DER)
    if dates is not None:
        der = _with_dates(made, by.key, dates)
    return Party(subject, key, der)


def names_beside(*others: bytes) -> tuple[x509.ExtensionType, bool]:
    """A subjectAltName with the peer's name and further ones, which may be any bytes."""
    names = b"".join(b"\x82" + bytes([len(name)]) + name for name in (PEER.encode(), *others))
    return x509.UnrecognizedExtension(ExtensionOID.SUBJECT_ALTERNATIVE_NAME, _der(SEQUENCE, names)), False


def serving(folder: Path, server: Party, *sent: Party) -> ssl.SSLContext:
    """The context of a server that shows `server` and sends also the certificates `sent`."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(written(folder / "chain.pem", server, *sent))
    return context


def written(path: Path, own: Party, *sent: Party) -> Path:
    """A PEM file of somebody's key, certificate and further certificates."""
    secret = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    key = own.key.private_bytes(serialization.Encoding.PEM, *secret).decode()
    path.write_text(key + "".join(each.pem for each in (own, *sent)))
    return path


def shaken(client: ssl.SSLContext, folder: Path, server: Party, *sent: Party, name: str = PEER) -> ssl.SSLObject:
    """The client's end of a connection to `server`, which sends also the certificates `sent`; raises what TLS does."""
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    ours = client.wrap_bio(back, there, server_hostname=name)
    theirs = serving(folder, server, *sent).wrap_bio(there, back, server_side=True)
    for _ in range(10):
        waiting = 0
        for end in (ours, theirs):
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                waiting += 1
        if not waiting:
            return ours
    raise AssertionError("the handshake does not end")


def _with_dates(
    made: x509.Certificate, key: ec.EllipticCurvePrivateKey, dates: tuple[tuple[int, bytes], tuple[int, bytes]]
) -> bytes:
    """`made` with another validity, signed anew."""
    written = [
        moment.strftime("%y%m%d%H%M%SZ").encode() for moment in (made.not_valid_before_utc, made.not_valid_after_utc)
    ]
    before = _der(SEQUENCE, b"".join(_der(UTC_TIME, text) for text in written))
    after = _der(SEQUENCE, b"".join(_der(tag, text) for tag, text in dates))
    tbs = made.tbs_certificate_bytes
    assert tbs.count(before) == 1
    head = 4  # tag, and a length of three bytes
    tbs = _der(SEQUENCE, tbs[head:].replace(before, after))
    algorithm = _der(SEQUENCE, bytes.fromhex("06082a8648ce3d040302"))  # ecdsa-with-SHA256, RFC 5758, 3.2
    signature = key.sign(tbs, ec.ECDSA(hashes.SHA256()))
    return _der(SEQUENCE, tbs + algorithm + _der(0x03, b"\0" + signature))


def _der(tag: int, content: bytes) -> bytes:
    size = len(content)
    length = bytes([size]) if size < 128 else bytes([0x82]) + size.to_bytes(2)
    return bytes([tag]) + length + content


def dated(not_before: bytes, not_after: bytes) -> Party:
    """The peer, certified by ROOT between two texts of GeneralizedTime."""
    return party(PEER, ROOT, FOR_PEER, dates=((GENERALIZED_TIME, not_before), (GENERALIZED_TIME, not_after)))


def _private(extensions: Extensions) -> tuple[list[Party], list[Party]]:
    """The peer, certified by a root with those extensions; and that root."""
    root = party("private", None, extensions)
    return [party(PEER, root, FOR_PEER)], [root]


ROOT = party("root", None, [*CA, SIGNS_CERTIFICATES])
INTERMEDIATE = party("intermediate", ROOT, [*CA, SIGNS_CERTIFICATES])
SERVER = party(PEER, INTERMEDIATE, FOR_PEER)
TRUSTED = ""
_UNKNOWN = "unable to get local issuer certificate"
# What the server sends, its own certificate first; what is in ca_file; the verdict in OpenSSL's words.
CHAINS: dict[str, tuple[tuple[list[Party], list[Party]], str]] = {
    "a whole chain": (([SERVER, INTERMEDIATE], [ROOT]), TRUSTED),
    "an intermediate alone in ca_file": (([SERVER, INTERMEDIATE], [INTERMEDIATE]), TRUSTED),
    "an intermediate in ca_file that is not sent": (([SERVER], [INTERMEDIATE]), TRUSTED),
    "no Authority Key Identifier": (([party(PEER, ROOT, FOR_PEER, False)], [ROOT]), TRUSTED),
    "a root whose basicConstraints are not critical": (_private([*CA_NOT_CRITICAL, SIGNS_CERTIFICATES]), TRUSTED),
    "a root without keyUsage": (_private(CA), TRUSTED),
    "an intermediate that is not sent": (([SERVER], [ROOT]), _UNKNOWN),
    "another root": (([SERVER, INTERMEDIATE], [party("root", None, CA)]), _UNKNOWN),
    "a root that is no authority": (_private(NO_CA), "invalid CA certificate"),
    "a root that signs no certificates": (_private([*CA, SIGNS_MESSAGES]), "invalid CA certificate"),
    "expired": (([dated(b"20200101000000Z", b"20210101000000Z")], [ROOT]), "certificate has expired"),
    "not valid yet": (([dated(b"20900101000000Z", b"20910101000000Z")], [ROOT]), "certificate is not yet valid"),
    "a date that is none": (([dated(b"20200101000000Z", b"20990101000000.5Z")], [ROOT]), "format error in certificate"),
}
