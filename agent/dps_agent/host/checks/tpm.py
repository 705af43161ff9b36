"""The checks of the TPM: that it is there, lets us in, holds the right keys and does what a registration asks of it."""

from __future__ import annotations

import os
import stat
import time
from glob import glob
from typing import TYPE_CHECKING

from dps_agent.host.checks.finding import NOTHING_STORED, OK, SKIPPED, WARNING, Finding, failed
from dps_agent.host.parts import TRANSIENT_SRK
from dps_hal.errors import AskOperator, DpsError, RetryLater
from dps_hal.host.codes import REMEDIES
from dps_hal.host.tpm_node import absent
from dps_hal.platform import hmac_sha256, random_bytes, same_bytes
from dps_hal.tpm import ek_certificate
from dps_hal.tpm.keys import has_no_da, object_name, registration_id_from_ek
from dps_hal.tpm.self_challenge import make_activation

if TYPE_CHECKING:
    from dps_agent.host.checks.device import Device
    from dps_hal.contracts import TpmCondition

SLOTS_NEEDED = 2  # EK and SRK for ActivateCredential, SRK and key for Load, key and sequence for a long message


def node(device: Device) -> Finding:
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
        raise absent(path, error, f"; TPMs in /dev: {others}") from None
    if not is_node:
        raise AskOperator("tpm.absent", f"expected a TPM's device node at {path}; came a file or folder")
    managed = path.replace("/dev/tpm", "/dev/tpmrm")
    if path.startswith("/dev/tpm") and not path.startswith("/dev/tpmrm") and os.path.exists(managed):
        return Finding(
            WARNING, f"{path} is there, but has no resource manager", f'set tcti = "device:{managed}" in [tpm]'
        )
    return Finding(OK, f"{path} is there")


def access(device: Device) -> Finding:
    condition = device.condition
    return Finding(OK, f"the TPM answers: maker {condition.maker}, firmware {condition.firmware}")


def auth(device: Device) -> Finding:
    condition, tpm = device.condition, device.configuration.tpm
    if condition.endorsement_has_password and not tpm.endorsement_auth_file:
        raise AskOperator(
            "tpm.hierarchy_auth",
            "the endorsement hierarchy has a password, which every registration needs; endorsement_auth_file is empty",
        )
    if tpm.owner_auth_file or tpm.endorsement_auth_file:
        try:
            device.ask(lambda tpm: tpm.try_passwords())
        except AskOperator as error:
            if error.code != "tpm.hierarchy_auth":
                raise
            counted = f"{error.message}; it was tried, and the TPM counts a wrong one of these towards no lockout"
            return failed(AskOperator(error.code, counted))
    unneeded = [
        f"{hierarchy}_auth_file is set, but the {hierarchy} hierarchy has no password"
        for hierarchy, is_set, has_password in (
            ("owner", tpm.owner_auth_file, condition.owner_has_password),
            ("endorsement", tpm.endorsement_auth_file, condition.endorsement_has_password),
        )
        if is_set and not has_password
    ]
    if unneeded:
        return Finding(
            WARNING, "; ".join(unneeded), "give the TPM its password again if it was cleared, else empty the setting"
        )
    if condition.owner_has_password and not tpm.owner_auth_file:
        return Finding(
            WARNING,
            "the owner hierarchy has a password and owner_auth_file is empty: no key can be made persistent",
            "set owner_auth_file in [tpm] until the endorsement and storage root keys exist, and for persist_at",
        )
    if condition.endorsement_has_password or condition.owner_has_password:
        return Finding(OK, "each hierarchy that has a password takes the one in the settings")
    return Finding(OK, "neither owner nor endorsement hierarchy has a password")


def ek(device: Device) -> Finding:
    handle = device.configuration.tpm.ek_handle
    return Finding(OK, f"at {handle:#x}; its registration id is {registration_id_from_ek(device.endorsement_key)}")


def srk(device: Device) -> Finding:
    name = f"its name is {object_name(device.storage_root_key).hex()}"
    found_at, wanted_at = device.tpm.srk_found_at, device.configuration.tpm.srk_handle
    if found_at == 0:
        return Finding(WARNING, f"{TRANSIENT_SRK}; {name}", REMEDIES["tpm.nv_full"])
    if found_at is None:
        return Finding(OK, name)
    taken = "" if found_at == wanted_at else f", as another program's key is at {wanted_at:#x}"
    return Finding(OK, f"at {found_at:#x}{taken}; {name}")


def certificate(device: Device) -> Finding:
    """The certificate says nothing about whether this TPM can register, so nothing here is a failure."""
    ek, template = device.endorsement_key, device.configuration.tpm.ek_template
    found = device.ask(lambda tpm: ek_certificate.certified(tpm, ek))
    says = ek_certificate.SAYS[found.verdict]
    if found.verdict == ek_certificate.MATCH:
        if template == "tcg-l1":
            made = f"; {found.template}" if found.by_maker else ""
            return Finding(OK, f"{says}, which is of the template tcg-l1{made}")
        return Finding(
            WARNING,
            f"{says}, which is of the template tcg-l1, though ek_template is {template}",
            "set ek_template to tcg-l1, or ek_handle to the handle of the other key",
        )
    if found.verdict == ek_certificate.MISMATCH:
        return _of_another_key(device, found)
    if found.verdict == ek_certificate.ABSENT:
        return _without_certificate(device, found)
    if found.verdict == ek_certificate.LOCKED:
        return Finding(WARNING, f"{says}: {found.locked}", REMEDIES["tpm.certificate_locked"])
    return Finding(WARNING, says, "ask the TPM's manufacturer")


def _of_another_key(device: Device, found: ek_certificate.Certified) -> Finding:
    """Which key the certificate is for, and what gives that; never advice that makes yet another one."""
    says = ek_certificate.SAYS[found.verdict]
    if device.configuration.tpm.ek_template == "azure-c-sdk":
        return Finding(OK, f"{says}: it is for the template tcg-l1, and ek_template is azure-c-sdk")
    if not found.usable:
        return Finding(WARNING, f"{says}; {found.template}", REMEDIES["tpm.ek_template_unsuitable"])
    try:
        made_by = device.ask(lambda tpm: tpm.template_of_endorsement_key())
    except DpsError as error:
        text = f"{says}; the template of this key could not be found out: {error.message}"
        return Finding(WARNING, text, "nothing, if this key is enrolled")
    if made_by == "tcg-l1":
        text = f"{says}, though {found.template}, as this key is: neither value of ek_template gives the certified key"
        return Finding(WARNING, text, "nothing, if this key is enrolled; else ask the TPM's manufacturer")
    remedy = "nothing, if this key is enrolled"
    if made_by == "azure-c-sdk":
        remedy += ', but ek_template = "azure-c-sdk", which it is of'
    return Finding(
        WARNING,
        f"{says}; {found.template}, and this key by {f'the template {made_by}' if made_by else 'neither template'}",
        f"{remedy}; else set ek_handle to a free handle, where the agent makes the key of the template tcg-l1",
    )


def _without_certificate(device: Device, certified: ek_certificate.Certified) -> Finding:
    """Of which template the EK is then, the TPM itself tells, by making it anew."""
    wanted = device.configuration.tpm.ek_template
    says = ek_certificate.SAYS[certified.verdict]
    others = device.ask(ek_certificate.certified_elsewhere)
    if others:
        says += f" for an RSA-2048 key of the low range, and others that this agent does not use, {others}"
    if certified.by_maker:
        says += f"; where one is issued, {certified.template}"
    absent_and = f"{says}, and none is needed to register; this endorsement key is of"
    try:
        found = device.ask(lambda tpm: tpm.template_of_endorsement_key())
    except DpsError as error:  # a slow TPM, or a password that the settings lack: it can register all the same
        return Finding(OK, f"{absent_and} a template that could not be found out: {error.message}")
    if found == wanted:
        return Finding(OK, f"{absent_and} the template {found}")
    return Finding(
        WARNING,
        f"{absent_and} {f'the template {found}' if found else 'neither template'}, though ek_template is {wanted}",
        "nothing, if this key is enrolled; else set ek_handle to a free handle, where the agent makes the other key",
    )


def self_challenge(device: Device) -> Finding:
    key, message = random_bytes(32), random_bytes(32)
    activation = make_activation(device.endorsement_key, device.storage_root_key, key)
    started_s = time.monotonic()
    try:
        signature = device.ask(lambda tpm: tpm.sign(tpm.import_key(activation), message))
    except DpsError as error:
        if error.code != "tpm.blob_refused":
            raise
        return failed(error, "the TPM does not hold the keys that it shows: power-cycle it, look for an interposer")
    if not same_bytes(signature, hmac_sha256(key, message)):
        wrong = AskOperator("tpm.failed", "the TPM signed, but not with the key that it was given")
        return failed(wrong, "power-cycle the device, replace the TPM if it repeats")
    return Finding(OK, f"the TPM took a key made for it and signed with it, in {time.monotonic() - started_s:.2f} s")


def slots(device: Device) -> Finding:
    free = device.condition.free_slots
    if free < SLOTS_NEEDED:
        raise RetryLater("tpm.memory", f"expected {SLOTS_NEEDED} free transient slots; came {free}")
    return Finding(OK, f"{free} transient slots are free, {SLOTS_NEEDED} are needed")


def lockout(device: Device) -> Finding:
    counted = _failures_counted(device.condition)
    if _is_at_the_brink(device.condition):
        return Finding(
            WARNING, f"{counted}: keys without noDA are not used now, others are", REMEDIES["tpm.locked_out"]
        )
    return Finding(OK, counted)


def noda(device: Device) -> Finding:
    try:
        assignment = device.assignment
    except DpsError as error:
        return Finding(SKIPPED, f"the stored assignment cannot be read: {error.message}", REMEDIES.get(error.code, ""))
    if assignment is None:
        return Finding(SKIPPED, NOTHING_STORED)
    if has_no_da(assignment.wrapped_key):
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
