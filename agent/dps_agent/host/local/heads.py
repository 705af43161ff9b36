"""The heads of requests out of bytes: `dps_agent.http1` from the side that is asked.

A body is none of this: what to do with one is decided before any of it is read. Host is not looked at.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from dps_agent.effects import NO_REPLY_PROTOCOL, Failed

if TYPE_CHECKING:
    from dps_agent.http1 import Reader, Reading

REQUEST_HEADERS = ("connection", "content-length", "content-type", "expect", "transfer-encoding")
LENGTH_LIMIT = 1 << 40  # bytes; a larger Content-Length counts as that much
_METHOD = b"ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class Head(NamedTuple):
    """One request without its body of `length` bytes; its target is `path`, "?" and `query`."""

    method: str
    path: str
    query: str
    length: int
    closes: bool  # the connection is to end with the answer
    expects: bool  # the body comes once "100 Continue" was said
    kind: str  # its media type, in lower case and without parameters


def read_head(reader: Reader) -> Reading[Head]:
    """The next head; Failed `protocol` or `too_large`. A body in chunks is none that is read here."""
    reader.begin()
    words = (yield from reader.line()).split(b" ")
    if len(words) != 3 or words[2] not in (b"HTTP/1.1", b"HTTP/1.0") or words[1][:1] != b"/":
        raise Failed(NO_REPLY_PROTOCOL, "expected a request of HTTP/1.1")
    method, target, version = words
    if not method or method.strip(_METHOD) or min(target) <= 0x20 or max(target) >= 0x7F:
        raise Failed(NO_REPLY_PROTOCOL, "expected a method in capital letters, and a target in ASCII")
    headers = yield from reader.headers()
    if "transfer-encoding" in headers:
        raise Failed(NO_REPLY_PROTOCOL, "expected a body with Content-Length")
    digits = headers.get("content-length", "0")
    if not (digits.isascii() and digits.isdecimal()):
        raise Failed(NO_REPLY_PROTOCOL, "Content-Length: expected one number")
    digits = digits.lstrip("0")
    length = int(digits or "0") if len(digits) < 13 else LENGTH_LIMIT
    path, _, query = target.decode().partition("?")
    connection = headers.get("connection", "").lower().replace(" ", "").split(",")
    closes = "close" in connection or version == b"HTTP/1.0"
    expects = headers.get("expect", "").lower() == "100-continue"
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    return Head(method.decode(), path, query, length, closes, expects, kind)
