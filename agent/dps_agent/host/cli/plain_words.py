"""The plainest command lines, as nearly all are: words that are declared, each option's value the word behind it.

`argparse` brings regular expressions and translations, a quarter of what a start of `status` cost. Whatever else stands
among the words, `--help` and mistakes included, is not read here but left to it; what is read here it reads in the same
way, and both read it from the same declarations.
"""

from __future__ import annotations

from dps_agent.host.cli.verb import VERBS, Arguments, declare_program, declare_verb, verb_named

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

_ABSENT = object()


def read_plain(words: Sequence[str]) -> Arguments | None:
    """What `words` say; None where there is anything among them that is not plain, or something is missing."""
    left = list(reversed(words))
    program, own = _Words(), _Words()
    declare_program(program, _ABSENT)
    if not program.take(left) or not left or left[-1] not in VERBS:
        return None
    verb = verb_named(left.pop())
    declare_verb(own, verb, _ABSENT)
    if not own.take(left) or left or own.expected:
        return None
    return Arguments(verb=verb.name, **{**program.said, **own.said})


class _Words:
    """Takes declarations, as much of them as our verbs need, then words: `said` has what came, and the defaults."""

    def __init__(self) -> None:
        self.said: dict[str, Any] = {}
        self.expected: list[tuple[Any, ...]] = []  # the arguments without a name of their own that are still to come
        self._options: dict[str, tuple[Any, ...]] = {}

    def add_argument(
        self,
        *names: str,
        action: str = "store",
        dest: str = "",
        default: object = None,
        type: Callable[[str], Any] = str,
        choices: Sequence[str] = (),
        metavar: str = "",
        help: str = "",
    ) -> None:
        """See ArgumentParser.add_argument; TypeError for what is not known here."""
        dest = dest or names[-1].lstrip("-").replace("-", "_")
        argument = dest, action, type, choices
        if default is not _ABSENT:
            self.said[dest] = False if default is None and action == "store_true" else default
        if names[0].startswith("-"):
            self._options.update(dict.fromkeys(names, argument))
        else:
            self.expected.append(argument)

    def set_defaults(self, **defaults: Any) -> None:
        """See ArgumentParser.set_defaults."""
        self.said.update(defaults)

    def take(self, words: list[str]) -> bool:
        """Takes all up to a word that nothing is declared for, from the end of `words`; False: they are not plain."""
        while words:
            argument = self._options.get(words[-1])
            if argument is not None:
                words.pop()
            elif words[-1].startswith("-"):
                return False
            elif not self.expected:
                break
            else:
                argument = self.expected.pop(0)
            dest, action, read, choices = argument
            if action == "store_true":
                self.said[dest] = True
                continue
            if not words or words[-1].startswith("-"):
                return False
            try:
                value = read(words.pop())
            except Exception:  # argparse says what is wrong with it
                return False
            if choices and value not in choices:
                return False
            self.said[dest] = [*self.said.get(dest, ()), value] if action == "append" else value
        return True
