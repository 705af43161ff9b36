"""The settings: every key from every source, their order, and problems that name what to correct."""

import json
import os
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dps_agent.host import config
from dps_agent.host.cli.config import as_toml
from dps_agent.host.config import Configuration, ConfigurationError, environment_name, load
from dps_agent.host.plain_toml import read_plain
from dps_agent.host.settings_table import KEYS
from dps_agent.settings import Settings
from dps_deploy import settings as deployment
from dps_hal.errors import AskOperator
from dps_hal.host.tcti import is_ours_alone

TEMPLATE = Path(__file__).parents[2] / "agent" / "service" / "config.toml"

CASES = sorted(path.parent for path in (Path(__file__).parent / "settings").glob("*/config.toml"))
NO_FILE = Path("/nonexistent/dps-agent/config.toml")
ENVIRON = {"STATE_DIRECTORY": "/run/state", "DPS_AGENT_ID_SCOPE": "0ne00000000"}


def read(text: str, tmp_path: Path, environ: dict[str, str] | None = None, *overrides: str) -> Configuration:
    file = tmp_path / "given.toml"
    file.write_text(text)
    return load(file, overrides=overrides, environ=ENVIRON if environ is None else environ)


def problems_of(text: str, tmp_path: Path, environ: dict[str, str] | None = None, *overrides: str) -> tuple[str, ...]:
    with pytest.raises(ConfigurationError) as caught:
        read(text, tmp_path, environ, *overrides)
    assert all(problem in caught.value.message for problem in caught.value.problems)
    return caught.value.problems


def as_file(key: str, text: str) -> str:
    table, _, name = key.rpartition(".")
    return f"[{table}]\n{name} = {text}\n" if table else f"{name} = {text}\n"


def with_scope(key: str) -> dict[str, str]:
    """An environment without `key`: a simulator needs a folder, a way without a TPM its files."""
    environ = {**ENVIRON, **({"DPS_AGENT_TPM_TCTI": "/tmp/tpm"} if key == "tpm.backend" else {})}
    if key in ("attestation", "device_key_file"):
        environ |= {"DPS_AGENT_REGISTRATION_ID": "press-07", "DPS_AGENT_ATTESTATION": "symmetric-key"}
        environ |= {"DPS_AGENT_DEVICE_KEY_FILE": "device.key"}
    if key == "certificate_file":
        environ |= {"DPS_AGENT_REGISTRATION_ID": "press-07", "DPS_AGENT_ATTESTATION": "x509"}
        environ |= {"DPS_AGENT_DEVICE_KEY_FILE": "device-key.pem"}
    if key in ("issued_key_file", "issued_key"):
        environ |= {"DPS_AGENT_CERTIFICATE": "issued"}
    environ.pop(environment_name(key), None)
    return environ


def flat(content: dict[str, Any]) -> dict[str, Any]:
    """A settings file's values by their dotted keys."""
    found: dict[str, Any] = {}
    for name, value in content.items():
        inner = value.items() if isinstance(value, dict) and name != "payload" else ()
        found.update({f"{name}.{last}": each for last, each in inner} if inner else {name: value})
    return found


# Every key with another value than its default.
OTHER: dict[str, Any] = {
    key: value
    for case in ("proxy-with-a-password", "an-issued-certificate", "a-certificate", "a-key-of-its-own", "every-setting")
    for key, value in flat(tomllib.loads((CASES[0].parent / case / "config.toml").read_text())).items()
}


def as_python(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def of_the_agent(name: str) -> Any:
    """What the agent on Linux makes of a case: the values that are not the default (all of `defaults`), or problems."""
    try:
        loaded = load("config.toml", environ={"STATE_DIRECTORY": "/run/state", "RUNTIME_DIRECTORY": "/run/here"})
    except ConfigurationError as error:
        return {"code": error.code, "problems": list(error.problems)}
    values = {key: loaded.value(key) for key in KEYS}
    settled = {"state_dir": "/run/state", "runtime_dir": "/run/here"}
    defaults = {key: settled.get(key, setting.default) for key, setting in KEYS.items()}
    return {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in values.items()
        if name == "defaults" or value != defaults[key]
    }


def of_a_board() -> Any:
    """What `tools/deploy` makes of a case: the content of config.json, or problems."""
    try:
        return deployment.read(Path("config.toml"), 0).config
    except ConfigurationError as error:
        return {"code": error.code, "problems": list(error.problems)}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_settings_file_is_read_as_its_case_says(case: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(case)
    found = {"agent": of_the_agent(case.name), "board": of_a_board()}
    expected = json.loads(Path("expected.json").read_text())
    assert found == expected, f"{case.name}: came {json.dumps(found, indent=2)}"


def test_the_cases_have_every_setting_with_its_default_and_with_another_value() -> None:
    defaults = json.loads((CASES[0].parent / "defaults" / "expected.json").read_text())
    assert list(defaults["agent"]) == list(KEYS), "put it into tests/host/settings/defaults/expected.json"
    assert set(OTHER) == set(KEYS), "put another value than the default into tests/host/settings/every-setting"
    assert not [key for key, setting in KEYS.items() if as_python(OTHER[key]) == setting.default]


@pytest.mark.parametrize("key", KEYS)
def test_a_key_in_a_file_counts_and_its_origin_is_the_file(key: str, tmp_path: Path) -> None:
    loaded = read(as_file(key, as_toml(OTHER[key])), tmp_path, with_scope(key))
    assert (loaded.value(key), loaded.origins[key]) == (as_python(OTHER[key]), str(tmp_path / "given.toml"))


@pytest.mark.parametrize("key", KEYS)
def test_a_key_in_the_environment_counts_and_its_origin_is_the_variable(key: str) -> None:
    environ = {**with_scope(key), environment_name(key): as_toml(OTHER[key])}
    loaded = load(environ=environ, system_file=NO_FILE)
    assert (loaded.value(key), loaded.origins[key]) == (as_python(OTHER[key]), f"environment {environment_name(key)}")


@pytest.mark.parametrize("key", KEYS)
def test_a_key_as_a_flag_counts_and_its_origin_is_the_flag(key: str) -> None:
    loaded = load(overrides=[f"{key}={as_toml(OTHER[key])}"], environ=with_scope(key), system_file=NO_FILE)
    assert (loaded.value(key), loaded.origins[key]) == (as_python(OTHER[key]), f"--set {key}")


@pytest.mark.parametrize("key", [key for key, setting in KEYS.items() if isinstance(setting.default, str)])
def test_text_in_the_environment_needs_no_quotes(key: str) -> None:
    environ = {**with_scope(key), environment_name(key): OTHER[key]}
    assert load(environ=environ, system_file=NO_FILE).value(key) == OTHER[key]


def test_bare_digits_stay_text_where_text_is_expected() -> None:
    assert load(environ={**ENVIRON, "DPS_AGENT_REGISTRATION_ID": "0815"}, system_file=NO_FILE).registration_id == "0815"


def test_a_value_in_the_environment_cannot_smuggle_another_key() -> None:
    with pytest.raises(ConfigurationError, match=r"hub\.keep_alive_s: expected a whole number"):
        load(environ={**ENVIRON, "DPS_AGENT_HUB_KEEP_ALIVE_S": "443\npoll = 'operation'"}, system_file=NO_FILE)


def test_environment_names_are_the_documented_ones() -> None:
    assert environment_name("id_scope") == "DPS_AGENT_ID_SCOPE"
    assert environment_name("tpm.backend") == "DPS_AGENT_TPM_BACKEND"
    assert environment_name("hub.connect_to") == "DPS_AGENT_HUB_CONNECT_TO"


def test_the_last_source_wins(tmp_path: Path) -> None:
    system = tmp_path / "config.toml"
    system.write_text('id_scope = "file"\npoll = "operation"\n[retry]\nregistration_budget_s = 1\n')
    (tmp_path / "config.d").mkdir()
    (tmp_path / "config.d" / "20.toml").write_text("[retry]\nregistration_budget_s = 20\n[hub]\nkeep_alive_s = 32\n")
    (tmp_path / "config.d" / "10.toml").write_text("[retry]\nregistration_budget_s = 10\nfirst_contact_spread_s = 10\n")
    (tmp_path / "config.d" / "30.txt").write_text("no TOML")
    environ = {"STATE_DIRECTORY": "/run/state", "DPS_AGENT_HUB_KEEP_ALIVE_S": "33", "DPS_AGENT_CA_FILE": "/env"}
    loaded = load(overrides=["ca_file=/flag"], environ=environ, system_file=system)
    assert loaded.id_scope == "file"
    assert loaded.poll == "operation"
    assert loaded.retry.first_contact_spread_s == 10
    assert loaded.retry.registration_budget_s == 20
    assert loaded.hub.keep_alive_s == 33
    assert loaded.ca_file == "/flag"
    assert loaded.files == tuple(
        str(tmp_path / name) for name in ("config.toml", "config.d/10.toml", "config.d/20.toml")
    )


def test_a_packages_defaults_give_way_to_every_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packaged, system = tmp_path / "defaults.toml", tmp_path / "config.toml"
    packaged.write_text('[tpm]\nbackend = "wire"\n')
    monkeypatch.setattr(config, "PACKAGE_FILE", str(packaged))
    assert load(environ=ENVIRON, system_file=system).tpm.backend == "wire"
    system.write_text("[tpm]\npersist_at = 0\n")
    loaded = load(environ=ENVIRON, system_file=system)
    assert (loaded.tpm.backend, loaded.origins["tpm.backend"]) == ("wire", str(packaged))
    assert load(system, environ=ENVIRON, system_file=NO_FILE).tpm.backend == "wire"
    system.write_text('[tpm]\nbackend = "esys"\n')
    loaded = load(environ=ENVIRON, system_file=system)
    assert (loaded.tpm.backend, loaded.origins["tpm.backend"]) == ("esys", str(system))


def test_a_named_file_replaces_the_system_files_and_their_folder(tmp_path: Path) -> None:
    (tmp_path / "config.d").mkdir()
    (tmp_path / "config.d" / "10.toml").write_text("[hub]\nkeep_alive_s = 40\n")
    assert read("", tmp_path).hub.keep_alive_s == 240


def test_the_folder_counts_without_the_first_file(tmp_path: Path) -> None:
    (tmp_path / "config.d").mkdir()
    (tmp_path / "config.d" / "10.toml").write_text("[hub]\nkeep_alive_s = 40\n")
    assert load(environ=ENVIRON, system_file=tmp_path / "config.toml").hub.keep_alive_s == 40


@pytest.mark.parametrize(
    ("text", "nearest"),
    [
        ('id_skope = "x"', "id_scope"),
        ('[tpm]\nbackends = "esys"', "tpm.backend"),
        ('backend = "esys"', "tpm.backend"),
        ("[retries]\nx = 1", "retry"),
        ("[network]\ntransport = 443", "hub.transport"),
        ('registrationId = "x"', "registration_id"),
    ],
)
def test_an_unknown_key_names_the_nearest_known(text: str, nearest: str, tmp_path: Path) -> None:
    (problem,) = problems_of(text, tmp_path)
    assert "there is no such setting" in problem
    assert problem.endswith(f"the nearest is {nearest}")


def test_an_unknown_variable_names_the_nearest_known_and_not_its_value(tmp_path: Path) -> None:
    (problem,) = problems_of("", tmp_path, {**ENVIRON, "DPS_AGENT_TPM_BACKED": "hunter2"})
    assert "DPS_AGENT_TPM_BACKEND" in problem
    assert "hunter2" not in problem


def test_a_key_like_nothing_known_is_an_error_without_a_guess(tmp_path: Path) -> None:
    (problem,) = problems_of("zzzz = 1", tmp_path)
    assert "nearest" not in problem


BAD = [
    ("id_scope", '"has space"'),
    ("id_scope", "1"),
    ("registration_id", '"-x"'),
    ("registration_id", '"x."'),
    ("registration_id", '"a/b"'),
    ("registration_id", f'"{"a" * 129}"'),
    ("endpoint", '"http://plain.test"'),
    ("endpoint", '"https://x.test/path"'),
    ("endpoint", '"https://user@x.test"'),
    ("endpoint", '"https://x.test:port"'),
    ("endpoint", '"https://"'),
    ("connect_to", '"host"'),
    ("connect_to", '"host:0"'),
    ("connect_to", '"host:65536"'),
    ("connect_to", '"::1:443"'),
    ("state_dir", "7"),
    ("poll", '"mqtt"'),
    ("payload", '"text"'),
    ("payload", "{when = 2026-01-01}"),
    ("payload", "{x = nan}"),
    ("retry.registration_budget_s", "0"),
    ("retry.registration_budget_s", "1.5"),
    ("retry.registration_budget_s", "true"),
    ("retry.first_contact_spread_s", "-1"),
    ("tpm.backend", '"fapi"'),
    ("tpm.tcti", '""'),
    ("tpm.ek_template", '"l2"'),
    ("tpm.ek_handle", "0"),
    ("tpm.srk_handle", "0x81800000"),
    ("tpm.persist_at", "0x80000000"),
    ("tpm.i_know_keys_are_in_files", "1"),
    ("hub.transport", '"amqp"'),
    ("hub.keep_alive_s", "1178"),
    ("hub.token_life_s", "299"),
    ("hub.hub_suffixes", "[]"),
    ("hub.hub_suffixes", '["a b"]'),
    ("hub.hub_suffixes", '"x"'),
    ("hub.features", '"auto"'),
    ("hub.features", '["twin", "auto"]'),
    ("hub.features", '["twin", "twin"]'),
    ("hub.features", '["telemetry"]'),
    ("model_id", '"com:example;1"'),
    ("model_id", '"dtmi:com:example"'),
    ("model_id", '"dtmi:com:1example;1"'),
    ("model_id", '"dtmi:com:example_;1"'),
    ("model_id", '"dtmi:com:exämple;1"'),
    ("model_id", '"dtmi:com:example;0"'),
    ("network.proxy", '"socks5://x"'),
]


@pytest.mark.parametrize(("key", "text"), BAD)
def test_a_bad_value_names_key_origin_expectation_and_what_came(key: str, text: str, tmp_path: Path) -> None:
    (problem,) = problems_of(as_file(key, text), tmp_path)
    assert re.match(rf"{re.escape(key)}: expected .+; came .+ \({re.escape(str(tmp_path))}", problem), problem


def test_registration_ids_of_the_grammar_are_taken(tmp_path: Path) -> None:
    for text in (
        "press-",
        "a--",
        "a",
        "7",
        "A",
        "press-07",
        "Press:07.line_4-b",
        "a" * 128,
        "a" + ":._-" * 31 + "b",
        "0" * 128,
    ):
        assert read(f'registration_id = "{text}"', tmp_path).registration_id == text


def test_registration_ids_outside_the_grammar_are_refused(tmp_path: Path) -> None:
    for text in (
        "",
        "a" * 129,
        "-a",
        "-",
        "a:",
        "a.",
        ":",
        ".a",
        "a_",
        "a b",
        "a/b",
        "a\u00e9b",
        "\u0660",
        "a\nb",
        "\u212a",
    ):
        (problem,) = problems_of("", tmp_path, None, f"registration_id={as_toml(text)}")
        assert problem.startswith("registration_id: expected "), f"id={text!r}"


def test_all_problems_are_reported_together(tmp_path: Path) -> None:
    problems = problems_of(
        'pol = "x"\nendpoint = "ftp://x"\n[hub]\nkeep_alive_s = 0\n'
        '[tpm]\nbackend = "wire"\ntcti = "tabrmd"\nek_handle = 0x81000001\n',
        tmp_path,
        {"STATE_DIRECTORY": "/run/state", "DPS_AGENT_NETWORK_PROXY": "gopher"},
        "retry.registration_budget_s=many",
        "nonsense",
    )
    named = [problem.split(":")[0] for problem in problems]
    assert named == [
        "pol",
        "endpoint",
        "hub.keep_alive_s",
        "network.proxy",
        "retry.registration_budget_s",
        "--set",
        "tpm.tcti",
        "tpm.srk_handle",
        "id_scope",
    ]


@pytest.mark.parametrize(
    "tcti", ["device:/dev/tpm0", "device", "tabrmd:bus_type=session", "cmd:tpm2_send", "swtpm", "mssim"]
)
def test_a_tpm_that_others_may_use_is_never_taken_for_ours_alone(tcti: str) -> None:
    assert not is_ours_alone(tcti)


@pytest.mark.parametrize("tcti", ["libtpms:/tmp/state", "spi:/dev/spidev0.0", "spi-ltt2go", "i2c-helper"])
def test_a_tpm_without_a_driver_is_ours_alone(tcti: str) -> None:
    assert is_ours_alone(tcti)


@pytest.mark.parametrize(("key", "value"), [("hub.port", "8883"), ("hub.port", "443"), ("tpm.exclusive", "false")])
def test_who_has_a_setting_that_has_gone_is_told_what_to_do_instead(key: str, value: str, tmp_path: Path) -> None:
    for name, problems in (
        (key, problems_of(as_file(key, value), tmp_path)),
        (key, problems_of("", tmp_path, None, f"{key}={value}")),
        (environment_name(key), problems_of("", tmp_path, {**ENVIRON, environment_name(key): value})),
    ):
        (problem,) = problems
        assert problem.startswith(f"{name}: there is no such setting any more: "), problem
        assert "leave it out" in problem and "nearest" not in problem, problem


def test_a_missing_id_scope_has_its_own_code_and_is_no_problem_where_none_is_needed(tmp_path: Path) -> None:
    environ = {"STATE_DIRECTORY": "/run/state"}
    with pytest.raises(ConfigurationError) as caught:
        load(environ=environ, system_file=NO_FILE)
    assert caught.value.code == "config.missing"
    loaded = load(environ=environ, system_file=NO_FILE, need_id_scope=False)
    with pytest.raises(ConfigurationError, match="id_scope"):
        loaded.settings()


@pytest.mark.parametrize("content", [b"id_scope = ", b"\xff\xfe", b"a = " + b"[" * 100_000])
def test_a_file_that_is_no_toml_is_named(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "broken.toml"
    file.write_bytes(content)
    with pytest.raises(ConfigurationError, match=re.escape(str(file))) as caught:
        load(file, environ={"STATE_DIRECTORY": "/run/state"})
    assert caught.value.code == "config.unreadable"
    assert len(caught.value.problems) == 1


@pytest.mark.parametrize(
    ("content", "hint"),
    [
        ("id_scope = 0ne00000000", "a text needs quotes"),
        ("id_scope = scope", "a text needs quotes"),
        ("poll = lookup now", "a text needs quotes"),
        ('id_scope = "0ne00000000"\nid_scope = "0ne00000001"', "a key is set twice"),
        ("[tpm]\n[hub]\n[tpm]", "a table stands there twice"),
    ],
)
def test_what_is_mostly_behind_a_mistake_in_toml_is_said(content: str, hint: str, tmp_path: Path) -> None:
    file = tmp_path / "broken.toml"
    file.write_text(content)
    with pytest.raises(ConfigurationError, match=f"; {hint}"):
        load(file, environ=ENVIRON)


def test_a_named_file_that_is_absent_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="No such file"):
        load(tmp_path / "absent.toml", environ=ENVIRON)


@pytest.mark.parametrize("tcti", ["mssim:port=2321", "tabrmd", "swtpm:port=0", "swtpm:path=/run/swtpm", "device:"])
def test_the_wire_backend_wants_a_device_node_or_a_swtpm(tcti: str, tmp_path: Path) -> None:
    (problem,) = problems_of(f'[tpm]\nbackend = "wire"\ntcti = "{tcti}"', tmp_path)
    assert (
        problem.startswith("tpm.tcti: expected device:/dev/tpmrm0, swtpm:host=HOST,port=PORT or spi:")
        and tcti in problem
    )


@pytest.mark.parametrize("tcti", ["", 'tcti = "swtpm:port=2321"'])
def test_the_simulator_wants_a_folder(tcti: str, tmp_path: Path) -> None:
    (problem,) = problems_of(f'[tpm]\nbackend = "simulator"\n{tcti}', tmp_path)
    assert problem.startswith("tpm.tcti: ")
    assert "folder" in problem


@pytest.mark.parametrize("domain", ["net", "cn", "us"])
def test_the_simulator_is_refused_for_azure(domain: str, tmp_path: Path) -> None:
    text = 'endpoint = "https://{}"\n[tpm]\nbackend = "simulator"\ntcti = "/tmp/tpm"\n'
    azure = f"GLOBAL.azure-devices-provisioning.{domain}:443"
    with pytest.raises(AskOperator) as caught:
        config.check_keys_in_hardware(read(text.format(azure), tmp_path))
    assert caught.value.code == "tpm.simulator_refused"
    config.check_keys_in_hardware(read(text.format(azure) + "i_know_keys_are_in_files = true", tmp_path))
    config.check_keys_in_hardware(read(text.format("localhost"), tmp_path))


def test_the_state_folder_is_systemds_then_the_systems_then_the_users(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def state_dir(environ: dict[str, str]) -> str:
        return load(environ={"DPS_AGENT_ID_SCOPE": "x", **environ}, system_file=NO_FILE).state_dir

    user = {"XDG_STATE_HOME": "/home/u/state", "HOME": "/home/u"}
    monkeypatch.setattr(config, "SYSTEM_STATE_DIR", str(tmp_path / "dps-agent"))
    assert state_dir({"STATE_DIRECTORY": "/run/a:/run/b", **user}) == "/run/a"
    assert state_dir(user) == str(tmp_path / "dps-agent")
    (tmp_path / "link").symlink_to(tmp_path / "private" / "dps-agent")  # as systemd's, for who may not follow it
    monkeypatch.setattr(config, "SYSTEM_STATE_DIR", str(tmp_path / "link"))
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert state_dir(user) == str(tmp_path / "link")
    monkeypatch.setattr(config, "SYSTEM_STATE_DIR", str(tmp_path / "absent" / "dps-agent"))
    assert state_dir(user) == "/home/u/state/dps-agent"
    assert state_dir({"HOME": "/home/u"}) == "/home/u/.local/state/dps-agent"
    assert state_dir({"DPS_AGENT_STATE_DIR": "/mine", **user}) == "/mine"
    with pytest.raises(ConfigurationError, match="state_dir: expected a folder"):
        state_dir({})


def test_the_logic_gets_its_settings(tmp_path: Path) -> None:
    loaded = read('id_scope = "s"\nregistration_id = "r"\npayload = {a = 1}', tmp_path)
    suffixes = (".azure-devices.net", ".azure-devices.cn", ".azure-devices.us")
    endpoint = "https://global.azure-devices-provisioning.net"
    expected = ("0ne00000000", "r", endpoint, "lookup", {"a": 1}, 900, 0, suffixes, (0, 0, 0), 240, 0)
    assert loaded.settings() == Settings(*expected, loaded.settings().under, "", ("auto",), "tpm", "", "2021-10-01")
    model = 'model_id = "dtmi:com:example:Gateway;1"'
    assert read(model, tmp_path).settings().payload == {"modelId": "dtmi:com:example:Gateway;1"}
    assert read(f"{model}\npayload = {{a = 1}}", tmp_path).settings().payload == {
        "a": 1,
        "modelId": "dtmi:com:example:Gateway;1",
    }
    assert read("", tmp_path).settings().payload is None


def test_a_configuration_cannot_be_changed(tmp_path: Path) -> None:
    with pytest.raises(AttributeError, match="cannot be changed"):
        read("", tmp_path).poll = "operation"


def test_a_password_file_loses_one_line_end(tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.touch(0o600)
    file.write_bytes(b"hunter2\n\n")
    assert config.hierarchy_password("tpm.owner_auth_file", str(file)) == b"hunter2\n"
    assert config.hierarchy_password("tpm.owner_auth_file", "") == b""


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o610, 0o601])
def test_a_password_file_open_to_others_is_refused(mode: int, tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_bytes(b"hunter2")
    file.chmod(mode)
    with pytest.raises(ConfigurationError, match="chmod 600") as caught:
        config.hierarchy_password("tpm.owner_auth_file", str(file), {})
    assert "hunter2" not in str(caught.value) + repr(caught.value)


def test_a_credential_of_systemd_may_have_its_own_mode(tmp_path: Path) -> None:
    file = tmp_path / "credentials" / "owner"
    file.parent.mkdir()
    file.write_bytes(b"hunter2")
    file.chmod(0o440)
    environ = {"CREDENTIALS_DIRECTORY": str(file.parent)}
    assert config.hierarchy_password("tpm.owner_auth_file", str(file), environ) == b"hunter2"
    beside = tmp_path / "credentials-of-others"
    beside.write_bytes(b"hunter2")
    beside.chmod(0o440)
    with pytest.raises(ConfigurationError):
        config.hierarchy_password("tpm.owner_auth_file", str(beside), environ)


def test_a_credential_of_the_files_name_is_taken_in_its_place(tmp_path: Path) -> None:
    credentials, file = tmp_path / "credentials", tmp_path / "owner-auth"
    credentials.mkdir()
    file.touch(0o600)
    file.write_bytes(b"for root")
    environ = {"CREDENTIALS_DIRECTORY": str(credentials)}
    assert config.hierarchy_password("tpm.owner_auth_file", str(file), environ) == b"for root"
    (credentials / "owner-auth").write_bytes(b"for the service")
    (credentials / "owner-auth").chmod(0o440)
    assert config.hierarchy_password("tpm.owner_auth_file", str(file), environ) == b"for the service"
    file.unlink()  # the service cannot even look at it
    assert config.hierarchy_password("tpm.owner_auth_file", str(file), environ) == b"for the service"
    with pytest.raises(ConfigurationError, match="No such file"):
        config.hierarchy_password("tpm.owner_auth_file", str(file), {})


@pytest.mark.parametrize("content", [b"", b"\n", b"x" * 65])
def test_a_password_of_no_or_too_many_bytes_is_refused(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.touch(0o600)
    file.write_bytes(content)
    with pytest.raises(ConfigurationError, match="1 to 64 bytes"):
        config.hierarchy_password("tpm.owner_auth_file", str(file))


def test_a_password_file_that_is_absent_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(str(tmp_path / "absent"))):
        config.hierarchy_password("tpm.owner_auth_file", str(tmp_path / "absent"))


@pytest.mark.parametrize("url", ["ftp://me:hunter2@proxy:3128", "me:hunter2@proxy", "http:/me:hunter2@proxy"])
def test_a_problem_with_the_proxy_does_not_show_its_password(url: str, tmp_path: Path) -> None:
    (problem,) = problems_of("", tmp_path, {**ENVIRON, "DPS_AGENT_NETWORK_PROXY": url})
    assert "hunter2" not in problem


def test_the_template_with_its_lines_opened_has_every_default() -> None:
    opened = re.sub(r"(?m)^# (?=[a-z_]+ = )", "", TEMPLATE.read_text())
    assert {key: as_python(value) for key, value in flat(tomllib.loads(opened)).items()} == {
        key: setting.default for key, setting in KEYS.items()
    }
    variables = re.findall(r"(?m)^[a-z_]+ = .* # (\w+)$", opened)
    assert variables == [environment_name(key) for key in KEYS]


def test_the_template_as_it_is_changes_nothing() -> None:
    loaded = load(TEMPLATE, environ=ENVIRON)
    settled = ("id_scope", "state_dir", "runtime_dir")
    assert all(loaded.value(key) == KEYS[key].default for key in KEYS if key not in settled)
    assert os.path.isabs(loaded.state_dir)


def test_a_folder_of_the_system_that_cannot_be_looked_into_is_a_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(path: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("os.lstat", denied)
    with pytest.raises(ConfigurationError) as caught:
        load(environ={}, system_file=tmp_path / "config.toml")
    assert caught.value.code == "config.unreadable" and "Permission denied" in caught.value.message


def test_the_runtime_folder_is_systemds_and_the_socket_lies_in_it() -> None:
    loaded = load(environ={**ENVIRON, "RUNTIME_DIRECTORY": "/run/here:/run/there"}, system_file=NO_FILE)
    assert (loaded.runtime_dir, loaded.origins["runtime_dir"]) == ("/run/here", "$RUNTIME_DIRECTORY")
    assert loaded.socket == "/run/here/api.sock"


def test_a_user_without_systemd_has_the_runtime_folder_of_the_session_else_the_state_folder(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(config, "SYSTEM_RUNTIME_DIR", "/nonexistent/dps-agent")
    found = [
        load(environ={**ENVIRON, **more}, system_file=NO_FILE).runtime_dir
        for more in ({"XDG_RUNTIME_DIR": "/run/user/9"}, {}, {"DPS_AGENT_STATE_DIR": "/dev/mtd3"})
    ]
    assert found == ["/run/user/9/dps-agent", "/run/state", ""]


def test_the_socket_can_be_elsewhere_or_nowhere(tmp_path: Path) -> None:
    assert read('[api]\nsocket = "/run/x.sock"\n', tmp_path).socket == "/run/x.sock"
    assert read('[api]\nsocket = "none"\n', tmp_path).socket == ""
    long = "/run/" + "x" * 100
    assert read(f'runtime_dir = "{long}"\n', tmp_path).socket == ""
    assert problems_of(f'[api]\nsocket = "{long}"\n', tmp_path)[0].startswith("api.socket: expected a path")
    assert problems_of('[api]\nsocket = "x.sock"\n', tmp_path)[0].startswith("api.socket: expected a path")


# --- a proxy's password


def with_proxy(path: Path, text: str, mode: int = 0o600) -> Configuration:
    path.write_text(text)
    path.chmod(mode)
    return load(overrides=[f"network.proxy_file={path}"], environ=ENVIRON, system_file=NO_FILE)


URL = "http://user:hunter2@proxy:3128"


def test_a_proxy_s_url_comes_from_its_file_or_the_credential_of_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = with_proxy(tmp_path / "proxy", URL + "\r\n")
    assert config.proxy_of(loaded) == URL
    credentials = tmp_path / "credentials"
    credentials.mkdir()
    (credentials / "proxy").write_text("http://other@proxy:1")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(credentials))
    assert config.proxy_of(loaded) == "http://other@proxy:1"


@pytest.mark.parametrize("text", ["", "env", "https://me:hunter2@p", f"{URL}\n{URL}\n", f" {URL}", "http://[:hunter2@"])
def test_a_file_without_a_proxy_s_url_is_named_and_not_shown(text: str, tmp_path: Path) -> None:
    loaded = with_proxy(tmp_path / "proxy", text)
    with pytest.raises(ConfigurationError, match=r"network\.proxy_file: expected ") as caught:
        config.check_files(loaded)
    assert "hunter2" not in caught.value.message


def test_a_proxy_s_file_that_others_may_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="chmod 600"):
        config.check_files(with_proxy(tmp_path / "proxy", URL, 0o640))


def test_a_proxy_is_set_in_one_place(tmp_path: Path) -> None:
    (problem,) = problems_of('[network]\nproxy = "none"\nproxy_file = "/x"\n', tmp_path)
    assert "expected either this or network.proxy" in problem


def test_brackets_that_do_not_pair_are_no_proxy(tmp_path: Path) -> None:
    (problem,) = problems_of('[network]\nproxy = "http://[::1"\n', tmp_path)
    assert problem.startswith("network.proxy: expected")


def test_a_proxy_s_password_that_others_may_read_is_told_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = tmp_path / "environment"
    monkeypatch.setattr(config, "ENVIRONMENT_FILE", str(environment))
    monkeypatch.setattr(config, "UNIT_DROP_INS", (str(tmp_path / "units"),))
    loaded = read(f'[network]\nproxy = "{URL}"\n', tmp_path)
    file = tmp_path / "given.toml"
    monkeypatch.setattr(config, "_readers", lambda path: "every user" if os.stat(path).st_mode & 0o004 else "")
    for mode, expected in ((0o644, 1), (0o600, 0)):
        file.chmod(mode)
        assert len(config.readable_proxy_passwords(loaded)) == expected
    (tmp_path / "units").mkdir()
    unit = tmp_path / "units" / "proxy.conf"
    unit.write_text(f"[Service]\nEnvironment=https_proxy={URL}\n")
    (said,) = config.readable_proxy_passwords(loaded)
    assert "systemctl show" in said and "hunter2" not in said
    unit.write_text("[Service]\nEnvironment=https_proxy=http://proxy:3128\n")
    assert config.readable_proxy_passwords(loaded) == []
    environment.write_text(f'http_proxy="{URL}"\n')
    for mode, expected in ((0o644, 1), (0o600, 0)):
        environment.chmod(mode)
        said_of_it = config.readable_proxy_passwords(loaded)
        assert len(said_of_it) == expected and "hunter2" not in str(said_of_it)
    environment.chmod(0o644)
    environment.write_text(f"# https_proxy={URL}\nhttps_proxy=http://proxy:3128\nMAILTO=a@b\n")
    assert config.readable_proxy_passwords(loaded) == []


def test_who_may_read_a_file_depends_on_the_folders_above_it(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir(0o700)
    file = folder / "file"
    file.touch()
    file.chmod(0o644)
    assert config._readers(str(file)) == ""
    outside = Path("/etc/passwd")
    assert config._readers(str(outside)) == "every user"


def test_a_ca_file_that_may_not_be_read_is_told_from_one_that_does_not_exist(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = tmp_path / "ca.pem"
    there.write_text("")
    for path, why in ((there, "Permission denied"), (tmp_path / "none.pem", "does not exist")):
        flags = [f"ca_file={path}", f"state_dir={tmp_path}", f"runtime_dir={tmp_path}", "id_scope=0ne00000000"]
        loaded = load(overrides=flags, environ={}, system_file=NO_FILE)
        monkeypatch.setattr(os, "access", lambda *_: False)
        with pytest.raises(ConfigurationError, match=why):
            config.check_files(loaded)


def test_no_password_file_is_no_odd_password() -> None:
    assert config.hierarchy_password("tpm.owner_auth_file", "").odd == ""


# the plainest TOML


PIECES = [
    "id_scope",
    "a-b",
    "7",
    "",
    "[tpm]",
    "[a.b]",
    "[ c ]",
    "[d",
    '"x"',
    '"',
    "\\",
    '"""',
    "'y'",
    "true",
    "True",
    "0",
    "07",
]
PIECES += [
    "0x1F",
    "0x",
    "0X1",
    "1_0",
    "-1",
    "1.5",
    "1979-05-27",
    "[1]",
    "{}",
    "#",
    "# é [",
    "\r",
    "\x00",
    "\u2028",
    ".",
    "9" * 19,
]


@settings(max_examples=1000)
@given(st.lists(st.sampled_from([*PIECES, "=", "=", " = ", "\n", "\n", " ", "\t"]), max_size=14).map("".join))
def test_what_is_read_as_plain_toml_is_what_tomllib_reads(text: str) -> None:
    plain = read_plain(text)
    if plain is not None:
        assert plain == tomllib.loads(text)


def as_plain(value: str | int) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value).lower()


@given(
    st.dictionaries(
        st.from_regex(r"[A-Za-z0-9_-]{1,8}", fullmatch=True),
        st.booleans() | st.integers(0, 10**17) | st.text("abc é#[]='.\t", max_size=8),
        max_size=5,
    )
)
def test_text_numbers_and_truth_are_plain(values: dict[str, str | int]) -> None:
    lines = [f"{key} = {as_plain(value)}" for key, value in values.items()]
    for text in ("\n".join(lines), "[x]  \n" + "# a comment\n".join(f"\t{line} # why\n" for line in lines)):
        assert read_plain(text) == tomllib.loads(text)


@pytest.mark.parametrize("case", ["defaults", "simulator-without-a-folder"])
def test_the_settings_of_most_devices_are_plain(case: str) -> None:
    text = (CASES[0].parent / case / "config.toml").read_text()
    assert read_plain(text) == tomllib.loads(text)
