"""The ways to DPS and to the hub as the checks go them: whom they lead to, and a TLS connection there.

Imported only by a check that uses the network.
"""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

from dps_agent.effects import NO_REPLY_CLOSED, Failed
from dps_agent.host.config import proxy_of
from dps_agent.host.network import websocket
from dps_agent.host.network.dial import MQTT_PORT, Dialler
from dps_agent.host.network.https import peer_of
from dps_agent.host.network.proxy import ProxyRule

if TYPE_CHECKING:
    from dps_agent.effects import Reply
    from dps_agent.host.config import Configuration

DIAL_LIMIT_S = 10.0  # name, TCP, proxy and TLS of one peer
MQTT, WEBSOCKET = "mqtt", "websocket"


class Peer(NamedTuple):
    """Whom TLS is spoken with: the certificate's name, where it is dialled, the roots and their setting."""

    name: str
    host: str
    port: int
    ca_file: str
    setting: str


class Network:
    """The ways to DPS and to the hub, each gone once."""

    def __init__(self, configuration: Configuration) -> None:
        self._configuration = configuration
        self.proxies = ProxyRule(proxy_of(configuration))
        self._hub_ways: dict[str, Failed | None] = {}
        self.reply: Reply | None = None  # DPS's

    @property
    def dps(self) -> Peer:
        """DPS's endpoint."""
        parts = urlsplit(self._configuration.endpoint)
        name, port = parts.hostname or "", parts.port or 443
        host = name
        if self._configuration.connect_to:
            host, dial_port = peer_of(self._configuration.connect_to, "connect_to")
            port = dial_port or port
        return Peer(name, host, port, self._configuration.ca_file, "ca_file")

    def hub(self, name: str, transport: str) -> Peer:
        """The hub of that name, for one transport."""
        hub = self._configuration.hub
        host, port = name, MQTT_PORT if transport == MQTT else websocket.PORT
        if hub.connect_to:
            host, dial_port = peer_of(hub.connect_to, "hub.connect_to")
            port = dial_port or port
        return Peer(name, host, port, hub.ca_file, "hub.ca_file")

    def transports(self) -> list[str]:
        """Those that the agent tries, in its order."""
        hub = self._configuration.hub
        transports = [MQTT, WEBSOCKET] if hub.transport == "auto" else [hub.transport]
        return transports[:1] if hub.connect_to else transports

    def hub_way(self, name: str, transport: str) -> Failed | None:
        """Why the hub is not reached on that transport, None where it is."""
        if transport not in self._hub_ways:
            self._hub_ways[transport] = None
            try:
                _reach_hub(self, self.hub(name, transport), transport)
            except Failed as failure:
                self._hub_ways[transport] = failure
        return self._hub_ways[transport]


def _reach_hub(network: Network, peer: Peer, transport: str) -> None:
    with dialled(network, peer) as tls:
        if transport == WEBSOCKET:
            try:
                websocket.upgrade(tls, peer.name, time.monotonic() + DIAL_LIMIT_S)
            except OSError:
                raise Failed(NO_REPLY_CLOSED, "the connection ended in the WebSocket's handshake") from None


@contextlib.contextmanager
def dialled(network: Network, peer: Peer) -> Any:
    """A verified TLS connection for the length of a block; Failed."""
    dialler = Dialler(network.proxies, peer.ca_file, peer.setting)
    dialler.begin()
    try:
        yield dialler.dial(peer.name, peer.host, peer.port, time.monotonic() + DIAL_LIMIT_S)
    finally:
        dialler.close()
