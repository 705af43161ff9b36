"""A process of its own that shows a certificate by a key of its TPM, and whose time a line on stdin makes fly.

    python tests/support/programs/tpm_in_tls.py SETTINGS HUB|dps TIMES

Prints what becomes of each connection, a line each: an answer, or the code and the message of what ended the process.
OpenSSL's provider is never taken out of a process, and is of no use once its TPM was cut off: so each such case has its
own.
"""

import math
import os
import sys
import threading
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


class Time:
    """The system's monotonic time, an hour a second from `flies_from_s` on, which it is an hour ahead of."""

    flies_from_s = math.inf

    def monotonic(self) -> float:
        now_s = time.monotonic()
        return now_s if now_s < self.flies_from_s else now_s + 3600 * (1 + now_s - self.flies_from_s)


def main(settings: str, whom: str, times: str) -> None:
    sys.path[:0] = ["agent", "hal"]
    from dps_agent.host import load, loop, runner, worker
    from dps_agent.host.parts import dps_connection, hub_connection
    from dps_agent.hub_effects import Connect
    from dps_agent.issued import chains_in
    from dps_hal.contracts import CERTIFICATE
    from dps_hal.errors import DpsError
    from dps_hal.host.state_dir import open_store

    given, clock = load(settings, environ={}), Time()
    waits = loop.Loop()
    connection: Any = dps_connection(given) if whom == "dps" else hub_connection(given)

    def pass_time() -> None:
        if sys.stdin.readline():
            clock.flies_from_s = time.monotonic()
            waits.ring()

    threading.Thread(target=pass_time, daemon=True).start()
    for module in (loop, worker):
        setattr(module, "time", clock)  # noqa: B010 (another class)
    kept = open_store(given.state_dir).load(CERTIFICATE) if given.certificate else None
    chain = chains_in(kept.payload)[-1] if kept is not None else None  # what DPS issued last
    device = given.registration_id
    path = f"/{given.id_scope}/registrations/{device}?api-version=2021-06-01"

    def call() -> object:
        if whom == "dps":
            return connection.request("POST", path, b'{"registrationId":"%s"}' % device.encode(), None)
        return connection.connect(Connect(whom, device, f"{whom}/{device}/?api-version=2021-04-12", chain, 60, True))

    waiting = worker.Worker(lambda: None, waits)  # it looks at the time each second
    for _ in range(int(times)):
        try:
            print(
                waiting.do_or_abort(
                    call, 60.0, connection.abort, "it", tpm_grace_s=lambda: runner.tpm_grace_s(connection)
                ).answer
            )
        except DpsError as error:
            print(f"{error.code} {'stuck' if waiting.stuck else 'ended'}: {error.message}")
        sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
