"""Devices whose certificate DPS issues, in the virtual world: DER without cryptography, and lives that are cut.

Beside `support.lives`, for CPython alone: on boards there is none of this.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

from dps_agent.assignment import decode, seal_message
from dps_agent.attestation import shown_to_hub
from dps_agent.effects import Commit, Http
from dps_agent.issued import chains_in, joined, name_of
from dps_agent.settings import ISSUED
from dps_hal.contracts import CERTIFICATE, IDENTITY, PROGRESS
from dps_hal.platform import from_json, sha256, to_base64
from support import lives
from support.world import DEVICE, CertificateKey, FakeDps, FakeTpm, without

if TYPE_CHECKING:
    from dps_agent.assignment import Assignment
    from dps_agent.effects import Reply

KEY = bytes(range(64, 96))  # the device's own, of which a request and certificates show the digest
OTHER_KEY = bytes(range(96, 128))
DAY_S = 86_400
OLD_CHAIN_FIRST, IDENTITY_FIRST = "drops-the-old-chain", "stores-the-identity-first"  # faulty agents


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


ROOT, ISSUING = certificate("root", "root", b"r"), certificate("line 4", "root", b"i")


class IssuingTpm(FakeTpm):
    """A TPM, beside which the key of the issued certificate lies in a file: that seals."""

    def __init__(self, seed: int = 1, key: bytes = KEY) -> None:
        super().__init__(seed)
        self.certificates_key = key
        self.own = CertificateKey(key)
        self.requests: list[str] = []

    def request(self, registration_id: str) -> bytes:
        self.requests.append(registration_id)
        return request(registration_id or DEVICE, self.certificates_key)

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

    def work(self, http: Http) -> Reply:
        """See `FakeDps.work`."""
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
        chain = certificate(DEVICE, "line 4", tpm.certificates_key, len(self.chains) + 1) + ISSUING
        self.chains.append(chain)
        return chain


class IssuedWorld(lives.FlashWorld):
    """The life of such a device: its chains lie in a record of their own."""

    certificate = ISSUED
    records = (IDENTITY, PROGRESS, CERTIFICATE)

    def begin(self) -> None:
        """See `FlashWorld.begin`."""
        self.tpm = IssuingTpm()
        self.dps = self.service = IssuingDps(self.tpm)
        self._held_back: Commit | None = None

    def answer(self, effect: Any) -> Any:
        """See `FlashWorld.answer`; a faulty agent does something else."""
        if isinstance(effect, Commit) and effect.record == CERTIFICATE:
            if self.fault == OLD_CHAIN_FIRST:
                effect = Commit(CERTIFICATE, joined(chains_in(effect.payload)[-1:]))
            elif self.fault == IDENTITY_FIRST:
                self._held_back = effect
                return None
        answer = super().answer(effect)
        if isinstance(effect, Commit) and effect.record == IDENTITY and self._held_back:
            held_back, self._held_back = self._held_back, None
            super().answer(held_back)
        return answer

    def key_of(self, payload: bytes) -> bytes:
        """The chain that an identity names, if this device has sealed it."""
        assignment, text, seal = decode(payload)
        tpm: Any = self.tpm
        service: Any = self.service
        assert tpm.verify(seal_message(text), seal)
        chains: list[bytes] = [chain for chain in service.chains if name_of(chain) == assignment.chain]
        return chains[0]

    def serves(self, pair: tuple[str, bytes]) -> bool:
        """See `FlashWorld.serves`."""
        return pair in self.service.issued and pair[0] == self.service.accepted[0]

    def accepts(self, assignment: Assignment | None) -> bool:
        """See `FlashWorld.accepts`."""
        return assignment is not None and self.serves((assignment.assigned_hub, self.run(shown_to_hub(assignment))))


BY_ISSUANCE = lives.Way(
    "lives-by-issuance",
    IssuedWorld,
    (
        (lives.CUT, "few", lives.WHOLE_LIVES),
        (lives.CUT, "32", lives.WHOLE_LIVES[:3] + lives.FAILING_LIVES),
        (lives.CUT_TWICE, "few", lives.WHOLE_LIVES[:1]),
        (lives.KILL_THEN_CUT, "few", lives.WHOLE_LIVES[1:2]),
    ),
    ("naive", "in-place", "single-slot", lives.EVICTS, OLD_CHAIN_FIRST, IDENTITY_FIRST),
)
