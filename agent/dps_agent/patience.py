"""What has failed so far, how long that makes the device wait, and what of both outlives a restart.

Patience does no work: it listens while the life registers and connects, counts, and says how long to wait. It is one
machine and two counts:

1. Where the device stands with DPS is one of four states; every event of it is a row of `PATIENCES`, and `_hear` is
   the only door.
2. `attempts` counts registrations that failed in a row, the one under way included.
3. `_connects` and `_unsteady` count connections that were not steady: those begun, and those that ended.

Who pushes it. The life alone: `begin_attempt`, `fail_attempt`, `hold` and `forgive` are the four events of the table;
`begin_connection`, `lose_connection`, `steady` and `begin_identity` only count. The life hands on what the hub told of
the fleet (`keep_fleet`), which stands in the same record. Patience pushes nobody: it returns delays, and the life
waits.

What is not in the table. `load` puts a device that has failed in an earlier life into FAILED, before any event. The
times before which DPS is not to be asked (`dps_not_before_s`, DPS's wish, and the device's own) are no states: what is
forgiven is the counts, and never DPS's wish. An AskOperator is a failure as any other in the table and only has a
longer delay; that HALTED follows is the life's decision.

Both counts go up before the work begins, so that work which a crash ends is counted as well. They are stored in the
record `progress` with the first count of a life and whenever a count doubles; one that fails as the one before it costs
no second write. The record is expendable: a device that loses it waits once less.
"""

from dps_agent.backoff import (
    HALTED_S,
    HUB_FIRST_S,
    HUB_LIMIT_S,
    WAITING_FIRST_S,
    WAITING_LIMIT_S,
    after_request_s,
    around_s,
    exponential_floor_s,
    exponential_s,
    throttled_s,
)
from dps_agent.effects import Commit, LoadRecord, Random, Sleep, Uptime, UtcNow
from dps_agent.fleet import UNKNOWN
from dps_agent.progress import Progress, decode_fleet, decode_progress, encode_progress
from dps_agent.utc import CERTIFICATE, LONGEST_STEP_S
from dps_hal.contracts import PROGRESS
from dps_hal.errors import AskOperator, Broken, DpsError, RetryLater

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Generator
    from typing import Any

    from dps_agent.effects import Effect
    from dps_agent.fleet import Fleet
    from dps_hal.contracts import StoredRecord, Utc

# Where the device stands with DPS.
CALM = "calm"  # nothing failed since the last success
TRYING = "trying"  # an attempt is counted and under way
FAILED = "failed"  # the last attempt failed
PROVING = "proving"  # an identity holds, and the failures before it count until the hub has accepted it

# What it listens to.
BEGUN = "attempt begins"
MISSED = "attempt failed"
HELD = "it holds"  # an identity does
FORGIVEN = "it is good"  # the identity: the hub has accepted it, or none is wanted

# State, event, next state. One text, because a board has each tuple and each word in its heap.
PATIENCES = """
calm: attempt begins: trying
calm: attempt failed: failed
calm: it holds: calm
calm: it is good: calm
trying: attempt begins: trying
trying: attempt failed: failed
trying: it holds: proving
failed: attempt begins: trying
failed: attempt failed: failed
failed: it holds: proving
failed: it is good: calm
proving: attempt begins: trying
proving: attempt failed: failed
proving: it holds: proving
proving: it is good: calm
"""

PATIENCE_CODES = ("dps.throttled", "dps.unavailable", "dps.conflict")  # codes of failures whose delay may be DPS's wish
KEYLESS_LIMIT = 3  # assignments without a key in a row before an operator is asked
MESSAGE_LIMIT = 400  # characters of an error's text that `progress` keeps
# Of connections that `progress` counts; the delay grows no more. At 40 to 80 s a crash loop costs the hub about a
# thousand connections a day, and a device on bad mains is not kept waiting for long when it has power.
CONNECTS_LIMIT = 5
PROVOKED_LIMIT = 2  # so many ends that a message provoked count, which makes 10 to 20 s
SERVED_LIMIT = 4  # so many ends count while the hub serves the device in between, which makes 40 to 80 s
FLEET_AGAIN_S = 86400  # between two writes of what the hub tells of the fleet alone, which may be news each second
CLOCK_WAIT_S = 60  # of a longer spread, for NTP to tell the time under which the rest of it is stored
INTERRUPTED = RetryLater("agent.interrupted", "a registration began and did not end")
NOTHING = Progress(0, 0, 0, False, "", "", 0, 0)


class Patience:
    """The counts and waits of one device's life. `load` comes first."""

    def __init__(self, under: int = 0, dps_not_before_s: float = 0.0) -> None:
        """`under` is `Settings.under`: what failed under other settings does not count."""
        self._under = under
        self.state = CALM
        self.attempts = 0  # registrations in a row that failed, the one under way included
        self.failed = 0  # registrations in a row that failed
        self.dps_not_before_s = dps_not_before_s  # DPS wants nobody to ask it before this uptime
        self._own_not_before_s = 0.0  # the device itself does not want to ask before this one
        self._keyless = 0  # assignments without a key in a row
        self._throttled = 0  # refusals for want of quota since the last success
        self._connects = 0  # connections begun in a row, none of them steady yet; also those of earlier lives
        self._unsteady = 0  # connections in a row that did not last, or could not even begin
        self.fleet: Fleet = UNKNOWN  # as the hub told it last
        self._fleet_stored: Fleet = UNKNOWN
        self._fleet_not_before_s = 0.0  # for the fleet alone nothing is written before this uptime
        self._stored = NOTHING  # `progress` as it was read or written last
        self._counted: list[str] = []  # which of the two counts this life has stored already

    def load(self, once: bool = False) -> "Generator[Effect, Any, None]":
        """Takes over what the record `progress` says of earlier lives; with `once` it waits for no clock."""
        try:
            stored: StoredRecord | None = yield LoadRecord(PROGRESS)
        except DpsError:
            return  # what ails the store shows when the identity is loaded
        last = (stored and decode_progress(stored.payload)) or NOTHING
        if last.under not in (0, self._under):
            last = Progress(0, 0, last.last_believed_s, False, "", "", last.connects, self._under)
        self._stored = last
        self.fleet = self._fleet_stored = decode_fleet(stored.payload) if stored else UNKNOWN
        if last is NOTHING:
            return
        self.attempts = self.failed = last.attempts
        self._throttled = last.attempts if last.code == "dps.throttled" else 0
        if last.attempts and self.state != TRYING:  # in TRYING memory ended an attempt of this life
            self.state = FAILED
        if last.code == INTERRUPTED.code and not once and (yield from self.lacks_clock(last.next_try_delay_s)):
            yield Sleep(CLOCK_WAIT_S, "waits for a clock, to be spread as before")
        left_s: int = yield from self._left_of_last_delay_s()
        if last.code == INTERRUPTED.code and left_s and left_s == last.next_try_delay_s:
            # Of a spread nobody knows how much has passed. A random part of the whole stays, or a device that never has
            # power for so long would never register.
            random: float = yield Random()
            left_s = int(random * left_s)
        now_s: float = yield Uptime()
        self._own_not_before_s = now_s + left_s
        if last.code in PATIENCE_CODES and not self.dps_not_before_s:
            self.dps_not_before_s = now_s + left_s
        self._connects = last.connects
        self._unsteady = max(last.connects - 1, 0)  # one may be a restart that nothing led to

    # Registrations.

    def may_ask_dps(self, now_s: float) -> bool:
        """Whether no wait is left at this uptime, neither the device's own nor one that DPS asked for."""
        return now_s >= self._not_before_s()

    def before_dps_s(self) -> "Generator[Effect, Any, int]":
        """The delay before DPS is asked again: longer with each attempt, never less than what is left of a wait."""
        delay_s: float = yield from exponential_s(max(self.attempts, 1), WAITING_FIRST_S, WAITING_LIMIT_S)
        now_s: float = yield Uptime()
        return max(int(delay_s) + 1, int(self._not_before_s() - now_s + 0.999))

    def lacks_clock(self, spread_s: float) -> "Generator[Effect, Any, bool]":
        """Whether a spread is so long that its first part is well spent on waiting for somebody to tell the time.

        By the time a restart measures what is left of it.
        """
        now: Utc = yield UtcNow()
        return spread_s > CLOCK_WAIT_S and not now.believable

    def begin_attempt(self, spread_s: int = 0) -> "Generator[Effect, Any, None]":
        """Counts a registration that is about to begin, after `spread_s` seconds that a restart shall not forget.

        Where nothing can be stored there is no point in asking DPS for a new key: raises what the store said. A store
        that fails in other ways may fail for this expendable record alone.
        """
        self._hear(BEGUN)
        self.attempts += 1
        if self._is_first_of_life("attempts") or _is_power_of_two(self.attempts):
            refusal = yield from self._store(INTERRUPTED, spread_s)
            if isinstance(refusal, AskOperator) or (refusal and refusal.code == "store.full"):
                raise refusal

    def fail_attempt(self, error: DpsError) -> "Generator[Effect, Any, tuple[DpsError, int]]":
        """Counts what failed; returns the error as it is to be shown, and the delay before the next attempt.

        1. An operator is needed: about HALTED_S. 2. DPS has no quota: what `throttled_s` makes of its wish. 3. DPS
        named a time: that one. 4. Anything else: longer with each attempt.
        """
        self._keyless = self._keyless + 1 if error.code == "dps.assigned_without_key" else 0
        if self._keyless > KEYLESS_LIMIT:
            error = AskOperator(error.code, error.message, None, error.request_id)
        if self.state != TRYING:
            self.attempts += 1  # it failed before `begin_attempt` could count it
        self.failed += 1
        self._hear(MISSED)
        if isinstance(error, AskOperator):
            chosen_s: float = yield from around_s(HALTED_S)
        elif error.code == "dps.throttled":
            self._throttled += 1
            chosen_s = yield from throttled_s(self._throttled, error.retry_after_s or 0)
        elif error.retry_after_s:
            chosen_s = yield from after_request_s(error.retry_after_s)
        else:
            chosen_s = yield from exponential_s(self.attempts, WAITING_FIRST_S, WAITING_LIMIT_S)
        delay_s = int(chosen_s) + 1
        now_s: float = yield Uptime()
        self._own_not_before_s = now_s + delay_s
        if error.retry_after_s and error.code in PATIENCE_CODES:
            self.dps_not_before_s = now_s + error.retry_after_s
        is_news: bool = yield from self._is_news(error)
        if is_news:
            yield from self._store(error, delay_s)
        return error, delay_s

    def hold(self) -> None:
        """An identity holds; failures before it count until `forgive`."""
        self._hear(HELD)
        self._keyless = 0

    def forgive(self) -> "Generator[Effect, Any, None]":
        """Forgets what failed, but for the patience that DPS asked for."""
        self._hear(FORGIVEN)
        self.attempts = self.failed = self._throttled = 0
        last = self._stored
        if not last.attempts:
            return
        now_s: float = yield Uptime()
        left_s = max(int(self.dps_not_before_s - now_s + 0.999), 0)
        if left_s and last.code in PATIENCE_CODES:
            yield from self._store(RetryLater(last.code, last.message), left_s)
        else:
            yield from self._store(None, 0)

    # Connections.

    def begin_connection(self) -> "Generator[Effect, Any, None]":
        """Counts a connection that is about to begin.

        From `CONNECTS_LIMIT` on that costs no write, and neither does a connection that follows a steady one.
        """
        self._connects += 1
        first = self._is_first_of_life("connects")
        if self._stored.connects < CONNECTS_LIMIT and (
            first or (self._connects > 1 and _is_power_of_two(self._connects))
        ):
            yield from self._store_connects()

    def lose_connection(self, provoked: bool = False, served: bool = False) -> None:
        """A connection ended before it was steady, or could not even begin.

        One that a program's message provoked keeps nobody waiting for long: `session` makes that program wait. Neither
        does one on which the hub `served`, that is acknowledged a message: whoever ends it, there is a hub to go to.
        """
        if not provoked or self._unsteady < PROVOKED_LIMIT:
            self._unsteady += 1
        if served:
            self._unsteady = min(self._unsteady, SERVED_LIMIT)

    def before_hub_s(
        self, spread_s: int, asked_s: "int | None" = None, least: float = 0.5
    ) -> "Generator[Effect, Any, float]":
        """The delay before the next connection.

        1. What was asked for. 2. What lost connections lead to, at `least` so much of the longest, or a random part of
        `spread_s`, whichever is longer: the power may have failed again while a fleet came back.
        """
        delay_s = 0.0
        if asked_s:
            delay_s = yield from after_request_s(asked_s)
        elif self._unsteady:
            delay_s = yield from exponential_s(self._unsteady, HUB_FIRST_S, HUB_LIMIT_S, least)
        if spread_s:
            random: float = yield Random()
            delay_s = max(delay_s, random * spread_s)
        return delay_s

    def counts_connections(self) -> bool:
        """Whether a connection that becomes steady ends a count."""
        return self._connects > 0

    def steady(self) -> "Generator[Effect, Any, None]":
        """A connection has lasted: those before it count no more."""
        self._unsteady = self._connects = 0
        if self._stored.connects:
            yield from self._store_connects()

    def begin_identity(self) -> None:
        """A new identity was stored: the connections that the one before lost say nothing about it."""
        self._unsteady = 0

    def keep_fleet(self, fleet: "Fleet") -> "Generator[Effect, Any, None]":
        """The hub told how large the fleet is; stored where it is news, once in FLEET_AGAIN_S or with what is due."""
        self.fleet = fleet
        if fleet == self._fleet_stored:
            return
        now_s: float = yield Uptime()
        if now_s >= self._fleet_not_before_s:
            self._fleet_not_before_s = now_s + FLEET_AGAIN_S
            yield from self._write(self._stored)

    # The record.

    def in_order(self) -> "bytes | None":
        """Callers that end a life on purpose store this record; None where the stored one may stay.

        An orderly end is no crash, so the connections begun count no more.
        """
        last = self._stored
        return encode_progress(Progress(*last[:6], 0, last.under), self.fleet) if last.connects else None

    def _hear(self, event: str) -> None:
        self.state = next_state(PATIENCES, self.state, event)

    def _not_before_s(self) -> float:
        return max(self._own_not_before_s, self.dps_not_before_s)

    def _is_first_of_life(self, count: str) -> bool:
        first = count not in self._counted
        if first:
            self._counted.append(count)
        return first

    def _left_of_last_delay_s(self) -> "Generator[Effect, Any, int]":
        """Seconds that the stored delay has still to run.

        After a refusal it is 0: whoever restarts a refused device has probably changed something, and the back-off
        holds all the same.
        """
        last = self._stored
        if last.halted:
            return 0
        now: Utc = yield UtcNow()
        gone_s = max(now.now_s - last.last_believed_s, 0) if now.believable and last.last_believed_s else 0
        return max(last.next_try_delay_s - gone_s, 0)

    def _is_news(self, error: DpsError) -> "Generator[Effect, Any, bool]":
        """Whether a restart would forget something of this failure that is worth a write."""
        last = self._stored
        if self.attempts >= 2 * last.attempts:
            return True
        if last.halted != isinstance(error, AskOperator) or last.code != error.code:
            return True
        if not error.retry_after_s:
            return False
        left_s: int = yield from self._left_of_last_delay_s()
        return error.retry_after_s > max(left_s, exponential_floor_s(last.attempts, WAITING_FIRST_S, WAITING_LIMIT_S))

    def _store(self, error: "DpsError | None", delay_s: int) -> "Generator[Effect, Any, DpsError | None]":
        """Stores why and how often it failed; returns the store's error if that could not be done."""
        now: Utc = yield UtcNow()
        last = self._stored
        believed_s = last.last_believed_s
        if now.believable and now.source != CERTIFICATE:
            believed_s = min(now.now_s, believed_s + LONGEST_STEP_S) if believed_s else now.now_s
        halted = isinstance(error, AskOperator)
        code, message = (error.code, error.message[:MESSAGE_LIMIT]) if error else ("", "")
        if error is INTERRUPTED and last.attempts:
            halted, code, message = last[3:6]  # what failed before: no news, and no second write, where it fails again
        progress = Progress(self.attempts, delay_s, believed_s, halted, code, message, last.connects, self._under)
        refusal: DpsError | None = yield from self._write(progress)
        return refusal

    def _store_connects(self) -> "Generator[Effect, Any, None]":
        """Stores the count of connections and leaves the rest of `progress` as it is."""
        last = self._stored
        yield from self._write(Progress(*last[:6], min(self._connects, CONNECTS_LIMIT), last.under))

    def _write(self, progress: Progress) -> "Generator[Effect, Any, DpsError | None]":
        try:
            yield Commit(PROGRESS, encode_progress(progress, self.fleet))
        except DpsError as refusal:  # whatever ails the store: the record is expendable
            return refusal
        self._stored, self._fleet_stored = progress, self.fleet
        return None


def next_state(table: str, state: str, event: str) -> str:
    """What follows `event` in `state`; Broken where the table has no such row, "state: event: next state"."""
    row = f"\n{state}: {event}: "
    at = table.find(row)
    if at < 0:
        raise Broken("agent.bug", f"nothing follows '{event}' in state '{state}'")
    at += len(row)
    return table[at : table.find("\n", at)]


def _is_power_of_two(number: int) -> bool:
    return number & (number - 1) == 0
