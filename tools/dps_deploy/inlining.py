"""Functions that one place calls, written there.

On a microcontroller a function takes 24 bytes of the heap as soon as its module is loaded, 40 where it is a generator,
and about 40 of the flash, whether anybody calls it or not. A source has many that one place calls, because a name says
what a piece does. In a bundle their bodies stand in that place instead; so do expressions that are hardly larger than
a call, wherever they are called. What a program does stays the same, so it is done only where

- the name means this function and nothing else, and is only called: nobody outside asks for it, no text has it;
- a method begins with an underscore, no class that is related has another one of that name, and objects call it of
  themselves;
- what it is called with is evaluated as often as before, in the same order, and before anything else;
- no local name of the one is a name of the other: the body's are changed where they are.

A value is let go of when the function that has it ends. So a body with names of its own goes before other statements
only where those names can be let go of behind it, and into a generator or a coroutine, which may live as long as its
device, only where that ends with it. MicroPython has a frame of up to eleven words on the C stack, a larger one in the
heap: no function is taken beyond that.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from dps_deploy.bundles import without_notes
from dps_deploy.scopes import (
    COMPREHENSIONS,
    FUNCTIONS,
    SCOPES,
    arguments_of,
    bound,
    bound_by,
    families,
    locals_of,
    within,
)

Function = ast.FunctionDef | ast.AsyncFunctionDef
Given = list[tuple[str, ast.expr]]  # parameters and what they are called with, in the order in which that is evaluated
# An expression is written in two places, in three or in more where it has at most so many nodes: it takes no more room
# there than the calls and the function.
MOST_NODES = (26, 18, 14)
MOST_LOCALS = 8  # of a function whose frame has eleven words
MOST_CLEARED = 8  # names that are let go of behind a body
_CONSUMERS = ("all", "any", "bytes", "dict", "list", "max", "min", "set", "sorted", "sum", "tuple")  # of a generator
_LATE = (ast.Lambda, *COMPREHENSIONS)
_KEPT = (*SCOPES, ast.Global, ast.Nonlocal, ast.Delete, ast.NamedExpr)  # what means something else in another function


class _Found(NamedTuple):
    """A function that may be written elsewhere."""

    node: Function
    body: list[ast.stmt]  # in which it is defined
    family: str  # of its class; "" at the head of a module
    functions: frozenset[str]  # the names of all there are: an attribute of such a name may be a property


class _Place(NamedTuple):
    """A call, what stands between it and the function around it, outermost first, and that function."""

    call: ast.Call
    path: list[ast.AST]
    inside: Function


class _Named(NamedTuple):
    """A name, an attribute or a function; what stands around it, outermost first; the family of the class there."""

    node: ast.AST
    path: list[ast.AST]
    family: str


def inlined(trees: Collection[ast.Module], others: Iterable[ast.Module], public: Collection[str]) -> None:
    """Changes `trees`, the bundles; `others` are programs that use them, `public` what other programs may call."""
    related = families(node for tree in trees for node in ast.walk(tree))
    outside = {name for tree in others for node in ast.walk(tree) for name in (*_said(node), *_own(node))}
    functions = frozenset(node.name for tree in trees for node in ast.walk(tree) if isinstance(node, FUNCTIONS))
    said = {id(tree): {name for node in ast.walk(tree) for name in _said(node)} for tree in trees}
    changed = True
    while changed:
        changed = False
        named = _all_named(trees, related)
        written: set[Function] = set()  # those that are other ones now, at which the next round looks
        for tree in trees:
            asked = outside.union(public, *[said[id(other)] for other in trees if other is not tree])
            for found in _candidates(tree, related, functions, asked):
                places = _places(named[found.node.name], tree, found)
                if not places or not written.isdisjoint({found.node, *[place.inside for place in places]}):
                    continue
                if _expressions(found, places) or _body(found, places):
                    found.body.remove(found.node)
                    found.body[:] = found.body or [ast.Pass()]
                    written.update([found.node, *[place.inside for place in places]])
                    changed = True
    for tree in trees:
        without_notes(tree)  # where constants were given it may be known now what a condition says


def _all_named(trees: Iterable[ast.Module], related: Mapping[str, str]) -> dict[str, list[_Named]]:
    """Everything in `trees` that has a name, by that."""
    found: dict[str, list[_Named]] = {}

    def look(node: ast.AST, path: list[ast.AST], family: str) -> None:
        if isinstance(node, ast.ClassDef):
            family = related.get(node.name, "")
        name = node.name if isinstance(node, FUNCTIONS) else getattr(node, "attr", getattr(node, "id", ""))
        if name:
            found.setdefault(name, []).append(_Named(node, path, family))
        for child in ast.iter_child_nodes(node):
            look(child, [*path, node], family)

    for tree in trees:
        look(tree, [], "")
    return found


# --- which functions


def _said(node: ast.AST) -> list[str]:
    """The names in imports and texts."""
    if isinstance(node, ast.ImportFrom):
        return [alias.name for alias in node.names]
    return node.value.split() if isinstance(node, ast.Constant) and isinstance(node.value, str) else []


def _parameter(node: ast.AST) -> list[str]:
    return [node.arg] if isinstance(node, ast.arg) else []


def _own(node: ast.AST) -> list[str]:
    """The name of an attribute or a function."""
    return [node.name] if isinstance(node, FUNCTIONS) else [node.attr] if isinstance(node, ast.Attribute) else []


def _candidates(
    tree: ast.Module, related: Mapping[str, str], functions: frozenset[str], asked: Collection[str]
) -> Iterator[_Found]:
    """Those that nobody else asks for and whose bodies mean the same elsewhere."""
    heads = [_Found(node, tree.body, "", functions) for node in tree.body if isinstance(node, FUNCTIONS)]
    methods = [
        _Found(node, each.body, related[each.name], functions)
        for each in tree.body
        if isinstance(each, ast.ClassDef)
        for node in each.body
        if isinstance(node, FUNCTIONS) and node.name[0] == "_" != node.name[1:2]
    ]
    nodes = list(ast.walk(tree))
    said = {name for node in nodes if isinstance(node, ast.Constant) for name in _said(node)}
    made = [name for node in nodes for name in (*bound_by(node), *_parameter(node))]
    for found in (*heads, *methods):
        name = found.node.name
        is_free = name not in asked and name not in said and (found.family or made.count(name) == 1)
        if is_free and _is_plain(found):
            yield found


def _is_plain(found: _Found) -> bool:
    """Whether a function has nothing that makes its body mean something else in another one."""
    node, arguments = found.node, found.node.args
    if node.decorator_list or arguments.vararg or arguments.kwarg or arguments.kwonlyargs or arguments.posonlyargs:
        return False
    if not all(isinstance(each, ast.Constant) for each in arguments.defaults):
        return False
    if found.family and [each.arg for each in arguments.args[:1]] != ["self"]:
        return False
    inside = _within_whole(node.body)
    if any(isinstance(each, _KEPT) or (isinstance(each, ast.Import) and "." in each.names[0].name) for each in inside):
        return False
    consumed = [each.args[0] for each in inside if isinstance(each, ast.Call) and _consumes(each)]
    if any(isinstance(each, ast.GeneratorExp) and each not in consumed for each in inside):
        return False  # it looks at names when it is asked
    names = {name for each in inside for name in (getattr(each, "id", ""), getattr(each, "attr", ""))}
    return _hidden(inside).isdisjoint(locals_of(node)) and names.isdisjoint({node.name, "super", "locals"})


def _consumes(call: ast.Call) -> bool:
    return isinstance(call.func, ast.Name) and call.func.id in _CONSUMERS and len(call.args) == 1


def _within_whole(body: Iterable[ast.stmt]) -> list[ast.AST]:
    """Every node of a body."""
    return [each for statement in body for each in ast.walk(statement)]


def _hidden(nodes: Iterable[ast.AST]) -> set[str]:
    """The names that comprehensions have for themselves."""
    return {name for each in nodes if isinstance(each, ast.comprehension) for name in bound([each.target])}


def _places(named: Iterable[_Named], tree: ast.Module, found: _Found) -> list[_Place]:
    """All the places that name a function; none where one of them is not a call of it in a function of its bundle."""
    places: list[_Place] = []
    for node, path, family in named:
        is_here = path[0] is tree
        if isinstance(node, ast.Attribute):
            of_self = isinstance(node.value, ast.Name) and node.value.id == "self"
            if is_here and not found.family:
                continue
            if found.family and of_self and family not in ("", found.family):
                continue  # another one's
            place = _place(node, path) if is_here and of_self and family else None
        elif node is found.node or (family != found.family if found.family else not is_here):
            continue
        else:
            place = None if found.family else _place(node, path)
        if place is None:
            return []
        places.append(place)
    return places


def _place(node: ast.AST, path: Sequence[ast.AST]) -> _Place | None:
    """The call of what `node` names; None where it is none, or in no function, or in one that is in another."""
    call = path[-1]
    around = [each for each in path if isinstance(each, FUNCTIONS)]
    if not isinstance(call, ast.Call) or call.func is not node or len(around) != 1:
        return None
    at = list(path).index(around[0])
    place = _Place(call, list(path[at + 1 : -1]), around[0])
    is_plain = not any(isinstance(each, ast.Lambda) for each in path[:at])
    is_plain = is_plain and not any(isinstance(each, ast.ClassDef) for each in place.path)
    return place if is_plain else None


def _local_at(place: _Place) -> set[str]:
    """The names that mean something local where a call is."""
    found = locals_of(place.inside)
    for each in place.path:
        if isinstance(each, ast.Lambda):
            found |= set(arguments_of(each.args))
        found |= _hidden(getattr(each, "generators", ()))
    return found


# --- the call and what it gives


def _given(found: _Found, call: ast.Call) -> Given | None:
    """None where it cannot be seen what is given for what."""
    names = [each.arg for each in found.node.args.args]
    values = [call.func.value] if found.family and isinstance(call.func, ast.Attribute) else []
    values += call.args
    if len(values) > len(names) or any(isinstance(each, ast.Starred | ast.NamedExpr) for each in ast.walk(call)):
        return None
    given = list(zip(names, values, strict=False))
    given += [(word.arg or "", word.value) for word in call.keywords]
    defaults = dict(zip(reversed(names), reversed(found.node.args.defaults), strict=False))
    given += [(name, defaults[name]) for name in names if name not in dict(given) and name in defaults]
    return given if sorted(name for name, _ in given) == sorted(names) else None


def _result(node: Function, place: _Place) -> ast.expr | None:
    """What stands for what a function returns: its call, or what waits for the coroutine or the generator of that."""
    wanted: type[ast.Await | ast.YieldFrom] = ast.Await
    if not isinstance(node, ast.AsyncFunctionDef):
        if not _yields(node):
            return place.call
        wanted = ast.YieldFrom
    around = place.path[-1] if place.path else None
    return around if isinstance(around, wanted) and not any(isinstance(each, _LATE) for each in place.path) else None


def _yields(node: Function) -> bool:
    return any(isinstance(each, ast.Yield | ast.YieldFrom) for each in within(node.body))


def _names_in(node: ast.AST) -> set[str]:
    """Every name in a function."""
    nodes = list(ast.walk(node))
    names = {name for each in nodes for name in (*bound_by(each), getattr(each, "id", ""), getattr(each, "arg", ""))}
    return names - {"", None}


def _means_the_same(node: Function, place: _Place) -> bool:
    """Whether the names that a function does not make itself are the same ones where it is called."""
    inside = _within_whole(node.body)
    hidden = _hidden(inside)
    meant = {each.id for each in inside if isinstance(each, ast.Name)} - locals_of(node) - hidden
    return _local_at(place).isdisjoint(meant) and hidden.isdisjoint(_names_in(place.inside))


class _Renamed(ast.NodeTransformer):
    """What a function has, with other names or values for its own."""

    def __init__(self, names: Mapping[str, str], values: Mapping[str, ast.expr]) -> None:
        self._names = names
        self._values = values

    def visit_Name(self, node: ast.Name) -> ast.expr:
        """See the class."""
        if node.id in self._values:
            return copy.deepcopy(self._values[node.id])
        node.id = self._names.get(node.id, node.id)
        return node

    def visit_ExceptHandler(self, node: ast.ExceptHandler) -> ast.AST:
        """See the class."""
        node.name = self._names.get(node.name, node.name) if node.name else None
        return self.generic_visit(node)

    def visit_alias(self, node: ast.alias) -> ast.alias:
        """See the class."""
        made = node.asname or node.name
        if self._names.get(made, made) != made:
            node.asname = self._names[made]
        return node


# --- expressions


def _expressions(found: _Found, places: Sequence[_Place]) -> bool:
    """Writes what a function returns in the place of each call, if that is one expression, and all of them allow it."""
    statement = found.node.body[0]
    if len(found.node.body) > 1 or not isinstance(statement, ast.Return) or statement.value is None:
        return False
    value = statement.value
    if len(places) > 1 and sum(1 for _ in ast.walk(value)) > MOST_NODES[min(len(places) - 2, len(MOST_NODES) - 1)]:
        return False
    calls = [place.call for place in places]
    if any(part in calls for call in calls for child in ast.iter_child_nodes(call) for part in ast.walk(child)):
        return False  # one is called with what another one returns
    written: list[tuple[_Place, ast.expr, ast.expr]] = []
    for place in places:
        given, result = _given(found, place.call), _result(found.node, place)
        if given is None or result is None or not _means_the_same(found.node, place):
            return False
        costly = [(name, each) for name, each in given if not _stays(each, place)]
        if not _keeps_order(value, costly, found.functions):
            return False
        written.append((place, result, _Renamed({}, dict(given)).visit(copy.deepcopy(value))))
    for place, result, instead in written:
        _replace(place.inside, result, [instead])
    return True


def _stays(value: ast.expr, place: _Place) -> bool:
    """Whether what is given is the same whenever it is looked at: a constant, or a name of the function that calls."""
    if isinstance(value, ast.Name):
        inside = list(ast.walk(place.inside))
        return value.id in locals_of(place.inside) and not any(isinstance(each, ast.Nonlocal) for each in inside)
    return isinstance(value, ast.Constant)


def _keeps_order(value: ast.expr, costly: Given, functions: Collection[str]) -> bool:
    """Whether an expression evaluates the parameters for which something is done, once, in order, before all else.

    Attributes are looked up in any order, where none of them can be a property.
    """
    names = [node.id for node in ast.walk(value) if isinstance(node, ast.Name)]
    if any(names.count(name) != 1 for name, _ in costly):
        return False
    waiting = list(costly)
    for node, is_certain in _evaluated(value, True):
        if not waiting:
            return True
        if isinstance(node, ast.Name) and node.id == waiting[0][0] and is_certain:
            waiting.pop(0)
        elif getattr(node, "id", "") in dict(waiting):
            return False
        elif not isinstance(node, ast.Name | ast.Constant):
            is_method_of_text = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Constant)
            if not is_method_of_text and not all(_is_read(each, functions) for each in (node, *dict(waiting).values())):
                return False
    return not waiting


def _is_read(node: ast.expr, functions: Collection[str]) -> bool:
    """Whether a value is an attribute of a name, or of such an attribute, and none of them is a property."""
    while isinstance(node, ast.Attribute) and node.attr not in functions:
        node = node.value
    return isinstance(node, ast.Name)


def _evaluated(node: ast.AST, is_certain: bool) -> Iterator[tuple[ast.expr, bool]]:
    """The parts of an expression as they are evaluated, operands first, and whether each of them is in any case."""
    parts: list[tuple[ast.AST, bool]]
    if isinstance(node, ast.IfExp):
        parts = [(node.test, True), (node.body, False), (node.orelse, False)]
    elif isinstance(node, ast.BoolOp):
        parts = [(each, each is node.values[0]) for each in node.values]
    elif isinstance(node, ast.Compare):
        operands = [node.left, *node.comparators]
        parts = [(each, each in operands[:2]) for each in operands]
    else:
        certain = not isinstance(node, (*_LATE, ast.Dict))
        parts = [(each, certain) for each in ast.iter_child_nodes(node)]
    for part, each in parts:
        yield from _evaluated(part, is_certain and each)
    if isinstance(node, ast.expr):
        yield node, is_certain


def _replace(inside: ast.AST, old: ast.AST, new: Sequence[ast.AST]) -> None:
    """Puts other nodes in the place of one, which is somewhere in there."""
    for node in ast.walk(inside):
        for field, value in ast.iter_fields(node):
            if value is old:
                setattr(node, field, new[0])
                return
            if isinstance(value, list) and old in value:
                at = value.index(old)
                value[at : at + 1] = new
                return
    raise AssertionError("it is nowhere in there")


# --- bodies


def _body(found: _Found, places: Sequence[_Place]) -> bool:
    """Writes the body of a function in the place of the one statement that calls it, if that can be done."""
    if len(places) > 1:
        return False
    node, place = found.node, places[0]
    given, result = _given(found, place.call), _result(node, place)
    statement = next((each for each in reversed(place.path) if isinstance(each, ast.stmt)), None)
    if given is None or result is None or statement is None:
        return False
    ends = isinstance(statement, ast.Return) and statement.value is result
    is_last = place.inside.body[-1] is statement and _is_all(statement, result)
    if not (ends or is_last or _is_first(statement, result)) or not _means_the_same(node, place):
        return False
    returns = [each for each in within(node.body) if isinstance(each, ast.Return)]
    body = _with_names(node, given, place)
    if _is_wide(place.inside, node, body):
        return False
    if ends:
        body += [] if _always_ends(body) else [ast.Return(ast.Constant(None))]
    elif is_last and not any(each.value for each in returns):
        pass  # the function ends where the body does
    else:
        straight = _before(body, returns, statement, result, place)
        if straight is None:
            return False
        body = straight
    _replace(place.inside, statement, body or [ast.Pass()])
    return True


def _before(
    body: list[ast.stmt], returns: list[ast.Return], statement: ast.stmt, result: ast.expr, place: _Place
) -> list[ast.stmt] | None:
    """A body in front of the statement that needs its result, and that statement; None where that cannot be done."""
    own = [name for name in dict.fromkeys(bound(body)) if name not in _caught(body)]
    if not _is_first(statement, result) or (own and _lives(place.inside)):
        return None
    if returns and (len(returns) > 1 or not isinstance(body[-1], ast.Return)):
        target = statement.targets[0] if isinstance(statement, ast.Assign) and len(statement.targets) == 1 else None
        is_given = isinstance(statement, ast.Assign) and statement.value is result and isinstance(target, ast.Name)
        assigned = _assigned(body, target.id) if is_given and isinstance(target, ast.Name) else None
        return None if assigned is None or len(own) > MOST_CLEARED else assigned + _cleared(own)
    if own and not isinstance(statement, ast.Assign | ast.Expr | ast.Raise):
        return None
    if not isinstance(statement, ast.Raise) and len(own) > MOST_CLEARED:
        return None
    last = body.pop() if returns else ast.Return(None)
    assert isinstance(last, ast.Return)
    _replace(statement, result, [last.value or ast.Constant(None)])
    if not (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant | ast.Name)):
        body.append(statement)
    return body + (_cleared(own) if not isinstance(statement, ast.Raise) else [])


def _cleared(names: Iterable[str]) -> list[ast.stmt]:
    targets: list[ast.expr] = [ast.Name(name, ast.Store()) for name in names]
    return [ast.Assign(targets, ast.Constant(None))] if targets else []


def _caught(body: Iterable[ast.stmt]) -> set[str]:
    """The names of errors that are caught, which end with what they are caught for."""
    return {str(each.name) for each in _within_whole(body) if isinstance(each, ast.ExceptHandler)}


def _is_wide(inside: Function, node: Function, body: list[ast.stmt]) -> bool:
    """Whether two functions whose frames are on the C stack, or may live for long, become one that has not."""
    before = locals_of(inside)
    are_narrow = not _lives(inside) and max(len(before), len(locals_of(node))) <= MOST_LOCALS
    return are_narrow and len(before | set(bound(body))) > MOST_LOCALS


def _with_names(node: Function, given: Given, place: _Place) -> list[ast.stmt]:
    """A body with the names that it has at a place: constants and names that are given stand where they are used."""
    there = _names_in(place.inside)
    taken = there | _names_in(node)
    names: dict[str, str] = {}
    for name in sorted(locals_of(node)):
        free = name
        while free in there or (free != name and free in taken):
            free += "_"
        names[name] = free
        taken.add(free)
    stored = set(bound(node.body))
    values = {name: each for name, each in given if name not in stored and _stays(each, place)}
    begin: list[ast.stmt] = [
        ast.Assign([ast.Name(names[name], ast.Store())], each) for name, each in given if name not in values
    ]
    renamed = _Renamed(names, values)
    return begin + [renamed.visit(copy.deepcopy(each)) for each in node.body]


def _assigned(body: Sequence[ast.stmt], name: str) -> list[ast.stmt] | None:
    """A body that gives a name what it returned; None where it returns within anything but conditions."""
    for at, statement in enumerate(body):
        before, behind = list(body[:at]), list(body[at + 1 :])
        if isinstance(statement, ast.Return):
            return [*before, ast.Assign([ast.Name(name, ast.Store())], statement.value or ast.Constant(None))]
        if any(isinstance(each, ast.Return) for each in within([statement])):
            if not isinstance(statement, ast.If):
                return None
            if behind and not _always_ends(statement.body):
                return None
            holds, fails = _assigned(statement.body, name), _assigned([*statement.orelse, *behind], name)
            return None if holds is None or fails is None else [*before, ast.If(statement.test, holds, fails)]
    return [*body] if _always_ends(body) else [*body, ast.Assign([ast.Name(name, ast.Store())], ast.Constant(None))]


def _is_all(statement: ast.stmt, result: ast.expr) -> bool:
    return isinstance(statement, ast.Expr) and statement.value is result


def _is_first(statement: ast.stmt, result: ast.expr) -> bool:
    """Whether a statement begins with evaluating `result`, in any case, and once."""
    if isinstance(statement, ast.Raise):
        whole = statement.exc
    elif isinstance(statement, ast.If):
        whole = statement.test
    elif isinstance(statement, ast.Assign | ast.Expr | ast.Return):
        whole = statement.value
    else:
        return False
    inside = list(ast.walk(result))
    for node, is_certain in _evaluated(whole, True) if whole is not None else ():
        if node is result:
            return is_certain
        if node not in inside and not isinstance(node, ast.Name | ast.Constant):
            return False
    return False


def _lives(node: Function) -> bool:
    """Whether it may live for long."""
    return isinstance(node, ast.AsyncFunctionDef) or _yields(node)


def _always_ends(body: Sequence[ast.stmt]) -> bool:
    """Whether nothing is reached behind these statements."""
    last = body[-1] if body else None
    if isinstance(last, ast.If):
        return _always_ends(last.body) and _always_ends(last.orelse)
    return isinstance(last, ast.Return | ast.Raise)
