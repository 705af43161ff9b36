"""What a program asks the service for, and what it is told, as values: bytes out, values in.

The requests are those of docs/programs.md; docs/socket.openapi.yaml describes them for machines.
"""

from __future__ import annotations

import json
from binascii import a2b_base64
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote, unquote_to_bytes

from dps_agent.client.errors import AgentError, MaybeDone, NotDone, Refused

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from dps_agent.effects import Reply

JSON = "json"
TEXT = "text"
BYTES = "bytes"
TOO_LARGE = "too large"
BATCH_LIMIT = 256 * 1024  # bytes of one request with many messages; IoT Hub quotas
MESSAGE_LIMIT = 256 * 1024  # bytes of one message as `message_size` counts; IoT Hub quotas
_ENCODER = json.JSONEncoder(allow_nan=False, ensure_ascii=False, separators=(",", ":"))
_JSON_PROPERTIES = {"$.ct": "application/json", "$.ce": "utf-8"}  # without these a hub's routes do not look into a body


class Request(NamedTuple):
    """One request. `repeats`: to do it twice is as good as once, so that it is asked again where nobody knows."""

    method: str
    target: str
    body: bytes = b""
    content_type: str = ""
    repeats: bool = True

    def content(self) -> bytes:
        """As it is sent."""
        kind = f"Content-Type: {self.content_type}\r\n" if self.content_type else ""
        head = (
            f"{self.method} {self.target} HTTP/1.1\r\nHost: localhost\r\n{kind}Content-Length: {len(self.body)}\r\n\r\n"
        )
        return head.encode() + self.body


class Message(NamedTuple):
    """A message from the cloud. `form` says what `payload` is: JSON, TEXT (str), BYTES or TOO_LARGE (None)."""

    id: str
    payload: Any
    form: str
    properties: dict[str, str]


class MethodCall(NamedTuple):
    """A direct method; `payload` and `form` as in Message."""

    id: str
    name: str
    payload: Any
    form: str


class Desired(NamedTuple):
    """Desired properties: the `whole` of them, merged, and what `changed` (the whole where nothing was known before).

    Both are None where they are too large for this device.
    """

    version: int
    whole: dict[str, Any] | None
    changed: dict[str, Any] | None


class Twin(NamedTuple):
    """Both halves of the device's twin, each with its `$version`."""

    desired: dict[str, Any]
    reported: dict[str, Any]


class MethodAnswer(NamedTuple):
    """What a method's function returns where the status is not 200."""

    status: int
    payload: Any = None


def acknowledged(value: Any, version: int, code: int = 200, description: str = "") -> dict[str, Any]:
    """The answer to a writable property as Plug and Play wants it reported; `version` is that of the desired ones."""
    return {"value": value, "ac": code, "av": version, **({"ad": description} if description else {})}


def telemetry(payload: Any, properties: Mapping[str, str] | None, qos: int, at_least_once: bool) -> Request:
    """One message. bytes and str go out as they are, everything else as JSON, which is marked as such."""
    if qos not in (0, 1):
        raise Refused("agent.usage", f"qos: expected 0 or 1; came {qos!r}")
    own = dict(properties or {})
    if not isinstance(payload, bytes | str):
        own = {**_JSON_PROPERTIES, **own}
    if qos == 0:
        own["$qos"] = "0"
    return Request("POST", _with_query("/telemetry", own), _body(payload), "", at_least_once)


def with_more_properties(target: str, more: Mapping[str, str]) -> str:
    """The target of telemetry with those of these properties that it does not have yet."""
    path, _, query = target.partition("?")
    names = {pair.partition("=")[0] for pair in query.split("&")}
    pairs = [query] if query else []
    pairs += [
        f"{quote(name, safe='')}={quote(value, safe='')}"
        for name, value in more.items()
        if quote(name, safe="") not in names
    ]
    return f"{path}?{'&'.join(pairs)}" if pairs else path


def message_size(request: Request) -> int:
    """The bytes of telemetry as a hub counts them: of system properties, which begin with "$.", the values alone."""
    size = len(request.body)
    for pair in request.target.partition("?")[2].split("&"):
        name, _, value = (unquote_to_bytes(text) for text in pair.partition("="))
        size += len(value) + (0 if name.startswith(b"$.") else len(name))
    return size


def as_single_messages(payloads: Iterable[Any], properties: Mapping[str, str] | None) -> list[Request]:
    """Many messages as JSON, a request each."""
    return [telemetry(_json(payload), {**_JSON_PROPERTIES, **(properties or {})}, 1, True) for payload in payloads]


def lines_of(payloads: Iterable[Any]) -> list[bytes]:
    """Many messages as JSON, a line each."""
    return [_json(payload) + b"\n" for payload in payloads]


def batch(lines: Sequence[bytes], at: int, properties: Mapping[str, str] | None) -> Request:
    """The lines from `at` on that fit into one request, at least one."""
    end, size = at, 0
    while end < len(lines) and (end == at or size + len(lines[end]) <= BATCH_LIMIT):
        size += len(lines[end])
        end += 1
    target = _with_query("/telemetry", {**_JSON_PROPERTIES, **(properties or {})})
    return Request("POST", target, b"".join(lines[at:end]), "application/x-ndjson", False)


def reported(patch: Mapping[str, Any]) -> Request:
    """A merge patch (RFC 7396) of the reported properties."""
    return Request("PATCH", "/twin/reported", _json(patch), "application/merge-patch+json")


def answered(call_id: str, answer: Any) -> Request:
    """What a method gives back; `answer` is JSON, or a MethodAnswer."""
    status, payload = answer if isinstance(answer, MethodAnswer) else (200, answer)
    body = b"" if payload is None else _json(payload)
    return Request("POST", f"/methods/{quote(call_id, safe='')}?status={status}", body, "application/json")


def done(message_id: str) -> Request:
    """A message that need not be delivered again."""
    return Request("POST", f"/events/{quote(message_id, safe='')}/done")


def get(path: str) -> Request:
    """What only asks."""
    return Request("GET", path)


def twin_of(document: dict[str, Any]) -> Twin:
    """What GET /twin answers."""
    return Twin(document["desired"], document["reported"])


def outcome(reply: Reply) -> Any:
    """The document of an answer; raises what it means where it is no success."""
    try:
        document = json.loads(bytes(reply.body)) if len(reply.body) else None
    except (ValueError, RecursionError):
        document = None
    if reply.status == 200:
        return document
    raise error_in(document, reply.status)


def error_in(document: Any, status: int = 0) -> AgentError:
    """The error that a document tells; `status` of the answer, which counts where the code says nothing."""
    fields = document.get("error") if isinstance(document, dict) else None
    fields = fields if isinstance(fields, dict) else {}
    code = str(fields.get("code") or "agent.bug")
    message = str(fields.get("message") or f"the service answered with status {status} and no reason")
    retry_after_s = fields.get("retryAfterS")
    return _kind(status, code)(code, message, retry_after_s if isinstance(retry_after_s, int | float) else None)


def event_of(line: bytes) -> Message | MethodCall | Desired | None:
    """One line of GET /events; None for an empty one, and for a kind of event that is not known here."""
    try:
        found: Any = json.loads(line) if line.strip() else None
    except (ValueError, RecursionError):
        raise NotDone("agent.bug", "the service sent a line that is no JSON") from None
    match found:
        case {"event": "message", "id": str(event_id)}:
            return Message(event_id, *_payload(found), found.get("properties") or {})
        case {"event": "method", "id": str(event_id), "name": str(name)}:
            return MethodCall(event_id, name, *_payload(found))
        case {"event": "desired", "version": int(version)}:
            return Desired(version, found.get("whole"), found.get("changed"))
    return None


def _kind(status: int, code: str) -> type[AgentError]:
    if status in (500, 504) or code in ("agent.unacknowledged", "agent.out_of_time"):
        return MaybeDone
    return NotDone if status in (0, 408, 429, 503) else Refused


def _payload(found: dict[str, Any]) -> tuple[Any, str]:
    if "payload" in found:
        return found["payload"], JSON
    if "payloadText" in found:
        return found["payloadText"], TEXT
    try:
        return a2b_base64(found["payloadBase64"]), BYTES
    except (KeyError, TypeError, ValueError):
        return None, TOO_LARGE


def _with_query(path: str, properties: Mapping[str, str]) -> str:
    for name, value in properties.items():
        if not (isinstance(name, str) and isinstance(value, str) and name):
            raise Refused("agent.usage", f"properties: expected text by name; came {name!r}: {value!r}")
    try:
        query = "&".join(f"{quote(name, safe='')}={quote(value, safe='')}" for name, value in properties.items())
    except UnicodeEncodeError:
        raise Refused("agent.usage", "properties: expected text that UTF-8 can say") from None
    return f"{path}?{query}" if query else path


def _body(payload: Any) -> bytes:
    if isinstance(payload, bytes):
        return payload
    try:
        return payload.encode() if isinstance(payload, str) else _json(payload)
    except UnicodeEncodeError:
        raise Refused("agent.usage", "expected text that UTF-8 can say") from None


def _json(value: Any) -> bytes:
    try:
        return _ENCODER.encode(value).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise Refused("agent.usage", f"expected what JSON can say: {error}") from None
