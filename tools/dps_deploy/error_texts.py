"""The words of a board's errors: out of its modules and into a table, which a firmware may do without.

A sentence stands where the error is raised, for that is where it is read and mended; only when a board is deployed does
a number take its place. `dps_board.texts` finds the words by that, and says the number and the values where there are
none. The code of an error, such as `tpm.absent`, stays where it is. So it is with the reasons why a stored assignment
does not hold, which are as long.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterable, Mapping

from dps_deploy.bundles import Unbundled, without_notes

TABLE = "dps_texts"  # the module with the words
FINDER = ("dps_board.texts", "sentence")
# Bytes that stand for pieces, each for the line of its place in this; a line feed ends a line, and stands for none.
CODES = [*range(32), *range(127, 256)]
LONGEST_PIECE = 8  # bytes
LEAST_WORDS = 2  # a single one takes less room than what would find it
BEGINNING = "expected "  # of a text about what is wrong, wherever that is made
_ERRORS = ("RetryLater", "AskOperator", "IdentityStale", "Broken", "DpsError", "Failed", "RefusedError")
_REASONS = (
    "difference",
    "load_held",
    "_difference_of_hardware",
)  # functions that say why a stored assignment does not hold
_RAISED = (*_ERRORS, "ValueError", "OSError")


class Words:
    """The table: texts by their numbers, each once."""

    def __init__(self, texts: Iterable[str] = ()) -> None:
        self.texts = list(texts)

    def number(self, text: str) -> int:
        """The number of a text, which has a place for each value."""
        if text not in self.texts:
            self.texts.append(text)
        return self.texts.index(text)

    def module(self, sources: Iterable[str]) -> str:
        """The source of the module with the texts that `sources` ask for: a line for each number, empty for others.

        A byte stands for each piece that saves most where it is; `dps_board.texts` puts the pieces back. Unbundled for
        a text that is not in printable ASCII.
        """
        asked = {int(number) for source in sources for number in re.findall(rf"\b{FINDER[1]}\((\d+)", source)}
        lines = [text if number in asked else "" for number, text in enumerate(self.texts)]
        for line in lines:
            if line and not (line.isascii() and line.isprintable()):
                raise Unbundled(f"expected printable ASCII in the text of an error; came {line!r}")
        pieces, table = _packed("".join([line + "\n" for line in lines]).encode())
        return f"PIECES = {pieces!r}\nTEXTS = {table!r}\n"


def _packed(table: bytes) -> tuple[bytes, bytes]:
    """The pieces, a line for each of CODES, and the table with these bytes in their places."""
    pieces = []
    for code in CODES:
        piece, most = b"", 0
        if code == ord("\n"):
            pieces.append(piece)
            continue
        counted = Counter(
            table[at : at + size] for size in range(2, LONGEST_PIECE + 1) for at in range(len(table) - size + 1)
        )
        for each, count in counted.items():
            if count * (len(each) - 1) - len(each) - 1 > most and b"\n" not in each:
                saved = table.count(each) * (len(each) - 1) - len(each) - 1  # where it overlaps itself it is there once
                if (saved, each) > (most, piece):
                    piece, most = each, saved
        pieces.append(piece)
        table = table.replace(piece, bytes([code])) if piece else table
    return b"".join([piece + b"\n" for piece in pieces]).rstrip(b"\n") + b"\n", table


def without_sentences(trees: Mapping[str, ast.Module], words: Words) -> None:
    """Strips `trees` of notes, and puts calls of FINDER in the place of the sentences."""
    makers = _makers_of_errors(trees.values())
    for name, tree in trees.items():
        without_notes(tree)
        if name != FINDER[0]:
            taker = _Taker(makers, words)
            taker.visit(tree)
            if taker.has_taken:
                tree.body.insert(0, ast.ImportFrom(FINDER[0], [ast.alias(FINDER[1])], 0))


def _makers_of_errors(trees: Iterable[ast.Module]) -> set[str]:
    """What makes an error of its arguments: the classes, and functions that say so."""
    found: set[str] = {*_RAISED}
    for tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and node.returns is not None:
                returned = node.returns.value if isinstance(node.returns, ast.Constant) else ast.unparse(node.returns)
                if returned in _ERRORS:
                    found.add(node.name)
    return found


class _Taker(ast.NodeTransformer):
    def __init__(self, makers: set[str], words: Words) -> None:
        self._makers = makers
        self._words = words
        self._of_errors: list[set[str]] = []  # names in a function that become part of an error
        self._inside = 0  # of what becomes part of an error
        self.has_taken = False

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        calls = [each for each in ast.walk(node) if isinstance(each, ast.Call) and self._is_maker(each)]
        parts = [part for call in calls for part in ast.walk(call)]
        self._of_errors.append({part.id for part in parts if isinstance(part, ast.Name)})
        self._enter(node, node.name in _REASONS)
        self._of_errors.pop()
        return node

    visit_AsyncFunctionDef = visit_FunctionDef  # type: ignore[assignment]

    def _is_maker(self, node: ast.Call) -> bool:
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        return name in self._makers

    def _enter(self, node: ast.AST, is_error: bool) -> ast.AST:
        self._inside += is_error
        self.generic_visit(node)
        self._inside -= is_error
        return node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        if isinstance(node.func, ast.Attribute) and node.func.attr == "format":
            text = node.func.value
            if isinstance(text, ast.Constant) and self._is_sentence(text.value):
                return self._found(str(text.value), [self.visit(value) for value in node.args])
        return self._enter(node, self._is_maker(node))

    def visit_Assign(self, node: ast.Assign) -> ast.AST:
        names = {part.id for target in node.targets for part in ast.walk(target) if isinstance(part, ast.Name)}
        return self._enter(node, bool(self._of_errors) and bool(names & self._of_errors[-1]))

    def visit_AugAssign(self, node: ast.AugAssign) -> ast.AST:
        names = {node.target.id} if isinstance(node.target, ast.Name) else set()
        return self._enter(node, bool(self._of_errors) and bool(names & self._of_errors[-1]))

    def visit_Constant(self, node: ast.Constant) -> ast.expr:
        return self._found(str(node.value), []) if self._is_sentence(node.value) else node

    def _is_sentence(self, text: object) -> bool:
        if not isinstance(text, str) or "\n" in text or not self._of_errors:
            return False
        return (self._inside > 0 or text.startswith(BEGINNING)) and len(text.split()) >= LEAST_WORDS

    def _found(self, text: str, values: list[ast.expr]) -> ast.expr:
        self.has_taken = True
        number = ast.Constant(self._words.number(text))
        return ast.Call(ast.Name(FINDER[1], ast.Load()), [number, *values], [])
