"""The Linux runner: what it answers, what it throws, what it releases, and that it always ends."""

from __future__ import annotations

import ast
import math
import os
import queue
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import dps_board
from dps_agent import driver, effects
from dps_agent.effects import (
    Commit,
    ForgetOlder,
    Http,
    ImportKey,
    LoadRecord,
    NoReply,
    Random,
    ReadEndorsementKey,
    ReadRequest,
    ReadStorageRootKey,
    Reply,
    Sign,
    Sleep,
    Uptime,
    UtcNow,
)
from dps_agent.host import hub_ways, runner, worker
from dps_agent.host.clock import SystemClock
from dps_agent.host.network.https import DpsConnection
from dps_agent.host.network.mqtt import HubConnection
from dps_agent.host.runner import Runner
from dps_agent.host.worker import bug
from dps_agent.hub_effects import (
    Acknowledge,
    ConnAck,
    Connect,
    Disconnect,
    GiveUp,
    MessageDone,
    NextEvent,
    Publish,
    RegisterAgain,
    SendAgain,
    Subscribe,
    TelemetryDone,
    Tell,
)
from dps_agent.sas import SasToken
from dps_hal.contracts import StoredRecord, Utc
from dps_hal.errors import AskOperator, Broken, DpsError, IdentityStale, RetryLater
from dps_hal.tpm.rules import COMMAND_LIMIT_S, KEY_CREATION_LIMIT_S, LEAST_LIMIT_S, RELEASE_LIMIT_S
from dps_hal.tpm.self_challenge import make_activation
from support.cloud.broker import HubPeer
from support.cloud.servers import ENDPOINT_NAME, Certificates, Peer, Server
from support.tpm.backends import open_wire
from support.tpm.swtpm import Swtpm

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

SOON_S = 30.0  # a wait that should not happen at all is shorter than this on any machine
OF_THE_PROCESS = "dps-exit"  # a thread that ends with the process, of a test that ran the service in this one
GET = Http("GET", "/", b"", None)
WHOLE = Reply(200, {}, b"{}", None)
SECRET = "c2VjcmV0"


class Hardware:
    """TPM, store and connection in one: writes down each call with its thread, and does what `does` says for it."""

    def __init__(self, **does: Callable[..., Any]) -> None:
        self.calls: list[str] = []
        self.threads: set[str] = set()
        self._does = does

    def _call(self, name: str, usual: object, *arguments: object) -> Any:
        self.calls.append(name)
        if name != "abort":
            self.threads.add(threading.current_thread().name)
        return self._does[name](*arguments) if name in self._does else usual

    def endorsement_key(self, _name: bytes) -> bytes:
        return self._call("endorsement_key", b"ek")

    def storage_root_key(self) -> bytes:
        return self._call("storage_root_key", b"srk")

    def import_key(self, activation: bytes) -> bytes:
        return self._call("import_key", b"wrapped " + activation, activation)

    def sign(self, wrapped_key: bytes, message: bytes) -> bytes:
        return self._call("sign", wrapped_key + b" signed " + message, wrapped_key, message)

    def release(self) -> None:
        return self._call("release", None)

    def load(self, record: str) -> StoredRecord | None:
        return self._call("load", StoredRecord(record.encode(), 7, False), record)

    def commit(self, record: str, payload: bytes) -> None:
        return self._call("commit", None, record, payload)

    def forget_older(self, record: str) -> None:
        return self._call("forget_older", None, record)

    def erase(self, record: str) -> None:
        raise AssertionError("no effect erases")

    def request(self, *of: Any) -> Any:
        """Of the connection and, with one argument, of the TPM."""
        return self._call("request", WHOLE if of[1:] else b"the request", *of)

    def abort(self) -> None:
        return self._call("abort", None)

    def close(self) -> None:
        return self._call("close", None)


def runner_on(hardware: Hardware, **options: Any) -> Runner:
    return Runner(tpm=hardware, store=hardware, connection=hardware, **{"clock": SystemClock(), **options})


class VirtualTime:
    """The monotonic time of runners: it passes only while `passing_for` one of them waits for its worker, in vain."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 1000.0
        for module in (runner, worker, hub_ways):
            monkeypatch.setattr(module, "time", self)

    def monotonic(self) -> float:
        return self.now_s

    def passing_for(self, one: Runner) -> Runner:
        def wait(until_s: float, _fileno: int = -1, _interest: int = 0) -> int:
            self.now_s = max(self.now_s, until_s)
            return 0

        one._worker._loop.wait = wait  # type: ignore[method-assign]
        return one


def asking(*effects: Any) -> Generator[Any, Any, list[Any]]:
    """An exchange that asks for `effects` and returns the answers."""
    answers = []
    for effect in effects:
        answers.append((yield effect))
    return answers


def catching(effect: Any) -> Generator[Any, Any, DpsError]:
    """An exchange that returns the error thrown in for `effect`."""
    try:
        yield effect
    except DpsError as error:
        return error
    raise AssertionError(f"nothing was thrown in for {effect}")


@pytest.fixture(autouse=True)
def no_thread_stays() -> Generator[None, None, None]:
    yield
    deadline_s = time.monotonic() + SOON_S
    while (
        left := [name for t in threading.enumerate() if (name := t.name).startswith("dps-") and name != OF_THE_PROCESS]
    ) and (time.monotonic() < deadline_s):
        time.sleep(0.01)
    assert not left


@pytest.fixture
def hang() -> Generator[Callable[..., None], None, None]:
    """A call that does not end before the test does."""
    over = threading.Event()
    yield lambda *_arguments: over.wait(60) and None
    over.set()


# answers


def test_each_effect_is_answered_in_order_by_what_it_names() -> None:
    hardware = Hardware()
    answers = runner_on(hardware, random=lambda: 0.25).run(
        asking(
            LoadRecord("identity"),
            ReadEndorsementKey(b""),
            ReadStorageRootKey(),
            Http("PUT", "/p", b"{}", None),
            ImportKey(b"blob"),
            Sign(b"key", b"message"),
            Random(),
            Sleep(0.01, "a moment"),
            Commit("identity", b"payload"),
        )
    )
    assert answers == [
        StoredRecord(b"identity", 7, False),
        b"ek",
        b"srk",
        WHOLE,
        b"wrapped blob",
        b"key signed message",
        0.25,
        None,
        None,
    ]
    assert hardware.calls == [
        *("load", "endorsement_key", "storage_root_key", "request", "import_key", "sign", "commit"),
        *("release", "close"),
    ]


def test_what_may_block_runs_on_one_worker_thread() -> None:
    hardware = Hardware()
    hardware.close = lambda: None  # type: ignore[method-assign]
    runner_on(hardware).run(asking(ReadEndorsementKey(b""), GET, LoadRecord("identity"), Commit("identity", b"")))
    assert hardware.threads == {"dps-worker"}


def test_time_comes_from_the_clock() -> None:
    class Noon:
        def uptime_s(self) -> float:
            return 12.0

        def utc(self) -> Utc:
            return Utc(1_800_000_000, True, "noon")

    answers = runner_on(Hardware(), clock=Noon()).run(asking(Uptime(), UtcNow()))
    assert answers == [12.0, Utc(1_800_000_000, True, "noon")]


def test_random_numbers_are_in_range_and_differ() -> None:
    drawn = runner_on(Hardware()).run(asking(*[Random()] * 100))
    assert all(0 <= number < 1 for number in drawn)
    assert len(set(drawn)) > 90


def test_one_runner_runs_many_exchanges() -> None:
    hardware = Hardware()
    one = runner_on(hardware)
    for _ in range(3):
        assert one.run(asking(ReadEndorsementKey(b""))) == [b"ek"]
    assert hardware.calls == ["endorsement_key", "release", "close"] * 3


def test_an_exchange_that_asks_for_nothing_starts_no_thread_and_opens_no_tpm() -> None:
    hardware = Hardware()
    assert runner_on(hardware).run(asking(Uptime(), Sleep(0, "nothing")))[1] is None
    assert "release" not in hardware.calls


BOARD = Path(dps_board.__file__).parent


def answered_on_a_board(file: str) -> set[str]:
    """The names of the effects in the one table of one of a board's files that answers them."""
    tables = [
        {ast.literal_eval(key) for key in node.keys if isinstance(key, ast.Constant)}
        for node in ast.walk(ast.parse((BOARD / file).read_text()))
        if isinstance(node, ast.Dict)
    ]
    [found] = [names for names in tables if names & {"Http", "Connect"}]
    return found


def test_the_tables_of_both_runners_and_no_other_place_know_every_effect() -> None:
    logic, policy = [ast.parse(Path(module.__file__).read_text()) for module in (effects, driver)]
    [every] = [
        node.value
        for node in ast.walk(logic)
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "Effect"
    ]
    assert every is not None
    known = {node.id for node in ast.walk(every) if isinstance(node, ast.Name)} - {"ConfirmClock"}  # the driver's own
    known |= {node.name for node in ast.walk(policy) if isinstance(node, ast.ClassDef)} - {"Driver"}
    hardware = Hardware()
    one = runner_on(hardware, hub=Hub(hardware))
    one.run(asking(Disconnect()))
    assert {kind.__name__ for kind in one._ways} == known | {"Erase"}, "that one is the service's own"
    on_a_board = answered_on_a_board("runner.py") | answered_on_a_board("hub.py")
    of_certificates = {"Verify", "ReadRequest", "FindIssuers"}
    assert on_a_board == known - of_certificates, "no board shows a certificate, or asks for one"


# errors


@pytest.mark.parametrize(
    ("effect", "call"),
    [
        (ReadEndorsementKey(b""), "endorsement_key"),
        (ReadStorageRootKey(), "storage_root_key"),
        (ImportKey(b""), "import_key"),
        (Sign(b"", b""), "sign"),
        (LoadRecord("identity"), "load"),
        (Commit("identity", b""), "commit"),
        (ForgetOlder("identity"), "forget_older"),
    ],
)
def test_a_failure_of_tpm_or_store_is_thrown_in_as_it_is(effect: Any, call: str) -> None:
    for kind in (RetryLater, AskOperator, IdentityStale, Broken):
        failure = kind("tpm.failed", "as told")

        def fail(*_arguments: object, failure: DpsError = failure) -> None:
            raise failure

        assert runner_on(Hardware(**{call: fail})).run(catching(effect)) is failure


def blunder(*_arguments: object) -> None:
    raise KeyError(SECRET)


@pytest.mark.parametrize("effect", [Sign(SECRET.encode(), b""), Commit("identity", b"")])
def test_a_foreign_exception_is_thrown_in_as_broken_with_its_place_and_without_its_text(effect: Any) -> None:
    error = runner_on(Hardware(sign=blunder, commit=blunder)).run(catching(effect))
    assert isinstance(error, Broken)
    assert error.code == "agent.bug"
    assert error.message.startswith("KeyError at test_runner.py:")
    assert SECRET not in repr(error)
    assert error.__cause__ is error.__context__ is None


def test_a_foreign_exception_of_a_clock_is_broken_too() -> None:
    class NoClock:
        uptime_s = utc = blunder

    for effect in (Uptime(), UtcNow()):
        error = runner_on(Hardware(), clock=NoClock()).run(catching(effect))
        assert error.code == "agent.bug"
        assert SECRET not in repr(error)


def test_an_exception_in_the_logic_comes_out_as_broken() -> None:
    def logic() -> Generator[Any, Any, None]:
        yield Uptime()
        blunder()

    places = r"test_runner\.py:\d+ < test_runner\.py:\d+ < driver\.py:\d+ < runner\.py"
    with pytest.raises(Broken, match="KeyError at " + places) as caught:
        runner_on(Hardware()).run(logic())
    assert caught.value.__suppress_context__
    assert SECRET not in str(caught.value)


def test_an_exception_of_the_connection_never_reaches_the_logic() -> None:
    reached = []

    def logic() -> Generator[Any, Any, None]:
        try:
            yield GET
        except DpsError as error:
            reached.append(error)

    with pytest.raises(Broken, match="KeyError") as caught:
        runner_on(Hardware(request=blunder)).run(logic())
    assert SECRET not in str(caught.value)
    assert reached == []


def test_what_the_exchange_raises_comes_out_after_all_was_released() -> None:
    hardware = Hardware()

    def logic() -> Generator[Any, Any, None]:
        _: bytes = yield ReadEndorsementKey(b"")
        raise AskOperator("dps.not_found", "no such enrolment")

    with pytest.raises(AskOperator, match="no such enrolment"):
        runner_on(hardware).run(logic())
    assert hardware.calls == ["endorsement_key", "release", "close"]


@pytest.mark.parametrize("garbage", [None, 7, "Uptime", ("GET", "/", b"", None)])
def test_an_effect_that_is_none_is_broken(garbage: Any) -> None:
    with pytest.raises(Broken, match="which is no effect"):
        runner_on(Hardware()).run(asking(garbage))


def test_a_bug_names_four_places_at_the_most() -> None:
    def deep(levels: int) -> None:
        if levels:
            deep(levels - 1)
        blunder()

    with pytest.raises(KeyError) as caught:
        deep(10)
    assert bug(caught.value).message.count("test_runner.py") == 4


# ends and releases


def closing_exchange(ends: list[str], *effects: Any) -> Generator[Any, Any, None]:
    try:
        yield from asking(*effects)
    except GeneratorExit:
        ends.append("closed")
        raise


def test_an_exchange_that_cannot_go_on_is_closed() -> None:
    ends: list[str] = []
    with pytest.raises(Broken):
        runner_on(Hardware()).run(closing_exchange(ends, "garbage"))
    assert ends == ["closed"]


def test_an_exchange_that_refuses_to_be_closed_does_not_keep_the_runner() -> None:
    def stubborn() -> Generator[Any, Any, None]:
        while True:
            try:
                yield "garbage"
            except GeneratorExit:
                yield "more"

    hardware = Hardware()
    with pytest.raises(Broken, match="no effect"):
        runner_on(hardware).run(stubborn())
    assert hardware.calls[-1] == "close"


@pytest.mark.parametrize(
    ("delay_s", "released", "closed"), [(1.5, False, False), (2.5, True, False), (60, True, False), (61, True, True)]
)
def test_before_long_sleeps_tpm_and_connection_are_released(
    monkeypatch, delay_s: float, released: bool, closed: bool
) -> None:
    hardware = Hardware()
    before: list[str] = []

    def on_wait(reason: str, until_uptime_s: float) -> None:
        before.extend(hardware.calls)
        assert reason == "DPS asked us to wait"
        assert until_uptime_s == pytest.approx(time.monotonic() + delay_s, abs=1)
        waiting.stop()  # the test need not sleep

    waiting = runner_on(hardware, on_wait=on_wait)
    with pytest.raises(RetryLater):
        waiting.run(asking(ReadEndorsementKey(b""), Sleep(delay_s, "DPS asked us to wait")))
    assert ("release" in before, "close" in before) == (released, closed)
    assert hardware.calls.count("release") == 1, "what is released is not released again"
    assert hardware.calls[-1] == "close"


def test_a_release_that_raises_is_broken_and_the_connection_is_closed_all_the_same() -> None:
    hardware = Hardware(release=blunder)
    with pytest.raises(Broken, match="KeyError"):
        runner_on(hardware).run(asking(ReadEndorsementKey(b"")))
    assert hardware.calls[-1] == "close"


def test_a_release_that_hangs_does_not_cost_the_result(monkeypatch, hang) -> None:
    monkeypatch.setattr(runner, "TPM_DEADLINE_S", 0.2)
    one = runner_on(Hardware(release=hang))
    assert one.run(asking(ReadEndorsementKey(b""))) == [b"ek"]
    assert one.stuck


def test_a_callback_that_fails_ends_the_exchange_and_releases() -> None:
    hardware = Hardware()
    ends: list[str] = []

    def broken_pipe(*_arguments: object) -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        runner_on(hardware, observe=broken_pipe).run(closing_exchange(ends, ReadEndorsementKey(b"")))
    assert ends == ["closed"]
    assert hardware.calls == ["endorsement_key", "release", "close"]


def test_an_interrupt_from_outside_waits_for_the_call_under_way() -> None:
    begun, ended = threading.Event(), threading.Event()

    def slow_commit(_record: str, _payload: bytes) -> None:
        begun.set()
        time.sleep(0.3)
        ended.set()

    def ctrl_c() -> None:
        if begun.is_set():
            begun.clear()
            raise KeyboardInterrupt

    hardware = Hardware(commit=slow_commit)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker, "_FEED_EVERY_S", 0.05)
        with pytest.raises(KeyboardInterrupt):
            runner_on(hardware, watchdog=ctrl_c).run(asking(Commit("identity", b"")))
    assert ended.is_set()
    assert hardware.calls == ["commit", "abort", "release", "close"]


# observers


def test_the_observer_sees_each_effect_with_its_outcome_and_duration() -> None:
    seen: list[tuple[Any, Any, float]] = []

    def slow(*_arguments: object) -> bytes:
        time.sleep(0.1)
        return b"srk"

    failure = RetryLater("store.full", "no room")

    def fail(*_arguments: object) -> None:
        raise failure

    hardware = Hardware(storage_root_key=slow, commit=fail)
    one = runner_on(hardware, observe=lambda *what: seen.append(what))
    with pytest.raises(RetryLater):
        one.run(asking(Uptime(), GET, ReadStorageRootKey(), Commit("identity", b"")))
    assert [what[:2] for what in seen] == [
        (GET, WHOLE),
        (ReadStorageRootKey(), b"srk"),
        (Commit("identity", b""), failure),
    ]
    assert 0.05 < seen[1][2] < SOON_S


# deadlines


@pytest.mark.parametrize(
    ("effect", "call", "deadline", "code"),
    [
        (ReadEndorsementKey(b""), "endorsement_key", "TPM_KEY_DEADLINE_S", "tpm.timeout"),
        (ReadStorageRootKey(), "storage_root_key", "TPM_KEY_DEADLINE_S", "tpm.timeout"),
        (ImportKey(b""), "import_key", "TPM_DEADLINE_S", "tpm.timeout"),
        (Sign(b"", b""), "sign", "TPM_DEADLINE_S", "tpm.timeout"),
        (ReadRequest(""), "request", "REQUEST_DEADLINE_S", "tpm.timeout"),
        (LoadRecord("identity"), "load", "STORE_DEADLINE_S", "store.io"),
        (Commit("identity", b""), "commit", "STORE_DEADLINE_S", "store.io"),
        (ForgetOlder("identity"), "forget_older", "STORE_DEADLINE_S", "store.io"),
    ],
)
def test_what_hangs_ends_the_exchange_at_its_own_deadline(
    monkeypatch, hang, effect: Any, call: str, deadline: str, code: str
) -> None:
    monkeypatch.setattr(runner, deadline, 0.2)
    ends: list[str] = []
    one = runner_on(Hardware(**{call: hang}))
    began_s = time.monotonic()
    with pytest.raises(RetryLater) as caught:
        one.run(closing_exchange(ends, effect))
    assert 0.15 < time.monotonic() - began_s < SOON_S
    assert (caught.value.code, ends, one.stuck) == (code, ["closed"], True)
    with pytest.raises(RetryLater, match="this process must exit"):
        one.run(closing_exchange(ends, Uptime()))


def test_the_deadlines_are_the_designed_ones() -> None:
    assert (runner.HTTP_DEADLINE_S, runner.TPM_KEY_DEADLINE_S) == (60, 180)
    assert (runner.TPM_DEADLINE_S, runner.STORE_DEADLINE_S) == (30, 30)


def test_a_tpms_own_limits_end_before_the_runners_do() -> None:
    margin_s = 3  # for a loaded machine
    for ours_s, theirs_s in (
        (runner.TPM_DEADLINE_S, COMMAND_LIMIT_S),
        (runner.TPM_KEY_DEADLINE_S, KEY_CREATION_LIMIT_S),
        (runner.REQUEST_DEADLINE_S, KEY_CREATION_LIMIT_S + 3 * COMMAND_LIMIT_S),
        (runner.TPM_DEADLINE_S, 2 * RELEASE_LIMIT_S + LEAST_LIMIT_S),
    ):
        assert ours_s >= theirs_s + LEAST_LIMIT_S + margin_s


@pytest.mark.parametrize("request_sent", [False, True])
def test_a_request_over_its_deadline_is_aborted_and_answered_as_a_timeout(monkeypatch, request_sent: bool) -> None:
    monkeypatch.setattr(runner, "HTTP_DEADLINE_S", 0.2)
    aborted = threading.Event()

    def request(*_arguments: object) -> NoReply:
        aborted.wait(60)
        return NoReply("closed: given up", request_sent)

    one = runner_on(Hardware(request=request, abort=aborted.set))
    [outcome, uptime_s] = one.run(asking(GET, Uptime()))
    assert outcome == NoReply("timeout: no whole answer within 0.2 s", request_sent)
    assert uptime_s
    assert not one.stuck


def test_an_answer_that_was_whole_when_the_abort_came_counts(monkeypatch) -> None:
    monkeypatch.setattr(runner, "HTTP_DEADLINE_S", 0.2)
    aborted = threading.Event()

    def request(*_arguments: object) -> Reply:
        aborted.wait(60)
        return WHOLE

    assert runner_on(Hardware(request=request, abort=aborted.set)).run(asking(GET)) == [WHOLE]


def test_an_abort_that_came_too_early_is_repeated(monkeypatch) -> None:
    monkeypatch.setattr(runner, "HTTP_DEADLINE_S", 0.2)
    aborts: list[None] = []
    heard = threading.Event()

    def request(*_arguments: object) -> NoReply:
        heard.wait(60)
        return NoReply("closed: given up", True)

    def abort() -> None:
        aborts.append(None)
        if len(aborts) == 3:
            heard.set()

    [outcome] = runner_on(Hardware(request=request, abort=abort)).run(asking(GET))
    assert outcome.reason.startswith("timeout")


def test_a_request_that_survives_its_abort_ends_the_exchange(monkeypatch, hang) -> None:
    monkeypatch.setattr(runner, "HTTP_DEADLINE_S", 0.2)
    one = runner_on(Hardware(request=hang))
    with pytest.raises(RetryLater) as caught:
        one.run(asking(GET))
    assert (caught.value.code, one.stuck) == ("network.timeout", True)


def test_the_watchdog_is_fed_until_the_deadline_and_no_longer(monkeypatch, hang) -> None:
    monkeypatch.setattr(runner, "TPM_DEADLINE_S", 5.5)
    virtual = VirtualTime(monkeypatch)
    fed: list[float] = []
    one = runner_on(Hardware(sign=hang), watchdog=lambda: fed.append(virtual.now_s))
    with pytest.raises(RetryLater):
        virtual.passing_for(one).run(asking(Sign(b"", b"")))
    assert fed == [1000, 1001, 1002, 1003, 1004, 1005] and virtual.now_s >= 1005.5


def test_the_watchdog_is_fed_during_a_sleep(monkeypatch) -> None:
    virtual = VirtualTime(monkeypatch)
    fed: list[float] = []
    one = runner_on(Hardware(), watchdog=lambda: fed.append(virtual.now_s))
    virtual.passing_for(one).run(asking(Sleep(3.5, "a while")))
    assert fed == [1000, 1001, 1002, 1003] and virtual.now_s == 1003.5


def test_the_watchdog_is_fed_once_a_second_at_the_most(monkeypatch) -> None:
    virtual = VirtualTime(monkeypatch)
    fed: list[float] = []
    one = runner_on(Hardware(), watchdog=lambda: fed.append(virtual.now_s))
    for virtual.now_s in (1000.0, 1000.9, 1001.0):
        one.run(asking(*[ReadEndorsementKey(b"")] * 50))
    assert fed == [1000, 1001]


# stop


def stopping_soon(one: Runner) -> threading.Timer:
    timer = threading.Timer(0.2, one.stop)
    timer.start()
    return timer


def test_stop_ends_a_sleep_at_once_and_closes_the_exchange() -> None:
    ends: list[str] = []
    one = runner_on(Hardware())
    timer = stopping_soon(one)
    began_s = time.monotonic()
    with pytest.raises(RetryLater) as caught:
        one.run(closing_exchange(ends, Sleep(3600, "an hour")))
    timer.join()
    assert time.monotonic() - began_s < SOON_S
    assert (caught.value.code, ends, one.stuck) == ("agent.interrupted", ["closed"], False)


def test_stop_aborts_a_request_at_once() -> None:
    aborted = threading.Event()

    def request(*_arguments: object) -> NoReply:
        aborted.wait(60)
        return NoReply("closed: given up", True)

    one = runner_on(Hardware(request=request, abort=aborted.set))
    timer = stopping_soon(one)
    began_s = time.monotonic()
    with pytest.raises(RetryLater, match="stopped") as caught:
        one.run(asking(GET, Uptime()))
    timer.join()
    assert time.monotonic() - began_s < SOON_S
    assert (caught.value.code, one.stuck) == ("agent.interrupted", False)


def test_stop_lets_a_commit_end_and_the_exchange_come_to_its_next_effect() -> None:
    after = []

    def slow_commit(*_arguments: object) -> None:
        time.sleep(0.6)

    def logic(*further: Any) -> Generator[Any, Any, str]:
        _: None = yield Commit("identity", b"")
        after.append("committed")
        yield from asking(*further)
        return "result"

    hardware = Hardware(commit=slow_commit)
    one = runner_on(hardware)
    timer = stopping_soon(one)
    with pytest.raises(RetryLater):
        one.run(logic(ReadEndorsementKey(b"")))
    timer.join()
    assert after == ["committed"]
    assert hardware.calls == ["commit", "release", "close"]

    one = runner_on(Hardware(commit=slow_commit))
    timer = stopping_soon(one)
    assert one.run(logic()) == "result", "what was reached is not thrown away"
    timer.join()


def test_stop_leaves_a_hanging_tpm_behind(monkeypatch, hang) -> None:
    monkeypatch.setattr(worker, "STOP_GRACE_S", 0.3)
    one = runner_on(Hardware(import_key=hang))
    timer = stopping_soon(one)
    began_s = time.monotonic()
    with pytest.raises(RetryLater) as caught:
        one.run(asking(ImportKey(b"")))
    timer.join()
    assert 0.4 < time.monotonic() - began_s < SOON_S
    assert (caught.value.code, one.stuck) == ("agent.interrupted", True)


def test_after_stop_no_effect_is_done_any_more() -> None:
    hardware = Hardware()
    one = runner_on(hardware)
    one.stop()
    for _ in range(2):
        with pytest.raises(RetryLater, match="stopped"):
            one.run(asking(Commit("identity", b"")))
    assert "commit" not in hardware.calls


# haste


def test_haste_ends_a_sleep_and_no_more_than_one() -> None:
    one = runner_on(Hardware())
    timer = threading.Timer(0.2, one.hasten)
    timer.start()
    began_s = time.monotonic()
    one.run(asking(Sleep(3600, "an hour"), Sleep(0.3, "a moment")))
    timer.join()
    assert 0.45 < time.monotonic() - began_s < SOON_S


def test_haste_that_comes_just_before_a_sleep_is_not_lost() -> None:
    one = runner_on(Hardware(), on_wait=lambda _reason, _until_s: one.hasten())
    began_s = time.monotonic()
    one.run(asking(Sleep(3600, "an hour")))
    one = runner_on(Hardware(request=lambda *_arguments: one.hasten() or WHOLE))
    one.run(asking(GET, Sleep(3600, "an hour")))
    assert time.monotonic() - began_s < SOON_S


def test_haste_hurries_nothing_but_sleeps() -> None:
    def slow(*_arguments: object) -> bytes:
        one.hasten()
        time.sleep(0.2)
        return b"ek"

    one = runner_on(Hardware(endorsement_key=slow))
    assert one.run(asking(ReadEndorsementKey(b""))) == [b"ek"]


def test_haste_from_a_signal_handler_ends_a_sleep() -> None:
    one = runner_on(Hardware())
    before = signal.signal(signal.SIGUSR1, lambda _number, _frame: one.hasten())
    timer = threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGUSR1))
    timer.start()
    try:
        began_s = time.monotonic()
        one.run(asking(Sleep(3600, "an hour")))
        assert time.monotonic() - began_s < SOON_S
    finally:
        timer.join()
        signal.signal(signal.SIGUSR1, before)


# the hub

CONNECT = Connect("hub.example", "press-07", "", SasToken("", 0, b""), 60, True)
FILTERS = (("t/#", 1),)


class Hub:
    """A hub connection that writes down each call in the list of `hardware`, and does what `does` says for it."""

    def __init__(self, hardware: Hardware, **does: Callable[..., Any]) -> None:
        self._hardware = hardware
        hardware._does |= {f"hub.{name}": call for name, call in does.items()}
        self.events: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def connect(self, effect: Connect) -> Any:
        return self._hardware._call("hub.connect", ConnAck(0, False), effect)

    def subscribe(self, filters: Any) -> Any:
        return self._hardware._call("hub.subscribe", 1, filters)

    def publish(self, topic: str, payload: bytes, qos: int) -> Any:
        return self._hardware._call("hub.publish", 2, topic, payload, qos)

    def send_again(self, packet_id: int) -> Any:
        return self._hardware._call("hub.send_again", None, packet_id)

    def give_up(self, packet_id: int) -> Any:
        return self._hardware._call("hub.give_up", None, packet_id)

    def acknowledge(self, packet_id: int) -> Any:
        return self._hardware._call("hub.acknowledge", None, packet_id)

    def disconnect(self) -> Any:
        return self._hardware._call("hub.disconnect", None)

    def close(self) -> Any:
        return self._hardware._call("hub.close", None)

    def next_event(self, until_s: float, wait: Callable[[float, int, int], int]) -> Any:
        self._hardware._call("hub.next_event", None, until_s)
        while self.events.empty() and hub_ways.time.monotonic() < until_s:
            wait(until_s, -1, 0)
        return None if self.events.empty() else self.events.get()

    def post(self, event: Any) -> bool:
        self.events.put(event)
        return True

    def take_back(self, event: Any) -> bool:
        return bool(self._hardware._call("hub.take_back", True, event))

    def abort(self) -> None:
        self._hardware.calls.append("hub.abort")
        self.events.put(None)


def soon_s() -> float:
    return time.monotonic() + SOON_S


def test_each_effect_of_the_hub_is_answered_by_what_it_names() -> None:
    hardware = Hardware()
    named: list[Any] = []
    hub = Hub(hardware, send_again=named.append, give_up=named.append)
    hub.events.put(RegisterAgain())
    told: list[Any] = []
    one = runner_on(hardware, hub=hub, tell=lambda message: told.append(message) or True)
    answers = one.run(
        asking(
            CONNECT,
            Subscribe(FILTERS),
            Publish("t", b"", 1),
            NextEvent(soon_s()),
            NextEvent(time.monotonic() + 0.05),
            Acknowledge(7),
            SendAgain(8),
            GiveUp(9),
            Tell(TelemetryDone(3, True, True)),
            ForgetOlder("identity"),
            Disconnect(),
        )
    )
    assert answers == [ConnAck(0, False), 1, 2, RegisterAgain(), None, None, None, None, True, None, None]
    assert named == [8, 9]
    assert told == [TelemetryDone(3, True, True)]
    assert hardware.calls[-4:] == ["hub.disconnect", "hub.close", "release", "close"]


def test_of_the_hub_only_what_may_block_leaves_the_main_thread() -> None:
    at: dict[str, str] = {}
    names = ("connect", "subscribe", "publish", "next_event", "acknowledge", "send_again", "give_up", "disconnect")

    def noting(name: str) -> Callable[..., Any]:
        return lambda *_: at.update({name: threading.current_thread().name})

    hub = Hub(Hardware(), **{name: noting(name) for name in names})
    effects = (
        CONNECT,
        Subscribe(FILTERS),
        Publish("t", b"", 1),
        NextEvent(0.0),
        Acknowledge(7),
        SendAgain(8),
        GiveUp(9),
    )
    runner_on(hub._hardware, hub=hub).run(asking(*effects, Disconnect()))
    main, other = threading.current_thread().name, "dps-worker"
    assert at == {name: other if name in ("connect", "disconnect") else main for name in names}


def test_without_takers_nobody_is_told() -> None:
    assert runner_on(Hardware()).run(asking(Tell(TelemetryDone(3, True, True)))) == [False]


@pytest.mark.parametrize("effect", [CONNECT, Subscribe(FILTERS), NextEvent(0.0), Disconnect()])
def test_a_runner_without_a_hub_says_so(effect: Any) -> None:
    with pytest.raises(Broken, match="hub"):
        runner_on(Hardware()).run(asking(effect))
    assert not runner_on(Hardware()).post(RegisterAgain())


@pytest.mark.parametrize(
    ("effect", "call"),
    [
        (CONNECT, "connect"),
        (Subscribe(FILTERS), "subscribe"),
        (NextEvent(0.0), "next_event"),
        (Disconnect(), "disconnect"),
    ],
)
def test_an_exception_of_the_hub_never_reaches_the_logic(effect: Any, call: str) -> None:
    reached = []

    def logic() -> Generator[Any, Any, None]:
        try:
            yield effect
        except DpsError as error:
            reached.append(error)

    hardware = Hardware()
    with pytest.raises(Broken, match="KeyError") as caught:
        runner_on(hardware, hub=Hub(hardware, **{call: blunder})).run(logic())
    assert SECRET not in str(caught.value)
    assert reached == []


def test_a_posted_event_is_taken_back_from_the_hub_that_has_it() -> None:
    hardware = Hardware()
    one = runner_on(hardware, hub=Hub(hardware))
    assert one.take_back(RegisterAgain()) and "hub.take_back" in str(hardware.calls)
    assert not runner_on(Hardware()).take_back(RegisterAgain())


def test_a_posted_event_ends_a_wait() -> None:
    hardware = Hardware()
    one = runner_on(hardware, hub=Hub(hardware))
    timer = threading.Timer(0.2, lambda: one.post(MessageDone(1)))
    timer.start()
    assert one.run(asking(NextEvent(time.monotonic() + 3600))) == [MessageDone(1)]
    timer.join()


@pytest.mark.parametrize(
    ("within_s", "released", "closed"), [(1.5, False, False), (2.5, True, False), (60, True, False), (61, True, True)]
)
def test_before_a_long_wait_for_an_event_tpm_and_connection_are_released(
    within_s: float, released: bool, closed: bool
) -> None:
    hardware = Hardware()
    hub = Hub(hardware)
    hub.events.put(RegisterAgain())
    runner_on(hardware, hub=hub).run(asking(ReadEndorsementKey(b""), NextEvent(time.monotonic() + within_s)))
    before = hardware.calls[: hardware.calls.index("hub.next_event")]
    assert ("release" in before, "close" in before) == (released, closed)


def test_the_end_of_a_wait_is_counted_by_the_runner_s_clock() -> None:
    class Late(SystemClock):
        def uptime_s(self) -> float:
            return time.monotonic() + 1e6

    hardware = Hardware()
    began_s = time.monotonic()
    assert runner_on(hardware, hub=Hub(hardware), clock=Late()).run(asking(NextEvent(began_s + 1e6 + 0.3))) == [None]
    assert 0.2 < time.monotonic() - began_s < SOON_S


def test_the_watchdog_is_fed_during_a_wait_for_an_event(monkeypatch) -> None:
    virtual = VirtualTime(monkeypatch)
    fed: list[float] = []
    hardware = Hardware()
    one = runner_on(hardware, hub=Hub(hardware), watchdog=lambda: fed.append(virtual.now_s))
    virtual.passing_for(one).run(asking(NextEvent(one._clock.uptime_s() + 3.5)))
    assert fed == [1000, 1001, 1002, 1003] and 1003.4 < virtual.now_s <= 1003.5


def test_a_connect_over_its_deadline_is_aborted_and_answered_as_a_timeout(monkeypatch) -> None:
    monkeypatch.setattr(hub_ways, "CONNECT_DEADLINE_S", 0.2)
    hardware = Hardware()
    hub = Hub(hardware, connect=lambda _effect: hub.events.get(timeout=60) or NoReply("closed: given up", True))
    assert runner_on(hardware, hub=hub).run(asking(CONNECT)) == [NoReply("timeout: no whole answer within 0.2 s", True)]
    assert "hub.abort" in hardware.calls


def test_a_hub_that_survives_its_abort_ends_the_exchange(monkeypatch, hang) -> None:
    monkeypatch.setattr(hub_ways, "CONNECT_DEADLINE_S", 0.2)
    hardware = Hardware()
    one = runner_on(hardware, hub=Hub(hardware, connect=hang))
    with pytest.raises(RetryLater) as caught:
        one.run(asking(CONNECT))
    assert (caught.value.code, one.stuck) == ("network.timeout", True)
    assert "hub.close" not in hardware.calls, "the worker may still be in it"


@pytest.mark.parametrize("effect", [NextEvent(math.inf), CONNECT], ids=["event", "connect"])
def test_stop_ends_what_waits_for_the_hub_at_once_and_leaves_the_hub(effect: Any) -> None:
    if effect is not CONNECT:
        effect = NextEvent(time.monotonic() + 3600)
    hardware = Hardware()
    hub = Hub(hardware, connect=lambda _effect: hub.events.get(timeout=60) or NoReply("closed: given up", True))
    one = runner_on(hardware, hub=hub)
    timer = stopping_soon(one)
    began_s = time.monotonic()
    with pytest.raises(RetryLater) as caught:
        one.run(asking(effect, Uptime()))
    timer.join()
    assert time.monotonic() - began_s < SOON_S
    assert (caught.value.code, one.stuck) == ("agent.interrupted", False)
    assert hardware.calls[-2:] == ["hub.close", "close"]


def test_the_observer_sees_what_is_done_at_the_hub_but_no_waits() -> None:
    seen: list[Any] = []
    hardware = Hardware()
    one = runner_on(hardware, hub=Hub(hardware), observe=lambda effect, answer, _seconds: seen.append((effect, answer)))
    one.run(asking(CONNECT, NextEvent(time.monotonic()), Disconnect()))
    assert seen == [(CONNECT, ConnAck(0, False)), (Disconnect(), None)]


# signals, in a process of their own

PROGRAM = """
import sys, time
from dps_agent.effects import *
from dps_agent.hub_effects import *
from dps_agent.host.clock import SystemClock
from dps_agent.host.network.https import DpsConnection
from dps_agent.host.network.mqtt import HubConnection
from dps_agent.host.runner import Runner
from dps_agent.sas import SasToken
from dps_hal.errors import DpsError

what, address, ca_file = sys.argv[1:]

class Tpm:
    def endorsement_key(self, _name): return b"ek"
    def sign(self, wrapped_key, message): time.sleep(60)
    def release(self): print("released", flush=True)

def on_wait(reason, until_uptime_s):
    print("ready", flush=True)

def observe(effect, outcome, seconds):
    print("ready", flush=True)
    while what == "observer":
        time.sleep(60)

def exchange():
    if what == "sleep":
        yield Sleep(60, "a while")
    if what == "http":
        print("ready", flush=True)
        yield Http("GET", "/", b"", None)
        yield Sleep(60, "a while")
    if what == "hub":
        print((yield Connect("dps.example", "d", "", SasToken("", 0, b""), 60, True)).return_code, flush=True)
        print("ready", flush=True)
        yield NextEvent(time.monotonic() + 3600)
        yield Uptime()
    if what == "connect":
        print("ready", flush=True)
        yield Connect("dps.example", "d", "", SasToken("", 0, b""), 60, True)
        yield Uptime()
    if what == "observer":
        yield ReadEndorsementKey(b"")
    if what == "tpm":
        print("ready", flush=True)
        yield Sign(b"", b"")
    if what == "logic":
        print("ready", flush=True)
        while True:
            pass

runner = Runner(tpm=Tpm(), store=None, connection=DpsConnection("https://dps.example", address), clock=SystemClock(),
                on_wait=on_wait, observe=observe if what == "observer" else None,
                hub=HubConnection(connect_to=address, ca_file=ca_file))
runner.install_signals(exit_status=77)
try:
    runner.run(exchange())
except DpsError as error:
    print(error.code, flush=True)
    sys.exit(5)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(
    ("what", "status", "says"),
    [
        ("sleep", 5, "agent.interrupted\n"),
        ("http", 5, "agent.interrupted\n"),
        ("tpm", 5, "agent.interrupted\n"),
        ("connect", 5, "agent.interrupted\n"),
        ("observer", 77, ""),
        ("logic", 77, ""),
    ],
)
def test_a_signal_ends_the_process(number: signal.Signals, what: str, status: int, says: str) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with Server(Peer.wait_until_gone, None) as silent:
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, what, silent.address, ""],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            time.sleep(0.2)
            process.send_signal(number)
            out, err = process.communicate(timeout=SOON_S)
        finally:
            process.kill()
            process.wait()
    assert (process.returncode, out, err) == (status, says, "")


def test_a_process_is_gone_within_two_seconds_of_a_signal_whatever_blocks() -> None:
    assert runner.EXIT_GRACE_S == 1.5  # the rest is for a busy machine


@pytest.mark.parametrize("reads", [True, False], ids=["listens", "is deaf"])
def test_a_signal_ends_a_connection_to_a_silent_hub(tmp_path, reads: bool) -> None:
    said: list[bytes] = []

    def behave(peer: Peer) -> None:
        hub = HubPeer(peer)
        hub.accept()
        if reads:
            said.append(type(hub.packet()).__name__)
            return
        silent.ending.wait(2 * SOON_S)

    certificates = Certificates(tmp_path)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with Server(behave, certificates.good()) as silent:
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, "hub", silent.address, certificates.ca_file],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert process.stdout is not None
            assert [process.stdout.readline(), process.stdout.readline()] == ["0\n", "ready\n"]
            time.sleep(0.2)
            process.send_signal(signal.SIGTERM)
            out, _ = process.communicate(timeout=SOON_S)
        finally:
            process.kill()
            process.wait()
    assert (process.returncode, out) == (5, "agent.interrupted\n")
    assert said == (["Disconnect"] if reads else [])


def test_hundreds_of_reconnects_with_a_token_each_leave_nothing_in_tpm_and_process(tmp_path) -> None:
    """The TPM signs for each connection, and the hub drops most of them somewhere."""
    seed = random.randrange(1 << 32)
    chance = random.Random(seed)
    certificates = Certificates(tmp_path)

    def behave(peer: Peer) -> None:
        fault = chance.randrange(5)
        if fault == 0:
            peer.receive()
            peer.reset()
            return
        hub = HubPeer(peer)
        hub.accept(5 if fault == 1 else 0)
        if fault == 2:
            hub.packet()
            peer.cut()
            return
        hub.obey()

    def exchange(wrapped_key: bytes) -> Generator[Any, Any, int]:
        accepted = 0
        for number in range(200):
            signature: bytes = yield Sign(wrapped_key, str(number).encode())
            connect = CONNECT._replace(hub=ENDPOINT_NAME, token=SasToken("r", number, signature))
            answer: ConnAck | NoReply = yield connect
            if isinstance(answer, ConnAck) and answer.return_code == 0:
                accepted += 1
                _: int | None = yield Subscribe(FILTERS)
                _ = yield Publish("t", b"", 1)
                _event: Any = yield NextEvent(
                    time.monotonic() + chance.choice((0.005, 2.1 if number % 40 == 0 else 0.01))
                )
            if number % 7 == 0:
                yield Disconnect()
            if number % 20 == 0:
                before.append((len(os.listdir("/proc/self/fd")), threading.active_count()))
        return accepted

    before: list[tuple[int, int]] = []
    with Swtpm(tmp_path / "tpm") as chip, Server(behave, certificates.good()) as server:
        tpm = open_wire(chip.tcti)
        activation = make_activation(tpm.endorsement_key(), tpm.storage_root_key(), bytes(32), random=os.urandom)
        wrapped_key = tpm.import_key(activation)
        tpm.release()
        hub = HubConnection(connect_to=server.address, ca_file=certificates.ca_file)
        connection = DpsConnection(f"https://{ENDPOINT_NAME}", server.address)
        one = Runner(tpm=tpm, store=Hardware(), connection=connection, clock=SystemClock(), hub=hub)
        assert one.run(exchange(wrapped_key)) > 50, f"{seed=}"
        assert chip.leftovers() == [], f"{seed=}"
    most = max(count for count, _ in before[:3]) + 6  # the server's threads end a little later than our connections
    assert all(count <= most for count, _ in before), f"{seed=}: {before}"
    assert all(threads <= before[1][1] + 6 for _, threads in before), f"{seed=}: {before}"


def test_a_silent_server_is_given_up_at_the_deadline_with_the_real_connection(monkeypatch) -> None:
    monkeypatch.setattr(runner, "HTTP_DEADLINE_S", 0.3)
    with Server(Peer.wait_until_gone, None) as silent:
        connection = DpsConnection(f"https://{ENDPOINT_NAME}", silent.address)
        hardware = Hardware()
        one = Runner(tpm=hardware, store=hardware, connection=connection, clock=SystemClock())
        began_s = time.monotonic()
        assert one.run(asking(GET)) == [NoReply("timeout: no whole answer within 0.3 s", False)]
        assert time.monotonic() - began_s < SOON_S
        assert not one.stuck
