"""A device whose own key signs: registration, record and hub, and the vectors that others have published or printed."""

from dps_agent.assignment import decode, seal_message
from dps_agent.attestation import load_held
from dps_agent.lifecycle import CONNECTED, HALTED, PROVISIONED, Lifecycle
from dps_agent.registration import register
from dps_agent.sas import SasToken, dps_resource, hub_resource, string_to_sign
from dps_agent.settings import SYMMETRIC_KEY, TPM
from dps_agent.signing import hub_token
from dps_hal.contracts import IDENTITY, StoredRecord
from dps_hal.device_key import DeviceKey, derived_key, key_in
from dps_hal.errors import AskOperator, RetryLater
from dps_hal.platform import from_json, hmac_sha256, to_base64, to_json
from support.claims import assert_refused, flipped
from support.world import (
    DEVICE,
    HUB,
    NOW_S,
    KeyDps,
    World,
    body_of,
    calls,
    error_reply,
    fake_blob,
    reply,
    settings,
    with_identity,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

KEY = bytes(range(32))
EXPIRES_AT_S = 1893456000
SCOPE = "0ne00000000"


class KeyWorld(World):
    """A device with a key, and the service that knows it; a TPM is asked for nothing, for there is none."""

    def __init__(self, key: bytes = KEY, enrolled: bytes = KEY, group: str = "") -> None:
        World.__init__(self)
        self.dps = KeyDps(self.tpm, enrolled, group)
        self.dps.hubs = self.hubs
        self.tpm = DeviceKey(key)  # type: ignore[assignment]


def chosen(**changes: "Any") -> "Any":
    return settings(attestation=SYMMETRIC_KEY, **changes)


def registered(world: KeyWorld, registration_id: str = DEVICE, **how: "Any") -> "Any":
    return with_identity(world.run(register(chosen(), registration_id, **how)))


def signed(key: bytes, resource: str, key_name: str = "registration") -> str:
    signature = hmac_sha256(key, string_to_sign(resource, EXPIRES_AT_S))
    return SasToken(resource, EXPIRES_AT_S, signature, key_name).header()


# The published example, and values that the official clients for Python and Node print.


def test_a_derived_key_is_the_one_that_the_service_s_documents_print() -> None:
    group_key = key_in("8isrFI1sGsIlvvFSSFRiMfCNzv21fjbE/+ah/lSh3lF8e2YG1Te7w1KpZhJFFXJrqYKi9yegxkqIChbqOS9Egw==")
    derived = derived_key(group_key, "sn-007-888-abc-mac-a1-b2-c3-d4-e5-f6")
    assert to_base64(derived) == "Jsm0lyGpjaVYVP2g3FnmnmG9dI/9qU24wNoykUmermc="


def test_a_key_of_16_bytes_and_an_id_with_reserved_characters_derive_by_their_letters() -> None:
    group_key = key_in("/////////////////////w==")
    for registration_id, derived in (
        ("Line-4:Unit.7", "lBHInSGxJzKHSZYw3F5Gu5fTiqk3Neslr2TDe9LQWiw="),
        ("line-4:unit.7", "BqKpk+dxeooaYrv4JbIelF12EsdHbBxKMCaDPAH8pbs="),
    ):
        assert to_base64(derived_key(group_key, registration_id)) == derived, registration_id
    for registration_id, signature in (
        ("Line-4:Unit.7", "4FD2BntaMvAuM0bSf0XZboBrtxRq9IRadB5XBeqevrg%3D"),
        ("line-4:unit.7", "PNlzFJ%2B1oTmv8ANNfzAp4KyPfM1dYhjNrpatJBqpVEk%3D"),
    ):
        token = signed(derived_key(group_key, registration_id), dps_resource(SCOPE, registration_id))
        assert f"&sig={signature}&" in token, registration_id


def test_the_token_of_an_individual_key_is_that_of_the_official_client_for_python() -> None:
    assert signed(key_in("AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="), dps_resource(SCOPE, "vector-device")) == (
        "SharedAccessSignature sr=0ne00000000%2Fregistrations%2Fvector-device"
        "&sig=OnhY3u%2BQR8MlUplodohSvySKWd82i52apoMmnVLYT%2BM%3D&se=1893456000&skn=registration"
    )


def test_the_signature_is_over_the_resource_as_it_stands_in_the_token() -> None:
    for resource, signature in (
        ("0ne00000000%2fregistrations%2fvector-device", "nn8OPWSmIf88YiNE28sYBKuBY2dKPJrmkeuVPAtsDmo%3D"),
        ("0ne00000000/registrations/vector-device", "akDCpOulDZcvLxR3XvdtQ4RcnL9dAbKoowWgNDV3ERA%3D"),
    ):
        assert f"&sig={signature}&" in signed(KEY, resource), resource


def test_a_derived_key_signs_for_dps_and_for_the_hub() -> None:
    derived = derived_key(bytes(range(64)), "vector-device-g")
    assert to_base64(derived) == "/c2xed/sFp3XIFaWjICWUXkH1b4sdVTnBJKKlOmjNlg="
    assert signed(derived, dps_resource(SCOPE, "vector-device-g")) == (
        "SharedAccessSignature sr=0ne00000000%2Fregistrations%2Fvector-device-g"
        "&sig=G4eZ9qklEGIrSHRoHxj%2F3GvWrdoGqQXGQakaPr9175E%3D&se=1893456000&skn=registration"
    )
    assert signed(derived, hub_resource("hub.example.net", "vector-device-g"), "") == (
        "SharedAccessSignature sr=hub.example.net%2Fdevices%2Fvector-device-g"
        "&sig=psFnzMRdkV5pWgYG8bo8cj6GZh3Oh6bUV%2BlM%2F%2FbTg6A%3D&se=1893456000"
    )


def test_a_text_that_holds_no_key_is_refused_and_not_shown() -> None:
    for text in ("", "AAECAwQFBgcICQoLDA0O", to_base64(bytes(65)), "HostName=h;SharedAccessKey=QUJD", "not base64!!!!"):
        try:
            key_in(text)
        except ValueError as error:
            assert "expected base64 of 16 to 64 bytes" in str(error) and (not text or text not in str(error)), text
        else:
            raise AssertionError(f"taken: {text!r}")
    assert key_in(to_base64(bytes(16))) == bytes(16) and key_in(to_base64(bytes(64))) == bytes(64)
    assert repr(DeviceKey(b"secret")) == "DeviceKey()"


# The exchange.


def test_the_first_request_has_a_token_and_no_challenge_follows() -> None:
    world = KeyWorld()
    assignment, _ = registered(world)
    assert calls(world) == ["PUT+token", "LOOKUP", "LOOKUP"]
    assert body_of(world.dps.requests[0]) == {"registrationId": DEVICE}, "nothing of the attestation is in the body"
    assert (assignment.assigned_hub, assignment.device_id, assignment.attestation) == (HUB, DEVICE, SYMMETRIC_KEY)
    assert (assignment.wrapped_key, assignment.ek_name, assignment.srk_name) == (b"", b"", b"")
    assert "ImportKey" not in world.effects and "ReadEndorsementKey" not in world.effects
    tokens = [http.authorization for http in world.dps.requests]
    assert tokens[0] is tokens[1] and tokens[0].expires_at_s == NOW_S + 100 + 3600, "one token for the whole exchange"


def test_an_answer_with_the_group_or_an_empty_member_or_none_is_taken() -> None:
    for member in ({}, {"symmetricKey": {}}, {"symmetricKey": None}, {"symmetricKey": {"enrollmentGroupId": "line-4"}}):
        world = KeyWorld()
        world.dps.assigned = lambda assigned=world.dps.assigned, more=member: dict(assigned(), **more)  # type: ignore
        assert registered(world)[0].assigned_hub == HUB, member


def test_the_id_is_in_lower_case_wherever_it_is_used() -> None:
    world = KeyWorld()
    life = Lifecycle(chosen(registration_id=DEVICE.upper()))
    world.run(life.live(once=True, force=False))
    assert life.state == PROVISIONED and life.assignment is not None
    assert life.assignment.registration_id == DEVICE
    first = world.dps.requests[0]
    assert f"/registrations/{DEVICE}/register" in first.path and body_of(first)["registrationId"] == DEVICE
    assert first.authorization is not None and first.authorization.resource == dps_resource(SCOPE, DEVICE)


def test_a_wrong_key_is_an_operator_s_business_and_dps_is_asked_once() -> None:
    world = KeyWorld(enrolled=bytes(32))
    error = assert_refused(lambda: registered(world), AskOperator, "dps.key_refused")
    assert "401002" in str(error) and calls(world) == ["PUT+token"]
    assert to_base64(KEY) not in str(error)


def test_a_refusal_names_a_clock_that_differs_from_the_service_s() -> None:
    world = KeyWorld(enrolled=bytes(32))
    world.utc_error_s = 86400
    error = assert_refused(lambda: registered(world), AskOperator, "dps.key_refused")
    assert "clock differs" in str(error)


def test_a_tpm_s_challenge_is_a_refusal_that_says_so() -> None:
    world = KeyWorld()
    world.dps.script = [world.dps.challenge(fake_blob(KEY))]
    error = assert_refused(lambda: registered(world), AskOperator, "dps.key_refused")
    assert "challenges a TPM" in str(error)


def test_no_token_is_made_under_a_clock_that_nobody_believes() -> None:
    world = KeyWorld()
    world.believable = False
    assert_refused(lambda: registered(world), RetryLater, "clock.not_set")
    assert calls(world) == ["GET"] or calls(world) == ["OPERATION"], "DPS was asked for the time, and nothing more"
    world.vouching = ["DPS"]
    assert registered(world)[0].assigned_hub == HUB


def test_want_of_quota_ends_it_at_the_first_request_and_never_behind_it() -> None:
    world = KeyWorld()
    world.dps.script = [error_reply(429, 429001)]
    assert_refused(lambda: registered(world, queues=False), RetryLater, "dps.throttled")
    assert len(world.dps.requests) == 1
    world = KeyWorld()
    world.dps.script = [None] + [error_reply(429, 429001)] * 100
    assert registered(world, queues=False)[0].assigned_hub == HUB
    assert world.uptime_s > 900, "longer than the budget, for the quota of the first request would be spent in vain"


def test_an_answer_that_says_assigned_and_nothing_else_gives_no_identity() -> None:
    world = KeyWorld()
    world.dps.polls_until_assigned = 0
    world.dps.script = [None] + [reply(200, {"operationId": "4.abc", "status": "assigned"})] * 9
    assert_refused(lambda: registered(world), RetryLater, "dps.assigned_without_key")


# The record.


def held(world: World, record: bytes, choice: "Any" = None) -> "Any":
    return world.run(load_held(choice or chosen(), StoredRecord(record, 1, False)))


def test_the_device_s_key_seals_the_record() -> None:
    world = KeyWorld()
    assignment, record = registered(world)
    assert record[-32:] == hmac_sha256(KEY, seal_message(record[:-32]))
    stored = from_json(record[:-32])
    assert stored["attestation"] == SYMMETRIC_KEY and not {"wrappedKey", "ekName", "srkName"} & set(stored)
    assert to_base64(KEY).encode() not in record
    assert decode(record)[0] == assignment and held(world, record) == (assignment, "")


def test_one_changed_byte_anywhere_is_refused() -> None:
    world = KeyWorld()
    _, record = registered(world)
    for place in range(len(record)):
        kept, reason = held(world, flipped(record, place * 8 + place % 8))
        assert kept is None and reason, f"place={place} bit={place % 8}"


def test_a_record_of_another_key_or_another_way_is_another_identity() -> None:
    world = KeyWorld()
    _, record = registered(world)
    kept, reason = held(KeyWorld(key=bytes(32)), record)
    assert kept is None and "seal" in reason
    kept, reason = held(world, record, settings(attestation=TPM))
    assert kept is None and "attestation 'symmetric-key'" in reason
    _, of_tpm = with_identity(World().run(register(settings(), DEVICE)))
    kept, reason = held(world, of_tpm)
    assert kept is None and "attestation 'tpm'" in reason
    assert b"attestation" not in of_tpm, "what a device with a TPM stores is as ever"


def test_a_record_without_a_way_that_is_a_text_is_damaged() -> None:
    world = KeyWorld()
    _, record = registered(world)
    for wrong in (7, None, []):
        broken = to_json(dict(from_json(record[:-32]), attestation=wrong)).encode() + record[-32:]
        kept, reason = held(world, broken)
        assert kept is None and "not readable" in reason, wrong


# The life.


def test_a_life_registers_connects_and_boots_without_dps() -> None:
    world = KeyWorld()
    life = Lifecycle(chosen())
    world.end_at(2000)
    world.run(life.live(once=False, force=False, connect=True))
    assert life.state == CONNECTED and life.connections >= 1
    asked = len(world.dps.requests)
    again = Lifecycle(chosen())
    world.end_at(world.uptime_s + 2000)
    world.run(again.live(once=False, force=False, connect=True))
    assert again.state == CONNECTED and len(world.dps.requests) == asked
    token = world.run(hub_token(again.assignment, 3600))
    assert token.resource == hub_resource(HUB, DEVICE)


def test_another_key_registers_anew_and_a_refused_one_keeps_no_identity() -> None:
    world = KeyWorld()
    world.run(Lifecycle(chosen()).live(once=True, force=False))
    stored = world.store[IDENTITY]
    world.tpm = DeviceKey(bytes(32))  # type: ignore[assignment]
    life = Lifecycle(chosen())
    world.run(life.live(once=True, force=False))
    assert life.state == HALTED and life.error is not None and life.error.code == "dps.key_refused"
    assert world.store[IDENTITY] == stored, "what was stored is replaced by what is better only"
    world.dps.challenge_key = bytes(32)
    world.run(life.live(once=True, force=False))
    assert life.state == PROVISIONED and world.store[IDENTITY] != stored
