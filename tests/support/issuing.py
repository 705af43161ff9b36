"""Devices whose certificate DPS issues, in the virtual world: DER without cryptography, and lives that are cut.

Beside `support.lives`, for CPython alone: on boards there is none of this.
"""

from __future__ import annotations

import re
import struct
from typing import TYPE_CHECKING, Any

from dps_agent.assignment import decode, seal_message
from dps_agent.attestation import shown_to_hub
from dps_agent.effects import Commit, Http, ReadRequest
from dps_agent.hub_effects import Arrived, Publish, Subscribe
from dps_agent.issued import chains_in, joined, name_of
from dps_agent.renewal import Renewal
from dps_agent.settings import ISSUED
from dps_hal.contracts import CERTIFICATE, IDENTITY, PROGRESS
from dps_hal.der import field_of
from dps_hal.platform import from_base64, from_json, sha256, to_base64, to_json
from support import lives
from support.cloud.fake_hub import FakeHub
from support.world import DEVICE, CertificateKey, FakeDps, FakeTpm, without

if TYPE_CHECKING:
    from dps_agent.assignment import Assignment
    from dps_agent.effects import Reply

KEY = bytes(range(64, 96))  # the device's own, of which a request and certificates show the digest
OTHER_KEY = bytes(range(96, 128))
DAY_S = 86_400
OLD_CHAIN_FIRST, IDENTITY_FIRST, KEY_LAST = (  # faulty agents
    "drops-the-old-chain",
    "stores-the-identity-first",
    "stores-the-key-last",
)


def der(tag: int, *parts: bytes) -> bytes:
    """One element."""
    content = b"".join(parts)
    size = bytes([len(content)]) if len(content) < 128 else b"\x82" + struct.pack(">H", len(content))
    return bytes([tag]) + size + content


def name(text: str) -> bytes:
    """A distinguished name with a CN."""
    return der(0x30, der(0x31, der(0x30, b"\x06\x03\x55\x04\x03", der(0x0C, text.encode()))))


def public_key(key: bytes) -> bytes:
    """A subjectPublicKeyInfo of no algorithm, which shows a key's digest."""
    return der(0x30, der(0x30), der(0x03, b"\0" + sha256(key)))


def request(common_name: str, key: bytes = KEY) -> bytes:
    """A request (PKCS #10)."""
    signed = der(0x30, der(0x02, b"\0"), name(common_name), public_key(key), der(0xA0))
    return der(0x30, signed, der(0x30), der(0x03, b"\0"))


def certificate(
    subject: str, issuer: str, key: bytes = KEY, serial: int = 1, dates: tuple[str, str] = ("270115", "270214")
) -> bytes:
    """A certificate, valid from and to midnight of the dates."""
    validity = [der(0x17, f"{date}000000Z".encode()) for date in dates]
    fields = name(issuer), der(0x30, *validity), name(subject), public_key(key)
    head = der(0xA0, der(0x02, b"\2")), der(0x02, serial.to_bytes(4)), der(0x30)
    return der(0x30, der(0x30, *head, *fields), der(0x30), der(0x03, b"\0"))


def issuers_by_name(certificates: tuple[bytes, ...]) -> tuple[int, ...]:
    """For each certificate the place of the one above it; these have no signatures."""
    issuers, subjects = [
        [each[slice(*field_of(each, field))] for each in certificates] for field in ("issuer", "subject")
    ]
    return tuple(subjects.index(each) if each in subjects else -1 for each in issuers)


ROOT, ISSUING = certificate("root", "root", b"r"), certificate("line 4", "root", b"i")


class IssuingTpm(FakeTpm):
    """A TPM, beside which the key of the issued certificate lies in a file: that seals. An empty one is none."""

    def __init__(self, seed: int = 1, key: bytes = KEY) -> None:
        super().__init__(seed)
        self.give(key)
        self.requests: list[str] = []

    def give(self, key: bytes) -> None:
        """Another key."""
        self.certificates_key = key
        self.own = CertificateKey(key)

    def request(self, registration_id: str) -> bytes:
        self.requests.append(registration_id)
        return self.certificates_key and request(registration_id or DEVICE, self.certificates_key)

    def issuers(self, certificates: tuple[bytes, ...]) -> tuple[int, ...]:
        return issuers_by_name(certificates)

    def sign(self, wrapped_key: bytes, message: bytes) -> bytes:
        return super().sign(wrapped_key, message) if wrapped_key else self.own.sign(b"", message)

    def verify(self, message: bytes, signature: bytes) -> bool:
        return self.own.verify(message, signature)


class IssuingDps(lives.KeyedDps):
    """A DPS that issues a certificate with each registration; its hubs take all that it has issued for them."""

    def __init__(self, tpm: Any) -> None:
        super().__init__(tpm)
        self.chains: list[bytes] = []
        self.root_first = False
        self.dates = ("270115", "270214")  # of what is issued

    def work(self, http: Http) -> Reply:
        """See `FakeDps.work`."""
        if http.path == "/":
            return super().work(http)  # for its Date
        asks = "csr" in (from_json(http.body) if http.body else {})
        assert asks == (http.method == "PUT"), "a request for a certificate goes with each PUT, and with nothing else"
        assert "api-version=2025-07-01-preview" in http.path
        return super().work(http)

    def copy(self, tpm: Any) -> IssuingDps:
        """See `KeyedDps.copy`."""
        other: Any = super().copy(tpm)
        other.chains = list(self.chains)
        return other  # type: ignore[no-any-return]

    def assigned(self) -> dict[str, Any]:
        """See `FakeDps.assigned`."""
        sent = [self.hub_key[: -len(ISSUING)], ISSUING, ROOT]
        listed = [to_base64(each) for each in (reversed(sent) if self.root_first else sent)]
        return {**without(FakeDps.assigned(self), "tpm"), "issuedCertificateChain": listed}

    def _new_key(self, label: bytes) -> bytes:
        if label != b"hub":
            return super()._new_key(label)
        tpm: Any = self.tpm
        chain = certificate(DEVICE, "line 4", tpm.certificates_key, len(self.chains) + 1, self.dates) + ISSUING
        self.chains.append(chain)
        return chain


class RenewingHub(FakeHub):
    """A hub that takes what DPS and itself have issued, and has the topics of credentials.

    `said` are (status, body) for the next requests instead of 202 and the certificate; None: it says nothing.
    """

    def __init__(self, name: str, chains: list[bytes]) -> None:
        super().__init__(name)
        self.chains = chains
        self.asked: list[tuple[float, str, dict[str, Any]]] = []  # when, the request's id, its body
        self.said: list[tuple[Any, dict[str, Any]] | None] = []
        self.issue_after_s = 1.0
        self.held: list[tuple[str, bytes]] = []  # certificates that are not delivered: topic, body
        self.life = ("270202", "270306")  # of what it issues
        self.bare = False  # the body is the list alone
        self.early: list[Arrived] = []  # what the next connection brings ahead of all else

    def connect(self, effect: Any, now_s: float, utc_s: int) -> Any:
        """See `FakeHub.connect`."""
        answer = super().connect(effect, now_s, utc_s)
        if self.serves(now_s):
            self.events += [(now_s, event) for event in self.early]
            self.early = []
        return answer

    def publish(self, effect: Publish, packet_id: int, now_s: float) -> None:
        """See `FakeHub.publish`."""
        if not effect.topic.startswith("$iothub/credentials/POST/") or not self.serves(now_s):
            super().publish(effect, packet_id, now_s)
            return
        assert "$iothub/credentials/res/#" in self.filters and not effect.qos
        if [topic for topic in self.lacks if topic in effect.topic]:
            self.drop(now_s)
            return
        rid, asked = effect.topic.partition("$rid=")[2], from_json(effect.payload)
        assert re.fullmatch("[A-Za-z0-9][A-Za-z0-9-]{2,34}[A-Za-z0-9]", rid) and asked["id"] == DEVICE
        assert from_base64(asked["csr"]) == request(DEVICE) and set(asked) <= {"id", "csr", "replace"}
        self.asked.append((now_s, rid, asked))
        said = self.said.pop(0) if self.said else (202, {"correlationId": "c"})
        if said is None:
            return
        self.answer(now_s, said[0], rid, said[1])
        if said[0] == 202:
            leaf = certificate(DEVICE, "line 4", KEY, 100 + len(self.chains), self.life)
            self.chains.append(leaf + ISSUING)
            listed = [to_base64(each) for each in (leaf, ISSUING, ROOT)]
            body = listed if self.bare else {"correlationId": "c", "certificates": listed}
            self.held.append((rid, to_json(body).encode()))
            self.events.append((now_s + self.issue_after_s, self._certificate()))

    def subscribe(self, effect: Subscribe, packet_id: int, now_s: float) -> None:
        """See `FakeHub.subscribe`; what was not delivered comes then."""
        super().subscribe(effect, packet_id, now_s)
        if self.held and self.serves(now_s) and "credentials" in effect.filters[0][0]:
            self.events.append((now_s + 0.2, self._certificate()))

    def take_event(self, now_s: float) -> Any:
        """See `FakeHub.take_event`."""
        event = super().take_event(now_s)
        if isinstance(event, Arrived) and "credentials/res/200" in event.topic:
            self.held = [each for each in self.held if each[0] not in event.topic]
        return event

    def answer(self, now_s: float, status: Any, rid: str, body: dict[str, Any]) -> None:
        """Says something to a request."""
        self.send(now_s + 0.1, f"$iothub/credentials/res/{status}/?$rid={rid}", to_json(body).encode())

    def _certificate(self) -> Arrived:
        rid, body = self.held[-1]
        return Arrived(f"$iothub/credentials/res/200/?$rid={rid}", body, 0)


class IssuedWorld(lives.FlashWorld):
    """The life of such a device: its chains have a record of their own, and its key a file that a cut leaves whole."""

    certificate = ISSUED
    records = (IDENTITY, PROGRESS, CERTIFICATE)
    tpm: IssuingTpm

    def begin(self) -> None:
        """See `FlashWorld.begin`."""
        self.tpm = IssuingTpm(key=b"")
        self.in_file = b""  # the key that a cut leaves
        self.were_in_file: list[bytes] = []
        self.made = 0  # keys, also those that no file had
        self.lost = b""  # the key that the TPM takes no more
        self.dps = self.service = IssuingDps(self.tpm)
        self._held_back: Commit | None = None

    def inherit(self, before: lives.FlashWorld) -> None:
        """See `FlashWorld.inherit`."""
        super().inherit(before)
        assert isinstance(before, IssuedWorld)
        self.in_file, self.made, self.lost = before.in_file, before.made, before.lost
        self.were_in_file = list(before.were_in_file)
        self.tpm.give(self.in_file)

    def forget(self) -> None:
        """See `FlashWorld.forget`."""
        self.supply.spend()
        self.in_file = b""
        self.tpm.give(b"")

    def answer(self, effect: Any) -> Any:
        """See `FlashWorld.answer`; a faulty agent does something else."""
        if isinstance(effect, ReadRequest) and effect.registration_id:
            self._have_key()
        if isinstance(effect, Commit) and effect.record == CERTIFICATE:
            if self.fault == OLD_CHAIN_FIRST:
                effect = Commit(CERTIFICATE, joined(chains_in(effect.payload)[-1:]))
            elif self.fault == IDENTITY_FIRST:
                self._held_back = effect
                return None
        answer = super().answer(effect)
        if isinstance(effect, Commit) and effect.record == IDENTITY:
            if self._held_back:
                held_back, self._held_back = self._held_back, None
                super().answer(held_back)
            self._write_key()
        return answer

    def _have_key(self) -> None:
        """Makes another key where there is none that is good."""
        if self.tpm.certificates_key in (b"", self.lost):
            self.made += 1
            self.tpm.give(sha256(b"key %d" % self.made))
            if self.fault != KEY_LAST:
                self._write_key()

    def _write_key(self) -> None:
        """Writes the key where the file has another one: whole or not at all."""
        if self.in_file != self.tpm.certificates_key:
            self.supply.spend()
            self.in_file = self.tpm.certificates_key
            self.were_in_file.append(self.in_file)
            self.supply.spend()

    def key_of(self, payload: bytes) -> bytes:
        """The chain that an identity names, if a key that the file had has sealed it; else none."""
        assignment, text, seal = decode(payload)
        if not any(CertificateKey(key).verify(seal_message(text), seal) for key in self.were_in_file):
            return b""
        service: Any = self.service
        chains: list[bytes] = [chain for chain in service.chains if name_of(chain) == assignment.chain]
        return chains[0]

    def serves(self, pair: tuple[str, bytes]) -> bool:
        """See `FlashWorld.serves`."""
        return pair in self.service.issued and pair[0] == self.service.accepted[0]

    def accepts(self, assignment: Assignment | None) -> bool:
        """See `FlashWorld.accepts`."""
        if assignment is None or self.tpm.certificates_key == self.lost:
            return False
        return self.serves((assignment.assigned_hub, self.run(shown_to_hub(assignment))[0]))


def renew(world: lives.FlashWorld) -> None:
    """The hub sends another certificate."""
    service, tpm = world.service, world.tpm
    assert isinstance(service, IssuingDps) and isinstance(tpm, IssuingTpm)
    stored = world.slot_store.load(IDENTITY)
    assert stored is not None
    assignment = decode(stored.payload)[0]
    renewal = Renewal(assignment, world.run(shown_to_hub(assignment))[0])
    renewal.state = "accepted"
    leaf = certificate(DEVICE, "line 4", tpm.certificates_key, 77, ("270115", "270306"))
    service.chains.append(leaf + ISSUING)
    service.issued.append((assignment.assigned_hub, leaf + ISSUING))
    body = to_json({"certificates": [to_base64(leaf), to_base64(ISSUING)]}).encode()
    topic = f"$iothub/credentials/res/200/?$rid={renewal.request_id}"
    assert world.run(renewal.take(Arrived(topic, body, 0))) and renewal.assignment is not assignment


def lose_key(world: lives.FlashWorld) -> None:
    """The TPM takes the key no more, as after TPM2_Clear, and the hub's handshake has said so."""
    assert isinstance(world, IssuedWorld)
    world.lost = world.in_file
    world.lived(force=True)


LIVES = (
    *lives.WHOLE_LIVES,
    lives.Life("renewal", lives.twice, renew),
    lives.Life("lost-key", lives.twice, lose_key, lives.NEW, True),
)
BY_ISSUANCE = lives.Way(
    "lives-by-issuance",
    IssuedWorld,
    (
        (lives.CUT, "few", LIVES),
        (lives.CUT, "32", LIVES[:3] + LIVES[-2:] + lives.FAILING_LIVES),
        (lives.CUT_TWICE, "few", LIVES[:1] + LIVES[-1:]),
        (lives.KILL_THEN_CUT, "few", lives.WHOLE_LIVES[1:2]),
    ),
    ("naive", "in-place", "single-slot", lives.EVICTS, OLD_CHAIN_FIRST, IDENTITY_FIRST, KEY_LAST),
)
