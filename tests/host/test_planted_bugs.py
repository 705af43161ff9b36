"""The tests notice what they are there to notice: each planted bug makes the named test fail, and only it is needed.

That they pass without it, they show by themselves: they are tests of this run like all others.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[2]
CAUGHT_BY = {
    "ignore-retry-after": "tests/core/test_registration.py::test_retry_after_is_honoured_between_polls",
    "accept-a-truncated-body": "tests/host/test_https.py::test_an_answer_cut_off_anywhere_is_never_a_reply",
    "no-budget": "tests/core/test_registration.py::test_an_outage_ends_within_the_budget",
    "swap-the-blobs": "tests/core/test_registration.py::test_a_registration_ends_with_hub_device_and_a_key_that_signs",
}


@pytest.mark.parametrize("bug", CAUGHT_BY)
def test_a_planted_bug_is_caught_by_its_test(bug: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", CAUGHT_BY[bug]]
    places = os.pathsep.join(str(CHECKOUT / folder) for folder in ("agent", "hal", "tests"))
    planted = subprocess.run(
        [*command, "-p", "support.planted_bugs"],
        check=False,
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PLANTED_BUG": bug, "PYTHONPATH": places, "COLUMNS": "500"},
    )
    assert planted.returncode == 1, f"{CAUGHT_BY[bug]} passes with {bug} planted:\n{planted.stdout}{planted.stderr}"
    assert is_noticed(CAUGHT_BY[bug], planted.stdout), f"it failed for another reason:\n{planted.stdout}"


def is_noticed(test: str, report: str) -> bool:
    """Whether a claim of the test's own did not hold, by pytest's last words on it; any other exception is no claim."""
    return bool(re.search(rf"^FAILED {re.escape(test)}(\[.*\])? - (AssertionError\b|assert )", report, re.MULTILINE))


def test_a_test_that_ends_for_another_reason_notices_nothing() -> None:
    for report, noticed in (
        ("FAILED a.py::x - AssertionError: [2.1]", True),
        ("FAILED a.py::x[1 2] - assert 1 == 2", True),
        ("    assert x\nE  OSError\nFAILED a.py::x - OSError: AssertionError", False),
        ("FAILED a.py::other - assert 1 == 2", False),
        ("ERROR a.py::x - AssertionError", False),
    ):
        assert is_noticed("a.py::x", report) == noticed, report
