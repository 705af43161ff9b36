"""Devices with a symmetric key at the service: what it grants and refuses, and what their hub accepts."""

from __future__ import annotations

import base64
import json
import random
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from dps_emulator.attestation import SymmetricKeys, derived_key, key_of
from dps_emulator.cli import main
from dps_emulator.control_socket import ControlError
from dps_emulator.enrollments import Enrollment
from dps_emulator.service import DpsService, Request, Response, Settings
from dps_emulator.state import open_store
from dps_emulator.tokens import parse_token
from emulator.device_side import Client, Device, lookup_path, operation_path, register_path, signed_token
from support.cloud.emulator import DeviceCredentials, EmulatorInThread
from support.cloud.memory import PlainRegistrations

NOW = 1_790_000_000.0
HUB = "emulator.azure-devices.net"
KEY, OTHER_KEY = bytes(range(32)), bytes(range(1, 33))
GROUP_KEY = bytes(range(64))
RESOURCE = "0ne00000000%2Fregistrations%2Fvector-device"
DEVICE = Device.of_the_vectors()
ONE = Enrollment("vector-device", SymmetricKeys(KEY, OTHER_KEY), "press-07")
GROUP = Enrollment("presses", SymmetricKeys(GROUP_KEY, OTHER_KEY * 2), is_group=True)


class Cloud:
    """A service with an enrolment and a group, on a clock that tests turn."""

    def __init__(self, *enrollments: Enrollment, **settings: Any) -> None:
        self.now = NOW
        self.service = DpsService(Settings(**settings), {}, PlainRegistrations(), random.Random(1).randbytes)
        for enrollment in enrollments or (ONE, GROUP):
            self.service.enroll(enrollment)

    def send(self, method: str, path: str, body: object, token: str | None) -> Response:
        headers = {"content-type": "application/json"} | ({"authorization": token} if token else {})
        encoded = b"" if body is None else json.dumps(body).encode()
        return self.service.answer(Request(method, path, "api-version=2021-10-01", headers, encoded), self.now)

    def register(self, name: str, key: bytes, **token: Any) -> Response:
        return self.send("PUT", register_path(name), {"registrationId": name}, self.token(name, key, **token))

    def token(self, name: str, key: bytes, life_s: int = 3600, resource: str = "", **more: Any) -> str:
        resource = resource or f"0ne00000000%2Fregistrations%2F{name}"
        return signed_token(key, resource, int(self.now) + life_s, **more)

    def provision(self, name: str, key: bytes) -> Any:
        """A whole registration; the finished state, which a lookup has as well."""
        registered = self.register(name, key)
        assert registered.status == 202, registered.body
        path = operation_path(name, json.loads(registered.body)["operationId"])
        polled = self.send("GET", path, None, self.token(name, key))
        found = self.send("POST", lookup_path(name), {}, self.token(name, key))
        assert (polled.status, found.status) == (200, 200)
        state = json.loads(polled.body)["registrationState"]
        assert json.loads(found.body) == state
        return state


def assert_unauthorized(answer: Response, says: str) -> None:
    details = json.loads(answer.body)
    assert (answer.status, details["errorCode"]) == (401, 401002) and says in details["message"], details
    assert "authenticationKey" not in details, "no challenge: there is no TPM to answer it"


def test_the_published_key_of_a_device_of_a_group_is_derived() -> None:
    group_key = key_of("8isrFI1sGsIlvvFSSFRiMfCNzv21fjbE/+ah/lSh3lF8e2YG1Te7w1KpZhJFFXJrqYKi9yegxkqIChbqOS9Egw==")
    device_key = derived_key(group_key, "sn-007-888-abc-mac-a1-b2-c3-d4-e5-f6")
    assert base64.b64encode(device_key).decode() == "Jsm0lyGpjaVYVP2g3FnmnmG9dI/9qU24wNoykUmermc="


@pytest.mark.parametrize(
    ("key", "token"),
    [
        (KEY, f"sr={RESOURCE}&sig=OnhY3u%2BQR8MlUplodohSvySKWd82i52apoMmnVLYT%2BM%3D&se=1893456000&skn=registration"),
        (KEY, f"sr={RESOURCE.lower()}&sig=nn8OPWSmIf88YiNE28sYBKuBY2dKPJrmkeuVPAtsDmo%3D&se=1893456000"),
        (KEY, f"sr={unquote(RESOURCE)}&sig=akDCpOulDZcvLxR3XvdtQ4RcnL9dAbKoowWgNDV3ERA%3D&se=1893456000"),
        (None, f"sr={RESOURCE}-g&sig=G4eZ9qklEGIrSHRoHxj%2F3GvWrdoGqQXGQakaPr9175E%3D&se=1893456000&skn=registration"),
    ],
)
def test_tokens_of_official_clients_are_accepted_as_they_spell_them(key: bytes | None, token: str) -> None:
    name = "vector-device" if key else "vector-device-g"
    signed = parse_token(f"SharedAccessSignature {token}")
    assert signed.signed_by(key or derived_key(GROUP_KEY, name))
    sent = Cloud().send("PUT", register_path(name), {"registrationId": name}, f"SharedAccessSignature {token}")
    assert sent.status == 202, sent.body


@pytest.mark.parametrize("key", [KEY, OTHER_KEY])
def test_a_device_registers_with_either_of_its_keys_and_is_handed_none(key: bytes) -> None:
    cloud = Cloud()
    state = cloud.provision("vector-device", key)
    assert (state["status"], state["assignedHub"], state["deviceId"]) == ("assigned", HUB, "press-07")
    assert state["symmetricKey"] == {} and "tpm" not in state and "x509" not in state
    credential = cloud.service.credential_at(HUB, "press-07")
    assert credential is not None and credential.keys == (KEY, OTHER_KEY)


def test_a_group_takes_whoever_has_a_key_derived_from_its_own() -> None:
    cloud = Cloud()
    for name in ("press-1", "press-2"):
        state = cloud.provision(name, derived_key(GROUP_KEY, name))
        assert (state["registrationId"], state["deviceId"]) == (name, name)
        assert state["symmetricKey"] == {"enrollmentGroupId": "presses"}
        credential = cloud.service.credential_at(HUB, name)
        assert credential is not None
        assert credential.keys == (derived_key(GROUP_KEY, name), derived_key(OTHER_KEY * 2, name))
    again = cloud.provision("press-1", derived_key(OTHER_KEY * 2, "press-1"))
    assert again["substatus"] == "reprovisionedToInitialAssignment"


@pytest.mark.parametrize(
    ("name", "key", "token", "says"),
    [
        ("vector-device", bytes(32), {}, "not signed by a key of the device's enrolment"),
        ("vector-device", derived_key(GROUP_KEY, "vector-device"), {}, "not signed by"),  # its own enrolment decides
        ("press-1", GROUP_KEY, {}, "not signed by"),  # a group's key is no device's
        ("press-1", derived_key(GROUP_KEY, "press-2"), {}, "not signed by"),
        ("Press-1", derived_key(GROUP_KEY, "press-1"), {}, "not signed by"),
        ("vector-device", KEY, {"life_s": -301}, "it expired at"),
        ("vector-device", KEY, {"key_name": "provisioningserviceowner"}, "skn is not 'registration'"),
        ("vector-device", KEY, {"resource": "0ne00000000%2Fregistrations%2Fpress-1"}, "sr is for another resource"),
        ("vector-device", KEY, {"resource": "0ne00000001%2Fregistrations%2Fvector-device"}, "sr is for another"),
    ],
)
def test_what_is_not_the_devices_own_is_refused(name: str, key: bytes, token: dict[str, Any], says: str) -> None:
    assert_unauthorized(Cloud().register(name, key, **token), says)


def test_without_a_token_there_is_nothing_for_a_device_with_a_key() -> None:
    cloud = Cloud()
    assert_unauthorized(cloud.send("PUT", register_path("vector-device"), {}, None), "Authorization is missing")
    assert_unauthorized(cloud.send("POST", lookup_path("vector-device"), {}, None), "Authorization is missing")
    operation_id = json.loads(cloud.register("vector-device", KEY).body)["operationId"]
    path = operation_path("vector-device", operation_id)
    assert_unauthorized(cloud.send("GET", path, None, None), "Authorization is missing")
    assert_unauthorized(cloud.send("GET", path, None, cloud.token("vector-device", bytes(16))), "not signed by")


def test_a_tpm_is_no_key_and_a_key_no_tpm() -> None:
    cloud = Cloud(ONE, Enrollment(DEVICE.registration_id, DEVICE.ek_public), GROUP)
    body = {"tpm": DEVICE.attestation()}
    for token in (None, cloud.token("vector-device", KEY)):
        answer = cloud.send("PUT", register_path("vector-device"), body, token)
        assert (answer.status, json.loads(answer.body)["errorCode"]) == (400, 400004)
    key = derived_key(GROUP_KEY, DEVICE.registration_id)
    assert_unauthorized(cloud.register(DEVICE.registration_id, key), "No challenge is open")
    assert cloud.send("PUT", register_path(DEVICE.registration_id), body, None).status == 401, "its challenge"


@pytest.mark.parametrize("disabled", [ONE, GROUP])
def test_a_disabled_enrolment_is_told_to_who_has_its_key_alone(disabled: Enrollment) -> None:
    off = Enrollment(disabled.registration_id, disabled.attestation, enabled=False, is_group=disabled.is_group)
    name, key = ("press-1", derived_key(GROUP_KEY, "press-1")) if off.is_group else ("vector-device", KEY)
    answer = Cloud(off).register(name, key)
    assert (answer.status, json.loads(answer.body)["errorCode"]) == (403, 403001)
    assert_unauthorized(Cloud(off).register(name, bytes(32)), "not signed by")
    state = Cloud(off, refuse_by="operation").provision(name, key)
    assert (state["status"], state["errorCode"]) == ("disabled", 403001)


def test_a_group_that_is_deleted_meanwhile_ends_the_operation() -> None:
    cloud = Cloud(assign_after_s=10)
    key = derived_key(GROUP_KEY, "press-1")
    cloud.register("press-1", key)
    cloud.service.groups.clear()
    cloud.now += 11
    state = cloud.service.settled("press-1", cloud.now)
    assert state is not None and state.operation.failure is not None and state.operation.failure.code == 404201


def test_the_hub_accepts_tokens_by_either_key_and_by_no_other() -> None:
    with EmulatorInThread(Settings(retry_after_s=0), [ONE, GROUP]) as emulator:
        name, key = "press-1", derived_key(GROUP_KEY, "press-1")
        token = signed_token(key, f"0ne00000000%2Fregistrations%2F{name}", 4_000_000_000)
        with Client(emulator.port, emulator.ca_file) as client:
            assert client.call("PUT", register_path(name), {"registrationId": name}, token)[0] == 202
            status, _, state = client.call("POST", lookup_path(name), {"registrationId": name}, token)
        assert status == 200 and state["symmetricKey"] == {"enrollmentGroupId": "presses"}
        for signing, refusal in (
            (key, None),
            (derived_key(OTHER_KEY * 2, name), None),
            (GROUP_KEY, f"its signature is not by the key of '{name}' at '{HUB}'"),
        ):
            text = DeviceCredentials(HUB, name, signing).token()
            assert emulator.service.hub_token_refusal(text, NOW) == refusal
        with pytest.raises(ControlError, match="change its enrolment"):
            emulator.rotate_key(name)


def test_enrolments_and_groups_survive_and_show_no_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state_dir, key_file = tmp_path / "state", tmp_path / "key"
    key_file.write_text(base64.b64encode(GROUP_KEY).decode() + "\n")
    folder = ["--state-dir", str(state_dir)]
    assert main(["enroll", "press-07", *folder, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)["enrollment"]
    made = record["attestation"]["symmetricKey"]["primaryKey"]
    assert len(key_of(made)) == 64
    assert main(["enroll", "presses", "--group", "--key-file", str(key_file), *folder]) == 0
    assert main(["enrollments", *folder]) == 0
    assert main(["enrollment", "disable", "presses", "--group", *folder]) == 0
    assert main(["enrollment", "show", "presses", "--group", *folder]) == 0
    said = capsys.readouterr().out
    assert "press-07: enabled, symmetric key, has not registered yet" in said and "presses: group, enabled" in said
    assert '"provisioningStatus": "disabled"' in said
    assert made not in said and base64.b64encode(GROUP_KEY).decode() not in said
    store = open_store(state_dir)
    assert store.groups["presses"].keys == SymmetricKeys(GROUP_KEY, GROUP_KEY) and not store.groups["presses"].enabled
    assert store.enrollments["press-07"].keys == SymmetricKeys(key_of(made), key_of(made))
    store.close()
    key_file.write_text("short")
    assert main(["enroll", "press-08", "--key-file", str(key_file), *folder]) == 2
    assert main(["enrollment", "show", "press", "--group", *folder]) == 1
    assert "did you mean 'presses'?" in capsys.readouterr().err


def test_a_device_s_key_is_derived_of_a_group_s_in_a_file_or_a_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key_file, state_dir = tmp_path / "key", str(tmp_path / "state")
    key_file.write_text(base64.b64encode(GROUP_KEY).decode() + "\n")
    expected = "/c2xed/sFp3XIFaWjICWUXkH1b4sdVTnBJKKlOmjNlg=\n"  # as the official clients derive it
    assert main(["derive-key", "vector-device-g", "--key-file", str(key_file)]) == 0
    assert capsys.readouterr().out == expected
    assert main(["enroll", "presses", "--group", "--key-file", str(key_file), "--state-dir", state_dir]) == 0
    capsys.readouterr()
    assert main(["derive-key", "vector-device-g", "--group", "presses", "--state-dir", state_dir]) == 0
    assert capsys.readouterr().out == expected
    assert main(["derive-key", "Press-1", "--key-file", str(key_file), "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["deviceKey"] == base64.b64encode(derived_key(GROUP_KEY, "Press-1")).decode()
    assert "'Press-1' as it is written" in err
    short = tmp_path / "short"
    short.write_text("AAEC")
    for words, said in (
        (["press-1"], "expected --key-file, or --group"),
        (["press-1", "--group", "presses"], "expected --key-file, or --group"),
        (["press-1", "--group", "others", "--state-dir", state_dir], "no enrolment group 'others'"),
        (["a b", "--key-file", str(key_file)], "no registration id"),
        (["press-1", "--key-file", str(short)], "has 3 bytes"),
    ):
        assert main(["derive-key", *words]) == 2, words
        out, err = capsys.readouterr()
        assert said in err and not out, err


def test_a_database_of_the_version_before_gets_its_groups(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.enroll([ONE])
    store.rows("DROP TABLE enrollment_groups")
    store.rows("PRAGMA user_version = 1")
    store.close()
    store = open_store(tmp_path)
    assert store.enroll([ONE, GROUP]) == 1 and list(store.groups.values()) == [GROUP]
    store.close()
