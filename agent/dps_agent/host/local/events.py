"""What the hub sends, held for the programs that read GET /events, and the ids under which they answer.

Nothing here is stored: a cloud-to-device message stays the hub's until a program is done with it, and the end of a
connection to the hub ends what was held of it, for it will be delivered again.

Both the service's thread, which brings what the hub sends, and the socket's, which shows it, call the methods; a lock
keeps them apart. All that is held is bounded in number and in bytes: what there is no room for is not taken.
"""

from __future__ import annotations

import binascii
import os
import threading
from typing import TYPE_CHECKING, Any

from dps_agent.hub_effects import CloudMessage, Desired, MethodCall
from dps_agent.session import CALL_LIMIT, MESSAGE_LIMIT, METHOD_LIMIT_S
from dps_hal.platform import from_json, to_json
from dps_text import whole_number

if TYPE_CHECKING:
    from dps_agent.hub_effects import Message

HELD_LIMIT = 2 * 1024 * 1024  # bytes of messages and calls, as they are sent
NEWS_LIMIT = 512 * 1024  # bytes of patches that the socket's thread has not looked at yet
DESIRED_LIMIT = 128 * 1024  # bytes of desired properties; a hub has at most 32 KiB of them
_NO_JSON = object()


class Events:
    """Messages, method calls and desired properties of the connection of now, each as the chunk that readers get."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._origin = os.urandom(8).hex()  # no other process had it: an id of another one is a stranger here
        self._connection = 0  # number of the connection to the hub: ids of an earlier one mean nothing any more
        self._held: dict[int, bytes] = {}  # cloud-to-device messages, as they are sent
        self._calls: dict[int, tuple[bytes, float]] = {}  # method calls as they are sent, with their ends
        self._held_size = 0  # bytes of held messages and calls
        self._desired: tuple[int, bytes | None] | None = None  # version and JSON text; None: they are too large
        self._news: list[bytes] = []  # lines that the readers of now were not sent yet
        self._patches_size = 0  # bytes of the patches among the news

    # For the service's thread.

    def take(self, message: Message, now_s: float) -> bool:
        """Holds a message of the hub's; False where there is no room for it, or where it says nothing."""
        with self._lock:
            match message:
                case CloudMessage(message_id, properties, payload):
                    if len(self._held) >= MESSAGE_LIMIT or not self._has_room(payload):
                        return False
                    document = {"event": "message", "id": self._id(message_id), "properties": properties}
                    content = _chunk_of({**document, **_payload(payload)})
                    if self._hold(content):
                        self._held[message_id] = content
                        return True
                case MethodCall(call_id, name, payload):
                    if len(self._calls) >= CALL_LIMIT or not self._has_room(payload):
                        return False
                    document = {"event": "method", "id": self._id(call_id), "name": name}
                    content = _chunk_of({**document, **_payload(payload)})
                    if self._hold(content):
                        self._calls[call_id] = (content, now_s + METHOD_LIMIT_S)
                        return True
                case Desired(version, payload, whole):
                    return self._desire(version, payload, whole)
            return False

    def forget(self) -> None:
        """The connection to the hub has ended."""
        with self._lock:
            self._connection += 1
            self._held.clear()
            self._calls.clear()
            self._held_size = 0

    # For the socket's thread.

    def news(self) -> list[bytes]:
        """What the readers of now were not sent yet."""
        with self._lock:
            news, self._news = self._news, []
            self._patches_size = 0
            return news

    def backlog(self) -> list[bytes]:
        """What whoever begins to read now gets first; what is news has to have gone to the others before."""
        with self._lock:
            desired = [] if self._desired is None else [_desired_chunk(self._desired[0], True, self._desired[1])]
            return [*desired, *self._held.values(), *(content for content, _ in self._calls.values())]

    def message_of(self, event_id: str) -> int:
        """The message with this event's id, 0 where none such is held now."""
        number = self._number_in(event_id)
        return number if number in self._held else 0

    def call_of(self, event_id: str) -> int:
        """The call with this event's id, 0 where none such waits now."""
        number = self._number_in(event_id)
        return number if number in self._calls else 0

    def end_message(self, message_id: int) -> None:
        """The hub's session was told that a program is done with this message."""
        with self._lock:
            self._held_size -= len(self._held.pop(message_id, b""))

    def end_call(self, call_id: int) -> None:
        """The hub's session has the answer to this call, or it is too late for one."""
        with self._lock:
            self._held_size -= len(self._calls.pop(call_id, (b"", 0.0))[0])

    def expire(self, now_s: float) -> None:
        """Forgets the calls that nobody answered in time."""
        for call_id in [call_id for call_id, (_, until_s) in list(self._calls.items()) if until_s <= now_s]:
            self.end_call(call_id)

    def ends_s(self) -> list[float]:
        """When `expire` has something to do."""
        return [until_s for _, until_s in list(self._calls.values())]

    # Parts.

    def _id(self, number: int) -> str:
        return f"{self._origin}-{self._connection}-{number}"

    def _number_in(self, event_id: str) -> int:
        """The number in an event's id, 0 where it is of another process, of an earlier connection, or none."""
        number = whole_number(event_id.rpartition("-")[2], 1, 10**9) or 0
        return number if event_id == self._id(number) else 0

    def _has_room(self, payload: bytes | None) -> bool:
        """Whether it makes sense to look into this payload."""
        return self._held_size + len(payload or b"") <= HELD_LIMIT

    def _hold(self, content: bytes) -> bool:
        """Counts one more and makes it news; False where it does not fit."""
        if self._held_size + len(content) > HELD_LIMIT:
            return False
        self._held_size += len(content)
        self._news.append(content)
        return True

    def _desire(self, version: int, payload: bytes | None, whole: bool) -> bool:
        if self._patches_size > NEWS_LIMIT or len(self._news) > MESSAGE_LIMIT + CALL_LIMIT:
            return False  # they come again, whole
        changes = text = None
        if payload is not None and len(payload) <= DESIRED_LIMIT:
            value = _json_of(payload)
            if not isinstance(value, dict):
                return True  # a patch that is no object changes nothing
            changes = to_json(value).encode()
            known = b"{}" if whole or self._desired is None else self._desired[1]
            if known is not None:  # a patch makes nothing whole of what was too large
                text = to_json(_merged(from_json(known), value)).encode()
        self._desired = (version, text if text is not None and len(text) <= DESIRED_LIMIT else None)
        content = _desired_chunk(version, whole, changes)
        self._patches_size += len(content)
        self._news.append(content)
        return True


def chunk(line: bytes) -> bytes:
    """One line as HTTP/1.1's chunked coding has it: RFC 9112, 7.1."""
    return b"%x\r\n%b\r\n" % (len(line), line)


def is_json(content: bytes) -> bool:
    """Whether these bytes are one JSON text."""
    return _json_of(content) is not _NO_JSON


def _json_of(content: bytes) -> Any:
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
    value = _json_of(content) if content else None
    if value is not _NO_JSON:
        return {"payload": value}
    try:
        return {"payloadText": content.decode()}
    except ValueError:
        return {"payloadBase64": binascii.b2a_base64(content, newline=False).decode()}


def _desired_chunk(version: int, whole: bool, properties: bytes | None) -> bytes:
    """Desired properties, or changes to them, as a line; None: they are too large for this device."""
    shown = b'"tooLarge":true' if properties is None else b'"properties":' + properties
    head = to_json({"event": "desired", "version": version, "whole": whole}).encode()
    return chunk(head[:-1] + b"," + shown + b"}\n")


def _chunk_of(document: dict[str, Any]) -> bytes:
    return chunk(to_json(document).encode() + b"\n")
