"""The targets of `tools/fuzz`, without what looks for ways through the code: their seeds, and seeds that were altered.

The same alterations on every machine: what is found here is found again. `tools/fuzz` finds more, and takes longer.
"""

from __future__ import annotations

import random
import warnings
from itertools import islice

import pytest

from support.fuzz.target import Target, accepts, altered
from support.fuzz.targets import TARGETS

INPUTS = 1500


def first_failure(target: Target) -> str:
    """The first input that the target fails on, and how; empty where it takes or refuses all of them."""
    seeds = target.seeds()
    for content in (*seeds, *islice(altered(seeds, random.Random(target.name)), INPUTS)):
        try:
            target.take(content)
        except Exception as error:
            return f"{error!r} for {content!r}"
    return ""


@pytest.mark.parametrize("name", TARGETS)
def test_what_is_altered_is_taken_or_refused(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # `cryptography` warns of odd certificates
        assert not (failure := first_failure(TARGETS[name])), f"tools/fuzz {name} --input FILE: {failure}"


@pytest.mark.parametrize("name", TARGETS)
def test_every_target_takes_one_of_its_seeds(name: str) -> None:
    target = TARGETS[name]
    assert any(target.take(seed) for seed in target.seeds()), "it would refuse everything"


def test_a_parser_that_fails_is_noticed() -> None:
    def parse(content: bytes) -> object:
        text = content.decode("ascii", "ignore")
        return {"a": 1}[text] if text.startswith("a") else int(text)

    def target(*refusals: type[Exception]) -> Target:
        return Target("x", "numbers", lambda content: accepts(refusals, lambda: parse(content)), lambda: [b"1", b"a"])

    assert "KeyError" in first_failure(target(ValueError))
    assert not first_failure(target(ValueError, KeyError))
