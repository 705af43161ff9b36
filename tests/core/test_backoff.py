"""Delays: what the service asks for, and our own."""

from dps_agent.backoff import after_request_s, around_s, exponential_s, retry_after_s

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def answered(generator: "Any", random: float) -> float:
    try:
        next(generator)
        generator.send(random)
    except StopIteration as stop:
        return stop.value  # type: ignore[no-any-return]
    raise AssertionError("more than one random number for one delay")


def test_whole_seconds_within_the_limit_are_obeyed() -> None:
    for text, wanted in (("0", 0), ("3", 3), (" 300 ", 300), ("007", 7), ("301", 300), ("9" * 40, 300)):
        assert retry_after_s(text, 300) == wanted, text


def test_anything_else_is_not_obeyed() -> None:
    for text in (
        None,
        "",
        "-1",
        "+1",
        "1.5",
        "1e2",
        "soon",
        "\u0663",
        "Wed, 21 Oct 2026 07:28:00 GMT",
    ):
        assert retry_after_s(text, 300) is None, repr(text)


def test_a_requested_delay_is_never_shortened_and_a_little_spread() -> None:
    for seconds in (1, 3, 300, 86400):
        for random in (0.0, 0.5, 0.999):
            delay_s = answered(after_request_s(seconds), random)
            assert seconds <= delay_s <= seconds + max(0.2, seconds / 10), f"seconds={seconds} random={random}"
    assert answered(after_request_s(0), 0.9) == 0


def test_our_own_delay_doubles_up_to_its_limit() -> None:
    for failures, ceiling in ((1, 1), (2, 2), (3, 4), (6, 32), (7, 60), (40, 60), (10**9, 60)):
        assert answered(exponential_s(failures, 1, 60), 0.0) == ceiling / 2, failures
        assert ceiling * 0.9 < answered(exponential_s(failures, 1, 60), 0.99) <= ceiling, failures


def test_refused_devices_do_not_come_back_together() -> None:
    assert answered(around_s(3600), 0.0) == 1800 and 5300 < answered(around_s(3600), 0.99) < 5400
