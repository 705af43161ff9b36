"""The one thread that does what may block, and the waiting for it.

Two threads play together. The waiting one, on which a runner runs, hands over a call, waits for its outcome with that
call's own deadline, feeds the watchdog until then and no longer, and hears of signals meanwhile. It waits in a `Loop`,
which serves others as well. The working one, `dps-worker`, is started by the first call and does one call after the
other until `end`; it knows nothing of deadlines and never touches a `Worker`'s attributes. Two queues are all that they
share, and the loop's bell: calls go one way, outcomes the other.

What a `Worker` is in follows from three facts:

- `_busy`: a call was handed over and its outcome was not taken yet. There is one call at a time.
- stopped, once `stop` was called, for ever: a call that can be aborted is aborted at once, any other may go on for
  STOP_GRACE_S, and then `refuse_if_stopped` raises.
- `stuck`, once a call did not end, for ever: it can be neither ended nor trusted, and what it holds (a TPM's driver, a
  disk) would block a second thread as well. So the process is to exit; whatever starts it next starts clean.

Haste is an event and no fact: `hasten` ends the sleep of now, or the next one, and makes `_wait` look at `interrupted`.
Signal handlers may run on the waiting thread in the middle of anything. So `stop` and `hasten` take no lock: they set a
value and ring, which wakes the waiting thread, if it waits.
"""

from __future__ import annotations

import math
import os
import queue
import threading
import time
from collections import deque

from dps_agent.effects import NO_REPLY_TIMEOUT, NoReply
from dps_agent.host.loop import Loop
from dps_hal.errors import Broken, DpsError, RetryLater

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, NamedTuple

    class Outcome(NamedTuple):
        """What became of one effect: its answer, or the error to throw."""

        answer: Any
        error: DpsError | None
else:
    from dps_hal.named import namedtuple

    Outcome = namedtuple("Outcome", ("answer", "error"))

DONE = Outcome(None, None)
ABORT_GRACE_S = 1.0  # an aborted request returns at once; so long it may take on a loaded machine
STOP_GRACE_S = 1.0  # a TPM command or a commit under way may go on for so long after `stop`
_WHO = {"tpm.timeout": "the TPM", "store.io": "the storage", "network.timeout": "the connection to the hub"}
_FEED_EVERY_S = 1.0
_NAME = "dps-worker"
_LONGEST_STEP_S = 60.0


class Worker:
    """Makes one call after the other, for one thread; any thread and any signal handler may `stop` or `hasten`.

    `watchdog()` is called about once a second while everything is within its deadline. `stuck` is True once a call did
    not end: the thread hangs in it. The thread is started by the first call and ended by `end`; one that is stuck ends
    with the process.
    """

    def __init__(self, watchdog: Callable[[], None] | None, loop: Loop) -> None:
        self.stuck = False
        self._watchdog = watchdog
        self._loop = loop
        self._hasty = False  # the current sleep, or the next one, ends at once
        self._fed_at_s = -math.inf
        self._stopped_at_s = math.inf
        self._thread: threading.Thread | None = None
        self._calls: queue.SimpleQueue[Callable[[], Any] | None] = queue.SimpleQueue()  # None: end
        self._outcomes: deque[Outcome] = deque()
        self._busy = False  # the thread has a call whose outcome was not taken yet

    def do(
        self, call: Callable[[], Any], deadline_s: float, overrun_code: str, longest_s: Callable[[], float] = float
    ) -> Outcome:
        """The outcome of a call that nothing but its end ends.

        1. It ends within `deadline_s`: its outcome. 2. It ends within `longest_s()`, which is asked at the deadline,
        for it may have turned out meanwhile that the call may take longer: its outcome. 3. `stop` came, and it does not
        end within STOP_GRACE_S: stuck, RetryLater `agent.interrupted`. 4. Otherwise: stuck, RetryLater `overrun_code`.
        """
        self._hand_over(call)
        outcome = self._wait(deadline_s, STOP_GRACE_S)
        if outcome is None and not self.is_stopped() and (more_s := longest_s() - deadline_s) > 0:
            outcome = self._wait(more_s, STOP_GRACE_S)
            deadline_s += more_s
        if outcome is None:
            self.stuck = True
            self.refuse_if_stopped()
            raise RetryLater(overrun_code, f"{_WHO[overrun_code]} did not answer within {deadline_s:g} s")
        return outcome

    def do_or_abort(
        self,
        call: Callable[[], Any],
        deadline_s: float,
        abort: Callable[[], None],
        what: str,
        interrupted: Callable[[], bool] = bool,
        tpm_grace_s: Callable[[], float] = float,
    ) -> Outcome:
        """The answer of a call that `abort` makes end; what the call raises comes out: it is not for the logic.

        1. It ends by itself: its answer. 2. At its deadline it is aborted and ends: its answer, where a NoReply says
        `timeout`. 3. After `stop`, or once `interrupted()` is true after `hasten`, it is aborted and ends: its answer.
        4. It was aborted, and waits for the TPM yet, which nobody can end: its answer, within `tpm_grace_s()` more, or
        STOP_GRACE_S after `stop`. 5. It does not end: stuck, RetryLater `network.timeout` or, after `stop`,
        `agent.interrupted`; `tpm.timeout` where there is a TPM to wait for, for nothing else in it could hang then.
        """
        self._hand_over(call)
        began_s = time.monotonic()
        outcome = self._wait(deadline_s, 0.0, interrupted)
        if outcome is None:
            given_up = interrupted()
            for _ in range(10):  # the thread may be about to begin: then the first one finds nothing to end
                abort()
                outcome = self._wait(ABORT_GRACE_S / 10)
                if outcome is not None:
                    break
            grace_s = tpm_grace_s()
            if outcome is None and not self.is_stopped():
                outcome = self._wait(grace_s, STOP_GRACE_S)
            if outcome is None:
                self.stuck = True
                self.refuse_if_stopped()
                if grace_s:
                    text = f"{what} waits for the TPM, which did not answer within {time.monotonic() - began_s:.0f} s"
                    raise RetryLater("tpm.timeout", text)
                raise RetryLater("network.timeout", f"{what} did not end within {deadline_s:g} s")
            if isinstance(outcome.answer, NoReply) and not (given_up or self.is_stopped()):
                text = f"{NO_REPLY_TIMEOUT}: no whole answer within {deadline_s:g} s"
                outcome = Outcome(NoReply(text, outcome.answer.request_sent), None)
        return required(outcome)

    def sleep(self, delay_s: float) -> None:
        """Returns after so many seconds, or at once after `hasten`."""
        self._wait(delay_s, 0.0, lambda: self._hasty)
        self.forget_haste()
        self.refuse_if_stopped()

    def stop(self) -> None:
        """Ends what can be ended now, and lets `refuse_if_stopped` raise from now on."""
        self._stopped_at_s = min(self._stopped_at_s, time.monotonic())
        self._loop.ring()

    def hasten(self) -> None:
        """Ends the current sleep early, where there is none the next one."""
        self._hasty = True
        self._loop.ring()

    def forget_haste(self) -> None:
        """The next sleep is as long as it is."""
        self._hasty = False

    def is_stopped(self) -> bool:
        """Whether `stop` was called."""
        return self._stopped_at_s < math.inf

    def refuse_if_stopped(self) -> None:
        """RetryLater `agent.interrupted` after `stop`."""
        if self.is_stopped():
            raise RetryLater("agent.interrupted", "stopped before the end")

    def feed(self) -> None:
        """Calls the watchdog if that is due."""
        now_s = time.monotonic()
        if self._watchdog is not None and now_s - self._fed_at_s >= _FEED_EVERY_S:
            self._fed_at_s = now_s
            self._watchdog()

    def ring(self) -> None:
        """Ends the `wait` of now, or else the next one at once; from any thread and any signal handler."""
        self._loop.ring()

    def wait(self, until_s: float, fileno: int = -1, interest: int = 0) -> int:
        """One wait of the loop, and of no more than the watchdog has patience for; see `Loop.wait`."""
        self.feed()
        step_s = _LONGEST_STEP_S if self._watchdog is None else _FEED_EVERY_S
        return self._loop.wait(min(until_s, time.monotonic() + step_s), fileno, interest)

    def settle(self, *aborts: Callable[[], None]) -> None:
        """Ends a call whose outcome nobody has waited for: Ctrl-C came, or a callback failed."""
        if self._busy and not self.stuck:
            for abort in aborts:
                abort()
            self.stuck = self._wait(STOP_GRACE_S) is None

    def end(self) -> None:
        """Ends the thread, if it does not hang; the next call starts another one."""
        if self._thread is not None:
            self.stuck = self.stuck or self._busy
            self._calls.put(None)
            if not self.stuck:
                self._thread.join()
                self._thread = None
        self._loop.close()

    def _hand_over(self, call: Callable[[], Any]) -> None:
        if self._thread is None:
            shared = (self._calls, self._outcomes, self._loop.ring)
            self._thread = threading.Thread(target=_work, args=shared, name=_NAME, daemon=True)
            self._thread.start()
        self._busy = True
        self._calls.put(call)

    def _wait(self, within_s: float, after_stop_s: float = math.inf, over: Callable[[], bool] = bool) -> Outcome | None:
        """What comes first of four things.

        1. The thread's outcome. 2. `within_s` is over: None. 3. So is `after_stop_s` since `stop`, if it came earlier
        since now: None. 4. `over()` is true, which is looked at now and after each `hasten`: None.
        """
        began_s = time.monotonic()
        until_s = began_s + within_s
        while (end_s := min(until_s, max(began_s, self._stopped_at_s) + after_stop_s)) > time.monotonic():
            if over():
                break
            if self._outcomes:
                self._busy = False
                return self._outcomes.popleft()
            self.wait(end_s)
        return None


def worker_hangs() -> bool:
    """Whether a worker of this process still hangs in what it was asked to do; see `Worker.stuck`."""
    return any(thread.name == _NAME for thread in threading.enumerate())


def bug(error: Exception) -> Broken:
    """An unforeseen exception as Broken `agent.bug`: its type and where it came from, nothing of what it says."""
    places = []
    trace = error.__traceback__
    while trace is not None:
        places.append(f"{os.path.basename(trace.tb_frame.f_code.co_filename)}:{trace.tb_lineno}")
        trace = trace.tb_next
    return Broken("agent.bug", f"{type(error).__name__} at {' < '.join(places[:-5:-1])}")


def attempt(call: Callable[[], Any]) -> Outcome:
    """What becomes of a call made here and now."""
    try:
        return Outcome(call(), None)
    except DpsError as error:
        return Outcome(None, error)
    except Exception as error:
        return Outcome(None, bug(error))


def required(outcome: Outcome) -> Outcome:
    """The outcome, if it is an answer; raises the error."""
    if outcome.error is not None:
        raise outcome.error
    return outcome


def _work(
    calls: queue.SimpleQueue[Callable[[], Any] | None], outcomes: deque[Outcome], ring: Callable[[], None]
) -> None:
    """The thread `dps-worker`: started by the first call after the last `end`, ends with the next `end`.

    One that hangs in a call ends with the process.
    """
    while (call := calls.get()) is not None:
        outcomes.append(attempt(call))
        ring()
        del call  # it may hold a key, and the next call may be far
