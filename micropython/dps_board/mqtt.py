"""MQTT 3.1.1 to an IoT hub on asyncio, with every wait and every size bounded.

One task calls it: what arrives is read, and what is late is noticed, while that task waits in `next_event`. Runs on
CPython too. Source: MQTT 3.1.1 (OASIS, 29 October 2014).
"""

import asyncio

from dps_agent.effects import NO_REPLY_CLOSED, NO_REPLY_PROTOCOL, NO_REPLY_TIMEOUT, NO_REPLY_TOO_LARGE, Failed, NoReply
from dps_agent.hub_effects import Acknowledged, Arrived, ConnAck, Gone, Granted, SendTelemetry
from dps_board.tls import POLL_S, Link, Trust, split_address
from dps_hal.platform import ms_since, ticks_ms

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from dps_agent.hub_effects import Event
    from dps_agent.sas import SasToken

CONNECT_LIMIT_MS = 60_000  # from the name's lookup to CONNACK; again to CONNACK where the peer was reached before
PAYLOAD_LIMIT = 16 * 1024  # bytes of a message; of a larger one the session is told without its payload
PACKET_LIMIT = 256 * 1024 + 65536 + 8  # bytes after the first five: the largest message of a hub, the longest topic
GRANTED_LIMIT = 2 + 8  # bytes of a SUBACK; nobody subscribes to so much at once
EVENTS_LIMIT = 4  # events of the hub that nobody has asked for yet; with so many the hub is not read any more
EVENTS_SIZE = 16 * 1024  # bytes of these events, topics included
POSTS_LIMIT = 32  # events of programs that nobody has asked for yet; answers, which the session bounds, come on top
IN_FLIGHT_LIMIT = 16 * 1024  # bytes of telemetry without acknowledgement, a single larger message aside
PIECES_LIMIT = 64  # to be sent; with so many nothing more is published, with half of them the hub is not read any more
ANSWERS_SIZE = 32 * 1024  # bytes of pieces to be sent, beside telemetry
PART_LIMIT_MS = 600  # for what is to be sent before a polite end, and the hub's own end
IDLE_POLL_S = 0.05
_BUSY_MS = 1000  # after the last byte the next one is looked for more often
_SEND_BYTES = 1024
_CONNACK, _PUBLISH, _PUBACK, _SUBACK, _PINGRESP = 2, 3, 4, 9, 13  # table 2.1
_MQTT_PORT = 8883  # every hub's
_CONNECT = b"\x10"
_CONNECT_AS = b"\x00\x04MQTT\x04"  # 3.1.1
_FLAGS = b"\xc0"  # user name and password
_FLAGS_CLEAN = b"\xc2"  # the same, and a clean session


class HubConnection:
    """One connection to one hub after the other, and the events of hub and programs.

    `trust` says whom to trust. `connect_to`, "host:port", is dialled instead of the hub;
    the name that is sent and that the certificate must carry stays the hub's. `while_waiting` is called at
    least once a second while something waits.
    """

    def __init__(
        self,
        trust: Trust,
        connect_to: str = "",
        while_waiting: "Callable[[], None] | None" = None,
    ) -> None:
        self._dial = split_address(connect_to, _MQTT_PORT) if connect_to else ("", _MQTT_PORT)
        self.link = Link(trust, while_waiting)
        self._while_waiting = while_waiting
        self._reached = ""  # the hub behind the link
        self._identity = ("", "")  # hub and device id
        self._connected = False  # the hub has accepted us, and nobody was told that it ended
        self._keep_alive_ms = 0
        self._received_ms = self._sent_ms = self._pinged_ms = 0
        self._to_send: list[bytes | bytearray] = []
        self._sent = 0  # bytes of the first packet that were sent
        self._in_flight: list[tuple[int, bytearray, bytes]] = []  # packet id, head and payload of QoS 1
        self._packet_id = 0
        self._connack: ConnAck | None = None
        self._packets: Generator[int, bytes | bytearray | None, None]
        self._wanted = 0  # bytes that `_packets` waits for
        self._at = 0  # how many of these bytes have come
        self._content: bytearray | None = None  # the place for them; None: too large for this device
        self._events: list[Event] = []
        self._posted: list[Event] = []
        self._aborted = False

    def is_reached(self, hub: str) -> bool:
        """Whether `reach` has nothing to do."""
        return self._reached == hub and not self._connected

    async def reach(self, hub: str) -> "NoReply | None":
        """Verifies the hub and stays in touch with it, for the `connect` that follows; None once that is done."""
        if self.is_reached(hub):
            return None
        await self.disconnect()
        self.link.begin(CONNECT_LIMIT_MS)
        try:
            await self.link.open(self._dial[0] or hub, self._dial[1], hub)
            while not self.link.write(_CONNECT):  # with the first byte of CONNECT comes the handshake
                await self.link.pause()
        except Failed as failed:
            self._end()
            return NoReply(f"{failed.reason}: {failed}", False)
        self._reached = hub
        return None

    async def connect(
        self, hub: str, device_id: str, user_name: str, token: "SasToken", keep_alive_s: int, clean_session: bool
    ) -> "ConnAck | NoReply":
        """Connects as `hub_effects.Connect` says, after any earlier connection has ended; within CONNECT_LIMIT_MS."""
        if self.is_reached(hub):
            self.link.begin(CONNECT_LIMIT_MS)
        else:
            failure = await self.reach(hub)
            if failure is not None:
                return failure
        if self._identity != (hub, device_id):
            self._identity = (hub, device_id)
            self._in_flight.clear()
            self._events.clear()
        self._keep_acknowledged()
        body = _CONNECT_AS + (_FLAGS_CLEAN if clean_session else _FLAGS) + keep_alive_s.to_bytes(2, "big")
        body += _text(device_id) + _text(user_name) + _text(token.header())
        self._to_send = [_head(_CONNECT[0], len(body))[1:], body]
        body = b""  # the token is in there
        self._packets = self._read_packets()
        self._want(next(self._packets))
        try:
            while self._connack is None:
                if not self._exchange():
                    await self.link.pause()
        except Failed as failed:
            self._end()
            return NoReply(f"{failed.reason}: {failed}", True)
        answer = self._connack
        if answer.return_code:
            self._end()
            return answer
        self._keep_alive_ms = keep_alive_s * 1000
        self._received_ms = self._sent_ms = self._pinged_ms = ticks_ms()
        self._connected = True
        return answer

    def subscribe(self, filters: "tuple[tuple[str, int], ...]") -> "int | None":
        """One SUBSCRIBE; its packet id, None without a connection."""
        if not self._connected:
            return None
        packet_id = self._free_packet_id()
        body = packet_id.to_bytes(2, "big")
        for topic, qos in filters:
            body += _text(topic) + bytes([qos])
        self._send(_head(0x82, len(body)), body)
        return packet_id

    def publish(self, topic: str, payload: bytes, qos: int) -> "int | None":
        """One PUBLISH with QoS 0 or 1; its packet id, 0 for QoS 0.

        None without a connection, while too much waits to be sent or acknowledged, and for a topic longer than MQTT has
        room for. A message with QoS 1 that was taken is kept until it is acknowledged or given up.
        """
        name = topic.encode()
        if not self._connected or len(name) > 0xFFFF or len(self._to_send) > PIECES_LIMIT:
            return None
        if qos and self._in_flight:
            size = len(name) + len(payload)
            for _, head, waiting in self._in_flight:
                size += len(head) + len(waiting)
            if size > IN_FLIGHT_LIMIT:
                return None
        if not qos and self._to_send and self._answers_size() + len(payload) > ANSWERS_SIZE:
            return None
        packet_id = self._free_packet_id() if qos else 0
        head = _head(0x30 | qos << 1, 2 + len(name) + (2 if qos else 0) + len(payload))
        head += len(name).to_bytes(2, "big") + name
        if qos:
            head += packet_id.to_bytes(2, "big")
            self._in_flight.append((packet_id, head, payload))
        self._send(head, payload)
        return packet_id

    def send_again(self, packet_id: int) -> None:
        """Sends again, with DUP, what was published with QoS 1 on an earlier connection."""
        for waiting_id, head, payload in self._in_flight:
            if waiting_id == packet_id and self._connected:
                head[0] |= 0x08  # DUP
                self._send(head, payload)

    def give_up(self, packet_id: int) -> None:
        """Forgets what was published with QoS 1 on an earlier connection."""
        self._in_flight = [message for message in self._in_flight if message[0] != packet_id]

    def acknowledge(self, packet_id: int) -> None:
        """The PUBACK for an Arrived message of this connection."""
        if self._connected:
            self._send(b"\x40\x02" + packet_id.to_bytes(2, "big"), b"")

    async def next_event(self, limit_ms: int) -> "Event | None":
        """The next event of hub or programs; None after `limit_ms`, or earlier after `abort`."""
        self._aborted = False
        started_ms = ticks_ms()
        while True:
            moved = self._connected and self._serve()
            if self._events:
                return self._events.pop(0)
            if self._posted:
                return self._posted.pop(0)
            left_ms = limit_ms - ms_since(started_ms)
            if left_ms <= 0 or self._aborted:
                return None
            if self._while_waiting is not None:
                self._while_waiting()
            busy = self._connected and min(ms_since(self._received_ms), ms_since(self._sent_ms)) < _BUSY_MS
            await asyncio.sleep(0 if moved else min(left_ms / 1000, POLL_S if busy else IDLE_POLL_S))

    def post(self, event: "Event") -> bool:
        """Queues an event of a program; False, and it is dropped, for telemetry where too many wait already."""
        if len(self._posted) >= POSTS_LIMIT and isinstance(event, SendTelemetry):
            return False
        self._posted.append(event)
        return True

    def take_back(self, event: "Event") -> bool:
        """Drops a posted event, this one and none that is equal, and returns true, if nobody has asked for it yet."""
        for place in range(len(self._posted)):
            if self._posted[place] is event:
                del self._posted[place]
                return True
        return False

    def abort(self) -> None:
        """Makes a `connect` or `next_event` under way end soon; for another task."""
        self._aborted = True
        self.link.abort()

    async def disconnect(self) -> None:
        """Ends the connection, politely where that takes less than a second; nobody is told."""
        if self._connected:
            self._connected = False
            self._keep_acknowledged()  # this makes room: what is left unread would break the connection
            self._send(b"\xe0\x00", b"")
            self.link.begin(PART_LIMIT_MS)
            try:
                while True:
                    self._exchange()
                    self._keep_acknowledged()
                    await self.link.pause()
            except Failed:
                pass  # the hub has gone, or had its time
        self._end()

    # Connections.

    def _end(self) -> None:
        self._connected = False
        self._reached = ""
        self._connack = None
        self._to_send.clear()
        self._sent = 0
        self.link.close()

    def _keep_acknowledged(self) -> None:
        self._events = [event for event in self._events if isinstance(event, Acknowledged)]

    def _free_packet_id(self) -> int:
        """A packet id that no message in flight has."""
        used = [packet_id for packet_id, _, _ in self._in_flight]
        while True:
            self._packet_id = self._packet_id % 0xFFFF + 1
            if self._packet_id not in used:
                return self._packet_id

    def _serve(self) -> bool:
        """Reads and writes what can be, pings, and notices the end; whether anything moved."""
        try:
            moved = self._exchange()
            silent_ms = ms_since(self._received_ms)
            if 2 * silent_ms >= 3 * self._keep_alive_ms:  # 3.1.2.10, seen from the other side
                raise Failed(NO_REPLY_TIMEOUT, f"nothing came from the hub for {silent_ms // 1000} s")
            # Both sides are to hear of the other within a keep-alive; balancers on the way want it a little earlier.
            quiet_ms = min(max(silent_ms, ms_since(self._sent_ms)), ms_since(self._pinged_ms))
            if 4 * quiet_ms >= 3 * self._keep_alive_ms:
                self._pinged_ms = ticks_ms()
                self._send(b"\xc0\x00", b"")
            return moved
        except Failed as failed:
            self._end()
            self._events.append(Gone(f"{failed.reason}: {failed}"))
            return True

    def _send(self, head: "bytes | bytearray", payload: bytes) -> None:
        self._to_send.append(head)
        if payload:
            self._to_send.append(payload)

    def _answers_size(self) -> int:
        """Bytes that wait to be sent beside telemetry."""
        size = 0
        for piece in self._to_send:
            size += len(piece)
        for _, head, payload in self._in_flight:
            for piece in self._to_send:
                if piece is head or piece is payload:
                    size -= len(piece)
        return size

    def _has_room(self) -> bool:
        """Whether more may come from the hub: what it sent was looked at, and it takes what it is answered."""
        size = 0
        for event in self._events:
            if isinstance(event, Arrived):
                size += len(event.topic) + len(event.payload or b"")
        if len(self._events) >= EVENTS_LIMIT or size >= EVENTS_SIZE or len(self._to_send) > PIECES_LIMIT // 2:
            return False
        return not self._to_send or self._answers_size() <= ANSWERS_SIZE // 2

    def _exchange(self) -> bool:
        """Writes what can be and reads at most one piece; whether anything moved."""
        moved = False
        while self._to_send:
            piece = self._to_send[0]
            count = self.link.write(memoryview(piece)[self._sent : self._sent + _SEND_BYTES])
            if not count:
                break
            moved = True
            self._sent_ms = ticks_ms()
            self._sent += count
            if self._sent == len(piece):
                self._to_send.pop(0)
                self._sent = 0
        if self._has_room():
            received = self.link.read(min(self._wanted - self._at, _SEND_BYTES))
            if received is not None:
                if not received:
                    raise Failed(NO_REPLY_CLOSED, "the hub ended the connection")
                self._received_ms = ticks_ms()
                self._take(received)
                return True
        return moved

    # Packets.

    def _want(self, count: int) -> None:
        """Makes room for the next `count` bytes."""
        self._wanted = count
        self._at = 0
        self._content = None
        if count <= PAYLOAD_LIMIT:
            try:
                self._content = bytearray(count)
            except MemoryError:
                pass  # they are passed over, and the session says so to the hub

    def _take(self, received: bytes) -> None:
        if self._content is not None:
            self._content[self._at : self._at + len(received)] = received
        self._at += len(received)
        while self._at == self._wanted:
            content, self._content = self._content, None
            self._want(self._packets.send(content))

    def _read_packets(self) -> "Generator[int, bytes | bytearray | None, None]":
        """Follows the packets: yields how many bytes it wants next, and is sent them, None for too many.

        Failed for a packet that no hub sends to a client that publishes and subscribes with QoS 0 and 1.
        """
        while True:
            first = (yield 1)[0]  # type: ignore[index]
            kind = first >> 4
            size = shift = 0
            while True:
                digit = (yield 1)[0]  # type: ignore[index]
                size |= (digit & 0x7F) << shift
                shift += 7
                if digit < 0x80:
                    break
                if shift > 21:
                    raise _malformed("length")
            if size > PACKET_LIMIT:
                raise Failed(NO_REPLY_TOO_LARGE, f"a packet of {size} bytes, more than {PACKET_LIMIT}")
            if (kind == _CONNACK) != (self._connack is None):
                raise _malformed("order")
            if kind == _PUBLISH and not first & 0x04:
                yield from self._read_publish(first & 0x02, size)
            elif (first, size) in _FIXED or (first == _SUBACK << 4 and 3 <= size <= GRANTED_LIMIT):
                content = (yield size) if size else b""
                if content is None:
                    raise Failed(NO_REPLY_TOO_LARGE, f"a packet of {size} bytes, more than this device takes")
                self._take_answer(kind, content)
            else:
                raise _malformed("type")

    def _read_publish(self, qos: int, size: int) -> "Generator[int, bytes | bytearray | None, None]":
        if size < 4:
            raise _malformed("topic")
        topic_size = int.from_bytes((yield 2), "big")  # type: ignore[arg-type]
        size -= topic_size + (4 if qos else 2)
        if not topic_size or size < 0:
            raise _malformed("topic")
        name = yield topic_size
        if name is None:
            raise Failed(NO_REPLY_TOO_LARGE, f"a topic of {topic_size} bytes, more than this device takes")
        try:
            topic = bytes(name).decode()
        except UnicodeError:
            raise _malformed("topic")
        packet_id = int.from_bytes((yield 2), "big") if qos else 0  # type: ignore[arg-type]
        payload = (yield size) if size else b""
        try:
            payload = None if payload is None else bytes(payload)
        except MemoryError:
            payload = None
        self._events.append(Arrived(topic, payload, packet_id))

    def _take_answer(self, kind: int, content: "bytes | bytearray") -> None:
        packet_id = int.from_bytes(content[:2], "big")
        if kind == _CONNACK:
            self._connack = ConnAck(content[1], bool(content[0] & 1))
        elif kind == _SUBACK:
            self._events.append(Granted(packet_id, tuple(content[2:])))
        elif kind == _PUBACK:
            for place, message in enumerate(self._in_flight):
                if message[0] == packet_id:
                    del self._in_flight[place]
                    self._events.append(Acknowledged(packet_id))
                    break


_FIXED = ((_CONNACK << 4, 2), (_PUBACK << 4, 2), (_PINGRESP << 4, 0))  # first bytes and sizes of packets


def _malformed(what: str) -> Failed:
    return Failed(NO_REPLY_PROTOCOL, f"the hub sent a malformed packet ({what})")


def _head(first: int, size: int) -> bytearray:
    """A packet's first bytes: 2.2."""
    head = bytearray([first])
    while size > 0x7F:
        head.append(size & 0x7F | 0x80)
        size >>= 7
    head.append(size)
    return head


def _text(text: str) -> bytes:
    encoded = text.encode()
    return len(encoded).to_bytes(2, "big") + encoded
