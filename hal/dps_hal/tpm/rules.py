"""What every back end of a real TPM does alike in a registration: commands, limits, passwords, what is our SRK."""

from dps_hal.errors import AskOperator
from dps_hal.tpm.keys import check_srk_public

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

    from dps_hal.tpm.errors import RefusedError

CODES: "Final" = {  # TPM_CC by our names, Part 2, table 12
    "evict_control": 0x120,
    "create_primary": 0x131,
    "sequence_complete": 0x13E,
    "startup": 0x144,
    "shutdown": 0x145,
    "activate_credential": 0x147,
    "nv_read": 0x14E,
    "policy_secret": 0x151,
    "create": 0x153,
    "hmac": 0x155,
    "import": 0x156,
    "load": 0x157,
    "hmac_start": 0x15B,
    "sequence_update": 0x15C,
    "sign": 0x15D,
    "flush_context": 0x165,
    "nv_read_public": 0x169,
    "read_public": 0x173,
    "start_auth_session": 0x176,
    "get_capability": 0x17A,
}

MAX_BUFFER_BYTES: "Final" = 1024  # TPM2B_MAX_BUFFER of the PC Client Platform TPM Profile; longer is a sequence
MAX_AUTH_BYTES: "Final" = 64  # TPM2B_AUTH
# One operation of the Tpm contract in all, a second try included; its last command may take LEAST_LIMIT_S longer. Who
# calls it from a thread gives it longer than that, so that the clean error comes first.
COMMAND_LIMIT_S: "Final" = 20.0
KEY_CREATION_LIMIT_S: "Final" = 170.0  # one that creates a key: RSA-2048 takes up to minutes on slow parts
RELEASE_LIMIT_S: "Final" = 5.0
LEAST_LIMIT_S: "Final" = 5.0  # for one command: given up half-way it leaves in the TPM what only its answer names

PT_PERMANENT: "Final" = 0x200  # TPM_PT, TPM 2.0 Library Part 2, table 24
OWNER_AUTH_SET: "Final" = 1  # TPMA_PERMANENT, Part 2, table 36, with the next
ENDORSEMENT_AUTH_SET: "Final" = 2
_OWNER_SETTING = "owner_auth_file"
_ENDORSEMENT_SETTING = "endorsement_auth_file"

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


class Passwords:
    """The passwords of the owner's and the endorsement hierarchy, as the settings have them.

    TPM2_Clear takes both away. Where the TPM then refuses what the settings have, and says that there is none, the
    empty one is used until the connection ends; `unneeded` names the settings of those, for a warning. A lie about
    that costs a refusal: nothing is shown with an empty password that a wrong one would hide.
    """

    def __init__(self, owner_auth: bytes, endorsement_auth: bytes) -> None:
        """AskOperator `config.invalid` where one is longer than a TPM takes.

        One that has an attribute `odd` brings along what looks accidental in it; that goes into a refusal's message.
        """
        self.unneeded: tuple[str, ...] = ()
        self._given = {}
        self._odd = {}
        for setting, auth in ((_OWNER_SETTING, owner_auth), (_ENDORSEMENT_SETTING, endorsement_auth)):
            if len(auth) > MAX_AUTH_BYTES:
                raise AskOperator(
                    "config.invalid", f"{setting}: expected at most {MAX_AUTH_BYTES} bytes; came {len(auth)}"
                )
            self._odd[setting] = getattr(auth, "odd", "")
            self._given[setting] = auth.rstrip(b"\x00")  # as the TPM takes it, Part 1, 19.6.4.3
        self.restore()

    def restore(self) -> None:
        """From now on those of the settings are used."""
        self._used = dict(self._given)

    def of(self, owner: bool) -> bytes:
        """The password to use for the owner's hierarchy, or for the endorsement's."""
        return self._used[_OWNER_SETTING if owner else _ENDORSEMENT_SETTING]

    def go_without(self, refused: "RefusedError", properties: "dict[int, int]") -> bool:
        """Whether the command that was refused for a wrong password makes sense again: its hierarchy has none."""
        before = self.of(refused.of_owner)
        refused.odd = self._odd[_OWNER_SETTING if refused.of_owner else _ENDORSEMENT_SETTING]
        for setting, flag in ((_OWNER_SETTING, OWNER_AUTH_SET), (_ENDORSEMENT_SETTING, ENDORSEMENT_AUTH_SET)):
            if self._used[setting] and properties.get(PT_PERMANENT, flag) & flag == 0:
                self._used[setting] = b""
                if setting not in self.unneeded:
                    self.unneeded += (setting,)
        return self.of(refused.of_owner) != before


def is_srk(public: bytes) -> bool:
    """Whether a TPM2B_PUBLIC is a storage root key of the TCG template."""
    try:
        check_srk_public(public)
    except AskOperator:
        return False
    return True
