"""Tokens as shipped clients write them."""

import base64

import pytest

from dps_emulator.tokens import TokenError, parse_token
from emulator.device_side import vector

SAS = vector("sas")["tokens"]
SHAPES = [pytest.param(entry, id=entry["name"]) for entry in SAS]


def text_of(entry: dict[str, str]) -> str:
    tail = f"&skn={entry['skn']}" if entry.get("skn") else ""
    return f"SharedAccessSignature sr={entry['sr']}&sig={entry['sig']}&se={entry['se']}{tail}"


@pytest.mark.parametrize("entry", SHAPES)
def test_every_spelling_verifies_over_its_own_text(entry: dict[str, str]) -> None:
    token = parse_token(text_of(entry))
    assert token.signed_by(base64.b64decode(entry["key"]))
    assert not token.signed_by(bytes(32))


def test_spellings_of_one_resource_name_the_same() -> None:
    resource = "0ne00000000/registrations/SBGDANHMU4LXJ5Y6AS3V4NI7BG5TW4QJQS7LNX3P7WPVMVCWAK2A"
    spellings = [entry for entry in SAS if entry["sr"].startswith("0ne")]
    assert len(spellings) >= 3
    assert all(parse_token(text_of(entry)).names(resource) for entry in spellings)
    assert not any(parse_token(text_of(entry)).names(resource + "x") for entry in spellings)


def test_a_respelled_resource_no_longer_verifies() -> None:
    token = parse_token(text_of({**SAS[0], "sr": SAS[0]["sr"].replace("%2F", "%2f")}))
    assert not token.signed_by(base64.b64decode(SAS[0]["key"]))


def test_order_and_raw_padding_and_empty_key_name_are_taken() -> None:
    entry = SAS[0]
    raw = entry["sig"].replace("%3D", "=")
    token = parse_token(f"SharedAccessSignature skn=&se={entry['se']}&sig={raw}&future=1&sr={entry['sr']}")
    assert token.signed_by(base64.b64decode(entry["key"])) and token.key_name == ""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Bearer x", "does not begin with"),
        ("SharedAccessSignature sig=AA%3D%3D&se=1", "no 'sr'"),
        ("SharedAccessSignature sr=a&se=1", "no 'sig'"),
        ("SharedAccessSignature sr=a&sig=AA%3D%3D", "no 'se'"),
        ("SharedAccessSignature sr=a&sig=AA%3D%3D&se=soon", "'se' that is no number"),
        ("SharedAccessSignature sr=a&sig=AA%3D%3D&se=-1", "'se' that is no number"),
        ("SharedAccessSignature sr=a&sig=AA%3D%3D&se=" + "9" * 5000, "'se' that is no number"),
        ("SharedAccessSignature sr=a&sig=geheim!&se=1", "not percent-encoded base64"),
        ("SharedAccessSignature sr=a&sr=b&sig=AA%3D%3D&se=1", "'sr' twice"),
    ],
)
def test_a_malformed_token_is_refused_and_not_quoted(text: str, message: str) -> None:
    with pytest.raises(TokenError, match=message) as caught:
        parse_token(text)
    assert "geheim" not in str(caught.value)


def test_a_signature_is_not_in_the_repr() -> None:
    assert "sig" not in repr(parse_token(text_of(SAS[0])))
