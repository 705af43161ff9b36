"""TLS as the agent decides it: whom it trusts, on whichever Python, and whatever dates a certificate has."""

from __future__ import annotations

import ast
import contextlib
import datetime
import ssl
import warnings
from pathlib import Path
from typing import TYPE_CHECKING
from unittest.mock import Mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dps_agent.effects import NoReply, Reply
from dps_agent.host.network import trust
from dps_agent.host.network.https import DpsConnection
from dps_agent.host.network.shown import Shown
from dps_agent.host.network.trust import Trust, tls_context, validity_s
from dps_hal.host.codes import REMEDIES
from support.cloud.chains import (
    CHAINS,
    FOR_PEER,
    GENERALIZED_TIME,
    INTERMEDIATE,
    NO_CA,
    PEER,
    ROOT,
    SERVER,
    TRUSTED,
    UTC_TIME,
    Party,
    dated,
    names_beside,
    party,
    serving,
    shaken,
    written,
)
from support.cloud.servers import Peer, Server, answer, answering

if TYPE_CHECKING:
    from collections.abc import Callable

NOW = datetime.datetime(2026, 11, 29)
AGENT = Path(trust.__file__).parents[1]


def trusting(folder: Path, *anchors: Party) -> ssl.SSLContext:
    """The context of a connection for which `anchors` are in ca_file."""
    file = folder / "ca.pem"
    file.write_text("".join(anchor.pem for anchor in anchors))
    return Trust(str(file), "ca_file").context()


# what is decided, whatever Python decides by default


def test_flags_version_and_names_are_the_agent_s_own_on_every_python(tmp_path: Path) -> None:
    for context in (tls_context(), trusting(tmp_path, ROOT), Trust("", "ca_file").context()):
        assert int(context.verify_flags) == 0x8000 | 0x80000  # trusted first, partial chain; not strict (0x20)
        assert context.verify_mode == ssl.CERT_REQUIRED and context.check_hostname
        assert context.minimum_version == ssl.TLSVersion.TLSv1_2
        assert context.maximum_version == ssl.TLSVersion.MAXIMUM_SUPPORTED
        assert ssl.OP_NO_RENEGOTIATION in context.options and ssl.OP_NO_COMPRESSION in context.options
        assert not int(context.options) & (0x4 | 0x80 | 0x40000)  # legacy servers, unexpected ends, old renegotiation
        assert context.security_level >= 1
        assert not [
            suite for suite in context.get_ciphers() if suite["auth"] == "auth-null" or not suite["strength_bits"]
        ]


def test_the_environment_gets_no_session_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "keys"
    monkeypatch.setenv("SSLKEYLOGFILE", str(log))
    shaken(trusting(tmp_path, ROOT), tmp_path, SERVER, INTERMEDIATE)
    assert not log.exists()


def test_one_function_makes_every_context_of_the_agent() -> None:
    names = ("SSLContext", "create_default_context", "_create_unverified_context", "get_server_certificate")
    makers = [
        f"{path.name}: {node.func.attr}"
        for path in AGENT.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in names
    ]
    assert makers == ["trust.py: SSLContext"]


# what follows for the chains that are met


@pytest.mark.parametrize("name", CHAINS)
def test_the_verdict_on_a_chain_is_the_same_on_every_python(name: str, tmp_path: Path) -> None:
    (sent, anchors), verdict = CHAINS[name]
    said = TRUSTED
    try:
        shaken(trusting(tmp_path, *anchors), tmp_path, *sent)
    except ssl.SSLCertVerificationError as error:
        said = error.verify_message
    assert said.startswith(verdict) and bool(said) == bool(verdict), said


def test_the_server_s_own_certificate_may_be_all_that_is_trusted(tmp_path: Path) -> None:
    shaken(trusting(tmp_path, SERVER), tmp_path, SERVER)
    with pytest.raises(ssl.SSLCertVerificationError, match=r"local issuer|verify the first"):
        shaken(trusting(tmp_path, SERVER), tmp_path, party(PEER, INTERMEDIATE, FOR_PEER))


def test_another_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        shaken(trusting(tmp_path, ROOT), tmp_path, SERVER, INTERMEDIATE, name="other.example")


# what fails before a certificate counts


def alert(number: int) -> Callable[[Peer], None]:
    """A peer that ends the handshake with that fatal alert; RFC 8446, 6."""
    return saying(bytes.fromhex("15 0303 0002 02") + bytes([number]))


def saying(first: bytes) -> Callable[[Peer], None]:
    """A peer that answers a ClientHello with those bytes, and waits."""

    def behave(peer: Peer) -> None:
        peer.receive()
        peer.send(first)
        peer.wait_until_gone()

    return behave


def leaving(peer: Peer) -> None:
    peer.receive()


def resetting(peer: Peer) -> None:
    peer.receive()
    peer.reset()


FOREIGN = "what answers there does not speak TLS"
OLD = "what answers there speaks no TLS 1.2 or newer"
WANTING = "what answers there wants a certificate from this device"
NOTHING_IN_COMMON = "no cipher, curve or signature in common with this device, or wants its certificate"
ENDED = "the connection ended in the TLS handshake"
WITHOUT_VERDICT = {
    "HTTP": (saying(answer(b"", "400 Bad Request")), "not_tls", FOREIGN),
    "HTML alone": (saying(b"<html>400 Bad Request</html>"), "not_tls", FOREIGN),
    "SSH": (saying(b"SSH-2.0-OpenSSH_9.2\r\n"), "not_tls", FOREIGN),
    "zeros": (saying(bytes(64)), "not_tls", FOREIGN),
    "alert protocol_version": (alert(70), "tls_version", OLD),
    "alert handshake_failure": (alert(40), "tls_failed", NOTHING_IN_COMMON),
    "alert insufficient_security": (alert(71), "tls_failed", "takes none of this device's ciphers"),
    "alert bad_certificate": (alert(42), "tls_client_certificate", WANTING),
    "alert certificate_required": (alert(116), "tls_client_certificate", WANTING),
    "alert unrecognized_name": (alert(112), "tls_failed", "does not answer for this name"),
    "alert internal_error": (alert(80), "tls_failed", "TLS failed: tlsv1 alert internal error"),
    "alert that Python does not know": (alert(120), "tls_failed", "no application protocol"),
    "a goodbye": (saying(bytes.fromhex("15 0303 0002 01 00")), "closed", ENDED),
    "an end": (leaving, "closed", ENDED),
    "a reset": (resetting, "closed", ENDED),
    "silence": (Peer.wait_until_gone, "timeout", "in the TLS handshake"),
}


def failure_of(server: Server, ca_file: str, timeout_s: float = 10.0) -> tuple[str, str]:
    """Reason and words of a request that gets no answer."""
    with contextlib.closing(DpsConnection(f"https://{PEER}", server.address, ca_file, timeout_s)) as connection:
        outcome = connection.request("GET", "/", b"", None)
    assert isinstance(outcome, NoReply), outcome
    reason, _, words = outcome.reason.partition(": ")
    return reason, words


@pytest.fixture
def root_file(tmp_path: Path) -> str:
    file = tmp_path / "root.pem"
    file.write_text(ROOT.pem)
    return str(file)


@pytest.mark.parametrize("name", WITHOUT_VERDICT)
def test_a_handshake_without_a_verdict_on_a_certificate_says_what_it_met(name: str, root_file: str) -> None:
    behave, reason, words = WITHOUT_VERDICT[name]
    with Server(behave, None) as server:
        found = failure_of(server, root_file, 0.5 if name == "silence" else 10.0)
    assert found[0] == reason and words in found[1], found
    assert "verif" not in found[1]
    if reason.startswith(("not_", "tls_")):
        assert f"network.{reason}" in REMEDIES and "ca_file" not in REMEDIES[f"network.{reason}"]


def serving_only(folder: Path, version: str, ciphers: str = "DEFAULT") -> ssl.SSLContext:
    """The context of a server that verifies well, and speaks nothing but that."""
    context = serving(folder, party(PEER, ROOT, FOR_PEER))
    context.set_ciphers(f"{ciphers}:@SECLEVEL=0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the version may be old: that is the point
        context.minimum_version = context.maximum_version = ssl.TLSVersion[version]
    return context


def test_real_servers_are_told_apart(tmp_path: Path, root_file: str) -> None:
    old, nothing = serving_only(tmp_path, "TLSv1_1", "ALL"), serving_only(tmp_path, "TLSv1_2", "ADH-AES128-SHA256")
    found = []
    for context in (old, nothing):
        with Server(answering(answer(b"{}")), context) as server:
            found.append(failure_of(server, root_file)[0])
    for version in ("TLSv1_2", "TLSv1_3"):
        context = serving_only(tmp_path, version)
        context.load_verify_locations(root_file)
        context.verify_mode = ssl.CERT_REQUIRED
        with Server(answering(answer(b"{}")), context) as server:
            found.append(failure_of(server, root_file)[0])
    assert found == ["tls_version", "tls_failed", "tls_failed", "tls_client_certificate"]


@pytest.mark.parametrize("version", ["TLSv1_2", "TLSv1_3"])
def test_a_certificate_of_the_device_that_is_not_taken_is_named(tmp_path: Path, root_file: str, version: str) -> None:
    context = serving_only(tmp_path, version)
    context.load_verify_locations(root_file)
    context.verify_mode = ssl.CERT_REQUIRED
    day = datetime.timedelta(days=1)
    former, latter = (datetime.datetime.now(datetime.UTC) - days * day for days in (2, 1))
    ended = [(UTC_TIME, time.strftime("%y%m%d%H%M%SZ").encode()) for time in (former, latter)]
    for device, why in (
        (party("press-07", None, NO_CA), "unknown ca"),
        (party("press-07", ROOT, NO_CA, dates=(ended[0], ended[1])), "certificate expired"),
    ):
        file = str(written(tmp_path / "device.pem", device))
        shown = Shown(file, file, "", Mock(), "tls_key")
        with (
            Server(answering(answer(b"{}")), context) as server,
            contextlib.closing(
                DpsConnection(f"https://{PEER}", server.address, root_file, certificate=shown)
            ) as connection,
        ):
            reply = connection.request("GET", "/", b"", None)
        assert isinstance(reply, NoReply)
        assert reply.reason.startswith("tls_client_certificate: ") and reply.reason.endswith(why), reply.reason


# dates


def seen(folder: Path, server: Party) -> range:
    """When the certificate of a server that TLS takes is valid."""
    return validity_s(shaken(trusting(folder, ROOT), folder, server))  # type: ignore[arg-type]


def test_the_validity_is_that_of_the_certificate(tmp_path: Path) -> None:
    valid_s = seen(tmp_path, dated(b"20200101000000Z", b"99991231235959Z"))
    assert (valid_s[0], valid_s[-1]) == (1577836800, 253402300799)


@pytest.mark.parametrize(("year", "first_s"), [(b"0001", -62135596800), (b"0999", -30641760000)])
def test_a_certificate_may_be_valid_since_long_ago(year: bytes, first_s: int, tmp_path: Path) -> None:
    assert seen(tmp_path, dated(year + b"0101000000Z", b"20900101000000Z"))[0] == first_s


def test_a_year_that_does_not_exist_makes_a_certificate_no_witness_of_any_time(tmp_path: Path) -> None:
    assert len(seen(tmp_path, dated(b"00000101000000Z", b"20900101000000Z"))) == 0


@pytest.mark.parametrize("name", [b"\xff\xfe.example", b"a\0b", b"", b"\x1b[2J"])
def test_another_name_in_the_certificate_may_be_any_bytes(name: bytes, tmp_path: Path) -> None:
    valid_s = seen(tmp_path, party(PEER, ROOT, [names_beside(name)]))
    assert len(valid_s) in (0, 2 * 86400 + 1)


@pytest.mark.parametrize(
    "server", [dated(b"00000101000000Z", b"20900101000000Z"), party(PEER, ROOT, [names_beside(b"\xff.example")])]
)
def test_a_request_is_answered_whatever_the_certificate_says_beside_the_name(server: Party, tmp_path: Path) -> None:
    ca_file = tmp_path / "ca.pem"
    ca_file.write_text(ROOT.pem)
    dated_answer = answer(b"{}", headers="Date: Fri, 06 Nov 2026 08:49:37 GMT\r\n")
    with Server(answering(dated_answer), serving(tmp_path, server)) as there:
        connection = DpsConnection(f"https://{PEER}", there.address, str(ca_file))
        with contextlib.closing(connection):
            reply = connection.request("GET", "/", b"", None)
    assert isinstance(reply, Reply), reply
    assert (reply.body, reply.date_s) == (b"{}", None)


@settings(max_examples=60, deadline=None)
@given(
    first=st.datetimes(max_value=NOW),
    last=st.datetimes(min_value=NOW),
    forms=st.tuples(*[st.sampled_from([UTC_TIME, GENERALIZED_TIME])] * 2),
)
def test_no_dates_of_a_certificate_do_harm(
    first: datetime.datetime, last: datetime.datetime, forms: tuple[int, int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    written = [moment.strftime("%Y%m%d%H%M%SZ").rjust(15, "0").encode() for moment in (first, last)]
    texts = [text[2:] if form == UTC_TIME else text for form, text in zip(forms, written, strict=True)]
    server = party(PEER, ROOT, FOR_PEER, dates=((forms[0], texts[0]), (forms[1], texts[1])))
    try:
        valid_s = seen(tmp_path_factory.mktemp("dates"), server)
    except ssl.SSLCertVerificationError:
        return
    assert len(valid_s) == 0 or valid_s[0] <= valid_s[-1]
