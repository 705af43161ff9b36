"""The page on the wire: plain HTTP on this machine's own address, behind the guard; a stream says what to look at."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from urllib.parse import parse_qs, quote, urlencode

import h11
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from dps_emulator import http_protocol
from dps_emulator.hub import HubLine
from dps_emulator.hub_server import defect
from dps_emulator.registrations import StateError
from dps_emulator.service import Request as DpsRequest
from dps_emulator.service import Response as DpsResponse
from dps_emulator.web import pages
from dps_emulator.web.actions import Actions, Command, Refused
from dps_emulator.web.guard import HEADERS, Guard
from dps_emulator.web.markup import Html
from dps_emulator.web.pages import Desk, NotHere

MAX_FORM_BYTES = 4 * 1024 * 1024  # a list of enrolments
MAX_SAID = 500  # characters of a sentence about what was done or has happened
MAX_FOLLOWERS = 32  # pages that follow at the same time
AGAIN_S = 0.3  # between two words on a stream
BEAT_S = 15.0
BODY_S = 30.0
_FOLDER = Path(__file__).parent
_ASSETS = {"/page.css": "text/css", "/page.js": "text/javascript"}


class BoundedProtocol(H11Protocol):
    """Ends a connection whose request takes longer than REQUEST_S; uvicorn bounds only the time between two."""

    _ends: asyncio.TimerHandle | None = None

    def data_received(self, data: bytes) -> None:
        """More of a request, or of several."""
        super().data_received(data)
        state = self.conn.their_state
        begun = state is h11.SEND_BODY or (state is h11.IDLE and bool(self.conn.trailing_data[0]))
        if not begun:
            self._forget()
        elif self._ends is None:
            self._ends = self.loop.call_later(http_protocol.REQUEST_S, self._give_up)

    def connection_lost(self, exc: Exception | None) -> None:
        """It is over."""
        self._forget()
        super().connection_lost(exc)

    def _forget(self) -> None:
        if self._ends is not None:
            self._ends.cancel()
            self._ends = None

    def _give_up(self) -> None:
        """The rest of a request did not come: that is said where no answer has begun."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.write(http_protocol.TOO_LATE)
        self.transport.close()


class _Server(uvicorn.Server):
    """Leaves signals to whoever runs the emulator."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Site:
    """The page of one emulator; `listening` is bound to this machine's own address."""

    def __init__(self, desk: Desk, command: Command, listening: socket.socket, notice: Callable[[str], None]) -> None:
        """`notice` is told of what a request has shown to be wrong with the page itself."""
        self.desk = desk
        self._notice = notice
        self.guard = Guard(listening.getsockname()[1])
        self._actions = Actions(desk, command)
        self._socket = listening
        self._followers: set[asyncio.Event] = set()
        self._is_ending = False
        self._task: asyncio.Task[None] | None = None
        config = uvicorn.Config(
            self.app(),
            http=BoundedProtocol,
            ws="none",
            lifespan="off",
            loop="asyncio",
            log_config=None,
            access_log=False,  # the address has a token in it
            server_header=False,
            timeout_graceful_shutdown=1,
        )
        self._server = _Server(config)

    async def start(self) -> None:
        """Begins to serve, with a running loop."""
        self.desk.store.messages.arrived.append(self.changed)
        self._task = asyncio.create_task(self._server.serve(sockets=[self._socket]))

    async def close(self) -> None:
        """Ends all streams and the server."""
        self._is_ending = True
        self.changed()
        self._server.should_exit = True
        with contextlib.suppress(ValueError):
            self.desk.store.messages.arrived.remove(self.changed)
        if self._task:
            await asyncio.gather(self._task, return_exceptions=True)
        self._socket.close()

    def answered(self, request: DpsRequest, response: DpsResponse, fault: int, now: float) -> None:
        """DPS has answered a request."""
        self.desk.exchanges.add(request, response, fault, now)
        self.changed()

    def noted(self, line: HubLine) -> None:
        """Something has happened at a hub."""
        self.desk.lines.append(replace(line, detail=line.detail[:MAX_SAID]))
        self.changed()

    def changed(self) -> None:
        """Whoever follows is told to look again."""
        for follower in self._followers:
            follower.set()

    def app(self) -> ASGIApp:
        """The routes, behind the guard."""
        routes = [
            *(Route(path, self._asset, methods=["GET"]) for path in _ASSETS),
            Route("/", self._devices, methods=["GET"]),
            Route("/registrations", self._registrations, methods=["GET"]),
            Route("/enrollments", self._enrollments, methods=["GET"]),
            Route("/enrollments/{verb}", self._change_enrollment, methods=["POST"]),
            Route("/knocks", self._enroll_knock, methods=["POST"]),
            Route("/devices/{hub}/{device}", self._device, methods=["GET"]),
            Route("/devices/{hub}/{device}/{verb}", self._change_device, methods=["POST"]),
            Route("/faults", self._faults, methods=["GET"]),
            Route("/faults", self._break, methods=["POST"]),
            Route("/connect", self._connect, methods=["GET"]),
            Route("/events", self._events, methods=["GET"]),
        ]
        handlers = {NotHere: self._not_here, StateError: self._state_failed, HTTPException: self._http_error}
        return _Guarded(Starlette(routes=routes, exception_handlers=handlers), self.guard, self._notice)

    # --- views

    async def _asset(self, request: Request) -> Response:
        path = request.url.path
        return Response((_FOLDER / path[1:]).read_bytes(), media_type=_ASSETS[path])

    async def _devices(self, request: Request) -> Response:
        return self._page(request, "Devices", pages.devices(self.desk))

    async def _registrations(self, request: Request) -> Response:
        return self._page(request, "Registrations", pages.registrations(self.desk))

    async def _enrollments(self, request: Request) -> Response:
        return self._page(request, "Enrolments", pages.enrollments(self.desk))

    async def _faults(self, request: Request) -> Response:
        return self._page(request, "Faults", pages.faults(self.desk))

    async def _connect(self, request: Request) -> Response:
        return self._page(request, "Connect", pages.connect(self.desk))

    async def _device(self, request: Request) -> Response:
        names = request.path_params["hub"], request.path_params["device"]
        return self._page(request, *pages.device(self.desk, *names, request.query_params.get("only", "")))

    def _page(self, request: Request, title: str, body: Html, said: str = "", status: int = 200) -> Response:
        refused = request.query_params.get("refused", "")[:MAX_SAID]
        said = said or refused or request.query_params.get("said", "")[:MAX_SAID]
        html = pages.frame(title, request.url.path, body, said, failed=bool(refused) or status >= 400)
        return HTMLResponse(html.encode(errors="replace"), status)  # JSON may have halves of surrogate pairs

    # --- what forms ask for

    async def _change_device(self, request: Request) -> Response:
        hub, device, verb = (request.path_params[name] for name in ("hub", "device", "verb"))
        back = f"/devices/{quote(hub, safe='')}/{quote(device, safe='')}"
        return await self._done(back, self._actions.device(hub, device, verb, await _form(request)))

    async def _change_enrollment(self, request: Request) -> Response:
        verb = request.path_params["verb"]
        return await self._done("/enrollments", self._actions.enrollment(verb, await _form(request)))

    async def _enroll_knock(self, request: Request) -> Response:
        return await self._done("/enrollments", self._actions.knock(await _form(request)))

    async def _break(self, request: Request) -> Response:
        return await self._done("/faults", self._actions.faults(await _form(request)))

    async def _done(self, path: str, action: Awaitable[str]) -> Response:
        """Acts, and sends the browser to a view, so that a reload does nothing twice."""
        try:
            outcome = "said", await action
        except Refused as error:
            outcome = "refused", str(error)
        self.changed()
        name, text = outcome
        query = urlencode({name: text[:MAX_SAID]}, quote_via=quote, errors="replace")
        return RedirectResponse(f"{path}?{query}", 303)

    # --- the stream

    async def _events(self, request: Request) -> Response:
        if len(self._followers) >= MAX_FOLLOWERS:
            return PlainTextResponse(f"{MAX_FOLLOWERS} pages follow already", 503)
        return StreamingResponse(self._words(), media_type="text/event-stream")

    async def _words(self) -> AsyncIterator[bytes]:
        happened = asyncio.Event()
        self._followers.add(happened)
        try:
            yield b"retry: 2000\nevent: changed\ndata: {}\n\n"
            while not self._is_ending:
                try:
                    async with asyncio.timeout(BEAT_S):
                        await happened.wait()
                except TimeoutError:
                    yield b": still here\n\n"
                    continue
                happened.clear()
                yield b"event: changed\ndata: {}\n\n"
                await asyncio.sleep(AGAIN_S)
        finally:
            self._followers.discard(happened)

    # --- what goes wrong

    async def _not_here(self, request: Request, error: Exception) -> Response:
        return self._page(request, "Not here", Html(), str(error), 404)

    async def _state_failed(self, request: Request, error: Exception) -> Response:
        return self._page(request, "The state failed", Html(), str(error), 500)

    async def _http_error(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException), "that is what it handles"
        said = str(error.detail)
        response = self._page(request, said, Html(), said, error.status_code)
        response.headers.update(error.headers or {})
        return response


class _Guarded:
    """Asks the guard about each request; gives every answer its headers; no exception leaves it."""

    def __init__(self, app: ASGIApp, guard: Guard, notice: Callable[[str], None]) -> None:
        self._app = app
        self._guard = guard
        self._notice = notice

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]
                message = {**message, "headers": [*message["headers"], *own]}
            await send(message)

        request = Request(scope, receive)
        try:
            response = self._answer(request)
            await (response or self._app)(scope, receive, send_with_headers)
        except ClientDisconnect:
            pass
        except Exception as error:  # Starlette has sent 500, where no answer had begun
            self._notice(defect(error))

    def _answer(self, request: Request) -> Response | None:
        """The guard's own answer, or None where the page answers."""
        headers = {name.lower(): value for name, value in request.headers.items()}
        refusal = self._guard.refusal(request.method, headers, request.cookies)
        token = request.query_params.get("token", "")
        if request.method == "GET" and request.url.path == "/" and token and (refusal is None or refusal[0] != 421):
            if not self._guard.opens(token):
                return PlainTextResponse("this is not the token of the page that is served now", 403)
            return RedirectResponse("/", 303, {"Set-Cookie": self._guard.set_cookie})
        return None if refusal is None else PlainTextResponse(refusal[1] + "\n", refusal[0])


async def _form(request: Request) -> dict[str, str]:
    """The fields of a form; HTTPException where there is something else, or too much."""
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/x-www-form-urlencoded":
        raise HTTPException(415, "expected a form of this page")
    body = b""
    try:
        async with asyncio.timeout(BODY_S):
            async for piece in request.stream():
                body += piece
                if len(body) > MAX_FORM_BYTES:
                    raise HTTPException(413, f"more than {MAX_FORM_BYTES} bytes")
        fields = parse_qs(body.decode(), keep_blank_values=True, max_num_fields=100)
    except (TimeoutError, ValueError):
        raise HTTPException(400, "the form did not come whole") from None
    return {name: values[-1] for name, values in fields.items()}
