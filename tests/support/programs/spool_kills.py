"""Kills a program that uses a spool, again and again, and says what became of its messages.

    python -m support.programs.spool_kills FOLDER KILLS SEED

Each child opens the spool that the one before has left, puts messages in and sends what is there to a hub that is a
file. Every second one kills itself before its n-th statement of SQLite, for one n after the other; the others are
killed from outside, after a random time. A message counts as accepted once `put` has returned. What the hub has and
what was accepted stands in two files to which whole lines are added by one call, so that no kill damages them. In the
end all that is left is sent, and one JSON object is printed.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

from dps_agent.client.spool import Spool
from dps_agent.client.values import telemetry

STATEMENTS = 40  # before each of so many a child is killed, in turn


def main() -> None:
    """Prints how many were killed, what was accepted, and what the hub has, in order."""
    folder, kills, chance = Path(sys.argv[1]), int(sys.argv[2]), random.Random(int(sys.argv[3]))
    killed = 0
    for number in range(kills):
        statement = number // 2 % STATEMENTS if number % 2 == 0 else None
        process = os.fork()
        if process == 0:
            child(folder, number, statement)
        if statement is None:
            time.sleep(chance.uniform(0.0, 0.02))
            os.kill(process, signal.SIGKILL)
        killed += os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL
    spool = Spool(folder / "spool")
    while send_first(folder, spool):
        pass
    spool.close()
    found = {name: [int(line) for line in read(folder / name)] for name in ("accepted", "hub")}
    print(json.dumps({"killed": killed, **found}))


def child(folder: Path, number: int, statement: int | None) -> NoReturn:
    """Puts and sends until it is killed; `statement`: before which of its statements."""
    try:
        if statement is not None:
            kill_before(statement)
        spool = Spool(folder / "spool")
        for count in range(1000):
            payloads = [1000 * number + 2 * count, 1000 * number + 2 * count + 1][: 1 + count % 2]
            spool.put([telemetry(str(payload), None, 1, True) for payload in payloads])
            write(folder / "accepted", payloads)
            if count % 3:
                send_first(folder, spool)
    finally:
        os._exit(1)


def kill_before(statement: int) -> None:
    """Connections that are made from now on end this process before so many statements are done."""
    connect: Any = sqlite3.connect
    left = statement

    def traced(_text: str) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def connected(*arguments: Any, **options: Any) -> sqlite3.Connection:
        base: sqlite3.Connection = connect(*arguments, **options)
        base.set_trace_callback(traced)
        return base

    sqlite3.connect = connected  # type: ignore[assignment]


def send_first(folder: Path, spool: Spool) -> bool:
    """The hub gets the oldest message and acknowledges it; False where there is none."""
    stored = spool.first()
    if stored is None:
        return False
    write(folder / "hub", [int(stored.request.body)])
    spool.forget(stored.number)
    return True


def write(path: Path, numbers: list[int]) -> None:
    """Adds these lines."""
    opened = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(opened, "".join(f"{number}\n" for number in numbers).encode())
    os.close(opened)


def read(path: Path) -> list[str]:
    """Its lines."""
    return path.read_text().splitlines()


if __name__ == "__main__":
    main()
