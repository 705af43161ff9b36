"""What a registration comes to, for whoever asked for it."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NamedTuple

    class Provisioned(NamedTuple):
        """The hub of this device, and how it was come by."""

        assigned_hub: str
        device_id: str
        registration_id: str
        substatus: str
        already_provisioned: bool  # the stored assignment holds, DPS was not asked
        backend: str  # "simulator": the keys lie in plain files
        payload: Any  # what a custom allocation returned, None for nothing
        payload_omitted: bool  # there was a payload, and it was too large to store
        duration_s: float
        warnings: tuple[str, ...]  # what else was asked for and could not be done
else:
    from dps_hal.named import namedtuple

    Provisioned = namedtuple(
        "Provisioned",
        (
            "assigned_hub",
            "device_id",
            "registration_id",
            "substatus",
            "already_provisioned",
            "backend",
            "payload",
            "payload_omitted",
            "duration_s",
            "warnings",
        ),
    )
