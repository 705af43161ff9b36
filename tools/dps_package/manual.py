"""The man page dps-agent(8), made of what the program says of itself: its parser, its settings, its error codes."""

import argparse
import time
from collections.abc import Iterator, Sequence

from dps_agent import __version__
from dps_agent.host.checks import CHECKS
from dps_agent.host.cli.config import as_written
from dps_agent.host.cli.parser import command_line
from dps_agent.host.config import SYSTEM_FILE, SYSTEM_STATE_DIR, environment_name
from dps_agent.host.settings_table import KEYS
from dps_hal.host.codes import REMEDIES

_SERVICE = """\
The service is dps-agent.service. It is started once the ID scope is set:
.PP
.RS 4
.nf
systemctl enable \\-\\-now dps\\-agent
.fi
.RE
.PP
.B systemctl reload dps\\-agent
(SIGHUP) makes it read its settings again and ends a wait.
.B systemctl status dps\\-agent
shows what it waits for and until when, and
.B journalctl \\-xu dps\\-agent
adds to each line what to do about it.
Programs of the group dps\\-agent\\-clients may use its socket, /run/dps\\-agent/api.sock.
"""


def manual(build_time_s: int) -> str:
    """The page as roff; `build_time_s` is its date."""
    parser = command_line()
    date = time.strftime("%Y-%m-%d", time.gmtime(build_time_s))
    common, verbs = _common_actions(parser), _verbs(parser)
    lines = [
        f'.TH DPS\\-AGENT 8 "{date}" "dps\\-agent {_plain(__version__)}"',
        ".SH NAME",
        f"dps\\-agent \\- {_plain(_clause(parser.description))}",
        ".SH SYNOPSIS",
        ".B dps\\-agent",
        "[\\fIoptions\\fR] \\fIverb\\fR [\\fIoptions of the verb\\fR]",
        ".SH DESCRIPTION",
        _plain(parser.description or ""),
        ".SH VERBS",
    ]
    for name, verb in verbs:
        lines += [f".SS {_plain(name)}", _plain(verb.description or "")]
        lines += _described([action for action in verb._actions if _key(action) not in map(_key, common)])
        if name == "check":
            lines += [".PP", "The checks, by the ids that", ".B \\-\\-only", "takes:"]
            lines += [f".TP\n.B {_plain(check.id)}\n{_plain(check.description)}" for check in CHECKS]
    alone = [action for action in common if "--version" in action.option_strings]
    lines += [".SH OPTIONS", "Before or after the verb:"]
    lines += _described([action for action in common if action not in alone])
    lines += [".PP", "Instead of a verb:", *_described(alone)]
    lines += [".TP\n\\fBhelp\\fR \\fIverb\\fR", "show what the verb says of itself"]
    lines += [".SH SERVICE", _SERVICE.rstrip()]
    lines += [
        ".SH SETTINGS",
        f"Read from {_plain(str(SYSTEM_FILE))}, then from config.d/*.toml beside it in the order of their names, then",
        "from the environment, then from",
        ".BR \\-\\-set ;",
        "the last wins.",
    ]
    for key, setting in KEYS.items():
        lines += [f".TP\n.B {_plain(key)}", _plain(setting.help), ".br"]
        default = "none" if key == "id_scope" else as_written(setting, setting.default)
        lines += [_plain(f"Expected: {setting.expected}; default: {default}"), ".br", _plain(environment_name(key))]
    epilog = (parser.epilog or "").partition("\n\n")[0].partition("\n")[2]
    lines += [".SH EXIT STATUS"]
    for status in epilog.strip().split(", "):
        number, _, meaning = status.partition(" ")
        lines += [f".TP\n.B {number}", _plain(meaning)]
    lines += [".SH FILES", f".TP\n.I {_plain(str(SYSTEM_FILE))}", "The settings; its comments explain each of them."]
    lines += [f".TP\n.I {_plain(SYSTEM_STATE_DIR)}", "The assignment: hub, device and the wrapped key."]
    lines += [".SH DIAGNOSTICS", "The code at the end of an error, and what to do about it:"]
    for code, remedy in REMEDIES.items():
        lines += [f".TP\n.B {_plain(code)}", _plain(remedy)]
    lines += [".SH SEE ALSO", ".BR systemd (1),", ".BR journalctl (1),", ".BR systemd.exec (5)"]
    return "\n".join(lines) + "\n"


def _common_actions(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    return [action for action in parser._actions if action.option_strings]


def _verbs(parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            yield from action.choices.items()


def _key(action: argparse.Action) -> tuple[str, ...]:
    return tuple(action.option_strings) or (action.dest,)


def _described(actions: Sequence[argparse.Action]) -> list[str]:
    """Each option or argument with its help, as a tagged paragraph."""
    lines: list[str] = []
    for action in actions:
        value = action.metavar or ("|".join(map(str, action.choices)) if action.choices else "")
        names = ", ".join(f"\\fB{_plain(name)}\\fR" for name in action.option_strings)
        shown = f"\\fI{_plain(str(value))}\\fR" if value and action.nargs != 0 else ""
        text = (action.help or "") % vars(action)  # as argparse does
        lines += [".TP", " ".join(filter(None, (names, shown))), _plain(text)]
    return lines


def _clause(sentence: str | None) -> str:
    """A sentence as the half sentence behind a name: "Gives ..." becomes "gives ..."."""
    text = (sentence or "").rstrip(".")
    return text[:1].lower() + text[1:]


def _plain(text: str) -> str:
    """Text that roff shows as it is, on one line."""
    escaped = " ".join(text.split()).replace("\\", "\\e").replace("-", "\\-").replace("'", "\\(aq")
    return f"\\&{escaped}" if escaped.startswith(".") else escaped
