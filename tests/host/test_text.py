"""Text and secrets as people's editors leave them in files, whoever reads them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import trustme

from dps_agent.host import config
from dps_agent.host.cli import main
from dps_agent.host.config import ConfigurationError
from dps_agent.host.diag import secrets_of
from dps_agent.host.network import dial, trust
from dps_agent.host.network.proxy import ProxyRule
from dps_deploy import settings as board_settings
from dps_hal.errors import AskOperator
from dps_hal.tpm.errors import RefusedError
from dps_hal.tpm.rules import ENDORSEMENT_AUTH_SET, OWNER_AUTH_SET, PT_PERMANENT, Passwords
from dps_hal.tpm.verdicts import error_of
from dps_text import NotText, Secret, oddities, secret_of, text_of, whole_number

BOTH_SET = {PT_PERMANENT: OWNER_AUTH_SET | ENDORSEMENT_AUTH_SET}


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_utf_8_is_read_with_or_without_a_mark_and_with_any_line_end(mark: bytes, line_end: str) -> None:
    assert text_of(mark + line_end.join(("Grüße", "\ufeff", "")).encode()) == "Grüße\n\ufeff\n"
    assert text_of(mark) == ""


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("text", ["id_scope = 'x'\r\n", "ab"])
def test_utf_16_is_named_with_or_without_its_mark(encoding: str, text: str) -> None:
    if encoding == "utf-32":
        text = text.encode("utf-32").decode("latin-1")
        content = text.encode("latin-1")
    else:
        content = text.encode(encoding)
    with pytest.raises(NotText, match=r"came UTF-16: save the file as UTF-8"):
        text_of(content)


def test_the_line_of_a_byte_that_is_no_utf_8_is_named() -> None:
    with pytest.raises(NotText, match=r"came the byte 0xe9 at line 3, byte 4: save the file as UTF-8"):
        text_of("\ufeffa\r\nb\nxyz".encode() + "é".encode("latin-1"))
    with pytest.raises(NotText, match=r"came the byte 0xff at line 1, byte 1"):
        text_of(b"\xff")


SETTINGS = 'id_scope = "0ne00000000"\r\n[tpm]\r\nek_template = "tcg-l1"\r\n'


def read_agent(path: Path) -> str:
    return config.load(path, environ={"STATE_DIRECTORY": "/s", "RUNTIME_DIRECTORY": "/r"}).id_scope


def read_drop_in(path: Path) -> str:
    folder = path.parent / "etc" / "config.d"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "10-plant.toml").write_bytes(path.read_bytes())
    environ = {"STATE_DIRECTORY": "/s", "RUNTIME_DIRECTORY": "/r"}
    return config.load(environ=environ, system_file=path.parent / "etc" / "config.toml").id_scope


def read_board(path: Path) -> str:
    return str(board_settings.read(path, 1_750_000_000).config["id_scope"])


READERS = [read_agent, read_drop_in, read_board]


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_settings_are_read_as_an_editor_saved_them(reader: object, encoding: str, tmp_path: Path) -> None:
    assert callable(reader)
    path = tmp_path / "settings.toml"
    path.write_bytes(SETTINGS.encode(encoding))
    assert reader(path) == "0ne00000000"


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    ("content", "says"),
    [
        (SETTINGS.encode("utf-16"), "came UTF-16: save the file as UTF-8"),
        (SETTINGS.encode("utf-16-le"), "came UTF-16"),
        (SETTINGS.encode() + b"# Gr\xfc\xdfe\r\n", "came the byte 0xfc at line 4, byte 5"),
        (SETTINGS.encode() + b"poll = lookup\r\n", "line 4"),
    ],
)
def test_settings_that_cannot_be_read_are_named_with_the_line(
    reader: object, content: bytes, says: str, tmp_path: Path
) -> None:
    assert callable(reader)
    path = tmp_path / "settings.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigurationError) as caught:
        reader(path)
    (problem,) = caught.value.problems
    assert caught.value.code == "config.unreadable" and says in problem, problem
    assert problem.startswith((f"{path}: ", f"{tmp_path}/etc/config.d/10-plant.toml: "))


@pytest.mark.parametrize(
    ("content", "secret"),
    [
        (b"hunter2", b"hunter2"),
        (b"hunter2\n", b"hunter2"),
        (b"hunter2\r\n", b"hunter2"),
        (b"hunter2\n\n", b"hunter2\n"),
        (b"hunter2\r\n\r\n", b"hunter2\r\n"),
        (b"hunter2\n\r", b"hunter2\n\r"),
        (b"hunter2\r", b"hunter2\r"),
        (b" hunter2 \n", b" hunter2 "),
        (b"\xef\xbb\xbfhunter2\n", b"\xef\xbb\xbfhunter2"),
        (b"\x00\x8f\r\x00\n", b"\x00\x8f\r\x00"),
        (b"\r\n", b""),
    ],
)
def test_a_secret_loses_one_line_end_and_nothing_else(content: bytes, secret: bytes, tmp_path: Path) -> None:
    assert secret_of(content) == secret
    file = tmp_path / "password"
    file.touch(0o600)
    file.write_bytes(content)
    if secret:
        assert config.hierarchy_password("tpm.owner_auth_file", str(file), {}) == secret


ODD = [
    (b"\xef\xbb\xbfhunter2", "it begins with a byte order mark"),
    (b" hunter2", "it begins with a blank"),
    (b"hunter2\t", "it ends with a blank"),
    ("hunter2\u00a0".encode(), "it ends with a blank"),
    ("hun\u200bter2".encode(), "it has a character that nobody sees"),
    (b"hunter2\n", "it has more than one line"),
    (b"hunter2\r\n", "it has more than one line and has a carriage return in it"),
    (b"hunter2\nthe owner's", "it has more than one line"),
    (b"hunter2\r", "it has a carriage return in it"),
    ("hunter2".encode("utf-16"), "it is in UTF-16"),
    ("hunter2".encode("utf-16-be"), "it is in UTF-16"),
    (b"\xef\xbb\xbf hunter2\n", "it begins with a byte order mark and has more than one line and begins with a blank"),
]


@pytest.mark.parametrize(("secret", "says"), ODD)
def test_what_nobody_typed_is_named_and_the_secret_is_not(secret: bytes, says: str) -> None:
    assert oddities(secret) == says
    assert "hunter2" not in repr(Secret(secret)) + str(Secret(secret)) + f"{Secret(secret)}"


@pytest.mark.parametrize(
    "secret",
    [
        b"hunter2",
        "Grüße aus Köln 😀".encode(),
        b"correct horse battery staple",
        bytes(range(32)),
        b"\x00\xff\x10 \n\r",
        bytes(32),
        b"\x1b[0m ",
        b"\xff\x20",
    ],
)
def test_neither_a_phrase_nor_a_generated_key_is_odd(secret: bytes) -> None:
    assert oddities(secret) == ""


@pytest.mark.parametrize("of_owner", [True, False])
def test_the_tpms_refusal_names_what_is_odd_in_the_password(of_owner: bool) -> None:
    odd, plain = Secret(b"hunter2 "), Secret(b"hunter2")
    passwords = Passwords(odd if of_owner else plain, plain if of_owner else odd)
    for owner in (True, False):
        refused = RefusedError("policy_secret", 0x9A2)
        refused.of_owner = owner
        assert not passwords.go_without(refused, BOTH_SET)
        message = error_of(refused, pytest.fail).message
        assert ("it ends with a blank" in message) == (owner == of_owner) and "hunter2" not in message, message
    assert passwords.of(owner=of_owner) == b"hunter2 ", "nothing of it is taken away"


def test_a_board_gives_passwords_that_are_plain_bytes() -> None:
    refused = RefusedError("policy_secret", 0x9A2)
    assert not Passwords(b"x ", b"x ").go_without(refused, BOTH_SET) and refused.odd == ""


@pytest.mark.parametrize("line_end", [b"\n", b"\r\n"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_every_root_in_a_file_is_trusted_however_an_editor_saved_it(
    mark: bytes, line_end: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "roots.pem"
    pem = b"".join(trustme.CA(organization_name=name).cert_pem.bytes() for name in ("one", "two"))
    path.write_bytes(mark + pem.replace(b"\n", line_end) + "Zürich".encode("latin-1"))
    context = trust.tls_context()
    trust._take_file(context, str(path), "ca_file")
    assert len(context.get_ca_certs()) == 2


def test_roots_in_utf_16_are_named(tmp_path: Path) -> None:
    path = tmp_path / "roots.pem"
    path.write_text(trustme.CA().cert_pem.bytes().decode(), encoding="utf-16")
    with pytest.raises(AskOperator, match=r"hub\.ca_file: expected PEM certificates in '.*roots\.pem': .*came UTF-16"):
        dial.Dialler(ProxyRule("none"), str(path), "hub.ca_file")


def test_config_validate_names_the_mark_and_the_odd_password(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, path = tmp_path / "owner-auth", tmp_path / "config.toml"
    file.touch(0o600)
    file.write_bytes(b"hunter2 \r\n")
    text = f'id_scope = "x"\nstate_dir = "{tmp_path}"\n[tpm]\nowner_auth_file = "{file}"\n'
    path.write_text(text, encoding="utf-8-sig")
    assert main(["config", "validate", "--config", str(path)]) == 0
    shown = capsys.readouterr()
    assert shown.err.splitlines() == [
        f"dps-agent: warning: {path}: begins with a byte order mark, which is passed over",
        f"dps-agent: warning: tpm.owner_auth_file: it ends with a blank ({file})",
    ]
    path.write_text(text)
    file.write_bytes(b"hunter2\r\n")
    assert main(["config", "validate", "--config", str(path)]) == 0
    assert capsys.readouterr().err == ""


def test_check_warns_of_an_odd_password_and_shows_none_of_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "owner-auth"
    file.touch(0o600)
    path = tmp_path / "config.toml"
    path.write_text(f'id_scope = "x"\nstate_dir = "{tmp_path}"\n[tpm]\nowner_auth_file = "{file}"\n')
    for content, result in ((b"hunter2\r\n", "ok"), (b"hunter2 \r\n", "warning")):
        file.write_bytes(content)
        assert main(["check", "--only", "settings", "--json", "--config", str(path)]) == 0
        shown = capsys.readouterr().out
        (found,) = json.loads(shown)["checks"]
        assert (found["result"], "it ends with a blank" in found["detail"]) == (result, result == "warning")
        assert "hunter2" not in shown


def test_diag_hides_a_password_with_and_without_what_nobody_typed(tmp_path: Path) -> None:
    file = tmp_path / "owner-auth"
    file.touch(0o600)
    file.write_bytes(b"\xef\xbb\xbfhunter2 \r\n")
    path = tmp_path / "config.toml"
    path.write_text(f'id_scope = "x"\n[tpm]\nowner_auth_file = "{file}"\n')
    loaded = config.load(path, environ={"STATE_DIRECTORY": "/s", "RUNTIME_DIRECTORY": "/r"})
    shown = secrets_of(loaded, {}).removed_from("it was hunter2, or \ufeffhunter2 .")
    assert "hunter2" not in shown, shown


def test_a_password_of_too_many_bytes_says_what_is_odd_in_it(tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.touch(0o600)
    file.write_bytes(b"hunter2\n" * 20)
    with pytest.raises(AskOperator, match=r"expected 1 to 64 bytes in .*; came more; it has more than one line"):
        config.hierarchy_password("tpm.owner_auth_file", str(file), {})


@pytest.mark.parametrize("text", ["", "0", "-1", "+1", " 1", "1_0", "1.0", "1e1", "²", "١", "11", "1" * 5000])
def test_what_is_no_whole_number_in_the_bounds_is_none(text: str) -> None:
    assert whole_number(text, 1, 10) is None


def test_a_whole_number_counts_up_to_both_bounds() -> None:
    assert [whole_number(text, 1, 10) for text in ("1", "10", "007")] == [1, 10, 7]
