"""The keys of `config.json`: those of the TOML settings on Linux, and a table `board`.

Unknown keys, wrong types and values out of range are refused with the name of the key; nothing is guessed. Loaded
while the settings are read, not longer.
"""

from dps_agent.settings import (
    AUTO,
    KEEP_ALIVE_LIMIT_S,
    KEEP_ALIVE_S,
    POLL_LOOKUP,
    POLL_OPERATION,
    TOKEN_LIFE_S,
    check_registration_id,
)
from dps_hal.contracts import EK_HANDLE, SRK_HANDLE
from dps_hal.errors import AskOperator
from dps_hal.platform import from_json
from dps_hal.tpm.keys import EK_TEMPLATES

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_SCOPE = "the ID scope of your Device Provisioning Service"
_PATH = "a path"
_TEXT = "a text"
_ENDPOINT = '"https://name" or "https://name:port", nothing behind it'
_ADDRESS = '"host:port", or empty'
_SERVER = '"host" or "host:port", or empty'
_WATCHDOG = "0 for none, or a whole number from 8 to 600: a silent name server takes 7 s"
_ID = "a registration id"
_TABLE = "a table"
_SUFFIXES = "a list of domain suffixes"
_TCTI = 'one of "spi", "i2c", "swtpm:host=HOST,port=PORT"'
_KEYS = (  # key, default (None: it has none) and what is expected: in words, between two numbers, or one of many words
    ("id_scope", None, _SCOPE),
    ("registration_id", AUTO, _ID),
    ("endpoint", "https://global.azure-devices-provisioning.net", _ENDPOINT),
    ("connect_to", "", _ADDRESS),
    ("ca_file", "roots.der", _PATH),  # certificates in DER, one behind the other
    ("state_dir", "/dps-agent", _PATH),
    ("poll", POLL_LOOKUP, (POLL_LOOKUP, POLL_OPERATION)),
    ("payload", (), _TABLE),
    ("retry.registration_budget_s", 900, (1, 86400)),
    ("retry.first_contact_spread_s", 0, (0, 86400)),
    ("tpm.backend", "wire", ("wire",)),
    ("tpm.tcti", "spi", _TCTI),
    ("tpm.ek_template", EK_TEMPLATES[0], EK_TEMPLATES),
    ("tpm.ek_handle", EK_HANDLE, (0x81000000, 0x817FFFFF)),  # the owner's handles: TCG handle registry, table 3
    ("tpm.srk_handle", SRK_HANDLE, (0x81000000, 0x817FFFFF)),
    ("hub.port", 8883, (1, 65535)),
    ("hub.connect_to", "", _ADDRESS),
    ("hub.ca_file", "", _TEXT),
    ("hub.transport", "auto", ("auto", "mqtt")),
    ("hub.keep_alive_s", KEEP_ALIVE_S, (30, KEEP_ALIVE_LIMIT_S)),
    ("hub.token_life_s", TOKEN_LIFE_S, (300, 86400)),
    ("hub.hub_suffixes", (".azure-devices.net", ".azure-devices.cn", ".azure-devices.us"), _SUFFIXES),
    ("board.built_at_s", 0, (0, 0xFFFFFFFFFF)),  # when the deploy tool made this file
    ("board.ntp_server", "pool.ntp.org", _SERVER),  # empty: none
    ("board.wifi_ssid", "", _TEXT),  # empty: the network is there, or the application makes it
    ("board.wifi_password", "", _TEXT),
    ("board.led_pin", -1, (-1, 255)),  # -1: none
    ("board.bus", 0, (0, 7)),  # number of the SPI or I2C
    ("board.bus_hz", 0, (0, 43_000_000)),  # 0: as slow as every TPM can
    ("board.select_pin", 17, (0, 255)),  # of the TPM on SPI
    ("board.watchdog_s", 0, _WATCHDOG),
)


def _fits(value: "Any", expected: "Any") -> bool:
    if isinstance(expected, tuple):
        if isinstance(expected[0], int):
            return _is_between(value, expected[0], expected[1])
        return value in expected
    if expected == _WATCHDOG:
        return _is_between(value, 0, 0) or _is_between(value, 8, 600)
    if expected == _TABLE:
        return isinstance(value, dict)
    if expected == _SUFFIXES:
        return isinstance(value, list) and bool(value) and all(isinstance(each, str) and each for each in value)
    if not isinstance(value, str):
        return False
    if expected == _ID:
        check_registration_id(value)  # says better what is wrong
        return True
    if expected == _ENDPOINT:
        return value.startswith("https://") and _is_address(value[len("https://") :], False)
    if expected in (_ADDRESS, _SERVER):
        return not value or _is_address(value, expected == _ADDRESS)
    if expected == _TCTI:
        return value in ("spi", "i2c") or value.startswith("swtpm:")
    return bool(value) or expected == _TEXT


def _is_between(value: "Any", least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _is_address(text: str, need_port: bool) -> bool:
    host, colon, port = text.rpartition(":")
    if not colon or text[-1:] == "]":
        host, port = text, "" if need_port else "443"
    for character in port:
        if character not in "0123456789":
            return False
    for character in host:
        if character in "/@?" or not " " < character <= "~":
            return False
    return bool(host and port) and 0 < int(port[:6]) < 65536


def _in_words(expected: "Any") -> str:
    if isinstance(expected, str):
        return expected
    if isinstance(expected[0], int):
        return f"a whole number from {expected[0]} to {expected[1]}"
    return "one of " + ", ".join(expected)


def read_values(content: bytes, path: str) -> "dict[str, Any]":
    """All settings by dotted key, defaults filled in; `dps_board.config.load` has the errors."""
    if content[:3] == b"\xef\xbb\xbf":  # a byte order mark, as an editor on a desk may write it
        content = content[3:]
    try:
        document = from_json(content)
    except ValueError as error:
        raise AskOperator("config.unreadable", f"{path}: expected JSON: {error}")
    if not isinstance(document, dict):
        raise AskOperator("config.unreadable", f"{path}: expected a JSON object")
    values: dict[str, Any] = {}
    for name in document:
        if isinstance(document[name], dict) and name != "payload":
            for inner in document[name]:
                values[f"{name}.{inner}"] = document[name][inner]
        else:
            values[name] = document[name]
    settings: dict[str, Any] = {}
    for key, default, expected in _KEYS:
        if key not in values:
            if default is None:
                raise AskOperator("config.missing", f"{key}: expected it in {path}; it is not there")
            settings[key] = default
            continue
        settings[key] = value = values.pop(key)
        if not _fits(value, expected):
            came = "a value that is not shown" if "password" in key else repr(value)[:80]
            raise AskOperator("config.invalid", f"{key}: expected {_in_words(expected)}; came {came} ({path})")
    for key in sorted(values):
        raise AskOperator("config.invalid", f"{key}: there is no such setting on a board ({path})")
    return settings
