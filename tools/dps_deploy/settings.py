"""The settings of a board from TOML: the keys of the agent on Linux, where they make sense, and a table `board`."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any, NamedTuple

from dps_agent.host.config import ConfigurationError, hierarchy_password, read_toml
from dps_agent.host.settings_table import GONE, KEYS, NO_PIN, BoardSettings, Setting, rows_of
from dps_agent.settings import AUTO, SYMMETRIC_KEY
from dps_hal.device_key import key_in
from dps_text import Secret

BUILT_AT = "board.built_at_s"
ROOTS_END = "board.roots_end_s"
PASSWORD = "board.wifi_password"
PASSWORD_FILE = "board.wifi_password_file"
KEY = "device_key"
KEY_FILE = "device_key_file"
ROOTS_FILE = "roots.der"
HUB_ROOTS_FILE = "hub-roots.der"
PINS_OF_A_BUS = {
    "spi": ("board.sck_pin", "board.mosi_pin", "board.miso_pin", "board.select_pin"),
    "i2c": ("board.scl_pin", "board.sda_pin"),
}  # by `tpm.tcti`
RESET_PIN = "board.reset_pin"
FILES_HERE = ("ca_file", "hub.ca_file", PASSWORD_FILE, KEY_FILE)  # on this machine; the board gets their content
NOT_ON_A_BOARD = {key: setting.board for key, setting in KEYS.items() if isinstance(setting.board, str)}
ON_A_BOARD: dict[str, Setting] = {
    **{key: setting.board or setting for key, setting in KEYS.items() if not isinstance(setting.board, str)},
    **rows_of("board", BoardSettings),
}


def board_defaults() -> dict[str, Any]:
    """Every key of config.json with what a board takes where it is not there."""
    found = {key: setting.default for key, setting in ON_A_BOARD.items() if key not in (PASSWORD_FILE, KEY_FILE)}
    return {**found, BUILT_AT: 0, ROOTS_END: 0x7FFFFFFF, PASSWORD: "", KEY: ""}


class Deployed(NamedTuple):
    """What the TOML file says, checked; `config` is the content of config.json without password and key."""

    config: dict[str, Any]
    ca_file: str  # on this machine; "" for none
    hub_ca_file: str
    wifi_password_file: str
    device_key_file: str

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

    def device_key(self) -> str:
        """The device's own key in its file, base64; ConfigurationError where it cannot be read, or is none."""
        text = bytes(hierarchy_password(KEY_FILE, self.device_key_file)).strip().decode("latin-1")
        try:
            key_in(text)
        except ValueError as error:
            raise ConfigurationError("config.invalid", [f"{KEY_FILE}: {error} ({self.device_key_file})"]) from None
        return text

    def with_roots_until(self, end_s: int) -> Deployed:
        """The same, with the end of the last root, in seconds since 1970."""
        table, _, name = ROOTS_END.partition(".")
        return self._replace(config={**self.config, table: {**self.config[table], name: end_s}})

    def config_json(self, with_password: bool) -> bytes:
        """config.json, with password and key or without; ConfigurationError where one cannot be read from its file."""
        config = self.config
        if with_password and self.wifi_password_file:
            config = {**config, "board": {**config["board"], "wifi_password": self.wifi_password().decode()}}
        if with_password and self.device_key_file:
            config = {**config, KEY: self.device_key()}
        # As UTF-8: MicroPython makes two characters of a \\ud83d\\ude00, which no access point has in its name.
        return json.dumps(config, indent=1, ensure_ascii=False).encode()


def read(path: Path, built_at_s: int) -> Deployed:
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
    handles = [values.get(key, ON_A_BOARD[key].default) for key in ("tpm.ek_handle", "tpm.srk_handle")]
    if handles[0] == handles[1]:
        problems.append("tpm.srk_handle: expected another handle than tpm.ek_handle")
    if values.get("attestation") == SYMMETRIC_KEY:
        if values.get("registration_id", AUTO) == AUTO:
            problems.append(f'registration_id: expected the device\'s own, with attestation = "{SYMMETRIC_KEY}"')
        if not values.get(KEY_FILE):
            problems.append(f'{KEY_FILE}: expected a file with the device\'s key, with attestation = "{SYMMETRIC_KEY}"')
    elif values.get(KEY_FILE):
        problems.append(f'{KEY_FILE}: expected attestation = "{SYMMETRIC_KEY}" with it')
    problems += _problems_of_pins(values)
    if problems:
        raise ConfigurationError("config.invalid", problems)
    files = [values.pop(key, "") for key in FILES_HERE]
    values[BUILT_AT] = built_at_s
    values["ca_file"] = ROOTS_FILE
    if files[1]:
        values["hub.ca_file"] = HUB_ROOTS_FILE
    config: dict[str, Any] = {}
    for key, value in values.items():
        table, _, name = key.rpartition(".")
        (config.setdefault(table, {}) if table else config)[name] = value
    return Deployed(config, *files)


def _problems_of_pins(values: dict[str, Any]) -> list[str]:
    """Pins of a bus that is not the TPM's, and pins that are to be two things."""
    bus = str(values.get("tpm.tcti", ON_A_BOARD["tpm.tcti"].default))
    of_another = {key: other for other, keys in PINS_OF_A_BUS.items() if other != bus for key in keys}
    problems = [
        f'{key}: expected tpm.tcti = "{other}" with it; came "{bus}"'
        for key, other in of_another.items()
        if values.get(key, NO_PIN) != NO_PIN and ON_A_BOARD[key].default == NO_PIN  # others do no harm
    ]
    free = {*of_another}  # what is set there takes no pin
    if values.get("attestation") == SYMMETRIC_KEY:  # no TPM is looked for
        free |= {RESET_PIN, *PINS_OF_A_BUS.get(bus, ())}
    used: dict[Any, str] = {}
    for key, row in ON_A_BOARD.items():
        pin = values.get(key, row.default)
        if key.endswith("_pin") and isinstance(pin, int | str) and pin != NO_PIN and key not in free:
            if pin in used:
                problems.append(f"{key}: expected a pin of its own; {pin!r} is {used[pin]} already")
            used[pin] = key
    return problems


def _problem(key: str, value: Any, path: Path) -> str:
    """What is wrong with one setting, "" for nothing."""
    if key in GONE:
        return f"{key}: there is no such setting any more: {GONE[key]} ({path})"
    if key in NOT_ON_A_BOARD:
        return f"{key}: {NOT_ON_A_BOARD[key]}; leave it out ({path})"
    if key in (BUILT_AT, ROOTS_END):
        return f"{key}: this program sets it; leave it out ({path})"
    if key in (PASSWORD, KEY):
        file = PASSWORD_FILE if key == PASSWORD else KEY_FILE
        return f"{key}: expected {file}, the path of a file that only you may read ({path})"
    if key not in ON_A_BOARD:
        near = difflib.get_close_matches(key, ON_A_BOARD, 1)
        return f"{key}: there is no such setting ({path})" + (f"; the nearest is {near[0]}" if near else "")
    setting = ON_A_BOARD[key]
    return "" if setting.accepts(value) else f"{key}: expected {setting.expected}; came {repr(value)[:80]} ({path})"
