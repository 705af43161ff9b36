"""A program of few lines with the agent in it, as a firmware engineer writes it: MicroPython only.

`main` takes the paths of the settings and of the flash, and a word: `once` is one wake of a device that sleeps, which
sends the messages behind it, and says what it wrote to the flash and how long it took; `stays`
a program that reports, reads messages in a loop, and ends with the message "stop", `product` a Plug and Play device,
which ends once it has answered the second version of its desired properties. Prints a JSON line at the end.
"""

import asyncio
import json
import os
import sys

import board_app  # type: ignore[import-not-found]
from board_life import FileFlash, mount  # type: ignore[import-not-found]

from dps_agent import pnp
from dps_board.runner import Agent
from dps_hal.errors import DpsError
from dps_hal.platform import ms_since, ticks_ms

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


QUIET_S = 2  # that nothing comes for, before the device goes to sleep


async def wake(agent: Agent, said: "dict[str, Any]") -> None:
    """Connects, sends its messages, takes what waits, and is asleep.

    `awakeMs` is without what is waited for on purpose.
    """
    sleep = agent.answers["Sleep"]
    waited_ms = QUIET_S * 1000

    async def noted_sleep(delay_s: float, reason: str) -> None:
        nonlocal waited_ms
        began_ms = ticks_ms()
        await sleep(delay_s, reason)
        waited_ms += ms_since(began_ms)

    commit = agent.answers["Commit"]

    def noted_commit(record: str, payload: bytes) -> "Any":
        said["commits"].append(record)
        return commit(record, payload)

    agent.answers["Sleep"], agent.answers["Commit"] = noted_sleep, noted_commit
    agent.on_message = lambda properties, payload: said["messages"].append((payload or b"").decode())
    began_ms = ticks_ms()
    await agent.run_once([payload.encode() for payload in said["sends"]], 60, QUIET_S)
    said["awakeMs"] = ms_since(began_ms) - waited_ms
    said["desired"] = agent.desired


async def stay(agent: Agent, said: "dict[str, Any]") -> None:
    """Reports, and reads messages until one says stop; for each it reports the desired properties as they are then."""
    messages = agent.messages()
    living = asyncio.create_task(agent.run())
    try:
        await agent.report({"early": True})
    except DpsError as error:
        said["early"] = error.code
    await agent.publish(b"first", wait=True)
    await agent.publish(b"fast", qos=0)
    said["versions"] = [
        await agent.report({"valve": {"open": True, "turns": 3}}),
        await agent.report({"valve": {"turns": None}}),
    ]
    flawed: list[dict[str, Any]] = [{"dpsAgent": {}}, {"a b": 1}, {"k": "x" * 5000}]
    for properties in flawed:
        try:
            await agent.report(properties)
        except ValueError as error:
            said["refused"].append(str(error))
    async for message in messages:
        said["messages"].append((message.payload or b"").decode())
        if message.payload == b"stop":
            break
        await agent.report({"heard": message.properties.get("n", ""), "desired": (agent.desired or {}).get("rate", 0)})
    agent.stop()
    await living
    try:
        await agent.connected()
    except DpsError as error:
        said["late"] = error.code


async def serve_as_product(agent: Agent, said: "dict[str, Any]") -> None:
    """Does what the model has: answers what is desired, sends telemetry, answers methods, reports what it hears."""
    over = asyncio.Event()

    async def hear(properties: "dict[str, str]", payload: "bytes | None") -> None:
        await agent.report({"heard": {"text": (payload or b"").decode(), "level": properties["level"]}})

    async def obey(version: int, changed: "dict[str, Any] | None", whole: bool) -> None:
        if changed is None:
            return
        if "thermostat1" in changed:
            await agent.report(pnp.answers(agent.desired or {}, pnp.DONE, "done"))
            await agent.report({"firmware": {"version": "1.2"}})
            await agent.publish(b'{"temperature":21.5}', pnp.telemetry_of("thermostat1"))
            properties = {"$.mid": "m-1", "unit": "°C & more", "$.ct": "application/json", "$.ce": "utf-8"}
            await agent.publish(b'{"t":21.5}', properties)
        elif "rate" in changed:
            await agent.report({"rate": pnp.answer(changed["rate"], pnp.DONE, version, "done")})
            over.set()

    def call(name: str, value: "Any") -> "tuple[int, Any]":
        if pnp.command(name) == ("thermostat1", "getMaxMinReport"):
            return 200, {"max": 22.5}
        return 207, {"echo": value}

    agent.on_message, agent.on_desired, agent.on_method = hear, obey, call
    living = asyncio.create_task(agent.run())
    await over.wait()
    agent.stop()
    await living


PROGRAMS = {"once": wake, "stays": stay, "product": serve_as_product}


def main(config_file: str, flash_file: str, word: str, *payloads: str) -> None:
    """Runs one of them."""
    sys.modules["machine"] = board_app
    flash = FileFlash(flash_file)
    mount(flash)
    before = flash.erased, flash.programmed
    agent = Agent.from_config(os.urandom, config_file)
    loaded = [name for name in sys.modules if name[:4] == "dps_"]
    said: dict[str, Any] = {
        "loaded": loaded,
        "messages": [],
        "refused": [],
        "commits": [],
        "sends": payloads or ("1", "2"),
    }
    asyncio.run(asyncio.wait_for(PROGRAMS[word](agent, said), 90))
    said["flash"] = flash.erased - before[0], flash.programmed - before[1]
    print(json.dumps(said))
