"""Microsoft's device client against a hub; runs in an environment of its own, since it needs paho-mqtt before 2.

One JSON object on stdin: `connectionString`, `caFile`, `port` (of the hub on 127.0.0.1), `websockets`. It prints one
JSON object a line for what happens: connected, twin, sent, message, method, reported, desired, done.
"""

import json
import queue
import socket
import sys
from pathlib import Path
from typing import Any

from azure.iot.device import IoTHubDeviceClient, Message, MethodResponse

PATIENCE_S = 90


def say(event: str, content: object = None) -> None:
    print(json.dumps({"event": event, "content": content}), flush=True)


def main() -> None:
    order = json.loads(sys.stdin.readline())
    connect = socket.create_connection

    def redirected(address: tuple[str, int], *arguments: Any, **options: Any) -> socket.socket:
        """The client's ports are fixed in its code, 8883 and 443, and its host is a name that nobody serves."""
        return connect(("127.0.0.1", order["port"]), *arguments, **options)

    socket.create_connection = redirected
    client = IoTHubDeviceClient.create_from_connection_string(
        order["connectionString"],
        server_verification_cert=Path(order["caFile"]).read_text(),
        websockets=order["websockets"],
        keep_alive=30,
    )
    events: queue.Queue[tuple[str, object]] = queue.Queue()

    def message_came(message: Any) -> None:
        events.put(("message", [message.data.decode(), message.custom_properties, message.message_id]))

    def method_called(request: Any) -> None:
        client.send_method_response(MethodResponse(request.request_id, 207, {"echo": request.payload}))
        events.put(("method", request.name))

    client.on_message_received = message_came
    client.on_method_request_received = method_called
    client.on_twin_desired_properties_patch_received = lambda patch: events.put(("desired", patch))
    client.connect()
    say("connected", client.connected)
    say("twin", client.get_twin())
    message = Message('{"t":21.5}', message_id="m-1", content_encoding="utf-8", content_type="application/json")
    message.custom_properties["unit"] = "°C & more"
    client.send_message(message)
    say("sent")
    client.patch_twin_reported_properties({"firmware": {"version": "1.2"}})
    say("reported")
    for _ in range(3):
        say(*events.get(timeout=PATIENCE_S))
    client.shutdown()
    say("done")


main()
