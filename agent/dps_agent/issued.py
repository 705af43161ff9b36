"""Certificates that DPS issues for a device: found in its answers, kept in a record, and found there again.

A chain is the device's own certificate and behind it those of the CAs that lead upwards, each issued by the next, in
DER one behind the other; its name is its SHA-256 in hex. The record `certificate` holds chains, each behind its length
in four bytes: the one that the record `identity` names, and while that is to change the next one as well. So an
identity always finds its own, whatever was cut in between. What no hub would take is refused before it replaces what
one takes: another device's certificate, one that has ended or not begun, and one that the issuer which came with it has
not signed.
"""

from dps_agent.assignment import decode
from dps_agent.der import certificates, validity
from dps_agent.effects import FindIssuers, LoadRecord, ReadRequest, UtcNow
from dps_agent.utc import AGREEMENT_S, date_text
from dps_hal.contracts import CERTIFICATE, IDENTITY
from dps_hal.der import INTEGER, OBJECT_IDENTIFIER, SEQUENCE, element, field_of
from dps_hal.errors import IdentityStale, RetryLater
from dps_hal.platform import from_base64, sha256

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Generator
    from typing import Any

    from dps_agent.assignment import Assignment
    from dps_agent.effects import Effect, Records
    from dps_hal.contracts import StoredRecord, Utc

CHAIN_LIMIT = 9216  # bytes; three of RSA-4096 have some 6,000. Two of them fit into the record
LINKS_LIMIT = 8  # certificates of one chain, and of one answer
_LENGTH_BYTES = 4
_COMMON_NAME = b"\x55\x04\x03"  # 2.5.4.3


def name_of(chain: bytes) -> str:
    """What an identity calls a chain."""
    return sha256(chain).hex()


def chains_in(payload: bytes) -> "list[bytes]":
    """The chains in the record `certificate`; ValueError."""
    found = []
    at = 0
    while at < len(payload):
        start = at + _LENGTH_BYTES
        at = start + int.from_bytes(payload[at:start], "big")
        if at > len(payload):
            raise ValueError("a chain is cut off")
        found.append(payload[start:at])
    return found


def joined(chains: "list[bytes]") -> bytes:
    """The payload of the record with these chains."""
    return b"".join([len(chain).to_bytes(_LENGTH_BYTES, "big") + chain for chain in chains])


def public_key_of(request: bytes) -> bytes:
    """The subjectPublicKeyInfo in a request (PKCS #10, RFC 2986, 4), without its head; ValueError."""
    return _requested(request)[1]


def chain_for(issued: "Any", request: bytes) -> "Generator[Effect, Any, bytes]":
    """The chain for the key of `request` in `issued`, base64 of DER in any order; ValueError says what is wrong.

    Of several for this key it is the one that ends last. Its dates are judged by a clock that is believed, its
    signature and those above it by the issuers that came with it. What does not lead from it upwards is left out, and
    so is the root, which whoever takes the chain has.
    """
    found = _listed(issued)
    subject, own = _requested(request)
    leaf, begins_s, ends_s = -1, 0, 0
    for at, certificate in enumerate(found):
        if _field(certificate, "subjectPublicKeyInfo") != own:
            continue
        first_s, last_s = validity(certificate)
        if leaf < 0 or last_s > ends_s:
            leaf, begins_s, ends_s = at, first_s, last_s
    if leaf < 0:
        raise ValueError(f"none of the {len(found)} certificates is for the key of this device")
    name = _common_name(subject)
    if _common_name(_field(found[leaf], "subject")).lower() != name.lower():
        raise ValueError(f"expected the CN {name.decode()!r}, and the device's certificate has another")
    now: Utc = yield UtcNow()
    if now.believable:
        if ends_s < now.now_s:
            raise ValueError(f"the device's certificate has ended, on {date_text(ends_s)}")
        if begins_s > now.now_s + AGREEMENT_S:
            raise ValueError(f"the device's certificate is not valid before {date_text(begins_s)}")
    issuers: tuple[int, ...] = yield FindIssuers(tuple(found))
    chain = b"".join([found[at] for at in _upwards(found, issuers, leaf)])
    if len(chain) > CHAIN_LIMIT:
        raise ValueError(f"expected at most {CHAIN_LIMIT} bytes of certificates, got {len(chain)}")
    return chain


def records_with(chain: bytes) -> "Generator[Effect, Any, Records]":
    """What is to be stored so that an identity may name this chain, while the one that is stored finds its own."""
    stored: StoredRecord | None = yield LoadRecord(IDENTITY)
    try:
        named = decode(stored.payload)[0].chain if stored is not None else ""
    except IdentityStale:
        named = ""
    known = yield from _kept()
    chains = [each for each in known if named == name_of(each) != name_of(chain)]
    chains.append(chain)
    return ((CERTIFICATE, joined(chains)),)


def chain_of(assignment: "Assignment") -> "Generator[Effect, Any, bytes]":
    """The chain that an assignment names; IdentityStale `record.damaged` where it is not there, or its key is not."""
    known = yield from _kept()
    for chain in known:
        if name_of(chain) == assignment.chain:
            request: bytes = yield ReadRequest("")
            try:
                if request and _field(chain, "subjectPublicKeyInfo") == public_key_of(request):
                    return chain
            except ValueError:
                raise IdentityStale("record.damaged", "the certificate that DPS issued cannot be read")
            text = "the certificate that DPS issued is for another key than this device's"
            raise IdentityStale("record.damaged", text)
    raise IdentityStale("record.damaged", "the certificate that belongs to the stored assignment is not there")


def difference_of_chain(assignment: "Assignment") -> "Generator[Effect, Any, str]":
    """Why the certificate of an assignment is of no use to this device, or ""."""
    try:
        chain = yield from chain_of(assignment)
        now: Utc = yield UtcNow()
        ends_s = validity(chain)[1]
        if now.believable and ends_s < now.now_s:
            return f"the certificate that DPS issued has ended, on {date_text(ends_s)}"
    except IdentityStale as error:
        return error.message
    except ValueError:
        return "the certificate that DPS issued cannot be read"
    return ""


def chain_taken(issued: "Any", request: bytes) -> "Generator[Effect, Any, bytes]":
    """`chain_for`; RetryLater `dps.chain_unsuitable`."""
    try:
        chain = yield from chain_for(issued, request)
    except ValueError as error:
        raise RetryLater("dps.chain_unsuitable", f"the certificates that were issued are refused: {error}")
    return chain


def _listed(issued: "Any") -> "list[bytes]":
    """The certificates in an answer, each once; ValueError."""
    if not isinstance(issued, list) or len(issued) > LINKS_LIMIT:
        raise ValueError(f"expected a list of at most {LINKS_LIMIT} certificates")
    found: list[bytes] = []
    for text in issued:
        if text is None:
            continue
        if not isinstance(text, str):
            raise ValueError("expected certificates in base64")
        found += [each for each in certificates(from_base64(text)) if each not in found]
    return found


def _upwards(found: "list[bytes]", issuers: "tuple[int, ...]", leaf: int) -> "list[int]":
    """The places of a certificate and of those above it, without the root; ValueError for a signature that is false.

    Of one whose issuer did not come along nobody here can tell.
    """
    chain = [leaf]
    while True:
        above = issuers[chain[-1]]
        issuer = _field(found[chain[-1]], "issuer")
        if above < 0:
            named = [each for each in found if _field(each, "subject") == issuer]
            if named:
                raise ValueError("a certificate is not signed by the one that came as its issuer's")
            return chain
        if above in chain or _field(found[above], "issuer") == _field(found[above], "subject"):  # that is the root
            return chain
        chain.append(above)


def _kept() -> "Generator[Effect, Any, list[bytes]]":
    stored: StoredRecord | None = yield LoadRecord(CERTIFICATE)
    try:
        return chains_in(stored.payload) if stored is not None else []
    except ValueError:
        return []


def _field(certificate: bytes, name: str) -> bytes:
    start, end = field_of(certificate, name)
    return certificate[start:end]


def _requested(request: bytes) -> "tuple[bytes, bytes]":
    """Subject and subjectPublicKeyInfo of a request, without their heads; ValueError."""
    start, end = element(request, 0, len(request), SEQUENCE, "certificationRequest")
    at, end = element(request, start, end, SEQUENCE, "certificationRequestInfo")
    found = []
    for what, tag in (("version", INTEGER), ("subject", SEQUENCE), ("subjectPKInfo", SEQUENCE)):
        start, at = element(request, at, end, tag, what)
        found.append(request[start:at])
    return found[1], found[2]


def _elements(der: bytes) -> "list[tuple[int, bytes]]":
    """Tag and content of the elements that lie one behind the other; ValueError."""
    found = []
    at = 0
    while at < len(der):
        tag = der[at]
        start, at = element(der, at, len(der), tag, "element")
        found.append((tag, der[start:at]))
    return found


def _common_name(name: bytes) -> bytes:
    """The CN of a Name (RFC 5280, 4.1.2.4), the last one; empty where it has none."""
    found = b""
    for _, relative in _elements(name):
        for _, attribute in _elements(relative):
            parts = _elements(attribute)
            if len(parts) == 2 and parts[0] == (OBJECT_IDENTIFIER, _COMMON_NAME):
                found = parts[1][1]
    return found
