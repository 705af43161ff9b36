"""The HTTPS connection against servers that behave and servers that do not; all on loopback."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
import time
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dps_agent.effects import NoReply, Reply
from dps_agent.host.network.dial import LOOKUPS_LIMIT, Dialler, Failed
from dps_agent.host.network.https import BODY_LIMIT, DpsConnection
from dps_agent.host.network.proxy import ProxyRule
from dps_agent.http1 import HEAD_LIMIT
from dps_agent.sas import SasToken
from dps_agent.utc import http_date_s
from dps_hal.errors import AskOperator
from dps_text.addresses import host_and_port
from support.cloud.servers import ENDPOINT_NAME, LOOPBACK, Certificates, Peer, Server, answer, answering

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PATH = "/0ne00000000/registrations/press-07/register?api-version=2021-06-01"
SOON_S = 30.0  # a wait that should not happen at all is shorter than this on any machine


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture
def serve(certificates: Certificates) -> Iterator[Callable[..., tuple[Server, DpsConnection]]]:
    """Starts a server, by default with a good certificate, and a connection to it."""
    good = certificates.good()
    with contextlib.ExitStack() as stack:

        def start(
            behave: Callable[[Peer], None],
            context: ssl.SSLContext | None = good,
            timeout_s: float = 10.0,
        ) -> tuple[Server, DpsConnection]:
            server = stack.enter_context(Server(behave, context))
            connection = DpsConnection(
                f"https://{ENDPOINT_NAME}", server.address, certificates.ca_file, timeout_s, "test/1"
            )
            stack.callback(connection.close)
            return server, connection

        yield start


def get(connection: DpsConnection) -> Reply | NoReply:
    return connection.request("GET", PATH, b"", None)


def put(connection: DpsConnection, body: bytes = b"{}") -> Reply | NoReply:
    return connection.request("PUT", PATH, body, None)


def assert_no_reply(outcome: Reply | NoReply, reason: str, request_sent: bool) -> None:
    assert isinstance(outcome, NoReply), outcome
    assert (outcome.reason.split(": ")[0], outcome.request_sent) == (reason, request_sent), outcome
    assert len(outcome.reason) > len(reason) + 2, "the reason says what happened"


def raw(head_and_body: bytes, then: str = "stay") -> Callable[[Peer], None]:
    """A behaviour: these bytes to the first request, then `stay`, `goodbye` (close_notify) or `cut`."""

    def behave(peer: Peer) -> None:
        peer.request()
        peer.send(head_and_body)
        if then == "goodbye":
            peer.say_goodbye()
        elif then == "cut":
            peer.cut()
        else:
            peer.wait_until_gone()

    return behave


# what a request and an answer look like


def test_a_request_carries_what_dps_expects(serve) -> None:
    server, connection = serve(answering(answer(b"{}")))
    token = SasToken("0ne00000000%2Fregistrations%2Fpress-07", 1_800_000_000, b"\x01" * 32, "registration")
    connection.request("PUT", PATH, '{"a":"ö"}'.encode(), token)
    head, _, body = server.requests[0].partition(b"\r\n\r\n")
    assert head.decode().split("\r\n") == [
        f"PUT {PATH} HTTP/1.1",
        f"Host: {ENDPOINT_NAME}",
        "User-Agent: test/1",
        "Accept: application/json",
        "Accept-Encoding: identity",
        "Content-Type: application/json; charset=utf-8",
        "Content-Length: 10",
        f"Authorization: {token.header()}",
    ]
    assert body == '{"a":"ö"}'.encode()


def test_a_get_without_body_announces_none(serve) -> None:
    server, connection = serve(answering(answer(b"{}")))
    get(connection)
    assert b"content-" not in server.requests[0].lower()


def test_the_host_header_keeps_a_port_that_the_endpoint_names(serve, certificates: Certificates) -> None:
    server, _ = serve(answering(answer(b"{}")))
    connection = DpsConnection(f"https://{ENDPOINT_NAME}:8443/", server.address, certificates.ca_file)
    with contextlib.closing(connection):
        assert isinstance(get(connection), Reply)
    assert f"Host: {ENDPOINT_NAME}:8443\r\n".encode() in server.requests[0]


def test_sni_is_the_endpoint_even_where_another_address_is_dialled(serve, certificates: Certificates) -> None:
    context = certificates.good()
    asked = []
    context.sni_callback = lambda _socket, name, _context: asked.append(name)
    _, connection = serve(answering(answer(b"{}")), context)
    assert isinstance(get(connection), Reply)
    assert asked == [ENDPOINT_NAME]


def test_an_answer_arrives_with_status_headers_body_and_date(serve) -> None:
    headers = "DATE: Fri, 06 Nov 2026 08:49:37 GMT\r\nReTrY-After:  3 \r\nX-Ms-Request-Id: a\r\nx-ms-request-id: b\r\n"
    _, connection = serve(answering(answer(b'{"a":1}', "401 Unauthorized", headers)))
    assert put(connection) == Reply(
        401,
        {"content-length": "7", "date": "Fri, 06 Nov 2026 08:49:37 GMT", "retry-after": "3", "x-ms-request-id": "a, b"},
        b'{"a":1}',
        1_793_954_977,
    )


def test_a_date_at_which_the_certificate_is_not_valid_is_none(serve) -> None:
    _, connection = serve(answering(answer(b"{}", headers="Date: Sun, 06 Nov 1994 08:49:37 GMT\r\n")))
    reply = put(connection)
    assert isinstance(reply, Reply) and reply.date_s is None


@given(st.text() | st.text("SunNovGMT0123456789:, +-", max_size=40))
def test_no_date_header_raises(text: str) -> None:
    assert http_date_s(text) is None or isinstance(http_date_s(text), int)


@pytest.mark.parametrize(
    "sent",
    [
        b"HTTP/1.1 200 OK\r\ncontent-LENGTH: 5\r\n\r\nhello",
        b"HTTP/1.1 200 OK\nContent-Length: 5\n\nhello",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: Chunked\r\n\r\n2\r\nhe\r\n3;x=y\r\nllo\r\n0\r\nTrailer: t\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
        b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
        b"HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\nhello",
    ],
)
def test_every_lawful_framing_gives_the_body(serve, sent: bytes) -> None:
    _, connection = serve(raw(sent))
    outcome = get(connection)
    assert isinstance(outcome, Reply), outcome
    assert (outcome.status, outcome.body) == (200, b"hello")


@pytest.mark.parametrize("status", [b"200 OK\r\nContent-Length: 0", b"204 No Content"])
def test_an_empty_answer_is_a_reply(serve, status: bytes) -> None:
    _, connection = serve(raw(b"HTTP/1.1 " + status + b"\r\n\r\n"))
    outcome = get(connection)
    assert isinstance(outcome, Reply), outcome
    assert outcome.body == b""


def test_html_is_a_reply_because_the_logic_judges(serve) -> None:
    _, connection = serve(answering(answer(b"<html>", headers="Content-Type: text/html\r\n")))
    outcome = get(connection)
    assert isinstance(outcome, Reply)
    assert outcome.body == b"<html>"


def test_interim_answers_without_end_are_refused_long_before_the_deadline(serve) -> None:
    def behave(peer: Peer) -> None:
        peer.request()
        while True:
            peer.send(b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n" * 300)

    _, connection = serve(behave, timeout_s=600.0)
    assert_no_reply(get(connection), "too_large", request_sent=True)


def test_a_coded_body_is_named(serve) -> None:
    _, connection = serve(answering(answer(b"\x1f\x8b", headers="Content-Encoding: gzip\r\n")))
    outcome = get(connection)
    assert_no_reply(outcome, "protocol", request_sent=True)
    assert isinstance(outcome, NoReply) and "Content-Encoding 'gzip'" in outcome.reason


def test_a_redirect_is_not_followed(serve) -> None:
    server, connection = serve(answering(answer(b"", "307 Temporary Redirect", "Location: /elsewhere\r\n")))
    outcome = get(connection)
    assert isinstance(outcome, Reply)
    assert (outcome.status, len(server.requests)) == (307, 1)


def test_a_path_that_is_not_percent_encoded_is_refused_before_anything_is_sent(serve) -> None:
    server, connection = serve(answering(answer(b"{}")))
    for path in ("/a b", "/a\r\nX: y", "/ü"):
        with pytest.raises(ValueError, match="percent-encoded"):
            connection.request("GET", path, b"", None)
    assert server.connections == 0


# whom we talk to


@pytest.mark.parametrize(
    ("server_is", "says"),
    [
        ("of_another_name", "Hostname mismatch"),
        ("of_another_authority", "unable to get local issuer certificate"),
        ("expired", "certificate has expired"),
        ("self_signed", "self-signed certificate"),
        ("of_tls_1_1", "no TLS 1.2 or newer"),
    ],
)
def test_a_server_that_is_not_verified_gets_no_request(
    serve, certificates: Certificates, server_is: str, says: str
) -> None:
    server, connection = serve(answering(answer(b"{}")), getattr(certificates, server_is)())
    outcome = put(connection)
    reason = "tls_version" if server_is == "of_tls_1_1" else "tls"
    assert_no_reply(outcome, reason, request_sent=False)
    assert isinstance(outcome, NoReply)
    assert says in outcome.reason
    assert server.requests == []


def test_the_system_s_roots_count_only_without_ca_file(
    serve, certificates: Certificates, monkeypatch, tmp_path
) -> None:
    server, _ = serve(answering(answer(b"{}")))
    other = Certificates(tmp_path).ca_file
    monkeypatch.setenv("SSL_CERT_FILE", certificates.ca_file)
    with contextlib.closing(DpsConnection(f"https://{ENDPOINT_NAME}", server.address)) as trusting_the_system:
        assert isinstance(get(trusting_the_system), Reply)
    with contextlib.closing(DpsConnection(f"https://{ENDPOINT_NAME}", server.address, other)) as pinned:
        assert_no_reply(get(pinned), "tls", request_sent=False)


def test_plain_http_on_the_port_is_no_verdict_on_a_certificate(serve) -> None:
    _, connection = serve(lambda peer: peer.send(b"HTTP/1.1 400 Bad Request\r\n\r\n"), None)
    assert_no_reply(get(connection), "not_tls", request_sent=False)


def test_garbage_instead_of_tls_is_no_verdict_on_a_certificate(serve) -> None:
    def behave(peer: Peer) -> None:
        peer.send(bytes(range(256)) * 4)
        peer.wait_until_gone()

    _, connection = serve(behave, None)
    assert_no_reply(get(connection), "not_tls", request_sent=False)


def test_an_end_in_the_handshake_is_a_closed_connection(serve) -> None:
    _, connection = serve(lambda peer: peer.cut(), None)
    assert_no_reply(get(connection), "closed", request_sent=False)


def test_silence_in_the_handshake_ends_at_the_deadline(serve) -> None:
    _, connection = serve(Peer.wait_until_gone, None, timeout_s=0.4)
    began_s = time.monotonic()
    assert_no_reply(get(connection), "timeout", request_sent=False)
    assert 0.3 < time.monotonic() - began_s < SOON_S


# answers that are late, cut or too large


def test_silence_after_the_request_ends_at_the_deadline(serve) -> None:
    _, connection = serve(raw(b""), timeout_s=0.4)
    began_s = time.monotonic()
    assert_no_reply(get(connection), "timeout", request_sent=True)
    assert 0.3 < time.monotonic() - began_s < SOON_S


@pytest.mark.parametrize(
    "sent",
    [
        b"HTTP/1.1 200 OK\r\nX: " + b"x" * 1000 + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n" + b"x" * 1000,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3e8\r\n" + b"x" * 1000,
        b"HTTP/1.1 100 Continue\r\n\r\n" * 100,
    ],
)
def test_a_slow_drip_ends_at_the_total_deadline(serve, sent: bytes) -> None:
    def behave(peer: Peer) -> None:
        peer.request()
        peer.drip(sent, every_s=0.02)

    _, connection = serve(behave, timeout_s=0.6)
    began_s = time.monotonic()
    assert_no_reply(get(connection), "timeout", request_sent=True)
    assert time.monotonic() - began_s < SOON_S


WHOLE = [
    b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n10\r\nhello hello hell\r\n1\r\no\r\n0\r\n\r\n",
]


@pytest.mark.parametrize("then", ["goodbye", "cut"])
@pytest.mark.parametrize("whole", WHOLE)
def test_an_answer_cut_off_anywhere_is_never_a_reply(serve, whole: bytes, then: str) -> None:
    lengths = iter(range(len(whole)))

    def behave(peer: Peer) -> None:
        peer.request()
        peer.send(whole[: next(lengths)])
        if then == "goodbye":
            peer.say_goodbye()
        else:
            peer.cut()

    _, connection = serve(behave)
    for length in range(len(whole)):
        outcome = get(connection)
        assert isinstance(outcome, NoReply), f"whole={whole!r} cut after {length} bytes, {then}: {outcome}"
        assert_no_reply(outcome, "closed", request_sent=True)


def test_a_body_that_ends_with_the_connection_counts_only_with_close_notify(serve) -> None:
    sent = b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nhello"
    _, connection = serve(raw(sent, "goodbye"))
    outcome = get(connection)
    assert isinstance(outcome, Reply), outcome
    assert outcome.body == b"hello"
    _, connection = serve(raw(sent, "cut"))
    assert_no_reply(get(connection), "closed", request_sent=True)


def head_of(size: int) -> bytes:
    """An answer with a head of exactly `size` bytes and no body."""
    start, end = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nX: ", b"\r\n\r\n"
    return start + b"x" * (size - len(start) - len(end)) + end


def test_headers_up_to_the_bound_are_taken(serve) -> None:
    _, connection = serve(raw(head_of(HEAD_LIMIT)))
    assert isinstance(get(connection), Reply)


@pytest.mark.parametrize(
    "sent",
    [
        head_of(HEAD_LIMIT + 1),
        b"HTTP/1.1 200 OK\r\nX: " + b"x" * 200_000,
        b"HTTP/1.1 200 " + b"x" * 200_000,
        b"HTTP/1.1 100 Continue\r\n\r\n" * 1000,
        b"HTTP/1.1 103 Early Hints\r\n\r\n" * 1000,
        b"HTTP/1.1 200 OK\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 200 + b"\r\n",
    ],
)
def test_larger_headers_are_refused(serve, sent: bytes) -> None:
    _, connection = serve(raw(sent))
    assert_no_reply(get(connection), "too_large", request_sent=True)


def chunked(body: bytes, size: int) -> bytes:
    chunks = [body[i : i + size] for i in range(0, len(body), size)]
    framed = b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks)
    return b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + framed + b"0\r\n\r\n"


@pytest.mark.parametrize(
    ("frame", "then"),
    [
        (answer, "stay"),
        (lambda body: chunked(body, 5000), "stay"),
        (lambda body: b"HTTP/1.0 200 OK\r\n\r\n" + body, "goodbye"),
    ],
    ids=["length", "chunked", "until the end"],
)
def test_a_body_is_taken_up_to_the_bound_and_no_further(serve, frame: Callable[[bytes], bytes], then: str) -> None:
    _, connection = serve(raw(frame(b"x" * BODY_LIMIT), then))
    outcome = get(connection)
    assert isinstance(outcome, Reply), outcome
    assert len(outcome.body) == BODY_LIMIT
    _, connection = serve(raw(frame(b"x" * (BODY_LIMIT + 1)), then))
    assert_no_reply(get(connection), "too_large", request_sent=True)


def test_an_announced_flood_is_refused_without_waiting_for_it(serve) -> None:
    _, connection = serve(raw(b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\nx"))
    assert_no_reply(get(connection), "too_large", request_sent=True)
    _, connection = serve(raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nffffffff\r\n" + b"x" * 99_999))
    assert_no_reply(get(connection), "too_large", request_sent=True)


@pytest.mark.parametrize(
    "sent",
    [
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"HTTP/2 200\r\n\r\n",
        b"HTTP/1.1 abc OK\r\n\r\n",
        b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nno header\r\nContent-Length: 5\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\nContent-Length: five\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\nContent-Length: +5\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1_0\r\n\r\nhellohello",
        b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 2\r\n\r\n\x1f\x8b",
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nA: 1\r\n folded: 2\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 3\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\nContent-Length:\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\nhello",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\nhello\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nhello\r\n0\r\n\r\n",
    ],
)
def test_what_is_not_http_is_a_protocol_failure_at_once(serve, sent: bytes) -> None:
    _, connection = serve(raw(sent))
    began_s = time.monotonic()
    assert_no_reply(get(connection), "protocol", request_sent=True)
    assert time.monotonic() - began_s < SOON_S


# one connection for many requests


def test_many_requests_share_one_handshake(serve) -> None:
    server, connection = serve(answering(answer(b"{}"), chunked(b"{}", 1), answer(b"", "204 No Content")))
    for _ in range(20):
        assert isinstance(put(connection), Reply)
    assert (server.connections, server.handshakes, len(server.requests)) == (1, 1, 20)


@pytest.mark.parametrize("end", ["goodbye", "cut"])
def test_a_connection_that_the_server_closed_while_idle_is_reopened(serve, end: str) -> None:
    closed = threading.Event()

    def behave(peer: Peer) -> None:
        peer.request()
        peer.send(answer(b"{}"))
        if end == "cut":
            peer.cut()
            closed.set()
        else:
            closed.set()
            peer.say_goodbye()

    server, connection = serve(behave)
    for _ in range(3):
        closed.clear()
        assert isinstance(put(connection), Reply)
        assert closed.wait(SOON_S)
    assert (server.connections, len(server.requests)) == (3, 3)


def test_a_request_that_met_a_closing_connection_is_repeated_once_on_a_fresh_one(serve) -> None:
    def behave(peer: Peer) -> None:
        peer.request()
        if len(server.requests) < 3:
            peer.send(answer(b"{}"))
            peer.request()  # and no answer: the idle limit struck while the request was under way
        peer.cut()

    server, connection = serve(behave)
    assert isinstance(put(connection), Reply)
    assert_no_reply(put(connection), "closed", request_sent=True)
    assert (server.connections, len(server.requests)) == (2, 3)


def test_a_request_that_failed_on_a_fresh_connection_is_not_repeated(serve) -> None:
    server, connection = serve(raw(b"", "cut"))
    assert_no_reply(put(connection), "closed", request_sent=True)
    assert len(server.requests) == 1


def test_a_request_whose_answer_has_begun_is_not_repeated(serve) -> None:
    def behave(peer: Peer) -> None:
        peer.request()
        peer.send(answer(b"{}"))
        peer.request()
        peer.send(b"HTTP/1.1 200 OK\r\n")
        peer.cut()

    server, connection = serve(behave)
    assert isinstance(put(connection), Reply)
    assert_no_reply(put(connection), "closed", request_sent=True)
    assert len(server.requests) == 2


def test_a_request_that_timed_out_on_a_kept_connection_is_not_repeated(serve) -> None:
    def behave(peer: Peer) -> None:
        peer.request()
        peer.send(answer(b"{}"))
        peer.wait_until_gone()

    server, connection = serve(behave, timeout_s=0.5)
    assert isinstance(put(connection), Reply)
    assert_no_reply(put(connection), "timeout", request_sent=True)
    assert server.connections == 1


def test_a_request_stays_sent_where_only_its_repetition_could_not_connect(serve) -> None:
    def behave(peer: Peer) -> None:
        peer.request()
        peer.send(answer(b"{}"))
        peer.request()
        server.stop_listening()
        peer.cut()

    server, connection = serve(behave)
    assert isinstance(put(connection), Reply)
    assert_no_reply(put(connection), "connect", request_sent=True)


@pytest.mark.parametrize("surplus", [b"x", b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nforged"])
def test_bytes_that_nobody_asked_for_are_not_the_next_answer(serve, surplus: bytes) -> None:
    server, connection = serve(answering(answer(b"mine") + surplus))
    for _ in range(3):
        outcome = put(connection)
        assert isinstance(outcome, Reply)
        assert outcome.body == b"mine"
    assert server.connections == 3


@pytest.mark.parametrize(
    "sent",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}",
        b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\n{}",
    ],
)
def test_a_connection_that_the_server_will_close_is_not_reused(serve, sent: bytes) -> None:
    server, connection = serve(answering(sent))
    for _ in range(2):
        assert isinstance(put(connection), Reply)
    assert server.connections == 2


def test_after_a_failure_the_next_request_has_a_fresh_connection(serve) -> None:
    server, connection = serve(answering(b"SSH-2.0\r\n"))
    for _ in range(2):
        assert_no_reply(put(connection), "protocol", request_sent=True)
    assert server.connections == 2


def test_close_says_goodbye_and_may_be_repeated(serve) -> None:
    ends = []

    def behave(peer: Peer) -> None:
        peer.request()
        peer.send(answer(b"{}"))
        try:
            peer.wait_until_gone()
        except ssl.SSLEOFError:
            ends.append("cut")
        except ConnectionError:
            ends.append("goodbye")

    _, connection = serve(behave)
    get(connection)
    connection.close()
    connection.close()
    deadline_s = time.monotonic() + SOON_S
    while not ends and time.monotonic() < deadline_s:
        time.sleep(0.01)
    assert ends == ["goodbye"]
    assert isinstance(get(connection), Reply)


# no server


def test_a_name_that_does_not_exist_is_not_found() -> None:
    began_s = time.monotonic()
    outcome = get(DpsConnection("https://dps.invalid", timeout_s=SOON_S))
    # Without a network nobody can know that the name does not exist.
    reason = "dns" if isinstance(outcome, NoReply) and outcome.reason.startswith("dns") else "not_found"
    assert_no_reply(outcome, reason, request_sent=False)
    assert time.monotonic() - began_s < 2 * SOON_S


def test_a_resolver_that_hangs_ends_at_the_deadline(monkeypatch) -> None:
    over = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_arguments, **_options: [over.wait(SOON_S)][1:])
    began_s = time.monotonic()
    try:
        assert_no_reply(get(DpsConnection("https://dps.example", timeout_s=3.0)), "dns", request_sent=False)
        assert time.monotonic() - began_s < SOON_S - 1
    finally:
        over.set()


def test_a_refused_connection_is_a_connect_failure() -> None:
    with socket.create_server((LOOPBACK, 0)) as unused:
        port = unused.getsockname()[1]
    connection = DpsConnection("https://dps.example", f"{LOOPBACK}:{port}")
    outcome = get(connection)
    assert_no_reply(outcome, "connect", request_sent=False)
    assert isinstance(outcome, NoReply)
    assert f"{LOOPBACK} port {port}: Connection refused" in outcome.reason


@contextlib.contextmanager
def full_listener() -> Iterator[int]:
    """A port whose queue is full, so that a further connection is neither taken nor refused."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server((LOOPBACK, 0), backlog=0))
        for _ in range(4):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        yield listener.getsockname()[1]


def test_a_connection_that_never_stands_ends_at_the_deadline() -> None:
    with full_listener() as port:
        connection = DpsConnection("https://dps.example", f"{LOOPBACK}:{port}", timeout_s=0.5)
        began_s = time.monotonic()
        assert_no_reply(get(connection), "connect", request_sent=False)
        assert time.monotonic() - began_s < SOON_S


def test_an_address_that_swallows_everything_leaves_time_for_the_next(serve, monkeypatch) -> None:
    server, connection = serve(answering(answer(b"{}")), timeout_s=4.0)
    with full_listener() as port:
        both = [
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", (LOOPBACK, port)),
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", (LOOPBACK, server.port)),
        ]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_arguments, **_options: both)
        assert isinstance(get(connection), Reply)


# ended by another thread


def aborted(connection: DpsConnection, when: Callable[[], object] = lambda: time.sleep(0.3)) -> Reply | NoReply:
    """The outcome of a request that another thread ends after `when`; it must end within a second of that."""
    at_s = []

    def abort() -> None:
        when()
        at_s.append(time.monotonic())
        connection.abort()

    thread = threading.Thread(target=abort)
    thread.start()
    outcome = put(connection)
    ended_s = time.monotonic()
    thread.join()
    assert ended_s - at_s[0] < 1.0, "abort() did not end the request"
    return outcome


def test_abort_ends_a_wait_for_the_answer(serve) -> None:
    _, connection = serve(raw(b"HTTP/1.1 200 OK\r\n"))
    assert_no_reply(aborted(connection), "closed", request_sent=True)


def test_abort_on_a_kept_connection_does_not_repeat_the_request(serve) -> None:
    def behave(peer: Peer) -> None:
        peer.request()
        peer.send(answer(b"{}"))
        peer.request()
        peer.wait_until_gone()

    server, connection = serve(behave)
    assert isinstance(put(connection), Reply)
    assert_no_reply(aborted(connection), "closed", request_sent=True)
    assert len(server.requests) == 2


def test_abort_ends_a_handshake(serve) -> None:
    _, connection = serve(Peer.wait_until_gone, None)
    assert_no_reply(aborted(connection), "closed", request_sent=False)


def test_abort_ends_a_connection_attempt() -> None:
    with full_listener() as port:
        connection = DpsConnection("https://dps.example", f"{LOOPBACK}:{port}")
        assert_no_reply(aborted(connection), "closed", request_sent=False)


def test_abort_ends_a_name_lookup(monkeypatch) -> None:
    over = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_arguments, **_options: [over.wait(SOON_S)][1:])
    try:
        assert_no_reply(aborted(DpsConnection("https://dps.example")), "closed", request_sent=False)
    finally:
        over.set()


def test_a_resolver_that_hangs_is_asked_no_more_than_a_few_times(monkeypatch) -> None:
    over = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_arguments, **_options: [over.wait()][1:])
    dialler = Dialler(ProxyRule("none"), "")
    try:
        for _ in range(LOOKUPS_LIMIT):
            with pytest.raises(Failed, match="no answer in time"):
                dialler.addresses("dps.example", 443, time.monotonic() + 0.05)
        with pytest.raises(Failed, match=f"has not answered the last {LOOKUPS_LIMIT} questions"):
            dialler.addresses("dps.example", 443, time.monotonic() + SOON_S)
    finally:
        over.set()


def test_a_system_without_room_for_another_thread_is_no_bug_of_ours(monkeypatch) -> None:
    def start(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading, "enumerate", list)  # whatever an earlier test's resolver still waits for
    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(Failed, match="no room for another thread") as failed:
        Dialler(ProxyRule("none"), "").addresses("dps.example", 443, time.monotonic() + SOON_S)
    assert failed.value.reason == "dns"


def test_after_abort_the_connection_works_again(serve) -> None:
    hang = threading.Event()

    def behave(peer: Peer) -> None:
        peer.request()
        if not hang.is_set():
            hang.set()
            peer.wait_until_gone()
        peer.send(answer(b"{}"))

    _, connection = serve(behave)
    assert_no_reply(aborted(connection, hang.wait), "closed", request_sent=True)
    connection.abort()  # nothing is under way
    assert isinstance(put(connection), Reply)


# settings


@pytest.mark.parametrize(
    "endpoint",
    [
        "http://dps.example",
        "dps.example",
        "https://",
        "https://dps.example/path",
        "https://dps.example:0",
        "https://dps.example:99999",
        "https://user@dps.example",
        "https://dps.example?x",
        "https://.example",
        "https://[::1",
        "https://dps.exämple",
        f"https://{'a' * 64}.example",
    ],
)
def test_an_endpoint_that_makes_no_sense_is_the_operator_s(endpoint: str) -> None:
    with pytest.raises(AskOperator, match="endpoint: expected") as caught:
        DpsConnection(endpoint)
    assert caught.value.code == "config.invalid"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a.b:8443", ("a.b", 8443)),
        ("a.b:0000801", ("a.b", 801)),
        ("[::1]:443", ("::1", 443)),
        ("127.0.0.1", ("127.0.0.1", None)),
    ],
)
def test_host_and_port_come_apart(text: str, parts: tuple[str, int | None]) -> None:
    assert host_and_port(text) == parts


def test_a_ca_file_without_certificates_is_the_operator_s(tmp_path) -> None:
    empty = tmp_path / "empty.pem"
    empty.write_text("nothing\n")
    for path in (empty, tmp_path / "absent.pem", tmp_path):
        with pytest.raises(AskOperator, match="ca_file: expected PEM certificates") as caught:
            DpsConnection("https://dps.example", ca_file=str(path))
        assert caught.value.code == "config.invalid"


def test_a_ca_file_that_vanished_is_a_tls_failure(tmp_path, certificates: Certificates) -> None:
    path = tmp_path / "ca.pem"
    with open(certificates.ca_file, "rb") as file:
        path.write_bytes(file.read())
    connection = DpsConnection("https://dps.example", f"{LOOPBACK}:9", str(path))
    path.unlink()
    assert_no_reply(get(connection), "tls", request_sent=False)
