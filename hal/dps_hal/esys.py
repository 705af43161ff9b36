"""A real TPM through tpm2-tss and tpm2-pytss; the only file that imports it, and only when a TPM is wanted.

Commands and their parameters: TPM 2.0 Library Part 3; return codes: Part 2, 6.6. Every call into tpm2-pytss names
its arguments, because their order differs between 1.2.0 (Debian 12) and 3.0.0.
"""

from __future__ import annotations

import contextlib
import errno
import grp
import os
import pwd
import stat
import struct
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dps_hal.activation import Activation, parse_activation
from dps_hal.contracts import EK_HANDLE, SRK_HANDLE, TpmCondition
from dps_hal.errors import AskOperator, DpsError, IdentityStale, RetryLater
from dps_hal.tpm_keys import (
    MAX_HMAC_KEY_BYTES,
    RSA_BYTES,
    SHA256_BYTES,
    check_ek_public,
    check_id_key_public,
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
from dps_hal.tpm_keys import ek_template as template_of_ek

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any, TypeVar

    from dps_hal.contracts import WhileWaiting

    Answer = TypeVar("Answer")

EK_CERTIFICATE_INDEX = 0x01C00002  # TCG EK Credential Profile, 2.2.1.4: RSA-2048 EK certificate
MAX_BUFFER_BYTES = 1024  # TPM2B_MAX_BUFFER of the PC Client Platform TPM Profile; a longer message is a sequence
NV_CHUNK_BYTES = 512  # at most TPM_PT_NV_BUFFER_MAX, which the PC Client profile lets be this small
MAX_AUTH_BYTES = 64  # TPM2B_AUTH
COMMAND_LIMIT_S = 30.0  # one operation of the Tpm contract
KEY_CREATION_LIMIT_S = 180.0  # RSA-2048 key generation takes up to tens of seconds on real parts
RELEASE_LIMIT_S = 5.0

_OWNER_HANDLES = range(0x81000000, 0x81800000)  # TPM 2.0 Library Part 2, 7.5: persistent, of the owner
_OTHER_SRK_HANDLES = range(SRK_HANDLE + 1, 0x81000100)  # where ours goes when the usual handle is taken
# Two integrity digests and a seed value with their sizes, type, empty authorisation, the key's size, the key.
_LONGEST_DUPLICATE = 3 * (2 + SHA256_BYTES) + 2 + 2 + 2 + 2 + MAX_HMAC_KEY_BYTES
_PUBLIC_SIZES = (len(ek_public(bytes(RSA_BYTES))), len(srk_public(bytes(RSA_BYTES))))

_PT_MANUFACTURER = 0x105  # TPM_PT, TPM 2.0 Library Part 2, table 24, with the next four
_PT_FIRMWARE_VERSION_1 = 0x10B
_PT_HR_TRANSIENT_AVAIL = 0x207
_PT_LOCKOUT_COUNTER = 0x20E  # followed by MAX_AUTH_FAIL and LOCKOUT_INTERVAL
_PT_LOCKOUT_INTERVAL = 0x210

_RC_INITIALIZE = 0x100  # TPM_RC, Part 2, table 17, with the next eight
_RC_FAILURE = 0x101
_RC_NV_UNINITIALIZED = 0x14A
_RC_NV_SPACE = 0x14B
_RC_OUT_OF_MEMORY = (0x902, 0x903, 0x904, 0x905, 0x906)  # objects, sessions, memory, their handles
_RC_REFERENCES = range(0x910, 0x91F)  # a handle or session that is not loaded
_RC_LOCKOUT = 0x921
_RC_RESEND = (0x908, 0x90A, 0x920, 0x922)  # YIELDED, TESTING, NV_RATE, RETRY: the same command again
_FMT1_HANDLE = 0x8B  # format-one codes without the number of the handle, parameter or session
_FMT1_AUTH_FAIL = 0x8E
_FMT1_SIZE = 0x95
_FMT1_INSUFFICIENT = 0x9A
_FMT1_INTEGRITY = 0x9F
_FMT1_BAD_AUTH = 0xA2

_LAYER_MARSHALLING = 9  # TSS2 Overview and Common Structures, 3.1: who reports, bits 16 to 23 of a code
_LAYER_TCTI = 10
_TPM_LAYERS = (0, 11, 12)  # the TPM, or a resource manager that speaks for it
_TCTI_UNKNOWN = (0x5, 0xB, 0x15)  # BAD_REFERENCE, BAD_VALUE, NOT_SUPPORTED: no such TCTI, or its string is wrong
_ON_HIERARCHIES = ("policy_secret", "create_primary", "evict_control")


class _RefusedError(Exception):
    """One command that did not succeed: which method of ESAPI, its return code and the TSS's text."""

    def __init__(self, command: str, rc: int, text: str) -> None:
        super().__init__(command, rc)
        self.command = command
        self.rc = rc
        self.text = text
        self.layer = rc >> 16 & 0xFF
        self.code = rc & 0xFFFF if self.layer in _TPM_LAYERS else 0
        format_one = self.code & 0x80 != 0
        self.base = self.code & 0xBF if format_one else 0
        self.parameter = self.code >> 8 & 0xF if format_one and self.code & 0x40 else 0
        # About what was sent: of the library, about a parameter, or about none of handles, sessions and parameters.
        unnumbered = format_one and self.code & 0xF00 == 0
        self.about_content = self.layer == _LAYER_MARSHALLING or self.parameter != 0 or unnumbered

    @property
    def connection_lost(self) -> bool:
        return self.layer == _LAYER_TCTI

    @property
    def stale(self) -> bool:
        """Whether the connection, a session or a handle is no longer what it was: the TPM restarted or was cleared."""
        if self.layer not in (*_TPM_LAYERS, _LAYER_MARSHALLING) or self.code in _RC_REFERENCES:
            return True
        if self.base == _FMT1_HANDLE and not self.parameter:
            return True
        return self.base in (_FMT1_AUTH_FAIL, _FMT1_BAD_AUTH) and self.command not in _ON_HIERARCHIES


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
    ) -> None:
        """Does not touch the TPM yet; AskOperator `tpm.not_available` where tpm2-pytss or tpm2-tss is missing."""
        for setting, auth in (("owner_auth_file", owner_auth), ("endorsement_auth_file", endorsement_auth)):
            if len(auth) > MAX_AUTH_BYTES:
                raise AskOperator(
                    "config.invalid", f"{setting}: expected at most {MAX_AUTH_BYTES} bytes; came {len(auth)}"
                )
        self._ek_template = template_of_ek(ek_template)
        self._tss = _load_tpm2_pytss()
        self._tcti = tcti
        self._ek_handle = ek_handle
        self._srk_handle = srk_handle
        self._owner_auth = owner_auth
        self._endorsement_auth = endorsement_auth
        self._while_waiting = while_waiting
        self._until_s = 0.0  # on time.monotonic(): when this operation stops resending
        self._shutdown_due = False  # a key without noDA was used: a power cut would now count as a failed guess
        self._orphans: list[int] = []  # the TPM's handles of what a lost connection left there
        self._esapi: Any = None
        self._forget_connection()

    def _forget_connection(self) -> None:
        self._ek: _Key | None = None
        self._srk: _Key | None = None
        self._session: int | None = None
        self._held: list[int] = []  # ESAPI's handles of every session and transient object that is to be flushed

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

        def load_and_sign() -> bytes:
            session = self._salted_session()
            with self._loaded(public, private, session) as key:
                if not has_no_da(public):
                    self._refuse_at_the_brink()
                    self._shutdown_due = True
                return self._hmac(key, message, session)

        return self._operate(load_and_sign)

    def release(self) -> None:
        """As `Tpm.release`: nothing of ours stays in the TPM but EK and SRK."""
        if self._esapi is None:
            return
        self._until_s = time.monotonic() + RELEASE_LIMIT_S
        for _ in range(3):  # a TPM that refused to flush once may do it now
            for handle in reversed(self._held.copy()):
                self._flush(handle)
        if self._shutdown_due:
            with contextlib.suppress(_RefusedError):  # nobody can act on it; the TPM then counts one failure
                self._command("shutdown", shutdown_type=self._tss.TPM2_SU.CLEAR)
                self._shutdown_due = False
        self._close()
        if self._orphans:  # the connection was lost: one more, for them alone
            with contextlib.suppress(_RefusedError, DpsError):
                self._open()
            if self._esapi is not None:
                self._close()

    def endorsement_certificate(self) -> bytes | None:
        """As `TpmService.endorsement_certificate`; what follows the DER in the index is cut off."""
        return self._operate(self._endorsement_certificate)

    def persist(self, wrapped_key: bytes, handle: int) -> None:
        """As `TpmService.persist`: replaces an HMAC key, but nothing else (AskOperator `tpm.handle_taken`)."""
        public, private = unwrap(wrapped_key)
        if handle not in _OWNER_HANDLES:
            raise AskOperator("config.invalid", f"persist_at: expected 0x81000000 to 0x817fffff; came 0x{handle:08x}")

        def load_and_persist() -> None:
            session = self._salted_session()
            with self._loaded(public, private, session) as key:
                present = self._present(handle)
                if present is not None:
                    if present.public == public:
                        return
                    _check_replaceable(present.public, handle)
                    self._evict_control(present.handle, handle, session)
                self._evict_control(key, handle, session)

        self._operate(load_and_persist)

    def condition(self) -> TpmCondition:
        """As `TpmService.condition`."""

        def ask() -> TpmCondition:
            fixed = self._properties(_PT_MANUFACTURER, _PT_FIRMWARE_VERSION_1)
            variable = self._properties(_PT_HR_TRANSIENT_AVAIL, _PT_LOCKOUT_INTERVAL)
            firmware = fixed.get(_PT_FIRMWARE_VERSION_1, 0)
            return TpmCondition(
                maker=struct.pack(">I", fixed.get(_PT_MANUFACTURER, 0)).decode("latin-1").strip("\0 "),
                firmware=f"{firmware >> 16}.{firmware & 0xFFFF}",
                lockout_counter=variable.get(_PT_LOCKOUT_COUNTER, 0),
                lockout_maximum=variable.get(_PT_LOCKOUT_COUNTER + 1, 0),
                recovery_s=variable.get(_PT_LOCKOUT_INTERVAL, 0),
                free_slots=variable.get(_PT_HR_TRANSIENT_AVAIL, 0),
            )

        return self._operate(ask)

    # --- one operation: deadline, connection, one rebuild, errors named after who must act

    def _operate(self, operation: Callable[[], Answer]) -> Answer:
        self._until_s = time.monotonic() + COMMAND_LIMIT_S
        rebuilt = False
        while True:
            try:
                self._open()
                return operation()
            except _RefusedError as refused:
                if refused.stale:
                    self._drop(refused.connection_lost)
                    if not rebuilt:
                        rebuilt = True
                        continue
                raise self._error(refused) from None

    def _open(self) -> None:
        if self._esapi is not None:
            return
        kind, _, path = self._tcti.partition(":")
        if kind == "device" and path:
            _check_device(path)
        try:
            self._esapi = self._tss.ESAPI(tcti=self._tcti)
        except self._tss.TSS2_Exception as error:
            if error.rc & 0xFFFF in _TCTI_UNKNOWN:
                raise AskOperator(
                    "tpm.not_available",
                    f"tpm2-tss cannot use the TCTI {self._tcti!r}: expected such as device:/dev/tpmrm0, and its"
                    " libtss2-tcti library installed",
                ) from None
            raise RetryLater("tpm.absent", f"no TPM answers at {self._tcti!r}: {error}") from None
        except RuntimeError as error:  # tpm2-pytss's own complaint about the string
            raise AskOperator("config.invalid", f"tcti: expected NAME or NAME:SETTINGS; {error}") from None
        tr = self._tss.ESYS_TR
        self._esapi.tr_set_auth(esys_handle=tr.OWNER, auth_value=self._owner_auth)
        self._esapi.tr_set_auth(esys_handle=tr.ENDORSEMENT, auth_value=self._endorsement_auth)
        self._flush_orphans()

    def _drop(self, connection_lost: bool) -> None:
        """Gives a stale connection up."""
        if connection_lost:
            self._close()
        else:
            self.release()

    def _close(self) -> None:
        """Closes the context; what could not be flushed is left to the next one."""
        for handle in self._held:
            with contextlib.suppress(self._tss.TSS2_Exception):  # the library's own memory; no TPM is asked
                self._orphans.append(int(self._esapi.tr_get_tpm_handle(esys_handle=handle)))
        self._esapi.close()
        self._esapi = None
        self._forget_connection()

    def _flush_orphans(self) -> None:
        """Flushes what an earlier connection left; a TPM without resource manager keeps it, and has three slots.

        The bytes go past ESAPI, which knows only what this context made. Where the TPM has restarted it refuses them;
        a resource manager gives the handles of others to nobody.
        """
        tcti = self._esapi.get_tcti()
        try:
            while self._orphans:
                tcti.transmit(command=struct.pack(">HIII", 0x8001, 14, 0x165, self._orphans[-1]))  # FlushContext
                tcti.receive(size=4096)
                self._orphans.pop()
        except self._tss.TSS2_Exception as error:
            raise _RefusedError("flush_context", int(error.rc), str(error)) from None

    def _command(self, method: str, **arguments: Any) -> Any:
        """Runs one TPM command, again where the TPM asks for that; _RefusedError with its return code."""
        pause_s = 0.01
        started = False
        while True:
            try:
                return getattr(self._esapi, method)(**arguments)
            except self._tss.TSS2_Exception as error:
                refused = _RefusedError(method, int(error.rc), str(error))
            if refused.code == _RC_INITIALIZE and not started:  # a TPM on which no firmware has run, as on mssim
                started = True
                with contextlib.suppress(self._tss.TSS2_Exception):  # the command itself says whether it helped
                    self._esapi.startup(startup_type=self._tss.TPM2_SU.CLEAR)
            elif refused.code in _RC_RESEND and time.monotonic() + pause_s < self._until_s:
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, 1.0)
                if self._while_waiting is not None:
                    self._while_waiting()
            else:
                raise refused

    def _error(self, refused: _RefusedError) -> DpsError:
        """The class of error that a refused command is: by its return code, never by its text."""
        command, code = refused.command, refused.code
        message = f"the TPM refused {command} with 0x{refused.rc:x}: {refused.text}"
        if refused.connection_lost:
            return RetryLater("tpm.absent", f"the connection to the TPM broke in {command}: {refused.text}")
        if code in _RC_RESEND:
            return RetryLater("tpm.timeout", f"the TPM was not ready for {command} in time (0x{code:x})")
        if code == _RC_LOCKOUT:
            return self._locked_out("the TPM is locked out")
        if code in _RC_OUT_OF_MEMORY:
            return RetryLater("tpm.memory", message)
        if command == "activate_credential" and (refused.about_content or code == _RC_FAILURE):
            return IdentityStale("tpm.blob_refused", message)
        if command == "import_" and (refused.about_content or code == _RC_FAILURE):
            # Parameter 4 is the seed, which only this SRK can decrypt. With another inner key the duplicate decrypts to
            # random bytes, whose first two are a size that does not fit, or whose integrity is wrong.
            altered = refused.base in (_FMT1_SIZE, _FMT1_INSUFFICIENT, _FMT1_INTEGRITY)
            if altered or refused.parameter == 4 or code == _RC_FAILURE:
                return IdentityStale("tpm.blob_refused", message)
            return AskOperator("tpm.key_refused", message)
        if command == "load" and refused.about_content:
            return IdentityStale("tpm.key_stale", message)
        if code == _RC_FAILURE:
            return AskOperator("tpm.failure_mode", message)
        if command in _ON_HIERARCHIES and refused.base in (_FMT1_AUTH_FAIL, _FMT1_BAD_AUTH):
            return AskOperator("tpm.hierarchy_auth", message)
        if command == "evict_control" and code == _RC_NV_SPACE:
            return AskOperator("tpm.nv_full", message)
        return AskOperator("tpm.failed", message)

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
        except _RefusedError as refused:
            if refused.base != _FMT1_HANDLE:  # that is: the TPM does not know it any more
                return
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
        if not self._owner_auth and not self._endorsement_auth:
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
                with self._creation_session() as session:
                    hierarchy = self._tss.ESYS_TR.ENDORSEMENT
                    created = self._create_primary(hierarchy, self._ek_template, check_ek_public, session)
                    with self._flushed(created.handle):
                        ek = _Key(self._evict_control(created.handle, self._ek_handle, session), created.public)
            else:
                check_ek_public(ek.public)
            self._ek = ek
        return self._ek

    def _storage_root_key(self) -> _Key:
        if self._srk is None:
            srk = self._present(self._srk_handle)
            free_handle = self._srk_handle
            if srk is not None and not _is_srk(srk.public):
                srk, free_handle = self._look_for_srk()
            self._srk = srk or self._create_srk(free_handle)
        return self._srk

    def _look_for_srk(self) -> tuple[_Key | None, int]:
        """Our SRK at another handle than the usual one, or None and the first free handle."""
        _, capability = self._command(
            "get_capability",
            capability=self._tss.TPM2_CAP.HANDLES,
            prop=_OTHER_SRK_HANDLES.start,
            property_count=len(_OTHER_SRK_HANDLES),
        )
        taken = [int(handle) for handle in capability.data.handles]
        for handle in taken:
            if handle in _OTHER_SRK_HANDLES:
                key = self._present(handle)
                if key is not None and _is_srk(key.public):
                    return key, handle
        return None, next(handle for handle in _OTHER_SRK_HANDLES if handle not in taken)

    def _create_srk(self, handle: int) -> _Key:
        session = self._salted_session()
        created = self._create_primary(self._tss.ESYS_TR.OWNER, srk_template(), check_srk_public, session)
        self._held.append(created.handle)
        try:
            persistent = self._evict_control(created.handle, handle, session)
        except _RefusedError as refused:
            if refused.code == _RC_NV_SPACE:
                return created  # a transient serves as well: the same template gives the same key at every start
            self._flush(created.handle)
            raise
        self._flush(created.handle)
        return _Key(persistent, created.public)

    def _create_primary(self, hierarchy: int, template: bytes, check: Callable[[bytes], None], session: int) -> _Key:
        """A new transient primary key, checked against its template; the caller flushes it."""
        tss = self._tss
        self._until_s = max(self._until_s, time.monotonic() + KEY_CREATION_LIMIT_S)
        handle, public, *_ = self._command(
            "create_primary",
            in_sensitive=tss.TPM2B_SENSITIVE_CREATE(),
            in_public=self._structure("TPM2B_PUBLIC", template),
            primary_handle=hierarchy,
            outside_info=b"",
            creation_pcr=tss.TPML_PCR_SELECTION(),
            session1=session,
        )
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
        except _RefusedError as refused:
            if refused.base == _FMT1_HANDLE:
                return None
            raise
        # The library has just read the public area and keeps it at the end of what it serialises: a second
        # ReadPublic is needed only where the name says that this is not it.
        serialised = bytes(self._esapi.tr_serialize(esys_handle=handle))
        name = bytes(self._esapi.tr_get_name(handle=handle))
        for size in _PUBLIC_SIZES:
            if object_name(serialised[-size:]) == name:
                return _Key(handle, serialised[-size:])
        public, _, _ = self._command("read_public", object_handle=handle)
        return _Key(handle, bytes(public.marshal()))

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
            raise _RefusedError("load", int(error.rc), str(error)) from None
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
            raise _RefusedError("activate_credential", int(error.rc), str(error)) from None
        policy = self._command(
            "start_auth_session",
            tpm_key=tss.ESYS_TR.NONE,
            bind=tss.ESYS_TR.NONE,
            session_type=tss.TPM2_SE.POLICY,
            symmetric=tss.TPMT_SYM_DEF(algorithm=tss.TPM2_ALG.NULL),
            auth_hash=tss.TPM2_ALG.SHA256,
        )
        with self._flushed(policy):
            self._command(
                "policy_secret",
                auth_handle=tss.ESYS_TR.ENDORSEMENT,
                policy_session=policy,
                nonce_tpm=b"",
                cp_hash_a=b"",
                policy_ref=b"",
                expiration=0,
                session1=session,
            )
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
        except _RefusedError as refused:
            if refused.base == _FMT1_SIZE and len(activation.duplicate) > _LONGEST_DUPLICATE:
                raise AskOperator(
                    "tpm.key_refused", f"expected an HMAC key of at most {MAX_HMAC_KEY_BYTES} bytes; came a longer one"
                ) from None
            raise
        return wrap(activation.id_key_public, bytes(private.marshal()))

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

    def _endorsement_certificate(self) -> bytes | None:
        try:
            index = self._command("tr_from_tpmpublic", handle=EK_CERTIFICATE_INDEX)
        except _RefusedError as refused:
            if refused.base == _FMT1_HANDLE:
                return None
            raise
        public, _ = self._command("nv_read_public", nv_index=index)
        content = b""
        while len(content) < public.nvPublic.dataSize:
            try:
                chunk = self._command(
                    "nv_read",
                    nv_index=index,
                    size=min(NV_CHUNK_BYTES, public.nvPublic.dataSize - len(content)),
                    offset=len(content),
                    auth_handle=index,
                    session1=self._tss.ESYS_TR.PASSWORD,  # the index's empty password: the certificate is public
                )
            except _RefusedError as refused:
                if refused.code == _RC_NV_UNINITIALIZED:
                    return None
                raise
            content += bytes(chunk)
        if content[:2] == b"\x30\x82":  # an ASN.1 SEQUENCE that says its own length in two bytes
            return content[: 4 + int.from_bytes(content[2:4], "big")]
        return content

    def _properties(self, first: int, last: int) -> dict[int, int]:
        """TPM properties by number; those that the TPM does not have are missing."""
        _, capability = self._command(
            "get_capability",
            capability=self._tss.TPM2_CAP.TPM_PROPERTIES,
            prop=first,
            property_count=last - first + 1,
        )
        return {int(entry.property): int(entry.value) for entry in capability.data.tpmProperties}

    def _refuse_at_the_brink(self) -> None:
        """RetryLater `tpm.locked_out` where one more failure locks keys without noDA out."""
        properties = self._properties(_PT_LOCKOUT_COUNTER, _PT_LOCKOUT_INTERVAL)
        counter, maximum = properties.get(_PT_LOCKOUT_COUNTER, 0), properties.get(_PT_LOCKOUT_COUNTER + 1, 2)
        if counter >= maximum - 1:
            raise self._locked_out(f"the TPM has counted {counter} of {maximum} failures")

    def _locked_out(self, what: str) -> RetryLater:
        try:
            recovery_s = self._properties(_PT_LOCKOUT_INTERVAL, _PT_LOCKOUT_INTERVAL).get(_PT_LOCKOUT_INTERVAL)
        except _RefusedError:
            recovery_s = None
        return RetryLater("tpm.locked_out", f"{what}; it forgets one every {recovery_s or '?'} s", recovery_s)


def _load_tpm2_pytss() -> Any:
    # The C libraries print every refusal to stderr, also those that are expected, unless told otherwise.
    os.environ.setdefault("TSS2_LOG", "all+NONE")
    try:
        import tpm2_pytss
    except ImportError as error:
        raise AskOperator("tpm.not_available", f"the package tpm2-pytss cannot be loaded: {error}") from None
    return tpm2_pytss


def _is_srk(public: bytes) -> bool:
    try:
        check_srk_public(public)
    except AskOperator:
        return False
    return True


def _check_replaceable(public: bytes, handle: int) -> None:
    try:
        check_id_key_public(public)
    except (ValueError, AskOperator):
        raise AskOperator(
            "tpm.handle_taken", f"persist_at: expected a free handle or an HMAC key at 0x{handle:08x}; came another"
        ) from None


def _check_device(path: str) -> None:
    """Says why a device node cannot be used, which the TSS's return code does not."""
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM):
            raise AskOperator("tpm.denied", _denied(path)) from None
        if error.errno == errno.EBUSY:
            raise RetryLater("tpm.busy", f"{path} is in use by another program") from None
        raise AskOperator("tpm.absent", f"no TPM at {path}: {error.strerror}") from None


def _denied(path: str) -> str:
    node = os.stat(path)
    owner = _name_of(node.st_uid, lambda number: pwd.getpwuid(number).pw_name)
    group = _name_of(node.st_gid, lambda number: grp.getgrgid(number).gr_name)
    user = _name_of(os.geteuid(), lambda number: pwd.getpwuid(number).pw_name)
    mode = stat.filemode(node.st_mode)
    tss = group if group != "root" else "tss"
    return (
        f"{user} may not open {path} ({mode}, owner {owner}, group {group}); run 'sudo usermod -aG {tss} {user}'"
        " and log in again"
    )


def _name_of(number: int, look_up: Callable[[int], str]) -> str:
    try:
        return look_up(number)
    except KeyError:
        return str(number)
