"""Completion for bash, zsh and fish, made by shtab from the program's own parser."""

import argparse
from collections.abc import Iterator

import shtab

from dps_agent.host.checks import CHECKS
from dps_agent.host.cli import command_line

SHELLS = ("bash", "zsh", "fish")


def script(shell: str) -> str:
    """The completion script of one of SHELLS."""
    parser = command_line()
    for each in _parsers(parser):
        for action in each._actions:
            if action.metavar == "FILE":
                action.complete = shtab.FILE  # type: ignore[attr-defined]
            elif "--only" in action.option_strings:
                action.choices = [check.id for check in CHECKS]
    text: str = shtab.complete(parser, shell=shell)
    return text


def _parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """The parser and those of its verbs."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                yield from _parsers(inner)
