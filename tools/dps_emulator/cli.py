"""The command `dps-emulator`."""

import argparse
import base64
import contextlib
import difflib
import errno
import hashlib
import itertools
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from dps_emulator.breakages import THROTTLED_HUB
from dps_emulator.limits import LIMITS, QUEUE_S
from dps_text import NotText, text_of, whole_number

if TYPE_CHECKING:
    from dps_emulator.enrollments import Imported
    from dps_emulator.faults import FaultScript
    from dps_emulator.hub import HubLine
    from dps_emulator.hub_devices import BoundedFile, HubDevice
    from dps_emulator.server import LogLine
    from dps_emulator.service import DpsService, Settings
    from dps_emulator.store import Record, Records, Store

OK, FAILED, USAGE, NOT_YET = 0, 1, 2, 3
LOOK_EVERY_S = 0.5
NOT_THERE = 404  # HTTP status of a hub, for a device that is not connected, and of a device, for an unknown method
TOKEN_LIFE_S = 3600
FOLLOW_S = 25.0  # that one request waits for a message
_AGES_S = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_TIME = re.compile(r"\d{4}-\d\d-\d\d(T\d\d(:\d\d(:\d\d(\.\d{1,7})?)?)?Z?)?")
HUB_SUFFIXES = (
    ".azure-devices.net",
    ".azure-devices.cn",
    ".azure-devices.us",
)  # an agent's without settings of its own
ID_SCOPE = "0ne00000000"
HUB = "emulator.azure-devices.net"
PACKAGE = "dps-agent"  # what is installed, with the extra `emulator`
NAMED = 20  # lines that an import passes over and that it names


class _UsageError(Exception):
    """Something on the command line, or a file that it names, can't be used."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0 done, 1 failed or refused, 2 usage, 3 not within the time."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["help"]:
        words = [*words[1:], "--help"]
    parser = _parser()
    if not words:
        parser.print_help(sys.stderr)
        return USAGE
    arguments = parser.parse_args(words)
    from dps_emulator.control_socket import ControlError
    from dps_emulator.registrations import StateError

    try:
        return int(arguments.run(arguments))
    except ModuleNotFoundError as error:
        return _complain(f"needs '{error.name}', which is not installed: it comes with the extra 'emulator'", USAGE)
    except _UsageError as error:
        return _complain(str(error), USAGE)
    except (StateError, ControlError) as error:
        return _complain(str(error), FAILED)
    except OSError as error:
        named = error.filename and error.strerror
        return _complain(f"{error.filename}: {error.strerror}" if named else str(error), FAILED)


def _did_you_mean(word: str, known: Iterable[str]) -> str:
    """What stands behind a word that is not `known`; "" where none is like it."""
    near = difflib.get_close_matches(word, list(known), 1)
    return f": did you mean '{near[0]}'?" if near else ""


class _Parser(argparse.ArgumentParser):
    """Names the command that somebody may have meant."""

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            hint = _did_you_mean(str(value), map(str, action.choices))
            if hint:
                raise argparse.ArgumentError(action, f"there is no '{value}'{hint}")
        super()._check_value(action, value)


class _Version(argparse.Action):
    """Prints which release this is."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import PackageNotFoundError, version

        try:
            found = version(PACKAGE)
        except PackageNotFoundError:
            found = "from a checkout, not installed"
        print(f"dps-emulator {found}")
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="dps-emulator",
        description="A Device Provisioning Service, and the IoT hubs behind it, on your desk.",
        epilog="dps-emulator help COMMAND says what a command takes.",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show which release this is")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_serve(commands)

    command = commands.add_parser("enroll-import", help="add the enrolments of a CSV or JSON file to a state folder")
    command.add_argument("file", metavar="FILE", help="CSV with registrationId,endorsementKey, or JSON; - is stdin")
    command.add_argument("--state-dir", type=Path, required=True, metavar="DIR")
    command.add_argument("--json", action="store_true", help="print the result as JSON")
    command.set_defaults(run=_enroll_import)

    command = commands.add_parser("move", help="send a device's next registration to another hub")
    command.add_argument("registration_id", metavar="REGISTRATION-ID")
    command.add_argument("hub", metavar="HUB", help="one of the hubs that 'serve' was started with")
    command.add_argument("--state-dir", type=Path, required=True, metavar="DIR")
    command.add_argument("--json", action="store_true", help="print the result as JSON")
    command.set_defaults(run=_move)

    command = commands.add_parser("enrollments", help="list the enrolments of a state folder")
    command.add_argument("--state-dir", type=Path, required=True, metavar="DIR")
    command.add_argument("--json", action="store_true", help="print the result as JSON")
    command.set_defaults(run=_enrollments)

    command = commands.add_parser("enrollment", help="show, disable, enable or delete one enrolment")
    command.add_argument("action", choices=("show", "disable", "enable", "delete"), metavar="ACTION")
    command.add_argument("registration_id", metavar="REGISTRATION-ID")
    command.add_argument("--group", action="store_true", help="of an enrolment group of that id")
    command.add_argument("--state-dir", type=Path, required=True, metavar="DIR")
    command.add_argument("--json", action="store_true", help="print the result as JSON")
    command.set_defaults(run=_enrollment)

    command = commands.add_parser("enroll", help="enrol one device, or a group, and print its record")
    command.add_argument("registration_id", metavar="REGISTRATION-ID")
    command.add_argument("--group", action="store_true", help="an enrolment group of that id")
    command.add_argument("--key-file", metavar="FILE", help="its key in base64, - is stdin; default: a new one")
    command.add_argument(
        "--certificate", metavar="FILE", help="instead of a key its certificate, or the group's CA; PEM"
    )
    command.add_argument(
        "--credential-policy", metavar="NAME", help="issue certificates for its devices by this policy; a preview"
    )
    command.add_argument("--replace", action="store_true", help="put it in the place of one that is there")
    command.add_argument("--state-dir", type=Path, required=True, metavar="DIR")
    command.add_argument("--json", action="store_true", help="print the result as JSON")
    command.set_defaults(run=_enroll)

    command = commands.add_parser("derive-key", help="print the key of one device of an enrolment group")
    command.add_argument("registration_id", metavar="REGISTRATION-ID")
    command.add_argument("--key-file", metavar="FILE", help="the group's key in base64, - is stdin")
    command.add_argument("--group", metavar="GROUP-ID", help="or the group that a state folder has")
    command.add_argument("--state-dir", type=Path, metavar="DIR", help="with --group")
    command.add_argument("--json", action="store_true", help="print the result as JSON")
    command.set_defaults(run=_derive_key)

    command = commands.add_parser("registrations", help="list who has registered, and where they are assigned")
    command.add_argument("--state-dir", type=Path, required=True, metavar="DIR")
    command.add_argument("--json", action="store_true", help="print the result as JSON")
    command.set_defaults(run=_registrations)

    command = commands.add_parser("verify-token", help="say whether a hub would accept a token")
    command.add_argument("file", metavar="TOKEN-FILE", help="a file that holds the token; - is stdin")
    command.add_argument("--state-dir", type=Path, required=True, metavar="DIR")
    command.add_argument("--json", action="store_true", help="print the result as JSON")
    command.set_defaults(run=_verify_token)
    _add_hub_commands(commands)
    return parser


def _add_hub_commands(commands: "argparse._SubParsersAction[_Parser]") -> None:
    """The commands that go to the running server through its state folder."""

    def add(name: str, run: Callable[[argparse.Namespace], int], text: str, device: bool = True) -> Any:
        command = commands.add_parser(name, help=text)
        if device:
            command.add_argument("device_id", metavar="DEVICE-ID")
            command.add_argument("--hub", default="", metavar="NAME", help="needed if the device is at several hubs")
        command.add_argument("--state-dir", type=Path, required=True, metavar="DIR", help="of the running 'serve'")
        command.add_argument("--json", action="store_true", help="print the result as JSON")
        command.set_defaults(run=run)
        return command.add_argument

    option = add("wait", _wait, "wait until 'serve' listens, and with a device until that is connected", device=False)
    option("device_id", nargs="?", metavar="DEVICE-ID")
    option("--timeout", type=_number(1, 86_400), default=60, metavar="S", help="default 60; then exit status 3")

    option = add("send-c2d", _send_c2d, "send a message to a device")
    option("text", metavar="TEXT", help="the payload; - is stdin")
    option("--property", action="append", type=_property, default=[], metavar="NAME=VALUE", help="repeatable")
    option(
        "--life", type=_number(1, 172_800, float), metavar="S", help="default 3600; a message says only one given here"
    )

    option = add("invoke", _invoke, "call a direct method and print the answer")
    option("method", metavar="METHOD")
    option("payload", nargs="?", type=_json, metavar="JSON", help="none: the request has no payload")
    option("--timeout", type=_number(1, 300, float), default=30.0, metavar="S", help="default 30")
    option(
        "--wait",
        type=_number(1, 86_400),
        default=0,
        metavar="S",
        help="for so long, until the device is connected and a program answers; then exit status 3",
    )

    option = add("twin", _twin, "print a device's twin, after changing it where asked")
    option("--desired", type=_json, metavar="JSON", help="merge this object into the desired properties")

    option = add("messages", _messages, "list what has arrived from devices", device=False)
    option("device_id", nargs="?", metavar="DEVICE-ID")
    option("--since", type=_since, metavar="TIME", help="2026-01-31T10:00:00Z, or ago: 90s, 10m, 2h, 1d")
    option("--follow", action="store_true", help="go on with those to come, until it is interrupted")
    option("--clear", action="store_true", help="then forget those that were listed")

    option = add("watch", _watch, "print what arrives from now on, until it is interrupted", device=False)
    option("device_id", nargs="?", metavar="DEVICE-ID")
    option("--count", type=_number(1, 10**9), metavar="N", help="end after so many")
    option("--timeout", type=_number(1, 86_400), metavar="S", help="end after so long; status 3 with fewer than N")

    option = add("device-add", _device_add, "register a device with a symmetric key; prints its connection string")
    option("--key-file", metavar="FILE", help="a key in base64, - is stdin; default: a new one")
    option = add("device-token", _device_token, "print a token of a device, its password for MQTT")
    option("--life", type=_number(1, 366 * 86_400), default=TOKEN_LIFE_S, metavar="S", help="default %(default)s")
    for verb, text in {
        "enable": "let a device connect again",
        "disable": "end a device's connection and refuse it",
        "withdraw": "end a device's connection and refuse it until DPS assigns it anew",
        "rotate-key": "give a device another key, which DPS hands out from now on",
        "disconnect": "end a device's connection",
    }.items():
        add(f"device-{verb}", partial(_device, verb), text)
    option = add("connection-string", _connection_string, "print what a back end calls DPS with", device=False)
    option("--hubs", action="store_true", help="or the hubs")
    option("--token", action="store_true", help="instead a token for an hour, the value of Authorization")
    add("devices", _devices, "list the devices that the hubs know", device=False)

    option = add("break", _break, "make things go wrong; replaces what was broken before", device=False)
    option("what", choices=("nothing", "drop", "delay", "refuse", "silence", "throttle", "script"))
    option("--operation", metavar="NAME", help="accept, connect, subscribe, telemetry, twin-get, …; default any")
    option("--device", metavar="DEVICE-ID", help="only this one's")
    option("--after", action="store_true", help="drop, silence: when the hub has acted, its answer unsent")
    option("--times", type=_number(1, 10**9), metavar="N", help="only so often")
    option("--seconds", type=_number(0, 86_400, float), metavar="S", help="delay: for so long")
    option("--code", type=_number(1, 5), default=5, metavar="N", help="refuse: CONNACK's code, default 5")
    option("--file", metavar="FILE", help="script: a fault script as for 'serve --faults'; - is stdin")


def _add_serve(commands: "argparse._SubParsersAction[_Parser]") -> None:
    command = commands.add_parser("serve", help="serve until SIGTERM or SIGINT")
    add = command.add_argument
    add("--port", type=_number(0, 65535), default=0, metavar="N", help="0, the default: a free one; stdout says which")
    add("--hub-port", type=_number(0, 65535), default=0, metavar="N", help="of the hubs, MQTT and WebSocket; default 0")
    add("--listen", default="127.0.0.1", metavar="ADDRESS", help="default %(default)s")
    add("--id-scope", default=ID_SCOPE, metavar="SCOPE", help="default %(default)s")
    add("--state-dir", type=Path, metavar="DIR", help="keep all that survives here, and take commands")
    add("--ca-file", type=Path, metavar="FILE", help="write the CA's certificate here (default: STATE-DIR/ca-cert.pem)")
    add("--hub", action="append", type=_hub, metavar="NAME", help=f"a linked hub, repeatable; default {HUB}")
    add(
        "--allocation",
        choices=("static", "hashed", "rotate"),
        default="static",
        help="static: the first hub; hashed: by registration id; rotate: each registration goes to the next hub",
    )
    add("--assign-after", type=_number(0, 86_400, float), default=0.0, metavar="S", help="seconds until 'assigned'")
    add("--retry-after", type=_retry_after, default=3, metavar="S", help="whole seconds or 'none'; default %(default)s")
    add("--enroll-any", action="store_true", help="enrol every TPM at first sight (never on a network you don't own)")
    add("--enrollments", type=Path, metavar="FILE", help="enrol the devices of this CSV or JSON file")
    add("--lookup", type=_lookup, default=("fresh", 0), metavar="fresh|stale:N|no-key|401|404", help="default fresh")
    add("--hub-key", choices=("stable", "rotate"), default="stable", help="rotate: a new one with each registration")
    add("--no-noda", action="store_true", help="issue keys that count against the TPM's lockout")
    add("--key-bytes", type=_number(1, 128), default=32, metavar="N", help="size of the keys issued; default 32")
    add(
        "--refuse-by",
        choices=("status", "operation"),
        default="status",
        help="unknown or disabled enrolments: an HTTP error at once, or an operation that fails",
    )
    add("--clock-skew", type=_number(0, 86_400), default=300, metavar="S", help="accept tokens expired so long ago")
    add("--tier", choices=("standard", "basic"), default="standard", help="basic: the hubs take telemetry only")
    add("--quota", type=_rate("min"), metavar="N/min", help="registration requests that are granted; the others: 429")
    add(
        "--quota-by",
        choices=("minute", "bucket"),
        default="minute",
        help="fixed minutes, or a bucket of a second's part",
    )
    add("--quota-counts", type=int, choices=(1, 2, 3), default=2, help="1: PUT with token, 2: both PUTs, 3: polls too")
    add("--quota-retry-after", type=_retry_after, default=None, metavar="S", help="Retry-After of a 429; default none")
    add("--connects", type=_rate("s"), metavar="N/s", help="new connections that the hubs take; the others are dropped")
    add(
        "--connect-queue", type=_number(0, 3600, float), default=0.0, metavar="S", help="or wait for so long; default 0"
    )
    add(
        "--limits",
        choices=tuple(LIMITS),
        help="documented limits of DPS and of a hub of one unit; the options above go first",
    )
    add(
        "--web",
        type=_number(0, 65535),
        nargs="?",
        const=0,
        metavar="N",
        help="a page for this machine's browser, on port N, default 0; prints its address, which has a token in it",
    )
    add("--strict", action="store_true", help="refuse what hubs tolerate of some clients, but nobody documents")
    add("--client-certificates", action="store_true", help="ask clients for a certificate, for enrolments by X.509")
    add(
        "--issued-life",
        type=_number(60, 10**9),
        default=30 * 86_400,
        metavar="S",
        help="of a certificate that is issued for a device's request, by an enrolment's policy; default 30 days",
    )
    add(
        "--issue-after", type=_number(0, 43_200, float), default=0.0, metavar="S", help="seconds until a hub issues one"
    )
    add("--faults", type=Path, metavar="FILE", help="fault script, a JSON list; see dps_emulator/faults.py")
    add(
        "--ready-file",
        type=Path,
        metavar="FILE",
        help="written when it listens, says where as JSON; deleted at the end",
    )
    add("--log-file", type=Path, metavar="FILE", help="append the log here too, a regular file")
    add(
        "--telemetry-file",
        type=Path,
        metavar="FILE",
        help="append what arrives from devices here too, a JSON document a line; a regular file",
    )
    add(
        "--file-limit",
        type=_number(1, 100_000),
        default=64,
        metavar="MIB",
        help="of the messages kept, and of each of both files, whose one before is kept as NAME.1; default 64",
    )
    command.set_defaults(run=_serve)


def _serve(arguments: argparse.Namespace) -> int:
    import logging

    from dps_emulator.issuing import Issuer
    from dps_emulator.server import EmulatorServer, LoggedNotices
    from dps_emulator.service import DpsService
    from dps_emulator.state import (
        certificate_authority,
        claimed,
        issuing_root,
        make_private_folder,
        service_secret,
        write_private_file,
    )

    stopping = False
    server: EmulatorServer | None = None

    def stop(number: int, frame: object) -> None:
        nonlocal stopping
        stopping = True
        if server:
            server.stop()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)

    state_dir: Path | None = arguments.state_dir
    ca_file: Path | None = arguments.ca_file or (state_dir and state_dir / "ca-cert.pem")
    if ca_file is None:
        raise _UsageError("clients need the CA: give --ca-file or --state-dir")
    ready_file: Path | None = arguments.ready_file
    if ready_file:
        ready_file.unlink(missing_ok=True)  # one that an emulator has left that was killed
    faults = _fault_script(arguments.faults)
    listed = _read_enrollments(arguments.enrollments) if arguments.enrollments else None
    if state_dir:
        make_private_folder(state_dir)
    limit_bytes = arguments.file_limit * 1024 * 1024
    logging.getLogger().addHandler(LoggedNotices(_warn))
    log = _Log(_bounded_file("--log-file", arguments.log_file, limit_bytes))
    telemetry_file = _bounded_file("--telemetry-file", arguments.telemetry_file, limit_bytes)
    with claimed(state_dir) if state_dir else contextlib.nullcontext():
        store = _store(state_dir, limit_bytes)
        issuer = Issuer(os.urandom, issuing_root(state_dir))
        records = store.enrollments, store.registrations, os.urandom, store.groups
        service = DpsService(_settings(arguments), *records, issuer)
        if listed:
            store.enroll(listed.enrollments)
            _tell_of(listed)
        authority = certificate_authority(state_dir)
        ca_file.write_bytes(authority.cert_pem.bytes())
        listen = arguments.listen
        server = EmulatorServer(
            service,
            store,
            authority,
            listen=listen,
            port=arguments.port,
            hub_port=arguments.hub_port,
            state_dir=state_dir,
            faults=faults,
            log=log,
            hub_log=log,
            notice=_warn,
            web_port=arguments.web,
            secret=service_secret(state_dir),
            telemetry=_Lines(telemetry_file, "the telemetry file") if telemetry_file else None,
        )
        if arguments.enroll_any:
            _warn("--enroll-any gives every TPM that asks a hub: use it on your own network only")
        for hub in service.settings.hubs:
            if not hub.lower().endswith(HUB_SUFFIXES):
                _warn(f"an agent refuses the hub {hub} unless hub_suffixes in its [hub] has that name")
        print(_where(server.addresses), flush=True)
        if stopping:
            server.stop()
        if ready_file:
            write_private_file(ready_file, json.dumps({**server.addresses, "caFile": str(ca_file)}).encode() + b"\n")
        try:
            server.run()
        finally:
            if ready_file:
                ready_file.unlink(missing_ok=True)
            store.close()
    return OK


def _store(state_dir: Path | None, messages_limit_bytes: int) -> "Store":
    """The store of a server, read through for damage where it is in a folder."""
    from dps_emulator.state import open_store
    from dps_emulator.store import Store

    if state_dir is None:
        return Store(None, messages_limit_bytes)
    store = open_store(state_dir, messages_limit_bytes, _warn)
    store.check()
    for sentence in store.damaged():
        _warn(sentence)
    _warn_of_damage(state_dir)
    return store


def _where(addresses: dict[str, str]) -> str:
    """Where an emulator listens, as `serve` and `wait` print it."""
    page = f"\npage at {addresses['web']}" if "web" in addresses else ""
    return f"listening on {addresses['dps']}\nhubs on {addresses['hubs']}{page}"


class _Lines:
    """Lines in a file; no request fails for want of it."""

    def __init__(self, file: "BoundedFile", what: str) -> None:
        self._file = file
        self._what = what
        self._is_failing = False

    def __call__(self, line: str) -> None:
        try:
            self._file.append(line.encode())
        except OSError as error:
            if not self._is_failing:
                _warn(f"{self._what} misses lines from here on: {error}")
            self._is_failing = True
        else:
            self._is_failing = False


class _Log:
    """The log of a server, on stderr and in the log file."""

    def __init__(self, file: "BoundedFile | None") -> None:
        self._lines = _Lines(file, "the log file") if file else None

    def __call__(self, line: "LogLine | HubLine") -> None:
        text = line.text()
        _print_to_stderr(text)
        if self._lines:
            self._lines(text)


def _bounded_file(option: str, path: Path | None, limit_bytes: int) -> "BoundedFile | None":
    """The file of an option; raises _UsageError where no lines can be added to it."""
    from dps_emulator.hub_devices import BoundedFile

    if path is None:
        return None
    file = BoundedFile(path, limit_bytes)
    try:
        file.make()
    except OSError as error:
        why = "a symbolic link" if error.errno == errno.ELOOP else error.strerror
        without = "; the log goes to stderr without it" if option == "--log-file" else ""
        raise _UsageError(f"{option} {path} can't be used: {why}{without}") from None
    return file


def _settings(arguments: argparse.Namespace) -> "Settings":
    from dps_emulator.service import CHALLENGE, POLL, REGISTER, Settings

    lookup, stale_lookups = arguments.lookup
    limits = LIMITS.get(arguments.limits)
    quota, connects = arguments.quota, arguments.connects
    if limits:
        quota = quota or limits.registrations_per_min
        connects = connects or limits.connects_per_s * len(arguments.hub or (HUB,))
    return Settings(
        id_scope=arguments.id_scope,
        hubs=tuple(arguments.hub or (HUB,)),
        allocation=arguments.allocation,
        assign_after_s=arguments.assign_after,
        retry_after_s=arguments.retry_after,
        enroll_any=arguments.enroll_any,
        lookup=lookup,
        stale_lookups=stale_lookups,
        hub_key=arguments.hub_key,
        no_da=not arguments.no_noda,
        key_bytes=arguments.key_bytes,
        refuse_by=arguments.refuse_by,
        clock_skew_s=arguments.clock_skew,
        tier=arguments.tier,
        quota_per_min=quota,
        quota_by=arguments.quota_by,
        quota_counts=(REGISTER, CHALLENGE, POLL)[: arguments.quota_counts],
        retry_after_429_s=arguments.quota_retry_after,
        connects_per_s=connects,
        connect_queue_s=arguments.connect_queue or (QUEUE_S if limits else 0.0),
        limits=limits,
        strict=arguments.strict,
        client_certificates=arguments.client_certificates,
        issued_life_s=arguments.issued_life,
        issue_after_s=arguments.issue_after,
    )


def _enroll_import(arguments: argparse.Namespace) -> int:
    from dps_emulator.state import open_store

    listed = _read_enrollments(arguments.file)
    with contextlib.closing(open_store(arguments.state_dir, notice=_warn)) as store:
        _warn_of_damage(arguments.state_dir)
        replaced = store.enroll(listed.enrollments)
    ids = [enrollment.registration_id for enrollment in listed.enrollments]
    plural = "" if len(ids) == 1 else "s"
    text = f"{len(ids)} enrolment{plural} imported, {replaced} of them replaced an earlier one"
    if listed.others:
        text += f"; {len(listed.others)} of other kinds passed over"
    if listed.odd:
        text += f"; {len(listed.odd)} odd"
    content = {
        "code": "failed" if listed.odd else "ok",
        "imported": ids,
        "replaced": replaced,
        "passedOver": [
            {"line": other.line, "registrationId": other.registration_id, "kind": other.kind} for other in listed.others
        ],
        "odd": [{"line": line, "message": why} for line, why in listed.odd],
    }
    _tell_of(listed)
    _say(arguments, content, text)
    return FAILED if listed.odd else OK


def _enroll(arguments: argparse.Namespace) -> int:
    from dps_emulator.attestation import NEW_KEY_BYTES, key_text
    from dps_emulator.enrollments import EnrollmentError, enrollment_from_json, registration_key
    from dps_emulator.state import open_store

    if arguments.certificate and arguments.key_file:
        raise _UsageError("enroll: --certificate and --key-file don't go together")
    key = _read_text(arguments.key_file).strip() if arguments.key_file else key_text(os.urandom(NEW_KEY_BYTES))
    named = {"enrollmentGroupId" if arguments.group else "registrationId": arguments.registration_id}
    attestation: dict[str, Any] = {"type": "symmetricKey", "symmetricKey": {"primaryKey": key}}
    if arguments.certificate:
        kind = "signingCertificates" if arguments.group else "clientCertificates"
        primary = {"certificate": _read_text(arguments.certificate)}
        attestation = {"type": "x509", "x509": {kind: {"primary": primary}}}
    try:
        policy = {"credentialPolicyName": arguments.credential_policy} if arguments.credential_policy else {}
        enrollment = enrollment_from_json({**named, "attestation": attestation, **policy})
    except EnrollmentError as error:
        raise _UsageError(str(error)) from None
    with contextlib.closing(open_store(arguments.state_dir, notice=_warn)) as store:
        _warn_of_damage(arguments.state_dir)
        records = store.groups if arguments.group else store.enrollments
        keyed = registration_key(enrollment.registration_id), enrollment
        if not records.put([keyed], replace=arguments.replace):
            kind = "an enrolment group" if arguments.group else "an enrolment"
            why = f"{kind} '{arguments.registration_id}' is there: --replace puts another in its place"
            return _complain(why, FAILED)
    record = enrollment.to_json(with_keys=arguments.key_file is None)
    return _say(arguments, {"code": "ok", "enrollment": record}, json.dumps(record, indent=2))


def _derive_key(arguments: argparse.Namespace) -> int:
    from dps_emulator.attestation import KeyTextError, derived_key, key_of, key_text
    from dps_emulator.enrollments import is_registration_id
    from dps_emulator.state import open_store

    name: str = arguments.registration_id
    if not is_registration_id(name):
        raise _UsageError(f"'{name}' is no registration id")
    if bool(arguments.key_file) == bool(arguments.group) or bool(arguments.group) != bool(arguments.state_dir):
        raise _UsageError("derive-key: expected --key-file, or --group with --state-dir")
    if arguments.key_file:
        try:
            group_key = key_of(_read_text(arguments.key_file).strip())
        except KeyTextError as error:
            raise _UsageError(f"--key-file: the group's key {error}") from None
    else:
        with contextlib.closing(open_store(arguments.state_dir, notice=_warn)) as store:
            group = store.groups.get(arguments.group)
        if group is None or group.keys is None:
            raise _UsageError(f"there is no enrolment group '{arguments.group}' with a symmetric key")
        group_key = group.keys.primary
    if name != name.lower():
        _warn(f"the key is for '{name}' as it is written; what DPS derives for an id in upper case is not published")
    key = key_text(derived_key(group_key, name))
    return _say(arguments, {"code": "ok", "registrationId": name, "deviceKey": key}, key)


def _tell_of(listed: "Imported") -> None:
    """Names what a list holds besides enrolments that the emulator has."""
    for other in listed.others[:NAMED]:
        _warn(f"line {other.line}: '{other.registration_id}' is an enrolment of the kind {other.kind}: passed over")
    for odd in listed.odd[:NAMED]:
        _warn(str(odd))
    if (more := len(listed.others[NAMED:]) + len(listed.odd[NAMED:])) > 0:
        _warn(f"and {more} more like these")


def _move(arguments: argparse.Namespace) -> int:
    from dps_emulator.control_socket import NotServed, call
    from dps_emulator.enrollments import is_hub_name, is_registration_id

    if not is_hub_name(arguments.hub):
        raise _UsageError(f"'{arguments.hub}' is no DNS name")
    if not arguments.state_dir.is_dir():
        raise _UsageError(f"no state folder at {arguments.state_dir}")
    with contextlib.suppress(NotServed):  # then the next `serve` decides which hubs there are
        hubs = call(arguments.state_dir, {"command": "hubs"})["hubs"]
        if arguments.hub.lower() not in map(str.lower, hubs):
            return _complain(f"no hub '{arguments.hub}' here; there are {', '.join(hubs)}", FAILED)
    try:
        if not is_registration_id(arguments.registration_id):
            raise KeyError
        with _service_of(arguments.state_dir) as (service, _):
            service.move(arguments.registration_id, arguments.hub)
    except KeyError:
        return _complain(f"no enrolment for '{arguments.registration_id}' in {arguments.state_dir}", FAILED)
    content = {"code": "ok", "registrationId": arguments.registration_id, "hub": arguments.hub}
    return _say(arguments, content, f"{arguments.registration_id} goes to {arguments.hub} when it next registers")


def _verify_token(arguments: argparse.Namespace) -> int:
    with _service_of(arguments.state_dir) as (service, store):
        text = _read_text(arguments.file).strip()

        def device_at(hub: str, device_id: str) -> "HubDevice | None":
            return store.devices(hub).get(device_id.lower())

        refusal = service.hub_token_refusal(text, time.time(), device_at)
    if refusal:
        _say(arguments, {"code": "refused", "error": {"message": refusal}}, f"refused: {refusal}")
        return FAILED
    return _say(arguments, {"code": "ok"}, "the hub would accept this token")


def _ask(arguments: argparse.Namespace, command: str, deadline_s: float = 10.0, **request: Any) -> dict[str, Any]:
    """The running server's answer to a command."""
    from dps_emulator.control_socket import call

    if not arguments.state_dir.is_dir():
        raise _UsageError(f"no state folder at {arguments.state_dir}")
    _warn_of_damage(arguments.state_dir)
    device = {"device": arguments.device_id, "hub": arguments.hub} if "hub" in arguments else {}
    return call(arguments.state_dir, {"command": command, **device, **request}, deadline_s)


def _wait(arguments: argparse.Namespace) -> int:
    from dps_emulator.control_socket import NotServed, call

    until_s = time.monotonic() + arguments.timeout
    folder: Path = arguments.state_dir
    warned = False
    while True:
        why = f"no emulator serves {folder}"
        with contextlib.suppress(NotServed):
            addresses = call(folder, {"command": "addresses"})
            why = f"'{arguments.device_id}' is not connected to a hub"
            if not warned:
                _warn_of_damage(folder)
                warned = True
            if arguments.device_id is None:
                return _say(arguments, {"code": "ok", **addresses}, _where(addresses))
            for device in call(folder, {"command": "devices"})["devices"]:
                if device["connected"] and device["deviceId"].lower() == arguments.device_id.lower():
                    text = f"{device['deviceId']} is connected to {device['hub']}"
                    return _say(arguments, {"code": "ok", **addresses, **device}, text)
        if (left_s := until_s - time.monotonic()) <= 0:
            return _complain(f"{why}, after {arguments.timeout} s", NOT_YET)
        time.sleep(min(LOOK_EVERY_S, left_s))


def _send_c2d(arguments: argparse.Namespace) -> int:
    content = _read_bytes("-") if arguments.text == "-" else os.fsencode(arguments.text)
    payload = base64.b64encode(content).decode()
    sent = _ask(arguments, "send-c2d", payload=payload, properties=dict(arguments.property), lifeS=arguments.life)
    return _say(arguments, {"code": "ok", **sent}, f"message {sent['messageId']} is on its way")


def _invoke(arguments: argparse.Namespace) -> int:
    from dps_emulator.control_socket import ControlError

    payload = {} if arguments.payload is None else {"payload": arguments.payload[0]}
    deadline_s, until_s = arguments.timeout + 5, time.monotonic() + arguments.wait
    while True:
        try:
            said = _ask(arguments, "invoke", deadline_s, method=arguments.method, timeoutS=arguments.timeout, **payload)
            why = f"no program on '{arguments.device_id}' answers '{arguments.method}'"
            if said["status"] != NOT_THERE or not arguments.wait:
                return _say(arguments, {"code": "ok", **said}, f"{said['status']} {json.dumps(said['payload'])}")
        except ControlError as error:
            if error.code // 1000 != NOT_THERE or not arguments.wait:
                raise
            why = str(error)
        if (left_s := until_s - time.monotonic()) <= 0:
            return _complain(f"{why}, after {arguments.wait} s", NOT_YET)
        time.sleep(min(LOOK_EVERY_S, left_s))


def _twin(arguments: argparse.Namespace) -> int:
    twin = _ask(arguments, "twin", **({} if arguments.desired is None else {"desired": arguments.desired[0]}))
    return _say(arguments, {"code": "ok", **twin}, json.dumps(twin["properties"], indent=2))


def _messages(arguments: argparse.Namespace) -> int:
    if arguments.follow and arguments.clear:
        raise _UsageError("messages: --follow and --clear don't go together")
    answer = _ask(arguments, "messages", device=arguments.device_id, isKnown=True)
    messages = [message for message in answer["messages"] if message["time"] >= (arguments.since or "")]
    if arguments.follow:
        for message in messages:
            _print_message(arguments, message)
        return _follow(arguments, answer["last"])
    if arguments.clear:
        _ask(arguments, "clear", device=arguments.device_id, upTo=answer["last"])
    lines = [_message_line(message) for message in messages]
    return _say(arguments, {"code": "ok", "messages": messages}, "\n".join(lines) or "nothing has arrived")


def _watch(arguments: argparse.Namespace) -> int:
    answer = _ask(arguments, "messages", device=arguments.device_id, isKnown=True)
    _print_to_stderr("dps-emulator: watching what arrives from now on; Ctrl-C ends it")
    return _follow(arguments, answer["last"], arguments.count, arguments.timeout)


def _follow(arguments: argparse.Namespace, after: int, count: int | None = None, timeout_s: float | None = None) -> int:
    """Prints the messages behind the number `after` as they come, a line each, until the count or the time is over."""
    from dps_emulator.control_socket import call

    until_s = None if timeout_s is None else time.monotonic() + timeout_s
    seen = 0
    try:
        while count is None or seen < count:
            wait_s = FOLLOW_S if until_s is None else min(FOLLOW_S, until_s - time.monotonic())
            if wait_s <= 0:
                return OK if count is None else NOT_YET
            request = {"command": "messages", "device": arguments.device_id, "after": after, "waitS": wait_s}
            answer = call(arguments.state_dir, request, wait_s + 10)
            after = answer["last"]
            for message in answer["messages"][: None if count is None else count - seen]:
                _print_message(arguments, message)
                seen += 1
    except KeyboardInterrupt:
        pass
    except BrokenPipeError:  # whoever read it has gone
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (until the end of the process)
    return OK


def _print_message(arguments: argparse.Namespace, message: dict[str, Any]) -> None:
    print(json.dumps({"schema": 1, **message}) if arguments.json else _message_line(message), flush=True)


def _message_line(message: dict[str, Any]) -> str:
    payload = message.get("payload", "") or message.get("payloadBase64", "")
    return f"{message['time']} {message['deviceId']} {json.dumps(message['properties'])} {payload}"


def _enrollments(arguments: argparse.Namespace) -> int:
    listed, lines = [], []
    with _store_of(arguments.state_dir) as store:
        for key, enrollment in itertools.chain(_all(store.enrollments), _all(store.groups)):
            record = enrollment.to_json(with_keys=False)
            state = "enabled" if enrollment.enabled else "disabled"
            way = "symmetric key" if enrollment.keys else "certificate"
            if enrollment.endorsement_key:
                record["endorsementKeySha256"] = hashlib.sha256(enrollment.endorsement_key).hexdigest()
                way = f"EK {record['endorsementKeySha256'][:16]}"
            listed.append(record)
            where = f", for {', '.join(enrollment.hubs)}" if enrollment.hubs else ""
            registered = "" if enrollment.is_group or key in store.registrations else ", has not registered yet"
            group = "group, " if enrollment.is_group else ""
            lines.append(f"{enrollment.registration_id}: {group}{state}, {way}{where}{registered}")
    return _say(arguments, {"code": "ok", "enrollments": listed}, "\n".join(lines) or "nobody is enrolled")


def _enrollment(arguments: argparse.Namespace) -> int:
    from dps_emulator.enrollments import registration_key

    name, key = arguments.registration_id, registration_key(arguments.registration_id)
    with _store_of(arguments.state_dir) as store, store.transaction():
        records = store.groups if arguments.group else store.enrollments
        enrollment = records.get(key)
        if enrollment is None:
            hint = _did_you_mean(key, records)
            kind = "enrolment group" if arguments.group else "enrolment for"
            return _complain(f"no {kind} '{name}' in {arguments.state_dir}{hint}", FAILED)
        match arguments.action:
            case "delete":
                del records[key]
            case "disable" | "enable":
                enrollment = replace(enrollment, enabled=arguments.action == "enable")
                records[key] = enrollment
    record = enrollment.to_json(with_keys=False)
    text = json.dumps(record, indent=2)
    if arguments.action != "show":
        text = f"{arguments.action}d: {enrollment.registration_id}"
    return _say(arguments, {"code": "ok", "enrollment": record}, text)


def _registrations(arguments: argparse.Namespace) -> int:
    listed, lines = [], []
    with _store_of(arguments.state_dir) as store:
        for _, registration in _all(store.registrations):
            operation, assigned = registration.operation, registration.assignment
            status = (
                operation.failure.status if operation.failure else "assigned" if operation.finished else "assigning"
            )
            entry: dict[str, Any] = {
                "registrationId": registration.registration_id,
                "status": status,
                "createdDateTimeUtc": registration.created,
            }
            text = f"{registration.registration_id}: {status}"
            if assigned:
                entry |= {"assignedHub": assigned.hub, "deviceId": assigned.device_id}
                entry |= {"substatus": assigned.substatus, "lastUpdatedDateTimeUtc": assigned.last_updated}
                text += f", {assigned.hub} {assigned.device_id}, {assigned.substatus} at {assigned.last_updated}"
            if operation.failure:
                entry |= {"errorCode": operation.failure.code, "errorMessage": operation.failure.message}
                text += f", {operation.failure.code} {operation.failure.message}"
            listed.append(entry)
            lines.append(text)
    return _say(arguments, {"code": "ok", "registrations": listed}, "\n".join(lines) or "nobody has registered")


def _all(records: "Records[Record]") -> "Iterator[tuple[str, Record]]":
    """All records; one that is damaged is named."""
    from dps_emulator.registrations import StateError

    after = ""
    while page := records.page(after):
        after = page[-1][0]
        for key, record in page:
            if isinstance(record, StateError):
                _warn(str(record))
            else:
                yield key, record


def _device_add(arguments: argparse.Namespace) -> int:
    key = _read_text(arguments.key_file).strip() if arguments.key_file else None
    added = _ask(arguments, "add", key=key)
    return _say(arguments, {"code": "ok", **added}, added["connectionString"])


def _device_token(arguments: argparse.Namespace) -> int:
    made = _ask(arguments, "token", lifeS=arguments.life)
    return _say(arguments, {"code": "ok", **made}, made["token"])


def _device(verb: str, arguments: argparse.Namespace) -> int:
    done = _ask(arguments, verb)
    text = done.get("connectionString") or f"{verb}: {arguments.device_id} at {done['hub']}"
    return _say(arguments, {"code": "ok", **done}, text)


def _connection_string(arguments: argparse.Namespace) -> int:
    answer = _ask(arguments, "service", ofHubs=arguments.hubs)
    if arguments.token:
        token = _token_of(answer["connectionString"], int(time.time()) + TOKEN_LIFE_S)
        return _say(arguments, {"code": "ok", "token": token}, token)
    return _say(arguments, {"code": "ok", **answer}, answer["connectionString"])


def _token_of(connection_string: str, expires_at_s: int) -> str:
    """A token of a shared access policy for everything at its host."""
    from dps_emulator.tokens import signed_token

    fields = dict(field.split("=", 1) for field in connection_string.split(";"))
    resource, key = quote(fields["HostName"], safe=""), base64.b64decode(fields["SharedAccessKey"])
    return signed_token(key, resource, expires_at_s, fields["SharedAccessKeyName"])


def _devices(arguments: argparse.Namespace) -> int:
    devices = _ask(arguments, "devices")["devices"]
    lines = []
    for device in devices:
        state = "connected" if device["connected"] else "not connected"
        state += "" if device["enabled"] else ", disabled"
        state += "" if device["hasKey"] else ", withdrawn"
        lines.append(f"{device['hub']} {device['deviceId']}: {state}, {device['waiting']} messages waiting")
    return _say(arguments, {"code": "ok", "devices": devices}, "\n".join(lines) or "the hubs know no device")


def _break(arguments: argparse.Namespace) -> int:
    script = _breakage(arguments)
    entries = _ask(arguments, "faults", script=script)["entries"]
    return _say(
        arguments,
        {"code": "ok", "entries": entries},
        f"{entries} fault {'entry' if entries == 1 else 'entries'} in force",
    )


def _breakage(arguments: argparse.Namespace) -> Any:
    """The fault script for what the command line asks for."""
    if arguments.what == "nothing":
        return []
    if arguments.what == "script":
        if arguments.file is None:
            raise _UsageError("break script: --file is missing")
        try:
            return json.loads(_read_text(arguments.file))
        except (ValueError, RecursionError) as error:
            raise _UsageError(f"{arguments.file}: not valid JSON: {error}") from None
    when = "after" if arguments.after else "before"
    fault: dict[str, Any] = {"method": "MQTT"}
    fault |= {"operation": arguments.operation} if arguments.operation else {}
    fault |= {"device": arguments.device} if arguments.device else {}
    fault |= {"times": arguments.times} if arguments.times else {}
    match arguments.what:
        case "drop":
            return [{**fault, "drop": when}]
        case "delay":
            if arguments.seconds is None:
                raise _UsageError("break delay: --seconds is missing")
            return [{**fault, "delayS": arguments.seconds}]
        case "silence":
            return [{**fault, "silent": when}]
        case "refuse":
            return [{**fault, "operation": "connect", "connack": arguments.code}]
    return [{**fault, **entry} for entry in THROTTLED_HUB]


def _warn_of_damage(state_dir: Path) -> None:
    """Names what can't be read back of a state folder; the rest is used all the same."""
    from dps_emulator.state import damage

    with contextlib.suppress(PermissionError):  # another user's: what is done with the folder next fails by it
        for sentence in damage(state_dir):
            _warn(sentence)


@contextlib.contextmanager
def _service_of(state_dir: Path) -> "Iterator[tuple[DpsService, Store]]":
    """A service over an existing state folder, for what it knows."""
    from dps_emulator.service import DpsService, Settings

    with _store_of(state_dir) as store:
        yield DpsService(Settings(), store.enrollments, store.registrations, os.urandom, store.groups), store


@contextlib.contextmanager
def _store_of(state_dir: Path) -> "Iterator[Store]":
    """The store of an existing state folder, whose damages are named."""
    from dps_emulator.state import open_store

    if not state_dir.is_dir():
        raise _UsageError(f"no state folder at {state_dir}")
    with contextlib.closing(open_store(state_dir, notice=_warn)) as store:
        _warn_of_damage(state_dir)
        yield store


def _read_enrollments(path: Path | str) -> "Imported":
    from dps_emulator.enrollments import read_enrollments
    from dps_text.enrolments import ListError

    try:
        return read_enrollments(_read_text(path))
    except ListError as error:
        raise _UsageError(f"{path}: {error}") from None


def _fault_script(path: Path | None) -> "FaultScript | None":
    from dps_emulator.faults import FaultScriptError, read_fault_script

    if path is None:
        return None
    try:
        return read_fault_script(_read_text(path))
    except FaultScriptError as error:
        raise _UsageError(f"{path}: {error}") from None


def _read_text(path: Path | str) -> str:
    try:
        return text_of(_read_bytes(path))
    except NotText as error:
        raise _UsageError(f"{'stdin' if str(path) == '-' else path}: {error}") from None


def _read_bytes(path: Path | str) -> bytes:
    try:
        return sys.stdin.buffer.read() if str(path) == "-" else Path(path).read_bytes()
    except OSError as error:
        raise _UsageError(f"can't read {path}: {error.strerror}") from None


def _say(arguments: argparse.Namespace, content: dict[str, Any], text: str) -> int:
    print(json.dumps({"schema": 1, **content}) if arguments.json else text)
    return OK


def _warn(text: str) -> None:
    _print_to_stderr(f"dps-emulator: warning: {text}")


def _print_to_stderr(line: str) -> None:
    with contextlib.suppress(OSError):  # whoever reads it may have gone, or the disk may be full
        print(line, file=sys.stderr, flush=True)


def _complain(text: str, status: int) -> int:
    print(f"dps-emulator: {text}", file=sys.stderr)
    return status


def _number(low: float, high: float, kind: type = int) -> Any:
    def convert(text: str) -> float:
        try:
            value: float = kind(text)
        except ValueError:
            value = float("nan")
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"'{text}' is not a number from {low} to {high}")
        return value

    return convert


def _since(text: str) -> str:
    """A time, or how long ago, as the times of messages begin, which are compared as text."""
    from dps_emulator.registrations import utc_text

    count = whole_number(text[:-1], 0, 10**9)
    if text[-1:] in _AGES_S and count is not None:
        return utc_text(max(time.time() - count * _AGES_S[text[-1]], 0))
    if not _TIME.fullmatch(text):
        raise argparse.ArgumentTypeError(
            f"'{text}' is neither a UTC time such as 2026-01-31T10:00:00Z nor 90s, 10m, 2h, 1d"
        )
    return text.removesuffix("Z")


def _retry_after(text: str) -> int | None:
    return None if text == "none" else int(_number(0, 86_400)(text))


def _rate(unit: str) -> Callable[[str], int]:
    """Reads a rate such as 1000/min."""

    def read(text: str) -> int:
        number, slash, after = text.partition("/")
        if slash and after != unit:
            raise argparse.ArgumentTypeError(f"'{text}' is not of the form N/{unit}")
        return int(_number(1, 10**9)(number))

    return read


def _property(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"'{text}' is not of the form NAME=VALUE")
    return name, value


def _json(text: str) -> list[Any]:
    """The value in a list of one: None stands for an option that was not given."""
    try:
        return [json.loads(text)]
    except (ValueError, RecursionError):
        raise argparse.ArgumentTypeError(f"'{text}' is not valid JSON") from None


def _lookup(text: str) -> tuple[str | int, int]:
    if text in ("fresh", "no-key"):
        return text, 0
    if text in ("401", "404"):
        return int(text), 0
    kind, _, written = text.partition(":")
    count = whole_number(written, 0, 10**9) if kind == "stale" else None
    if count is not None:
        return "fresh", count
    raise argparse.ArgumentTypeError(f"'{text}' is none of fresh, stale:N, no-key, 401, 404")


def _hub(text: str) -> str:
    from dps_emulator.enrollments import is_hub_name

    if not is_hub_name(text):
        raise argparse.ArgumentTypeError(f"'{text}' is no DNS name")
    return text


if __name__ == "__main__":
    sys.exit(main())
