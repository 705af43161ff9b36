"""What was measured, as a table and as JSON: rows of numbers, ratios between them, and what was counted."""

from __future__ import annotations

import json
import sys

_UNITS = {"Ms": "ms", "MiB": "MiB", "Percent": "%", "KiB": "KiB", "PerS": "/s"}


class Report:
    """One measurement."""

    def __init__(self, what: str, how: str) -> None:
        self.what = what
        self.how = how
        self.rows: dict[str, dict[str, float]] = {}
        self.ratios: dict[str, float] = {}
        self.counts: dict[str, float] = {}
        self.absent: list[str] = []
        self.over: list[str] = []  # what is more than it may be, a sentence each

    def row(self, name: str, numbers: dict[str, float]) -> None:
        """What one program took; the names of the numbers end in their unit."""
        self.rows[name] = {key: round(value, 3) for key, value in numbers.items()}

    def ratio(self, name: str, ours: float, theirs: float) -> None:
        """One number beside another."""
        self.ratios[name] = round(ours / theirs, 3)

    def say(self, name: str, count: float) -> None:
        """Something that was counted."""
        self.counts[name] = round(count, 3)

    def text(self) -> str:
        """As a table, a line for each row, with the unit behind each number."""
        columns = list(dict.fromkeys(key for row in self.rows.values() for key in row))
        title = f"{self.what}, {self.how}, Python {sys.version.split()[0]}"
        width = max(len(name) for name in (title, *self.rows, *self.ratios, *self.counts)) + 2
        lines = [f"{title:<{width}}" + "".join(f"{key:>{_wide(key)}}" for key in columns)]
        for name, row in self.rows.items():
            shown = [f"{row[key]:.2f}{_unit(key)}" if key in row else "" for key in columns]
            lines.append(
                f"{name:<{width}}" + "".join(f"{text:>{_wide(key)}}" for key, text in zip(columns, shown, strict=True))
            )
        lines += [f"{name:<{width}}{value:>12.2f}" for name, value in self.ratios.items()]
        lines += [f"{name:<{width}}{value:>12g}" for name, value in self.counts.items()]
        return "\n".join(lines + [f"not measured: {name}" for name in self.absent])

    def document(self) -> str:
        """The same as one JSON document."""
        named = {"schema": f"dps-bench-{self.what}/2", "how": self.how, "python": sys.version.split()[0]}
        found = {"rows": self.rows, "ratios": self.ratios, "counts": self.counts, "absent": self.absent}
        return json.dumps({**named, **found, "over": self.over}, indent=2)


def _wide(key: str) -> int:
    return max(12, len(key) + 2)


def _unit(key: str) -> str:
    return next((f" {unit}" for ending, unit in _UNITS.items() if key.endswith(ending)), "")
