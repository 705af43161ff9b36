"""The service itself: a request and the time go in, an answer comes out; no socket, file, clock or thread.

Operations: register (`PUT …/register`), operation status (`GET …/operations/{id}`) and registration status lookup
(`POST …/registrations/{id}`). Sources: DPS device API 2021-10-01, and for `csr` 2025-07-01-preview;
"TPM attestation concepts"; "Reprovisioning concepts". Where nothing is published about the real service, the choice
made here is marked as ours.
"""

import base64
import functools
import hashlib
import json
import math
import uuid
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from email.utils import formatdate
from typing import Any, Literal
from urllib.parse import parse_qs, unquote

from dps_emulator.attestation import Credential
from dps_emulator.certificates import (
    CertificateError,
    authority_of,
    certificate_info,
    common_name,
    require_valid,
    thumbprints,
)
from dps_emulator.enrollments import REGISTRATION_ID_GRAMMAR, Enrollment, is_registration_id, registration_key
from dps_emulator.hub_devices import HubDevice
from dps_emulator.issuing import FIRST_REGISTRATION_API, LEAF_LIFE_S, Issuer, has_requests, request_of, require_request
from dps_emulator.json_text import parse_object
from dps_emulator.limits import POLLS_WITHIN_S, Limits
from dps_emulator.quotas import MINUTE, Quota
from dps_emulator.registrations import Assignment, Failure, Operation, Registration, Registrations, utc_text
from dps_emulator.tokens import Token, TokenError, device_token_refusal, expiry_refusal, parse_token
from dps_emulator.tpm_keys import (
    ActivationSecrets,
    RandomBytes,
    StorageKey,
    UnsuitableKeyError,
    activation_blob,
    parse_endorsement_key,
    parse_storage_root_key,
)

CHALLENGES_KEPT = 10_000  # ours; each lives for an hour
MAX_BODY_BYTES = 96 * 1024  # DPS limits: largest message

# HTTP status = code // 1000. Seen from the service: 400004, 400208, 401002, 404201. The others are ours.
BAD_REQUEST = 400001
EK_MISMATCH = 400004
SRK_UNSUITABLE = 400005
NO_LINKED_HUB = 400208
UNAUTHORIZED = 401002
ENROLLMENT_DISABLED = 403001
SCOPE_NOT_FOUND = 404200
NOT_FOUND = 404201
OPERATION_NOT_FOUND = 404202
THROTTLED = 429001
METHOD_NOT_ALLOWED = 405001
BODY_TOO_LARGE = 413001
NOT_JSON = 415001
INTERNAL_ERROR = 500001


# What a quota may count. Nothing is published about what the real one does; both steps of a registration are our guess.
CHALLENGE, REGISTER, POLL = "challenge", "register", "poll"
COUNTED = (CHALLENGE, REGISTER)

METHODS = {"register": "PUT", "operation": "GET", "lookup": "POST"}


@dataclass(frozen=True)
class Settings:
    """How this service behaves; the command line's flags in one value."""

    id_scope: str = "0ne00000000"
    hubs: tuple[str, ...] = ("emulator.azure-devices.net",)  # the linked hubs
    allocation: str = "static"  # where the enrolment has no policy: static, hashed or rotate
    assign_after_s: float = 0.0  # from the register request to the assignment
    retry_after_s: int | None = 3  # None: no such header
    enroll_any: bool = False
    lookup: Literal["fresh", "no-key", 401, 404] = "fresh"
    stale_lookups: int = 0  # so many lookups after a new registration still answer with the previous one
    hub_key: Literal["stable", "rotate"] = "stable"
    no_da: bool = True
    key_bytes: int = 32
    refuse_by: Literal["status", "operation"] = "status"  # unknown or disabled: at once, or as a failed operation
    clock_skew_s: int = 300  # a token may have expired so long ago
    tier: Literal["standard", "basic"] = "standard"  # of the hubs
    challenge_life_s: int = 3600
    quota_per_min: int | None = None  # requests that are granted; None: all
    quota_by: str = MINUTE  # how they are counted, see `Quota`
    quota_counts: tuple[str, ...] = COUNTED
    retry_after_429_s: int | None = None  # what a refusal for want of quota carries; None: no such header
    connects_per_s: float | None = None  # new connections to the hubs; None: all
    connect_queue_s: float = 0.0  # connections beyond that wait for so long before they are dropped
    limits: Limits | None = None  # of each device's polls, and of each hub
    strict: bool = False  # hubs refuse what they are only known to tolerate
    client_certificates: bool = False  # clients may show one in TLS
    issued_life_s: int = LEAF_LIFE_S  # of a certificate that is issued for a device's request
    issue_after_s: float = 0.0  # from a hub's 202 for such a request to the certificate


@dataclass(frozen=True)
class Request:
    """One HTTP request; header names in lower case, path as received (percent-encoded, without the query)."""

    method: str
    path: str
    query: str = ""
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    body: bytes = field(default=b"", repr=False)
    takes_tpm: bool = True  # there is no TPM attestation over MQTT
    client_chain: tuple[bytes, ...] = ()  # the certificates that the client has shown in TLS, its own first; DER


@dataclass(frozen=True)
class Response:
    """One HTTP answer, and what the log says about it."""

    status: int
    headers: tuple[tuple[str, str], ...]
    body: bytes = field(repr=False)
    error_code: int = 0
    request_id: str = ""
    notice: str = ""  # something the operator should see


@dataclass(frozen=True)
class _Challenge:
    """A key that only one TPM can use, and that TPM's keys."""

    key: bytes = field(repr=False)
    ek: StorageKey
    srk: StorageKey
    issued_at_s: float


@dataclass(frozen=True)
class _Known:
    """Who has proven by a token, or by a client certificate, to be what is enrolled."""

    enrollment: Enrollment
    leaf: bytes = b""  # the client certificate; empty: it was a token
    authority: bytes = b""  # that of the group


# What shows who asks: the challenge that was answered, or the enrolment that has the token's key or the certificate.
_Proof = _Challenge | _Known


@dataclass(frozen=True)
class _DeviceRegistration:
    """A request's body; keys are None where it has none."""

    ek: StorageKey | None = None
    srk: StorageKey | None = None
    payload: dict[str, Any] | None = None
    csr: str = ""  # a request for a certificate, base64 of DER


@dataclass(frozen=True)
class Target:
    """What a path points at; `operation` is register, operation, lookup, or empty for a path of no meaning."""

    operation: str = ""
    id_scope: str = ""
    registration_id: str = ""
    operation_id: str = ""


class RefusalError(Exception):
    """A request that is answered with an error."""

    def __init__(self, code: int, message: str, **headers: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.headers = headers


class _ChallengeNeeded(Exception):
    """No error but the first step: not yet authorised, and the keys to challenge are at hand."""

    def __init__(self, ek: StorageKey, srk: StorageKey) -> None:
        super().__init__()
        self.ek = ek
        self.srk = srk


class DpsService:
    """One DPS instance; all that it remembers is in the mappings and, for open exchanges, in itself."""

    def __init__(
        self,
        settings: Settings,
        enrollments: MutableMapping[str, Enrollment],
        registrations: Registrations,
        random_bytes: RandomBytes,
        groups: MutableMapping[str, Enrollment] | None = None,
        issuer: Issuer | None = None,
    ) -> None:
        """All mappings are keyed by `registration_key`, `groups` by the group's id; `random_bytes(n)` returns n bytes.

        Without an `issuer` the certificates of devices are a new one's.

        The attribute `assigned` is called after each assignment with the one before (or None), the new one and the
        time: there the hubs learn of it.
        """
        self.settings = settings
        self.enrollments = enrollments
        self.registrations = registrations
        self.groups = {} if groups is None else groups
        self.assigned: Callable[[Assignment | None, Assignment, float], None] = lambda previous, assignment, now: None
        self._random_bytes = random_bytes
        self._issuer = issuer or Issuer(random_bytes)
        per_minute = settings.quota_per_min
        self._quota = Quota(per_minute, settings.quota_by) if per_minute else None
        self._challenges: dict[str, _Challenge] = {}  # the oldest first
        self._polls: dict[str, list[float]] = {}  # when each device has polled of late, the quietest first
        self._stale: dict[str, tuple[int, Registration | None]] = {}  # lookups left, what they answer with

    def answer(self, request: Request, now: float) -> Response:
        """Answers one request at `now` (Unix seconds); never raises for anything a client sent."""
        request_id = self._guid()
        exchange = _Exchange(self, request, now)
        try:
            self._require_quota(request, now)
            response = exchange.run()
        except _ChallengeNeeded as needed:
            response = self._challenge(exchange.registration_id, needed, now)
        except RefusalError as refusal:
            response = refusal_response(refusal, request_id, now)
        return replace(
            response,
            headers=(*response.headers, *standard_headers(request_id, now)),
            request_id=request_id,
            notice=exchange.notice,
        )

    def _require_quota(self, request: Request, now: float) -> None:
        """Raises the refusal where the quota counts this request and has no room for it."""
        with_token = "authorization" in request.headers
        kind = (REGISTER if with_token else CHALLENGE) if request.method == METHODS["register"] else POLL
        if kind == POLL and self.settings.limits:
            self._require_rest(registration_key(target_of(request.path).registration_id), self.settings.limits, now)
        if self._quota is None or kind not in self.settings.quota_counts or self._quota.take(now):
            return
        after_s = self.settings.retry_after_429_s
        raise RefusalError(THROTTLED, "Throttled", **({} if after_s is None else {"Retry-After": str(after_s)}))

    def _require_rest(self, key: str, limits: Limits, now: float) -> None:
        """Raises the refusal of a poll too many of one device."""
        since_s = now - POLLS_WITHIN_S
        while self._polls and (quietest := next(iter(self._polls))) != key and self._polls[quietest][-1] <= since_s:
            del self._polls[quietest]
        polls = [at_s for at_s in self._polls.pop(key, []) if since_s < at_s <= now]
        if len(polls) < limits.polls:
            self._polls[key] = [*polls, now]
            return
        self._polls[key] = polls
        after_s = math.ceil(polls[0] - since_s)
        raise RefusalError(THROTTLED, "Throttled: this device polls too often", **{"Retry-After": str(after_s)})

    def enroll(self, enrollment: Enrollment) -> None:
        """Adds or replaces an enrolment, or a group."""
        records = self.groups if enrollment.is_group else self.enrollments
        records[registration_key(enrollment.registration_id)] = enrollment

    def move(self, registration_id: str, hub: str) -> None:
        """Makes the device's next registration go to `hub`; raises KeyError where it is not enrolled."""
        self.enroll(replace(self.enrollments[registration_key(registration_id)], hubs=(hub,)))

    def credential_at(self, hub: str, device_id: str) -> Credential | None:
        """What that device has at that hub now, or None; both names without case, as tokens are compared."""
        registration = self.registrations.at(hub, device_id)
        return registration.assignment.credential if registration and registration.assignment else None

    def renewed(self, hub: str, device_id: str, request: bytes, now: float) -> tuple[bytes, ...]:
        """Another certificate for a device at its hub, and those of its CAs; raises CertificateError."""
        policy = self.policy_at(hub, device_id)
        if not policy:
            raise CertificateError("is of a device whose enrolment names no policy")
        registration = self.registrations.at(hub, device_id)  # there is one: it gave the policy
        require_request(request, registration.registration_id if registration else "")
        return self._issuer.chain(policy, request, self.settings.issued_life_s, now)

    def policy_at(self, hub: str, device_id: str) -> str:
        """By which policy that device gets certificates; empty: by none."""
        registration = self.registrations.at(hub, device_id)
        enrollment = self._enrollment_of(registration) if registration else None
        return enrollment.credential_policy if enrollment and enrollment.enabled else ""

    def hub_key(self, hub: str, device_id: str) -> bytes | None:
        """The first key of `credential_at`, or None."""
        credential = self.credential_at(hub, device_id)
        return credential.keys[0] if credential and credential.keys else None

    def replace_hub_key(self, hub: str, device_id: str, key: bytes) -> None:
        """Makes `key` the device's key at that hub; raises KeyError where it is not assigned there."""
        registration = self.registrations.at(hub, device_id)
        if registration is None or registration.assignment is None:
            raise KeyError(device_id)
        changed = replace(registration, assignment=replace(registration.assignment, credential=Credential((key,))))
        self.registrations[registration_key(registration.registration_id)] = changed

    def hub_token_refusal(
        self,
        text: str,
        now: float,
        device_at: Callable[[str, str], HubDevice | None] = lambda hub, device_id: None,
    ) -> str | None:
        """Why a hub would refuse this token at `now`, or None where it accepts it.

        `device_at(hub, device_id)` is what that hub knows of the device; both names are as the token has them.
        """
        try:
            token = parse_token(text)
        except TokenError as error:
            return f"the token {error}"
        once, twice = ([*reading.split("/"), "", "", ""][0:3:2] for reading in token.readings)
        hub, device_id = once if self.credential_at(*once) or device_at(*once) else twice
        credential, device = self.credential_at(hub, device_id), device_at(hub, device_id)
        keys = credential.keys if credential else None
        if device:
            own = device.own_credential
            keys = None if device.withdrawn else own.keys if own else keys
        refusal = device_token_refusal(token, hub, device_id, keys, now, self.settings.clock_skew_s)
        if refusal is None and device and not device.enabled:
            return f"the device '{device_id}' is disabled"
        return refusal

    def settled(self, registration_id: str, now: float) -> Registration | None:
        """The device's registration, with an operation finished whose time has come."""
        registration = self.registrations.get(registration_key(registration_id))
        if registration and not registration.operation.finished and registration.operation.ready_at_s <= now:
            return self._stored(registration, now)
        return registration

    def _stored(self, registration: Registration, now: float) -> Registration:
        """Keeps a registration whose operation is under way, finished where its time has come."""
        previous = registration.assignment
        if registration.operation.ready_at_s <= now:
            registration = self._finish(registration)
        self.registrations[registration_key(registration.registration_id)] = registration
        if registration.assignment and registration.assignment is not previous:
            self.assigned(previous, registration.assignment, now)
        return registration

    def accept(
        self,
        registration_id: str,
        payload: dict[str, Any] | None,
        failure: Failure | None,
        now: float,
        group: str = "",
        csr: str = "",
    ) -> str:
        """Starts an operation, returns its id; `group` is the enrolment group that takes the device.

        `csr` is the request for its certificate.
        """
        previous = self.settled(registration_id, now)
        digit, state = self._random_bytes(1)[0] % 10, self._random_bytes(8).hex()
        operation_id = f"{digit}.{state}.{self._guid()}"
        ready_at_s = now + self.settings.assign_after_s
        operation = Operation(operation_id, ready_at_s, payload, failure=failure, group=group, csr=csr)
        created = previous.created if previous else utc_text(now)
        assignment = previous.assignment if previous else None
        self._stored(Registration(registration_id, created, operation, assignment), now)
        if self.settings.stale_lookups:
            self._stale[registration_key(registration_id)] = (self.settings.stale_lookups, previous)
        return operation_id

    def looked_up(self, registration_id: str, now: float) -> Registration | None:
        """What a lookup sees: the registration, or for the first few after a register request the previous one."""
        left, previous = self._stale.get(registration_key(registration_id), (0, None))
        if left:
            self._stale[registration_key(registration_id)] = (left - 1, previous)
            return previous
        return self.settled(registration_id, now)

    def challenge_of(self, registration_id: str, now: float) -> _Challenge | None:
        """The newest challenge to this device, or None where there is none or it is too old."""
        challenge = self._challenges.get(registration_key(registration_id))
        if challenge and now - challenge.issued_at_s <= self.settings.challenge_life_s:
            return challenge
        return None

    def authentication_key(self, ek: StorageKey, srk: StorageKey, key: bytes, uri: str) -> str:
        """`key` for that TPM alone, base64."""
        secrets = ActivationSecrets.draw(self._random_bytes)
        return base64.b64encode(
            activation_blob(ek, srk, key, secrets, uri.encode(), no_da=self.settings.no_da)
        ).decode()

    def _challenge(self, registration_id: str, needed: _ChallengeNeeded, now: float) -> Response:
        key = self._random_bytes(self.settings.key_bytes)
        self._challenges.pop(registration_key(registration_id), None)
        self._challenges[registration_key(registration_id)] = _Challenge(key, needed.ek, needed.srk, now)
        if len(self._challenges) > CHALLENGES_KEPT:
            del self._challenges[next(iter(self._challenges))]
        uri = f"{self.settings.id_scope}/registrations/{registration_id}"
        content = {
            "message": "Authorization required, resend request using supplied key",
            "authenticationKey": self.authentication_key(needed.ek, needed.srk, key, uri),
            "unencryptedAuthenticationKey": None,
            "keyName": "registration",
        }
        return json_response(401, content)

    def _finish(self, registration: Registration) -> Registration:
        """Ends an operation: allocation, reprovisioning policy, hub key, substatus."""
        operation, previous = replace(registration.operation, finished=True), registration.assignment
        if operation.failure:
            return replace(registration, operation=operation)
        enrollment = self._enrollment_of(registration)
        if enrollment is None:
            failure = Failure("failed", NOT_FOUND, "The enrolment was deleted.")
            return replace(registration, operation=replace(operation, failure=failure))
        issued: Credential | None = None
        if operation.csr:
            policy, request = enrollment.credential_policy, request_of(operation.csr)
            if not policy:
                failure = Failure("failed", BAD_REQUEST, "The enrolment names no credentialPolicyName any more.")
                return replace(registration, operation=replace(operation, failure=failure))
            chain = self._issuer.chain(policy, request, self.settings.issued_life_s, operation.ready_at_s)
            operation = replace(operation, chain=tuple(base64.b64encode(each).decode() for each in chain))
            authorities = (self._issuer.authority(policy),)
            issued = Credential(authorities=authorities, name=registration.registration_id)
        if previous and not enrollment.update_hub_assignment:
            kept = replace(previous, credential=issued) if issued else previous
            return replace(registration, operation=operation, assignment=kept)
        hub = self._allocate(enrollment, previous)
        if hub is None:
            failure = Failure("failed", NO_LINKED_HUB, "The enrolment names a hub that is not linked to this service.")
            return replace(registration, operation=replace(operation, failure=failure))
        device_id = enrollment.device_id or enrollment.registration_id
        stays = previous is not None and (previous.hub, previous.device_id) == (hub, device_id)
        if previous is None:
            substatus = "initialAssignment"
        elif stays:
            substatus = "reprovisionedToInitialAssignment"
        else:
            substatus = "deviceDataMigrated" if enrollment.migrate_device_data else "deviceDataReset"
        if issued:  # at the hub nothing else counts for it any more; what the real one does beside is not published
            credential = issued
        elif enrollment.keys:
            credential = Credential(enrollment.keys.both)
        elif enrollment.certificates and enrollment.group:
            credential = Credential(authorities=enrollment.certificates.all)
        elif enrollment.certificates:
            credential = Credential(thumbprints=tuple(thumbprints(each)[0] for each in enrollment.certificates.all))
        elif previous and stays and self.settings.hub_key == "stable" and len(previous.credential.keys) == 1:
            credential = previous.credential
        else:
            credential = Credential((self._random_bytes(self.settings.key_bytes),))
        # Custom allocation returns what its webhook says; the emulator's webhook says what the device said.
        payload = operation.payload if enrollment.allocation_policy in ("", "custom") else None
        etag = base64.b64encode(f'"{self._guid()}"'.encode()).decode()
        when = utc_text(operation.ready_at_s)
        assignment = Assignment(hub, device_id, credential, substatus, etag, when, payload)
        return replace(registration, operation=operation, assignment=assignment)

    def _enrollment_of(self, registration: Registration) -> Enrollment | None:
        """What the device was taken by; of a group what it is for this device."""
        if not registration.operation.group:
            return self.enrollments.get(registration_key(registration.registration_id))
        group = self.groups.get(registration_key(registration.operation.group))
        return group.member(registration.registration_id) if group else None

    def _allocate(self, enrollment: Enrollment, previous: Assignment | None) -> str | None:
        """The hub for a device, or None where the enrolment names one that is not linked."""
        hubs = enrollment.hubs or self.settings.hubs
        if not {hub.lower() for hub in hubs} <= {hub.lower() for hub in self.settings.hubs}:
            return None
        policy = enrollment.allocation_policy or self.settings.allocation
        if policy == "rotate" and previous and previous.hub in hubs:
            return hubs[(hubs.index(previous.hub) + 1) % len(hubs)]
        if policy == "hashed":
            digest = hashlib.sha256(registration_key(enrollment.registration_id).encode()).digest()
            return hubs[int.from_bytes(digest) % len(hubs)]
        return hubs[0]

    def _guid(self) -> str:
        return str(uuid.UUID(bytes=self._random_bytes(16), version=4))


class _Exchange:
    """One request on its way through the checks; the log reads how far it came."""

    def __init__(self, service: DpsService, request: Request, now: float) -> None:
        self.service = service
        self.settings = service.settings
        self.request = request
        self.now = now
        self.target = target_of(request.path)
        self.operation = self.target.operation
        self.registration_id = self.target.registration_id
        self.notice = ""

    def run(self) -> Response:
        if not self.operation:
            raise RefusalError(SCOPE_NOT_FOUND, "There is nothing at this path.")
        method = METHODS[self.operation]
        if self.request.method != method:
            raise RefusalError(METHOD_NOT_ALLOWED, f"This path takes {method}.", Allow=method)
        if not self._api_version:
            raise RefusalError(BAD_REQUEST, "The query parameter api-version is missing or empty.")
        if self.target.id_scope != self.settings.id_scope:
            raise RefusalError(SCOPE_NOT_FOUND, f"The ID scope of this path is not {self.settings.id_scope}.")
        if not is_registration_id(self.registration_id):
            raise RefusalError(BAD_REQUEST, f"The registration ID is not {REGISTRATION_ID_GRAMMAR}.")
        if self.operation == "operation":
            return self._operation_status(self.target.operation_id)
        device = self._device_registration()
        return self._register(device) if self.operation == "register" else self._lookup(device)

    def _register(self, device: _DeviceRegistration) -> Response:
        proof = self._proven(device)  # the token is checked before anything but its key is looked up
        enrollment = self._enrollment(device, proof)
        failure = self._failure(enrollment, device)
        if proof is None:
            raise self._challenge_needed(device)
        if device.csr and enrollment and not enrollment.credential_policy:
            raise RefusalError(BAD_REQUEST, "csr came, and the enrolment names no credentialPolicyName.")
        registration_id = enrollment.registration_id if enrollment else self.registration_id
        group = enrollment.group if enrollment else ""
        operation_id = self.service.accept(registration_id, device.payload, failure, self.now, group, device.csr)
        location = f"https://{self.request.headers.get('host', '')}{self.request.path}?{self.request.query}"
        # The register answer says "assigning" even where the assignment is already made: clients must poll.
        content = {"operationId": operation_id, "status": "assigning"}
        return json_response(202, content, *self._retry_after(), ("Location", location))

    def _operation_status(self, operation_id: str) -> Response:
        proof = self._proven(_DeviceRegistration())
        if proof is None:
            raise self._challenge_needed(_DeviceRegistration())
        self._enrollment(_DeviceRegistration(), proof)
        registration = self.service.settled(self.registration_id, self.now)
        if registration is None or registration.operation.operation_id != operation_id:
            raise RefusalError(OPERATION_NOT_FOUND, "The operation was not found.")
        state = self._state(registration, proof, with_key=True)
        if registration.operation.chain and state["status"] == "assigned":
            state["issuedCertificateChain"] = list(registration.operation.chain)  # which no lookup has
        content = {"operationId": operation_id, "status": state["status"], "registrationState": state}
        if registration.operation.finished:
            return json_response(200, content)
        return json_response(202, content, *self._retry_after())

    def _lookup(self, device: _DeviceRegistration) -> Response:
        if self.settings.lookup == 401:
            raise RefusalError(UNAUTHORIZED, "This service authorizes no lookups.")
        if self.settings.lookup == 404:
            raise RefusalError(NOT_FOUND, "This service has no lookups.")
        proof = self._proven(device)
        self._failure(self._enrollment(device, proof), device)
        if proof is None:
            raise self._challenge_needed(device)
        registration = self.service.looked_up(self.registration_id, self.now)
        if registration is None:
            return json_response(200, {"registrationId": self.registration_id, "status": "unassigned"})
        return json_response(200, self._state(registration, proof, with_key=self.settings.lookup != "no-key"))

    def _state(self, registration: Registration, proof: _Proof, *, with_key: bool) -> dict[str, Any]:
        """A DeviceRegistrationResult."""
        state: dict[str, Any] = {
            "registrationId": registration.registration_id,
            "createdDateTimeUtc": registration.created,
        }
        operation, assignment = registration.operation, registration.assignment
        if not operation.finished:
            return {**state, "status": "assigning"}
        if operation.failure:
            failure = operation.failure
            when = utc_text(operation.ready_at_s)
            state |= {"status": failure.status, "errorCode": failure.code, "errorMessage": failure.message}
            return {**state, "lastUpdatedDateTimeUtc": when}
        assert assignment is not None, "an operation that finished without failure has an assignment"
        state |= {
            "assignedHub": assignment.hub,
            "deviceId": assignment.device_id,
            "status": "assigned",
            "substatus": assignment.substatus,
            "lastUpdatedDateTimeUtc": assignment.last_updated,
            "etag": assignment.etag,
        }
        if assignment.payload is not None:
            state["payload"] = assignment.payload
        return {**state, **self._shown(proof, assignment, with_key)}

    def _shown(self, proof: _Proof, assignment: Assignment, with_key: bool) -> dict[str, Any]:
        """The member of an assignment that tells the way of attestation."""
        if isinstance(proof, _Known):
            group = {"enrollmentGroupId": proof.enrollment.group} if proof.enrollment.group else {}
            if not proof.leaf:
                return {"symmetricKey": group}
            signing = {"signingCertificateInfo": certificate_info(proof.authority)} if proof.authority else {}
            return {"x509": {"certificateInfo": certificate_info(proof.leaf), **group, **signing}}
        if not with_key or not assignment.credential.keys:
            return {}
        key = assignment.credential.keys[0]
        uri = f"{assignment.hub}/devices/{assignment.device_id}"
        return {"tpm": {"authenticationKey": self.service.authentication_key(proof.ek, proof.srk, key, uri)}}

    def _enrollment(self, device: _DeviceRegistration, proof: _Proof | None) -> Enrollment | None:
        """The device's enrolment, after its EK was compared.

        Where the service takes anybody, one is made for whoever has proven by a challenge to be the TPM that it claims.
        """
        challenge = proof if isinstance(proof, _Challenge) else None
        enrollment = proof.enrollment if isinstance(proof, _Known) else self._individual
        if enrollment is None and self.settings.enroll_any and challenge and self.operation == "register":
            enrollment = Enrollment(self.registration_id, challenge.ek.marshalled)
            self.service.enroll(enrollment)
            digest = hashlib.sha256(challenge.ek.marshalled).hexdigest()
            self.notice = f"enrolled '{self.registration_id}' at first sight, EK SHA-256 {digest}"
        for ek in (device.ek, challenge and challenge.ek):
            if enrollment and ek and ek.marshalled != enrollment.endorsement_key:
                raise RefusalError(EK_MISMATCH, "Endorsement key is invalid, or does not match the Enrollment.")
        return enrollment

    def _failure(self, enrollment: Enrollment | None, device: _DeviceRegistration) -> Failure | None:
        """Why this enrolment gets no assignment, or None; raises RefusalError where the HTTP status is to say it."""
        if enrollment is None and self.settings.enroll_any and device.ek and self.operation == "register":
            return None  # it is enrolled when it has proven itself
        if enrollment is None:
            failure = Failure("failed", NOT_FOUND, "The enrolment was not found.")
        elif not enrollment.enabled:
            failure = Failure("disabled", ENROLLMENT_DISABLED, "The enrolment is disabled.")
        else:
            return None
        if self.settings.refuse_by == "status":
            raise RefusalError(failure.code, failure.message)
        return failure

    def _challenge_needed(self, device: _DeviceRegistration) -> RefusalError | _ChallengeNeeded:
        """What a request without a token is answered with."""
        if device.ek is None:
            return RefusalError(UNAUTHORIZED, "Authorization is missing, and no endorsement key to challenge came.")
        if device.srk is None:
            return RefusalError(SRK_UNSUITABLE, "tpm.storageRootKey is missing: without it there is no challenge.")
        return _ChallengeNeeded(device.ek, device.srk)

    @functools.cached_property
    def _individual(self) -> Enrollment | None:
        """The enrolment of this device alone, which goes before all groups."""
        return self.service.enrollments.get(registration_key(self.registration_id))

    def _proven(self, device: _DeviceRegistration) -> _Proof | None:
        """The challenge whose key signed this request's token, or the enrolment; None where there is no token.

        Raises RefusalError.
        """
        text = self.request.headers.get("authorization")
        if text is None:
            return self._certified(device)
        try:
            token = parse_token(text)
        except TokenError as error:
            raise RefusalError(UNAUTHORIZED, f"The token {error}.") from None
        if token.key_name not in ("", "registration"):
            raise RefusalError(UNAUTHORIZED, "The token's skn is not 'registration'.")
        if not token.names(f"{self.settings.id_scope}/registrations/{self.registration_id}"):
            raise RefusalError(UNAUTHORIZED, "The token's sr is for another resource.")
        expired = expiry_refusal(token, self.now, self.settings.clock_skew_s)
        if expired:
            raise RefusalError(UNAUTHORIZED, f"The token is refused: {expired}.")
        challenge = self.service.challenge_of(self.registration_id, self.now)
        proof: _Proof | None = challenge if challenge and token.signed_by(challenge.key) else self._key_holder(token)
        if proof is None:
            only_tpm = self._individual.endorsement_key if self._individual else not self.service.groups
            if challenge is None and only_tpm:
                raise RefusalError(UNAUTHORIZED, "No challenge is open: register without Authorization to get one.")
            key = "the key of the newest challenge" if challenge else "a key of the device's enrolment"
            raise RefusalError(UNAUTHORIZED, f"The token is not signed by {key}.")
        if isinstance(proof, _Challenge) and device.srk and device.srk != proof.srk:
            raise RefusalError(SRK_UNSUITABLE, "tpm.storageRootKey is not the one that was challenged.")
        return proof

    def _certified(self, device: _DeviceRegistration) -> _Known | None:
        """Whose client certificate this is; None where none came, or another way is asked for. Raises RefusalError."""
        chain, individual = self.request.client_chain, self._individual
        if individual and individual.certificates is None:
            return None
        if not chain or device.ek:
            if individual:
                hint = "" if self.settings.client_certificates else " ('serve --client-certificates' asks for one)"
                raise RefusalError(UNAUTHORIZED, f"The enrolment takes a client certificate, and none came{hint}.")
            return None
        try:
            if individual and individual.certificates:
                if chain[0] not in individual.certificates.all:
                    raise CertificateError("it is not the one that is enrolled")
                require_valid(chain[0], self.now)
                known = _Known(individual, chain[0])
            else:
                known = self._of_authority(chain)
            if common_name(chain[0]) != self.registration_id:
                raise CertificateError(f"its CN '{common_name(chain[0])}' is not the registration ID")
        except CertificateError as error:
            raise RefusalError(UNAUTHORIZED, f"Invalid certificate: {error}.") from None
        return known

    def _of_authority(self, chain: Sequence[bytes]) -> _Known:
        """Who the first CA of a group vouches for that the chain comes to; raises CertificateError."""
        groups = {der: group for group in self.service.groups.values() for der in _authorities(group)}
        authority = authority_of(chain, list(groups), self.now)
        return _Known(groups[authority].member(self.registration_id), chain[0], authority)

    def _key_holder(self, token: Token) -> _Known | None:
        """The enrolment whose symmetric key signed the token: that of the device alone, or else that of a group."""
        groups = () if self._individual else self.service.groups.values()
        for enrollment in (self._individual, *(group.member(self.registration_id) for group in groups)):
            if enrollment and enrollment.keys and token.signed_by(*enrollment.keys.both):
                return _Known(enrollment)
        return None

    def _device_registration(self) -> _DeviceRegistration:
        """The body, checked field by field; unknown fields are passed over."""
        content_type = self.request.headers.get("content-type", "")
        if content_type and "json" not in content_type.lower():
            raise RefusalError(NOT_JSON, "The body is not application/json.")
        content = object_of(self.request)
        named = content.get("registrationId")
        if named is not None and (
            not isinstance(named, str) or registration_key(named) != registration_key(self.registration_id)
        ):
            raise RefusalError(BAD_REQUEST, "registrationId in the body is not the path's.")
        payload = content.get("payload")
        if payload is not None and not isinstance(payload, dict):
            raise RefusalError(BAD_REQUEST, "payload is not a JSON object.")
        csr = self._csr(content)
        tpm = content.get("tpm")
        if tpm is None:
            return _DeviceRegistration(payload=payload, csr=csr)
        if not self.request.takes_tpm:
            raise RefusalError(BAD_REQUEST, "TPM attestation takes HTTPS: there is none over MQTT.")
        if not isinstance(tpm, dict):
            raise RefusalError(BAD_REQUEST, "tpm is not a JSON object.")
        try:
            ek = parse_endorsement_key(_key_bytes(tpm, "endorsementKey"))
        except UnsuitableKeyError as error:
            raise RefusalError(EK_MISMATCH, f"Endorsement key is invalid: {error}.") from None
        if tpm.get("storageRootKey") is None:
            return _DeviceRegistration(ek, None, payload, csr)
        try:
            srk = parse_storage_root_key(_key_bytes(tpm, "storageRootKey"))
        except UnsuitableKeyError as error:
            raise RefusalError(SRK_UNSUITABLE, f"Storage root key is invalid: {error}.") from None
        return _DeviceRegistration(ek, srk, payload, csr)

    @functools.cached_property
    def _api_version(self) -> str:
        return _api_version(self.request.query)

    def _csr(self, content: dict[str, Any]) -> str:
        """The request for a certificate in a body; versions before it was made pass it over as any other member."""
        csr = content.get("csr")
        if csr is None or not has_requests(self._api_version, FIRST_REGISTRATION_API):
            return ""
        if self.operation == "lookup":
            raise RefusalError(BAD_REQUEST, "csr is for a registration, and has no place in a lookup.")
        try:
            require_request(request_of(csr), self.registration_id)
        except CertificateError as error:
            raise RefusalError(BAD_REQUEST, f"csr {error}.") from None
        return str(csr)

    def _retry_after(self) -> tuple[tuple[str, str], ...]:
        seconds = self.settings.retry_after_s
        return () if seconds is None else (("Retry-After", str(seconds)),)


def _authorities(group: Enrollment) -> tuple[bytes, ...]:
    return group.certificates.all if group.certificates else ()


def object_of(request: Request) -> dict[str, Any]:
    """The JSON object in a request's body; RefusalError where that is anything else."""
    if len(request.body) > MAX_BODY_BYTES:
        raise RefusalError(BODY_TOO_LARGE, f"The body is larger than {MAX_BODY_BYTES} bytes.")
    try:
        return parse_object(request.body)
    except ValueError as error:
        raise RefusalError(BAD_REQUEST, f"The body is not {error}.") from None


@functools.lru_cache(64)  # clients send the same one always
def _api_version(query: str) -> str:
    return parse_qs(query).get("api-version", [""])[0].strip()


@functools.lru_cache(64)  # a request's is asked for by its quota, its answer and its line in the log
def target_of(path: str) -> Target:
    """Reads a path as received."""
    match [unquote(segment) for segment in path.split("/")]:
        case ["", id_scope, "registrations", registration_id]:
            return Target("lookup", id_scope, registration_id)
        case ["", id_scope, "registrations", registration_id, "register"]:
            return Target("register", id_scope, registration_id)
        case ["", id_scope, "registrations", registration_id, "operations", operation_id]:
            return Target("operation", id_scope, registration_id, operation_id)
    return Target()


def json_response(status: int, content: object, *headers: tuple[str, str], error_code: int = 0) -> Response:
    """An answer with a JSON body."""
    body = json.dumps(content, separators=(",", ":")).encode()
    return Response(
        status, (("Content-Type", "application/json; charset=utf-8"), *headers), body, error_code=error_code
    )


def refusal_response(refusal: RefusalError, request_id: str, now: float) -> Response:
    """A refusal as ProvisioningServiceErrorDetails with the header x-ms-error-code."""
    content = {
        "errorCode": refusal.code,
        "trackingId": request_id,
        "message": refusal.message,
        "timestampUtc": utc_text(now),
    }
    headers = (("x-ms-error-code", str(refusal.code)), *refusal.headers.items())
    return json_response(refusal.code // 1000, content, *headers, error_code=refusal.code)


def standard_headers(request_id: str, now: float) -> tuple[tuple[str, str], ...]:
    """What every answer carries."""
    return (
        ("Date", _date(int(now))),
        ("x-ms-request-id", request_id),
        ("Strict-Transport-Security", "max-age=31536000; includeSubDomains"),
    )


@functools.lru_cache(8)  # many things happen within a second
def _date(when_s: int) -> str:
    return formatdate(when_s, usegmt=True)


def _key_bytes(tpm: Mapping[str, object], name: str) -> bytes:
    value = tpm.get(name)
    if not isinstance(value, str):
        raise RefusalError(BAD_REQUEST, f"tpm.{name} is missing or not a string.")
    try:
        return base64.b64decode(value, validate=True)
    except ValueError:  # binascii.Error is one; text that is not ASCII another
        raise RefusalError(BAD_REQUEST, f"tpm.{name} is not base64.") from None
