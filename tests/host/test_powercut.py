"""`tools/powercut`: every sweep loses nothing, catches its controls, and cannot be skipped in silence."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from support.programs.tools import begun, processes_that_name, until

TOOL = str(Path(__file__).parents[2] / "tools/powercut")
ALLOWED = set(os.environ.get("ALLOW_SKIP", "").replace(",", " ").split())
DEADLINE_S = 1800
HERE = {**os.environ, "DPS_POWERCUT_INSIDE": "1"}  # with this Python, whatever it lacks
LEAST_STATES = {
    "lives": 20_000,
    "lives-by-key": 5_000,
    "lives-by-certificate": 5_000,
    "lives-by-issuance": 5_000,
    "littlefs": 1_000,
    "disk": 5_000,
    "ext4": 200,
    "tpm": 200,
}


def powercut(*words: str, **environ: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, TOOL, *words],
        check=False,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        env={**os.environ, **environ},
    )


@pytest.mark.parametrize("sweep", LEAST_STATES)
def test_the_sweep_loses_nothing_and_catches_every_control(sweep: str) -> None:
    done = powercut("--sweep", sweep, "--json")
    assert done.returncode == 0, f"tools/powercut --sweep {sweep}: {done.returncode}\n{done.stdout}{done.stderr}"
    document: dict[str, Any] = json.loads(done.stdout)
    assert document["lost"] == 0 and document["controlsMissed"] == 0
    if document["skipped"]:
        assert set(document["skipped"]) <= ALLOWED, f"{sweep} was skipped: {done.stderr}"
        return
    assert document["states"] >= LEAST_STATES[sweep], f"only {document['states']} states: the sweep does not sweep"
    assert document["controlsCaught"] > 0
    assert document["sweeps"][sweep]["seconds"] > 0 and document["perCommit"]["slots"]["erase"] == 1
    print(f"{sweep}: {document['states']} states, {document['sweeps'][sweep]['seconds']} s")


@pytest.mark.parametrize(
    ("sweep", "writer"),
    [("littlefs", "naive"), ("lives", "single-slot"), ("disk", "trusts-the-cache"), ("tpm", "in-place")],
)
def test_a_faulty_writer_ends_with_status_1_and_its_line_reproduces_the_loss(sweep: str, writer: str) -> None:
    done = powercut("--sweep", sweep, "--writer", writer)
    assert done.returncode == 1, done.stdout + done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("  LOST "))
    name = line.removeprefix("  LOST ").partition(":")[0]
    again = powercut("--writer", writer, "--only", name, "--json")
    assert again.returncode == 1, again.stdout + again.stderr
    document = json.loads(again.stdout)
    assert document["states"] == 1 and document["lostStates"][0] == line.removeprefix("  LOST ")
    honest = powercut("--only", name, "--json")
    document = json.loads(honest.stdout)
    # The product's writer does other things than the faulty one, so that it may have no state of this name.
    assert document["lost"] == 0 and honest.returncode == (0 if document["states"] else 2), (
        honest.stdout + honest.stderr
    )


def test_the_state_that_the_document_names_exists_and_another_is_a_mistake() -> None:
    text = (Path(__file__).parents[2] / "docs" / "power-cuts.md").read_text()
    name = text.partition("--only '")[2].partition("'")[0]
    done = powercut("--only", name, "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["states"] == 1, done.stdout + done.stderr
    done = powercut("--only", "sweep=lives cut=999")
    assert done.returncode == 2 and "no state" in done.stderr, done.stdout + done.stderr


def test_a_sweep_that_cannot_run_is_a_failure_unless_it_is_named() -> None:
    without_swtpm = {"PATH": "/nonexistent"}
    done = powercut("--sweep", "tpm", **without_swtpm, ALLOW_SKIP="ext4")
    assert done.returncode == 2 and "swtpm" in done.stderr and "ALLOW_SKIP=tpm" in done.stderr, done.stderr
    done = powercut("--sweep", "tpm", "--json", **without_swtpm, ALLOW_SKIP="ext4,tpm")
    assert done.returncode == 0 and json.loads(done.stdout)["skipped"] == ["tpm"], done.stderr


def test_a_micropython_that_does_not_start_is_a_skipped_sweep_and_no_matter_for_the_others(tmp_path: Path) -> None:
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    shutil.copy(Path(sys.prefix) / "pyvenv.cfg", tmp_path)
    python.symlink_to(os.path.realpath(sys.executable))
    library = f"lib/python{sys.version_info[0]}.{sys.version_info[1]}"
    (tmp_path / library).mkdir(parents=True)
    (tmp_path / library / "site-packages").symlink_to(Path(sys.prefix) / library / "site-packages")
    micropython = python.with_name("micropython")

    def run(*words: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [str(python), TOOL, *words], check=False, capture_output=True, text=True, timeout=DEADLINE_S, env=HERE
        )

    for content, mode in ((None, 0), (b"", 0o600), (b"\x7fELF and not more", 0o700)):
        if content is not None:
            micropython.write_bytes(content)
            micropython.chmod(mode)
        done = run("--sweep", "littlefs")
        assert done.returncode == 2 and "ALLOW_SKIP=littlefs" in done.stderr, done.stdout + done.stderr
        assert str(micropython) in done.stderr and "Traceback" not in done.stderr, done.stderr
        done = run("--only", "sweep=disk plan=cut step=0 cut=3 left=0", "--json")
        assert done.returncode == 0 and json.loads(done.stdout)["states"] == 1, done.stdout + done.stderr
    done = run("--sweep", "lives-by-certificate", "--json")
    assert done.returncode == 0 and set(json.loads(done.stdout)["perCommit"]) == {"slots", "linux"}, done.stderr


def test_a_writer_of_other_sweeps_is_a_mistake_that_names_both() -> None:
    done = powercut("--sweep", "tpm", "--writer", "header-only")
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert "header-only belongs to the sweeps lives" in done.stderr and "tpm has evict-first" in done.stderr


@pytest.mark.parametrize(("sweep", "delay_s"), [("ext4", 0.05), ("ext4", 0.3), ("ext4", 0.7), ("tpm", 0.1)])
@pytest.mark.parametrize(
    "number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL], ids=lambda number: number.name
)
def test_whatever_ends_the_tool_leaves_no_process_and_no_folder_for_good(
    sweep: str, delay_s: float, number: signal.Signals, tmp_path: Path
) -> None:
    if sweep in ALLOWED:
        return
    environ = {**os.environ, "TMPDIR": str(tmp_path)}
    command = [sys.executable, TOOL, "--sweep", sweep]
    with begun(command, environ, stderr=subprocess.PIPE) as tool:
        under_way = "powercut-*/powercut-*/now" if sweep == "tpm" else "powercut-*/powercut-*/live"
        assert until(lambda: any(tmp_path.glob(under_way)) or tool.poll() is not None)
        time.sleep(delay_s)
        tool.send_signal(number)
        _, complaints = tool.communicate(timeout=60)
    assert "Traceback" not in complaints, complaints
    assert until(lambda: not processes_that_name(tmp_path)), processes_that_name(tmp_path)
    if number == signal.SIGKILL:
        assert list(tmp_path.glob("powercut-*")), "nothing was left, so that this shows nothing"
        done = powercut("--sweep", sweep, "--only", f"sweep={sweep} of no state", TMPDIR=str(tmp_path))
        assert done.returncode == 2 and "no state" in done.stderr, done.stdout + done.stderr
    else:
        assert tool.returncode == 128 + number and complaints.endswith("tools/powercut: stopped\n"), complaints
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_sweep_or_writer_is_a_mistake_that_names_the_known_ones() -> None:
    for words, known in ((("--sweep", "nvme"), "littlefs"), (("--writer", "careless"), "single-slot")):
        done = powercut(*words)
        assert done.returncode == 2 and known in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_the_interpreter_without_the_test_environment_says_what_is_missing() -> None:
    words = [sys.executable, "-I", "-S", TOOL]
    done = subprocess.run(words, check=False, capture_output=True, text=True, timeout=60, env=HERE)
    assert done.returncode == 2 and "is missing" in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_a_machine_that_can_not_make_the_environment_is_told_so_without_a_traceback(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    python = f"import os, runpy, sys; os.environ.pop('DPS_POWERCUT_INSIDE', None); sys.argv = [{TOOL!r}, '--json']\n"
    python += "import fresh_machine\n"
    python += "def refuse(packages): raise fresh_machine.NotReady('missing packages: swtpm')\n"
    python += f"fresh_machine.require_packages = refuse\nsys.executable = {str(blocked)!r}\n"
    python += f"runpy.run_path({TOOL!r}, run_name='__main__')\n"
    environ = {**os.environ, "PYTHONPATH": str(Path(TOOL).parent)}
    done = subprocess.run(
        [sys.executable, "-c", python], check=False, capture_output=True, text=True, timeout=60, env=environ
    )
    assert (done.returncode, done.stdout) == (2, ""), done.stdout + done.stderr
    assert done.stderr == "tools/powercut: missing packages: swtpm\n"


def test_wear_is_told_without_a_sweep() -> None:
    done = powercut("--endurance", "100000", "--per-day", "4")
    assert done.returncode == 0 and done.stdout.startswith("wear: at 4 registrations a day and 100000 erases")
    assert len(done.stdout.splitlines()) == 1
    assert json.loads(powercut("--per-day", "1", "--json").stdout)["wear"]["years"] > 20
    done = powercut("--sweep", "lives", "--per-day", "1")
    assert done.returncode == 2 and "run no sweep" in done.stderr, done.stderr
