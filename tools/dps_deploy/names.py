"""What names cost a board, and how a bundle's source is written so that they cost less. It does what it did.

A compiled module has a table of its names and short texts, and code has their numbers there: one byte for the first
128, two for all others. The first ones are the attributes at the head of the module. The table also has the names of
all parameters. So methods that nobody asks for are left out, functions that one place calls are written there
(`dps_deploy.inlining`), and

1. a parameter that no call names is called by its place, as those of other functions are (`parameters_by_place`);
2. the fields of a named tuple are given as a list: a tuple of texts is stored beside the table, with its texts
   (`fields_as_lists`);
3. where a named tuple is made, what its fields are called is left out (`fields_by_place`);
4. an object's own attributes, which begin with an underscore, have short names (`own_attributes_in_short`);
5. so have the functions and tables at the head of a module, and methods that begin with an underscore: the same ones
   on every board (`short_names`), so that a traceback can be read;
6. in front of everything stands a condition that never holds, which has what the module uses most (`most_used_first`).
"""

from __future__ import annotations

import ast
import keyword
import string
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import product
from typing import TypeGuard

from dps_deploy.inlining import inlined
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

Target = tuple[str, str]  # a module and a name at its head; "" and the name of a method, wherever that is
NUMBERED_IN_A_BYTE = 128
NUMBERED_BEFORE = 3  # the file's name, `<module>`, and `__name__`, of which the condition is made
LEAST_USES = 7
IN_THE_TABLE = 10  # characters of a text that has a number in any case; a longer one where it is a name as well
PLACES = [f"_{place}" for place in range(16)]  # as the attributes are named
_HIDDEN = {  # what the compiler calls what has no name
    ast.Lambda: "<lambda>",
    ast.ListComp: "<listcomp>",
    ast.SetComp: "<setcomp>",
    ast.DictComp: "<dictcomp>",
    ast.GeneratorExp: "<genexpr>",
}


def written_short(
    sources: Mapping[str, str],
    programs: Iterable[str],
    public: Collection[str],
    short: Mapping[Target, str] | None = None,
) -> dict[str, str]:
    """Modules, by their names, that do the same and take less room.

    `programs` are the sources of those who use them; `public` functions and classes that other programs may call, of
    which every parameter may be named. `short` are names for methods, see `short_names`.
    """
    trees = {name: ast.parse(source) for name, source in sources.items()}
    others = [ast.parse(source) for source in programs]
    without_unused_methods(trees.values(), others, public)
    inlined(trees.values(), others, public)
    fields_by_place(trees.values())
    named = named_in_calls([*trees.values(), *others])
    methods_in_short(trees.values(), others, short or {})
    own_attributes_in_short(trees.values(), others)
    for tree in trees.values():
        parameters_by_place(tree, named, public)
        most_used_first(tree, fields_as_lists(tree))
    return {name: ast.unparse(ast.fix_missing_locations(tree)) + "\n" for name, tree in trees.items()}


def named_in_calls(trees: Collection[ast.Module]) -> set[str]:
    """What calls name: parameters, but not the fields of named tuples."""
    tuples = {name for tree in trees for node in ast.walk(tree) if _named_tuple(node) for name in bound([node])}
    return {
        str(word.arg)
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and not (isinstance(node.func, ast.Name) and node.func.id in tuples)
        for word in node.keywords
    }


def _named_tuple(node: ast.AST) -> ast.Call | None:
    """The call in `X = namedtuple("X", ("first", ...))`; None for any other node."""
    if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Call) or len(node.value.args) != 2:
        return None
    function = node.value.func
    return node.value if isinstance(function, ast.Name) and function.id == "namedtuple" else None


# --- parameters


def parameters_by_place(tree: ast.Module, named: Collection[str], public: Collection[str]) -> None:
    """Gives parameters a name by their place, but those that calls name, and those of what is `public` at the head."""
    kept = _with_bases(tree, public)
    fixed = {id(function) for node in tree.body for function in _functions_of(node) if _is_in(kept, node)}
    for node in ast.walk(tree):
        if isinstance(node, (*FUNCTIONS, ast.Lambda)) and id(node) not in fixed:
            _rename(node, named)


def _with_bases(tree: ast.Module, public: Collection[str]) -> set[str]:
    """`public` and the classes that those inherit from, which stand before them."""
    found = {*public}
    for node in reversed(tree.body):
        if isinstance(node, ast.ClassDef) and node.name in found:
            found.update(base.id for base in node.bases if isinstance(base, ast.Name))
    return found


def _is_in(public: Collection[str], node: ast.stmt) -> bool:
    return isinstance(node, (*FUNCTIONS, ast.ClassDef)) and node.name in public


def _functions_of(node: ast.stmt) -> list[ast.stmt]:
    """A function itself; of a class those that others may call, and how it is made."""
    if isinstance(node, ast.ClassDef):
        inside = [each for each in node.body if isinstance(each, FUNCTIONS)]
        return [each for each in inside if each.name[0] != "_" or each.name == "__init__"]
    return [node]


def _rename(function: ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda, named: Collection[str]) -> None:
    body: list[ast.AST] = [function.body] if isinstance(function, ast.Lambda) else list(function.body)
    nodes = [node for each in body for node in ast.walk(each)]
    own = {id(node) for node in within(body)}
    fixed = {*named, "self"}
    for node in nodes:
        if isinstance(node, ast.Global | ast.Nonlocal):
            fixed.update(node.names)
        elif isinstance(node, ast.comprehension):
            fixed.update(bound([node.target]))
        elif isinstance(node, SCOPES):
            fixed.update(arguments_of(node.args) if not isinstance(node, ast.ClassDef) else ())
            fixed.update(bound(node.body) if not isinstance(node, ast.Lambda) else ())
        if not isinstance(node, ast.Name) or id(node) not in own:
            fixed.update(bound_by(node))
    seen = {*fixed, *arguments_of(function.args), *(node.id for node in nodes if isinstance(node, ast.Name))}
    every = [*function.args.posonlyargs, *function.args.args]
    renamed: dict[str, str] = {}
    for at, argument in enumerate(every[: len(PLACES)]):
        if argument.arg not in fixed and PLACES[at] not in seen:
            renamed[argument.arg] = argument.arg = PLACES[at]
    for node in nodes:
        if isinstance(node, ast.Name):
            node.id = renamed.get(node.id, node.id)


# --- named tuples


def without_unused_methods(
    trees: Collection[ast.Module], others: Iterable[ast.Module], public: Collection[str]
) -> None:
    """Drops the methods of classes that are not `public` whose names are nowhere but in methods of that name.

    A `__repr__` in a class without a base is dropped as well: MicroPython then shows the class, and no attribute.
    """
    asked = _asked(node for tree in [*trees, *others] for node in ast.walk(tree))
    classes = [
        (node, _with_bases(tree, public)) for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)
    ]
    changed = True
    while changed:  # what one of them alone asks for goes with it
        changed = False
        for node, kept in classes:
            for method in [each for each in node.body if isinstance(each, FUNCTIONS)]:
                own = _asked(ast.walk(method))
                is_kept = node.name in kept or method.name.startswith("__")
                shows = method.name == "__repr__" and not node.bases
                if shows or (not is_kept and asked[method.name] == own[method.name]):
                    node.body.remove(method)
                    asked -= own
                    changed = True
            node.body = node.body or [ast.Pass()]


def _asked(nodes: Iterable[ast.AST]) -> Counter[str]:
    """How often there is an attribute or a text that is such a name."""
    found: Counter[str] = Counter()
    for node in nodes:
        if isinstance(node, ast.Attribute):
            found[node.attr] += 1
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found[node.value] += 1
    return found


def fields_by_place(trees: Collection[ast.Module]) -> None:
    """Makes named tuples without the names of their fields, where those stand in their order."""
    calls = [
        (name, call) for tree in trees for node in tree.body if (call := _named_tuple(node)) for name in bound([node])
    ]
    fields = {
        name: [each.value for each in call.args[1].elts if isinstance(each, ast.Constant)]
        for name, call in calls
        if isinstance(call.args[1], ast.Tuple)
    }
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in fields:
            named = [word.arg for word in node.keywords]
            at = len(node.args)
            if named == fields[node.func.id][at : at + len(named)]:
                node.args += [word.value for word in node.keywords]
                node.keywords = []


def fields_as_lists(tree: ast.Module) -> list[str]:
    """Gives the fields of named tuples as lists; the fields that are too long to be in the table by themselves."""
    long: list[str] = []
    for node in ast.walk(tree):
        call = _named_tuple(node)
        if call is not None and isinstance(call.args[1], ast.Tuple) and call.args[1].elts:
            call.args[1] = ast.List(call.args[1].elts, ast.Load())
            texts = [str(each.value) for each in call.args[1].elts if isinstance(each, ast.Constant)]
            long += [text for text in texts if len(text) > IN_THE_TABLE]
    return long


# --- attributes


def own_attributes_in_short(trees: Collection[ast.Module], others: Iterable[ast.Module]) -> None:
    """Gives the attributes that objects set for themselves alone short names, the same in all `trees`.

    Classes that do not inherit from each other have the same ones, by how often they are used, unless an object's
    attribute is used outside of its class. One that is the name of anything else, or part of a text, or used by
    `others`, keeps its own.
    """
    nodes = [node for tree in trees for node in ast.walk(tree)]
    own = {node.attr for node in nodes if _is_own(node)}
    own -= _other_uses(own, nodes, others)
    own -= {node.name for node in nodes if isinstance(node, (*FUNCTIONS, ast.ClassDef))}
    related = families(nodes)
    uses = [(family, node) for tree in trees for family, node in _attributes(tree, related, "") if node.attr in own]
    shared = {node.attr for family, node in uses if not family}
    counted: dict[str, Counter[str]] = {}
    for family, node in uses:
        if node.attr not in shared:
            counted.setdefault(family, Counter())[node.attr] += 1
    short = {
        (family, name): f"_{number}"
        for family, names in counted.items()
        for number, name in enumerate(sorted(names, key=lambda name: (-names[name], name)))
    }
    first = max((len(names) for names in counted.values()), default=0)
    of_all = {name: f"_{number}" for number, name in enumerate(sorted(shared), first)}
    for family, node in uses:
        node.attr = of_all.get(node.attr) or short[family, node.attr]


def _other_uses(names: Collection[str], nodes: Iterable[ast.AST], others: Iterable[ast.Module]) -> set[str]:
    """Those of `names` that are more than attributes and functions in `nodes`, part of a text, or used by `others`."""
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found |= {name for name in names if name in node.value}
        elif isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.arg | ast.keyword):
            found.add(str(node.arg))
    texts = [ast.unparse(other) for other in others]
    return found | {name for name in names if any(name in text for text in texts)}


def _attributes(node: ast.AST, families: Mapping[str, str], family: str) -> Iterator[tuple[str, ast.Attribute]]:
    """Every attribute below a node that is in a class of `family`, and whose object's it is; "": anybody's."""
    if isinstance(node, ast.ClassDef):
        family = families[node.name]
    if isinstance(node, ast.Attribute):
        is_self = isinstance(node.value, ast.Name) and node.value.id == "self"
        yield (family if is_self else ""), node
    for child in ast.iter_child_nodes(node):
        yield from _attributes(child, families, family)


# --- functions


def short_names(trees: Mapping[str, ast.Module]) -> dict[Target, str]:
    """Short names of what `trees`, modules by name, make at their heads, and, for the module "", of private methods."""
    targets: dict[Target, None] = {}
    for module, tree in trees.items():
        for node in tree.body:
            imports = [each for each in ast.walk(node) if isinstance(each, ast.Import | ast.ImportFrom | ast.ClassDef)]
            for name in sorted({*bound([node])} - {*bound(imports)}):
                targets[module, name] = None
            for method in _private_methods(node):
                targets["", method.name] = None
    firsts, seconds = string.ascii_uppercase, (string.ascii_lowercase + string.digits, string.ascii_uppercase)
    pairs = ("".join(pair) for second in seconds for pair in product(firsts, second))
    return dict(zip(targets, pairs, strict=False))


def places_of(name: str, trees: Mapping[str, ast.Module]) -> list[str]:
    """Where `trees`, modules by name, have private methods of that name."""
    return [
        f"{module}.{node.name}.{name}"
        for module, tree in trees.items()
        for node in tree.body
        if isinstance(node, ast.ClassDef) and name in {method.name for method in _private_methods(node)}
    ]


def private_methods(trees: Iterable[ast.Module]) -> set[str]:
    """The names of the private methods in `trees`."""
    return {method.name for tree in trees for node in tree.body for method in _private_methods(node)}


def _private_methods(node: ast.AST) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    body = node.body if isinstance(node, ast.ClassDef) else []
    return [each for each in body if isinstance(each, FUNCTIONS) and each.name[0] == "_" != each.name[1:2]]


def methods_in_short(trees: Collection[ast.Module], others: Iterable[ast.Module], short: Mapping[Target, str]) -> None:
    """Gives methods that begin with an underscore the names that `short` has for them, where they mean nothing else."""
    nodes = [node for tree in trees for node in ast.walk(tree)]
    found = [method for node in nodes for method in _private_methods(node)]
    renamed = {method.name: short["", method.name] for method in found if ("", method.name) in short}
    for name in _other_uses(renamed, nodes, others):
        renamed.pop(name, None)
    for method in found:
        method.name = renamed.get(method.name, method.name)
    for node in nodes:
        if isinstance(node, ast.Attribute):
            node.attr = renamed.get(node.attr, node.attr)


def _is_own(node: ast.AST) -> TypeGuard[ast.Attribute]:
    """Whether a node sets an attribute of `self` that is for no one else."""
    return (
        isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
        and node.attr[0] == "_" != node.attr[1:2]
    )


# --- the order of the table


def most_used_first(tree: ast.Module, also: Iterable[str] = ()) -> None:
    """Puts the condition at the head; `also` are names that the compiler is to know from the beginning."""
    counted = _uses(tree)
    most = counted.most_common(NUMBERED_IN_A_BYTE - NUMBERED_BEFORE) if len(counted) > NUMBERED_IN_A_BYTE else []
    names = [name for name, count in most if count >= LEAST_USES]
    body: list[ast.stmt] = [ast.Expr(_chain(names))] if names else []
    if also:  # the compiler reads it, and leaves it out
        body.append(ast.If(ast.Constant(0), [ast.Expr(_chain(sorted(set(also))))], []))
    if body:
        tree.body.insert(0, ast.If(ast.UnaryOp(ast.Not(), ast.Name("__name__", ast.Load())), body, []))


def _chain(names: Iterable[str]) -> ast.expr:
    """One expression that has all `names`, as attributes where they can be: `a.b.c['*']`."""
    found: ast.expr = ast.Name("__name__", ast.Load())
    for name in names:
        if name.isidentifier() and not keyword.iskeyword(name):
            found = ast.Attribute(found, name, ast.Load())
        else:
            found = ast.Subscript(found, ast.Constant(name), ast.Load())
    return found


def _uses(tree: ast.Module) -> Counter[str]:
    """How often code has the number of a name or short text."""
    found: Counter[str] = Counter()
    names = {
        name
        for node in ast.walk(tree)
        for name in [getattr(node, "id", None), getattr(node, "attr", None), getattr(node, "arg", None)]
        if isinstance(name, str)
    }

    def look(node: ast.AST, scopes: list[set[str]], head: bool) -> None:
        """`scopes` are the names of the functions around it; `head`: it is at the head of a module or class."""
        inside, at_head = scopes, head
        if isinstance(node, (*FUNCTIONS, ast.Lambda)):
            own = locals_of(node) if not isinstance(node, ast.Lambda) else set(arguments_of(node.args))
            found.update(arguments_of(node.args))
            found[getattr(node, "name", _HIDDEN.get(type(node), ""))] += 1 + head
            inside, at_head = [*scopes, own], False
        elif isinstance(node, ast.ClassDef):
            found.update([node.name] * (2 + head))
            found.update(["__name__", "__module__", "__qualname__"])
            at_head = True
        elif isinstance(node, COMPREHENSIONS):
            found.update([_HIDDEN[type(node)], "*"])
            inside = [*scopes, {name for each in node.generators for name in bound([each.target])}]
            at_head = False
        elif isinstance(node, ast.Attribute):
            found[node.attr] += 1
        elif isinstance(node, ast.keyword) and node.arg:
            found[node.arg] += 1
        elif isinstance(node, ast.alias):
            found.update([node.name, *([node.asname or node.name] if head else [])])
        elif isinstance(node, ast.Name) and (head or not any(node.id in scope for scope in scopes)):
            found[node.id] += 1
        elif isinstance(node, ast.Tuple) and all(isinstance(each, ast.Constant) for each in node.elts):
            return  # stored whole
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found[node.value] += len(node.value) <= IN_THE_TABLE or node.value in names
        for child in ast.iter_child_nodes(node):
            look(child, inside, at_head)

    look(tree, [], True)
    return found
