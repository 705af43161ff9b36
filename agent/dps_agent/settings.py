"""What an operator decides, as the logic sees it; and the grammar of a registration id."""

from dps_hal.errors import AskOperator

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NamedTuple

    class Settings(NamedTuple):
        """The settings of one device's life; the host reads them from TOML, a board from JSON."""

        id_scope: str
        registration_id: str  # AUTO: derived from the EK
        endpoint: str  # "https://name[:port]", kept in the record
        poll: str  # POLL_LOOKUP or POLL_OPERATION
        payload: "dict[str, Any] | None"  # custom allocation input
        registration_budget_s: int
        first_contact_spread_s: int  # the first contact is spread at random over so many seconds; 5 at least
        hub_suffixes: "tuple[str, ...]"
        keep_alive_s: int  # of the connection to the hub
        token_life_s: int  # of a token for the hub; renewed at 80 % of it
else:
    from collections import namedtuple

    Settings = namedtuple(
        "Settings",
        (
            "id_scope",
            "registration_id",
            "endpoint",
            "poll",
            "payload",
            "registration_budget_s",
            "first_contact_spread_s",
            "hub_suffixes",
            "keep_alive_s",
            "token_life_s",
        ),
    )

AUTO = "auto"
KEEP_ALIVE_S = 240  # balancers in front of hubs drop what is silent for four minutes
KEEP_ALIVE_LIMIT_S = 1177  # a hub drops after 1.5 times that, and after 1767 s at the latest; IoT Hub MQTT guide
TOKEN_LIFE_S = 3600
POLL_LOOKUP = "lookup"
POLL_OPERATION = "operation"
REGISTRATION_ID_LIMIT = 128  # characters; Runtime Registration API, 2021-10-01
_ALPHANUMERIC = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
_SPECIAL = ":._-"


def check_registration_id(text: str) -> None:
    """AskOperator `config.invalid` unless `text` is a registration id: Runtime Registration API, 2021-10-01.

    Case-insensitive, 1 to 128 letters, digits and `: . _ -`, the first a letter or digit, the last one of these or a
    dash: the API's text has no dash at the end, the service's own documents allow it.
    """
    fault = ""
    if not text:
        fault = "is empty"
    elif len(text) > REGISTRATION_ID_LIMIT:
        fault = f"has {len(text)} characters"
    else:
        for place, character in enumerate(text):
            if character in _ALPHANUMERIC:
                continue
            if character not in _SPECIAL:
                fault = f"has {character!r} at position {place + 1}"
                break
            if place == 0 or (place == len(text) - 1 and character != "-"):
                fault = f"has {character!r} at its " + ("start" if place == 0 else "end")
                break
    if fault:
        raise AskOperator(
            "config.invalid",
            f"registration_id: expected 1 to {REGISTRATION_ID_LIMIT} ASCII letters, digits and ': . _ -', beginning"
            f" with a letter or digit and ending with one or a dash; {text[:140]!r} {fault}",
        )
