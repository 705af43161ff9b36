"""The stored assignment: what it holds, and when it holds."""

from dps_agent.assignment import Assignment, decode, device_id_fault, encode, hub_fault, payload_to_store, seal_message
from dps_agent.attestation import load_held
from dps_agent.registration import register
from dps_agent.settings import AUTO
from dps_agent.signing import hub_token, sealed
from dps_hal.contracts import StoredRecord
from dps_hal.errors import AskOperator, IdentityStale, RetryLater
from dps_hal.platform import from_json, hmac_sha256, to_json
from dps_hal.tpm.keys import registration_id_from_ek
from support.claims import assert_refused, flipped
from support.world import DEVICE, HUB, FakeTpm, World, settings, with_identity

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

SUFFIXES = (".azure-devices.net", ".azure-devices.cn", "hub.local")


def provisioned(registration_id: str = DEVICE) -> "tuple[World, Assignment, bytes]":
    world = World()
    world.dps.assigned = lambda assigned=world.dps.assigned: dict(assigned(), registrationId=registration_id)  # type: ignore[method-assign]
    assignment, record = with_identity(world.run(register(settings(registration_id), registration_id)))
    return world, assignment, record


def held(world: World, record: bytes, choice: "Any" = None) -> "Any":
    return world.run(load_held(choice or settings(), StoredRecord(record, 1, False)))


def changed(assignment: Assignment, **changes: "Any") -> Assignment:
    fields = [changes.get(name, getattr(assignment, name)) for name in FIELD_NAMES]
    return Assignment(*fields)


FIELD_NAMES = (
    "id_scope",
    "endpoint",
    "registration_id",
    "assigned_hub",
    "device_id",
    "wrapped_key",
    "ek_name",
    "srk_name",
    "status",
    "substatus",
    "etag",
    "created_utc",
    "last_updated_utc",
    "assigned_at_s",
    "payload",
    "payload_omitted",
    "attestation",
    "chain",
)


def test_an_assignment_survives_storage_unchanged() -> None:
    _, assignment, record = provisioned()
    read, text, seal = decode(record)
    assert read == assignment and len(seal) == 32 and record == text + seal
    bare = changed(assignment, payload=None, payload_omitted=True)
    assert decode(encode(bare) + bytes(32))[0] == bare


def test_a_record_that_fits_holds() -> None:
    world, assignment, record = provisioned()
    assert held(world, record) == (assignment, "")


def test_no_record_holds_nothing() -> None:
    world = World()
    assert world.run(load_held(settings(), None)) == (None, "no assignment is stored")
    lost, reason = world.run(load_held(settings(), StoredRecord(b"", 2, False)))
    assert lost is None and "every copy of it is damaged" in reason
    assert world.effects == {}, "the TPM is asked without need"


def test_one_changed_byte_anywhere_is_refused() -> None:
    world, _, record = provisioned()
    for place in range(len(record)):
        broken = flipped(record, place * 8 + place % 8)
        try:
            kept, reason = held(world, broken)
        except AskOperator as error:  # in the EK's name: nothing is salted to an EK that the record does not know
            assert error.code == "tpm.ek_changed", f"place={place}: {error.code}"
            continue
        assert kept is None and reason, f"place={place} bit={place % 8}"


def test_a_key_paired_with_another_hub_is_refused() -> None:
    world, assignment, record = provisioned()
    _, _, seal = decode(record)
    for changes in (
        {"assigned_hub": "other.azure-devices.net"},
        {"device_id": "press-08"},
        {"etag": "x"},
        {"assigned_at_s": 7},
        {"payload": {}},
    ):
        other = changed(assignment, **changes)
        kept, reason = held(world, encode(other) + seal)
        assert kept is None and "seal" in reason, f"{changes!r}: {reason}"


def test_a_seal_cannot_be_made_from_a_token() -> None:
    world, assignment, _ = provisioned()
    text = encode(assignment)
    assert seal_message(text)[:1] == b"\x00", "a token's text never begins with a zero byte"
    forged = hmac_sha256(world.dps.hub_key, text)
    assert held(world, text + forged)[0] is None


def test_other_settings_mean_another_identity() -> None:
    world, _, record = provisioned()
    for choice, word in (
        (settings(id_scope="0neOTHER"), "id_scope"),
        (settings(registration_id="press-08"), "registration_id"),
        (settings(registration_id=AUTO), "registration_id"),
        (settings()._replace(endpoint="https://other") if hasattr(settings(), "_replace") else None, "endpoint"),
        (settings()._replace(hub_suffixes=(".cn",)) if hasattr(settings(), "_replace") else None, "hub_suffixes"),
    ):
        if choice is not None:  # MicroPython's tuples have no _replace
            kept, reason = held(world, record, choice)
            assert kept is None and word in reason, f"{word}: {reason}"


def test_the_case_of_a_registration_id_does_not_matter() -> None:
    world, assignment, record = provisioned()
    assert held(world, record, settings(registration_id=DEVICE.upper())) == (assignment, "")


def test_a_derived_registration_id_holds_while_the_ek_stays() -> None:
    derived = registration_id_from_ek(FakeTpm().endorsement_key)
    world, assignment, record = provisioned(derived)
    assert held(world, record, settings(registration_id=AUTO)) == (assignment, "")


def test_a_cleared_tpm_registers_again() -> None:
    world, _, record = provisioned()
    world.tpm.clear()
    kept, reason = held(world, record)
    assert kept is None and "cleared" in reason


def test_another_tpm_asks_the_operator() -> None:
    world, _, record = provisioned()
    world.tpm = FakeTpm(seed=9)
    assert_refused(lambda: held(world, record), AskOperator, "tpm.ek_changed")


def test_another_ek_in_the_same_tpm_asks_the_operator() -> None:
    world, _, record = provisioned()
    world.tpm.endorsement_key = FakeTpm(seed=9).endorsement_key
    world.effects.clear()
    assert_refused(lambda: held(world, record), AskOperator, "tpm.ek_changed")
    assert world.effects == {"ReadEndorsementKey": 1}, "something was asked of a TPM that may be an attacker's"


def test_a_key_that_no_longer_loads_registers_again() -> None:
    world, _, record = provisioned()
    world.refuse["Sign"] = [IdentityStale("tpm.key_stale", "the key was altered")]
    assert held(world, record) == (None, "the key was altered")


def test_records_that_are_none_are_refused() -> None:
    _, _, record = provisioned()
    text = record[:-32]
    value = from_json(text)
    broken = [b"", b"\x00" * 10, b"{}" + bytes(32), b"[]" + bytes(32), b"7" * 40, text[:-1] + bytes(32)]
    for name in value:
        if name != "payload":
            broken.append(to_json({key: value[key] for key in value if key != name}).encode() + bytes(32))
            broken.append(to_json(dict(value, **{name: []})).encode() + bytes(32) if name != "payloadOmitted" else b"")
    for moment in (-1, 2**32, 10**20, True, 1.5):
        broken.append(to_json(dict(value, assignedAtS=moment)).encode() + bytes(32))
    for stored in broken:
        assert_refused(lambda: decode(stored), IdentityStale, "record.damaged", f"stored={stored[:60]!r}")


def test_hub_names_end_in_a_known_suffix_at_a_label() -> None:
    for hub in (HUB, "a.b.azure-devices.net", "X.Azure-Devices.NET", "azure-devices.cn", "hub.local", "my.hub.local"):
        assert hub_fault(hub, SUFFIXES) == "", hub
    for hub in (
        "",
        "a",
        "myhub.local",
        "evilazure-devices.net",
        "a.azure-devices.net.evil.com",
        "a..azure-devices.net",
        ".azure-devices.net",
        "a.azure-devices.net.",
        "-a.azure-devices.net",
        "a-.azure-devices.net",
        "a_b.azure-devices.net",
        "a b.azure-devices.net",
        "a@b.azure-devices.net",
        "a:1.azure-devices.net",
        "hub.azure-devices.net:8883",
        "hub.azure-devices.net/x",
        "b\u212a.azure-devices.net",
        "a" * 64 + ".azure-devices.net",
        ("a" * 60 + ".") * 4 + "azure-devices.net",
        "a.azure-devices.net\n",
        "a\x00.azure-devices.net",
    ):
        assert hub_fault(hub, SUFFIXES), hub
    assert hub_fault(HUB, ()) and hub_fault(HUB, ("",)), "no suffix allows no hub"


def test_device_ids_are_those_of_the_identity_registry() -> None:
    for device_id in ("a", "A-1.%_*?!(),:=@$'", "x" * 128):
        assert device_id_fault(device_id) == "", device_id
    for device_id in ("", "x" * 129, "a/b", "a+", "#", "a b", "\u00e9", "a\n", "\x7f", "a&b", '"'):
        assert device_id_fault(device_id), repr(device_id)


def test_a_payload_is_stored_up_to_its_limit() -> None:
    assert payload_to_store(None) == (None, False)
    assert payload_to_store({"a": [1, None]}) == ({"a": [1, None]}, False)
    assert payload_to_store("x" * 2046) == ("x" * 2046, False)
    assert payload_to_store("x" * 2047) == (None, True)
    assert payload_to_store("\u20ac" * 1000) == (None, True), "bytes count, not characters"


def test_a_hub_token_is_for_the_assigned_hub_and_device() -> None:
    world, assignment, _ = provisioned()
    token = world.run(hub_token(assignment, 600))
    assert token.resource == "emulator.azure-devices.net%2Fdevices%2Fpress-07" and token.key_name == ""
    world.believable = False
    said = assert_refused(lambda: world.run(hub_token(assignment, 600)), RetryLater, "clock.not_set")
    assert "says 2" in str(said) and "1970" not in str(said), str(said)


def test_sealing_signs_the_stored_bytes() -> None:
    world, assignment, _ = provisioned()
    record = world.run(sealed(assignment))
    assert record[-32:] == hmac_sha256(world.dps.hub_key, seal_message(record[:-32]))
