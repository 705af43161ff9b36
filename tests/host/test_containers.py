"""The service as a container runs it: process 1 of its own processes, and nothing to write on but its two folders."""

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from dps_agent.host.local.statefile import FILE_NAME
from dps_emulator.service import Settings
from support.cloud.emulator import EmulatorInThread
from support.programs.running_agent import CHECKOUT, PATIENCE_S, RunningAgent
from support.tpm.states import copy_state


def test_process_1_on_a_root_that_is_read_only_connects_and_ends_at_sigterm(tmp_path: Path) -> None:
    tpm = copy_state("press-07", tmp_path / "tpm")
    with (
        EmulatorInThread(Settings(enroll_any=True, retry_after_s=0)) as emulator,
        RunningAgent(tmp_path, emulator, f'backend = "simulator"\ntcti = "{tpm}"') as agent,
    ):
        folders = [str(agent.state_dir), str(agent.runtime_dir), str(tpm)]
        for folder in folders:
            Path(folder).mkdir(exist_ok=True)
        agent_words = [sys.executable, "-m", "dps_agent.host.cli", "--config", str(agent.settings)]
        command = shlex.join([*agent_words, "run"])
        wait = shlex.join([*agent_words, "wait", "--timeout", str(int(PATIENCE_S))])
        status = shlex.join([*agent_words, "status", "--json"])
        script = "\n".join(
            [
                "set -e",
                "mount --make-rprivate /",
                *(f"mount --bind {folder} {folder}" for folder in folders),
                "mount -o remount,ro,bind /",
                f"if touch {tmp_path}/written 2>/dev/null; then exit 9; fi",
                f"({wait} && {status}; kill -TERM 1) &",
                f"exec {command}",
            ]
        )
        paths = os.pathsep.join([str(CHECKOUT / "agent"), str(CHECKOUT / "hal")])
        began_s = time.monotonic()
        ended = subprocess.run(
            ["unshare", "--mount", "--pid", "--fork", "--mount-proc", "sh", "-c", script],
            env={**os.environ, "PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True,
            text=True,
            timeout=2 * PATIENCE_S,
            check=False,
        )
    said = f"after {time.monotonic() - began_s:.0f} s:\n{ended.stdout}\n{ended.stderr}"
    assert ended.returncode == 0, said
    connected, shown = ended.stdout.splitlines()
    assert connected == "connected: emulator.azure-devices.net", said
    assert json.loads(shown)["pid"] == 1, said
    assert "dps-agent ends" in ended.stderr and not (agent.runtime_dir / FILE_NAME).exists(), said


# A program in a container: for each line it is sent it asks at the socket under its own mount, and says what came.
PROGRAM = """
import socket, sys
for _ in sys.stdin:
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(60)
        try:
            client.connect(sys.argv[1])
            client.sendall(b"GET /status HTTP/1.1\\r\\n\\r\\n")
            print(client.recv(15).decode(), flush=True)
        except FileNotFoundError:
            print("no socket", flush=True)
"""
ANSWERED = "HTTP/1.1 200 OK"


def test_a_bind_mount_of_the_runtime_folder_survives_restarts_of_the_service_for_as_long_as_the_folder_stays(
    tmp_path: Path,
) -> None:
    tpm = copy_state("press-07", tmp_path / "tpm")
    mounted = tmp_path / "container"
    mounted.mkdir()
    with (
        EmulatorInThread(Settings(enroll_any=True, retry_after_s=0)) as emulator,
        RunningAgent(tmp_path, emulator, f'backend = "simulator"\ntcti = "{tpm}"') as agent,
    ):
        agent.start()
        agent.await_connected()
        words = shlex.join([sys.executable, "-c", PROGRAM, str(mounted / "api.sock")])
        mount = shlex.join(["mount", "--bind", str(agent.runtime_dir), str(mounted)])
        paths = os.pathsep.join([str(CHECKOUT / "agent"), str(CHECKOUT / "hal")])
        with subprocess.Popen(
            ["unshare", "--mount", "sh", "-c", f"set -e\nmount --make-rprivate /\n{mount}\nexec {words}"],
            env={**os.environ, "PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as container:
            assert container.stdin is not None and container.stdout is not None

            def said() -> str:
                container.stdin.write("\n")
                container.stdin.flush()
                return container.stdout.readline().strip()

            assert said() == ANSWERED
            for removed in (False, True):  # what systemd does to it, with and without RuntimeDirectoryPreserve=yes
                agent.end()
                assert said() == "no socket"
                if removed:
                    shutil.rmtree(agent.runtime_dir)
                agent.start()
                agent.await_connected()
                assert said() == ("no socket" if removed else ANSWERED)
            container.stdin.close()
    assert container.returncode == 0
