"""What other clients do in place of the agent; run as a program of its own, in an environment that has the client.

    python clients.py paho|azure idle|telemetry ORDER          (ORDER: one JSON object, see `Desk.order`)

It connects and says so. `idle`: it stays until it is ended. `telemetry`: for each number in a line of stdin it sends so
many messages of `size` bytes with QoS 1, each once the one before is acknowledged, and prints how many milliseconds
each of them waited and what CPU time they took, as a JSON object.
"""

import json
import resource
import socket
import ssl
import sys
import threading
import time
from collections.abc import Callable
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
    send, stay = {"paho": with_paho, "azure": with_azure}[client](order)
    print("connected", flush=True)
    if what == "idle":
        stay()
    else:
        send()
        for line in sys.stdin:
            used_s = cpu_s()
            waits_ms = timed(send, int(line))
            print(json.dumps({"cpuMs": (cpu_s() - used_s) * 1000, "waitsMs": waits_ms}), flush=True)


def with_paho(order: dict[str, Any]) -> tuple[Callable[[], None], Callable[[], Any]]:
    """paho-mqtt alone: no twin, no methods, no token that is renewed; one thread, its own loop."""
    import paho.mqtt.client as paho
    from paho.mqtt.enums import CallbackAPIVersion

    client = paho.Client(CallbackAPIVersion.VERSION2, order["deviceId"], protocol=paho.MQTTv311)
    client.tls_set_context(ssl.create_default_context(cafile=order["caFile"]))
    client.username_pw_set(order["userName"], order["password"])
    done: list[int] = []
    client.on_connect = lambda *_: done.append(0)
    client.on_publish = lambda *_: done.append(0)
    client.connect(order["hub"], 8883, 240)

    def until_done() -> None:
        while not done:
            if client.loop(1.0) != paho.MQTT_ERR_SUCCESS:
                raise SystemExit("the hub ended the connection")
        done.clear()

    def send() -> None:
        client.publish(order["topic"], bytes(order["size"]), 1)
        until_done()

    until_done()
    return send, client.loop_forever


def with_azure(order: dict[str, Any]) -> tuple[Callable[[], None], Callable[[], Any]]:
    """Microsoft's azure-iot-device."""
    from azure.iot.device import IoTHubDeviceClient  # pyright: ignore[reportMissingImports]

    client = IoTHubDeviceClient.create_from_connection_string(
        order["connectionString"], server_verification_cert=Path(order["caFile"]).read_text(), keep_alive=240
    )
    client.connect()
    return lambda: client.send_message("\0" * order["size"]), threading.Event().wait


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
