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
from typing import TYPE_CHECKING

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

SETTLE_S = 15  # a new connection does a few more things: the twin, the older identity
PEAK_LIMIT_MIB = {"wire": 28, "esys": 45}  # what `run` may take at its peak, with Debian 12's Python
CPU_LIMIT_PERCENT = 0.1  # of one processor, connected with nothing to do
ROUNDS = 10  # rounds in which each sender has its turn
NO_AZURE = "azure-iot-device, which could not be installed"
TICK_MS = 10  # what a processor may be busy with for others counts for the one it interrupts


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
            for name, (desk, agent) in services.items():
                before_ms = cpu_ms(agent.pid)
                desk.service.disconnect(REGISTRATION_ID)
                # Who asks the agent itself would be part of what is measured.
                desk.service.await_hub_log("connected", number + 2, within_s=120)
                time.sleep(1)  # topics and twin
                used_ms[name].append(cpu_ms(agent.pid) - before_ms)
    for name, used in used_ms.items():
        report.row(name, {"cpuMs": statistics.median(used), "leastCpuMs": min(used), "mostCpuMs": max(used)})
    report.ratio("CPU, system's roots / ca_file", *(report.rows[name]["cpuMs"] for name in ("system", "ca_file")))
    return report


def telemetry(count: int, azure: Path | None) -> Report:
    """Messages of PAYLOAD_SIZE bytes, each sent once the one before is acknowledged; CPU is the client's alone."""
    report = Report("telemetry", f"{count} messages of {PAYLOAD_SIZE} bytes one by one, QoS 1")
    with ExitStack() as stack:
        desk, agent = connected(stack, "wire")
        connection = stack.enter_context(agent.client.connect())
        senders: dict[str, Callable[[int], tuple[float, list[float]]]] = {
            "agent, its socket": partial(_through_the_socket, agent.pid, connection),
            "paho alone": partial(_by, desk.start_client(Path(sys.executable), "paho", "telemetry")),
        }
        if azure is None:
            report.absent.append(NO_AZURE)
        else:
            senders["azure-iot-device"] = partial(_by, desk.start_client(azure, "azure", "telemetry"))
        taken: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in senders}
        for _ in range(ROUNDS):
            for name, send in senders.items():
                used_ms, waits_ms = send(-(-count // ROUNDS))
                taken[name][0].append(used_ms)
                taken[name][1].extend(waits_ms)
    for name, (used, waits) in taken.items():
        waits.sort()
        last = len(waits) - 1
        took = {"messagesPerS": 1000 * len(waits) / sum(waits), "cpuMs": sum(used) / len(waits)}
        report.row(name, {**took, "p50Ms": waits[last // 2], "p99Ms": waits[last * 99 // 100]})
    ours, paho = report.rows["agent, its socket"], report.rows["paho alone"]
    report.ratio("messages a second / paho alone", ours["messagesPerS"], paho["messagesPerS"])
    report.ratio("CPU for a message / paho alone", ours["cpuMs"], paho["cpuMs"])
    return report


def _through_the_socket(agent: int, connection: socket.socket, count: int) -> tuple[float, list[float]]:
    """CPU milliseconds of the service, and how long each message waited that one program gave it on one connection."""
    head = f"POST /telemetry HTTP/1.1\r\nHost: localhost\r\nContent-Length: {PAYLOAD_SIZE}\r\n\r\n"
    before_ms = cpu_ms(agent)
    waits_ms = timed(partial(_post, connection, head.encode() + bytes(PAYLOAD_SIZE)), count)
    return cpu_ms(agent) - before_ms, waits_ms


def _by(client: subprocess.Popen[str], count: int) -> tuple[float, list[float]]:
    """The same of another client."""
    assert client.stdin is not None and client.stdout is not None
    client.stdin.write(f"{count}\n")
    client.stdin.flush()
    line = client.stdout.readline()
    if not line:
        raise CommandFailed(f"the other client ended with status {client.wait()}")
    found = json.loads(line)
    return found["cpuMs"], found["waitsMs"]


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
