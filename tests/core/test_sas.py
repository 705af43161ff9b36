"""Tokens of DPS and hub against computed and published vectors."""

from dps_agent.effects import Sign
from dps_agent.sas import (
    DPS_KEY_NAME,
    SasToken,
    dps_resource,
    hub_resource,
    percent_encode,
    string_to_sign,
)
from dps_agent.signing import signed_token
from dps_hal.platform import hmac_sha256
from support.vectors import load, unbase64


def token(resource: str, expires_at_s: int, key: bytes, key_name: str) -> SasToken:
    generator = signed_token(resource, expires_at_s, b"wrapped", key_name)
    ask = next(generator)
    assert isinstance(ask, Sign) and ask.wrapped_key == b"wrapped"
    try:
        generator.send(hmac_sha256(key, ask.message))
    except StopIteration as stop:
        return stop.value  # type: ignore[no-any-return]
    raise AssertionError("the token asks for more than one signature")


def test_every_vector_gives_its_token() -> None:
    for vector in load("sas")["tokens"]:
        made = token(vector["sr"], vector["se"], unbase64(vector["key"]), vector.get("skn", ""))
        wanted = f"SharedAccessSignature sr={vector['sr']}&sig={vector['sig']}&se={vector['se']}"
        if "skn" in vector:
            wanted += f"&skn={vector['skn']}"
        assert made.header() == wanted, vector["name"]


def test_resources_are_encoded_with_upper_case_hex() -> None:
    vectors = {vector["name"]: vector for vector in load("sas")["tokens"]}
    wanted = vectors["DPS, upper-case hex"]
    scope, _, registration_id = wanted["sr"].split("%2F")
    assert dps_resource(scope, registration_id) == wanted["sr"] and wanted["skn"] == DPS_KEY_NAME
    wanted = vectors["hub"]
    hub, _, device = wanted["sr"].split("%2F")
    assert hub_resource(hub, device) == wanted["sr"]


def test_what_is_signed_is_the_text_that_the_token_shows() -> None:
    assert string_to_sign("a%2Fb", 7) == b"a%2Fb\n7"


def test_only_unreserved_characters_stay() -> None:
    assert percent_encode("aZ09-._~") == "aZ09-._~"
    assert percent_encode("a b/+='\u00e9") == "a%20b%2F%2B%3D%27%C3%A9"


def test_a_token_shows_its_signature_to_nobody_by_accident() -> None:
    made = token("hub%2Fdevices%2Fd", 1893456000, b"k" * 32, "")
    signature = made.header().split("sig=")[1].split("&")[0]
    for text in (repr(made), str(made), f"{made}", f"{made!r}"):
        assert signature not in text and "sig" not in text
