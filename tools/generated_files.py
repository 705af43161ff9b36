"""What is made from the tables in the code: settings, error codes, journal events, checks, metrics, states.

`tools/generate` writes it, and a test compares. Around a table that stands in a document everything else is kept, and
in the tables of codes the words of each line, which stand nowhere else.
"""

from __future__ import annotations

import re
import textwrap
from typing import TYPE_CHECKING, Any

from dps_agent.host.checks import CHECKS
from dps_agent.host.cli.config import as_written
from dps_agent.host.config import environment_name
from dps_agent.host.journal import EVENTS, message_id
from dps_agent.host.metrics import METRICS, sample_name
from dps_agent.host.settings_table import KEYS, SECTIONS, BoardSettings, Setting, rows_of
from dps_agent.lifecycle import STANDINGS, TRANSITIONS
from dps_agent.patience import PATIENCES
from dps_deploy.settings import ON_A_BOARD, board_defaults
from dps_hal.host.codes import REMEDIES
from fresh_machine import CHECKOUT
from state_picture import state_picture

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

HINT = "run tools/generate"
AREAS = {
    "tpm": "TPM",
    "store": "Storage",
    "record": "Stored assignment",
    "dps": "Device Provisioning Service",
    "network": "Network",
    "hub": "Hub",
    "clock": "Clock",
    "config": "Settings",
    "agent": "The agent itself",
}
_TEMPLATE_HEAD = """\
# Settings of dps-agent. Every key is here with its default; take the # away to change one.
# Files in config.d/ beside this one come after it, then the environment variables named on the right, then --set.
# 'dps-agent config show' lists every value and where it came from, 'dps-agent config validate' checks them all.
"""
_LINE = 118  # characters of a comment


def template(_: str = "") -> str:
    """The settings file of a new device: every setting commented out, with its meaning, default and variable."""
    parts = [_TEMPLATE_HEAD]
    for table, section in SECTIONS.items():
        parts += [f"[{table}]\n"] if table else []
        for key, setting in rows_of(table, section).items():
            words = textwrap.wrap(setting.help, _LINE - len("# "), break_on_hyphens=False)
            comment = "\n".join(f"# {line}" for line in words)
            value = f"# {key.rpartition('.')[2]} = {as_written(setting, setting.default)}"
            parts.append(f"{comment}\n{value:<54} # {environment_name(key)}\n")
    return "\n".join(parts).replace("]\n\n#", "]\n#")


def catalog(_: str = "") -> str:
    """What 'journalctl -x' adds to the lines: an entry for each event and each error code."""
    entries = [(name, *text) for name, text in EVENTS.items()]
    for code, remedy in REMEDIES.items():
        end = "" if remedy.endswith("?") else "."
        entries.append((code, code, remedy[0].upper() + remedy[1:] + end))
    parts = ["# What 'journalctl -x' adds to the lines of dps-agent. Made by tools/generate.\n"]
    for name, subject, text in entries:
        parts.append(
            f"-- {message_id(name)}\nSubject: {subject}\nDefined-By: dps-agent\nDocumentation: man:dps-agent(8)\n\n"
            f"{text}\n"
        )
    return "\n".join(parts)


def codes_page(page: str) -> str:
    """docs/codes.md with its tables of codes, by area; the words of each line are those that the page has already."""
    lines = dict(re.findall(r"^\| (`[a-z]+\.[a-z_]+`) \| ?(.*?) \| .* \|$", page, re.M))
    parts = [page[: page.index(f"### {AREAS['tpm']}\n")].rstrip("\n") + "\n"]
    for area, title in AREAS.items():
        codes = [(f"`{code}`", remedy) for code, remedy in REMEDIES.items() if code.startswith(f"{area}.")]
        rows: list[tuple[str, ...]] = [(code, lines.get(code, ""), remedy) for code, remedy in codes]
        parts.append(f"### {title}\n\n" + _table(("code", "what the line says", "what to do"), rows))
    return "\n".join(parts)


def operators_page(page: str) -> str:
    """docs/operators.md with the tables of settings, checks, metrics and events."""
    metrics = ((f"`{sample_name(metric)}`", metric.kind, metric.help) for metric in METRICS)
    page = _with_table(page, ("metric", "kind", "says"), metrics)
    page = _with_table(page, ("setting", "default", "meaning"), _rows_of_settings(KEYS))
    checks = ((f"`{check.id}`", check.description, "yes" if check.online else "") for check in CHECKS)
    page = _with_table(page, ("id", "makes sure", "network"), checks)
    return _with_table(page, ("event", "means"), ((f"`{name}`", subject) for name, (subject, _) in EVENTS.items()))


def board_page(page: str) -> str:
    """micropython/README.md with the table of the settings that only a board has."""
    return _with_table(page, ("setting", "default", "meaning"), _rows_of_settings(rows_of("board", BoardSettings)))


def board_keys(module: str) -> str:
    """dps_board/keys.py with the default of each key of config.json."""
    lines = "".join(f"    ({_literal(key)}, {_literal(value, key)}),\n" for key, value in board_defaults().items())
    before, _, behind = module.partition(' = (\n    ("')
    return f"{before} = (\n{lines}{behind[behind.index(')' + chr(10) + '_') :]}"


MADE: dict[str, Callable[[str], str]] = {
    "agent/service/config.toml": template,
    "agent/service/dps-agent.catalog": catalog,
    "docs/codes.md": codes_page,
    "docs/operators.md": operators_page,
    "micropython/README.md": board_page,
    "micropython/dps_board/keys.py": board_keys,
    "docs/life.svg": lambda _: state_picture(TRANSITIONS, "The life of a device"),
    "docs/standing.svg": lambda _: state_picture(STANDINGS, "The hub's standing towards this identity"),
    "docs/patience.svg": lambda _: state_picture(PATIENCES, "How the device stands with DPS"),
}


def outdated() -> Iterator[tuple[Path, str]]:
    """Each file that is not as it would be made, and how that would be."""
    for name, make in MADE.items():
        path = CHECKOUT / name
        before = path.read_text(encoding="utf-8")
        after = make(before)
        if after != before:
            yield path, after


def _rows_of_settings(rows: dict[str, Setting]) -> Iterator[tuple[str, str, str]]:
    for key, setting in rows.items():
        yield f"`{key}`", f"`{as_written(setting, setting.default)}`", _marked(setting.help)


def _marked(sentences: str) -> str:
    """Plain sentences with what is typed put between backquotes: quoted words, commands, variables, paths, names."""
    typed = r"\"[^\"]+\"|'dps-agent [^']+'|\$\w+|(?<![\w.])[~/][\w./-]*\w|\b[a-z]{2,}(?:[_.][a-z]+)+\b|\b0x\w+|--\w+"
    return re.sub(typed, lambda found: f"`{found[0].strip(chr(39))}`", sentences)


def _with_table(page: str, head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """The page with another table in place of the one that has this head."""
    before, found, behind = page.partition(f"| {' | '.join(head)} |\n")
    if not found:
        raise ValueError(f"no table with the head {head}")
    return f"{before}{_table(head, list(rows))}\n{behind.partition(chr(10) * 2)[2]}"


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [" | ".join(row) for row in (head, ("---",) * len(head), *rows)]
    return "".join(f"| {line} |\n".replace("|  |", "| |") for line in lines)


def _literal(value: Any, key: str = "") -> str:
    """A default as Python source; text between double quotes, handles as everybody writes them."""
    if key in ON_A_BOARD and ON_A_BOARD[key].in_hex:
        return f"{value:#x}"
    value = list(value) if isinstance(value, tuple) else value
    return repr(value).replace("'", '"')
