"""What other clients do in place of the agent; run as a program of its own, in an environment that has the client.

    python clients.py paho|azure|library idle|telemetry ORDER          (ORDER: one JSON object, see `Desk.order`)

It connects and says so. `idle`: it stays until it is ended. `telemetry`: for each line of stdin, two numbers, it sends
so many messages of `size` bytes with QoS 1, so many at once (0: in one request), and prints how many milliseconds each
of them waited for its acknowledgement, how many passed from the first to the last and what CPU time they took, as a
JSON object.
"""

import json
import resource
import socket
import ssl
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

PATIENCE_S = 60


def main() -> None:
    """Connects with the one or the other, and does what is asked."""
    client, what, order = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    connect = socket.create_connection

    def redirected(address: object, *arguments: Any, **options: Any) -> socket.socket:
        return connect((order["host"], order["port"]), *arguments, **options)

    socket.create_connection = redirected  # the name is the hub's, which nobody serves here
    send, stay = {"paho": with_paho, "azure": with_azure, "library": with_library}[client](order)
    print("connected", flush=True)
    if what == "idle":
        stay()
    else:
        send(1, 1)
        for line in sys.stdin:
            used_s, began_s = cpu_s(), time.monotonic()
            waits_ms = send(*map(int, line.split()))
            took_ms = (time.monotonic() - began_s) * 1000
            found = {"cpuMs": (cpu_s() - used_s) * 1000, "tookMs": took_ms, "waitsMs": waits_ms}
            print(json.dumps(found), flush=True)


def with_paho(order: dict[str, Any]) -> tuple[Callable[[int, int], list[float]], Callable[[], Any]]:
    """paho-mqtt alone: no twin, no methods, no token that is renewed; one thread, its own loop."""
    import paho.mqtt.client as paho
    from paho.mqtt.enums import CallbackAPIVersion

    client = paho.Client(CallbackAPIVersion.VERSION2, order["deviceId"], protocol=paho.MQTTv311)
    client.tls_set_context(ssl.create_default_context(cafile=order["caFile"]))
    client.username_pw_set(order["userName"], order["password"])
    client.max_inflight_messages_set(1000)
    connected: list[int] = []
    sent_s: dict[int, float] = {}  # by packet id
    waits_ms: list[float] = []
    client.on_connect = lambda *_: connected.append(0)
    client.on_publish = lambda _client, _data, packet_id, *_: waits_ms.append(
        (time.monotonic() - sent_s.pop(packet_id)) * 1000
    )
    client.connect(order["hub"], 8883, 240)

    def until(condition: Callable[[], object]) -> None:
        while not condition():
            if client.loop(1.0) != paho.MQTT_ERR_SUCCESS:
                raise SystemExit("the hub ended the connection")

    def send(count: int, at_once: int) -> list[float]:
        waits_ms.clear()
        for number in range(count):
            until(lambda number=number: number - len(waits_ms) < at_once)  # type: ignore[misc]
            began_s = time.monotonic()
            sent_s[client.publish(order["topic"], bytes(order["size"]), 1).mid] = began_s
        until(lambda: len(waits_ms) == count)
        return list(waits_ms)

    until(lambda: connected)
    return send, client.loop_forever


def with_azure(order: dict[str, Any]) -> tuple[Callable[[int, int], list[float]], Callable[[], Any]]:
    """Microsoft's azure-iot-device."""
    from azure.iot.device import IoTHubDeviceClient  # pyright: ignore[reportMissingImports]

    client = IoTHubDeviceClient.create_from_connection_string(
        order["connectionString"], server_verification_cert=Path(order["caFile"]).read_text(), keep_alive=240
    )
    client.connect()
    return by_threads(lambda: client.send_message("\0" * order["size"])), threading.Event().wait


def with_library(order: dict[str, Any]) -> tuple[Callable[[int, int], list[float]], Callable[[], Any]]:
    """The agent's own library for programs, through its service."""
    from dps_agent.client import Client

    client = Client(order["socket"], connections=order["connections"])
    payload, text = bytes(order["size"]), "x" * (order["size"] - 2)
    one_by_one = by_threads(lambda: client.send(payload))

    def send(count: int, at_once: int) -> list[float]:
        if at_once:
            return one_by_one(count, at_once)
        began_s = time.monotonic()
        client.send_many([text] * count)
        return [(time.monotonic() - began_s) * 1000] * count

    return send, threading.Event().wait


def by_threads(send: Callable[[], None]) -> Callable[[int, int], list[float]]:
    """Sends so many messages, so many at once: each thread one after the other."""

    def send_all(count: int, at_once: int) -> list[float]:
        if at_once == 1:
            return timed(send, count)
        with ThreadPoolExecutor(at_once) as pool:
            parts = [pool.submit(timed, send, len(range(first, count, at_once))) for first in range(at_once)]
            return [wait_ms for part in parts for wait_ms in part.result()]

    return send_all


def timed(send: Callable[[], None], count: int) -> list[float]:
    """Milliseconds that each of `count` messages waited for its acknowledgement, one after the other."""
    waits_ms = []
    for _ in range(count):
        sent_s = time.monotonic()
        send()
        waits_ms.append((time.monotonic() - sent_s) * 1000)
    return waits_ms


def cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
