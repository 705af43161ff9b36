"""`dps_agent.client` with the real service: what ends, the service or its hub, loses nothing and changes no order."""

import json
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from dps_agent.client import Spool, acknowledged
from support.cloud.emulator import EmulatorInThread
from support.programs.client_doors import PATIENCE_S, opened
from support.programs.running_agent import RunningAgent
from support.programs.tools import until

DEVICE = "press-07"
MESSAGES = 60


@pytest.fixture
def agent(agent: RunningAgent) -> RunningAgent:
    """The device, connected."""
    agent.start()
    agent.await_connected()
    return agent


@pytest.mark.parametrize("door", ["threads", "asyncio"])
def test_a_spool_loses_nothing_while_service_and_hub_come_and_go(
    door: str, agent: RunningAgent, emulator: EmulatorInThread, tmp_path: Path
) -> None:
    def disturb() -> None:
        for number in range(3):
            arrived = len(emulator.telemetry(DEVICE))
            assert until(lambda arrived=arrived: len(emulator.telemetry(DEVICE)) > arrived, PATIENCE_S)
            if number == 1:
                emulator.disconnect(DEVICE)
            else:
                agent.end(signal.SIGKILL)
                agent.start()
            agent.await_connected()

    with opened(door, agent.client.path, spool=Spool(tmp_path / "spool")) as client:
        disturbance = threading.Thread(target=disturb)
        disturbance.start()
        for number in range(MESSAGES):
            client.send({"n": number})
            time.sleep(0.02)
        disturbance.join(3 * PATIENCE_S)
        client.send({"n": MESSAGES})
        client.flush(2 * PATIENCE_S)
    found = emulator.telemetry(DEVICE)
    numbers = [json.loads(message["payload"])["n"] for message in found]
    once = dict.fromkeys(numbers)
    assert list(once) == list(range(MESSAGES + 1)), "nothing is lost, and nothing overtakes"
    assert numbers == sorted(numbers), "what came twice came right away"
    names = {message["properties"]["$.mid"] for message in found}
    assert len(names) == len(once), "what came twice has one message id"


@pytest.mark.parametrize("door", ["threads", "asyncio"])
def test_desired_properties_and_methods_are_served_over_a_restart_of_the_service(
    door: str, agent: RunningAgent, emulator: EmulatorInThread
) -> None:
    with opened(door, agent.client.path) as client:
        seen: list[int] = []
        client.method("add")(sum)

        @client.on_desired
        def wanted(desired: Any) -> None:
            if "interval" in desired.whole:
                seen.append(desired.whole["interval"])

        client.start()
        assert until(lambda: emulator.invoke(DEVICE, "add", [1, 2])[0] == 200, PATIENCE_S)
        emulator.set_desired(DEVICE, {"interval": 1})
        assert until(lambda: seen == [1], PATIENCE_S)
        agent.end(signal.SIGKILL)
        agent.start()
        agent.await_connected()
        assert until(lambda: emulator.invoke(DEVICE, "add", [1, 2]) == (200, 3), PATIENCE_S)
        emulator.set_desired(DEVICE, {"interval": 2})
        assert until(lambda: seen == [1, 2], PATIENCE_S)
        report = {"interval": acknowledged(2, client.twin().desired["$version"])}
        version = client.report(report)
    twin = emulator.twin(DEVICE)
    assert twin["reported"]["interval"] == report["interval"] and twin["reported"]["$version"] == version
