"""The direct methods by which an operator far away looks at this device: those that [hub] remote_methods names.

`check` is what `dps-agent check --offline` finds, the same document, and `journal` what the service itself has written
last: no right to read the system's journal is needed. Neither changes anything.

A check is another process, for it reads keys, makes one and waits for a TPM: the service goes on meanwhile, and what
hangs is ended. The thread `dps-check` waits for it; it is started by a call and ends with its answer, within CHECK_S.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from typing import TYPE_CHECKING

from dps_agent.host.journal import DEBUG, LEVELS
from dps_agent.host.local.routes import ANSWER_LIMIT
from dps_agent.hub_effects import AnswerMethod
from dps_hal.platform import from_json, to_json

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from dps_agent.host.journal import Journal
    from dps_agent.hub_effects import MethodCall

CHECK_S = 24.0  # the session answers for whoever has not within 25 s
NICENESS = 10  # of a check: the service comes first


class RemoteMethods:
    """Answers the methods of these names, if they are "check" or "journal".

    `command` is how this program was called, as `command_of` has it, without a verb. `answer` takes the answers, and
    `checked` what a check has found, both on any thread.
    """

    def __init__(
        self,
        names: Sequence[str],
        command: Sequence[str],
        journal: Journal,
        answer: Callable[[AnswerMethod], object],
        checked: Callable[[dict[str, str]], None],
    ) -> None:
        self._checked = checked
        self._names = names
        self._command = command
        self._journal = journal
        self._answer = answer
        self._checking = threading.Lock()  # held while a check goes on

    def take(self, call: MethodCall) -> bool:
        """Answers the call, now or later; False where it is for the programs."""
        if call.name not in self._names:
            return False
        if call.name == "journal":
            self._answer(AnswerMethod(call.call_id, *self._lines(call.payload)))
        elif self._checking.acquire(blocking=False):
            threading.Thread(target=self._check, args=(call.call_id,), name="dps-check", daemon=True).start()
        else:
            self._answer(AnswerMethod(call.call_id, 429, _said("a check goes on already")))
        return True

    def _check(self, call_id: int) -> None:
        try:
            status, payload = self._found()
            if status == 200:
                self._checked(_in_short(payload))
        finally:
            self._checking.release()
        self._answer(AnswerMethod(call_id, status, payload))

    def _found(self) -> tuple[int, bytes]:
        import subprocess

        words = [*self._command, "check", "--offline", "--json"]
        systemds = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")
        environ = {name: value for name, value in os.environ.items() if name not in systemds}
        nothing = subprocess.DEVNULL
        try:
            process = subprocess.Popen(words, stdin=nothing, stdout=subprocess.PIPE, stderr=nothing, env=environ)
        except OSError as error:
            return 500, _said(f"the check did not begin: {error.strerror}")
        with process:
            with contextlib.suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, process.pid, NICENESS)
            try:
                document, _ = process.communicate(timeout=CHECK_S)
            except subprocess.TimeoutExpired:
                process.kill()
                return 504, _said(f"the check was not done within {CHECK_S:g} s")
        if not document.startswith(b"{") or len(document) > ANSWER_LIMIT:
            return 500, _said(
                f"the check ended with {process.returncode}, and {len(document)} bytes that are no answer"
            )
        return 200, document.strip()

    def _lines(self, payload: bytes) -> tuple[int, bytes]:
        """The kept lines of the level in the payload, and of worse ones: the newest, as far as an answer has room."""
        try:
            level = _level_in(payload)
        except ValueError as wrong:
            return 400, _said(str(wrong))
        chosen: list[str] = []
        kept = self._journal.kept(level)
        room = ANSWER_LIMIT - len('{"lines":[],"leftOut":1000000}')
        for line in reversed(kept):
            text = to_json(line)
            room -= len(text.encode()) + 1
            if room < 0:
                break
            chosen.append(text)
        left_out = len(kept) - len(chosen)
        return 200, f'{{"lines":[{",".join(reversed(chosen))}],"leftOut":{left_out}}}'.encode()


def command_of(options: Sequence[str]) -> list[str]:
    """How this program was called, with these options and without a verb."""
    own = len(sys.orig_argv) - len(sys.argv) + 1  # the interpreter, its options, and the program
    return [sys.executable, *sys.orig_argv[1:own], *options]


def _in_short(document: bytes) -> dict[str, str]:
    """What a check found, for the twin: its code, and the ids of the checks that failed or warn."""
    found = from_json(document)
    results = {
        result: ",".join(check["id"] for check in found.get("checks", ()) if check["result"] == result)
        for result in ("failed", "warning")
    }
    return {"code": found["code"], **results}


def _level_in(payload: bytes) -> int:
    """The number of the level in `{"level": "warning"}`; DEBUG where there is none."""
    asked: Any = from_json(payload) if payload else None
    name = asked.get("level", "debug") if isinstance(asked, dict) else "debug" if asked is None else asked
    if name not in LEVELS.values():
        raise ValueError(f'expected {{"level": one of {", ".join(LEVELS.values())}}}')
    return next((number for number, known in LEVELS.items() if known == name), DEBUG)


def _said(message: str) -> bytes:
    return to_json({"message": message}).encode()
