"""The keys of `config.json`: those of the TOML settings on Linux, and a table `board`.

`tools/deploy` has checked every value. What somebody wrote here by hand is refused where its name or its type is none;
nothing is guessed. Loaded with `dps_board.config`, and as long as that.
"""

from dps_hal.errors import AskOperator
from dps_hal.platform import from_json

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

# Written by tools/generate from the table of settings, dps_agent/host/settings_table.py.
_DEFAULTS: "tuple[tuple[str, Any], ...]" = (
    ("id_scope", ""),
    ("registration_id", "auto"),
    ("attestation", "tpm"),
    ("endpoint", "https://global.azure-devices-provisioning.net"),
    ("connect_to", ""),
    ("ca_file", "roots.der"),
    ("state_dir", "/dps-agent"),
    ("poll", "lookup"),
    ("payload", {}),
    ("model_id", ""),
    ("retry.registration_budget_s", 900),
    ("retry.first_contact_spread_s", 0),
    ("tpm.backend", "wire"),
    ("tpm.tcti", "spi"),
    ("tpm.ek_template", "tcg-l1"),
    ("tpm.ek_handle", 0x81010001),
    ("tpm.srk_handle", 0x81000001),
    ("hub.connect_to", ""),
    ("hub.ca_file", ""),
    ("hub.transport", "auto"),
    ("hub.keep_alive_s", 240),
    ("hub.token_life_s", 0),
    ("hub.hub_suffixes", [".azure-devices.net", ".azure-devices.cn", ".azure-devices.us"]),
    ("hub.features", ["auto"]),
    ("fleet.devices", 0),
    ("fleet.dps_quota_per_min", 0),
    ("fleet.hub_connects_per_s", 0),
    ("board.bus", 0),
    ("board.bus_hz", 0),
    ("board.sck_pin", -1),
    ("board.mosi_pin", -1),
    ("board.miso_pin", -1),
    ("board.select_pin", 17),
    ("board.scl_pin", -1),
    ("board.sda_pin", -1),
    ("board.reset_pin", -1),
    ("board.wifi_ssid", ""),
    ("board.ntp_server", "pool.ntp.org"),
    ("board.led_pin", -1),
    ("board.watchdog_s", 0),
    ("board.built_at_s", 0),
    ("board.roots_end_s", 2147483647),
    ("board.wifi_password", ""),
    ("device_key", ""),
)
_KINDS = {str: "a text", int: "a whole number", bool: "true or false", dict: "a table", list: "a list"}


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
    settings: dict[str, Any] = dict(_DEFAULTS)
    for name in document:
        inner = document[name]
        table = isinstance(inner, dict) and name != "payload"
        for last in inner if table else ("",):
            key, value = (f"{name}.{last}", inner[last]) if table else (name, inner)
            if key not in settings:
                raise AskOperator("config.invalid", f"{key}: there is no such setting on a board ({path})")
            if type(value) is not type(settings[key]) and not (type(value) is str and last.endswith("_pin")):
                came = "a value that is not shown" if "password" in key or "key" in key else repr(value)[:80]
                expected = _KINDS[type(settings[key])]
                raise AskOperator("config.invalid", f"{key}: expected {expected}; came {came} ({path})")
            settings[key] = value
    if not all(isinstance(suffix, str) and suffix for suffix in settings["hub.hub_suffixes"]):
        raise AskOperator("config.invalid", f"hub.hub_suffixes: expected texts that are not empty ({path})")
    if settings["attestation"] not in ("tpm", "symmetric-key"):
        raise AskOperator(
            "config.invalid", 'attestation: expected "tpm" or "symmetric-key": a board shows no certificate'
        )
    if settings["attestation"] != "tpm" and not (settings["device_key"] and settings["registration_id"] != "auto"):
        raise AskOperator("config.missing", f"device_key, registration_id: expected both in {path}; one is not there")
    if not settings["id_scope"]:
        raise AskOperator("config.missing", f"id_scope: expected it in {path}; it is not there")
    return settings
