"""A real TPM through tpm2-tss and tpm2-pytss; the only file that imports it, and only when a TPM is wanted.

Commands and their parameters: TPM 2.0 Library Part 3; return codes: Part 2, 6.6. Every call into tpm2-pytss names
its arguments, because their order differs between 1.2.0 (Debian 12) and 3.0.0.
"""

from __future__ import annotations

import contextlib
import os
import struct
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dps_hal.contracts import EK_HANDLE, SRK_HANDLE
from dps_hal.errors import AskOperator, DpsError, IdentityStale, RetryLater
from dps_hal.host.tpm_node import is_managed, open_device
from dps_hal.tpm.activation import Activation, parse_activation
from dps_hal.tpm.errors import (
    LAYER_ESYS,
    LAYER_MARSHALLING,
    LAYER_SYS,
    RC_ALTERED,
    RC_BAD_TAG,
    RC_INITIALIZE,
    RC_NV_SPACE,
    RC_NV_UNINITIALIZED,
    RC_RESEND,
    RC_SEQUENCE,
    RefusedError,
)
from dps_hal.tpm.keys import (
    ALG_SHA256,
    RSA_BYTES,
    check_ek_public,
    check_srk_public,
    ek_public,
    has_no_da,
    object_name,
    sized,
    srk_public,
    srk_template,
    unwrap,
    wrap,
)
from dps_hal.tpm.keys import ek_template as template_of_ek
from dps_hal.tpm.rules import (
    COMMAND_LIMIT_S,
    KEY_CREATION_LIMIT_S,
    LEFTOVERS,
    LOADED_SESSIONS,
    MAX_BUFFER_BYTES,
    PERSISTENT,
    PT_LOCKOUT_COUNTER,
    PT_LOCKOUT_INTERVAL,
    PT_PERMANENT,
    RELEASE_LIMIT_S,
    TRANSIENT,
    Passwords,
    is_srk,
    kind_of,
    locked_out,
    refuse_at_the_brink,
    refuse_untried,
)
from dps_hal.tpm.upkeep import (
    EK_CERTIFICATE_INDEX,
    LAST_EK_INDEX,
    PT_FIRMWARE_VERSION_1,
    PT_MANUFACTURER,
    PT_NV_BUFFER_MAX,
    check_owner_handle,
    check_replaceable,
    condition_of,
    if_readable,
    make_ek,
    nv_chunk_bytes,
    nv_locked,
    template_in,
    template_of,
    ways_to_read,
    without_padding,
)
from dps_hal.tpm.verdicts import Doubts, check_duplicate_fits, error_of, own_password

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any, TypeVar

    from dps_hal.contracts import TpmCondition, WhileWaiting

    Answer = TypeVar("Answer")

_ONE_CLIENT = ("swtpm", "mssim", "libtpms")  # TCTIs of a TPM that is ours for as long as we are connected
_OTHER_SRK_HANDLES = range(SRK_HANDLE + 1, 0x81000100)  # where ours goes when the usual handle is taken
_SHA256 = struct.pack(">H", ALG_SHA256)
_PUBLIC_SIZES = (len(ek_public(bytes(RSA_BYTES))), len(srk_public(bytes(RSA_BYTES))))

# Of ESAPI's layer: BAD_SEQUENCE, MALFORMED_RESPONSE, INSUFFICIENT_RESPONSE, RSP_AUTH_FAILED. After the last three a
# context refuses every command with the first.
_ANSWER_REFUSED = (0x70007, 0x70011, 0x70013, 0x7001B)
_HANDLE_BYTES = 4
_TPM_1_2 = 0x80001  # GENERAL_FAILURE of SAPI's layer, which knows a response of a TPM 1.2 by its tag
_GIVES_HANDLE = {
    "start_auth_session": LOADED_SESSIONS,
    "load": TRANSIENT,
    "create_primary": TRANSIENT,
    "hmac_start": TRANSIENT,
}
_TCTI_UNKNOWN = (0x5, 0xB, 0x15)  # BAD_REFERENCE, BAD_VALUE, NOT_SUPPORTED: no such TCTI, or its string is wrong


@dataclass(frozen=True, slots=True)
class _Key:
    """A key in the TPM: ESAPI's handle and the marshalled TPM2B_PUBLIC."""

    handle: int
    public: bytes


class EsysTpm:
    """A `TpmService` on any TCTI of tpm2-tss: `device:/dev/tpmrm0`, `swtpm:…`, `mssim:…`, `tabrmd`.

    One HMAC session salted to the EK, with AES-128-CFB parameter encryption, carries everything secret from the
    first key on; hierarchy passwords only ever travel as HMAC in such a session. The library makes salt and nonces
    from the host's randomness.

    While a command runs the thread blocks in the TSS, without `while_waiting` and without a limit of ours: the
    kernel's driver ends it, and above that the runner's own deadline. Between commands that the TPM asks to
    repeat, `while_waiting` is called at least once a second.
    """

    def __init__(
        self,
        tcti: str,
        *,
        ek_template: str = "tcg-l1",
        ek_handle: int = EK_HANDLE,
        srk_handle: int = SRK_HANDLE,
        owner_auth: bytes = b"",
        endorsement_auth: bytes = b"",
        while_waiting: WhileWaiting | None = None,
        exclusive: bool = False,
    ) -> None:
        """Does not touch the TPM yet; AskOperator `tpm.not_available` where tpm2-pytss or tpm2-tss is missing.

        `exclusive`: nobody else ever uses this TPM, so whatever a crash left in it is flushed when it is opened.
        """
        self._passwords = Passwords(owner_auth, endorsement_auth)
        self._ek_template = template_of_ek(ek_template)
        self._tss = _load_tpm2_pytss()
        self._tcti = tcti
        self._ek_handle = ek_handle
        self._srk_handle = srk_handle
        self._while_waiting = while_waiting
        self._exclusive = exclusive
        self._began_s = 0.0  # on time.monotonic(): this operation
        self._until_s = 0.0  # when it stops resending
        self._ek_name = b""  # of the one to make where none is there: that of the record, then the pinned one
        self._pinned_ek = b""  # the first EK seen; nothing is ever salted to another
        self._shutdown_due = False  # a key without noDA was used: a power cut would now count as a failed guess
        self._orphans: list[tuple[int, bytes]] = []  # handles and names in the TPM of what a lost connection left
        self._esapi: Any = None
        self.srk_found_at: int | None = None  # see TpmService
        self.creates_key = False  # see TpmService
        self._forget_connection()

    def _forget_connection(self) -> None:
        self._ek: _Key | None = None
        self._srk: _Key | None = None
        self._session: int | None = None
        self._held: list[int] = []  # ESAPI's handles of every session and transient object that is to be flushed
        self._altered = False  # an answer was not the TPM's own
        self._lost: list[int] = []  # TRANSIENT or LOADED_SESSIONS for each of ours whose handle we may not know
        self._passwords.restore()

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

        def load_and_sign() -> bytes:
            session = self._salted_session()
            with self._loaded(public, private, session) as key:
                if not has_no_da(public):
                    refuse_at_the_brink(self._properties(PT_LOCKOUT_COUNTER, PT_LOCKOUT_INTERVAL))
                    self._shutdown_due = True
                return self._hmac(key, message, session)

        return self._operate(load_and_sign)

    def release(self) -> None:
        """As `Tpm.release`: nothing of ours stays in the TPM but EK and SRK."""
        self.creates_key = False
        for _ in range(2):  # where the connection was lost, a second one does what is left
            if self._esapi is not None or self._orphans or self._shutdown_due:
                self._until_s = time.monotonic() + RELEASE_LIMIT_S
                with contextlib.suppress(RefusedError, DpsError):  # nobody can act on it; the next connection tries
                    self._open()
                if self._esapi is not None:
                    self._tidy_and_close()

    def _tidy_and_close(self) -> None:
        """Flushes what is held, as long as this operation may resend, and ends the connection."""
        for _ in range(3):  # a TPM that refused to flush once may do it now
            for handle in reversed(self._held.copy()):
                self._flush(handle)
        with contextlib.suppress(RefusedError):  # nobody can act on it; the TPM then counts one failure
            self._announce_power_off()
        with contextlib.suppress(RefusedError):
            self._flush_lost()
        self._close()

    def _announce_power_off(self) -> None:
        """Shutdown(CLEAR) where a power cut that nobody announced would count as a failed guess."""
        if self._shutdown_due:
            self._command("shutdown", shutdown_type=self._tss.TPM2_SU.CLEAR)
            self._shutdown_due = False

    def try_passwords(self) -> None:
        """As `TpmService.try_passwords`."""
        self._operate(self._try_passwords)

    def endorsement_certificate(self) -> bytes | None:
        """As `TpmService.endorsement_certificate`; what follows the DER in the index is cut off."""
        content = self._operate(lambda: self._nv_content(EK_CERTIFICATE_INDEX, self._salted_session))
        return None if content is None else without_padding(content)

    def makers_template(self) -> bytes:
        """As `TpmService.makers_template`."""
        return self._operate(lambda: self._makers_template(self._salted_session))

    def ek_indices(self) -> tuple[int, ...]:
        """As `TpmService.ek_indices`."""
        found = self._operate(lambda: self._handles(EK_CERTIFICATE_INDEX, 254))
        return tuple(index for index in found if index <= LAST_EK_INDEX)

    def template_of_endorsement_key(self) -> str:
        """As `TpmService.template_of_endorsement_key`."""

        def made_from(template: bytes) -> bytes:
            hierarchy = self._tss.ESYS_TR.ENDORSEMENT
            made = self._create_primary(hierarchy, template, check_ek_public, self._salted_session())
            with self._flushed(made.handle):
                return made.public

        def found() -> str:
            maker = if_readable(lambda: self._makers_template(self._salted_session))
            return template_of(self._endorsement_key().public, self._ek_template, maker, made_from)

        return self._operate(found)

    def persist(self, wrapped_key: bytes, handle: int, former: bytes = b"") -> None:
        """As `TpmService.persist`."""
        public, private = unwrap(wrapped_key)
        check_owner_handle(handle)

        def load_and_persist() -> None:
            session = self._salted_session()
            with self._loaded(public, private, session) as key:
                present = self._present(handle)
                if present is not None:
                    if present.public == public:
                        return
                    check_replaceable(present.public, handle, former)
                    # EvictControl overwrites nothing, so for a moment the handle is empty; the new key has been
                    # loaded by now, and the room that the old one took is free for it.
                    self._evict_control(present.handle, handle, session)
                self._evict_control(key, handle, session)

        self._operate(load_and_persist)

    def name_at(self, handle: int) -> bytes:
        """As `TpmService.name_at`."""

        def name() -> bytes:
            present = self._present(handle)
            return object_name(present.public) if present else b""

        return self._operate(name)

    def withdraw(self, handle: int, names: tuple[bytes, ...]) -> None:
        """As `TpmService.withdraw`."""

        def withdraw() -> None:
            present = self._present(handle)
            if present is not None and object_name(present.public) in names:
                self._evict_control(present.handle, handle, self._salted_session())

        self._operate(withdraw)

    def condition(self) -> TpmCondition:
        """As `TpmService.condition`."""

        def ask() -> TpmCondition:
            fixed = self._properties(PT_MANUFACTURER, PT_FIRMWARE_VERSION_1)
            return condition_of({**fixed, **self._properties(PT_PERMANENT, PT_LOCKOUT_INTERVAL)})

        return self._operate(ask)

    # --- one operation: deadline, connection, one rebuild, errors named after who must act

    def _operate(self, operation: Callable[[], Answer]) -> Answer:
        self._began_s = time.monotonic()
        self._until_s = self._began_s + COMMAND_LIMIT_S
        self.creates_key = False
        doubts = Doubts()
        while True:
            error: DpsError
            stale = lost = again = counted = False
            try:
                self._open()
                answer = operation()
                with contextlib.suppress(RefusedError):  # the answer is good, and release() announces it
                    self._announce_power_off()  # now: the next release may be a whole request away
                return answer
            except RefusedError as refused:
                self._altered = self._altered or refused.altered
                if refused.wrong_password and self._goes_without(refused):
                    continue
                stale, lost, counted = refused.stale, refused.connection_lost, refused.counted
                error = error_of(refused, self._locked_out)
            except (AskOperator, IdentityStale, RetryLater) as verdict:
                error = verdict
            if not counted:
                error, again = doubts.weigh(error, stale, 2 * time.monotonic() <= self._began_s + self._until_s)
            if self._esapi is not None and (lost or stale or again):
                self._drop(lost)
            if not again:
                raise error

    def _open(self) -> None:
        if self._esapi is not None:
            return
        kind, _, path = self._tcti.partition(":")
        if kind == "device" and path:
            os.close(open_device(path))  # says why it cannot be used, which the return code of the TSS does not
        try:
            self._esapi = self._tss.ESAPI(tcti=self._tcti)
        except self._tss.TSS2_Exception as error:
            if error.rc & 0xFFFF in _TCTI_UNKNOWN:
                raise AskOperator(
                    "tpm.not_available",
                    f"tpm2-tss cannot use the TCTI {self._tcti!r}: expected such as device:/dev/tpmrm0, and its"
                    " libtss2-tcti library installed",
                ) from None
            text = f"no TPM answers at {self._tcti!r}: {error}"
            if kind == "swtpm":
                text += "; tpm2-tss also needs swtpm's control channel, at the port after the server's"
            raise RetryLater("tpm.absent", text) from None
        except RuntimeError as error:  # tpm2-pytss's own complaint about the string
            raise AskOperator("config.invalid", f"tcti: expected NAME or NAME:SETTINGS; {error}") from None
        self._tell_passwords()
        if self._exclusive:
            for handle in [handle for first in LEFTOVERS for handle in self._handles(first, 254)]:
                self._flush_past_the_library(handle)
        self._flush_orphans()

    def _tell_passwords(self) -> None:
        """Tells the library the hierarchies' passwords, of which it makes the HMACs."""
        tr = self._tss.ESYS_TR
        self._esapi.tr_set_auth(esys_handle=tr.OWNER, auth_value=self._passwords.of(owner=True))
        self._esapi.tr_set_auth(esys_handle=tr.ENDORSEMENT, auth_value=self._passwords.of(owner=False))

    def _goes_without(self, refused: RefusedError) -> bool:
        """Whether the hierarchy that refused its password has none; see `Passwords`."""
        try:
            without = self._passwords.go_without(refused, self._properties(PT_PERMANENT, PT_PERMANENT))
        except RefusedError:
            return False  # the first refusal counts
        self._tell_passwords()
        return without

    @property
    def unneeded_passwords(self) -> tuple[str, ...]:
        """As `TpmService` has it."""
        return self._passwords.unneeded

    def _drop(self, connection_lost: bool) -> None:
        """Gives a stale connection up."""
        if connection_lost:
            self._close()
        else:
            self._tidy_and_close()

    def _close(self) -> None:
        """Closes the context; what could not be flushed is left to the next one."""
        if self._is_ours_while_open or self._is_direct:
            for handle in self._held:
                with contextlib.suppress(self._tss.TSS2_Exception):  # the library's own memory; no TPM is asked
                    tpm_handle = int(self._esapi.tr_get_tpm_handle(esys_handle=handle))
                    name = bytes(self._esapi.tr_get_name(handle=handle))
                    # To what is no key, a session or a sequence, the library gives its handle as name.
                    self._orphans.append((tpm_handle, name if len(name) > _HANDLE_BYTES else b""))
        self._esapi.close()
        self._esapi = None
        self._forget_connection()

    def _flush_orphans(self) -> None:
        """Flushes what an earlier connection left; a TPM without resource manager keeps it, and has three slots.

        The bytes go past ESAPI, which knows only what this context made. Where the TPM has restarted meanwhile, others
        may have an object at the handle by now: its name tells. With a resource manager (/dev/tpmrm0, a broker) nothing
        was left.
        """
        while self._orphans:
            handle, name = self._orphans[-1]
            if kind_of(handle) == LOADED_SESSIONS or self._has_name(handle, name):
                self._flush_past_the_library(handle)
            self._orphans.pop()

    def _has_name(self, tpm_handle: int, name: bytes) -> bool:
        """Whether an object of this name is at a transient handle; with an empty name, whether a sequence is."""
        answer = self._past_the_library(0x173, struct.pack(">I", tpm_handle))  # ReadPublic
        return sized(name) in answer[10:] if name else answer[6:10] == struct.pack(">I", RC_SEQUENCE)

    @property
    def _is_ours_while_open(self) -> bool:
        """Whether nobody else can use the TPM while we are connected; it keeps what nobody flushes."""
        return self._tcti.partition(":")[0] in _ONE_CLIENT

    @property
    def _is_direct(self) -> bool:
        """Whether it is a device node without resource manager, such as /dev/tpm0; without a path, tpmrm0 is tried."""
        kind, _, path = self._tcti.partition(":")
        return kind == "device" and path != "" and not is_managed(path)

    def _flush_lost(self) -> None:
        """Flushes what an altered answer kept from us.

        The handle in an altered answer proves nothing, and the library does not show it, so it is the TPM that is
        asked what of that kind is left in it. Where that is more than one others have left something too, and nobody
        can tell what is whose: all stays. Behind a device node, /dev/tpm0 too, or a broker others are at work
        meanwhile.
        """
        if self._altered and self._is_ours_while_open:
            for first in self._lost:
                # GetCapability(TPM_CAP_HANDLES): moreData, capability, count, handles behind the response's header
                listing = self._past_the_library(0x17A, struct.pack(">III", 1, first, 254))[15:]
                if listing[:4] == struct.pack(">I", 1) and len(listing) == 8:
                    self._flush_past_the_library(int.from_bytes(listing[4:], "big"))
        self._altered = False
        self._lost.clear()

    def _flush_past_the_library(self, tpm_handle: int) -> int:
        """The return code of FlushContext."""
        return int.from_bytes(self._past_the_library(0x165, struct.pack(">I", tpm_handle))[6:10], "big")

    def _past_the_library(self, code: int, parameters: bytes) -> bytes:
        """The response to a command without sessions, for which ESAPI has no handle or no more use."""
        tcti = self._esapi.get_tcti()
        try:
            tcti.transmit(command=struct.pack(">HII", 0x8001, 10 + len(parameters), code) + parameters)
            return bytes(tcti.receive(size=4096))
        except self._tss.TSS2_Exception as error:
            raise RefusedError("flush_context", int(error.rc), str(error)) from None

    def _command(self, method: str, **arguments: Any) -> Any:
        """Runs one TPM command, again where the TPM asks for that; RefusedError with its return code."""
        pause_s = 0.01
        started = False
        while True:
            try:
                return getattr(self._esapi, method)(**arguments)
            except self._tss.TSS2_Exception as error:
                refused = self._refused(method.rstrip("_"), int(error.rc), str(error))
            if refused.code == RC_INITIALIZE and not started:  # a TPM on which no firmware has run, as on mssim
                started = True
                with contextlib.suppress(self._tss.TSS2_Exception):  # the command itself says whether it helped
                    self._esapi.startup(startup_type=self._tss.TPM2_SU.CLEAR)
            elif refused.code in RC_RESEND and time.monotonic() + pause_s < self._until_s:
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, 1.0)
                if self._while_waiting is not None:
                    self._while_waiting()
            else:
                raise refused

    def _refused(self, command: str, rc: int, text: str) -> RefusedError:
        """Why a command did not succeed.

        What is sent was made from structures of the library's, so what does not fit a structure is the answer.
        """
        refused = RefusedError(command, rc, text)
        if rc == _TPM_1_2:
            return RefusedError(command, RC_BAD_TAG, text)
        if rc in _ANSWER_REFUSED or refused.layer in (LAYER_SYS, LAYER_MARSHALLING):
            refused = RefusedError(command, RC_ALTERED, text)
        if refused.altered and command in _GIVES_HANDLE:
            self._lost.append(_GIVES_HANDLE[command])
        return refused

    # --- objects and sessions

    @contextlib.contextmanager
    def _flushed(self, handle: int) -> Iterator[int]:
        """Flushes a session or transient object at the end, unless the TPM has already freed it."""
        self._held.append(handle)
        try:
            yield handle
        finally:
            self._flush(handle)

    def _flush(self, handle: int) -> None:
        """Flushes what is still held; where the TPM refuses, release() tries again."""
        if handle not in self._held:
            return
        try:
            self._command("flush_context", flush_handle=handle)
        except RefusedError as refused:
            tpm_handle = int(self._esapi.tr_get_tpm_handle(esys_handle=handle))
            if refused.layer == LAYER_ESYS:  # this context is of no more use, the connection is
                with contextlib.suppress(RefusedError):
                    if self._flush_past_the_library(tpm_handle):
                        self._lost.append(kind_of(tpm_handle))
                    self._held.remove(handle)
                return
            if not refused.unknown_handle and not (self._altered and refused.altered_handle):
                return
            self._lost.append(kind_of(tpm_handle))
        self._held.remove(handle)

    def _salted_session(self) -> int:
        """The HMAC session of this connection, salted to the EK."""
        if self._session is None:
            ek = self._endorsement_key()
            self._session = self._start_session(ek.handle)
            self._held.append(self._session)
        return self._session

    def _start_session(self, salt_key: int) -> int:
        tss = self._tss
        session: int = self._command(
            "start_auth_session",
            tpm_key=salt_key,
            bind=tss.ESYS_TR.NONE,
            session_type=tss.TPM2_SE.HMAC,
            symmetric=tss.TPMT_SYM_DEF(
                algorithm=tss.TPM2_ALG.AES,
                keyBits=tss.TPMU_SYM_KEY_BITS(aes=128),
                mode=tss.TPMU_SYM_MODE(aes=tss.TPM2_ALG.CFB),
            ),
            auth_hash=tss.TPM2_ALG.SHA256,
        )
        attributes = tss.TPMA_SESSION.CONTINUESESSION | tss.TPMA_SESSION.DECRYPT | tss.TPMA_SESSION.ENCRYPT
        self._esapi.trsess_set_attributes(session=session, attributes=attributes, mask=0xFF)
        return session

    @contextlib.contextmanager
    def _creation_session(self) -> Iterator[int]:
        """A session that may create the EK, when there is none yet to salt a session to.

        A password is only ever given to a session salted to a key of the NULL hierarchy; where both are empty there
        is nothing to hide.
        """
        if not self._passwords.of(owner=True) and not self._passwords.of(owner=False):
            yield self._tss.ESYS_TR.PASSWORD
            return
        primary = self._create_primary(
            self._tss.ESYS_TR.NULL, srk_template(), check_srk_public, self._tss.ESYS_TR.PASSWORD
        )
        with self._flushed(primary.handle):
            session = self._start_session(primary.handle)
        with self._flushed(session):
            yield session

    def _endorsement_key(self) -> _Key:
        if self._ek is None:
            ek = self._present(self._ek_handle)
            if ek is None:
                ek = self._create_ek()
            else:
                check_ek_public(ek.public)
            if self._pinned_ek not in (b"", ek.public):
                raise AskOperator("tpm.ek_changed", "the TPM shows another endorsement key than before")
            self._pinned_ek = ek.public
            self._ek_name = object_name(ek.public)
            self._ek = ek
        return self._ek

    def _create_ek(self) -> _Key:
        """A new EK, made persistent."""
        with self._creation_session() as session, contextlib.ExitStack() as made:

            def create(template: bytes) -> _Key:
                key = self._create_primary(self._tss.ESYS_TR.ENDORSEMENT, template, check_ek_public, session)
                made.enter_context(self._flushed(key.handle))
                return key

            created = make_ek(
                self._ek_template, lambda index: self._nv_content(index, lambda: session), create, self._ek_name
            )
            return _Key(self._evict_control(created.handle, self._ek_handle, session), created.public)

    def _storage_root_key(self) -> _Key:
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
                self._command("read_public", object_handle=srk.handle, session1=self._salted_session())
            self._srk = srk
            at = int(self._esapi.tr_get_tpm_handle(esys_handle=srk.handle))
            self.srk_found_at = at if at >= PERSISTENT else 0
        return self._srk

    def _look_for_srk(self) -> tuple[_Key | None, int]:
        """Our SRK at another handle than the usual one, or None and the first free handle."""
        taken = self._handles(_OTHER_SRK_HANDLES.start, len(_OTHER_SRK_HANDLES))
        for handle in taken:
            if handle in _OTHER_SRK_HANDLES:
                key = self._present(handle)
                if key is not None and is_srk(key.public):
                    return key, handle
        return None, next(handle for handle in _OTHER_SRK_HANDLES if handle not in taken)

    def _create_srk(self, handle: int) -> _Key:
        session = self._salted_session()
        created = self._create_primary(self._tss.ESYS_TR.OWNER, srk_template(), check_srk_public, session)
        self._held.append(created.handle)
        try:
            persistent = self._evict_control(created.handle, handle, session)
        except RefusedError as refused:
            if refused.code == RC_NV_SPACE:
                return created  # a transient serves as well: the same template gives the same key at every start
            self._flush(created.handle)
            raise
        self._flush(created.handle)
        return _Key(persistent, created.public)

    def _create_primary(self, hierarchy: int, template: bytes, check: Callable[[bytes], None], session: int) -> _Key:
        """A new transient primary key, checked against its template; the caller flushes it."""
        tss = self._tss
        self.creates_key = True
        self._until_s = max(self._until_s, self._began_s + KEY_CREATION_LIMIT_S)
        try:
            handle, public, *_ = self._command(
                "create_primary",
                in_sensitive=tss.TPM2B_SENSITIVE_CREATE(),
                in_public=self._structure("TPM2B_PUBLIC", template),
                primary_handle=hierarchy,
                outside_info=b"",
                creation_pcr=tss.TPML_PCR_SELECTION(),
                session1=session,
            )
        except RefusedError as refused:
            refused.of_owner = hierarchy == tss.ESYS_TR.OWNER
            raise
        key = _Key(handle, bytes(public.marshal()))
        try:
            check(key.public)
        except AskOperator:
            self._held.append(handle)
            self._flush(handle)
            raise
        return key

    def _evict_control(self, key: int, persistent_handle: int, session: int) -> int:
        """Makes a transient key persistent, or removes a persistent one."""
        handle: int = self._command(
            "evict_control",
            auth=self._tss.ESYS_TR.OWNER,
            object_handle=key,
            persistent_handle=persistent_handle,
            session1=session,
        )
        return handle

    def _present(self, tpm_handle: int) -> _Key | None:
        """The object at a persistent handle, or None where there is none."""
        try:
            handle = self._command("tr_from_tpmpublic", handle=tpm_handle)
        except RefusedError as refused:
            if refused.unknown_handle:
                return None
            raise
        # The library has just read the public area and keeps it at the end of what it serialises, behind the name that
        # the TPM gave: a second ReadPublic is needed only where the two do not fit together.
        serialised = bytes(self._command("tr_serialize", esys_handle=handle))
        for size in _PUBLIC_SIZES:
            public = serialised[-size:]
            if public[4:6] == _SHA256 and sized(object_name(public)) in serialised[:-size]:
                return _Key(handle, public)
        structure, name, _ = self._command("read_public", object_handle=handle)
        public = bytes(structure.marshal())
        altered = bytes(name)[:2] != public[4:6]
        if public[4:6] == _SHA256:
            altered = altered or len(public) in _PUBLIC_SIZES or bytes(name) != object_name(public)
        if altered:
            # An EK or SRK would have been found above: the library holds another key for this handle than it read now.
            raise RefusedError("read_public", RC_ALTERED)
        return _Key(handle, public)

    def _structure(self, kind: str, marshalled: bytes) -> Any:
        """A structure of tpm2-pytss from its bytes."""
        structure, _ = getattr(self._tss, kind).unmarshal(marshalled)
        return structure

    @contextlib.contextmanager
    def _loaded(self, public: bytes, private: bytes, session: int) -> Iterator[int]:
        """A wrapped key, loaded under the SRK for a while."""
        srk = self._storage_root_key()
        try:
            in_private = self._structure("TPM2B_PRIVATE", private)
            in_public = self._structure("TPM2B_PUBLIC", public)
        except self._tss.TSS2_Exception as error:
            raise RefusedError("load", int(error.rc), str(error)) from None
        key = self._command(
            "load", parent_handle=srk.handle, in_private=in_private, in_public=in_public, session1=session
        )
        with self._flushed(key):
            yield key

    # --- what the operations do

    def _import_key(self, activation: Activation) -> bytes:
        tss = self._tss
        session = self._salted_session()
        ek, srk = self._endorsement_key(), self._storage_root_key()
        try:
            credential = self._structure("TPM2B_ID_OBJECT", sized(activation.credential))
            credential_secret = self._structure("TPM2B_ENCRYPTED_SECRET", sized(activation.credential_secret))
            duplicate = self._structure("TPM2B_PRIVATE", sized(activation.duplicate))
            duplicate_seed = self._structure("TPM2B_ENCRYPTED_SECRET", sized(activation.duplicate_seed))
            public = self._structure("TPM2B_PUBLIC", activation.id_key_public)
        except tss.TSS2_Exception as error:
            raise RefusedError("activate_credential", int(error.rc), str(error)) from None
        with self._flushed(self._start_policy()) as policy:
            self._policy_secret(tss.ESYS_TR.ENDORSEMENT, policy, session)
            # Without continueSession the TPM frees the policy session when the command succeeds.
            self._esapi.trsess_set_attributes(session=policy, attributes=0, mask=0xFF)
            inner_key = self._command(
                "activate_credential",
                activate_handle=srk.handle,
                key_handle=ek.handle,
                credential_blob=credential,
                secret=credential_secret,
                session1=session,
                session2=policy,
            )
            self._held.remove(policy)
        try:
            private = self._command(
                "import_",
                parent_handle=srk.handle,
                encryption_key=bytes(inner_key),
                object_public=public,
                duplicate=duplicate,
                in_sym_seed=duplicate_seed,
                symmetric_alg=tss.TPMT_SYM_DEF_OBJECT(
                    algorithm=tss.TPM2_ALG.AES,
                    keyBits=tss.TPMU_SYM_KEY_BITS(aes=128),
                    mode=tss.TPMU_SYM_MODE(aes=tss.TPM2_ALG.CFB),
                ),
                session1=session,
            )
        except RefusedError as refused:
            check_duplicate_fits(refused, activation.duplicate)
            raise
        wrapped_private = bytes(private.marshal())
        if not has_no_da(activation.id_key_public):
            self._try_out(activation.id_key_public, wrapped_private, session)
        return wrap(activation.id_key_public, wrapped_private)

    def _try_out(self, public: bytes, private: bytes, session: int) -> None:
        """The first use of a key without noDA: AskOperator `dps.key_unsuitable` where it has a password of its own."""
        with self._loaded(public, private, session) as key:
            refuse_untried(self._properties(PT_LOCKOUT_COUNTER, PT_LOCKOUT_INTERVAL))
            self._shutdown_due = True
            try:
                self._hmac(key, b"", session)
            except RefusedError as refused:
                if refused.by_key:
                    raise own_password(refused) from None
                raise

    def _start_policy(self) -> int:
        tss = self._tss
        policy: int = self._command(
            "start_auth_session",
            tpm_key=tss.ESYS_TR.NONE,
            bind=tss.ESYS_TR.NONE,
            session_type=tss.TPM2_SE.POLICY,
            symmetric=tss.TPMT_SYM_DEF(algorithm=tss.TPM2_ALG.NULL),
            auth_hash=tss.TPM2_ALG.SHA256,
        )
        return policy

    def _policy_secret(self, hierarchy: int, policy: int, session: int) -> None:
        """Shows the policy session that we know the hierarchy's password."""
        try:
            self._command(
                "policy_secret",
                auth_handle=hierarchy,
                policy_session=policy,
                nonce_tpm=b"",
                cp_hash_a=b"",
                policy_ref=b"",
                expiration=0,
                session1=session,
            )
        except RefusedError as refused:
            refused.of_owner = hierarchy == self._tss.ESYS_TR.OWNER
            raise

    def _try_passwords(self) -> None:
        session = self._salted_session()
        tr = self._tss.ESYS_TR
        for hierarchy in (tr.ENDORSEMENT, tr.OWNER):
            if self._passwords.of(owner=hierarchy == tr.OWNER):
                with self._flushed(self._start_policy()) as policy:
                    self._policy_secret(hierarchy, policy, session)

    def _hmac(self, key: int, message: bytes, session: int) -> bytes:
        sha256 = self._tss.TPM2_ALG.SHA256
        if len(message) <= MAX_BUFFER_BYTES:
            return bytes(self._command("hmac", handle=key, buffer=message, hash_alg=sha256, session1=session))
        sequence = self._command("hmac_start", handle=key, auth=b"", hash_alg=sha256, session1=session)
        with self._flushed(sequence):
            while len(message) > MAX_BUFFER_BYTES:
                self._command(
                    "sequence_update",
                    sequence_handle=sequence,
                    buffer=message[:MAX_BUFFER_BYTES],
                    session1=session,
                )
                message = message[MAX_BUFFER_BYTES:]
            digest, _ = self._command(
                "sequence_complete",
                sequence_handle=sequence,
                buffer=message,
                hierarchy=self._tss.ESYS_TR.NULL,
                session1=session,
            )
            self._held.remove(sequence)  # the TPM frees a completed sequence
        return bytes(digest)

    def _nv_content(self, tpm_index: int, session_of: Callable[[], int]) -> bytes | None:
        """What an NV index holds, None where there is none or nothing was written to it.

        Read by its own empty password, else by the owner's, in the session. AskOperator `tpm.certificate_locked`.
        """
        try:
            index = self._command("tr_from_tpmpublic", handle=tpm_index)
        except RefusedError as refused:
            if refused.unknown_handle:
                return None
            raise
        public, name = self._command("nv_read_public", nv_index=index)
        marshalled = bytes(public.marshal())
        if marshalled[6:8] == _SHA256 and bytes(name) != object_name(marshalled):
            raise RefusedError("nv_read_public", RC_ALTERED)
        ways = ways_to_read(tpm_index, int(public.nvPublic.attributes))
        size = int(public.nvPublic.dataSize)
        most_bytes = nv_chunk_bytes(self._properties(PT_NV_BUFFER_MAX, PT_NV_BUFFER_MAX))
        session = session_of()
        content = b""
        by_owner = ways[0]
        while len(content) < size:
            chunk_bytes = min(most_bytes, size - len(content))
            try:
                chunk = self._command(
                    "nv_read",
                    nv_index=index,
                    size=chunk_bytes,
                    offset=len(content),
                    auth_handle=self._tss.ESYS_TR.OWNER if by_owner else index,
                    session1=session,
                )
            except RefusedError as refused:
                if refused.code == RC_NV_UNINITIALIZED:
                    return None
                if refused.wrong_auth and not by_owner:
                    if ways[-1]:
                        by_owner = True
                        continue
                    raise nv_locked(tpm_index, "it has a password") from None
                refused.of_owner = by_owner
                raise
            if len(chunk) != chunk_bytes:
                raise RefusedError("nv_read", RC_ALTERED)
            content += bytes(chunk)
        return content

    def _makers_template(self, session_of: Callable[[], int]) -> bytes:
        return template_in(lambda index: self._nv_content(index, session_of))

    def _handles(self, first: int, count: int) -> list[int]:
        """At most `count` handles in use from `first` on, of its kind."""
        _, capability = self._command(
            "get_capability", capability=self._tss.TPM2_CAP.HANDLES, prop=first, property_count=count
        )
        return [int(handle) for handle in capability.data.handles]

    def _properties(self, first: int, last: int) -> dict[int, int]:
        """TPM properties by number; those that the TPM does not have are missing."""
        _, capability = self._command(
            "get_capability",
            capability=self._tss.TPM2_CAP.TPM_PROPERTIES,
            prop=first,
            property_count=last - first + 1,
        )
        return {int(entry.property): int(entry.value) for entry in capability.data.tpmProperties}

    def _locked_out(self, what: str) -> RetryLater:
        try:
            return locked_out(what, self._properties(PT_LOCKOUT_INTERVAL, PT_LOCKOUT_INTERVAL))
        except RefusedError:
            return locked_out(what, {})


def _load_tpm2_pytss() -> Any:
    # The C libraries print every refusal to stderr, also those that are expected, unless told otherwise.
    os.environ.setdefault("TSS2_LOG", "all+NONE")
    try:
        import tpm2_pytss
    except ImportError as error:
        text = f"the package tpm2-pytss cannot be loaded: {error}; the extra 'tpm' has it"
        raise AskOperator("tpm.not_available", text) from None
    return tpm2_pytss
