"""Pieces of a board that need no board: settings, NTP answers, the clock. Plain functions, for both interpreters."""

import asyncio
import struct

from dps_agent.effects import Failed, NoReply
from dps_agent.http1 import LINES_LIMIT
from dps_agent.hub_effects import AnswerMethod, Arrived, MessageDone, SendTelemetry
from dps_board.clock import BoardClock
from dps_board.https import Connection
from dps_board.keys import read_values
from dps_board.mqtt import EVENTS_SIZE, IN_FLIGHT_LIMIT, POSTS_LIMIT, HubConnection
from dps_board.ntp import read_answer
from dps_board.parts import latest_s
from dps_board.tls import Link, split_address
from dps_hal.errors import AskOperator
from dps_hal.platform import to_json

BUILT = 1_793_491_200  # 2026-11-01
DAY = 86400
MARK = b"abcdefgh"

TYPE_CHECKING = False
if TYPE_CHECKING:
    from dps_agent.effects import Reply


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
        ("hub.keep_alive_s", {"hub": {"keep_alive_s": 1.5}}),
        ("board.led_pin", {"board": {"led_pin": "LED"}}),
        ("board.colour", {"board": {"colour": "red"}}),
        ("hub.port", {"hub": {"port": 8883}}),
        ("idscope", {"idscope": "x"}),
        ("tpm", {"tpm": 1}),
    ):
        assert name in problem(**settings).split(":")[0], (settings, problem(**settings))


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
    connection = HubConnection([])
    telemetry = [SendTelemetry(number, {}, b"", 0) for number in range(POSTS_LIMIT)]
    assert [connection.post(each) for each in telemetry] == [True] * POSTS_LIMIT
    assert not connection.post(SendTelemetry(POSTS_LIMIT, {}, b"", 0))
    assert connection.post(MessageDone(1)) and connection.post(AnswerMethod(2, 200, b""))


def test_a_hub_s_topics_take_room_as_its_payloads_do() -> None:
    for topic, payload in (("t" * EVENTS_SIZE, b""), ("t", bytes(EVENTS_SIZE))):
        connection = HubConnection([])
        assert connection._has_room()
        connection._events.append(Arrived(topic, payload, 0))
        assert not connection._has_room()


def test_telemetry_without_acknowledgement_is_bounded_by_its_bytes() -> None:
    for size, expected in ((IN_FLIGHT_LIMIT // 4, 3), (2 * IN_FLIGHT_LIMIT, 1), (100, 20)):
        connection = HubConnection([])
        connection._connected = True
        taken = [connection.publish("devices/a/messages/events/", bytes(size), 1) is not None for _ in range(20)]
        assert taken == [True] * expected + [False] * (20 - expected), (size, taken)


def test_line_feeds_of_the_tls_module_stay_out_of_the_reason() -> None:
    failed = Link([])._broken(ValueError("not signed by the trusted CA\nexpired\n"))
    assert str(failed) == "not signed by the trusted CA expired"


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
    connection = Connection("https://dps.example", [])
    connection._link = link  # type: ignore[assignment]
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
