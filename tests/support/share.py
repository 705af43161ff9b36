"""Which part of its cases a long shared test takes: where several interpreters run it, each may take its own part.

`DPS_TEST_SHARE=2/3` is the second of three parts. Without it a run takes all, and so does a board.
"""

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import TypeVar

    Case = TypeVar("Case")


def _parsed(text: str) -> "tuple[int, int]":
    number, _, parts = text.partition("/")
    if not number.isdigit() or not parts.isdigit() or not 1 <= int(number) <= int(parts):
        raise ValueError(f"expected DPS_TEST_SHARE as in 2/3, got {text!r}")
    return int(number), int(parts)


NUMBER, PARTS = _parsed((os.getenv("DPS_TEST_SHARE") if hasattr(os, "getenv") else None) or "1/1")


def takes(number: int) -> bool:
    """Whether case `number` belongs to this part; each belongs to one."""
    return number % PARTS == NUMBER - 1


def part_of(cases: "Sequence[Case]") -> "list[Case]":
    """Those of `cases` that belong to this part."""
    found = [cases[place] for place in range(len(cases)) if takes(place)]
    assert found, f"{len(cases)} cases are too few for {PARTS} parts"
    return found
