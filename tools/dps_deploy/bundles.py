"""The modules of a board as few files: one bundle for each phase of its life, in which every name stands once.

On a microcontroller each module has a table of its names, those that it imports included, and so has its file. What
lives in memory together therefore becomes one module here, when a board is deployed; the sources stay as they are, for
Linux, for tests and for readers. A bundle is the statements of its modules, each behind those that it imports:

1. A name at the head of a module gets the short one that `short` has for it, unless programs may ask for it or it is
   the name of something else, too. It keeps its name otherwise; where two modules have it, the second one's gets the
   module's behind.
2. What one of our modules imports from another is not imported, but stands for itself. What is in another bundle is
   imported, at the head of the bundle or where a function imports it.
3. Numbers and short texts take the place of their names. What nobody asks for is left out, as are docstrings,
   annotations and what only CPython runs.
4. `forget` of the first module of a phase is `forget` of its bundle; of any other module it does nothing.

Programs import what is public by its own name, such as `dps_board.runner`: the packages say that it is the bundle.
"""

from __future__ import annotations

import ast
import builtins
import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from dps_deploy.scopes import arguments_of, bound, bound_by, locals_of, within

BASE = "dps_base"
# Bundle: the modules with whose import it is loaded. What they alone import is in it as well; BASE has all others.
PHASES = {
    "dps_registration": (
        *("dps_agent.registration", "dps_agent.registration_by_tpm"),
        *("dps_hal.tpm.activation", "dps_hal.tpm.upkeep"),
    ),
    "dps_agent.registration_by_key": ("dps_agent.registration_by_key", "dps_hal.device_key"),
    "dps_hub": ("dps_board.hub", "dps_agent.session"),
    "dps_board.factory": ("dps_board.factory",),
    "dps_agent.pnp": ("dps_agent.pnp",),
    "dps_board.messages": ("dps_board.messages",),
    "dps_board.config": ("dps_board.config", "dps_board.keys"),
    "dps_board.parts": ("dps_board.parts",),
    "dps_hal.tpm.verdicts": ("dps_hal.tpm.verdicts",),
    "dps_hal.store.block": ("dps_hal.store.block",),
    "dps_hal.tpm.spi": ("dps_hal.tpm.spi",),
    "dps_hal.tpm.i2c": ("dps_hal.tpm.i2c",),
}
ONE_OF = {"dps_hal.tpm.spi", "dps_hal.tpm.i2c"}  # a board has one of them: in BASE where the other is left out
OURS = ("dps_agent", "dps_board", "dps_hal")
FACTS = {"TYPE_CHECKING": False, "MICROPYTHON": True, "CERTIFICATES": False}  # names that mean the same in every module
# What is known of every board, for none shows a certificate, or has its TPM from an operating system or with others:
# attributes of settings, assignment, session and TPM, and what functions say of an assignment.
EMPTY: dict[str, str | bool | None] = {
    "certificate": "",
    "chain": "",
    "_renewal": None,
    "managed": False,
    "shared": False,
}
SAID = {"has_tokens": True, "is_signed": False}
LONGEST = 100  # characters or bytes that may take the place of a name
_FORGET = ("dps_board.memory", "forget")

Target = tuple[str, str]  # a module and a name at its head; "" for the module itself


class Unbundled(Exception):
    """A module does what has no place in a bundle; the text says what."""


class _Named(NamedTuple):
    """What a name at the head of a module is in the bundles."""

    bundle: str
    name: str  # the same in no two bundles
    value: ast.Constant | None  # what takes its place


class _Statement(NamedTuple):
    """A statement at the head of a module, as its bundle has it."""

    bundle: str
    node: ast.stmt
    makes: frozenset[str]  # names at the head
    uses: frozenset[str]
    imports: frozenset[str]  # those of `uses` that it imports itself
    acts: bool  # it does more than to make names


def bundled(
    sources: Mapping[str, ast.Module], public: Mapping[str, Iterable[str]], short: Mapping[Target, str] | None = None
) -> dict[str, str]:
    """The sources of bundles and packages by the names under which they are imported.

    `sources` are the modules by theirs, without notes, and are changed here. `public` are those that programs may
    import, with the names for which they may ask there, none for all that do not begin with an underscore.
    """
    modules = {name: _Module(name, tree) for name, tree in sources.items()}
    for module in modules.values():
        module.read_head(modules)
    order = _in_order(modules)
    _share_out(modules, public)
    wanted = [
        (name, each)
        for name in public
        for each in sorted(public[name] or [made for made in modules[name].made if made[0] != "_"])
    ]
    _name_all(modules, order, wanted, short or {})
    kept = _kept(
        [statement for name in order for statement in modules[name].statements(modules)],
        {modules[module].names[name].name for module, name in wanted},
    )
    bundles = {bundle: _written(bundle, kept, modules) for bundle in (BASE, *PHASES)}
    bundles = {bundle: source for bundle, source in bundles.items() if source}
    bundles[BASE] = "import sys\n" * ("import sys\n" not in bundles[BASE]) + bundles[BASE] + HEAD
    for package in sorted({name.rpartition(".")[0] for name in public} | {name for name in OURS if name in public}):
        bundles[package] = _package(package, [name for name in public if modules[name].bundle == BASE])
    return bundles


class _Module:
    """One source: its statements, and the names at its head."""

    def __init__(self, name: str, tree: ast.Module) -> None:
        self.name = name
        self.body = tree.body
        self.bundle = BASE
        self.made: list[str] = []  # names that it defines, each once
        self.makers: dict[str, list[ast.stmt]] = {}  # by such a name: the statements that define it
        self.globals: set[str] = set()  # such names that functions change
        self.imported: dict[str, Target] = {}  # by the name at its head: what is imported from another of ours
        self.firmware: dict[str, ast.stmt] = {}  # by the name at its head: the import of what is not ours
        self.names: dict[str, _Named] = {}  # what it defines is in the bundles

    def read_head(self, modules: Mapping[str, _Module]) -> None:
        """Looks at its imports, and takes them out."""
        rest: list[ast.stmt] = []
        for statement in self.body:
            if isinstance(statement, ast.ImportFrom) and _root(statement.module) in OURS:
                for alias in statement.names:
                    self.imported[alias.asname or alias.name] = _target(statement, alias, modules)
            elif isinstance(statement, ast.Import | ast.ImportFrom):
                for alias in statement.names:
                    one = copy.copy(statement)
                    one.names = [alias]
                    self.firmware[alias.asname or alias.name] = one
            else:
                rest.append(statement)
        self.body = rest
        for statement in rest:
            for name in dict.fromkeys(bound([statement])):
                self.makers.setdefault(name, []).append(statement)
        self.made = list(self.makers)
        self.globals = {
            name for each in rest for node in ast.walk(each) if isinstance(node, ast.Global) for name in node.names
        }

    def needs(self) -> set[str]:
        """The modules whose names it uses while it is loaded."""
        return {module for module, _ in self.imported.values()}

    def statements(self, modules: Mapping[str, _Module]) -> Iterator[_Statement]:
        """Those at its head, with the names of the bundles."""
        for statement in self.body:
            makes = [self.names[name] for name in bound([statement])]
            placed = _Placed(self, modules)
            node = placed.visit(statement)
            calls = [each.func for each in ast.walk(node) if isinstance(each, ast.Call)]
            if isinstance(node, ast.Assign):  # ours may do more than to make a value
                acts = any(
                    isinstance(each, ast.Name) and each.id in placed.uses - self.firmware.keys() for each in calls
                )
            else:
                acts = not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
            yield _Statement(
                self.bundle,
                node,
                frozenset([each.name for each in makes]),
                frozenset(placed.uses),
                frozenset(placed.imports),
                acts,
            )


def _target(statement: ast.ImportFrom, alias: ast.alias, modules: Mapping[str, _Module]) -> Target:
    whole = f"{statement.module}.{alias.name}"
    if whole in modules:
        return whole, ""
    return str(statement.module), alias.name


def _root(name: str | None) -> str:
    return (name or "").partition(".")[0]


# --- which module goes where


def _in_order(modules: Mapping[str, _Module]) -> list[str]:
    """The modules, each behind those that it needs while it is loaded."""
    order: list[str] = []
    open_now: list[str] = []

    def add(name: str) -> None:
        if name in open_now:
            raise Unbundled(f"modules that import each other: {' '.join([*open_now, name])}")
        if name in order:
            return
        if name not in modules:
            raise Unbundled(f"{open_now[-1]} imports {name}, which is not there")
        open_now.append(name)
        for each in sorted(modules[name].needs()):
            add(each)
        order.append(open_now.pop())

    for name in sorted(modules):
        add(name)
    return order


def _share_out(modules: Mapping[str, _Module], public: Iterable[str]) -> None:
    """Says of each module in which bundle it is."""

    def with_needs(names: Iterable[str]) -> set[str]:
        found: set[str] = set()
        waiting = [name for name in names if name in modules]
        while waiting:
            name = waiting.pop()
            if name not in found:
                found.add(name)
                waiting.extend(modules[name].needs())
        return found

    in_base = ONE_OF if ONE_OF - modules.keys() else set()
    phases = {bundle: with_needs(heads) for bundle, heads in PHASES.items() if bundle not in in_base}
    own = {name for bundle in phases for name in PHASES[bundle]}
    counted = [name for names in phases.values() for name in names]
    base = with_needs([name for name in modules if counted.count(name) != 1 or (name in public and name not in own)])
    for bundle, names in phases.items():
        for name in names - base:
            modules[name].bundle = bundle


# --- what each name is called


def _name_all(
    modules: Mapping[str, _Module], order: Sequence[str], wanted: Sequence[Target], short: Mapping[Target, str]
) -> None:
    """Gives each name at the head of a module its name in the bundles, and its value where that takes its place."""
    imports: dict[str, str] = {}
    for module in modules.values():
        for name, statement in module.firmware.items():
            if imports.setdefault(name, ast.unparse(statement)) != ast.unparse(statement):
                raise Unbundled(f"{module.name} has another {name} than {imports[name]!r}")
    taken = {"head", *dir(builtins), *imports}
    hidden = _hidden(modules)
    values = _Values(modules)
    spoken = _spoken(modules)
    # What is public keeps its name.
    for module_name, name in [*wanted, *[(each, made) for each in order for made in modules[each].made]]:
        module = modules[module_name]
        if name in module.names:
            continue
        if name not in module.made:
            raise Unbundled(f"there is no {name} in {module_name}")
        is_short = name not in spoken and (module_name, name) not in wanted
        free = short.get((module_name, name), name) if is_short else name
        while free in taken or (free == name and (module_name, name) in hidden):
            free = f"{free}_{module_name.rpartition('.')[2]}"
        if free != name and (module_name, name) in wanted:
            raise Unbundled(f"{module_name}.{name}: another module has a public name that is the same")
        taken.add(free)
        module.names[name] = _Named(module.bundle, free, values.of(module_name, name))


def _spoken(modules: Mapping[str, _Module]) -> set[str]:
    """What stands in code for something else than a name at the head of a module: another name for that is one more."""
    found: set[str] = set()
    for module in modules.values():
        for node in (node for each in module.body for node in ast.walk(each)):
            if isinstance(node, ast.Attribute) and node.attr[0] != "_":  # those get short names as well
                found.add(node.attr)
            elif isinstance(node, ast.keyword | ast.arg) and node.arg:
                found.add(node.arg)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
    return found


def _hidden(modules: Mapping[str, _Module]) -> set[Target]:
    """What a module imports by another name, because some function in it has a local one of that name."""
    found: set[Target] = set()
    for module in modules.values():
        nodes = [node for each in module.body for node in ast.walk(each)]
        functions = [node for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
        local = {name for function in functions for name in locals_of(function)}
        renamed = {target for name, target in module.imported.items() if name != target[1]}
        for node in nodes:
            if isinstance(node, ast.ImportFrom) and _root(node.module) in OURS:
                renamed |= {_target(node, alias, modules) for alias in node.names if alias.asname}
        found |= {target for target in renamed if target[1] in local}
    return found


class _Values:
    """The values of names that are numbers and short texts."""

    def __init__(self, modules: Mapping[str, _Module]) -> None:
        self._modules = modules
        self._found: dict[Target, ast.Constant | None] = {}

    def of(self, module_name: str, name: str) -> ast.Constant | None:
        """The value of a name at the head of a module; None where it has to be made when the module is loaded."""
        target = module_name, name
        if target not in self._found:
            self._found[target] = None  # where it is made of itself
            self._found[target] = self._look(self._modules[module_name], name)
        return self._found[target]

    def _look(self, module: _Module, name: str) -> ast.Constant | None:
        made = module.makers.get(name, [])
        if len(made) != 1 or not isinstance(made[0], ast.Assign) or name in module.globals:
            return None
        targets, value = made[0].targets, made[0].value
        if len(targets) == 1 and isinstance(targets[0], ast.Tuple) and isinstance(value, ast.Tuple):
            pairs = [pair for pair in zip(targets[0].elts, value.elts, strict=True) if bound_by(pair[0]) == [name]]
            return self._value(pairs[0][1], module)
        return self._value(value, module)

    def _value(self, node: ast.expr, module: _Module) -> ast.Constant | None:
        parts = (ast.Constant, ast.Name, ast.BinOp, ast.UnaryOp, ast.operator, ast.unaryop, ast.expr_context)
        if not all(isinstance(part, parts) for part in ast.walk(node)):
            return None
        known: dict[str, Any] = {}
        for part in ast.walk(node):
            if isinstance(part, ast.Name):
                target = module.imported.get(part.id, (module.name, part.id))
                known_value = self.of(*target) if target[0] in self._modules else None
                if known_value is None:
                    return None
                known[part.id] = known_value.value
        value = eval(compile(ast.Expression(node), module.name, "eval"), {"__builtins__": {}}, known)
        if isinstance(value, str | bytes) and len(value) > LONGEST:
            return None
        return ast.Constant(value)


# --- how a statement looks in a bundle


class _Scope(NamedTuple):
    """The names of a function, comprehension or class; `aliases` are those that it imports from our modules."""

    is_class: bool
    names: set[str]
    aliases: dict[str, Target]


class _Placed(ast.NodeTransformer):
    """A statement at the head of a module with the names that the bundles have for what it means."""

    def __init__(self, module: _Module, modules: Mapping[str, _Module]) -> None:
        self._module = module
        self._modules = modules
        self._scopes: list[_Scope] = []
        self.uses: set[str] = set()
        self.imports: set[str] = set()

    def _meant(self, name: str) -> Target | None:
        """What a name means if that is one of ours; None: it is a local one, or the firmware's."""
        for depth, scope in enumerate(reversed(self._scopes)):
            if name in scope.aliases:
                return scope.aliases[name]
            if name in scope.names and not (scope.is_class and depth):
                return None
        if name in self._module.firmware:
            self.uses.add(name)
            return None
        if name in self._module.imported:
            return self._module.imported[name]
        return (self._module.name, name) if name in self._module.names else None

    def _named(self, target: Target) -> _Named:
        module, name = target
        if not name:
            raise Unbundled(f"{self._module.name} uses the module {module} as a value")
        if name not in self._modules[module].names:
            raise Unbundled(f"{self._module.name} imports {name} from {module}, which has none")
        return self._modules[module].names[name]

    def _place(self, target: Target, context: ast.expr_context) -> ast.expr:
        named = self._named(target)
        if named.value is not None and isinstance(context, ast.Load):
            return ast.Constant(named.value.value)
        for scope in self._scopes:
            if named.name in scope.names and named.name not in scope.aliases and not scope.is_class:
                raise Unbundled(f"{self._module.name}: a local {named.name} hides the one at the head of {target[0]}")
        if isinstance(context, ast.Load):
            self.uses.add(named.name)
        return ast.Name(named.name, context)

    def visit_Name(self, node: ast.Name) -> ast.expr:
        """See the class."""
        target = self._meant(node.id)
        return node if target is None else self._place(target, node.ctx)

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        """A name of a module that was imported as a whole."""
        target = self._meant(node.value.id) if isinstance(node.value, ast.Name) else None
        if target is None or target[1]:
            self.generic_visit(node)
            return node
        named = self._named((target[0], node.attr))
        if named.value is None and named.bundle != self._module.bundle:
            self.uses.add(named.name)
            self.imports.add(named.name)
            return ast.Attribute(node.value, named.name, node.ctx)
        return self._place((target[0], node.attr), node.ctx)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.stmt | list[ast.stmt]:
        """An import where it is needed: only what is in another bundle, and no number or text, is imported."""
        if _root(node.module) not in OURS:
            return node
        found: list[ast.stmt] = []
        for alias in node.names:
            module, name = _target(node, alias, self._modules)
            local = alias.asname or alias.name
            if module not in self._modules:
                found.append(ast.ImportFrom(module, [alias], 0))  # left out for this board
            elif not name:
                if self._modules[module].bundle != self._module.bundle:
                    found.append(ast.Import([ast.alias(self._modules[module].bundle, local)]))
            else:
                named = self._named((module, name))
                if named.value is None and named.bundle != self._module.bundle:
                    as_name = local if local != named.name else None
                    found.append(ast.ImportFrom(named.bundle, [ast.alias(named.name, as_name)], 0))
                    self.uses.add(named.name)
                    self.imports.add(named.name)
        return found or ast.Pass()

    def visit_Global(self, node: ast.Global) -> ast.Global:
        """See the class."""
        node.names = [self._module.names[name].name if name in self._module.names else name for name in node.names]
        return node

    def visit_Import(self, node: ast.Import) -> ast.Import:
        """One that a condition at the head of a module stands before."""
        if not self._scopes:
            for alias in node.names:
                name = self._module.names[alias.asname or alias.name].name
                alias.asname = name if name != alias.name else None
        return node

    def visit_Call(self, node: ast.Call) -> ast.expr:
        """See `forget` at the head of this file."""
        if isinstance(node.func, ast.Name) and self._meant(node.func.id) == _FORGET:
            heads = {heads[0]: bundle for bundle, heads in PHASES.items()}
            names = [str(argument.value) for argument in node.args if isinstance(argument, ast.Constant)]
            node.args = [
                ast.Constant(heads.get(name, name)) for name in names if name in heads or name not in self._modules
            ]
        self.generic_visit(node)
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> ast.stmt:
        """See the class."""
        if not self._scopes:
            node.name = self._module.names[node.name].name
        node.decorator_list = [self.visit(each) for each in node.decorator_list]
        self._visit_defaults(node.args)
        names, aliases = locals_of(node), self._aliases(node)
        self._scopes.append(_Scope(False, names, aliases))
        node.body = self._visit_all(node.body)
        self._scopes.pop()
        return node

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_Lambda(self, node: ast.Lambda) -> ast.expr:
        """See the class."""
        self._visit_defaults(node.args)
        self._scopes.append(_Scope(False, set(arguments_of(node.args)), {}))
        node.body = self.visit(node.body)
        self._scopes.pop()
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.stmt:
        """See the class."""
        if not self._scopes:
            node.name = self._module.names[node.name].name
        node.bases = [self.visit(each) for each in node.bases]
        node.decorator_list = [self.visit(each) for each in node.decorator_list]
        self._scopes.append(_Scope(True, set(bound(node.body)), {}))
        node.body = self._visit_all(node.body)
        self._scopes.pop()
        return node

    def _visit_comprehension(self, node: Any) -> ast.expr:
        first = node.generators[0]
        first.iter = self.visit(first.iter)
        names = {name for each in node.generators for name in bound_by(each.target)}
        self._scopes.append(_Scope(False, names, {}))
        for each in node.generators:
            if each is not first:
                each.iter = self.visit(each.iter)
            each.ifs = [self.visit(test) for test in each.ifs]
        for field in ("elt", "key", "value"):
            if hasattr(node, field):
                setattr(node, field, self.visit(getattr(node, field)))
        self._scopes.pop()
        found: ast.expr = node
        return found

    visit_ListComp = visit_SetComp = visit_DictComp = visit_GeneratorExp = _visit_comprehension

    def _visit_defaults(self, arguments: ast.arguments) -> None:
        arguments.defaults = [self.visit(each) for each in arguments.defaults]
        arguments.kw_defaults = [each if each is None else self.visit(each) for each in arguments.kw_defaults]

    def _visit_all(self, body: list[ast.stmt]) -> list[ast.stmt]:
        found: list[ast.stmt] = []
        for statement in body:
            placed = self.visit(statement)
            found += placed if isinstance(placed, list) else [placed]
        return found

    def _aliases(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> dict[str, Target]:
        """What a function imports from our modules and does not have to import in its bundle."""
        found: dict[str, Target] = {}
        for each in within(node.body):
            if isinstance(each, ast.ImportFrom) and _root(each.module) in OURS:
                for alias in each.names:
                    module, name = _target(each, alias, self._modules)
                    if module in self._modules:
                        named = self._named((module, name)) if name else None
                        here = self._modules[module].bundle == self._module.bundle
                        if here or not name or (named is not None and named.value is not None):
                            found[alias.asname or alias.name] = module, name
        return found


# --- what is left out


class _WithoutCertificates(ast.NodeTransformer):
    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        """Puts what is EMPTY in the place of what asks for it."""
        self.generic_visit(node)
        is_empty = node.attr in EMPTY and isinstance(node.ctx, ast.Load)
        return ast.copy_location(ast.Constant(EMPTY[node.attr]), node) if is_empty else node

    def visit_Call(self, node: ast.Call) -> ast.expr:
        """See SAID."""
        self.generic_visit(node)
        is_said = isinstance(node.func, ast.Name) and node.func.id in SAID
        return ast.copy_location(ast.Constant(SAID[ast.unparse(node.func)]), node) if is_said else node

    def visit_Compare(self, node: ast.Compare) -> ast.expr:
        """No attestation is X509."""
        self.generic_visit(node)
        is_x509 = isinstance(node.comparators[0], ast.Name) and node.comparators[0].id == "X509"
        return ast.copy_location(ast.Constant(isinstance(node.ops[0], ast.NotEq)), node) if is_x509 else node


def without_certificates(tree: ast.Module) -> ast.Module:
    """A module in which EMPTY and SAID hold; what is not reached then drops out as one without notes."""
    found: ast.Module = _WithoutCertificates().visit(tree)
    return found


class _WithoutNotes(ast.NodeTransformer):
    def visit(self, node: ast.AST) -> Any:
        """Drops docstrings, and what stands behind a return; a body that is empty then passes."""
        found = super().visit(node)
        body = getattr(found, "body", None)
        if isinstance(body, list) and not isinstance(found, ast.Module):
            found.body = _until_end([each for each in body if not _is_text(each)]) or [ast.Pass()]
        elif isinstance(found, ast.Module):
            found.body = [each for each in found.body if not _is_text(each)]
        return found

    def visit_arg(self, node: ast.arg) -> ast.arg:
        node.annotation = None
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.returns = None
        is_generator = _yields(node.body)
        self.generic_visit(node)
        if is_generator and not _yields(node.body):
            node.body += [ast.Return(), ast.Expr(ast.Yield())]
        return node

    visit_AsyncFunctionDef = visit_FunctionDef  # type: ignore[assignment]

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST | None:
        if node.value is None:
            return None
        return self.generic_visit(ast.Assign([node.target], node.value, lineno=node.lineno))

    def visit_Assign(self, node: ast.Assign) -> ast.AST | None:
        made = [target.id for target in node.targets if isinstance(target, ast.Name)]
        return None if made and made[0] in FACTS else self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return ast.Constant(FACTS[node.id]) if node.id in FACTS and isinstance(node.ctx, ast.Load) else node

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.AST | None:
        node.names = [alias for alias in node.names if alias.name not in FACTS]
        return node if node.names else None

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node.op, ast.Not) and isinstance(node.operand, ast.Constant):
            return ast.Constant(not node.operand.value)
        return node

    def visit_BoolOp(self, node: ast.BoolOp) -> ast.AST:
        self.generic_visit(node)
        decides = isinstance(node.op, ast.Or)
        first = node.values[0]
        while isinstance(first, ast.Constant) and len(node.values) > 1:
            if bool(first.value) == decides:
                return first
            node.values.pop(0)
            first = node.values[0]
        return node if len(node.values) > 1 else first

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        self.generic_visit(node)
        left, right, is_equal = node.left, node.comparators[0], [type(each) for each in node.ops] == [ast.Eq]
        if isinstance(left, ast.Constant) and isinstance(right, ast.Constant) and is_equal:
            return ast.Constant(left.value == right.value) if type(left.value) is type(right.value) else node
        return node

    def visit_If(self, node: ast.If) -> Any:
        self.generic_visit(node)
        if isinstance(node.test, ast.Constant):
            return node.body if node.test.value else node.orelse
        return node

    def visit_IfExp(self, node: ast.IfExp) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node.test, ast.Constant):
            return node.body if node.test.value else node.orelse
        return node

    def visit_JoinedStr(self, node: ast.JoinedStr) -> ast.AST:
        return self.generic_visit(as_format(node))

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        if ast.unparse(node.func) == "binascii.unhexlify" and isinstance(node.args[0], ast.Constant):
            return ast.copy_location(ast.Constant(bytes.fromhex(str(node.args[0].value))), node)
        return node


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _until_end(body: list[ast.stmt]) -> list[ast.stmt]:
    """Statements without those that are never reached; of a generator a `yield` stays, for it says what it is."""
    for at, statement in enumerate(body):
        if isinstance(statement, ast.Return | ast.Raise):
            return body[: at + 1] + ([ast.Expr(ast.Yield())] if _yields(body[at + 1 :]) else [])
    return body


def _yields(body: Iterable[ast.AST]) -> bool:
    return any(isinstance(node, ast.Yield | ast.YieldFrom) for node in within(body))


def without_notes(tree: ast.Module) -> ast.Module:
    """A module without docstrings, annotations and what CPython alone runs, its f-strings written as `format`."""
    found: ast.Module = _WithoutNotes().visit(tree)
    return found


def as_format(node: ast.JoinedStr) -> ast.expr:
    """An f-string as MicroPython's compiler reads it: a text and `format`."""
    text, values = "", []
    for part in node.values:
        if isinstance(part, ast.Constant):
            text += str(part.value).replace("{", "{{").replace("}", "}}")
        elif isinstance(part, ast.FormattedValue):
            how = "" if part.conversion < 0 else "!" + chr(part.conversion)
            for each in part.format_spec.values if isinstance(part.format_spec, ast.JoinedStr) else ():
                if not isinstance(each, ast.Constant):
                    raise Unbundled(f"a format made of values: {ast.unparse(node)}")
                how += ":" + str(each.value)
            text += "{" + how + "}"
            values.append(part.value)
    return ast.Call(ast.Attribute(ast.Constant(text), "format", ast.Load()), values, [])


def _kept(statements: Sequence[_Statement], wanted: set[str]) -> list[_Statement]:
    """Those that act, or make what is wanted, by a program or by another one that is kept."""
    makers: dict[str, list[_Statement]] = {}
    for statement in statements:
        for name in statement.makes:
            makers.setdefault(name, []).append(statement)
    kept: set[int] = set()
    waiting = [each for each in statements if each.acts] + [each for name in wanted for each in makers.get(name, ())]
    while waiting:
        statement = waiting.pop()
        if id(statement) not in kept:
            kept.add(id(statement))
            waiting.extend(each for name in statement.uses for each in makers.get(name, ()))
    return [each for each in statements if id(each) in kept]


# --- the sources


def _written(bundle: str, kept: Sequence[_Statement], modules: Mapping[str, _Module]) -> str:
    """The source of one bundle; empty where nothing is in it."""
    own = [each for each in kept if each.bundle == bundle]
    if not own:
        return ""
    where = {name: each.bundle for each in kept for name in each.makes}
    used = {name for each in own for name in each.uses - each.imports}
    firmware = {name: node for module in modules.values() for name, node in module.firmware.items()}
    body: list[ast.stmt] = [firmware[name] for name in sorted(used & firmware.keys())]
    for other in sorted({where[name] for name in used if name in where} - {bundle}):
        names = sorted(name for name in used if where.get(name) == other)
        body.append(ast.ImportFrom(other, [ast.alias(name) for name in names], 0))
    body += [each.node for each in own]
    return ast.unparse(ast.fix_missing_locations(ast.Module(body, []))) + "\n"


HEAD = """
def head(package, modules):
    for module in modules.split():
        setattr(sys.modules[package], module, sys.modules[__name__])
        sys.modules[package + "." + module] = sys.modules[__name__]
"""


def _package(package: str, public: Sequence[str]) -> str:
    """The head of a package: its public modules, each of which is the bundle that has them all."""
    children = sorted(name.rpartition(".")[2] for name in public if name.rpartition(".")[0] == package)
    return f"import {BASE}\n{BASE}.head(__name__, {' '.join(children)!r})\n" if children else ""
