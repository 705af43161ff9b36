"""What a hub takes of reported properties, and what a merge patch makes of them."""

from dps_agent.properties import DEPTH_LIMIT, INTEGER_LIMIT, NAME_LIMIT, REPORTED_LIMIT, STRING_LIMIT, flaw_of, merged

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def nested(depth: int) -> "dict[str, Any]":
    """A property within so many objects, as the developer guide counts them."""
    value: dict[str, Any] = {"property": "value"}
    for _ in range(depth):
        value = {"level": value}
    return value


def test_a_patch_merges_objects_replaces_the_rest_and_null_deletes() -> None:
    known = {"a": {"b": 1, "c": 2}, "d": 3, "e": [1]}
    assert merged(known, {"a": {"b": None, "f": {}}, "d": {"g": 1}, "e": [2], "h": None}) == {
        "a": {"c": 2, "f": {}},
        "d": {"g": 1},
        "e": [2],
    }
    assert known == {"a": {"b": 1, "c": 2}, "d": 3, "e": [1]}, "what was known is left alone"


def test_what_a_hub_takes_has_no_flaw() -> None:
    for patch in (
        {},
        {"a": None},
        {"thermostat1": {"__t": "c", "t": {"value": 21.5, "ac": 200, "av": 7, "ad": "done"}}},
        {"n" * NAME_LIMIT: "s" * STRING_LIMIT},
        {"low": -INTEGER_LIMIT, "high": INTEGER_LIMIT - 1, "list": [1, "two", {"three": True}]},
        nested(DEPTH_LIMIT),
        {"größe": "ä", "#": 1, "-": 2},
    ):
        assert flaw_of(patch, "dpsAgent") == (0, ""), patch


def test_what_a_hub_refuses_is_named_in_a_sentence() -> None:
    for patch, status, words in (
        ({"dpsAgent": {"x": 1}}, 400, "'dpsAgent'"),
        ({"a b": 1}, 400, "space"),
        ({"a": {"b.c": 1}}, 400, "dot"),
        ({"a": [{"$c": 1}]}, 400, "$"),
        ({"a\x07": 1}, 400, "control"),
        ({"a\x85": 1}, 400, "control"),
        ({"": 1}, 400, "empty"),
        ({"n" * (NAME_LIMIT + 1): 1}, 400, "1024"),
        ({"a": "ä" * (STRING_LIMIT // 2) + "b"}, 400, "4096"),
        ({"a": INTEGER_LIMIT}, 400, "4503599627370495"),
        ({"a": -INTEGER_LIMIT - 1}, 400, "-4503599627370496"),
        (nested(DEPTH_LIMIT + 1), 400, "10 objects"),
        ({str(number): "s" * 4090 for number in range(9)}, 413, "32768"),
    ):
        found = flaw_of(patch, "dpsAgent")
        assert found[0] == status and words in found[1], (patch, found)


def test_the_size_is_the_hubs_own_names_and_values_without_punctuation() -> None:
    exact = {f"{number:02d}": "s" * 4094 for number in range(8)}
    assert flaw_of(exact, "dpsAgent") == (0, "") and REPORTED_LIMIT == 8 * 4096
    exact["x"] = ""
    assert flaw_of(exact, "dpsAgent")[0] == 413
