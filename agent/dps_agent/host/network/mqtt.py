"""MQTT 3.1.1 to an IoT hub on paho-mqtt 2, with every wait and every size bounded.

paho makes and reads the packets; what is in flight is kept here. It gets its bytes from `_Wire` and neither dials nor
waits nor reconnects: its own reconnect would send an expired token again, its dialling can be neither timed nor ended.
"""

from __future__ import annotations

import contextlib
import math
import select
import socket
import ssl
import struct
import time
from collections import deque

from paho.mqtt import client as paho
from paho.mqtt.enums import CallbackAPIVersion

from dps_agent.effects import (
    NO_REPLY_CLOSED,
    NO_REPLY_CONNECT,
    NO_REPLY_PROTOCOL,
    NO_REPLY_TIMEOUT,
    NO_REPLY_TOO_LARGE,
    Failed,
    NoReply,
)
from dps_agent.host.loop import Loop
from dps_agent.host.network import websocket
from dps_agent.host.network.dial import MQTT_PORT, Dialler, broken, say_goodbye
from dps_agent.host.network.https import peer_of
from dps_agent.host.network.proxy import NONE, ProxyRule
from dps_agent.hub_effects import Acknowledged, Arrived, ConnAck, Gone, Granted
from dps_agent.session import TOPIC_LIMIT
from dps_hal.errors import AskOperator

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from paho.mqtt.reasoncodes import ReasonCode

    from dps_agent.host.network.shown import Shown
    from dps_agent.host.network.trust import Trust
    from dps_agent.hub_effects import Connect, Event

AUTO = "auto"
MQTT = "mqtt"
WEBSOCKET = "websocket"

CONNECT_LIMIT_S = 60.0  # from the name's lookup to CONNACK
REACH_LIMIT_S = 20.0  # for TCP, where there is another port to try
PACKET_LIMIT = 256 * 1024 + 65536 + 8  # bytes after the first five: the largest message of a hub, the longest topic
GRANTED_LIMIT = 2 + 8  # bytes of a SUBACK: paho makes kilobytes of each; nobody subscribes to so much at once
EVENTS_LIMIT = 64  # events of the hub that nobody has asked for yet; with so many the hub is not read any more
EVENTS_SIZE = 1024 * 1024  # bytes of these events, topics included
ANSWERS_LIMIT = 128  # packets beside telemetry that the hub has not taken; at half of them it is not read any more
ANSWERS_SIZE = 1024 * 1024  # bytes of these packets
POSTS_LIMIT = 128  # events of programs that nobody has asked for yet; whoever posts them bounds their bytes
SILENCE = 1.5  # times the keep-alive without a byte from the hub: MQTT 3.1.1, 3.1.2.10, seen from the other side
PING_AFTER = 0.75  # times the keep-alive after which the hub is pinged
FLUSH_LIMIT_S = 0.4  # for what is to be sent before a polite end
REACHED_LIFE_S = 30.0  # time for a TPM to sign a token; a hub waits about as long for a CONNECT
LINGER_S = 0.2  # for the hub to end the connection after our DISCONNECT
_CONNACK, _PUBLISH, _PUBACK, _SUBACK, _PINGRESP = 2, 3, 4, 9, 13  # packet types, MQTT 3.1.1, table 2.1
_BATCH_SIZE = 16 * 1024 - 512  # bytes that wait to go out with more; the largest TLS record, and a small packet less
_PUBACK_HEAD = bytes((_PUBACK << 4, 2))
_RECEIVE_SIZE = 16 * 1024  # bytes; the largest TLS record
_TELEMETRY = (0x30, 1)  # command and QoS, as paho notes them of a packet to send


class HubConnection:
    """One connection to one hub after the other, and the events of hub and programs.

    `connect_to`, "host:port", is dialled instead of the hub's `port`; the name that is sent and that the certificate
    must carry stays the hub's. `ca_file` holds the only roots to trust, in PEM; empty: the system's. `transport` is
    "mqtt", "websocket" (port 443), or "auto": mqtt, and WebSocket where the hub's port is not reached; what worked is
    tried first the next time. `proxy` is the setting `network.proxy`. `certificate`: what the device shows the hub in
    the handshake, and at no other time; see `Trust`. `issued`: with which key it shows the
    chain that a Connect has. AskOperator `config.invalid` for what makes no sense.

    One thread at a time calls the methods; any thread, and any signal handler, may `post`, `take_back` and `abort`.
    """

    def __init__(
        self,
        *,
        port: int = MQTT_PORT,
        connect_to: str = "",
        ca_file: str = "",
        transport: str = AUTO,
        proxy: str = NONE,
        websocket_port: int = websocket.PORT,
        certificate: Shown | None = None,
        issued: Shown | None = None,
    ) -> None:
        self._issued = issued
        self._ports = {MQTT: port, WEBSOCKET: websocket_port}
        self._connect_to = peer_of(connect_to, "hub.connect_to") if connect_to else None
        transports = [MQTT, WEBSOCKET] if transport == AUTO else [transport]
        self._transports = transports[:1] if connect_to else transports  # in the order in which they are tried
        self._dialler = Dialler(ProxyRule(proxy), ca_file, "hub.ca_file", certificate)
        self.trust = self._dialler.trust
        self._identity = ("", "")  # hub and device id
        self._client: _Client | None = None  # paho's, for this identity
        self._in_flight: dict[int, tuple[bytes, bytes]] = {}  # packet id -> topic and payload, QoS 1
        self._wire: _Wire | None = None
        self._heard_at_s: float | None = None  # as an earlier connection left it
        self._reached: tuple[str, _Wire, float] | None = None  # by `is_verified`: the hub, the wire, since when
        self._connected = False  # the hub has accepted us, and nobody was told that it ended
        self._keep_alive_s = 0.0
        self._pinged_at_s = 0.0
        self._events: deque[Event] = deque()
        self._posted: deque[_Posted] = deque()  # without a lock, which a signal handler could not wait for
        self._next = 0  # of the events posted, those that come before the hub is looked at again
        self._loop = Loop()  # in which it waits by itself
        self._aborted = False

    def connect(self, effect: Connect) -> ConnAck | NoReply:
        """Connects as one device, after any earlier connection has ended; within CONNECT_LIMIT_S."""
        deadline_s = time.monotonic() + CONNECT_LIMIT_S
        self._dialler.begin()
        self._aborted = False
        if isinstance(effect.token, bytes):
            assert self._issued is not None
            if self.trust.show(effect.token, self._issued):
                self._forget_reached()  # on it the hub was shown no certificate, or another
        wire = self._take_reached(effect.hub)
        if wire is not None:
            answer = self._introduce(effect, wire, deadline_s)
            # A hub may hang up on who keeps silent while our CONNECT is on its way.
            if self._aborted or not (isinstance(answer, NoReply) and answer.reason.startswith(NO_REPLY_CLOSED)):
                return answer
        return self._introduce(effect, None, deadline_s)

    def is_verified(self, hub: str) -> bool:
        """Whether the hub is reached and its certificate is good by the clock of now; within CONNECT_LIMIT_S.

        A connection that stands is left alone. What was reached serves the next `connect`, if that comes within
        REACHED_LIFE_S.
        """
        self._dialler.begin()
        self._forget_reached()
        try:
            # A session resumed would say nothing of the clock.
            wire = self._reach(hub, time.monotonic() + CONNECT_LIMIT_S, afresh=True)
        except Failed:
            return False
        self._reached = (hub, wire, time.monotonic())
        return True

    @property
    def heard_at_s(self) -> float | None:
        """When a hub was heard last, by the monotonic clock; None for never."""
        wire = self._wire  # once: a signal handler may ask, and another thread, while the connection ends
        return wire.received_at_s if wire is not None else self._heard_at_s

    def subscribe(self, filters: tuple[tuple[str, int], ...]) -> int | None:
        """One SUBSCRIBE; its packet id, None without a connection."""
        if not self._connected or self._client is None:
            return None
        result, packet_id = self._client.subscribe(list(filters))
        self._look_for_the_end()
        return packet_id if result == paho.MQTT_ERR_SUCCESS else None

    def publish(self, topic: str, payload: bytes, qos: int) -> int | None:
        """One PUBLISH with QoS 0 or 1; its packet id, 0 for QoS 0.

        None without a connection, for a topic longer than MQTT has room for, and with QoS 0 while too much waits to be
        taken by the hub and where the connection is found to have ended. A message with QoS 1 that was taken is kept
        until it is acknowledged or given up.
        """
        client, name = self._client, topic.encode()
        if not self._connected or client is None or len(name) > TOPIC_LIMIT:
            return None
        packet_id = 0
        if qos:
            packet_id = client.free_packet_id()
            self._in_flight[packet_id] = (name, payload)
            client.send_telemetry(packet_id, name, payload, again=False)
        elif client.is_behind(ANSWERS_LIMIT, ANSWERS_SIZE):
            return None
        else:
            if self._wire is not None:
                self._wire.batches = False  # who asks is told that it is written, and nobody sends it again
            client.publish(topic, payload, 0)
        self._look_for_the_end()
        return packet_id if qos or self._connected else None

    def send_again(self, packet_id: int) -> None:
        """Sends again, with DUP, what was published with QoS 1 on an earlier connection."""
        message = self._in_flight.get(packet_id)
        if self._connected and self._client is not None and message is not None:
            self._client.send_telemetry(packet_id, *message, again=True)
            self._look_for_the_end()

    def give_up(self, packet_id: int) -> None:
        """Forgets what was published with QoS 1 on an earlier connection."""
        self._in_flight.pop(packet_id, None)

    def acknowledge(self, packet_id: int) -> None:
        """The PUBACK for an Arrived message of this connection."""
        if self._connected and self._client is not None:
            self._client.ack(packet_id, 1)
            self._look_for_the_end()

    def next_event(self, until_s: float, wait: Callable[[float, int, int], int] | None = None) -> Event | None:
        """The next event of hub or programs; None at `until_s` of the monotonic clock, or earlier after `abort`.

        `wait` is what waits, see `Loop.wait`; None: this connection itself. What had come with the last look at the hub
        is given out before the next one, so that a batch costs one look, and programs that post without end do not
        starve the hub.
        """
        self._aborted = False
        look_until_s = 0.0 if self._posted else until_s
        while True:
            if not self._events and not self._next:
                self._serve(look_until_s, wait or self._loop.wait)
                self._next = len(self._posted)
            if self._events:
                return self._events.popleft()
            if self._next:
                self._next -= 1
                if self._wire is not None:
                    self._wire.batches = self._next > 0
                with contextlib.suppress(IndexError):  # it was taken back
                    return self._posted.popleft().event
            elif self._aborted or time.monotonic() >= until_s:
                return None
            else:
                look_until_s = until_s

    def post(self, event: Event) -> bool:
        """Queues an event of a program; False, and it is dropped, where too many wait already."""
        if len(self._posted) >= POSTS_LIMIT:
            return False
        self._posted.append(_Posted(event))
        self._loop.ring()
        return True

    def take_back(self, event: Event) -> bool:
        """Drops a posted event, this one and none that is equal, and returns true, if nobody has asked for it yet."""
        while (found := next((posted for posted in self._posted.copy() if posted.event is event), None)) is not None:
            with contextlib.suppress(ValueError, IndexError):  # IndexError: another thread took one meanwhile
                self._posted.remove(found)
                return True
        return False

    def abort(self) -> None:
        """Makes a blocked `connect` or `next_event` return at once; nothing where none is blocked."""
        self._aborted = True
        self._dialler.abort()
        self._loop.ring()

    def disconnect(self) -> None:
        """Ends the connection, politely where that takes less than a second."""
        wire, client = self._wire, self._client
        if self._connected and wire is not None and client is not None and not wire.closed:
            wire.polite = True
            client.disconnect()  # behind what was not sent yet; paho closes the wire once it is sent
            until_s = time.monotonic() + FLUSH_LIMIT_S
            while not wire.closed and (left_s := until_s - time.monotonic()) > 0:
                _wait_until_ready(wire.fileno(), select.POLLOUT, left_s)
                client.loop_write()
        self._end()

    def close(self) -> None:
        """`disconnect`, and gives back what is open; the next call opens it again."""
        self.disconnect()
        self._loop.close()

    # Connecting.

    def _take_reached(self, hub: str) -> _Wire | None:
        """The wire to `hub` on which nothing was said yet, if there is one that the hub still waits on."""
        if self._reached is not None:
            name, wire, at_s = self._reached
            if name == hub and time.monotonic() < at_s + REACHED_LIFE_S:
                self._reached = None
                return wire
        self._forget_reached()
        return None

    def _forget_reached(self) -> None:
        if self._reached is not None:
            self._reached[1].close()
            self._reached = None

    def _introduce(self, effect: Connect, reached: _Wire | None, deadline_s: float) -> ConnAck | NoReply:
        """CONNECT and its answer, on the wire that was `reached` or on another."""
        self.disconnect()
        client = self._client_of(effect)
        sent = False
        try:
            wire = self._wire = reached or self._reach(effect.hub, deadline_s)
            sent = True
            client.wire = wire
            token = None if isinstance(effect.token, bytes) else effect.token
            client.username_pw_set(effect.user_name, token.header() if token else None)
            try:
                client.connect(effect.hub, keepalive=effect.keep_alive_s)  # the packet is made in here
            finally:
                client.username_pw_set(None)
            self._keep_alive_s = float(effect.keep_alive_s)
            while wire.connack is None and not wire.closed:
                if self._aborted:
                    raise Failed(NO_REPLY_CLOSED, "given up")
                if time.monotonic() >= deadline_s:
                    raise Failed(NO_REPLY_TIMEOUT, "the hub did not answer to CONNECT in time")
                self._serve(deadline_s, self._loop.wait)
        except Failed as failed:
            self._end()
            return NoReply(f"{failed.reason}: {failed}", sent)
        if wire.connack is None:
            self._end()
            return NoReply(wire.reason(), sent)
        wire.leave_session(self.trust)
        if wire.connack.return_code:
            self._end()
            return wire.connack
        self._pinged_at_s = time.monotonic()
        self._connected = True
        self._look_for_the_end()
        return wire.connack

    def _client_of(self, effect: Connect) -> _Client:
        """The paho client of this identity; another identity has nothing in flight, and no events."""
        identity = (effect.hub, effect.device_id)
        if self._client is None or identity != self._identity:
            self._identity = identity
            self._in_flight.clear()
            self._events.clear()
            client = self._client = _Client(effect.device_id, self._in_flight)
            client.on_message = self._on_message
            client.on_subscribe = self._on_subscribe
        self._events = deque(event for event in self._events if isinstance(event, Acknowledged))
        self._client.clean(effect.clean_session)
        return self._client

    def _reach(self, hub: str, deadline_s: float, afresh: bool = False) -> _Wire:
        """A wire to the hub on the first transport that reaches it."""
        for transport in self._transports[:-1]:
            try:
                return self._open(transport, hub, deadline_s, time.monotonic() + REACH_LIMIT_S, afresh)
            except Failed as failed:
                if failed.reason != NO_REPLY_CONNECT:
                    raise
        last = self._transports[-1]
        wire = self._open(last, hub, deadline_s, deadline_s, afresh)
        self._transports.remove(last)
        self._transports.insert(0, last)  # this one works here, and is tried first from now on
        return wire

    def _open(self, transport: str, hub: str, deadline_s: float, reach_by_s: float, afresh: bool) -> _Wire:
        host, port = self._connect_to or (hub, None)
        try:
            tls = self._dialler.dial(hub, host, port or self._ports[transport], deadline_s, reach_by_s, afresh)
        except AskOperator as error:
            raise Failed(error.code, error.message) from None
        try:
            if transport == MQTT:
                wire = _Wire(tls, None, b"")
            else:
                wire = _Wire(tls, websocket.Frames(), websocket.upgrade(tls, hub, deadline_s))
        except (OSError, Failed) as error:
            failed = self._dialler.explain(error, "in the WebSocket's handshake")
            self._dialler.close()
            raise failed from None
        self._dialler.let_go()
        return wire

    def _end(self) -> None:
        """Ends the connection; nobody is told."""
        self._connected = False
        if self._wire is not None:
            self._heard_at_s = self.heard_at_s
            self._take_acknowledgements(self._wire)
            self._wire.close()
            self._wire = None
        self._forget_reached()

    # The loop.

    def _serve(self, until_s: float, wait: Callable[[float, int, int], int]) -> None:
        """Reads and writes what can be, pings and notices silence; waits for something to happen at most once."""
        wire = self._wire if self._wire is not None and not self._wire.closed else None
        reads = self._has_room()
        fileno, interest = -1, 0
        if wire is not None:
            wire.batches = False
            until_s = 0.0 if reads and wire.has_unread() else min(until_s, self._due_s(wire))
            fileno, interest = wire.fileno(), self._interest(wire, reads)
        if self._aborted:  # perhaps before it waits; what was posted then is for `next_event` alone
            until_s = 0.0
        ready = wait(until_s, fileno, interest)
        if wire is not None:
            self._exchange(wire, reads, ready)
        self._look_for_the_end()

    def _has_room(self) -> bool:
        """Whether more may come from the hub: what it sent was looked at, and it takes what it is answered."""
        if self._events:
            arrived = [event for event in self._events if isinstance(event, Arrived)]
            size = sum(len(event.topic) + len(event.payload or b"") for event in arrived)
            if len(self._events) >= EVENTS_LIMIT or size >= EVENTS_SIZE:
                return False
        return self._client is None or not self._client.is_behind(ANSWERS_LIMIT // 2, ANSWERS_SIZE // 2)

    def _interest(self, wire: _Wire, reads: bool) -> int:
        assert self._client is not None
        writes = self._client.want_write() or wire.wants_write()
        return (select.POLLIN if reads else 0) | (select.POLLOUT if writes else 0)

    def _exchange(self, wire: _Wire, reads: bool, ready: int) -> None:
        client = self._client
        assert client is not None
        try:
            if reads and (ready or wire.has_unread()) and wire.fill() and client.loop_read() == paho.MQTT_ERR_PROTOCOL:
                wire.fail(Failed(NO_REPLY_PROTOCOL, "the hub sent a malformed packet"))
            if not wire.closed and ready & select.POLLOUT:
                wire.flush()
                client.loop_write()
        except Failed as failed:
            wire.fail(failed)
            wire.close()
        except (ValueError, struct.error, LookupError, TypeError) as error:  # what paho makes of malformed packets
            wire.fail(Failed(NO_REPLY_PROTOCOL, f"the hub sent a malformed packet ({type(error).__name__})"))
            wire.close()
        except OSError as error:
            wire.fail(self._dialler.explain(error, "between two packets"))
            wire.close()
        self._take_acknowledgements(wire)
        if not wire.closed and self._connected:
            self._keep_alive(wire, client)

    def _due_s(self, wire: _Wire) -> float:
        """When there is something to do even if nothing happens."""
        if not self._connected:
            return math.inf
        return min(self._ping_due_s(wire), wire.received_at_s + SILENCE * self._keep_alive_s)

    def _ping_due_s(self, wire: _Wire) -> float:
        """Both sides are to hear of the other within a keep-alive; balancers on the way want it a little earlier."""
        heard_s = min(wire.received_at_s, wire.sent_at_s)
        return max(heard_s, self._pinged_at_s) + PING_AFTER * self._keep_alive_s

    def _keep_alive(self, wire: _Wire, client: _Client) -> None:
        now_s = time.monotonic()
        if now_s >= wire.received_at_s + SILENCE * self._keep_alive_s:
            silent_s = now_s - wire.received_at_s
            wire.fail(Failed(NO_REPLY_TIMEOUT, f"nothing came from the hub for {silent_s:.0f} s"))
            wire.close()
        elif now_s >= self._ping_due_s(wire):
            self._pinged_at_s = now_s
            client.ping()

    def _look_for_the_end(self) -> None:
        """Tells of a connection that has ended."""
        if self._connected and self._wire is not None and self._wire.closed:
            reason = self._wire.reason()
            self._end()
            self._events.append(Gone(reason))

    def _take_acknowledgements(self, wire: _Wire) -> None:
        while wire.acknowledged:
            packet_id = wire.acknowledged.pop(0)
            if packet_id in self._in_flight:
                del self._in_flight[packet_id]
                self._events.append(Acknowledged(packet_id))

    def _on_message(self, _client: paho.Client, _none: object, message: paho.MQTTMessage) -> None:
        self._events.append(Arrived(message.topic, bytes(message.payload), message.mid if message.qos else 0))

    def _on_subscribe(
        self, _client: paho.Client, _none: object, packet_id: int, granted: list[ReasonCode], _properties: object
    ) -> None:
        self._events.append(Granted(packet_id, tuple(code.value for code in granted)))


class _Posted:
    """What holds an event that was posted: unlike the event it is equal to nothing else, so it can be found again."""

    __slots__ = ("event",)

    def __init__(self, event: Event) -> None:
        self.event = event


class _Client(paho.Client):
    """paho on a wire that it did not dial; all that is relied on beyond paho's documentation is in here."""

    def __init__(self, device_id: str, in_flight: dict[int, tuple[bytes, bytes]]) -> None:
        super().__init__(
            CallbackAPIVersion.VERSION2,
            client_id=device_id,
            clean_session=False,
            protocol=paho.MQTTv311,
            reconnect_on_failure=False,
            manual_ack=True,
        )
        self.wire: _Wire | None = None
        self._in_flight = in_flight  # telemetry under way, whose packet ids are not to be used

    def _create_socket(self) -> Any:
        assert self.wire is not None
        return self.wire

    def _mid_generate(self) -> int:
        while (packet_id := super()._mid_generate()) in self._in_flight:
            pass
        return packet_id

    def clean(self, clean_session: bool) -> None:
        """Whether the next connection is to begin without what the hub knows of the one before."""
        self._clean_session = clean_session

    def free_packet_id(self) -> int:
        """A packet id that no message in flight has."""
        return self._mid_generate()

    def send_telemetry(self, packet_id: int, topic: bytes, payload: bytes, *, again: bool) -> None:
        """One PUBLISH with QoS 1 that paho itself does not keep; MQTT 3.1.1, 3.3."""
        packet = bytearray((0x3A if again else 0x32,))
        self._pack_remaining_length(packet, 4 + len(topic) + len(payload))
        packet += b"%b%b%b%b" % (len(topic).to_bytes(2), topic, packet_id.to_bytes(2), payload)
        if self._out_packet or self.wire is None or not self.wire.takes(packet):
            self._packet_queue(_TELEMETRY[0], packet, packet_id, _TELEMETRY[1])

    def is_behind(self, count: int, size: int) -> bool:
        """Whether more packets beside telemetry, or bytes of them, wait for the hub to take them."""
        if not self._out_packet:
            return False
        waiting = [packet for packet in self._out_packet if (packet["command"], packet["qos"]) != _TELEMETRY]
        return len(waiting) > count or sum(packet["to_process"] for packet in waiting) > size

    def ping(self) -> None:
        """One PINGREQ."""
        self._send_pingreq()


class _Wire:
    """A TLS connection, or a WebSocket in one, as the socket that paho reads and writes.

    It never waits but in a polite `close`. It looks at each packet's head on the way: so it knows the return code of
    CONNACK, which paho does not tell for all of them, the PUBACKs, which paho does not tell from sent QoS 0 messages,
    and that no packet is larger than it may be, before there is memory for it.
    """

    def __init__(self, tls: ssl.SSLSocket, frames: websocket.Frames | None, received: bytes) -> None:
        self.connack: ConnAck | None = None
        self.acknowledged: list[int] = []  # packet ids, in the order of their PUBACKs
        self.closed = False
        self.polite = False  # what was sent is to arrive before the end
        self.batches = False  # more is to be sent at once: small packets go out together
        self.received_at_s = self.sent_at_s = time.monotonic()
        self._tls = tls
        self._frames = frames
        self._failure: Failed | None = None
        self._received = bytearray(frames.unpack(received) if frames is not None else received)
        self._unsent = bytearray()
        self._has_more = False  # TLS has read more than was taken
        self._ended = False  # nothing more will come
        self._wants_write = False
        self._head = bytearray()  # the first bytes of the packet that is being read
        self._left = 0  # bytes of that packet which are still to be read, once its head is whole
        self._body: bytearray | None = None  # the body of a packet that is looked into

    def reason(self) -> str:
        """Why it ended, as in NoReply."""
        failed = self._failure or Failed(NO_REPLY_CLOSED, "the hub ended the connection")
        return f"{failed.reason}: {failed}"

    def fail(self, failed: Failed) -> None:
        """Notes why it is about to end; the first reason counts."""
        self._failure = self._failure or failed

    def has_unread(self) -> bool:
        """Whether there is something to read that `fileno` does not show."""
        return bool(self._received) or self._has_more

    def wants_write(self) -> bool:
        """Whether there is something to write that paho does not know of."""
        owes_pong = self._frames is not None and self._frames.ping is not None
        return bool(self._unsent) or owes_pong or self._wants_write

    def leave_session(self, trust: Trust) -> None:
        """Lets the next connection resume this one, whose hub has spoken."""
        trust.keep(self._tls)

    def flush(self) -> None:
        """Sends what can be sent now."""
        self._wants_write = False
        while self.wants_write():
            if not self._unsent and self._frames is not None:
                self._unsent += self._frames.pong()
            try:
                sent = self._tls.send(self._unsent)
            except (ssl.SSLWantWriteError, ssl.SSLWantReadError):
                return
            del self._unsent[:sent]
            self.sent_at_s = time.monotonic()

    # What paho calls.

    def recv(self, size: int) -> bytes:
        try:
            if not self._received:
                if self._ended:
                    return b""
                raise BlockingIOError
            # A head is read byte by byte, and no piece is of two packets.
            piece = bytes(self._received[: min(size, self._left) if self._left else 1])
            del self._received[: len(piece)]
            self._look_at(piece)
        except Failed as failed:
            self.fail(failed)
            raise ConnectionError from None
        return piece

    def takes(self, packet: bytearray) -> bool:
        """Sends a packet, now or with more; false where it does not: paho is to try it, and to notice why."""
        try:
            return self.send(packet) > 0
        except OSError:
            return False

    def send(self, content: bytes | bytearray) -> int:
        if len(self._unsent) > (_BATCH_SIZE if self.batches else 0):
            self.flush()
            if self._unsent:
                raise BlockingIOError
        self._unsent += content if self._frames is None else websocket.packed(bytes(content))
        if not self.batches:
            self.flush()
        return len(content)

    def close(self) -> None:
        if self.closed:
            return
        self.closed = True
        if self.polite:
            with contextlib.suppress(OSError):
                self._part()
        self._tls.close()

    def fileno(self) -> int:
        return self._tls.fileno()

    def setblocking(self, _blocking: bool) -> None:
        self._tls.setblocking(False)

    # Reading.

    def fill(self) -> bool:
        """Takes what has arrived; whether there is something for paho, be it the end. Failed where the hub misbehaves.

        Once for each look at time and programs, however fast the hub sends.
        """
        if not self._received and not self._ended:
            try:
                received = self._tls.recv(_RECEIVE_SIZE)
            except ssl.SSLWantReadError:
                return False
            except ssl.SSLWantWriteError:
                self._wants_write = True
                return False
            except OSError as error:
                raise broken(error) from None
            finally:
                self._has_more = self._tls.pending() > 0
            self.received_at_s = time.monotonic()
            self._ended = not received
            self._received += received if self._frames is None else self._frames.unpack(received)
            self._take_acknowledgements()
        return bool(self._received) or self._ended

    def _take_acknowledgements(self) -> None:
        """Takes the PUBACKs that come first: there are many, and they are all that is to be known of themselves."""
        at = 0
        while not self._head and self.connack is not None and self._received[at : at + 2] == _PUBACK_HEAD:
            if len(self._received) < at + 4:
                break
            self.acknowledged.append(int.from_bytes(self._received[at + 2 : at + 4], "big"))
            at += 4
        del self._received[:at]

    def _look_at(self, piece: bytes) -> None:
        """Follows the packets; Failed for one that no hub sends to us."""
        if self._left:
            self._left -= len(piece)
            if self._body is not None:
                self._body += piece
        else:
            self._head += piece
            kind = self._head[0] >> 4
            if (kind == _CONNACK) != (self.connack is None) or not _is_expected(self._head[0]):
                raise Failed(NO_REPLY_PROTOCOL, f"a packet of type {kind} where none is expected")
            if len(self._head) == 1 or self._head[-1] & 0x80:
                if len(self._head) > 4:
                    raise Failed(NO_REPLY_PROTOCOL, "a packet's length of more than four bytes")
                return
            self._left = sum((digit & 0x7F) << 7 * place for place, digit in enumerate(self._head[1:]))
            if self._left > PACKET_LIMIT:
                raise Failed(NO_REPLY_TOO_LARGE, f"a packet of {self._left} bytes, more than {PACKET_LIMIT}")
            self._body = bytearray() if kind in (_CONNACK, _PUBACK) else None
            wrong = self._body is not None and self._left != 2
            if wrong or (kind == _SUBACK and not 3 <= self._left <= GRANTED_LIMIT):
                raise Failed(NO_REPLY_PROTOCOL, f"a packet of type {kind} with {self._left} bytes")
        if not self._left:
            self._take_packet()

    def _take_packet(self) -> None:
        kind, body = self._head[0] >> 4, self._body
        self._head.clear()
        self._body = None
        if body is not None and kind == _CONNACK:
            self.connack = ConnAck(body[1], bool(body[0] & 1))
        elif body is not None:
            self.acknowledged.append(int.from_bytes(body))

    # The end.

    def _part(self) -> None:
        """Lets what was sent arrive: to close a socket with something unread in it resets the connection."""
        until_s = time.monotonic() + LINGER_S
        while self._unsent and (left_s := until_s - time.monotonic()) > 0:
            _wait_until_ready(self.fileno(), select.POLLOUT, left_s)
            self.flush()
        say_goodbye(self._tls)
        socket.socket.shutdown(self._tls, socket.SHUT_WR)
        while (left_s := until_s - time.monotonic()) > 0 and _wait_until_ready(self.fileno(), select.POLLIN, left_s):
            if not socket.socket.recv(self._tls, _RECEIVE_SIZE):
                return


def _is_expected(first_byte: int) -> bool:
    """Whether a hub sends packets that begin so to a client that publishes and subscribes with QoS 0 and 1."""
    kind, flags = first_byte >> 4, first_byte & 0x0F
    if kind == _PUBLISH:
        return flags & 0x06 in (0x00, 0x02)
    return kind in (_CONNACK, _PUBACK, _SUBACK, _PINGRESP) and flags == 0


def _wait_until_ready(fileno: int, what: int, within_s: float) -> bool:
    poll = select.poll()
    poll.register(fileno, what)
    return bool(poll.poll(math.ceil(within_s * 1000)))
