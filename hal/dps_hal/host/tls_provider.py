"""TLS by a key that the TPM has: OpenSSL's provider tpm2, in this process and for nothing else in it; CPython only.

The provider is a module of OpenSSL's (the package tpm2-openssl, https://github.com/tpm2-software/tpm2-openssl). It is
loaded into the libcrypto that Python's `ssl` has, behind OpenSSL's own algorithms, which go on doing all that they can
do: the system's openssl.cnf is neither read for it nor changed. It is loaded once, with the first key, and stays: what
OpenSSL 3.0 does when a provider is taken away is not safe beside other threads.

From the first key on the provider has a connection of its own to the TPM, until the process ends; on a device node that
lasts, by `swtpm:` each command has one. So it takes a TPM that more than one may have open: behind the kernel's
resource manager or a broker, or a simulator. Each context with a key has an object in the TPM. `held` gives it back:
Python itself would do that under its lock, in which a TPM that hangs would stop all threads.

OpenSSL's functions are those that the modules `_hashlib` and `_ssl` were linked with. Sources: OSSL_PROVIDER(3),
CRYPTO_get_ex_new_index(3), provider-tpm2(7).
"""

from __future__ import annotations

import os
import threading

from dps_hal.errors import AskOperator, DpsError, RetryLater
from dps_hal.host.tpm_node import is_managed

TYPE_CHECKING = False
if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable
    from typing import Any

OLDEST = (1, 2)  # before it a key of the TPM's was used by OpenSSL as if it were in memory
_INSTALL = (
    "install tpm2-openssl 1.2 or newer, as Debian 13 has it, or give the device a key in a file"
    " ('dps-agent enroll --x509 --key-in-file')"
)
_ALONE = ("spi", "libtpms")  # TCTIs of a TPM that nobody else can have open, beside a device node that is not managed
_TCTI_VARIABLE = "TPM2OPENSSL_TCTI"
_MODULES_VARIABLE = "OPENSSL_MODULES"
_MODULES_DIR = 1003  # OPENSSL_INFO_MODULES_DIR
_OF_CONTEXTS = 1  # CRYPTO_EX_INDEX_SSL_CTX
_UTF8_POINTER = 6  # OSSL_PARAM_UTF8_PTR
_ERRORS_OF_DSO = 37  # ERR_LIB_DSO: the module cannot be loaded, whatever it would do

_found: list[_Openssl] = []


class ConnectionLost(RetryLater):
    """The provider's connection to the TPM broke: tpm2-tss takes no further command on it, and nobody can renew it."""


class TpmKey:
    """A key of one context, an object in the TPM until `release`."""

    def __init__(self, openssl: _Openssl, pointer: int) -> None:
        self._openssl = openssl
        self._pointer = pointer

    def release(self) -> None:
        """Flushes it from the TPM, once no context and no connection has it any more; takes as long as the TPM does."""
        pointer, self._pointer = self._pointer, 0
        if pointer:
            self._openssl.libcrypto.EVP_PKEY_free(pointer)


class _Openssl:
    """The two libraries of this Python's `ssl`, and the provider in them."""

    def __init__(self) -> None:
        try:
            import _hashlib
            import _ssl
            import ctypes

            self.ctypes: Any = ctypes
            self.libcrypto: Any = ctypes.CDLL(_hashlib.__file__)
            self.libssl: Any = ctypes.CDLL(_ssl.__file__)
            pointer, text, number = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int
            self.on_new = ctypes.CFUNCTYPE(None, pointer, pointer, pointer, number, ctypes.c_long, pointer)
            libcrypto = self.libcrypto
            for function, result, arguments in (
                (libcrypto.OSSL_PROVIDER_load, pointer, [pointer, text]),
                (libcrypto.OSSL_PROVIDER_get_params, number, [pointer, pointer]),
                (libcrypto.OSSL_PROVIDER_self_test, number, [pointer]),
                (libcrypto.OPENSSL_info, text, [number]),
                (libcrypto.ERR_get_error, ctypes.c_ulong, []),
                (
                    libcrypto.CRYPTO_get_ex_new_index,
                    number,
                    [number, ctypes.c_long, pointer, self.on_new, *2 * [pointer]],
                ),
                (libcrypto.CRYPTO_free_ex_index, number, [number, number]),
                (libcrypto.EVP_PKEY_up_ref, number, [pointer]),
                (libcrypto.EVP_PKEY_free, None, [pointer]),
                (self.libssl.SSL_CTX_get0_privatekey, pointer, [pointer]),
            ):
                function.restype, function.argtypes = result, arguments  # type: ignore[assignment]
        except (ImportError, AttributeError, OSError, MemoryError) as error:
            text_of_it = f"the OpenSSL of this Python is not to be reached ({type(error).__name__}: {error})"
            raise AskOperator("tpm.tls_provider", f"{text_of_it}: use the distribution's Python") from None
        self.loaded_for: str | None = None  # the TCTI of the provider, once that is loaded
        self.provider = 0

    def module(self) -> str:
        """The file of the provider."""
        folder = os.environ.get(_MODULES_VARIABLE) or os.fsdecode(self.libcrypto.OPENSSL_info(_MODULES_DIR) or b"")
        return os.path.join(folder, "tpm2.so")

    def load(self, tcti: str) -> None:
        """See `load`; the environment names the TPM by now."""
        if self.loaded_for is not None:
            if self.loaded_for != tcti:
                text = f"TLS has keys of the TPM at {self.loaded_for} in this process; came {tcti}"
                raise AskOperator("tpm.tls_provider", text)
            return
        while self.libcrypto.ERR_get_error():  # what others have left
            pass
        # Whoever loads one provider has to load OpenSSL's own, too, and first: what both can do is done by the first.
        own = self.libcrypto.OSSL_PROVIDER_load(None, b"default")
        provider = self.libcrypto.OSSL_PROVIDER_load(None, b"tpm2") if own else None
        if not provider:
            libraries = []
            while error := self.libcrypto.ERR_get_error():
                libraries.append(error >> 23 & 0xFF)
            if _ERRORS_OF_DSO in libraries or not own:
                text = f"OpenSSL's provider tpm2 cannot be loaded, {self.module()}: {_INSTALL}"
                raise AskOperator("tpm.tls_provider", text)
            raise RetryLater("tpm.absent", f"no TPM answers OpenSSL's provider tpm2 at {tcti!r}")
        version = self._version_of(provider)
        if tuple(int(part) if part.isdecimal() else 0 for part in version.split("-")[0].split(".")) < OLDEST:
            text = f"expected OpenSSL's provider tpm2 in version 1.2 or newer; came {version or 'none'}: {_INSTALL}"
            raise AskOperator("tpm.tls_provider", text)
        self.loaded_for, self.provider = tcti, provider

    def refuse_lost(self) -> None:
        """`ConnectionLost` where the TPM does not even test itself; one that is well takes seconds for that."""
        if not self.libcrypto.OSSL_PROVIDER_self_test(self.provider):
            text = f"OpenSSL's provider tpm2 has lost its TPM at {self.loaded_for}: it takes a new process to find that"
            raise ConnectionLost("tpm.absent", text)

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
        self.libcrypto.OSSL_PROVIDER_get_params(provider, ctypes.byref(asked))
        return (found.value or b"").decode("ascii", "replace")


def require(tcti: str) -> None:
    """AskOperator `tpm.tls_provider` where TLS cannot have a key of the TPM at `tcti`; asks no TPM.

    Names that TPM to the provider, in the environment: to be called before there are other threads.
    """
    kind, _, path = tcti.partition(":")
    if kind in _ALONE or (kind == "device" and path and not is_managed(path)):
        raise AskOperator(
            "tpm.tls_provider",
            f"expected a TPM that TLS can use beside the agent, such as device:/dev/tpmrm0; came {tcti}, which only one"
            " can have open",
        )
    openssl = _openssl()
    if not os.path.exists(openssl.module()):
        raise AskOperator("tpm.tls_provider", f"OpenSSL's provider tpm2 is missing, {openssl.module()}: {_INSTALL}")
    if os.environ.get(_TCTI_VARIABLE) != tcti:
        os.environ[_TCTI_VARIABLE] = tcti
    os.environ.setdefault("TSS2_LOG", "all+NONE")  # the C libraries print every refusal to stderr otherwise


def load(tcti: str) -> None:
    """Loads the provider where it is not yet; takes as long as the TPM does.

    AskOperator `tpm.tls_provider` as `require`, which is called before, and for a version before 1.2; RetryLater
    `tpm.absent` where no TPM answers.
    """
    _openssl().load(tcti)


def held(tcti: str, make: Callable[[], ssl.SSLContext]) -> tuple[ssl.SSLContext, TpmKey]:
    """The context that `make` makes and gives a key of the TPM's, and that key; takes as long as the TPM does.

    Raises as `load`, and what `make` does, but ConnectionLost where the TPM is lost to this process. OpenSSL tells of
    each context that it makes; the last one of this thread is meant.
    """
    openssl = _openssl()
    openssl.load(tcti)
    made: list[int] = []
    thread = threading.get_ident()

    def on_new(context: int, *_others: Any) -> None:
        if threading.get_ident() == thread:
            made.append(context)

    callback = openssl.on_new(on_new)
    index = openssl.libcrypto.CRYPTO_get_ex_new_index(_OF_CONTEXTS, 0, None, callback, None, None)
    try:
        context = make()
    except DpsError:
        openssl.refuse_lost()
        raise
    finally:
        openssl.libcrypto.CRYPTO_free_ex_index(_OF_CONTEXTS, index)
    pointer = openssl.libssl.SSL_CTX_get0_privatekey(made[-1]) if made else None
    if not pointer:
        raise AskOperator(
            "tpm.tls_provider", "the OpenSSL of this Python gave no key to the context that it was made for"
        )
    openssl.libcrypto.EVP_PKEY_up_ref(pointer)
    return context, TpmKey(openssl, pointer)


def _openssl() -> _Openssl:
    if not _found:
        _found.append(_Openssl())
    return _found[0]
