"""A device with a certificate on Linux: from its request to its hub, against the emulator and OpenSSL's server."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import socket
import stat
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from dps_agent.assignment import decode, seal_message
from dps_agent.effects import NoReply, Reply
from dps_agent.host import load
from dps_agent.host.cli import main
from dps_agent.host.config import Configuration, ConfigurationError
from dps_agent.host.device_certificates import certificate_shown, ends_soon, valid_s
from dps_agent.host.network.dial import Dialler
from dps_agent.host.network.https import DpsConnection
from dps_agent.host.network.mqtt import HubConnection
from dps_agent.host.network.proxy import NONE, ProxyRule
from dps_agent.host.network.trust import Trust
from dps_agent.host.parts import client_certificate, hub_connection, open_device, tpm_warnings
from dps_agent.host.private_file import write_private
from dps_agent.hub_effects import ConnAck, Connect
from dps_emulator.attestation import Certificates
from dps_emulator.enrollments import Enrollment
from dps_emulator.service import Settings
from dps_hal.contracts import IDENTITY
from dps_hal.errors import AskOperator
from dps_hal.host.state_dir import open_store
from support.cloud.chains import CA, NO_CA, SIGNS_CERTIFICATES, UTC_TIME, Party, party, written
from support.cloud.emulator import HUB, EmulatorInThread

DEVICE = "press-07"
ROOT = party("factory root", None, [*CA, SIGNS_CERTIFICATES])
LINE = party("line 4", ROOT, [*CA, SIGNS_CERTIFICATES])
STRANGER = party("somebody else", None, [*CA, SIGNS_CERTIFICATES])
LIFE_S = 3 * 86400
RECORDS = Path(__file__).parents[1] / "vectors" / "records.json"
Document = dict[str, Any]


def issued(
    request_pem: str, issuer: Party, name: str = DEVICE, days: tuple[float, float] = (-1, 2), **more: Any
) -> str:
    """A certificate for a request, as whoever has the CA makes it, PEM; valid from and to so many days from now."""
    asked = x509.load_pem_x509_csr(request_pem.encode())
    assert asked.is_signature_valid
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    return certified(subject, asked.public_key(), issuer.name, issuer.key, days, **more)


def certified(
    subject: x509.Name,
    public_key: Any,
    issuer: x509.Name,
    key: Any,
    days: tuple[float, float] = (-1, 2),
    extensions: Sequence[Any] = (),
    padding: Any = None,
) -> str:
    """A certificate, PEM; see `issued`. `padding` is of the signature by an RSA key."""
    now = datetime.datetime.now(datetime.UTC)
    begin, end = (now + datetime.timedelta(days=each) for each in days)
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(public_key)
    builder = builder.serial_number(x509.random_serial_number()).not_valid_before(begin).not_valid_after(end)
    for extension in extensions:
        builder = builder.add_extension(extension, False)
    digest = None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    return builder.sign(key, digest, rsa_padding=padding).public_bytes(Encoding.PEM).decode()


class Bench:
    """A device whose settings name a certificate; it has neither key nor certificate yet."""

    def __init__(self, folder: Path, emulator: EmulatorInThread, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder = folder
        self.emulator = emulator
        self.capsys = capsys
        self.key_file, self.certificate_file = folder / "device-key.pem", folder / "device.pem"
        self.state_dir = folder / "state"
        self.settings = folder / "given.toml"
        self.printed = ""
        self.configure()

    def configure(self, hub: str = "", more: str = "") -> None:
        self.settings.write_text(
            f'id_scope = "0ne00000000"\nregistration_id = "{DEVICE}"\nattestation = "x509"\n'
            f'device_key_file = "{self.key_file}"\ncertificate_file = "{self.certificate_file}"\n'
            f'endpoint = "https://localhost"\nconnect_to = "{self.emulator.connect_to}"\n'
            f'ca_file = "{self.emulator.ca_file}"\nstate_dir = "{self.state_dir}"\n'
            f'runtime_dir = "{self.state_dir}"\n{more}'
            f'[hub]\nconnect_to = "{self.emulator.hub_connect_to}"\nca_file = "{self.emulator.ca_file}"\n{hub}'
        )

    def loaded(self) -> Configuration:
        return load(self.settings, environ={})

    def command(self, *words: str, status: int = 0) -> Document:
        assert main(["--json", "--config", str(self.settings), *words]) == status, self.capsys.readouterr()
        out, err = self.capsys.readouterr()
        self.printed += out + err
        document: Document = json.loads(out)
        return document

    def text(self, *words: str) -> str:
        assert main(["--config", str(self.settings), *words]) == 0
        out, err = self.capsys.readouterr()
        self.printed += out + err
        return out

    def request(self) -> str:
        return str(self.command("enroll", "--x509", "--key-in-file")["certificateRequest"])

    def install(self, *pems: str, status: int = 0) -> Document:
        source = self.folder / "issued.pem"
        source.write_text("".join(pems))
        return self.command("install-certificate", str(source), status=status)

    def equip(self, **more: Any) -> None:
        """Key and certificate, as a maker gives them to the device."""
        self.install(issued(self.request(), LINE, **more), LINE.pem)

    def checked(self, name: str, status: int = 0) -> Document:
        found: Document = next(one for one in self.command("check", status=status)["checks"] if one["id"] == name)
        return found


@pytest.fixture(scope="module")
def emulator() -> Iterator[EmulatorInThread]:
    factory = Enrollment("factory", Certificates(ROOT.certificate), is_group=True)
    with EmulatorInThread(Settings(retry_after_s=0, client_certificates=True), [factory]) as running:
        yield running


@pytest.fixture
def bench(
    tmp_path: Path,
    emulator: EmulatorInThread,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Iterator[Bench]:
    for name in [name for name in os.environ if name.startswith(("DPS_AGENT_", "CREDENTIALS_"))]:
        monkeypatch.delenv(name)
    made = Bench(tmp_path, emulator, capsys)
    yield made
    secret = made.key_file.read_text() if made.key_file.exists() else ""
    for line in [line for line in secret.splitlines() if not line.startswith("-----")]:
        assert line not in made.printed, "the key was printed"


# From the request to the hub.


def test_a_device_lives_from_its_request_to_its_hub_by_its_certificate_alone(bench: Bench) -> None:
    made = bench.command("enroll", "--x509", "--key-in-file")
    assert made["keyMade"] and bench.key_file.stat().st_mode & 0o777 == 0o600
    again = bench.command("enroll", "--x509", "--key-in-file")
    assert not again["keyMade"], "the key stays what it is"
    asked = x509.load_pem_x509_csr(again["certificateRequest"].encode())
    assert asked.is_signature_valid and asked.subject.rfc4514_string() == f"CN={DEVICE}"
    installed = bench.install(issued(again["certificateRequest"], LINE), LINE.pem)
    assert (installed["subject"], installed["issuer"], installed["authorities"]) == (f"CN={DEVICE}", "CN=line 4", 1)
    first = bench.command("provision")
    assert (first["assignedHub"], first["deviceId"], first["backend"]) == (HUB, DEVICE, "x509")
    assert bench.command("provision")["alreadyProvisioned"]
    assert not bench.command("provision", "--force")["alreadyProvisioned"]
    assert bench.command("status", "--remote")["differences"] == []
    shown = bench.text("status")
    assert "assigned to" in shown and f"the device's own key lies in a plain file, {bench.key_file}" in shown
    stored = open_store(str(bench.state_dir)).load(IDENTITY)
    assert stored is not None and b'"attestation":"x509"' in stored.payload[:-64] and stored.payload[-65:-64] == b"}"
    assert bench.text("enroll").splitlines()[0].split()[-1] == DEVICE


@pytest.mark.parametrize("transport", ["mqtt", "websocket"])
def test_the_hub_takes_the_certificate_and_no_password(bench: Bench, transport: str) -> None:
    bench.equip()
    bench.command("provision")
    bench.configure(hub=f'transport = "{transport}"\n')
    connection = hub_connection(bench.loaded())
    try:
        answer = connection.connect(as_device())
        assert answer == ConnAck(0, False), answer
    finally:
        connection.close()
    connection = HubConnection(connect_to=bench.emulator.hub_connect_to, ca_file=str(bench.emulator.ca_file))
    try:
        answer = connection.connect(as_device())
        assert isinstance(answer, ConnAck) and answer.return_code == 5, "without a certificate it is nobody"
    finally:
        connection.close()


def as_device() -> Connect:
    return Connect(HUB, DEVICE, f"{HUB}/{DEVICE}/?api-version=2021-04-12", None, 60, True)


def test_a_life_connects_and_there_is_no_token_to_be_had(bench: Bench) -> None:
    bench.equip()
    bench.command("provision")
    refused = bench.command("token", status=1)["error"]
    assert refused["code"] == "agent.no_token" and "by its certificate" in refused["message"]


def test_every_check_of_a_good_device_is_good(bench: Bench) -> None:
    bench.equip(days=(-1, 20))
    bench.command("provision")
    registered = sum(line.method == "PUT" for line in bench.emulator.log)
    found = {one["id"]: one for one in bench.command("check")["checks"]}
    for name in ("device-key", "device-certificate", "record-seal", "dps-answers", "hub-mqtt"):
        assert found[name]["result"] == "ok", found[name]
    assert "CN=line 4" in found["device-certificate"]["detail"] and "certificate" in found["dps-answers"]["detail"]
    bench.command("status", "--remote")
    assert sum(line.method == "PUT" for line in bench.emulator.log) == registered, "a look registers nothing"


SYSTEM_PYTHON = "/usr/bin/python3"
PROGRAM = (
    "import sys; sys.path[:0] = ['agent', 'hal']\nfrom dps_agent.host.cli import main; sys.exit(main(sys.argv[1:]))"
)


def test_the_cryptography_of_the_distribution_will_do(bench: Bench) -> None:
    def by_system(*words: str) -> Document:
        command = [SYSTEM_PYTHON, "-I", "-B", "-c", PROGRAM, "--json", "--config", str(bench.settings), *words]
        checkout = Path(__file__).parents[2]
        ended = subprocess.run(command, check=False, cwd=checkout, capture_output=True, text=True, timeout=120)
        bench.printed += ended.stdout + ended.stderr
        assert ended.returncode == 0, ended.stdout + ended.stderr
        document: Document = json.loads(ended.stdout)
        return document

    source = bench.folder / "issued.pem"
    source.write_text(LINE.pem + issued(by_system("enroll", "--x509", "--key-in-file")["certificateRequest"], LINE))
    assert by_system("install-certificate", str(source))["authorities"] == 1
    assert by_system("enroll")["issuer"] == "CN=line 4"
    assert not by_system("provision")["alreadyProvisioned"]
    assert by_system("provision")["alreadyProvisioned"], "the seal is verified"


# What is wrong is named.


def test_whoever_issues_may_have_a_key_of_any_kind(bench: Bench) -> None:
    asked = bench.request()
    rsa_key = rsa.generate_private_key(65537, 2048)
    pss = padding.PSS(padding.MGF1(hashes.SHA256()), padding.PSS.DIGEST_LENGTH)
    for key, how in (
        (rsa_key, None),
        (rsa_key, pss),
        (ed25519.Ed25519PrivateKey.generate(), None),
        (ec.generate_private_key(ec.SECP384R1()), None),
    ):
        name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "its CA")])
        authority = certified(name, key.public_key(), name, key, extensions=[CA[0][0]], padding=how)
        own = issued(asked, Party(name, key, b""), padding=how)  # type: ignore[arg-type]
        assert bench.install(authority, own)["authorities"] == 1, key
        stranger = issued(asked, Party(name, ec.generate_private_key(ec.SECP256R1()), b""))
        assert "does not" in bench.install(authority, stranger, status=6)["error"]["message"]


def test_a_certificate_that_does_not_fit_is_refused_with_what_was_expected(bench: Bench) -> None:
    asked = bench.request()
    clients = x509.ExtendedKeyUsage([x509.ExtendedKeyUsageOID.SERVER_AUTH])
    other = party(DEVICE, LINE, NO_CA)
    for pems, said in (
        ((issued(asked, LINE, "press-08"), LINE.pem), f"expected CN={DEVICE}"),
        ((other.pem, LINE.pem), "expected a certificate for the key in device_key_file"),
        ((issued(asked, LINE), STRANGER.pem), "'CN=somebody else' does not"),
        ((issued(asked, LINE, days=(-2, -1)), LINE.pem), "has ended at"),
        ((issued(asked, LINE, days=(1, 2)), LINE.pem), "Z; this device's clock says 20"),
        ((issued(asked, LINE, extensions=[clients]), LINE.pem), "for TLS clients"),
        (("no certificate\n",), "expected certificates in PEM"),
    ):
        error = bench.install(*pems, status=6)["error"]
        assert error["code"] == "config.invalid" and said in error["message"], error
        assert not bench.certificate_file.exists(), "nothing is put there that was refused"
    assert (
        bench.command("install-certificate", str(bench.folder / "nowhere"), status=1)["error"]["code"] == "agent.file"
    )
    twice = bench.install(ROOT.pem, LINE.pem, issued(asked, LINE), ROOT.pem)  # in whatever order they come
    assert twice["authorities"] == 2, "what came twice is shown once"
    assert bench.certificate_file.read_text().startswith(issued_head(bench))


def issued_head(bench: Bench) -> str:
    """The first line and a half of the device's own certificate, of which the file has to begin."""
    own = x509.load_pem_x509_certificates(bench.certificate_file.read_bytes())[0]
    assert own.subject.rfc4514_string() == f"CN={DEVICE}"
    return own.public_bytes(Encoding.PEM).decode()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ((f'registration_id = "{DEVICE}"', ""), "registration_id: expected the device's own"),
        ((f'registration_id = "{DEVICE}"', f'registration_id = "{"a" * 65}"'), "registration_id: expected at most 64"),
        (('device_key_file = "KEY"', ""), "device_key_file: expected a file with the device's key"),
        (('certificate_file = "CERTIFICATE"', ""), "certificate_file: expected a file for the certificate"),
        (('attestation = "x509"', ""), 'certificate_file: expected attestation = "x509"'),
        (("[hub]", "[tpm]\npersist_at = 0x81000100\n[hub]"), "tpm.persist_at: expected 0"),
    ],
)
def test_settings_that_do_not_fit_the_way_are_refused(bench: Bench, changes: tuple[str, str], said: str) -> None:
    former, instead = changes
    text = bench.settings.read_text()
    former = former.replace("KEY", str(bench.key_file)).replace("CERTIFICATE", str(bench.certificate_file))
    assert former in text
    bench.settings.write_text(text.replace(former, instead, 1))
    with pytest.raises(ConfigurationError) as refused:
        bench.loaded()
    assert any(problem.startswith(said) for problem in refused.value.problems), refused.value.problems


def test_files_that_cannot_be_used_are_named(bench: Bench) -> None:
    error = bench.command("provision", status=6)["error"]
    assert "device_key_file" in error["message"]
    bench.request()
    error = bench.command("provision", status=6)["error"]
    assert "certificate_file: expected the device's certificate; there is none" in error["message"]
    bench.equip()
    bench.key_file.chmod(0o640)
    assert "chmod 600" in bench.command("provision", status=6)["error"]["message"]
    bench.key_file.chmod(0o600)
    secret = bench.key_file.read_text()
    for wrong in (secret.replace("M", "N"), "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="):
        bench.key_file.write_text(wrong)
        assert "curve P-256" in bench.command("provision", status=6)["error"]["message"]
    bench.key_file.write_text(secret)
    bench.command("provision")


def test_a_certificate_is_for_all_to_read_whatever_umask_root_has(bench: Bench) -> None:
    former = os.umask(0o077)
    try:
        bench.equip()
        assert os.umask(0o077) == 0o077
    finally:
        os.umask(former)
    assert bench.certificate_file.stat().st_mode & 0o777 == 0o644 and bench.key_file.stat().st_mode & 0o777 == 0o600
    bench.certificate_file.chmod(0o600)
    bench.equip()
    assert bench.certificate_file.stat().st_mode & 0o777 == 0o600, "who has narrowed it has it so"


def test_a_key_is_on_the_disk_with_its_name_before_anybody_is_told_of_it(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced = []
    system_fsync = os.fsync

    def fsync(fd: int) -> None:
        synced.append((os.readlink(f"/proc/self/fd/{fd}"), bench.key_file.exists()))
        system_fsync(fd)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fsync)
        bench.request()
    assert synced == [(f"{bench.key_file}.{os.getpid()}.new", False), (str(bench.folder), True)]
    for error in (OSError(28, "No space left on device"), KeyboardInterrupt()):
        bench.key_file.unlink(missing_ok=True)

        def failing(fd: int, error: BaseException = error) -> None:
            raise error

        with monkeypatch.context() as patched, pytest.raises((AskOperator, KeyboardInterrupt)):
            patched.setattr(os, "fsync", failing)
            write_private(str(bench.key_file), b"half of a key")
        assert not bench.key_file.exists(), "the next attempt makes a whole one"
        assert not [*bench.folder.glob("*.new")]

    def no_links(*_names: str) -> None:
        raise OSError(1, "Operation not permitted")  # as FAT does

    with monkeypatch.context() as patched:
        patched.setattr(os, "link", no_links)
        bench.request()
        with pytest.raises(AskOperator, match="is there already"):
            write_private(str(bench.key_file), b"another key")
    assert b"PRIVATE KEY" in bench.key_file.read_bytes() and not [*bench.folder.glob("*.new")]


def test_a_link_in_the_certificate_s_place_leads_root_nowhere_but_by_root_s_own(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    pems = issued(bench.request(), LINE), LINE.pem
    victim = bench.folder / "victim"
    victim.write_text("of somebody else")
    bench.certificate_file.symlink_to(victim)
    system_fstat = os.fstat

    def owned_by_another(fd: int) -> os.stat_result:
        found = list(system_fstat(fd))
        found[stat.ST_UID] = 1000
        return os.stat_result(found)

    with monkeypatch.context() as patched:
        patched.setattr(os, "geteuid", lambda: 0)
        patched.setattr(os, "fstat", owned_by_another)
        error = bench.install(*pems, status=1)["error"]
    assert error["code"] == "agent.file" and "a symbolic link of user 1000" in error["message"]
    assert victim.read_text() == "of somebody else"
    bench.install(*pems)
    assert bench.certificate_file.is_symlink() and victim.read_text().startswith(issued_head(bench))
    bench.certificate_file.unlink()
    bench.certificate_file.mkdir()
    assert "a folder, no regular file" in bench.install(*pems, status=1)["error"]["message"]


def test_who_is_not_enrolled_is_told_so_and_keeps_what_it_has(bench: Bench) -> None:
    bench.install(issued(bench.request(), STRANGER), STRANGER.pem)
    error = bench.command("provision", status=4)["error"]
    assert error["code"] == "dps.certificate_refused" and "certificate" in error["message"]
    assert bench.checked("dps-answers", status=4)["code"] == "dps.certificate_refused"


# The record.


def test_the_seal_is_made_by_the_key_and_by_no_other(bench: Bench) -> None:
    bench.equip()
    signer = open_device(bench.loaded())
    message = b"\x00dps-agent record 1{}"
    seal = signer.sign(b"", message)
    assert len(seal) == 64 and signer.sign(b"", message) != seal, "each is another one"
    assert signer.verify(message, seal)
    for place in range(64):
        altered = bytearray(seal)
        altered[place] ^= 1
        assert not signer.verify(message, bytes(altered)), place
    for wrong in (seal[:-1], seal + b"\x00", b"", bytes(64)):
        assert not signer.verify(message, wrong)
    assert not signer.verify(message + b" ", seal)
    signer.release()
    assert signer.verify(message, seal), "the key is read again"


def test_the_released_record_of_a_device_with_a_certificate_is_sealed_by_its_key(bench: Bench) -> None:
    (row,) = [
        row for row in json.loads(RECORDS.read_text())["slots"] if row["name"] == "an assignment by a certificate"
    ]
    _, text, seal = decode(bytes.fromhex(row["payload"]))
    key = ec.derive_private_key(int.from_bytes(bytes(range(1, 33))), ec.SECP256R1())
    write_private(str(bench.key_file), key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    bench.equip()
    signer = open_device(bench.loaded())
    assert signer.verify(seal_message(text), seal) and not signer.verify(seal_message(text + b" "), seal)


def test_another_key_is_another_identity(bench: Bench) -> None:
    bench.equip()
    bench.command("provision")
    bench.key_file.unlink()
    bench.equip()
    assert bench.checked("record-seal")["result"] == "warning"
    assert not bench.command("provision")["alreadyProvisioned"]


# The end of a certificate.


def test_the_end_is_warned_of_once_a_third_of_the_life_is_left(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.equip(days=(-1, 2))
    life = valid_s(bench.loaded())
    assert abs(len(life) - LIFE_S) <= 2
    for left_s, warned in ((LIFE_S // 3 + 60, ""), (LIFE_S // 3 - 60, "ends at"), (-60, "ended at")):
        with monkeypatch.context() as patched:
            patched.setattr("dps_agent.host.device_certificates.time.time", lambda left_s=left_s: life[-1] - left_s)
            said = ends_soon(life)
        assert (warned in said) if warned else not said, (left_s, said)
    assert ends_soon(range(0)) == ""
    bench.equip(days=(-2, 0.5))
    assert tpm_warnings(open_device(bench.loaded())) == [ends_soon(valid_s(bench.loaded()))]
    assert bench.checked("device-certificate")["result"] == "warning"
    assert any("have another one issued" in warning for warning in bench.command("provision")["warnings"])
    assert "have another one issued" in bench.text("status")


def test_a_running_service_warns_of_the_certificate_that_is_there_now(bench: Bench) -> None:
    bench.equip()
    signer = open_device(bench.loaded())
    assert tpm_warnings(signer) == []
    bench.equip(days=(-2, 0.5))
    assert tpm_warnings(signer) == [ends_soon(valid_s(bench.loaded()))] != [""]
    bench.certificate_file.rename(bench.folder / "elsewhere")
    assert len(tpm_warnings(signer)) == 1
    bench.equip()
    assert tpm_warnings(signer) == []


def test_a_certificate_that_is_never_valid_is_no_traceback(bench: Bench) -> None:
    never = (UTC_TIME, b"260101000000Z"), (UTC_TIME, b"250101000000Z")
    bench.certificate_file.write_text(party(DEVICE, LINE, NO_CA, dates=never).pem)
    assert certificate_shown(bench.loaded()).startswith("certificate_file: expected certificates in PEM")


def test_a_new_certificate_is_shown_from_the_next_connection_on(bench: Bench) -> None:
    bench.equip()
    bench.command("provision")
    connection = hub_connection(bench.loaded())
    try:
        assert connection.connect(as_device()) == ConnAck(0, False)
        trust = connection.trust
        first = trust.context()
        assert trust.context() is first and trust.session(HUB) is None, (
            "no session is kept where one shows a certificate"
        )
        bench.equip()
        assert connection.publish(f"devices/{DEVICE}/messages/events/", b"still there", 1)
        assert trust.context() is not first, "the file has changed, and with it what is shown"
        assert connection.connect(as_device()) == ConnAck(0, False)
    finally:
        connection.close()


def test_a_refusal_stays_one_where_the_device_s_files_have_gone_meanwhile(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.equip()
    monkeypatch.setattr("dps_agent.host.network.trust._take_hashed", lambda context: True)
    trust = Trust("", "ca_file", client_certificate(bench.loaded()))
    trust.context()
    assert trust.look_further()
    trust = Trust("", "ca_file", client_certificate(bench.loaded()))
    trust.context()
    bench.certificate_file.unlink()
    assert not trust.look_further(), "there is nothing to try it with"
    with pytest.raises(AskOperator, match="certificate_file: expected a chain in PEM"):
        trust.context()


# Wherever a server asks for it: OpenSSL's own, which is not ours.


class OpensslServer:
    """`openssl s_server`, which answers one request; `asks` says when it wants the certificate."""

    def __init__(self, folder: Path, asks: str) -> None:
        self.asks = asks
        server = party("localhost", ROOT, [(x509.SubjectAlternativeName([x509.DNSName("localhost")]), False)])
        self.chain = written(folder / "server.pem", server)
        self.roots = folder / "roots.pem"
        self.roots.write_text(ROOT.pem)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        how = {
            "first": ["-Verify", "5"],
            "first-1.2": ["-tls1_2", "-Verify", "5"],
            "renegotiation": ["-tls1_2"],
            "after": ["-tls1_3"],
        }[asks]
        self.process = subprocess.Popen(
            ["openssl", "s_server", "-accept", f"127.0.0.1:{self.port}", "-cert", str(self.chain), "-key",
             str(self.chain), "-CAfile", str(self.roots), "-no_ticket", "-no_cache", "-naccept", "1", *how],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        self.said = b""

    def until(self, text: bytes) -> None:
        assert self.process.stdout is not None
        while text not in self.said:
            piece = os.read(self.process.stdout.fileno(), 65536)
            assert piece, f"it ended: {self.said.decode(errors='replace')}"
            self.said += piece

    def say(self, text: bytes) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(text)
        self.process.stdin.flush()

    def serve(self) -> None:
        """Takes the request, asks for the certificate where it has none yet, and answers."""
        self.until(b"PUT /")
        if not self.asks.startswith("first"):
            self.say(b"R\n" if self.asks == "renegotiation" else b"c\n")
            self.until(b"verify return:1\n" if self.asks == "after" else b"verify return")
            self.until(DEVICE.encode())
        body = b'{"status":"assigned"}'
        self.say(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.mark.parametrize("asks", ["first", "renegotiation", "after"])
def test_the_certificate_is_shown_whenever_a_server_asks_for_it(bench: Bench, tmp_path: Path, asks: str) -> None:
    bench.equip()
    server = OpensslServer(tmp_path, asks)
    try:
        server.until(b"ACCEPT")
        serving = threading.Thread(target=server.serve, daemon=True)
        serving.start()
        shown = client_certificate(bench.loaded())
        connection = DpsConnection(
            "https://localhost", f"127.0.0.1:{server.port}", str(server.roots), 60.0, certificate=shown
        )
        reply = connection.request("PUT", "/register", b"{}", None)
        connection.close()
        serving.join(60)
        assert isinstance(reply, Reply) and reply.status == 200, (reply, server.said.decode(errors="replace"))
        assert DEVICE.encode() in server.said, "the server has seen whose certificate it is"
    finally:
        server.close()


def test_a_hub_is_shown_the_certificate_in_the_handshake_and_at_no_other_time(bench: Bench, tmp_path: Path) -> None:
    bench.equip()
    server = OpensslServer(tmp_path, "renegotiation")
    try:
        server.until(b"ACCEPT")
        dialler = Dialler(ProxyRule(NONE), str(server.roots), "hub.ca_file", client_certificate(bench.loaded()))
        dialler.begin()
        tls = dialler.dial("localhost", "127.0.0.1", server.port, time.monotonic() + 60)
        tls.sendall(b"PUT / as before")
        server.until(b"PUT /")
        server.say(b"R\n")
        tls.settimeout(60)
        with contextlib.suppress(OSError):
            assert tls.recv(1) == b"", "the server has given up, or waits"
        server.until(b"SSL_do_handshake")  # it says so once it has ended the connection
        server.process.kill()
        said = server.said + server.process.communicate()[0]
        assert b"SSL_do_handshake" in said and DEVICE.encode() not in said, said
        dialler.close()
    finally:
        server.close()


def test_a_server_that_insists_refuses_a_device_without_a_certificate(tmp_path: Path) -> None:
    server = OpensslServer(tmp_path, "first")
    try:
        server.until(b"ACCEPT")
        connection = DpsConnection("https://localhost", f"127.0.0.1:{server.port}", str(server.roots), 60.0)
        reply = connection.request("PUT", "/register", b"{}", None)
        assert isinstance(reply, NoReply) and reply.reason.startswith("tls_client_certificate"), reply
        connection.close()
    finally:
        server.close()


def test_a_key_of_another_certificate_is_no_way_to_connect(bench: Bench, tmp_path: Path) -> None:
    bench.equip()
    other = written(tmp_path / "other.pem", party(DEVICE, LINE, NO_CA))
    shown = client_certificate(bench.loaded())
    assert shown is not None
    trust = Trust(str(bench.emulator.ca_file), "ca_file", shown._replace(key_file=str(other)))
    with pytest.raises(AskOperator, match="certificate_file: expected a chain in PEM"):
        trust.context()
    other.unlink()
    os.mkfifo(other)
    with pytest.raises(AskOperator, match="it is a FIFO, no regular file"):
        trust.context()
