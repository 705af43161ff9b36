"""A board's life at its hub, with a program that measures, listens and answers: MicroPython only.

`main` takes the paths of the settings and of the flash, and words: `seconds=N` ends the life at the latest after N s;
`until=N` ends it when so many measurements are accepted; `token_life=N` makes tokens that live so many seconds; `early`
publishes before the start; `every=MS` is the time between two measurements; `heap` samples the heap in use; `rtc=FILE`
is where to write the time when the agent sets the clock; `full` lets the heap have no room for the logic once, when it
is connected. The methods `echo`, `slow` (a coroutine), `broken` and `stop` are answered. Prints a JSON line for each
state, and a last one with the sums.
"""

import asyncio
import gc
import json
import os
import time

from board_life import FileFlash, Heap, NamedAnswers, mount  # type: ignore[import-not-found]

from dps_agent.lifecycle import CONNECTED
from dps_agent.progress import decode_progress
from dps_agent.settings import Settings
from dps_board.clock import BoardClock
from dps_board.config import load
from dps_board.parts import make_store, make_tpm
from dps_board.runner import Agent
from dps_hal.contracts import PROGRESS
from dps_hal.errors import DpsError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


class Program:
    """What a firmware engineer would write round the agent."""

    def __init__(self, agent: Agent, every_ms: int, until: int, heap: "Any") -> None:
        self.agent = agent
        self.accepted = 0
        self.refused: list[str] = []
        self.messages: list[object] = []
        self.desired: list[object] = []
        self._every_ms = every_ms
        self._until = until  # so many are sent; 0: without end
        self._stopping = False
        self._heap = heap
        agent.on_message = self.on_message
        agent.on_method = self.on_method
        agent.on_desired = self.on_desired

    async def measure(self) -> None:
        """Sends the numbers from 1 on, each until it is accepted."""
        number = 1
        while not self._stopping:
            await asyncio.sleep_ms(self._every_ms)  # type: ignore[attr-defined]
            if self._stopping or self.agent.state != CONNECTED:
                continue
            try:
                await self.agent.publish(b"%d" % number, {"unit": "°C"}, 120)  # longer than any reconnect takes
            except DpsError as error:
                self.refused.append(error.code)
                continue
            self.accepted = number
            if number == self._until:
                self.agent.stop()
            number += 1

    def on_message(self, properties: "dict[str, str]", payload: "bytes | None") -> None:
        """Remembers it; one that says "crash" is not done with the first time."""
        self._heap.sample()
        text = None if payload is None else payload.decode()[:40]
        first = [text] not in [message[:1] for message in self.messages]  # type: ignore[index]
        self.messages.append([text, properties.get("n", ""), 0 if payload is None else len(payload)])
        if text == "crash" and first:
            raise ValueError("the program's own fault")

    async def on_method(self, name: str, value: object) -> "tuple[int, object]":
        """See above."""
        self._heap.sample()
        if name == "stop":
            self._stopping = True
            asyncio.create_task(self.stop())  # noqa: RUF006
            return 200, {"stopping": True}
        if name == "slow":
            await asyncio.sleep_ms(300)  # type: ignore[attr-defined]
        elif name == "broken":
            raise ValueError("the program's own fault")
        elif name != "echo":
            return 404, {"message": f"there is no method '{name}'"}
        return 200, value

    def on_desired(self, version: int, properties: "dict[str, Any] | None", whole: bool) -> None:
        """Remembers the last ones."""
        self.desired.append([version, "?" if properties is None else properties.get("rate"), whole])
        del self.desired[:-2]

    async def stop(self) -> None:
        """Ends the agent once its answer is on the way."""
        await asyncio.sleep_ms(300)  # type: ignore[attr-defined]
        self.agent.stop()


def fill_heap() -> None:
    """Lets the session fail once, as it would with a full heap."""
    import dps_hub  # type: ignore[import-not-found]  # the bundle with `dps_agent.session`

    send = dps_hub.Session._send

    def full(session: object, telemetry: object) -> None:
        dps_hub.Session._send = send
        raise MemoryError("memory allocation failed, allocating 2032 bytes")

    dps_hub.Session._send = full


async def publish_in_vain(agent: Agent, document: "dict[str, Any]") -> None:
    """Notes why telemetry is not sent."""
    for size in (9, 300_000):
        try:
            await agent.publish(bytes(size))
        except (DpsError, ValueError) as error:
            document["early"].append(str(error))


def main(config_file: str, flash_file: str, *words: str) -> None:
    """Runs one life."""
    options = dict([(word + "=").split("=")[:2] for word in words])
    heap = Heap("heap" in options)
    heap.sample()
    heap.phase = "boot"
    feeds = [time.ticks_ms(), 0, 0]  # type: ignore[attr-defined]  # last, longest gap in ms, count

    def feed() -> None:
        now = time.ticks_ms()  # type: ignore[attr-defined]
        feeds[1] = max(feeds[1], time.ticks_diff(now, feeds[0]))  # type: ignore[attr-defined]
        feeds[0] = now
        feeds[2] += 1
        heap.sample()

    def set_rtc(now_s: int) -> None:
        if "rtc" in options:
            with open(options["rtc"], "w") as file:
                file.write("@{:04d}-{:02d}-{:02d} {:02d}:{:02d}:{:02d}".format(*time.gmtime(now_s)[:6]))

    config = load(config_file)
    if "token_life" in options:
        fields: list[Any] = list(config.settings)
        fields[10] = int(options["token_life"])  # token_life_s
        config.settings = Settings(*fields)
    mount(FileFlash(flash_file))
    store = make_store(config)
    tpm = make_tpm(config, feed)
    values = config.values
    clock = BoardClock(values["board.built_at_s"], config.roots_end_s, set_rtc, values["board.ntp_server"], feed)
    states: list[str] = []
    known: dict[str, str] = {}

    def show(state: str) -> None:
        states.append(known.setdefault(state, state))  # one object for each: only what the agent keeps is to grow
        if "full" in options and state == CONNECTED and states.count(state) == 1:
            fill_heap()
        gc.collect()
        used = gc.mem_alloc()  # type: ignore[attr-defined]
        print(
            json.dumps({"state": state, "reason": agent.reason, "used": used, "open": len(os.listdir("/proc/self/fd"))})
        )

    agent = Agent(config, tpm, store, clock, on_state=show, watchdog=feed)
    if heap._sampling:
        agent.answers = NamedAnswers(agent.answers, heap)
    program = Program(agent, int(options.get("every", "200")), int(options.get("until", "0")), heap)

    document: dict[str, Any] = {"early": []}

    async def live() -> None:
        if "early" in options:
            await publish_in_vain(agent, document)
        measuring = asyncio.create_task(program.measure())
        try:
            await asyncio.wait_for(agent.run(), float(options["seconds"]))
        except asyncio.TimeoutError:  # noqa: UP041 -- on a board it is not the built-in one, which there is none of
            document["overdue"] = True
        measuring.cancel()

    try:
        asyncio.run(live())
    except DpsError as error:
        document["error"] = error.code + ": " + error.message
    gc.collect()
    held = agent.assignment
    stored = store.load(PROGRESS)
    progress = decode_progress(stored.payload) if stored else None
    document.update(
        {
            "states": states,
            "reason": agent.reason,
            "code": agent.error.code if agent.error else "",
            "hub": held.assigned_hub if held else "",
            "accepted": program.accepted,
            "hubLacks": agent.hub_lacks,
            "refused": program.refused,
            "messages": program.messages,
            "desired": program.desired,
            "handshakes": [agent.connection.link.handshakes, agent.hub.connection.link.handshakes if agent.hub else 0],
            "feeds": feeds[2],
            "longestFeedMs": feeds[1],
            "peaks": heap.peaks,
            "left": gc.mem_alloc(),  # type: ignore[attr-defined]
            "now": list(clock.utc()),
            "floor": clock.time.floor_s,
            "connects": progress.connects if progress else None,
        }
    )
    print(json.dumps(document))
