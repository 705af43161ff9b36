"""The clock of a Linux host: who is believed, and what a verified peer's Date is good for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from dps_agent.effects import Http, NoReply, Reply
from dps_agent.host import clock
from dps_agent.host.clock import SystemClock, is_synchronised
from dps_agent.host.runner import Runner
from dps_agent.hub_effects import ConnAck, Connect
from dps_agent.sas import SasToken
from dps_hal.contracts import Utc

NOW = 1_800_000_000
DAY = 86400


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets the system's time, the uptime, and whether NTP keeps the clock."""

    def set_times(now_s: float = NOW, uptime_s: float = 100.0, synchronised: bool = False) -> None:
        monkeypatch.setattr(clock.time, "time", lambda: now_s)
        monkeypatch.setattr(clock.time, "monotonic", lambda: uptime_s)
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
    monkeypatch.setattr(clock.ctypes, "CDLL", Kernel)
    assert is_synchronised() is synchronised


@pytest.mark.parametrize("synchronised", [False, True])
def test_a_plausible_time_is_believed_until_somebody_knows_better(times: Any, synchronised: bool) -> None:
    times(synchronised=synchronised)
    assert SystemClock().utc() == Utc(NOW, True, "system")
    assert SystemClock().is_confirmed() is synchronised


def test_a_verified_date_corrects_a_clock_that_nobody_keeps(times: Any) -> None:
    times(NOW - 20 * DAY)
    own = SystemClock()
    own.heard(NOW)
    assert own.utc() == Utc(NOW, True, "date")
    times(NOW - 20 * DAY + 50, uptime_s=150.0)
    assert own.utc() == Utc(NOW + 50, True, "date")
    times(NOW + 7, uptime_s=150.0)
    assert own.utc() == Utc(NOW + 50, True, "date"), "a step of the system's clock moves nothing"


def test_a_clock_that_ntp_keeps_is_not_corrected(times: Any) -> None:
    times(synchronised=True)
    own = SystemClock()
    own.heard(NOW + DAY)
    assert own.utc() == Utc(NOW, True, "system")


def test_ntp_ends_a_correction(times: Any) -> None:
    times(NOW - DAY)
    own = SystemClock()
    own.heard(NOW)
    times(NOW + 3, synchronised=True)
    assert own.utc() == Utc(NOW + 3, True, "system")
    times(NOW + 4)
    assert own.utc().source == "system"


def test_a_date_that_agrees_again_ends_a_correction(times: Any) -> None:
    times(NOW - DAY)
    own = SystemClock()
    own.heard(NOW)
    times(NOW)
    own.heard(NOW - 300)
    assert own.utc() == Utc(NOW, True, "system")
    own.heard(NOW - 301)
    assert own.utc() == Utc(NOW - 301, True, "date")


@pytest.mark.parametrize(("now_s", "date_s"), [(NOW, 0), (NOW, 4_200_000_000), (0, NOW), (4_200_000_000, NOW)])
def test_what_is_out_of_bounds_neither_corrects_nor_is_corrected(times: Any, now_s: int, date_s: int) -> None:
    times(now_s)
    own = SystemClock()
    own.heard(date_s)
    assert own.utc() == Utc(now_s, now_s == NOW, "system")
    assert not own.is_confirmed()


def test_a_peer_vouches_for_an_hour(times: Any) -> None:
    times()
    own = SystemClock()
    own.heard(NOW)
    assert own.is_confirmed()
    times(uptime_s=100.0 + 3600)
    assert not own.is_confirmed()


# what the runner makes of it

CONNECT = Connect("hub.example", "press-07", "", SasToken("", 0, b""), 60)
GET = Http("GET", "/register", b"", None)


class Network:
    """DPS, which knows what time it is, and a hub; TPM and store are not used."""

    def __init__(self, code: int = 5) -> None:
        self.asked: list[str] = []
        self._code = code

    def request(self, method: str, path: str, _body: bytes, _authorization: Any) -> Reply:
        self.asked.append(f"{method} {path}")
        return Reply(404, {}, b"", NOW)

    def connect(self, _connect: Connect) -> ConnAck:
        self.asked.append("CONNECT")
        return ConnAck(self._code, False)

    def abort(self) -> None: ...

    def close(self) -> None: ...


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
    assert own.utc().source == ("date" if asks else "system")


def test_a_clock_that_was_never_set_judges_no_certificate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock.time, "time", lambda: 1_000.0)
    network = Network()
    _, answers = done(network, GET, CONNECT)
    for answer in answers:
        assert isinstance(answer, NoReply)
        assert answer.reason.startswith("tls: the clock is not set")
    assert network.asked == []
