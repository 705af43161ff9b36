"""The root certificates of a board: by name from the certifi bundle, or from files."""

from __future__ import annotations

import difflib
import re
import ssl
import time
from pathlib import Path
from typing import Any, NamedTuple

from dps_agent.der import certificates, not_after_s
from dps_text import NotText, text_of

# What Azure's services chain up to: learn.microsoft.com, "Azure Certificate Authority details".
DEFAULT_ROOTS = ("DigiCert Global Root G2", "Microsoft RSA Root Certificate Authority 2017")
_PEM = re.compile(rb"-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----", re.DOTALL)


class RootError(Exception):
    """A root certificate that cannot be used; the text says which and why."""


class Root(NamedTuple):
    """One root: its common name, its certificate in DER, and when it ends."""

    name: str
    certificate: bytes
    not_after_s: int


def find_roots(name_or_file: str, now_s: int) -> list[Root]:
    """The root of that name in the certifi bundle, or the certificates of a file (PEM or DER). RootError."""
    if Path(name_or_file).is_file():
        found = _from_file(Path(name_or_file))
    elif name_or_file in (bundle := _bundle()):
        found = [bundle[name_or_file]]
    else:
        near = difflib.get_close_matches(name_or_file, bundle, 1, 0.4)
        hint = f"; the nearest name is {near[0]!r}" if near else ""
        raise RootError(f"{name_or_file!r} is neither a file nor a root in the certifi bundle{hint}")
    for root in found:
        if root.not_after_s <= now_s:
            ended = time.strftime("%Y-%m-%d", time.gmtime(root.not_after_s))
            raise RootError(f"{root.name} ended on {ended}: nothing it signed is accepted")
    return found


def _from_file(path: Path) -> list[Root]:
    try:
        content = path.read_bytes()
        texts = _PEM.findall(content)
        if not texts and content[:1] != b"\x30":  # as DER begins, with a SEQUENCE: X.690, 8.9
            text_of(content)  # says what else it is
        found = [ssl.PEM_cert_to_DER_cert(text.decode()) for text in texts] if texts else certificates(content)
        roots = [_root(certificate) for certificate in found]
    except OSError as error:
        raise RootError(f"{path}: cannot be read: {error.strerror}") from None
    except NotText as error:
        raise RootError(f"{path}: {error}") from None
    except ValueError as error:
        raise RootError(f"{path}: expected certificates in PEM or DER: {error}") from None
    if not roots:
        raise RootError(f"{path}: expected certificates in PEM or DER; it holds none")
    return roots


def _root(certificate: bytes) -> Root:
    """ValueError for what is no certificate of an authority, or none that a board finds in its file."""
    if certificate[:2] != b"\x30\x82":
        raise ValueError("expected a certificate in DER of 256 to 65535 bytes")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        context.load_verify_locations(cadata=certificate)
    except ssl.SSLError as error:
        raise ValueError(error.reason or str(error)) from None
    known: list[Any] = context.get_ca_certs()  # only those that may sign others
    if not known:
        raise ValueError("it is no certificate of an authority")
    names = {key: value for part in known[0]["subject"] for key, value in part}
    name = names.get("commonName") or names.get("organizationalUnitName") or "without a name"
    return Root(name, certificate, not_after_s(certificate))


def _bundle() -> dict[str, Root]:
    import certifi

    return {root.name: root for root in _from_file(Path(certifi.where()))}
