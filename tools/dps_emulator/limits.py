"""The documented limits of a service and of one hub, for `serve --limits`.

Sources: "Azure DPS quotas and limits"; "IoT Hub quotas and throttling". What is above a hub's rate passes for a minute
or two, then it is queued, then it is refused; how long the queue is, and that it is a minute of each, is ours.
"""

from typing import NamedTuple

from dps_emulator.quotas import Gate

BURST_S = 60.0  # of a rate that may be used at once
QUEUE_S = 60.0  # that a request waits before it is refused
POLLS_WITHIN_S = 10
METHOD_METER_BYTES = 4096  # that a direct method counts for at least


class Limits(NamedTuple):
    """Of one service, and of one hub of one unit."""

    registrations_per_min: int
    polls: int  # of one device, within POLLS_WITHIN_S
    connects_per_s: float
    telemetry_per_s: float
    messages_to_devices_per_s: float
    twin_reads_per_s: float
    twin_updates_per_s: float
    method_bytes_per_s: float

    def gates(self) -> dict[str, Gate]:
        """Those of one hub, by operation."""
        return {
            "telemetry": Gate(self.telemetry_per_s, QUEUE_S, BURST_S),
            "twin-get": Gate(self.twin_reads_per_s, QUEUE_S, BURST_S),
            "twin-patch": Gate(self.twin_updates_per_s, QUEUE_S, BURST_S),
            "invoke": Gate(self.method_bytes_per_s / METHOD_METER_BYTES, 0.0, BURST_S),
            "send": Gate(self.messages_to_devices_per_s, 0.0, BURST_S),  # whoever sends is told at once
        }


LIMITS = {"azure-s1": Limits(1000, 5, 100, 100, 100 / 60, 100, 50, 160 * 1024)}
