"""One life: states, waits, and what is stored when."""

from dps_agent.assignment import decode
from dps_agent.effects import Http, Sleep
from dps_agent.fleet import WEEK_S
from dps_agent.lifecycle import (
    BOOT,
    CONNECTED,
    CONNECTING,
    HALTED,
    PROVISIONED,
    PROVISIONING,
    START_SPREAD_S,
    TRANSITIONS,
    WAITING,
    Lifecycle,
)
from dps_agent.progress import Progress, decode_progress, encode_progress
from dps_agent.settings import AUTO
from dps_agent.values import settings_of
from dps_hal.contracts import IDENTITY, PROGRESS
from dps_hal.errors import AskOperator, Broken, RetryLater
from dps_hal.platform import from_json, to_json
from dps_hal.tpm.keys import registration_id_from_ek
from support.world import DEVICE, HUB, NOW_S, SCOPE, FakeTpm, World, body_of, calls, catch, error_reply, reply, settings

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from dps_agent.settings import Settings


def lived(world: World, once: bool = True, force: bool = False, choice: "Settings | None" = None) -> Lifecycle:
    life = Lifecycle(choice or settings())
    world.run(life.live(once, force))
    return life


def reboot(world: World) -> World:
    world.dps.requests.clear()
    world.commits.clear()
    world.sleeps.clear()
    return world


def stored_progress(world: World) -> Progress:
    progress = decode_progress(world.store[PROGRESS])
    assert progress is not None
    return progress


def test_every_state_can_be_reached_and_left() -> None:
    states = {BOOT, PROVISIONING, WAITING, HALTED, PROVISIONED, CONNECTING, CONNECTED}
    rows = [row.split(": ") for row in TRANSITIONS.strip().split("\n")]
    assert {source for source, _, _ in rows} == {target for _, _, target in rows} == states
    assert len({(source, event) for source, event, _ in rows}) == len(rows)


def test_a_first_life_commits_the_identity_exactly_once() -> None:
    world = World()
    life = lived(world)
    assert life.state == PROVISIONED and life.committed and life.assignment is not None
    assert world.commits == [PROGRESS, IDENTITY, PROGRESS], "counted before, cleared after"
    assert decode(world.store[IDENTITY])[0] == life.assignment and stored_progress(world).attempts == 0


def test_a_second_life_asks_nobody_and_writes_nothing() -> None:
    world = World()
    lived(world)
    life = lived(reboot(world))
    assert life.state == PROVISIONED and not life.committed and HUB in life.reason
    assert world.dps.requests == [] and world.commits == []


def test_force_registers_again_and_replaces_the_identity() -> None:
    world = World()
    lived(world)
    world.dps.hub = "second.azure-devices.net"
    life = lived(reboot(world), force=True)
    assert life.committed and world.commits.count(IDENTITY) == 1
    assert decode(world.store[IDENTITY])[0].assigned_hub == "second.azure-devices.net"


def test_a_failed_forced_registration_keeps_the_old_identity() -> None:
    for script in ([error_reply(404, 404201)], [None, None, error_reply(418, 0)], [error_reply(503, 0, "x", "9999")]):
        world = World()
        lived(world)
        before = world.store[IDENTITY]
        world.dps.script = script
        life = lived(reboot(world), force=True)
        assert life.state in (WAITING, HALTED) and life.error is not None and not life.committed
        assert world.store[IDENTITY] == before
        again = lived(reboot(world))
        assert again.assignment is not None and not again.committed, "the old identity does not serve any more"


def test_refused_devices_halt_and_ask_again_about_hourly() -> None:
    world = World()
    world.dps.script = [error_reply(404, 404201)] * 5
    life = lived(world, once=False)
    assert life.state == PROVISIONED
    delays = world.slept("404201")
    assert len(delays) == 5 and all(1800 <= delay <= 5402 for delay in delays), delays


def test_an_operator_who_asks_once_does_not_wait() -> None:
    world = World()
    world.dps.script = [error_reply(404, 404201)]
    life = lived(world)
    assert life.state == HALTED and life.error is not None and life.error.code == "dps.not_found"
    assert world.sleeps == [] and life.next_attempt_in_s is not None and 1800 <= life.next_attempt_in_s <= 5402


def test_waits_between_attempts_grow_to_an_hour() -> None:
    world = World()
    world.refuse["ReadEndorsementKey"] = [RetryLater("tpm.absent", "no TPM") for _ in range(12)]
    world.random = 0.999
    assert lived(world, once=False).state == PROVISIONED
    delays = world.slept("no TPM")
    assert len(delays) == 12 and delays[0] <= 31 and delays[-1] > 3500 and max(delays) <= 3601
    assert delays == sorted(delays)


def test_a_wait_that_dps_asks_for_is_kept() -> None:
    world = World()
    world.dps.script = [error_reply(429, 429001, retry_after="7200")]
    assert lived(world, once=False).state == PROVISIONED
    assert 7200 <= world.slept("429")[0] <= 2 * 7200 + 1


def test_a_lockout_waits_as_long_as_the_tpm_says() -> None:
    world = World()
    world.refuse["Sign"] = [RetryLater("tpm.locked_out", "the TPM is locked out", 1000)]
    assert lived(world, once=False).state == PROVISIONED
    assert 1000 <= world.slept("locked out")[0] <= 1102


def test_a_failing_store_is_asked_again_and_dps_is_not() -> None:
    world = World()
    world.refuse["Commit"] = [None] + [RetryLater("store.io", "flash failed")] * 2
    life = lived(world)
    assert life.state == PROVISIONED and len(world.slept("flash failed")) == 2
    assert calls(world).count("PUT") == 1


def test_an_identity_that_cannot_be_stored_waits_in_memory() -> None:
    for refusal in (RetryLater("store.full", "no space"), AskOperator("store.read_only", "read-only")):
        world = World()
        tries = 1 if isinstance(refusal, AskOperator) else 3
        world.refuse["Commit"] = [None] + [refusal] * tries
        life = lived(world, once=False)
        assert life.state == PROVISIONED and life.committed
        assert calls(world).count("PUT") == 1, "DPS was asked again"
        assert decode(world.store[IDENTITY])[0] == life.assignment


def test_dps_is_not_asked_for_a_key_that_cannot_be_stored() -> None:
    for refusal, state in (
        (AskOperator("store.read_only", "read-only"), HALTED),
        (AskOperator("store.denied", "not yours"), HALTED),
        (RetryLater("store.full", "no space"), WAITING),
    ):
        world = World()
        world.refuse["Commit"] = [refusal] * 2
        life = lived(world)
        assert life.state == state and life.error is refusal and world.dps.requests == [], refusal.code


def test_a_failing_expendable_record_does_not_stop_a_registration() -> None:
    for code in ("store.io", "store.locked"):
        world = World()
        world.refuse["Commit"] = [RetryLater(code, "failed")]
        assert lived(world).state == PROVISIONED


def test_a_registration_that_a_crash_ends_is_counted() -> None:
    world = World()
    for crash in range(1, 5):
        generator = Lifecycle(settings()).live(True, False)
        effect = generator.send(None)
        while not isinstance(effect, Http):
            effect = generator.send(world.answer(effect))
        generator.close()
        progress = stored_progress(world)
        assert progress.code == "agent.interrupted" and not progress.halted, f"crash={crash}"
        assert progress.attempts == crash, f"crash={crash}: {progress}"


def test_what_is_shown_as_failed_is_what_failed_not_what_is_under_way() -> None:
    world = World()
    world.refuse["ReadEndorsementKey"] = [RetryLater("tpm.absent", "no TPM")]
    life = Lifecycle(settings())
    shown: list[int] = []
    answer = world.answer

    def watch(effect: "Any") -> "Any":
        failed = life.summary()["failedAttempts"]
        if shown[-1:] != [failed]:
            shown.append(failed)
        return answer(effect)

    world.answer = watch  # type: ignore[method-assign]
    world.run(life.live(False, False))
    assert shown == [0, 1, 0] and life.state == PROVISIONED, shown


def test_assigned_without_a_key_is_retried_three_times_before_the_operator_is_asked() -> None:
    keyless = reply(200, {"operationId": "4", "status": "assigned", "registrationState": {"status": "assigned"}})
    world = World()
    world.dps.script = [None, keyless] * 4
    life = Lifecycle(settings())
    states: list[str] = []
    answer = world.answer

    def watch(effect: "Any") -> "Any":
        if life.state in (WAITING, HALTED) and states[-1:] != [life.state + str(life.patience.attempts)]:
            states.append(life.state + str(life.patience.attempts))
        return answer(effect)

    world.answer = watch  # type: ignore[method-assign]
    world.run(life.live(False, False))
    assert states == ["waiting1", "waiting2", "waiting3", "halted4"], states


def test_progress_is_written_when_the_attempts_double_and_cleared_by_success() -> None:
    world = World()
    world.refuse["ReadEndorsementKey"] = [RetryLater("tpm.absent", "no TPM")] * 9
    lived(world, once=False)
    wanted = [PROGRESS] * 5 + [IDENTITY, PROGRESS]
    assert world.commits == wanted, "before attempt 1 and after it, before 2, 4 and 8, then success"
    assert stored_progress(world)[:2] == (0, 0)


def test_an_attempt_that_a_crash_ends_keeps_the_reason_of_the_one_before_it() -> None:
    world = World()
    world.random = 0.999
    world.dps.script = [error_reply(429, 429001)] * 3
    world.end_at(world.uptime_s + 70)  # in the second attempt, or in the wait after it
    world.run(Lifecycle(settings()).live(False, False))
    progress = stored_progress(world)
    assert (progress.attempts, progress.code) == (2, "dps.throttled"), progress
    assert first_sleep(world).delay_s > 30, "no patience is lost"


def test_progress_says_why_to_whoever_looks_later() -> None:
    world = World()
    world.dps.script = [error_reply(404, 404201, "no such enrolment")]
    lived(world)
    progress = stored_progress(world)
    assert progress.halted and progress.code == "dps.not_found" and "no such enrolment" in progress.message
    assert progress.attempts == 1 and progress.last_believed_s > 1800000000


def test_a_crash_loop_does_not_hammer_dps() -> None:
    for attempts, shortest_s, longest_s in ((1, 15, 31), (3, 60, 121), (50, 1800, 3601)):
        world = World()
        world.store[PROGRESS] = encode_progress(Progress(attempts, 30, 0, False, "network.dns", "no name", 0, 0))
        effect = first_sleep(world)
        assert world.dps.requests == [] and shortest_s <= effect.delay_s <= longest_s, (attempts, effect)
        assert "failed before this start" in effect.reason


def first_sleep(world: World, choice: "Settings | None" = None) -> Sleep:
    generator = Lifecycle(choice or settings()).live(False, False)
    effect = generator.send(None)
    while not isinstance(effect, Sleep):
        effect = generator.send(world.answer(effect))
    generator.close()
    return effect


def test_a_delay_that_dps_asked_for_survives_a_restart() -> None:
    now_s = 1800000100  # what the world's clock says
    for asked_s, stored_at_s, shortest_s, longest_s in (
        (7200, now_s, 7190, 7200),
        (7200, now_s - 7000, 190, 210),
        (7200, now_s - 9000, 15, 32),
        (7200, 0, 7200, 7200),
    ):
        world = World()
        world.store[PROGRESS] = encode_progress(Progress(1, asked_s, stored_at_s, False, "dps.throttled", "x", 0, 0))
        assert shortest_s <= first_sleep(world).delay_s <= longest_s, (asked_s, stored_at_s)
    world.store[PROGRESS] = encode_progress(Progress(1, 5000, now_s, True, "dps.not_found", "x", 0, 0))
    assert first_sleep(world).delay_s < 32, "an operator who restarts a refused device has changed something"


VALUES = {
    "id_scope": SCOPE,
    "registration_id": "auto",
    "attestation": "tpm",
    "endpoint": "https://global.azure-devices-provisioning.net",
    "poll": "lookup",
    "model_id": "",
    "payload": {},
    "retry.registration_budget_s": 900,
    "retry.first_contact_spread_s": 0,
    "tpm.backend": "wire",
    "tpm.tcti": "spi",
    "tpm.ek_template": "tcg-l1",
    "tpm.ek_handle": 0x81010001,
    "tpm.srk_handle": 0x81000001,
    "hub.keep_alive_s": 240,
    "hub.token_life_s": 0,
    "hub.hub_suffixes": [".azure-devices.net"],
    "hub.features": ["auto"],
    "fleet.devices": 0,
    "fleet.dps_quota_per_min": 0,
    "fleet.hub_connects_per_s": 0,
}


def test_scope_endpoint_id_and_tpm_are_what_a_wait_is_earned_under_and_nothing_else_is() -> None:
    under = settings_of(VALUES).under
    assert under == 363526507, "stored records have this number: it stays, on every runtime"
    of_the_tpm = [key for key in VALUES if key.startswith("tpm.")]
    for key in VALUES:
        value = VALUES[key]
        other: Any = value + 1 if isinstance(value, int) else {"line": 3} if key == "payload" else "other"
        counts = key in ("id_scope", "endpoint", "registration_id", "attestation") or key in of_the_tpm
        assert (settings_of(dict(VALUES, **{key: other})).under != under) == counts, key


def test_a_wait_that_other_settings_earned_does_not_outlive_them() -> None:
    world = World()
    world.dps.script = [error_reply(404, 404201, "no such enrolment")] * 5
    for _ in range(5):
        lived(world, choice=settings(under=7), once=True)
    failed = stored_progress(world)
    assert (failed.attempts, failed.under, failed.halted) == (5, 7, True)
    assert first_sleep(world, settings(under=7)).delay_s > 200, "the same settings wait on"
    assert first_sleep(world, settings(under=8)).delay_s <= START_SPREAD_S, "corrected ones do not"
    assert stored_progress(world)[0] == 1 and stored_progress(world).under == 8
    assert stored_progress(world).last_believed_s >= failed.last_believed_s, "the time is nobody's setting"


def test_a_record_that_does_not_say_what_its_wait_was_earned_under_is_believed() -> None:
    world = World()
    world.store[PROGRESS] = encode_progress(Progress(9, 30, 0, False, "network.dns", "no name", 0, 0))
    assert b"under" not in world.store[PROGRESS]
    assert first_sleep(world, settings(under=7)).delay_s > 200


def test_progress_says_under_what_only_where_something_is_waited_for() -> None:
    for attempts, delay_s, says in ((0, 0, False), (1, 0, True), (0, 9, True)):
        written = encode_progress(Progress(attempts, delay_s, NOW_S, False, "", "", 1, 7))
        assert (b"under" in written) == says
    stored = from_json(encode_progress(Progress(1, 0, NOW_S, False, "", "", 1, 7)))
    wrongs: tuple[Any, ...] = ("7", -7, True, None)
    for wrong in wrongs:
        assert decode_progress(to_json(dict(stored, under=wrong)).encode()) is None


def test_dpss_wish_to_be_left_alone_is_of_the_settings_that_it_met() -> None:
    world = World()
    world.dps.script = [error_reply(429, 429001, "slow down", "7200")]
    former = lived(world, choice=settings(under=7), once=True)
    assert former.patience.dps_not_before_s > 7000
    assert Lifecycle(settings(under=7), former=former).patience.dps_not_before_s == former.patience.dps_not_before_s
    assert Lifecycle(settings(under=8), former=former).patience.dps_not_before_s == 0


def test_a_delay_that_no_restart_would_keep_is_stored_at_once() -> None:
    world = World()
    asked = [RetryLater("tpm.locked_out", "the TPM is locked out", delay_s) for delay_s in (60, 60, 7200, 60, 7200)]
    world.refuse["ReadEndorsementKey"] = list(asked)
    stored: list[tuple[int, int]] = []
    answer = world.answer

    def watch(effect: "Any") -> "Any":
        if isinstance(effect, Sleep) and "fleet" not in effect.reason:
            stored.append(stored_progress(world)[:2])
        return answer(effect)

    world.answer = watch  # type: ignore[method-assign]
    lived(world, once=False)
    assert [attempts for attempts, _ in stored[:5]] == [1, 2, 3, 4, 5]
    assert [delay_s > 7200 for _, delay_s in stored[:5]] == [False, False, True, False, True], stored
    world = World()
    world.refuse["ReadEndorsementKey"] = [RetryLater("tpm.locked_out", "the TPM is locked out", 60)] * 60
    lived(world, once=False)
    assert len(world.commits) < 20, "delays that the back-off covers anyway are not worth a write"


def test_an_assignment_too_large_to_store_is_asked_for_anew() -> None:
    world = World()
    world.refuse["Commit"] = [None, AskOperator("store.too_large", "too large")]
    assert lived(world, once=False).state == PROVISIONED
    assert calls(world).count("PUT") == 2


def test_the_first_contacts_of_a_fleet_are_spread() -> None:
    world = World()
    world.random = 0.25
    lived(world, once=False, choice=settings(spread_s=400))
    assert world.slept("fleet") == [100.0]
    for random in (0.0, 0.9):
        world = World()
        world.random = random
        lived(world, once=False)
        assert world.slept("fleet") == [random * START_SPREAD_S], "also where nobody has set how much"
    world = World()
    assert lived(world, once=True, choice=settings(spread_s=400)).state == PROVISIONED and world.slept("fleet") == []


def test_a_restart_waits_for_the_rest_of_the_spread_and_writes_nothing_more_for_it() -> None:
    world = World()
    assert first_sleep(world, settings(spread_s=4000)).delay_s == 2000
    assert world.commits == [PROGRESS]
    world.uptime_s += 500
    for _ in range(2):  # a second restart meanwhile changes nothing
        assert 1490 <= first_sleep(world, settings(spread_s=4000)).delay_s <= 1500
    assert world.commits == [PROGRESS]
    world.uptime_s += 2000
    assert first_sleep(world, settings(spread_s=4000)).delay_s < 31, "it has passed"


def test_a_life_says_how_long_it_is_spread() -> None:
    life = Lifecycle(settings(spread_s=4000))
    generator, world = life.live(False, False), World()
    effect = generator.send(None)
    while not isinstance(effect, Sleep):
        assert not life.spreads and life.next_attempt_in_s is None
        effect = generator.send(world.answer(effect))
    assert life.spreads and life.next_attempt_in_s == effect.delay_s == 2000 and "fleet" in effect.reason
    generator.send(world.answer(effect))
    assert not life.spreads and life.next_attempt_in_s is None and life.state == PROVISIONING


def test_each_restart_that_does_not_know_the_time_waits_for_a_random_part_of_the_spread() -> None:
    world = World()
    world.believable = False
    waits = []
    for world.random in (0.5, 0.5, 0.1):
        world.sleeps.clear()
        world.end_at(world.uptime_s + 100)
        world.run(Lifecycle(settings(spread_s=4000)).live(False, False))
        waits.append([delay_s for delay_s, _ in world.sleeps])
    wanted = [[60, 1940], [60, 970], [60, 194]]  # the first minute waits for a clock
    assert waits == wanted, "a device with power for an hour a day has to register as well"


def test_a_throttled_life_leaves_dps_alone_between_its_attempts() -> None:
    world = World()
    world.random = 0.0
    world.dps.script = [error_reply(429, 429001)] * 4
    lived(world, once=False)
    assert world.slept("429") == [31, 61, 91, 121] and calls(world).count("PUT") == 5
    world = World()
    world.random = 0.0
    world.dps.script = [error_reply(429, 429001)] * 4
    assert lived(world, once=True).state == PROVISIONED, "who waits at a terminal does so for the budget"
    assert sum(world.slept("429")) < 10


def test_a_derived_registration_id_is_the_eks() -> None:
    world = World()
    derived = registration_id_from_ek(FakeTpm().endorsement_key)
    world.dps.assigned = lambda assigned=world.dps.assigned: dict(assigned(), registrationId=derived)  # type: ignore[method-assign]
    life = lived(world, choice=settings(registration_id=AUTO))
    assert life.state == PROVISIONED and body_of(world.dps.requests[0])["registrationId"] == derived


def test_a_cleared_tpm_registers_again_by_itself() -> None:
    world = World()
    lived(world)
    world.tpm.clear()
    life = lived(reboot(world))
    assert life.state == PROVISIONED and life.committed and world.commits.count(IDENTITY) == 1


def test_a_replaced_tpm_halts_and_keeps_the_record() -> None:
    world = World()
    lived(world)
    before = world.store[IDENTITY]
    world.tpm = FakeTpm(seed=5)
    for force in (False, True):
        life = lived(reboot(world), force=force)
        assert life.state == HALTED and life.error is not None and life.error.code == "tpm.ek_changed"
        assert world.store[IDENTITY] == before and world.dps.requests == []


def test_a_registration_that_is_forced_uses_the_stored_key_for_nothing() -> None:
    world = World()
    before = lived(world).assignment
    assert before is not None
    signed = []
    honest = world.tpm.sign

    def sign(wrapped_key: bytes, message: bytes) -> bytes:
        signed.append(wrapped_key)
        return honest(wrapped_key, message)

    world.tpm.sign = sign  # type: ignore[method-assign]
    lived(reboot(world))
    assert signed == [before.wrapped_key], "one that holds is used, and so its seal is asked for"
    del signed[:]
    assert lived(reboot(world), force=True).committed
    assert len(signed) == 2 and before.wrapped_key not in signed, "the challenge's key and the new one"


def test_a_damaged_record_registers_again() -> None:
    world = World()
    world.store[IDENTITY] = b"rubbish" * 20
    assert lived(world).state == PROVISIONED


def test_a_record_of_a_newer_agent_halts_and_is_not_overwritten() -> None:
    world = World()
    world.refuse["LoadRecord"] = [None, AskOperator("store.unknown_version", "version 9")]
    life = lived(world, force=True)
    assert life.state == HALTED and IDENTITY not in world.commits and DEVICE not in str(world.dps.requests)


def test_a_rolled_back_record_is_reported() -> None:
    world = World()
    assert not lived(world).rolled_back
    world.rolled_back = True
    assert lived(world).rolled_back


def test_our_own_bug_is_not_retried() -> None:
    world = World()
    bug = Broken("agent.bug", "impossible")
    world.refuse["ImportKey"] = [bug]
    assert catch(lambda: lived(world, once=False)) is bug


def test_unreadable_progress_is_forgotten() -> None:
    whole = Progress(3, 60, 1800000000, True, "dps.not_found", "x", 2, 0)
    assert decode_progress(encode_progress(whole)) == whole
    text = encode_progress(whole)
    older = text.replace(b', "connects": 2', b"").replace(b',"connects":2', b"")
    assert older != text and decode_progress(older) == Progress(*whole[:6], 0, 0), "what an earlier version wrote"
    for broken in (b"", b"{}", b"[]", text[:-1], text.replace(b"3", b"-3"), text.replace(b"60", b'"60"'), b"\xff"):
        assert decode_progress(broken) is None, broken


def test_no_delay_that_a_record_names_is_longer_than_a_week() -> None:
    for delay_s in (WEEK_S + 1, 10**9, 10**15):
        progress = decode_progress(encode_progress(Progress(1, delay_s, 0, False, "dps.throttled", "x", 0, 0)))
        assert progress is not None and progress.next_try_delay_s == WEEK_S, delay_s
    text = encode_progress(Progress(7, 0, 0, False, "", "", 0, 0))
    for number in (b"1" + 20 * b"0", b"1" + 400 * b"0"):
        assert decode_progress(text.replace(b"7", number)) is None, number


# Memory that runs out, and the store of an expendable record.


def out_of_memory(world: World, life: Lifecycle, connect: bool = False) -> None:
    """Lives until memory runs out."""
    try:
        world.run(life.live(True, False, connect))
    except MemoryError:
        return
    raise AssertionError("memory did not run out")


def test_an_error_is_known_even_where_memory_runs_out_while_it_is_stored() -> None:
    world = World()
    life = Lifecycle(settings())
    world.dps.script = [error_reply(403, 403000, "disabled")]
    world.refuse["Commit"] = [None, MemoryError()]  # type: ignore[list-item]
    out_of_memory(world, life)
    assert life.error is not None and life.error.code.startswith("dps.") and life.reason == life.error.message


def test_an_attempt_that_memory_ended_is_counted_once() -> None:
    world = World()
    life = Lifecycle(settings())
    world.refuse["Http"] = [MemoryError()]  # type: ignore[list-item]
    out_of_memory(world, life)
    assert life.patience.attempts == 1
    world.refuse["LoadRecord"] = [None, RetryLater("store.io", "failed")]
    world.run(life.live(True, False))
    assert life.state == WAITING and life.patience.attempts == 1


def test_a_connection_after_memory_ran_out_is_counted() -> None:
    world = World()
    lived(world)
    life = Lifecycle(settings())
    for connections in (1, 2):
        world.refuse["ForgetOlder"] = [MemoryError()]  # type: ignore[list-item]
        out_of_memory(world, life, True)
        stored = decode_progress(world.store[PROGRESS])
        assert life.connections == connections and stored is not None and stored.connects == connections, stored


def test_whatever_ails_the_store_of_the_expendable_record_ends_no_life() -> None:
    world = World()
    world.refuse["Commit"] = [Broken("agent.bug", "an error that nobody foresaw")]
    life = lived(world)
    assert life.state == PROVISIONED and life.committed
