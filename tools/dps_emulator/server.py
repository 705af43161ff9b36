"""The service on the wire: HTTPS on one port, faults made real, one log line for each request."""

import asyncio
import contextlib
import socket
import ssl
import struct
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from urllib.parse import quote, unquote

import trustme
import uvicorn
from starlette.requests import ClientDisconnect
from starlette.requests import Request as WireRequest
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from dps_emulator.faults import Fault, FaultScript
from dps_emulator.registrations import utc_text
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
from dps_emulator.state import StateError

DPS_HOST = "global.azure-devices-provisioning.net"
# The C client never reconnects within a registration: the connection must outlive its longest Retry-After, 300 s.
KEEP_ALIVE_S = 330
_ABORT = struct.pack("ii", 1, 0)  # struct linger: on, 0 s: close() sends RST


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
            f" registration_id={quote(self.registration_id, safe=':') or '-'} status={self.status}"
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
    """One listening port; made, `run` until `stop`."""

    def __init__(
        self,
        service: DpsService,
        authority: trustme.CA,
        *,
        listen: str = "127.0.0.1",
        port: int = 0,
        faults: FaultScript | None = None,
        log: Callable[[LogLine], None] = lambda line: None,
        notice: Callable[[str], None] = lambda text: None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Binds the port at once (0: a free one); raises OSError. `clock` returns Unix seconds."""
        self.service = service
        self.faults = faults or FaultScript()
        self._log = log
        self._notice = notice
        self._clock = clock
        family = socket.AF_INET6 if ":" in listen else socket.AF_INET
        self._socket = socket.create_server((listen, port), family=family, backlog=256)
        # Accepted connections inherit it; asyncio sets it only where the socket names its protocol. 40 ms a request.
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.port: int = self._socket.getsockname()[1]
        names = dict.fromkeys(("localhost", "127.0.0.1", "::1", DPS_HOST, *service.settings.hubs))
        if listen not in ("0.0.0.0", "::"):
            names[listen] = None
        self._tls = server_tls(authority, list(names))
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
            self._server.run(sockets=[self._socket])
        finally:
            self._socket.close()

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
                scope["raw_path"].decode("ascii"),
                scope["query_string"].decode("ascii", "replace"),
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
            request_id = str(uuid.uuid4())
            refusal = refusal_response(RefusalError(INTERNAL_ERROR, "The emulator's state failed."), request_id, now)
            headers = (*refusal.headers, *standard_headers(request_id, now))
            return replace(refusal, headers=headers, request_id=request_id, notice=str(error))


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
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _ABORT)
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
