"""`dps-agent config`: the settings with the origin of each, or only whether they can be used."""

from __future__ import annotations

import sys

from dps_agent.host.cli.verb import Outcome, Verb, configuration_of
from dps_agent.host.config import (
    SYSTEM_FILE,
    Configuration,
    check_files,
    check_keys_in_hardware,
    marked_files,
    odd_passwords,
)
from dps_agent.host.printed import printable
from dps_agent.host.settings_table import KEYS, Setting

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from dps_agent.host.cli.verb import Arguments, Declared


def add_arguments(parser: Declared) -> None:
    """The one thing to do with the settings."""
    parser.add_argument(
        "action", choices=("show", "validate"), help="show every setting and where it comes from, or check them all"
    )


def run(arguments: Arguments) -> Outcome:
    """Shows the settings, or checks them and the files that they name."""
    if arguments.action == "show":
        return _show(configuration_of(arguments, need_id_scope=False), arguments.config)
    configuration = configuration_of(arguments)
    check_files(configuration)
    for note in [*marked_files(configuration), *odd_passwords(configuration)]:
        print(f"dps-agent: warning: {printable(note)}", file=sys.stderr)
    _check_connection(configuration)
    check_keys_in_hardware(configuration)
    files = list(configuration.files)
    return Outcome([f"the settings are valid ({', '.join(files) or 'no file, defaults only'})"], {"files": files})


def _show(configuration: Configuration, explicit: str | None) -> Outcome:
    """Every setting as TOML that can be used as a file."""
    shown = {key: _plain(KEYS[key].shown(configuration.value(key))) for key in KEYS}
    lines = [f"# {_sources(configuration, explicit)}"]
    table = ""
    for key, value in shown.items():
        inner, _, name = key.rpartition(".")
        if inner != table:
            table = inner
            lines.append(f"[{table}]")
        line = f"{name} = {as_written(KEYS[key], value)}"
        if key == "id_scope" and not value:
            line = "# id_scope is not set"
        lines.append(f"{line:<55} # {configuration.origins[key]}")
    settings = {key: {"value": value, "origin": configuration.origins[key]} for key, value in shown.items()}
    return Outcome(lines, {"settings": settings, "files": list(configuration.files)})


def _sources(configuration: Configuration, explicit: str | None) -> str:
    if explicit is not None:
        return f"file: {explicit}; {SYSTEM_FILE} and its config.d are not read"
    return f"files: {', '.join(configuration.files)}" if configuration.files else f"no file ({SYSTEM_FILE} is absent)"


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _check_connection(configuration: Configuration) -> None:
    """AskOperator `config.invalid` unless a connection can be made of endpoint, connect_to, ca_file and proxy."""
    from dps_agent.host.parts import dps_connection

    dps_connection(configuration)


def as_written(setting: Setting, value: Any) -> str:
    """One setting's value as a settings file has it; handles as everybody writes them."""
    return f"{value:#x}" if value and setting.in_hex else as_toml(_plain(value))


def as_toml(value: Any) -> str:
    """One value as TOML 1.0 writes it; text as a basic string."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        special = {"\\": "\\\\", '"': '\\"'}
        plain = (special.get(c, c if c.isprintable() else f"\\U{ord(c):08x}") for c in value)
        return f'"{"".join(plain)}"'
    if isinstance(value, list):
        return f"[{', '.join(as_toml(item) for item in value)}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{as_toml(name)} = {as_toml(item)}" for name, item in value.items()) + "}"
    return repr(value)


VERB = Verb("config", "show or validate the settings", add_arguments, run)
