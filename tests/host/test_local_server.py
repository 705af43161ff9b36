"""The socket for other programs on the device, without a hub: what it accepts, what it bounds, whom it trusts."""

import base64
import contextlib
import errno
import gc
import io
import json
import os
import queue
import resource
import socket
import stat
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from dps_agent import twin
from dps_agent.host.cli import running
from dps_agent.host.config import ROOT_SUFFIX, load
from dps_agent.host.journal import Journal
from dps_agent.host.local import events as event_module
from dps_agent.host.local import routes, server, shares, statefile
from dps_agent.host.local.routes import Command, Snapshot
from dps_agent.host.local.server import LocalServer, listen
from dps_agent.host.local.shares import USE_EVERY_S, Lines, Peer, Places
from dps_agent.host.loop import Loop
from dps_agent.host.network import mqtt
from dps_agent.hub_effects import (
    AnswerMethod,
    CloudMessage,
    Desired,
    MessageDone,
    MethodCall,
    Readers,
    ReadTwin,
    Report,
    SendTelemetry,
    TelemetryDone,
    TwinDone,
    Withdrawn,
)
from dps_agent.lifecycle import Lifecycle
from dps_agent.session import CALL_LIMIT, IN_FLIGHT_LIMIT, MESSAGE_LIMIT, TELEMETRY_LIMIT, telemetry_topic
from dps_emulator.local_client import LocalClient
from dps_hal.errors import RetryLater
from support.world import World, settings

STATUS = {"state": "connected", "reason": "connected to h"}
ASSIGNMENT = {"assignedHub": "h.azure-devices.net", "deviceId": "press-07"}


class Served:
    """A socket in a loop on a thread of its own; what the service calls there is called on that thread."""

    def __init__(self, api: LocalServer) -> None:
        self._api = api
        self._loop = Loop()
        self._calls: deque[Callable[[], object]] = deque()
        self._ended = False
        self.thread = threading.Thread(target=self._serve)
        self.start = self.thread.start

    def close(self) -> None:
        """Ends thread and socket."""
        self._ended = True
        self._loop.ring()
        if self.thread.ident is not None:
            self.thread.join(60)
        self._loop.close()
        self._api.close()

    def look(self) -> None:
        """Ends the wait of now."""
        self._on_the_thread(bool)

    def _serve(self) -> None:
        self._loop.served = self._api
        while not self._ended:
            self._loop.wait(time.monotonic() + 60)
            while self._calls:
                self._calls.popleft()()

    def _on_the_thread(self, call: Callable[..., Any], *arguments: Any) -> Any:
        if threading.current_thread() is self.thread or not self.thread.is_alive():
            return call(*arguments)
        answer: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._calls.append(lambda: answer.put(call(*arguments)))
        self._loop.ring()
        return answer.get(timeout=60)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._api, name)
        return partial(self._on_the_thread, found) if name in ("show", "tell", "answer", "forget") else found


class Agent:
    """A socket whose service is this object: it notes what is asked for and answers as it is told."""

    def __init__(self, folder: Path, allow_token: bool = False, start: bool = True) -> None:
        folder.mkdir(exist_ok=True)
        self.posted: list[Any] = []
        self.readers: list[int] = []  # how many there were, each time that this changed
        self.withdrawn: list[int] = []
        self.commands: list[Command] = []
        self.said = io.StringIO()
        self.accepts: bool | None = True  # None: no answer
        self.sent = True
        self.twin: tuple[int, int, bytes | None, float] | None = None  # what becomes of requests to it
        self.takes_its_time = False  # what is posted waits, and may be taken back
        self.full = False
        self.waiting: list[Any] = []  # what was posted and nobody has begun with
        self.server = LocalServer(
            str(folder / "run" / "api.sock"),
            allow_token=allow_token,
            post=self._post,
            command=self._command,
            take_back=self._take_back,
            journal=Journal(self.said, True, {}),
        )
        self.api = Served(self.server)
        self.client = LocalClient(self.api.path, 10)
        self.connect()
        if start:
            self.api.start()

    def connect(self, connected: bool = True, retry_after_s: int = 7) -> None:
        self.api.show(Snapshot(STATUS, ASSIGNMENT, connected, retry_after_s))

    def _post(self, event: Any) -> bool:
        if isinstance(event, Readers):
            self.readers.append(event.number)
            return True
        if isinstance(event, Withdrawn):
            self.withdrawn.append(event.request_id)
            return True
        if self.full:
            return False
        self.posted.append(event)
        if self.takes_its_time:
            self.waiting.append(event)
        if isinstance(event, SendTelemetry) and self.accepts is not None:
            self.api.tell(TelemetryDone(event.request_id, self.accepts, self.sent))
        if isinstance(event, (Report, ReadTwin)) and self.twin is not None:
            self.api.tell(TwinDone(event.request_id, *self.twin))
        return True

    def _take_back(self, asked: Any) -> bool:
        found = asked in self.waiting
        if found:
            self.waiting.remove(asked)
        return found

    def _command(self, command: Command) -> None:
        self.commands.append(command)
        self.api.answer(command.request_id, 200, {"did": command.name})


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[Agent]:
    found = Agent(tmp_path)
    yield found
    found.api.close()
    assert not found.api.thread.is_alive()


def wait_for(condition: Callable[[], object], within_s: float = 60) -> None:
    until_s = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < until_s, "it did not happen in time"
        time.sleep(0.005)


def open_sockets() -> set[str]:
    """This process's sockets by their inodes; other descriptors come and go with what Python opens late."""
    found = set()
    for entry in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the listing's own descriptor
            found.add(os.readlink(f"/proc/self/fd/{entry}"))
    return {name for name in found if name.startswith("socket:")}


def raw(agent: Agent, request: bytes) -> bytes:
    """Everything that is answered to some bytes until the connection ends."""
    with agent.client.connect() as connection:
        if request:
            connection.sendall(request)
        answer = b""
        while part := connection.recv(65536):
            answer += part
        return answer


# --- what it does


def test_status_and_assignment_are_what_the_service_said_last(agent: Agent) -> None:
    assert agent.client.ask("GET", "/status") == (200, {**STATUS, "connected": True})
    assert agent.client.ask("GET", "/assignment") == (200, ASSIGNMENT)
    agent.api.show(Snapshot({"state": "provisioning"}, None, False))
    assert agent.client.ask("GET", "/status") == (200, {"state": "provisioning", "connected": False})
    status, document = agent.client.ask("GET", "/assignment")
    assert (status, document["error"]["code"]) == (404, "record.absent")


def test_the_paths_are_listed_and_each_is_there(agent: Agent) -> None:
    status, document = agent.client.ask("GET", "/")
    assert status == 200 and all(line and "\n" not in line for line in document["paths"].values())
    agent.twin = (twin.NOT_SENT, 0, None, 0.0)
    for request in document["paths"]:
        method, _, target = request.partition(" ")
        if target != "/events":  # which does not end
            _, content = agent.client.read(method, target.replace("{name}", "status"))
            answer = {} if target == "/metrics" else json.loads(content)
            usage = answer.get("error", {}).get("message", "")
            assert "nothing at" not in usage and "asked for with" not in usage, request


def test_reported_properties_are_answered_with_the_hubs_version(agent: Agent) -> None:
    agent.twin = (204, 17, None, 0.0)
    patch = b'{ "valve": {"open": true}, "old": null, "t": 21.3 }'
    assert agent.client.ask("PATCH", "/twin/reported", patch) == (200, {"version": 17})
    (sent,) = agent.posted
    assert json.loads(sent.patch) == json.loads(patch)


@pytest.mark.parametrize(
    ("patch", "status", "words"),
    [
        (b"", 400, "JSON object"),
        (b"[1]", 400, "JSON object"),
        (b"{", 400, "JSON object"),
        (b'{"a":NaN}', 400, "JSON object"),
        (b'{"dpsAgent":{"x":1}}', 400, "agent reports of itself"),
        (b'{"a.b":1}', 400, "dot"),
        (b'{"a":' * 12 + b"1" + b"}" * 12, 400, "10 objects"),
        (b'{"a":"%s"}' % (b"x" * 4097), 400, "4096 bytes"),
        (b"{%s}" % b",".join(b'"k%d":"%s"' % (number, b"x" * 4000) for number in range(9)), 413, "32768 bytes"),
    ],
)
def test_a_patch_that_no_hub_takes_is_refused_in_a_sentence_before_it_is_sent(
    patch: bytes, status: int, words: str, agent: Agent
) -> None:
    found, document = agent.client.ask("PATCH", "/twin/reported", patch)
    assert (found, document["error"]["code"]) == (status, "agent.properties") and words in document["error"]["message"]
    assert document["error"]["remedy"] and agent.posted == []


@pytest.mark.parametrize(
    ("done", "status", "code", "retry_after"),
    [
        ((twin.NOT_SENT, 0, None, 0.0), 503, "agent.not_sent", "5"),
        ((twin.UNANSWERED, 0, None, 0.0), 503, "agent.unacknowledged", "5"),
        ((twin.LACKING, 0, None, 0.0), 501, "hub.no_twin", None),
        ((429, 0, None, 41.5), 429, "agent.busy", "42"),
        ((400, 0, b'{"errorCode":400004,"message":"a name is too long"}', 0.0), 400, "hub.refused_patch", None),
        ((413, 0, b"\xff", 0.0), 413, "hub.refused_patch", None),
        ((200, 0, b"no twin", 0.0), 503, "agent.not_sent", "5"),
    ],
)
def test_what_the_twin_was_not_done_for_is_said(
    done: Any, status: int, code: str, retry_after: str | None, agent: Agent
) -> None:
    agent.twin = done
    found, document = agent.client.ask("PATCH", "/twin/reported", b'{"a":1}')
    assert (found, document["error"]["code"], agent.client.headers.get("retry-after")) == (status, code, retry_after)
    if code == "hub.refused_patch":
        assert "a name is too long" in document["error"]["message"] or status == 413


def test_the_twin_is_the_hubs_own(agent: Agent) -> None:
    whole = {"desired": {"rate": 5, "$version": 4}, "reported": {"$version": 2}}
    agent.twin = (200, 0, json.dumps(whole).encode(), 0.0)
    assert agent.client.ask("GET", "/twin") == (200, whole)


def test_the_twin_of_a_hub_without_one_or_without_a_connection_is_not_asked_for(agent: Agent) -> None:
    agent.api.show(Snapshot({**STATUS, "hubLacks": ["methods", "twin"]}, ASSIGNMENT, True))
    for method, target in (("GET", "/twin"), ("PATCH", "/twin/reported")):
        status, document = agent.client.ask(method, target, b"{}" if method == "PATCH" else b"")
        assert (status, document["error"]["code"]) == (501, "hub.no_twin")
    agent.connect(False, 7)
    status, document = agent.client.ask("GET", "/twin")
    assert (status, document["error"]["code"], agent.client.headers["retry-after"]) == (503, "agent.not_connected", "7")
    assert agent.posted == []


def test_requests_to_the_twin_take_a_place_until_they_are_answered(agent: Agent, users: list[int]) -> None:
    users[0] = 1000
    agent.twin = None
    clients = [LocalClient(agent.api.path, 10) for _ in range(server.UNDER_WAY[1] + 1)]
    threads = [threading.Thread(target=client.ask, args=("GET", "/twin")) for client in clients[1:]]
    for thread in threads:
        thread.start()
    wait_for(lambda: len(agent.posted) == server.UNDER_WAY[1])
    users[0] = 1001
    other = threading.Thread(target=clients[0].ask, args=("GET", "/twin"))
    other.start()
    wait_for(lambda: len(agent.posted) == server.UNDER_WAY[1] + 1)
    for event in agent.posted:
        agent.api.tell(TwinDone(event.request_id, twin.NOT_SENT, 0, None, 0.0))
    for thread in [*threads, other]:
        thread.join(60)
        assert not thread.is_alive()
    wait_for(lambda: not agent.api._under_way and not agent.api._hub_places._taken and not agent.api._bytes._taken)


def test_a_patch_without_an_answer_in_time_is_withdrawn(agent: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes, "TELEMETRY_LIMIT_S", 0.2)
    agent.twin = None
    status, document = agent.client.ask("PATCH", "/twin/reported", b'{"a":1}')
    assert status == 504 and "not known" in document["error"]["message"]
    assert agent.withdrawn == [agent.posted[-1].request_id]


def test_telemetry_goes_out_byte_for_byte_with_its_properties(agent: Agent) -> None:
    body = b'{"t" :21.50}\n\x00\xff'
    assert agent.client.ask("POST", "/telemetry?line=3&%24.ct=application%2Fjson&alarm", body)[0] == 200
    (sent,) = agent.posted
    assert (sent.properties, sent.payload) == ({"line": "3", "$.ct": "application/json", "alarm": ""}, body)


def test_telemetry_is_refused_without_a_connection_and_says_when_to_come_back(agent: Agent) -> None:
    agent.connect(False, 7)
    status, document = agent.client.ask("POST", "/telemetry", b"{}")
    assert (status, document["error"]["code"], agent.client.headers["retry-after"]) == (503, "agent.not_connected", "7")
    assert agent.posted == []


def test_telemetry_that_the_hub_did_not_take_is_503_and_one_without_answer_504(
    agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent.accepts = False
    assert agent.client.ask("POST", "/telemetry", b"{}")[0] == 503
    assert "retry-after" in agent.client.headers
    agent.accepts = None
    monkeypatch.setattr(routes, "TELEMETRY_LIMIT_S", 0.2)
    status, document = agent.client.ask("POST", "/telemetry", b"{}")
    assert status == 504 and "not known" in document["error"]["message"]
    assert agent.withdrawn == [agent.posted[-1].request_id], "it is not sent again"
    agent.api.tell(TelemetryDone(agent.posted[-1].request_id, True, True))  # too late, and no harm
    assert agent.client.ask("GET", "/status")[0] == 200


def test_telemetry_that_cannot_even_wait_is_503_at_once(agent: Agent) -> None:
    agent.full = True
    status, document = agent.client.ask("POST", "/telemetry", b"{}")
    assert (status, document["error"]["code"]) == (503, "agent.busy")


def test_telemetry_that_never_fits_is_413_before_it_is_posted_and_says_what_would(agent: Agent) -> None:
    room = TELEMETRY_LIMIT - len("a1") - len("json")  # of what is IoT Hub's own only the value counts
    status, document = agent.client.ask("POST", "/telemetry?a=1&$.ct=json", bytes(room + 1))
    assert (status, document["error"]["code"]) == (413, "agent.too_large") and document["error"]["remedy"]
    assert str(room) in document["error"]["message"] and agent.posted == []
    assert agent.client.ask("POST", "/telemetry?a=1&$.ct=json", bytes(room))[0] == 200
    assert agent.client.ask("POST", "/telemetry?a=%ED%A0%80", b"{}")[0] in (200, 400), "no 503, which asks for more"


def test_telemetry_with_qos_0_says_so_to_the_session_and_nothing_else_is_a_qos(agent: Agent) -> None:
    assert agent.client.ask("POST", "/telemetry?$qos=0&a=b", b"{}") == (200, {"accepted": True})
    assert agent.client.ask("POST", "/telemetry?%24qos=1", b"{}")[0] == 200
    assert [(sent.qos, sent.properties) for sent in agent.posted] == [(0, {"a": "b"}), (1, {})]
    for value in ("2", "", "one"):
        assert agent.client.ask("POST", f"/telemetry?$qos={value}", b"{}")[0] == 400


def lines(agent: Agent, body: bytes, target: str = "/telemetry?line=3") -> tuple[int, Any]:
    head = f"POST {target} HTTP/1.1\r\nContent-Type: Application/x-ndjson; charset=utf-8\r\nConnection: close\r\n"
    answer = raw(agent, head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body)
    return int(answer.split(b" ", 2)[1]), json.loads(answer.partition(b"\r\n\r\n")[2])


def test_who_sends_requests_without_end_has_its_share_of_each_turn_and_no_more_is_read_meanwhile(
    tmp_path: Path,
) -> None:
    agent = Agent(tmp_path, start=False)
    sender = socket.socket(socket.AF_UNIX)
    sender.connect(agent.api.path)
    sender.setblocking(False)
    request, rest, answered = b"GET /x HTTP/1.1\r\n\r\n", b"", 0
    for _ in range(60):
        with contextlib.suppress(BlockingIOError):
            while True:  # whatever was read, more waits
                rest = rest or request * 1000
                rest = rest[sender.send(rest) :]
        agent.server.turn(True)
        with contextlib.suppress(BlockingIOError):
            came = sender.recv(1 << 20)
            assert came.count(b"HTTP/1.1 404") <= 2 * server.REQUESTS_A_TURN
            answered += came.count(b"HTTP/1.1 404")
        for client in agent.server._clients.values():
            assert len(client.reader.rest) + len(client.came) <= server.READ_SIZE + len(request)
        assert len(agent.server._unfinished) <= 1
    assert answered > 50 * server.REQUESTS_A_TURN
    sender.close()
    agent.api.close()


def nothing_is_held(agent: Agent) -> bool:
    api = agent.api
    held = (api._under_way, api._batches, api._batch_of, api._pending, api._hub_places._taken, api._bytes._taken)
    return not any(held)


def test_each_line_is_a_message_and_one_answer_counts_them(agent: Agent) -> None:
    body = b"\n".join(b'{"n":%d}' % number for number in range(500)) + b"\n\r\n"
    assert lines(agent, body) == (200, {"accepted": 500, "of": 500})
    assert [sent.payload for sent in agent.posted] == body.split()
    assert {(sent.qos, *sent.properties.items()) for sent in agent.posted} == {(1, ("line", "3"))}
    assert len({sent.request_id for sent in agent.posted}) == 500 and nothing_is_held(agent)
    assert lines(agent, b"\n\n") == (200, {"accepted": 0, "of": 0})


def test_a_body_of_the_shortest_lines_is_sent_as_any_other(agent: Agent) -> None:
    body = b"1\n" * 5000
    assert lines(agent, body) == (200, {"accepted": 5000, "of": 5000}) and nothing_is_held(agent)


def test_of_many_lines_no_more_are_under_way_than_a_users_share(agent: Agent, users: list[int]) -> None:
    users[0] = 1000
    agent.accepts = None
    answers: list[Any] = []
    thread = threading.Thread(target=lambda: answers.append(lines(agent, b"1\n" * 40)))
    thread.start()
    answered = 0
    while answered < 40:
        most = min(answered + server.UNDER_WAY[1], 40)
        wait_for(lambda most=most: len(agent.posted) == most)  # type: ignore[misc]
        assert len(agent.api._under_way) == len(agent.posted) - answered
        agent.api.tell(TelemetryDone(agent.posted[answered].request_id, True, True))
        answered += 1
    thread.join(60)
    assert answers == [(200, {"accepted": 40, "of": 40})] and nothing_is_held(agent)


def test_after_a_line_that_was_not_accepted_nothing_more_is_sent_and_those_before_it_count(agent: Agent) -> None:
    agent.accepts = None
    answers: list[Any] = []
    thread = threading.Thread(target=lambda: answers.append(lines(agent, b"1\n" * 100)))
    thread.start()
    wait_for(lambda: len(agent.posted) == server.UNDER_WAY[0])  # root has all of them
    posted = list(agent.posted)
    for number in range(5, len(posted)):
        agent.api.tell(TelemetryDone(posted[number].request_id, number != 7, True))
    wait_for(lambda: len(agent.api._under_way) == 5 + 2)  # with those that went out before the failure was known
    for sent in agent.posted[:5] + agent.posted[len(posted) :]:
        agent.api.tell(TelemetryDone(sent.request_id, True, True))
    thread.join(60)
    ((status, document),) = answers
    assert status == 200 and (document["accepted"], document["of"]) == (7, 100)
    assert document["error"]["code"] == "agent.unacknowledged" and document["error"]["retryAfterS"]
    assert len(agent.posted) < 100 and nothing_is_held(agent)


@pytest.mark.parametrize(
    ("ends", "accepted", "code"),
    [
        ("nnn", 0, "agent.not_sent"),
        ("ynn", 1, "agent.not_sent"),
        ("nyy", 0, "agent.unacknowledged"),
        ("nn?", 0, "agent.unacknowledged"),
        ("?nn", 0, "agent.unacknowledged"),
        ("y?n", 1, "agent.unacknowledged"),
    ],
)
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_lines_are_not_sent_only_where_the_hub_has_none_behind_those_that_count(
    order: tuple[int, ...], ends: str, accepted: int, code: str, agent: Agent
) -> None:
    """y: accepted, n: not sent, ?: not acknowledged; whoever is told `agent.not_sent` sends them all again."""
    agent.accepts = None
    answers: list[Any] = []
    thread = threading.Thread(target=lambda: answers.append(lines(agent, b"1\n2\n3\n")))
    thread.start()
    wait_for(lambda: len(agent.posted) == 3)
    for number in order:
        agent.api.tell(TelemetryDone(agent.posted[number].request_id, ends[number] == "y", ends[number] != "n"))
    thread.join(60)
    ((_, document),) = answers
    assert (document["accepted"], document["of"], document["error"]["code"]) == (accepted, 3, code)
    assert nothing_is_held(agent)


def test_lines_that_are_given_up_while_one_behind_a_failure_is_under_way_may_be_at_the_hub(agent: Agent) -> None:
    agent.accepts = None
    answers: list[Any] = []
    thread = threading.Thread(target=lambda: answers.append(lines(agent, b"1\n2\n")))
    thread.start()
    wait_for(lambda: len(agent.posted) == 2)
    (batch,) = agent.server._batches.values()
    agent.api.tell(TelemetryDone(agent.posted[0].request_id, False, False))
    wait_for(lambda: batch.failures)
    (waiting,) = agent.server._pending.values()
    agent.api._on_the_thread(agent.server._give_up, waiting, batch.request_id)
    thread.join(60)
    ((status, document),) = answers
    assert (status, document["accepted"], document["error"]["code"]) == (503, 0, "agent.unacknowledged")
    agent.api.tell(TelemetryDone(agent.posted[1].request_id, True, True))
    wait_for(lambda: nothing_is_held(agent))


def test_lines_none_of_which_was_accepted_are_an_error(agent: Agent) -> None:
    agent.accepts, agent.sent = False, False
    status, document = lines(agent, b"1\n2\n")
    assert (status, document["accepted"], document["of"]) == (503, 0, 2)
    assert document["error"]["code"] == "agent.not_sent" and nothing_is_held(agent)
    agent.full = True
    assert lines(agent, b"1\n")[0] == 503 and nothing_is_held(agent)


def test_lines_that_take_too_long_or_whose_sender_has_gone_are_withdrawn(
    agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent.accepts = None
    with agent.client.connect() as connection:
        connection.sendall(
            b"POST /telemetry HTTP/1.1\r\nContent-Type: application/x-ndjson\r\nContent-Length: 4\r\n\r\n1\n2\n"
        )
        wait_for(lambda: len(agent.posted) == 2)
    wait_for(lambda: len(agent.withdrawn) == 2)
    assert not agent.api._batches and not agent.api._batch_of
    monkeypatch.setattr(server, "TELEMETRY_LIMIT_S", 0.2)
    status, document = lines(agent, b"1\n2\n")
    assert (status, document["error"]["code"], document["accepted"]) == (504, "agent.out_of_time", 0)
    assert sorted(agent.withdrawn) == [sent.request_id for sent in agent.posted]
    for sent in agent.posted:
        agent.api.tell(TelemetryDone(sent.request_id, True, True))
    wait_for(lambda: nothing_is_held(agent))


def test_each_telemetry_is_answered_by_its_own_acknowledgement(agent: Agent) -> None:
    agent.accepts = None
    answers: dict[int, int] = {}

    def send(number: int) -> None:
        answers[number] = agent.client.ask("POST", f"/telemetry?n={number}", b"{}")[0]

    threads = [threading.Thread(target=send, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    wait_for(lambda: len(agent.posted) == 8)
    for event in reversed(agent.posted):
        agent.api.tell(TelemetryDone(event.request_id, int(event.properties["n"]) % 2 == 0, True))
    for thread in threads:
        thread.join(60)
    assert answers == {number: 200 if number % 2 == 0 else 503 for number in range(8)}


def test_a_message_is_held_until_a_program_is_done_with_it(agent: Agent) -> None:
    with agent.client.events() as events:
        assert agent.api.tell(CloudMessage(4, {"$.mid": "m"}, b'{"a":1}'))
        first = events.next("message")
        assert (first["properties"], first["payload"]) == ({"$.mid": "m"}, {"a": 1})
        assert agent.posted == []
    with agent.client.events() as late, agent.client.events() as other:
        assert late.next() == first == other.next()
        assert agent.client.ask("POST", f"/events/{first['id']}/done")[0] == 200
        assert agent.posted == [MessageDone(4)]
        assert agent.client.ask("POST", f"/events/{first['id']}/done")[0] == 404
    with agent.client.events() as later:
        agent.api.tell(CloudMessage(5, {}, b""))
        assert later.next("message")["id"] != first["id"]


@pytest.mark.parametrize(
    ("payload", "shown"),
    [
        (b'{"a":[1]}', {"payload": {"a": [1]}}),
        (b"", {"payload": None}),
        ("grün".encode(), {"payloadText": "grün"}),
        (b"\xff\n\x00", {"payloadBase64": base64.b64encode(b"\xff\n\x00").decode()}),
        (None, {"tooLarge": True}),
    ],
)
def test_a_payload_of_any_kind_is_one_line(payload: bytes | None, shown: dict[str, Any], agent: Agent) -> None:
    with agent.client.events() as events:
        agent.api.tell(CloudMessage(1, {}, payload))
        found = events.next()
    assert {name: value for name, value in found.items() if name.startswith(("payload", "too"))} == shown


def test_a_new_connection_to_the_hub_ends_what_was_held_of_the_old_one(agent: Agent) -> None:
    agent.api.tell(CloudMessage(4, {}, b"old"))
    with agent.client.events() as events:
        old = events.next()
        agent.api.forget()
        agent.api.tell(CloudMessage(4, {}, b"new"))
        new = events.next()
    assert old["id"] != new["id"]
    assert agent.client.ask("POST", f"/events/{old['id']}/done")[0] == 404
    assert agent.posted == []
    assert agent.client.ask("POST", f"/events/{new['id']}/done")[0] == 200


def test_a_method_is_answered_once_with_the_programs_status_and_bytes(agent: Agent) -> None:
    assert agent.api.tell(MethodCall(3, "reboot", b"{}")) is False, "no program reads the events"
    with agent.client.events() as events:
        wait_for(lambda: agent.api.tell(MethodCall(3, "reboot", b'{"in":5}')))
        call = events.next("method")
        assert (call["name"], call["payload"]) == ("reboot", {"in": 5})
        assert agent.client.ask("POST", f"/methods/{call['id']}?status=202", b"no json")[0] == 400
        assert agent.client.ask("POST", f"/methods/{call['id']}?status=0", b"{}")[0] == 400
        assert agent.client.ask("POST", f"/methods/{call['id']}?status=202", b'{"ok": true}')[0] == 200
        assert agent.readers == [1]
        assert agent.posted == [AnswerMethod(3, 202, b'{"ok": true}')]
        assert agent.client.ask("POST", f"/methods/{call['id']}", b"{}")[0] == 404


def test_a_call_that_nobody_answers_is_forgotten_in_time(agent: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_module, "METHOD_LIMIT_S", 0.1)
    with agent.client.events() as events:
        wait_for(lambda: agent.api.tell(MethodCall(3, "reboot", b"")))
        call = events.next()
        wait_for(lambda: not agent.api._events._calls)
    assert agent.client.ask("POST", f"/methods/{call['id']}", b"{}")[0] == 404


def test_whoever_connects_later_gets_the_desired_properties_of_now(agent: Agent) -> None:
    with agent.client.events() as events:
        agent.api.tell(Desired(1, b'{"a":{"b":1,"c":2},"d":3,"$version":1}', True))
        agent.api.tell(Desired(2, b'{"a":{"b":null},"d":4,"$version":2}', False))
        agent.api.tell(Desired(3, b"no object", False))
        whole = {"a": {"b": 1, "c": 2}, "d": 3, "$version": 1}
        wanted = {"a": {"c": 2}, "d": 4, "$version": 2}
        changed = {"a": {"b": None}, "d": 4, "$version": 2}
        assert events.next() == {"event": "desired", "version": 1, "whole": whole, "changed": whole}
        assert events.next() == {"event": "desired", "version": 2, "whole": wanted, "changed": changed}
    with agent.client.events() as later:
        assert later.next() == {"event": "desired", "version": 2, "whole": wanted, "changed": wanted}


# --- whom it trusts


def test_what_changed_while_the_device_was_away_is_told_as_a_change_and_the_same_version_once(agent: Agent) -> None:
    with agent.client.events() as events:
        agent.api.tell(Desired(3, b'{"a":{"b":1,"c":2},"d":3,"f":true,"$version":3}', True))
        agent.api.forget()
        agent.api.tell(Desired(3, b'{"a":{"b":1,"c":2},"d":3,"f":true,"$version":3}', True))  # after a reconnect
        agent.api.tell(Desired(6, b'{"a":{"c":2},"d":{"e":4},"f":1,"$version":6}', True))
        assert events.next()["version"] == 3
        change = events.next()
        assert (change["version"], change["whole"]) == (6, {"a": {"c": 2}, "d": {"e": 4}, "f": 1, "$version": 6})
        assert change["changed"] == {"a": {"b": None}, "d": {"e": 4}, "f": 1, "$version": 6}


def test_tokens_are_off_by_default_even_for_root(agent: Agent) -> None:
    status, document = agent.client.ask("POST", "/token")
    assert (status, document["error"]["code"]) == (403, "agent.denied")
    assert agent.commands == []


def test_four_users_can_have_every_token_of_a_minute_but_those_of_root(tmp_path: Path, users: list[int]) -> None:
    agent = Agent(tmp_path, allow_token=True)
    found = {}
    for users[0] in (0, 1000, 1001, 1002, 1003, 1004, 990):
        found[users[0]] = [agent.client.ask("POST", "/token")[0] for _ in range(5)].count(200)
    assert found == {0: 4, 1000: 4, 1001: 4, 1002: 4, 1003: 4, 1004: 0, 990: 4}
    agent.api.close()


def test_tokens_are_short_and_few(tmp_path: Path) -> None:
    agent = Agent(tmp_path, allow_token=True)
    assert [agent.client.ask("POST", f"/token?life={life}")[0] for life in ("901", "0", "soon", "-1")] == [400] * 4
    found = [agent.client.ask("POST", "/token?life=60")[0] for _ in range(8)]
    assert found == [200] * 4 + [429] * 4
    assert 0 < int(agent.client.headers["retry-after"]) <= 61
    assert [(command.name, command.life_s) for command in agent.commands] == [("token", 60)] * 4
    agent.api.close()


@pytest.mark.parametrize("name", ["provision", "reset", "token", "status"])
def test_commands_are_for_root_and_the_services_own_user(
    name: str, agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert agent.client.ask("POST", f"/command/{name}?force=true") == (200, {"did": name})
    assert agent.commands[0].force
    monkeypatch.setattr(server.struct, "unpack", lambda *_: (1, 4711, 4711))
    status, document = agent.client.ask("POST", f"/command/{name}")
    assert (status, document["error"]["code"], len(agent.commands)) == (403, "agent.denied", 1)
    assert agent.client.ask("GET", "/status")[0] == 200
    assert "process 1 of user 4711: POST /command/" in agent.said.getvalue()


def test_the_socket_is_its_owners_alone_without_the_clients_group(agent: Agent) -> None:
    found = os.lstat(agent.api.path)
    assert stat.S_ISSOCK(found.st_mode) and stat.S_IMODE(found.st_mode) == 0o600
    assert stat.S_IMODE(os.stat(os.path.dirname(agent.api.path)).st_mode) == 0o755


def test_the_clients_group_gets_the_socket_and_no_other_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    groups = tmp_path / "group"
    groups.write_text(
        f"root:x:0:\nxdps-agent-clients:x:7:\nbroken\ndps-agent-clients:x:{os.getgid()}:press\ntss:x:9:\n"
    )
    monkeypatch.setattr(server, "GROUP_FILE", str(groups))
    agent = Agent(tmp_path)
    found = os.lstat(agent.api.path)
    assert (stat.S_IMODE(found.st_mode), found.st_gid) == (0o660, os.getgid())
    agent.api.close()
    assert not os.path.lexists(agent.api.path)


def test_a_socket_that_a_crash_left_is_replaced_and_a_live_one_is_not(agent: Agent, tmp_path: Path) -> None:
    quiet = Journal(io.StringIO(), environ={})
    with pytest.raises(OSError, match="another dps-agent"):
        listen(agent.api.path, quiet)
    left = str(tmp_path / "left.sock")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(left)
    listen(left, quiet).close()
    ordinary = tmp_path / "file"
    ordinary.write_text("mine")
    with pytest.raises(OSError, match="something else"):
        listen(str(ordinary), quiet)
    assert ordinary.read_text() == "mine"


# --- what it bounds


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET /status\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\r\n\r\n", 400),
        (b"GET status HTTP/1.1\r\n\r\n", 400),
        (b"GET /status HTTP/1.1\r\nno colon\r\n\r\n", 400),
        (b"POST /telemetry HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", 400),
        (b"get /status HTTP/1.1\r\n\r\n", 400),
        (b"GET /st\xc3\xa4tus HTTP/1.1\r\n\r\n", 400),
        (b"GET /status HTTP/1.1\r\n" + b"A: 1\r\n" * 200 + b"\r\n", 431),
        (b"GET /status HTTP/1.1\r\n folded: 1\r\n\r\n", 400),
        (b"GET /status HTTP/1.1\r\nA: " + b"x" * 17000, 431),
        (b"POST /telemetry HTTP/1.1\r\nContent-Length: -1\r\n\r\n", 400),
        (b"POST /telemetry HTTP/1.1\r\nContent-Length: 1x\r\n\r\n", 400),
        (b"POST /telemetry HTTP/1.1\r\nContent-Length: 262145\r\n\r\n", 413),
        (b"POST /telemetry HTTP/1.1\r\nContent-Length: 99999999999999999999\r\n\r\n", 413),
        (b"POST /telemetry HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
    ],
)
def test_what_is_no_request_is_refused_and_the_connection_ends(request_: bytes, status: int, agent: Agent) -> None:
    answer = raw(agent, request_)
    assert answer.startswith(b"HTTP/1.1 %d " % status), answer
    assert b"Connection: close" in answer and json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["message"]


@pytest.mark.parametrize(
    ("method", "target", "status"),
    [
        ("POST", "/", 405),
        ("GET", "/nothing", 404),
        ("GET", "/status/more", 404),
        ("GET", "/twin/reported", 405),
        ("PATCH", "/twin", 405),
        ("POST", "/status", 405),
        ("GET", "/telemetry", 405),
        ("GET", "/command/reset", 405),
        ("POST", "/command/nothing", 404),
        ("POST", "/events/x/done", 404),
        ("POST", "/events/0-/done", 404),
        ("POST", "/methods/0-0", 404),
        ("POST", "/telemetry?=x", 400),
    ],
)
def test_what_is_not_there_is_said(method: str, target: str, status: int, agent: Agent) -> None:
    found, document = agent.client.ask(method, target)
    assert found == status and document["error"]["message"]
    assert "--help" not in json.dumps(document), "a program has no command line"
    assert ("allow" in agent.client.headers) == (status == 405)  # RFC 9110, 15.5.6


def test_a_connection_serves_many_requests_also_those_sent_at_once(agent: Agent) -> None:
    one = b"GET /status HTTP/1.1\r\n\r\n"
    answer = raw(agent, one * 1500 + b"GET /assignment HTTP/1.1\r\nConnection: close\r\n\r\n")
    assert answer.count(b"HTTP/1.1 200 OK") == 1501 and answer.endswith(b'"press-07"}\n')


def test_a_program_that_waits_to_be_told_to_send_its_body_is_told(agent: Agent) -> None:
    with agent.client.connect() as connection:
        connection.sendall(b"POST /telemetry HTTP/1.1\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\n")
        assert connection.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(b"{}")
        assert connection.recv(1000).startswith(b"HTTP/1.1 200 OK")


def test_a_request_that_comes_too_slowly_is_cut_off_at_its_end(agent: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    class Clock:
        """The server's own: it goes on when the test says so."""

        passed_s = 0.0

        def monotonic(self) -> float:
            return self.passed_s

    clock = Clock()
    monkeypatch.setattr(server, "time", clock)
    with agent.client.connect() as connection:
        for byte in b"GET /st":
            connection.send(bytes([byte]))
            agent.client.ask("GET", "/status")  # it has been read when another one's request is answered
            clock.passed_s += server.REQUEST_LIMIT_S / 7.5
        under_way = [client.deadline_s for client in list(agent.api._clients.values()) if client.head is not None]
        assert under_way == [server.REQUEST_LIMIT_S], "it began with the first byte"
        clock.passed_s += server.REQUEST_LIMIT_S / 7.5
        agent.client.ask("GET", "/status")
        assert connection.recv(1000).startswith(b"HTTP/1.1 408 ")
        assert connection.recv(1000) == b""


def test_connections_are_few_and_idle_ones_make_room(agent: Agent) -> None:
    idle = [agent.client.connect() for _ in range(40)]
    assert agent.client.ask("GET", "/status")[0] == 200
    busy = [agent.client.connect() for _ in range(server.CLIENTS[0])]
    for connection in busy:
        connection.sendall(b"POST /telemetry HTTP/1.1\r\nContent-Length: 9\r\n\r\n")
    wait_for(lambda: len(agent.api._clients) == server.CLIENTS[0])
    time.sleep(0.1)
    assert raw(agent, b"").startswith(b"HTTP/1.1 503 ")
    for connection in [*idle, *busy]:
        connection.close()
    wait_for(lambda: not agent.api._clients)
    assert agent.client.ask("GET", "/status")[0] == 200


def test_readers_of_events_are_few(agent: Agent) -> None:
    readers = [agent.client.events() for _ in range(server.STREAMS[0])]
    status, document = agent.client.ask("GET", "/events")
    assert (status, document["error"]["code"]) == (503, "agent.busy")
    for reader in readers:
        reader.close()
    wait_for(lambda: not agent.api._streams)
    with agent.client.events() as events:
        assert events.status == 200


def test_a_reader_that_does_not_read_loses_its_connection_and_blocks_nobody(agent: Agent) -> None:
    with agent.client.events() as slow, agent.client.events() as quick:
        wait_for(lambda: agent.api._streams == 2)
        for number in range(1, 400):
            agent.api.tell(CloudMessage(number, {}, b"x" * 4000))
            event_id = quick.next()["id"]
            assert event_id.endswith(f"-{number}") and agent.client.ask("POST", f"/events/{event_id}/done")[0] == 200
        wait_for(lambda: agent.api._streams == 1)
        assert slow.status == 200


def test_a_reader_hears_something_now_and_then_and_one_that_is_gone_is_noticed(
    agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "HEARTBEAT_S", 0.05)
    with agent.client.connect() as connection:
        connection.sendall(b"GET /events HTTP/1.1\r\n\r\n")
        seen = b""
        while seen.count(b"1\r\n\n\r\n") < 3:
            seen += connection.recv(1000)
    wait_for(lambda: not agent.api._clients)


def test_a_program_that_goes_away_leaves_nothing_behind(agent: Agent) -> None:
    agent.accepts = None
    before = open_sockets()
    for _ in range(50):
        with agent.client.connect() as connection:
            connection.sendall(b"POST /telemetry HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}")
    wait_for(lambda: not agent.api._clients and not agent.api._pending)
    wait_for(lambda: open_sockets() <= before)


def test_an_unforeseen_error_costs_one_connection(agent: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(query: str) -> dict[str, str]:
        raise ZeroDivisionError("hunter2")

    with monkeypatch.context() as patch:
        patch.setattr(routes, "_query", broken)
        assert raw(agent, b"GET /status HTTP/1.1\r\n\r\n") == b""
    assert agent.client.ask("GET", "/status")[0] == 200
    assert "ZeroDivisionError" in agent.said.getvalue() and "hunter2" not in agent.said.getvalue()


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), MemoryError()], ids=["no watch", "no memory"])
def test_what_fails_while_a_connection_is_let_in_costs_that_connection_alone(
    error: Exception, agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full:
        """An epoll that takes nothing more."""

        def __init__(self, poll: Any) -> None:
            self._poll = poll

        def register(self, *_what: object) -> None:
            raise error

        def __getattr__(self, name: str) -> Any:
            return getattr(self._poll, name)

    def fails(_connection: socket.socket) -> Peer:
        raise error

    for where, name, broken in ((server, "peer_of", fails), (agent.server, "_poll", Full(agent.api._poll))):
        with monkeypatch.context() as patch:
            patch.setattr(where, name, broken)
            agent.api.look()  # it waits in the one that it knows
            assert raw(agent, b"") == b"", "it was closed, not forgotten"
        assert agent.client.ask("GET", "/status")[0] == 200
    wait_for(lambda: not agent.api._clients and agent.api._places.of(os.geteuid()) == 0)


def test_an_unforeseen_error_between_two_clients_costs_nobody_anything(
    agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = threading.Event()

    def fails() -> float:
        failed.set()
        raise MemoryError

    with agent.client.connect() as connection:
        with monkeypatch.context() as patch:
            patch.setattr(agent.server, "_broadcast", fails)
            agent.api.tell(CloudMessage(1, {}, b""))
            assert failed.wait(60)
        connection.sendall(b"GET /status HTTP/1.1\r\n\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 200 ")


def test_no_descriptor_left_is_no_end(agent: Agent) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    spare = [os.dup(0)]
    gc.collect()  # what other tests left is not to warn, and import for it, while there is no descriptor
    gc.disable()
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(int(name) for name in os.listdir("/proc/self/fd")) + 8, hard))
        with contextlib.suppress(OSError):
            while True:
                spare.append(os.dup(0))
        os.close(spare.pop())  # one for us, none for the service
        with agent.client.connect() as connection:
            connection.sendall(b"GET /status HTTP/1.1\r\n\r\n")
            connection.settimeout(0.3)
            with pytest.raises(TimeoutError):
                connection.recv(1)
            while spare:
                os.close(spare.pop())
            connection.settimeout(60)
            assert connection.recv(1000).startswith(b"HTTP/1.1 200 ")
    finally:
        gc.enable()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for descriptor in spare:
            os.close(descriptor)


def test_the_limits_are_the_designed_ones() -> None:
    assert (server.REQUEST_LIMIT_S, server.SEND_LIMIT_S, server.IDLE_LIMIT_S) == (10, 10, 60)
    for in_all, of_one, kept in (server.CLIENTS, server.STREAMS, server.UNDER_WAY, server.BYTES):
        assert 4 * of_one <= in_all - kept and kept > 0, "four users at their limits leave the kept places alone"
    assert server.UNDER_WAY[0] == IN_FLIGHT_LIMIT and server.BYTES[1] >= server.BODY_LIMIT >= TELEMETRY_LIMIT
    waiting = server.UNDER_WAY[0] + MESSAGE_LIMIT + CALL_LIMIT + 1
    assert waiting <= mqtt.POSTS_LIMIT, "whatever programs have asked for finds room in the hub's queue"


# --- who asks


@pytest.fixture
def users(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Whoever connects next is this user; by default somebody who is not trusted."""
    user = [1000]
    monkeypatch.setattr(server, "peer_of", lambda _connection: Peer(4711, user[0], 100))
    monkeypatch.setattr(server.os, "geteuid", lambda: 990)
    return user


@contextlib.contextmanager
def half_requests(agent: Agent, count: int) -> Iterator[None]:
    """So many connections that have sent one byte."""

    def begun() -> int:
        return sum(client.has_begun() for client in list(agent.api._clients.values()))

    before = begun()
    with contextlib.ExitStack() as held:
        for _ in range(count):
            held.enter_context(agent.client.connect()).sendall(b"G")
        wait_for(lambda: begun() == before + count)
        yield


def assert_too_many(agent: Agent) -> None:
    head, _, body = raw(agent, b"").partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 503 ") and b"Retry-After: 5" in head
    error = json.loads(body)["error"]
    assert (error["code"], error["retryAfterS"]) == ("agent.busy", 5) and error["remedy"]


def test_one_user_cannot_take_every_connection(agent: Agent, users: list[int]) -> None:
    with half_requests(agent, server.CLIENTS[1]):
        assert_too_many(agent)
        users[0] = 1001
        assert agent.client.ask("GET", "/status")[0] == 200


def test_users_at_their_limits_leave_room_for_another_and_for_root(agent: Agent, users: list[int]) -> None:
    in_all, of_one, kept = server.CLIENTS
    with contextlib.ExitStack() as crowd:
        for users[0] in range(1000, 1000 + (in_all - kept) // of_one):
            crowd.enter_context(half_requests(agent, of_one))
        for users[0] in (0, 990, 2000):  # the last one makes one of the others lose a request that has not come whole
            assert agent.client.ask("GET", "/status")[0] == 200
        users[0] = 0
        crowd.enter_context(half_requests(agent, kept))
        assert agent.client.ask("GET", "/status")[0] == 200, "root finds room even then"


def test_the_command_line_hears_that_too_many_are_connected(agent: Agent) -> None:
    with half_requests(agent, server.CLIENTS[0]):
        for _ in range(20):  # whether its request is refused before or after it was written
            with pytest.raises(RetryLater) as refused:
                running._checked(running._exchange(agent.api.path, "POST /command/token", 5))
            assert (refused.value.code, refused.value.retry_after_s) == ("agent.busy", 5)


def test_the_first_request_of_a_process_is_one_line_with_its_number_and_user(agent: Agent) -> None:
    with agent.client.connect():
        wait_for(lambda: agent.api._clients)
        assert "uses the socket" not in agent.said.getvalue(), "it has asked for nothing"
    for _ in range(3):
        agent.client.ask("GET", "/status")
    line = f"process {os.getpid()} of user {os.getuid()} uses the socket"
    assert agent.said.getvalue().count(line) == 1


def test_a_client_that_says_no_more_is_answered(agent: Agent) -> None:
    with agent.client.connect() as connection:
        connection.sendall(b"POST /telemetry HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}GET /status HTTP/1.1\r\n\r\n")
        connection.shutdown(socket.SHUT_WR)
        answer = b""
        while part := connection.recv(65536):
            answer += part
    assert answer.count(b"HTTP/1.1 200 OK") == 2
    wait_for(lambda: not agent.api._clients)


def test_a_client_that_says_no_more_in_the_middle_of_a_request_is_dropped(agent: Agent) -> None:
    with agent.client.connect() as connection:
        connection.sendall(b"POST /telemetry HTTP/1.1\r\nContent-Length: 3\r\n\r\n{}")
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(1000) == b""
    assert agent.posted == []


def test_a_client_that_says_no_more_waits_without_cost(agent: Agent) -> None:
    agent.accepts = None
    with agent.client.connect() as connection:
        connection.sendall(b"POST /telemetry HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}")
        connection.shutdown(socket.SHUT_WR)
        wait_for(lambda: agent.posted)
        began_s = time.process_time()
        time.sleep(0.3)
        assert time.process_time() - began_s < 0.15
        agent.api.tell(TelemetryDone(agent.posted[0].request_id, True, True))
        assert connection.recv(1000).startswith(b"HTTP/1.1 200 ")


def test_a_reader_of_events_that_says_no_more_still_reads(agent: Agent) -> None:
    with agent.client.connect() as connection:
        connection.sendall(b"GET /events HTTP/1.1\r\n\r\n")
        connection.shutdown(socket.SHUT_WR)
        wait_for(lambda: agent.api._streams)
        agent.api.tell(CloudMessage(1, {}, b"still here"))
        seen = b""
        while b"still here" not in seen:
            seen += connection.recv(1000)


def test_nothing_of_a_body_or_a_token_is_logged(agent: Agent) -> None:
    agent.client.ask("POST", "/telemetry?secret=hunter2", b"hunter2")
    assert "POST /telemetry" in agent.said.getvalue() and "hunter2" not in agent.said.getvalue()


# --- what an answer means


def test_an_id_is_never_that_of_another_process_connection_or_kind(agent: Agent, tmp_path: Path) -> None:
    later = Agent(tmp_path / "restarted")
    later.api.forget()  # the same connection and the same number in both
    assert agent.api.tell(CloudMessage(1, {}, b"B")) and later.api.tell(CloudMessage(1, {}, b"C"))
    with agent.client.events() as events:
        before = events.next("message")["id"]
        agent.api.forget()
        agent.api.tell(CloudMessage(1, {}, b"B"))
        wait_for(lambda: agent.api.tell(MethodCall(2, "open", b"{}")))
        message, call = events.next("message")["id"], events.next("method")["id"]
    strange = [f"/events/{call}/done", f"/methods/{message}", f"/events/{before}/done", f"/events/{before[:-1]}/done"]
    assert [agent.client.ask("POST", target)[0] for target in strange] == [404] * 4
    assert later.client.ask("POST", f"/events/{message}/done")[0] == 404, "it was the other process's"
    assert agent.posted == later.posted == []
    later.api.close()


def test_what_the_service_does_not_take_is_not_called_done_and_may_be_asked_again(agent: Agent) -> None:
    with agent.client.events() as events:
        wait_for(lambda: agent.api.tell(MethodCall(2, "open", b"{}")))
        agent.api.tell(CloudMessage(1, {}, b"B"))
        targets = [f"/methods/{events.next('method')['id']}", f"/events/{events.next('message')['id']}/done"]
    agent.full = True
    for target in targets:
        status, document = agent.client.ask("POST", target)
        assert (status, document["error"]["code"], agent.client.headers["retry-after"]) == (503, "agent.busy", "5")
    agent.full = False
    assert [agent.client.ask("POST", target)[0] for target in targets] == [200, 200]
    assert agent.posted == [AnswerMethod(2, 200, b""), MessageDone(1)]


def test_what_was_never_sent_is_not_said_to_be_perhaps_at_the_hub(
    agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent.accepts, agent.sent = False, False
    status, document = agent.client.ask("POST", "/telemetry", b"{}")
    assert (status, document["error"]["code"]) == (503, "agent.not_sent") and "not sent" in document["error"]["message"]
    agent.sent = True
    assert "a message of user" not in agent.said.getvalue()
    assert "may or may not" in agent.client.ask("POST", "/telemetry", b"{}")[1]["error"]["message"]
    assert agent.said.getvalue().count("was given up: the hub did not acknowledge it, and may have it") == 1
    agent.accepts, agent.takes_its_time = None, True
    monkeypatch.setattr(routes, "TELEMETRY_LIMIT_S", 0.2)
    status, document = agent.client.ask("POST", "/telemetry", b"{}")
    assert (status, document["error"]["code"]) == (503, "agent.not_sent")
    assert agent.waiting == [], "and nobody will send it"


def test_what_a_client_that_has_gone_asked_for_is_dropped_unless_it_was_begun(agent: Agent, users: list[int]) -> None:
    agent.accepts = None
    for agent.takes_its_time in (True, False):
        with agent.client.connect() as connection:
            connection.sendall(b"POST /telemetry HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}")
            wait_for(lambda: agent.posted)
        wait_for(lambda: not agent.api._clients)
        begun = [] if agent.takes_its_time else [agent.posted[-1].request_id]
        assert list(agent.api._under_way) == begun and agent.waiting == []
        assert agent.api._bytes.of(users[0]) == len(begun) * (len(telemetry_topic("press-07", {})) + 2)
        agent.posted.clear()
    agent.api.tell(TelemetryDone(begun[0], False, True))
    wait_for(lambda: not agent.api._under_way)
    assert agent.api._bytes.of(users[0]) == agent.api._hub_places.of(users[0]) == 0


# --- shares


def refusal_of(agent: Agent, head: bytes) -> bytes:
    """What is answered to a head alone."""
    with agent.client.connect() as connection:
        connection.sendall(head + b"\r\n\r\n")
        return connection.recv(1000)


@contextlib.contextmanager
def under_way(agent: Agent, count: int, size: int) -> Iterator[list[socket.socket]]:
    """So many telemetry messages of this size that wait for the hub's answer."""
    before = len(agent.posted)
    with contextlib.ExitStack() as held:
        connections = [held.enter_context(agent.client.connect()) for _ in range(count)]
        for connection in connections:
            connection.sendall(b"POST /telemetry HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % size + bytes(size))
        wait_for(lambda: len(agent.posted) == before + count)
        yield connections


def test_one_user_cannot_take_every_place_for_telemetry_and_none_takes_those_of_root(
    agent: Agent, users: list[int]
) -> None:
    agent.accepts = None
    in_all, of_one, kept = server.UNDER_WAY
    one = b"POST /telemetry HTTP/1.1\r\nContent-Length: 1"
    with contextlib.ExitStack() as crowd:
        for users[0] in range(1000, 1000 + (in_all - kept) // of_one):
            crowd.enter_context(under_way(agent, of_one, 1))
            agent.server._places = Places(200, 200, 1)  # this is not about connections
            answer = refusal_of(agent, one)
            assert answer.startswith(b"HTTP/1.1 503") and b"Retry-After: 5" in answer and b"it was not sent" in answer
        users[0] = 0
        with under_way(agent, kept, 1):
            assert refusal_of(agent, one).startswith(b"HTTP/1.1 503")


def test_bytes_under_way_are_a_users_share_and_come_back_with_the_answer(agent: Agent, users: list[int]) -> None:
    agent.accepts = None
    large = server.BODY_LIMIT - 100
    head = b"POST /telemetry HTTP/1.1\r\nContent-Length: %d" % large
    with under_way(agent, 2, large) as connections:
        answer = refusal_of(agent, head)
        assert answer.startswith(b"HTTP/1.1 503") and b"Retry-After: 5" in answer
        users[0] = 1001
        with under_way(agent, 1, large):
            pass
        users[0] = 1000
        agent.api.tell(TelemetryDone(agent.posted[0].request_id, True, True))
        assert connections[0].recv(1000).startswith(b"HTTP/1.1 200")
        with under_way(agent, 1, large):
            assert refusal_of(agent, head).startswith(b"HTTP/1.1 503")


def test_topics_count_as_much_as_bodies(agent: Agent, users: list[int]) -> None:
    agent.accepts = None
    target = "/telemetry?a=" + "b" * 1000
    topic_size = len(telemetry_topic("press-07", {"a": "b" * 1000}))
    with agent.client.connect() as connection:
        connection.sendall(f"POST {target} HTTP/1.1\r\nContent-Length: 2\r\n\r\n{{}}".encode())
        wait_for(lambda: agent.posted)
        assert agent.api._bytes.of(users[0]) == topic_size + 2
        agent.api.tell(TelemetryDone(agent.posted[0].request_id, True, True))
        assert connection.recv(1000).startswith(b"HTTP/1.1 200")
    assert agent.api._bytes.of(users[0]) == 0


def test_what_is_kept_for_root_is_kept_in_the_hub_s_session_too(agent: Agent, users: list[int]) -> None:
    agent.accepts = None
    full = TELEMETRY_LIMIT - len(telemetry_topic("press-07", {}))  # two of them, topics included, are a user's share
    world = World()
    with contextlib.ExitStack() as crowd:
        for users[0] in (1000, 1001, 1002, 1003, 0):
            crowd.enter_context(under_way(agent, 2, full))
            assert agent.api._bytes.of(users[0]) == 2 * TELEMETRY_LIMIT
        world.hub.mute_pubacks = True
        world.at(world.uptime_s + 20, lambda: world.post(*agent.posted))
        world.end_at(world.uptime_s + 30)
        world.run(Lifecycle(settings()).live(False, False, True))
        assert len(world.hub.received) == 10 and world.program.done == {}, "all of them are under way to the hub"


def test_readers_of_events_are_a_users_share(agent: Agent, users: list[int]) -> None:
    with contextlib.ExitStack() as readers:
        for users[0] in range(1000, 1004):
            for _ in range(server.STREAMS[1]):
                readers.enter_context(agent.client.events())
            assert agent.client.ask("GET", "/events")[0] == 503
        users[0] = 0
        assert readers.enter_context(agent.client.events()).status == 200


def test_a_body_for_an_id_that_is_none_is_not_waited_for_and_not_kept(agent: Agent, users: list[int]) -> None:
    with agent.client.connect() as connection:
        connection.sendall(b"POST /methods/0-1-1 HTTP/1.1\r\nContent-Length: 131072\r\n\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 404 ")
        assert agent.api._bytes.of(users[0]) == 0
        connection.sendall(bytes(131072) + b"GET /status HTTP/1.1\r\n\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 200 "), "what came behind it is a request"
        connection.sendall(b"GET /status HTTP/1.1\r\nContent-Length: 131072\r\n\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 413 ")


def test_requests_that_are_refused_may_come_by_the_thousand_at_once(agent: Agent) -> None:
    answer = raw(agent, b"GET /nothing HTTP/1.1\r\n\r\n" * 3000 + b"GET /no HTTP/1.1\r\nConnection: close\r\n\r\n")
    assert answer.count(b"HTTP/1.1 404 ") == 3001
    assert "agent.bug" not in agent.said.getvalue()


def test_telemetry_that_cannot_even_wait_may_come_by_the_thousand_at_once(agent: Agent) -> None:
    agent.full = True
    answer = raw(agent, b"POST /telemetry HTTP/1.1\r\nContent-Length: 1\r\n\r\n." * 1000 + b"GET /no HTTP/1.0\r\n\r\n")
    assert (answer.count(b"HTTP/1.1 503 "), answer.count(b"HTTP/1.1 404 ")) == (1000, 1)
    assert not agent.api._pending and not agent.api._under_way
    assert agent.api._bytes.of(os.geteuid()) == agent.api._hub_places.of(os.geteuid()) == 0
    agent.full = False
    assert agent.client.ask("POST", "/telemetry", b"{}")[0] == 200


def test_requests_by_the_thousand_keep_nobody_else_waiting(agent: Agent) -> None:
    with agent.client.connect() as connection:
        connection.sendall(b"GET /nothing HTTP/1.1\r\n\r\n" * 500)
        wait_for(lambda: agent.api._unfinished or connection.recv(1, socket.MSG_PEEK))
        assert agent.client.ask("GET", "/status")[0] == 200


def test_a_crowd_at_the_socket_does_not_keep_root_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "BACKLOG", 16)
    agent = Agent(tmp_path, start=False)
    assert stat.S_IMODE(os.lstat(agent.api.path + ROOT_SUFFIX).st_mode) == 0o600
    with contextlib.ExitStack() as crowd:
        with pytest.raises(BlockingIOError):
            while True:
                waiting = crowd.enter_context(socket.socket(socket.AF_UNIX))
                waiting.setblocking(False)
                waiting.connect(agent.api.path)
        started = threading.Timer(0.1, agent.api.start)
        started.start()
        assert running._checked(running._exchange(agent.api.path, "POST /command/status", 10)) == {"did": "status"}
        started.join()
    agent.api.close()
    assert os.listdir(os.path.dirname(agent.api.path)) == []


def test_who_has_gone_before_he_is_let_in_displaces_nobody(tmp_path: Path, users: list[int]) -> None:
    agent = Agent(tmp_path, start=False)
    with contextlib.ExitStack() as held:
        idle = [held.enter_context(agent.client.connect()) for _ in range(server.CLIENTS[1])]
        for _ in range(30):
            with agent.client.connect() as gone:
                gone.sendall(b"GET /events HTTP/1.1\r\n\r\n")
        agent.api.start()
        wait_for(lambda: len(agent.api._clients) == server.CLIENTS[1])
        users[0] = 0
        assert agent.client.ask("GET", "/status")[0] == 200
        for connection in idle:
            connection.sendall(b"GET /status HTTP/1.1\r\n\r\n")
            assert connection.recv(1000).startswith(b"HTTP/1.1 200 ")
    agent.api.close()


def test_a_command_line_that_finds_no_room_to_wait_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "BACKLOG", 1)
    agent = Agent(tmp_path, start=False)
    os.unlink(agent.api.path + ROOT_SUFFIX)  # as of a service of an earlier version, or for who is not root
    monkeypatch.setattr(statefile, "read_live", lambda _configuration: {"socket": agent.api.path})
    with contextlib.ExitStack() as crowd:
        for _ in range(2):
            crowd.enter_context(agent.client.connect())
        with pytest.raises(RetryLater) as refused:
            running.ask_service(load("/dev/null", environ={"DPS_AGENT_ID_SCOPE": "0ne00000000"}), "/command/status")
    assert refused.value.code == "agent.busy"
    agent.api.start()
    agent.api.close()


def test_users_are_told_apart_by_what_the_kernel_says_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    others: dict[int, int] = {}  # process -> user, where this one may not become another
    real = server.peer_of

    def peer_of(connection: socket.socket) -> Peer:
        peer = real(connection)
        return peer._replace(user=others.get(peer.process, peer.user))

    monkeypatch.setattr(server, "peer_of", peer_of)
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        os.chmod(folder, 0o755)
        agent = Agent(Path(folder))
        os.chmod(agent.api.path, 0o666)  # stands for membership in the group
        held_by_three_users(agent, others)
        agent.api.close()


def held_by_three_users(agent: Agent, others: dict[int, int]) -> None:
    """Three users hold all connections that they may, and another one is served."""
    children = []
    ready, tell_ready = os.pipe()
    for user in (10001, 10002, 10003):
        child = os.fork()
        if not child:
            with contextlib.suppress(BaseException):
                if not os.getuid():
                    os.setgroups([])
                    os.setgid(user)
                    os.setuid(user)
                held = [agent.client.connect() for _ in range(server.CLIENTS[1])]
                for connection in held:
                    connection.sendall(b"POST /telemetry HTTP/1.1\r\nContent-Length: 9\r\n\r\nhalf")
                os.write(tell_ready, b"x")
                time.sleep(60)
            os._exit(0)
        children.append(child)
        if os.getuid():
            others[child] = user
    try:
        assert b"".join(os.read(ready, 1) for _ in children) == b"xxx"
        wait_for(lambda: len(agent.api._clients) == 3 * server.CLIENTS[1])
        assert {client.peer.user for client in agent.api._clients.values()} == {10001, 10002, 10003}
        assert agent.client.ask("GET", "/status")[0] == 200
    finally:
        for child in children:
            os.kill(child, 9)
            os.waitpid(child, 0)
        os.close(ready)
        os.close(tell_ready)


# --- lines


def test_a_user_is_a_line_a_day_through_however_many_processes(agent: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    number = [1]
    monkeypatch.setattr(server, "peer_of", lambda _connection: Peer(number[0], 1000, 100))
    for number[0] in range(1, 61):
        agent.client.ask("POST", "/telemetry", b"1")
        agent.client.events().close()
    said = agent.said.getvalue()
    assert said.count("uses the socket") == said.count("reads the events") == 1
    assert "process 1 of user 1000 uses the socket" in said
    for kind in ("use", "events"):
        due_s, left_out = agent.api._lines._next[1000, kind]
        assert due_s - time.monotonic() > 86400 - 600 and left_out


def test_a_program_that_posts_each_minute_is_a_line_a_day() -> None:
    said = io.StringIO()
    lines = Lines(Journal(said, environ={}))
    for minute in range(3 * 1440 + 1):
        lines.say(1000, "use", "it is used", minute * 60.0, every_s=USE_EVERY_S)
    assert said.getvalue() == "it is used\n" + 3 * "it is used; 1439 more such lines were left out\n"


def test_what_was_left_out_is_counted_in_the_next_line_and_users_without_end_share_one() -> None:
    said = io.StringIO()
    lines = Lines(Journal(said, environ={}))
    for at_s in range(61):
        lines.say(1000, "use", "it is used", at_s * 60.0)
    assert said.getvalue() == "it is used\nit is used; 59 more such lines were left out\n"
    for user in range(2000, 4000):
        lines.say(user, "use", f"used by {user}", 3600.0)
    assert said.getvalue().count("used by") <= shares.LINES_LIMIT + 1
    lines.say(5000, "use", "later", 1e6)
    assert said.getvalue().endswith("later\n")
