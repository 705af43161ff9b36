"""A registration against a service that does anything: it always ends, in the right class, within its budget."""

from typing import Any

import pytest
from hypothesis import HealthCheck, example, given
from hypothesis import settings as effort
from hypothesis import strategies as st

from dps_agent.assignment import decode, seal_message
from dps_agent.attestation import load_held
from dps_agent.effects import NoReply, Reply
from dps_agent.registration import register
from dps_agent.settings import POLL_LOOKUP, POLL_OPERATION
from dps_hal.contracts import StoredRecord
from dps_hal.errors import AskOperator, DpsError, IdentityStale, RetryLater
from dps_hal.platform import from_json, hmac_sha256, to_base64, to_json
from support.world import DEVICE, HUB, World, error_reply, fake_blob, reply, settings, with_identity

EXAMPLES = 2500
ENROLMENT_STATUSES = ("unassigned", "assigning", "assigned", "failed", "disabled")
HTTP_STATUSES = (200, 202, 204, 301, 400, 401, 403, 404, 405, 408, 409, 412, 415, 418, 429, 500, 501, 503)
ERROR_CODES = (None, 400004, 400207, 401002, 403001, 404201, 409203, 412000, 429001, 500001, 13)
CODES_TO_REACH = {
    "dps.allocation_failed",
    "dps.assigned_without_key",
    "dps.assignment_refused",
    "dps.bad_request",
    "dps.blob_malformed",
    "dps.conflict",
    "dps.ek_mismatch",
    "dps.enrollment_disabled",
    "dps.forbidden",
    "dps.key_unsuitable",
    "dps.malformed_answer",
    "dps.not_found",
    "dps.operation_unknown",
    "dps.redirected",
    "dps.refused",
    "dps.still_assigning",
    "dps.throttled",
    "dps.token_refused",
    "dps.unavailable",
    "dps.unexpected_status",
    "network.closed",
    "network.dns",
    "network.protocol",
    "network.timeout",
    "network.tls",
    "network.too_large",
    "network.unreachable",
    "tpm.blob_refused",
    "tpm.key_stale",
    "tpm.locked_out",
    "clock.not_set",
}

retry_after = st.sampled_from(
    (None, None, "0", "3", "300", "301", "86400", "soon", "-1", "9" * 30, "8.5", "Fri, 15 Jan 2027 08:01:00 GMT")
)
no_reply = st.builds(
    NoReply,
    st.sampled_from(
        (
            "dns: no",
            "connect: no",
            "tls: no",
            "tls_failed: no",
            "timeout",
            "closed: half",
            "too_large: much",
            "protocol: x",
        )
    ),
    st.booleans(),
)
json_value = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
blob = st.sampled_from(("", "AAAA", "%%", None, 7)) | st.sampled_from((b"k" * 32, b"other")).map(
    lambda key: to_base64(fake_blob(key))
)
state = st.fixed_dictionaries(
    {"status": st.sampled_from((*ENROLMENT_STATUSES, "migrating", None))},
    optional={
        "registrationId": st.sampled_from((DEVICE, DEVICE, "PRESS-07", "press-08", None, 7)),
        "assignedHub": st.sampled_from((HUB, HUB, "evil.example.net", "", None)),
        "deviceId": st.sampled_from((DEVICE, DEVICE, "a/b", None)),
        "tpm": st.fixed_dictionaries({}, optional={"authenticationKey": blob}),
        "errorCode": st.sampled_from(ERROR_CODES),
        "errorMessage": st.text(max_size=10),
        "etag": st.sampled_from(("etag-1", "etag-9")),
        "payload": json_value,
    },
)
operation = st.fixed_dictionaries(
    {"operationId": st.sampled_from(("4.abc", "4.abc", "4.abc", "", None, "a\u0000", "x" * 300))},
    optional={"status": st.sampled_from((*ENROLMENT_STATUSES, "migrating")), "registrationState": state},
)
challenge = st.fixed_dictionaries({"message": st.just("resend")}, optional={"authenticationKey": blob})
body = state | operation | challenge | json_value
any_reply = st.builds(reply, st.sampled_from(HTTP_STATUSES), body, retry_after)
odd_bodies = (b'{"operationId":"\\ud800","status":"assigning"}', b"[" * 999 + b"]" * 999, b'{"status":"\\udfff"}')
raw_reply = st.builds(
    reply, st.sampled_from(HTTP_STATUSES), st.binary(max_size=30) | st.sampled_from(odd_bodies), retry_after
)
refusal = st.builds(
    lambda status, code, after: error_reply(status, code or 0, "no", after),
    st.sampled_from(HTTP_STATUSES),
    st.sampled_from(ERROR_CODES),
    retry_after,
)
good_operation = st.builds(reply, st.sampled_from((200, 202)), operation, retry_after)
good_lookup = st.builds(reply, st.just(200), state, retry_after)
changes = st.sampled_from(
    (
        ("assignedHub", "evil.example.net"),
        ("deviceId", "a/b"),
        ("registrationId", "press-08"),
        ("tpm", {"authenticationKey": "AAAA"}),
        ("authenticationKey", "AAAA"),
        ("tpm", None),
        ("status", "unassigned"),
    )
)


def altered(change: tuple[str, Any]) -> Any:
    """The working service's answer with one field changed, at whatever level it has it."""

    def alter(answer: Reply) -> Reply:
        value = from_json(answer.body)
        for level in (value, value.get("registrationState") or {}):
            if change[0] in level:
                level[change[0]] = change[1]
        return answer._replace(body=to_json(value).encode())

    return alter


service = st.none()
unasked = st.builds(altered, changes) | good_operation | good_lookup | refusal | no_reply | any_reply | raw_reply
answers = st.lists(service | service | service | unasked, max_size=14)
# Long outages and services that never come to an end, which short random lists hardly hold.
outages = st.builds(
    lambda head, tail: [None] * head + [tail] * 400,
    st.integers(0, 4),
    st.builds(altered, changes) | refusal | no_reply | good_lookup | good_operation | raw_reply,
)
tpm_failures = st.lists(
    st.none()
    | st.none()
    | st.sampled_from(
        (
            RetryLater("tpm.locked_out", "wait", 1000),
            IdentityStale("tpm.key_stale", "stale"),
            IdentityStale("tpm.blob_refused", "refused"),
            AskOperator("dps.key_unsuitable", "no signing key"),
        )
    ),
    max_size=4,
)

reached: set[str] = set()
served: set[Any] = set()


def note(answer: "Reply | NoReply") -> None:
    """Remembers which HTTP and enrolment statuses a registration met."""
    if isinstance(answer, Reply):
        served.add(answer.status)
        for status in ENROLMENT_STATUSES:
            if f'"status":"{status}"'.encode() in answer.body:
                served.add(status)


@pytest.fixture(scope="module", autouse=True)
def _every_ending_was_reached():
    yield
    missed = (CODES_TO_REACH | {"assigned"}) - reached
    assert not missed, f"never reached: {missed}"
    wanted = {*ENROLMENT_STATUSES, *HTTP_STATUSES}
    assert served >= wanted, f"never served: {wanted - served}"


@given(
    script=answers | outages,
    imports=tpm_failures,
    signs=tpm_failures,
    poll=st.sampled_from((POLL_LOOKUP, POLL_LOOKUP, POLL_OPERATION)),
    budget_s=st.sampled_from((5, 60, 900)),
    polls_until_assigned=st.sampled_from((0, 1, 1, 3, 10**6)),
    stale_lookups=st.integers(0, 3),
    held_before=st.booleans(),
    believable=st.sampled_from((True,) * 9 + (False,)),
)
@example([None, None, error_reply(404, 404000)] * 2, [], [], POLL_OPERATION, 900, 1, 0, False, True)
@example([None, None, error_reply(401, 401002)] * 2, [], [], POLL_OPERATION, 900, 1, 0, False, True)
@effort(max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_a_registration_always_ends_in_the_right_class(
    script: list[Any],
    imports: list[Any],
    signs: list[Any],
    poll: str,
    budget_s: int,
    polls_until_assigned: int,
    stale_lookups: int,
    held_before: bool,
    believable: bool,
) -> None:
    world = World()
    if held_before:
        world.run(register(settings(), DEVICE))
    world.dps.script = list(script)
    world.dps.polls_until_assigned = polls_until_assigned
    world.dps.stale_lookups = stale_lookups
    world.dps.hub = "second.azure-devices.net"
    world.refuse = {"ImportKey": list(imports), "Sign": list(signs)}
    world.believable = believable
    answer = world.dps.answer

    def noted(http: Any) -> Any:
        came = answer(http)
        note(came)
        return came

    world.dps.answer = noted  # type: ignore[method-assign]
    started_s = world.uptime_s
    world.sleeps.clear()
    try:
        assignment, record = with_identity(world.run(register(settings(poll=poll, budget_s=budget_s), DEVICE)))
    except DpsError as error:
        assert type(error) in (RetryLater, AskOperator), f"{type(error).__name__} {error.code}: {error}"
        assert error.code.split(".")[0] in ("dps", "network", "tpm", "clock"), error.code
        assert error.message and error.message.isprintable() and "SharedAccessSignature" not in error.message
        reached.add(error.code)
    else:
        reached.add("assigned")
        read, text, seal = decode(record)
        assert read == assignment and assignment.registration_id == DEVICE
        key = assignment.wrapped_key[-32:]
        assert seal == hmac_sha256(key, seal_message(text))
        assert assignment.assigned_hub.endswith(".azure-devices.net")
        if all(entry is None or isinstance(entry, NoReply) or getattr(entry, "status", 0) >= 400 for entry in script):
            assert key == world.dps.hub_key, "the key of an earlier registration was taken"
            assert assignment.assigned_hub == world.dps.hub
        world.refuse = {}
        assert world.run(load_held(settings(poll=poll), StoredRecord(record, 1, False))) == (assignment, "")
    assert world.commits == []
    spent_s = sum(delay for delay, _ in world.sleeps)
    assert spent_s <= budget_s, f"slept {spent_s} s of {budget_s} s"
    assert world.uptime_s - started_s <= budget_s + 60
    assert len(world.dps.requests) < 1000
