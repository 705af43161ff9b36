"""`tools/demo --board`: a firmware engineer's own program answers a method on this machine, by one command."""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType

import pytest

from support.documents import CHECKOUT, blocks_of

DEMO = CHECKOUT / "tools" / "demo"
PROGRAMS = Path(sys.executable).parent


def demo_module() -> ModuleType:
    """The program as a module, so that its steps run in this environment."""
    loader = SourceFileLoader("tools_demo", str(DEMO))
    spec = spec_from_loader("tools_demo", loader)
    assert spec is not None
    module = module_from_spec(spec)
    loader.exec_module(module)
    return module


PAGE = CHECKOUT / "docs" / "firmware.md"
END = PAGE.read_text().partition("\n## What it takes\n")[0].count("\n")
FIRST_HOUR = [found for found in blocks_of(PAGE) if found.line < END]


def test_the_first_hour_of_the_page_ends_as_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """From the page's own `app.py` to its answer, by the page's own command; the environment is this one."""
    module = demo_module()
    (program,) = (found for found in FIRST_HOUR if found.detail == "app.py")
    (shown,) = (found for found in FIRST_HOUR if found.language == "text")
    first, own = (shlex.split(found.text) for found in FIRST_HOUR if found.language == "sh")
    assert first == own[:2] == ["tools/demo", "--board"], "the example's own command is the same without its program"
    (tmp_path / "app.py").write_text(program.text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "environment", lambda name, extras: PROGRAMS.parent)
    monkeypatch.setattr(sys, "argv", own)
    handlers = [(number, signal.getsignal(number)) for number in (signal.SIGTERM, signal.SIGHUP)]
    try:
        status = module.main()
    finally:
        for number, handler in handlers:
            signal.signal(number, handler)
    printed, errors = capfd.readouterr()
    assert status == 0, printed + errors
    rest = iter(printed.splitlines())
    for line in shown.text.splitlines():
        assert line in rest, f"{line!r} not in\n{printed}"
    assert "board.toml: " in printed and "1 enrolment imported" in printed


def test_a_pipe_is_none_within_a_payload() -> None:
    payload = '{"a": "it\'s | #1"}'
    command = f"board enrol | dps-emulator invoke x open {shlex.quote(payload)}"
    assert demo_module().pipeline(command) == [["board", "enrol"], ["dps-emulator", "invoke", "x", "open", payload]]


def test_what_can_not_be_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    for words, expected in (
        (["--app", "app.py"], "--app expects --board"),
        (["--board", "--app", str(tmp_path / "absent.py")], "--app: there is no file"),
        (["--board", "--payload", "{"], "--payload: expected JSON; came '{'"),
        (["--board", "--swtpm"], "leave --swtpm out"),
    ):
        done = subprocess.run(
            [sys.executable, str(DEMO), *words], capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 2 and expected in done.stderr and done.stdout == "", done.stdout + done.stderr
