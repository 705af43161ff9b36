"""The manufacturer's certificate of the endorsement key: read, compared, and shown by `enroll` and `check`."""

from __future__ import annotations

import datetime
import json
import os
import random
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from dps_agent.host.cli import main
from dps_hal.ek_certificate import ABSENT, MATCH, MISMATCH, UNREADABLE, certified_key, compare
from dps_hal.errors import AskOperator, RetryLater
from dps_hal.tpm_keys import ek_public
from dps_hal.tpm_upkeep import EK_CERTIFICATE_INDEX, PT_NV_BUFFER_MAX, nv_chunk_bytes
from support import swtpm
from support.backends import BACK_ENDS
from support.claims import assert_refused
from support.swtpm import Swtpm
from support.tpm_maker import certify
from support.tpm_tap import TpmTap

MODULUS = bytes([0xC1]) + bytes(range(1, 256))
EK = ek_public(MODULUS)
RSA_ENCRYPTION = "06092a864886f70d010101 0500"
RSAES_OAEP = (  # RFC 4055, 4.1, with SHA-256, as the EK Credential Profile asks for
    "06092a864886f70d010107"
    "303c a00d300b0609608648016503040201 a11a301806092a864886f70d010108300b0609608648016503040201"
    " a20f300d06092a864886f70d0101090400"
)
EC_KEY = "06072a8648ce3d0201 06082a8648ce3d030107"


def der(tag: int, *contents: bytes) -> bytes:
    """One element in DER."""
    content = b"".join(contents)
    size = len(content)
    if size < 0x80:
        return bytes([tag, size]) + content
    octets = size.to_bytes((size.bit_length() + 7) // 8, "big")
    return bytes([tag, 0x80 | len(octets)]) + octets + content


def certificate(
    algorithm: str = RSA_ENCRYPTION, modulus: bytes = MODULUS, exponent: bytes = b"\1\0\1", versioned: bool = True
) -> bytes:
    """A certificate as far as its public key goes; names, times and signature are filled with anything."""
    anything = der(0x30, bytes(40))
    key = der(0x30, der(2, b"\0" + modulus), der(2, exponent))
    public = der(0x30, der(0x30, bytes.fromhex(algorithm)), der(3, b"\0", key))
    version = der(0xA0, der(2, b"\2")) if versioned else b""
    tbs = der(0x30, version, der(2, b"\1"), anything, anything, anything, anything, public, der(0xA3, anything))
    return der(0x30, tbs, anything, der(3, bytes(257)))


@pytest.mark.parametrize("algorithm", [RSA_ENCRYPTION, RSAES_OAEP], ids=["rsaEncryption", "id-RSAES-OAEP"])
@pytest.mark.parametrize("versioned", [True, False])
def test_the_same_key_is_a_match_under_either_algorithm(algorithm: str, versioned: bool) -> None:
    assert compare(certificate(algorithm, versioned=versioned), EK) == MATCH
    assert compare(certificate(algorithm, versioned=versioned) + b"\xff" * 100, EK) == MATCH


@pytest.mark.parametrize(
    "other",
    [
        certificate(modulus=MODULUS[:-1] + b"\1"),
        certificate(modulus=MODULUS + MODULUS),
        certificate(modulus=MODULUS[:128]),
        certificate(exponent=b"\3"),
    ],
    ids=["another modulus", "longer", "shorter", "another exponent"],
)
def test_another_key_is_a_mismatch(other: bytes) -> None:
    assert compare(other, EK) == MISMATCH


def test_no_certificate_is_absent() -> None:
    assert compare(None, EK) == ABSENT


@pytest.mark.parametrize("content", [b"", b"\x30", b"\x30\x80\0\0", bytes(900), b"\xff" * 900, certificate(EC_KEY)])
def test_what_is_no_certificate_of_an_rsa_key_is_unreadable(content: bytes) -> None:
    assert compare(content, EK) == UNREADABLE


def test_a_certificate_cut_anywhere_is_unreadable() -> None:
    whole = certificate(RSAES_OAEP)
    for size in range(len(whole)):
        assert compare(whole[:size], EK) == UNREADABLE, f"size={size}"


def test_a_damaged_certificate_never_ends_in_anything_but_a_verdict() -> None:
    seed = random.randrange(1 << 32)
    chance = random.Random(seed)
    whole = certificate()
    for _ in range(3000):
        damaged = bytearray(whole)
        for _ in range(chance.randrange(1, 4)):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        assert compare(bytes(damaged), EK) in (MATCH, MISMATCH, UNREADABLE), f"seed={seed}"


@pytest.mark.parametrize("bits", [1024, 2048, 3072])
def test_another_library_reads_the_same_key(bits: int) -> None:
    key = rsa.generate_private_key(65537, bits)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "a TPM's maker")])
    now = datetime.datetime(2026, 1, 1)
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), now, now)
    made = builder.sign(ec.generate_private_key(ec.SECP256R1()), hashes.SHA256())
    numbers = key.public_key().public_numbers()
    assert certified_key(made.public_bytes(serialization.Encoding.DER)) == (
        numbers.n.to_bytes(bits // 8, "big"),
        numbers.e,
    )


# --- on a TPM that has one


@pytest.fixture(scope="module")
def certified(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Swtpm]:
    with Swtpm(certify(tmp_path_factory.mktemp("maker"))) as machine:
        yield machine


class Device:
    """The command line on a certified TPM."""

    def __init__(self, machine: Swtpm, backend: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self._words = ["--set", f"tpm.backend={backend}", "--set", f"tpm.tcti={machine.tcti}"]
        self._words += ["--set", f"state_dir={folder}", "--set", "id_scope=0ne00000000"]
        self._capsys = capsys

    def text(self, *words: str) -> str:
        assert main([*self._words, *words]) == 0
        return self._capsys.readouterr().out

    def document(self, *words: str) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(self.text("--json", *words))
        return answer

    def finding(self, *words: str) -> dict[str, Any]:
        """What `check` says of the certificate."""
        (found,) = [
            check
            for check in self.document("check", "--only", "tpm-certificate", *words)["checks"]
            if check["id"] == "tpm-certificate"
        ]
        return found


@pytest.fixture(params=BACK_ENDS)
def device(
    request: pytest.FixtureRequest,
    certified: Swtpm,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Device:
    for name in [name for name in os.environ if name.startswith("DPS_AGENT_")]:
        monkeypatch.delenv(name)
    return Device(certified, request.param, tmp_path, capsys)


AZURE = ("--set", "tpm.ek_template=azure-c-sdk", "--set", "tpm.ek_handle=0x81010002")


def test_the_key_of_the_tcg_template_matches_the_makers_certificate(device: Device, certified: Swtpm) -> None:
    answer = device.document("enroll")
    assert (answer["ekCertificate"], answer["ekTemplate"]) == ("match", "tcg-l1")
    assert "EK certificate   match: " in device.text("enroll")
    found = device.finding()
    assert (found["result"], found["detail"].split(":")[0]) == ("ok", "match")
    assert certified.leftovers() == []


def test_the_key_of_microsofts_template_does_not_match_and_that_is_no_failure(device: Device) -> None:
    answer = device.document("enroll", *AZURE)
    assert (answer["ekCertificate"], answer["ekTemplate"]) == ("mismatch", None)
    assert "EK certificate   mismatch: " in device.text("enroll", *AZURE)
    found = device.finding(*AZURE)
    assert (found["result"], found["detail"].split(":")[0]) == ("ok", "mismatch")


def test_a_setting_that_the_certificate_contradicts_is_a_warning(device: Device) -> None:
    device.document("enroll", *AZURE)
    for words, verdict in ((AZURE[:2], "match"), (AZURE[2:], "mismatch")):
        found = device.finding(*words)
        assert (found["result"], found["detail"].split(":")[0]) == ("warning", verdict), words
        assert "ek_template" in found["remedy"]


@pytest.mark.parametrize("stated", [100, 512, 1024])
@pytest.mark.parametrize("name", BACK_ENDS)
def test_the_certificate_read_in_chunks_of_the_tpms_own_size_is_whole(name: str, stated: int, certified: Swtpm) -> None:
    def state(command: bytes, response: bytes) -> bytes:
        asked_for = struct.pack(">IIII", 0x17A, 6, PT_NV_BUFFER_MAX, 1)  # GetCapability
        return response[:-4] + struct.pack(">I", stated) if command[6:] == asked_for else response

    with TpmTap(certified.port) as tap:
        tap.change = state
        tpm = BACK_ENDS[name](tap.tcti)
        ek, read = tpm.endorsement_key(), tpm.endorsement_certificate()
        tpm.release()
        sizes = [int.from_bytes(passed.command[-4:-2], "big") for passed in tap.exchanges if passed.name == "NV_Read"]
    assert read is not None
    assert sizes[:-1] == [stated] * (len(sizes) - 1)
    assert (len(sizes) > 1 or stated == 1024) and max(sizes) <= stated, sizes
    key = x509.load_der_x509_certificate(read).public_key()
    assert isinstance(key, rsa.RSAPublicKey)
    assert key.public_numbers().n == int.from_bytes(ek[-256:], "big")


def test_a_size_that_no_tpm_has_is_not_used() -> None:
    for stated, used in ((None, 512), (0, 512), (1, 32), (100, 100), (2048, 2048), (0xFFFFFFFF, 2048)):
        assert nv_chunk_bytes({} if stated is None else {PT_NV_BUFFER_MAX: stated}) == used, f"stated={stated}"


@pytest.mark.parametrize("name", BACK_ENDS)
def test_an_empty_chunk_is_refused_and_ends_the_reading(name: str, certified: Swtpm) -> None:
    with TpmTap(certified.port) as tap:
        empty = struct.pack(">HIIIH", 0x8002, 21, 0, 2, 0) + bytes.fromhex("0000 01 0000")
        tap.change = lambda command, response: empty if command[6:10] == struct.pack(">I", 0x14E) else response
        tpm = BACK_ENDS[name](tap.tcti)
        assert_refused(tpm.endorsement_certificate, RetryLater, "tpm.bus_altered")
        tpm.release()
        assert tap.names.count("NV_Read") == 2  # and once more over a new connection
    assert certified.leftovers() == []


# --- indices that somebody made otherwise

OWNERWRITE, AUTHWRITE, OWNERREAD, AUTHREAD, NO_DA = 1 << 1, 1 << 2, 1 << 17, 1 << 18, 1 << 25  # TPMA_NV


def define_index(machine: Swtpm, attributes: int, password: bytes) -> None:
    """NV_DefineSpace of the certificate's index, and NV_Write by the owner."""
    no_password = struct.pack(">IIHBH", 9, 0x40000009, 0, 0, 0)
    public = struct.pack(">IHIHH", EK_CERTIFICATE_INDEX, 0x000B, attributes | OWNERWRITE, 0, 64)
    owner = struct.pack(">I", swtpm.OWNER)
    new = struct.pack(">H", len(password)) + password + struct.pack(">H", len(public)) + public
    machine.command(0x12A, owner + no_password + new, tag=0x8002)
    written = owner + struct.pack(">I", EK_CERTIFICATE_INDEX) + no_password + struct.pack(">H", 64) + bytes(66)
    machine.command(0x137, written, tag=0x8002)


@pytest.mark.parametrize(
    ("attributes", "password", "words"),
    [
        (OWNERREAD | NO_DA, b"", "no AUTHREAD"),
        (OWNERREAD | AUTHREAD, b"secret", "no NO_DA"),
        (OWNERREAD | AUTHREAD, b"", "no NO_DA"),
        (OWNERREAD | AUTHREAD | NO_DA, b"secret", "has a password"),
    ],
)
@pytest.mark.parametrize("name", BACK_ENDS)
def test_a_certificate_behind_a_password_is_named_and_costs_no_failed_guess(
    name: str,
    attributes: int,
    password: bytes,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for variable in [variable for variable in os.environ if variable.startswith("DPS_AGENT_")]:
        monkeypatch.delenv(variable)
    with Swtpm(tmp_path / "tpm") as machine:
        define_index(machine, attributes, password)
        tpm = BACK_ENDS[name](machine.tcti)
        error = assert_refused(tpm.endorsement_certificate, AskOperator, "tpm.certificate_locked")
        assert words in error.message
        tpm.release()
        device = Device(machine, name, tmp_path / "state", capsys)
        found = device.finding()
        assert (found["result"], words in found["detail"]) == ("warning", True), found
        assert device.document("enroll")["ekCertificate"] == "unreadable"
        assert machine.property(swtpm.LOCKOUT_COUNTER) == 0
        assert machine.leftovers() == []
