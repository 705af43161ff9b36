"""The plainest TOML, in which most settings files are written: tables, comments, text, whole numbers, true and false.

`tomllib` brings typing, datetime and its expressions, a quarter of what a start of `status` costs. Whatever else stands
in a file, mistakes included, is not read here but left to `tomllib`; what is read here it reads in the same way, TOML
1.0 (toml.io).
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_DIGITS = 18  # of a number: any such fits into the 64 bits that TOML promises
_WORDS = {"true": True, "false": False}


def read_plain(text: str) -> dict[str, Any] | None:
    """What `tomllib.loads` makes of `text`; None where there is anything in it that is not plain."""
    if not text.replace("\n", "").replace("\t", "").isprintable():
        return None
    document: dict[str, Any] = {}
    table = document
    value: str | int | dict[str, Any] | None
    for written in text.split("\n"):
        line = written.strip(" \t")
        if line[:1] in ("", "#"):
            continue
        if line[0] == "[":
            name, parent = line[1:-1], document
            if line[-1] != "]":
                return None
            value = table = {}
        else:
            name, equals, rest = line.partition("=")
            name, parent = name.rstrip(" \t"), table
            value = _value(rest.lstrip(" \t")) if equals else None
        if value is None or name in parent or not _is_bare(name):
            return None
        parent[name] = value
    return document


def _is_bare(key: str) -> bool:
    return key.isascii() and key.replace("_", "a").replace("-", "a").isalnum()


def _value(text: str) -> str | int | None:
    """Text without escapes, a whole number, true or false, before a comment; None for any other value."""
    if text[:1] == '"':
        content, quote, rest = text[1:].partition('"')
        plain = quote and "\\" not in content and rest.lstrip(" \t")[:1] in ("", "#")
        return content if plain else None
    text = text.partition("#")[0].rstrip(" \t")
    if not text.isascii() or len(text) > _DIGITS:
        return None
    if text.isdecimal():
        return int(text) if text[0] != "0" or text == "0" else None
    if text[:2] == "0x" and text[2:].isalnum() and not text[2:].lower().strip("0123456789abcdef"):
        return int(text, 16)
    return _WORDS.get(text)
