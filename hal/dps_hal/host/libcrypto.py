"""AES-128-CFB by the libcrypto that Python's hashing has in this process already; CPython only.

Nothing is looked for on the disk and no version is guessed: the functions are those that `_hashlib` was linked with. A
Python whose libcrypto is inside it and gives no names away, one without ctypes, and a libcrypto whose policy has no AES
have none, and `dps_hal.host.aes` serves. OpenSSL has had these functions since 1.0.1 (EVP_EncryptInit(3)).
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    Cfb = Callable[[bytes, bytes, bool, bytes], "bytes | None"]

# SP 800-38A, F.3.13: key, initial vector, two segments in clear and encrypted; the first is the same in other modes.
_KEY = bytes.fromhex("2b7e151628aed2a6abf7158809cf4f3c")
_IV = bytes(range(16))
_CLEAR = bytes.fromhex("6bc1bee22e409f96e93d7e117393172aae2d8a571e03ac9c9eb76fac45af8e51")
_ENCRYPTED = bytes.fromhex("3b3fd92eb72dad20333449f8e83cfb4ac8a64537a0b3a93fcde3cdad9f1ce58b")

_found: list[Cfb] = []


def aes128_cfb(key: bytes, content: bytes, decrypt: bool, iv: bytes) -> bytes | None:
    """As `platform.aes128_cfb`; None where libcrypto is not to be had or does not do it, and for other lengths."""
    if len(key) != 16 or len(iv) != 16:
        return None
    if not _found:
        _found.append(_looked_for() or _none)
    return _found[0](key, content, decrypt, iv)


def _none(key: bytes, content: bytes, decrypt: bool, iv: bytes) -> None:
    return None


def _looked_for() -> Cfb | None:
    """The function, if there is one and it gives the published answers."""
    try:
        import _hashlib
        import ctypes

        libcrypto = ctypes.CDLL(_hashlib.__file__)  # is mapped already; what it was linked with is searched as well
        pointer, text, number = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int
        new, free = libcrypto.EVP_CIPHER_CTX_new, libcrypto.EVP_CIPHER_CTX_free
        cipher, begin, update = libcrypto.EVP_aes_128_cfb128, libcrypto.EVP_CipherInit_ex, libcrypto.EVP_CipherUpdate
    except (ImportError, AttributeError, OSError, MemoryError):  # the last where no memory may be made executable
        return None
    new.argtypes, new.restype = [], pointer
    free.argtypes, free.restype = [pointer], None
    cipher.argtypes, cipher.restype = [], pointer
    begin.argtypes, begin.restype = [pointer, pointer, pointer, text, text, number], number
    update.argtypes, update.restype = [pointer, text, ctypes.POINTER(number), text, number], number

    def cfb(key: bytes, content: bytes, decrypt: bool, iv: bytes) -> bytes | None:
        context = new()
        if not context:
            return None
        try:
            out = ctypes.create_string_buffer(len(content) + 16)
            size = number()
            if begin(context, cipher(), None, key, iv, 0 if decrypt else 1) != 1:
                return None
            if update(context, out, ctypes.byref(size), bytes(content), len(content)) != 1:
                return None
            return out.raw[: len(content)] if size.value == len(content) else None
        finally:
            free(context)

    answers = cfb(_KEY, _CLEAR, False, _IV), cfb(_KEY, _ENCRYPTED, True, _IV)
    return cfb if answers == (_ENCRYPTED, _CLEAR) else None
