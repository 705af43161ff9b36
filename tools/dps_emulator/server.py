"""The service on the wire: HTTPS on one port, faults made real, one log line for each request; the hubs beside it."""

import asyncio
import contextlib
import errno
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote

import trustme

from dps_emulator.control import Control
from dps_emulator.control_socket import control_socket
from dps_emulator.faults import Fault, FaultScript
from dps_emulator.http_protocol import HttpConnection
from dps_emulator.hub import HubContext, HubLine, Hubs
from dps_emulator.hub_server import ABORT, HubServer, defect
from dps_emulator.hub_service_api import HubServiceApi
from dps_emulator.limits import BURST_S
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
from dps_emulator.service_api import ServiceApi
from dps_emulator.store import Store
from dps_emulator.telemetry_feed import Asked, TelemetryFeed, document
from dps_emulator.tls_stream import streams

if TYPE_CHECKING:
    from dps_emulator.web.site import Site

# What clients of DPS have built in: the global endpoint, and those of services.
DPS_NAMES = ("global.azure-devices-provisioning.net", "*.azure-devices-provisioning.net")
# The C client never reconnects within a registration: the connection must outlive its longest Retry-After, 300 s.
KEEP_ALIVE_S = 330
_STREAM = (("Content-Type", "text/event-stream; charset=utf-8"), ("Cache-Control", "no-store"))
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
        when, *pairs = text.split() or [""]
        values = {name: value for name, _, value in (pair.partition("=") for pair in pairs)}
        if list(values) != ["method", "operation", "registration_id", "status", "error", "fault", "request_id"]:
            return None
        values = {name: "" if value == "-" else unquote(value) for name, value in values.items()}
        try:
            status, error_code, fault = (int(values[name] or 0) for name in ("status", "error", "fault"))
        except ValueError:
            return None
        method, operation, registration_id = (values[name] for name in ("method", "operation", "registration_id"))
        return cls(when, method, operation, registration_id, status, error_code, fault, values["request_id"])


class LoggedNotices(logging.Handler):
    """What libraries log becomes a notice of one line, a traceback the place where it began."""

    def __init__(self, notice: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self._notice = notice

    def emit(self, record: logging.LogRecord) -> None:
        """One record of a logger."""
        error = record.exc_info[1] if record.exc_info else None
        self._notice(defect(error) if error and error.__traceback__ else record.getMessage().partition("\n")[0])


class EmulatorServer:
    """A listening port for DPS and one for the hubs; made, `run` until `stop`."""

    def __init__(
        self,
        service: DpsService,
        store: Store,
        authority: trustme.CA,
        *,
        listen: str = "127.0.0.1",
        port: int = 0,
        hub_port: int = 0,
        state_dir: Path | None = None,
        faults: FaultScript | None = None,
        log: Callable[[LogLine], None] = lambda line: None,
        hub_log: Callable[[HubLine], None] = lambda line: None,
        notice: Callable[[str], None] = lambda text: None,
        clock: Callable[[], float] = time.time,
        web_port: int | None = None,
        secret: bytes = b"",
        telemetry: Callable[[str], None] | None = None,
    ) -> None:
        """Binds the ports at once (0: a free one); OSError says in words why it can't. `clock` returns Unix seconds.

        `secret` is what the keys of shared access policies come from; empty: a new one.
        `telemetry` is told of each message that was kept, as a JSON document.
        With a `web_port` there is the page of `dps_emulator.web`, on this machine's own address.

        `store` is the service's and becomes the hubs'. With a `state_dir` commands are taken at a socket in it.
        """
        self.service = service
        self.store = store
        self.faults = faults or FaultScript()
        self._log = log
        self._notice = notice
        self._clock = clock
        with contextlib.ExitStack() as failed:  # a port in use leaves no socket behind
            self._socket = failed.enter_context(_listening(listen, port))
            shares = 0 < port == hub_port
            self._hub_socket = self._socket if shares else failed.enter_context(_listening(listen, hub_port))
            web_socket = None if web_port is None else failed.enter_context(_listening("127.0.0.1", web_port))
            self._control_socket = None if state_dir is None else failed.enter_context(control_socket(state_dir))
            failed.pop_all()
        self.port: int = self._socket.getsockname()[1]
        self.hub_port: int = self._hub_socket.getsockname()[1]
        self._site: Site | None = None
        host = f"[{listen}]" if ":" in listen else listen
        self.addresses = {"dps": f"https://{host}:{self.port}", "hubs": f"mqtts://{host}:{self.hub_port}"}
        own_names = ["localhost", "127.0.0.1", "::1", *([] if listen in ("0.0.0.0", "::") else [listen])]
        names = [*own_names, *DPS_NAMES, *service.settings.hubs]
        tls = streams(authority, names, asks_clients=service.settings.client_certificates)
        chosen = service.settings
        of_hubs = chosen.clock_skew_s, self._happened, chosen.tier, chosen.limits, chosen.strict
        self._hub_log = hub_log
        if telemetry:
            store.messages.told.append(lambda message: telemetry(document(message)))
        context = HubContext(store.messages, os.urandom, *of_hubs, chosen.issue_after_s)
        self.hubs = Hubs(service, store.devices, context)
        burst_s = BURST_S if chosen.limits else 1.0
        gate = Gate(chosen.connects_per_s, chosen.connect_queue_s, burst_s) if chosen.connects_per_s else None
        self._hub_server = HubServer(
            self.hubs,
            store.messages,
            tls,
            {self._socket: False, self._hub_socket: True},
            lambda: self.faults,
            clock,
            notice,
            self.answer,
            self._http,
            gate,
        )
        secret = secret or os.urandom(32)
        self._api = ServiceApi(store, secret, chosen.clock_skew_s)
        self._hub_api = HubServiceApi(self.hubs, secret, clock)
        self._feed = TelemetryFeed(store.messages, chosen.hubs, secret, clock, chosen.clock_skew_s)
        self._control = Control(self._hub_server, store, self.set_faults, self.addresses, secret)
        if web_socket:
            self._site = self._site_at(web_socket, authority)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._serving = threading.Event()
        self._is_stopped = False
        self._ended = asyncio.Event()

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
            if self._site:
                started.push_async_callback(self._site.close)
                await self._site.start()
            self._serving.set()
            if not self._is_stopped:
                await self._ended.wait()

    def _site_at(self, listening: socket.socket, authority: trustme.CA) -> "Site":
        """The page, which is loaded only where it is wanted."""
        from dps_emulator.web.pages import Desk
        from dps_emulator.web.site import Site

        ca_pem = authority.cert_pem.bytes().decode()
        desk = Desk(self.service, self.store, self.hubs, lambda: self.faults, self.addresses, ca_pem)
        site = Site(desk, self._control.answer, listening, self._notice)
        self.addresses["web"] = site.guard.address
        return site

    def _happened(self, line: HubLine) -> None:
        self._hub_log(line)
        if self._site:
            self._site.noted(line)

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
        self._is_stopped = True
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # it has ended
                self._loop.call_soon_threadsafe(self._ended.set)

    def _http(self) -> asyncio.Protocol:
        """Reads the requests of one connection."""
        return HttpConnection(self._respond, KEEP_ALIVE_S, MAX_BODY_BYTES)

    def _respond(self, request: Request, wire: HttpConnection) -> Coroutine[object, object, None] | None:
        """Answers a request at once, or says how where that takes its time."""
        entry, fault = self.faults.of_request(request)
        if entry or self._feed.takes(request.path) or self._hub_api.takes(request.path):
            return self._respond_in_time(request, entry, fault, wire)
        try:
            response = self.answer(request, entry, fault)
            wire.answer(response.status, response.headers, response.body)
        except Exception as error:
            self._fail(error, wire)
        return None

    async def _respond_in_time(self, request: Request, entry: int, fault: Fault, wire: HttpConnection) -> None:
        try:
            await asyncio.sleep(fault.delay_s)
            asked = self._asked(request, entry) if not fault.replaces_answer else None
            if isinstance(asked, Asked):
                await self._stream(asked, wire)
                return
            if asked is not None:
                response = asked
            elif self._hub_api.takes(request.path) and not fault.replaces_answer:
                response = self._logged(request, await self._of_hubs(request), entry)
            else:
                response = self.answer(request, entry, fault)
            await _deliver(response, fault, wire)
        except Exception as error:
            self._fail(error, wire)

    def _fail(self, error: Exception, wire: HttpConnection) -> None:
        """A defect of ours ends nobody else's connection."""
        self._notice(defect(error))
        wire.transport.abort()

    async def _stream(self, asked: Asked, wire: HttpConnection) -> None:
        wire.begin(200, _STREAM, None)
        async with contextlib.aclosing(self._feed.events(asked)) as events:
            async for piece in events:
                wire.send(piece)
                await wire.room()

    def answer(self, request: Request, entry: int, fault: Fault) -> Response:
        """The answer of DPS to a request that this entry of the fault script fits, and its line in the log."""
        replaces = fault.replaces_answer
        response = fault.answer(str(uuid.uuid4()), self._clock()) if replaces else self._answer(request)
        return self._logged(request, response, entry)

    def _asked(self, request: Request, entry: int) -> Asked | Response | None:
        """What a request for the telemetry's stream asks for, or its refusal; None for any other request."""
        if not self._feed.takes(request.path):
            return None
        request_id, now = str(uuid.uuid4()), self._clock()
        try:
            asked = self._feed.asked(request)
        except RefusalError as refusal:
            return self._logged(request, _refused(refusal, request_id, now), entry)
        except StateError as error:
            return self._logged(request, _failed("The emulator's state failed.", str(error), now), entry)
        self._logged(request, Response(200, (), b"", request_id=request_id), entry)
        return asked

    async def _of_hubs(self, request: Request) -> Response:
        """The hubs' answer to a back end, or 500 where their state can't be read or written."""
        try:
            return await self._hub_api.answer(request)
        except StateError as error:
            return _failed("The emulator's state failed.", str(error), self._clock())
        except Exception as error:  # a defect of ours ends nobody else's request
            return _failed("The emulator has a defect.", defect(error), self._clock())

    def _logged(self, request: Request, response: Response, entry: int) -> Response:
        """The same answer, when its line is in the log."""
        if response.notice:
            self._notice(response.notice)
        target = target_of(request.path)
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
        if self._site:
            self._site.answered(request, response, entry, self._clock())
        return response

    def _answer(self, request: Request) -> Response:
        """The service's answer, or 500 where its state can't be read or written."""
        now = self._clock()
        try:
            with self.store.transaction():
                return (self._api if self._api.takes(request.path) else self.service).answer(request, now)
        except StateError as error:
            return _failed("The emulator's state failed.", str(error), now)
        except Exception as error:  # a defect of ours ends nobody else's request
            return _failed("The emulator has a defect.", defect(error), now)


def _failed(message: str, notice: str, now: float) -> Response:
    return replace(_refused(RefusalError(INTERNAL_ERROR, message), str(uuid.uuid4()), now), notice=notice)


def _refused(refusal: RefusalError, request_id: str, now: float) -> Response:
    response = refusal_response(refusal, request_id, now)
    headers = (*response.headers, *standard_headers(request_id, now))
    return replace(response, headers=headers, request_id=request_id)


def _listening(listen: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in listen else socket.AF_INET
    try:
        listening = socket.create_server((listen, port), family=family, backlog=256)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise OSError(
                f"port {port} at {listen} is in use: stop who has it, or give another (0: a free one)"
            ) from None
        why = (error.strerror or str(error)).partition(" (while attempting")[0]  # create_server's own words
        raise OSError(f"can't listen at {listen}, port {port}: {why}") from None
    # Accepted connections inherit it; asyncio sets it only where the socket names its protocol. 40 ms a request.
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listening


async def _deliver(response: Response, fault: Fault, wire: HttpConnection) -> None:
    """Sends the answer as the fault says."""
    if fault.cut_after_bytes == -1:
        await _end(wire.transport, reset=fault.reset)
        return
    wire.begin(response.status, fault.altered(response.headers), None if fault.chunked else len(response.body))
    body = response.body[: fault.cut_after_bytes]
    step = len(body) or 1
    if fault.drip is not None:
        step = max(1, round(fault.drip / 10))
    for at in range(0, len(body), step):
        if at and fault.drip is not None:
            await asyncio.sleep(step / fault.drip)
        wire.send(body[at : at + step])
        await wire.room()
    if fault.cut_after_bytes is None:
        wire.finish()
    else:
        await _end(wire.transport, reset=fault.reset)


async def _end(transport: asyncio.Transport, *, reset: bool) -> None:
    """Ends the TCP connection without a TLS goodbye, as a crash does, after what was sent has left."""
    for _ in range(100):
        if transport.get_write_buffer_size() == 0:
            break
        await asyncio.sleep(0.01)
    if reset:
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, ABORT)
    transport.abort()
