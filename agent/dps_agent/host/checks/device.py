"""The device that the checks look at."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

from dps_agent.assignment import decode
from dps_agent.effects import LoadRecord, Sign
from dps_agent.host.config import Configuration, is_sealed, issued_key_is_in_tpm
from dps_agent.host.local.statefile import read_live
from dps_agent.host.loop import Loop
from dps_agent.host.parts import offline_runner, open_device, open_tpm
from dps_agent.host.runner import STORE_DEADLINE_S, Runner, tpm_grace_s
from dps_agent.host.worker import ABORT_GRACE_S, Worker, required
from dps_agent.settings import AUTO, SYMMETRIC_KEY, TPM
from dps_hal.contracts import IDENTITY
from dps_hal.tpm.keys import registration_id_from_ek

if TYPE_CHECKING:
    from dps_agent.assignment import Assignment
    from dps_agent.effects import Effect
    from dps_agent.host.checks.ways import Network
    from dps_agent.host.network.https import DpsConnection
    from dps_hal.contracts import StoredRecord, TpmCondition, TpmService

    Answer = TypeVar("Answer")


class Device:
    """This device as the checks see it: each part is looked at when it is first asked for, and once."""

    def __init__(self, load_settings: Callable[[], Configuration]) -> None:
        self._load_settings = load_settings
        self._runner: Runner | None = None  # on the TPM
        self._own: Runner | None = None  # on what signs for the device, where that is another
        self._worker_hangs = False

    @cached_property
    def configuration(self) -> Configuration:
        """The settings, an ID scope not being needed."""
        return self._load_settings()

    @property
    def uses_tpm(self) -> bool:
        """Whether a TPM is who it is, or keeps its key."""
        if self.configuration.attestation == TPM:
            return True
        return is_sealed(self.configuration) or (
            bool(self.configuration.certificate) and issued_key_is_in_tpm(self.configuration)
        )

    @property
    def needs_endorsement_key(self) -> bool:
        """Whether its endorsement key is who it is, or has let the TPM seal its key: what it made needs none."""
        configuration = self.configuration
        return configuration.attestation == TPM or (
            configuration.attestation == SYMMETRIC_KEY and is_sealed(configuration)
        )

    @cached_property
    def tpm(self) -> TpmService:
        """The TPM that they name, not touched yet."""
        return open_tpm(self.configuration)

    @cached_property
    def condition(self) -> TpmCondition:
        """Its condition at the first answer."""
        return self.ask(lambda tpm: tpm.condition())

    @cached_property
    def endorsement_key(self) -> bytes:
        """The EK's TPM2B_PUBLIC; created where it is missing."""
        return self.ask(lambda tpm: tpm.endorsement_key())

    @cached_property
    def storage_root_key(self) -> bytes:
        """The SRK's TPM2B_PUBLIC; created where it is missing."""
        return self.ask(lambda tpm: tpm.storage_root_key())

    @cached_property
    def registration_id(self) -> str:
        """The one of the settings, else the EK's own."""
        named = self.configuration.registration_id
        if self.configuration.attestation == SYMMETRIC_KEY:
            return named.lower()
        if self.configuration.attestation != TPM:
            return named
        return registration_id_from_ek(self.endorsement_key) if named == AUTO else named

    @cached_property
    def stored(self) -> StoredRecord | None:
        """The record with the assignment."""

        def load() -> Generator[Effect, Any, StoredRecord | None]:
            stored: StoredRecord | None = yield LoadRecord(IDENTITY)
            return stored

        return self.run(load())

    @cached_property
    def assignment(self) -> Assignment | None:
        """The stored assignment, whether it holds or not; IdentityStale `record.damaged` where it is none."""
        return None if self.stored is None else decode(self.stored.payload)[0]

    @cached_property
    def live(self) -> dict[str, Any] | None:
        """What the service that runs with the same state folder says of itself; None where none runs."""
        return read_live(self.configuration)

    @cached_property
    def network(self) -> Network:
        """The ways to DPS and to the hub."""
        from dps_agent.host.checks.ways import Network

        return Network(self.configuration)

    @property
    def hangs(self) -> bool:
        """Whether an earlier call did not end: nothing more can be asked then."""
        return self._worker_hangs or any(runner.stuck for runner in (self._runner, self._own) if runner is not None)

    def ask(self, call: Callable[[TpmService], Answer]) -> Answer:
        """One call of the TPM, with the runner's deadlines; the TPM is released behind it."""
        tpm = self.tpm
        return self._running().ask_tpm(lambda: call(tpm))

    def run(self, exchange: Generator[Effect, Any, Answer]) -> Answer:
        """An exchange with what signs for the device and the store, without any network."""
        if self.configuration.attestation == TPM and not self.configuration.certificate:
            return self._running().run(exchange)
        return self._signing().run(exchange)

    def try_issued_key(self) -> None:
        """Has a TPM sign with the key of the certificate that DPS issues, if it has made that; as `ask`."""
        self._signing().ask_tpm(self._signer.try_key)

    def signature(self, message: bytes) -> bytes:
        """`message` signed by the device's own key."""

        def sign() -> Generator[Effect, Any, bytes]:
            signature: bytes = yield Sign(b"", message)
            return signature

        return self.run(sign())

    def bounded(self, request: Callable[[], Answer], limit_s: float, connection: DpsConnection) -> Answer:
        """What a request says that waits for the TPM as well; RetryLater `tpm.timeout` where that does not answer."""
        limit_s += ABORT_GRACE_S
        with self._worker(connection.abort) as worker:
            answer: Answer = worker.do_or_abort(
                request, limit_s, connection.abort, "the request", tpm_grace_s=lambda: tpm_grace_s(connection)
            ).answer
        return answer

    def write(self, call: Callable[[], None]) -> None:
        """A call that writes to the disk, with the runner's deadline for that."""
        with self._worker() as worker:
            required(worker.do(call, STORE_DEADLINE_S, "store.io"))

    @contextmanager
    def _worker(self, *aborts: Callable[[], None]) -> Iterator[Worker]:
        """A worker for one call, which the `aborts` end where Ctrl-C came."""
        worker = Worker(None, Loop())
        try:
            yield worker
        finally:
            worker.settle(*aborts)
            self._worker_hangs |= worker.stuck
            worker.end()

    @cached_property
    def _signer(self) -> Any:
        """What signs for the device."""
        return open_device(self.configuration)

    def _signing(self) -> Runner:
        if self._own is None:
            self._own = offline_runner(self.configuration, self._signer)
        return self._own

    def _running(self) -> Runner:
        if self._runner is None:
            self._runner = offline_runner(self.configuration, self.tpm)
        return self._runner
