"""A device twin: desired and reported properties, their versions, and the rules for a patch.

Source: IoT Hub developer guide, "Understand and use device twins", with its format and size of properties. A patch is
an RFC 7396 merge: null deletes.
"""

import unicodedata
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from dps_emulator.json_text import parse_json

MAX_SECTION_BYTES = 32 * 1024  # so many of desired and of reported properties, each: names and values
MAX_TAGS_BYTES = 8 * 1024
MAX_DEPTH = 10  # objects in one another, below the section itself
MAX_NAME_BYTES = 1024
MAX_STRING_BYTES = 4096
MAX_INTEGER = 4503599627370495
_FORBIDDEN_IN_NAMES = frozenset(" .$")

Section = Literal["desired", "reported", "tags"]


class PatchError(ValueError):
    """A patch that the hub does not take; `status` is the answer's."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Twin:
    """Both sections; versions start at 1 and grow with each patch."""

    desired: dict[str, Any] = field(default_factory=dict)
    reported: dict[str, Any] = field(default_factory=dict)
    desired_version: int = 1
    reported_version: int = 1
    tags: dict[str, Any] = field(default_factory=dict)  # a back end's own, which no device sees

    @property
    def version(self) -> int:
        """Grows with each change of properties."""
        return self.desired_version + self.reported_version

    def document(self) -> dict[str, Any]:
        """What a device gets that asks for its twin."""
        return {
            "desired": {**self.desired, "$version": self.desired_version},
            "reported": {**self.reported, "$version": self.reported_version},
        }

    def patched(self, section: Section, changes: dict[str, Any]) -> "Twin":
        """The twin with `changes` merged into a section, whose version has grown; raises PatchError."""
        _check(changes, 0)
        merged = merge(getattr(self, section), changes)
        limit_bytes = MAX_TAGS_BYTES if section == "tags" else MAX_SECTION_BYTES
        if _size(merged) > limit_bytes:
            what = section if section == "tags" else f"{section} properties"
            raise PatchError(413, f"{what} would be larger than {limit_bytes} bytes")
        if section == "tags":
            return replace(self, tags=merged)
        version = getattr(self, f"{section}_version") + 1
        return replace(self, **{section: merged, f"{section}_version": version})


def parse_patch(content: bytes) -> dict[str, Any]:
    """A patch as it travels; raises PatchError."""
    try:
        changes = parse_json(content)
    except ValueError as error:
        raise PatchError(400, f"the patch is not valid JSON: {error}") from None
    if not isinstance(changes, dict):
        raise PatchError(400, "the patch is not a JSON object")
    return changes


def merge(target: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`target` with `changes` merged into it, as a new object."""
    merged = dict(target)
    for name, value in changes.items():
        if value is None:
            merged.pop(name, None)
        elif isinstance(value, dict):
            below = merged.get(name)
            merged[name] = merge(below if isinstance(below, dict) else {}, value)
        else:
            merged[name] = value
    return merged


def _check(value: Any, depth: int) -> None:
    if isinstance(value, dict):
        if depth > MAX_DEPTH:
            raise PatchError(400, f"the patch is nested deeper than {MAX_DEPTH}")
        for name, inner in value.items():
            bad = _FORBIDDEN_IN_NAMES.intersection(name) or any(unicodedata.category(each) == "Cc" for each in name)
            if not name or bad or len(name.encode(errors="replace")) > MAX_NAME_BYTES:
                text = "a property's name is empty, too long, or has a control character, space, . or $"
                raise PatchError(400, text)
            _check(inner, depth + 1)
    elif isinstance(value, list):
        for each in value:
            _check(each, depth)
    elif isinstance(value, str) and len(value.encode(errors="replace")) > MAX_STRING_BYTES:
        raise PatchError(400, f"a text is longer than {MAX_STRING_BYTES} bytes")
    elif type(value) is int and not -MAX_INTEGER - 1 <= value <= MAX_INTEGER:
        raise PatchError(400, f"a whole number is beyond {MAX_INTEGER}")


def _size(value: Any) -> int:
    """What the hub counts: names and texts without control characters, 8 for a number, 4 for true and false."""
    match value:
        case dict():
            return sum(_size(name) + _size(inner) for name, inner in value.items())
        case list():
            return sum(map(_size, value))
        case str():
            return len("".join(each for each in value if unicodedata.category(each) != "Cc").encode(errors="replace"))
        case bool():
            return 4
    return 8
