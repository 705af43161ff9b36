"""The certificate that a device shows DPS and its hub, `certificate_file`, and the key it is for, `device_key_file`.

Both are PEM: the device's own certificate and behind it those of all CAs up to the one that DPS knows; and a key on the
curve P-256, which nobody but the agent may read. Where a TPM has made that key, the file is of use to this TPM alone.
TLS takes the two files by itself; here is the key that seals the record, and what can be said of the certificate
without `cryptography`, whose import a short verb has no use for.
"""

from __future__ import annotations

import binascii
import contextlib
import os
import time

from dps_agent.der import validity
from dps_agent.host.config import Configuration, ConfigurationError, own_key
from dps_agent.host.printed import utc_text
from dps_agent.host.settings_table import TPM_KEY
from dps_agent.settings import X509
from dps_hal.errors import AskOperator
from dps_hal.host.regular import read_regular

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, TypeAlias

    from dps_hal.contracts import TpmService

    OpenTpm: TypeAlias = Callable[[Configuration], TpmService]

SETTING = "certificate_file"
KEY_SETTING = "device_key_file"
CHAIN_LIMIT = 64 * 1024  # bytes; a TLS peer takes no longer chain either
WARNED_LIFE = 3  # the end of a certificate is warned of once the third part of its life is left
_BEGIN, _END = b"-----BEGIN CERTIFICATE-----", b"-----END CERTIFICATE-----"
_NUMBER_BYTES = 32  # of either number of a signature on P-256


class CertificateSigner:
    """A `Signer` by the key of the device's certificate; its signatures all differ, and `verify` looks at them.

    Both files are read at the first signature, and the key is forgotten at `release`. `tpm` is the one that has it,
    None where it lies in a file, or is not read yet.
    """

    def __init__(self, configuration: Configuration, open_tpm: OpenTpm) -> None:
        self._configuration = configuration
        self._open_tpm = open_tpm
        self._key: Any = None
        self._valid_s = range(0)
        self._looked_at: tuple[int, int] | None = None  # the file whose life that is: its inode, and when it was made

    @property
    def tpm(self) -> TpmService | None:
        """See the class."""
        return tpm_of(self._key)

    @property
    def creates_key(self) -> bool:
        """As `TpmService` has it."""
        return self.tpm is not None and self.tpm.creates_key

    def open(self) -> None:
        """Reads both; ConfigurationError where they cannot be used, AskOperator `agent.not_available`."""
        if self._key is None:
            key = private_key(self._configuration, self._open_tpm)
            self._look()
            self._key = key

    @property
    def warnings(self) -> list[str]:
        """What somebody should do something about, while all works yet."""
        with contextlib.suppress(ConfigurationError):  # there is none any more, and nothing to add to what was said
            self._look()
        ending = ends_soon(self._valid_s)
        return [ending] if ending else []

    def _look(self) -> None:
        """Reads the life of the certificate, where another one is there by now; a service is asked at each step."""
        try:
            status = os.stat(self._configuration.certificate_file)
            seen = status.st_ino, status.st_mtime_ns
        except OSError:
            seen = None
        if seen is None or seen != self._looked_at:
            self._valid_s = valid_s(self._configuration)
            self._looked_at = seen

    def sign(self, wrapped_key: bytes, message: bytes) -> bytes:
        """ECDSA with SHA-256 over `message`, both numbers, 64 bytes; `wrapped_key` is empty."""
        self.open()
        return signature_by(self._key, message)

    def verify(self, message: bytes, signature: bytes) -> bool:
        """Whether `sign` has made `signature` over this message, now or earlier."""
        self.open()
        return has_signed(self._key, message, signature)

    def release(self) -> None:
        """Forgets the key, and ends session and connection of the TPM that has it."""
        tpm, self._key = self.tpm, None
        if tpm is not None:
            tpm.release()


def require_cryptography(setting: str = f'attestation = "{X509}"') -> None:
    """AskOperator `agent.not_available` where that package is missing, which the setting needs."""
    try:
        import cryptography  # noqa: F401
    except ImportError:
        text = f"{setting} needs the Python package cryptography: python3-cryptography in Debian"
        raise AskOperator("agent.not_available", text) from None


def private_key(configuration: Configuration, open_tpm: OpenTpm) -> Any:
    """The key in `device_key_file`, as `cryptography` has it; ConfigurationError, AskOperator `agent.not_available`.

    One in a TPM asks that only to sign.
    """
    require_cryptography()
    content = bytes(own_key(configuration))
    if content.startswith(TPM_KEY):
        return _key_in_tpm(configuration, content, open_tpm)
    try:
        return key_in(content)
    except ValueError as error:
        what = f"expected a private key on the curve P-256 in PEM, without a password; {error}"
        raise _invalid(KEY_SETTING, what, configuration.device_key_file) from None


def _key_in_tpm(configuration: Configuration, content: bytes, open_tpm: OpenTpm) -> Any:
    from dps_agent.host.tpm_private_key import TpmPrivateKey
    from dps_hal.host.signing_key import from_pem

    try:
        return TpmPrivateKey(open_tpm(configuration), from_pem(content))
    except ValueError as error:
        what = f"expected a key that 'dps-agent enroll --x509' had a TPM make; it is damaged: {error}"
        raise _invalid(KEY_SETTING, what, configuration.device_key_file) from None


def key_in(content: bytes) -> Any:
    """The key on P-256 in a PEM file without a password; ValueError says what is wrong."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        key = load_pem_private_key(content, None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise ValueError("it is none") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise ValueError("it is another key")
    return key


def signature_by(key: Any, message: bytes) -> bytes:
    """ECDSA with SHA-256 over `message`, both numbers, 64 bytes."""
    from cryptography.hazmat.primitives.asymmetric import ec, utils
    from cryptography.hazmat.primitives.hashes import SHA256

    numbers = utils.decode_dss_signature(key.sign(message, ec.ECDSA(SHA256())))
    return b"".join(number.to_bytes(_NUMBER_BYTES) for number in numbers)


def has_signed(key: Any, message: bytes, signature: bytes) -> bool:
    """Whether `signature_by` has made `signature` with this key over `message`."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric import ec, utils
    from cryptography.hazmat.primitives.hashes import SHA256

    numbers = [int.from_bytes(part) for part in (signature[:_NUMBER_BYTES], signature[_NUMBER_BYTES:])]
    try:
        key.public_key().verify(utils.encode_dss_signature(*numbers), message, ec.ECDSA(SHA256()))
    except InvalidSignature:
        return False
    return len(signature) == 2 * _NUMBER_BYTES


def tpm_of(key: Any) -> TpmService | None:
    """The TPM that has the key of `private_key`; None where it lies in a file."""
    tpm: TpmService | None = getattr(key, "tpm", None)
    return tpm


def chain_in(configuration: Configuration) -> bytes:
    """The content of `certificate_file`; ConfigurationError."""
    path = configuration.certificate_file
    try:
        return read_regular(path, CHAIN_LIMIT)
    except FileNotFoundError:
        how = "'dps-agent enroll --x509' makes the request for it, 'dps-agent install-certificate' puts it there"
        raise _invalid(SETTING, f"expected the device's certificate; there is none: {how}", path) from None
    except OSError as error:
        raise _invalid(SETTING, f"cannot be read: {error.strerror}", path) from None


def certificates_in(content: bytes) -> list[bytes]:
    """The certificates in a PEM file in DER, one or more; ValueError."""
    found = []
    for text in content.split(_BEGIN)[1:]:
        body, end, _ = text.partition(_END)
        if not end:
            raise ValueError("a certificate is cut off")
        found.append(binascii.a2b_base64(body))  # binascii.Error is a ValueError
    if not found:
        raise ValueError("there is none")
    return found


def valid_s(configuration: Configuration) -> range:
    """The UTC seconds at which the device's own certificate is valid; ConfigurationError where there is none."""
    content = chain_in(configuration)
    try:
        first_s, last_s = validity(certificates_in(content)[0])
        if last_s < first_s:
            raise ValueError("it ends before it begins")
    except ValueError:
        what = "expected certificates in PEM; the first is none"
        raise _invalid(SETTING, what, configuration.certificate_file) from None
    return range(first_s, last_s + 1)


def ends_soon(valid: range) -> str:
    """That a certificate of this life has ended, or ends soon, in words; "" where it does not."""
    if not valid:
        return ""
    last_s, left_s = valid[-1], valid[-1] - int(time.time())
    if left_s < 0:
        return f"the device's certificate ended at {utc_text(last_s)}: no service takes it any more"
    if left_s * WARNED_LIFE > len(valid):
        return ""
    return f"the device's certificate ends at {utc_text(last_s)}: have another one issued, and install it"


def certificate_shown(configuration: Configuration) -> str:
    """How long the device's certificate is good, for people; why that cannot be told, else."""
    try:
        valid = valid_s(configuration)
    except ConfigurationError as error:
        return error.problems[0]
    return ends_soon(valid) or f"{configuration.certificate_file}, until {utc_text(valid[-1])}"


def _invalid(setting: str, what: str, path: str) -> ConfigurationError:
    return ConfigurationError("config.invalid", [f"{setting}: {what} ({path})"])
