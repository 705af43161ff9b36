"""`tools/demo --board`: a firmware engineer's own program answers a method on this machine, by one command."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

from support.first_hour import DEMO, EMULATED, EXAMPLE, OWN, OWN_SHOWN, demo_module, run_as_shown


def test_the_first_hour_of_the_page_ends_as_it_says(tmp_path: Path) -> None:
    """From the page's own `app.py` to its answer, by the page's own command; the environment is this one."""
    printed = run_as_shown(OWN, OWN_SHOWN, tmp_path)
    assert "board.toml: " in printed and "1 enrolment imported" in printed


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
