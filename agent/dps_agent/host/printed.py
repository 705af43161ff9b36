"""Text and times as people get to see them."""

import time


def printable(text: str) -> str:
    """`text` with what could steer a terminal made visible; line ends stay."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def utc_text(utc_s: float) -> str:
    """Unix seconds as RFC 3339 text in UTC, "" for 0."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(utc_s)) if utc_s else ""
