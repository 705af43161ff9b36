"""Microsoft's device client against a hub; runs in an environment of its own, since it needs paho-mqtt before 2.

One JSON object on stdin: `caFile`, `port` (of DPS and hub on 127.0.0.1), `websockets`, `modelId` for a Plug and Play
device, and who it is: `connectionString`, or for who registers with DPS first `registrationId` and `key` in base64 or
`certificate` and `certificateKey`, PEM files. It prints one JSON object a line for what happens: registered or refused,
connected, twin, sent, message, method, reported, desired, done.
"""

import json
import queue
import socket
import sys
from pathlib import Path
from typing import Any

from azure.iot.device import X509, IoTHubDeviceClient, Message, MethodResponse, ProvisioningDeviceClient

PATIENCE_S = 90


def say(event: str, content: object = None) -> None:
    print(json.dumps({"event": event, "content": content}), flush=True)


def plug_and_play(client: Any, desired: dict[str, Any], events: "queue.Queue[tuple[str, Any]]") -> None:
    """What the conventions have: answers to writable properties, telemetry of a component, its command.

    What it hears it reports, so that the hub has all of it.
    """
    done = {"ac": 200, "av": desired["$version"], "ad": "done"}
    target = {"value": desired["thermostat1"]["target"], **done}
    client.patch_twin_reported_properties(
        {"rate": {"value": desired["rate"], **done}, "thermostat1": {"__t": "c", "target": target}}
    )
    client.patch_twin_reported_properties({"firmware": {"version": "1.2"}})
    message = Message('{"temperature":21.5}', content_encoding="utf-8", content_type="application/json")
    message.custom_properties["$.sub"] = "thermostat1"
    client.send_message(message)
    send_plain(client)
    for _ in range(4):
        event, content = events.get(timeout=PATIENCE_S)
        if event == "message":
            text, properties, _ = content
            client.patch_twin_reported_properties({"heard": {"text": text, "level": properties["level"]}})
        elif event == "desired":
            rate = {"value": content["rate"], "ac": 200, "av": content["$version"], "ad": "done"}
            client.patch_twin_reported_properties({"rate": rate})
    client.shutdown()


def send_plain(client: Any) -> None:
    """A message with properties of the system's and of its own."""
    message = Message('{"t":21.5}', message_id="m-1", content_encoding="utf-8", content_type="application/json")
    message.custom_properties["unit"] = "°C & more"
    client.send_message(message)


def registered(order: dict[str, Any], options: dict[str, Any]) -> Any:
    """The client of the hub that DPS has assigned."""
    place: dict[str, Any] = {"provisioning_host": "global.azure-devices-provisioning.net", "id_scope": "0ne00000000"}
    place["registration_id"] = order["registrationId"]
    if "key" in order:
        way = {"symmetric_key": order["key"]}
        dps = ProvisioningDeviceClient.create_from_symmetric_key(**place, **way, **options)
    else:
        way = {"x509": X509(order["certificate"], order["certificateKey"])}
        dps = ProvisioningDeviceClient.create_from_x509_certificate(**place, **way, **options)
    dps.provisioning_payload = {"site": 7}
    try:
        result = dps.register()
    except Exception as error:  # its own classes wrap what DPS has said
        say("refused", f"{error!r} {error.__cause__!r}")
        sys.exit(0)
    state = result.registration_state
    say("registered", [result.status, state.assigned_hub, state.device_id, state.sub_status, state.response_payload])
    at_hub = {"hostname": state.assigned_hub, "device_id": state.device_id, **way, **options}
    if "key" in order:
        return IoTHubDeviceClient.create_from_symmetric_key(**at_hub)
    return IoTHubDeviceClient.create_from_x509_certificate(**at_hub)


def main() -> None:
    order = json.loads(sys.stdin.readline())
    connect = socket.create_connection

    def redirected(address: tuple[str, int], *arguments: Any, **options: Any) -> socket.socket:
        """The client's ports are fixed in its code, 8883 and 443, and its host is a name that nobody serves."""
        return connect(("127.0.0.1", order["port"]), *arguments, **options)

    socket.create_connection = redirected
    options = {
        "server_verification_cert": Path(order["caFile"]).read_text(),
        "websockets": order["websockets"],
        "keep_alive": 30,
    }
    if "registrationId" in order:
        client = registered(order, options)
    else:
        model = {"product_info": order["modelId"]} if "modelId" in order else {}
        client = IoTHubDeviceClient.create_from_connection_string(order["connectionString"], **options, **model)
    events: queue.Queue[tuple[str, Any]] = queue.Queue()

    def message_came(message: Any) -> None:
        events.put(("message", [message.data.decode(), message.custom_properties, message.message_id]))

    def method_called(request: Any) -> None:
        if "*" in request.name:
            events.put(("method", request.name))  # before the caller goes on
            client.send_method_response(MethodResponse(request.request_id, 200, {"max": 22.5}))
            return
        client.send_method_response(MethodResponse(request.request_id, 207, {"echo": request.payload}))
        events.put(("method", request.name))

    client.on_message_received = message_came
    client.on_method_request_received = method_called
    client.on_twin_desired_properties_patch_received = lambda patch: events.put(("desired", patch))
    client.connect()
    say("connected", client.connected)
    twin = client.get_twin()
    if "modelId" in order:
        plug_and_play(client, twin["desired"], events)
        say("done")
        return
    say("twin", twin)
    send_plain(client)
    say("sent")
    client.patch_twin_reported_properties({"firmware": {"version": "1.2"}})
    say("reported")
    for _ in range(3):
        say(*events.get(timeout=PATIENCE_S))
    client.shutdown()
    say("done")


main()
