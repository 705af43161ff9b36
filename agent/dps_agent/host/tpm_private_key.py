"""A key of the TPM's, as `cryptography` takes a private key: for requests, and for the seal of the record."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256

from dps_hal.errors import AskOperator, IdentityStale, RetryLater
from dps_hal.host.signing_key import KeyFile, point, to_pem
from dps_hal.platform import sha256

if TYPE_CHECKING:
    from dps_hal.contracts import TpmService


def made_by(tpm: TpmService, tcti: str) -> bytes:
    """The file of a key that the TPM at `tcti` makes, once it is known that TLS can use both.

    AskOperator `tpm.tls_provider` before anything is made, and what the TPM raises.
    """
    from dps_hal.host import tls_provider

    tls_provider.require(tcti)
    try:
        key = to_pem(KeyFile(*tpm.create_signing_key()))
    finally:
        tpm.release()  # the provider may want the same TPM
    tls_provider.load(tcti)
    return key


class TpmPrivateKey(ec.EllipticCurvePrivateKey):
    """A key on P-256 that never leaves `tpm`; it signs with SHA-256 and does nothing else."""

    def __init__(self, tpm: TpmService, key: KeyFile) -> None:
        self.tpm = tpm
        self._key = key
        self._public = ec.EllipticCurvePublicNumbers(*point(key.public), ec.SECP256R1()).public_key()

    def sign(self, data: Any, signature_algorithm: ec.EllipticCurveSignatureAlgorithm) -> bytes:
        """ECDSA over `data`, DER; the TPM is released behind it, for TLS may want it next.

        AskOperator `tpm.certificate_key` where the TPM cannot use the key. The signature is verified, for nothing
        protects it on the bus: RetryLater `tpm.bus_altered`.
        """
        if not isinstance(signature_algorithm.algorithm, SHA256):
            raise ValueError("a key in the TPM signs with SHA-256")
        try:
            signature = encode_dss_signature(
                *self.tpm.sign_digest(self._key.public, self._key.private, sha256(bytes(data)))
            )
            self._public.verify(signature, data, ec.ECDSA(SHA256()))
        except IdentityStale as error:
            text = f"the TPM does not take the key that it made: {error.message}"
            raise AskOperator("tpm.certificate_key", text) from None
        except (InvalidSignature, ValueError):
            raise RetryLater("tpm.bus_altered", "sign: expected a signature by the TPM's key; came another") from None
        finally:
            self.tpm.release()
        return signature

    def public_key(self) -> ec.EllipticCurvePublicKey:
        """What the file says of it."""
        return self._public

    @property
    def curve(self) -> ec.EllipticCurve:
        """P-256."""
        return ec.SECP256R1()

    @property
    def key_size(self) -> int:
        """256 bits."""
        return self.curve.key_size

    def exchange(self, algorithm: Any, peer_public_key: Any) -> bytes:
        """It has no use but signatures."""
        raise NotImplementedError

    def private_numbers(self) -> Any:
        """Nobody has them."""
        raise NotImplementedError

    def private_bytes(self, encoding: Any, format: Any, encryption_algorithm: Any) -> bytes:
        """Nobody has them."""
        raise NotImplementedError

    def __copy__(self) -> TpmPrivateKey:
        return self

    def __deepcopy__(self, memo: Any) -> TpmPrivateKey:
        return self

    def __repr__(self) -> str:
        return "TpmPrivateKey()"
