"""JSON as clients send it: what is taken can be stored and sent again, whatever else they try."""

import json
from typing import Any

MAX_NESTING = 32


def parse_json(content: bytes) -> Any:
    """The value of one JSON text in UTF-8; ValueError for anything else.

    That is also for what Python's parser takes and its writer does not give back: NaN and infinity, halves of
    surrogate pairs, endless nesting.
    """
    try:
        value = json.loads(content.decode(), parse_constant=_no_constant)
        _check_nesting(value, MAX_NESTING)
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except RecursionError:
        raise ValueError(f"nested deeper than {MAX_NESTING}") from None
    return value


def parse_object(content: bytes) -> dict[str, Any]:
    """The object of one JSON text; the message of its ValueError says what the content is not."""
    try:
        value = parse_json(content)
    except ValueError:
        raise ValueError("valid JSON") from None
    if not isinstance(value, dict):
        raise ValueError("a JSON object")
    return value


def _check_nesting(value: Any, left: int) -> None:
    if left < 0:
        raise ValueError(f"nested deeper than {MAX_NESTING}")
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _check_nesting(inner, left - 1)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
