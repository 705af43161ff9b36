"""The settings of a life out of the values that an operator gave; looked at when a device starts."""

from dps_agent.settings import (
    API_VERSION,
    AUTO,
    CERTIFICATES,
    ISSUING_API_VERSION,
    POLL_OPERATION,
    TPM,
    Settings,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def settings_of(values: "dict[str, Any]") -> Settings:
    """The settings of a life, out of the values of all settings by their dotted keys.

    DPS is told the model id as well, by the name that Azure's services look for.
    """
    under = 5381
    for key in sorted(values):
        counts = key[:4] == "tpm." or key in ("id_scope", "endpoint", "registration_id")
        if CERTIFICATES and key == "certificate" and values[key]:
            counts = True
        if counts or (key == "attestation" and values[key] != TPM):
            for byte in f"{values[key]}\n".encode():
                under = (under * 33 + byte) & 0x3FFFFFFF  # a small integer on a board
    certificate, api_version, poll = "", API_VERSION, values["poll"]
    if CERTIFICATES:
        certificate = values.get("certificate", "")  # a board has no such setting, nor the next
        api_version = values.get("api_version", AUTO)
        if api_version == AUTO:
            api_version = ISSUING_API_VERSION if certificate else API_VERSION
        if certificate:
            poll = POLL_OPERATION  # a lookup never has it
    payload = dict(values["payload"])
    if values["model_id"]:
        payload["modelId"] = values["model_id"]
    return Settings(
        id_scope=values["id_scope"],
        registration_id=values["registration_id"],
        endpoint=values["endpoint"],
        poll=poll,
        payload=payload or None,
        registration_budget_s=values["retry.registration_budget_s"],
        first_contact_spread_s=values["retry.first_contact_spread_s"],
        hub_suffixes=tuple(values["hub.hub_suffixes"]),
        fleet=(values["fleet.devices"], values["fleet.dps_quota_per_min"], values["fleet.hub_connects_per_s"]),
        keep_alive_s=values["hub.keep_alive_s"],
        token_life_s=values["hub.token_life_s"],
        under=under,
        model_id=values["model_id"],
        features=tuple(values["hub.features"]),
        attestation=values["attestation"],
        certificate=certificate,
        api_version=api_version,
    )
