"""The emulator on the wire: connections, certificates, the log, and faults that are real."""

from __future__ import annotations

import ast
import asyncio
import contextlib
import http.client
import json
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from dps_emulator import http_protocol, server
from dps_emulator.enrollments import Enrollment
from dps_emulator.faults import Fault, FaultScript, FaultScriptError, read_fault_script
from dps_emulator.server import LogLine
from dps_emulator.service import Settings
from dps_emulator.web import site
from emulator.device_side import (
    API,
    ActivatedKey,
    Client,
    Device,
    lookup_path,
    operation_path,
    register_path,
)
from support.cloud.emulator import EmulatorInThread

DEVICE = Device.of_the_vectors()
RID = DEVICE.registration_id
BODY = {"registrationId": RID, "tpm": DEVICE.attestation()}


@pytest.fixture(scope="module")
def shared() -> Iterator[EmulatorInThread]:
    with EmulatorInThread(Settings(retry_after_s=0), [Enrollment(RID, DEVICE.ek_public)]) as emulator:
        yield emulator


@pytest.fixture
def emulator(shared: EmulatorInThread) -> EmulatorInThread:
    shared.script()
    shared.log.clear()
    return shared


@pytest.fixture
def client(emulator: EmulatorInThread) -> Iterator[Client]:
    with Client(emulator.port, emulator.ca_file) as client:
        yield client


def token(key: ActivatedKey) -> str:
    return key.token(f"0ne00000000%2Fregistrations%2F{RID}", int(time.time()) + 60)


def challenge(client: Client) -> str:
    status, _, body = client.call("PUT", register_path(RID), BODY)
    assert status == 401, body
    return token(DEVICE.activate(body["authenticationKey"]))


def test_a_device_provisions_and_looks_up_on_one_connection(emulator: EmulatorInThread, client: Client) -> None:
    authorization = challenge(client)
    first_socket = client.connection.sock
    status, headers, body = client.call("PUT", register_path(RID), BODY, authorization)
    assert (status, headers["retry-after"]) == (202, "0") and headers["location"].startswith("https://127.0.0.1")
    # Node sends {} with its polls, others nothing: both must leave the connection usable.
    bodies: tuple[object, ...] = ({}, None, b" " * 300_000)
    for poll_body in bodies:
        status, _, final = client.call("GET", operation_path(RID, body["operationId"]), poll_body, authorization)
        assert (status, final["status"]) == (200, "assigned")
    status, _, found = client.call("POST", lookup_path(RID), BODY, authorization)
    assert status == 200 and found["assignedHub"] == "emulator.azure-devices.net"
    assert client.connection.sock is first_socket and first_socket is not None
    key = DEVICE.activate(found["tpm"]["authenticationKey"]).key
    assert key == emulator.service.hub_key("emulator.azure-devices.net", RID)


def test_the_log_has_a_line_a_request_and_no_secret(emulator: EmulatorInThread, client: Client) -> None:
    authorization = challenge(client)
    _, _, body = client.call("PUT", register_path(RID), BODY, authorization)
    client.call("GET", operation_path(RID, body["operationId"]), None, authorization)
    client.call("POST", lookup_path(RID), BODY, authorization)
    client.call("POST", lookup_path("not%20an%0Aid"), BODY, authorization)
    lines = [(line.method, line.operation, line.status, line.error_code) for line in emulator.log]
    assert lines == [
        ("PUT", "register", 401, 0),
        ("PUT", "register", 202, 0),
        ("GET", "operation", 200, 0),
        ("POST", "lookup", 200, 0),
        ("POST", "lookup", 400, 400001),
    ]
    assert [line.registration_id for line in emulator.log] == [RID] * 4 + ["not an\nid"]
    for line in emulator.log:
        assert LogLine.parse(line.text()) == line
        assert "\n" not in line.text() and authorization[-40:] not in line.text()


def test_other_lines_are_no_log_lines() -> None:
    assert LogLine.parse("dps-emulator: warning: method=PUT") is None and LogLine.parse("x") is None


@pytest.mark.parametrize(
    "name",
    [
        "localhost",
        "global.azure-devices-provisioning.net",
        "mine.azure-devices-provisioning.net",
        "emulator.azure-devices.net",
        "127.0.0.1",
    ],
)
def test_the_certificate_covers_service_and_hub(emulator: EmulatorInThread, name: str) -> None:
    context = ssl.create_default_context(cafile=str(emulator.ca_file))
    with (
        socket.create_connection(("127.0.0.1", emulator.port), 60) as plain,
        context.wrap_socket(plain, server_hostname=name) as wrapped,
    ):
        assert wrapped.version() in ("TLSv1.2", "TLSv1.3")


def test_a_certificate_of_another_name_is_not_offered(emulator: EmulatorInThread) -> None:
    context = ssl.create_default_context(cafile=str(emulator.ca_file))
    with (
        socket.create_connection(("127.0.0.1", emulator.port), 60) as plain,
        pytest.raises(ssl.SSLCertVerificationError),
    ):
        context.wrap_socket(plain, server_hostname="other.azure-devices.net")


def test_what_is_no_http_gets_400_and_a_closed_connection(emulator: EmulatorInThread) -> None:
    context = ssl.create_default_context(cafile=str(emulator.ca_file))
    with (
        socket.create_connection(("127.0.0.1", emulator.port), 60) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as wrapped,
    ):
        wrapped.sendall(b"\0\1\2\r\n\r\n")
        assert wrapped.recv(4096).startswith(b"HTTP/1.1 400")


# --- faults


def test_a_status_is_answered_instead_of_asking_the_service(emulator: EmulatorInThread, client: Client) -> None:
    emulator.script(
        Fault(request=1, operation="register", status=429, headers={"Retry-After": "9"}),
        Fault(request=2, method="PUT", status=503, body="<html>busy</html>", headers={"Content-Type": "text/html"}),
        Fault(request=3, operation="register", status=200, body=""),
        Fault(request=4, operation="register", body={"a": 1}),
    )
    status, headers, body = client.call("PUT", register_path(RID), BODY)
    assert (status, headers["retry-after"], body["errorCode"]) == (429, "9", 429001)
    status, headers, body = client.call("PUT", register_path(RID), BODY)
    assert (status, headers["content-type"], body) == (503, "text/html", b"<html>busy</html>")
    client.connection.request("PUT", register_path(RID) + API, json.dumps(BODY))
    response = client.connection.getresponse()
    assert (response.status, response.read()) == (200, b"")
    assert client.call("PUT", register_path(RID), BODY)[2] == {"a": 1}
    assert client.call("PUT", register_path(RID), BODY)[0] == 401
    assert [line.fault for line in emulator.log] == [1, 2, 3, 4, 0]


def test_headers_are_replaced_and_taken_away(emulator: EmulatorInThread, client: Client) -> None:
    authorization = challenge(client)
    emulator.script(Fault(headers={"retry-after": "soon", "DATE": None}))
    status, headers, _ = client.call("PUT", register_path(RID), BODY, authorization)
    assert (status, headers["retry-after"], "date" in headers) == (202, "soon", False)


def test_retry_after_can_be_a_date_behind_the_answer_s_own(emulator: EmulatorInThread, client: Client) -> None:
    emulator.script(Fault(status=429, retry_after_date_s=90), Fault())
    status, headers, _ = client.call("PUT", register_path(RID), BODY)
    until_s, now_s = (parsedate_to_datetime(headers[name]).timestamp() for name in ("retry-after", "date"))
    assert (status, until_s - now_s) == (429, 90) and headers["retry-after"].endswith(" GMT")


@pytest.mark.parametrize("count", [0, 1, 100])
def test_a_cut_leaves_the_promised_rest_unsent(emulator: EmulatorInThread, client: Client, count: int) -> None:
    emulator.script(Fault(request=1, cut_after_bytes=count))
    client.connection.request("PUT", register_path(RID) + API, json.dumps(BODY))
    response = client.connection.getresponse()
    assert response.status == 401 and int(response.headers["Content-Length"]) > 1000
    with pytest.raises(http.client.IncompleteRead) as caught:
        response.read()
    assert len(caught.value.partial) == count
    client.connection.close()
    assert client.call("PUT", register_path(RID), BODY)[0] == 401, "the next connection works"


def test_a_cut_before_the_answer_sends_nothing(emulator: EmulatorInThread, client: Client) -> None:
    authorization = challenge(client)
    emulator.script(Fault(cut_after_bytes=-1))
    before = emulator.service.registrations.get(RID)
    with pytest.raises(http.client.RemoteDisconnected):
        client.call("PUT", register_path(RID), BODY, authorization)
    assert emulator.service.registrations.get(RID) != before, "the service has done it: only the answer is lost"


@pytest.mark.parametrize("reset", [False, True])
def test_a_cut_ends_tcp_by_fin_or_by_reset(emulator: EmulatorInThread, reset: bool) -> None:
    # Over memory buffers: Python's own TLS sockets report a reset as an end of file.
    emulator.script(Fault(cut_after_bytes=3, reset=reset))
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    context = ssl.create_default_context(cafile=str(emulator.ca_file))
    tls = context.wrap_bio(incoming, outgoing, server_hostname="localhost")
    with socket.create_connection(("127.0.0.1", emulator.port), 60) as tcp:
        while True:
            try:
                tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                tcp.sendall(outgoing.read())
                incoming.write(tcp.recv(65536))
        tls.write(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        tcp.sendall(outgoing.read())
        with pytest.raises(ConnectionResetError) if reset else contextlib.nullcontext():
            while tcp.recv(65536):
                pass


def test_a_drip_arrives_slowly_and_whole(emulator: EmulatorInThread, client: Client) -> None:
    emulator.script(Fault(request=1, status=200, body={"a": 12345}, drip=20))
    started = time.monotonic()
    assert client.call("PUT", register_path(RID), BODY)[2] == {"a": 12345}
    assert time.monotonic() - started > 0.3


def test_a_chunked_answer_has_no_length(emulator: EmulatorInThread, client: Client) -> None:
    emulator.script(Fault(chunked=True, drip=5000))
    status, headers, body = client.call("PUT", register_path(RID), BODY)
    assert (status, headers["transfer-encoding"], "content-length" in headers) == (401, "chunked", False)
    DEVICE.activate(body["authenticationKey"])


def test_a_delay_is_waited_and_a_client_that_leaves_does_no_harm(emulator: EmulatorInThread, client: Client) -> None:
    emulator.script(Fault(request=1, delay_s=0.3), Fault(request=2, delay_s=0.3, drip=10))
    started = time.monotonic()
    client.call("PUT", register_path(RID), BODY)
    assert time.monotonic() - started >= 0.3
    client.connection.timeout = 0.1
    client.connection.close()
    with pytest.raises(TimeoutError):
        client.call("PUT", register_path(RID), BODY)
    client.connection.close()
    client.connection.timeout = 60
    assert client.call("PUT", register_path(RID), BODY)[0] == 401


def test_stopping_does_not_wait_for_slow_answers_or_idle_clients(capfd: pytest.CaptureFixture[str]) -> None:
    emulator = EmulatorInThread(faults=[Fault(request=2, delay_s=600), Fault(request=3, drip=1)])
    with contextlib.ExitStack() as stack:
        stack.enter_context(emulator)
        idle, delayed, dripping = (stack.enter_context(Client(emulator.port, emulator.ca_file)) for _ in range(3))
        assert idle.call("PUT", register_path("x"), {})[0] == 404
        delayed.connection.request("PUT", register_path("x") + API, b"{}")
        time.sleep(0.1)
        dripping.connection.request("PUT", register_path("x") + API, b"{}")
        time.sleep(0.1)
        emulator.stop()
    assert capfd.readouterr().err == ""


# --- fault scripts


def test_a_script_counts_over_all_or_over_what_it_matches() -> None:
    script = read_fault_script(
        '[{"request": 2, "operation": "lookup", "status": 500}, {"request": 4, "delayS": 1},'
        ' {"method": "GET", "drip": 9}]'
    )
    requests = [("PUT", "register"), ("POST", "lookup"), ("POST", "lookup"), ("POST", "lookup"), ("GET", "operation")]
    taken = [script.take(*request) for request in requests]
    assert [None if found is None else found[0] for found in taken] == [None, None, 1, 2, 3]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", "not valid JSON"),
        ("{}", "list of objects"),
        ("[1]", "entry 1 is not an object"),
        ('[{}, {"requests": 1}]', "entry 2: unknown field 'requests'"),
        ('[{"request": 0}]', "'request' is not a number from 1"),
        ('[{"request": true}]', "'request' is not a number from 1"),
        ('[{"status": 99}]', "'status' is not"),
        ('[{"operation": "put"}]', "'operation' is not"),
        ('[{"headers": {"a": 1}}]', "'headers' is not"),
        ('[{"headers": {"a": "\u20ac"}}]', "'headers' is not an object of Latin-1 text of one line or null"),
        ('[{"headers": {"a": "b\\r\\nc: d"}}]', "'headers' is not"),
        ('[{"headers": {"\u20ac": null}}]', "'headers' is not"),
        ('[{"headers": {"transfer-encoding": "chunked"}}]', "without Transfer-Encoding"),
        ('[{"drip": 0}]', "'drip' is not"),
        ('[{"reset": true}]', "'reset' needs 'cutAfterBytes'"),
    ],
)
def test_a_wrong_script_is_refused_by_entry_and_field(text: str, message: str) -> None:
    with pytest.raises(FaultScriptError) as caught:
        read_fault_script(text)
    assert message in str(caught.value)


def test_every_field_of_a_script_reaches_the_fault() -> None:
    entry: dict[str, Any] = {
        "request": 3,
        "method": "PUT",
        "operation": "register",
        "status": 500,
        "body": [],
        "headers": {"a": None},
        "delayS": 0.5,
        "drip": 1,
        "chunked": True,
        "cutAfterBytes": -1,
        "reset": True,
        "retryAfterDateS": 30,
    }
    expected = Fault(3, "PUT", "register", 500, [], {"a": None}, 0.5, 1, True, -1, True, retry_after_date_s=30)
    assert read_fault_script(json.dumps([entry])).faults == FaultScript([expected]).faults


@pytest.mark.parametrize(
    "begun",
    [
        b"PUT /0ne00000000/registrations/x/register?api-version=1 HTTP/1.1\r\nHost: x\r\nX-Slow: ",
        b"POST /0ne00000000/registrations/x?api-version=1 HTTP/1.1\r\nHost: x\r\nContent-Length: 99999\r\n\r\n{",
    ],
)
def test_a_request_that_does_not_come_whole_ends(
    begun: bytes, emulator: EmulatorInThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection that has had its answers may rest; a byte now and then keeps none open."""
    monkeypatch.setattr(http_protocol, "REQUEST_S", 0.3)
    with Client(emulator.port, emulator.ca_file) as resting:
        resting.call("GET", lookup_path(RID))  # comes whole, in one piece
        first_socket = resting.connection.sock
        with raw_connection(emulator) as slow:
            slow.sendall(begun)
            answer, ended = b"", False
            with contextlib.suppress(ConnectionError, ssl.SSLError):
                while not ended:
                    slow.settimeout(0.05)
                    try:
                        piece = slow.recv(1000)
                        answer, ended = answer + piece, not piece
                    except TimeoutError:
                        slow.sendall(b"x")
        assert answer.startswith(b"HTTP/1.1 408 "), answer
        assert resting.call("GET", lookup_path(RID))[0] == 405
        assert resting.connection.sock is first_socket


ASKED = b"GET /0ne00000000/registrations/x HTTP/1.1\r\nHost: x\r\n%s\r\n"  # which takes POST: 405


def said_to(emulator: EmulatorInThread, *pieces: bytes) -> bytes:
    """All that comes of these, sent one by one, until the emulator ends the connection."""
    with raw_connection(emulator) as connection:
        for piece in pieces:
            connection.sendall(piece)
        said = b""
        while piece := connection.recv(65536):
            said += piece
        return said


def test_requests_that_come_at_once_are_answered_in_their_order(emulator: EmulatorInThread) -> None:
    emulator.script(Fault(request=2, delay_s=0.2, chunked=True), Fault(request=3, headers={"X-Third": "yes"}))
    said = said_to(emulator, ASKED % b"" * 3 + ASKED % b"Connection: close\r\n")
    answers = said.split(b"HTTP/1.1 405 Method Not Allowed\r\n")[1:]
    assert [b"chunked" in answer for answer in answers] == [False, True, False, False], said
    assert [b"X-Third" in answer for answer in answers] == [False, False, True, False]
    assert [b"Connection: close" in answer for answer in answers] == [False, False, False, True]
    assert [line.fault for line in emulator.log] == [0, 1, 2, 0]


def test_reading_stops_and_goes_on_around_an_answer_that_takes_its_time(
    emulator: EmulatorInThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_protocol, "_AHEAD_BYTES", 1000)
    emulator.script(Fault(request=1, delay_s=0.3))
    ahead = [ASKED % b"" * 50] * 9
    said = said_to(emulator, ASKED % b"", *ahead, ASKED % b"Connection: close\r\n")
    assert said.count(b"HTTP/1.1 405 ") == len(emulator.log) == 452


def test_a_defect_in_a_request_that_was_read_ahead_ends_its_connection(
    emulator: EmulatorInThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    def planted(*_: object) -> None:
        raise ZeroDivisionError("planted")

    monkeypatch.setattr(emulator._server, "_logged", planted)
    emulator.script(Fault(request=1))
    monkeypatch.setattr(emulator._server, "_respond_in_time", _nothing)
    with raw_connection(emulator) as connection:
        connection.settimeout(10)
        connection.sendall(ASKED % b"" * 2)
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            assert connection.recv(1000) == b""
    assert ["planted" in notice for notice in emulator.notices] == [True]
    emulator.notices.clear()


async def _nothing(*_: object) -> None:
    """Leaves a request without an answer."""


def test_a_client_that_waits_for_100_is_told_to_go_on(emulator: EmulatorInThread) -> None:
    head = b"POST /0ne00000000/registrations/x HTTP/1.1\r\nHost: x\r\nConnection: close\r\nExpect: 100-continue\r\n"
    with raw_connection(emulator) as connection:
        connection.sendall(head + b"Content-Length: 2\r\n\r\n")
        assert connection.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(b"{}")
        assert connection.recv(1000).startswith(b"HTTP/1.1 400 ")
    assert said_to(emulator, head + b"Content-Length: 2\r\n\r\n{}").startswith(b"HTTP/1.1 400 "), "the body is there"


def test_an_empty_line_before_a_request_is_passed_over(emulator: EmulatorInThread) -> None:
    said = said_to(emulator, b"\r\n", ASKED % b"" + b"\r\n" + ASKED % b"Connection: close\r\n")
    assert said.count(b"HTTP/1.1 405 ") == 2, said


def test_a_request_with_two_lengths_is_its_connection_s_last(emulator: EmulatorInThread) -> None:
    both = b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n"
    assert said_to(emulator, ASKED % both + b"0\r\n\r\n" + ASKED % b"").count(b"HTTP/1.1 ") == 1


@pytest.mark.parametrize("chunked", [False, True])
def test_an_answer_is_framed_for_who_asked(chunked: bool, emulator: EmulatorInThread) -> None:
    emulator.script(Fault(chunked=chunked))
    old = said_to(emulator, (ASKED % b"").replace(b"HTTP/1.1", b"HTTP/1.0"))
    head, _, body = old.partition(b"\r\n\r\n")
    assert b"Transfer-Encoding" not in head and b"\r\nConnection: close" in head and json.loads(body)["errorCode"]
    assert (b"\r\nContent-Length: %d" % len(body) in head) is not chunked
    bare = said_to(emulator, (ASKED % b"Connection: close\r\n").replace(b"GET", b"HEAD"))
    assert bare.startswith(b"HTTP/1.1 405 ") and bare.endswith(b"\r\n\r\n")


def test_a_length_that_a_fault_names_is_sent_as_it_is(emulator: EmulatorInThread) -> None:
    emulator.script(Fault(status=200, body="{}", headers={"Content-Length": "7"}))
    said = said_to(emulator, ASKED % b"Connection: close\r\n")
    assert said.count(b"Content-Length") == 1 and b"\r\nContent-Length: 7\r\n" in said and said.endswith(b"\r\n\r\n{}")


@pytest.mark.parametrize(
    "fault",
    [
        Fault(headers={"connection": "Upgrade, Close"}),
        Fault(headers={"content-length": "9999"}),
        Fault(headers={"Content-Length": "3"}),
        Fault(headers={"Content-Length": "3"}, chunked=True),
        Fault(status=204, headers={"Content-Length": "7"}),
    ],
)
def test_an_answer_that_says_so_or_is_framed_wrong_is_the_last_one(fault: Fault, emulator: EmulatorInThread) -> None:
    emulator.script(fault)
    said = said_to(emulator, ASKED % b"" * 2)
    assert said.count(b"HTTP/1.1 ") == said.lower().count(b"\r\nconnection:") == 1 and len(emulator.log) == 1
    assert all(b"%b: %b" % (name.encode(), str(value).encode()) in said for name, value in fault.headers.items())


@pytest.mark.parametrize("chunked", [False, True])
def test_an_answer_of_204_has_neither_length_nor_body(chunked: bool, emulator: EmulatorInThread) -> None:
    emulator.script(Fault(status=204, chunked=chunked))
    said = said_to(emulator, ASKED % b"" + ASKED % b"Connection: close\r\n")
    assert said.count(b"HTTP/1.1 204 ") == 2 and said.endswith(b"\r\n\r\n")
    assert b"{" not in said and b"Content-Length" not in said and b"Transfer-Encoding" not in said


def test_a_connection_that_rests_too_long_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "KEEP_ALIVE_S", 0.1)
    with EmulatorInThread() as emulator:
        said = said_to(emulator, ASKED % b"")
        assert said_to(emulator, b"\r\n") == b"", "nor does an empty line keep it open"
    assert said.startswith(b"HTTP/1.1 405 ") and b"Connection" not in said


def raw_connection(emulator: EmulatorInThread) -> ssl.SSLSocket:
    context = ssl.create_default_context(cafile=str(emulator.ca_file))
    plain = socket.create_connection(("127.0.0.1", emulator.port), 60)
    return context.wrap_socket(plain, server_hostname="localhost")


def test_an_answer_is_one_record(emulator: EmulatorInThread) -> None:
    context = ssl.create_default_context(cafile=str(emulator.ca_file))
    received, to_send = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = context.wrap_bio(received, to_send, server_hostname="localhost")
    with socket.create_connection(("127.0.0.1", emulator.port), 60) as plain:

        def until_done(act: Callable[[], object]) -> bytes:
            """What the emulator has sent until `act` has all that it needs."""
            came = b""
            while True:
                try:
                    act()
                    return came
                except ssl.SSLWantReadError:
                    plain.sendall(to_send.read())
                    piece = plain.recv(65536)
                    assert piece, "the emulator has ended the connection"
                    came += piece
                    received.write(piece)
                finally:
                    plain.sendall(to_send.read())

        until_done(tls.do_handshake)
        request = b"GET /0ne00000000/registrations/x HTTP/1.1\r\nHost: x\r\n\r\n"
        answers, records = list[bytes](), list[bytes]()

        def read() -> None:
            answers.append(tls.read(65536))

        for _ in range(2):  # with the first come the tickets of the session
            tls.write(request)
            records = records_of(until_done(read))
        assert answers[-1].startswith(b"HTTP/1.1 405 ") and answers[-1].endswith(b"}"), answers
        assert len(records) == 1


def records_of(stream: bytes) -> list[bytes]:
    """The TLS records in a stream (RFC 8446, 5.1)."""
    found = []
    while stream:
        size = 5 + int.from_bytes(stream[3:5])
        found.append(stream[:size])
        stream = stream[size:]
    return found


def test_the_folder_of_a_thread_is_gone_afterwards() -> None:
    with EmulatorInThread() as emulator:
        ca_file: Path = emulator.ca_file
        assert ca_file.exists()
    assert not ca_file.exists()


def test_what_is_taken_of_uvicorn_is_there_in_the_release_that_is_installed() -> None:
    """Its class for HTTP/1.1 is documented by nobody; that the overrides work is shown by faults and stops above."""
    overriding = [
        node
        for node in ast.walk(ast.parse(Path(site.__file__).read_text()))
        if isinstance(node, ast.ClassDef) and any(ast.unparse(base) == "H11Protocol" for base in node.bases)
    ]
    assert len(overriding) == 1
    overridden = {node.name for each in overriding for node in each.body if isinstance(node, ast.FunctionDef)}
    own = {"_ends", "_forget", "_give_up"}
    overridden -= own
    used = {
        node.attr
        for each in overriding
        for node in ast.walk(each)
        if isinstance(node, ast.Attribute) and _is_self(node.value)
    } - own
    config = uvicorn.Config(lambda: None, http="h11", lifespan="off", log_config=None)
    config.load()
    loop = asyncio.new_event_loop()
    try:
        plain = H11Protocol(config, uvicorn.server.ServerState(), {}, loop)
        assert overridden and overridden <= set(vars(H11Protocol))
        assert used and [name for name in used if not hasattr(plain, name)] == []
    finally:
        loop.close()


def _is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id == "self"
