"""What `dps-agent check` looks at, one small check after the other.

A check never stops the ones behind it, but for those that need what it did not find. Nothing is left behind but what
a registration leaves too: endorsement key and storage root key are created where they are missing. All of it works
while the service runs: nothing takes its lock, and the TPM is released behind each call.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from dps_agent.host.checks import local, tpm
from dps_agent.host.checks.device import Device
from dps_agent.host.checks.finding import FAILED, SKIPPED, Check, Finding, failed
from dps_agent.settings import TPM, X509
from dps_hal.errors import DpsError

__all__ = ["CHECKS", "Check", "Device", "Finding", "run_checks"]


def run_checks(device: Device, only: Collection[str] = (), offline: bool = False) -> list[tuple[Check, Finding]]:
    """Runs all checks, or those of `only` and what they need, in their order; `offline` leaves the network alone."""
    others = _of_other_ways(device)
    wanted = set(only) or {check.id for check in CHECKS if check.id not in others}
    for check in reversed(CHECKS):  # what a check needs comes before it
        if check.id in wanted:
            wanted.update(need for need in check.needs if need not in others)
    findings: dict[str, Finding] = {}
    for check in CHECKS:
        if check.id in wanted and not (offline and check.online):
            there_is_none = Finding(SKIPPED, others.get(check.id, ""))
            findings[check.id] = there_is_none if check.id in others else _run(check, device, findings)
    return [(check, findings[check.id]) for check in CHECKS if check.id in findings]


def _run(check: Check, device: Device, findings: dict[str, Finding]) -> Finding:
    missing = [need for need in check.needs if need in findings and findings[need].result in (FAILED, SKIPPED)]
    if missing:
        return Finding(SKIPPED, f"not possible without {missing[0]}")
    if device.hangs:
        return Finding(SKIPPED, "not possible: an earlier check still hangs")
    try:
        return check.run(device)
    except DpsError as error:
        return failed(error)


def _of_other_ways(device: Device) -> dict[str, str]:
    """The checks that this device has no use for, and why: they are made only where somebody asks for them."""
    try:
        attestation, uses_tpm, needs_ek = (
            device.configuration.attestation,
            device.uses_tpm,
            device.needs_endorsement_key,
        )
    except DpsError:
        return {}  # the check of the settings says what is wrong with them
    others = {}
    if attestation == TPM:
        others["device-key"] = "the TPM is who this device is: it has no key of its own"
    else:
        others["tpm-noda"] = "the hub's key is the device's own"
    if device.configuration.certificate:
        others["tpm-noda"] = "the hub's key is that of the certificate which DPS issues"
    if attestation != X509 and not device.configuration.certificate:
        others["device-certificate"] = "this device shows no certificate"
    if not needs_ek:
        others |= dict.fromkeys(_OF_ENDORSEMENT_KEY, "no endorsement key shows who this device is")
    if not uses_tpm:
        others |= {check.id: "no TPM is used" for check in CHECKS if check.id.startswith("tpm-")}
    return others


_OF_ENDORSEMENT_KEY = ("tpm-ek", "tpm-certificate", "tpm-self-challenge")


def _online(name: str) -> Callable[[Device], Finding]:
    """A check of the module `network`, which is imported when it runs."""

    def run(device: Device) -> Finding:
        from dps_agent.host.checks import network

        run: Callable[[Device], Finding] = getattr(network, name)
        return run(device)

    return run


CHECKS: Sequence[Check] = (
    Check("settings", "The settings and the files that they name can be used.", (), local.used_settings),
    Check("state-folder", "The state folder takes a file and syncs it.", ("settings",), local.state_folder),
    Check("clock", "The device's clock can be believed.", (), local.clock),
    Check("tpm-node", "The TPM that the settings name exists.", ("settings",), tpm.node),
    Check("tpm-access", "This user may use the TPM, and it answers.", ("tpm-node",), tpm.access),
    Check("tpm-auth", "The hierarchies that have a password have one in the settings.", ("tpm-access",), tpm.auth),
    Check("tpm-ek", "The endorsement key is one of the TCG template.", ("tpm-access",), tpm.ek),
    Check("tpm-srk", "The storage root key is one of the TCG template.", ("tpm-ek",), tpm.srk),
    Check("tpm-certificate", "The certificate in the TPM names the endorsement key.", ("tpm-ek",), tpm.certificate),
    Check(
        "tpm-self-challenge",
        "The TPM answers a challenge as the service makes it.",
        ("tpm-ek", "tpm-srk"),
        tpm.self_challenge,
    ),
    Check("tpm-slots", "The TPM has room for what a registration loads.", ("tpm-access",), tpm.slots),
    Check("tpm-lockout", "The TPM is not about to lock out.", ("tpm-access",), tpm.lockout),
    Check("tpm-noda", "The stored hub key cannot lock the TPM out.", ("tpm-node",), tpm.noda),
    Check("device-key", "The device's own key can be read, and signs.", ("settings",), local.device_key),
    Check(
        "device-certificate",
        "The device's certificate is for its key and its name, is valid, and does not end soon.",
        ("device-key",),
        local.device_certificate,
    ),
    Check("record", "An assignment is stored, and it fits the settings.", ("settings",), local.record),
    Check(
        "record-seal",
        "The stored assignment belongs to this device and was not altered.",
        ("record", "device-key", "tpm-noda", "tpm-ek", "tpm-srk"),
        local.record_seal,
    ),
    Check(
        "proxy", "The proxy on the way to DPS, if there is one, lets us through.", ("settings",), _online("proxy"), True
    ),
    Check("dns", "The name of DPS is looked up.", ("settings", "proxy"), _online("dns"), True),
    Check("dps-tls", "DPS proves itself by a certificate that is trusted.", ("clock", "dns"), _online("dps_tls"), True),
    Check(
        "dps-answers",
        "DPS knows this device: its ID scope, its enrolment, its endorsement key or its own.",
        ("dps-tls", "device-key", "tpm-ek", "tpm-srk"),
        _online("dps_answers"),
        True,
    ),
    Check("clock-dps", "The device's clock agrees with DPS's.", ("dps-answers",), _online("clock_dps"), True),
    Check(
        "hub-mqtt",
        "The assigned hub is reached at its port for MQTT and proves itself; nobody logs in.",
        ("settings", "clock"),
        _online("hub_mqtt"),
        True,
    ),
    Check(
        "hub-websocket",
        "The assigned hub is reached by MQTT over WebSocket.",
        ("settings", "clock"),
        _online("hub_websocket"),
        True,
    ),
)
