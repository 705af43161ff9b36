"""The life of a device: one table, one loop.

Rule 1: everything that changes the state stands in this file, and every change is a row of `TRANSITIONS`.
Rule 2: the identity changes only when `Commit` has been answered; any other end of an attempt leaves it as it was.
Rule 3: every wait has an end and a reason, and the reason is what `status` shows.

The registration and the hub's session are imported where they begin: a board has memory for one of them at a time.
"""

from dps_agent.assignment import load_held
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
)
from dps_agent.effects import Commit, LoadRecord, Random, ReadEndorsementKey, Sleep, Uptime, UtcNow
from dps_agent.settings import AUTO
from dps_agent.utc import CERTIFICATE, LONGEST_STEP_S
from dps_hal.contracts import IDENTITY, PROGRESS
from dps_hal.errors import AskOperator, Broken, DpsError, IdentityStale, RetryLater
from dps_hal.platform import from_json, to_json
from dps_hal.tpm_keys import registration_id_from_ek

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from typing import Any, NamedTuple

    from dps_agent.assignment import Assignment
    from dps_agent.effects import Effect
    from dps_agent.session import Session
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
        connects: int  # connections to the hub begun in a row, none of them steady yet
else:
    from collections import namedtuple

    Progress = namedtuple(
        "Progress", ("attempts", "next_try_delay_s", "last_believed_s", "halted", "code", "message", "connects")
    )

# States.
BOOT = "boot"  # look at the record
PROVISIONING = "provisioning"  # register, then commit
WAITING = "waiting"  # something will be better later
HALTED = "halted"  # somebody must change something; asks again hourly
PROVISIONED = "provisioned"  # the record holds; where a hub is wanted: until the moment to connect
CONNECTING = "connecting"  # a token, a connection, the subscriptions
CONNECTED = "connected"  # until the connection ends

# Events.
HOLDS = "the record holds"
REGISTER = "a registration is due"
FAILED_BEFORE = "registrations failed before"
COMMITTED = "the new identity is stored"
RETRY = "it may work later"
ASK = "an operator is needed"
WAITED = "the wait is over"
KEPT = "the registration failed, the identity still serves"
ACCEPTED = "the hub accepted the device"
PARTED = "the connection ended, or there was none"
RENEWED = "the next token is ready"
STALE = "the identity no longer holds"

# State, event, next state: written out, because constants lie in flash where a firmware has them frozen.
TRANSITIONS = (
    ("boot", "the record holds", "provisioned"),
    ("boot", "a registration is due", "provisioning"),
    ("boot", "registrations failed before", "waiting"),
    ("boot", "it may work later", "waiting"),
    ("boot", "an operator is needed", "halted"),
    ("provisioning", "the new identity is stored", "provisioned"),
    ("provisioning", "it may work later", "waiting"),
    ("provisioning", "an operator is needed", "halted"),
    ("provisioning", "the registration failed, the identity still serves", "provisioned"),
    ("waiting", "the wait is over", "boot"),
    ("halted", "the wait is over", "boot"),
    ("provisioned", "the wait is over", "connecting"),
    ("provisioned", "a registration is due", "provisioning"),
    ("connecting", "the hub accepted the device", "connected"),
    ("connecting", "the connection ended, or there was none", "provisioned"),
    ("connecting", "a registration is due", "provisioning"),
    ("connecting", "registrations failed before", "waiting"),
    ("connecting", "the identity no longer holds", "boot"),
    ("connecting", "an operator is needed", "halted"),
    ("connected", "the next token is ready", "connecting"),
    ("connected", "the connection ended, or there was none", "provisioned"),
    ("connected", "a registration is due", "provisioning"),
    ("connected", "the identity no longer holds", "boot"),
    ("connected", "an operator is needed", "halted"),
)

COMMIT_TRIES = 3  # in a row, before the new identity waits in memory for better days
REFUSALS_LIMIT = 2  # of fresh tokens in a row, before the device registers again
HUB_GONE_S = 1800  # without a hub of this name, before the device registers again
# A connection that lasted so long ends the count of failed ones. Twice HUB_LIMIT_S: of two devices with one identity
# each ends the other's connection, and none may last so long while the other one waits.
STEADY_S = 600
# Of connections that `progress` counts; the delay grows no more. At 40 to 80 s a crash loop costs the hub about a
# thousand connections a day, and a device on bad mains is not kept waiting for long when it has power.
CONNECTS_LIMIT = 5
START_SPREAD_S = 5  # first contact of a life with DPS or the hub, where first_contact_spread_s says no more
COMMITTED_SPREAD_S = 2  # the first connection with a new identity
PATIENCE_CODES = ("dps.throttled", "dps.unavailable", "dps.conflict")  # of failures whose delay may be DPS's wish
KEYLESS_LIMIT = 3  # assignments without a key in a row before an operator is asked
MESSAGE_LIMIT = 400  # characters of an error's text that `progress` keeps
INTERRUPTED = RetryLater("agent.interrupted", "a registration began and did not end")


class Lifecycle:
    """One device's life. Run `live` and read the attributes; nothing else changes them."""

    def __init__(
        self,
        settings: "Settings",
        about: "dict[str, str] | None" = None,
        beside: "Callable[[], Generator[Any, Any, dict[str, Any]]] | None" = None,
    ) -> None:
        """`about` is what a connected device reports of itself to its twin.

        `beside`, an exchange, says before each registration what the new record is to hold beside the assignment.
        """
        self.settings = settings
        self.about = about or {}
        self._beside = beside
        self.state = BOOT
        self.reason = "starting"  # why it is in this state, in words
        self.assignment: Assignment | None = None  # the identity that holds
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
        self.asked_to_register = False  # set it to register although the record holds; then end the current wait
        self.connections = 0  # that the hub accepted in this life
        self._connects = False  # the life goes on at the hub
        self._session: Session | None = None  # of `assignment`
        self._connect_delay_s = 0.0
        self._failures = 0  # connections in a row that did not last
        self._refusals = 0  # of fresh tokens in a row
        self._refused = False  # the hub does not take this identity any more
        self._waited_for_dps = False  # and a registration has failed since, whose wait comes before the next connection
        self._gone_since_s: float | None = None  # when the hub's name was first not found
        self._connects_begun = 0  # in a row, none of them steady yet; also those of earlier lives
        self._connect_counted = False  # this life has stored one
        self._connected_since_s: float | None = None  # across renewals of the token
        self._not_before_s = 0.0  # DPS is not asked before this uptime, unless somebody asks us to
        self.dps_not_before_s = 0.0  # nor before this one, whoever asks: DPS wants it so
        self._gone = False  # the registration that is due: there is no hub of this name
        self._asked = False  # somebody does; else the device itself found that it must register
        self.serial = 0  # what `Session.serial` has come to
        self.registration_error: DpsError | None = None  # of the last registration, while the older identity serves

    def live(self, once: bool, force: bool, connect: bool = False) -> "Generator[Effect, Any, None]":
        """Lives until PROVISIONED, with `connect` for ever; with `once` ends in WAITING or HALTED as well.

        `force` registers even if the record holds. Raises Broken only. After a MemoryError, which ends it anywhere, it
        may be called again with `state` BOOT.
        """
        yield from self.abandon()
        self._connects = connect
        self.asked_to_register = force
        yield from self._load_progress()
        wait_first = self.attempts > 0 and not once
        while True:
            if self.state == BOOT:
                event = yield from self._boot(wait_first, once)
                wait_first = False
            elif self.state == PROVISIONING:
                event = yield from self._provision(once)
            elif self.state == PROVISIONED:
                event = yield from self._wait_to_connect()
            elif self.state == CONNECTING:
                event = yield from self._connect()
            elif self.state == CONNECTED:
                event = yield from self._stay()
            else:
                event = yield from self._wait()
            self.state = _next_state(self.state, event)
            if self.state in (BOOT, WAITING, HALTED):
                yield from self.abandon()
            if (self.state == PROVISIONED and not connect) or (once and self.state in (WAITING, HALTED)):
                return

    def summary(self) -> "dict[str, Any]":
        """Where the device stands, as its hub may ask by direct method."""
        held = self.assignment
        return {
            "state": self.state,
            "reason": self.reason,
            "assignedHub": held.assigned_hub if held else "",
            "deviceId": held.device_id if held else "",
            "substatus": held.substatus if held else "",
            "failedAttempts": self.attempts,
            "connections": self.connections,
            "code": self.error.code if self.error else "",
            "registrationCode": self.registration_error.code if self.registration_error else "",
            "hubLacks": self.hub_lacks,
        }

    @property
    def hub_lacks(self) -> "list[str]":
        """What the hub does not offer, as far as the device has found out: methods, twin, messages."""
        return self._session.hub_lacks() if self._session else []

    def _boot(self, wait_first: bool, once: bool) -> "Generator[Effect, Any, str]":
        try:
            stored: StoredRecord | None = yield LoadRecord(IDENTITY)
            self.rolled_back = stored is not None and stored.rolled_back
            self.assignment, self.reason = yield from load_held(self.settings, stored)
        except DpsError as error:
            event = yield from self._failed(error)
            return event
        wanted = self.asked_to_register or self._refused or self._uncommitted
        if self.assignment and not wanted:
            self.reason = f"assigned to {self.assignment.assigned_hub}"
            yield from self._held()
            if self._failures:
                self._connect_delay_s = yield from exponential_s(self._failures, HUB_FIRST_S, HUB_LIMIT_S)
            else:
                random: float = yield Random()
                self._connect_delay_s = random * max(self.settings.first_contact_spread_s, START_SPREAD_S)
            return HOLDS
        if self.assignment:
            self.reason = "the hub refused the device" if self._refused else "asked to register again"
        if wait_first:
            yield from self._back_off()
            self.reason = f"{self.attempts} registrations failed before this start"
            return FAILED_BEFORE
        now_s: float = yield Uptime()
        if not once and not self._uncommitted and now_s < self.dps_not_before_s:
            yield from self._back_off()
            self.reason = "DPS asked for patience"
            return FAILED_BEFORE
        return REGISTER

    def _back_off(self) -> "Generator[Effect, Any, None]":
        """Chooses the delay before DPS is asked again: longer with each attempt, never less than DPS asked for."""
        delay_s: float = yield from exponential_s(max(self.attempts, 1), WAITING_FIRST_S, WAITING_LIMIT_S)
        now_s: float = yield Uptime()
        not_before_s = max(self._not_before_s, self.dps_not_before_s)
        self.retry_after_s = max(int(delay_s) + 1, int(not_before_s - now_s + 0.999))

    def _left_of_last_delay(self) -> "Generator[Effect, Any, int]":
        """Seconds that the delay in `progress` has still to run; 0 after a refusal.

        Who restarts a refused device has probably changed something, and the back-off holds all the same.
        """
        last = self._progress
        if last is None or last.halted:
            return 0
        now: Utc = yield UtcNow()
        gone_s = max(now.now_s - last.last_believed_s, 0) if now.believable and last.last_believed_s else 0
        return max(last.next_try_delay_s - gone_s, 0)

    def _provision(self, once: bool) -> "Generator[Effect, Any, str]":
        asked = self._asked or self.asked_to_register
        gone, self._gone = self._gone, False
        self._asked = False
        if not once:
            self.asked_to_register = False
        self.retry_after_s = None
        try:
            if self._uncommitted is None:
                yield from self._begin_attempt()
                spread_s = max(self.settings.first_contact_spread_s, START_SPREAD_S)
                if self.attempts == 1 and not (once or asked or gone):
                    random: float = yield Random()
                    yield Sleep(random * spread_s, "spreading the first contacts of a fleet")
                registration_id = self.settings.registration_id
                if registration_id == AUTO:
                    endorsement_key: bytes = yield ReadEndorsementKey()
                    registration_id = registration_id_from_ek(endorsement_key)
                beside: dict[str, Any] = {}
                if self._beside:
                    beside = yield from self._beside()
                from dps_agent.registration import register

                self._uncommitted = yield from register(self.settings, registration_id, beside, not gone)
            yield from self._commit(self._uncommitted[1])
        except DpsError as error:
            if error.code == "store.too_large":
                self._uncommitted = None  # it will never fit; a later registration may bring a smaller one
            event = yield from self._failed(error)
            if self._connects and self.assignment and not self._uncommitted:
                if self._refused:  # after the wait the hub is asked once more: it may have changed its mind
                    self._refused = False
                    self._waited_for_dps = True
                    self._refusals = REFUSALS_LIMIT - 1
                    return event
                self.registration_error = error
                self.retry_after_s = None
                self._connect_delay_s = yield from exponential_s(1, HUB_FIRST_S, HUB_LIMIT_S)
                return KEPT
            return event
        yield from self.abandon()
        self.assignment = self._uncommitted[0]
        self._uncommitted = None
        self.committed = True
        self.reason = f"assigned to {self.assignment.assigned_hub}"
        self.registration_error = None
        self._refused = self._waited_for_dps = False
        self._refusals = self._failures = 0
        self._gone_since_s = None
        spread: float = yield Random()
        self._connect_delay_s = spread * COMMITTED_SPREAD_S
        yield from self._held()
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

    # The hub.

    def _wait_to_connect(self) -> "Generator[Effect, Any, str]":
        if self._connect_delay_s:
            yield Sleep(self._connect_delay_s, self.reason)
        return REGISTER if self.asked_to_register else WAITED

    def _connect(self) -> "Generator[Effect, Any, str]":
        held = self.assignment
        if held is None:
            raise Broken("agent.bug", "there is no identity to connect with")
        if self._session is None:
            about = dict(self.about)
            about["assignedAt"] = held.last_updated_utc
            about["substatus"] = held.substatus
            from dps_agent.session import Session

            self._session = Session(self.settings, held, about, self.summary, self.serial)
        session = self._session
        session.dps_not_before_s = self.dps_not_before_s
        if self._connected_since_s is None:
            yield from self._count_connect()
        try:
            end = yield from session.open()
        except DpsError as error:
            event = yield from self._hub_failed(error)
            return event
        if not end:
            self.connections += 1
            self.reason = f"connected to {held.assigned_hub}"
            self.error = None
            self._refusals = 0
            self._gone_since_s = None
            self.retry_after_s = None
            if self._connected_since_s is None:
                now_s: float = yield Uptime()
                self._connected_since_s = now_s
            yield from self._succeeded()
            return ACCEPTED
        event = yield from self._parted(end, session.reason)
        return event

    def _stay(self) -> "Generator[Effect, Any, str]":
        session = self._session
        if session is None:
            raise Broken("agent.bug", "there is no connection to stay on")
        steady_at_s = (self._connected_since_s or 0.0) + STEADY_S
        try:
            end = yield from session.stay(steady_at_s if self._connects_begun else None)
            if not end:
                self._failures = self._connects_begun = 0
                if self._progress and self._progress.connects:
                    yield from self._store_connects()
                end = yield from session.stay(None)
        except DpsError as error:
            event = yield from self._hub_failed(error)
        else:
            event = yield from self._parted(end, session.reason)
        return event

    def _count_connect(self) -> "Generator[Effect, Any, None]":
        """Counts a connection before it begins, so that one that a crash ends is counted as well.

        Stored with the first one of a life and when the count doubles, until the delay that it leads to grows no more;
        a connection that was lost after it had been steady costs no write.
        """
        self._connects_begun += 1
        first, self._connect_counted = not self._connect_counted, True
        stored = self._progress.connects if self._progress else 0
        doubled = self._connects_begun > 1 and self._connects_begun & (self._connects_begun - 1) == 0
        if stored < CONNECTS_LIMIT and (first or doubled):
            yield from self._store_connects()

    def _store_connects(self) -> "Generator[Effect, Any, None]":
        """Stores the count of connections and leaves the rest of `progress` as it is; its loss costs one back-off."""
        before = self._progress or Progress(self.attempts, 0, 0, False, "", "", 0)
        progress = Progress(*before[:6], min(self._connects_begun, CONNECTS_LIMIT))
        try:
            yield Commit(PROGRESS, encode_progress(progress))
        except (RetryLater, AskOperator, IdentityStale):
            return
        self._progress = progress

    def _parted(self, end: str, reason: str) -> "Generator[Effect, Any, str]":
        """What follows the end of a connection."""
        from dps_agent import session
        from dps_agent.hub_effects import Disconnect

        yield Disconnect()
        self.reason = reason
        if end == session.RENEW:
            return RENEWED
        self._connected_since_s = None
        if end == session.REGISTER:
            self._asked = True
            return REGISTER
        self.error = RetryLater(session.PARTED_CODES[end], reason)
        now_s: float = yield Uptime()
        if self._session and self._session.accepted:
            self._refusals = 0
        if end == session.REFUSED:
            now: Utc = yield UtcNow()
            if self._session and self._session.clock_kept(now, now_s):
                self._refusals += 1
            if self._refusals >= REFUSALS_LIMIT:
                self._refused = True
                waited, self._waited_for_dps = self._waited_for_dps or not self.attempts, False
                if waited and now_s >= max(self._not_before_s, self.dps_not_before_s):
                    return REGISTER
                yield from self._back_off()
                return FAILED_BEFORE
        if end != session.NOT_FOUND:
            self._gone_since_s = None
        elif self._gone_since_s is None:
            random: float = yield Random()
            self._gone_since_s = now_s + random * self.settings.first_contact_spread_s
        elif now_s - self._gone_since_s >= HUB_GONE_S and now_s >= max(self._not_before_s, self.dps_not_before_s):
            self._gone_since_s = None
            self._gone = True
            return REGISTER
        self._failures += 1
        self._connect_delay_s = yield from exponential_s(self._failures, HUB_FIRST_S, HUB_LIMIT_S)
        return PARTED

    def _hub_failed(self, error: DpsError) -> "Generator[Effect, Any, str]":
        """What follows when TPM or clock give no token, or the hub does not speak with us; raises our own bugs."""
        if not isinstance(error, (RetryLater, AskOperator, IdentityStale)):
            raise error
        from dps_agent.hub_effects import Disconnect

        yield Disconnect()
        self.error = error
        self.reason = error.message
        self._failures += 1
        self._connected_since_s = None
        if isinstance(error, IdentityStale):
            return STALE
        if isinstance(error, AskOperator):
            delay_s: float = yield from around_s(HALTED_S)
            self.retry_after_s = int(delay_s) + 1
            return ASK
        if error.retry_after_s:
            self._connect_delay_s = yield from after_request_s(error.retry_after_s)
        else:
            self._connect_delay_s = yield from exponential_s(self._failures, HUB_FIRST_S, HUB_LIMIT_S)
        return PARTED

    def progress_in_order(self) -> "bytes | None":
        """The `progress` to store for who ends a life on purpose, None for as it is.

        That is no crash, so the connections begun count no more.
        """
        last = self._progress
        return encode_progress(Progress(*last[:6], 0)) if last and last.connects else None

    def abandon(self) -> "Generator[Effect, Any, None]":
        if self._session is not None:
            yield from self._session.abandon()
            self.serial = self._session.serial
            self._session = None

    # What becomes of an attempt.

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
        now_s: float = yield Uptime()
        self._not_before_s = now_s + self.retry_after_s
        if error.retry_after_s and error.code in PATIENCE_CODES:
            self.dps_not_before_s = now_s + error.retry_after_s
        before = self._progress
        wanted = self._doubled() or before is None or before.halted != halted or before.code != error.code
        if error.retry_after_s and before and not wanted:
            left_s: int = yield from self._left_of_last_delay()
            after_restart_s = exponential_floor_s(before.attempts, WAITING_FIRST_S, WAITING_LIMIT_S)
            wanted = error.retry_after_s > max(left_s, after_restart_s)
        if wanted:
            yield from self._store_progress(error, halted, self.retry_after_s)
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
            refusal = yield from self._store_progress(INTERRUPTED, False, self.retry_after_s or 0)
            if isinstance(refusal, AskOperator) or (refusal and refusal.code == "store.full"):
                raise refusal

    def _doubled(self) -> bool:
        return self.attempts & (self.attempts - 1) == 0

    def _held(self) -> "Generator[Effect, Any, None]":
        """The attempt succeeded; where a hub is wanted it counts until the hub has accepted the device."""
        self.error = None
        self.retry_after_s = None
        self._begun = False
        self._keyless = 0
        if not self._connects:
            yield from self._succeeded()

    def _succeeded(self) -> "Generator[Effect, Any, None]":
        """What failed is forgotten, but for the patience that DPS asked for."""
        self.attempts = 0
        last = self._progress
        if last and last.attempts:
            now_s: float = yield Uptime()
            left_s = max(int(self.dps_not_before_s - now_s + 0.999), 0)
            patience = RetryLater(last.code, last.message) if left_s and last.code in PATIENCE_CODES else None
            yield from self._store_progress(patience, False, left_s if patience else 0)

    def _load_progress(self) -> "Generator[Effect, Any, None]":
        try:
            stored: StoredRecord | None = yield LoadRecord(PROGRESS)
        except DpsError:
            return  # expendable; what ails the store shows when the identity is loaded
        self._progress = decode_progress(stored.payload) if stored else None
        if self._progress:
            self.attempts = self._progress.attempts
            left_s: int = yield from self._left_of_last_delay()
            now_s: float = yield Uptime()
            self._not_before_s = now_s + left_s
            if self._progress.code in PATIENCE_CODES and not self.dps_not_before_s:
                self.dps_not_before_s = now_s + left_s
            self._connects_begun = self._progress.connects
            self._failures = max(self._connects_begun - 1, 0)  # one may be a restart that nothing led to

    def _store_progress(
        self, error: "DpsError | None", halted: bool, delay_s: int
    ) -> "Generator[Effect, Any, DpsError | None]":
        """Stores why and how often it failed; returns the store's error if that could not be done."""
        now: Utc = yield UtcNow()
        believed_s = self._progress.last_believed_s if self._progress else 0
        if now.believable and now.source != CERTIFICATE:
            believed_s = min(now.now_s, believed_s + LONGEST_STEP_S) if believed_s else now.now_s
        code, message = (error.code, error.message) if error else ("", "")
        connects = self._progress.connects if self._progress else 0
        progress = Progress(self.attempts, delay_s, believed_s, halted, code, message[:MESSAGE_LIMIT], connects)
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
            "connects": progress.connects,
        }
    ).encode()


def _next_state(state: str, event: str) -> str:
    for before, what, after in TRANSITIONS:
        if (before, what) == (state, event):
            return after
    raise Broken("agent.bug", f"nothing follows '{event}' in state '{state}'")


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
            value.get("connects", 0),  # 0.1.0 knew nothing of it
        )
        for number in (progress.attempts, progress.next_try_delay_s, progress.last_believed_s, progress.connects):
            if isinstance(number, bool) or not isinstance(number, int) or number < 0:
                return None
        for text in progress[4:6]:
            if not isinstance(text, str):
                return None
    except (ValueError, KeyError, TypeError):
        return None
    return progress
