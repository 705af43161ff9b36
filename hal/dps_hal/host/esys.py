"""The commands of the TPM procedure through tpm2-tss; the only file that imports tpm2-pytss, when a TPM is wanted.

Commands and their parameters: TPM 2.0 Library Part 3; return codes: Part 2, 6.6. Every call into tpm2-pytss names
its arguments, because their order differs between 1.2.0 (Debian 12) and 3.0.0.
"""

from __future__ import annotations

import contextlib
import os
import struct

from dps_hal.errors import AskOperator, RetryLater
from dps_hal.host.service_tpm import ServiceTpm
from dps_hal.host.tpm_node import is_managed, open_device
from dps_hal.tpm.commands import CAP_HANDLES, ENDORSEMENT, NULL, OWNER, Key, Repeated
from dps_hal.tpm.errors import (
    LAYER_ESYS,
    LAYER_MARSHALLING,
    LAYER_SYS,
    RC_ALTERED,
    RC_BAD_TAG,
    RefusedError,
)
from dps_hal.tpm.keys import ALG_SHA256, RSA_BYTES, SHA256_BYTES, ek_public, object_name, sized, srk_public
from dps_hal.tpm.rules import CODES

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from dps_hal.contracts import WhileWaiting
    from dps_hal.tpm.activation import Activation

_ONE_CLIENT = ("swtpm", "mssim", "libtpms")  # TCTIs of a TPM that is ours for as long as we are connected
_SHA256 = struct.pack(">H", ALG_SHA256)
_ID_KEY_BYTES = 18 + SHA256_BYTES  # the TPM2B_PUBLIC of an HMAC key without policy
_PUBLIC_SIZES = (len(ek_public(bytes(RSA_BYTES))), len(srk_public(bytes(RSA_BYTES))), _ID_KEY_BYTES)

# Of ESAPI's layer: BAD_SEQUENCE, MALFORMED_RESPONSE, INSUFFICIENT_RESPONSE, RSP_AUTH_FAILED. After the last three a
# context refuses every command with the first.
_ANSWER_REFUSED = (0x70007, 0x70011, 0x70013, 0x7001B)
_TPM_1_2 = 0x80001  # GENERAL_FAILURE of SAPI's layer, which knows a response of a TPM 1.2 by its tag
_TCTI_UNKNOWN = (0x5, 0xB, 0x15)  # BAD_REFERENCE, BAD_VALUE, NOT_SUPPORTED: no such TCTI, or its string is wrong


class EsysTpm(ServiceTpm):
    """A `TpmService` on any TCTI of tpm2-tss: `device:/dev/tpmrm0`, `swtpm:…`, `mssim:…`, `tabrmd`.

    The library makes salt and nonces from the host's randomness. While a command runs the thread blocks in the TSS,
    without `while_waiting` and without a limit of ours: the kernel's driver ends it, and above that the runner's own
    deadline. Between commands that the TPM asks to repeat, `while_waiting` is called at least once a second. The
    settings are those of `TpmProcedure`.
    """

    def __init__(self, tcti: str, *, while_waiting: WhileWaiting | None = None, **settings: Any) -> None:
        """Does not touch the TPM yet; AskOperator `tpm.not_available` where tpm2-pytss or tpm2-tss is missing."""
        super().__init__(EsysCommands(tcti, while_waiting), **settings)


class EsysKey(Key):
    """A key, session, sequence or NV index that this context of the library knows."""

    tr: Any  # the library's own handle for it


class EsysCommands(Repeated):
    """The `Commands` through ESAPI, each as said there; the first of them opens the connection."""

    def __init__(self, tcti: str, while_waiting: WhileWaiting | None) -> None:
        super().__init__(while_waiting)
        self._tss = _load_tpm2_pytss()
        self._tcti = tcti
        self._kind, _, self._path = tcti.partition(":")
        self._context: Any = None
        self._spent = False  # the context takes no further command; the connection below it does
        tr = self._tss.ESYS_TR
        self._hierarchies = {OWNER: tr.OWNER, ENDORSEMENT: tr.ENDORSEMENT, NULL: tr.NULL}
        aes = {"algorithm": self._tss.TPM2_ALG.AES, "mode": self._tss.TPMU_SYM_MODE(aes=self._tss.TPM2_ALG.CFB)}
        self._sha256 = self._tss.TPM2_ALG.SHA256
        self._aes_128_cfb = {**aes, "keyBits": self._tss.TPMU_SYM_KEY_BITS(aes=128)}

    # --- connection

    @property
    def managed(self) -> bool:
        """As `Commands` has it; a device without a path is any, of which tpmrm0 is tried first."""
        is_direct = self._kind == "device" and self._path != "" and not is_managed(self._path)
        return self.shared and not is_direct

    @property
    def shared(self) -> bool:
        """As `Commands` has it; behind a device node, /dev/tpm0 too, or a broker others are at work meanwhile."""
        return self._kind not in _ONE_CLIENT

    @property
    def _esapi(self) -> Any:
        """The library's context, opened now if it is not."""
        if self._context is None:
            if self._kind == "device" and self._path:
                os.close(open_device(self._path))  # says why it cannot be used, which the TSS's return code does not
            try:
                self._context = self._tss.ESAPI(tcti=self._tcti)
            except self._tss.TSS2_Exception as error:
                if error.rc & 0xFFFF in _TCTI_UNKNOWN:
                    raise AskOperator(
                        "tpm.not_available",
                        f"tpm2-tss cannot use the TCTI {self._tcti!r}: expected such as device:/dev/tpmrm0, and its"
                        " libtss2-tcti library installed",
                    ) from None
                text = f"no TPM answers at {self._tcti!r}: {error}"
                if self._kind == "swtpm":
                    text += "; tpm2-tss also needs swtpm's control channel, at the port after the server's"
                raise RetryLater("tpm.absent", text) from None
            except RuntimeError as error:  # tpm2-pytss's own complaint about the string
                raise AskOperator("config.invalid", f"tcti: expected NAME or NAME:SETTINGS; {error}") from None
        return self._context

    def close(self) -> None:
        if self._context is not None:
            self._context.close()
        self._context = None
        self._spent = False

    def _command(self, method: str, **arguments: Any) -> Any:
        """Runs one command, again where the TPM asks for that."""

        def once() -> Any:
            try:
                return getattr(self._esapi, method)(**arguments)
            except self._tss.TSS2_Exception as error:
                raise self._refused(method.rstrip("_"), int(error.rc), str(error)) from None

        return self._until_done(method, once)

    def _refused(self, command: str, rc: int, text: str) -> RefusedError:
        """Why a command did not succeed.

        What is sent was made from structures of the library's, so what does not fit a structure is the answer.
        """
        refused = RefusedError(command, rc, text)
        if rc == _TPM_1_2:
            return RefusedError(command, RC_BAD_TAG, text)
        if rc in _ANSWER_REFUSED or refused.layer in (LAYER_SYS, LAYER_MARSHALLING):
            refused = RefusedError(command, RC_ALTERED, text)
        self._spent = self._spent or refused.layer == LAYER_ESYS
        return refused

    def _start_up(self, name: str) -> None:
        with contextlib.suppress(self._tss.TSS2_Exception):
            self._esapi.startup(startup_type=self._tss.TPM2_SU.CLEAR)

    def _past_the_library(self, name: str, parameters: bytes) -> bytes:
        """What the TPM answers to a command without sessions, for which ESAPI has no handle or no more use."""

        def once() -> bytes:
            tcti = self._esapi.get_tcti()
            try:
                tcti.transmit(command=struct.pack(">HII", 0x8001, 10 + len(parameters), CODES[name]) + parameters)
                answer = bytes(tcti.receive(size=4096))
            except self._tss.TSS2_Exception as error:
                raise RefusedError("flush_context", int(error.rc), str(error)) from None
            if answer[6:10] != bytes(4):
                raise RefusedError("flush_context", int.from_bytes(answer[6:10], "big"))
            return answer[10:]

        return self._until_done("flush_context", once)

    def _structure(self, kind: str, marshalled: bytes, command: str = "activate_credential") -> Any:
        """A structure of tpm2-pytss from its bytes; what is none is refused like a command that has it.

        Where one in the activation blob is none, the whole blob is for no TPM.
        """
        try:
            structure, _ = getattr(self._tss, kind).unmarshal(marshalled)
        except self._tss.TSS2_Exception as error:
            raise RefusedError(command, int(error.rc), str(error)) from None
        return structure

    def _known(self, tr: Any, public: bytes = b"", name: bytes = b"") -> EsysKey:
        key = EsysKey(int(self._esapi.tr_get_tpm_handle(esys_handle=tr)), public, name)
        key.tr = tr
        return key

    def _session(self, session: EsysKey | None) -> Any:
        return self._tss.ESYS_TR.PASSWORD if session is None else session.tr

    def _hierarchy(self, hierarchy: int, auth: bytes) -> Any:
        """ESAPI's handle of a hierarchy, with the password of which it makes the HMACs."""
        if hierarchy != NULL:
            self._esapi.tr_set_auth(esys_handle=self._hierarchies[hierarchy], auth_value=auth)
        return self._hierarchies[hierarchy]

    # --- keys

    def read_public(self, handle: int) -> EsysKey:
        tr = self._command("tr_from_tpmpublic", handle=handle)
        # The library has just read the public area and keeps it at the end of what it serialises, behind the name that
        # the TPM gave: a second ReadPublic is needed only where the two do not fit together.
        serialised = bytes(self._command("tr_serialize", esys_handle=tr))
        for size in _PUBLIC_SIZES:
            public = serialised[-size:]
            if public[4:6] == _SHA256 and sized(object_name(public)) in serialised[:-size]:
                return self._known(tr, public, object_name(public))
        structure, stated, _ = self._command("read_public", object_handle=tr)
        public, name = bytes(structure.marshal()), bytes(stated)
        altered = name[:2] != public[4:6]
        if public[4:6] == _SHA256:
            altered = altered or len(public) in _PUBLIC_SIZES or name != object_name(public)
        if altered:
            # A key of ours would have been found above: the library holds another for this handle than it read now.
            raise RefusedError("read_public", RC_ALTERED)
        return self._known(tr, public, name)

    def prove(self, key: EsysKey, session: EsysKey | None) -> None:
        self._command("read_public", object_handle=key.tr, session1=self._session(session))

    def create_primary(self, hierarchy: int, template: bytes, session: EsysKey | None, auth: bytes) -> EsysKey:
        tr, structure, *_ = self._command(
            "create_primary",
            in_sensitive=self._tss.TPM2B_SENSITIVE_CREATE(),
            in_public=self._structure("TPM2B_PUBLIC", template, "create_primary"),
            primary_handle=self._hierarchy(hierarchy, auth),
            outside_info=b"",
            creation_pcr=self._tss.TPML_PCR_SELECTION(),
            session1=self._session(session),
        )
        public = bytes(structure.marshal())
        return self._known(tr, public, object_name(public))

    def evict_control(self, key: EsysKey, persistent_handle: int, session: EsysKey | None, auth: bytes) -> EsysKey:
        tr = self._command(
            "evict_control",
            auth=self._hierarchy(OWNER, auth),
            object_handle=key.tr,
            persistent_handle=persistent_handle,
            session1=self._session(session),
        )
        persistent = EsysKey(persistent_handle, key.public, key.name)
        persistent.tr = tr
        return persistent

    def load(self, srk: EsysKey, public: bytes, private: bytes, session: EsysKey | None) -> EsysKey:
        tr = self._command(
            "load",
            parent_handle=srk.tr,
            in_private=self._structure("TPM2B_PRIVATE", private, "load"),
            in_public=self._structure("TPM2B_PUBLIC", public, "load"),
            session1=self._session(session),
        )
        return self._known(tr, public, object_name(public))

    def create(self, srk: EsysKey, template: bytes, session: EsysKey | None) -> tuple[bytes, bytes]:
        private, public, *_ = self._command(
            "create",
            parent_handle=srk.tr,
            in_sensitive=self._tss.TPM2B_SENSITIVE_CREATE(),
            in_public=self._structure("TPM2B_PUBLIC", template, "create"),
            outside_info=b"",
            creation_pcr=self._tss.TPML_PCR_SELECTION(),
            session1=self._session(session),
        )
        return bytes(public.marshal()), bytes(private.marshal())

    def activate_credential(
        self, ek: EsysKey, srk: EsysKey, activation: Activation, session: EsysKey | None, policy: EsysKey, keep: bool
    ) -> bytes:
        attributes = self._tss.TPMA_SESSION.CONTINUESESSION if keep else 0
        self._esapi.trsess_set_attributes(session=policy.tr, attributes=attributes, mask=0xFF)
        inner_key = self._command(
            "activate_credential",
            activate_handle=srk.tr,
            key_handle=ek.tr,
            credential_blob=self._structure("TPM2B_ID_OBJECT", sized(activation.credential)),
            secret=self._structure("TPM2B_ENCRYPTED_SECRET", sized(activation.credential_secret)),
            session1=self._session(session),
            session2=policy.tr,
        )
        return sized(bytes(inner_key))

    def import_key(self, srk: EsysKey, inner_key: bytes, activation: Activation, session: EsysKey | None) -> bytes:
        private = self._command(
            "import_",
            parent_handle=srk.tr,
            encryption_key=inner_key[2:],
            object_public=self._structure("TPM2B_PUBLIC", activation.id_key_public),
            duplicate=self._structure("TPM2B_PRIVATE", sized(activation.duplicate)),
            in_sym_seed=self._structure("TPM2B_ENCRYPTED_SECRET", sized(activation.duplicate_seed)),
            symmetric_alg=self._tss.TPMT_SYM_DEF_OBJECT(**self._aes_128_cfb),
            session1=self._session(session),
        )
        return bytes(private.marshal())

    # --- sessions

    def start_session(self, salt_key: EsysKey) -> EsysKey:
        tss = self._tss
        session = self._start(salt_key.tr, tss.TPM2_SE.HMAC, tss.TPMT_SYM_DEF(**self._aes_128_cfb))
        attributes = tss.TPMA_SESSION.CONTINUESESSION | tss.TPMA_SESSION.DECRYPT | tss.TPMA_SESSION.ENCRYPT
        self._esapi.trsess_set_attributes(session=session.tr, attributes=attributes, mask=0xFF)
        return session

    def start_policy(self) -> EsysKey:
        tss = self._tss
        return self._start(tss.ESYS_TR.NONE, tss.TPM2_SE.POLICY, tss.TPMT_SYM_DEF(algorithm=tss.TPM2_ALG.NULL))

    def _start(self, salt_key: Any, session_type: Any, symmetric: Any) -> EsysKey:
        return self._known(
            self._command(
                "start_auth_session",
                tpm_key=salt_key,
                bind=self._tss.ESYS_TR.NONE,
                session_type=session_type,
                symmetric=symmetric,
                auth_hash=self._sha256,
            )
        )

    def policy_secret(self, hierarchy: int, policy: EsysKey, session: EsysKey | None, auth: bytes) -> None:
        self._command(
            "policy_secret",
            auth_handle=self._hierarchy(hierarchy, auth),
            policy_session=policy.tr,
            nonce_tpm=b"",
            cp_hash_a=b"",
            policy_ref=b"",
            expiration=0,
            session1=self._session(session),
        )

    def flush(self, made: Key) -> None:
        """As `Commands.flush`; what this context has not made is flushed past it, by its handle in the TPM."""
        if isinstance(made, EsysKey) and not self._spent:
            self._command("flush_context", flush_handle=made.tr)
        else:
            self._past_the_library("flush_context", struct.pack(">I", made.handle))

    # --- signatures

    def hmac(self, key: EsysKey, message: bytes, session: EsysKey | None) -> bytes:
        return bytes(
            self._command("hmac", handle=key.tr, buffer=message, hash_alg=self._sha256, session1=self._session(session))
        )

    def hmac_start(self, key: EsysKey, session: EsysKey | None) -> EsysKey:
        return self._known(
            self._command("hmac_start", handle=key.tr, auth=b"", hash_alg=self._sha256, session1=self._session(session))
        )

    def sequence_update(self, sequence: EsysKey, piece: bytes, session: EsysKey | None) -> None:
        self._command("sequence_update", sequence_handle=sequence.tr, buffer=piece, session1=self._session(session))

    def sequence_complete(self, sequence: EsysKey, piece: bytes, session: EsysKey | None) -> bytes:
        digest, _ = self._command(
            "sequence_complete",
            sequence_handle=sequence.tr,
            buffer=piece,
            hierarchy=self._tss.ESYS_TR.NULL,
            session1=self._session(session),
        )
        return bytes(digest)

    def sign(self, key: EsysKey, digest: bytes, scheme: bytes) -> bytes:
        tss = self._tss
        signature = self._command(
            "sign",
            key_handle=key.tr,
            digest=digest,
            in_scheme=self._structure("TPMT_SIG_SCHEME", scheme, "sign"),
            validation=tss.TPMT_TK_HASHCHECK(tag=tss.TPM2_ST.HASHCHECK, hierarchy=tss.TPM2_RH.NULL),
        )
        return bytes(signature.marshal())

    # --- the TPM itself

    def shutdown(self) -> None:
        self._command("shutdown", shutdown_type=self._tss.TPM2_SU.CLEAR)

    def handles(self, first: int) -> list[int]:
        if self._spent:
            listing = self._past_the_library("get_capability", struct.pack(">III", CAP_HANDLES, first, 254))[9:]
            return [int.from_bytes(listing[at : at + 4], "big") for at in range(0, len(listing), 4)]
        found = self._capability(self._tss.TPM2_CAP.HANDLES, first, 254)
        return [int(handle) for handle in found.data.handles]

    def properties(self, first: int, last: int) -> dict[int, int]:
        found = self._capability(self._tss.TPM2_CAP.TPM_PROPERTIES, first, last - first + 1)
        return {int(entry.property): int(entry.value) for entry in found.data.tpmProperties}

    def _capability(self, capability: Any, first: int, count: int) -> Any:
        """What the TPM says; it owns the memory of its `data`, and so outlives their use."""
        return self._command("get_capability", capability=capability, prop=first, property_count=count)[1]

    def nv_read_public(self, index: int) -> EsysKey:
        tr = self._command("tr_from_tpmpublic", handle=index)
        public, name = self._command("nv_read_public", nv_index=tr)
        return self._known(tr, bytes(public.marshal()), bytes(name))

    def nv_read(
        self, index: EsysKey, size: int, offset: int, by_owner: bool, session: EsysKey | None, auth: bytes
    ) -> bytes:
        chunk = self._command(
            "nv_read",
            nv_index=index.tr,
            size=size,
            offset=offset,
            auth_handle=self._hierarchy(OWNER, auth) if by_owner else index.tr,
            session1=self._session(session),
        )
        return bytes(chunk)


def _load_tpm2_pytss() -> Any:
    # The C libraries print every refusal to stderr, also those that are expected, unless told otherwise.
    os.environ.setdefault("TSS2_LOG", "all+NONE")
    try:
        import tpm2_pytss
    except ImportError as error:
        text = f"the package tpm2-pytss cannot be loaded: {error}; the extra 'tpm' has it"
        raise AskOperator("tpm.not_available", text) from None
    return tpm2_pytss
