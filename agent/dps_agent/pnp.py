"""The forms of IoT Plug and Play: what a device reports, answers and sends beside plain twins and telemetry.

Source: "IoT Plug and Play conventions". Nothing here is needed to be connected; it is loaded by the programs that want
it, on both runtimes, and needs nothing itself. The model id is a setting, `model_id`.
"""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

# What an answer to a writable property says, as HTTP statuses; more of them may be used.
DONE = 200
UNDER_WAY = 202
DEFAULT = 203  # the device's own value, before any was desired
BAD_VALUE = 400
FAILED = 500


def component(name: str, properties: "dict[str, Any]") -> "dict[str, Any]":
    """Properties of one component, to be reported: marked as such."""
    marked: dict[str, Any] = {"__t": "c"}
    marked.update(properties)
    return {name: marked}


def answer(value: "Any", status: int, version: int, description: str = "") -> "dict[str, Any]":
    """The value to report for a writable property: what it is now, and how the desired one fared.

    `version` is the `$version` of the desired properties that this answers; 0 with DEFAULT, where none were.
    """
    answered = {"value": value, "ac": status, "av": version}
    if description:
        answered["ad"] = description
    return answered


def answers(desired: "dict[str, Any]", status: int, description: str = "") -> "dict[str, Any]":
    """The same for all of a document of desired properties at once, those of components included, each with its value.

    It is the patch to report. What was deleted, None, is reported as deleted.
    """
    version: int = desired["$version"]
    patch: dict[str, Any] = {}
    for name in desired:
        value = desired[name]
        if is_component(value):
            inner: dict[str, Any] = {}
            for each in value:
                if each != "__t":
                    inner[each] = _answered(value[each], status, version, description)
            patch.update(component(name, inner))
        elif name != "$version":
            patch[name] = _answered(value, status, version, description)
    return patch


def is_component(value: "Any") -> bool:
    """Whether the value of a property is a component's own properties."""
    return isinstance(value, dict) and value.get("__t") == "c"


def telemetry_of(name: str) -> "dict[str, str]":
    """The message properties of telemetry of a component: JSON in UTF-8, and which component."""
    return {"$.ct": "application/json", "$.ce": "utf-8", "$.sub": name}


def command(method: str) -> "tuple[str, str]":
    """Component and command in the name of a direct method; the component is empty for the device's own."""
    before, star, behind = method.partition("*")
    return (before, behind) if star else ("", method)


def _answered(value: "Any", status: int, version: int, description: str) -> "Any":
    return None if value is None else answer(value, status, version, description)
