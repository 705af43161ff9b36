"""A registration, step by step, against a DPS in virtual time."""

from dps_agent.assignment import decode, seal_message
from dps_agent.backoff import HELD_AGAIN_S
from dps_agent.effects import NoReply
from dps_agent.registration import CLOCK_SKEW_S, UNREADABLE_LIMIT, register
from dps_agent.sas import DPS_TOKEN_LIFE_S
from dps_agent.settings import POLL_OPERATION
from dps_hal.errors import AskOperator, IdentityStale, RetryLater
from dps_hal.platform import hmac_sha256, to_base64
from dps_hal.tpm.keys import DECRYPT, ID_KEY_ATTRIBUTES, RESTRICTED
from support.claims import assert_refused
from support.world import (
    DEVICE,
    HUB,
    World,
    body_of,
    calls,
    catch,
    error_reply,
    fake_blob,
    reply,
    settings,
    with_identity,
    without,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from dps_agent.settings import Settings

FIRST_CALLS = ["PUT", "PUT+token"]
SERVICE = None  # in a script: the service answers by itself


def enrol(world: World, choice: "Settings | None" = None) -> "Any":
    return with_identity(world.run(register(choice or settings(), DEVICE)))


def in_a_life(world: World) -> "Any":
    """As a living service registers, which has waits of its own."""
    return world.run(register(settings(), DEVICE, None, True, False))


def scripted(*script: "Any") -> World:
    world = World()
    world.dps.script = list(script)
    return world


def ended(script: "tuple[Any, ...]", error_class: "Any", code: str, choice: "Settings | None" = None) -> World:
    world = scripted(*script)
    assert_refused(lambda: enrol(world, choice), error_class, code, f"script={script[:4]!r}")
    assert world.uptime_s <= 100 + 900 + 60, f"the budget was overrun: {world.uptime_s}"
    return world


def test_a_registration_ends_with_hub_device_and_a_key_that_signs() -> None:
    world = World()
    assignment, record = enrol(world)
    assert (assignment.assigned_hub, assignment.device_id, assignment.registration_id) == (HUB, DEVICE, DEVICE)
    assert assignment.payload == {"line": 4} and not assignment.payload_omitted
    assert assignment.substatus == "initialAssignment" and assignment.etag == "etag-1"
    stored, text, seal = decode(record)
    assert stored == assignment
    assert seal == hmac_sha256(world.dps.hub_key, seal_message(text))
    assert world.commits == [], "only the lifecycle commits"


def test_polling_uses_the_status_lookup_and_never_the_operation() -> None:
    world = World()
    world.dps.polls_until_assigned = 4
    enrol(world)
    assert calls(world) == FIRST_CALLS + ["LOOKUP", "LOOKUP", "LOOKUP", "LOOKUP", "LOOKUP"]


def test_polling_by_operation_never_looks_up() -> None:
    world = World()
    enrol(world, settings(poll=POLL_OPERATION))
    assert calls(world) == FIRST_CALLS + ["OPERATION", "OPERATION"]


def test_requests_carry_keys_ids_and_payload() -> None:
    world = World()
    enrol(world, settings(payload={"line": 7}))
    put, lookup = world.dps.requests[0], world.dps.requests[2]
    assert put.path == "/0ne00000000/registrations/press-07/register?api-version=2021-10-01"
    assert lookup.path == "/0ne00000000/registrations/press-07?api-version=2021-10-01"
    for request in (put, lookup):
        body = body_of(request)
        assert body["registrationId"] == DEVICE and body["payload"] == {"line": 7}
        assert (
            body["tpm"]["endorsementKey"].startswith("AToAAQALAAMAsgAg") and len(body["tpm"]["storageRootKey"]) == 380
        )


def test_the_first_put_carries_no_token_and_the_rest_one_for_the_registration() -> None:
    world = World()
    enrol(world)
    assert world.dps.requests[0].authorization is None
    for request in world.dps.requests[1:]:
        token = request.authorization
        assert token is not None and token.resource == "0ne00000000%2Fregistrations%2Fpress-07"
        assert "sig=" not in repr(request), "a token shows itself"


def test_ids_are_percent_encoded_in_the_path() -> None:
    world = World()
    world.dps.script = [error_reply(404, 404201)]
    catch(lambda: world.run(register(settings(id_scope="a/b"), "x:y")))
    assert world.dps.requests[0].path.startswith("/a%2Fb/registrations/x%3Ay/register?")


def test_retry_after_is_honoured_between_polls() -> None:
    world = World()
    world.dps.retry_after = "17"
    enrol(world)
    delays = world.slept("assigning")
    assert len(delays) == 2 and all(17 <= delay < 19 for delay in delays), delays


def test_a_retry_after_that_is_a_date_is_honoured_like_seconds() -> None:
    world = World()
    world.dps.retry_after = "Fri, 15 Jan 2027 08:00:17 GMT"
    enrol(world)
    delays = world.slept("assigning")
    assert len(delays) == 2 and all(17 <= delay < 19 for delay in delays), delays
    throttled = error_reply(429, 429001, retry_after="Fri, 15 Jan 2027 08:00:40 GMT")
    world = scripted(throttled, SERVICE, throttled)
    enrol(world)
    assert len(world.slept("429")) == 2 and all(40 <= delay < 45 for delay in world.slept("429")), world.sleeps
    for text, wanted_s in (("Fri, 15 Jan 2027 10:00:00 GMT", 7200), ("Mon, 15 Feb 2027 08:00:00 GMT", 86400)):
        world = scripted(error_reply(503, 503000, retry_after=text))
        error = assert_refused(lambda: enrol(world), RetryLater, "dps.unavailable")
        assert error.retry_after_s == wanted_s and world.sleeps == []


def test_a_retry_after_that_nobody_can_read_means_the_default() -> None:
    for text in ("soon", "Wed, 32 Oct 2026 07:28:00 GMT", "-1", "8,5", ""):
        world = World()
        world.dps.retry_after = text
        enrol(world)
        assert world.slept("assigning")[0] >= 2, f"retry_after={text!r} gave {world.sleeps}"
        assert world.slept("assigning")[0] < 3, f"retry_after={text!r} gave {world.sleeps}"


def test_a_retry_after_over_the_limit_is_the_limit() -> None:
    for text in ("301", "600", "99999999999", "9" * 40):
        world = World()
        world.dps.retry_after = text
        enrol(world)
        assert 300 <= world.slept("assigning")[0] <= 330, f"retry_after={text!r} gave {world.sleeps}"


def test_polls_without_a_retry_after_become_slower() -> None:
    world = World()
    world.dps.retry_after = None
    world.dps.polls_until_assigned = 10**6
    catch(lambda: enrol(world))
    delays = world.slept("assigning")
    assert delays[0] < 3 and 10 <= delays[-1] <= 11 and 80 < len(delays) < 160, f"{len(delays)} polls"


def test_retry_after_zero_polls_at_once_but_not_in_a_hot_loop() -> None:
    world = World()
    world.dps.retry_after = "0"
    world.dps.polls_until_assigned = 10000
    assert_refused(lambda: enrol(world, settings(budget_s=120)), RetryLater, "dps.still_assigning")
    assert 55 < len(world.dps.requests) < 65, "DPS lets a device poll 5 times in 10 s"
    assert calls(world)[:3] == FIRST_CALLS + ["LOOKUP"]
    assert len(world.slept("assigning")) == calls(world).count("LOOKUP") - 1, "the first poll waits for nothing"


def test_a_throttled_put_waits_as_long_as_dps_asks() -> None:
    world = scripted(error_reply(429, 429001, retry_after="40"), SERVICE, error_reply(429, 429001, retry_after="50"))
    enrol(world)
    assert 40 <= world.slept("429")[0] < 45
    assert 50 <= world.slept("429")[1] < 56
    assert calls(world)[:4] == ["PUT", "PUT", "PUT+token", "PUT+token"]


def test_who_does_not_queue_leaves_when_there_is_no_quota_for_the_first_put() -> None:
    for retry_after in (None, "5"):
        world = scripted(error_reply(429, 429001, retry_after=retry_after))
        error = assert_refused(lambda world=world: in_a_life(world), RetryLater, "dps.throttled")
        assert calls(world) == ["PUT"] and world.sleeps == [] and (error.retry_after_s or 0) == int(retry_after or 0)
    world = scripted(error_reply(503, 0), NoReply("timeout", True))
    in_a_life(world)
    assert calls(world)[:3] == ["PUT", "PUT", "PUT"], "what else fails is repeated as ever"


def test_a_challenge_that_was_granted_is_not_given_up_for_want_of_quota() -> None:
    throttled = error_reply(429, 429001, retry_after=None)
    world = scripted(SERVICE, *[throttled] * 150, SERVICE, throttled, SERVICE)
    in_a_life(world)
    assert calls(world).count("PUT") == 1 and world.dps.registrations == 1
    waits = world.slept("429")
    assert HELD_AGAIN_S / 2 <= min(waits) <= max(waits) <= HELD_AGAIN_S, waits
    assert 900 < sum(waits) < DPS_TOKEN_LIFE_S and len(waits) == 151, "the budget is for what DPS is slow with"


def test_a_challenge_is_given_up_when_its_token_has_expired() -> None:
    throttled = [error_reply(429, 429001)] * 999
    world = scripted(SERVICE, *throttled)
    assert_refused(lambda: enrol(world), RetryLater, "dps.throttled")
    assert 880 <= sum(world.slept("429")) <= 900, "who queues has only the budget"
    world = scripted(SERVICE, *throttled)
    assert_refused(lambda: in_a_life(world), RetryLater, "dps.throttled")
    assert DPS_TOKEN_LIFE_S - CLOCK_SKEW_S - HELD_AGAIN_S <= sum(world.slept("429")) <= DPS_TOKEN_LIFE_S - CLOCK_SKEW_S


def test_a_wait_for_quota_leaves_slow_answers_the_budget_that_they_had() -> None:
    throttled, slow = error_reply(429, 429001), error_reply(503, 0)
    world = scripted(SERVICE, *[throttled] * 100, *[slow] * 999)
    assert_refused(lambda: in_a_life(world), RetryLater, "dps.unavailable")
    assert sum(world.slept("429")) > 900 and 800 < sum(world.slept("503")) <= 900


def test_a_throttle_longer_than_the_budget_ends_the_exchange_and_names_the_delay() -> None:
    world = scripted(error_reply(503, 503000, retry_after="7200"))
    error = assert_refused(lambda: enrol(world), RetryLater, "dps.unavailable")
    assert error.retry_after_s == 7200 and world.sleeps == []


def test_transient_answers_are_repeated_inside_the_budget() -> None:
    for status in (408, 409, 412, 429, 500, 502, 503, 504, 599):
        world = scripted(error_reply(status, status * 1000), SERVICE, SERVICE, error_reply(status, status * 1000))
        enrol(world)
        assert calls(world) == ["PUT", "PUT", "PUT+token", "LOOKUP", "LOOKUP", "LOOKUP"], f"status={status}"


def test_an_outage_ends_within_the_budget() -> None:
    for status, code in ((429, "dps.throttled"), (500, "dps.unavailable"), (409, "dps.conflict")):
        world = ended(tuple([error_reply(status, 0)] * 999), RetryLater, code)
        assert 15 < len(world.dps.requests) < 60, f"status={status} requests={len(world.dps.requests)}"


def test_no_short_retry_after_makes_an_outage_faster_than_dps_lets_a_device_poll() -> None:
    for status in (409, 429, 500, 503):
        world = World()
        at_s: list[float] = []
        world.dps.script = [lambda _: (at_s.append(world.uptime_s), error_reply(status, 0, "no", "1"))[1]] * 999
        catch(lambda: enrol(world))
        assert len(at_s) > 15, f"status={status}: it gave up after {len(at_s)} requests"
        for first, sixth in zip(at_s, at_s[5:]):
            assert sixth - first >= 10, f"status={status} at_s={at_s[:9]}"


def test_no_answer_is_repeated_inside_the_budget_and_then_reported() -> None:
    for reason, code in (
        ("dns: no such name", "network.dns"),
        ("not_found: no such name", "network.dns"),
        ("connect: refused", "network.unreachable"),
        ("timeout", "network.timeout"),
        ("closed: 12 of 300 bytes", "network.closed"),
    ):
        enrol(scripted(NoReply(reason, False), SERVICE, NoReply(reason, True), SERVICE, NoReply(reason, True)))
        ended(tuple([NoReply(reason, False)] * 999), RetryLater, code)


def test_an_unverified_server_is_not_asked_again() -> None:
    world = ended((NoReply("tls: certificate verify failed", False),), RetryLater, "network.tls")
    assert len(world.dps.requests) == 1


def test_what_fails_in_tls_without_a_verdict_is_tolerated_like_an_answer_without_sense() -> None:
    for reason in ("not_tls", "tls_version", "tls_client_certificate", "tls_failed"):
        enrol(scripted(NoReply(reason + ": x", False), SERVICE))
        world = ended(tuple([NoReply(reason + ": x", False)] * 9), RetryLater, "network." + reason)
        assert len(world.dps.requests) == UNREADABLE_LIMIT, reason


def test_refusals_of_the_first_put_say_who_must_act() -> None:
    for status, error_code, code in (
        (400, 400000, "dps.bad_request"),
        (400, 400004, "dps.ek_mismatch"),
        (401, 401002, "dps.refused"),
        (403, 403000, "dps.forbidden"),
        (404, 404201, "dps.not_found"),
        (405, 405000, "dps.unexpected_status"),
        (415, 415000, "dps.unexpected_status"),
        (301, 0, "dps.redirected"),
        (307, 0, "dps.redirected"),
        (101, 0, "dps.unexpected_status"),
        (418, 0, "dps.unexpected_status"),
    ):
        world = ended((error_reply(status, error_code, "the reason\x1b[2J"),), AskOperator, code)
        assert len(world.dps.requests) == 1, f"status={status}"


def test_an_error_shows_code_and_tracking_id_and_no_control_character() -> None:
    error = catch(lambda: enrol(scripted(error_reply(404, 404201, "not\x1b[2J found"))))
    assert "404201" in error.message and "not?[2J found" in error.message and error.request_id == "track-1"


def test_answers_that_make_no_sense_end_after_three() -> None:
    for body in (
        b"",
        b"<html>Login</html>",
        b"[]",
        b'{"status": 7}',
        b'{"registrationState": []}',
        b"{}",
        b"\xff",
        b'{"a',
    ):
        for status in (200, 202):
            world = ended(tuple([reply(status, body)] * 9), RetryLater, "dps.malformed_answer")
            assert len(world.dps.requests) == 3, f"status={status} body={body!r}"
    for status in (204, 206, 0, 700):
        ended(tuple([reply(status, b"")] * 9), RetryLater, "dps.malformed_answer")
    for reason in ("protocol: no HTTP", "too_large: 70000 bytes"):
        world = ended(tuple([NoReply(reason, True)] * 9), RetryLater, "network." + reason.split(":")[0])
        assert len(world.dps.requests) == 3


def test_only_senseless_answers_in_a_row_end_an_exchange() -> None:
    busy = error_reply(503, 503000)
    enrol(scripted(reply(200, b""), reply(200, b""), busy, reply(200, b""), reply(200, b""), busy))


def test_an_operation_id_must_fit_into_a_path() -> None:
    for body in (b'{"operationId":"\\ud800","status":"assigning"}', b'{"operationId":"a\\u0000"}'):
        world = ended(
            (SERVICE, reply(202, body), reply(202, body), reply(202, body)), RetryLater, "dps.malformed_answer"
        )
        assert len(world.dps.requests) == 4
    long = {"operationId": "4." + "a" * 400, "status": "assigning"}
    ended((SERVICE,) + (reply(202, long),) * 3, RetryLater, "dps.malformed_answer")


def test_one_senseless_answer_is_forgiven() -> None:
    enrol(scripted(reply(200, b"<html>"), SERVICE, reply(202, b""), SERVICE, reply(200, b"<html>"), SERVICE))


def test_a_second_challenge_starts_over_once_and_then_asks_the_operator() -> None:
    world = World()
    again = world.dps.challenge(fake_blob(b"k" * 32))
    world.dps.script = [SERVICE, again]
    enrol(world)
    assert calls(world)[:4] == FIRST_CALLS * 2
    world = ended((SERVICE, again, SERVICE, again), AskOperator, "dps.token_refused")
    assert calls(world) == FIRST_CALLS * 2


def test_a_refused_token_blames_the_clock_where_the_clock_is_to_blame() -> None:
    refused = error_reply(401, 401002, "Unauthorized")
    world = scripted(SERVICE, refused, SERVICE, refused)
    world.uptime_s = 5000.0
    error = catch(lambda: enrol(world))
    assert error.code == "dps.token_refused" and "clock differs" in error.message, error.message
    world = scripted(SERVICE, refused, SERVICE, refused)
    assert "clock" not in catch(lambda: enrol(world)).message


def test_no_token_is_made_while_the_clock_is_not_set() -> None:
    world = World()
    world.believable = False
    assert_refused(lambda: enrol(world), RetryLater, "clock.not_set")
    assert calls(world) == ["PUT"]


def test_a_challenge_without_a_key_is_a_refusal() -> None:
    ended((reply(401, {"message": "no"}),), AskOperator, "dps.refused")
    ended((reply(401, b"<html>proxy</html>"),), AskOperator, "dps.refused")
    ended((reply(401, {"authenticationKey": 7}),), AskOperator, "dps.refused")


def test_a_damaged_challenge_blob_is_a_damaged_answer() -> None:
    whole = fake_blob(b"k" * 32)
    for blob in (whole[:-20], whole[:100], whole + b"x", b"\x00" * 800):
        world = World()
        world.dps.script = [world.dps.challenge(blob)]
        error = assert_refused(lambda: enrol(world), RetryLater, "dps.blob_malformed", f"blob={len(blob)}")
        assert "kkkk" not in error.message
    ended((reply(401, {"authenticationKey": "%%%"}),), RetryLater, "dps.blob_malformed")


def test_a_blob_for_another_tpm_starts_over_once_and_then_asks_the_operator() -> None:
    world = World()
    foreign = world.dps.challenge(fake_blob(b"another TPM's"))
    world.dps.script = [foreign]
    enrol(world)
    assert calls(world)[:3] == ["PUT", "PUT", "PUT+token"]
    world = ended((foreign, foreign), AskOperator, "tpm.blob_refused")
    assert world.effects["ReadEndorsementKey"] == 2


def test_tpm_failures_end_the_exchange_in_their_own_class() -> None:
    for effect in ("ReadEndorsementKey", "ReadStorageRootKey", "ImportKey", "Sign"):
        for error in (RetryLater("tpm.locked_out", "wait", 1000), AskOperator("tpm.denied", "no")):
            world = World()
            world.refuse[effect] = [error]
            assert catch(lambda: enrol(world)) is error


def test_assigned_at_once_by_register_is_taken() -> None:
    world = World()
    world.dps.polls_until_assigned = 0

    def at_once(answer: "Any") -> "Any":
        return reply(200, {"operationId": "4.abc", "status": "assigned", "registrationState": world.dps.assigned()})

    world.dps.script = [SERVICE, at_once]
    assignment, _ = enrol(world)
    assert assignment.assigned_hub == HUB and calls(world) == FIRST_CALLS


def test_register_without_a_challenge_is_tolerated() -> None:
    world = World()

    def no_challenge(answer: "Any") -> "Any":
        world.dps.hub_key = world.dps._new_key(b"hub")
        return reply(202, {"operationId": "4.abc", "status": "assigned", "registrationState": world.dps.assigned()})

    world.dps.script = [no_challenge]
    assert enrol(world)[0].assigned_hub == HUB


def first_assignment(world: World) -> None:
    enrol(world)
    world.dps.requests.clear()


def test_a_stale_lookup_is_not_taken_for_the_new_assignment() -> None:
    for stale in (1, 2, 3, 5):
        world = World()
        world.dps.polls_until_assigned = 2
        first_assignment(world)
        world.dps.hub = "second.azure-devices.net"
        world.dps.stale_lookups = stale
        assignment, _ = enrol(world)
        assert assignment.assigned_hub == "second.azure-devices.net", f"stale={stale}"


def test_a_stale_lookup_is_not_taken_after_the_operation_said_not_yet() -> None:
    world = World()
    first_assignment(world)
    world.dps.hub = "second.azure-devices.net"
    world.dps.stale_lookups = 3
    world.dps.polls_until_assigned = 2
    assignment, _ = enrol(world)
    assert assignment.assigned_hub == "second.azure-devices.net", calls(world)
    assert "OPERATION" in calls(world)


def test_without_a_record_a_first_assigned_lookup_needs_the_operation() -> None:
    world = World()
    world.dps.polls_until_assigned = 0
    enrol(world)
    assert calls(world) == FIRST_CALLS + ["LOOKUP", "OPERATION"]


def test_a_stale_lookup_of_a_registration_that_was_never_committed_is_not_taken() -> None:
    world = World()
    world.dps.polls_until_assigned = 0
    enrol(world)
    world.dps.hub = "second.azure-devices.net"
    world.dps.script = [SERVICE, SERVICE] + [error_reply(503, 503000, retry_after="9999")]
    catch(lambda: enrol(world))  # reached DPS, was never committed
    world.dps.script = [SERVICE, SERVICE, SERVICE]
    world.dps.answer(world.dps.requests[-1])  # the service finishes it
    world.dps.script = []
    world.dps.hub = "third.azure-devices.net"
    world.dps.stale_lookups = 3
    assert enrol(world)[0].assigned_hub == "third.azure-devices.net"


def test_a_lookup_without_a_key_leaves_the_operation_to_decide() -> None:
    world = World()
    world.dps.lookup_key = False
    enrol(world)
    assert calls(world) == FIRST_CALLS + ["LOOKUP", "LOOKUP", "OPERATION"]


def test_a_refused_lookup_leaves_the_operation_for_the_rest() -> None:
    for status in (400, 401, 403, 404, 405, 415, 501):
        world = World()
        world.dps.polls_until_assigned = 2
        world.dps.script = [SERVICE, SERVICE, error_reply(status, status * 1000)]
        enrol(world)
        assert calls(world) == FIRST_CALLS + ["LOOKUP", "OPERATION", "OPERATION", "OPERATION"], f"status={status}"


def test_an_empty_lookup_leaves_the_operation_to_decide() -> None:
    world = World()
    world.dps.polls_until_assigned = 0
    world.dps.script = [SERVICE, SERVICE, reply(200, {})]
    enrol(world)
    assert calls(world) == FIRST_CALLS + ["LOOKUP", "OPERATION"]


def test_a_lookup_that_stays_unassigned_asks_the_operation_now_and_then() -> None:
    world = World()
    world.dps.polls_until_assigned = 0
    unassigned = reply(200, {"registrationId": DEVICE, "status": "unassigned"})
    world.dps.script = [SERVICE, SERVICE] + [unassigned] * 5
    enrol(world)
    assert calls(world) == FIRST_CALLS + ["LOOKUP"] * 5 + ["OPERATION"]


def test_an_unknown_status_means_not_yet() -> None:
    world = scripted(SERVICE, SERVICE, reply(200, {"status": "migrating"}))
    enrol(world)
    assert calls(world)[:4] == FIRST_CALLS + ["LOOKUP", "LOOKUP"]


def test_assigned_without_a_key_from_both_keeps_the_old_identity() -> None:
    def keyless(answer: "Any") -> "Any":
        return reply(200, {"operationId": "4.abc", "status": "assigned", "registrationState": {"assignedHub": HUB}})

    ended((SERVICE, SERVICE, reply(200, {"status": "assigned"}), keyless), RetryLater, "dps.assigned_without_key")


def failed(error_code: int) -> "dict[str, Any]":
    return {"registrationId": DEVICE, "status": "failed", "errorCode": error_code, "errorMessage": "it says why"}


FAILURES = (
    (400207, AskOperator, "dps.allocation_failed"),
    (400208, AskOperator, "dps.allocation_failed"),
    (400209, AskOperator, "dps.allocation_failed"),
    (400004, AskOperator, "dps.ek_mismatch"),
    (401002, AskOperator, "dps.refused"),
    (403001, AskOperator, "dps.forbidden"),
    (404201, AskOperator, "dps.not_found"),
    (409203, RetryLater, "dps.conflict"),
    (429001, RetryLater, "dps.throttled"),
    (500001, RetryLater, "dps.unavailable"),
    (13, AskOperator, "dps.refused"),
)


def test_a_failed_operation_says_who_must_act() -> None:
    for error_code, error_class, code in FAILURES:
        status = {"operationId": "4.abc", "status": "failed", "registrationState": failed(error_code)}
        world = ended((SERVICE, SERVICE, reply(200, status)), error_class, code, settings(poll=POLL_OPERATION))
        assert calls(world) == FIRST_CALLS + ["OPERATION"]


def test_a_failed_lookup_counts_after_a_lookup_that_said_not_yet() -> None:
    for error_code, error_class, code in FAILURES:
        assigning = reply(200, {"status": "assigning"})
        world = ended((SERVICE, SERVICE, assigning, reply(200, failed(error_code))), error_class, code)
        assert calls(world) == FIRST_CALLS + ["LOOKUP", "LOOKUP"]


def test_a_failed_lookup_of_an_earlier_attempt_does_not_count() -> None:
    world = scripted(SERVICE, SERVICE, reply(200, failed(400207)))
    world.dps.polls_until_assigned = 1
    assert enrol(world)[0].assigned_hub == HUB
    assert calls(world) == FIRST_CALLS + ["LOOKUP", "OPERATION", "LOOKUP", "OPERATION"]


def test_a_disabled_enrolment_asks_the_operator() -> None:
    disabled = {"status": "disabled", "registrationId": DEVICE}
    ended(
        (SERVICE, SERVICE, reply(200, {"status": "assigning"}), reply(200, disabled)),
        AskOperator,
        "dps.enrollment_disabled",
    )
    status = {"operationId": "4", "status": "disabled", "registrationState": disabled}
    ended((SERVICE, reply(200, status)), AskOperator, "dps.enrollment_disabled")
    choice = settings(poll=POLL_OPERATION)
    bare = reply(200, {"operationId": "4", "status": "disabled"})
    ended((SERVICE, SERVICE, bare), AskOperator, "dps.enrollment_disabled", choice)


def test_an_operation_that_dps_forgot_starts_over_once() -> None:
    choice = settings(poll=POLL_OPERATION)
    world = scripted(SERVICE, SERVICE, error_reply(404, 404000))
    enrol(world, choice)
    assert calls(world)[:5] == FIRST_CALLS + ["OPERATION"] + FIRST_CALLS
    forgotten = (SERVICE, SERVICE, error_reply(404, 404000))
    ended(forgotten + forgotten, RetryLater, "dps.operation_unknown", choice)


def test_a_token_refused_while_polling_starts_over_once() -> None:
    choice = settings(poll=POLL_OPERATION)
    refused = (SERVICE, SERVICE, error_reply(401, 401002))
    enrol(scripted(*refused), choice)
    ended(refused + refused, AskOperator, "dps.token_refused", choice)


def final_with(world: World, **changes: "Any") -> "Any":
    def change(answer: "Any") -> "Any":
        state = dict(world.dps.assigned())
        for name in changes:
            state[name] = changes[name]
        return reply(200, {"operationId": "4.abc", "status": "assigned", "registrationState": state})

    return change


def test_an_assignment_that_must_not_be_taken_is_refused() -> None:
    for changes in (
        {"registrationId": "press-08"},
        {"registrationId": None},
        {"assignedHub": "evil.example.net"},
        {"assignedHub": "azure-devices.net.evil.com"},
        {"assignedHub": "evilazure-devices.net"},
        {"assignedHub": "hub.azure-devices.net:8883"},
        {"assignedHub": "hub.azure-devices.net/x"},
        {"assignedHub": "user@hub.azure-devices.net"},
        {"assignedHub": "hub.azure-devices.net."},
        {"assignedHub": "-hub.azure-devices.net"},
        {"assignedHub": "a" * 250 + ".azure-devices.net"},
        {"assignedHub": ""},
        {"assignedHub": None},
        {"deviceId": "a/b"},
        {"deviceId": "a#"},
        {"deviceId": "+"},
        {"deviceId": "a b"},
        {"deviceId": "x" * 129},
        {"deviceId": "\n"},
        {"deviceId": None},
    ):
        world = World()
        world.dps.script = [SERVICE, SERVICE, final_with(world, **changes)]
        choice = settings(poll=POLL_OPERATION)
        assert_refused(lambda: enrol(world, choice), AskOperator, "dps.assignment_refused", f"{changes!r}")


def test_a_registration_id_of_another_case_is_ours() -> None:
    world = World()
    world.dps.script = [SERVICE, SERVICE, final_with(world, registrationId="PRESS-07", deviceId="It's_%ok*(1)")]
    assert enrol(world, settings(poll=POLL_OPERATION))[0].device_id == "It's_%ok*(1)"


def test_a_hub_key_of_another_kind_is_refused() -> None:
    for attributes in (0x00040440 | 0x00020000, 0x00040440 | 0x00010000, 0x00000440, 0x00040442, 0x00040450):
        world = World()
        blob = {"authenticationKey": ""}
        world.dps.script = [SERVICE, SERVICE, final_with(world, tpm=blob)]

        def damage(answer: "Any", w: World = world, b: "dict[str, str]" = blob, a: int = attributes) -> "Any":
            b["authenticationKey"] = to_base64(fake_blob(w.dps.hub_key, a))
            return answer

        world.dps.script[1] = damage
        choice = settings(poll=POLL_OPERATION)
        assert_refused(lambda: enrol(world, choice), AskOperator, "dps.key_unsuitable", hex(attributes))


def test_a_hub_key_that_comes_out_of_the_tpm_as_another_kind_is_refused() -> None:
    for attributes in (ID_KEY_ATTRIBUTES | DECRYPT, ID_KEY_ATTRIBUTES | RESTRICTED, 0):
        world = World()
        import_key = world.tpm.import_key
        imported: list[bytes] = []

        def another_kind(
            activation: bytes,
            take: "Any" = import_key,
            done: "list[bytes]" = imported,
            a: int = attributes,
        ) -> bytes:
            done.append(take(activation))
            return done[-1] if len(done) == 1 else done[-1][:6] + a.to_bytes(4, "big") + done[-1][10:]

        world.tpm.import_key = another_kind  # type: ignore[method-assign]
        assert_refused(lambda: enrol(world), AskOperator, "dps.key_unsuitable", hex(attributes))
        assert len(imported) == 2


def test_a_hub_key_that_does_not_sign_is_refused() -> None:
    world = World()
    world.refuse["Sign"] = [None, IdentityStale("tpm.key_stale", "no"), None, IdentityStale("tpm.key_stale", "no")]
    assert_refused(lambda: enrol(world), AskOperator, "tpm.key_stale")


def test_a_damaged_hub_blob_is_a_damaged_answer() -> None:
    world = World()
    world.dps.script = [SERVICE, SERVICE, final_with(world, tpm={"authenticationKey": "AAAA"})]
    assert_refused(lambda: enrol(world, settings(poll=POLL_OPERATION)), RetryLater, "dps.blob_malformed")


def test_a_custom_payload_too_large_to_store_is_left_out() -> None:
    world = World()
    world.dps.script = [SERVICE, SERVICE, final_with(world, payload={"x": "y" * 3000}, etag="e" * 500)]
    assignment, record = enrol(world, settings(poll=POLL_OPERATION))
    assert assignment.payload is None and assignment.payload_omitted and assignment.etag == ""
    assert len(record) < 2000 and without(body_of(world.dps.requests[0]), "tpm") == {"registrationId": DEVICE}


def test_a_slow_exchange_stays_within_its_budget() -> None:
    for budget_s in (1, 10, 60):
        world = World()
        world.dps.polls_until_assigned = 10**6
        assert_refused(lambda: enrol(world, settings(budget_s=budget_s)), RetryLater, "dps.still_assigning")
        assert world.uptime_s <= 100 + budget_s + 1
