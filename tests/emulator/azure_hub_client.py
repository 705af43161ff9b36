"""Microsoft's client of a hub's service API at work; runs in an environment of its own, its CA in REQUESTS_CA_BUNDLE.

One JSON object on stdin: `connectionString`, and `deviceId` of a device that answers methods. It prints one JSON object
with what each call has given.
"""

import json
import sys
from typing import Any

from azure.iot.hub import IoTHubRegistryManager
from azure.iot.hub.models import CloudToDeviceMethod, QuerySpecification, Twin, TwinProperties


def main() -> None:
    order = json.loads(sys.stdin.readline())
    hub = IoTHubRegistryManager.from_connection_string(order["connectionString"])
    said: dict[str, Any] = {}
    made = hub.create_device_with_sas("press-01", "", "", "enabled")
    said["made"] = [made.device_id, made.status, made.authentication.type]
    said["key"] = made.authentication.symmetric_key.primary_key
    thumbprint = "AB" * 32
    by_x509 = hub.create_device_with_x509("press-02", thumbprint, thumbprint, "enabled")
    said["x509"] = by_x509.authentication.x509_thumbprint.primary_thumbprint
    key = made.authentication.symmetric_key
    changed = hub.update_device_with_sas("press-01", made.etag, key.primary_key, key.secondary_key, "disabled")
    said["changed"] = [changed.status, changed.authentication.symmetric_key.primary_key == said["key"]]
    said["devices"] = sorted(device.device_id for device in hub.get_devices())
    twin = hub.get_twin(order["deviceId"])
    patch = Twin(tags={"site": {"id": 7}}, properties=TwinProperties(desired={"rate": 5}))
    said["twin"] = hub.update_twin(order["deviceId"], patch, twin.etag).properties.desired
    query = QuerySpecification(query="SELECT * FROM devices WHERE tags.site.id = 7 AND connectionState = 'Connected'")
    found = hub.query_iot_hub(query, None, 5).items
    said["found"] = [[each.device_id, each.tags, each.properties.reported["firmware"]] for each in found]
    method = CloudToDeviceMethod(method_name="reboot", payload={"delay": 5}, response_timeout_in_seconds=60)
    answer = hub.invoke_device_method(order["deviceId"], method)
    said["method"] = [answer.status, answer.payload]
    hub.delete_device("press-01")
    said["left"] = sorted(device.device_id for device in hub.get_devices())
    print(json.dumps(said))


main()
