"""A device with a key of its own on Linux: against the emulator, by command line and library, and sealed by a TPM."""

import base64
import json
import os
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dps_agent.host import hub_token, load
from dps_agent.host.cli import main
from dps_agent.host.config import Configuration, ConfigurationError, backend_shown
from dps_agent.host.parts import open_device, tpm_warnings
from dps_agent.host.sealing import seal_key_file
from dps_emulator.attestation import SymmetricKeys, derived_key, key_text
from dps_emulator.enrollments import Enrollment
from dps_emulator.service import Settings
from dps_hal.errors import AskOperator
from dps_hal.platform import hmac_sha256
from support.cloud.emulator import EmulatorInThread
from support.tpm.states import copy_state
from support.tpm.swtpm import Swtpm
from support.tpm.tap import TpmTap

DEVICE = "press-07"
KEY = bytes(range(32))
GROUP_KEY = bytes(range(64))
OTHER = bytes(range(1, 49))
HUB = "emulator.azure-devices.net"
Document = dict[str, Any]


class Bench:
    """A device that has a key, and no TPM unless it is given one."""

    def __init__(self, folder: Path, emulator: EmulatorInThread, capsys: pytest.CaptureFixture[str]) -> None:
        self.emulator = emulator
        self.capsys = capsys
        self.key_file = folder / "device.key"
        self.state_dir = folder / "state"
        self.settings = folder / "given.toml"
        self.printed = ""
        self.give(KEY)
        self.configure()

    def give(self, key: bytes, mode: int = 0o600) -> None:
        self.key_file.write_text(key_text(key) + "\n")
        self.key_file.chmod(mode)

    def configure(self, registration_id: str = DEVICE, tpm: str = "") -> None:
        self.settings.write_text(
            f'id_scope = "0ne00000000"\nregistration_id = "{registration_id}"\nattestation = "symmetric-key"\n'
            f'device_key_file = "{self.key_file}"\nendpoint = "https://localhost"\n'
            f'connect_to = "{self.emulator.connect_to}"\nca_file = "{self.emulator.ca_file}"\n'
            f'state_dir = "{self.state_dir}"\nruntime_dir = "{self.state_dir}"\n'
            f'[hub]\nconnect_to = "{self.emulator.hub_connect_to}"\nca_file = "{self.emulator.ca_file}"\n{tpm}'
        )

    def loaded(self) -> Configuration:
        return load(self.settings, environ={})

    def command(self, *words: str, status: int = 0) -> Document:
        """What a verb prints as JSON; nothing of any key is among it."""
        assert main(["--json", "--config", str(self.settings), *words]) == status
        out, err = self.capsys.readouterr()
        self.printed += out + err
        document: Document = json.loads(out)
        return document

    def text(self, *words: str) -> str:
        assert main(["--config", str(self.settings), *words]) == 0
        out, err = self.capsys.readouterr()
        self.printed += out + err
        return out


@pytest.fixture(scope="module")
def emulator() -> Iterator[EmulatorInThread]:
    with EmulatorInThread(Settings(retry_after_s=0)) as running:
        yield running


@pytest.fixture
def bench(
    tmp_path: Path,
    emulator: EmulatorInThread,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Iterator[Bench]:
    for name in [name for name in os.environ if name.startswith(("DPS_AGENT_", "CREDENTIALS_"))]:
        monkeypatch.delenv(name)
    emulator.service.enroll(Enrollment(DEVICE, SymmetricKeys(KEY, OTHER)))
    made = Bench(tmp_path, emulator, capsys)
    yield made
    for secret in (KEY, GROUP_KEY, derived_key(GROUP_KEY, "group-1")):
        assert key_text(secret) not in made.printed and secret.hex() not in made.printed, "a key was printed"


@pytest.fixture(scope="module")
def tapped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TpmTap]:
    with Swtpm(tmp_path_factory.mktemp("swtpm") / "tpm") as machine, TpmTap(machine.port) as tap:
        yield tap


def test_a_device_registers_by_its_key_and_a_second_time_without_dps(bench: Bench) -> None:
    first = bench.command("provision")
    assert (first["assignedHub"], first["deviceId"], first["backend"]) == (HUB, DEVICE, "symmetric-key")
    assert not first["alreadyProvisioned"] and bench.command("provision")["alreadyProvisioned"]
    assert not bench.command("provision", "--force")["alreadyProvisioned"]
    shown = bench.text("status")
    assert "assigned to" in shown and f"the device's own key lies in a plain file, {bench.key_file}" in shown
    assert bench.command("status", "--remote")["differences"] == []


def test_the_second_key_of_the_enrolment_serves_as_well_and_another_one_does_not(bench: Bench) -> None:
    bench.give(OTHER)
    bench.command("provision")
    bench.give(bytes(32))
    refused = bench.command("provision", status=4)
    assert refused["error"]["code"] == "dps.key_refused"
    assert "did not accept the token" in refused["error"]["message"]


def test_a_token_by_the_key_is_one_that_the_hub_takes(bench: Bench) -> None:
    bench.command("provision")
    token = hub_token(bench.loaded())
    assert bench.emulator.service.hub_token_refusal(token, time.time()) is None


def test_a_group_s_device_has_the_key_that_the_maker_derives(bench: Bench, tmp_path: Path) -> None:
    bench.emulator.service.enroll(Enrollment("presses", SymmetricKeys(GROUP_KEY, OTHER), is_group=True))
    group_file = tmp_path / "group.key"
    group_file.write_text(key_text(GROUP_KEY))
    group_file.chmod(0o600)
    assert main(["enroll", "--derive", str(group_file), "--id", "Group-1"]) == 0
    out, err = bench.capsys.readouterr()
    assert out == key_text(derived_key(GROUP_KEY, "group-1")) + "\n" and "'group-1'" in err
    bench.give(derived_key(GROUP_KEY, "group-1"))
    bench.configure("Group-1")
    assert bench.command("provision")["deviceId"] == "group-1"
    bench.give(GROUP_KEY)
    assert bench.command("provision", "--force", status=4)["error"]["code"] == "dps.key_refused"
    answers = [one for one in bench.command("check", status=4)["checks"] if one["id"] == "dps-answers"]
    assert answers[0]["code"] == "dps.group_key" and "'group-1'" in answers[0]["detail"], answers
    bench.give(bytes(32))
    answers = [one for one in bench.command("check", status=4)["checks"] if one["id"] == "dps-answers"]
    assert answers[0]["code"] == "dps.key_refused", answers


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (("--derive", "FILE"), 2, "expected --id"),
        (("--derive", "FILE", "--id", "a b"), 2, "expected a registration id"),
        (("--derive", "FILE", "--id", "a", "--format", "csv"), 2, "prints a key and nothing else"),
        (("--derive", "/nowhere", "--id", "a"), 6, "cannot be read"),
        (("--derive", "WIDE", "--id", "a"), 6, "chmod 600"),
        (("--derive", "SHORT", "--id", "a"), 6, "expected base64 of 16 to 64 bytes"),
        (("--id", "a"), 2, "goes with --derive"),
    ],
)
def test_a_derivation_that_cannot_be_says_why(
    words: tuple[str, ...], status: int, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = tmp_path / "none.toml"
    settings.write_text("")
    files = {"FILE": (GROUP_KEY, 0o600), "WIDE": (GROUP_KEY, 0o640), "SHORT": (b"short", 0o600)}
    for name, (key, mode) in files.items():
        (tmp_path / name).write_text(key_text(key))
        (tmp_path / name).chmod(mode)
    named = [str(tmp_path / word) if word in files else word for word in words]
    assert main(["--config", str(settings), "enroll", *named]) == status
    out, err = capsys.readouterr()
    assert said in err and out == "" and key_text(GROUP_KEY) not in err


@pytest.mark.parametrize(
    ("content", "mode", "said"),
    [
        (key_text(KEY), 0o640, "chmod 600"),
        (key_text(bytes(15)), 0o600, "came 15 bytes"),
        ("HostName=h;DeviceId=d;SharedAccessKey=QUJD", 0o600, "expected base64 of 16 to 64 bytes"),
        ("", 0o600, "came none"),
        ('{"sealedBy": "tpm"}', 0o600, "it is damaged"),
        ('{"ekName": 7, "srkName": "", "wrappedKey": ""}', 0o600, "it is damaged"),
    ],
)
def test_a_file_that_holds_no_key_is_refused_with_its_name(bench: Bench, content: str, mode: int, said: str) -> None:
    bench.key_file.write_text(content)
    bench.key_file.chmod(mode)
    error = bench.command("provision", status=6)["error"]
    assert error["code"] == "config.invalid" and said in error["message"] and str(bench.key_file) in error["message"]
    assert not content or content[5:] not in error["message"]


def test_a_credential_of_the_file_s_name_comes_first(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.give(bytes(32))
    credentials = tmp_path / "credentials"
    credentials.mkdir()
    (credentials / bench.key_file.name).write_text(key_text(KEY))
    (credentials / bench.key_file.name).chmod(0o440)
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(credentials))
    bench.command("provision")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (('registration_id = "press-07"', ""), "registration_id: expected the device's own"),
        (('device_key_file = "KEY"', ""), "device_key_file: expected a file with the device's key"),
        (('attestation = "symmetric-key"', ""), 'device_key_file: expected attestation = "symmetric-key"'),
        (('attestation = "symmetric-key"', 'attestation = "password"'), "attestation: expected one of"),
        (("[hub]", "[tpm]\npersist_at = 0x81000100\n[hub]"), "tpm.persist_at: expected 0"),
    ],
)
def test_settings_that_do_not_fit_the_way_are_refused(bench: Bench, changes: tuple[str, str], said: str) -> None:
    former, instead = changes
    text = bench.settings.read_text()
    former = former.replace("KEY", str(bench.key_file))
    assert former in text
    bench.settings.write_text(text.replace(former, instead, 1))
    with pytest.raises(ConfigurationError) as refused:
        bench.loaded()
    assert any(problem.startswith(said) for problem in refused.value.problems), refused.value.problems


def test_another_way_is_another_identity_and_never_a_silent_one(bench: Bench, tmp_path: Path) -> None:
    bench.command("provision")
    folder = copy_state("press-07", tmp_path / "tpm")
    text = bench.settings.read_text().replace('attestation = "symmetric-key"\n', "")
    lines = [line for line in text.splitlines() if not line.startswith("device_key_file")]
    bench.settings.write_text("\n".join([*lines, f'[tpm]\nbackend = "simulator"\ntcti = "{folder}"\n']))
    stale = bench.command("status", status=3)
    assert stale["error"]["code"] == "record.stale" and "attestation 'symmetric-key'" in stale["error"]["message"]
    assert bench.command("provision", status=4)["error"]["code"] == "dps.ek_mismatch", "the enrolment is no TPM's"


def found(document: Document) -> dict[str, tuple[str, str]]:
    return {check["id"]: (check["result"], check["detail"]) for check in document["checks"]}


def test_check_looks_at_the_key_and_at_no_tpm(bench: Bench) -> None:
    before = found(bench.command("check"))
    assert not [name for name in before if name.startswith("tpm-")]
    assert before["device-key"][0] == "ok" and "whoever reads that is this device" in before["device-key"][1]
    bench.command("provision")
    after = found(bench.command("check"))
    assert after["record-seal"] == ("ok", "settings and seal fit: the device's key has made it")
    assert after["dps-answers"][0] == "ok" and "takes this device's key" in after["dps-answers"][1]
    asked = found(bench.command("check", "--only", "tpm-ek"))
    assert asked["tpm-ek"] == ("skipped", "no TPM is used")
    bench.configure(DEVICE.upper())
    assert "capitals" in found(bench.command("check", "--offline"))["device-key"][1]


def test_check_names_a_key_that_dps_refuses(bench: Bench) -> None:
    bench.give(bytes(32))
    answers = found(bench.command("check", status=4))["dps-answers"]
    assert answers[0] == "failed" and "does not take this device's key" in answers[1]


def test_enroll_shows_the_id_and_no_key(bench: Bench) -> None:
    assert bench.command("enroll")["attestation"] == "symmetric-key"
    assert DEVICE in bench.text("enroll")
    assert (
        bench.command("enroll", "--append", str(bench.state_dir / "x.csv"), status=1)["error"]["code"] == "agent.no_tpm"
    )


def test_a_report_for_others_has_no_key(bench: Bench, tmp_path: Path) -> None:

    bench.command("provision")
    bench.command("diag", "--output", str(tmp_path / "diag.tar.gz"))
    with tarfile.open(tmp_path / "diag.tar.gz") as archive:
        texts = [archive.extractfile(member).read() for member in archive.getmembers()]  # type: ignore[union-attr]
    assert len(texts) > 3 and not [text for text in texts if key_text(KEY).encode() in text]


# Sealed by a TPM.


def with_tpm(bench: Bench, tap: TpmTap) -> None:
    bench.configure(tpm=f'[tpm]\nbackend = "wire"\ntcti = "{tap.tcti}"\n')


def test_the_tpm_takes_the_key_and_signs_with_it_where_no_file_has_it_any_more(bench: Bench, tapped: TpmTap) -> None:
    with_tpm(bench, tapped)
    bench.command("provision")
    with bench.key_file.open("rb") as former:
        assert bench.command("import-key")["alreadySealed"] is False
        assert key_text(KEY).encode() not in former.read(), "the file that was replaced still has it"
    content = bench.key_file.read_text()
    assert key_text(KEY) not in content and bench.key_file.stat().st_mode & 0o777 == 0o600
    assert sorted(json.loads(content)) == ["ekName", "sealedBy", "srkName", "wrappedKey"]
    assert bench.command("import-key")["alreadySealed"] is True and bench.key_file.read_text() == content
    assert bench.command("provision")["alreadyProvisioned"], "the same key: the record holds on"
    assert not bench.command("provision", "--force")["alreadyProvisioned"]
    assert tapped.exchanges and not tapped.seen(KEY), "it crossed the TPM's bus in the clear"
    assert "has sealed the device's own key" in bench.text("status")
    checked = found(bench.command("check"))
    assert checked["device-key"][0] == checked["tpm-ek"][0] == checked["record-seal"][0] == "ok"


def test_a_sealed_key_of_another_tpm_or_of_before_a_clear_is_an_operator_s_business(
    bench: Bench, tapped: TpmTap, tmp_path: Path
) -> None:
    with_tpm(bench, tapped)
    assert seal_key_file(bench.loaded())
    with Swtpm(tmp_path / "other") as other:
        bench.configure(tpm=f'[tpm]\nbackend = "wire"\ntcti = "{other.tcti}"\n')
        assert bench.command("provision", status=5)["error"]["code"] == "tpm.ek_changed"
    with_tpm(bench, tapped)
    sealed = json.loads(bench.key_file.read_text())
    damaged = bytearray(base64.b64decode(sealed["wrappedKey"]))
    damaged[-1] ^= 1
    sealed["wrappedKey"] = base64.b64encode(damaged).decode()
    bench.key_file.write_text(json.dumps(sealed))
    assert bench.command("provision", status=5)["error"]["code"] == "tpm.sealed_key"


@pytest.mark.parametrize("size", [16, 32, 64])
def test_keys_of_every_length_are_sealed(bench: Bench, tapped: TpmTap, size: int) -> None:
    with_tpm(bench, tapped)
    key = bytes(range(1, size + 1))
    bench.give(key)
    assert seal_key_file(bench.loaded())
    signer = open_device(bench.loaded())
    try:
        assert signer.sign(b"", b"message") == hmac_sha256(key, b"message")
        assert tpm_warnings(signer) == [] and "sealed" in backend_shown(bench.loaded())
    finally:
        signer.release()


def test_a_key_is_not_lost_where_the_file_cannot_be_replaced_or_the_tpm_fails(
    bench: Bench, tapped: TpmTap, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from dps_agent.host import sealing

    with_tpm(bench, tapped)

    def full(path: str, content: bytes, mode: int | None = None) -> None:
        raise OSError(28, "No space left on device")

    before = bench.key_file.read_bytes()
    monkeypatch.setattr(sealing, "replace_file", full)
    with pytest.raises(AskOperator, match="No space left") as refused:
        seal_key_file(bench.loaded())
    assert refused.value.code == "agent.file" and bench.key_file.read_bytes() == before
    bench.configure(tpm=f'[tpm]\nbackend = "wire"\ntcti = "device:{tmp_path}/none"\n')
    assert bench.command("import-key", status=5)["error"]["code"] == "tpm.absent"
    assert bench.key_file.read_bytes() == before


def test_import_key_wants_a_key_of_its_own_and_a_file_that_is_none_of_systemd_s(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    credentials = tmp_path / "credentials"
    credentials.mkdir()
    (credentials / bench.key_file.name).write_text(key_text(KEY))
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(credentials))
    assert "is a credential" in bench.command("import-key", status=6)["error"]["message"]
    bench.settings.write_text('id_scope = "0ne00000000"\n')
    assert "attestation: expected" in bench.command("import-key", status=6)["error"]["message"]


def test_another_key_in_the_file_counts_without_a_restart(bench: Bench) -> None:
    signer = open_device(bench.loaded())
    assert signer.sign(b"", b"m") == hmac_sha256(KEY, b"m")
    bench.give(OTHER)
    assert signer.sign(b"", b"m") == hmac_sha256(KEY, b"m"), "within one use it is read once"
    signer.release()
    assert signer.sign(b"", b"m") == hmac_sha256(OTHER, b"m")
    assert key_text(KEY) not in repr(signer) + repr(vars(signer))
