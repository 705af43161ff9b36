"""The whole job of a board under MicroPython: a real TPM (swtpm), real TLS, a real littlefs, a limited heap."""

from __future__ import annotations

import datetime
import json
import threading
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest
import trustme

import dps_emulator.embedded
import dps_emulator.server
from dps_emulator.faults import Fault
from dps_emulator.service import Settings
from support.board.compiled import Image, der, micropython
from support.cloud.emulator import EmulatorInThread
from support.cloud.ntp import NtpServer
from support.tpm.swtpm import Swtpm
from support.tpm.tap import COMMANDS, TpmTap

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

HUB = "emulator.azure-devices.net"
HEAP_KB = 150  # of a 64-bit build that loads what is not in flash; a board has pointers of half the size
TPM_COMMANDS = 18  # of one registration where EK and SRK exist
LOOKS_FOR_LEFTOVERS = 3  # commands more, once, because nobody else uses a board's TPM
DAY = 86400
YEAR = 365 * DAY


class Desk:
    """A board with flash, TPM and NTP, and the service that it asks."""

    def __init__(self, image: Image, folder: Path) -> None:
        self.image = image
        self.folder = folder
        self.stack = ExitStack()
        self.swtpm = self.stack.enter_context(Swtpm(folder / "tpm"))
        self.tap = self.stack.enter_context(TpmTap(self.swtpm.port))
        self.ntp = self.stack.enter_context(NtpServer())
        self.built_s = int(time.time()) - 30 * DAY
        self.emulator: EmulatorInThread

    def serve(self, **settings: Any) -> None:
        self.emulator = self.stack.enter_context(EmulatorInThread(Settings(enroll_any=True, **settings)))

    def configure(self, **changes: Any) -> Path:
        """Writes config.json for the service, with changes to its top level."""
        (self.folder / "roots.der").write_bytes(der(self.emulator.ca_file))
        document = {
            "id_scope": "0ne00000000",
            "registration_id": "press-07",
            "connect_to": self.emulator.connect_to,
            "ca_file": str(self.folder / "roots.der"),
            "state_dir": "/flash/dps-agent",
            "tpm": {"tcti": self.tap.tcti},
            "board": {"ntp_server": self.ntp.address, "built_at_s": self.built_s},
            **changes,
        }
        path = self.folder / "config.json"
        path.write_text(json.dumps(document))
        return path

    def live(self, *words: str, heap_kb: int = 1024, rtc: Path | None = None, in_flash: bool = True) -> dict[str, Any]:
        """One life of the board, at most 30 s long."""
        config = self.configure()
        if rtc is not None:
            words = (*words, f"rtc={rtc}")
        limit = () if any(word.startswith("seconds=") for word in words) else ("seconds=30",)
        printed = micropython(
            self.image,
            "board_life",
            str(config),
            str(self.folder / "flash.img"),
            *words,
            *limit,
            heap_kb=heap_kb,
            in_flash=in_flash,
            rtc=rtc,
        )
        return printed[-1]

    def token_refusal(self, life: dict[str, Any]) -> str | None:
        """Why the hub would refuse the token that the board made at the end of its life; None: it accepts it."""
        return self.emulator.service.hub_token_refusal(life["token"], time.time())

    def asked(self) -> list[str]:
        return [line.operation for line in self.emulator.log]


@pytest.fixture
def desk(image: Image, tmp_path: Path) -> Iterator[Desk]:
    desk = Desk(image, tmp_path)
    with desk.stack:
        yield desk


@pytest.mark.parametrize("words", [(), ("blocks",)], ids=["littlefs", "blocks"])
def test_a_board_gets_its_hub_and_holds_it_over_a_reboot(desk: Desk, words: tuple[str, ...]) -> None:
    desk.serve(retry_after_s=1, assign_after_s=1.5)
    first = desk.live(*words, heap_kb=HEAP_KB)
    assert first["states"] == ["boot", "provisioning", "provisioned"], first
    assert (first["hub"], first["device"]) == (HUB, "press-07")
    assert desk.token_refusal(first) is None
    assert "operation" not in desk.asked() and desk.swtpm.leftovers() == []
    asked = len(desk.asked())
    desk.swtpm.kill()
    desk.swtpm.restart()
    second = desk.live(*words, heap_kb=HEAP_KB)
    assert second["states"] == ["boot", "provisioned"] and second["hub"] == HUB, second
    assert len(desk.asked()) == asked, "a record that holds asks nobody"
    assert second["floor"] >= first["now"][0] - 60, "the last believed time is the next floor"


def test_a_registration_takes_one_tls_handshake(desk: Desk) -> None:
    desk.serve(retry_after_s=10, assign_after_s=5)
    life = desk.live()
    assert life["state"] == "provisioned" and life["handshakes"] == 1, life
    assert life["now"][1:] == [True, "ntp"] and desk.ntp.asked == 1


def test_a_retry_after_that_is_a_date_is_obeyed(desk: Desk) -> None:
    desk.serve(retry_after_s=0)
    desk.emulator.script(Fault(operation="register", request=1, status=503, retry_after_date_s=4))
    assert desk.live()["state"] == "provisioned"
    refused, again = [datetime.datetime.fromisoformat(line.time[:26]) for line in desk.emulator.log[:2]]
    assert desk.asked()[:2] == ["register", "register"] and (again - refused).total_seconds() >= 3.9


def test_a_connection_that_the_service_closed_while_idle_costs_one_handshake_more(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dps_emulator.server, "KEEP_ALIVE_S", 1)
    desk.serve(retry_after_s=3)
    life = desk.live()
    assert life["state"] == "provisioned" and life["handshakes"] == 2, life


def test_a_registration_takes_few_tpm_commands(desk: Desk) -> None:
    desk.serve(retry_after_s=0)
    desk.live()  # EK and SRK are there afterwards
    (desk.folder / "flash.img").unlink()
    names = [COMMANDS[code] for code in desk.live()["tpmCommands"]]
    counted = [name for name in names if name != "GetCapability"]
    print(f"TPM commands of a registration: {len(counted)}: {' '.join(counted)}")
    assert 0 < len(counted) <= TPM_COMMANDS, names
    assert len(names) - len(counted) == LOOKS_FOR_LEFTOVERS, names


def test_what_a_registration_loads_only_for_a_moment_is_not_in_the_heap_afterwards(desk: Desk) -> None:
    desk.serve(retry_after_s=0)
    life = desk.live()
    assert life["state"] == "provisioned" and "dps_registration" in life["loaded"], life
    assert "dps_hub" not in life["loaded"], "what talks to the hub is loaded when there is one to talk to"
    assert "dps_texts" not in life["loaded"], "nobody raised an error, or its words were let go of again"


def test_the_tasks_of_the_firmware_go_on_during_a_registration(desk: Desk) -> None:
    desk.serve(retry_after_s=1, assign_after_s=1)
    life = desk.live()
    print(f"20 ms blink: longest gap {life['gapMs']} ms, by: {life['gapBy']}")
    assert life["state"] == "provisioned" and life["gapBy"]
    assert 20 <= life["gapMs"] < 1500, life


def test_the_watchdog_is_fed_every_second_even_while_the_tpm_is_slow(desk: Desk) -> None:
    desk.serve(retry_after_s=3, assign_after_s=1)
    desk.tap.delay(2.5, command="Import")
    life = desk.live()
    assert life["state"] == "provisioned" and life["gapMs"] >= 2500 and "ImportKey" in life["gapBy"], life
    assert life["longestFeedMs"] < 1500, life


def test_a_service_that_cannot_be_verified_is_waited_for_and_asked_nothing(desk: Desk) -> None:
    desk.serve()
    stranger = desk.folder / "stranger.pem"
    trustme.CA().cert_pem.write_to_path(str(stranger))
    desk.emulator.ca_file = stranger
    life = desk.live("seconds=8")
    assert (life["state"], life["code"]) == ("waiting", "network.tls"), life
    assert desk.asked() == []


def short_lived(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the service's certificate begin ten days ago and end in 80 days, as those of public authorities do."""
    authority = trustme.CA()
    issue = authority.issue_cert
    now = datetime.datetime.now(datetime.UTC)
    first, last = now - datetime.timedelta(days=10), now + datetime.timedelta(days=80)
    monkeypatch.setattr(authority, "issue_cert", lambda *names: issue(*names, not_before=first, not_after=last))
    monkeypatch.setattr(dps_emulator.embedded, "certificate_authority", lambda state_dir: authority)


@pytest.fixture
def rtc(tmp_path: Path) -> Path:
    """A clock that starts in 1970, as that of most boards."""
    path = tmp_path / "rtc"
    path.write_text("@1970-01-01 00:00:00")
    return path


FORGERIES = [3 * YEAR, 200 * DAY, 60 * DAY, -25 * DAY, -3 * YEAR]


@pytest.mark.parametrize("offset_s", FORGERIES, ids=[f"{offset // DAY} days" for offset in FORGERIES])
def test_a_forged_time_neither_passes_nor_lasts(
    desk: Desk, rtc: Path, monkeypatch: pytest.MonkeyPatch, offset_s: int
) -> None:
    """The floor, 30 days ago, is before the certificate's begin: only a true time verifies it."""
    short_lived(monkeypatch)
    desk.serve(retry_after_s=0)
    desk.ntp.offset_s = offset_s
    forged = desk.live("seconds=9", rtc=rtc)
    if forged["state"] == "provisioned":  # the forged time lay in the certificate's life: its Date has put it right
        assert 0 < offset_s < 80 * DAY and forged["now"][2] == "date" and forged["handshakes"] == 2, forged
    else:
        assert (forged["state"], forged["code"]) == ("waiting", "network.tls"), forged
        assert desk.asked() == [] and not forged["now"][1]
        desk.ntp.offset_s = 0
        (desk.folder / "flash.img").unlink()  # or it would wait out its back-off first
        forged = desk.live(rtc=rtc)
        assert forged["now"][2] == "ntp", forged
    assert forged["state"] == "provisioned" and abs(forged["now"][0] - time.time()) < 120, forged
    assert abs(forged["floor"] - time.time()) < 120, "what was forged has not raised the floor"
    assert desk.token_refusal(forged) is None


def test_the_network_heals_within_one_life(desk: Desk, rtc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short_lived(monkeypatch)
    desk.serve(retry_after_s=0)
    desk.ntp.offset_s = 3 * YEAR

    def heal() -> None:
        while not desk.ntp.asked:
            time.sleep(0.05)
        time.sleep(2)  # the forged answer has gone
        desk.ntp.offset_s = 0.0

    healing = threading.Thread(target=heal, daemon=True)
    healing.start()
    life = desk.live("seconds=120", rtc=rtc)
    healing.join(60)
    assert life["states"][-1] == "provisioned" and "waiting" in life["states"], life


def test_a_board_without_ntp_takes_the_date_of_a_verified_service(
    desk: Desk, rtc: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short_lived(monkeypatch)
    desk.built_s = int(time.time()) - 5 * DAY
    desk.serve(retry_after_s=0)
    desk.ntp.offset_s = None
    life = desk.live(rtc=rtc)
    assert life["state"] == "provisioned" and life["now"][1:] == [True, "date"] and life["handshakes"] == 2, life


def test_the_heap_of_each_phase_is_known_and_a_small_one_is_enough(desk: Desk) -> None:
    desk.serve(retry_after_s=1)
    peaks = desk.live("heap")["peaks"]
    for phase, used in sorted(peaks.items(), key=lambda row: row[1]):
        print(f"{phase:<24} {used / 1024:6.1f} KiB")
    assert max(peaks.values()) < HEAP_KB * 1024
    (desk.folder / "flash.img").unlink()
    assert desk.live(heap_kb=HEAP_KB)["state"] == "provisioned"
