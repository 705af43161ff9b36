"""Hubs and DPS on the wire: TLS ports for MQTT, MQTT over WebSocket and HTTP, with the faults of hubs made real."""

import asyncio
import contextlib
import socket
import ssl
import struct
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from dps_emulator import mqtt, websocket
from dps_emulator.dps_mqtt import Asked, DpsLink, is_dps
from dps_emulator.faults import MQTT, NO_FAULT, Fault, FaultScript
from dps_emulator.hub import Hubs, Link, Refusal, operation_of, silence_limit_s
from dps_emulator.quotas import Gate
from dps_emulator.registrations import StateError
from dps_emulator.service import Request, Response
from dps_emulator.store import Messages
from dps_emulator.tls_stream import Stream

FIRST_PACKET_S = 30.0  # from TCP accept to CONNECT
TLS_HANDSHAKE_S = 10.0
SILENCE_S = 3600.0  # a connection on which a fault script has made the hub fall silent
GOODBYE_S = 0.5  # for the peer to read what was sent before the connection is cut
MAX_ID = 200  # characters of a client id that are told; a device id has 128 at most
_TICK_S = 0.1
_READ_BYTES = 64 * 1024
ABORT = struct.pack("ii", 1, 0)  # struct linger: on, 0 s: close() sends RST
_WENT = "the device ended the connection without goodbye"
_WEBSOCKET = f"GET {websocket.PATH}".encode()


class HubServer:
    """One listening port for all hubs and DPS, told apart by the user name; needs a running loop from `start` on."""

    def __init__(
        self,
        hubs: Hubs,
        messages: Messages,
        tls: Callable[[], Stream],
        listening: Mapping[socket.socket, bool],
        faults: Callable[[], FaultScript],
        clock: Callable[[], float],
        notice: Callable[[str], None],
        dps: Callable[[Request, int, Fault], Response],
        http: Callable[[], asyncio.Protocol],
        gate: Gate | None = None,
    ) -> None:
        """`listening` are sockets, and whether gate and faults of `accept` are for them.

        `messages` are the hubs', `faults()` is the script in force, `clock` returns Unix seconds, `gate` lets new
        connections in.

        `dps` answers a request to DPS that an entry of the script fits; `http` makes what reads those by HTTP.
        """
        self.hubs = hubs
        self.messages = messages
        self.tls = tls
        self.faults = faults
        self.now = clock
        self.notice = notice
        self.dps = dps
        self.http = http
        self.gate = gate
        self.buffer = memoryview(bytearray(_READ_BYTES))  # of whichever connection is being read
        self.connections: set[_Connection] = set()
        self._listening = dict(listening)
        self._ticking: asyncio.Task[None] | None = None
        self._servers: list[asyncio.Server] = []

    async def start(self) -> None:
        """Begins to listen."""
        for listening, is_hubs in self._listening.items():
            made = partial(_Connection, self, is_hubs)
            self._servers.append(await asyncio.get_running_loop().create_server(made, sock=listening))
        self._ticking = asyncio.create_task(self._tick())

    async def close(self) -> None:
        """Ends listener and connections."""
        for server in self._servers:
            server.close()
        if self._ticking:
            self._ticking.cancel()
            await asyncio.gather(self._ticking, return_exceptions=True)
        for connection in list(self.connections):
            connection.abort()
        await asyncio.sleep(0)  # the loop's next turn, in which they end

    async def _tick(self) -> None:
        """The task that lets time pass for the hubs: started by `start`, cancelled by `close`."""
        while True:
            try:
                self.hubs.tick(self.now())
            except (StateError, OSError) as error:
                self.notice(str(error))
            await asyncio.sleep(_TICK_S)


def defect(error: BaseException) -> str:
    """A sentence about an exception that nobody expected: what it is and where it came from, as file:line."""
    *_, last = traceback.extract_tb(error.__traceback__)
    return f"a defect, please report it: {error!r} at {Path(last.filename).name}:{last.lineno}"


class _Connection(asyncio.BufferedProtocol):
    """One TCP connection from accept to end; also the hub's `Wire`.

    It is read unless it is held: by a fault's delay or the gate, or because the client does not read its answers. What
    it sends within one turn leaves in one piece at the end of that, after all that is written in the turn.
    """

    __slots__ = (
        "_clogged",
        "_deadline",
        "_device_id",
        "_dps",
        "_dropped",
        "_ended",
        "_frames",
        "_gated",
        "_gathers",
        "_head",
        "_held",
        "_http",
        "_in_turn",
        "_link",
        "_loop",
        "_muted",
        "_output",
        "_packets",
        "_pending",
        "_reset",
        "_server",
        "_server_name",
        "_silence_limit_s",
        "_silent",
        "_timer",
        "_tls",
        "_transport",
    )

    def __init__(self, server: HubServer, gated: bool) -> None:
        self._server = server
        self._loop = asyncio.get_running_loop()
        self._tls = server.tls()
        self._gated = gated
        self._http: asyncio.Protocol | None = None  # what reads the plaintext, where it is HTTP
        self._server_name = ""
        self._transport: asyncio.Transport | None = None
        self._head: bytes | None = b""  # what has come of the request of a WebSocket; None: it is none, or upgraded
        self._frames: websocket.FrameStream | None = None  # those of a WebSocket, where it is one
        self._packets = mqtt.PacketStream()
        self._pending: Iterator[mqtt.Packet] = iter(())  # read, and not acted on yet
        self._output = bytearray()
        self._link: Link | None = None
        self._dps: DpsLink | None = None
        self._device_id = ""
        self._silence_limit_s = FIRST_PACKET_S
        self._deadline = self._loop.time() + TLS_HANDSHAKE_S
        self._timer: asyncio.TimerHandle | None = None
        self._in_turn = self._held = self._clogged = self._gathers = False
        self._muted = self._silent = self._reset = self._dropped = self._ended = False

    # --- what asyncio calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The TCP connection is accepted, or the WebSocket's handed over."""
        assert isinstance(transport, asyncio.Transport), "that of a TCP connection"
        self._transport = transport
        self._server.connections.add(self)
        transport.pause_reading()
        self._turn(self._accept)

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where the next bytes are put."""
        return self._server.buffer

    def buffer_updated(self, nbytes: int) -> None:
        """Bytes have come."""
        self._turn(self._received, self._server.buffer[:nbytes])

    def eof_received(self) -> None:
        """The client's half is over: so is the connection."""

    def pause_writing(self) -> None:
        """Answers pile up, for no client that does not read them."""
        self._clogged = True
        if self._http:
            self._http.pause_writing()
        self._read_or_not()

    def resume_writing(self) -> None:
        """They have left."""
        self._clogged = False
        if self._http:
            self._http.resume_writing()
        self._turn(self._go_on)
        self._read_or_not()

    def connection_lost(self, exc: Exception | None) -> None:
        """It is over."""
        self._end(_WENT if exc is None else f"the connection failed: {exc}")
        self._server.connections.discard(self)
        if self._http:
            self._http.connection_lost(exc)
        if self._timer:
            self._timer.cancel()

    # --- the hub's Wire

    def send(self, packet: bytes) -> None:
        """See Wire."""
        if not (self._muted or self._dropped):
            self._output += packet if self._frames is None else websocket.binary_frame(packet)
            if not self._in_turn:
                self._turn(self._flush)

    def gather(self, plaintext: bytes) -> None:
        """Sends with whatever comes until the loop's next turn: head and body of an answer are one record."""
        if self._muted or self._dropped:
            return
        self._output += plaintext
        if not self._gathers and not self._in_turn:
            self._gathers = True
            self._loop.call_soon(self._turn, self._gathered)

    def _gathered(self) -> None:
        self._gathers = False

    @property
    def unsent(self) -> int:
        """Bytes that wait for the end of a turn."""
        return len(self._output)

    def drop(self) -> None:
        """See Wire."""
        if self._dropped or self._transport is None:
            return
        if not self._reset:
            with contextlib.suppress(ssl.SSLError):
                self._flush()
        self._dropped = True
        transport = self._transport
        if self._reset:
            transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, ABORT)
        if self._reset or transport.is_closing():
            transport.abort()
            return
        self._tls.say_goodbye()
        transport.write(self._tls.to_send())
        # Not closed: what comes now and is not read would make a reset of the end, and the client lose what was sent.
        if transport.can_write_eof():
            transport.write_eof()
            self._read_or_not()
        else:
            transport.close()
        self._loop.call_later(GOODBYE_S, transport.abort)

    @property
    def is_over(self) -> bool:
        """Whether nothing can be sent any more."""
        return self._dropped or self._transport is None or self._transport.is_closing()

    def abort(self) -> None:
        """Ends it at once, with the server."""
        if self._transport:
            self._transport.abort()

    # --- its own turns

    def _turn(self, act: Callable[..., None], *arguments: Any) -> None:
        """Acts, sends what comes of it, and ends the connection where that failed; raises for nothing a client does.

        All messages of a turn are kept at once: what a client sends in one piece costs one transaction.
        """
        reason = ""
        self._in_turn = True
        try:
            with self._server.messages.gathered():
                act(*arguments)
            self._flush()
        except (mqtt.ProtocolError, websocket.WebSocketError) as error:
            reason = f"protocol error: {error}"
        except (StateError, OSError) as error:  # ssl.SSLError is one
            reason = f"the connection failed: {error}"
            if isinstance(error, StateError):
                self._output.clear()  # it may acknowledge what is not kept
                self._server.notice(str(error))
        except Exception as error:  # a defect of ours ends nobody else's connection
            reason = "the hub failed"
            self._output.clear()  # as above
            self._server.notice(defect(error))
        finally:
            self._in_turn = False
        if reason:
            self._end(reason)

    def _end(self, reason: str) -> None:
        """The connection is over, for this reason unless the hub has ended it by itself; idempotent."""
        if self._ended:
            return
        self._ended = True
        try:
            if self._link:
                self._link.ended(reason, self._server.now())
            elif self._dps:
                self._dps.ended(reason)
            elif self._gated and not self._dropped and not self._http:
                self._server.hubs.note("closed", self._device_id, self._server.now(), detail=reason)
        except (StateError, OSError) as error:
            self._server.notice(str(error))
        self._pending = iter(())
        self.drop()

    def _flush(self) -> None:
        """Sends what has gathered, when what it acknowledges is kept; raises StateError."""
        if self._in_turn:
            self._server.messages.keep()
        if self._transport is None or self._transport.is_closing():
            return
        if self._output:
            self._tls.write(self._output)
        if records := self._tls.to_send():
            self._transport.write(records)
        self._output.clear()

    def _read_or_not(self) -> None:
        assert self._transport is not None, "there is a connection"
        if self._transport.is_closing():
            return
        if (self._held or self._clogged) and not self._dropped:
            self._transport.pause_reading()
        else:
            self._transport.resume_reading()

    def _hold(self, seconds: float, act: Callable[..., None], *arguments: Any) -> None:
        """Acts at once, or after so many seconds in which nothing is read."""
        if not seconds:
            act(*arguments)
            return
        self._held = True
        self._read_or_not()
        self._loop.call_later(seconds, self._released, act, *arguments)

    def _released(self, act: Callable[..., None], *arguments: Any) -> None:
        self._held = False
        if not self._dropped:
            self._turn(act, *arguments)
            if not self._held:
                self._turn(self._go_on)
                self._read_or_not()

    # --- time

    def _wait_for(self, seconds: float) -> None:
        """The connection ends unless something comes within so many seconds."""
        self._deadline = self._loop.time() + seconds
        if self._timer is None:
            self._timer = self._loop.call_at(self._deadline, self._look_at_time)
        elif self._timer.when() > self._deadline:
            self._timer.cancel()
            self._timer = self._loop.call_at(self._deadline, self._look_at_time)

    def _look_at_time(self) -> None:
        """The one timer of a connection: it may fire early, and is not set anew with each packet."""
        if self._dropped:
            return
        if self._held:
            self._deadline = max(self._deadline, self._loop.time() + self._silence_limit_s)
        if self._loop.time() < self._deadline:
            self._timer = self._loop.call_at(self._deadline, self._look_at_time)
        elif not self._tls.is_open:
            self._end("the connection failed: no TLS handshake in time")
        else:
            self._end(f"nothing came for {self._silence_limit_s:g} s")

    # --- from accept to packets

    def _accept(self) -> None:
        fault = (self._fault("accept") if self._gated else None) or NO_FAULT
        self._hold(fault.delay_s, self._enter, fault)

    def _enter(self, fault: Fault) -> None:
        if fault.silent:
            self._fall_silent()
            self._read_or_not()
            return
        if fault.drop:
            self._reset = fault.reset
            self._end(_WENT)
            return
        wait_s: float | None = 0.0
        if self._server.gate and self._gated:
            wait_s = self._server.gate.wait_s(self._loop.time())
        if wait_s is None:
            self._end(_WENT)
        else:
            self._hold(wait_s, self._begin)

    def _begin(self) -> None:
        self._wait_for(TLS_HANDSHAKE_S)
        self._read_or_not()

    def _fall_silent(self) -> None:
        self._silent = True
        self._wait_for(SILENCE_S)
        self._silence_limit_s = SILENCE_S

    def _received(self, content: memoryview) -> None:
        if self._dropped or self._silent:
            return
        was_open = self._tls.is_open
        try:
            plaintext = self._tls.feed(content)
        except ssl.SSLError as error:
            raise error if was_open else OSError(f"no TLS handshake: {error}") from None
        if self._tls.is_open and not was_open:
            self._server_name = self._tls.server_name
            self._wait_for(FIRST_PACKET_S)
        if plaintext:
            self._take(plaintext)
        if self._tls.is_ended and not self._dropped:
            self._end(_WENT)

    def _take(self, content: bytes) -> None:
        """Plaintext has come: MQTT, frames, the request of a WebSocket, or HTTP."""
        if self._head is not None:
            content = self._upgrade(self._head + content)
        if self._http:
            self._http.data_received(content)
        elif content:
            self._pending = self._unpack(content)
            self._go_on()

    def _upgrade(self, content: bytes) -> bytes:
        """Turns the connection into a WebSocket where it begins as HTTP; what there is of packets or frames by now."""
        is_http = content[:1].isupper() or (not self._gated and content[0] >> 4 != 1)  # 1: a CONNECT
        if is_http and content[: len(_WEBSOCKET)] != _WEBSOCKET[: len(content)]:
            self._head = None
            self._read_as_http()
            return content
        if content[:1] != b"G":
            self._head = None
            return content
        head, end, rest = content.partition(b"\r\n\r\n")
        if not end:
            self._head = content
            if len(content) > websocket.MAX_HEAD_BYTES:
                self._end(_WENT)
            return b""
        self._head = None
        answer = websocket.upgrade(head, strict=self._server.hubs.context.strict)
        self._output += answer.answer
        if not answer.accepted:
            self._end(_WENT)
            return b""
        self._frames = websocket.FrameStream()
        return rest

    def _read_as_http(self) -> None:
        """From here on the plaintext is read by the HTTP server, which has its own opinion on time."""
        assert self._transport is not None, "there is a connection"
        transport = TlsTransport(self, self._transport, self._tls.client_chain)
        if self._timer:
            self._timer.cancel()
        self._http = self._server.http()
        self._http.connection_made(transport)

    def hold(self, held: bool) -> None:
        """Whether nothing is to be read for now, says the HTTP server."""
        self._held = held
        self._read_or_not()

    def _unpack(self, content: bytes) -> Iterator[mqtt.Packet]:
        """The packets in what was read; raises ProtocolError or WebSocketError."""
        if self._frames is not None:
            content, answers = self._frames.feed(content)
            if answers and not self._muted:
                self._output += answers
        return self._packets.feed(content)

    # --- packets

    def _go_on(self) -> None:
        """Acts on the packets at hand until one has to wait or ends the connection."""
        if self._held or self._clogged:
            return
        for packet in self._pending:
            self._act(packet)
            if len(self._output) > _READ_BYTES:
                self._flush()  # which may find that the client does not read
            if self._held or self._clogged or self._dropped or self._silent:
                return
        if self._frames is not None and self._frames.closed and not self._dropped:
            self._end(_WENT)

    def _act(self, packet: mqtt.Packet) -> None:
        """Does what the packet asks for and what the fault script wants of it."""
        if self._dps is not None:
            if asked := self._dps.received(packet):
                entry, fault = self._server.faults().of_request(asked.request)
                self._hold(fault.delay_s, self._answer_for_dps, asked, entry, fault)
            self._deadline = self._loop.time() + self._silence_limit_s
            return
        if isinstance(packet, mqtt.Connect) and self._link is None:
            self._device_id = packet.client_id[:MAX_ID]
            if is_dps(packet):
                self._enter_dps(packet)
                return
        if self._link is not None and self._server.hubs.context.limits:
            wait_s = self._link.hub.wait_s(operation_of(packet, self._device_id), self._loop.time())
            if wait_s is None:
                self._link.throttle(packet, self._server.now())
            else:
                self._hold(wait_s, self._act_by_script, packet)
            return
        self._act_by_script(packet)

    def _enter_dps(self, connect: mqtt.Connect) -> None:
        def note(event: str, detail: str) -> None:
            self._server.hubs.note(event, self._device_id, self._server.now(), detail=detail)

        self._dps = DpsLink(self, connect, note, self._server_name, self._tls.client_chain)
        self._silence_limit_s = silence_limit_s(connect)
        self._wait_for(self._silence_limit_s)

    def _answer_for_dps(self, asked: Asked, entry: int, fault: Fault) -> None:
        assert self._dps is not None, "it has asked"
        response = self._server.dps(asked.request, entry, fault)
        if fault.cut_after_bytes is None:
            self._dps.answered(asked, replace(response, headers=tuple(fault.altered(response.headers))))
        else:
            self._reset = fault.reset
            self._dps.drop("a fault script ended the connection")

    def _act_by_script(self, packet: mqtt.Packet) -> None:
        fault = self._fault(operation_of(packet, self._device_id)) if self._server.faults().faults else None
        if fault is None:
            self._answer(packet, NO_FAULT)
            self._deadline = self._loop.time() + self._silence_limit_s
        else:
            self._hold(fault.delay_s, self._act_with, fault, packet)

    def _act_with(self, fault: Fault, packet: mqtt.Packet) -> None:
        if fault.silent == "before":
            self._muted = True
            self._fall_silent()
            return
        if fault.drop != "before":
            self._muted = "after" in (fault.drop, fault.silent)
            self._answer(packet, fault)
        if fault.drop:
            self._reset = fault.reset
            if self._link:
                self._link.ended("a fault script ended the connection", self._server.now())
            self.drop()
        elif fault.silent:
            self._fall_silent()
        else:
            self._deadline = self._loop.time() + self._silence_limit_s

    def _answer(self, packet: mqtt.Packet, fault: Fault) -> None:
        now, hubs = self._server.now(), self._server.hubs
        if self._link is not None:
            if fault.status is not None and isinstance(packet, mqtt.Publish):
                self._link.refuse(packet, fault.status, now)
            else:
                self._link.received(packet, now)
        elif not isinstance(packet, mqtt.Connect):
            raise mqtt.ProtocolError("the first packet is no CONNECT")
        elif fault.connack is not None:
            hubs.refuse(self, Refusal(fault.connack, "a fault script says so", device_id=self._device_id), now)
        else:
            self._link = hubs.connect(self, packet, self._server_name, now, self._tls.client_chain)
            self._silence_limit_s = silence_limit_s(packet)
            self._wait_for(self._silence_limit_s)

    def _fault(self, operation: str) -> Fault | None:
        taken = self._server.faults().take(MQTT, operation, self._device_id)
        if taken is None:
            return None
        entry, fault = taken
        self._server.hubs.note("fault", self._device_id, self._server.now(), entry, operation)
        return fault


class TlsTransport(asyncio.Transport):
    """The plaintext's way back, for a protocol that reads HTTP; `client_chain` is among its extra information."""

    def __init__(self, connection: _Connection, below: asyncio.Transport, client_chain: tuple[bytes, ...]) -> None:
        super().__init__({"client_chain": client_chain, "sslcontext": True})
        self._connection = connection
        self._below = below

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """That of TLS, or of the socket."""
        own = super().get_extra_info(name)
        return self._below.get_extra_info(name, default) if own is None else own

    def write(self, data: "bytes | bytearray | memoryview") -> None:
        """Sends bytes, unless the connection has ended."""
        self._connection.gather(bytes(data))

    def get_write_buffer_size(self) -> int:
        """Of what has not left yet."""
        return self._connection.unsent + self._below.get_write_buffer_size()

    def is_closing(self) -> bool:
        """Whether it is over, or will be."""
        return self._connection.is_over

    def close(self) -> None:
        """Ends the connection after what was sent."""
        self._connection.drop()

    def abort(self) -> None:
        """Ends it at once, without TLS's goodbye."""
        self._below.abort()

    def pause_reading(self) -> None:
        """Nothing is read for now."""
        self._connection.hold(True)

    def resume_reading(self) -> None:
        """It is read again."""
        self._connection.hold(False)
