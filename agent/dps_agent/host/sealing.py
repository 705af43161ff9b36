"""Gives the device's own key to the TPM, and takes it from the file: `dps-agent import-key`.

The key goes the way of one that DPS sends: encrypted to this EK and this SRK, imported under the SRK, and wrapped by
it. So no command of the TPM's is asked for beside those of a registration, and no secret crosses its bus in the clear.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from dps_agent.host.config import ConfigurationError, password_file
from dps_agent.host.device_keys import SETTING, Sealed, key_file, key_of, sealed_text
from dps_agent.host.parts import offline_runner, open_tpm
from dps_agent.settings import SYMMETRIC_KEY
from dps_hal.errors import AskOperator
from dps_hal.host.regular import refuse_special, replace_file, sync_folder_of
from dps_hal.platform import hmac_sha256, random_bytes, same_bytes
from dps_hal.tpm.keys import object_name
from dps_hal.tpm.self_challenge import make_activation

if TYPE_CHECKING:
    from dps_agent.host.config import Configuration


def seal_key_file(configuration: Configuration) -> bool:
    """Replaces the key in `device_key_file` by one that this TPM alone can use; False: it was replaced before.

    The TPM has signed with it before the file changes. ConfigurationError where the settings name no key or one that
    cannot be replaced; AskOperator `agent.file` where the file cannot be written, and what the TPM raises.
    """
    if configuration.attestation != SYMMETRIC_KEY:
        text = f'attestation: expected "{SYMMETRIC_KEY}", whose key a TPM can seal; came "{configuration.attestation}"'
        raise ConfigurationError("config.invalid", [text])
    path, is_credential = password_file(configuration.device_key_file, os.environ)
    content = key_file(configuration)
    key = key_of(configuration, content)
    if key is None:
        return False
    if is_credential:
        text = f"{SETTING}: expected a file that can be replaced; {path} is a credential, which systemd keeps"
        raise ConfigurationError("config.invalid", [text])
    tpm = open_tpm(configuration)

    def seal() -> Sealed:
        ek, srk = tpm.endorsement_key(), tpm.storage_root_key()
        wrapped_key, message = tpm.import_key(make_activation(ek, srk, key)), b"\x00" + random_bytes(32)
        if not same_bytes(tpm.sign(wrapped_key, message), hmac_sha256(key, message)):
            raise AskOperator("tpm.failed", "the TPM signed, but not with the key that it was given")
        return Sealed(object_name(ek), object_name(srk), wrapped_key)

    sealed = offline_runner(configuration, tpm).ask_tpm(seal)
    try:
        _replace(os.path.realpath(path), sealed_text(sealed))
    except OSError as error:
        raise AskOperator("agent.file", f"{path} cannot be replaced: {error.strerror}") from None
    return True


def _replace(path: str, content: bytes) -> None:
    """Replaces the file, and overwrites what it was: a name that is gone leaves the bytes on the disk."""
    refuse_special(os.stat(path), path, for_writing=True)
    with open(os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC), "r+b", buffering=0) as former:
        size = os.fstat(former.fileno()).st_size
        replace_file(path, content)
        sync_folder_of(path)  # before the old key is gone the new one has its name for certain
        former.write(os.urandom(size))
        os.fsync(former.fileno())
