"""Properties of a twin: what a hub takes of them, and what a patch makes of them.

A patch is a JSON merge patch (RFC 7396): null deletes. Rules and sizes: IoT Hub developer guide, "Understand and use
device twins", format and size of tags and properties. A file of its own, loaded where a program reports or reads them.
"""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

REPORTED_LIMIT = 32768  # bytes, as the hub counts them: names and values without punctuation and control characters
NAME_LIMIT = 1024  # bytes of UTF-8
STRING_LIMIT = 4096
DEPTH_LIMIT = 10  # objects in one another, below the properties themselves
INTEGER_LIMIT = 4503599627370496  # from minus that to one less


def merged(known: "dict[str, Any]", changes: "dict[str, Any]") -> "dict[str, Any]":
    """`known` with a merge patch applied, as a new object."""
    result = dict(known)
    for name in changes:
        value = changes[name]
        if value is None:
            result.pop(name, None)
        elif isinstance(value, dict):
            inner = result.get(name)
            result[name] = merged(inner if isinstance(inner, dict) else {}, value)
        else:
            result[name] = value
    return result


def flaw_of(patch: "dict[str, Any]", own: str) -> "tuple[int, str]":
    """What a hub would refuse in a patch to the reported properties: its status, and a sentence; (0, "") for nothing.

    `own` is the name under which the agent reports, which is nobody else's. The hub counts what it has as well, so a
    patch without a flaw may still be too large for it.
    """
    if own in patch:
        return 400, f"expected another name than '{own}', under which the agent reports of itself"
    try:
        size = _size_of(patch, 0)
    except ValueError as flaw:
        return 400, str(flaw)
    if size > REPORTED_LIMIT:
        return 413, f"expected at most {REPORTED_LIMIT} bytes of names and values; came {size}"
    return 0, ""


def _size_of(value: "Any", depth: int) -> int:
    """The bytes that the hub counts for a value; ValueError with a sentence where it takes no such value."""
    if isinstance(value, bool) or value is None:
        return 4
    if isinstance(value, str):
        return _length(value, STRING_LIMIT, "a text") - sum([_is_control(character) for character in value])
    if isinstance(value, int):
        if not -INTEGER_LIMIT <= value < INTEGER_LIMIT:
            raise ValueError(f"expected whole numbers from {-INTEGER_LIMIT} to {INTEGER_LIMIT - 1}; came {value}")
        return 8
    if isinstance(value, (list, tuple)):
        return sum([_size_of(each, depth) for each in value])
    if not isinstance(value, dict):
        return 8  # a number
    if depth > DEPTH_LIMIT:
        raise ValueError(f"expected at most {DEPTH_LIMIT} objects in one another")
    size = 0
    for name in value:
        size += _length(name, NAME_LIMIT, "a name") + _size_of(value[name], depth + 1)
        for character in name:
            if character in " .$" or _is_control(character):
                raise ValueError(f"expected names without space, dot, $ and control characters; came {name[:40]!r}")
        if not name:
            raise ValueError("expected a name for each property; came an empty one")
    return size


def _is_control(character: str) -> bool:
    return character < " " or "\x7f" <= character < "\xa0"


def _length(text: str, limit: int, what: str) -> int:
    length = len(text.encode())
    if length > limit:
        raise ValueError(f"expected {what} of at most {limit} bytes; came {length}")
    return length
