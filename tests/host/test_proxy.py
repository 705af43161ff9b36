"""The HTTP proxy: which peers it is for, what it is told, and what nobody else is told."""

from __future__ import annotations

import contextlib
import logging
import socket
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dps_agent.effects import NoReply, Reply
from dps_agent.host.network.https import DpsConnection
from dps_agent.host.network.proxy import Proxy, ProxyRule, schemes_of
from dps_agent.host.settings_table import without_password
from dps_hal.errors import AskOperator
from support.cloud.servers import ENDPOINT_NAME, LOOPBACK, Certificates, Peer, Server, answer, answering, proxying

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

HUB = "factory-07.azure-devices.net"
SECRET = "hunter2"


def found(setting: str, environ: dict[str, str], host: str = HUB, port: int = 8883) -> str:
    """The proxy for `host` as "host:port", "" for none."""
    return repr(ProxyRule(setting, environ).proxy_for(host, port) or "").strip("'")


# which peers it is for


def test_env_takes_the_lower_case_name_first() -> None:
    both = {"https_proxy": "http://small:3128", "HTTPS_PROXY": "http://large:3128"}
    assert found("env", both) == "small:3128"
    assert found("env", {"HTTPS_PROXY": "http://large"}) == "large:80"
    assert found("env", {"https_proxy": "bare:3128"}) == "bare:3128"
    assert found("env", {"http_proxy": "http://other:1", "https_proxy": ""}) == ""


def test_none_and_a_setting_of_its_own_do_not_look_at_the_environment() -> None:
    environ = {"https_proxy": "http://env:3128", "no_proxy": "*"}
    assert found("none", environ) == ""
    assert found("http://own:3128", environ) == "own:3128"
    assert found("http://own:3128", environ, LOOPBACK) == "own:3128", "what was set on purpose is for every peer"


@pytest.mark.parametrize(
    ("no_proxy", "direct"),
    [
        ("", False),
        ("*", True),
        (HUB, True),
        (HUB.upper(), True),
        ("azure-devices.net", True),
        (".azure-devices.net", True),
        ("*.azure-devices.net", True),
        ("devices.net", False),
        ("other.example, azure-devices.net", True),
        ("other.example azure-devices.net", True),
        ("azure-devices.net:8883", True),
        ("azure-devices.net:443", False),
        ("net.", True),
        (".", False),
        ("10.0.0.0/8", False),
    ],
)
def test_no_proxy_names_peers_and_what_lies_below_them(no_proxy: str, direct: bool) -> None:
    environ = {"https_proxy": "http://proxy:3128", "no_proxy": no_proxy}
    assert found("env", environ) == ("" if direct else "proxy:3128")
    assert found("env", {"https_proxy": "http://proxy:3128", "NO_PROXY": no_proxy}) == found("env", environ)


@pytest.mark.parametrize(
    ("host", "no_proxy", "direct"),
    [
        ("10.1.2.3", "10.0.0.0/8", True),
        ("11.1.2.3", "10.0.0.0/8", False),
        ("10.1.2.3", "10.1.2.3:8883", True),
        ("2001:db8::1", "2001:db8::/32", True),
        ("2001:db8::1", "[2001:db8::1]:8883", True),
        ("2001:db8::1", "[2001:db8::1]:443", False),
        ("2001:db8::1", "2001:db8::1", True),
        ("10.1.2.3", "10.0.0.0/99", False),
        ("localhost", "", True),
        ("127.0.0.1", "", True),
        ("127.8.8.8", "", True),
        ("::1", "", True),
    ],
)
def test_addresses_networks_and_this_machine(host: str, no_proxy: str, direct: bool) -> None:
    environ = {"https_proxy": "http://proxy:3128", "no_proxy": no_proxy}
    assert found("env", environ, host) == ("" if direct else "proxy:3128")


@pytest.mark.parametrize(
    "url",
    [
        "https://proxy:3128",
        "socks5://proxy:1080",
        "http://",
        "http://:3128",
        "http://proxy:99999",
        "http://proxy:port",
        "http://[::1",
        f"http://{'a' * 64}.example",
        "http://prüxy",
        f"ftp://user:{SECRET}@proxy",
    ],
)
def test_a_url_that_is_no_http_proxy_is_the_operator_s(url: str) -> None:
    for setting, environ, source in ((url, {}, "network.proxy"), ("env", {"https_proxy": url}, "https_proxy")):
        with pytest.raises(AskOperator, match=source) as caught:
            ProxyRule(setting, environ)
        assert caught.value.code == "config.invalid"
        assert SECRET not in repr(caught.value)


def test_neither_user_nor_password_is_shown() -> None:
    proxy = Proxy(f"http://user:{SECRET}@proxy:3128", "x")
    assert repr(proxy) == str(proxy) == "proxy:3128"
    assert repr(Proxy("http://[2001:db8::1]:3128", "x")) == "[2001:db8::1]:3128"
    assert SECRET not in without_password(f"http://user:{SECRET}@proxy:3128")


# HTTPS through it


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture
def dps(certificates: Certificates) -> Iterator[Server]:
    with Server(answering(answer(b"{}")), certificates.good()) as server:
        yield server


def asked_through(
    behave: Callable[[Peer], None], dps: Server, certificates: Certificates, user: str = "", **options: float
) -> tuple[Server, Reply | NoReply]:
    """A request through a proxy of that behaviour."""
    with Server(behave, None) as proxy:
        url = f"http://{user}{proxy.address}"
        connection = DpsConnection(
            f"https://{ENDPOINT_NAME}",
            dps.address,
            certificates.ca_file,
            proxy=url,
            **options,  # type: ignore[arg-type]
        )
        with contextlib.closing(connection):
            return proxy, connection.request("GET", "/", b"", None)


@pytest.mark.parametrize(
    "says",
    [
        b"HTTP/1.0 200 Connection established\n\n",
        b"HTTP/1.1 200\nVia: x\n\n",
        b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.1 200 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
    ],
    ids=["bare lf", "mixed", "an interim answer first", "with a framing, which means nothing here"],
)
def test_a_way_is_open_however_the_proxy_says_so(dps: Server, certificates: Certificates, says: bytes) -> None:
    def behave(peer: Peer) -> None:
        target = peer.request().decode().split(" ")[1]
        host, _, port = target.rpartition(":")
        with socket.create_connection((host, int(port))) as onward:
            peer.send(says)
            peer.pump(onward)

    _, outcome = asked_through(behave, dps, certificates)
    assert isinstance(outcome, Reply), outcome


def test_interim_answers_of_a_proxy_have_an_end(dps: Server, certificates: Certificates) -> None:
    def behave(peer: Peer) -> None:
        peer.request()
        while True:
            peer.send(b"HTTP/1.1 100 Continue\r\n\r\n" * 300)

    _, outcome = asked_through(behave, dps, certificates, timeout_s=600.0)
    assert isinstance(outcome, NoReply) and outcome.reason.startswith("protocol: the proxy"), outcome


@pytest.mark.parametrize("user", ["", "me:", "me:p%20w%2F%40%3A@"])
def test_a_request_goes_through_the_proxy_and_the_certificate_is_the_endpoint_s(
    dps: Server, certificates: Certificates, user: str
) -> None:
    user = user.removesuffix(":") + ("@" if user == "me:" else "")
    wanted = {"": "", "me@": "me:"}.get(user, "me:p w/@:")
    proxy, outcome = asked_through(proxying(wanted), dps, certificates, user)
    assert isinstance(outcome, Reply), outcome
    assert proxy.requests[0].startswith(f"CONNECT {dps.address} HTTP/1.1\r\nHost: {dps.address}\r\n".encode())
    assert b"GET" not in b"".join(proxy.requests), "the proxy sees no request"
    assert len(dps.requests) == 1


def test_the_name_is_left_to_the_proxy(certificates: Certificates) -> None:
    def behave(peer: Peer) -> None:
        peer.request()
        peer.send(answer(b"", "502 Bad Gateway"))

    with Server(behave, None) as proxy:
        connection = DpsConnection(
            "https://nowhere.invalid", ca_file=certificates.ca_file, proxy=f"http://{proxy.address}"
        )
        outcome = connection.request("GET", "/", b"", None)
        assert proxy.requests[0].startswith(b"CONNECT nowhere.invalid:443 ")
    assert outcome == NoReply(f"connect: the proxy {proxy.address} answered 502 to CONNECT nowhere.invalid:443", False)


def cutting(peer: Peer) -> None:
    peer.request()
    peer.cut()


def saying(head: bytes) -> Callable[[Peer], None]:
    def behave(peer: Peer) -> None:
        peer.request()
        peer.send(head)
        peer.wait_until_gone()

    return behave


@pytest.mark.parametrize(
    ("behave", "reason"),
    [
        (proxying("user:secret"), "proxy"),
        (saying(answer(b"", "403 Forbidden")), "connect"),
        (saying(b"HTTP/1.1 504 Gateway Timeout\r\n\r\n"), "connect"),
        (saying(b"HTTP/1.1 200 OK\r\n\r\nbeforehand"), "protocol"),
        (cutting, "connect"),
        (saying(b"SSH-2.0-OpenSSH_9.2\r\n"), "protocol"),
        (saying(b"HTTP/1.1 200 OK\r\nX: " + b"x" * 30_000), "protocol"),
        (saying(b"HTTP/1.1 200 OK\r\n"), "connect"),
        (saying(b""), "connect"),
    ],
)
def test_a_proxy_that_does_not_open_the_way_has_its_reason(
    dps: Server, certificates: Certificates, behave: Callable[[Peer], None], reason: str
) -> None:
    _, outcome = asked_through(behave, dps, certificates, f"user:{SECRET}@", timeout_s=0.5)
    assert isinstance(outcome, NoReply)
    assert (outcome.reason.split(": ")[0], outcome.request_sent) == (reason, False), outcome
    assert "the proxy 127.0.0.1:" in outcome.reason
    assert SECRET not in outcome.reason
    assert dps.connections == 0


def challenging(*challenges: str) -> Callable[[Peer], None]:
    """A proxy that answers every CONNECT with 407 and these lines of Proxy-Authenticate."""
    lines = "".join(f"Proxy-Authenticate: {challenge}\r\n" for challenge in challenges)

    def behave(peer: Peer) -> None:
        peer.request()
        peer.send(answer(b"no", "407 authenticationrequired", lines))

    return behave


@pytest.mark.parametrize(
    ("challenges", "reason", "says"),
    [
        (["Negotiate", "NTLM"], "proxy_scheme", "wants Negotiate or NTLM (407); this agent has Basic only"),
        (["negotiate, ntlm"], "proxy_scheme", "wants Negotiate or NTLM"),
        (["NTLM TlRMTVNTUAAC=="], "proxy_scheme", "wants NTLM"),
        (['Digest realm="a, Basic b", qop="auth", nonce=x'], "proxy_scheme", "wants Digest"),
        (['Bearer realm = "x" , error = "y"'], "proxy_scheme", "wants Bearer"),
        (["Evil\x1b[2J realm=x"], "proxy_scheme", "wants another scheme"),
        ([], "proxy_scheme", "does not say of which kind"),
        (['basic realm="x"'], "proxy", "refuses the user and password"),
        (["Negotiate", 'NTLM, Basic realm="x", charset="UTF-8"'], "proxy", "refuses the user and password"),
    ],
)
def test_only_a_proxy_that_offers_basic_is_sent_the_password(
    challenges: list[str], reason: str, says: str, dps: Server, certificates: Certificates
) -> None:
    proxy, outcome = asked_through(challenging(*challenges), dps, certificates, f"user:{SECRET}@")
    assert isinstance(outcome, NoReply)
    assert outcome.reason.startswith(f"{reason}: ") and says in outcome.reason, outcome
    with_credentials = [b"Proxy-Authorization: Basic " in request for request in proxy.requests]
    assert with_credentials == ([False, True] if reason == "proxy" else [False])


def test_a_proxy_that_wants_no_password_is_sent_none(dps: Server, certificates: Certificates) -> None:
    proxy, outcome = asked_through(proxying(), dps, certificates, f"user:{SECRET}@")
    assert isinstance(outcome, Reply) and proxy.connections == 1
    assert b"authorization" not in b"".join(proxy.requests).lower()


def test_without_a_password_the_proxy_is_asked_once(dps: Server, certificates: Certificates) -> None:
    proxy, outcome = asked_through(challenging('Basic realm="x"'), dps, certificates)
    assert isinstance(outcome, NoReply)
    assert outcome.reason.startswith("proxy: ") and "wants a user and a password (407)" in outcome.reason
    assert proxy.connections == 1


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=80))
def test_no_challenge_does_harm_and_no_word_of_the_proxy_s_is_repeated(challenges: str) -> None:
    known = {"Basic", "Digest", "NTLM", "Negotiate", "Kerberos", "Bearer", "another scheme"}
    assert set(schemes_of(challenges)) <= known


def test_a_proxy_that_is_not_there_is_named(dps: Server, certificates: Certificates) -> None:
    connection = DpsConnection(
        f"https://{ENDPOINT_NAME}", dps.address, certificates.ca_file, proxy="http://nowhere.invalid:3128"
    )
    outcome = connection.request("GET", "/", b"", None)
    assert isinstance(outcome, NoReply)
    assert outcome.reason.startswith("connect: the proxy 'nowhere.invalid'"), "no word about the endpoint's own name"


def test_no_password_is_logged(
    dps: Server, certificates: Certificates, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    asked_through(proxying("user:other"), dps, certificates, f"user:{SECRET}@")
    asked_through(proxying(f"user:{SECRET}"), dps, certificates, f"user:{SECRET}@")
    out, err = capfd.readouterr()
    assert SECRET not in caplog.text + out + err


def test_a_certificate_is_judged_behind_a_proxy_too(certificates: Certificates, tmp_path: Path) -> None:
    with Server(answering(answer(b"{}")), certificates.of_another_name()) as wrong:
        _, outcome = asked_through(proxying(), wrong, certificates)
        assert isinstance(outcome, NoReply)
        assert outcome.reason.startswith("tls: Hostname mismatch")
        assert wrong.requests == []
