"""What the emulator holds: registrations, connections and messages a second, and memory for each connected device.

Each rate is for one core: so many of a thing in a second in which the server computes, or waits for the disk; beside it
what was seen by the clock of a machine that others use too. Clients are processes of their own.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
import select
import socket
import ssl
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import trustme

from debian_micropython import mosquitto
from dps_bench.costs import CommandFailed
from dps_bench.report import Report
from emulator.device_side import SCOPE, Client, Device, operation_path, register_path
from fresh_machine import CHECKOUT, NotReady

HUB = "emulator.azure-devices.net"
CLIENTS = 2  # processes
ROUNDS = 3  # in which all that is compared takes turns
REGISTRATIONS = 60  # of each round
CONNECTS = 150
MESSAGES = 4000
PAYLOAD = b"x" * 200
WINDOW = 16
IDLE = 400  # devices whose memory is measured
WARM = 20  # connections before that
KIB_LIMIT = 120  # resident, of a connected idle device
_PATIENCE_S = 600.0
_TICKS = os.sysconf("SC_CLK_TCK")
_EXPIRY = 4_102_444_800  # of the devices' tokens: 2100

# Runs with another checkout's packages: `serve` of a release before the database has a file for each thing.
FILL = """
import base64, hashlib, json, sys
from pathlib import Path
folder, count, ek = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
def enrollment(name):
    return {"registrationId": name, "attestation": {"type": "tpm", "tpm": {"endorsementKey": ek}}}
def registration(name):
    operation = {"operation_id": "4.x." + name, "ready_at_s": 0.0, "payload": None, "finished": True, "failure": None}
    key = base64.b64encode(hashlib.sha256(name.encode()).digest()).decode()
    place = {"hub": "HUB", "device_id": name, "key": key, "substatus": "initialAssignment", "etag": "", "payload": None}
    place["last_updated"] = created = "2026-01-01T00:00:00.0000000Z"
    return {"registrationId": name, "created": created, "operation": operation, "assignment": place}
def device(name):
    twin = {"desired": {}, "reported": {}, "desired_version": 1, "reported_version": 1}
    return {"deviceId": name, "ownKey": None, "enabled": True, "withdrawn": False, "twin": twin,
            "subscriptions": None, "queue": []}
names = ["press-%06d" % number for number in range(count)]
folder.mkdir(mode=0o700)
try:
    from dps_emulator.state import open_store
except ImportError:
    for kind, make in (("enrollments", enrollment), ("registrations", registration), ("hubs/HUB", device)):
        (folder / kind).mkdir(mode=0o700, parents=True)
        for name in names:
            (folder / kind / (name + ".json")).write_text(json.dumps(make(name), indent=1))
else:
    store = open_store(folder)
    with store.transaction():
        for records, make in ((store.enrollments, enrollment), (store.registrations, registration),
                              (store.devices("HUB"), device)):
            records.put((name, records.read(name, json.dumps(make(name)))) for name in names)
    store.close()
""".replace("HUB", HUB)


class Server(NamedTuple):
    """A process that serves."""

    pid: int
    ca_file: str
    dps_port: int
    hub_port: int


def measured(count: int, beside: Path | None) -> Report:
    """This checkout's emulator and another's, with `count` registrations in the state folder, and mosquitto."""
    report = Report("emulator", f"{count} registrations in the state folder")
    with ExitStack() as running:
        servers: dict[str, Server] = {}
        for name, checkout in {"this": CHECKOUT, **({"beside": beside} if beside else {})}.items():
            servers[name] = running.enter_context(_emulator(checkout, count))
        try:
            servers["mosquitto"] = running.enter_context(_mosquitto(mosquitto()))
        except NotReady as error:
            report.absent.append(f"mosquitto: {error}")
        pool = running.enter_context(ProcessPoolExecutor(CLIENTS, get_context("spawn")))
        rows: dict[str, dict[str, float]] = {name: {} for name in servers}
        for name, server in servers.items():
            rows[name]["firstConnectMs"] = 1000 * pool.submit(connect, server, [_name(0)]).result(_PATIENCE_S)
            rows[name]["deviceKiB"] = _memory(server, pool)
        for what, work, total in (
            ("registrations", register, REGISTRATIONS),
            ("connects", connect, CONNECTS),
            ("messages", publish, MESSAGES),
        ):
            rates: dict[str, list[tuple[float, float]]] = {name: [] for name in servers}
            for at in range(ROUNDS):
                for name, server in servers.items():
                    if server.dps_port or work is not register:
                        rates[name].append(_rate(server, pool, work, at, total, count))
            for name, pairs in rates.items():
                if pairs:
                    rows[name][f"{what}PerS"] = statistics.median(busy for busy, _ in pairs)
                    rows[name][f"{what}ClockPerS"] = statistics.median(clock for _, clock in pairs)
    for name, row in rows.items():
        report.row(name, row)
    for other in set(rows) - {"this"}:
        for key, value in rows[other].items():
            report.ratio(f"{key}, this to {other}", rows["this"][key], value)
    if rows["this"]["deviceKiB"] > KIB_LIMIT:
        report.over.append(f"{rows['this']['deviceKiB']:.0f} KiB a connected idle device: it may have {KIB_LIMIT}")
    return report


def _rate(
    server: Server,
    pool: ProcessPoolExecutor,
    work: Callable[[Server, list[str]], float],
    at: int,
    total: int,
    count: int,
) -> tuple[float, float]:
    """So many in a second in which the server is busy, and in one of the clock."""
    each = total // CLIENTS
    names = [
        [_name((at * total + number * CLIENTS + client) % count) for number in range(each)] for client in range(CLIENTS)
    ]
    before_s, began_s = _cpu_s(server.pid), time.monotonic()
    running = [pool.submit(work, server, some) for some in names]
    looks = waits = 0
    while wait(running, 0.002).not_done:
        looks += 1
        waits += Path(f"/proc/{server.pid}/stat").read_text().rpartition(")")[2].split()[0] == "D"
    for done in running:
        done.result()
    took_s = time.monotonic() - began_s
    busy_s = 1 / _TICKS + _cpu_s(server.pid) - before_s + took_s * waits / max(looks, 1)
    return total / busy_s, total / took_s


def _memory(server: Server, pool: ProcessPoolExecutor) -> float:
    """KiB that each connected device takes."""
    pool.submit(connect, server, [_name(number) for number in range(WARM)]).result(_PATIENCE_S)
    time.sleep(1)  # connections that end
    before = _resident_kib(server.pid)
    with ExitStack() as open_ones:
        for number in range(IDLE):
            open_ones.enter_context(_connected(server, _name(number)))
        return (_resident_kib(server.pid) - before) / IDLE


# --- what clients do, in processes of their own


def register(server: Server, names: list[str]) -> float:
    """Whole registrations, each on a connection of its own: challenge, token, operation status. Seconds for each."""
    device, began_s = Device.of_the_vectors(), time.monotonic()
    for name in names:
        body = {"registrationId": name, "tpm": device.attestation()}
        with Client(server.dps_port, Path(server.ca_file), _PATIENCE_S) as client:
            _, _, challenge = client.call("PUT", register_path(name), body)
            key = device.activate(challenge["authenticationKey"])
            token = key.token(f"{SCOPE}%2Fregistrations%2F{name}", int(time.time()) + 3600)
            _, _, accepted = client.call("PUT", register_path(name), body, token)
            _, _, final = client.call("GET", operation_path(name, accepted["operationId"]), None, token)
            if final["status"] != "assigned":
                raise CommandFailed(f"{name} is not assigned: {final}")
    return (time.monotonic() - began_s) / len(names)


def connect(server: Server, names: list[str]) -> float:
    """Connections from TCP to CONNACK; seconds for each."""
    began_s = time.monotonic()
    for name in names:
        with _connected(server, name):
            pass
    return (time.monotonic() - began_s) / len(names)


def publish(server: Server, names: list[str]) -> float:
    """As many messages as there are names, QoS 1, of the first of them; seconds for each."""
    name, began_s = names[0], time.monotonic()
    topic = f"devices/{name}/messages/events/".encode()
    left, unacknowledged, number = len(names), 0, 0
    with _connected(server, name) as connection:
        while left or unacknowledged:
            burst = b""
            while left and unacknowledged < WINDOW:
                number = number % 0xFFFF + 1
                burst += _packet(0x32, len(topic).to_bytes(2) + topic + number.to_bytes(2) + PAYLOAD)
                left, unacknowledged = left - 1, unacknowledged + 1
            if burst:
                connection.sendall(burst)
            received = connection.recv(4 * WINDOW)
            if not received:
                raise CommandFailed(f"the connection of {name} ended")
            while len(received) % 4:
                received += connection.recv(4 - len(received) % 4)
            unacknowledged -= len(received) // 4
    return (time.monotonic() - began_s) / len(names)


@contextmanager
def _connected(server: Server, name: str) -> Iterator[ssl.SSLSocket]:
    resource = quote(f"{HUB}/devices/{name}", safe="")
    key = hashlib.sha256(name.encode()).digest()
    signature = base64.b64encode(hmac.digest(key, f"{resource}\n{_EXPIRY}".encode(), "sha256")).decode()
    token = f"SharedAccessSignature sr={resource}&sig={quote(signature, safe='')}&se={_EXPIRY}"
    user = f"{HUB}/{name}/?api-version=2021-04-12"
    fields = b"".join(len(text).to_bytes(2) + text.encode() for text in (name, user, token))
    context = _trusting(server.ca_file)
    with (
        socket.create_connection(("127.0.0.1", server.hub_port), _PATIENCE_S) as plain,
        context.wrap_socket(plain, server_hostname=HUB) as connection,
    ):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.sendall(_packet(0x10, b"\0\4MQTT\4\xc2" + struct.pack(">H", 1000) + fields))
        if (answer := connection.recv(4)) != b"\x20\2\0\0":
            raise CommandFailed(f"{name} is not let in: {answer!r}")
        yield connection


_CONTEXTS: dict[str, ssl.SSLContext] = {}


def _trusting(ca_file: str) -> ssl.SSLContext:
    if ca_file not in _CONTEXTS:
        _CONTEXTS[ca_file] = ssl.create_default_context(cafile=ca_file)
    return _CONTEXTS[ca_file]


def _packet(head: int, body: bytes) -> bytes:
    length, size = bytearray(), len(body)
    while size or not length:
        size, digit = size >> 7, size & 0x7F
        length.append(digit | (0x80 if size else 0))
    return bytes((head, *length)) + body


def _name(number: int) -> str:
    return f"press-{number:06d}"


# --- servers


@contextmanager
def _emulator(checkout: Path, count: int) -> Iterator[Server]:
    """`serve` of a checkout, over a folder that has `count` registrations."""
    sources = os.pathsep.join(str(checkout / name) for name in ("tools", "agent", "hal"))
    environment = {**os.environ, "PYTHONPATH": sources}
    with tempfile.TemporaryDirectory(prefix="dps-bench-") as place:
        state, ca_file = Path(place) / "state", Path(place) / "ca.pem"
        ek = base64.b64encode(Device.of_the_vectors().ek_public).decode()
        subprocess.run([sys.executable, "-c", FILL, str(state), str(count), ek], env=environment, check=True)
        command = [sys.executable, "-m", "dps_emulator.cli", "serve", "--state-dir", str(state)]
        command += ["--ca-file", str(ca_file), "--retry-after", "none"]
        with _process(command, environment, Path(place) / "log") as process:
            dps_port, hub_port = (_port_in(process) for _ in range(2))
            yield Server(process.pid, str(ca_file), dps_port, hub_port)


@contextmanager
def _mosquitto(program: Sequence[str]) -> Iterator[Server]:
    """mosquitto with TLS, which lets everybody in."""
    with tempfile.TemporaryDirectory(prefix="dps-bench-") as place:
        folder, authority = Path(place), trustme.CA()
        authority.cert_pem.write_to_path(str(folder / "ca.pem"))
        certificate = authority.issue_cert(HUB)
        certificate.private_key_and_cert_chain_pem.write_to_path(str(folder / "server.pem"))
        with socket.create_server(("127.0.0.1", 0)) as free:
            port: int = free.getsockname()[1]
        lines = f"listener {port} 127.0.0.1", f"certfile {folder}/server.pem", f"keyfile {folder}/server.pem"
        user = f"user {os.environ.get('USER', 'root')}"
        (folder / "conf").write_text("\n".join((*lines, "allow_anonymous true", user, "")))
        with _process([*program, "-c", str(folder / "conf")], dict(os.environ), folder / "log") as process:
            server = Server(process.pid, str(folder / "ca.pem"), 0, port)
            until_s = time.monotonic() + 60
            while True:
                try:
                    connect(server, [_name(0)])
                    break
                except ConnectionRefusedError:
                    if time.monotonic() > until_s or process.poll() is not None:
                        raise CommandFailed(f"mosquitto did not start: {(folder / 'log').read_text()}") from None
                    time.sleep(0.1)
            yield server


@contextmanager
def _process(command: list[str], environment: dict[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as stderr:
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=stderr, bufsize=0)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        assert process.stdout is not None, "it was asked for"
        process.stdout.close()


def _port_in(process: subprocess.Popen[bytes]) -> int:
    """The port in the next line on stdout."""
    assert process.stdout is not None, "it was asked for"
    ready, _, _ = select.select([process.stdout], [], [], _PATIENCE_S)
    line = process.stdout.readline() if ready else b""
    if b":" not in line:
        raise CommandFailed(f"the emulator did not start: {line!r}")
    return int(line.rsplit(b":", 1)[1])


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def _resident_kib(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return float(line.split()[1])
    raise CommandFailed(f"process {pid} has ended")
