"""A software TPM of its own for one test, which takes TPM commands from the test as well."""

from __future__ import annotations

import socket
import struct

from dps_emulator.swtpm_process import ANSWER_S, LISTEN, SwtpmProcess, free_port_pair, read_exactly

__all__ = ["ENDORSEMENT", "LOCKOUT_COUNTER", "OWNER", "Swtpm", "free_port_pair", "read_exactly", "read_frame"]
OWNER = 0x40000001  # TPM_RH, TPM 2.0 Library Part 2, table 28
ENDORSEMENT = 0x4000000B
TRANSIENT = 0x80000000  # handle ranges of GetCapability(TPM_CAP_HANDLES), TPM 2.0 Library Part 2, 7.2
PERSISTENT = 0x81000000
LOADED_SESSION = 0x02000000
SAVED_SESSION = 0x03000000
LOCKOUT_COUNTER = 0x20E  # TPM_PT_LOCKOUT_COUNTER, TPM 2.0 Library Part 2, table 24
INPUT_BUFFER = 0x10D  # TPM_PT_INPUT_BUFFER


def read_frame(connection: socket.socket) -> bytes:
    """One TPM command or response: tag, size, code and `size - 10` bytes; EOFError when the peer has gone."""
    header = read_exactly(connection, 10)
    size = struct.unpack(">I", header[2:6])[0]
    return header + read_exactly(connection, size - 10)


class Swtpm(SwtpmProcess):
    """One swtpm process, and what a test asks of its TPM."""

    def stop(self) -> None:
        """An orderly power-off: TPM2_Shutdown(CLEAR), then the end; no client may be connected."""
        if self._process is not None:
            self.command(0x145, struct.pack(">H", 0))  # TPM2_Shutdown(TPM_SU_CLEAR)
            self.kill()

    def command(self, code: int, body: bytes = b"", tag: int = 0x8001) -> bytes:
        """Sends one command (`body` is all that follows the header) and returns what follows the response's header.

        No other client may be connected. RuntimeError: the TPM refused it.
        """
        with socket.create_connection((LISTEN, self.port), ANSWER_S) as connection:
            connection.sendall(struct.pack(">HII", tag, 10 + len(body), code) + body)
            response = read_frame(connection)
        return_code = struct.unpack(">I", response[6:10])[0]
        if return_code:
            raise RuntimeError(f"TPM command 0x{code:x} was refused with 0x{return_code:x}")
        return response[10:]

    def handles(self, first: int) -> list[int]:
        """The handles in use in the range that starts at `first` (TRANSIENT, PERSISTENT, …_SESSION).

        A loaded policy session is listed in the range of loaded sessions, with a handle of the other range.
        """
        listing = self.command(0x17A, struct.pack(">III", 1, first, 254))[5:]  # moreData, TPM_CAP_HANDLES
        count = struct.unpack(">I", listing[:4])[0]
        found = struct.unpack(f">{count}I", listing[4 : 4 + 4 * count])
        kinds = (LOADED_SESSION >> 24, SAVED_SESSION >> 24) if first == LOADED_SESSION else (first >> 24,)
        return [handle for handle in found if handle >> 24 in kinds]

    def leftovers(self) -> list[int]:
        """Every transient object and session that somebody did not flush."""
        return self.handles(TRANSIENT) + self.handles(LOADED_SESSION) + self.handles(SAVED_SESSION)

    def property(self, number: int) -> int:
        """The value of one TPM_PT property."""
        listing = self.command(0x17A, struct.pack(">III", 6, number, 1))[5:]  # TPM_CAP_TPM_PROPERTIES
        _, found, value = struct.unpack(">III", listing[:12])
        if found != number:
            raise RuntimeError(f"the TPM has no property 0x{number:x}")
        return int(value)

    def set_hierarchy_auth(self, hierarchy: int, auth: bytes) -> None:
        """TPM2_HierarchyChangeAuth of OWNER or ENDORSEMENT while it has no password."""
        self._with_empty_password(0x129, [hierarchy], struct.pack(">H", len(auth)) + auth)

    def set_lockout(self, maximum: int, recovery_s: int) -> None:
        """TPM2_DictionaryAttackParameters: failures until a lockout, and seconds after which one is forgotten."""
        self._with_empty_password(0x13A, [0x4000000A], struct.pack(">III", maximum, recovery_s, recovery_s))

    def clear(self) -> None:
        """TPM2_Clear: a new storage hierarchy, so another SRK; every persistent object of the owner goes."""
        self._with_empty_password(0x126, [0x4000000A])  # by the lockout hierarchy

    def persist_primary(self, hierarchy: int, template: bytes, handle: int, auth: bytes = b"") -> None:
        """Puts a primary key of any kind, by its TPM2B_PUBLIC template, at a persistent handle; `auth` protects it."""
        sensitive = struct.pack(">HH", 4 + len(auth), len(auth)) + auth + bytes(2)
        created = self._with_empty_password(0x131, [hierarchy], sensitive + template + bytes(6))
        transient = struct.unpack(">I", created[:4])[0]
        self._with_empty_password(0x120, [OWNER, transient], struct.pack(">I", handle))
        self.command(0x165, struct.pack(">I", transient))

    def evict(self, handle: int) -> None:
        """Frees a persistent handle."""
        self._with_empty_password(0x120, [OWNER, handle], struct.pack(">I", handle))

    def fill_nv(self, template: bytes) -> None:
        """Leaves no room for a persistent object: NV indices, then the primary key of `template` at many handles."""
        index = 0x01800000
        size = 2048
        while size >= 64:
            public = struct.pack(">IHIHH", index, 0x000B, 0x02060006, 0, size)
            try:
                self._with_empty_password(0x12A, [OWNER], bytes(2) + struct.pack(">H", len(public)) + public)
                index += 1
            except RuntimeError:
                size //= 2
        created = self._with_empty_password(0x131, [OWNER], bytes.fromhex("0004 0000 0000") + template + bytes(6))
        handle = 0x81010100
        try:
            while True:
                self._with_empty_password(
                    0x120, [OWNER, struct.unpack(">I", created[:4])[0]], struct.pack(">I", handle)
                )
                handle += 1
        except RuntimeError as error:
            if "0x14b" not in str(error):
                raise
        finally:
            self.command(0x165, created[:4])

    def public_areas(self) -> dict[int, bytes]:
        """The public area and names of every persistent object, by handle."""
        return {handle: self.command(0x173, struct.pack(">I", handle)) for handle in self.handles(PERSISTENT)}

    def write_nv(self, index: int, content: bytes, attributes: int = 0x02060006) -> None:
        """Defines an NV index as TPM makers define those of EK certificates, and writes it (up to 1024 bytes).

        `attributes`, a TPMA_NV: by default OWNERWRITE AUTHWRITE, OWNERREAD AUTHREAD, NO_DA; the first is needed.
        """
        public = struct.pack(">IHIHH", index, 0x000B, attributes, 0, len(content))
        self._with_empty_password(0x12A, [OWNER], bytes(2) + struct.pack(">H", len(public)) + public)
        if content:
            write = struct.pack(">H", len(content)) + content + bytes(2)
            self._with_empty_password(0x137, [OWNER, index], write)

    def lock_nv(self, index: int) -> None:
        """TPM2_NV_ReadLock: until the next power cut nobody reads an index with the attribute READ_STCLEAR."""
        self._with_empty_password(0x14F, [OWNER, index])

    def _with_empty_password(self, code: int, handles: list[int], parameters: bytes = b"") -> bytes:
        password_session = struct.pack(">IHBH", 0x40000009, 0, 0, 0)
        body = struct.pack(f">{len(handles)}I", *handles) + struct.pack(">I", len(password_session))
        return self.command(code, body + password_session + parameters, tag=0x8002)
