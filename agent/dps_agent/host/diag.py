"""One archive with what a report needs: what the agent says of itself, its journal, its records' headers, the system.

No secret goes in. What holds one is left out by name (passwords, the wrapped key, payloads); then every text passes
`Secrets`, which knows the passwords of this device and the forms of tokens, keys and URLs with a password.
"""

from __future__ import annotations

import base64
import contextlib
import io
import os
import platform
import re
import stat
import subprocess
import tarfile
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from itertools import islice
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote

from dps_agent.host.config import PASSWORD_FILES, environment_name, password_file, proxy_of
from dps_agent.host.printed import utc_text
from dps_hal.contracts import CERTIFICATE, IDENTITY, PROGRESS
from dps_hal.errors import DpsError
from dps_hal.host.files import CERTIFICATE_SLOT_BYTES, FileSlots, user_name
from dps_hal.host.regular import read_regular
from dps_hal.platform import to_json
from dps_hal.store import slots
from dps_hal.tpm.keys import object_name
from dps_text import secret_of

if TYPE_CHECKING:
    from dps_agent.host.checks import Device
    from dps_agent.host.config import Configuration

UNIT = "dps-agent.service"
JOURNAL_LINES = 1000
COMMAND_LIMIT_S = 10.0
TEXT_LIMIT = 1 << 20  # bytes of one program's output
PASSWORD_FILE_LIMIT = 4096  # bytes of a file with a password
NAMES_LIMIT = 1000  # of files in the state folder, which its owner may fill
SHORTEST_SECRET = 4  # characters; shorter ones would take half of every text with them
HIDDEN = "***"
_FORMS = (
    (re.compile(r"SharedAccessSignature\s+[^\s\"']+"), f"SharedAccessSignature {HIDDEN}"),
    (
        re.compile(
            r"(?i)\b(sig|signature|SharedAccessKey|authenticationKey|wrappedKey|password)"
            r"(\\?[\"']?\s*[=:]\s*)(?:(\\\")[^\"\n]*\"|(\")(?:\\.|[^\"\\\n])*\"|(')[^'\n]*')"
        ),
        rf"\1\2\3\4\5{HIDDEN}\3\4\5",
    ),
    (
        re.compile(
            r"(?i)\b(sig|signature|SharedAccessKey|authenticationKey|wrappedKey|password)"
            r"(\"?\s*[=:]\s*\"?)(?!\\\")[^\s&;,\"']+"
        ),
        rf"\1\2{HIDDEN}",
    ),
    (re.compile(r"(?i)\b(proxy-)?authorization:[^\n]*"), f"Authorization: {HIDDEN}"),
    # A password may hold slashes, quotes and, where the URL is in quotes, spaces.
    (re.compile(r"(\"\w+://)(?:\\.|[^\"\\\n])*@"), rf"\1{HIDDEN}@"),
    (re.compile(r"('\w+://)[^'\n]*@"), rf"\1{HIDDEN}@"),
    (re.compile(r"://(?:\\.|[^\s\"\\])*@"), f"://{HIDDEN}@"),
)
_REFUSED_PAYLOAD = re.compile(r"(?s)(payload: expected .*?; came ).*")  # a refused setting is shown as it came
_STATES = {
    slots.EMPTY: "empty",
    slots.DAMAGED: "damaged",
    slots.FOREIGN: "of another version",
    slots.VALID: "whole",
    slots.TOMBSTONE: "erased",
}
_UNIT_FIELDS = "LoadState,ActiveState,SubState,Result,NRestarts,ExecMainStatus,StatusText,MemoryCurrent,FragmentPath"


class Secrets:
    """What must not leave this device, and the text without it."""

    def __init__(self, words: Iterable[str]) -> None:
        forms = {
            form for word in words if word for form in (word, quote(word, safe=""), unquote(word), to_json(word)[1:-1])
        }
        self._words = sorted((form for form in forms if len(form) >= SHORTEST_SECRET), key=len, reverse=True)

    def __repr__(self) -> str:
        return f"Secrets({len(self._words)})"

    def removed_from(self, text: str) -> str:
        """`text` with *** in place of each of them."""
        for word in self._words:  # first: a form may take a part of one, and leave the rest
            text = text.replace(word, HIDDEN)
        for form, instead in _FORMS:
            text = form.sub(instead, text)
        return text


def secrets_of(configuration: Configuration | None, environ: Mapping[str, str]) -> Secrets:
    """The secrets that the settings and the environment lead to; those of the environment alone without settings."""
    words: list[str] = []
    names = ("https_proxy", "HTTPS_PROXY", "http_proxy", "HTTP_PROXY", environment_name("network.proxy"))
    proxies = [environ.get(name, "") for name in names]
    if configuration is not None:
        for path in map(configuration.value, PASSWORD_FILES):
            words += _password_forms(password_file(path, environ)[0]) if path else []
        with contextlib.suppress(DpsError):
            proxies.append(proxy_of(configuration))
    for url in proxies:
        credentials = (url.partition("://")[2] or url).rpartition("@")[0]
        words += [credentials.partition(":")[2], credentials]
    return Secrets(words)


def _password_forms(path: str) -> list[str]:
    """The content of a password file as text, hex and base64; nothing where it cannot be read, nor shown then."""
    try:
        password = bytes(secret_of(read_regular(path, PASSWORD_FILE_LIMIT)))
    except OSError:
        return []
    forms = [password.decode(errors="replace"), password.hex(), base64.b64encode(password).decode()]
    return [*forms, forms[0].strip("\ufeff \t\r\n")]  # as a person shows it who did not type the rest


def without_payload(document: Any) -> Any:
    """A JSON document without the values of the key "payload", and of the setting of that name."""
    if isinstance(document, dict):
        return {
            name: HIDDEN if name == "payload" and value not in (None, {}) else without_payload(value)
            for name, value in document.items()
        }
    if isinstance(document, list):
        return [without_payload(item) for item in document]
    return _REFUSED_PAYLOAD.sub(rf"\1{HIDDEN}", document) if isinstance(document, str) else document


def state_folder(path: str) -> str:
    """What lies in the state folder, and the header of each slot; nothing of what the records say."""
    lines = [path]
    try:
        entries = [(path, os.stat(path))]
        with os.scandir(path) as found:
            names = sorted(entry.name for entry in islice(found, NAMES_LIMIT + 1))
        for name in names[:NAMES_LIMIT]:
            with suppress(FileNotFoundError):  # it has gone meanwhile
                entries.append((repr(name)[1:-1], os.lstat(os.path.join(path, name))))
    except OSError as error:
        return f"{path}: {error.strerror}\n"
    if len(names) > NAMES_LIMIT:
        lines.append(f"more than {NAMES_LIMIT} names, of which these are some")
    for name, status in entries:
        lines.append(
            f"{stat.filemode(status.st_mode)} {user_name(status.st_uid):<12} {status.st_size:>8}"
            f" {utc_text(status.st_mtime)} {name}"
        )
    try:
        space = os.statvfs(path)
        lines.append(f"free: {space.f_bavail * space.f_frsize} bytes, {space.f_favail} files")
    except OSError as error:
        lines.append(f"free: {error.strerror}")
    records = [IDENTITY, PROGRESS, *([CERTIFICATE] if f"{CERTIFICATE}.0" in names else [])]
    lines += [_slot(path, f"{record}.{slot}") for record in records for slot in (0, 1)]
    return "".join(f"{line}\n" for line in lines)


def _slot(folder: str, name: str) -> str:
    try:
        content = read_regular(os.path.join(folder, name), CERTIFICATE_SLOT_BYTES, follow=False)
        found = slots.decode_slot(content, FileSlots.erase_value)
    except OSError as error:
        return f"{name}: {error.strerror}"
    size = "" if found.payload is None else f", {len(found.payload)} bytes"
    return f"{name}: {_STATES[found.state]}, version {found.version}, generation {found.generation}{size}"


def tpm_document(device: Device) -> dict[str, Any]:
    """What the TPM says of itself, and the names of its keys; an `error` where it does not answer."""
    if device.hangs:
        return {"error": "the TPM hangs"}
    if not device.uses_tpm:
        return {"attestation": device.configuration.attestation, "tpm": "none is used"}
    try:
        found: dict[str, Any] = dict(device.condition._asdict())
        if device.needs_endorsement_key:
            found["ekName"] = object_name(device.endorsement_key).hex()
        found["srkName"] = object_name(device.storage_root_key).hex()
        found["srkFoundAt"] = device.tpm.srk_found_at
    except DpsError as error:
        return {"error": f"{error.message} [{error.code}]"}
    return found


def system() -> str:
    """The system: kernel, distribution, Python, the C library, and what of a TPM is in /dev."""
    lines = [f"{platform.platform()}\npython {platform.python_version()} ({' '.join(platform.libc_ver())})"]
    lines.append(f"uptime {time.monotonic():.0f} s, at {utc_text(time.time())}")
    try:
        lines += [f"{name}={value}" for name, value in platform.freedesktop_os_release().items()]
    except OSError as error:
        lines.append(f"os-release: {error.strerror}")
    for name in sorted(os.listdir("/dev")):
        if name.startswith("tpm"):
            lines.append(_node(f"/dev/{name}"))
    lines.append(f"this is user {user_name(os.geteuid())}, groups {sorted(os.getgroups())}")
    return "".join(f"{line}\n" for line in lines)


def _node(path: str) -> str:
    try:
        status = os.stat(path)
    except OSError as error:  # a link to nowhere, or the device has just gone
        return f"{path}: {error.strerror}"
    return f"{path} {stat.filemode(status.st_mode)} {user_name(status.st_uid)} group {status.st_gid}"


def journal() -> str:
    """The end of the unit's journal, and how systemd sees the unit; why not, where there is none."""
    show = ("systemctl", "show", UNIT, f"--property={_UNIT_FIELDS}")
    lines = ("journalctl", f"--unit={UNIT}", f"--lines={JOURNAL_LINES}", "--no-pager", "--output=short-iso")
    return f"{_output(show)}\n{_output(lines)}"


def _output(command: tuple[str, ...]) -> str:
    """What a program prints, at most TEXT_LIMIT of it, or why it does not."""
    try:
        ended = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=COMMAND_LIMIT_S,
            check=False,
            env={"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C"},
        )
    except subprocess.TimeoutExpired:
        return f"{command[0]}: nothing within {COMMAND_LIMIT_S:g} s\n"
    except OSError as error:
        return f"{command[0]}: {error.strerror}\n"
    return (ended.stdout or ended.stderr)[-TEXT_LIMIT:].decode(errors="replace")


def archive(folder: str, members: Mapping[str, str], secrets: Secrets) -> bytes:
    """A .tar.gz of these texts below `folder`, without the secrets."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as file:
        for name, text in members.items():
            content = secrets.removed_from(text).encode(errors="replace")
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size, member.mode, member.mtime = len(content), 0o600, int(time.time())
            file.addfile(member, io.BytesIO(content))
    return packed.getvalue()
