"""The hub's end of one MQTT connection, for behaviours that no emulator has; see `support.cloud.servers`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dps_emulator import mqtt

if TYPE_CHECKING:
    from collections.abc import Callable

    from support.cloud.servers import Peer


class HubPeer:
    """Packets instead of bytes; ConnectionError where the device has gone."""

    def __init__(self, peer: Peer) -> None:
        self.peer = peer
        self.send = peer.send
        self._stream = mqtt.PacketStream()
        self._packets: list[mqtt.Packet] = []

    def packet(self) -> Any:
        """The device's next packet."""
        while not self._packets:
            self._packets.extend(self._stream.feed(self.peer.receive()))
        return self._packets.pop(0)

    def accept(self, code: int = 0, session_present: bool = False) -> mqtt.Connect:
        """Answers to CONNECT."""
        connect = self.packet()
        assert isinstance(connect, mqtt.Connect), connect
        self.send(mqtt.connack(code, session_present=session_present))
        return connect

    def obey(self) -> None:
        """Does what a hub does for each packet until the device goes."""
        while True:
            packet = self.packet()
            if isinstance(packet, mqtt.Publish) and packet.qos:
                self.send(mqtt.puback(packet.packet_id))
            elif isinstance(packet, mqtt.Subscribe):
                self.send(mqtt.suback(packet.packet_id, [qos for _, qos in packet.filters]))
            elif isinstance(packet, mqtt.PingRequest):
                self.send(mqtt.ping_response())


def accepting(then: Callable[[HubPeer], None] = HubPeer.obey, code: int = 0) -> Callable[[Peer], None]:
    """A behaviour: CONNECT is answered, then `then`."""

    def behave(peer: Peer) -> None:
        hub = HubPeer(peer)
        hub.accept(code)
        then(hub)

    return behave
