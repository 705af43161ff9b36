"""The server's side of a WebSocket that carries MQTT: the upgrade and the frames; no socket.

Source: RFC 6455. A hub takes it at `/$iothub/websocket` with the subprotocol `mqtt`, on port 443.
"""

import base64
import hashlib
from dataclasses import dataclass

PATH = "/$iothub/websocket"
SUBPROTOCOL = "mqtt"
MAX_HEAD_BYTES = 16 * 1024
MAX_FRAME_BYTES = 1024 * 1024
_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455, 1.3
_CONTINUATION, _TEXT, _BINARY, _CLOSE, _PING, _PONG = 0, 1, 2, 8, 9, 10


class WebSocketError(ValueError):
    """Bytes that are no WebSocket traffic a client may send."""


@dataclass(frozen=True)
class Upgrade:
    """The answer to an upgrade request; `accepted` is whether frames follow."""

    answer: bytes
    accepted: bool


def upgrade(head: bytes) -> Upgrade:
    """Answers the request whose head (up to the empty line) this is."""
    request_line, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    method, _, rest = request_line.partition(" ")
    path = rest.partition(" ")[0].partition("?")[0]
    offered = [item.strip() for item in headers.get("sec-websocket-protocol", "").split(",")]
    key = headers.get("sec-websocket-key", "")
    if method != "GET" or path != PATH:
        return _refused("404 Not Found")
    if headers.get("upgrade", "").lower() != "websocket" or "upgrade" not in headers.get("connection", "").lower():
        return _refused("426 Upgrade Required")
    if not key or headers.get("sec-websocket-version") != "13" or SUBPROTOCOL not in offered:
        return _refused("400 Bad Request")
    accept = base64.b64encode(hashlib.sha1(key.encode("latin-1") + _GUID, usedforsecurity=False).digest()).decode()
    answer = (
        "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        f"Sec-WebSocket-Accept: {accept}\r\nSec-WebSocket-Protocol: {SUBPROTOCOL}\r\n\r\n"
    )
    return Upgrade(answer.encode(), True)


def _refused(status: str) -> Upgrade:
    return Upgrade(f"HTTP/1.1 {status}\r\nConnection: close\r\nContent-Length: 0\r\n\r\n".encode(), False)


class FrameStream:
    """Takes a client's frames apart."""

    def __init__(self) -> None:
        self._bytes = bytearray()
        self.closed = False  # the client has sent its close frame

    def feed(self, content: bytes) -> tuple[bytes, bytes]:
        """What the frames carry, and the control frames to answer with; raises WebSocketError."""
        self._bytes += content
        carried, answers = bytearray(), bytearray()
        while not self.closed and (frame := self._next()):
            opcode, payload = frame
            if opcode in (_BINARY, _CONTINUATION):
                carried += payload
            elif opcode == _PING:
                answers += _frame(_PONG, payload)
            elif opcode == _CLOSE:
                answers += _frame(_CLOSE, payload[:2])
                self.closed = True
            elif opcode != _PONG:
                raise WebSocketError(f"a frame with opcode {opcode}: MQTT travels in binary frames")
        return bytes(carried), bytes(answers)

    def _next(self) -> tuple[int, bytes] | None:
        """Opcode and unmasked payload of the first frame, or None where it is not complete."""
        held = self._bytes
        if len(held) < 2:
            return None
        if held[0] & 0x70 or not held[1] & 0x80:
            raise WebSocketError("a frame with reserved bits or without a mask")
        length, at = held[1] & 0x7F, 2
        if length >= 126:
            size = 2 if length == 126 else 8
            length, at = int.from_bytes(held[2 : 2 + size]), 2 + size
        if length > MAX_FRAME_BYTES:
            raise WebSocketError(f"a frame of {length} bytes")
        if len(held) < at + 4 + length:
            return None
        mask = bytes(held[at : at + 4]) * (length // 4 + 1)
        payload = held[at + 4 : at + 4 + length]
        opcode = held[0] & 15
        del held[: at + 4 + length]
        return opcode, (int.from_bytes(payload) ^ int.from_bytes(mask[:length])).to_bytes(length)


def binary_frame(content: bytes) -> bytes:
    """`content` in one frame to the client."""
    return _frame(_BINARY, content)


def _frame(opcode: int, content: bytes) -> bytes:
    size = len(content)
    if size < 126:
        length = bytes((size,))
    elif size < 65_536:
        length = b"\x7e" + size.to_bytes(2)
    else:
        length = b"\x7f" + size.to_bytes(8)
    return bytes((0x80 | opcode,)) + length + content
