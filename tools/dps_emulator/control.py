"""Commands to a running emulator: what they do; `control_socket` has the way that they come.

A request is one JSON object: `{"command": …, …}`; so is the answer: `{"result": {…}}` or
`{"error": {"code": …, "message": …}}`.
"""

import asyncio
import base64
import contextlib
import json
import os
import socket
from collections.abc import Awaitable, Callable, Mapping
from typing import Any
from urllib.parse import quote, urlsplit

from dps_emulator.control_socket import ANSWER_DEADLINE_S, Request, Result
from dps_emulator.enrollments import is_device_id
from dps_emulator.faults import FaultScriptError, fault_script
from dps_emulator.hub import (
    ARGUMENT_INVALID,
    DEVICE_NOT_FOUND,
    Hub,
    HubError,
)
from dps_emulator.hub_server import HubServer
from dps_emulator.hub_service_api import POLICY as HUB_POLICY
from dps_emulator.methods import invoked
from dps_emulator.registrations import StateError
from dps_emulator.service_api import POLICY, policy_key
from dps_emulator.store import Store
from dps_emulator.tokens import signed_token
from dps_emulator.twin import PatchError

MAX_REQUEST_BYTES = 1024 * 1024
MAX_WAIT_S = 30.0  # that a request for messages may wait for one
KEY_BYTES = 32
STATE_FAILED = 500001


class Control:
    """The commands, on the loop of the server they act on."""

    def __init__(
        self,
        server: HubServer,
        store: Store,
        set_faults: Callable[[Any], None],
        addresses: Mapping[str, str],
        secret: bytes,
    ) -> None:
        """`set_faults` puts a FaultScript into force; `addresses` are where DPS and hubs listen.

        `secret` is what the keys of shared access policies come from.
        """
        self._secret = secret
        self._server = server
        self._store = store
        self._addresses = addresses
        self._hubs = server.hubs
        self._set_faults = set_faults
        self._commands: dict[str, Callable[[Request], Awaitable[Result]]] = {
            "send-c2d": self._send,
            "invoke": self._invoke,
            "twin": self._twin,
            "messages": self._messages,
            "clear": self._clear,
            "devices": self._devices,
            "hubs": self._names,
            "addresses": self._listens,
            "service": self._service,
            "add": self._add,
            "token": self._token,
            "enable": self._enable,
            "disable": self._disable,
            "withdraw": self._withdraw,
            "rotate-key": self._rotate_key,
            "disconnect": self._disconnect,
            "faults": self._faults,
        }

    async def answer(self, request: Any) -> dict[str, Any]:
        """Does what a request asks for; never raises for anything in it."""
        try:
            command = self._commands.get(request["command"])
            if command is None:
                raise HubError(ARGUMENT_INVALID, "there is no such command")
            return {"result": await command(request)}
        except HubError as error:
            return _failed(error.code, str(error))
        except (StateError, OSError) as error:
            return _failed(STATE_FAILED, str(error))
        except (PatchError, FaultScriptError) as error:
            return _failed(ARGUMENT_INVALID, str(error))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            return _failed(ARGUMENT_INVALID, f"the request lacks something, or has it in another form: {error!r}")

    async def serve(self, listening: socket.socket) -> asyncio.Server:
        """Takes commands at a socket made by `control_socket`."""
        return await asyncio.start_server(self._connected, sock=listening, limit=MAX_REQUEST_BYTES)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # Cancelled when the server stops; Python 3.11's streams complain about a callback that ends so.
        with contextlib.suppress(OSError, TimeoutError, asyncio.CancelledError):
            try:
                async with asyncio.timeout(ANSWER_DEADLINE_S):
                    line = await reader.readline()
                answer = await self.answer(json.loads(line))
            except (ValueError, RecursionError):  # also of readline, for a line that is too long
                answer = _failed(ARGUMENT_INVALID, "the request is no JSON object on one line of at most 1 MiB")
            writer.write(json.dumps(answer).encode() + b"\n")
            await writer.drain()
        writer.close()

    def _hub(self, request: Request) -> Hub:
        return self._hubs.find(request["device"], request.get("hub") or "")

    async def _send(self, request: Request) -> Result:
        hub = self._hub(request)
        payload = base64.b64decode(request["payload"], validate=True)
        properties = {str(name): str(value) for name, value in (request.get("properties") or {}).items()}
        life_s = None if request.get("lifeS") is None else float(request["lifeS"])
        message_id = hub.send(request["device"], payload, properties, self._server.now(), life_s)
        return {"hub": hub.name, "messageId": message_id}

    async def _invoke(self, request: Request) -> Result:
        hub, timeout_s = self._hub(request), float(request.get("timeoutS") or 30)
        payload = json.dumps(request["payload"]).encode() if "payload" in request else b""
        said = await invoked(hub, request["device"], request["method"], payload, timeout_s, self._server.now())
        return {"hub": hub.name, "status": said.status, "payload": said.payload}

    async def _twin(self, request: Request) -> Result:
        hub = self._hub(request)
        device = hub.device(request["device"])
        if "desired" in request:
            if not isinstance(request["desired"], dict):
                raise HubError(ARGUMENT_INVALID, "the desired properties are not a JSON object")
            hub.set_desired(device.device_id, request["desired"])
        named = {"hub": hub.name, "deviceId": device.device_id, "modelId": device.model_id}
        return {**named, "properties": device.twin.document()}

    async def _messages(self, request: Request) -> Result:
        """Those behind the number `after`, or the first that comes within `waitS` seconds; `last` is the newest's."""
        wanted, messages = request.get("device"), self._store.messages
        if request.get("isKnown") and wanted is not None:
            self._require_known(wanted)
        after = int(request.get("after") or 0)
        last = messages.last_number()
        found = messages.after(after, wanted)
        if not found and request.get("waitS"):
            await self._arrival(after, min(float(request["waitS"]), MAX_WAIT_S))
            last = messages.last_number()
            found = messages.after(after, wanted)
        return {"messages": [kept.message.to_json() for kept in found], "last": last}

    async def _arrival(self, after: int, seconds: float) -> None:
        """Ends when there is a message behind `after`, whoever's, or when the time is over."""
        messages, arrived = self._store.messages, asyncio.Event()
        messages.arrived.append(arrived.set)
        try:
            async with asyncio.timeout(seconds):
                while messages.last_number() <= after:
                    arrived.clear()
                    await arrived.wait()
        except TimeoutError:
            pass
        finally:
            messages.arrived.remove(arrived.set)

    async def _clear(self, request: Request) -> Result:
        return {"cleared": self._store.messages.clear(request.get("device"), request.get("upTo"))}

    def _require_known(self, device_id: str) -> None:
        """Raises HubError for a device that no hub has, and of which there is no message either."""
        if any(hub.find(device_id) for hub in self._hubs.all()) or self._store.messages.after(0, device_id, 1):
            return
        raise HubError(DEVICE_NOT_FOUND, f"no hub has a device '{device_id}'")

    async def _devices(self, request: Request) -> Result:
        listed = []
        for hub in self._hubs.all():
            assigned = self._store.registrations.devices_at(hub.name)
            after = ""
            while page := hub.page(after):
                after = page[-1][0]
                for key, device in page:
                    if isinstance(device, StateError):
                        self._server.notice(str(device))
                        continue
                    listed.append(
                        {
                            "hub": hub.name,
                            "deviceId": device.device_id,
                            "connected": key in hub.links,
                            "enabled": device.enabled,
                            "hasKey": not device.withdrawn and (device.own_key is not None or key in assigned),
                            "waiting": len(device.queue),
                        }
                    )
                await asyncio.sleep(0)  # others have their turn
        return {"devices": listed}

    async def _names(self, request: Request) -> Result:
        return {"hubs": [hub.name for hub in self._hubs.all()]}

    async def _listens(self, request: Request) -> Result:
        return dict(self._addresses)

    async def _service(self, request: Request) -> Result:
        """What a back end needs to call the service API."""
        port = urlsplit(self._addresses["dps"]).port
        policy = HUB_POLICY if request.get("ofHubs") else POLICY
        key = base64.b64encode(policy_key(self._secret, policy)).decode()
        return {"connectionString": f"HostName=localhost:{port};SharedAccessKeyName={policy};SharedAccessKey={key}"}

    async def _add(self, request: Request) -> Result:
        device_id = request["device"]
        if not is_device_id(device_id):
            raise HubError(ARGUMENT_INVALID, f"'{device_id}' is no device id")
        hub = self._hubs.find(device_id, request.get("hub") or self._hubs.all()[0].name)
        encoded = request.get("key")
        key = os.urandom(KEY_BYTES) if encoded is None else base64.b64decode(encoded, validate=True)
        if not key:
            raise HubError(ARGUMENT_INVALID, "the key is empty")
        hub.add(device_id, key)
        return _credentials(hub, device_id, key)

    async def _token(self, request: Request) -> Result:
        """What a device that has its key would sign for itself."""
        hub = self._hub(request)
        device = hub.device(request["device"])
        credential = hub.credential_of(device)
        if credential is None or not credential.keys:
            raise HubError(ARGUMENT_INVALID, f"'{device.device_id}' has a certificate, and signs no tokens")
        resource = quote(f"{hub.name}/devices/{device.device_id}", safe="")
        expires_at_s = int(self._server.now() + float(request["lifeS"]))
        return {"hub": hub.name, "token": signed_token(credential.keys[0], resource, expires_at_s)}

    async def _enable(self, request: Request) -> Result:
        return self._set_enabled(request, True)

    async def _disable(self, request: Request) -> Result:
        return self._set_enabled(request, False)

    def _set_enabled(self, request: Request, enabled: bool) -> Result:
        hub = self._hub(request)
        hub.enable(request["device"], enabled, self._server.now())
        return {"hub": hub.name, "deviceId": request["device"], "enabled": enabled}

    async def _withdraw(self, request: Request) -> Result:
        hub = self._hub(request)
        hub.withdraw(request["device"], self._server.now())
        return {"hub": hub.name, "deviceId": request["device"]}

    async def _rotate_key(self, request: Request) -> Result:
        hub, key = self._hub(request), os.urandom(KEY_BYTES)
        device = hub.device(request["device"])
        self._hubs.rotate_key(device.device_id, hub.name, key)
        if device.own_key is None:  # the TPM alone is to get it
            return {"hub": hub.name, "deviceId": device.device_id}
        return _credentials(hub, device.device_id, key)

    async def _disconnect(self, request: Request) -> Result:
        hub = self._hub(request)
        reason = request.get("reason") or "the operator ended the connection"
        return {"hub": hub.name, "wasConnected": hub.disconnect(request["device"], reason, self._server.now())}

    async def _faults(self, request: Request) -> Result:
        script = fault_script(request["script"])
        self._set_faults(script)
        return {"entries": len(script.faults)}


def _failed(code: int, message: str) -> dict[str, Any]:
    return {"error": {"code": code, "message": message}}


def _credentials(hub: Hub, device_id: str, key: bytes) -> Result:
    text = f"HostName={hub.name};DeviceId={device_id};SharedAccessKey={base64.b64encode(key).decode()}"
    return {"hub": hub.name, "deviceId": device_id, "connectionString": text}
