"""What a registration seldom asks of a TPM: what its maker left in NV memory, and its condition."""

import struct

from dps_hal.contracts import TpmCondition
from dps_hal.errors import AskOperator, RetryLater
from dps_hal.tpm.errors import RC_ALTERED, RC_NV_UNINITIALIZED, RefusedError
from dps_hal.tpm.keys import ALG_SHA256, ek_template, makers_template, object_name, rsa_modulus
from dps_hal.tpm.rules import (
    ENDORSEMENT_AUTH_SET,
    OWNER_AUTH_SET,
    PT_LOCKOUT_COUNTER,
    PT_LOCKOUT_INTERVAL,
    PT_PERMANENT,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, Final

    from dps_hal.tpm.commands import Commands, Key

EK_CERTIFICATE_INDEX: "Final" = 0x01C00002  # TCG EK Credential Profile, 2.2.1.4: RSA-2048 EK certificate
EK_NONCE_INDEX: "Final" = 0x01C00003  # this and the next decide how the certified key is made
EK_TEMPLATE_INDEX: "Final" = 0x01C00004
_NV_CHUNK_BYTES = 512  # where the TPM does not say; TPM_PT_NV_BUFFER_MAX of the PC Client profile is no smaller
_LEAST_NV_CHUNK_BYTES = 32  # a TPM that states less would take thousands of commands
_MOST_NV_CHUNK_BYTES = 2048  # a response has 4096 bytes at most

PT_MANUFACTURER: "Final" = 0x105  # TPM_PT, TPM 2.0 Library Part 2, table 24, with the next three
PT_FIRMWARE_VERSION_1: "Final" = 0x10B
PT_NV_BUFFER_MAX: "Final" = 0x12C
PT_HR_TRANSIENT_AVAIL: "Final" = 0x207
_NV_OWNERREAD = 1 << 17  # TPMA_NV, Part 2, table 217, with the next two: the owner's password suffices for reading
_NV_AUTHREAD = 1 << 18  # the index's own password suffices for reading
_NV_NO_DA = 1 << 25  # a wrong password is not counted as a failed guess


def nv_content(commands: "Commands", index: int, session_of: "Callable[[], Any]", owner_auth: bytes) -> "bytes | None":
    """What an NV index holds, None where there is none or nothing was written to it.

    Read by its own empty password, else by the owner's, in `session_of()`, which proves it; where that is None, by
    passwords, which have to be empty. AskOperator `tpm.certificate_locked`.
    """
    try:
        found = commands.nv_read_public(index)
    except RefusedError as refused:
        if refused.unknown_handle:
            return None
        raise refused
    public = found.public  # size, index, hash, attributes, policy, size of what it holds
    by_sha256 = public[6:8] == struct.pack(">H", ALG_SHA256)
    if len(public) < 16 or (by_sha256 and found.name != object_name(public)):
        raise RefusedError("nv_read_public", RC_ALTERED)
    ways = _ways_to_read(index, int.from_bytes(public[8:12], "big"))
    size = int.from_bytes(public[-2:], "big")
    most_bytes = nv_chunk_bytes(commands.properties(PT_NV_BUFFER_MAX, PT_NV_BUFFER_MAX))
    session = session_of()
    content = b""
    by_owner = ways[0]
    while len(content) < size:
        chunk_bytes = min(most_bytes, size - len(content))
        try:
            chunk = commands.nv_read(
                found, chunk_bytes, len(content), by_owner, session, owner_auth if by_owner else b""
            )
        except RefusedError as refused:
            if refused.code == RC_NV_UNINITIALIZED:
                return None
            if refused.wrong_auth and not by_owner:
                if ways[-1]:
                    by_owner = True
                    continue
                raise _nv_locked(index, "it has a password")
            refused.of_owner = by_owner
            raise refused
        if len(chunk) != chunk_bytes:
            raise RefusedError("nv_read", RC_ALTERED)
        content += chunk
    return content


def if_readable(read: "Callable[..., bytes]", *given: "Any") -> bytes:
    """What `read(*given)` finds in NV memory; empty where the TPM keeps it to itself, whatever it says for that.

    `check` names it; without a certified key the device registers as well. What another try, another password or
    another session may change is raised as it came.
    """
    try:
        return read(*given)
    except AskOperator:
        return b""
    except RefusedError as refused:
        from dps_hal.tpm.verdicts import error_of, locked_out

        passing = isinstance(error_of(refused, lambda what: locked_out(what, {})), RetryLater)
        if refused.stale or refused.wrong_password or passing:
            raise refused
        return b""


def make_ek(
    template_name: str, content: "Callable[[int], bytes | None]", create: "Callable[[bytes], Key]", name: bytes
) -> "Key":
    """A missing EK, which `create(template)` makes; `content(index)` reads an NV index, None where there is none.

    `template_name` is the setting. With a `name`, of the EK in a record, it is the key of that name, where L-1 or the
    maker's template gives it. Else the certificate decides: the maker's template makes it only where that gives the key
    that is certified. NV says no more than that, for anybody may define an index, and TPM2_Clear takes what an owner
    has defined.
    """
    settings = ek_template(template_name)
    if template_name != "tcg-l1":
        return create(settings)
    maker = _read_twice(template_in, content)
    if maker in (b"", settings):
        return create(settings)
    certificate = _read_twice(lambda: content(EK_CERTIFICATE_INDEX) or b"")
    if not certificate and not name:
        return create(settings)
    made = []
    for template in (maker, settings) if certificate else (settings, maker):
        key = create(template)
        if name:
            fits = object_name(key.public) == name
        else:
            fits = template == settings or rsa_modulus(key.public) in certificate
        if fits:
            return key
        made.append(key)
    return made[1] if certificate and rsa_modulus(made[0].public) not in certificate else made[0]


def _read_twice(read: "Callable[..., bytes]", *given: "Any") -> bytes:
    """As `if_readable`; what NV says comes without a proof, and the key that is made by it stays."""
    found = if_readable(read, *given)
    if found != if_readable(read, *given):
        raise RefusedError("nv_read", RC_ALTERED)
    return found


def template_in(content: "Callable[[int], bytes | None]") -> bytes:
    """As `TpmService.makers_template`; `content(index)` reads an NV index, None where there is none."""
    template, nonce = content(EK_TEMPLATE_INDEX), content(EK_NONCE_INDEX)
    return makers_template(template or b"", nonce or b"") if template or nonce else b""


def nv_chunk_bytes(properties: "dict[int, int]") -> int:
    """How many bytes of an NV index one command reads."""
    stated = properties.get(PT_NV_BUFFER_MAX) or _NV_CHUNK_BYTES
    return min(max(stated, _LEAST_NV_CHUNK_BYTES), _MOST_NV_CHUNK_BYTES)


def _ways_to_read(index: int, attributes: int) -> "tuple[bool, ...]":
    """By whose password an NV index of these TPMA_NV is read: False for its own, an empty one, True for the owner's.

    No wrong one is counted as a failed guess. AskOperator `tpm.certificate_locked` where there is no such way.
    """
    own = attributes & _NV_AUTHREAD and attributes & _NV_NO_DA
    ways = ((False,) if own else ()) + ((True,) if attributes & _NV_OWNERREAD else ())
    if not ways:
        raise _nv_locked(
            index,
            "its own password could count as a failed guess (no AUTHREAD with NO_DA), and the owner"
            " may not read it (no OWNERREAD)",
        )
    return ways


def _nv_locked(index: int, why: str) -> AskOperator:
    """The error for an NV index that cannot be read."""
    return AskOperator("tpm.certificate_locked", f"NV index 0x{index:08x} is not read: {why}")


def without_padding(certificate: bytes) -> bytes:
    """The DER at the start of what an NV index holds; empty where that is no certificate, such as padding alone."""
    end = 4 + int.from_bytes(certificate[2:4], "big")  # an ASN.1 SEQUENCE that says its own length in two bytes
    return certificate[:end] if certificate[:2] == b"\x30\x82" and end <= len(certificate) else b""


def condition(commands: "Commands") -> TpmCondition:
    """As `BoardTpm.condition`."""
    found = commands.properties(PT_MANUFACTURER, PT_FIRMWARE_VERSION_1)
    found.update(commands.properties(PT_PERMANENT, PT_LOCKOUT_INTERVAL))
    firmware = found.get(PT_FIRMWARE_VERSION_1, 0)
    permanent = found.get(PT_PERMANENT, 0)
    return TpmCondition(
        maker="".join([chr(letter) for letter in struct.pack(">I", found.get(PT_MANUFACTURER, 0))]).strip("\0 "),
        firmware=f"{firmware >> 16}.{firmware & 0xFFFF}",
        lockout_counter=found.get(PT_LOCKOUT_COUNTER, 0),
        lockout_maximum=found.get(PT_LOCKOUT_COUNTER + 1, 0),
        recovery_s=found.get(PT_LOCKOUT_INTERVAL, 0),
        free_slots=found.get(PT_HR_TRANSIENT_AVAIL, 0),
        owner_has_password=permanent & OWNER_AUTH_SET != 0,
        endorsement_has_password=permanent & ENDORSEMENT_AUTH_SET != 0,
    )
