"""What every verb of the command line is made of, and what it returns."""

from __future__ import annotations

import contextlib
import os

from dps_agent.host.config import SYSTEM_FILE, Configuration, ConfigurationError, load
from dps_agent.host.error_document import fields_of
from dps_hal.errors import AskOperator, DpsError, exit_group
from dps_hal.host.codes import REMEDIES
from dps_text import whole_number

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from typing import Any, NamedTuple, Protocol, TextIO

    class Outcome(NamedTuple):
        """The result of one verb: `lines` for people, `document` for `--json`; `code` is a word of EXIT_GROUPS."""

        lines: Sequence[str]
        document: Mapping[str, Any]
        code: str = "ok"

    class Verb(NamedTuple):
        """One verb: what `--help` says, its own arguments, and what it does."""

        name: str
        help: str
        add_arguments: Callable[[Declared], None]
        run: Callable[[Arguments], Outcome]

    class Declared(Protocol):
        """What takes the declarations of arguments: an ArgumentParser, and what reads plain words."""

        def add_argument(
            self,
            *names: str,
            action: str = ...,
            dest: str = ...,
            default: object = ...,
            type: Callable[[str], Any] = ...,
            choices: Sequence[str] = ...,
            metavar: str = ...,
            help: str = ...,
        ) -> object: ...
        def set_defaults(self, **defaults: Any) -> None: ...
else:
    from dps_hal.named import namedtuple

    Outcome = namedtuple("Outcome", ("lines", "document", "code"), defaults=("ok",))
    Verb = namedtuple("Verb", ("name", "help", "add_arguments", "run"))


VERBS = (
    "provision",
    "run",
    "status",
    "wait",
    "enroll",
    "import-key",
    "install-certificate",
    "check",
    "token",
    "reset",
    "config",
    "metrics",
    "diag",
    "version",
)


class Arguments:
    """What a command line says: an attribute for each argument of program and verb, `verb` itself, and its `run`."""

    def __init__(self, **said: Any) -> None:
        self.__dict__.update(said)

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...


class UsageError(AskOperator):
    """The command line itself is wrong; `usage` shows how it should look, possibly empty."""

    def __init__(self, message: str, usage: str = "") -> None:
        super().__init__("agent.usage", message)
        self.usage = usage


def verb_named(name: str) -> Verb:
    """One of VERBS; its module is loaded, and no other's."""
    verb: Verb = __import__(f"{__package__}.{name.replace('-', '_')}", fromlist=["VERB"]).VERB
    return verb


def verb_in(words: Sequence[str]) -> Sequence[str]:
    """The word that is the verb, or would have to be; none where there is none."""
    at = 0
    while words[at : at + 1] and words[at].startswith("-"):
        at += 2 if words[at] in ("--config", "--set") else 1
    return words[at : at + 1]


def declare_program(parser: Declared, absent: object) -> None:
    """What may stand before the verb; `absent` is the default that leaves an argument out of what was said."""
    _declare_common(parser, "set_before", absent)
    parser.add_argument("--version", action="store_true", help="show what is installed, as the verb does")
    parser.set_defaults(config=None, set_before=[], set_after=[], json=False, verbose=False)


def declare_verb(parser: Declared, verb: Verb, absent: object) -> None:
    """What may stand behind the verb."""
    verb.add_arguments(parser)
    _declare_common(parser, "set_after", absent)
    parser.set_defaults(run=verb.run)


def _declare_common(parser: Declared, set_name: str, absent: object) -> None:
    """The options that stand before or after the verb; without defaults, so that the second does not undo the first."""
    parser.add_argument(
        "--config",
        metavar="FILE",
        default=absent,
        help=f"read this file instead of {SYSTEM_FILE} and config.d beside that",
    )
    parser.add_argument(
        "--set",
        metavar="KEY=VALUE",
        dest=set_name,
        action="append",
        default=absent,
        help="change one setting, e.g. tpm.backend=wire; may be repeated",
    )
    parser.add_argument("--json", action="store_true", default=absent, help="print one JSON document instead of text")
    parser.add_argument(
        "-v", "--verbose", action="store_true", default=absent, help="show each request, without secrets"
    )


def seconds_up_to(highest_s: int) -> Callable[[str], int]:
    """What is called to read whole seconds from 1 to `highest_s`."""

    def read(text: str) -> int:
        seconds = whole_number(text, 1, highest_s)
        if seconds is None:
            import argparse  # only after a mistake

            raise argparse.ArgumentTypeError(f"expected whole seconds from 1 to {highest_s}; came {text!r}")
        return seconds

    return read


def no_arguments(parser: Declared) -> None:
    """For a verb without arguments of its own."""


def configuration_of(arguments: Arguments, *, need_id_scope: bool = True) -> Configuration:
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
