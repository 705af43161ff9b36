"""The whole hardware as the logic sees it: Tpm, TpmService, Store and Clock.

Failures of every implementation are the four classes of `dps_hal.errors`, nothing else.
"""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Final, NamedTuple, Protocol

    class TpmCondition(NamedTuple):
        """What a field engineer asks about a TPM; counts are whole numbers, `recovery_s` is in seconds."""

        maker: str  # TPM2_PT_MANUFACTURER, four letters such as "IFX"
        firmware: str  # TPM2_PT_FIRMWARE_VERSION_1 as "major.minor"
        lockout_counter: int  # authorisation failures counted so far
        lockout_maximum: int  # the count at which the TPM refuses keys without noDA
        recovery_s: int  # seconds after which the TPM forgets one failure
        free_slots: int  # transient objects that still fit
        owner_has_password: bool
        endorsement_has_password: bool

    class StoredRecord(NamedTuple):
        """One record as `Store.load` found it."""

        payload: bytes
        generation: int  # counts commits, wraps at 2**32
        rolled_back: bool  # True: a newer copy was damaged and an older one is returned

    class Utc(NamedTuple):
        """Wall-clock time: whole seconds since 1970-01-01 UTC, whether to believe them, and who says so."""

        now_s: int
        believable: bool
        source: str

    class Signer(Protocol):
        """What signs for a device: a TPM, or the key that a device was given."""

        def sign(self, wrapped_key: bytes, message: bytes) -> bytes:
            """HMAC-SHA256 of `message`, 32 bytes, by the wrapped key; where that is empty by the device's own."""
            ...

        def release(self) -> None:
            """Ends what is open; idempotent, never raises; the next call opens it again."""
            ...

    class Tpm(Signer, Protocol):
        """A TPM 2.0 that keeps no state for us but its EK and SRK.

        A wrapped key is `TPM2B_PUBLIC || TPM2B_PRIVATE` (210 bytes for a 32-byte HMAC key): encrypted to this TPM's
        SRK and safe at rest.
        """

        def endorsement_key(self, name: bytes = b"") -> bytes:
            """The EK's marshalled TPM2B_PUBLIC, its two size bytes included (316 bytes); created once if absent.

            `name` is that of the EK that was enrolled, where it is known: if the TPM can make that one it does.
            """
            ...

        def storage_root_key(self) -> bytes:
            """The SRK's marshalled TPM2B_PUBLIC, its two size bytes included (284 bytes); created once if absent."""
            ...

        def import_key(self, activation: bytes) -> bytes:
            """Decrypts DPS's activation blob (raw bytes, not base64) and returns the key in it as a wrapped key.

            RetryLater `dps.blob_malformed`: the blob is not of the documented layout. AskOperator `dps.key_unsuitable`:
            the key in it is not an HMAC-SHA256 signing key that can be imported, or has a password of its own; one
            without noDA is used once to find that out, which a TPM counts as a failed guess: RetryLater
            `tpm.locked_out` where it has counted any before, AskOperator `tpm.lockout_maximum` where one is a lockout.
            IdentityStale `tpm.blob_refused`: made for another EK or SRK, or altered. AskOperator `tpm.key_refused`: the
            TPM does not take the key.
            """
            ...

        def sign(self, wrapped_key: bytes, message: bytes) -> bytes:
            """HMAC-SHA256 of `message` (at most 4096 bytes) by the wrapped key, 32 bytes.

            IdentityStale `tpm.key_stale`: the key was wrapped by another SRK, or altered. AskOperator
            `dps.key_unsuitable`: it has a password of its own.
            """
            ...

        def release(self) -> None:
            """Ends session and connection; idempotent, never raises; the next call opens them again."""
            ...

    class BoardTpm(Tpm, Protocol):
        """What a board asks for beyond the logic."""

        def endorsement_certificate(self) -> "bytes | None":
            """The manufacturer's EK certificate in DER from NV index 0x01C00002, or None where there is none.

            Empty where the index holds something else, such as padding. AskOperator `tpm.certificate_locked`: reading
            it takes a password, or could count as a failed guess; `tpm.hierarchy_auth`: the owner's, which is not set.
            """
            ...

        def condition(self) -> TpmCondition:
            """Maker, firmware, lockout state, free slots, and which hierarchies have a password."""
            ...

    class TpmService(BoardTpm, Protocol):
        """What `check`, `enroll` and diagnostics need beyond the logic.

        `srk_found_at` is the persistent handle of the SRK as it was last used, 0 where the TPM has no room for it and
        makes it anew at each start, None before its first use and where nothing has a handle. `creates_key` is True
        while a call creates a key, for which it has more time than other calls. `unneeded_passwords` names the settings
        with a password whose hierarchy turned out to have none.
        """

        srk_found_at: "int | None"
        creates_key: bool

        @property
        def unneeded_passwords(self) -> "tuple[str, ...]":
            """Settings such as `owner_auth_file`."""
            ...

        def makers_template(self) -> bytes:
            """How NV indices 0x01C00004 and 0x01C00003 say that the certified EK is made, a TPM2B_PUBLIC.

            Empty where neither is there: then it is made by template L-1. AskOperator `tpm.ek_template_unsuitable`:
            such a key is no EK of the TCG template; `tpm.certificate_locked`, `tpm.hierarchy_auth` as above.
            """
            ...

        def ek_indices(self) -> "tuple[int, ...]":
            """The NV indices with EK certificates, nonces and templates that are there, 0x01C00002 to 0x01C000FF."""
            ...

        def template_of_endorsement_key(self) -> str:
            """Which of `EK_TEMPLATES` gives the EK; empty: neither. Makes keys, which takes seconds.

            `tcg-l1` gives the key that `makers_template` says; `PLAIN_L1`: the EK is of L-1, and that says another.
            """
            ...

        def persist(self, wrapped_key: bytes, handle: int, former: bytes = b"") -> None:
            """Makes the wrapped key a persistent object at `handle` for other programs.

            What is there is replaced only if `former` is its name (34 bytes); else AskOperator `tpm.handle_taken`.
            """
            ...

        def create_signing_key(self) -> "tuple[int, bytes, bytes]":
            """A new key for TLS, which the TPM does not keep and nobody else can use; see `dps_hal.host.signing_key`.

            The persistent handle of the SRK, TPM2B_PUBLIC and TPM2B_PRIVATE, sizes included.
            AskOperator `tpm.nv_full`: the SRK has no persistent handle, by which TLS could find it.
            """
            ...

        def sign_digest(self, public: bytes, private: bytes, digest: bytes) -> "tuple[int, int]":
            """ECDSA by such a key over a SHA-256 digest, 32 bytes: r and s. Nobody on the bus is kept from changing it.

            IdentityStale `tpm.key_stale`: another SRK made it.
            """
            ...

        def name_at(self, handle: int) -> bytes:
            """The name of the persistent object at `handle`, 34 bytes for this agent's keys; empty: none is there."""
            ...

        def withdraw(self, handle: int, names: "tuple[bytes, ...]") -> None:
            """Removes the persistent object at `handle` if one of `names` is its name; else it does nothing."""
            ...

        def try_passwords(self) -> None:
            """Uses the hierarchies' passwords that are set, for nothing else; a wrong one is no step to a lockout.

            AskOperator `tpm.hierarchy_auth` names the one that is wrong.
            """
            ...

    class Store(Protocol):
        """Named records that a power cut can't lose: after any cut a record is the old one or the new one."""

        def load(self, record: str) -> "StoredRecord | None":
            """The newest valid payload of `record`, or None where there never was one or it was erased.

            An empty payload: copies are there, and damage or a power cut has left none of them whole.
            AskOperator `store.unknown_version`: written by a newer agent; nothing is touched. RetryLater `store.io`.
            """
            ...

        def commit(self, record: str, payload: bytes) -> None:
            """Makes `payload` (at most `max_payload` bytes) the record's content, durable on return.

            Raises RetryLater `store.full`, `store.io` or AskOperator `store.read_only`, `store.denied`,
            `store.too_large`; then the old content is still there.
            """
            ...

        def erase(self, record: str) -> None:
            """Makes the record empty; after a cut at any point it is the current one or none, never an earlier one."""
            ...

        def forget_older(self, record: str) -> None:
            """Leaves nothing in the storage that the record was before; what it is now stays. Raises as `commit`."""
            ...

    class Clock(Protocol):
        """Time as the hardware has it."""

        def uptime_s(self) -> float:
            """Monotonic seconds since any fixed point."""
            ...

        def utc(self) -> Utc:
            """Wall-clock time and whether to believe it."""
            ...

    WhileWaiting = Callable[[], None]  # called at least once a second while something blocks
else:
    from dps_hal.named import namedtuple

    TpmCondition = namedtuple(
        "TpmCondition",
        (
            "maker",
            "firmware",
            "lockout_counter",
            "lockout_maximum",
            "recovery_s",
            "free_slots",
            "owner_has_password",
            "endorsement_has_password",
        ),
    )
    StoredRecord = namedtuple("StoredRecord", ("payload", "generation", "rolled_back"))
    Utc = namedtuple("Utc", ("now_s", "believable", "source"))
    Signer = Tpm = TpmService = Store = Clock = object  # only a type checker compares with them

IDENTITY: "Final" = "identity"  # record: hub, device, wrapped key, seal
PROGRESS: "Final" = "progress"  # record: attempts and delays; expendable
CERTIFICATE: "Final" = "certificate"  # record: what DPS issued, of devices for which it does; no secret

EK_HANDLE: "Final" = 0x81010001  # TCG TPM v2.0 Provisioning Guidance, table 2
SRK_HANDLE: "Final" = 0x81000001  # TCG TPM v2.0 Provisioning Guidance, table 2
EK_TEMPLATES: "Final" = ("tcg-l1", "azure-c-sdk")  # the words that settings have for them
