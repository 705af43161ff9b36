"""Addresses as people write them: "host", "host:port", "[IPv6]:port"."""

import urllib.parse


def host_and_port(text: str) -> tuple[str, int | None]:
    """Both parts of an address, the port None where there is none; ValueError where it is no address."""
    parts = urllib.parse.urlsplit(f"//{text}")  # ValueError: brackets that do not pair, a port out of range
    host, port = parts.hostname or "", parts.port
    host.encode("idna")  # as getaddrinfo and TLS do: ValueError for a label that is empty or too long
    plain = text.isascii() and text.isprintable() and not set("@ ") & set(text)
    if not host or not plain or parts.netloc != text or port == 0:
        raise ValueError(f"expected host or host:port; came {text!r}")
    return host, port


def address_text(host: str, port: int) -> str:
    """ "host:port", an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
