"""What a refused TPM command means: by return code, never by text; one table for every back end.

Return codes: TPM 2.0 Library Part 2, 6.6. Above bit 15 a code says who reports it (TSS2 Overview and Common
Structures, 3.1); the back end without a TSS uses two of those for what it finds out itself.
"""

from dps_hal.errors import AskOperator, IdentityStale, RetryLater
from dps_hal.tpm.keys import MAX_HMAC_KEY_BYTES, SHA256_BYTES

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Final

    from dps_hal.errors import DpsError

RC_BAD_TAG: "Final" = 0x01E  # all that a TPM 1.2 answers
RC_INITIALIZE: "Final" = 0x100  # TPM_RC, Part 2, table 17, with the next sixteen
RC_FAILURE: "Final" = 0x101
RC_SEQUENCE: "Final" = 0x103
_RC_DISABLED = 0x120
_RC_UPGRADE = 0x12D
_RC_AUTH_UNAVAILABLE = 0x12F
_RC_REBOOT = 0x130
_RC_COMMAND_CODE = 0x143
RC_NV_UNINITIALIZED: "Final" = 0x14A
RC_NV_SPACE: "Final" = 0x14B
RC_LOCKOUT: "Final" = 0x921
_RC_NV_UNAVAILABLE = 0x923
RC_RESEND: "Final" = (0x908, 0x90A, 0x920, 0x922)  # YIELDED, TESTING, NV_RATE, RETRY: the same command again
_RC_OUT_OF_MEMORY = (0x902, 0x903, 0x904, 0x905, 0x906)  # objects, sessions, memory, their handles
_RC_REFERENCE_H0 = 0x910  # from here to REFERENCE_S6: a handle or session that is not loaded
_RC_REFERENCE_S6 = 0x91E
_FMT1_HANDLE = 0x8B  # format-one codes without the number of the handle, parameter or session
_FMT1_VALUE = 0x84
_FMT1_HIERARCHY = 0x85
_FMT1_SIZE = 0x95
_FMT1_INSUFFICIENT = 0x9A
_FMT1_POLICY_FAIL = 0x9D
_FMT1_INTEGRITY = 0x9F
_FMT1_AUTH_FAIL = 0x8E
_FMT1_AUTH = (_FMT1_AUTH_FAIL, 0xA2)  # and BAD_AUTH: a wrong password, or a command that was altered on its way

LAYER_ESYS: "Final" = 7
LAYER_SYS: "Final" = 8
LAYER_MARSHALLING: "Final" = 9
_LAYER_TCTI = 10
TPM_LAYERS: "Final" = (0, 11, 12)  # the TPM, or a resource manager that speaks for it
RC_TOO_LARGE: "Final" = 0x90006  # TSS2_MU_RC_INSUFFICIENT_BUFFER: more than a TPM command holds
RC_CONNECTION_LOST: "Final" = 0xA000A  # TSS2_TCTI_RC_IO_ERROR
RC_ALTERED: "Final" = 0x7001B  # TSS2_ESYS_RC_RSP_AUTH_FAILED: the answer is not what the TPM sent

_ON_HIERARCHIES = ("policy_secret", "create_primary", "evict_control")
_BY_KEY = ("hmac", "hmac_start")  # the session is for the key that is used
_BY_SRK = ("activate_credential", "import", "load")  # the first session is for the storage root key
# Two integrity digests and a seed value with their sizes, type, empty authorisation, the key's size, the key.
_VERDICTS = 3  # of which no two agree, and we give up
_LONGEST_DUPLICATE = 3 * (2 + SHA256_BYTES) + 2 + 2 + 2 + 2 + MAX_HMAC_KEY_BYTES


class RefusedError(Exception):
    """One command that did not succeed: its name, such as `activate_credential`, its return code, a text for it."""

    def __init__(self, command: str, rc: int, text: str = "") -> None:
        super().__init__(command, rc)
        self.command = command
        self.rc = rc
        self.text = text
        self.of_owner = command == "evict_control"  # it asked for the owner's authorisation, not the endorsement's
        self.odd = ""  # what looks accidental in the password that was refused, such as "it ends with a blank"
        self.layer = rc >> 16 & 0xFF
        self.code = rc & 0xFFFF if self.layer in TPM_LAYERS else 0
        format_one = self.code & 0x80 != 0
        self.base = self.code & 0xBF if format_one else 0
        self.parameter = self.code >> 8 & 0xF if format_one and self.code & 0x40 else 0
        # About what was sent: of the library, about a parameter, or about none of handles, sessions and parameters.
        unnumbered = format_one and self.code & 0xF00 == 0
        self.about_content = self.layer == LAYER_MARSHALLING or self.parameter != 0 or unnumbered
        # Not what the TPM sent: found out by us or by the library, or a number that no TPM 2.0 returns, whose bits 7
        # and 8 are not both 0 and which has no more than 12; whether a layer 13 or above says something, nobody knows.
        of_tpm = rc <= 0xFFF and rc & 0x180 != 0
        self.altered = rc == RC_ALTERED or (self.layer == 0 and not of_tpm) or self.layer > TPM_LAYERS[-1]
        self.unknown_handle = self.base == _FMT1_HANDLE  # the TPM has not, or no longer, what we mean
        self.altered_handle = self.base == _FMT1_VALUE  # no TPM gives such a handle: the one that we got was altered
        if self.altered_handle and not self.parameter and not unnumbered:
            self.altered = True

    @property
    def connection_lost(self) -> bool:
        """Whether the TPM cannot be reached any more over this connection."""
        return self.layer == _LAYER_TCTI

    @property
    def stale(self) -> bool:
        """Whether the connection, a session or a handle is no longer what it was: the TPM restarted or was cleared."""
        if self.layer not in TPM_LAYERS and self.layer != LAYER_MARSHALLING:
            return True
        if _RC_REFERENCE_H0 <= self.code <= _RC_REFERENCE_S6:
            return True
        if self.altered or (self.base == _FMT1_HANDLE and not self.parameter):
            return True
        return self.base in _FMT1_AUTH and self.command not in _ON_HIERARCHIES and self.command != "nv_read"

    @property
    def counted(self) -> bool:
        """Whether the TPM took it for a failed guess and counted that towards its lockout: it is not tried again."""
        return self.base == _FMT1_AUTH_FAIL and self.command in _BY_KEY

    @property
    def by_key(self) -> bool:
        """Whether the key that is used refused its empty password."""
        return self.base in _FMT1_AUTH and self.command in _BY_KEY

    @property
    def wrong_password(self) -> bool:
        """Whether what we gave is not the password of the owner's or the endorsement hierarchy, see `of_owner`."""
        return self.wrong_auth and (self.command in _ON_HIERARCHIES or self.of_owner)

    @property
    def wrong_auth(self) -> bool:
        """Whether the TPM did not take a password, or a command that was altered."""
        return self.base in _FMT1_AUTH


def error_of(refused: RefusedError, locked_out: "Callable[[str], RetryLater]") -> "DpsError":
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
    if refused.altered or (command == "read_public" and base in _FMT1_AUTH):  # which needs no password
        return RetryLater("tpm.bus_altered", f"{command}: expected the TPM's own answer; came one altered on its way")
    if command == "start_auth_session" and refused.parameter == 2:  # the salt is for a key that this TPM has not
        return RetryLater("tpm.bus_altered", f"{message}: the endorsement key that it shows is not its own")
    if code in RC_RESEND:
        return RetryLater("tpm.timeout", f"the TPM was not ready for {command} in time (0x{code:x})")
    if code == _RC_NV_UNAVAILABLE:
        return RetryLater("tpm.nv_unavailable", f"{message}: it cannot write its memory now")
    if code == RC_LOCKOUT:
        return locked_out("the TPM is locked out")
    if code in _RC_OUT_OF_MEMORY:
        return RetryLater("tpm.memory", message)
    if command == "activate_credential" and (refused.about_content or code == RC_FAILURE):
        return IdentityStale("tpm.blob_refused", message)
    if command == "import" and (refused.about_content or code == RC_FAILURE):
        # Parameter 4 is the seed, which only this SRK can decrypt. With another inner key the duplicate decrypts to
        # random bytes, whose first two are a size that does not fit, or whose integrity is wrong.
        altered = base in (_FMT1_SIZE, _FMT1_INSUFFICIENT, _FMT1_INTEGRITY)
        if altered or refused.parameter == 4 or code == RC_FAILURE:
            return IdentityStale("tpm.blob_refused", message)
        return AskOperator("tpm.key_refused", message)
    if command == "load" and refused.about_content:
        return IdentityStale("tpm.key_stale", message)
    if code == RC_FAILURE:
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
    if refused.counted:  # by a key that has shown when it was imported that it has no password
        return RetryLater("tpm.bus_altered", f"{message}: expected it to take the command; it was altered on its way")
    if refused.by_key:
        return own_password(refused)
    if command in _BY_SRK and base in _FMT1_AUTH:
        return AskOperator(
            "tpm.srk_unsuitable", f"{message}: the key at srk_handle has a password of its own: set another srk_handle"
        )
    if command == "evict_control" and code == RC_NV_SPACE:
        return AskOperator("tpm.nv_full", message)
    if command == "nv_read" and base in _FMT1_AUTH:
        return AskOperator("tpm.certificate_locked", f"{message}: the index of the EK certificate has a password")
    if base in _FMT1_AUTH:
        return AskOperator("tpm.failed", f"{message}: it does not take the proof that the command is ours, twice")
    if base == _FMT1_HANDLE or _RC_REFERENCE_H0 <= code <= _RC_REFERENCE_S6:
        return AskOperator("tpm.failed", f"{message}: a key or session was gone twice; does another program clear it?")
    return AskOperator("tpm.failed", message)


def own_password(refused: RefusedError) -> AskOperator:
    """The error for a key whose empty password the TPM refused: nobody was told another one."""
    return AskOperator(
        "dps.key_unsuitable",
        f"the key's password: expected an empty one; the TPM refused that in {refused.command} (0x{refused.rc:x})",
    )


class Doubts:
    """What the TPM has said in one operation that would stop us, and is asked again before it is believed.

    Most of a TPM's refusals, and what it shows of its keys, prove nothing, and neither SPI nor a socket notices a
    flipped bit: so a verdict counts when the same one has come twice, the second time over a new session.
    """

    def __init__(self) -> None:
        self._said: list[tuple[str, str]] = []

    def weigh(self, error: "DpsError", stale: bool) -> "tuple[DpsError, bool]":
        """What to raise, and whether the operation is tried again instead.

        `stale`: what it refused was a session or handle that is no longer what it was, or an altered answer.
        """
        said = (error.code, error.message)
        known = said in self._said
        self._said.append(said)
        if isinstance(error, RetryLater):
            return error, stale and len(self._said) == 1
        if known or not (stale or error.code.startswith("tpm.")):
            return error, False
        if len(self._said) < _VERDICTS:
            return error, True
        text = f"the TPM gave {_VERDICTS} different verdicts, the last: {error.message}"
        return RetryLater("tpm.bus_altered", text), False


def check_duplicate_fits(refused: RefusedError, duplicate: bytes) -> None:
    """AskOperator `tpm.key_refused` where an Import was refused because the key in `duplicate` is too long."""
    if refused.base == _FMT1_SIZE and len(duplicate) > _LONGEST_DUPLICATE:
        raise AskOperator(
            "tpm.key_refused", f"expected an HMAC key of at most {MAX_HMAC_KEY_BYTES} bytes; came a longer one"
        )
