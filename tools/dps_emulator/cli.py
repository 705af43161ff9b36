"""The command `dps-emulator`."""

import argparse
import base64
import contextlib
import errno
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dps_text import NotText, text_of, whole_number

if TYPE_CHECKING:
    from dps_emulator.enrollments import Imported
    from dps_emulator.faults import FaultScript
    from dps_emulator.hub import HubLine
    from dps_emulator.hub_devices import BoundedFile
    from dps_emulator.server import LogLine
    from dps_emulator.service import DpsService, Settings

OK, FAILED, USAGE = 0, 1, 2
HUB_SUFFIXES = (
    ".azure-devices.net",
    ".azure-devices.cn",
    ".azure-devices.us",
)  # an agent's without settings of its own
ID_SCOPE = "0ne00000000"
HUB = "emulator.azure-devices.net"
NAMED = 20  # lines that an import passes over and that it names


class _UsageError(Exception):
    """Something on the command line, or a file that it names, can't be used."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0 done, 1 failed or refused, 2 usage."""
    arguments = _parser().parse_args(argv)
    try:
        from dps_emulator.control import ControlError
        from dps_emulator.registrations import StateError
    except ModuleNotFoundError as error:
        return _complain(f"needs '{error.name}', which is not installed: it comes with the extra 'emulator'", USAGE)
    try:
        return int(arguments.run(arguments))
    except ModuleNotFoundError as error:
        return _complain(f"needs '{error.name}', which is not installed: it comes with the extra 'emulator'", USAGE)
    except _UsageError as error:
        return _complain(str(error), USAGE)
    except (StateError, ControlError, OSError) as error:
        return _complain(str(error), FAILED)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dps-emulator",
        description="A Device Provisioning Service for TPM devices, and the IoT hubs behind it, on your desk.",
    )
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

    command = commands.add_parser("verify-token", help="say whether a hub would accept a token")
    command.add_argument("file", metavar="TOKEN-FILE", help="a file that holds the token; - is stdin")
    command.add_argument("--state-dir", type=Path, required=True, metavar="DIR")
    command.add_argument("--json", action="store_true", help="print the result as JSON")
    command.set_defaults(run=_verify_token)
    _add_hub_commands(commands)
    return parser


def _add_hub_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
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

    option = add("send-c2d", _send_c2d, "send a message to a device")
    option("text", metavar="TEXT", help="the payload; - is stdin")
    option("--property", action="append", type=_property, default=[], metavar="NAME=VALUE", help="repeatable")
    option("--life", type=_number(1, 172_800, float), default=3600.0, metavar="S", help="default 3600")

    option = add("invoke", _invoke, "call a direct method and print the answer")
    option("method", metavar="METHOD")
    option("payload", nargs="?", type=_json, metavar="JSON", help="none: the request has no payload")
    option("--timeout", type=_number(1, 300, float), default=30.0, metavar="S", help="default 30")

    option = add("twin", _twin, "print a device's twin, after changing it where asked")
    option("--desired", type=_json, metavar="JSON", help="merge this object into the desired properties")

    option = add("messages", _messages, "list what has arrived from devices", device=False)
    option("device_id", nargs="?", metavar="DEVICE-ID")

    option = add("device-add", _device_add, "register a device with a symmetric key; prints its connection string")
    option("--key-file", metavar="FILE", help="a key in base64, - is stdin; default: a new one")
    for verb, text in {
        "enable": "let a device connect again",
        "disable": "end a device's connection and refuse it",
        "withdraw": "end a device's connection and refuse it until DPS assigns it anew",
        "rotate-key": "give a device another key, which DPS hands out from now on",
        "disconnect": "end a device's connection",
    }.items():
        add(f"device-{verb}", partial(_device, verb), text)
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


def _add_serve(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
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
    add("--faults", type=Path, metavar="FILE", help="fault script, a JSON list; see dps_emulator/faults.py")
    add("--log-file", type=Path, metavar="FILE", help="append the log here too, a regular file")
    add(
        "--file-limit",
        type=_number(1, 100_000),
        default=64,
        metavar="MIB",
        help="of the messages kept, and of the log file, each; one more file is kept as NAME.1; default 64",
    )
    command.set_defaults(run=_serve)


def _serve(arguments: argparse.Namespace) -> int:
    from dps_emulator.server import EmulatorServer
    from dps_emulator.state import certificate_authority, claimed, make_private_folder

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
    faults = _fault_script(arguments.faults)
    listed = _read_enrollments(arguments.enrollments) if arguments.enrollments else None
    if state_dir:
        make_private_folder(state_dir)
    limit_bytes = arguments.file_limit * 1024 * 1024
    log = _Log(_log_file(arguments.log_file, limit_bytes))
    with claimed(state_dir) if state_dir else contextlib.nullcontext():
        service = _service(_settings(arguments), state_dir)
        if state_dir:
            _warn_of_damage(state_dir)
        if listed:
            for enrollment in listed.enrollments:
                service.enroll(enrollment)
            _tell_of(listed)
        authority = certificate_authority(state_dir)
        ca_file.write_bytes(authority.cert_pem.bytes())
        listen = arguments.listen
        server = EmulatorServer(
            service,
            authority,
            listen=listen,
            port=arguments.port,
            hub_port=arguments.hub_port,
            state_dir=state_dir,
            messages_limit_bytes=limit_bytes,
            faults=faults,
            log=log,
            hub_log=log,
            notice=_warn,
        )
        if arguments.enroll_any:
            _warn("--enroll-any gives every TPM that asks a hub: use it on your own network only")
        for hub in service.settings.hubs:
            if not hub.lower().endswith(HUB_SUFFIXES):
                _warn(f"an agent refuses the hub {hub} unless hub_suffixes in its [hub] has that name")
        host = f"[{listen}]" if ":" in listen else listen
        print(f"listening on https://{host}:{server.port}\nhubs on mqtts://{host}:{server.hub_port}", flush=True)
        if stopping:
            server.stop()
        server.run()
    return OK


class _Log:
    """The log of a server, on stderr and in the log file; no request fails for want of either."""

    def __init__(self, file: "BoundedFile | None") -> None:
        self._file = file
        self._is_failing = False

    def __call__(self, line: "LogLine | HubLine") -> None:
        text = line.text()
        _print_to_stderr(text)
        if self._file is None:
            return
        try:
            self._file.append(text.encode())
        except OSError as error:
            if not self._is_failing:
                _warn(f"the log file misses lines from here on: {error}")
            self._is_failing = True
        else:
            self._is_failing = False


def _log_file(path: Path | None, limit_bytes: int) -> "BoundedFile | None":
    from dps_emulator.hub_devices import BoundedFile

    if path is None:
        return None
    file = BoundedFile(path, limit_bytes)
    try:
        file.make()
    except OSError as error:
        why = "a symbolic link" if error.errno == errno.ELOOP else error.strerror
        raise _UsageError(f"--log-file {path} can't be used: {why}; the log goes to stderr without it") from None
    return file


def _settings(arguments: argparse.Namespace) -> "Settings":
    from dps_emulator.service import CHALLENGE, POLL, REGISTER, Settings

    lookup, stale_lookups = arguments.lookup
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
        quota_per_min=arguments.quota,
        quota_by=arguments.quota_by,
        quota_counts=(REGISTER, CHALLENGE, POLL)[: arguments.quota_counts],
        retry_after_429_s=arguments.quota_retry_after,
        connects_per_s=arguments.connects,
        connect_queue_s=arguments.connect_queue,
    )


def _enroll_import(arguments: argparse.Namespace) -> int:
    from dps_emulator.enrollments import registration_key
    from dps_emulator.state import enrollment_folder, make_private_folder

    listed = _read_enrollments(arguments.file)
    make_private_folder(arguments.state_dir)
    _warn_of_damage(arguments.state_dir)
    folder = enrollment_folder(arguments.state_dir)
    replaced = 0
    for enrollment in listed.enrollments:
        key = registration_key(enrollment.registration_id)
        replaced += key in folder
        folder[key] = enrollment
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
        "passedOver": [{"line": line, "registrationId": name, "kind": kind} for line, name, kind in listed.others],
        "odd": [{"line": line, "message": why} for line, why in listed.odd],
    }
    _tell_of(listed)
    _say(arguments, content, text)
    return FAILED if listed.odd else OK


def _tell_of(listed: "Imported") -> None:
    """Names what a list holds besides enrolments of TPMs."""
    for line, name, kind in listed.others[:NAMED]:
        _warn(f"line {line}: '{name}' is an enrolment of the kind {kind}; the emulator has TPM enrolments alone")
    for odd in listed.odd[:NAMED]:
        _warn(str(odd))
    if (more := len(listed.others[NAMED:]) + len(listed.odd[NAMED:])) > 0:
        _warn(f"and {more} more like these")


def _move(arguments: argparse.Namespace) -> int:
    from dps_emulator.control import NotServed, call
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
        _service_of(arguments.state_dir).move(arguments.registration_id, arguments.hub)
    except KeyError:
        return _complain(f"no enrolment for '{arguments.registration_id}' in {arguments.state_dir}", FAILED)
    content = {"code": "ok", "registrationId": arguments.registration_id, "hub": arguments.hub}
    return _say(arguments, content, f"{arguments.registration_id} goes to {arguments.hub} when it next registers")


def _verify_token(arguments: argparse.Namespace) -> int:
    from dps_emulator.state import stored_device

    service, text = _service_of(arguments.state_dir), _read_text(arguments.file).strip()
    refusal = service.hub_token_refusal(text, time.time(), partial(stored_device, arguments.state_dir))
    if refusal:
        _say(arguments, {"code": "refused", "error": {"message": refusal}}, f"refused: {refusal}")
        return FAILED
    return _say(arguments, {"code": "ok"}, "the hub would accept this token")


def _ask(arguments: argparse.Namespace, command: str, deadline_s: float = 10.0, **request: Any) -> dict[str, Any]:
    """The running server's answer to a command."""
    from dps_emulator.control import call

    if not arguments.state_dir.is_dir():
        raise _UsageError(f"no state folder at {arguments.state_dir}")
    _warn_of_damage(arguments.state_dir)
    device = {"device": arguments.device_id, "hub": arguments.hub} if "hub" in arguments else {}
    return call(arguments.state_dir, {"command": command, **device, **request}, deadline_s)


def _send_c2d(arguments: argparse.Namespace) -> int:
    content = _read_bytes("-") if arguments.text == "-" else os.fsencode(arguments.text)
    payload = base64.b64encode(content).decode()
    sent = _ask(arguments, "send-c2d", payload=payload, properties=dict(arguments.property), lifeS=arguments.life)
    return _say(arguments, {"code": "ok", **sent}, f"message {sent['messageId']} is on its way")


def _invoke(arguments: argparse.Namespace) -> int:
    payload = {} if arguments.payload is None else {"payload": arguments.payload[0]}
    deadline_s = arguments.timeout + 5
    said = _ask(arguments, "invoke", deadline_s, method=arguments.method, timeoutS=arguments.timeout, **payload)
    return _say(arguments, {"code": "ok", **said}, f"{said['status']} {json.dumps(said['payload'])}")


def _twin(arguments: argparse.Namespace) -> int:
    twin = _ask(arguments, "twin", **({} if arguments.desired is None else {"desired": arguments.desired[0]}))
    return _say(arguments, {"code": "ok", **twin}, json.dumps(twin["properties"], indent=2))


def _messages(arguments: argparse.Namespace) -> int:
    messages = _ask(arguments, "messages", device=arguments.device_id)["messages"]
    lines = [
        f"{message['time']} {message['deviceId']} {json.dumps(message['properties'])}"
        f" {message.get('payload', '') or message.get('payloadBase64', '')}"
        for message in messages
    ]
    return _say(arguments, {"code": "ok", "messages": messages}, "\n".join(lines) or "nothing has arrived")


def _device_add(arguments: argparse.Namespace) -> int:
    key = _read_text(arguments.key_file).strip() if arguments.key_file else None
    added = _ask(arguments, "add", key=key)
    return _say(arguments, {"code": "ok", **added}, added["connectionString"])


def _device(verb: str, arguments: argparse.Namespace) -> int:
    done = _ask(arguments, verb)
    text = done.get("connectionString") or f"{verb}: {arguments.device_id} at {done['hub']}"
    return _say(arguments, {"code": "ok", **done}, text)


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
    # How a hub throttles: connections are refused for now, twin requests get 429, telemetry loses its connection.
    return [
        {**fault, "operation": "connect", "connack": 3},
        {**fault, "operation": "twin-get", "status": 429},
        {**fault, "operation": "twin-patch", "status": 429},
        {**fault, "operation": "telemetry", "drop": "before"},
    ]


def _warn_of_damage(state_dir: Path) -> None:
    """Names what can't be read back of a state folder; the rest is used all the same."""
    from dps_emulator.state import damaged_files

    for sentence in damaged_files(state_dir):
        _warn(sentence)


def _service_of(state_dir: Path) -> "DpsService":
    """A service over an existing state folder, for what it knows."""
    from dps_emulator.service import Settings
    from dps_emulator.state import make_private_folder

    if not state_dir.is_dir():
        raise _UsageError(f"no state folder at {state_dir}")
    make_private_folder(state_dir)
    _warn_of_damage(state_dir)
    return _service(Settings(), state_dir)


def _service(settings: "Settings", state_dir: Path | None) -> "DpsService":
    from dps_emulator.service import DpsService
    from dps_emulator.state import enrollment_folder, registration_folder

    if state_dir is None:
        return DpsService(settings, {}, {}, os.urandom)
    return DpsService(settings, enrollment_folder(state_dir), registration_folder(state_dir), os.urandom)


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
