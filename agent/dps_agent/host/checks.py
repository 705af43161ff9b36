"""What `dps-agent check` looks at, one small check after the other; all of it without the network.

A check never stops the ones behind it, but for those that need what it did not find. Nothing is left behind but what
a registration leaves too: endorsement key and storage root key are created where they are missing.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable, Collection, Generator, Sequence
from dataclasses import dataclass
from functools import cached_property
from glob import glob
from typing import TYPE_CHECKING, Any, TypeVar

from dps_agent.assignment import decode
from dps_agent.effects import LoadRecord
from dps_agent.host.config import Configuration, ConfigurationError, check_files
from dps_agent.host.device import TRANSIENT_SRK, offline_runner, open_tpm
from dps_hal import ek_certificate
from dps_hal.codes import REMEDIES
from dps_hal.contracts import IDENTITY
from dps_hal.errors import AskOperator, DpsError, RetryLater
from dps_hal.platform import hmac_sha256, random_bytes, same_bytes
from dps_hal.self_challenge import make_activation
from dps_hal.tpm_keys import has_no_da, object_name, registration_id_from_ek

if TYPE_CHECKING:
    from dps_agent.effects import Effect
    from dps_agent.host.runner import Runner
    from dps_hal.contracts import StoredRecord, TpmCondition, TpmService

    Answer = TypeVar("Answer")

OK = "ok"
WARNING = "warning"
FAILED = "failed"
SKIPPED = "skipped"

SLOTS_NEEDED = 2  # EK and SRK for ActivateCredential, SRK and key for Load, key and sequence for a long message
_NO_PASSWORD_NEEDED = "empty the setting: a password where none is set is refused"


@dataclass(frozen=True)
class Finding:
    """What came of one check: OK, WARNING, FAILED or SKIPPED, what was seen, what to do; `error` where it failed."""

    result: str
    detail: str
    remedy: str = ""
    error: DpsError | None = None


@dataclass(frozen=True)
class Check:
    """One check: its stable id, what it makes sure of as a sentence, the checks without which it has no sense."""

    id: str
    description: str
    needs: tuple[str, ...]
    run: Callable[[Device], Finding]


class Device:
    """This device as the checks see it: each part is looked at when it is first asked for, and once."""

    def __init__(self, load_settings: Callable[[], Configuration]) -> None:
        self._load_settings = load_settings
        self._runner: Runner | None = None

    @cached_property
    def configuration(self) -> Configuration:
        """The settings, an ID scope not being needed."""
        return self._load_settings()

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

    @property
    def hangs(self) -> bool:
        """Whether an earlier call did not end: nothing more can be asked then."""
        return self._runner is not None and self._runner.stuck

    def ask(self, call: Callable[[TpmService], Answer]) -> Answer:
        """One call of the TPM, with the runner's deadlines; the TPM is released behind it."""
        tpm = self.tpm
        return self._running().ask_tpm(lambda: call(tpm))

    def stored_hub_key(self) -> bytes | None:
        """The hub key in the stored assignment, wrapped; None where there is no assignment."""

        def exchange() -> Generator[Effect, Any, bytes | None]:
            stored: StoredRecord | None = yield LoadRecord(IDENTITY)
            return None if stored is None else decode(stored.payload)[0].wrapped_key

        return self._running().run(exchange())

    def _running(self) -> Runner:
        if self._runner is None:
            self._runner = offline_runner(self.configuration, self.tpm)
        return self._runner


def run_checks(device: Device, only: Collection[str] = ()) -> list[tuple[Check, Finding]]:
    """Runs all checks, or those of `only` and what they need, in their order."""
    wanted = set(only) or {check.id for check in CHECKS}
    for check in reversed(CHECKS):  # what a check needs comes before it
        if check.id in wanted:
            wanted.update(check.needs)
    findings: dict[str, Finding] = {}
    for check in CHECKS:
        if check.id in wanted:
            findings[check.id] = _run(check, device, findings)
    return [(check, findings[check.id]) for check in CHECKS if check.id in findings]


def _run(check: Check, device: Device, findings: dict[str, Finding]) -> Finding:
    missing = [need for need in check.needs if findings[need].result in (FAILED, SKIPPED)]
    if missing:
        return Finding(SKIPPED, f"not possible without {missing[0]}")
    if device.hangs:
        return Finding(SKIPPED, "not possible: an earlier check still hangs")
    try:
        return check.run(device)
    except DpsError as error:
        return _failed(error)


def _failed(error: DpsError, remedy: str = "") -> Finding:
    detail = "; ".join(error.problems) if isinstance(error, ConfigurationError) else error.message
    return Finding(FAILED, detail, remedy or REMEDIES.get(error.code, ""), error)


# --- the checks


def _settings(device: Device) -> Finding:
    configuration = device.configuration
    check_files(configuration)
    detail = ", ".join(configuration.files) or "no file, defaults only"
    if not configuration.id_scope:
        return Finding(WARNING, f"{detail}; id_scope is not set", "set id_scope before 'dps-agent provision'")
    return Finding(OK, detail)


def _tpm_node(device: Device) -> Finding:
    tpm = device.configuration.tpm
    _ = device.tpm  # says so where the back end's packages are missing; nothing is opened
    if tpm.backend == "simulator":
        return Finding(WARNING, f"simulator: keys lie in plain files in {tpm.tcti}", "use a hardware TPM")
    kind, _, path = tpm.tcti.partition(":")
    if kind != "device" or not path:
        return Finding(OK, f"{tpm.tcti} is no device node of this machine")
    try:
        is_node = stat.S_ISCHR(os.stat(path).st_mode)
    except OSError as error:
        others = ", ".join(sorted(glob("/dev/tpm*[0-9]"))) or "none"
        raise AskOperator("tpm.absent", f"no TPM at {path}: {error.strerror}; TPMs in /dev: {others}") from None
    if not is_node:
        raise AskOperator("tpm.absent", f"expected a TPM's device node at {path}; came a file or folder")
    managed = path.replace("/dev/tpm", "/dev/tpmrm")
    if path.startswith("/dev/tpm") and not path.startswith("/dev/tpmrm") and os.path.exists(managed):
        return Finding(
            WARNING, f"{path} is there, but has no resource manager", f'set tcti = "device:{managed}" in [tpm]'
        )
    return Finding(OK, f"{path} is there")


def _tpm_access(device: Device) -> Finding:
    condition = device.condition
    return Finding(OK, f"the TPM answers: maker {condition.maker}, firmware {condition.firmware}")


def _tpm_auth(device: Device) -> Finding:
    condition, tpm = device.condition, device.configuration.tpm
    if condition.endorsement_has_password and not tpm.endorsement_auth_file:
        raise AskOperator(
            "tpm.hierarchy_auth",
            "the endorsement hierarchy has a password, which every registration needs; endorsement_auth_file is empty",
        )
    if tpm.endorsement_auth_file and not condition.endorsement_has_password:
        error = AskOperator(
            "tpm.hierarchy_auth", "endorsement_auth_file is set, but the endorsement hierarchy has no password"
        )
        return _failed(error, _NO_PASSWORD_NEEDED)
    if tpm.owner_auth_file and not condition.owner_has_password:
        return Finding(WARNING, "owner_auth_file is set, but the owner hierarchy has no password", _NO_PASSWORD_NEEDED)
    if tpm.owner_auth_file or tpm.endorsement_auth_file:
        try:
            device.ask(lambda tpm: tpm.try_passwords())
        except AskOperator as error:
            if error.code != "tpm.hierarchy_auth":
                raise
            counted = f"{error.message}; it was tried once, and the TPM counts a wrong one of these towards no lockout"
            return _failed(AskOperator(error.code, counted))
    if condition.owner_has_password and not tpm.owner_auth_file:
        return Finding(
            WARNING,
            "the owner hierarchy has a password and owner_auth_file is empty: no key can be made persistent",
            "set owner_auth_file in [tpm] until the endorsement and storage root keys exist, and for persist_at",
        )
    if condition.endorsement_has_password or condition.owner_has_password:
        return Finding(OK, "each hierarchy that has a password takes the one in the settings")
    return Finding(OK, "neither owner nor endorsement hierarchy has a password")


def _tpm_ek(device: Device) -> Finding:
    handle = device.configuration.tpm.ek_handle
    return Finding(OK, f"at {handle:#x}; its registration id is {registration_id_from_ek(device.endorsement_key)}")


def _tpm_srk(device: Device) -> Finding:
    name = f"its name is {object_name(device.storage_root_key).hex()}"
    found_at, wanted_at = device.tpm.srk_found_at, device.configuration.tpm.srk_handle
    if found_at == 0:
        return Finding(WARNING, f"{TRANSIENT_SRK}; {name}", REMEDIES["tpm.nv_full"])
    if found_at is None:
        return Finding(OK, name)
    taken = "" if found_at == wanted_at else f", as another program's key is at {wanted_at:#x}"
    return Finding(OK, f"at {found_at:#x}{taken}; {name}")


def _tpm_certificate(device: Device) -> Finding:
    try:
        certificate = device.ask(lambda tpm: tpm.endorsement_certificate())
    except AskOperator as error:  # it says nothing about whether this TPM can register
        return Finding(WARNING, f"unreadable: {error.message}", REMEDIES.get(error.code, ""))
    verdict = ek_certificate.compare(certificate, device.endorsement_key)
    template = device.configuration.tpm.ek_template
    if verdict == ek_certificate.MATCH:
        if template == "tcg-l1":
            return Finding(OK, "match: this endorsement key is of the template tcg-l1")
        return Finding(
            WARNING,
            f"match: this endorsement key is of the template tcg-l1, though ek_template is {template}",
            "set ek_template to tcg-l1, or ek_handle to the handle of the other key",
        )
    if verdict == ek_certificate.MISMATCH:
        if template == "azure-c-sdk":
            return Finding(OK, "mismatch: it is for the template tcg-l1, and ek_template is azure-c-sdk")
        return Finding(
            WARNING,
            "mismatch: the certificate names another key than this endorsement key",
            'the key at ek_handle is of another template: set ek_template = "azure-c-sdk" if it is enrolled as it is,'
            " else another ek_handle",
        )
    if verdict == ek_certificate.ABSENT:
        return Finding(OK, "absent: the TPM holds none, and none is needed to register")
    return Finding(
        WARNING,
        "unreadable: what the TPM holds is no X.509 certificate of an RSA key",
        "ask the TPM's manufacturer",
    )


def _tpm_self_challenge(device: Device) -> Finding:
    key, message = random_bytes(32), random_bytes(32)
    activation = make_activation(device.endorsement_key, device.storage_root_key, key)
    started_s = time.monotonic()
    try:
        signature = device.ask(lambda tpm: tpm.sign(tpm.import_key(activation), message))
    except DpsError as error:
        if error.code != "tpm.blob_refused":
            raise
        return _failed(error, "the TPM does not hold the keys that it shows: power-cycle it, look for an interposer")
    if not same_bytes(signature, hmac_sha256(key, message)):
        wrong = AskOperator("tpm.failed", "the TPM signed, but not with the key that it was given")
        return _failed(wrong, "power-cycle the device, replace the TPM if it repeats")
    return Finding(OK, f"the TPM took a key made for it and signed with it, in {time.monotonic() - started_s:.2f} s")


def _tpm_slots(device: Device) -> Finding:
    free = device.condition.free_slots
    if free < SLOTS_NEEDED:
        raise RetryLater("tpm.memory", f"expected {SLOTS_NEEDED} free transient slots; came {free}")
    return Finding(OK, f"{free} transient slots are free, {SLOTS_NEEDED} are needed")


def _tpm_lockout(device: Device) -> Finding:
    counted = _failures_counted(device.condition)
    if _is_at_the_brink(device.condition):
        return Finding(
            WARNING, f"{counted}: keys without noDA are not used now, others are", REMEDIES["tpm.locked_out"]
        )
    return Finding(OK, counted)


def _tpm_noda(device: Device) -> Finding:
    try:
        wrapped_key = device.stored_hub_key()
    except DpsError as error:
        return Finding(SKIPPED, f"the stored assignment cannot be read: {error.message}", REMEDIES.get(error.code, ""))
    if wrapped_key is None:
        return Finding(SKIPPED, "no assignment is stored")
    if has_no_da(wrapped_key):
        return Finding(OK, "the stored hub key has noDA: no power cut counts as a failed guess")
    if _is_at_the_brink(device.condition):
        counted = _failures_counted(device.condition)
        wait_s = device.condition.recovery_s
        raise RetryLater("tpm.locked_out", f"the stored hub key has no noDA and cannot be used now: {counted}", wait_s)
    return Finding(
        WARNING,
        "the stored hub key has no noDA: a power cut while it is in use counts as a failed guess",
        "nothing has to be done: the agent announces each power-off that it knows of, and waits before a lockout",
    )


def _failures_counted(condition: TpmCondition) -> str:
    return (
        f"{condition.lockout_counter} of {condition.lockout_maximum} failures counted,"
        f" one is forgotten every {condition.recovery_s} s"
    )


def _is_at_the_brink(condition: TpmCondition) -> bool:
    return 0 < condition.lockout_counter >= condition.lockout_maximum - 1


CHECKS: Sequence[Check] = (
    Check("settings", "The settings and the files that they name can be used.", (), _settings),
    Check("tpm-node", "The TPM that the settings name exists.", ("settings",), _tpm_node),
    Check("tpm-access", "This user may use the TPM, and it answers.", ("tpm-node",), _tpm_access),
    Check("tpm-auth", "The hierarchies that have a password have one in the settings.", ("tpm-access",), _tpm_auth),
    Check("tpm-ek", "The endorsement key is one of the TCG template.", ("tpm-access",), _tpm_ek),
    Check("tpm-srk", "The storage root key is one of the TCG template.", ("tpm-ek",), _tpm_srk),
    Check("tpm-certificate", "The certificate in the TPM names the endorsement key.", ("tpm-ek",), _tpm_certificate),
    Check(
        "tpm-self-challenge",
        "The TPM answers a challenge as the service makes it.",
        ("tpm-ek", "tpm-srk"),
        _tpm_self_challenge,
    ),
    Check("tpm-slots", "The TPM has room for what a registration loads.", ("tpm-access",), _tpm_slots),
    Check("tpm-lockout", "The TPM is not about to lock out.", ("tpm-access",), _tpm_lockout),
    Check("tpm-noda", "The stored hub key cannot lock the TPM out.", ("tpm-node",), _tpm_noda),
)
