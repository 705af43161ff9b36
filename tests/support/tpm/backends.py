"""The back ends of a real TPM, each opened by a TCTI string."""

from __future__ import annotations

from collections.abc import Callable

from dps_hal.contracts import TpmService
from dps_hal.host.esys import EsysTpm
from dps_hal.host.transports import open_wire

OpenTpm = Callable[..., TpmService]


BACK_ENDS: dict[str, OpenTpm] = {"esys": EsysTpm, "wire": open_wire}
