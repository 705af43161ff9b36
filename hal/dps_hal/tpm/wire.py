"""A real TPM as plain bytes, on CPython and MicroPython: no library, no compiler.

Commands and their parameters: TPM 2.0 Library Part 3. The transport decides where the TPM is.
"""

import struct

from dps_hal.contracts import EK_HANDLE, SRK_HANDLE
from dps_hal.errors import AskOperator
from dps_hal.tpm.activation import parse_activation
from dps_hal.tpm.commands import (
    ACTIVATE_CREDENTIAL,
    CREATE_PRIMARY,
    ENDORSEMENT,
    EVICT_CONTROL,
    HMAC,
    HMAC_START,
    IMPORT,
    LOAD,
    NULL,
    OWNER,
    POLICY_SECRET,
    READ_PUBLIC,
    SEQUENCE_COMPLETE,
    SEQUENCE_UPDATE,
    START_AUTH_SESSION,
    Connection,
    take_field,
)
from dps_hal.tpm.errors import RC_ALTERED, RC_NV_SPACE, RefusedError
from dps_hal.tpm.keys import (
    ALG_AES,
    ALG_CFB,
    ALG_SHA256,
    SHA256_BYTES,
    check_ek_public,
    check_srk_public,
    has_no_da,
    object_name,
    sized,
    srk_template,
    unwrap,
    wrap,
)
from dps_hal.tpm.keys import ek_template as template_of_ek
from dps_hal.tpm.operations import Operations
from dps_hal.tpm.rules import (
    KEY_CREATION_LIMIT_S,
    MAX_BUFFER_BYTES,
    PERSISTENT,
    PT_LOCKOUT_COUNTER,
    PT_LOCKOUT_INTERVAL,
    Passwords,
    is_srk,
    refuse_at_the_brink,
    refuse_untried,
)
from dps_hal.tpm.sessions import SaltedSession, start_policy_parameters, start_salted_parameters

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import NamedTuple, TypeVar

    from dps_hal.contracts import TpmCondition, WhileWaiting
    from dps_hal.tpm.activation import Activation
    from dps_hal.tpm.commands import Transport

    Answer = TypeVar("Answer")

    class Key(NamedTuple):
        """A key in the TPM."""

        handle: int
        public: bytes  # marshalled TPM2B_PUBLIC
        name: bytes  # empty where its name is not by SHA-256
else:
    from collections import namedtuple

    Key = namedtuple("Key", ("handle", "public", "name"))

_LAST_SRK_HANDLE = 0x810000FF  # where ours goes when the usual handle is taken; keys for other uses begin behind it
_AES_128_CFB = struct.pack(">HHH", ALG_AES, 128, ALG_CFB)


class WireTpm(Operations):
    """A `TpmService` behind any transport.

    One HMAC session salted to the EK, with AES-128-CFB parameter encryption, carries everything secret from the
    first key on, and its HMAC proves every answer; hierarchy passwords only ever travel as HMAC in such a session.
    `while_waiting` is called at least once a second while something blocks, and each command has a limit; on a device
    node neither holds while the kernel itself works on a command, as `DeviceTransport` says.
    """

    def __init__(
        self,
        transport: "Transport",
        *,
        ek_template: str = "tcg-l1",
        ek_handle: int = EK_HANDLE,
        srk_handle: int = SRK_HANDLE,
        owner_auth: bytes = b"",
        endorsement_auth: bytes = b"",
        while_waiting: "WhileWaiting | None" = None,
        exclusive: bool = False,
    ) -> None:
        """Does not touch the TPM yet.

        `exclusive`: nobody else ever uses this TPM, so whatever a crash left in it is flushed when it is opened.
        """
        super().__init__(Connection(transport, while_waiting), Passwords(owner_auth, endorsement_auth), exclusive)
        self._ek_template = template_of_ek(ek_template)
        self._ek_handle = ek_handle
        self._srk_handle = srk_handle
        self._ek_name = b""  # of the one to make where none is there: that of the record, then the pinned one
        self._pinned_ek = b""  # the first EK seen; nothing is ever salted to another
        self.srk_found_at: int | None = None  # see TpmService

    def _forget_connection(self) -> None:
        super()._forget_connection()
        self._ek: Key | None = None
        self._srk: Key | None = None
        self._session: SaltedSession | None = None

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
        parsed = parse_activation(activation)
        return self._operate(lambda: self._import_key(parsed))

    def sign(self, wrapped_key: bytes, message: bytes) -> bytes:
        """As `Tpm.sign`, for messages of any length; RetryLater `tpm.locked_out` one failure before a lockout.

        A message of more than 1024 bytes costs two commands more, and one for every further 1024.
        """
        public, private = unwrap(wrapped_key)

        def sign(key: Key) -> bytes:
            if not has_no_da(public):
                refuse_at_the_brink(self._properties(PT_LOCKOUT_COUNTER, PT_LOCKOUT_INTERVAL))
                self._shutdown_due = True
            return self._hmac(key, message)

        return self._operate(lambda: self._with_loaded(public, private, sign))

    # What only diagnostics and other programs ask for is in a file of its own, which a board loads when it is asked.

    def endorsement_certificate(self) -> "bytes | None":
        """As `TpmService.endorsement_certificate`; what follows the DER in the index is cut off."""
        from dps_hal.tpm.upkeep import EK_CERTIFICATE_INDEX, without_padding

        content = self._operate(lambda: self._nv_content(EK_CERTIFICATE_INDEX))
        return None if content is None else without_padding(content)

    def makers_template(self) -> bytes:
        """As `TpmService.makers_template`."""
        from dps_hal.tpm.upkeep import template_in

        return self._operate(lambda: template_in(self._nv_content))

    def ek_indices(self) -> "tuple[int, ...]":
        """As `TpmService.ek_indices`."""
        from dps_hal.tpm.upkeep import EK_CERTIFICATE_INDEX, LAST_EK_INDEX

        found = self._operate(lambda: self._handles(EK_CERTIFICATE_INDEX))
        return tuple([index for index in found if index <= LAST_EK_INDEX])

    def _nv_content(self, index: int) -> "bytes | None":
        from dps_hal.tpm.wire_upkeep import nv_content

        return nv_content(self, index, self._salted_session)

    def template_of_endorsement_key(self) -> str:
        """As `TpmService.template_of_endorsement_key`."""
        from dps_hal.tpm.upkeep import if_readable, template_in, template_of

        def made_from(template: bytes) -> bytes:
            made = self._create_primary(ENDORSEMENT, template, self._salted_session())
            self._flush(made.handle)
            return made.public

        def found() -> str:
            maker = if_readable(lambda: template_in(self._nv_content))
            return template_of(self._endorsement_key().public, self._ek_template, maker, made_from)

        return self._operate(found)

    def persist(self, wrapped_key: bytes, handle: int, former: bytes = b"") -> None:
        """As `TpmService.persist`."""
        from dps_hal.tpm.wire_upkeep import persist

        persist(self, wrapped_key, handle, former)

    def name_at(self, handle: int) -> bytes:
        """As `TpmService.name_at`."""
        from dps_hal.tpm.wire_upkeep import name_at

        return name_at(self, handle)

    def withdraw(self, handle: int, names: "tuple[bytes, ...]") -> None:
        """As `TpmService.withdraw`."""
        from dps_hal.tpm.wire_upkeep import withdraw

        withdraw(self, handle, names)

    def condition(self) -> "TpmCondition":
        """As `TpmService.condition`."""
        from dps_hal.tpm.wire_upkeep import condition

        return self._operate(lambda: condition(self._properties))

    def try_passwords(self) -> None:
        """As `TpmService.try_passwords`."""

        def try_them() -> None:
            for hierarchy in (ENDORSEMENT, OWNER):
                if self._auth(hierarchy):
                    self._flush(self._policy_of(hierarchy))

        self._operate(try_them)

    # --- objects and sessions

    def _salted_session(self) -> SaltedSession:
        """The HMAC session of this connection, salted to the EK."""
        if self._session is None:
            self._session = self._start_session(self._endorsement_key())
        return self._session

    def _start_session(self, salt_key: Key) -> SaltedSession:
        parameters, salt, nonce = start_salted_parameters(salt_key.public)
        handle, nonce_tpm = self._start(salt_key.handle, parameters)
        return SaltedSession(handle, salt, nonce, nonce_tpm)

    def _start(self, salt_key: int, parameters: bytes) -> "tuple[int, bytes]":
        handle, answer = self._run_and_hold(START_AUTH_SESSION, (salt_key, NULL), parameters)
        nonce_tpm, _ = take_field("start_auth_session", answer, 0)
        return handle, nonce_tpm

    def _endorsement_key(self) -> Key:
        if self._ek is None:
            ek = self._present(self._ek_handle) or self._create_ek()
            check_ek_public(ek.public)
            if self._pinned_ek not in {b"", ek.public}:
                raise AskOperator("tpm.ek_changed", "the TPM shows another endorsement key than before")
            self._pinned_ek = ek.public
            self._ek_name = object_name(ek.public)
            self._ek = ek
        return self._ek

    def _create_ek(self) -> Key:
        """A new EK, made persistent.

        A password is only ever given to a session salted to a key of the NULL hierarchy; where both are empty there
        is nothing to hide.
        """
        from dps_hal.tpm.upkeep import make_ek
        from dps_hal.tpm.wire_upkeep import nv_content

        session: SaltedSession | None = None
        held = len(self._held)
        try:
            if self._auth(OWNER) or self._auth(ENDORSEMENT):
                primary = self._create_primary(NULL, srk_template(), None)
                check_srk_public(primary.public)
                session = self._start_session(primary)

            def create(template: bytes) -> Key:
                created = self._create_primary(ENDORSEMENT, template, session)
                check_ek_public(created.public)
                return created

            created = make_ek(
                self._ek_template, lambda index: nv_content(self, index, lambda: session), create, self._ek_name
            )
            return self._evict_control(created, self._ek_handle, session)
        finally:
            for handle in reversed(self._held[held:]):
                self._flush(handle)

    def _storage_root_key(self) -> Key:
        """The SRK, proved by the session: the holder of the EK took a command for an object of this name.

        Without the proof, somebody on the bus could show a key of his own, and the registration would be for that.
        """
        if self._srk is None:
            srk = self._present(self._srk_handle)
            free_handle = self._srk_handle
            if srk is not None and not is_srk(srk.public):
                srk, free_handle = self._look_for_srk()
            if srk is None:
                srk = self._create_srk(free_handle)
            else:
                session = self._salted_session()
                self._connection.run(READ_PUBLIC, (srk.handle,), session=session, names=(srk.name,))
            self._srk = srk
            self.srk_found_at = srk.handle if srk.handle >= PERSISTENT else 0
        return self._srk

    def _look_for_srk(self) -> "tuple[Key | None, int]":
        """Our SRK at another handle than the usual one, or None and the first free handle."""
        free_handle = SRK_HANDLE + 1
        for handle in self._handles(free_handle):
            if handle > _LAST_SRK_HANDLE:
                break
            key = self._present(handle)
            if key is not None and is_srk(key.public):
                return key, handle
            if handle == free_handle:
                free_handle += 1
        return None, free_handle

    def _create_srk(self, handle: int) -> Key:
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
                self._flush(created.handle)

    def _create_primary(self, hierarchy: int, template: bytes, session: "SaltedSession | None") -> Key:
        """A new transient primary key, held; the caller checks it against its template."""
        self.creates_key = True
        self._connection.extend(KEY_CREATION_LIMIT_S)
        try:
            handle, answer = self._run_and_hold(
                CREATE_PRIMARY,
                (hierarchy,),
                b"\x00\x04\x00\x00\x00\x00" + template + bytes(6),  # no password, no data; no outside info, no PCRs
                session=session,
                names=(struct.pack(">I", hierarchy),),
                auth=self._auth(hierarchy),
                password=session is None,
            )
        except RefusedError as refused:
            refused.of_owner = hierarchy == OWNER
            raise refused
        _, end = take_field("create_primary", answer, 0)
        if session is None and answer[-36:] != sized(object_name(answer[:end])):
            raise RefusedError("create_primary", RC_ALTERED)
        return Key(handle, answer[:end], object_name(answer[:end]))

    def _auth(self, hierarchy: int) -> bytes:
        return b"" if hierarchy == NULL else self._passwords.of(hierarchy == OWNER)

    def _evict_control(self, key: Key, persistent_handle: int, session: "SaltedSession | None") -> Key:
        """Makes a transient key persistent, or removes a persistent one."""
        self._connection.run(
            EVICT_CONTROL,
            (OWNER, key.handle),
            struct.pack(">I", persistent_handle),
            session=session,
            names=(struct.pack(">I", OWNER), key.name),
            auth=self._auth(OWNER),
            password=session is None,
        )
        return Key(persistent_handle, key.public, key.name)

    def _present(self, handle: int) -> "Key | None":
        """The object at a persistent handle, or None where there is none."""
        try:
            _, answer = self._connection.run(READ_PUBLIC, (handle,))
        except RefusedError as refused:
            if refused.unknown_handle:
                return None
            raise refused
        _, end = take_field("read_public", answer, 0)
        stated, last = take_field("read_public", answer, end)
        _, last = take_field("read_public", answer, last)
        public = answer[:end]
        name = object_name(public) if public[4:6] == struct.pack(">H", ALG_SHA256) else b""
        if last != len(answer) or stated[:2] != public[4:6] or (name and name != stated):
            raise RefusedError("read_public", RC_ALTERED)
        return Key(handle, public, name or stated)

    def _with_loaded(self, public: bytes, private: bytes, work: "Callable[[Key], Answer]") -> "Answer":
        """What `work` makes of a wrapped key, loaded under the SRK for a while."""
        srk = self._storage_root_key()
        session = self._salted_session()
        handle, _ = self._run_and_hold(
            LOAD, (srk.handle,), private + public, session=session, names=(srk.name,), auth=b""
        )
        try:
            return work(Key(handle, public, object_name(public)))
        finally:
            self._flush(handle)

    # --- what the operations do

    def _policy_of(self, hierarchy: int) -> int:
        """A policy session to which we have shown that we know the hierarchy's password."""
        session = self._salted_session()
        policy, _ = self._start(NULL, start_policy_parameters())
        try:
            self._connection.run(
                POLICY_SECRET,
                (hierarchy, policy),
                bytes(10),  # no nonce, no command's digest, no reference, no expiry
                session=session,
                names=(struct.pack(">I", hierarchy), struct.pack(">I", policy)),
                auth=self._auth(hierarchy),
            )
        except RefusedError as refused:
            refused.of_owner = hierarchy == OWNER
            self._flush(policy)
            raise refused
        return policy

    def _import_key(self, activation: "Activation") -> bytes:
        session = self._salted_session()
        ek, srk = self._endorsement_key(), self._storage_root_key()
        policy = self._policy_of(ENDORSEMENT)
        try:
            _, answer = self._connection.run(
                ACTIVATE_CREDENTIAL,
                (srk.handle, ek.handle),
                sized(activation.credential) + sized(activation.credential_secret),
                session=session,
                names=(srk.name, ek.name),
                auth=b"",
                policy=policy,
            )
            self._held.remove(policy)
        finally:
            self._flush(policy)
        try:
            _, private = self._connection.run(
                IMPORT,
                (srk.handle,),
                answer  # the inner key as a TPM2B
                + activation.id_key_public
                + sized(activation.duplicate)
                + sized(activation.duplicate_seed)
                + _AES_128_CFB,
                session=session,
                names=(srk.name,),
                auth=b"",
            )
        except RefusedError as refused:
            from dps_hal.tpm.verdicts import check_duplicate_fits

            check_duplicate_fits(refused, activation.duplicate)
            raise refused
        if not has_no_da(activation.id_key_public):
            self._with_loaded(activation.id_key_public, private, self._try_out)
        return wrap(activation.id_key_public, private)

    def _try_out(self, key: Key) -> None:
        """The first use of a key without noDA: AskOperator `dps.key_unsuitable` where it has a password of its own."""
        refuse_untried(self._properties(PT_LOCKOUT_COUNTER, PT_LOCKOUT_INTERVAL))
        self._shutdown_due = True
        try:
            self._hmac(key, b"")
        except RefusedError as refused:
            from dps_hal.tpm.verdicts import own_password

            raise own_password(refused) if refused.by_key else refused

    def _hmac(self, key: Key, message: bytes) -> bytes:
        session = self._salted_session()
        algorithm = struct.pack(">H", ALG_SHA256)
        run = self._connection.run
        if len(message) <= MAX_BUFFER_BYTES:
            _, answer = run(
                HMAC, (key.handle,), sized(message) + algorithm, session=session, names=(key.name,), auth=b""
            )
            return _digest("hmac", answer)
        sequence, _ = self._run_and_hold(
            HMAC_START, (key.handle,), b"\x00\x00" + algorithm, session=session, names=(key.name,), auth=b""
        )
        names = (b"",)  # of a sequence, Part 1, 16
        try:
            at = 0
            while len(message) - at > MAX_BUFFER_BYTES:
                piece = sized(message[at : at + MAX_BUFFER_BYTES])
                run(SEQUENCE_UPDATE, (sequence,), piece, session=session, names=names, auth=b"")
                at += MAX_BUFFER_BYTES
            last = sized(message[at:]) + struct.pack(">I", NULL)
            _, answer = run(SEQUENCE_COMPLETE, (sequence,), last, session=session, names=names, auth=b"")
            self._held.remove(sequence)  # the TPM frees a completed sequence
        finally:
            self._flush(sequence)
        return _digest("sequence_complete", answer)


def _digest(name: str, answer: bytes) -> bytes:
    digest, _ = take_field(name, answer, 0)
    if len(digest) != SHA256_BYTES:
        raise RefusedError(name, RC_ALTERED)
    return digest
