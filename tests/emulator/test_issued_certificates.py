"""Certificates that the service issues for a device's request: at a registration, at its hub, and over its topics."""

from __future__ import annotations

import base64
import hashlib
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding

from dps_emulator import mqtt
from dps_emulator.attestation import Certificates, SymmetricKeys
from dps_emulator.cli import main
from dps_emulator.dps_mqtt import ANSWERS, DpsLink
from dps_emulator.enrollments import Enrollment, EnrollmentError, enrollment_from_json
from dps_emulator.faults import FaultScriptError, fault_script
from dps_emulator.hub import HubContext, Hubs, Link
from dps_emulator.issuing import Issuer, request_of, require_request
from dps_emulator.registrations import Registration
from dps_emulator.service import DpsService, Request, Response, Settings
from dps_emulator.state import issuing_root
from dps_emulator.store import Store
from dps_emulator.topics import CREDENTIAL_ANSWERS
from emulator.device_side import Device, lookup_path, operation_path, register_path, rsa_key, signed_token, vector
from support.cloud.chains import CA, NO_CA, SIGNS_CERTIFICATES, party
from support.cloud.memory import PlainRegistrations

NAME, HUB = "press-07", "emulator.azure-devices.net"
NOW = 1_790_000_000.0
KEY = bytes(range(32))
RESOURCE = f"0ne00000000%2Fregistrations%2F{NAME}"
PREVIEW, FORMER = "2025-07-01-preview", "2021-10-01"
HUB_API = "2025-08-01-preview"
BY_KEY = Enrollment(NAME, SymmetricKeys(KEY, KEY), credential_policy="line-4")
ISSUE = "$iothub/credentials/POST/issueCertificate/?$rid="
DEVICE_KEY = ec.generate_private_key(ec.SECP256R1())
DAY_S = 86_400


def requested(name: str = NAME, key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey = DEVICE_KEY) -> str:
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    made = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())
    return base64.b64encode(made.public_bytes(Encoding.DER)).decode()


def with_a_bad_signature() -> str:
    der = bytearray(base64.b64decode(requested()))
    der[-1] ^= 1
    return base64.b64encode(bytes(der)).decode()


CSR = requested()


class Cloud:
    """DPS and its hubs in memory; a device with a symmetric key, and a clock that the test moves."""

    def __init__(self, *enrollments: Enrollment, issuer: Issuer | None = None, **settings: Any) -> None:
        self.now = NOW
        self.events: list[str] = []
        self.store = Store()
        chosen = Settings(retry_after_s=None, client_certificates=True, **settings)
        numbers = random.Random(1).randbytes
        self.service = DpsService(chosen, {}, PlainRegistrations(), numbers, {}, issuer)
        for enrollment in enrollments or (BY_KEY,):
            self.service.enroll(enrollment)
        context = HubContext(
            self.store.messages, numbers, 300, lambda line: self.events.append(line.event),
            tier=chosen.tier, issue_after_s=chosen.issue_after_s,
        )  # fmt: skip
        self.hubs = Hubs(self.service, self.store.devices, context)

    def ask(self, method: str, path: str, body: object = None, version: str = PREVIEW, **more: Any) -> Response:
        token = signed_token(KEY, RESOURCE, int(self.now) + 3600)
        headers = {} if "client_chain" in more else {"authorization": token}
        encoded = json.dumps(body or {}).encode()
        request = Request(method, path, f"api-version={version}", headers, encoded, **more)
        return self.service.answer(request, self.now)

    def register(self, csr: object = CSR, version: str = PREVIEW, **more: Any) -> Any:
        """The state as the operation has it in the end."""
        body = {} if csr is None else {"csr": csr}
        answer = self.ask("PUT", register_path(NAME), body, version, **more)
        assert answer.status == 202, answer.body
        path = operation_path(NAME, json.loads(answer.body)["operationId"])
        return json.loads(self.ask("GET", path, None, version, **more).body)["registrationState"]

    def connected(
        self, *chain: bytes, api: str = HUB_API, clean: bool = True, token: str = "", name: str = NAME
    ) -> Wire:
        """A connection to the hub that shows the chain."""
        user_name = f"{HUB}/{name}/?api-version={api}"
        asked = mqtt.Connect(mqtt.LEVEL, name, user_name, token.encode() or None, clean, 60)
        wire = Wire(self)
        wire.link = self.hubs.connect(wire, asked, HUB, self.now, chain)
        return wire


class Wire:
    """A device's connection: what it says, and what came back, taken apart."""

    def __init__(self, cloud: Cloud) -> None:
        self.cloud = cloud
        self.link: Link | None = None
        self.is_dropped = False
        self._came: list[bytes] = []

    def send(self, packet: bytes) -> None:
        self._came.append(packet)

    def drop(self) -> None:
        self.is_dropped = True

    @property
    def is_in(self) -> bool:
        return self.link is not None

    def say(self, packet: mqtt.Packet) -> None:
        assert self.link is not None
        self.link.received(packet, self.cloud.now)

    def subscribe(self, qos: int = 0) -> int:
        self._came.clear()
        self.say(mqtt.Subscribe(1, ((CREDENTIAL_ANSWERS, qos),)))
        return self._came[0][4]

    def issue(self, rid: str, body: object) -> None:
        payload = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.say(mqtt.Publish(ISSUE + rid, payload, 0))

    def took(self) -> list[tuple[str, Any]]:
        """Topic, up to its request id, and content of what has come since the last time."""
        came, self._came = b"".join(each for each in self._came if each[0] >> 4 == 3), []
        publications = [each for each in mqtt.PacketStream().feed(came) if isinstance(each, mqtt.Publish)]
        self.packet_ids = [each.packet_id for each in publications]
        head = "$iothub/credentials/res/"
        return [(each.topic.removeprefix(head), json.loads(each.payload)) for each in publications]

    def refused(self, rid: str, body: object) -> tuple[str, int]:
        """Status and error code of the only answer."""
        self.issue(rid, body)
        ((topic, content),) = self.took()
        assert set(content) == {"errorCode", "message", "trackingId", "timestampUtc", "info"}
        return topic, content["errorCode"]


def certificates(encoded: list[str]) -> list[x509.Certificate]:
    return [x509.load_der_x509_certificate(base64.b64decode(each, validate=True)) for each in encoded]


def ders(state: Any) -> list[bytes]:
    return [base64.b64decode(each) for each in state["issuedCertificateChain"]]


# At a registration.


def test_the_chain_leads_from_the_device_s_key_over_the_policy_s_ca_to_the_root() -> None:
    cloud = Cloud(issued_life_s=7 * DAY_S)
    state = cloud.register()
    leaf, issuing, root = certificates(state["issuedCertificateChain"])
    assert leaf.public_key() == DEVICE_KEY.public_key() and leaf.subject.rfc4514_string() == f"CN={NAME}"
    assert issuing.subject.rfc4514_string() == "CN=line-4" and root.subject == root.issuer == issuing.issuer
    leaf.verify_directly_issued_by(issuing)
    issuing.verify_directly_issued_by(root)
    root.verify_directly_issued_by(root)
    for authority in (issuing, root):
        key = authority.public_key()
        assert isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP384R1)
        assert isinstance(authority.signature_hash_algorithm, hashes.SHA384)
    assert (leaf.not_valid_after_utc - leaf.not_valid_before_utc).days == 7
    assert leaf.not_valid_before_utc.timestamp() == NOW


def test_a_lookup_has_no_chain_and_takes_no_request() -> None:
    cloud = Cloud()
    cloud.register()
    answer = cloud.ask("POST", lookup_path(NAME), {})
    assert answer.status == 200 and "issuedCertificateChain" not in json.loads(answer.body)
    refused = cloud.ask("POST", lookup_path(NAME), {"csr": CSR})
    assert (refused.status, json.loads(refused.body)["errorCode"]) == (400, 400001)


@pytest.mark.parametrize("version", [FORMER, "2021-11-01-preview", "2019-03-31"])
def test_versions_before_it_pass_a_request_over(version: str) -> None:
    cloud = Cloud()
    assert "issuedCertificateChain" not in cloud.register("no base64", version=version)
    assert cloud.service.hub_key(HUB, NAME) == KEY


@pytest.mark.parametrize("version", [PREVIEW, "2026-04-01", "2026-11-01", "2026-11-02-preview"])
def test_later_versions_have_it(version: str) -> None:
    assert len(Cloud().register(version=version)["issuedCertificateChain"]) == 3


@pytest.mark.parametrize(
    ("csr", "says"),
    [
        (requested("press-08"), "csr has CN 'press-08', expected 'press-07'"),
        (requested("Press-07"), "csr has CN 'Press-07', expected 'press-07'"),
        (with_a_bad_signature(), "csr is not signed by the key that it names"),
        ("----", "csr is not base64 of DER in one line"),
        (f"{CSR[:40]}\n{CSR[40:]}", "csr is not base64 of DER in one line"),
        ("AAAA", "csr is no PKCS #10 that can be read"),
        (base64.b64encode(b"-----BEGIN CERTIFICATE REQUEST-----").decode(), "csr is no PKCS #10 that can be read"),
        ("A" * 8196, "csr has 8196 characters"),
        ("", "csr is missing, or no text"),
        (7, "csr is missing, or no text"),
    ],
)
def test_a_request_that_cannot_be_taken_says_why(csr: object, says: str) -> None:
    answer = Cloud().ask("PUT", register_path(NAME), {"csr": csr})
    details = json.loads(answer.body)
    assert (answer.status, details["errorCode"]) == (400, 400001) and details["message"].startswith(says), details


def test_the_vector_of_a_request_by_an_rsa_key_is_taken() -> None:
    known, inputs = vector("certificate_request"), vector("activation")["inputs"]
    key = rsa_key(int(inputs["srk_p"], 16), int(inputs["srk_q"], 16))
    assert known["csr"] == requested(known["cn"], key)
    der = base64.b64decode(known["csr"])
    assert (len(der), hashlib.sha256(der).hexdigest()) == (609, known["sha256"])
    leaf = Issuer(random.Random(1).randbytes).chain("line-4", request_of(known["csr"]), DAY_S, NOW)[0]
    issued = x509.load_der_x509_certificate(leaf)
    assert issued.public_key() == key.public_key() and issued.subject.rfc4514_string() == "CN=vector-device"
    require_request(der, known["cn"])


def test_an_enrolment_without_a_policy_gets_no_certificate() -> None:
    answer = Cloud(replace(BY_KEY, credential_policy="")).ask("PUT", register_path(NAME), {"csr": CSR})
    assert answer.status == 400 and "names no credentialPolicyName" in json.loads(answer.body)["message"]
    cloud = Cloud(assign_after_s=5)
    operation = json.loads(cloud.ask("PUT", register_path(NAME), {"csr": CSR}).body)["operationId"]
    cloud.service.enroll(replace(BY_KEY, credential_policy=""))
    cloud.now += 5
    state = json.loads(cloud.ask("GET", operation_path(NAME, operation)).body)["registrationState"]
    assert (state["status"], state["errorCode"]) == ("failed", 400001)


def test_the_same_request_again_gets_another_certificate_of_the_same_key() -> None:
    cloud = Cloud()
    first, second = (certificates(cloud.register()["issuedCertificateChain"]) for _ in range(2))
    assert first[0].serial_number != second[0].serial_number and first[1:] == second[1:]
    assert first[0].public_key() == second[0].public_key()


def test_a_poll_has_the_chain_for_as_long_as_the_operation_is_known() -> None:
    cloud = Cloud(assign_after_s=5)
    operation = json.loads(cloud.ask("PUT", register_path(NAME), {"csr": CSR}).body)["operationId"]
    pending = cloud.ask("GET", operation_path(NAME, operation))
    assert pending.status == 202 and b"issuedCertificateChain" not in pending.body
    cloud.now += 5
    first, second = (cloud.ask("GET", operation_path(NAME, operation)).body for _ in range(2))
    assert first == second and b"issuedCertificateChain" in first
    registration = cloud.service.registrations[NAME]
    assert Registration.from_json(json.loads(json.dumps(registration.to_json()))) == registration


def test_every_way_of_attestation_takes_a_request() -> None:
    authority = party("factory", None, [*CA, SIGNS_CERTIFICATES])
    leaf = party(NAME, authority, NO_CA)
    group = Enrollment("by-ca", Certificates(authority.certificate), is_group=True, credential_policy="line-4")
    cloud = Cloud(group)
    cloud.now = x509.load_der_x509_certificate(leaf.certificate).not_valid_before_utc.timestamp() + 60
    shown = (leaf.certificate,)
    state = cloud.register(client_chain=shown)
    assert state["x509"]["enrollmentGroupId"] == "by-ca" and len(state["issuedCertificateChain"]) == 3
    device = Device.of_the_vectors()
    cloud = Cloud(Enrollment(device.registration_id, device.ek_public, credential_policy="line-4"))
    name = device.registration_id
    body = {"tpm": device.attestation(), "csr": requested(name)}

    def ask(method: str, path: str, headers: dict[str, str]) -> Any:
        request = Request(method, path, f"api-version={PREVIEW}", headers, json.dumps(body).encode())
        return json.loads(cloud.service.answer(request, NOW).body)

    challenge = ask("PUT", register_path(name), {})
    key = device.activate(challenge["authenticationKey"])
    headers = {"authorization": key.token(f"0ne00000000%2Fregistrations%2F{name}", int(NOW) + 60)}
    operation = ask("PUT", register_path(name), headers)["operationId"]
    state = ask("GET", operation_path(name, operation), headers)["registrationState"]
    assert len(state["issuedCertificateChain"]) == 3 and "tpm" not in state
    assert cloud.service.hub_key(HUB, name) is None


def test_a_device_that_asks_for_no_certificate_has_its_key_at_the_hub() -> None:
    cloud = Cloud()
    cloud.register()
    assert cloud.service.hub_key(HUB, NAME) is None
    assert "issuedCertificateChain" not in cloud.register(None)
    assert cloud.service.hub_key(HUB, NAME) == KEY


def test_where_the_hub_stays_the_certificate_counts_all_the_same() -> None:
    cloud = Cloud()
    cloud.register(None)
    cloud.service.enroll(replace(BY_KEY, update_hub_assignment=False))
    assert cloud.connected(*ders(cloud.register())).is_in


def test_over_mqtt_it_is_the_same() -> None:
    cloud = Cloud()

    class Sent:
        came = b""

        def send(self, packet: bytes) -> None:
            self.came += packet

        def drop(self) -> None:
            raise AssertionError("the connection ended")

    wire = Sent()
    user_name = f"0ne00000000/registrations/{NAME}/api-version={PREVIEW}"
    password = signed_token(KEY, RESOURCE, int(NOW) + 3600).encode()
    link = DpsLink(wire, mqtt.Connect(mqtt.LEVEL, NAME, user_name, password, True, 60), lambda event, detail: None)
    link.received(mqtt.Subscribe(1, ((ANSWERS, 0),)))

    def asked(topic: str, body: bytes) -> Any:
        wire.came = b""
        found = link.received(mqtt.Publish(topic, body, 0))
        assert found is not None
        link.answered(found, cloud.service.answer(found.request, NOW))
        (answer,) = mqtt.PacketStream().feed(wire.came)
        assert isinstance(answer, mqtt.Publish)
        return json.loads(answer.payload)

    register = "$dps/registrations/PUT/iotdps-register/?$rid=1"
    assert asked(register, json.dumps({"csr": requested("other")}).encode())["errorCode"] == 400001
    operation = asked(register, json.dumps({"registrationId": NAME, "csr": CSR}).encode())["operationId"]
    state = asked(f"$dps/registrations/GET/iotdps-get-operationstatus/?$rid=2&operationId={operation}", b" ")
    assert len(state["registrationState"]["issuedCertificateChain"]) == 3


def test_the_root_is_kept_in_the_state_folder_and_what_it_has_issued_counts_after_a_restart(tmp_path: Path) -> None:
    cloud = Cloud(issuer=Issuer(random.Random(3).randbytes, issuing_root(tmp_path)))
    chain = ders(cloud.register())
    kept = tmp_path / "issuing-ca.pem"
    assert kept.stat().st_mode & 0o777 == 0o600
    again = Cloud(issuer=Issuer(random.Random(4).randbytes, issuing_root(tmp_path)))
    renewed = ders(again.register())
    assert renewed[2] == chain[2] and again.connected(*chain).is_in, "by the same issuing key"
    assert not Cloud().connected(*chain).is_in


def test_a_policy_is_enrolled_by_a_command_and_a_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["enroll", NAME, "--credential-policy", "line-4", "--state-dir", str(tmp_path / "state")]
    assert main(words) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["credentialPolicyName"] == "line-4"
    enrolled = enrollment_from_json(record)
    assert enrolled.credential_policy == "line-4" and enrollment_from_json(enrolled.to_json()) == enrolled
    for wrong in (7, "a" * 65, "a/b"):
        with pytest.raises(EnrollmentError, match="credentialPolicyName is not a name"):
            enrollment_from_json({**record, "credentialPolicyName": wrong})
    assert main([*words[:3], "a/b", *words[4:]]) == 2


# At a hub.


def test_the_hub_takes_what_was_issued_and_nothing_else() -> None:
    cloud = Cloud(issued_life_s=DAY_S)
    chain = ders(cloud.register())
    assert cloud.connected(*chain).is_in and cloud.connected(*chain[:2]).is_in and cloud.connected(chain[0]).is_in
    other = Cloud(issued_life_s=DAY_S)
    assert not cloud.connected(*ders(other.register())).is_in, "by another root"
    token = signed_token(KEY, f"{HUB}%2Fdevices%2F{NAME}", int(NOW) + 60, key_name=None)
    assert not cloud.connected(token=token).is_in
    cloud.now += DAY_S + 1
    assert not cloud.connected(*chain).is_in, "it has expired"


# Renewal over the hub's topics.


@pytest.fixture
def renewing() -> tuple[Cloud, Wire]:
    """A device that has connected by its certificate and subscribed."""
    cloud = Cloud(issued_life_s=30 * DAY_S)
    wire = cloud.connected(*ders(cloud.register()))
    assert wire.subscribe() == 0
    cloud.now += 20 * DAY_S
    return cloud, wire


def body(**changes: object) -> dict[str, object]:
    return {"id": NAME, "csr": CSR, **changes}


def test_first_202_then_the_certificate(renewing: tuple[Cloud, Wire]) -> None:
    cloud, wire = renewing
    wire.issue("rid-1", body())
    (accepted, promise), (issued, content) = wire.took()
    assert (accepted, issued) == ("202/?$rid=rid-1", "200/?$rid=rid-1")
    assert set(promise) == {"correlationId", "operationExpires"} and set(content) == {"correlationId", "certificates"}
    assert promise["correlationId"] == content["correlationId"]
    leaf = certificates(content["certificates"])[0]
    assert leaf.not_valid_before_utc.timestamp() == cloud.now and leaf.public_key() == DEVICE_KEY.public_key()
    assert cloud.connected(*(base64.b64decode(each) for each in content["certificates"])).is_in
    assert cloud.hubs.find(NAME).device(NAME).pending is None


def test_the_certificate_may_come_later() -> None:
    cloud = Cloud(issue_after_s=600)
    wire = cloud.connected(*ders(cloud.register()))
    wire.subscribe()
    wire.issue("rid-1", body())
    assert [topic for topic, _ in wire.took()] == ["202/?$rid=rid-1"]
    cloud.hubs.tick(cloud.now + 599)
    assert wire.took() == []
    cloud.hubs.tick(cloud.now + 600)
    assert [topic for topic, _ in wire.took()] == ["200/?$rid=rid-1"]
    cloud.hubs.tick(cloud.now + 601)
    assert wire.took() == [], "once"


@pytest.mark.parametrize("clean", [True, False])
def test_what_was_issued_is_held_until_it_can_be_delivered(clean: bool) -> None:
    cloud = Cloud(issue_after_s=600)
    chain = ders(cloud.register())
    wire = cloud.connected(*chain, clean=clean)
    wire.subscribe()
    wire.issue("rid-1", body())
    wire.say(mqtt.Unsubscribe(2, (CREDENTIAL_ANSWERS,)) if clean else mqtt.Disconnect())
    wire.took()
    cloud.now += 600
    cloud.hubs.tick(cloud.now)
    assert wire.took() == []
    again = cloud.connected(*chain, clean=clean)
    if clean:
        again.subscribe()
    assert [topic for topic, _ in again.took()] == ["200/?$rid=rid-1"]


def test_with_qos_1_it_comes_again_until_it_is_acknowledged(renewing: tuple[Cloud, Wire]) -> None:
    cloud, wire = renewing
    wire.subscribe(qos=1)
    wire.issue("rid-1", body())
    assert [topic for topic, _ in wire.took()] == ["202/?$rid=rid-1", "200/?$rid=rid-1"]
    again = cloud.connected(*ders(cloud.register()))
    again.subscribe(qos=1)
    assert [topic for topic, _ in again.took()] == ["200/?$rid=rid-1"]
    again.say(mqtt.PubAck(again.packet_ids[0]))
    last = cloud.connected(*ders(cloud.register()))
    last.subscribe(qos=1)
    assert last.took() == []


def test_the_same_again_is_the_same_and_another_one_waits_or_replaces(renewing: tuple[Cloud, Wire]) -> None:
    cloud, wire = renewing
    cloud.hubs.context = replace(cloud.hubs.context, issue_after_s=600)
    cloud.hubs.find(NAME).context = cloud.hubs.context
    wire.issue("rid-1", body())
    ((_, first),) = wire.took()
    wire.issue("rid-1", body())
    assert wire.took() == [("202/?$rid=rid-1", first)], "as after a lost connection"
    wire.issue("rid-2", body())
    ((topic, busy),) = wire.took()
    assert (topic, busy["errorCode"]) == ("409/?$rid=rid-2", 409004)
    assert busy["info"] == {"requestId": "rid-1", **first}
    assert wire.refused("rid-3", body(replace="rid-9")) == ("412/?$rid=rid-3", 412001)
    for replaces in ("rid-1", "*"):
        rid = f"rid-{replaces[-1]}-new".replace("*", "any")
        wire.issue(rid, body(csr=requested(), replace=replaces))
        assert [topic for topic, _ in wire.took()] == [f"202/?$rid={rid}"]
        known = cloud.hubs.find(NAME).device(NAME).pending
        assert known is not None and known.request_id == rid
    cloud.hubs.tick(cloud.now + 600)
    assert [topic for topic, _ in wire.took()] == ["200/?$rid=rid-any-new"]
    assert wire.refused("rid-5", body(replace="rid-1")) == ("412/?$rid=rid-5", 412001)


@pytest.mark.parametrize(
    ("asked", "status", "code"),
    [
        (b"", 400, 400004),
        (b"{", 400, 400006),
        (b"[]", 400, 400004),
        (body(csr=""), 400, 400004),
        (body(csr="no base64"), 400, 400004),
        (body(csr="A" * 8196), 400, 400004),
        (body(id=""), 400, 400004),
        (body(id="press-08"), 400, 400004),
        (body(more=1), 400, 400004),
        (body(replace="-a"), 400, 400004),
        (body(replace=7), 400, 400004),
        (body(replace="rid-9"), 412, 412001),
    ],
)
def test_what_is_wrong_with_a_request_has_a_code(
    renewing: tuple[Cloud, Wire], asked: object, status: int, code: int
) -> None:
    _, wire = renewing
    assert wire.refused("rid-1", asked) == (f"{status}/?$rid=rid-1", code)
    wire.issue("rid-2", body())
    assert [topic for topic, _ in wire.took()] == ["202/?$rid=rid-2", "200/?$rid=rid-2"], "nothing is under way"


@pytest.mark.parametrize("csr", ["AAAA", requested("press-08"), with_a_bad_signature()])
def test_base64_of_no_request_is_taken_at_first(renewing: tuple[Cloud, Wire], csr: str) -> None:
    _, wire = renewing
    wire.issue("rid-1", body(csr=csr))
    (accepted, _), (topic, refused) = wire.took()
    assert (accepted, topic, refused["errorCode"]) == ("202/?$rid=rid-1", "400/?$rid=rid-1", 400037)
    assert refused["info"] == {"credentialError": "400000", "credentialMessage": "CSR did not pass verification"}


def test_who_does_not_subscribe_hears_nothing_and_who_names_no_request_is_hung_up_on() -> None:
    cloud = Cloud()
    chain = ders(cloud.register())
    wire = cloud.connected(*chain)
    wire.issue("rid-1", body())
    assert wire.took() == [] and not wire.is_dropped
    wire.subscribe()
    assert [topic for topic, _ in wire.took()] == ["200/?$rid=rid-1"]
    for rid in ("", "abc", "-abcd", "a" * 37, "ab cd"):
        wire = cloud.connected(*chain)
        wire.subscribe()
        wire.issue(rid, body())
        assert wire.is_dropped and wire.took() == []


def test_hubs_of_an_earlier_version_have_no_such_topics(renewing: tuple[Cloud, Wire]) -> None:
    cloud, _ = renewing
    wire = cloud.connected(*ders(cloud.register()), api="2021-04-12")
    assert wire.subscribe() == mqtt.REFUSED_SUBSCRIPTION
    wire.issue("rid-1", body())
    assert wire.is_dropped


def test_only_a_device_of_a_policy_that_shows_its_certificate_gets_another() -> None:
    cloud = Cloud()
    chain = ders(cloud.register())
    cloud.service.enroll(replace(BY_KEY, credential_policy=""))
    wire = cloud.connected(*chain)
    wire.subscribe()
    assert wire.refused("rid-1", body()) == ("404/?$rid=rid-1", 404001)
    cloud.service.enroll(BY_KEY)
    cloud.register(None)
    token = signed_token(KEY, f"{HUB}%2Fdevices%2F{NAME}", int(NOW) + 60, key_name=None)
    wire = cloud.connected(token=token)
    wire.subscribe()
    assert wire.refused("rid-1", body()) == ("403/?$rid=rid-1", 403010)


def test_a_device_whose_id_is_another_than_its_registration_id_is_renewed_by_the_latter() -> None:
    cloud = Cloud(replace(BY_KEY, device_id="line-4-press"))
    wire = cloud.connected(*ders(cloud.register()), name="line-4-press")
    wire.subscribe()
    wire.issue("rid-1", {**body(), "id": "line-4-press"})
    assert [topic for topic, _ in wire.took()] == ["202/?$rid=rid-1", "200/?$rid=rid-1"]
    wire.issue("rid-2", {**body(csr=requested("line-4-press")), "id": "line-4-press"})
    assert [topic for topic, _ in wire.took()] == ["202/?$rid=rid-2", "400/?$rid=rid-2"]


def test_a_disabled_enrolment_has_no_policy() -> None:
    cloud = Cloud()
    wire = cloud.connected(*ders(cloud.register()))
    wire.subscribe()
    cloud.service.enroll(replace(BY_KEY, enabled=False))
    assert wire.refused("rid-1", body()) == ("404/?$rid=rid-1", 404001)


def test_a_request_whose_time_is_over_stands_in_nobodys_way() -> None:
    cloud = Cloud(issue_after_s=100_000)
    wire = cloud.connected(*ders(cloud.register()))
    wire.subscribe()
    wire.issue("rid-1", body())
    cloud.now += 43_199
    wire.issue("rid-2", body())
    cloud.now += 1
    wire.issue("rid-3", body())
    answers = ["202/?$rid=rid-1", "409/?$rid=rid-2", "202/?$rid=rid-3"]
    assert [topic for topic, _ in wire.took()] == answers


def test_a_request_under_way_outlives_the_process(tmp_path: Path) -> None:
    cloud = Cloud(issue_after_s=600)
    wire = cloud.connected(*ders(cloud.register()))
    wire.subscribe()
    wire.issue("rid-1", body())
    device = cloud.hubs.find(NAME).device(NAME)
    read = type(device).from_json(json.loads(json.dumps(device.to_json())))
    assert read.pending == device.pending is not None


def test_a_fault_script_refuses_requests(renewing: tuple[Cloud, Wire]) -> None:
    script = fault_script([{"operation": "issue-certificate", "status": 429}])
    taken = script.take("MQTT", "issue-certificate", NAME)
    assert taken is not None and taken[1].status == 429
    _, wire = renewing
    assert wire.link is not None
    wire.link.refuse(mqtt.Publish(f"{ISSUE}rid-1", b"", 0), 429, NOW)
    ((topic, content),) = wire.took()
    assert (topic, content["errorCode"]) == ("429/?$rid=rid-1", 429001)
    with pytest.raises(FaultScriptError, match="issue-certificate"):
        fault_script([{"operation": "telemetry", "status": 429}])
