"""What a TPM is asked for, step by step: its keys, the import of a key, signatures. Once, for every way to a TPM.

Two sets of `Commands` carry it: bytes of our own (`dps_hal.tpm.wire`), and tpm2-tss (`dps_hal.host.esys`). What is here
asks them for one TPM command at a time, and decides which comes next and what its answer means. `Operations` below it
knows no keys: it repeats an operation, ends connections, and flushes. What only Linux asks for is in
`dps_hal.host.service_tpm`, what a board seldom asks for in `dps_hal.tpm.upkeep`, which is loaded when it is asked.

Each thing stands on the one before, and is made when it is first needed on a connection:

1. The EK is read, or made and made persistent, and checked against its template. The name of the first one that is seen
   is pinned: another one later is no TPM of ours.
2. The session is salted to the EK. From here on every secret is encrypted, and every answer is proved by its HMAC.
3. The SRK is read, looked for at other handles, or made; and proved in the session. Where it has no room in NV memory
   it is a transient object, and the same one at every start.
4. A policy session shows that we know the endorsement hierarchy's password; a credential is activated with it. The
   session serves twice, for a registration has two.
5. The key in the credential is imported under the SRK, or a key that was wrapped before is loaded, used and flushed.

`_ek`, `_srk`, `_session` and `_policy` belong to a connection, and `_forget_connection` forgets them; a key at a
persistent handle is read again on the next one, because nobody says what happened to the TPM meanwhile.
`_pinned_name` and `_ek_name` outlive connections. No other key is remembered: wrapped keys are the caller's.

What a step raises: RefusedError where the TPM refused a command, which `Operations` makes an error of ours or tries
again; AskOperator and the like where one of our checks failed, which is doubted as well.
"""

from dps_hal.contracts import EK_HANDLE, SRK_HANDLE
from dps_hal.errors import AskOperator
from dps_hal.tpm.commands import ENDORSEMENT, NULL, OWNER
from dps_hal.tpm.errors import RC_NV_SPACE, RefusedError
from dps_hal.tpm.keys import check_ek_public, check_srk_public, has_no_da, object_name, srk_template, unwrap, wrap
from dps_hal.tpm.keys import ek_template as template_of_ek
from dps_hal.tpm.operations import Operations
from dps_hal.tpm.rules import (
    KEY_CREATION_LIMIT_S,
    MAX_BUFFER_BYTES,
    PERSISTENT,
    Passwords,
    is_srk,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, TypeVar

    from dps_hal.contracts import TpmCondition
    from dps_hal.tpm.activation import Activation
    from dps_hal.tpm.commands import Commands, Key

    Answer = TypeVar("Answer")

_LAST_SRK_HANDLE = 0x810000FF  # where ours goes when the usual handle is taken; keys for other uses begin behind it


class TpmProcedure(Operations):
    """A `Tpm` over `commands`, as a board has it (`BoardTpm`).

    One HMAC session salted to the EK, with AES-128-CFB parameter encryption, carries everything secret from the
    first key on, and its HMAC proves every answer; hierarchy passwords only ever travel as HMAC in such a session.
    """

    def __init__(
        self,
        commands: "Commands",
        *,
        ek_template: str = "tcg-l1",
        ek_handle: int = EK_HANDLE,
        srk_handle: int = SRK_HANDLE,
        owner_auth: bytes = b"",
        endorsement_auth: bytes = b"",
        exclusive: bool = False,
    ) -> None:
        """Does not touch the TPM yet.

        `exclusive`: nobody else ever uses this TPM, so whatever a crash left in it is flushed when it is opened.
        """
        super().__init__(commands, Passwords(owner_auth, endorsement_auth), exclusive)
        template_of_ek(ek_template)  # a name of no template is refused here, and the template made where a key is
        self._ek_template = ek_template
        self._ek_handle = ek_handle
        self._srk_handle = srk_handle
        self._ek_name = b""  # the name of the EK to make where none is there: the record's, then the pinned one's
        self._pinned_name = b""  # of the first EK seen; nothing is ever salted to another
        self.srk_found_at: int | None = None  # `TpmService` says what it is for

    def _forget_connection(self) -> None:
        super()._forget_connection()
        self._ek: Key | None = None
        self._srk: Key | None = None
        self._session: Any = None
        self._policy: Any = None  # a policy session that was used once, and serves once more

    # --- the contract

    def endorsement_key(self, name: bytes = b"") -> bytes:
        """As `Tpm.endorsement_key`; AskOperator `tpm.ek_unsuitable` where something else is at the EK's handle."""
        self._ek_name = name or self._ek_name
        return self._operate(lambda: self._endorsement_key().public)

    def storage_root_key(self) -> bytes:
        """As `Tpm.storage_root_key`; where the handle is taken, ours is at the next free one."""
        return self._operate(lambda: self._storage_root_key().public)

    def import_key(self, activation: bytes) -> bytes:
        """As `Tpm.import_key`."""
        from dps_hal.tpm.activation import parse_activation

        parsed = parse_activation(activation)
        return self._operate(lambda: self._import_key(parsed))

    def sign(self, wrapped_key: bytes, message: bytes) -> bytes:
        """As `Tpm.sign`, for messages of any length; RetryLater `tpm.locked_out` one failure before a lockout.

        A message of more than 1024 bytes costs two commands more, and one for every further 1024.
        """
        public, private = unwrap(wrapped_key)

        def sign(key: "Key") -> bytes:
            if not has_no_da(public):
                from dps_hal.tpm.verdicts import refuse_at_the_brink

                refuse_at_the_brink(self._commands)
                self._shutdown_due = True
            return self._hmac(key, message)

        return self._operate(lambda: self._with_loaded(public, private, sign))

    def endorsement_certificate(self) -> "bytes | None":
        """As `BoardTpm.endorsement_certificate`; what follows the DER in the index is cut off."""
        from dps_hal.tpm.upkeep import EK_CERTIFICATE_INDEX, without_padding

        content = self._operate(lambda: self._nv_content(EK_CERTIFICATE_INDEX, self._salted_session))
        return None if content is None else without_padding(content)

    def condition(self) -> "TpmCondition":
        """As `BoardTpm.condition`."""
        from dps_hal.tpm.upkeep import condition

        return self._operate(lambda: condition(self._commands))

    def _nv_content(self, index: int, session_of: "Callable[[], Any]") -> "bytes | None":
        from dps_hal.tpm.upkeep import nv_content

        return nv_content(self._commands, index, session_of, self._auth(OWNER))

    # --- objects and sessions

    def _salted_session(self) -> "Any":
        """The HMAC session of this connection, salted to the EK."""
        if self._session is None:
            self._session = self._start_session(self._endorsement_key())
        return self._session

    def _start_session(self, salt_key: "Key") -> "Any":
        return self._made(self._commands.start_session, salt_key)

    def _endorsement_key(self) -> "Key":
        if self._ek is None:
            ek = self._present(self._ek_handle) or self._create_ek()
            check_ek_public(ek.public)
            # The name stands for the whole public area: it is the SHA-256 of that, made here, for the check has left no
            # other nameAlg. Who finds another area with the same one deceives TPMs, too: they know keys by it.
            name = object_name(ek.public)
            if self._pinned_name not in {b"", name}:
                raise AskOperator("tpm.ek_changed", "the TPM shows another endorsement key than before")
            self._pinned_name = self._ek_name = name
            self._ek = ek
        return self._ek

    def _create_ek(self) -> "Key":
        """A new EK, made persistent.

        A password is only ever given to a session salted to a key of the NULL hierarchy; where both are empty there
        is nothing to hide.
        """
        from dps_hal.tpm.upkeep import make_ek, nv_content

        session: Any = None
        held = len(self._held)
        try:
            if self._auth(OWNER) or self._auth(ENDORSEMENT):
                primary = self._create_primary(NULL, srk_template(), None)
                check_srk_public(primary.public)
                session = self._start_session(primary)

            def create(template: bytes) -> "Key":
                key = self._create_primary(ENDORSEMENT, template, session)
                check_ek_public(key.public)
                return key

            created = make_ek(
                self._ek_template,
                # As `_nv_content`, and this is where a board's stack is deepest.
                lambda index: nv_content(self._commands, index, lambda: session, self._auth(OWNER)),
                create,
                self._ek_name,
            )
            return self._evict_control(created, self._ek_handle, session)
        finally:
            for made in reversed(self._held[held:]):
                self._flush(made)

    def _storage_root_key(self) -> "Key":
        """The SRK, proved by the session: the holder of the EK took a command for an object of this name.

        1. It is at its handle. 2. Something else is there: the SRK is looked for at the handles behind it. 3. It is
        nowhere: it is made. Without the proof, somebody on the bus could show a key of his own, and the registration
        would be for that.
        """
        if self._srk is None:
            srk = self._present(self._srk_handle)
            free_handle = self._srk_handle
            if srk is not None and not is_srk(srk.public):
                srk, free_handle = self._look_for_srk()
            if srk is None:
                srk = self._create_srk(free_handle)
            else:
                self._commands.prove(srk, self._salted_session())
            self._srk = srk
            self.srk_found_at = srk.handle if srk.handle >= PERSISTENT else 0
        return self._srk

    def _look_for_srk(self) -> "tuple[Key | None, int]":
        """Our SRK at another handle than the usual one, or None and the first free handle."""
        free_handle = SRK_HANDLE + 1
        for handle in self._commands.handles(free_handle):
            if handle > _LAST_SRK_HANDLE:
                break
            key = self._present(handle)
            if key is not None and is_srk(key.public):
                return key, handle
            if handle == free_handle:
                free_handle += 1
        return None, free_handle

    def _create_srk(self, handle: int) -> "Key":
        session = self._salted_session()
        created = self._create_primary(OWNER, srk_template(), session)
        flush = True
        try:
            check_srk_public(created.public)
            return self._evict_control(created, handle, session)
        except RefusedError as refused:
            if refused.code != RC_NV_SPACE:
                raise refused
            flush = False
            return created  # a transient serves as well: the same template gives the same key at every start
        finally:
            if flush:
                self._flush(created)

    def _create_primary(self, hierarchy: int, template: bytes, session: "Any") -> "Key":
        """A new transient primary key, held; the caller checks it against its template."""
        self.creates_key = True
        commands = self._commands
        commands.extend(KEY_CREATION_LIMIT_S)
        auth = b"" if hierarchy == NULL else self._auth(hierarchy)
        try:
            created: Key = self._made(commands.create_primary, hierarchy, template, session, auth)
        except RefusedError as refused:
            refused.of_owner = hierarchy == OWNER
            raise refused
        return created

    def _auth(self, hierarchy: int) -> bytes:
        return self._passwords.of(hierarchy == OWNER)

    def _evict_control(self, key: "Key", persistent_handle: int, session: "Any") -> "Key":
        """Makes a transient key persistent, or removes a persistent one."""
        return self._commands.evict_control(key, persistent_handle, session, self._auth(OWNER))

    def _present(self, handle: int) -> "Key | None":
        """The object at a persistent handle, or None where there is none."""
        try:
            return self._commands.read_public(handle)
        except RefusedError as refused:
            if refused.unknown_handle:
                return None
            raise refused

    def _with_loaded(self, public: bytes, private: bytes, work: "Callable[[Key], Answer]") -> "Answer":
        """What `work` makes of a wrapped key, loaded under the SRK for a while."""
        srk = self._storage_root_key()
        key = self._made(self._commands.load, srk, public, private, self._salted_session())
        try:
            return work(key)
        finally:
            self._flush(key)

    # --- what the operations do

    def _policy_of(self, hierarchy: int, policy: "Any" = None) -> "Any":
        """A policy session, a new one for None, to which we have shown that we know the hierarchy's password."""
        session = self._salted_session()
        policy = policy or self._made(self._commands.start_policy)
        try:
            self._commands.policy_secret(hierarchy, policy, session, self._auth(hierarchy))
        except RefusedError as refused:
            refused.of_owner = hierarchy == OWNER
            self._flush(policy)
            raise refused
        return policy

    def _import_key(self, activation: "Activation") -> bytes:
        commands = self._commands
        session = self._salted_session()
        ek, srk = self._endorsement_key(), self._storage_root_key()
        # One policy session for challenge and hub key: after the first use the TPM has reset it, after the second it is
        # gone. Where there is no second use, release() flushes it.
        used, self._policy = self._policy, None
        policy = self._policy_of(ENDORSEMENT, used)
        try:
            inner_key = commands.activate_credential(ek, srk, activation, session, policy, used is None)
            if used is None:
                self._policy = policy
            else:
                self._held.remove(policy)  # the TPM has freed the session by itself
        finally:
            if self._policy is None:
                self._flush(policy)
        try:
            private = commands.import_key(srk, inner_key, activation, session)
        except RefusedError as refused:
            from dps_hal.tpm.verdicts import check_duplicate_fits

            check_duplicate_fits(refused, activation.duplicate)
            raise refused
        if not has_no_da(activation.id_key_public):
            self._with_loaded(activation.id_key_public, private, self._try_out)
        return wrap(activation.id_key_public, private)

    def _try_out(self, key: "Key") -> None:
        """The first use of a key without noDA: AskOperator `dps.key_unsuitable` where it has a password of its own."""
        from dps_hal.tpm.verdicts import own_password, refuse_untried

        refuse_untried(self._commands)
        self._shutdown_due = True
        try:
            self._hmac(key, b"")
        except RefusedError as refused:
            raise own_password(refused) if refused.by_key else refused

    def _hmac(self, key: "Key", message: bytes) -> bytes:
        commands = self._commands
        session = self._salted_session()
        if len(message) <= MAX_BUFFER_BYTES:
            return commands.hmac(key, message, session)
        sequence = self._made(commands.hmac_start, key, session)
        try:
            at = 0
            while len(message) - at > MAX_BUFFER_BYTES:
                commands.sequence_update(sequence, message[at : at + MAX_BUFFER_BYTES], session)
                at += MAX_BUFFER_BYTES
            digest = commands.sequence_complete(sequence, message[at:], session)
            self._held.remove(sequence)  # the TPM has freed the sequence by itself
        finally:
            self._flush(sequence)
        return digest
