"""Delays: what the service asks for, and our own."""

from dps_agent.backoff import (
    THROTTLED_STEP_S,
    WAITING_LIMIT_S,
    after_request_s,
    around_s,
    exponential_s,
    retry_after_s,
    throttled_s,
)

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


DATE = "Wed, 21 Oct 2026 07:28:00 GMT"


def asked_s(text: "str | None", date: "str | None" = DATE, limit_s: int = 300) -> "int | None":
    """What a Retry-After of that text asks for in an answer of that Date; None: there is no such header."""
    headers = {}
    if text is not None:
        headers["retry-after"] = text
    if date is not None:
        headers["date"] = date
    return retry_after_s(headers, limit_s)


def test_seconds_within_the_limit_are_obeyed() -> None:
    for text, wanted in (("0", 0), ("3", 3), (" 300 ", 300), ("007", 7), ("301", 300), ("9" * 40, 300)):
        assert asked_s(text) == asked_s(text, None) == wanted, text
    assert asked_s("0" * 20 + "7") == 7


def test_a_fraction_of_a_second_is_a_second_more() -> None:
    for text, wanted in (("8.0", 8), ("8.000", 8), ("0.0", 0), ("1.5", 2), ("8.01", 9), ("300.5", 300)):
        assert asked_s(text) == wanted, text


def test_a_date_is_as_many_seconds_as_it_lies_behind_the_date_of_the_same_answer() -> None:
    for text, wanted in (
        ("Wed, 21 Oct 2026 07:28:00 GMT", 0),
        ("Wed, 21 Oct 2026 07:28:01 GMT", 1),
        (" Wed, 21 Oct 2026 07:29:10 GMT ", 70),
        ("Wed, 21 Oct 2026 07:33:00 GMT", 300),
        ("Wed, 21 Oct 2026 07:33:01 GMT", 300),
        ("Thu, 31 Dec 9999 23:59:59 GMT", 300),
        ("Wed, 21 Oct 2026 07:27:59 GMT", 0),
        ("Thu, 01 Jan 1970 00:00:00 GMT", 0),
    ):
        assert asked_s(text) == wanted, text
    assert asked_s("Thu, 22 Oct 2026 07:27:59 GMT", DATE, 86400) == 86399
    assert asked_s("Thu, 01 Jan 1970 00:00:07 GMT", "Thu, 01 Jan 1970 00:00:00 GMT") == 7, "whatever time it is"


def test_a_date_without_a_readable_date_beside_it_is_not_obeyed() -> None:
    for date in (None, "", "soon", "Wed, 21 Oct 2026 07:28:00", "Wed, 21 Oct 2026 07:28:00 CET", "1792567680"):
        assert asked_s("Wed, 21 Oct 2026 07:28:30 GMT", date) is None, date


def test_anything_else_is_not_obeyed() -> None:
    for text in (
        None,
        "",
        "-1",
        "+1",
        "8.",
        ".5",
        ".",
        "1.2.3",
        "8,0",
        "1e2",
        "3, 3",
        "soon",
        "\u0663",
        "Wed, 32 Oct 2026 07:28:00 GMT",
        "Wed, 21 Oct 2026 07:28:00 CET",
        "2026-10-21T07:28:00Z",
    ):
        assert asked_s(text) is None, repr(text)


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


def test_after_refusals_for_want_of_quota_the_delay_grows_by_a_minute_and_is_never_less_than_asked() -> None:
    for refusals, asked_s, longest_s in (
        (1, 0, THROTTLED_STEP_S),
        (2, 0, 2 * THROTTLED_STEP_S),
        (30, 0, 30 * THROTTLED_STEP_S),
        (32, 0, 36 * THROTTLED_STEP_S),
        (40, 0, WAITING_LIMIT_S),
        (10**9, 0, WAITING_LIMIT_S),
        (1, 5, THROTTLED_STEP_S),
        (1, 60, 120),
        (2, 60, 120),
        (3, 60, 3 * THROTTLED_STEP_S),
        (1, 86400, 2 * 86400),
        (10**9, 86400, 2 * 86400),
    ):
        shortest_s = answered(throttled_s(refusals, asked_s), 0.0)
        assert shortest_s == longest_s / 2 >= asked_s, (refusals, asked_s)
        assert 0.99 * longest_s < answered(throttled_s(refusals, asked_s), 0.999) < longest_s, (refusals, asked_s)
