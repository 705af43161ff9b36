"""The key of the certificate that DPS issues, `issued_key_file`, beside what shows DPS who the device is.

The file is PEM: the key, EC on P-256, and behind it the request (PKCS #10) for its certificate. Both are made by the
first registration, before DPS is asked, and stay: so the same request goes out however often it has to be repeated, and
whatever was issued for it is of use. Who removes the file gives the device another key, and another registration. So
does damage to the file that the agent has in its own folder; one that `issued_key_file` names is the operator's.

The setting `issued_key` says where a key is made, in the TPM or in the clear; the file says where it is: one of a TPM's
begins as such, "TSS2 PRIVATE KEY". A registration has it sign before DPS is asked. One that the TPM takes no more, as
after TPM2_Clear, is as damage: nothing that was issued for it is of use. It is kept aside, and taken back where the TPM
takes that one and not the other: then the settings named another TPM meanwhile.
"""

from __future__ import annotations

import contextlib
import os
import stat
import time

from dps_agent.host.config import ConfigurationError, issued_key_is_in_tpm
from dps_agent.host.device_certificates import has_signed, key_in, require_cryptography, signature_by, tpm_of
from dps_agent.host.private_file import replace_private
from dps_agent.host.settings_table import REQUEST, TPM_KEY
from dps_agent.settings import ISSUED
from dps_hal.errors import AskOperator, DpsError
from dps_hal.host.regular import open_regular, replace_file, sync_folder_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from dps_agent.host.config import Configuration
    from dps_hal.contracts import TpmService

SETTING = "issued_key_file"
ASIDE = ".lost"  # the name's end of the file of a key that the TPM took no more
FILE_LIMIT = 16 * 1024  # bytes
_NEEDING_IT = f'certificate = "{ISSUED}"'
PREVIEW = "(a preview of Azure: no real service was ever asked)"


class OneTpm:
    """The device's TPM for all that asks it, made at the first call: where only one may have it open, two would wait.

    `found` is None until then.
    """

    def __init__(self, open_tpm: Callable[[], TpmService]) -> None:
        self._open_tpm = open_tpm
        self.found: TpmService | None = None

    def __call__(self) -> TpmService:
        """That TPM."""
        self.found = self.found or self._open_tpm()
        return self.found


class WithIssuedKey:
    """What signs for a device, `own`, with the key of the certificate that DPS issues beside it.

    A TPM alone has no key by which a record could be sealed, for DPS sends none: then this one seals it. `tpm` is the
    one that `own` has, too, if it has any.
    """

    def __init__(self, configuration: Configuration, own: Any, tpm: OneTpm) -> None:
        self._configuration = configuration
        self._tpm = tpm
        self._path = configuration.issued_key_path
        self._is_ours = not configuration.issued_key_file  # in the agent's own folder
        self._own = own
        self._seals = hasattr(own, "endorsement_key")
        # Decided while it is known: later somebody may put the file of the device's own key elsewhere for a moment.
        self._makes_in_tpm = configuration.issues_into_tpm_beside(self._seals or own.tpm is not None)
        self._key: Any = None
        self._has_replaced = False

    def __getattr__(self, name: str) -> Any:
        """All else is that of `own`."""
        return getattr(self._own, name)

    @property
    def warnings(self) -> list[str]:
        """What somebody may want to change, though all works."""
        own: list[str] = [*getattr(self._own, "warnings", ())]
        if self._has_replaced:
            text = "the TPM did not take the key of the certificate that DPS issued, and another was made"
            own.append(f"{text}: was it cleared, or do the settings name another? The former one is {self._aside}")
        if issued_key_is_in_tpm(self._configuration):
            return own
        text = "the key of the certificate that DPS issues lies in a plain file: whoever reads it is this device"
        return [*own, f"{text} at its hub ({self._path})"]

    @property
    def creates_key(self) -> bool:
        """As `TpmService` has it."""
        tpm = self._tpm.found
        return tpm is not None and tpm.creates_key

    def request(self, registration_id: str) -> bytes:
        """The request for the certificate, DER; see `dps_agent.effects.ReadRequest`.

        AskOperator `agent.file` where the file cannot be written, `agent.not_available`, `tpm.tls_provider` where TLS
        could not use a key of the TPM's; ConfigurationError for a file that holds something else; and what the TPM
        raises.
        """
        require_cryptography(_NEEDING_IT)
        from cryptography import x509
        from cryptography.hazmat.primitives.serialization import Encoding

        content = self._content()
        key = self._key = None if content is None else self._read(content)
        if registration_id and key is not None and not self._is_ours and REQUEST not in (content or b""):
            raise self._invalid("expected key and request that the agent has made, or no file; it has no request")
        lost = b""
        if registration_id and content is not None and key is not None and self._is_lost(key):
            lost, (content, key) = content, self._taken_back(content)
        request = None if key is None else _request_in(content or b"")
        if registration_id:
            names = [] if request is None else request.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)
            if [name.value for name in names] != [registration_id]:
                request = self._make(key, registration_id, lost)
        return b"" if request is None else bytes(request.public_bytes(Encoding.DER))

    def sign(self, wrapped_key: bytes, message: bytes) -> bytes:
        """As `own`, or by the certificate's key: ECDSA with SHA-256, both numbers, 64 bytes."""
        if wrapped_key or not self._seals:
            signature: bytes = self._own.sign(wrapped_key, message)
            return signature
        key = self._opened()
        if key is None:
            raise self._invalid("expected the key that the registration has made; there is none")
        return signature_by(key, message)

    def verify(self, message: bytes, signature: bytes) -> bool:
        """Whether `sign` with an empty key has made `signature` over this message."""
        if not self._seals:
            return bool(self._own.verify(message, signature))
        require_cryptography(_NEEDING_IT)
        key = self._opened()
        return key is not None and has_signed(key, message, signature)

    def try_key(self) -> None:
        """Has a TPM that has made the key sign once; AskOperator `tpm.certificate_key` where it takes that no more.

        Else as `request` with an empty name; nothing is replaced.
        """
        key = self._opened()
        if tpm_of(key) is not None:
            signature_by(key, b"")

    def issuers(self, certificates: tuple[bytes, ...]) -> tuple[int, ...]:
        """See `dps_agent.effects.FindIssuers`; AskOperator `agent.not_available`."""
        require_cryptography(_NEEDING_IT)
        from dps_agent.host.issuers import issuers_among

        return issuers_among(certificates)

    def release(self) -> None:
        """Forgets the key, and what `own` and the TPM have open."""
        self._key = None
        self._own.release()
        if self._tpm.found is not None:
            self._tpm.found.release()

    def _is_lost(self, key: Any) -> bool:
        """Whether the TPM that has made the key takes it no more; it says so twice, in two sessions.

        ConfigurationError where that is in a file of the operator's.
        """
        if tpm_of(key) is None:
            return False
        for _ in range(2):
            try:
                signature_by(key, b"")
            except AskOperator as error:
                if error.code != "tpm.certificate_key":
                    raise
            else:
                return False
        if not self._is_ours:
            raise self._invalid("expected a key that this TPM has made, and it does not take that: remove the file")
        return True

    @property
    def _aside(self) -> str:
        """The file of the key that the TPM took no more when another was made."""
        return self._path + ASIDE

    def _taken_back(self, lost: bytes) -> tuple[bytes | None, Any]:
        """The key whose place the lost one took, as it is after settings that named another TPM; both None for none."""
        content = self._content(self._aside)
        key = None if content is None else self._read(content)
        if content is None or key is None or self._is_lost(key):
            return None, None
        replace_private(self._path, content)
        replace_private(self._aside, lost)
        return content, key

    def _opened(self) -> Any:
        """The key; None where there is none."""
        if self._key is None:
            content = self._content()
            self._key = None if content is None else self._read(content)
        return self._key

    def _content(self, path: str = "") -> bytes | None:
        """The file; None where there is none. ConfigurationError for one that others than its owner may open."""
        try:
            with open(open_regular(path or self._path), "rb") as file:
                mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
                content = file.read(FILE_LIMIT)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._invalid(f"cannot be read: {error.strerror}") from None
        if mode & 0o077:
            raise self._invalid(f"expected a file that only its owner may open (chmod 600); its mode is {mode:03o}")
        return content

    def _read(self, content: bytes) -> Any:
        """The key in the file; None for one in the agent's own folder that was damaged: another is made."""
        if content.startswith(TPM_KEY):
            return self._in_tpm(content)
        require_cryptography(_NEEDING_IT)
        try:
            return key_in(content)
        except ValueError:
            if self._is_ours:
                return None
            what = "expected the key that the agent has made, on the curve P-256; it holds another, or none"
            raise self._invalid(what) from None

    def _in_tpm(self, content: bytes) -> Any:
        """As `_read`, for a key that a TPM has made."""
        require_cryptography(_NEEDING_IT)
        from dps_agent.host.tpm_private_key import TpmPrivateKey
        from dps_hal.host.signing_key import from_pem

        try:
            return TpmPrivateKey(self._tpm(), from_pem(content.partition(REQUEST)[0]))
        except ValueError as error:
            if self._is_ours:
                return None
            raise self._invalid(f"expected a key that the TPM has made; it is damaged: {error}") from None

    def _new_key(self) -> tuple[Any, bytes]:
        """A key where the settings want it, and what its file has of it."""
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

        if self._makes_in_tpm:
            from dps_agent.host.tpm_private_key import made_by

            content = made_by(self._tpm(), self._configuration.tpm.tcti)
            return self._in_tpm(content), content
        key = ec.generate_private_key(ec.SECP256R1())
        return key, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())

    def _make(self, key: Any, registration_id: str, lost: bytes) -> Any:
        """Writes key and request, and has them on the disk before anybody hears of them; `lost` is kept aside."""
        from cryptography import x509
        from cryptography.hazmat.primitives.hashes import SHA256
        from cryptography.hazmat.primitives.serialization import Encoding

        is_new = key is None
        if is_new:
            key, secret = self._new_key()
        else:
            secret = (self._content() or b"").partition(REQUEST)[0]
        name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, registration_id)])
        request = x509.CertificateSigningRequestBuilder().subject_name(name).sign(key, SHA256())
        content = secret + request.public_bytes(Encoding.PEM)
        if is_new:
            if lost:
                replace_private(self._aside, lost)
                self._has_replaced = True
            replace_private(self._path, content)
        else:
            try:
                replace_file(self._path, content)
                sync_folder_of(self._path)
            except OSError as error:
                raise AskOperator("agent.file", f"{self._path} cannot be written: {error.strerror}") from None
        self._key = None
        return request

    def _invalid(self, what: str) -> ConfigurationError:
        return ConfigurationError("config.invalid", [f"{SETTING}: {what} ({self._path})"])


def key_shown(configuration: Configuration) -> str:
    """Where the key is, for people."""
    path = configuration.issued_key_path
    if issued_key_is_in_tpm(configuration):
        return f"the TPM has made its key, {path}"
    return f"its key lies in a plain file, {path}"


def issued_shown(configuration: Configuration) -> str:
    """How long the certificate that DPS issued is good, for people; why that cannot be told, else."""
    from dps_agent.assignment import decode
    from dps_agent.der import validity
    from dps_agent.host.printed import utc_text
    from dps_agent.issued import chains_in, name_of
    from dps_hal.contracts import CERTIFICATE, IDENTITY
    from dps_hal.host.state_dir import open_store

    try:
        store = open_store(configuration.state_dir)
        identity, kept = store.load(IDENTITY), store.load(CERTIFICATE)
        named = decode(identity.payload)[0].chain if identity is not None else ""
        chains = {name_of(chain): chain for chain in (chains_in(kept.payload) if kept is not None else [])}
        if named not in chains:
            return f"none yet: the first registration has DPS issue it {PREVIEW}"
        _, last_s = validity(chains[named])
    except (DpsError, ValueError):
        return f"what DPS issued cannot be read: the device registers again {PREVIEW}"
    key = key_shown(configuration)
    if last_s < time.time():
        return f"issued by DPS, ended at {utc_text(last_s)}: the device registers again; {key} {PREVIEW}"
    return f"issued by DPS, until {utc_text(last_s)}; {key} {PREVIEW}"


def remove_key(configuration: Configuration) -> list[str]:
    """Removes the file, but for one that the agent has not made; why it stays, then. AskOperator `agent.file`."""
    path = configuration.issued_key_path
    try:
        if configuration.issued_key_file:
            with open(open_regular(path), "rb") as file:
                if REQUEST not in file.read(FILE_LIMIT):
                    return [f"{SETTING}: {path} stays, for the agent has not made it"]
        else:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path + ASIDE)
        os.unlink(path)
        sync_folder_of(path)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise AskOperator("agent.file", f"{path} cannot be removed: {error.strerror}") from None
    return []


def _request_in(content: bytes) -> Any:
    """The request in the file; None where it has none that can be read."""
    from cryptography import x509

    begin = content.find(REQUEST)
    try:
        return None if begin < 0 else x509.load_pem_x509_csr(content[begin:])
    except ValueError:
        return None
