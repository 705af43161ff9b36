"""`tools/demo --board`: a firmware engineer's own program answers a method on this machine, by one command."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from support import first_hour
from support.first_hour import DEMO, EMULATED, EXAMPLE, OWN, OWN_SHOWN, demo_module, run_as_shown
from support.programs.tools import begun, processes_that_name, until

ENROLS = (  # on a board that says nothing; its flash is empty
    "import sys\n"
    "from pathlib import Path\n"
    "from support.first_hour import demo_module\n"
    "own_qemu, deadline_s = sys.argv[1:]\n"
    "def run(demo, owned, page, board, sources, qemu):\n"
    "    (demo.folder / 'flash.img').touch()\n"
    "    demo.run(f'python -m support.board.mps2_console {demo.folder} firmware {qemu} enrol', int(deadline_s))\n"
    "demo = demo_module()\n"
    "demo.environment = lambda name, extras: Path(sys.executable).parent.parent\n"
    "demo.require_packages = demo.debian_micropython.sources = lambda *_: ()\n"
    "demo.debian_micropython.emulator = lambda: own_qemu\n"
    "demo.run_an_emulated_board = run\n"
    "sys.argv[1:] = ['--board', '--emulated']\n"
    "sys.exit(demo.main())\n"
)


def test_the_first_hour_of_the_page_ends_as_it_says(tmp_path: Path) -> None:
    """From the page's own `app.py` to its answer, by the page's own command; the environment is this one."""
    printed = run_as_shown(OWN, OWN_SHOWN, tmp_path)
    assert "board.toml: " in printed and "1 enrolment imported" in printed


def test_an_hour_that_is_too_short_is_no_success(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_hour, "DEADLINE_S", 0)
    with pytest.raises(AssertionError, match="not at its end within 0 s"):
        run_as_shown(OWN, OWN_SHOWN, tmp_path)


def test_a_program_that_ends_before_it_answers_ends_the_demo_with_its_words(tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text("def main():\n    print('nothing to do')\n")
    words = [sys.executable, "-m", "support.first_hour", "--board", "--app", "app.py"]
    places = os.pathsep.join(str(DEMO.parents[1] / name) for name in ("tools", "tests"))
    environ = {**os.environ, "PYTHONPATH": places}
    done = subprocess.run(
        words, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=first_hour.DEADLINE_S, check=False
    )
    assert done.returncode == 1 and "board: nothing to do" in done.stdout, done.stdout
    assert done.stderr.endswith("tools/demo: the board's program has ended, with the words above\n"), done.stderr


def test_the_commands_of_the_page_differ_in_what_they_are_for() -> None:
    assert EXAMPLE == OWN[:2] == ["tools/demo", "--board"], "the example's own command is the same without its program"
    assert [word for word in EMULATED if word != "--emulated"] == OWN, "the same program on the board in QEMU"


def test_a_pipe_is_none_within_a_payload() -> None:
    payload = '{"a": "it\'s | #1"}'
    command = f"board enrol | dps-emulator invoke x open {shlex.quote(payload)}"
    assert demo_module().pipeline(command) == [["board", "enrol"], ["dps-emulator", "invoke", "x", "open", payload]]


def test_what_can_not_be_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    for words, expected in (
        (["--app", "app.py"], "--app expects --board"),
        (["--emulated"], "--emulated expects --board"),
        (["--board", "--app", str(tmp_path / "absent.py")], "--app: there is no file"),
        (["--board", "--payload", "{"], "--payload: expected JSON; came '{'"),
        (["--board", "--swtpm"], "leave --swtpm out"),
    ):
        done = subprocess.run(
            [sys.executable, str(DEMO), *words], capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 2 and expected in done.stderr and done.stdout == "", done.stdout + done.stderr


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT, None], ids=str)
def test_neither_qemu_nor_the_tpm_of_an_emulated_board_outlives_the_demo(
    end: signal.Signals | None, tmp_path: Path
) -> None:
    """At a signal, and where a command's time is over; this QEMU says nothing and ends by itself never."""
    qemu, began = tmp_path / "qemu", tmp_path / "began"
    qemu.write_text(f"#!/bin/sh\n: > {shlex.quote(str(began))}\nwhile :; do sleep 1; done\n")
    qemu.chmod(0o755)
    words = [sys.executable, "-c", ENROLS, str(qemu), "3600" if end else "5"]
    places = os.pathsep.join(str(DEMO.parents[1] / name) for name in ("tools", "tests"))
    environ = {**os.environ, "PYTHONPATH": places, "TMPDIR": str(tmp_path)}
    with begun(words, environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as demo:
        if end:
            assert until(lambda: began.exists() or demo.poll() is not None) and demo.poll() is None
            demo.send_signal(end)
        said, _ = demo.communicate(timeout=120)
    assert demo.returncode == (128 + end if end else 1), said
    assert ("interrupted" if end else "did not end within") in said
    assert processes_that_name(tmp_path) == []
