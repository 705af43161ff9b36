"""Which names a syntax tree makes, and in which scope."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator

COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
SCOPES = (*FUNCTIONS, ast.ClassDef, ast.Lambda)


def within(body: Iterable[ast.AST]) -> Iterator[ast.AST]:
    """Every node below, but not inside the functions and classes there, whose heads are given."""
    for node in body:
        yield node
        if not isinstance(node, SCOPES):
            yield from within(ast.iter_child_nodes(node))


def bound(body: Iterable[ast.AST]) -> list[str]:
    """The names that statements make where they stand."""
    nodes = list(within(body))
    in_comprehensions = {
        id(part) for node in nodes if isinstance(node, ast.comprehension) for part in ast.walk(node.target)
    }
    return [name for node in nodes if id(node) not in in_comprehensions for name in bound_by(node)]


def bound_by(node: ast.AST) -> list[str]:
    """The names that one node makes, those of the nodes below aside."""
    if isinstance(node, ast.Name):
        return [node.id] if not isinstance(node.ctx, ast.Load) else []
    if isinstance(node, (*FUNCTIONS, ast.ClassDef)):
        return [node.name]
    if isinstance(node, ast.Import | ast.ImportFrom):
        return [(alias.asname or alias.name).partition(".")[0] for alias in node.names]
    if isinstance(node, ast.ExceptHandler):
        return [node.name] if node.name else []
    if isinstance(node, ast.Tuple | ast.List | ast.Starred):
        return [name for each in ast.iter_child_nodes(node) for name in bound_by(each)]
    return []


def arguments_of(arguments: ast.arguments) -> list[str]:
    """The names of all parameters."""
    every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
    return [each.arg for each in every if each is not None]


def locals_of(node: ast.FunctionDef | ast.AsyncFunctionDef) -> set[str]:
    """The names of a function's own."""
    found = {*arguments_of(node.args), *bound(node.body)}
    for each in within(node.body):
        if isinstance(each, ast.Global):
            found -= set(each.names)
    return found


def families(nodes: Iterable[ast.AST]) -> dict[str, str]:
    """By the name of each class: one of those that it is related to by inheritance."""
    classes = [node for node in nodes if isinstance(node, ast.ClassDef)]
    found = {node.name: node.name for node in classes}
    for node in classes:
        for base in node.bases:
            name = base.attr if isinstance(base, ast.Attribute) else getattr(base, "id", "")
            if name in found:
                ours, theirs = found[node.name], found[name]
                found = {name: theirs if family == ours else family for name, family in found.items()}
    return found
