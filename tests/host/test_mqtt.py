"""The hub connection against hubs that behave and hubs that do not; real sockets and TLS, all on loopback."""

from __future__ import annotations

import base64
import contextlib
import gc
import hashlib
import os
import random
import select
import socket
import ssl
import threading
import time
import types
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dps_agent.effects import NoReply
from dps_agent.host import hub_ways, runner
from dps_agent.host.network import mqtt as host_mqtt
from dps_agent.host.network.mqtt import PACKET_LIMIT, HubConnection
from dps_agent.host.network.websocket import Frames, packed
from dps_agent.hub_effects import (
    Acknowledged,
    Arrived,
    ConnAck,
    Connect,
    Gone,
    Granted,
    MessageDone,
    ReadTwin,
    RegisterAgain,
)
from dps_agent.sas import SasToken
from dps_emulator import mqtt, websocket
from dps_hal.errors import AskOperator
from support.cloud.broker import HubPeer, accepting
from support.cloud.emulator import HUB as EMULATED_HUB
from support.cloud.emulator import EmulatorInThread
from support.cloud.servers import ENDPOINT_NAME, LOOPBACK, Certificates, Peer, Server, answer, proxying

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from dps_agent.hub_effects import Event

HUB = ENDPOINT_NAME  # the name in the test's certificates
DEVICE = "press-07"
TOPIC = f"devices/{DEVICE}/messages/events/"
SOON_S = 30.0  # a wait that should not happen at all is shorter than this on any machine
TOKEN = SasToken(f"{HUB}%2Fdevices%2F{DEVICE}", 1_800_000_000, b"\x5a" * 32)


def connecting(device_id: str = DEVICE, keep_alive_s: int = 240, hub: str = HUB) -> Connect:
    return Connect(hub, device_id, f"{hub}/{device_id}/?api-version=2021-04-12", TOKEN, keep_alive_s, False)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture
def serve(certificates: Certificates) -> Iterator[Callable[..., tuple[Server, HubConnection]]]:
    """Starts a hub, by default with a good certificate, and a connection to it."""
    good = certificates.good()
    with contextlib.ExitStack() as stack:

        def start(
            behave: Callable[[Peer], None], context: ssl.SSLContext | None = good, **options: object
        ) -> tuple[Server, HubConnection]:
            server = stack.enter_context(Server(behave, context))
            given = {"connect_to": server.address, "ca_file": certificates.ca_file, **options}
            hub = HubConnection(**given)  # type: ignore[arg-type]
            stack.callback(hub.close)
            return server, hub

        yield start


def soon(hub: HubConnection, within_s: float = SOON_S) -> Event | None:
    return hub.next_event(time.monotonic() + within_s)


def send_and_wait(hub: HubPeer, content: bytes) -> None:
    hub.send(content)
    hub.peer.wait_until_gone()


def assert_no_reply(outcome: ConnAck | NoReply, reason: str) -> NoReply:
    assert isinstance(outcome, NoReply), outcome
    assert outcome.reason.split(": ")[0] == reason, outcome
    assert len(outcome.reason) > len(reason) + 2, "the reason says what happened"
    return outcome


def assert_gone(event: Event | None, reason: str) -> str:
    assert isinstance(event, Gone), event
    assert event.reason.split(": ")[0] == reason, event
    return event.reason


# what a connection looks like


def test_a_connect_is_what_a_hub_expects(serve) -> None:
    seen: list[mqtt.Connect] = []
    asked: list[str | None] = []

    def behave(peer: Peer) -> None:
        hub = HubPeer(peer)
        seen.append(hub.accept(session_present=True))
        hub.obey()

    server, hub = serve(behave)
    assert server._context is not None
    server._context.sni_callback = lambda _socket, name, _context: asked.append(name)
    assert hub.connect(connecting(keep_alive_s=77)) == ConnAck(0, True)
    until_s = time.monotonic() + SOON_S
    while not seen and time.monotonic() < until_s:
        time.sleep(0.01)
    [connect] = seen
    assert (connect.level, connect.clean_session, connect.keep_alive_s) == (4, False, 77)
    assert (connect.client_id, connect.user_name) == (DEVICE, f"{HUB}/{DEVICE}/?api-version=2021-04-12")
    assert connect.password == TOKEN.header().encode()
    assert (connect.will, asked) == (None, [HUB]), "SNI is the hub even where another address is dialled"


def test_the_token_is_kept_nowhere_after_connect(serve) -> None:
    _, hub = serve(accepting())
    assert hub.connect(connecting()) == ConnAck(0, False)
    signature = TOKEN.header().partition("sig=")[2][:20]
    assert signature not in repr(vars(hub)) + repr(vars(hub._client)) + repr(vars(hub._wire))
    assert hub._client is not None and hub._client.password is None


@pytest.mark.parametrize("code", [1, 2, 3, 4, 5, 6])
def test_every_refusal_arrives_with_its_code(serve, code: int) -> None:
    server, hub = serve(accepting(HubPeer.packet, code))
    assert hub.connect(connecting()) == ConnAck(code, False)
    assert hub.publish(TOPIC, b"", 1) is None
    assert soon(hub, 0.05) is None, "a refusal is no lost connection"
    assert server.connections == 1, "nothing is tried again behind our back"


def test_subscriptions_are_granted_each_by_itself(serve) -> None:
    def behave(hub: HubPeer) -> None:
        packet = hub.packet()
        assert packet.filters == (("a/#", 1), ("b/#", 0))
        hub.send(mqtt.suback(packet.packet_id, [1, 0x80]))
        hub.obey()

    _, hub = serve(accepting(behave))
    hub.connect(connecting())
    packet_id = hub.subscribe((("a/#", 1), ("b/#", 0)))
    assert soon(hub) == Granted(packet_id, (1, 0x80))


def test_what_is_published_is_acknowledged_only_with_qos_1(serve) -> None:
    _, hub = serve(accepting())
    hub.connect(connecting())
    assert hub.publish(TOPIC, b"zero", 0) == 0
    packet_id = hub.publish(TOPIC, b"one", 1)
    assert packet_id
    assert soon(hub) == Acknowledged(packet_id)
    assert soon(hub, 0.05) is None


def test_without_a_connection_nothing_is_sent(serve) -> None:
    _, hub = serve(accepting())
    hub.acknowledge(7)
    assert (hub.subscribe((("a", 0),)), hub.publish(TOPIC, b"", 0), hub.publish(TOPIC, b"", 1)) == (None, None, None)
    assert soon(hub, 0.01) is None
    hub.disconnect()


def test_a_topic_that_mqtt_has_no_room_for_is_not_taken(serve) -> None:
    _, hub = serve(accepting())
    hub.connect(connecting())
    assert hub.publish("x" * 65536, b"", 1) is None
    assert hub.publish("x" * 65535, b"", 1)


def test_a_message_of_256_kib_arrives_and_leaves(serve) -> None:
    payload = os.urandom(256 * 1024)
    received: list[bytes] = []

    def behave(hub: HubPeer) -> None:
        packet = hub.packet()
        received.append(packet.payload)
        hub.send(mqtt.puback(packet.packet_id))
        hub.send(mqtt.publish(mqtt.Publish("t", payload)))
        hub.obey()

    _, hub = serve(accepting(behave))
    hub.connect(connecting())
    packet_id = hub.publish(TOPIC, payload, 1)
    assert soon(hub) == Acknowledged(packet_id)
    assert soon(hub) == Arrived("t", payload, 0)
    assert received == [payload]


def test_only_what_we_acknowledge_is_acknowledged(serve) -> None:
    acknowledged: list[object] = []

    def behave(hub: HubPeer) -> None:
        for packet_id in (11, 12):
            hub.send(mqtt.publish(mqtt.Publish("t", b"m", 1, packet_id=packet_id)))
        hub.send(mqtt.publish(mqtt.Publish("t", b"q0")))
        acknowledged.append(hub.packet())
        hub.obey()

    _, hub = serve(accepting(behave))
    hub.connect(connecting())
    assert [soon(hub), soon(hub), soon(hub)] == [Arrived("t", b"m", 11), Arrived("t", b"m", 12), Arrived("t", b"q0", 0)]
    hub.acknowledge(12)
    hub.disconnect()
    assert acknowledged == [mqtt.PubAck(12)]


# whom we talk to


@pytest.mark.parametrize("transport", ["mqtt", "websocket"])
@pytest.mark.parametrize(
    ("server_is", "says"),
    [
        ("of_another_name", "Hostname mismatch"),
        ("of_another_authority", "unable to get local issuer certificate"),
        ("expired", "certificate has expired"),
        ("self_signed", "self-signed certificate"),
        ("of_tls_1_1", "no TLS 1.2 or newer"),
    ],
)
def test_a_hub_that_is_not_verified_gets_no_token(
    serve, certificates: Certificates, server_is: str, says: str, transport: str
) -> None:
    received: list[bytes] = []
    _, hub = serve(
        lambda peer: received.append(peer.receive()), getattr(certificates, server_is)(), transport=transport
    )
    reason = "tls_version" if server_is == "of_tls_1_1" else "tls"
    outcome = assert_no_reply(hub.connect(connecting()), reason)
    assert says in outcome.reason
    assert not outcome.request_sent
    assert received == []


def test_a_ca_file_without_certificates_is_the_operator_s(tmp_path) -> None:
    with pytest.raises(AskOperator, match=r"hub\.ca_file: expected PEM certificates"):
        HubConnection(ca_file=str(tmp_path / "absent.pem"))


@pytest.mark.parametrize("then", ["cut", "reset", "say_goodbye"])
def test_an_end_before_connack_is_a_closed_connection(serve, then: str) -> None:
    def behave(peer: Peer) -> None:
        HubPeer(peer).packet()
        getattr(peer, then)()

    _, hub = serve(behave)
    assert_no_reply(hub.connect(connecting()), "closed")


def test_a_port_where_nobody_listens_is_a_connect_failure(certificates: Certificates) -> None:
    with socket.create_server((LOOPBACK, 0)) as taken:
        port = taken.getsockname()[1]
    hub = HubConnection(connect_to=f"{LOOPBACK}:{port}", ca_file=certificates.ca_file)
    assert_no_reply(hub.connect(connecting()), "connect")


@pytest.mark.parametrize(("context", "good"), [("good", True), ("expired", False), ("of_another_name", False)])
def test_a_hub_is_verified_without_a_connection(serve, certificates: Certificates, context: str, good: bool) -> None:
    seen: list[bytes] = []
    server, hub = serve(lambda peer: seen.append(peer.receive()), getattr(certificates, context)())
    assert hub.is_verified(HUB) is good
    assert hub.publish(TOPIC, b"", 0) is None
    server.stop_listening()
    assert not hub.is_verified(HUB)
    assert not any(seen), "nothing was said to it"


def test_a_hub_that_was_verified_is_not_dialled_again(serve) -> None:
    server, hub = serve(accepting())
    assert hub.is_verified(HUB) and hub.connect(connecting()) == ConnAck(0, False)
    assert (server.connections, server.handshakes) == (1, 1)
    assert hub.is_verified(HUB) and hub.publish(TOPIC, b"", 0) == 0, "the connection stands"
    assert hub.connect(connecting()) == ConnAck(0, False)
    assert server.connections == 2
    assert hub.is_verified("other.example") is False
    assert hub.connect(connecting()) == ConnAck(0, False)


def test_who_was_verified_long_ago_or_is_another_is_not_taken_for_the_hub(serve, monkeypatch) -> None:
    closed: list[Peer] = []

    def behave(peer: Peer) -> None:
        try:
            accepting()(peer)
        finally:
            closed.append(peer)

    server, hub = serve(behave)
    assert hub.is_verified(HUB)
    hub._reached = ("other.example", *hub._reached[1:])
    assert hub.connect(connecting()) == ConnAck(0, False) and server.connections == 2
    monkeypatch.setattr(host_mqtt, "REACHED_LIFE_S", 0.0)
    assert hub.is_verified(HUB)
    assert hub.connect(connecting()) == ConnAck(0, False) and server.connections == 4
    assert hub.is_verified(HUB)
    hub.close()
    until_s = time.monotonic() + SOON_S
    while len(closed) < 5 and time.monotonic() < until_s:
        time.sleep(0.01)
    assert len(closed) == server.connections == 5, "none is left open"


@pytest.mark.parametrize("heard", [False, True])
def test_a_hub_that_hung_up_on_silence_is_dialled_again_and_once(serve, heard: bool) -> None:
    def behave(peer: Peer) -> None:
        if server.connections == 1:
            if heard:
                peer.receive()
            peer.say_goodbye()
            peer.cut()
        else:
            accepting()(peer)

    server, hub = serve(behave)
    assert hub.is_verified(HUB)
    assert hub.connect(connecting()) == ConnAck(0, False)
    assert server.connections == 2


def test_a_hub_that_hangs_up_on_every_connect_is_given_up_after_the_second(serve) -> None:
    server, hub = serve(lambda peer: peer.receive())
    assert hub.is_verified(HUB)
    assert_no_reply(hub.connect(connecting()), "closed")
    assert server.connections == 2


def test_a_clock_is_confirmed_by_a_certificate_and_never_by_a_session(serve) -> None:
    server, hub = serve(accepting())
    assert hub.connect(connecting()) == ConnAck(0, False)
    assert hub.is_verified(HUB)
    assert hub.connect(connecting()) == ConnAck(0, False)
    assert server._context.session_stats()["hits"] == 0
    assert hub.connect(connecting()) == ConnAck(0, False)
    assert server._context.session_stats()["hits"] == 1


@pytest.mark.parametrize(
    ("error", "reason"),
    [(socket.EAI_NONAME, "not_found"), (socket.EAI_NODATA, "not_found"), (socket.EAI_AGAIN, "dns"), (0, "dns")],
)
def test_a_name_that_is_not_there_is_no_name_service_that_is_not_there(monkeypatch, error: int, reason: str) -> None:
    def fail(*_arguments: object, **_options: object) -> None:
        raise socket.gaierror(error, "as the resolver says it")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    assert_no_reply(HubConnection().connect(connecting()), reason)


# hubs that say nothing


@pytest.mark.parametrize("context", ["good", None], ids=["after TLS", "before TLS"])
def test_a_hub_that_accepts_and_says_nothing_ends_at_the_deadline(
    serve, certificates: Certificates, monkeypatch, context: str | None
) -> None:
    monkeypatch.setattr(host_mqtt, "CONNECT_LIMIT_S", 0.5)
    _, hub = serve(Peer.wait_until_gone, certificates.good() if context else None)
    began_s = time.monotonic()
    assert_no_reply(hub.connect(connecting()), "timeout")
    assert 0.4 < time.monotonic() - began_s < SOON_S


def test_events_of_programs_cost_nothing_while_a_connect_waits(serve, monkeypatch) -> None:
    monkeypatch.setattr(host_mqtt, "CONNECT_LIMIT_S", 1.5)
    _, hub = serve(Peer.wait_until_gone)
    hub.post(RegisterAgain())
    began_s = time.thread_time()
    assert_no_reply(hub.connect(connecting()), "timeout")
    assert time.thread_time() - began_s < 0.7, "it waited by asking again and again"
    assert soon(hub) == RegisterAgain()


def test_the_deadlines_are_the_designed_ones() -> None:
    assert host_mqtt.CONNECT_LIMIT_S == 60
    assert (host_mqtt.PING_AFTER, host_mqtt.SILENCE) == (0.75, 1.5)
    assert host_mqtt.FLUSH_LIMIT_S + host_mqtt.LINGER_S < runner.EXIT_GRACE_S, "a signal leaves time for a polite end"
    assert runner.EXIT_GRACE_S < hub_ways.HUB_DEADLINE_S


def test_silence_of_one_and_a_half_keep_alives_ends_the_connection(serve) -> None:
    pings: list[float] = []

    def behave(hub: HubPeer) -> None:
        while True:
            assert isinstance(hub.packet(), mqtt.PingRequest)
            pings.append(time.monotonic())

    _, hub = serve(accepting(behave))
    hub.connect(connecting(keep_alive_s=1))
    began_s = time.monotonic()
    assert "nothing came from the hub for" in assert_gone(soon(hub), "timeout")
    assert 1.4 < time.monotonic() - began_s < SOON_S
    assert pings and pings[0] < time.monotonic() - 0.4, "asked whether it still lives well before it gave up"
    assert len(pings) == 1, "the next time to ask is the time to give up"


def test_what_we_send_ourselves_does_not_hide_the_hub_s_silence(serve) -> None:
    pings: list[object] = []

    def behave(hub: HubPeer) -> None:
        while True:
            if isinstance(packet := hub.packet(), mqtt.PingRequest):
                pings.append(packet)

    _, hub = serve(accepting(behave))
    hub.connect(connecting(keep_alive_s=1))
    began_s = time.monotonic()
    event = None
    while event is None and time.monotonic() - began_s < SOON_S:
        hub.publish(TOPIC, b"zero", 0)
        event = soon(hub, 0.1)
    assert_gone(event, "timeout")
    assert 1.4 < time.monotonic() - began_s < SOON_S
    assert len(pings) <= 1, "the next time to ask is the time to give up"


def test_a_hub_that_answers_pings_is_kept(serve) -> None:
    gaps: list[float] = []

    def behave(hub: HubPeer) -> None:
        last_s = time.monotonic()
        while isinstance(hub.packet(), mqtt.PingRequest):
            gaps.append(time.monotonic() - last_s)
            last_s = time.monotonic()
            hub.send(mqtt.ping_response())

    _, hub = serve(accepting(behave))
    hub.connect(connecting(keep_alive_s=1))
    assert soon(hub, 3.2) is None
    assert len(gaps) == 4 and all(0.6 < gap < 1.0 for gap in gaps), gaps


def test_a_hub_whose_window_is_full_does_not_block_us(serve) -> None:
    over = threading.Event()
    _, hub = serve(accepting(lambda _hub: over.wait(2 * SOON_S) and None))
    try:
        hub.connect(connecting())
        began_s = time.monotonic()
        for _ in range(40):
            assert hub.publish(TOPIC, bytes(256 * 1024), 1)
        assert soon(hub, 0.05) is None
        hub.close()
        assert time.monotonic() - began_s < hub_ways.HUB_DEADLINE_S, "whoever has asked for it waits no longer"
    finally:
        over.set()


# ends that nobody asked for


@pytest.mark.parametrize("then", ["cut", "reset", "say_goodbye"])
def test_a_connection_that_the_hub_ends_is_gone_once(serve, then: str) -> None:
    def behave(hub: HubPeer) -> None:
        hub.packet()
        getattr(hub.peer, then)()

    _, hub = serve(accepting(behave))
    hub.connect(connecting())
    hub.publish(TOPIC, b"", 0)
    assert_gone(soon(hub), "closed")
    assert soon(hub, 0.05) is None
    assert hub.publish(TOPIC, b"", 1) is None


def test_what_came_before_the_end_is_told_before_it(serve) -> None:
    def behave(hub: HubPeer) -> None:
        hub.send(mqtt.publish(mqtt.Publish("t", b"last words")))

    _, hub = serve(accepting(behave))
    hub.connect(connecting())
    assert soon(hub) == Arrived("t", b"last words", 0)
    assert_gone(soon(hub), "closed")


@pytest.mark.parametrize(
    "garbage",
    [
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        b"\x20\x03\x00\x00\x00",  # CONNACK of three bytes
        b"\x30\x03\x00\x01t",  # PUBLISH before CONNACK
        bytes(100),
    ],
)
def test_what_is_no_connack_is_a_protocol_failure(serve, garbage: bytes) -> None:
    def behave(peer: Peer) -> None:
        HubPeer(peer).packet()
        peer.send(garbage)
        peer.wait_until_gone()

    _, hub = serve(behave)
    assert_no_reply(hub.connect(connecting()), "protocol")


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
def test_a_packet_that_no_hub_sends_ends_the_connection(serve, garbage: bytes) -> None:
    _, hub = serve(accepting(lambda hub: send_and_wait(hub, garbage)))
    hub.connect(connecting())
    assert_gone(soon(hub), "protocol")


@settings(max_examples=300, deadline=None)
@given(st.lists(st.binary(max_size=40) | st.sampled_from([b"\x30", b"\x90\x03", b"\x40\x02", b"\xd0\x00"]), max_size=6))
def test_no_bytes_of_a_hub_raise(pieces: list[bytes]) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        hub = HubConnection(transport="mqtt")
        client = hub._client_of(connecting())
        hub._wire = client.wire = wire = host_mqtt._Wire(_AsTls(ours), None, b"")  # type: ignore[arg-type]
        client.connect(HUB, keepalive=60)
        hub._connected, hub._keep_alive_s = True, 60.0
        theirs.sendall(mqtt.connack(0))
        for piece in pieces:
            theirs.sendall(piece)
        theirs.shutdown(socket.SHUT_WR)
        events = []
        while not events or not isinstance(events[-1], Gone):
            event = soon(hub)
            assert event is not None, pieces
            events.append(event)
        assert wire.closed
        hub.close()


class _AsTls:
    """A plain socket where TLS is expected."""

    def __init__(self, plain: socket.socket) -> None:
        self._plain = plain

    def __getattr__(self, name: str) -> object:
        return getattr(self._plain, name)

    def pending(self) -> int:
        return 0

    def recv(self, size: int) -> bytes:
        try:
            return self._plain.recv(size)
        except BlockingIOError:
            raise host_mqtt.ssl.SSLWantReadError from None


def test_an_announced_flood_ends_the_connection_before_there_is_memory_for_it(serve) -> None:
    flood = b"\x30\xff\xff\xff\x7f" + b"\x00\x01t" + bytes(1000)
    _, hub = serve(accepting(lambda hub: send_and_wait(hub, flood)))
    hub.connect(connecting())
    assert str(PACKET_LIMIT) in assert_gone(soon(hub), "too_large")


def test_a_flood_of_small_messages_waits_in_the_hub_until_we_ask(serve) -> None:
    over = threading.Event()
    message = mqtt.publish(mqtt.Publish("t", bytes(1000)))

    def behave(hub: HubPeer) -> None:
        for _ in range(5000):
            hub.send(message)
        over.wait(2 * SOON_S)

    _, hub = serve(accepting(behave))
    try:
        hub.connect(connecting())
        time.sleep(0.2)
        for _ in range(50):
            hub.post(RegisterAgain())
        for _ in range(5050):
            assert soon(hub) is not None
            assert len(hub._events) <= host_mqtt.EVENTS_LIMIT
    finally:
        over.set()


# what is in flight


def test_what_was_not_acknowledged_is_sent_again_with_dup_and_its_packet_id(serve) -> None:
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

    _, hub = serve(accepting(behave))
    hub.connect(connecting())
    ids = [hub.publish(TOPIC, b"a", 1), hub.publish(TOPIC, b"b", 1)]
    assert_gone(soon(hub), "closed")
    assert hub.connect(connecting()) == ConnAck(0, False)
    for packet_id in ids:
        hub.send_again(packet_id)
    assert [soon(hub), soon(hub)] == [Acknowledged(ids[0]), Acknowledged(ids[1])]
    assert [(p.packet_id, p.payload, p.dup) for p in first] == [(ids[0], b"a", False), (ids[1], b"b", False)]
    assert [(p.packet_id, p.payload, p.dup) for p in again] == [(ids[0], b"a", True), (ids[1], b"b", True)]


def test_an_acknowledgement_that_nobody_asked_for_yet_outlives_its_connection(serve) -> None:
    _, hub = serve(accepting())
    hub.connect(connecting())
    packet_id = hub.publish(TOPIC, b"a", 1)
    deadline_s = time.monotonic() + SOON_S
    while not hub._events and time.monotonic() < deadline_s:
        hub._serve(time.monotonic() + 0.1, hub._loop.wait)
    hub.post(RegisterAgain())
    assert hub.connect(connecting()) == ConnAck(0, False)
    assert [soon(hub), soon(hub), soon(hub, 0.05)] == [Acknowledged(packet_id), RegisterAgain(), None]


def test_another_identity_has_nothing_in_flight(serve) -> None:
    second: list[Any] = []
    connections = iter(range(10))

    def behave(hub: HubPeer) -> None:
        if next(connections) == 0:
            hub.packet()
            hub.peer.cut()
            return
        second.append(hub.packet())
        hub.send(mqtt.puback(first_id) + mqtt.suback(second[-1].packet_id, [0]))
        hub.obey()

    _, hub = serve(accepting(behave))
    hub.connect(connecting())
    first_id = hub.publish(TOPIC, b"a", 1)
    assert first_id is not None
    assert_gone(soon(hub), "closed")
    assert hub.connect(connecting("press-08")) == ConnAck(0, False)
    hub.subscribe((("t", 0),))
    assert isinstance(soon(hub), Granted), "an acknowledgement of what the other identity has sent is nobody's"
    assert [type(packet) for packet in second] == [mqtt.Subscribe]


@pytest.mark.parametrize(("topic", "payload"), [("t", bytes(250_000)), ("t" * 65_000, b"")])
def test_large_messages_wait_in_the_hub_until_we_ask(serve, topic: str, payload: bytes) -> None:
    over = threading.Event()
    message = mqtt.publish(mqtt.Publish(topic, payload))

    def behave(hub: HubPeer) -> None:
        for _ in range(30):
            hub.send(message)
        over.wait(20)

    _, hub = serve(accepting(behave))
    try:
        hub.connect(connecting())
        for _ in range(30):
            until_s = time.monotonic() + 0.05
            while time.monotonic() < until_s:
                hub._serve(until_s, hub._loop.wait)
            waiting = sum(len(event.topic) + len(event.payload) for event in hub._events)
            assert waiting < host_mqtt.EVENTS_SIZE + 250_000
            assert isinstance(soon(hub), Arrived)
    finally:
        over.set()


def test_pings_without_end_neither_fill_the_memory_nor_hold_anybody_up(serve) -> None:
    over = threading.Event()

    def behave(peer: Peer) -> None:
        peer.send(websocket.upgrade(peer.request()).answer)
        peer.receive()
        peer.send(websocket.binary_frame(mqtt.connack(0)))
        with contextlib.suppress(ConnectionError):
            while not over.is_set():
                peer.send((b"\x89\x7d" + bytes(125)) * 100)

    _, hub = serve(behave, transport="websocket")
    try:
        assert hub.connect(connecting()) == ConnAck(0, False)
        assert hub._wire is not None
        for _ in range(20):
            hub.post(MessageDone(1))
            assert soon(hub) == MessageDone(1), "a program's turn comes"
            assert soon(hub, 0.05) is None, "and the end of a wait"
            assert hub._wire is None or len(hub._wire._unsent) < 64 * 1024
    finally:
        over.set()


def test_a_packet_id_in_flight_is_not_given_twice(serve) -> None:
    _, hub = serve(accepting(lambda hub: hub.peer.wait_until_gone()))
    hub.connect(connecting())
    held = hub.publish(TOPIC, b"held", 1)
    assert hub._client is not None
    hub._client._last_mid = held - 1  # as after 65535 messages
    assert hub.publish(TOPIC, b"other", 1) != held


# ends that we ask for


def test_a_disconnect_is_polite_and_takes_what_was_said_before_with_it(serve) -> None:
    said: list[object] = []

    def behave(hub: HubPeer) -> None:
        while not isinstance(said[-1] if said else None, mqtt.Disconnect):
            hub.send(mqtt.publish(mqtt.Publish("t", b"unread")))
            said.append(hub.packet())

    _, hub = serve(accepting(behave))
    hub.connect(connecting())
    hub.publish(TOPIC, b"last", 0)
    began_s = time.monotonic()
    hub.disconnect()
    assert time.monotonic() - began_s < SOON_S
    deadline_s = time.monotonic() + SOON_S
    while len(said) < 2 and time.monotonic() < deadline_s:
        time.sleep(0.01)
    assert [type(packet) for packet in said] == [mqtt.Publish, mqtt.Disconnect]
    assert soon(hub, 0.02) is None, "an end that we asked for is no news"


def test_a_silent_peer_holds_no_disconnect_up(serve) -> None:
    over = threading.Event()
    _, hub = serve(accepting(lambda _hub: over.wait(2 * SOON_S) and None))
    try:
        hub.connect(connecting())
        for _ in range(20):
            hub.publish(TOPIC, bytes(200_000), 1)
        began_s = time.monotonic()
        hub.close()
        assert time.monotonic() - began_s < hub_ways.HUB_DEADLINE_S, "whoever has asked for it waits no longer"
    finally:
        over.set()


def test_a_second_connect_ends_the_first_connection(serve) -> None:
    ends: list[object] = []

    def behave(hub: HubPeer) -> None:
        ends.append(hub.packet())

    server, hub = serve(accepting(behave))
    hub.connect(connecting())
    hub.connect(connecting())
    assert server.connections == 2
    hub.disconnect()
    deadline_s = time.monotonic() + SOON_S
    while len(ends) < 2 and time.monotonic() < deadline_s:
        time.sleep(0.01)
    assert ends == [mqtt.Disconnect(), mqtt.Disconnect()]


def test_a_message_with_qos_0_that_finds_the_connection_reset_is_not_sent(serve) -> None:
    over = threading.Event()

    def behave(hub: HubPeer) -> None:
        over.wait(10)
        hub.peer.reset()

    _, hub = serve(accepting(behave))
    hub.connect(connecting())
    assert hub.publish(TOPIC, b"1", 0) == 0
    poll = select.poll()
    poll.register(hub._wire, 0)
    over.set()
    assert poll.poll(10_000), "it was reset"
    assert hub.publish(TOPIC, b"1", 0) is None
    assert_gone(soon(hub), "closed")
    assert hub.publish(TOPIC, b"1", 0) is None


def test_what_is_sent_with_qos_0_does_not_wait_for_more_of_a_batch(serve) -> None:
    came = threading.Event()

    def behave(hub: HubPeer) -> None:
        packet = hub.packet()
        if isinstance(packet, mqtt.Publish) and packet.payload == b"1":
            came.set()
        hub.obey()

    _, hub = serve(accepting(behave))
    hub.connect(connecting())
    assert hub.post(MessageDone(1)) and hub.post(MessageDone(2))
    assert soon(hub) == MessageDone(1)
    assert hub.publish(TOPIC, b"1", 0) == 0
    assert came.wait(60), "it was answered as written"
    assert soon(hub) == MessageDone(2)


# other threads


def test_a_post_is_heard_at_once(serve) -> None:
    _, hub = serve(accepting())
    hub.connect(connecting())
    soon(hub, 0.01)
    took_s = []
    for number in range(10):
        posted_at_s: list[float] = []

        def post(number: int = number, at_s: list[float] = posted_at_s) -> None:
            time.sleep(0.05)
            at_s.append(time.monotonic())
            hub.post(MessageDone(number))

        thread = threading.Thread(target=post)
        thread.start()
        assert soon(hub) == MessageDone(number)
        took_s.append(time.monotonic() - posted_at_s[0])
        thread.join()
    assert sorted(took_s)[1] < 0.05, took_s  # a wait that asked again and again would find two of ten so soon by luck


def test_events_of_programs_come_without_any_connection_and_in_order() -> None:
    hub = HubConnection()
    for number in range(3):
        assert hub.post(MessageDone(number))
    assert [soon(hub, 0.01) for _ in range(4)] == [MessageDone(0), MessageDone(1), MessageDone(2), None]
    hub.close()


def test_too_many_events_of_programs_are_refused() -> None:
    hub = HubConnection()
    taken = sum(hub.post(MessageDone(number)) for number in range(host_mqtt.POSTS_LIMIT + 10))
    assert taken == host_mqtt.POSTS_LIMIT


def test_an_event_is_taken_back_once_and_only_while_it_waits_whoever_takes_others_meanwhile() -> None:
    hub = HubConnection()
    events = [MessageDone(number) for number in range(100)]
    assert all(map(hub.post, events))
    assert soon(hub, 0.01) == events[0] and not hub.take_back(events[0])
    got: list[Any] = []
    taker = threading.Thread(target=lambda: got.extend(iter(lambda: hub.next_event(0.0), None)))
    taker.start()
    taken_back = [event for event in reversed(events) if hub.take_back(event)]
    taker.join(60)
    assert sorted(got + taken_back) == events[1:] and not any(map(hub.take_back, events))
    hub.close()


def test_what_is_taken_back_is_the_event_itself_and_none_that_is_equal() -> None:
    hub = HubConnection()
    done, read, other = MessageDone(7), ReadTwin(7), MessageDone(7)
    assert done == read and hub.post(done) and hub.post(other)
    assert not hub.take_back(read)
    assert hub.take_back(other) and not hub.take_back(other)
    assert soon(hub, 0.01) is done and soon(hub, 0.01) is None
    hub.close()


def test_when_a_hub_was_heard_can_be_asked_while_its_connection_ends() -> None:
    class Ending(HubConnection):
        """Its connection ends as soon as anybody has looked at it."""

        looks = 0

        def __getattribute__(self, name: str) -> Any:
            if name == "_wire":
                self.looks += 1
                return types.SimpleNamespace(received_at_s=5.0) if self.looks == 1 else None
            return super().__getattribute__(name)

    hub = Ending()
    assert hub.heard_at_s == 5.0 and hub.heard_at_s is None


def test_programs_that_post_without_end_do_not_starve_the_hub(serve) -> None:
    _, hub = serve(accepting())
    hub.connect(connecting())
    packet_id = hub.publish(TOPIC, b"", 1)
    until_s = time.monotonic() + SOON_S
    event = None
    while event != Acknowledged(packet_id):
        assert time.monotonic() < until_s
        hub.post(MessageDone(1))
        hub.post(MessageDone(2))
        event = soon(hub)


def aborted(hub: HubConnection, call: Callable[[], object], after_s: float = 0.3) -> object:
    """What `call` returns when another thread aborts it; it must return within half a second of that."""
    at_s = []

    def abort() -> None:
        time.sleep(after_s)
        at_s.append(time.monotonic())
        hub.abort()

    thread = threading.Thread(target=abort)
    thread.start()
    outcome = call()
    ended_s = time.monotonic()
    thread.join()
    assert ended_s - at_s[0] < 0.5, "abort() did not end it"
    return outcome


@pytest.mark.parametrize("transport", ["mqtt", "websocket"])
@pytest.mark.parametrize("context", ["good", None], ids=["after TLS", "before TLS"])
def test_abort_ends_a_connect(serve, certificates: Certificates, context: str | None, transport: str) -> None:
    _, hub = serve(Peer.wait_until_gone, certificates.good() if context else None, transport=transport)
    outcome = aborted(hub, lambda: hub.connect(connecting()))
    assert isinstance(outcome, NoReply)
    assert outcome.reason == "closed: given up"


def test_abort_ends_a_name_lookup(monkeypatch) -> None:
    over = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_arguments, **_options: [over.wait(SOON_S)][1:])
    hub = HubConnection()
    try:
        assert aborted(hub, lambda: hub.connect(connecting())) == NoReply("closed: given up", False)
    finally:
        over.set()


def test_abort_ends_a_wait_and_leaves_the_connection(serve) -> None:
    _, hub = serve(accepting())
    hub.connect(connecting())
    assert aborted(hub, lambda: soon(hub)) is None
    packet_id = hub.publish(TOPIC, b"", 1)
    assert soon(hub) == Acknowledged(packet_id)


# WebSocket and proxies, with the emulator's hub behind them


@pytest.fixture(scope="module")
def emulator() -> Iterator[EmulatorInThread]:
    with EmulatorInThread() as running:
        yield running


class PlainToken(SasToken):
    """A token that the emulator's side has made."""

    def __init__(self, text: str) -> None:
        super().__init__("", 0, b"")
        self._text = text

    def header(self) -> str:
        return self._text


@pytest.fixture
def enter(emulator: EmulatorInThread) -> Iterator[Callable[..., tuple[HubConnection, Connect]]]:
    """A device at the emulator's hub: its connection, not yet opened, and its Connect."""
    numbers = iter(range(100))
    with contextlib.ExitStack() as stack:

        def start(**options: object) -> tuple[HubConnection, Connect]:
            device = emulator.add_device(f"device-{os.urandom(4).hex()}-{next(numbers)}")
            given = {"connect_to": emulator.hub_connect_to, "ca_file": str(emulator.ca_file), **options}
            hub = HubConnection(**given)  # type: ignore[arg-type]
            stack.callback(hub.close)
            token = PlainToken(device.token())
            return hub, Connect(EMULATED_HUB, device.device_id, device.user_name, token, 240, False)

        yield start
        emulator.fault()


def send_one(hub: HubConnection, connect: Connect, payload: bytes = b"21.5") -> None:
    packet_id = hub.publish(f"devices/{connect.device_id}/messages/events/", payload, 1)
    assert packet_id
    assert soon(hub) == Acknowledged(packet_id)


@pytest.mark.parametrize("transport", ["mqtt", "websocket"])
@pytest.mark.parametrize("size", [0, 1, 125, 126, 65535, 65536, 200_000])
def test_telemetry_of_any_size_arrives_on_both_transports(enter, emulator, transport: str, size: int) -> None:
    hub, connect = enter(transport=transport)
    assert hub.connect(connect) == ConnAck(0, False)
    send_one(hub, connect, b"x" * size)
    assert [message["payload"] for message in emulator.telemetry(connect.device_id)] == ["x" * size]


@pytest.mark.parametrize("transport", ["mqtt", "websocket"])
def test_a_message_that_was_not_acknowledged_is_delivered_again(enter, emulator, transport: str) -> None:
    hub, connect = enter(transport=transport)
    filters = ((f"devices/{connect.device_id}/messages/devicebound/#", 1),)
    hub.connect(connect)
    hub.subscribe(filters)
    assert isinstance(soon(hub), Granted)
    emulator.send_c2d(connect.device_id, b"open the valve")
    first = soon(hub)
    assert isinstance(first, Arrived) and first.payload == b"open the valve"
    assert hub.connect(connect) == ConnAck(0, True)
    hub.subscribe(filters)
    events = [soon(hub), soon(hub)]
    [again] = [event for event in events if isinstance(event, Arrived)]
    assert again.payload == b"open the valve"
    hub.acknowledge(again.packet_id)
    hub.connect(connect)
    assert soon(hub, 0.2) is None, "what was acknowledged does not come again"


def test_a_second_device_with_our_name_kicks_us(enter, emulator: EmulatorInThread) -> None:
    hub, connect = enter()
    hub.connect(connect)
    with contextlib.closing(HubConnection(connect_to=emulator.hub_connect_to, ca_file=str(emulator.ca_file))) as other:
        assert other.connect(connect) == ConnAck(0, True)
        assert_gone(soon(hub), "closed")
        assert soon(other, 0.05) is None


def test_a_lost_puback_costs_one_dup_and_no_message(enter, emulator: EmulatorInThread) -> None:
    hub, connect = enter()
    hub.connect(connect)
    emulator.fault({"operation": "telemetry", "drop": "after", "times": 1, "device": connect.device_id})
    packet_id = hub.publish(f"devices/{connect.device_id}/messages/events/", b"21.5", 1)
    assert_gone(soon(hub), "closed")
    assert hub.connect(connect) == ConnAck(0, True)
    hub.send_again(packet_id)
    assert soon(hub) == Acknowledged(packet_id)
    assert [(m["payload"], m["dup"]) for m in emulator.telemetry(connect.device_id)] == [
        ("21.5", False),
        ("21.5", True),
    ]


def test_a_websocket_that_is_not_found_is_a_hub_that_is_not_there(serve) -> None:
    requests: list[bytes] = []

    def behave(peer: Peer) -> None:
        requests.append(peer.request())
        peer.send(answer(b"", "404 Not Found"))

    _, hub = serve(behave, transport="websocket")
    assert_no_reply(hub.connect(connecting()), "not_found")
    lines = requests[0].decode().split("\r\n")
    assert lines[0] == "GET /$iothub/websocket HTTP/1.1"
    assert {f"Host: {HUB}", "Sec-WebSocket-Protocol: mqtt", "Upgrade: websocket"} <= set(lines)


@pytest.mark.parametrize(
    ("says", "reason"),
    [
        (answer(b"", "503 Service Unavailable"), "protocol"),
        (b"SSH-2.0-OpenSSH_9.2\r\n\r\n", "protocol"),
        (answer(b"", "101 Switching Protocols", "Upgrade: websocket\r\nConnection: Upgrade\r\n"), "protocol"),
        (b"HTTP/1.1 101 x\r\nX: " + b"x" * 20_000, "too_large"),
        (b"HTTP/1.1 101", "closed"),
    ],
)
def test_an_upgrade_that_is_none_is_refused(serve, says: bytes, reason: str) -> None:
    def behave(peer: Peer) -> None:
        peer.request()
        peer.send(says)
        if reason == "too_large":
            peer.wait_until_gone()

    _, hub = serve(behave, transport="websocket")
    assert_no_reply(hub.connect(connecting()), reason)


@given(st.binary(max_size=300), st.lists(st.integers(1, 50), max_size=20), st.binary(max_size=125))
def test_frames_come_apart_wherever_they_are_cut(content: bytes, cuts: list[int], ping: bytes) -> None:
    half = len(content) // 2
    sent = _server_frame(0x02, content[:half]) + _server_frame(0x89, ping) + _server_frame(0x80, content[half:])
    frames, found = Frames(), b""
    for cut in cuts:
        found += frames.unpack(sent[:cut])
        sent = sent[cut:]
    assert found + frames.unpack(sent) == content
    pong = frames.pong()
    assert frames.pong() == b"", "one answer is enough"
    mask = pong[2:6]
    assert (pong[0], pong[1]) == (0x8A, 0x80 | len(ping))
    assert bytes(byte ^ mask[at % 4] for at, byte in enumerate(pong[6:])) == ping


class FloodingTls:
    """A hub that sends one thing for ever, as fast as it is read, and reads nothing."""

    def __init__(self, sent: bytes) -> None:
        self.sent = sent
        self.reads = 0

    def recv(self, size: int) -> bytes:
        self.reads += 1
        return self.sent[:size]

    def send(self, _content: bytes) -> int:
        raise ssl.SSLWantWriteError

    def pending(self) -> int:
        return len(self.sent)


def test_pings_of_a_hub_that_does_not_read_are_kept_no_more_than_one() -> None:
    tls = FloodingTls(_server_frame(0x89, b"p" * 125) * 100)
    wire = host_mqtt._Wire(tls, Frames(), b"")  # type: ignore[arg-type]
    for turn in range(1, 50):
        assert not wire.fill(), "paho need not see any of it"
        with pytest.raises(BlockingIOError):
            wire.recv(1)
        assert tls.reads == turn, "one read for each turn"
        wire.flush()
        assert wire.wants_write() and len(wire._unsent) == 2 + 4 + 125


def test_one_turn_reads_once_however_many_packets_the_hub_has(serve) -> None:
    wire = host_mqtt._Wire(FloodingTls(mqtt.connack(0)), None, b"")  # type: ignore[arg-type]
    assert wire.fill()
    assert b"".join(wire.recv(1) for _ in range(3)) == mqtt.connack(0)[:3] and wire.recv(1)
    with pytest.raises(BlockingIOError):
        wire.recv(1)


def test_pings_without_end_keep_no_time_and_no_program_waiting(serve) -> None:
    def behave(peer: Peer) -> None:
        request = peer.request().decode()
        key = next(line.split(": ")[1] for line in request.split("\r\n") if line.startswith("Sec-WebSocket-Key"))
        salted = hashlib.sha1(key.encode() + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest()
        says = "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Protocol: mqtt\r\n"
        says += f"Sec-WebSocket-Accept: {base64.b64encode(salted).decode()}\r\n"
        peer.send(f"HTTP/1.1 101 Switching Protocols\r\n{says}\r\n".encode() + _server_frame(0x82, mqtt.connack(0)))
        while True:
            peer.send(_server_frame(0x89, b"p" * 125) * 200)

    _, hub = serve(behave, transport="websocket")
    assert hub.connect(connecting()) == ConnAck(0, False)
    for _ in range(10):
        began_s = time.monotonic()
        assert hub.next_event(began_s + 0.05) is None
        assert time.monotonic() - began_s < SOON_S
        assert hub.post(MessageDone(7))
        assert soon(hub) == MessageDone(7)
        assert hub._wire is not None and len(hub._wire._unsent) <= 131 and len(hub._wire._received) == 0


def _server_frame(first_byte: int, payload: bytes) -> bytes:
    size = len(payload)
    return bytes([first_byte, size]) + payload if size < 126 else bytes([first_byte, 126, *size.to_bytes(2)]) + payload


@pytest.mark.parametrize("size", [0, 125, 126, 65535, 65536])
def test_a_frame_is_masked_and_says_its_size(size: int) -> None:
    content = os.urandom(size)
    frame = packed(content)
    extended = {126: 2, 127: 8}.get(frame[1] & 0x7F, 0)
    assert frame[0] == 0x82 and frame[1] & 0x80
    assert (int.from_bytes(frame[2 : 2 + extended]) if extended else frame[1] & 0x7F) == size
    mask = frame[2 + extended : 6 + extended]
    assert bytes(byte ^ mask[at % 4] for at, byte in enumerate(frame[6 + extended :])) == content
    assert packed(content)[2 + extended : 6 + extended] != mask


def at_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every name is this machine."""

    def resolve(_host: str, port: int, **_options: object) -> list[object]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (LOOPBACK, port))]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)


def test_auto_takes_the_websocket_where_the_port_is_closed_and_remembers(enter, emulator, monkeypatch) -> None:
    at_loopback(monkeypatch)
    with socket.create_server((LOOPBACK, 0)) as taken:
        closed_port = taken.getsockname()[1]
    hub, connect = enter(connect_to="", port=closed_port, websocket_port=emulator.hub_port)
    dialled: list[int] = []
    dial = hub._dialler.dial

    def noting(name: str, host: str, port: int, *times_s: float) -> ssl.SSLSocket:
        dialled.append(port)
        return dial(name, host, port, *times_s)

    monkeypatch.setattr(hub._dialler, "dial", noting)
    assert hub.connect(connect) == ConnAck(0, False)
    send_one(hub, connect)
    assert hub.connect(connect) == ConnAck(0, True)
    assert dialled == [closed_port, emulator.hub_port, emulator.hub_port]


def test_auto_does_not_change_the_transport_for_a_certificate(serve, certificates, monkeypatch) -> None:
    at_loopback(monkeypatch)
    other, _ = serve(accepting())
    wrong, _ = serve(accepting(), certificates.of_another_name())
    hub = HubConnection(port=wrong.port, websocket_port=other.port, ca_file=certificates.ca_file)
    assert_no_reply(hub.connect(connecting()), "tls")
    assert other.connections == 0


@pytest.mark.parametrize("transport", ["mqtt", "websocket"])
@pytest.mark.parametrize("credentials", ["", "user:p%40ss/word"])
def test_both_transports_go_through_a_proxy(enter, emulator, transport: str, credentials: str) -> None:
    plain = credentials.replace("%40", "@")
    with Server(proxying(plain), None) as proxy:
        url = f"http://{credentials.replace('/', '%2F')}@{proxy.address}" if credentials else f"http://{proxy.address}"
        hub, connect = enter(transport=transport, proxy=url)
        assert hub.connect(connect) == ConnAck(0, False)
        send_one(hub, connect)
        assert proxy.requests[0].startswith(f"CONNECT {emulator.hub_connect_to} HTTP/1.1\r\n".encode())
        hub.close()


@pytest.mark.parametrize("user", ["", "user:wrong@"])
def test_a_proxy_that_wants_other_credentials_has_a_reason_of_its_own(enter, user: str) -> None:
    with Server(proxying("user:secret"), None) as proxy:
        hub, connect = enter(proxy=f"http://{user}{proxy.address}")
        outcome = assert_no_reply(hub.connect(connect), "proxy")
    assert "407" in outcome.reason and "wrong" not in outcome.reason


def test_a_proxy_that_does_not_let_the_hub_s_port_through_makes_auto_take_the_websocket(
    enter, emulator: EmulatorInThread
) -> None:
    def behave(peer: Peer) -> None:
        head = peer.request().decode()
        if f":{emulator.hub_port} " not in head:
            peer.send(answer(b"", "403 Forbidden"))
            return
        peer.send(b"HTTP/1.1 200 OK\r\n\r\n")
        with socket.create_connection((LOOPBACK, emulator.hub_port)) as onward:
            peer.pump(onward)

    with Server(behave, None) as proxy:
        hub, connect = enter(connect_to="", websocket_port=emulator.hub_port, proxy=f"http://{proxy.address}")
        assert hub.connect(connect) == ConnAck(0, False)
        send_one(hub, connect)
        hub.close()


# many connections


def held() -> tuple[int, int]:
    """Open descriptors and threads of this process."""
    gc.collect()
    return len(os.listdir("/proc/self/fd")), threading.active_count()


def test_200_reconnects_under_faults_leave_nothing_behind_and_lose_nothing(certificates: Certificates) -> None:
    seed = random.randrange(1 << 32)
    chance = random.Random(seed)
    arrived: set[bytes] = set()

    def behave(peer: Peer) -> None:
        fault = chance.choice(["none", "none", "mid-connect", "connack", "mid-publish", "reset", "delay", "no puback"])
        if fault == "mid-connect":
            peer.receive()
            peer.cut()
            return
        hub = HubPeer(peer)
        hub.accept(3 if fault == "connack" else 0)
        while True:
            if fault == "mid-publish":
                peer.receive()
                peer.cut()
                return
            packet = hub.packet()
            if fault == "delay":
                time.sleep(0.01)
            if isinstance(packet, mqtt.Publish):
                arrived.add(packet.payload)
                if fault == "reset":
                    peer.reset()
                    return
                if fault != "no puback":
                    hub.send(mqtt.puback(packet.packet_id))
                elif chance.random() < 0.2:
                    peer.cut()
                    return

    with Server(behave, certificates.good()) as server:
        hub = HubConnection(connect_to=server.address, ca_file=certificates.ca_file)
        hub.connect(connecting())
        hub.close()
        before: tuple[int, int] | None = None
        sent: dict[int, bytes] = {}
        acknowledged: set[bytes] = set()
        number = connections = 0
        while connections < 200 or sent:
            connections += 1
            assert connections < 1000, f"{seed=}: {len(sent)} messages are never acknowledged"
            outcome = hub.connect(connecting())
            if not isinstance(outcome, ConnAck) or outcome.return_code:
                continue
            for packet_id in sent:
                hub.send_again(packet_id)
            if connections < 200:
                for _ in range(chance.randrange(3)):
                    number += 1
                    packet_id = hub.publish(TOPIC, str(number).encode(), 1)
                    if packet_id:
                        assert packet_id not in sent, f"{seed=}"
                        sent[packet_id] = str(number).encode()
            for _ in range(8):
                event = soon(hub, 0.02)
                if isinstance(event, Acknowledged):
                    acknowledged.add(sent.pop(event.packet_id))
                else:  # silence, or the end
                    break
            if chance.random() < 0.3:
                hub.disconnect()
            if connections >= 20 and before is None:
                hub.close()
                before = _settled(held(), f"{seed=}")
        hub.close()
        assert acknowledged <= arrived, f"{seed=}"
        assert before is not None
        _settled(before, f"{seed=}")


def _settled(most: tuple[int, int], reproduce: str) -> tuple[int, int]:
    """What is open once the server's threads have seen the ends of their connections; no more than `most`."""
    until_s = time.monotonic() + SOON_S
    while (now := held()) and (now[0] > most[0] or now[1] > most[1]) and time.monotonic() < until_s:
        time.sleep(0.05)
    assert now[0] <= most[0] and now[1] <= most[1], f"descriptors, threads: {most} -> {now}; {reproduce}"
    return now
