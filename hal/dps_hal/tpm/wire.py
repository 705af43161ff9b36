"""The commands of the TPM procedure as plain bytes, on CPython and MicroPython: no library, no compiler.

Commands and their parameters: TPM 2.0 Library Part 3. The transport decides where the TPM is.
"""

import struct

from dps_hal.tpm.commands import CAP_HANDLES, CAP_TPM_PROPERTIES, NULL, OWNER, Connection, Key, take_field
from dps_hal.tpm.errors import RC_ALTERED, RefusedError
from dps_hal.tpm.keys import ALG_AES, ALG_CFB, ALG_SHA256, SHA256_BYTES, object_name, sized
from dps_hal.tpm.procedure import TpmProcedure
from dps_hal.tpm.sessions import SaltedSession, start_policy_parameters, start_salted_parameters

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from dps_hal.contracts import WhileWaiting
    from dps_hal.tpm.activation import Activation
    from dps_hal.tpm.commands import Transport

_SHA256 = struct.pack(">H", ALG_SHA256)
_AES_128_CFB = struct.pack(">HHH", ALG_AES, 128, ALG_CFB)


class WireTpm(TpmProcedure):
    """A `Tpm` behind any transport.

    `while_waiting` is called at least once a second while something blocks, and each command has a limit; on a device
    node neither holds while the kernel itself works on a command, as `DeviceTransport` says. The settings are those of
    `TpmProcedure`.
    """

    def __init__(
        self, transport: "Transport", *, while_waiting: "WhileWaiting | None" = None, **settings: "Any"
    ) -> None:
        """Does not touch the TPM yet."""
        super().__init__(WireCommands(transport, while_waiting), **settings)


class WireCommands(Connection):
    """The `Commands` as bytes, each as said there."""

    def read_public(self, handle: int) -> Key:
        _, answer = self.run("read_public", (handle,))
        _, end = take_field("read_public", answer, 0)
        stated, last = take_field("read_public", answer, end)
        _, last = take_field("read_public", answer, last)
        public = answer[:end]
        name = object_name(public) if public[4:6] == _SHA256 else b""
        if last != len(answer) or stated[:2] != public[4:6] or (name and name != stated):
            raise RefusedError("read_public", RC_ALTERED)
        return Key(handle, public, name or stated)

    def prove(self, key: Key, session: SaltedSession) -> None:
        self.run("read_public", (key.handle,), session=session, names=(key.name,))

    def create_primary(self, hierarchy: int, template: bytes, session: "SaltedSession | None", auth: bytes) -> Key:
        handle, answer = self.run(
            "create_primary",
            (hierarchy,),
            b"\x00\x04\x00\x00\x00\x00" + template + bytes(6),  # no password, no data; no outside info, no PCRs
            session=session,
            names=(struct.pack(">I", hierarchy),),
            auth=auth,
            password=session is None,
            gives_handle=True,
        )
        _, end = take_field("create_primary", answer, 0)
        key = Key(handle, answer[:end], object_name(answer[:end]))
        if session is None and answer[-36:] != sized(key.name):
            raise RefusedError("create_primary", RC_ALTERED)
        return key

    def evict_control(self, key: Key, persistent_handle: int, session: "SaltedSession | None", auth: bytes) -> Key:
        self.run(
            "evict_control",
            (OWNER, key.handle),
            struct.pack(">I", persistent_handle),
            session=session,
            names=(struct.pack(">I", OWNER), key.name),
            auth=auth,
            password=session is None,
        )
        return Key(persistent_handle, key.public, key.name)

    def start_session(self, salt_key: Key) -> SaltedSession:
        parameters, salt, nonce = start_salted_parameters(salt_key.public)
        handle, nonce_tpm = self._start(salt_key.handle, parameters)
        return SaltedSession(handle, salt, nonce, nonce_tpm)

    def start_policy(self) -> Key:
        return Key(self._start(NULL, start_policy_parameters())[0], b"", b"")

    def _start(self, salt_key: int, parameters: bytes) -> "tuple[int, bytes]":
        handle, answer = self.run("start_auth_session", (salt_key, NULL), parameters, gives_handle=True)
        return handle, take_field("start_auth_session", answer, 0)[0]

    def policy_secret(self, hierarchy: int, policy: Key, session: SaltedSession, auth: bytes) -> None:
        self.run(
            "policy_secret",
            (hierarchy, policy.handle),
            bytes(10),  # no nonce, no command's digest, no reference, no expiry
            session=session,
            names=(struct.pack(">I", hierarchy), struct.pack(">I", policy.handle)),
            auth=auth,
        )

    def activate_credential(
        self, ek: Key, srk: Key, activation: "Activation", session: SaltedSession, policy: Key, keep: bool
    ) -> bytes:
        _, inner_key = self.run(
            "activate_credential",
            (srk.handle, ek.handle),
            sized(activation.credential) + sized(activation.credential_secret),
            session=session,
            names=(srk.name, ek.name),
            auth=b"",
            policy=struct.pack(">IHBH", policy.handle, 0, keep, 0),  # `keep` is continueSession
        )
        return inner_key

    def import_key(self, srk: Key, inner_key: bytes, activation: "Activation", session: SaltedSession) -> bytes:
        duplicate = sized(activation.duplicate) + sized(activation.duplicate_seed)
        return self._with(session, "import", srk, inner_key + activation.id_key_public + duplicate + _AES_128_CFB)[1]

    def load(self, srk: Key, public: bytes, private: bytes, session: SaltedSession) -> Key:
        return Key(self._with(session, "load", srk, private + public, True)[0], public, object_name(public))

    def hmac(self, key: Key, message: bytes, session: SaltedSession) -> bytes:
        return _digest("hmac", self._with(session, "hmac", key, sized(message) + _SHA256)[1])

    def hmac_start(self, key: Key, session: SaltedSession) -> Key:
        handle, _ = self._with(session, "hmac_start", key, b"\x00\x00" + _SHA256, True)
        return Key(handle, b"", b"")  # a sequence has no name, Part 1, 16

    def sequence_update(self, sequence: Key, piece: bytes, session: SaltedSession) -> None:
        self._with(session, "sequence_update", sequence, sized(piece))

    def sequence_complete(self, sequence: Key, piece: bytes, session: SaltedSession) -> bytes:
        last = sized(piece) + struct.pack(">I", NULL)
        return _digest("sequence_complete", self._with(session, "sequence_complete", sequence, last)[1])

    def _with(
        self, session: SaltedSession, name: str, key: Key, parameters: bytes, gives_handle: bool = False
    ) -> "tuple[int, bytes]":
        """As `run` for a command that uses a key with an empty password."""
        return self.run(
            name,
            (key.handle,),
            parameters,
            session=session,
            names=(key.name,),
            auth=b"",
            gives_handle=gives_handle,
        )

    def flush(self, made: "Any") -> None:
        self.run("flush_context", (), struct.pack(">I", made.handle))

    def shutdown(self) -> None:
        self.run("shutdown", (), b"\x00\x00")  # TPM_SU_CLEAR

    def handles(self, first: int) -> "list[int]":
        return [entry[0] for entry in self._capability(CAP_HANDLES, first, 254, ">I")]

    def properties(self, first: int, last: int) -> "dict[int, int]":
        entries = self._capability(CAP_TPM_PROPERTIES, first, last - first + 1, ">II")
        return {entry[0]: entry[1] for entry in entries}

    def _capability(self, capability: int, first: int, count: int, layout: str) -> "list[tuple[int, ...]]":
        """The entries of one capability, each of `layout`."""
        _, answer = self.run("get_capability", (), struct.pack(">III", capability, first, count))
        size = struct.calcsize(layout)
        found = int.from_bytes(answer[5:9], "big")  # behind moreData and the capability
        if len(answer) != 9 + found * size:
            raise RefusedError("get_capability", RC_ALTERED)
        return [struct.unpack(layout, answer[at : at + size]) for at in range(9, len(answer), size)]

    def nv_read_public(self, index: int) -> Key:
        _, answer = self.run("nv_read_public", (index,))
        _, end = take_field("nv_read_public", answer, 0)
        return Key(index, answer[:end], take_field("nv_read_public", answer, end)[0])

    def nv_read(
        self, index: Key, size: int, offset: int, by_owner: bool, session: "SaltedSession | None", auth: bytes
    ) -> bytes:
        _, answer = self.run(
            "nv_read",
            (OWNER if by_owner else index.handle, index.handle),
            struct.pack(">HH", size, offset),
            session=session,
            names=(struct.pack(">I", OWNER) if by_owner else index.name, index.name),
            auth=auth,
            password=session is None,
        )
        return take_field("nv_read", answer, 0)[0]


def _digest(name: str, answer: bytes) -> bytes:
    digest, _ = take_field(name, answer, 0)
    if len(digest) != SHA256_BYTES:
        raise RefusedError(name, RC_ALTERED)
    return digest
