"""A device on Linux whose certificate for the hub DPS issues: against the emulator, beside each way of attestation."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from dps_agent.assignment import decode
from dps_agent.der import certificates, validity
from dps_agent.driver import Driver
from dps_agent.effects import FindIssuers, NoReply, UtcNow
from dps_agent.host import load
from dps_agent.host.checks import local
from dps_agent.host.checks.finding import OK, WARNING
from dps_agent.host.cli import main
from dps_agent.host.config import Configuration, ConfigurationError
from dps_agent.host.issuers import issuers_among
from dps_agent.host.network.mqtt import HubConnection
from dps_agent.host.network.shown import Shown
from dps_agent.host.network.trust import Trust
from dps_agent.host.parts import clock_for, dps_connection, hub_connection, open_device
from dps_agent.host.runner import Runner
from dps_agent.hub_effects import ConnAck, Connect
from dps_agent.issued import CHAIN_LIMIT, chain_for, chains_in, joined, name_of, public_key_of
from dps_agent.lifecycle import Lifecycle
from dps_emulator.attestation import Certificates, SymmetricKeys
from dps_emulator.enrollments import Enrollment
from dps_emulator.issuing import Issuer
from dps_emulator.service import Settings
from dps_hal.contracts import CERTIFICATE, IDENTITY, Utc
from dps_hal.errors import AskOperator, RetryLater
from dps_hal.host.state_dir import open_store
from support.cloud.chains import CA, NO_CA, SIGNS_CERTIFICATES, party, serving, written
from support.cloud.emulator import HUB, EmulatorInThread
from support.tpm.states import copy_state

DEVICE = "press-07"
KEY = bytes(range(32))
POLICY = "line-4"
VECTORS = Path(__file__).parents[1] / "vectors"
Document = dict[str, Any]


class Bench:
    """A device whose settings say that its certificate is issued; `attestation` is what else shows who it is."""

    def __init__(
        self, folder: Path, emulator: EmulatorInThread, capsys: pytest.CaptureFixture[str], attestation: str
    ) -> None:
        self.folder = folder
        self.emulator = emulator
        self.capsys = capsys
        self.state_dir = folder / "state"
        self.key_file = self.state_dir / "issued-key.pem"
        self.settings = folder / "given.toml"
        self.printed = ""
        tables = self.tpm_table(attestation)
        if attestation == "tpm":
            way = f'registration_id = "{DEVICE}"\n'
        else:
            self.own = folder / "own.key"
            way = f'registration_id = "{DEVICE}"\nattestation = "{attestation}"\ndevice_key_file = "{self.own}"\n'
            if attestation == "symmetric-key":
                self.own.write_text(base64.b64encode(KEY).decode())
            else:
                own = party(DEVICE, None, NO_CA)
                secret = own.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
                self.own.write_bytes(secret)
                (folder / "own.pem").write_text(own.pem)
                way += f'certificate_file = "{folder / "own.pem"}"\n'
                self.certificate = own.certificate
            self.own.chmod(0o600)
        self._text = (
            f'id_scope = "0ne00000000"\n{way}CERTIFICATE\nendpoint = "https://localhost"\n'
            f'connect_to = "{emulator.connect_to}"\nca_file = "{emulator.ca_file}"\n'
            f'state_dir = "{self.state_dir}"\nruntime_dir = "{folder}"\n'
            f'[hub]\nconnect_to = "{emulator.hub_connect_to}"\nca_file = "{emulator.ca_file}"\nHUB\n{tables}'
        )
        self.configure()
        emulator.service.enroll(Enrollment(DEVICE, self.enrolled(attestation), credential_policy=POLICY))

    def tpm_table(self, attestation: str) -> str:
        """The part of the settings about the TPM."""
        if attestation != "tpm":
            return ""
        return f'[tpm]\nbackend = "simulator"\ntcti = "{copy_state(DEVICE, self.folder / "tpm")}"\n'

    def enrolled(self, attestation: str) -> Any:
        if attestation == "symmetric-key":
            return SymmetricKeys(KEY, KEY)
        if attestation == "x509":
            return Certificates(self.certificate)
        device = open_device(self.loaded())
        endorsement_key = device.endorsement_key()
        device.release()
        return endorsement_key

    def configure(self, certificate: str = 'certificate = "issued"', hub: str = "") -> None:
        self.settings.write_text(self._text.replace("CERTIFICATE", certificate).replace("HUB\n", f"{hub}\n"))

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

    def stored(self, record: str) -> bytes:
        found = open_store(str(self.state_dir)).load(record)
        assert found is not None
        return found.payload

    def chain(self) -> bytes:
        """The one that the stored identity names."""
        named = decode(self.stored(IDENTITY))[0].chain
        (chain,) = [each for each in chains_in(self.stored(CERTIFICATE)) if name_of(each) == named]
        return chain

    def connack(self, chain: bytes) -> object:
        connection = hub_connection(self.loaded())
        try:
            user_name = f"{HUB}/{DEVICE}/?api-version=2021-04-12"
            return connection.connect(Connect(HUB, DEVICE, user_name, chain, 60, True))
        finally:
            connection.close()


@pytest.fixture(scope="module")
def emulator() -> Iterator[EmulatorInThread]:
    with EmulatorInThread(Settings(retry_after_s=0, client_certificates=True)) as running:
        yield running


@pytest.fixture(params=["symmetric-key", "x509", "tpm"])
def attestation(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def bench(
    tmp_path: Path,
    emulator: EmulatorInThread,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    attestation: str,
) -> Iterator[Bench]:
    for name in [name for name in os.environ if name.startswith(("DPS_AGENT_", "CREDENTIALS_"))]:
        monkeypatch.delenv(name)
    made = Bench(tmp_path, emulator, capsys, attestation)
    yield made
    secret = made.key_file.read_text() if made.key_file.exists() else ""
    for line in [line for line in secret.partition("END PRIVATE")[0].splitlines() if not line.startswith("-----")]:
        assert line not in made.printed, "the key was printed"


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_hub_that_does_not_know_the_issuer_says_so_in_tls(tmp_path: Path, version: ssl.TLSVersion) -> None:
    root, stranger, issuer = (party(name, None, [*CA, SIGNS_CERTIFICATES]) for name in ("root", "stranger", "issuer"))
    served = party(HUB, root, [(x509.SubjectAlternativeName([x509.DNSName(HUB)]), False)])
    own = party(DEVICE, issuer, NO_CA)
    for name, one in (("root", root), ("stranger", stranger)):
        (tmp_path / f"{name}.pem").write_text(one.pem)
    context = serving(tmp_path, served)
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(tmp_path / "stranger.pem")
    context.maximum_version = version
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
            shaking = context.wrap_bio(there, back, server_side=True)
            plain, _ = listening.accept()
            with plain:
                while came := plain.recv(65536):  # to the end: what is left unread would cost the client the alert
                    there.write(came)
                    with contextlib.suppress(ssl.SSLError):
                        shaking.do_handshake()
                    plain.sendall(back.read())

        thread = threading.Thread(target=serve)
        thread.start()
        connection = HubConnection(
            connect_to=f"127.0.0.1:{listening.getsockname()[1]}",
            ca_file=str(tmp_path / "root.pem"),
            transport="mqtt",
            issued=Shown("", str(written(tmp_path / "own.pem", own)), "", Mock(), "issued_key_file"),
        )
        answer = connection.connect(Connect(HUB, DEVICE, f"{HUB}/{DEVICE}/?api-version=1", own.certificate, 60, True))
        connection.close()
        thread.join(60)
    assert isinstance(answer, NoReply) and "tls_client_certificate: " in answer.reason, answer
    assert "unknown ca" in answer.reason


class Shifted:
    """A clock that a test moves."""

    by_s = 0.0

    def __call__(self) -> float:
        return time.time() + self.by_s


def test_the_hub_renews_the_certificate_of_a_running_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in os.environ if name.startswith(("DPS_AGENT_", "CREDENTIALS_"))]:
        monkeypatch.delenv(name)
    clock = Shifted()
    with EmulatorInThread(Settings(retry_after_s=0, client_certificates=True), clock=clock) as emulator:
        bench = Bench(tmp_path, emulator, capsys, "symmetric-key")
        clock.by_s = -25 * 86_400  # of a life of 30 days
        bench.command("provision")
        clock.by_s = 0.0
        before, configuration = bench.chain(), bench.loaded()
        store = open_store(configuration.state_dir)
        life = Lifecycle(configuration.settings())
        runner = Runner(
            tpm=open_device(configuration),
            store=store,
            connection=dps_connection(configuration),
            clock=clock_for(store),
            hub=hub_connection(configuration),
        )

        def live() -> None:
            with contextlib.suppress(RetryLater):
                runner.run(life.live(False, False, True), Driver(life))

        thread = threading.Thread(target=live)
        thread.start()
        try:
            emulator.await_hub_log("connected", 2, DEVICE)
        finally:
            runner.stop()
            thread.join(60)
        assert not thread.is_alive()
        events = [line.event for line in emulator.hub_log if line.device_id == DEVICE]
        assert events.count("certificate") == 1 and events.count("issue-certificate") == 1, events
        after = bench.chain()
        lives_s = [validity(certificates(each)[0])[1] for each in (before, after)]
        assert lives_s[1] - lives_s[0] > 24 * 86_400
        assert bench.connack(after) == ConnAck(0, False)
        assert bench.command("provision")["alreadyProvisioned"], "its seal is made anew"
        assert sum(line.method == "PUT" for line in emulator.log) == 1


def test_a_renewal_that_the_hub_refuses_is_told_in_journal_and_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in os.environ if name.startswith(("DPS_AGENT_", "CREDENTIALS_"))]:
        monkeypatch.delenv(name)
    clock = Shifted()
    with EmulatorInThread(Settings(retry_after_s=0, client_certificates=True), clock=clock) as emulator:
        bench = Bench(tmp_path, emulator, capsys, "symmetric-key")
        clock.by_s = -25 * 86_400  # of a life of 30 days
        bench.command("provision")
        clock.by_s = 0.0
        emulator.service.enroll(Enrollment(DEVICE, SymmetricKeys(KEY, KEY)))  # there is no policy any more
        program = [sys.executable, "-m", "dps_agent.host.cli", "--config", str(bench.settings), "run"]
        told = "the hub refused to renew the certificate with 404: 404001"
        with (tmp_path / "journal").open("w") as journal:
            started = subprocess.Popen(program, stdout=journal, stderr=subprocess.STDOUT, text=True)
        try:
            until_s = time.monotonic() + 120
            shown = f"connected to {HUB}; {told}"
            told_by_status = ""
            while shown not in told_by_status and time.monotonic() < until_s:
                time.sleep(0.2)
                main(["--config", str(bench.settings), "status"])  # whose exit status changes meanwhile
                told_by_status = capsys.readouterr().out
            assert shown in told_by_status
        finally:
            started.terminate()
            started.wait(60)
        said = (tmp_path / "journal").read_text()
        bench.printed += said
        assert [line for line in said.splitlines() if told in line and "registers with DPS" not in line], said


@pytest.mark.parametrize("attestation", ["symmetric-key", "tpm"], indirect=True)
def test_the_service_runs_and_its_hub_hears_of_it(bench: Bench) -> None:
    program = [sys.executable, "-m", "dps_agent.host.cli", "--config", str(bench.settings), "run"]
    before = len(bench.emulator.hub_log)
    started = subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        bench.text("wait", "--timeout", "60")
        shown = bench.text("status")
    finally:
        started.terminate()
        said, _ = started.communicate(timeout=60)
    bench.printed += said
    assert started.returncode == 0, said
    assert "state            connected" in shown and "issued by DPS, until 2" in shown, shown
    events = [line.event for line in bench.emulator.hub_log[before:]]
    assert events.count("connected") == 1 and "refused" not in events, events


ONLY_KEY = pytest.mark.parametrize("attestation", ["symmetric-key"], indirect=True)


def test_a_device_registers_beside_each_way_and_its_hub_takes_the_certificate_alone(bench: Bench) -> None:
    first = bench.command("provision")
    assert (first["assignedHub"], first["deviceId"], first["alreadyProvisioned"]) == (HUB, DEVICE, False)
    assert bench.key_file.stat().st_mode & 0o777 == 0o600
    own = load_pem_private_key(bench.key_file.read_bytes(), None).public_key()
    chain = [x509.load_der_x509_certificate(each) for each in certificates(bench.chain())]
    assert [each.subject.rfc4514_string() for each in chain] == [f"CN={DEVICE}", f"CN={POLICY}"]
    assert chain[0].public_key() == own
    assert bench.connack(bench.chain()) == ConnAck(0, False)
    bench.configure(hub='transport = "websocket"')
    assert bench.connack(bench.chain()) == ConnAck(0, False)
    bench.configure()
    assert bench.command("provision")["alreadyProvisioned"], "chain and seal fit"
    before = bench.key_file.read_bytes()
    assert not bench.command("provision", "--force")["alreadyProvisioned"]
    assert bench.key_file.read_bytes() == before, "the same request goes out again"
    assert len(chains_in(bench.stored(CERTIFICATE))) == 2
    refused = bench.command("token", status=1)["error"]
    assert refused["code"] == "agent.no_token"
    assert bench.command("status", "--remote")["differences"] == []
    shown = bench.text("status")
    assert "issued by DPS, until 2" in shown and "no real service was ever asked" in shown
    found = {one["id"]: one for one in bench.command("check")["checks"]}
    for name in ("device-certificate", "record-seal", "dps-answers", "hub-mqtt"):
        assert found[name]["result"] == "ok", found[name]
    assert "issued by DPS, until 2" in found["device-certificate"]["detail"]


@ONLY_KEY
def test_no_other_device_s_certificate_is_taken(bench: Bench) -> None:
    bench.command("provision")
    stranger = Issuer(os.urandom)
    csr = base64.b64decode(requested(DEVICE, load_pem_private_key(bench.key_file.read_bytes(), None)))
    leaf, issuing, _ = stranger.chain(POLICY, csr, 3600, 1_790_000_000.0)
    answer = bench.connack(leaf + issuing)
    assert isinstance(answer, ConnAck) and answer.return_code == 5
    other = ec.generate_private_key(ec.SECP256R1())
    csr = base64.b64decode(requested(DEVICE, other))
    answer = bench.connack(b"".join(stranger.chain(POLICY, csr, 3600, 1_790_000_000.0)))
    assert "issued_key_file: expected the key of the certificate that DPS issued" in str(answer)


@ONLY_KEY
def test_another_key_or_another_setting_is_another_identity(bench: Bench) -> None:
    bench.command("provision")
    bench.key_file.unlink()
    assert not bench.command("provision")["alreadyProvisioned"]
    assert bench.connack(bench.chain()) == ConnAck(0, False)
    bench.configure(certificate="")
    assert not bench.command("provision")["alreadyProvisioned"]
    assert "token" in bench.command("token")
    bench.configure()
    assert not bench.command("provision")["alreadyProvisioned"]


@ONLY_KEY
def test_a_record_without_its_certificate_is_none(bench: Bench) -> None:
    bench.command("provision")
    for content in (joined([b"\x30\x00"]), b"\x00", b""):
        open_store(str(bench.state_dir)).commit(CERTIFICATE, content)
        assert not bench.command("provision")["alreadyProvisioned"], content
        assert bench.command("provision")["alreadyProvisioned"]
    bench.command("reset", "--yes")
    assert open_store(str(bench.state_dir)).load(CERTIFICATE) is None and not bench.key_file.exists()


@ONLY_KEY
def test_reset_forgets_what_settings_of_before_had_issued(bench: Bench) -> None:
    (warned,) = bench.command("provision")["warnings"]
    assert f"whoever reads it is this device at its hub ({bench.key_file})" in warned
    bench.configure(certificate="")
    assert set(bench.command("reset", "--yes")["erased"]) >= {IDENTITY, CERTIFICATE}
    assert open_store(str(bench.state_dir)).load(CERTIFICATE) is None and not bench.key_file.exists()


@ONLY_KEY
def test_reset_beside_a_registration_removes_nothing(bench: Bench) -> None:
    bench.command("provision")
    before, chain = bench.key_file.read_bytes(), bench.chain()
    with open_store(str(bench.state_dir)).exclusive():
        assert bench.command("reset", "--yes", status=3)["error"]["code"] == "store.locked"
    assert bench.key_file.read_bytes() == before and bench.chain() == chain
    bench.command("reset", "--yes")
    bench.state_dir.rename(bench.folder / "elsewhere")
    assert bench.command("reset", "--yes")["erased"] == [] and not bench.state_dir.exists()


@pytest.mark.parametrize(
    ("begun_s", "result", "says"),
    [(2000, OK, ", until 2"), (2500, WARNING, "not renewed yet"), (3700, WARNING, "ended at")],
)
def test_a_certificate_that_was_not_renewed_is_warned_of(begun_s: int, result: str, says: str) -> None:
    chain = Issuer(os.urandom).chain(POLICY, REQUEST, 3600, time.time() - begun_s)[0]
    answers: list[Any] = ["", chain]  # to why it is of no use, and to which it is
    device: Any = SimpleNamespace(
        assignment=SimpleNamespace(chain="a name"),
        configuration=SimpleNamespace(issued_key_path="/k.pem", issues_into_tpm=False),
        run=lambda exchange: (exchange.close(), answers.pop(0))[1],
    )
    found = local._issued_certificate(device)
    assert found.result == result and says in found.detail
    assert result == WARNING or "plain file, /k.pem" in found.detail


@ONLY_KEY
def test_a_service_that_issues_nothing_is_named(bench: Bench) -> None:
    bench.emulator.service.enroll(Enrollment(DEVICE, SymmetricKeys(KEY, KEY)))
    error = bench.command("provision", status=4)["error"]
    assert error["code"] == "dps.bad_request" and "credentialPolicyName" in error["message"]


@ONLY_KEY
def test_the_key_is_made_whole_or_not_at_all(bench: Bench) -> None:
    bench.state_dir.mkdir(mode=0o700)
    parts = [bench.key_file.with_name(f"issued-key.pem.{process}new") for process in (f"{os.getpid()}.", "")]
    for part in parts:
        part.write_bytes(b"half of a key")
    device = open_device(bench.loaded())
    assert device.request("") == b"" and not bench.key_file.exists(), "nothing is made for who only looks"
    first = device.request(DEVICE)
    assert device.request(DEVICE) == first == device.request("")
    assert [part.exists() for part in parts] == [False, True], "what another process writes is left alone"
    renamed = device.request("press-08")
    assert public_key_of(renamed) == public_key_of(first) and renamed != first
    for damaged in (b"", b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"):
        bench.key_file.write_bytes(damaged)
        device = open_device(bench.loaded())
        assert device.request("") == b"", "in the agent's own folder it is as none"
        anew = device.request(DEVICE)
        assert public_key_of(anew) != public_key_of(first) and device.request(DEVICE) == anew
        bench.key_file.write_bytes(damaged)
        bench.configure(certificate=f'certificate = "issued"\nissued_key_file = "{bench.key_file}"')
        with pytest.raises(ConfigurationError, match="issued_key_file: expected the key that the agent has made"):
            open_device(bench.loaded()).request(DEVICE)
        bench.configure()
    bench.key_file.unlink()
    device.request(DEVICE)
    bench.key_file.chmod(0o666)
    with pytest.raises(ConfigurationError, match="chmod 600"):
        device.request(DEVICE)
    bench.key_file.unlink()
    bench.key_file.mkdir()
    with pytest.raises(AskOperator):
        device.request(DEVICE)
    bench.key_file.rmdir()


@ONLY_KEY
def test_without_cryptography_the_setting_that_needs_it_is_named(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    device = open_device(bench.loaded())
    monkeypatch.setitem(sys.modules, "cryptography", None)
    with pytest.raises(AskOperator, match=r'^certificate = "issued" needs the Python package cryptography'):
        device.request(DEVICE)


def test_a_key_that_goes_to_a_tpm_while_a_connection_begins_takes_no_restart(tmp_path: Path) -> None:
    own = party(DEVICE, None, NO_CA)
    file = written(tmp_path / "own.pem", own)
    trust = Trust("", "hub.ca_file")
    trust.show(own.certificate, Shown("", str(file), "", Mock(), "issued_key_file"))
    file.write_bytes(b"-----BEGIN TSS2 PRIVATE KEY-----\n")
    with pytest.raises(AskOperator, match=r"lies in the TPM, and lay in a file .* the next connection takes it from"):
        trust.context()


@ONLY_KEY
def test_a_file_that_the_agent_has_not_made_is_neither_written_to_nor_removed(bench: Bench) -> None:
    theirs = bench.folder / "theirs.pem"
    key = ec.generate_private_key(ec.SECP256R1())
    theirs.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    theirs.chmod(0o600)
    before = theirs.read_bytes()
    bench.configure(certificate=f'certificate = "issued"\nissued_key_file = "{theirs}"')
    error = bench.command("provision", status=6)["error"]
    assert "expected key and request that the agent has made, or no file; it has no request" in error["message"], error
    (warned,) = bench.command("reset", "--yes")["warnings"]
    assert warned == f"issued_key_file: {theirs} stays, for the agent has not made it" and theirs.read_bytes() == before
    theirs.unlink()
    bench.command("provision")
    assert bench.command("reset", "--yes")["warnings"] == [] and not theirs.exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"api_version": '"2021-10-01"'}, "api_version: expected "),
        ({"state_dir": '"/dev/mtd3"'}, "state_dir: expected a folder"),
        ({"tpm.persist_at": "0x81000100"}, "tpm.persist_at: expected 0"),
        ({"registration_id": f'"{"a" * 65}"'}, "registration_id: expected at most 64 characters"),
        ({"certificate": '""', "issued_key_file": '"/x"'}, "issued_key_file: expected certificate"),
        ({"certificate": '""', "issued_key": '"tpm"'}, "issued_key: expected certificate"),
        ({"issued_key": '"flash"'}, 'issued_key: expected one of "auto", "tpm", "file"'),
        (
            {"issued_key": '"tpm"', "tpm.backend": '"simulator"', "tpm.tcti": '"/x"'},
            'issued_key: expected "file", or a TPM; came tpm.backend = "simulator"',
        ),
        (
            {"issued_key_file": '"/x/../y.key"', "device_key_file": '"/y.key"'},
            "issued_key_file: expected another file than device_key_file; both are /y.key",
        ),
        (
            {"issued_key_file": '"/x.pem"', "attestation": '"x509"', "certificate_file": '"/x.pem"'},
            "issued_key_file: expected another file than certificate_file",
        ),
        (
            {"device_key_file": '"/x/issued-key.pem"', "state_dir": '"/x"'},
            "device_key_file: expected another file than the key of an issued certificate has",
        ),
        (
            {"issued_key_file": '"/x/identity.0"', "state_dir": '"/x"'},
            "issued_key_file: expected a name that ends in .pem",
        ),
        ({"certificate": '"own"'}, "certificate: expected"),
        ({"api_version": '"new"'}, "api_version: expected"),
    ],
)
def test_settings_that_do_not_fit_are_refused(tmp_path: Path, changes: dict[str, str], said: str) -> None:
    given = {"id_scope": '"0ne00000000"', "certificate": '"issued"', "state_dir": f'"{tmp_path}"'} | changes
    (tmp_path / "given.toml").write_text("".join(f"{name} = {value}\n" for name, value in given.items()))
    with pytest.raises(ConfigurationError) as refused:
        load(tmp_path / "given.toml", environ={})
    assert any(problem.startswith(said) for problem in refused.value.problems), refused.value.problems


# The chain in an answer.


def requested(name: str, key: Any) -> str:
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    from cryptography.hazmat.primitives.hashes import SHA256

    made = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, SHA256())
    return base64.b64encode(made.public_bytes(Encoding.DER)).decode()


OWN = ec.generate_private_key(ec.SECP256R1())
REQUEST = base64.b64decode(requested(DEVICE, OWN))
ISSUED = Issuer(os.urandom).chain(POLICY, REQUEST, 3600, 1_790_000_000.0)
LEAF, ABOVE, TOP = (base64.b64encode(each).decode() for each in ISSUED)


def taken(sent: Any, request: bytes, now: Utc | None = None) -> bytes:
    """What becomes of certificates that are sent, as a device with a clock finds it."""
    answers = {UtcNow: lambda _: now or Utc(0, False, "test"), FindIssuers: lambda each: issuers_among(each[0])}
    exchange = chain_for(sent, request)
    answer: Any = None
    while True:
        try:
            effect = exchange.send(answer)
        except StopIteration as end:
            chain: bytes = end.value
            return chain
        answer = answers[type(effect)](effect)


@pytest.mark.parametrize(
    "sent", [[LEAF, ABOVE, TOP], [TOP, ABOVE, LEAF], [ABOVE, LEAF, TOP], [None, LEAF, ABOVE], [LEAF, LEAF, TOP, ABOVE]]
)
def test_the_chain_begins_at_the_device_s_own_certificate_in_whatever_order_it_came(sent: list[Any]) -> None:
    assert taken(sent, REQUEST) == ISSUED[0] + ISSUED[1], "the root is whoever's who takes it"


def test_what_does_not_lead_upwards_is_left_out() -> None:
    stranger = base64.b64encode(party("stranger", None, NO_CA).certificate).decode()
    assert taken([stranger, LEAF, ABOVE], REQUEST) == ISSUED[0] + ISSUED[1]
    assert taken([LEAF], REQUEST) == ISSUED[0]


@pytest.mark.parametrize(
    ("sent", "says"),
    [
        (None, "expected a list"),
        ([LEAF] * 9, "at most 8"),
        ([ABOVE, TOP], "none of the 2 certificates is for the key"),
        ([], "none of the 0"),
        ([7], "expected certificates in base64"),
        (["----"], "base64|padding"),
        (["AAAA"], "certificate: expected tag"),
        ([LEAF[:-8]], "certificate: expected"),
    ],
)
def test_an_answer_without_it_is_refused(sent: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        taken(sent, REQUEST)


def coded(*ders: bytes) -> list[str]:
    return [base64.b64encode(each).decode() for each in ders]


@pytest.mark.parametrize(
    ("now_s", "believable", "says"),
    [
        (1_790_000_000, True, ""),
        (1_790_003_600, True, ""),
        (1_790_003_601, True, "has ended, on 2026-09-21"),
        (1_790_003_601, False, ""),
        (1_790_000_000 - 300, True, ""),
        (1_790_000_000 - 301, True, "not valid before 2026-09-21"),
        (1_790_000_000 - 301, False, ""),
    ],
)
def test_dates_count_under_a_clock_that_is_believed(now_s: int, believable: bool, says: str) -> None:
    now = Utc(now_s, believable, "test")
    with pytest.raises(ValueError, match=says) if says else contextlib.nullcontext():
        assert taken(coded(*ISSUED), REQUEST, now) == b"".join(ISSUED[:2])


def test_of_several_for_this_key_the_one_that_ends_last_is_taken() -> None:
    again = Issuer(os.urandom)
    chains = [again.chain(POLICY, REQUEST, life_s, 1_790_000_000.0) for life_s in (60, 7200, 3600)]
    leaves = [chain[0] for chain in chains]
    assert taken(coded(*leaves, *chains[0][1:]), REQUEST) == leaves[1] + chains[0][1]


def test_a_certificate_of_another_name_is_refused() -> None:
    renamed = base64.b64decode(requested("press-08", OWN))
    with pytest.raises(ValueError, match="expected the CN 'press-08'"):
        taken(coded(*ISSUED), renamed)
    upper = base64.b64decode(requested(DEVICE.upper(), OWN))
    assert taken(coded(*ISSUED), upper) == b"".join(ISSUED[:2]), "DPS compares ids without regard to case"


def test_of_two_issuers_of_one_name_that_is_taken_whose_key_signed() -> None:
    root = party("root", None, CA)
    false, true = party("line-4", root, CA), party("line-4", root, CA)
    own = party(DEVICE, true, NO_CA)
    request = base64.b64decode(requested(DEVICE, own.key))
    sent = coded(own.certificate, false.certificate, true.certificate, root.certificate)
    assert taken(sent, request) == own.certificate + true.certificate
    assert taken(sent[:1], request) == own.certificate, "nobody can tell"


@pytest.mark.parametrize("place", [0, 1], ids=["of the device's", "of the issuer's"])
def test_a_chain_with_a_false_signature_is_refused(place: int) -> None:
    root = party("root", None, CA)
    false_root, line = party("root", None, CA), party("line-4", root, CA)
    other, own = party("line-4", root, CA), party(DEVICE, line, NO_CA)
    request = base64.b64decode(requested(DEVICE, own.key))
    good = [own.certificate, line.certificate, root.certificate]
    assert taken(coded(*good), request) == b"".join(good[:2])
    good[place + 1] = (other, false_root)[place].certificate  # of the right name, and of another key
    with pytest.raises(ValueError, match="a certificate is not signed by the one that came as its issuer's"):
        taken(coded(*good), request)
    altered = bytearray(own.certificate)
    altered[-1] ^= 1
    with pytest.raises(ValueError, match="is not signed by"):
        taken(coded(bytes(altered), line.certificate, root.certificate), request)


def test_who_is_no_ca_has_issued_nothing() -> None:
    line = party("line-4", None, NO_CA)
    own = party(DEVICE, line, NO_CA)
    with pytest.raises(ValueError, match="is not signed by"):
        taken(coded(own.certificate, line.certificate), base64.b64decode(requested(DEVICE, own.key)))
    assert issuers_among((own.certificate, b"\x30\x00", line.certificate)) == (-1, -1, -1)


@ONLY_KEY
def test_who_asked_the_hub_for_the_time_shows_it_the_certificate_all_the_same(bench: Bench) -> None:
    bench.command("provision")
    connection = hub_connection(bench.loaded())
    try:
        user_name = f"{HUB}/{DEVICE}/?api-version=2021-04-12"
        for _ in range(2):
            assert connection.is_verified(HUB)
            assert connection.connect(Connect(HUB, DEVICE, user_name, bench.chain(), 60, True)) == ConnAck(0, False)
            connection.disconnect()
    finally:
        connection.close()


def test_a_chain_is_bounded() -> None:
    assert len(joined([bytes(CHAIN_LIMIT)] * 2)) <= 20480 - 24, "two fit into the record"
    huge = x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3.4"), bytes(CHAIN_LIMIT))
    large = party("line-4", party("root", None, CA), [(huge, False)])
    with pytest.raises(ValueError, match="at most 9216 bytes"):
        taken([base64.b64encode(large.certificate).decode()], base64.b64decode(requested("line-4", large.key)))


def test_the_public_key_of_the_vector_is_found() -> None:
    known = json.loads((VECTORS / "certificate_request.json").read_text())
    request = x509.load_der_x509_csr(base64.b64decode(known["csr"]))
    spki = request.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    assert spki.endswith(public_key_of(base64.b64decode(known["csr"]))) and len(spki) == 294
    for cut in range(0, 300, 7):
        with pytest.raises(ValueError):
            public_key_of(base64.b64decode(known["csr"])[:cut])


@pytest.mark.parametrize("chains", [[], [b"a"], [b"a", b"bc"], [bytes(CHAIN_LIMIT)] * 2])
def test_the_record_of_chains_is_read_as_it_was_written(chains: list[bytes]) -> None:
    assert chains_in(joined(chains)) == chains
    for cut in range(1, min(len(joined(chains)), 9)):
        whole = joined(chains)[:-cut]
        if chains[-1:] and cut <= len(chains[-1]):
            with pytest.raises(ValueError):
                chains_in(whole)
