"""What every verb of the command line is made of, and what it returns."""

from __future__ import annotations

import argparse
import contextlib
import os

from dps_agent.host.config import Configuration, ConfigurationError, load
from dps_agent.host.error_document import fields_of
from dps_hal.errors import AskOperator, DpsError, exit_group
from dps_hal.host.codes import REMEDIES
from dps_text import whole_number

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from typing import Any, NamedTuple, TextIO

    class Outcome(NamedTuple):
        """The result of one verb: `lines` for people, `document` for `--json`; `code` is a word of EXIT_GROUPS."""

        lines: Sequence[str]
        document: Mapping[str, Any]
        code: str = "ok"

    class Verb(NamedTuple):
        """One verb: what `--help` says, its own arguments, and what it does."""

        name: str
        help: str
        add_arguments: Callable[[argparse.ArgumentParser], None]
        run: Callable[[argparse.Namespace], Outcome]
else:
    from collections import namedtuple

    Outcome = namedtuple("Outcome", ("lines", "document", "code"), defaults=("ok",))
    Verb = namedtuple("Verb", ("name", "help", "add_arguments", "run"))


class UsageError(AskOperator):
    """The command line itself is wrong; `usage` shows how it should look, possibly empty."""

    def __init__(self, message: str, usage: str = "") -> None:
        super().__init__("agent.usage", message)
        self.usage = usage


def seconds_up_to(highest_s: int) -> Callable[[str], int]:
    """What argparse calls to read whole seconds from 1 to `highest_s`."""

    def read(text: str) -> int:
        seconds = whole_number(text, 1, highest_s)
        if seconds is None:
            raise argparse.ArgumentTypeError(f"expected whole seconds from 1 to {highest_s}; came {text!r}")
        return seconds

    return read


def no_arguments(parser: argparse.ArgumentParser) -> None:
    """For a verb without arguments of its own."""


def configuration_of(arguments: argparse.Namespace, *, need_id_scope: bool = True) -> Configuration:
    """The settings that the command line asks for."""
    overrides = [*arguments.set_before, *arguments.set_after]
    for override in overrides:
        if "=" not in override:
            raise UsageError(f"--set: expected KEY=VALUE; came {override!r}")
    return load(arguments.config, overrides=overrides, need_id_scope=need_id_scope)


def error_document(error: DpsError) -> dict[str, Any]:
    """The value of `error` in a JSON document."""
    document = {**fields_of(error), "remedy": remedy_of(error)}
    if isinstance(error, ConfigurationError):
        document["problems"] = list(error.problems)
    return document


def remedy_of(error: DpsError) -> str:
    """What to do, "" for nothing; of a wrong command line without what there is for a wrong request at the socket."""
    remedy = REMEDIES.get(error.code, "")
    return remedy.partition(";")[0] if isinstance(error, UsageError) else remedy


def exit_word(error: DpsError) -> str:
    """The word of EXIT_GROUPS for an error: a missing package is a matter of usage, whichever part missed it."""
    if error.code in ("agent.usage", "agent.not_available", "tpm.not_available"):
        return "usage"
    return exit_group(error)


class Suggesting(argparse.ArgumentParser):
    """A parser that names the word which somebody may have meant."""

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            error.message += did_you_mean(str(value), map(str, action.choices or ()))
            raise


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'status'?` behind what is said of a word that is not `known`, "" where none is like it."""
    import difflib  # only after a mistake

    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean '{near[0]}'?" if near else ""


def table(rows: Sequence[tuple[str, str]]) -> list[str]:
    """Rows of a name and a value as aligned lines; a row without value is left out."""
    width = max(len(name) for name, _ in rows) + 2
    return [f"{name:<{width}}{value}" for name, value in rows if value]


def discard(stream: TextIO) -> None:
    """Gives what nobody reads a place to go: the interpreter flushes once more at its end, and would exit with 120."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
