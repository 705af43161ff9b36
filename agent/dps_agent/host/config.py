"""The settings on Linux: TOML files, environment, command line; every value knows where it came from.

Order, the last wins: built-in defaults, those of the package that brought the agent, `/etc/dps-agent/config.toml`,
`config.d/*.toml` beside it in name order, `DPS_AGENT_*`, `--set`. A settings file that is named explicitly replaces all
files of the system.
"""

from __future__ import annotations

import os
import stat

from dps_agent.host.plain_toml import read_plain
from dps_agent.host.settings_table import (
    AUTH_LIMIT,
    GONE,
    IN_FILE,
    IN_TPM,
    KEYS,
    SECTIONS,
    SOCKET_PATH_LIMIT,
    TPM_KEY,
    ApiSettings,
    FleetSettings,
    HubSettings,
    NetworkSettings,
    RetrySettings,
    TopSettings,
    TpmSettings,
    is_proxy_url,
)
from dps_agent.settings import (
    AUTO,
    ISSUED,
    ISSUING_API_VERSION,
    SYMMETRIC_KEY,
    TPM,
    X509,
    Settings,
)
from dps_hal.contracts import CERTIFICATE, IDENTITY, PROGRESS
from dps_hal.errors import AskOperator
from dps_hal.host.regular import open_regular, read_regular
from dps_text import BYTE_ORDER_MARK, NotText, Secret, secret_of, text_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

SYSTEM_FILE = "/etc/dps-agent/config.toml"
PACKAGE_FILE = os.path.join(os.path.dirname(__file__), "defaults.toml")  # where a package has other defaults than these
SYSTEM_STATE_DIR = "/var/lib/dps-agent"
SYSTEM_RUNTIME_DIR = "/run/dps-agent"
SOCKET_NAME = "api.sock"
ROOT_SUFFIX = ".root"  # behind the path of the socket: that of the one for root and the service's own user alone
ENVIRONMENT_PREFIX = "DPS_AGENT_"
AZURE_ENDPOINT_SUFFIXES = (
    ".azure-devices-provisioning.net",
    ".azure-devices-provisioning.cn",
    ".azure-devices-provisioning.us",
)
_UNQUOTED = 'a text needs quotes, such as id_scope = "0ne00A1B2C3"'
_TOML_HINTS = (  # what an error of `tomllib` begins with
    ("Invalid value", _UNQUOTED),
    ("Expected newline or end of document after a statement", _UNQUOTED),
    ("Cannot overwrite a value", "a key is set twice"),
    ("Cannot declare", "a table stands there twice"),
)
SEALED_KEY = b"{"  # with which a device's own key begins that a TPM has sealed; no base64 does
COMMON_NAME_LIMIT = 64  # characters; RFC 5280, ub-common-name
ISSUED_KEY_NAME = "issued-key.pem"
SETTINGS_LIMIT = 1024 * 1024  # bytes; the template with every setting has 1/100
PASSWORD_FILES = {key: setting.secret_limit for key, setting in KEYS.items() if setting.secret_limit}
ENVIRONMENT_FILE = "/etc/environment"  # the environment of every session: pam_env(8)
UNIT_DROP_INS = ("/etc/systemd/system/dps-agent.service.d", "/run/systemd/system/dps-agent.service.d")


class ConfigurationError(AskOperator):
    """The settings cannot be used; `problems` has one sentence for each thing to correct."""

    def __init__(self, code: str, problems: Sequence[str]) -> None:
        title = "the settings have a problem" if len(problems) == 1 else f"the settings have {len(problems)} problems"
        super().__init__(code, "\n".join([f"{title}:", *(f"  {problem}" for problem in problems)]))
        self.problems = tuple(problems)


class Configuration(TopSettings):
    """Every setting with its value; `origins` names for each dotted key where that value came from.

    `state_dir` is never empty here: the rule for the empty setting has been applied. `runtime_dir` is empty only where
    there is no folder for what a restart may lose.
    """

    retry: RetrySettings
    tpm: TpmSettings
    hub: HubSettings
    fleet: FleetSettings
    network: NetworkSettings
    api: ApiSettings
    files: tuple[str, ...]
    origins: Mapping[str, str]

    def settings(self) -> Settings:
        """The part that the logic knows; AskOperator `config.missing` where there is no id_scope."""
        if not self.id_scope:
            raise ConfigurationError("config.missing", [_ID_SCOPE_MISSING])
        from dps_agent.values import settings_of

        return settings_of({key: self.value(key) for key in KEYS})

    @property
    def backend(self) -> str:
        """What keeps the device's key: a back end of the TPM, or the other way in which the device shows who it is."""
        return self.tpm.backend if self.attestation == TPM else self.attestation

    @property
    def records(self) -> tuple[str, ...]:
        """What the store keeps of this device."""
        return (IDENTITY, PROGRESS, CERTIFICATE) if self.certificate else (IDENTITY, PROGRESS)

    @property
    def forgotten(self) -> tuple[str, ...]:
        """The records that a reset erases: also those of settings that held before, but for a flash partition."""
        return (IDENTITY, PROGRESS, CERTIFICATE) if os.path.isdir(self.state_dir) else self.records

    @property
    def issued_key_path(self) -> str:
        """The file with the key of the certificate that DPS issues."""
        return _issued_key_path(self.issued_key_file, self.state_dir)

    @property
    def issues_into_tpm(self) -> bool:
        """Whether the TPM makes that key, where it has to be made, as far as this user may see that."""
        return self.issues_into_tpm_beside(self.attestation == TPM or is_sealed(self))

    def issues_into_tpm_beside(self, own_in_tpm: bool) -> bool:
        """The same, where it is known whether a TPM has what shows DPS who the device is."""
        if self.issued_key != AUTO:
            return self.issued_key == IN_TPM
        return self.tpm.backend != "simulator" and own_in_tpm

    @property
    def id_scope_remedy(self) -> str:
        """What to do where there is no id_scope."""
        file = self.files[0] if self.files else SYSTEM_FILE
        return f"set id_scope in {file}; the overview page of your Device Provisioning Service shows it"

    @property
    def socket(self) -> str:
        """The path of the socket for other programs, "" for none."""
        if self.api.socket:
            return "" if self.api.socket == "none" else self.api.socket
        path = os.path.join(self.runtime_dir, SOCKET_NAME)
        return path if self.runtime_dir and len(os.fsencode(path)) <= SOCKET_PATH_LIMIT else ""

    def value(self, key: str) -> Any:
        """The value of one dotted key of `KEYS`."""
        table, _, name = key.rpartition(".")
        return getattr(getattr(self, table) if table else self, name)


def _issued_key_path(issued_key_file: str, state_dir: str) -> str:
    return issued_key_file or os.path.join(state_dir, ISSUED_KEY_NAME)


NO_ID_SCOPE = "id_scope is not set"
_ID_SCOPE_MISSING = (
    "id_scope: expected the ID scope of your Device Provisioning Service; it is set nowhere"
    f" (file, {ENVIRONMENT_PREFIX}ID_SCOPE or --set id_scope=...)"
)


def environment_name(key: str) -> str:
    """The environment variable of one dotted key: `tpm.backend` is DPS_AGENT_TPM_BACKEND."""
    return ENVIRONMENT_PREFIX + key.upper().replace(".", "_")


class _Collector:
    """Values and problems of all sources, in the order they are read."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {key: setting.default for key, setting in KEYS.items()}
        self.origins: dict[str, str] = dict.fromkeys(KEYS, "default")
        self.problems: list[tuple[str, str]] = []  # code, sentence

    def problem(self, text: str, code: str = "config.invalid") -> None:
        self.problems.append((code, text))

    def may_have_held(self, key: str) -> bool:
        """Whether a source that was refused named `key`: then its absence is no problem of its own."""
        return any(code == "config.unreadable" or text.startswith(f"{key}:") for code, text in self.problems)

    def take(self, key: str, value: Any, origin: str) -> None:
        """Checks one value and keeps it; a later source replaces an earlier one."""
        setting = KEYS[key]
        if not setting.accepts(value):
            self.problem(f"{key}: expected {setting.expected}; came {_shortened(setting.shown(value))} ({origin})")
            return
        self.values[key] = tuple(value) if isinstance(value, list) else value
        self.origins[key] = origin

    def take_text(self, key: str, text: str, origin: str) -> None:
        """Takes a value from the environment or the command line: as in TOML, text also without quotes."""
        value: Any = text
        if not isinstance(KEYS[key].default, str) or text[:1] in ('"', "'"):
            try:
                parsed = parse_toml(f"value = {text}")
            except (ValueError, RecursionError):
                parsed = {}
            if list(parsed) == ["value"]:
                value = parsed["value"]
        self.take(key, value, origin)

    def take_file(self, path: str) -> None:
        try:
            content = read_toml(path)
        except ConfigurationError as error:
            self.problem(error.problems[0], error.code)
            return
        for name, value in content.items():
            if name not in SECTIONS:
                self._take_named(name, value, path)
            elif not isinstance(value, dict):
                self.problem(f"{name}: expected a table, [{name}]; came {_shortened(value)} ({path})")
            else:
                for inner, inner_value in value.items():
                    self._take_named(f"{name}.{inner}", inner_value, path)

    def _take_named(self, key: str, value: Any, origin: str) -> None:
        if key in KEYS:
            self.take(key, value, origin)
        else:
            self.unknown(key, origin, [*KEYS, *filter(None, SECTIONS)])

    def unknown(self, name: str, origin: str, known: Sequence[str]) -> None:
        gone = {name: instead for key, instead in GONE.items() for name in (key, environment_name(key))}
        if name in gone:
            self.problem(f"{name}: there is no such setting any more: {gone[name]} ({origin})")
            return
        nearest = _nearest(name, known)
        hint = f"; the nearest is {nearest}" if nearest else ""
        self.problem(f"{name}: there is no such setting ({origin}){hint}")


def parse_toml(text: str) -> dict[str, Any]:
    """What a TOML text holds; ValueError or RecursionError where it is none."""
    plain = read_plain(text)
    if plain is not None:
        return plain
    import tomllib  # with `typing` and `datetime` the dearest of a start

    return tomllib.loads(text)


def read_toml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a settings file holds; ConfigurationError `config.unreadable` names the file, and the line of the fault."""
    try:
        return parse_toml(text_of(read_regular(path, SETTINGS_LIMIT)))
    except OSError as error:
        problem = f"{path}: cannot be read: {error.strerror}"
    except NotText as error:
        problem = f"{path}: {error}"
    except (ValueError, RecursionError) as error:
        problem = f"{path}: expected TOML in UTF-8: {error}{_toml_hint(str(error))}"
    raise ConfigurationError("config.unreadable", [problem])


def _toml_hint(said: str) -> str:
    """What is mostly behind that error of `tomllib`, "" for others."""
    for begins, hint in _TOML_HINTS:
        if said.startswith(begins):
            return f"; {hint}"
    return ""


def load(
    config_file: str | os.PathLike[str] | None = None,
    *,
    overrides: Sequence[str] = (),
    environ: Mapping[str, str] | None = None,
    system_file: str | os.PathLike[str] = SYSTEM_FILE,
    need_id_scope: bool = True,
) -> Configuration:
    """Reads all sources and returns the effective settings.

    `config_file` replaces the files of the system, its folder `config.d` included; `overrides` are "key=value".
    Raises ConfigurationError with every problem found, never only the first.
    """
    environ = os.environ if environ is None else environ
    collector = _Collector()
    if os.path.isfile(PACKAGE_FILE):
        collector.take_file(PACKAGE_FILE)
    files = [os.fspath(config_file)] if config_file is not None else _system_files(os.fspath(system_file), collector)
    for path in files:
        collector.take_file(path)
    _take_environment(collector, environ)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            collector.problem(f"--set: expected key=value; came {_shortened(override)}")
        elif key not in KEYS:
            collector.unknown(key, "--set", list(KEYS))
        else:
            collector.take_text(key, text, f"--set {key}")
    _check_together(collector)
    _settle_state_dir(collector, environ)
    _settle_runtime_dir(collector, environ)
    _check_issued_key_path(collector)
    if need_id_scope and not collector.values["id_scope"] and not collector.may_have_held("id_scope"):
        collector.problem(_ID_SCOPE_MISSING, "config.missing")
    if collector.problems:
        raise ConfigurationError(collector.problems[0][0], [text for _, text in collector.problems])
    values: dict[str, dict[str, Any]] = {table: {} for table in SECTIONS}
    for key, value in collector.values.items():
        table, _, name = key.rpartition(".")
        values[table][name] = value
    top = values.pop("")
    tables: dict[str, Any] = {table: SECTIONS[table](**inner) for table, inner in values.items()}
    return Configuration(**top, **tables, files=tuple(files), origins=collector.origins)


def _system_files(system_file: str, collector: _Collector) -> list[str]:
    """The system's files that exist; a file that exists but cannot be read is the reader's problem."""
    found: list[str] = []
    folder = os.path.join(os.path.dirname(system_file), "config.d")
    try:
        found += [system_file] if _exists(system_file) else []
        names = sorted(os.listdir(folder)) if _exists(folder) else []
        found += [os.path.join(folder, name) for name in names if name.endswith(".toml")]
    except OSError as error:
        collector.problem(f"{error.filename}: cannot be read: {error.strerror}", "config.unreadable")
    return found


def _exists(path: str) -> bool:
    """Whether there is something at `path`; PermissionError where that cannot be known."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _take_environment(collector: _Collector, environ: Mapping[str, str]) -> None:
    keys = {environment_name(key): key for key in KEYS}
    for name in sorted(environ):
        if name in keys:
            collector.take_text(keys[name], environ[name], f"environment {name}")
        elif name.startswith(ENVIRONMENT_PREFIX):
            collector.unknown(name, "environment", list(keys))


def _check_together(collector: _Collector) -> None:
    """What no single value shows."""
    values, origins = collector.values, collector.origins
    tcti = values["tpm.tcti"]
    if values["tpm.backend"] == "wire":
        from dps_hal.host.tcti import parse_tcti

        try:
            parse_tcti(tcti)
        except AskOperator as error:
            collector.problem(f"tpm.{error.message} ({origins['tpm.tcti']})")
    if values["tpm.backend"] == "simulator" and tcti.split(":")[0] in (
        "device",
        "swtpm",
        "mssim",
        "spi",
        "tabrmd",
        "cmd",
    ):
        collector.problem(
            f"tpm.tcti: the simulator expects the folder that holds its keys; came {_shortened(tcti)}"
            f" ({origins['tpm.tcti']})"
        )
    if values["network.proxy_file"] and values["network.proxy"] != KEYS["network.proxy"].default:
        both = f"{origins['network.proxy']}; {origins['network.proxy_file']}"
        collector.problem(f"network.proxy_file: expected either this or network.proxy; both are set ({both})")
    _check_issuing(collector)
    attestation = values["attestation"]
    if attestation != X509 and values["certificate_file"]:
        came = f'"{attestation}" ({origins["certificate_file"]})'
        collector.problem(f'certificate_file: expected attestation = "{X509}" with it; came {came}')
    elif attestation == X509:
        if not values["certificate_file"] and not collector.may_have_held("certificate_file"):
            collector.problem(
                f'certificate_file: expected a file for the certificate, with attestation = "{X509}"; it is not set'
            )
        if len(values["registration_id"]) > COMMON_NAME_LIMIT:
            collector.problem(
                f"registration_id: expected at most {COMMON_NAME_LIMIT} characters, for it is the name in the"
                f" certificate; came {len(values['registration_id'])}"
            )
    if attestation != TPM:
        by_key = f'attestation = "{attestation}"'
        if values["registration_id"] == AUTO and not collector.may_have_held("registration_id"):
            collector.problem(
                f"registration_id: expected the device's own, with {by_key}; came \"{AUTO}\", which a TPM's key gives"
            )
        if not values["device_key_file"] and not collector.may_have_held("device_key_file"):
            collector.problem(f"device_key_file: expected a file with the device's key, with {by_key}; it is not set")
        if values["tpm.persist_at"]:
            collector.problem(f"tpm.persist_at: expected 0, with {by_key}: no hub key comes that could be kept there")
    elif values["device_key_file"]:
        came = f'"{values["attestation"]}" ({origins["device_key_file"]})'
        collector.problem(f'device_key_file: expected attestation = "{SYMMETRIC_KEY}" or "{X509}" with it; came {came}')
    handles = ("tpm.ek_handle", "tpm.srk_handle", "tpm.persist_at")
    for at, key in enumerate(handles):
        for other in handles[:at]:
            if values[key] == values[other]:
                collector.problem(f"{key}: expected another handle than {other}; both are {values[key]:#x}")


def _check_issuing(collector: _Collector) -> None:
    """What goes with a certificate that DPS issues, and what does not."""
    values, origins = collector.values, collector.origins
    if not values["certificate"]:
        if values["issued_key_file"]:
            came = f"it is not set ({origins['issued_key_file']})"
            collector.problem(f'issued_key_file: expected certificate = "{ISSUED}" with it; {came}')
        if values["issued_key"] != AUTO:
            came = f"it is not set ({origins['issued_key']})"
            collector.problem(f'issued_key: expected certificate = "{ISSUED}" with it; {came}')
        return
    with_it = f'with certificate = "{ISSUED}"'
    if values["api_version"] != AUTO and values["api_version"] < ISSUING_API_VERSION[:10]:
        came = f'"{values["api_version"]}" ({origins["api_version"]})'
        collector.problem(f'api_version: expected "{ISSUING_API_VERSION}" or a later one, {with_it}; came {came}')
    if values["issued_key"] == IN_TPM and values["tpm.backend"] == "simulator":
        came = 'tpm.backend = "simulator", with whose keys TLS cannot sign'
        collector.problem(f'issued_key: expected "{IN_FILE}", or a TPM; came {came} ({origins["issued_key"]})')
    if values["tpm.persist_at"]:
        collector.problem(f"tpm.persist_at: expected 0, {with_it}: no hub key comes that could be kept there")
    if values["state_dir"].startswith("/dev/mtd"):
        collector.problem(f"state_dir: expected a folder, {with_it}; a flash partition has no room for certificates")
    if len(values["registration_id"]) > COMMON_NAME_LIMIT and values["attestation"] != X509:
        collector.problem(
            f"registration_id: expected at most {COMMON_NAME_LIMIT} characters, {with_it}, for it is the name in that;"
            f" came {len(values['registration_id'])}"
        )


def _settle_state_dir(collector: _Collector, environ: Mapping[str, str]) -> None:
    """The rule for an empty state_dir: systemd's folder, else the system's if there or writable, else the user's."""
    if collector.values["state_dir"]:
        return
    home = environ.get("HOME", "")
    if environ.get("STATE_DIRECTORY"):
        # systemd separates several folders with colons; ours is the unit's first
        found, origin = environ["STATE_DIRECTORY"].split(":")[0], "$STATE_DIRECTORY"
    elif os.path.lexists(SYSTEM_STATE_DIR):  # the service's, a link that only root can follow: no second identity
        found, origin = SYSTEM_STATE_DIR, "default, present"
    elif os.access(os.path.dirname(SYSTEM_STATE_DIR), os.W_OK):
        found, origin = SYSTEM_STATE_DIR, "default, writable"
    elif environ.get("XDG_STATE_HOME"):
        found, origin = os.path.join(environ["XDG_STATE_HOME"], "dps-agent"), "$XDG_STATE_HOME"
    elif home:
        found, origin = os.path.join(home, ".local", "state", "dps-agent"), "default of $XDG_STATE_HOME"
    else:
        collector.problem(f"state_dir: expected a folder; {SYSTEM_STATE_DIR} is not writable and $HOME is not set")
        return
    collector.values["state_dir"], collector.origins["state_dir"] = found, origin


def _settle_runtime_dir(collector: _Collector, environ: Mapping[str, str]) -> None:
    """The rule for an empty runtime_dir: systemd's folder, else /run, else the user's, else the state folder."""
    if collector.values["runtime_dir"]:
        return
    state_dir = collector.values["state_dir"]
    if environ.get("RUNTIME_DIRECTORY"):
        found, origin = environ["RUNTIME_DIRECTORY"].split(":")[0], "$RUNTIME_DIRECTORY"
    elif os.path.isdir(SYSTEM_RUNTIME_DIR) or os.access(os.path.dirname(SYSTEM_RUNTIME_DIR), os.W_OK):
        found, origin = SYSTEM_RUNTIME_DIR, "default"
    elif environ.get("XDG_RUNTIME_DIR"):
        found, origin = os.path.join(environ["XDG_RUNTIME_DIR"], "dps-agent"), "$XDG_RUNTIME_DIR"
    elif not state_dir.startswith("/dev/mtd"):
        found, origin = state_dir, "state_dir"
    else:
        found, origin = "", "default"
    collector.values["runtime_dir"], collector.origins["runtime_dir"] = found, origin


def _check_issued_key_path(collector: _Collector) -> None:
    """The file of an issued certificate's key, which the agent writes and `reset` removes, is no other one."""
    values, named = collector.values, collector.values["issued_key_file"]
    others = [key for key in (*PASSWORD_FILES, "certificate_file", "ca_file", "hub.ca_file") if values[key]]
    if not named and not others:
        return
    path = os.path.realpath(_issued_key_path(named, values["state_dir"]))
    for key in others:
        if os.path.realpath(values[key]) == path:
            at_fault, other = ("issued_key_file", key) if named else (key, "the key of an issued certificate has")
            collector.problem(f"{at_fault}: expected another file than {other}; both are {path}")
    if named and os.path.dirname(path) == os.path.realpath(values["state_dir"]) and not path.endswith(".pem"):
        expected = "expected a name that ends in .pem, in the folder of the agent's own files"
        collector.problem(f"issued_key_file: {expected}; came {named} ({collector.origins['issued_key_file']})")


def check_keys_in_hardware(configuration: Configuration) -> None:
    """AskOperator `tpm.simulator_refused` for a simulated TPM at Azure's own endpoints."""
    tpm = configuration.tpm
    if tpm.backend != "simulator" or tpm.i_know_keys_are_in_files:
        return
    from urllib.parse import urlsplit

    host = (urlsplit(configuration.endpoint).hostname or "").rstrip(".")
    if host.endswith(AZURE_ENDPOINT_SUFFIXES):
        raise AskOperator(
            "tpm.simulator_refused",
            f"expected a hardware TPM for {host}; came the simulator, whose keys lie readable in {tpm.tcti}",
        )


def check_files(configuration: Configuration) -> None:
    """ConfigurationError unless every file that the settings name can be used."""
    problems: list[str] = []
    for key in ("ca_file", "hub.ca_file"):
        path = configuration.value(key)
        if path and not os.access(path, os.R_OK):
            why = "it may not be read (Permission denied)" if os.path.exists(path) else "it does not exist"
            problems.append(f"{key}: expected a readable file; {path}: {why}")
        elif path:
            problems += _odd_roots(key, path)
    for key in PASSWORD_FILES:
        try:
            if key == "device_key_file":
                own_key(configuration)
            else:
                hierarchy_password(key, configuration.value(key))
        except ConfigurationError as error:
            problems.extend(error.problems)
    if not problems:
        proxy_of(configuration)
    if problems:
        raise ConfigurationError("config.invalid", problems)


def _odd_roots(key: str, path: str) -> list[str]:
    """Why the file holds no roots to trust, as the connections read it; empty where it does."""
    from dps_agent.host.network.trust import Trust  # with `ssl`: for those who ask whether all is well

    try:
        Trust(path, key).context()
    except AskOperator as error:
        return [error.message]
    return []


def proxy_of(configuration: Configuration) -> str:
    """The setting network.proxy, or the URL in network.proxy_file; ConfigurationError where that holds none."""
    path = configuration.network.proxy_file
    if not path:
        return configuration.network.proxy
    content = hierarchy_password("network.proxy_file", path)
    url = content.decode("latin-1")
    if not is_proxy_url(url) or not url.isascii() or not url.isprintable():
        odd = f"; {content.odd}" if content.odd else ""
        problem = f'network.proxy_file: expected "http://[user:password@]host:port" in {path}; came something else{odd}'
        raise ConfigurationError("config.invalid", [problem])
    return url


def readable_proxy_passwords(configuration: Configuration) -> list[str]:
    """A sentence for each place that holds a proxy's password and that others may read; none shows anything of it."""
    from pathlib import Path

    found = []
    origin = configuration.origins["network.proxy"]
    if "@" in configuration.network.proxy and origin in configuration.files and (readers := _readers(origin)):
        found.append(f"{origin} holds a proxy's password, and {readers} may read it")
    if _names_a_password(ENVIRONMENT_FILE, "") and (readers := _readers(ENVIRONMENT_FILE)):
        found.append(f"{ENVIRONMENT_FILE} holds a proxy's password, and {readers} may read it")
    for folder in UNIT_DROP_INS:
        for path in sorted(Path(folder).glob("*.conf")):
            if _names_a_password(str(path), "Environment="):
                found.append(f"{path} holds a proxy's password, and 'systemctl show' shows it to every user")
    return found


def _names_a_password(path: str, start: str) -> bool:
    """Whether a line that begins with `start` is about a proxy's URL with user or password."""
    try:
        lines = text_of(read_regular(path, SETTINGS_LIMIT)).splitlines()
    except (OSError, NotText):
        return False
    uncommented = [line for line in lines if line.startswith(start) and not line.lstrip().startswith("#")]
    return any("proxy" in line.lower() and "@" in line for line in uncommented)


def _readers(path: str) -> str:
    """Who else may read a file, "" for nobody; the folders above it count."""
    from pathlib import Path

    try:
        modes = [os.stat(each).st_mode for each in (Path(path), *Path(os.path.abspath(path)).parents)]
    except OSError:
        return ""
    if modes[0] & 0o004 and all(mode & 0o001 for mode in modes[1:]):
        return "every user"
    return "its group" if modes[0] & 0o040 and all(mode & 0o011 for mode in modes[1:]) else ""


def hierarchy_password(key: str, path: str, environ: Mapping[str, str] | None = None) -> Secret:
    """The secret in the file that setting `key` names, without one line end at its end; empty for no file.

    A credential of the file's name is taken in its place: the service's user cannot read what root keeps for root.
    AskOperator `config.invalid` where the file is missing, others than its owner may open it (systemd's
    $CREDENTIALS_DIRECTORY excepted: it protects its files itself), or it holds nothing, or more than it may.
    """
    if not path:
        return Secret()
    path, is_credential = password_file(path, os.environ if environ is None else environ)
    return secret_in(key, path, PASSWORD_FILES.get(key, AUTH_LIMIT), is_credential)


def own_key(configuration: Configuration) -> Secret:
    """What device_key_file holds, empty where none is set; as `hierarchy_password`, and what makes a key there."""
    path = configuration.device_key_file
    try:
        return hierarchy_password("device_key_file", path)
    except ConfigurationError as error:
        if configuration.attestation != X509 or os.path.lexists(password_file(path, os.environ)[0]):
            raise
        how = "'dps-agent enroll --x509' makes the key and the request for its certificate"
        raise ConfigurationError(error.code, [f"{error.problems[0]}; {how}"]) from None


def secret_in(key: str, path: str, limit: int, is_credential: bool = False) -> Secret:
    """The secret in a file, of at most `limit` bytes, without one line end at its end; `key` names it in an error.

    Its mode must be 0600 or less, but for a credential.
    """
    try:
        with open(open_regular(path), "rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            password = secret_of(file.read(limit + len(b"\r\n") + 1))
    except OSError as error:
        raise ConfigurationError("config.invalid", [f"{key}: {path} cannot be read: {error.strerror}"]) from None
    if mode & 0o077 and not is_credential:
        problem = f"{key}: expected a file that only its owner may open (chmod 600 {path}); its mode is {mode:03o}"
        raise ConfigurationError("config.invalid", [problem])
    if not 0 < len(password) <= limit:
        size = f"more; {password.odd}" if password and password.odd else "more" if password else "none"
        raise ConfigurationError("config.invalid", [f"{key}: expected 1 to {limit} bytes in {path}; came {size}"])
    return password


def odd_passwords(configuration: Configuration) -> list[str]:
    """A sentence for each password file that may hold more than somebody typed; none shows anything of a password.

    A certificate's key is PEM, which nobody types.
    """
    typed = [key for key in PASSWORD_FILES if key != "device_key_file" or configuration.attestation != X509]
    files = [(key, configuration.value(key)) for key in typed]
    return [f"{key}: {odd} ({path})" for key, path in files if path and (odd := hierarchy_password(key, path).odd)]


def password_file(path: str, environ: Mapping[str, str]) -> tuple[str, bool]:
    """Where the password of a file lies: in systemd's credential of the same name (True), else in the file itself."""
    folder = environ.get("CREDENTIALS_DIRECTORY", "")
    credential = os.path.join(folder, os.path.basename(path))
    return (credential, True) if folder and os.path.isfile(credential) else (path, False)


def marked_files(configuration: Configuration) -> list[str]:
    """A sentence for each settings file that begins with a byte order mark, over which other programs may not pass."""
    marked = [path for path in configuration.files if read_regular(path, SETTINGS_LIMIT).startswith(BYTE_ORDER_MARK)]
    return [f"{path}: begins with a byte order mark, which is passed over" for path in marked]


def backend_shown(configuration: Configuration) -> str:
    """The TPM in words; the simulator is always named as what it is, and so is a key that lies in a file."""
    tpm = configuration.tpm
    note = ", keys lie in plain files" if tpm.backend == "simulator" else ""
    shown = f"{tpm.backend} ({tpm.tcti}{note})"
    if configuration.attestation == TPM:
        return shown
    path = configuration.device_key_file
    if is_sealed(configuration):
        how = "made" if configuration.attestation == X509 else "sealed"
        return f"{shown}, has {how} the device's own key, {path}"
    if configuration.certificate and issued_key_is_in_tpm(configuration):
        plain = f"the device's own key lies in a plain file, {path}"
        return f"{shown}, for the key of the certificate that DPS issues alone: {plain}"
    return f"none: the device's own key lies in a plain file, {path}"


def is_sealed(configuration: Configuration) -> bool:
    """Whether a TPM has sealed or made the device's own key, as far as this user may see that."""
    begin = TPM_KEY if configuration.attestation == X509 else SEALED_KEY
    try:
        with open(open_regular(password_file(configuration.device_key_file, os.environ)[0]), "rb") as file:
            return file.read(len(begin)) == begin
    except OSError:
        return False


def issued_key_is_in_tpm(configuration: Configuration) -> bool:
    """Whether a TPM has the key of the certificate that DPS issues.

    Where there is no key yet, or this user may not see it: whether a TPM will have it.
    """
    try:
        with open(open_regular(configuration.issued_key_path), "rb") as file:
            return file.read(len(TPM_KEY)) == TPM_KEY
    except OSError:
        return configuration.issues_into_tpm


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."


def _nearest(name: str, known: Sequence[str]) -> str:
    """The known name that was probably meant, or "": the same last part in another table, else the most similar."""
    import difflib  # costs 3 ms and is needed only after a mistake

    last = name.rpartition(".")[2]
    for candidate in known:
        if candidate.rpartition(".")[2] == last:
            return candidate
    for near in difflib.get_close_matches(name, known, n=1, cutoff=0.6):
        return near
    short = {candidate.rpartition(".")[2]: candidate for candidate in known}
    for near in difflib.get_close_matches(last, list(short), n=1, cutoff=0.6):
        return short[near]
    return ""
