"""Which HTTP proxy leads to a peer, and the way through it.

Sources: RFC 9110, 9.3.6 (CONNECT) and 11.7 (proxy authentication). `https_proxy` and `no_proxy` have no standard; read
here is what curl, Go and Python have in common: the lower-case name counts first, a name in `no_proxy` also means what
lies below it, and peers on this machine are never reached through the environment's proxy.
"""

from __future__ import annotations

import os

from dps_agent.effects import (
    NO_REPLY_CLOSED,
    NO_REPLY_CONNECT,
    NO_REPLY_PROTOCOL,
    NO_REPLY_PROXY,
    NO_REPLY_PROXY_SCHEME,
    Failed,
)
from dps_agent.host.network.heads import read_head, seconds_until
from dps_hal.errors import AskOperator
from dps_text.addresses import address_text

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Mapping

ENVIRONMENT = "env"
NONE = "none"
_DEFAULT_PORT = 80
_CREDENTIALS_WANTED = 407
_CHALLENGES = "proxy-authenticate"
_SCHEMES = {name.lower(): name for name in ("Basic", "Digest", "NTLM", "Negotiate", "Kerberos", "Bearer")}  # as written


class Proxy:
    """One HTTP proxy, from "http://[user:password@]host[:port]"; `source` names where that stands.

    AskOperator `config.invalid` for anything else. Neither repr nor error has user or password.
    """

    def __init__(self, url: str, source: str) -> None:
        import base64
        import urllib.parse

        wanted = AskOperator("config.invalid", f'{source}: expected "http://[user:password@]host:port"')
        try:
            parts = urllib.parse.urlsplit(url)
            self.host, self.port = parts.hostname or "", parts.port or _DEFAULT_PORT
            self.host.encode("idna")  # ValueError for a label that is too long
            valid = parts.scheme == "http" and bool(self.host) and url.isascii() and url.isprintable()
        except ValueError:  # a port that is no number, brackets that do not pair, a label that is too long
            raise wanted from None
        if not valid:
            raise wanted
        self._authorization = ""
        if parts.username is not None:
            credentials = [urllib.parse.unquote(part or "") for part in (parts.username, parts.password)]
            self._authorization = "Basic " + base64.b64encode(":".join(credentials).encode()).decode()

    def __repr__(self) -> str:
        return address_text(self.host, self.port)

    def open_tunnel(
        self, connection: socket.socket, host: str, port: int, deadline_s: float, with_credentials: bool = False
    ) -> bool:
        """Makes `connection`, which leads to the proxy, one that leads to `host`; raises Failed and OSError.

        False where the proxy wants user and password as Basic, and there are some, for another connection to it:
        nobody is sent them who did not ask for them in this way.
        """
        target, here = address_text(host, port), f"the proxy {self}"
        lines = [f"CONNECT {target} HTTP/1.1", f"Host: {target}"]
        if with_credentials:
            lines.append(f"Proxy-Authorization: {self._authorization}")
        connection.settimeout(seconds_until(deadline_s))
        connection.sendall("\r\n".join([*lines, "", ""]).encode())
        try:
            status, headers, rest = read_head(
                connection, (_CHALLENGES,), deadline_s
            )  # a body of a refusal nobody needs
        except Failed as failed:
            if failed.reason == NO_REPLY_CLOSED:
                raise ConnectionError from None
            raise Failed(NO_REPLY_PROTOCOL, f"{here} does not answer as HTTP: {failed}") from None
        if status == _CREDENTIALS_WANTED:
            offered = schemes_of(headers.get(_CHALLENGES, ""))
            if "Basic" in offered and self._authorization and not with_credentials:
                return False
            raise self._refusal(offered, with_credentials)
        if not 200 <= status < 300:
            raise Failed(NO_REPLY_CONNECT, f"{here} answered {status} to CONNECT {target}")
        if rest:  # in TLS the client speaks first
            raise Failed(NO_REPLY_PROTOCOL, f"{here} sent more than its answer to CONNECT")
        return True

    def _refusal(self, offered: list[str], sent: bool) -> Failed:
        """What a 407 means that offers those schemes, to a request with user and password or without."""
        if "Basic" in offered:
            wants = "refuses the user and password" if sent else "wants a user and a password"
            return Failed(NO_REPLY_PROXY, f"the proxy {self} {wants} (407)")
        kinds = " or ".join(offered) or "credentials, and does not say of which kind"
        return Failed(NO_REPLY_PROXY_SCHEME, f"the proxy {self} wants {kinds} (407); this agent has Basic only")


class ProxyRule:
    """The setting `network.proxy`: "env", "none", or one proxy for everything. Raises as Proxy does."""

    def __init__(self, setting: str, environ: Mapping[str, str] | None = None) -> None:
        environ = os.environ if environ is None else environ
        self._proxy: Proxy | None = None
        self._exceptions: list[str] | None = None  # None: there are none, not even this machine
        if setting == ENVIRONMENT:
            name = next((name for name in ("https_proxy", "HTTPS_PROXY") if environ.get(name)), "")
            if name:
                url = environ[name]
                self._proxy = Proxy(url if "://" in url else f"http://{url}", f"environment {name}")
            listed = environ.get("no_proxy") or environ.get("NO_PROXY") or ""
            self._exceptions = [entry for entry in listed.lower().replace(",", " ").split() if entry]
        elif setting != NONE:
            self._proxy = Proxy(setting, "network.proxy")

    def proxy_for(self, host: str, port: int) -> Proxy | None:
        """The proxy that leads to `host`, None for the direct way."""
        if self._proxy is None or self._exceptions is None:
            return self._proxy
        host = host.lower().rstrip(".")
        if host in ("localhost", "::1") or host.startswith("127."):
            return None
        return None if any(_is_meant(host, port, entry) for entry in self._exceptions) else self._proxy


def schemes_of(challenges: str) -> list[str]:
    """The schemes in Proxy-Authenticate, each once, in its order: challenges and their parameters share the commas.

    A scheme nobody has heard of is "another scheme": a name of the proxy's choice is not repeated.
    """
    found: list[str] = []
    parts = challenges.split('"')
    for element in "".join(parts[::2]).split(","):  # without quoted values, in which there may be commas
        scheme, _, rest = element.strip().partition(" ")
        if scheme and "=" not in scheme and not rest.lstrip().startswith("="):
            name = _SCHEMES.get(scheme.lower(), "another scheme")
            if name not in found:
                found.append(name)
    return found


def _is_meant(host: str, port: int, entry: str) -> bool:
    """Whether an entry of `no_proxy` speaks of this peer: a name, an address or a network, each perhaps with a port."""
    if entry == "*":
        return True
    name, colon, entry_port = entry.rpartition(":")
    if colon and entry_port.isdecimal() and (":" not in name or name.endswith("]")):
        if int(entry_port) != port:
            return False
        entry = name
    entry = entry.strip("[]")
    if "/" in entry:
        import ipaddress  # networks are rare, and so are peers that are addresses

        try:
            return ipaddress.ip_address(host) in ipaddress.ip_network(entry, strict=False)
        except ValueError:
            return False
    domain = entry.removeprefix("*").strip(".")
    return bool(domain) and (host == domain or host.endswith("." + domain))
