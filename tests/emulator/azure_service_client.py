"""Microsoft's client of the service API of DPS at work; runs in an environment of its own.

One JSON object on stdin: `connectionString`, `caFile`. It prints one JSON object with what each call has given.
"""

import json
import sys
from typing import Any

from azure.core.exceptions import HttpResponseError
from azure.iot.deviceprovisioning import DeviceProvisioningClient


def main() -> None:
    order = json.loads(sys.stdin.readline())
    client = DeviceProvisioningClient.from_connection_string(
        order["connectionString"], connection_verify=order["caFile"], retry_total=0
    )
    one, groups = client.enrollment, client.enrollment_group
    said: dict[str, Any] = {}
    key = {"type": "symmetricKey"}
    said["created"] = one.create_or_update("press-01", {"registrationId": "press-01", "attestation": key})
    said["got"] = one.get("press-01")
    said["keys"] = one.get_attestation_mechanism("press-01")
    etag = said["got"]["etag"]
    changed = {**said["got"], "provisioningStatus": "disabled"}
    said["updated"] = one.create_or_update("press-01", changed, if_match=etag)
    try:
        one.create_or_update("press-01", changed, if_match=etag)
    except HttpResponseError as error:
        said["stale"] = error.status_code
    listed = [{"registrationId": f"press-{number:02}", "attestation": key} for number in range(2, 11)]
    said["bulk"] = one.run_bulk_operation({"enrollments": listed, "mode": "create"})
    said["again"] = one.run_bulk_operation({"enrollments": listed[:1], "mode": "create"})
    found = one.query({"query": "SELECT * FROM enrollments"}, top=4)
    said["queried"] = [record["registrationId"] for record in found]
    group = {"enrollmentGroupId": "presses", "attestation": key}
    said["group"] = groups.create_or_update("presses", group)
    said["groups"] = [record["enrollmentGroupId"] for record in groups.query({"query": "SELECT *"})]
    one.delete("press-02")
    try:
        one.get("press-02")
    except HttpResponseError as error:
        said["deleted"] = error.status_code
    said["state"] = client.device_registration_state.get("press-99")
    said["of group"] = list(client.device_registration_state.query("presses"))
    client.device_registration_state.delete("press-99")
    print(json.dumps(said))


main()
