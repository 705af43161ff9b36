"""A device whose TPM has made the key of the certificate that DPS issues: what stays, what is shown, what may fail."""

from __future__ import annotations

import contextlib
import os
import re
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509

from dps_agent.der import certificates, validity
from dps_agent.driver import Driver
from dps_agent.effects import NoReply
from dps_agent.host.config import ConfigurationError
from dps_agent.host.parts import clock_for, dps_connection, hub_connection, open_device
from dps_agent.host.runner import Runner
from dps_agent.host.settings_table import REQUEST
from dps_agent.hub_effects import ConnAck, Connect
from dps_agent.issued import public_key_of
from dps_agent.lifecycle import Lifecycle
from dps_emulator.attestation import Certificates
from dps_emulator.service import Settings
from dps_hal.contracts import CERTIFICATE
from dps_hal.errors import RetryLater
from dps_hal.host import tls_provider as provider
from dps_hal.host.signing_key import from_pem, to_pem
from dps_hal.host.state_dir import open_store
from dps_hal.tpm.keys import ALG_AES, ALG_CFB, ALG_NULL, ALG_SHA256, sized
from host.test_issued import DEVICE, HUB, Bench, Shifted, emulator
from host.test_x509 import LINE, issued
from support.cloud.emulator import EmulatorInThread
from support.tpm.swtpm import OWNER
from support.tpm.tls import OtherProcess, TpmForTls

__all__ = ["emulator"]
LOADED = ["ReadPublic", "Load", "ECC_Parameters"]
SRK_HANDLE = 0x81000001
# An ECC storage key of nobody's template: TPM2B_PUBLIC.
OTHER_PRIMARY = sized(
    struct.pack(">HHIH", 0x0023, ALG_SHA256, 0x00030472, 0)
    + struct.pack(">HHHHHHI", ALG_AES, 128, ALG_CFB, ALG_NULL, 0x0003, ALG_NULL, 0)
)
HANDSHAKE = ["ECC_Parameters", "Hash", "Sign"]


class TpmBench(Bench):
    """A device with a TPM, whose certificate for the hub DPS issues."""

    def __init__(
        self, tpm: TpmForTls, backend: str, folder: Path, emulator: EmulatorInThread, capsys: Any, attestation: str
    ) -> None:
        self.tpm = tpm
        self.backend = backend
        super().__init__(folder, emulator, capsys, attestation)

    def tpm_table(self, attestation: str) -> str:
        """See `Bench.tpm_table`."""
        return f'[tpm]\nbackend = "{self.backend}"\ntcti = "{self.tpm.tap.tcti}"\n'

    def enrolled(self, attestation: str) -> Any:
        """See `Bench.enrolled`; where it is a certificate, the TPM has made the key of that, too."""
        if attestation != "x509":
            return super().enrolled(attestation)
        self.own.unlink()
        source = self.folder / "own-issued.pem"
        source.write_text(issued(str(self.command("enroll", "--x509")["certificateRequest"]), LINE))
        self.command("install-certificate", str(source))
        return Certificates(certificates_of(source))

    def connect(self, connection: Any) -> object:
        user_name = f"{HUB}/{DEVICE}/?api-version=2021-04-12"
        return connection.connect(Connect(HUB, DEVICE, user_name, self.chain(), 60, True))


def certificates_of(file: Path) -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding

    return x509.load_pem_x509_certificate(file.read_bytes()).public_bytes(Encoding.DER)


@pytest.fixture
def made(
    tmp_path: Path,
    emulator: EmulatorInThread,
    tls_tpm: TpmForTls,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Iterator[Callable[..., TpmBench]]:
    for name in [name for name in os.environ if name.startswith(("DPS_AGENT_", "CREDENTIALS_", "TPM2OPENSSL_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("OPENSSL_MODULES", tls_tpm.modules)
    tls_tpm.tap.forget()

    def make(attestation: str = "tpm", backend: str = "wire", cloud: EmulatorInThread = emulator) -> TpmBench:
        return TpmBench(tls_tpm, backend, tmp_path, cloud, capsys, attestation)

    yield make
    tls_tpm.tap.forget()
    assert tls_tpm.swtpm.leftovers() == [], "nothing is left in the TPM"


@pytest.mark.parametrize(("attestation", "backend"), [("tpm", "wire"), ("tpm", "esys"), ("x509", "esys")])
def test_the_tpm_makes_the_key_before_dps_is_asked_and_the_hub_takes_what_was_issued_for_it(
    made: Callable[..., TpmBench], attestation: str, backend: str
) -> None:
    bench = made(attestation, backend)
    bench.tpm.names()
    first = bench.command("provision")
    assert (first["assignedHub"], first["alreadyProvisioned"], first["warnings"]) == (HUB, False, [])
    assert bench.tpm.names().count("Create") == 1
    content = bench.key_file.read_bytes()
    assert content.startswith(b"-----BEGIN TSS2 PRIVATE KEY-----") and b"BEGIN PRIVATE" not in content
    assert bench.key_file.stat().st_mode & 0o777 == 0o600
    asked = x509.load_pem_x509_csr(content[content.index(b"-----BEGIN CERTIFICATE REQUEST") :])
    assert asked.is_signature_valid and asked.subject.rfc4514_string() == f"CN={DEVICE}"
    leaf = x509.load_der_x509_certificate(certificates(bench.chain())[0])
    assert leaf.public_key() == asked.public_key()
    connection = hub_connection(bench.loaded())
    try:
        for _ in range(2):
            bench.tpm.names()
            assert bench.connect(connection) == ConnAck(0, False)
            assert bench.tpm.names() == [*LOADED, *HANDSHAKE, "FlushContext"]
        assert bench.tpm.swtpm.leftovers() == [], "the connection stands, and has nothing in the TPM"
    finally:
        connection.close()
    bench.configure(hub='transport = "websocket"')
    assert bench.connack(bench.chain()) == ConnAck(0, False)
    bench.configure()
    assert bench.command("provision")["alreadyProvisioned"], "chain and seal fit"
    assert not bench.command("provision", "--force")["alreadyProvisioned"]
    assert bench.key_file.read_bytes() == content, "the same request goes out again"
    assert "Create" not in bench.tpm.names()
    where = f"the TPM has made its key, {bench.key_file}"
    assert where in bench.text("status")
    found = {one["id"]: one for one in bench.command("check")["checks"]}
    assert found["device-certificate"]["result"] == "ok" and where in found["device-certificate"]["detail"]
    for name in ("tpm-srk", "record-seal", "dps-answers", "hub-mqtt"):
        assert found[name]["result"] == "ok", found[name]


@pytest.mark.parametrize("backend", ["wire", "esys"])
def test_reconnects_leave_nothing_in_a_tpm_of_three_slots_and_no_file_open(
    made: Callable[..., TpmBench], backend: str
) -> None:
    bench = made("tpm", backend)
    bench.command("provision")
    connection = hub_connection(bench.loaded())
    try:
        bench.connect(connection)
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(12):
            assert bench.connect(connection) == ConnAck(0, False)
            assert bench.tpm.swtpm.leftovers() == []
        assert abs(len(os.listdir("/proc/self/fd")) - before) <= 2, "the emulator may not have ended the last one yet"
    finally:
        connection.close()


@pytest.mark.parametrize("backend", ["wire", "esys"])
def test_a_device_without_another_use_for_its_tpm_has_that_make_the_key_where_the_settings_say_so(
    made: Callable[..., TpmBench], backend: str
) -> None:
    bench = made("symmetric-key", backend)
    bench.command("provision")
    assert b"BEGIN PRIVATE KEY" in bench.key_file.read_bytes() and bench.tpm.names() == []
    bench.configure(certificate='certificate = "issued"\nissued_key = "tpm"')
    assert bench.command("provision")["alreadyProvisioned"], "a key that is there stays"
    found = {one["id"]: one for one in bench.command("check")["checks"]}["device-certificate"]
    assert found["result"] == "warning" and found["remedy"].startswith(f"remove {bench.key_file}"), found
    bench.key_file.unlink()
    assert not bench.command("provision")["alreadyProvisioned"]
    assert from_pem(bench.key_file.read_bytes().partition(b"-----BEGIN CERTIFICATE REQ")[0]).srk_handle == 0x81000001
    assert bench.connack(bench.chain()) == ConnAck(0, False)
    assert bench.command("provision")["alreadyProvisioned"]


@pytest.mark.parametrize("backend", ["wire", "esys"])
def test_the_tpm_that_has_sealed_the_device_s_own_key_makes_the_other_one_too_and_has_one_user(
    made: Callable[..., TpmBench], backend: str
) -> None:
    bench = made("symmetric-key", backend)
    bench.command("import-key")
    bench.tpm.names()
    assert not bench.command("provision")["alreadyProvisioned"]
    assert bench.tpm.names().count("Create") == 1 and b"BEGIN TSS2" in bench.key_file.read_bytes()
    assert not bench.command("provision", "--force")["alreadyProvisioned"]
    device = open_device(bench.loaded())
    for _ in range(2):
        device.sign(b"", b"message")
        device.request(DEVICE)
        assert {"HMAC", "Sign"} <= set(bench.tpm.names())
    device.sign(b"", b"message")
    device.release()
    assert bench.tpm.swtpm.leftovers() == []


def test_a_life_that_connects_at_once_leaves_the_tpm_to_tls(made: Callable[..., TpmBench]) -> None:
    bench = made()
    bench.command("provision")
    configuration, store = bench.loaded(), open_store(str(bench.state_dir))
    connections = len([each for each in bench.emulator.hub_log if each.event == "connected"])
    life = Lifecycle(configuration.settings())
    runner = Runner(
        tpm=open_device(configuration),
        store=store,
        connection=dps_connection(configuration),
        clock=clock_for(store),
        hub=hub_connection(configuration),
        random=lambda: 0.0,  # it waits for nothing between its record's seal and the hub
    )

    def live() -> None:
        with contextlib.suppress(RetryLater):
            runner.run(life.live(False, False, True), Driver(life))

    thread = threading.Thread(target=live)
    thread.start()
    try:
        bench.emulator.await_hub_log("connected", connections + 1, DEVICE)
    finally:
        runner.stop()
        thread.join(60)
    assert not thread.is_alive() and not runner.stuck


def test_a_key_for_which_the_tpm_has_to_make_its_storage_root_key_first_has_the_time_for_that(
    made: Callable[..., TpmBench],
) -> None:
    bench = made("symmetric-key")
    bench.configure(certificate='certificate = "issued"\nissued_key = "tpm"')
    bench.tpm.swtpm.clear()
    device = open_device(bench.loaded())
    assert not device.creates_key
    bench.tpm.tap.hanging.clear()
    bench.tpm.tap.hang(command="CreatePrimary")
    thread = threading.Thread(target=lambda: device.request(DEVICE))
    thread.start()
    assert bench.tpm.tap.hanging.wait(60)
    assert device.creates_key
    bench.tpm.tap.let_go()
    thread.join(60)
    assert not thread.is_alive()
    device.release()
    assert not device.creates_key


@pytest.mark.parametrize("backend", ["wire", "esys"])
@pytest.mark.parametrize("attestation", ["symmetric-key", "tpm"])
def test_a_tpm_that_makes_no_key_is_given_back_and_makes_it_at_the_next_attempt(
    made: Callable[..., TpmBench], attestation: str, backend: str
) -> None:
    bench = made(attestation, backend)
    bench.configure(certificate='certificate = "issued"\nissued_key = "tpm"')
    device = open_device(bench.loaded())
    bench.tpm.tap.refuse(0x902, command="Create", times=99)
    with pytest.raises(RetryLater, match="0x902"):
        device.request(DEVICE)
    assert bench.tpm.swtpm.leftovers() == []
    bench.tpm.tap.forget()
    public_key_of(device.request(DEVICE))
    device.release()


def test_the_key_lies_in_a_file_beside_a_tpm_only_where_the_settings_say_so(made: Callable[..., TpmBench]) -> None:
    bench = made()
    bench.configure(certificate='certificate = "issued"\nissued_key = "file"')
    (warned,) = bench.command("provision")["warnings"]
    assert "lies in a plain file" in warned and b"BEGIN PRIVATE KEY" in bench.key_file.read_bytes()
    assert bench.connack(bench.chain()) == ConnAck(0, False)
    assert "its key lies in a plain file" in bench.text("status")


def test_without_a_provider_no_key_is_made_and_dps_is_not_asked(
    made: Callable[..., TpmBench], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = made()
    asked = len(bench.emulator.log)
    with monkeypatch.context() as patched:
        patched.setenv("OPENSSL_MODULES", str(tmp_path))
        error = bench.command("provision", status=5)["error"]
        assert error["code"] == "tpm.tls_provider" and 'issued_key = "file"' in error["remedy"], error
        found = {one["id"]: one for one in bench.command("check", status=5)["checks"]}
        assert found["device-certificate"]["code"] == "tpm.tls_provider", found["device-certificate"]
    with monkeypatch.context() as patched:
        patched.setattr(provider._Openssl, "_version_of", lambda self, loaded: "1.1.1")
        patched.setattr(provider, "_found", [])
        error = bench.command("provision", status=5)["error"]
        assert "expected OpenSSL's provider tpm2 in version 1.2 or newer; came 1.1.1" in error["message"], error
    assert not bench.key_file.exists()
    assert not [line for line in bench.emulator.log[asked:] if line.method == "PUT"]


def test_a_key_that_the_tpm_lost_is_made_anew_by_the_next_registration(made: Callable[..., TpmBench]) -> None:
    bench = made("symmetric-key")
    bench.configure(certificate='certificate = "issued"\nissued_key = "tpm"')
    bench.command("provision")
    before, chain = bench.key_file.read_bytes(), bench.chain()
    bench.tpm.swtpm.clear()
    answer = bench.connack(chain)
    assert isinstance(answer, NoReply) and answer.reason.startswith("tpm.certificate_key: the TPM does not take"), (
        answer
    )
    found = {one["id"]: one for one in bench.command("check", status=5)["checks"]}["device-certificate"]
    assert found["code"] == "tpm.certificate_key" and "'dps-agent provision --force' has the TPM" in found["remedy"]
    assert bench.key_file.read_bytes() == before, "a check replaces nothing"
    assert "for the key of the certificate that DPS issues alone: the device's own key lies" in bench.text("status")
    bench.configure(
        certificate=f'certificate = "issued"\nissued_key = "tpm"\nissued_key_file = "{bench.key_file}"'
    )  # and then it is the operator's
    with pytest.raises(ConfigurationError, match="expected a key that this TPM has made, and it does not take that"):
        open_device(bench.loaded()).request(DEVICE)
    assert bench.key_file.read_bytes() == before
    bench.configure(certificate='certificate = "issued"\nissued_key = "tpm"')
    assert not bench.command("provision", "--force")["alreadyProvisioned"]
    assert bench.key_file.read_bytes() != before
    assert bench.connack(bench.chain()) == ConnAck(0, False)


def test_settings_that_name_another_tpm_for_a_while_cost_no_key(made: Callable[..., TpmBench]) -> None:
    """What another TPM's refusal makes of it is what TPM2_Clear makes of it; a key put back is the former TPM."""
    bench = made("symmetric-key")
    bench.configure(certificate='certificate = "issued"\nissued_key = "tpm"')
    bench.command("provision")
    good, aside = bench.key_file.read_bytes(), bench.key_file.with_name("issued-key.pem.lost")
    bench.key_file.write_bytes(elsewhere(good))
    (warned,) = bench.command("provision", "--force")["warnings"]
    assert warned.startswith("the TPM did not take the key") and warned.endswith(str(aside)), warned
    assert aside.read_bytes() == elsewhere(good) and aside.stat().st_mode & 0o777 == 0o600
    other = bench.key_file.read_bytes()
    aside.write_bytes(good)
    bench.key_file.write_bytes(elsewhere(other))
    assert bench.command("provision", "--force")["warnings"] == []
    assert (bench.key_file.read_bytes(), aside.read_bytes()) == (good, elsewhere(other))
    assert bench.connack(bench.chain()) == ConnAck(0, False)
    bench.command("reset", "--yes")
    assert not bench.key_file.exists() and not aside.exists()


def elsewhere(content: bytes) -> bytes:
    """The file of a key as another TPM has it: this one refuses its private part, whose integrity is another's."""
    key = from_pem(content.partition(REQUEST)[0])
    private = key.private[:4] + bytes(byte ^ 1 for byte in key.private[4:])
    return to_pem(key._replace(private=private)) + content[content.index(REQUEST) :]


def test_a_key_goes_where_it_belongs_while_the_file_of_the_device_s_own_key_is_not_there(
    made: Callable[..., TpmBench],
) -> None:
    bench = made("symmetric-key", "esys")
    bench.command("import-key")
    device = open_device(bench.loaded())
    away = bench.own.rename(bench.own.with_suffix(".away"))
    device.request(DEVICE)
    assert bench.key_file.read_bytes().startswith(b"-----BEGIN TSS2")
    bench.key_file.unlink()
    with pytest.raises(ConfigurationError, match="device_key_file"):
        open_device(bench.loaded())
    away.rename(bench.own)
    device.release()


def test_a_tpm_without_room_for_its_storage_root_key_says_so_to_the_hub_s_connection_and_the_key_is_good(
    made: Callable[..., TpmBench],
) -> None:
    bench = made("symmetric-key")
    bench.configure(certificate='certificate = "issued"\nissued_key = "tpm"')
    bench.command("provision")
    before = bench.key_file.read_bytes()
    bench.tpm.swtpm.evict(SRK_HANDLE)
    try:
        for somebody_else_is_there in (False, True):
            if somebody_else_is_there:
                bench.tpm.swtpm.persist_primary(OWNER, OTHER_PRIMARY, SRK_HANDLE)
            bench.tpm.tap.refuse(0x14B, command="EvictControl", times=99)
            answer = bench.connack(bench.chain())
            assert isinstance(answer, NoReply), answer
            assert answer.reason.startswith("tpm.nv_full: the TPM has no room to keep the storage root key"), answer
            assert not bench.command("provision", "--force")["alreadyProvisioned"]
            assert bench.key_file.read_bytes() == before
    finally:
        bench.tpm.tap.forget()
        bench.tpm.swtpm.evict(SRK_HANDLE)
    assert bench.connack(bench.chain()) == ConnAck(0, False), "now there is room"


def test_a_tpm_that_says_once_that_it_lost_the_key_is_asked_again(made: Callable[..., TpmBench]) -> None:
    bench = made()
    bench.command("provision")
    before = bench.key_file.read_bytes()
    device = open_device(bench.loaded())
    bench.tpm.names()
    bench.tpm.tap.refuse(0x1DF, command="Load")  # TPM_RC_INTEGRITY of its first parameter
    assert public_key_of(device.request(DEVICE)) == public_key_of(device.request(""))
    assert bench.tpm.names().count("Load") == 2
    assert bench.key_file.read_bytes() == before
    bench.tpm.tap.refuse(0x902, command="Load", times=99)
    with pytest.raises(RetryLater, match="0x902"):
        device.request(DEVICE)
    bench.tpm.tap.forget()
    assert bench.key_file.read_bytes() == before


def test_a_damaged_file_of_a_key_is_as_none(made: Callable[..., TpmBench]) -> None:
    bench = made()
    bench.command("provision")
    good = bench.key_file.read_bytes()
    for damaged in (good[:200], good.replace(b"\nM", b"\n", 1)):
        bench.key_file.write_bytes(damaged)
        device = open_device(bench.loaded())
        assert device.request("") == b""
        assert not device.verify(b"message", bytes(64))
        bench.configure(certificate=f'certificate = "issued"\nissued_key_file = "{bench.key_file}"')
        with pytest.raises(ConfigurationError, match="expected a key that the TPM has made; it is damaged"):
            open_device(bench.loaded()).request(DEVICE)
        bench.configure()
    assert not bench.command("provision")["alreadyProvisioned"]
    assert bench.command("provision")["alreadyProvisioned"]


@pytest.mark.parametrize("attestation", ["tpm", "x509"])
@pytest.mark.parametrize("command", ["Load", "Sign"])
def test_a_tpm_that_hangs_in_the_hub_s_handshake_ends_it_at_our_deadline(
    made: Callable[..., TpmBench], attestation: str, command: str
) -> None:
    bench = made(attestation)
    bench.command("provision")
    bench.tpm.tap.hanging.clear()
    bench.tpm.tap.hang(command=command)
    process = OtherProcess(bench.tpm, bench.settings, HUB)
    try:
        assert bench.tpm.tap.hanging.wait(60), process.said()
        (said,) = process.said(time_passes=True)
        waited = re.fullmatch(r"tpm.timeout stuck: it waits for the TPM, which did not answer within (\d+) s", said)
        assert waited is not None and int(waited[1]) > 90, said
    finally:
        process.close()


def test_the_hub_renews_the_certificate_with_a_key_that_the_tpm_has_or_had_to_make_anew(
    made: Callable[..., TpmBench],
) -> None:
    clock = Shifted()
    with EmulatorInThread(Settings(retry_after_s=0, client_certificates=True), clock=clock) as cloud:
        for renewed_by_another in (False, True):
            bench = made("symmetric-key", cloud=cloud)
            bench.configure(certificate='certificate = "issued"\nissued_key = "tpm"')
            clock.by_s = -25 * 86_400  # of a life of 30 days
            bench.command("provision", "--force")
            clock.by_s = 0.0
            before, key, configuration = bench.chain(), bench.key_file.read_bytes(), bench.loaded()
            connections = len([each for each in cloud.hub_log if each.event == "connected"])
            life = Lifecycle(configuration.settings())
            runner = Runner(
                tpm=open_device(configuration),
                store=open_store(configuration.state_dir),
                connection=dps_connection(configuration),
                clock=clock_for(open_store(configuration.state_dir)),
                hub=hub_connection(configuration),
                observe=lambda effect, answer, _s: forget(bench, effect, answer) if renewed_by_another else None,  # noqa: B023
            )

            def live() -> None:
                with contextlib.suppress(RetryLater):
                    runner.run(life.live(False, False, True), Driver(life))  # noqa: B023

            thread = threading.Thread(target=live)
            thread.start()
            try:
                cloud.await_hub_log("connected", connections + 2, DEVICE)
            finally:
                runner.stop()
                thread.join(60)
            assert not thread.is_alive()
            after = bench.chain()
            lives_s = [validity(certificates(each)[0])[1] for each in (before, after)]
            assert lives_s[1] - lives_s[0] > 24 * 86_400
            assert (bench.key_file.read_bytes() == key) is not renewed_by_another
            assert bench.connack(after) == ConnAck(0, False)
            assert bench.command("provision")["alreadyProvisioned"]


def forget(bench: TpmBench, effect: object, answer: object) -> None:
    """Somebody clears the TPM while the connection stands on which the certificate is going to be renewed."""
    if isinstance(effect, Connect) and isinstance(answer, ConnAck) and not getattr(bench, "cleared", False):
        bench.tpm.swtpm.clear()
        bench.cleared = True  # type: ignore[attr-defined]


def test_reset_removes_the_file(made: Callable[..., TpmBench]) -> None:
    bench = made()
    bench.command("provision")
    bench.command("reset", "--yes")
    assert open_store(str(bench.state_dir)).load(CERTIFICATE) is None and not bench.key_file.exists()
