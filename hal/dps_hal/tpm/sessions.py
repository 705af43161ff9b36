"""A salted HMAC session with parameter encryption (TPM 2.0 Library Part 1, 19 and 21).

What it is for: whoever sits on the bus to a TPM reads and changes what he likes. So we choose a salt and encrypt it to
the EK, which only the TPM can open. From the salt and two nonces both sides make the session key, and from it:

- the HMAC of each command, over its code, the names of its handles and its parameters, proves to the TPM who asks;
- the HMAC of each response proves to us that the TPM gave it, to this very command;
- the first parameter of a command, and that of a response, is encrypted where it is a TPM2B, as all secrets are.

Two nonces roll: ours is new with each command (`authorize`), the TPM's with each response (`accept`). The older one is
part of the HMAC, so no command and no response can be played again. A session is in one of two states, though nothing
names them: at rest, or between `authorize` and `accept` of one command. A command that is sent again, because the TPM
asked for that, is the same bytes, for the TPM has not rolled its nonce. A response that `accept` refuses leaves the
TPM's nonce as it was here, and nobody can tell which one the TPM has: the session is good for nothing then, and
`Operations` begins a new connection.

What is not here: which commands may be run without a session (the caller's choice), passwords that are tried
(`dps_hal.tpm.rules`), and the policy session, which carries no secret and proves nothing.
"""

import struct

from dps_hal.platform import aes128_cfb, hmac_sha256, random_bytes, same_bytes, sha256
from dps_hal.tpm.keys import ALG_AES, ALG_CFB, ALG_NULL, ALG_SHA256, SHA256_BYTES, kdfa, oaep_encrypt, sized, take_sized
from dps_hal.tpm.rules import CODES

_NONCE_BYTES = 16
_CONTINUE = 0x01  # TPMA_SESSION, Part 2, table 34, with the next two
_DECRYPT = 0x20  # the first parameter of the command is encrypted
_ENCRYPT = 0x40  # the first parameter of the response is encrypted


def start_policy_parameters() -> bytes:
    """StartAuthSession's parameters for a policy session, which carries no secret: no salt, no encryption."""
    return _start(random_bytes(_NONCE_BYTES), b"", 1, struct.pack(">H", ALG_NULL))


def start_salted_parameters(salt_key_public: bytes) -> "tuple[bytes, bytes, bytes]":
    """StartAuthSession's parameters for a session salted to a checked RSA key, the salt and our nonce."""
    salt = random_bytes(SHA256_BYTES)
    nonce = random_bytes(_NONCE_BYTES)
    secret = oaep_encrypt(salt_key_public, salt, b"SECRET\x00", random_bytes(SHA256_BYTES))
    return _start(nonce, secret, 0, struct.pack(">HHH", ALG_AES, 128, ALG_CFB)), salt, nonce


def _start(nonce: bytes, secret: bytes, kind: int, symmetric: bytes) -> bytes:
    return sized(nonce) + sized(secret) + bytes([kind]) + symmetric + struct.pack(">H", ALG_SHA256)


class SaltedSession:
    """One session: its key, both nonces, and what the command under way needs for its response."""

    name = b""  # as `Key` has it

    def __init__(self, handle: int, salt: bytes, nonce_caller: bytes, nonce_tpm: bytes) -> None:
        self.handle = handle
        self._key = kdfa(salt, b"ATH", nonce_tpm, nonce_caller, 256)
        self._nonce_caller = nonce_caller
        self._nonce_tpm = nonce_tpm
        self._attributes = 0
        self._auth = b""

    def authorize(
        self, name: str, names: "tuple[bytes, ...]", parameters: bytes, auth: "bytes | None"
    ) -> "tuple[bytes, bytes]":
        """A command's parameters, the first encrypted, and its authorisation area.

        `auth` None: the first handle needs no authorisation; the session then only vouches for the response.
        """
        self._nonce_caller = random_bytes(_NONCE_BYTES)
        self._attributes = _CONTINUE
        self._auth = auth or b""
        if name != "evict_control":  # its first parameter is a handle, and its response has none
            if auth is not None and name != "nv_read":  # its first parameter is a number and no TPM2B either
                self._attributes |= _DECRYPT
                parameters = self._crypted(self._nonce_caller, self._nonce_tpm, parameters, False)
            if name not in ("hmac_start", "sequence_update"):  # the responses of these have no parameters either
                self._attributes |= _ENCRYPT
        digest = sha256(struct.pack(">I", CODES[name]) + b"".join(names) + parameters)
        proof = self._hmac(digest, self._nonce_caller, self._nonce_tpm)
        head = struct.pack(">I", self.handle) + sized(self._nonce_caller)
        return parameters, head + bytes([self._attributes]) + sized(proof)

    def accept(self, name: str, parameters: bytes, response: bytes, offset: int) -> "bytes | None":
        """The parameters of a response in clear, or None where it is not the TPM's own.

        `offset` is that of the authorisation area in `response`; what a second session has there proves nothing.
        """
        try:
            nonce_tpm, attributes_at = take_sized(response, offset, "nonce")
            proof, _ = take_sized(response, attributes_at + 1, "HMAC")
        except ValueError:
            return None
        digest = sha256(struct.pack(">II", 0, CODES[name]) + parameters)
        attributes = response[attributes_at]
        if attributes != self._attributes:
            return None
        if not same_bytes(self._hmac(digest, nonce_tpm, self._nonce_caller), proof):
            return None
        self._nonce_tpm = nonce_tpm
        if attributes & _ENCRYPT:
            return self._crypted(nonce_tpm, self._nonce_caller, parameters, True)
        return parameters

    def _hmac(self, digest: bytes, nonce_newer: bytes, nonce_older: bytes) -> bytes:
        return hmac_sha256(self._key + self._auth, digest + nonce_newer + nonce_older + bytes([self._attributes]))

    def _crypted(self, nonce_newer: bytes, nonce_older: bytes, parameters: bytes, decrypt: bool) -> bytes:
        end = 2 + int.from_bytes(parameters[:2], "big")
        if end == 2:
            return parameters
        key_and_iv = kdfa(self._key + self._auth, b"CFB", nonce_newer, nonce_older, 256)
        changed = aes128_cfb(key_and_iv[:16], parameters[2:end], decrypt, key_and_iv[16:])
        return parameters[:2] + changed + parameters[end:]
