"""The back ends of a real TPM, each opened by a TCTI string."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dps_hal.contracts import TpmService
from dps_hal.host.device import transport_for
from dps_hal.host.esys import EsysTpm
from dps_hal.tpm.wire import WireTpm

OpenTpm = Callable[..., TpmService]


def open_wire(tcti: str, **settings: Any) -> WireTpm:
    """A `WireTpm` at the TPM that the string names."""
    return WireTpm(transport_for(tcti), **settings)


BACK_ENDS: dict[str, OpenTpm] = {"esys": EsysTpm, "wire": open_wire}
