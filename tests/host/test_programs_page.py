"""docs/programs.md: its tables are those of the code, and its samples in other languages work where these can be run.

What it has for Python and the shell is run with the other documents.
"""

import inspect
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from dps_agent import client as library
from dps_agent.client import AgentError, AsyncClient, Client, Spool
from dps_agent.client.spool import DROPPED
from support.documents import CHECKOUT, blocks_of, table_under
from support.programs.scripted_service import ScriptedService, answer, error

PAGE = CHECKOUT / "docs" / "programs.md"
LINES_LIMIT = {"telemetry.js": 30, "telemetry.go": 40}
PATIENCE_S = 300


def names_in(title: str) -> set[str]:
    """What stands between backquotes in the first column of a table, without parameters."""
    return {name.partition("(")[0] for row in table_under(PAGE, title) for name in re.findall("`(.+?)`", row[0])}


def methods_of(door: type) -> dict[str, Any]:
    """What a program may call."""
    return {name: found for name, found in inspect.getmembers(door, callable) if not name.startswith("_")}


def test_every_method_is_in_the_table_and_no_other() -> None:
    assert names_in("The methods") == set(methods_of(Client))


def test_both_doors_have_the_same_methods_with_the_same_parameters() -> None:
    blocking, tasks = methods_of(Client), methods_of(AsyncClient)
    assert set(blocking) == set(tasks)
    for name, method in blocking.items():
        ours, theirs = (inspect.signature(found).parameters for found in (method, tasks[name]))
        assert [*ours.values()] == [*theirs.values()], name
    assert inspect.signature(Client).parameters == inspect.signature(AsyncClient).parameters


def test_every_class_of_error_is_in_the_table_and_no_other() -> None:
    rows = {row[0].strip("`"): row[1] for row in table_under(PAGE, "Errors")}
    classes = {name: found for name in library.__all__ if isinstance(found := getattr(library, name), type)}
    errors = {name for name, found in classes.items() if issubclass(found, AgentError) and found is not AgentError}
    assert set(rows) == errors


def test_the_settings_of_a_spool_are_those_of_the_code() -> None:
    rows = {row[0].strip("`"): json.loads(row[1].strip("`")) for row in table_under(PAGE, "A spool")}
    parameters = inspect.signature(Spool).parameters
    assert rows == {name: found.default for name, found in parameters.items() if name != "path"}
    for reason in DROPPED:
        assert f"`{reason}`" in PAGE.read_text()


def sample(name: str, folder: Path, socket: Path) -> Path:
    """A file of the page that speaks to this socket."""
    (block,) = [found for found in blocks_of(PAGE) if found.detail == name]
    assert len(block.text.splitlines()) <= LINES_LIMIT[name]
    assert block.text.count("/run/dps-agent/api.sock") == 1
    path = folder / name
    path.write_text(block.text.replace("/run/dps-agent/api.sock", str(socket)))
    return path


def runs_and_waits_as_asked(command: list[str], socket: Path, environ: dict[str, str]) -> None:
    left = [error(503, "agent.not_connected", 1), answer(200, {"accepted": True})]
    with ScriptedService(socket, lambda _asked: left.pop(0)) as service:
        done = subprocess.run(
            command, env={**os.environ, **environ}, capture_output=True, text=True, check=False, timeout=PATIENCE_S
        )
    assert (done.returncode, done.stdout) == (0, "200\n"), done.stderr
    assert service.lines() == ["POST /telemetry?line=3&%24.ct=application%2Fjson&%24.ce=utf-8"] * 2
    assert {asked.body for asked in service.asked} <= {b'{"temperature":21.5}', b'{"temperature": 21.5}'}
    assert service.asked[1].at_s - service.asked[0].at_s >= 1


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_the_sample_for_node_sends_and_waits_as_long_as_it_is_asked_to(tmp_path: Path) -> None:
    socket = tmp_path / "api.sock"
    runs_and_waits_as_asked(["node", str(sample("telemetry.js", tmp_path, socket))], socket, {})


@pytest.mark.skipif(shutil.which("go") is None, reason="go is not installed")
def test_the_sample_for_go_sends_and_waits_as_long_as_it_is_asked_to(tmp_path: Path) -> None:
    socket = tmp_path / "api.sock"
    environ = {"GOCACHE": str(tmp_path / "cache"), "GOFLAGS": "-mod=mod", "GO111MODULE": "off", "HOME": str(tmp_path)}
    runs_and_waits_as_asked(["go", "run", str(sample("telemetry.go", tmp_path, socket))], socket, environ)
