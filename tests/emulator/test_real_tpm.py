"""The emulator's blobs on a real TPM 2.0 implementation, command by command and in clear."""

from __future__ import annotations

import hmac
import random
import struct
from pathlib import Path

import pytest

from dps_emulator.tpm_keys import (
    ActivationSecrets,
    activation_blob,
    parse_endorsement_key,
    parse_storage_root_key,
    tpm2b,
)
from emulator.device_side import EK_HEAD, SRK_HEAD, take
from support.tpm.swtpm import ENDORSEMENT, OWNER, Swtpm

EK_HANDLE, SRK_HANDLE = 0x81010001, 0x81000001
PASSWORD = bytes.fromhex("400000090000000000")  # the empty password, as an authorisation
READ_PUBLIC, START_AUTH_SESSION, POLICY_SECRET, ACTIVATE = 0x173, 0x176, 0x151, 0x147
IMPORT, LOAD, HMAC = 0x156, 0x157, 0x155


def authorised(tpm: Swtpm, code: int, handles: list[int], sessions: bytes, parameters: bytes) -> bytes:
    """One command with sessions; what follows the response's header."""
    body = struct.pack(f">{len(handles)}I", *handles) + struct.pack(">I", len(sessions)) + sessions + parameters
    return tpm.command(code, body, tag=0x8002)


def read_public(tpm: Swtpm, handle: int) -> bytes:
    return tpm2b(take(tpm.command(READ_PUBLIC, struct.pack(">I", handle)))[0])


@pytest.mark.parametrize("no_da", [True, False])
@pytest.mark.parametrize("size", [1, 32, 64])
def test_a_real_tpm_takes_the_key_and_signs_with_it(tmp_path: Path, no_da: bool, size: int) -> None:
    with Swtpm(tmp_path / "tpm") as tpm:
        tpm.persist_primary(ENDORSEMENT, EK_HEAD + bytes(256), EK_HANDLE)
        tpm.persist_primary(OWNER, SRK_HEAD + bytes(256), SRK_HANDLE)
        ek = parse_endorsement_key(read_public(tpm, EK_HANDLE))
        srk = parse_storage_root_key(read_public(tpm, SRK_HANDLE))
        rng = random.Random(7)
        key = rng.randbytes(size)
        rest = activation_blob(ek, srk, key, ActivationSecrets.draw(rng.randbytes), b"hub/devices/d", no_da=no_da)
        fields = []
        while rest:
            field, rest = take(rest)
            fields.append(tpm2b(field))
        id_object, secret1, duplicate, secret2, public, _ = fields

        start = struct.pack(">II", 0x40000007, 0x40000007) + tpm2b(bytes(16)) + tpm2b(b"") + b"\1\0\x10\0\x0b"
        session = struct.unpack(">I", tpm.command(START_AUTH_SESSION, start)[:4])[0]
        authorised(tpm, POLICY_SECRET, [ENDORSEMENT, session], PASSWORD, bytes(10))
        policy = struct.pack(">IHBH", session, 0, 0, 0)
        answer = authorised(tpm, ACTIVATE, [SRK_HANDLE, EK_HANDLE], PASSWORD + policy, id_object + secret1)
        inner_key, _ = take(answer[4:])
        assert len(inner_key) == 16

        parameters = tpm2b(inner_key) + public + duplicate + secret2 + bytes.fromhex("000600800043")
        private, _ = take(authorised(tpm, IMPORT, [SRK_HANDLE], PASSWORD, parameters)[4:])
        loaded = authorised(tpm, LOAD, [SRK_HANDLE], PASSWORD, tpm2b(private) + public)
        handle = struct.unpack(">I", loaded[:4])[0]
        sign = tpm2b(b"resource\n1") + b"\0\x0b"
        try:
            answer = authorised(tpm, HMAC, [handle], PASSWORD, sign)
        except RuntimeError as error:
            # TPM_RC_RETRY: the first use of a key that lockout protects, after a start.
            assert not no_da and "0x922" in str(error)
            answer = authorised(tpm, HMAC, [handle], PASSWORD, sign)
        assert take(answer[4:])[0] == hmac.digest(key, b"resource\n1", "sha256")
