"""`dps-agent run` against the emulator, as a program: connected, asked, disturbed, ended."""

import base64
import contextlib
import json
import os
import re
import signal
import socket
import stat
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from dps_agent.driver import Driver, Release
from dps_agent.effects import Commit, Random, Sleep
from dps_agent.host.config import load
from dps_agent.host.journal import Journal
from dps_agent.host.local.routes import Command
from dps_agent.host.local.statefile import FLEET_REFUSED
from dps_agent.host.parts import ROLLED_BACK
from dps_agent.host.runner import Erase
from dps_agent.host.service import Service, _Driver
from dps_agent.hub_effects import MessageDone, NextEvent, Readers, SendTelemetry, TelemetryDone, Tell
from dps_agent.lifecycle import CONNECTING
from dps_agent.progress import Progress, decode_progress
from dps_emulator.enrollments import Enrollment
from dps_emulator.faults import Fault
from dps_emulator.service import Settings
from dps_hal.contracts import IDENTITY, PROGRESS
from dps_hal.errors import Broken
from dps_hal.host.files import FileStore
from dps_hal.host.simulator import SimulatedTpm
from dps_hal.tpm.keys import unwrap
from support.cloud.emulator import HUB, EmulatorInThread
from support.cloud.hostile_cloud import Switchboard
from support.programs.running_agent import CHECKOUT, PATIENCE_S, SOON_S, RunningAgent
from support.programs.tools import until
from support.tpm.states import copy_state
from support.tpm.swtpm import Swtpm
from support.tpm.tap import TpmTap

if TYPE_CHECKING:
    from dps_agent.hub_effects import Event, Message

DEVICE = "press-07"
UNIT = CHECKOUT / "agent" / "service" / "dps-agent.service"


def waiting_at_the_hub(emulator: EmulatorInThread) -> int:
    """Messages that the hub keeps for the device."""
    (device,) = emulator.hub_command("devices")["devices"]
    return int(device["waiting"])


def answer_methods(agent: RunningAgent, names: list[str], ready: threading.Event) -> None:
    """A program that answers so many method calls."""
    with agent.client.events() as events:
        ready.set()
        for name in names:
            call = events.next("method")
            assert call["name"] == name
            answer = json.dumps({"asked": call["payload"]}).encode()
            assert agent.client.ask("POST", f"/methods/{call['id']}?status=207", answer)[0] == 200


# --- what it does


def test_it_registers_connects_and_takes_telemetry_to_the_hub(agent: RunningAgent, emulator: EmulatorInThread) -> None:
    agent.start()
    found = agent.await_connected()
    assert (found["state"], found["assignedHub"], found["deviceId"]) == ("connected", HUB, DEVICE)
    assert agent.client.ask("GET", "/assignment")[1]["assignedHub"] == HUB
    assert agent.client.ask("POST", "/telemetry?line=3&%24.ct=application%2Fjson", b'{"t": 21.5}')[0] == 200
    (message,) = emulator.telemetry(DEVICE)
    assert (message["payload"], message["qos"]) == ('{"t": 21.5}', 1)
    assert message["properties"]["line"] == "3"
    assert agent.end() == (0, pytest.approx(0, abs=2))
    about_the_socket = (" uses the socket", ": the socket is the service's own user's")
    lines = [line for line in agent.written.splitlines() if not line.endswith(about_the_socket)]
    assert [line.split()[0] for line in lines] == ["dps-agent", "registers", "this", "connected", "dps-agent"], lines
    assert os.listdir(agent.runtime_dir) == []


def test_a_second_start_asks_the_hub_and_not_dps(agent: RunningAgent, emulator: EmulatorInThread) -> None:
    agent.start()
    agent.await_connected()
    agent.end()
    asked = len(emulator.log)
    agent.start()
    agent.await_connected()
    assert len(emulator.log) == asked


def test_a_method_is_answered_by_a_program_and_404_without_one(agent: RunningAgent, emulator: EmulatorInThread) -> None:
    agent.start()
    agent.await_connected()
    assert emulator.invoke(DEVICE, "reboot", {"in": 5})[0] == 404
    assert emulator.invoke(DEVICE, "ping") == (200, {})
    ready = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        program = pool.submit(answer_methods, agent, ["reboot", "open"], ready)
        assert ready.wait(60)
        assert emulator.invoke(DEVICE, "reboot", {"in": 5}) == (207, {"asked": {"in": 5}})
        assert emulator.invoke(DEVICE, "open") == (207, {"asked": None})
        program.result(10)


def test_a_message_stays_the_hubs_until_a_program_is_done_with_it(
    agent: RunningAgent, emulator: EmulatorInThread
) -> None:
    agent.start()
    agent.await_connected()
    emulator.send_c2d(DEVICE, b"open", {"valve": "7"})
    with agent.client.events() as events:
        message = events.next("message")
        assert (message["payloadText"], message["properties"]["valve"]) == ("open", "7")
        assert waiting_at_the_hub(emulator) == 1
    emulator.disconnect(DEVICE)
    agent.await_connected(2)
    with agent.client.events() as events:
        again = events.next("message")
        assert again["payloadText"] == "open" and again["id"] != message["id"]
        assert agent.client.ask("POST", f"/events/{message['id']}/done")[0] == 404
        assert agent.client.ask("POST", f"/events/{again['id']}/done")[0] == 200
    emulator.await_hub_log("completed")
    assert waiting_at_the_hub(emulator) == 0


def test_messages_wait_at_the_hub_until_a_program_reads(agent: RunningAgent, emulator: EmulatorInThread) -> None:
    agent.start()
    agent.await_connected()
    emulator.send_c2d(DEVICE, b"recipe")
    emulator.disconnect(DEVICE)
    agent.await_connected(2)
    assert waiting_at_the_hub(emulator) == 1
    assert not [line for line in emulator.hub_log if line.event == "delivered"], "each delivery counts, and ten are all"
    with agent.client.events() as events:
        message = events.next("message")
        assert message["payloadText"] == "recipe"
        assert agent.client.ask("POST", f"/events/{message['id']}/done")[0] == 200
        emulator.await_hub_log("completed")


def test_telemetry_flows_at_a_hub_of_the_basic_tier_and_status_names_what_it_lacks(tmp_path: Path) -> None:
    folder = copy_state("press-07", tmp_path / "tpm")
    with (
        EmulatorInThread(Settings(enroll_any=True, retry_after_s=0, tier="basic")) as emulator,
        RunningAgent(tmp_path, emulator, f'backend = "simulator"\ntcti = "{folder}"') as agent,
    ):
        agent.start()
        agent.await_connected()
        assert agent.client.ask("POST", "/telemetry", b"21.5")[0] == 200
        assert agent.status()["hubLacks"] == ["methods", "twin"]
        assert agent.client.ask("PATCH", "/twin/reported", b"{}")[0] == 501
        assert [message["payload"] for message in emulator.telemetry(DEVICE)] == ["21.5"]
        with agent.client.events():
            agent.await_status(lambda found: "messages" in found["hubLacks"], "messages are asked for, and lacking")
        agent.await_connected(2)
        assert agent.client.ask("POST", "/telemetry", b"22")[0] == 200
        assert agent.command("status")["hubLacks"] == ["methods", "twin", "messages"]
        agent.command("provision", "--force")
        agent.await_connected(3)
        assert agent.status()["hubLacks"] == ["methods", "twin", "messages"]
        assert "lacks nothing" not in agent.written and agent.written.count("the hub has no") == 2


def test_a_desired_change_reaches_the_programs_and_the_twin_says_who_this_is(
    agent: RunningAgent, emulator: EmulatorInThread
) -> None:
    agent.start()
    agent.await_connected()
    with agent.client.events() as events:
        whole = events.next("desired")
        assert whole["whole"] == whole["changed"] == {"$version": whole["version"]}
        version = emulator.set_desired(DEVICE, {"interval": 5})
        change = events.next("desired")
    assert (change["version"], change["whole"]["interval"], change["changed"]["interval"]) == (version, 5, 5)
    with agent.client.events() as events:
        assert events.next("desired")["whole"]["interval"] == 5
    emulator.await_hub_log("twin-patch")
    about = emulator.twin(DEVICE)["reported"]["dpsAgent"]
    assert {"agentVersion", "runtime", "backend", "tpmMaker", "assignedAt", "substatus"} <= set(about)


def test_a_fleet_that_is_absurd_is_named_by_twin_journal_and_status(
    agent: RunningAgent, emulator: EmulatorInThread
) -> None:
    agent.start()
    agent.await_connected()
    emulator.set_desired(DEVICE, {"dpsAgent": {"fleet": {"devices": "many"}}})
    agent.await_status(lambda found: found["fleetRefused"], "the fleet is refused")
    assert until(lambda: agent.command("status")["fleetRefused"]), "the file follows what the socket says"
    assert agent.written.count(FLEET_REFUSED) == 1
    emulator.await_reported(DEVICE, "fleetRefused", True)
    emulator.set_desired(DEVICE, {"dpsAgent": {"fleet": {"devices": 30000}}})
    agent.await_status(lambda found: not found["fleetRefused"], "the fleet was mended")
    emulator.await_reported(DEVICE, "fleetRefused", False)


def test_programs_report_properties_and_read_the_twin(agent: RunningAgent, emulator: EmulatorInThread) -> None:
    agent.start()
    agent.await_connected()
    emulator.set_desired(DEVICE, {"interval": 5})
    status, first = agent.client.ask("PATCH", "/twin/reported", b'{"valve":{"open":true,"turns":3},"t":21.5}')
    assert status == 200
    status, second = agent.client.ask("PATCH", "/twin/reported", b'{"valve":{"turns":null}}')
    assert (status, second["version"]) == (200, first["version"] + 1)
    status, twin = agent.client.ask("GET", "/twin")
    assert status == 200 and twin == emulator.twin(DEVICE)
    reported = {name: value for name, value in twin["reported"].items() if name != "dpsAgent"}
    assert reported == {"valve": {"open": True}, "t": 21.5, "$version": second["version"]}
    assert twin["desired"]["interval"] == 5 and "agentVersion" in twin["reported"]["dpsAgent"]
    for _ in range(8):  # what is 32 KiB only together with what the hub has, the hub refuses itself
        status, answer = agent.client.ask("PATCH", "/twin/reported", b'{"k%d":"%s"}' % (_, b"x" * 4096))
    assert (status, answer["error"]["code"]) == (413, "hub.refused_patch")


# --- when the hub or the network is away


def test_a_lost_connection_is_503_until_the_next_one_and_nothing_accepted_is_lost(
    agent: RunningAgent, emulator: EmulatorInThread
) -> None:
    agent.start()
    agent.await_connected()
    assert agent.client.ask("POST", "/telemetry", b"1")[0] == 200
    emulator.fault({"operation": "accept", "drop": "before"})
    emulator.disconnect(DEVICE)
    agent.await_status(lambda found: not found["connected"], "without a connection")
    status, document = agent.client.ask("POST", "/telemetry", b"2")
    assert (status, document["error"]["code"]) == (503, "agent.not_connected")
    assert int(agent.client.headers["retry-after"]) >= 1
    emulator.fault()
    agent.await_connected(2)
    assert agent.client.ask("POST", "/telemetry", b"3")[0] == 200
    assert [message["payload"] for message in emulator.telemetry(DEVICE)] == ["1", "3"]


def test_telemetry_under_way_when_the_connection_breaks_is_sent_again(
    agent: RunningAgent, emulator: EmulatorInThread
) -> None:
    agent.start()
    agent.await_connected()
    emulator.fault({"operation": "telemetry", "drop": "before", "request": 1})
    assert agent.client.ask("POST", "/telemetry", b"1")[0] == 200
    assert [message["payload"] for message in emulator.telemetry(DEVICE)] == ["1"]


def test_a_device_that_its_hub_refuses_registers_again(agent: RunningAgent, emulator: EmulatorInThread) -> None:
    agent.start()
    agent.await_connected()
    emulator.withdraw(DEVICE)
    agent.await_text("[hub.refused]")
    agent.await_text("this device is", 2, 60)
    agent.await_connected(2)
    assert agent.client.ask("POST", "/telemetry", b"1")[0] == 200


# --- commands of the same device


def test_provision_token_and_status_go_through_the_service(agent: RunningAgent, emulator: EmulatorInThread) -> None:
    agent.start()
    agent.await_connected()
    asked = len(emulator.log)
    assert agent.command("provision")["alreadyProvisioned"] is True
    assert len(emulator.log) == asked
    again = agent.command("provision", "--force")
    assert (again["alreadyProvisioned"], again["assignedHub"]) == (False, HUB)
    assert len(emulator.log) > asked
    agent.await_connected(2)
    token = agent.command("token", "--life", "60")["token"]
    assert emulator.service.hub_token_refusal(token, time.time()) is None
    time.sleep(1.1)  # the state file is written once a second at most
    live = agent.command("status")
    assert (live["running"], live["state"], live["connections"]) == (True, "connected", 2)
    assert agent.process is not None and live["pid"] == agent.process.pid


def test_a_registration_that_fails_is_told_to_who_asked_and_the_old_hub_stays(
    agent: RunningAgent, emulator: EmulatorInThread
) -> None:
    agent.start()
    agent.await_connected()
    key = SimulatedTpm(str(agent.folder / "tpm")).endorsement_key()
    emulator.service.enroll(Enrollment(DEVICE, key, enabled=False))
    error = agent.command("provision", "--force", exit_status=4)["error"]
    assert error["code"].startswith("dps.") and error["remedy"]
    agent.await_connected(2)
    assert agent.client.ask("POST", "/telemetry", b"1")[0] == 200


def test_reset_through_the_service_erases_and_registers_again(agent: RunningAgent, emulator: EmulatorInThread) -> None:
    agent.start()
    agent.await_connected()
    before = FileStore(str(agent.state_dir)).load(IDENTITY)
    assert agent.command("reset", "--yes")["erased"][0] == "identity"
    agent.await_text("this device is", 2)
    agent.await_connected()
    assert FileStore(str(agent.state_dir)).load(IDENTITY) != before
    assert agent.client.ask("POST", "/telemetry", b"1")[0] == 200


def test_status_remote_costs_one_challenge_and_one_lookup_and_changes_nothing(
    agent: RunningAgent, emulator: EmulatorInThread
) -> None:
    agent.start()
    agent.await_connected()
    before = FileStore(str(agent.state_dir)).load(IDENTITY)
    for running in (True, False):
        if not running:
            agent.end()
        emulator.log.clear()
        said = agent.command("status", "--remote")
        assert (said["remote"]["status"], said["remote"]["assignedHub"], said["differences"]) == ("assigned", HUB, [])
        assert [(line.operation, line.status) for line in emulator.log] == [("register", 401), ("lookup", 200)]
    assert FileStore(str(agent.state_dir)).load(IDENTITY) == before
    agent.command("provision", "--force", "--set", "runtime_dir=/nonexistent")
    stored = FileStore(str(agent.state_dir)).load(IDENTITY)
    assert stored is not None


def test_status_remote_keeps_neither_hub_nor_programs_waiting(agent: RunningAgent, emulator: EmulatorInThread) -> None:
    agent.start()
    agent.await_connected()
    emulator.script(Fault(operation="register", delay_s=10, times=1))
    said: list[Any] = []
    asker = threading.Thread(target=lambda: said.append(agent.command("status", "--remote")))
    asker.start()
    time.sleep(2)
    for _ in range(5):
        assert agent.client.ask("POST", "/telemetry", b"1")[0] == 200
    assert emulator.invoke(DEVICE, "ping") == (200, {})
    assert asker.is_alive(), "DPS answered before anything was tried"
    asker.join(PATIENCE_S)
    assert said[0]["remote"]["status"] == "assigned" and agent.status()["connections"] == 1


def test_status_remote_does_not_come_between_a_registration(agent: RunningAgent, emulator: EmulatorInThread) -> None:
    emulator.script(Fault(operation="register", delay_s=4, times=1))
    agent.start()
    agent.await_state("provisioning")
    error = agent.command("status", "--remote", exit_status=3)["error"]
    assert error["code"] == "agent.busy"
    agent.await_connected()
    assert [line.operation for line in emulator.log].count("register") == 2, "the registration's own two"


def test_a_device_that_is_spread_says_so_and_registers_at_once_for_whoever_asks(
    agent: RunningAgent, emulator: EmulatorInThread
) -> None:
    agent.settings.write_text(agent.text + "[retry]\nfirst_contact_spread_s = 600000\n")
    agent.start()
    agent.await_state("provisioning")
    until_s = time.monotonic() + PATIENCE_S
    while not (found := agent.status())["until"]:
        assert time.monotonic() < until_s
        time.sleep(0.1)
    assert "a fleet may start at once" in found["reason"] and "register" not in [
        line.operation for line in emulator.log
    ]
    assert agent.command("status", "--remote", exit_status=4)["error"]["code"] == "dps.not_found", "nobody is busy"
    assert agent.command("provision")["alreadyProvisioned"] is False
    agent.await_connected()


def test_status_remote_reports_differences_and_what_dps_refuses(
    agent: RunningAgent, emulator: EmulatorInThread
) -> None:
    agent.command("provision")
    before = FileStore(str(agent.state_dir)).load(IDENTITY)
    key = SimulatedTpm(str(agent.folder / "tpm")).endorsement_key()
    emulator.service.enroll(Enrollment(DEVICE, key, device_id="press-09"))
    FileStore(str(agent.state_dir.with_name("other"))).commit(IDENTITY, before.payload if before else b"")
    agent.command("provision", "--force")
    other = ["--set", f"state_dir={agent.state_dir.with_name('other')}"]
    said = agent.command("status", "--remote", *other)
    assert said["assignment"]["deviceId"] == DEVICE
    assert f"deviceId: DPS says press-09, stored is {DEVICE}" in said["differences"]
    emulator.service.enroll(Enrollment(DEVICE, key, enabled=False))
    assert agent.command("status", "--remote", *other, exit_status=4)["error"]["code"].startswith("dps.")
    left = FileStore(str(agent.state_dir.with_name("other"))).load(IDENTITY)
    assert left is not None and before is not None and left.payload == before.payload


def test_one_process_at_a_time_has_the_state_folder(agent: RunningAgent) -> None:
    agent.start("--set", "api.socket=none")
    agent.await_text("connected to")
    assert agent.command("provision", "--force", exit_status=3)["error"]["code"] == "store.locked"
    assert agent.command("status", "--remote", exit_status=3)["error"]["code"] == "store.locked"
    assert agent.command("reset", "--yes", exit_status=3)["error"]["code"] == "store.locked"
    assert agent.command("run", exit_status=3)["error"]["code"] == "store.locked"
    agent.end()
    assert agent.command("provision", "--force")["alreadyProvisioned"] is False


def test_the_status_of_a_service_that_was_killed_is_that_of_its_records(agent: RunningAgent) -> None:
    agent.start()
    agent.await_connected()
    time.sleep(1.1)
    assert agent.command("status")["running"] is True
    agent.end(signal.SIGKILL)
    assert (agent.runtime_dir / "state.json").exists()
    left = agent.command("status")
    assert (left["running"], left["state"]) == (False, "provisioned")
    agent.start()
    agent.await_connected()


def test_tokens_over_the_socket_are_for_this_hub_and_short(agent: RunningAgent, emulator: EmulatorInThread) -> None:
    agent.settings.write_text(agent.text + "[api]\nallow_token = true\n")
    agent.start()
    agent.await_connected()
    status, document = agent.client.ask("POST", "/token?life=900")
    assert status == 200 and document["token"].startswith(f"SharedAccessSignature sr={HUB}%2Fdevices%2F{DEVICE}&")
    assert emulator.service.hub_token_refusal(document["token"], time.time()) is None
    assert emulator.service.hub_token_refusal(document["token"], time.time() + 1500) is not None
    assert agent.client.ask("POST", "/token?life=901")[0] == 400


# --- signals


def stop_limit_s() -> int:
    """After so long systemd kills the service."""
    (found,) = re.findall(r"^TimeoutStopSec=(\d+)$", UNIT.read_text(), re.MULTILINE)
    return int(found)


def stored_connects(agent: RunningAgent) -> int:
    record = FileStore(str(agent.state_dir)).load(PROGRESS)
    progress = decode_progress(record.payload) if record else None
    return progress.connects if progress else 0


def test_who_stops_the_service_again_and_again_waits_no_longer_for_that(agent: RunningAgent) -> None:
    for _ in range(2):
        agent.start()
        agent.await_connected()
        assert stored_connects(agent) == 1
        assert agent.end()[0] == 0
        assert stored_connects(agent) == 0
    for connects in (1, 2):
        agent.start()
        agent.await_connected()
        agent.end(signal.SIGKILL)
        assert stored_connects(agent) == connects, "a crash counts"


def enroll_disabled(agent: RunningAgent, emulator: EmulatorInThread) -> bytes:
    key = SimulatedTpm(str(agent.folder / "tpm")).endorsement_key()
    emulator.service.enroll(Enrollment(DEVICE, key, enabled=False))
    return key


@pytest.mark.parametrize("state", ["connected", "connecting", "provisioning", "waiting", "halted", "provisioned"])
def test_sigterm_ends_it_in_every_state(state: str, agent: RunningAgent, emulator: EmulatorInThread) -> None:
    if state == "provisioning":
        emulator.script(Fault(operation="register", delay_s=60))
    elif state == "halted":
        enroll_disabled(agent, emulator)
    elif state == "waiting":
        agent.settings.write_text(agent.text.replace(emulator.url, "https://127.0.0.1:1") + "[retry]\n")
        agent.settings.write_text(agent.settings.read_text() + "registration_budget_s = 1\n")
    elif state == "connecting":
        emulator.fault({"operation": "connect", "silent": "before"})
    elif state == "provisioned":
        emulator.fault({"operation": "accept", "drop": "before"})
    agent.start()
    agent.await_state(state)
    time.sleep(0.2)
    status, took_s = agent.end()
    assert (status, took_s < stop_limit_s()) == (0, True), f"{took_s:.2f} s\n{agent.written}"
    assert "Traceback" not in agent.written


def test_sigterm_ends_it_while_the_hub_says_nothing_in_the_tls_handshake(agent: RunningAgent, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        agent.settings.write_text(
            agent.text.replace(agent.emulator.hub_connect_to, f"127.0.0.1:{silent.getsockname()[1]}")
        )
        agent.start()
        silent.settimeout(PATIENCE_S)
        connection, _ = silent.accept()
        with connection:
            time.sleep(0.3)
            status, took_s = agent.end()
    assert (status, took_s < stop_limit_s()) == (0, True), f"{took_s:.2f} s\n{agent.written}"


def test_sighup_makes_a_halted_device_ask_at_once(agent: RunningAgent, emulator: EmulatorInThread) -> None:
    key = enroll_disabled(agent, emulator)
    agent.start()
    found = agent.await_state("halted")
    assert found["until"] and found["lastError"]["remedy"]
    assert agent.command("status", exit_status=4)["error"]["code"] == found["lastError"]["code"]
    emulator.service.enroll(Enrollment(DEVICE, key, device_id=DEVICE))
    agent.send(signal.SIGHUP)
    agent.await_connected()


def test_a_start_with_the_corrected_scope_waits_for_nothing(agent: RunningAgent) -> None:
    agent.settings.write_text(agent.text.replace("0ne00000000", "0ne0BADC0DE"))
    for _ in range(2):
        agent.start()
        found = agent.await_status(lambda found: found["state"] in ("halted", "waiting"), "refused")
        agent.end()
    assert "failed before this start" in agent.written, "with the same scope the second start waits"
    assert found["next"], "and says what ends that"
    before = agent.written.count("failed before this start")
    agent.settings.write_text(agent.text)
    agent.start()
    agent.await_connected()
    assert agent.written.count("failed before this start") == before
    assert agent.end()[0] == 0


def test_nobodys_haste_ends_the_wait_that_dps_asked_for(agent: RunningAgent, emulator: EmulatorInThread) -> None:
    emulator.script(Fault(operation="register", status=429, headers={"Retry-After": "3600"}, times=1))
    agent.start()
    agent.await_state("waiting")
    for times in range(1, 6):
        agent.send(signal.SIGHUP)
        agent.await_text("were read again", times)
    agent.settings.write_text(agent.text + "[retry]\nregistration_budget_s = 800\n")
    agent.send(signal.SIGHUP)
    agent.await_text("were read again", 6)
    agent.await_state("waiting")
    for words in (("provision",), ("provision", "--force")):
        error = agent.command(*words, exit_status=3)["error"]
        assert error["code"] == "dps.throttled" and 3500 < error["retryAfterS"] <= 3600, error
    assert len(emulator.log) == 1 and agent.status()["state"] == "waiting"


def test_settings_that_a_registration_does_not_need_wait_for_its_end(
    agent: RunningAgent, emulator: EmulatorInThread
) -> None:
    """What DPS has granted so far, a challenge perhaps that a fleet queues for, is not thrown away for them."""
    emulator.script(Fault(operation="lookup", status=503, headers={"Retry-After": "2"}, times=2))
    agent.start()
    agent.await_state("provisioning")
    agent.settings.write_text(agent.text + "[fleet]\ndevices = 3\n")
    agent.send(signal.SIGHUP)
    agent.await_text("they count once the registration under way has ended")
    agent.await_connected()
    assert [entry.operation for entry in emulator.log].count("register") == 2, "the registration was begun anew"


def test_settings_that_wait_for_a_registration_are_forgotten_where_later_ones_are_refused(
    agent: RunningAgent, emulator: EmulatorInThread
) -> None:
    emulator.script(Fault(operation="lookup", status=503, headers={"Retry-After": "800"}))
    agent.start()
    agent.await_state("provisioning")
    agent.settings.write_text(agent.text + "[fleet]\ndevices = 3\n")
    agent.send(signal.SIGHUP)
    agent.await_text("they count once the registration under way has ended")
    for times in (1, 2):
        agent.settings.write_text("neither = 1\n")
        agent.send(signal.SIGHUP)
        agent.await_text("the new settings are refused, the old ones go on", times)
    assert agent.written.count("the old ones go on, not those that were read meanwhile: ") == 1
    agent.settings.write_text(agent.text)
    agent.send(signal.SIGHUP)
    agent.await_text("the settings were read again: no change")


def test_settings_that_a_registration_needs_end_it_at_once(agent: RunningAgent, emulator: EmulatorInThread) -> None:
    emulator.script(Fault(operation="lookup", status=503, headers={"Retry-After": "800"}))
    agent.start()
    agent.await_state("provisioning")
    agent.await_text("registers with DPS")
    agent.settings.write_text(agent.text.replace(f'"{DEVICE}"', '"press-08"'))
    agent.send(signal.SIGHUP)
    agent.await_text("registers with DPS", 2)


def test_a_registration_that_dps_does_not_want_yet_leaves_the_device_connected(
    agent: RunningAgent, emulator: EmulatorInThread
) -> None:
    agent.start()
    agent.await_connected()
    emulator.script(Fault(operation="register", status=429, headers={"Retry-After": "3600"}, times=1))
    agent.command("provision", "--force", exit_status=3)
    agent.await_connected(2)
    asked = len(emulator.log)
    error = agent.command("provision", "--force", exit_status=3)["error"]
    assert error["code"] == "dps.throttled" and error["retryAfterS"] > 3000
    assert emulator.invoke(DEVICE, "reprovision")[0] == 429
    assert len(emulator.log) == asked and agent.status()["connections"] == 2


def test_sighup_without_changes_does_not_shorten_the_wait_for_the_hub(
    agent: RunningAgent, emulator: EmulatorInThread
) -> None:
    emulator.fault({"operation": "connect", "connack": 3})
    agent.start()
    agent.await_text("connects again in")
    for times in range(1, 4):
        agent.send(signal.SIGHUP)
        agent.await_text("were read again", times)
    time.sleep(0.5)
    assert agent.written.count("connects again in") == 1


@pytest.mark.parametrize("wish", ["settings", "provision", "reset"])
def test_a_wish_does_not_wait_for_a_hub_that_says_nothing(
    wish: str, agent: RunningAgent, emulator: EmulatorInThread
) -> None:
    agent.start()
    agent.await_connected()
    emulator.fault({"operation": "connect", "silent": "before"})
    emulator.disconnect(DEVICE)
    agent.await_state("connecting")
    began_s = time.monotonic()
    if wish == "settings":
        agent.settings.write_text(agent.text.replace(f'"{DEVICE}"', '"press-08"'))
        agent.send(signal.SIGHUP)
        agent.await_text("this device is press-08")
    elif wish == "provision":
        assert agent.command("provision", "--force")["alreadyProvisioned"] is False
    else:
        assert agent.command("reset", "--yes")["erased"][0] == "identity"
    assert time.monotonic() - began_s < SOON_S, "it waited for the hub"


@pytest.mark.parametrize("wish", ["settings", "reset"])
def test_telemetry_under_way_is_answered_where_the_life_ends(
    wish: str, agent: RunningAgent, emulator: EmulatorInThread
) -> None:
    agent.start()
    agent.await_connected()
    emulator.fault({"operation": "telemetry", "silent": "after"})
    with ThreadPoolExecutor(1) as pool:
        began_s = time.monotonic()
        asked = pool.submit(agent.client.ask, "POST", "/telemetry", b"1")
        emulator.await_telemetry(1)
        if wish == "settings":
            agent.settings.write_text(agent.text + "[retry]\nregistration_budget_s = 800\n")
            agent.send(signal.SIGHUP)
        else:
            agent.command("reset", "--yes")
        status, document = asked.result(PATIENCE_S)
    assert (status, document["error"]["code"]) == (503, "agent.unacknowledged")
    assert "may or may not have it" in document["error"]["message"]
    assert time.monotonic() - began_s < SOON_S, "it waited for an acknowledgement that nobody waits for any more"


# --- the service alone


def bare_service(folder: Path) -> Service:
    """A service whose effects the test answers; nothing runs."""
    settings = folder / "config.toml"
    settings.write_text(
        f'id_scope = "0ne00000000"\nregistration_id = "{DEVICE}"\nstate_dir = "{folder / "state"}"\n'
        f'runtime_dir = "{folder / "run"}"\n[tpm]\nbackend = "wire"\ntcti = "swtpm:host=127.0.0.1,port=1"\n'
    )
    return Service(lambda: load(settings, environ={}), Journal())


def test_our_own_bug_in_a_command_ends_the_service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    service = bare_service(tmp_path)

    def fails(_command: Command) -> Iterator[None]:
        raise Broken("agent.bug", "impossible")
        yield

    monkeypatch.setattr(service, "_do", fails)
    service._commands.append(Command(1, "token"))
    with pytest.raises(Broken):
        list(service._obey())


def test_a_reset_erases_by_the_worker_and_leaves_nothing_that_would_be_stored_again(tmp_path: Path) -> None:
    service = bare_service(tmp_path)
    service._begin_life()
    service._driver = Driver(service._life)
    service._life.patience._stored = Progress(0, 0, 0, False, "", "", 3, 0)
    assert any(isinstance(effect, Commit) for effect in Driver(service._life).end(on_purpose=True))
    done = list(service._do(Command(1, "reset")))
    assert [effect for effect in done if isinstance(effect, Erase)] == [Erase(PROGRESS), Erase(IDENTITY)]
    assert not any(isinstance(effect, Commit) for effect in service._driver.end(on_purpose=True))


def test_the_journal_says_that_an_older_copy_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    service = bare_service(tmp_path)
    service._begin_life()
    service._life.rolled_back = True
    for _ in range(2):
        list(service._look(Sleep(1.0, "")))
    assert capfd.readouterr().err.count(ROLLED_BACK) == 1


def test_a_connection_is_not_waited_for_where_a_registration_was_asked_for_just_before_it_was_dialled(
    tmp_path: Path,
) -> None:
    """The command is done between two effects: by then it is no longer among those that are waiting."""
    service = bare_service(tmp_path)
    assert not service._connects_in_vain()
    service._life.state = CONNECTING
    service._commands.append(Command(1, "provision", force=True))
    assert service._connects_in_vain(), "asked for meanwhile"
    list(service._obey())
    assert not service._commands and service._connects_in_vain(), "asked for just before"


def test_the_socket_is_named_so_that_it_is_found_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    service = bare_service(Path("."))
    shown: list[Any] = []
    monkeypatch.setattr(service, "_api", SimpleNamespace(show=shown.append))
    service._begin_life()
    service._show("starting", None)
    assert shown[-1].status["socket"] == f"{tmp_path}/run/api.sock"
    assert shown[-1].status["stateDir"] == f"{tmp_path}/state"


def test_an_id_of_the_life_before_means_nothing_in_the_next_one(tmp_path: Path) -> None:
    service = bare_service(tmp_path)
    service._life.serial, service._life.patience.dps_not_before_s = 7, 1e9
    service._begin_life()
    assert (service._life.serial, service._life.patience.dps_not_before_s) == (7, 1e9)


def test_what_is_posted_while_a_life_ends_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    service = bare_service(tmp_path)
    service._begin_life()
    posted: list[Event] = []
    monkeypatch.setattr(service._equipment.runner, "post", lambda event: not posted.append(event))
    event = SendTelemetry(5, {}, b"x", 0, 1)
    assert service._post(event) and posted == [event]
    service._leaving = True
    assert not service._post(event) and posted == [event]


def test_what_was_given_back_is_not_given_back_again_before_it_may_be_in_use() -> None:
    def exchange() -> Iterator[Any]:
        wait = NextEvent(1e9)
        for effect in (wait, Tell(TelemetryDone(1, True, True)), wait, wait, Random(), wait):
            _: Any = yield effect

    driven = _Driver(readers=lambda: 0).drive(exchange())
    asked: list[str] = []
    effect = driven.send(None)
    with contextlib.suppress(StopIteration):
        while True:
            asked.append(effect.what if isinstance(effect, Release) else type(effect).__name__)
            effect = driven.send(100.0)
    given_back = ["Uptime", "TPM", "DPS", "NextEvent"]
    # The first wait of all is answered by who reads.
    assert asked == ["Tell", *given_back, "NextEvent", "Random", *given_back]


def test_a_command_is_taken_back_once_and_only_before_it_was_begun(tmp_path: Path) -> None:
    service = bare_service(tmp_path)
    command = Command(1, "token")
    service._take_command(command)
    assert service._take_back(command) and not service._take_back(command) and not service._commands


def test_a_wake_that_is_heard_before_its_post_returns_does_not_silence_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = bare_service(tmp_path)
    service._begin_life()
    told: list[object] = []

    def hear(event: Any) -> bool:
        """The service's own thread: it waits, gets the event, and is back before `post` is."""
        waits = service._next_event(NextEvent(1e9))
        assert next(waits) == NextEvent(1e9)
        assert waits.send(event) == NextEvent(1e9), "it asks again, and the driver says who reads now"
        told.append(service._readers)
        return True

    monkeypatch.setattr(service._equipment.runner, "post", hear)
    for number in (1, 0, 1):
        assert service._post(Readers(number))
    assert told == [1, 0, 1]


def test_whatever_comes_while_the_service_is_busy_is_one_wake_and_one_that_was_refused_is_posted_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = bare_service(tmp_path)
    service._begin_life()
    posted: list[Any] = []
    runner = service._equipment.runner
    with monkeypatch.context() as patch:
        patch.setattr(runner, "post", lambda _event: False)
        service._take_command(Command(1, "status"))
    monkeypatch.setattr(runner, "post", lambda event: not posted.append(event))
    for number in range(200):
        service._take_command(Command(number, "status"))
        service._post(Readers(number % 2))
    assert len(posted) == 1
    done: list[int] = []
    monkeypatch.setattr(service, "_answer", lambda command, *_answer: done.append(command.request_id))
    assert next(service._next_event(NextEvent(1e9))) == NextEvent(1e9)
    assert len(done) == 201, "they are done before it waits, whoever has taken their wake"
    service._take_command(Command(201, "status"))
    assert len(posted) == 2


def test_what_is_queued_for_the_hub_ends_with_the_life(tmp_path: Path) -> None:
    service = bare_service(tmp_path)
    told: list[Message] = []
    service._tell = lambda message: bool(told.append(message))  # type: ignore[method-assign]
    queued: list[Event] = [SendTelemetry(5, {}, b"x", 0, 1), MessageDone(3), SendTelemetry(6, {}, b"y", 0, 1)]
    service._begin_life()
    leaving = service._leave_hub()
    answer: object = None
    with pytest.raises(StopIteration):
        while True:
            effect = leaving.send(answer)
            answer = queued.pop(0) if isinstance(effect, NextEvent) and queued else None
    assert told == [TelemetryDone(5, False, False), TelemetryDone(6, False, False)] and queued == []


def test_sighup_with_wrong_settings_is_refused_and_the_old_ones_go_on(
    agent: RunningAgent, emulator: EmulatorInThread
) -> None:
    agent.start()
    agent.await_connected()
    for broken, word in (
        (agent.text.replace("id_scope", "id_scoop"), "id_scoop"),
        ("]", "expected TOML"),
        (agent.text.replace("/run", "/walk"), "runtime_dir changes with a restart only"),
    ):
        agent.settings.write_text(broken)
        before = agent.written.count("are refused")
        agent.send(signal.SIGHUP)
        agent.await_text("are refused", before + 1)
        assert word in agent.written.splitlines()[-1]
    assert agent.client.ask("POST", "/telemetry", b"1")[0] == 200
    assert agent.status()["connections"] == 1


def test_sighup_with_other_settings_goes_on_with_them(agent: RunningAgent, emulator: EmulatorInThread) -> None:
    agent.start()
    agent.await_connected()
    asked = len(emulator.log)
    agent.settings.write_text(agent.text + "[retry]\nregistration_budget_s = 800\n")
    agent.send(signal.SIGHUP)
    agent.await_text("connected to", 2)
    assert len(emulator.log) == asked
    agent.settings.write_text(agent.text.replace(f'"{DEVICE}"', '"press-08"'))
    agent.send(signal.SIGHUP)
    agent.await_status(lambda found: found["connected"] and found["deviceId"] == "press-08", "press-08")
    agent.await_text(f"; the device leaves {HUB}: the stored assignment is for registration_id '{DEVICE}'")
    status, took_s = agent.end()
    assert (status, took_s < stop_limit_s()) == (0, True)


# --- systemd


def listen(systemd: socket.socket, heard: list[str], ended: threading.Event) -> None:
    """Notes the first line of each message."""
    while not ended.is_set():
        with contextlib.suppress(TimeoutError):
            heard.append(systemd.recv(4096).decode().split("\n")[0])


def test_systemd_hears_ready_status_watchdog_and_stopping(agent: RunningAgent, tmp_path: Path) -> None:
    heard: list[str] = []
    ended = threading.Event()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.settimeout(0.2)
        listener = threading.Thread(target=listen, args=(systemd, heard, ended))
        listener.start()
        agent.start(environ={"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "2000000"})
        agent.await_connected()
        time.sleep(2.5)
        agent.send(signal.SIGHUP)
        agent.await_text("were read again")
        agent.end()
        ended.set()
        listener.join()
    assert heard[0] == "READY=1" and heard[-1] == "STOPPING=1"
    assert heard.count("WATCHDOG=1") >= 3
    assert f"STATUS=connected: connected to {HUB}" in heard
    assert heard.index("RELOADING=1") < len(heard) - 1 - heard[::-1].index("READY=1")


def test_a_hub_that_stops_reading_stalls_neither_socket_nor_watchdog_nor_sigterm(
    agent: RunningAgent, emulator: EmulatorInThread, tmp_path: Path
) -> None:
    heard: list[str] = []
    ended = threading.Event()
    with Switchboard(emulator.hub_connect_to, True) as hub, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.settimeout(0.2)
        listener = threading.Thread(target=listen, args=(systemd, heard, ended))
        listener.start()
        agent.settings.write_text(agent.text.replace(emulator.hub_connect_to, hub.address))
        agent.start(environ={"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "2000000"})
        agent.await_connected()
        hub.fall_deaf()
        with contextlib.ExitStack() as held:
            for _ in range(9):  # as much as may be under way, and more than the kernel keeps for who does not read
                program = held.enter_context(agent.client.connect())
                program.sendall(b"POST /telemetry HTTP/1.1\r\nContent-Length: 260000\r\n\r\n" + bytes(260_000))
            before, until_s = heard.count("WATCHDOG=1"), time.monotonic() + SOON_S
            while heard.count("WATCHDOG=1") < before + 5:
                assert agent.status()["connected"] and time.monotonic() < until_s
                time.sleep(0.05)
            status, took_s = agent.end()
        ended.set()
        listener.join()
    assert (status, took_s < stop_limit_s()) == (0, True), f"{took_s:.2f} s\n{agent.written}"
    assert "dps-agent ends" in agent.written, "it ended in order, and was not ended"


# --- what it leaves and shows


def test_modes_and_no_secret_in_anything_it_writes(agent: RunningAgent, emulator: EmulatorInThread) -> None:
    agent.start("-v")
    agent.await_connected()
    agent.client.ask("POST", "/telemetry", b"1")
    agent.command("provision", "--force")
    agent.await_connected(2)
    time.sleep(1.1)  # the state file, which `status` reads, is written once a second
    shown = json.dumps([agent.status(), agent.client.ask("GET", "/assignment"), agent.command("status")])
    shown += (agent.runtime_dir / "state.json").read_text() + agent.written
    modes = {path.name: stat.S_IMODE(path.lstat().st_mode) for path in agent.runtime_dir.iterdir()}
    assert modes == {"api.sock": 0o600, "api.sock.root": 0o600, "state.json": 0o644}
    assert stat.S_IMODE(agent.state_dir.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in agent.state_dir.iterdir()} == {0o600}
    agent.end()
    stored = FileStore(str(agent.state_dir)).load(IDENTITY)
    key = emulator.service.hub_key(HUB, DEVICE)
    assert stored is not None and key is not None
    shown += agent.written
    wrapped = base64.b64decode(json.loads(stored.payload[:-32])["wrappedKey"])
    for secret in (key, wrapped, stored.payload[-32:]):
        for form in (base64.b64encode(secret).decode(), secret.hex(), secret.hex().upper(), repr(secret)):
            assert form not in shown
    assert "sig=" not in shown and "authenticationKey" not in shown
    assert "register → 401 challenge" in shown, "the verbose lines are missing, so this looked at too little"


@pytest.mark.parametrize("backend", ["wire", "esys"])
def test_it_lives_on_a_tpm_and_leaves_nothing_in_it(backend: str, tmp_path: Path, emulator: EmulatorInThread) -> None:
    with Swtpm(tmp_path / "swtpm") as machine:
        tpm = f'backend = "{backend}"\ntcti = "{machine.tcti}"\npersist_at = 0x81000100'
        with RunningAgent(tmp_path, emulator, tpm) as agent:
            agent.start()
            agent.await_connected()
            assert agent.client.ask("POST", "/telemetry", b"1")[0] == 200
            agent.command("provision", "--force")
            agent.await_connected(2)
            token = agent.command("token", "--life", "60")["token"]
            assert emulator.service.hub_token_refusal(token, time.time()) is None
            assert agent.end()[0] == 0
            warnings = [line for line in agent.written.splitlines() if "warning" in line]
            assert [line for line in warnings if " is on " not in line] == []  # what lies under /tmp is no matter here
            assert "persist_at" not in agent.written
            assert machine.leftovers() == []


def test_a_cleared_tpm_is_used_without_the_passwords_of_the_settings_and_that_is_said_once(
    tmp_path: Path, emulator: EmulatorInThread
) -> None:
    password = tmp_path / "password"
    password.touch(0o600)
    password.write_bytes(b"hunter2")
    with Swtpm(tmp_path / "swtpm") as machine:
        tpm = f'backend = "wire"\ntcti = "{machine.tcti}"\nendorsement_auth_file = "{password}"'
        with RunningAgent(tmp_path, emulator, tpm) as agent:
            agent.start()
            agent.await_connected()
            agent.command("provision", "--force")
            agent.await_connected(2)
            agent.end()
            assert agent.written.count("endorsement_auth_file is set, but its hierarchy in the TPM has no") == 1
            assert machine.leftovers() == []


def test_a_key_that_other_programs_do_not_find_is_put_right_by_the_next_connection_or_start(
    tmp_path: Path, emulator: EmulatorInThread
) -> None:
    def kept(connections: int) -> bool:
        agent.await_text("connected to", connections)
        stored = FileStore(str(agent.state_dir)).load(IDENTITY)
        assert stored is not None
        wrapped_key = base64.b64decode(json.loads(stored.payload[:-32])["wrappedKey"])
        public = machine.public_areas().get(0x81000100, b"")[: len(unwrap(wrapped_key)[0])]
        return public == unwrap(wrapped_key)[0]

    with Swtpm(tmp_path / "swtpm") as machine, TpmTap(machine.port) as tap:
        tpm = f'backend = "wire"\ntcti = "{tap.tcti}"\npersist_at = 0x81000100'
        with RunningAgent(tmp_path, emulator, tpm) as agent:
            agent.start()
            assert kept(1)
            tap.refuse(0x923, command="EvictControl")  # TPM_RC_NV_UNAVAILABLE, once
            agent.command("provision", "--force")
            assert kept(2) and agent.written.count("the hub key is not at persist_at") == 1
            tap.forget()
            tap.refuse(0x14B, command="EvictControl", skip=1, times=1000)  # TPM_RC_NV_SPACE
            agent.command("provision", "--force")
            assert not kept(3) and agent.written.count("the hub key is not at persist_at") == 2
            assert agent.end()[0] == 0
            tap.forget()
            agent.start()
            assert kept(4)
            agent.command("reset", "--yes")
            assert kept(5)
            assert agent.end()[0] == 0
            assert agent.written.count("persist_at") == 2, agent.written
            assert machine.leftovers() == []


def test_sigterm_ends_it_while_the_tpm_hangs(tmp_path: Path, emulator: EmulatorInThread) -> None:
    with (
        Swtpm(tmp_path / "swtpm") as machine,
        TpmTap(machine.port) as tap,
        RunningAgent(tmp_path, emulator, f'backend = "wire"\ntcti = "{tap.tcti}"') as agent,
    ):
        tap.hang()
        agent.start()
        agent.await_state("provisioning")
        assert tap.hanging.wait(PATIENCE_S)
        status, took_s = agent.end()
    assert (status, took_s < stop_limit_s()) == (0, True), f"{took_s:.2f} s\n{agent.written}"


def test_leaks_nothing_over_many_reconnects(agent: RunningAgent, emulator: EmulatorInThread) -> None:
    agent.start()
    agent.await_connected()

    def held() -> tuple[int, int]:
        assert agent.process is not None
        process: Any = Path(f"/proc/{agent.process.pid}")
        return len(list((process / "fd").iterdir())), len(list((process / "task").iterdir()))

    for count in range(2, 5):
        agent.command("provision", "--force")
        agent.await_connected(count)
    before = held()
    for count in range(5, 9):
        agent.command("provision", "--force")
        agent.await_connected(count)
    time.sleep(0.2)
    after = held()
    assert after[0] <= before[0] + 1 and after[1] <= before[1]
