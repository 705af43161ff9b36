"""Cuts the power in every moment of a device's life: the whole lifecycle over a slot store on simulated flash.

A life runs in the virtual world of `support.world`. The power goes at its n-th event: an erase, program or sync of
either record, or an answer of the service that the device does not hear any more. Then every state that may be left of
the flash is booted without an operator, and must end with a hub token that the service accepts. In a second plan the
recovery is cut as well, in a third the process alone is killed at an event, and its successor, on the same cache, cut;
in a fourth the kernel's write-back failed in between, so that the cache shows what is not on the disk. Runs on both
runtimes.

Devices with a TPM live so, and those with a key of their own (`BY_KEY`) or a certificate (`BY_CERTIFICATE`), which have
no wrapped key in their record.

Each state has a name, `sweep=lives plan=cut tears=all life=other-hub cut=5 late=False left=17`; `only` looks at that
one alone.
"""

from dps_agent.assignment import decode, seal_message
from dps_agent.effects import Commit, Http, LoadRecord
from dps_agent.lifecycle import PROVISIONED, Lifecycle
from dps_agent.sas import hub_resource, percent_encode
from dps_agent.settings import SYMMETRIC_KEY, TPM, X509
from dps_agent.signing import hub_token
from dps_hal.contracts import IDENTITY, PROGRESS
from dps_hal.device_key import DeviceKey
from dps_hal.errors import DpsError, IdentityStale
from dps_hal.platform import hmac_sha256, sha256, to_base64
from dps_hal.store.slots import SlotStore
from dps_hal.tpm.keys import unwrap
from support.disk.faulty_writers import FAULTY, FAULTY_LATER
from support.disk.flash import FlashSlots, PowerCut, Supply
from support.world import HUB, SHOWN, CertificateKey, FakeDps, World, settings, without

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from dps_agent.assignment import Assignment
    from dps_agent.effects import Reply
    from dps_agent.sas import SasToken
    from support.disk.flash import Slots

    NewStore = Callable[[dict[str, FlashSlots]], SlotStore]
    Step = Callable[["FlashWorld"], None]

SLOT_BYTES = 1280
SECOND_HUB = "second.azure-devices.net"
FIRST_KEY, SECOND_KEY = bytes(range(32)), bytes(range(32, 64))  # of a device with a key of its own, one after the other
RECORDS = (IDENTITY, PROGRESS)
EVICTS = "evict-first"  # a faulty agent: forgets its hub at DPS's first answer, as others do
# Where the last surviving operation is torn: after any byte; after every 32nd; at the start, in the payload.
TEARS: "dict[str, tuple[int, ...] | None]" = {"all": None, "32": tuple(range(0, SLOT_BYTES, 32)), "few": (0, 20, 300)}


class KeyedDps(FakeDps):
    """A DPS whose hubs accept the newest key only; without `rotating` a device that stays keeps its key."""

    def __init__(self, tpm: "Any") -> None:
        FakeDps.__init__(self, tpm)
        self.rotating = True
        self.accepted: tuple[str, bytes] = ("", b"")  # the one hub with the one key that it accepts
        self.issued: list[tuple[str, bytes]] = []  # every pair that ever belonged together

    def work(self, http: Http) -> "Reply":
        """See `FakeDps.work`."""
        before = self.registrations
        reply = FakeDps.work(self, http)
        if self.registrations > before:
            if not self.rotating and self.accepted[0] == self.hub:
                self.hub_key = self.accepted[1]
            self.accepted = (self.hub, self.hub_key)
            self.issued.append(self.accepted)
        return reply

    def copy(self, tpm: "Any") -> "KeyedDps":
        """The same service, with a memory of its own."""
        other = type(self)(tpm)
        for name in self.__dict__:
            setattr(other, name, getattr(self, name))
        other.tpm = tpm
        other.script, other.requests, other.issued = [], [], list(self.issued)
        return other


class OwnKeyDps(KeyedDps):
    """The same for a device with a key of its own, which DPS knows, as its `challenge_key`, and never sends."""

    def assigned(self) -> "dict[str, Any]":
        """See `FakeDps.assigned`."""
        return without(FakeDps.assigned(self), "tpm")

    def _new_key(self, label: bytes) -> bytes:
        return self.challenge_key


class OwnCertificateDps(OwnKeyDps):
    """The same for a device that shows a certificate; `challenge_key` stands for the certificate's key."""

    def work(self, http: Http) -> "Reply":
        """See `FakeDps.work`."""
        assert http.authorization is None, "who shows a certificate has no token"
        return OwnKeyDps.work(self, Http(http.method, http.path, http.body, SHOWN))

    def _accepts(self, token: "SasToken | None") -> bool:
        return token is SHOWN


class FlashWorld(World):
    """A world whose records are on simulated flash, and whose power goes at an event of `supply`."""

    attestation = TPM
    certificate = ""
    records: "tuple[str, ...]" = RECORDS

    def __init__(self, new_store: "NewStore", contents: "dict[str, Slots] | None" = None, cut_at: int = 0) -> None:
        World.__init__(self)
        self.begin()
        self.new_store = new_store
        self.offered: list[bytes] = []  # every identity that was given to the store
        self.late = False  # the power went after the service had answered
        self.fault = ""  # of a faulty agent: EVICTS, or what the way has
        self.supply = Supply(cut_at)
        contents = contents or {}
        self.flash = {
            record: FlashSlots(SLOT_BYTES, 0xFF, contents.get(record), self.supply) for record in self.records
        }
        self.slot_store = new_store(self.flash)

    def begin(self) -> None:
        """What the device shows itself by, and the service that knows it."""
        self.dps = self.service = KeyedDps(self.tpm)

    def inherit(self, before: "FlashWorld") -> None:
        """Takes what is in the TPM from the world before."""
        self.tpm.storage_root_key = before.tpm.storage_root_key
        self.tpm.keys = dict(before.tpm.keys)

    def forget(self) -> None:
        """What a reset removes before the records."""

    def key_of(self, payload: bytes) -> bytes:
        """The hub key that belongs to an identity."""
        return unwrap(decode(payload)[0].wrapped_key)[1][36:]

    def rebooted(self, contents: "dict[str, Slots]", cut_at: int = 0) -> "FlashWorld":
        """The same world after the power came back; this one stays as it is."""
        world = type(self)(self.new_store, contents, cut_at)
        world.inherit(self)
        world.dps = world.service = self.service.copy(world.tpm)
        world.uptime_s = self.uptime_s
        world.fault = self.fault
        return world

    def killed(self, cut_at: int = 0, forgetting: bool = False) -> "FlashWorld":
        """The same world for the next process: what was written and not synced is still in the cache.

        `forgetting`: it is nowhere else, and never will be.
        """
        world = self.rebooted(self.durable(), cut_at)
        world.flash = {record: self.flash[record].after_a_kill(world.supply) for record in self.records}
        if forgetting:
            for record in self.records:
                world.flash[record].forget_pending()
        world.slot_store = self.new_store(world.flash)
        return world

    def durable(self) -> "dict[str, Slots]":
        """What of the flash is there for certain."""
        return {record: self.flash[record].durable() for record in self.records}

    def aftermaths(self, torn_at: "tuple[int, ...] | None") -> "list[dict[str, Slots]]":
        """Every content of the flash that may be left when the power goes now."""
        left: list[dict[str, Slots]] = [{}]
        for record in self.records:
            found = self.flash[record].aftermaths(torn_at)
            left = [dict(before, **{record: slots}) for before in left for slots in found]
        return left

    def answer(self, effect: "Any") -> "Any":
        """See `World.answer`."""
        if isinstance(effect, Commit):
            if effect.record == IDENTITY:
                self.offered.append(effect.payload)
            self.commits.append(effect.record)
            self.slot_store.commit(effect.record, effect.payload)
            return None
        if isinstance(effect, LoadRecord):
            return self.slot_store.load(effect.record)
        answer = World.answer(self, effect)
        if isinstance(effect, Http):
            self.late = True
            self.supply.spend()
            self.late = False
            if self.fault == EVICTS and effect.method == "PUT":
                self.slot_store.erase(IDENTITY)
        return answer

    def lived(self, force: bool = False, once: bool = False) -> Lifecycle:
        """One life of the agent."""
        life = Lifecycle(settings(attestation=self.attestation, certificate=self.certificate))
        self.run(life.live(once, force))
        return life

    def accepts(self, assignment: "Assignment | None") -> bool:
        """Whether the service takes a token that the device makes for its hub."""
        if assignment is None:
            return False
        hub, key = self.service.accepted
        token = self.run(hub_token(assignment, 3600))
        resource = hub_resource(hub, assignment.device_id)
        signature = to_base64(hmac_sha256(key, f"{resource}\n{token.expires_at_s}".encode()))
        return assignment.assigned_hub == hub and f"sig={percent_encode(signature)}&" in token.header()

    def serves(self, pair: "tuple[str, bytes]") -> bool:
        """Whether the hub takes the device with what belongs to an identity."""
        return pair == self.service.accepted

    def recover(self) -> Lifecycle:
        """What a device does that has power again, until its hub accepts it; nobody helps it.

        A hub that refuses the token makes it register again, as the hub's session does.
        """
        life = self.lived()
        if life.state == PROVISIONED and not self.accepts(life.assignment):
            life = self.lived(force=True)
        return life


class KeyWorld(FlashWorld):
    """The same of a device with a key of its own."""

    attestation = SYMMETRIC_KEY

    def begin(self) -> None:
        """See `FlashWorld.begin`."""
        self.dps = self.service = OwnKeyDps(self.tpm)
        self.give(FIRST_KEY)

    def inherit(self, before: FlashWorld) -> None:
        """See `FlashWorld.inherit`."""
        self.give(before.service.challenge_key)

    def give(self, key: bytes) -> None:
        """Enrols the device by this key, and puts it into the device's file."""
        self.service.challenge_key = key
        self.tpm = DeviceKey(key)  # type: ignore[assignment]

    def made_by(self, key: bytes, text: bytes, seal: bytes) -> bool:
        """Whether this key has sealed `text` so."""
        return hmac_sha256(key, seal_message(text)) == seal

    def key_of(self, payload: bytes) -> bytes:
        """The key by which an identity is sealed; none for what no key of the device's has sealed."""
        _, text, seal = decode(payload)
        keys = [key for key in (FIRST_KEY, SECOND_KEY) if self.made_by(key, text, seal)]
        return keys[0] if keys else b""


class CertificateWorld(KeyWorld):
    """The same of a device with a certificate: its hub asks for no token, and looks at whose key it is."""

    attestation = X509

    def begin(self) -> None:
        """See `FlashWorld.begin`."""
        self.dps = self.service = OwnCertificateDps(self.tpm)
        self.give(FIRST_KEY)

    def give(self, key: bytes) -> None:
        """Enrols the device by a certificate for this key."""
        self.service.challenge_key = key
        self.tpm = CertificateKey(key)  # type: ignore[assignment]

    def made_by(self, key: bytes, text: bytes, seal: bytes) -> bool:
        """See `KeyWorld.made_by`."""
        return CertificateKey(key).verify(seal_message(text), seal)

    def accepts(self, assignment: "Assignment | None") -> bool:
        """See `FlashWorld.accepts`."""
        return assignment is not None and (assignment.assigned_hub, self.service.challenge_key) == self.service.accepted


# Lives: what happened before the cut, and what is cut.


def whole(found: "Any") -> "Any":
    """What was loaded; None also where no copy is whole, as before the first commit and after one that was cut."""
    return found if found is not None and found.payload else None


def nothing(world: FlashWorld) -> None:
    """A device from the factory."""


def once(world: FlashWorld) -> None:
    """One slot holds an identity, the other was never written."""
    world.lived()


def twice(world: FlashWorld) -> None:
    """Both slots hold an identity, of two hubs."""
    world.dps.hub = "first.azure-devices.net"
    world.lived()
    world.dps.hub = HUB
    world.lived(force=True)


def register(world: FlashWorld) -> None:
    """A life that registers if it must."""
    world.recover()


def register_again(world: FlashWorld) -> None:
    """The hub refused the token, or somebody asked for it."""
    world.lived(force=True)


def to_another_hub(world: FlashWorld) -> None:
    """The enrolment names another hub."""
    world.dps.hub = SECOND_HUB
    world.lived(force=True)


def same_key(world: FlashWorld) -> None:
    """A service that does not change the key of a device that stays."""
    world.service.rotating = False
    world.lived(force=True)


def reset(world: FlashWorld) -> None:
    """`dps-agent reset`."""
    world.forget()
    for record in world.records:
        world.slot_store.erase(record)


def reset_and_register(world: FlashWorld) -> None:
    """A new life after a reset."""
    reset(world)
    world.lived()


def cleared_tpm(world: FlashWorld) -> None:
    """TPM2_Clear before the boot: another SRK, and the stored key is useless."""
    world.tpm.clear()
    world.lived()


def another_key(world: FlashWorld) -> None:
    """The device's own key was replaced before the boot, here and in its enrolment: nothing stored fits it."""
    assert isinstance(world, KeyWorld)
    world.give(SECOND_KEY)
    world.lived()


def failing(operation: str, times: "int | None", after: int = 0) -> "Step":
    """Another hub, but the flash fails; for good (None), or `times` times, which Commit is repeated for.

    `after` operations of that kind still work.
    """

    def step(world: FlashWorld) -> None:
        world.dps.hub = SECOND_HUB
        flash = world.flash[IDENTITY]
        flash.failing, flash.failing_times, flash.failing_after = operation, times, after
        world.lived(force=True, once=True)

    return step


def failing_reset(operation: str, after: int) -> "Step":
    """A reset that fails once, and a new life after it."""

    def step(world: FlashWorld) -> None:
        flash = world.flash[IDENTITY]
        flash.failing, flash.failing_times, flash.failing_after = operation, 1, after
        try:
            reset(world)
        except DpsError as error:
            assert error.code == "store.io"  # somebody was told, and starts the device all the same
        world.recover()

    return step


NEW, OLD, NONE = "new", "old", "none"


class Life:
    """One row of LIVES; `ends` is the identity that is stored once the step is over: NEW, OLD or NONE."""

    def __init__(self, name: str, before: "Step", step: "Step", ends: str = NEW, forgets: bool = False) -> None:
        self.name = name
        self.before = before
        self.step = step
        self.ends = ends
        self.forgets = forgets  # the step gives the old identity up, or finds it of no use


WHOLE_LIVES = (
    Life("first", nothing, register),
    Life("other-hub", twice, to_another_hub),
    Life("new-key", twice, register_again),
    Life("same-key", twice, same_key),
    Life("reset", twice, reset, NONE, True),
    Life("reset-and-register", twice, reset_and_register, NEW, True),
    Life("cleared-tpm", twice, cleared_tpm, NEW, True),
)
FAILING_LIVES = (
    Life("first-commit-fails-once-at-sync", nothing, failing("sync", 1)),
    Life("commit-fails-once-before-it-writes", twice, failing("sync", 1)),
    Life("commit-fails-once-at-sync", twice, failing("sync", 1, 1)),
    Life("commit-fails-twice", twice, failing("program", 2)),
    Life("commit-fails-at-erase", twice, failing("erase", None), OLD),
    Life("commit-fails-at-program", twice, failing("program", None), OLD),
    Life("commit-fails-at-sync", twice, failing("sync", None), OLD),
    Life("commit-fails-at-its-last-sync", twice, failing("sync", None, 1), OLD),
    Life("commit-writes-nothing", twice, failing("silent", None), OLD),
)
# A reset syncs four times: its tombstone twice, then each slot.
FAILING_RESETS = tuple(
    [
        Life(f"reset-fails-at-{operation}-{after + 1}", once, failing_reset(operation, after), NEW, True)
        for operation in ("sync", "late-sync")
        for after in range(4)
    ]
)
LIVES = WHOLE_LIVES + FAILING_LIVES + FAILING_RESETS
# One of each kind for the killed ones: the others write the same.
KILLED_LIVES = (LIVES[0], LIVES[1], LIVES[5], LIVES[9], FAILING_RESETS[3])


def new_store(flash: "dict[str, FlashSlots]") -> SlotStore:
    """The store as it is."""
    return SlotStore(flash)


WRITERS: "dict[str, NewStore]" = {"": new_store, EVICTS: new_store}
WRITERS.update(FAULTY)
WRITERS.update(FAULTY_LATER)

CUT, CUT_TWICE, KILL_THEN_CUT, LOSE_THEN_CUT = "cut", "cut-twice", "kill-then-cut", "lose-then-cut"


class Way:
    """What is swept of the devices that show who they are in one way.

    `plans` are (plan, tears, lives): what the faulty writers are soonest caught by comes first. These, `writers`, must
    be caught.
    """

    def __init__(
        self,
        name: str,
        world: "type[FlashWorld]",
        plans: "tuple[tuple[str, str, tuple[Life, ...]], ...]",
        writers: "tuple[str, ...]",
    ) -> None:
        self.name = name
        self.world = world
        self.plans = plans
        self.writers = writers


BY_TPM = Way(
    "lives",
    FlashWorld,
    (
        (CUT, "all", WHOLE_LIVES),
        (CUT, "32", FAILING_LIVES),
        (CUT, "few", FAILING_RESETS),
        (CUT_TWICE, "few", WHOLE_LIVES + LIVES[9:10]),
        (KILL_THEN_CUT, "few", KILLED_LIVES),
        (LOSE_THEN_CUT, "few", KILLED_LIVES),
    ),
    tuple([name for name in WRITERS if name]),
)
LIVES_BY_KEY = WHOLE_LIVES[:-1] + (Life("another-key", twice, another_key, NEW, True),)
# What the store does is the same for all ways: here is what the way may do to it.
BY_KEY = Way(
    "lives-by-key",
    KeyWorld,
    (
        (CUT, "all", LIVES_BY_KEY),
        (CUT, "32", FAILING_LIVES),
        (CUT_TWICE, "few", LIVES_BY_KEY[:1] + LIVES_BY_KEY[-1:]),
        (KILL_THEN_CUT, "few", LIVES_BY_KEY[1:2]),
    ),
    ("naive", "in-place", "single-slot", EVICTS),
)
BY_CERTIFICATE = Way("lives-by-certificate", CertificateWorld, BY_KEY.plans, BY_KEY.writers)
WAYS = (BY_TPM, BY_KEY, BY_CERTIFICATE)


class Sweep:
    """Cuts lives at every event; `states` were looked at, `lost` names those that were wrong, and why.

    `plan` is CUT, CUT_TWICE (the recovery from each cut is cut as well), KILL_THEN_CUT or LOSE_THEN_CUT. `only` is the
    name of one state. `at_first` ends with the first lost one. `shared`: of the first cuts, or kills, those alone whose
    number it takes, as `support.share` has it.
    """

    def __init__(
        self,
        writer: str = "",
        plan: str = CUT,
        tears: str = "all",
        only: str = "",
        at_first: bool = False,
        shared: "Callable[[int], bool] | None" = None,
        way: Way = BY_TPM,
    ) -> None:
        self.states = 0
        self.lost: list[str] = []
        self._pairs: dict[bytes, tuple[str, bytes]] = {}
        self._writer = writer
        self._plan = plan
        self._tears = tears
        self._only = only
        self._at_first = at_first
        self._shared = shared
        self._way = way

    def run(self, lives: "tuple[Life, ...]" = LIVES) -> "Sweep":
        """Sweeps `lives`."""
        for life in lives:
            world = self._way.world(WRITERS.get(self._writer, new_store))  # else the fault is the agent's
            name = f"sweep={self._way.name} plan={self._plan} tears={self._tears} life={life.name}"
            if self._only and not self._only.startswith(name + " "):
                continue
            try:
                life.before(world)
                world.fault = self._writer
                start = world.rebooted(world.durable())
                if self._plan in (KILL_THEN_CUT, LOSE_THEN_CUT):
                    self._kill(start, life, name)
                else:
                    self._cut(start, life, 2 if self._plan == CUT_TWICE else 1, name, shared=self._shared)
            except DpsError as error:
                self.lost.append(f"{name}: {error.code} before any cut: {error}")
            if self._at_first and self.lost:
                break
        return self

    def _kill(self, start: FlashWorld, life: Life, name: str) -> None:
        """Kills the process of `life` at each of its events, and cuts the next one, which finds the cache."""
        held = whole(start.slot_store.load(IDENTITY))
        kill = 0
        ended = False
        while not ended and not (self._at_first and self.lost):
            kill += 1
            world = start.killed(kill)
            ended = lived_through(world, life.step)
            if self._shared is not None and not self._shared(kill):
                continue
            before = [None if held is None else held.payload] + world.offered
            after = Life(life.name, nothing, register_again, NEW, life.forgets)
            loses = self._plan == LOSE_THEN_CUT
            self._cut(world.killed(forgetting=loses), after, 1, f"{name} kill={kill}", before)

    def _cut(
        self,
        start: FlashWorld,
        life: Life,
        depth: int,
        name: str,
        before: "list[bytes | None] | None" = None,
        shared: "Callable[[int], bool] | None" = None,
    ) -> None:
        """Cuts the step of `life` at each of its events; `depth` cuts more follow each other.

        `before` are the payloads that may be stored when the step begins; None: the one that is.
        """
        held = whole(start.slot_store.load(IDENTITY))
        durable = self._store_of(start.durable()).load(IDENTITY)
        is_durable = held is not None and durable is not None and durable.payload == held.payload
        seen: dict[bytes, bool] = {}
        cut = 0
        ended = False
        while not ended:
            cut += 1
            world = start.killed(cut)
            ended = lived_through(world, life.step)  # the last state: it is over and the power goes
            if shared is not None and not shared(cut):
                continue
            allowed = (before or [None if held is None else held.payload]) + world.offered
            if life.forgets:
                allowed.append(None)
            if ended:
                if life.ends == NONE:
                    allowed = [None]
                elif life.ends == NEW and world.offered:
                    allowed = [world.offered[-1]]
                else:
                    allowed = [None if held is None else held.payload]
            left = world.aftermaths(TEARS[self._tears])
            for number in range(len(left)):
                looks = sha256(
                    b"".join([part for record in world.records for part in left[number][record]])
                    + bytes([world.dps.registrations, len(world.dps.requests), ended])
                )
                if looks in seen:
                    continue
                seen[looks] = True
                where = f"{name} cut={cut} late={world.late} left={number}"
                if self._only and not (self._only + " ").startswith(where + " "):
                    continue
                if not self._only or self._only == where:
                    self.states += 1
                    fault = self._fault(world, left[number], life, held if is_durable else None, allowed, ended)
                    if fault:
                        self.lost.append(f"{where}: {fault}")
                        if self._at_first:
                            return
                        continue
                if depth > 1:
                    again = Life(life.name, nothing, register, NEW, life.forgets)
                    self._cut(world.rebooted(left[number]), again, depth - 1, where)
                    if self._at_first and self.lost:
                        return

    def _fault(
        self,
        cut_off: FlashWorld,
        left: "dict[str, Slots]",
        life: Life,
        held: "Any",
        allowed: "list[bytes | None]",
        ended: bool,
    ) -> str:
        """What is wrong with what is `left` of the flash, or ""."""
        world = cut_off.rebooted(left)
        registrations = world.dps.registrations
        try:
            stored = whole(world.slot_store.load(IDENTITY))
            payload = None if stored is None else stored.payload
            if payload not in allowed:
                expected = " or ".join([_shown(one) for one in allowed])
                return f"{_shown(payload)} where {expected} was expected"
            if payload is not None and self._pair(world, payload) not in world.service.issued:
                return f"a hub with the key of another one: {_shown(payload)}"
            may_serve = ended and life.ends == NEW
            if not ended and held is not None and not life.forgets:
                may_serve = world.serves(self._pair(world, held.payload))
            end = world.recover()
        except IdentityStale as error:
            return f"the record is not readable: {error}"
        except DpsError as error:
            return f"{error.code} after the reboot: {error}"
        if end.state != PROVISIONED:
            return f"it waits for somebody: {end.state}, {end.reason}"
        if not world.accepts(end.assignment):
            return "the hub refuses its token"
        more = world.dps.registrations - registrations
        if more > (0 if may_serve else 1):
            return f"it took {more} registrations more" + (", though the stored identity was good" if may_serve else "")
        durable = self._store_of(world.durable()).load(IDENTITY)
        if durable is None or durable.payload != (world.offered[-1] if world.offered else payload):
            return "what it ended with was not durable"
        return ""

    def _store_of(self, contents: "dict[str, Slots]") -> SlotStore:
        """The store over these contents, for a look at them."""
        return WRITERS.get(self._writer, new_store)(
            {record: FlashSlots(SLOT_BYTES, 0xFF, contents[record]) for record in contents}
        )

    def _pair(self, world: FlashWorld, payload: bytes) -> "tuple[str, bytes]":
        """Hub and key of an identity."""
        if payload not in self._pairs:
            self._pairs[payload] = (decode(payload)[0].assigned_hub, world.key_of(payload))
        return self._pairs[payload]


def _shown(payload: "bytes | None") -> str:
    if payload is None:
        return "none"
    hub = payload.split(b'"assignedHub":"')[-1].split(b'"')[0]
    return f"hub {hub[:40]!r}"


def lived_through(world: FlashWorld, step: "Step") -> bool:
    """Does `step`; whether it came to its end before the power or the process did."""
    try:
        step(world)
    except PowerCut:
        return False
    return True


def sweep(writer: str = "", only: str = "", at_first: bool = False, way: Way = BY_TPM) -> "tuple[int, list[str]]":
    """What the plans of the way name; number of states, and the lost ones.

    `at_first`: the first of those, torn at few bytes.
    """
    states = 0
    lost: list[str] = []
    for plan, all_tears, lives in way.plans + (((CUT, "few", LIVES),) if only else ()):
        tears = "few" if at_first and not only else all_tears
        if not (at_first and lost) and (not only or only.startswith(f"sweep={way.name} plan={plan} tears={tears} ")):
            one = Sweep(writer, plan, tears, only, at_first, way=way).run(lives)
            states += one.states
            lost += one.lost
    return states, lost


def registrations_wear(registrations: int) -> "tuple[int, int]":
    """Erases of the most worn slot, and of all slots, by so many registrations that all succeed."""
    world = FlashWorld(new_store)
    erased: dict[tuple[str, int], int] = {}
    for record in RECORDS:
        flash = world.flash[record]

        def erase(slot: int, record: str = record, erase: "Any" = flash.erase) -> None:
            erased[(record, slot)] = erased.get((record, slot), 0) + 1
            erase(slot)

        flash.erase = erase  # type: ignore[method-assign]
    for _ in range(registrations):
        world.lived(force=True)
    return max(erased.values()), sum(erased.values())
