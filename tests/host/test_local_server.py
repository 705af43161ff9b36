"""The socket for other programs on the device, without a hub: what it accepts, what it bounds, whom it trusts."""

import base64
import contextlib
import io
import json
import os
import resource
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dps_agent.host.cli import running
from dps_agent.host.journal import Journal
from dps_agent.host.local import events as event_module
from dps_agent.host.local import routes, server
from dps_agent.host.local.routes import Command, Snapshot
from dps_agent.host.local.server import LocalServer, listen
from dps_agent.hub_effects import (
    AnswerMethod,
    CloudMessage,
    Desired,
    MessageDone,
    MethodCall,
    SendTelemetry,
    TelemetryDone,
)
from dps_agent.session import TELEMETRY_LIMIT
from dps_hal.errors import RetryLater
from support.local_client import LocalClient

STATUS = {"state": "connected", "reason": "connected to h"}
ASSIGNMENT = {"assignedHub": "h.azure-devices.net", "deviceId": "press-07"}


class Agent:
    """A socket whose service is this object: it notes what is asked for and answers as it is told."""

    def __init__(self, folder: Path, allow_token: bool = False) -> None:
        self.posted: list[Any] = []
        self.commands: list[Command] = []
        self.said = io.StringIO()
        self.accepts: bool | None = True  # None: no answer
        self.full = False
        self.api = LocalServer(
            str(folder / "run" / "api.sock"),
            allow_token=allow_token,
            post=self._post,
            command=self._command,
            journal=Journal(self.said, True, {}),
        )
        self.client = LocalClient(self.api.path, 10)
        self.connect()
        self.api.start()

    def connect(self, connected: bool = True, retry_after_s: int = 7) -> None:
        self.api.show(Snapshot(STATUS, ASSIGNMENT, connected, retry_after_s))

    def _post(self, event: Any) -> bool:
        if self.full:
            return False
        self.posted.append(event)
        if isinstance(event, SendTelemetry) and self.accepts is not None:
            self.api.tell(TelemetryDone(event.request_id, self.accepts, True))
        return True

    def _command(self, command: Command) -> None:
        self.commands.append(command)
        self.api.answer(command.request_id, 200, {"did": command.name})


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[Agent]:
    found = Agent(tmp_path)
    yield found
    found.api.close()
    assert not found.api._thread.is_alive()


def wait_for(condition: Callable[[], object], within_s: float = 5) -> None:
    until_s = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < until_s, "it did not happen in time"
        time.sleep(0.005)


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
    agent.api.tell(TelemetryDone(agent.posted[-1].request_id, True, True))  # too late, and no harm
    assert agent.client.ask("GET", "/status")[0] == 200


def test_telemetry_that_cannot_even_wait_is_503_at_once(agent: Agent) -> None:
    agent.full = True
    status, document = agent.client.ask("POST", "/telemetry", b"{}")
    assert (status, document["error"]["code"]) == (503, "agent.busy")


def test_telemetry_that_never_fits_is_413_before_it_is_posted_and_says_what_would(agent: Agent) -> None:
    room = TELEMETRY_LIMIT - len("devices/press-07/messages/events/a=1")
    status, document = agent.client.ask("POST", "/telemetry?a=1", bytes(room + 1))
    assert (status, document["error"]["code"]) == (413, "agent.too_large") and document["error"]["remedy"]
    assert str(room) in document["error"]["message"] and agent.posted == []
    assert agent.client.ask("POST", "/telemetry?a=1", bytes(room))[0] == 200
    assert agent.client.ask("POST", "/telemetry?a=%ED%A0%80", b"{}")[0] in (200, 400), "no 503, which asks for more"


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
        thread.join(10)
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
        assert [events.next()["whole"], events.next()["whole"]] == [True, False]
    with agent.client.events() as later:
        wanted = {"a": {"c": 2}, "d": 4, "$version": 2}
        assert later.next() == {"event": "desired", "version": 2, "whole": True, "properties": wanted}


# --- whom it trusts


def test_tokens_are_off_by_default_even_for_root(agent: Agent) -> None:
    status, document = agent.client.ask("POST", "/token")
    assert (status, document["error"]["code"]) == (403, "agent.denied")
    assert agent.commands == []


def test_tokens_are_short_and_few(tmp_path: Path) -> None:
    agent = Agent(tmp_path, allow_token=True)
    assert [agent.client.ask("POST", f"/token?life={life}")[0] for life in ("901", "0", "soon", "-1")] == [400] * 4
    found = [agent.client.ask("POST", "/token?life=60")[0] for _ in range(8)]
    assert found == [200] * 6 + [429] * 2
    assert 0 < int(agent.client.headers["retry-after"]) <= 61
    assert [(command.name, command.life_s) for command in agent.commands] == [("token", 60)] * 6
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
        (b"GET /status HTTP/1.1\r\nA: 1\r\nA: 2\r\n\r\n", 400),
        (b"GET /status HTTP/1.1\r\n folded: 1\r\n\r\n", 400),
        (b"GET /status HTTP/1.1\r\nA: " + b"x" * 9000, 431),
        (b"POST /telemetry HTTP/1.1\r\nContent-Length: -1\r\n\r\n", 400),
        (b"POST /telemetry HTTP/1.1\r\nContent-Length: 1x\r\n\r\n", 400),
        (b"POST /telemetry HTTP/1.1\r\nContent-Length: 262145\r\n\r\n", 413),
        (b"POST /telemetry HTTP/1.1\r\nContent-Length: 99999999999999999999\r\n\r\n", 413),
        (b"POST /telemetry HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n", 501),
    ],
)
def test_what_is_no_request_is_refused_and_the_connection_ends(request_: bytes, status: int, agent: Agent) -> None:
    answer = raw(agent, request_)
    assert answer.startswith(b"HTTP/1.1 %d " % status), answer
    assert b"Connection: close" in answer and json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["message"]


@pytest.mark.parametrize(
    ("method", "target", "status"),
    [
        ("GET", "/", 404),
        ("GET", "/nothing", 404),
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
    monkeypatch.setattr(server, "REQUEST_LIMIT_S", 0.3)
    began_s = time.monotonic()
    with agent.client.connect() as connection:
        for byte in b"GET /status HTTP/1.1\r\n":
            connection.send(bytes([byte]))
            time.sleep(0.03)
            if time.monotonic() - began_s > 0.25:
                break
        assert connection.recv(1000).startswith(b"HTTP/1.1 408 ")
        assert connection.recv(1000) == b""
    assert time.monotonic() - began_s < 2


def test_connections_are_few_and_idle_ones_make_room(agent: Agent) -> None:
    idle = [agent.client.connect() for _ in range(40)]
    assert agent.client.ask("GET", "/status")[0] == 200
    busy = [agent.client.connect() for _ in range(server.CLIENT_LIMIT)]
    for connection in busy:
        connection.sendall(b"POST /telemetry HTTP/1.1\r\nContent-Length: 9\r\n\r\n")
    wait_for(lambda: len(agent.api._clients) == server.CLIENT_LIMIT)
    time.sleep(0.1)
    assert raw(agent, b"").startswith(b"HTTP/1.1 503 ")
    for connection in [*idle, *busy]:
        connection.close()
    wait_for(lambda: not agent.api._clients)
    assert agent.client.ask("GET", "/status")[0] == 200


def test_readers_of_events_are_few(agent: Agent) -> None:
    readers = [agent.client.events() for _ in range(server.STREAM_LIMIT)]
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
            assert quick.next()["id"] == f"0-{number}"
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
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(50):
        with agent.client.connect() as connection:
            connection.sendall(b"POST /telemetry HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}")
    wait_for(lambda: len(agent.posted) == 50 or not agent.api._clients)
    wait_for(lambda: not agent.api._clients and not agent.api._pending)
    assert len(os.listdir("/proc/self/fd")) <= before


def test_an_unforeseen_error_costs_one_connection(agent: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(query: str) -> dict[str, str]:
        raise ZeroDivisionError("hunter2")

    with monkeypatch.context() as patch:
        patch.setattr(routes, "_query", broken)
        assert raw(agent, b"GET /status HTTP/1.1\r\n\r\n") == b""
    assert agent.client.ask("GET", "/status")[0] == 200
    assert "ZeroDivisionError" in agent.said.getvalue() and "hunter2" not in agent.said.getvalue()


def test_no_descriptor_left_is_no_end(agent: Agent) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    spare = [os.dup(0)]
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
            connection.settimeout(5)
            assert connection.recv(1000).startswith(b"HTTP/1.1 200 ")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for descriptor in spare:
            os.close(descriptor)


def test_the_limits_are_the_designed_ones() -> None:
    assert (server.REQUEST_LIMIT_S, server.SEND_LIMIT_S, server.IDLE_LIMIT_S) == (10, 10, 60)
    assert (server.CLIENT_LIMIT, server.USER_LIMIT, server.KEPT) == (16, 8, 2)


# --- who asks


@pytest.fixture
def users(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Whoever connects next is this user; by default somebody who is not trusted."""
    user = [1000]
    monkeypatch.setattr(server, "peer_of", lambda _connection: (4711, user[0], 100))
    monkeypatch.setattr(server.os, "geteuid", lambda: 990)
    return user


@contextlib.contextmanager
def half_requests(agent: Agent, count: int) -> Iterator[None]:
    """So many connections that have sent one byte."""

    def begun() -> int:
        return sum(bool(client.received) for client in list(agent.api._clients.values()))

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
    with half_requests(agent, server.USER_LIMIT):
        assert_too_many(agent)
        users[0] = 1001
        assert agent.client.ask("GET", "/status")[0] == 200


def test_all_users_together_leave_room_for_root_and_the_services_own(agent: Agent, users: list[int]) -> None:
    with half_requests(agent, 7):
        users[0] = 1001
        with half_requests(agent, 7):
            users[0] = 1002
            assert_too_many(agent)
            for users[0] in (0, 990):
                assert agent.client.ask("GET", "/status")[0] == 200
            with half_requests(agent, server.KEPT):
                assert_too_many(agent)


def test_the_command_line_hears_that_too_many_are_connected(agent: Agent) -> None:
    with half_requests(agent, server.CLIENT_LIMIT):
        for _ in range(20):  # whether its request is refused before or after it was written
            with pytest.raises(RetryLater) as refused:
                running._checked(running._post(agent.api.path, "/command/token", 5))
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
