"""The stages of `tools/test`: they run side by side, and what each says is printed whole, with what it came to."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from support.programs.tools import begun, processes_that_name, until

CHECKOUT = Path(__file__).parents[2]
ENVIRON = {**os.environ, "PYTHONPATH": str(CHECKOUT / "tools")}
RUNS = f"""
import os, pathlib, runpy, subprocess, sys, time
from process_tree import supervised
tool = runpy.run_path({str(CHECKOUT / "tools/test")!r})
Stage, Failed, stages = tool["Stage"], tool["Failed"], tool["Stages"](pathlib.Path(sys.prefix))
folder = pathlib.Path(sys.argv[1])
def until_there(name):
    while not (folder / name).exists():
        time.sleep(0.02)
def run(*checks):
    stages.run([Stage(check.__name__, check) for check in checks], 2)
    for verdict in stages.verdicts:
        print("came to", verdict.name, verdict.text)
    print(stages.passed, "passed,", stages.failed, "failed")
    return 0
"""
SIDE_BY_SIDE = """
def first():
    print("first of first")
    until_there("second")
    print("last of first")
    stages.passed += 3
    return "3 passed"
def second():
    subprocess.run(["echo", "of a program"])
    (folder / "second").touch()
    stages.passed, stages.failed = stages.passed + 4, 2
    raise Failed("two of them")
def third():
    raise Failed("it is broken")
def fourth():
    os._exit(7)
def fifth():
    raise ValueError("by accident")
def sixth():
    assert sum(range(10**6))
    return "passed"
supervised(lambda: run(first, second, third, fourth, fifth, sixth))
"""
WAITING = """
def waits():
    print("has begun", flush=True)
    stages.command(["python", "-c", "import pathlib, sys, time; pathlib.Path(sys.argv[1]).touch(); time.sleep(3600)",
                    str(folder / f"begun{os.getpid()}")])
sys.exit(supervised(lambda: run(waits, waits)))
"""


def test_stages_run_side_by_side_and_what_each_says_is_printed_whole(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", RUNS + SIDE_BY_SIDE, str(tmp_path)],
        env=ENVIRON, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "\n== first\nfirst of first\nlast of first\n" in done.stdout
    assert "\n== second\nof a program\n" in done.stdout
    assert "ValueError: by accident\n" in done.stdout.partition("\n== fifth\n")[2]
    lines = done.stdout.splitlines()
    assert [line for line in lines if line.startswith("came to")] == [
        "came to first 3 passed",
        "came to second FAILED: two of them",
        "came to third FAILED: it is broken",
        "came to fourth FAILED: it ended with status 7",
        "came to fifth FAILED: it ended with status 1",
        "came to sixth passed",
    ]
    assert lines[-1] == "7 passed, 5 failed"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL], ids=lambda number: number.name)
def test_whatever_ends_them_leaves_nothing_of_any_stage(number: signal.Signals, tmp_path: Path) -> None:
    words = [sys.executable, "-c", RUNS + WAITING, str(tmp_path)]
    with begun(words, ENVIRON, stdout=subprocess.PIPE) as tool:
        assert until(lambda: len(list(tmp_path.iterdir())) == 2 or tool.poll() is not None) and tool.poll() is None
        tool.send_signal(number)
        said, _ = tool.communicate(timeout=120)
    assert tool.returncode == (-number if number == signal.SIGKILL else 128 + number)
    assert until(lambda: not processes_that_name(tmp_path)), processes_that_name(tmp_path)
    assert said.count("has begun\n") == 2
