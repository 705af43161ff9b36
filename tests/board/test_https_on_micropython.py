"""The board's HTTPS client, under MicroPython, against servers that behave and servers that do not."""

from __future__ import annotations

import asyncio
import datetime
import errno
import socket
import ssl
import threading
from typing import TYPE_CHECKING, Any

import pytest
import trustme

from dps_agent.effects import Failed
from dps_board.tls import Link, Trust
from support.board.compiled import Image, der, micropython
from support.cloud.chains import CHAINS, TRUSTED, serving
from support.cloud.servers import ENDPOINT_NAME, LOOPBACK, Certificates, Peer, Server, answer, answering

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

DAY = datetime.timedelta(days=1)
DATE = "Date: Sun, 06 Nov 1994 08:49:37 GMT\r\n"
LIMIT = 16 * 1024
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


class Desk:
    """A board with the roots of one authority."""

    def __init__(self, image: Image, folder: Path) -> None:
        self.image = image
        self.certificates = Certificates(folder)
        self.roots = folder / "roots.der"
        self.roots.write_bytes(der(folder / "ca.pem"))
        self.good = self.certificates.good()

    def ask(self, connect_to: str, *steps: str, endpoint: str = f"https://{ENDPOINT_NAME}") -> list[dict[str, Any]]:
        return micropython(self.image, "board_https", str(self.roots), endpoint, connect_to, *steps)

    def served(
        self, behave: Callable[[Peer], None], *steps: str, context: ssl.SSLContext | None = None
    ) -> tuple[list[dict[str, Any]], Server]:
        with Server(behave, context or self.good) as server:
            return self.ask(server.address, *(steps or ("get",))), server


@pytest.fixture(scope="module")
def desk(image: Image, tmp_path_factory: pytest.TempPathFactory) -> Desk:
    return Desk(image, tmp_path_factory.mktemp("desk"))


def test_a_silent_address_leaves_the_next_one_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server((LOOPBACK, 0), backlog=0) as silent, socket.socket() as refusing:
        refusing.bind((LOOPBACK, 0))
        waiting = [socket.socket() for _ in range(4)]  # its queue is full: a further SYN is not answered
        for each in waiting:
            each.setblocking(False)
            each.connect_ex(silent.getsockname())
        both = [(socket.AF_INET, socket.SOCK_STREAM, 0, "", place.getsockname()) for place in (silent, refusing)]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_arguments: both)
        link = Link(Trust([]))
        link.begin(2000)
        with pytest.raises(Failed) as failed:
            asyncio.run(link.open(ENDPOINT_NAME, 443, ENDPOINT_NAME))
        assert failed.value.reason == "connect", "the second one was tried"
        for each in waiting:
            each.close()


def test_a_board_without_room_for_a_socket_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_arguments: int) -> Any:
        raise OSError(errno.ENOMEM, "no PCB left")

    there = [(socket.AF_INET, socket.SOCK_STREAM, 0, "", (LOOPBACK, 9))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_arguments: there)
    link = Link(Trust([]))
    link.begin(2000)

    async def reach() -> None:
        monkeypatch.setattr(socket, "socket", full)
        await link.open(ENDPOINT_NAME, 443, ENDPOINT_NAME)

    with pytest.raises(Failed) as failed:
        asyncio.run(reach())
    assert failed.value.reason == "connect" and "error 12" in str(failed.value.args)


def test_two_requests_take_one_handshake_and_arrive_whole(desk: Desk) -> None:
    replies, server = desk.served(
        answering(answer(b'{"a":1}', headers=DATE), answer(b"", "204 No Content")), "put", "get"
    )
    assert [(reply["status"], reply["handshakes"]) for reply in replies] == [(200, 1), (204, 1)]
    assert replies[0]["body"] == '{"a":1}' and replies[0]["dateS"] == 784111777
    assert server.handshakes == server.connections == 1
    head, _, body = server.requests[0].partition(b"\r\n\r\n")
    lines = head.decode().split("\r\n")
    assert lines[0].startswith("PUT /0ne00000000/") and lines[0].endswith(" HTTP/1.1")
    assert f"Host: {ENDPOINT_NAME}" in lines and f"Content-Length: {len(body)}" in lines
    assert "Accept-Encoding: identity" in lines and body.startswith(b'{"a"')


def validity(not_before: datetime.timedelta, not_after: datetime.timedelta) -> Callable[[trustme.CA], trustme.LeafCert]:
    now = datetime.datetime.now(datetime.UTC)
    return lambda authority: authority.issue_cert(ENDPOINT_NAME, not_before=now + not_before, not_after=now + not_after)


def context_of(desk: Desk, kind: str) -> ssl.SSLContext:
    if kind in ("of another name", "of another authority", "expired", "self signed"):
        made: ssl.SSLContext = getattr(desk.certificates, kind.replace(" ", "_"))()
        return made
    leaf = validity(DAY, 2 * DAY)(desk.certificates._authority)
    return desk.certificates._serving(leaf)


@pytest.mark.parametrize("kind", ["of another name", "of another authority", "expired", "not yet valid", "self signed"])
def test_a_server_that_cannot_be_verified_gets_no_request(desk: Desk, kind: str) -> None:
    replies, server = desk.served(answering(answer(b"{}")), context=context_of(desk, kind))
    assert replies[0]["reason"].startswith("tls: "), replies
    assert replies[0]["sent"] is False and server.requests == []


@pytest.mark.parametrize(
    ("first", "reason"),
    [
        (answer(b"", "400 Bad Request"), "not_tls"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "not_tls"),
        (bytes.fromhex("15 0303 0002 02 28"), "tls_failed"),  # the fatal alerts handshake_failure and protocol_version:
        (bytes.fromhex("15 0303 0002 02 46"), "tls_failed"),  # mbedTLS does not tell which it was
        (bytes.fromhex("15 0303 0002 01 00"), "closed"),  # a goodbye
        (b"", "closed"),
    ],
)
def test_a_handshake_without_a_verdict_on_a_certificate_is_no_matter_of_trust(
    desk: Desk, first: bytes, reason: str
) -> None:
    def behave(peer: Peer) -> None:
        peer.receive()
        peer.send(first)

    with Server(behave, None) as server:
        replies = desk.ask(server.address, "get")
    assert replies[0]["reason"].startswith(f"{reason}: ") and replies[0]["sent"] is False, replies


def test_a_server_of_tls_1_1_is_told_from_one_that_cannot_be_verified(desk: Desk) -> None:
    replies, server = desk.served(answering(answer(b"{}")), context=desk.certificates.of_tls_1_1())
    assert replies[0]["reason"].startswith("tls_version: ") and server.requests == [], replies


@pytest.mark.parametrize("name", CHAINS)
def test_the_verdict_on_a_chain_is_that_of_linux(desk: Desk, name: str, tmp_path: Path) -> None:
    (sent, anchors), verdict = CHAINS[name]
    roots = tmp_path / "roots.der"
    roots.write_bytes(b"".join(anchor.certificate for anchor in anchors))
    with Server(answering(answer(b"{}")), serving(tmp_path, *sent)) as server:
        arguments = (str(roots), f"https://{ENDPOINT_NAME}", server.address, "get")
        replies = micropython(desk.image, "board_https", *arguments)
    if verdict == TRUSTED:
        assert replies[0].get("status") == 200, replies
    else:
        assert replies[0]["reason"].startswith("tls: "), replies


def test_any_of_several_roots_is_enough(desk: Desk, tmp_path: Path) -> None:
    other = trustme.CA()
    other.cert_pem.write_to_path(str(tmp_path / "other.pem"))
    for files in (
        (tmp_path / "other.pem", desk.certificates.ca_file),
        (desk.certificates.ca_file, tmp_path / "other.pem"),
    ):
        roots = tmp_path / "roots.der"
        roots.write_bytes(der(*map(type(tmp_path), files)))
        with Server(answering(answer(b"{}")), desk.good) as server:
            replies = micropython(
                desk.image, "board_https", str(roots), f"https://{ENDPOINT_NAME}", server.address, "get"
            )
        assert replies[0].get("status") == 200, replies


def test_a_redirect_is_an_answer_and_not_followed(desk: Desk) -> None:
    moved = answer(b"", "302 Found", "Location: https://elsewhere.example/\r\n")
    replies, server = desk.served(answering(moved))
    assert replies[0]["status"] == 302 and len(server.requests) == 1


def test_a_chunked_body_is_put_together(desk: Desk) -> None:
    chunked = CHUNKED + b"3;x=y\r\nabc\r\n00a\r\n0123456789\r\n0\r\nTrailer: 1\r\n\r\n"
    replies, server = desk.served(answering(chunked), "get", "get")
    assert [reply["body"] for reply in replies] == ["abc0123456789"] * 2 and server.handshakes == 1


def test_answers_of_the_largest_size_are_taken(desk: Desk) -> None:
    body = b"x" * LIMIT
    chunks = b"".join(b"%x\r\n%b\r\n" % (1024, body[:1024]) for _ in range(16)) + b"0\r\n\r\n"
    chunked = CHUNKED + chunks
    replies, _ = desk.served(answering(answer(body), chunked), "get", "get")
    assert [len(reply["body"]) for reply in replies] == [LIMIT, LIMIT]


def test_an_interim_answer_is_passed_over(desk: Desk) -> None:
    interim = b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n"
    replies, _ = desk.served(answering(interim + answer(b"{}")))
    assert replies[0]["status"] == 200 and "link" not in replies[0]["headers"]


def test_repeated_headers_are_joined_and_their_names_in_lower_case(desk: Desk) -> None:
    replies, _ = desk.served(answering(answer(b"{}", headers="X-Ms-Request-Id: 1\r\nx-ms-request-id:  2 \r\n")))
    assert replies[0]["headers"]["x-ms-request-id"] == "1, 2"


BAD_ANSWERS = [
    ("nonsense", b"SSH-2.0-OpenSSH\r\n\r\n", "protocol"),
    ("a status that is no number", b"HTTP/1.1 abc OK\r\n\r\n", "protocol"),
    ("a header without a colon", b"HTTP/1.1 200 OK\r\nnonsense\r\n\r\n", "protocol"),
    ("a folded header", b"HTTP/1.1 200 OK\r\nA: 1\r\n folded: 2\r\n\r\n", "protocol"),
    ("two lengths", b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab", "protocol"),
    ("a signed length", b"HTTP/1.1 200 OK\r\nContent-Length: +2\r\n\r\nab", "protocol"),
    ("another coding", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\nab", "protocol"),
    ("both framings", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Length: 2\r\n\r\nab", "protocol"),
    ("a body without a length", b"HTTP/1.1 200 OK\r\n\r\nabc", "protocol"),
    ("a chunk without a size", CHUNKED + b"xyz\r\n", "protocol"),
    ("a chunk of a negative size", CHUNKED + b"-1\r\n", "protocol"),
    ("a chunk that is longer", CHUNKED + b"1\r\nabc\r\n0\r\n\r\n", "protocol"),
    ("a long body", answer(b"x" * (LIMIT + 1)), "too_large"),
    ("a huge length", b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999999999999\r\n\r\n", "too_large"),
    ("a huge chunk", CHUNKED + b"7fffffff\r\nabc", "too_large"),
    ("a long header", b"HTTP/1.1 200 OK\r\nA: " + b"x" * LIMIT + b"\r\n\r\n", "too_large"),
    ("interim answers without end", b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" * 300, "too_large"),
    ("a coded body", answer(b"\x1f\x8b", headers="Content-Encoding: gzip\r\n"), "protocol"),
    ("many headers", b"HTTP/1.1 200 OK\r\n" + b"A: 1\r\n" * 4000 + b"\r\n", "too_large"),
]  # fmt: skip


@pytest.mark.parametrize(("what", "bytes_sent", "reason"), BAD_ANSWERS, ids=[row[0] for row in BAD_ANSWERS])
def test_a_bad_answer_is_refused_by_its_reason(desk: Desk, what: str, bytes_sent: bytes, reason: str) -> None:
    replies, _ = desk.served(answering(bytes_sent))
    assert replies[0].get("reason", "").split(":")[0] == reason, f"{what}: {replies}"
    assert replies[0]["sent"] is True


CUT_ANSWERS = [
    b"",
    b"HTTP/1.1 200 OK\r\nContent-Le",
    b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nab",
    CHUNKED + b"5\r\nab",
    CHUNKED + b"2\r\nab\r\n",
]


@pytest.mark.parametrize("polite", [True, False])
def test_an_answer_that_ends_early_is_none(desk: Desk, polite: bool) -> None:
    for cut in CUT_ANSWERS:

        def behave(peer: Peer, cut: bytes = cut) -> None:
            peer.request()
            peer.send(cut)
            if polite:
                peer.say_goodbye()
            else:
                peer.cut()

        replies, server = desk.served(behave)
        assert replies[0].get("reason", "").startswith("closed"), f"cut={cut!r}: {replies}"
        assert len(server.requests) == 1


def test_silence_and_a_slow_answer_end_at_the_deadline(desk: Desk) -> None:
    def drip(peer: Peer) -> None:
        peer.request()
        peer.drip(answer(b"x" * 1000), 0.05)

    for behave in (Peer.wait_until_gone, drip):
        replies, _ = desk.served(behave, "limit=600", "get")
        assert replies[0]["reason"].startswith("timeout") and replies[0]["ms"] < 1500, replies


def test_a_server_that_never_shakes_hands_ends_at_the_deadline(desk: Desk) -> None:
    with Server(Peer.wait_until_gone, None) as server:
        replies = desk.ask(server.address, "limit=600", "get")
    assert replies[0]["reason"].startswith("timeout") and replies[0]["sent"] is False and replies[0]["ms"] < 1500


def test_another_task_can_abort_a_request(desk: Desk) -> None:
    replies, _ = desk.served(Peer.wait_until_gone, "abort=300", "get")
    assert replies[0]["reason"] == "closed: given up" and replies[0]["ms"] < 1500


@pytest.mark.parametrize("polite", [True, False])
def test_a_connection_that_the_server_closed_while_idle_costs_one_handshake(desk: Desk, polite: bool) -> None:
    def once(peer: Peer) -> None:
        peer.request()
        peer.send(answer(b"{}"))
        if polite:
            peer.say_goodbye()

    replies, server = desk.served(once, "get", "wait=200", "get")
    assert [reply.get("status") for reply in replies] == [200, 200], replies
    assert server.handshakes == replies[1]["handshakes"] == 2


def test_a_request_that_meets_the_servers_goodbye_is_sent_again(desk: Desk) -> None:
    asked = threading.Semaphore(0)

    def behave(peer: Peer) -> None:
        peer.request()
        peer.send(answer(b"{}"))
        peer.request()  # it was under way when the server made up its mind
        asked.release()

    def second(peer: Peer) -> None:
        if asked.acquire(blocking=False):
            answering(answer(b'"again"'))(peer)
        else:
            behave(peer)

    replies, server = desk.served(second, "get", "get")
    assert replies[1].get("body") == '"again"', replies
    assert server.handshakes == 2 and len(server.requests) == 3


def test_connection_close_is_obeyed(desk: Desk) -> None:
    replies, server = desk.served(answering(answer(b"{}", headers="Connection: Close\r\n")), "get", "get")
    assert [reply["handshakes"] for reply in replies] == [1, 2] and server.connections == 2


def test_nobody_there_is_said_by_name(desk: Desk) -> None:
    with Server(answering(b""), None) as server:
        server.stop_listening()
        refused = desk.ask(server.address, "get")[0]
    assert refused["reason"].startswith(f"connect: {LOOPBACK} port {server.port}") and refused["sent"] is False
    unknown = desk.ask("nobody.invalid:443", "get")[0]
    assert ": 'nobody.invalid'" in unknown["reason"] and unknown["sent"] is False
