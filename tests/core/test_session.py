"""One device on its hub: what it says, what it answers, what it keeps over a reconnect."""

from dps_agent.assignment import decode
from dps_agent.effects import Sign
from dps_agent.fleet import TOKEN_LIFE_S
from dps_agent.hub_effects import (
    AnswerMethod,
    Arrived,
    CloudMessage,
    Connect,
    Desired,
    Disconnect,
    Gone,
    MessageDone,
    MethodCall,
    NextEvent,
    Publish,
    RegisterAgain,
    SendTelemetry,
    Subscribe,
    Withdrawn,
)
from dps_agent.lifecycle import CONNECTED, PROVISIONED, Lifecycle
from dps_agent.session import (
    CALL_LIMIT,
    CALL_SIZE,
    IN_FLIGHT_LIMIT,
    IN_FLIGHT_SIZE,
    MESSAGE_LIMIT,
    MESSAGE_SIZE,
    METHOD_LIMIT,
    METHOD_LIMIT_S,
    RID_LIMIT,
    SENDERS_LIMIT,
    SHORT_ENDS_LIMIT,
    TELEMETRY_LIMIT,
    Session,
    decode_properties,
    encode_properties,
    telemetry_size,
)
from dps_agent.settings import KEEP_ALIVE_S
from dps_agent.twin import DESIRED_LIMIT, TWIN_AGAIN_LIMIT_S, TWIN_AGAIN_S, TWIN_LIMIT_S
from dps_hal.contracts import IDENTITY, PROGRESS
from dps_hal.errors import AskOperator, DpsError, IdentityStale, RetryLater
from dps_hal.platform import from_json
from support.cloud.fake_hub import FakeHub
from support.world import DEVICE, HUB, NOW_S, World, settings

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from dps_agent.hub_effects import Message
    from dps_agent.settings import Settings

ABOUT = {"version": "1.0", "runtime": "test", "agentVersion": "1.2"}
DEVICEBOUND = f"devices/{DEVICE}/messages/devicebound/"


def provisioned() -> World:
    """A device that was registered in an earlier life."""
    world = World()
    world.run(Lifecycle(settings()).live(True, False))
    world.dps.requests.clear()
    world.sleeps.clear()
    world.commits.clear()
    return world


def live(world: World, seconds: float) -> Lifecycle:
    """A life that ends after so many seconds, like a program that is killed."""
    life = Lifecycle(settings(), ABOUT)
    world.end_at(world.uptime_s + seconds)
    world.run(life.live(False, False, True))
    return life


def live_with(world: World, seconds: float, chosen: "Settings") -> Lifecycle:
    """The same with other settings."""
    life = Lifecycle(chosen, ABOUT)
    world.end_at(world.uptime_s + seconds)
    world.run(life.live(False, False, True))
    return life


def log_effects(world: World) -> "list[Any]":
    """The effects from now on, in a list that grows."""
    log: list[Any] = []
    answer = world.answer

    def logged(effect: "Any") -> "Any":
        log.append(effect)
        return answer(effect)

    world.answer = logged  # type: ignore[method-assign]
    return log


def telemetry(number: int) -> SendTelemetry:
    return SendTelemetry(number, {"n": str(number)}, b"%d" % number, 0, 1)


def test_a_connection_says_what_a_hub_expects() -> None:
    world = provisioned()
    log = log_effects(world)
    assert live(world, 20).state == CONNECTED
    connect = next(effect for effect in log if isinstance(effect, Connect))
    assert (connect.hub, connect.device_id, connect.keep_alive_s) == (HUB, DEVICE, KEEP_ALIVE_S)
    kind = "DeviceClientType=dps-agent%2F1.2"
    assert connect.user_name == f"{HUB}/{DEVICE}/?api-version=2021-04-12&{kind}"
    life_s = connect.token.expires_at_s - NOW_S - world.uptime_s
    assert TOKEN_LIFE_S - 30 < life_s <= TOKEN_LIFE_S
    filters = next(effect for effect in log if isinstance(effect, Subscribe)).filters
    assert len(filters) <= 5 and filters[0] == ("$iothub/methods/POST/#", 0)
    assert world.hub.connections[0][1] == 0 and world.dps.requests == []


def test_a_model_id_is_percent_encoded_behind_all_else() -> None:
    world = provisioned()
    log = log_effects(world)
    live_with(world, 20, settings(model_id="dtmi:com:example:Gateway;1"))
    connect = next(effect for effect in log if isinstance(effect, Connect))
    assert connect.user_name.endswith("&model-id=dtmi%3Acom%3Aexample%3AGateway%3B1")
    assert world.hub.connections[0][1] == 0


def test_a_hub_is_not_asked_for_what_the_settings_say_that_it_lacks() -> None:
    for features, lacks in ((("twin",), ["methods", "messages"]), ((), ["methods", "twin", "messages"])):
        world = provisioned()
        world.hub.lacks = ["methods", "devicebound"] if features else ["methods", "twin", "devicebound"]
        world.at(world.uptime_s + 100, lambda world=world: world.post(telemetry(1)))  # type: ignore[misc]
        life = live_with(world, 0.9 * TOKEN_LIFE_S, settings(features=features))
        assert life.hub_lacks == lacks and life.state == CONNECTED and world.program.done == {1: True}
        assert life.connections <= 2 and bool(world.hub.twin_gets) == bool(features), "renewals only"


def test_a_connected_device_reports_itself_and_hears_what_is_desired() -> None:
    world = provisioned()
    world.hub.desired = {"$version": 7, "rate": 5}
    live(world, 20)
    reported = world.hub.reported["dpsAgent"]
    assert reported["version"] == "1.0" and reported["substatus"] == "initialAssignment"
    assert reported["assignedAt"].startswith("2027-01-15") and world.program.desired() == [(7, True)]
    patches = world.hub.reported["$version"]
    live(world, 20)
    assert world.hub.reported["$version"] == patches, "what the hub knows is not reported again"


def test_the_token_is_renewed_at_80_percent_of_its_life_or_a_little_earlier() -> None:
    for random, share in ((0.0, 0.80), (0.5, 0.775), (0.999, 0.75)):
        world = provisioned()
        world.random = random
        live(world, 1.7 * TOKEN_LIFE_S)
        second, third = [at_s for at_s, _ in world.hub.connections[1:3]]
        assert abs((third - second) / TOKEN_LIFE_S - share) < 0.003, f"random={random}: {third - second}"


def test_the_token_of_a_new_connection_is_renewed_at_30_to_80_percent_of_its_life() -> None:
    for random, share in ((0.0, 0.80), (0.5, 0.55), (0.999, 0.30)):
        for lost in (False, True):  # the first connection of a life, and one that followed a loss
            world = provisioned()
            world.random = random
            if lost:
                world.at(world.uptime_s + 100, lambda world=world: world.hub.drop(world.uptime_s))  # type: ignore[misc]
            live(world, TOKEN_LIFE_S)
            first, second = [at_s for at_s, _ in world.hub.connections[lost : lost + 2]]
            assert abs((second - first) / TOKEN_LIFE_S - share) < 0.003, f"random={random}: {second - first}"


def test_the_next_token_is_made_before_the_connection_is_given_up() -> None:
    world = provisioned()
    log = log_effects(world)
    live(world, TOKEN_LIFE_S)
    kinds = [type(effect) for effect in log if isinstance(effect, (Sign, Disconnect, Connect))]
    assert kinds == [Sign, Sign, Connect, Sign, Disconnect, Connect], kinds  # the first for the seal


def test_hours_of_renewals_lose_no_telemetry_and_asks_nobody_else() -> None:
    world = provisioned()
    sent: list[int] = []

    def send() -> None:
        sent.append(len(sent))
        world.post(telemetry(sent[-1]))
        world.at(world.uptime_s + 55, send)

    world.at(world.uptime_s + 10, send)
    world.program.keeps = False
    life = live(world, 8 * 3600 + 60)
    assert life.state == CONNECTED and 10 <= life.connections <= 11
    assert len(sent) > 500 and len(world.program.done) == len(sent) and all(world.program.done.values())
    assert len({payload for _, payload in world.hub.received}) == len(sent)
    assert world.dps.requests == [] and world.commits == [PROGRESS] * 2, "begun, steady; a renewal is neither"


def test_telemetry_that_waits_for_its_puback_is_sent_again_after_a_reconnect() -> None:
    for ending in ("renewal", "drop", "lost"):
        world = provisioned()
        start_s = world.uptime_s
        hub = world.hub
        hub.mute_pubacks = True
        world.at(start_s + 10, lambda: world.post(telemetry(1), telemetry(2)))
        world.at(start_s + 15, lambda: setattr(hub, "mute_pubacks", False))
        if ending == "drop":
            world.at(start_s + 20, lambda: hub.drop(world.uptime_s))
        if ending == "lost":
            world.at(start_s + 9, lambda: setattr(hub, "lose", 1))
        live(world, TOKEN_LIFE_S)
        assert world.program.done == {1: True, 2: True}, ending
        assert {payload for _, payload in hub.received} == {b"1", b"2"}, ending


def test_telemetry_that_cannot_be_sent_is_refused_at_once() -> None:
    world = provisioned()
    world.at(world.uptime_s + 10, lambda: setattr(world.hub, "mute_pubacks", True))
    too_many = [telemetry(number) for number in range(IN_FLIGHT_LIMIT + 1)]
    too_large = SendTelemetry(90, {}, bytes(TELEMETRY_LIMIT + 1), 0, 1)
    too_long = SendTelemetry(91, {"a": "x" * 65535}, b"", 0, 1)
    world.at(world.uptime_s + 11, lambda: world.post(too_large, too_long))
    world.at(world.uptime_s + 12, lambda: world.post(*too_many))
    life = live(world, 20)
    assert world.program.done == {90: False, 91: False, IN_FLIGHT_LIMIT: False} and life.connections == 1
    assert not any(world.program.sent.values()), "it is said that the hub does not have it"


def test_telemetry_for_a_lost_identity_is_not_accepted() -> None:
    world = provisioned()
    world.hub.mute_pubacks = True
    start_s = world.uptime_s
    world.at(start_s + 10, lambda: world.post(telemetry(1)))
    world.at(start_s + 20, lambda: world.hub.call(world.uptime_s, "reprovision", "1"))
    world.at(start_s + 50, lambda: setattr(world.hub, "mute_pubacks", False))
    world.at(start_s + 55, lambda: received.append(len(world.hub.received)))
    received: list[int] = []
    live(world, 60)
    assert world.program.done == {1: False} and world.program.sent == {1: True}
    assert received == [1], "what its sender was told of is not sent again"


def test_telemetry_between_two_connections_waits_for_the_next() -> None:
    world = provisioned()
    start_s = world.uptime_s
    world.at(start_s + 10, lambda: world.hub.drop(world.uptime_s))
    world.at(start_s + 11, lambda: world.post(telemetry(1)))
    live(world, 60)
    assert world.program.done == {1: True}


def test_properties_survive_their_way_through_a_topic() -> None:
    for properties in ({}, {"a": "1"}, {"$.ct": "application/json", "line 4": "a&b=c%\u00e9/+#"}, {"empty": ""}):
        assert decode_properties(encode_properties(properties)) == properties
    assert decode_properties("%24.mid=1&key&%zz=%") == {"$.mid": "1", "key": "", "%zz": "%"}
    world = provisioned()
    world.at(
        world.uptime_s + 10,
        lambda: world.post(SendTelemetry(1, {"$.ct": "application/json", "a": "b/#+"}, b"{}", 0, 1)),
    )
    live(world, 20)
    assert world.hub.received == [("%24.ct=application%2Fjson&a=b%2F%23%2B", b"{}")]


# Cloud-to-device messages.


def test_a_message_is_acknowledged_once_a_program_is_done_with_it() -> None:
    world = provisioned()
    hub, start_s = world.hub, world.uptime_s
    world.at(start_s + 10, lambda: hub.send_c2d(world.uptime_s, {"$.mid": "m1"}, b"hello"))
    world.at(start_s + 30, lambda: world.post(MessageDone(world.program.messages()[0].message_id)))
    queued: list[int] = []
    world.at(start_s + 29, lambda: queued.append(len(hub.queued)))
    live(world, 40)
    message = world.program.messages()[0]
    assert (message.properties, message.payload) == ({"$.mid": "m1"}, b"hello")
    assert queued == [1] and hub.queued == [] and hub.stale_acknowledgements == 0


def test_a_message_that_nobody_is_done_with_comes_again_and_a_late_done_acknowledges_nothing() -> None:
    world = provisioned()
    hub, start_s = world.hub, world.uptime_s
    world.at(start_s + 10, lambda: hub.send_c2d(world.uptime_s, {}, b"first"))
    world.at(start_s + 11, lambda: hub.send_c2d(world.uptime_s, {}, b"second"))
    world.at(start_s + 20, lambda: hub.drop(world.uptime_s))
    # The hub numbers anew: the packet id of the first message may now be that of the second.
    world.at(start_s + 21, hub.queued.reverse)
    world.at(start_s + 40, lambda: world.post(MessageDone(world.program.messages()[0].message_id)))
    live(world, 50)
    told = world.program.messages()
    assert [message.payload for message in told] == [b"first", b"second", b"second", b"first"]
    assert len({message.message_id for message in told}) == 4
    assert len(hub.queued) == 2 and hub.stale_acknowledgements == 0


def test_no_more_messages_are_held_than_a_hub_queues() -> None:
    world = provisioned()
    hub = world.hub

    def send() -> None:
        for number in range(MESSAGE_LIMIT + 5):
            hub.send_c2d(world.uptime_s, {}, b"%d" % number)

    world.at(world.uptime_s + 10, send)
    live(world, 30)
    assert len(world.program.messages()) == MESSAGE_LIMIT and len(hub.queued) == MESSAGE_LIMIT + 5


def test_a_message_that_was_not_taken_holds_no_place() -> None:
    world = provisioned()
    start_s = world.uptime_s
    world.at(start_s + 9, lambda: setattr(world.program, "takes", False))
    for _ in range(MESSAGE_LIMIT + 5):
        world.at(start_s + 10, lambda: world.hub.send_c2d(world.uptime_s, {}, b"no room"))
    world.at(start_s + 11, lambda: setattr(world.program, "takes", True))
    world.at(start_s + 12, lambda: world.hub.send_c2d(world.uptime_s, {}, b"room again"))
    live(world, 30)
    assert world.program.messages()[-1].payload == b"room again"
    assert len(world.hub.queued) == MESSAGE_LIMIT + 6, "the hub keeps them all"


def test_a_repeated_packet_id_is_the_same_message_and_those_without_are_no_more_than_others() -> None:
    world = provisioned()
    start_s = world.uptime_s
    for _ in range(2):
        world.at(start_s + 10, lambda: world.hub.send(world.uptime_s, DEVICEBOUND, b"same", 9))
    for _ in range(MESSAGE_LIMIT + 5):
        world.at(start_s + 11, lambda: world.hub.send(world.uptime_s, DEVICEBOUND, b"qos 0", 0))
    live(world, 20)
    payloads = [message.payload for message in world.program.messages()]
    assert payloads.count(b"same") == 1 and payloads.count(b"qos 0") == MESSAGE_LIMIT - 1


def test_messages_and_calls_that_programs_hold_are_bounded_in_bytes() -> None:
    world = provisioned()
    start_s, hub = world.uptime_s, world.hub
    for number in range(40):
        world.at(
            start_s + 10, lambda number=number: hub.send(world.uptime_s, DEVICEBOUND, bytes(60000), number % 2 * number)
        )  # type: ignore[misc]
    for number in range(CALL_LIMIT):
        world.at(start_s + 11, lambda number=number: hub.call(world.uptime_s, "slow", f"r{number}", bytes(100000)))  # type: ignore[misc]
    world.at(start_s + 12, lambda: hub.call(world.uptime_s, "slow", "large", bytes(METHOD_LIMIT)))
    world.at(start_s + 12, lambda: hub.call(world.uptime_s, "ping", "r" * (RID_LIMIT + 1)))
    live(world, 20)
    assert len(world.program.messages()) == MESSAGE_SIZE // 60100
    assert len(world.program.calls()) == CALL_SIZE // 100020
    assert [rid for status, rid, _ in hub.answers if status == "413"] == ["large"]
    assert len([rid for status, rid, _ in hub.answers if status == "429"]) == CALL_LIMIT - CALL_SIZE // 100020
    assert len(hub.answers) == CALL_LIMIT - CALL_SIZE // 100020 + 1, "nobody is answered on a topic of any length"


def test_patches_without_end_do_not_add_up() -> None:
    world = provisioned()
    hub = world.hub

    def patch() -> None:
        hub.change_desired(world.uptime_s, "a", "x" * 30000)
        world.at(world.uptime_s + 1, patch)

    world.at(world.uptime_s + 10, patch)
    live(world, 60)
    added = 0
    for version, whole in world.program.desired():
        added = 0 if whole else added + 30000
        assert added <= DESIRED_LIMIT, version
    assert world.program.desired()[-1][0] == hub.desired["$version"], "and nothing is missed"


def test_a_twin_larger_than_any_hub_keeps_is_told_without_its_content() -> None:
    world = provisioned()
    world.hub.desired = {"$version": 7, "a": "x" * DESIRED_LIMIT}
    live(world, 20)
    assert [message for message in world.program.told if isinstance(message, Desired)] == [Desired(0, None, True)]


def test_messages_stay_at_the_hub_while_no_program_reads() -> None:
    world = provisioned()
    hub, program = world.hub, world.program
    program.readers = 0
    hub.device_id = DEVICE
    hub.send_c2d(world.uptime_s, {}, b"recipe")
    for _ in range(11):
        live(world, 100)
    assert hub.deliveries == 0 and program.messages() == []
    world.at(world.uptime_s + 50, lambda: setattr(program, "readers", 1))
    world.at(world.uptime_s + 50, lambda: world.post(MessageDone(0)))  # whoever comes wakes the session
    live(world, 100)
    assert [message.payload for message in program.messages()] == [b"recipe"] and hub.deliveries == 1
    program.readers = 0
    for _ in range(11):
        live(world, 100)
    assert hub.deliveries == 1, "what a reader left is not delivered to nobody"


def test_a_reader_that_stays_is_subscribed_for_over_reconnects_and_one_that_goes_only_until_the_next() -> None:
    world = provisioned()
    hub, start_s = world.hub, world.uptime_s
    log = log_effects(world)
    world.at(start_s + 50, lambda: hub.drop(world.uptime_s))
    world.at(start_s + 100, lambda: setattr(world.program, "readers", 0))
    world.at(start_s + 100, lambda: world.post(MessageDone(0)))
    world.at(start_s + 150, lambda: hub.drop(world.uptime_s))
    live(world, 300)
    assert [effect.clean_session for effect in log if isinstance(effect, Connect)] == [True, False, True]
    topics = [[topic for topic, _ in effect.filters] for effect in log if isinstance(effect, Subscribe)]
    assert [DEVICEBOUND + "#" in filters for filters in topics] == [False, True, True, False], topics


# What the hub hangs up on.


def test_telemetry_flows_at_a_hub_that_has_nothing_but_telemetry() -> None:
    for lacks, refuses, found in (
        (["twin", "methods", "devicebound"], False, ["methods", "twin", "messages"]),
        (["twin", "methods", "devicebound"], True, ["methods", "twin", "messages"]),
        (["twin/GET"], False, ["twin"]),
        (["methods"], False, ["methods"]),
        (["desired"], True, ["twin"]),
        (["devicebound"], False, ["messages"]),
    ):
        world = provisioned()
        world.hub.lacks, world.hub.refuses = list(lacks), refuses
        life = Lifecycle(settings(), ABOUT)
        for number in range(1, 30):
            world.at(world.uptime_s + 120 * number, lambda number=number: world.post(telemetry(number)))  # type: ignore[misc]
        first: list[float] = []
        began_s = world.uptime_s
        world.program.on_message = lambda message: (
            first.append(world.uptime_s) if hasattr(message, "accepted") else None
        )
        world.post(telemetry(0))
        world.end_at(world.uptime_s + 4000)
        world.run(life.live(False, False, True))
        assert all(world.program.done.values()) and len(world.program.done) == 30, (lacks, world.program.done)
        assert life.state == CONNECTED and life.hub_lacks == found, (lacks, life.hub_lacks)
        assert first[0] - began_s < 20, "one hang-up is enough to know what to leave out"
        hung_up = len(world.slept("by the hub"))
        assert hung_up <= (0 if refuses else 3 * len(found) + 1), (lacks, hung_up)


def test_what_a_hub_lacks_is_asked_for_again_ever_more_rarely_and_found_when_it_is_there() -> None:
    world = provisioned()
    hub = world.hub
    hub.lacks = ["twin", "methods", "devicebound"]
    day_s = 86400
    world.at(world.uptime_s + 4 * day_s, lambda: setattr(hub, "lacks", []))
    connects: list[int] = []
    for day in range(6):
        world.at(world.uptime_s + day * day_s, lambda: connects.append(len(hub.connections)))
    world.program.keeps = False
    life = live(world, 5 * day_s + 7200)
    renewals = day_s / (TOKEN_LIFE_S * 0.7)
    by_day = [connects[day + 1] - connects[day] for day in range(5)]
    assert by_day[0] < renewals + 18 and max(by_day[2:4]) <= renewals + 6, by_day
    assert life.hub_lacks == [] and "dpsAgent" in hub.reported, "a hub that was upgraded is noticed"


def test_what_a_hub_lacks_is_known_while_the_hub_stays_the_same() -> None:
    other = "second.azure-devices.net"
    for hub_after in (HUB, other):
        world = provisioned()
        start_s = world.uptime_s
        world.hubs[other] = FakeHub(other)
        world.hub.lacks = world.hubs[other].lacks = ["twin"]
        life = Lifecycle(settings(), ABOUT)
        found: list[tuple[str, list[str]]] = []
        answer = world.answer

        def look(effect: "Any") -> "Any":
            if not found or found[-1][1] != life.hub_lacks:
                found.append((life.state, life.hub_lacks))
            return answer(effect)

        world.at(start_s + 200, lambda: setattr(world.dps, "hub", hub_after))
        world.at(start_s + 200, lambda: (life.ask_to_register(), world.post(RegisterAgain())))
        world.at(start_s + 200, lambda: setattr(world, "answer", look))
        world.end_at(start_s + 400)
        world.run(life.live(False, False, True))
        assert life.state == CONNECTED and life.assignment and life.assignment.assigned_hub == hub_after
        hung_up = len(world.slept("by the hub"))
        if hub_after == HUB:
            assert [lacks for _, lacks in found] == [["twin"]] and hung_up == 2, (found, world.sleeps)
        else:
            assert [] in [lacks for _, lacks in found] and life.hub_lacks == ["twin"] and hung_up == 4, found
        later = Lifecycle(settings(), ABOUT, former=life)
        later.assignment = life.assignment
        assert later.hub_lacks == ["twin"]


def test_a_connection_that_broke_by_chance_costs_the_features_a_minute() -> None:
    world = provisioned()
    world.hub.mute = True
    world.at(world.uptime_s + 3, lambda: world.hub.drop(world.uptime_s))
    world.at(world.uptime_s + 4, lambda: setattr(world.hub, "mute", False))
    life = Lifecycle(settings(), ABOUT)
    lacked: list[list[str]] = []
    world.at(world.uptime_s + 40, lambda: lacked.append(life.hub_lacks))
    world.end_at(world.uptime_s + 300)
    world.run(life.live(False, False, True))
    assert lacked == [["methods", "twin", "messages"]] and life.hub_lacks == []
    assert life.connections == 1 and "dpsAgent" in world.hub.reported


def test_a_hub_that_hangs_up_on_everybody_lacks_nothing() -> None:
    world = provisioned()
    hub, start_s = world.hub, world.uptime_s

    def kick() -> None:
        hub.drop(world.uptime_s)
        if world.uptime_s < start_s + 1000:
            world.at(world.uptime_s + 0.02, kick)

    world.at(start_s, kick)
    life = live(world, 1600)
    assert life.state == CONNECTED and life.hub_lacks == [] and len(hub.connections) > 5


def test_a_message_that_the_hub_hangs_up_on_is_given_up_and_no_other() -> None:
    world = provisioned()
    hub, start_s = world.hub, world.uptime_s
    hub.poison, hub.puback_after_s = b"poison", 0.5
    many = [telemetry(number) for number in range(1, 11)]
    poison = SendTelemetry(99, {}, b"poison", 0, 1)
    world.at(start_s + 10, lambda: world.post(*many[:5], poison, *many[5:]))
    for after_s in (12, 25, 50):
        world.at(start_s + after_s, lambda after_s=after_s: world.post(telemetry(100 + after_s)))  # type: ignore[misc]
    life = live(world, 400)
    assert world.program.done.pop(99) is False and world.program.sent[99] is True
    assert len(world.program.done) == 13 and all(world.program.done.values()), world.program.done
    assert life.state == CONNECTED and life.connections == SHORT_ENDS_LIMIT + 1 and life.hub_lacks == []
    assert world.in_flight == {}


def test_who_sends_what_the_hub_hangs_up_on_again_and_again_does_not_hold_the_device_off_its_hub() -> None:
    hours = 6
    for period_s, withdraws in ((5, False), (30, False), (30, True), (600, False), (600, True)):
        world = provisioned()
        world.effect_limit, world.program.keeps = 10**6, False
        hub, start_s = world.hub, world.uptime_s
        hub.poison = b"poison"
        life = Lifecycle(settings(), ABOUT)
        sent = [10**6]
        connected: list[bool] = []
        lacked: list[str] = []

        def provoke(
            world: World = world, sent: "list[int]" = sent, period_s: int = period_s, withdraws: bool = withdraws
        ) -> None:
            sent[0] += 1
            world.post(SendTelemetry(sent[0], {}, b"poison", 7, 1))
            if withdraws:
                world.post(Withdrawn(sent[0]))
            world.at(world.uptime_s + period_s, provoke)

        def look(
            world: World = world,
            life: Lifecycle = life,
            connected: "list[bool]" = connected,
            lacked: "list[str]" = lacked,
        ) -> None:
            connected.append(life.state == CONNECTED)
            lacked += life.hub_lacks
            if len(connected) % 10 == 0:
                world.post(telemetry(len(connected)))
            world.at(world.uptime_s + 10, look)

        world.at(start_s + 20, provoke)
        world.at(start_s + 25, look)
        world.end_at(start_s + hours * 3600)
        world.run(life.live(False, False, True))
        assert sum(connected) > 0.95 * len(connected), (period_s, withdraws, sum(connected) / len(connected))
        assert len(hub.connections) < 30 * hours / 3, len(hub.connections)
        others = [number for number in world.program.done if number < 10**6]
        refused = [number for number in others if not world.program.done[number]]
        assert len(others) > hours * 30 and refused == [], refused
        assert lacked == []


def test_a_sender_whose_connection_only_breaks_now_and_then_is_not_held_up() -> None:
    world = provisioned()
    hub, start_s = world.hub, world.uptime_s
    world.effect_limit = 10**6

    def cut() -> None:  # each time with a message under way
        hub.lose = 1
        world.at(world.uptime_s + 900, cut)

    def send() -> None:
        world.post(SendTelemetry(int(world.uptime_s), {}, b"x", 7, 1))
        world.at(world.uptime_s + 60, send)

    world.at(start_s + 300, cut)
    world.at(start_s + 20, send)
    live(world, 6 * 3600)
    assert len(hub.connections) > 20 and len(world.program.done) > 350
    assert all(world.program.done.values())


def test_the_senders_with_strikes_that_are_remembered_are_bounded() -> None:
    known = session(provisioned())
    for sender in range(3 * SENDERS_LIMIT):
        known._strike(sender, 1000.0 + sender)
    assert sorted(known._strikes) == list(range(2 * SENDERS_LIMIT, 3 * SENDERS_LIMIT))


def test_a_connection_that_lasted_is_held_against_no_message() -> None:
    world = provisioned()
    hub, start_s = world.hub, world.uptime_s
    hub.mute_pubacks = True
    world.at(start_s + 10, lambda: world.post(telemetry(1)))
    for after_s in (200, 500, 900, 1500):  # with ever longer waits in between
        world.at(start_s + after_s, lambda: hub.drop(world.uptime_s))
    world.at(start_s + 1500, lambda: setattr(hub, "mute_pubacks", False))
    life = live(world, 1900)
    assert world.program.done == {1: True} and life.connections == 5


def test_telemetry_whose_sender_was_answered_is_not_sent_again() -> None:
    world = provisioned()
    hub, start_s = world.hub, world.uptime_s
    hub.mute_pubacks = True
    world.at(start_s + 10, lambda: world.post(telemetry(1), telemetry(2)))
    world.at(start_s + 40, lambda: world.post(Withdrawn(1)))
    world.at(start_s + 100, lambda: setattr(hub, "mute_pubacks", False))
    world.at(start_s + 100, lambda: hub.drop(world.uptime_s))
    live(world, 200)
    payloads = [payload for _, payload in hub.received]
    assert world.program.done == {1: False, 2: True} and (payloads.count(b"1"), payloads.count(b"2")) == (1, 2)
    assert world.in_flight == {}


def test_telemetry_whose_sender_was_answered_while_there_was_no_connection_is_not_sent_again() -> None:
    for features in (["methods", "twin", "devicebound"], []):  # with nothing to subscribe to, or waiting for SUBACK
        world = provisioned()
        hub, start_s = world.hub, world.uptime_s
        hub.mute_pubacks = True
        world.at(start_s + 200, lambda: world.post(telemetry(1), telemetry(2)))
        world.at(start_s + 201, lambda hub=hub: setattr(hub, "mute_pubacks", False))  # type: ignore[misc]
        world.at(start_s + 201, lambda hub=hub, world=world: hub.drop(world.uptime_s))  # type: ignore[misc]
        world.at(start_s + 202, lambda: world.post(Withdrawn(1)))
        hub.lacks = features
        live(world, 400)
        payloads = [payload for _, payload in hub.received]
        assert (payloads.count(b"1"), payloads.count(b"2")) == (1, 2), payloads
        assert world.program.done == {1: False, 2: True} and world.in_flight == {}


def test_telemetry_under_way_is_bounded_in_bytes() -> None:
    world = provisioned()
    world.hub.mute_pubacks = True
    payload = bytes(100000)
    large = [SendTelemetry(number, {}, payload, 0, 1) for number in range(IN_FLIGHT_LIMIT)]
    world.at(world.uptime_s + 10, lambda: world.post(*large))
    live(world, 20)
    taken = IN_FLIGHT_SIZE // 100100
    assert len(world.hub.received) == taken
    assert not any(world.program.sent.values()) and len(world.program.done) == IN_FLIGHT_LIMIT - taken


def test_a_message_is_as_large_as_the_hub_counts_it() -> None:
    assert telemetry_size({"$.ct": "json", "ä": "12", "": "3"}, 10) == 10 + 4 + 2 + 2 + 1
    world = provisioned()
    full = SendTelemetry(1, {"$.mid": "ab", "n": "1"}, bytes(TELEMETRY_LIMIT - 4), 0, 1)
    world.at(
        world.uptime_s + 10, lambda: world.post(full, SendTelemetry(2, full.properties, full.payload + b"x", 0, 1))
    )
    live(world, 20)
    assert world.program.done == {1: True, 2: False} and not world.program.sent[2]


def test_telemetry_with_qos_0_is_answered_once_it_is_written_and_never_sent_again() -> None:
    world = provisioned()
    hub, start_s = world.hub, world.uptime_s
    hub.mute_pubacks = True
    world.at(start_s + 10, lambda: world.post(SendTelemetry(1, {}, b"1", 0, 0)))
    world.at(start_s + 11, lambda: hub.drop(world.uptime_s))
    live(world, 100)
    assert world.program.done == {1: True} and [payload for _, payload in hub.received] == [b"1"]
    assert world.in_flight == {}


def test_who_sent_with_qos_0_just_before_an_end_sends_with_qos_1_until_the_hub_acknowledged_it() -> None:
    world = provisioned()
    log = log_effects(world)
    hub, start_s = world.hub, world.uptime_s
    for after_s, sender in ((10, 7), (60, 7), (61, 8), (62, 7)):
        event = SendTelemetry(after_s, {}, b"%d" % after_s, sender, 0)
        world.at(start_s + after_s, lambda event=event: world.post(event))  # type: ignore[misc]
    world.at(start_s + 11, lambda: hub.drop(world.uptime_s))
    live(world, 100)
    sent = {effect.payload: effect.qos for effect in log if isinstance(effect, Publish) and "events" in effect.topic}
    assert sent == {b"10": 0, b"60": 1, b"61": 0, b"62": 0}


def test_a_message_with_qos_0_that_ends_every_connection_does_not_hold_the_device() -> None:
    world = provisioned()
    hub, start_s = world.hub, world.uptime_s
    hub.poison = b"bad"

    def send() -> None:
        world.post(SendTelemetry(int(world.uptime_s), {}, b"bad", 7, 0), telemetry(int(world.uptime_s) * 1000))
        world.at(world.uptime_s + 60, send)

    world.at(start_s + 20, send)
    live(world, 6 * 3600)
    ends = [at_s for at_s, _ in hub.connections]
    assert len([at_s for at_s in ends if at_s > start_s + 3 * 3600]) < 20, "it goes on as fast as before"


def test_numbers_of_messages_and_calls_are_unique_over_identities() -> None:
    world = provisioned()
    start_s = world.uptime_s
    world.at(start_s + 10, lambda: world.hub.send_c2d(world.uptime_s, {}, b"old"))
    world.at(start_s + 11, lambda: world.hub.call(world.uptime_s, "mine", "1"))
    world.at(start_s + 20, lambda: world.hub.call(world.uptime_s, "reprovision", "2"))
    world.at(start_s + 60, lambda: world.hub.call(world.uptime_s, "mine", "3"))
    live(world, 70)
    numbers = [message.message_id for message in world.program.messages()]
    numbers += [call.call_id for call in world.program.calls()]
    assert len(numbers) == 4 == len(set(numbers)), numbers


# Methods.


def test_the_methods_of_the_agent_answer_themselves() -> None:
    world = provisioned()
    start_s = world.uptime_s
    world.at(start_s + 10, lambda: world.hub.call(world.uptime_s, "ping", "a1", b""))
    world.at(start_s + 11, lambda: world.hub.call(world.uptime_s, "status", "a2"))
    live(world, 20)
    assert [(status, rid) for status, rid, _ in world.hub.answers] == [("200", "a1"), ("200", "a2")]
    status = from_json(world.hub.answers[1][2])
    assert status["state"] == CONNECTED and status["assignedHub"] == HUB and status["deviceId"] == DEVICE
    assert status["connections"] == 1 and status["failedAttempts"] == 0 and status["code"] == ""
    assert world.program.calls() == []


def test_other_methods_are_answered_by_programs() -> None:
    world = provisioned()

    def answer(message: "Message") -> None:
        if isinstance(message, MethodCall):
            world.post(AnswerMethod(message.call_id, 207, b'{"name":"%s"}' % message.name.encode()))

    world.program.on_message = answer
    world.at(world.uptime_s + 10, lambda: world.hub.call(world.uptime_s, "open-valve", "r-1", b"[4]"))
    live(world, 20)
    assert world.hub.answers == [("207", "r-1", b'{"name":"open-valve"}')]
    assert world.program.calls()[0].payload == b"[4]"


def test_a_command_of_a_component_keeps_its_name_encoded_or_not() -> None:
    world = provisioned()
    for number, name in enumerate(("thermostat1*getMaxMinReport", "thermostat1%2AgetMaxMinReport", "open%20%C3%BC")):
        world.at(
            world.uptime_s + 10, lambda name=name, number=number: world.hub.call(world.uptime_s, name, str(number))
        )  # type: ignore[misc]
    live(world, 20)
    assert [call.name for call in world.program.calls()] == ["thermostat1*getMaxMinReport"] * 2 + ["open ü"]


def test_desired_properties_that_no_program_had_room_for_come_again_whole() -> None:
    for taken_at_first in (False, True):
        world = provisioned()
        world.hub.desired = {"$version": 7, "rate": 5}
        world.program.takes = taken_at_first
        busy_s = world.uptime_s + 20
        world.at(busy_s, lambda world=world: setattr(world.program, "takes", False))  # type: ignore[misc]
        world.at(busy_s + 1, lambda world=world: world.hub.change_desired(world.uptime_s, "rate", 6))  # type: ignore[misc]
        world.at(busy_s + 2, lambda world=world: setattr(world.program, "takes", True))  # type: ignore[misc]
        live(world, 30 + TWIN_AGAIN_S)
        assert world.program.desired()[-1] == (8, True), world.program.desired()


def test_a_method_that_no_program_takes_is_not_found() -> None:
    world = provisioned()
    world.program.takes = False
    world.at(world.uptime_s + 10, lambda: world.hub.call(world.uptime_s, "open-valve", "1"))
    live(world, 40)
    assert world.hub.answer_to("1") == ["404"]


def test_a_program_that_does_not_answer_is_answered_for_once() -> None:
    world = provisioned()
    start_s = world.uptime_s
    world.at(start_s + 10, lambda: world.hub.call(world.uptime_s, "slow", "1"))
    at_24: list[int] = []
    world.at(start_s + 9 + METHOD_LIMIT_S, lambda: at_24.append(len(world.hub.answers)))
    world.at(
        start_s + 15 + METHOD_LIMIT_S, lambda: world.post(AnswerMethod(world.program.calls()[0].call_id, 200, b""))
    )
    live(world, 60)
    assert at_24 == [0] and world.hub.answer_to("1") == ["504"]


def test_too_many_calls_at_once_are_refused_and_no_call_goes_unanswered() -> None:
    world = provisioned()
    for number in range(CALL_LIMIT + 1):
        world.at(world.uptime_s + 10, lambda number=number: world.hub.call(world.uptime_s, "slow", str(number)))  # type: ignore[misc]
    live(world, 60)
    statuses = sorted([status for status, _, _ in world.hub.answers])
    assert statuses == ["429"] + ["504"] * CALL_LIMIT, statuses


def test_a_payload_too_large_for_the_device_is_refused() -> None:
    world = provisioned()
    world.at(world.uptime_s + 10, lambda: world.hub.call(world.uptime_s, "open-valve", "1", None))
    live(world, 20)
    assert world.hub.answer_to("1") == ["413"] and world.program.calls() == []


def test_what_programs_ask_for_while_the_token_is_renewed_is_done_on_the_connection_that_it_is_for() -> None:
    world = provisioned()
    answer = world.answer

    def program(message: "Message") -> None:
        if isinstance(message, MethodCall):
            world.post(AnswerMethod(message.call_id, 200, b"1"))

    def busy(effect: "Any") -> "Any":
        answered = answer(effect)
        if isinstance(effect, Sign) and world.connected and len(world.hub.connections) == 1:
            world.post(MessageDone(world.program.messages()[0].message_id))
            world.hub.call(world.uptime_s - 1, "mine", "late")
        return answered

    world.program.on_message = program
    world.answer = busy  # type: ignore[method-assign]
    world.at(world.uptime_s + 10, lambda: world.hub.send_c2d(world.uptime_s, {}, b"m"))
    live(world, TOKEN_LIFE_S)
    assert len(world.hub.connections) == 2 and world.hub.deliveries == 1 and world.hub.queued == []
    assert world.hub.answer_to("late") == ["200"]


def test_an_answer_that_waits_to_be_looked_at_is_not_too_late() -> None:
    world = provisioned()
    start_s = world.uptime_s

    def program(message: "Message") -> None:
        if isinstance(message, CloudMessage):  # telling it takes long, and the answer comes meanwhile
            world.post(AnswerMethod(world.program.calls()[0].call_id, 200, b"1"))
            world.pass_to(start_s + 10 + METHOD_LIMIT_S + 1)

    world.program.on_message = program
    world.at(start_s + 10, lambda: world.hub.call(world.uptime_s, "mine", "1"))
    world.at(start_s + 30, lambda: world.hub.send_c2d(world.uptime_s, {}, b"m"))
    live(world, 60)
    assert world.hub.answer_to("1") == ["200"]


def test_a_call_that_waits_is_answered_before_the_renewal() -> None:
    world = provisioned()
    start_s = world.uptime_s

    def call_again() -> None:
        world.hub.call(world.uptime_s, "slow", "late")

    world.at(start_s + 0.775 * TOKEN_LIFE_S, call_again)  # random is 0.5; the connection begins 2.5 s later
    live(world, TOKEN_LIFE_S)
    assert world.hub.answer_to("late") == ["504"] and len(world.hub.connections) == 2


# The twin.


def test_a_patch_that_follows_is_told_as_it_is_and_a_gap_asks_for_the_whole() -> None:
    world = provisioned()
    hub, start_s = world.hub, world.uptime_s
    world.at(start_s + 20, lambda: hub.change_desired(world.uptime_s, "a", 1))
    world.at(start_s + 21, lambda: hub.change_desired(world.uptime_s, "b", 2, False))
    world.at(start_s + 22, lambda: hub.change_desired(world.uptime_s, "c", 3))
    live(world, 40)
    assert world.program.desired() == [(1, True), (2, False), (4, True)] and hub.twin_gets == 2
    whole = from_json(world.program.told[-1].payload)  # type: ignore[union-attr, arg-type]
    assert whole == {"$version": 4, "a": 1, "b": 2, "c": 3}


def test_a_change_while_the_device_was_away_is_heard_after_the_reconnect() -> None:
    world = provisioned()
    hub, start_s = world.hub, world.uptime_s
    world.at(start_s + 20, lambda: hub.drop(world.uptime_s))
    world.at(start_s + 21, lambda: hub.change_desired(world.uptime_s, "a", 1))
    live(world, 60)
    assert world.program.desired() == [(1, True), (2, True)]


def test_an_unchanged_twin_is_told_once() -> None:
    world = provisioned()
    world.at(world.uptime_s + 20, lambda: world.hub.drop(world.uptime_s))
    live(world, 60)
    assert world.program.desired() == [(1, True)] and world.hub.twin_gets == 2


def test_a_twin_older_than_a_patch_is_not_believed() -> None:
    world = provisioned()
    hub, start_s = world.hub, world.uptime_s
    stale = b'{"desired":{"$version":1},"reported":{"$version":1}}'
    world.at(start_s + 20, lambda: hub.change_desired(world.uptime_s, "a", 1, False))
    world.at(start_s + 21, lambda: setattr(hub, "broken_twin", stale))
    world.at(start_s + 22, lambda: hub.change_desired(world.uptime_s, "b", 2))
    world.at(start_s + 30, lambda: setattr(hub, "broken_twin", None))
    live(world, 40 + TWIN_AGAIN_S)
    assert world.program.desired() == [(1, True), (3, True)]


def test_a_patch_that_overtakes_the_first_twin_is_told_at_once() -> None:
    world = provisioned()
    hub, start_s = world.hub, world.uptime_s
    hub.change_desired(world.uptime_s, "a", 1, False)
    hub.broken_twin = b'{"desired":{"$version":1},"reported":{"$version":1}}'
    world.at(start_s + 2, lambda: hub.change_desired(world.uptime_s, "b", 2))
    world.at(start_s + 2.5, lambda: setattr(hub, "broken_twin", None))
    live(world, 40)
    assert world.program.desired()[-1] == (3, True), world.program.desired()


def test_a_hub_that_cannot_answer_for_the_twin_is_asked_again_later() -> None:
    for statuses, longest_s in (([429, 500, 200, 500], 8), ([0, 0, 0], 3), ([400], 2)):
        world = provisioned()
        world.hub.twin_statuses = list(statuses)
        gets: list[float] = []
        publish = world.hub.publish

        def noted(effect: "Any", packet_id: int, now_s: float, publish: "Any" = publish) -> None:
            gets.append(now_s)
            publish(effect, packet_id, now_s)

        world.hub.publish = noted  # type: ignore[method-assign]
        live(world, longest_s * TWIN_AGAIN_S + 60)
        assert "dpsAgent" in world.hub.reported and world.program.desired() == [(1, True)], statuses
        pauses = [gets[place] - gets[place - 1] for place in range(1, len(gets))]
        expected_s = {429: 1.5 * TWIN_AGAIN_S, 0: TWIN_LIMIT_S, 400: 1.5 * TWIN_AGAIN_S}[statuses[0]]
        assert abs(pauses[0] - expected_s) < 2 and max(pauses) < 3 * TWIN_AGAIN_S + 2, pauses
        assert len(pauses) < 3 or pauses[1] > TWIN_AGAIN_S - 2 or statuses[0], "asked every minute for ever"


def test_a_twin_that_the_hub_refuses_is_asked_for_ever_more_rarely_also_on_new_connections() -> None:
    firsts = []
    for random in (0.0, 0.999):
        world = provisioned()
        world.random = random
        world.hub.twin_statuses = [429] * 1000
        gets: list[float] = []
        publish = world.hub.publish

        def noted(effect: "Any", packet_id: int, now_s: float, publish: "Any" = publish, gets: "Any" = gets) -> None:
            gets.append(now_s)
            publish(effect, packet_id, now_s)

        world.hub.publish = noted  # type: ignore[method-assign]
        for hour in range(1, 24):
            world.at(world.uptime_s + hour * 3600, lambda world=world: world.hub.drop(world.uptime_s))  # type: ignore[misc]
        live(world, 24 * 3600)
        pauses = [gets[place] - gets[place - 1] for place in range(1, len(gets))]
        firsts.append(pauses[0])
        assert pauses[0] >= TWIN_AGAIN_S and max(pauses) <= TWIN_AGAIN_LIMIT_S + TOKEN_LIFE_S, pauses
        assert 10 < len(gets) < 36 and min(pauses[4:]) >= TWIN_AGAIN_LIMIT_S / 2, pauses
    assert firsts[1] > 1.9 * firsts[0], "the same delay for every device"


def test_a_twin_too_large_for_the_device_is_not_asked_for_again_and_again() -> None:
    world = provisioned()
    gets: list[int] = []
    answer_twin = world.hub._answer_twin

    def too_large(topic: str, status: int, payload: bytes, now_s: float) -> int:
        if topic.startswith("$iothub/twin/GET/"):
            gets.append(1)
            rid = topic.partition("?$rid=")[2]
            world.hub.send(now_s, f"$iothub/twin/res/200/?$rid={rid}", None)
            return 200
        return answer_twin(topic, status, payload, now_s)

    world.hub._answer_twin = too_large  # type: ignore[method-assign]
    live(world, 0.5 * TOKEN_LIFE_S)
    assert len(gets) == 1 and "dpsAgent" in world.hub.reported
    assert [message for message in world.program.told if isinstance(message, Desired)] == [Desired(0, None, True)]


def test_nothing_that_a_hub_says_can_confuse_the_device() -> None:
    world = provisioned()
    start_s = world.uptime_s
    topics = (
        "",
        "$",
        "devices/",
        "devices/other/messages/devicebound/",
        DEVICEBOUND + "&&=&%&a=%ff",
        "$iothub/methods/POST/",
        "$iothub/methods/POST/ping",
        "$iothub/methods/POST/ping/?$rid=",
        "$iothub/methods/POST/ping/?$rid=+",
        "$iothub/methods/POST/x/?$rid=#&y",
        "$iothub/methods/POST//?rid=1",
        "$iothub/twin/res/",
        "$iothub/twin/res/200/?$rid=",
        "$iothub/twin/res/x/?$rid=1",
        "$iothub/twin/PATCH/properties/desired/",
        "$iothub/twin/PATCH/properties/desired/?$version=x",
        "$iothub/twin/PATCH/properties/desired/?$version=-5",
        "$iothub/twin/PATCH/properties/desired/?$version=99999999999999999999",
    )
    for number, topic in enumerate(topics):
        for payload in (b"", b"\xff", b"{}", None):
            message = (topic, payload)
            world.at(
                start_s + 10 + number,
                lambda message=message: world.hub.send(world.uptime_s, message[0], message[1], 77),  # type: ignore[misc]
            )
    world.at(start_s + 100, lambda: world.hub.call(world.uptime_s, "ping", "1"))
    life = live(world, 120)
    assert life.state == CONNECTED and life.connections == 1 and world.hub.answer_to("1") == ["200"]


def test_a_twin_that_was_not_granted_is_asked_nothing_whatever_the_hub_sends() -> None:
    world = provisioned()
    hub, start_s = world.hub, world.uptime_s
    hub.lacks, hub.twin_statuses = ["twin"], [500, 500]
    grant = hub.subscribe

    def withhold(effect: Subscribe, packet_id: int, now_s: float) -> None:
        if hub.lacks or "twin" not in effect.filters[0][0]:
            grant(effect, packet_id, now_s)
        else:
            hub.send(now_s, "$iothub/twin/PATCH/properties/desired/?$version=5", b"{}")

    hub.subscribe = withhold  # type: ignore[method-assign]
    world.at(start_s + 10, lambda: setattr(hub, "lacks", []))
    life = live(world, 400)
    assert hub.twin_gets == 0 and life.hub_lacks == ["twin"] and life.state == CONNECTED
    assert len(world.slept("did not grant")) == 1, world.sleeps


def test_no_twin_can_confuse_the_device() -> None:
    for twin in (
        b"",
        b"\xff",
        b"[]",
        b"7",
        b"null",
        b"{}",
        b'{"desired":1,"reported":2}',
        b'{"desired":[],"reported":[]}',
        b'{"desired":{},"reported":{}}',
        b'{"desired":{"$version":"7"},"reported":{}}',
        b'{"desired":{"$version":null},"reported":{}}',
        b'{"desired":{"$version":{}},"reported":{}}',
        b'{"desired":{"$version":1.5},"reported":{}}',
        b'{"desired":{"$version":7},"reported":null}',
        b'{"desired":{"$version":7,"a":1e999},"reported":{}}',
        b"[" * 100,
    ):
        world = provisioned()
        world.hub.broken_twin = twin
        world.at(world.uptime_s + 20, lambda: world.hub.change_desired(world.uptime_s, "a", 1))
        life = live(world, 60)
        assert life.state == CONNECTED and life.connections == 1, twin
        assert [whole for _, whole in world.program.desired()] == [], twin


# The older identity.


def test_the_older_identity_is_forgotten_once_the_new_one_was_accepted() -> None:
    world = provisioned()
    world.hub.script = [3]
    start_s = world.uptime_s
    live(world, 3 * TOKEN_LIFE_S)
    assert [record for _, record in world.forgotten] == [IDENTITY]
    accepted_s = world.hub.connections[1][0]
    assert world.forgotten[0][0] > accepted_s > start_s + 5


def test_an_older_identity_that_cannot_be_forgotten_stops_nothing() -> None:
    for refusal in (RetryLater("store.io", "failed"), AskOperator("store.read_only", "read-only")):
        world = provisioned()
        world.refuse["ForgetOlder"] = [refusal]
        life = live(world, 60)
        assert life.state == CONNECTED and life.connections == 1 and world.effects["ForgetOlder"] == 1


# What ends a connection is told by `Session` alone; what follows is the lifecycle's part.


def session(world: World) -> Session:
    assignment = decode(world.store[IDENTITY])[0]
    return Session(settings(), assignment, ABOUT, dict, 0, {})


def test_a_hub_that_grants_nothing_is_left_in_time() -> None:
    world = provisioned()
    world.hub.mute = True
    opened = session(world)
    started_s = world.uptime_s
    assert world.run(opened.open()) == "lost" and "subscriptions" in opened.reason
    assert world.uptime_s - started_s < 35 and opened.accepted


def test_a_flood_of_messages_does_not_prolong_the_wait_for_the_subscriptions() -> None:
    world = provisioned()
    world.hub.mute = True
    opened = session(world)
    started_s = world.uptime_s
    answer = world.answer

    def flood(effect: "Any") -> "Any":
        if isinstance(effect, NextEvent):
            world.uptime_s += 1
            return Arrived("noise", b"", 0)
        return answer(effect)

    world.answer = flood  # type: ignore[method-assign]
    assert world.run(opened.open()) == "lost" and world.uptime_s - started_s < 35


def test_every_ending_says_why() -> None:
    for reason, end in (
        ("closed: by peer", "lost"),
        ("timeout", "lost"),
        ("not_found: no such name", "not found"),
        ("dns: try again", "lost"),
    ):
        world = provisioned()
        opened = session(world)
        assert world.run(opened.open()) == ""
        gone = (world.uptime_s, Gone(reason))
        world.hub.events.append(gone)
        assert world.run(opened.stay()) == end
        assert HUB in opened.reason and reason in opened.reason


def test_what_the_tpm_says_while_connecting_comes_through() -> None:
    for error in (RetryLater("tpm.busy", "busy"), AskOperator("tpm.denied", "no"), IdentityStale("tpm.key_stale", "x")):
        world = provisioned()
        world.refuse["Sign"] = [error]
        try:
            world.run(session(world).open())
        except DpsError as raised:
            assert raised is error
        else:
            raise AssertionError(f"{error.code} was swallowed")
        assert world.hub.connections == []


def test_what_the_device_keeps_is_bounded() -> None:
    world = provisioned()
    world.hub.mute_pubacks = True
    opened = session(world)
    assert world.run(opened.open()) == ""

    def everything() -> None:
        for number in range(200):
            world.post(telemetry(number))
            world.hub.call(world.uptime_s, "slow", str(number))
            world.hub.send(world.uptime_s, DEVICEBOUND, b"x", 1 + number)

    world.at(world.uptime_s + 1, everything)
    world.end_at(world.uptime_s + 5)
    world.run(opened.stay())
    for name, limit in (("_in_flight", IN_FLIGHT_LIMIT), ("_calls", CALL_LIMIT), ("_unacknowledged", MESSAGE_LIMIT)):
        assert len(getattr(opened, name)) == limit, name


def test_a_message_too_large_for_the_device_is_told_without_its_payload() -> None:
    world = provisioned()
    world.at(world.uptime_s + 10, lambda: world.hub.send(world.uptime_s, DEVICEBOUND + "a=b", None, 5))
    live(world, 20)
    message = world.program.messages()[0]
    assert isinstance(message, CloudMessage) and message.payload is None and message.properties == {"a": "b"}


def test_a_registered_device_that_does_not_connect_stays_as_it_was() -> None:
    world = World()
    life = Lifecycle(settings())
    world.run(life.live(False, False))
    assert life.state == PROVISIONED and world.hub.connections == []
