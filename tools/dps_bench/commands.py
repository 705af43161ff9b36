"""Commands that come to an end: `provision`, `token`, `status`, beside the least that they could cost."""

from __future__ import annotations

import statistics
import sys
from typing import TYPE_CHECKING

from dps_bench.costs import Cost, median, run
from dps_bench.desk import AGENT, Desk, Tapped
from dps_bench.report import Report

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

BACK_ENDS = ("wire", "esys")

# A registration without the agent: the interpreter, one handshake, the requests; what the TPM takes comes to it.
HTTPS_ALONE = """
import socket, ssl, sys
port, ca_file, count = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
context = ssl.create_default_context(cafile=ca_file)
tls = context.wrap_socket(socket.create_connection(('127.0.0.1', port)), server_hostname='127.0.0.1')
body = b'{"registrationId":"bench-floor"}'
for _ in range(count):
    tls.sendall(b'PUT /0ne00000000/registrations/bench-floor/register?api-version=2021-06-01 HTTP/1.1\\r\\n'
                b'Host: 127.0.0.1\\r\\nContent-Type: application/json\\r\\n'
                b'Content-Length: %d\\r\\n\\r\\n%s' % (len(body), body))
    answer = b''
    while b'\\r\\n\\r\\n' not in answer:
        answer += tls.recv(16384)
    head, _, got = answer.partition(b'\\r\\n\\r\\n')
    fields = dict(line.lower().split(b': ', 1) for line in head.split(b'\\r\\n')[1:])
    while len(got) < int(fields[b'content-length']):
        got += tls.recv(16384)
"""
NODE = "azure-iot-security-tpm, Node"
BARE = [sys.executable, "-c", "pass"]


def in_turns(programs: Mapping[str, tuple[Sequence[str], Mapping[str, str]]], count: int) -> dict[str, list[Cost]]:
    """What each of the programs took, so often; they take turns, so that all have the same neighbours."""
    costs: dict[str, list[Cost]] = {name: [] for name in programs}
    for _ in range(count):
        for name, (words, environ) in programs.items():
            costs[name].append(run(words, environ))
    return costs


def provision(desk: Desk, count: int, azure_node: Path | None = None) -> Report:
    """`provision --force` with both back ends, with `ca_file` and with the system's roots.

    `azure_node`: a folder with Microsoft's client for Node, to be measured beside them.
    """
    report = Report("provision", f"median of {count}")
    words = ["provision", "--force"]
    programs: dict[str, tuple[Sequence[str], Mapping[str, str]]] = {}
    behind_tap: dict[str, list[Tapped]] = {back_end: [] for back_end in BACK_ENDS}
    for back_end in BACK_ENDS:
        for roots in ("ca_file", "system"):
            name = f"{back_end}, {roots}"
            settings = desk.settings(name.replace(", ", "-"), back_end, ca_file=roots == "ca_file")
            programs[name] = [AGENT, *words, "--config", str(settings)], desk.environ(roots == "ca_file")
            run(*programs[name])  # makes the TPM's keys and the record
        report.say(f"{back_end}: syncs", desk.syncs(words, desk.settings(f"{back_end}-ca_file", back_end)))
    requests = desk.tapped(words, desk.settings("wire-ca_file", "wire")).requests
    floor = [sys.executable, "-c", HTTPS_ALONE, str(desk.service.port), str(desk.service.ca_file), str(requests)]
    programs["requests alone"] = floor, {}
    programs["python -c pass"] = BARE, {}
    if azure_node is not None:
        programs[NODE] = desk.azure_node(azure_node), {}
    costs: dict[str, list[Cost]] = {name: [] for name in programs}
    for _ in range(count):
        for name, taken in in_turns(programs, 1).items():
            costs[name] += taken
        for back_end, tapped in behind_tap.items():
            tapped.append(desk.tapped(words, desk.settings(f"{back_end}-ca_file", back_end)))
    medians = {name: median(taken) for name, taken in costs.items()}
    for name, cost in medians.items():
        report.row(name, cost.row())
    alone = medians["requests alone"]
    for back_end, tapped in behind_tap.items():
        with_file, with_system = medians[f"{back_end}, ca_file"], medians[f"{back_end}, system"]
        floor_ms = alone.wall_ms + statistics.median(each.tpm_ms for each in tapped)
        report.row(f"floor, {back_end}: and the TPM", {**alone.row(), "wallMs": floor_ms})
        report.ratio(f"{back_end}: wall / floor", with_file.wall_ms, floor_ms)
        report.ratio(f"{back_end}: CPU, system's roots / ca_file", with_system.cpu_ms, with_file.cpu_ms)
        report.say(f"{back_end}: TPM commands", tapped[0].commands)
        report.say(f"{back_end}: requests", tapped[0].requests)
    for column in ("wall_ms", "cpu_ms", "peak_mib"):
        values = (getattr(medians[f"{back_end}, ca_file"], column) for back_end in BACK_ENDS)
        report.ratio(f"wire / esys: {column}", *values)
        if azure_node is not None:
            for back_end in BACK_ENDS:
                values = (getattr(medians[name], column) for name in (f"{back_end}, ca_file", NODE))
                report.ratio(f"{back_end} / {NODE}: {column}", *values)
    return report


def short(desk: Desk, verb: str, count: int) -> Report:
    """`token` or `status` of a device that has its hub, while no service runs."""
    report = Report(verb, f"median of {count}")
    programs: dict[str, tuple[Sequence[str], Mapping[str, str]]] = {}
    for back_end in BACK_ENDS if verb == "token" else BACK_ENDS[:1]:
        settings = desk.settings(back_end, back_end)
        run([AGENT, "provision", "--force", "--config", str(settings)])
        programs[back_end] = [AGENT, verb, "--config", str(settings)], {}
        run(*programs[back_end])
        if verb == "token":
            report.say(f"{back_end}: TPM commands", desk.tapped([verb], settings).commands)
        report.say(f"{back_end}: syncs", desk.syncs([verb], settings))
    programs["python -c pass"] = BARE, {}
    medians = {name: median(taken) for name, taken in in_turns(programs, count).items()}
    for name, cost in medians.items():
        report.row(name, cost.row())
    for name in [name for name in programs if name in BACK_ENDS]:
        report.ratio(f"{name}: CPU / python -c pass", medians[name].cpu_ms, medians["python -c pass"].cpu_ms)
    return report
