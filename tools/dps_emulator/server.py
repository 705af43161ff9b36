"""The service on the wire: HTTPS on one port, faults made real, one log line for each request; the hubs beside it."""

import asyncio
import contextlib
import os
import socket
import ssl
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import trustme
import uvicorn
from starlette.requests import ClientDisconnect
from starlette.requests import Request as WireRequest
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from dps_emulator.control import Control, control_socket
from dps_emulator.faults import Fault, FaultScript
from dps_emulator.hub import HubContext, HubLine, Hubs
from dps_emulator.hub_devices import FILE_LIMIT_BYTES, BoundedFile, HubDevice, MessageFile, MessagesInMemory
from dps_emulator.hub_server import ABORT, HubServer, place
from dps_emulator.quotas import Gate
from dps_emulator.registrations import StateError, utc_text
from dps_emulator.service import (
    INTERNAL_ERROR,
    MAX_BODY_BYTES,
    DpsService,
    RefusalError,
    Request,
    Response,
    refusal_response,
    standard_headers,
    target_of,
)
from dps_emulator.state import hub_folder

DPS_HOST = "global.azure-devices-provisioning.net"
# The C client never reconnects within a registration: the connection must outlive its longest Retry-After, 300 s.
KEEP_ALIVE_S = 330
_ID_LIMIT = 200  # characters of a line that a client may have chosen; a registration id has 128 at most


@dataclass(frozen=True)
class LogLine:
    """One request as the log shows it; never a token or a key."""

    time: str
    method: str
    operation: str  # register, operation, lookup, or empty
    registration_id: str
    status: int
    error_code: int  # 0: none
    fault: int  # the fault script's entry, 0: none
    request_id: str

    def text(self) -> str:
        """The line: the time, then name=value, `-` for what is not there, ids percent-encoded."""
        return (
            f"{self.time} method={quote(self.method)} operation={self.operation or '-'}"
            f" registration_id={quote(self.registration_id[:_ID_LIMIT], safe=':') or '-'} status={self.status}"
            f" error={self.error_code or '-'} fault={self.fault or '-'} request_id={self.request_id}"
        )

    @classmethod
    def parse(cls, text: str) -> "LogLine | None":
        """The inverse of `text`; None for any other line."""
        when, *pairs = text.split()
        values = {name: value for name, _, value in (pair.partition("=") for pair in pairs)}
        if list(values) != ["method", "operation", "registration_id", "status", "error", "fault", "request_id"]:
            return None
        values = {name: "" if value == "-" else unquote(value) for name, value in values.items()}
        return cls(
            when,
            values["method"],
            values["operation"],
            values["registration_id"],
            int(values["status"]),
            int(values["error"] or 0),
            int(values["fault"] or 0),
            values["request_id"],
        )


class _Protocol(H11Protocol):
    """uvicorn's HTTP/1.1, which hands its transport to the application: a fault must reach the connection."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.app_state = {**self.app_state, "transport": transport}
        super().connection_made(transport)

    def shutdown(self) -> None:
        # A polite close waits for the client's goodbye, a slow answer for its end: neither may hold up a stop.
        self.transport.abort()


class EmulatorServer:
    """A listening port for DPS and one for the hubs; made, `run` until `stop`."""

    def __init__(
        self,
        service: DpsService,
        authority: trustme.CA,
        *,
        listen: str = "127.0.0.1",
        port: int = 0,
        hub_port: int = 0,
        state_dir: Path | None = None,
        messages_limit_bytes: int = FILE_LIMIT_BYTES,
        faults: FaultScript | None = None,
        log: Callable[[LogLine], None] = lambda line: None,
        hub_log: Callable[[HubLine], None] = lambda line: None,
        notice: Callable[[str], None] = lambda text: None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Binds the ports at once (0: a free one); raises OSError. `clock` returns Unix seconds.

        With a `state_dir` the hubs keep there what they know, and take commands at a socket in it.
        """
        self.service = service
        self.faults = faults or FaultScript()
        self._log = log
        self._notice = notice
        self._clock = clock
        with contextlib.ExitStack() as failed:  # a port in use leaves no socket behind
            self._socket = failed.enter_context(_listening(listen, port))
            self._hub_socket = failed.enter_context(_listening(listen, hub_port))
            self._control_socket = None if state_dir is None else failed.enter_context(control_socket(state_dir))
            failed.pop_all()
        self.port: int = self._socket.getsockname()[1]
        self.hub_port: int = self._hub_socket.getsockname()[1]
        own_names = ["localhost", "127.0.0.1", "::1", *([] if listen in ("0.0.0.0", "::") else [listen])]
        self._tls = server_tls(authority, [*own_names, DPS_HOST, *service.settings.hubs])
        self.hubs = _hubs(service, state_dir, hub_log, messages_limit_bytes)
        hub_tls = server_tls(authority, [*own_names, *service.settings.hubs])
        chosen = service.settings
        gate = Gate(chosen.connects_per_s, chosen.connect_queue_s) if chosen.connects_per_s else None
        self._hub_server = HubServer(self.hubs, hub_tls, self._hub_socket, lambda: self.faults, clock, notice, gate)
        self._control = Control(self._hub_server, self.set_faults)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._serving = threading.Event()
        config = uvicorn.Config(
            self,
            interface="asgi3",
            http=_Protocol,
            ws="none",
            lifespan="off",
            loop="asyncio",
            log_config=None,
            access_log=False,
            server_header=False,
            date_header=False,  # the service sends its own
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=1,
        )
        config.load()
        config.ssl = self._tls
        self._server = uvicorn.Server(config)

    def run(self) -> None:
        """Serves until `stop`, which may come from a signal handler or another thread."""
        try:
            asyncio.run(self._run())
        finally:
            for listening in (self._socket, self._hub_socket, self._control_socket):
                if listening:
                    listening.close()

    async def _run(self) -> None:
        self._loop = asyncio.get_running_loop()
        async with contextlib.AsyncExitStack() as started:
            started.push_async_callback(self._hub_server.close)
            await self._hub_server.start()
            if self._control_socket is not None:
                started.callback((await self._control.serve(self._control_socket)).close)
            self._serving.set()
            await self._server.serve(sockets=[self._socket])

    def command(self, request: dict[str, Any], deadline_s: float) -> dict[str, Any]:
        """Does what `Control` does with `request`, from another thread than the one that runs this."""
        if not self._serving.wait(deadline_s) or self._loop is None:
            raise TimeoutError(f"the emulator did not start within {deadline_s} s")
        return asyncio.run_coroutine_threadsafe(self._control.answer(request), self._loop).result(deadline_s)

    def set_faults(self, script: FaultScript) -> None:
        """Puts another fault script into force."""
        self.faults = script

    def stop(self) -> None:
        """Ends `run` within two seconds, requests under way included."""
        self._server.should_exit = True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request, as ASGI."""
        wire = WireRequest(scope, receive)
        with contextlib.suppress(ClientDisconnect):
            body = await _body(wire)
            request = Request(
                wire.method,
                scope["raw_path"].decode("latin-1"),
                scope["query_string"].decode("latin-1"),
                dict(wire.headers),
                body,
            )
            target = target_of(request.path)
            entry, fault = self.faults.take(request.method, target.operation) or (0, Fault())
            await _pause(fault.delay_s, receive)
            if fault.replaces_answer:
                response = fault.answer(str(uuid.uuid4()), self._clock())
            else:
                response = self._answer(request)
            if response.notice:
                self._notice(response.notice)
            self._log(
                LogLine(
                    utc_text(self._clock()),
                    request.method,
                    target.operation,
                    target.registration_id,
                    response.status,
                    response.error_code,
                    entry,
                    response.request_id,
                )
            )
            await _deliver(response, fault, scope["state"]["transport"], receive, send)

    def _answer(self, request: Request) -> Response:
        """The service's answer, or 500 where its state can't be read or written."""
        now = self._clock()
        try:
            return self.service.answer(request, now)
        except StateError as error:
            return _failed("The emulator's state failed.", str(error), now)
        except Exception as error:  # a defect of ours ends nobody else's request
            return _failed(
                "The emulator has a defect.", f"a defect, please report it: {error!r} at {place(error)}", now
            )


def _failed(message: str, notice: str, now: float) -> Response:
    request_id = str(uuid.uuid4())
    refusal = refusal_response(RefusalError(INTERNAL_ERROR, message), request_id, now)
    headers = (*refusal.headers, *standard_headers(request_id, now))
    return replace(refusal, headers=headers, request_id=request_id, notice=notice)


def _listening(listen: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in listen else socket.AF_INET
    listening = socket.create_server((listen, port), family=family, backlog=256)
    # Accepted connections inherit it; asyncio sets it only where the socket names its protocol. 40 ms a request.
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listening


def _hubs(
    service: DpsService, state_dir: Path | None, log: Callable[[HubLine], None], messages_limit_bytes: int
) -> Hubs:
    """The service's hubs, which remember in memory or in the state folder."""
    skew_s = service.settings.clock_skew_s
    if state_dir is None:
        in_memory: dict[str, dict[str, HubDevice]] = {}
        context = HubContext(MessagesInMemory(messages_limit_bytes), os.urandom, skew_s, log, service.settings.tier)
        return Hubs(service, lambda name: in_memory.setdefault(name, {}), context)
    folder = state_dir
    messages = BoundedFile(folder / "messages.jsonl", messages_limit_bytes)
    context = HubContext(MessageFile(messages), os.urandom, skew_s, log, service.settings.tier)
    return Hubs(service, lambda name: hub_folder(folder, name), context)


def server_tls(authority: trustme.CA, names: Sequence[str]) -> ssl.SSLContext:
    """TLS 1.2 or newer with a certificate for `names` (DNS names and addresses)."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    authority.issue_cert(*names).configure_cert(context)
    return context


async def _body(wire: WireRequest) -> bytes:
    """The whole body, of a GET too; beyond what the service takes it is read but not kept."""
    body = b""
    async for piece in wire.stream():
        if len(body) <= MAX_BODY_BYTES:
            body += piece
    return body


async def _deliver(
    response: Response, fault: Fault, transport: asyncio.Transport, receive: Receive, send: Send
) -> None:
    """Sends the answer as the fault says."""
    if fault.cut_after_bytes == -1:
        await _end(transport, receive, reset=fault.reset)
        return
    headers = fault.altered(response.headers)
    if not fault.chunked:
        headers.append(("Content-Length", str(len(response.body))))
    raw_headers = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers]
    await send({"type": "http.response.start", "status": response.status, "headers": raw_headers})
    body = response.body[: fault.cut_after_bytes]
    step = len(body) or 1
    if fault.drip is not None:
        step = max(1, round(fault.drip / 10))
    for at in range(0, len(body), step):
        if at and fault.drip is not None:
            await _pause(step / fault.drip, receive)
        if transport.is_closing():
            return
        await send({"type": "http.response.body", "body": body[at : at + step], "more_body": True})
    if fault.cut_after_bytes is None:
        await send({"type": "http.response.body", "body": b"", "more_body": False})
    else:
        await _end(transport, receive, reset=fault.reset)


async def _end(transport: asyncio.Transport, receive: Receive, *, reset: bool) -> None:
    """Ends the TCP connection without a TLS goodbye, as a crash does, after what was sent has left."""
    for _ in range(100):
        if transport.get_write_buffer_size() == 0:
            break
        await asyncio.sleep(0.01)
    if reset:
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, ABORT)
    transport.abort()
    await _disconnected(receive)


async def _pause(seconds: float, receive: Receive) -> None:
    """Waits, but not for a client that has gone; the body must have been read."""
    with contextlib.suppress(TimeoutError):
        if seconds:
            await asyncio.wait_for(_disconnected(receive), seconds)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
