"""Quotas of DPS and throttles of hubs, as values and as answers."""

import random
import select
import socket
import time
from contextlib import ExitStack

import pytest

from dps_agent.effects import Reply
from dps_agent.host.network.https import DpsConnection
from dps_emulator.cli import _parser, _settings
from dps_emulator.control_socket import ControlError
from dps_emulator.hub import HubError
from dps_emulator.limits import LIMITS
from dps_emulator.quotas import BUCKET, MINUTE, Gate, Quota
from dps_emulator.service import CHALLENGE, COUNTED, POLL, REGISTER, DpsService, Request, Settings
from emulator.paho_device import HUB_SUBSCRIPTIONS, PahoDevice
from support.cloud.emulator import EmulatorInThread, EmulatorProcess
from support.cloud.memory import PlainRegistrations


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


def test_what_is_above_a_hub_s_rate_passes_for_a_minute_then_waits_then_is_refused() -> None:
    gate = LIMITS["azure-s1"].gates()["twin-patch"]
    waits = [gate.wait_s(1000.0) for _ in range(6001)]
    assert waits[:3000] == [0] * 3000 and waits[6000] is None
    assert waits[3000] == pytest.approx(1 / 50) and waits[5999] == pytest.approx(60)


def test_a_device_polls_five_times_in_ten_seconds_and_the_others_do_not_mind() -> None:
    settings = Settings(limits=LIMITS["azure-s1"])
    service = DpsService(settings, {}, PlainRegistrations(), random.Random(1).randbytes)

    def status(name: str, now: float) -> tuple[int, str | None]:
        request = Request("GET", f"/0ne00000000/registrations/{name}/operations/4.x.y", "api-version=1")
        answer = service.answer(request, now)
        return answer.status, dict(answer.headers).get("Retry-After")

    assert [status("a", 100.0 + at)[0] for at in range(5)] == [401] * 5
    assert status("a", 105.5) == (429, "5") and status("A", 105.5)[0] == 429 and status("b", 105.5)[0] == 401
    assert status("a", 110.0)[0] == 401 and status("a", 110.5) == (429, "1")
    status("c", 500.0)
    assert list(service._polls) == ["c"], "whoever has gone quiet is forgotten"


def test_the_limits_are_met_on_the_wire() -> None:
    few = LIMITS["azure-s1"]._replace(twin_reads_per_s=1 / 60, telemetry_per_s=1 / 60, messages_to_devices_per_s=1 / 60)
    few = few._replace(method_bytes_per_s=4096 / 60)
    with EmulatorInThread(Settings(limits=few, connects_per_s=100)) as emulator:
        entrance = emulator._server._hub_server.gate
        assert entrance and [entrance.wait_s(1000.0) for _ in range(6001)] == [0] * 6000 + [None]
        entrance._next_s = 0.0
        device = emulator.add_device("press-07")
        gates = emulator._server.hubs.all()[0]._gates
        for gate in gates.values():
            gate.queue_s = 0
        with PahoDevice(emulator, device) as client:
            assert client.connect() == 0
            client.subscribe(*HUB_SUBSCRIPTIONS)
            for expected in ("$iothub/twin/res/200/", "$iothub/twin/res/429/"):
                assert client.publish("$iothub/twin/GET/?$rid=1")
                assert client.next_message().topic.startswith(expected)
            emulator.send_c2d("press-07", b"")
            with pytest.raises(ControlError, match="throttled") as refused:
                emulator.send_c2d("press-07", b"")
            assert refused.value.code == 429001
            hub = emulator._server.hubs.all()[0]
            hub.invoke("press-07", "m", b"", lambda answer: None, time.time())
            for size in (0, 4096):
                with pytest.raises(HubError, match="throttled: too many direct methods"):
                    hub.invoke("press-07", "m", b"x" * size, lambda answer: None, time.time())
            assert client.send(b"1") and not client.send(b"2") and client.has_ended()
        assert len(emulator.telemetry()) == 1
        gates["twin-get"].queue_s, gates["twin-get"].per_s = 10.0, 4.0
        with PahoDevice(emulator, device) as client:
            assert client.connect() == 0
            client.subscribe(*HUB_SUBSCRIPTIONS)
            for _ in range(300):
                gates["twin-get"].wait_s(0)
            assert client.publish("$iothub/twin/GET/?$rid=2")
            assert client.next_message().topic.startswith("$iothub/twin/res/200/?$rid=2")


def test_the_flag_gives_the_documented_limits_and_explicit_ones_go_first() -> None:
    def chosen(*flags: str) -> Settings:
        return _settings(_parser().parse_args(["serve", *flags]))

    limited = chosen("--limits", "azure-s1", "--hub", "a.net", "--hub", "b.net")
    assert (limited.quota_per_min, limited.connects_per_s, limited.limits) == (1000, 200, LIMITS["azure-s1"])
    limited = chosen("--limits", "azure-s1", "--quota", "7", "--connects", "9")
    assert (limited.quota_per_min, limited.connects_per_s, chosen().limits) == (7, 9, None)


def answered(service: DpsService, method: str, with_token: bool, now: float) -> tuple[int, dict[str, str]]:
    headers = {"authorization": "x"} if with_token else {}
    response = service.answer(Request(method, "/0ne00000000/registrations/a/register", headers=headers), now)
    return response.status, dict(response.headers)


@pytest.mark.parametrize("after_s", [None, 5])
def test_requests_beyond_the_quota_are_answered_with_429(after_s: int | None) -> None:
    service = DpsService(
        Settings(quota_per_min=2, retry_after_429_s=after_s), {}, PlainRegistrations(), random.Random(1).randbytes
    )
    statuses = [answered(service, "PUT", with_token, 60.0)[0] for with_token in (False, True, False)]
    assert 429 not in statuses[:2] and statuses[2] == 429
    status, headers = answered(service, "PUT", True, 119.0)
    assert status == 429 and headers.get("Retry-After") == (None if after_s is None else "5")
    assert answered(service, "GET", True, 119.0)[0] != 429, "a poll does not count"
    assert answered(service, "PUT", False, 120.0)[0] != 429, "the next minute"


def test_what_counts_is_chosen() -> None:
    for counts, free in (((REGISTER,), ("PUT", False)), (COUNTED, ("GET", True))):
        service = DpsService(
            Settings(quota_per_min=1, quota_counts=counts), {}, PlainRegistrations(), random.Random(1).randbytes
        )
        assert all(answered(service, *free, 60.0)[0] != 429 for _ in range(3))
    chosen = Settings(quota_per_min=1, quota_counts=(REGISTER, CHALLENGE, POLL), quota_by=MINUTE)
    service = DpsService(chosen, {}, PlainRegistrations(), random.Random(1).randbytes)
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
