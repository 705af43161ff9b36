"""The renewal of an issued certificate over its hub: a machine of its own, pushed by the session as the twin is.

At two thirds of the certificate's life the device sends its request once more, on a topic of the connection that is
there. The hub says 202 at once, and sometime, on this connection or a later one, sends the certificate. That is stored,
and the next connection shows it.

| state | waits for | until |
|---|---|---|
| IDLE | the time to ask | `due_s` |
| SUBSCRIBING | SUBACK, without which there would be no answer | ANSWER_LIMIT_S |
| ASKED | the 202 | ANSWER_LIMIT_S |
| ACCEPTED | the certificate | the hub's `operationExpires`, at most ISSUE_LIMIT_S |
| STORING | a store that takes what has come | it is asked again after a delay |

What goes wrong:

1. The connection ends: the same request goes out under the same id on the next one.
2. Another request is under way (409): ours takes its place.
3. The hub has no room, or fails (429, 5xx), or says nothing, or the key of this device cannot be read: again, after
   ever longer delays, and those it asks for.
4. TRIES_LIMIT of these in a row, a refusal that will stay, or LAST_PART of the life left, whatever is under way: the
   device registers, which brings a certificate as well, once in REGISTER_AGAIN of the life. In between it goes on
   asking, but for what will stay so.
5. The certificate has ended: the hub refuses it, and that is the life's business.

A preview of Azure, hub api-version 2025-08-01-preview. Sources: Microsoft's clients, and a test run of theirs.
"""

from dps_agent.assignment import Assignment, decode
from dps_agent.backoff import exponential_s
from dps_agent.der import certificates, validity
from dps_agent.effects import (
    NO_REPLY_CLOSED,
    NO_REPLY_TLS_CLIENT,
    NO_REPLY_TLS_FAILED,
    Commit,
    LoadRecord,
    Random,
    ReadRequest,
    Uptime,
    UtcNow,
)
from dps_agent.hub_effects import Acknowledge, Arrived, Granted, Publish, Subscribe
from dps_agent.issued import chain_for, name_of, records_with
from dps_agent.signing import sealed
from dps_agent.twin import NEVER_S, query_value
from dps_agent.utc import utc_s, whole_number
from dps_hal.contracts import IDENTITY
from dps_hal.errors import AskOperator, IdentityStale, RetryLater
from dps_hal.platform import from_json, to_base64, to_json

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Generator
    from typing import Any

    from dps_agent.effects import Effect
    from dps_agent.hub_effects import Event
    from dps_hal.contracts import StoredRecord, Utc

API_VERSION = "2025-08-01-preview"
ANSWERS = "$iothub/credentials/res/"
REQUESTS = "$iothub/credentials/POST/issueCertificate/?$rid="

IDLE = "idle"
SUBSCRIBING = "subscribing"
ASKED = "asked"
ACCEPTED = "accepted"
STORING = "storing"

RENEW_AT = 2 / 3  # of a certificate's life at the latest
RENEW_SPREAD = 0.05  # up to so much of it earlier, so that a fleet does not renew together
LAST_PART = 0.1  # of its life: what was not renewed by then is left to a registration
REGISTER_AGAIN = 1 / 24  # of its life between two registrations for want of a renewal
REGISTER_LEAST_S = 3600
CLOCK_AGAIN_S = 600  # after the clock was not believed
ANSWER_LIMIT_S = 90  # a hub's gateway has 60 s
ISSUE_LIMIT_S = 43200  # what the 202 of a test run promised
TRIES_LIMIT = 5
AGAIN_FIRST_S = 60
AGAIN_LIMIT_S = 3600
ASKED_FOR_LIMIT_S = 86400  # of a delay that the hub asks for
TEXT_LIMIT = 200  # characters of the hub's own words
_CODES_LIMIT = 1_000_000  # they have six digits
_FAILED = 0x80  # of a subscription: MQTT 3.1.1, 3.9.3
_LATER = (408, 409, 429)  # and all from 500 on, but for these codes
_FOR_GOOD = (412005, 503102)


class Renewal:
    """The renewals of one identity, one after the other. `assignment` is that identity, anew once one is stored.

    `reason` says what went wrong last, and why the device is to register; "" for nothing.
    """

    api_version = API_VERSION

    def __init__(self, assignment: "Assignment", chain: bytes) -> None:
        self.assignment = assignment
        self.reason = ""
        self.state = IDLE
        self.failures = 0  # in a row
        self._chain = chain
        self._due_s = 0.0  # when there is something to do
        self._ends_s: float | None = None  # the uptime at which the certificate ends, None while that is not known
        self._life_s = 0
        self._packet_id: int | None = None  # of the subscription
        self._attempt = 0  # requests whose end has come
        self._replaces = False  # the next request takes the place of another one
        self._register_not_before_s: float | None = None  # None: nothing is known of the certificate yet
        self._dps_not_before_s = 0.0  # as `ask` heard it last
        self._not_before_s = 0.0  # after one renewal the next, whatever a clock says
        self._taken: tuple[bytes, int] | None = None  # a chain that is to be stored, and the packet that brought it

    @property
    def request_id(self) -> str:
        """The same for what is asked again.

        Requests whose end has come are counted by this process alone. So the next process asks under this same id where
        none had failed before, and else under another, which the hub answers with 409, and takes as a replacement.
        """
        return f"{self._request_ids}{self._attempt}"

    @property
    def _request_ids(self) -> str:
        """How the ids of all requests begin that are made while this certificate is the one that is shown."""
        return f"{self.assignment.chain[:24]}-"

    def due_s(self) -> float:
        """The uptime at which `ask` has something to do."""
        if self._ends_s is None or self.state == STORING:
            return self._due_s
        return min(self._due_s, max(self._late_s(), self._may_register_s()))

    def forget_connection(self) -> None:
        """What is under way is asked for again on the next connection; a hub that hung up on it waits for that."""
        if self.state in (SUBSCRIBING, ASKED):
            self.failures += 1
            self._due_s += min(AGAIN_FIRST_S * 2 ** min(self.failures, 6), AGAIN_LIMIT_S)
            self.state = IDLE
        elif self.state == ACCEPTED:
            self._due_s = 0.0
            self.state = IDLE
        self._packet_id = None
        if self._taken:
            self._taken = self._taken[0], 0

    def is_refused(self, reason: str) -> "Generator[Effect, Any, bool]":
        """Whether a connection that did not come about says that the hub does not take the certificate.

        It says so in TLS, or hangs up on one that has ended. Or there is no key for it any more, in another TPM.
        """
        word = reason.partition(":")[0]
        if word in (NO_REPLY_TLS_CLIENT, "tpm.certificate_key"):
            return True
        if word not in (NO_REPLY_CLOSED, NO_REPLY_TLS_FAILED):
            return False
        now: Utc = yield UtcNow()
        try:
            return now.believable and now.now_s > validity(certificates(self._chain)[0])[1]
        except (ValueError, IndexError):
            return True

    def ask(self, now_s: float, dps_not_before_s: float) -> "Generator[Effect, Any, bool]":
        """Does what is due; whether the device is to register instead, which DPS allows from `dps_not_before_s` on."""
        if self.state == STORING:
            brought_by = yield from self._store(now_s)
            if brought_by:
                yield Acknowledge(brought_by)
            return False
        if self._ends_s is None and not (yield from self._look_at_life(now_s)):
            return False
        self._dps_not_before_s = dps_not_before_s
        if self.state != IDLE and now_s >= self._due_s:
            said = "the hub did not issue the certificate in time" if self.state == ACCEPTED else "the hub said nothing"
            if self.state == ACCEPTED:
                self._attempt += 1
            yield from self._fail(now_s, said)
        late = self._ends_s is not None and now_s >= self._late_s()
        if now_s >= self._may_register_s() and (late or self.failures >= TRIES_LIMIT):
            self._register_not_before_s = now_s + self._rest_s()
            self.failures = 0
            self.reason = self.reason or "the certificate ends soon, and was not renewed"
            return True
        if now_s < self._due_s:
            return False
        packet_id: int | None = yield Subscribe(((ANSWERS + "#", 1),))
        if packet_id is None:
            self._due_s = now_s + AGAIN_FIRST_S  # there is no connection, and the session hears of it
            return False
        self._packet_id = packet_id
        self._wait(SUBSCRIBING, now_s, ANSWER_LIMIT_S)
        return False

    def take(self, event: "Event") -> "Generator[Effect, Any, bool]":
        """Takes an event that is about this; whether it was."""
        if isinstance(event, Granted):
            if event.packet_id != self._packet_id:
                return False
            self._packet_id = None
            now_s: float = yield Uptime()
            if self.state == SUBSCRIBING:
                yield from self._granted(event, now_s)
            return True
        if not isinstance(event, Arrived) or not event.topic.startswith(ANSWERS):
            return False
        status, _, query = event.topic[len(ANSWERS) :].partition("/")
        rid = query_value(query, "$rid") or ""
        expected = rid == self.request_id and self.state in (ASKED, ACCEPTED, SUBSCRIBING)
        is_judged = True
        # What a hub kept for us comes ahead of the SUBACK, or when nobody waited any more.
        if self.state != STORING and (expected or (status == "200" and rid.startswith(self._request_ids))):
            came_s: float = yield Uptime()
            is_judged = yield from self._answered(status, event, came_s)
        if event.packet_id and is_judged and not self._taken:
            yield Acknowledge(event.packet_id)
        return True

    def _look_at_life(self, now_s: float) -> "Generator[Effect, Any, bool]":
        """Finds out when to ask; whether that is now."""
        now: Utc = yield UtcNow()
        if not now.believable:
            self._due_s = now_s + CLOCK_AGAIN_S
            return False
        random: float = yield Random()
        try:
            first_s, last_s = validity(certificates(self._chain)[0])
        except (ValueError, IndexError):
            self._due_s = NEVER_S  # the hub has taken it, and may take it on
            return False
        self._life_s = max(last_s - first_s, 0)
        self._ends_s = now_s + last_s - now.now_s
        due_s = self._ends_s - self._life_s * (1 - RENEW_AT + RENEW_SPREAD * random)
        self._due_s = max(due_s, self._not_before_s)
        if self._register_not_before_s is None:  # it was issued just now, perhaps, and is old by a wrong clock
            age_s = max(now.now_s - self.assignment.assigned_at_s, 0)
            self._register_not_before_s = now_s + max(self._rest_s() - age_s, 0)
        return now_s >= self._due_s

    def _granted(self, granted: Granted, now_s: float) -> "Generator[Effect, Any, None]":
        if not granted.return_codes or granted.return_codes[0] == _FAILED:
            self._refuse_for_good(now_s, "the hub does not renew certificates")
            return
        request = yield from self._request(self.assignment.registration_id, now_s)
        if request is None:
            return
        body = {"id": self.assignment.device_id, "csr": to_base64(request)}
        if self._replaces:
            body["replace"] = "*"
        sent: int | None = yield Publish(REQUESTS + self.request_id, to_json(body).encode(), 0)
        if sent is None:
            yield from self._fail(now_s, "the hub did not take the request for the certificate")
        else:
            self._wait(ASKED, now_s, ANSWER_LIMIT_S)

    def _answered(self, status: str, event: Arrived, now_s: float) -> "Generator[Effect, Any, bool]":
        """1. It will come. 2. It has come. 3. Another request is under way. 4. Later. 5. Never.

        False: it has come, and could not be judged, so that the hub is to bring it again on the next connection.
        """
        try:
            value: Any = from_json(event.payload or b"")
        except ValueError:
            value = None
        fields: dict[str, Any] = value if isinstance(value, dict) else {}
        if status == "202":
            self._replaces = False
            limit_s: float = yield from _issue_limit_s(fields.get("operationExpires"))
            self._wait(ACCEPTED, now_s, limit_s)
            return True
        self._attempt += 1
        if status == "200":
            issued = fields.get("certificates") if fields else value
            is_judged: bool = yield from self._issued(issued, event.packet_id, now_s)
            return is_judged
        try:
            number = whole_number(status, 3)
        except ValueError:
            yield from self._fail(now_s, "the hub answered the request for the certificate without a status")
            return True
        code, message = fields.get("errorCode"), fields.get("message")
        if isinstance(code, bool) or not isinstance(code, int) or not 0 <= code < _CODES_LIMIT:
            code = 0
        text = message[:TEXT_LIMIT] if isinstance(message, str) else ""
        text = "".join([each if " " <= each <= "~" else "?" for each in text])
        said = f"the hub refused to renew the certificate with {number}: {code} {text}"
        if number == 409 and not self._replaces:
            self._attempt -= 1
            self._replaces = True
            self.state, self._due_s = IDLE, now_s
        elif code not in _FOR_GOOD and (number in _LATER or number >= 500 or (number == 412 and self._replaces)):
            self._replaces = self._replaces and number != 412
            yield from self._fail(now_s, said, fields.get("retryAfter"))
        else:
            self._refuse_for_good(now_s, said)
        return True

    def _issued(self, issued: "Any", packet_id: int, now_s: float) -> "Generator[Effect, Any, bool]":
        """Takes what was issued for the key that there is, which signs nothing for that; whether it could be judged."""
        request = yield from self._request("", now_s)
        if request is None:
            return False
        try:
            chain = yield from chain_for(issued, request)
            former, later = [validity(certificates(each)[0])[1] for each in (self._chain, chain)]
            if later <= former:
                raise ValueError("it ends no later than the one that there is")
        except (ValueError, RetryLater, AskOperator) as error:
            yield from self._fail(now_s, f"the renewed certificate is refused: {error}")
            return isinstance(error, ValueError)
        self._taken = chain, packet_id
        self.state = STORING
        _packet_id = yield from self._store(now_s)
        return True

    def _store(self, now_s: float) -> "Generator[Effect, Any, int]":
        """Makes what has come durable: the chains first, then the identity that names the new one.

        The packet that brought it, which is to be acknowledged now; 0 where it is not stored, or there is none.
        """
        if self._taken is None:
            return 0
        chain, packet_id = self._taken
        try:
            fields: list[Any] = list(self.assignment)
            fields[-1] = name_of(chain)  # its chain
            assignment = Assignment(*fields)
            before = yield from records_with(chain)
            beside = yield from self._beside()
            record: bytes = yield from sealed(assignment, beside)
            for name, payload in before:
                yield Commit(name, payload)
            yield Commit(IDENTITY, record)
        except (RetryLater, AskOperator, IdentityStale) as error:
            yield from self._fail(now_s, f"the renewed certificate is not stored: {error.message}")
            self.state = STORING
            return 0
        self.assignment, self._chain, self._taken = assignment, chain, None
        self.state, self.failures, self.reason, self._replaces = IDLE, 0, "", False
        self._ends_s, self._due_s, self._attempt = None, now_s, 0
        self._not_before_s = now_s + self._rest_s()
        return packet_id

    def _beside(self) -> "Generator[Effect, Any, dict[str, Any]]":
        """What the stored identity notes beside the assignment."""
        stored: StoredRecord | None = yield LoadRecord(IDENTITY)
        if stored is None:
            return {}
        _, text, _ = decode(stored.payload)
        value = from_json(text)
        return {"persistAt": value["persistAt"]} if "persistAt" in value else {}

    def _request(self, registration_id: str, now_s: float) -> "Generator[Effect, Any, bytes | None]":
        """See `ReadRequest`; None where this device has it not now, which counts as a failure."""
        try:
            request: bytes = yield ReadRequest(registration_id)
        except (RetryLater, AskOperator, IdentityStale) as error:
            yield from self._fail(now_s, f"the certificate is not renewed: {error.message}")
            return None
        return request

    def _fail(self, now_s: float, said: str, asked_s: "Any" = None) -> "Generator[Effect, Any, None]":
        """It did not work, and may work later."""
        self.failures += 1
        self.reason = said
        self.state = IDLE
        delay_s: float = yield from exponential_s(self.failures, AGAIN_FIRST_S, AGAIN_LIMIT_S)
        if isinstance(asked_s, int) and not isinstance(asked_s, bool) and asked_s > 0:
            delay_s = max(delay_s, min(asked_s, ASKED_FOR_LIMIT_S))
        self._due_s = now_s + delay_s

    def _refuse_for_good(self, now_s: float, said: str) -> None:
        """What the hub says will stay so: a registration is due, and where that was just made, one later."""
        self.reason = said
        self.state = IDLE
        self.failures = TRIES_LIMIT
        may_s = self._may_register_s()
        self._due_s = now_s if now_s >= may_s else max(may_s, now_s + AGAIN_LIMIT_S)

    def _late_s(self) -> float:
        """The uptime from which on a registration does what no renewal has done."""
        return (self._ends_s or 0.0) - LAST_PART * self._life_s

    def _may_register_s(self) -> float:
        """The uptime before which the device does not register for want of a renewal."""
        return max(self._register_not_before_s or 0.0, self._dps_not_before_s)

    def _rest_s(self) -> float:
        """So long at least lies between two registrations, and between two renewals."""
        return max(REGISTER_AGAIN * self._life_s, REGISTER_LEAST_S)

    def _wait(self, state: str, now_s: float, limit_s: float) -> None:
        self.state, self._due_s = state, now_s + limit_s


def _issue_limit_s(operation_expires: "Any") -> "Generator[Effect, Any, float]":
    """How long a certificate is waited for that comes until then: ISSUE_LIMIT_S where that says nothing."""
    now: Utc = yield UtcNow()
    text = operation_expires if isinstance(operation_expires, str) else ""  # "2026-01-31T12:52:20.565000000Z"
    try:
        marks = "".join([text[at : at + 1] for at in (4, 7, 10, 13, 16)])
        if not now.believable or marks != "--T::" or text[19:20] not in (".", "Z") or text[-1:] != "Z":
            return ISSUE_LIMIT_S
        month, day, hour, minute, second = [whole_number(text[at : at + 2], 2) for at in range(5, 18, 3)]
        until_s = utc_s(whole_number(text[:4], 4), month, day, hour, minute, second)
    except ValueError:
        return ISSUE_LIMIT_S
    return min(max(until_s - now.now_s, ANSWER_LIMIT_S), ISSUE_LIMIT_S)
