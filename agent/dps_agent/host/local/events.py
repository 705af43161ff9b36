"""What the hub sends, held for the programs that read GET /events, and the ids under which they answer.

Nothing here is stored: a cloud-to-device message stays the hub's until a program is done with it, and the end of a
connection to the hub ends what was held of it, for it will be delivered again.
"""

from __future__ import annotations

import binascii
import time
from typing import TYPE_CHECKING, Any

from dps_agent.hub_effects import CloudMessage, Desired, MethodCall
from dps_agent.session import METHOD_LIMIT_S
from dps_hal.platform import from_json, to_json

if TYPE_CHECKING:
    from dps_agent.hub_effects import Message

_NO_JSON = object()


class Events:
    """Messages, method calls and desired properties of the connection of now, each as the chunk that readers get."""

    def __init__(self) -> None:
        self._epoch = 0  # connections to the hub: ids of an earlier one mean nothing any more
        self._held: dict[int, bytes] = {}  # cloud-to-device messages, as they are sent
        self._calls: dict[int, tuple[bytes, float]] = {}  # method calls as they are sent, with their ends
        self._desired: tuple[int, dict[str, Any]] | None = None

    def take(self, message: Message) -> bytes | None:
        """Holds a message of the hub's; returns the chunk for whoever reads now, None where there is none."""
        match message:
            case CloudMessage(message_id, properties, payload):
                document: dict[str, Any] = {"event": "message", "id": f"{self._epoch}-{message_id}"}
                self._held[message_id] = _chunk_of({**document, "properties": properties, **_payload(payload)})
                return self._held[message_id]
            case MethodCall(call_id, name, payload):
                document = {"event": "method", "id": f"{self._epoch}-{call_id}", "name": name}
                content = _chunk_of({**document, **_payload(payload)})
                self._calls[call_id] = (content, time.monotonic() + METHOD_LIMIT_S)
                return content
            case Desired(version, payload, whole):
                return self._desire(version, payload, whole)
        return None

    def _desire(self, version: int, payload: bytes | None, whole: bool) -> bytes | None:
        changes = json_of(payload or b"")
        if not isinstance(changes, dict):
            return None  # the session has parsed a whole one, unless too large; a patch that is no object is none
        known = {} if whole or self._desired is None else self._desired[1]
        self._desired = (version, _merged(known, changes))
        return _chunk_of({"event": "desired", "version": version, "whole": whole, "properties": changes})

    def backlog(self) -> list[bytes]:
        """The chunks that whoever begins to read now gets first."""
        chunks = []
        if self._desired is not None:
            version, properties = self._desired
            document = {"event": "desired", "version": version, "whole": True, "properties": properties}
            chunks.append(_chunk_of(document))
        return [*chunks, *self._held.values(), *(content for content, _ in self._calls.values())]

    def done(self, event_id: str) -> int:
        """The message id of an event's id, which is held no more; 0 where it is not held."""
        message_id = self._current(event_id)
        return 0 if self._held.pop(message_id, None) is None else message_id

    def answered(self, event_id: str) -> int:
        """The call id of an event's id, which waits no more; 0 where it does not wait."""
        call_id = self._current(event_id)
        return 0 if self._calls.pop(call_id, None) is None else call_id

    def _current(self, event_id: str) -> int:
        """The number in an event's id, 0 where it is of an earlier connection to the hub, or none."""
        epoch, _, number = event_id.partition("-")
        ours = epoch == str(self._epoch) and number.isascii() and number.isdecimal() and len(number) < 10
        return int(number) if ours else 0

    def forget(self) -> None:
        """The connection to the hub has ended."""
        self._epoch += 1
        self._held.clear()
        self._calls.clear()

    def expire(self, now_s: float) -> None:
        """Forgets the calls that nobody answered in time."""
        for call_id in [call_id for call_id, (_, until_s) in self._calls.items() if until_s <= now_s]:
            del self._calls[call_id]

    def ends_s(self) -> list[float]:
        """When `expire` has something to do."""
        return [until_s for _, until_s in self._calls.values()]


def chunk(line: bytes) -> bytes:
    """One line as HTTP/1.1's chunked coding has it: RFC 9112, 7.1."""
    return b"%x\r\n%b\r\n" % (len(line), line)


def is_json(content: bytes) -> bool:
    """Whether these bytes are one JSON text."""
    return json_of(content) is not _NO_JSON


def json_of(content: bytes) -> Any:
    """The value of a JSON text, or what no JSON text has for a value."""
    try:
        return from_json(content)
    except ValueError:
        return _NO_JSON


def _merged(known: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`known` with a JSON merge patch (RFC 7396) applied."""
    merged = dict(known)
    for name, value in changes.items():
        if value is None:
            merged.pop(name, None)
        elif isinstance(value, dict):
            inner = merged.get(name)
            merged[name] = _merged(inner if isinstance(inner, dict) else {}, value)
        else:
            merged[name] = value
    return merged


def _payload(content: bytes | None) -> dict[str, Any]:
    """A payload as JSON holds it best: as JSON, else as text, else in base64; None is one that was too large."""
    if content is None:
        return {"tooLarge": True}
    value = json_of(content) if content else None
    if value is not _NO_JSON:
        return {"payload": value}
    try:
        return {"payloadText": content.decode()}
    except ValueError:
        return {"payloadBase64": binascii.b2a_base64(content, newline=False).decode()}


def _chunk_of(document: dict[str, Any]) -> bytes:
    return chunk(to_json(document).encode() + b"\n")
