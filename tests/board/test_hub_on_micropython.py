"""A board's life at its hub under MicroPython: a real TPM (swtpm), real TLS, the emulator's hub, a limited heap."""

from __future__ import annotations

import datetime
import json
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Literal

import pytest

from dps_emulator.service import Settings
from support.board.compiled import Image, der, micropython
from support.cloud.emulator import HUB, EmulatorInThread
from support.cloud.ntp import NtpServer
from support.tpm.swtpm import Swtpm

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

DEVICE = "press-07"
SECOND_HUB = "second.azure-devices.net"
HEAP_KB = 205  # of a 64-bit build with its code in flash, outside the heap; a board has pointers of half the size
FIRST = ["boot", "provisioning", "provisioned", "connecting", "connected"]  # the states of a new board
SECOND = ["boot", "provisioned", "connecting", "connected"]  # of one that has its hub
DAY = 86400


class Desk:
    """A board with flash and TPM, NTP, DPS and two hubs."""

    def __init__(self, image: Image, folder: Path, tier: Literal["standard", "basic"] = "standard") -> None:
        self.image = image
        self.folder = folder
        self.stack = ExitStack()
        self.swtpm = self.stack.enter_context(Swtpm(folder / "tpm"))
        self.ntp = self.stack.enter_context(NtpServer())
        self.ahead_s = 0.0  # of this machine's time, DPS and hubs
        self.emulator = self.stack.enter_context(
            EmulatorInThread(
                Settings(enroll_any=True, retry_after_s=0, hubs=(HUB, SECOND_HUB), tier=tier),
                clock=lambda: time.time() + self.ahead_s,
            )
        )
        self.lives = self.stack.enter_context(ThreadPoolExecutor(1))
        self.connect_to = self.emulator.connect_to
        self.hub_connect_to = self.emulator.hub_connect_to

    def configure(self, model_id: str = "", **board: Any) -> Path:
        (self.folder / "roots.der").write_bytes(der(self.emulator.ca_file))
        document = {
            "id_scope": "0ne00000000",
            "registration_id": DEVICE,
            "connect_to": self.connect_to,
            "ca_file": str(self.folder / "roots.der"),
            "state_dir": "/flash/dps-agent",
            "tpm": {"tcti": self.swtpm.tcti},
            "hub": {"connect_to": self.hub_connect_to, "keep_alive_s": 30},
            "model_id": model_id,
            "board": {"ntp_server": self.ntp.address, "built_at_s": int(time.time()) - 30 * DAY, **board},
        }
        path = self.folder / "config.json"
        path.write_text(json.dumps(document))
        return path

    def live(
        self, *words: str, seconds: int = 600, heap_kb: int = 1024, rtc: Path | None = None
    ) -> Future[list[dict[str, Any]]]:
        """Begins one life of the board; its lines come when it has ended."""
        flash = str(self.folder / "flash.img")
        words = (str(self.configure()), flash, f"seconds={seconds}", *words, *([f"rtc={rtc}"] if rtc else []))
        return self.lives.submit(
            micropython, self.image, "board_hub", *words, heap_kb=heap_kb, rtc=rtc, timeout_s=seconds + 30
        )

    def stop(self, life: Future[list[dict[str, Any]]]) -> dict[str, Any]:
        """Ends a connected life; the sums."""
        assert self.emulator.invoke(DEVICE, "stop") == (200, {"stopping": True})
        return life.result()[-1]

    def connected(self, count: int = 1, within_s: float = 120) -> None:
        """Waits for so many connections in all, and for telemetry on the last of them."""
        self.emulator.await_hub_log("connected", count, DEVICE, within_s)
        self.emulator.await_telemetry(len(self.emulator.telemetry(DEVICE)) + 1, DEVICE)


@pytest.fixture
def desk(image: Image, tmp_path: Path) -> Iterator[Desk]:
    desk = Desk(image, tmp_path)
    with desk.stack:
        yield desk


def test_a_board_is_connected_and_does_what_a_hub_asks_for(desk: Desk) -> None:
    life = desk.live("heap", "early")
    desk.connected()
    hub = desk.emulator
    first = hub.await_telemetry(3, DEVICE)
    assert [message["payload"] for message in first[:3]] == ["1", "2", "3"]
    assert first[0]["properties"] == {"unit": "°C"} and first[0]["qos"] == 1
    for name in ("echo", "slow"):
        assert hub.invoke(DEVICE, name, {"a": [1, None, "°"]}) == (200, {"a": [1, None, "°"]})
    assert hub.invoke(DEVICE, "ping") == (200, {})
    status, summary = hub.invoke(DEVICE, "status")
    assert (status, summary["state"], summary["assignedHub"]) == (200, "connected", HUB)
    assert hub.invoke(DEVICE, "absent")[0] == 404
    assert hub.invoke(DEVICE, "broken")[0] == 500
    hub.send_c2d(DEVICE, b"hello", {"n": "1"})
    hub.send_c2d(DEVICE, bytes(20_000), {"n": "2"})
    assert hub.set_desired(DEVICE, {"rate": 5}) == 2
    reported = hub.twin(DEVICE)["reported"]["dpsAgent"]
    assert reported["runtime"].startswith("micropython 1.") and reported["backend"] == "wire"
    assert reported["tpmMaker"] and reported["substatus"] == "initialAssignment"
    hub.await_telemetry(10, DEVICE)
    seen = desk.stop(life)
    print_heap(seen)
    assert seen["states"] == FIRST, seen
    assert [message[1:] for message in seen["messages"]] == [["1", 5], ["2", 0]]
    assert seen["desired"][-1] == [2, 5, False], seen
    early, large = seen["early"]
    assert "not sent: boot" in early and "at most 262144 bytes" in large and "came 300000" in large
    assert seen["accepted"] >= 10 and seen["refused"] == [], seen
    assert seen["handshakes"] == [1, 1] and seen["longestFeedMs"] < 1500, seen
    assert seen["connects"] == 0, "an end on purpose is no crash"


def test_a_program_of_few_lines_reports_and_reads_messages_and_has_desired_properties_merged(desk: Desk) -> None:
    hub = desk.emulator
    life = desk.lives.submit(
        micropython, desk.image, "board_program", str(desk.configure()), str(desk.folder / "flash.img"), "stays",
        heap_kb=1024, timeout_s=120,
    )  # fmt: skip
    sent = hub.await_telemetry(2, DEVICE, 60)
    assert [(message["payload"], message["qos"]) for message in sent] == [("first", 1), ("fast", 0)]
    hub.set_desired(DEVICE, {"rate": 5, "other": {"a": 1}})
    hub.set_desired(DEVICE, {"rate": 6})
    hub.send_c2d(DEVICE, b"one", {"n": "1"})
    hub.await_hub_log("twin-patch", 4, DEVICE)  # the agent's own, and three of the program's
    reported = hub.twin(DEVICE)["reported"]
    assert reported["valve"] == {"open": True} and reported["desired"] == 6 and "agentVersion" in reported["dpsAgent"]
    hub.send_c2d(DEVICE, b"stop", {})
    (said,) = life.result()
    assert said["messages"] == ["one", "stop"] and said["early"] == said["late"] == "agent.not_connected"
    assert said["versions"][1] == said["versions"][0] + 1
    own, name, text = said["refused"]
    assert "agent reports of itself" in own and "without space" in name and "4096" in text, said


def test_one_wake_sends_takes_what_waits_and_ends_in_order(desk: Desk) -> None:
    def wake() -> dict[str, Any]:
        path = str(desk.configure()), str(desk.folder / "flash.img")
        (said,) = micropython(desk.image, "board_program", *path, "once", heap_kb=1024, timeout_s=120)
        return said

    hub = desk.emulator
    first = wake()
    assert first["messages"] == [] and first["desired"] == {"$version": 1}
    gone = {"dps_board.config", "dps_board.parts", "dps_board.keys"}
    assert "dps_board.runner" in first["loaded"] and gone.isdisjoint(first["loaded"]), (
        "what a start alone needs is let go"
    )
    hub.send_c2d(DEVICE, b"while asleep", {})
    hub.set_desired(DEVICE, {"rate": 5})
    second = wake()
    assert second["messages"] == ["while asleep"] and second["desired"] == {"rate": 5, "$version": 2}
    assert [message["payload"] for message in hub.telemetry(DEVICE)] == ["1", "2"] * 2
    hub.await_hub_log("completed")


def test_telemetry_of_a_board_flows_at_a_hub_of_the_basic_tier(image: Image, tmp_path: Path) -> None:
    desk = Desk(image, tmp_path, "basic")
    with desk.stack:
        life = desk.live("until=5")
        messages = desk.emulator.await_telemetry(5, DEVICE, 120)
        seen = life.result()[-1]
    assert seen["accepted"] == 5 and seen["hubLacks"] == ["methods", "twin", "messages"], seen
    assert [message["payload"] for message in messages[:5]] == ["1", "2", "3", "4", "5"]


def test_a_message_that_the_program_failed_on_comes_again(desk: Desk) -> None:
    life = desk.live("token_life=12")
    desk.connected()
    desk.emulator.send_c2d(DEVICE, b"crash", {"n": "1"})
    desk.connected(2)  # with the next token
    desk.emulator.await_telemetry(20, DEVICE)
    seen = desk.stop(life)
    assert [message[:2] for message in seen["messages"]] == [["crash", "1"]] * 2, seen


def test_a_token_is_renewed_and_no_telemetry_is_lost(desk: Desk) -> None:
    life = desk.live("token_life=10", "every=50")
    desk.connected(3)
    seen = desk.stop(life)
    assert seen["states"][3:9] == ["connecting", "connected"] * 3, seen
    arrived = [int(message["payload"]) for message in desk.emulator.telemetry(DEVICE)]
    assert seen["refused"] == [] and seen["handshakes"][1] == 3, seen
    assert sorted(set(arrived)) == list(range(1, max(arrived) + 1)), "none is missing"
    assert seen["accepted"] >= max(arrived) - 1
    assert desk.emulator.hub_log[-1].event and not [line for line in desk.emulator.hub_log if line.event == "refused"]


def test_a_dozen_moves_leave_nothing_behind(desk: Desk) -> None:
    life = desk.live(seconds=600)
    desk.connected()
    for number in range(12):
        desk.emulator.service.move(DEVICE, (SECOND_HUB, HUB)[number % 2])
        assert desk.emulator.invoke(DEVICE, "reprovision")[0] == 202
        desk.connected(number + 2)
    desk.stop(life)
    connected = [line for line in life.result() if line.get("state") == "connected"]
    print(f"heap in use on connecting, bytes: {[line['used'] for line in connected]}")
    assert len(connected) == 13 and desk.swtpm.leftovers() == []
    assert connected[-1]["used"] - connected[3]["used"] < 1024, "a heap that grows"
    assert connected[-1]["open"] == connected[3]["open"], "sockets"


def test_a_board_that_was_kicked_reconnects_and_repeats_what_was_not_acknowledged(desk: Desk) -> None:
    life = desk.live()
    desk.connected()
    desk.emulator.await_telemetry(3, DEVICE)
    desk.emulator.fault({"operation": "telemetry", "drop": "after", "times": 1})
    desk.emulator.await_hub_log("closed", 1, DEVICE)
    desk.emulator.fault()
    desk.connected(2)
    messages = desk.emulator.await_telemetry(8, DEVICE)
    while len(messages) < 80 and not any(message["dup"] for message in messages):  # it comes behind what is not suspect
        messages = desk.emulator.await_telemetry(len(messages) + 1, DEVICE)
    assert desk.emulator.disconnect(DEVICE), "a kick"
    desk.connected(3)
    seen = desk.stop(life)
    (repeated,) = [message for message in messages if message["dup"]]
    assert [message["payload"] for message in messages].count(repeated["payload"]) >= 2, messages
    assert seen["states"][3:11] == ["connecting", "connected", "provisioned"] * 2 + ["connecting", "connected"], seen


def test_a_heap_without_room_for_the_logic_ends_the_attempt_and_not_the_life(desk: Desk) -> None:
    life = desk.live("full")
    desk.connected(2)
    desk.emulator.send_c2d(DEVICE, b"hello", {"n": "1"})
    desk.emulator.await_hub_log("completed", 1, DEVICE)
    seen = desk.stop(life)
    assert seen["states"][-5:] == ["connected", *SECOND] and "error" not in seen, seen
    assert set(seen["refused"]) == {"agent.not_connected"} and desk.swtpm.leftovers() == [], seen


def test_a_board_moves_to_another_hub_when_it_is_told_to(desk: Desk) -> None:
    life = desk.live()
    desk.connected()
    desk.emulator.service.move(DEVICE, SECOND_HUB)
    status, _ = desk.emulator.invoke(DEVICE, "reprovision")
    assert status == 202
    desk.connected(2)
    assert [line.hub for line in desk.emulator.hub_log if line.event == "connected"] == [HUB, SECOND_HUB]
    desk.emulator.await_telemetry(1, DEVICE)
    seen = desk.stop(life)
    assert seen["states"] == [*FIRST, "provisioning", "provisioned", "connecting", "connected"], seen
    assert seen["hub"] == SECOND_HUB and desk.swtpm.leftovers() == []


def restart(desk: Desk, *words: str) -> Future[list[dict[str, Any]]]:
    """Begins another life with a clock that starts in 1970, as that of most boards."""
    rtc = desk.folder / "rtc"
    rtc.write_text("@1970-01-01 00:00:00")
    return desk.live(*words, rtc=rtc)


def test_a_restarted_board_asks_dps_for_nothing_but_the_date(desk: Desk) -> None:
    life = desk.live()
    desk.connected()
    desk.stop(life)
    asked = len(desk.emulator.log)
    life = restart(desk)
    desk.connected(2)
    seen = desk.stop(life)
    assert seen["states"] == SECOND, seen
    assert seen["handshakes"] == [1, 1] and seen["now"][1:] == [True, "ntp"], seen
    assert [line.operation for line in desk.emulator.log[asked:]] == [""]


@pytest.mark.parametrize("offset_s", [75 * DAY, 200 * DAY, -DAY])
def test_a_time_forged_before_a_hub_is_reached_neither_passes_nor_lasts(desk: Desk, offset_s: int) -> None:
    life = desk.live()
    desk.connected()
    desk.stop(life)
    desk.ntp.offset_s = float(offset_s)
    life = restart(desk)
    desk.connected(2)
    seen = desk.stop(life)
    assert seen["now"][1] and abs(seen["now"][0] - time.time()) < 120, seen
    assert abs(seen["floor"] - time.time()) < 120, "what was forged has not raised the floor"
    desk.ntp.offset_s = 0.0
    life = restart(desk)
    desk.connected(3)
    seen = desk.stop(life)
    assert seen["states"] == SECOND and abs(seen["now"][0] - time.time()) < 120, seen


def test_a_forged_time_makes_no_token_while_dps_is_away(desk: Desk) -> None:
    life = desk.live()
    desk.connected()
    desk.stop(life)
    desk.ntp.offset_s = 75.0 * DAY
    reached, desk.connect_to = desk.connect_to, "127.0.0.1:1"
    life = restart(desk, "seconds=8")
    seen = life.result()[-1]
    assert "connected" not in seen["states"] and seen["code"] == "clock.not_set", seen
    assert not seen["now"][1] and seen["floor"] < time.time() + 120, seen
    desk.ntp.offset_s, desk.connect_to = 0.0, reached
    life = restart(desk)
    desk.connected(2)
    assert desk.stop(life)["now"][1]


def test_a_restarted_board_without_ntp_gets_the_time_from_dps_once(desk: Desk, tmp_path: Path) -> None:
    life = desk.live()
    desk.connected()
    desk.stop(life)
    desk.ntp.offset_s = None
    desk.ahead_s = 2 * DAY
    rtc = tmp_path / "rtc"
    rtc.write_text("@1970-01-01 00:00:00")
    life = desk.live(rtc=rtc)
    desk.emulator.await_hub_log("refused", 1, DEVICE, 120)  # the token is of the day that was believed last
    desk.connected(2)
    seen = desk.stop(life)
    assert seen["states"] == [*SECOND[:-1], "provisioned", "connecting", "connected"], seen
    assert seen["now"][1:] == [True, "date"], seen
    assert seen["handshakes"][0] == 2, "one to hear of the Date, one under it"
    assert desk.emulator.log[-1].operation != "register"


def test_a_hub_that_says_nothing_is_given_up_and_tried_again(desk: Desk) -> None:
    life = desk.live()
    desk.connected()
    desk.emulator.await_telemetry(2, DEVICE)
    desk.emulator.fault({"operation": "telemetry", "silent": "after", "times": 1})
    began = time.monotonic()
    desk.connected(2, 180)
    assert time.monotonic() - began > 40, "1.5 keep-alives of 30 s, and the first back-off"
    seen = desk.stop(life)
    assert seen["refused"] == [], "what waits for longer than a reconnect takes is sent again"
    assert seen["longestFeedMs"] < 1500, seen


def test_the_whole_session_works_on_a_small_heap(desk: Desk) -> None:
    life = desk.live(heap_kb=HEAP_KB)
    desk.connected()
    assert desk.emulator.invoke(DEVICE, "echo", "x" * 4000)[0] == 200
    desk.emulator.send_c2d(DEVICE, bytes(4000))
    desk.emulator.set_desired(DEVICE, {f"key{number}": "x" * 4000 for number in range(5)})
    desk.emulator.await_telemetry(20, DEVICE)
    seen = desk.stop(life)
    assert [message[2] for message in seen["messages"]] == [4000], seen
    assert seen["desired"][-1] == [2, "?", True], "the program hears of what is too large for it"


def test_the_example_program_keeps_a_device_at_its_hub(desk: Desk) -> None:
    desk.configure(led_pin=25, watchdog_s=8)
    flash = str(desk.folder / "flash.img")
    program = desk.lives.submit(micropython, desk.image, "board_app", str(desk.folder), flash, "12")
    desk.connected()
    measured = json.loads(desk.emulator.telemetry(DEVICE)[0]["payload"])
    assert desk.emulator.telemetry(DEVICE)[0]["properties"] == {"$.ct": "application/json", "$.ce": "utf-8"}
    status, value = desk.emulator.invoke(DEVICE, "free-heap")
    assert status == 200 and measured.keys() == value.keys() == {"freeHeap"}
    assert desk.emulator.invoke(DEVICE, "dance")[0] == 404
    desk.emulator.send_c2d(DEVICE, b"hello")
    desk.emulator.await_hub_log("completed", 1, DEVICE)
    (seen,) = program.result()
    assert seen["led"] == [25, 0, 0, 0, 1, 1, 1], "unlit, boot, provisioning, provisioned, connecting, connected"
    assert seen["watchdog"][0] == 8000 and seen["watchdog"][1] > 10
    year, month, day, weekday, hour, minute, second, _ = seen["rtc"][-1]
    moment = datetime.datetime(year, month, day, hour, minute, second, tzinfo=datetime.UTC)
    assert abs(moment.timestamp() - time.time()) < 60 and moment.weekday() == weekday


def print_heap(seen: dict[str, Any]) -> None:
    for phase, used in sorted(seen["peaks"].items(), key=lambda row: row[1]):
        print(f"{phase:<24} {used / 1024:6.1f} KiB")
