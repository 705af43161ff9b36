"""The command line as argparse reads it: `--help`, mistakes, and whatever is not plain enough for `plain_words`."""

from __future__ import annotations

import argparse
from functools import partial

from dps_agent.host.cli.verb import (
    VERBS,
    Arguments,
    UsageError,
    declare_program,
    declare_verb,
    did_you_mean,
    verb_in,
    verb_named,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any, NoReturn

_EXIT_STATUSES = """\
exit status:
  0 ok, 1 failed, 2 usage, 3 retry later, 4 refused by the service, 5 TPM, 6 settings

most used:
  dps-agent enroll       what to enter in the Device Provisioning Service
  dps-agent status       where the device stands
  dps-agent help VERB    what a verb does
"""

# With a width of its own: to ask the terminal, argparse imports shutil and its compressors, at every start.
_HELP_FORMAT = partial(argparse.RawDescriptionHelpFormatter, width=78, max_help_position=20)


class Suggesting(argparse.ArgumentParser):
    """A parser that names the word which somebody may have meant."""

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            error.message += did_you_mean(str(value), map(str, action.choices or ()))
            raise


class _Parser(Suggesting):
    """An ArgumentParser whose errors are exceptions: `--json` has to report them as well."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=_HELP_FORMAT, add_help=False, **options)
        self.color = False  # Python 3.14 colours help by itself
        self.add_argument("-h", "--help", action="help", help="show this help")

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, self.format_usage())


def read(words: Sequence[str]) -> Arguments:
    """What `words` say; UsageError where that is nothing. The parser's memory is free again when the verb runs."""
    parser = command_line(verb_in(words))
    said, unknown = parser.parse_known_args(words, Arguments())
    if unknown:
        near = did_you_mean(unknown[0].partition("=")[0], _options_of(parser, said.verb))
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{near}")
    if said.verb is None:  # not left to argparse: it would say this of an option that it does not know, too
        raise UsageError("expected a verb", parser.format_usage())
    return said


def _options_of(parser: argparse.ArgumentParser, verb: str | None) -> list[str]:
    """The options of the program and of one verb."""
    known: list[str] = []
    for action in parser._actions:
        known += action.option_strings
        if isinstance(action.choices, dict) and verb in action.choices:
            known += _options_of(action.choices[verb], None)
    return known


def command_line(first: Sequence[str] = ()) -> argparse.ArgumentParser:
    """The parser of a command line that begins with `first`; where that is a verb the others are not loaded."""
    parser = _Parser(
        prog="dps-agent",
        description="Gives this device its Azure IoT Hub: proves its TPM to the Device Provisioning Service.",
        epilog=_EXIT_STATUSES,
    )
    declare_program(parser, argparse.SUPPRESS)
    verbs = parser.add_subparsers(dest="verb", metavar="verb", title="verbs")
    for name in [name for name in VERBS if name in first] or VERBS:
        verb = verb_named(name)
        own = verbs.add_parser(verb.name, help=verb.help, description=verb.help[0].upper() + verb.help[1:] + ".")
        declare_verb(own, verb, argparse.SUPPRESS)
    return parser
