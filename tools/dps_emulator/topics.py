"""The topics of a hub, taken apart and put together.

Source: "Use MQTT to establish communication with an IoT hub". Properties travel in the topic's last level as
`name=value` joined by `&`, both percent-encoded; a name alone is null, `name=` is empty.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal
from urllib.parse import quote, unquote

METHOD_REQUESTS = "$iothub/methods/POST/#"
TWIN_ANSWERS = "$iothub/twin/res/#"
DESIRED_CHANGES = "$iothub/twin/PATCH/properties/desired/#"
CREDENTIAL_ANSWERS = "$iothub/credentials/res/#"  # a preview, for who asks for its api-version

Operation = Literal["telemetry", "twin-get", "twin-patch", "method-answer", "issue-certificate", "unknown"]

_REQUESTS: tuple[tuple[Operation, re.Pattern[str]], ...] = (
    ("twin-get", re.compile(r"\$iothub/twin/GET/\?(?P<query>.*)")),
    ("twin-patch", re.compile(r"\$iothub/twin/PATCH/properties/reported/\?(?P<query>.*)")),
    ("issue-certificate", re.compile(r"\$iothub/credentials/POST/issueCertificate/\?(?P<query>.*)")),
    ("method-answer", re.compile(r"\$iothub/methods/res/(?P<status>-?[0-9]{1,9})/\?(?P<query>.*)")),
)


@dataclass(frozen=True)
class Purpose:
    """What a device means by publishing to a topic."""

    operation: Operation
    request_id: str = ""
    status: int = 0  # the status of a method's answer
    properties: Mapping[str, str | None] | None = None  # the properties of telemetry


def cloud_to_device(device_id: str) -> str:
    """The topic filter for messages to a device."""
    return f"devices/{device_id}/messages/devicebound/#"


def device_filters(device_id: str) -> tuple[str, ...]:
    """All that a device may subscribe to."""
    return cloud_to_device(device_id), METHOD_REQUESTS, TWIN_ANSWERS, DESIRED_CHANGES


def purpose_of(topic: str, device_id: str) -> Purpose:
    """What `device_id` means by publishing to `topic`."""
    events = f"devices/{device_id}/messages/events"
    if topic == events or topic.startswith(events + "/"):
        return Purpose("telemetry", properties=parse_properties(topic[len(events) + 1 :]))
    for operation, pattern in _REQUESTS:
        if found := pattern.fullmatch(topic):
            request_id = parse_properties(found["query"]).get("$rid") or ""
            status = int(found["status"]) if operation == "method-answer" else 0
            return Purpose(operation, request_id, status)
    return Purpose("unknown")


def parse_properties(text: str) -> dict[str, str | None]:
    """A property bag as in a topic."""
    properties: dict[str, str | None] = {}
    for pair in text.rstrip("/").split("&"):
        name, equals, value = pair.partition("=")
        if name:
            properties[unquote(name)] = unquote(value) if equals else None
    return properties


def format_properties(properties: Mapping[str, str]) -> str:
    """The inverse of `parse_properties`; `$` is encoded too, as the hub does."""
    return "&".join(f"{quote(name, safe='')}={quote(value, safe='')}" for name, value in properties.items())
