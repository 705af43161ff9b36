"""What the logic may ask for, and the law of asking.

The logic is written as generators: each yields one of the values below and is sent the answer. A runner (Linux
threads, asyncio on a board, virtual time in tests) does the work.

The law:

1. `Http` and everything that concerns the hub is always answered by a value; it never raises into the generator.
2. A failure of the TPM or the store is thrown into the generator as one of the four classes of `dps_hal.errors`.
3. The runner always ends a generator with `close()`. The logic owns no resource, so no `finally` in it ever yields.
4. `Uptime` (monotonic) drives every delay and budget. `UtcNow` serves token expiry, certificate verdicts and the times
   in a record, nothing else.
5. Every yield is bound to a name that is annotated with the answer's type; those answered by None have none.
6. Only `Commit` makes a hub real.
7. `NextEvent` is the only way to hear of what nobody asked for; between two of them nothing is lost, only delayed.
"""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Generator
    from typing import Any, NamedTuple, TypeAlias

    from dps_agent.sas import SasToken

    class Http(NamedTuple):
        """One request to the DPS endpoint; answered by Reply or NoReply.

        `path` begins with "/", is percent-encoded and carries the query. `body` is JSON, empty for none.
        """

        method: str
        path: str
        body: bytes
        authorization: SasToken | None

    class Reply(NamedTuple):
        """An HTTP answer that arrived whole: header names in lower case, `date_s` the Date header in UTC seconds."""

        status: int
        headers: dict[str, str]
        body: bytes
        date_s: int | None

    class NoReply(NamedTuple):
        """No whole answer came. `reason` is a NO_REPLY_* word, then optionally ": " and the system's own text.

        `request_sent` is False only if the server cannot have seen the request.
        """

        reason: str
        request_sent: bool

    class ReadEndorsementKey(NamedTuple):
        """Answered by the EK's marshalled TPM2B_PUBLIC, bytes."""

    class ReadStorageRootKey(NamedTuple):
        """Answered by the SRK's marshalled TPM2B_PUBLIC, bytes."""

    class ImportKey(NamedTuple):
        """Answered by the wrapped key, bytes, that the activation blob carried."""

        activation: bytes

    class Sign(NamedTuple):
        """Answered by HMAC-SHA256 of `message` by the wrapped key, 32 bytes."""

        wrapped_key: bytes
        message: bytes

    class Uptime(NamedTuple):
        """Answered by monotonic seconds, a float."""

    class UtcNow(NamedTuple):
        """Answered by `dps_hal.contracts.Utc`."""

    class Random(NamedTuple):
        """Answered by a float in [0, 1)."""

    class Sleep(NamedTuple):
        """Answered by None after `delay_s` seconds, or earlier where somebody asks for haste.

        `reason` is what status output shows meanwhile.
        """

        delay_s: float
        reason: str

    class Commit(NamedTuple):
        """Answered by None once `payload` is durably the content of `record`."""

        record: str
        payload: bytes

    class LoadRecord(NamedTuple):
        """Answered by `dps_hal.contracts.StoredRecord` or None."""

        record: str

    class ForgetOlder(NamedTuple):
        """Answered by None once no earlier content of `record` is left in the storage."""

        record: str

    class Connect(NamedTuple):
        """One MQTT 3.1.1 connection over TLS with a persistent session, client id `device_id`; an earlier one ends.

        Answered by ConnAck or NoReply. What an earlier connection of the same device to the same hub published with
        QoS 1 and never saw acknowledged is sent again with DUP; for another hub or device it is forgotten. Of the
        events of an earlier connection only Acknowledged may still come; those of programs stay.
        """

        hub: str
        device_id: str
        user_name: str
        token: SasToken
        keep_alive_s: int

    class ConnAck(NamedTuple):
        """The hub's answer to CONNECT: MQTT 3.1.1, table 3.1; 0 is success."""

        return_code: int
        session_present: bool

    class Subscribe(NamedTuple):
        """One SUBSCRIBE with pairs (topic filter, QoS); answered by its packet id, None without a connection.

        The hub's answer is the event Granted.
        """

        filters: tuple[tuple[str, int], ...]

    class Publish(NamedTuple):
        """One PUBLISH; answered by its packet id (0 for QoS 0), None without a connection; waits for nothing.

        With QoS 1 the event Acknowledged follows, be it on a later connection.
        """

        topic: str
        payload: bytes
        qos: int

    class Acknowledge(NamedTuple):
        """The PUBACK for an Arrived message with QoS 1; answered by None."""

        packet_id: int

    class NextEvent(NamedTuple):
        """Answered by the next of the events below, or None at `until_uptime_s`; at once where that has passed."""

        until_uptime_s: float

    class Disconnect(NamedTuple):
        """Answered by None once the connection is closed, politely where it still stands."""

    class Tell(NamedTuple):
        """Hands one of the messages below to the programs on this device; answered by whether anybody takes it."""

        message: "Message"

    # Events of the hub.

    class Granted(NamedTuple):
        """SUBACK: a granted QoS for each filter, 0x80 for a refused one."""

        packet_id: int
        return_codes: tuple[int, ...]

    class Acknowledged(NamedTuple):
        """PUBACK: the hub has what was published."""

        packet_id: int

    class Arrived(NamedTuple):
        """A message from the hub; with a packet id (QoS 1) it is to be acknowledged.

        `payload` is None where it was too large for this device.
        """

        topic: str
        payload: bytes | None
        packet_id: int

    class Gone(NamedTuple):
        """The connection ended, or was silent for 1.5 times its keep-alive; `reason` as in NoReply."""

        reason: str

    # Events of programs on this device. `request_id` is theirs; what is told to them carries it.

    class SendTelemetry(NamedTuple):
        """Answered by TelemetryDone."""

        request_id: int
        properties: dict[str, str]
        payload: bytes

    class AnswerMethod(NamedTuple):
        """The answer to a MethodCall; `payload` is JSON or empty."""

        call_id: int
        status: int
        payload: bytes

    class MessageDone(NamedTuple):
        """A CloudMessage may be acknowledged to the hub."""

        message_id: int

    class RegisterAgain(NamedTuple):
        """Leave the hub and register, with the old identity until the new one is stored."""

    # Messages to programs on this device.

    class TelemetryDone(NamedTuple):
        """The hub acknowledged the telemetry, or it was not sent and will not be."""

        request_id: int
        accepted: bool

    class CloudMessage(NamedTuple):
        """A cloud-to-device message; the hub keeps it until MessageDone. `message_id` is unique in this life."""

        message_id: int
        properties: dict[str, str]
        payload: bytes | None

    class MethodCall(NamedTuple):
        """A direct method; the caller waits for AnswerMethod. `call_id` is unique in this life."""

        call_id: int
        name: str
        payload: bytes

    class Desired(NamedTuple):
        """Desired twin properties, JSON: all of them, or (not `whole`) a merge patch; `version` is their $version."""

        version: int
        payload: bytes
        whole: bool

    Event: TypeAlias = (
        Granted | Acknowledged | Arrived | Gone | SendTelemetry | AnswerMethod | MessageDone | RegisterAgain
    )
    Message: TypeAlias = TelemetryDone | CloudMessage | MethodCall | Desired

    Effect: TypeAlias = (
        Http
        | ReadEndorsementKey
        | ReadStorageRootKey
        | ImportKey
        | Sign
        | Uptime
        | UtcNow
        | Random
        | Sleep
        | Commit
        | LoadRecord
        | ForgetOlder
        | Connect
        | Subscribe
        | Publish
        | Acknowledge
        | NextEvent
        | Disconnect
        | Tell
    )
    Exchange: TypeAlias = Generator[Effect, Any, Any]
else:
    from collections import namedtuple

    Http = namedtuple("Http", ("method", "path", "body", "authorization"))
    Reply = namedtuple("Reply", ("status", "headers", "body", "date_s"))
    NoReply = namedtuple("NoReply", ("reason", "request_sent"))
    ReadEndorsementKey = namedtuple("ReadEndorsementKey", ())
    ReadStorageRootKey = namedtuple("ReadStorageRootKey", ())
    ImportKey = namedtuple("ImportKey", ("activation",))
    Sign = namedtuple("Sign", ("wrapped_key", "message"))
    Uptime = namedtuple("Uptime", ())
    UtcNow = namedtuple("UtcNow", ())
    Random = namedtuple("Random", ())
    Sleep = namedtuple("Sleep", ("delay_s", "reason"))
    Commit = namedtuple("Commit", ("record", "payload"))
    LoadRecord = namedtuple("LoadRecord", ("record",))
    ForgetOlder = namedtuple("ForgetOlder", ("record",))
    Connect = namedtuple("Connect", ("hub", "device_id", "user_name", "token", "keep_alive_s"))
    ConnAck = namedtuple("ConnAck", ("return_code", "session_present"))
    Subscribe = namedtuple("Subscribe", ("filters",))
    Publish = namedtuple("Publish", ("topic", "payload", "qos"))
    Acknowledge = namedtuple("Acknowledge", ("packet_id",))
    NextEvent = namedtuple("NextEvent", ("until_uptime_s",))
    Disconnect = namedtuple("Disconnect", ())
    Tell = namedtuple("Tell", ("message",))
    Granted = namedtuple("Granted", ("packet_id", "return_codes"))
    Acknowledged = namedtuple("Acknowledged", ("packet_id",))
    Arrived = namedtuple("Arrived", ("topic", "payload", "packet_id"))
    Gone = namedtuple("Gone", ("reason",))
    SendTelemetry = namedtuple("SendTelemetry", ("request_id", "properties", "payload"))
    AnswerMethod = namedtuple("AnswerMethod", ("call_id", "status", "payload"))
    MessageDone = namedtuple("MessageDone", ("message_id",))
    RegisterAgain = namedtuple("RegisterAgain", ())
    TelemetryDone = namedtuple("TelemetryDone", ("request_id", "accepted"))
    CloudMessage = namedtuple("CloudMessage", ("message_id", "properties", "payload"))
    MethodCall = namedtuple("MethodCall", ("call_id", "name", "payload"))
    Desired = namedtuple("Desired", ("version", "payload", "whole"))

NO_REPLY_DNS = "dns"  # the name did not resolve
NO_REPLY_CONNECT = "connect"  # refused, unreachable, timed out before a connection stood
NO_REPLY_TLS = "tls"  # the peer's certificate or name was not verified, or the handshake failed
NO_REPLY_TIMEOUT = "timeout"  # the request's total deadline passed
NO_REPLY_CLOSED = "closed"  # the connection ended before the answer was whole (also a body cut off half way)
NO_REPLY_TOO_LARGE = "too_large"  # headers or body over the bound
NO_REPLY_PROTOCOL = "protocol"  # not HTTP, or not MQTT
NO_REPLY_NOT_FOUND = "not_found"  # the WebSocket was refused with 404: there is no such hub
NO_REPLY_PROXY = "proxy"  # the HTTP proxy on the way wants other credentials
