"""docs/socket.openapi.yaml describes the socket as it is: schemathesis asks the running service and compares."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
import yaml

from dps_agent.host.local.routes import PATHS
from support.cloud.emulator import EmulatorInThread
from support.documents import CHECKOUT
from support.programs.running_agent import RunningAgent
from support.programs.tcp_relay import TcpRelay
from support.tpm.states import copy_state

DEVICE = "press-07"
DESCRIPTION = CHECKOUT / "docs" / "socket.openapi.yaml"
EXAMPLES = 25  # of each phase and operation
PATIENCE_S = 300
API = "[api]\nallow_token = true\n"  # up to so many a minute, so that both answers come
# What is sent has no meaning for a hub in most cases: whether an error was right is for the tests of the service.
CHECKS = (
    *("status_code_conformance", "content_type_conformance", "response_headers_conformance"),
    *("response_schema_conformance", "unsupported_method", "positive_data_acceptance"),
)


@pytest.fixture
def agent(tmp_path: Path, emulator: EmulatorInThread) -> Iterator[RunningAgent]:
    folder = copy_state("press-07", tmp_path / "tpm")
    with RunningAgent(tmp_path, emulator, f'backend = "simulator"\ntcti = "{folder}"', API) as found:
        found.start()
        found.await_connected()
        yield found


def described() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(DESCRIPTION.read_text())
    return found


def schema_of(name: str) -> Any:
    """A validator for one of the described schemas."""
    return jsonschema_rs.validator_for({**described(), "$ref": f"#/components/schemas/{name}"})


def test_every_path_of_the_socket_is_described_and_no_other() -> None:
    served = {tuple(path.partition("?")[0].split()) for path in PATHS}
    known = {(method.upper(), path) for path, entry in described()["paths"].items() for method in entry}
    assert known == served - {("POST", "/command/{name}")}


def schemathesis(agent: RunningAgent, description: Path, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """A run against the service, without the events, which do not end."""
    with TcpRelay(agent.client.path) as relay:
        command = [str(Path(sys.executable).with_name("schemathesis")), "run", str(description)]
        command += [
            "--url",
            f"http://127.0.0.1:{relay.port}",
            "--exclude-path",
            "/events",
            "--checks",
            ",".join(CHECKS),
        ]
        command += ["--max-examples", str(EXAMPLES), "--phases", "examples,coverage,fuzzing", "--seed", "1"]
        command += ["--request-timeout", "60", "--suppress-health-check", "all", "--warnings", "off", *words]
        return subprocess.run(
            command,
            cwd=folder,
            env={**os.environ, "NO_COLOR": "1", "COLUMNS": "200"},
            capture_output=True,
            text=True,
            check=False,
            timeout=PATIENCE_S,
        )


def test_the_running_service_answers_as_it_is_described(agent: RunningAgent, tmp_path: Path) -> None:
    done = schemathesis(agent, DESCRIPTION, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert agent.status()["connected"], "the service is still at work"


def test_an_answer_that_is_not_described_is_noticed(agent: RunningAgent, tmp_path: Path) -> None:
    false = described()
    false["components"]["schemas"]["Status"]["properties"]["connected"] = {"type": "string"}
    (tmp_path / "false.yaml").write_text(yaml.safe_dump(false))
    done = schemathesis(agent, tmp_path / "false.yaml", tmp_path, "--include-path", "/status")
    assert done.returncode == 1 and "is not of type" in done.stdout, done.stdout + done.stderr


def test_events_are_as_they_are_described(agent: RunningAgent, emulator: EmulatorInThread) -> None:
    event = schema_of("Event")
    with agent.client.events() as events:
        found = [events.next("desired")]
        emulator.set_desired(DEVICE, {"interval": 30})
        found.append(events.next("desired"))
        for payload in (b'{"door": 7}', b"good night", b"\x00\xff"):
            emulator.send_c2d(DEVICE, payload, {"urgent": "yes"})
            found.append(events.next("message"))
    for document in found:
        event.validate(document)
    assert not event.is_valid({"event": "desired"}) and not event.is_valid({"event": "nothing"})
    assert {name for document in found for name in document if name.startswith("payload")} == {
        *("payload", "payloadText", "payloadBase64"),
    }
    assert json.dumps(found[1]).count("interval") == 2, "in the whole, and in what has changed"
