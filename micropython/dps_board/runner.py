"""Does what the logic asks for, on a board: one asyncio task beside the firmware's own, and a table of answers.

    import asyncio, os
    from dps_board.runner import Agent

    async def main():
        agent = Agent.from_config(os.urandom)
        asyncio.create_task(agent.run())
        await agent.publish(b'{"celsius": 21.5}', wait=True)

    asyncio.run(main())

Waits, HTTP and MQTT leave the processor to the other tasks. A TPM command, a commit, the resolver and the arithmetic of
a TLS handshake block it; the TPM's `while_waiting` feeds the watchdog meanwhile. What a device does whatever it runs on
is the driver's business (`dps_agent.driver`).

Tasks: the program starts the one that runs `Agent.run`; it ends after `stop`, or with a bug of ours. Where the heap had
no room it goes on with the same life, from its beginning. It starts one more for each message that the program takes:
see `Hub._tell`.
"""

import asyncio
import gc
import sys

from dps_agent import __version__
from dps_agent.driver import Driver
from dps_agent.effects import NO_REPLY_MEMORY, NO_REPLY_TIMEOUT, NO_REPLY_TLS, NoReply, Reply
from dps_agent.lifecycle import CONNECTED, Lifecycle
from dps_agent.patience import CLOCK_WAIT_S
from dps_agent.progress import decode_progress
from dps_agent.settings import SYMMETRIC_KEY
from dps_board.clock import TIMES_TO_TRY
from dps_board.hardware import stay_joined
from dps_board.https import Connection
from dps_board.memory import BESIDE_HUB_BYTES, REGISTERS_BESIDE_HUB_BYTES, forget, free_block, has_room
from dps_hal.contracts import IDENTITY, PROGRESS
from dps_hal.errors import Broken, DpsError, RetryLater
from dps_hal.platform import declare_random_source, ms_since, random_bytes, ticks_ms

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable
    from typing import Any

    from dps_agent.assignment import Assignment
    from dps_agent.effects import Effect
    from dps_agent.sas import SasToken
    from dps_board.clock import BoardClock
    from dps_board.config import BoardConfiguration
    from dps_board.hub import Hub
    from dps_board.messages import Messages
    from dps_hal.contracts import Store, StoredRecord, TpmCondition

HTTP_DEADLINE_MS = 60_000  # for one request, however often it is made again
TELEMETRY_LIMIT_S = 30
TELEMETRY_LIMIT = 262144  # bytes, as `dps_agent.session` has it
NO_ROOM_S = 10  # before the life begins anew, where the heap had no room for the logic itself
NO_ROOM_LIMIT = 3  # failures in a row for want of memory: with so many the run ends, for a reset to clear the heap
_GO_FIRST = ("ReadEndorsementKey", "ReadStorageRootKey", "ImportKey", "Sign", "Commit")
_REACHES = ("Http", "Connect")
_SMALL = ("Uptime", "UtcNow", "Random", "Release")  # they leave no garbage worth collecting
_STEP_MS = 250  # how long a sleep goes on between two looks at the watchdog and at `stop`


class Agent:
    """One device's life on one TPM, store and clock; in the TPM's place a `Signer` serves, by the device's own key.

    The program sets what is to be called for what the hub sends; functions and coroutine functions will do:
    `on_message(properties, payload)` for a cloud-to-device message; payload is bytes, None where it was too large for
    this device. The hub delivers it again, later, unless this returns.
    `on_method(name, value)` for a direct method; value is what the JSON says, None for nothing. It returns the status
    and the value of the answer, within METHOD_LIMIT_S of `dps_agent.session`.
    `on_desired(version, properties, whole)` for desired twin properties: all of them, or a merge patch; None where they
    were too large for this device, and then `version` may be 0, for unknown.

    `on_state(state)` is called for each new state (a status LED); `watchdog()` at least once a second while everything
    is within its deadline; the TPM's own `while_waiting` should be the same function.
    `observe(effect, answer or error)` is called after each effect, for diagnostics: what it gets holds keys and
    signatures, so it must not print that.
    """

    def __init__(
        self,
        config: "BoardConfiguration",
        tpm: "Any",
        store: "Store",
        clock: "BoardClock",
        *,
        on_state: "Callable[[str], None] | None" = None,
        watchdog: "Callable[[], None] | None" = None,
        observe: "Callable[[Effect, object], None] | None" = None,
    ) -> None:
        values = config.values
        by_tpm = config.settings.attestation != SYMMETRIC_KEY
        backend = values["tpm.backend"] if by_tpm else SYMMETRIC_KEY
        self.connection = Connection(config.settings.endpoint, config.trust, config.connect_to, watchdog)
        self.hub: Hub | None = None  # there is one as soon as there is a hub to talk to
        self.on_message: Callable[[dict[str, str], bytes | None], Any] | None = None
        self.on_method: Callable[[str, Any], Any] | None = None
        self.on_desired: Callable[[int, dict[str, Any] | None, bool], Any] | None = None
        runtime = f"{sys.implementation.name} {'.'.join([str(part) for part in sys.implementation.version[:3]])}"
        about = {"agentVersion": __version__, "runtime": runtime, "backend": backend}
        self._life = Lifecycle(config.settings, about)
        self._hub_trust = config.hub_trust
        self._hub_connect_to: str = values["hub.connect_to"]
        self._tpm = tpm
        self._store = store
        self._clock = clock
        self._on_state = on_state
        self._watchdog = watchdog
        self._observe = observe
        self._shown_state = ""
        self._waiting_for = ""
        self._stopping = False
        self._over = False  # `run` has ended
        self._no_room = 0  # failures for want of memory since DPS or hub was reached last
        self._wifi: tuple[str, str] | None = None  # name and password of what is kept joined, beside `run`
        absent: Any = None  # where the device has a key of its own, of which nobody asks this
        # What answers each effect, by its name: a function of the effect's fields; it may return something to await.
        self.answers: dict[str, Callable[..., Any]] = {
            "Http": self.request,
            "ReadEndorsementKey": self._endorsement_key,
            "ReadStorageRootKey": getattr(tpm, "storage_root_key", absent),
            "ImportKey": getattr(tpm, "import_key", absent),
            "Sign": tpm.sign,
            "TpmCall": self._call_tpm,
            "Uptime": clock.uptime_s,
            "UtcNow": clock.utc,
            "ClockConfirmed": clock.is_confirmed,
            "Random": lambda: int.from_bytes(random_bytes(3), "big") / 0x1000000,
            "Sleep": self._sleep,
            "Commit": store.commit,
            "LoadRecord": store.load,
            "ForgetOlder": store.forget_older,
            "Release": self._release,
        }

    @classmethod
    def from_config(cls, random_source: "Callable[[int], bytes]", path: str = "config.json") -> "Agent":
        """An agent of the parts that the settings in `path` name; `run` joins their Wi-Fi.

        `random_source` is the firmware's own, `os.urandom`, where a hardware generator feeds it: so it is on ESP32,
        RP2350, STM32 and i.MX RT, and on RP2040 a ring oscillator's. AskOperator `config.…` for wrong settings.
        """
        declare_random_source(random_source)
        agent = cls._of_parts(path)
        forget("dps_board.parts", "dps_board.config")
        return agent

    @classmethod
    def _of_parts(cls, path: str) -> "Agent":
        """See `from_config`. What makes the parts is held by nothing once this has returned."""
        from dps_board.config import load

        config = load(path)
        from dps_board import parts

        feed = parts.make_watchdog(config)
        clock = parts.make_clock(config, feed)
        tpm, store, led = parts.make_signer(config, feed), parts.make_store(config), parts.make_led(config)
        agent = cls(config, tpm, store, clock, on_state=led, watchdog=feed)
        agent._wifi = config.values["board.wifi_ssid"], config.values["board.wifi_password"]
        return agent

    @property
    def state(self) -> str:
        """One of the states of `dps_agent.lifecycle`."""
        return self._life.state

    @property
    def reason(self) -> str:
        """Why it is in this state, in words; during a wait, what it waits for."""
        return self._waiting_for or self._life.reason

    @property
    def assignment(self) -> "Assignment | None":
        """The identity that holds: hub, device id and wrapped key."""
        return self._life.assignment

    @property
    def error(self) -> "DpsError | None":
        """What ended the last attempt."""
        return self._life.error

    @property
    def hub_lacks(self) -> "list[str]":
        """What the hub does not offer, as far as that is known: "methods", "twin", "messages"."""
        return self._life.hub_lacks

    async def run(self, connect: bool = True) -> None:
        """Lives until `stop` is called; with `connect` False until the device is provisioned.

        Raises Broken, and RetryLater `agent.no_room` once NO_ROOM_LIMIT attempts in a row had no room in the heap: what
        lives long lies strewn over it by then, and the program is to reset the board.
        """
        # Started here, ended with this: it never ends by itself where there is a network to join.
        joining = asyncio.create_task(stay_joined(*self._wifi)) if self._wifi else None
        self._over = False
        try:
            await self._live(connect)
        finally:
            self._over = True
            free_block()
            if joining is not None:
                joining.cancel()

    async def _live(self, connect: bool) -> None:
        self._clock.restart(self._last_believed_s())
        if connect and has_room(BESIDE_HUB_BYTES if self._loaded(IDENTITY) else REGISTERS_BESIDE_HUB_BYTES):
            self._join_hub()  # before the first handshake, so that it does not lie between those that follow
        while not self._stopping:
            driver = Driver(self._life, self._condition if connect else None, lambda: self.on_message is not None)
            driven = driver.drive(self._life.live(once=False, force=False, connect=connect))
            text = ""
            try:
                await self._drive(driven)
                return
            except (MemoryError, RetryLater) as failure:  # where the exchange could not go on after it
                text = str(failure)
                if isinstance(failure, MemoryError):
                    self._no_room += 1
                if self._no_room >= NO_ROOM_LIMIT:
                    raise RetryLater("agent.no_room", f"the heap had no room {NO_ROOM_LIMIT} times in a row: {text}")
            finally:
                driven.close()
                self._show_state()
                try:
                    await self._drive(driver.end(self._stopping), ends=True)
                except MemoryError:
                    pass  # what is left open the next start opens anew, and the count stays that of a crash
            await self._sleep(NO_ROOM_S, text)

    def stop(self) -> None:
        """Ends `run` at the next effect, and a wait or a request under way at once.

        Before a deep sleep or a reset, await the end of `run`: then the next start does not wait as after a crash.
        """
        self._stopping = True
        self.connection.abort()
        if self.hub is not None:
            self.hub.connection.abort()

    async def run_once(self, payloads: "Iterable[bytes]" = (), limit_s: float = 120, quiet_s: float = 2) -> None:
        """One wake of a device that sleeps: connects, sends, takes what waits at the hub, and ends in order.

        It listens until nothing has come for `quiet_s`, and the program's functions are done with what has. RetryLater
        as of `connected` and `publish`, at the first that is not sent; Broken as of `run`.
        """
        self._stopping = False
        living = asyncio.create_task(self.run())  # ended below
        try:
            await asyncio.sleep(0)  # it has begun
            await self.connected(limit_s)
            for payload in payloads:
                await self.publish(payload)
            if self.hub is not None:
                await self.hub.listen(quiet_s)
        finally:
            self.stop()
            await living

    async def connected(self, limit_s: float = 1e9) -> None:
        """Returns once the device is connected to its hub.

        RetryLater `agent.not_connected` after `limit_s`, and where `run` ends before.
        """
        until_s = self._clock.uptime_s() + limit_s
        while self._over or self.state != CONNECTED:  # a life that ended stays in its state
            if self._stopping or self._over or self._clock.uptime_s() >= until_s:
                raise self._not_connected()
            await asyncio.sleep(_STEP_MS / 1000)

    async def publish(
        self,
        payload: bytes,
        properties: "dict[str, str] | None" = None,
        limit_s: float = TELEMETRY_LIMIT_S,
        wait: bool = False,
        qos: int = 1,
    ) -> None:
        """Sends telemetry and returns once the hub has acknowledged it; with `qos` 0 once it is on its way.

        With `wait` it waits for the connection first, however long that takes. RetryLater `agent.not_connected` where
        there is no connection to the hub, too much is on its way already, or no acknowledgement came within `limit_s`;
        after that last one it may still arrive, so that the hub has it twice where it is published again. ValueError
        where it is larger than any hub takes.
        """
        if len(payload) > TELEMETRY_LIMIT:
            raise ValueError(f"expected at most {TELEMETRY_LIMIT} bytes of telemetry; came {len(payload)}")
        if wait:
            await self.connected()
        await self._connected_hub().publish(payload, properties or {}, limit_s, qos)

    async def report(self, properties: "dict[str, Any]", limit_s: float = TELEMETRY_LIMIT_S) -> int:
        """Merges `properties` into the reported ones, None deletes; their version, once the hub has it.

        RetryLater as of `publish`, and `agent.busy` where the hub has too much to do: again after its `retry_after_s`.
        AskOperator `hub.no_twin`: this hub has none. ValueError with the reason where a hub takes no such properties.
        """
        return await self._connected_hub().report(properties, limit_s)

    @property
    def desired(self) -> "dict[str, Any] | None":
        """The desired properties, all changes merged; None before they have come, and where they are too large."""
        return self.hub.desired if self.hub else None

    def messages(self) -> "Messages":
        """The messages to the device, for `async for`; instead of `on_message`. Call it once, before `run`."""
        from dps_board.messages import Messages

        return Messages(self)

    def _connected_hub(self) -> "Hub":
        if self.hub is None or self._over or self.state != CONNECTED:
            raise self._not_connected()
        return self.hub

    def _not_connected(self) -> RetryLater:
        return RetryLater("agent.not_connected", f"it was not sent: {self.state}: {self.reason}")

    def _last_believed_s(self) -> int:
        stored = self._loaded(PROGRESS)
        progress = decode_progress(stored.payload) if stored else None
        return progress.last_believed_s if progress else 0

    def _loaded(self, record: str) -> "StoredRecord | None":
        try:
            return self._store.load(record)
        except DpsError:
            return None  # what ails the store shows when the identity is loaded

    async def _drive(self, driven: "Generator[Any, Any, None]", ends: bool = False) -> None:
        answer: Any = None
        error: DpsError | None = None
        while ends or not self._stopping:
            effect = _advance(driven, answer, error)
            if effect is None:
                return
            self._show_state()
            answer = error = None
            try:
                if type(effect).__name__ not in self.answers:
                    self._join_hub()
                answer = self._answer(effect)
                if hasattr(answer, "send"):  # it is a coroutine
                    answer = await answer
            except DpsError as failure:
                error = failure
                forget("dps_hal.tpm.verdicts")
            except MemoryError as failure:
                self._no_room += 1
                error = RetryLater("agent.busy", f"the heap had no room for the next step: {failure}")
            except Exception as failure:  # CancelledError is no Exception, and comes out
                error = _bug(failure)
            if self._observe is not None:
                self._observe(effect, error or answer)
            if type(effect).__name__ in _REACHES:
                self._count_room(answer)
            if self._no_room >= NO_ROOM_LIMIT and not ends:
                raise error or RetryLater("agent.busy", str(answer))
            self._feed()
            if type(effect).__name__ not in _SMALL:
                gc.collect()  # the next step may want the largest block that there is
            await asyncio.sleep(0)

    def _count_room(self, answer: "Any") -> None:
        """Hears how a request or a connection went: one for which there was no room, or one that came about."""
        if isinstance(answer, NoReply):
            self._no_room += answer.reason.startswith(NO_REPLY_MEMORY)
        elif answer is not None:
            self._no_room = 0

    def _answer(self, effect: "Effect") -> "Any":
        """What answers the effect; where TPM or store lack memory, they get what is for the connection to DPS."""
        kind = type(effect).__name__
        try:
            return self.answers[kind](*effect)
        except MemoryError:
            if kind not in _GO_FIRST:
                raise
        self.connection.close()
        free_block()
        self._tpm.release()
        gc.collect()
        return self.answers[kind](*effect)

    def _join_hub(self) -> "Hub":
        """What talks to the hub: a small heap has room for it once the registration is through."""
        if self.hub is None:
            from dps_board.hub import Hub

            self.hub = Hub(self, self._hub_trust, self._hub_connect_to, self._clock, self._watchdog)
            self.answers.update(self.hub.answers())
        return self.hub

    # DPS.

    def _endorsement_key(self, name: bytes) -> bytes:
        # Where it had to be made, what its maker left in the TPM was looked at.
        key: bytes = self._tpm.endorsement_key(name)
        forget("dps_hal.tpm.upkeep", "dps_hal.tpm.verdicts")
        return key

    def _condition(self) -> "TpmCondition":
        """The TPM's; nobody asks for it where there is none."""
        found: TpmCondition = self._tpm.condition()
        return found

    def _call_tpm(self, call: "Callable[[], Any]") -> "Any":
        answer = call()
        forget("dps_hal.tpm.upkeep")
        return answer

    async def request(self, method: str, path: str, body: bytes, authorization: "SasToken | None") -> "Reply | NoReply":
        """One request, made again under another time where certificates or Date speak against the one believed."""
        started_ms = ticks_ms()
        reply: Reply | NoReply = NoReply(NO_REPLY_TIMEOUT, False)
        for _ in range(TIMES_TO_TRY):
            if not self.connection.is_open():
                await self._clock.before_handshake()
                gc.collect()  # mbedTLS wants one block of 16 KiB
            left_ms = HTTP_DEADLINE_MS - ms_since(started_ms)
            reply = await self.connection.request(method, path, body, authorization, left_ms)
            if isinstance(reply, Reply):
                if self._clock.verified(reply.date_s):
                    break
            elif not reply.reason.startswith(NO_REPLY_TLS + ":") or not self._clock.refused():
                break
            self.connection.close()
        return reply

    async def _sleep(self, delay_s: float, reason: str) -> None:
        self._waiting_for = reason
        if delay_s >= CLOCK_WAIT_S:
            await self._clock.before_handshake()  # the wait may be one for the time
        left_ms = int(delay_s * 1000)  # whole: after a year of uptime a float of 32 bits has steps of some seconds
        while left_ms > 0 and not self._stopping:
            self._feed()
            began_ms = ticks_ms()
            await asyncio.sleep(min(left_ms, _STEP_MS) / 1000)
            left_ms -= ms_since(began_ms)
        self._waiting_for = ""

    def _release(self, what: str) -> "Any":
        """May return something to await."""
        if what == "TPM":
            self._tpm.release()
        elif what == "DPS":
            self.connection.close()
        elif self.hub is not None:
            return self.hub.end()
        return None

    def _feed(self) -> None:
        if self._watchdog is not None:
            self._watchdog()

    def _show_state(self) -> None:
        if self._on_state is not None and self._shown_state != self.state:
            self._shown_state = self.state
            self._on_state(self.state)


def _advance(driven: "Generator[Any, Any, None]", answer: "Any", error: "DpsError | None") -> "Any":
    """The next effect; None at the end."""
    try:
        return driven.send(answer) if error is None else driven.throw(error)
    except StopIteration:
        return None
    except (DpsError, MemoryError):
        raise
    except Exception as failure:
        raise _bug(failure)


def _bug(failure: Exception) -> Broken:
    """An unforeseen exception as Broken `agent.bug`, without what it says, which might hold a secret."""
    return Broken("agent.bug", f"{type(failure).__name__} in the agent")
