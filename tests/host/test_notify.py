"""What systemd hears of the service."""

import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dps_agent.host.notify import Notifier


@pytest.fixture
def systemd(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "notify"))
        listener.settimeout(60)
        yield listener


def heard(systemd: socket.socket) -> list[str]:
    """All that was said so far."""
    found = []
    systemd.setblocking(False)
    try:
        while True:
            found.append(systemd.recv(4096).decode())
    except BlockingIOError:
        return found


def notifier(systemd: socket.socket, **more: str) -> Notifier:
    return Notifier({"NOTIFY_SOCKET": systemd.getsockname(), **more})


def test_each_message_is_as_sd_notify_has_it(systemd: socket.socket) -> None:
    ours = notifier(systemd)
    ours.ready()
    ours.status("connected")
    began_ns = time.monotonic_ns()
    ours.reloading()
    ours.stopping()
    ready, status, reloading, stopping = heard(systemd)
    assert (ready, status, stopping) == ("READY=1", "STATUS=connected", "STOPPING=1")
    word, moment = reloading.split("\n")
    assert word == "RELOADING=1"
    assert began_ns // 1000 <= int(moment.removeprefix("MONOTONIC_USEC=")) <= time.monotonic_ns() // 1000
    ours.close()


def test_a_status_is_one_line_and_said_once(systemd: socket.socket) -> None:
    ours = notifier(systemd)
    for _ in range(3):
        ours.status("one\nREADY=1")
    ours.status("y" * 5000)
    first, second = heard(systemd)
    assert first == "STATUS=one READY=1" and len(second) < 500
    ours.close()


def test_the_watchdog_is_fed_several_times_in_its_time_and_no_more(
    systemd: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = notifier(systemd, WATCHDOG_USEC="400000", WATCHDOG_PID=str(os.getpid()))
    assert ours.watchdog_s == 0.4
    for passed_ms in range(1, 451):
        monkeypatch.setattr(time, "monotonic", lambda now_s=1000 + passed_ms / 1000: now_s)
        ours.alive()
    monkeypatch.undo()
    assert 4 <= len(heard(systemd)) <= 6
    ours.close()


@pytest.mark.parametrize("more", [{}, {"WATCHDOG_USEC": "1", "WATCHDOG_PID": "1"}, {"WATCHDOG_USEC": "soon"}])
def test_a_watchdog_that_is_not_ours_is_not_fed(more: dict[str, str], systemd: socket.socket) -> None:
    ours = notifier(systemd, **more)
    ours.alive()
    assert (ours.watchdog_s, heard(systemd)) == (0.0, [])
    ours.close()


@pytest.mark.parametrize("environ", [{}, {"NOTIFY_SOCKET": ""}, {"NOTIFY_SOCKET": "vsock:2:1"}])
def test_without_systemd_nothing_is_said(environ: dict[str, str]) -> None:
    ours = Notifier(environ)
    ours.ready()
    ours.close()


def test_an_abstract_socket_is_reached_and_one_that_is_gone_is_no_failure() -> None:
    name = f"dps-agent-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind("\0" + name)
        ours = Notifier({"NOTIFY_SOCKET": "@" + name})
        ours.ready()
        assert heard(listener) == ["READY=1"]
    ours.stopping()
    ours.close()
    ours.close()
