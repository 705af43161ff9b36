"""The credentials topics of a hub: what a device asks for, and what stands of it in the device's record.

A preview of the real service, hub api-version 2025-08-01-preview; topics, members, statuses and codes as a test run
against it has shown. One request of a device is under way at a time. Its end is kept until it was delivered, also over
connections. What is not published is ours: what a token, or an enrolment without a policy, is answered with.
"""

import json
import re
from dataclasses import dataclass
from typing import Any

from dps_emulator.certificates import CertificateError
from dps_emulator.issuing import request_of
from dps_emulator.json_text import parse_json
from dps_emulator.registrations import utc_text

LIFE_S = 43_200.0  # of a request, as an answer showed it
BAD_REQUEST = 400004
NOT_JSON = 400006
NOT_VERIFIED = 400037
FORBIDDEN = 403010
NO_POLICY = 404001
UNDER_WAY = 409004
NOTHING_TO_REPLACE = 412001

ANY = "*"  # `replace`: whichever is under way
_REQUEST_ID = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9-]{2,34}[A-Za-z0-9])")
_MEMBERS = ("id", "csr", "replace")


@dataclass(frozen=True)
class Pending:
    """A request under way, or one whose end was not delivered."""

    request_id: str
    csr: str  # base64 of DER
    correlation_id: str
    expires_at_s: float
    ready_at_s: float
    status: int = 0  # of the end; 0: there is none yet
    body: str = ""

    @property
    def accepted(self) -> bytes:
        """The body of the 202."""
        expires = utc_text(self.expires_at_s)
        return _json({"correlationId": self.correlation_id, "operationExpires": expires})


class RefusedError(Exception):
    """A request that is answered with an error."""

    def __init__(self, code: int, message: str, info: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.info = info


def is_request_id(text: str) -> bool:
    """Whether `$rid` is one that the hub answers to: 4 to 36 letters, digits and dashes, no dash at the ends."""
    return _REQUEST_ID.fullmatch(text) is not None


def take(
    content: bytes,
    request_id: str,
    device_id: str,
    pending: Pending | None,
    correlation_id: str,
    now: float,
    after_s: float,
) -> Pending:
    """What is under way once this was asked for; raises RefusedError."""
    if not content:
        raise RefusedError(BAD_REQUEST, "The body is empty.")
    try:
        value = parse_json(content)
    except ValueError:
        raise RefusedError(NOT_JSON, "The body is not valid JSON.") from None
    if not isinstance(value, dict):
        raise RefusedError(BAD_REQUEST, "The body is not a JSON object.")
    if strange := [name for name in value if name not in _MEMBERS]:
        raise RefusedError(BAD_REQUEST, f"The body has a member that is not known: {strange[0][:64]}.")
    if value.get("id") != device_id:
        raise RefusedError(BAD_REQUEST, "id is not the authenticated device's.")
    try:
        request_of(value.get("csr"))
    except CertificateError as error:
        raise RefusedError(BAD_REQUEST, f"csr {error}.") from None
    replaces = value.get("replace")
    if replaces is not None and not (isinstance(replaces, str) and (replaces == ANY or is_request_id(replaces))):
        raise RefusedError(BAD_REQUEST, "replace is neither a request id nor *.")
    if replaces not in (None, ANY) and (pending is None or pending.request_id != replaces):
        raise RefusedError(NOTHING_TO_REPLACE, "replace names no pending request.")
    csr = str(value["csr"])
    if pending is not None and replaces is None:
        if (pending.request_id, pending.csr) == (request_id, csr):
            return pending
        info = {
            "requestId": pending.request_id,
            "operationExpires": utc_text(pending.expires_at_s),
            "correlationId": pending.correlation_id,
        }
        raise RefusedError(UNDER_WAY, "A request is under way.", info)
    return Pending(request_id, csr, correlation_id, now + LIFE_S, now + after_s)


def issued(pending: Pending, chain: list[str]) -> bytes:
    """The body of the 200."""
    return _json({"correlationId": pending.correlation_id, "certificates": chain})


def error(code: int, message: str, tracking: str, now: float, info: dict[str, Any] | None = None) -> bytes:
    """The body of an error."""
    when = utc_text(now)
    content: dict[str, Any] = {
        "errorCode": code,
        "message": message,
        "trackingId": f"{tracking}-G2:-TimeStamp:{when}",
        "timestampUtc": when,
        "info": info,
    }
    return _json(content)


def not_verified(tracking: str, now: float) -> bytes:
    """The end of a request whose `csr` is base64, and no request that can be taken."""
    info = {"credentialError": "400000", "credentialMessage": "CSR did not pass verification"}
    return error(NOT_VERIFIED, "The credential was not issued.", tracking, now, info)


def _json(content: object) -> bytes:
    return json.dumps(content, separators=(",", ":")).encode()
