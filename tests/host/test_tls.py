"""TLS as the agent decides it: whom it trusts, on whichever Python, and whatever dates a certificate has."""

from __future__ import annotations

import ast
import contextlib
import datetime
import ssl
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dps_agent.effects import Reply
from dps_agent.host import dial
from dps_agent.host.dial import Dialler, tls_context, validity_s
from dps_agent.host.https import DpsConnection
from dps_agent.host.proxy import ProxyRule
from support.chains import (
    CHAINS,
    FOR_PEER,
    GENERALIZED_TIME,
    INTERMEDIATE,
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
)
from support.servers import Server, answer, answering

NOW = datetime.datetime(2026, 11, 29)
AGENT = Path(dial.__file__).parents[1]


def trusting(folder: Path, *anchors: Party) -> ssl.SSLContext:
    """The context of a connection for which `anchors` are in ca_file."""
    file = folder / "ca.pem"
    file.write_text("".join(anchor.pem for anchor in anchors))
    return Dialler(ProxyRule("none"), str(file))._verifying_context()


# what is decided, whatever Python decides by default


def test_flags_version_and_names_are_the_agent_s_own_on_every_python(tmp_path: Path) -> None:
    for context in (tls_context(), trusting(tmp_path, ROOT), Dialler(ProxyRule("none"), "")._verifying_context()):
        assert int(context.verify_flags) == 0x8000 | 0x80000  # trusted first, partial chain; not strict (0x20)
        assert context.verify_mode == ssl.CERT_REQUIRED and context.check_hostname
        assert context.minimum_version == ssl.TLSVersion.TLSv1_2
        assert context.maximum_version == ssl.TLSVersion.MAXIMUM_SUPPORTED
        assert ssl.OP_NO_RENEGOTIATION in context.options and ssl.OP_NO_COMPRESSION in context.options
        assert not int(context.options) & (0x4 | 0x80 | 0x40000)  # legacy servers, unexpected ends, old renegotiation
        assert context.security_level >= 1
        assert {suite["protocol"] for suite in context.get_ciphers()} <= {"TLSv1.3", "TLSv1.2", "TLSv1.0"}
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
    assert makers == ["dial.py: SSLContext"]


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


# dates


def seen(folder: Path, server: Party) -> range:
    """When the certificate of a server that TLS takes is valid."""
    return validity_s(shaken(trusting(folder, ROOT), folder, server))  # type: ignore[arg-type]


def test_the_validity_is_that_of_the_certificate(tmp_path: Path) -> None:
    valid_s = seen(tmp_path, dated(b"20200101000000Z", b"99991231235959Z"))
    assert (valid_s[0], valid_s[-1]) == (1577836800, 253402300799)


@pytest.mark.parametrize("year", [b"0000", b"0001", b"0999"])
def test_a_year_that_python_cannot_read_makes_a_certificate_no_witness_of_any_time(year: bytes, tmp_path: Path) -> None:
    assert len(seen(tmp_path, dated(year + b"0101000000Z", b"20900101000000Z"))) == 0


@pytest.mark.parametrize("name", [b"\xff\xfe.example", b"a\0b", b"", b"\x1b[2J"])
def test_another_name_in_the_certificate_may_be_any_bytes(name: bytes, tmp_path: Path) -> None:
    valid_s = seen(tmp_path, party(PEER, ROOT, [names_beside(name)]))
    assert len(valid_s) in (0, 2 * 86400 + 1)


@pytest.mark.parametrize(
    "server", [dated(b"00010101000000Z", b"20900101000000Z"), party(PEER, ROOT, [names_beside(b"\xff.example")])]
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
