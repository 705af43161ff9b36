"""What every back end of a real TPM does alike beyond a registration: certificate, condition, keys for others."""

import struct

from dps_hal.contracts import TpmCondition
from dps_hal.errors import AskOperator, RetryLater
from dps_hal.tpm.errors import RC_ALTERED, RefusedError
from dps_hal.tpm.keys import EK_TEMPLATES, ek_template, makers_template, object_name, rsa_modulus
from dps_hal.tpm.rules import (
    ENDORSEMENT_AUTH_SET,
    OWNER_AUTH_SET,
    PT_LOCKOUT_COUNTER,
    PT_LOCKOUT_INTERVAL,
    PT_PERMANENT,
    locked_out,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Final, Protocol, TypeVar

    class Key(Protocol):
        """A key that was made."""

        @property
        def public(self) -> bytes:
            """Its marshalled TPM2B_PUBLIC."""
            ...

    Made = TypeVar("Made", bound=Key)

EK_CERTIFICATE_INDEX: "Final" = 0x01C00002  # TCG EK Credential Profile, 2.2.1.4: RSA-2048 EK certificate
EK_NONCE_INDEX: "Final" = 0x01C00003  # what of it decides how the certified key is made, with the next
EK_TEMPLATE_INDEX: "Final" = 0x01C00004
LAST_EK_INDEX: "Final" = 0x01C000FF  # of the low and the high range; behind it are the certificates of issuers
PLAIN_L1: "Final" = "tcg-l1 without the maker's template"  # what `template_of` says where NV has another for tcg-l1
_NV_CHUNK_BYTES = 512  # where the TPM does not say; TPM_PT_NV_BUFFER_MAX of the PC Client profile is no smaller
_LEAST_NV_CHUNK_BYTES = 32  # a TPM that states less would take thousands of commands
_MOST_NV_CHUNK_BYTES = 2048  # a response has 4096 bytes at most

PT_MANUFACTURER: "Final" = 0x105  # TPM_PT, TPM 2.0 Library Part 2, table 24, with the next three
PT_FIRMWARE_VERSION_1: "Final" = 0x10B
PT_NV_BUFFER_MAX: "Final" = 0x12C
PT_HR_TRANSIENT_AVAIL: "Final" = 0x207
_NV_OWNERREAD = 1 << 17  # TPMA_NV, Part 2, table 217, with the next two: the owner's password suffices for reading
_NV_AUTHREAD = 1 << 18  # or its own
_NV_NO_DA = 1 << 25  # a wrong password is not counted as a failed guess


def check_owner_handle(handle: int) -> None:
    """AskOperator `config.invalid` unless the owner may persist at `handle` (Part 2, 7.5)."""
    if not 0x81000000 <= handle < 0x81800000:
        raise AskOperator("config.invalid", f"persist_at: expected 0x81000000 to 0x817fffff; came 0x{handle:08x}")


def check_replaceable(public: bytes, handle: int, former: bytes) -> None:
    """AskOperator `tpm.handle_taken` unless the key whose TPM2B_PUBLIC is at `handle` has the name `former`.

    Other programs keep HMAC keys of the same kind, Azure's own clients at the very same handle.
    """
    if object_name(public) != former:
        raise AskOperator(
            "tpm.handle_taken",
            f"persist_at: expected a free handle or this agent's earlier key at 0x{handle:08x}; came another",
        )


def template_of(ek: bytes, likely: bytes, maker: bytes, made_from: "Callable[[bytes], bytes]") -> str:
    """Which of EK_TEMPLATES gives this EK, or PLAIN_L1, empty for none; the template `likely` is tried first.

    `maker` is what `TpmService.makers_template` says; `made_from(template)` is the public area of the key that the TPM
    makes: always the same from the same template.
    """
    templates = [(name, ek_template(name)) for name in EK_TEMPLATES]
    if maker:
        templates = [(PLAIN_L1 if name == "tcg-l1" else name, template) for name, template in templates]
        templates.append(("tcg-l1", maker))
    for name, template in sorted(templates, key=lambda named: named[1] != likely):
        if made_from(template) == ek:
            return name
    return ""


def if_readable(read: "Callable[[], bytes]") -> bytes:
    """What `read()` finds in NV memory; empty where the TPM keeps it to itself, whatever it says for that.

    `check` names it; without a certified key the device registers as well. What another try, another password or
    another session may change is raised as it came.
    """
    try:
        return read()
    except AskOperator:
        return b""
    except RefusedError as refused:
        from dps_hal.tpm.verdicts import error_of

        passing = isinstance(error_of(refused, lambda what: locked_out(what, {})), RetryLater)
        if refused.stale or refused.wrong_password or passing:
            raise refused
        return b""


def make_ek(
    settings: bytes, content: "Callable[[int], bytes | None]", create: "Callable[[bytes], Made]", name: bytes
) -> "Made":
    """A missing EK, which `create(template)` makes; `content(index)` reads an NV index, None where there is none.

    With a `name`, of the EK in a record, it is the key of that name, where L-1 or the maker's template gives it. Else
    the certificate decides: the maker's template makes it only where that gives the key that is certified. NV says no
    more than that, for anybody may define an index, and TPM2_Clear takes what an owner has defined.
    """
    if settings != ek_template("tcg-l1"):
        return create(settings)
    maker = _read_twice(lambda: template_in(content))
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


def _read_twice(read: "Callable[[], bytes]") -> bytes:
    """As `if_readable`; what NV says comes without a proof, and the key that is made by it stays."""
    found = if_readable(read)
    if found != if_readable(read):
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


def ways_to_read(index: int, attributes: int) -> "tuple[bool, ...]":
    """By whose password an NV index of these TPMA_NV is read: False for its own, an empty one, True for the owner's.

    No wrong one is counted as a failed guess. AskOperator `tpm.certificate_locked` where there is no such way.
    """
    own = attributes & _NV_AUTHREAD and attributes & _NV_NO_DA
    ways = ((False,) if own else ()) + ((True,) if attributes & _NV_OWNERREAD else ())
    if not ways:
        raise nv_locked(
            index,
            "its own password could count as a failed guess (no AUTHREAD with NO_DA), and the owner"
            " may not read it (no OWNERREAD)",
        )
    return ways


def nv_locked(index: int, why: str) -> AskOperator:
    """The error for an NV index that cannot be read."""
    return AskOperator("tpm.certificate_locked", f"NV index 0x{index:08x} is not read: {why}")


def without_padding(certificate: bytes) -> bytes:
    """The DER at the start of what an NV index holds; empty where that is no certificate, such as padding alone."""
    end = 4 + int.from_bytes(certificate[2:4], "big")  # an ASN.1 SEQUENCE that says its own length in two bytes
    return certificate[:end] if certificate[:2] == b"\x30\x82" and end <= len(certificate) else b""


def condition_of(properties: "dict[int, int]") -> TpmCondition:
    """The condition that these TPM properties describe."""
    firmware = properties.get(PT_FIRMWARE_VERSION_1, 0)
    permanent = properties.get(PT_PERMANENT, 0)
    return TpmCondition(
        maker="".join([chr(letter) for letter in struct.pack(">I", properties.get(PT_MANUFACTURER, 0))]).strip("\0 "),
        firmware=f"{firmware >> 16}.{firmware & 0xFFFF}",
        lockout_counter=properties.get(PT_LOCKOUT_COUNTER, 0),
        lockout_maximum=properties.get(PT_LOCKOUT_COUNTER + 1, 0),
        recovery_s=properties.get(PT_LOCKOUT_INTERVAL, 0),
        free_slots=properties.get(PT_HR_TRANSIENT_AVAIL, 0),
        owner_has_password=permanent & OWNER_AUTH_SET != 0,
        endorsement_has_password=permanent & ENDORSEMENT_AUTH_SET != 0,
    )
