"""A device on paho-mqtt 2, for the tests of the hub: one connection, never renewed by itself, every wait bounded."""

from __future__ import annotations

import contextlib
import queue
import socket
import ssl
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import paho.mqtt.client as paho

from support.cloud.emulator import DeviceCredentials, HubCommands

PATIENCE_S = 60.0
HUB_SUBSCRIPTIONS = ("$iothub/methods/POST/#", "$iothub/twin/res/#", "$iothub/twin/PATCH/properties/desired/#")


class _Redirected(paho.Client):
    """Dials another address than the host that TLS and the WebSocket name."""

    address = ("", 0)

    def _create_socket_connection(self) -> socket.socket:
        return socket.create_connection(self.address, PATIENCE_S)


class PahoDevice:
    """One MQTT connection of one device; use it with `with`."""

    def __init__(
        self,
        emulator: Any,
        device: DeviceCredentials,
        *,
        token: str | None = None,
        user_name: str | None = None,
        client_id: str | None = None,
        server_name: str | None = None,
        clean: bool = False,
        keep_alive_s: int = 60,
        transport: str = "tcp",
        acknowledges: bool = True,
        will: tuple[str, bytes] | None = None,
    ) -> None:
        assert isinstance(emulator, HubCommands)
        self.device_id = device.device_id
        self.received: queue.Queue[paho.MQTTMessage] = queue.Queue()
        self.closed = threading.Event()  # the connection is over
        self.session_present = False
        self._answer: queue.Queue[int] = queue.Queue()
        self._granted: queue.Queue[list[int]] = queue.Queue()
        self._stopping = threading.Event()
        self._asked: queue.Queue[tuple[Future[Any], Callable[[], Any]]] = queue.Queue()
        self._thread = threading.Thread(target=self._loop, daemon=True)
        self._client = client = _Redirected(
            paho.CallbackAPIVersion.VERSION2,
            client_id or device.device_id,
            clean_session=clean,
            transport=transport,  # type: ignore[arg-type]
            reconnect_on_failure=False,
            manual_ack=not acknowledges,
        )
        client.address = ("127.0.0.1", emulator.hub_port)
        client.tls_set_context(ssl.create_default_context(cafile=str(emulator.ca_file)))  # type: ignore[attr-defined]
        client.ws_set_options("/$iothub/websocket?iothub-no-client-cert=true")
        client.username_pw_set(user_name or device.user_name, device.token() if token is None else token)
        if will:
            client.will_set(will[0], will[1], 1)
        client.on_connect = self._connected
        client.on_message = lambda client, userdata, message: self.received.put(message)
        client.on_subscribe = lambda client, userdata, mid, codes, properties: self._granted.put(
            [code.value for code in codes]
        )
        self._server_name = server_name or device.hub
        self._keep_alive_s = keep_alive_s

    def connect(self, looping: bool = True) -> int:
        """Connects; the CONNACK's code, -1 where none came. Without `looping` nothing is sent or read after it."""
        self._client.connect(self._server_name, 8883, self._keep_alive_s)
        if looping:
            self._thread.start()
            for _ in range(int(PATIENCE_S / 0.02)):
                with contextlib.suppress(queue.Empty):
                    return self._answer.get(timeout=0.02)
                if self.closed.is_set() and self._answer.empty():
                    return -1
            return -1
        while self._answer.empty():
            assert self._client.loop(PATIENCE_S) == paho.MQTT_ERR_SUCCESS
        return self._answer.get()

    def subscribe(self, *filters: str, qos: int = 1) -> list[int]:
        """Subscribes; the QoS granted for each."""
        self._ask(lambda: self._client.subscribe([(topic_filter, qos) for topic_filter in filters]))
        return self._granted.get(timeout=PATIENCE_S)

    def subscribe_to_messages(self, qos: int = 1) -> list[int]:
        """Subscribes to messages from the cloud."""
        return self.subscribe(f"devices/{self.device_id}/messages/devicebound/#", qos=qos)

    def send(self, payload: bytes, properties: str = "", qos: int = 1, retain: bool = False) -> bool:
        """Publishes telemetry; whether the hub acknowledged it."""
        return self.publish(f"devices/{self.device_id}/messages/events/{properties}", payload, qos, retain)

    def publish(self, topic: str, payload: bytes = b"", qos: int = 1, retain: bool = False) -> bool:
        """Publishes; whether the hub acknowledged it before the connection ended or time was up."""
        message = self.start_publishing(topic, payload, qos, retain)
        with contextlib.suppress(RuntimeError):  # paho's word for a connection that has ended
            for _ in range(int(PATIENCE_S / 0.05)):
                if message.is_published():
                    return True
                if self.closed.wait(0.05):
                    return message.is_published()
        return False

    def start_publishing(
        self, topic: str, payload: bytes = b"", qos: int = 1, retain: bool = False
    ) -> paho.MQTTMessageInfo:
        """Publishes and does not wait for the acknowledgement."""
        message: paho.MQTTMessageInfo = self._ask(lambda: self._client.publish(topic, payload, qos, retain))
        return message

    def next_message(self, within_s: float = PATIENCE_S) -> paho.MQTTMessage:
        """The next message; queue.Empty if none comes."""
        return self.received.get(timeout=within_s)

    def has_ended(self, within_s: float = PATIENCE_S) -> bool:
        """Whether the connection ends, or has, within that time."""
        return self.closed.wait(within_s)

    def goodbye(self) -> None:
        """DISCONNECT."""
        self._ask(self._client.disconnect)
        assert self.has_ended()

    def vanish(self) -> None:
        """The connection ends as if the device had lost power."""
        self._stopping.set()
        if self._thread.ident is not None:
            self._thread.join(PATIENCE_S)
        connection = self._client.socket()
        if connection is not None:
            connection.close()

    def __enter__(self) -> PahoDevice:
        return self

    def __exit__(self, *_: object) -> None:
        self.vanish()
        self._client._reset_sockets()  # those that wake its own loop; it has no public word for it

    def _ask(self, act: Callable[[], Any]) -> Any:
        """Has the loop's thread do something: paho would write from this one while that one reads the same TLS."""
        done: Future[Any] = Future()
        self._asked.put((done, act))
        while not self.closed.is_set():
            with contextlib.suppress(TimeoutError):
                return done.result(0.02)
        return done.result() if done.done() else act()

    def _loop(self) -> None:
        while not self._stopping.is_set():
            with contextlib.suppress(queue.Empty):
                done, act = self._asked.get_nowait()
                done.set_result(act())
            if self._client.loop(0.01) != paho.MQTT_ERR_SUCCESS:
                self.closed.set()
                return

    def _connected(self, client: object, userdata: object, flags: Any, code: Any, properties: object) -> None:
        self.session_present = flags.session_present
        # paho 2 speaks of MQTT 5's codes; these are 3.1.1's.
        codes = {0: 0, 0x84: 1, 0x85: 2, 0x88: 3, 0x86: 4, 0x87: 5}
        self._answer.put(codes[code.value])
