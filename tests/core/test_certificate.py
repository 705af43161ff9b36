"""A device with a certificate: registration, record and hub, where the connection shows who it is."""

from dps_agent.assignment import decode, seal_message
from dps_agent.attestation import load_held
from dps_agent.lifecycle import CONNECTED, HALTED, Lifecycle
from dps_agent.registration import register
from dps_agent.settings import SYMMETRIC_KEY, TPM, X509
from dps_agent.signing import hub_token
from dps_hal.contracts import IDENTITY, StoredRecord
from dps_hal.errors import AskOperator, IdentityStale, RetryLater
from dps_hal.platform import from_json
from support.claims import assert_refused, flipped
from support.world import (
    DEVICE,
    HUB,
    CertificateDps,
    CertificateKey,
    World,
    body_of,
    calls,
    error_reply,
    settings,
    with_identity,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

KEY = bytes(range(32))


class CertificateWorld(World):
    """A device with a certificate, and the service that knows it; a TPM is asked for nothing, for there is none."""

    def __init__(self, key: bytes = KEY) -> None:
        World.__init__(self)
        self.dps = CertificateDps(self.tpm)
        self.tpm = CertificateKey(key)  # type: ignore[assignment]
        self.hub.certified = [DEVICE]


def chosen(**changes: "Any") -> "Any":
    return settings(attestation=X509, **changes)


def registered(world: World, **how: "Any") -> "Any":
    return with_identity(world.run(register(chosen(), DEVICE, **how)))


def held(world: World, record: bytes, choice: "Any" = None) -> "Any":
    return world.run(load_held(choice or chosen(), StoredRecord(record, 1, False)))


def test_no_request_has_a_token_or_anything_of_the_certificate() -> None:
    world = CertificateWorld()
    assignment, _ = registered(world)
    assert calls(world) == ["PUT", "LOOKUP", "LOOKUP"]
    assert [http.authorization for http in world.dps.requests] == [None, None, None]
    assert body_of(world.dps.requests[0]) == {"registrationId": DEVICE}
    assert (assignment.assigned_hub, assignment.device_id, assignment.attestation) == (HUB, DEVICE, X509)
    assert (assignment.wrapped_key, assignment.ek_name, assignment.srk_name) == (b"", b"", b"")
    assert world.effects["Sign"] == 1, "the seal alone"
    assert not {"ImportKey", "ReadEndorsementKey", "ConfirmClock"} & set(world.effects)


def test_a_certificate_that_dps_does_not_take_is_an_operator_s_business() -> None:
    world = CertificateWorld()
    world.dps.shown = False  # type: ignore[attr-defined]
    error = assert_refused(lambda: registered(world), AskOperator, "dps.certificate_refused")
    assert "401002" in str(error) and calls(world) == ["PUT"]


def test_want_of_quota_ends_it_at_the_first_request_and_never_behind_it() -> None:
    world = CertificateWorld()
    world.dps.script = [error_reply(429, 429001)]
    assert_refused(lambda: registered(world, queues=False), RetryLater, "dps.throttled")
    assert len(world.dps.requests) == 1
    world = CertificateWorld()
    world.dps.script = [None] + [error_reply(429, 429001)] * 100
    assert registered(world, queues=False)[0].assigned_hub == HUB
    assert world.uptime_s > 900, "longer than the budget, for the quota of the first request would be spent in vain"


def test_the_seal_has_64_bytes_and_each_record_another_one() -> None:
    world = CertificateWorld()
    assignment, record = registered(world)
    _, again = registered(world)
    assert record[-64:] != again[-64:] and from_json(record[:-64])["attestation"] == X509
    assert world.tpm.verify(seal_message(record[:-64]), record[-64:])  # type: ignore[attr-defined]
    assert decode(record)[0] == assignment and held(world, record) == (assignment, "")
    assert "wrappedKey" not in from_json(record[:-64])


def test_one_changed_byte_anywhere_is_refused() -> None:
    world = CertificateWorld()
    _, record = registered(world)
    for place in range(len(record)):
        kept, reason = held(world, flipped(record, place * 8 + place % 8))
        assert kept is None and reason, f"place={place} bit={place % 8}"


def test_a_seal_of_the_other_length_is_none() -> None:
    world = CertificateWorld()
    _, record = registered(world)
    text = record[:-64]
    for wrong in (text + record[-32:], text.replace(b'"x509"', b'"other"') + record[-64:], text + b" " * 64):
        assert_refused(lambda wrong=wrong: decode(wrong), IdentityStale, "record.damaged")


def test_a_record_of_another_key_or_another_way_is_another_identity() -> None:
    world = CertificateWorld()
    _, record = registered(world)
    kept, reason = held(CertificateWorld(bytes(32)), record)
    assert kept is None and "seal" in reason
    for other in (TPM, SYMMETRIC_KEY):
        kept, reason = held(world, record, settings(attestation=other))
        assert kept is None and "attestation 'x509'" in reason, other


def test_a_life_connects_without_a_token_and_boots_without_dps() -> None:
    world = CertificateWorld()
    life = Lifecycle(chosen())
    world.end_at(200000)
    world.run(life.live(once=False, force=False, connect=True))
    assert life.state == CONNECTED and life.connections == 1, "for days, and nothing is renewed"
    assert world.effects["Sign"] == 1 and "ConfirmClock" not in world.effects
    asked = len(world.dps.requests)
    again = Lifecycle(chosen())
    world.end_at(world.uptime_s + 2000)
    world.run(again.live(once=False, force=False, connect=True))
    assert again.state == CONNECTED and len(world.dps.requests) == asked
    assert_refused(lambda: world.run(hub_token(again.assignment, 3600)), AskOperator, "agent.no_token")  # type: ignore


def test_a_hub_that_refuses_the_certificate_twice_has_the_device_register_again() -> None:
    world = CertificateWorld()
    world.run(Lifecycle(chosen()).live(once=True, force=False))
    asked = len(world.dps.requests)
    world.hub.script = [5, 5]
    life = Lifecycle(chosen())
    world.end_at(world.uptime_s + 20000)
    world.run(life.live(once=False, force=False, connect=True))
    assert life.state == CONNECTED and len(world.dps.requests) > asked


def test_a_certificate_that_is_refused_keeps_what_is_stored() -> None:
    world = CertificateWorld()
    world.run(Lifecycle(chosen()).live(once=True, force=False))
    stored = world.store[IDENTITY]
    world.dps.shown = False  # type: ignore[attr-defined]
    life = Lifecycle(chosen())
    world.run(life.live(once=True, force=True))
    assert life.state == HALTED and life.error is not None and life.error.code == "dps.certificate_refused"
    assert world.store[IDENTITY] == stored
