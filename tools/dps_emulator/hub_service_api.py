"""The service side of the hubs over HTTP: devices, twins, queries and direct methods, for back ends.

Source: IoT Hub service API 2021-04-12. Whoever calls has the shared access policy `iothubowner`. A query is
`SELECT * FROM devices`, with `WHERE` and conditions joined by AND: a property (deviceId, status, connectionState,
tags.…, properties.desired.…, properties.reported.…), `=` or `!=`, and a JSON value or a text in single quotes.
"""

import base64
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any
from urllib.parse import unquote

from dps_emulator.attestation import NEW_KEY_BYTES, Credential, KeyTextError, key_of, key_text
from dps_emulator.enrollments import is_device_id
from dps_emulator.hub import (
    ARGUMENT_INVALID,
    DEVICE_EXISTS,
    DEVICE_NOT_FOUND,
    TOO_LARGE,
    Hub,
    HubError,
    Hubs,
)
from dps_emulator.hub_devices import HubDevice
from dps_emulator.json_text import parse_json, parse_object
from dps_emulator.methods import invoked
from dps_emulator.registrations import StateError
from dps_emulator.service import MAX_BODY_BYTES, Request, Response, json_response, standard_headers
from dps_emulator.service_api import policy_key, policy_refusal
from dps_emulator.twin import PatchError
from dps_text import whole_number

POLICY = "iothubowner"
UNAUTHORIZED = 401002
NO_SUCH_PATH = 404000
PRECONDITION_FAILED = 412001
METHOD_TIMEOUT_S = 30.0
MAX_METHOD_TIMEOUT_S = 300.0
PAGE_LIMIT = 1000

_QUERY = re.compile(r"select\s+\*\s+from\s+devices(?:\s+where\s+(?P<where>.+))?", re.IGNORECASE | re.DOTALL)
_CONDITION = re.compile(r"(?P<name>[A-Za-z$][\w$.-]*)\s*(?P<operator>=|!=|<>)\s*(?P<value>'[^']*'|\S+)")
_THUMBPRINT = re.compile(r"[0-9A-Fa-f]{40}|[0-9A-Fa-f]{64}")


class HubServiceApi:
    """The service API of all hubs; the host that a request names is its hub, any other name the first one's."""

    def __init__(self, hubs: Hubs, secret: bytes, clock: Callable[[], float]) -> None:
        self._hubs = hubs
        self._key = policy_key(secret, POLICY)
        self._clock = clock

    @staticmethod
    def takes(path: str) -> bool:
        """Whether a path is one of this API."""
        return path.split("/")[1:2] in (["devices"], ["twins"])

    async def answer(self, request: Request) -> Response:
        """Answers one request, a direct method when the device has; raises StateError alone."""
        request_id = os.urandom(16).hex()
        try:
            response = await self._answer(request)
        except HubError as error:
            response = _error(error.code // 1000, error.code, str(error), request_id)
        except PatchError as error:
            response = _error(error.status, ARGUMENT_INVALID, str(error), request_id)
        headers = (*response.headers, *standard_headers(request_id, self._clock()))
        return replace(response, headers=headers, request_id=request_id)

    async def _answer(self, request: Request) -> Response:
        refusal = policy_refusal(request, POLICY, self._key, self._clock(), self._hubs.context.clock_skew_s)
        if refusal:
            raise HubError(UNAUTHORIZED, f"unauthorised: {refusal}")
        hub = self._hub(request)
        if_match = request.headers.get("if-match")
        match request.method, [unquote(segment) for segment in request.path.split("/")[1:]]:
            case "GET", ["devices"]:
                return json_response(200, [self._identity(hub, device) for device in self._devices(hub)[:PAGE_LIMIT]])
            case "POST", ["devices", "query"]:
                return self._query(hub, request)
            case "GET", ["devices", name]:
                return json_response(200, self._identity(hub, hub.device(name)))
            case "PUT", ["devices", name]:
                return json_response(200, self._put(hub, name, _object(request), if_match))
            case "DELETE", ["devices", name]:
                device = hub.device(name)
                _require_match(if_match or "*", _identity_etag(hub, device))
                if device.own_credential is None:
                    hub.withdraw(name, self._clock())
                else:
                    hub.remove(name, self._clock())
                return Response(204, (), b"")
            case "GET", ["twins", name]:
                return json_response(200, self._twin(hub, hub.device(name)))
            case "PATCH", ["twins", name]:
                return json_response(200, self._patch(hub, name, _object(request), if_match))
            case "POST", ["twins", name, "methods"]:
                return json_response(200, await self._invoke(hub, name, _object(request)))
        raise HubError(NO_SUCH_PATH, f"the emulator has no {request.method} at this path")

    def _hub(self, request: Request) -> Hub:
        hubs = self._hubs.all()
        named = hub_named(request.headers.get("host", ""), [hub.name for hub in hubs])
        return next((hub for hub in hubs if hub.name == named), hubs[0])

    def _devices(self, hub: Hub) -> list[HubDevice]:
        """All that the hub knows, in the order of their ids."""
        names = set(self._hubs.service.registrations.devices_at(hub.name))
        after = ""
        while page := hub.page(after):
            after = page[-1][0]
            names |= {key for key, device in page if not isinstance(device, StateError)}
        found = (hub.find(name) for name in sorted(names))
        return [device for device in found if device and hub.credential_of(device) is not None]

    # --- identities

    def _identity(self, hub: Hub, device: HubDevice) -> dict[str, Any]:
        """A Device of the registry, with its keys."""
        return {
            "deviceId": device.device_id,
            "etag": _identity_etag(hub, device),
            "status": "enabled" if device.enabled else "disabled",
            "connectionState": _state(hub, device),
            "cloudToDeviceMessageCount": len(device.queue),
            "authentication": _authentication(hub.credential_of(device) or Credential()),
        }

    def _put(self, hub: Hub, name: str, given: dict[str, Any], if_match: str | None) -> dict[str, Any]:
        """Registers a device, or with If-Match changes one."""
        if not is_device_id(name) or str(given.get("deviceId", name)) != name:
            raise HubError(ARGUMENT_INVALID, f"'{name}' is no device id, or not the body's")
        known = hub.find(name)
        if known and hub.credential_of(known) is None:
            known = None
        if if_match is None and known:
            raise HubError(DEVICE_EXISTS, f"{hub.name} already has a device '{known.device_id}'")
        if if_match is not None:
            _require_match(if_match, _identity_etag(hub, known) if known else None)
        changes = _given_credential(given.get("authentication"), hub.credential_of(known) if known else None)
        enabled = given.get("status", "enabled")
        if enabled not in ("enabled", "disabled"):
            raise HubError(ARGUMENT_INVALID, "status is neither enabled nor disabled")
        changes["enabled"] = enabled == "enabled"
        if known:
            hub.change(known, **changes)
        else:
            hub.adopt(HubDevice(name, **changes))
        if not changes["enabled"]:
            hub.disconnect(name, "the device was disabled", self._clock())
        return self._identity(hub, hub.device(name))

    # --- twins

    def _twin(self, hub: Hub, device: HubDevice) -> dict[str, Any]:
        return {
            "deviceId": device.device_id,
            "etag": _twin_etag(device),
            "version": device.twin.version,
            "status": "enabled" if device.enabled else "disabled",
            "connectionState": _state(hub, device),
            "cloudToDeviceMessageCount": len(device.queue),
            "authenticationType": _authentication(hub.credential_of(device) or Credential())["type"],
            "modelId": device.model_id,
            "tags": device.twin.tags,
            "properties": device.twin.document(),
        }

    def _patch(self, hub: Hub, name: str, patch: dict[str, Any], if_match: str | None) -> dict[str, Any]:
        """Merges tags and desired properties."""
        device = hub.device(name)
        _require_match(if_match or "*", _twin_etag(device))
        properties = patch.get("properties")
        desired = properties.get("desired") if isinstance(properties, dict) else None
        tags = patch.get("tags")
        for part in (desired, tags):
            if part is not None and not isinstance(part, dict):
                raise HubError(ARGUMENT_INVALID, "tags or properties.desired are not a JSON object")
        desired = {key: value for key, value in (desired or {}).items() if not key.startswith("$")}
        device.twin.patched("desired", desired)  # neither part is changed where the other is refused
        if tags:
            hub.change(device, twin=device.twin.patched("tags", tags))
        if desired:
            hub.set_desired(name, desired)
        return self._twin(hub, device)

    def _query(self, hub: Hub, request: Request) -> Response:
        found = _QUERY.fullmatch(str(_object(request).get("query", "")).strip())
        if found is None:
            raise HubError(
                ARGUMENT_INVALID, "the query is not SELECT * FROM devices [WHERE …], which the emulator has alone"
            )
        conditions = _conditions(found["where"] or "")
        twins = [self._twin(hub, device) for device in self._devices(hub)]
        matching = [twin for twin in twins if all(_holds(twin, *condition) for condition in conditions)]
        asked = whole_number(request.headers.get("x-ms-max-item-count", str(PAGE_LIMIT)), 1, 10**12)
        begin = whole_number(request.headers.get("x-ms-continuation", "0"), 0, 10**12)
        if asked is None or begin is None:
            raise HubError(ARGUMENT_INVALID, "x-ms-max-item-count or x-ms-continuation is no number")
        end = begin + min(asked, PAGE_LIMIT)
        more = (("x-ms-continuation", str(end)),) if end < len(matching) else ()
        return json_response(200, matching[begin:end], ("x-ms-item-type", "twin"), *more)

    async def _invoke(self, hub: Hub, name: str, given: dict[str, Any]) -> dict[str, Any]:
        method, timeout_s = given.get("methodName"), given.get("responseTimeoutInSeconds") or METHOD_TIMEOUT_S
        if not isinstance(method, str) or not method:
            raise HubError(ARGUMENT_INVALID, "methodName is missing")
        if (
            isinstance(timeout_s, bool)
            or not isinstance(timeout_s, int | float)
            or not 0 < timeout_s <= MAX_METHOD_TIMEOUT_S
        ):
            raise HubError(ARGUMENT_INVALID, f"responseTimeoutInSeconds is no number up to {MAX_METHOD_TIMEOUT_S:g}")
        payload = b"" if given.get("payload") is None else json.dumps(given["payload"]).encode()
        said = await invoked(hub, name, method, payload, timeout_s, self._clock())
        return {"status": said.status, "payload": said.payload}


def hub_named(host: str, names: Iterable[str]) -> str | None:
    """Which of the hubs `names` a request's Host is; None: another name."""
    name = (host.rpartition(":")[0] or host).lower()
    return next((each for each in names if each.lower() == name), None)


def _error(status: int, code: int, message: str, request_id: str) -> Response:
    """An error in the form of hubs."""
    content = {"Message": f"ErrorCode:{code};{message}", "ExceptionMessage": f"Tracking ID:{request_id}"}
    return json_response(status, content, error_code=code)


def _authentication(credential: Credential) -> dict[str, Any]:
    if credential.authorities:
        return {"type": "certificateAuthority"}
    if credential.thumbprints:
        first, second = [*credential.thumbprints, None][:2]
        return {"type": "selfSigned", "x509Thumbprint": {"primaryThumbprint": first, "secondaryThumbprint": second}}
    keys = [key_text(key) for key in credential.keys]
    return (
        {"type": "sas", "symmetricKey": {"primaryKey": keys[0], "secondaryKey": keys[-1]}} if keys else {"type": "none"}
    )


def _given_credential(authentication: object, current: Credential | None) -> dict[str, Any]:
    """A device's own credential, as fields of HubDevice: what was given, or new keys; none where it stays."""
    given = authentication if isinstance(authentication, dict) else {}
    if current and (authentication is None or (given.get("type") == "certificateAuthority" and current.authorities)):
        return {}
    if given.get("type") == "certificateAuthority":
        raise HubError(ARGUMENT_INVALID, "a device by a CA's certificate comes from DPS alone in this emulator")
    thumbprint = given.get("x509Thumbprint")
    if given.get("type") == "selfSigned" and isinstance(thumbprint, dict):
        named = [
            str(thumbprint[name]).upper()
            for name in ("primaryThumbprint", "secondaryThumbprint")
            if thumbprint.get(name)
        ]
        if not named or not all(_THUMBPRINT.fullmatch(each) for each in named):
            raise HubError(ARGUMENT_INVALID, "a thumbprint is not 40 or 64 digits in hex")
        return {"own_key": b"", "own_secondary": None, "own_thumbprints": tuple(named)}
    keys = given.get("symmetricKey")
    keys = keys if isinstance(keys, dict) else {}
    try:
        primary = key_of(keys["primaryKey"]) if keys.get("primaryKey") else None
        secondary = key_of(keys["secondaryKey"]) if keys.get("secondaryKey") else None
    except KeyTextError as error:
        raise HubError(ARGUMENT_INVALID, f"a symmetric key {error}") from None
    first, second = (current.keys[0], current.keys[-1]) if current and current.keys else (None, None)
    primary = primary or first or os.urandom(NEW_KEY_BYTES)
    return {"own_key": primary, "own_secondary": secondary or second or primary, "own_thumbprints": ()}


def _state(hub: Hub, device: HubDevice) -> str:
    return "Connected" if device.device_id.lower() in hub.links else "Disconnected"


def _identity_etag(hub: Hub, device: HubDevice) -> str:
    credential = hub.credential_of(device)
    return _etag([device.device_id, device.enabled, credential.to_json() if credential else None])


def _twin_etag(device: HubDevice) -> str:
    return _etag([device.device_id, device.twin.desired_version, device.twin.tags])


def _etag(content: object) -> str:
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).digest()
    return base64.b64encode(digest[:6]).decode()


def _require_match(if_match: str, current: str | None) -> None:
    """Raises HubError where If-Match names another version than the one that is there."""
    wanted = if_match.strip().removeprefix('"').removesuffix('"')
    if current is None:
        raise HubError(DEVICE_NOT_FOUND, "there is no such device")
    if wanted not in ("*", current):
        raise HubError(PRECONDITION_FAILED, "If-Match is not the etag of what is there")


def _conditions(where: str) -> list[tuple[str, bool, Any]]:
    """Names, whether they are to be equal, and values."""
    listed: list[tuple[str, bool, Any]] = []
    for text in re.split(r"\sand\s", where.strip(), flags=re.IGNORECASE) if where.strip() else ():
        found = _CONDITION.fullmatch(text.strip())
        try:
            if found is None:
                raise ValueError
            value = found["value"]
            parsed = value[1:-1] if value.startswith("'") else parse_json(value.encode())
        except ValueError:
            raise HubError(
                ARGUMENT_INVALID, f"the emulator does not know the condition '{text.strip()[:200]}'"
            ) from None
        listed.append((found["name"].removeprefix("devices."), found["operator"] == "=", parsed))
    return listed


def _holds(twin: Mapping[str, Any], name: str, equal: bool, value: Any) -> bool:
    at: Any = twin
    for part in name.split("."):
        at = at.get(part) if isinstance(at, dict) else None
    return (at == value and type(at) is type(value)) == equal


def _object(request: Request) -> dict[str, Any]:
    if len(request.body) > MAX_BODY_BYTES:
        raise HubError(TOO_LARGE, f"the body is larger than {MAX_BODY_BYTES} bytes")
    try:
        return parse_object(request.body)
    except ValueError as error:
        raise HubError(ARGUMENT_INVALID, f"the body is not {error}") from None
