"""A TPM in software, for a laptop or a test without any TPM; its keys are plain files in a folder.

It does what a TPM 2.0 does with an activation blob, with every check, through the package `cryptography`. Files in
the folder, each 0600: `ek-tcg-l1.pem`, `ek-azure-c-sdk.pem`, `srk.pem` (PKCS #8) and `persistent-81000100.key` (a
wrapped key). Each is made when it is first asked for, and is there whole or not at all after a power cut.
"""

from __future__ import annotations

import contextlib
import errno
import os
import struct
import tempfile

from dps_hal.contracts import EK_TEMPLATES, TpmCondition
from dps_hal.errors import AskOperator, Broken, DpsError, IdentityStale
from dps_hal.host.regular import read_regular
from dps_hal.platform import aes128_cfb, hmac_sha256, random_bytes, same_bytes, sha256
from dps_hal.tpm.activation import Activation, parse_activation
from dps_hal.tpm.keys import (
    ALG_KEYEDHASH,
    MAX_HMAC_KEY_BYTES,
    RSA_BYTES,
    SHA256_BYTES,
    ek_public,
    kdfa,
    object_name,
    sized,
    srk_public,
    take_sized,
    unwrap,
    wrap,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey

MAX_MESSAGE_BYTES = 4096  # the bound in dps_hal.contracts.Tpm.sign, held here so that no caller gets used to more
_FILE_LIMIT = 65536  # bytes of a key's file
_NOT_FOR_THIS_TPM = "the key that DPS sent was made for another TPM, or altered"


class SimulatedTpm:
    """The TPM whose keys are in `folder`; the folder is made, 0700, when the first key is.

    Without `cryptography` each use is AskOperator `tpm.not_available`; a folder that cannot be used is AskOperator
    `tpm.denied`, `tpm.nv_full` or `tpm.absent`, a damaged file in it `tpm.state_damaged`.
    """

    def __init__(self, folder: str, ek_template: str = "tcg-l1") -> None:
        if ek_template not in EK_TEMPLATES:
            raise AskOperator("config.invalid", f"ek_template: expected one of {EK_TEMPLATES}; came {ek_template!r}")
        self._folder = folder
        self._ek_template = ek_template
        self._ek_file = f"ek-{ek_template}.pem"
        self._keys: dict[str, RSAPrivateKey] = {}
        self.srk_found_at: int | None = None
        self.creates_key = False
        self.unneeded_passwords = ()

    def endorsement_key(self, name: bytes = b"") -> bytes:
        """The EK's TPM2B_PUBLIC, 316 bytes; each `ek_template` has an EK of its own."""
        return ek_public(_modulus(self._rsa_key(self._ek_file)))

    def storage_root_key(self) -> bytes:
        """The SRK's TPM2B_PUBLIC, 284 bytes."""
        return srk_public(_modulus(self._rsa_key("srk.pem")))

    def import_key(self, activation: bytes) -> bytes:
        """ActivateCredential and Import in software; errors as `dps_hal.contracts.Tpm` has them."""
        blob = parse_activation(activation)
        sensitive = self._unwrap_duplicate(blob, self._activate_credential(blob))
        try:
            object_type, auth_value, seed_value, hmac_key = _parse_sensitive(sensitive)
        except ValueError as error:
            raise IdentityStale("tpm.blob_refused", f"{_NOT_FOR_THIS_TPM}: {error}") from None
        if auth_value:
            text = f"the key's password: expected an empty one; came one of {len(auth_value)} bytes"
            raise AskOperator("dps.key_unsuitable", text)
        for what, came, expected, fits in (
            ("type", object_type, ALG_KEYEDHASH, object_type == ALG_KEYEDHASH),
            ("seed value's length", len(seed_value), SHA256_BYTES, len(seed_value) == SHA256_BYTES),
            ("length", len(hmac_key), f"at most {MAX_HMAC_KEY_BYTES}", len(hmac_key) <= MAX_HMAC_KEY_BYTES),
        ):
            if not fits:
                raise AskOperator("tpm.key_refused", f"the key's {what}: expected {expected}; came {came}")
        if blob.id_key_public[-SHA256_BYTES:] != sha256(seed_value + hmac_key):
            raise AskOperator("tpm.key_refused", "the public and the private part of the key do not belong together")
        return wrap(blob.id_key_public, self._protect(object_name(blob.id_key_public), seed_value, hmac_key))

    def sign(self, wrapped_key: bytes, message: bytes) -> bytes:
        """Load and HMAC in software; errors as `dps_hal.contracts.Tpm` has them."""
        if len(message) > MAX_MESSAGE_BYTES:
            raise Broken("agent.bug", f"expected at most {MAX_MESSAGE_BYTES} bytes to sign; came {len(message)}")
        return hmac_sha256(self._load(wrapped_key), message)

    def release(self) -> None:
        """Forgets the keys in memory; the next call reads the folder again."""
        self._keys.clear()

    def endorsement_certificate(self) -> bytes | None:
        """None: no manufacturer vouches for a simulated TPM."""
        return None

    def makers_template(self) -> bytes:
        """Empty: there is no maker."""
        return b""

    def ek_indices(self) -> tuple[int, ...]:
        """None: it has no NV memory."""
        return ()

    def template_of_endorsement_key(self) -> str:
        """The one that it was opened with: each has a key of its own."""
        return self._ek_template

    def create_signing_key(self) -> tuple[int, bytes, bytes]:
        """AskOperator `tpm.tls_provider`: OpenSSL has no provider for it."""
        raise AskOperator("tpm.tls_provider", "the simulator makes no keys for TLS")

    def sign_digest(self, public: bytes, private: bytes, digest: bytes) -> tuple[int, int]:
        """AskOperator `tpm.tls_provider`."""
        raise AskOperator("tpm.tls_provider", "the simulator has no keys for TLS")

    def persist(self, wrapped_key: bytes, handle: int, former: bytes = b"") -> None:
        """Keeps the wrapped key in the folder under its handle, in place of `former`."""
        from dps_hal.host.service_tpm import check_replaceable

        self._load(wrapped_key)
        present = self._public_at(handle)
        if present not in (b"", unwrap(wrapped_key)[0]):
            check_replaceable(present, handle, former)
        self._write(_persistent_file(handle), wrapped_key, replace=True)

    def name_at(self, handle: int) -> bytes:
        """As `TpmService.name_at`."""
        present = self._public_at(handle)
        return object_name(present) if present else b""

    def withdraw(self, handle: int, names: tuple[bytes, ...]) -> None:
        """As `TpmService.withdraw`."""
        if self.name_at(handle) in names:
            try:
                os.unlink(os.path.join(self._folder, _persistent_file(handle)))
            except OSError as error:
                raise _folder_error(self._folder, error) from error

    def _public_at(self, handle: int) -> bytes:
        try:
            return unwrap(self._read(_persistent_file(handle)))[0]
        except FileNotFoundError:
            return b""
        except OSError as error:
            raise _folder_error(self._folder, error) from error

    def try_passwords(self) -> None:
        """Nothing to try: no hierarchy has a password."""

    def condition(self) -> TpmCondition:
        """What a healthy TPM reports, with "SIMU" as its maker."""
        return TpmCondition("SIMU", "1.0", 0, 32, 7200, 3, False, False)

    def clear(self) -> None:
        """TPM2_Clear: the SRK and persistent keys are gone and the next SRK is another; the EKs stay."""
        self.release()
        try:
            for name in os.listdir(self._folder):
                if name == "srk.pem" or name.startswith("persistent-"):
                    os.unlink(os.path.join(self._folder, name))
        except FileNotFoundError:
            return
        except OSError as error:
            raise _folder_error(self._folder, error) from error

    def _activate_credential(self, blob: Activation) -> bytes:
        """The inner key, 16 bytes (TPM 2.0 Library Part 3, 12.5)."""
        seed = self._decrypt_secret(self._ek_file, blob.credential_secret, b"IDENTITY\x00")
        identity = _outer_unwrap(seed, object_name(self.storage_root_key()), blob.credential)
        if len(identity) != 18 or identity[:2] != b"\x00\x10":
            raise IdentityStale("tpm.blob_refused", "expected an inner key of 16 bytes; came another")
        return identity[2:]

    def _unwrap_duplicate(self, blob: Activation, inner_key: bytes) -> bytes:
        """The TPMT_SENSITIVE with its size bytes (TPM 2.0 Library Part 3, 13.3)."""
        key_name = object_name(blob.id_key_public)
        seed = self._decrypt_secret("srk.pem", blob.duplicate_seed, b"DUPLICATE\x00")
        content = aes128_cfb(inner_key, _outer_unwrap(seed, key_name, blob.duplicate), True)
        try:
            integrity, offset = take_sized(content, 0, "inner integrity")
            _, end = take_sized(content, offset, "sensitive area")
        except ValueError as error:
            raise IdentityStale("tpm.blob_refused", f"{_NOT_FOR_THIS_TPM}: {error}") from None
        if end != len(content) or not same_bytes(integrity, sha256(content[offset:] + key_name)):
            raise IdentityStale("tpm.blob_refused", f"{_NOT_FOR_THIS_TPM}: its inner integrity is wrong")
        return content[offset:]

    def _decrypt_secret(self, key_file: str, secret: bytes, label: bytes) -> bytes:
        """RSA-OAEP decryption of a seed, 32 bytes."""
        private_key = self._rsa_key(key_file)
        from cryptography.hazmat.primitives import hashes
        from cryptography.hazmat.primitives.asymmetric import padding

        oaep = padding.OAEP(mgf=padding.MGF1(hashes.SHA256()), algorithm=hashes.SHA256(), label=label)
        try:
            seed = private_key.decrypt(secret, oaep)
        except ValueError:
            seed = b""  # no service uses an empty seed
        if not seed or len(seed) > SHA256_BYTES:
            raise IdentityStale("tpm.blob_refused", f"{_NOT_FOR_THIS_TPM}: its seed cannot be decrypted")
        return seed

    def _protect(self, key_name: bytes, seed_value: bytes, hmac_key: bytes) -> bytes:
        """TPM2B_PRIVATE with its size: HMAC, IV and ciphertext under the SRK's seed (TPM 2.0 Library Part 1, 22).

        As on a TPM the empty authorisation value is padded to the size of a digest.
        """
        encryption_key, integrity_key = self._storage_keys(key_name)
        sensitive = sized(
            struct.pack(">H", ALG_KEYEDHASH) + sized(bytes(SHA256_BYTES)) + sized(seed_value) + sized(hmac_key)
        )
        iv = random_bytes(16)
        protected = sized(iv) + aes128_cfb(encryption_key, sensitive, False, iv)
        return sized(sized(hmac_sha256(integrity_key, protected + key_name)) + protected)

    def _load(self, wrapped_key: bytes) -> bytes:
        """The HMAC key in a wrapped key of this TPM; IdentityStale `tpm.key_stale` for any other."""
        public, private = unwrap(wrapped_key)
        key_name = object_name(public)
        encryption_key, integrity_key = self._storage_keys(key_name)
        try:
            integrity, offset = take_sized(private, 2, "HMAC")
            if not same_bytes(integrity, hmac_sha256(integrity_key, private[offset:] + key_name)):
                raise ValueError("its HMAC is wrong")
            iv, offset = take_sized(private, offset, "IV")
            _, _, _, hmac_key = _parse_sensitive(aes128_cfb(encryption_key, private[offset:], True, iv))
        except ValueError as error:
            raise IdentityStale("tpm.key_stale", f"the stored key is not this TPM's, or was altered: {error}") from None
        return hmac_key

    def _storage_keys(self, key_name: bytes) -> tuple[bytes, bytes]:
        """AES and HMAC key of one object under the SRK; the SRK's seed is derived from its first prime."""
        prime = self._rsa_key("srk.pem").private_numbers().p
        seed = sha256(b"storage seed\x00" + prime.to_bytes(RSA_BYTES // 2, "big"))
        return kdfa(seed, b"STORAGE", key_name, b"", 128), kdfa(seed, b"INTEGRITY", b"", b"", 256)

    def _rsa_key(self, name: str) -> RSAPrivateKey:
        """The private key in the file `name`, made now if there is none."""
        if name in self._keys:
            return self._keys[name]
        try:
            from cryptography.exceptions import UnsupportedAlgorithm
            from cryptography.hazmat.primitives import serialization
            from cryptography.hazmat.primitives.asymmetric import rsa
        except ImportError:
            text = "the simulated TPM needs the package 'cryptography', which the extra 'simulator' has"
            raise AskOperator("tpm.not_available", text) from None

        path = os.path.join(self._folder, name)
        if not os.path.exists(path):
            fresh = rsa.generate_private_key(public_exponent=65537, key_size=RSA_BYTES * 8)
            pem = fresh.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
            self._write(name, pem, replace=False)
        try:
            key = serialization.load_pem_private_key(self._read(name), None)
        except OSError as error:
            raise _folder_error(self._folder, error) from error
        except (ValueError, TypeError, UnsupportedAlgorithm):
            key = None
        if not isinstance(key, rsa.RSAPrivateKey) or (key.key_size, _exponent(key)) != (RSA_BYTES * 8, 65537):
            raise AskOperator("tpm.state_damaged", f"expected an RSA-2048 private key in PEM in {path}; came another")
        self._keys[name] = key
        return key

    def _read(self, name: str) -> bytes:
        return read_regular(os.path.join(self._folder, name), _FILE_LIMIT, follow=False)

    def _write(self, name: str, content: bytes, replace: bool) -> None:
        """Makes `content` the file `name`, durable on return; without `replace` an existing file stays."""
        path = os.path.join(self._folder, name)
        try:
            os.makedirs(self._folder, mode=0o700, exist_ok=True)
            descriptor, temporary = tempfile.mkstemp(prefix=".new-", dir=self._folder)  # 0600
            try:
                with os.fdopen(descriptor, "wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
                if replace:
                    os.rename(temporary, path)
                else:
                    # link, unlike rename, leaves the key alone that another process has made meanwhile.
                    with contextlib.suppress(FileExistsError):
                        os.link(temporary, path)
            finally:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(temporary)
            folder = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        except OSError as error:
            raise _folder_error(self._folder, error) from error


def _persistent_file(handle: int) -> str:
    return f"persistent-{handle:08x}.key"


def _modulus(key: RSAPrivateKey) -> bytes:
    return key.public_key().public_numbers().n.to_bytes(RSA_BYTES, "big")


def _exponent(key: RSAPrivateKey) -> int:
    return key.public_key().public_numbers().e


def _outer_unwrap(seed: bytes, name: bytes, content: bytes) -> bytes:
    """The bytes that a TPM2B HMAC and a ciphertext carry for `name`; IdentityStale `tpm.blob_refused` on any doubt."""
    integrity, offset = take_sized(content, 0, "HMAC")
    ciphertext = content[offset:]
    if not same_bytes(integrity, hmac_sha256(kdfa(seed, b"INTEGRITY", b"", b"", 256), ciphertext + name)):
        raise IdentityStale("tpm.blob_refused", f"{_NOT_FOR_THIS_TPM}: its HMAC is wrong")
    return aes128_cfb(kdfa(seed, b"STORAGE", name, b"", 128), ciphertext, True)


def _parse_sensitive(sensitive: bytes) -> tuple[int, bytes, bytes, bytes]:
    """Type, authorisation value, seed value and key of a TPM2B_SENSITIVE; ValueError where it is none.

    Source: TPM 2.0 Library Part 2, 12.3.2.4. A TPM pads the authorisation value with zeros, which do not count.
    """
    area, end = take_sized(sensitive, 0, "sensitive area")
    auth_value, offset = take_sized(area, 2, "authorisation value")
    seed_value, offset = take_sized(area, offset, "seed value")
    key, offset = take_sized(area, offset, "key")
    if offset != len(area) or end != len(sensitive):
        raise ValueError("its sensitive area is longer than the fields in it")
    return int.from_bytes(area[:2], "big"), auth_value.rstrip(b"\x00"), seed_value, key


def _folder_error(folder: str, error: OSError) -> DpsError:
    message = f"the simulated TPM's folder {folder}: {error.strerror}"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return AskOperator("tpm.denied", message)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return AskOperator("tpm.nv_full", message)
    return AskOperator("tpm.absent", message)
