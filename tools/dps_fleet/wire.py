"""Everything that devices and services say to each other, made once: no simulated device costs any cryptography.

One registration id, one key and one signature serve all devices. The simulation knows a device by its object, and the
core only compares what came with what it knows.
"""

import struct

from dps_agent.assignment import Assignment, encode
from dps_agent.effects import Reply
from dps_agent.settings import TPM
from dps_hal.platform import to_base64, to_json
from dps_hal.tpm.activation import Activation, join_activation
from dps_hal.tpm.keys import ID_KEY_ATTRIBUTES, ek_public, object_name, sized, srk_public, wrap

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

NOW_S = 1_800_000_000  # 2027-01-15, when each simulation begins
DEVICE = "press-07"
SCOPE = "0ne00000000"
ENDPOINT = "https://global.azure-devices-provisioning.net"
ENDORSEMENT_KEY = ek_public(b"\x81" + b"\x05" * 254 + b"\x01")
STORAGE_ROOT_KEY = srk_public(b"\x82" + b"\x05" * 254 + b"\x01")
SIGNATURE = b"\x5a" * 32


def _key_public() -> bytes:
    area = struct.pack(">HHI", 0x0008, 0x000B, ID_KEY_ATTRIBUTES) + sized(b"") + struct.pack(">HH", 0x0005, 0x000B)
    return sized(area + sized(b"\x77" * 32))


WRAPPED_KEY = wrap(_key_public(), sized(object_name(STORAGE_ROOT_KEY) + b"k" * 32))
BLOB = to_base64(
    join_activation(
        Activation(
            sized(bytes(32)) + bytes(18),
            bytes(256),
            sized(bytes(32)) + bytes(108),
            bytes(256),
            _key_public(),
            bytes(16),
        )
    )
)


def reply(status: int, value: "dict[str, Any]", retry_after_s: "int | None" = None) -> Reply:
    """An answer of DPS."""
    headers = {"content-type": "application/json; charset=utf-8", "x-ms-request-id": "r-1"}
    if retry_after_s is not None:
        headers["retry-after"] = str(retry_after_s)
    return Reply(status, headers, to_json(value).encode(), None)


def error(code: int, message: str, retry_after_s: "int | None" = None) -> Reply:
    """DPS's error of this six-digit code."""
    return reply(code // 1000, {"errorCode": code, "trackingId": "t-1", "message": message}, retry_after_s)


CHALLENGE = reply(
    401,
    {
        "message": "Authorization required",
        "authenticationKey": BLOB,
        "unencryptedAuthenticationKey": None,
        "keyName": "registration",
    },
)
ASSIGNING = reply(202, {"operationId": "4.abc", "status": "assigning"}, 3)
ASSIGNING_LOOKUP = reply(200, {"registrationId": DEVICE, "status": "assigning"}, 3)
ASSIGNING_OPERATION = reply(
    202,
    {
        "operationId": "4.abc",
        "status": "assigning",
        "registrationState": {"registrationId": DEVICE, "status": "assigning"},
    },
    3,
)
NOT_ENROLLED = error(404201, "enrolment not found")
UNAUTHORIZED = error(401002, "Unauthorized")


class Assigned:
    """What DPS says of one hub, and the record that a device stores."""

    def __init__(self, hub: str) -> None:
        state = {
            "tpm": {"authenticationKey": BLOB},
            "registrationId": DEVICE,
            "createdDateTimeUtc": "2027-01-15T08:00:00.1234567Z",
            "assignedHub": hub,
            "deviceId": DEVICE,
            "status": "assigned",
            "substatus": "initialAssignment",
            "lastUpdatedDateTimeUtc": "2027-01-15T08:00:00.1234567Z",
            "etag": "e-1",
        }
        self.hub = hub
        self.lookup = reply(200, state)
        self.operation = reply(200, {"operationId": "4.abc", "status": "assigned", "registrationState": state})
        held = Assignment(
            id_scope=SCOPE,
            endpoint=ENDPOINT,
            registration_id=DEVICE,
            assigned_hub=hub,
            device_id=DEVICE,
            wrapped_key=WRAPPED_KEY,
            ek_name=object_name(ENDORSEMENT_KEY),
            srk_name=object_name(STORAGE_ROOT_KEY),
            status="assigned",
            substatus="initialAssignment",
            etag="e-1",
            created_utc="2027-01-15T08:00:00.1234567Z",
            last_updated_utc="2027-01-15T08:00:00.1234567Z",
            assigned_at_s=NOW_S,
            payload=None,
            payload_omitted=False,
            attestation=TPM,
            chain="",
        )
        self.record = encode(held) + SIGNATURE


FIRST_HUB = Assigned("first.azure-devices.net")
SECOND_HUB = Assigned("second.azure-devices.net")
TWIN = b'{"desired":{"$version":1},"reported":{"$version":1}}'
