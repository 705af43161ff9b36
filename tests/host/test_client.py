"""`dps_agent.client`: what it asks, what it makes of the answers, and that both of its doors do the same."""

import asyncio
import contextlib
import itertools
import json
import logging
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dps_agent.client import (
    AgentError,
    AsyncClient,
    MaybeDone,
    Message,
    MethodAnswer,
    NotDone,
    Refused,
    Spool,
    SpoolFailed,
    Unreachable,
    acknowledged,
    spool,
    steps,
    values,
)
from dps_agent.client.values import BATCH_LIMIT, telemetry
from support.programs.client_doors import PATIENCE_S, opened
from support.programs.scripted_service import CUT, SILENT, Asked, ScriptedService, answer, error, stream
from support.programs.tools import until

ACCEPTED = answer(200, {"accepted": True})
DOORS = ("threads", "asyncio")

Answers = Callable[[Asked], bytes]


def in_turn(*answers: bytes) -> Answers:
    """One answer after the other; the last one again and again."""
    left = list(answers)
    return lambda _asked: left.pop(0) if len(left) > 1 else left[0]


class Scene:
    """A door, and services at the socket that it knows."""

    def __init__(self, door: str, folder: Path) -> None:
        self.door = door
        self.path = folder / "api.sock"
        self._stack = contextlib.ExitStack()

    def service(self, answers: Answers) -> ScriptedService:
        return self._stack.enter_context(ScriptedService(self.path, answers))

    def client(self, **options: Any) -> Any:
        return self._stack.enter_context(opened(self.door, self.path, **options))

    def end(self) -> None:
        self._stack.close()


@pytest.fixture(params=DOORS)
def scene(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Scene]:
    found = Scene(request.param, tmp_path)
    yield found
    found.end()


# What is asked.


def test_json_is_marked_as_such_and_bytes_and_text_go_out_as_they_are(scene: Scene) -> None:
    service, client = scene.service(in_turn(ACCEPTED)), scene.client()
    client.send({"t": 21.5, "ort": "Köln"}, {"line": "3 & 4"})
    client.send(b"\x00\xff", {"$.ct": "application/octet-stream"})
    client.send("as it is", qos=0)
    asked = [(found.line, found.body) for found in service.asked]
    assert asked == [
        (
            "POST /telemetry?%24.ct=application%2Fjson&%24.ce=utf-8&line=3%20%26%204",
            '{"t":21.5,"ort":"Köln"}'.encode(),
        ),
        ("POST /telemetry?%24.ct=application%2Foctet-stream", b"\x00\xff"),
        ("POST /telemetry?%24qos=0", b"as it is"),
    ]
    assert service.connections == 1, "one connection is kept"


@pytest.mark.parametrize("payload", [float("nan"), object(), {"a": {1, 2}}, "\ud800"])
def test_what_json_cannot_say_is_refused_before_anything_is_sent(payload: Any, scene: Scene) -> None:
    service, client = scene.service(in_turn(ACCEPTED)), scene.client()
    with pytest.raises(Refused) as refused:
        client.send(payload)
    assert refused.value.code == "agent.usage" and service.asked == []


def test_properties_that_are_no_text_and_another_qos_are_refused() -> None:
    for properties, qos in (({"line": 3}, 1), ({"": "x"}, 1), ({}, 2), ({"a": "\ud800"}, 1)):
        with pytest.raises(Refused, match="expected"):
            telemetry(b"", properties, qos, False)  # type: ignore[arg-type]


def test_many_messages_go_out_in_as_few_requests_as_they_fit_into(scene: Scene) -> None:
    def accept(asked: Asked) -> bytes:
        count = len(asked.body.splitlines())
        return answer(200, {"accepted": count, "of": count})

    service, client = scene.service(accept), scene.client()
    payload = {"text": "x" * 1000}
    assert client.send_many([payload] * 600, {"line": "3"}) == 600
    assert len(service.asked) == 3 and all(len(asked.body) <= BATCH_LIMIT for asked in service.asked)
    assert {asked.headers["content-type"] for asked in service.asked} == {"application/x-ndjson"}
    lines = b"".join(asked.body for asked in service.asked).splitlines()
    assert [json.loads(line) for line in lines] == [payload] * 600
    assert client.send_many([]) == 0 and len(service.asked) == 3


def some_of(accepted: int, of: int, code: str) -> bytes:
    failure = {"code": code, "message": f"said {code}", "retryAfterS": 0}
    return answer(200, {"accepted": accepted, "of": of, "error": failure})


def test_what_is_left_of_many_messages_is_sent_again(scene: Scene) -> None:
    answers = (some_of(2, 5, "agent.not_sent"), error(503, "agent.not_sent", 0), answer(200, {"accepted": 3, "of": 3}))
    service = scene.service(in_turn(*answers))
    assert scene.client().send_many(range(5)) == 5
    assert [asked.body for asked in service.asked] == [b"0\n1\n2\n3\n4\n", b"2\n3\n4\n", b"2\n3\n4\n"]


def test_an_error_amid_many_messages_says_how_many_the_hub_has(scene: Scene) -> None:
    service = scene.service(in_turn(some_of(2, 5, "agent.unacknowledged"), answer(200, {"accepted": 5, "of": 5})))
    client = scene.client()
    with pytest.raises(MaybeDone) as raised:
        client.send_many(range(5))
    assert raised.value.accepted == 2 and len(service.asked) == 1
    scene.end()
    service = scene.service(in_turn(some_of(2, 5, "agent.unacknowledged"), answer(200, {"accepted": 3, "of": 3})))
    assert scene.client().send_many(range(5), at_least_once=True) == 5


def test_reports_and_the_twin(scene: Scene) -> None:
    twin = {"desired": {"a": 1, "$version": 4}, "reported": {"$version": 8}}
    service, client = scene.service(in_turn(answer(200, {"version": 9}), answer(200, twin))), scene.client()
    assert client.report({"door": "open", "old": None}) == 9
    found = client.twin()
    assert (found.desired, found.reported) == (twin["desired"], twin["reported"])
    assert service.lines() == ["PATCH /twin/reported", "GET /twin"]
    assert service.asked[0].body == b'{"door":"open","old":null}'
    assert acknowledged(3, 4, 203, "why") == {"value": 3, "ac": 203, "av": 4, "ad": "why"}


# What becomes of answers.


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (400, "agent.usage", Refused),
        (403, "agent.denied", Refused),
        (404, "record.absent", Refused),
        (413, "agent.too_large", Refused),
        (501, "hub.no_twin", Refused),
        (408, "agent.usage", NotDone),
        (429, "agent.busy", NotDone),
        (503, "agent.not_sent", NotDone),
        (503, "agent.not_connected", NotDone),
        (503, "agent.unacknowledged", MaybeDone),
        (500, "agent.bug", MaybeDone),
        (504, "agent.out_of_time", MaybeDone),
    ],
)
def test_each_answer_is_an_error_of_one_kind(status: int, code: str, kind: type[AgentError], tmp_path: Path) -> None:
    service = Scene("threads", tmp_path)
    service.service(in_turn(error(status, code, 3600)))
    with pytest.raises(AgentError) as raised:
        service.client().send(b"")
    service.end()
    assert type(raised.value) is kind and raised.value.code == code and raised.value.message == f"said {code}"
    assert raised.value.retry_after_s == 3600 and code in str(raised.value)


@pytest.mark.parametrize(
    "said", [b"HTTP/1.1 503 No\r\nContent-Length: 2\r\n\r\n[]", b"HTTP/1.1 503 No\r\nContent-Length: 0\r\n\r\n"]
)
def test_an_error_without_a_reason_is_still_one_of_its_kind(said: bytes, tmp_path: Path) -> None:
    scene = Scene("threads", tmp_path)
    scene.service(in_turn(said))
    with pytest.raises(NotDone, match="no reason"):
        scene.client().send(b"", timeout_s=0.2)
    scene.end()


def test_what_was_not_done_is_asked_again_no_sooner_than_the_service_wants(scene: Scene) -> None:
    service = scene.service(in_turn(error(503, "agent.not_connected", 1), error(429, "agent.busy", 1), ACCEPTED))
    scene.client().send(b"1")
    times = [asked.at_s for asked in service.asked]
    assert len(times) == 3 and all(after - before >= 1 for before, after in itertools.pairwise(times))


def test_a_wait_that_the_caller_has_no_time_for_is_an_error_at_once(scene: Scene) -> None:
    service, client = scene.service(in_turn(error(503, "agent.not_connected", 3600))), scene.client()
    began_s = time.monotonic()
    with pytest.raises(NotDone) as raised:
        client.send(b"1", timeout_s=600)
    assert raised.value.retry_after_s == 3600 and len(service.asked) == 1
    assert time.monotonic() - began_s < 300


def test_a_request_that_the_service_did_not_read_is_sent_again(scene: Scene) -> None:
    service, client = scene.service(in_turn(ACCEPTED)), scene.client()
    service.abort_next = 2
    client.send(b"1")
    assert [asked.body for asked in service.asked] == [b"1"]


def test_a_service_that_has_no_room_is_heard_although_it_reads_nothing(scene: Scene) -> None:
    service, client = scene.service(in_turn(ACCEPTED)), scene.client()
    service.at_once = error(503, "agent.busy", 3600)
    for body in (b"x", bytes(500_000)):
        with pytest.raises(NotDone) as raised:
            client.send(body)
        assert (raised.value.code, raised.value.retry_after_s) == ("agent.busy", 3600)
    assert service.asked == []


def test_a_connection_that_the_service_ended_meanwhile_is_no_failure(scene: Scene) -> None:
    service, client = scene.service(in_turn(ACCEPTED)), scene.client()
    client.send(b"1")
    service.drop()
    assert until(lambda: not service._open, PATIENCE_S)
    client.send(b"2")
    assert [asked.body for asked in service.asked] == [b"1", b"2"] and service.connections == 2


def test_telemetry_whose_answer_was_lost_may_be_done_and_is_sent_again_only_on_request(scene: Scene) -> None:
    service, client = scene.service(in_turn(b"", b"HTTP/1.1 200 OK\r\nConte" + CUT, b"", ACCEPTED)), scene.client()
    for _ in range(2):
        with pytest.raises(MaybeDone):
            client.send(b"1")
    client.send(b"2", at_least_once=True)
    assert [asked.body for asked in service.asked] == [b"1", b"1", b"2", b"2"]


def test_what_may_be_done_twice_is_asked_again_where_nobody_knows(scene: Scene) -> None:
    service = scene.service(in_turn(b"", answer(200, {"state": "connected"})))
    assert scene.client().status() == {"state": "connected"} and len(service.asked) == 2


def test_a_silent_service_is_not_waited_for_longer_than_asked(scene: Scene) -> None:
    scene.service(in_turn(SILENT))
    client = scene.client()
    with pytest.raises(MaybeDone) as raised:
        client.send(b"1", timeout_s=0.3)
    assert raised.value.code == "agent.out_of_time"


def test_an_answer_that_is_none_is_an_error_and_no_crash(scene: Scene) -> None:
    scene.service(in_turn(b"SSH-2.0-OpenSSH_9.2\r\n"))
    with pytest.raises(MaybeDone, match="not HTTP"):
        scene.client().send(b"1")


def test_a_service_that_is_not_there_is_unreachable_and_one_that_comes_is_found(scene: Scene) -> None:
    client = scene.client()
    with pytest.raises(Unreachable) as raised:
        client.send(b"1", timeout_s=0.2)
    assert raised.value.code == "agent.not_running"
    assert str(scene.path) in raised.value.message and "$DPS_AGENT_API_SOCKET" in raised.value.message
    timer = threading.Timer(0.3, lambda: scene.service(in_turn(ACCEPTED)))
    timer.start()
    client.send(b"2", timeout_s=PATIENCE_S)
    timer.join()


def test_a_socket_that_is_for_others_is_refused_at_once_and_names_the_group() -> None:
    asked = steps.ask(values.get("/status"), 10)
    line = steps.Line()
    assert isinstance(asked.send(None), steps.Now)
    tried = asked.send(0.0)
    assert isinstance(tried, steps.Try)
    once = steps.exchange(line, tried.request, tried.until_s)
    assert isinstance(once.send(None), steps.Dial)
    with pytest.raises(Refused, match="dps-agent-clients") as refused:
        once.throw(PermissionError(13, "Permission denied"))
    with pytest.raises(Refused):
        asked.throw(refused.value)


def test_pauses_grow_to_a_bound_and_are_never_less_than_asked_for() -> None:
    pace = steps.Pace()
    own = [pace.after(None) for _ in range(20)]
    assert (
        own[0] >= steps.LEAST_PAUSE_S and max(own) <= steps.LONGEST_PAUSE_S * 1.25 and own[-1] >= steps.LONGEST_PAUSE_S
    )
    assert all(7 <= pace.after(7) <= 7 * 1.25 for _ in range(100))


def test_requests_beyond_the_connections_wait_for_their_turn_and_no_longer_than_they_have_time(scene: Scene) -> None:
    go = threading.Event()

    def late(_asked: Asked) -> bytes:
        go.wait(PATIENCE_S)
        return ACCEPTED

    service, client = scene.service(late), scene.client(connections=2)
    threads = [threading.Thread(target=client.send, args=(b"x",)) for _ in range(5)]
    for thread in threads:
        thread.start()
    assert until(lambda: len(service.asked) == 2, PATIENCE_S)
    with pytest.raises(NotDone) as raised:
        client.send(b"y", timeout_s=0.2)
    assert raised.value.code == "agent.busy" and service.connections == 2
    go.set()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert len(service.asked) == 5


# What the cloud sends.


def desired(version: int, **properties: Any) -> dict[str, Any]:
    return {"event": "desired", "version": version, "whole": properties, "changed": properties}


class Streams:
    """A service whose GET /events is one of these after the other, and which accepts all else."""

    def __init__(self, *streams: bytes) -> None:
        self.left = list(streams)
        self.others: list[Asked] = []

    def __call__(self, asked: Asked) -> bytes:
        if asked.line == "GET /events":
            return self.left.pop(0) if self.left else SILENT
        self.others.append(asked)
        return ACCEPTED


END = b"0\r\n\r\n"


def test_events_go_on_after_the_service_has_ended_and_each_version_comes_once(scene: Scene) -> None:
    streams = Streams(
        stream(desired(1, a=1), None, desired(2, a=2)) + END,
        error(503, "agent.busy", 1),
        stream(desired(2, a=2), desired(3, a=3), {"event": "news of tomorrow"}) + END,
        stream(desired(1, hub="another")),
    )
    scene.service(streams)
    events = scene.client().events(PATIENCE_S)
    found = [next(events) for _ in range(4)]
    events.close()
    assert [(event.version, event.whole) for event in found] == [
        *((1, {"a": 1}), (2, {"a": 2}), (3, {"a": 3}), (1, {"hub": "another"})),
    ]


def test_events_end_when_their_time_is_over(scene: Scene) -> None:
    scene.service(Streams(stream(desired(1))))
    assert len(list(scene.client().events(0.5))) == 1
    scene.end()
    assert list(Scene(scene.door, scene.path.parent).client().events(0.3)) == []


@pytest.mark.parametrize("size", [1, 7, 4096])
def test_events_are_read_whatever_pieces_they_come_in(size: int, tmp_path: Path) -> None:
    listener = steps.Listener(None)
    text = stream(desired(1, a="ä" * 100), None, {"event": "method", "id": "x", "name": "open", "payload": 7})
    pieces = [text[at : at + size] for at in range(0, len(text), size)]
    found = []
    for _ in range(2):
        asked = listener.next()
        effect = asked.send(None)
        while True:
            try:
                reply: Any = 0.0 if isinstance(effect, steps.Now) else None
                effect = asked.send(pieces.pop(0) if isinstance(effect, steps.Read) else reply)
            except StopIteration as end:
                found.append(end.value)
                break
    assert [type(event).__name__ for event in found] == ["Desired", "MethodCall"]


@pytest.mark.parametrize(
    ("fields", "payload", "form"),
    [
        ({"payload": {"door": 7}}, {"door": 7}, "json"),
        ({"payload": None}, None, "json"),
        ({"payloadText": "good night"}, "good night", "text"),
        ({"payloadBase64": "AP8="}, b"\x00\xff", "bytes"),
        ({"tooLarge": True}, None, "too large"),
    ],
)
def test_a_payload_is_what_it_was_and_says_so(fields: dict[str, Any], payload: Any, form: str) -> None:
    line = json.dumps({"event": "message", "id": "1", "properties": {"a": "b"}, **fields}).encode()
    assert values.event_of(line) == Message("1", payload, form, {"a": "b"})


def test_the_program_s_functions_get_what_is_for_them_and_the_service_hears_of_it(
    scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    streams = Streams(
        stream(
            desired(3, interval=30),
            {"event": "method", "id": "m/1", "name": "open", "payload": {"valve": 7}},
            {"event": "method", "id": "m2", "name": "nobody's", "payload": None},
            {"event": "method", "id": "m3", "name": "busy", "payload": None},
            {"event": "method", "id": "m4", "name": "fails", "payload": None},
            {"event": "method", "id": "m5", "name": "no JSON", "payload": None},
            {"event": "message", "id": "c1", "properties": {}, "payloadText": "good"},
            {"event": "message", "id": "c2", "properties": {}, "payloadText": "bad"},
            {"event": "message", "id": "c3", "properties": {}, "payloadText": "good"},
        )
    )
    scene.service(streams)
    client = scene.client()
    seen: list[Any] = []
    client.method("open")(lambda payload: {"opened": payload["valve"]})
    client.method("busy")(lambda _payload: MethodAnswer(423))
    client.method("fails")(lambda _payload: 1 // 0)
    client.method("no JSON")(lambda _payload: object())

    @client.on_desired
    def wanted(desired: Any) -> None:
        seen.append(desired.whole)

    @client.on_message
    def message(message: Any) -> None:
        seen.append(message.payload)
        if message.payload == "bad":
            raise ValueError("it does not understand")

    with caplog.at_level(logging.ERROR, "dps_agent.client"):
        client.start()
        assert until(lambda: len(streams.others) == 6, PATIENCE_S)
    assert seen == [{"interval": 30}, "good", "bad", "good"]
    assert [(asked.line, asked.body) for asked in streams.others] == [
        ("POST /methods/m%2F1?status=200", b'{"opened":7}'),
        ("POST /methods/m3?status=423", b""),
        ("POST /methods/m4?status=500", b'{"error":"the program\'s function failed"}'),
        ("POST /methods/m5?status=500", b'{"error":"the program\'s answer is no JSON"}'),
        ("POST /events/c1/done", b""),
        ("POST /events/c3/done", b""),
    ]
    assert [record.exc_info is not None for record in caplog.records] == [True, True]


def test_a_function_of_asyncio_s_is_awaited_by_its_door_and_named_by_the_other(
    scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    streams = Streams(stream({"event": "method", "id": "m1", "name": "open", "payload": 7}))
    scene.service(streams)
    client = scene.client()

    @client.method("open")
    async def opened(payload: Any) -> Any:
        return payload + 1

    with caplog.at_level(logging.ERROR, "dps_agent.client"):
        client.start()
        assert until(lambda: streams.others, PATIENCE_S)
    status, body = ("200", b"8") if scene.door == "asyncio" else ("500", streams.others[0].body)
    assert (streams.others[0].line, streams.others[0].body) == (f"POST /methods/m1?status={status}", body)
    assert (scene.door == "threads") == ("AsyncClient" in caplog.text)


def test_an_answer_does_not_wait_for_those_who_ask(scene: Scene) -> None:
    streams = Streams(stream({"event": "method", "id": "m1", "name": "open", "payload": 7}))
    go = threading.Event()

    def service(asked: Asked) -> bytes:
        if asked.line.startswith("POST /telemetry"):
            go.wait(PATIENCE_S)
            return ACCEPTED
        return streams(asked)

    scene.service(service)
    client = scene.client(connections=1)
    client.method("open")(lambda payload: payload)
    sender = threading.Thread(target=client.send, args=(b"x",))
    sender.start()
    client.start()
    assert until(lambda: streams.others, PATIENCE_S)
    go.set()
    sender.join(PATIENCE_S)


def test_an_answer_that_comes_too_late_is_nobody_s_error_and_the_events_go_on(scene: Scene) -> None:
    call = {"event": "method", "id": "m1", "name": "open", "payload": 7}
    streams = Streams(stream(call, {**call, "id": "m2"}))
    lost = [b"", error(404, "agent.unknown_event")]

    def service(asked: Asked) -> bytes:
        if asked.line.startswith("POST /methods/m1"):
            return lost.pop(0)
        return streams(asked)

    scene.service(service)
    client = scene.client()
    client.method("open")(lambda payload: payload)
    client.start()
    assert until(lambda: streams.others, PATIENCE_S)
    assert streams.others[0].line == "POST /methods/m2?status=200" and lost == []


def test_a_program_may_answer_by_itself(scene: Scene) -> None:
    message = {"event": "message", "id": "c1", "properties": {}, "payload": 1}
    streams = Streams(stream({"event": "method", "id": "m1", "name": "open", "payload": 7}, message))
    scene.service(streams)
    client = scene.client()
    events = client.events(PATIENCE_S)
    client.answer(next(events), {"opened": True}, status=201)
    client.done(next(events))
    events.close()
    assert [asked.line for asked in streams.others] == ["POST /methods/m1?status=201", "POST /events/c1/done"]


def test_closing_ends_all_that_waits(scene: Scene) -> None:
    def service(asked: Asked) -> bytes:
        return error(503, "agent.not_connected", 600) if asked.body == b"pauses" else SILENT

    service_ = scene.service(service)
    client = scene.client()
    ended: list[Any] = []

    def work(call: Callable[[], Any]) -> None:
        try:
            ended.append(call())
        except AgentError as error:
            ended.append(error)

    calls: list[Callable[[], Any]] = [
        lambda: client.send(b"pauses", timeout_s=3600),
        lambda: client.send(b"waits", timeout_s=3600),
        lambda: list(client.events()),
    ]
    threads = [threading.Thread(target=work, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    assert until(lambda: len(service_.asked) == 3, PATIENCE_S)
    client.close()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert len(ended) == 3 and [] in ended and sum(isinstance(found, AgentError) for found in ended) == 2
    with pytest.raises(AgentError):
        client.send(b"after", timeout_s=PATIENCE_S)


# The spool in a client.


def test_what_a_spool_took_is_sent_in_order_once_there_is_a_service(
    scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spool, "is_synchronised", lambda: True)
    client = scene.client(spool=Spool(tmp_path / "spool"))
    for number in range(5):
        client.send({"n": number})
    assert client.send_many([{"n": 5}, {"n": 6}], {"line": "3"}) == 2
    with pytest.raises(NotDone, match="7 messages are still in the spool"):
        client.flush(0.2)
    service = scene.service(in_turn(error(503, "agent.not_sent", 0), b"", error(413, "agent.too_large"), ACCEPTED))
    client.flush(PATIENCE_S)
    sent = [json.loads(asked.body)["n"] for asked in service.asked]
    assert sent == [0, 0, 0, 1, 2, 3, 4, 5, 6], "what may be at the hub is sent again, what it refuses is not"
    numbers = [asked.line.partition("mid=")[2].partition("&")[0].rpartition("-")[2] for asked in service.asked]
    assert numbers == ["1", "1", "1", "2", "3", "4", "5", "6", "7"], "the same number is the same message"
    assert all("%24.ctime=20" in asked.line for asked in service.asked) and "line=3" in service.asked[-1].line
    client.send("text", {"$.mid": "own"})
    client.flush(PATIENCE_S)
    assert service.lines()[-1].count("mid=") == 1 and "mid=own" in service.lines()[-1]


def test_a_client_goes_on_with_what_another_one_left_in_the_spool(scene: Scene, tmp_path: Path) -> None:
    with opened(scene.door, scene.path, spool=Spool(tmp_path / "spool")) as first:
        first.send(b"1")
    service = scene.service(in_turn(ACCEPTED))
    scene.client(spool=Spool(tmp_path / "spool")).flush(PATIENCE_S)
    assert [asked.body for asked in service.asked] == [b"1"]


def test_a_disk_that_fails_for_a_while_does_not_end_the_sending(
    scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "SPOOL_PAUSE_S", 0.05)
    spool = Spool(tmp_path / "spool")
    first, left = spool.first, [2]

    def failing() -> Any:
        left[0] -= 1
        if left[0] >= 0:
            raise SpoolFailed("agent.file", "the disk is away")
        return first()

    monkeypatch.setattr(spool, "first", failing)
    service = scene.service(in_turn(ACCEPTED))
    client = scene.client(spool=spool)
    client.send(b"1")
    client.flush(PATIENCE_S)
    assert [asked.body for asked in service.asked] == [b"1"] and left[0] < 0


def test_what_the_hub_has_is_not_sent_again_because_the_disk_does_not_forget_it(
    scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "SPOOL_PAUSE_S", 0.05)
    spool = Spool(tmp_path / "spool")
    forget, left = spool.forget, [3]

    def failing(*arguments: Any) -> None:
        left[0] -= 1
        if left[0] >= 0:
            raise SpoolFailed("agent.file", "the disk is full")
        forget(*arguments)

    monkeypatch.setattr(spool, "forget", failing)
    service = scene.service(in_turn(ACCEPTED))
    client = scene.client(spool=spool)
    client.send(b"1")
    client.send(b"2")
    client.flush(PATIENCE_S)
    assert [asked.body for asked in service.asked] == [b"1", b"2"] and left[0] < 0


def test_a_message_that_the_hub_never_answers_does_not_hold_the_others(
    scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(steps, "LONGEST_PAUSE_S", 0.001)
    others = itertools.cycle(("agent.unacknowledged", "agent.not_sent", "agent.out_of_time"))

    def answers(asked: Asked) -> bytes:
        return ACCEPTED if asked.body == b"good" else error(503, next(others), 0)

    spool = Spool(tmp_path / "spool")
    service = scene.service(answers)
    client = scene.client(spool=spool)
    for body in (b"bad", b"good", b"bad", b"good"):
        client.send(body)
    with caplog.at_level(logging.WARNING, "dps_agent.client"):
        client.flush(PATIENCE_S)
    tries = 3 * (steps.UNANSWERED_LIMIT - 1) + 1  # of every three answers one counts
    sent = [asked.body for asked in service.asked]
    assert sent[: tries + 1] == [b"bad"] * tries + [b"good"] and sent.count(b"good") == 2 and sent[-1] == b"good"
    assert spool.dropped == {"age": 0, "room": 0, "refused": 0, "unanswered": 2}
    assert "10 times: " in caplog.text and "(agent.unacknowledged)" in caplog.text


def test_a_message_whose_answer_is_late_is_kept(scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "LONGEST_PAUSE_S", 0.001)
    late = [error(504, "agent.out_of_time", 0)] * (3 * steps.UNANSWERED_LIMIT)
    service = scene.service(in_turn(*late, ACCEPTED))
    spool = Spool(tmp_path / "spool")
    client = scene.client(spool=spool)
    client.send(b"1")
    client.flush(PATIENCE_S)
    assert len(service.asked) == len(late) + 1 and not any(spool.dropped.values())


def test_what_a_cancelled_send_has_stored_is_sent_without_another_one(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool")
    begun, release, put = threading.Event(), threading.Event(), spool.put

    def slow(requests: Any) -> None:
        begun.set()
        assert release.wait(PATIENCE_S)
        put(requests)

    async def cancelled(service: ScriptedService) -> None:
        async with AsyncClient(tmp_path / "api.sock", spool=spool) as client:
            await client.send(b"1")
            await client.flush(PATIENCE_S)  # those who send wait for more from here on
            spool.put = slow  # type: ignore[method-assign]
            sending = asyncio.create_task(client.send(b"2"))
            assert await asyncio.to_thread(begun.wait, PATIENCE_S)
            sending.cancel()
            with pytest.raises(asyncio.CancelledError):
                await sending
            release.set()
            assert await asyncio.to_thread(until, lambda: len(service.asked) == 2, PATIENCE_S)

    with ScriptedService(tmp_path / "api.sock", in_turn(ACCEPTED)) as service:
        asyncio.run(cancelled(service))
    assert [asked.body for asked in service.asked] == [b"1", b"2"]


# What it costs to have.

LOADED = """
import sys
before = set(sys.modules)
from dps_agent.client import Client
Client()
print(*sorted(set(sys.modules) - before))
"""


def test_importing_it_loads_nothing_of_the_service_and_neither_asyncio_nor_sqlite() -> None:
    command = [sys.executable, "-S", "-c", LOADED]
    sources = {"PYTHONPATH": ":".join(str(Path(__file__).parents[2] / name) for name in ("agent", "hal"))}
    loaded = subprocess.run(command, env=sources, capture_output=True, text=True, check=True, timeout=60).stdout.split()
    ours = {name for name in loaded if name.startswith("dps_")}
    assert ours == {
        *("dps_agent", "dps_agent.http1", "dps_agent.effects", "dps_agent.utc", "dps_hal", "dps_hal.contracts"),
        *("dps_hal.named", "dps_hal.host", "dps_hal.host.named_tuples"),
        *(f"dps_agent.client{name}" for name in ("", ".blocking", ".errors", ".steps", ".values")),
    }
    assert not {name.partition(".")[0] for name in loaded} & {
        *("asyncio", "sqlite3", "ssl", "ujson", "paho", "http", "email", "ctypes", "inspect", "dataclasses", "hashlib"),
    }
