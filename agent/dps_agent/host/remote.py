"""What DPS has on record for this device, without registering it: one challenge, one registration status lookup.

A TPM answers the challenge only to sign the lookup; the key in it, and any key in the answer, is forgotten. It counts
as a registration in the quota of the service. A device with a key of its own asks for no challenge. Source: Azure DPS
Runtime Registration API, 2021-10-01.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dps_agent.attestation import registration_id as registration_id_of
from dps_agent.effects import Http, NoReply, UtcNow
from dps_agent.messages import DeviceRegistrationResult, TpmChallenge, decode, device_registration
from dps_agent.registration import no_reply_error, read_register, refusal_of, registering, registration_path
from dps_agent.sas import DPS_KEY_NAME, DPS_TOKEN_LIFE_S, dps_resource
from dps_agent.settings import TPM
from dps_agent.signing import check_clock, signed_token

if TYPE_CHECKING:
    from collections.abc import Generator
    from typing import Any

    from dps_agent.assignment import Assignment
    from dps_agent.effects import Effect, Reply
    from dps_agent.settings import Settings
    from dps_hal.contracts import Utc


def look_up(settings: Settings) -> Generator[Effect, Any, DeviceRegistrationResult]:
    """Asks once and returns what DPS says, without its key; every step is tried once, for somebody is waiting.

    Raises RetryLater, AskOperator and IdentityStale as a registration does. Nothing is stored.
    """
    registration_id = yield from registration_id_of(settings)
    asking = registering(settings)
    shown, token, _, _ = yield from asking.opening(settings, registration_id)
    body = device_registration(registration_id, settings.payload, shown)
    if token is None and settings.attestation == TPM:
        register_path = registration_path(settings.id_scope, registration_id, "/register", settings.api_version)
        challenge: Reply | NoReply = yield Http("PUT", register_path, body, None)
        if isinstance(challenge, NoReply):
            raise no_reply_error(challenge)
        answer = read_register(challenge)
        key = (yield from asking.challenge_key(answer)) if isinstance(answer, TpmChallenge) else b""
        if not key:
            raise refusal_of(challenge)
        now: Utc = yield UtcNow()
        check_clock(now)
        resource = dps_resource(settings.id_scope, registration_id)
        token = yield from signed_token(resource, now.now_s + DPS_TOKEN_LIFE_S, key, DPS_KEY_NAME)
    path = registration_path(settings.id_scope, registration_id, "", settings.api_version)
    reply: Reply | NoReply = yield Http("POST", path, body, token)
    if isinstance(reply, NoReply):
        raise no_reply_error(reply)
    if reply.status not in (200, 202):
        raise refusal_of(reply)
    return decode(DeviceRegistrationResult, reply.body)._replace(tpm=None)


def look_up_document(found: DeviceRegistrationResult, held: Assignment | None) -> dict[str, Any]:
    """What DPS said, and how that differs from the stored assignment."""
    said = {
        "status": found.status or "",
        "substatus": found.substatus or "",
        "assignedHub": found.assigned_hub or "",
        "deviceId": found.device_id or "",
        "registrationId": found.registration_id or "",
        "lastUpdatedUtc": found.last_updated_date_time_utc or "",
        "etag": found.etag or "",
        "errorCode": found.error_code,
        "errorMessage": found.error_message or "",
    }
    stored = {
        "status": held.status if held else "",
        "assignedHub": held.assigned_hub if held else "",
        "deviceId": held.device_id if held else "",
        "lastUpdatedUtc": held.last_updated_utc if held else "",
    }
    differences = [
        f"{name}: DPS says {said[name] or 'nothing'}, stored is {ours or 'nothing'}"
        for name, ours in stored.items()
        if ours != said[name]
    ]
    return {"remote": said, "differences": differences}
