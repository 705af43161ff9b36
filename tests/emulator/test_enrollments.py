"""Enrolment files as people and tools write them."""

import base64
import json
import stat
from pathlib import Path

import pytest

from dps_emulator.enrollments import Enrollment, EnrollmentError, enrollment_from_json, read_enrollments
from dps_emulator.state import StateError, certificate_authority, enrollment_folder, make_private_folder
from emulator.device import Device

DEVICE = Device.of_the_vectors()
EK = base64.b64encode(DEVICE.ek_public).decode()


def record(**more: object) -> dict[str, object]:
    return {"registrationId": "press-07", "attestation": {"type": "tpm", "tpm": {"endorsementKey": EK}}, **more}


def test_a_service_api_record_is_read_and_kept_whole() -> None:
    given = record(
        deviceId="Press 07".replace(" ", "_"),
        iotHubs=["one.azure-devices.net", "two.azure-devices.net"],
        allocationPolicy="custom",
        provisioningStatus="disabled",
        reprovisionPolicy={"updateHubAssignment": True, "migrateDeviceData": False},
        initialTwin={"properties": {"desired": {"a": 1}}},
    )
    assert enrollment_from_json(given) == Enrollment(
        "press-07",
        DEVICE.ek_public,
        "Press_07",
        ("one.azure-devices.net", "two.azure-devices.net"),
        "custom",
        enabled=False,
        update_hub_assignment=True,
        migrate_device_data=False,
        rest={"initialTwin": {"properties": {"desired": {"a": 1}}}},
    )
    assert enrollment_from_json(given).to_json() == given


def test_json_may_be_one_record_or_a_list() -> None:
    assert read_enrollments(json.dumps(record())) == read_enrollments(json.dumps([record()]))


@pytest.mark.parametrize(
    "text",
    [
        f"registrationId,endorsementKey\npress-07,{EK}\n",
        f"\ufeffendorsementKey,registrationId\r\n{EK},press-07\r\n",
        f'registration_id, endorsement_key, serial, written_at\npress-07, {EK}, "a,b", 2026\n\n',
        f"registrationId,endorsementKey\npress-07,{EK}\nregistrationId,endorsementKey\n",
    ],
)
def test_csv_is_read_with_any_further_columns(text: str) -> None:
    assert read_enrollments(text) == [Enrollment("press-07", DEVICE.ek_public)]


def test_csv_carries_device_hub_and_status() -> None:
    head = "registrationId,endorsementKey,deviceId,iotHubHostName,provisioningStatus"
    (found,) = read_enrollments(f"{head}\npress-07,{EK},d,one.azure-devices.net,disabled\n")
    assert (found.device_id, found.hubs, found.enabled) == ("d", ("one.azure-devices.net",), False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"),
        (f"press-07,{EK}\n", "must name its columns"),
        ("registrationId,endorsementKey\npress-07,AAAA\n", "line 2: press-07: the endorsement key can't be enrolled"),
        ("registrationId,endorsementKey\npress-07\n", "line 2: press-07: the endorsement key can't be enrolled"),
        (f"registrationId,endorsementKey\n../x,{EK}\n", "line 2: registrationId '../x' is not"),
        ("{", "not valid JSON"),
        ("[1]", "a JSON object"),
        (json.dumps(record(registrationId=7)), "registrationId is not a string"),
        (json.dumps(record(attestation={"type": "x509"})), "attestation is not of the form"),
        (json.dumps(record(deviceId="a/b")), "deviceId is not"),
        (json.dumps(record(iotHubs=["https://x"])), "iotHubs is not"),
        (json.dumps(record(allocationPolicy="luck")), "allocationPolicy is not"),
        (json.dumps(record(provisioningStatus="off")), "provisioningStatus is not"),
        (json.dumps(record(reprovisionPolicy={"updateHubAssignment": 1})), "reprovisionPolicy is not"),
    ],
)
def test_an_unusable_file_says_where_and_why(text: str, message: str) -> None:
    with pytest.raises(EnrollmentError) as caught:
        read_enrollments(text)
    assert message in str(caught.value)


def test_the_state_folder_is_private_and_holds_what_was_put(tmp_path: Path) -> None:
    state = tmp_path / "deep" / "state"
    make_private_folder(state)
    enrollment = Enrollment("Press:07", DEVICE.ek_public)
    enrollment_folder(state)["press:07"] = enrollment
    certificate_authority(state)
    assert dict(enrollment_folder(state)) == {"press:07": enrollment} and len(enrollment_folder(state)) == 1
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in [state, *state.rglob("*")]}
    assert all(mode == (0o700 if path.is_dir() else 0o600) for path, mode in modes.items()), modes
    assert not list(state.rglob(".new-*"))
    del enrollment_folder(state)["press:07"]
    with pytest.raises(KeyError):
        enrollment_folder(state)["press:07"]


def test_the_ca_is_the_same_after_a_restart(tmp_path: Path) -> None:
    first, second = certificate_authority(tmp_path), certificate_authority(tmp_path)
    assert first.cert_pem.bytes() == second.cert_pem.bytes()
    second.issue_cert("localhost")


def test_a_damaged_state_file_is_named(tmp_path: Path) -> None:
    enrollment_folder(tmp_path)
    (tmp_path / "enrollments" / "x.json").write_text("{")
    with pytest.raises(StateError, match=r"x\.json can't be read back"):
        enrollment_folder(tmp_path)["x"]
