"""An example of a program with the agent in it: it sends what it measures, answers a method, and blinks meanwhile."""

import asyncio
import gc
import os

from dps_agent.lifecycle import CONNECTED
from dps_board import parts
from dps_board.config import CONFIG_FILE, load
from dps_board.runner import Agent
from dps_hal.errors import DpsError, RetryLater
from dps_hal.platform import declare_random_source

BLINK_S = 0.02
MEASURE_EVERY_S = 60


async def run(path: str = CONFIG_FILE) -> None:
    """Keeps this device at its hub by the settings in `path`; RetryLater and the like are the agent's own business."""
    # ESP32, RP2350, STM32 and i.MX RT feed it from a hardware generator, RP2040 from its ring oscillator.
    declare_random_source(os.urandom)
    config = load(path)
    feed = parts.make_watchdog(config)
    agent = Agent(
        config,
        parts.make_tpm(config, feed),
        parts.make_store(config),
        parts.make_clock(config, feed),
        on_state=parts.make_led(config),
        watchdog=feed,
    )
    agent.on_message = on_message
    agent.on_method = on_method
    joining = asyncio.create_task(parts.keep_joined(config))
    measuring = asyncio.create_task(measure(agent))
    living = asyncio.create_task(agent.run())
    shown = ""
    while not living.done():
        await asyncio.sleep(BLINK_S)  # here the program does its own work
        if shown != agent.reason:
            shown = agent.reason
            print(f"{agent.state}: {shown}")
    joining.cancel()
    measuring.cancel()
    await living  # raises what ended it


async def measure(agent: Agent) -> None:
    """Sends a value every minute while there is a hub; a program of your own may keep what is not sent."""
    while True:
        if agent.state != CONNECTED:
            await asyncio.sleep(1)
            continue
        try:
            await agent.publish(b'{"freeHeap":%d}' % free_heap(), {"$.ct": "application/json", "$.ce": "utf-8"})
        except RetryLater as error:
            print(error.message)
        await asyncio.sleep(MEASURE_EVERY_S)


def free_heap() -> int:
    """Bytes."""
    return gc.mem_free()  # type: ignore[attr-defined,no-any-return]


def on_message(properties: "dict[str, str]", payload: "bytes | None") -> None:
    """A message from the cloud; it is done with once this returns."""
    print(f"message {properties}: {payload!r}")


def on_method(name: str, value: object) -> "tuple[int, object]":
    """A direct method: the status and the value of the answer."""
    if name == "free-heap":
        return 200, {"freeHeap": free_heap()}
    return 404, {"message": f"there is no method '{name}'"}


def main() -> None:
    """Runs until something ends the program."""
    try:
        asyncio.run(run())
    except DpsError as error:
        print(f"{error.code}: {error.message}")
