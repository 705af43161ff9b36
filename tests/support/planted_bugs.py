"""A pytest plugin that plants one bug, named by the environment variable PLANTED_BUG, into the product.

    PLANTED_BUG=no-budget pytest -p support.planted_bugs tests/core/test_registration.py

Each stands for a mistake that a change could make without being noticed; `tests/host/test_planted_bugs.py` says which
test notices it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator
from typing import Any

import dps_agent.http1
import dps_agent.registration
import dps_agent.registration_by_tpm
from dps_agent.effects import Sleep

registration: Any = dps_agent.registration
registration_by_tpm: Any = dps_agent.registration_by_tpm
http1: Any = dps_agent.http1


def ignore_retry_after() -> None:
    """The header is never read; every wait is our own."""
    registration.retry_after_s = lambda headers, limit_s: None


def accept_a_truncated_body() -> None:
    """Where the connection ends early, zeros stand for the rest of the answer."""
    http1._came = lambda received: received or bytes(64)


def no_budget() -> None:
    """A registration goes on for ever."""

    def sleep(delay_s: float, deadline_s: float, error: object) -> Generator[Any, Any, None]:
        yield Sleep(delay_s, "for ever")

    registration._sleep_within = sleep


def swap_the_blobs() -> None:
    """The key of the challenge is stored as the hub's."""
    decode = registration_by_tpm.activation_of
    challenges: list[bytes] = []

    def swapped(text: str | None, what: str) -> bytes:
        blob = decode(text, what)
        if what == "the challenge":
            challenges.append(blob)
        return challenges[-1]

    registration_by_tpm.activation_of = swapped


BUGS: dict[str, Callable[[], None]] = {
    "ignore-retry-after": ignore_retry_after,
    "accept-a-truncated-body": accept_a_truncated_body,
    "no-budget": no_budget,
    "swap-the-blobs": swap_the_blobs,
}

BUGS[os.environ["PLANTED_BUG"]]()
