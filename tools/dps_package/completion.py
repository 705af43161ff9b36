"""Completion for bash, zsh and fish, made by shtab from the program's own parser."""

import argparse
from collections.abc import Iterator

import shtab

from dps_agent.host.checks import CHECKS
from dps_agent.host.cli.parser import command_line
from dps_agent.host.settings_table import KEYS

SHELLS = ("bash", "zsh", "fish")
_BASH_VALUE_FOLLOWS = '  [[ "${COMPREPLY[*]}" != *= ]] || compopt -o nospace'


def script(shell: str) -> str:
    """The completion script of one of SHELLS."""
    parser = command_line()
    for each in _parsers(parser):
        for action in each._actions:
            if action.metavar == "FILE":
                action.complete = shtab.FILE  # type: ignore[attr-defined]
            elif "--only" in action.option_strings:
                action.choices = [check.id for check in CHECKS]
            elif "--set" in action.option_strings:
                action.choices = [f"{key}=" for key in KEYS]
    text: str = shtab.complete(parser, shell=shell)
    if shell == "bash":
        end = "\n  return 0\n}\n\ncomplete "
        if end not in text:
            raise ValueError(
                "shtab ends its function for bash in another way: where a value follows is to be seen anew"
            )
        text = text.replace(end, f"\n{_BASH_VALUE_FOLLOWS}{end}")
    return text


def _parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """The parser and those of its verbs."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                yield from _parsers(inner)
