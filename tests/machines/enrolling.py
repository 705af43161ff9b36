"""30,000 devices enrolled by `dps-enroll`, killed on the way and met by faults: each once, at the quota's pace."""

from __future__ import annotations

import base64
import collections
import csv
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emulator.device_side import EK_HEAD
from support.cloud.emulator import EmulatorInThread
from support.documents import CHECKOUT

if TYPE_CHECKING:
    from collections.abc import Callable

    from dps_emulator.server import LogLine

DEVICES = 30_000
DONE_BEFORE_THE_KILL = 11_000
REQUESTS_PER_MINUTE = 1000
CONNECTIONS = 4
DEADLINE_S = 3000
FAULTS: tuple[dict[str, Any], ...] = (  # a connection that is cut has done its work or not
    *({"request": number, "status": 429, "headers": {"Retry-After": "5"}} for number in (100, 1400, 2900)),
    *({"request": number, "status": status} for number, status in ((300, 500), (1700, 503))),
    *({"request": number, "cutAfterBytes": -1} for number in (500, 2000)),
)


def main() -> int:
    """Exit status 0: each was enrolled once, and no minute had more requests than the quota has."""
    began_s = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="enrolling-") as name:
        folder = Path(name)
        with EmulatorInThread(state_dir=folder / "state") as emulator:
            wrong = enrolled_once(folder, emulator)
            busiest = most_in_a_minute(emulator.log)
    if busiest > REQUESTS_PER_MINUTE + CONNECTIONS:  # as many may have been on their way when the minute began
        wrong.append(f"{busiest} requests in a minute")
    if wrong:
        print("\n".join(wrong))
        return 1
    print(f"{DEVICES} devices once each, {busiest} requests a minute at most, {time.monotonic() - began_s:.0f} s")
    return 0


def enrolled_once(folder: Path, emulator: EmulatorInThread) -> list[str]:
    """Enrols them with a kill on the way; what came otherwise than it should."""
    devices, journal = folder / "line.csv", folder / "line.csv.journal"
    devices.write_text("registrationId,endorsementKey\n" + "".join(map(line_of, range(DEVICES))))
    credentials = folder / "credentials"
    credentials.touch(0o600)
    credentials.write_text(str(emulator.hub_command("service", ofHubs=False)["connectionString"]))
    emulator.fault(*FAULTS)
    words = [sys.executable, "-m", "dps_enroll.cli", str(devices), "--credentials", str(credentials), "--proxy", "none"]
    words += ["--ca-file", str(emulator.ca_file), "--counts", "requests", "--per-minute", str(REQUESTS_PER_MINUTE)]
    words += ["--connections", str(CONNECTIONS)]
    paths = os.pathsep.join(str(CHECKOUT / name) for name in ("agent", "hal", "tools"))
    environ = {**os.environ, "PYTHONPATH": paths}
    enrolled = emulator.store.enrollments
    with subprocess.Popen(words, env=environ, stdin=subprocess.DEVNULL) as process:
        wait_until(lambda: len(enrolled) >= DONE_BEFORE_THE_KILL, process)
        process.send_signal(signal.SIGKILL)
    before = {name: each.to_json() for name, each in enrolled.items()}
    print(f"killed with {len(before)} devices enrolled", flush=True)
    status = subprocess.run(words, env=environ, stdin=subprocess.DEVNULL, timeout=DEADLINE_S, check=False).returncode
    with devices.with_name("line.csv.results.csv").open() as file:
        results = {row["registrationId"]: row["result"] for row in csv.DictReader(file)}
    journaled = collections.Counter(json.loads(line).get("id") for line in journal.read_text().splitlines()[1:])
    print(f"results: {dict(collections.Counter(results.values()))}", flush=True)
    expected = {f"press-{number}" for number in range(DEVICES)}
    claims = {
        f"dps-enroll ended with {status}": status == 0,
        f"killed too late, at {len(before)}": len(before) < DEVICES,
        f"{len(enrolled)} devices enrolled": set(enrolled) == expected,
        "some have no result": set(results) == expected and set(results.values()) <= {"created", "present"},
        "some enrolled before the kill were written again": all(
            enrolled[n].to_json() == each for n, each in before.items()
        ),
        "some are in the journal twice or not": set(journaled) == expected and set(journaled.values()) == {1},
    }
    return [claim for claim, holds in claims.items() if not holds]


def line_of(number: int) -> str:
    """A line of the list; nobody has the private key of this EK."""
    key = EK_HEAD + b"\xc0" + hashlib.shake_256(b"%d" % number).digest(254) + b"\1"
    return f"press-{number},{base64.b64encode(key).decode()}\n"


def most_in_a_minute(log: list[LogLine]) -> int:
    """The most requests in any sixty seconds."""
    times_s = sorted(datetime.fromisoformat(line.time).timestamp() for line in log)
    most = first = 0
    for last, time_s in enumerate(times_s):
        while times_s[first] <= time_s - 60:
            first += 1
        most = max(most, last - first + 1)
    return most


def wait_until(holds: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    """Returns once it holds, or the process has ended."""
    until_s = time.monotonic() + DEADLINE_S
    while not holds() and process.poll() is None and time.monotonic() < until_s:
        time.sleep(0.05)


if __name__ == "__main__":
    sys.exit(main())
