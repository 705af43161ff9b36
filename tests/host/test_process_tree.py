"""`tools/process_tree.py`: however a tool ends, nothing that it started is left; `tools/test` stands on it."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from support.programs.tools import begun, processes_that_name, until

CHECKOUT = Path(__file__).parents[2]
TOOL = CHECKOUT / "tools/test"
ENVIRON = {**os.environ, "PYTHONPATH": str(CHECKOUT / "tools")}
STUBBORN = (  # in a session of its own, its parent gone, deaf to what asks it to end
    "import os, signal, sys, time\n"
    "if os.fork(): os._exit(0)\n"
    "os.setsid()\n"
    "for number in (1, 2, 15): signal.signal(number, signal.SIG_IGN)\n"
    "open(sys.argv[1], 'w').close()\n"
    "time.sleep(3600)\n"
)
STARTS_MUCH = (
    "import subprocess, sys, time\n"
    "from process_tree import supervised\n"
    "def work():\n"
    "    for number in range(3): subprocess.Popen([sys.executable, '-c', sys.argv[2], f'{sys.argv[1]}/{number}'])\n"
    "    subprocess.Popen(['sh', '-c', f'trap : TERM INT HUP; while :; do sleep 1; done # {sys.argv[1]}'])\n"
    "    if len(sys.argv) < 4: time.sleep(3600)\n"
    "    while not all(map(__import__('os').path.exists, (f'{sys.argv[1]}/{n}' for n in range(3)))): time.sleep(0.02)\n"
    "    if sys.argv[3] == 'raise': raise ValueError('by accident')\n"
    "    return int(sys.argv[3])\n"
    "sys.exit(supervised(work))\n"
)


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL], ids=lambda number: number.name
)
def test_nothing_is_left_of_what_it_started(number: signal.Signals, tmp_path: Path) -> None:
    words = [sys.executable, "-c", STARTS_MUCH, str(tmp_path), STUBBORN]
    with begun(words, ENVIRON) as tool:
        assert until(lambda: len(list(tmp_path.iterdir())) == 3 or tool.poll() is not None) and tool.poll() is None
        tool.send_signal(number)
        status = tool.wait(120)
    assert status == (-number if number == signal.SIGKILL else 128 + number)
    assert until(lambda: not processes_that_name(tmp_path)), processes_that_name(tmp_path)


def test_nothing_is_left_where_its_worker_was_killed(tmp_path: Path) -> None:
    words = [sys.executable, "-c", STARTS_MUCH, str(tmp_path), STUBBORN]
    with begun(words, ENVIRON) as tool:
        assert until(lambda: len(list(tmp_path.iterdir())) == 3 or tool.poll() is not None) and tool.poll() is None
        (worker,) = Path(f"/proc/{tool.pid}/task/{tool.pid}/children").read_text().split()
        os.kill(int(worker), signal.SIGKILL)
        assert tool.wait(120) == 128 + signal.SIGKILL
    assert processes_that_name(tmp_path) == []


@pytest.mark.parametrize("end", ["0", "raise", signal.SIGTERM])
def test_what_a_shell_had_started_before_it_became_the_tool_is_left_alone(
    end: str | signal.Signals, tmp_path: Path
) -> None:
    """A child and a grandchild of the shell's; the tool's own are in a folder of their own."""
    own = tmp_path / "own"
    own.mkdir()
    fifo = tmp_path / "other"
    os.mkfifo(fifo)
    script = 'sh -c \'sh -c "read line; # $0" "$0" <"$0"; :\' "$0" & exec "$@"'
    words = [sys.executable, "-c", STARTS_MUCH, str(own), STUBBORN, *([end] if isinstance(end, str) else [])]
    holder = os.open(fifo, os.O_RDWR)  # while it is open the others read from the FIFO
    try:
        with begun(["sh", "-c", script, str(fifo), *words], ENVIRON, stderr=subprocess.DEVNULL) as tool:
            assert until(lambda: len(list(own.iterdir())) == 3 or tool.poll() is not None)
            if isinstance(end, signal.Signals):
                tool.send_signal(end)
            tool.wait(120)
        assert processes_that_name(own) == []
        assert until(lambda: len(processes_that_name(fifo)) == 2), processes_that_name(fifo)
    finally:
        os.write(holder, b"\n")
        os.close(holder)
    assert until(lambda: not processes_that_name(fifo)), processes_that_name(fifo)


@pytest.mark.parametrize(("end", "status"), [("0", 0), ("3", 3), ("raise", 1)])
def test_its_status_is_that_of_its_work_and_nothing_is_left(end: str, status: int, tmp_path: Path) -> None:
    words = [sys.executable, "-c", STARTS_MUCH, str(tmp_path), STUBBORN, end]
    done = subprocess.run(words, env=ENVIRON, check=False, capture_output=True, text=True, timeout=120)
    assert done.returncode == status and ("by accident" in done.stderr) == (end == "raise"), done.stderr
    assert processes_that_name(tmp_path) == []


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL], ids=lambda number: number.name
)
def test_no_software_tpm_outlives_the_tests(number: signal.Signals, tmp_path: Path) -> None:
    case = tmp_path / "test_that_waits.py"
    case.write_text(
        "import pathlib, time\nfrom support.tpm.swtpm import Swtpm\n\n"
        "def test_waits():\n"
        "    with Swtpm(pathlib.Path(__file__).with_name('tpm')):\n"
        "        pathlib.Path(__file__).with_name('ready').touch()\n"
        "        time.sleep(3600)\n"
    )
    python = (
        f"import pathlib, runpy, sys, fresh_machine\n"
        f"fresh_machine.require_packages = lambda packages: None\n"
        f"fresh_machine.environment = lambda name, extras: pathlib.Path({sys.prefix!r})\n"
        f"words = '-q -n 1 -p no:cacheprovider -c pyproject.toml'.split()\n"
        f"sys.argv = [{str(TOOL)!r}, *words, {str(case)!r}]\n"
        f"runpy.run_path({str(TOOL)!r}, run_name='__main__')\n"
    )
    with begun([sys.executable, "-c", python], ENVIRON, stdout=subprocess.DEVNULL) as tool:
        ready = tmp_path / "ready"
        assert until(lambda: ready.exists() or tool.poll() is not None) and ready.exists(), tool.poll()
        assert any("swtpm" in words for words in processes_that_name(tmp_path))
        tool.send_signal(number)
        status = tool.wait(120)
    assert status == (-number if number == signal.SIGKILL else 128 + number)
    assert until(lambda: not processes_that_name(tmp_path)), processes_that_name(tmp_path)
