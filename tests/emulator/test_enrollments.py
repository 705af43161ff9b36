"""Enrolment files as people and tools write them."""

import base64
import json
import os
import stat
from pathlib import Path

import pytest

from dps_emulator.attestation import SymmetricKeys
from dps_emulator.enrollments import Enrollment, Imported, enrollment_from_json, read_enrollments
from dps_emulator.registrations import StateError
from dps_emulator.state import certificate_authority, make_private_folder
from dps_text import text_of
from dps_text.enrolments import ListError
from emulator.device_side import Device

DEVICE = Device.of_the_vectors()
EK = base64.b64encode(DEVICE.ek_public).decode()
HEADER = "registrationId,endorsementKey\n"


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
    assert read_enrollments("[]") == Imported([], [], [])


@pytest.mark.parametrize(
    "text",
    [
        f"registrationId,endorsementKey\npress-07,{EK}\n",
        f"\ufeffendorsementKey,registrationId\r\n{EK},press-07\r\n",
        f'registration_id, endorsement_key, serial, written_at\npress-07, {EK}, "a,b", 2026\n\n',
        f"registrationId,endorsementKey\npress-07,{EK}\nregistrationId,endorsementKey\n",
        f"\ufeffregistrationId;endorsementKey;deviceId\r\npress-07;{EK};\r\n",
        f"registrationId\tendorsementKey\npress-07\t{EK}\n",
        f'sep=;\r\nREGISTRATION ID;Endorsement-Key;note\r\npress-07;{EK};"a;b"\r\n',
        f"registrationId,endorsementKey\nregistrationId;endorsementKey\npress-07;{EK}\n",
        f'"registrationId","note","endorsementKey"\n"press-07","two\nlines, with ""quotes""","{EK}"\n',
    ],
)
def test_csv_is_read_with_any_further_columns(text: str) -> None:
    assert read_enrollments(text_of(text.encode())) == Imported([Enrollment("press-07", DEVICE.ek_public)], [], [])


def test_csv_carries_device_hub_and_status() -> None:
    head = "registrationId,endorsementKey,deviceId,iotHubHostName,provisioningStatus"
    (found,) = read_enrollments(f"{head}\npress-07,{EK},d,one.azure-devices.net,disabled\n").enrollments
    assert (found.device_id, found.hubs, found.enabled) == ("d", ("one.azure-devices.net",), False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"press-07,{EK}\n", "line 1: expected a header that names the columns"),
        ("\n\npress-07|x\n", "line 3: expected a header"),
        ("{", "line 1: not valid JSON"),
        (json.dumps([record()], indent=1)[:-1], "not valid JSON: expected ',' or ']'"),
        (json.dumps([record()]) + "\nx", "line 2: not valid JSON: something behind the end"),
        ("[\n1e5,\n" + "[" * 100_000, "line 3: not valid JSON"),
        ("[\n" + "9" * 5000 + "]", "line 2: not valid JSON"),
        ('[{"a": NaN}]', "line 1: not valid JSON: NaN"),
        ('[1,\n{"a": {"b": 1, "b": 2}}]', "line 2: not valid JSON: 'b' stands twice in one object"),
        (
            f"registrationId,endorsementKey,Endorsement Key\npress-07,{EK},{EK}\n",
            "line 1: the columns 'endorsementKey'",
        ),
        (
            f"{HEADER}press-07,{EK}\nendorsementKey;RegistrationID;registration id\n",
            "line 3: the columns 'RegistrationID'",
        ),
    ],
)
def test_a_file_that_is_no_list_says_where_and_why(text: str, message: str) -> None:
    with pytest.raises(ListError) as caught:
        read_enrollments(text)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        (f"{HEADER}press-07,AAAA\n", 2, "press-07: the endorsement key can't be enrolled"),
        (f"{HEADER}press-07\n", 2, "'press-07': its endorsement key is missing"),
        (f"{HEADER},{EK}\n", 2, "registrationId is missing"),
        (f"{HEADER}../x,{EK}\n", 2, "registrationId '../x' is not"),
        (f'{HEADER}"press-07,{EK}\n', 2, "a quote is opened that does not end well"),
        (f'{HEADER}press-07,"{EK}\n', 2, "a quote is opened that does not end well"),
        (f'{HEADER}"press-07\n",{EK}\n', 2, "a quote is opened that does not end well"),
        (f'{HEADER}press-07,{EK}"\n', 2, "a quote or a line end stands in its endorsementKey"),
        (f"{HEADER}a,b,press-07,{EK}\n", 2, "it has 4 cells, its header 2"),
        ("[1]", 1, "expected an object"),
        ("[\n{},\n1]", 2, "registrationId is missing"),
        (json.dumps(record(registrationId=7)), 1, "registrationId is missing, or no text"),
        (json.dumps(record(attestation={"tpm": {}})), 1, "expected attestation.tpm.endorsementKey"),
        (json.dumps(record(attestation=None)), 1, "attestation is missing"),
        (json.dumps(record(deviceId="a/b")), 1, "deviceId is not"),
        (json.dumps(record(iotHubs=["https://x"])), 1, "iotHubs is not"),
        (json.dumps(record(allocationPolicy="luck")), 1, "allocationPolicy is not"),
        (json.dumps(record(provisioningStatus="off")), 1, "provisioningStatus is not"),
        (json.dumps(record(reprovisionPolicy={"updateHubAssignment": 1})), 1, "reprovisionPolicy is not"),
    ],
)
def test_an_odd_line_is_named_and_the_others_are_imported(text: str, line: int, message: str) -> None:
    good = json.dumps(record(registrationId="press-08")) if text[0] in "{[" else f"press-08,{EK}\n"
    odd, *_ = read_enrollments(text).odd
    assert odd.line == line and message in odd.why
    both = f"{HEADER}{good}{text.removeprefix(HEADER)}" if text[0] not in "{[" else f"[{good},\n{text.strip('[]')}]"
    found = read_enrollments(both)
    assert [enrollment.registration_id for enrollment in found.enrollments] == ["press-08"]
    assert found.odd[0].why == odd.why and found.odd[0].line > line


@pytest.mark.parametrize("closed", ["", '"', '",', '"x"', '\n"', '\n",x'])
@pytest.mark.parametrize("note", [False, True])
def test_an_open_quote_takes_no_other_line_with_it(closed: str, note: bool) -> None:
    opened = f'press-01,{EK},"n' if note else f'"press-01,{EK}'
    last = f"press-03,{EK}{closed}"
    found = read_enrollments(f"{HEADER.strip()},note\n{opened}\npress-02,{EK}\npress-03,{EK}\nx,{EK},y\n{last}\n")
    names = [enrollment.registration_id for enrollment in found.enrollments]
    if note and closed in ('"', '\n"'):  # a note of some lines
        assert (names, found.odd) == (["press-01"], [])
    else:
        assert names[:3] == ["press-02", "press-03", "x"] and found.odd[0].line == 2, found.odd


def test_a_row_may_have_fewer_cells_or_empty_ones_behind_its_last() -> None:
    found = read_enrollments(f"{HEADER.strip()},deviceId,note\npress-07,{EK}\npress-08,{EK},d,n,, \n")
    assert [enrollment.registration_id for enrollment in found.enrollments] == ["press-07", "press-08"]
    assert found.odd == []


def test_enrolments_of_other_kinds_are_named() -> None:
    others = [
        record(registrationId="other-1", attestation={"type": "fingerprint", "fingerprint": {}, "tpm": None}),
        record(registrationId="other-2", attestation={"moon": {"phase": {}}}),
        {"enrollmentGroupId": "all", "attestation": {"type": "x509"}},
    ]
    found = read_enrollments(json.dumps([others[0], record(), *others[1:]], indent=1))
    assert [enrollment.registration_id for enrollment in found.enrollments] == ["press-07"]
    named = [(other.registration_id, other.kind) for other in found.others]
    assert named == [("other-1", "fingerprint"), ("other-2", "moon"), ("all", "enrollmentGroup")] and found.odd == []
    table = f"registrationId,endorsementKey,attestationType\nkey-1,,symmetricKey\npress-07,{EK},TPM\n"
    found = read_enrollments(table)
    assert len(found.enrollments) == 1
    assert [(other.line, other.registration_id, other.kind) for other in found.others] == [(2, "key-1", "symmetricKey")]


KEY = base64.b64encode(bytes(range(32))).decode()


def keys(primary: str = KEY, **more: object) -> dict[str, object]:
    return {"type": "symmetricKey", "symmetricKey": {"primaryKey": primary, **more}}


def test_symmetric_keys_are_read_for_a_device_and_for_a_group() -> None:
    second = base64.b64encode(bytes(16)).decode()
    listed = [
        record(registrationId="key-1", attestation=keys(secondaryKey=second), deviceId="d"),
        record(),
        {"enrollmentGroupId": "all", "attestation": keys(), "provisioningStatus": "disabled"},
    ]
    one, tpm, group = read_enrollments(json.dumps(listed, indent=1)).enrollments
    assert one.keys == SymmetricKeys(bytes(range(32)), bytes(16)) and not one.is_group and one.device_id == "d"
    assert tpm.keys is None and tpm.endorsement_key == DEVICE.ek_public
    assert group.is_group and not group.enabled and group.keys == SymmetricKeys(bytes(range(32)), bytes(range(32)))
    for enrollment in (one, group):
        assert enrollment_from_json(enrollment.to_json()) == enrollment
        assert KEY not in json.dumps(enrollment.to_json(with_keys=False)) + repr(enrollment)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (record(attestation=keys("?")), "press-07: symmetricKey.primaryKey is not base64"),
        (record(attestation=keys(base64.b64encode(bytes(15)).decode())), "primaryKey has 15 bytes: a key has 16 to 64"),
        (record(attestation=keys(base64.b64encode(bytes(65)).decode())), "primaryKey has 65 bytes"),
        (record(attestation=keys(secondaryKey="x")), "symmetricKey.secondaryKey is not base64"),
        (record(attestation={"type": "symmetricKey", "symmetricKey": {}}), "symmetricKey.primaryKey is not base64"),
        ({"enrollmentGroupId": "a b", "attestation": keys()}, "enrollmentGroupId 'a b' is not"),
        ({"enrollmentGroupId": "all", "attestation": keys(), "deviceId": "d"}, "all: deviceId stands in a group"),
        ({**record(), "enrollmentGroupId": "all"}, "all: attestation is tpm, which groups do not have"),
    ],
)
def test_a_symmetric_enrolment_that_is_wrong_says_why(entry: dict[str, object], message: str) -> None:
    (odd,) = read_enrollments(json.dumps([entry])).odd
    assert message in odd.why


def test_the_ca_is_the_same_after_a_restart(tmp_path: Path) -> None:
    first, second = certificate_authority(tmp_path), certificate_authority(tmp_path)
    assert first.cert_pem.bytes() == second.cert_pem.bytes()
    second.issue_cert("localhost")


@pytest.mark.parametrize("mode", [0o700, 0o755, 0o750, 0o500])
def test_a_folder_of_ours_is_used_as_it_is(mode: int, tmp_path: Path) -> None:
    folder = tmp_path / "there"
    folder.mkdir()
    folder.chmod(mode)
    make_private_folder(folder)
    assert stat.S_IMODE(folder.stat().st_mode) == mode


@pytest.mark.parametrize("mode", [0o1777, 0o777, 0o770, 0o707, 0o2775])
def test_a_folder_in_which_others_may_write_is_refused_and_not_changed(mode: int, tmp_path: Path) -> None:
    folder = tmp_path / "shared"
    folder.mkdir()
    folder.chmod(mode)
    with pytest.raises(StateError, match=rf"others may write in .*shared, whose mode is {mode:o}: name a folder"):
        make_private_folder(folder)
    assert stat.S_IMODE(folder.stat().st_mode) == mode and not list(folder.iterdir())


def test_a_folder_of_another_user_is_refused_and_not_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StateError, match="is no folder"):
        make_private_folder(tmp_path / "file")
    other = tmp_path.stat().st_uid + 1
    monkeypatch.setattr(os, "geteuid", lambda: other)
    with pytest.raises(StateError, match=r"belongs to user \d+, this is user \d+: name another folder"):
        make_private_folder(tmp_path)
