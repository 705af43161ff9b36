"""What a hub remembers of a device, and what arrived from devices, and how both are written down."""

import base64
import errno
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from dps_emulator.attestation import Credential
from dps_emulator.registrations import StateError
from dps_emulator.renewal import Pending
from dps_emulator.twin import Twin

MESSAGES_KEPT = 10_000
FILE_LIMIT_BYTES = 64 * 1024 * 1024  # of the messages kept, and of the log file, of which the one before is kept
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
    own_key: bytes | None = field(default=None, repr=False)  # empty: it has certificates of its own
    enabled: bool = True
    withdrawn: bool = False  # refused until DPS assigns it anew
    twin: Twin = field(default_factory=Twin)
    subscriptions: dict[str, int] | None = None  # the persistent session's, with QoS; None: there is none
    queue: list[CloudMessage] = field(default_factory=list)
    model_id: str = ""  # of Plug and Play, as the device said it when it connected last
    own_secondary: bytes | None = field(default=None, repr=False)
    own_thumbprints: tuple[str, ...] = ()
    pending: Pending | None = None  # the request for a certificate that is under way

    @property
    def own_credential(self) -> Credential | None:
        """What stands for the device in place of what DPS has issued, or None."""
        if self.own_key is None:
            return None
        keys = (self.own_key, self.own_secondary or self.own_key) if self.own_key else ()
        return Credential(keys, self.own_thumbprints)

    def to_json(self) -> dict[str, Any]:
        """For a file; may hold a key."""
        return {
            "deviceId": self.device_id,
            "ownKey": None if self.own_key is None else base64.b64encode(self.own_key).decode(),
            "enabled": self.enabled,
            "withdrawn": self.withdrawn,
            "twin": vars(self.twin),
            "subscriptions": self.subscriptions,
            "modelId": self.model_id,
            "ownSecondary": None if self.own_secondary is None else base64.b64encode(self.own_secondary).decode(),
            "ownThumbprints": list(self.own_thumbprints),
            "pending": vars(self.pending) if self.pending else None,
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
        own_key, secondary = record["ownKey"], record.get("ownSecondary")
        return cls(
            record["deviceId"],
            None if own_key is None else base64.b64decode(own_key, validate=True),
            record["enabled"],
            record["withdrawn"],
            Twin(**record["twin"]),
            record["subscriptions"],
            queue,
            record.get("modelId", ""),
            None if secondary is None else base64.b64decode(secondary, validate=True),
            tuple(record.get("ownThumbprints", ())),
            Pending(**record["pending"]) if record.get("pending") else None,
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


class DeviceRecords(Protocol):
    """What is written down of one hub's devices; keys are lower-case device ids."""

    def get(self, key: str, /) -> HubDevice | None:
        """A device, made anew with each call, or None; raises StateError."""

    def __setitem__(self, key: str, device: HubDevice, /) -> None: ...
    def __delitem__(self, key: str, /) -> None: ...
    def page(self, after: str = "") -> list[tuple[str, HubDevice | StateError]]:
        """The next devices behind the key `after`; in place of a damaged one what is wrong with it."""
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
