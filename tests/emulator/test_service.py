"""The pure service: what it grants, what it refuses, and what time does to it."""

from __future__ import annotations

import base64
import functools
import json
import random
import re
from typing import Any

import pytest

from dps_emulator import service
from dps_emulator.enrollments import Enrollment
from dps_emulator.registrations import Registration
from dps_emulator.service import DpsService, Request, Response, Settings
from emulator.device_side import ActivatedKey, Device, lookup_path, operation_path, register_path
from support.cloud.memory import PlainRegistrations

HUBS = ("one.azure-devices.net", "two.azure-devices.net")
NOW = 1_790_000_000.0
DEVICE = Device.of_the_vectors()
RID = DEVICE.registration_id
another = functools.cache(Device.another)


class Cloud:
    """A service with one enrolled device, on a clock that tests turn."""

    def __init__(self, enrollment: Enrollment | None = None, device: Device = DEVICE, **settings: Any) -> None:
        self.device = device
        self.now = NOW
        self.service = DpsService(Settings(hubs=HUBS, **settings), {}, PlainRegistrations(), random.Random(1).randbytes)
        self.service.enroll(enrollment or Enrollment(RID, DEVICE.ek_public, "press-07"))
        self.key: ActivatedKey | None = None

    def send(
        self,
        method: str,
        path: str,
        body: object = None,
        token: str | None = None,
        query: str = "api-version=2021-10-01",
        content_type: str = "application/json",
    ) -> Response:
        headers = {"host": "localhost", "content-type": content_type} | ({"authorization": token} if token else {})
        encoded = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        return self.service.answer(Request(method, path, query, headers, encoded), self.now)

    def body(self, **more: Any) -> dict[str, Any]:
        return {"registrationId": RID, "tpm": self.device.attestation(), **more}

    def token(self, resource: str = f"0ne00000000%2Fregistrations%2F{RID}", life_s: int = 3600, **more: Any) -> str:
        assert self.key is not None, "no challenge answered yet"
        return self.key.token(resource, int(self.now) + life_s, **more)

    def challenge(self) -> None:
        answer = self.send("PUT", register_path(RID), self.body())
        assert answer.status == 401, answer.body
        self.key = self.device.activate(content(answer)["authenticationKey"])

    def register(self, **more: Any) -> str:
        """Challenge and register; returns the operation id."""
        self.challenge()
        answer = self.send("PUT", register_path(RID), self.body(**more), self.token())
        assert answer.status == 202, answer.body
        return str(content(answer)["operationId"])

    def poll(self, operation_id: str) -> Response:
        return self.send("GET", operation_path(RID, operation_id), token=self.token())

    def lookup(self) -> Any:
        answer = self.send("POST", lookup_path(RID), self.body(), self.token())
        assert answer.status == 200, answer.body
        return content(answer)

    def provision(self, **more: Any) -> Any:
        """A whole registration; returns the finished state."""
        answer = self.poll(self.register(**more))
        assert answer.status == 200, answer.body
        return content(answer)["registrationState"]


def content(answer: Response) -> Any:
    return json.loads(answer.body)


def header(answer: Response, name: str) -> str | None:
    return {key.lower(): value for key, value in answer.headers}.get(name.lower())


def assert_refused(answer: Response, code: int) -> None:
    """An error as the API has it."""
    assert answer.error_code == code, answer.body
    assert answer.status == code // 1000
    details = content(answer)
    assert details["errorCode"] == code and header(answer, "x-ms-error-code") == str(code)
    assert details["trackingId"] == header(answer, "x-ms-request-id") == answer.request_id
    assert details["message"] and re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{7}Z", details["timestampUtc"])
    assert header(answer, "Date") and "authenticationKey" not in details


# --- the exchange


def test_the_challenge_has_what_every_client_needs() -> None:
    answer = Cloud().send("PUT", register_path(RID), Cloud().body())
    assert answer.status == 401 and answer.error_code == 0
    challenge = content(answer)
    assert set(challenge) == {"message", "authenticationKey", "unencryptedAuthenticationKey", "keyName"}
    assert challenge["keyName"] == "registration" and challenge["unencryptedAuthenticationKey"] is None
    assert len(DEVICE.activate(challenge["authenticationKey"]).key) == 32
    assert header(answer, "content-type") == "application/json; charset=utf-8"


def test_register_answers_202_and_the_poll_has_hub_and_key() -> None:
    cloud = Cloud(retry_after_s=7)
    cloud.challenge()
    answer = cloud.send("PUT", register_path(RID), cloud.body(), cloud.token())
    assert answer.status == 202 and header(answer, "Retry-After") == "7"
    assert header(answer, "Location") == f"https://localhost{register_path(RID)}?api-version=2021-10-01"
    assert content(answer)["status"] == "assigning"
    operation_id = content(answer)["operationId"]
    assert re.fullmatch(r"\d\.[0-9a-f]{16}\.[0-9a-f-]{36}", operation_id)

    final = cloud.poll(operation_id)
    assert final.status == 200 and header(final, "Retry-After") is None
    state = content(final)["registrationState"]
    assert content(final)["operationId"] == operation_id and content(final)["status"] == "assigned"
    assert (state["registrationId"], state["assignedHub"], state["deviceId"]) == (RID, HUBS[0], "press-07")
    assert (state["status"], state["substatus"]) == ("assigned", "initialAssignment")
    assert re.fullmatch(r'"[0-9a-f-]{36}"', base64.b64decode(state["etag"]).decode())
    assert state["createdDateTimeUtc"] == state["lastUpdatedDateTimeUtc"] == "2026-09-21T14:13:20.0000000Z"
    opened = DEVICE.activate(state["tpm"]["authenticationKey"])
    assert opened.key == cloud.service.hub_key(HUBS[0], "press-07") != cloud.key.key  # type: ignore[union-attr]
    assert opened.uri == f"{HUBS[0]}/devices/press-07"


def test_while_assigning_polls_are_202_with_the_registration_id() -> None:
    cloud = Cloud(assign_after_s=10)
    operation_id = cloud.register()
    cloud.now += 9.9
    answer = cloud.poll(operation_id)
    assert answer.status == 202 and header(answer, "Retry-After") == "3"
    assert content(answer)["registrationState"] | {"createdDateTimeUtc": ""} == {
        "registrationId": RID,
        "status": "assigning",
        "createdDateTimeUtc": "",
    }
    assert cloud.lookup()["status"] == "assigning"
    cloud.now += 0.2
    assert cloud.lookup()["status"] == "assigned" and cloud.poll(operation_id).status == 200


def test_retry_after_none_sends_no_such_header() -> None:
    cloud = Cloud(retry_after_s=None, assign_after_s=10)
    assert header(cloud.poll(cloud.register()), "Retry-After") is None


def test_the_custom_payload_comes_back_where_allocation_is_custom() -> None:
    assert Cloud().provision(payload={"site": "Ulm"})["payload"] == {"site": "Ulm"}
    assert "payload" not in Cloud().provision()
    static = Enrollment(RID, DEVICE.ek_public, allocation_policy="static")
    assert "payload" not in Cloud(static).provision(payload={"site": "Ulm"})


def test_a_second_put_without_tpm_is_taken() -> None:
    cloud = Cloud()
    cloud.challenge()
    assert cloud.send("PUT", register_path(RID), {"registrationId": RID}, cloud.token()).status == 202


@pytest.mark.parametrize("version", ["2019-03-31", "2021-06-01", "2021-10-01", "2026-04-01"])
def test_any_api_version_and_legacy_query_are_taken(version: str) -> None:
    answer = Cloud().send(
        "PUT", register_path(RID), Cloud().body(), query=f"api-version={version}&forceRegistration=true"
    )
    assert answer.status == 401 and "authenticationKey" in content(answer)


def test_escaped_slashes_and_unknown_fields_are_taken() -> None:
    text = json.dumps(Cloud().body(future={"a": [1]})).replace("/", "\\/")
    assert "\\/" in text
    assert "authenticationKey" in content(Cloud().send("PUT", register_path(RID), text.encode()))


@pytest.mark.parametrize(
    ("resource", "key_name"),
    [
        (f"0ne00000000%2fregistrations%2f{RID}", "registration"),  # C
        (f"0ne00000000%2Fregistrations%2F{RID}", None),  # Python
        (f"0ne00000000/registrations/{RID}", ""),  # Java
        (f"0ne00000000/registrations/{RID}", "registration"),  # identity service
        (f"0NE00000000%2FREGISTRATIONS%2F{RID.upper()}", "registration"),
    ],
)
def test_each_clients_spelling_of_the_token_is_taken(resource: str, key_name: str | None) -> None:
    cloud = Cloud()
    cloud.challenge()
    token = cloud.token(resource, key_name=key_name)
    assert cloud.send("PUT", register_path(RID), cloud.body(), token).status == 202


def test_ids_differ_in_case_only_and_may_come_percent_encoded() -> None:
    mixed = Enrollment("Press:07", DEVICE.ek_public)
    cloud = Cloud(mixed)
    answer = cloud.send("PUT", register_path("pRESS%3A07"), {"registrationId": "PRESS:07", "tpm": DEVICE.attestation()})
    cloud.key = DEVICE.activate(content(answer)["authenticationKey"])
    token = cloud.token("0ne00000000%2Fregistrations%2Fpress%3A07")
    assert cloud.send("PUT", register_path("press:07"), {}, token).status == 202
    assert content(cloud.send("POST", lookup_path("Press:07"), {}, token))["registrationId"] == "Press:07"


def test_a_cleared_tpm_registers_with_the_same_enrolment() -> None:
    cloud = Cloud()
    cloud.provision()
    cloud.device = DEVICE.cleared()
    state = cloud.provision()
    assert cloud.device.activate(state["tpm"]["authenticationKey"]).key == cloud.service.hub_key(HUBS[0], "press-07")


# --- refusals


def test_a_request_that_is_wrong_is_refused_with_its_code() -> None:
    cloud = Cloud()
    good = cloud.body()
    attestation = DEVICE.attestation()
    bad_ids = ("", "-a", "a.", "a_", "a:", "ä", "a b", "a" * 129)

    def put(body: object, **more: Any) -> Response:
        return cloud.send("PUT", register_path(RID), body, **more)

    cases = {
        "api-version absent": (put(good, query=""), 400001),
        "api-version empty": (put(good, query="api-version="), 400001),
        "scope": (cloud.send("PUT", register_path(RID).replace("0ne", "1ne"), good), 404200),
        "path": (cloud.send("GET", "/", good), 404200),
        "method": (cloud.send("POST", register_path(RID), good), 405001),
        "media type": (put(good, content_type="text/plain"), 415001),
        "other id": (put({**good, "registrationId": RID + "x"}), 400001),
        "id not text": (put({**good, "registrationId": 7}), 400001),
        "unknown": (cloud.send("PUT", register_path("nobody"), {"tpm": attestation}), 404201),
        "unknown on lookup": (cloud.send("POST", lookup_path("nobody"), {"tpm": attestation}), 404201),
        "no JSON": (put(b"{"), 400001),
        "empty": (put(b""), 400001),
        "NaN": (put(b'{"payload":{"a":NaN}}'), 400001),
        "not UTF-8": (put(b'{"a":"\xff"}'), 400001),
        "too deep": (put(b"[" * 90_000), 400001),
        "too large": (put(b" " * (96 * 1024) + b"{}"), 413001),
        "no object": (put([good]), 400001),
        "payload": (put({**good, "payload": "text"}), 400001),
        "tpm": (put({**good, "tpm": 1}), 400001),
        "ek absent": (put({"tpm": {}}), 400001),
        "ek no base64": (put({"tpm": {**attestation, "endorsementKey": "a b"}}), 400001),
        "ek off template": (put({"tpm": {**attestation, "endorsementKey": attestation["storageRootKey"]}}), 400004),
        "another ek": (put({"tpm": another().attestation()}), 400004),
        "another ek on lookup": (cloud.send("POST", lookup_path(RID), {"tpm": another().attestation()}), 400004),
        "srk absent": (put({"tpm": {"endorsementKey": attestation["endorsementKey"]}}), 400005),
        "srk off template": (put({"tpm": {**attestation, "storageRootKey": attestation["endorsementKey"]}}), 400005),
        "nothing to challenge": (put({}), 401002),
        "nothing to challenge on lookup": (cloud.send("POST", lookup_path(RID), {}), 401002),
    } | {f"id {text!r}": (cloud.send("PUT", register_path(text), {}), 400001) for text in bad_ids}
    for name, (answer, code) in cases.items():
        assert answer.error_code == code, f"{name}: {answer.body!r}"
        assert_refused(answer, code)
    assert header(cases["method"][0], "Allow") == "PUT"


def test_a_wrong_token_is_refused_and_never_answered_with_a_challenge() -> None:
    cloud = Cloud()
    cloud.challenge()
    resource = f"0ne00000000%2Fregistrations%2F{RID}"
    stranger = ActivatedKey(bytes(32), 0, "")
    for name, token in {
        "another key": stranger.token(resource, int(NOW) + 60),
        "another resource": cloud.token(resource + "x"),
        "a hub's resource": cloud.token(f"{HUBS[0]}%2Fdevices%2Fpress-07"),
        "another key name": cloud.token(key_name="owner"),
        "expired beyond the skew": cloud.token(life_s=-300),
        "cut": cloud.token()[:-40],
        "of another kind": "Bearer x",
    }.items():
        answer = cloud.send("PUT", register_path(RID), cloud.body(), token)
        assert answer.error_code == 401002, f"{name}: {answer.body!r}"
        assert_refused(answer, 401002)
    assert cloud.send("PUT", register_path(RID), cloud.body(), cloud.token(life_s=-299)).status == 202


def test_the_newest_challenge_wins_and_grows_old() -> None:
    cloud = Cloud()
    cloud.challenge()
    earlier = cloud.token()
    operation_id = cloud.register()
    assert_refused(cloud.send("PUT", register_path(RID), cloud.body(), earlier), 401002)
    cloud.now += 3600
    assert cloud.poll(operation_id).status == 200
    cloud.now += 1
    assert_refused(cloud.poll(operation_id), 401002)


def test_a_token_is_for_its_own_device() -> None:
    cloud = Cloud()
    cloud.service.enroll(Enrollment("other", another().ek_public))
    cloud.challenge()
    assert_refused(cloud.send("PUT", register_path("other"), {}, cloud.token()), 401002)


def test_a_poll_needs_a_token_and_an_operation_that_exists() -> None:
    cloud = Cloud()
    operation_id = cloud.register()
    assert_refused(cloud.send("GET", operation_path(RID, operation_id)), 401002)
    assert_refused(cloud.poll(operation_id + "0"), 404202)


def test_another_srk_than_the_challenged_one_is_refused() -> None:
    cloud = Cloud()
    cloud.challenge()
    body = {"tpm": DEVICE.attestation() | {"storageRootKey": another().attestation()["storageRootKey"]}}
    assert_refused(cloud.send("PUT", register_path(RID), body, cloud.token()), 400005)


def test_an_enrolment_that_changes_its_ek_locks_the_challenged_device_out() -> None:
    cloud = Cloud()
    cloud.challenge()
    cloud.service.enroll(Enrollment(RID, another().ek_public))
    assert_refused(cloud.send("PUT", register_path(RID), {}, cloud.token()), 400004)


def test_a_disabled_enrolment_is_refused_at_once() -> None:
    cloud = Cloud(Enrollment(RID, DEVICE.ek_public, enabled=False))
    assert_refused(cloud.send("PUT", register_path(RID), cloud.body()), 403001)
    assert_refused(cloud.send("POST", lookup_path(RID), cloud.body()), 403001)


def test_refusal_by_operation_lets_the_operation_fail() -> None:
    disabled = Cloud(Enrollment(RID, DEVICE.ek_public, enabled=False), refuse_by="operation")
    state = disabled.provision()
    assert (state["status"], state["errorCode"]) == ("disabled", 403001) and "assignedHub" not in state
    unknown = Cloud(Enrollment("other", DEVICE.ek_public), refuse_by="operation")
    state = unknown.provision()
    assert (state["status"], state["errorCode"]) == ("failed", 404201) and state["errorMessage"]
    assert unknown.lookup()["status"] == "failed"


def test_a_hub_that_is_not_linked_fails_and_keeps_the_old_assignment() -> None:
    cloud = Cloud()
    cloud.provision()
    key = cloud.service.hub_key(HUBS[0], "press-07")
    cloud.service.move(RID, "three.azure-devices.net")
    assert cloud.provision()["errorCode"] == 400208
    assert cloud.service.hub_key(HUBS[0], "press-07") == key


def test_an_enrolment_deleted_meanwhile_fails_the_operation() -> None:
    cloud = Cloud(assign_after_s=1, refuse_by="operation")
    operation_id = cloud.register()
    del cloud.service.enrollments[RID]
    cloud.now += 1
    assert content(cloud.poll(operation_id))["registrationState"]["errorCode"] == 404201


def test_enroll_any_takes_a_stranger_once_and_then_holds_on_to_its_ek() -> None:
    cloud = Cloud(enroll_any=True)
    stranger = another()
    body = {"tpm": stranger.attestation()}
    answer = cloud.send("PUT", register_path("new"), body)
    assert answer.status == 401 and "new" not in cloud.service.enrollments, "anybody can claim to be a TPM"
    cloud.key = stranger.activate(content(answer)["authenticationKey"])
    answer = cloud.send("PUT", register_path("new"), body, cloud.token("0ne00000000%2Fregistrations%2Fnew"))
    assert answer.status == 202 and "new" in answer.notice
    assert cloud.service.enrollments["new"].endorsement_key == stranger.ek_public
    assert_refused(cloud.send("PUT", register_path("new"), {"tpm": DEVICE.attestation()}), 400004)
    assert_refused(cloud.send("POST", lookup_path("newer"), {"tpm": DEVICE.attestation()}), 404201)


class Counted(PlainRegistrations):
    """Counts what is read of it."""

    reads = 0

    def __getitem__(self, key: str) -> Any:
        self.reads += 1
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.reads += 1
        return super().get(key, default)

    def at(self, hub: str, device_id: str) -> Any:
        self.reads += 1
        return super().at(hub, device_id)


def test_a_token_is_verified_before_anything_but_its_key_is_looked_up() -> None:
    cloud = Cloud()
    cloud.challenge()
    enrollments: Any = Counted(cloud.service.enrollments)
    registrations = Counted()
    cloud.service.enrollments, cloud.service.registrations = enrollments, registrations
    for registration_id in (RID, "nobody"):
        resource = f"0ne00000000%2Fregistrations%2F{registration_id}"
        for token, reads in (
            ("nonsense", 0),
            (cloud.token(resource)[:-1] + "x", 0),
            (cloud.token(resource, life_s=-3600), 0),
            (cloud.token("0ne00000000%2Fregistrations%2Fother"), 0),
            (cloud.token(resource).replace("sig=", "sig=AAAA"), 1),
        ):
            for method, path in (
                ("PUT", register_path(registration_id)),
                ("POST", lookup_path(registration_id)),
                ("GET", operation_path(registration_id, "4.x.y")),
            ):
                body = None if method == "GET" else {"tpm": DEVICE.attestation()}
                enrollments.reads = 0
                assert_refused(cloud.send(method, path, body, token), 401002)
                assert enrollments.reads == reads, token
    assert registrations.reads == 0
    body = {"tpm": DEVICE.attestation()}
    assert cloud.send("PUT", register_path(RID), body, cloud.token()).status == 202, "a challenge needs no look"


def test_a_hubs_key_is_found_by_one_look() -> None:
    cloud = Cloud()
    registrations = Counted()
    cloud.service.registrations = registrations
    state = cloud.provision()
    hub, device_id = state["assignedHub"], state["deviceId"]
    registrations.reads = 0
    assert cloud.service.hub_key(hub.upper(), device_id.upper()) and cloud.service.hub_key(hub, "nobody") is None
    assert registrations.reads == 2
    cloud.service.move(RID, HUBS[1])
    assert cloud.provision()["assignedHub"] == HUBS[1]
    assert cloud.service.hub_key(HUBS[1], device_id) and cloud.service.hub_key(hub, device_id) is None


@pytest.mark.parametrize(
    "body",
    [
        b'{"payload": {"a": "\\ud800"}}',
        b'{"payload": {"a": 1e999}}',
        b'{"payload": {"a": NaN}}',
        b'{"payload": {"a": ' + b"9" * 5000 + b"}}",
        b'{"payload": {"a": ' + b"[" * 600 + b"]" * 600 + b"}}",
        b'{"a": ' + b"[" * 90_000,
        b'{"registrationId": "\xff"}',
    ],
)
def test_json_that_could_not_be_sent_back_is_refused(body: bytes) -> None:
    assert_refused(Cloud().send("PUT", register_path(RID), body), 400001)


def test_challenges_that_nobody_answers_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "CHALLENGES_KEPT", 3)
    cloud = Cloud(enroll_any=True)
    for number in range(20):
        assert cloud.send("PUT", register_path(f"r{number}"), {"tpm": DEVICE.attestation()}).status == 401
    assert list(cloud.service._challenges) == ["r17", "r18", "r19"]


# --- reprovisioning


@pytest.mark.parametrize(
    ("update", "migrate", "moves", "hub", "substatus"),
    [
        (True, True, False, 0, "reprovisionedToInitialAssignment"),
        (True, True, True, 1, "deviceDataMigrated"),
        (True, False, True, 1, "deviceDataReset"),
        (False, False, True, 0, "initialAssignment"),
    ],
)
def test_the_reprovisioning_policy_decides_hub_and_substatus(
    update: bool, migrate: bool, moves: bool, hub: int, substatus: str
) -> None:
    policy = Enrollment(RID, DEVICE.ek_public, "d", update_hub_assignment=update, migrate_device_data=migrate)
    cloud = Cloud(policy)
    first = cloud.provision()
    old_key = cloud.service.hub_key(HUBS[0], "d")
    if moves:
        cloud.service.move(RID, HUBS[1])
    cloud.now += 60.25
    second = cloud.provision()
    assert (second["assignedHub"], second["substatus"]) == (HUBS[hub], substatus)
    assert second["createdDateTimeUtc"] == first["createdDateTimeUtc"]
    assert (second["etag"] != first["etag"]) == update
    assert second["lastUpdatedDateTimeUtc"] == (
        "2026-09-21T14:14:20.2500000Z" if update else first["lastUpdatedDateTimeUtc"]
    )
    if hub == 1:
        assert cloud.service.hub_key(HUBS[0], "d") is None, "the old hub's device entry is removed"
    else:
        assert cloud.service.hub_key(HUBS[0], "d") == old_key


def test_hub_key_rotate_gives_a_new_key_each_time() -> None:
    cloud = Cloud(hub_key="rotate")
    keys = {DEVICE.activate(cloud.provision()["tpm"]["authenticationKey"]).key for _ in range(3)}
    assert len(keys) == 3


def test_allocation_rotates_or_hashes_or_takes_the_first() -> None:
    rotating = Cloud(allocation="rotate")
    assert [rotating.provision()["assignedHub"] for _ in range(3)] == [HUBS[0], HUBS[1], HUBS[0]]
    assert [Cloud().provision()["assignedHub"] for _ in range(2)] == [HUBS[0], HUBS[0]]
    hashed = {}
    for number in range(20):
        cloud = Cloud(Enrollment(f"device-{number}", DEVICE.ek_public), allocation="hashed")
        service = cloud.service
        service.accept(f"device-{number}", None, None, NOW)
        hashed[number] = service.registrations[f"device-{number}"].assignment.hub  # type: ignore[union-attr]
    assert set(hashed.values()) == set(HUBS)


# --- the lookup


def test_a_lookup_is_flat_and_changes_nothing() -> None:
    cloud = Cloud()
    final = cloud.provision()
    before = dict(cloud.service.registrations)
    found = cloud.lookup()
    assert found.keys() == final.keys() and "operationId" not in found and "registrationState" not in found
    assert found | {"tpm": 0} == final | {"tpm": 0}
    assert DEVICE.activate(found["tpm"]["authenticationKey"]).key == cloud.service.hub_key(HUBS[0], "press-07")
    assert cloud.service.registrations == before


def test_a_lookup_without_a_token_is_challenged_and_before_any_registration_unassigned() -> None:
    cloud = Cloud()
    answer = cloud.send("POST", lookup_path(RID), cloud.body())
    assert answer.status == 401
    cloud.key = DEVICE.activate(content(answer)["authenticationKey"])
    assert cloud.lookup() == {"registrationId": RID, "status": "unassigned"}


def test_stale_lookups_answer_with_the_previous_assignment() -> None:
    cloud = Cloud(stale_lookups=3, allocation="rotate", assign_after_s=1)
    cloud.register()
    cloud.now += 1
    assert [cloud.lookup()["status"] for _ in range(4)] == ["unassigned"] * 3 + ["assigned"]
    first = cloud.lookup()
    operation_id = cloud.register()
    assert [cloud.lookup()["etag"] for _ in range(2)] == [first["etag"]] * 2
    cloud.now += 1
    assert content(cloud.poll(operation_id))["registrationState"]["assignedHub"] == HUBS[1]
    stale, fresh = cloud.lookup(), cloud.lookup()
    assert (stale["assignedHub"], fresh["assignedHub"]) == HUBS
    assert (
        DEVICE.activate(stale["tpm"]["authenticationKey"]).key != DEVICE.activate(fresh["tpm"]["authenticationKey"]).key
    )


def test_no_key_leaves_the_key_out_of_lookups_only() -> None:
    cloud = Cloud(lookup="no-key")
    assert "tpm" in cloud.provision()
    found = cloud.lookup()
    assert found["status"] == "assigned" and "tpm" not in found


@pytest.mark.parametrize(("lookup", "code"), [(401, 401002), (404, 404201)])
def test_lookups_can_be_refused_altogether(lookup: int, code: int) -> None:
    cloud = Cloud(lookup=lookup)
    cloud.provision()
    assert_refused(cloud.send("POST", lookup_path(RID), cloud.body(), cloud.token()), code)
    assert_refused(cloud.send("POST", lookup_path(RID), cloud.body()), code)


# --- keys and tokens


def test_key_size_and_lockout_attribute_are_as_set() -> None:
    opened = DEVICE.activate(Cloud(no_da=False, key_bytes=65).provision()["tpm"]["authenticationKey"])
    assert (opened.attributes, len(opened.key)) == (0x40040, 65)


def test_hub_tokens_are_judged_by_key_name_and_time() -> None:
    cloud = Cloud()
    hub_key = DEVICE.activate(cloud.provision()["tpm"]["authenticationKey"])
    service, later = cloud.service, int(NOW) + 60
    for resource in (
        f"{HUBS[0]}%2Fdevices%2Fpress-07",
        f"{HUBS[0]}/devices/press-07",
        f"{HUBS[0]}/devices/press%252D07",
    ):
        assert service.hub_token_refusal(hub_key.token(resource, later, None), NOW) is None
    for token, reason in (
        (cloud.token(f"{HUBS[0]}%2Fdevices%2Fpress-07"), "signature"),
        (hub_key.token(f"{HUBS[1]}%2Fdevices%2Fpress-07", later), "no device 'press-07' is assigned to 'two"),
        (hub_key.token(f"{HUBS[0]}%2Fthings%2Fpress-07", later), "sr is not"),
        (hub_key.token(f"{HUBS[0]}%2Fdevices%2Fpress-07%2Fx", later), "sr is not"),
        (hub_key.token(f"{HUBS[0]}%2Fdevices%2Fpress-07", int(NOW) - 300), "expired at 2026"),
        ("rubbish", "does not begin"),
    ):
        refusal = service.hub_token_refusal(token, NOW)
        assert refusal and reason in refusal


def test_no_secret_is_in_any_repr() -> None:
    cloud = Cloud()
    hub_key = DEVICE.activate(cloud.provision()["tpm"]["authenticationKey"]).key
    request = Request("PUT", "/", "", {"authorization": "geheim"}, b"geheim")
    shown = repr((cloud.service.registrations, cloud.service._challenges, request, cloud.poll(cloud.register())))
    assert repr(hub_key)[2:-1] not in shown and "geheim" not in shown and "authenticationKey" not in shown


def test_a_registration_survives_as_json() -> None:
    for cloud in (Cloud(), Cloud(Enrollment(RID, DEVICE.ek_public, enabled=False), refuse_by="operation")):
        cloud.provision()
        registration = cloud.service.registrations[RID]
        assert Registration.from_json(json.loads(json.dumps(registration.to_json()))) == registration


def test_equal_requests_randomness_and_time_give_equal_answers() -> None:
    one, other = Cloud().provision(), Cloud().provision()
    keys = [DEVICE.activate(state.pop("tpm")["authenticationKey"]) for state in (one, other)]
    assert one == other and vars(keys[0]) == vars(keys[1])
