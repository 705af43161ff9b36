"""Runs the trials and prints the table."""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from fresh_machine import CHECKOUT, NotReady, cache_folder
from machines.vm.cloud import Cloud
from machines.vm.image import make_image, run
from machines.vm.machine import TPM_MODELS, Machine, VmError
from machines.vm.trials import REQUIRED, TRIALS, Bench, Skipped

SCHEMA = "dps-agent-vm-test/1"
PACKAGE_DEADLINE_S = 1800
OK, FAILED, NOT_READY = 0, 1, 2
MEASURED = {  # what the table shows of what was measured
    "exposure": "systemd-analyze security",
    "memoryPeakKiB": "most memory of the service (VmHWM, KiB)",
    "bootS": "cold boot (s)",
    "lockoutCounter": "the TPM's lockout counter at the end",
}


def main() -> int:
    """Exit status 0: the device survived everything; 1: it did not; 2: something could not be tried."""
    options = parser().parse_args()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))  # so that what was started is stopped
    allowed = set(os.environ.get("ALLOW_SKIP", "").replace(",", " ").split())
    started_s = time.monotonic()
    document: dict[str, Any] = {
        "schema": SCHEMA,
        "code": "ok",
        "cuts": options.cuts,
        "seed": options.seed,
        "trials": [],
    }
    with contextlib.redirect_stdout(sys.stderr if options.json else sys.stdout):
        try:
            status = try_all(options, allowed, document)
        except NotReady as error:
            print(f"tools/vm-test: {error}", file=sys.stderr)
            status = OK if "vm" in allowed else NOT_READY
            document |= {"code": "skipped" if status == OK else "notReady", "error": {"message": str(error)}}
        document["seconds"] = round(time.monotonic() - started_s, 1)
        print("\n".join(table(document)), flush=True)
    if options.json:
        print(json.dumps(document, indent=2))
    return status


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="tools/vm-test", description="The package on a real systemd and a kernel's TPM driver."
    )
    add = made.add_argument
    add(
        "--cuts",
        type=at_least_one,
        default=40,
        metavar="N",
        help="power cuts in the midst of a registration; default 40",
    )
    add("--seed", type=int, default=None, metavar="N", help="of the moments of the cuts; default: another each time")
    names = [trial.name for trial in TRIALS]
    add(
        "--only",
        action="append",
        choices=names,
        metavar="NAME",
        help="this trial and what it needs, repeatable; see --list",
    )
    add("--tpm", choices=TPM_MODELS, default=TPM_MODELS[0], help="the TPM's interface; default %(default)s")
    add("--package", type=Path, metavar="FILE", help="try this .deb; default: build one of the checkout")
    add("--keep", type=Path, metavar="DIR", help="leave disks, logs and the TPM's state in this new folder")
    add("--json", action="store_true", help="print one JSON document on stdout, the rest on stderr")
    add("--list", action="version", version=" ".join(names), help="print the trials' names")
    return made


def at_least_one(text: str) -> int:
    """A whole number of power cuts."""
    if not (text.isascii() and text.isdecimal() and 1 <= int(text) <= 10_000):
        raise argparse.ArgumentTypeError(f"expected a number from 1 to 10000, came {text!r}")
    return int(text)


def try_all(options: argparse.Namespace, allowed: set[str], document: dict[str, Any]) -> int:
    """Prepares, runs the trials one after the other; fills the document."""
    if options.seed is None:
        options.seed = document["seed"] = int.from_bytes(os.urandom(4), "big")
    if os.geteuid() != 0:
        raise NotReady("the guest's file system is made with its own owners: run this as root")
    phases = document["phases"] = {}
    with contextlib.ExitStack() as owned:
        folder = work_folder(options.keep, owned)
        phase_s = time.monotonic()
        package = options.package or build_package(folder)
        phases["packageS"] = round(time.monotonic() - phase_s, 1)
        phase_s = time.monotonic()
        image = make_image(cache_folder() / "vm", dependencies(package))
        phases["imageS"] = round(time.monotonic() - phase_s, 1)
        print(f"guest: {image.disk.parent}, {'built' if image.was_built else 'from the cache'}", flush=True)
        cloud = Cloud(folder, Path(sys.prefix) / "bin")
        owned.callback(cloud.stop)
        machine = Machine(folder, image, package, options.tpm)
        owned.callback(machine.cut)
        bench = Bench(machine, cloud, package.stat().st_size, options.cuts, options.seed)
        bench.measured["tpmModel"] = options.tpm
        document["measured"] = bench.measured
        return run_trials(bench, wanted_trials(options.only), allowed, document)


def wanted_trials(only: list[str] | None) -> list[str]:
    """The names of the trials to run."""
    if not only:
        return [trial.name for trial in TRIALS]
    needed = {*only, *REQUIRED}
    if needed & {"power-cuts", "cold-boot"}:
        needed.add("prepare-cuts")
    return [trial.name for trial in TRIALS if trial.name in needed]


def run_trials(bench: Bench, names: list[str], allowed: set[str], document: dict[str, Any]) -> int:
    """Runs these trials; the exit status. A failed one is followed by the others, unless they need it."""
    worst = OK
    for trial in TRIALS:
        if trial.name not in names:
            continue
        print(f"\n== {trial.name}", flush=True)
        started_s = time.monotonic()
        verdict, detail = "passed", ""
        try:
            if trial.anew:
                bench.start_anew()
            detail = trial.run(bench)
        except Skipped as error:
            verdict, detail = "skipped", str(error)
            worst = worst or (OK if trial.name in allowed else NOT_READY)
        except (VmError, OSError, ValueError, KeyError, subprocess.SubprocessError) as error:
            verdict, detail = (
                "FAILED",
                f"{type(error).__name__}: {error}" if not isinstance(error, VmError) else str(error),
            )
            worst = FAILED
            print(f"  {detail}\n{bench.machine.evidence()}", flush=True)
        seconds = round(time.monotonic() - started_s, 1)
        document["trials"].append({"name": trial.name, "verdict": verdict, "seconds": seconds, "detail": detail})
        print(f"  {verdict} in {seconds} s: {detail}", flush=True)
        if verdict == "FAILED" and trial.name in (*REQUIRED, "prepare-cuts", "power-cuts"):
            break
    if worst != OK:
        document["code"] = "failed" if worst == FAILED else "notReady"
    return worst


def work_folder(keep: Path | None, owned: contextlib.ExitStack) -> Path:
    """A new folder for this run; removed at its end unless it is to be kept."""
    if keep is None:
        return Path(owned.enter_context(tempfile.TemporaryDirectory(prefix="vm-test-")))
    try:
        keep.mkdir()
    except OSError as error:
        raise NotReady(f"--keep: {keep}: {error.strerror}") from None
    return keep.resolve()


def build_package(folder: Path) -> Path:
    """The Debian package of the checkout as it is."""
    words = [str(CHECKOUT / "tools/package"), "--deb", "--out", str(folder / "dist")]
    print(f"$ {' '.join(words)}", flush=True)
    return Path(run(words).splitlines()[-1])


def dependencies(package: Path) -> list[str]:
    """The names of the packages that a Debian package depends on, the first where there is a choice."""
    if not package.is_file():
        raise NotReady(f"there is no package {package}")
    field = run(["dpkg-deb", "-f", str(package), "Depends"])
    return [words.split()[0].partition("|")[0] for words in field.split(",") if words.strip()]


def table(document: dict[str, Any]) -> list[str]:
    """One line a trial, then what was measured."""
    lines = [""]
    for trial in document["trials"]:
        detail = trial["detail"].partition("\n")[0]
        lines.append(f"{trial['name']:16} {trial['verdict']:8} {trial['seconds']:7.1f} s  {detail}")
    measured = document.get("measured", {})
    for name, text in MEASURED.items():
        if name in measured:
            lines.append(f"{text:34} {measured[name]}")
    phases = document.get("phases", {})
    lines.append(", ".join(f"{name.removesuffix('S')} {seconds:.0f} s" for name, seconds in phases.items()))
    failed = sum(trial["verdict"] == "FAILED" for trial in document["trials"])
    lines.append(
        f"{len(document['trials'])} trials, {failed} failed, {document['seconds']:.0f} s; --seed {document['seed']}"
    )
    return lines


if __name__ == "__main__":
    sys.exit(main())
