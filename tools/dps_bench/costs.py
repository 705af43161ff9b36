"""What a process took: time from its start to its end, CPU time, and the most memory it had."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

COMMAND_DEADLINE_S = 60
# What a user of this machine has set is no part of a measurement.
_NOT_OURS = ("DPS_AGENT_", "PYTHON", "SSL_CERT_", "SSLKEYLOGFILE")

# The kernel takes the memory of the process that starts another for the first memory of that other; so what starts
# them here is smaller than all of them. Prints wall seconds, CPU seconds and peak KiB.
STARTER = """
import sys, posix, time
began = time.monotonic()
child = posix.fork()
if child == 0:
    try:
        posix.dup2(posix.open('/dev/null', posix.O_RDWR), 1)
        posix.execv(sys.argv[1], sys.argv[1:])
    finally:
        posix._exit(127)
_, status, used = posix.wait4(child, 0)
print(time.monotonic() - began, used.ru_utime + used.ru_stime, used.ru_maxrss)
sys.exit(posix.waitstatus_to_exitcode(status))
"""


class Cost(NamedTuple):
    """What one process took."""

    wall_ms: float
    cpu_ms: float
    peak_mib: float

    def row(self) -> dict[str, float]:
        """As a line of a table."""
        return {"wallMs": self.wall_ms, "cpuMs": self.cpu_ms, "peakMiB": self.peak_mib}


class CommandFailed(Exception):
    """A measured command did not do its work; the text has what it said."""


def clean_environ(more: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of what is measured, with `more`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_NOT_OURS)}
    return {**kept, **(more or {})}


def run(words: Sequence[str], environ: Mapping[str, str] | None = None) -> Cost:
    """Runs one program to its end, with `environ` beside what all have; what it took."""
    ended = subprocess.run(
        [sys.executable, "-I", "-S", "-c", STARTER, *words],
        check=False,
        env=clean_environ(environ),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=COMMAND_DEADLINE_S,
    )
    if ended.returncode != 0:
        raise CommandFailed(f"{' '.join(words)} ended with status {ended.returncode}:\n{ended.stderr.rstrip()}")
    wall_s, cpu_s, peak_kib = map(float, ended.stdout.split())
    return Cost(wall_s * 1000, cpu_s * 1000, peak_kib / 1024)


def median(costs: Sequence[Cost]) -> Cost:
    """The median of each column."""
    return Cost(*(statistics.median(column) for column in zip(*costs, strict=True)))


def cpu_ms(process: int) -> float:
    """Milliseconds that the threads of a process have had of a processor so far; proc(5), schedstat, in ns."""
    tasks = Path(f"/proc/{process}/task")
    return sum(int((task / "schedstat").read_bytes().split()[0]) for task in tasks.iterdir()) / 1e6


def memory_mib(process: int, field: str) -> float:
    """One of the sizes in /proc/PID/status: VmRSS is what is resident now, VmHWM the most that ever was."""
    status = Path(f"/proc/{process}/status").read_text()
    return int(status.partition(f"{field}:")[2].split()[0]) / 1024
