"""A device whose certificate's key its TPM has made: from the request to the hub, and what a TPM may do in between."""

from __future__ import annotations

import binascii
import errno
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from dps_agent.effects import NoReply, Reply
from dps_agent.host import loop, runner, worker
from dps_agent.host.checks.device import Device
from dps_agent.host.config import ConfigurationError
from dps_agent.host.device_certificates import private_key
from dps_agent.host.network.https import DpsConnection
from dps_agent.host.parts import client_certificate, dps_connection, hub_connection, open_device, open_tpm
from dps_agent.hub_effects import ConnAck
from dps_agent.registration import no_reply_error
from dps_hal.errors import AskOperator, RetryLater
from dps_hal.host import tls_provider as provider
from dps_hal.host.signing_key import TEMPLATE, from_pem, to_pem
from dps_hal.tpm.commands import OWNER
from host.test_x509 import (
    DEVICE,
    HUB,
    LINE,
    PROGRAM,
    SYSTEM_PYTHON,
    Bench,
    Document,
    OpensslServer,
    as_device,
    certified,
    emulator,
    issued,
)
from support.cloud.emulator import EmulatorInThread
from support.tpm.backends import BACK_ENDS
from support.tpm.swtpm import free_port_pair
from support.tpm.tls import CHECKOUT, OtherProcess, TpmForTls

__all__ = ["emulator"]
HANDSHAKE = ["ECC_Parameters", "Hash", "Sign"]
# Of TLS 1.2 the TPM also hashes the handshake, in a sequence, which is a second object.
HASHED = ["HashSequenceStart", "SequenceComplete"]
LOADED = ["ReadPublic", "Load", "ECC_Parameters"]


class TpmBench(Bench):
    """A device with a TPM, whose settings name a certificate."""

    backend = "wire"

    def __init__(self, folder: Path, emulator: EmulatorInThread, capsys: Any, tpm: TpmForTls, backend: str) -> None:
        self.tpm = tpm
        self.backend = backend
        super().__init__(folder, emulator, capsys)

    def configure(self, hub: str = "", more: str = "") -> None:
        tpm = f'[tpm]\nbackend = "{self.backend}"\ntcti = "{self.tpm.tap.tcti}"\n'
        super().configure(hub, more + tpm)

    def request(self) -> str:
        return str(self.command("enroll", "--x509")["certificateRequest"])


@pytest.fixture(params=BACK_ENDS)
def bench(request: pytest.FixtureRequest, made: Callable[[str], TpmBench]) -> TpmBench:
    return made(request.param)


@pytest.fixture
def wired(made: Callable[[str], TpmBench]) -> TpmBench:
    return made("wire")


@pytest.fixture
def made(
    tmp_path: Path,
    emulator: EmulatorInThread,
    tls_tpm: TpmForTls,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Iterator[Callable[[str], TpmBench]]:
    for name in [name for name in os.environ if name.startswith(("DPS_AGENT_", "CREDENTIALS_", "TPM2OPENSSL_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("OPENSSL_MODULES", tls_tpm.modules)
    tls_tpm.tap.forget()
    yield lambda backend: TpmBench(tmp_path, emulator, capsys, tls_tpm, backend)
    tls_tpm.tap.forget()
    assert tls_tpm.swtpm.leftovers() == [], "nothing is left in the TPM"


def test_a_device_lives_from_its_request_to_its_hub_by_a_key_of_its_tpm(bench: TpmBench) -> None:
    made = bench.command("enroll", "--x509")
    assert made["keyMade"] and bench.key_file.stat().st_mode & 0o777 == 0o600
    assert "Create" in bench.tpm.names() and from_pem(bench.key_file.read_bytes()).srk_handle == 0x81000001
    assert not bench.command("enroll", "--x509")["keyMade"], "the key stays what it is"
    bench.equip()
    first = bench.command("provision")
    assert (first["assignedHub"], first["deviceId"], first["backend"]) == (HUB, DEVICE, "x509")
    assert bench.command("provision")["alreadyProvisioned"]
    assert not bench.command("provision", "--force")["alreadyProvisioned"]
    assert bench.command("status", "--remote")["differences"] == []
    assert f", has made the device's own key, {bench.key_file}" in bench.text("status")
    assert bench.text("enroll").splitlines()[0].split()[-1] == DEVICE


@pytest.mark.parametrize("transport", ["mqtt", "websocket"])
def test_the_hub_is_shown_the_certificate_and_the_tpm_is_given_back_before_it_says_a_word(
    wired: TpmBench, transport: str
) -> None:
    bench = wired
    bench.equip()
    bench.command("provision")
    bench.configure(hub=f'transport = "{transport}"\n')
    bench.tpm.names()
    connection = hub_connection(bench.loaded())
    try:
        for _ in range(2):
            assert connection.connect(as_device()) == ConnAck(0, False)
            assert bench.tpm.names() == [*LOADED, *HANDSHAKE, "FlushContext"]
        assert bench.tpm.swtpm.leftovers() == [], "the connection stands, and has nothing in the TPM"
        assert connection.publish(f"devices/{DEVICE}/messages/events/", b"without the TPM", 1)
    finally:
        connection.close()
    assert bench.tpm.names() == []


def test_a_connection_to_dps_has_the_key_up_to_its_first_answer(bench: TpmBench) -> None:
    bench.equip()
    bench.command("provision")
    bench.tpm.names()
    connection = dps_connection(bench.loaded())
    path = f"/0ne00000000/registrations/{DEVICE}?api-version=2021-06-01"
    for _ in range(2):
        reply = connection.request("POST", path, b'{"registrationId":"%s"}' % DEVICE.encode(), None)
        assert isinstance(reply, Reply) and reply.status == 200, reply
    assert bench.tpm.names() == [*LOADED, *HANDSHAKE, "FlushContext"], "one handshake for both"
    connection.close()


def test_reconnects_leave_nothing_in_a_tpm_of_three_slots(bench: TpmBench) -> None:
    bench.equip()
    bench.command("provision")
    connection = hub_connection(bench.loaded())
    try:
        connection.connect(as_device())
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(20):
            assert connection.connect(as_device()) == ConnAck(0, False)
            assert bench.tpm.swtpm.leftovers() == []
        assert abs(len(os.listdir("/proc/self/fd")) - before) <= 2, "the emulator may not have ended the last one yet"
    finally:
        connection.close()


@pytest.mark.parametrize("asks", ["first", "first-1.2", "renegotiation", "after"])
def test_the_certificate_is_shown_whenever_a_server_asks_for_it(bench: TpmBench, tmp_path: Path, asks: str) -> None:
    bench.equip()
    bench.tpm.names()
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
        names = bench.tpm.names()
        assert names[:3] == LOADED and names[-2:] == ["Sign", "FlushContext"] and names.count("Sign") == 1, names
        if asks in ("first-1.2", "renegotiation"):
            assert [name for name in names[3:-2] if name != "SequenceUpdate"] == HASHED, names
            assert names.count("SequenceUpdate") > 0
    finally:
        server.close()


def test_the_service_connects_and_while_it_is_connected_the_tpm_is_anybody_s(wired: TpmBench) -> None:
    wired.equip()
    wired.tpm.names()
    words = [sys.executable, "-m", "dps_agent.host.cli", "--config", str(wired.settings), "run"]
    path = f"{CHECKOUT}/agent:{CHECKOUT}/hal"
    service = subprocess.Popen(words, env={**os.environ, "PYTHONPATH": path}, stderr=subprocess.PIPE)
    try:
        wired.command("wait", "--for", "connected", "--timeout", "120")
        assert wired.tpm.swtpm.leftovers() == [] and wired.tpm.names().count("Sign") == 3, "DPS, the record, the hub"
        assert wired.checked("tpm-slots")["result"] == "ok", "others have the TPM meanwhile"
    finally:
        service.terminate()
        service.communicate()


# A TPM that does not answer, or is another one.


@pytest.mark.parametrize(("whom", "command"), [("dps", "Load"), (HUB, "Sign"), ("dps", "FlushContext")])
def test_a_tpm_that_hangs_in_a_handshake_ends_it_at_our_deadline(wired: TpmBench, whom: str, command: str) -> None:
    wired.equip()
    wired.command("provision")
    tap = wired.tpm.tap
    tap.hanging.clear()
    tap.hang(command=command)
    process = OtherProcess(wired.tpm, wired.settings, whom)
    try:
        assert tap.hanging.wait(60), process.said()
        (said,) = process.said(time_passes=True)
        waited = re.fullmatch(r"tpm.timeout stuck: it waits for the TPM, which did not answer within (\d+) s", said)
        assert waited is not None and int(waited[1]) > 90, said
    finally:
        process.close()


class Waiting:
    """A connection that waits for its TPM, which may make a key just now."""

    trust = SimpleNamespace(asks_tpm=True, creates_key=False)

    def abort(self) -> None:
        """It cannot be ended."""


def test_a_check_that_the_tpm_does_not_answer_says_so_and_asks_nothing_more(
    wired: TpmBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "TPM_DEADLINE_S", 0.2)
    device, answered = Device(wired.loaded), threading.Event()
    waiting: Any = Waiting()
    with pytest.raises(RetryLater, match="the request waits for the TPM, which did not answer within") as refused:
        device.bounded(lambda: answered.wait(600), 0.0, waiting)
    assert refused.value.code == "tpm.timeout" and device.hangs
    answered.set()


def test_a_process_whose_connection_to_the_tpm_was_cut_says_so_and_is_to_be_started_anew(wired: TpmBench) -> None:
    wired.equip()
    wired.command("provision")
    wired.tpm.tap.drop(command="Sign")
    process = OtherProcess(wired.tpm, wired.settings, HUB, 2)
    try:
        first, second = process.said()
        assert first.startswith("NoReply(reason='tpm.failed: the TPM did not sign"), first
        assert second.startswith("tpm.absent ended: OpenSSL's provider tpm2 has lost its TPM"), second
        assert OtherProcess(wired.tpm, wired.settings, HUB).said() == ["ConnAck(return_code=0, session_present=False)"]
    finally:
        process.close()


def test_a_tpm_that_is_not_there_is_no_reason_to_give_up(wired: TpmBench) -> None:
    wired.equip()
    wired.command("provision")
    tcti = f"swtpm:host=127.0.0.1,port={free_port_pair()}"
    wired.settings.write_text(wired.settings.read_text().replace(wired.tpm.tap.tcti, tcti))
    process = OtherProcess(wired.tpm, wired.settings, "dps", 2)
    try:
        for line in process.said():
            assert line.startswith("NoReply(reason=") and f"no TPM answers OpenSSL's provider tpm2 at '{tcti}'" in line
    finally:
        process.close()


def test_a_tpm_that_was_cleared_is_named_and_the_key_is_not_replaced(wired: TpmBench) -> None:
    bench = wired
    bench.equip()
    bench.command("provision")
    key = bench.key_file.read_bytes()
    bench.tpm.swtpm.clear()
    signer = open_device(bench.loaded())
    with pytest.raises(AskOperator, match="the TPM does not take the key that it made") as refused:
        signer.sign(b"", b"message")
    assert refused.value.code == "tpm.certificate_key"
    error = bench.command("provision", "--force", status=5)["error"]
    assert error["code"] == "tpm.certificate_key" and "does not take the key that it made" in error["message"], error
    assert bench.checked("device-key", status=5)["code"] == "tpm.certificate_key"
    assert bench.command("enroll", "--x509", status=5)["error"]["code"] == "tpm.certificate_key"
    assert bench.key_file.read_bytes() == key
    bench.key_file.unlink()
    bench.equip()
    assert not bench.command("provision")["alreadyProvisioned"], "another key is another identity"


@pytest.mark.parametrize(
    ("return_code", "code"),
    [
        (0x922, "tpm.timeout"),  # RETRY
        (0x902, "tpm.memory"),
        (0x921, "tpm.locked_out"),
        (0x90A, "tpm.timeout"),  # TESTING
        (0x101, "tpm.failure_mode"),
    ],
)
def test_what_a_tpm_refuses_a_handshake_is_named_as_everywhere_and_passes(
    wired: TpmBench, return_code: int, code: str
) -> None:
    wired.equip()
    wired.command("provision")
    connection = hub_connection(wired.loaded())
    try:
        wired.tpm.tap.refuse(return_code, command="Load", times=10)
        for _ in range(2):
            answer = connection.connect(as_device())
            assert isinstance(answer, NoReply) and not answer.request_sent
            assert answer.reason.startswith(f"{code}: "), answer
        wired.tpm.tap.forget()
        assert connection.connect(as_device()) == ConnAck(0, False), "the process goes on as if nothing had been"
    finally:
        connection.close()


def test_whoever_gives_a_connection_up_waits_for_its_tpm_before_the_process_ends() -> None:
    waiting, answered = worker.Worker(None, loop.Loop()), threading.Event()

    def grace_s() -> float:
        answered.set()  # the TPM answers, after all that could be aborted was
        return 60.0

    try:
        outcome = waiting.do_or_abort(
            lambda: answered.wait(600), 60.0, lambda: None, "it", lambda: True, tpm_grace_s=grace_s
        )
        assert outcome.answer is True and not waiting.stuck
    finally:
        answered.set()
        waiting.end()


def test_a_provider_that_has_no_tpm_is_told_why(
    wired: TpmBench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wired.equip()
    with monkeypatch.context() as patched:
        patched.setattr(provider, "_found", [])
        with pytest.raises(RetryLater, match=f"no TPM at {tmp_path}/tpmrm0: No such file") as refused:
            provider.load(f"device:{tmp_path}/tpmrm0")
        assert refused.value.code == "tpm.absent"
    text = wired.settings.read_text()
    wired.settings.write_text(text.replace(wired.tpm.tap.tcti, "swtpm:host=127.0.0.1,port=9"))
    (said,) = OtherProcess(wired.tpm, wired.settings, "dps").said()
    assert "tpm.absent: no TPM answers OpenSSL's provider tpm2 at" in said and "tcti:IO failure" in said, said
    wired.settings.write_text(text)


def test_a_tpm_that_this_user_may_not_open_is_one_sentence_for_tls_as_for_all_else(
    wired: TpmBench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wired.equip()
    node, really = tmp_path / "tpmrm0", os.open
    node.touch(0o600)
    wired.settings.write_text(wired.settings.read_text().replace(wired.tpm.tap.tcti, f"device:{node}"))

    def denied(path: Any, *of: Any, **more: Any) -> int:
        if path == str(node):  # root may open all
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return really(path, *of, **more)

    with monkeypatch.context() as patched:
        patched.setattr(provider, "_found", [])
        patched.setattr(os, "open", denied)
        error = wired.command("provision", status=5)["error"]
        assert error["code"] == "tpm.denied" and f" may not open {node} (" in error["message"], error
        assert "\n" not in error["message"] and "provider" not in error["message"]
        answer = hub_connection(wired.loaded()).connect(as_device())
        assert isinstance(answer, NoReply) and answer.reason.startswith("tpm.denied: "), answer


def test_dps_is_not_asked_while_the_tpm_has_no_room_and_is_told_so(wired: TpmBench) -> None:
    wired.equip()
    wired.tpm.tap.refuse(0x902, command="Load", times=1000)
    asked = len(wired.emulator.log)
    connection = dps_connection(wired.loaded())
    reply = connection.request("PUT", "/register", b"{}", None)
    connection.close()
    assert isinstance(reply, NoReply) and not reply.request_sent
    error = no_reply_error(reply)
    assert error.code == "tpm.memory" and error.message.startswith("the TPM refused load with 0x902"), error
    assert len(wired.emulator.log) == asked


def test_a_certificate_for_another_key_is_named_and_no_tpm_is_blamed(wired: TpmBench) -> None:
    wired.equip()
    other = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, DEVICE)])
    wired.certificate_file.write_text(certified(name, other.public_key(), name, other))
    error = wired.command("provision", status=6)["error"]
    assert error["code"] == "config.invalid" and "the key is not the one of the certificate" in error["message"], error


@pytest.mark.parametrize("taken", [False, True])
def test_a_storage_root_key_that_somebody_removed_is_found_or_made_again(wired: TpmBench, taken: bool) -> None:
    wired.equip()
    wired.command("provision")
    key = wired.key_file.read_bytes()
    wired.tpm.swtpm.evict(0x81000001)
    if taken:
        wired.tpm.swtpm.persist_primary(OWNER, TEMPLATE, 0x81000001)
    connection = hub_connection(wired.loaded())
    try:
        for _ in range(2):
            assert connection.connect(as_device()) == ConnAck(0, False)
    finally:
        connection.close()
        wired.tpm.swtpm.evict(0x81000001)
        if taken:
            wired.tpm.swtpm.evict(0x81000002)
    assert wired.key_file.read_bytes() == key


def test_another_tpm_or_another_place_of_the_key_takes_a_restart(wired: TpmBench) -> None:
    wired.equip()
    wired.command("provision")
    connection = hub_connection(wired.loaded())
    try:
        in_tpm = wired.key_file.read_bytes()
        other = ec.generate_private_key(ec.SECP256R1())
        in_file = other.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        wired.key_file.write_bytes(in_file)
        answer = connection.connect(as_device())
        assert isinstance(answer, NoReply) and "restart the service" in answer.reason, answer
        chain = wired.certificate_file.read_text()
        name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, DEVICE)])
        wired.certificate_file.write_text(certified(name, other.public_key(), name, other))
        by_file = hub_connection(wired.loaded())
        wired.certificate_file.write_text(chain)
        wired.key_file.write_bytes(in_tpm)
        answer = by_file.connect(as_device())
        assert isinstance(answer, NoReply) and "restart the service" in answer.reason, answer
        by_file.close()
        text = wired.settings.read_text()
        wired.settings.write_text(text.replace(wired.tpm.tap.tcti, "swtpm:host=127.0.0.1,port=9"))
        with pytest.raises(AskOperator, match="it changes with a restart only"):
            hub_connection(wired.loaded())
        wired.settings.write_text(text)
        assert connection.connect(as_device()) == ConnAck(0, False)
    finally:
        connection.close()


# Where the key lies is decided once.


def test_a_key_stays_where_it_lies(wired: TpmBench) -> None:
    wired.command("enroll", "--x509", "--key-in-file")
    in_file = wired.key_file.read_bytes()
    assert b"BEGIN PRIVATE KEY" in in_file and wired.tpm.names() == []
    assert not wired.command("enroll", "--x509")["keyMade"] and wired.tpm.names() == []
    assert wired.key_file.read_bytes() == in_file
    wired.key_file.unlink()
    wired.command("enroll", "--x509")
    in_tpm = wired.key_file.read_bytes()
    error = wired.command("enroll", "--x509", "--key-in-file", status=6)["error"]
    assert "expected a key in the clear, or none yet" in error["message"]
    assert wired.key_file.read_bytes() == in_tpm
    assert wired.command("enroll", "--key-in-file", status=2)["error"]["code"] == "agent.usage"


def test_a_device_without_the_provider_or_with_a_tpm_for_one_alone_is_told_before_a_key_is_made(
    wired: TpmBench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = wired.settings.read_text()
    before = wired.checked("settings", status=6)
    assert "'dps-agent enroll --x509' makes the key" in before["detail"], before
    for tcti, said in (
        (f"device:{tmp_path}/tpm0", "which only one can have open"),
        ("spi:/dev/spidev0.0", "which only one can have open"),
        ("spi-ltt2go:", "which only one can have open"),
        ("i2c-ftdi:", "which only one can have open"),
        ("spidev:/dev/spidev0.0", "which only one can have open"),
        ("pcap:device:/dev/tpmrm0", "which only one can have open"),
        ("device", "which only one can have open"),
        ("libtpms:", "which only one can have open"),
    ):
        backend = "wire" if tcti.startswith(("device:", "spi:")) else "esys"
        settings = text.replace('backend = "wire"', f'backend = "{backend}"')
        wired.settings.write_text(settings.replace(wired.tpm.tap.tcti, tcti))
        error = wired.command("enroll", "--x509", status=5)["error"]
        assert error["code"] == "tpm.tls_provider" and said in error["message"], error
    wired.settings.write_text(
        text.replace('backend = "wire"', 'backend = "simulator"').replace(
            wired.tpm.tap.tcti, str(tmp_path / "simulated")
        )
    )
    assert "with whose keys TLS cannot sign" in wired.command("enroll", "--x509", status=6)["error"]["message"]
    wired.settings.write_text(text)
    with monkeypatch.context() as patched:
        patched.setattr(provider._Openssl, "_version_of", lambda self, loaded: "1.1.1")
        patched.setattr(provider, "_found", [])
        error = wired.command("enroll", "--x509", status=5)["error"]
        assert "in version 1.2 or newer; came 1.1.1" in error["message"] and error["code"] == "tpm.tls_provider", error
    with monkeypatch.context() as patched:
        patched.setenv("OPENSSL_MODULES", str(tmp_path))
        error = wired.command("enroll", "--x509", status=5)["error"]
        assert f"provider tpm2 is missing, {tmp_path}/tpm2.so" in error["message"], error
        assert "install" not in error["message"] and "install tpm2-openssl 1.2" in error["remedy"], error
    assert not wired.key_file.exists()
    wired.equip()
    with monkeypatch.context() as patched:
        patched.setenv("OPENSSL_MODULES", str(tmp_path))
        assert wired.command("provision", status=5)["error"]["code"] == "tpm.tls_provider"
        found = {one["id"]: one for one in wired.command("check", status=5)["checks"]}
        assert found["device-key"]["code"] == "tpm.tls_provider"
        assert (found["dps-tls"]["result"], found["dps-answers"]["result"]) == ("ok", "skipped"), found


def test_every_check_of_a_good_device_is_good(bench: TpmBench) -> None:
    bench.equip(days=(-1, 20))
    bench.command("provision")
    found = {one["id"]: one for one in bench.command("check")["checks"]}
    assert found["settings"]["result"] == "ok", found["settings"]
    for name in ("tpm-srk", "device-key", "device-certificate", "record-seal", "dps-answers", "dps-tls", "hub-mqtt"):
        assert found[name]["result"] == "ok", found[name]
    assert "has made the device's own key" in found["device-key"]["detail"]


def test_verbs_that_show_no_certificate_do_not_ask_the_tpm(wired: TpmBench) -> None:
    wired.equip()
    wired.command("provision")
    wired.tpm.names()
    wired.command("status")
    wired.command("enroll")
    assert wired.tpm.names() == []


def test_the_python_of_the_distribution_will_do(wired: TpmBench, monkeypatch: pytest.MonkeyPatch) -> None:
    beside = wired.folder / "ossl-modules"  # the distribution's `cryptography` has use for one of its modules
    beside.mkdir()
    for folder in (Path(wired.tpm.modules), *Path("/usr/lib").glob("*/ossl-modules")):
        for module in folder.glob("*.so"):
            if not (beside / module.name).exists():
                (beside / module.name).symlink_to(module)
    monkeypatch.setenv("OPENSSL_MODULES", str(beside))

    def by_system(*words: str) -> Document:
        command = [SYSTEM_PYTHON, "-I", "-B", "-c", PROGRAM, "--json", "--config", str(wired.settings), *words]
        ended = subprocess.run(command, check=False, cwd=CHECKOUT, capture_output=True, text=True, timeout=120)
        assert ended.returncode == 0, ended.stdout + ended.stderr
        document: Document = json.loads(ended.stdout)
        return document

    source = wired.folder / "issued.pem"
    source.write_text(LINE.pem + issued(by_system("enroll", "--x509")["certificateRequest"], LINE))
    by_system("install-certificate", str(source))
    assert not by_system("provision")["alreadyProvisioned"]
    assert by_system("provision")["alreadyProvisioned"], "the seal is verified"


# The key's file, and its signatures.


def test_a_damaged_file_is_refused_with_a_sentence(bench: TpmBench) -> None:
    bench.request()
    good = bench.key_file.read_bytes()
    key = from_pem(good)
    assert to_pem(key) == good and repr(open_device_key(bench)) == "TpmPrivateKey()"
    other = key._replace(srk_handle=0x40000001)
    for content, said in (
        (good[:200], "expected one TSS2 PRIVATE KEY in PEM"),
        (good.replace(b"\nM", b"\n", 1), "damaged"),
        (to_pem(other), "expected a key under a persistent handle; came one under 0x40000001"),
        (to_pem(key._replace(public=key.public[:40])), "public area"),
        (to_pem(key._replace(public=key.public.replace(b"\x00\x04\x04\x72", b"\x00\x04\x00\x72"))), "signing key"),
        (to_pem(key._replace(private=key.private[:-1])), "private area"),
        (to_pem(key._replace(public=with_bit_changed(key.public, -40))), "damaged"),  # x
        (to_pem(key._replace(public=with_bit_changed(key.public, -1))), "damaged"),  # y
    ):
        bench.key_file.write_bytes(content)
        with pytest.raises(ConfigurationError) as refused:
            open_device_key(bench)
        assert "device_key_file: expected a key that 'dps-agent enroll --x509' had a TPM make" in str(refused.value)
        assert said in str(refused.value), (said, str(refused.value))
    bench.key_file.write_bytes(good)


def test_whatever_stands_in_a_key_s_file_it_is_a_key_or_a_value_error(wired: TpmBench) -> None:
    wired.request()
    good = wired.key_file.read_bytes()
    der = binascii.a2b_base64(b"".join(good.splitlines()[1:-1]))
    head, tail = good.splitlines()[0], good.splitlines()[-1]
    refused = 0
    for at in range(len(der)):
        for altered in (
            der[:at],
            der[:at] + bytes([der[at] ^ 0xFF]) + der[at + 1 :],
            der[:at] + b"\x84" + der[at + 1 :],
        ):
            try:
                from_pem(b"\n".join([head, binascii.b2a_base64(altered), tail]))
            except ValueError:
                refused += 1
    assert refused > len(der)


def with_bit_changed(content: bytes, place: int) -> bytes:
    changed = bytearray(content)
    changed[place] ^= 1
    return bytes(changed)


def open_device_key(bench: TpmBench) -> Any:
    return private_key(bench.loaded(), open_tpm)


def test_what_the_bus_altered_is_no_signature(bench: TpmBench) -> None:
    bench.equip()
    signer = open_device(bench.loaded())
    message = b"\x00dps-agent record 1{}"
    seal = signer.sign(b"", message)
    assert len(seal) == 64 and signer.verify(message, seal) and not signer.verify(message + b" ", seal)
    bench.tpm.tap.alter(command="Sign", place=-10, times=9)
    with pytest.raises(RetryLater, match="came another") as refused:
        signer.sign(b"", message)
    assert refused.value.code == "tpm.bus_altered"
    bench.tpm.tap.forget()
    assert signer.verify(message, signer.sign(b"", message))
    signer.release()


@pytest.mark.parametrize("number", [0, 5, 37, 129, 255])
def test_a_refusal_is_known_whatever_number_openssl_gave_the_provider(
    number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    openssl = provider._openssl()
    said = [(9, "no start line", "Expecting: ANY PRIVATE KEY"), (number, "cannot load key", "2306 tpm:warn(2.0): full")]
    monkeypatch.setattr(openssl, "_errors", lambda: said)
    with pytest.raises(RetryLater) as refused:
        openssl.key(b"no key")
    assert refused.value.code == "tpm.memory"
    del said[1]
    with pytest.raises(ValueError, match="no start line"):
        openssl.key(b"no key")
