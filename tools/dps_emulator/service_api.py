"""The service side of DPS: enrolments, groups and registrations, for back ends; a request goes in, an answer comes out.

Source: DPS service API 2021-10-01, and 2025-07-01-preview for credentialPolicyName. Where nothing is published, the
choice is marked as ours. Whoever calls has the shared access policy `provisioningserviceowner`.
"""

import base64
import hashlib
import hmac
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any
from urllib.parse import parse_qs, unquote

from dps_emulator.attestation import NEW_KEY_BYTES, key_text
from dps_emulator.enrollments import Enrollment, EnrollmentError, enrollment_from_json, kind_of, registration_key
from dps_emulator.issuing import FIRST_REGISTRATION_API, has_requests
from dps_emulator.registrations import Registration, StateError, utc_text
from dps_emulator.service import (
    BAD_REQUEST,
    EK_MISMATCH,
    METHOD_NOT_ALLOWED,
    NOT_FOUND,
    SCOPE_NOT_FOUND,
    UNAUTHORIZED,
    RefusalError,
    Request,
    Response,
    json_response,
    object_of,
    refusal_response,
    standard_headers,
)
from dps_emulator.store import Records, Store
from dps_emulator.tokens import TokenError, expiry_refusal, parse_token

POLICY = "provisioningserviceowner"
BULK_LIMIT = 10
PAGE_LIMIT = 1000  # ours; so many without x-ms-max-item-count, and at most
# HTTP status = code // 1000; the numbers are ours.
CONFLICT = 409001
PRECONDITION_FAILED = 412001

_KINDS = {"enrollments": False, "enrollmentGroups": True}
_MODES = ("create", "update", "updateIfMatchETag", "delete")


def policy_key(secret: bytes, policy: str) -> bytes:
    """The key of a shared access policy of an emulator with this secret."""
    return hmac.digest(secret, policy.encode(), "sha256")


def policy_refusal(request: Request, policy: str, key: bytes, now: float, skew_s: int) -> str | None:
    """Why a request to a service is not authorised by a policy's key, or None where it is."""
    text = request.headers.get("authorization")
    if text is None:
        return f"Authorization is missing: a token of the policy '{policy}'"
    try:
        token = parse_token(text)
    except TokenError as error:
        return f"the token {error}"
    host = request.headers.get("host", "").casefold()
    resource = token.readings[0].casefold()
    if resource.partition("/")[0] not in (host, host.rpartition(":")[0]):
        return "its sr is not this host"
    if token.key_name != policy:
        return f"its skn is not '{policy}'"
    if not token.signed_by(key):
        return f"it is not signed by the key of '{policy}'"
    return expiry_refusal(token, now, skew_s)


class ServiceApi:
    """The service API of one DPS instance over its store."""

    def __init__(self, store: Store, secret: bytes, clock_skew_s: int) -> None:
        self._store = store
        self._key = policy_key(secret, POLICY)
        self._clock_skew_s = clock_skew_s

    @staticmethod
    def takes(path: str) -> bool:
        """Whether a path is one of this API, not of a device."""
        return path.split("/")[1:2][0] in (*_KINDS, "registrations") if path.startswith("/") else False

    def answer(self, request: Request, now: float) -> Response:
        """Answers one request at `now` (Unix seconds); raises StateError alone."""
        request_id = os.urandom(16).hex()
        try:
            response = self._answer(request, now)
        except RefusalError as refusal:
            response = refusal_response(refusal, request_id, now)
        except EnrollmentError as error:
            response = refusal_response(RefusalError(EK_MISMATCH, f"{error}."), request_id, now)
        headers = (*response.headers, *standard_headers(request_id, now))
        return replace(response, headers=headers, request_id=request_id)

    def _answer(self, request: Request, now: float) -> Response:
        refusal = policy_refusal(request, POLICY, self._key, now, self._clock_skew_s)
        if refusal:
            raise RefusalError(UNAUTHORIZED, f"The request is refused: {refusal}.")
        version = parse_qs(request.query).get("api-version", [""])[0].strip()
        if not version:
            raise RefusalError(BAD_REQUEST, "The query parameter api-version is missing or empty.")
        segments = [unquote(segment) for segment in request.path.split("/")[1:]]
        match request.method, segments:
            case "POST", [("enrollments" | "enrollmentGroups") as kind]:
                return self._bulk(kind, object_of(request), version, now)
            case "POST", [("enrollments" | "enrollmentGroups") as kind, "query"]:
                return self._query(kind, request, version)
            case "POST", [("enrollments" | "enrollmentGroups") as kind, name, "attestationmechanism"]:
                return json_response(200, self._found(kind, name).to_json()["attestation"])
            case "GET", [("enrollments" | "enrollmentGroups") as kind, name]:
                return json_response(200, _as_asked(_shown(self._found(kind, name)), version))
            case "PUT", [("enrollments" | "enrollmentGroups") as kind, name]:
                given = _as_asked(object_of(request), version)
                shown = self._put(kind, name, given, request.headers.get("if-match"), now)
                return json_response(200, _as_asked(shown, version))
            case "DELETE", [("enrollments" | "enrollmentGroups") as kind, name]:
                self._delete(kind, name, request.headers.get("if-match"))
                return Response(204, (), b"")
            case "GET", ["registrations", name]:
                return json_response(200, registration_state(self._registration(name)))
            case "DELETE", ["registrations", name]:
                registration = self._registration(name)
                _require_match(request.headers.get("if-match"), registration_state(registration).get("etag", ""))
                del self._store.registrations[registration_key(name)]
                return Response(204, (), b"")
            case "POST", ["registrations", name, "query"]:
                group = self._found("enrollmentGroups", name).registration_id
                states = (
                    (key, registration_state(each))
                    for key, each in self._walk(self._store.registrations, request)
                    if each.operation.group == group
                )
                return _page(states, request, "registrationState")
            case _, [*_]:
                if len(segments) > 3 or (len(segments) == 1 and segments[0] == "registrations"):
                    raise RefusalError(SCOPE_NOT_FOUND, "There is nothing at this path.")
                raise RefusalError(METHOD_NOT_ALLOWED, f"This path does not take {request.method}.")
        raise AssertionError("unreachable")

    # --- enrolments

    def _records(self, kind: str) -> Records[Enrollment]:
        return self._store.groups if _KINDS[kind] else self._store.enrollments

    def _found(self, kind: str, name: str) -> Enrollment:
        enrollment = self._records(kind).get(registration_key(name))
        if enrollment is None:
            raise RefusalError(NOT_FOUND, "The enrolment was not found.")
        return enrollment

    def _put(self, kind: str, name: str, given: dict[str, Any], if_match: str | None, now: float) -> dict[str, Any]:
        """Creates or replaces an enrolment; without If-Match whichever is there (ours). Returns what is shown of it."""
        id_name = "enrollmentGroupId" if _KINDS[kind] else "registrationId"
        if registration_key(str(given.get(id_name, name))) != registration_key(name):
            raise RefusalError(BAD_REQUEST, f"{id_name} in the body is not the path's.")
        before = self._records(kind).get(registration_key(name))
        if if_match is not None:
            _require_match(if_match, etag(before) if before else None)
        when = utc_text(now)
        created = before.rest.get("createdDateTimeUtc", when) if before else when
        record = {key: value for key, value in given.items() if value is not None and key != "etag"}
        record |= {id_name: name, "createdDateTimeUtc": created, "lastUpdatedDateTimeUtc": when}
        record["attestation"] = _with_keys(record.get("attestation"), before)
        enrollment = enrollment_from_json(record)
        self._records(kind)[registration_key(name)] = enrollment
        return _shown(enrollment)

    def _delete(self, kind: str, name: str, if_match: str | None) -> None:
        enrollment = self._found(kind, name)
        if if_match is not None:
            _require_match(if_match, etag(enrollment))
        del self._records(kind)[registration_key(name)]

    def _bulk(self, kind: str, body: dict[str, Any], version: str, now: float) -> Response:
        """Up to ten at once, each for itself."""
        listed, mode = body.get(kind), body.get("mode")
        if not isinstance(listed, list) or not 1 <= len(listed) <= BULK_LIMIT:
            raise RefusalError(BAD_REQUEST, f"{kind} is not a list of 1 to {BULK_LIMIT} records.")
        if mode not in _MODES:
            raise RefusalError(BAD_REQUEST, f"mode is none of {', '.join(_MODES)}.")
        id_name, errors = "enrollmentGroupId" if _KINDS[kind] else "registrationId", []
        for entry in listed:
            name = str(entry.get(id_name, "")) if isinstance(entry, dict) else ""
            try:
                record = _as_asked(entry, version) if isinstance(entry, dict) else entry
                self._bulk_one(kind, str(mode), name, record, now)
            except EnrollmentError as error:
                errors.append({id_name: name, "errorCode": EK_MISMATCH, "errorStatus": f"{error}."})
            except RefusalError as refusal:
                errors.append({id_name: name, "errorCode": refusal.code, "errorStatus": refusal.message})
        return json_response(200, {"isSuccessful": not errors, "errors": errors})

    def _bulk_one(self, kind: str, mode: str, name: str, entry: Any, now: float) -> None:
        if not isinstance(entry, dict):
            raise RefusalError(BAD_REQUEST, "An entry is not a JSON object.")
        exists = registration_key(name) in self._records(kind)
        if mode == "create" and exists:
            raise RefusalError(CONFLICT, "There is an enrolment of this id.")
        if mode != "create" and not exists:
            raise RefusalError(NOT_FOUND, "The enrolment was not found.")
        given_etag = None if entry.get("etag") is None else str(entry["etag"])
        if mode == "delete":
            self._delete(kind, name, given_etag)
        else:
            self._put(kind, name, entry, given_etag or "" if mode == "updateIfMatchETag" else None, now)

    def _query(self, kind: str, request: Request, version: str) -> Response:
        query = " ".join(str(object_of(request).get("query", "")).split()).lower()
        if query not in ("select *", f"select * from {kind.lower()}"):
            raise RefusalError(BAD_REQUEST, f"query is not 'SELECT * FROM {kind}': the emulator has no other.")
        shown = ((key, _as_asked(_shown(each), version)) for key, each in self._walk(self._records(kind), request))
        return _page(shown, request, "enrollmentGroup" if _KINDS[kind] else "enrollment")

    def _walk(self, records: Records[Any], request: Request) -> Iterator[tuple[str, Any]]:
        """The records behind the continuation, with their keys; a damaged one is passed over."""
        try:
            after = base64.b64decode(request.headers.get("x-ms-continuation", ""), validate=True).decode()
        except ValueError:
            raise RefusalError(BAD_REQUEST, "x-ms-continuation is not of an earlier answer.") from None
        while page := records.page(after):
            after = page[-1][0]
            for key, record in page:
                if not isinstance(record, StateError):
                    yield key, record

    # --- registrations

    def _registration(self, name: str) -> Registration:
        registration = self._store.registrations.get(registration_key(name))
        if registration is None:
            raise RefusalError(NOT_FOUND, "The registration was not found.")
        return registration


def etag(enrollment: Enrollment) -> str:
    """Of an enrolment: it changes with each of its fields."""
    digest = hashlib.sha256(json.dumps(enrollment.to_json(), sort_keys=True).encode()).hexdigest()
    return base64.b64encode(f'"{digest[:32]}"'.encode()).decode()


def registration_state(registration: Registration) -> dict[str, Any]:
    """A DeviceRegistrationState."""
    operation, assigned = registration.operation, registration.assignment
    state: dict[str, Any] = {
        "registrationId": registration.registration_id,
        "createdDateTimeUtc": registration.created,
        "status": "assigned" if operation.finished else "assigning",
    }
    if assigned:
        state |= {"assignedHub": assigned.hub, "deviceId": assigned.device_id, "substatus": assigned.substatus}
        state |= {"lastUpdatedDateTimeUtc": assigned.last_updated, "etag": assigned.etag}
    if operation.failure:
        failure = operation.failure
        state |= {"status": failure.status, "errorCode": failure.code, "errorMessage": failure.message}
    return state


def _as_asked(record: dict[str, Any], api_version: str) -> dict[str, Any]:
    """A record without what the API had not yet in this version, which neither takes nor shows it."""
    if has_requests(api_version, FIRST_REGISTRATION_API):
        return record
    return {name: value for name, value in record.items() if name != "credentialPolicyName"}


def _shown(enrollment: Enrollment) -> dict[str, Any]:
    return {**enrollment.to_json(with_keys=False), "etag": etag(enrollment)}


def _with_keys(attestation: object, before: Enrollment | None) -> object:
    """An attestation by symmetric key with the keys that it has already, or new ones, where none were given."""
    kind = attestation.get("type") if isinstance(attestation, dict) else None
    if kind != "symmetricKey" or kind_of(attestation)[1].get("primaryKey"):
        return attestation
    made = {"primaryKey": key_text(os.urandom(NEW_KEY_BYTES)), "secondaryKey": key_text(os.urandom(NEW_KEY_BYTES))}
    return {"type": kind, "symmetricKey": before.keys.to_json() if before and before.keys else made}


def _require_match(if_match: str | None, current: str | None) -> None:
    """Raises the refusal where If-Match names another version than the one that is there."""
    if if_match is None or (if_match == "*" and current is not None):
        return
    wanted = if_match.strip().removeprefix('"').removesuffix('"')
    if current is None or wanted != current:
        raise RefusalError(PRECONDITION_FAILED, "If-Match is not the etag of what is there.")


def _page(items: Iterator[tuple[str, Any]], request: Request, item_type: str) -> Response:
    """The next items, at most as many as x-ms-max-item-count says, and where the rest begins."""
    headers: Mapping[str, str] = request.headers
    asked = headers.get("x-ms-max-item-count", str(PAGE_LIMIT))
    if not asked.isascii() or not asked.isdigit() or int(asked[:9]) < 1:
        raise RefusalError(BAD_REQUEST, "x-ms-max-item-count is not a number from 1.")
    limit, listed, last = min(int(asked[:9]), PAGE_LIMIT), list[Any](), ""
    more = False
    for key, item in items:
        if len(listed) == limit:
            more = True
            break
        listed.append(item)
        last = key
    continuation = (("x-ms-continuation", base64.b64encode(last.encode()).decode()),) if more else ()
    counted = ("x-ms-max-item-count", str(limit)), ("x-ms-item-type", item_type)
    return json_response(200, listed, *counted, *continuation)
