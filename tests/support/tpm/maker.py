"""A TPM as its maker delivers it: with an endorsement key and, in NV memory, a certificate for that."""

from __future__ import annotations

import datetime
import struct
import subprocess
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from dps_hal.tpm.keys import EK_ATTRIBUTES, EK_AUTH_POLICY, rsa_modulus, sized

_LIMIT_S = 60


def certify(folder: Path) -> Path:
    """Makes the state of a certified TPM 2.0 in `folder` by swtpm_setup and a CA of its own; returns its state folder.

    Works offline and leaves the machine's own swtpm CA alone. RuntimeError with the program's output where it fails.
    """
    authority, state = folder / "authority", folder / "tpm"
    for new in (folder, state):
        new.mkdir(parents=True, exist_ok=True)
    (folder / "authority.conf").write_text(
        f"statedir = {authority}\nsigningkey = {authority}/signkey.pem\n"
        f"issuercert = {authority}/issuercert.pem\ncertserial = {authority}/certserial\n"
    )
    (folder / "authority.options").write_text(
        "--platform-manufacturer Test\n--platform-version 1\n--platform-model Test\n"
    )
    (folder / "setup.conf").write_text(
        "create_certs_tool = /usr/bin/swtpm_localca\n"
        f"create_certs_tool_config = {folder}/authority.conf\ncreate_certs_tool_options = {folder}/authority.options\n"
        "active_pcr_banks = sha256\n"
    )
    words = ["swtpm_setup", "--tpm2", "--tpm-state", str(state), "--create-ek-cert", "--config", f"{folder}/setup.conf"]
    ended = subprocess.run(words, capture_output=True, text=True, timeout=_LIMIT_S, check=False)
    if ended.returncode != 0:
        raise RuntimeError(f"{' '.join(words)} ended with {ended.returncode}:\n{ended.stdout}{ended.stderr}")
    return state


def certificate_for(ek: bytes) -> bytes:
    """A certificate in DER for an endorsement key, by its TPM2B_PUBLIC."""
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "a TPM's maker")])
    key = rsa.RSAPublicNumbers(65537, int.from_bytes(rsa_modulus(ek), "big")).public_key()
    now = datetime.datetime(2026, 1, 1)
    builder = x509.CertificateBuilder(name, name, key, x509.random_serial_number(), now, now)
    made = builder.sign(ec.generate_private_key(ec.SECP256R1()), hashes.SHA256())
    return made.public_bytes(serialization.Encoding.DER)


def template(unique: bytes, attributes: int = EK_ATTRIBUTES, exponent: int = 0) -> bytes:
    """A TPMT_PUBLIC as a maker leaves it in NV memory."""
    head = struct.pack(">HHI", 1, 11, attributes) + sized(EK_AUTH_POLICY)
    return head + struct.pack(">HHHHHI", 6, 128, 0x43, 16, 2048, exponent) + sized(unique)
