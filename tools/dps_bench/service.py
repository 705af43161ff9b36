"""`dps-agent run` connected to its hub: with nothing to do, connecting again, and sending what programs give it."""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from dps_bench.clients import timed
from dps_bench.commands import BACK_ENDS
from dps_bench.costs import CommandFailed, cpu_ms, memory_mib
from dps_bench.desk import PAYLOAD_SIZE, REGISTRATION_ID, Desk
from dps_bench.report import Report
from support.programs.running_agent import RunningAgent

if TYPE_CHECKING:
    import socket
    import subprocess
    from collections.abc import Callable

_HEAD = f"POST /telemetry HTTP/1.1\r\nHost: localhost\r\nContent-Length: {PAYLOAD_SIZE}\r\n\r\n"
MESSAGE = _HEAD.encode() + bytes(PAYLOAD_SIZE)
RECONNECT_LIMIT_S = 360  # more than the longest wait between two connections, HUB_LIMIT_S
SETTLE_S = 15  # a new connection does a few more things: the twin, the older identity
PEAK_LIMIT_MIB = {"wire": 28.5, "esys": 46}  # what `run` may take at its peak, with Debian 12's Python
CPU_LIMIT_PERCENT = 0.1  # of one processor, connected with nothing to do
ROUNDS = 10  # rounds in which each sender has its turn
NO_AZURE = "azure-iot-device, which could not be installed"
AT_ONCE = 16  # messages, and connections of the library
LIBRARY, LIBRARY_AT_ONCE = "agent, client library", f"agent, client library, {AT_ONCE} connections"
AZURE, AZURE_AT_ONCE = "azure-iot-device", f"azure-iot-device, {AT_ONCE} at once"
TICK_MS = 10  # what a processor may be busy with for others counts for the one it interrupts


class Sent(NamedTuple):
    """What one sender took in one round: CPU time, time from first to last, and how long each message waited."""

    used_ms: float
    took_ms: float
    waits_ms: list[float]


def connected(stack: ExitStack, back_end: str, ca_file: bool = True) -> tuple[Desk, RunningAgent]:
    """A service that has connected, at a desk of its own; both are ended with `stack`."""
    desk = stack.enter_context(Desk())
    agent = RunningAgent(desk.folder, desk.service, f'backend = "{back_end}"\ntcti = "{desk.tpm.tcti}"')
    if not ca_file:
        agent.settings.write_text(agent.text.replace(f'ca_file = "{desk.service.ca_file}"\n', ""))
    stack.enter_context(agent)
    agent.start(environ=desk.environ(ca_file))
    agent.await_connected()
    return desk, agent


def idle(seconds: int, azure: Path | None) -> Report:
    """Both back ends, paho alone and azure-iot-device, all connected for the same `seconds`."""
    report = Report("run", f"connected for {seconds} s")
    forget_written_libraries()
    with ExitStack() as stack:
        services = {back_end: connected(stack, back_end) for back_end in BACK_ENDS}
        processes = {back_end: agent.pid for back_end, (_, agent) in services.items()}
        desk, _ = services["wire"]
        processes["paho alone"] = desk.start_client(Path(sys.executable), "paho", "idle").pid
        if azure is None:
            report.absent.append(NO_AZURE)
        else:
            processes["azure-iot-device"] = desk.start_client(azure, "azure", "idle").pid
        time.sleep(SETTLE_S)
        before = {name: cpu_ms(process) for name, process in processes.items()}
        time.sleep(seconds)
        used = {name: cpu_ms(process) - before[name] for name, process in processes.items()}
        for name, process in processes.items():
            memory = {"residentMiB": memory_mib(process, "VmRSS"), "peakMiB": memory_mib(process, "VmHWM")}
            share = {"cpuMs": used[name], "cpuPercent": used[name] / seconds / 10}
            report.row(name, {**memory, **share})
        for _, agent in services.values():
            if agent.status()["connections"] != 1:
                raise CommandFailed(f"a service did not stay connected:\n{agent.written}")
            agent.end()
    for back_end in BACK_ENDS:
        paho = report.rows["paho alone"]["residentMiB"]
        report.ratio(f"{back_end}: resident / paho alone", report.rows[back_end]["residentMiB"], paho)
    report.over = over_limits(report.rows, seconds)
    return report


def over_limits(rows: dict[str, dict[str, float]], seconds: int) -> list[str]:
    """What of the numbers of `run` is more than it may be, a sentence each."""
    over = []
    for back_end in BACK_ENDS:
        peak_mib, used_ms = rows[back_end]["peakMiB"], rows[back_end]["cpuMs"]
        if peak_mib > PEAK_LIMIT_MIB[back_end]:
            over.append(f"{back_end}: a peak of {peak_mib} MiB, more than {PEAK_LIMIT_MIB[back_end]} MiB")
        if used_ms > CPU_LIMIT_PERCENT * 10 * seconds + TICK_MS:
            over.append(f"{back_end}: {used_ms} ms of a processor, more than {CPU_LIMIT_PERCENT} % of {seconds} s")
    return over


def reconnect(count: int) -> Report:
    """What it costs to connect again after the hub has ended the connection, with `ca_file` and with system roots."""
    report = Report("reconnect", f"median of {count}, wire")
    with ExitStack() as stack:
        used_ms: dict[str, list[float]] = {"ca_file": [], "system": []}
        services = {name: connected(stack, "wire", name == "ca_file") for name in used_ms}
        time.sleep(SETTLE_S)
        for number in range(count):
            for _, agent in services.values():  # a hub that serves is soon gone back to
                with agent.client.connect() as program:
                    _post(program, MESSAGE)
            before_ms = {name: cpu_ms(agent.pid) for name, (_, agent) in services.items()}
            for desk, _ in services.values():
                desk.service.disconnect(REGISTRATION_ID)
            for desk, _ in services.values():
                # Who asks the agent itself would be part of what is measured.
                desk.service.await_hub_log("connected", number + 2, within_s=RECONNECT_LIMIT_S)
            time.sleep(1)  # topics and twin
            for name, (_, agent) in services.items():  # both over the same time
                used_ms[name].append(cpu_ms(agent.pid) - before_ms[name])
    for name, used in used_ms.items():
        report.row(name, {"cpuMs": statistics.median(used), "leastCpuMs": min(used), "mostCpuMs": max(used)})
    report.ratio("CPU, system's roots / ca_file", *(report.rows[name]["cpuMs"] for name in ("system", "ca_file")))
    return report


def telemetry(count: int, azure: Path | None) -> Report:
    """Messages of PAYLOAD_SIZE bytes, one by one and AT_ONCE at a time; CPU is the client's, and its service's."""
    what = f"{count} messages of {PAYLOAD_SIZE} bytes, QoS 1, one by one and {AT_ONCE} at once"
    report = Report("telemetry", f"{what}; rates of the median round")
    with ExitStack() as stack:
        desk, agent = connected(stack, "wire")
        connection = stack.enter_context(agent.client.connect())
        paho = desk.start_client(Path(sys.executable), "paho", "telemetry")
        library = desk.start_library(agent.client.path, AT_ONCE)
        senders: dict[str, Callable[[int], Sent]] = {
            "agent, its socket": partial(_through_the_socket, agent.pid, connection),
            LIBRARY: partial(_by_library, agent.pid, library, 1),
            "agent, client library, send_many": partial(_by_library, agent.pid, library, 0),
            "paho alone": partial(_by, paho, 1),
            LIBRARY_AT_ONCE: partial(_by_library, agent.pid, library, AT_ONCE),
            f"paho alone, {AT_ONCE} at once": partial(_by, paho, AT_ONCE),
        }
        if azure is None:
            report.absent.append(NO_AZURE)
        else:
            theirs = desk.start_client(azure, "azure", "telemetry")
            senders[AZURE] = partial(_by, theirs, 1)
            senders[AZURE_AT_ONCE] = partial(_by, theirs, AT_ONCE)
        taken: dict[str, list[Sent]] = {name: [] for name in senders}
        for _ in range(ROUNDS):
            for name, send in senders.items():
                taken[name].append(send(-(-count // ROUNDS)))
    for name, rounds in taken.items():
        waits = sorted(wait_ms for one in rounds for wait_ms in one.waits_ms)
        last = len(waits) - 1
        # Of the round in the middle: one in which a neighbour had the processors says nothing of who sent.
        rate = statistics.median(1000 * len(one.waits_ms) / one.took_ms for one in rounds)
        took = {"messagesPerS": rate, "cpuMs": sum(one.used_ms for one in rounds) / len(waits)}
        report.row(name, {**took, "p50Ms": waits[last // 2], "p99Ms": waits[last * 99 // 100]})
    ours, paho_alone = report.rows["agent, its socket"], report.rows["paho alone"]
    report.ratio("messages a second / paho alone", ours["messagesPerS"], paho_alone["messagesPerS"])
    report.ratio("CPU for a message / paho alone", ours["cpuMs"], paho_alone["cpuMs"])
    if azure is not None:
        for library_s, azure_s in ((LIBRARY, AZURE), (LIBRARY_AT_ONCE, AZURE_AT_ONCE)):
            rates = [report.rows[name]["messagesPerS"] for name in (library_s, azure_s)]
            report.ratio(f"messages a second, {library_s} / {azure_s}", *rates)
    return report


def _through_the_socket(agent: int, connection: socket.socket, count: int) -> Sent:
    """What the service took for messages that one program gave it on one connection, and each waited for."""
    before_ms, began_s = cpu_ms(agent), time.monotonic()
    waits_ms = timed(partial(_post, connection, MESSAGE), count)
    return Sent(cpu_ms(agent) - before_ms, (time.monotonic() - began_s) * 1000, waits_ms)


def _by_library(agent: int, library: subprocess.Popen[str], at_once: int, count: int) -> Sent:
    """The same by the library for programs; the CPU time of the program is in it."""
    before_ms = cpu_ms(agent)
    sent = _by(library, at_once, count)
    return sent._replace(used_ms=sent.used_ms + cpu_ms(agent) - before_ms)


def _by(client: subprocess.Popen[str], at_once: int, count: int) -> Sent:
    """The same of another client."""
    assert client.stdin is not None and client.stdout is not None
    client.stdin.write(f"{count} {at_once}\n")
    client.stdin.flush()
    line = client.stdout.readline()
    if not line:
        raise CommandFailed(f"the other client ended with status {client.wait()}")
    found = json.loads(line)
    return Sent(found["cpuMs"], found["tookMs"], found["waitsMs"])


def _post(connection: socket.socket, message: bytes) -> None:
    connection.sendall(message)
    answer = b""
    while b"\r\n\r\n" not in answer:
        piece = connection.recv(4096)
        if not piece:
            raise CommandFailed(f"the service ended the connection: {answer!r}")
        answer += piece
    head, _, body = answer.partition(b"\r\n\r\n")
    status, *fields = head.lower().split(b"\r\n")
    size = next((int(field[15:]) for field in fields if field.startswith(b"content-length:")), 0)
    while len(body) < size:
        piece = connection.recv(4096)
        if not piece:
            raise CommandFailed(f"the service ended the connection inside its answer: {answer!r}")
        body += piece
    if not status.startswith(b"http/1.1 200 "):
        raise CommandFailed(f"the service did not send it: {answer!r}")


def forget_written_libraries() -> None:
    """Lets the environment's libraries be read from the disk again, as after a boot.

    A file that was just written is in the page cache whole, and the kernel maps what is there around each page that a
    process touches: 0.8 MiB more with esys.
    """
    os.sync()
    for library in Path(sys.prefix).rglob("*.so*"):
        with library.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
