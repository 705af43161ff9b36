"""The device's side, for the emulator's own tests: a TPM's keys in software, and the requests a client sends.

Written from the TPM 2.0 Library alone; nothing here comes from the agent or the emulator.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import http.client
import json
import ssl
from pathlib import Path
from typing import Any
from urllib.parse import quote

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

VECTORS = Path(__file__).parents[1] / "vectors"
SCOPE = "0ne00000000"
API = "?api-version=2021-10-01"
EK_HEAD = bytes.fromhex(
    "013a0001000b000300b20020837197674484b3f81a90cc8d46a5d724fd52d76e06520b64f2a1da1b331469aa000600800043001008000000000"
    "00100"
)
SRK_HEAD = bytes.fromhex("011a0001000b000304720000000600800043001008000000000" + "00100")


def vector(name: str) -> Any:
    """One file of test vectors."""
    return json.loads((VECTORS / f"{name}.json").read_text())


def rsa_key(p: int, q: int) -> rsa.RSAPrivateKey:
    """An RSA key with e = 65537 from its primes."""
    d = pow(65537, -1, (p - 1) * (q - 1))
    public = rsa.RSAPublicNumbers(65537, p * q)
    return rsa.RSAPrivateNumbers(p, q, d, d % (p - 1), d % (q - 1), pow(q, -1, p), public).private_key()


class Device:
    """A TPM with an EK and an SRK; `activate` decrypts what the service made for them, checking every part."""

    def __init__(self, ek: rsa.RSAPrivateKey, srk: rsa.RSAPrivateKey) -> None:
        self._ek = ek
        self._srk = srk
        self.ek_public = EK_HEAD + modulus(ek)
        self.srk_public = SRK_HEAD + modulus(srk)
        self.registration_id = base64.b32encode(hashlib.sha256(self.ek_public).digest()).decode().lower().rstrip("=")

    @classmethod
    def of_the_vectors(cls) -> Device:
        """The device whose private keys are published in tests/vectors."""
        keys = {
            name: int(text, 16) for name, text in vector("activation")["inputs"].items() if name[-2:] in ("_p", "_q")
        }
        return cls(rsa_key(keys["ek_p"], keys["ek_q"]), rsa_key(keys["srk_p"], keys["srk_q"]))

    @classmethod
    def another(cls) -> Device:
        """A device with keys of its own."""
        return cls(*(rsa.generate_private_key(65537, 2048) for _ in range(2)))

    def cleared(self) -> Device:
        """The same TPM after TPM2_Clear: same EK, another SRK."""
        return Device(self._ek, rsa.generate_private_key(65537, 2048))

    def attestation(self) -> dict[str, str]:
        """The body's `tpm`."""
        return {
            "endorsementKey": base64.b64encode(self.ek_public).decode(),
            "storageRootKey": base64.b64encode(self.srk_public).decode(),
        }

    def activate(self, authentication_key: str) -> ActivatedKey:
        """ActivateCredential, Import and Load in software; AssertionError names the check that failed."""
        rest = base64.b64decode(authentication_key, validate=True)
        fields = []
        while rest:
            field, rest = take(rest)
            fields.append(field)
        assert len(fields) == 6, f"{len(fields)} fields in the blob"
        id_object, secret1, duplicate, secret2, public, encrypted_uri = fields

        srk_name = b"\x00\x0b" + hashlib.sha256(self.srk_public[2:]).digest()
        inner_key, rest = take(unwrap(oaep(self._ek, secret1, b"IDENTITY\0"), id_object, srk_name))
        assert len(inner_key) == 16 and rest == b"", "the credential is no AES-128 key"

        name = b"\x00\x0b" + hashlib.sha256(public).digest()
        inner = cfb(inner_key, unwrap(oaep(self._srk, secret2, b"DUPLICATE\0"), duplicate, name))
        integrity, sensitive = take(inner)
        assert integrity == hashlib.sha256(sensitive + name).digest(), "inner integrity"
        content, rest = take(sensitive)
        assert rest == b"" and content[:4] == bytes.fromhex("00080000"), "no keyed hash without an auth value"
        seed_value, rest = take(content[4:])
        key, rest = take(rest)
        assert rest == b"", "bytes behind the key"
        assert public[:4] == bytes.fromhex("0008000b") and public[8:14] == bytes.fromhex("00000005000b"), public.hex()
        assert public[14:] == b"\x00\x20" + hashlib.sha256(seed_value + key).digest(), "unique"
        return ActivatedKey(key, int.from_bytes(public[4:8]), cfb(inner_key, encrypted_uri).decode())


class ActivatedKey:
    """What was in a blob."""

    def __init__(self, key: bytes, attributes: int, uri: str) -> None:
        self.key = key
        self.attributes = attributes
        self.uri = uri

    def token(self, resource: str, expires_at_s: int, key_name: str | None = "registration") -> str:
        """A token over `resource` exactly as given."""
        return signed_token(self.key, resource, expires_at_s, key_name)


def signed_token(key: bytes, resource: str, expires_at_s: int, key_name: str | None = "registration") -> str:
    """A token by `key` over `resource` exactly as given."""
    signature = base64.b64encode(hmac.digest(key, f"{resource}\n{expires_at_s}".encode(), "sha256")).decode()
    tail = "" if key_name is None else f"&skn={key_name}"
    return f"SharedAccessSignature sr={resource}&sig={quote(signature, safe='')}&se={expires_at_s}{tail}"


class Client:
    """One keep-alive connection to an emulator, as a device has it."""

    def __init__(self, port: int, ca_file: Path, timeout_s: float = 60.0, certificate: Path | None = None) -> None:
        """`certificate` is a PEM file of a key and the chain that the client shows."""
        context = ssl.create_default_context(cafile=str(ca_file))
        if certificate:
            context.load_cert_chain(certificate)
        self.connection = http.client.HTTPSConnection("127.0.0.1", port, context=context, timeout=timeout_s)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.connection.close()

    def call(
        self, method: str, path: str, body: object = None, token: str | None = None
    ) -> tuple[int, dict[str, str], Any]:
        """Status, headers in lower case, and the body, parsed where it is JSON."""
        headers = {"Content-Type": "application/json; charset=utf-8"} | ({"Authorization": token} if token else {})
        encoded = body if isinstance(body, bytes) else None if body is None else json.dumps(body).encode()
        self.connection.request(method, path + API, encoded, headers)
        response = self.connection.getresponse()
        content = response.read()
        names = {name.lower(): value for name, value in response.getheaders()}
        return response.status, names, json.loads(content) if "json" in names.get("content-type", "") else content


def register_path(registration_id: str) -> str:
    return f"/{SCOPE}/registrations/{registration_id}/register"


def lookup_path(registration_id: str) -> str:
    return f"/{SCOPE}/registrations/{registration_id}"


def operation_path(registration_id: str, operation_id: str) -> str:
    return f"/{SCOPE}/registrations/{registration_id}/operations/{operation_id}"


def modulus(key: rsa.RSAPrivateKey) -> bytes:
    return key.public_key().public_numbers().n.to_bytes(256)


def take(content: bytes) -> tuple[bytes, bytes]:
    """A TPM2B's content and what follows it."""
    size = int.from_bytes(content[:2])
    assert len(content) >= 2 + size, "a TPM2B that ends too early"
    return content[2 : 2 + size], content[2 + size :]


def unwrap(seed: bytes, wrapped: bytes, name: bytes) -> bytes:
    """The inverse of the outer wrap: integrity, then decryption."""
    integrity, encrypted = take(wrapped)
    assert integrity == hmac.digest(kdfa(seed, b"INTEGRITY", b"", 32), encrypted + name, "sha256"), "outer integrity"
    return cfb(kdfa(seed, b"STORAGE", name, 16), encrypted)


def kdfa(seed: bytes, label: bytes, context: bytes, size: int) -> bytes:
    """KDFa for at most 32 bytes: one round."""
    message = b"\0\0\0\1" + label + b"\0" + context + (8 * size).to_bytes(4)
    return hmac.digest(seed, message, "sha256")[:size]


def oaep(key: rsa.RSAPrivateKey, secret: bytes, label: bytes) -> bytes:
    return key.decrypt(secret, padding.OAEP(padding.MGF1(hashes.SHA256()), hashes.SHA256(), label))


def cfb(key: bytes, ciphertext: bytes) -> bytes:
    """AES-128-CFB decryption with a zero vector: every block is XORed with the encryption of the one before."""
    padded = bytes(16) + ciphertext
    stream = Cipher(algorithms.AES(key), modes.ECB()).encryptor().update(padded[: len(padded) // 16 * 16])
    return bytes(a ^ b for a, b in zip(ciphertext, stream, strict=False))
