"""What the hub sends, held for the programs that read GET /events, and the ids under which they answer.

Nothing here is stored: a cloud-to-device message stays the hub's until a program is done with it, and the end of a
connection to the hub ends what was held of it, for it will be delivered again.

All that is held is bounded in number and in bytes: what there is no room for is not taken.
"""

from __future__ import annotations

import binascii
import os
from typing import TYPE_CHECKING, Any

from dps_agent.hub_effects import CloudMessage, Desired, MethodCall
from dps_agent.properties import merged
from dps_agent.session import CALL_LIMIT, MESSAGE_LIMIT, METHOD_LIMIT_S
from dps_hal.platform import from_json, to_json
from dps_text import whole_number

if TYPE_CHECKING:
    from dps_agent.hub_effects import Message

HELD_LIMIT = 2 * 1024 * 1024  # bytes of messages and calls, as they are sent
NEWS_LIMIT = 512 * 1024  # bytes of patches that readers were not sent yet
DESIRED_LIMIT = 128 * 1024  # bytes of desired properties; a hub has at most 32 KiB of them
_NO_JSON = object()


class Events:
    """Messages, method calls and desired properties of the connection of now, each as the chunk that readers get."""

    def __init__(self) -> None:
        self._origin = os.urandom(8).hex()  # no other process had it: an id of another one is a stranger here
        self._connection = 0  # number of the connection to the hub: ids of an earlier one mean nothing any more
        self._held: dict[int, bytes] = {}  # cloud-to-device messages, as they are sent
        self._calls: dict[int, tuple[bytes, float]] = {}  # method calls as they are sent, with their ends
        self._held_size = 0  # bytes of held messages and calls
        self._version = 0  # of the desired properties
        self._known: dict[str, Any] | None = None  # they themselves; None: they have not come, or are too large
        self._desired: bytes | None = None  # they as the chunk for whoever begins to read
        self._news: list[bytes] = []  # lines that the readers of now were not sent yet
        self._patches_size = 0  # bytes of the desired properties among the news

    # For the service.

    def take(self, message: Message, now_s: float) -> bool:
        """Holds a message of the hub's; False where there is no room for it, or where it says nothing."""
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
        self._connection += 1
        self._held.clear()
        self._calls.clear()
        self._held_size = 0

    # For the socket.

    def has_news(self) -> bool:
        """Whether the readers of now were not sent everything yet."""
        return bool(self._news)

    def news(self) -> list[bytes]:
        """What the readers of now were not sent yet."""
        news, self._news = self._news, []
        self._patches_size = 0
        return news

    def backlog(self) -> list[bytes]:
        """What whoever begins to read now gets first; what is news has to have gone to the others before."""
        desired = [] if self._desired is None else [self._desired]
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
        self._held_size -= len(self._held.pop(message_id, b""))

    def end_call(self, call_id: int) -> None:
        """The hub's session has the answer to this call, or it is too late for one."""
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
        known, found, changed, text = self._known, None, None, b""
        if payload is not None and len(payload) <= DESIRED_LIMIT:
            changed = _json_of(payload)
            if not isinstance(changed, dict):
                return True  # a patch that is no object changes nothing
            if whole:
                found = changed
                changed = found if known is None else difference(known, found)
            elif self._desired is None or known is not None:  # a patch makes nothing whole of what was too large
                found = merged(known or {}, changed)
            text = to_json(found).encode()
            if len(text) > DESIRED_LIMIT:
                found = None
        if whole and found is not None and (version, found) == (self._version, known):
            return True  # another session with the same hub: everybody knows these
        self._version, self._known = version, found
        self._desired = _desired_chunk(version, None if found is None else text, text)
        shown = None if found is None or changed is None else to_json(changed).encode()
        content = _desired_chunk(version, None if shown is None else text, shown)
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


def difference(known: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """The merge patch (RFC 7396) that makes `now` of `known`."""
    changes: dict[str, Any] = dict.fromkeys(name for name in known if name not in now)
    for name, value in now.items():
        former = known.get(name)
        if isinstance(value, dict) and isinstance(former, dict):
            if inner := difference(former, value):
                changes[name] = inner
        elif name not in known or value != former or type(value) is not type(former):
            changes[name] = value
    return changes


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


def _desired_chunk(version: int, whole: bytes | None, changed: bytes | None) -> bytes:
    """Desired properties, and what changed of them, as a line; None: they are too large for this device."""
    shown = b'"tooLarge":true'
    if whole is not None and changed is not None:
        shown = b'"whole":' + whole + b',"changed":' + changed
    head = to_json({"event": "desired", "version": version}).encode()
    return chunk(head[:-1] + b"," + shown + b"}\n")


def _chunk_of(document: dict[str, Any]) -> bytes:
    return chunk(to_json(document).encode() + b"\n")
