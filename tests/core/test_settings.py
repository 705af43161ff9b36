"""The grammar of a registration id: Runtime Registration API, 2021-10-01."""

from dps_agent.settings import check_registration_id
from dps_hal.errors import AskOperator
from support.claims import assert_refused


def test_ids_of_the_grammar_are_taken() -> None:
    for text in (
        "press-",
        "a--",
        "a",
        "7",
        "A",
        "press-07",
        "Press:07.line_4-b",
        "a" * 128,
        "a" + ":._-" * 31 + "b",
        "0" * 128,
    ):
        check_registration_id(text)


def test_ids_outside_the_grammar_are_refused_with_the_reason() -> None:
    for text, reason in (
        ("", "is empty"),
        ("a" * 129, "has 129 characters"),
        ("-a", "'-' at its start"),
        ("-", "'-' at its start"),
        ("a:", "':' at its end"),
        ("a.", "'.' at its end"),
        (":", "':' at its start"),
        (".a", "'.' at its start"),
        ("a_", "'_' at its end"),
        ("a b", "' ' at position 2"),
        ("a/b", "'/' at position 2"),
        ("a\u00e9b", "at position 2"),
        ("\u0660", "at position 1"),
        ("a\nb", "at position 2"),
        ("\u212a", "at position 1"),
    ):
        error = assert_refused(lambda: check_registration_id(text), AskOperator, "config.invalid", f"id={text!r}")
        assert reason in error.message and "registration_id" in error.message, error.message
