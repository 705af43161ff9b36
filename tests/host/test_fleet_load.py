"""`tools/fleet load`: locust's machines begin exactly the devices that were asked for, and say what became of them."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from dps_emulator.service import Settings
from dps_fleet import cli
from dps_fleet.load import summary
from support.cloud.emulator import EmulatorInThread
from support.programs.tools import begun

TOOL = Path(__file__).parents[2] / "tools/fleet"
PATIENCE_S = 900  # the first run on a machine downloads locust


def words(emulator: EmulatorInThread, *more: str) -> list[str]:
    return [str(TOOL), "load", "--url", emulator.url, "--ca-file", str(emulator.ca_file), *more]


def free_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return str(server.getsockname()[1])


def registered(emulator: EmulatorInThread) -> set[str]:
    return {line.registration_id for line in emulator.log if line.method == "PUT" and line.status == 202}


def test_a_master_with_two_workers_registers_each_device_that_was_asked_for(
    emulator: EmulatorInThread, tmp_path: Path
) -> None:
    said, port = tmp_path / "said.json", free_port()
    common = ("--devices", "7", "--at-once", "3", "--timeout", "10m")
    master = ("--master", "--expect-workers", "2", "--master-bind-host", "127.0.0.1", "--master-bind-port", port)
    worker = words(emulator, *common, "--", "--worker", "--master-host", "127.0.0.1", "--master-port", port)
    with ExitStack() as running:
        first = running.enter_context(
            begun(words(emulator, *common, "--json", str(said), "--", *master), os.environ, stdout=subprocess.PIPE)
        )
        workers = [running.enter_context(begun(worker, os.environ, stdout=subprocess.PIPE)) for _ in range(2)]
        out, _ = first.communicate(timeout=PATIENCE_S)
        others = [other.communicate(timeout=PATIENCE_S)[0] for other in workers]
    assert first.returncode == 0, out
    assert [other.returncode for other in workers] == [0, 0], others
    assert len(registered(emulator)) == 7, "seven devices, not three times two or four"
    assert len({name.split("-")[1] for name in registered(emulator)}) == 2, "both workers began some"
    found = json.loads(said.read_text())
    assert {name: found[name] for name in ("asked", "devices", "registered", "failed", "requestsADevice")} == {
        "asked": 7, "devices": 7, "registered": 7, "failed": 0, "requestsADevice": 4.0,
    }  # fmt: skip
    assert not any("requestsADevice" in other for other in others), "what it came to is the master's to say"


def test_a_device_that_the_end_of_the_run_finds_unregistered_is_a_failure(tmp_path: Path) -> None:
    said = tmp_path / "said.json"
    with EmulatorInThread(Settings(retry_after_s=0, enroll_any=True, quota_per_min=1)) as emulator:
        command = words(emulator, "--devices", "4", "--at-once", "3", "--timeout", "20s", "--json", str(said))
        with begun(command, os.environ, stdout=subprocess.PIPE) as process:
            out, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 1, out
    found = json.loads(said.read_text())
    assert found["asked"] == 4 and found["refusedADevice"] > 0, found
    assert 3 <= found["devices"] <= 3 + found["registered"], "one more begins where one has its hub"
    assert found["failed"] == 4 - found["registered"] >= 3, found


def test_a_master_that_loses_its_last_worker_ends_and_says_what_is_left(tmp_path: Path) -> None:
    said, port = tmp_path / "said.json", free_port()
    with EmulatorInThread(Settings(retry_after_s=0, enroll_any=True, quota_per_min=1)) as emulator:
        common = ("--devices", "4", "--at-once", "2", "--timeout", "10h")
        master = ("--master", "--expect-workers", "1", "--master-bind-host", "127.0.0.1", "--master-bind-port", port)
        worker = ("--worker", "--master-host", "127.0.0.1", "--master-port", port)
        with ExitStack() as running:
            command = words(emulator, *common, "--json", str(said), "--", *master)
            first = running.enter_context(begun(command, os.environ, stdout=subprocess.PIPE))
            other = running.enter_context(begun(words(emulator, *common, "--", *worker), os.environ))
            deadline = time.monotonic() + PATIENCE_S
            while len(emulator.log) < 3:
                assert time.monotonic() < deadline and first.poll() is None, "nobody asked"
                time.sleep(0.1)
            for child in Path(f"/proc/{other.pid}/task/{other.pid}/children").read_text().split():
                os.kill(int(child), signal.SIGTERM)  # locust's
            out, _ = first.communicate(timeout=PATIENCE_S)
    found = json.loads(said.read_text())
    assert first.returncode == 1 and found["asked"] == 4 and found["failed"] >= 3, out


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_the_tool_ends_locust_and_says_what_is_left(number: signal.Signals, tmp_path: Path) -> None:
    said = tmp_path / "said.json"
    with EmulatorInThread(Settings(retry_after_s=0, enroll_any=True, quota_per_min=1)) as emulator:
        command = words(emulator, "--devices", "4", "--at-once", "2", "--timeout", "10h", "--json", str(said))
        with begun(command, os.environ, stdout=subprocess.PIPE) as process:
            deadline = time.monotonic() + PATIENCE_S
            while len(emulator.log) < 1:
                assert time.monotonic() < deadline and process.poll() is None, "nobody asked"
                time.sleep(0.1)
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            process.send_signal(number)
            out, _ = process.communicate(timeout=PATIENCE_S)
    assert len(children) == 1 and not Path(f"/proc/{children[0]}").exists(), children
    assert process.returncode == 1, out
    found = json.loads(said.read_text())
    assert found["asked"] == 4 and found["failed"] >= 2, found


def test_what_never_began_counts_as_failed() -> None:
    line: dict[str, Any] = {"registered": True, "requests": 4, "refused": 0, "challenges": 1, "unanswered": 0}
    found = summary([{**line, "endedS": 2.0}], 3, 1.0)
    assert (found["asked"], found["devices"], found["registered"], found["failed"]) == (3, 1, 1, 2)
    assert summary([], 2, 1.0)["failed"] == 2


@pytest.mark.parametrize(
    "url",
    [
        "https://global.azure-devices-provisioning.net",
        "https://GLOBAL.azure-devices-provisioning.CN.:443/",
        "https://x.azure-devices-provisioning.us",
        "https://x.azure-devices.net:8883",
        "http://localhost:1",
        "localhost:8443",
        "https://localhost:999999",
        "https://a@localhost",
    ],
)
def test_no_load_is_put_on_azure_or_on_what_is_no_url(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.run(["load", "--url", url, "--ca-file", "ca.pem"])
    said = capsys.readouterr().err.splitlines()[-1]
    assert ended.value.code == 2 and ("is Azure's" if "azure" in url else "expected a URL") in said


def test_the_host_of_the_url_is_the_one_that_is_dialled_and_named(tmp_path: Path) -> None:
    code = """\
import sys, os
from dps_fleet.load import Device
os.environ |= {"DPS_FLEET_CA_FILE": "", "DPS_FLEET_ID_SCOPE": "0ne00000000"}
connection = Device("https://dps.test.example:8443/", None, None, None)._connection
print(connection._dial_host, connection._dial_port, connection._authority)
"""
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["dps.test.example", "8443", "dps.test.example:8443"], done.stderr
