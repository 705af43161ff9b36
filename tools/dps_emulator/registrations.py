"""What the service remembers of a device that has registered, and how that is written down."""

import base64
import time
from dataclasses import dataclass, field
from typing import Any, Literal


class StateError(Exception):
    """A state folder, or a file in it, that can't be used; the message names it."""


@dataclass(frozen=True)
class Assignment:
    """A device's place in a hub."""

    hub: str
    device_id: str
    key: bytes = field(repr=False)
    substatus: str
    etag: str
    last_updated: str
    payload: dict[str, Any] | None


@dataclass(frozen=True)
class Failure:
    """How an operation ended without an assignment."""

    status: Literal["failed", "disabled"]
    code: int
    message: str


@dataclass(frozen=True)
class Operation:
    """One accepted register request."""

    operation_id: str
    ready_at_s: float
    payload: dict[str, Any] | None
    finished: bool = False
    failure: Failure | None = None


@dataclass(frozen=True)
class Registration:
    """What the service knows about a device that has registered."""

    registration_id: str
    created: str
    operation: Operation
    assignment: Assignment | None = None

    def to_json(self) -> dict[str, Any]:
        """For a file; holds the hub key."""
        record: dict[str, Any] = {
            "registrationId": self.registration_id,
            "created": self.created,
            "operation": dict(vars(self.operation)),
        }
        if self.operation.failure:
            record["operation"]["failure"] = vars(self.operation.failure)
        if self.assignment:
            record["assignment"] = {**vars(self.assignment), "key": base64.b64encode(self.assignment.key).decode()}
        return record

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> "Registration":
        """The inverse of `to_json`; raises KeyError, TypeError or ValueError on anything else."""
        operation, assignment = dict(record["operation"]), record.get("assignment")
        if operation["failure"]:
            operation["failure"] = Failure(**operation["failure"])
        if assignment:
            assignment = Assignment(**{**assignment, "key": base64.b64decode(assignment["key"], validate=True)})
        return cls(record["registrationId"], record["created"], Operation(**operation), assignment)


def utc_text(when_s: float) -> str:
    """RFC 3339 with seven fractional digits, as the service prints it."""
    whole = int(when_s)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(whole))}.{int((when_s - whole) * 10_000_000):07d}Z"
