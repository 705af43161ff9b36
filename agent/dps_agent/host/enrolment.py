"""A device as a factory writes it down, and the files that hold many of them."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shlex
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

from dps_hal.errors import AskOperator, RetryLater
from dps_hal.host.regular import read_regular, replace_file
from dps_hal.platform import to_json
from dps_text import BYTE_ORDER_MARK, text_of, without_mark
from dps_text.enrolments import EnrolmentList, Entry, ListError, Named, read_enrolments

CSV_HEADER = "registrationId,endorsementKey,backend,ekCertificateSha256"
LOCK_LIMIT_S = 30.0
FILE_LIMIT = 64 * 1024 * 1024  # bytes; a hundred thousand devices
_AZ_COMMAND = "az iot dps enrollment create "


class Enrolment(NamedTuple):
    """One device: what the Device Provisioning Service must know, and where it came from."""

    registration_id: str
    endorsement_key: str  # base64 of its TPM2B_PUBLIC
    backend: str
    certificate_sha256: str  # SHA-256 of the EK certificate in DER, hex; empty where none can be read

    def csv_row(self) -> str:
        """The columns of CSV_HEADER; none of them can hold a comma or a quote."""
        return ",".join(self)

    def cells(self) -> dict[str, str]:
        """The same by the names of the columns."""
        return dict(zip(CSV_HEADER.split(","), self, strict=True))

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


class Appended(NamedTuple):
    """How many TPMs the file enrols now, and a sentence for each entry in it that is of another kind, or odd."""

    devices: int
    notes: list[str]


def append(path: str, form: str, enrolment: Enrolment) -> Appended:
    """Adds a device to a file of the form csv, json or az, made where it is missing.

    The file is replaced as a whole, so that neither a cut nor another `append` at the same time loses a device. CSV
    and JSON are read as the emulator's import reads them, and a CSV file keeps its delimiter and its columns.
    AskOperator `agent.duplicate`: the registration id or the endorsement key is in it already. `agent.file`: it cannot
    be read or written, or is of another form. RetryLater `agent.busy`: others hold it for LOCK_LIMIT_S.
    """
    path = os.path.realpath(path)
    try:
        with _locked(os.path.dirname(path)):
            content = _read(path)
            try:
                listed = _listed(text_of(content), form)
            except ValueError as error:  # NotText, ListError
                raise AskOperator("agent.file", f"{path}: {error}") from None
            for named in listed.named:
                _refuse_duplicate(path, enrolment, named)
            replace_file(path, _with(content, form, enrolment, listed))
    except OSError as error:
        raise AskOperator("agent.file", f"{path} cannot be read or written: {error.strerror}") from None
    notes = [
        f"line {other.line}: '{other.registration_id}' is an enrolment of the kind {other.kind}"
        for other in listed.others
    ]
    return Appended(len(listed.entries) + 1, notes + [str(odd) for odd in listed.odd])


def _refuse_duplicate(path: str, enrolment: Enrolment, named: Named) -> None:
    same_id = named.registration_id.lower() == enrolment.registration_id.lower()  # as DPS compares them
    same_key = named.endorsement_key == enrolment.endorsement_key
    if same_id and same_key:
        raise AskOperator("agent.duplicate", f"{path} has this device already, as '{named.registration_id}'")
    if same_id:
        which = "with another endorsement key" if named.endorsement_key else "without an endorsement key"
        text = f"{path} has the registration id '{named.registration_id}' already, {which}, in line {named.line}"
        raise AskOperator("agent.duplicate", text)
    if same_key:
        raise AskOperator("agent.duplicate", f"{path} has this TPM already, as '{named.registration_id}'")


def _listed(text: str, form: str) -> EnrolmentList:
    """What a file holds that is to be of this form; ListError."""
    if form == "az":
        return _az_commands(text)
    if not text.strip():
        return EnrolmentList([], [], [], [])
    listed = read_enrolments(text)
    if form == "json" and listed.delimiter:
        raise ListError("expected a JSON list of enrolments; came CSV")
    if form == "csv" and not listed.delimiter:
        raise ListError("expected CSV; came JSON")
    return listed


def _with(content: bytes, form: str, enrolment: Enrolment, listed: EnrolmentList) -> bytes:
    """The file with the device at its end: what was there stays byte for byte, the rest has its first line's end."""
    line_end = "\r\n" if content.partition(b"\n")[0].endswith(b"\r") else "\n"
    text = without_mark(content).decode()
    mark = BYTE_ORDER_MARK if content.startswith(BYTE_ORDER_MARK) else b""
    if form == "json":
        text = text.rstrip() or "["
        text = text.removesuffix("]").rstrip() if text.lstrip()[0] == "[" else f"[{line_end}{text}"
        comma = "," if text.strip() != "[" else ""
        added = [f"{text}{comma}", to_json(enrolment.body()), "]"]
    else:
        if text and not text.endswith("\n"):
            text += line_end
        if form == "az":
            added = enrolment.az_lines()
        elif listed.delimiter:
            added = [listed.row(enrolment.cells())]
        else:
            added = [CSV_HEADER, enrolment.csv_row()]
        added[0] = text + added[0]
    return mark + "".join(f"{line}{line_end}" for line in added).encode()


def _az_commands(text: str) -> EnrolmentList:
    found = EnrolmentList([], [], [], [])
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith(_AZ_COMMAND):
            try:
                words = shlex.split(line)
                flags = dict(zip(words[5::2], words[6::2], strict=True))
                registration_id, endorsement_key = flags["--enrollment-id"], flags["--endorsement-key"]
            except (ValueError, KeyError):
                raise ListError(f"line {number}: expected a command as 'enroll --format az' writes it") from None
            found.named.append(Named(number, registration_id, endorsement_key))
            tpm = {"endorsementKey": endorsement_key}
            found.entries.append(Entry(number, {"registrationId": registration_id, "attestation": {"tpm": tpm}}))
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
        os.fsync(fd)  # the folder, so that the file's name is durable
    finally:
        os.close(fd)


def _read(path: str) -> bytes:
    try:
        return read_regular(path, FILE_LIMIT)
    except FileNotFoundError:
        return b""
