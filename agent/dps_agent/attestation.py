"""What differs between the ways in which a device shows who it is; everything else is the same for all of them.

A way answers these questions, and nobody else asks which way it is:

1. Which registration id is the device's? (`registration_id`)
2. Is a stored assignment this device's? (`load_held`; its seal is made by the key that signs for the hub)
3. What does it show DPS first, and with what does it sign that? (`Registering.opening`, `members`)
4. DPS wants to know more: with what does it sign then? (`challenge_key`)
5. What becomes of the answer: is all there (`missing`), which key is the hub's (`hub_key`), and which certificate, with
   what has to be stored before the identity (`issued`)?

What signs for the hub, and seals the record, is one effect for all: `Sign` by the key that the assignment has, or where
it has none by the device's own, which whoever runs the exchange holds. A device with a certificate shows that on each
connection, to DPS and to the hub, which is the business of the connection: it has no tokens, and its seal is looked at
by `Verify`. The first two questions are asked at each start, the others when a device registers, so these have modules
of their own (`registration_by_tpm`, `registration_by_key`, `registration_by_certificate`): what a way does not need is
not loaded.

| way | the body has | the first request has | the answer gives | the hub's key |
|---|---|---|---|---|
| `tpm` | EK and SRK | no token; a challenge follows | a key for this TPM alone | that one, wrapped by the SRK |
| `symmetric-key` | nothing | a token by the device's key | nothing | the device's own |
| `x509` | nothing | no token: the certificate is shown in TLS | nothing | the device's own, that of the certificate |

Beside each of them DPS may issue the certificate for the hub (`registration_by_issuance`): the body has a request for
it, the answer the certificate in place of a key, and what signs for the hub is the certificate's key.
"""

from dps_agent.assignment import decode, difference, is_signed, seal_message
from dps_agent.effects import ConfirmClock, ReadEndorsementKey, ReadStorageRootKey, Sign, Verify
from dps_agent.settings import AUTO, SYMMETRIC_KEY, TPM
from dps_hal.errors import AskOperator, IdentityStale
from dps_hal.platform import same_bytes
from dps_hal.tpm.keys import object_name, registration_id_from_ek

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Generator
    from typing import Any, TypeAlias

    from dps_agent.assignment import Assignment
    from dps_agent.effects import Effect, Records
    from dps_agent.messages import DeviceRegistrationResult, TpmAttestation, TpmChallenge
    from dps_agent.renewal import Renewal
    from dps_agent.sas import SasToken
    from dps_agent.settings import Settings
    from dps_hal.contracts import StoredRecord

    # What a device says to DPS first: what of itself is in the body of each request; a token, None where there is
    # nothing yet to sign one with; the names of EK and SRK for the record, 34 bytes each, empty where there are none.
    Opening: TypeAlias = tuple[TpmAttestation | None, SasToken | None, bytes, bytes]


class Registering:
    """One registration by one way; `dps_agent.registration.registering` gives it.

    What stands here is so for a device with a key of its own, to which DPS sends none.
    """

    def opening(self, settings: "Settings", registration_id: str) -> "Generator[Effect, Any, Opening]":
        """The first words; raises what the TPM or the clock has against it."""
        raise NotImplementedError

    def members(self, registration_id: str) -> "Generator[Effect, Any, dict[str, Any]]":
        """What else the body of `register` has, by JSON name."""
        yield from ()
        return {}

    def challenge_key(self, challenge: "TpmChallenge") -> "Generator[Effect, Any, bytes]":
        """The wrapped key that signs what DPS did not take as it was; empty: there is none, it is a refusal."""
        yield from ()
        return b""

    def missing(self, state: "DeviceRegistrationResult | None") -> str:
        """What this way needs and an answer lacks, by its JSON name, "" for nothing."""
        return "" if state else "registrationState"

    def hub_key(self, state: "DeviceRegistrationResult") -> "Generator[Effect, Any, bytes]":
        """The wrapped key for the record, checked; empty where the device signs with a key of its own."""
        yield from ()
        return b""

    def issued(self, state: "DeviceRegistrationResult") -> "Generator[Effect, Any, tuple[str, Records]]":
        """The name of the chain that DPS issued, and the records that have to be stored before the identity."""
        yield from ()
        return "", ()


def load_held(
    settings: "Settings", stored: "StoredRecord | None", wanted: bool = True
) -> "Generator[Effect, Any, tuple[Assignment | None, str]]":
    """The stored record `identity` as an assignment if it holds, else None and the reason in words.

    It holds when settings, hardware and seal fit. AskOperator `tpm.ek_changed`: it was made for another EK. Not
    `wanted`: it will not be used, so that nobody is asked for the seal.
    """
    if stored is None:
        return None, "no assignment is stored"
    try:
        assignment, text, seal = decode(stored.payload)
    except IdentityStale as error:
        return None, error.message
    reason = difference(assignment, settings)
    if reason:
        return None, reason
    reason = yield from _difference_of_hardware(assignment, settings)
    if reason:
        return None, reason
    if not wanted:
        return None, "asked to register again"
    try:
        if is_signed(assignment):
            fits: bool = yield Verify(seal_message(text), seal)
        else:
            signature: bytes = yield Sign(assignment.wrapped_key, seal_message(text))
            fits = same_bytes(signature, seal)
    except IdentityStale as error:
        return None, error.message
    if not fits:
        return None, "the stored assignment was altered: its seal does not fit"
    if assignment.chain:
        from dps_agent.issued import difference_of_chain

        reason = yield from difference_of_chain(assignment)
    return (None, reason) if reason else (assignment, "")


def shown_to_hub(
    assignment: "Assignment", renewal: "Renewal | None" = None
) -> "Generator[Effect, Any, tuple[bytes | None, Renewal | None]]":
    """What shows a hub who the device is that has no tokens: the chain that DPS issued; None: the device's own.

    And what has that renewed, on earlier connections of this identity and on those to come. IdentityStale
    `record.damaged` where the chain is not there.
    """
    if not assignment.chain:
        return None, None
    from dps_agent.issued import chain_of
    from dps_agent.renewal import Renewal

    yield ConfirmClock(assignment.assigned_hub)  # when to renew it is a question of time
    chain = yield from chain_of(assignment)
    return chain, renewal or Renewal(assignment, chain)


def registration_id(settings: "Settings") -> "Generator[Effect, Any, str]":
    """The device's id in DPS."""
    if settings.attestation == SYMMETRIC_KEY:
        return settings.registration_id.lower()  # a derived key is made of the id's letters, and DPS compares without
    if settings.registration_id != AUTO:
        return settings.registration_id
    endorsement_key: bytes = yield ReadEndorsementKey(b"")
    return registration_id_from_ek(endorsement_key)


def _difference_of_hardware(assignment: "Assignment", settings: "Settings") -> "Generator[Effect, Any, str]":
    """Why a stored assignment is not this device's, as far as its TPM shows, or ""; without one the seal alone says it.

    AskOperator `tpm.ek_changed`.
    """
    if settings.attestation != TPM:
        return ""
    endorsement_key: bytes = yield ReadEndorsementKey(assignment.ek_name)
    if object_name(endorsement_key) != assignment.ek_name:  # before anything is salted to it
        raise AskOperator(
            "tpm.ek_changed",
            "the stored assignment belongs to another endorsement key: its name begins with"
            f" {_short(assignment.ek_name)}, this TPM's with {_short(object_name(endorsement_key))}",
        )
    if settings.registration_id == AUTO and assignment.registration_id != registration_id_from_ek(endorsement_key):
        return f"the stored assignment is for registration_id {assignment.registration_id!r}, not the EK's own"
    storage_root_key: bytes = yield ReadStorageRootKey()
    if object_name(storage_root_key) != assignment.srk_name:
        return "the TPM was cleared: it has another storage root key"
    return ""


def _short(name: bytes) -> str:
    """The first bytes of a TPM object's name, in hex, for a sentence."""
    out = ""
    for byte in name[2:8]:
        out += f"{byte:02x}"
    return out
