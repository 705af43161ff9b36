"""A hub and a DPS with valid certificates that mean harm, and the switchboard through which a device reaches them."""

from __future__ import annotations

import contextlib
import itertools
import socket
import ssl
import threading
import time
from typing import TYPE_CHECKING, Protocol

from dps_emulator import mqtt
from support.cloud.broker import HubPeer
from support.cloud.servers import LOOPBACK, Peer, answer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType

    import trustme

    class Authority(Protocol):
        """`trustme.CA`, or what issues certificates as that does."""

        def issue_cert(self, *identities: str) -> trustme.LeafCert: ...


HUB = "emulator.azure-devices.net"
MARK = b"kept-"  # the payloads that a hub remembers begin with it
_FLOOD_S = 20.0  # of one misdeed before the connection ends


def serving(authority: Authority, *names: str) -> ssl.SSLContext:
    """TLS with a certificate of this authority."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(*names).configure_cert(context)
    return context


class Switchboard:
    """Listens on a port of loopback and carries each connection to the address of the day; use it with `with`.

    `narrow`: the kernel keeps a few kilobytes for who does not read, and not the megabytes that loopback has room for.
    """

    def __init__(self, target: str, narrow: bool = False) -> None:
        self._target = target
        self._carried: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._hears = threading.Event()
        self._hears.set()
        self._listener = socket.create_server((LOOPBACK, 0), backlog=64)
        if narrow:
            self._listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 536)
            self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self.address = f"{LOOPBACK}:{self._listener.getsockname()[1]}"

    def turn_to(self, target: str) -> None:
        """Connections from now on go to `target`; where that is another than before, what it carries ends."""
        with self._lock:
            if target == self._target:
                return
            self._target = target
            for connection in self._carried:
                _shut(connection)

    def fall_deaf(self) -> None:
        """From now on nothing is read of what devices send; what is on its way to them goes on."""
        self._hears.clear()

    def _accept(self) -> None:
        """Started by `__enter__`, ends when the listener is closed."""
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._carry, args=(connection,), daemon=True).start()

    def _carry(self, device: socket.socket) -> None:
        """One connection: this thread carries one way, another the other; either's end ends both."""
        host, _, port = self._target.rpartition(":")
        with contextlib.suppress(OSError), device, socket.create_connection((host, int(port))) as cloud:
            with self._lock:
                self._carried |= {device, cloud}
            back = threading.Thread(target=_pump, args=(cloud, device), daemon=True)
            back.start()
            _pump(device, cloud, self._hears)
            back.join()
            with self._lock:
                self._carried -= {device, cloud}

    def __enter__(self) -> Switchboard:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _shut(self._listener)
        self._listener.close()
        self._hears.set()
        self.turn_to("nowhere:0")


def _shut(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


def _pump(source: socket.socket, target: socket.socket, hears: threading.Event | None = None) -> None:
    with contextlib.suppress(OSError):
        while (hears is None or hears.wait()) and (piece := source.recv(65536)):
            target.sendall(piece)
    _shut(source)
    _shut(target)


class RecordingHub:
    """What two hubs, a decent one and a hostile one, have acknowledged; each is a behaviour for `Server`."""

    def __init__(self) -> None:
        self.kept: set[bytes] = set()
        self.connections = 0
        self._misdeeds = itertools.cycle(
            (
                self._floods_messages,
                self._floods_desired,
                self._calls_and_reads_nothing,
                self._ends_after_each_message,
                self._speaks_nonsense,
                self._says_nothing,
            )
        )

    def decent(self, peer: Peer) -> None:
        """Accepts, grants and acknowledges; a program's messages and calls come now and then."""
        hub = self._accepted(peer)
        with contextlib.suppress(ConnectionError):
            while True:
                self._obey(hub, hub.packet())

    def hostile(self, peer: Peer) -> None:
        """Each connection meets another misdeed."""
        misdeed = next(self._misdeeds)
        with contextlib.suppress(mqtt.ProtocolError):
            misdeed(self._accepted(peer))

    def _accepted(self, peer: Peer) -> HubPeer:
        hub = HubPeer(peer)
        self._device_id = hub.accept().client_id
        self.connections += 1
        return hub

    def _obey(self, hub: HubPeer, packet: mqtt.Packet) -> None:
        if isinstance(packet, mqtt.Publish):
            if packet.payload.startswith(MARK):
                self.kept.add(packet.payload)  # it has it, whatever becomes of the acknowledgement
            if packet.qos:
                hub.send(mqtt.puback(packet.packet_id))
            if packet.topic.startswith("$iothub/twin/GET/"):
                request = packet.topic.partition("$rid=")[2]
                content = b'{"desired":{"$version":1},"reported":{"$version":1}}'
                hub.send(mqtt.publish(mqtt.Publish(f"$iothub/twin/res/200/?$rid={request}", content)))
        elif isinstance(packet, mqtt.Subscribe):
            hub.send(mqtt.suback(packet.packet_id, [qos for _, qos in packet.filters]))
        elif isinstance(packet, mqtt.Unsubscribe):
            hub.send(mqtt.unsuback(packet.packet_id))
        elif isinstance(packet, mqtt.PingRequest):
            hub.send(mqtt.ping_response())

    def _while_flooding(self, hub: HubPeer, flood: Callable[[int], bytes]) -> None:
        """Does a hub's work on one thread and floods on another, for a while."""
        end_s = time.monotonic() + _FLOOD_S

        def pour() -> None:
            """Started here, ends with the time or the connection."""
            number = 1
            with contextlib.suppress(OSError):
                while time.monotonic() < end_s:
                    number += 1
                    hub.send(flood(number))
            hub.peer.interrupt()

        pouring = threading.Thread(target=pour, daemon=True)
        pouring.start()
        try:
            while True:
                self._obey(hub, hub.packet())
        finally:
            hub.peer.interrupt()
            pouring.join()

    def _floods_messages(self, hub: HubPeer) -> None:
        topic = f"devices/{self._device_id}/messages/devicebound/by=hostile"
        self._while_flooding(hub, lambda _number: mqtt.publish(mqtt.Publish(topic, b"x" * 250_000)))

    def _floods_desired(self, hub: HubPeer) -> None:
        def patch(number: int) -> bytes:
            content = b'{"k%d":"%s","$version":%d}' % (number, b"x" * 200_000, number)
            return mqtt.publish(mqtt.Publish(f"$iothub/twin/PATCH/properties/desired/?$version={number}", content))

        self._while_flooding(hub, patch)

    def _calls_and_reads_nothing(self, hub: HubPeer) -> None:
        end_s = time.monotonic() + _FLOOD_S
        number = 0
        while time.monotonic() < end_s:
            number += 1
            hub.send(mqtt.publish(mqtt.Publish(f"$iothub/methods/POST/status/?$rid={number:x}", b"{}")))

    def _ends_after_each_message(self, hub: HubPeer) -> None:
        while True:
            packet = hub.packet()
            if isinstance(packet, mqtt.Publish) and packet.topic.startswith("devices/"):
                return
            self._obey(hub, packet)

    def _speaks_nonsense(self, hub: HubPeer) -> None:
        self._obey(hub, hub.packet())
        hub.send(b"\x30\xff\xff\xff\x7f" + b"\0" * 100_000)

    def _says_nothing(self, hub: HubPeer) -> None:
        end_s = time.monotonic() + _FLOOD_S
        while time.monotonic() < end_s:
            hub.packet()


_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
DPS_FLOODS: tuple[Callable[[Peer], None], ...] = (
    lambda peer: _forever(peer, b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n" * 100),
    lambda peer: _forever(peer, _HEAD + b"X-More: " + b"y" * 1000 + b"\r\n", b"X-More: " + b"y" * 1000 + b"\r\n"),
    lambda peer: _forever(peer, _HEAD + b"Content-Length: 9999999999\r\n\r\n", b"x" * 65536),
    lambda peer: _forever(peer, _HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"ffff\r\n" + b"x" * 65535 + b"\r\n"),
)
DPS_MISDEEDS = (
    *DPS_FLOODS,
    lambda peer: peer.drip(_HEAD * 100, 0.2),
    lambda peer: peer.send(answer(b"[" * 60_000)),
    lambda peer: peer.send(answer(b"\x1f\x8b" + b"z" * 1000, headers="Content-Encoding: gzip\r\n")),
    lambda peer: peer.send(answer(b"", "302 Found", "Location: https://example.invalid/\r\n")),
    lambda peer: peer.send(answer(b"{}", "429 Too Many Requests", "Retry-After: 99999999999999999999\r\n")),
    lambda peer: peer.wait_until_gone(),
    lambda peer: peer.send(answer(b'{"operationId":"x","status":"assigning"}', "202 Accepted")),
)


def hostile_dps(misdeeds: Sequence[Callable[[Peer], None]] = DPS_MISDEEDS) -> Callable[[Peer], None]:
    """A behaviour: each request of a device meets another misdeed."""
    turns = itertools.cycle(misdeeds)

    def behave(peer: Peer) -> None:
        while True:
            peer.request()
            next(turns)(peer)

    return behave


def _forever(peer: Peer, *pieces: bytes) -> None:
    """Sends the first piece once and the last one until the device goes."""
    peer.send(pieces[0])
    while True:
        peer.send(pieces[-1])
