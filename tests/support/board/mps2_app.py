"""A program on the emulated board: joins the Ethernet, keeps the device at its hub, and tells what it costs.

Each message of telemetry is one JSON object of numbers. The methods: `numbers` answers with them, `hang` lets the
processor spin so that the watchdog bites, `echo` answers what it gets. A failing program resets the board, as the
example does.
"""

import asyncio
import gc
import json
import os
import sys
import time

import machine
import mps2  # type: ignore[import-not-found]  # the image's own module, of mps2_board/start.c
import network

from dps_agent.lifecycle import PROVISIONING
from dps_board.memory import forget
from dps_board.runner import Agent
from dps_hal.errors import RetryLater
from dps_hal.platform import declare_random_source

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

SMALL_HEAP = 160 * 1024  # where garbage is not to lie between what stays, see micropython/README.md
GARBAGE_BYTES = 4096
LIVES = "/lives"  # how often the board has started, so that a test tells a reset from a reconnect
RESET_AFTER_S = 2
MINUTE_MS = 60_000
SILENT = "10.0.2.99"  # nobody has this address
_COSTLY = ("Http", "ImportKey", "Sign", "Commit")  # effects behind which the heap is looked at

most = [0]  # bytes of the heap in use behind such an effect of a registration


def made_agent() -> Agent:
    """As `Agent.from_config` makes it, and it tells what its effects leave in use."""

    def observe(effect: object, _answer: object) -> None:
        if agent.state == PROVISIONING and type(effect).__name__ in _COSTLY:
            gc.collect()
            most[0] = max(most[0], gc.mem_alloc())  # type: ignore[attr-defined]

    from dps_board import parts
    from dps_board.config import load

    declare_random_source(os.urandom)
    config = load()
    feed = parts.make_watchdog(config)
    clock, signer = parts.make_clock(config, feed), parts.make_signer(config, feed)
    agent = Agent(config, signer, parts.make_store(config), clock, watchdog=feed, observe=observe)
    forget("dps_board.parts", "dps_board.config")
    return agent


def numbers(agent: Agent, life: int) -> "dict[str, Any]":
    """What is known about this life."""
    hub = agent.hub
    return {
        "free": gc.mem_free(),  # type: ignore[attr-defined]
        "inUse": gc.mem_alloc(),  # type: ignore[attr-defined]
        "registering": most[0],
        "life": life,
        "stack": mps2.stack_used(),
        "gapMs": mps2.longest_gap_ms(),
        "allocations": mps2.allocations(),
        "flashSteps": mps2.flash_steps(),
        "upMs": time.ticks_ms(),  # type: ignore[attr-defined]
        "handshakes": [agent.connection.link.handshakes, hub.connection.link.handshakes if hub else 0],
        "version": ".".join([str(part) for part in sys.implementation.version[:3]]),
    }


def count_life() -> int:
    """The number of this life."""
    try:
        with open(LIVES) as file:
            number = int(file.read()) + 1
    except (OSError, ValueError):
        number = 1
    with open(LIVES, "w") as file:
        file.write(str(number))
    return number


async def send(agent: Agent, life: int) -> None:
    """Telemetry every second while there is a hub."""
    while True:
        try:
            gc.collect()
            await agent.publish(json.dumps(numbers(agent, life)).encode(), wait=True)
        except RetryLater as error:
            print(error.code)
        await asyncio.sleep(1)


async def run(life: int) -> None:
    """One life, by its number."""
    lan = network.LAN()
    lan.active(True)
    if mps2.setting("deaf"):
        while not lan.isconnected():
            await asyncio.sleep(0.1)
        address, mask, gateway, _ = lan.ifconfig()
        lan.ifconfig((address, mask, gateway, SILENT))
    agent = made_agent()

    def on_method(name: str, value: object) -> "tuple[int, object]":
        if name == "hang":
            while True:
                pass
        return 200, numbers(agent, life) if name == "numbers" else value

    agent.on_method = on_method
    agent.on_message = lambda properties, payload: print("message", len(payload or b""))
    agent.on_desired = lambda version, properties, whole: print("desired", version)
    sending = asyncio.create_task(send(agent, life))
    living = asyncio.create_task(agent.run())
    shown, minutes = ("", ""), 0
    while not living.done():
        await asyncio.sleep(0.02)
        if time.ticks_ms() // MINUTE_MS != minutes:  # type: ignore[attr-defined]
            minutes = time.ticks_ms() // MINUTE_MS  # type: ignore[attr-defined]
            print("minute", minutes)
        if shown != (agent.state, agent.reason):
            if shown[0] != agent.state:
                mps2.hurry(mps2.setting(agent.state))
                gc.collect()
                in_use = gc.mem_alloc()  # type: ignore[attr-defined]
                print("at", agent.state, mps2.allocations(), mps2.flash_steps(), in_use)
            shown = agent.state, agent.reason
            print(agent.state + ": " + agent.reason)
    sending.cancel()
    await living


def main() -> None:
    """Runs until the end, and resets the board."""
    if gc.mem_free() < SMALL_HEAP:  # type: ignore[attr-defined]
        gc.threshold(GARBAGE_BYTES)  # type: ignore[attr-defined]
    try:
        life = count_life()
        print("life", life, mps2.allocations())
        asyncio.run(run(life))
    except Exception as error:
        sys.print_exception(error)  # type: ignore[attr-defined]
    time.sleep(RESET_AFTER_S)
    machine.reset()
