"""The heads of requests on the socket, beside h11: what both take for a request is the same request."""

from __future__ import annotations

import h11
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dps_agent.effects import NO_REPLY_PROTOCOL, NO_REPLY_TOO_LARGE, Failed
from dps_agent.host.local.heads import LENGTH_LIMIT, REQUEST_HEADERS, Head, read_head
from dps_agent.http1 import HEAD_LIMIT, Reader

GET = b"GET /events?a=b HTTP/1.1\r\n"
target = st.from_regex(rb"/[!-~]{0,20}", fullmatch=True)
header = st.tuples(
    st.sampled_from([b"Connection", b"Content-Length", b"Expect", b"X-Other", b"Transfer-Encoding", b"Bad Name"]),
    st.sampled_from([b":", b": ", b":\t", b" :", b""]),
    st.sampled_from(
        [b"", b"0", b"7", b"07", b"+7", b"7, 7", b"close", b"keep-alive, Close", b"100-continue", b"chunked"]
    ),
).map(b"".join)


def read(pieces: list[bytes]) -> tuple[Head | None, bytes]:
    """The head in these pieces and what is behind it; None where it is not whole."""
    reader = Reader(0, REQUEST_HEADERS)
    reading = read_head(reader)
    next(reading)
    for number, piece in enumerate(pieces):
        try:
            reading.send(piece)
        except StopIteration as end:
            return end.value, reader.rest + b"".join(pieces[number + 1 :])
    return None, reader.rest


@st.composite
def requests(draw: st.DrawFn) -> bytes:
    """Something that is a head, or nearly."""
    method = draw(st.sampled_from([b"GET", b"POST", b"get", b"", b"G T"]))
    version = draw(st.sampled_from([b"HTTP/1.1"] * 6 + [b"HTTP/1.0", b"HTTP/2.0", b""]))
    lines = [method + b" " + draw(target) + b" " + version, b"Host: a", *draw(st.lists(header, max_size=4)), b""]
    return draw(st.sampled_from([b""] * 5 + [b"\r\n"])) + b"".join(line + b"\r\n" for line in lines)


@given(requests(), st.binary(max_size=20))
def test_what_is_taken_is_what_h11_takes_byte_by_byte_as_well_as_at_once(head: bytes, behind: bytes) -> None:
    found: Head | Failed
    try:
        found, rest = read([head + behind])
        assert read([bytes([byte]) for byte in head + behind]) == (found, rest)
    except Failed as failed:
        with pytest.raises(Failed) as slowly:
            read([bytes([byte]) for byte in head + behind])
        assert slowly.value.reason == failed.reason == NO_REPLY_PROTOCOL
        return
    assert found is not None and rest == behind
    server = h11.Connection(h11.SERVER)
    server.receive_data(head)
    theirs = server.next_event()  # RemoteProtocolError: we took what is no request
    assert isinstance(theirs, h11.Request)
    headers = dict(theirs.headers)
    assert (found.method.encode(), theirs.target.partition(b"?")) == (
        theirs.method,
        (found.path.encode(), b"?" if b"?" in theirs.target else b"", found.query.encode()),
    )
    assert found.length == int(headers.get(b"content-length", b"0"))
    assert found.closes == _closes(theirs)
    if found.expects:
        assert headers[b"expect"].lower() == b"100-continue"


def _closes(request: h11.Request) -> bool:
    named = b",".join(value for name, value in request.headers if name == b"connection").lower()
    return request.http_version == b"1.0" or b"close" in [word.strip() for word in named.split(b",")]


def test_a_head_without_end_is_refused_while_it_comes() -> None:
    for piece, line in ((b"x", GET + b"A: "), (b"A: 1\r\n", GET)):
        with pytest.raises(Failed) as refused:
            read([line, *[piece] * (HEAD_LIMIT + 1)])
        assert refused.value.reason == NO_REPLY_TOO_LARGE


@pytest.mark.parametrize("length", [b"9" * 12, b"9" * 13, b"9" * 5000, b"0" * 30 + b"5"])
def test_a_length_of_any_number_of_digits_is_a_number(length: bytes) -> None:
    head, _ = read([GET + b"Content-Length: " + length + b"\r\n\r\n"])
    assert head is not None and head.length == (int(length) if len(length.lstrip(b"0")) < 13 else LENGTH_LIMIT)
