"""Addresses as people write them: "host", "host:port", "[IPv6]:port".

What nearly all of them look like is read without `urllib` and the IDNA codec, which cost more than all else here.
"""

from dps_text import whole_number


def host_and_port(text: str) -> tuple[str, int | None]:
    """Both parts of an address, the port None where there is none; ValueError where it is no address."""
    found = plain_address(text)
    if found is not None:
        return found
    import urllib.parse

    parts = urllib.parse.urlsplit(f"//{text}")  # ValueError: brackets that do not pair, a port out of range
    host, port = parts.hostname or "", parts.port
    host.encode("idna")  # as getaddrinfo and TLS do: ValueError for a label that is empty or too long
    plain = text.isascii() and text.isprintable() and not set("@ ") & set(text)
    if not host or not plain or parts.netloc != text or port == 0:
        raise ValueError(f"expected host or host:port; came {text!r}")
    return host, port


def plain_address(text: str) -> tuple[str, int | None] | None:
    """The same for a name of letters, digits, dashes and dots, or IPv4; None where more must be looked at."""
    host, colon, digits = text.partition(":")
    if not is_plain_host(host):
        return None
    if not colon:
        return host.lower(), None
    port = whole_number(digits, 1, 65535)
    return (host.lower(), port) if port else None


def is_plain_host(host: str) -> bool:
    """Whether the IDNA codec, or a parser of URLs, would leave a name as it is, but for its case."""
    return host.isascii() and all(len(each) < 64 and each.replace("-", "").isalnum() for each in host.split("."))


def address_text(host: str, port: int) -> str:
    """ "host:port", an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
