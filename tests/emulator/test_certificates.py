"""Devices with a certificate: what DPS and hub accept in place of a token, and what they refuse."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.client
import json
import random
import socket
import ssl
from pathlib import Path
from typing import Any

import pytest
import trustme
from cryptography import x509
from OpenSSL import SSL

from dps_emulator import mqtt
from dps_emulator.attestation import Certificates
from dps_emulator.certificates import certificate_info, common_name
from dps_emulator.cli import main
from dps_emulator.enrollments import Enrollment, EnrollmentError, enrollment_from_json, read_enrollments
from dps_emulator.service import DpsService, Request, Response, Settings
from dps_emulator.state import open_store
from dps_emulator.tls_stream import streams
from emulator.device_side import Client, Device, lookup_path, operation_path, register_path
from support.cloud.chains import CA, NO_CA, SIGNS_CERTIFICATES, SIGNS_MESSAGES, UTC_TIME, Party, party, written
from support.cloud.emulator import HUB, EmulatorInThread, EmulatorProcess
from support.cloud.memory import PlainRegistrations

ROOT = party("root", None, [*CA, SIGNS_CERTIFICATES])
INTERMEDIATE = party("intermediate", ROOT, [*CA, SIGNS_CERTIFICATES])
LEAF = party("press-07", INTERMEDIATE, NO_CA)
OWN = party("press-07", None, NO_CA)
PEM = "-----BEGIN CERTIFICATE-----"
PAST = ((UTC_TIME, b"200101000000Z"), (UTC_TIME, b"210101000000Z"))
EXPIRED = party("press-07", INTERMEDIATE, NO_CA, dates=PAST)
NO_AUTHORITY = party("intermediate", ROOT, NO_CA)
VERSION_3, VERSION_8 = bytes.fromhex("a003020102"), bytes.fromhex("a003020107")  # RFC 5280, 4.1
OF_VERSION_8 = OWN._replace(certificate=OWN.certificate.replace(VERSION_3, VERSION_8, 1))
ONE = Enrollment("press-07", Certificates(OWN.certificate))


def group(name: str, *authorities: Party, enabled: bool = True) -> Enrollment:
    certificates = Certificates(*(each.certificate for each in authorities))
    return Enrollment(name, certificates, is_group=True, enabled=enabled)


BY_ROOT, BY_INTERMEDIATE = group("by-root", ROOT), group("by-intermediate", INTERMEDIATE)
NO_SIGNER = party("intermediate", ROOT, [*CA, SIGNS_MESSAGES])
SHORT = party("short", ROOT, [(x509.BasicConstraints(True, 0), True), SIGNS_CERTIFICATES])
LONG = party("long", SHORT, [*CA, SIGNS_CERTIFICATES])
BY_SHORT = group("by-short", SHORT)


class Cloud:
    """A service with enrolments, at the time at which the certificates are valid."""

    def __init__(self, *enrollments: Enrollment, **settings: Any) -> None:
        self.now = certificate_now()
        chosen = Settings(client_certificates=True, **settings)
        self.service = DpsService(chosen, {}, PlainRegistrations(), random.Random(1).randbytes)
        for enrollment in enrollments:
            self.service.enroll(enrollment)

    def send(self, method: str, path: str, *chain: Party, body: object = None) -> Response:
        shown = tuple(each.certificate for each in chain)
        encoded = json.dumps(body or {}).encode()
        request = Request(method, path, "api-version=2021-10-01", {}, encoded, client_chain=shown)
        return self.service.answer(request, self.now)

    def provision(self, *chain: Party, name: str = "press-07") -> Any:
        """A whole registration; the finished state, which a lookup has as well."""
        registered = self.send("PUT", register_path(name), *chain)
        assert registered.status == 202, registered.body
        path = operation_path(name, json.loads(registered.body)["operationId"])
        state = json.loads(self.send("GET", path, *chain).body)["registrationState"]
        assert json.loads(self.send("POST", lookup_path(name), *chain).body) == state
        return state


def certificate_now() -> float:
    """A time at which all that are not dated are valid."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=ROOT.pem)
    (found,) = context.get_ca_certs()
    return ssl.cert_time_to_seconds(str(found["notAfter"])) - 3600


def assert_invalid(answer: Response, says: str) -> None:
    details = json.loads(answer.body)
    assert (answer.status, details["errorCode"]) == (401, 401002) and says in details["message"], details


def test_a_device_is_known_by_its_own_certificate() -> None:
    cloud = Cloud(ONE, BY_ROOT)
    state = cloud.provision(OWN)
    assert (state["status"], state["assignedHub"], state["deviceId"]) == ("assigned", HUB, "press-07")
    assert "symmetricKey" not in state and "tpm" not in state and set(state["x509"]) == {"certificateInfo"}
    found = state["x509"]["certificateInfo"]
    assert found["subjectName"] == found["issuerName"] == "CN=press-07" and found["version"] == 3
    assert found["sha1Thumbprint"] == hashlib.sha1(OWN.certificate).hexdigest().upper()
    assert found["sha256Thumbprint"] == hashlib.sha256(OWN.certificate).hexdigest().upper()
    assert found["notBeforeUtc"] < found["notAfterUtc"] and int(found["serialNumber"], 16) > 0
    credential = cloud.service.credential_at(HUB, "press-07")
    assert credential is not None and credential.thumbprints == (found["sha256Thumbprint"],) and credential.keys == ()


@pytest.mark.parametrize(
    ("enrolled", "chain", "decides"),
    [
        ([BY_ROOT], [LEAF, INTERMEDIATE], BY_ROOT),
        ([BY_ROOT], [LEAF, INTERMEDIATE, ROOT], BY_ROOT),
        ([BY_ROOT], [LEAF, ROOT, INTERMEDIATE], BY_ROOT),
        ([BY_INTERMEDIATE], [LEAF], BY_INTERMEDIATE),
        ([BY_ROOT, BY_INTERMEDIATE], [LEAF, INTERMEDIATE], BY_INTERMEDIATE),
        ([BY_SHORT], [party("press-07", SHORT, NO_CA)], BY_SHORT),
        ([BY_ROOT], [party("press-07", SHORT, NO_CA), SHORT], BY_ROOT),
    ],
)
def test_the_first_ca_above_a_leaf_that_is_enrolled_vouches_for_it(
    enrolled: list[Enrollment], chain: list[Party], decides: Enrollment
) -> None:
    cloud = Cloud(*enrolled)
    state = cloud.provision(*chain)
    assert state["x509"]["enrollmentGroupId"] == decides.registration_id and state["deviceId"] == "press-07"
    assert decides.certificates is not None
    authority = decides.certificates.primary
    assert state["x509"]["signingCertificateInfo"] == certificate_info(authority)
    credential = cloud.service.credential_at(HUB, "press-07")
    assert credential is not None and credential.authorities == (authority,) and not credential.thumbprints


@pytest.mark.parametrize(
    ("enrolled", "chain", "name", "says"),
    [
        ([ONE], [LEAF, INTERMEDIATE], "press-07", "it is not the one that is enrolled"),
        ([ONE, BY_ROOT], [LEAF, INTERMEDIATE], "press-07", "it is not the one that is enrolled"),
        ([ONE], [], "press-07", "takes a client certificate, and none came"),
        ([BY_ROOT], [OWN], "press-07", "its issuer 'CN=press-07' is not enrolled"),
        ([BY_ROOT], [LEAF], "press-07", "its issuer 'CN=intermediate' is not enrolled, and its certificate did not"),
        ([BY_ROOT], [LEAF, party("intermediate", ROOT, CA)], "press-07", "its issuer 'CN=intermediate'"),
        ([BY_ROOT], [party("press-07", NO_AUTHORITY, NO_CA), NO_AUTHORITY], "press-07", "its issuer 'CN=intermediate'"),
        ([BY_ROOT], [party("press-07", party("root", None, CA), NO_CA)], "press-07", "its issuer 'CN=root'"),
        ([BY_ROOT], [party("press-07", NO_SIGNER, NO_CA), NO_SIGNER], "press-07", "key usage has no keyCertSign"),
        ([BY_SHORT], [party("press-07", LONG, NO_CA), LONG], "press-07", "its path length is 0"),
        ([BY_ROOT], [party("press-07", LONG, NO_CA), LONG, SHORT], "press-07", "its path length is 0"),
        ([BY_ROOT], [EXPIRED, INTERMEDIATE], "press-07", "'CN=press-07' has expired at 2021-01-01T00:00:00Z"),
        ([BY_ROOT], [LEAF, INTERMEDIATE], "press-08", "its CN 'press-07' is not the registration ID"),
        ([BY_ROOT], [LEAF, INTERMEDIATE], "Press-07", "its CN 'press-07' is not the registration ID"),
        ([Enrollment("press-08", Certificates(OWN.certificate))], [OWN], "press-08", "its CN 'press-07' is not"),
        ([], [LEAF, INTERMEDIATE], "press-07", "its issuer"),
    ],
)
def test_what_nobody_vouches_for_is_refused(
    enrolled: list[Enrollment], chain: list[Party], name: str, says: str
) -> None:
    assert_invalid(Cloud(*enrolled).send("PUT", register_path(name), *chain), says)


def test_certificates_count_from_their_first_moment_to_their_last() -> None:
    cloud = Cloud(BY_ROOT)
    for later_s, says in ((-3 * 86_400, "is not valid before"), (2 * 86_400, "has expired")):
        cloud.now = certificate_now() + later_s
        assert_invalid(cloud.send("PUT", register_path("press-07"), LEAF, INTERMEDIATE), says)


@pytest.mark.parametrize("enrolled", [[Enrollment("press-07", ONE.attestation, enabled=False)],
                                      [group("off", INTERMEDIATE, enabled=False), BY_ROOT]])  # fmt: skip
def test_the_enrolment_that_is_found_first_decides_also_when_it_is_disabled(enrolled: list[Enrollment]) -> None:
    chain = [LEAF, INTERMEDIATE] if len(enrolled) == 2 else [OWN]
    answer = Cloud(*enrolled).send("PUT", register_path("press-07"), *chain)
    assert (answer.status, json.loads(answer.body)["errorCode"]) == (403, 403001)
    state = Cloud(*enrolled, refuse_by="operation").provision(*chain)
    assert (state["status"], state["errorCode"]) == ("disabled", 403001)


def test_who_shows_a_certificate_may_attest_by_a_tpm() -> None:
    device = Device.of_the_vectors()
    cloud = Cloud(Enrollment(device.registration_id, device.ek_public), BY_ROOT)
    body = {"tpm": device.attestation()}
    answer = cloud.send("PUT", register_path(device.registration_id), LEAF, INTERMEDIATE, body=body)
    assert answer.status == 401 and b"authenticationKey" in answer.body


def test_records_of_certificates_are_read_in_pem_and_in_base64() -> None:
    encoded = base64.b64encode(OWN.certificate).decode()
    for text in (OWN.pem, f"Subject: x\n{OWN.pem}", encoded, encoded[:40] + "\n" + encoded[40:]):
        client = {"clientCertificates": {"primary": {"certificate": text}, "secondary": None}}
        record = {"registrationId": "press-07", "attestation": {"type": "x509", "x509": client}}
        assert enrollment_from_json(record) == ONE
    both = group("both", ROOT, INTERMEDIATE)
    assert enrollment_from_json(both.to_json()) == both and enrollment_from_json(ONE.to_json()) == ONE


@pytest.mark.parametrize(
    ("name", "attestation", "says"),
    [
        ("enrollmentGroupId", {}, "x509.signingCertificates is missing"),
        ("enrollmentGroupId", {"caReferences": {"primary": "ca"}}, "is missing; a reference to a CA is of no use here"),
        ("enrollmentGroupId", {"clientCertificates": {}}, "x509.signingCertificates is missing"),
        ("registrationId", {"signingCertificates": {}}, "x509.clientCertificates is missing"),
        ("registrationId", {"clientCertificates": {}}, "primary.certificate is missing, or no text"),
        ("registrationId", {"clientCertificates": {"primary": {"certificate": "AAAA"}}}, "is no certificate"),
        ("registrationId", {"clientCertificates": {"primary": {"certificate": f"{PEM}\nAAAA"}}}, "is no certificate"),
        ("enrollmentGroupId", {"signingCertificates": {"primary": {"certificate": OWN.pem}}}, "is no CA's"),
        ("enrollmentGroupId", {"signingCertificates": {"primary": {"certificate": NO_SIGNER.pem}}}, "is no CA's"),
    ],
)  # fmt: skip
def test_a_record_without_a_usable_certificate_says_why(name: str, attestation: dict[str, Any], says: str) -> None:
    record = {name: "press-07", "attestation": {"type": "x509", "x509": attestation}}
    (odd,) = read_enrollments(json.dumps(record)).odd
    assert says in odd.why


@pytest.mark.parametrize("chain", [[LEAF, INTERMEDIATE], [INTERMEDIATE, LEAF]], ids=["own", "above"])
def test_a_name_that_is_no_text_is_refused_as_a_certificate_that_cannot_be_read(chain: list[Party]) -> None:
    garbled = [each._replace(certificate=each.certificate.replace(b"press-07", b"press-\xff\xfe")) for each in chain]
    assert_invalid(Cloud(BY_ROOT).send("PUT", register_path("press-07"), *garbled, body={}), "it can't be read")
    text = base64.b64encode(next(new.certificate for new, old in zip(garbled, chain, strict=True) if old is LEAF))
    record = {"registrationId": "a", "attestation": {"x509": {"clientCertificates": {"primary": {"certificate": ""}}}}}
    record["attestation"]["x509"]["clientCertificates"]["primary"]["certificate"] = text.decode()  # type: ignore[index]
    with pytest.raises(EnrollmentError, match="is no certificate"):
        enrollment_from_json(record)
    assert common_name(OF_VERSION_8.certificate) == ""


def test_a_certificate_that_only_openssl_can_read_ends_its_own_connection(
    emulator: EmulatorInThread, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    odd = written(tmp_path / "odd.pem", OF_VERSION_8)
    for port in (emulator.port, emulator.hub_port):
        with (
            Client(port, emulator.ca_file, certificate=odd) as client,
            pytest.raises((ConnectionError, http.client.HTTPException, ssl.SSLError)),
        ):
            client.call("PUT", register_path("press-07"), {})
        with pytest.raises((IndexError, ConnectionError, ssl.SSLError)):
            connack(emulator, odd, "press-07", port)
    with Client(emulator.port, emulator.ca_file) as client:
        assert client.call("PUT", register_path("press-07"), {})[0] == 404
    assert emulator.notices == [] and caplog.text == ""


@pytest.fixture(scope="module")
def emulator() -> Any:
    settings = Settings(retry_after_s=0, client_certificates=True)
    with EmulatorInThread(settings, [BY_ROOT, Enrollment("own-07", Certificates(ROOT.certificate))]) as emulator:
        yield emulator


def connack(emulator: EmulatorInThread | EmulatorProcess, certificate: Path | None, device_id: str, port: int) -> int:
    """The hub's answer to a CONNECT without a password."""
    context = ssl.create_default_context(cafile=str(emulator.ca_file))
    if certificate:
        context.load_cert_chain(certificate)
    text = bytes([0, 4]) + b"MQTT" + bytes([4, 0x82, 0, 60])
    for content in (device_id.encode(), f"{HUB}/{device_id}/?api-version=2021-04-12".encode()):
        text += len(content).to_bytes(2) + content
    with (
        socket.create_connection(("127.0.0.1", port), 60) as plain,
        context.wrap_socket(plain, server_hostname=HUB) as client,
    ):
        client.sendall(bytes([0x10, len(text)]) + text)
        return client.recv(4)[3]


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_device_registers_and_connects_by_its_certificate_alone(
    emulator: EmulatorInThread, tmp_path: Path, version: ssl.TLSVersion
) -> None:
    chain = written(tmp_path / "chain.pem", LEAF, INTERMEDIATE)
    context = ssl.create_default_context(cafile=str(emulator.ca_file))
    context.load_cert_chain(chain)
    context.maximum_version = version
    with Client(emulator.port, emulator.ca_file, certificate=chain) as client:
        status, _, registered = client.call("PUT", register_path("press-07"), {"registrationId": "press-07"})
        assert status == 202
        status, _, polled = client.call("GET", operation_path("press-07", registered["operationId"]))
        assert status == 200 and polled["registrationState"]["x509"]["enrollmentGroupId"] == "by-root"
    for port in (emulator.port, emulator.hub_port):  # either port takes all
        assert connack(emulator, chain, "press-07", port) == mqtt.ACCEPTED
        assert connack(emulator, written(tmp_path / "leaf.pem", LEAF), "press-08", port) == mqtt.NOT_AUTHORIZED
        assert connack(emulator, written(tmp_path / "own.pem", OWN), "press-07", port) == mqtt.NOT_AUTHORIZED
        assert connack(emulator, None, "press-07", port) == mqtt.NOT_AUTHORIZED
    with Client(emulator.hub_port, emulator.ca_file, certificate=written(tmp_path / "o.pem", OWN)) as client:
        status, _, refused = client.call("PUT", register_path("press-07"), {})
        assert (status, refused["errorCode"]) == (401, 401002)


def test_a_hub_keeps_to_what_its_device_has(emulator: EmulatorInThread, tmp_path: Path) -> None:
    device = emulator.add_device("press-09")
    leaf = written(tmp_path / "leaf.pem", party("press-09", ROOT, NO_CA))
    assert connack(emulator, leaf, "press-09", emulator.hub_port) == mqtt.NOT_AUTHORIZED
    (line,) = [line for line in emulator.hub_log if line.device_id == "press-09" and line.event == "refused"]
    assert line.detail == "'press-09' has no certificate at this hub" and device.key


def test_a_hub_tells_ids_in_upper_case_from_those_in_lower_case(emulator: EmulatorInThread, tmp_path: Path) -> None:
    chain = written(tmp_path / "chain.pem", party("Press-11", INTERMEDIATE, NO_CA), INTERMEDIATE)
    other = written(tmp_path / "other.pem", party("press-11", INTERMEDIATE, NO_CA), INTERMEDIATE)
    with Client(emulator.port, emulator.ca_file, certificate=chain) as client:
        assert client.call("PUT", register_path("Press-11"), {"registrationId": "Press-11"})[0] == 202
    assert connack(emulator, other, "press-11", emulator.hub_port) == mqtt.NOT_AUTHORIZED
    assert connack(emulator, chain, "Press-11", emulator.hub_port) == mqtt.ACCEPTED


def test_a_session_that_is_resumed_has_the_chain_of_its_first_handshake(
    emulator: EmulatorInThread, tmp_path: Path
) -> None:
    context = ssl.create_default_context(cafile=str(emulator.ca_file))
    context.load_cert_chain(written(tmp_path / "chain.pem", LEAF, INTERMEDIATE))
    session = None
    for _ in range(2):
        with (
            socket.create_connection(("127.0.0.1", emulator.port), 60) as plain,
            context.wrap_socket(plain, server_hostname="localhost", session=session) as client,
        ):
            assert client.session_reused == (session is not None)
            client.sendall(f"PUT {register_path('press-07')}?api-version=1 HTTP/1.1\r\nHost: x\r\n".encode())
            client.sendall(b"Content-Length: 2\r\n\r\n{}")
            assert client.recv(12) == b"HTTP/1.1 202"
            session = client.session


def test_without_the_option_no_certificate_is_asked_for_and_the_refusal_names_it() -> None:
    with EmulatorInThread(Settings(), [ONE]) as emulator, Client(emulator.port, emulator.ca_file) as client:
        status, _, refused = client.call("PUT", register_path("press-07"), {})
    assert status == 401 and "'serve --client-certificates' asks for one" in refused["message"]


def test_the_servers_key_is_in_no_file_that_others_may_read(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[int] = []
    use = SSL.Context.use_privatekey_file

    def used(context: SSL.Context, path: str) -> None:
        modes.append(Path(path).stat().st_mode & 0o777)
        use(context, path)

    monkeypatch.setattr(SSL.Context, "use_privatekey_file", used)
    streams(trustme.CA(), ["x"], asks_clients=True)
    assert modes == [0o600]


@pytest.mark.parametrize("asks_clients", [False, True])
def test_both_ways_of_tls_carry_large_answers_and_say_goodbye(asks_clients: bool) -> None:
    authority = trustme.CA()
    server = streams(authority, ["x"], asks_clients=asks_clients)()
    context = ssl.create_default_context(cadata=authority.cert_pem.bytes().decode())
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = context.wrap_bio(back, there, server_hostname="x")
    for _ in range(4):
        try:
            client.do_handshake()
        except ssl.SSLWantReadError:
            server.feed(memoryview(there.read()))
            back.write(server.to_send())
    assert not server.is_open or server.server_name == "x"
    server.feed(memoryview(there.read()))
    assert server.is_open and server.client_chain == () and server.server_name == "x"
    large = bytes(range(256)) * 1000
    server.write(large)
    back.write(server.to_send())
    came = b""
    while len(came) < len(large):
        came += client.read(65536)
    assert came == large
    client.write(large)
    assert server.feed(memoryview(there.read())) == large
    server.say_goodbye()
    back.write(server.to_send())
    assert client.read(1) == b""
    with pytest.raises(ssl.SSLError):
        server.feed(memoryview(b"\x17\x03\x03\x00\x20" + bytes(32)))


def test_a_certificate_is_enrolled_by_a_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = ["--state-dir", str(tmp_path / "state")]
    leaf, root = written(tmp_path / "leaf.pem", OWN), written(tmp_path / "root.pem", ROOT)
    assert main(["enroll", "press-07", "--certificate", str(leaf), *folder]) == 0
    assert main(["enroll", "by-root", "--group", "--certificate", str(root), *folder]) == 0
    assert main(["enrollments", *folder]) == 0
    said = capsys.readouterr().out
    assert "press-07: enabled, certificate, has not registered yet" in said
    assert "by-root: group, enabled, certificate" in said and "PRIVATE" not in said
    with contextlib.closing(open_store(tmp_path / "state")) as store:
        assert store.enrollments["press-07"] == ONE and store.groups["by-root"] == BY_ROOT
    for words in (["press-07"], ["Press-07"], ["by-root", "--group"]):
        capsys.readouterr()
        assert main(["enroll", *words, *folder]) == 1
        said = capsys.readouterr()
        assert f"'{words[0]}' is there: --replace puts another in its place" in said.err and said.out == ""
    with contextlib.closing(open_store(tmp_path / "state")) as store:
        assert store.enrollments["press-07"] == ONE and store.groups["by-root"] == BY_ROOT
    assert main(["enroll", "press-07", "--replace", *folder]) == 0
    with contextlib.closing(open_store(tmp_path / "state")) as store:
        assert store.enrollments["press-07"].keys and store.groups["by-root"] == BY_ROOT
    assert main(["enroll", "press-08", "--certificate", str(leaf), "--key-file", "x", *folder]) == 2
    leaf.write_text("x")
    assert main(["enroll", "press-08", "--certificate", str(leaf), *folder]) == 2
    assert "primary.certificate is no certificate" in capsys.readouterr().err


def test_dps_and_hubs_may_share_one_port(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    flags = ["--client-certificates", "--port", port, "--hub-port", port]
    with EmulatorProcess(*flags) as emulator:
        with contextlib.closing(open_store(emulator.state_dir)) as store:
            store.enroll([ONE])
        own = written(tmp_path / "own.pem", OWN)
        assert emulator.port == emulator.hub_port == int(port)
        with Client(emulator.port, emulator.ca_file, certificate=own) as client:
            assert client.call("PUT", register_path("press-07"), {})[0] == 202
            assert client.call("POST", lookup_path("press-07"), {})[2]["status"] == "assigned"
        assert connack(emulator, own, "press-07", emulator.hub_port) == mqtt.ACCEPTED
