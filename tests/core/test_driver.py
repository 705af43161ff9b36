"""What every runner does beside what the logic asks for: clocks, refusals, long waits, readers, the end."""

from dps_agent.driver import ClockConfirmed, Driver, Reach, Release
from dps_agent.effects import Commit, ConfirmClock, Http, ReadEndorsementKey, Sign, Sleep, Uptime, UtcNow
from dps_agent.hub_effects import ConnAck, Connect, Disconnect, NextEvent, Readers
from dps_agent.lifecycle import CONNECTED, Lifecycle
from dps_agent.progress import decode_progress
from dps_agent.sas import SasToken
from dps_hal.contracts import PROGRESS, TpmCondition
from dps_hal.errors import AskOperator, Broken, DpsError, IdentityStale, RetryLater
from support.cloud.fake_hub import NOT_AUTHORIZED
from support.world import HUB, World, catch, settings

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Generator
    from typing import Any

CONNECT = Connect(HUB, "press-07", "", SasToken("", 0, b""), 60, True)
ASK_DATE = Http("GET", "/", b"", None)


class Desk(World):
    """A world that writes down what the driver asks it for."""

    def __init__(self) -> None:
        World.__init__(self)
        self.asked: list[Any] = []
        self.return_code: int | None = None  # of each Connect, whatever the hub thinks

    def answer(self, effect: "Any") -> "Any":
        """See `World.answer`."""
        self.asked.append(effect)
        if isinstance(effect, Connect) and self.return_code is not None:
            return ConnAck(self.return_code, False)
        return World.answer(self, effect)


def asking(*effects: "Any") -> "Generator[Any, Any, list[Any]]":
    answers = []
    for effect in effects:
        answer: Any = yield effect
        answers.append(answer)
    return answers


def provisioned() -> Desk:
    """A device that was registered in an earlier life."""
    world = Desk()
    world.run(Lifecycle(settings()).live(True, False))
    world.dps.requests.clear()
    world.asked.clear()
    return world


# The clock, before a token is made.


def test_a_clock_that_somebody_keeps_costs_no_question() -> None:
    world = Desk()
    world.run(asking(ConfirmClock(HUB), ConfirmClock("")))
    assert world.asked == [UtcNow()] * 2


def test_the_hubs_certificate_confirms_a_clock_that_nobody_keeps_and_dps_is_left_alone() -> None:
    world = Desk()
    world.believable, world.vouching = False, [HUB]
    [_, now] = world.run(asking(ConfirmClock(HUB), UtcNow()))
    assert now.believable and world.reached == [HUB] and world.dps.requests == []
    assert world.asked[1:4] == [Release("TPM"), Release("DPS"), Reach(HUB)], "a board has memory for one of them"


def test_where_the_hub_says_nothing_dps_is_asked_what_time_it_is_and_hung_up_on() -> None:
    world = Desk()
    world.believable, world.vouching = False, ["DPS"]
    [_, now] = world.run(asking(ConfirmClock(HUB), UtcNow()))
    assert now.believable and world.reached == [HUB]
    assert world.asked[-4:] == [Disconnect(), ASK_DATE, Release("DPS"), UtcNow()], "it was perhaps reached all the same"


def test_without_a_hub_dps_alone_is_asked_what_time_it_is() -> None:
    world = Desk()
    world.believable, world.vouching = False, ["DPS"]
    world.run(asking(ConfirmClock("")))
    assert world.reached == [] and world.dps.requests == [ASK_DATE] and world.believable


def test_a_life_has_its_clock_confirmed_before_it_makes_a_token_and_for_each_connection() -> None:
    for vouches in (HUB, "DPS"):
        world = provisioned()
        world.believable, world.vouching = False, [vouches]
        life = Lifecycle(settings())
        world.end_at(world.uptime_s + 60)
        world.run(life.live(False, False, True))
        assert life.state == CONNECTED and life.connections == 1, vouches
        token_at = [at for at in range(len(world.asked)) if isinstance(world.asked[at], Sign)][-1]
        assert Reach(HUB) in world.asked[:token_at], "the seal is signed first, then the token"


def test_a_token_that_is_renewed_while_connected_dials_nobody() -> None:
    world = provisioned()
    life = Lifecycle(settings())

    def lose() -> None:
        world.believable = False

    world.at(world.uptime_s + 60, lose)
    world.end_at(world.uptime_s + 3300)
    world.run(life.live(False, False, True))
    assert life.state == CONNECTED and world.reached == [] and world.dps.requests == []


# A refusal.


def test_a_refused_token_makes_it_ask_dps_what_time_it_is_unless_the_clock_is_confirmed() -> None:
    for code, confirmed, asks in ((5, False, True), (4, False, True), (3, False, False), (0, False, False)):
        world = Desk()
        world.return_code, world.clock_confirmed = code, confirmed
        assert world.run(asking(CONNECT)) == [ConnAck(code, False)], code
        assert world.dps.requests == ([ASK_DATE] if asks else []), code
    world = Desk()
    world.return_code = 5
    world.run(asking(CONNECT, CONNECT))
    assert world.dps.requests == [] and world.asked.count(ClockConfirmed()) == 2, "the time may run out at any of them"


def test_a_life_whose_token_is_refused_asks_dps_what_time_it_is_and_not_to_register() -> None:
    world = provisioned()
    for hub in world.hubs.values():
        hub.script = [NOT_AUTHORIZED]
    world.clock_confirmed = False
    life = Lifecycle(settings())
    world.end_at(world.uptime_s + 120)
    world.run(life.live(False, False, True))
    assert life.connections == 1 and world.dps.requests == [ASK_DATE]


def test_a_hub_that_is_not_reached_says_nothing_about_the_clock() -> None:
    world = Desk()
    world.clock_confirmed = False
    world.hubs.clear()
    world.run(asking(CONNECT))
    assert world.dps.requests == [] and ClockConfirmed() not in world.asked


# Long waits, and the one connection.


def test_before_long_waits_tpm_and_dps_are_released() -> None:
    for wait_s, released in ((2, []), (2.5, ["TPM"]), (60, ["TPM"]), (61, ["TPM", "DPS"])):
        for wait in (Sleep(wait_s, "a test"), NextEvent(100 + wait_s)):
            world = Desk()
            world.driver = Driver()
            world.run(asking(wait))
            assert world.released == [(100, what) for what in released], wait


def test_the_tpm_is_released_and_dps_is_hung_up_on_before_the_hub_is_dialled() -> None:
    world = Desk()
    world.run(asking(CONNECT))
    assert world.asked[:3] == [Release("TPM"), Release("DPS"), CONNECT], "TLS may want the TPM"


# What a life reports, and what its session hears.


def condition(maker: str = "IBM") -> TpmCondition:
    return TpmCondition(maker, "1.2", 0, 10, 7200, 3, False, False)


def reporting(world: World, *made: "Any") -> Lifecycle:
    """A life whose EK is read as often as the TPM is asked for its condition, each time `made`."""
    life = Lifecycle(settings())
    answers = list(made)

    def ask() -> "Any":
        answer = answers.pop(0)
        if isinstance(answer, DpsError):
            raise answer
        return answer

    world.driver = Driver(life, ask)
    world.run(asking(*[ReadEndorsementKey(b"")] * len(made)))
    return life


def test_the_maker_of_a_tpm_that_works_is_reported_and_asked_for_once() -> None:
    world = Desk()
    life = reporting(world, condition("IFX"), condition("never asked"))
    assert life.about["tpmMaker"] == "IFX"


def test_a_tpm_that_does_not_say_who_made_it_is_asked_again_and_nothing_depends_on_it() -> None:
    for refusal in (RetryLater("tpm.busy", "x"), AskOperator("tpm.denied", "x"), IdentityStale("tpm.key_stale", "x")):
        assert reporting(Desk(), refusal, condition("IFX")).about["tpmMaker"] == "IFX"
    assert catch(lambda: reporting(Desk(), Broken("agent.bug", "x"))).code == "agent.bug"


def test_who_only_registers_is_not_asked_who_made_its_tpm() -> None:
    world = Desk()
    world.run(asking(ReadEndorsementKey(b"")))
    assert world.asked == [ReadEndorsementKey(b"")]


def test_the_session_hears_whether_programs_read_on_each_connection_and_when_that_changes() -> None:
    world = Desk()
    readers = [0]
    world.driver = Driver(None, None, lambda: readers[0])

    def exchange() -> "Generator[Any, Any, list[Any]]":
        heard = []
        for count in (0, 0, 2, 1, 0, None, 0, 0):
            if count is None:
                _: Any = yield CONNECT
                continue
            readers[0] = count
            event: Any = yield NextEvent(0.0)
            heard.append(event)
        return heard

    world.hubs.clear()
    assert world.run(exchange()) == [Readers(0), None, Readers(1), None, Readers(0), Readers(0), None]


def test_without_anybody_to_say_it_the_session_hears_nothing_of_readers() -> None:
    world = Desk()
    world.driver = Driver()
    assert world.run(asking(NextEvent(0.0))) == [None]


# The end.


def test_in_the_end_all_is_given_back_whatever_fails() -> None:
    for failing in range(4):
        world = Desk()
        errors: list[DpsError | None] = [None] * 3
        if failing < 3:
            errors[failing] = RetryLater("tpm.timeout", "x")
        world.refuse["Release"] = errors
        world.run(Driver().end(True))
        assert world.asked == [Release("hub"), Release("TPM"), Release("DPS")], failing


def test_a_bug_in_the_end_comes_out_when_the_rest_is_given_back() -> None:
    world = Desk()
    world.refuse["Release"] = [None, Broken("agent.bug", "x")]
    assert catch(lambda: world.run(Driver().end(False))).code == "agent.bug"
    assert len(world.asked) == 3


def test_a_life_that_is_ended_on_purpose_is_no_crash() -> None:
    for on_purpose, left in ((False, 1), (True, 0)):
        world = provisioned()
        life = Lifecycle(settings())
        world.driver = Driver(life)
        world.end_at(world.uptime_s + 60)
        world.run(life.live(False, False, True))
        world.refuse["Release"] = [RetryLater("tpm.timeout", "x")] * 3
        world.run(Driver(life).end(on_purpose))
        progress = decode_progress(world.store[PROGRESS])
        assert progress and progress.connects == left, on_purpose


def test_a_life_without_connections_has_nothing_to_store_in_the_end() -> None:
    world = provisioned()
    life = Lifecycle(settings())
    world.run(life.live(False, False))
    world.asked.clear()
    world.run(Driver(life).end(True))
    assert [effect for effect in world.asked if isinstance(effect, Commit)] == []


def test_a_record_that_cannot_be_stored_in_the_end_is_let_go() -> None:
    world = provisioned()
    life = Lifecycle(settings())
    world.end_at(world.uptime_s + 60)
    world.run(life.live(False, False, True))
    world.refuse["Commit"] = [AskOperator("store.io", "x")]
    world.run(Driver(life).end(True))
    assert world.refuse["Commit"] == []


# The exchange itself.


def test_answers_errors_and_the_result_pass_as_they_are() -> None:
    world = Desk()
    refusal = RetryLater("tpm.busy", "x")
    world.refuse["ReadEndorsementKey"] = [refusal]

    def exchange() -> "Generator[Any, Any, list[Any]]":
        heard: list[Any] = []
        try:
            _: Any = yield ReadEndorsementKey(b"")
        except DpsError as error:
            heard.append(error)
        now_s: float = yield Uptime()
        return heard + [now_s]

    assert world.run(exchange()) == [refusal, 100.0]
    assert catch(lambda: world.run(raising(refusal))) is refusal


def raising(error: DpsError) -> "Generator[Any, Any, None]":
    _: float = yield Uptime()
    raise error


def test_who_closes_the_driver_closes_the_exchange() -> None:
    ends: list[str] = []

    def exchange() -> "Generator[Any, Any, None]":
        try:
            yield Sleep(1, "a test")
        except GeneratorExit:
            ends.append("closed")
            raise

    driven = Driver().drive(exchange())
    assert driven.send(None) == Sleep(1, "a test")
    driven.close()
    assert ends == ["closed"]
