"""A device twin: desired and reported properties, their versions, and the rules for a patch.

Source: IoT Hub developer guide, "Understand and use device twins". A patch is an RFC 7396 merge: null deletes.
"""

import json
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from dps_emulator.json_text import parse_json

MAX_SECTION_BYTES = 32 * 1024  # so many of desired and of reported properties, each
MAX_DEPTH = 10
MAX_NAME_BYTES = 1024
_FORBIDDEN_IN_NAMES = frozenset(" .$")

Section = Literal["desired", "reported"]


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

    def document(self) -> dict[str, Any]:
        """What a device gets that asks for its twin."""
        return {
            "desired": {**self.desired, "$version": self.desired_version},
            "reported": {**self.reported, "$version": self.reported_version},
        }

    def patched(self, section: Section, changes: dict[str, Any]) -> "Twin":
        """The twin with `changes` merged into a section, whose version has grown; raises PatchError."""
        _check_names(changes, 1)
        merged = merge(getattr(self, section), changes)
        if len(json.dumps(merged, separators=(",", ":"), ensure_ascii=False).encode()) > MAX_SECTION_BYTES:
            raise PatchError(413, f"{section} properties would be larger than {MAX_SECTION_BYTES} bytes")
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


def _check_names(changes: dict[str, Any], depth: int) -> None:
    if depth > MAX_DEPTH:
        raise PatchError(400, f"the patch is nested deeper than {MAX_DEPTH}")
    for name, value in changes.items():
        bad = _FORBIDDEN_IN_NAMES.intersection(name) or any(ord(character) < 32 for character in name)
        if not name or bad or len(name.encode(errors="replace")) > MAX_NAME_BYTES:
            raise PatchError(400, "a property's name is empty, too long, or has a control character, space, . or $")
        if isinstance(value, dict):
            _check_names(value, depth + 1)
