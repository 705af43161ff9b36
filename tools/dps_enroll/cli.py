"""The command line of `dps-enroll`."""

from __future__ import annotations

import argparse
import csv
import datetime
import hashlib
import io
import json
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from dps_agent.host.cli.parser import Suggesting
from dps_agent.host.cli.verb import table
from dps_agent.host.config import secret_in
from dps_enroll.enrol import ENROLLED, RESULTS, UNCERTIFIED, UNSENT, Enrolling, Plan, fit_to_send, of_one_key
from dps_enroll.journal import Done, Journal, device_key
from dps_enroll.service import Credentials, Service, credentials_of
from dps_hal.errors import EXIT_GROUPS, AskOperator, DpsError, RetryLater, exit_group
from dps_hal.host.codes import REMEDIES
from dps_hal.host.regular import read_regular, replace_file
from dps_hal.platform import from_json
from dps_text import NotText, text_of, whole_number
from dps_text.enrolments import EnrolmentList, Entry, ListError, guarded, read_enrolments

if TYPE_CHECKING:
    from dps_enroll.certificates import Certificates, Verdict

VARIABLE = "DPS_ENROLL_CONNECTION_STRING"
QUOTA_PER_MINUTE = 1000  # operations of one service: "Azure subscription and service limits", DPS
LIST_LIMIT = 256 * 1024 * 1024  # bytes
SECRET_LIMIT = 1024  # bytes of a connection string
CONNECTIONS_LIMIT = 16
PROGRESS_S = 10.0
SHOWN = 5  # registration ids on a line
_EPILOG = f"""
credentials: a connection string of a shared access policy with EnrollmentRead and EnrollmentWrite, in the file that
--credentials names (mode 0600) or in {VARIABLE}.

exit status: 0 all are enrolled (with --dry-run: can be sent), 1 not all, 2 usage, 3 later (no answer, or ended by a
signal), 4 refused by the service, 6 a file or setting is wrong. The same command goes on where an earlier one ended.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command line and returns its exit status."""
    parser = _parser()
    chosen = parser.parse_args(arguments)
    if (chosen.ek_certificates is None) != (chosen.ek_roots is None):
        parser.error("expected --ek-certificates and --ek-roots together")
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        return _run(chosen)
    except DpsError as error:
        print(f"dps-enroll: {error.message}\n{REMEDIES[error.code]}", file=sys.stderr)
        return EXIT_GROUPS.index(exit_group(error))
    except KeyboardInterrupt:  # while nothing is sent
        print("dps-enroll: ended by a signal", file=sys.stderr)
        return EXIT_GROUPS.index("retry")
    except OSError as error:
        print(f"dps-enroll: {error.filename or 'writing'}: {error.strerror}", file=sys.stderr)
        return EXIT_GROUPS.index("config")


def _interrupt(number: int, _: object) -> NoReturn:
    raise KeyboardInterrupt


def _parser() -> argparse.ArgumentParser:
    parser = Suggesting(
        prog="dps-enroll",
        description="Enrols a list of TPMs at a Device Provisioning Service.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("list", metavar="FILE", help="CSV or JSON, as 'dps-agent enroll --append' writes it")
    add("--credentials", metavar="FILE", help=f"with a connection string; default: the variable {VARIABLE}")
    add("--common", metavar="FILE", help="JSON: fields of every enrolment, such as iotHubs or initialTwin")
    add("--replace", action="store_true", help="an enrolment by another key, or with another policy, gets the list's")
    add(
        "--per-minute",
        type=_number(10**6),
        default=QUOTA_PER_MINUTE,
        metavar="N",
        help="the quota; default %(default)s",
    )
    add(
        "--counts",
        choices=("devices", "requests"),
        default="devices",
        help="what the quota counts: nothing is published, so devices, the slower one, is the default",
    )
    add("--connections", type=_number(CONNECTIONS_LIMIT), default=4, metavar="N", help="at a time; default %(default)s")
    add("--ca-file", default="", metavar="FILE", help="the only roots to trust for the service; default: the system's")
    add("--proxy", default="env", metavar="URL|env|none", help="default %(default)s")
    add("--journal", metavar="FILE", help="what is done; default: FILE.journal")
    add("--results", metavar="FILE", help="the list with a result for each device; default: FILE.results.csv")
    add("--report", metavar="FILE", help="JSON about the lot; default: FILE.report.json")
    add("--ek-certificates", type=Path, metavar="DIR", help="enrol only whose certificate in there is verified")
    add("--ek-roots", type=Path, metavar="FILE", help="PEM: the TPM makers' roots that are trusted")
    add("--ek-intermediates", type=Path, metavar="FILE", help="PEM: authorities between roots and certificates")
    add("--dry-run", action="store_true", help="look at list and certificates, and send nothing")
    return parser


def _number(highest: int) -> Any:
    def read(text: str) -> int:
        value = whole_number(text, 1, highest)
        if value is None:
            raise argparse.ArgumentTypeError(f"expected a whole number from 1 to {highest}; came {text!r}")
        return value

    return read


def _run(chosen: argparse.Namespace) -> int:
    started_s = time.time()
    results, report = (chosen.results or f"{chosen.list}.results.csv"), (chosen.report or f"{chosen.list}.report.json")
    for option, path in (("--results", results), ("--report", report)):  # before anything is sent
        folder = os.path.dirname(os.path.abspath(path))
        if not os.access(folder, os.W_OK | os.X_OK):
            raise AskOperator("config.invalid", f"{option}: expected a folder that can be written to; came {folder}")
    content, listed = _listed(chosen.list)
    fit, done = fit_to_send(listed.entries)
    certificates = _certificates(chosen)
    verdicts = {} if certificates is None else {entry.registration_id: certificates.verdict(ek) for entry, ek in fit}
    wanted: list[Entry] = []
    for entry, _ in fit:
        verdict = verdicts.get(entry.registration_id)
        if verdict and verdict.why:
            done.append(Done(entry.registration_id, entry.endorsement_key, UNCERTIFIED, verdict.why))
        else:
            wanted.append(entry)
    shared = of_one_key(fit)
    for ids in shared:
        some = ", ".join([*ids[:SHOWN], *(["…"] if len(ids) > SHOWN else [])])
        print(f"{chosen.list}: one endorsement key under {len(ids)} registration ids: {some}", file=sys.stderr)
    lot: dict[str, Any] = {
        "list": os.path.basename(chosen.list),
        "sha256": hashlib.sha256(content).hexdigest(),
        "startedUtc": _utc(started_s),
        "notRead": [str(each) for each in listed.odd],
        "ofOtherKinds": len(listed.others),
        "ofOneKey": shared,
    }
    failure = _enrol(chosen, wanted, done, lot)
    outcome = {each.key: each for each in done}
    counts = Counter(each.result for each in outcome.values())
    lot |= {
        "endedUtc": _utc(time.time()),
        "devices": len(outcome),
        "results": {result: counts[result] for result in RESULTS if counts[result]},
        "ended": failure.message if failure else "",
    }
    if certificates is not None:
        tpms = Counter(verdict.tpm for verdict in verdicts.values() if not verdict.why)
        lot["certificates"] = {
            "verified": sum(tpms.values()),
            "tpms": dict(sorted(tpms.items())),
            "ofNoDevice": certificates.unused,
            "unreadable": certificates.unreadable,
        }
    replace_file(results, _results(listed, outcome, verdicts))
    replace_file(report, f"{json.dumps(lot, indent=2)}\n".encode())
    print("\n".join(table([(result, str(count)) for result, count in lot["results"].items()])))
    for each in listed.odd:
        print(f"{chosen.list}: {each}", file=sys.stderr)
    if failure:
        raise failure
    good = sum(counts[result] for result in ((UNSENT,) if chosen.dry_run else ENROLLED))
    return EXIT_GROUPS.index("ok" if good == len(outcome) and not listed.odd else "failed")


def _enrol(
    chosen: argparse.Namespace, wanted: Sequence[Entry], done: list[Done], lot: dict[str, Any]
) -> DpsError | None:
    """Adds what became of each to `done`, and what the run took to `lot`; why it ended early, or None."""
    if chosen.dry_run:
        done += [Done(entry.registration_id, entry.endorsement_key, UNSENT, "") for entry in wanted]
        return None
    credentials = _credentials(chosen.credentials)
    common = _common(chosen.common)
    plan = Plan(chosen.per_minute, chosen.counts == "devices", chosen.connections, chosen.replace, common)
    failure: DpsError | None = None
    with Journal(chosen.journal or f"{chosen.list}.journal", credentials.host) as journal:

        def result(entry: Entry) -> tuple[str, str]:
            return journal.result(entry.registration_id, entry.endorsement_key, plan.policy(entry)) or (UNSENT, "")

        left = [entry for entry in wanted if result(entry)[0] not in ENROLLED]
        progress = _Progress(len(wanted), len(wanted) - len(left))

        def connect() -> Service:
            return Service(credentials, chosen.ca_file, chosen.proxy)

        enrolling = Enrolling(plan, journal, connect, progress.add, progress.wait)
        try:
            enrolling.run(left)
        except KeyboardInterrupt:
            failure = RetryLater("agent.interrupted", "ended by a signal")
        except DpsError as error:
            failure = error
        done += [Done(entry.registration_id, entry.endorsement_key, *result(entry)) for entry in wanted]
    lot |= {
        "service": credentials.host,
        "enrolledBefore": len(wanted) - len(left),
        "requests": enrolling.requests,
        "throttled": enrolling.throttled,
    }
    return failure


class _Progress:
    """Says on stderr how far it is, now and then; for any thread."""

    def __init__(self, devices: int, before: int) -> None:
        self._devices, self._done = devices, before
        self._lock = threading.Lock()
        self._next_s = time.monotonic() + PROGRESS_S
        if before:
            print(f"dps-enroll: {before} of {devices} devices were enrolled before", file=sys.stderr)

    def add(self, devices: int) -> None:
        """So many more are done with."""
        self._say("", devices)

    def wait(self, why: str) -> None:
        """A request is to be sent again, later."""
        self._say(f", waiting: {why}")

    def _say(self, more: str, devices: int = 0) -> None:
        with self._lock:
            self._done += devices
            if time.monotonic() < self._next_s:
                return
            self._next_s = time.monotonic() + PROGRESS_S
            print(f"dps-enroll: {self._done} of {self._devices} devices{more}", file=sys.stderr, flush=True)


def _listed(path: str) -> tuple[bytes, EnrolmentList]:
    content = read_regular(path, LIST_LIMIT)
    try:
        return content, read_enrolments(text_of(content))
    except (NotText, ListError) as error:
        raise AskOperator("config.invalid", f"{path}: {error}") from None


def _certificates(chosen: argparse.Namespace) -> Certificates | None:
    if chosen.ek_certificates is None:
        return None
    from dps_enroll.certificates import Certificates  # so that cryptography is needed for certificates alone

    now = datetime.datetime.now(datetime.UTC)
    return Certificates(chosen.ek_certificates, chosen.ek_roots, chosen.ek_intermediates, now)


def _credentials(path: str | None) -> Credentials:
    if path is not None:
        try:
            return credentials_of(text_of(secret_in("--credentials", path, SECRET_LIMIT)), path)
        except NotText as error:
            raise AskOperator("config.invalid", f"--credentials: {path}: {error}") from None
    text = os.environ.get(VARIABLE, "")
    if not text:
        raise AskOperator("config.missing", f"expected --credentials FILE, or the variable {VARIABLE}")
    return credentials_of(text, VARIABLE)


def _common(path: str | None) -> Mapping[str, Any]:
    if path is None:
        return {}
    try:
        fields = from_json(text_of(read_regular(path, SECRET_LIMIT * 64)))
    except ValueError as error:
        raise AskOperator("config.invalid", f"--common: {path}: {error}") from None
    if not isinstance(fields, dict) or {"registrationId", "attestation"} & set(fields):
        raise AskOperator("config.invalid", f"--common: expected an object of fields that devices share in {path}")
    return fields


def _results(listed: EnrolmentList, outcome: Mapping[tuple[str, str], Done], verdicts: Mapping[str, Verdict]) -> bytes:
    """The list as CSV, which is a list again, with what became of each device."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["registrationId", "endorsementKey", "result", "detail", "certificate"])
    for key in dict.fromkeys(device_key(entry.registration_id, entry.endorsement_key) for entry in listed.entries):
        done = outcome[key]
        verdict = verdicts.get(done.registration_id)
        certified = "" if verdict is None or verdict.why else f"verified {verdict.tpm}".rstrip()
        cells = (done.registration_id, done.endorsement_key, done.result, done.detail, certified)
        writer.writerow([guarded(cell) for cell in cells])  # a factory's list is nobody's program
    return text.getvalue().encode("utf-8", "backslashreplace")  # JSON may have half a character


def _utc(at_s: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(at_s))


if __name__ == "__main__":
    sys.exit(main())
