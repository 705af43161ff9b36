"""A process of its own that shows a certificate by a key of its TPM, and whose time a line on stdin makes pass.

    python tests/support/programs/tpm_in_tls.py SETTINGS HUB|dps TIMES

Prints what becomes of each connection, a line each: an answer, or the code and the message of what ended the process.
OpenSSL's provider is never taken out of a process, and is of no use once its TPM was cut off: so each such case has its
own.
"""

import os
import sys
import threading
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


class Time:
    """The system's monotonic time, an hour ahead once `passed`."""

    passed = threading.Event()

    def monotonic(self) -> float:
        return time.monotonic() + 3600 * self.passed.is_set()


def main(settings: str, whom: str, times: str) -> None:
    sys.path[:0] = ["agent", "hal"]
    from dps_agent.host import load, loop, worker
    from dps_agent.host.parts import dps_connection, hub_connection
    from dps_agent.hub_effects import Connect
    from dps_hal.errors import DpsError

    given, clock = load(settings, environ={}), Time()
    waits = loop.Loop()
    connection: Any = dps_connection(given) if whom == "dps" else hub_connection(given)

    def pass_time() -> None:
        if sys.stdin.readline():  # its end is no line
            clock.passed.set()
            waits.ring()

    threading.Thread(target=pass_time, daemon=True).start()
    for module in (loop, worker):
        setattr(module, "time", clock)  # noqa: B010 (another class)
    device = given.registration_id
    path = f"/{given.id_scope}/registrations/{device}?api-version=2021-06-01"

    def call() -> object:
        if whom == "dps":
            return connection.request("POST", path, b'{"registrationId":"%s"}' % device.encode(), None)
        return connection.connect(Connect(whom, device, f"{whom}/{device}/?api-version=2021-04-12", None, 60, True))

    waiting = worker.Worker(None, waits)
    for _ in range(int(times)):
        try:
            print(waiting.do_or_abort(call, 60.0, connection.abort, "the words", asks_tpm=connection.asks_tpm).answer)
        except DpsError as error:
            print(f"{error.code} {'stuck' if waiting.stuck else 'ended'}: {error.message}")
        sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
