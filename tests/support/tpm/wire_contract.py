"""Runs the contract of every Tpm over WireTpm against two swtpm, under MicroPython as under CPython.

    micropython tests/support/tpm/wire_contract.py PORT OTHER_PORT          (in the checkout)

Prints the traceback of each failure and closes with "N passed, N failed". Exit status 0: nothing failed.
"""

import gc
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any

    from dps_hal.contracts import Tpm
    from dps_hal.tpm.commands import Transport


def main(ports: "list[str]", transport_to: "Callable[[int], Transport] | None" = None) -> int:
    """Each claim with two TPMs of its own making, which leave nothing in the swtpm.

    `transport_to(port)` is what leads there where it is not a socket alone.
    """
    sys.path[:0] = ["agent", "hal", "tests"]
    from contracts.tpm import CLAIMS
    from dps_hal.tpm.tcp import SwtpmTransport
    from dps_hal.tpm.wire import WireTpm

    def opened(port: str) -> "Tpm":
        return WireTpm(transport_to(int(port)) if transport_to else SwtpmTransport("127.0.0.1", int(port)))

    return run_claims(CLAIMS, lambda: [opened(port) for port in ports])


def run_claims(claims: "Iterable[Callable[[Any, Any], None]]", opened: "Callable[[], list[Any]]") -> int:
    """Each claim with the two TPMs that `opened()` makes for it; prints what fails and the counts; the exit status."""
    from support.run_shared import report

    passed = failed = 0
    for claim in claims:
        tpms = opened()
        try:
            claim(tpms[0], tpms[1])
            passed += 1
        except Exception as error:
            failed += 1
            report(claim.__name__, error)
        for tpm in tpms:
            tpm.release()
        gc.collect()
    print(f"{passed} passed, {failed} failed")
    return 0 if passed and not failed else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
