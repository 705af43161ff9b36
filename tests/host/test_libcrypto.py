"""AES by libcrypto and AES by our own code give the same; where there is no libcrypto our own serves."""

import _hashlib
import ctypes
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dps_hal import platform
from dps_hal.host import libcrypto

KEY, IV = bytes(range(16)), bytes(range(16, 32))


@pytest.fixture
def looked_for_anew() -> Iterator[None]:
    libcrypto._found.clear()
    yield
    libcrypto._found.clear()


def by_our_own(key: bytes, content: bytes, decrypt: bool, iv: bytes) -> bytes:
    before = list(libcrypto._found)
    libcrypto._found[:] = [libcrypto._none]
    try:
        return platform.aes128_cfb(key, content, decrypt, iv)
    finally:
        libcrypto._found[:] = before


SIXTEEN = st.binary(min_size=16, max_size=16)


@given(SIXTEEN, st.binary(max_size=300), st.booleans(), SIXTEEN)
def test_libcrypto_and_our_own_code_agree_on_anything(key: bytes, content: bytes, decrypt: bool, iv: bytes) -> None:
    found = libcrypto.aes128_cfb(key, content, decrypt, iv)
    assert found is not None, "this Python's libcrypto is not found"
    assert found == by_our_own(key, content, decrypt, iv) == platform.aes128_cfb(key, content, decrypt, iv)


def test_a_key_or_vector_of_another_length_never_reaches_libcrypto() -> None:
    for key, iv in ((KEY[:15], IV), (KEY + KEY, IV), (KEY, IV[:15]), (KEY, b"")):
        assert libcrypto.aes128_cfb(key, b"content", False, iv) is None
    for key in (KEY[:15], KEY + KEY):
        with pytest.raises(ValueError, match="16 bytes"):
            platform.aes128_cfb(key, b"content", False, IV)


def without_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda path: object())


def without_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(_hashlib, "__file__")


def without_openssl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "_hashlib", None)


def without_ctypes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ctypes", None)


def without_executable_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(path: str) -> Any:
        raise MemoryError

    monkeypatch.setattr(ctypes, "CDLL", refused)


def with_another_cipher(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = ctypes.CDLL

    def library(path: str) -> Any:
        found = honest(path)
        found.EVP_aes_128_cfb128 = found.EVP_aes_128_ctr
        return found

    monkeypatch.setattr(ctypes, "CDLL", library)


def with_a_policy_against_it(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = ctypes.CDLL

    def library(path: str) -> Any:
        found = honest(path)
        found.EVP_CipherInit_ex = ctypes.CFUNCTYPE(ctypes.c_int)(lambda *arguments: 0)
        return found

    monkeypatch.setattr(ctypes, "CDLL", library)


@pytest.mark.parametrize(
    "machine",
    [
        without_names,
        without_a_file,
        without_openssl,
        without_ctypes,
        without_executable_memory,
        with_another_cipher,
        with_a_policy_against_it,
    ],
)
@pytest.mark.usefixtures("looked_for_anew")
def test_our_own_code_serves_where_libcrypto_does_not(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = by_our_own(KEY, b"content" * 9, False, IV)
    machine(monkeypatch)
    assert libcrypto.aes128_cfb(KEY, b"content" * 9, False, IV) is None
    assert platform.aes128_cfb(KEY, b"content" * 9, False, IV) == wanted
