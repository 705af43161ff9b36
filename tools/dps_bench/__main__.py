"""Measures what was asked for, in the environment that `tools/bench` has made."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from dps_bench import commands, emulator, service
from dps_bench.costs import CommandFailed, clean_environ
from dps_bench.desk import Desk, compiled


def main() -> int:
    """0: done; 1: a program failed, or took more than it may."""
    parser = argparse.ArgumentParser()
    parser.add_argument("what")
    parser.add_argument("-n", type=int)
    parser.add_argument("--seconds", type=int)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--azure", type=Path)
    parser.add_argument("--azure-node", type=Path)
    parser.add_argument("--beside", type=Path)
    arguments = parser.parse_args()
    kept = clean_environ()
    for name in set(os.environ) - set(kept):
        del os.environ[name]
    compiled()
    try:
        match arguments.what:
            case "emulator":
                report = emulator.measured(arguments.n, arguments.beside)
            case "run":
                report = service.idle(arguments.seconds, arguments.azure)
            case "reconnect":
                report = service.reconnect(arguments.n)
            case "telemetry":
                report = service.telemetry(arguments.n, arguments.azure)
            case "handshake":
                from dps_bench import handshake  # with `cryptography`

                report = handshake.measured(arguments.n)
            case "wake":
                from dps_bench import wake  # needs what builds a board's image

                report = wake.measured(arguments.n)
            case "provision":
                with Desk() as desk:
                    report = commands.provision(desk, arguments.n, arguments.azure_node)
            case verb:
                with Desk() as desk:
                    report = commands.short(desk, verb, arguments.n)
    except CommandFailed as error:
        print(f"tools/bench: {error}", file=sys.stderr)
        return 1
    print(report.document() if arguments.json else report.text())
    for text in report.over:
        print(f"tools/bench: {text}", file=sys.stderr)
    return 1 if report.over else 0


if __name__ == "__main__":
    sys.exit(main())
