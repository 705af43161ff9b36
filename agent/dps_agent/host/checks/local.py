"""The checks of settings, state folder, clock and stored assignment; neither TPM nor network but for the seal."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from dps_agent.assignment import difference
from dps_agent.attestation import load_held
from dps_agent.host.checks.finding import NOTHING_STORED, OK, SKIPPED, WARNING, Finding, failed
from dps_agent.host.clock import SystemClock, is_synchronised
from dps_agent.host.config import (
    NO_ID_SCOPE,
    backend_shown,
    check_files,
    is_sealed,
    issued_key_is_in_tpm,
    odd_passwords,
    readable_proxy_passwords,
)
from dps_agent.host.printed import utc_text
from dps_agent.settings import SYMMETRIC_KEY, TPM, X509
from dps_hal.contracts import IDENTITY, PROGRESS
from dps_hal.errors import AskOperator, IdentityStale, RetryLater
from dps_hal.host.codes import REMEDIES
from dps_hal.host.files import FileSlots, StateFolder, SystemCalls
from dps_hal.host.mounts import doubt
from dps_hal.host.state_dir import open_store

if TYPE_CHECKING:
    from dps_agent.host.checks.device import Device
    from dps_hal.contracts import TpmService

SCRATCH_NAME = ".dps-agent-check"
_SCRATCH = b"dps-agent check\n" * 256  # as many bytes as one slot has


def used_settings(device: Device) -> Finding:
    configuration = device.configuration
    check_files(configuration)
    detail = ", ".join(configuration.files) or "no file, defaults only"
    if not configuration.id_scope:
        return Finding(WARNING, f"{NO_ID_SCOPE} ({detail})", configuration.id_scope_remedy, comes_first=True)
    if odd := odd_passwords(configuration):
        remedy = "nothing, where that belongs to the password; else write the file again, for example with printf"
        return Finding(WARNING, "; ".join([detail, *odd]), remedy)
    if readable := readable_proxy_passwords(configuration):
        remedy = "move the proxy's URL into a file of mode 0600, name that in proxy_file, and change the password"
        return Finding(WARNING, "; ".join([detail, *readable]), remedy)
    return Finding(OK, detail)


def state_folder(device: Device) -> Finding:
    path = device.configuration.state_dir
    if path.startswith("/dev/mtd"):
        open_store(path).load(IDENTITY)
        return Finding(OK, f"{path} can be read; flash is not written for a test")
    folder = StateFolder(path, SystemCalls())
    place = _nearest(folder)
    try:
        device.write(lambda: _write_scratch(folder, place))
    except RetryLater as error:
        if error.code == "store.full" and _has_room(folder):
            detail = f"{error.message}; the records have their room already and can still be written"
            return Finding(WARNING, detail, REMEDIES[error.code])
        raise
    detail = f"{place} takes what is written, and syncs it"
    if place != folder.path:
        detail = f"{folder.path} is made by the first registration; {place} takes it: a file was synced there"
    if doubted := doubt(place):
        return Finding(
            WARNING, f"{detail}; {doubted}", "let state_dir name a folder on a disk or flash of this machine"
        )
    return Finding(OK, detail)


def _nearest(folder: StateFolder) -> str:
    """The folder's path, or the nearest above it at which there is anything, be it no folder or a link to nowhere."""
    path = folder.path
    with folder.reporting("look at", path):
        while True:
            try:
                os.lstat(path)
            except FileNotFoundError:
                path = os.path.dirname(path)
            else:
                return path


def _write_scratch(folder: StateFolder, place: str) -> None:
    """Writes a file of a slot's size in `place`, syncs it and its name, reads it back, and removes it."""
    path = os.path.join(place, SCRATCH_NAME)
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with folder.reporting("write", path):
        with suppress(FileNotFoundError):
            os.unlink(path)  # a check that was killed has left it
        try:
            with open(os.open(path, flags, 0o600), "r+b", buffering=0) as file:
                written = 0
                while written < len(_SCRATCH):
                    written += file.write(_SCRATCH[written:]) or 0
                with folder.reporting("sync", path):
                    os.fsync(file.fileno())
                with folder.reporting("lock", path):
                    folder.calls.flock(file.fileno())
                file.seek(0)
                if file.read(len(_SCRATCH)) != _SCRATCH:
                    raise RetryLater("store.io", f"{path} was written and read back differently")
        finally:
            with suppress(FileNotFoundError):
                os.unlink(path)
        folder.sync_folder(place)


def _has_room(folder: StateFolder) -> bool:
    """Whether every record's files have their whole size, so that no write needs a new block."""
    sizes = [
        os.path.getsize(path)
        for record in (IDENTITY, PROGRESS)
        for slot in (0, 1)
        if os.path.isfile(path := os.path.join(folder.path, f"{record}.{slot}"))
    ]
    return len(sizes) == 4 and min(sizes) >= FileSlots.slot_bytes


def clock(_device: Device) -> Finding:
    own = SystemClock()
    shown = utc_text(own.utc().now_s) or "1970-01-01T00:00:00Z"
    if not own.may_judge():
        raise RetryLater("clock.not_set", f"the device's clock says {shown}, which cannot be: it was never set")
    if is_synchronised():
        return Finding(OK, f"{shown}, believed because NTP keeps it")
    return Finding(OK, f"{shown}, believed once a verified server confirms it; nothing such as NTP is known to keep it")


def record(device: Device) -> Finding:
    stored = device.stored
    if stored is None:
        return Finding(SKIPPED, NOTHING_STORED)
    try:
        assignment = device.assignment
    except IdentityStale as error:
        return Finding(WARNING, error.message, REMEDIES[error.code])
    assert assignment is not None
    age_s = time.time() - assignment.assigned_at_s
    detail = f"generation {stored.generation}, assigned to {assignment.assigned_hub} {_age(age_s)} ago"
    if stored.rolled_back:
        return Finding(
            WARNING,
            f"{detail}; a newer copy was damaged, an older one serves",
            "nothing, if power was cut while it was written; else check the disk or flash",
        )
    configuration = device.configuration
    if configuration.id_scope and (reason := difference(assignment, configuration.settings())):
        return Finding(WARNING, f"{detail}; {reason}", REMEDIES["record.stale"])
    return Finding(OK, detail)


def record_seal(device: Device) -> Finding:
    if not device.configuration.id_scope:
        return Finding(SKIPPED, NO_ID_SCOPE)
    settings = device.configuration.settings()
    if device.assignment is not None and difference(device.assignment, settings):
        return Finding(SKIPPED, "it is for other settings")
    assignment, reason = device.run(load_held(settings, device.stored))
    if assignment is None:
        return Finding(WARNING, reason, REMEDIES["record.stale"])
    if assignment.attestation != TPM or assignment.chain:
        return Finding(OK, "settings and seal fit: the device's key has made it")
    return Finding(OK, "settings, endorsement key, storage root key and seal fit, and its key signs")


def device_key(device: Device) -> Finding:
    device.signature(b"\x00dps-agent check")  # no token begins so
    shown = f"TPM: {backend_shown(device.configuration)}"
    named = device.configuration.registration_id
    if named != named.lower() and device.configuration.attestation == SYMMETRIC_KEY:
        text = (
            f"{shown}; registration_id {named!r} has capitals: DPS is told {named.lower()!r}, and keys are derived so"
        )
        return Finding(WARNING, text, "write registration_id in lower case, here and in the enrolment")
    if not is_sealed(device.configuration):
        return Finding(OK, f"{shown}: whoever reads that is this device")
    if device.configuration.attestation == X509:
        _load_tls_provider(device)
    return Finding(OK, shown)


def _load_tls_provider(device: Device) -> None:
    """What TLS needs for a key of the TPM's; AskOperator `tpm.tls_provider`, RetryLater `tpm.absent`."""
    from dps_hal.host import tls_provider

    tcti = device.configuration.tpm.tcti
    tls_provider.require(tcti)

    def load(tpm: TpmService) -> None:
        tpm.release()  # the provider may want the same TPM
        tls_provider.load(tcti)

    device.ask(load)


def device_certificate(device: Device) -> Finding:
    if not device.configuration.certificate:
        return _own_certificate(device)
    issued = _issued_certificate(device)
    if device.configuration.attestation != X509:
        return issued
    own = _own_certificate(device)
    return own if own.result != OK else Finding(issued.result, f"{own.detail}; {issued.detail}", issued.remedy)


def _issued_certificate(device: Device) -> Finding:
    from dps_agent.der import validity
    from dps_agent.host.device_certificates import WARNED_LIFE
    from dps_agent.host.issued_keys import PREVIEW, key_shown
    from dps_agent.issued import chain_of, difference_of_chain

    configuration, assignment = device.configuration, device.assignment
    key, in_tpm = key_shown(configuration), issued_key_is_in_tpm(configuration)
    if in_tpm:
        _load_tls_provider(device)
        try:
            device.try_issued_key()
        except AskOperator as error:
            if error.code != "tpm.certificate_key":
                raise
            makes_another = "'dps-agent provision --force' has the TPM make another, and registers with that"
            path = configuration.issued_key_file
            return failed(error, f"remove {path}; {makes_another}" if path else makes_another)
    if assignment is None or not assignment.chain:
        return Finding(SKIPPED, "DPS has issued none yet")
    reason = device.run(difference_of_chain(assignment))
    if reason:
        return Finding(WARNING, reason, REMEDIES["record.stale"])
    first_s, last_s = validity(device.run(chain_of(assignment)))
    left_s = last_s - time.time()
    if left_s < 0:
        return Finding(WARNING, f"what DPS issued ended at {utc_text(last_s)} {PREVIEW}", REMEDIES["record.stale"])
    if left_s * WARNED_LIFE < last_s - first_s:
        what = f"issued by DPS, until {utc_text(last_s)}, and not renewed yet; {key} {PREVIEW}"
        return Finding(WARNING, what, "'dps-agent status' says what stands in the way, in its line 'why'")
    shown = f"issued by DPS, until {utc_text(last_s)}; {key}"
    if configuration.issues_into_tpm and not in_tpm:
        remedy = (
            f"remove {configuration.issued_key_path}: the TPM makes another key, and the device registers with that"
        )
        return Finding(WARNING, f"{shown}, where it lay before the settings wanted it in the TPM {PREVIEW}", remedy)
    return Finding(OK, f"{shown} {PREVIEW}")


def _own_certificate(device: Device) -> Finding:
    from dps_agent.host.certificate_requests import installed
    from dps_agent.host.device_certificates import ends_soon, valid_s

    found = installed(device.configuration)
    ending = ends_soon(valid_s(device.configuration))
    if ending:
        return Finding(WARNING, ending, "'dps-agent enroll --x509' makes the request for the next one")
    behind = f", with {found.authorities} of CAs behind it" if found.authorities else ""
    return Finding(OK, f"{found.subject} until {found.not_after}, issued by {found.issuer}{behind}")


def _age(age_s: float) -> str:
    for unit, unit_s in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if age_s >= 2 * unit_s:
            return f"{age_s / unit_s:.0f} {unit}"
    return f"{max(age_s, 0):.0f} s"
