"""A registration in which DPS issues the certificate for the hub, beside whatever shows who the device is.

The key pair is made before DPS is asked, and kept with its request until its file goes or its TPM takes it no more: so
whatever DPS issues, now or for an earlier attempt, is for this key. What the way itself would be given for its hub is
not used.
A preview of Azure. Source: Azure DPS Runtime Registration API, 2025-07-01-preview.
"""

from dps_agent.attestation import Registering
from dps_agent.effects import ReadRequest
from dps_agent.issued import chain_taken, name_of, records_with
from dps_hal.platform import to_base64

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Generator
    from typing import Any

    from dps_agent.attestation import Opening
    from dps_agent.effects import Effect, Records
    from dps_agent.messages import DeviceRegistrationResult, TpmChallenge
    from dps_agent.settings import Settings

_CHAIN = "issuedCertificateChain"


class ByIssuance(Registering):
    """See `dps_agent.attestation.Registering`."""

    def __init__(self, way: Registering) -> None:
        self._way = way
        self._request = b""

    def opening(self, settings: "Settings", registration_id: str) -> "Generator[Effect, Any, Opening]":
        """That of the way."""
        opening = yield from self._way.opening(settings, registration_id)
        return opening

    def members(self, registration_id: str) -> "Generator[Effect, Any, dict[str, Any]]":
        """The request for the certificate."""
        request: bytes = yield ReadRequest(registration_id)
        self._request = request
        return {"csr": to_base64(request)}

    def challenge_key(self, challenge: "TpmChallenge") -> "Generator[Effect, Any, bytes]":
        """That of the way."""
        key = yield from self._way.challenge_key(challenge)
        return key

    def missing(self, state: "DeviceRegistrationResult | None") -> str:
        """The chain."""
        return "" if state and state.unknown.get(_CHAIN) else _CHAIN

    def issued(self, state: "DeviceRegistrationResult") -> "Generator[Effect, Any, tuple[str, Records]]":
        """The chain, by its name, and the record that has it."""
        chain = yield from chain_taken(state.unknown.get(_CHAIN), self._request)
        records = yield from records_with(chain)
        return name_of(chain), records
