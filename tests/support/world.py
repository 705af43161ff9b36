"""A world in virtual time for the logic: TPM, store, clock, DPS and hubs that answer effects, on both runtimes.

`World.run` is a runner: it drives one generator, by way of `dps_agent.driver`. A day of back-off takes no time; a
generator that asks for more than `effect_limit` effects of one class counts as one that never ends. `World.at` lets
something happen at its time.
"""

import gc
import struct

from dps_agent.driver import ClockConfirmed, Driver, Reach, Release, TpmCall
from dps_agent.effects import (
    Commit,
    FindIssuers,
    ForgetOlder,
    Http,
    ImportKey,
    LoadRecord,
    NoReply,
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
from dps_agent.fleet import TOKEN_LIFE_S, UNKNOWN
from dps_agent.hub_effects import (
    Acknowledge,
    Acknowledged,
    Connect,
    Disconnect,
    GiveUp,
    Gone,
    NextEvent,
    Publish,
    SendAgain,
    Subscribe,
    Tell,
)
from dps_agent.sas import percent_encode
from dps_agent.settings import (
    API_VERSION,
    AUTO,
    ISSUING_API_VERSION,
    KEEP_ALIVE_S,
    POLL_LOOKUP,
    POLL_OPERATION,
    TPM,
    Settings,
)
from dps_hal.contracts import IDENTITY, StoredRecord, Utc
from dps_hal.errors import DpsError, IdentityStale
from dps_hal.platform import MICROPYTHON, from_json, hmac_sha256, sha256, to_base64, to_json
from dps_hal.tpm.activation import Activation, join_activation, parse_activation
from dps_hal.tpm.keys import ID_KEY_ATTRIBUTES, ek_public, object_name, sized, srk_public, unwrap, wrap
from support.cloud.fake_hub import CONNECT_LIMIT_S, FOREVER_S, FakeHub, FakeProgram

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from typing import Any

    from dps_agent.effects import Effect
    from dps_agent.hub_effects import ConnAck, Event
    from dps_agent.sas import SasToken

if MICROPYTHON:  # or what a long life keeps lies scattered over the heap, and no large list fits any more
    gc.threshold(262144)  # type: ignore[attr-defined]

EFFECT_LIMIT = 20000
NOW_S = 1800000000  # 2027-01-15
NOW_DATE = "Fri, 15 Jan 2027 08:00:00 GMT"
LATENCY_S = 0.05
HUB = "emulator.azure-devices.net"
DEVICE = "press-07"
SCOPE = "0ne00000000"
SHOWN: "Any" = object()  # in a token's place: the connection has shown the device's certificate


def settings(
    registration_id: str = DEVICE,
    poll: str = POLL_LOOKUP,
    payload: "dict[str, Any] | None" = None,
    budget_s: int = 900,
    spread_s: int = 0,
    id_scope: str = SCOPE,
    fleet: "tuple[int, int, int]" = UNKNOWN,
    under: int = 0,
    model_id: str = "",
    features: "tuple[str, ...]" = (AUTO,),
    token_life_s: int = TOKEN_LIFE_S,
    attestation: str = TPM,
    certificate: str = "",
) -> Settings:
    """Settings as an operator would write them."""
    return Settings(
        id_scope,
        registration_id,
        "https://global.azure-devices-provisioning.net",
        POLL_OPERATION if certificate else poll,
        payload,
        budget_s,
        spread_s,
        (".azure-devices.net", ".azure-devices.cn"),
        fleet,
        KEEP_ALIVE_S,
        token_life_s,
        under,
        model_id,
        features,
        attestation,
        certificate,
        ISSUING_API_VERSION if certificate else API_VERSION,
    )


def with_identity(registered: "Any") -> "Any":
    """What a registration has found where only the identity is to be stored: the assignment and that record."""
    assignment, ((record, payload),) = registered
    assert record == IDENTITY
    return assignment, payload


def id_key_public(key: bytes, attributes: int = ID_KEY_ATTRIBUTES) -> bytes:
    """The TPM2B_PUBLIC of an HMAC key; its unique field stands for the key."""
    area = struct.pack(">HHI", 0x0008, 0x000B, attributes) + sized(b"") + struct.pack(">HH", 0x0005, 0x000B)
    return sized(area + sized(sha256(key)))


def fake_blob(key: bytes, attributes: int = ID_KEY_ATTRIBUTES) -> bytes:
    """An activation blob of the real layout whose ciphers are zeros: only `FakeTpm` knows the key behind it."""
    return join_activation(
        Activation(
            sized(bytes(32)) + bytes(18),
            bytes(256),
            sized(bytes(32)) + bytes(76 + len(key)),
            bytes(256),
            id_key_public(key, attributes),
            bytes(16),
        )
    )


class FakeTpm:
    """Answers as a TPM does, with no cryptography: `keys` maps a key's unique field to the key."""

    def __init__(self, seed: int = 1) -> None:
        self.endorsement_key = ek_public(b"\x81" + bytes([seed]) * 254 + b"\x01")
        self.storage_root_key = srk_public(b"\x82" + bytes([seed]) * 254 + b"\x01")
        self.keys: dict[bytes, bytes] = {}

    def clear(self) -> None:
        """TPM2_Clear: the EK stays, the SRK is another one and wraps nothing of before."""
        self.storage_root_key = srk_public(b"\x83" + sha256(self.storage_root_key)[:1] * 254 + b"\x01")

    def import_key(self, activation: bytes) -> bytes:
        public = parse_activation(activation).id_key_public
        key = self.keys.get(public[-32:])
        if key is None:
            raise IdentityStale("tpm.blob_refused", "the blob was made for another TPM")
        return wrap(public, sized(object_name(self.storage_root_key) + key))

    def sign(self, wrapped_key: bytes, message: bytes) -> bytes:
        _, private = unwrap(wrapped_key)
        if private[2:36] != object_name(self.storage_root_key):
            raise IdentityStale("tpm.key_stale", "the key was wrapped by another storage root key")
        return hmac_sha256(private[36:], message)


class FakeDps:
    """A DPS that works, in one class; `script` answers in its stead, one entry per request (None: the service does).

    An entry is a Reply, a NoReply, or a function of the working service's own Reply. `requests` lists what came.
    """

    def __init__(self, tpm: FakeTpm) -> None:
        self.tpm = tpm
        self.script: list[Any] = []
        self.requests: list[Http] = []
        self.hub = HUB
        self.polls_until_assigned = 1
        self.stale_lookups = 0
        self.lookup_key = True
        self.retry_after: str | None = "3"
        self.registrations = 0
        self.etags = 0
        self.challenge_key = b""
        self.hub_key = b""
        self.current: dict[str, Any] | None = None  # the assignment of a finished registration
        self.previous: dict[str, Any] | None = None
        self.remaining = 0
        self.hubs: dict[str, FakeHub] = {}  # that get and lose the device

    def answer(self, http: Http) -> "Reply | NoReply":
        self.requests.append(http)
        scripted = self.script.pop(0) if self.script else None
        if scripted is None:
            return self.work(http)
        return scripted(self.work(http)) if callable(scripted) else scripted  # type: ignore[no-any-return]

    def work(self, http: Http) -> Reply:
        if http.method == "PUT":
            if http.authorization is None:
                self.challenge_key = self._new_key(b"challenge")
                return self.challenge(fake_blob(self.challenge_key))
            if not self._accepts(http.authorization):
                return error_reply(401, 401002, "Unauthorized")
            self.registrations += 1
            self.remaining = self.polls_until_assigned
            self.previous, self.current = self.current, None
            self.hub_key = self._new_key(b"hub")
            for name in self.hubs:
                self.hubs[name].keys = {DEVICE: self.hub_key} if name == self.hub else {}
            return reply(202, {"operationId": "4.abc", "status": "assigning"}, self.retry_after)
        if not self._accepts(http.authorization):
            return error_reply(401, 401002, "Unauthorized")
        if http.method == "POST" and self.stale_lookups and self.previous:
            self.stale_lookups -= 1
            return reply(200, self.previous)
        if self.remaining:
            self.remaining -= 1
            state = {"registrationId": DEVICE, "status": "assigning"}
            if http.method == "POST":
                return reply(200, state, self.retry_after)
            return reply(202, {"operationId": "4.abc", "status": "assigning", "registrationState": state}, "3")
        if self.current is None:
            self.etags += 1
            self.current = self.assigned()
        if http.method == "POST":
            return reply(200, self.current if self.lookup_key else without(self.current, "tpm"))
        return reply(200, {"operationId": "4.abc", "status": "assigned", "registrationState": self.current})

    def assigned(self) -> "dict[str, Any]":
        return {
            "tpm": {"authenticationKey": to_base64(fake_blob(self.hub_key))},
            "registrationId": DEVICE,
            "createdDateTimeUtc": "2027-01-15T08:00:00.1234567Z",
            "assignedHub": self.hub,
            "deviceId": DEVICE,
            "status": "assigned",
            "substatus": "initialAssignment",
            "lastUpdatedDateTimeUtc": f"2027-01-15T08:00:{self.etags:02d}.1234567Z",
            "etag": f"etag-{self.etags}",
            "payload": {"line": 4},
        }

    def challenge(self, blob: bytes) -> Reply:
        return reply(
            401,
            {
                "message": "Authorization required, resend request using supplied key",
                "authenticationKey": to_base64(blob),
                "unencryptedAuthenticationKey": None,
                "keyName": "registration",
            },
        )

    def _new_key(self, label: bytes) -> bytes:
        key = sha256(label + bytes([self.registrations % 256, len(self.requests) % 256]))
        self.tpm.keys[sha256(key)] = key
        return key

    def _accepts(self, token: "SasToken | None") -> bool:
        if token is None or token.key_name != "registration":
            return False
        signature = to_base64(hmac_sha256(self.challenge_key, f"{token.resource}\n{token.expires_at_s}".encode()))
        return f"sig={percent_encode(signature)}&" in token.header()


class KeyDps(FakeDps):
    """A DPS whose enrolment of the device is one for a symmetric key: `key` signs for it and for the hub."""

    def __init__(self, tpm: FakeTpm, key: bytes, group: str = "") -> None:
        FakeDps.__init__(self, tpm)
        self.challenge_key = key
        self.group = group

    def work(self, http: Http) -> Reply:
        """See `FakeDps.work`."""
        if http.authorization is None:
            return error_reply(401, 401002, "Unauthorized")
        return FakeDps.work(self, http)

    def assigned(self) -> "dict[str, Any]":
        """See `FakeDps.assigned`."""
        state = without(FakeDps.assigned(self), "tpm")
        if self.group:
            state["symmetricKey"] = {"enrollmentGroupId": self.group}
        return state

    def _new_key(self, label: bytes) -> bytes:
        return self.challenge_key


class CertificateDps(FakeDps):
    """A DPS whose enrolment of the device is one for a certificate, which `shown` says the connection has shown."""

    def __init__(self, tpm: FakeTpm) -> None:
        FakeDps.__init__(self, tpm)
        self.challenge_key = b"the certificate's own"
        self.shown = True

    def work(self, http: Http) -> Reply:
        """See `FakeDps.work`."""
        assert http.authorization is None, "who shows a certificate has no token"
        if not self.shown:
            return error_reply(401, 401002, "Unauthorized")
        return FakeDps.work(self, Http(http.method, http.path, http.body, SHOWN))

    def assigned(self) -> "dict[str, Any]":
        """See `FakeDps.assigned`."""
        return dict(without(FakeDps.assigned(self), "tpm"), x509={})

    def _accepts(self, token: "SasToken | None") -> bool:
        return token is SHOWN

    def _new_key(self, label: bytes) -> bytes:
        return self.challenge_key


class CertificateKey:
    """A `Signer` by the key of a certificate, with no cryptography: each of its signatures is another one."""

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._signatures = 0

    def sign(self, wrapped_key: bytes, message: bytes) -> bytes:
        """64 bytes."""
        assert not wrapped_key
        self._signatures += 1
        salt = sha256(bytes([self._signatures % 256]) + message)
        return salt + hmac_sha256(self._key, salt + message)

    def verify(self, message: bytes, signature: bytes) -> bool:
        """Whether this key has made it."""
        return hmac_sha256(self._key, signature[:32] + message) == signature[32:]


def without(value: "dict[str, Any]", name: str) -> "dict[str, Any]":
    """`value` but for one of its fields."""
    return {key: value[key] for key in value if key != name}


def reply(status: int, body: "Any", retry_after: "str | None" = None) -> Reply:
    """An answer whose body is bytes as they are, or JSON."""
    headers = {"content-type": "application/json; charset=utf-8", "x-ms-request-id": "request-1"}
    headers["date"] = NOW_DATE
    if retry_after is not None:
        headers["retry-after"] = retry_after
    return Reply(status, headers, body if isinstance(body, bytes) else to_json(body).encode(), NOW_S)


def error_reply(status: int, error_code: int, message: str = "no", retry_after: "str | None" = None) -> Reply:
    """An answer with ProvisioningServiceErrorDetails."""
    return reply(status, {"errorCode": error_code, "trackingId": "track-1", "message": message}, retry_after)


def body_of(http: Http) -> "Any":
    """The JSON of a request."""
    return from_json(http.body)


class World:
    """Everything a generator can ask for. `refuse` maps an effect's class name to errors that it is answered with."""

    def __init__(self) -> None:
        self.tpm = FakeTpm()
        self.dps = FakeDps(self.tpm)
        self.store: dict[str, bytes] = {}
        self.uptime_s = 100.0
        self.believable = True
        self.random = 0.5
        self.effects: dict[str, int] = {}  # how often each class of effect was asked for
        self.sleeps: list[tuple[float, str]] = []
        self.commits: list[str] = []
        self.refuse: dict[str, list[DpsError | None]] = {}
        self.rolled_back = False
        self.effect_limit = EFFECT_LIMIT
        self.utc_source = "the test"
        self.utc_error_s = 0  # how much later than the truth the device's clock is
        self.hubs = {HUB: FakeHub(HUB)}
        self.dps.hubs = self.hubs
        self.program = FakeProgram()
        self.forgotten: list[tuple[float, str]] = []  # when ForgetOlder was asked for which record
        self.posted: list[Event] = []  # of programs
        self.in_flight: dict[int, Publish] = {}  # packet id -> QoS 1, of `client_of`
        self.client_of = ("", "")  # hub and device id
        self.packet_id = 0
        self.connected: FakeHub | None = None  # as far as the device knows
        self.acknowledged: list[Event] = []  # PUBACKs that an earlier connection brought
        self.driver = Driver(readers=lambda: self.program.readers)
        self.released: list[tuple[float, str]] = []  # when, and what
        self.reached: list[str] = []  # hubs, for their certificates alone
        self.clock_confirmed = True  # by NTP, or a Date of the last hour
        self.vouching: list[str] = []  # who makes the clock believable when asked: "DPS", a hub
        self.hurry = False  # ends the current Sleep
        self.over = False  # ends `run`
        self._plans: list[tuple[float, Callable[[], None]]] = []

    @property
    def hub(self) -> "FakeHub":
        """The hub of `HUB`."""
        return self.hubs[HUB]

    def at(self, uptime_s: float, happens: "Callable[[], Any]") -> None:
        """Calls `happens` at that time, as soon as the device waits."""
        self._plans.append((uptime_s, happens))

    def cancel_plans(self) -> None:
        """Nothing of what was to happen will."""
        self._plans.clear()

    def end_at(self, uptime_s: float) -> None:
        """Ends `run` at that time, like a program that is killed."""

        def end() -> None:
            self.over = True

        self.at(uptime_s, end)

    def post(self, *events: "Event") -> None:
        """What a program asks for."""
        self.posted += events

    def run(self, generator: "Generator[Effect, Any, Any]") -> "Any":
        """Runs the generator to its end and returns its value; None where the run ended first. It is always closed."""
        self.over = False
        generator = self.driver.drive(generator)
        try:
            effect = generator.send(None)
            while True:
                name = type(effect).__name__
                self.effects[name] = self.effects.get(name, 0) + 1
                assert self.effects[name] < self.effect_limit, f"the exchange does not end: {self.effects}"
                try:
                    answer = self.answer(effect)
                except DpsError as error:
                    effect = generator.throw(error)
                    continue
                if self.over:
                    self._stop()
                    return None
                effect = generator.send(answer)
        except StopIteration as stop:
            return stop.value
        finally:
            generator.close()

    def answer(self, effect: "Any") -> "Any":
        refusals = self.refuse.get(type(effect).__name__)
        if refusals:
            refusal = refusals.pop(0)
            if refusal is not None:
                raise refusal
        if isinstance(effect, Http):
            self.pass_to(self.uptime_s + LATENCY_S)
            reply = self.dps.answer(effect)
            self.believable = self.believable or ("DPS" in self.vouching and isinstance(reply, Reply))
            return reply
        if isinstance(effect, Release):
            self.released.append((self.uptime_s, effect.what))
            return None
        if isinstance(effect, Reach):
            self.reached.append(effect.hub)
            self.believable = self.believable or effect.hub in self.vouching
            return None
        if isinstance(effect, ClockConfirmed):
            return self.clock_confirmed
        if isinstance(effect, TpmCall):
            return effect.call()
        if isinstance(effect, Sleep):
            assert effect.delay_s >= 0 and effect.reason, effect
            self.sleeps.append((effect.delay_s, effect.reason))
            self.hurry = False
            end_s = self.uptime_s + effect.delay_s
            while not (self.hurry or self.over) and self.pass_to(end_s):
                pass
            return None
        if isinstance(effect, Commit):
            self.store[effect.record] = effect.payload
            self.commits.append(effect.record)
            return None
        if isinstance(effect, LoadRecord):
            payload = self.store.get(effect.record)
            return None if payload is None else StoredRecord(payload, 1, self.rolled_back)
        if isinstance(effect, ImportKey):
            return self.tpm.import_key(effect.activation)
        if isinstance(effect, Sign):
            return self.tpm.sign(effect.wrapped_key, effect.message)
        if isinstance(effect, Verify):
            return self.tpm.verify(*effect)  # type: ignore[attr-defined]
        if isinstance(effect, ReadRequest):
            return self.tpm.request(effect.registration_id)  # type: ignore[attr-defined]
        if isinstance(effect, FindIssuers):
            return self.tpm.issuers(effect.certificates)  # type: ignore[attr-defined]
        if isinstance(effect, ReadEndorsementKey):
            return self.tpm.endorsement_key
        if isinstance(effect, ReadStorageRootKey):
            return self.tpm.storage_root_key
        if isinstance(effect, Uptime):
            return self.uptime_s
        if isinstance(effect, UtcNow):
            return Utc(self.utc_s() + self.utc_error_s, self.believable, self.utc_source)
        if isinstance(effect, Random):
            return self.random
        if isinstance(effect, ForgetOlder):
            self.forgotten.append((self.uptime_s, effect.record))
            return None
        if isinstance(effect, Tell):
            return self.program.tell(effect.message)
        return self._answer_about_hub(effect)

    def utc_s(self) -> int:
        """The true time."""
        return NOW_S + int(self.uptime_s)

    def pass_to(self, uptime_s: float) -> bool:
        """Lets time pass until the next plan, which happens, or to `uptime_s`; False in the latter case."""
        plan = min(self._plans, key=_at_s) if self._plans else None
        if plan is None or plan[0] > uptime_s:
            self.uptime_s = max(self.uptime_s, uptime_s)
            return False
        self._plans.remove(plan)
        self.uptime_s = max(self.uptime_s, plan[0])
        plan[1]()
        return True

    def _stop(self) -> None:
        """What becomes of the connection when the program is killed."""
        if self.connected:
            self.connected.disconnect()
        self.connected = None
        self.in_flight, self.posted, self.acknowledged = {}, [], []
        self.client_of = ("", "")

    def _answer_about_hub(self, effect: "Any") -> "Any":
        hub = self.connected
        if isinstance(effect, NextEvent):
            return self._next_event(effect.until_uptime_s)
        if isinstance(effect, Connect):
            return self._connect(effect)
        if isinstance(effect, Disconnect):
            self._leave()
            return None
        if isinstance(effect, GiveUp):
            self.in_flight.pop(effect.packet_id, None)
            return None
        if isinstance(effect, SendAgain):
            if hub:
                hub.publish(self.in_flight[effect.packet_id], effect.packet_id, self.uptime_s)
            return None
        if isinstance(effect, Acknowledge):
            if hub and hub.serves(self.uptime_s):
                hub.acknowledge(effect.packet_id)
            return None
        assert isinstance(effect, (Publish, Subscribe)), f"an unknown effect: {effect}"
        if hub is None:
            return None
        self.packet_id = self.packet_id % 65535 + 1
        while self.packet_id in self.in_flight:
            self.packet_id = self.packet_id % 65535 + 1
        if isinstance(effect, Subscribe):
            hub.subscribe(effect, self.packet_id, self.uptime_s)
            return self.packet_id
        if effect.qos:
            self.in_flight[self.packet_id] = effect
        hub.publish(effect, self.packet_id if effect.qos else 0, self.uptime_s)
        return self.packet_id if effect.qos else 0

    def _leave(self) -> None:
        if self.connected:
            while True:
                event = self.connected.take_event(self.uptime_s)
                if event is None:
                    break
                if isinstance(event, Acknowledged) and event.packet_id in self.in_flight:
                    del self.in_flight[event.packet_id]
                    self.acknowledged.append(event)
            self.connected.disconnect()
        self.connected = None

    def _connect(self, effect: Connect) -> "ConnAck | NoReply":
        self._leave()
        if self.client_of != (effect.hub, effect.device_id):
            self.client_of = (effect.hub, effect.device_id)
            self.in_flight = {}
        hub = self.hubs.get(effect.hub)
        if hub is None:
            return NoReply("not_found: no such name", False)
        self.pass_to(self.uptime_s + LATENCY_S)
        answer = hub.connect(effect, self.uptime_s, self.utc_s())
        if isinstance(answer, NoReply):
            if answer.reason.startswith("timeout"):
                self.pass_to(self.uptime_s + CONNECT_LIMIT_S)
        elif answer.return_code == 0:
            self.connected = hub
        return answer

    def _next_event(self, until_s: float) -> "Event | None":
        while not self.over:
            if self.acknowledged:
                return self.acknowledged.pop(0)
            event = self.connected.take_event(self.uptime_s) if self.connected else None
            if isinstance(event, Acknowledged):
                if event.packet_id not in self.in_flight:
                    continue  # for what was sent twice
                del self.in_flight[event.packet_id]
            if isinstance(event, Gone):
                self._leave()
            if event is not None:
                return event
            if self.posted:
                return self.posted.pop(0)
            if self.uptime_s >= until_s:
                return None
            next_s = self.connected.next_event_at_s() if self.connected else FOREVER_S
            self.pass_to(min(next_s, until_s))
        return None

    def slept(self, words: str) -> "list[float]":
        """The delays whose reason contains `words`."""
        return [delay for delay, reason in self.sleeps if words in reason]


def _at_s(plan: "tuple[float, Any]") -> float:
    return plan[0]


def calls(world: World) -> "list[str]":
    """The requests that DPS got, as "PUT", "PUT+token", "LOOKUP", "OPERATION"."""
    names = {"POST": "LOOKUP", "GET": "OPERATION"}
    out = []
    for http in world.dps.requests:
        out.append("PUT+token" if http.method == "PUT" and http.authorization else names.get(http.method, http.method))
    return out


def catch(call: "Callable[[], Any]") -> DpsError:
    """The error that `call` ends with."""
    try:
        value = call()
    except DpsError as error:
        return error
    raise AssertionError(f"expected an error, got {value!r}")
