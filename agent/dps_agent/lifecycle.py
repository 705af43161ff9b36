"""The life of a device: one table, one loop.

Rule 1: everything that changes the state stands in this file, and every change is a row of `TRANSITIONS`.
Rule 2: the identity changes only when `Commit` has been answered; any other end of an attempt leaves it as it was.
Rule 3: every wait has an end and a reason, and the reason is what `status` shows.
"""

from dps_agent.assignment import load_held
from dps_agent.backoff import HALTED_S, WAITING_FIRST_S, WAITING_LIMIT_S, after_request_s, around_s, exponential_s
from dps_agent.effects import Commit, LoadRecord, Random, ReadEndorsementKey, Sleep, UtcNow
from dps_agent.registration import register
from dps_agent.settings import AUTO
from dps_hal.contracts import IDENTITY, PROGRESS
from dps_hal.errors import AskOperator, DpsError, IdentityStale, RetryLater
from dps_hal.platform import from_json, to_json
from dps_hal.tpm_keys import registration_id_from_ek

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Generator
    from typing import Any, NamedTuple

    from dps_agent.assignment import Assignment
    from dps_agent.effects import Effect
    from dps_agent.settings import Settings
    from dps_hal.contracts import StoredRecord, Utc

    class Progress(NamedTuple):
        """What outlives a restart of failed attempts; expendable, its loss costs one back-off."""

        attempts: int  # failed registrations in a row
        next_try_delay_s: int  # chosen after the last of them
        last_believed_s: int  # the last believable time, Unix seconds; 0: none
        halted: bool  # the last failure needs the operator
        code: str  # of the last failure
        message: str
else:
    from collections import namedtuple

    Progress = namedtuple("Progress", ("attempts", "next_try_delay_s", "last_believed_s", "halted", "code", "message"))

# States.
BOOT = "boot"  # look at the record
PROVISIONING = "provisioning"  # register, then commit
WAITING = "waiting"  # something will be better later
HALTED = "halted"  # somebody must change something; asks again hourly
PROVISIONED = "provisioned"  # the record holds

# Events.
HOLDS = "the record holds"
REGISTER = "there is no identity that holds"
FAILED_BEFORE = "the last life ended in failed attempts"
COMMITTED = "the new identity is stored"
RETRY = "it may work later"
ASK = "an operator is needed"
WAITED = "the wait is over"

TRANSITIONS = {
    (BOOT, HOLDS): PROVISIONED,
    (BOOT, REGISTER): PROVISIONING,
    (BOOT, FAILED_BEFORE): WAITING,
    (BOOT, RETRY): WAITING,
    (BOOT, ASK): HALTED,
    (PROVISIONING, COMMITTED): PROVISIONED,
    (PROVISIONING, RETRY): WAITING,
    (PROVISIONING, ASK): HALTED,
    (WAITING, WAITED): BOOT,
    (HALTED, WAITED): BOOT,
}

COMMIT_TRIES = 3  # in a row, before the new identity waits in memory for better days
KEYLESS_LIMIT = 3  # assignments without a key in a row before an operator is asked
MESSAGE_LIMIT = 400  # characters of an error's text that `progress` keeps
INTERRUPTED = RetryLater("agent.interrupted", "a registration began and did not end")


class Lifecycle:
    """One device's life. Run `live` and read the attributes; nothing else changes them."""

    def __init__(self, settings: "Settings") -> None:
        self.settings = settings
        self.state = BOOT
        self.reason = "starting"  # why it is in this state, in words
        self.assignment: Assignment | None = None  # the identity that holds
        self.former: Assignment | None = None  # the identity that this life replaced
        self.committed = False  # this life stored a new identity
        self.rolled_back = False  # a newer copy of the record was damaged, an older one serves
        self.error: DpsError | None = None  # what ended the last attempt
        self.attempts = 0  # failed ones in a row
        self.retry_after_s: int | None = None  # chosen for the current WAITING or HALTED
        self._progress: Progress | None = None  # as last stored
        self._uncommitted: tuple[Assignment, bytes] | None = None
        self._begun = False  # an attempt was counted and has not ended
        self._counted = False  # this life has counted one
        self._keyless = 0

    def live(self, once: bool, force: bool) -> "Generator[Effect, Any, None]":
        """Lives until PROVISIONED; with `once` also ends in WAITING or HALTED instead of waiting there.

        `force` registers even if the record holds. Raises Broken only.
        """
        yield from self._load_progress()
        wait_first = self.attempts > 0 and not once
        registering = force
        while True:
            if self.state == BOOT:
                event = yield from self._boot(registering, wait_first)
                wait_first = False
            elif self.state == PROVISIONING:
                event = yield from self._provision(once)
            else:
                event = yield from self._wait()
            self.state = TRANSITIONS[(self.state, event)]
            if self.state == PROVISIONED or (once and self.state in (WAITING, HALTED)):
                return

    def _boot(self, registering: bool, wait_first: bool) -> "Generator[Effect, Any, str]":
        try:
            stored: StoredRecord | None = yield LoadRecord(IDENTITY)
            self.rolled_back = stored is not None and stored.rolled_back
            self.assignment, self.reason = yield from load_held(self.settings, stored)
        except DpsError as error:
            event = yield from self._failed(error)
            return event
        if self.assignment and not registering and not self._uncommitted:
            self.reason = f"assigned to {self.assignment.assigned_hub}"
            yield from self._succeeded()
            return HOLDS
        if self.assignment:
            self.reason = "asked to register again"
        if wait_first:
            delay_s: float = yield from exponential_s(self.attempts, WAITING_FIRST_S, WAITING_LIMIT_S)
            left_s: int = yield from self._left_of_last_delay()
            self.retry_after_s = max(int(delay_s) + 1, left_s)
            self.reason = f"{self.attempts} registrations failed before this start"
            return FAILED_BEFORE
        return REGISTER

    def _left_of_last_delay(self) -> "Generator[Effect, Any, int]":
        """Seconds that the delay chosen before the restart has still to run; 0 after a refusal.

        Who restarts a refused device has probably changed something, and the back-off holds all the same.
        """
        last = self._progress
        if last is None or last.halted:
            return 0
        now: Utc = yield UtcNow()
        gone_s = max(now.now_s - last.last_believed_s, 0) if now.believable and last.last_believed_s else 0
        return max(last.next_try_delay_s - gone_s, 0)

    def _provision(self, once: bool) -> "Generator[Effect, Any, str]":
        try:
            if self._uncommitted is None:
                yield from self._begin_attempt()
                if not once and self.attempts == 1 and not self.assignment and self.settings.first_contact_spread_s:
                    random: float = yield Random()
                    yield Sleep(
                        random * self.settings.first_contact_spread_s, "spreading the first contacts of a fleet"
                    )
                registration_id = self.settings.registration_id
                if registration_id == AUTO:
                    endorsement_key: bytes = yield ReadEndorsementKey()
                    registration_id = registration_id_from_ek(endorsement_key)
                self._uncommitted = yield from register(self.settings, registration_id)
            yield from self._commit(self._uncommitted[1])
        except DpsError as error:
            if error.code == "store.too_large":
                self._uncommitted = None  # it will never fit; a later registration may bring a smaller one
            event = yield from self._failed(error)
            return event
        self.former = self.assignment
        self.assignment = self._uncommitted[0]
        self._uncommitted = None
        self.committed = True
        self.reason = f"assigned to {self.assignment.assigned_hub}"
        yield from self._succeeded()
        return COMMITTED

    def _commit(self, record: bytes) -> "Generator[Effect, Any, None]":
        """Stores the new identity; a failing store is asked again before the attempt counts as failed."""
        failures = 0
        while True:
            try:
                yield Commit(IDENTITY, record)
                return
            except RetryLater as error:
                failures += 1
                if failures == COMMIT_TRIES:
                    raise
                delay_s: float = yield from exponential_s(failures, 1, 4)
                reason = error.message
            yield Sleep(delay_s, reason)

    def _wait(self) -> "Generator[Effect, Any, str]":
        yield Sleep(self.retry_after_s or 0, self.reason)
        return WAITED

    def _failed(self, error: DpsError) -> "Generator[Effect, Any, str]":
        """Counts a failed attempt and chooses when to try again; raises what is our own bug."""
        if not isinstance(error, (RetryLater, AskOperator, IdentityStale)):
            raise error
        self._keyless = self._keyless + 1 if error.code == "dps.assigned_without_key" else 0
        if self._keyless > KEYLESS_LIMIT:
            error = AskOperator(error.code, error.message, None, error.request_id)
        self.error = error
        self.reason = error.message
        if not self._begun:
            self.attempts += 1
        self._begun = False
        halted = isinstance(error, AskOperator)
        if halted:
            delay_s: float = yield from around_s(HALTED_S)
        elif error.retry_after_s:
            delay_s = yield from after_request_s(error.retry_after_s)
        else:
            delay_s = yield from exponential_s(self.attempts, WAITING_FIRST_S, WAITING_LIMIT_S)
        self.retry_after_s = int(delay_s) + 1
        before = self._progress
        if self._doubled() or before is None or before.halted != halted or before.code != error.code:
            yield from self._store_progress(error, halted)
        return ASK if halted else RETRY

    def _begin_attempt(self) -> "Generator[Effect, Any, None]":
        """Counts a registration before it begins, so that one that a crash ends is counted as well.

        Where nothing can be stored there is no point in asking DPS for a new key: raises what the store said. A store
        that fails in other ways may fail for this expendable record alone.
        """
        self.attempts += 1
        self._begun = True
        first, self._counted = not self._counted, True
        if first or self._doubled():
            refusal = yield from self._store_progress(INTERRUPTED, False)
            if isinstance(refusal, AskOperator) or (refusal and refusal.code == "store.full"):
                raise refusal

    def _doubled(self) -> bool:
        return self.attempts & (self.attempts - 1) == 0

    def _succeeded(self) -> "Generator[Effect, Any, None]":
        self.error = None
        self.attempts = 0
        self.retry_after_s = None
        self._begun = False
        self._keyless = 0
        if self._progress and self._progress.attempts:
            yield from self._store_progress(None, False)

    def _load_progress(self) -> "Generator[Effect, Any, None]":
        try:
            stored: StoredRecord | None = yield LoadRecord(PROGRESS)
        except DpsError:
            return  # expendable; what ails the store shows when the identity is loaded
        self._progress = decode_progress(stored.payload) if stored else None
        if self._progress:
            self.attempts = self._progress.attempts

    def _store_progress(self, error: "DpsError | None", halted: bool) -> "Generator[Effect, Any, DpsError | None]":
        """Stores why and how often it failed; returns the store's error if that could not be done."""
        now: Utc = yield UtcNow()
        believed_s = now.now_s if now.believable else self._progress.last_believed_s if self._progress else 0
        code, message = (error.code, error.message) if error else ("", "")
        progress = Progress(self.attempts, self.retry_after_s or 0, believed_s, halted, code, message[:MESSAGE_LIMIT])
        try:
            yield Commit(PROGRESS, encode_progress(progress))
        except DpsError as refusal:
            return refusal
        self._progress = progress
        return None


def encode_progress(progress: Progress) -> bytes:
    """The JSON text of the record `progress`."""
    return to_json(
        {
            "attempts": progress.attempts,
            "nextTryDelayS": progress.next_try_delay_s,
            "lastBelievedS": progress.last_believed_s,
            "halted": progress.halted,
            "code": progress.code,
            "message": progress.message,
        }
    ).encode()


def decode_progress(stored: bytes) -> "Progress | None":
    """A stored `progress` record, or None if it is not readable."""
    try:
        value = from_json(stored)
        progress = Progress(
            value["attempts"],
            value["nextTryDelayS"],
            value["lastBelievedS"],
            bool(value["halted"]),
            value["code"],
            value["message"],
        )
        for number in progress[:3]:
            if isinstance(number, bool) or not isinstance(number, int) or number < 0:
                return None
        for text in progress[4:]:
            if not isinstance(text, str):
                return None
    except (ValueError, KeyError, TypeError):
        return None
    return progress
