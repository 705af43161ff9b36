"""Enrols many devices: ten a request, several requests at a time, no faster than the service's quota.

Enrolments are created, never written over: one that is there already is looked at, and is either the same device or a
conflict. So a request may be sent again whenever its answer is lost, and the same list any number of times.
"""

import base64
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

from dps_agent.backoff import THROTTLE_LIMIT_S, retry_after_s
from dps_agent.effects import NO_REPLY_TLS, NoReply, Reply
from dps_agent.registration import refusal_of
from dps_enroll.journal import Done, Journal
from dps_enroll.service import BULK_LIMIT, CREATE, POLICY, UPDATE_IF_MATCH, Service, refusals_of
from dps_hal.errors import AskOperator, DpsError, RetryLater
from dps_hal.platform import from_json
from dps_hal.tpm.keys import check_ek_public
from dps_text.enrolments import Entry

CREATED = "created"
PRESENT = "present"  # enrolled by this key, and with the list's policy; perhaps by us, before a lost answer or a kill
REPLACED = "replaced"
CONFLICT = "conflict"  # its id is enrolled by another key, or with another policy, and stays so
REFUSED = "refused"  # by the service
UNSUITABLE = "unsuitable"  # its key is none of a TPM's endorsement keys; not sent
UNCERTIFIED = "uncertified"  # its certificate is not verified; not sent
UNSENT = "unsent"  # the run ended before
RESULTS = (CREATED, PRESENT, REPLACED, CONFLICT, REFUSED, UNSUITABLE, UNCERTIFIED, UNSENT)
ENROLLED = (CREATED, PRESENT, REPLACED)

MINUTE_S = 60.0
CATCH_UP_S = 1.0  # what came late by no more is caught up with
FIRST_WAIT_S = 1.0  # after the first failure that names no delay; doubled with each
LONGEST_WAIT_S = 60.0
PATIENCE_S = 900.0  # without any device that is done with, the run ends
CONFLICT_STATUS = 409
CHANGED_STATUS = 412  # its etag is another one by now
_THROTTLED = (429, 503)
_LATER = (408, 500, 502, 504, *_THROTTLED)
_NOT_AUTHORIZED = (401, 403)
_OF_THE_SERVICE = ("etag", "createdDateTimeUtc", "lastUpdatedDateTimeUtc", "registrationState")


class Plan(NamedTuple):
    """How a list is to be enrolled."""

    per_minute: float
    counts_devices: bool  # the quota counts devices; else requests
    connections: int
    replace: bool
    common: Mapping[str, Any]  # fields of every enrolment that has none of that name

    def record(self, entry: Entry) -> dict[str, Any]:
        """As the service takes it, without what the service itself has written into a list that came from it.

        A credential policy that is null or empty is none, which only a preview of the service's API would understand.
        """
        own = {name: value for name, value in entry.record.items() if name not in _OF_THE_SERVICE}
        record = {**self.common, **own}
        return record if record.get(POLICY) else {name: value for name, value in record.items() if name != POLICY}

    def policy(self, entry: Entry) -> str:
        """The credential policy that the enrolment is to have, "" for whichever it has."""
        return str(self.record(entry).get(POLICY, ""))


class Stopped(Exception):
    """The run ends: somebody asked for it, or another thread has failed."""


class Pace:
    """Even in time: so much a minute, and nothing before a time that the service has named. For any thread."""

    def __init__(
        self, per_minute: float, stopped: threading.Event, uptime_s: Callable[[], float] = time.monotonic
    ) -> None:
        # What is caught up with is within the quota, too.
        self._step_s = (MINUTE_S + CATCH_UP_S) / per_minute
        self._stopped = stopped
        self._uptime_s = uptime_s
        self._lock = threading.Lock()  # over the two below
        self._next_s = self._not_before_s = uptime_s()

    def take(self, cost: int) -> None:
        """Returns when `cost` more is due; Stopped where the run ends before."""
        while True:
            with self._lock:
                now_s = self._uptime_s()
                wait_s = max(self._next_s, self._not_before_s) - now_s
                if wait_s <= 0:
                    self._next_s = max(self._next_s, now_s - CATCH_UP_S) + cost * self._step_s
            if self._stopped.wait(max(wait_s, 0)):
                raise Stopped
            if wait_s <= 0:
                return

    def hold(self, delay_s: float) -> None:
        """Nobody goes on before this time has passed."""
        with self._lock:
            self._not_before_s = max(self._not_before_s, self._uptime_s() + delay_s)


class Enrolling:
    """One run over a list; what becomes of each device is in the journal. DpsError where the run can't go on.

    `connect` opens a connection; each of the run's threads has one, tells `told` how many devices it is done with, and
    `waits` why it has to wait.
    """

    def __init__(
        self,
        plan: Plan,
        journal: Journal,
        connect: Callable[[], Service],
        told: Callable[[int], None],
        waits: Callable[[str], None],
    ) -> None:
        self._plan = plan
        self._journal = journal
        self._connect = connect
        self._told = told
        self._waits = waits
        self._stopped = threading.Event()
        self._pace = Pace(plan.per_minute, self._stopped)
        self._lock = threading.Lock()  # over what follows
        self._services: list[Service] = []
        self._batches: Iterator[list[Entry]] = iter(())
        self._failures = 0  # since a device was done with last
        self._done_s = time.monotonic()  # when that was
        self.requests = 0
        self.throttled = 0

    def run(self, entries: Sequence[Entry]) -> None:
        """Enrols all of them; returns when each is in the journal."""
        of_one_version = [
            [entry for entry in entries if bool(self._plan.policy(entry)) is has_policy] for has_policy in (False, True)
        ]
        self._batches = iter(
            [each[at : at + BULK_LIMIT] for each in of_one_version for at in range(0, len(each), BULK_LIMIT)]
        )
        with ThreadPoolExecutor(self._plan.connections, "dps-enroll") as pool:
            # Each thread ends with the last batch, with its own failure, or when `_stopped` is set.
            threads = [pool.submit(self._work) for _ in range(self._plan.connections)]
            try:
                for thread in threads:
                    thread.result()
            except BaseException:
                self._stop()
                raise
        failures = [error for thread in threads if isinstance(error := thread.exception(), DpsError)]
        if failures:
            raise failures[0]

    def _stop(self) -> None:
        self._stopped.set()
        with self._lock:
            for service in self._services:
                service.abort()

    def _work(self) -> None:
        service = self._connect()
        with self._lock:
            self._services.append(service)
        try:
            while True:
                with self._lock:
                    batch = next(self._batches, None)
                if batch is None:
                    return
                self._enrol(service, batch)
        except Stopped:
            return
        except BaseException:
            self._stop()
            raise
        finally:
            service.close()

    def _enrol(self, service: Service, batch: Sequence[Entry]) -> None:
        """Sends a batch until each of its devices is done with."""
        while batch:
            records = [self._plan.record(entry) for entry in batch]
            reply = self._answer(len(batch), partial(service.bulk, CREATE, records))
            if reply.status != 200:
                if len(batch) == 1:
                    self._write([self._done(batch[0], REFUSED, _said(reply))])
                    return
                for entry in batch:  # one of them may be what the service can't read
                    self._enrol(service, [entry])
                return
            refusals = _refusals(reply)
            if not refusals.keys() <= {entry.registration_id.lower() for entry in batch}:
                raise _malformed(reply, "the answer to a bulk, about what is in it")
            done: list[Done] = []
            there: list[Entry] = []
            again: list[Entry] = []
            for entry in batch:
                code, words = refusals.get(entry.registration_id.lower(), (0, ""))
                status = code // 1000
                if not code:
                    done.append(self._done(entry, CREATED))
                elif status == CONFLICT_STATUS:
                    there.append(entry)
                elif status in _LATER:
                    again.append(entry)
                else:
                    done.append(self._done(entry, REFUSED, f"{code} {words}"))
            self._write(done)
            for entry in there:
                self._write([self._compared(service, entry)])
            if again:
                asked_s = retry_after_s(reply.headers, THROTTLE_LIMIT_S)
                self._put_off(asked_s, f"{len(again)} of {len(batch)} enrolments are to be sent later")
            batch = again

    def _write(self, done: Sequence[Done]) -> None:
        if not done:
            return
        self._journal.add(done)
        self._told(len(done))
        with self._lock:
            self._failures, self._done_s = 0, time.monotonic()

    def _compared(self, service: Service, entry: Entry, once_more: bool = True) -> Done:
        """What becomes of a device whose registration id is enrolled already."""
        policy = self._plan.policy(entry)
        reply = self._answer(1, lambda: service.enrollment(entry.registration_id, bool(policy)))
        if reply.status != 200:
            return self._done(entry, REFUSED, _said(reply))
        try:
            enrolled = from_json(reply.body)
            attestation, etag = enrolled["attestation"], enrolled["etag"]
            key = (attestation.get("tpm") or {}).get("endorsementKey")
        except (ValueError, KeyError, TypeError, AttributeError):
            raise _malformed(reply, "an enrolment") from None
        record = {**self._plan.record(entry), "etag": etag}
        other = "by another key"
        if key == entry.endorsement_key.strip():
            had = enrolled.get(POLICY) or ""
            if policy in ("", had):
                return self._done(entry, PRESENT)
            kept = {name: value for name, value in enrolled.items() if name not in _OF_THE_SERVICE}
            record = {**kept, POLICY: policy, "etag": etag}
            other = f"with the {POLICY} '{had}', and not '{policy}'" if had else f"without the {POLICY} '{policy}'"
        if not self._plan.replace:
            return self._done(entry, CONFLICT, f"this registration id is enrolled {other}")
        status, why = self._replaced(service, record)
        if status == CHANGED_STATUS and once_more:  # perhaps by us, in a request whose answer was lost
            return self._compared(service, entry, once_more=False)
        return self._done(entry, REFUSED, why) if status else self._done(entry, REPLACED)

    def _replaced(self, service: Service, record: Mapping[str, Any]) -> tuple[int, str]:
        """Puts a record in the place of that with its etag; status and words of a refusal, (0, "") for none."""
        while True:
            reply = self._answer(1, lambda: service.bulk(UPDATE_IF_MATCH, [record]))
            if reply.status != 200:
                return reply.status, _said(reply)
            code, words = next(iter(_refusals(reply).values()), (0, ""))
            if code // 1000 not in _LATER:
                return code // 1000, f"{code} {words}"
            asked_s = retry_after_s(reply.headers, THROTTLE_LIMIT_S)
            self._put_off(asked_s, f"an enrolment is to be sent later: {code} {words}")

    def _done(self, entry: Entry, result: str, detail: str = "") -> Done:
        return _done(entry, result, detail)._replace(policy=self._plan.policy(entry))

    def _answer(self, devices: int, ask: Callable[[], Reply | NoReply]) -> Reply:
        """The answer to a request, asked again until there is one that counts; RetryLater after a long time."""
        while True:
            self._pace.take(devices if self._plan.counts_devices else 1)
            reply = ask()
            if self._stopped.is_set():
                raise Stopped
            with self._lock:
                self.requests += 1
                self.throttled += isinstance(reply, Reply) and reply.status in _THROTTLED
            if isinstance(reply, NoReply) and reply.reason.partition(":")[0] == NO_REPLY_TLS:
                raise AskOperator(
                    "network.tls", f"the service is not who it should be ({reply.reason}); --ca-file names other roots"
                )
            if isinstance(reply, NoReply):
                self._put_off(None, f"no answer ({reply.reason})")
            elif reply.status in _NOT_AUTHORIZED:
                raise AskOperator("dps.token_refused", f"the service does not take the credentials: {_said(reply)}")
            elif reply.status in _LATER:
                self._put_off(retry_after_s(reply.headers, THROTTLE_LIMIT_S), _said(reply))
            else:
                return reply

    def _put_off(self, asked_s: int | None, why: str) -> None:
        """Nobody asks before the service wants it, or before our own delay where it named none; RetryLater."""
        with self._lock:
            self._failures += 1
            own_s = min(FIRST_WAIT_S * 2 ** min(self._failures - 1, 10), LONGEST_WAIT_S)
            silent_s = time.monotonic() - self._done_s
        if asked_s is None and silent_s > PATIENCE_S:
            raise RetryLater("dps.unavailable", f"nothing was enrolled for {silent_s:.0f} s: {why}")
        self._waits(why)
        self._pace.hold((own_s if asked_s is None else asked_s) * (1 + 0.1 * random.random()))


def fit_to_send(entries: Sequence[Entry]) -> tuple[list[tuple[Entry, bytes]], list[Done]]:
    """Each device once with its EK's TPM2B_PUBLIC, and those whose key is no endorsement key."""
    fit: dict[str, tuple[Entry, bytes]] = {}
    unfit: list[Done] = []
    for entry in entries:
        try:
            ek = base64.b64decode(entry.endorsement_key.strip(), validate=True)
            check_ek_public(ek)
        except (ValueError, AskOperator) as error:  # ValueError: no base64, or no ASCII
            unfit.append(_done(entry, UNSUITABLE, str(error)))
        else:
            fit.setdefault(entry.registration_id.lower(), (entry, ek))
    return list(fit.values()), unfit


def of_one_key(fit: Sequence[tuple[Entry, bytes]]) -> list[list[str]]:
    """The registration ids of each endorsement key that stands under more than one: a TPM that was read twice.

    DPS takes them, and a device that asks under either id is assigned; whether that is meant only the maker knows.
    """
    ids: dict[bytes, list[str]] = {}
    for entry, ek in fit:
        ids.setdefault(ek, []).append(entry.registration_id)
    return [each for each in ids.values() if len(each) > 1]


def _done(entry: Entry, result: str, detail: str = "") -> Done:
    return Done(entry.registration_id, entry.endorsement_key, result, " ".join(detail.split()))


def _said(reply: Reply) -> str:
    """Why an answer is no success."""
    return refusal_of(reply).message


def _refusals(reply: Reply) -> dict[str, tuple[int, str]]:
    try:
        return refusals_of(reply)
    except (ValueError, KeyError, TypeError):
        raise _malformed(reply, "the answer to a bulk") from None


def _malformed(reply: Reply, wanted: str) -> AskOperator:
    return AskOperator("dps.malformed_answer", f"expected {wanted}; came {reply.body[:200]!r}")
