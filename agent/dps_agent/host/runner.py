"""Does what the logic asks for, on Linux: resources, and a table of how each effect is done with them.

Four parts play together, and only the last two know threads:

1. The exchange (a life, a registration, one call) yields effects and knows no world.
2. The driver (`dps_agent.driver`) is what a device does whatever it runs on: it adds effects of its own.
3. The runner has one table, effect -> how it is done. It runs on the thread that called `run`, which never blocks in
   anything that has no end, and waits in one place, the loop (`dps_agent.host.loop`).
4. The worker (`dps_agent.host.worker`) has the one thread in which calls may block, `dps-worker`, and all waiting and
   deadlines.

Each turn of `_drive` is the same: take the next effect, feed the watchdog, look whether somebody called `stop`, do the
effect, and hand its outcome to the driver: an answer, or a DpsError that is thrown there. What an effect of the TPM,
the store or the clock raises goes to the logic, as a DpsError; what one of HTTP or the hub raises comes out of `run`,
for those answer by values, but for what ails the certificate that DPS would be shown: an AskOperator of HTTP's.

How `run` ends: 1. with the exchange's result; 2. with the exchange's own error; 3. with `agent.interrupted`, after
`stop`; 4. with the code of an overrun deadline. In the last case the worker is `stuck`: the process is to exit, and
whatever starts it next starts clean. In any case `_end` closes the exchange, ends what is still under way, lets the
driver give back TPM, DPS and hub, and ends the thread.

Other threads and signal handlers reach a runner by `stop`, `hasten`, `post` and `take_back` alone. The third thread,
`dps-exit`, belongs to the process: see `install_signals`.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import threading
import time

from dps_agent.driver import ClockConfirmed, Driver, Release, TpmCall
from dps_agent.effects import (
    Commit,
    FindIssuers,
    ForgetOlder,
    Http,
    ImportKey,
    LoadRecord,
    Random,
    ReadEndorsementKey,
    ReadRequest,
    ReadStorageRootKey,
    Reply,
    Sign,
    Sleep,
    Uptime,
    UtcNow,
    Verify,
)
from dps_agent.host.clock import CLOCK_NOT_SET, SystemClock, may_judge
from dps_agent.host.loop import Loop
from dps_agent.host.worker import DONE, Outcome, Worker, attempt, bug, required
from dps_hal.errors import EXIT_GROUPS, AskOperator, Broken, DpsError, RetryLater

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from typing import Any, NamedTuple, Protocol, TypeVar

    from dps_agent.effects import Effect, NoReply
    from dps_agent.host.hub_ways import Hub
    from dps_agent.host.network.trust import Trust
    from dps_agent.hub_effects import Event, Message
    from dps_agent.sas import SasToken
    from dps_hal.contracts import Clock, Signer, Store

    Result = TypeVar("Result")

    class Connection(Protocol):
        """What the runner needs of `dps_agent.host.network.https.DpsConnection`."""

        def request(self, method: str, path: str, body: bytes, authorization: SasToken | None) -> Reply | NoReply: ...
        def abort(self) -> None: ...
        def close(self) -> None: ...

    class Erase(NamedTuple):
        """An effect for whoever is asked to forget; no logic yields it."""

        record: str
else:
    from dps_hal.named import namedtuple

    Erase = namedtuple("Erase", ("record",))

HTTP_DEADLINE_S = 60.0  # one request in all
# Each is longer than the limits of `dps_hal.tpm.rules`, whose clean errors come first; these end what hangs.
TPM_KEY_DEADLINE_S = 180.0  # a TPM may have to create the EK or SRK first: RSA-2048 takes minutes on slow ones
TPM_DEADLINE_S = 30.0
# Four operations: a key is asked twice whether it is good, another is made, and signs; the SRK is made in one of them.
REQUEST_DEADLINE_S = TPM_KEY_DEADLINE_S + 3 * TPM_DEADLINE_S
STORE_DEADLINE_S = 30.0
EXIT_GRACE_S = 1.5  # after a signal the process is gone by then, whatever blocks
_UNSEEN = ("Uptime", "UtcNow", "Random", "Sleep", "Release", "ClockConfirmed", "Reach", "NextEvent", "Tell")


def tpm_grace_s(connection: Any) -> float:
    """How long a connection that was given up may wait for the TPM that has its key; 0 where none has."""
    trust: Trust | None = getattr(connection, "trust", None)
    if trust is None or not trust.asks_tpm:
        return 0.0
    return TPM_KEY_DEADLINE_S if trust.creates_key else TPM_DEADLINE_S


def _random() -> float:
    """From 0 up to 1, from the system's generator; the module `random` costs more than a connection does."""
    return (int.from_bytes(os.urandom(7), "big") >> 3) / (1 << 53)


class Runner:
    """Runs exchanges, one after the other, on one TPM, store, connection and clock, and on one hub if there is one.

    `tpm` may be no more than a Signer, for exchanges that ask for nothing else, those of a device with its own key.

    `observe(effect, answer or error, seconds)` is called after each effect of HTTP, TPM, store and hub but NextEvent,
    for progress lines; what it gets holds signatures and keys, so it must not print that.
    `on_wait(reason, until_uptime_s)` is called before each Sleep, `watchdog()` about once a second while everything is
    within its deadline, `tell(message)` for each Tell, to return soon whether anybody takes it. A Connect is given up
    where `interrupted()` is true after `hasten`. `loop` is where it waits, for whom that serves beside it.
    """

    def __init__(
        self,
        *,
        tpm: Signer,
        store: Store,
        connection: Connection,
        clock: Clock,
        random: Callable[[], float] = _random,
        observe: Callable[[Effect, object, float], None] | None = None,
        on_wait: Callable[[str, float], None] | None = None,
        watchdog: Callable[[], None] | None = None,
        hub: Hub | None = None,
        tell: Callable[[Message], bool] | None = None,
        interrupted: Callable[[], bool] = bool,
        loop: Loop | None = None,
    ) -> None:
        self._tpm = tpm
        hardware: Any = tpm
        self._connection = connection
        self._clock = clock
        self._observe = observe
        self._on_wait = on_wait
        self._hub = hub
        self._tell = tell
        self._interrupted = interrupted
        self._in_use = False  # TPM or store were used since the last release
        self._worker = Worker(watchdog, loop or Loop())
        confirmed = clock.is_confirmed if isinstance(clock, SystemClock) else lambda: True
        # How each effect is done, called with its fields; those of the hub join them with the first one.
        self._ways: dict[type, Callable[..., Outcome]] = {
            Uptime: lambda: attempt(clock.uptime_s),
            UtcNow: lambda: attempt(clock.utc),
            ClockConfirmed: lambda: attempt(confirmed),
            Random: lambda: attempt(random),
            Sleep: self._sleep,
            Http: self._request,
            ReadEndorsementKey: lambda name: self._at_tpm(lambda: hardware.endorsement_key(name), TPM_KEY_DEADLINE_S),
            ReadStorageRootKey: lambda: self._at_tpm(hardware.storage_root_key, TPM_KEY_DEADLINE_S),
            ImportKey: lambda activation: self._at_tpm(lambda: hardware.import_key(activation), TPM_DEADLINE_S),
            Sign: lambda *of: self._at_tpm(lambda: tpm.sign(*of), TPM_DEADLINE_S),
            Verify: lambda *of: self._at_tpm(lambda: hardware.verify(*of), TPM_DEADLINE_S),
            ReadRequest: lambda name: self._at_tpm(lambda: hardware.request(name), REQUEST_DEADLINE_S),
            FindIssuers: lambda ders: self._at_tpm(lambda: hardware.issuers(ders), TPM_DEADLINE_S),
            TpmCall: lambda call: self._at_tpm(call, TPM_KEY_DEADLINE_S),
            Commit: lambda *of: self._at_store(lambda: store.commit(*of)),
            LoadRecord: lambda record: self._at_store(lambda: store.load(record)),
            ForgetOlder: lambda record: self._at_store(lambda: store.forget_older(record)),
            Erase: lambda record: self._at_store(lambda: store.erase(record)),
            Release: self._release,
        }

    @property
    def stuck(self) -> bool:
        """Whether an effect did not end: the process is to exit, with os._exit if the interpreter's end could hang."""
        return self._worker.stuck

    def run(self, exchange: Generator[Effect, Any, Result], driver: Driver | None = None) -> Result:
        """Runs `exchange` to its end and returns its result; TPM, connection and worker thread are released then.

        `driver` is made for this exchange; None: it knows of no life. Raises what the exchange raises; RetryLater
        `tpm.timeout`, `store.io` or `network.timeout` where an effect did not end (see `stuck`); RetryLater
        `agent.interrupted` after `stop`; Broken `agent.bug` for any exception that is no DpsError, with its type and
        place and without its text, which might hold a secret.
        """
        driver = driver or Driver()
        driven = driver.drive(exchange)
        try:
            if self.stuck:
                raise RetryLater("agent.interrupted", "an earlier step still hangs; this process must exit first")
            result: Result = self._drive(driven, self._worker.refuse_if_stopped)
        except BaseException:
            with contextlib.suppress(DpsError):  # the first failure counts
                self._end(driven, driver)
            raise
        self._end(driven, driver)
        return result

    def ask_tpm(self, call: Callable[[], Result]) -> Result:
        """Makes one call of the TPM's, such as reading its certificate, with the bounds and the errors of `run`."""

        def exchange() -> Generator[Any, Any, Result]:
            answer: Result = yield TpmCall(call)
            return answer

        return self.run(exchange())

    def stop(self) -> None:
        """Ends the exchange at its next effect, and any later one; from a signal handler or another thread.

        A Sleep, a request or a wait for an event ends at once; a TPM command or a commit may go on for STOP_GRACE_S.
        """
        self._worker.stop()

    def hasten(self) -> None:
        """Ends the current Sleep early, where there is none the next one; from a signal handler or another thread."""
        self._worker.hasten()

    def post(self, event: Event) -> bool:
        """Hands an event to the hub's session; from a signal handler or another thread.

        False, and it is dropped, where there is no hub or too many events wait.
        """
        taken = self._hub is not None and self._hub.post(event)
        if taken:
            self._worker.ring()
        return taken

    def take_back(self, event: Event) -> bool:
        """Drops a posted event that the session has not asked for yet, and says whether it did; like `post`."""
        return self._hub is not None and self._hub.take_back(event)

    def install_signals(self, exit_status: int = EXIT_GROUPS.index("retry")) -> None:
        """From now on SIGTERM and SIGINT are `stop`; for the main thread of a program.

        A process that still lives EXIT_GRACE_S after the first of them ends with `exit_status`, whatever blocks: what
        must survive that survives a power cut as well. The thread that sees to it is started here and ends with the
        process.
        """
        signalled: queue.SimpleQueue[None] = queue.SimpleQueue()

        def on_signal(_number: int, _frame: object) -> None:
            self.stop()
            signalled.put(None)

        def exit_when_late() -> None:
            signalled.get()
            time.sleep(EXIT_GRACE_S)
            os._exit(exit_status)

        threading.Thread(target=exit_when_late, name="dps-exit", daemon=True).start()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, on_signal)

    def _drive(self, driven: Generator[Any, Any, Any], before_each: Callable[[], object]) -> Any:
        outcome = DONE
        while True:
            try:
                effect = _advance(driven, outcome)
            except StopIteration as end:
                return end.value
            self._worker.feed()
            before_each()
            outcome = self._perform(effect)

    def _perform(self, effect: Any) -> Outcome:
        kind = type(effect)
        if kind not in self._ways:
            from dps_agent.host.hub_ways import hub_ways

            self._ways |= hub_ways(
                self._worker, self._clock, self._hub, self._tell, self._interrupted, lambda: tpm_grace_s(self._hub)
            )
        if kind not in self._ways:
            which = "without a hub" if self._hub is None else "with a hub"
            raise Broken("agent.bug", f"the logic yielded a {kind.__name__}, which is no effect of a runner {which}")
        if self._observe is None or kind.__name__ in _UNSEEN:
            return self._ways[kind](*effect)
        started_s = time.monotonic()
        outcome = self._ways[kind](*effect)
        self._observe(effect, outcome.error or outcome.answer, time.monotonic() - started_s)
        return outcome

    def _at_tpm(self, call: Callable[[], Any], deadline_s: float) -> Outcome:
        self._in_use = True

        def longest_s() -> float:
            # An SRK that the TPM has no room for is made anew by whatever comes first, a signature as well.
            return TPM_KEY_DEADLINE_S if getattr(self._tpm, "creates_key", False) else 0.0

        return self._worker.do(call, deadline_s, "tpm.timeout", longest_s)

    def _at_store(self, call: Callable[[], Any]) -> Outcome:
        self._in_use = True
        return self._worker.do(call, STORE_DEADLINE_S, "store.io")

    def _request(self, *of: Any) -> Outcome:
        connection, clock = self._connection, self._clock
        if not may_judge(clock):
            return Outcome(CLOCK_NOT_SET, None)
        try:
            outcome = self._worker.do_or_abort(
                lambda: connection.request(*of),
                HTTP_DEADLINE_S,
                connection.abort,
                "the request",
                tpm_grace_s=lambda: tpm_grace_s(connection),
            )
        except AskOperator as error:  # about this device's certificate
            return Outcome(None, error)
        if isinstance(outcome.answer, Reply) and isinstance(clock, SystemClock):
            clock.heard(outcome.answer.date_s)
        return outcome

    def _sleep(self, delay_s: float, reason: str) -> Outcome:
        if self._on_wait is not None:
            self._on_wait(reason, self._clock.uptime_s() + delay_s)
        self._worker.sleep(delay_s)
        return DONE

    def _release(self, what: str) -> Outcome:
        if what == "DPS":
            return attempt(self._connection.close)
        if what == "hub":
            return attempt(self._hub.close) if self._hub is not None else DONE
        outcome = self._at_tpm(self._tpm.release, TPM_DEADLINE_S) if self._in_use else DONE
        self._in_use = False
        return outcome

    def _end(self, driven: Generator[Any, Any, Any], driver: Driver) -> None:
        """Ends the exchange, then gives back all that `run` used; each step is done even if an earlier one fails."""
        with contextlib.ExitStack() as steps:  # run from the last to the first
            steps.callback(self._worker.end)
            steps.callback(self._give_back, driver)
            steps.callback(self._worker.settle, self._connection.abort, *([self._hub.abort] if self._hub else []))
            steps.callback(lambda: required(attempt(driven.close)))

    def _give_back(self, driver: Driver) -> None:
        if not self.stuck:
            with contextlib.suppress(RetryLater):  # it hangs: `stuck` says so, and the result is worth more
                self._drive(driver.end(self._worker.is_stopped()), bool)


def _advance(driven: Generator[Any, Any, Any], outcome: Outcome) -> Any:
    """The next effect; StopIteration with the result at the end."""
    try:
        return driven.send(outcome.answer) if outcome.error is None else driven.throw(outcome.error)
    except (DpsError, StopIteration):
        raise
    except Exception as error:
        raise bug(error) from None
