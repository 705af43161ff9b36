"""Quotas of DPS and throttles of hubs, as values and as answers."""

import random
import select
import socket
from contextlib import ExitStack

import pytest

from dps_agent.effects import Reply
from dps_agent.host.network.https import DpsConnection
from dps_emulator.quotas import BUCKET, MINUTE, Gate, Quota
from dps_emulator.service import CHALLENGE, COUNTED, POLL, REGISTER, DpsService, Request, Settings
from support.cloud.emulator import EmulatorProcess


def test_by_the_minute_what_is_left_of_a_minute_is_lost() -> None:
    quota = Quota(3)
    assert [quota.take(now_s) for now_s in (0, 1, 59, 59.9, 60, 61, 62, 63)] == [True, True, True, False] * 2
    assert quota.wait_s(63) == 57
    quota = Quota(1.5)
    assert [quota.take(now_s) for now_s in (0, 1, 60, 61, 62, 120)] == [True, False, True, True, False, True]
    for per_minute in (0.3, 1.3):
        quota = Quota(per_minute)
        granted = sum(quota.take(60 * minute + second) for minute in range(100) for second in range(3))
        assert granted == pytest.approx(100 * per_minute, abs=1), "parts of a request add up"


def test_a_bucket_fills_continuously_and_holds_a_second_of_it() -> None:
    quota = Quota(120, BUCKET)
    assert [quota.take(now_s) for now_s in (0, 0, 0, 0.5, 0.5, 100, 100, 100)] == [
        True, True, False, True, False, True, True, False,
    ]  # fmt: skip
    assert quota.wait_s(100) == pytest.approx(0.5)


def test_a_clock_that_is_set_back_takes_nothing_from_a_quota() -> None:
    quota = Quota(120, BUCKET)
    assert [quota.take(now_s) for now_s in (5000, 5000, 5000)] == [True, True, False]
    assert [quota.take(now_s) for now_s in (1000, 1000.5, 1001, 1001)] == [False, True, True, False]
    assert quota.wait_s(1001) == pytest.approx(0.5)
    quota = Quota(1)
    assert [quota.take(now_s) for now_s in (5000, 1000, 1001)] == [True, True, False]


def test_a_gate_lets_in_so_many_a_second_and_queues_for_as_long_as_it_is_told() -> None:
    gate = Gate(2)
    assert [gate.wait_s(100.0) for _ in range(3)] == [0, 0, None] and gate.wait_s(100.5) == 0
    gate = Gate(2, 1.0)
    assert [gate.wait_s(100.0) for _ in range(5)] == [0, 0, 0.5, 1.0, None]


def answered(service: DpsService, method: str, with_token: bool, now: float) -> tuple[int, dict[str, str]]:
    headers = {"authorization": "x"} if with_token else {}
    response = service.answer(Request(method, "/0ne00000000/registrations/a/register", headers=headers), now)
    return response.status, dict(response.headers)


@pytest.mark.parametrize("after_s", [None, 5])
def test_requests_beyond_the_quota_are_answered_with_429(after_s: int | None) -> None:
    service = DpsService(Settings(quota_per_min=2, retry_after_429_s=after_s), {}, {}, random.Random(1).randbytes)
    statuses = [answered(service, "PUT", with_token, 60.0)[0] for with_token in (False, True, False)]
    assert 429 not in statuses[:2] and statuses[2] == 429
    status, headers = answered(service, "PUT", True, 119.0)
    assert status == 429 and headers.get("Retry-After") == (None if after_s is None else "5")
    assert answered(service, "GET", True, 119.0)[0] != 429, "a poll does not count"
    assert answered(service, "PUT", False, 120.0)[0] != 429, "the next minute"


def test_what_counts_is_chosen() -> None:
    for counts, free in (((REGISTER,), ("PUT", False)), (COUNTED, ("GET", True))):
        service = DpsService(Settings(quota_per_min=1, quota_counts=counts), {}, {}, random.Random(1).randbytes)
        assert all(answered(service, *free, 60.0)[0] != 429 for _ in range(3))
    chosen = Settings(quota_per_min=1, quota_counts=(REGISTER, CHALLENGE, POLL), quota_by=MINUTE)
    service = DpsService(chosen, {}, {}, random.Random(1).randbytes)
    assert [answered(service, "GET", True, 60.0)[0] == 429 for _ in range(2)] == [False, True]


def test_the_command_line_sets_the_quota_and_the_throttle() -> None:
    flags = ("--quota", "1/min", "--quota-by", "bucket", "--quota-retry-after", "7", "--connects", "1/s")
    with EmulatorProcess(*flags) as emulator, ExitStack() as opened:
        connection = DpsConnection(emulator.url, ca_file=str(emulator.ca_file))
        opened.callback(connection.close)
        replies: list[Reply] = []
        while len(replies) < 20 and (not replies or replies[-1].status != 429):
            reply = connection.request("PUT", "/0ne00000000/registrations/a/register", b"{}", None)
            assert isinstance(reply, Reply), reply
            replies.append(reply)
        assert replies[0].status != 429, "the first one has the quota for itself"
        assert replies[-1].status == 429 and replies[-1].headers["retry-after"] == "7", replies

        def connected() -> socket.socket:
            return opened.enter_context(socket.create_connection(("127.0.0.1", emulator.hub_port)))

        first, *others = (connected() for _ in range(30))
        dropped, _, _ = select.select(others, [], [], 60)
        assert dropped and dropped[0].recv(1) == b"", "it was let in, though so many came within a second"
        assert not select.select([first], [], [], 0)[0], "the first one was dropped"
