"""What the hub sends, held for programs: bounded in number and bytes, whatever the hub does."""

import json

import pytest

from dps_agent.host.local import events as event_module
from dps_agent.host.local.events import Events
from dps_agent.hub_effects import CloudMessage, Desired, MethodCall
from dps_agent.session import CALL_LIMIT, MESSAGE_LIMIT


def shown(chunk: bytes) -> dict[str, object]:
    size, _, rest = chunk.partition(b"\r\n")
    line = rest[: int(size, 16)]
    assert rest == line + b"\r\n" and line.endswith(b"\n") and line.count(b"\n") == 1
    found: dict[str, object] = json.loads(line)
    return found


def test_messages_and_calls_are_few_and_what_is_done_makes_room() -> None:
    events = Events()
    assert [events.take(CloudMessage(number, {}, b"x"), 0.0) for number in range(1, 60)].count(True) == MESSAGE_LIMIT
    assert [events.take(MethodCall(number, "m", b""), 0.0) for number in range(60, 90)].count(True) == CALL_LIMIT
    events.end_message(1)
    events.end_call(60)
    assert events.take(CloudMessage(91, {}, b"x"), 0.0) and events.take(MethodCall(92, "m", b""), 0.0)
    events.expire(1e9)
    assert [events.take(MethodCall(number, "m", b""), 0.0) for number in range(100, 130)].count(True) == CALL_LIMIT


@pytest.mark.parametrize("payload", [b"x" * 262144, b"\0" * 262144, b"\xff" * 262144, b"[" + b"1," * 9999 + b"1]"])
def test_the_bytes_that_are_held_are_bounded_as_they_are_sent(payload: bytes) -> None:
    events = Events()
    for number in range(1, 40):
        events.take(CloudMessage(number, {}, payload), 0.0)
        events.take(MethodCall(number + 100, "m", payload), 0.0)
    held = sum(map(len, events.backlog()))
    assert event_module.HELD_LIMIT / 4 < held <= event_module.HELD_LIMIT
    events.forget()
    assert events.backlog() == [] and events.take(CloudMessage(200, {}, payload), 0.0)


def test_patches_that_nobody_has_looked_at_are_bounded_and_come_again_whole() -> None:
    events = Events()
    taken = [
        events.take(Desired(number, b'{"k%d": "%s"}' % (number, b"x" * 60000), False), 0.0) for number in range(99)
    ]
    assert True in taken and False in taken
    assert sum(map(len, events.news())) < event_module.NEWS_LIMIT + 2 * event_module.DESIRED_LIMIT
    assert events.take(Desired(100, b"{}", True), 0.0), "they were looked at"
    few = [events.take(Desired(number, b"{}", False), 0.0) for number in range(999)]
    assert few.count(True) <= MESSAGE_LIMIT + CALL_LIMIT + 1


def test_desired_properties_that_are_too_large_are_said_to_be_until_they_come_whole() -> None:
    events = Events()
    events.take(Desired(1, b'{"a": "%s"}' % (b"x" * 100000), True), 0.0)
    events.take(Desired(2, b'{"b": "%s"}' % (b"x" * 100000), False), 0.0)
    assert [shown(chunk).get("tooLarge") for chunk in events.news()] == [None, True]
    too_large = {"event": "desired", "version": 2, "tooLarge": True}
    assert [shown(chunk) for chunk in events.backlog()] == [too_large]
    events.take(Desired(3, b'{"a": null}', False), 0.0)
    assert [shown(chunk) for chunk in events.backlog()] == [{**too_large, "version": 3}]
    events.take(Desired(4, None, True), 0.0)
    assert [shown(chunk).get("tooLarge") for chunk in events.news()] == [True, True]
    events.take(Desired(5, b'{"c": 1}', True), 0.0)
    assert shown(events.backlog()[0])["whole"] == {"c": 1}
