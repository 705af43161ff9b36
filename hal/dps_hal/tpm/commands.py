"""TPM commands and responses as bytes, and the connection that carries them.

Layouts: TPM 2.0 Library Part 1, 18 (headers, handles, authorisation and parameter areas) and Part 3 (each command).
"""

import struct

from dps_hal.errors import RetryLater
from dps_hal.platform import ms_since, pause_ms, ticks_ms
from dps_hal.tpm.errors import (
    RC_ALTERED,
    RC_CONNECTION_LOST,
    RC_INITIALIZE,
    RC_RESEND,
    RC_TOO_LARGE,
    TPM_LAYERS,
    RefusedError,
)
from dps_hal.tpm.keys import take_sized
from dps_hal.tpm.rules import LEAST_LIMIT_S

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final, Protocol

    from dps_hal.contracts import WhileWaiting
    from dps_hal.tpm.sessions import SaltedSession

    class Transport(Protocol):
        """What carries bytes to a TPM and back: a socket, a device node, a bus."""

        def send(self, command: bytes, limit_s: float, while_waiting: "WhileWaiting | None") -> bytes:
            """The TPM's response to one command; opens what must be opened; calls `while_waiting` once a second.

            OSError: the connection broke, and a new one may work. RetryLater `tpm.timeout`: no response within
            `limit_s`. Other DpsErrors: it cannot be opened. After any of them `close` follows. A transport may have
            `managed` and `shared`, see `Connection`.
            """
            ...

        def close(self) -> None:
            """Ends the connection, if there is one; the next `send` makes a new one."""
            ...


EVICT_CONTROL: "Final" = 0x120  # TPM_CC, Part 2, table 12, with the next seventeen
CREATE_PRIMARY: "Final" = 0x131
SEQUENCE_COMPLETE: "Final" = 0x13E
STARTUP: "Final" = 0x144
SHUTDOWN: "Final" = 0x145
ACTIVATE_CREDENTIAL: "Final" = 0x147
NV_READ: "Final" = 0x14E
POLICY_SECRET: "Final" = 0x151
HMAC: "Final" = 0x155
IMPORT: "Final" = 0x156
LOAD: "Final" = 0x157
HMAC_START: "Final" = 0x15B
SEQUENCE_UPDATE: "Final" = 0x15C
FLUSH_CONTEXT: "Final" = 0x165
NV_READ_PUBLIC: "Final" = 0x169
READ_PUBLIC: "Final" = 0x173
START_AUTH_SESSION: "Final" = 0x176
GET_CAPABILITY: "Final" = 0x17A
_NAMES = {
    EVICT_CONTROL: "evict_control",
    CREATE_PRIMARY: "create_primary",
    SEQUENCE_COMPLETE: "sequence_complete",
    SHUTDOWN: "shutdown",
    ACTIVATE_CREDENTIAL: "activate_credential",
    NV_READ: "nv_read",
    POLICY_SECRET: "policy_secret",
    HMAC: "hmac",
    IMPORT: "import",
    LOAD: "load",
    HMAC_START: "hmac_start",
    SEQUENCE_UPDATE: "sequence_update",
    FLUSH_CONTEXT: "flush_context",
    NV_READ_PUBLIC: "nv_read_public",
    READ_PUBLIC: "read_public",
    START_AUTH_SESSION: "start_auth_session",
    GET_CAPABILITY: "get_capability",
}

OWNER: "Final" = 0x40000001  # TPM_RH, Part 2, table 28, with the next three
NULL: "Final" = 0x40000007
PASSWORD_SESSION: "Final" = 0x40000009
ENDORSEMENT: "Final" = 0x4000000B
CAP_HANDLES: "Final" = 1  # TPM_CAP, Part 2, table 22
CAP_TPM_PROPERTIES: "Final" = 6

_NO_SESSIONS = 0x8001  # TPM_ST
_SESSIONS = 0x8002
_MAX_BYTES = 4096  # of a command or response; TPMs state 1 to 4 KiB
_EMPTY_PASSWORD = struct.pack(">IHBH", PASSWORD_SESSION, 0, 0, 0)


class Connection:
    """Sends commands, again where the TPM asks for that, until the time of the operation is over."""

    def __init__(self, transport: "Transport", while_waiting: "WhileWaiting | None") -> None:
        self._transport = transport
        self._while_waiting = while_waiting
        self._started_ms = 0
        self._limit_ms = 0
        self._broken = False

    @property
    def managed(self) -> bool:
        """Whether a resource manager behind it flushes what is left when it ends."""
        return getattr(self._transport, "managed", False)

    @property
    def shared(self) -> bool:
        """Whether others may use the TPM while it lasts."""
        return getattr(self._transport, "shared", False)

    def begin(self, limit_s: float) -> None:
        """Starts an operation of at most `limit_s` seconds."""
        self._started_ms = ticks_ms()
        self._limit_ms = int(limit_s * 1000)

    def extend(self, limit_s: float) -> None:
        """Gives the operation `limit_s` seconds from its start, if that is more than it has."""
        self._limit_ms = max(self._limit_ms, int(limit_s * 1000))

    def in_time(self) -> bool:
        """Whether what this operation has taken so far would fit once more into its time."""
        return 2 * ms_since(self._started_ms) <= self._limit_ms

    def close(self) -> None:
        """Ends the transport's connection."""
        self._transport.close()
        self._broken = False

    def run(
        self,
        code: int,
        handles: "tuple[int, ...]" = (),
        parameters: bytes = b"",
        *,
        session: "SaltedSession | None" = None,
        names: "tuple[bytes, ...]" = (),
        auth: "bytes | None" = None,
        policy: int = 0,
        password: bool = False,
        gives_handle: bool = False,
    ) -> "tuple[int, bytes]":
        """Runs one command; returns the handle in its response (0 for none) and the response's parameters.

        With `session`: `names` has the name of each handle, `auth` the authorisation value of the first, None where
        it needs none; `policy` is a policy session for the second. With `password`: the first has an empty password.
        RefusedError: the TPM's return code, RC_ALTERED or RC_CONNECTION_LOST.
        """
        name = _NAMES[code]
        area = _EMPTY_PASSWORD if password else b""
        if session is not None:
            parameters, area = session.authorize(code, names, parameters, auth)
            if policy:
                # Without continueSession the TPM frees the policy session when the command succeeds.
                area += struct.pack(">IHBH", policy, 0, 0, 0)
        command = _framed(code, handles, area, parameters)
        if len(command) > _MAX_BYTES:
            raise RefusedError(name, RC_TOO_LARGE)
        response = self._send(name, command)
        offset = 10
        handle = 0
        if gives_handle:
            handle = int.from_bytes(response[10:14], "big")
            offset = 14
        tag = int.from_bytes(response[:2], "big")
        if tag != (_SESSIONS if area else _NO_SESSIONS) or len(response) < offset:
            raise RefusedError(name, RC_ALTERED)
        if not area:
            return handle, response[offset:]
        end = offset + 4 + int.from_bytes(response[offset : offset + 4], "big")
        if len(response) < end:
            raise RefusedError(name, RC_ALTERED)
        parameters = response[offset + 4 : end]
        if session is None:
            return handle, parameters
        accepted = session.accept(code, parameters, response, end)
        if accepted is None:
            raise RefusedError(name, RC_ALTERED)
        return handle, accepted

    def _send(self, name: str, command: bytes) -> bytes:
        """The response to a command that succeeds."""
        wait_ms = 10
        started = False
        while True:
            response = self._exchange(name, command)
            rc = int.from_bytes(response[6:10], "big")
            if rc == 0:
                return response
            if len(response) != 10 or rc >> 16 not in TPM_LAYERS:
                rc = RC_ALTERED
            refused = RefusedError(name, rc)
            if refused.code == RC_INITIALIZE and not started:  # a TPM on which no firmware has run
                started = True
                self._exchange(name, _framed(STARTUP, (), b"", b"\x00\x00"))  # CLEAR; the command says if it helped
            elif refused.code in RC_RESEND and ms_since(self._started_ms) + wait_ms < self._limit_ms:
                pause_ms(wait_ms)
                wait_ms = min(2 * wait_ms, 1000)
                if self._while_waiting is not None:
                    self._while_waiting()
            else:
                raise refused

    def _exchange(self, name: str, command: bytes) -> bytes:
        left_ms = self._limit_ms - ms_since(self._started_ms)
        if left_ms <= 0:
            raise RetryLater("tpm.timeout", f"the TPM was not done in time before {name}")
        if self._broken:
            raise RefusedError(name, RC_CONNECTION_LOST, "it is closed")
        self._broken = True  # until the answer is there: a late one would be taken for that to the next command
        try:
            response = self._transport.send(command, max(left_ms / 1000, LEAST_LIMIT_S), self._while_waiting)
        except OSError as error:
            raise RefusedError(name, RC_CONNECTION_LOST, str(error))
        self._broken = False
        if not 10 <= len(response) <= _MAX_BYTES or int.from_bytes(response[2:6], "big") != len(response):
            raise RefusedError(name, RC_ALTERED)
        return response


def take_field(name: str, area: bytes, offset: int) -> "tuple[bytes, int]":
    """The TPM2B at `offset` of a response and the offset behind it; RefusedError where there is none."""
    try:
        return take_sized(area, offset, name)
    except ValueError:
        raise RefusedError(name, RC_ALTERED)


def _framed(code: int, handles: "tuple[int, ...]", area: bytes, parameters: bytes) -> bytes:
    size = 10 + 4 * len(handles) + len(area) + len(parameters)
    parts = [struct.pack(">H", _SESSIONS if area else _NO_SESSIONS), b"", struct.pack(">I", code)]
    for handle in handles:
        parts.append(struct.pack(">I", handle))
    if area:
        size += 4
        parts.append(struct.pack(">I", len(area)))
        parts.append(area)
    parts.append(parameters)
    parts[1] = struct.pack(">I", size)
    return b"".join(parts)
