"""The settings of a board, from `config.json`, and the root certificates that they name."""

from dps_agent.settings import settings_of
from dps_board.memory import forget
from dps_hal.errors import AskOperator

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

CONFIG_FILE = "config.json"


class BoardConfiguration:
    """The settings as the parts of a board need them; `values` has all by their dotted keys.

    Its repr shows nothing: `board.wifi_password` is a secret.
    """

    def __init__(
        self, values: "dict[str, Any]", roots: "list[bytes]", hub_roots: "list[bytes]", roots_end_s: int
    ) -> None:
        self.values = values
        self.roots = roots  # certificates in DER
        self.hub_roots = hub_roots
        self.roots_end_s = roots_end_s  # when the last of `roots` ends
        self.connect_to: str = values["connect_to"]
        self.settings = settings_of(values)

    def __repr__(self) -> str:
        return f"BoardConfiguration({self.settings.id_scope!r})"


def load(path: str = CONFIG_FILE) -> BoardConfiguration:
    """Reads and checks `path` and the root certificates that it names.

    AskOperator `config.unreadable`, `config.missing` or `config.invalid`, with what was expected and what came.
    """
    from dps_board.keys import read_values

    values = read_values(_content(path), path)
    roots, roots_end_s = _roots("ca_file", values["ca_file"])
    hub_file = values["hub.ca_file"]
    hub_roots = _roots("hub.ca_file", hub_file)[0] if hub_file else roots
    forget("dps_board.keys", "dps_agent.der")
    return BoardConfiguration(values, roots, hub_roots, roots_end_s)


def _roots(key: str, path: str) -> "tuple[list[bytes], int]":
    """The certificates in the file that setting `key` names, and when the last of them ends."""
    from dps_agent.der import certificates, not_after_s

    content = _content(path)
    try:
        roots = certificates(content)
        ends_s = [not_after_s(root) for root in roots]
    except ValueError as error:
        raise AskOperator("config.invalid", f"{key}: expected certificates in DER in {path}: {error}")
    if not roots:
        raise AskOperator("config.invalid", f"{key}: expected certificates in DER; {path} is empty")
    return roots, max(ends_s)


def _content(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise AskOperator("config.unreadable", f"{path}: cannot be read: error {error.errno}")
