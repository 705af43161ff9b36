"""What can be broken by name, as entries of a fault script (`faults` says what these mean)."""

from collections.abc import Mapping
from typing import Any, NamedTuple

Entries = tuple[Mapping[str, Any], ...]

# How a hub throttles: connections are refused for now, twin requests get 429, telemetry loses its connection.
THROTTLED_HUB: Entries = (
    {"operation": "connect", "connack": 3},
    {"operation": "twin-get", "status": 429},
    {"operation": "twin-patch", "status": 429},
    {"operation": "telemetry", "drop": "before"},
)


class Breakage(NamedTuple):
    """One thing of the palette."""

    name: str
    title: str
    at: str  # DPS or hub
    entries: Entries


PALETTE = (
    Breakage(
        "dps-throttled",
        "too many requests: 429, Retry-After 10",
        "DPS",
        ({"status": 429, "headers": {"Retry-After": "10"}},),
    ),
    Breakage("dps-unavailable", "unavailable: 503", "DPS", ({"status": 503},)),
    Breakage("dps-no-lookup", "status lookups are refused: 404", "DPS", ({"operation": "lookup", "status": 404},)),
    Breakage(
        "dps-slow", "answers come 3 s later", "DPS", ({"method": "PUT", "delayS": 3}, {"method": "POST", "delayS": 3})
    ),
    Breakage("dps-hangs-up", "hangs up before it answers", "DPS", ({"cutAfterBytes": -1},)),
    Breakage("hub-throttled", "throttles connections, twins and telemetry", "hub", THROTTLED_HUB),
    Breakage("hub-refuses", "refuses connections: CONNACK 5", "hub", ({"operation": "connect", "connack": 5},)),
    Breakage("hub-unavailable", "is unavailable: CONNACK 3", "hub", ({"operation": "connect", "connack": 3},)),
    Breakage(
        "hub-loses-puback",
        "keeps telemetry and hangs up instead of a PUBACK",
        "hub",
        ({"operation": "telemetry", "drop": "after"},),
    ),
    Breakage("hub-slow", "acts 3 s later", "hub", ({"method": "MQTT", "delayS": 3},)),
    Breakage("hub-silent", "falls silent", "hub", ({"method": "MQTT", "silent": "before"},)),
)
