"""Every setting: one row each, with its type, what may be its value, its default, and what it means.

A new setting is a row here, the place where the code uses it, and a value in `tests/host/settings`; `tools/generate`
writes the rest. From the rows come the checks of file, environment and flag (`config.load`), `config show`, the
template `agent/service/config.toml`, the tables in the documents, the manual page, the checks of `tools/deploy`, and
the defaults that a board has (`dps_board/keys.py`). What the logic itself has to know is also a field of
`dps_agent.settings`.
"""

from __future__ import annotations

import os

from dps_agent.fleet import LIMITS, TOKEN_LIFE_S, WEEK_S
from dps_agent.settings import (
    API_VERSION,
    ATTESTATIONS,
    AUTO,
    ISSUED,
    ISSUING_API_VERSION,
    KEEP_ALIVE_LIMIT_S,
    KEEP_ALIVE_S,
    POLL_LOOKUP,
    POLL_OPERATION,
    SYMMETRIC_KEY,
    TPM,
)
from dps_hal.contracts import EK_HANDLE, EK_TEMPLATES, SRK_HANDLE
from dps_text.addresses import host_and_port, plain_address

SOCKET_PATH_LIMIT = 100  # bytes; sun_path of unix(7) has 108, and the socket is made under a longer name first
REGISTRATION_ID_LIMIT = 128  # characters; Runtime Registration API, 2021-10-01
MODEL_ID_LIMIT = 128  # characters; Digital Twins Definition Language, interfaces
_MODEL_ID = r"dtmi:[A-Za-z](\w*[A-Za-z0-9])?(:[A-Za-z](\w*[A-Za-z0-9])?)*;[1-9][0-9]{0,8}"  # the same, identifiers
FEATURES = ("methods", "twin", "messages")
AUTH_LIMIT = 64  # bytes; an authValue is at most as long as the hierarchy's digest, TPM 2.0 Library Part 1, 13.5
PROXY_LIMIT = 2048  # bytes of a proxy's URL
TPM_KEY = b"-----BEGIN TSS2 PRIVATE KEY-----"  # with which the file of a key for TLS begins that a TPM has made
REQUEST = b"-----BEGIN CERTIFICATE REQUEST-----"  # with which that for a certificate that DPS issues begins, behind it
IN_TPM = "tpm"
IN_FILE = "file"
KEY_FILE_LIMIT = 1024  # bytes; a key of 64 bytes has 88 in base64, and some 700 where a TPM has sealed it
OWNER_HANDLES = (0x81000000, 0x817FFFFF)  # persistent handles the owner may use, TCG handle registry, table 3
NO_PIN = -1  # what stands for none where a board's setting names a pin

# What a setting that has gone is told in; its name is known, so that whoever has it learns what to do instead.
GONE = {
    "hub.port": 'every hub has MQTT at 8883; leave it out, and to dial another port set hub.connect_to = "host:port"',
    "tpm.exclusive": "tpm.tcti says it: a TPM on a bus without a driver is the agent's alone; leave it out, and start a"
    " simulator anew to rid it of what crashes left in it",
}


TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, NamedTuple

    class Setting(NamedTuple):
        """One row. `expected` says in words what `accepts` tests."""

        default: Any
        expected: str
        accepts: Callable[[Any], bool]
        help: str = ""  # in plain sentences; documents, template and manual page have them
        board: Setting | str | None = None  # a board's own row, or why a board has none; None: a board has the same
        in_hex: bool = False  # how people write it
        secret_limit: int = 0  # bytes of the secret in the file that it names; 0: it names none
        shown: Callable[[Any], Any] = lambda value: value  # what of a value may be seen
else:
    from dps_hal.named import namedtuple

    Setting = namedtuple(
        "Setting",
        ("default", "expected", "accepts", "help", "board", "in_hex", "secret_limit", "shown"),
        defaults=("", None, False, 0, lambda value: value),
    )


class Section:
    """One table of settings, whose values cannot be changed; a class attribute that is a `Setting` is a row.

    No dataclass: what that module imports would be a thirtieth of the service's memory.
    """

    def __init__(self, **values: Any) -> None:
        vars(self).update(values)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"{name}: settings cannot be changed")

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and vars(other) == vars(self)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        shown = [f"{name}={value!r}" for name, value in vars(self).items() if name != "origins"]
        return f"{type(self).__name__}({', '.join(shown)})"


# --- kinds of settings: each gives a row; `more` are the fields of `Setting` behind `accepts`


def form(default: Any, expected: str, accepts: Callable[[Any], bool], **more: Any) -> Any:
    """What is of no kind but its own."""
    return Setting(default, expected, accepts, **more)


def text(default: str, expected: str, accepts: Callable[[str], bool] = lambda _: True, **more: Any) -> Any:
    """A printable text of a form of its own."""
    return Setting(
        default, expected, lambda value: isinstance(value, str) and value.isprintable() and accepts(value), **more
    )


def path(default: str = "", **more: Any) -> Any:
    """The path of a file, or empty."""
    return text(default, "the path of a file, or empty", **more)


def address(**more: Any) -> Any:
    """Where to dial, or empty."""
    return text("", '"host:port", or empty', lambda value: not value or is_address(value), **more)


def word(*words: str, **more: Any) -> Any:
    """One of several words; the first is the default."""
    expected = "one of " + ", ".join(f'"{each}"' for each in words)
    return Setting(words[0], expected, lambda value: value in words, **more)


def whole(default: int, lowest: int, highest: int, unit: str = "", **more: Any) -> Any:
    """A whole number; `unit` is "of seconds", or what else stands behind "a whole number"."""
    expected = " ".join(filter(None, ("a whole number", unit, f"from {lowest} to {highest}")))
    return Setting(default, expected, lambda value: type(value) is int and lowest <= value <= highest, **more)


def seconds(default: int, lowest: int, highest: int, **more: Any) -> Any:
    """A whole number of seconds."""
    return whole(default, lowest, highest, "of seconds", **more)


def pin(default: int = NO_PIN, **more: Any) -> Any:
    """A pin of a microcontroller; where the default is NO_PIN, also that."""
    expected = 'a pin: its number from 0 to 255, or its name such as "A4"'

    def accepts(value: Any) -> bool:
        if isinstance(value, str):
            return len(value) <= 32 and value.isascii() and value.isprintable() and bool(value.strip())
        return type(value) is int and (0 <= value <= 255 or value == default)

    return Setting(default, expected if default != NO_PIN else f"{expected}; or {NO_PIN} for none", accepts, **more)


def switch(**more: Any) -> Any:
    """What is off by default."""
    return Setting(False, "true or false", lambda value: type(value) is bool, **more)


def handle(default: int, **more: Any) -> Any:
    """A persistent handle of the owner's; where the default is 0, also that."""
    lowest, highest = OWNER_HANDLES
    expected = f"a persistent handle from {lowest:#x} to {highest:#x}" + ("" if default else ", or 0 for none")

    def accepts(value: Any) -> bool:
        return type(value) is int and (lowest <= value <= highest or (value == 0 and not default))

    return Setting(default, expected, accepts, in_hex=True, **more)


def _is_id_scope(value: str) -> bool:
    return 0 < len(value) <= 64 and value.isascii() and value.replace("-", "").replace("_", "").isalnum()


def _is_api_version(value: Any) -> bool:
    import re

    return isinstance(value, str) and re.fullmatch(r"auto|20\d\d-\d\d-\d\d(-preview)?", value, re.ASCII) is not None


def is_registration_id(value: str) -> bool:
    """Whether a text has the form of a registration id, "auto" among them.

    As that API has it, but for a dash at the end, which the service's own documents allow.
    """
    plain = value.isascii() and all(character.isalnum() or character in ":._-" for character in value)
    return plain and len(value) <= REGISTRATION_ID_LIMIT and value[:1].isalnum() and value[-1] not in ":._"


def _is_model_id(value: str) -> bool:
    import re

    return len(value) <= MODEL_ID_LIMIT and re.fullmatch(_MODEL_ID, value, re.ASCII) is not None


def _is_feature_list(value: Any) -> bool:
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        return False
    return value == [AUTO] or (set(value) <= set(FEATURES) and len(set(value)) == len(value))


def _is_endpoint(value: str) -> bool:
    plain = value.isascii() and value.isprintable() and not set("@/?# ") & set(value.removeprefix("https://"))
    return plain and value[-1:] != ":" and _is_url(value, "https://")


def _is_url(value: str, scheme: str) -> bool:
    if not value.startswith(scheme):
        return False
    if plain_address(value.removeprefix(scheme)):
        return True
    from urllib.parse import urlsplit

    try:
        return bool(urlsplit(value).hostname) and urlsplit(value).port != 0
    except ValueError:  # brackets that do not pair, a port that is none
        return False


def is_address(value: str) -> bool:
    """Whether a text is "host:port"."""
    try:
        return host_and_port(value)[1] is not None
    except ValueError:
        return False


def is_proxy_url(value: str) -> bool:
    """Whether a text is the URL of a proxy."""
    return _is_url(value, "http://")


def _is_socket(value: str) -> bool:
    return value in ("", "none") or (value.startswith("/") and len(os.fsencode(value)) <= SOCKET_PATH_LIMIT)


def _is_suffix_list(value: Any) -> bool:
    def is_suffix(each: Any) -> bool:
        letters = each.removeprefix(".").replace("-", "").replace(".", "") if isinstance(each, str) else ""
        return letters.isascii() and letters.isalnum() and ".." not in each

    return isinstance(value, list) and 0 < len(value) <= 32 and all(is_suffix(each) for each in value)


def _is_json_table(value: Any) -> bool:
    from dps_hal.platform import to_json

    try:
        return isinstance(value, dict) and len(to_json(value)) > 0
    except (ValueError, TypeError, OverflowError, RecursionError):  # dates, NaN, endless nesting
        return False


def without_password(value: Any) -> Any:
    """A proxy's URL with its user and password replaced by ***."""
    if not isinstance(value, str) or "@" not in value:
        return value
    scheme, _, rest = value.partition("://")
    return f"{scheme}://***@{rest.rpartition('@')[2]}" if rest else "***@" + value.rpartition("@")[2]


# --- the rows, in the order in which they are shown

_DIALS_ITSELF = "a board dials the service itself"
_NO_SOCKET = "a program on a board uses dps_board.runner.Agent"


class TopSettings(Section):
    """In front of the tables: which service, and where this device keeps what it has."""

    id_scope: str = text(
        "", "an ID scope such as 0ne00000000 (letters, digits, - and _)", _is_id_scope,
        help='The ID scope of your Device Provisioning Service, e.g. "0ne00000000". There is no default.',
    )  # fmt: skip
    registration_id: str = text(
        AUTO,
        f'"auto", or 1 to {REGISTRATION_ID_LIMIT} ASCII letters, digits and : . _ -; first a letter or digit, last one'
        " or a dash",
        is_registration_id,
        help="\"auto\" derives the id from the TPM's endorsement key, as Microsoft's tools print it;"
        " 'dps-agent enroll' shows it.",
    )
    attestation: str = word(
        *ATTESTATIONS,
        help='How the device shows who it is: "tpm"; for devices without a TPM by the key in device_key_file,'
        ' "symmetric-key", or by the certificate in certificate_file, "x509". Another value is another identity: the'
        " device registers again.",
        board=word(
            TPM, SYMMETRIC_KEY,
            help='How the board shows who it is: "tpm", or by the key in device_key_file, "symmetric-key". A board'
            " shows no certificate.",
        ),
    )  # fmt: skip
    device_key_file: str = path(
        help='A file with the device\'s own key for attestation = "symmetric-key", in base64 as DPS shows it, readable'
        " by the agent alone (0600); a credential of its name comes first. For an enrolment group it is the key derived"
        " for this device ('dps-agent enroll --derive'), never the group's. 'dps-agent import-key' has a TPM seal it."
        ' For attestation = "x509" it is what \'dps-agent enroll --x509\' puts there: what this TPM alone can use of a'
        " key that it made, or a private key in PEM.",
        secret_limit=KEY_FILE_LIMIT,
        board=text(
            "", "the path of a file, or empty",
            help='A file on your machine with the device\'s own key for attestation = "symmetric-key", in base64, mode'
            " 0600; its content goes to the board by --port only, and lies in its flash for whoever can read that.",
        ),
    )  # fmt: skip
    certificate_file: str = path(
        help='A file for the device\'s certificate and those of the CAs above it, PEM, with attestation = "x509";'
        " 'dps-agent install-certificate' checks them and puts them there. Its CN is the registration id.",
        board="a board shows no certificate: it registers by its TPM or by a symmetric key",
    )
    certificate: str = form(
        "", f'"{ISSUED}", or empty', lambda value: value in ("", ISSUED),
        help=f'"{ISSUED}": with each registration DPS issues the certificate by which this device connects to its hub,'
        " beside whatever attestation names. A preview of Azure, which was tried against no real service. Another value"
        " is another identity: the device registers again.",
        board="a board shows no certificate: it registers by its TPM or by a symmetric key",
    )  # fmt: skip
    issued_key_file: str = path(
        help=f'With certificate = "{ISSUED}" the file of that certificate\'s key, which the agent makes where there is'
        ' none, 0600. Empty: "issued-key.pem" in state_dir.',
        board="a board shows no certificate: it registers by its TPM or by a symmetric key",
    )
    issued_key: str = word(
        AUTO, IN_TPM, IN_FILE,
        help=f'With certificate = "{ISSUED}" where that certificate\'s key is made: in the TPM, "{IN_TPM}", or in the'
        f' clear in its file, "{IN_FILE}". "{AUTO}": in the TPM where that has what shows DPS who the device is, in the'
        " file else, as with a simulated one. None of the two is taken for want of the other, and a key that is there"
        " stays where it is.",
        board="a board shows no certificate: it registers by its TPM or by a symmetric key",
    )  # fmt: skip
    api_version: str = form(
        AUTO, '"auto", or a version such as 2021-10-01 or 2025-07-01-preview', _is_api_version,
        help=f'The version of the DPS API that is asked for. "auto": {API_VERSION}, with certificate = "{ISSUED}"'
        f" {ISSUING_API_VERSION}.",
        board=f"a board speaks {API_VERSION}",
    )  # fmt: skip
    endpoint: str = text(
        "https://global.azure-devices-provisioning.net",
        '"https://name" or "https://name:port", nothing behind it', _is_endpoint,
        help="The Device Provisioning Service (DPS) itself.",
    )  # fmt: skip
    connect_to: str = address(
        help='"host:port" to dial instead; the name and the certificate stay the endpoint\'s.',
    )
    ca_file: str = path(
        help="The only certificates to trust for DPS, in PEM; empty: the system's. Azure uses DigiCert Global Root G2"
        " and Microsoft RSA Root Certificate Authority 2017: a file with those two keeps every other authority out.",
        board=path("roots.der"),
    )
    state_dir: str = text(
        "", "the path of a folder, of a flash partition such as /dev/mtd3, or empty",
        help="The folder of the stored assignment, or a flash partition. Empty: $STATE_DIRECTORY (systemd), else"
        " /var/lib/dps-agent if there or writable, else dps-agent in $XDG_STATE_HOME or ~/.local/state.",
        board=text("/dps-agent", "the path of a folder", bool),
    )  # fmt: skip
    runtime_dir: str = text(
        "", "the path of a folder, or empty",
        help="The folder of what a restart may lose: the socket for other programs and what 'dps-agent status' reads."
        " Empty: $RUNTIME_DIRECTORY (systemd), else /run/dps-agent, else dps-agent in $XDG_RUNTIME_DIR, else"
        " state_dir.",
        board="a board has no folder for what a restart may lose",
    )  # fmt: skip
    poll: str = word(
        POLL_LOOKUP, POLL_OPERATION,
        help='How to wait for the assignment: "lookup" (registration status lookup) or "operation" (operation status).',
    )  # fmt: skip
    payload: dict[str, Any] = form(
        {}, "a table that JSON can hold (no dates)", _is_json_table,
        help="Input for a custom allocation policy, sent as JSON.",
    )  # fmt: skip
    model_id: str = text(
        "", f'a model id such as "dtmi:com:example:Gateway;1" of at most {MODEL_ID_LIMIT} characters, or empty',
        lambda value: not value or _is_model_id(value),
        help="The Plug and Play model that this device implements; empty: none. The hub hears of it with each"
        ' connection, DPS as "modelId" in the payload.',
    )  # fmt: skip


class RetrySettings(Section):
    """[retry]: times in seconds."""

    registration_budget_s: int = seconds(
        900, 1, 86400,
        help="Seconds that one registration may take, all its waiting included.",
    )  # fmt: skip
    first_contact_spread_s: int = seconds(
        0, 0, WEEK_S,
        help="The service's first contact with DPS comes at a random moment within so many seconds, at least five; for"
        " fleets that are switched on at once. 0: as [fleet] says. The first connection to the hub is spread by [fleet]"
        " alone.",
    )  # fmt: skip


class TpmSettings(Section):
    """[tpm]: which TPM, and what is where in it."""

    backend: str = word(
        "esys", "wire", "simulator",
        help='"esys" (a TPM through tpm2-tss), "wire" (a device node, swtpm or SPI, without any further package) or'
        ' "simulator" (keys in plain files, for a desk without a TPM). The default of dps-agent-light is "wire".',
        board=word("wire"),
    )  # fmt: skip
    tcti: str = text(
        "device:/dev/tpmrm0", "a TCTI string such as device:/dev/tpmrm0, or a simulator's folder", bool,
        help='"device:/dev/tpmrm0", "swtpm:host=127.0.0.1,port=2321" or another TCTI; for the simulator the folder of'
        " its keys. A TPM on a bus without a driver is the agent's alone: what a crash left in it is flushed when it is"
        " opened.",
        board=word("spi", "i2c"),
    )  # fmt: skip
    ek_template: str = word(
        *EK_TEMPLATES,
        help='"tcg-l1" matches the manufacturer\'s certificate; "azure-c-sdk" is the key that Microsoft\'s C, Node and'
        " Java tools create. They are different keys of the same TPM: a fleet keeps the one it is enrolled with.",
    )
    ek_handle: int = handle(EK_HANDLE, help="The persistent handle of the endorsement key.")
    srk_handle: int = handle(SRK_HANDLE, help="The persistent handle of the storage root key.")
    owner_auth_file: str = path(
        help="A file with the password of the owner hierarchy, readable by the agent alone (0600); a credential of its"
        " name comes first. One line end at the end is no part of it; everything else is.",
        board="the agent on a board needs a TPM whose owner password is empty",
        secret_limit=AUTH_LIMIT,
    )
    endorsement_auth_file: str = path(
        help="The same for the endorsement hierarchy.",
        board="the agent on a board needs a TPM whose endorsement password is empty",
        secret_limit=AUTH_LIMIT,
    )
    persist_at: int = handle(
        0,
        help="Also make the hub key persistent at this handle, for other programs, e.g. 0x81000100; 0: do not.",
        board="on a board no other program could use the key, so it stays in the record",
    )
    i_know_keys_are_in_files: bool = switch(
        help="Allows the simulator for Azure's own endpoints. Anybody who reads the folder then is this device.",
        board="there is no simulator on a board",
    )


class HubSettings(Section):
    """[hub]: how the assigned hub is reached, and which hubs are acceptable."""

    connect_to: str = address(
        help='"host:port" to dial instead; the name, the certificate and the token stay the hub\'s.',
    )
    ca_file: str = path(
        help="The only certificates to trust for the hub, in PEM; empty: the system's.",
    )
    transport: str = word(
        "auto", "mqtt", "websocket",
        help='"auto" (MQTT, else MQTT over WebSocket), "mqtt" or "websocket".',
        board=word("auto", "mqtt"),
    )  # fmt: skip
    keep_alive_s: int = seconds(
        KEEP_ALIVE_S, 30, KEEP_ALIVE_LIMIT_S,
        help="A silent connection is asked for a sign of life within so many seconds; balancers in front of hubs drop"
        " what is silent for four minutes.",
    )  # fmt: skip
    token_life_s: int = form(
        0, f"0, or a whole number of seconds from 300 to {WEEK_S}",
        lambda value: type(value) is int and (value == 0 or 300 <= value <= WEEK_S),
        help=f"A token for the hub lives so many seconds, 0: as [fleet] says, {TOKEN_LIFE_S} where it says nothing;"
        " it is renewed at 75 to 80 % of its life, the"
        " first one of a connection at 30 to 80 %.",
    )  # fmt: skip
    hub_suffixes: tuple[str, ...] = form(
        (".azure-devices.net", ".azure-devices.cn", ".azure-devices.us"),
        "a list of 1 to 32 domain suffixes",
        _is_suffix_list,
        help="The hubs that this device may be assigned to: the names, and all that end in them.",
    )
    remote_methods: tuple[str, ...] = form(
        (), 'a list of "check" and "journal", or of one of them, or empty',
        lambda value: isinstance(value, list) and all(each in ("check", "journal") for each in value),
        help='Direct methods of the agent\'s own by which whoever may call methods of this device looks at it: "check"'
        " (as 'dps-agent check --offline') and \"journal\" (what the service wrote last). Neither changes anything.",
        board="the agent on a board has neither",
    )  # fmt: skip
    features: tuple[str, ...] = form(
        (AUTO,), f'["{AUTO}"], or a list of some of {", ".join(FEATURES)}', _is_feature_list,
        help=f'What the hub is asked for beside telemetry. ["{AUTO}"]: for everything, and the device finds out by'
        " itself what a hub of the Basic tier lacks; [] says that it has nothing else.",
    )  # fmt: skip


class FleetSettings(Section):
    """[fleet]: how many devices share the services; 0: nobody knows. docs/fleet.md has the sums."""

    devices: int = whole(
        0, 0, LIMITS[0],
        help="How many devices may come back together, for instance after a blackout; 0: nobody knows.",
    )  # fmt: skip
    dps_quota_per_min: int = whole(
        0, 0, LIMITS[1],
        help="Registrations a minute that the Device Provisioning Service takes of them all; 1000 unless Microsoft has"
        " raised it. With devices it makes the spread of the first contact.",
    )  # fmt: skip
    hub_connects_per_s: int = whole(
        0, 0, LIMITS[2],
        help="New connections a second that the hubs take together. With devices it makes the spread of the first"
        " connection and the life of a token.",
    )  # fmt: skip


class NetworkSettings(Section):
    """[network]: what lies between the device and the service."""

    proxy: str = text(
        "env", '"env", "none" or "http://host:port"', lambda value: value in ("env", "none") or is_proxy_url(value),
        help='"env" (https_proxy and no_proxy), "none" or "http://host:port". No place for a password: every user may'
        " read the settings.",
        board=_DIALS_ITSELF,
        shown=without_password,
    )  # fmt: skip
    proxy_file: str = path(
        help='A file with the URL of a proxy that wants a password, "http://user:password@host:port", readable by the'
        " agent alone (0600), instead of network.proxy; a credential of its name comes first.",
        board=_DIALS_ITSELF,
        secret_limit=PROXY_LIMIT,
    )


class ApiSettings(Section):
    """[api]: the socket for other programs on this device."""

    socket: str = text(
        "", f'a path of at most {SOCKET_PATH_LIMIT} bytes that begins with /, "none", or empty', _is_socket,
        help='The socket for other programs, open to the group dps-agent-clients: a path, "none", or empty for api.sock'
        " in runtime_dir.",
        board=_NO_SOCKET,
    )  # fmt: skip
    allow_token: bool = switch(
        help="Also hand out tokens for this device's hub, of at most 15 minutes, to whoever may use the socket.",
        board=_NO_SOCKET,
    )


class BoardSettings(Section):
    """[board]: what a microcontroller alone has."""

    bus: int = whole(0, 0, 7, help="The number of the SPI or I2C on which the TPM is.")
    bus_hz: int = whole(0, 0, 43_000_000, help="The bus's clock; 0: 10 MHz on SPI, 400 kHz on I2C.")
    sck_pin: int | str = pin(help="SCLK on SPI; -1: the firmware's own pin for that bus, here and in the next two.")
    mosi_pin: int | str = pin(help="MOSI on SPI.")
    miso_pin: int | str = pin(help="MISO on SPI.")
    select_pin: int | str = pin(17, help="The pin of the TPM's CS# on SPI.")
    scl_pin: int | str = pin(help="SCL on I2C; -1: the firmware's own pin for that bus, here and in the next.")
    sda_pin: int | str = pin(help="SDA on I2C.")
    reset_pin: int | str = pin(
        help="The pin of the TPM's RST#, which resets a TPM that did not answer a command; -1: none."
    )
    wifi_ssid: str = form(
        "", "a text", lambda value: isinstance(value, str),
        help="The Wi-Fi to join; empty: none, as with Ethernet or a program that joins.",
    )  # fmt: skip
    wifi_password_file: str = text(
        "", "the path of a file", bool,
        help="A file on your machine in UTF-8, mode 0600; its content, but one line end, goes to the board by --port"
        " only.",
    )  # fmt: skip
    ntp_server: str = text(
        "pool.ntp.org", '"host" or "host:port", or empty',
        lambda value: not value or is_address(value) or is_address(f"{value}:123"),
        help='"host" or "host:port", empty for none; the service\'s Date has the last word anyway.',
    )  # fmt: skip
    led_pin: int | str = pin(help="The pin of an LED that is lit while the identity serves; -1: none.")
    watchdog_s: int = form(
        0, "0 for none, or a whole number from 8 to 600: a silent name server takes 7 s",
        lambda value: type(value) is int and (value == 0 or 8 <= value <= 600),
        help="Seconds until a board that hangs is reset; 0: never. RP2040 has at most 8, RP2350 16, and both take that;"
        " 16 elsewhere.",
    )  # fmt: skip


SECTIONS: dict[str, type[Section]] = {
    "": TopSettings,
    "retry": RetrySettings,
    "tpm": TpmSettings,
    "hub": HubSettings,
    "fleet": FleetSettings,
    "network": NetworkSettings,
    "api": ApiSettings,
}


def rows_of(table: str, section: type[Section]) -> dict[str, Setting]:
    """The rows of one table of settings by their dotted keys."""
    rows = vars(section).items()
    return {f"{table}.{name}" if table else name: row for name, row in rows if isinstance(row, Setting)}


KEYS: dict[str, Setting] = {}  # every setting of the agent on Linux
for _table, _section in SECTIONS.items():
    KEYS.update(rows_of(_table, _section))
