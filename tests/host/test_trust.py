"""Whom connections trust as time goes on: roots are looked up when needed, sessions resumed where that is sound.

What OpenSSL does with all that its defaults name (`load_default_certs`, nothing kept between two connections) is the
measure; nothing here may be trusted longer, and nothing less.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import os
import ssl
import time
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

from dps_agent.effects import NoReply, Reply
from dps_agent.host.network import trust
from dps_agent.host.network.https import DpsConnection
from dps_agent.host.network.mqtt import HubConnection
from dps_agent.host.network.trust import SESSIONS_LIMIT, TRUST_LIFE_S, Trust, tls_context
from dps_agent.hub_effects import ConnAck, Connect
from dps_agent.sas import SasToken
from support.cloud.broker import HubPeer
from support.cloud.chains import (
    CA,
    INTERMEDIATE,
    PEER,
    ROOT,
    SERVER,
    SIGNS_CERTIFICATES,
    Party,
    dated,
    names_beside,
    party,
    serving,
    shaken,
)
from support.cloud.servers import Peer, Server, answer, answering

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

STRANGER = party("stranger", None, [*CA, SIGNS_CERTIFICATES])
OTHER_NAME = "other.example"
TOKEN = SasToken("hub%2Fdevices%2Fpress-07", 1_800_000_000, b"\x5a" * 32)
CONNECT = Connect(PEER, "press-07", f"{PEER}/press-07/?api-version=2021-04-12", TOKEN, 240, False)
VERSIONS = ["TLSv1_2", "TLSv1_3"]


class Clocks:
    """What the files under test take for the time."""

    def __init__(self) -> None:
        self.passed_s = 0.0  # beside the true time
        self.ahead_s = 0.0  # the system's clock alone

    def time(self) -> float:
        return time.time() + self.passed_s + self.ahead_s

    def clock_gettime(self, clock: int) -> float:
        return time.clock_gettime(clock) + self.passed_s


@pytest.fixture
def clocks(monkeypatch: pytest.MonkeyPatch) -> Clocks:
    clocks = Clocks()
    named = {name: getattr(clocks, name) for name in ("time", "clock_gettime")}
    monkeypatch.setattr(trust, "time", SimpleNamespace(**named, CLOCK_BOOTTIME=time.CLOCK_BOOTTIME))
    return clocks


def pem_file(path: Path, *roots: Party) -> str:
    path.write_text("".join(root.pem for root in roots))
    return str(path)


def hashed_name(root: Party) -> str:
    """The name by which OpenSSL looks up a certificate: X509_NAME_hash, of a name in lower case and UTF-8."""
    inner = root.name.public_bytes()[2:]
    return f"{int.from_bytes(hashlib.sha1(inner, usedforsecurity=False).digest()[:4], 'little'):08x}.0"


def hashed_folder(folder: Path, *roots: Party) -> str:
    folder.mkdir(exist_ok=True)
    for root in roots:
        pem_file(folder / hashed_name(root), root)
    return str(folder)


@pytest.fixture
def roots_in(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Says where the system's roots are: for the agent the usual places, for OpenSSL what the environment names."""

    def say(file: str, folders: str) -> None:
        monkeypatch.setenv("SSL_CERT_FILE", file)
        monkeypatch.setenv("SSL_CERT_DIR", folders)
        usual = ssl.get_default_verify_paths()._replace(openssl_cafile=file, openssl_capath=folders)
        monkeypatch.setattr(ssl, "get_default_verify_paths", lambda: usual)

    return say


@contextlib.contextmanager
def peer(context: ssl.SSLContext, behave: Callable[[Peer], None] | None = None) -> Iterator[Server]:
    with Server(behave or answering(answer(b"{}", headers="Connection: close\r\n")), context) as server:
        yield server


def asked(connection: DpsConnection) -> str:
    """What becomes of a request: "" where it is answered, else the reason."""
    outcome = connection.request("GET", "/", b"", None)
    return outcome.reason if isinstance(outcome, NoReply) else ""


def dps(server: Server, ca_file: str = "", name: str = PEER) -> DpsConnection:
    return DpsConnection(f"https://{name}", server.address, ca_file, 20.0)


# roots


PLACES: dict[str, Callable[[Path], tuple[str | None, str | None]]] = {
    "neither": lambda folder: (None, None),
    "a file with the root": lambda folder: (pem_file(folder / "f", ROOT), None),
    "a file with another root": lambda folder: (pem_file(folder / "f", STRANGER), None),
    "a file that is not there": lambda folder: (str(folder / "absent"), None),
    "no file": lambda folder: ("", None),
    "a folder with the root": lambda folder: (None, hashed_folder(folder / "d", ROOT)),
    "a folder with another root": lambda folder: (None, hashed_folder(folder / "d", STRANGER)),
    "a folder with the intermediate": lambda folder: (None, hashed_folder(folder / "d", INTERMEDIATE)),
    "a folder that is not there": lambda folder: (None, str(folder / "absent")),
    "no folder": lambda folder: (None, ""),
    "an empty folder": lambda folder: (None, hashed_folder(folder / "d")),
    "a folder without hashes": lambda folder: (None, os.path.dirname(pem_file(folder / "root.pem", ROOT))),
    "two folders": lambda folder: (
        None,
        f"{folder / 'absent'}::{hashed_folder(folder / 'a', STRANGER)}:{hashed_folder(folder / 'b', ROOT)}",
    ),
    "the root in the file alone": lambda folder: (
        pem_file(folder / "f", ROOT),
        hashed_folder(folder / "d", STRANGER),
    ),
    "the root in the folder alone": lambda folder: (
        pem_file(folder / "f", STRANGER),
        hashed_folder(folder / "d", ROOT),
    ),
    "another root in both": lambda folder: (
        pem_file(folder / "f", STRANGER),
        hashed_folder(folder / "d", STRANGER),
    ),
    "a file that is no certificate, a folder that is none": lambda folder: (
        str(folder),
        pem_file(folder / "f", STRANGER),
    ),
}


@pytest.mark.parametrize("places", PLACES)
def test_what_the_environment_names_is_trusted_as_openssl_does(
    places: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in zip(("SSL_CERT_FILE", "SSL_CERT_DIR"), PLACES[places](tmp_path), strict=True):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    verdict = ""
    measure = tls_context()
    measure.load_default_certs()
    try:
        shaken(measure, tmp_path, SERVER, INTERMEDIATE)
    except ssl.SSLCertVerificationError as error:
        verdict = f"tls: {error.verify_message}"
    with peer(serving(tmp_path, SERVER, INTERMEDIATE)) as server, contextlib.closing(dps(server)) as connection:
        assert (asked(connection), asked(connection)) == (verdict, verdict)


def test_of_a_hashed_folder_only_what_a_chain_needs_is_read(tmp_path: Path, roots_in: Callable[..., None]) -> None:
    roots_in(pem_file(tmp_path / "f", ROOT, STRANGER), hashed_folder(tmp_path / "d", ROOT, STRANGER))
    context = Trust("", "ca_file").context()
    assert context.cert_store_stats()["x509"] == 0
    shaken(context, tmp_path, SERVER, INTERMEDIATE)
    assert context.cert_store_stats()["x509"] == 1


def test_a_root_that_is_only_in_the_usual_file_costs_one_more_connection_once(
    tmp_path: Path, roots_in: Callable[..., None]
) -> None:
    roots_in(pem_file(tmp_path / "f", ROOT), hashed_folder(tmp_path / "d", STRANGER))
    with peer(serving(tmp_path, SERVER, INTERMEDIATE)) as server, contextlib.closing(dps(server)) as connection:
        assert (asked(connection), server.connections) == ("", 2)
        assert (asked(connection), server.connections) == ("", 3)


def test_a_file_of_somebody_s_own_choice_is_read_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, folder = PLACES["the root in the file alone"](tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(file))
    monkeypatch.setenv("SSL_CERT_DIR", str(folder))
    with peer(serving(tmp_path, SERVER, INTERMEDIATE)) as server, contextlib.closing(dps(server)) as connection:
        assert (asked(connection), server.connections) == ("", 1)


def test_a_refusal_is_one_only_when_every_root_was_asked_and_then_costs_one_connection(
    tmp_path: Path, roots_in: Callable[..., None]
) -> None:
    roots_in(pem_file(tmp_path / "f", STRANGER), hashed_folder(tmp_path / "d", STRANGER))
    with peer(serving(tmp_path, SERVER, INTERMEDIATE)) as server, contextlib.closing(dps(server)) as connection:
        for connections in (2, 3, 4):
            assert asked(connection).startswith("tls: ") and server.connections == connections


def test_ca_file_is_all_there_is_and_is_asked_once(tmp_path: Path, roots_in: Callable[..., None]) -> None:
    roots_in(pem_file(tmp_path / "f", ROOT), hashed_folder(tmp_path / "d", ROOT))
    with (
        peer(serving(tmp_path, SERVER, INTERMEDIATE)) as server,
        contextlib.closing(dps(server, pem_file(tmp_path / "ca", STRANGER))) as connection,
    ):
        assert asked(connection).startswith("tls: ") and server.connections == 1


# a process that runs for months


def removed_from_the_folder(folder: Path) -> None:
    (folder / "d" / hashed_name(ROOT)).unlink()


def replaced_in_the_file(folder: Path) -> None:
    pem_file(folder / "new", STRANGER)
    (folder / "new").replace(folder / "f")


def added_to_the_folder(folder: Path) -> None:
    pem_file(folder / "d" / hashed_name(ROOT), ROOT)


def written_to_the_file(folder: Path) -> None:
    pem_file(folder / "f", STRANGER, ROOT)


@pytest.mark.parametrize(
    ("before", "change", "after"),
    [
        ("the root in the folder alone", removed_from_the_folder, False),
        ("the root in the file alone", replaced_in_the_file, False),
        ("another root in both", added_to_the_folder, True),
        ("another root in both", written_to_the_file, True),
    ],
)
def test_the_next_connection_trusts_what_the_system_trusts_by_then(
    before: str, change: Callable[[Path], None], after: bool, tmp_path: Path, roots_in: Callable[..., None]
) -> None:
    roots_in(*PLACES[before](tmp_path))
    with peer(serving(tmp_path, SERVER, INTERMEDIATE)) as server, contextlib.closing(dps(server)) as connection:
        assert (asked(connection) == "") is not after
        change(tmp_path)
        assert (asked(connection) == "") is after


def test_openssl_itself_would_go_on_with_a_root_that_it_has_read(tmp_path: Path) -> None:
    """Why the context is made anew: this one is what it is compared with."""
    kept = tls_context()
    kept.load_verify_locations(capath=hashed_folder(tmp_path / "d", ROOT))
    shaken(kept, tmp_path, SERVER, INTERMEDIATE)
    removed_from_the_folder(tmp_path)
    shaken(kept, tmp_path, SERVER, INTERMEDIATE)


def test_another_environment_is_another_trust(
    tmp_path: Path, roots_in: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    roots_in(pem_file(tmp_path / "f", STRANGER), hashed_folder(tmp_path / "d", ROOT))
    other = hashed_folder(tmp_path / "e", STRANGER)
    with peer(serving(tmp_path, SERVER, INTERMEDIATE)) as server, contextlib.closing(dps(server)) as connection:
        assert asked(connection) == ""
        monkeypatch.setenv("SSL_CERT_DIR", other)
        assert asked(connection).startswith("tls: ")


def test_a_root_that_was_replaced_without_a_trace_in_its_folder_is_gone_a_day_later(
    tmp_path: Path, roots_in: Callable[..., None], clocks: Clocks
) -> None:
    roots_in("", hashed_folder(tmp_path / "d", ROOT))
    trusting = Trust("", "ca_file")
    shaken(trusting.context(), tmp_path, SERVER, INTERMEDIATE)
    (tmp_path / "d" / hashed_name(ROOT)).write_text(STRANGER.pem)
    clocks.passed_s = TRUST_LIFE_S - 60
    shaken(trusting.context(), tmp_path, SERVER, INTERMEDIATE)
    clocks.passed_s = TRUST_LIFE_S
    with pytest.raises(ssl.SSLCertVerificationError):
        shaken(trusting.context(), tmp_path, SERVER, INTERMEDIATE)


@pytest.mark.parametrize("in_file", [True, False])
def test_as_long_as_nothing_changes_there_is_one_context(
    in_file: bool, tmp_path: Path, roots_in: Callable[..., None], clocks: Clocks
) -> None:
    roots_in(pem_file(tmp_path / "f", ROOT), hashed_folder(tmp_path / "d", ROOT))
    trusting = Trust(str(tmp_path / "f") if in_file else "", "ca_file")
    first = trusting.context()
    clocks.passed_s, clocks.ahead_s = TRUST_LIFE_S / 2, 250
    assert trusting.context() is first
    clocks.ahead_s = 350
    assert trusting.context() is not first, "certificates were judged by another clock"


# sessions


def resumed(context: ssl.SSLContext) -> int:
    """How many of a server's handshakes resumed an earlier one."""
    return context.session_stats()["hits"]


def speaking(folder: Path, version: str, server: Party = SERVER) -> ssl.SSLContext:
    context = serving(folder, server, INTERMEDIATE)
    context.minimum_version = context.maximum_version = ssl.TLSVersion[version]
    return context


@pytest.fixture
def ca_file(tmp_path: Path) -> str:
    return pem_file(tmp_path / "ca", ROOT)


@pytest.fixture(params=VERSIONS)
def context(request: pytest.FixtureRequest, tmp_path: Path) -> ssl.SSLContext:
    return speaking(tmp_path, request.param)


def test_a_connection_to_dps_resumes_the_one_before(context: ssl.SSLContext, ca_file: str) -> None:
    with peer(context) as server, contextlib.closing(dps(server, ca_file)) as connection:
        for connections in range(1, 4):
            assert asked(connection) == ""
            assert (server.connections, resumed(context)) == (connections, connections - 1)


def test_a_connection_to_the_hub_resumes_the_one_before(context: ssl.SSLContext, ca_file: str) -> None:
    def behave(connected: Peer) -> None:
        hub = HubPeer(connected)
        hub.accept()
        hub.obey()

    with peer(context, behave) as server:
        hub = HubConnection(connect_to=server.address, ca_file=ca_file, transport="mqtt")
        with contextlib.closing(hub):
            for connections in range(1, 4):
                assert hub.connect(CONNECT) == ConnAck(0, False)
                assert (server.connections, resumed(context)) == (connections, connections - 1)


def test_a_resumed_connection_s_date_counts_as_a_verified_one_s(context: ssl.SSLContext, ca_file: str) -> None:
    now = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
    headers = f"Connection: close\r\nDate: {now:%a, %d %b %Y %H:%M:%S} GMT\r\n"
    with (
        peer(context, answering(answer(b"{}", headers=headers))) as server,
        contextlib.closing(dps(server, ca_file)) as connection,
    ):
        for _ in range(2):
            reply = connection.request("GET", "/", b"", None)
            assert isinstance(reply, Reply) and reply.date_s == now.timestamp()
    assert resumed(context) == 1


def test_no_session_serves_for_another_name(tmp_path: Path, ca_file: str, context: ssl.SSLContext) -> None:
    with peer(context) as server, contextlib.closing(dps(server, ca_file)) as connection:
        assert asked(connection) == ""
        connection._host = OTHER_NAME
        assert "mismatch" in asked(connection)
        assert resumed(context) == 0
        connection._host = PEER
        assert asked(connection) == ""
    assert resumed(context) == 1


def test_no_session_serves_when_its_root_is_trusted_no_more(tmp_path: Path, context: ssl.SSLContext) -> None:
    ca_file = tmp_path / "ca"
    pem_file(ca_file, ROOT)
    with peer(context) as server, contextlib.closing(dps(server, str(ca_file))) as connection:
        assert asked(connection) == ""
        pem_file(ca_file, STRANGER)
        assert "unable to get local issuer" in asked(connection)
    assert resumed(context) == 0


def test_a_session_belongs_to_the_context_that_verified_it(ca_file: str, context: ssl.SSLContext) -> None:
    with peer(context) as server, contextlib.closing(dps(server, ca_file)) as connection:
        assert asked(connection) == ""
        held = connection.trust
        other = Trust(ca_file, "ca_file")
        assert other.session(PEER) is None
        tls = connection._dialler.dial(PEER, *_host_and_port(server), time.monotonic() + 20)
        assert tls.session_reused
        other.context()
        other.keep(tls)
        assert other.session(PEER) is None, "it was verified by other rules"
        held.keep(tls)
        assert held.session(PEER) is not None
        assert held.session(PEER) is None, "each serves once"


@pytest.mark.parametrize(
    ("passed_s", "ahead_s"), [(TRUST_LIFE_S, 0), (0, 400), (0, -400)], ids=["a day", "a clock set", "a clock set back"]
)
def test_no_session_serves_after(
    passed_s: float, ahead_s: float, ca_file: str, context: ssl.SSLContext, clocks: Clocks
) -> None:
    with peer(context) as server, contextlib.closing(dps(server, ca_file)) as connection:
        assert asked(connection) == ""
        clocks.passed_s, clocks.ahead_s = passed_s, ahead_s
        assert (asked(connection), resumed(context)) == ("", 0)


@pytest.mark.parametrize("version", VERSIONS)
def test_no_session_outlives_the_certificate_it_began_with(version: str, tmp_path: Path, clocks: Clocks) -> None:
    ends = datetime.datetime.now(datetime.UTC) + datetime.timedelta(hours=1)
    context = speaking(tmp_path, version, dated(b"20200101000000Z", f"{ends:%Y%m%d%H%M%SZ}".encode()))
    with (
        peer(context) as server,
        contextlib.closing(dps(server, pem_file(tmp_path / "ca", ROOT))) as connection,
    ):
        assert asked(connection) == ""
        clocks.passed_s = 3000
        assert (asked(connection), resumed(context)) == ("", 1)
        clocks.passed_s = 4000
        assert (asked(connection), resumed(context)) == ("", 1), "OpenSSL is to judge, by the whole chain"


@pytest.mark.parametrize("version", VERSIONS)
def test_a_certificate_without_a_time_is_judged_each_time(version: str, tmp_path: Path, ca_file: str) -> None:
    context = speaking(tmp_path, version, dated(b"00000101000000Z", b"20900101000000Z"))
    with peer(context) as server, contextlib.closing(dps(server, ca_file)) as connection:
        assert (asked(connection), asked(connection)) == ("", "")
        assert (server.connections, resumed(context)) == (2, 0)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_refusal_by_the_clock_leaves_nothing_to_resume(version: str, tmp_path: Path, ca_file: str) -> None:
    early = speaking(tmp_path, version, dated(b"20900101000000Z", b"20910101000000Z"))
    with peer(early) as server, contextlib.closing(dps(server, ca_file)) as connection:
        for connections in (1, 2):
            assert "not yet valid" in asked(connection) and server.connections == connections
        assert resumed(early) == 0 and not connection.trust._sessions


def test_what_a_peer_does_not_resume_it_may_begin(context: ssl.SSLContext, ca_file: str) -> None:
    def behave(connected: Peer) -> None:
        if server.connections == 2:
            connected.drop()
            return
        connected.handshake(context)
        answering(answer(b"{}", headers="Connection: close\r\n"))(connected)

    with Server(behave, None) as server, contextlib.closing(dps(server, ca_file)) as connection:
        assert (asked(connection), asked(connection)) == ("", "")
        assert (server.connections, resumed(context)) == (3, 0)


def test_a_peer_that_refuses_resumption_for_ever_is_given_up(context: ssl.SSLContext, ca_file: str) -> None:
    def behave(connected: Peer) -> None:
        if server.connections == 1:
            connected.handshake(context)
            answering(answer(b"{}", headers="Connection: close\r\n"))(connected)

    with Server(behave, None) as server, contextlib.closing(dps(server, ca_file)) as connection:
        assert asked(connection) == ""
        assert asked(connection).startswith("closed: ") and server.connections == 3


def test_a_peer_that_offers_nothing_is_met_anew(tmp_path: Path, ca_file: str) -> None:
    context = speaking(tmp_path, "TLSv1_3")
    context.num_tickets = 0
    with peer(context) as server, contextlib.closing(dps(server, ca_file)) as connection:
        assert (asked(connection), asked(connection)) == ("", "")
        assert not connection.trust._sessions
        assert (server.connections, resumed(context)) == (2, 0)


def test_sessions_are_few(tmp_path: Path, ca_file: str) -> None:
    names = [f"{letter}.example".encode() for letter in "abcdef"]
    context = speaking(tmp_path, "TLSv1_3", party(PEER, INTERMEDIATE, [names_beside(*names)]))
    with peer(context) as server, contextlib.closing(dps(server, ca_file)) as connection:
        for name in names:
            connection._host = name.decode()
            assert asked(connection) == ""
        assert list(connection.trust._sessions) == [name.decode() for name in names[-SESSIONS_LIMIT:]]


def _host_and_port(server: Server) -> tuple[str, int]:
    host, _, port = server.address.rpartition(":")
    return host, int(port)
