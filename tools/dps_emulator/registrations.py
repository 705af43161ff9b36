"""What the service remembers of a device that has registered, and how that is written down."""

import base64
import functools
import time
from abc import abstractmethod
from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any, Literal

from dps_emulator.attestation import Credential


class StateError(Exception):
    """A state folder, or a file in it, that can't be used; the message names it."""


@dataclass(frozen=True)
class Assignment:
    """A device's place in a hub."""

    hub: str
    device_id: str
    credential: Credential
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
    group: str = ""  # the enrolment group that the device is a member of
    csr: str = ""  # the request for a certificate that came with it; base64 of DER
    chain: tuple[str, ...] = ()  # what was issued for it, the device's own certificate first; base64 of DER


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
            record["assignment"] = {**vars(self.assignment), "credential": self.assignment.credential.to_json()}
        return record

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> "Registration":
        """The inverse of `to_json`; raises KeyError, TypeError or ValueError on anything else."""
        operation, assignment = dict(record["operation"]), record.get("assignment")
        if operation["failure"]:
            operation["failure"] = Failure(**operation["failure"])
        operation["chain"] = tuple(operation.get("chain", ()))
        if assignment:
            fields = dict(assignment)
            if "key" in fields:  # of an earlier release
                credential = Credential((base64.b64decode(fields.pop("key"), validate=True),))
            else:
                credential = Credential.from_json(fields.pop("credential"))
            assignment = Assignment(**fields, credential=credential)
        return cls(record["registrationId"], record["created"], Operation(**operation), assignment)


class Registrations(MutableMapping[str, Registration]):
    """Registrations by lower-case registration id; they are also found by the place that a device has in a hub."""

    @abstractmethod
    def at(self, hub: str, device_id: str) -> Registration | None:
        """Who has last been assigned to that place, and is there still; both names without case."""

    @abstractmethod
    def devices_at(self, hub: str) -> set[str]:
        """The device ids, in lower case, that are assigned to a hub."""


def utc_text(when_s: float) -> str:
    """RFC 3339 with seven fractional digits, as the service prints it."""
    whole_s = int(when_s)
    return f"{_seconds_text(whole_s)}.{int((when_s - whole_s) * 10_000_000):07d}Z"


@functools.lru_cache(8)  # many things happen within a second
def _seconds_text(when_s: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(when_s))
