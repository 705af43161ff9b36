"""AES-128 encryption of one block in plain Python, FIPS 197, for CPython without the `cryptography` package.

MicroPython has `cryptolib` and does not import this file. It encrypts a few dozen blocks per registration, on the
device's own keys; table look-ups make its run time depend on the key, which matters only to somebody who can already
run code beside the agent and time it.
"""


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


_SBOX = _make_sbox()


class Aes128:
    """One expanded key."""

    def __init__(self, key: bytes) -> None:
        if len(key) != 16:
            raise ValueError(f"an AES-128 key has 16 bytes, not {len(key)}")
        words = [list(key[i : i + 4]) for i in range(0, 16, 4)]
        round_constant = 1
        for i in range(4, 44):
            word = list(words[i - 1])
            if i % 4 == 0:
                word = [_SBOX[word[1]] ^ round_constant, _SBOX[word[2]], _SBOX[word[3]], _SBOX[word[0]]]
                round_constant = _double(round_constant)
            words.append([a ^ b for a, b in zip(words[i - 4], word)])
        self._round_keys = [words[i] + words[i + 1] + words[i + 2] + words[i + 3] for i in range(0, 44, 4)]

    def encrypt(self, block: bytes) -> bytes:
        """The 16-byte block, encrypted."""
        if len(block) != 16:
            raise ValueError(f"an AES block has 16 bytes, not {len(block)}")
        keys = self._round_keys
        state = [a ^ b for a, b in zip(block, keys[0])]
        for round_number in range(1, 11):
            # SubBytes and ShiftRows in one: byte r of column c comes from column c + r.
            state = [_SBOX[state[(i + 4 * (i % 4)) % 16]] for i in range(16)]
            if round_number < 10:
                mixed = []
                for c in range(0, 16, 4):
                    column = state[c : c + 4]
                    total = column[0] ^ column[1] ^ column[2] ^ column[3]
                    for r in range(4):
                        mixed.append(column[r] ^ total ^ _double(column[r] ^ column[(r + 1) % 4]))
                state = mixed
            state = [a ^ b for a, b in zip(state, keys[round_number])]
        return bytes(state)
