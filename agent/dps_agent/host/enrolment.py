"""A device as a factory writes it down, and the files that hold many of them."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shlex
import stat
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

from dps_hal.errors import AskOperator, RetryLater
from dps_hal.platform import from_json, to_json

CSV_HEADER = "registrationId,endorsementKey,backend,ekCertificateSha256"
LOCK_LIMIT_S = 30.0
_AZ_COMMAND = "az iot dps enrollment create "


class Enrolment(NamedTuple):
    """One device: what the Device Provisioning Service must know, and where it came from."""

    registration_id: str
    endorsement_key: str  # base64 of its TPM2B_PUBLIC
    backend: str
    certificate_sha256: str  # of the EK certificate in DER, hex; empty where there is none that can be read

    def csv_row(self) -> str:
        """The columns of CSV_HEADER; none of them can hold a comma or a quote."""
        return ",".join(self)

    def body(self) -> dict[str, Any]:
        """The body of the service API's "create or update individual enrollment"."""
        attestation = {"type": "tpm", "tpm": {"endorsementKey": self.endorsement_key}}
        return {"registrationId": self.registration_id, "attestation": attestation}

    def az_lines(self) -> list[str]:
        """A command of the Azure CLI's extension azure-iot; names of group and service come from the shell."""
        command = (
            f'{_AZ_COMMAND}--resource-group "$RESOURCE_GROUP" --dps-name "$DPS_NAME"'
            f" --enrollment-id {shlex.quote(self.registration_id)} --attestation-type tpm"
            f" --endorsement-key {shlex.quote(self.endorsement_key)}"
        )
        note = ["# simulator: this TPM's keys lie in plain files"] if self.backend == "simulator" else []
        return [*note, command]


def append(path: str, form: str, enrolment: Enrolment) -> int:
    """Adds a device to a file of the form csv, json or az, made where it is missing; returns how many it has then.

    The file is replaced as a whole, so that neither a cut nor another `append` at the same time loses a device.
    AskOperator `agent.duplicate`: the registration id or the endorsement key is in it already. `agent.file`: it cannot
    be read or written, or is of another form. RetryLater `agent.busy`: others hold it for LOCK_LIMIT_S.
    """
    path = os.path.realpath(path)
    try:
        with _locked(os.path.dirname(path)):
            content = _read(path)
            text, known = _with(content, form, enrolment, path)
            for registration_id, endorsement_key in known:
                _refuse_duplicate(path, enrolment, registration_id, endorsement_key)
            _replace(path, text.encode())
    except OSError as error:
        raise AskOperator("agent.file", f"{path} cannot be read or written: {error.strerror}") from None
    return len(known) + 1


def _refuse_duplicate(path: str, enrolment: Enrolment, registration_id: str, endorsement_key: str) -> None:
    same_id = registration_id.lower() == enrolment.registration_id.lower()  # as DPS compares them
    if same_id and endorsement_key == enrolment.endorsement_key:
        raise AskOperator("agent.duplicate", f"{path} has this device already, as '{registration_id}'")
    if same_id:
        text = f"{path} has the registration id '{registration_id}' already, with another endorsement key"
        raise AskOperator("agent.duplicate", text)
    if endorsement_key == enrolment.endorsement_key:
        raise AskOperator("agent.duplicate", f"{path} has this TPM already, as '{registration_id}'")


def _with(content: str, form: str, enrolment: Enrolment, path: str) -> tuple[str, list[tuple[str, str]]]:
    """The file with the device in it, and registration id and endorsement key of each that it had."""
    if form == "json":
        records = _records(content, path)
        known = [(record["registrationId"], record["attestation"]["tpm"]["endorsementKey"]) for record in records]
        return "[\n" + ",\n".join(map(to_json, [*records, enrolment.body()])) + "\n]\n", known
    if content and not content.endswith("\n"):
        content += "\n"
    if form == "csv":
        return (content or f"{CSV_HEADER}\n") + f"{enrolment.csv_row()}\n", _rows(content, path)
    return content + "".join(f"{line}\n" for line in enrolment.az_lines()), _az_commands(content, path)


def _rows(content: str, path: str) -> list[tuple[str, str]]:
    found = []
    lines = content.removeprefix("\ufeff").splitlines()
    if lines and lines[0] != CSV_HEADER:
        raise AskOperator("agent.file", f"{path}: expected the header '{CSV_HEADER}'; came {lines[0][:80]!r}")
    for number, line in enumerate(lines, 1):
        cells = [cell.strip() for cell in line.split(",")]
        if line in (CSV_HEADER, ""):  # files that were put together
            continue
        if len(cells) < 2:
            raise AskOperator("agent.file", f"{path}, line {number}: expected {CSV_HEADER}; came {line[:80]!r}")
        found.append((cells[0], cells[1]))
    return found


def _records(content: str, path: str) -> list[dict[str, Any]]:
    try:
        value = from_json(content) if content.strip() else []
        records: list[dict[str, Any]] = value if isinstance(value, list) else [value]
        for record in records:
            key, name = record["attestation"]["tpm"]["endorsementKey"], record["registrationId"]
            if not isinstance(key, str) or not isinstance(name, str):
                raise TypeError
    except (ValueError, KeyError, TypeError):
        text = f"{path}: expected a JSON list of individual TPM enrolments, as 'enroll --format json' writes them"
        raise AskOperator("agent.file", text) from None
    return records


def _az_commands(content: str, path: str) -> list[tuple[str, str]]:
    found = []
    for number, line in enumerate(content.splitlines(), 1):
        if line.startswith(_AZ_COMMAND):
            try:
                words = shlex.split(line)
                flags = dict(zip(words[5::2], words[6::2], strict=True))
                found.append((flags["--enrollment-id"], flags["--endorsement-key"]))
            except (ValueError, KeyError):
                text = f"{path}, line {number}: expected a command as 'enroll --format az' writes it"
                raise AskOperator("agent.file", text) from None
    return found


@contextlib.contextmanager
def _locked(folder: str) -> Iterator[None]:
    """Keeps other appends out of `folder`; the lock is on the folder, for the file itself is replaced."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        until_s = time.monotonic() + LOCK_LIMIT_S
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until_s:
                    raise RetryLater("agent.busy", f"another program keeps {folder} locked") from None
            time.sleep(0.02)
        yield
        os.fsync(fd)  # the file's name
    finally:
        os.close(fd)


def _read(path: str) -> str:
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise AskOperator("agent.file", f"{path}: expected a regular file")
            return file.read().decode()
    except FileNotFoundError:
        return ""
    except ValueError:
        raise AskOperator("agent.file", f"{path}: expected text in UTF-8") from None


def _replace(path: str, content: bytes) -> None:
    """Writes the file anew under another name and gives it its own; mode and owner stay those that it had."""
    part = f"{path}.new"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(part)  # of an append that was cut
    try:
        fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        with open(fd, "wb") as file:
            with contextlib.suppress(FileNotFoundError):
                former = os.stat(path)
                os.fchmod(fd, stat.S_IMODE(former.st_mode))
                if os.geteuid() == 0:
                    os.fchown(fd, former.st_uid, former.st_gid)
            file.write(content)
            file.flush()
            os.fsync(fd)
        os.replace(part, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(part)
        raise
