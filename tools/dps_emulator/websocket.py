"""The server's side of a WebSocket that carries MQTT: the upgrade and the frames; no socket.

Source: RFC 6455, which wsproto knows: a judge of the agent's frames that nobody here has written. A hub, and DPS, takes
it at `/$iothub/websocket` with the subprotocol `mqtt`, on port 443.
"""

from dataclasses import dataclass
from http import HTTPStatus

from wsproto import ConnectionType, WSConnection
from wsproto.connection import Connection, ConnectionState
from wsproto.events import AcceptConnection, BytesMessage, CloseConnection, Event, Ping, Pong, RejectConnection, Request
from wsproto.frame_protocol import FrameProtocol
from wsproto.utilities import RemoteProtocolError

PATH = "/$iothub/websocket"
SUBPROTOCOL = "mqtt"  # compared without case: the C client says MQTT
MAX_HEAD_BYTES = 16 * 1024
MAX_MESSAGE_BYTES = 1024 * 1024  # all frames of one message; a frame is passed on as it comes, and never held
_SENDING = FrameProtocol(client=False, extensions=[])  # of whole messages: nothing of one is left for the next


class WebSocketError(ValueError):
    """Bytes that are no WebSocket traffic a client may send."""


@dataclass(frozen=True)
class Upgrade:
    """The answer to an upgrade request; `accepted` is whether frames follow."""

    answer: bytes
    accepted: bool


def upgrade(head: bytes, *, strict: bool = False) -> Upgrade:
    """Answers the request whose head (up to the empty line) this is; `strict`: the subprotocol in lower case alone."""
    connection = WSConnection(ConnectionType.SERVER)
    try:
        connection.receive_data(head + b"\r\n\r\n")
        asked = next(connection.events(), None)
    except RemoteProtocolError as error:
        hint = error.event_hint
        return _refused(hint.status_code if isinstance(hint, RejectConnection) else HTTPStatus.BAD_REQUEST)
    except (UnicodeError, ValueError):  # of names of hosts and paths that are none
        return _refused(HTTPStatus.BAD_REQUEST)
    if not isinstance(asked, Request):
        return _refused(HTTPStatus.BAD_REQUEST)
    if asked.target.partition("?")[0] != PATH:
        return _refused(HTTPStatus.NOT_FOUND)
    offered = (item for item in asked.subprotocols if (item if strict else item.lower()) == SUBPROTOCOL)
    protocol = next(offered, None)
    if protocol is None:
        return _refused(HTTPStatus.BAD_REQUEST)
    return Upgrade(connection.send(AcceptConnection(subprotocol=protocol)), True)


def _refused(status: int) -> Upgrade:
    phrase = HTTPStatus(status).phrase
    return Upgrade(f"HTTP/1.1 {status:d} {phrase}\r\nConnection: close\r\nContent-Length: 0\r\n\r\n".encode(), False)


class FrameStream:
    """Takes a client's frames apart."""

    def __init__(self) -> None:
        self._connection = Connection(ConnectionType.SERVER)
        self._message_bytes = 0
        self.closed = False  # the client has sent its close frame

    def feed(self, content: bytes) -> tuple[bytes, bytes]:
        """What the frames carry, and the control frames to answer with; raises WebSocketError."""
        carried, answers = bytearray(), bytearray()
        if self.closed:
            return b"", b""
        try:
            self._connection.receive_data(content)
            for event in self._connection.events():
                self._take(event, carried, answers)
        except RemoteProtocolError as error:
            raise WebSocketError(str(error)) from None
        return bytes(carried), bytes(answers)

    def _take(self, event: Event, carried: bytearray, answers: bytearray) -> None:
        match event:
            case BytesMessage():
                self._message_bytes += len(event.data)
                if self._message_bytes > MAX_MESSAGE_BYTES:
                    raise WebSocketError(f"a message of more than {MAX_MESSAGE_BYTES} bytes")
                if event.message_finished:
                    self._message_bytes = 0
                carried += event.data
            case CloseConnection() if self._connection.state is ConnectionState.OPEN:  # wsproto's own opinion
                raise WebSocketError(event.reason or "bytes that are no frame")
            case Ping() | CloseConnection():
                answers += self._connection.send(event.response())
                self.closed = isinstance(event, CloseConnection)
            case Pong():
                pass
            case _:
                raise WebSocketError("a message of text: MQTT travels in binary ones")


def binary_frame(content: bytes) -> bytes:
    """`content` in one frame to the client."""
    return bytes(_SENDING.send_data(content))
