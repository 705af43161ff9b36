"""An example of a program with the agent in it: it gets the device its hub, and blinks meanwhile."""

import asyncio
import os

from dps_board import parts
from dps_board.config import CONFIG_FILE, load
from dps_board.runner import Agent
from dps_hal.errors import DpsError
from dps_hal.platform import declare_random_source

BLINK_S = 0.02


async def run(path: str = CONFIG_FILE) -> None:
    """Provisions this device by the settings in `path`; RetryLater and the like are the agent's own business."""
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
    joining = asyncio.create_task(parts.keep_joined(config))
    living = asyncio.create_task(agent.run())
    shown = ""
    while not living.done():
        await asyncio.sleep(BLINK_S)  # here the program does its own work
        if shown != agent.reason:
            shown = agent.reason
            print(f"{agent.state}: {shown}")
    await living  # raises what ended it
    joining.cancel()
    if agent.assignment is not None:
        print(f"{agent.assignment.device_id} belongs to {agent.assignment.assigned_hub}")


def main() -> None:
    """Runs until the device has its hub."""
    try:
        asyncio.run(run())
    except DpsError as error:
        print(f"{error.code}: {error.message}")
