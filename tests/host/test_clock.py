"""The clock of a Linux host: who is believed, and what a verified peer's Date is good for."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import pytest

from dps_agent.effects import ConfirmClock, Http, NoReply, Reply, UtcNow
from dps_agent.host import clock
from dps_agent.host.clock import SystemClock, is_synchronised
from dps_agent.host.runner import Runner
from dps_agent.hub_effects import ConnAck, Connect
from dps_agent.sas import SasToken
from dps_agent.utc import CERTIFICATE
from dps_hal.contracts import Utc

NOW = 1_800_000_000
DAY = 86400


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets the system's time, the uptime with suspension, and whether NTP keeps the clock."""

    def set_times(now_s: float = NOW, uptime_s: float = 100.0, synchronised: bool = False) -> None:
        monkeypatch.setattr(clock.time, "time", lambda: now_s)
        monkeypatch.setattr(clock.time, "clock_gettime", {clock.time.CLOCK_BOOTTIME: uptime_s}.__getitem__)
        monkeypatch.setattr(clock, "is_synchronised", lambda: synchronised)

    return set_times


def test_whether_the_clock_is_synchronised_can_be_asked_without_privilege() -> None:
    assert is_synchronised() in (True, False)


def test_what_timesyncd_says_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr(clock, "_TIMESYNCD_SAYS_SO", str(tmp_path))
    assert is_synchronised()


@pytest.mark.parametrize(("answer", "synchronised"), [(0, True), (1, True), (5, False), (-1, False)])
def test_what_the_kernel_says_counts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any, answer: int, synchronised: bool
) -> None:
    class Kernel:
        def __init__(self, _name: None) -> None: ...

        def adjtimex(self, timex: Any) -> int:
            assert bytes(timex) == bytes(512), "it is only read"
            return answer

    monkeypatch.setattr(clock, "_TIMESYNCD_SAYS_SO", str(tmp_path / "absent"))
    monkeypatch.setattr(ctypes, "CDLL", Kernel)
    assert is_synchronised() is synchronised


def assert_unconfirmed(own: SystemClock, now_s: int = NOW) -> None:
    now = own.utc()
    assert (now.now_s, now.believable) == (now_s, False) and "nobody" in now.source


@pytest.mark.parametrize("last_believed_s", [0, NOW - 10, NOW - 390 * DAY, NOW + DAY])
def test_a_plausible_time_is_a_proposal_until_ntp_or_a_peer_vouches_for_it(times: Any, last_believed_s: int) -> None:
    times()
    assert_unconfirmed(SystemClock(last_believed_s))
    assert SystemClock(last_believed_s).may_judge() and not SystemClock().is_confirmed()
    times(synchronised=True)
    assert SystemClock(last_believed_s).utc() == Utc(NOW, True, "system")
    assert SystemClock().is_confirmed()


@pytest.mark.parametrize("date_s", [NOW, NOW - 300, NOW + 300])
def test_a_verified_peer_that_does_not_disagree_confirms_the_system_s_time(times: Any, date_s: int) -> None:
    times()
    own = SystemClock(NOW - DAY)
    own.heard(date_s)
    assert own.utc() == Utc(NOW, True, "system")
    times(NOW + 50, uptime_s=150.0)
    assert own.utc() == Utc(NOW + 50, True, "system")


def test_a_certificate_alone_is_good_for_a_token_while_nobody_moves_the_clock(times: Any) -> None:
    times(NOW + 60 * DAY)
    own = SystemClock(NOW - DAY)
    own.heard(None)
    assert own.utc() == Utc(NOW + 60 * DAY, True, CERTIFICATE) and not own.is_confirmed()
    times(NOW + 60 * DAY + 50, uptime_s=150.0)
    assert own.utc() == Utc(NOW + 60 * DAY + 50, True, CERTIFICATE)
    times(NOW + 60 * DAY + 500, uptime_s=150.0)
    assert_unconfirmed(own, NOW + 60 * DAY + 500)
    times(NOW + 60, uptime_s=160.0)  # somebody has set it right
    assert_unconfirmed(own, NOW + 60)
    own.heard(NOW + 60)
    assert own.utc() == Utc(NOW + 60, True, "system"), "no floor keeps the true time out"
    own.heard(None)
    assert own.utc() == Utc(NOW + 60, True, "system"), "a Date counts for more"


def test_a_start_right_after_another_finds_its_time(times: Any) -> None:
    times(NOW + 0.9, uptime_s=100.0)
    own = SystemClock()
    own.heard(NOW)
    times(NOW + 1.1, uptime_s=102.0)  # both are whole seconds: the sum may be one ahead
    again = SystemClock(own.utc().now_s)
    again.heard(NOW + 1)
    assert own.utc().now_s == NOW + 2 and again.utc() == Utc(NOW + 1, True, "system")


def test_a_verified_date_takes_the_place_of_a_clock_that_nobody_keeps(times: Any) -> None:
    times(NOW - 20 * DAY)
    own = SystemClock()
    own.heard(NOW)
    assert own.utc() == Utc(NOW, True, "date")
    times(NOW - 20 * DAY + 50, uptime_s=150.0)
    assert own.utc() == Utc(NOW + 50, True, "date")
    times(NOW + 7 * DAY, uptime_s=150.0)
    assert own.utc() == Utc(NOW + 50, True, "date"), "a step of the system's clock moves nothing"


def test_the_time_runs_on_while_the_machine_is_suspended(times: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock.time, "monotonic", lambda: 100.0)
    times(NOW - DAY)
    own = SystemClock()
    own.heard(NOW)
    times(NOW - DAY + 10800, uptime_s=100.0 + 10800)
    assert own.utc() == Utc(NOW + 10800, True, "date")
    assert not own.is_confirmed(), "three hours later nobody vouches for it"


def test_a_time_before_what_the_last_run_believed_is_confirmed_by_nobody(times: Any) -> None:
    times(NOW - 20 * DAY)
    own = SystemClock(NOW - DAY)
    for date_s in (None, NOW - 20 * DAY, NOW - 2 * DAY):
        own.heard(date_s)
        assert_unconfirmed(own, NOW - 20 * DAY)
    own.heard(NOW)
    assert own.utc() == Utc(NOW, True, "date")


def test_ntp_overrules_what_was_believed(times: Any) -> None:
    times(NOW, synchronised=True)
    own = SystemClock(NOW + 300 * DAY)
    own.heard(NOW + DAY)
    assert own.utc() == Utc(NOW, True, "system")
    times(NOW + 4, uptime_s=104.0)
    assert own.utc() == Utc(NOW + 4, True, "system"), "and what it said stays true without it"


def test_a_date_that_agrees_again_ends_a_correction(times: Any) -> None:
    times(NOW - DAY)
    own = SystemClock()
    own.heard(NOW)
    times(NOW + 5, uptime_s=105.0)
    own.heard(NOW + 5 - 300)
    assert own.utc() == Utc(NOW + 5, True, "system")


@pytest.mark.parametrize(("now_s", "date_s"), [(NOW, 0), (NOW, 4_200_000_000), (0, NOW), (4_200_000_000, NOW)])
def test_what_is_out_of_bounds_neither_confirms_nor_is_confirmed(times: Any, now_s: int, date_s: int) -> None:
    times(now_s, synchronised=now_s != NOW)
    own = SystemClock()
    own.heard(date_s)
    assert_unconfirmed(own, now_s)
    assert own.may_judge() is (now_s == NOW)


@pytest.mark.parametrize(("now_s", "may"), [(1_793_491_199, False), (1_793_491_200, True), (4_102_444_799, True)])
def test_certificates_are_judged_from_this_release_to_2100(times: Any, now_s: int, may: bool) -> None:
    times(now_s)
    assert SystemClock().may_judge() is may
    times(4_102_444_800)
    assert not SystemClock().may_judge()


def test_a_peer_vouches_for_an_hour(times: Any) -> None:
    times()
    own = SystemClock()
    own.heard(NOW)
    assert own.is_confirmed()
    times(uptime_s=100.0 + 3600)
    assert not own.is_confirmed() and own.utc().believable


# what the runner makes of it

CONNECT = Connect("hub.example", "press-07", "", SasToken("", 0, b""), 60, True)
GET = Http("GET", "/register", b"", None)


class Network:
    """DPS, which knows what time it is, and a hub; TPM and store are not used."""

    def __init__(self, code: int = 5, dps_answers: bool = True, hub_is_good: bool = True) -> None:
        self.asked: list[str] = []
        self._code = code
        self._dps_answers = dps_answers
        self._hub_is_good = hub_is_good

    def request(self, method: str, path: str, _body: bytes, _authorization: Any) -> Reply | NoReply:
        self.asked.append(f"{method} {path}")
        return Reply(404, {}, b"", NOW) if self._dps_answers else NoReply("connect: refused", False)

    def is_verified(self, hub: str) -> bool:
        self.asked.append(f"TLS {hub}")
        return self._hub_is_good

    def connect(self, _connect: Connect) -> ConnAck:
        self.asked.append("CONNECT")
        return ConnAck(self._code, False)

    def disconnect(self) -> None: ...

    def abort(self) -> None: ...

    def close(self) -> None: ...

    def unused(self, _effect: Any) -> None:
        raise AssertionError("of the hub only its connection is asked for")

    subscribe = publish = send_again = give_up = acknowledge = unused


def done(network: Network, *effects: Any) -> tuple[SystemClock, list[Any]]:
    own = SystemClock()

    def exchange() -> Any:
        answers = []
        for effect in effects:
            answers.append((yield effect))
        return answers

    nothing: Any = None
    one = Runner(tpm=nothing, store=nothing, connection=network, clock=own, hub=network)  # type: ignore[arg-type]
    return own, one.run(exchange())


def test_every_answer_of_dps_says_what_time_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock.time, "time", lambda: NOW - DAY)
    monkeypatch.setattr(clock, "is_synchronised", lambda: False)
    own, _ = done(Network(), GET)
    assert own.utc().source == "date"


@pytest.mark.parametrize(
    ("code", "synchronised", "asks"), [(5, False, True), (4, False, True), (3, False, False), (5, True, False)]
)
def test_a_refused_token_makes_us_ask_what_time_it_is_where_nobody_keeps_the_clock(
    monkeypatch: pytest.MonkeyPatch, code: int, synchronised: bool, asks: bool
) -> None:
    monkeypatch.setattr(clock.time, "time", lambda: NOW - DAY)
    monkeypatch.setattr(clock, "is_synchronised", lambda: synchronised)
    network = Network(code)
    own, answers = done(network, CONNECT, CONNECT)
    assert answers == [ConnAck(code, False)] * 2
    assert network.asked == (["CONNECT", "GET /", "CONNECT"] if asks else ["CONNECT", "CONNECT"])
    assert own.utc().source == ("date" if asks else "system") or not (asks or synchronised)


@pytest.mark.parametrize(
    ("dps_answers", "hub", "hub_is_good", "asked", "source"),
    [
        (True, "hub.example", True, ["TLS hub.example"], CERTIFICATE),
        (True, "hub.example", False, ["TLS hub.example", "GET /"], "date"),
        (False, "hub.example", False, ["TLS hub.example", "GET /"], ""),
        (True, "", True, ["GET /"], "date"),
        (False, "", True, ["GET /"], ""),
    ],
)
def test_before_a_token_is_made_somebody_confirms_a_clock_that_nobody_keeps(
    monkeypatch: pytest.MonkeyPatch, dps_answers: bool, hub: str, hub_is_good: bool, asked: list[str], source: str
) -> None:
    monkeypatch.setattr(clock.time, "time", lambda: NOW - DAY)
    monkeypatch.setattr(clock, "is_synchronised", lambda: False)
    network = Network(dps_answers=dps_answers, hub_is_good=hub_is_good)
    _, (_, now) = done(network, ConfirmClock(hub), UtcNow())
    assert network.asked == asked
    assert now.believable is bool(source) and (not source or now.source == source)


def test_a_certificate_alone_does_not_clear_the_clock_of_a_refused_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock.time, "time", lambda: NOW - DAY)
    monkeypatch.setattr(clock, "is_synchronised", lambda: False)
    network = Network()
    own, _ = done(network, ConfirmClock("hub.example"), CONNECT)
    assert network.asked == ["TLS hub.example", "CONNECT", "GET /"]
    assert own.utc().source == "date"


def test_a_clock_that_ntp_keeps_costs_no_question(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock.time, "time", lambda: NOW)
    monkeypatch.setattr(clock, "is_synchronised", lambda: True)
    network = Network()
    _, (_, now) = done(network, ConfirmClock("hub.example"), UtcNow())
    assert now == Utc(NOW, True, "system") and network.asked == []


def test_what_was_confirmed_once_costs_no_further_question(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock.time, "time", lambda: NOW)
    monkeypatch.setattr(clock, "is_synchronised", lambda: False)
    network = Network()
    done(network, GET, ConfirmClock("hub.example"), ConfirmClock("hub.example"))
    assert network.asked == ["GET /register"]


def test_a_clock_that_was_never_set_judges_no_certificate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock.time, "time", lambda: 1_000.0)
    network = Network()
    _, answers = done(network, GET, CONNECT, ConfirmClock("hub.example"))
    for answer in answers[:2]:
        assert isinstance(answer, NoReply)
        assert answer.reason.startswith("tls: the clock is not set")
    assert network.asked == []
