"""What the logic may ask for of the hub, what it hears of it, and what goes between it and the programs on the device.

The law of asking stands in `dps_agent.effects`. A file of its own: a board that registers needs the memory.
"""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NamedTuple, TypeAlias

    from dps_agent.sas import SasToken

    class Connect(NamedTuple):
        """One MQTT 3.1.1 connection over TLS, client id `device_id`; an earlier one ends.

        Answered by ConnAck or NoReply. With `clean_session` the hub forgets subscriptions, and what it delivered and
        saw not acknowledged waits until it is subscribed to again. What was published with QoS 1 is kept until it is
        acknowledged or given up, or the hub or the device is another one. Of the events of an earlier connection only
        Acknowledged may still come; those of programs stay.
        """

        hub: str
        device_id: str
        user_name: str
        token: SasToken | bytes | None  # bytes: this chain, DER, shows who the device is; None: the one it always shows
        keep_alive_s: int
        clean_session: bool

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

        With QoS 1 the event Acknowledged follows, be it after SendAgain on a later connection.
        """

        topic: str
        payload: bytes
        qos: int

    class SendAgain(NamedTuple):
        """Sends again, with DUP, what an earlier connection published with QoS 1; answered by None."""

        packet_id: int

    class GiveUp(NamedTuple):
        """Forgets what was published with QoS 1 and is not acknowledged; for packet ids of earlier connections.

        Answered by None.
        """

        packet_id: int

    class Acknowledge(NamedTuple):
        """The PUBACK for an Arrived message with QoS 1; answered by None."""

        packet_id: int

    class NextEvent(NamedTuple):
        """Answered by the next of the events below, or None at `until_uptime_s`; at once where that has passed."""

        until_uptime_s: float

    class Disconnect(NamedTuple):
        """Answered by None once the connection is closed, politely where it still stands."""

    class Tell(NamedTuple):
        """Hands one of the messages below to the programs on this device; answered by whether anybody takes it.

        Desired properties that are not taken come again, whole, some minutes later.
        """

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
        """Answered by TelemetryDone. `sender` tells programs that do not trust each other apart.

        With QoS 0 the answer says that it was written, with 1 that the hub acknowledged it.
        """

        request_id: int
        properties: dict[str, str]
        payload: bytes
        sender: int
        qos: int

    class Report(NamedTuple):
        """A merge patch, JSON, to the reported properties; answered by TwinDone."""

        request_id: int
        patch: bytes

    class ReadTwin(NamedTuple):
        """Answered by TwinDone with the twin as the hub has it."""

        request_id: int

    class AnswerMethod(NamedTuple):
        """The answer to a MethodCall; `payload` is JSON or empty."""

        call_id: int
        status: int
        payload: bytes

    class MessageDone(NamedTuple):
        """A CloudMessage may be acknowledged to the hub."""

        message_id: int

    class Withdrawn(NamedTuple):
        """Who asked for this was told that it takes too long: it is not sent, or not again."""

        request_id: int

    class Readers(NamedTuple):
        """So many programs read messages now; posted after each Connect, and when it changes from or to 0."""

        number: int

    class RegisterAgain(NamedTuple):
        """Leave the hub and register, with the old identity until the new one is stored."""

    # Messages to programs on this device.

    class TelemetryDone(NamedTuple):
        """The hub has the telemetry, or with QoS 0 the network; or not: one that was `sent` it may or may not have."""

        request_id: int
        accepted: bool
        sent: bool

    class TwinDone(NamedTuple):
        """What became of Report or ReadTwin: a hub's status, or NOT_SENT, LACKING, UNANSWERED of `dps_agent.twin`.

        204: `version` is that of the reported properties now. 200: `payload` is the twin, JSON. 429: neither this nor
        another one within `wait_s`. Another one: `payload` is what the hub says to it.
        """

        request_id: int
        status: int
        version: int
        payload: bytes | None
        wait_s: float

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
        """Desired twin properties, JSON: all of them, or (not `whole`) a merge patch; `version` is their $version.

        `payload` is None where they are too large for this device; `version` may be 0 then, for unknown.
        """

        version: int
        payload: bytes | None
        whole: bool

    Event: TypeAlias = (
        Granted
        | Acknowledged
        | Arrived
        | Gone
        | SendTelemetry
        | Report
        | ReadTwin
        | AnswerMethod
        | MessageDone
        | Withdrawn
        | Readers
        | RegisterAgain
    )
    Message: TypeAlias = TelemetryDone | TwinDone | CloudMessage | MethodCall | Desired
else:
    from dps_hal.named import namedtuple

    Connect = namedtuple("Connect", ("hub", "device_id", "user_name", "token", "keep_alive_s", "clean_session"))
    ConnAck = namedtuple("ConnAck", ("return_code", "session_present"))
    Subscribe = namedtuple("Subscribe", ("filters",))
    Publish = namedtuple("Publish", ("topic", "payload", "qos"))
    SendAgain = namedtuple("SendAgain", ("packet_id",))
    GiveUp = namedtuple("GiveUp", ("packet_id",))
    Acknowledge = namedtuple("Acknowledge", ("packet_id",))
    NextEvent = namedtuple("NextEvent", ("until_uptime_s",))
    Disconnect = namedtuple("Disconnect", ())
    Tell = namedtuple("Tell", ("message",))
    Granted = namedtuple("Granted", ("packet_id", "return_codes"))
    Acknowledged = namedtuple("Acknowledged", ("packet_id",))
    Arrived = namedtuple("Arrived", ("topic", "payload", "packet_id"))
    Gone = namedtuple("Gone", ("reason",))
    SendTelemetry = namedtuple("SendTelemetry", ("request_id", "properties", "payload", "sender", "qos"))
    Report = namedtuple("Report", ("request_id", "patch"))
    ReadTwin = namedtuple("ReadTwin", ("request_id",))
    AnswerMethod = namedtuple("AnswerMethod", ("call_id", "status", "payload"))
    MessageDone = namedtuple("MessageDone", ("message_id",))
    Withdrawn = namedtuple("Withdrawn", ("request_id",))
    Readers = namedtuple("Readers", ("number",))
    RegisterAgain = namedtuple("RegisterAgain", ())
    TelemetryDone = namedtuple("TelemetryDone", ("request_id", "accepted", "sent"))
    TwinDone = namedtuple("TwinDone", ("request_id", "status", "version", "payload", "wait_s"))
    CloudMessage = namedtuple("CloudMessage", ("message_id", "properties", "payload"))
    MethodCall = namedtuple("MethodCall", ("call_id", "name", "payload"))
    Desired = namedtuple("Desired", ("version", "payload", "whole"))

NOT_AUTHORIZED = (4, 5)  # user name or password, not authorized: MQTT 3.1.1, table 3.1
