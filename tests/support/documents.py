"""The documents for users as the tests see them: their fenced blocks, and the commands in these.

What follows the language in a fence's first line says what the block is; readers do not see it:

    ```sh run                 commands, run in the order of the document in one folder
    ```python run             a program, run in the same folder
    ```toml file=desk.toml    a file, written into that folder
    ```text output            what the last commands or program print, … standing for anything
    ```sh shown=REASON        commands that are not run, for one of REASONS
    ```text shown=excerpt     no command: a form, a line, a diagram
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

CHECKOUT = Path(__file__).parents[2]
CODES = CHECKOUT / "docs" / "codes.md"
OPERATORS = CHECKOUT / "docs" / "operators.md"
DOCUMENTS = sorted([CHECKOUT / "README.md", CHECKOUT / "micropython" / "README.md", *(CHECKOUT / "docs").glob("*.md")])
REASONS = {
    "root": "changes the machine: packages, users, systemd; the tests of the package do that in machines of their own",
    "azure": "needs an Azure subscription",
    "board": "needs a microcontroller, or its toolchain",
    "excerpt": "no command",
    "long": "takes minutes, or makes an environment of its own",
}
_FENCE = re.compile(r"^(`{3,})(.*)$")


class Block(NamedTuple):
    """One fenced block: where it begins, what its first line says, and its text."""

    document: Path
    line: int  # of the fence that opens it
    language: str
    kind: str  # run, file, output, shown, or what stands there instead
    detail: str  # behind "="
    text: str

    @property
    def place(self) -> str:
        """`docs/ci.md:12`."""
        return f"{name_of(self.document)}:{self.line}"


def name_of(document: Path) -> str:
    """`docs/ci.md`."""
    return str(document.relative_to(CHECKOUT))


def blocks_of(document: Path) -> list[Block]:
    """All fenced blocks of a document; ValueError for one that does not end."""
    found: list[Block] = []
    fence, opened, info = "", 0, ""
    text: list[str] = []
    for number, line in enumerate(document.read_text().splitlines(), 1):
        match = _FENCE.match(line)
        if not fence and match:
            fence, opened, info, text = match[1], number, match[2].strip(), []
        elif fence and line.strip() == fence:
            language, _, rest = info.partition(" ")
            kind, _, detail = rest.partition("=")
            found.append(Block(document, opened, language, kind, detail, "\n".join(text) + "\n"))
            fence = ""
        elif fence:
            text.append(line)
    if fence:
        raise ValueError(f"{document.name}:{opened}: the block does not end")
    return found


def prose_of(document: Path) -> str:
    """The document without its fenced blocks."""
    kept: list[str] = []
    fence = ""
    for line in document.read_text().splitlines():
        match = _FENCE.match(line)
        if not fence and match:
            fence = match[1]
        elif fence:
            fence = "" if line.strip() == fence else fence
        else:
            kept.append(line)
    return "\n".join(kept)


def commands_of(block: Block) -> list[str]:
    """The command lines of a block of shell: lines that go on behind a backslash joined, comments left out."""
    joined = re.sub(r"\\\n\s*", "", block.text)
    lines = (line.strip() for line in joined.splitlines())
    return [re.sub(r"\s+#\s.*$", "", line) for line in lines if line and not line.startswith("#")]


def table_under(document: Path, title: str) -> list[list[str]]:
    """The rows of the first table behind the heading `title`, without its head; cells without spaces round them."""
    _, _, behind = document.read_text().partition(f" {title}\n")
    rows: list[list[str]] = []
    for line in behind.splitlines():
        if line.startswith("|"):
            rows.append([cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
        elif rows or line.startswith("#"):
            break
    return rows[2:]
