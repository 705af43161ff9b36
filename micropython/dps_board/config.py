"""The settings of a board, from `config.json`, and the root certificates that they name.

Loaded while a board starts, and for as long as somebody has a BoardConfiguration.
"""

from dps_agent.values import settings_of
from dps_board.keys import read_values
from dps_board.tls import Trust
from dps_hal.errors import AskOperator

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

CONFIG_FILE = "config.json"
_CERTIFICATE = b"\x30\x82"  # a SEQUENCE whose length, from 256 on, is in two bytes: X.690, 8.1.3.5


class BoardConfiguration:
    """The settings as the parts of a board need them; `values` has all by their dotted keys.

    Its repr shows nothing: `board.wifi_password` is a secret.
    """

    def __init__(self, values: "dict[str, Any]", trust: Trust, hub_trust: Trust) -> None:
        self.values = values
        self.trust = trust
        self.hub_trust = hub_trust  # the same where the settings name no other roots for the hub
        self.roots_end_s: int = values["board.roots_end_s"]  # when the last of the roots of DPS ends
        self.connect_to: str = values["connect_to"]
        self.settings = settings_of(values)

    def __repr__(self) -> str:
        return f"BoardConfiguration({self.settings.id_scope!r})"


def load(path: str = CONFIG_FILE) -> BoardConfiguration:
    """Reads and checks `path` and the root certificates that it names.

    AskOperator `config.unreadable`, `config.missing` or `config.invalid`, with what was expected and what came.
    """
    values = read_values(_content(path), path)
    trust = _trust("ca_file", values["ca_file"])
    hub_file = values["hub.ca_file"]
    hub_trust = _trust("hub.ca_file", hub_file) if hub_file else trust
    return BoardConfiguration(values, trust, hub_trust)


def _trust(key: str, path: str) -> Trust:
    """Trust in the roots of a file, made for TLS before the heap fills up."""
    trust = Trust(roots_in(key, path))
    try:
        trust.context()
    except (OSError, ValueError) as error:
        raise AskOperator("config.invalid", f"{key}: expected certificates that this board's TLS can read; {error}")
    return trust


def roots_in(key: str, path: str) -> "list[bytes]":
    """The certificates in the file that setting `key` names, one behind the other; `tools/deploy` has read them."""
    content = _content(path)
    roots = []
    at = 0
    while content[at : at + 2] == _CERTIFICATE:
        end = at + 4 + int.from_bytes(content[at + 2 : at + 4], "big")
        roots.append(content[at:end])
        at = end
    if not roots or at != len(content):
        raise AskOperator("config.invalid", f"{key}: expected certificates in DER in {path}, as tools/deploy writes it")
    return roots


def _content(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise AskOperator("config.unreadable", f"{path}: cannot be read: error {error.errno}")
