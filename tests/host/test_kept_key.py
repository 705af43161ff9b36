"""The hub key at `persist_at`: whatever fails in between, the next run puts it right, and nothing foreign goes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from contracts.tpm import blob_for
from dps_agent.assignment import Assignment, decode
from dps_agent.host import Provisioned, kept_key
from dps_agent.host.cli import main
from dps_hal.contracts import IDENTITY, PROGRESS
from dps_hal.host.files import FileStore
from dps_hal.platform import from_json, hmac_sha256, to_base64, to_json
from dps_hal.tpm.keys import object_name, unwrap
from support.tapped_device import Device
from support.tpm.backends import BACK_ENDS

HANDLE = 0x81000100
MESSAGE = b"message"


class Keeper:
    """A device that keeps its hub key at HANDLE as well."""

    def __init__(self, device: Device, backend: str) -> None:
        self.device = device
        self.backend = backend
        self.without = device.settings.read_text()
        device.settings.write_text(f"{self.without}persist_at = {HANDLE:#x}\n")

    def provision(self, force: bool = True) -> Provisioned:
        """One run of the agent; the TPM gets power first where it was cut."""
        self.device.tap.forget()
        return self.device.provision(force)

    def command(self, *words: str) -> int:
        return main(["--config", str(self.device.settings), *words])

    def assignment(self) -> Assignment:
        return decode(self.device.stored())[0]

    def signs_at_handle(self) -> bytes:
        """What another program gets that signs with the key at HANDLE, as it has it: an empty password."""
        body = HANDLE.to_bytes(4, "big") + bytes.fromhex("00000009 40000009 0000 00 0000")
        parameters = len(MESSAGE).to_bytes(2, "big") + MESSAGE + bytes.fromhex("000b")
        return self.device.swtpm.command(0x155, body + parameters, tag=0x8002)[6:38]

    def assert_kept(self, done: Provisioned) -> None:
        """The key at HANDLE is the one that the hub knows, and nobody has to be told anything."""
        assert done.warnings == ()
        held = self.assignment()
        key = self.device.emulator.service.hub_key(held.assigned_hub, held.device_id)
        assert key is not None and self.signs_at_handle() == hmac_sha256(key, MESSAGE)
        assert self.device.swtpm.leftovers() == []

    def put_foreign_key(self) -> bytes:
        """Another program's key of the same kind at HANDLE, in place of what is there; its name."""
        tpm = BACK_ENDS[self.backend](self.device.swtpm.tcti)
        wrapped_key = tpm.import_key(blob_for(tpm))
        present = tpm.name_at(HANDLE)
        if present:
            tpm.withdraw(HANDLE, (present,))
        tpm.persist(wrapped_key, HANDLE)
        tpm.release()
        return object_name(unwrap(wrapped_key)[0])


@pytest.fixture(params=BACK_ENDS)
def keeper(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Keeper]:
    with Device(tmp_path, request.param, rotates=True) as device:
        yield Keeper(device, request.param)


@pytest.mark.parametrize("evictions", [0, 1], ids=["before the old key goes", "between the two"])
def test_after_a_cut_the_next_boot_puts_the_key_where_it_belongs(keeper: Keeper, evictions: int) -> None:
    device = keeper.device
    keeper.assert_kept(keeper.provision())
    for boot in range(3):
        device.tap.forget()
        before = 0 if boot == 2 else evictions  # there a cut has emptied the handle already, if it fell between the two
        device.tap.on_command = lambda name, before=before: (
            device.swtpm.kill() if name == "EvictControl" and device.tap.names.count(name) == before else None
        )
        done = device.provision()
        assert len(done.warnings) == 1 and "the hub key is not at persist_at" in done.warnings[0], f"boot={boot}"
        device.tap.on_command = lambda _name: None
        device.swtpm.restart()
        if boot != 1:  # else the next registration comes before a boot that would put it right
            keeper.assert_kept(keeper.provision(force=False))
    keeper.assert_kept(keeper.provision())


@pytest.mark.parametrize("skip", [0, 1])
def test_after_a_refusal_the_next_run_puts_the_key_where_it_belongs(keeper: Keeper, skip: int) -> None:
    keeper.assert_kept(keeper.provision())
    for force in (False, True):
        keeper.device.tap.forget()
        keeper.device.tap.refuse(0x923, command="EvictControl", skip=skip)  # TPM_RC_NV_UNAVAILABLE
        assert "0x923" in keeper.device.provision().warnings[0]
        keeper.assert_kept(keeper.provision(force))


def test_a_reset_takes_the_key_along_and_the_next_registration_finds_the_handle_free(keeper: Keeper) -> None:
    keeper.assert_kept(keeper.provision())
    assert keeper.command("reset", "--yes") == 0
    assert HANDLE not in keeper.device.swtpm.public_areas() and not keeper.device.swtpm.leftovers()
    keeper.assert_kept(keeper.provision())
    keeper.device.settings.write_text(keeper.without)  # and also where the settings do not name the handle any more
    assert keeper.command("reset", "--yes") == 0
    assert HANDLE not in keeper.device.swtpm.public_areas()


def test_a_reset_without_a_tpm_says_what_stays(keeper: Keeper, capsys: pytest.CaptureFixture[str]) -> None:
    keeper.provision()
    keeper.device.swtpm.kill()
    assert keeper.command("reset", "--yes") == 0
    assert "the hub key stays in the TPM" in capsys.readouterr().out
    store = FileStore(str(keeper.device.state_dir))
    assert store.load(IDENTITY) is None and store.load(PROGRESS) is None


def test_settings_that_change_meanwhile_make_no_stranger_of_the_key(keeper: Keeper) -> None:
    settings = keeper.device.settings
    wanted = settings.read_text()
    keeper.provision()
    for changed in (keeper.without, keeper.without, wanted.replace("press-07", "press-08")):
        settings.write_text(changed)
        assert keeper.provision().warnings == ()
    settings.write_text(wanted)
    keeper.assert_kept(keeper.provision())


def test_a_key_of_others_stays_at_any_time(keeper: Keeper, capsys: pytest.CaptureFixture[str]) -> None:
    def taken(done: Provisioned) -> None:
        assert len(done.warnings) == 1 and "came another" in done.warnings[0]
        tpm = BACK_ENDS[keeper.backend](keeper.device.swtpm.tcti)
        assert tpm.name_at(HANDLE) == foreign
        tpm.release()

    foreign = keeper.put_foreign_key()
    for force in (True, False, True):
        taken(keeper.provision(force))
    assert keeper.command("reset", "--yes") == 0
    taken(keeper.provision())
    tpm = BACK_ENDS[keeper.backend](keeper.device.swtpm.tcti)
    tpm.withdraw(HANDLE, (foreign,))
    tpm.release()
    keeper.assert_kept(keeper.provision(force=False))
    foreign = keeper.put_foreign_key()
    for force in (False, True, True):
        taken(keeper.provision(force))


def test_a_record_without_its_seal_makes_no_foreign_key_ours(keeper: Keeper) -> None:
    keeper.provision()
    foreign = keeper.put_foreign_key()
    stored = keeper.device.stored()
    value = from_json(stored[:-32])
    value[kept_key.ENTRY] = {"handle": HANDLE, "former": to_base64(foreign)}
    FileStore(str(keeper.device.state_dir)).commit(IDENTITY, to_json(value).encode() + stored[-32:])
    for force in (False, True):
        assert "came another" in keeper.provision(force).warnings[0]
    FileStore(str(keeper.device.state_dir)).commit(IDENTITY, to_json(value).encode() + stored[-32:])
    assert keeper.command("reset", "--yes") == 0
    tpm = BACK_ENDS[keeper.backend](keeper.device.swtpm.tcti)
    assert tpm.name_at(HANDLE) == foreign
    tpm.release()


@pytest.mark.parametrize("entry", [7, [], {}, {"handle": "x", "former": ""}, {"handle": 1, "former": 2}, {"handle": 1}])
def test_an_entry_that_is_none_is_as_no_entry(entry: object) -> None:
    assert kept_key.noted(to_json({kept_key.ENTRY: entry}).encode() + bytes(32)) == (0, b"")
    assert kept_key.noted(b"\xff" * 40) == kept_key.noted(to_json({}).encode() + bytes(32)) == (0, b"")


def test_without_persist_at_the_record_says_nothing_of_it_and_the_tpm_is_not_asked(keeper: Keeper) -> None:
    keeper.device.settings.write_text(keeper.without)
    keeper.provision()
    keeper.provision()
    assert kept_key.ENTRY not in from_json(keeper.device.stored()[:-32])
    assert "EvictControl" not in keeper.device.tap.names
