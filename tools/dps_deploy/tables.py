"""The events in a machine's table as single characters: they are compared, and shown to nobody.

A table such as `TRANSITIONS` is one text with a row for each transition, "state: event: next state". An event is a
sentence, for the pictures in the documents; the states, which are shown, stay words.
"""

from __future__ import annotations

import ast
import string
from collections.abc import Collection, Iterable, Iterator

from dps_deploy.bundles import Unbundled

CHARACTERS = string.ascii_letters + string.digits


def events_as_characters(trees: Iterable[ast.Module]) -> None:
    """Writes the events of all tables as characters, in the tables and where they have names. Unbundled."""
    for tree in trees:
        tables = [(constant, _rows(constant.value)) for _, constant in _texts_at_head(tree)]
        for constant, rows in tables:
            events = list(dict.fromkeys(event for _, event, _ in rows))
            characters = dict(zip(events, CHARACTERS, strict=False))
            if rows and len(characters) == len(events):
                named = {name: text for name, text in _texts_at_head(tree) if text.value in characters}
                _refuse_other_uses(tree, characters, named)
                constant.value = "".join([f"\n{state}: {characters[event]}: {to}" for state, event, to in rows]) + "\n"
                for text in named.values():
                    text.value = characters[str(text.value)]


def _texts_at_head(tree: ast.Module) -> Iterator[tuple[str, ast.Constant]]:
    """Names of texts, and their texts."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield ast.unparse(node.targets[0]), node.value


def _rows(text: object) -> list[tuple[str, str, str]]:
    """The rows of a table; none where the text is no table."""
    lines = str(text).split("\n")
    rows = [tuple(line.split(": ")) for line in lines[1:-1]]
    is_table = rows and not lines[0] and not lines[-1] and all(len(row) == 3 for row in rows)
    return [(row[0], row[1], row[2]) for row in rows] if is_table else []


def _refuse_other_uses(tree: ast.Module, events: Collection[object], named: dict[str, ast.Constant]) -> None:
    """Unbundled, where an event is written out, or is part of a text."""
    heads = {id(text) for text in named.values()}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and node.value in events and id(node) not in heads:
            raise Unbundled(f"the event {node.value!r} is written out beside its name")
        if isinstance(node, ast.JoinedStr | ast.FormattedValue):
            shown = [each.id for each in ast.walk(node) if isinstance(each, ast.Name) and each.id in named]
            if shown:
                raise Unbundled(f"the event {shown[0]} is part of a text: {ast.unparse(node)}")
