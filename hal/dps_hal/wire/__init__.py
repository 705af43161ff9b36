"""A real TPM as plain bytes, on CPython and MicroPython: no library, no compiler.

Commands and their parameters: TPM 2.0 Library Part 3. The transport decides where the TPM is.
"""

import struct

from dps_hal.activation import parse_activation
from dps_hal.contracts import EK_HANDLE, SRK_HANDLE
from dps_hal.errors import AskOperator, DpsError, RetryLater
from dps_hal.tpm_errors import (
    RC_ALTERED,
    RC_NV_SPACE,
    RefusedError,
    check_duplicate_fits,
    error_of,
)
from dps_hal.tpm_keys import (
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
from dps_hal.tpm_keys import ek_template as template_of_ek
from dps_hal.tpm_rules import (
    COMMAND_LIMIT_S,
    KEY_CREATION_LIMIT_S,
    LEFTOVERS,
    LOADED_SESSIONS,
    MAX_BUFFER_BYTES,
    PERSISTENT,
    PT_LOCKOUT_COUNTER,
    PT_LOCKOUT_INTERVAL,
    RELEASE_LIMIT_S,
    TRANSIENT,
    check_passwords,
    is_srk,
    kind_of,
    locked_out,
    refuse_at_the_brink,
)
from dps_hal.wire.commands import (
    ACTIVATE_CREDENTIAL,
    CAP_HANDLES,
    CAP_TPM_PROPERTIES,
    CREATE_PRIMARY,
    ENDORSEMENT,
    EVICT_CONTROL,
    FLUSH_CONTEXT,
    GET_CAPABILITY,
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
    SHUTDOWN,
    START_AUTH_SESSION,
    Connection,
    take_field,
)
from dps_hal.wire.sessions import SaltedSession, start_policy_parameters, start_salted_parameters

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, NamedTuple, TypeVar

    from dps_hal.activation import Activation
    from dps_hal.contracts import TpmCondition, WhileWaiting
    from dps_hal.wire.commands import Transport

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


class WireTpm:
    """A `TpmService` behind any transport.

    One HMAC session salted to the EK, with AES-128-CFB parameter encryption, carries everything secret from the
    first key on, and its HMAC proves every answer; hierarchy passwords only ever travel as HMAC in such a session.
    `while_waiting` is called at least once a second while something blocks.
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
        check_passwords(owner_auth, endorsement_auth)
        self._ek_template = template_of_ek(ek_template)
        self._ek_handle = ek_handle
        self._srk_handle = srk_handle
        self._owner_auth = owner_auth.rstrip(b"\x00")  # as the TPM takes it, Part 1, 19.6.4.3
        self._endorsement_auth = endorsement_auth.rstrip(b"\x00")
        self._exclusive = exclusive
        self._connection = Connection(transport, while_waiting)
        self._pinned_ek = b""  # the first EK seen; nothing is ever salted to another
        self._shutdown_due = False  # a key without noDA was used: a power cut would now count as a failed guess
        self._orphans: list[int] = []  # handles of what a lost connection left in the TPM
        self.srk_found_at: int | None = None  # see TpmService
        self._opened = False
        self._forget_connection()

    def _forget_connection(self) -> None:
        self._ek: Key | None = None
        self._srk: Key | None = None
        self._session: SaltedSession | None = None
        self._held: list[int] = []  # every session and transient object that is to be flushed
        self._altered = False  # an answer was not the TPM's own
        self._lost: list[int] = []  # TRANSIENT or LOADED_SESSIONS for each of ours whose handle we may not know

    # --- the contract

    def endorsement_key(self) -> bytes:
        """As `Tpm.endorsement_key`; AskOperator `tpm.ek_unsuitable` where something else is at the EK's handle."""
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

    def release(self) -> None:
        """As `Tpm.release`: nothing of ours stays in the TPM but EK and SRK."""
        for _ in range(2):  # where the connection was lost, a second one does what is left
            if self._opened or self._orphans or self._shutdown_due:
                self._connection.begin(RELEASE_LIMIT_S)
                try:
                    self._open()
                    self._tidy()
                except (RefusedError, DpsError):
                    pass  # nobody can act on it; the next connection tries again
                finally:
                    self._close()

    def _tidy(self) -> None:
        """Flushes what is held and announces the power-off where, unannounced, it would count as a failed guess."""
        for _ in range(3):  # a TPM that refused to flush once may do it now
            for handle in reversed(list(self._held)):
                self._flush(handle)
        if self._shutdown_due:
            self._connection.run(SHUTDOWN, (), b"\x00\x00")  # TPM_SU_CLEAR
            self._shutdown_due = False
        self._flush_lost()

    # What only diagnostics and other programs ask for is in a file of its own, which a board loads when it is asked.

    def endorsement_certificate(self) -> "bytes | None":
        """As `TpmService.endorsement_certificate`; what follows the DER in the index is cut off."""
        from dps_hal.wire.upkeep import endorsement_certificate

        return self._operate(lambda: endorsement_certificate(self._connection, self._properties))

    def persist(self, wrapped_key: bytes, handle: int, former: bytes = b"") -> None:
        """As `TpmService.persist`."""
        from dps_hal.tpm_upkeep import check_owner_handle
        from dps_hal.wire.upkeep import persist

        public, private = unwrap(wrapped_key)
        check_owner_handle(handle)

        def evict(key: Key) -> None:
            self._evict_control(key, handle, self._salted_session())

        self._operate(
            lambda: self._with_loaded(
                public, private, lambda key: persist(key, self._present(handle), handle, former, evict)
            )
        )

    def condition(self) -> "TpmCondition":
        """As `TpmService.condition`."""
        from dps_hal.wire.upkeep import condition

        return self._operate(lambda: condition(self._properties))

    def try_passwords(self) -> None:
        """As `TpmService.try_passwords`."""

        def try_them() -> None:
            for hierarchy in (ENDORSEMENT, OWNER):
                if self._auth(hierarchy):
                    self._flush(self._policy_of(hierarchy))

        self._operate(try_them)

    # --- one operation: connection, one rebuild, errors named after who must act

    def _operate(self, operation: "Callable[[], Answer]") -> "Answer":
        self._connection.begin(COMMAND_LIMIT_S)
        rebuilt = False
        while True:
            try:
                self._open()
                return operation()
            except RefusedError as refused:
                self._altered = self._altered or refused.altered
                if not refused.stale:
                    raise error_of(refused, self._locked_out)
                if refused.connection_lost:
                    self._close()
                else:
                    self.release()
                    self._connection.begin(COMMAND_LIMIT_S)
                if rebuilt:
                    raise error_of(refused, self._locked_out)
                rebuilt = True

    def _open(self) -> None:
        if self._opened:
            return
        self._opened = True
        self._flush_orphans()
        if self._exclusive:
            for first in LEFTOVERS:
                for handle in self._handles(first):
                    self._flush_handle(handle)

    def _close(self) -> None:
        """Ends the connection; what could not be flushed is left to the next one."""
        if not self._connection.managed:
            self._orphans += self._held
        self._connection.close()
        self._opened = False
        self._forget_connection()

    def _flush_orphans(self) -> None:
        """Flushes what an earlier connection left; a TPM without resource manager keeps it, and has three slots.

        Where the TPM has restarted it refuses them. Behind a device node the kernel does it, and the handle may be
        another program's now.
        """
        while self._orphans:
            self._flush_handle(self._orphans[-1])
            self._orphans.pop()

    def _flush_handle(self, handle: int) -> None:
        try:
            self._connection.run(FLUSH_CONTEXT, (), struct.pack(">I", handle))
        except RefusedError as refused:
            if refused.connection_lost:
                raise

    def _flush_lost(self) -> None:
        """Flushes what an altered answer kept from us."""
        # The handle in an altered answer proves nothing, so it is the TPM that is asked what of that kind is left in
        # it. Where that is more than one others have left something too, and nobody can tell what is whose: all
        # stays. Behind a device node others are at work meanwhile.
        if self._altered and not self._connection.managed:
            for first in self._lost:
                handles = self._handles(first)
                if len(handles) == 1:
                    self._flush_handle(handles[0])
        self._altered = False
        self._lost.clear()

    # --- objects and sessions

    def _run_and_hold(
        self, code: int, handles: "tuple[int, ...]", parameters: bytes, **named: "Any"
    ) -> "tuple[int, bytes]":
        """As `Connection.run` for a command that makes a session or an object, which is held until it is flushed."""
        try:
            handle, answer = self._connection.run(code, handles, parameters, gives_handle=True, **named)
        except RefusedError as refused:
            if refused.altered:
                self._lost.append(LOADED_SESSIONS if code == START_AUTH_SESSION else TRANSIENT)
            raise refused
        self._held.append(handle)
        return handle, answer

    def _flush(self, handle: int) -> None:
        """Flushes what is still held; where the TPM refuses, release() tries again."""
        if handle not in self._held:
            return
        try:
            self._connection.run(FLUSH_CONTEXT, (), struct.pack(">I", handle))
        except DpsError:
            return
        except RefusedError as refused:
            if not refused.unknown_handle and not (self._altered and refused.altered_handle):
                return
            self._lost.append(kind_of(handle))
        self._held.remove(handle)

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
            if self._pinned_ek not in (b"", ek.public):
                raise AskOperator("tpm.ek_changed", "the TPM shows another endorsement key than before")
            self._pinned_ek = ek.public
            self._ek = ek
        return self._ek

    def _create_ek(self) -> Key:
        """A new EK, made persistent.

        A password is only ever given to a session salted to a key of the NULL hierarchy; where both are empty there
        is nothing to hide.
        """
        session = None
        held = len(self._held)
        try:
            if self._owner_auth or self._endorsement_auth:
                primary = self._create_primary(NULL, srk_template(), None)
                check_srk_public(primary.public)
                session = self._start_session(primary)
            created = self._create_primary(ENDORSEMENT, self._ek_template, session)
            check_ek_public(created.public)
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
        if hierarchy == OWNER:
            return self._owner_auth
        return self._endorsement_auth if hierarchy == ENDORSEMENT else b""

    def _evict_control(self, key: Key, persistent_handle: int, session: "SaltedSession | None") -> Key:
        """Makes a transient key persistent, or removes a persistent one."""
        self._connection.run(
            EVICT_CONTROL,
            (OWNER, key.handle),
            struct.pack(">I", persistent_handle),
            session=session,
            names=(struct.pack(">I", OWNER), key.name),
            auth=self._owner_auth,
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
            check_duplicate_fits(refused, activation.duplicate)
            raise refused
        return wrap(activation.id_key_public, private)

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

    def _handles(self, first: int) -> "list[int]":
        """The handles in use from `first` on, of its kind."""
        return [entry[0] for entry in self._capability(CAP_HANDLES, first, 254, ">I")]

    def _properties(self, first: int, last: int) -> "dict[int, int]":
        """TPM properties by number; those that the TPM does not have are missing."""
        entries = self._capability(CAP_TPM_PROPERTIES, first, last - first + 1, ">II")
        return {entry[0]: entry[1] for entry in entries}

    def _capability(self, capability: int, first: int, count: int, layout: str) -> "list[tuple[int, ...]]":
        """The entries of one capability, each of `layout`."""
        _, answer = self._connection.run(GET_CAPABILITY, (), struct.pack(">III", capability, first, count))
        size = struct.calcsize(layout)
        found = int.from_bytes(answer[5:9], "big")  # behind moreData and the capability
        if len(answer) != 9 + found * size:
            raise RefusedError("get_capability", RC_ALTERED)
        return [struct.unpack(layout, answer[at : at + size]) for at in range(9, len(answer), size)]

    def _locked_out(self, what: str) -> RetryLater:
        try:
            return locked_out(what, self._properties(PT_LOCKOUT_INTERVAL, PT_LOCKOUT_INTERVAL))
        except (RefusedError, DpsError):
            return locked_out(what, {})


def _digest(name: str, answer: bytes) -> bytes:
    digest, _ = take_field(name, answer, 0)
    if len(digest) != SHA256_BYTES:
        raise RefusedError(name, RC_ALTERED)
    return digest
