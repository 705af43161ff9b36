"""One registration with DPS, from what the device shows of itself to a checked assignment: read it from top to bottom.

There is no machine here, only a sequence; each step begins once the one before has succeeded. Steps 1, 3 and 6 are the
business of the way in which the device shows who it is (`dps_agent.attestation`); here is what the TPM does:

1. The opening: the TPM shows EK and SRK.
2. PUT register, without a token -> 401 with a challenge; a service that takes the opening goes on at 5.
3. The TPM activates the challenge, and a token is signed with the key in it.
4. PUT register with the token -> 202 and the number of an operation.
5. Poll the registration status lookup, and where that does not help the operation, until one of them is final.
6. The TPM imports the hub key. Where DPS issues a certificate in its place, that is taken.
7. Check everything, and seal the record. Nothing is stored here: the caller commits what `register` returns, in its
   order, and until the last of that the old identity stays whole.

Three loops lie around it, from the inside out, and no wait is in any other place:

- `_step` repeats one request until its answer can be read, where that may help and the budget lasts.
- `_poll` repeats lookup and operation, at DPS's pace and never faster than DPS lets a device poll.
- `register` starts over at 1 at most once, where the service no longer knows what we refer to or its answer does not
  fit this device (IdentityStale).

All of them spend one budget (`_Budget`); a wait that would go beyond it is not begun, and the reason for the wait is
raised instead. Two callers have it otherwise. One that is not `patient` gives the first request no time to be repeated.
One that does not queue has waits of its own before the first request; in return a wait for quota does not count for it
once a challenge is held, for the challenge has cost quota and holds for long.

Who must act on a failure is decided in one place, at the end of the file (`_classed`). How often registrations have
failed, and when the next one begins, is not known here: see `dps_agent.patience`. Source: Azure DPS Runtime
Registration API, 2021-10-01.
"""

from dps_agent.assignment import Assignment, device_id_fault, hub_fault, payload_to_store
from dps_agent.backoff import (
    HELD_AGAIN_S,
    POLL_DEFAULT_LIMIT_S,
    POLL_DEFAULT_S,
    POLL_LIMIT_S,
    STEP_FIRST_S,
    STEP_LIMIT_S,
    THROTTLE_LIMIT_S,
    after_request_s,
    exponential_s,
    retry_after_s,
)
from dps_agent.effects import (
    NO_REPLY_CONNECT,
    NO_REPLY_DNS,
    NO_REPLY_NOT_FOUND,
    Http,
    NoReply,
    Reply,
    Sleep,
    Uptime,
    UtcNow,
)
from dps_agent.messages import (
    ASSIGNED,
    DISABLED,
    ERROR_CODE_HEADER,
    FAILED,
    REQUEST_ID_HEADER,
    UNASSIGNED,
    DeviceRegistrationResult,
    ProvisioningServiceErrorDetails,
    RegistrationOperationStatus,
    TpmChallenge,
    decode,
    device_registration,
)
from dps_agent.sas import DPS_KEY_NAME, DPS_TOKEN_LIFE_S, dps_resource, percent_encode
from dps_agent.settings import API_VERSION, CERTIFICATES, POLL_LOOKUP, SYMMETRIC_KEY, TPM, X509
from dps_agent.signing import check_clock, sealed, signed_token
from dps_hal.contracts import IDENTITY
from dps_hal.errors import AskOperator, IdentityStale, RetryLater

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from typing import Any, TypeVar

    from dps_agent.attestation import Registering
    from dps_agent.effects import Effect, Records
    from dps_agent.sas import SasToken
    from dps_agent.settings import Settings
    from dps_hal.contracts import Utc
    from dps_hal.errors import DpsError

    Body = TypeVar("Body")

UNREADABLE_LIMIT = 3  # answers in a row that make no sense before an exchange ends
CLOCK_SKEW_S = 300  # between our clock and DPS's Date before a refused token is blamed on the clock
THROTTLED = "dps.throttled"
FINAL = (ASSIGNED, FAILED, DISABLED)
# A lookup that answers so will not get better: the operation status serves for the rest of the exchange.
LOOKUP_REFUSALS = (400, 401, 403, 404, 405, 415, 501)
STILL_UNASSIGNED_POLLS = 5  # lookups that say "unassigned" before the operation is asked why
TEXT_LIMIT = 200  # characters of any text of the service that are shown, sent back or stored


class _Budget:
    """Until when an exchange may take."""

    def __init__(self, end_s: float) -> None:
        self.end_s = end_s
        self.queue_end_s = 0.0  # 0: no challenge is held; else until then a wait for quota makes the budget longer


def register(
    settings: "Settings",
    registration_id: str,
    beside: "dict[str, Any] | None" = None,
    patient: bool = True,
    queues: bool = True,
) -> "Generator[Effect, Any, tuple[Assignment, Records]]":
    """Registers the device and returns its assignment and what to commit, the record `identity` last.

    That record also holds what is `beside`, by JSON name. Raises RetryLater, AskOperator; never leaves the device worse
    than before. Not `patient`: where DPS does not answer the first request well, it is not asked again. Where DPS has
    no quota, a caller that `queues` has it asked again within the budget. One that does not has waits of its own before
    the first request, and a challenge is kept for it for as long as the token lives.
    """
    now_s: float = yield Uptime()
    budget = _Budget(now_s + settings.registration_budget_s)
    begin = budget if patient else _Budget(now_s)
    try:
        outcome = yield from _attempt(settings, registration_id, begin, budget, beside, queues)
    except IdentityStale:
        try:
            outcome = yield from _attempt(settings, registration_id, budget, budget, beside, queues)
        except IdentityStale as again:
            if again.code == "dps.operation_unknown":
                raise RetryLater(again.code, again.message, None, again.request_id)
            raise AskOperator(again.code, again.message, None, again.request_id)
    return outcome


def registration_path(id_scope: str, registration_id: str, step: str = "", version: str = API_VERSION) -> str:
    """Path and query of a request about a registration: `step` is "/register", "/operations/…", or "" to look it up."""
    resource = f"/{percent_encode(id_scope)}/registrations/{percent_encode(registration_id)}"
    return f"{resource}{step}?api-version={version}"


def _attempt(
    settings: "Settings",
    registration_id: str,
    begin: _Budget,
    budget: _Budget,
    beside: "dict[str, Any] | None",
    queues: bool,
) -> "Generator[Effect, Any, tuple[Assignment, Records]]":
    way = registering(settings)
    shown, opening_token, ek_name, srk_name = yield from way.opening(settings, registration_id)
    members = yield from way.members(registration_id)
    body = device_registration(registration_id, settings.payload, shown, members)
    register_path = registration_path(settings.id_scope, registration_id, "/register", settings.api_version)
    del shown, members
    http = Http("PUT", register_path, body, opening_token)
    reply, answer = yield from _step(http, begin, read_register, queues, first=True)
    if isinstance(answer, TpmChallenge):
        challenge_key = yield from way.challenge_key(answer)
        if not challenge_key:
            raise _unproved(reply, answer, settings.attestation, opening_token)
        del reply, answer  # their 2 KiB a board needs for the next ones
        now: Utc = yield UtcNow()
        check_clock(now)
        if not queues:
            yield from _hold(budget)
        resource = dps_resource(settings.id_scope, registration_id)
        token = yield from signed_token(resource, now.now_s + DPS_TOKEN_LIFE_S, challenge_key, DPS_KEY_NAME)
        http = Http("PUT", register_path, body, token)
        reply, answer = yield from _step(http, budget, read_register)
        if isinstance(answer, TpmChallenge):
            raise _token_refused(reply, now.now_s)
    elif settings.attestation != TPM and not queues:
        yield from _hold(budget)

    # The large ones go first: what a call leaves on a generator's stack MicroPython keeps until another call of as many
    # arguments takes its place.
    state = yield from _poll(http, reply, answer, way, settings, registration_id, budget)
    del body, http, reply, answer  # a board needs their memory for the rest
    _check_answer(state, registration_id, settings)
    wrapped_key = yield from way.hub_key(state)
    chain, before = yield from way.issued(state)
    assigned_at: Utc = yield UtcNow()
    payload, payload_omitted = payload_to_store(state.payload)
    assignment = Assignment(
        id_scope=settings.id_scope,
        endpoint=settings.endpoint,
        registration_id=registration_id,
        assigned_hub=state.assigned_hub or "",
        device_id=state.device_id or "",
        wrapped_key=wrapped_key,
        ek_name=ek_name,
        srk_name=srk_name,
        status=ASSIGNED,
        substatus=_text_to_store(state.substatus),
        etag=_text_to_store(state.etag),
        created_utc=_text_to_store(state.created_date_time_utc),
        last_updated_utc=_text_to_store(state.last_updated_date_time_utc),
        assigned_at_s=assigned_at.now_s,
        payload=payload,
        payload_omitted=payload_omitted,
        attestation=settings.attestation,
        chain=chain,
    )
    del state
    record: bytes = yield from sealed(assignment, beside)
    identity: Records = ((IDENTITY, record),)
    return assignment, before + identity


def registering(settings: "Settings") -> "Registering":
    """A registration by the way that the settings name, not begun."""
    if settings.certificate:
        from dps_agent.registration_by_issuance import ByIssuance

        return ByIssuance(_of_attestation(settings))
    return _of_attestation(settings)


def _of_attestation(settings: "Settings") -> "Registering":
    if settings.attestation == SYMMETRIC_KEY:
        from dps_agent.registration_by_key import ByKey

        return ByKey()
    if settings.attestation == X509:
        from dps_agent.registration_by_certificate import ByCertificate

        return ByCertificate()
    from dps_agent.registration_by_tpm import ByTpm

    return ByTpm()


def _hold(budget: _Budget) -> "Generator[Effect, Any, None]":
    """From now on the quota for this registration is spent: it is not given up for want of more."""
    held_s: float = yield Uptime()
    budget.queue_end_s = held_s + DPS_TOKEN_LIFE_S - CLOCK_SKEW_S


def _poll(
    register: Http,
    reply: Reply,
    answer: RegistrationOperationStatus,
    way: "Registering",
    settings: "Settings",
    registration_id: str,
    budget: _Budget,
) -> "Generator[Effect, Any, DeviceRegistrationResult]":
    """Asks until the registration has ended well, and returns how; `register` is the last PUT, with its answer.

    A lookup may still answer for an earlier registration, also for one of ours that was never committed. What it says
    counts only if a lookup of this exchange said "not yet" before; otherwise, and where anything is missing, the
    status of this very operation decides. What a lookup leads to:

    1. It is refused: from now on the operation alone is asked. 2. It is final and counts: the failure is raised, or
    what is complete is returned. 3. It is not final: the next poll, but for an "unassigned" that stays, whose reason
    the operation knows. 4. Anything else: the operation is asked at once.
    """
    token = register.authorization
    where = settings.id_scope, registration_id
    lookup = Http("POST", registration_path(*where, version=settings.api_version), register.body, token)
    step = f"/operations/{percent_encode(answer.operation_id or '')}"
    operation = Http("GET", registration_path(*where, step, settings.api_version), b"", token)
    by_lookup = settings.poll == POLL_LOOKUP
    not_yet_seen = False
    polls = requests = 0
    ended = _is_final(answer) and answer.registration_state is not None
    while not ended:
        yield from _wait_to_poll(reply, polls, requests, budget)
        polls += 1
        requests = 1
        if by_lookup:
            reply, result = yield from _step(lookup, budget, _read_lookup)
            if result is None:
                by_lookup = False
            elif result.status in FINAL and not_yet_seen:
                if result.status != ASSIGNED:
                    raise _failure(result.status, result, reply)
                if result.assigned_hub and result.device_id and result.registration_id and not way.missing(result):
                    return result
            elif result.status and result.status not in FINAL:
                not_yet_seen = True
                if result.status != UNASSIGNED or polls % STILL_UNASSIGNED_POLLS:
                    continue
            requests = 2
            del result  # its memory is for the next one
        reply, answer = yield from _step(operation, budget, _read_operation)
        ended = _is_final(answer)
    state = answer.registration_state
    for status in (DISABLED, FAILED):
        if status in (answer.status, state and state.status):
            raise _failure(status, state, reply)
    missing = way.missing(state)
    if missing or state is None:
        raise RetryLater(
            "dps.assigned_without_key",
            f"DPS says assigned{_to(state)} but sent no {missing}, neither on lookup nor with the operation",
            None,
            reply.headers.get(REQUEST_ID_HEADER, ""),
        )
    return state


def _step(
    http: Http, budget: _Budget, read: "Callable[[Reply], Body]", queues: bool = True, first: bool = False
) -> "Generator[Effect, Any, tuple[Reply, Body]]":
    """Sends one request until `read` accepts its answer; RetryLater once the budget or our patience has ended.

    Not `queues`: it is not sent again where there is no quota for it. Before the `first` has been answered no quota is
    spent. What comes back: 1. No answer. 2. An answer that
    `read` accepts, which ends this. 3. One that may be better later, by Retry-After if it has one. 4. One too large for
    the heap. What `read` raises that is no RetryLater comes out. UNREADABLE_LIMIT answers in a row that make no sense,
    a certificate that is refused, and want of quota where the caller does not queue, end it at once.
    """
    failures = unreadable = 0
    while True:
        reply: Reply | NoReply = yield http
        if isinstance(reply, NoReply):
            error = no_reply_error(reply)
        else:
            try:
                answer = read(reply)
                body = reply.body if reply.status >= 400 else b""  # all of a good reply is in `answer`
                return Reply(reply.status, reply.headers, body, reply.date_s), answer
            except RetryLater as refused:
                error = refused
            except MemoryError:
                error = no_reply_error(NoReply("too_large: no memory for the answer", True))
        failures += 1
        senseless = error.code in ("dps.malformed_answer", "network.protocol", "network.too_large", "network.not_tls")
        senseless = senseless or "tls_" in error.code  # a handshake that failed, though not for a certificate
        unreadable = unreadable + 1 if senseless else 0
        throttled = error.code == THROTTLED
        if unreadable >= UNREADABLE_LIMIT or error.code == "network.tls" or (throttled and not queues):
            raise error
        holds = throttled and not first
        first_s, limit_s = (HELD_AGAIN_S, HELD_AGAIN_S) if holds else (STEP_FIRST_S, STEP_LIMIT_S)
        delay_s: float = yield from exponential_s(failures, first_s, limit_s)
        if error.retry_after_s:
            asked_s: float = yield from after_request_s(error.retry_after_s)
            delay_s = max(delay_s, asked_s)
        yield from _sleep_within(delay_s, budget, error)


def _wait_to_poll(reply: Reply, polls: int, requests: int, budget: _Budget) -> "Generator[Effect, Any, None]":
    """Waits as long as `reply` asks for, by default longer the longer it takes.

    `polls` were made so far, the last one of `requests` requests. From the second poll on never faster than DPS lets
    a device poll: 5 requests in 10 s.
    """
    asked_s = retry_after_s(reply.headers, POLL_LIMIT_S)
    if asked_s is None:
        asked_s = min(POLL_DEFAULT_S * (1 + polls // 10), POLL_DEFAULT_LIMIT_S)
    delay_s: float = yield from after_request_s(asked_s)
    if polls:
        delay_s = max(delay_s, POLL_DEFAULT_S * requests)
    error = RetryLater("dps.still_assigning", "DPS is still assigning the device to a hub")
    yield from _sleep_within(delay_s, budget, error)


def _sleep_within(delay_s: float, budget: _Budget, error: RetryLater) -> "Generator[Effect, Any, None]":
    """Sleeps for the reason that `error` gives, or raises it where the budget would not last."""
    now_s: float = yield Uptime()
    queues = error.code == THROTTLED and budget.queue_end_s > 0
    if now_s + delay_s > (budget.queue_end_s if queues else budget.end_s):
        raise error
    if queues:
        budget.end_s += delay_s
    if delay_s:
        yield Sleep(delay_s, error.message)


# Readers: what an answer means for the step that it answers.


def read_register(reply: Reply) -> "RegistrationOperationStatus | TpmChallenge":
    """What an answer to `register` says; raises the error of anything else."""
    if reply.status == 401:
        try:
            return decode(TpmChallenge, reply.body)
        except RetryLater:
            return TpmChallenge(None, None, None, None, {})  # no challenge, an error in some other form
    answer = _read_status(reply)
    operation_id = answer.operation_id or ""
    if operation_id != _printable(operation_id):
        fault = f"expected at most {TEXT_LIMIT} printable characters, got {operation_id[:TEXT_LIMIT]!r}"
        raise RetryLater("dps.malformed_answer", f"RegistrationOperationStatus.operationId: {_printable(fault)}")
    if not operation_id and not (_is_final(answer) and answer.registration_state):
        raise RetryLater("dps.malformed_answer", "RegistrationOperationStatus.operationId: expected a string, got none")
    return answer


def _read_operation(reply: Reply) -> RegistrationOperationStatus:
    if reply.status == 401:
        raise _token_refused(reply, None)
    if reply.status == 404:
        refused = refusal_of(reply)
        raise IdentityStale("dps.operation_unknown", refused.message, None, refused.request_id)
    return _read_status(reply)


def _read_status(reply: Reply) -> RegistrationOperationStatus:
    if reply.status not in (200, 202):
        raise refusal_of(reply)
    return decode(RegistrationOperationStatus, reply.body)


def _read_lookup(reply: Reply) -> "DeviceRegistrationResult | None":
    if reply.status in LOOKUP_REFUSALS:
        return None
    if reply.status not in (200, 202):
        raise refusal_of(reply)
    return decode(DeviceRegistrationResult, reply.body)


def _is_final(answer: RegistrationOperationStatus) -> bool:
    state = answer.registration_state
    return (answer.status or (state and state.status)) in FINAL


# Checks before anything is committed.


def _check_answer(state: DeviceRegistrationResult, registration_id: str, settings: "Settings") -> None:
    """AskOperator `dps.assignment_refused` unless the assignment is ours and names a hub and a device."""
    fault = ""
    if (state.registration_id or "").lower() != registration_id.lower():
        fault = f"registrationId: expected {registration_id!r}, got {_printable(state.registration_id)!r}"
    if not fault:
        hub = hub_fault(state.assigned_hub or "", settings.hub_suffixes)
        device = device_id_fault(state.device_id or "")
        fault = f"assignedHub: {hub}" if hub else f"deviceId: {device}" if device else ""
    if fault:
        raise AskOperator("dps.assignment_refused", f"the assignment is refused: {_printable(fault)}")


def _text_to_store(text: "str | None") -> str:
    """A short printable text as it is, anything else as ""."""
    return text if text and len(text) <= TEXT_LIMIT and _printable(text) == text else ""


# Errors: who must act on what DPS answered. Source of the six-digit codes: DPS troubleshooting guide and SDK tests.

EK_MISMATCH = 400004
ALLOCATION_FAILURES = (400207, 400208, 400209)  # webhook failed, no hub linked, not authorised on the hub


def no_reply_error(reply: NoReply) -> RetryLater:
    """The error for an exchange without an answer."""
    word = reply.reason.split(":")[0]
    if "." in word:  # a code: what the connection takes of this device was not to be had, and nobody was asked
        return RetryLater(word, _printable(reply.reason[len(word) + 2 :]))
    word = NO_REPLY_DNS if word == NO_REPLY_NOT_FOUND else word  # whether DPS itself exists is no question
    code = "network.unreachable" if word == NO_REPLY_CONNECT else "network." + word
    return RetryLater(code, f"no answer from DPS ({_printable(reply.reason)})")


def refusal_of(reply: Reply) -> "DpsError":
    """The error for an answer that is not what the API promises for success."""
    try:
        details = decode(ProvisioningServiceErrorDetails, reply.body)
    except RetryLater:
        details = ProvisioningServiceErrorDetails(None, None, None, None, None, {})
    limit_s = THROTTLE_LIMIT_S if reply.status in (429, 503) else POLL_LIMIT_S
    text = f"DPS answered {reply.status}"
    if details.error_code or reply.headers.get(ERROR_CODE_HEADER):
        text += f", error {details.error_code or _printable(reply.headers[ERROR_CODE_HEADER])}"
    if details.message:
        text += f": {_printable(details.message)}"
    return _classed(
        reply.status,
        details.error_code,
        text,
        _printable(details.tracking_id) or _printable(reply.headers.get(REQUEST_ID_HEADER)),
        retry_after_s(reply.headers, limit_s),
    )


def _failure(status: str, state: "DeviceRegistrationResult | None", reply: Reply) -> "DpsError":
    """The error for a registration that ended as failed or disabled."""
    request_id = _printable(reply.headers.get(REQUEST_ID_HEADER))
    if status == DISABLED:
        name = _printable(state.registration_id if state else "") or "this device"
        return AskOperator("dps.enrollment_disabled", f"the enrolment of {name} is disabled", None, request_id)
    error_code = state.error_code if state else None
    text = "the registration failed"
    if error_code:
        text += f", error {error_code}"
    if state and state.error_message:
        text += f": {_printable(state.error_message)}"
    http_status = error_code // 1000 if error_code else 0
    return _classed(http_status if http_status >= 400 else 422, error_code, text, request_id, None)


def _classed(status: int, error_code: "int | None", text: str, request_id: str, asked_s: "int | None") -> "DpsError":
    if 200 <= status < 300 or status < 100 or status > 599:
        return RetryLater("dps.malformed_answer", f"{text}; expected 200, 202 or an error", None, request_id)
    if status in (409, 412):
        return RetryLater("dps.conflict", text, asked_s, request_id)
    if status in (425, 429):
        return RetryLater("dps.throttled", text, asked_s, request_id)
    if status == 408 or status >= 500:
        return RetryLater("dps.unavailable", text, asked_s, request_id)
    if error_code == EK_MISMATCH:
        code = "dps.ek_mismatch"
    elif error_code in ALLOCATION_FAILURES:
        code = "dps.allocation_failed"
    elif status < 400:
        code = "dps.redirected" if status >= 300 else "dps.unexpected_status"
    elif status in (400, 403, 404):
        code = {400: "dps.bad_request", 403: "dps.forbidden", 404: "dps.not_found"}[status]
    elif status in (401, 422):
        code = "dps.refused"
    else:
        code = "dps.unexpected_status"
    return AskOperator(code, text, None, request_id)


def _token_refused(reply: Reply, now_s: "int | None") -> IdentityStale:
    refused = refusal_of(reply)
    text = f"DPS did not accept the token that the TPM signed: {refused.message}{_clock_doubt(reply, now_s)}"
    return IdentityStale("dps.token_refused", text, None, refused.request_id)


def _unproved(reply: Reply, challenge: TpmChallenge, attestation: str, token: "SasToken | None") -> "DpsError":
    """The error where DPS does not take what the device has shown, and there is nothing more to show."""
    refused = refusal_of(reply)
    if token is None:
        if not CERTIFICATES or attestation == TPM:
            return refused
        text = f"DPS did not accept this device's certificate: {refused.message}"
        return AskOperator("dps.certificate_refused", text, None, refused.request_id)
    text = "DPS challenges a TPM: the enrolment of this device is none for a symmetric key"
    if not challenge.authentication_key:
        doubt = _clock_doubt(reply, token.expires_at_s - DPS_TOKEN_LIFE_S)
        text = f"DPS did not accept the token that the device's key signed: {refused.message}{doubt}"
    return AskOperator("dps.key_refused", text, None, refused.request_id)


def _clock_doubt(reply: Reply, now_s: "int | None") -> str:
    if now_s is not None and reply.date_s is not None and abs(reply.date_s - now_s) > CLOCK_SKEW_S:
        return f"; the device's clock differs from DPS's by {now_s - reply.date_s} s"
    return ""


def _to(state: "DeviceRegistrationResult | None") -> str:
    return f" to {_printable(state.assigned_hub)}" if state and state.assigned_hub else ""


def _printable(text: "str | None") -> str:
    """The service's text, safe for a terminal and a log line: printable ASCII, cut off at TEXT_LIMIT."""
    out = ""
    for character in (text or "")[:TEXT_LIMIT]:
        out += character if " " <= character <= "~" else "?"
    return out
