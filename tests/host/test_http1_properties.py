"""The HTTP/1.1 reader beside h11: what both take for an answer is the same answer."""

from __future__ import annotations

from typing import Any

import h11
from hypothesis import example, given
from hypothesis import strategies as st

from dps_agent.effects import Failed
from dps_agent.http1 import Reader

BODY_LIMIT = 512

line_end = st.sampled_from([b"\r\n"] * 9 + [b"\n"])
text = st.text(
    st.characters(codec="latin-1", exclude_characters="\r\n\0", exclude_categories=("Cc",)), max_size=12
).map(lambda value: value.strip().encode("latin-1"))
header = st.tuples(
    st.sampled_from([b"Date", b"Server", b"X-Ms-Request-Id", b"Retry-After", b"Connection", b"ETag"]),
    st.sampled_from([b"", b" ", b" \t"]),
    st.from_regex(rb"[ -~]{0,12}", fullmatch=True).map(bytes.strip),
).map(lambda parts: parts[0] + b":" + parts[1] + parts[2])


@st.composite
def heads(draw: st.DrawFn, statuses: st.SearchStrategy[int], *further: bytes) -> bytes:
    """A head with these headers and some that change nothing about its framing."""
    first = b"HTTP/1.1 %d " % draw(statuses) + draw(text)
    lines = draw(st.permutations([*draw(st.lists(header, max_size=4)), *further]))
    return b"".join(line + draw(line_end) for line in [first, *lines, b""])


@st.composite
def chunks(draw: st.DrawFn, body: bytes) -> bytes:
    """A body in chunks."""
    out = b""
    while body:
        size = draw(st.integers(1, len(body)))
        out += draw(st.sampled_from([b"%x", b"%X", b"0%x"])) % size + draw(st.sampled_from([b"", b";a=b", b";a"]))
        out += b"\r\n" + body[:size] + b"\r\n"
        body = body[size:]
    return out + b"0\r\n" + draw(st.sampled_from([b"", b"Trailer: 1\r\n"])) + b"\r\n"


@st.composite
def answers(draw: st.DrawFn) -> bytes:
    """A well-formed answer, with the interim ones before it."""
    interim = st.sampled_from([100, 102, 103])
    out = b"".join(draw(heads(interim)) for _ in range(draw(st.integers(0, 3))))
    body = draw(st.binary(max_size=200))
    framing = draw(st.sampled_from(["length", "chunked", "none"]))
    if framing == "length":
        same = b"Content-Length: %d" % len(body)
        return out + draw(heads(st.integers(200, 599).filter(_has_body), *[same] * draw(st.integers(1, 2)))) + body
    if framing == "chunked":
        coding = draw(st.sampled_from([b"Transfer-Encoding: chunked", b"transfer-encoding:Chunked"]))
        return out + draw(heads(st.integers(200, 599).filter(_has_body), coding)) + draw(chunks(body))
    return out + draw(heads(st.sampled_from([204, 304])))


def _has_body(status: int) -> bool:
    return status not in (204, 304)


def ours(came: list[bytes]) -> tuple[int, bytes] | str:
    """Status and body as our reader has them; the reason where it refuses, "waits" where it is not whole."""
    reading = Reader(BODY_LIMIT).answer()
    try:
        next(reading)
        for piece in came:
            reading.send(piece)
    except StopIteration as read:
        reply, _ = read.value
        return reply.status, bytes(reply.body)
    except Failed as failed:
        return failed.reason
    return "waits"


def theirs(came: bytes) -> tuple[int, bytes] | str:
    """The same as h11 has them."""
    connection = h11.Connection(h11.CLIENT)
    connection.send(h11.Request(method="GET", target="/", headers=[("Host", "a")]))
    connection.send(h11.EndOfMessage())
    status, body = 0, b""
    try:
        connection.receive_data(came)
        while True:
            event: Any = connection.next_event()
            if event is h11.NEED_DATA or event is h11.PAUSED:
                return "waits"
            if isinstance(event, h11.Response):
                status = event.status_code
            elif isinstance(event, h11.Data):
                body += bytes(event.data)
            elif isinstance(event, h11.EndOfMessage):
                return status, body
    except h11.RemoteProtocolError:
        return "protocol"


@given(answers())
def test_a_well_formed_answer_is_the_one_that_h11_reads(sent: bytes) -> None:
    found = ours([sent])
    assert found == theirs(sent) and not isinstance(found, str)


@given(answers(), st.lists(st.integers(1, 40), max_size=60))
def test_an_answer_is_the_same_in_whatever_pieces_it_comes(sent: bytes, sizes: list[int]) -> None:
    came, at = [], 0
    for size in [*sizes, len(sent)]:
        if sent[at : at + size]:
            came.append(sent[at : at + size])
        at += size
    assert ours(came) == ours([sent])


@given(
    answers(),
    st.lists(
        st.tuples(
            st.floats(0, 1, exclude_max=True),
            st.integers(0, 3),
            st.sampled_from([b"", b"\r", b"\n", b"\0", b" ", b":", b";", b"0", b"7", b"f", b"-", b"+", b",", b"\xff"])
            | st.sampled_from([b"\r\n", b"\r\nContent-Length: 3", b"\r\nTransfer-Encoding: chunked", b"\r\n ", b"x"]),
        ),
        min_size=1,
        max_size=3,
    ),
)
@example(b"HTTP/1.1 200 \r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", [])
@example(b"HTTP/1.1 200 \r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n", [])
@example(b"HTTP/1.1 101 \r\n\r\nHTTP/1.1 200 \r\nContent-Length: 0\r\n\r\n", [])
def test_no_altered_answer_is_read_as_another_one_than_h11_reads(
    sent: bytes, changes: list[tuple[float, int, bytes]]
) -> None:
    for place, cut, put in changes:
        at = int(place * len(sent))
        sent = sent[:at] + put + sent[at + cut :]
    mine, other = ours([sent]), theirs(sent)
    if not isinstance(mine, str) and not isinstance(other, str):
        assert mine == other
