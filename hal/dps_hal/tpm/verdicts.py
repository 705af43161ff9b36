"""What a refused TPM command leads to: by return code, never by text; one table for every back end.

Loaded when a TPM has refused something, or could lock a key out: most registrations do not need it. Return codes: see
`dps_hal.tpm.errors`.
"""

from dps_hal.errors import AskOperator, IdentityStale, RetryLater
from dps_hal.tpm.errors import (
    FMT1_AUTH,
    FMT1_HANDLE,
    RC_BAD_TAG,
    RC_INITIALIZE,
    RC_NV_SPACE,
    RC_REFERENCE_H0,
    RC_REFERENCE_S6,
    RC_RESEND,
)
from dps_hal.tpm.keys import MAX_HMAC_KEY_BYTES, SHA256_BYTES
from dps_hal.tpm.rules import PT_LOCKOUT_COUNTER, PT_LOCKOUT_INTERVAL

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from dps_hal.errors import DpsError
    from dps_hal.tpm.commands import Commands
    from dps_hal.tpm.errors import RefusedError

_RC_FAILURE = 0x101  # TPM_RC, Part 2, table 17, with the next eight
_RC_DISABLED = 0x120
_RC_UPGRADE = 0x12D
_RC_AUTH_UNAVAILABLE = 0x12F
_RC_REBOOT = 0x130
_RC_COMMAND_CODE = 0x143
_RC_LOCKOUT = 0x921
_RC_NV_UNAVAILABLE = 0x923
_RC_OUT_OF_MEMORY = (0x902, 0x903, 0x904, 0x905, 0x906)  # objects, sessions, memory, their handles
_FMT1_HIERARCHY = 0x85  # format-one codes without the number of the handle, parameter or session
_FMT1_SIZE = 0x95
_FMT1_INSUFFICIENT = 0x9A
_FMT1_POLICY_FAIL = 0x9D
_FMT1_INTEGRITY = 0x9F
_BY_SRK = ("activate_credential", "create", "import", "load")  # the first session is for the storage root key
_RECOVERY_LIMIT_S = 86400
_VERDICTS = 3  # after so many, no two of which agree, we give up
# Two integrity digests and a seed value with their sizes, type, empty authorisation, the key's size, the key.
_LONGEST_DUPLICATE = 3 * (2 + SHA256_BYTES) + 2 + 2 + 2 + 2 + MAX_HMAC_KEY_BYTES


def error_of(refused: "RefusedError", locked_out: "Callable[[str], RetryLater]") -> "DpsError":
    """The class of error that a refused command is; `locked_out(what)` adds the TPM's own recovery time."""
    command, code, base = refused.command, refused.code, refused.base
    message = f"the TPM refused {command} with 0x{refused.rc:x}"
    if refused.text:
        message += ": " + refused.text
    if refused.connection_lost:
        return RetryLater("tpm.absent", f"the connection to the TPM broke in {command}: {refused.text}")
    if refused.rc == RC_BAD_TAG:
        return AskOperator(
            "tpm.unsupported", f"{message}: this is a TPM 1.2, or switched to be one; it takes a TPM 2.0"
        )
    if refused.altered or (command == "read_public" and base in FMT1_AUTH):  # ReadPublic needs no password
        return RetryLater("tpm.bus_altered", f"{command}: expected the TPM's own answer; came one altered on its way")
    if command == "start_auth_session" and refused.parameter == 2:  # the salt is for a key that this TPM has not
        return RetryLater("tpm.bus_altered", f"{message}: the endorsement key that it shows is not its own")
    if code in RC_RESEND:
        return RetryLater("tpm.timeout", f"the TPM was not ready for {command} in time (0x{code:x})")
    if code == _RC_NV_UNAVAILABLE:
        return RetryLater("tpm.nv_unavailable", f"{message}: it cannot write its memory now")
    if code == _RC_LOCKOUT:
        return locked_out("the TPM is locked out")
    if code in _RC_OUT_OF_MEMORY:
        return RetryLater("tpm.memory", message)
    if command == "activate_credential" and (refused.about_content or code == _RC_FAILURE):
        return IdentityStale("tpm.blob_refused", message)
    if command == "import" and (refused.about_content or code == _RC_FAILURE):
        # Parameter 4 is the seed, which only this SRK can decrypt. With another inner key the duplicate decrypts to
        # random bytes, whose first two are a size that does not fit, or whose integrity is wrong.
        altered = base in (_FMT1_SIZE, _FMT1_INSUFFICIENT, _FMT1_INTEGRITY)
        if altered or refused.parameter == 4 or code == _RC_FAILURE:
            return IdentityStale("tpm.blob_refused", message)
        return AskOperator("tpm.key_refused", message)
    if command == "load" and refused.about_content:
        return IdentityStale("tpm.key_stale", message)
    if code == _RC_FAILURE:
        return AskOperator("tpm.failure_mode", message)
    if code in (RC_INITIALIZE, _RC_REBOOT):
        return AskOperator("tpm.not_started", f"{message}: it has to be started anew by the machine's firmware")
    if code == _RC_UPGRADE:
        return AskOperator("tpm.upgrading", f"{message}: an upgrade of its own firmware is under way")
    if code == _RC_DISABLED or base == _FMT1_HIERARCHY:
        return AskOperator(
            "tpm.disabled", f"{message}: the TPM or one of its hierarchies is disabled in the machine's firmware setup"
        )
    if code == _RC_COMMAND_CODE:
        return AskOperator("tpm.unsupported", f"{message}: it does not have this command")
    if code == _RC_AUTH_UNAVAILABLE or base == _FMT1_POLICY_FAIL:
        return AskOperator("tpm.failed", f"{message}: it does not take the proof that the key's template asks for")
    if refused.wrong_password:
        hierarchy = "owner" if refused.of_owner else "endorsement"
        message += f": the {hierarchy} hierarchy has a password, which is not in {hierarchy}_auth_file"
        if refused.odd:
            message += f"; what is in there may not be what was meant: {refused.odd}"
        return AskOperator("tpm.hierarchy_auth", message)
    if refused.counted:  # the key has shown when it was imported that it has no password
        return RetryLater("tpm.bus_altered", f"{message}: expected it to take the command; it was altered on its way")
    if refused.by_key:
        return own_password(refused)
    if command in _BY_SRK and base in FMT1_AUTH:
        return AskOperator(
            "tpm.srk_unsuitable", f"{message}: the key at srk_handle has a password of its own: set another srk_handle"
        )
    if command == "evict_control" and code == RC_NV_SPACE:
        return AskOperator("tpm.nv_full", message)
    if command == "nv_read" and base in FMT1_AUTH:
        return AskOperator("tpm.certificate_locked", f"{message}: the index of the EK certificate has a password")
    if base in FMT1_AUTH:
        return AskOperator("tpm.failed", f"{message}: it does not take the proof that the command is ours, twice")
    if base == FMT1_HANDLE or RC_REFERENCE_H0 <= code <= RC_REFERENCE_S6:
        return AskOperator("tpm.failed", f"{message}: a key or session was gone twice; does another program clear it?")
    return AskOperator("tpm.failed", message)


def own_password(refused: "RefusedError") -> AskOperator:
    """The error for a key whose empty password the TPM refused: nobody was told another one."""
    return AskOperator(
        "dps.key_unsuitable",
        f"the key's password: expected an empty one; the TPM refused that in {refused.command} (0x{refused.rc:x})",
    )


class Doubts:
    """What the TPM has said in one operation that would stop us, and is asked again before it is believed.

    Most of a TPM's refusals, and what it shows of its keys, prove nothing, and neither SPI nor a socket notices a
    flipped bit: so a verdict counts when the same one has come twice, the second time over a new session. It counts as
    well where the TPM is so slow that it cannot be asked twice: else nobody would ever hear of it.
    """

    def __init__(self) -> None:
        self._said: list[tuple[str, str]] = []
        self._alone: DpsError | None = None  # the first verdict, while no other contradicts it

    def weigh(self, error: "DpsError", stale: bool, in_time: bool) -> "tuple[DpsError, bool]":
        """What to raise, and whether the operation is tried again instead.

        `stale`: what it refused was a session or handle that is no longer what it was, or an altered answer; `in_time`:
        what this operation has taken so far would fit once more into its time.
        """
        said = (error.code, error.message)
        known = said in self._said
        first = not self._said
        self._said.append(said)
        if isinstance(error, RetryLater):
            if self._alone is not None and error.code == "tpm.timeout":
                return self._alone, False
            return error, stale and first
        if known or not (stale or error.code.startswith("tpm.")):
            return error, False
        self._alone = error if first and not stale else None
        if self._alone is not None and not in_time:
            return error, False
        if len(self._said) < _VERDICTS:
            return error, True
        text = f"the TPM gave {_VERDICTS} different verdicts, the last: {error.message}"
        return RetryLater("tpm.bus_altered", text), False


def check_duplicate_fits(refused: "RefusedError", duplicate: bytes) -> None:
    """AskOperator `tpm.key_refused` where an Import was refused because the key in `duplicate` is too long."""
    if refused.base == _FMT1_SIZE and len(duplicate) > _LONGEST_DUPLICATE:
        raise AskOperator(
            "tpm.key_refused", f"expected an HMAC key of at most {MAX_HMAC_KEY_BYTES} bytes; came a longer one"
        )


def refuse_at_the_brink(commands: "Commands") -> None:
    """RetryLater `tpm.locked_out` where one more failure locks keys without noDA out."""
    properties = commands.properties(PT_LOCKOUT_COUNTER, PT_LOCKOUT_INTERVAL)
    counter, maximum = properties.get(PT_LOCKOUT_COUNTER, 0), properties.get(PT_LOCKOUT_COUNTER + 1, 2)
    if 0 < counter >= maximum - 1:
        raise locked_out(f"the TPM has counted {counter} of {maximum} failures", properties)


def refuse_untried(commands: "Commands") -> None:
    """RetryLater `tpm.locked_out` where the TPM has counted any failure: then no new key without noDA is tried out.

    AskOperator `tpm.lockout_maximum` where the first failure is a lockout, which no waiting changes.

    A key without noDA may have a password of its own, and only a guess shows it. One that fails is counted, so this
    keeps whoever hands such keys out, however often, from bringing the TPM more than one step towards its lockout.
    """
    properties = commands.properties(PT_LOCKOUT_COUNTER, PT_LOCKOUT_INTERVAL)
    counter, maximum = properties.get(PT_LOCKOUT_COUNTER, 0), properties.get(PT_LOCKOUT_COUNTER + 1, 2)
    if maximum < 2:
        raise AskOperator("tpm.lockout_maximum", "a new key without noDA is not tried out: one failure is a lockout")
    if counter:
        what = (
            f"the TPM has counted {counter} of {maximum} failures, and a new key without noDA waits until it has none"
        )
        raise locked_out(what, properties)


def locked_out(what: str, properties: "dict[int, int]") -> RetryLater:
    """The error that `what` is, with the TPM's own recovery time, of which nobody need wait more than a day at once."""
    recovery_s = properties.get(PT_LOCKOUT_INTERVAL) or 0  # unproved: whoever alters the bus can name 136 years
    text = f"{what}; it forgets one every {recovery_s or '?'} s"
    return RetryLater("tpm.locked_out", text, min(recovery_s, _RECOVERY_LIMIT_S) or None)
