"""What the command line does for whoever types: help where it is looked for, what was probably meant, colours."""

import io
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dps_agent.host import cli
from dps_agent.host.checks.finding import FAILED, OK, SKIPPED, WARNING
from dps_agent.host.cli import main
from dps_agent.host.cli.verb import VERBS

Said = Callable[..., tuple[int, str, str]]


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Said:
    """Exit status, stdout and stderr of one command line."""

    def run(*words: str) -> tuple[int, str, str]:
        status = main(words)
        return status, *capsys.readouterr()

    return run


@pytest.mark.parametrize("verb", VERBS)
def test_help_for_a_verb_is_what_the_verb_says_of_itself(verb: str, said: Said) -> None:
    helped = said("help", verb)
    assert helped == said(verb, "--help") and helped[0] == 0
    assert helped[1].startswith(f"usage: dps-agent {verb} ")


def test_help_alone_is_the_programs_and_names_the_other_two_ways(said: Said) -> None:
    status, shown, _ = said("help")
    assert (status, shown) == said("--help")[:2]
    assert "--version" in shown and "dps-agent help VERB" in shown


@pytest.mark.parametrize("words", [["--version"], ["--json", "--version"], ["--set", "poll=lookup", "--version"]])
def test_the_version_is_also_an_option(words: list[str], said: Said) -> None:
    assert said(*words) == said(*words[:-1], "version")


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        ("statsu", "status"),
        ("help statsu", "status"),
        ("config shwo", "show"),
        ("status --jsn", "--json"),
        ("check --ofline", "--offline"),
        ("provision --timeot=3", "--timeout"),
        ("--verison", "--version"),
        ("wait --for conected", "connected"),
        ("enroll --format cvs", "csv"),
        ("check --only tpm-nod", "tpm-node"),
        ("check --only clock,recrd", "record"),
    ],
)
def test_what_was_probably_meant_is_said(words: str, meant: str, said: Said) -> None:
    status, out, error = said(*words.split())
    assert (status, out) == (2, "")
    assert f"; did you mean '{meant}'?\n" in error


@pytest.mark.parametrize("words", ["xyzzy", "status --qqq", "check --only qqq", "--qqq"])
def test_what_is_like_nothing_is_not_guessed(words: str, said: Said) -> None:
    status, _, error = said(*words.split())
    assert status == 2 and "did you mean" not in error


# --- colours

LINES = [
    "failed: tpm-node: no TPM",
    "ok, with a warning: x",
    "",
    "ok       clock   it is",
    "warning  a  failed",
    "skipped  b  ok",
]


class Terminal(io.StringIO):
    """What is written to somebody who may see it."""

    def isatty(self) -> bool:
        return True


def written(monkeypatch: pytest.MonkeyPatch, to: io.StringIO, verb: str = "check", **environ: str) -> str:
    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    outcome = cli.Outcome(LINES, {})
    parsed = type("Parsed", (), {"verb": verb, "run": staticmethod(lambda _: outcome)})
    monkeypatch.setattr(cli, "_parsed", lambda _: parsed)
    monkeypatch.setattr(sys, "stdout", to)
    assert main([verb]) == 0
    return to.getvalue()


def test_results_are_coloured_on_a_terminal_and_nothing_else_is(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = written(monkeypatch, Terminal(), TERM="xterm").splitlines()
    assert shown == [
        "\x1b[31mfailed:\x1b[0m tpm-node: no TPM",
        "\x1b[32mok,\x1b[0m with a warning: x",
        "",
        "\x1b[32mok\x1b[0m       clock   it is",
        "\x1b[33mwarning\x1b[0m  a  failed",
        "skipped  b  ok",
    ]


@pytest.mark.parametrize(
    ("to", "verb", "environ"),
    [
        (io.StringIO, "check", {"TERM": "xterm"}),
        (Terminal, "check", {"TERM": "dumb"}),
        (Terminal, "check", {}),
        (Terminal, "check", {"TERM": "xterm", "NO_COLOR": "1"}),
        (Terminal, "status", {"TERM": "xterm"}),
    ],
)
def test_without_a_terminal_that_wants_them_there_are_none(
    to: type[io.StringIO], verb: str, environ: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert written(monkeypatch, to(), verb, **environ) == "".join(f"{line}\n" for line in LINES)


def test_an_empty_no_color_wants_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "\x1b[" in written(monkeypatch, Terminal(), TERM="xterm", NO_COLOR="")


def test_what_a_peer_says_reaches_no_terminal_as_a_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "LINES", ["ok \x1b[31mred"])
    assert written(monkeypatch, Terminal(), TERM="xterm") == "\x1b[32mok\x1b[0m \\x1b[31mred\n"


def test_every_result_but_skipped_has_its_colour() -> None:
    assert set(cli.COLOURS) == {OK, WARNING, FAILED} and SKIPPED not in cli.COLOURS


def test_json_has_no_colours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    for name in [name for name in os.environ if name.startswith("DPS_AGENT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("TERM", "xterm")
    (tmp_path / "empty.toml").write_text("")
    main(["--config", str(tmp_path / "empty.toml"), "check", "--only", "settings", "--json"])
    assert terminal.getvalue().startswith("{") and "\x1b" not in terminal.getvalue()


@pytest.mark.parametrize(("verb", "limits"), [("status", [cli.GARBAGE_LIMIT]), ("run", [])])
def test_only_what_ends_lets_garbage_lie(verb: str, limits: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[int] = []
    parsed = type("Parsed", (), {"verb": verb, "run": staticmethod(lambda _: cli.Outcome([], {}))})
    monkeypatch.setattr(cli, "_parsed", lambda _: parsed)
    monkeypatch.setattr(cli.gc, "set_threshold", found.append)
    monkeypatch.setattr(sys, "argv", ["dps-agent", verb])
    assert (cli._run(None), cli._run([verb]), found) == (0, 0, limits)
