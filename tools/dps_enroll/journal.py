"""What has been done, on the disk before anything else is done: a run that was killed is gone on with.

A line of JSON for each device, behind one that names the service. A line counts when it is whole; whatever a kill left
of the last one is cut off.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import threading
from collections.abc import Sequence
from types import TracebackType
from typing import NamedTuple

from dps_hal.errors import AskOperator

FORM = 1


class Done(NamedTuple):
    """What became of one device."""

    registration_id: str
    endorsement_key: str  # base64 of its TPM2B_PUBLIC
    result: str  # a word of `enrol.RESULTS`
    detail: str  # in words, often empty
    policy: str = ""  # the credentialPolicyName that the enrolment was to have

    @property
    def key(self) -> tuple[str, str]:
        """A device of another key under the same id is another device."""
        return device_key(self.registration_id, self.endorsement_key)


def device_key(registration_id: str, endorsement_key: str) -> tuple[str, str]:
    """What the journal knows a device by: its id as DPS compares it, and the SHA-256 of its key."""
    return registration_id.lower(), hashlib.sha256(endorsement_key.encode("utf-8", "surrogatepass")).hexdigest()


class Journal:
    """A file that one run at a time writes to; any of its threads may call `add`.

    AskOperator `config.invalid` where the file is another program's, another run's at this moment, or about another
    service.
    """

    def __init__(self, path: str, service: str) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._results: dict[tuple[str, str], tuple[str, str, str]] = {}  # with the policy
        try:
            self._file = open(path, "a+b")  # noqa: SIM115 (closed by __exit__)
        except OSError as error:
            raise AskOperator("config.invalid", f"journal {path}: {error.strerror}") from None
        try:
            self._take(service)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "Journal":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def __len__(self) -> int:
        return len(self._results)

    def result(self, registration_id: str, endorsement_key: str, policy: str) -> tuple[str, str] | None:
        """Result and detail of a device that an earlier run, or this one, is done with; `policy` as in `Done`.

        None where one is wanted, and the result is of an enrolment that was to have another one, or none.
        """
        result, detail, had = self._results.get(device_key(registration_id, endorsement_key), ("", "", ""))
        return (result, detail) if result and policy in ("", had) else None

    def add(self, done: Sequence[Done]) -> None:
        """Writes down what became of these; on the disk when this returns."""
        lines = "".join(
            json.dumps({"id": id_, "ek": ek, "result": each.result, "detail": each.detail, "policy": each.policy})
            + "\n"
            for each in done
            for id_, ek in [each.key]
        )
        with self._lock:
            self._file.write(lines.encode())
            self._file.flush()
            os.fsync(self._file.fileno())
            self._results.update({each.key: (each.result, each.detail, each.policy) for each in done})

    def _take(self, service: str) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise self._wrong("another dps-enroll is writing to it") from None
        self._file.seek(0)
        content = self._file.read()
        whole = content[: content.rfind(b"\n") + 1]
        first = json.dumps({"dpsEnrollJournal": FORM, "service": service}).encode() + b"\n"
        if not whole:
            if not first.startswith(content):
                raise self._wrong("expected a journal of dps-enroll, or no file: name another file")
            self._file.truncate(0)
            self._file.write(first)
            self._file.flush()
            os.fsync(self._file.fileno())
            _sync_folder(self._path)
            return
        try:
            head, *lines = map(json.loads, whole.splitlines())
            form, written_for = head["dpsEnrollJournal"], head["service"]
            if form != FORM:
                raise ValueError(f"expected form {FORM}; came {form}")
            self._results = {
                (line["id"], line["ek"]): (line["result"], line["detail"], line.get("policy", "")) for line in lines
            }
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise self._wrong(f"expected a journal of dps-enroll; {error!r}: name another file") from None
        if written_for != service:
            raise self._wrong(f"it is about {written_for}, this run about {service}: name another file")
        self._file.truncate(len(whole))

    def _wrong(self, why: str) -> AskOperator:
        return AskOperator("config.invalid", f"journal {self._path}: {why}")


def _sync_folder(path: str) -> None:
    """Puts the file's name on the disk, where the folder's file system can."""
    with contextlib.suppress(OSError):
        folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
