"""An error as JSON: the same fields on the command line, on the socket and in the state file."""

from __future__ import annotations

from dps_hal.host.codes import REMEDIES

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from dps_hal.errors import DpsError


def error_fields(code: str, message: str, retry_after_s: int | None = None, request_id: str = "") -> dict[str, Any]:
    """The value of `error` in a document."""
    return {
        "code": code,
        "message": message,
        "remedy": REMEDIES.get(code, ""),
        "retryAfterS": retry_after_s,
        "requestId": request_id,
    }


def fields_of(error: DpsError, retry_after_s: int | None = None) -> dict[str, Any]:
    """The same of an error that was raised; `retry_after_s` where somebody knows better than it."""
    wait_s = error.retry_after_s if retry_after_s is None else retry_after_s
    return error_fields(error.code, error.message, wait_s, error.request_id)
