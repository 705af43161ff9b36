"""What arrives from devices, as consumers get it: a stream of server-sent events, and a file."""

from __future__ import annotations

import asyncio
import base64
import json
import stat
import time
from collections.abc import Iterator
from contextlib import ExitStack
from http.client import HTTPResponse
from pathlib import Path
from typing import Any

import pytest

from dps_emulator import telemetry_feed
from dps_emulator.cli import main
from dps_emulator.embedded import DeviceCredentials, EmulatorInThread, awaited
from dps_emulator.hub_devices import Telemetry
from dps_emulator.hub_service_api import POLICY
from dps_emulator.service import Settings
from dps_emulator.telemetry_feed import PAGE, PATH, READERS_LIMIT, Asked, TelemetryFeed
from dps_emulator.tokens import signed_token
from emulator.device_side import Client
from emulator.paho_device import PahoDevice
from support.cloud.emulator import EmulatorProcess

ONE, TWO = "one.azure-devices.net", "two.azure-devices.net"
PATIENCE_S = 60


@pytest.fixture
def emulator() -> Iterator[EmulatorInThread]:
    with EmulatorInThread(Settings(hubs=(ONE, TWO))) as running:
        yield running


class Consumer(Client):
    """Reads the stream."""

    def __init__(self, emulator: EmulatorInThread, query: str = "", host: str = "", **headers: str) -> None:
        super().__init__(emulator.port, emulator.ca_file, PATIENCE_S)
        text = emulator.hub_command("service", ofHubs=True)["connectionString"]
        key = base64.b64decode(text.partition("SharedAccessKey=")[2])
        host = host or f"127.0.0.1:{emulator.port}"
        token = signed_token(key, host.replace(":", "%3A"), int(time.time()) + 60, POLICY)
        sent = {
            "Authorization": token,
            "Host": host,
            **{name.replace("_", "-"): each for name, each in headers.items()},
        }
        self.connection.request("GET", PATH + query, headers=sent)
        self.answer: HTTPResponse = self.connection.getresponse()

    def __enter__(self) -> Consumer:
        return self

    def next_event(self) -> tuple[int, dict[str, Any]]:
        """Number and message of the next event."""
        fields: dict[str, str] = {}
        while True:
            line = self.answer.readline().decode()
            assert line, "the stream has ended"
            name, _, value = line.rstrip("\n").partition(": ")
            if line == "\n" and "data" in fields:
                return int(fields["id"]), json.loads(fields["data"])
            fields[name] = value


def stored(emulator: EmulatorInThread, count: int, hub: str = ONE) -> None:
    for number in range(count):
        payload = str(number).encode()
        emulator.store.messages.append(Telemetry("2026-01-01", hub, "press-07", payload, {}, 1, False))


def test_messages_are_streamed_as_they_arrive_and_behind_any_number(emulator: EmulatorInThread) -> None:
    credentials = emulator.add_device("press-07", ONE)
    with PahoDevice(emulator, credentials) as device, Consumer(emulator) as consumer:
        assert device.connect() == 0
        assert consumer.answer.getheader("Content-Type") == "text/event-stream; charset=utf-8"
        assert consumer.answer.readline() == b"retry: 2000\n"  # from here on it misses none
        numbers = []
        for payload in ("21.5", '{"a":"\\n"}', "ü"):
            assert device.publish("devices/press-07/messages/events/line=3", payload.encode())
            number, message = consumer.next_event()
            assert (message["schema"], message["deviceId"], message["hub"]) == (1, "press-07", ONE)
            assert message["payload"] == payload and message["properties"] == {"line": "3"}
            numbers.append(number)
        assert numbers == sorted(set(numbers))
        for query, headers in ((f"?after={numbers[0]}", {}), ("?after=0", {"Last_Event_ID": str(numbers[0])})):
            with Consumer(emulator, query, **headers) as again:
                assert [again.next_event()[0] for _ in range(2)] == numbers[1:]


def test_a_stream_has_every_message_that_is_kept_once_and_in_order(emulator: EmulatorInThread) -> None:
    stored(emulator, 2 * PAGE + 7)
    emulator.store.rows("UPDATE messages SET record = 'x' WHERE number BETWEEN 20 AND ?", 20 + PAGE)
    with Consumer(emulator, "?after=0") as consumer:
        expected = [number for number in range(1, 2 * PAGE + 8) if not 20 <= number <= 20 + PAGE]
        assert [consumer.next_event()[0] for _ in expected] == expected
    with Consumer(emulator, Last_Event_ID="100000") as of_another:
        assert of_another.next_event()[0] == 1, "it had its number from an emulator whose messages are gone"


def test_a_stream_is_narrowed_down_to_a_device_and_by_the_host_to_a_hub(emulator: EmulatorInThread) -> None:
    stored(emulator, 1)
    stored(emulator, 1, TWO)
    emulator.store.messages.append(Telemetry("2026-01-01", ONE, "press-08", b"x", {}, 1, False))
    with Consumer(emulator, "?after=0&deviceId=Press-08") as of_device:
        assert of_device.next_event()[1]["deviceId"] == "press-08"
    with Consumer(emulator, "?after=0", host=TWO) as of_hub, Consumer(emulator, "?after=0") as of_all:
        assert of_hub.next_event()[1]["hub"] == TWO
        assert [of_all.next_event()[0] for _ in range(3)] == [1, 2, 3]


def test_a_long_way_through_messages_of_others_holds_nobody_up(
    emulator: EmulatorInThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(telemetry_feed, "BEAT_S", 0.01)
    stored(emulator, 3 * PAGE)
    messages, turns, at_pages = emulator.store.messages, [0], list[int]()
    page = messages.page
    monkeypatch.setattr(messages, "page", lambda *asked: at_pages.append(turns[0]) or page(*asked))

    async def others() -> None:
        while True:
            turns[0] += 1
            await asyncio.sleep(0)

    async def read() -> None:
        task = asyncio.create_task(others())
        feed = TelemetryFeed(messages, (ONE, TWO), b"secret", time.time, 0)
        events = feed.events(Asked(0, None, TWO))
        assert [await anext(events) for _ in range(2)] == [b"retry: 2000\n\n", b": still here\n\n"]
        await events.aclose()  # type: ignore[attr-defined]
        task.cancel()

    asyncio.run(read())
    assert len(at_pages) == 4 and len({*at_pages}) == 4, at_pages


def test_who_may_not_read_is_told_why(emulator: EmulatorInThread) -> None:
    wrongs = (({"Authorization": ""}, "", 401), ({}, "?after=x", 400), ({"Last_Event_ID": "-1"}, "", 400))
    for headers, query, status in wrongs:
        with Consumer(emulator, query, **headers) as refused:
            assert refused.answer.status == status and json.loads(refused.answer.read())["errorCode"] // 1000 == status
    with Client(emulator.port, emulator.ca_file) as client:
        assert client.call("POST", PATH, {})[0] == 405
    assert [line.status for line in emulator.log] == [401, 400, 400, 405]


def test_readers_are_bounded_and_one_that_goes_makes_room(
    emulator: EmulatorInThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(telemetry_feed, "BEAT_S", 0.05)
    with ExitStack() as open_ones:
        for _ in range(READERS_LIMIT):
            assert open_ones.enter_context(Consumer(emulator)).answer.read(3) == b"ret"
        beating = open_ones.enter_context(Consumer(emulator))
        assert beating.answer.status == 429

    def lets_in() -> list[bool]:
        with Consumer(emulator) as consumer:
            if consumer.answer.status != 200:
                return []
            while consumer.answer.readline() != b": still here\n":
                pass
            return [True]

    awaited(lets_in, 1, "readers let in", PATIENCE_S)


def test_a_file_has_a_document_a_line_as_watching_prints_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "telemetry.jsonl"
    with EmulatorProcess("--telemetry-file", str(file)) as emulator:
        credentials: DeviceCredentials = emulator.add_device("press-07")
        with PahoDevice(emulator, credentials) as device:
            assert device.connect() == 0
            for payload in (b"21.5", b"\xff"):
                assert device.publish("devices/press-07/messages/events/", payload)
        lines = file.read_text().splitlines()  # before a message is acknowledged it is there
        folder = str(emulator.state_dir)
        assert main(["messages", "--json", "--state-dir", folder]) == 0
    assert [json.loads(line) for line in lines] == [
        {"schema": 1, **message} for message in json.loads(capsys.readouterr().out)["messages"]
    ]
    assert len(lines) == 2 and stat.S_IMODE(file.stat().st_mode) == 0o600


def test_a_file_that_takes_no_lines_is_a_usage_error_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["serve", "--ca-file", str(tmp_path / "ca.pem"), "--telemetry-file", str(tmp_path)]
    assert main(words) == 2
    assert f"--telemetry-file {tmp_path} can't be used: Is a directory\n" in capsys.readouterr().err
