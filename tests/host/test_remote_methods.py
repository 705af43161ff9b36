"""What whoever may call methods of a device may look at: a check in another process, and the service's own lines."""

import io
import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from dps_agent.host import remote_methods, service
from dps_agent.host.config import load
from dps_agent.host.journal import DEBUG, ERROR, INFO, KEPT_SIZE, WARNING, Journal
from dps_agent.host.remote_methods import ANSWER_LIMIT, RemoteMethods, command_of
from dps_agent.host.service import Service
from dps_agent.hub_effects import AnswerMethod, MethodCall
from support.cloud.emulator import EmulatorInThread
from support.programs.running_agent import PATIENCE_S, RunningAgent
from support.programs.tools import until
from support.tpm.states import copy_state

DEVICE = "press-07"
BOTH = ("check", "journal")


class Far:
    """Whoever calls, and waits for the answers."""

    def __init__(self, *command: str, names: tuple[str, ...] = BOTH) -> None:
        self.journal = Journal(io.StringIO(), True, {})
        self.journal.keep(True)
        self.methods = RemoteMethods(names, command, self.journal, self._take, self._check)
        self._answers: dict[int, AnswerMethod] = {}
        self._came = threading.Condition()
        self._calls = 0
        self.found: list[dict[str, str]] = []  # what checks have found, in short

    def _take(self, answer: AnswerMethod) -> None:
        with self._came:
            self._answers[answer.call_id] = answer
            self._came.notify_all()

    def _check(self, found: dict[str, str]) -> None:
        self.found.append(found)

    def call(self, name: str, payload: bytes = b"") -> int:
        self._calls += 1
        assert self.methods.take(MethodCall(self._calls, name, payload))
        return self._calls

    def answer(self, call_id: int) -> tuple[int, Any]:
        with self._came:
            assert self._came.wait_for(lambda: call_id in self._answers, PATIENCE_S)
        found = self._answers[call_id]
        return found.status, json.loads(found.payload)

    def ask(self, name: str, payload: bytes = b"") -> tuple[int, Any]:
        return self.answer(self.call(name, payload))


def python(code: str) -> tuple[str, ...]:
    """A command that runs this, whatever follows."""
    return (sys.executable, "-c", code)


def test_only_what_is_named_is_answered() -> None:
    far = Far(names=("journal",))
    assert not far.methods.take(MethodCall(1, "check", b"")) and not far.methods.take(MethodCall(1, "open", b""))
    assert far.ask("journal")[0] == 200


# --- the check


def test_a_check_is_this_program_with_the_same_options() -> None:
    far = Far(
        *python("import json, sys; print(json.dumps({'code': 'ok', 'words': sys.argv[1:]}))"), "--config", "a.toml"
    )
    assert far.ask("check") == (200, {"code": "ok", "words": ["--config", "a.toml", "check", "--offline", "--json"]})


def test_a_check_is_not_taken_for_the_service_by_systemd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", "/run/notify")
    monkeypatch.setenv("STATE_DIRECTORY", "/var/lib/x")
    names = "('NOTIFY_SOCKET', 'STATE_DIRECTORY')"
    code = f"import json, os; print(json.dumps({{'code': 'ok', **{{n: os.environ.get(n) for n in {names}}}}}))"
    found = {"code": "ok", "NOTIFY_SOCKET": None, "STATE_DIRECTORY": "/var/lib/x"}
    assert Far(*python(code)).ask("check") == (200, found)


def test_what_a_check_found_is_told_in_short() -> None:
    checks = [("a", "ok"), ("b", "failed"), ("c", "warning"), ("d", "failed"), ("e", "skipped")]
    listed = [{"id": name, "result": result, "detail": "x"} for name, result in checks]
    far = Far(*python(f"import json; print(json.dumps({{'code': 'tpm', 'checks': {listed}}}))"))
    assert far.ask("check")[0] == 200
    assert far.found == [{"code": "tpm", "failed": "b,d", "warning": "c"}]


def test_a_check_that_hangs_is_ended_and_another_one_waits_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_methods, "CHECK_S", 3.0)
    path = tmp_path / "pid"
    code = f"import os, time; open({str(path)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    far = Far(*python(code))
    first = far.call("check")
    assert far.ask("check") == (429, {"message": "a check goes on already"})
    assert far.answer(first) == (504, {"message": "the check was not done within 3 s"})
    if path.exists():  # else it was ended before it could say so
        with pytest.raises(ProcessLookupError):
            os.kill(int(path.read_text()), 0)
    assert far.ask("check")[0] == 504, "the next one begins"


@pytest.mark.parametrize("code", ["", "print('no document')", "print('{' + 'x' * 200000)", "raise SystemExit(7)"])
def test_what_is_no_document_is_no_answer(code: str) -> None:
    status, said = Far(*python(code)).ask("check")
    assert status == 500 and "no answer" in said["message"]


def test_a_check_that_cannot_begin_says_so() -> None:
    status, said = Far("/nowhere/dps-agent").ask("check")
    assert (status, said) == (500, {"message": "the check did not begin: No such file or directory"})


def test_this_program_is_called_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/usr/bin/python3")
    for orig, argv, expected in (
        (["python3", "-IS", "/usr/bin/dps-agent", "run"], ["/usr/bin/dps-agent", "run"], ["-IS", "/usr/bin/dps-agent"]),
        (["python3", "-m", "a.b", "-v", "run"], ["/x/a/b.py", "-v", "run"], ["-m", "a.b"]),
        (["python3", "/v/bin/dps-agent"], ["/v/bin/dps-agent"], ["/v/bin/dps-agent"]),
    ):
        monkeypatch.setattr(sys, "orig_argv", orig)
        monkeypatch.setattr(sys, "argv", argv)
        assert command_of(["--config", "a"]) == ["/usr/bin/python3", *expected, "--config", "a"]


# --- the journal


def test_the_journal_gives_the_lines_of_a_level_and_of_worse_ones() -> None:
    far = Far()
    for level, text in ((ERROR, "one"), (WARNING, "two\nlines"), (INFO, "three")):
        far.journal.event("warning", text, level, code="tpm.denied")
    far.journal.detail("four")
    status, found = far.ask("journal")
    assert status == 200 and found["leftOut"] == 0
    assert [line["message"] for line in found["lines"]] == [
        "one [tpm.denied]",
        "two | lines [tpm.denied]",
        "three [tpm.denied]",
        "four",
    ]
    assert found["lines"][0] | {"time": ""} == {
        "time": "", "level": "error", "event": "warning", "code": "tpm.denied", "message": "one [tpm.denied]",
    }  # fmt: skip
    assert found["lines"][3]["level"] == "debug" and found["lines"][3]["time"].endswith("Z")
    for payload, count in (
        (b'{"level": "error"}', 1),
        (b'"warning"', 2),
        (b'{"level": "info"}', 3),
        (b"{}", 4),
        (b"null", 4),
    ):
        assert len(far.ask("journal", payload)[1]["lines"]) == count
    for payload in (b'{"level": "loud"}', b"[]", b"7", b'{"level": 3}', b"{"):
        assert far.ask("journal", payload)[0] == 400, payload


def test_what_is_kept_and_what_is_answered_are_bounded_and_the_newest_stay() -> None:
    far = Far()
    for number in range(3000):
        far.journal.event("local", f"{number} {'ü' * 300}")
    kept = far.journal.kept(DEBUG)
    assert sum(len(line["message"]) for line in kept) <= KEPT_SIZE and kept[-1]["message"].startswith("2999 ")
    call_id = far.call("journal")
    status, found = far.answer(call_id)
    assert status == 200 and len(far._answers[call_id].payload) <= ANSWER_LIMIT
    assert found["lines"][-1]["message"].startswith("2999 ") and found["leftOut"] == len(kept) - len(found["lines"]) > 0


def test_nothing_is_kept_where_nobody_may_ask() -> None:
    journal = Journal(io.StringIO(), True, {})
    journal.detail("one")
    journal.keep(True)
    journal.keep(True)
    journal.detail("two")
    assert [line["message"] for line in journal.kept(DEBUG)] == ["two"]
    journal.keep(False)
    journal.detail("three")
    assert journal.kept(DEBUG) == []


# --- a service that runs


def reported(emulator: EmulatorInThread) -> dict[str, Any]:
    """What the twin has of the agent."""
    found: dict[str, Any] = emulator.twin(DEVICE)["reported"].get("dpsAgent", {})
    return found


def test_the_twin_has_the_last_error_once_the_device_is_connected_again(
    tmp_path: Path, emulator: EmulatorInThread
) -> None:
    tpm = f'backend = "simulator"\ntcti = "{copy_state("press-07", tmp_path / "tpm")}"'
    with RunningAgent(tmp_path, emulator, tpm) as agent:
        agent.start()
        agent.await_connected()
        assert until(lambda: "agentVersion" in reported(emulator), PATIENCE_S)
        assert "lastError" not in reported(emulator)
        emulator.disconnect(DEVICE)
        agent.await_connected(2)
        assert until(lambda: "lastError" in reported(emulator), PATIENCE_S)
        error = reported(emulator)["lastError"]
        assert (error["code"], sorted(error)) == ("hub.lost", ["at", "code", "message"])
        agent.end()
        agent.start()
        agent.await_connected()
        assert until(lambda: "lastError" not in reported(emulator), PATIENCE_S)  # none since this start
        assert agent.end()[0] == 0


class Clock:
    """A monotonic clock that a test sets."""

    now_s = 1000.0

    def monotonic(self) -> float:
        return self.now_s

    def time(self) -> float:
        return 1_800_000_000.0


def test_the_twin_is_told_what_changed_and_once_a_minute_at_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = [f"state_dir={tmp_path}", f"runtime_dir={tmp_path}", "id_scope=0ne0", "api.socket=none"]
    overrides += ["tpm.backend=simulator", f"tpm.tcti={tmp_path}", "endpoint=https://localhost"]
    found = Service(lambda: load("/dev/null", overrides=overrides, environ={}), Journal(io.StringIO(), environ={}))
    found._begin_life()
    clock = Clock()
    monkeypatch.setattr(service, "time", clock)
    told: list[tuple[str, Any]] = []
    monkeypatch.setattr(found._life, "report", lambda name, value: told.append((name, value["code"])))
    assert not found._tell_news()
    for code in ("network.dns", "network.dns", "hub.lost"):
        found._note_news("lastError", {"code": code, "message": f"{clock.now_s}"}, ("code",))
        clock.now_s += 10
        found._tell_news()
    assert told == [("lastError", "network.dns")], "a second one has to wait for its minute, the same one is no news"
    clock.now_s += 41
    found._checked({"code": "ok", "failed": "", "warning": ""})
    assert found._tell_news() and told[1:] == [("lastError", "hub.lost"), ("lastCheck", "ok")]
    clock.now_s += 61
    found._checked({"code": "ok", "failed": "", "warning": ""})
    assert not found._tell_news(), "nothing changed"


def test_a_service_answers_both_from_far_away_and_serves_its_programs_meanwhile(
    tmp_path: Path, emulator: EmulatorInThread
) -> None:
    folder = copy_state("press-07", tmp_path / "tpm")
    tpm = f'backend = "simulator"\ntcti = "{folder}"'
    with RunningAgent(tmp_path, emulator, tpm) as agent:
        agent.start()
        agent.await_connected()
        assert emulator.invoke(DEVICE, "check")[0] == 404, "they are off unless a setting names them"
        settings = agent.settings.read_text()
        agent.settings.write_text(settings.replace("[hub]", '[hub]\nremote_methods = ["check", "journal"]'))
        agent.end()
        agent.start()
        agent.await_connected()
        done = threading.Event()
        answered: list[tuple[int, Any]] = []

        def ask() -> None:
            answered.append(emulator.invoke(DEVICE, "check"))
            done.set()

        asking = threading.Thread(target=ask)
        asking.start()
        served = 0
        while not done.is_set():
            assert agent.client.ask("POST", "/telemetry", b"1")[0] == 200
            served += 1
        asking.join()
        ((status, document),) = answered
        if status == 504:  # so slow is a machine with too much to do; what the check says is tested above
            assert document == {"message": "the check was not done within 24 s"}
        else:
            assert status == 200 and document["schema"] == "dps-agent/1" and document["verb"] == "check"
            found = {check["id"]: check["result"] for check in document["checks"]}
            assert found["tpm-self-challenge"] == found["record-seal"] == "ok" and "dns" not in found
        assert served
        if status == 200:  # the twin is told
            assert until(
                lambda: (reported(emulator).get("lastCheck") or {}).get("code") == document["code"], PATIENCE_S
            )
            assert reported(emulator)["lastCheck"]["failed"] == "" and "Z" in reported(emulator)["lastCheck"]["at"]
        status, journal = emulator.invoke(DEVICE, "journal", {"level": "notice"})
        assert status == 200 and [line["event"] for line in journal["lines"] if line["event"] == "connected"]
        assert {line["level"] for line in journal["lines"]} <= {"error", "warning", "notice"}
        assert agent.end()[0] == 0
