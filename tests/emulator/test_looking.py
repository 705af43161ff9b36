"""Looking and waiting from the shell: what has arrived and arrives, who is enrolled, who has registered."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from dps_emulator.cli import main
from emulator.device_side import Device
from emulator.paho_device import PahoDevice
from emulator.test_cli import RID, provision
from support.cloud.emulator import EmulatorProcess

HUB = "emulator.azure-devices.net"
EK = base64.b64encode(Device.of_the_vectors().ek_public).decode()
SOURCES = os.pathsep.join(str(Path(__file__).parents[2] / name) for name in ("tools", "agent"))
SECRETS = ("SharedAccessKey", '"key"')


@pytest.fixture(scope="module")
def emulator() -> Iterator[EmulatorProcess]:
    with EmulatorProcess() as emulator:
        yield emulator


@contextmanager
def started(*words: str) -> Iterator[subprocess.Popen[str]]:
    """A command of its own process, killed at the end."""
    process = subprocess.Popen(
        [sys.executable, "-m", "dps_emulator.cli", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": SOURCES},
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def test_asking_a_running_server_loads_nothing_of_what_serves(emulator: EmulatorProcess) -> None:
    ask = f"from dps_emulator.cli import main; main(['devices', '--state-dir', {str(emulator.state_dir)!r}])"
    heavy = "'cryptography', 'trustme', 'uvicorn', 'starlette', 'asyncio', 'ssl', 'h11', 'urllib.request'"
    ended = subprocess.run(
        [sys.executable, "-c", f"import sys; {ask}; print({{{heavy}}} & set(sys.modules), len(sys.modules))"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": SOURCES},
    )
    loaded, count = ended.stdout.splitlines()[-1].rsplit(" ", 1)
    assert loaded == "set()", loaded
    assert int(count) < 160


def test_messages_are_listed_since_a_time_and_forgotten_on_command(emulator: EmulatorProcess, said: Any) -> None:
    device, other = emulator.add_device("press-20"), emulator.add_device("press-21")
    for each in (device, other):
        with PahoDevice(emulator, each) as client:
            assert client.connect() == 0
            assert client.send(b"1") and client.send(b"2")
    _, listed = said("messages", "press-20", "--json")
    first, second = listed["messages"]
    assert first["time"] < second["time"]
    for since, payloads in (
        ("1d", ["1", "2"]),
        (second["time"], ["2"]),
        ("2999-01-01", []),
        ("2020-01-01T00:00Z", ["1", "2"]),
    ):
        _, listed = said("messages", "PRESS-20", "--since", since, "--json")
        assert [message["payload"] for message in listed["messages"]] == payloads, since
    assert said("messages", "press-20", "--clear")[1].count("\n") == 1
    assert said("messages", "press-20") == (0, "nothing has arrived")
    assert len(said("messages", "press-21", "--json")[1]["messages"]) == 2
    assert said("messages", "nobody") == (1, "dps-emulator: no hub has a device 'nobody'")
    assert said("watch", "nobody") == (1, "dps-emulator: no hub has a device 'nobody'")
    assert said("messages", "--follow", "--clear")[0] == 2
    with pytest.raises(SystemExit):
        said("messages", "--since", "yesterday")


def test_watching_prints_what_arrives_from_then_on_and_ends_by_count_or_time(
    emulator: EmulatorProcess, said: Any
) -> None:
    device = emulator.add_device("press-22")
    with PahoDevice(emulator, device) as client:
        assert client.connect() == 0
        assert client.send(b"before")
        with started("watch", "press-22", "--count", "2", "--json", "--state-dir", str(emulator.state_dir)) as watching:
            assert watching.stdout is not None and watching.stderr is not None
            assert "watching what arrives" in watching.stderr.readline()
            for number in range(2):
                sent = f"{number}".encode()
                assert client.send(sent, "unit=C")
                message = json.loads(watching.stdout.readline())
                assert (message["payload"], message["properties"], message["deviceId"]) == (
                    sent.decode(),
                    {"unit": "C"},
                    "press-22",
                )
            assert watching.wait(60) == 0
    assert said("watch", "press-22", "--count", "1", "--timeout", "1")[0] == 3
    assert said("watch", "--timeout", "1")[0] == 0


def test_following_begins_with_what_is_there_and_ends_by_an_interrupt_or_with_the_server(
    emulator: EmulatorProcess,
) -> None:
    with EmulatorProcess() as own:
        device = own.add_device("press-23")
        with PahoDevice(own, device) as client:
            assert client.connect() == 0
            assert client.send(b"before")
            words = ("messages", "--follow", "--state-dir", str(own.state_dir))
            with started(*words) as interrupted, started(*words) as left:
                for process in (interrupted, left):
                    assert process.stdout is not None and "before" in process.stdout.readline()
                assert client.send(b"after")
                for process in (interrupted, left):
                    assert process.stdout is not None and "after" in process.stdout.readline()
                interrupted.send_signal(signal.SIGINT)
                assert interrupted.wait(60) == 0
                assert own.stop() == 0
                assert left.wait(60) == 1
                assert left.stderr is not None
                (line,) = left.stderr.read().splitlines()
                assert line.startswith("dps-emulator: ") and str(own.state_dir) in line


def test_enrolments_are_listed_shown_disabled_enabled_and_deleted_also_beside_a_server(
    emulator: EmulatorProcess, said: Any, tmp_path: Path
) -> None:
    assert said("enrollments") == (0, "nobody is enrolled") and said("registrations") == (0, "nobody has registered")
    csv = tmp_path / "a.csv"
    csv.write_text(f"registrationId,endorsementKey,iotHubHostName\n{RID},{EK},\nPress-30,{EK},{HUB}\n")
    assert said("enroll-import", str(csv))[0] == 0
    status, text = said("enrollments")
    first, second = text.splitlines()
    assert status == 0 and first.startswith("Press-30: enabled, EK ") and second.startswith(f"{RID}: enabled, EK ")
    assert first.endswith(f", for {HUB}, has not registered yet")
    provision(emulator)
    assert not said("enrollments")[1].splitlines()[1].endswith("yet")
    status, listed = said("registrations", "--json")
    (entry,) = listed["registrations"]
    assert (entry["status"], entry["assignedHub"], entry["deviceId"]) == ("assigned", HUB, RID)
    for shown in (json.dumps(listed), said("registrations")[1], said("enrollments")[1]):
        assert not any(secret in shown for secret in SECRETS), shown
    assert said("enrollment", "disable", RID) == (0, f"disabled: {RID}")
    with pytest.raises(KeyError):
        provision(emulator)  # refused: there is no challenge
    assert said("enrollment", "show", RID, "--json")[1]["enrollment"]["provisioningStatus"] == "disabled"
    assert said("enrollment", "enable", RID.upper()) == (0, f"enabled: {RID}")
    assert provision(emulator)[0]["status"] == "assigned"
    assert json.loads(said("enrollment", "show", "press-30")[1])["registrationId"] == "Press-30"
    assert said("enrollment", "delete", "press-30") == (0, "deleted: Press-30")
    status, text = said("enrollment", "delete", "press-30")
    assert (status, text) == (1, f"dps-emulator: no enrolment for 'press-30' in {emulator.state_dir}")
    assert said("enrollment", "show", RID[:-1])[1].endswith(f"did you mean '{RID}'?")
    assert len(said("enrollments", "--json")[1]["enrollments"]) == 1


@pytest.mark.parametrize(
    ("words", "meant"),
    [(["devcies"], "devices"), (["enrolments"], "enrollments"), (["enrollment", "delet", "x"], "delete")],
)
def test_a_mistyped_command_is_answered_with_the_one_that_was_meant(
    words: list[str], meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2 and f"did you mean '{meant}'?" in capsys.readouterr().err


def test_a_ready_file_says_where_it_listens_while_it_does(tmp_path: Path) -> None:
    ready = tmp_path / "ready.json"
    ready.write_text("left by one that was killed")
    with EmulatorProcess("--ready-file", str(ready)) as emulator:
        deadline = time.monotonic() + 60
        while not ready.exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert json.loads(ready.read_text()) == {
            "dps": f"https://127.0.0.1:{emulator.port}",
            "hubs": f"mqtts://127.0.0.1:{emulator.hub_port}",
            "caFile": str(emulator.ca_file),
        }
        assert emulator.stop() == 0
        assert not ready.exists()
