"""A pytest plugin that plants one bug, named by the environment variable PLANTED_BUG, into the product.

    PLANTED_BUG=no-budget pytest -p support.planted_bugs tests/core/test_registration.py

Each stands for a mistake that a change could make without being noticed; `tests/host/test_planted_bugs.py` says which
test notices it.
"""

from __future__ import annotations

import http.client
import os
from collections.abc import Callable, Generator
from typing import Any

import dps_agent.host.https
import dps_agent.registration
from dps_agent.effects import Sleep

registration: Any = dps_agent.registration
https: Any = dps_agent.host.https


def ignore_retry_after() -> None:
    """The header is never read; every wait is our own."""
    registration.retry_after_s = lambda header, limit_s: None


def accept_a_truncated_body() -> None:
    """What arrived before the connection ended is taken for the whole answer."""

    def body(response: http.client.HTTPResponse, stream: object) -> bytes:
        try:
            return response.read()
        except http.client.IncompleteRead as short:
            return short.partial

    https._body = body


def no_budget() -> None:
    """A registration goes on for ever."""

    def sleep(delay_s: float, deadline_s: float, error: object) -> Generator[Any, Any, None]:
        yield Sleep(delay_s, "for ever")

    registration._sleep_within = sleep


def swap_the_blobs() -> None:
    """The key of the challenge is stored as the hub's."""
    decode = registration.activation_of
    challenges: list[bytes] = []

    def swapped(text: str | None, what: str) -> bytes:
        blob = decode(text, what)
        if what == "the challenge":
            challenges.append(blob)
        return challenges[-1]

    registration.activation_of = swapped


BUGS: dict[str, Callable[[], None]] = {
    "ignore-retry-after": ignore_retry_after,
    "accept-a-truncated-body": accept_a_truncated_body,
    "no-budget": no_budget,
    "swap-the-blobs": swap_the_blobs,
}

BUGS[os.environ["PLANTED_BUG"]]()
