"""The manufacturer's certificate of the endorsement key: read, compared, and shown by `enroll` and `check`."""

from __future__ import annotations

import datetime
import hashlib
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
from dps_board import factory
from dps_hal.errors import AskOperator, RetryLater
from dps_hal.tpm.ek_certificate import ABSENT, MATCH, MISMATCH, UNREADABLE, certified_key, compare
from dps_hal.tpm.keys import ek_public, object_name
from dps_hal.tpm.upkeep import EK_CERTIFICATE_INDEX, PT_NV_BUFFER_MAX, nv_chunk_bytes
from support.claims import assert_refused
from support.tpm import swtpm
from support.tpm.backends import BACK_ENDS
from support.tpm.maker import certificate_for, certify, template
from support.tpm.swtpm import Swtpm
from support.tpm.tap import TpmTap

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

OWNERWRITE, PPREAD, OWNERREAD, AUTHREAD, NO_DA = 1 << 1, 1 << 16, 1 << 17, 1 << 18, 1 << 25  # TPMA_NV


@pytest.fixture(params=BACK_ENDS)
def back_end(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    for variable in [variable for variable in os.environ if variable.startswith("DPS_AGENT_")]:
        monkeypatch.delenv(variable)
    return str(request.param)


def ek_on(machine: Swtpm, back_end: str) -> bytes:
    tpm = BACK_ENDS[back_end](machine.tcti)
    try:
        return tpm.endorsement_key()
    finally:
        tpm.release()


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
        (PPREAD | NO_DA, b"", "the owner may not read it"),
        (AUTHREAD, b"secret", "no AUTHREAD with NO_DA"),
        (AUTHREAD, b"", "no AUTHREAD with NO_DA"),
        (AUTHREAD | NO_DA, b"secret", "has a password"),
    ],
)
def test_a_certificate_behind_a_password_is_named_and_costs_no_failed_guess(
    back_end: str,
    attributes: int,
    password: bytes,
    words: str,
    machine: Swtpm,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    define_index(machine, attributes, password)
    tpm = BACK_ENDS[back_end](machine.tcti)
    error = assert_refused(tpm.endorsement_certificate, AskOperator, "tpm.certificate_locked")
    assert words in error.message
    tpm.release()
    device = Device(machine, back_end, tmp_path / "state", capsys)
    found = device.finding()
    assert (found["result"], words in found["detail"]) == ("warning", True), found
    assert found["detail"].startswith("locked")
    answer = device.document("enroll")
    assert (answer["ekCertificate"], answer["ekCertificateSha256"]) == ("locked", "")
    assert "EK certificate   locked: " in device.text("enroll") and words in device.text("enroll")
    assert factory_digest(machine, back_end) == ""
    assert machine.property(swtpm.LOCKOUT_COUNTER) == 0
    assert machine.leftovers() == []


def factory_digest(machine: Swtpm, back_end: str) -> str:
    """The last column of what a board prints for its factory."""
    tpm = BACK_ENDS[back_end](machine.tcti)
    try:
        return factory.enrolment_line(tpm).split(",")[-1]
    finally:
        tpm.release()


@pytest.mark.parametrize(
    ("attributes", "password"),
    [(OWNERREAD, b""), (OWNERREAD | NO_DA, b"hunter2"), (OWNERREAD | PPREAD | NO_DA, b""), (OWNERREAD | AUTHREAD, b"")],
)
def test_what_the_owner_may_read_is_read_by_the_owner_and_his_password_stays_off_the_bus(
    attributes: int,
    password: bytes,
    back_end: str,
    machine: Swtpm,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    certificate = certificate_for(ek_on(machine, back_end))
    machine.write_nv(EK_CERTIFICATE_INDEX, certificate + bytes(100), attributes | OWNERWRITE)
    device = Device(machine, back_end, tmp_path / "state", capsys)
    words: tuple[str, ...] = ()
    if password:
        machine.set_hierarchy_auth(swtpm.OWNER, password)
        assert device.document("enroll")["ekCertificate"] == "locked"
        assert "owner_auth_file" in device.finding()["detail"]
        (tmp_path / "password").write_bytes(password)
        (tmp_path / "password").chmod(0o600)
        words = ("--set", f"tpm.owner_auth_file={tmp_path}/password")
        with TpmTap(machine.port) as tap:
            tpm = BACK_ENDS[back_end](tap.tcti, owner_auth=password)
            assert tpm.endorsement_certificate() == certificate
            tpm.release()
            assert not tap.seen(password)
    answer = device.document("enroll", *words)
    assert (answer["ekCertificate"], answer["ekCertificateSha256"]) == (
        "match",
        hashlib.sha256(certificate).hexdigest(),
    )
    assert device.finding(*words)["detail"].startswith("match")
    assert machine.property(swtpm.LOCKOUT_COUNTER) == 0
    assert machine.leftovers() == []


def test_where_the_index_has_a_password_of_its_own_the_owner_reads_it(back_end: str, machine: Swtpm) -> None:
    define_index(machine, OWNERREAD | AUTHREAD | NO_DA, b"secret")
    tpm = BACK_ENDS[back_end](machine.tcti)
    assert tpm.endorsement_certificate() == b""
    tpm.release()
    assert machine.property(swtpm.LOCKOUT_COUNTER) == 0


@pytest.mark.parametrize(
    "content", [bytes(900), b"\xff" * 900, b"\x30\x82\x04\x00" + bytes(900), b"\x30\x82\x01\x00" + bytes(256), b"\x30"]
)
def test_what_is_no_certificate_has_no_fingerprint(
    content: bytes, back_end: str, machine: Swtpm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    machine.write_nv(EK_CERTIFICATE_INDEX, content)
    device = Device(machine, back_end, tmp_path / "state", capsys)
    answer = device.document("enroll")
    assert (answer["ekCertificate"], answer["ekCertificateSha256"]) == ("unreadable", "")
    assert device.text("enroll", "--format", "csv").splitlines()[1].endswith(",")
    assert device.finding()["detail"].startswith("unreadable")
    if content[:4] != b"\x30\x82\x01\x00":  # a board looks no further than where DER ends
        assert factory_digest(machine, back_end) == ""


def test_a_false_answer_to_the_reading_of_a_certificate_is_no_certificate(back_end: str, machine: Swtpm) -> None:
    machine.write_nv(EK_CERTIFICATE_INDEX, certificate_for(ek_on(machine, back_end)))
    with TpmTap(machine.port) as tap:
        tpm = BACK_ENDS[back_end](tap.tcti)
        for command, place in (("NV_Read", 40), ("NV_Read", -1), ("NV_ReadPublic", 22), ("NV_ReadPublic", -1)):
            tap.forget()
            tap.alter(command=command, place=place, times=1000)
            assert_refused(tpm.endorsement_certificate, RetryLater, "tpm.bus_altered", f"{command} {place}")
            tpm.release()


# --- makers whose certified key is of another template

NONCE_INDEX, TEMPLATE_INDEX = 0x01C00003, 0x01C00004
UNIQUE = bytes(range(1, 21)) + bytes(236)
NONCE = b"nonce" + bytes(251)
READ_LOCKABLE = 0x82060006  # as `Swtpm.write_nv` has it, and READ_STCLEAR


def made_by(machine: Swtpm, public: bytes) -> bytes:
    """The EK that the TPM makes by a TPMT_PUBLIC; it stays where the agent does not look."""
    handle = 0x81010009 + len(machine.handles(swtpm.PERSISTENT))
    machine.persist_primary(swtpm.ENDORSEMENT, struct.pack(">H", len(public)) + public, handle)
    area = machine.public_areas()[handle]
    return area[: 2 + int.from_bytes(area[:2], "big")]


@pytest.mark.parametrize(
    ("in_nv", "public"),
    [
        ({TEMPLATE_INDEX: template(UNIQUE)}, template(UNIQUE)),
        ({TEMPLATE_INDEX: template(UNIQUE) + b"\xff" * 40}, template(UNIQUE)),
        ({TEMPLATE_INDEX: template(b"")}, template(b"")),
        ({NONCE_INDEX: b"nonce"}, template(NONCE)),
        ({TEMPLATE_INDEX: template(UNIQUE), NONCE_INDEX: b"nonce"}, template(NONCE)),
        ({TEMPLATE_INDEX: template(bytes(256))}, template(bytes(256))),
        ({TEMPLATE_INDEX: template(bytes(256), exponent=65537)}, template(bytes(256), exponent=65537)),
        ({TEMPLATE_INDEX: template(b"", exponent=65537), NONCE_INDEX: b"nonce"}, template(NONCE, exponent=65537)),
    ],
    ids=["template", "padded", "empty unique", "nonce", "both", "as L-1", "exponent", "exponent, nonce"],
)
def test_the_certified_key_is_made_as_the_makers_template_and_nonce_say(
    in_nv: dict[int, bytes],
    public: bytes,
    back_end: str,
    machine: Swtpm,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    makers = made_by(machine, public)
    machine.write_nv(EK_CERTIFICATE_INDEX, certificate_for(makers))
    for index, content in in_nv.items():
        machine.write_nv(index, content)
    assert ek_on(machine, back_end) == makers
    device = Device(machine, back_end, tmp_path / "state", capsys)
    answer = device.document("enroll")
    assert (answer["ekCertificate"], answer["ekTemplate"], answer["ekTemplateInNv"]) == ("match", "tcg-l1", True)
    assert "0x01c00004" in device.text("enroll")
    found = device.finding()
    assert (found["result"], "0x01c00004" in found["detail"]) == ("ok", True)
    assert machine.leftovers() == []


def test_a_key_that_was_made_before_the_makers_template_was_heeded_stays(
    back_end: str, machine: Swtpm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = ek_on(machine, back_end)
    machine.write_nv(EK_CERTIFICATE_INDEX, certificate_for(ek_public(MODULUS)))
    machine.write_nv(TEMPLATE_INDEX, template(UNIQUE))
    assert ek_on(machine, back_end) == before
    found = Device(machine, back_end, tmp_path / "state", capsys).finding()
    assert found["result"] == "warning"
    assert "this key by the template tcg-l1 without the maker's template" in found["detail"]
    assert found["remedy"].startswith("nothing, if this key is enrolled; else set ek_handle to a free handle")
    assert "azure-c-sdk" not in found["remedy"]
    assert machine.leftovers() == []


@pytest.mark.parametrize("certified", [False, True], ids=["no certificate", "certificate of another key"])
@pytest.mark.parametrize("password", [b"", b"secret"], ids=["no password", "password"])
def test_a_template_whose_key_is_not_certified_makes_none_so_the_key_outlives_a_clear(
    password: bytes, certified: bool, back_end: str, machine: Swtpm
) -> None:
    plain = ek_on(machine, back_end)
    machine.clear()
    machine.write_nv(NONCE_INDEX, b"defined by the owner")
    if certified:
        machine.write_nv(EK_CERTIFICATE_INDEX, certificate_for(ek_public(MODULUS)))
    if password:
        machine.set_hierarchy_auth(swtpm.OWNER, password)
    with TpmTap(machine.port) as tap:
        tpm = BACK_ENDS[back_end](tap.tcti, owner_auth=password)
        assert tpm.endorsement_key() == plain
        assert tap.names.count("CreatePrimary") == 1 + certified + bool(password)
        tpm.release()
    assert machine.leftovers() == []
    machine.clear()
    assert ek_on(machine, back_end) == plain


@pytest.mark.parametrize("enrolled", ["plain", "the maker's"])
@pytest.mark.parametrize("certified", ["none", "plain", "the maker's", "another"])
@pytest.mark.parametrize("password", [b"", b"secret"], ids=["no password", "password"])
def test_an_enrolled_key_that_went_is_made_again_whichever_of_the_two_it_was(
    password: bytes, certified: str, enrolled: str, back_end: str, machine: Swtpm
) -> None:
    keys = {"plain": made_by(machine, template(bytes(256))), "the maker's": made_by(machine, template(NONCE))}
    machine.clear()
    machine.write_nv(NONCE_INDEX, b"nonce")
    if certified != "none":
        machine.write_nv(EK_CERTIFICATE_INDEX, certificate_for(keys.get(certified, ek_public(MODULUS))))
    if password:
        machine.set_hierarchy_auth(swtpm.OWNER, password)
    with TpmTap(machine.port) as tap:
        tpm = BACK_ENDS[back_end](tap.tcti, owner_auth=password)
        assert tpm.endorsement_key(object_name(keys[enrolled])) == keys[enrolled]
        assert tap.names.count("CreatePrimary") <= 2 + bool(password)
        tpm.release()
    assert machine.leftovers() == []


@pytest.mark.parametrize("certified", [False, True])
def test_for_an_enrolled_key_that_the_tpm_cannot_make_there_is_the_one_of_a_new_device(
    certified: bool, back_end: str, machine: Swtpm
) -> None:
    plain, makers = made_by(machine, template(bytes(256))), made_by(machine, template(NONCE))
    machine.clear()
    machine.write_nv(NONCE_INDEX, b"nonce")
    machine.write_nv(EK_CERTIFICATE_INDEX, certificate_for(makers if certified else ek_public(MODULUS)))
    with TpmTap(machine.port) as tap:
        tpm = BACK_ENDS[back_end](tap.tcti)
        assert tpm.endorsement_key(object_name(EK)) == (makers if certified else plain)
        assert tap.names.count("CreatePrimary") == 2
        tpm.release()
    assert machine.leftovers() == []


def test_a_key_that_goes_while_the_agent_runs_comes_back(back_end: str, machine: Swtpm) -> None:
    tpm = BACK_ENDS[back_end](machine.tcti)
    before = tpm.endorsement_key()
    tpm.release()
    machine.clear()
    makers = made_by(machine, template(NONCE))
    machine.write_nv(NONCE_INDEX, b"nonce")
    machine.write_nv(EK_CERTIFICATE_INDEX, certificate_for(makers))
    assert tpm.endorsement_key() == before
    tpm.release()


@pytest.mark.parametrize(
    "content",
    [
        template(UNIQUE, 0x000300F2),  # userWithAuth, as in the high range
        template(UNIQUE, 0x000300B2 & ~0x00010000),
        template(UNIQUE, 0x000300B2 & ~0x2),
        template(UNIQUE, 0x000300B2 & ~0x10),
        template(bytes(257)),
        template(UNIQUE)[:-1],
        bytes(314),
        b"\0\x23" + bytes(100),
    ],
    ids=["userWithAuth", "unrestricted", "not fixedTPM", "not fixedParent", "long", "short", "zeros", "ECC"],
)
def test_a_makers_template_that_gives_no_ek_of_ours_is_named_and_not_used(
    content: bytes, back_end: str, machine: Swtpm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = ek_on(machine, back_end)
    machine.clear()
    machine.write_nv(TEMPLATE_INDEX, content)
    machine.write_nv(EK_CERTIFICATE_INDEX, certificate_for(ek_public(MODULUS)))
    assert ek_on(machine, back_end) == plain
    tpm = BACK_ENDS[back_end](machine.tcti)
    assert_refused(tpm.makers_template, AskOperator, "tpm.ek_template_unsuitable")
    tpm.release()
    device = Device(machine, back_end, tmp_path / "state", capsys)
    found = device.finding()
    assert (found["result"], "not used: the maker's" in found["detail"]) == ("warning", True), found
    assert "neither value of ek_template" in found["remedy"]
    assert "not used" in device.text("enroll")


@pytest.mark.parametrize("index", [EK_CERTIFICATE_INDEX, NONCE_INDEX, TEMPLATE_INDEX])
def test_an_index_that_is_locked_against_reading_stops_nobody(
    index: int, back_end: str, machine: Swtpm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = ek_on(machine, back_end)
    machine.clear()
    machine.write_nv(EK_CERTIFICATE_INDEX, certificate_for(plain), READ_LOCKABLE)
    machine.write_nv(TEMPLATE_INDEX, template(UNIQUE), READ_LOCKABLE)
    machine.write_nv(NONCE_INDEX, b"nonce", READ_LOCKABLE)
    machine.lock_nv(index)
    assert ek_on(machine, back_end) == plain
    device = Device(machine, back_end, tmp_path / "state", capsys)
    expected = ("warning", "locked") if index == EK_CERTIFICATE_INDEX else ("ok", "match")
    assert (device.finding()["result"], device.document("enroll")["ekCertificate"]) == expected
    tpm = BACK_ENDS[back_end](machine.tcti)
    assert tpm.template_of_endorsement_key().startswith("tcg-l1")
    tpm.release()
    assert machine.leftovers() == []


@pytest.mark.parametrize(
    ("return_code", "code"),
    [(0x148, ""), (0x149, ""), (0x12F, ""), (0x143, ""), (0x902, "tpm.memory"), (0x923, "tpm.nv_unavailable")],
    ids=["locked", "authorization", "unavailable", "no such command", "memory", "NV unavailable"],
)
def test_what_may_pass_makes_no_key_and_what_stays_makes_the_plain_one(
    return_code: int, code: str, back_end: str, machine: Swtpm
) -> None:
    plain = ek_on(machine, back_end)
    machine.clear()
    machine.write_nv(EK_CERTIFICATE_INDEX, certificate_for(plain))
    machine.write_nv(TEMPLATE_INDEX, template(UNIQUE))
    with TpmTap(machine.port) as tap:
        tap.refuse(return_code, command="NV_Read", times=1000)
        tpm = BACK_ENDS[back_end](tap.tcti)
        if code:
            assert_refused(tpm.endorsement_key, RetryLater, code)
            assert "CreatePrimary" not in tap.names
        else:
            assert tpm.endorsement_key() == plain
        tap.forget()
        tpm.release()


def test_a_makers_template_that_reads_otherwise_each_time_makes_no_key(back_end: str, machine: Swtpm) -> None:
    machine.write_nv(TEMPLATE_INDEX, template(UNIQUE))
    with TpmTap(machine.port) as tap:
        tpm = BACK_ENDS[back_end](tap.tcti)
        tap.alter(command="NV_Read", place=80)
        tap.alter(command="NV_Read", place=80, skip=2)
        assert_refused(tpm.endorsement_key, RetryLater, "tpm.bus_altered")
        assert "CreatePrimary" not in tap.names
        tap.forget()
        tpm.release()
    assert machine.handles(swtpm.PERSISTENT) == []


def test_certificates_of_other_keys_are_named(
    back_end: str, machine: Swtpm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for index in (0x01C0000A, 0x01C00012, 0x01C00100):
        machine.write_nv(index, b"anything")
    found = Device(machine, back_end, tmp_path / "state", capsys).finding()
    assert found["detail"].startswith("absent") and found["result"] == "ok"
    assert "ECC P-256 (L-2) at 0x01c0000a, RSA-2048 (H-1) at 0x01c00012;" not in found["detail"]
    assert "ECC P-256 (L-2) at 0x01c0000a, RSA-2048 (H-1) at 0x01c00012" in found["detail"]
    assert "0x01c00100" not in found["detail"]


def test_microsofts_template_is_made_whatever_the_maker_says(back_end: str, machine: Swtpm) -> None:
    tpm = BACK_ENDS[back_end](machine.tcti, ek_template="azure-c-sdk")
    before = tpm.endorsement_key()
    tpm.release()
    machine.clear()
    machine.write_nv(TEMPLATE_INDEX, template(UNIQUE))
    tpm = BACK_ENDS[back_end](machine.tcti, ek_template="azure-c-sdk")
    assert tpm.endorsement_key() == before
    tpm.release()
