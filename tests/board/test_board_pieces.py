"""Pieces of a board that need no board: settings, NTP answers, the clock. Plain functions, for both interpreters."""

import asyncio
import os
import struct
import sys

from dps_agent.effects import Failed, NoReply, Reply
from dps_agent.http1 import LINES_LIMIT
from dps_agent.hub_effects import AnswerMethod, Arrived, MessageDone, SendTelemetry
from dps_board import config, memory, parts, tls
from dps_board.clock import BoardClock
from dps_board.config import BoardConfiguration
from dps_board.https import Connection
from dps_board.keys import read_values
from dps_board.mqtt import EVENTS_SIZE, IN_FLIGHT_LIMIT, POSTS_LIMIT, HubConnection
from dps_board.ntp import read_answer
from dps_board.parts import latest_s
from dps_board.runner import NO_ROOM_LIMIT, Agent
from dps_board.tls import Link, Trust, split_address
from dps_hal.errors import AskOperator, RetryLater
from dps_hal.platform import to_json
from support.claims import assert_refused
from support.tpm.tis_chip import ChipOnI2c, ChipOnSpi, EchoTpm, TisChip

BUILT = 1_793_491_200  # 2026-11-01
DAY = 86400
MARK = b"abcdefgh"

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def problem(**settings) -> str:  # type: ignore[no-untyped-def]
    """What is said about these settings, "" where they are good."""
    document = {"id_scope": "0ne00000000"}
    document.update(settings)
    try:
        read_values(to_json(document).encode(), "config.json")
    except AskOperator as error:
        assert error.code in ("config.invalid", "config.missing"), error.code
        return error.message
    return ""


def test_few_settings_are_enough_and_the_rest_has_defaults() -> None:
    values = read_values(b'{"id_scope": "0ne1", "hub": {"keep_alive_s": 60}}', "config.json")
    assert values["id_scope"] == "0ne1" and values["hub.keep_alive_s"] == 60
    assert values["registration_id"] == "auto" and values["tpm.ek_handle"] == 0x81010001
    assert values["hub.hub_suffixes"][0] == ".azure-devices.net"


def test_a_byte_order_mark_in_front_of_the_settings_is_passed_over() -> None:
    assert read_values(b'\xef\xbb\xbf{"id_scope": "0ne1"}\r\n', "config.json")["id_scope"] == "0ne1"


def test_good_settings_are_taken() -> None:
    for settings in (
        {"endpoint": "https://dps.example:8443"},
        {"endpoint": "https://[::1]"},
        {"connect_to": "127.0.0.1:443"},
        {"payload": {"model": {"a": [1]}}},
        {"poll": "operation"},
        {"tpm": {"tcti": "i2c", "ek_template": "azure-c-sdk", "srk_handle": 0x81000002}},
        {"tpm": {"tcti": "swtpm:host=127.0.0.1,port=2321"}},
        {"hub": {"hub_suffixes": ["hub.example"]}},
        {"board": {"ntp_server": "[::1]:123", "watchdog_s": 0}},
        {"board": {"ntp_server": "ntp.example", "watchdog_s": 8}},
        {"board": {"led_pin": "LED", "select_pin": "A4", "reset_pin": 20, "sck_pin": "B3"}},
        {"board": {"wifi_ssid": "plant", "wifi_password": "x" * 63, "led_pin": 25, "ntp_server": ""}},
    ):
        assert problem(**settings) == "", settings


def test_settings_of_another_name_or_type_are_refused_by_name() -> None:
    for name, settings in (
        ("id_scope", {"id_scope": ""}),
        ("id_scope", {"id_scope": 7}),
        ("board.watchdog_s", {"board": {"watchdog_s": True}}),
        ("payload", {"payload": [1]}),
        ("retry.registration_budget_s", {"retry": {"registration_budget_s": True}}),
        ("hub.hub_suffixes", {"hub": {"hub_suffixes": "hub.example"}}),
        ("hub.hub_suffixes", {"hub": {"hub_suffixes": [".azure-devices.net", ""]}}),
        ("hub.hub_suffixes", {"hub": {"hub_suffixes": [1]}}),
        ("hub.features", {"hub": {"features": "auto"}}),
        ("hub.keep_alive_s", {"hub": {"keep_alive_s": 1.5}}),
        ("board.led_pin", {"board": {"led_pin": 1.5}}),
        ("board.reset_pin", {"board": {"reset_pin": None}}),
        ("board.bus", {"board": {"bus": "A4"}}),
        ("board.colour", {"board": {"colour": "red"}}),
        ("hub.port", {"hub": {"port": 8883}}),
        ("idscope", {"idscope": "x"}),
        ("tpm", {"tpm": 1}),
    ):
        assert name in problem(**settings).split(":")[0], (settings, problem(**settings))


class Pins:
    """The module `machine` of a board that has the pins 0 to 29, "LED" and "A4", with a TPM on its buses."""

    def __init__(self) -> None:
        self.chip = TisChip(EchoTpm())
        self.spi = ChipOnSpi(self.chip)
        self.levels: list[object] = []
        self.buses: list[object] = []
        machine = self

        class Pin:
            OUT = 1

            def __init__(self, named: object, mode: int = 0, value: int = -1) -> None:
                if named not in ("LED", "A4") and not (type(named) is int and named < 30):
                    raise ValueError("invalid pin")
                self.named = named
                if mode:
                    self.value(value)

            def value(self, level: int) -> None:
                machine.levels.append((self.named, level))
                if self.named == "A4":
                    machine.spi.chip_select(level)
                elif self.named == 20 and level:
                    machine.chip.hangs = machine.chip.ignores_abort = False
                    machine.chip.power_on()

            __call__ = value

        self.Pin = Pin

    def SPI(self, number: int, baudrate: int, **pins: "Any") -> ChipOnSpi:
        if number > 1:
            raise ValueError("SPI does not exist")
        self.buses.append([number, baudrate, sorted([(name, pins[name].named) for name in pins])])
        return self.spi

    def I2C(self, number: int, freq: int, **pins: "Any") -> ChipOnI2c:
        self.buses.append([number, freq, sorted([(name, pins[name].named) for name in pins])])
        return ChipOnI2c(self.chip)


class OfValues:
    """A configuration, as far as pins are concerned."""

    def __init__(self, **board: "Any") -> None:
        document = {"id_scope": "0ne1", "board": board, "tpm": {"tcti": board.pop("tcti", "spi")}}
        self.values = read_values(to_json(document).encode(), "config.json")


def with_pins(machine: Pins, use: "Any") -> "Any":
    """What `use` gives on a board with these pins."""
    before = sys.modules.get("machine")
    sys.modules["machine"] = machine  # type: ignore[assignment]
    try:
        return use()
    finally:
        if before is None:
            del sys.modules["machine"]
        else:
            sys.modules["machine"] = before


def test_a_bus_gets_the_pins_that_are_named_and_no_others() -> None:
    three = [("miso", 4), ("mosi", 3), ("sck", 2)]
    for board, expected in (
        ({"select_pin": "A4"}, [0, 10_000_000, []]),
        ({"select_pin": "A4", "bus": 1, "sck_pin": 2, "mosi_pin": 3, "miso_pin": 4, "bus_hz": 5}, [1, 5, three]),
        ({"select_pin": "A4", "sck_pin": 2}, [0, 10_000_000, [("sck", 2)]]),
        ({"tcti": "i2c", "scl_pin": 7, "sda_pin": "LED"}, [0, 400_000, [("scl", 7), ("sda", "LED")]]),
        ({"tcti": "i2c"}, [0, 400_000, []]),
    ):
        machine = Pins()
        config: Any = OfValues(**board)
        with_pins(machine, lambda config=config: parts.make_tpm(config))
        assert machine.buses == [expected], machine.buses


def test_a_board_resets_a_tpm_that_hangs_by_the_pin_that_is_wired_to_it() -> None:
    machine = Pins()
    command = bytes([0x80, 1, 0, 0, 0, 10, 0, 0, 1, 0x7A])
    transport = with_pins(machine, lambda: parts._transport(OfValues(select_pin="A4", reset_pin=20).values))
    assert transport.send(command, 5, None) and (20, 0) not in machine.levels and (20, 1) in machine.levels
    machine.chip.hangs = machine.chip.ignores_abort = True
    for _ in range(2):
        machine.levels[:] = []
        try:
            transport.send(command, 0.3, None)
            hung = False
        except RetryLater as error:
            hung = error.code == "tpm.timeout"
        transport.close()
        of_reset = [level for level in machine.levels if level[0] == 20]  # type: ignore[index]
        assert (hung, of_reset) in ((True, []), (False, [(20, 0), (20, 1)])), (hung, of_reset)
    assert not hung and machine.chip.violations == []


def test_a_pin_or_a_bus_that_this_board_does_not_have_is_named() -> None:
    for board, words in (
        ({"select_pin": "B9"}, "board.select_pin: expected what this board has; came B9: invalid pin"),
        ({"select_pin": "A4", "miso_pin": 99}, "board.miso_pin: expected what this board has; came 99: invalid pin"),
        ({"select_pin": "A4", "reset_pin": "X"}, "board.reset_pin: expected what this board has; came X: invalid pin"),
        ({"select_pin": "A4", "bus": 3}, "board.bus: expected what this board has; came 3: SPI does not exist"),
        ({"led_pin": "led"}, "board.led_pin: expected what this board has; came led: invalid pin"),
    ):
        make: Any = parts.make_led if "led_pin" in board else parts.make_tpm
        config: Any = OfValues(**board)
        error = assert_refused(
            lambda make=make, config=config: with_pins(Pins(), lambda: make(config)), AskOperator, "config.invalid"
        )
        assert error.message == words


def test_an_led_by_its_name_is_lit_while_the_identity_serves() -> None:
    machine = Pins()
    config: Any = OfValues(led_pin="LED")
    show = with_pins(machine, lambda: parts.make_led(config))
    for state in ("boot", "connected"):
        show(state)
    assert machine.levels == [("LED", 0), ("LED", 0), ("LED", 1)]
    unlit: Any = OfValues()
    assert parts.make_led(unlit) is None


def test_the_password_of_the_network_is_not_shown() -> None:
    said = problem(board={"wifi_password": 12345678})
    assert "board.wifi_password" in said and "12345678" not in said


def test_a_missing_id_scope_and_broken_json_are_said_as_such() -> None:
    for content, code in ((b"{}", "config.missing"), (b"[]", "config.unreadable"), (b'{"a"', "config.unreadable")):
        try:
            read_values(content, "config.json")
            raise AssertionError(content)
        except AskOperator as error:
            assert error.code in (code, "config.missing"), (content, error.code)  # 1.25 reads a cut-off {"a" as {}


def test_addresses_are_split() -> None:
    assert split_address("dps.example", 443) == ("dps.example", 443)
    assert split_address("dps.example:8443", 443) == ("dps.example", 8443)
    assert split_address("[::1]", 443) == ("::1", 443)
    assert split_address("[::1]:8443", 443) == ("::1", 8443)


def ntp_answer(now_s: int, first: int = 0x24, stratum: int = 2, mark: bytes = MARK) -> bytes:
    seconds = (now_s + 2_208_988_800) & 0xFFFFFFFF
    return bytes([first, stratum]) + bytes(22) + mark + struct.pack(">IIII", seconds, 0, seconds, 0)


def test_an_ntp_answer_is_read_in_this_era_and_the_next() -> None:
    for now_s in (BUILT, 2_085_978_495, 2_085_978_496, 4_000_000_000):
        assert read_answer(ntp_answer(now_s), MARK) == now_s


def test_an_ntp_answer_that_is_none_is_not_taken() -> None:
    for answer in (
        b"",
        ntp_answer(BUILT)[:-1],
        ntp_answer(BUILT, mark=b"abcdefgi"),
        ntp_answer(BUILT, first=0x23),
        ntp_answer(BUILT, first=0xE4),
        ntp_answer(BUILT, stratum=0),
        ntp_answer(BUILT, stratum=16),
    ):
        assert read_answer(answer, MARK) is None, answer


def test_the_rtc_is_set_before_each_handshake_to_the_time_to_verify_under() -> None:
    rtc: list[int] = []
    clock = BoardClock(BUILT, BUILT + 9000 * DAY, rtc.append)
    clock.restart(BUILT + DAY)
    asyncio.run(clock.before_handshake())
    assert abs(rtc[-1] - BUILT - DAY) < 5 and not clock.utc().believable
    assert not clock.verified(BUILT + 50 * DAY), "a Date far from ours"
    asyncio.run(clock.before_handshake())
    assert abs(rtc[-1] - BUILT - 50 * DAY) < 5
    assert clock.verified(BUILT + 50 * DAY) and clock.utc().believable
    assert not clock.refused()


def test_a_time_that_the_rtc_refuses_is_dropped() -> None:
    rtc: list[int] = []

    def set_rtc(now_s: int) -> None:
        if now_s > BUILT + 100 * DAY:
            raise OverflowError("small int overflow")
        rtc.append(now_s)

    clock = BoardClock(BUILT, BUILT + 9000 * DAY, set_rtc)
    clock.restart(BUILT + DAY)
    assert clock.time.propose(BUILT + 8000 * DAY, int(clock.uptime_s()), "ntp")
    asyncio.run(clock.before_handshake())
    assert abs(rtc[-1] - BUILT - DAY) < 5 and not clock.needs_date()
    asyncio.run(BoardClock(BUILT + 101 * DAY, BUILT + 9000 * DAY, set_rtc).before_handshake())


def test_no_time_is_believed_that_the_port_cannot_represent() -> None:
    def gmtime(seconds: int) -> "tuple[int, ...]":
        if seconds > 0x7FFFFFFF:
            raise OverflowError("overflow converting long int to machine word")
        return (1970, 1, 1)

    def gmtime_of_2000(seconds: int) -> "tuple[int, ...]":
        return (gmtime(seconds)[0] + 30, 1, 1)

    for end_s in (BUILT, 0x7FFFFFFF):
        assert latest_s(end_s, gmtime) == latest_s(end_s, gmtime_of_2000) == end_s
    assert latest_s(0x80000000, gmtime) == 0x7FFFFFFF
    assert latest_s(4_000_000_000, gmtime_of_2000) == 0x7FFFFFFF + 946_684_800


def test_answers_have_room_however_much_telemetry_waits() -> None:
    connection = HubConnection(Trust([]))
    telemetry = [SendTelemetry(number, {}, b"", 0, 1) for number in range(POSTS_LIMIT)]
    assert [connection.post(each) for each in telemetry] == [True] * POSTS_LIMIT
    assert not connection.post(SendTelemetry(POSTS_LIMIT, {}, b"", 0, 1))
    assert connection.post(MessageDone(1)) and connection.post(AnswerMethod(2, 200, b""))


def test_a_hub_s_topics_take_room_as_its_payloads_do() -> None:
    for topic, payload in (("t" * EVENTS_SIZE, b""), ("t", bytes(EVENTS_SIZE))):
        connection = HubConnection(Trust([]))
        assert connection._has_room()
        connection._events.append(Arrived(topic, payload, 0))
        assert not connection._has_room()


def test_telemetry_without_acknowledgement_is_bounded_by_its_bytes() -> None:
    for size, expected in ((IN_FLIGHT_LIMIT // 4, 3), (2 * IN_FLIGHT_LIMIT, 1), (100, 20)):
        connection = HubConnection(Trust([]))
        connection._connected = True
        taken = [connection.publish("devices/a/messages/events/", bytes(size), 1) is not None for _ in range(20)]
        assert taken == [True] * expected + [False] * (20 - expected), (size, taken)


def test_line_feeds_of_the_tls_module_stay_out_of_the_reason() -> None:
    failed = Link(Trust([]))._broken(ValueError("not signed by the trusted CA\nexpired\n"))
    assert str(failed) == "not signed by the trusted CA expired"


def test_want_of_memory_in_a_handshake_is_no_verdict_on_the_peer() -> None:
    for number in (12, -0x7F00, -0x2880, -0x4290, -0x3F80, -0x216A):
        failed = Link(Trust([]))._broken(OSError(number, "MBEDTLS_ERR"))
        assert failed.reason == "memory", hex(number)
    for number, reason in (
        (-0x7200, "not_tls"),
        (-0x7880, "closed"),
        (-0x2700, "tls"),
        (104, "closed"),
        (-0x7780, "tls_failed"),
    ):
        failed = Link(Trust([]))._broken(OSError(number, "MBEDTLS_ERR"))
        assert failed.reason == reason, hex(number)
    link = Link(Trust([]))
    link._lacks_room = True  # as it was when the handshake began
    assert link._broken(ValueError("not signed by the trusted CA")).reason == "memory"
    link.is_shaken = True
    assert link._broken(OSError(104, "reset")).reason == "closed", "a connection that stands needs no more room"


def test_all_connections_share_one_context() -> None:
    trust = Trust([])
    assert trust.context() is trust.context()


def test_no_room_for_the_context_is_said_as_such() -> None:
    class Full(Trust):
        def context(self) -> None:
            raise MemoryError("memory allocation failed")

    link = Link(Full([]))
    try:
        link._wrap("dps.example")
        raise AssertionError("it was made")
    except Failed as failed:
        assert failed.reason == "memory"


class RoomyHeap:
    """A `gc` whose heap has so much free."""

    free_bytes = memory.HANDSHAKE_BYTES

    def collect(self) -> None: ...

    def mem_free(self) -> int:
        return self.free_bytes


class AnyTls(Trust):
    """Trust whose connections are of no meaning; it notes whether each one's place was free when it came."""

    def __init__(self) -> None:
        super().__init__([])
        self.found_free: list[bool] = []

    def context(self) -> "Any":
        return self

    def wrap_socket(self, *_arguments: "Any", **_named: "Any") -> "Any":
        self.found_free.append(not memory._block)
        return self

    def read(self) -> None: ...

    def close(self) -> None: ...


def test_the_place_of_tls_is_kept_where_no_connection_has_it_and_only_there() -> None:
    usual = memory._TLS_IN_HEAP, memory.gc
    heap: Any = RoomyHeap()
    trust = AnyTls()
    dps, hub = Link(trust), Link(trust)
    memory._TLS_IN_HEAP, memory.gc = True, heap
    try:
        assert memory.has_room() and memory._block, "until the first connection"
        dps._wrap("dps.example")
        hub._wrap("hub.example")
        dps.close()
        assert not memory._block, "beside another connection the heap is the program's"
        hub.close()
        hub.close()
        assert [len(block) for block in memory._block] == [memory.BLOCK_BYTES]
        assert memory.has_room()
        hub._wrap("hub.example")
        assert trust.found_free == [True] * 3
        heap.free_bytes = memory.HANDSHAKE_BYTES - 1
        assert not memory.has_room() and not memory._block
        hub.close()
        agent = agent_whose_requests([NoReply("closed: ended", False)])
        agent.answers["Sleep"] = lambda delay_s, reason: agent.stop()
        asyncio.run(agent.run(connect=False))
        assert not memory._block, "an agent that has ended keeps nothing"
    finally:
        memory._TLS_IN_HEAP, memory.gc = usual
        memory.free_block()
    assert memory.has_room() and not memory._block, "TLS has memory of its own there"
    assert not tls._open


class BarePart:
    """A TPM with keys of no meaning, and a store with nothing in it."""

    def endorsement_key(self, name: bytes) -> bytes:
        return bytes(314)

    def storage_root_key(self) -> bytes:
        return bytes(282)

    def load(self, record: str) -> None: ...

    def commit(self, record: str, payload: bytes) -> None: ...

    def release(self) -> None: ...

    def __getattr__(self, name: str) -> "Any":
        return lambda *_arguments: None


def agent_whose_requests(answers: "list[Any]") -> Agent:
    """A new device that never waits; its requests to DPS get these answers, and the last of them again and again."""
    values = read_values(b'{"id_scope": "0ne1", "registration_id": "press-07"}', "config.json")
    part: Any = BarePart()
    trust = Trust([])
    clock = BoardClock(BUILT, BUILT + DAY, lambda now_s: None)
    agent = Agent(BoardConfiguration(values, trust, trust), part, part, clock)

    def request(*_fields: "Any") -> "Any":
        answer = answers.pop(0) if answers[1:] else answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    agent.answers["Http"] = request
    agent.answers["Sleep"] = lambda delay_s, reason: None
    return agent


class Radio:
    """Stands for `network`: it joins nothing, and notes with what it was to."""

    STA_IF = 0

    def __init__(self) -> None:
        self.joins: list[tuple[str, str]] = []

    def WLAN(self, interface: int) -> "Radio":
        return self

    def active(self, on: bool) -> None: ...

    def isconnected(self) -> bool:
        return False

    def connect(self, ssid: str, password: str) -> None:
        self.joins.append((ssid, password))


async def lives_and_joins(agent: Agent) -> None:
    """A life that ends once the other tasks have begun."""

    async def live(_connect: bool) -> None:
        await asyncio.sleep(0)

    agent._live = live  # type: ignore[method-assign]
    await agent.run()


def test_an_agent_by_the_settings_joins_their_network_and_keeps_no_other_of_them() -> None:
    settings = {
        "id_scope": "0ne1",
        "registration_id": "press-07",
        "attestation": "symmetric-key",
        "device_key": "a2V5a2V5a2V5a2V5a2V5a2V5",
        "hub": {"connect_to": "hub:1"},
        "board": {"wifi_ssid": "plant", "wifi_password": "open sesame"},
    }
    values = read_values(to_json(settings).encode(), "config.json")
    trust, hub_trust = Trust([]), Trust([])
    made: list[Any] = [BoardConfiguration(values, trust, hub_trust)]
    radio: Any = Radio()
    store: Any = BarePart()
    usual = config.load, parts.make_store
    sys.modules["network"] = radio
    config.load, parts.make_store = lambda path: made.pop(), lambda config: store
    try:
        agent = Agent.from_config(os.urandom)
        asyncio.run(lives_and_joins(agent))
    finally:
        config.load, parts.make_store = usual
        sys.modules.pop("network")
    assert radio.joins == [("plant", "open sesame")]
    hub = agent._join_hub()
    assert hub.connection.link._trust is hub_trust and hub.connection._dial == ("hub", 1)
    kept = list(agent.__dict__.values()) + list(hub.__dict__.values())
    assert values not in kept and not any(isinstance(each, BoardConfiguration) for each in kept)


def test_a_board_whose_heap_has_no_room_again_and_again_ends_its_run_for_a_reset() -> None:
    short = NoReply("memory: no room for the TLS handshake: ENOMEM", False)
    for failure in (short, MemoryError("memory allocation failed")):
        agent = agent_whose_requests([failure])
        try:
            asyncio.run(agent.run(connect=False))
            raise AssertionError("it went on")
        except RetryLater as error:
            assert error.code == "agent.no_room" and str(NO_ROOM_LIMIT) in error.message, error.message


def test_a_request_that_found_room_begins_the_count_anew() -> None:
    short = NoReply("memory: no room for the TLS handshake: ENOMEM", False)
    answers: list[Any] = ([short] * (NO_ROOM_LIMIT - 1) + [Reply(500, {}, b"", None)]) * 3
    answers.append(short)
    agent = agent_whose_requests(answers)
    try:
        asyncio.run(agent.run(connect=False))
    except RetryLater as error:
        assert error.code == "agent.no_room"
    assert agent._no_room == NO_ROOM_LIMIT
    assert agent.answers["Http"]() is short, "all that came before was asked for"


class FloodingLink:
    """A link on which the next piece is there whenever somebody looks, until the time is over."""

    is_shaken = True

    def __init__(self, piece: bytes, pauses: int) -> None:
        self.piece = piece
        self.pauses = pauses
        self.reads = 0

    def begin(self, limit_ms: int) -> None: ...

    def is_open(self) -> bool:
        return False

    def is_aborted(self) -> bool:
        return False

    async def open(self, host: str, port: int, name: str) -> None: ...

    async def pause(self, waits: bool = True) -> None:
        assert not waits, "there was something to read"
        self.pauses -= 1
        if not self.pauses:
            raise Failed("timeout", "the time is over")

    def write(self, piece: bytes) -> int:
        return len(piece)

    def read(self, limit: int) -> bytes:
        self.reads += 1
        return self.piece

    def close(self) -> None: ...


def asked_of(link: FloodingLink) -> "Reply | NoReply":
    connection = Connection("https://dps.example", Trust([]))
    connection.link = link  # type: ignore[assignment]
    return asyncio.run(connection.request("PUT", "/", b"{}", None, 1000))


def test_the_time_and_the_other_tasks_are_looked_at_after_each_piece_however_fast_they_come() -> None:
    for piece in (b"H", b"x", b"HTTP/1.1 103 Early Hints\r\n\r\n"):
        link = FloodingLink(piece, 10)
        assert asked_of(link) == NoReply("timeout: the time is over", True) and link.reads == 10, piece


def test_interim_answers_without_end_are_refused_after_a_few() -> None:
    link = FloodingLink(b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n", 1000)
    assert asked_of(link) == NoReply("too_large: too many headers, or too long a line", True)
    assert link.reads <= LINES_LIMIT // 3 + 1


def test_uptime_never_goes_back() -> None:
    clock = BoardClock(BUILT, BUILT + DAY, lambda now_s: None)
    before = clock.uptime_s()
    for _ in range(100):
        now = clock.uptime_s()
        assert now >= before
        before = now
