"""The service API of DPS: what back ends do with enrolments, groups and registrations, and who may."""

from __future__ import annotations

import base64
import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from dps_emulator.attestation import SymmetricKeys, derived_key, key_of, key_text
from dps_emulator.enrollments import Enrollment
from dps_emulator.service import MAX_BODY_BYTES, Request, Response
from dps_emulator.service_api import POLICY, ServiceApi, policy_key
from dps_emulator.state import open_store
from dps_emulator.store import Store
from emulator.device_side import Client, Device, lookup_path, register_path, signed_token
from fresh_machine import azure_service
from support.cloud.emulator import EmulatorInThread, EmulatorProcess

CLIENT = Path(__file__).with_name("azure_service_client.py")
NOW = 1_790_000_000.0
SECRET = bytes(range(32))
HOST = "mine.azure-devices-provisioning.net"
POLICY_KEY = policy_key(SECRET, POLICY)
KEY = bytes(range(40))
DEVICE = Device.of_the_vectors()
TPM = {"type": "tpm", "tpm": DEVICE.attestation()}


class BackEnd:
    """A back end and the API."""

    version = "2021-10-01"

    def __init__(self) -> None:
        self.store = Store()
        self.api = ServiceApi(self.store, SECRET, 300)

    def send(self, method: str, path: str, body: object = None, token: str | None = None, **headers: str) -> Response:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        authorization = self.token() if token is None else token
        named = {"host": f"{HOST}:443", "authorization": authorization, **named}
        encoded = b"" if body is None else json.dumps(body).encode()
        return self.api.answer(Request(method, path, f"api-version={self.version}", named, encoded), NOW)

    def json(self, method: str, path: str, body: object = None, **headers: str) -> Any:
        answer = self.send(method, path, body, **headers)
        assert answer.status == 200, answer.body
        return json.loads(answer.body)

    @staticmethod
    def token(key: bytes = POLICY_KEY, resource: str = HOST, life_s: int = 60, name: str = POLICY) -> str:
        return signed_token(key, quote(resource, safe=""), int(NOW) + life_s, name)


@pytest.fixture
def back_end() -> BackEnd:
    return BackEnd()


def refused(answer: Response) -> int:
    details = json.loads(answer.body)
    assert answer.status == details["errorCode"] // 1000 and details["trackingId"] == answer.request_id
    return int(details["errorCode"])


@pytest.mark.parametrize(
    "token",
    [
        "nonsense",
        BackEnd.token(SECRET),
        BackEnd.token(resource="other.azure-devices-provisioning.net"),
        BackEnd.token(life_s=-301),
        BackEnd.token(name="registration"),
        BackEnd.token(policy_key(SECRET, "iothubowner"), name="iothubowner"),
    ],
)
def test_only_who_has_the_policys_key_is_answered(token: str, back_end: BackEnd) -> None:
    for method, path in (("GET", "/enrollments/a"), ("POST", "/enrollments"), ("DELETE", "/registrations/a")):
        assert refused(back_end.send(method, path, {}, token)) == 401002
    assert refused(back_end.send("GET", "/enrollments/a", authorization="")) == 401002


def test_an_enrolment_is_made_seen_changed_and_deleted(back_end: BackEnd) -> None:
    path = "/enrollments/Press-07"
    made = back_end.json("PUT", path, {"registrationId": "press-07", "attestation": TPM, "deviceId": "d", "etag": None})
    assert made["registrationId"] == "Press-07" and made["deviceId"] == "d" and made["provisioningStatus"] == "enabled"
    assert back_end.store.enrollments["press-07"].endorsement_key == DEVICE.ek_public
    assert back_end.json("GET", "/enrollments/press-07") == made
    changed = back_end.json("PUT", path, {**made, "provisioningStatus": "disabled"}, if_match=made["etag"])
    assert changed["etag"] != made["etag"] and changed["createdDateTimeUtc"] == made["createdDateTimeUtc"]
    assert not back_end.store.enrollments["press-07"].enabled
    assert refused(back_end.send("PUT", path, made, if_match=made["etag"])) == 412001
    assert refused(back_end.send("DELETE", path, if_match=f'"{made["etag"]}"')) == 412001
    assert back_end.json("PUT", path, made, if_match="*")["provisioningStatus"] == "enabled"
    assert back_end.send("DELETE", path, if_match="*").status == 204
    assert refused(back_end.send("GET", path)) == refused(back_end.send("DELETE", path)) == 404201
    assert refused(back_end.send("PUT", path, made, if_match="*")) == 412001, "there is nothing to match"


def test_keys_are_made_kept_and_shown_to_who_asks_for_them_alone(back_end: BackEnd) -> None:
    for path, name in (("/enrollments/a", "registrationId"), ("/enrollmentGroups/a", "enrollmentGroupId")):
        made = back_end.json("PUT", path, {name: "a", "attestation": {"type": "symmetricKey", "symmetricKey": {}}})
        assert made["attestation"] == {"type": "symmetricKey", "symmetricKey": {}}
        shown = back_end.json("POST", f"{path}/attestationmechanism")
        assert len({len(key_of(key)) for key in shown["symmetricKey"].values()} | {64}) == 1
        back_end.json("PUT", path, {**made, "provisioningStatus": "disabled"})
        assert back_end.json("POST", f"{path}/attestationmechanism") == shown, "a change without keys keeps them"
    given = {"type": "symmetricKey", "symmetricKey": {"primaryKey": key_text(KEY), "secondaryKey": key_text(KEY)}}
    back_end.json("PUT", "/enrollments/a", {"registrationId": "a", "attestation": given})
    assert back_end.store.enrollments["a"].keys == SymmetricKeys(KEY, KEY)


@pytest.mark.parametrize(
    ("method", "path", "body", "code"),
    [
        ("PUT", "/enrollments/a", {"registrationId": "b", "attestation": TPM}, 400001),
        ("PUT", "/enrollments/a", {"attestation": {"type": "tpm", "tpm": {"endorsementKey": "AAAA"}}}, 400004),
        ("PUT", "/enrollmentGroups/a", {"attestation": TPM}, 400004),
        ("PUT", "/enrollments/a", [], 400001),
        ("POST", "/enrollments", {"enrollments": [], "mode": "create"}, 400001),
        ("POST", "/enrollments", {"enrollments": [{}] * 11, "mode": "create"}, 400001),
        ("POST", "/enrollments", {"enrollments": [{}], "mode": "upsert"}, 400001),
        ("POST", "/enrollments/query", {"query": "SELECT * FROM devices"}, 400001),
        ("POST", "/enrollments", {"mode": "x" * MAX_BODY_BYTES}, 413001),
        ("PATCH", "/enrollments/a", {}, 405001),
        ("GET", "/registrations/a", None, 404201),
        ("POST", "/registrations/a/query", None, 404201),
        ("GET", "/enrollments/a/b/c", None, 404200),
    ],
)
def test_what_makes_no_sense_is_refused(method: str, path: str, body: object, code: int, back_end: BackEnd) -> None:
    assert refused(back_end.send(method, path, body)) == code


def test_ten_at_once_are_each_taken_for_themselves(back_end: BackEnd) -> None:
    listed: list[Any] = [{"registrationId": f"press-{number}", "attestation": TPM} for number in range(8)]
    odd = [{"registrationId": "a b", "attestation": TPM}, 7]
    answer = back_end.json("POST", "/enrollments", {"enrollments": [*listed, *odd], "mode": "create"})
    assert not answer["isSuccessful"] and len(back_end.store.enrollments) == 8
    assert [(each["registrationId"], each["errorCode"]) for each in answer["errors"]] == [("a b", 400004), ("", 400001)]

    def bulk(mode: str, *entries: Any) -> list[int]:
        answer = back_end.json("POST", "/enrollments", {"enrollments": entries, "mode": mode})
        return [each["errorCode"] for each in answer["errors"]]

    assert bulk("create", listed[0]) == [409001] and bulk("update", {**listed[0], "registrationId": "new"}) == [404201]
    etag = back_end.json("GET", "/enrollments/press-0")["etag"]
    assert bulk("updateIfMatchETag", listed[0], {**listed[0], "etag": etag}) == [412001]
    assert bulk("delete", {**listed[0], "etag": 5}) == [412001]
    assert bulk("update", listed[0]) == [] and bulk("delete", *listed) == [] and not back_end.store.enrollments


def test_a_query_goes_on_where_it_has_ended(back_end: BackEnd) -> None:
    names = [f"press-{number}" for number in range(7)]
    back_end.store.enroll(Enrollment(name, DEVICE.ek_public) for name in names)
    found, headers, pages = [], {"x_ms_max_item_count": "3"}, 0
    while pages < 9:
        answer = back_end.send("POST", "/enrollments/query", {"query": "select *  from enrollments"}, **headers)
        found += [record["registrationId"] for record in json.loads(answer.body)]
        named, pages = dict(answer.headers), pages + 1
        assert named["x-ms-item-type"] == "enrollment"
        if "x-ms-continuation" not in named:
            break
        headers["x_ms_continuation"] = named["x-ms-continuation"]
    assert found == names and pages == 3
    for wrong in ({"x_ms_max_item_count": "0"}, {"x_ms_max_item_count": "x"}, {"x_ms_continuation": "?"}):
        assert refused(back_end.send("POST", "/enrollments/query", {"query": "SELECT *"}, **wrong)) == 400001


def test_the_policys_key_survives_a_restart_and_lies_in_a_private_file(tmp_path: Path) -> None:
    said = []
    for _ in range(2):
        with EmulatorProcess(state_dir=tmp_path / "state") as emulator:
            said.append(emulator.hub_command("service")["connectionString"].rpartition(";")[2])
            command = ["connection-string", "--state-dir", str(emulator.state_dir)]
    assert said[0] == said[1] and command
    assert (tmp_path / "state" / "service.key").stat().st_mode & 0o777 == 0o600
    open_store(tmp_path / "state").close()


@pytest.fixture(scope="module")
def emulator() -> Iterator[EmulatorInThread]:
    with EmulatorInThread() as emulator:
        yield emulator


def test_microsofts_client_manages_enrolments_and_sees_who_has_registered(emulator: EmulatorInThread) -> None:
    group_key = base64.b64encode(KEY).decode()
    python = azure_service()
    emulator.service.enroll(Enrollment("presses", SymmetricKeys(KEY, KEY), is_group=True))
    token = signed_token(
        derived_key(KEY, "press-99"), "0ne00000000%2Fregistrations%2Fpress-99", int(time.time()) + 3600
    )
    with Client(emulator.port, emulator.ca_file) as client:
        assert client.call("PUT", register_path("press-99"), {}, token)[0] == 202
        assert client.call("POST", lookup_path("press-99"), {}, token)[2]["status"] == "assigned"
        order = {**emulator.hub_command("service"), "caFile": str(emulator.ca_file)}
        ended = subprocess.run(
            [str(python), "-I", str(CLIENT)],
            input=json.dumps(order) + "\n",
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert ended.returncode == 0, ended.stderr
        assert client.call("POST", lookup_path("press-99"), {}, token)[2]["status"] == "unassigned"
    said = json.loads(ended.stdout)
    assert said["created"] == said["got"] and len(key_of(said["keys"]["symmetricKey"]["primaryKey"])) == 64
    assert said["updated"]["provisioningStatus"] == "disabled" and said["stale"] == 412 and said["deleted"] == 404
    assert said["bulk"] == {"isSuccessful": True, "errors": []} and said["again"]["errors"][0]["errorCode"] == 409001
    assert said["queried"] == [f"press-{number:02}" for number in range(1, 11)]
    assert said["groups"] == ["presses"] and group_key not in ended.stdout
    assert (said["state"]["status"], said["state"]["deviceId"]) == ("assigned", "press-99")
    assert said["of group"] == [said["state"]]


def test_a_credential_policy_is_passed_over_by_versions_that_have_none(back_end: BackEnd) -> None:
    record = {"registrationId": "press-07", "attestation": TPM, "credentialPolicyName": "line-4"}
    for version, kept in (("2021-10-01", None), ("2025-07-01-preview", "line-4"), ("2026-04-01", "line-4")):
        back_end.version = version
        assert back_end.json("PUT", "/enrollments/press-07", record).get("credentialPolicyName") == kept, version
        bulk = {"enrollments": [{**record, "registrationId": f"press-{version}"}], "mode": "create"}
        assert back_end.json("POST", "/enrollments", bulk)["isSuccessful"]
        assert back_end.json("GET", f"/enrollments/press-{version}").get("credentialPolicyName") == kept, version
    back_end.version = "2021-10-01"
    assert "credentialPolicyName" not in back_end.json("GET", "/enrollments/press-2026-04-01"), "kept, and not shown"
