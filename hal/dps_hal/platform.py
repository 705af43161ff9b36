"""The one file that knows there are two runtimes, but for `named`: JSON, base64, AES, randomness, short waits."""

import binascii
import os
import sys
import time

import ujson  # the CPython package; on MicroPython another name of the built-in json

from dps_hal.errors import AskOperator

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

_BASE64 = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
NESTING_LIMIT = 32  # levels of JSON; DPS's own bodies have 4
MICROPYTHON = sys.implementation.name == "micropython"

if MICROPYTHON:
    from hashlib import sha256 as _sha256  # pyright: ignore[reportAssignmentType]

    from cryptolib import aes as _aes  # pyright: ignore[reportMissingImports]

    def _encrypt_block(key: bytes):  # type: ignore[no-untyped-def]
        return _aes(key, 1).encrypt  # 1: ECB
else:

    def _sha256(message: bytes):  # type: ignore[no-untyped-def,misc]
        from hashlib import sha256  # brings OpenSSL, which who only reads records has no use for

        return sha256(message)

    def _encrypt_block(key: bytes):  # type: ignore[no-untyped-def]
        from dps_hal.host.aes import Aes128  # makes its tables

        return Aes128(key).encrypt


def ticks_ms() -> int:
    """Milliseconds since any fixed point, for `ms_since`; may wrap around."""
    if MICROPYTHON:
        return time.ticks_ms()  # type: ignore[attr-defined,no-any-return]
    return time.monotonic_ns() // 1_000_000


def ms_since(ticks: int) -> int:
    """Milliseconds since `ticks_ms` returned `ticks`, at most some days ago."""
    if MICROPYTHON:
        return time.ticks_diff(time.ticks_ms(), ticks)  # type: ignore[attr-defined,no-any-return]
    return ticks_ms() - ticks


def pause_ms(milliseconds: int) -> None:
    """Does nothing for up to a second."""
    time.sleep(milliseconds / 1000)


def pause_us(microseconds: int) -> None:
    """Does nothing for up to some milliseconds."""
    if MICROPYTHON:
        time.sleep_us(microseconds)  # type: ignore[attr-defined]
    else:
        time.sleep(microseconds / 1_000_000)


# An operating system's generator is good enough for keys. A board's may be anything, a counter included: its program
# says which one is, and until then there is none.
_random_sources = [os.urandom] if sys.platform in ("linux", "darwin", "win32") else []


def declare_random_source(source: "Callable[[int], bytes]") -> None:
    """Makes `source(count)` the origin of every salt, nonce and delay: a generator that nobody can foretell.

    Boards only, and once, before the TPM's first use: `os.urandom` where the port feeds it from hardware.
    """
    _random_sources[:] = [source]


def random_bytes(count: int) -> bytes:
    """`count` bytes from the declared generator, the system's where there is one; AskOperator where there is none."""
    if not _random_sources:
        raise AskOperator(
            "config.no_random_source", "expected a declared random source before keys are used; came none"
        )
    return _random_sources[0](count)


def sha256(message: bytes) -> bytes:
    """SHA-256 of `message`, 32 bytes."""
    return _sha256(message).digest()


def hmac_sha256(key: bytes, message: bytes) -> bytes:
    """HMAC-SHA256 by FIPS 198-1, 32 bytes (MicroPython has no hmac module)."""
    if len(key) > 64:
        key = sha256(key)
    inner, outer = bytearray(b"\x36" * 64), bytearray(b"\x5c" * 64)
    for i in range(len(key)):
        inner[i] ^= key[i]
        outer[i] ^= key[i]
    digest = _sha256(bytes(inner))
    digest.update(message)  # not one behind the other: that would be a copy of a long message
    return sha256(bytes(outer) + digest.digest())


def same_bytes(a: bytes, b: bytes) -> bool:
    """Whether two secrets are equal, in a time that depends on their lengths only."""
    if len(a) != len(b):
        return False
    difference = 0
    for i in range(len(a)):
        difference |= a[i] ^ b[i]
    return difference == 0


def aes128_cfb(key: bytes, content: bytes, decrypt: bool, iv: bytes = bytes(16)) -> bytes:
    """AES-128-CFB with 128-bit feedback (TPM 2.0 Library Part 1, 11.4.10); no padding."""
    if not MICROPYTHON:
        from dps_hal.host.libcrypto import aes128_cfb as by_libcrypto

        found = by_libcrypto(key, content, decrypt, iv)
        if found is not None:
            return found
    encrypt_block = _encrypt_block(key)
    out = bytearray(len(content))
    feedback = iv
    for start in range(0, len(content), 16):
        stream = encrypt_block(feedback)
        block = content[start : start + 16]
        for i in range(len(block)):
            out[start + i] = block[i] ^ stream[i]
        feedback = block if decrypt else bytes(out[start : start + 16])
    return bytes(out)


def to_base64(content: bytes) -> str:
    """`content` in the standard base64 alphabet, padded, without a line feed."""
    return binascii.b2a_base64(content).decode().strip()


def from_base64(text: str) -> bytes:
    """The bytes of padded standard base64; ValueError for anything else (binascii alone skips stray characters)."""
    padding = text.lstrip(_BASE64)  # without a copy of the rest, for which a board may have no room
    stray = padding.lstrip("=")
    if stray:
        raise ValueError(f"not base64: {stray[0]!r}")
    if len(text) % 4 or len(padding) > 2:
        raise ValueError(f"not base64: {len(text)} characters, {len(padding)} of them padding")
    return binascii.a2b_base64(text)


def to_json(value: "Any") -> str:
    """`value` as JSON text; ValueError for what JSON cannot hold, NaN and infinity included."""
    _refuse_non_finite(value)
    if MICROPYTHON:
        return ujson.dumps(value, separators=(",", ":"))
    return ujson.dumps(value, escape_forward_slashes=False, ensure_ascii=True)


def from_json(text: "bytes | str") -> "Any":
    """The value of one JSON text; ValueError for anything else, NaN, infinity and deep nesting included."""
    depth = 0
    if MICROPYTHON or _brackets(text) > NESTING_LIMIT:  # fewer cannot be nested so deep, whatever strings hold
        depth = nesting(text)
    if depth > NESTING_LIMIT:  # before the parser: it and what walks its value are recursive
        raise ValueError(f"more than {NESTING_LIMIT} levels of nesting")
    if depth < 0:  # MicroPython 1.25 takes an end of the text for the end of the outermost object
        raise ValueError("the text ends early")
    if text and not isinstance(text, str) and max(text) > 0x7F:  # a copy, and the parser takes bytes as well
        try:
            bytes(text).decode()
        except UnicodeError:
            raise ValueError("not UTF-8")
    value = ujson.loads(text)
    _refuse_non_finite(value)
    return value


def attribute_of(json_name: str) -> str:
    """The name of a field in JSON, such as `idScope`, as Python writes it: `id_scope`."""
    attribute = ""
    for letter in json_name:
        attribute += letter if letter == letter.lower() else "_" + letter.lower()
    return attribute


def _brackets(text: "bytes | str") -> int:
    """How many brackets open in a text, inside strings too; bytes may be any buffer."""
    if isinstance(text, str):
        return text.count("[") + text.count("{")
    content = bytes(text)
    return content.count(b"[") + content.count(b"{")


def nesting(text: "bytes | str") -> int:
    """The deepest nesting of brackets outside strings in JSON text, -1 where one stays open; never fails."""
    depth = deepest = 0
    in_string = escaped = False
    for byte in text.encode() if isinstance(text, str) else text:
        if in_string:
            if escaped:
                escaped = False
            elif byte == 0x5C:
                escaped = True
            elif byte == 0x22:
                in_string = False
        elif byte == 0x22:
            in_string = True
        elif byte in b"[{":
            depth += 1
            deepest = max(deepest, depth)
        elif byte in b"]}":
            depth -= 1
    return -1 if depth > 0 else deepest


def _refuse_non_finite(value: "Any") -> None:
    if isinstance(value, float):
        if not float("-inf") < value < float("inf"):
            raise ValueError("NaN and infinity are not JSON")
    elif isinstance(value, dict):
        for key in value:
            _refuse_non_finite(value[key])
    elif isinstance(value, (list, tuple)):
        for item in value:
            _refuse_non_finite(item)
