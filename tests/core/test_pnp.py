"""The forms of Plug and Play, byte for byte as other clients put them on the wire.

The vectors are what azure-iot-device 2.14 and azure-iot-device (Node) send for the same values.
"""

from dps_agent.pnp import DEFAULT, DONE, answer, answers, command, component, is_component, telemetry_of
from dps_agent.sas import percent_encode
from dps_agent.session import telemetry_topic
from dps_hal.platform import MICROPYTHON, from_json, to_json

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

TELEMETRY = {"$.mid": "m 1", "$.cid": "c/1", "$.ct": "application/json", "$.ce": "utf-8"}
TELEMETRY_TOPIC = (
    "devices/vector-device/messages/events/%24.mid=m%201&%24.cid=c%2F1&%24.ct=application%2Fjson&%24.ce=utf-8"
    "&%24.sub=thermostat1&a%20b=%C3%BC%26%3D"
)


def is_written_as(value: "Any", text: bytes) -> bool:
    """Whether JSON of this value is this text; on MicroPython, whose dictionaries have no order, its value."""
    return from_json(text) == value if MICROPYTHON else to_json(value).encode() == text


def test_the_topic_of_a_components_telemetry_is_that_of_other_clients() -> None:
    properties = dict(TELEMETRY)
    properties.update({"$.sub": "thermostat1", "a b": "ü&="})
    topic = telemetry_topic("vector-device", properties)
    if MICROPYTHON:
        assert sorted(topic.rpartition("/")[2].split("&")) == sorted(TELEMETRY_TOPIC.rpartition("/")[2].split("&"))
    else:
        assert topic == TELEMETRY_TOPIC
    assert telemetry_of("thermostat1")["$.sub"] == "thermostat1"


def test_a_model_id_in_a_user_name_is_that_of_other_clients() -> None:
    assert percent_encode("dtmi:com:example:Gateway;1") == "dtmi%3Acom%3Aexample%3AGateway%3B1"


def test_a_components_properties_carry_the_marker_first() -> None:
    value = component("thermostat1", {"temperature": 21.5})
    assert is_written_as(value, b'{"thermostat1":{"__t":"c","temperature":21.5}}')
    assert is_component(value["thermostat1"]) and not is_component({"t": "c"}) and not is_component("c")


def test_an_answer_to_a_writable_property_has_its_four_parts() -> None:
    value = {"targetTemperature": answer(23.5, DONE, 3, "done")}
    assert is_written_as(value, b'{"targetTemperature":{"value":23.5,"ac":200,"av":3,"ad":"done"}}')
    assert is_written_as({"a": answer(True, DEFAULT, 0)}, b'{"a":{"value":true,"ac":203,"av":0}}')


def test_a_whole_document_is_answered_with_its_version_components_included() -> None:
    desired = {"$version": 7, "rate": 5, "old": None, "thermostat1": {"__t": "c", "target": 21, "limit": None}}
    assert answers(desired, DONE) == {
        "rate": {"value": 5, "ac": 200, "av": 7},
        "old": None,
        "thermostat1": {"__t": "c", "target": {"value": 21, "ac": 200, "av": 7}, "limit": None},
    }


def test_a_command_of_a_component_is_its_name_behind_a_star() -> None:
    assert command("thermostat1*getMaxMinReport") == ("thermostat1", "getMaxMinReport")
    assert command("reboot") == ("", "reboot") and command("a*b*c") == ("a", "b*c")
