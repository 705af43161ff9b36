"""Does what the logic asks for, on Linux.

One worker thread does what may block (HTTP, TPM, storage, hub); the main thread waits for it with that effect's own
deadline, feeds the watchdog until then and no longer, and hears of signals meanwhile. A worker that overruns its
deadline can be neither ended nor trusted: what it holds (a TPM's driver, a disk) would block a second one as well. So
the exchange ends, `run` raises, and the process is to exit; whatever starts it next starts clean.
"""

from __future__ import annotations

import contextlib
import math
import os
import queue
import signal
import threading
import time
from functools import partial
from random import SystemRandom

from dps_agent.effects import (
    NO_REPLY_TIMEOUT,
    NO_REPLY_TLS,
    Commit,
    ForgetOlder,
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
from dps_agent.host.clock import SystemClock
from dps_agent.hub_effects import (
    NOT_AUTHORIZED,
    Acknowledge,
    ConnAck,
    Connect,
    Disconnect,
    GiveUp,
    NextEvent,
    Publish,
    SendAgain,
    Subscribe,
    Tell,
)
from dps_hal.errors import EXIT_GROUPS, Broken, DpsError, RetryLater

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from typing import Any, NamedTuple, Protocol, TypeVar

    from dps_agent.effects import Effect
    from dps_agent.hub_effects import Event, Message
    from dps_agent.sas import SasToken
    from dps_hal.contracts import Clock, Store, Tpm

    Result = TypeVar("Result")

    class Connection(Protocol):
        """What the runner needs of `dps_agent.host.network.https.DpsConnection`."""

        def request(self, method: str, path: str, body: bytes, authorization: SasToken | None) -> Reply | NoReply: ...
        def abort(self) -> None: ...
        def close(self) -> None: ...

    class Hub(Protocol):
        """What the runner needs of `dps_agent.host.network.mqtt.HubConnection`."""

        def connect(self, effect: Connect) -> ConnAck | NoReply: ...
        def is_verified(self, hub: str) -> bool: ...
        def subscribe(self, filters: tuple[tuple[str, int], ...]) -> int | None: ...
        def publish(self, topic: str, payload: bytes, qos: int) -> int | None: ...
        def send_again(self, packet_id: int) -> None: ...
        def give_up(self, packet_id: int) -> None: ...
        def acknowledge(self, packet_id: int) -> None: ...
        def next_event(self, until_s: float) -> Event | None: ...
        def post(self, event: Event) -> bool: ...
        def take_back(self, event: Event) -> bool: ...
        def disconnect(self) -> None: ...
        def abort(self) -> None: ...
        def close(self) -> None: ...

    class _Outcome(NamedTuple):
        """What became of one effect: its answer, or the error to throw."""

        answer: Any
        error: DpsError | None

    class TpmCall(NamedTuple):
        """An effect of this runner alone: one call of a TPM's that the logic knows nothing of."""

        call: Callable[[], Any]

    class ConfirmClock(NamedTuple):
        """An effect of this runner alone, before a token is made: answered by None once all were asked for the time.

        Where nobody vouches for the system's clock the certificate of `hub` is looked at; where there is no hub, "", or
        it is not reached, DPS is asked.
        """

        hub: str
else:
    from collections import namedtuple

    _Outcome = namedtuple("_Outcome", ("answer", "error"))
    TpmCall = namedtuple("TpmCall", ("call",))
    ConfirmClock = namedtuple("ConfirmClock", ("hub",))

HTTP_DEADLINE_S = 60.0  # one request in all
# Each is longer than the limits of `dps_hal.tpm.rules`, whose clean errors come first; these end what hangs.
TPM_KEY_DEADLINE_S = 180.0  # a TPM may have to create the EK or SRK first: RSA-2048 takes minutes on slow ones
TPM_DEADLINE_S = 30.0
STORE_DEADLINE_S = 30.0
CONNECT_DEADLINE_S = 65.0  # HubConnection itself ends after 60 s
HUB_DEADLINE_S = 10.0  # for what waits for nobody
EVENT_GRACE_S = 10.0  # after the end of a wait for an event
ABORT_GRACE_S = 1.0  # an aborted request returns at once; this is for a loaded machine
STOP_GRACE_S = 1.0  # a TPM command or a commit under way may end within this after `stop`
EXIT_GRACE_S = 1.5  # after a signal the process is gone by then, whatever blocks
RELEASE_FOR_SLEEPS_OVER_S = 2.0
CLOSE_FOR_SLEEPS_OVER_S = 60.0
_WHO = {"tpm.timeout": "the TPM", "store.io": "the storage", "network.timeout": "the connection to the hub"}
_CLOCK_NOT_SET = NoReply(f"{NO_REPLY_TLS}: the clock is not set, so no certificate can be judged", False)
_FEED_EVERY_S = 1.0
_WORKER_NAME = "dps-worker"
_LONGEST_STEP_S = 60.0
_random = SystemRandom().random


class Runner:
    """Runs exchanges, one after the other, on one TPM, store, connection and clock, and on one hub if there is one.

    `observe(effect, answer or error, seconds)` is called after each effect of HTTP, TPM, store and hub but NextEvent,
    for progress lines; what it gets holds signatures and keys, so it must not print that.
    `on_wait(reason, until_uptime_s)` is called before each Sleep, `watchdog()` about once a second while everything is
    within its deadline, `tell(message)` for each Tell, to return soon whether anybody takes it. A Connect is given up
    where `interrupted()` is true after `hasten`.

    `stuck` is True once an effect did not end: the worker hangs in it, the process is to exit, with os._exit if the
    interpreter's own end could hang as well.
    """

    def __init__(
        self,
        *,
        tpm: Tpm,
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
    ) -> None:
        self.stuck = False
        self._tpm = tpm
        self._store = store
        self._connection = connection
        self._clock = clock
        self._random = random
        self._observe = observe
        self._on_wait = on_wait
        self._watchdog = watchdog
        self._hub = hub
        self._tell = tell
        self._interrupted = interrupted
        self._hasty = False  # the current Sleep, or the next one, ends at once
        self._in_use = False  # TPM or store were used since the last release
        self._fed_at_s = -math.inf
        self._stopped_at_s = math.inf
        self._worker: threading.Thread | None = None
        self._calls: queue.SimpleQueue[Callable[[], Any] | None] = queue.SimpleQueue()  # None: end
        self._outcomes: queue.SimpleQueue[_Outcome | None] = queue.SimpleQueue()  # None: look whether to stop
        self._busy = False  # the worker has a call whose outcome was not taken yet

    def run(self, exchange: Generator[Effect, Any, Result]) -> Result:
        """Runs `exchange` to its end and returns its result; TPM, connection and worker thread are released then.

        Raises what the exchange raises; RetryLater `tpm.timeout`, `store.io` or `network.timeout` where an effect did
        not end (see `stuck`); RetryLater `agent.interrupted` after `stop`; Broken `agent.bug` for any exception that
        is no DpsError, with its type and place and without its text, which might hold a secret.
        """
        try:
            if self.stuck:
                raise RetryLater("agent.interrupted", "an earlier step still hangs; this process must exit first")
            result = self._drive(exchange)
        except BaseException:
            with contextlib.suppress(DpsError):  # the first failure counts
                self._end(exchange)
            raise
        self._end(exchange)
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
        self._stopped_at_s = min(self._stopped_at_s, time.monotonic())
        self._outcomes.put(None)  # a SimpleQueue, and no lock: the signal may have come while the main thread held it

    def hasten(self) -> None:
        """Ends the current Sleep early, where there is none the next one; from a signal handler or another thread."""
        self._hasty = True
        self._outcomes.put(None)

    def post(self, event: Event) -> bool:
        """Hands an event to the hub's session; from a signal handler or another thread.

        False, and it is dropped, where there is no hub or too many events wait.
        """
        return self._hub is not None and self._hub.post(event)

    def take_back(self, event: Event) -> bool:
        """Drops a posted event that the session has not asked for yet, and says whether it did; like `post`."""
        return self._hub is not None and self._hub.take_back(event)

    def install_signals(self, exit_status: int = EXIT_GROUPS.index("retry")) -> None:
        """From now on SIGTERM and SIGINT are `stop`; for the main thread of a program.

        A process that still lives EXIT_GRACE_S after the first of them ends with `exit_status`, whatever blocks: what
        must survive that survives a power cut as well.
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

    def _drive(self, exchange: Generator[Effect, Any, Result]) -> Result:
        outcome = _Outcome(None, None)
        while True:
            try:
                effect = _advance(exchange, outcome)
            except StopIteration as end:
                result: Result = end.value
                return result
            self._feed()
            outcome = self._perform(effect)

    def _perform(self, effect: Effect) -> _Outcome:
        self._refuse_if_stopped()
        match effect:
            case Uptime():
                return _attempt(self._clock.uptime_s)
            case UtcNow():
                return _attempt(self._clock.utc)
            case Random():
                return _attempt(self._random)
            case Sleep(delay_s, reason):
                return self._sleep(delay_s, reason)
            case Tell(message):
                return _required(lambda: self._tell is not None and self._tell(message))
            case NextEvent(until_uptime_s):
                return self._next_event(until_uptime_s)
            case ConfirmClock(hub_name):
                return self._confirm_clock(hub_name)
        started_s = time.monotonic()
        match effect:
            case Http():
                outcome = self._request(effect)
            case Connect() | Subscribe() | Publish() | SendAgain() | GiveUp() | Acknowledge() | Disconnect():
                outcome = self._at_hub(effect)
            case _:
                self._in_use = True
                outcome = self._on_worker(*self._call(effect))
        if self._observe is not None:
            self._observe(effect, outcome.error or outcome.answer, time.monotonic() - started_s)
        return outcome

    def _call(self, effect: Effect) -> tuple[Callable[[], Any], float, str]:
        """What the worker is to call for `effect`, its deadline in seconds, and the error's code if it does not end."""
        tpm, store = self._tpm, self._store
        match effect:
            case ReadEndorsementKey(name):
                return lambda: tpm.endorsement_key(name), TPM_KEY_DEADLINE_S, "tpm.timeout"
            case ReadStorageRootKey():
                return tpm.storage_root_key, TPM_KEY_DEADLINE_S, "tpm.timeout"
            case ImportKey(activation):
                return lambda: tpm.import_key(activation), TPM_DEADLINE_S, "tpm.timeout"
            case Sign(wrapped_key, message):
                return lambda: tpm.sign(wrapped_key, message), TPM_DEADLINE_S, "tpm.timeout"
            case TpmCall(call):
                return call, TPM_KEY_DEADLINE_S, "tpm.timeout"
            case Commit(record, payload):
                return lambda: store.commit(record, payload), STORE_DEADLINE_S, "store.io"
            case LoadRecord(record):
                return lambda: store.load(record), STORE_DEADLINE_S, "store.io"
            case ForgetOlder(record):
                return lambda: store.forget_older(record), STORE_DEADLINE_S, "store.io"
        raise Broken("agent.bug", f"the logic yielded a {type(effect).__name__}, which is no effect")

    def _on_worker(self, call: Callable[[], Any], deadline_s: float, overrun_code: str) -> _Outcome:
        self._hand_over(call)
        outcome = self._wait(deadline_s, STOP_GRACE_S)
        # An SRK that the TPM has no room for is made anew by whatever comes first, a signature as well.
        more_s = TPM_KEY_DEADLINE_S - deadline_s if getattr(self._tpm, "creates_key", False) else 0.0
        if outcome is None and overrun_code == "tpm.timeout" and more_s > 0 and not self._is_stopped():
            outcome = self._wait(more_s, STOP_GRACE_S)
            deadline_s += more_s
        if outcome is None:
            self.stuck = True
            self._refuse_if_stopped()
            raise RetryLater(overrun_code, f"{_WHO[overrun_code]} did not answer within {deadline_s:g} s")
        return outcome

    def _request(self, http: Http) -> _Outcome:
        if not self._may_judge():
            return _Outcome(_CLOCK_NOT_SET, None)
        outcome = self._ended_within(
            lambda: self._connection.request(*http), HTTP_DEADLINE_S, self._connection.abort, "the request"
        )
        if isinstance(outcome.answer, Reply) and isinstance(self._clock, SystemClock):
            self._clock.heard(outcome.answer.date_s)
        return outcome

    def _ended_within(
        self,
        call: Callable[[], Any],
        deadline_s: float,
        abort: Callable[[], None],
        what: str,
        interrupted: Callable[[], bool] = bool,
    ) -> _Outcome:
        """The outcome of a call that `abort` makes end, at its deadline or once `interrupted()` is true.

        A NoReply that comes of the deadline says `timeout`.
        """
        self._hand_over(call)
        outcome = self._wait(deadline_s, 0.0, interrupted)
        if outcome is None:
            given_up = interrupted()
            for _ in range(10):  # the worker may be about to begin: then the first one finds nothing to end
                abort()
                outcome = self._wait(ABORT_GRACE_S / 10)
                if outcome is not None:
                    break
            else:
                self.stuck = True
                self._refuse_if_stopped()
                raise RetryLater("network.timeout", f"{what} did not end within {deadline_s:g} s")
            if isinstance(outcome.answer, NoReply) and not (given_up or self._is_stopped()):
                text = f"{NO_REPLY_TIMEOUT}: no whole answer within {deadline_s:g} s"
                outcome = _Outcome(NoReply(text, outcome.answer.request_sent), None)
        if outcome.error is not None:  # HTTP and hub are answered by values, so this is not for the logic
            raise outcome.error
        return outcome

    def _at_hub(
        self, effect: Connect | Subscribe | Publish | SendAgain | GiveUp | Acknowledge | Disconnect
    ) -> _Outcome:
        hub = self._hub_or_bug()
        if isinstance(effect, Connect):
            return self._connect(hub, effect)
        call: Callable[[], Any]
        match effect:
            case Subscribe(filters):
                call = partial(hub.subscribe, filters)
            case Publish(topic, payload, qos):
                call = partial(hub.publish, topic, payload, qos)
            case SendAgain(packet_id):
                call = partial(hub.send_again, packet_id)
            case GiveUp(packet_id):
                call = partial(hub.give_up, packet_id)
            case Acknowledge(packet_id):
                call = partial(hub.acknowledge, packet_id)
            case _:
                call = hub.disconnect
        outcome = self._on_worker(call, HUB_DEADLINE_S, "network.timeout")
        if outcome.error is not None:
            raise outcome.error
        return outcome

    def _connect(self, hub: Hub, effect: Connect) -> _Outcome:
        if not self._may_judge():
            return _Outcome(_CLOCK_NOT_SET, None)
        outcome = self._ended_within(
            lambda: hub.connect(effect), CONNECT_DEADLINE_S, hub.abort, "the connection", self._interrupted
        )
        answer = outcome.answer
        if isinstance(answer, ConnAck) and answer.return_code in NOT_AUTHORIZED:
            clock = self._clock
            if isinstance(clock, SystemClock) and not clock.is_confirmed():  # it may have been a token of another day
                self._ask_dps_the_time()
        return outcome

    def _may_judge(self) -> bool:
        """Whether a certificate may be judged now."""
        clock = self._clock
        return clock.may_judge() if isinstance(clock, SystemClock) else clock.utc().believable

    def _confirm_clock(self, hub_name: str) -> _Outcome:
        clock, hub = self._clock, self._hub
        if isinstance(clock, SystemClock) and not clock.utc().believable and clock.may_judge():
            if hub is not None and hub_name:
                outcome = self._ended_within(
                    lambda: hub.is_verified(hub_name),
                    CONNECT_DEADLINE_S,
                    hub.abort,
                    "the connection",
                    self._interrupted,
                )
                if outcome.answer is True:
                    clock.heard(None)
            if not clock.utc().believable:
                self._ask_dps_the_time()
        return _Outcome(None, None)

    def _ask_dps_the_time(self) -> None:
        if not self._is_stopped():
            self._request(Http("GET", "/", b"", None))

    def _hub_or_bug(self) -> Hub:
        if self._hub is None:
            raise Broken("agent.bug", "the logic asked for a hub of a runner that has none")
        return self._hub

    def _next_event(self, until_uptime_s: float) -> _Outcome:
        hub = self._hub_or_bug()
        self._hasty = False
        within_s = max(until_uptime_s - self._clock.uptime_s(), 0.0)
        self._prepare_to_wait(within_s)
        until_s = time.monotonic() + within_s
        return self._ended_within(
            lambda: hub.next_event(until_s), within_s + EVENT_GRACE_S, hub.abort, "the wait for an event"
        )

    def _prepare_to_wait(self, within_s: float) -> None:
        if within_s > RELEASE_FOR_SLEEPS_OVER_S:
            self._release()
        if within_s > CLOSE_FOR_SLEEPS_OVER_S:
            _required(self._connection.close)

    def _sleep(self, delay_s: float, reason: str) -> _Outcome:
        self._prepare_to_wait(delay_s)
        if self._on_wait is not None:
            self._on_wait(reason, self._clock.uptime_s() + delay_s)
        self._wait(delay_s, 0.0, lambda: self._hasty)
        self._hasty = False
        self._refuse_if_stopped()
        return _Outcome(None, None)

    def _release(self) -> None:
        if self._in_use:
            self._in_use = False
            outcome = self._on_worker(self._tpm.release, TPM_DEADLINE_S, "tpm.timeout")
            if outcome.error is not None:
                raise outcome.error

    def _hand_over(self, call: Callable[[], Any]) -> None:
        if self._worker is None:
            self._worker = threading.Thread(
                target=_work, args=(self._calls, self._outcomes), name=_WORKER_NAME, daemon=True
            )
            self._worker.start()
        self._busy = True
        self._calls.put(call)

    def _wait(
        self, within_s: float, after_stop_s: float = math.inf, over: Callable[[], bool] = bool
    ) -> _Outcome | None:
        """The worker's outcome; None once `within_s` is over, or `after_stop_s` after `stop` (if earlier: from now).

        Also None once `over()` is true: it is looked at now and after each `hasten`.
        """
        began_s = time.monotonic()
        until_s = began_s + within_s
        step_s = _LONGEST_STEP_S if self._watchdog is None else _FEED_EVERY_S
        while (left_s := min(until_s, max(began_s, self._stopped_at_s) + after_stop_s) - time.monotonic()) > 0:
            self._feed()
            if over():
                break
            with contextlib.suppress(queue.Empty):
                outcome = self._outcomes.get(timeout=min(left_s, step_s))
                if outcome is not None:
                    self._busy = False
                    return outcome
        return None

    def _feed(self) -> None:
        now_s = time.monotonic()
        if self._watchdog is not None and now_s - self._fed_at_s >= _FEED_EVERY_S:
            self._fed_at_s = now_s
            self._watchdog()

    def _is_stopped(self) -> bool:
        return self._stopped_at_s < math.inf

    def _refuse_if_stopped(self) -> None:
        if self._is_stopped():
            raise RetryLater("agent.interrupted", "stopped before the end")

    def _end(self, exchange: Generator[Effect, Any, Any]) -> None:
        """Ends the exchange, then releases all that `run` used; each step is done even if an earlier one fails."""
        with contextlib.ExitStack() as steps:  # run from the last to the first
            steps.callback(self._end_worker)
            steps.callback(self._close_unless_stuck)
            steps.callback(self._release_unless_stuck)
            steps.callback(self._leave_hub_unless_stuck)
            steps.callback(self._settle)
            steps.callback(_required, exchange.close)

    def _settle(self) -> None:
        if self._busy and not self.stuck:  # `run` was left in the middle of a wait: Ctrl-C, or a callback that failed
            self._connection.abort()
            if self._hub is not None:
                self._hub.abort()
            self.stuck = self._wait(STOP_GRACE_S) is None

    def _leave_hub_unless_stuck(self) -> None:
        if self._hub is not None and not self.stuck:
            _required(self._hub.close)

    def _release_unless_stuck(self) -> None:
        if not self.stuck:
            with contextlib.suppress(RetryLater):  # it hangs: `stuck` says so, and the result is worth more
                self._release()

    def _close_unless_stuck(self) -> None:
        if not self.stuck:
            _required(self._connection.close)

    def _end_worker(self) -> None:
        if self._worker is not None:
            self.stuck = self.stuck or self._busy
            self._calls.put(None)
            if not self.stuck:
                self._worker.join()
                self._worker = None


def worker_hangs() -> bool:
    """Whether a worker of this process still hangs in what it was asked to do; see `Runner.stuck`."""
    return any(thread.name == _WORKER_NAME for thread in threading.enumerate())


def bug(error: Exception) -> Broken:
    """An unforeseen exception as Broken `agent.bug`: its type and where it came from, nothing of what it says."""
    places = []
    trace = error.__traceback__
    while trace is not None:
        places.append(f"{os.path.basename(trace.tb_frame.f_code.co_filename)}:{trace.tb_lineno}")
        trace = trace.tb_next
    return Broken("agent.bug", f"{type(error).__name__} at {' < '.join(places[:-5:-1])}")


def _work(calls: queue.SimpleQueue[Callable[[], Any] | None], outcomes: queue.SimpleQueue[_Outcome | None]) -> None:
    while (call := calls.get()) is not None:
        outcomes.put(_attempt(call))
        del call  # it may hold a key, and the next call may be far


def _attempt(call: Callable[[], Any]) -> _Outcome:
    try:
        return _Outcome(call(), None)
    except DpsError as error:
        return _Outcome(None, error)
    except Exception as error:
        return _Outcome(None, bug(error))


def _required(call: Callable[[], Any]) -> _Outcome:
    outcome = _attempt(call)
    if outcome.error is not None:
        raise outcome.error
    return outcome


def _advance(exchange: Generator[Effect, Any, Any], outcome: _Outcome) -> Effect:
    """The exchange's next effect; StopIteration with the result at its end."""
    try:
        return exchange.send(outcome.answer) if outcome.error is None else exchange.throw(outcome.error)
    except (DpsError, StopIteration):
        raise
    except Exception as error:
        raise bug(error) from None
