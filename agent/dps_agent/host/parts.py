"""This device, built from its settings: TPM, store, connection and the runner over them."""

from __future__ import annotations

import contextlib
import os
import threading
import time

from dps_agent import __version__
from dps_agent.assignment import decode
from dps_agent.attestation import load_held
from dps_agent.effects import Http, LoadRecord, NoReply, UtcNow
from dps_agent.host.clock import SystemClock
from dps_agent.host.config import (
    Configuration,
    ConfigurationError,
    check_keys_in_hardware,
    hierarchy_password,
    is_sealed,
    password_file,
    proxy_of,
)
from dps_agent.host.printed import utc_text
from dps_agent.host.provisioned import Provisioned
from dps_agent.host.runner import Runner
from dps_agent.progress import decode_progress
from dps_agent.settings import TPM, X509
from dps_agent.signing import hub_token
from dps_hal.contracts import IDENTITY, PROGRESS
from dps_hal.errors import AskOperator, Broken, DpsError, IdentityStale, RetryLater
from dps_hal.host.state_dir import open_store
from dps_hal.host.tcti import is_ours_alone

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator
    from typing import Any

    from dps_agent.assignment import Assignment
    from dps_agent.effects import Reply
    from dps_agent.host.device_certificates import OpenTpm
    from dps_agent.host.network.https import DpsConnection
    from dps_agent.host.network.mqtt import HubConnection
    from dps_agent.host.network.shown import Shown
    from dps_agent.host.steps import StepLines
    from dps_agent.sas import SasToken
    from dps_hal.contracts import Signer, Store, StoredRecord, TpmService, Utc
    from dps_hal.host.files import LockedStore
    from dps_hal.tpm.ek_certificate import Certified

ROLLED_BACK = "a newer copy of the stored assignment was damaged, an older one serves"
TRANSIENT_SRK = (
    "the TPM has no room to keep the storage root key: it makes the same one anew at each start, which takes seconds"
)


def tpm_warnings(signer: Signer) -> list[str]:
    """What its use has shown so far of a TPM, and somebody may want to change, though all works."""
    named: Any = signer
    tpm: TpmService | None = getattr(named, "tpm", named)  # of a key in a file: the one that has sealed or made it
    warnings: list[str] = list(getattr(signer, "warnings", ()))
    if tpm is None:
        return warnings
    warnings += [TRANSIENT_SRK] if tpm.srk_found_at == 0 else []
    for setting in tpm.unneeded_passwords:
        warnings.append(
            f"{setting} is set, but its hierarchy in the TPM has no password, as after TPM2_Clear: none is used"
        )
    return warnings


def open_tpm(configuration: Configuration) -> TpmService:
    """The TPM that the settings name; it is first touched when it is first used.

    AskOperator `tpm.simulator_refused` for a simulated TPM at Azure's endpoints, `tpm.not_available` where the back
    end's packages are missing.
    """
    check_keys_in_hardware(configuration)
    tpm = configuration.tpm
    if tpm.backend == "simulator":
        from dps_hal.host.simulator import SimulatedTpm

        return SimulatedTpm(tpm.tcti, ek_template=tpm.ek_template)
    settings: dict[str, Any] = {
        "ek_template": tpm.ek_template,
        "ek_handle": tpm.ek_handle,
        "srk_handle": tpm.srk_handle,
        "owner_auth": hierarchy_password("tpm.owner_auth_file", tpm.owner_auth_file),
        "endorsement_auth": hierarchy_password("tpm.endorsement_auth_file", tpm.endorsement_auth_file),
        "exclusive": is_ours_alone(tpm.tcti),
    }
    if tpm.backend == "wire":
        from dps_hal.host.transports import open_wire

        return open_wire(tpm.tcti, **settings)
    from dps_hal.host.esys import EsysTpm

    return EsysTpm(tpm.tcti, **settings)


def open_device(configuration: Configuration) -> Any:
    """What signs for this device: its TPM, a `TpmService`, or a `Signer` with the key that the device was given.

    As `open_tpm`; AskOperator `config.invalid` where the key's file holds none.
    """
    if configuration.certificate:
        from dps_agent.host.issued_keys import OneTpm, WithIssuedKey

        tpm = OneTpm(lambda: open_tpm(configuration))
        return WithIssuedKey(configuration, _of_attestation(configuration, lambda _: tpm()), tpm)
    return _of_attestation(configuration, open_tpm)


def _of_attestation(configuration: Configuration, open_tpm: OpenTpm) -> Any:
    if configuration.attestation == TPM:
        return open_tpm(configuration)
    if configuration.attestation == X509:
        from dps_agent.host.device_certificates import CertificateSigner

        by_certificate = CertificateSigner(configuration, open_tpm)
        by_certificate.open()
        return by_certificate
    from dps_agent.host.device_keys import FileSigner

    signer = FileSigner(configuration, lambda: open_tpm(configuration))
    signer.open()
    return signer


def client_certificate(configuration: Configuration) -> Shown | None:
    """What shows DPS and the hub who this device is; None where no certificate does.

    ConfigurationError where there is no TPM to have its key.
    """
    if configuration.attestation != X509:
        return None
    from dps_agent.host.device_certificates import KEY_SETTING
    from dps_agent.host.network.shown import Shown

    key_file = password_file(configuration.device_key_file, os.environ)[0]
    tpm = configuration.tpm
    in_tpm = is_sealed(configuration)
    if in_tpm and tpm.backend == "simulator":
        text = f'{KEY_SETTING}: expected a key in a file, with tpm.backend = "simulator"; a TPM has that in {key_file}'
        raise ConfigurationError("config.invalid", [text])
    tcti = tpm.tcti if in_tpm else ""
    return Shown(configuration.certificate_file, key_file, tcti, lambda: open_tpm(configuration), KEY_SETTING)


def issued_certificate(configuration: Configuration) -> Shown | None:
    """What shows the hub who this device is where DPS issues the certificate, whose chain is in a record."""
    if not configuration.certificate:
        return None
    from dps_agent.host.issued_keys import SETTING
    from dps_agent.host.network.shown import Shown

    tpm = configuration.tpm
    tcti = tpm.tcti if tpm.backend != "simulator" else ""
    return Shown("", configuration.issued_key_path, tcti, lambda: open_tpm(configuration), SETTING)


def dps_connection(configuration: Configuration) -> DpsConnection:
    """The connection to the endpoint, not yet opened."""
    from dps_agent.host.network.https import DpsConnection

    return DpsConnection(
        configuration.endpoint,
        configuration.connect_to,
        configuration.ca_file,
        user_agent=f"dps-agent/{__version__}",
        proxy=proxy_of(configuration),
        certificate=client_certificate(configuration),
    )


def clock_for(store: Store) -> SystemClock:
    """The system's clock, with what the last run believed."""
    try:
        stored = store.load(PROGRESS)
    except DpsError:
        stored = None  # expendable; what ails the store shows when the identity is loaded
    progress = decode_progress(stored.payload) if stored is not None else None
    return SystemClock(progress.last_believed_s if progress is not None else 0)


def hub_connection(configuration: Configuration) -> HubConnection:
    """The connection to whichever hub is assigned, not yet opened."""
    from dps_agent.host.network.mqtt import HubConnection

    hub = configuration.hub
    return HubConnection(
        connect_to=hub.connect_to,
        ca_file=hub.ca_file,
        transport=hub.transport,
        proxy=proxy_of(configuration),
        certificate=client_certificate(configuration) if not configuration.certificate else None,
        issued=issued_certificate(configuration),
    )


def provision_once(
    configuration: Configuration,
    *,
    force: bool = False,
    timeout_s: float | None = None,
    steps: StepLines | None = None,
    with_signals: bool = False,
) -> Provisioned:
    """One registration, unless the stored assignment holds and `force` is off; see `dps_agent.host.provision`.

    `steps` is told of each step. `with_signals` ends it cleanly at SIGTERM and SIGINT; for the main thread only.
    """
    from dps_agent.host import kept_key
    from dps_agent.lifecycle import PROVISIONED, Lifecycle

    started_s = time.monotonic()
    settings = configuration.settings()
    if timeout_s is not None:
        budget_s = max(1, min(settings.registration_budget_s, int(timeout_s)))
        settings = settings._replace(registration_budget_s=budget_s)
    tpm = open_device(configuration)
    store = open_store(configuration.state_dir)
    clock = clock_for(store)

    waits = [""]  # the reason of the last one

    def on_wait(reason: str, until_uptime_s: float) -> None:
        waits[0] = reason
        if steps is not None:
            steps.wait(reason, until_uptime_s - clock.uptime_s(), settings.registration_budget_s)

    runner = Runner(
        tpm=tpm,
        store=store,
        connection=dps_connection(configuration),
        clock=clock,
        observe=steps.observe if steps is not None else None,
        on_wait=on_wait,
    )
    if with_signals:
        runner.install_signals()
    handle = configuration.tpm.persist_at
    life = Lifecycle(settings, beside=lambda: kept_key.entry(tpm, handle))
    with kept_to_ourselves(store), _stopped_after(runner, timeout_s, waits, unless=lambda: life.committed):
        runner.run(life.live(once=True, force=force))
    assignment = life.assignment
    if assignment is None or not (life.committed or life.state == PROVISIONED):
        error = life.error or RetryLater("agent.waiting", life.reason)
        if isinstance(error, RetryLater) and error.retry_after_s is None:
            error.retry_after_s = life.next_attempt_in_s
        raise error
    warnings = []
    if life.rolled_back:
        warnings.append(ROLLED_BACK)
    if handle:
        try:
            runner.run(kept_key.persist(tpm, handle))
        except DpsError as error:
            warnings.append(f"the hub key is not at persist_at {handle:#x}: {error.message}")
    warnings += tpm_warnings(tpm)
    return Provisioned(
        assigned_hub=assignment.assigned_hub,
        device_id=assignment.device_id,
        registration_id=assignment.registration_id,
        substatus=assignment.substatus,
        already_provisioned=not life.committed,
        backend=configuration.backend,
        payload=assignment.payload,
        payload_omitted=assignment.payload_omitted,
        duration_s=round(time.monotonic() - started_s, 3),
        warnings=tuple(warnings),
    )


@contextlib.contextmanager
def kept_to_ourselves(store: LockedStore) -> Iterator[None]:
    """Keeps other processes from registering meanwhile; without a lock where this one may not write anyway."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(AskOperator):  # an assignment that holds needs no writing; else the commit says it
            stack.enter_context(store.exclusive())
        yield


def endorsement(configuration: Configuration) -> tuple[bytes, Certified]:
    """The TPM's endorsement key, marshalled, and what the TPM says of its certificate."""
    from dps_hal.tpm.ek_certificate import certified

    tpm = open_tpm(configuration)
    runner = offline_runner(configuration, tpm)

    def both() -> tuple[bytes, Certified]:
        endorsement_key = tpm.endorsement_key()
        return endorsement_key, certified(tpm, endorsement_key)

    return runner.ask_tpm(both)


def offline_runner(configuration: Configuration, tpm: Signer) -> Runner:
    """A runner on this device's TPM and store, without any network."""
    return Runner(tpm=tpm, store=open_store(configuration.state_dir), connection=NoConnection(), clock=SystemClock())


def hub_token_once(configuration: Configuration, life_s: int) -> tuple[Assignment, SasToken]:
    """The assignment that holds and a token for its hub; see `dps_agent.host.hub_token`.

    The network is used only where nobody keeps the system's clock: DPS is asked what time it is.
    """
    settings = configuration.settings()

    def exchange() -> Generator[Any, Any, tuple[Assignment, SasToken]]:
        stored: StoredRecord | None = yield LoadRecord(IDENTITY)
        if stored is None:
            raise AskOperator("record.absent", f"there is no assignment in {configuration.state_dir}")
        decode(stored.payload)  # a damaged one has a code of its own
        assignment, reason = yield from load_held(settings, stored)
        if assignment is None:
            raise IdentityStale("record.stale", reason)
        now: Utc = yield UtcNow()
        if not now.believable:
            date: Reply | NoReply = yield Http("GET", "/", b"", None)
            now = yield UtcNow()
            if not now.believable:
                raise RetryLater("clock.not_set", _unconfirmed(now.now_s, date))
        token = yield from hub_token(assignment, life_s)
        return assignment, token

    store = open_store(configuration.state_dir)
    clock = clock_for(store)
    connection = NoConnection() if clock.utc().believable else dps_connection(configuration)
    return Runner(tpm=open_device(configuration), store=store, connection=connection, clock=clock).run(exchange())


def _unconfirmed(now_s: int, date: Reply | NoReply) -> str:
    """What is said of a clock that nobody keeps, and that DPS's answer has not confirmed."""
    why = f"DPS could not be asked: {date.reason}" if isinstance(date, NoReply) else "DPS's answer did not confirm it"
    return f"the clock is not set, or nobody keeps it: it says {utc_text(now_s)}, and {why}"


@contextlib.contextmanager
def _stopped_after(
    runner: Runner, timeout_s: float | None, waits: list[str], unless: Callable[[], bool]
) -> Iterator[None]:
    """Stops the runner after `timeout_s` seconds, None for never; its interruption is then an end of time.

    That says why it waited last, which `waits` has. An interruption is none where `unless` says that all
    that counts was done before.
    """
    out_of_time = threading.Event()

    def stop() -> None:
        out_of_time.set()
        runner.stop()

    timer = threading.Timer(timeout_s or 0, stop)
    timer.daemon = True
    if timeout_s is not None:
        timer.start()
    try:
        yield
    except RetryLater as error:
        if error.code != "agent.interrupted":
            raise
        if unless():
            return
        if out_of_time.is_set():
            last = f"; the last wait was for: {waits[0]}" if waits[0] else ""
            raise RetryLater("agent.out_of_time", f"not finished within {timeout_s:g} s{last}") from None
        raise
    finally:
        timer.cancel()


def remote_status(configuration: Configuration, *, service_allows: bool) -> dict[str, Any]:
    """What DPS has on record for this device, beside the stored assignment; see `dps_agent.host.remote`.

    RetryLater `store.locked` while a registration runs, or a service that was not asked whether it allows it.
    """
    from dps_agent.host.remote import look_up, look_up_document

    settings = configuration.settings()
    store = open_store(configuration.state_dir)
    runner = Runner(
        tpm=open_device(configuration), store=store, connection=dps_connection(configuration), clock=clock_for(store)
    )
    runner.install_signals()
    with contextlib.nullcontext() if service_allows else kept_to_ourselves(store):
        stored = store.load(IDENTITY)
        held = None
        if stored is not None:
            with contextlib.suppress(IdentityStale):  # damaged: there is nothing to compare with
                held = decode(stored.payload)[0]
        return look_up_document(runner.run(look_up(settings)), held)


class NoConnection:
    """For an exchange that asks for no HTTP: TLS is not even imported."""

    def request(self, method: str, path: str, body: bytes, authorization: SasToken | None) -> Any:
        raise Broken("agent.bug", f"an exchange without a network asked for {method}")

    def abort(self) -> None:
        """Nothing is under way."""

    def close(self) -> None:
        """Nothing is open."""
