"""The HTTP/1.1 reader: the same for every way in which the bytes come, bounded, and plain about what it refuses."""

from dps_agent.effects import Failed
from dps_agent.http1 import HEAD_LIMIT, LINES_LIMIT, Reader

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

BODY_LIMIT = 64
INTERIM = 5
OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
HINTS = b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n"


def pieces(sent: bytes, size: int) -> "list[bytes]":
    return [sent[at : at + size] for at in range(0, len(sent), size)]


def outcome(reading: "Any", came: "list[bytes]") -> "Any":
    """What comes of a reading once all of these came: its value, the reason of its failure, or "waits"."""
    waiting = list(came)
    try:
        next(reading)
        while waiting:
            reading.send(waiting.pop(0))
    except StopIteration as read:
        assert not waiting, f"{waiting} were not needed"
        return read.value
    except Failed as failed:
        return failed.reason
    return "waits"


def answer_in(came: "list[bytes]", room: bytes = b"", end_counts: bool = False) -> "Any":
    """Status, headers, body, Date, and whether the connection is kept; or a word as `outcome` has it."""
    reader = Reader(BODY_LIMIT, end_counts=end_counts)
    reader.room = bytearray(room)
    found = outcome(reader.answer(), came)
    if isinstance(found, str):
        return found
    (status, headers, body, date_s), keep = found
    return status, headers, bytes(body), date_s, keep


WHOLE = [
    (OK + b"Content-Length: 5\r\n\r\nhello", (b"hello", True)),
    (OK + b"content-LENGTH:5 \t\r\n\r\nhello", (b"hello", True)),
    (OK + b"Content-Length: 0\r\n\r\n", (b"", True)),
    (OK + b"Content-Length: 000000000000000005\r\n\r\nhello", (b"hello", True)),
    (OK + b"Content-Length: 5\r\nContent-Length: 5\r\n\r\nhello", (b"hello", True)),
    (OK + b"Content-Encoding: identity\r\nContent-Length: 5\r\n\r\nhello", (b"hello", True)),
    (b"HTTP/1.1 200\r\nContent-Length: 5\r\n\r\nhello", (b"hello", True)),
    (b"HTTP/1.1 200 \xe4\xff\r\nX: \xe4\xff\r\nContent-Length: 5\r\n\r\nhello", (b"hello", True)),
    (b"HTTP/1.1 200 OK\nContent-Length: 5\n\nhello", (b"hello", True)),
    (b"HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\nhello", (b"hello", False)),
    (b"HTTP/1.0 200 OK\r\nConnection: Keep-Alive\r\nContent-Length: 5\r\n\r\nhello", (b"hello", True)),
    (OK + b"Connection: Close\r\nContent-Length: 5\r\n\r\nhello", (b"hello", False)),
    (OK + b"Content-Length: 5\r\n\r\nhelloHTTP/1.1 200 OK\r\n", (b"hello", False)),
    (b"HTTP/1.1 204 No Content\r\n\r\n", (b"", True)),
    (b"HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\n", (b"", True)),
    (CHUNKED + b"2\r\nhe\r\n003;x=y\r\nllo\r\n0\r\nTrailer: t\r\n\r\n", (b"hello", True)),
    (CHUNKED + b"A \r\n0123456789\r\n0\r\n\r\n", (b"0123456789", True)),
    (HINTS * INTERIM + OK + b"Content-Length: 5\r\n\r\nhello", (b"hello", True)),
    (b"HTTP/1.1 100 Continue\r\nContent-Length: 5\r\n\r\n" + OK + b"Content-Length: 0\r\n\r\n", (b"", True)),
]


def test_a_whole_answer_is_the_same_in_one_piece_and_byte_by_byte() -> None:
    for sent, wanted in WHOLE:
        for room in (b"", b"room" * 20):
            found = answer_in([sent], room)
            assert (found[2], found[4]) == wanted, f"sent={sent!r}: {found}"
            for size in (1, 2, 7):
                came = pieces(sent, size)
                if sent.endswith(b"HTTP/1.1 200 OK\r\n"):  # what is behind it is not asked for, byte by byte
                    continue
                assert answer_in(came, room) == found, f"sent={sent!r} size={size}"


def test_what_comes_behind_an_answer_stays_there() -> None:
    reader = Reader(BODY_LIMIT)
    outcome(reader.answer(), [OK + b"Content-Length: 2\r\n\r\nhifurther"])
    assert reader.rest == b"further"


def test_an_answer_has_the_headers_that_somebody_reads_and_its_date() -> None:
    head = b"DATE: Sun, 06 Nov 1994 08:49:37 GMT\r\nReTrY-After:  3 \r\nX-Ms-Request-Id: a\r\nServer: x\r\n"
    found = answer_in([b"HTTP/1.1 429 no\r\n" + head + b"x-ms-request-id:b\r\nContent-Length: 0\r\n\r\n"])
    headers = {"date": "Sun, 06 Nov 1994 08:49:37 GMT", "retry-after": "3", "x-ms-request-id": "a, b"}
    headers["content-length"] = "0"
    assert found == (429, headers, b"", 784111777, True)


def test_an_answer_that_is_not_whole_waits_and_its_end_is_none() -> None:
    for sent, _ in WHOLE:
        if sent.endswith(b"HTTP/1.1 200 OK\r\n"):
            continue
        for length in range(len(sent)):
            came = [sent[:length]] if length else []
            assert answer_in(came) == "waits", f"sent={sent!r} length={length}"
            assert answer_in(came + [b""]) == "closed", f"sent={sent!r} length={length}"


def test_a_body_ends_with_the_connection_only_where_that_is_told_from_a_cut() -> None:
    for sent in (OK + b"\r\nhello", b"HTTP/1.0 200 OK\r\n\r\nhello"):
        assert answer_in([sent, b""]) == "protocol"
        assert answer_in([sent], end_counts=True) == "waits"
        for size in (1, 100):
            found = answer_in(pieces(sent, size) + [b""], end_counts=True)
            assert (found[2], found[4]) == (b"hello", False), f"sent={sent!r} size={size}"
    assert answer_in([OK + b"\r\n" + b"x" * BODY_LIMIT, b""], end_counts=True)[2] == b"x" * BODY_LIMIT
    assert answer_in([OK + b"\r\n" + b"x" * BODY_LIMIT, b"x"], end_counts=True) == "too_large"


REFUSED = [
    (b"SSH-2.0-OpenSSH_9.2\r\n", "protocol"),
    (b"HTTP/2 200\r\n", "protocol"),
    (b"HTTP/1.1 abc OK\r\n", "protocol"),
    (b"HTTP/1.1 099 OK\r\n", "protocol"),
    (b"HTTP/1.1 20 OK\r\n", "protocol"),
    (b"HTTP/1.1 2000 OK\r\n", "protocol"),
    (b"HTTP/1.1\r\n", "protocol"),
    (b"\r\n", "protocol"),
    (b"HTTP/1.1 101 Switching Protocols\r\n\r\n", "protocol"),
    (OK + b"no header\r\n", "protocol"),
    (OK + b": empty\r\n", "protocol"),
    (OK + b"A : 1\r\n", "protocol"),
    (OK + b"A(: 1\r\n", "protocol"),
    (OK + b"\xe4: 1\r\n", "protocol"),
    (OK + b"A: 1\r\n folded: 2\r\n", "protocol"),
    (OK + b"A: 1\r2\r\n", "protocol"),
    (OK + b"A: 1\0\r\n", "protocol"),
    (OK + b"Retry-After: \xe4\r\n", "protocol"),
    (OK + b"Content-Length: five\r\n\r\n", "protocol"),
    (OK + b"Content-Length: -5\r\n\r\n", "protocol"),
    (OK + b"Content-Length: +5\r\n\r\n", "protocol"),
    (OK + b"Content-Length: 1_0\r\n\r\n", "protocol"),
    (OK + b"Content-Length: 5, 5\r\n\r\n", "protocol"),
    (OK + b"Content-Length:\r\n\r\n", "protocol"),
    (OK + b"Content-Length: 5\r\nContent-Length: 3\r\n\r\n", "protocol"),
    (OK + b"Content-Length: 65\r\n\r\n", "too_large"),
    (OK + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n", "too_large"),
    (OK + b"Transfer-Encoding: gzip\r\n\r\n", "protocol"),
    (OK + b"Transfer-Encoding: gzip, chunked\r\n\r\n", "protocol"),
    (OK + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n", "protocol"),
    (OK + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n", "protocol"),
    (b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", "protocol"),
    (CHUNKED + b"xyz\r\n", "protocol"),
    (CHUNKED + b"-1\r\n", "protocol"),
    (CHUNKED + b"\r\n", "protocol"),
    (CHUNKED + b"2\n", "protocol"),
    (CHUNKED + b"00000000000000005\r\n", "protocol"),
    (CHUNKED + b"3\r\nhello", "protocol"),
    (CHUNKED + b"3\r\nhel\n\r", "protocol"),
    (CHUNKED + b"41\r\n", "too_large"),
    (CHUNKED + b"7fffffffffffffff\r\n", "too_large"),
    (CHUNKED + b"40\r\n" + b"x" * 64 + b"\r\n1\r\n", "too_large"),
    (CHUNKED + b"1;" + b"x" * 1022, "too_large"),
]


def test_what_is_refused_is_refused_at_once_and_by_its_reason() -> None:
    for sent, reason in REFUSED:
        assert answer_in([sent]) == reason, f"sent={sent[:200]!r}"
        assert answer_in([sent[:-1]]) == "waits", f"sent={sent[:200]!r}: not the byte that is wrong"


def test_a_coded_body_is_named_and_an_answer_that_asks_for_patience_is_read_all_the_same() -> None:
    head = b"Content-Encoding: GZip\r\nContent-Length: 3\r\n\r\n\x1f\x8b\x08"
    for status in (b"200", b"202", b"401", b"404"):
        reading = Reader(BODY_LIMIT).answer()
        try:
            next(reading)
            reading.send(b"HTTP/1.1 " + status + b" X\r\n" + head)
        except Failed as failed:
            assert failed.reason == "protocol" and "'GZip'" in str(failed), failed
            continue
        raise AssertionError(f"status={status!r}")
    for status in (b"429", b"500", b"503"):
        found = answer_in([b"HTTP/1.1 " + status + b" X\r\nRetry-After: 9\r\n" + head])
        assert (found[0], found[1]["retry-after"]) == (int(status), "9")


def test_a_body_without_end_can_be_read_chunk_by_chunk() -> None:
    for size in (1, 3, 100):
        reader, body = Reader(BODY_LIMIT), bytearray()
        came = pieces(b"5\r\nhello\r\n1\r\n!\r\n" + b"40\r\n" + bytes(64) + b"\r\n0\r\n", size)
        sizes: list[Any] = []
        while came or reader.rest:
            reading = reader.chunk(body)
            try:
                next(reading)
                while True:
                    reading.send(came.pop(0))
            except StopIteration as read:
                sizes.append(read.value)
            if sizes[-1] == 1:
                assert body == b"hello!"
                body = bytearray()  # what was used is not there any more, and does not count
        assert (sizes, bytes(body)) == ([5, 1, 64, 0], bytes(64)), size
    assert outcome(Reader(BODY_LIMIT).chunk(bytearray(1)), [b"40\r\n"]) == "too_large"


def head_of(size: int) -> bytes:
    """An answer of `size` bytes without a body."""
    start, end = OK + b"Content-Length: 0\r\nX: ", b"\r\n\r\n"
    return start + b"x" * (size - len(start) - len(end)) + end


def test_all_heads_of_an_answer_and_its_trailers_have_one_limit_together() -> None:
    assert answer_in([head_of(HEAD_LIMIT)])[0] == 200
    assert answer_in([HINTS + head_of(HEAD_LIMIT - len(HINTS))])[0] == 200
    for sent in (
        head_of(HEAD_LIMIT + 1)[:-1],
        HINTS + head_of(HEAD_LIMIT - len(HINTS) + 1)[:-1],
        b"HTTP/1.1 200 " + b"x" * HEAD_LIMIT,
        CHUNKED + b"0\r\nX: " + b"x" * (HEAD_LIMIT - len(CHUNKED)),
    ):
        assert answer_in([sent]) == "too_large", f"sent={sent[:200]!r}"
    trailer = b"X: " + b"x" * (HEAD_LIMIT - len(CHUNKED) - 7) + b"\r\n\r\n"
    assert answer_in([CHUNKED + b"0\r\n" + trailer])[0] == 200


def test_the_lines_of_all_heads_of_an_answer_are_counted_together() -> None:
    many = b"A: b\r\n" * (LINES_LIMIT - 3)
    assert answer_in([OK + many + b"Content-Length: 0\r\n\r\n"])[0] == 200
    assert answer_in([OK + many + b"A: b\r\nContent-Length: 0\r\n"]) == "too_large"
    assert answer_in([HINTS + OK + many + b"Content-Length: 0\r\n"]) == "too_large"
    for size in (1, 100_000):
        assert answer_in(pieces(HINTS * (LINES_LIMIT // 3), size)) == "waits"
        assert answer_in(pieces(HINTS * (LINES_LIMIT // 3) + b"HTTP/1.1 100 \r\n", size)) == "too_large"


def test_the_limits_are_those_of_each_answer() -> None:
    reader = Reader(BODY_LIMIT)
    for _ in range(3):
        (reply, keep) = outcome(reader.answer(), [HINTS * INTERIM + head_of(HEAD_LIMIT - len(HINTS) * INTERIM)])
        assert (reply.status, keep) == (200, True)


def test_a_final_head_may_be_one_that_switches_protocols() -> None:
    reader = Reader(0, ("upgrade",))
    sent = HINTS + b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n\r\n\x82\x00"
    assert outcome(reader.final_head(), [sent]) == (101, {"upgrade": "websocket"}, b"HTTP/1.1")
    assert reader.rest == b"\x82\x00"
