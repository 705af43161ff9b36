"""A well-behaved program on the device: it sends messages at a steady rate and notes what each was answered.

    python -m support.programs.steady_sender PATH USER SECONDS REPORT          (as root; it becomes that user)

A line of REPORT for each message: its number, the status of the answer, 0 for none, and the code or what went wrong.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

from dps_emulator.local_client import LocalClient
from support.programs.hostile_members import become

RATE_PER_S = 10
ANSWER_LIMIT_S = 60.0
_SENDERS = 4  # connections, of those that a user may have


class Sent(NamedTuple):
    """One message: status 0 is no answer."""

    number: int
    status: int
    code: str


def payload(number: int) -> bytes:
    """What the message of this number carries."""
    return b"kept-%d" % number


def read_report(report: Path) -> list[Sent]:
    """The messages of a report, as they were answered."""
    return [Sent(*json.loads(line)) for line in report.read_text().splitlines()]


def main() -> None:
    """Sends for so long; each message goes at its time, or later where all connections wait for answers."""
    path, user, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
    with open(sys.argv[4], "w") as report:
        become(user)
        began_s = time.monotonic()
        lock = threading.Lock()
        numbers = iter(range(int(seconds * RATE_PER_S)))

        def work() -> None:
            """Started below, ends when all messages are sent."""
            client = LocalClient(path, ANSWER_LIMIT_S)
            while True:
                with lock:
                    number = next(numbers, None)
                if number is None:
                    return
                time.sleep(max(began_s + number / RATE_PER_S - time.monotonic(), 0.0))
                status, code = 0, ""
                try:
                    status, document = client.ask("POST", "/telemetry?by=good", payload(number))
                    code = document.get("error", {}).get("code", "")
                except (OSError, ValueError) as error:
                    code = f"{type(error).__name__}: {error}"
                with lock:
                    report.write(json.dumps(Sent(number, status, code)) + "\n")
                    report.flush()

        threads = [threading.Thread(target=work) for _ in range(_SENDERS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


if __name__ == "__main__":
    main()
