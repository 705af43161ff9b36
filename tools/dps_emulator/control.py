"""Commands to a running emulator: what they do, and the socket in the state folder through which they come.

A request is one JSON object on a line: `{"command": …, …}`; so is the answer: `{"result": {…}}` or
`{"error": {"code": …, "message": …}}`. Only its owner can use the socket.
"""

import asyncio
import base64
import contextlib
import json
import os
import socket
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

from dps_emulator.enrollments import is_device_id
from dps_emulator.faults import FaultScriptError, fault_script
from dps_emulator.hub import ARGUMENT_INVALID, MESSAGE_LIFE_S, METHOD_TIMEOUT, Hub, HubError, MethodAnswer
from dps_emulator.hub_server import HubServer
from dps_emulator.registrations import StateError
from dps_emulator.twin import PatchError

SOCKET_NAME = "control.sock"
MAX_REQUEST_BYTES = 1024 * 1024
ANSWER_DEADLINE_S = 10.0
KEY_BYTES = 32
STATE_FAILED = 500001

Request = dict[str, Any]
Result = dict[str, Any]


class ControlError(Exception):
    """A command that failed; `code` is one of the hub's error codes, 0: no emulator answered."""

    def __init__(self, message: str, code: int = 0) -> None:
        super().__init__(message)
        self.code = code


class NotServed(ControlError):
    """No emulator serves the state folder."""


class Control:
    """The commands, on the loop of the server they act on."""

    def __init__(self, server: HubServer, set_faults: Callable[[Any], None]) -> None:
        """`set_faults` puts a FaultScript into force."""
        self._server = server
        self._hubs = server.hubs
        self._set_faults = set_faults
        self._commands: dict[str, Callable[[Request], Awaitable[Result]]] = {
            "send-c2d": self._send,
            "invoke": self._invoke,
            "twin": self._twin,
            "messages": self._messages,
            "devices": self._devices,
            "hubs": self._names,
            "add": self._add,
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
        life_s = float(request.get("lifeS") or MESSAGE_LIFE_S)
        message_id = hub.send(request["device"], payload, properties, self._server.now(), life_s)
        return {"hub": hub.name, "messageId": message_id}

    async def _invoke(self, request: Request) -> Result:
        hub, timeout_s = self._hub(request), float(request.get("timeoutS") or 30)
        answer: asyncio.Future[MethodAnswer | HubError] = asyncio.get_running_loop().create_future()

        def answered(said: MethodAnswer | HubError) -> None:
            if not answer.done():
                answer.set_result(said)

        payload = json.dumps(request["payload"]).encode() if "payload" in request else b""
        give_up = hub.invoke(request["device"], request["method"], payload, answered)
        try:
            async with asyncio.timeout(timeout_s):
                said = await answer
        except TimeoutError:
            raise HubError(METHOD_TIMEOUT, f"'{request['device']}' did not answer within {timeout_s:g} s") from None
        finally:
            give_up()
        if isinstance(said, HubError):
            raise said
        return {"hub": hub.name, "status": said.status, "payload": said.payload}

    async def _twin(self, request: Request) -> Result:
        hub = self._hub(request)
        device = hub.device(request["device"])
        if "desired" in request:
            if not isinstance(request["desired"], dict):
                raise HubError(ARGUMENT_INVALID, "the desired properties are not a JSON object")
            hub.set_desired(device.device_id, request["desired"])
        return {"hub": hub.name, "deviceId": device.device_id, "properties": device.twin.document()}

    async def _messages(self, request: Request) -> Result:
        wanted = request.get("device")
        kept = self._hubs.context.messages.all()
        return {"messages": [message.to_json() for message in kept if wanted in (None, message.device_id)]}

    async def _devices(self, request: Request) -> Result:
        listed = []
        for hub in self._hubs.all():
            for device in hub.known_devices():
                listed.append(
                    {
                        "hub": hub.name,
                        "deviceId": device.device_id,
                        "connected": device.device_id.lower() in hub.links,
                        "enabled": device.enabled,
                        "hasKey": hub.key_of(device) is not None,
                        "waiting": len(device.queue),
                    }
                )
        return {"devices": listed}

    async def _names(self, request: Request) -> Result:
        return {"hubs": [hub.name for hub in self._hubs.all()]}

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


def control_socket(state_dir: Path) -> socket.socket:
    """Binds the socket in `state_dir`, where requests wait from now on; raises OSError."""
    path = state_dir / SOCKET_NAME
    path.unlink(missing_ok=True)
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        os.fchmod(listening.fileno(), 0o600)  # of the name that bind() makes: others may be able to enter the folder
        with _reachable(path) as address:
            listening.bind(address)
        listening.listen()
    except OSError:
        listening.close()
        raise
    return listening


def call(state_dir: Path, request: Request, deadline_s: float = ANSWER_DEADLINE_S) -> Result:
    """Sends one request to the emulator that serves `state_dir`; raises ControlError."""
    path = state_dir / SOCKET_NAME
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
            client.settimeout(deadline_s)
            with _reachable(path) as address:
                client.connect(address)
            client.sendall(json.dumps(request).encode() + b"\n")
            with client.makefile("rb") as lines:
                answer = json.loads(lines.readline())
    except (FileNotFoundError, ConnectionRefusedError):
        raise NotServed(f"no emulator serves {state_dir}: start 'dps-emulator serve --state-dir' with it") from None
    except (OSError, ValueError) as error:
        raise ControlError(f"the emulator that serves {state_dir} did not answer: {error}") from None
    return unwrap(answer)


def unwrap(answer: dict[str, Any]) -> Result:
    """An answer's result; raises ControlError with its error."""
    if "error" in answer:
        raise ControlError(answer["error"]["message"], answer["error"]["code"])
    result: Result = answer["result"]
    return result


def _failed(code: int, message: str) -> dict[str, Any]:
    return {"error": {"code": code, "message": message}}


def _credentials(hub: Hub, device_id: str, key: bytes) -> Result:
    text = f"HostName={hub.name};DeviceId={device_id};SharedAccessKey={base64.b64encode(key).decode()}"
    return {"hub": hub.name, "deviceId": device_id, "connectionString": text}


@contextlib.contextmanager
def _reachable(path: Path) -> Iterator[str]:
    """An address for a socket at `path`, which may be longer than the 107 bytes that an address has."""
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)
