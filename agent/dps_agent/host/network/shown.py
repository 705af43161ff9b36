"""What this device shows in TLS, and with which key."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from dps_hal.contracts import TpmService


class Shown(NamedTuple):
    """A certificate that this device shows, and where its key is."""

    chain_file: str  # PEM; empty where DPS issues it: then it comes with each connection
    key_file: str  # the key, or what the TPM that made it can use of it
    tcti: str  # of the TPM that has the key, or may have made it; empty: it lies in the clear
    open_tpm: Callable[[], TpmService]  # that one, for the agent's own commands
    key_setting: str  # what the operator calls the key's file
