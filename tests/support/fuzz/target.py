"""What a target is, and a cheap way to alter what it takes."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Iterator

DEEP = b"[" * 20_000  # deeper than any parser that is recursive goes
_ODD = (
    b"\0",
    b"\xff",
    b"\x7f",
    b"\x80",
    b"\r\n",
    b"\n",
    b'"',
    b"%",
    b"[[[[",
    b"-1",
    b"65536",
    b"\xed\xa0\x80",
    b"=",
    b",",
)


class Target(NamedTuple):
    """One parser.

    `take` gives it bytes, and tells whether they were taken for what it reads; a refusal that is documented is no
    failure, any other exception is one, and so is a claim of `take`'s own that does not hold.
    """

    name: str
    reads: str
    take: Callable[[bytes], bool]
    seeds: Callable[[], list[bytes]]


def accepts(refusals: tuple[type[Exception], ...] | type[Exception], parse: Callable[[], object]) -> bool:
    """Whether `parse()` returns; any exception but these comes through."""
    try:
        parse()
    except refusals:
        return False
    return True


def halves(content: bytes) -> tuple[bytes, bytes]:
    """Two inputs out of one: what stands before the first line end, and what behind it."""
    first, _, second = content.partition(b"\n")
    return first, second


def altered(seeds: list[bytes], source: random.Random) -> Iterator[bytes]:
    """Seeds with one to four alterations each, without an end."""
    while True:
        content = bytearray(source.choice(seeds))
        for _ in range(source.randint(1, 4)):
            at = source.randint(0, len(content))
            match source.randrange(6):
                case 0 if content:
                    content[at % len(content)] ^= 1 << source.randrange(8)
                case 1:
                    del content[at : at + source.choice((1, 2, 16, len(content)))]
                case 2:
                    content[at:at] = source.choice(_ODD)
                case 3:
                    content[at:at] = content[at : at + source.choice((1, 8, 64))]
                case 4:
                    other = source.choice(seeds)
                    begin = source.randint(0, len(other))
                    content[at:] = other[begin:]
                case _:
                    content[at : at + 1] = bytes([source.randrange(256)])
        yield bytes(content)
