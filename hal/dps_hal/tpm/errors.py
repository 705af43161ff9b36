"""A refused TPM command, by its return code; `dps_hal.tpm.verdicts` has what to do about it.

Return codes: TPM 2.0 Library Part 2, 6.6. Above bit 15 a code says who reports it (TSS2 Overview and Common
Structures, 3.1); the back end without a TSS uses two of those for what it finds out itself.
"""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

RC_BAD_TAG: "Final" = 0x01E  # a TPM 1.2 answers nothing else
RC_INITIALIZE: "Final" = 0x100  # TPM_RC, Part 2, table 17, with the next seven
RC_SEQUENCE: "Final" = 0x103
RC_NV_UNINITIALIZED: "Final" = 0x14A
RC_NV_SPACE: "Final" = 0x14B
RC_RESEND: "Final" = (0x908, 0x90A, 0x920, 0x922)  # YIELDED, TESTING, NV_RATE, RETRY: the same command again
RC_REFERENCE_H0: "Final" = 0x910  # from here to REFERENCE_S6: a handle or session that is not loaded
RC_REFERENCE_S6: "Final" = 0x91E
FMT1_HANDLE: "Final" = 0x8B  # format-one codes without the number of the handle, parameter or session
_FMT1_VALUE = 0x84
_FMT1_AUTH_FAIL = 0x8E
FMT1_AUTH: "Final" = (_FMT1_AUTH_FAIL, 0xA2)  # and BAD_AUTH: a wrong password, or a command that was altered on its way

LAYER_ESYS: "Final" = 7
LAYER_SYS: "Final" = 8
LAYER_MARSHALLING: "Final" = 9
_LAYER_TCTI = 10
TPM_LAYERS: "Final" = (0, 11, 12)  # the TPM, or a resource manager that speaks for it
RC_TOO_LARGE: "Final" = 0x90006  # TSS2_MU_RC_INSUFFICIENT_BUFFER: more than a TPM command holds
RC_CONNECTION_LOST: "Final" = 0xA000A  # TSS2_TCTI_RC_IO_ERROR
RC_ALTERED: "Final" = 0x7001B  # TSS2_ESYS_RC_RSP_AUTH_FAILED: the answer is not what the TPM sent

_ON_HIERARCHIES = ("policy_secret", "create_primary", "evict_control")
_BY_KEY = ("hmac", "hmac_start", "sign")  # the session is for the key that is used


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
        self.unknown_handle = self.base == FMT1_HANDLE  # the TPM has not, or no longer, what we mean
        self.altered_handle = self.base == _FMT1_VALUE  # no TPM gives such a handle: the one that we got was altered
        if self.altered_handle and not self.parameter and not unnumbered:
            self.altered = True
        self.connection_lost = self.layer == _LAYER_TCTI  # the TPM cannot be reached any more over this connection
        self.wrong_auth = self.base in FMT1_AUTH  # a password that the TPM did not take, or a command that was altered
        self.by_key = self.wrong_auth and command in _BY_KEY  # the key that is used refused its empty password
        # The TPM took it for a failed guess and counted that towards its lockout: it is not tried again.
        self.counted = self.base == _FMT1_AUTH_FAIL and command in _BY_KEY
        # The connection, a session or a handle is no longer what it was: the TPM restarted or was cleared.
        self.stale = (
            (self.layer not in TPM_LAYERS and self.layer != LAYER_MARSHALLING)
            or RC_REFERENCE_H0 <= self.code <= RC_REFERENCE_S6
            or self.altered
            or (self.unknown_handle and not self.parameter)
            or (self.wrong_auth and command not in _ON_HIERARCHIES and command != "nv_read")
        )

    @property
    def wrong_password(self) -> bool:
        """Whether what we gave is not the password of the owner's or the endorsement hierarchy, see `of_owner`."""
        return self.wrong_auth and (self.command in _ON_HIERARCHIES or self.of_owner)
