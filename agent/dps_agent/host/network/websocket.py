"""MQTT inside a WebSocket, the client's side: the upgrade and the frames. Source: RFC 6455.

An IoT hub takes it on port 443, for networks that let nothing else through.
"""

from __future__ import annotations

import base64
import hashlib
import os
import struct

from dps_agent.effects import NO_REPLY_CLOSED, NO_REPLY_NOT_FOUND, NO_REPLY_PROTOCOL, Failed
from dps_agent.host.network.heads import read_head, seconds_until

TYPE_CHECKING = False
if TYPE_CHECKING:
    import ssl

PORT = 443
_PATH = "/$iothub/websocket"
_SUBPROTOCOL = "mqtt"
_ACCEPT_SALT = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455, 1.3
_ANSWER_HEADERS = ("upgrade", "sec-websocket-accept", "sec-websocket-protocol")
_SWITCHING_PROTOCOLS, _NOT_FOUND = 101, 404
_CONTINUATION, _BINARY, _CLOSE, _PING, _PONG = 0, 2, 8, 9, 10  # opcodes, 5.2
_FINAL, _MASKED = 0x80, 0x80
_CONTROL_LIMIT = 125  # bytes of a control frame's payload, 5.5


def upgrade(tls: ssl.SSLSocket, host: str, deadline_s: float) -> bytes:
    """Turns a connection to `host` into a WebSocket; returns what the hub has sent behind its answer.

    Raises OSError, and Failed: `not_found` where the hub's front door knows no such hub.
    """
    key = base64.b64encode(os.urandom(16)).decode()
    lines = [
        f"GET {_PATH} HTTP/1.1",
        f"Host: {host}",
        "Upgrade: websocket",
        "Connection: Upgrade",
        f"Sec-WebSocket-Key: {key}",
        "Sec-WebSocket-Version: 13",
        f"Sec-WebSocket-Protocol: {_SUBPROTOCOL}",
    ]
    tls.settimeout(seconds_until(deadline_s))
    tls.sendall("\r\n".join([*lines, "", ""]).encode())
    status, answered, rest = read_head(tls, _ANSWER_HEADERS, deadline_s)
    if status != _SWITCHING_PROTOCOLS:
        reason = NO_REPLY_NOT_FOUND if status == _NOT_FOUND else NO_REPLY_PROTOCOL
        raise Failed(reason, f"the WebSocket was answered {status}")
    accept = base64.b64encode(hashlib.sha1(key.encode() + _ACCEPT_SALT, usedforsecurity=False).digest()).decode()
    if (
        answered.get("upgrade", "").lower() != "websocket"
        or answered.get("sec-websocket-accept") != accept
        or answered.get("sec-websocket-protocol") != _SUBPROTOCOL
    ):
        raise Failed(NO_REPLY_PROTOCOL, "the answer to the WebSocket's handshake is none")
    return rest


class Frames:
    """What goes between the two ends after the upgrade."""

    def __init__(self) -> None:
        self._head = bytearray()  # what has come of a frame's head, or of a control frame's payload
        self._left = 0  # bytes of a data frame's payload that are still to come
        self.ping: bytes | None = None  # what the last one said that is not answered yet; no other needs to be, 5.5.3

    def pong(self) -> bytes:
        """The answer to the ping that waits for one, b"" where none does."""
        ping, self.ping = self.ping, None
        return b"" if ping is None else _frame(_PONG, ping)

    def unpack(self, received: bytes) -> bytes:
        """The application's bytes in what was received, whatever frames they came in; Failed for no frames."""
        out = bytearray()
        at = 0
        while at < len(received):
            if self._left:
                piece = received[at : at + self._left]
                out += piece
                self._left -= len(piece)
                at += len(piece)
                continue
            self._head.append(received[at])
            at += 1
            self._take_head()
        return bytes(out)

    def _take_head(self) -> None:
        """Looks whether a head is whole."""
        head = self._head
        if len(head) < 2:
            return
        opcode, size = head[0] & 0x0F, head[1]
        if head[0] & 0x70 or opcode not in (_CONTINUATION, _BINARY, _CLOSE, _PING, _PONG) or size & _MASKED:
            raise Failed(NO_REPLY_PROTOCOL, "a WebSocket frame that no server sends")
        if opcode in (_CLOSE, _PING, _PONG):
            if size > _CONTROL_LIMIT:
                raise Failed(NO_REPLY_PROTOCOL, "a WebSocket control frame that is too long")
            if len(head) == 2 + size:
                self._control(opcode, bytes(head[2:]))
                head.clear()
            return
        extended = {126: 2, 127: 8}.get(size, 0)
        if len(head) == 2 + extended:
            self._left = int.from_bytes(head[2:]) if extended else size
            head.clear()

    def _control(self, opcode: int, payload: bytes) -> None:
        if opcode == _PING:
            self.ping = payload
        elif opcode == _CLOSE:
            raise Failed(NO_REPLY_CLOSED, "the hub closed the WebSocket")


def packed(content: bytes) -> bytes:
    """`content` as one binary frame."""
    return _frame(_BINARY, content)


def _frame(opcode: int, payload: bytes) -> bytes:
    """A final frame, masked as a client must; the mask protects proxies, not us."""
    size = len(payload)
    if size < 126:
        head = struct.pack(">BB", _FINAL | opcode, _MASKED | size)
    elif size < 65536:
        head = struct.pack(">BBH", _FINAL | opcode, _MASKED | 126, size)
    else:
        head = struct.pack(">BBQ", _FINAL | opcode, _MASKED | 127, size)
    mask = os.urandom(4)
    stream = (mask * (size // 4 + 1))[:size]
    masked = int.from_bytes(payload) ^ int.from_bytes(stream)
    return head + mask + masked.to_bytes(size)
