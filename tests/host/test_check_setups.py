"""`dps-agent check` as a program, on set-ups that are broken in one way each: the first line names the cause."""

from __future__ import annotations

import errno
import json
import os
import re
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from glob import glob
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, NamedTuple
from unittest.mock import Mock

import pytest

from contracts.tpm import blob_for
from dps_agent.assignment import Assignment, encode, seal_message
from dps_agent.host.checks import local, network, ways
from dps_agent.host.cli import main
from dps_agent.host.network import websocket
from dps_agent.settings import TPM
from dps_emulator.enrollments import Enrollment
from dps_emulator.faults import Fault
from dps_emulator.service import Settings
from dps_hal.contracts import IDENTITY
from dps_hal.host.files import FileStore
from dps_hal.host.simulator import SimulatedTpm
from dps_hal.host.transports import transport_for
from dps_hal.tpm.keys import SIGN, USER_WITH_AUTH, object_name
from dps_hal.tpm.wire import WireTpm
from support.cloud.emulator import HUB, EmulatorInThread
from support.cloud.servers import ENDPOINT_NAME, LOOPBACK, Certificates, Peer, Server, answer, answering, proxying
from support.programs.running_agent import PROGRAM, RunningAgent, _environ
from support.tpm.states import copy_state
from support.tpm.swtpm import Swtpm
from support.tpm.tap import TpmTap

OTHER_EK_STATE = "press-08"
NOBODY = 65534
CLOCK_NEVER_SET = "import sys, time; time.time = lambda: 12.0; from dps_agent.host.cli import main; sys.exit(main())"


class Command(NamedTuple):
    """What to run in place of `dps-agent --config FILE check`."""

    flags: tuple[str, ...] = ()
    before: tuple[str, ...] = ()  # the program that runs it
    program: tuple[str, ...] = tuple(PROGRAM)


class Bench:
    """One device with a simulated TPM at an emulator that has enrolled it; all of it works until it is broken."""

    def __init__(self, folder: Path, emulator: EmulatorInThread) -> None:
        self.folder = folder
        self.emulator = emulator
        tpm_folder = copy_state("press-07", folder / "tpm")
        self.tpm = SimulatedTpm(tpm_folder)
        self.agent = RunningAgent(folder, emulator, f'backend = "simulator"\ntcti = "{tpm_folder}"')
        self.enroll(self.tpm.endorsement_key())

    def enroll(self, endorsement_key: bytes) -> None:
        self.emulator.service.enroll(Enrollment("press-07", endorsement_key))

    def run(self, command: Command, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command.before, *command.program, "--config", str(self.agent.settings), "check", *command.flags, *words],
            env=_environ({"no_proxy": "", "https_proxy": ""}),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )


@pytest.fixture
def emulator() -> Iterator[EmulatorInThread]:
    with EmulatorInThread(Settings(retry_after_s=0)) as found:
        yield found


@pytest.fixture
def bench(tmp_path: Path, emulator: EmulatorInThread) -> Bench:
    return Bench(tmp_path, emulator)


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port that is taken and refuses everybody."""
    with socket.socket() as taken:
        taken.bind((LOOPBACK, 0))
        yield taken.getsockname()[1]


def setting(key: str, value: object) -> tuple[str, str]:
    return ("--set", f"{key}={value}")


def mounted(options: str, fill: str = "true") -> tuple[str, ...]:
    """Runs a command with a file system of its own at the folder that stands before the command."""
    script = f'mount -t tmpfs -o {options} tmpfs "$0" && {{ {fill}; }} && exec "$@"'
    return ("unshare", *(["-m"] if os.geteuid() == 0 else ["-rm"]), "sh", "-c", script)


# --- the twelve


def no_tpm(bench: Bench) -> Command:
    return Command((*setting("tpm.backend", "esys"), *setting("tpm.tcti", "device:/nonexistent/tpmrm0")))


def no_permission(bench: Bench) -> Command:
    """A character device of another user; root loses what lets it pass every permission."""
    if os.geteuid() != 0:
        denied = [path for path in glob("/dev/*") if stat.S_ISCHR(os.stat(path).st_mode) and not os.access(path, 6)]
        return Command((*setting("tpm.backend", "esys"), *setting("tpm.tcti", f"device:{denied[0]}")))
    node = bench.folder / "tpmrm0"
    os.mknod(node, stat.S_IFCHR | 0o600, os.makedev(10, 224))
    os.chown(node, NOBODY, NOBODY)
    without = ("setpriv", "--bounding-set=-dac_override,-dac_read_search")
    return Command((*setting("tpm.backend", "esys"), *setting("tpm.tcti", f"device:{node}")), without)


def wrong_scope(bench: Bench) -> Command:
    return Command(setting("id_scope", "0ne0BADC0DE"))


def wrong_ca(bench: Bench) -> Command:
    return Command(setting("ca_file", Certificates(bench.folder).ca_file))


def wrong_clock(bench: Bench) -> Command:
    return Command(program=(sys.executable, "-c", CLOCK_NEVER_SET))


def full_disk(bench: Bench) -> Command:
    bench.agent.state_dir.mkdir()
    fill = 'head -c 4096 /dev/zero > "$0/full"'
    return Command(before=(*mounted("size=4k", fill), str(bench.agent.state_dir)))


def read_only_disk(bench: Bench) -> Command:
    bench.agent.state_dir.mkdir()
    return Command(before=(*mounted("ro"), str(bench.agent.state_dir)))


def bad_config(bench: Bench) -> Command:
    bench.agent.settings.write_text(bench.agent.text + "[retry]\nregistration_budget = 60\n")
    return Command()


def ek_mismatch(bench: Bench) -> Command:
    bench.enroll(SimulatedTpm(copy_state(OTHER_EK_STATE, bench.folder / "other")).endorsement_key())
    return Command()


@pytest.fixture
def locked_tpm(tmp_path: Path) -> Iterator[Callable[[Bench], Command]]:
    """A TPM that two power cuts have brought to the brink of its lockout, and a hub key that a lockout stops."""
    with Swtpm(tmp_path / "swtpm") as machine, TpmTap(machine.port) as tap:

        def cut(name: str) -> None:
            if name == "Shutdown":  # before the power-off is announced
                machine.restart()

        def lock(bench: Bench) -> Command:
            tpm = WireTpm(transport_for(tap.tcti))
            wrapped_key = tpm.import_key(blob_for(tpm, attributes=USER_WITH_AUTH | SIGN))
            bench.enroll(tpm.endorsement_key())
            ek, srk = object_name(tpm.endorsement_key()), object_name(tpm.storage_root_key())
            assignment = Assignment(
                *("0ne00000000", bench.emulator.url, "press-07", HUB, "press-07", wrapped_key, ek, srk),
                *("assigned", "", "", "", "", 1_800_000_000, None, False, TPM, ""),
            )
            text = encode(assignment)
            tap.on_command = cut
            sealed = text + tpm.sign(wrapped_key, seal_message(text))
            FileStore(str(bench.agent.state_dir)).commit(IDENTITY, sealed)
            tpm.sign(wrapped_key, b"message")
            tap.on_command = lambda name: None
            tpm.release()
            return Command((*setting("tpm.backend", "wire"), *setting("tpm.tcti", machine.tcti)))

        yield lock


@pytest.fixture
def hub_closed(closed_port: int) -> Callable[[Bench], Command]:
    def close(bench: Bench) -> Command:
        bench.agent.command("provision")
        return Command(setting("hub.connect_to", f"{LOOPBACK}:{closed_port}"))

    return close


@pytest.fixture
def closed_proxy() -> Iterator[Callable[[Bench], Command]]:
    with Server(proxying("user:hunter2"), None) as server:
        yield lambda bench: Command(setting("network.proxy", f"http://{server.address}"))


SETUPS = [
    # name, how it is broken (or the fixture that does it), exit status, code, the check, what the first line says
    ("no TPM", no_tpm, 5, "tpm.absent", "tpm-node", r"no TPM at /nonexistent/tpmrm0: No such file or directory"),
    ("no permission", no_permission, 5, "tpm.denied", "tpm-access", r" may not open /"),
    ("wrong scope", wrong_scope, 4, "dps.not_found", "dps-answers", r"ID scope '0ne0BADC0DE', or there is no such ID"),
    ("wrong CA", wrong_ca, 3, "network.tls", "dps-tls", r"issued by 'Testing CA .*roots are those in ca_file '/"),
    ("wrong clock", wrong_clock, 3, "clock.not_set", "clock", r"clock says 1970-01-01T00:00:12Z, .* never set"),
    ("proxy", "closed_proxy", 3, "network.proxy", "proxy", r"the proxy 127\.0\.0\.1:\d+ wants a user and a password"),
    ("full disk", full_disk, 3, "store.full", "state-folder", r"No space left on device"),
    ("read-only disk", read_only_disk, 1, "store.read_only", "state-folder", r"Read-only file system"),
    (
        "bad config",
        bad_config,
        6,
        "config.invalid",
        "settings",
        r"retry\.registration_budget: there is no such setting",
    ),
    ("EK mismatch", ek_mismatch, 4, "dps.ek_mismatch", "dps-answers", r"holds another endorsement key than this TPM's"),
    ("locked TPM", "locked_tpm", 5, "tpm.locked_out", "tpm-noda", r"cannot be used now: 2 of 3 failures counted"),
    ("hub closed", "hub_closed", 3, "network.unreachable", "hub-mqtt", r"hub is not reached: .*Connection refused"),
]


def test_the_bench_works_before_it_is_broken(bench: Bench) -> None:
    bench.agent.command("provision")
    ended = bench.run(Command())
    assert (ended.returncode, ended.stderr) == (0, ""), ended.stdout
    assert ended.stdout.startswith("ok, with a warning: tpm-node: simulator: ")


@pytest.mark.parametrize(
    ("broken", "exit_status", "code", "check", "says"), [row[1:] for row in SETUPS], ids=[row[0] for row in SETUPS]
)
def test_the_first_line_names_the_cause(
    broken: Callable[[Bench], Command] | str,
    exit_status: int,
    code: str,
    check: str,
    says: str,
    bench: Bench,
    request: pytest.FixtureRequest,
) -> None:
    break_it = request.getfixturevalue(broken) if isinstance(broken, str) else broken
    command = break_it(bench)
    ended = bench.run(command)
    assert ended.stderr == "" and "Traceback" not in ended.stdout, ended.stderr
    first, second, *_ = ended.stdout.splitlines()
    print(f"exit {ended.returncode}: {first}")
    assert first.startswith(f"failed: {check}: ") and re.search(says, first), first
    assert (ended.returncode, second.split()[-1]) == (exit_status, f"[{code}]"), ended.stdout
    assert "hunter2" not in ended.stdout
    ended = bench.run(command, "--json")
    assert ended.returncode == exit_status
    error = json.loads(ended.stdout)["error"]
    assert error["code"] == code and error["remedy"]
    assert [path.name for path in bench.folder.rglob(".dps-agent-check")] == []


# --- what else the network may do


Findings = dict[str, dict[str, Any]]


def found_by(bench: Bench, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, Findings]:
    """Exit status and findings of a check in this process."""
    status = main(["--config", str(bench.agent.settings), "check", "--json", *words])
    return status, {found["id"]: found for found in json.loads(capsys.readouterr().out)["checks"]}


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("DPS_AGENT_") or name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)


def at_server(server: Server, certificates: Certificates) -> tuple[str, ...]:
    """The settings for a DPS that `server` plays."""
    ca_file, connect_to = setting("ca_file", certificates.ca_file), setting("connect_to", server.address)
    return (*setting("endpoint", f"https://{ENDPOINT_NAME}"), *ca_file, *connect_to)


def test_an_unregistered_device_is_told_from_an_unknown_one_and_nothing_is_registered(
    bench: Bench, quiet: None, capsys: pytest.CaptureFixture[str]
) -> None:
    status, found = found_by(bench, capsys)
    assert (status, found["dps-answers"]["result"]) == (0, "ok")
    assert "challenges it" in found["dps-answers"]["detail"]
    assert [line.method for line in bench.emulator.log] == ["POST"]  # a read
    assert dict(bench.emulator.service.registrations) == {}
    bench.emulator.service.enrollments.clear()
    status, found = found_by(bench, capsys)
    assert (status, found["dps-answers"]["code"]) == (4, "dps.not_found")
    assert dict(bench.emulator.service.registrations) == {}


@pytest.mark.parametrize("lookup", [401, 404])
def test_a_service_without_lookups_is_asked_for_a_challenge(
    lookup: Literal[401, 404], bench: Bench, quiet: None, capsys: pytest.CaptureFixture[str]
) -> None:
    bench.emulator.service.settings = Settings(lookup=lookup)
    status, found = found_by(bench, capsys)
    assert (status, found["dps-answers"]["result"]) == (0, "ok")
    assert [(line.method, line.status) for line in bench.emulator.log] == [("POST", lookup), ("PUT", 401)]
    assert dict(bench.emulator.service.registrations) == {}


def test_a_disabled_enrolment_is_refused(bench: Bench, quiet: None, capsys: pytest.CaptureFixture[str]) -> None:
    bench.emulator.service.enroll(Enrollment("press-07", bench.tpm.endorsement_key(), enabled=False))
    status, found = found_by(bench, capsys)
    assert (status, found["dps-answers"]["code"]) == (4, "dps.forbidden")
    assert "disabled" in found["dps-answers"]["detail"]


def test_throttling_is_exit_3_with_the_time_that_dps_asks_for(
    bench: Bench, quiet: None, capsys: pytest.CaptureFixture[str]
) -> None:
    bench.emulator.script(Fault(status=429, headers={"Retry-After": "17"}))
    assert main(["--config", str(bench.agent.settings), "check", "--json"]) == 3
    error = json.loads(capsys.readouterr().out)["error"]
    assert (error["code"], error["retryAfterS"]) == ("dps.throttled", 17)


@pytest.mark.parametrize(("off_s", "direction"), [(3600, "ahead of"), (-3600, "behind")])
@pytest.mark.parametrize("synchronised", [True, False])
def test_a_clock_that_dps_speaks_against_is_named(
    synchronised: bool,
    off_s: int,
    direction: str,
    tmp_path: Path,
    quiet: None,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(network, "is_synchronised", lambda: synchronised)
    with EmulatorInThread(clock=lambda: time.time() - off_s) as emulator:
        bench = Bench(tmp_path, emulator)
        status, found = found_by(bench, capsys)
        expected = (3, "failed", "clock.not_set") if synchronised else (0, "warning", "")
        assert (status, found["clock-dps"]["result"], found["clock-dps"]["code"]) == expected
        assert re.search(rf"clock is wrong: it is 3[56]\d\d s {direction} DPS's", found["clock-dps"]["detail"])


@pytest.mark.parametrize(
    ("context", "says"),
    [
        ("expired", r"certificate has expired by the device's clock, which says 20\d\d-"),
        ("of_another_name", r"Hostname mismatch.*not valid for 'dps\.example'"),
        ("self_signed", r"self-signed certificate.* issued by 'Testing CA"),
    ],
)
def test_what_is_wrong_with_a_certificate_is_said(
    context: str, says: str, bench: Bench, quiet: None, capsys: pytest.CaptureFixture[str]
) -> None:
    certificates = Certificates(bench.folder)
    with Server(answering(answer(b"{}")), getattr(certificates, context)()) as server:
        status, found = found_by(bench, capsys, *at_server(server, certificates))
    assert (status, found["dps-tls"]["code"]) == (3, "network.tls")
    assert re.search(says, found["dps-tls"]["detail"]), found["dps-tls"]["detail"]
    assert found["dps-answers"]["detail"] == "not possible without dps-tls"


@pytest.mark.parametrize(
    ("what", "code", "says"),
    [
        ("http", "network.not_tls", "does not speak TLS"),
        ("tls 1.1", "network.tls_version", "speaks no TLS 1.2 or newer"),
        ("an end", "network.closed", "the connection ended in the TLS handshake"),
    ],
)
def test_where_no_certificate_was_judged_none_is_blamed(
    what: str, code: str, says: str, bench: Bench, quiet: None, capsys: pytest.CaptureFixture[str]
) -> None:
    def in_http(peer: Peer) -> None:
        peer.receive()
        if what == "http":
            peer.send(answer(b"", "400 Bad Request"))

    certificates = Certificates(bench.folder)
    with Server(in_http, certificates.of_tls_1_1() if what == "tls 1.1" else None) as server:
        status, found = found_by(bench, capsys, *at_server(server, certificates))
    assert (status, found["dps-tls"]["code"]) == (3, code)
    assert found["dps-tls"]["detail"].startswith(f"no TLS connection to DPS at {server.address}: ")
    assert says in found["dps-tls"]["detail"]
    for blamed in ("verified", "ca_file", "clock", "roots"):
        assert blamed not in found["dps-tls"]["detail"] + found["dps-tls"]["remedy"]


def test_a_system_without_any_roots_is_told_in_words(
    bench: Bench, quiet: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    roots = bench.folder / "roots"
    roots.mkdir()
    monkeypatch.setenv("SSL_CERT_FILE", str(bench.folder / "no-file"))
    for folder in (roots, bench.folder / "no-folder"):
        monkeypatch.setenv("SSL_CERT_DIR", str(folder))
        _, found = found_by(bench, capsys, "--only", "dps-tls", *setting("ca_file", ""))
        assert found["dps-tls"]["code"] == "network.tls"
        assert (
            f"it has none: neither {bench.folder}/no-file nor anything in {folder} is there"
            in found["dps-tls"]["detail"]
        )
    monkeypatch.setenv("SSL_CERT_DIR", str(roots))
    (roots / "12345678.0").touch()
    _, found = found_by(bench, capsys, "--only", "dps-tls", *setting("ca_file", ""))
    assert found["dps-tls"]["detail"].endswith("the roots are the system's")


def test_roots_in_a_folder_that_may_not_be_listed_are_no_bug_of_the_agents(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str) -> list[str]:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    monkeypatch.setenv("SSL_CERT_FILE", "/nonexistent")
    monkeypatch.setenv("SSL_CERT_DIR", "/etc")
    monkeypatch.setattr(network.os, "listdir", refuse)
    assert network._system_roots() == "the system's, of which nothing can be said: /etc: Permission denied"


def test_the_chain_and_the_root_are_named(bench: Bench, quiet: None, capsys: pytest.CaptureFixture[str]) -> None:
    _, found = found_by(bench, capsys, "--only", "dps-tls")
    assert re.fullmatch(
        r"TLSv1\.3 with 127\.0\.0\.1, certificate until .* GMT; root 'Testing CA #.*' \(in .*ca\.pem\)",
        found["dps-tls"]["detail"],
    ), found["dps-tls"]["detail"]
    assert list(found) == ["settings", "clock", "proxy", "dns", "dps-tls"]


@pytest.mark.parametrize("silent", ["tcp", "tls"])
def test_a_server_that_says_nothing_ends_the_wait(
    silent: str, bench: Bench, quiet: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ways, "DIAL_LIMIT_S", 0.5)
    monkeypatch.setattr(network, "ANSWER_LIMIT_S", 0.5)
    certificates = Certificates(bench.folder)
    context = certificates.good() if silent == "tls" else None
    began_s = time.monotonic()
    with Server(Peer.wait_until_gone, context) as server:
        status, found = found_by(bench, capsys, *at_server(server, certificates))
    failing = "dps-answers" if silent == "tls" else "dps-tls"
    assert (status, found[failing]["code"]) == (3, "network.timeout")
    assert time.monotonic() - began_s < 50, "the server itself gave up"


def test_a_name_that_does_not_exist_is_named(bench: Bench, quiet: None, capsys: pytest.CaptureFixture[str]) -> None:
    status, found = found_by(bench, capsys, *setting("endpoint", "https://dps.invalid"))
    assert (status, found["dns"]["code"]) == (3, "network.dns")
    assert "'dps.invalid'" in found["dns"]["detail"]


def test_what_is_no_dps_is_named(bench: Bench, quiet: None, capsys: pytest.CaptureFixture[str]) -> None:
    certificates = Certificates(bench.folder)
    portal = answer(b"", "302 Found", "Location: https://login.example/\r\n")
    with Server(answering(portal), certificates.good()) as server:
        status, found = found_by(bench, capsys, *at_server(server, certificates))
    assert (status, found["dps-answers"]["code"]) == (4, "dps.redirected")


@pytest.mark.parametrize("credentials", ["", "user:hunter2"])
def test_a_proxy_that_lets_us_through_is_named_without_its_password(
    credentials: str, bench: Bench, quiet: None, capsys: pytest.CaptureFixture[str]
) -> None:
    with Server(proxying(credentials), None) as server:
        at = f"{credentials}@" if credentials else ""
        proxy = setting("network.proxy", f"http://{at}{server.address}")
        status, found = found_by(bench, capsys, *proxy)
    assert (status, found["proxy"]["result"], found["dps-answers"]["result"]) == (0, "ok", "ok")
    assert found["proxy"]["detail"].startswith(f"{server.address} leads to {LOOPBACK}:")
    assert found["dns"]["detail"].startswith("the proxy ")
    assert "hunter2" not in json.dumps(found)


def test_a_proxy_of_the_environment_is_named_as_that(
    closed_port: int, bench: Bench, capsys: pytest.CaptureFixture[str], quiet: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("https_proxy", f"http://me:hunter2@{LOOPBACK}:{closed_port}")
    status, found = found_by(bench, capsys, *setting("endpoint", "https://dps.example"))
    assert (status, found["proxy"]["code"]) == (3, "network.unreachable")
    assert "https_proxy in the environment" in found["proxy"]["detail"]
    assert "no_proxy" in found["proxy"]["remedy"]
    assert "hunter2" not in json.dumps(found)


def test_checks_without_an_id_scope_or_with_a_service_that_registers_ask_dps_nothing(
    bench: Bench, quiet: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    status, found = found_by(bench, capsys, *setting("id_scope", '""'))
    assert status == 6  # an empty one is no setting
    bench.agent.settings.write_text(bench.agent.text.replace('id_scope = "0ne00000000"', ""))
    status, found = found_by(bench, capsys)
    assert (status, found["dps-answers"]["detail"]) == (0, "id_scope is not set")
    bench.agent.settings.write_text(bench.agent.text)
    monkeypatch.setattr("dps_agent.host.checks.device.read_live", lambda _: {"state": "provisioning"})
    status, found = found_by(bench, capsys)
    assert (status, found["dps-answers"]["result"]) == (0, "skipped")
    assert bench.emulator.log == []


@pytest.mark.parametrize("words", [("--only", "dns", "--offline"), ("--only", "settings,dps"), ("--only", "")])
def test_what_cannot_be_checked_is_exit_2(words: tuple[str, ...], bench: Bench, quiet: None) -> None:
    assert main(["--config", str(bench.agent.settings), "check", *words]) == 2


# --- the hub


@pytest.mark.parametrize(
    ("open_ports", "transport", "expected"),
    [
        ("both", "auto", (0, "ok", "ok")),
        ("mqtt", "auto", (0, "ok", "ok")),
        ("websocket", "auto", (0, "warning", "ok")),
        ("none", "auto", (3, "failed", "failed")),
        ("websocket", "mqtt", (3, "failed", "skipped")),
        ("mqtt", "websocket", (3, "skipped", "failed")),
    ],
)
def test_each_way_to_the_hub_is_gone_and_one_that_is_used_suffices(
    open_ports: str,
    transport: str,
    expected: tuple[int, str, str],
    closed_port: int,
    bench: Bench,
    quiet: None,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bench.agent.command("provision")
    real = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *rest, **more: real(LOOPBACK, *rest, **more))
    ports = {
        way: bench.emulator.hub_port if open_ports in ("both", way) else closed_port for way in ("mqtt", "websocket")
    }
    monkeypatch.setattr(websocket, "PORT", ports["websocket"])
    monkeypatch.setattr(ways, "MQTT_PORT", ports["mqtt"])
    bench.agent.settings.write_text(bench.agent.text.replace(f'connect_to = "{bench.emulator.hub_connect_to}"', ""))
    status, found = found_by(bench, capsys, *setting("hub.transport", transport))
    assert (status, found["hub-mqtt"]["result"], found["hub-websocket"]["result"]) == expected
    if open_ports == "mqtt" and transport == "auto":
        assert "it is not needed" in found["hub-websocket"]["detail"]
    if expected[1] == "warning":
        assert "uses WebSocket instead" in found["hub-mqtt"]["detail"]
    if expected[1] == "failed":
        assert f"outgoing TCP {closed_port}" in found["hub-mqtt"]["remedy"]


def test_a_hub_that_is_not_trusted_is_named(bench: Bench, quiet: None, capsys: pytest.CaptureFixture[str]) -> None:
    bench.agent.command("provision")
    status, found = found_by(bench, capsys, *setting("hub.ca_file", Certificates(bench.folder).ca_file))
    assert (status, found["hub-mqtt"]["code"]) == (3, "network.tls")
    assert "roots are those in hub.ca_file" in found["hub-mqtt"]["detail"]


def test_check_works_while_the_service_runs_and_leaves_it_connected(tmp_path: Path, emulator: EmulatorInThread) -> None:
    with Swtpm(tmp_path / "swtpm") as machine:
        emulator.service.settings = Settings(enroll_any=True, retry_after_s=0)
        with RunningAgent(tmp_path, emulator, f'backend = "wire"\ntcti = "{machine.tcti}"') as agent:
            agent.start()
            agent.await_connected()
            document = agent.command("check")
            assert {found["id"]: found["result"] for found in document["checks"] if found["result"] != "ok"} == {
                "hub-websocket": "skipped"
            }
            status = agent.status()
            assert (status["connected"], status["connections"]) == (True, 1)


# --- disk and record


def test_a_full_disk_does_not_matter_once_the_records_have_their_room(bench: Bench) -> None:
    store = FileStore(str(bench.agent.state_dir))
    store.commit(IDENTITY, b"x")
    fill = f'cp -a {bench.agent.state_dir}.kept/. "$0" && {{ cat /dev/zero > "$0/full" 2> /dev/null || true; }}'
    bench.agent.state_dir.rename(f"{bench.agent.state_dir}.kept")
    bench.agent.state_dir.mkdir()
    command = Command(("--offline",), (*mounted("size=64k", fill), str(bench.agent.state_dir)))
    found = {each["id"]: each for each in json.loads(bench.run(command, "--json").stdout)["checks"]}
    assert found["state-folder"]["result"] == "warning"
    assert "No space left on device; the records have their room" in found["state-folder"]["detail"]


def test_a_disk_that_hangs_ends_the_checks_in_time(
    bench: Bench, quiet: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    end = threading.Event()
    monkeypatch.setattr("dps_agent.host.checks.device.STORE_DEADLINE_S", 0.2)
    monkeypatch.setattr(local, "_write_scratch", lambda *_: end.wait(30))
    try:
        status, found = found_by(bench, capsys, "--offline")
    finally:
        end.set()
    assert (status, found["state-folder"]["code"]) == (3, "store.io")
    assert found["tpm-node"]["detail"] == "not possible: an earlier check still hangs"


def test_a_path_below_dev_that_is_no_flash_is_tried_as_the_folder_it_is(
    bench: Bench, quiet: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DPS_AGENT_STATE_DIR", "/dev/null/state")
    status, found = found_by(bench, capsys, "--only", "state-folder")
    assert status != 0 and found["state-folder"]["result"] == "failed", found
    with TemporaryDirectory(dir="/dev/shm") as folder:
        monkeypatch.setenv("DPS_AGENT_STATE_DIR", folder)
        status, found = found_by(bench, capsys, "--only", "state-folder")
    assert status == 0 and f"{folder} takes what is written" in found["state-folder"]["detail"]


def test_what_a_killed_check_left_is_no_matter(bench: Bench, quiet: None, capsys: pytest.CaptureFixture[str]) -> None:
    bench.agent.state_dir.mkdir()
    (bench.agent.state_dir / local.SCRATCH_NAME).write_bytes(b"half")
    status, found = found_by(bench, capsys, "--only", "state-folder")
    assert status == 0 and found["state-folder"]["result"] in ("ok", "warning"), "a warning where /tmp is in memory"
    assert list(bench.agent.state_dir.iterdir()) == []


def a_file(path: Path) -> None:
    path.write_text("no folder")


def a_link_to_nowhere(path: Path) -> None:
    path.symlink_to("nowhere")


@pytest.mark.parametrize("below", ["", "deeper/still"])
@pytest.mark.parametrize("make", [a_file, a_link_to_nowhere])
def test_a_state_folder_that_cannot_be_one_fails_as_in_a_registration(
    make: Callable[[Path], None], below: str, bench: Bench, quiet: None, capsys: pytest.CaptureFixture[str]
) -> None:
    make(bench.agent.state_dir)
    command = Command(setting("state_dir", str(bench.agent.state_dir / below)))
    checked = bench.run(command, "--only", "state-folder", "--json")
    assert checked.returncode != 0, checked.stdout
    (found,) = (each for each in json.loads(checked.stdout)["checks"] if each["id"] == "state-folder")
    flags = [*PROGRAM, "--config", str(bench.agent.settings), *command.flags, "provision", "--json"]
    tried = subprocess.run(
        flags, cwd=bench.folder, env=_environ({}), capture_output=True, text=True, timeout=120, check=False
    )
    error = json.loads(tried.stdout)["error"]
    assert (found["result"], found["code"], checked.returncode) == ("failed", error["code"], tried.returncode)


def test_generation_and_age_of_the_record_are_shown(
    bench: Bench, quiet: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.agent.command("provision")
    bench.agent.command("provision", "--force")
    monkeypatch.setattr(local, "time", Mock(time=lambda: time.time() + 3 * 86400))
    _, found = found_by(bench, capsys, "--offline")
    assert found["record"]["detail"] == f"generation 2, assigned to {HUB} 3 days ago"
    assert found["record-seal"]["result"] == "ok"


def test_a_record_that_was_altered_or_fell_back_is_a_warning(
    bench: Bench, quiet: None, capsys: pytest.CaptureFixture[str]
) -> None:
    bench.agent.command("provision")
    bench.agent.command("provision", "--force")
    newer = max(bench.agent.state_dir.glob("identity.*"), key=lambda path: path.read_bytes()[8:12])
    content = newer.read_bytes()
    newer.write_bytes(content[:200] + b"\0" + content[201:])
    status, found = found_by(bench, capsys, "--offline")
    assert (status, found["record"]["result"]) == (0, "warning")
    assert "an older one serves" in found["record"]["detail"]
    store = FileStore(str(bench.agent.state_dir))
    stored = store.load(IDENTITY)
    assert stored is not None
    store.commit(IDENTITY, stored.payload.replace(b"emulator.", b"elsewhere."))
    status, found = found_by(bench, capsys, "--offline")
    assert (status, found["record-seal"]["result"]) == (0, "warning")
    assert "seal does not fit" in found["record-seal"]["detail"]


def test_a_record_of_another_tpm_is_exit_5(bench: Bench, quiet: None, capsys: pytest.CaptureFixture[str]) -> None:
    bench.agent.command("provision")
    other = copy_state(OTHER_EK_STATE, bench.folder / "other")
    status, found = found_by(bench, capsys, "--offline", *setting("tpm.tcti", other))
    assert (status, found["record-seal"]["code"]) == (5, "tpm.ek_changed")


def test_a_record_for_other_settings_is_a_warning(
    bench: Bench, quiet: None, capsys: pytest.CaptureFixture[str]
) -> None:
    bench.agent.command("provision")
    status, found = found_by(bench, capsys, "--offline", *setting("id_scope", "0ne0BADC0DE"))
    assert (status, found["record"]["result"], found["record-seal"]["result"]) == (0, "warning", "skipped")
    assert "the settings say '0ne0BADC0DE'" in found["record"]["detail"]
