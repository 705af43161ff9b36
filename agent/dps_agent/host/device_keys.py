"""The key of a device's own, `device_key_file`: in the clear, or sealed by this device's TPM.

A file in the clear holds base64 of 16 to 64 bytes: who reads it is this device. One that `dps-agent import-key` has
sealed is JSON, `{"sealedBy": "tpm", "ekName", "srkName", "wrappedKey"}`, of use to this TPM alone: the key was imported
under its SRK as the hub's key of a device with a TPM is, and signs in the TPM as that does.
"""

from __future__ import annotations

from dps_agent.host.config import SEALED_KEY, ConfigurationError, hierarchy_password
from dps_hal.device_key import DeviceKey, key_in
from dps_hal.errors import AskOperator, IdentityStale
from dps_hal.platform import from_base64, from_json, to_base64, to_json
from dps_hal.tpm.keys import object_name

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import NamedTuple

    from dps_agent.host.config import Configuration
    from dps_hal.contracts import TpmService

    class Sealed(NamedTuple):
        """A key that one TPM alone can use."""

        ek_name: bytes  # 34 bytes each
        srk_name: bytes
        wrapped_key: bytes
else:
    from dps_hal.named import namedtuple

    Sealed = namedtuple("Sealed", ("ek_name", "srk_name", "wrapped_key"))

SETTING = "device_key_file"
_NAMES = ("ekName", "srkName", "wrappedKey")  # of `Sealed`, in JSON


class FileSigner:
    """A `Signer` by the key in `device_key_file`, which is read at the first signature and forgotten at `release`.

    So whoever puts another key there has it used without a restart. `tpm` is the one that has sealed it, None where it
    lies in the clear, or is not read yet.
    """

    def __init__(self, configuration: Configuration, open_tpm: Callable[[], TpmService]) -> None:
        self._configuration = configuration
        self._open_tpm = open_tpm
        self._signer: DeviceKey | SealedKey | None = None

    @property
    def tpm(self) -> TpmService | None:
        """See the class."""
        return self._signer.tpm if isinstance(self._signer, SealedKey) else None

    @property
    def creates_key(self) -> bool:
        """As `TpmService` has it."""
        return self.tpm is not None and self.tpm.creates_key

    def open(self) -> None:
        """Reads the file; ConfigurationError where it holds no key."""
        if self._signer is None:
            self._signer = _signer(self._configuration, self._open_tpm)

    def sign(self, wrapped_key: bytes, message: bytes) -> bytes:
        """HMAC-SHA256 of `message`, 32 bytes; `wrapped_key` is empty, for the device has but one key."""
        self.open()
        assert self._signer is not None
        return self._signer.sign(wrapped_key, message)

    def release(self) -> None:
        """Forgets the key, and ends session and connection of the TPM that has it."""
        signer, self._signer = self._signer, None
        if signer is not None:
            signer.release()


class SealedKey:
    """A `Signer` whose key the TPM has sealed; `tpm` is that TPM."""

    def __init__(self, tpm: TpmService, sealed: Sealed) -> None:
        self.tpm = tpm
        self._sealed = sealed
        self._known = False  # the TPM is the one that has sealed it

    def sign(self, wrapped_key: bytes, message: bytes) -> bytes:
        """HMAC-SHA256 of `message` by the sealed key; AskOperator where this TPM has not sealed it."""
        if not self._known:
            endorsement_key = self.tpm.endorsement_key(self._sealed.ek_name)
            if object_name(endorsement_key) != self._sealed.ek_name:  # before anything is salted to it
                raise AskOperator("tpm.ek_changed", f"the key in {SETTING} was sealed by another TPM")
            self._known = True
        try:
            return self.tpm.sign(self._sealed.wrapped_key, message)
        except IdentityStale as error:
            raise AskOperator(
                "tpm.sealed_key", f"the TPM does not take the key that it sealed: {error.message}"
            ) from None

    def release(self) -> None:
        """Ends session and connection."""
        self.tpm.release()


def _signer(configuration: Configuration, open_tpm: Callable[[], TpmService]) -> DeviceKey | SealedKey:
    content = key_file(configuration)
    key = key_of(configuration, content)
    if key is not None:
        return DeviceKey(key)
    try:
        value = from_json(content)
        sealed = Sealed(*[from_base64(value[name]) for name in _NAMES])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"expected a key that 'dps-agent import-key' sealed; it is damaged: {error}"
        raise _invalid(configuration, what) from None
    return SealedKey(open_tpm(), sealed)


def key_file(configuration: Configuration) -> bytes:
    """The content of the file, without spaces and line ends around it."""
    return bytes(hierarchy_password(SETTING, configuration.device_key_file)).strip()


def key_of(configuration: Configuration, content: bytes) -> bytes | None:
    """The key in that content, None where a TPM has sealed it; ConfigurationError where there is none."""
    if content[:1] == SEALED_KEY:
        return None
    try:
        return key_in(content.decode("latin-1"))
    except ValueError as error:
        raise _invalid(configuration, str(error)) from None


def sealed_text(sealed: Sealed) -> bytes:
    """The content of a file with a sealed key."""
    named = dict(zip(_NAMES, map(to_base64, sealed), strict=True))
    return f"{to_json({'sealedBy': 'tpm', **named})}\n".encode()


def _invalid(configuration: Configuration, what: str) -> ConfigurationError:
    return ConfigurationError("config.invalid", [f"{SETTING}: {what} ({configuration.device_key_file})"])
