"""What a hub remembers of a device, and what arrived from devices, and how both are written down."""

import base64
import contextlib
import errno
import json
import os
import stat
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from dps_emulator.twin import Twin

MESSAGES_KEPT = 10_000
FILE_LIMIT_BYTES = 64 * 1024 * 1024  # messages.jsonl and the log file may each have so many; the one before is kept
_APPENDING = os.O_CREAT | os.O_APPEND | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW


@dataclass
class CloudMessage:
    """One message for a device, from `send` until the device has acknowledged it."""

    message_id: str
    payload: bytes = field(repr=False)
    properties: Mapping[str, str]
    expires_at_s: float
    packet_id: int = 0  # that of the delivery under way; 0: none
    deliveries: int = 0


@dataclass
class HubDevice:
    """One device at one hub; its key is the one that DPS issued unless it has its own."""

    device_id: str
    own_key: bytes | None = field(default=None, repr=False)
    enabled: bool = True
    withdrawn: bool = False  # refused until DPS assigns it anew
    twin: Twin = field(default_factory=Twin)
    subscriptions: dict[str, int] | None = None  # the persistent session's, with QoS; None: there is none
    queue: list[CloudMessage] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """For a file; may hold a key."""
        return {
            "deviceId": self.device_id,
            "ownKey": None if self.own_key is None else base64.b64encode(self.own_key).decode(),
            "enabled": self.enabled,
            "withdrawn": self.withdrawn,
            "twin": vars(self.twin),
            "subscriptions": self.subscriptions,
            "queue": [
                {**vars(message), "payload": base64.b64encode(message.payload).decode()} for message in self.queue
            ],
        }

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> "HubDevice":
        """The inverse of `to_json`; raises KeyError, TypeError or ValueError on anything else."""
        queue = [
            CloudMessage(**{**message, "payload": base64.b64decode(message["payload"], validate=True)})
            for message in record["queue"]
        ]
        own_key = record["ownKey"]
        return cls(
            record["deviceId"],
            None if own_key is None else base64.b64decode(own_key, validate=True),
            record["enabled"],
            record["withdrawn"],
            Twin(**record["twin"]),
            record["subscriptions"],
            queue,
        )


@dataclass(frozen=True)
class Telemetry:
    """One message that arrived from a device."""

    time: str
    hub: str
    device_id: str
    payload: bytes = field(repr=False)
    properties: Mapping[str, str | None]  # `$.` in front: a system property
    qos: int
    dup: bool

    def to_json(self) -> dict[str, Any]:
        """As `messages` prints it: the payload as text where it is UTF-8, otherwise in base64."""
        record: dict[str, Any] = {
            "time": self.time,
            "hub": self.hub,
            "deviceId": self.device_id,
            "properties": dict(self.properties),
            "qos": self.qos,
            "dup": self.dup,
        }
        try:
            record["payload"] = self.payload.decode()
        except UnicodeDecodeError:
            record["payloadBase64"] = base64.b64encode(self.payload).decode()
        return record

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> "Telemetry":
        """The inverse of `to_json`; raises KeyError, TypeError or ValueError on anything else."""
        encoded = record.get("payloadBase64")
        payload = record["payload"].encode() if encoded is None else base64.b64decode(encoded, validate=True)
        where = record["time"], record["hub"], record["deviceId"]
        return cls(*where, payload, record["properties"], record["qos"], record["dup"])


class MessageLog(Protocol):
    """Where telemetry goes."""

    def append(self, message: Telemetry) -> None:
        """Keeps one more; when this returns the hub may acknowledge it."""

    def all(self) -> list[Telemetry]:
        """The last MESSAGES_KEPT, oldest first."""
        ...


class BoundedFile:
    """Lines in a file of mode 0600; before it would be larger than `limit_bytes` it becomes NAME.1, in whose place.

    A line that a crash cut off ends where the next one begins.
    """

    def __init__(self, path: Path, limit_bytes: int = FILE_LIMIT_BYTES) -> None:
        self.path = path
        self.before = path.with_name(path.name + ".1")
        self._limit_bytes = limit_bytes

    def make(self) -> None:
        """Makes the file where there is none; raises OSError where no lines can be added to it."""
        os.close(self._open())

    def _open(self) -> int:
        fd = os.open(self.path, _APPENDING, 0o600)
        if stat.S_ISREG(os.fstat(fd).st_mode):
            return fd
        os.close(fd)
        raise OSError(errno.EINVAL, "not a regular file", str(self.path))

    def append(self, line: bytes) -> None:
        """Adds one line, given without its end; raises OSError."""
        with open(self._open(), "ab+") as file:
            size = os.fstat(file.fileno()).st_size
            if size and size + len(line) >= self._limit_bytes:
                os.replace(self.path, self.before)
            else:
                torn = size and os.pread(file.fileno(), 1, size - 1) != b"\n"
                file.write((b"\n" if torn else b"") + line + b"\n")
                return
        self.append(line)

    def lines(self) -> Iterator[bytes]:
        """All that there is, oldest first; raises OSError."""
        for path in (self.before, self.path):
            with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
                yield from file


class MessagesInMemory:
    """Telemetry that ends with the process; it takes `limit_bytes` at most, as the lines that a file would have."""

    def __init__(self, limit_bytes: int = FILE_LIMIT_BYTES) -> None:
        self._lines: deque[bytes] = deque()
        self._left = limit_bytes

    def append(self, message: Telemetry) -> None:
        """See MessageLog."""
        self._lines.append(_line_of(message))
        self._left -= len(self._lines[-1])
        while len(self._lines) > MESSAGES_KEPT or (self._left < 0 and len(self._lines) > 1):
            self._left += len(self._lines.popleft())

    def all(self) -> list[Telemetry]:
        """See MessageLog."""
        return _messages_in(self._lines)


class MessageFile:
    """Telemetry in a file, one JSON object a line; a line that is none is passed over."""

    def __init__(self, file: BoundedFile) -> None:
        self._file = file

    def append(self, message: Telemetry) -> None:
        """See MessageLog; raises OSError."""
        self._file.append(_line_of(message))

    def all(self) -> list[Telemetry]:
        """See MessageLog; raises OSError."""
        return _messages_in(deque(self._file.lines(), MESSAGES_KEPT))


def _line_of(message: Telemetry) -> bytes:
    return json.dumps(message.to_json()).encode()


def _messages_in(lines: Iterable[bytes]) -> list[Telemetry]:
    messages = []
    for line in lines:
        try:
            messages.append(Telemetry.from_json(json.loads(line)))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            continue
    return messages
