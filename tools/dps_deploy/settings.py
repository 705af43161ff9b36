"""The settings of a board from TOML: the keys of the agent on Linux, where they make sense, and a table `board`."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any, NamedTuple

from dps_agent.host.config import KEYS, ConfigurationError, hierarchy_password, read_toml
from dps_board.keys import read_values
from dps_hal.errors import AskOperator
from dps_text import Secret

BUILT_AT = "board.built_at_s"
PASSWORD = "board.wifi_password"
PASSWORD_FILE = "board.wifi_password_file"
ROOTS_FILE = "roots.der"
HUB_ROOTS_FILE = "hub-roots.der"
NOT_ON_A_BOARD = {
    "runtime_dir": "a board has no folder for what a restart may lose",
    "tpm.owner_auth_file": "the agent on a board needs a TPM whose owner password is empty",
    "tpm.endorsement_auth_file": "the agent on a board needs a TPM whose endorsement password is empty",
    "tpm.persist_at": "on a board no other program could use the key, so it stays in the record",
    "tpm.exclusive": "the TPM of a board always belongs to the agent alone",
    "tpm.i_know_keys_are_in_files": "there is no simulator on a board",
    "network.proxy": "a board dials the service itself",
    "network.proxy_file": "a board dials the service itself",
    "api.socket": "a program on a board uses dps_board.runner.Agent",
    "api.allow_token": "a program on a board uses dps_board.runner.Agent",
}
_BOARD_KEYS = set(read_values(b'{"id_scope":"x"}', ""))


class BoardSettings(NamedTuple):
    """What the TOML file says, checked; `config` is the content of config.json without a password."""

    config: dict[str, Any]
    ca_file: str  # on this machine; "" for none
    hub_ca_file: str
    wifi_password_file: str

    def wifi_password(self) -> Secret:
        """The password in its file; ConfigurationError where it cannot be read, or is no text in UTF-8."""
        password = hierarchy_password(PASSWORD_FILE, self.wifi_password_file)
        try:
            password.decode()
        except UnicodeDecodeError:
            came = password.odd.removeprefix("it is in ") or "other bytes"
            problem = f"{PASSWORD_FILE}: expected UTF-8 in {self.wifi_password_file}; came {came}"
            raise ConfigurationError("config.invalid", [problem]) from None
        return password

    def config_json(self, with_password: bool) -> bytes:
        """config.json; ConfigurationError where the password cannot be read from its file."""
        config = self.config
        if with_password and self.wifi_password_file:
            config = {**config, "board": {**config["board"], "wifi_password": self.wifi_password().decode()}}
        # As UTF-8: MicroPython makes two characters of a \\ud83d\\ude00, which no access point has in its name.
        return json.dumps(config, indent=1, ensure_ascii=False).encode()


def read(path: Path, built_at_s: int) -> BoardSettings:
    """Reads and checks the settings in `path`; ConfigurationError with every problem found."""
    content = read_toml(path)
    values: dict[str, Any] = {}
    for name, value in content.items():
        if isinstance(value, dict) and name != "payload":
            values |= {f"{name}.{inner}": inner_value for inner, inner_value in value.items()}
        else:
            values[name] = value
    problems = [problem for key, value in values.items() if (problem := _problem(key, value, path))]
    if "id_scope" not in values:
        problems.insert(0, f"id_scope: expected the ID scope of your Device Provisioning Service; {path} has none")
    handles = [values.get(key, KEYS[key].default) for key in ("tpm.ek_handle", "tpm.srk_handle")]
    if handles[0] == handles[1]:
        problems.append("tpm.srk_handle: expected another handle than tpm.ek_handle")
    if problems:
        raise ConfigurationError("config.invalid", problems)
    files = [values.pop(key, "") for key in ("ca_file", "hub.ca_file", PASSWORD_FILE)]
    values[BUILT_AT] = built_at_s
    values["ca_file"] = ROOTS_FILE
    if files[1]:
        values["hub.ca_file"] = HUB_ROOTS_FILE
    config: dict[str, Any] = {}
    for key, value in values.items():
        table, _, name = key.rpartition(".")
        (config.setdefault(table, {}) if table else config)[name] = value
    return BoardSettings(config, *files)


def _problem(key: str, value: Any, path: Path) -> str:
    """What is wrong with one setting, "" for nothing."""
    if key in NOT_ON_A_BOARD:
        return f"{key}: {NOT_ON_A_BOARD[key]}; leave it out ({path})"
    if key == BUILT_AT:
        return f"{key}: this program sets it; leave it out ({path})"
    if key == PASSWORD:
        return f"{key}: expected {PASSWORD_FILE}, the path of a file that only you may read ({path})"
    if key == PASSWORD_FILE:
        return "" if isinstance(value, str) and value else f"{key}: expected the path of a file ({path})"
    if key == "tpm.tcti" and value not in ("spi", "i2c"):
        return f'{key}: expected "spi" or "i2c", where a board has its TPM; came {value!r} ({path})'
    if key not in KEYS and key not in _BOARD_KEYS:
        near = difflib.get_close_matches(key, sorted(_BOARD_KEYS - {PASSWORD, BUILT_AT} | {PASSWORD_FILE}), 1)
        return f"{key}: there is no such setting ({path})" + (f"; the nearest is {near[0]}" if near else "")
    # A board has other words for where its TPM is and what serves it.
    if key in KEYS and not key.startswith("tpm.") and not KEYS[key].accepts(value):
        return f"{key}: expected {KEYS[key].expected}; came {repr(value)[:80]} ({path})"
    if key in ("ca_file", "hub.ca_file"):
        return ""  # a file on this machine; the board gets its content
    table, _, name = key.rpartition(".")
    document = {"id_scope": "x", **({table: {name: value}} if table else {name: value})}
    try:
        read_values(json.dumps(document).encode(), str(path))
    except AskOperator as error:
        return error.message
    except TypeError:  # what TOML has and JSON has not: a date, in a list or alone
        return f"{key}: expected a value without dates; came {repr(value)[:80]} ({path})"
    return ""
