"""What a check is, and what comes of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dps_agent.host.config import ConfigurationError
from dps_hal.host.codes import REMEDIES

if TYPE_CHECKING:
    from dps_hal.errors import DpsError

OK = "ok"
WARNING = "warning"
FAILED = "failed"
SKIPPED = "skipped"
NOTHING_STORED = "no assignment is stored"


@dataclass(frozen=True)
class Finding:
    """What came of one check: OK, WARNING, FAILED or SKIPPED, what was seen, what to do; `error` where it failed.

    What `comes_first` is named in the first line, whatever failed: nothing else matters before it is done.
    """

    result: str
    detail: str
    remedy: str = ""
    error: DpsError | None = None
    comes_first: bool = False


@dataclass(frozen=True)
class Check:
    """One check: its stable id, what it makes sure of as a sentence, the checks without which it has no sense."""

    id: str
    description: str
    needs: tuple[str, ...]
    run: Callable[[Any], Finding]  # called with the `Device`
    online: bool = False  # the check uses the network


def failed(error: DpsError, remedy: str = "") -> Finding:
    """The finding for an error; `remedy` where the one of its code does not fit."""
    detail = "; ".join(error.problems) if isinstance(error, ConfigurationError) else error.message
    return Finding(FAILED, detail, remedy or REMEDIES.get(error.code, ""), error)
