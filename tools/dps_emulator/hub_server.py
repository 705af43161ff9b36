"""The hubs on the wire: one TLS port that takes MQTT and MQTT over WebSocket, with faults made real."""

import asyncio
import contextlib
import socket
import ssl
import struct
import traceback
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

from dps_emulator import mqtt, websocket
from dps_emulator.faults import MQTT, Fault, FaultScript
from dps_emulator.hub import Hubs, Link, Refusal, operation_of, silence_limit_s
from dps_emulator.quotas import Gate
from dps_emulator.registrations import StateError

FIRST_PACKET_S = 30.0  # from TCP accept to CONNECT
TLS_HANDSHAKE_S = 10.0
SILENCE_S = 3600.0  # a connection on which a fault script has made the hub fall silent
GOODBYE_S = 0.5  # for the peer to read what was sent before the connection is cut
_TICK_S = 0.1
_READ_BYTES = 64 * 1024
ABORT = struct.pack("ii", 1, 0)  # struct linger: on, 0 s: close() sends RST


class HubServer:
    """One listening port for all hubs, which the user name tells apart; needs a running loop from `start` on."""

    def __init__(
        self,
        hubs: Hubs,
        tls: ssl.SSLContext,
        listening: socket.socket,
        faults: Callable[[], FaultScript],
        clock: Callable[[], float],
        notice: Callable[[str], None],
        gate: Gate | None = None,
    ) -> None:
        """`tls` becomes this server's own; `faults()` is the script in force; `clock` returns Unix seconds.

        `gate` lets new connections in.
        """
        self.hubs = hubs
        self.tls = tls
        self.faults = faults
        self.now = clock
        self.notice = notice
        self.gate = gate
        self._socket = listening
        self._server_names: weakref.WeakKeyDictionary[object, str] = weakref.WeakKeyDictionary()
        tls.sni_callback = self._named
        self._transports: weakref.WeakSet[asyncio.WriteTransport] = weakref.WeakSet()  # under TLS
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Begins to listen."""
        self._server = await asyncio.start_server(self._accepted, sock=self._socket)
        self._keep(asyncio.create_task(self._tick()))

    async def close(self) -> None:
        """Ends listener and connections."""
        if self._server:
            self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for transport in self._transports:
            transport.abort()
        await asyncio.sleep(0)  # the loop's next turn, in which they end

    def _keep(self, task: asyncio.Task[None]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _tick(self) -> None:
        """The task that lets time pass for the hubs: started by `start`, cancelled by `close`."""
        while True:
            try:
                self.hubs.tick(self.now())
            except (StateError, OSError) as error:
                self.notice(str(error))
            await asyncio.sleep(_TICK_S)

    def _named(self, connection: object, name: str | None, context: ssl.SSLContext) -> None:
        self._server_names[connection] = name or ""

    async def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """The task of one connection: asyncio starts it, and it ends with the connection or is cancelled by `close`."""
        # Before anything waits: the first TLS record must not be read by the plain stream.
        writer.transport.pause_reading()  # type: ignore[attr-defined]  # typeshed: a WriteTransport
        self._transports.add(writer.transport)
        task = asyncio.current_task()
        assert task is not None, "asyncio runs this as a task"
        self._keep(task)
        # Cancelled when the server stops; Python 3.11's streams complain about a callback that ends so.
        with contextlib.suppress(asyncio.CancelledError):
            await _Connection(self, reader, writer).run()

    def server_name(self, writer: asyncio.StreamWriter) -> str:
        """What the client's TLS handshake named (SNI), or empty."""
        return self._server_names.get(writer.get_extra_info("ssl_object"), "")


def place(error: BaseException) -> str:
    """Where an exception came from, as file:line."""
    *_, last = traceback.extract_tb(error.__traceback__)
    return f"{Path(last.filename).name}:{last.lineno}"


class _Connection:
    """One TCP connection from accept to end; also the hub's `Wire`."""

    def __init__(self, server: HubServer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._server = server
        self._reader = reader
        self._writer = writer
        self._frames: websocket.FrameStream | None = None  # those of a WebSocket, where it is one
        self._packets = mqtt.PacketStream()
        self._link: Link | None = None
        self._device_id = ""
        self._silence_limit_s = FIRST_PACKET_S
        self._muted = False
        self._silent = False
        self._reset = False
        self._dropped = False

    def send(self, packet: bytes) -> None:
        """See Wire."""
        if not (self._muted or self._dropped or self._writer.is_closing()):
            self._writer.write(packet if self._frames is None else websocket.binary_frame(packet))

    def drop(self) -> None:
        """See Wire."""
        if self._dropped:
            return
        self._dropped = True
        transport = self._writer.transport
        if self._reset:
            transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, ABORT)
            transport.abort()
            return
        self._writer.close()
        asyncio.get_running_loop().call_later(GOODBYE_S, transport.abort)

    async def run(self) -> None:
        """Talks until the connection ends; never raises for anything a client did."""
        reason = "the device ended the connection without goodbye"
        try:
            await self._talk()
        except TimeoutError:
            reason = f"nothing came for {self._silence_limit_s:g} s"
        except (mqtt.ProtocolError, websocket.WebSocketError) as error:
            reason = f"protocol error: {error}"
        except (StateError, OSError) as error:
            reason = f"the connection failed: {error}"
            if isinstance(error, StateError):
                self._server.notice(str(error))
        except Exception as error:  # a defect of ours ends nobody else's connection
            reason = "the hub failed"
            self._server.notice(f"a defect, please report it: {error!r} at {place(error)}")
        finally:
            try:
                if self._link:
                    self._link.ended(reason, self._server.now())
                elif not self._dropped:
                    self._server.hubs.note("closed", self._device_id, self._server.now(), detail=reason)
            except (StateError, OSError) as error:
                self._server.notice(str(error))
            self.drop()

    async def _talk(self) -> None:
        fault = self._fault("accept") or Fault()
        await asyncio.sleep(fault.delay_s)
        if fault.silent:
            self._writer.transport.resume_reading()  # type: ignore[attr-defined]
            self._silent = True
            await self._read_in_silence()
            return
        if fault.drop:
            self._reset = fault.reset
            return
        if self._server.gate:
            wait_s = self._server.gate.wait_s(asyncio.get_running_loop().time())
            if wait_s is None:
                return
            await asyncio.sleep(wait_s)
        try:
            await self._writer.start_tls(self._server.tls, ssl_handshake_timeout=TLS_HANDSHAKE_S)
        except (ssl.SSLError, ConnectionError) as error:
            raise OSError(f"no TLS handshake: {error}") from None
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._silence_limit_s
        content = await self._read(deadline)
        if content.startswith(b"GET "):
            content = await self._upgrade(content, deadline)
        while content and not self._dropped:
            for packet in self._unpack(content):
                await self._act(packet)
                deadline = loop.time() + self._silence_limit_s
                async with asyncio.timeout_at(deadline):
                    await self._writer.drain()  # answers pile up for no client that does not read them
                if self._dropped:
                    return
                if self._silent:
                    await self._read_in_silence()
                    return
            if self._frames is not None and self._frames.closed:
                return
            content = await self._read(deadline)

    async def _read(self, deadline: float) -> bytes:
        """What comes next, empty at the end; raises TimeoutError at `deadline` (loop time)."""
        async with asyncio.timeout_at(deadline):
            await self._writer.drain()
            return await self._reader.read(_READ_BYTES)

    async def _read_in_silence(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(SILENCE_S):
                while await self._reader.read(_READ_BYTES):
                    pass

    async def _upgrade(self, content: bytes, deadline: float) -> bytes:
        """Turns the connection into a WebSocket; what came behind the request, empty where it is refused."""
        while b"\r\n\r\n" not in content:
            more = await self._read(deadline)
            if not more or len(content) > websocket.MAX_HEAD_BYTES:
                return b""
            content += more
        head, _, rest = content.partition(b"\r\n\r\n")
        answer = websocket.upgrade(head)
        self._writer.write(answer.answer)
        if not answer.accepted:
            return b""
        self._frames = websocket.FrameStream()
        return rest or await self._read(deadline)

    def _unpack(self, content: bytes) -> Iterator[mqtt.Packet]:
        """The packets in what was read; raises ProtocolError or WebSocketError."""
        if self._frames is not None:
            content, answers = self._frames.feed(content)
            if answers and not self._muted:
                self._writer.write(answers)
        return self._packets.feed(content)

    async def _act(self, packet: mqtt.Packet) -> None:
        """Does what the packet asks for and what the fault script wants of it."""
        if isinstance(packet, mqtt.Connect) and self._link is None:
            self._device_id = packet.client_id
        operation = operation_of(packet, self._device_id)
        fault = self._fault(operation) or Fault()
        await asyncio.sleep(fault.delay_s)
        if self._dropped:
            return
        if fault.silent == "before":
            self._muted = self._silent = True
            return
        if fault.drop != "before":
            self._muted = "after" in (fault.drop, fault.silent)
            self._answer(packet, operation, fault)
            self._silent = self._muted and fault.silent is not None
        if fault.drop:
            self._reset = fault.reset
            if self._link:
                self._link.ended("a fault script ended the connection", self._server.now())
            self.drop()

    def _answer(self, packet: mqtt.Packet, operation: str, fault: Fault) -> None:
        now, hubs = self._server.now(), self._server.hubs
        if self._link is not None:
            if fault.status is not None and isinstance(packet, mqtt.Publish):
                self._link.refuse_twin(packet, fault.status)
            else:
                self._link.received(packet, now)
        elif not isinstance(packet, mqtt.Connect):
            raise mqtt.ProtocolError("the first packet is no CONNECT")
        elif fault.connack is not None:
            hubs.refuse(self, Refusal(fault.connack, "a fault script says so", device_id=self._device_id), now)
        else:
            self._link = hubs.connect(self, packet, self._server.server_name(self._writer), now)
            self._silence_limit_s = silence_limit_s(packet)

    def _fault(self, operation: str) -> Fault | None:
        taken = self._server.faults().take(MQTT, operation, self._device_id)
        if taken is None:
            return None
        entry, fault = taken
        self._server.hubs.note("fault", self._device_id, self._server.now(), entry, operation)
        return fault
