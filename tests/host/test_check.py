"""`dps-agent check`: what each check finds, what follows from it, and how it is reported."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from contracts.tpm import blob_for
from dps_agent.assignment import Assignment, encode, seal_message
from dps_agent.host import checks, runner
from dps_agent.host.cli import main
from dps_agent.settings import TPM
from dps_hal.contracts import EK_HANDLE, IDENTITY, SRK_HANDLE, Tpm, TpmCondition
from dps_hal.errors import IdentityStale
from dps_hal.host import tpm_node
from dps_hal.host.files import FileStore
from dps_hal.host.mounts import doubt
from dps_hal.host.simulator import SimulatedTpm
from dps_hal.tpm.keys import SIGN, USER_WITH_AUTH, ek_public, object_name
from support.tpm import swtpm
from support.tpm.backends import BACK_ENDS
from support.tpm.states import copy_state
from support.tpm.swtpm import Swtpm
from support.tpm.tap import TpmTap

CHECKOUT = Path(__file__).parents[2]
IDS = [
    "settings",
    "state-folder",
    "clock",
    "tpm-node",
    "tpm-access",
    "tpm-auth",
    "tpm-ek",
    "tpm-srk",
    "tpm-certificate",
    "tpm-self-challenge",
    "tpm-slots",
    "tpm-lockout",
    "tpm-noda",
    "record",
    "record-seal",
]
ONLINE_IDS = ["proxy", "dns", "dps-tls", "dps-answers", "clock-dps", "hub-mqtt", "hub-websocket"]
WITHOUT_TPM = ("device-key", "device-certificate")  # of a device that shows a key or a certificate of its own
TPM_IDS = [name for name in IDS if name.startswith("tpm-")]
# What is said where no assignment is stored.
NOTHING_STORED = dict.fromkeys(("tpm-noda", "record", "record-seal"), "skipped")
DA_KEY = USER_WITH_AUTH | SIGN
# TPM2B_PUBLIC: systemd's storage key, ECC on P-256.
ECC_STORAGE = bytes.fromhex("001a 0023 000b 00030472 0000 0006 0080 0043 0010 0003 0010 0000 0000")


class Desk:
    """A device and its settings; `check --offline` runs in this process."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.state_dir = str(folder / "state")
        self.settings = folder / "given.toml"
        self._capsys = capsys

    def configure(self, backend: str, tcti: str, *lines: str) -> None:
        self.settings.write_text(
            f'id_scope = "0ne00000000"\nendpoint = "https://localhost"\nstate_dir = "{self.state_dir}"\n'
            f'[tpm]\nbackend = "{backend}"\ntcti = "{tcti}"\n' + "".join(f"{line}\n" for line in lines)
        )

    def text(self, *words: str) -> tuple[int, str]:
        status = main(["--config", str(self.settings), "check", "--offline", *words])
        captured = self._capsys.readouterr()
        assert captured.err == ""
        return status, captured.out

    def check(self, *words: str) -> tuple[int, dict[str, dict[str, Any]], dict[str, Any]]:
        """Exit status, the findings by id, and the whole document."""
        status, text = self.text("--json", *words)
        assert text.count("\n") == 1
        document: dict[str, Any] = json.loads(text)
        return status, {found["id"]: found for found in document["checks"]}, document

    def store(self, tpm: Tpm, wrapped_key: bytes) -> None:
        """An assignment with this hub key."""
        ek, srk = object_name(tpm.endorsement_key()), object_name(tpm.storage_root_key())
        assignment = Assignment(
            *("0ne00000000", "https://localhost", "press-07", "emulator.azure-devices.net", "press-07"),
            *(wrapped_key, ek, srk, "assigned", "", "", "", "", 1_800_000_000, None, False, TPM, ""),
        )
        text = encode(assignment)
        FileStore(self.state_dir).commit(IDENTITY, text + tpm.sign(wrapped_key, seal_message(text)))


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Desk:
    for name in [name for name in os.environ if name.startswith("DPS_AGENT_")]:
        monkeypatch.delenv(name)
    return Desk(tmp_path, capsys)


@pytest.fixture
def simulated(desk: Desk, tmp_path: Path) -> Desk:
    desk.configure("simulator", copy_state("press-07", tmp_path / "tpm"))
    return desk


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Swtpm]:
    with Swtpm(tmp_path / "swtpm") as new:
        yield new


@pytest.fixture(params=BACK_ENDS)
def backend(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def results(found: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Id and result of what is not ok; what lies under this machine's /tmp aside."""
    doubted = doubt(tempfile.gettempdir())
    return {
        name: finding["result"]
        for name, finding in found.items()
        if finding["result"] != "ok" and not (doubted and name == "state-folder" and finding["result"] == "warning")
    }


# --- a device with nothing wrong


def test_the_ids_are_fixed_and_every_check_says_in_a_sentence_what_it_makes_sure_of() -> None:
    ids = [check.id for check in checks.CHECKS]
    assert ids == [*IDS[:-2], *WITHOUT_TPM, *IDS[-2:], *ONLINE_IDS]
    for check in checks.CHECKS:
        assert check.description.endswith("."), check
        assert set(check.needs) <= set(ids[: ids.index(check.id)]), check  # what it needs comes before it
        assert check.online == (check.id in ONLINE_IDS)


def test_a_new_tpm_passes_and_nothing_is_left_in_it(backend: str, desk: Desk, machine: Swtpm) -> None:
    desk.configure(backend, machine.tcti)
    status, found, document = desk.check()
    assert (status, document["code"], list(found)) == (0, "ok", IDS)
    assert results(found) == NOTHING_STORED
    assert "error" not in document
    assert "no assignment is stored" in found["tpm-noda"]["detail"]
    assert machine.leftovers() == []
    status, text = desk.text()
    first, empty, *lines = text.splitlines()
    assert (status, first, empty) == (0, "ok: nothing is in the way", "")
    assert [line.split()[:2] for line in lines] == [[NOTHING_STORED.get(name, "ok"), name] for name in IDS]


def test_a_simulated_tpm_passes_with_a_warning(simulated: Desk) -> None:
    status, found, _ = simulated.check()
    assert (status, results(found)) == (0, {"tpm-node": "warning", **NOTHING_STORED})
    assert "plain files" in found["tpm-node"]["detail"]


def test_check_offline_loads_no_network(simulated: Desk) -> None:
    code = (
        "import sys\nfrom dps_agent.host.cli import main\nstatus = main(sys.argv[1:])\n"
        "print([name for name in ('ssl', 'http.client', 'paho') if name in sys.modules])\nsys.exit(status)"
    )
    paths = os.pathsep.join([str(CHECKOUT / "agent"), str(CHECKOUT / "hal")])
    words = [sys.executable, "-c", code, "--config", str(simulated.settings), "check", "--offline"]
    ended = subprocess.run(words, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, check=True)
    assert ended.stdout.splitlines()[-1] == "[]"


# --- what is asked for


def test_only_runs_what_is_named_and_what_that_needs(simulated: Desk) -> None:
    _, found, _ = simulated.check("--only", "tpm-lockout", "--only", "settings")
    assert list(found) == ["settings", "tpm-node", "tpm-access", "tpm-lockout"]
    _, found, _ = simulated.check("--only", "tpm-self-challenge,tpm-ek")
    assert list(found) == ["settings", "tpm-node", "tpm-access", "tpm-ek", "tpm-srk", "tpm-self-challenge"]


@pytest.mark.parametrize("key", ["ca_file", "hub.ca_file"])
def test_roots_that_are_none_are_found_among_the_settings(
    key: str, simulated: Desk, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    roots = tmp_path / "roots.pem"
    roots.write_text("no certificate\n")
    status, found, _ = simulated.check("--only", "settings", "--set", f"{key}={roots}")
    assert (status, found["settings"]["code"]) == (6, "config.invalid")
    assert f"{key}: expected PEM certificates in '{roots}'" in found["settings"]["detail"]
    assert main(["--config", str(simulated.settings), "config", "validate", "--set", f"{key}={roots}"]) == 6
    assert f"{key}: expected PEM certificates" in capsys.readouterr().err


def test_an_unknown_check_is_exit_2_and_the_known_ones_are_named(
    simulated: Desk, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--config", str(simulated.settings), "check", "--only", "tpm"]) == 2
    shown = capsys.readouterr().err
    assert all(name in shown for name in IDS)


# --- settings and node


def test_settings_that_cannot_be_used_are_exit_6_and_all_else_is_skipped(desk: Desk) -> None:
    desk.configure("esys", "device:/dev/tpmrm0", "persist_at = 1", "ek_handle = 1")
    status, found, document = desk.check()
    assert (status, document["code"], document["error"]["code"]) == (6, "config", "config.invalid")
    assert results(found) == {"settings": "failed", **dict.fromkeys({*IDS[1:], *WITHOUT_TPM} - {"clock"}, "skipped")}
    assert "tpm.persist_at: " in found["settings"]["detail"]
    assert "tpm.ek_handle: " in found["settings"]["detail"]


def test_a_password_file_that_others_can_read_is_exit_6(desk: Desk, tmp_path: Path) -> None:
    password = tmp_path / "owner"
    password.write_text("hunter2")
    password.chmod(0o644)
    desk.configure("wire", "swtpm:port=1", f'owner_auth_file = "{password}"')
    status, text = desk.text()
    assert (status, text.split()[:2]) == (6, ["failed:", "settings:"])
    assert "chmod 600" in text
    assert "hunter2" not in text


def test_a_missing_id_scope_is_a_warning_for_the_tpm_can_be_checked_without(simulated: Desk) -> None:
    simulated.settings.write_text(simulated.settings.read_text().replace('id_scope = "0ne00000000"', ""))
    status, found, _ = simulated.check()
    assert (status, found["settings"]["result"]) == (0, "warning")
    assert "id_scope" in found["settings"]["remedy"]


def test_a_missing_id_scope_is_in_the_first_line_whatever_failed(simulated: Desk) -> None:
    text = simulated.settings.read_text().replace('id_scope = "0ne00000000"', "")
    simulated.settings.write_text(text)
    scope = f"id_scope is not set ({simulated.settings})"
    first = simulated.text()[1].splitlines()[0]
    assert first.startswith("ok, with ") and first.endswith(f": settings: {scope}")
    missing = re.sub('tcti = ".*"', 'tcti = "device:/nonexistent/tpmrm0"', text.replace('"simulator"', '"wire"'))
    simulated.settings.write_text(missing)
    status, shown = simulated.text()
    assert status == 5 and shown.startswith(f"failed: {scope}; then tpm-node: ")


def test_a_missing_node_is_exit_5_with_a_remedy_and_what_follows_is_skipped(backend: str, desk: Desk) -> None:
    desk.configure(backend, "device:/nonexistent/tpmrm0")
    status, found, document = desk.check()
    assert (status, document["error"]["code"]) == (5, "tpm.absent")
    assert document["error"]["remedy"] == found["tpm-node"]["remedy"] != ""
    assert results(found) == {**dict.fromkeys(TPM_IDS, "skipped"), "tpm-node": "failed", **NOTHING_STORED}
    assert found["tpm-ek"]["detail"] == "not possible without tpm-access"
    status, text = desk.text()
    first, second, *_ = text.splitlines()
    assert (status, second.split()[-1]) == (5, "[tpm.absent]")
    assert first.startswith("failed: tpm-node: no TPM at /nonexistent/tpmrm0: ")


@pytest.mark.parametrize(("path", "failing"), [("{folder}", "tpm-node"), ("/dev/null", "tpm-access")])
def test_what_is_no_tpm_is_exit_5(path: str, failing: str, desk: Desk, tmp_path: Path) -> None:
    desk.configure("wire", f"device:{path.format(folder=tmp_path)}")
    status, found, _ = desk.check()
    assert (status, found[failing]["result"], found[failing]["code"]) == (5, "failed", "tpm.absent")


def test_a_node_that_may_not_be_opened_names_the_command_that_helps(
    backend: str, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_open = os.open

    def refuse(path: Any, *arguments: Any, **named: Any) -> int:
        if path == "/dev/full":
            raise PermissionError(13, "Permission denied")
        return real_open(path, *arguments, **named)

    desk.configure(backend, "device:/dev/full")
    monkeypatch.setattr(tpm_node, "in_container", lambda: False)  # wherever this test runs
    monkeypatch.setattr(os, "open", refuse)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    status, found, _ = desk.check()
    assert (status, found["tpm-access"]["code"]) == (5, "tpm.denied")
    assert "usermod -aG" in found["tpm-access"]["detail"]


def test_a_missing_extra_is_exit_2(simulated: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    simulated.configure("esys", "swtpm:port=1")
    monkeypatch.setitem(sys.modules, "tpm2_pytss", None)
    status, found, _ = simulated.check()
    assert (status, found["tpm-node"]["code"]) == (2, "tpm.not_available")


def test_the_simulator_at_azure_is_exit_5(simulated: Desk) -> None:
    status, found, _ = simulated.check("--set", "endpoint=https://global.azure-devices-provisioning.net")
    assert (status, found["tpm-node"]["code"]) == (5, "tpm.simulator_refused")


# --- passwords


def test_an_endorsement_password_that_the_settings_lack_is_exit_5(
    backend: str, desk: Desk, machine: Swtpm, tmp_path: Path
) -> None:
    machine.set_hierarchy_auth(swtpm.ENDORSEMENT, b"hunter2")
    desk.configure(backend, machine.tcti)
    status, found, document = desk.check()
    assert (status, document["error"]["code"]) == (5, "tpm.hierarchy_auth")
    assert (found["tpm-auth"]["result"], found["tpm-lockout"]["result"]) == ("failed", "ok")
    password = tmp_path / "password"
    for written, expected in ((b"hunter2", NOTHING_STORED), (b"other", None)):
        password.write_bytes(written)
        password.chmod(0o600)
        desk.configure(backend, machine.tcti, f'endorsement_auth_file = "{password}"')
        status, found, document = desk.check()
        if expected is not None:
            assert (status, results(found)) == (0, expected)
        else:
            assert (status, found["tpm-auth"]["code"]) == (5, "tpm.hierarchy_auth")
            assert found["tpm-self-challenge"]["code"] == "tpm.hierarchy_auth"
        assert "hunter2" not in json.dumps(document)
    assert machine.leftovers() == []


@pytest.mark.parametrize("hierarchies", [("owner",), ("endorsement",), ("owner", "endorsement")])
def test_a_password_that_the_tpm_lacks_is_a_warning(
    hierarchies: tuple[str, ...], backend: str, desk: Desk, machine: Swtpm, tmp_path: Path
) -> None:
    password = tmp_path / "password"
    password.touch(0o600)
    password.write_bytes(b"hunter2")
    desk.configure(backend, machine.tcti, "\n".join(f'{name}_auth_file = "{password}"' for name in hierarchies))
    status, found, document = desk.check()
    assert (status, found["tpm-auth"]["result"], found["tpm-self-challenge"]["result"]) == (0, "warning", "ok")
    for name in ("owner", "endorsement"):
        assert (f"{name}_auth_file" in found["tpm-auth"]["detail"]) is (name in hierarchies)
    assert "hunter2" not in json.dumps(document)
    assert machine.leftovers() == []


@pytest.mark.parametrize("template", ["tcg-l1", "azure-c-sdk"])
def test_without_a_certificate_the_tpm_tells_the_template_of_its_endorsement_key(
    template: str, backend: str, desk: Desk, machine: Swtpm
) -> None:
    tpm = BACK_ENDS[backend](machine.tcti, ek_template=template)
    tpm.endorsement_key()
    tpm.release()
    for wanted in ("tcg-l1", "azure-c-sdk"):
        desk.configure(backend, machine.tcti, f'ek_template = "{wanted}"')
        status, found, _ = desk.check("--only", "tpm-certificate")
        assert (status, found["tpm-certificate"]["result"]) == (0, "ok" if wanted == template else "warning")
        assert f"this endorsement key is of the template {template}" in found["tpm-certificate"]["detail"]
    assert machine.leftovers() == []


def test_an_endorsement_key_of_neither_template_is_told(backend: str, desk: Desk, machine: Swtpm) -> None:
    own_unique = ek_public(bytes(255) + b"\x01")
    machine.persist_primary(swtpm.ENDORSEMENT, own_unique, EK_HANDLE)
    desk.configure(backend, machine.tcti)
    status, found, _ = desk.check("--only", "tpm-certificate")
    assert (status, found["tpm-certificate"]["result"]) == (0, "warning")
    assert "of neither template, though ek_template is tcg-l1" in found["tpm-certificate"]["detail"]
    assert machine.leftovers() == []


def test_an_owner_password_that_the_settings_lack_matters_only_until_the_keys_exist(
    backend: str, desk: Desk, machine: Swtpm
) -> None:
    tpm = BACK_ENDS[backend](machine.tcti)
    tpm.endorsement_key()
    tpm.release()
    machine.set_hierarchy_auth(swtpm.OWNER, b"hunter2")
    desk.configure(backend, machine.tcti)
    status, found, _ = desk.check()
    assert (status, found["tpm-auth"]["result"], found["tpm-srk"]["code"]) == (5, "warning", "tpm.hierarchy_auth")
    machine.clear()
    assert desk.check()[0] == 0
    machine.set_hierarchy_auth(swtpm.OWNER, b"hunter2")
    status, found, _ = desk.check()
    assert (status, results(found)) == (0, {"tpm-auth": "warning", **NOTHING_STORED})


def test_an_owner_password_is_tried_also_where_the_keys_exist(
    backend: str, desk: Desk, machine: Swtpm, tmp_path: Path
) -> None:
    tpm = BACK_ENDS[backend](machine.tcti)
    tpm.storage_root_key()
    tpm.release()
    machine.set_hierarchy_auth(swtpm.OWNER, b"hunter2")
    password = tmp_path / "password"
    password.touch(0o600)
    desk.configure(backend, machine.tcti, f'owner_auth_file = "{password}"')
    for written, result in ((b"hunter2", "ok"), (b"other", "failed")):
        password.write_bytes(written)
        status, found, _ = desk.check()
        assert (status, found["tpm-auth"]["result"]) == (5 if result == "failed" else 0, result), written
        assert found["tpm-self-challenge"]["result"] == "ok"
    assert "owner_auth_file" in found["tpm-auth"]["detail"]
    assert "no lockout" in found["tpm-auth"]["detail"]
    assert machine.property(swtpm.LOCKOUT_COUNTER) == 0
    assert machine.leftovers() == []


# --- keys and challenge


def test_a_storage_root_key_without_room_is_a_warning(backend: str, desk: Desk, machine: Swtpm) -> None:
    tpm = BACK_ENDS[backend](machine.tcti)
    tpm.endorsement_key()
    tpm.release()
    machine.fill_nv(ECC_STORAGE)
    desk.configure(backend, machine.tcti)
    status, found, _ = desk.check()
    assert (status, results(found)) == (0, {"tpm-srk": "warning", **NOTHING_STORED})
    assert "no room" in found["tpm-srk"]["detail"]
    assert found["tpm-srk"]["remedy"]
    assert machine.leftovers() == []


def test_a_storage_root_key_at_another_handle_is_named_with_it(backend: str, desk: Desk, machine: Swtpm) -> None:
    desk.configure(backend, machine.tcti)
    assert desk.check()[1]["tpm-srk"]["detail"].startswith("at 0x81000001; its name is ")
    machine.clear()
    machine.persist_primary(swtpm.OWNER, ECC_STORAGE, SRK_HANDLE)
    status, found, _ = desk.check()
    assert (status, found["tpm-srk"]["result"]) == (0, "ok")
    assert found["tpm-srk"]["detail"].startswith("at 0x81000002, as another program's key is at 0x81000001; ")


def test_another_object_at_the_handle_of_the_endorsement_key_stops_only_what_needs_that(
    backend: str, desk: Desk, machine: Swtpm
) -> None:
    from dps_hal.tpm.keys import srk_template

    machine.persist_primary(swtpm.OWNER, srk_template(), EK_HANDLE)
    desk.configure(backend, machine.tcti)
    status, found, _ = desk.check()
    assert (status, found["tpm-ek"]["code"]) == (5, "tpm.ek_unsuitable")
    skipped = dict.fromkeys(("tpm-srk", "tpm-certificate", "tpm-self-challenge"), "skipped")
    assert results(found) == {"tpm-ek": "failed", **skipped, **NOTHING_STORED}


def test_a_tpm_that_signs_with_another_key_fails_its_challenge(
    simulated: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SimulatedTpm, "sign", lambda *_: bytes(32))
    status, found, document = simulated.check()
    assert (status, found["tpm-self-challenge"]["result"]) == (5, "failed")
    assert "not with the key" in document["error"]["message"]
    assert found["tpm-slots"]["result"] == "ok"


def test_a_tpm_that_shows_keys_it_does_not_hold_fails_its_challenge(
    simulated: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = SimulatedTpm(copy_state("press-08", simulated.settings.parent / "other")).storage_root_key()
    monkeypatch.setattr(SimulatedTpm, "storage_root_key", lambda _: other)
    status, found, _ = simulated.check()
    assert (status, found["tpm-self-challenge"]["code"]) == (5, "tpm.blob_refused")
    assert "interposer" in found["tpm-self-challenge"]["remedy"]


def test_a_certificate_that_is_none_is_a_warning(backend: str, desk: Desk, machine: Swtpm) -> None:
    machine.write_nv(0x01C00002, b"\x30\x03abc" + bytes(300))
    desk.configure(backend, machine.tcti)
    status, found, _ = desk.check()
    assert (status, found["tpm-certificate"]["result"]) == (0, "warning")
    assert found["tpm-certificate"]["detail"].startswith("unreadable")


# --- slots and lockout


@pytest.mark.parametrize(("taken", "enough"), [(1, True), (2, False)])
def test_two_free_slots_are_what_a_registration_needs(
    taken: int, enough: bool, backend: str, desk: Desk, machine: Swtpm
) -> None:
    desk.configure(backend, machine.tcti)
    assert desk.check()[0] == 0  # makes the persistent keys
    for _ in range(taken):
        machine.command(0x186, bytes.fromhex("0000 000b"))  # HashSequenceStart
    status, found, _ = desk.check()
    assert status == (0 if enough else 5)
    for name in ("tpm-slots", "tpm-self-challenge"):
        assert (found[name]["result"] == "ok") == enough, found[name]
        assert enough or found[name]["code"] == "tpm.memory"


def test_a_hub_key_with_noda_is_ok_and_one_without_is_a_warning(simulated: Desk, tmp_path: Path) -> None:
    tpm = SimulatedTpm(str(tmp_path / "tpm"))
    simulated.store(tpm, tpm.import_key(blob_for(tpm)))
    assert simulated.check()[1]["tpm-noda"]["result"] == "ok"
    simulated.store(tpm, tpm.import_key(blob_for(tpm, attributes=DA_KEY)))
    status, found, _ = simulated.check()
    assert (status, found["tpm-noda"]["result"]) == (0, "warning")


def test_a_key_without_noda_before_a_lockout_is_exit_5_with_the_tpms_own_recovery_time(
    backend: str, desk: Desk, machine: Swtpm
) -> None:
    with TpmTap(machine.port) as tap:
        tpm = BACK_ENDS[backend](tap.tcti)
        wrapped_key = tpm.import_key(blob_for(tpm, attributes=DA_KEY))
        desk.store(tpm, wrapped_key)
        for _ in range(2):  # of three; each cut comes before it was announced
            tap.on_command = lambda name: machine.kill() if name == "Shutdown" else None
            tpm.sign(wrapped_key, b"message")
            tap.on_command = lambda name: None
            machine.restart()
        tpm.release()
    desk.configure(backend, machine.tcti)
    status, found, document = desk.check()
    assert (status, document["error"]["code"], document["error"]["retryAfterS"]) == (5, "tpm.locked_out", 1000)
    assert results(found) == {"tpm-lockout": "warning", "tpm-noda": "failed", "record-seal": "skipped"}
    assert found["tpm-lockout"]["detail"].startswith("2 of 3 failures counted, one is forgotten every 1000 s")


def test_a_stored_assignment_that_cannot_be_read_is_no_matter_of_the_tpms(simulated: Desk) -> None:
    FileStore(simulated.state_dir).commit(IDENTITY, b"{}" + bytes(32))
    status, found, _ = simulated.check()
    assert (status, found["tpm-noda"]["result"]) == (0, "skipped")
    assert "cannot be read" in found["tpm-noda"]["detail"]


# --- bounds


def test_a_tpm_that_hangs_ends_the_checks_in_time(simulated: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    end = threading.Event()

    def hang(self: SimulatedTpm) -> TpmCondition:
        end.wait(30)
        raise IdentityStale("tpm.key_stale", "too late")

    monkeypatch.setattr(SimulatedTpm, "condition", hang)
    monkeypatch.setattr(runner, "TPM_KEY_DEADLINE_S", 0.2)
    try:
        status, found, _ = simulated.check()
    finally:
        end.set()
    assert (status, found["tpm-access"]["code"]) == (5, "tpm.timeout")
    assert found["tpm-noda"]["detail"] == "not possible: an earlier check still hangs"


def test_ctrl_c_is_exit_3(simulated: Desk, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(runner.Runner, "ask_tpm", interrupted)
    assert main(["--config", str(simulated.settings), "check", "--offline", "--json"]) == 3
    assert json.loads(capsys.readouterr().out)["error"]["code"] == "agent.interrupted"
