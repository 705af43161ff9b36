"""The life of a device: three small machines run side by side, each with its table.

1. The **life**, one of seven states (`TRANSITIONS`), does the work. Each state is a method that does the state's work
   and returns the event which ended it and how many seconds the next state has to wait; so a delay belongs to one
   transition and nothing else can read it. Only `live` sets the state.
2. The hub's **standing** towards this identity (`STANDINGS`), one of four: whether the hub still trusts the device. It
   does no work and only remembers what hub and DPS have said; `_hear` is its only door.
3. **Patience** (`dps_agent.patience`), one of four: what failed how often, and how long that makes the device wait.

Which events they see. The life sees the ends of its own work: of a look at the record, a registration, a wait, a
connection. Standing sees three things: the hub accepted a token (or the identity is new), the hub refused a token that
was made just before under a clock that is still believed, a registration of a refused device failed. Patience sees an
attempt begin and fail, an identity hold, and an identity prove good.

Who pushes whom. The life pushes standing and patience, and asks both where it goes next; they push nobody. The hub's
session (`dps_agent.session`) says by one word how a connection ended, and `_parted` makes an event of it. Whoever runs
a life reads its attributes and never sets them: a registration is asked for with `ask_to_register`, what is to be
reported of the device is told with `report`, and `abandon` leaves the hub.

What the tables do not say:

- A life begins at BOOT, trusted, and `live` called again goes back to BOOT from anywhere, for a MemoryError may have
  ended it anywhere. Standing and an identity that is not stored yet (`_uncommitted`) outlive that.
- A life ends in PROVISIONED where no hub is wanted, and in WAITING or HALTED where it was to be lived `once`. A bug of
  ours (Broken) ends it wherever it is.
- On its way into BOOT, WAITING or HALTED the life leaves the identity's session; from CONNECTED back to CONNECTING,
  and through PROVISIONED, the session stays, and telemetry under way with it.
- Somebody who asks to register changes no state: PROVISIONED and BOOT look for the wish when their wait or work ends,
  and the session's end says it on a connection.

The identity changes only when `Commit` has been answered; any other end of an attempt leaves it as it was. Every wait
has an end and a reason, and the reason is what `status` shows. The registration and the hub's session are imported
where they begin: a board has memory for one of them at a time.
"""

from dps_agent.attestation import load_held
from dps_agent.attestation import registration_id as registration_id_of
from dps_agent.backoff import HALTED_S, HUB_FIRST_S, HUB_LEAST, HUB_LIMIT_S, around_s, exponential_s
from dps_agent.effects import Commit, LoadRecord, Random, Sleep, Uptime, UtcNow
from dps_agent.fleet import UNKNOWN, dps_spread_s, hub_spread_s, merged, token_life_s
from dps_agent.patience import CLOCK_WAIT_S, Patience, next_state
from dps_agent.settings import is_wanted
from dps_hal.contracts import IDENTITY
from dps_hal.errors import AskOperator, Broken, DpsError, IdentityStale, RetryLater

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from typing import Any

    from dps_agent.assignment import Assignment
    from dps_agent.effects import Effect, Records
    from dps_agent.fleet import Fleet
    from dps_agent.session import Session
    from dps_agent.settings import Settings
    from dps_hal.contracts import StoredRecord, Utc

    Outcome = tuple[str, float]  # the event that ended a state, and the next state's wait in seconds

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
REGISTER = "registration due"
FAILED_BEFORE = "failed before"
COMMITTED = "the new identity is stored"
RETRY = "it may work later"
ASK = "operator needed"
WAITED = "waited"
KEPT = "the old one serves"  # the registration failed, the identity of before holds
ACCEPTED = "the hub accepts it"
PARTED = "no connection"  # it ended, or there was none
RENEWED = "the next token is ready"  # or certificate
STALE = "the identity is stale"

# State, event, next state. One text, because a board has each tuple and each word in its heap.
TRANSITIONS = """
boot: the record holds: provisioned
boot: registration due: provisioning
boot: failed before: waiting
boot: it may work later: waiting
boot: operator needed: halted
provisioning: the new identity is stored: provisioned
provisioning: it may work later: waiting
provisioning: operator needed: halted
provisioning: the old one serves: provisioned
waiting: waited: boot
halted: waited: boot
provisioned: waited: connecting
provisioned: registration due: provisioning
connecting: the hub accepts it: connected
connecting: no connection: provisioned
connecting: registration due: provisioning
connecting: failed before: waiting
connecting: the identity is stale: boot
connecting: operator needed: halted
connected: the next token is ready: connecting
connected: no connection: provisioned
connected: registration due: provisioning
connected: the identity is stale: boot
connected: operator needed: halted
"""

# The hub's standing towards this identity.
TRUSTED = "trusted"  # it accepted the device, or was never asked
DOUBTED = "doubted"  # it refused one fresh token
REFUSED = "refused"  # it refused as many as prove something: the device registers again
APPEALED = "appealed"  # DPS did not help: the hub is asked once more, it may have changed its mind

# What the hub or DPS said.
ACCEPTS = "accepted, or new"  # the hub accepts a token, or the identity is new
REFUSES = "a fresh token is refused"
NO_HELP = "the registration failed"

STANDINGS = """
trusted: accepted, or new: trusted
trusted: a fresh token is refused: doubted
doubted: accepted, or new: trusted
doubted: a fresh token is refused: refused
refused: accepted, or new: trusted
refused: the registration failed: appealed
appealed: accepted, or new: trusted
appealed: a fresh token is refused: refused
"""

# Whose wish the next registration is.
OWN = "own"  # the device found that it has to register: a fleet may have found so together
ASKED = "asked"  # somebody does not want to wait
SEEKING = "seeking"  # there is no hub of this name: DPS is asked once, then the hub is looked for again

COMMIT_TRIES = 3  # in a row, before the new identity waits in memory for better days
HUB_GONE_S = 1800  # without a hub of this name, before the device registers again
# A connection that lasted so long ends the count of failed ones. Twice HUB_LIMIT_S: of two devices with one identity
# each ends the other's connection, and none may last so long while the other one waits.
STEADY_S = 600
SPREAD_REASON = "a random wait, for a fleet may start at once"
START_SPREAD_S = 5  # first contact of a life with DPS or the hub, where nothing says more
COMMITTED_SPREAD_S = 2  # the first connection with a new identity


class Lifecycle:
    """One device's life. Run `live` and read the attributes."""

    def __init__(
        self,
        settings: "Settings",
        about: "dict[str, Any] | None" = None,
        beside: "Callable[[], Generator[Any, Any, dict[str, Any]]] | None" = None,
        former: "Lifecycle | None" = None,
    ) -> None:
        """`about` is what a connected device reports of itself to its twin.

        `beside`, an exchange, says before each registration what the new record is to hold beside the assignment.
        `former` is the life before this one in the same process: DPS's wish to be left alone outlives it where scope,
        endpoint, id and TPM are the same, and ids that were given in it mean nothing in this one.
        """
        self.settings = settings
        self.about = about or {}
        self.patience: Patience = Patience(
            settings.under,
            former.patience.dps_not_before_s if former and former.settings.under == settings.under else 0.0,
        )
        self.state = BOOT
        self.standing = TRUSTED
        self.reason = "starting"  # why it is in this state, in words
        self.wait_s = 0.0  # how long this state waits, where it does
        self.assignment: Assignment | None = None  # the identity that holds
        self.committed = False  # this life stored a new identity
        self.rolled_back = False  # a newer copy of the record was damaged, an older one serves
        self.error: DpsError | None = None  # what ended the last attempt
        self.registration_error: DpsError | None = None  # the last registration's, while the older identity serves
        self.fleet_refused = False  # what the hub told last of the fleet is absurd, and changes nothing
        self.connections = 0  # how many the hub has accepted in this life
        self.serial: int = former.serial if former else 0  # what `Session.serial` has come to
        self._beside = beside
        self._connects = False  # the life goes on at the hub
        self._wish = OWN
        self._uncommitted: tuple[Assignment, Records] | None = None
        self._session: Session | None = None  # the hub's side of `assignment`, while the life is at its hub
        self._lacks: dict[str, tuple[float, float]] = former._lacks if former else {}  # as `Session` has it
        self._lacks_of: str = former._lacks_of if former else ""  # the hub that lacks it
        self._missing_since_s: float | None = None  # the uptime at which the hub's name was first not found
        self._refused_until_s: float | None = None  # a refusal before it proves nothing: a fleet is spread
        self._connected_since_s: float | None = None  # a renewal of the token does not begin it anew

    # What others read and ask for.

    @property
    def fleet(self) -> "Fleet":
        """The fleet as the hub told it last, and as the settings have it where it told nothing, or what is absurd."""
        return merged(self.patience.fleet, self.settings.fleet) or self.settings.fleet

    @property
    def next_attempt_in_s(self) -> "int | None":
        """Seconds until the next attempt, in WAITING and HALTED and while it spreads."""
        return int(self.wait_s) if self.spreads or self.state in (WAITING, HALTED) else None

    @property
    def spreads(self) -> bool:
        """Whether a registration waits for its turn in a fleet, for so long that somebody may want to end it."""
        return self.state == PROVISIONING and self.wait_s > START_SPREAD_S

    @property
    def asked_to_register(self) -> bool:
        """Whether somebody asked for a registration that has not begun."""
        return self._wish == ASKED

    def ask_to_register(self) -> None:
        """Registers although the record holds: at once, where the caller ends the current wait as well."""
        self._wish = ASKED

    def report(self, name: str, value: "Any") -> None:
        """Changes what a connected device reports of itself to its twin; None: nothing of that name any more."""
        self.about[name] = value
        if self._session:
            self._session.twin.report(name, value)

    def summary(self) -> "dict[str, Any]":
        """Where the device stands, as its hub may ask by direct method."""
        held = self.assignment
        return {
            "state": self.state,
            "reason": self.reason,
            "assignedHub": held.assigned_hub if held else "",
            "deviceId": held.device_id if held else "",
            "substatus": held.substatus if held else "",
            "failedAttempts": self.patience.failed,
            "connections": self.connections,
            "code": self.error.code if self.error else "",
            "registrationCode": self.registration_error.code if self.registration_error else "",
            "hubLacks": self.hub_lacks,
        }

    @property
    def hub_lacks(self) -> "list[str]":
        """What the hub does not offer, as the settings say or the device has found out; known on, whatever comes."""
        known = self.assignment is not None and self.assignment.assigned_hub == self._lacks_of
        names = ("methods", "twin", "messages")
        return [name for name in names if (known and name in self._lacks) or not is_wanted(name, self.settings)]

    @property
    def renewal_trouble(self) -> str:
        """Why the certificate that DPS issued is not renewed; "" for nothing."""
        return self._session.renewal_trouble if self._session else ""

    # The life.

    def live(self, once: bool, force: bool, connect: bool = False) -> "Generator[Effect, Any, None]":
        """Lives until PROVISIONED, with `connect` for ever; with `once` ends in WAITING or HALTED as well.

        `force` registers even if the record holds. Raises Broken only. After a MemoryError, which ends it anywhere, it
        may be called again: it begins at BOOT.
        """
        yield from self.abandon()
        self.state = BOOT
        self._connected_since_s = None
        self._connects = connect
        self._wish = ASKED if force else OWN
        yield from self.patience.load(once)
        wait_first = self.patience.attempts > 0 and not once
        while True:
            if self.state == BOOT:
                event, wait_s = yield from self._boot(wait_first, once)
                wait_first = False
            elif self.state == PROVISIONING:
                event, wait_s = yield from self._provision(once)
            elif self.state == CONNECTING:
                event, wait_s = yield from self._connect()
            elif self.state == CONNECTED:
                event, wait_s = yield from self._stay()
            else:
                event, wait_s = yield from self._wait()
            self.state, self.wait_s = next_state(TRANSITIONS, self.state, event), wait_s
            if self.state in (BOOT, WAITING, HALTED):
                yield from self.abandon()
            if (self.state == PROVISIONED and not connect) or (once and self.state in (WAITING, HALTED)):
                return

    def _boot(self, wait_first: bool, once: bool) -> "Generator[Effect, Any, Outcome]":
        """What the record leads to.

        1. The store or the TPM gives an error: it may work later, or an operator is needed. 2. The record holds, and
        nothing speaks for another registration. 3. Registrations failed before this start: wait. 4. DPS asked for
        patience: wait. 5. Otherwise: register.
        """
        try:
            stored: StoredRecord | None = yield LoadRecord(IDENTITY)
            self.rolled_back = stored is not None and stored.rolled_back
            to_be_used = self._connects or not self.asked_to_register
            self.assignment, self.reason = yield from load_held(self.settings, stored, to_be_used)
        except DpsError as error:
            outcome = yield from self._failed(error)
            return outcome
        wanted = self.asked_to_register or self.standing == REFUSED or self._uncommitted
        if self.assignment and not wanted:
            self.reason = f"assigned to {self.assignment.assigned_hub}"
            yield from self._held()
            spread_s = max(hub_spread_s(self.fleet), START_SPREAD_S)
            delay_s: float = yield from self.patience.before_hub_s(spread_s)
            return HOLDS, delay_s
        if self.assignment:
            self.reason = self.error.message if self.error and self.standing == REFUSED else "asked to register again"
        now_s: float = yield Uptime()
        if wait_first:
            self.reason = f"{self.patience.attempts} registrations failed before this start"
        elif not once and not self._uncommitted and now_s < self.patience.dps_not_before_s:
            self.reason = "DPS asked for patience"
        else:
            return REGISTER, 0
        delay_s = yield from self.patience.before_dps_s()
        return FAILED_BEFORE, delay_s

    def _provision(self, once: bool) -> "Generator[Effect, Any, Outcome]":
        """What a registration leads to, where it failed first.

        1. It failed, and no identity holds, no hub is wanted, or the new identity is only not stored yet: wait. 2. It
        failed for a device that the hub has refused: wait, and then ask the hub once more. 3. It failed, and the old
        identity serves: back to its hub. 4. The new identity is stored.
        """
        wish, self._wish = self._wish, OWN
        try:
            if self._uncommitted is None:
                spread_s = 0.0
                is_first = wish == OWN and not self.patience.attempts and not once
                if is_first:
                    random: float = yield Random()  # with an identity, the hub was asked meanwhile
                    spread_s = random * max(0 if self.assignment else self._dps_spread_s(), START_SPREAD_S)
                    if (yield from self.patience.lacks_clock(spread_s)):
                        self.wait_s = spread_s
                        yield Sleep(CLOCK_WAIT_S, SPREAD_REASON)
                        spread_s -= CLOCK_WAIT_S
                        self.wait_s = 0
                yield from self.patience.begin_attempt(int(spread_s))
                if is_first:
                    self.wait_s = spread_s
                    yield Sleep(spread_s, SPREAD_REASON)
                    self.wait_s = 0
                self._uncommitted = yield from self._register(wish, once)
            yield from self._commit(self._uncommitted[1])
        except DpsError as error:
            if error.code == "store.too_large":
                self._uncommitted = None  # it will never fit; a later registration may bring a smaller one
            outcome = yield from self._failed(error)
            if not self._connects or self.assignment is None or self._uncommitted:
                return outcome
            if self.standing == REFUSED:
                self._hear(NO_HELP)
                return outcome
            if error.code != "dps.throttled":  # DPS is there: no reason to look for the hub for so long again
                now_s: float = yield Uptime()
                self._missing_since_s = now_s
            self.registration_error = error
            delay_s: float = yield from exponential_s(1, HUB_FIRST_S, HUB_LIMIT_S)
            return KEPT, delay_s
        yield from self.abandon()
        if self.assignment is None or self.assignment.assigned_hub != self._uncommitted[0].assigned_hub:
            self.patience.fleet, self.fleet_refused = UNKNOWN, False  # another hub told it
        self.assignment = self._uncommitted[0]
        self._uncommitted = None
        self.committed = True
        self.reason = f"assigned to {self.assignment.assigned_hub}"
        self.registration_error = None
        self._hear(ACCEPTS)
        self.patience.begin_identity()
        spread: float = yield Random()
        yield from self._held()
        return COMMITTED, spread * COMMITTED_SPREAD_S

    def _register(self, wish: str, once: bool) -> "Generator[Effect, Any, tuple[Assignment, Records]]":
        """One registration; a new identity and its records."""
        registration_id = yield from registration_id_of(self.settings)
        beside: dict[str, Any] = {}
        if self._beside:
            beside = yield from self._beside()
        from dps_agent.registration import register

        found = yield from register(self.settings, registration_id, beside, wish != SEEKING, once)
        return found

    def _commit(self, records: "Records") -> "Generator[Effect, Any, None]":
        """Stores the new identity; a failing store is asked again before the attempt counts as failed."""
        failures = 0
        while True:
            try:
                for record, payload in records:
                    yield Commit(record, payload)
                return
            except RetryLater as error:
                failures += 1
                if failures == COMMIT_TRIES:
                    raise
                delay_s: float = yield from exponential_s(failures, 1, 4)
                reason = error.message
            yield Sleep(delay_s, reason)

    def _wait(self) -> "Generator[Effect, Any, Outcome]":
        """WAITING, HALTED, and PROVISIONED, which is the wait before a connection."""
        if self.wait_s or self.state != PROVISIONED:
            yield Sleep(self.wait_s, self.reason)
        return (REGISTER if self.state == PROVISIONED and self.asked_to_register else WAITED), 0

    def _failed(self, error: DpsError) -> "Generator[Effect, Any, Outcome]":
        """An attempt failed; raises what is a bug of this program."""
        if isinstance(error, Broken):
            raise error
        self.error, self.reason = error, error.message  # now, for what follows may end for want of memory
        self.error, wait_s = yield from self.patience.fail_attempt(error)
        return (ASK if isinstance(self.error, AskOperator) else RETRY), wait_s

    def _held(self) -> "Generator[Effect, Any, None]":
        """An identity holds; where a hub is wanted, what failed counts until that has accepted the device."""
        self.error = None
        self.patience.hold()
        if not self._connects:
            yield from self.patience.forgive()

    # The hub.

    def _connect(self) -> "Generator[Effect, Any, Outcome]":
        held = self.assignment
        if held is None:
            raise Broken("agent.bug", "there is no identity to connect with")
        if self._session is None:
            about = dict(self.about)
            about["assignedAt"] = held.last_updated_utc
            about["substatus"] = held.substatus
            from dps_agent.session import Session

            if self._lacks_of != held.assigned_hub:
                self._lacks_of, self._lacks = held.assigned_hub, {}
            self._session = Session(self.settings, held, about, self.summary, self.serial, self._lacks)
            self._session.twin.keep_fleet = self._keep_fleet
        session = self._session
        session.dps_not_before_s = self.patience.dps_not_before_s
        session.token_life_s = self._token_life_s()
        if self._connected_since_s is None:
            yield from self.patience.begin_connection()
        try:
            end = yield from session.open()
        except DpsError as error:
            outcome = yield from self._hub_failed(error)
            return outcome
        if end:
            outcome = yield from self._parted(session, end)
            return outcome
        self.connections += 1
        self.reason = f"connected to {held.assigned_hub}"
        self.error = None
        self._hear(ACCEPTS)
        if self._connected_since_s is None:
            now_s: float = yield Uptime()
            self._connected_since_s = now_s
        yield from self.patience.forgive()
        return ACCEPTED, 0

    def _stay(self) -> "Generator[Effect, Any, Outcome]":
        session = self._session
        if session is None:
            raise Broken("agent.bug", "there is no connection to stay on")
        steady_at_s = (self._connected_since_s or 0.0) + STEADY_S
        try:
            end = yield from session.stay(steady_at_s if self.patience.counts_connections() else None)
            if not end:
                yield from self.patience.steady()
                end = yield from session.stay(None)
        except DpsError as error:
            outcome = yield from self._hub_failed(error)
        else:
            outcome = yield from self._parted(session, end)
        return outcome

    def _parted(self, session: "Session", end: str) -> "Generator[Effect, Any, Outcome]":
        """What follows the end of a connection.

        1. The next token is ready. 2. Somebody wants to register. 3. The hub has refused the device often enough.
        4. There has been no hub of this name for long enough. 5. Anything else: connect again later.
        """
        from dps_agent import session as ends
        from dps_agent.hub_effects import Disconnect

        yield Disconnect()
        self.reason = session.reason
        if end == ends.RENEW:
            self.assignment = session.assignment
            return RENEWED, 0
        self._connected_since_s = None
        if end == ends.REGISTER:
            self._wish = ASKED
            return REGISTER, 0
        self.error = RetryLater(session.code or ends.PARTED_CODES[end], session.reason)
        now_s: float = yield Uptime()
        may_ask_dps = self.patience.may_ask_dps(now_s)
        if session.accepted:
            self._hear(ACCEPTS)
        if end == ends.REFUSED:
            now: Utc = yield UtcNow()
            before = self.standing
            if session.clock_kept(now, now_s):
                yield from self._refuse(now_s)
            if self.standing == REFUSED:
                if may_ask_dps and (before == APPEALED or not self.patience.attempts):
                    return REGISTER, 0
                delay_s: float = yield from self.patience.before_dps_s()
                return FAILED_BEFORE, delay_s
        if end != ends.NOT_FOUND:
            self._missing_since_s = None
        elif self._missing_since_s is None:
            random: float = yield Random()
            self._missing_since_s = now_s + random * self._dps_spread_s()
        elif may_ask_dps and now_s - self._missing_since_s >= HUB_GONE_S:
            self._wish = SEEKING
            return REGISTER, 0
        self.patience.lose_connection(session.was_provoked, session.has_served)
        delay_s = yield from self.patience.before_hub_s(0, None, 0.5 if session.accepted else HUB_LEAST)
        return PARTED, delay_s

    def _hub_failed(self, error: DpsError) -> "Generator[Effect, Any, Outcome]":
        """What follows when TPM or clock give no token, or the hub does not speak with us; raises our own bugs."""
        if isinstance(error, Broken):
            raise error
        from dps_agent.hub_effects import Disconnect

        yield Disconnect()
        self.error = error
        self.reason = error.message
        self._connected_since_s = None
        self.patience.lose_connection()
        if isinstance(error, IdentityStale):
            return STALE, 0
        if isinstance(error, AskOperator):
            delay_s: float = yield from around_s(HALTED_S)
            return ASK, int(delay_s) + 1
        delay_s = yield from self.patience.before_hub_s(0, error.retry_after_s)
        return PARTED, delay_s

    def _refuse(self, now_s: float) -> "Generator[Effect, Any, None]":
        """The hub refused a fresh token. A fleet that it refuses stays doubted for a spread, and asks it on."""
        if self.standing == DOUBTED and not self.patience.attempts and self._dps_spread_s():
            if self._refused_until_s is None:
                random: float = yield Random()
                self._refused_until_s = now_s + random * self._dps_spread_s()
            if now_s < self._refused_until_s:
                return
        self._hear(REFUSES)

    def _keep_fleet(self, told: "Fleet | None") -> "Generator[Effect, Any, None]":
        """The hub told how large the fleet is; None: nothing that could be taken."""
        self.fleet_refused = told is None
        if told is not None:
            yield from self.patience.keep_fleet(told)
            if self._session:
                self._session.token_life_s = self._token_life_s()

    def abandon(self) -> "Generator[Effect, Any, None]":
        """Leaves the identity's session; programs that wait for the hub's answer are told that it will not come."""
        if self._session is not None:
            yield from self._session.abandon()
            self.serial = self._session.serial
            self._session = None

    def _hear(self, said: str) -> None:
        """What hub or DPS said changes the standing; a hub that accepts is also not missing."""
        if said == ACCEPTS:
            self._missing_since_s = self._refused_until_s = None
        self.standing = next_state(STANDINGS, self.standing, said)

    def _token_life_s(self) -> int:
        return self.settings.token_life_s or token_life_s(self.fleet)

    def _dps_spread_s(self) -> int:
        return self.settings.first_contact_spread_s or dps_spread_s(self.fleet)
