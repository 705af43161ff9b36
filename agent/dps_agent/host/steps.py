"""One line for each step of an exchange, with its duration; never a body, a token or a key."""

from __future__ import annotations

import contextlib

from dps_agent.effects import Commit, Http, ImportKey, LoadRecord, NoReply, ReadEndorsementKey, ReadStorageRootKey, Sign
from dps_agent.host.printed import printable
from dps_agent.messages import ASSIGNED, REQUEST_ID_HEADER
from dps_hal.contracts import IDENTITY
from dps_hal.errors import DpsError
from dps_hal.platform import from_json

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Protocol

    class Lines(Protocol):
        """What takes the lines: a text file, or `dps_agent.host.journal.Journal`."""

        def write(self, text: str, /) -> object: ...
        def flush(self) -> object: ...


_WIDTH = 44  # columns before the duration


class StepLines:
    """Writes what a runner observes to `stream`; with `verbose` also requests, sizes and small steps."""

    def __init__(self, stream: Lines, verbose: bool) -> None:
        self._stream = stream
        self._verbose = verbose
        self._key = "challenge"  # the name of the key that the next ImportKey carries
        self._read: set[str] = set()  # the steps that are worth one line only
        self._limit_shown = False

    def observe(self, effect: Any, answer: Any, seconds: float) -> None:
        """One effect and its answer, or the error it ended in, after `seconds`."""
        step = self._step(effect, answer)
        if not step:
            return
        if isinstance(answer, DpsError):
            step = f"{step}: {answer.code}"
        elif isinstance(effect, (ReadEndorsementKey, ReadStorageRootKey)):
            if step in self._read and not self._verbose:
                return  # it was asked for again and answered from memory
            self._read.add(step)
        self._line(f"{step:<{_WIDTH}} {_duration(seconds):>8}")
        if self._verbose and isinstance(effect, Http):
            self._line(f"    {_request(effect, answer)}")

    def wait(self, reason: str, delay_s: float, limit_s: float) -> None:
        """A wait that begins now, of an exchange that takes `limit_s` at most."""
        if delay_s <= 0:
            return
        if not self._limit_shown:
            self._limit_shown = True
            self._line(f"goes on for {limit_s:g} s at most, waits included")
        self._line(f"wait {_duration(delay_s)} ({reason})")

    def _step(self, effect: Any, answer: Any) -> str:
        """What to call an effect, "" for one that is not shown."""
        if isinstance(effect, Http):
            return self._http(effect, answer)
        if isinstance(effect, ReadEndorsementKey):
            return "read endorsement key"
        if isinstance(effect, ReadStorageRootKey):
            return "read storage root key"
        if isinstance(effect, ImportKey):
            return f"import {self._key} key"
        if isinstance(effect, Sign):
            sealing = effect.message[:1] == b"\x00"  # no token's text begins with a zero byte
            return "sign seal" if sealing else "sign token"
        if isinstance(effect, Commit):
            if effect.record == IDENTITY:
                return "store assignment"
            return f"store {effect.record}" if self._verbose else ""
        if isinstance(effect, LoadRecord):
            return f"load {effect.record}" if self._verbose else ""
        return ""

    def _http(self, effect: Http, answer: Any) -> str:
        operation = {"PUT": "register", "POST": "status lookup"}.get(effect.method, "operation status")
        if effect.path == "/":
            operation = "ask the time"
        if isinstance(answer, DpsError):
            return operation
        if isinstance(answer, NoReply):
            return f"{operation} → no answer ({answer.reason})"
        if answer.status == 401 and effect.method == "PUT" and effect.authorization is None:
            self._key = "challenge"
            return f"{operation} → 401 challenge"
        status = _registration_status(answer.body)
        if status == ASSIGNED:
            self._key = "hub"
        return f"{operation} → {answer.status} {status}".rstrip()

    def _line(self, text: str) -> None:
        # progress is a courtesy: a closed stderr must not end a registration
        with contextlib.suppress(OSError):
            self._stream.write(printable(text) + "\n")
            self._stream.flush()


def _duration(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


def _registration_status(body: bytes) -> str:
    """The word in the body's `status`, "" where there is none."""
    try:
        content = from_json(body)
    except ValueError:
        return ""
    status = content.get("status") if isinstance(content, dict) else None
    return status[:40] if isinstance(status, str) else ""


def _request(effect: Http, answer: Any) -> str:
    """One request for `--verbose`: method, path, sizes, status, request id."""
    sent = f"{effect.method} {effect.path} {len(effect.body)} B{'' if effect.authorization is None else ' with token'}"
    if isinstance(answer, (DpsError, NoReply)):
        return sent
    request_id = answer.headers.get(REQUEST_ID_HEADER, "")
    return f"{sent} → {answer.status} {len(answer.body)} B" + (f" request id {request_id}" if request_id else "")
