"""Fault scripts: what shall go wrong with which request.

A script is a JSON list of objects. Which requests: `request` (the n-th, from 1; absent: every one), counted over all
requests or over those of the same `method` ("PUT") and `operation` ("register", "operation", "lookup") where given.
`times`: no more than so often. What goes wrong, in any combination:

- `status`, `body` (text, or JSON of any shape): answered instead of asking the service;
- `headers`: names and values that replace the answer's, null takes one away; the connection ends behind an answer with
  `Connection: close` or a wrong `Content-Length`;
- `retryAfterDateS`: Retry-After is a date, so many seconds behind the answer's own Date;
- `delayS`: seconds before the service is asked;
- `drip`: bytes of the body each second; `chunked`: true sends the body without a Content-Length;
- `cutAfterBytes`: the connection ends after so many bytes of the body, the promised rest unsent; -1: before the
  answer begins; `reset`: true ends it by TCP RST instead of FIN.

An entry is about a hub where `method` is "MQTT" or `operation` is one of these: `accept` (a TCP connection, before
TLS), `connect`, `subscribe`, `unsubscribe`, `telemetry`, `twin-get`, `twin-patch`, `method-answer`, `puback`, `ping`,
`issue-certificate`, `disconnect`. `device`: only this device's packets (an `accept` has no device yet). There, in any
combination:

- `delayS`: seconds before the hub acts, and before it reads the connection's next packet;
- `connack`: 1 to 5, the answer to a `connect`; 3 is how a hub throttles connections;
- `status`: the answer to a `twin-get`, `twin-patch` or `issue-certificate`; 429 is how a hub throttles them;
- `drop`: the connection ends, "before" the hub acts on the packet or "after", its answer unsent; `reset` as above;
- `silent`: from then on the hub reads and says nothing, the packet counting ("after") or not ("before").

The first entry that fits a request or packet is taken.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from email.utils import format_datetime, parsedate_to_datetime
from typing import Any

from dps_emulator.service import (
    RefusalError,
    Request,
    Response,
    json_response,
    refusal_response,
    standard_headers,
    target_of,
)

MQTT = "MQTT"
DPS_OPERATIONS = ("register", "operation", "lookup")
HUB_OPERATIONS = (
    "accept",
    "connect",
    "subscribe",
    "unsubscribe",
    "telemetry",
    "twin-get",
    "twin-patch",
    "method-answer",
    "puback",
    "ping",
    "issue-certificate",
    "disconnect",
)


class FaultScriptError(ValueError):
    """A fault script that can't be used; the message names the entry and the field."""


@dataclass(frozen=True)
class Fault:
    """One entry of a script."""

    request: int | None = None
    method: str | None = None
    operation: str | None = None
    status: int | None = None
    body: object = None
    headers: Mapping[str, str | None] = field(default_factory=dict)
    delay_s: float = 0.0
    drip: float | None = None  # bytes a second
    chunked: bool = False
    cut_after_bytes: int | None = None
    reset: bool = False
    times: int | None = None
    device: str | None = None
    connack: int | None = None
    drop: str | None = None  # before or after
    silent: str | None = None  # before or after
    retry_after_date_s: int | None = None

    @property
    def is_hubs(self) -> bool:
        """Whether this is about a hub's connections, not about requests to DPS."""
        return self.method == MQTT or self.operation in HUB_OPERATIONS

    @property
    def replaces_answer(self) -> bool:
        """Whether the service is not asked."""
        return self.status is not None or self.body is not None

    def answer(self, request_id: str, now: float) -> Response:
        """The answer instead of the service's; without a body an error of that status."""
        status = 200 if self.status is None else self.status
        if self.body is None:
            response = refusal_response(RefusalError(status * 1000 + 1, "A fault script says so."), request_id, now)
        elif isinstance(self.body, str):
            response = Response(status, (("Content-Type", "application/json; charset=utf-8"),), self.body.encode())
        else:
            response = json_response(status, self.body)
        return Response(
            status, (*response.headers, *standard_headers(request_id, now)), response.body, request_id=request_id
        )

    def altered(self, headers: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
        """The answer's headers with this entry's in their place."""
        changes = dict(self.headers)
        if self.retry_after_date_s is not None:
            date = next(value for name, value in headers if name.lower() == "date")
            until = parsedate_to_datetime(date) + timedelta(seconds=self.retry_after_date_s)
            changes["Retry-After"] = format_datetime(until, usegmt=True)
        own = {name.lower() for name in changes}
        kept = [(name, value) for name, value in headers if name.lower() not in own]
        return kept + [(name, value) for name, value in changes.items() if value is not None]


NO_FAULT = Fault()


class FaultScript:
    """A script and how often each of its entries has been counted."""

    def __init__(self, faults: Sequence[Fault] = ()) -> None:
        self.faults = list(faults)
        self._counted = [0] * len(self.faults)
        self._taken = [0] * len(self.faults)

    def of_request(self, request: Request) -> tuple[int, Fault]:
        """Counts one request to DPS; its entry's number and its fault, 0 and no fault where there is none."""
        return self.take(request.method, target_of(request.path).operation) or (0, NO_FAULT)

    def take(self, method: str, operation: str, device: str = "") -> tuple[int, Fault] | None:
        """Counts one request, or one packet with MQTT as its method; its fault and that entry's number, or None."""
        taken = None
        for at, fault in enumerate(self.faults):
            if fault.is_hubs != (method == MQTT) or fault.device not in (None, device):
                continue
            if fault.method in (None, method) and fault.operation in (None, operation):
                self._counted[at] += 1
                left = fault.times is None or self._taken[at] < fault.times
                if taken is None and left and fault.request in (None, self._counted[at]):
                    self._taken[at] += 1
                    taken = at + 1, fault
        return taken


_FIELDS: dict[str, tuple[str, type | tuple[type, ...], str]] = {
    "request": ("request", int, "a number from 1"),
    "method": ("method", str, "text"),
    "operation": ("operation", str, f"one of {', '.join((*DPS_OPERATIONS, *HUB_OPERATIONS))}"),
    "status": ("status", int, "an HTTP status from 200 to 599"),
    "body": ("body", object, "anything"),
    "headers": ("headers", dict, "an object of Latin-1 text of one line or null, without Transfer-Encoding"),
    "retryAfterDateS": ("retry_after_date_s", int, "a number of seconds from 0"),
    "delayS": ("delay_s", (int, float), "seconds"),
    "drip": ("drip", (int, float), "bytes a second, more than 0"),
    "chunked": ("chunked", bool, "true or false"),
    "cutAfterBytes": ("cut_after_bytes", int, "a number from -1"),
    "reset": ("reset", bool, "true or false"),
    "times": ("times", int, "a number from 1"),
    "device": ("device", str, "text"),
    "connack": ("connack", int, "a number from 1 to 5"),
    "drop": ("drop", str, "before or after"),
    "silent": ("silent", str, "before or after"),
}
_ANSWERED = ("twin-get", "twin-patch", "issue-certificate")  # what a hub may answer with an error
_ONLY_DPS = ("body", "headers", "retryAfterDateS", "drip", "chunked", "cutAfterBytes")
_ONLY_HUBS = ("device", "connack", "drop", "silent")
_RANGES: dict[str, tuple[float, float]] = {
    "request": (1, 10**9),
    "status": (200, 599),
    "retryAfterDateS": (0, 10**9),
    "delayS": (0, 86_400),
    "drip": (0.01, 10**9),
    "cutAfterBytes": (-1, 10**9),
    "times": (1, 10**9),
    "connack": (1, 5),
}


def read_fault_script(text: str) -> FaultScript:
    """Parses a script; raises FaultScriptError."""
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FaultScriptError(f"not valid JSON: {error}") from None
    return fault_script(entries)


def fault_script(entries: object) -> FaultScript:
    """A script from the JSON value that it is; raises FaultScriptError."""
    if not isinstance(entries, list):
        raise FaultScriptError("a fault script is a JSON list of objects")
    return FaultScript([_fault(number, entry) for number, entry in enumerate(entries, 1)])


def _is_header(name: str, value: object) -> bool:
    """Whether that can be sent; a body is framed by `chunked` alone."""
    text = name if value is None else f"{name}{value}"
    return (
        (value is None or isinstance(value, str))
        and name.lower() != "transfer-encoding"
        and all(character not in "\r\n\0" and ord(character) < 256 for character in text)
    )


def _fault(number: int, entry: object) -> Fault:
    if not isinstance(entry, dict):
        raise FaultScriptError(f"entry {number} is not an object")
    values: dict[str, Any] = {}
    for name, value in entry.items():
        if name not in _FIELDS:
            raise FaultScriptError(f"entry {number}: unknown field '{name}', expected one of {', '.join(_FIELDS)}")
        attribute, kind, expected = _FIELDS[name]
        low, high = _RANGES.get(name, (float("-inf"), float("inf")))
        fits = isinstance(value, kind) and (kind in (bool, object) or not isinstance(value, bool))
        fits = fits and (name not in _RANGES or low <= value <= high)
        if name == "operation":
            fits = value in (*DPS_OPERATIONS, *HUB_OPERATIONS)
        if name in ("drop", "silent"):
            fits = value in ("before", "after")
        if name == "headers" and isinstance(value, dict):
            fits = all(_is_header(*item) for item in value.items())
        if not fits:
            raise FaultScriptError(f"entry {number}: '{name}' is not {expected}")
        values[attribute] = value
    if "reset" in entry and "cutAfterBytes" not in entry and "drop" not in entry:
        raise FaultScriptError(f"entry {number}: 'reset' needs 'cutAfterBytes', or 'drop' at a hub")
    fault = Fault(**values)
    misplaced = [name for name in (_ONLY_DPS if fault.is_hubs else _ONLY_HUBS) if name in entry]
    if misplaced:
        where = "a request to DPS" if fault.is_hubs else "a hub's packet: name its 'operation'"
        raise FaultScriptError(f"entry {number}: '{misplaced[0]}' is only for {where}")
    if fault.is_hubs and fault.operation in DPS_OPERATIONS:
        raise FaultScriptError(f"entry {number}: '{fault.operation}' is no operation at a hub")
    if fault.connack is not None and fault.operation != "connect":
        raise FaultScriptError(f"entry {number}: 'connack' is only for 'connect'")
    if fault.is_hubs and fault.status is not None and fault.operation not in _ANSWERED:
        raise FaultScriptError(f"entry {number}: 'status' at a hub is only for {', '.join(_ANSWERED)}")
    return fault
