"""Certificates that DPS issues for a device: found in its answers, kept in a record, and found there again.

A chain is the device's own certificate and behind it those of the CAs that lead upwards, each issued by the next, in
DER one behind the other; its name is its SHA-256 in hex. The record `certificate` holds chains, each behind its length
in four bytes: the one that the record `identity` names, and while that is to change the next one as well. So an
identity always finds its own, whatever was cut in between. Nothing is verified here but whose key a certificate is for:
whoever takes a certificate looks at the rest.
"""

from dps_agent.assignment import decode
from dps_agent.der import certificates
from dps_agent.effects import LoadRecord, ReadRequest
from dps_hal.contracts import CERTIFICATE, IDENTITY
from dps_hal.der import INTEGER, SEQUENCE, element, field_of
from dps_hal.errors import IdentityStale, RetryLater
from dps_hal.platform import from_base64, sha256

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Generator
    from typing import Any

    from dps_agent.assignment import Assignment
    from dps_agent.effects import Effect, Records
    from dps_hal.contracts import StoredRecord

CHAIN_LIMIT = 9216  # bytes; three of RSA-4096 have some 6,000. Two of them fit into the record
LINKS_LIMIT = 8  # certificates of one chain, and of one answer
_LENGTH_BYTES = 4


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
    start, end = element(request, 0, len(request), SEQUENCE, "certificationRequest")
    at, end = element(request, start, end, SEQUENCE, "certificationRequestInfo")
    start = at
    for what, tag in (("version", INTEGER), ("subject", SEQUENCE), ("subjectPKInfo", SEQUENCE)):
        start, at = element(request, at, end, tag, what)
    return request[start:at]


def chain_for(issued: "Any", request: bytes) -> bytes:
    """The chain for the key of `request` in `issued`, base64 of DER in any order; ValueError says what is wrong.

    What does not lead from it upwards is left out, and so is the root, which whoever takes the chain has.
    """
    if not isinstance(issued, list) or len(issued) > LINKS_LIMIT:
        raise ValueError(f"expected a list of at most {LINKS_LIMIT} certificates")
    rest = []
    for text in issued:
        if text is None:
            continue
        if not isinstance(text, str):
            raise ValueError("expected certificates in base64")
        rest += certificates(from_base64(text))
    own = public_key_of(request)
    chain = [certificate for certificate in rest if _field(certificate, "subjectPublicKeyInfo") == own][:1]
    if not chain:
        raise ValueError(f"none of the {len(rest)} certificates is for the key of this device")
    while len(chain) < LINKS_LIMIT:
        issuer = _field(chain[-1], "issuer")
        above = [each for each in rest if _field(each, "subject") == issuer and each not in chain]
        if not above or _field(above[0], "issuer") == issuer:  # that is the root
            break
        chain.append(above[0])
    found = b"".join(chain)
    if len(found) > CHAIN_LIMIT:
        raise ValueError(f"expected at most {CHAIN_LIMIT} bytes of certificates, got {len(found)}")
    return found


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
    """The chain that an assignment names; IdentityStale `record.damaged` where it is not there."""
    known = yield from _kept()
    for chain in known:
        if name_of(chain) == assignment.chain:
            return chain
    raise IdentityStale("record.damaged", "the certificate that belongs to the stored assignment is not there")


def difference_of_chain(assignment: "Assignment") -> "Generator[Effect, Any, str]":
    """Why the certificate of an assignment is not this device's, or ""."""
    try:
        chain = yield from chain_of(assignment)
        request: bytes = yield ReadRequest("")
        if not request or _field(certificates(chain)[0], "subjectPublicKeyInfo") != public_key_of(request):
            return "the certificate that DPS issued is for another key than this device's"
    except IdentityStale as error:
        return error.message
    except (ValueError, IndexError):
        return "the certificate that DPS issued cannot be read"
    return ""


def chain_taken(issued: "Any", request: bytes) -> bytes:
    """`chain_for`; RetryLater `dps.chain_unsuitable`."""
    try:
        return chain_for(issued, request)
    except ValueError as error:
        raise RetryLater("dps.chain_unsuitable", f"the certificates that were issued are refused: {error}")


def _kept() -> "Generator[Effect, Any, list[bytes]]":
    stored: StoredRecord | None = yield LoadRecord(CERTIFICATE)
    try:
        return chains_in(stored.payload) if stored is not None else []
    except ValueError:
        return []


def _field(certificate: bytes, name: str) -> bytes:
    start, end = field_of(certificate, name)
    return certificate[start:end]
