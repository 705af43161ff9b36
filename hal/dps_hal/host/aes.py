"""AES-128 encryption of one block in plain Python, FIPS 197, for CPython without the `cryptography` package.

MicroPython has `cryptolib` and does not import this file. It encrypts a few dozen blocks per registration, on the
device's own keys; table look-ups make its run time depend on the key, which matters only to somebody who can already
run code beside the agent and time it.
"""

import struct


def _double(a: int) -> int:
    a <<= 1
    return a ^ 0x11B if a & 0x100 else a


def _make_sbox() -> bytes:
    exponents = [0] * 256  # powers of the generator 3
    logarithms = [0] * 256
    x = 1
    for i in range(255):
        exponents[i] = x
        logarithms[x] = i
        x ^= _double(x)
    sbox = bytearray(256)
    for a in range(256):
        inverse = exponents[(255 - logarithms[a]) % 255] if a else 0
        b = inverse
        for shift in (1, 2, 3, 4):
            b ^= ((inverse << shift) | (inverse >> (8 - shift))) & 0xFF
        sbox[a] = b ^ 0x63
    return bytes(sbox)


def _make_tables(sbox: bytes) -> "tuple[tuple[int, ...], ...]":
    """SubBytes and MixColumns in one: for each row of the state, what a byte there adds to its column."""
    tables = []
    for shift in (0, 8, 16, 24):
        table = []
        for s in sbox:
            column = _double(s) << 24 | s << 16 | s << 8 | (s ^ _double(s))
            table.append((column >> shift | column << (32 - shift)) & 0xFFFFFFFF)
        tables.append(tuple(table))
    return tuple(tables)


_SBOX = _make_sbox()
_TABLES = _make_tables(_SBOX)


class Aes128:
    """One expanded key."""

    def __init__(self, key: bytes) -> None:
        if len(key) != 16:
            raise ValueError(f"an AES-128 key has 16 bytes, not {len(key)}")
        words = list(struct.unpack(">4I", key))
        round_constant = 1
        for i in range(4, 44):
            word = words[i - 1]
            if i % 4 == 0:
                word = _substituted(word >> 16, word >> 8, word, word >> 24) ^ round_constant << 24
                round_constant = _double(round_constant)
            words.append(words[i - 4] ^ word)
        self._round_keys = words

    def encrypt(self, block: bytes) -> bytes:
        """The 16-byte block, encrypted."""
        if len(block) != 16:
            raise ValueError(f"an AES block has 16 bytes, not {len(block)}")
        keys = self._round_keys
        t0, t1, t2, t3 = _TABLES
        a, b, c, d = [word ^ key for word, key in zip(struct.unpack(">4I", block), keys)]
        for i in range(4, 40, 4):
            # ShiftRows: byte r of column c comes from column c + r.
            a, b, c, d = (
                t0[a >> 24] ^ t1[b >> 16 & 0xFF] ^ t2[c >> 8 & 0xFF] ^ t3[d & 0xFF] ^ keys[i],
                t0[b >> 24] ^ t1[c >> 16 & 0xFF] ^ t2[d >> 8 & 0xFF] ^ t3[a & 0xFF] ^ keys[i + 1],
                t0[c >> 24] ^ t1[d >> 16 & 0xFF] ^ t2[a >> 8 & 0xFF] ^ t3[b & 0xFF] ^ keys[i + 2],
                t0[d >> 24] ^ t1[a >> 16 & 0xFF] ^ t2[b >> 8 & 0xFF] ^ t3[c & 0xFF] ^ keys[i + 3],
            )
        return struct.pack(
            ">4I",
            _substituted(a >> 24, b >> 16, c >> 8, d) ^ keys[40],
            _substituted(b >> 24, c >> 16, d >> 8, a) ^ keys[41],
            _substituted(c >> 24, d >> 16, a >> 8, b) ^ keys[42],
            _substituted(d >> 24, a >> 16, b >> 8, c) ^ keys[43],
        )


def _substituted(a: int, b: int, c: int, d: int) -> int:
    """SubBytes of the lowest byte of each, as one column."""
    return _SBOX[a & 0xFF] << 24 | _SBOX[b & 0xFF] << 16 | _SBOX[c & 0xFF] << 8 | _SBOX[d & 0xFF]
