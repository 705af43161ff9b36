"""What every back end of a real TPM does alike in a registration: limits, what is our SRK, the lockout."""

from dps_hal.errors import AskOperator, RetryLater
from dps_hal.tpm_keys import check_srk_public

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

MAX_BUFFER_BYTES: "Final" = 1024  # TPM2B_MAX_BUFFER of the PC Client Platform TPM Profile; longer is a sequence
MAX_AUTH_BYTES: "Final" = 64  # TPM2B_AUTH
COMMAND_LIMIT_S: "Final" = 30.0  # one operation of the Tpm contract
KEY_CREATION_LIMIT_S: "Final" = 180.0  # RSA-2048 key generation takes up to tens of seconds on real parts
RELEASE_LIMIT_S: "Final" = 5.0

PT_LOCKOUT_COUNTER: "Final" = 0x20E  # TPM_PT, Part 2, table 24; then MAX_AUTH_FAIL, LOCKOUT_INTERVAL
PT_LOCKOUT_INTERVAL: "Final" = 0x210

LOADED_SESSIONS: "Final" = 0x02000000  # the first handle of its kind, Part 2, 7.2, with the next three
_SAVED_SESSIONS = 0x03000000
TRANSIENT: "Final" = 0x80000000
PERSISTENT: "Final" = 0x81000000
LEFTOVERS: "Final" = (LOADED_SESSIONS, _SAVED_SESSIONS, TRANSIENT)


def kind_of(handle: int) -> int:
    """LOADED_SESSIONS or TRANSIENT, whichever the handle is one of, be it altered in a few bits."""
    return LOADED_SESSIONS if handle < TRANSIENT else TRANSIENT


def check_passwords(owner_auth: bytes, endorsement_auth: bytes) -> None:
    """AskOperator `config.invalid` where a hierarchy's password is longer than a TPM takes."""
    for setting, auth in (("owner_auth_file", owner_auth), ("endorsement_auth_file", endorsement_auth)):
        if len(auth) > MAX_AUTH_BYTES:
            raise AskOperator("config.invalid", f"{setting}: expected at most {MAX_AUTH_BYTES} bytes; came {len(auth)}")


def is_srk(public: bytes) -> bool:
    """Whether a TPM2B_PUBLIC is a storage root key of the TCG template."""
    try:
        check_srk_public(public)
    except AskOperator:
        return False
    return True


def refuse_at_the_brink(properties: "dict[int, int]") -> None:
    """RetryLater `tpm.locked_out` where one more failure locks keys without noDA out."""
    counter, maximum = properties.get(PT_LOCKOUT_COUNTER, 0), properties.get(PT_LOCKOUT_COUNTER + 1, 2)
    if 0 < counter >= maximum - 1:
        raise locked_out(f"the TPM has counted {counter} of {maximum} failures", properties)


def locked_out(what: str, properties: "dict[int, int]") -> RetryLater:
    """The error that `what` is, with the TPM's own recovery time."""
    recovery_s = properties.get(PT_LOCKOUT_INTERVAL)
    return RetryLater("tpm.locked_out", f"{what}; it forgets one every {recovery_s or '?'} s", recovery_s)
