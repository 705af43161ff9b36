"""The hub's side of an `Agent`: what its connection needs beside MQTT, and what goes to and from the program.

Loaded when the first connection is due: a board has no room for this beside a registration.
"""

import asyncio
import gc

from dps_agent.effects import NO_REPLY_TLS
from dps_agent.hub_effects import (
    AnswerMethod,
    CloudMessage,
    Desired,
    MessageDone,
    MethodCall,
    Report,
    SendTelemetry,
    TelemetryDone,
    TwinDone,
    Withdrawn,
)
from dps_agent.properties import flaw_of, merged
from dps_agent.twin import LACKING, REPORTED_NAME
from dps_board.clock import TIMES_TO_TRY
from dps_board.memory import forget
from dps_board.mqtt import HubConnection
from dps_hal.errors import AskOperator, RetryLater
from dps_hal.platform import from_json, to_json

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, Protocol

    from dps_agent.effects import NoReply, Reply
    from dps_agent.hub_effects import ConnAck, Message
    from dps_board.clock import BoardClock
    from dps_board.https import Connection
    from dps_board.tls import Trust

    class Program(Protocol):
        """What the hub's side needs of an `Agent`: the way to DPS, and what the program wants to be called for."""

        connection: Connection
        on_message: Callable[[dict[str, str], bytes | None], Any] | None
        on_method: Callable[[str, Any], Any] | None
        on_desired: Callable[[int, dict[str, Any] | None, bool], Any] | None

        async def request(self, method: str, path: str, body: bytes, authorization: None) -> NoReply | Reply:
            """As `Agent.request`."""
            ...


MESSAGES_LIMIT = 8  # messages and calls that the program has in hand; a hub delivers further messages later


class Hub:
    """One connection to one hub after the other."""

    def __init__(
        self,
        agent: "Program",
        trust: "Trust",
        connect_to: str,
        clock: "BoardClock",
        watchdog: "Callable[[], None] | None",
    ) -> None:
        self.connection = HubConnection(trust, connect_to, watchdog)
        self._agent = agent
        self._clock = clock
        self.desired: dict[str, Any] | None = None  # as `Agent.desired`
        self.told = 0  # how many messages, calls and changes of desired properties have come
        self._serial = 0  # how often the program has asked for something
        self._asked: dict[int, list[Any]] = {}  # by request id, until the session says what became of it
        self._tasks: list[object] = []  # those in which the program's own functions run

    def answers(self) -> "dict[str, Callable[..., Any]]":
        """What answers the effects that concern it, as `Agent.answers` has it."""
        return {
            "Reach": self._reach,
            "Connect": self._connect,
            "Subscribe": self.connection.subscribe,
            "Publish": self.connection.publish,
            "SendAgain": self.connection.send_again,
            "GiveUp": self.connection.give_up,
            "Acknowledge": self.connection.acknowledge,
            "NextEvent": self._next_event,
            "Disconnect": self.connection.disconnect,
            "Tell": self._tell,
        }

    async def end(self) -> None:
        """Tells the program that nothing more is sent, and disconnects."""
        for waiting in self._asked.values():
            waiting[0].set()
        await self.connection.disconnect()

    async def publish(self, payload: bytes, properties: "dict[str, str]", limit_s: float, qos: int) -> None:
        """See `Agent.publish`."""
        done = await self._ask(SendTelemetry, limit_s, properties, payload, 0, qos)
        if not done.accepted:
            raise _unsent("too much is on its way, or too large") if not done.sent else _unknown()

    async def report(self, properties: "dict[str, Any]", limit_s: float) -> int:
        """See `Agent.report`."""
        _, flaw = flaw_of(properties, REPORTED_NAME)
        if flaw:
            raise ValueError(flaw)
        done = await self._ask(Report, limit_s, to_json(properties).encode())
        if done.status == 204:
            return int(done.version)
        if done.status == 429:
            text = "the hub has too much to do for its twins"
            raise RetryLater("agent.busy", text, int(done.wait_s) + 1)
        if done.status == LACKING:
            raise AskOperator("hub.no_twin", "this hub has no twin")
        if 400 <= done.status < 500:
            raise ValueError(f"the hub says: {done.payload!r}")
        raise _unknown() if done.status else _unsent("too much is on its way")

    async def listen(self, quiet_s: float) -> None:
        """Returns once nothing has come for so long, and the program is done with what did."""
        told = -1
        while told != self.told or self._tasks:
            told = self.told
            await asyncio.sleep(quiet_s)

    async def _ask(self, kind: "Any", limit_s: float, *fields: "Any") -> "Any":
        """What the session says became of an event of this kind. RetryLater where it was not sent, or nobody knows."""
        self._serial += 1
        request_id = self._serial
        waiting: list[Any] = [asyncio.Event()]  # behind it the session's answer, once it has come
        event = kind(request_id, *fields)
        unsent = not self.connection.post(event)
        self._asked[request_id] = waiting
        try:
            if not unsent:
                await asyncio.wait_for(waiting[0].wait(), limit_s)
        except asyncio.TimeoutError:  # noqa: UP041 -- on a board it is not the built-in one, which there is none of
            pass
        finally:
            self._asked.pop(request_id, None)
            unsent = self.connection.take_back(event) or unsent
            if not unsent and not waiting[1:]:
                self.connection.post(Withdrawn(request_id))
        if unsent:
            raise _unsent("too much is on its way")
        if not waiting[1:]:
            raise _unknown()
        return waiting[1]

    async def _reach(self, hub: str) -> "NoReply | None":
        """Verifies the hub, under another time where its certificates speak against the one believed."""
        failure: NoReply | None = None
        forget("dps_agent.registration", "dps_agent.messages", "dps_hal.tpm.verdicts")  # they are through
        forget("dps_agent.registration_by_tpm", "dps_agent.registration_by_key")
        for _ in range(TIMES_TO_TRY):
            if self.connection.is_reached(hub):
                return None
            await self._clock.before_handshake()
            if self._clock.needs_date():
                await self._agent.request("GET", "/", b"", None)  # no hub says what time it is
                self._agent.connection.close()
                if self._clock.needs_date() and self._clock.utc().believable:
                    self._clock.refused()  # what is believed serves until DPS can be asked
                await self._clock.before_handshake()
            gc.collect()  # mbedTLS wants one block of 16 KiB
            failure = await self.connection.reach(hub)
            if failure is None:
                self._clock.verified(None)
            elif not failure.reason.startswith(NO_REPLY_TLS + ":") or not self._clock.refused():
                break
        return failure

    async def _connect(self, hub: str, *identity: "Any") -> "ConnAck | NoReply":
        failure = await self._reach(hub)
        if failure is not None:
            return failure
        return await self.connection.connect(hub, *identity)

    async def _next_event(self, until_uptime_s: float) -> "Any":
        within_s = max(until_uptime_s - self._clock.uptime_s(), 0)
        return await self.connection.next_event(int(within_s * 1000))

    # The program.

    def _tell(self, message: "Message") -> bool:
        """Whether the program takes the message."""
        if isinstance(message, (TelemetryDone, TwinDone)):
            waiting = self._asked.pop(message.request_id, None)
            if waiting:
                waiting.append(message)
                waiting[0].set()
            return waiting is not None
        self.told += 1
        work: Any
        takes: Any
        if isinstance(message, CloudMessage):
            work, takes = self._hand_over, self._agent.on_message
        elif isinstance(message, MethodCall):
            work, takes = self._call, self._agent.on_method
        else:
            work, takes = self._show_desired, self._agent.on_desired
        if takes is None or len(self._tasks) >= MESSAGES_LIMIT:
            if takes is not None or not isinstance(message, Desired):
                return False
            self._know(message)
            return True  # nobody is to be called for these, so they need not come again
        changes = self._know(message) if isinstance(message, Desired) else None
        # One task for each message: started here, ends when the program's function does; nobody cancels it.
        self._tasks.append(asyncio.create_task(self._counted(work(message, changes))))
        return True

    def _know(self, message: "Desired") -> "dict[str, Any] | None":
        """Keeps the desired properties as they are now; returns what the message says of them."""
        changes: dict[str, Any] | None = None
        try:
            if message.payload is not None:
                changes = from_json(message.payload)
            if message.whole or changes is None:
                self.desired = changes
            elif self.desired is not None:
                self.desired = merged(self.desired, changes)
        except (ValueError, AttributeError, TypeError):
            pass  # a patch that is none changes nothing
        except MemoryError:
            changes = self.desired = None
        return changes

    async def _counted(self, work: "Any") -> None:
        """Awaits what the program does; what it raises, asyncio shows."""
        try:
            await work
        finally:
            self._tasks.remove(asyncio.current_task())

    async def _hand_over(self, message: "CloudMessage", _changes: None) -> None:
        await _answer_of(self._agent.on_message, message.properties, message.payload)
        self.connection.post(MessageDone(message.message_id))

    async def _show_desired(self, message: "Desired", changes: "dict[str, Any] | None") -> None:
        await _answer_of(self._agent.on_desired, message.version, changes, message.whole)

    async def _call(self, call: "MethodCall", _changes: None) -> None:
        try:
            value = from_json(call.payload) if call.payload else None
        except (ValueError, MemoryError):
            self._answer(call, 400, "expected JSON that this device has room for")
            return
        try:
            status, value = await _answer_of(self._agent.on_method, call.name, value)
            self.connection.post(AnswerMethod(call.call_id, int(status), to_json(value).encode()))
        except Exception:  # whatever the program did: the hub gets an answer, and the error goes on
            self._answer(call, 500, "the program on this device failed")
            raise

    def _answer(self, call: "MethodCall", status: int, message: str) -> None:
        self.connection.post(AnswerMethod(call.call_id, status, to_json({"message": message}).encode()))


async def _answer_of(function: "Any", *arguments: "Any") -> "Any":
    """What a function or a coroutine function of the program returns."""
    answer = function(*arguments)
    return await answer if hasattr(answer, "send") else answer


def _unsent(why: str) -> RetryLater:
    return RetryLater("agent.not_connected", f"it was not sent: {why}")


def _unknown() -> RetryLater:
    return RetryLater("agent.not_connected", "the hub did not answer: it may or may not have it")
