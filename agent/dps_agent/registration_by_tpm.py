"""A registration by the TPM: what EK and SRK say to DPS, and what the TPM makes of its answers.

DPS encrypts both keys that it sends, the challenge's and the hub's, to this EK and this SRK; the TPM decrypts them and
gives them back wrapped by the SRK. Source: Azure DPS Runtime Registration API, 2021-10-01.
"""

from dps_agent.attestation import Registering
from dps_agent.effects import ImportKey, ReadEndorsementKey, ReadStorageRootKey
from dps_agent.messages import TpmAttestation
from dps_hal.errors import AskOperator, RetryLater
from dps_hal.platform import from_base64, to_base64
from dps_hal.tpm.keys import check_id_key_public, object_name, take_sized

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Generator
    from typing import Any

    from dps_agent.attestation import Opening
    from dps_agent.effects import Effect
    from dps_agent.messages import DeviceRegistrationResult, TpmChallenge
    from dps_agent.settings import Settings


class ByTpm(Registering):
    """See `dps_agent.attestation.Registering`."""

    def opening(self, settings: "Settings", registration_id: str) -> "Generator[Effect, Any, Opening]":
        """EK and SRK, without a token."""
        endorsement_key: bytes = yield ReadEndorsementKey(b"")
        storage_root_key: bytes = yield ReadStorageRootKey()
        shown = shown_keys(endorsement_key, storage_root_key)
        return shown, None, object_name(endorsement_key), object_name(storage_root_key)

    def challenge_key(self, challenge: "TpmChallenge") -> "Generator[Effect, Any, bytes]":
        """The challenge's key, which is held while the exchange lasts, and never stored."""
        if not challenge.authentication_key:
            return b""
        wrapped_key: bytes = yield ImportKey(activation_of(challenge.authentication_key, "the challenge"))
        return wrapped_key

    def missing(self, state: "DeviceRegistrationResult | None") -> str:
        """The blob with the hub's key."""
        return "" if state and state.tpm and state.tpm.authentication_key else "authenticationKey"

    def hub_key(self, state: "DeviceRegistrationResult") -> "Generator[Effect, Any, bytes]":
        """The key in the blob, wrapped; AskOperator `dps.key_unsuitable`: it signs something else, or more."""
        wrapped_key: bytes = yield ImportKey(activation_of(state.tpm and state.tpm.authentication_key, "the hub key"))
        try:
            _, end = take_sized(wrapped_key, 0, "public area")
            check_id_key_public(wrapped_key[:end])
        except ValueError as error:
            raise AskOperator("dps.key_unsuitable", f"the hub key: {error}")
        return wrapped_key


def shown_keys(endorsement_key: bytes, storage_root_key: bytes) -> TpmAttestation:
    """What the body of a request has of the TPM; both are marshalled TPM2B_PUBLIC."""
    return TpmAttestation(to_base64(endorsement_key), to_base64(storage_root_key), {})


def activation_of(text: "str | None", what: str) -> bytes:
    """The bytes of an `authenticationKey`; RetryLater `dps.blob_malformed` where it is no base64."""
    try:
        return from_base64(text or "")
    except ValueError as error:
        raise RetryLater("dps.blob_malformed", f"the authenticationKey of {what} is damaged: {error}")
