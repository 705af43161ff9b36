"""One life of a board: boot, TPM, network and flash as the arguments say, until it is provisioned or has failed.

`main` takes the paths of the settings and of the flash, and words. The flash is a file of littlefs blocks, made where
there is none. Words: `blocks` keeps the records on the raw blocks instead; `rtc=FILE` is where to write the time when
the agent sets the clock; `seconds=N` ends the life after N s; `heap` samples the heap in use. Prints one JSON line.
"""

import gc
import json
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

BLOCK_BYTES = 4096
BLOCKS = 16
PROGRAM_BYTES = 256  # a page of NOR flash
BLINK_MS = 20
SMALL_BYTES = 128 * 1024  # free: a heap in which what stays must not be strewn over it
GARBAGE_BYTES = 1024  # then it is collected there
ERASED = b"\xff" * 256


class FileFlash:
    """A flash whose content is a file; a block device with the extended interface.

    `erased` counts the blocks that were erased, `programmed` what was written, in programs of PROGRAM_BYTES.
    """

    def __init__(self, path: str) -> None:
        self.erased = self.programmed = 0
        try:
            self._file = open(path, "r+b")  # noqa: SIM115
        except OSError:
            with open(path, "wb") as new:
                for _ in range(BLOCKS):
                    new.write(b"\xff" * BLOCK_BYTES)
            self._file = open(path, "r+b")  # noqa: SIM115

    def readblocks(self, block: int, buffer: bytearray, offset: int = 0) -> None:
        """See vfs.AbstractBlockDev."""
        self._file.seek(block * BLOCK_BYTES + offset)
        self._file.readinto(buffer)

    def writeblocks(self, block: int, buffer: bytearray, offset: int = 0) -> None:
        """See vfs.AbstractBlockDev."""
        self._file.seek(block * BLOCK_BYTES + offset)
        self._file.write(buffer)
        self.programmed += len(buffer) // PROGRAM_BYTES

    def ioctl(self, operation: int, argument: int) -> int:
        """See vfs.AbstractBlockDev."""
        if operation == 3:
            self._file.flush()
        if operation == 4:
            return BLOCKS
        if operation == 5:
            return BLOCK_BYTES
        if operation == 6:
            self.erased += 1
            self._file.seek(argument * BLOCK_BYTES)
            for _ in range(BLOCK_BYTES // len(ERASED)):  # a flash takes no memory for that
                self._file.write(ERASED)
        return 0


class Heap:
    """The most that was in use in each phase, garbage of at most a KiB included."""

    def __init__(self, sampling: bool) -> None:
        self._sampling = sampling
        self.peaks: dict[str, int] = {}
        self.phase = "import"

    def sample(self) -> None:
        """Notes what is in use now."""
        if self._sampling:
            gc.collect()
            used = gc.mem_alloc()  # type: ignore[attr-defined]
            self.peaks[self.phase] = max(self.peaks.get(self.phase, 0), used)


def mount(flash: FileFlash) -> None:
    """The littlefs on `flash` as /flash."""
    import vfs  # type: ignore[import-not-found]

    try:
        vfs.mount(vfs.VfsLfs2(flash, progsize=PROGRAM_BYTES, readsize=256), "/flash")
    except OSError:
        vfs.VfsLfs2.mkfs(flash, progsize=PROGRAM_BYTES, readsize=256)
        vfs.mount(vfs.VfsLfs2(flash, progsize=PROGRAM_BYTES, readsize=256), "/flash")


def main(config_file: str, flash_file: str, *words: str) -> None:
    """Runs one life."""
    options = dict([(word + "=").split("=")[:2] for word in words])
    heap = Heap("heap" in options)
    if gc.mem_free() < SMALL_BYTES:  # type: ignore[attr-defined]
        gc.threshold(GARBAGE_BYTES)  # type: ignore[attr-defined]
    import asyncio

    from dps_agent.signing import hub_token
    from dps_board.clock import BoardClock
    from dps_board.config import load
    from dps_board.parts import make_store, make_tpm
    from dps_board.runner import Agent
    from dps_hal.errors import DpsError

    heap.sample()
    heap.phase = "boot"

    def set_rtc(now_s: int) -> None:
        if "rtc" in options:
            moment = time.gmtime(now_s)
            with open(options["rtc"], "w") as file:
                file.write("@{:04d}-{:02d}-{:02d} {:02d}:{:02d}:{:02d}".format(*moment[:6]))

    feeds = [0, time.ticks_ms(), 0]  # type: ignore[attr-defined]  # count, last, longest gap in ms

    def feed() -> None:
        now = time.ticks_ms()  # type: ignore[attr-defined]
        feeds[2] = max(feeds[2], time.ticks_diff(now, feeds[1]))  # type: ignore[attr-defined]
        feeds[0] += 1
        feeds[1] = now
        heap.sample()

    flash = FileFlash(flash_file)
    config = load(config_file)
    if "blocks" in options:
        from dps_hal.store.block import block_store

        store: Any = block_store(flash)
    else:
        mount(flash)
        store = make_store(config)
    tpm = make_tpm(config, feed)
    transport: Any = tpm._commands._transport  # type: ignore[attr-defined]
    send: Any = transport.send

    sent: list[int] = []  # TPM command codes
    sent_at_commit: list[int] = []

    def sampled_send(command: bytes, limit_s: float, while_waiting: "Any") -> bytes:
        heap.sample()
        sent.append(int.from_bytes(command[6:10], "big"))
        answer: bytes = send(command, limit_s, while_waiting)
        heap.sample()
        return answer

    transport.send = sampled_send
    values = config.values
    clock = BoardClock(values["board.built_at_s"], config.roots_end_s, set_rtc, values["board.ntp_server"], feed)
    did: list[str] = []  # since the last blink
    states: list[str] = []
    handshakes = [0]

    def observe(effect: "Any", answer: object) -> None:
        name = type(effect).__name__
        if agent.connection.link.handshakes != handshakes[0]:
            handshakes[0] = agent.connection.link.handshakes
            name += " with TLS handshake"
        if name == "Commit" and effect.record == "identity":
            sent_at_commit.extend(sent)
        did.append(name)
        heap.sample()

    agent = Agent(config, tpm, store, clock, on_state=states.append, watchdog=feed, observe=observe)
    if heap._sampling:
        agent.answers = NamedAnswers(agent.answers, heap)  # type: ignore[assignment]
    heap.sample()

    async def blink(gaps: "list[tuple[int, str]]") -> None:
        while True:
            before = time.ticks_ms()  # type: ignore[attr-defined]
            del did[:]
            seen = agent.connection.link.handshakes
            await asyncio.sleep_ms(BLINK_MS)  # type: ignore[attr-defined]
            gap = time.ticks_diff(time.ticks_ms(), before)  # type: ignore[attr-defined]
            if gap > gaps[0][0]:
                what = ", ".join(did)
                if agent.connection.link.handshakes != seen and "handshake" not in what:
                    what = "TLS handshake " + what
                gaps[0] = (gap, what or "HTTP or TLS under way")

    gaps = [(0, "")]

    async def live() -> None:
        blinking = asyncio.create_task(blink(gaps))
        try:
            if "seconds" in options:
                await asyncio.wait_for(agent.run(connect=False), float(options["seconds"]))
            else:
                await agent.run(connect=False)
        except asyncio.TimeoutError:  # noqa: UP041 -- on a board it is not the built-in one, which there is none of
            pass
        blinking.cancel()

    def token_message() -> bytes:
        """What the hub key signs now: the device answers for its hub with it."""
        exchange = hub_token(agent.assignment, 3600)  # type: ignore[arg-type]
        answer: Any = None
        while True:
            try:
                effect = exchange.send(answer)
            except StopIteration as end:
                return end.value.header().encode()  # type: ignore[no-any-return]
            answer = agent.answers[type(effect).__name__](*effect)

    document: dict[str, Any] = {}
    try:
        asyncio.run(live())
    except DpsError as error:
        document["error"] = error.code + ": " + error.message
    held = agent.assignment
    now = clock.utc()
    document.update(
        {
            "state": agent.state,
            "reason": agent.reason,
            "code": agent.error.code if agent.error else "",
            "states": states,
            "hub": held.assigned_hub if held else "",
            "device": held.device_id if held else "",
            "handshakes": agent.connection.link.handshakes,
            "gapMs": gaps[0][0],
            "gapBy": gaps[0][1],
            "feeds": feeds[0],
            "longestFeedMs": feeds[2],
            "peaks": heap.peaks,
            "loaded": [name for name in sys.modules if name[:4] == "dps_"],
            "tpmCommands": sent_at_commit,
            "now": list(now),
            "floor": clock.time.floor_s,
        }
    )
    if held and now.believable:
        document["token"] = token_message().decode()
        tpm.release()
    print(json.dumps(document))


class NamedAnswers:
    """What answers each effect, with the heap's phase named after the effect that is answered last."""

    def __init__(self, answers: "Any", heap: Heap) -> None:
        self._heap = heap
        self._answers = answers

    def __contains__(self, name: str) -> bool:
        return name in self._answers

    def __getitem__(self, name: str) -> "Any":
        answer, heap = self._answers[name], self._heap

        def call(*fields: "Any") -> "Any":
            if name not in ("Uptime", "UtcNow", "Random", "Sleep", "Disconnect", "Release"):
                heap.phase = name + (" " + fields[0] if name == "Http" else "")
            heap.sample()
            return answer(*fields)

        return call

    def update(self, answers: "Any") -> None:
        """Adds those of the hub."""
        self._answers.update(answers)
