"""A life at the hub: when the device reconnects, when it registers again, and what it leaves alone."""

from dps_agent.assignment import decode
from dps_agent.backoff import HALTED_S, HUB_LEAST, HUB_LIMIT_S
from dps_agent.effects import NO_REPLY_NOT_FOUND, Http, NoReply, Sign
from dps_agent.fleet import TOKEN_LIFE_S
from dps_agent.hub_effects import Connect, Disconnect, Publish, RegisterAgain, SendTelemetry
from dps_agent.lifecycle import (
    BOOT,
    COMMITTED_SPREAD_S,
    CONNECTED,
    CONNECTING,
    HALTED,
    HUB_GONE_S,
    PROVISIONED,
    PROVISIONING,
    START_SPREAD_S,
    STEADY_S,
    WAITING,
    Lifecycle,
)
from dps_agent.patience import CONNECTS_LIMIT
from dps_agent.progress import Progress, decode_progress, encode_progress
from dps_agent.settings import KEEP_ALIVE_S
from dps_agent.utc import CERTIFICATE
from dps_hal.contracts import IDENTITY, PROGRESS
from dps_hal.errors import AskOperator, Broken, IdentityStale, RetryLater
from dps_hal.platform import from_json
from support.cloud.fake_hub import NOT_AUTHORIZED, SILENT, FakeHub
from support.share import part_of
from support.world import HUB, NOW_S, World, calls, catch, error_reply, settings

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

SECOND_HUB = "second.azure-devices.net"
DAY_S = 86400


def provisioned() -> World:
    """A device that was registered in an earlier life, and a second hub."""
    world = World()
    world.hubs[SECOND_HUB] = FakeHub(SECOND_HUB)
    world.run(Lifecycle(settings()).live(True, False))
    world.dps.requests.clear()
    world.sleeps.clear()
    world.commits.clear()
    return world


def live(world: World, seconds: float, spread_s: int = 0, life: "Lifecycle | None" = None) -> Lifecycle:
    """A life that ends after so many seconds, like a program that is killed."""
    life = life or Lifecycle(settings(spread_s=spread_s))
    world.end_at(world.uptime_s + seconds)
    world.run(life.live(False, False, True))
    return life


def log_effects(world: World) -> "list[Any]":
    """The effects from now on, in a list that grows."""
    log: list[Any] = []
    answer = world.answer

    def logged(effect: "Any") -> "Any":
        log.append(effect)
        return answer(effect)

    world.answer = logged  # type: ignore[method-assign]
    return log


def states(world: World, life: Lifecycle) -> "list[str]":
    """The states that `life` goes through from now on, in a list that grows."""
    seen: list[str] = []
    answer = world.answer

    def watch(effect: "Any") -> "Any":
        if seen[-1:] != [life.state]:
            seen.append(life.state)
        return answer(effect)

    world.answer = watch  # type: ignore[method-assign]
    return seen


# Connecting.


def test_a_first_life_registers_and_connects() -> None:
    world = World()
    life = Lifecycle(settings())
    seen = states(world, life)
    live(world, 60, life=life)
    assert seen == [BOOT, PROVISIONING, PROVISIONED, CONNECTING, CONNECTED]
    assert sum([delay_s for delay_s, reason in world.sleeps if "assign" in reason or "fleet" in reason]) < 10
    assert life.connections == 1 and life.patience.attempts == 0 and HUB in life.reason


def test_a_plain_reboot_never_asks_dps_and_writes_only_that_it_connects_and_that_this_went_well() -> None:
    world = provisioned()
    before = world.store[IDENTITY]
    for _ in range(20):
        assert live(world, STEADY_S + 60).state == CONNECTED
    assert world.dps.requests == [] and len(world.hub.connections) == 20
    assert world.commits == [PROGRESS] * 40 and world.store[IDENTITY] == before
    assert max([delay_s for delay_s, _ in world.sleeps]) <= START_SPREAD_S, "counted as failures"


def test_the_first_connection_with_a_new_identity_is_jittered() -> None:
    for random in (0.0, 0.5):
        world = provisioned()
        world.random = random
        world.at(world.uptime_s + 60, lambda world=world: world.hub.call(world.uptime_s, "reprovision", "1"))  # type: ignore[misc]
        assert live(world, 120).committed
        assert [delay_s for delay_s, reason in world.sleeps if "assigned" in reason][-1:] == (
            [random * COMMITTED_SPREAD_S] if random else []
        )


def test_the_first_connection_of_a_life_is_jittered() -> None:
    for random, spread_s, wait_s in (
        (0.5, 0, START_SPREAD_S / 2),
        (0.25, 400, START_SPREAD_S / 4),
    ):
        world = provisioned()
        world.random = random
        assert live(world, 200, spread_s).state == CONNECTED
        assert sum([delay_s for delay_s, _ in world.sleeps]) == wait_s


def test_every_reconnect_is_jittered_and_backs_off() -> None:
    firsts = []
    for random in (0.0, 0.999):
        world = provisioned()
        world.random = random
        world.hub.absent = "connect: refused"
        live(world, 3600)
        waits = world.slept("refused")
        firsts.append(waits[0])
        assert waits == sorted(waits) and HUB_LIMIT_S * HUB_LEAST <= waits[-1] <= HUB_LIMIT_S, waits
        assert len(world.hub.connections) < 130
    assert firsts[0] < 0.2 * firsts[1], "the same delay for every device"


def test_connections_that_do_not_last_back_off_and_one_that_lasts_ends_that() -> None:
    world = provisioned()
    hub = world.hub

    def kick() -> None:
        hub.drop(world.uptime_s)
        if world.uptime_s < 7200:
            world.at(world.uptime_s + 20, kick)

    world.at(world.uptime_s + 20, kick)
    world.at(10000, lambda: hub.drop(world.uptime_s))
    life = live(world, 12000)
    waits = world.slept("by the hub")
    assert max(waits) > 150 and len(waits) < 60, "two devices with one identity"
    assert waits[-1] <= 10 and life.state == CONNECTED, "a steady connection was counted as a failure"


def test_a_hub_that_serves_and_closes_again_and_again_is_not_left_alone_for_minutes() -> None:
    for serves in (True, False):
        world = provisioned()
        hub = world.hub

        def serve_and_drop(world: World = world, number: int = 1, serves: bool = serves) -> None:
            if serves:
                world.post(SendTelemetry(number, {}, b"x", 0, 1))
            world.at(world.uptime_s + 5, lambda: world.hub.drop(world.uptime_s))
            world.at(world.uptime_s + 90, lambda: serve_and_drop(world, number + 1, serves))

        hub.absent = "connect: refused"  # for longer than any back-off takes to grow
        world.at(world.uptime_s + 2 * HUB_LIMIT_S, lambda hub=hub: setattr(hub, "absent", ""))  # type: ignore[misc]
        world.at(world.uptime_s + 3 * HUB_LIMIT_S, serve_and_drop)
        live(world, 3 * HUB_LIMIT_S + 1800)
        waits = world.slept("by the hub")
        longest_s = max(waits)
        assert len(waits) > 3 and (40 <= longest_s <= 80 if serves else longest_s > 150), (serves, waits)


def test_each_connack_code_has_its_consequence() -> None:
    for code, state, dps, words in (
        (0, CONNECTED, 0, "connected to"),
        (1, HALTED, 0, "code 1"),
        (2, HALTED, 0, "code 2"),
        (3, PROVISIONED, 0, "code 3"),
        (4, PROVISIONED, 0, "code 4"),
        (5, PROVISIONED, 0, "code 5"),
        (200, PROVISIONED, 0, "code 200"),
    ):
        world = provisioned()
        world.hub.script = [code]
        life = live(world, 6)
        assert (life.state, len(world.dps.requests)) == (state, dps), code
        assert words in life.reason, f"code={code}: {life.reason}"


def test_a_hub_that_speaks_otherwise_is_asked_again_about_hourly() -> None:
    world = provisioned()
    world.hub.script = [2] * 5
    life = live(world, 12 * 3600)
    waits = world.slept("code 2")
    assert len(waits) == 5 and min(waits) >= HALTED_S / 2 and life.state == CONNECTED
    assert world.dps.requests == []


def test_a_hub_that_says_nothing_is_tried_again() -> None:
    for words in ("said nothing", "grant the subscriptions"):
        world = provisioned()
        hub = world.hub
        if words == "said nothing":
            hub.script = [SILENT] * 3
        else:
            hub.mute = True
            world.at(world.uptime_s + 300, lambda hub=hub: setattr(hub, "mute", False))  # type: ignore[misc]
        life = live(world, 1200)
        assert life.state == CONNECTED and len(world.slept(words)) >= 2, words
        assert world.dps.requests == [], words


def test_silence_is_noticed_after_one_and_a_half_keep_alives() -> None:
    world = provisioned()
    start_s = world.uptime_s
    world.at(start_s + 100, lambda: world.hub.fall_silent(world.uptime_s))
    life = live(world, 3600 * 0.5)
    assert life.connections == 2 and life.state == CONNECTED
    assert start_s + 100 + 1.5 * KEEP_ALIVE_S <= world.hub.connections[1][0] <= start_s + 120 + 1.5 * KEEP_ALIVE_S


def test_a_kicked_device_comes_back() -> None:
    world = provisioned()
    world.at(world.uptime_s + 200, lambda: world.hub.drop(world.uptime_s))
    life = live(world, 300)
    assert life.state == CONNECTED and life.connections == 2 and world.dps.requests == []


# Renewal.


def test_while_the_tpm_is_locked_out_the_old_connection_serves() -> None:
    for error in (RetryLater("tpm.locked_out", "locked out", 60), AskOperator("tpm.denied", "denied")):
        world = provisioned()
        world.random = 0.0  # the latest renewal
        start_s = world.uptime_s
        world.at(start_s + 100, lambda world=world, error=error: world.refuse.update({"Sign": [error] * 5}))  # type: ignore[misc]
        life = live(world, TOKEN_LIFE_S * 0.9)
        assert world.refuse["Sign"] == [] and life.state == CONNECTED and life.connections == 2
        parted_s = world.hub.connections[1][0] - start_s
        assert parted_s > TOKEN_LIFE_S * 0.775 + 4 * 60 and world.sleeps[1:] == [], "it was without a connection"


def test_a_lockout_longer_than_the_token_ends_with_a_reconnect() -> None:
    world = provisioned()
    world.random = 0.0  # the latest renewal
    start_s = world.uptime_s

    def lock() -> None:
        world.refuse["Sign"] = [RetryLater("tpm.locked_out", "the TPM is locked out", 600)] * 18

    world.at(start_s + 100, lock)
    life = live(world, 2.2 * TOKEN_LIFE_S)
    expired_s = world.hub.connections[0][0] + TOKEN_LIFE_S
    assert life.state == CONNECTED and life.connections == 2 and life.patience.attempts == 0
    assert world.slept("locked out") and min(world.slept("locked out")) >= 600
    assert expired_s < world.hub.connections[1][0] and world.dps.requests == []


def test_an_expired_token_is_followed_by_a_fresh_one() -> None:
    world = provisioned()
    world.utc_error_s = -1500  # the hub sees the token end before the device does
    life = live(world, 3 * TOKEN_LIFE_S)
    assert life.state == CONNECTED and life.connections > 3 and world.dps.requests == []
    assert world.slept("the token expired")


# The clock.


def test_with_an_unbelievable_clock_no_token_is_made_and_nobody_is_asked_but_what_time_it_is() -> None:
    world = provisioned()
    world.believable = False
    world.at(world.uptime_s + 3 * 3600, lambda: setattr(world, "believable", True))
    log = log_effects(world)
    life = live(world, 3 * 3600 + 600)
    made = [effect for effect in log if isinstance(effect, Sign)]
    assert life.state == CONNECTED and life.connections == 1 and len(made) == 2, "the seal, one token"
    assert world.slept("clock is not set") and len(world.hub.connections) == 1
    assert [http for http in world.dps.requests if http[:2] != ("GET", "/")] == []


def test_a_clock_lost_while_connected_keeps_the_connection_while_it_serves() -> None:
    world = provisioned()
    world.at(world.uptime_s + 100, lambda: setattr(world, "believable", False))
    world.at(world.uptime_s + 0.95 * TOKEN_LIFE_S, lambda: setattr(world, "believable", True))
    life = live(world, 2 * TOKEN_LIFE_S)
    assert life.state == CONNECTED and world.sleeps[1:] == [] and world.dps.requests == []


# When to go back to DPS.


def test_two_refusals_of_a_fresh_token_lead_back_to_dps_and_one_does_not() -> None:
    world = provisioned()
    world.hub.script = [NOT_AUTHORIZED]
    life = live(world, 60)
    assert life.state == CONNECTED and world.dps.requests == [] and not life.committed
    for code in (4, 5):
        world = provisioned()
        world.hub.script = [code, NoReply("closed: x", True), code]
        before = decode(world.store[IDENTITY])[0].wrapped_key
        life = live(world, 120)
        assert life.state == CONNECTED and life.committed and calls(world).count("PUT") == 1
        assert life.assignment is not None and life.assignment.wrapped_key != before
        assert world.hub.connections[-1][1] == 0


def test_a_token_that_was_taken_ends_the_count_of_refusals() -> None:
    world = provisioned()
    world.hub.lacks = ["methods"]  # it hangs up once it has taken the token
    world.hub.script = [5, None, 5, None, 5, None]
    world.at(world.uptime_s + 600, world.hub.lacks.clear)
    life = live(world, 1200)
    assert life.state == CONNECTED and world.dps.requests == []


def test_a_withdrawn_key_is_replaced_by_registering_again() -> None:
    world = provisioned()
    world.at(world.uptime_s + 600, world.hub.keys.clear)
    world.at(world.uptime_s + 600, lambda: world.hub.drop(world.uptime_s))
    life = live(world, 700)
    assert life.state == CONNECTED and life.committed and life.patience.attempts == 0 and life.connections == 2


def test_an_attempt_counts_until_the_hub_has_accepted_the_device() -> None:
    world = provisioned()
    world.hub.script = [5, 5]
    attempts: list[int] = []
    failed: list[int] = []
    answer = world.answer

    def watch(effect: "Any") -> "Any":
        if isinstance(effect, Connect):
            attempts.append(life.patience.attempts)
            failed.append(life.patience.failed)
        return answer(effect)

    world.answer = watch  # type: ignore[method-assign]
    life = Lifecycle(settings())
    live(world, 120, life=life)
    assert attempts == [0, 0, 1] and life.patience.attempts == 0
    assert failed == [0, 0, 0], "it is counted, not shown: nothing failed"
    progress = decode_progress(world.store[PROGRESS])
    assert progress is not None and progress.attempts == 0


def test_a_hub_that_refuses_every_key_does_not_make_the_device_hammer_dps() -> None:
    world = provisioned()
    world.hub.script = [5] * 5000
    live(world, DAY_S)
    registrations = calls(world).count("PUT")
    assert 20 <= registrations <= 60, registrations
    assert world.commits.count(IDENTITY) == registrations


def test_a_crash_loop_at_a_hub_that_refuses_every_key_does_not_hammer_dps() -> None:
    for life_s in (20, 60, 300):
        world = provisioned()
        world.hub.script = [5] * 5000
        for _ in range(6 * 3600 // life_s):
            live(world, life_s)
            world.effects.clear()
        registrations = calls(world).count("PUT")
        assert registrations <= 20, f"life_s={life_s}: {registrations} in six hours"


def test_a_crash_loop_at_a_dps_that_fails_asks_no_more_often_than_the_back_off_allows() -> None:
    for life_s in (5, 40, 200):
        world = World()
        world.dps.script = [error_reply(404, 404201)] * 1000
        for _ in range(6 * 3600 // life_s):
            live(world, life_s)
            world.effects.clear()
        assert len(world.dps.requests) <= 20, f"life_s={life_s}: {len(world.dps.requests)} in six hours"


def crashing(world: World, seconds: float) -> None:
    """Lives that end a second after the hub accepted them, each started again after 5 s."""
    end_s = world.uptime_s + seconds
    while world.uptime_s < end_s:
        life = Lifecycle(settings())
        world.random = (world.random * 7919 + 0.1234) % 1.0
        answer = world.answer

        def crash(effect: "Any", life: Lifecycle = life, answer: "Any" = answer) -> "Any":
            if life.state == CONNECTED:
                world.over = True
            return answer(effect)

        world.answer = crash  # type: ignore[method-assign]
        live(world, seconds, life=life)
        world.answer = answer  # type: ignore[method-assign]
        world.cancel_plans()
        world.effects.clear()
        world.uptime_s += 5


def test_a_crash_loop_after_each_connection_hammers_neither_hub_nor_flash() -> None:
    world = provisioned()
    crashing(world, DAY_S)
    assert len(world.hub.connections) < 1500, f"{len(world.hub.connections)} connections in a day"
    assert world.commits == [PROGRESS] * CONNECTS_LIMIT and world.dps.requests == []
    life = live(world, HUB_LIMIT_S + STEADY_S + 10)
    assert life.state == CONNECTED and world.commits == [PROGRESS] * (CONNECTS_LIMIT + 1)
    world.sleeps.clear()
    live(world, 60)
    assert world.sleeps[0][0] <= START_SPREAD_S, "a steady connection ends the count"


def test_one_restart_after_a_short_connection_waits_no_longer_than_the_first_start() -> None:
    world = provisioned()
    waits = []
    for _ in range(4):
        world.sleeps.clear()
        live(world, 60)
        waits.append(world.sleeps[0][0])
    assert waits[:2] == [START_SPREAD_S / 2] * 2 and START_SPREAD_S < waits[2] < waits[3], waits


def test_the_count_of_connections_leaves_the_rest_of_progress_as_it_is() -> None:
    world = provisioned()
    before = Progress(3, 7200, NOW_S, False, "dps.throttled", "wait", 0, 0)
    world.store[PROGRESS] = encode_progress(before)
    crashing(world, 15)
    after = decode_progress(world.store[PROGRESS])
    assert after is not None and after.connects > 0
    world.store[PROGRESS] = encode_progress(before)
    world.hub.absent = "connect: refused"
    live(world, 20000)
    after = decode_progress(world.store[PROGRESS])
    assert after is not None and after[:6] == before[:6] and after.connects >= 4, after


def test_a_hub_that_is_away_for_days_costs_a_few_writes() -> None:
    world = provisioned()
    world.hub.absent = "connect: refused"
    live(world, 3 * DAY_S)
    assert 1 <= len(world.commits) <= CONNECTS_LIMIT and IDENTITY not in world.commits


def test_two_devices_with_one_identity_do_not_keep_each_other_busy() -> None:
    for seed in range(5):
        world = provisioned()
        world.random = seed / 5

        def connect_other(world: World = world) -> None:
            """The other device is connected; this one ends that, and the other one comes back after its delay."""
            world.random = (world.random * 7919 + 0.1234) % 1.0
            world.hub.drop(world.uptime_s)
            world.at(world.uptime_s + HUB_LIMIT_S * (1 + world.random) / 2, connect_other)

        world.at(world.uptime_s + 20, connect_other)
        life = live(world, DAY_S)
        assert life.connections < 360, f"seed={seed}: {life.connections} connections of this one in a day"
        assert min(world.slept("by the hub")[6:]) >= HUB_LIMIT_S / 2, f"seed={seed}: the other one's patience was none"


def test_a_refusal_under_a_clock_that_nobody_confirms_says_nothing() -> None:
    for wrong in ("believable", "utc_error_s"):
        world = provisioned()
        world.hub.script = [5] * 6
        answer = world.answer

        def doubt(effect: "Any", world: World = world, wrong: str = wrong, answer: "Any" = answer) -> "Any":
            if isinstance(effect, Connect):  # the token was made, the refusal comes
                setattr(world, wrong, False if wrong == "believable" else world.utc_error_s + 4000)
                world.at(world.uptime_s + 1, lambda: setattr(world, "believable", True))
            return answer(effect)

        world.answer = doubt  # type: ignore[method-assign]
        live(world, 2000)
        assert len(world.hub.connections) >= 6 and world.dps.requests == [], wrong


def test_dps_asked_for_patience_and_the_method_reprovision_says_so() -> None:
    world = provisioned()
    start_s = world.uptime_s
    world.dps.script = [error_reply(429, 429001, retry_after="7200")]
    world.at(start_s + 60, lambda: world.hub.call(world.uptime_s, "reprovision", "1"))
    world.at(start_s + 600, lambda: world.hub.call(world.uptime_s, "reprovision", "2"))
    live(world, 1000)
    assert world.hub.answer_to("2") == ["429"] and len(world.dps.requests) == 1
    refusal = from_json(world.hub.answers[-1][2])
    assert 6000 < refusal["retryAfterS"] <= 7201 - 540
    assert len(world.hub.connections) == 2, "the refused wish cost a connection"


def test_what_dps_asked_for_is_known_after_a_restart_and_what_we_chose_is_no_wish_of_its() -> None:
    now_s = NOW_S + 100
    for code, patience in (("dps.throttled", True), ("network.dns", False), ("tpm.absent", False)):
        world = World()
        world.store[PROGRESS] = encode_progress(Progress(1, 3000, now_s, False, code, "x", 0, 0))
        life = Lifecycle(settings())
        live(world, 1, life=life)
        assert (life.patience.dps_not_before_s > world.uptime_s + 2000) is patience, code


def test_dps_asked_for_patience_and_neither_a_restart_nor_a_good_hub_ends_that() -> None:
    world = provisioned()
    start_s = world.uptime_s
    world.dps.script = [error_reply(429, 429001, retry_after="7200")]
    world.at(start_s + 60, lambda: world.hub.call(world.uptime_s, "reprovision", "1"))
    life = live(world, 1200)
    assert life.state == CONNECTED and life.patience.attempts == 0
    world.at(world.uptime_s + 60, lambda: world.hub.call(world.uptime_s, "reprovision", "2"))
    life = live(world, 300)
    assert life.patience.attempts == 0 and world.hub.answer_to("2") == ["429"] and len(world.dps.requests) == 1
    live(world, 7200)
    world.at(world.uptime_s + 60, lambda: world.hub.call(world.uptime_s, "reprovision", "3"))
    live(world, 300)
    assert world.hub.answer_to("3") == ["202"] and world.dps.registrations > 1


def test_dps_asked_for_patience_and_no_lost_record_and_no_other_settings_end_that() -> None:
    for lost, changed in ((True, {}), (False, {"id_scope": "0ne00999999"})):
        world = provisioned()
        world.dps.script = [error_reply(429, 429001, retry_after="7200")]
        before = Lifecycle(settings())
        world.at(world.uptime_s + 60, lambda world=world: world.hub.call(world.uptime_s, "reprovision", "1"))
        live(world, 600, life=before)
        if lost:
            world.store.clear()
        life = Lifecycle(settings(**changed), former=before)
        seen: list[object] = []
        world.at(
            world.uptime_s + 5000,
            lambda world=world, life=life, seen=seen: seen.extend((life.state, life.reason, len(world.dps.requests))),
        )
        live(world, 8000, life=life)
        assert seen == [WAITING, "DPS asked for patience", 1], changed
        assert life.state == CONNECTED, changed


def test_a_time_that_only_a_certificate_vouches_for_is_no_floor_of_the_next_start() -> None:
    for source, stored in (("date", True), (CERTIFICATE, False)):
        world = World()
        world.utc_source = source
        world.dps.script = [error_reply(503, 0)]
        live(world, 10)
        progress = decode_progress(world.store[PROGRESS])
        assert progress and bool(progress.last_believed_s) is stored, source


def test_dps_asked_for_patience_survives_a_restart_at_a_hub_that_refuses() -> None:
    world = provisioned()
    world.hub.script = [5] * 100
    world.dps.script = [error_reply(429, 429001, retry_after="7200")]
    live(world, 300)
    assert len(world.dps.requests) == 1
    live(world, 6000)
    assert len(world.dps.requests) == 1, "the service had asked for two hours"
    live(world, 7200)
    assert world.dps.registrations > 1, "it never asked again"


def test_dps_asked_for_patience_and_a_hub_that_refuses_later_changes_nothing() -> None:
    world = provisioned()
    start_s = world.uptime_s
    world.dps.script = [error_reply(429, 429001, retry_after="7200")]
    world.at(start_s + 60, lambda: world.hub.call(world.uptime_s, "reprovision", "1"))
    world.at(start_s + 600, world.hub.keys.clear)
    world.at(start_s + 600, lambda: world.hub.drop(world.uptime_s))
    life = live(world, 7000)
    assert life.state == WAITING and len(world.dps.requests) == 1


def test_what_was_under_way_is_answered_before_a_long_wait() -> None:
    world = provisioned()
    start_s = world.uptime_s
    world.hub.mute_pubacks = True
    world.at(start_s + 60, lambda: world.post(SendTelemetry(1, {}, b"x", 0, 1)))
    world.at(start_s + 61, lambda: world.hub.drop(world.uptime_s))
    world.hub.script = [None, 2]
    life = live(world, 90)
    assert life.state == HALTED and world.program.done == {1: False}


def test_a_hub_that_is_gone_for_half_an_hour_leads_back_to_dps() -> None:
    for reason in ("not_found: no such name", NO_REPLY_NOT_FOUND):
        world = provisioned()
        world.hub.absent = reason
        world.dps.hub = SECOND_HUB
        start_s = world.uptime_s
        life = live(world, HUB_GONE_S)
        assert world.dps.requests == [] and life.state == PROVISIONED, reason
        life = live(world, HUB_GONE_S + 400)
        assert life.state == CONNECTED and world.hubs[SECOND_HUB].connections, reason
        assert life.assignment is not None and life.assignment.assigned_hub == SECOND_HUB
        assert world.uptime_s - start_s < 2 * HUB_GONE_S + 500


def test_a_fleet_whose_hub_is_gone_comes_to_dps_spread() -> None:
    for random, spread_s in ((0.5, 7200), (0.25, 7200)):
        world = provisioned()
        world.random = random
        world.hub.absent = NO_REPLY_NOT_FOUND
        start_s = world.uptime_s
        first_s: list[float] = []
        world.dps.script = [lambda reply, world=world, first_s=first_s: first_s.append(world.uptime_s) or reply]  # type: ignore[misc]
        live(world, HUB_GONE_S + spread_s + 600, spread_s)
        waited_s = first_s[0] - start_s - HUB_GONE_S - random * spread_s
        assert 0 <= waited_s <= HUB_LIMIT_S + 1, f"random={random}: {waited_s}"


def first_asked(world: World) -> "list[float]":
    """The times at which DPS is asked from now on, in a list that grows."""
    times_s: list[float] = []
    answer = world.dps.answer

    def noted(http: Http) -> "Any":
        times_s.append(world.uptime_s)
        return answer(http)

    world.dps.answer = noted  # type: ignore[method-assign]
    return times_s


def test_a_hub_that_is_gone_is_waited_for_with_one_spread_whatever_dps_answers() -> None:
    for status in (503, 429):
        world = provisioned()
        world.hub.absent = NO_REPLY_NOT_FOUND
        asked_s = first_asked(world)
        world.dps.script = [error_reply(status, status * 1000 + 1)] * 2
        live(world, 3 * 36000, 36000)
        assert asked_s[2] - asked_s[0] < 2 * (HUB_GONE_S + 2 * HUB_LIMIT_S), (status, asked_s)


def test_a_hub_that_cannot_be_reached_is_not_gone() -> None:
    for reason in ("connect: refused", "tls: expired", "timeout", "closed", "protocol: HTTP", "dns: try again"):
        world = provisioned()
        world.hub.absent = reason
        live(world, 6 * 3600)
        assert world.dps.requests == [], reason
    world = provisioned()
    world.hub.script = [NoReply("not_found: x", False), NoReply("connect: y", False)] * 100
    live(world, 6 * 3600)
    assert world.dps.requests == [], "it was found in between"


def fleet_after_an_outage(reason: str, lasts_s: int, dps_too: bool, spread_s: int = 0) -> "Iterator[World]":
    """A fleet that finds neither hub nor (where that is so) DPS for a while, two hours later; one after the other."""
    for seed in part_of(range(60)):
        world = provisioned()
        world.random = seed / 60
        start_s = world.uptime_s
        out: list[bool] = []
        answer = world.answer

        def offline(effect: "Any", world: World = world, out: "list[bool]" = out, answer: "Any" = answer) -> "Any":
            world.random = (world.random * 7919 + 0.1234) % 1.0
            if isinstance(effect, Http) and out and dps_too:
                world.pass_to(world.uptime_s + 0.5)
                return NoReply(reason, False)
            return answer(effect)

        def begin(world: World = world, out: "list[bool]" = out) -> None:
            out.append(True)
            world.hub.absent = reason
            world.hub.drop(world.uptime_s)

        def end(world: World = world, out: "list[bool]" = out) -> None:
            out.clear()
            world.hub.absent = ""

        world.answer = offline  # type: ignore[method-assign]
        world.at(start_s + 700, begin)
        world.at(start_s + 700 + lasts_s + 10 * seed, end)
        life = live(world, 700 + lasts_s + 7200, spread_s)
        assert life.state == CONNECTED, (seed, life.reason)
        yield world


def test_no_device_registers_again_after_its_network_had_no_names_for_a_while() -> None:
    for reason in ("dns: try again", "not_found: no such name"):
        for lasts_s, spread_s in ((2700, 0), (2700, 3600), (12 * 3600, 0)):
            for world in fleet_after_an_outage(reason, lasts_s, True, spread_s):
                assert world.dps.requests == [] and IDENTITY not in world.commits, (reason, lasts_s, spread_s)
                assert world.commits.count(PROGRESS) < 20, world.commits
    for world in fleet_after_an_outage("dns: try again", 2700, False):
        assert world.dps.requests == [], "a resolver that does not answer says nothing about the hub"
    asked = [bool(world.dps.requests) for world in fleet_after_an_outage("not_found: no such name", 2700, False)]
    assert sum(asked) > 0.8 * len(asked) > 0, "a hub that is really gone"


def test_a_registration_for_a_gone_hub_ends_at_once_where_dps_is_not_reached() -> None:
    world = provisioned()
    start_s = world.uptime_s
    world.hub.absent = "not_found: no such name"
    world.dps.script = [NoReply("dns: try again", False), NoReply("timeout", True), error_reply(503, 0)] * 100
    life = Lifecycle(settings())
    seen: list[tuple[str, float]] = []
    answer = world.answer

    def watch(effect: "Any") -> "Any":
        seen.append((life.state, world.uptime_s))
        return answer(effect)

    world.answer = watch  # type: ignore[method-assign]
    live(world, 6 * 3600, life=life)
    registering = [at_s for state, at_s in seen if state == PROVISIONING]
    assert 5 <= len(world.dps.requests) <= 12, "once in half an hour"
    assert registering and start_s + HUB_GONE_S <= registering[0]
    for place in range(1, len(registering)):
        apart_s = registering[place] - registering[place - 1]
        assert apart_s < 1 or apart_s > HUB_GONE_S, "it stayed away from its hub"


def test_a_gone_hub_and_a_dps_that_fails_are_asked_in_turn() -> None:
    world = provisioned()
    world.hub.absent = "not_found: no such name"
    world.dps.script = [error_reply(429, 429001, retry_after="7200")] * 1000
    life = live(world, DAY_S)
    assert 8 <= len(world.dps.requests) <= 12, "half an hour, then two hours each time"
    assert life.state == PROVISIONED and life.registration_error is not None
    world.hub.absent = ""
    life = live(world, 400)
    assert life.state == CONNECTED and life.patience.attempts == 0 and not life.committed


def test_the_method_reprovision_answers_then_disconnects_then_registers() -> None:
    world = provisioned()
    world.dps.hub = SECOND_HUB
    world.at(world.uptime_s + 60, lambda: world.hub.call(world.uptime_s, "reprovision", "1"))
    log = log_effects(world)
    life = live(world, 120)
    assert world.hub.answer_to("1") == ["202"]
    answered = next(
        place for place, effect in enumerate(log) if isinstance(effect, Publish) and "/res/202/" in effect.topic
    )
    left = next(place for place, effect in enumerate(log) if isinstance(effect, Disconnect))
    asked = next(place for place, effect in enumerate(log) if isinstance(effect, Http))
    assert answered < left < asked
    assert life.state == CONNECTED and world.hubs[SECOND_HUB].serves(world.uptime_s - 1) is False
    assert [code for _, code in world.hubs[SECOND_HUB].connections] == [0] and life.patience.attempts == 0


def test_a_reprovision_that_fails_goes_back_to_the_old_identity_and_says_why() -> None:
    for failure, code in (
        (error_reply(429, 429001, retry_after="9999"), "dps.throttled"),
        (error_reply(404, 404201), "dps.not_found"),
    ):
        world = provisioned()
        before = world.store[IDENTITY]
        world.dps.script = [failure]
        world.at(world.uptime_s + 60, lambda world=world: world.hub.call(world.uptime_s, "reprovision", "1"))  # type: ignore[misc]
        world.at(world.uptime_s + 100, lambda world=world: world.hub.call(world.uptime_s, "status", "2"))  # type: ignore[misc]
        life = live(world, 120)
        assert life.state == CONNECTED and world.store[IDENTITY] == before and len(world.hub.connections) == 2, code
        assert from_json(world.hub.answers[-1][2])["registrationCode"] == code
        assert max([delay_s for delay_s, _ in world.sleeps]) <= 10, "the old identity waited for DPS"


def test_a_refused_identity_is_gone_back_to_once_for_each_wait_for_dps() -> None:
    world = provisioned()
    world.hub.script = [5] * 5
    world.dps.script = [error_reply(404, 404201)] * 100
    life = live(world, 5 * HALTED_S)
    assert life.state == CONNECTED and life.patience.attempts == 0, "the hub takes it again, whatever DPS says"
    assert [code for _, code in world.hub.connections][:6] == [5, 5, 5, 5, 5, 0]
    assert len(world.dps.requests) == 4, "one for one"


def test_a_hub_that_refused_while_dps_is_out_of_reach_gets_its_device_back() -> None:
    world = provisioned()
    world.hub.script = [5, 5]
    world.dps.script = [NoReply("connect: unreachable", False)] * 10000
    life = live(world, 2 * DAY_S)
    assert life.state == CONNECTED and [code for _, code in world.hub.connections][:3] == [5, 5, 0]


def test_a_hub_that_refuses_for_days_and_a_dps_out_of_reach_are_asked_in_turn() -> None:
    world = provisioned()
    world.hub.script = [5] * 10000
    world.dps.script = [NoReply("connect: unreachable", False)] * 10000
    live(world, 2 * DAY_S)
    assert 24 < len(world.hub.connections) < 120, len(world.hub.connections)
    assert len(world.dps.requests) > len(world.hub.connections)
    assert world.commits.count(PROGRESS) < 20


def test_a_refusal_of_long_ago_does_not_keep_the_device_from_its_newer_identity() -> None:
    world = provisioned()
    world.hub.script = [5, 5]
    start_s = world.uptime_s

    def refuse() -> None:
        world.dps.script = [error_reply(404, 404201)]
        world.hub.call(world.uptime_s, "reprovision", "1")

    world.at(start_s + 300, refuse)
    life = live(world, 400)
    assert life.state == CONNECTED and len(world.hub.connections) == 4 and life.registration_error is not None


def test_a_program_can_ask_to_register_again() -> None:
    world = provisioned()
    world.at(world.uptime_s + 60, lambda: world.post(RegisterAgain()))
    life = live(world, 120)
    assert life.state == CONNECTED and life.committed and calls(world).count("PUT") == 1


def test_asking_to_register_ends_every_wait() -> None:
    for state in (PROVISIONED, HALTED, WAITING):
        world = provisioned()
        life = Lifecycle(settings())
        if state == PROVISIONED:
            world.hub.absent = "connect: refused"
        elif state == HALTED:
            world.hub.script = [2]
        else:
            world.refuse["LoadRecord"] = [None, RetryLater("store.io", "failed", 3600)]

        def ask(world: World = world, life: Lifecycle = life, state: str = state) -> None:
            assert life.state == state
            world.hub.absent = ""
            life.ask_to_register()
            world.hurry = True

        world.at(world.uptime_s + 1000 if state == PROVISIONED else world.uptime_s + 100, ask)
        live(world, 1200, life=life)
        assert life.state == CONNECTED and life.committed and calls(world).count("PUT") == 1, state


def test_an_identity_that_no_longer_holds_is_replaced() -> None:
    world = provisioned()
    world.at(world.uptime_s + 100, world.tpm.clear)
    life = live(world, TOKEN_LIFE_S)
    assert life.state == CONNECTED and life.committed and len(world.hub.connections) == 2


def test_a_key_that_fails_now_and_then_is_no_busy_loop() -> None:
    world = provisioned()
    world.random = 0.0
    world.refuse["Sign"] = [None, IdentityStale("tpm.key_stale", "stale")] * 1000
    life = live(world, 3600)
    assert world.effects["Sign"] < 200 and life.state != CONNECTED


def test_the_older_identity_is_forgotten_once_and_a_failed_registration_forgets_nothing() -> None:
    world = provisioned()
    world.dps.hub = SECOND_HUB
    world.at(world.uptime_s + 60, lambda: world.hub.call(world.uptime_s, "reprovision", "1"))
    live(world, 3 * TOKEN_LIFE_S)
    assert [record for _, record in world.forgotten] == [IDENTITY, IDENTITY], "one for each identity that was accepted"
    world = provisioned()
    world.hub.absent = "connect: refused"
    live(world, 3600)
    assert world.forgotten == []


def test_a_fleet_that_lost_its_hub_does_not_come_to_dps_all_at_once() -> None:
    world = provisioned()
    world.hub.script = [5, 5]
    life = live(world, 600, spread_s=4000)
    assert life.state == CONNECTED and world.dps.requests == [], "the hub refused it for a moment"
    for random in (0.25, 0.5):
        world = provisioned()
        world.random = random
        asked_s = first_asked(world)
        start_s = world.uptime_s
        world.hub.script = [5] * 100
        live(world, 2 * HUB_LIMIT_S + 4000, spread_s=4000)
        assert 0 <= asked_s[0] - start_s - random * 4000 <= HUB_LIMIT_S + 60, "each at its time"
        assert len(world.hub.connections) > 4, "the hub is asked on meanwhile"
    world = provisioned()
    world.at(world.uptime_s + 300, lambda: world.hub.call(world.uptime_s, "reprovision", "1"))
    live(world, 600, spread_s=400)
    assert world.slept("fleet") == [] and calls(world).count("PUT") == 1, "who asks does not wait"


def test_an_identity_that_cannot_be_stored_is_stored_later_and_dps_is_not_asked_again() -> None:
    world = provisioned()
    world.dps.hub = SECOND_HUB
    world.refuse["Commit"] = [None] + [RetryLater("store.io", "flash failed")] * 3
    world.at(world.uptime_s + 60, lambda: world.hub.call(world.uptime_s, "reprovision", "1"))
    life = live(world, 600)
    assert life.state == CONNECTED and calls(world).count("PUT") == 1
    assert len(world.hub.connections) == 1 and len(world.hubs[SECOND_HUB].connections) == 1


def test_our_own_bug_ends_the_life() -> None:
    for moment in (1, 100):
        world = provisioned()
        bug = Broken("agent.bug", "impossible")
        world.at(world.uptime_s + moment, lambda world=world, bug=bug: world.refuse.update({"Sign": [bug]}))  # type: ignore[misc]
        assert catch(lambda world=world: live(world, DAY_S)) is bug  # type: ignore[misc]


def test_every_wait_has_a_reason_and_an_end() -> None:
    world = provisioned()
    world.hub.script = [5, 3, SILENT, NoReply("tls: x", False), 2, 5, 5, 5, 5]
    world.dps.script = [error_reply(503, 0)] * 3
    live(world, DAY_S)
    for delay_s, reason in world.sleeps:
        assert reason and 0 <= delay_s <= 1.5 * HALTED_S + 1, (delay_s, reason)
