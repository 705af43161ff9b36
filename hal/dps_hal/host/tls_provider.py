"""TLS by a key that the TPM has: OpenSSL's provider tpm2, in this process and for nothing else in it; CPython only.

The provider is a module of OpenSSL's (the package tpm2-openssl, https://github.com/tpm2-software/tpm2-openssl). It is
loaded into the libcrypto that Python's `ssl` has, behind OpenSSL's own algorithms, which go on doing all that they can
do: the system's openssl.cnf is neither read for it nor changed. It is loaded once, with the first key, and stays: what
OpenSSL 3.0 does when a provider is taken away is not safe beside other threads.

From the first key on the provider has a connection of its own to the TPM, until the process ends; on a device node that
lasts, by `swtpm:` each command has one. So it takes a TPM that more than one may have open: behind the kernel's
resource manager or a broker, or a simulator. Each context with a key has an object in the TPM. `TpmKey` gives it back:
Python itself would do that under its lock, in which a TPM that hangs would stop all threads.

What the TPM has refused is known by the return code, with which the provider begins the text of its errors; Python's
own functions would drop it. OpenSSL's functions are those that the module `_ssl` was linked with. Sources:
OSSL_PROVIDER(3), ERR_get_error(3), CRYPTO_get_ex_new_index(3), provider-tpm2(7).
"""

from __future__ import annotations

import os
import threading

from dps_hal.errors import AskOperator, RetryLater
from dps_hal.host.tpm_node import is_managed, open_device
from dps_hal.tpm.errors import LAYER_ESYS, RefusedError

TYPE_CHECKING = False
if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable
    from typing import Any

    from dps_hal.errors import DpsError

OLDEST = (1, 2)  # before it a key of the TPM's was used by OpenSSL as if it were in memory
_SHARED = ("swtpm", "tabrmd")  # TCTIs by which several have a TPM at once, beside managed device nodes
_TCTI_VARIABLE = "TPM2OPENSSL_TCTI"
_MODULES_VARIABLE = "OPENSSL_MODULES"
_MODULES_DIR = 1003  # OPENSSL_INFO_MODULES_DIR
_OF_CONTEXTS = 1  # CRYPTO_EX_INDEX_SSL_CTX
_UTF8_POINTER = 6  # OSSL_PARAM_UTF8_PTR
_OF_DSO = 37  # ERR_LIB_DSO: the module cannot be loaded, whatever it would do
_BAD_SEQUENCE = 0x70007  # TSS2_ESYS_RC_BAD_SEQUENCE: what a context says once an answer did not come whole

_found: list[_Openssl] = []
_called: list[object] = []  # by OpenSSL, as long as the process lives


class ConnectionLost(RetryLater):
    """The provider's connection to the TPM broke: tpm2-tss takes no further command on it, and nobody can renew it."""


class TpmKey:
    """A key of one context, an object in the TPM until `release`."""

    def __init__(self, openssl: _Openssl, pointer: int) -> None:
        self._openssl = openssl
        self.pointer = pointer

    def release(self) -> None:
        """Flushes it from the TPM, once no context and no connection has it any more; takes as long as the TPM does."""
        pointer, self.pointer = self.pointer, 0
        if pointer:
            self._openssl.library.EVP_PKEY_free(pointer)


class _Openssl:
    """The two libraries of this Python's `ssl`, and the provider in them."""

    def __init__(self) -> None:
        try:
            import _ssl
            import ctypes

            self.ctypes: Any = ctypes
            self.library: Any = ctypes.CDLL(_ssl.__file__)
            library = self.library
            pointer, text, number, long = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int, ctypes.c_long
            numbers, texts = ctypes.POINTER(number), ctypes.POINTER(text)
            on_new = ctypes.CFUNCTYPE(None, pointer, pointer, pointer, number, long, pointer)
            for function, result, arguments in (
                (library.OSSL_PROVIDER_load, pointer, [pointer, text]),
                (library.OSSL_PROVIDER_unload, number, [pointer]),
                (library.OSSL_PROVIDER_get_params, number, [pointer, pointer]),
                (library.OPENSSL_info, text, [number]),
                (library.ERR_clear_error, None, []),
                (library.ERR_get_error_all, ctypes.c_ulong, [texts, numbers, texts, texts, numbers]),
                (library.ERR_reason_error_string, text, [ctypes.c_ulong]),
                (library.CRYPTO_get_ex_new_index, number, [number, long, pointer, on_new, *2 * [pointer]]),
                (library.BIO_new_mem_buf, pointer, [text, number]),
                (library.BIO_free, number, [pointer]),
                (library.PEM_read_bio_PrivateKey, pointer, [pointer, pointer, pointer, text]),
                (library.EVP_PKEY_free, None, [pointer]),
                (library.SSL_CTX_use_certificate_chain_file, number, [pointer, text]),
                (library.SSL_CTX_use_PrivateKey, number, [pointer, pointer]),
            ):
                function.restype, function.argtypes = result, arguments  # type: ignore[assignment]
            # OpenSSL never gives such an index back: there is one for the process, and what it calls stays.
            self._thread = threading.local()
            _called.append(on_new(self._note))
            library.CRYPTO_get_ex_new_index(_OF_CONTEXTS, 0, None, _called[-1], None, None)
        except (ImportError, AttributeError, OSError, MemoryError) as error:
            text_of_it = f"the OpenSSL of this Python is not to be reached ({type(error).__name__}: {error})"
            raise AskOperator("tpm.tls_provider", f"{text_of_it}: use the distribution's Python") from None
        self.loaded_for: str | None = None  # the TCTI of the provider, once that is loaded

    def module(self) -> str:
        """The file of the provider."""
        folder = os.environ.get(_MODULES_VARIABLE) or os.fsdecode(self.library.OPENSSL_info(_MODULES_DIR) or b"")
        return os.path.join(folder, "tpm2.so")

    def refuse_another(self, tcti: str) -> None:
        """AskOperator where this process has keys of another TPM than that."""
        if self.loaded_for not in (None, tcti):
            text = f"tcti: TLS has keys of the TPM at {self.loaded_for} as long as this process lives; came {tcti}"
            raise AskOperator("tpm.tls_provider", f"{text}: it changes with a restart only")

    def load(self, tcti: str) -> None:
        """See `load`."""
        self.refuse_another(tcti)
        if self.loaded_for is not None:
            return
        kind, _, path = tcti.partition(":")
        if kind == "device":
            os.close(open_device(path))  # says why it cannot be used, which the provider does not
        os.environ[_TCTI_VARIABLE] = tcti
        library = self.library
        library.ERR_clear_error()  # what others have left
        # Whoever loads one provider has to load OpenSSL's own, too, and first: what both can do is done by the first.
        own = library.OSSL_PROVIDER_load(None, b"default")
        provider = library.OSSL_PROVIDER_load(None, b"tpm2") if own else None
        if not provider:
            errors = self._errors()
            if not own or any(number == _OF_DSO and _return_code(data) is None for number, _, data in errors):
                raise AskOperator("tpm.tls_provider", f"OpenSSL's provider tpm2 cannot be loaded, {self.module()}")
            said = "; ".join(filter(None, (f"{reason} {data}".strip() for _, reason, data in errors)))
            raise RetryLater("tpm.absent", f"no TPM answers OpenSSL's provider tpm2 at {tcti!r}: {said or 'no reason'}")
        version = self._version_of(provider)
        if tuple(int(part) if part.isdecimal() else 0 for part in version.split("-")[0].split(".")) < OLDEST:
            library.OSSL_PROVIDER_unload(provider)  # nobody has used it
            text = f"expected OpenSSL's provider tpm2 in version 1.2 or newer; came {version or 'none'}"
            raise AskOperator("tpm.tls_provider", text)
        self.loaded_for = tcti

    def key(self, pem: bytes) -> int:
        """The pointer to the key in `pem`, now an object in the TPM. Raises as `held`."""
        library = self.library
        library.ERR_clear_error()
        bio = library.BIO_new_mem_buf(pem, len(pem))
        try:
            pointer: int | None = library.PEM_read_bio_PrivateKey(bio, None, None, b"")  # asks nobody for a password
        finally:
            library.BIO_free(bio)
        if pointer:
            return pointer
        errors = self._errors()
        for _, reason, data in errors:
            if (rc := _return_code(data)) is not None:
                raise self._refused("read_public" if "parent" in reason else "load", rc, data)
        raise ValueError(f"the key: {_last(errors)}")

    def _refused(self, command: str, rc: int, text: str) -> DpsError:
        from dps_hal.tpm.verdicts import error_of

        refused = RefusedError(command, rc, text.partition(" ")[2])
        if refused.connection_lost or (refused.layer == LAYER_ESYS and rc == _BAD_SEQUENCE):
            lost = f"OpenSSL's provider tpm2 has lost its TPM at {self.loaded_for}, and finds it in a new process only"
            return ConnectionLost("tpm.absent", f"{lost}: {command}: {refused.text}")
        return error_of(refused, lambda what: RetryLater("tpm.locked_out", what))

    def show(self, context: int, chain_file: str, key: int) -> None:
        """Has connections of a context show the chain in a file, by a key; ValueError."""
        library = self.library
        library.ERR_clear_error()
        if not library.SSL_CTX_use_certificate_chain_file(context, os.fsencode(chain_file)):
            raise ValueError(f"the chain: {_last(self._errors())}")
        if not library.SSL_CTX_use_PrivateKey(context, key):
            raise ValueError(f"the key is not the one of the certificate: {_last(self._errors())}")

    def made(self, make: Callable[[], ssl.SSLContext]) -> tuple[ssl.SSLContext, int]:
        """What `make` makes, and OpenSSL's pointer to it: OpenSSL tells of each, the last one of this thread is it."""
        pointers = self._thread.pointers = []
        try:
            context = make()
        finally:
            self._thread.pointers = None
        if not pointers:
            text = "the OpenSSL of this Python does not tell of the contexts that it makes: use the distribution's"
            raise AskOperator("tpm.tls_provider", text)
        return context, pointers[-1]

    def _note(self, context: int, *_others: Any) -> None:
        pointers = getattr(self._thread, "pointers", None)
        if pointers is not None:
            pointers.append(context)

    def _errors(self) -> list[tuple[int, str, str]]:
        """What this thread's last call left, oldest first: the library's number, the reason, the text of the place."""
        ctypes: Any = self.ctypes
        file, function, data = (ctypes.c_char_p() for _ in range(3))
        line, flags = ctypes.c_int(), ctypes.c_int()
        found = []
        while error := self.library.ERR_get_error_all(file, line, function, data, flags):
            reason = self.library.ERR_reason_error_string(error) or b""
            found.append((error >> 23 & 0xFF, reason.decode("ascii", "replace"), _text(data.value)))
        return found

    def _version_of(self, provider: int) -> str:
        ctypes: Any = self.ctypes

        class Parameter(ctypes.Structure):  # type: ignore[misc]
            """OSSL_PARAM(3)."""

            _fields_ = (
                ("key", ctypes.c_char_p),
                ("data_type", ctypes.c_uint),
                ("data", ctypes.c_void_p),
                ("data_size", ctypes.c_size_t),
                ("return_size", ctypes.c_size_t),
            )

        found = ctypes.c_char_p()
        pair: Any = 2 * Parameter  # type: ignore[operator]
        asked = pair()
        asked[0] = Parameter(b"version", _UTF8_POINTER, ctypes.cast(ctypes.pointer(found), ctypes.c_void_p), 0, 0)
        self.library.OSSL_PROVIDER_get_params(provider, ctypes.byref(asked))
        return (found.value or b"").decode("ascii", "replace")


def require(tcti: str) -> None:
    """AskOperator `tpm.tls_provider` where TLS cannot have a key of the TPM at `tcti`; asks no TPM."""
    kind, _, path = tcti.partition(":")
    if not (kind in _SHARED or (kind == "device" and path and is_managed(path))):
        raise AskOperator(
            "tpm.tls_provider",
            "expected a TPM that TLS can use beside the agent: device:/dev/tpmrm0, or another node of the kernel's"
            f" resource manager, tabrmd, or swtpm; came {tcti}, which only one can have open, or nobody knows better",
        )
    openssl = _openssl()
    if not os.path.exists(openssl.module()):
        raise AskOperator("tpm.tls_provider", f"OpenSSL's provider tpm2 is missing, {openssl.module()}")
    openssl.refuse_another(tcti)
    os.environ.setdefault("TSS2_LOG", "all+NONE")  # the C libraries print every refusal to stderr otherwise


def load(tcti: str) -> None:
    """Loads the provider where it is not yet; takes as long as the TPM does.

    AskOperator `tpm.tls_provider` as `require`, which is called before, and for a version before 1.2; what a device
    node raises that cannot be opened; RetryLater `tpm.absent` where no TPM answers.
    """
    _openssl().load(tcti)


def held(make: Callable[[], ssl.SSLContext], chain_file: str, pem: bytes) -> tuple[ssl.SSLContext, TpmKey]:
    """The context that `make` makes, with the chain in a file and the key in `pem`, "TSS2 PRIVATE KEY"; and that key.

    After `load`; takes as long as the TPM does. What the TPM refuses is the error that it is for every back end, such
    as RetryLater `tpm.memory`, or IdentityStale `tpm.key_stale` for a key that it cannot have made. ConnectionLost
    where it is lost to this process. ValueError for a chain or key that is none, or where they do not belong together.
    """
    openssl = _openssl()
    context, pointer = openssl.made(make)
    key = TpmKey(openssl, openssl.key(pem))
    try:
        openssl.show(pointer, chain_file, key.pointer)
    except BaseException:
        key.release()
        raise
    return context, key


def _return_code(data: str) -> int | None:
    """The return code of a TPM's refusal, "2306 tpm:warn(2.0): ..."; None for the text of any other error.

    The number of the library does not tell them apart: the provider's is the next one that was free, of which OpenSSL
    keeps eight bits, and tpm2-tss takes one for each of its digests.
    """
    code, _, words = data.partition(" ")
    return int(code) if code.isascii() and code.isdecimal() and ":" in words.partition(" ")[0] else None


def _last(errors: list[tuple[int, str, str]]) -> str:
    """What is nearest to the call that failed, or no word of it."""
    return next((reason or data for _, reason, data in reversed(errors) if reason or data), "no reason is known")


def _text(data: bytes | None) -> str:
    return (data or b"").decode("ascii", "replace")


def _openssl() -> _Openssl:
    if not _found:
        _found.append(_Openssl())
    return _found[0]
