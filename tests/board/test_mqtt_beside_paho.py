"""The same claims about paho, as the agent on Linux uses it, and about the board's own client on both interpreters.

Against hubs that behave and hubs that do not, then against the emulator's. Real sockets and TLS, all on loopback.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import os
import select
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dps_agent import effects, hub_effects
from dps_agent.effects import NoReply
from dps_agent.host.network import mqtt as host_mqtt
from dps_agent.hub_effects import (
    Acknowledged,
    Arrived,
    ConnAck,
    Gone,
    Granted,
    MessageDone,
    RegisterAgain,
    SendTelemetry,
)
from dps_agent.sas import SasToken
from dps_board import mqtt as board_mqtt
from dps_board.tls import Trust
from dps_emulator import mqtt
from support.board.board_mqtt import Served, connecting
from support.board.compiled import CHECKOUT, der
from support.cloud.broker import HubPeer, accepting
from support.cloud.emulator import DeviceCredentials, EmulatorInThread
from support.cloud.servers import ENDPOINT_NAME, LOOPBACK, Certificates, Peer, Server

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable, Iterator

HUB = ENDPOINT_NAME  # the name in the test's certificates
DEVICE = "press-07"
TOPIC = f"devices/{DEVICE}/messages/events/"
SIGNATURE = b"\x5a" * 32
SOON_MS = 30000  # a wait that should not happen at all is shorter than this on any machine
MICROPYTHON = str(Path(sys.executable).with_name("micropython"))


class Client(Protocol):
    """A client, called by name as `support.board.board_mqtt` describes."""

    def call(self, method: str, *arguments: Any) -> Any: ...
    def close(self) -> None: ...


class Paho:
    """The client of the agent on Linux."""

    def __init__(self, ca_file: str, connect_to: str) -> None:
        self._hub = host_mqtt.HubConnection(connect_to=connect_to, ca_file=ca_file, transport="mqtt")
        self._limit_s = host_mqtt.CONNECT_LIMIT_S
        self._abort_after_s = 0.0

    def call(self, method: str, *arguments: Any) -> Any:
        if method == "limit":
            host_mqtt.CONNECT_LIMIT_S = arguments[0] / 1000
            return None
        if method == "abort":
            self._abort_after_s = arguments[0] / 1000
            return None
        if self._abort_after_s:
            threading.Timer(self._abort_after_s, self._hub.abort).start()
            self._abort_after_s = 0.0
        if method == "connect":
            return self._hub.connect(connecting(*arguments))
        if method == "next_event":
            return self._hub.next_event(time.monotonic() + arguments[0] / 1000)
        return getattr(self._hub, method)(*arguments)

    def close(self) -> None:
        host_mqtt.CONNECT_LIMIT_S = self._limit_s
        self._hub.close()


class Board:
    """The client of a board, in this interpreter."""

    def __init__(self, ca_file: str, connect_to: str) -> None:
        self._limit_ms = board_mqtt.CONNECT_LIMIT_MS
        self._runner = asyncio.Runner()
        self.served = Served(roots_of(ca_file), connect_to)

    def call(self, method: str, *arguments: Any) -> Any:
        return self._runner.run(self.served.call(method, *arguments))

    def close(self) -> None:
        board_mqtt.CONNECT_LIMIT_MS = self._limit_ms
        self.call("disconnect")
        self._runner.close()


class MicroPython:
    """The client of a board, where it belongs."""

    def __init__(self, ca_file: str, connect_to: str) -> None:
        self._process = subprocess.Popen(
            [MICROPYTHON, "-X", "heapsize=32m", "tests/support/board/board_mqtt.py", roots_of(ca_file), connect_to],
            cwd=CHECKOUT,
            env={**os.environ, "MICROPYPATH": "agent:hal:micropython:.frozen"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def call(self, method: str, *arguments: Any) -> Any:
        process = self._process
        assert process.stdin and process.stdout
        process.stdin.write(repr((method, *arguments)).encode() + b"\n")
        process.stdin.flush()
        ready, _, _ = select.select([process.stdout], [], [], 30)
        assert ready, f"{method} does not return"
        line = process.stdout.readline().decode()
        assert line, f"{method} ended the process"
        return eval(line, {**vars(effects), **vars(hub_effects)})

    def close(self) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.communicate(timeout=60)
        self._process.kill()
        self._process.wait()


CLIENTS = {"paho": Paho, "board": Board, "board on MicroPython": MicroPython}


def roots_of(ca_file: str) -> str:
    """The same certificates in DER."""
    roots = Path(ca_file).with_suffix(".der")
    roots.write_bytes(der(Path(ca_file)))
    return str(roots)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(params=CLIENTS)
def make(request: pytest.FixtureRequest) -> Iterator[Callable[[str, str], Client]]:
    """Makes the client of this run: of the file of roots and the address to dial."""
    with contextlib.ExitStack() as stack:

        def start(ca_file: str, connect_to: str) -> Client:
            client: Client = CLIENTS[request.param](ca_file, connect_to)
            stack.callback(client.close)
            return client

        yield start


@pytest.fixture
def serve(certificates: Certificates, make: Callable[[str, str], Client]) -> Iterator[Callable[..., Any]]:
    """Starts a hub, by default with a good certificate, and a client for it."""
    good = certificates.good()
    with contextlib.ExitStack() as stack:

        def start(
            behave: Callable[[Peer], None], context: ssl.SSLContext | None = good
        ) -> tuple[Server, Callable[..., Any]]:
            server = stack.enter_context(Server(behave, context))
            return server, make(certificates.ca_file, server.address).call

        yield start


def connect(call: Callable[..., Any], device_id: str = DEVICE, keep_alive_s: int = 240) -> Any:
    return call("connect", HUB, device_id, keep_alive_s, SIGNATURE)


def soon(call: Callable[..., Any], within_ms: int = SOON_MS) -> Any:
    return call("next_event", within_ms)


def send_and_wait(hub: HubPeer, content: bytes) -> None:
    hub.send(content)
    hub.peer.wait_until_gone()


def assert_no_reply(outcome: Any, reason: str) -> NoReply:
    assert isinstance(outcome, NoReply), outcome
    assert outcome.reason.split(": ")[0] == reason, outcome
    assert len(outcome.reason) > len(reason) + 2, "the reason says what happened"
    return outcome


def assert_gone(event: Any, reason: str) -> str:
    assert isinstance(event, Gone), event
    assert event.reason.split(": ")[0] == reason, event
    return event.reason


def await_length(seen: list[Any], length: int) -> None:
    """Waits until the server's thread has put as much into `seen`; who it answered may be faster than it."""
    until_s = time.monotonic() + SOON_MS / 1000
    while len(seen) < length and time.monotonic() < until_s:
        time.sleep(0.01)


# what a connection looks like


def test_a_connect_is_what_a_hub_expects(serve: Any) -> None:
    seen: list[mqtt.Connect] = []
    asked: list[str | None] = []

    def behave(peer: Peer) -> None:
        hub = HubPeer(peer)
        seen.append(hub.accept(session_present=True))
        hub.obey()

    server, call = serve(behave)
    server._context.sni_callback = lambda _socket, name, _context: asked.append(name)
    assert connect(call, keep_alive_s=77) == ConnAck(0, True)
    await_length(seen, 1)
    [packet] = seen
    assert (packet.level, packet.clean_session, packet.keep_alive_s) == (4, False, 77)
    assert (packet.client_id, packet.user_name) == (DEVICE, f"{HUB}/{DEVICE}/?api-version=2021-04-12")
    token = SasToken(f"{HUB}%2Fdevices%2F{DEVICE}", 1_800_000_000, SIGNATURE)
    assert packet.password == token.header().encode()
    assert (packet.will, asked) == (None, [HUB]), "SNI is the hub even where another address is dialled"


@pytest.mark.parametrize("code", [1, 3, 4, 5, 6])
def test_every_refusal_arrives_with_its_code(serve: Any, code: int) -> None:
    server, call = serve(accepting(HubPeer.packet, code))
    assert connect(call) == ConnAck(code, False)
    assert call("publish", TOPIC, b"", 1) is None
    assert soon(call, 50) is None, "a refusal is no lost connection"
    assert server.connections == 1, "nothing is tried again behind our back"


def test_subscriptions_are_granted_each_by_itself(serve: Any) -> None:
    def behave(hub: HubPeer) -> None:
        packet = hub.packet()
        assert packet.filters == (("a/#", 1), ("b/#", 0))
        hub.send(mqtt.suback(packet.packet_id, [1, 0x80]))
        hub.obey()

    _, call = serve(accepting(behave))
    connect(call)
    packet_id = call("subscribe", (("a/#", 1), ("b/#", 0)))
    assert soon(call) == Granted(packet_id, (1, 0x80))


def test_what_is_published_is_acknowledged_only_with_qos_1(serve: Any) -> None:
    _, call = serve(accepting())
    connect(call)
    assert call("publish", TOPIC, b"zero", 0) == 0
    packet_id = call("publish", TOPIC, b"one", 1)
    assert packet_id
    assert soon(call) == Acknowledged(packet_id)
    assert soon(call, 50) is None


def test_without_a_connection_nothing_is_sent(serve: Any) -> None:
    _, call = serve(accepting())
    call("acknowledge", 7)
    sent = (call("subscribe", (("a", 0),)), call("publish", TOPIC, b"", 0), call("publish", TOPIC, b"", 1))
    assert sent == (None, None, None)
    assert soon(call, 10) is None
    call("disconnect")


def test_a_topic_that_mqtt_has_no_room_for_is_not_taken(serve: Any) -> None:
    _, call = serve(accepting())
    connect(call)
    assert call("publish", "x" * 65536, b"", 1) is None
    assert call("publish", "x" * 65535, b"", 1)


def test_the_largest_messages_arrive_and_leave(serve: Any) -> None:
    payload = os.urandom(16 * 1024)
    received: list[bytes] = []

    def behave(hub: HubPeer) -> None:
        packet = hub.packet()
        received.append(packet.payload)
        hub.send(mqtt.puback(packet.packet_id))
        hub.send(mqtt.publish(mqtt.Publish("t", payload)))
        hub.obey()

    _, call = serve(accepting(behave))
    connect(call)
    packet_id = call("publish", TOPIC, bytes(256 * 1024), 1)
    assert soon(call) == Acknowledged(packet_id)
    assert soon(call) == Arrived("t", payload, 0)
    assert received == [bytes(256 * 1024)]


def test_only_what_we_acknowledge_is_acknowledged(serve: Any) -> None:
    acknowledged: list[object] = []

    def behave(hub: HubPeer) -> None:
        for packet_id in (11, 12):
            hub.send(mqtt.publish(mqtt.Publish("t", b"m", 1, packet_id=packet_id)))
        hub.send(mqtt.publish(mqtt.Publish("t", b"q0")))
        acknowledged.append(hub.packet())
        hub.obey()

    _, call = serve(accepting(behave))
    connect(call)
    assert [soon(call) for _ in range(3)] == [Arrived("t", b"m", 11), Arrived("t", b"m", 12), Arrived("t", b"q0", 0)]
    call("acknowledge", 12)
    call("disconnect")
    assert acknowledged == [mqtt.PubAck(12)]


# whom we talk to


@pytest.mark.parametrize(
    "server_is", ["of_another_name", "of_another_authority", "expired", "self_signed", "of_tls_1_1"]
)
def test_a_hub_that_is_not_verified_gets_no_token(serve: Any, certificates: Certificates, server_is: str) -> None:
    received: list[bytes] = []
    _, call = serve(lambda peer: received.append(peer.receive()), getattr(certificates, server_is)())
    outcome = connect(call)
    assert isinstance(outcome, NoReply) and not outcome.request_sent
    # OpenSSL names an old version by its number or by what it signs with, mbedTLS by its number.
    reasons = ("tls_version", "tls_failed") if server_is == "of_tls_1_1" else ("tls",)
    assert outcome.reason.partition(":")[0] in reasons, outcome
    assert received == []


@pytest.mark.parametrize("then", ["cut", "reset", "say_goodbye"])
def test_an_end_before_connack_is_a_closed_connection(serve: Any, then: str) -> None:
    def behave(peer: Peer) -> None:
        HubPeer(peer).packet()
        getattr(peer, then)()

    _, call = serve(behave)
    assert_no_reply(connect(call), "closed")


def test_a_port_where_nobody_listens_is_a_connect_failure(make: Any, certificates: Certificates) -> None:
    with socket.create_server((LOOPBACK, 0)) as taken:
        port = taken.getsockname()[1]
    assert_no_reply(connect(make(certificates.ca_file, f"{LOOPBACK}:{port}").call), "connect")


def test_a_name_that_does_not_resolve_says_so(make: Any, certificates: Certificates) -> None:
    outcome = connect(make(certificates.ca_file, "no-such-hub.invalid:8883").call)
    # Without a network nobody can know that the name does not exist.
    assert_no_reply(
        outcome, "dns" if isinstance(outcome, NoReply) and outcome.reason.startswith("dns") else "not_found"
    )


# hubs that say nothing


@pytest.mark.parametrize("context", ["good", None], ids=["after TLS", "before TLS"])
def test_a_hub_that_accepts_and_says_nothing_ends_at_the_deadline(
    serve: Any, certificates: Certificates, context: str | None
) -> None:
    _, call = serve(Peer.wait_until_gone, certificates.good() if context else None)
    call("limit", 500)
    began_s = time.monotonic()
    assert_no_reply(connect(call), "timeout")
    assert 0.4 < time.monotonic() - began_s < SOON_MS / 1000


def test_the_deadline_is_the_designed_one() -> None:
    assert host_mqtt.CONNECT_LIMIT_S * 1000 == board_mqtt.CONNECT_LIMIT_MS == 60_000


def test_silence_of_one_and_a_half_keep_alives_ends_the_connection(serve: Any) -> None:
    pings: list[float] = []

    def behave(hub: HubPeer) -> None:
        while True:
            assert isinstance(hub.packet(), mqtt.PingRequest)
            pings.append(time.monotonic())

    _, call = serve(accepting(behave))
    connect(call, keep_alive_s=1)
    began_s = time.monotonic()
    assert "nothing came from the hub for" in assert_gone(soon(call), "timeout")
    assert 1.4 < time.monotonic() - began_s < SOON_MS / 1000
    assert pings and pings[0] < time.monotonic() - 0.4, "asked whether it still lives well before it gave up"


def test_what_we_send_ourselves_does_not_hide_the_hubs_silence(serve: Any) -> None:
    def behave(hub: HubPeer) -> None:
        while True:
            hub.packet()

    _, call = serve(accepting(behave))
    connect(call, keep_alive_s=1)
    began_s = time.monotonic()
    event = None
    while event is None and time.monotonic() - began_s < SOON_MS / 1000:
        call("publish", TOPIC, b"zero", 0)
        event = soon(call, 100)
    assert_gone(event, "timeout")
    assert 1.4 < time.monotonic() - began_s < SOON_MS / 1000


def test_a_hub_that_answers_pings_is_kept(serve: Any) -> None:
    gaps: list[float] = []

    def behave(hub: HubPeer) -> None:
        last_s = time.monotonic()
        while isinstance(hub.packet(), mqtt.PingRequest):
            gaps.append(time.monotonic() - last_s)
            last_s = time.monotonic()
            hub.send(mqtt.ping_response())

    _, call = serve(accepting(behave))
    connect(call, keep_alive_s=1)
    assert soon(call, 3200) is None
    assert len(gaps) == 4 and all(0.6 < gap < 1.0 for gap in gaps), gaps


def test_a_hub_whose_window_is_full_does_not_block_us(serve: Any) -> None:
    over = threading.Event()
    _, call = serve(accepting(lambda _hub: over.wait(2 * SOON_MS / 1000) and None))
    try:
        connect(call)
        for _ in range(20):
            call("publish", TOPIC, bytes(32 * 1024), 0)  # a board has no room for all of them
        began_s = time.monotonic()
        assert soon(call, 50) is None
        call("disconnect")
        assert time.monotonic() - began_s < SOON_MS / 1000
    finally:
        over.set()


# ends that nobody asked for


@pytest.mark.parametrize("then", ["cut", "reset", "say_goodbye"])
def test_a_connection_that_the_hub_ends_is_gone_once(serve: Any, then: str) -> None:
    def behave(hub: HubPeer) -> None:
        hub.packet()
        getattr(hub.peer, then)()

    _, call = serve(accepting(behave))
    connect(call)
    call("publish", TOPIC, b"", 0)
    assert_gone(soon(call), "closed")
    assert soon(call, 50) is None
    assert call("publish", TOPIC, b"", 1) is None


def test_what_came_before_the_end_is_told_before_it(serve: Any) -> None:
    def behave(hub: HubPeer) -> None:
        for number in range(10):
            hub.send(mqtt.publish(mqtt.Publish("t", b"%d" % number)))

    _, call = serve(accepting(behave))
    connect(call)
    assert [soon(call) for _ in range(10)] == [Arrived("t", b"%d" % number, 0) for number in range(10)]
    assert_gone(soon(call), "closed")


@pytest.mark.parametrize(
    "garbage",
    [
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        b"\x20\x03\x00\x00\x00",  # CONNACK of three bytes
        b"\x30\x03\x00\x01t",  # PUBLISH before CONNACK
        bytes(100),
    ],
)
def test_what_is_no_connack_is_a_protocol_failure(serve: Any, garbage: bytes) -> None:
    def behave(peer: Peer) -> None:
        HubPeer(peer).packet()
        peer.send(garbage)
        peer.wait_until_gone()

    _, call = serve(behave)
    assert_no_reply(connect(call), "protocol")


@pytest.mark.parametrize(
    "garbage",
    [
        b"\x20\x02\x00\x00",  # a second CONNACK
        b"\x34\x05\x00\x01t\x00\x01",  # PUBLISH with QoS 2
        b"\x10\x00",  # CONNECT
        b"\xd0\xff\xff\xff\xff\x01",  # a length of five bytes
        b"\x40\x03\x00\x01\x00",  # PUBACK of three bytes
        b"\x30\x02\x00\x09",  # a topic longer than its packet
        b"\x30\x03\x00\x01\xff",  # a topic that is not UTF-8
        b"\x90\x01\x00",  # SUBACK without a packet id
        b"\x90\x0b" + bytes(11),  # SUBACK for more than anybody asked for
        b"\x90\xd8\xfa\x13" + bytes(327_000),
    ],
)
def test_a_packet_that_no_hub_sends_ends_the_connection(serve: Any, garbage: bytes) -> None:
    _, call = serve(accepting(lambda hub: send_and_wait(hub, garbage)))
    connect(call)
    assert_gone(soon(call), "protocol")


def test_an_announced_flood_ends_the_connection_before_there_is_memory_for_it(serve: Any) -> None:
    flood = b"\x30\xff\xff\xff\x7f" + b"\x00\x01t" + bytes(1000)
    _, call = serve(accepting(lambda hub: send_and_wait(hub, flood)))
    connect(call)
    assert str(host_mqtt.PACKET_LIMIT) in assert_gone(soon(call), "too_large")


def test_a_flood_of_small_messages_arrives_in_order(serve: Any) -> None:
    def behave(hub: HubPeer) -> None:
        for number in range(300):
            hub.send(mqtt.publish(mqtt.Publish("t", b"%d" % number)))
        hub.obey()

    _, call = serve(accepting(behave))
    connect(call)
    time.sleep(0.2)
    for number in range(300):
        assert soon(call) == Arrived("t", b"%d" % number, 0)


# what is in flight


def test_what_was_not_acknowledged_is_sent_again_with_dup_and_its_packet_id(serve: Any) -> None:
    first: list[mqtt.Publish] = []
    again: list[mqtt.Publish] = []
    connections = iter(range(10))

    def behave(hub: HubPeer) -> None:
        if next(connections) == 0:
            first.extend([hub.packet(), hub.packet()])
            hub.peer.cut()
            return
        for _ in range(2):
            again.append(hub.packet())
            hub.send(mqtt.puback(again[-1].packet_id))
        hub.obey()

    _, call = serve(accepting(behave))
    connect(call)
    ids = [call("publish", TOPIC, b"a", 1), call("publish", TOPIC, b"", 1)]
    assert_gone(soon(call), "closed")
    assert connect(call) == ConnAck(0, False)
    for packet_id in ids:
        call("send_again", packet_id)
    assert [soon(call), soon(call)] == [Acknowledged(ids[0]), Acknowledged(ids[1])]
    assert [(p.packet_id, p.payload, p.dup) for p in first] == [(ids[0], b"a", False), (ids[1], b"", False)]
    assert [(p.packet_id, p.payload, p.dup) for p in again] == [(ids[0], b"a", True), (ids[1], b"", True)]


def test_what_was_given_up_is_neither_sent_again_nor_acknowledged(serve: Any) -> None:
    again: list[Any] = []
    connections = iter(range(10))

    def behave(hub: HubPeer) -> None:
        if next(connections) == 0:
            hub.packet()
            hub.peer.cut()
            return
        hub.send(mqtt.puback(given_up))
        again.append(hub.packet())
        hub.obey()

    _, call = serve(accepting(behave))
    connect(call)
    given_up = call("publish", TOPIC, b"a", 1)
    assert_gone(soon(call), "closed")
    call("give_up", given_up)
    connect(call)
    call("send_again", given_up)
    call("subscribe", (("t", 0),))
    assert soon(call, 500) is None
    assert [type(packet) for packet in again] == [mqtt.Subscribe]


@pytest.mark.parametrize("clean", [False, True])
def test_a_connection_begins_anew_where_that_is_wanted(serve: Any, clean: bool) -> None:
    seen: list[mqtt.Connect] = []

    def behave(peer: Peer) -> None:
        hub = HubPeer(peer)
        seen.append(hub.accept())
        hub.obey()

    _, call = serve(behave)
    for wanted in (clean, not clean, clean):
        assert call("connect", HUB, DEVICE, 240, SIGNATURE, 1_800_000_000, wanted) == ConnAck(0, False)
    call("publish", TOPIC, b"", 1)
    assert isinstance(soon(call), Acknowledged)
    assert [connect.clean_session for connect in seen] == [clean, not clean, clean]


@pytest.mark.parametrize("make", ["paho", "board"], indirect=True)  # another interpreter takes a minute
def test_a_hub_that_does_not_take_its_answers_is_not_listened_to(serve: Any) -> None:
    """However much it asks for: what waits for it has a bound in number and bytes, and it is heard again afterwards."""
    reads = threading.Event()
    asked = 1500

    def behave(hub: HubPeer) -> None:
        do, last = (mqtt.publish(mqtt.Publish("t", content)) for content in (b"do", b"last"))
        hub.send(do * asked + last)  # the kernels have room for that
        assert reads.wait(60)
        hub.obey()

    _, call = serve(accepting(behave))
    connect(call)
    heard = refused = 0
    try:
        while (event := soon(call, 1500)) is not None:
            assert event == Arrived("t", b"do", 0)
            heard += 1
            refused += call("publish", "$iothub/methods/res/200/?$rid=1", bytes(12_000), 0) is None
        assert 0 < heard < asked, "it was asked for more"
        assert refused <= 4, "what was heard has its answer"
    finally:
        reads.set()
    while (event := soon(call)) != Arrived("t", b"last", 0):
        assert event == Arrived("t", b"do", 0)


def test_of_an_earlier_connections_events_only_acknowledgements_may_come(serve: Any) -> None:
    _, call = serve(accepting(lambda hub: (hub.send(mqtt.publish(mqtt.Publish("t", b"old"))), hub.obey())[1]))
    connect(call)
    assert soon(call) == Arrived("t", b"old", 0)
    call("publish", TOPIC, b"a", 1)
    assert isinstance(soon(call), Acknowledged)
    call("post", RegisterAgain())
    assert connect(call) == ConnAck(0, False)
    seen = [soon(call, 200), soon(call, 200)]
    assert sorted(map(repr, seen)) == sorted(map(repr, [RegisterAgain(), Arrived("t", b"old", 0)])), "of this one"


def test_another_identity_has_nothing_in_flight(serve: Any) -> None:
    second: list[Any] = []
    connections = iter(range(10))

    def behave(hub: HubPeer) -> None:
        if next(connections) == 0:
            hub.packet()
            hub.peer.cut()
            return
        second.append(hub.packet())
        hub.send(mqtt.suback(second[-1].packet_id, [0]))
        hub.obey()

    _, call = serve(accepting(behave))
    connect(call)
    call("publish", TOPIC, b"a", 1)
    assert_gone(soon(call), "closed")
    assert connect(call, "press-08") == ConnAck(0, False)
    call("subscribe", (("t", 0),))
    assert isinstance(soon(call), Granted)
    assert [type(packet) for packet in second] == [mqtt.Subscribe]


# ends that we ask for


def test_a_disconnect_is_polite_and_takes_what_was_said_before_with_it(serve: Any) -> None:
    said: list[object] = []

    def behave(hub: HubPeer) -> None:
        while not isinstance(said[-1] if said else None, mqtt.Disconnect):
            hub.send(mqtt.publish(mqtt.Publish("t", b"unread")))
            said.append(hub.packet())

    _, call = serve(accepting(behave))
    connect(call)
    call("publish", TOPIC, b"last", 0)
    began_s = time.monotonic()
    call("disconnect")
    assert time.monotonic() - began_s < SOON_MS / 1000
    await_length(said, 2)
    assert [type(packet) for packet in said] == [mqtt.Publish, mqtt.Disconnect]
    assert soon(call, 20) is None, "an end that we asked for is no news"


def test_a_silent_peer_holds_no_disconnect_up(serve: Any) -> None:
    over = threading.Event()
    _, call = serve(accepting(lambda _hub: over.wait(2 * SOON_MS / 1000) and None))
    try:
        connect(call)
        for _ in range(8):
            call("publish", TOPIC, bytes(200_000), 1)
        began_s = time.monotonic()
        call("disconnect")
        assert time.monotonic() - began_s < SOON_MS / 1000
    finally:
        over.set()


def test_a_second_connect_ends_the_first_connection(serve: Any) -> None:
    ends: list[object] = []

    def behave(hub: HubPeer) -> None:
        ends.append(hub.packet())

    server, call = serve(accepting(behave))
    connect(call)
    connect(call)
    assert server.connections == 2
    call("disconnect")
    await_length(ends, 2)
    assert ends == [mqtt.Disconnect(), mqtt.Disconnect()]


# other tasks


def test_events_of_programs_come_without_any_connection_and_in_order(serve: Any) -> None:
    _, call = serve(accepting())
    for number in range(3):
        assert call("post", MessageDone(number))
    assert [soon(call, 10) for _ in range(4)] == [MessageDone(0), MessageDone(1), MessageDone(2), None]


def test_programs_that_post_without_end_do_not_starve_the_hub(serve: Any) -> None:
    _, call = serve(accepting())
    connect(call)
    packet_id = call("publish", TOPIC, b"", 1)
    until_s = time.monotonic() + SOON_MS / 1000
    event = None
    while event != Acknowledged(packet_id):
        assert time.monotonic() < until_s
        call("post", MessageDone(1))
        call("post", MessageDone(2))
        event = soon(call)


@pytest.mark.parametrize("context", ["good", None], ids=["after TLS", "before TLS"])
def test_abort_ends_a_connect(serve: Any, certificates: Certificates, context: str | None) -> None:
    _, call = serve(Peer.wait_until_gone, certificates.good() if context else None)
    call("abort", 300)
    began_s = time.monotonic()
    assert assert_no_reply(connect(call), "closed").reason == "closed: given up"
    assert 0.2 < time.monotonic() - began_s < SOON_MS / 1000


def test_abort_ends_a_wait_and_the_connection_goes_on(serve: Any) -> None:
    _, call = serve(accepting())
    connect(call)
    call("abort", 300)
    began_s = time.monotonic()
    assert soon(call, 20_000) is None
    assert 0.2 < time.monotonic() - began_s < SOON_MS / 1000
    packet_id = call("publish", TOPIC, b"", 1)
    assert soon(call) == Acknowledged(packet_id)


# beside each other at the emulator's hub


@pytest.fixture(scope="module")
def emulator() -> Iterator[EmulatorInThread]:
    with EmulatorInThread() as emulator:
        yield emulator


def log_in(call: Callable[..., Any], device: DeviceCredentials, life_s: int = 3600) -> Any:
    """Connects with a token by the device's key."""
    resource = f"{device.hub}%2Fdevices%2F{device.device_id}"
    expires_at_s = int(time.time()) + life_s
    signature = hmac.digest(device.key, f"{resource}\n{expires_at_s}".encode(), "sha256")
    return call("connect", device.hub, device.device_id, 240, signature, expires_at_s)


def test_telemetry_commands_and_a_kick_at_the_emulators_hub(emulator: EmulatorInThread, make: Any) -> None:
    device = emulator.add_device(f"press-{time.monotonic_ns()}")
    call = make(str(emulator.ca_file), emulator.hub_connect_to).call
    assert log_in(call, device, -3600) == ConnAck(5, False), "an expired token"
    assert log_in(call, device) == ConnAck(0, False)
    devicebound = f"devices/{device.device_id}/messages/devicebound/"
    packet_id = call("subscribe", ((f"{devicebound}#", 1), ("$iothub/twin/res/#", 0)))
    assert soon(call) == Granted(packet_id, (1, 0))
    packet_id = call("publish", f"devices/{device.device_id}/messages/events/a=b", b"21.5", 1)
    assert soon(call) == Acknowledged(packet_id)
    assert emulator.await_telemetry(1, device.device_id)[0]["properties"] == {"a": "b"}
    call("publish", "$iothub/twin/GET/?$rid=7", b"", 0)
    twin = soon(call)
    assert twin.topic == "$iothub/twin/res/200/?$rid=7" and b"$version" in twin.payload
    emulator.send_c2d(device.device_id, b"first", {"n": "1"})
    arrived = soon(call)
    assert arrived.topic.startswith(devicebound) and arrived.payload == b"first" and arrived.packet_id
    with contextlib.closing(Board(str(emulator.ca_file), emulator.hub_connect_to)) as second:
        assert log_in(second.call, device) == ConnAck(0, True), "the hub kept the subscriptions"
        assert_gone(soon(call), "closed")
        again = soon(second.call)
        assert again.payload == b"first", "it was not acknowledged"
        second.call("acknowledge", again.packet_id)
        assert soon(second.call, 200) is None
    assert log_in(call, device) == ConnAck(0, True)
    assert soon(call, 200) is None, "and comes no more"


# what only the board's client says


@pytest.fixture(params=["board", "board on MicroPython"])
def small(request: pytest.FixtureRequest, certificates: Certificates) -> Iterator[Callable[..., Any]]:
    with contextlib.ExitStack() as stack:

        def start(behave: Callable[[Peer], None]) -> Callable[..., Any]:
            server = stack.enter_context(Server(behave, certificates.good()))
            client: Client = CLIENTS[request.param](certificates.ca_file, server.address)
            stack.callback(client.close)
            return client.call

        yield start


def test_of_a_message_too_large_for_a_board_the_session_is_told_without_its_payload(small: Any) -> None:
    def behave(hub: HubPeer) -> None:
        hub.send(mqtt.publish(mqtt.Publish("t", bytes(16 * 1024 + 1), 1, packet_id=9)))
        hub.send(mqtt.publish(mqtt.Publish("t", bytes(256 * 1024))))
        hub.send(mqtt.publish(mqtt.Publish("t", b"small")))
        hub.obey()

    call = small(accepting(behave))
    connect(call)
    assert [soon(call) for _ in range(3)] == [Arrived("t", None, 9), Arrived("t", None, 0), Arrived("t", b"small", 0)]


def test_a_topic_too_large_for_a_board_ends_the_connection(small: Any) -> None:
    packet = mqtt.publish(mqtt.Publish("t" * 20_000, b""))
    call = small(accepting(lambda hub: send_and_wait(hub, packet)))
    connect(call)
    assert "a topic of 20000 bytes" in assert_gone(soon(call), "too_large")


def test_what_the_hub_acknowledges_while_we_part_is_told_on_the_next_connection(small: Any) -> None:
    def behave(hub: HubPeer) -> None:
        held = hub.packet()
        if isinstance(held, mqtt.Publish) and isinstance(hub.packet(), mqtt.Disconnect):
            hub.send(mqtt.puback(held.packet_id))

    call = small(accepting(behave))
    connect(call)
    packet_id = call("publish", TOPIC, b"a", 1)
    call("disconnect")
    connect(call)
    assert soon(call) == Acknowledged(packet_id)


def test_a_hub_is_verified_before_there_is_a_token_and_once(small: Any) -> None:
    connections: list[Peer] = []

    def behave(peer: Peer) -> None:
        connections.append(peer)
        hub = HubPeer(peer)
        hub.accept()
        hub.obey()

    call = small(behave)
    assert call("reach", HUB) is None and call("is_reached", HUB) and not call("is_reached", "other.example")
    assert connect(call) == ConnAck(0, False)
    assert len(connections) == 1 and not call("is_reached", HUB)


def test_too_much_telemetry_of_programs_is_refused_and_one_can_be_taken_back(small: Any) -> None:
    call = small(accepting())
    mine, other = SendTelemetry(7, {}, b"x", 0, 1), SendTelemetry(8, {}, b"x", 0, 1)
    assert call("post", mine) and [call("post", other) for _ in range(50)].count(True) == 31
    assert call("take_back", 0) is True and call("take_back", 0) is False
    assert call("post", other) and not call("post", other) and soon(call) == other


def test_what_is_taken_back_is_the_event_itself_and_none_that_is_equal(small: Any) -> None:
    call = small(accepting())
    mine, equal = (SendTelemetry(7, {}, b"x", 0, 1) for _ in range(2))
    assert call("post", mine) and not call("take_back", equal)
    assert call("take_back", 0) and not call("take_back", 0)


def test_the_token_is_kept_nowhere_after_connect(certificates: Certificates) -> None:
    with Server(accepting(), certificates.good()) as server:
        board = Board(certificates.ca_file, server.address)
        assert connect(board.call) == ConnAck(0, False)
        assert "Signature" not in repr(vars(board.served.client))
        board.close()


def test_a_packet_id_in_flight_is_not_given_twice(certificates: Certificates) -> None:
    with Server(accepting(lambda hub: hub.peer.wait_until_gone()), certificates.good()) as server:
        board = Board(certificates.ca_file, server.address)
        connect(board.call)
        held = board.call("publish", TOPIC, b"held", 1)
        board.served.client._packet_id = held - 1  # as after 65535 messages
        assert board.call("publish", TOPIC, b"other", 1) != held
        board.close()


class Bytes:
    """A link with these bytes in it, in pieces, and then its end."""

    def __init__(self, pieces: list[bytes]) -> None:
        self._pieces = pieces

    def write(self, piece: memoryview) -> int:
        return len(piece)

    def read(self, limit: int) -> bytes:
        while self._pieces and not self._pieces[0]:
            self._pieces.pop(0)
        if not self._pieces:
            return b""
        taken, self._pieces[0] = self._pieces[0][:limit], self._pieces[0][limit:]
        return taken

    def close(self) -> None:
        pass


@settings(max_examples=500, deadline=None)
@given(
    st.lists(
        st.binary(max_size=40)
        | st.sampled_from([b"\x30", b"\x32\x06\x00\x01t\x00\x01", b"\x90\x03", b"\x40\x02", b"\xd0\x00"]),
        max_size=8,
    )
)
def test_no_bytes_of_a_hub_raise(pieces: list[bytes]) -> None:
    client = board_mqtt.HubConnection(Trust([]))
    client.link = Bytes([mqtt.connack(0), *pieces])  # type: ignore[assignment]
    client._packets = client._read_packets()
    client._want(next(client._packets))
    client._keep_alive_ms = 60_000
    client._connected = True
    client._received_ms = client._sent_ms = client._pinged_ms = board_mqtt.ticks_ms()
    events = []
    while not events or not isinstance(events[-1], Gone):
        event = asyncio.run(client.next_event(1000))
        assert event is not None, pieces
        events.append(event)
    assert events[-1].reason.split(":")[0] in ("closed", "protocol", "too_large")
