"""A registration by a symmetric key: the device's own key signs from the first request on.

The key is an individual enrolment's, or one that was derived of a group's for this registration id; DPS sends none, and
the same key signs for the hub. Source: Azure DPS, "symmetric key attestation".
"""

from dps_agent.attestation import Registering
from dps_agent.effects import ConfirmClock, UtcNow
from dps_agent.sas import DPS_KEY_NAME, DPS_TOKEN_LIFE_S, dps_resource
from dps_agent.signing import check_clock, signed_token

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Generator
    from typing import Any

    from dps_agent.attestation import Opening
    from dps_agent.effects import Effect
    from dps_agent.settings import Settings
    from dps_hal.contracts import Utc


class ByKey(Registering):
    """See `dps_agent.attestation.Registering`."""

    def opening(self, settings: "Settings", registration_id: str) -> "Generator[Effect, Any, Opening]":
        """A token by the device's key; RetryLater `clock.not_set` where nobody knows what time it is."""
        yield ConfirmClock("")  # DPS says it where nobody else does
        now: Utc = yield UtcNow()
        check_clock(now)
        resource = dps_resource(settings.id_scope, registration_id)
        token = yield from signed_token(resource, now.now_s + DPS_TOKEN_LIFE_S, b"", DPS_KEY_NAME)
        return None, token, b"", b""
