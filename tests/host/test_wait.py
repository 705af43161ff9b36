"""`dps-agent wait`: what it waits for, how often it looks, and what it says where that does not come."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dps_agent.host.cli import main, wait
from dps_agent.host.local.statefile import StateFile
from dps_hal.contracts import IDENTITY
from dps_hal.host.files import FileStore

ERROR = {"code": "dps.not_enrolled", "message": "DPS knows no such device", "remedy": "enrol it", "requestId": "r1"}


class Desk:
    """A device whose service says of itself what a test wants, on a clock of its own."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.now_s = 1000.0
        self.slept_s: list[float] = []
        self.then: dict[int, Callable[[], None]] = {}  # what happens meanwhile, by the number of the sleep
        self._file = StateFile(str(folder))
        monkeypatch.setattr(wait.time, "monotonic", lambda: self.now_s)
        monkeypatch.setattr(wait.time, "sleep", self._sleep)
        for name in [name for name in os.environ if name.startswith("DPS_AGENT_")]:
            monkeypatch.delenv(name)

    def _sleep(self, delay_s: float) -> None:
        self.slept_s.append(delay_s)
        self.now_s += delay_s
        self.then.get(len(self.slept_s), int)()

    def says(self, state: str, reason: str = "why", **more: Any) -> None:
        hub = "hub.azure-devices.net" if state in wait._FOR["assigned"] else ""
        document: dict[str, Any] = {"stateDir": str(self.folder), "state": state, "reason": reason}
        document |= dict.fromkeys(("since", "until", "deviceId", "registrationId", "version", "socket"), "")
        document |= {"assignedHub": hub, "sinceUptimeS": 0, "untilUptimeS": None, "lastError": None}
        self._file.show({**document, "connections": 0, "failedAttempts": 0, **more})

    def ends(self) -> None:
        self._file.remove()

    def wait(self, *words: str, scope: str = "0ne00000000") -> int:
        settings = self.folder / "given.toml"
        settings.write_text(f'state_dir = "{self.folder}"\nruntime_dir = "{self.folder}"\n')
        given = ["--set", f"id_scope={scope}"] if scope else []
        return main(["--config", str(settings), *given, "wait", *words])


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Desk:
    return Desk(tmp_path, monkeypatch)


def test_what_is_there_already_is_not_waited_for(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    desk.says("connected")
    assert (desk.wait(), desk.slept_s) == (0, [])
    assert capsys.readouterr().out == "connected: hub.azure-devices.net\n"
    assert desk.wait("--for", "assigned", "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["code"], answer["verb"], answer["waitedFor"]) == ("ok", "wait", "assigned")
    assert (answer["state"], answer["running"], answer["waitedS"]) == ("connected", True, 0)


@pytest.mark.parametrize("state", ["provisioned", "connecting", "connected"])
def test_a_device_with_a_hub_is_assigned_and_connected_once_it_is(state: str, desk: Desk) -> None:
    desk.says(state)
    assert desk.wait("--for", "assigned") == 0 and desk.slept_s == []
    assert desk.wait("--timeout", "3") == (0 if state == "connected" else 3)


def test_it_looks_once_a_second_until_the_service_has_started_and_connected(desk: Desk) -> None:
    desk.then = {
        2: lambda: desk.says("provisioning"),
        3: lambda: desk.says("waiting"),
        4: desk.ends,
        5: lambda: desk.says("connecting"),
        7: lambda: desk.says("connected"),
    }
    assert desk.wait() == 0
    assert desk.slept_s == [1.0] * 7


def test_the_time_is_kept_to_the_second_and_what_it_waited_for_is_said(
    desk: Desk, capsys: pytest.CaptureFixture[str]
) -> None:
    assert desk.wait("--timeout", "5") == 3
    assert sum(desk.slept_s) == 5
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("dps-agent: not connected within 5 s: no service runs with the state")
    assert "[agent.not_running]" in said.err and "start the service" in said.err and "--timeout" not in said.err
    desk.says("waiting", "DPS did not answer", untilUptimeS=desk.now_s + 90)
    assert desk.wait("--for", "assigned", "--timeout", "2", "--json") == 3
    answer = json.loads(capsys.readouterr().out)
    assert answer["error"]["message"] == "not assigned within 2 s: waiting: DPS did not answer"
    assert answer["error"]["code"] == "agent.out_of_time"
    assert answer["code"] == "retry"


def test_a_device_for_which_somebody_has_to_act_first_is_not_waited_for(
    desk: Desk, capsys: pytest.CaptureFixture[str]
) -> None:
    desk.says("halted", "DPS knows no such device", lastError=ERROR)
    assert (desk.wait(), desk.slept_s) == (4, [])
    said = capsys.readouterr().err
    assert "DPS knows no such device" in said and "[dps.not_enrolled]" in said
    desk.says("halted", "a TPM that is locked", lastError={**ERROR, "code": "tpm.denied"})
    assert desk.wait() == 5


def test_without_an_id_scope_there_is_nothing_to_wait_for_unless_a_service_runs(
    desk: Desk, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (desk.wait(scope=""), desk.slept_s) == (6, [])
    assert "id_scope" in capsys.readouterr().err
    desk.says("connected")  # with an ID scope of its own, from its environment
    assert desk.wait(scope="") == 0


def test_a_stored_assignment_is_a_hub_without_a_service(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    assert desk.wait("--for", "assigned", "--timeout", "1") == 3
    assert "unprovisioned: no assignment is stored" in capsys.readouterr().err
    FileStore(str(desk.folder)).commit(IDENTITY, b"{}")
    assert desk.wait("--for", "assigned", "--timeout", "1") == 3
    assert desk.wait("--timeout", "1") == 3


@pytest.mark.parametrize("words", [("--for", "ever"), ("--timeout", "0"), ("--timeout", "soon")])
def test_a_wait_that_is_none_is_a_wrong_command_line(words: tuple[str, ...], desk: Desk) -> None:
    assert desk.wait(*words) == 2
