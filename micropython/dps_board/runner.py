"""Does what the logic asks for, on a board: one asyncio task beside the firmware's own.

    agent = Agent(config, tpm, store, clock)
    asyncio.create_task(agent.run())

Waits and HTTP leave the processor to the other tasks. A TPM command, a commit, the resolver and the arithmetic of a
TLS handshake block it; the TPM's `while_waiting` feeds the watchdog meanwhile.
"""

import asyncio
import gc

from dps_agent.effects import (
    NO_REPLY_TIMEOUT,
    NO_REPLY_TLS,
    Commit,
    Http,
    ImportKey,
    LoadRecord,
    NoReply,
    Random,
    ReadEndorsementKey,
    ReadStorageRootKey,
    Reply,
    Sign,
    Sleep,
    Uptime,
    UtcNow,
)
from dps_agent.lifecycle import Lifecycle, decode_progress
from dps_board.https import Connection
from dps_hal.contracts import PROGRESS
from dps_hal.errors import Broken, DpsError
from dps_hal.platform import ms_since, random_bytes, ticks_ms

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from typing import Any

    from dps_agent.assignment import Assignment
    from dps_agent.effects import Effect
    from dps_board.clock import BoardClock
    from dps_board.config import BoardConfiguration
    from dps_hal.contracts import Store, Tpm

HTTP_DEADLINE_MS = 60_000  # one request in all
RELEASE_FOR_SLEEPS_OVER_S = 2
CLOSE_FOR_SLEEPS_OVER_S = 60
_TIMES_TO_TRY = 3  # of one request: under a proposal, under the floor, under the peer's Date
_STEP_S = 0.25  # of a sleep, between two looks at the watchdog and at `stop`


class Agent:
    """One device's life on one TPM, store and clock.

    `on_state(state)` is called for each new state (a status LED); `watchdog()` at least once a second while everything
    is within its deadline; the TPM's own `while_waiting` should be the same function.
    `observe(effect, answer or error)` is called after each effect, for diagnostics: what it gets holds keys and
    signatures, so it must not print that.
    """

    def __init__(
        self,
        config: "BoardConfiguration",
        tpm: "Tpm",
        store: "Store",
        clock: "BoardClock",
        *,
        on_state: "Callable[[str], None] | None" = None,
        watchdog: "Callable[[], None] | None" = None,
        observe: "Callable[[Effect, object], None] | None" = None,
    ) -> None:
        self.connection = Connection(config.settings.endpoint, config.roots, config.connect_to, watchdog)
        self._life = Lifecycle(config.settings)
        self._tpm = tpm
        self._store = store
        self._clock = clock
        self._on_state = on_state
        self._watchdog = watchdog
        self._observe = observe
        self._shown_state = ""
        self._waiting_for = ""
        self._stopping = False
        # What answers each effect: a function of the effect, or one that returns something to await.
        self.answers: dict[type, Callable[[Any], Any]] = {
            Http: self._request,
            ReadEndorsementKey: lambda effect: tpm.endorsement_key(),
            ReadStorageRootKey: lambda effect: tpm.storage_root_key(),
            ImportKey: lambda effect: tpm.import_key(effect.activation),
            Sign: lambda effect: tpm.sign(effect.wrapped_key, effect.message),
            Uptime: lambda effect: clock.uptime_s(),
            UtcNow: lambda effect: clock.utc(),
            Random: lambda effect: int.from_bytes(random_bytes(3), "big") / 0x1000000,
            Sleep: self._sleep,
            Commit: lambda effect: store.commit(effect.record, effect.payload),
            LoadRecord: lambda effect: store.load(effect.record),
        }

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

    async def run(self) -> None:
        """Lives until the device is provisioned or `stop` is called. Raises Broken only."""
        self._clock.restart(self._last_believed_s())
        exchange = self._life.live(once=False, force=False)
        try:
            await self._drive(exchange)
        finally:
            exchange.close()
            self.connection.close()
            self._tpm.release()
            self._show_state()

    def stop(self) -> None:
        """Ends `run` at the next effect, and a wait or a request under way at once."""
        self._stopping = True
        self.connection.abort()

    def _last_believed_s(self) -> int:
        try:
            stored = self._store.load(PROGRESS)
        except DpsError:
            return 0  # what ails the store shows when the identity is loaded
        progress = decode_progress(stored.payload) if stored else None
        return progress.last_believed_s if progress else 0

    async def _drive(self, exchange: "Generator[Effect, Any, None]") -> None:
        answer: Any = None
        error: DpsError | None = None
        while not self._stopping:
            effect = _advance(exchange, answer, error)
            if effect is None:
                return
            self._show_state()
            answer = error = None
            try:
                answer = self.answers[type(effect)](effect)
                if hasattr(answer, "send"):  # a coroutine
                    answer = await answer
            except DpsError as failure:
                error = failure
            except Exception as failure:  # not CancelledError, which is none
                error = _bug(failure)
            if self._observe is not None:
                self._observe(effect, error or answer)
            self._feed()
            if not isinstance(effect, (Uptime, UtcNow, Random)):
                gc.collect()  # the next step may want the largest block that there is
            await asyncio.sleep(0)

    async def _request(self, http: "Http") -> "Reply | NoReply":
        """One request, made again under another time where certificates or Date speak against the one believed."""
        started_ms = ticks_ms()
        reply: Reply | NoReply = NoReply(NO_REPLY_TIMEOUT, False)
        for _ in range(_TIMES_TO_TRY):
            if not self.connection.is_open():
                await self._clock.before_handshake()
                gc.collect()  # mbedTLS wants one block of 16 KiB
            left_ms = HTTP_DEADLINE_MS - ms_since(started_ms)
            reply = await self.connection.request(http.method, http.path, http.body, http.authorization, left_ms)
            if isinstance(reply, Reply):
                if self._clock.verified(reply.date_s):
                    break
            elif not reply.reason.startswith(NO_REPLY_TLS) or not self._clock.refused():
                break
            self.connection.close()
        return reply

    async def _sleep(self, sleep: "Sleep") -> None:
        if sleep.delay_s > RELEASE_FOR_SLEEPS_OVER_S:
            self._tpm.release()
        if sleep.delay_s > CLOSE_FOR_SLEEPS_OVER_S:
            self.connection.close()
        self._waiting_for = sleep.reason
        until_s = self._clock.uptime_s() + sleep.delay_s
        while not self._stopping:
            left_s = until_s - self._clock.uptime_s()
            if left_s <= 0:
                break
            self._feed()
            await asyncio.sleep(min(left_s, _STEP_S))
        self._waiting_for = ""

    def _feed(self) -> None:
        if self._watchdog is not None:
            self._watchdog()

    def _show_state(self) -> None:
        if self._on_state is not None and self._shown_state != self.state:
            self._shown_state = self.state
            self._on_state(self.state)


def _advance(exchange: "Generator[Effect, Any, None]", answer: "Any", error: "DpsError | None") -> "Effect | None":
    """The exchange's next effect; None at its end."""
    try:
        return exchange.send(answer) if error is None else exchange.throw(error)
    except StopIteration:
        return None
    except DpsError:
        raise
    except Exception as failure:
        raise _bug(failure)


def _bug(failure: Exception) -> Broken:
    """An unforeseen exception as Broken `agent.bug`, without what it says, which might hold a secret."""
    return Broken("agent.bug", f"{type(failure).__name__} in the agent")
