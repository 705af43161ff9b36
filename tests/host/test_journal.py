"""The service's lines: fields of the journal where it listens, plain text elsewhere, and the catalogue of remedies."""

import io
import os
import re
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from dps_agent.host import journal as journal_module
from dps_agent.host.journal import ERROR, EVENTS, Journal, message_id
from dps_hal.host.codes import REMEDIES
from generated_files import catalog


class Journald:
    """A socket that takes what systemd's journal would take."""

    def __init__(self, folder: Path) -> None:
        self.path = str(folder / "journal")
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(self.path)
        self._socket.settimeout(60)

    def entry(self) -> dict[str, str]:
        text = self._socket.recv(65536).decode()
        assert text.endswith("\n")
        return dict(line.split("=", 1) for line in text.splitlines())

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def journald(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Journald]:
    found = Journald(tmp_path)
    monkeypatch.setattr(journal_module, "JOURNAL_SOCKET", found.path)
    yield found
    found.close()


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    """A Journal whose stream is the one that $JOURNAL_STREAM names."""
    with (tmp_path / "stderr").open("w") as stream:
        status = os.fstat(stream.fileno())
        found = Journal(stream, False, {"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"})
        yield found
        found.close()


def test_an_event_has_its_fields_in_the_journal(journald: Journald, journal: Journal, tmp_path: Path) -> None:
    fields = {"state": "halted", "code": "dps.ek_mismatch", "hub": "h.azure-devices.net", "request_id": "r-1"}
    journal.event("halted", "another key", ERROR, retry_s=60, **fields)  # type: ignore[arg-type]
    assert journald.entry() == {
        "MESSAGE": "another key",
        "PRIORITY": "3",
        "SYSLOG_IDENTIFIER": "dps-agent",
        "DPS_EVENT": "halted",
        "DPS_STATE": "halted",
        "DPS_CODE": "dps.ek_mismatch",
        "DPS_HUB": "h.azure-devices.net",
        "DPS_RETRY_S": "60",
        "DPS_REQUEST_ID": "r-1",
        "MESSAGE_ID": message_id("dps.ek_mismatch"),
    }
    journal.event("connected", "connected")
    assert "DPS_CODE" not in (entry := journald.entry()) and entry["MESSAGE_ID"] == message_id("connected")
    assert (tmp_path / "stderr").read_text() == ""


def test_nothing_can_add_a_field_or_a_line(journald: Journald, journal: Journal) -> None:
    journal.event("waiting", "one\nPRIORITY=0", request_id="x\nMESSAGE_ID=0")
    entry = journald.entry()
    assert (entry["MESSAGE"], entry["PRIORITY"]) == ("one | PRIORITY=0", "6")
    assert entry["MESSAGE_ID"] == message_id("waiting")
    plain = io.StringIO()
    Journal(plain, environ={}).event("waiting", "one\n\x1b[2Jtwo")
    assert plain.getvalue() == "one | \\x1b[2Jtwo\n"


def test_elsewhere_it_is_one_plain_line_with_the_code() -> None:
    plain = io.StringIO()
    journal = Journal(plain, environ={"JOURNAL_STREAM": "8:15"})
    journal.event("halted", "no key", code="dps.ek_mismatch", request_id="r-1")
    assert plain.getvalue() == "no key [dps.ek_mismatch] [request id r-1]\n"


def test_details_are_shown_only_when_verbose() -> None:
    for verbose, expected in ((False, ""), (True, "one\ntwo\n")):
        plain = io.StringIO()
        journal = Journal(plain, verbose, {})
        assert journal.write("one\ntwo\n") == 8
        assert plain.getvalue() == expected


def test_a_journal_that_is_gone_or_full_costs_the_line_only(journald: Journald, journal: Journal) -> None:
    for _ in range(5000):  # nobody reads
        journal.event("connected", "x" * 1000)
    Path(journald.path).unlink()
    journal.event("connected", "x")
    closed = io.StringIO()
    closed.close()
    Journal(closed, environ={}).event("connected", "x")


def test_every_event_and_code_has_its_own_entry_with_the_remedy() -> None:
    ids = re.findall(r"(?m)^-- ([0-9a-f]{32})$", catalog())
    assert len(set(ids)) == len(ids) == len(EVENTS) + len(REMEDIES)
    assert not set(EVENTS) & set(REMEDIES)
    for code, remedy in REMEDIES.items():
        entry = catalog().split(f"-- {message_id(code)}\n")[1].split("\n-- ")[0]
        assert code in entry and remedy[1:] in entry
        assert re.search(r"[^.?][.?]\n?$", entry), f"{code}: how its sentence ends"


def test_an_id_never_changes() -> None:
    assert message_id("connected") == "bbc4fcfaa4d49284b51c1db5458aa9ec"


def test_each_entry_has_the_form_that_journalctl_reads() -> None:
    _, *entries = catalog().split("\n-- ")
    for entry in entries:
        head, text = entry.split("\n\n", 1)
        number, *fields = head.split("\n")
        assert re.fullmatch("[0-9a-f]{32}", number)
        assert [field.split(": ")[0] for field in fields] == ["Subject", "Defined-By", "Documentation"]
        assert text.strip() and not text.startswith("-")


def test_a_pipe_that_nobody_reads_holds_nobody_up() -> None:
    reads, writes = os.pipe()
    with os.fdopen(reads, "rb") as reader, os.fdopen(writes, "w") as stream:
        journal = Journal(stream, True, {})

        def speak() -> None:
            for _ in range(100):  # it has room for 16
                journal.event("local", "x" * 5000)

        speaker = threading.Thread(target=speak, daemon=True)
        speaker.start()
        speaker.join(60)
        stood = speaker.is_alive()
        taken = os.read(reader.fileno(), 1 << 20)
        assert not stood and taken.endswith(b"\n")
        journal.event("local", "heard again")
        assert os.read(reader.fileno(), 1 << 20) == b"heard again\n"
