"""TPM commands and responses as bytes, and the connection that carries them.

Two contracts meet here. `Commands` is what stands above: one method for each TPM command, and the time of an operation
(`begin`, `extend`, `in_time`). `Transport` is what stands below: bytes there, bytes back, and nothing of TPM in it.
Between them are two classes. `Repeated` runs a command again while the TPM asks for that, and esys shares it.
`Connection` makes bytes of a command, with or without a session, and takes a response apart.

What comes back for one command:

1. The response of a command that succeeded: the handle in it and its parameters, in clear.
2. A return code that asks for the same command again (RC_RESEND): repeated, ever more slowly, within the operation's
   time. A TPM that was never started (RC_INITIALIZE) is started, once a command.
3. Any other return code: RefusedError with it. What that means is not known here.
4. Bytes that are no response to this command, or that a session does not prove: RefusedError RC_ALTERED. Its return
   code and its parameters are believed in nothing.
5. A connection that broke: RefusedError RC_CONNECTION_LOST.
6. No response in time: RetryLater `tpm.timeout`. After this, as after 5, each further command is RC_CONNECTION_LOST
   until `close`: a late response would be taken for that to the next command.

There is one flag, `_broken`, which is set from the first byte of a command to the last one of its response. Time is
judged here alone: a transport gets what is left of the operation's, and LEAST_LIMIT_S at least.

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
from dps_hal.tpm.rules import CODES, LEAST_LIMIT_S

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, Final, NamedTuple, Protocol, TypeVar

    from dps_hal.contracts import WhileWaiting
    from dps_hal.tpm.activation import Activation
    from dps_hal.tpm.sessions import SaltedSession

    Answer = TypeVar("Answer")

    class Key(NamedTuple):
        """A key in the TPM, or what else has a handle there."""

        handle: int
        public: bytes  # marshalled TPM2B_PUBLIC, of an NV index TPM2B_NV_PUBLIC; empty for a session or sequence
        name: bytes  # its SHA-256 name, or the one that the TPM states; empty for a session or sequence

    Given = Any  # a Key that one of the Commands gave, which may be more than that

    class Commands(Protocol):
        """What the procedure is made of: each method is one TPM command, for which it raises RefusedError.

        A key, policy session, sequence or index is what one of these methods gave, not any other Key.
        `session` is what `start_session` gave: it encrypts what is secret, shows `auth` as an HMAC only, and proves
        the answer. None: a password session, with an empty password.
        """

        @property
        def managed(self) -> bool:
            """Whether a resource manager behind it flushes what is left when it ends."""
            ...

        @property
        def shared(self) -> bool:
            """Whether others may use the TPM while it lasts."""
            ...

        def begin(self, limit_s: float) -> None:
            """Starts an operation of at most `limit_s` seconds; commands are repeated within them."""
            ...

        def extend(self, limit_s: float) -> None:
            """Gives the operation `limit_s` seconds from its start, if that is more than it has."""
            ...

        def in_time(self) -> bool:
            """Whether what this operation has taken so far would fit once more into its time."""
            ...

        def close(self) -> None:
            """Ends the connection, if there is one; the next command makes a new one."""
            ...

        def read_public(self, handle: int) -> Key:
            """The object at a handle, its name checked against its public area."""
            ...

        def prove(self, key: Given, session: Any) -> None:
            """Reads the key's public area once more in the session: its holder takes it for an object of that name."""
            ...

        def create_primary(self, hierarchy: int, template: bytes, session: Any, auth: bytes) -> Key:
            """A new transient key, its name checked; `auth` is the hierarchy's."""
            ...

        def evict_control(self, key: Given, persistent_handle: int, session: Any, auth: bytes) -> Key:
            """Makes a transient key persistent, or removes a persistent one; `auth` is the owner's."""
            ...

        def start_session(self, salt_key: Given) -> Any:
            """An HMAC session salted to a checked RSA key, with `handle` and an empty `name`."""
            ...

        def start_policy(self) -> Key:
            """A policy session, which carries no secret."""
            ...

        def policy_secret(self, hierarchy: int, policy: Given, session: Any, auth: bytes) -> None:
            """Shows the policy session that we know the hierarchy's password."""
            ...

        def activate_credential(
            self, ek: Given, srk: Given, activation: Activation, session: Any, policy: Given, keep: bool
        ) -> bytes:
            """The inner key, a TPM2B; when it succeeds the policy session is as new with `keep`, else it is gone."""
            ...

        def import_key(self, srk: Given, inner_key: bytes, activation: Activation, session: Any) -> bytes:
            """The TPM2B_PRIVATE of the key in the blob."""
            ...

        def load(self, srk: Given, public: bytes, private: bytes, session: Any) -> Key:
            """A wrapped key as a transient object."""
            ...

        def hmac(self, key: Given, message: bytes, session: Any) -> bytes:
            """HMAC-SHA256 of at most MAX_BUFFER_BYTES, 32 bytes."""
            ...

        def hmac_start(self, key: Given, session: Any) -> Key:
            """A sequence, for a longer message."""
            ...

        def sequence_update(self, sequence: Given, piece: bytes, session: Any) -> None:
            """Takes the next MAX_BUFFER_BYTES of it."""
            ...

        def sequence_complete(self, sequence: Given, piece: bytes, session: Any) -> bytes:
            """Takes the last of it and gives its HMAC, 32 bytes; the TPM frees the sequence."""
            ...

        def flush(self, made: Any) -> None:
            """FlushContext of a session or transient object."""
            ...

        def shutdown(self) -> None:
            """Shutdown(CLEAR)."""
            ...

        def handles(self, first: int) -> list[int]:
            """At most 254 handles in use from `first` on, of its kind."""
            ...

        def properties(self, first: int, last: int) -> dict[int, int]:
            """TPM properties by number; those that the TPM does not have are missing."""
            ...

        def nv_read_public(self, index: int) -> Key:
            """An NV index, as the TPM states it."""
            ...

        def nv_read(self, index: Given, size: int, offset: int, by_owner: bool, session: Any, auth: bytes) -> bytes:
            """A piece of what it holds; `auth` is the owner's, or the empty one of the index."""
            ...

    class Transport(Protocol):
        """What carries bytes to a TPM and back: a socket, a device node, a bus."""

        def send(self, command: bytes, limit_s: float, while_waiting: "WhileWaiting | None") -> bytes:
            """The TPM's response to one command; opens what must be opened; calls `while_waiting` once a second.

            OSError: the connection broke, and a new one may work. RetryLater `tpm.timeout`: no response within
            `limit_s`. Other DpsErrors: it cannot be opened. After any of them `close` follows. A transport may have
            `managed` and `shared`, see `Commands`; a board's is not asked, for nobody else uses its TPM.
            """
            ...

        def close(self) -> None:
            """Ends the connection, if there is one; the next `send` makes a new one."""
            ...

else:
    from dps_hal.named import namedtuple

    Key = namedtuple("Key", ("handle", "public", "name"))


OWNER: "Final" = 0x40000001  # TPM_RH, Part 2, table 28, with the next three
NULL: "Final" = 0x40000007
PASSWORD_SESSION: "Final" = 0x40000009
ENDORSEMENT: "Final" = 0x4000000B
CAP_HANDLES: "Final" = 1  # TPM_CAP, Part 2, table 22
CAP_TPM_PROPERTIES: "Final" = 6

_NO_SESSIONS = 0x8001  # TPM_ST
_SESSIONS = 0x8002
_MAX_BYTES = 4096  # of a command or response; TPMs say that they take 1 to 4 KiB
_EMPTY_PASSWORD = struct.pack(">IHBH", PASSWORD_SESSION, 0, 0, 0)


class Repeated:
    """Runs commands, again where the TPM asks for that, until the time of the operation is over."""

    def __init__(self, while_waiting: "WhileWaiting | None") -> None:
        self._while_waiting = while_waiting
        self._started_ms = 0
        self._limit_ms = 0

    def begin(self, limit_s: float) -> None:
        """As `Commands` has it."""
        self._started_ms = ticks_ms()
        self._limit_ms = int(limit_s * 1000)

    def extend(self, limit_s: float) -> None:
        """As `Commands` has it."""
        self._limit_ms = max(self._limit_ms, int(limit_s * 1000))

    def in_time(self) -> bool:
        """As `Commands` has it."""
        return 2 * ms_since(self._started_ms) <= self._limit_ms

    def _left_ms(self) -> int:
        return self._limit_ms - ms_since(self._started_ms)

    def _until_done(self, name: str, once: "Callable[[], Answer]") -> "Answer":
        """What `once()` gives when the TPM takes the command; RefusedError where it does not."""
        wait_ms = 10
        started = False
        while True:
            try:
                return once()
            except RefusedError as error:
                refused = error
            if refused.code == RC_INITIALIZE and not started:  # no firmware has started this TPM
                started = True
                self._start_up(name)  # whether it helped, the command itself says
            elif refused.code in RC_RESEND and self._left_ms() > wait_ms:
                pause_ms(wait_ms)
                wait_ms = min(2 * wait_ms, 1000)
                if self._while_waiting is not None:
                    self._while_waiting()
            else:
                raise refused

    def _start_up(self, name: str) -> None:
        """Sends Startup(CLEAR) on behalf of the command `name`."""
        raise NotImplementedError


class Connection(Repeated):
    """Commands as bytes over a transport."""

    def __init__(self, transport: "Transport", while_waiting: "WhileWaiting | None") -> None:
        super().__init__(while_waiting)
        self._transport = transport
        self._broken = False

    @property
    def managed(self) -> bool:
        """As `Commands` has it."""
        return getattr(self._transport, "managed", False)

    @property
    def shared(self) -> bool:
        """As `Commands` has it."""
        return getattr(self._transport, "shared", False)

    def close(self) -> None:
        """Ends the transport's connection."""
        self._transport.close()
        self._broken = False

    def run(
        self,
        name: str,
        handles: "tuple[int, ...]" = (),
        parameters: bytes = b"",
        *,
        session: "SaltedSession | None" = None,
        names: "tuple[bytes, ...]" = (),
        auth: "bytes | None" = None,
        policy: bytes = b"",
        password: bool = False,
        gives_handle: bool = False,
    ) -> "tuple[int, bytes]":
        """Runs the command `name`; returns the handle in its response (0 for none) and the response's parameters.

        With `session`: `names` has the name of each handle, `auth` the authorisation value of the first, None where
        it needs none; `policy` authorises the second. With `password`: the first has an empty password.
        RefusedError: the TPM's return code, RC_ALTERED or RC_CONNECTION_LOST.
        """
        area = _EMPTY_PASSWORD if password else b""
        if session is not None:
            parameters, area = session.authorize(name, names, parameters, auth)
            area += policy
        command = _framed(name, handles, area, parameters)
        if len(command) > _MAX_BYTES:
            raise RefusedError(name, RC_TOO_LARGE)
        response = self._until_done(name, lambda: self._response(name, command))
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
        accepted = session.accept(name, parameters, response, end)
        if accepted is None:
            raise RefusedError(name, RC_ALTERED)
        return handle, accepted

    def _response(self, name: str, command: bytes) -> bytes:
        """The response to a command that succeeds."""
        response = self._exchange(name, command)
        rc = int.from_bytes(response[6:10], "big")
        if rc == 0:
            return response
        raise RefusedError(name, rc if len(response) == 10 and rc >> 16 in TPM_LAYERS else RC_ALTERED)

    def _start_up(self, name: str) -> None:
        self._exchange(name, _framed("startup", (), b"", b"\x00\x00"))

    def _exchange(self, name: str, command: bytes) -> bytes:
        left_ms = self._left_ms()
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


def _framed(name: str, handles: "tuple[int, ...]", area: bytes, parameters: bytes) -> bytes:
    size = 10 + 4 * len(handles) + len(area) + len(parameters)
    parts = [struct.pack(">H", _SESSIONS if area else _NO_SESSIONS), b"", struct.pack(">I", CODES[name])]
    for handle in handles:
        parts.append(struct.pack(">I", handle))
    if area:
        size += 4
        parts.append(struct.pack(">I", len(area)))
        parts.append(area)
    parts.append(parameters)
    parts[1] = struct.pack(">I", size)
    return b"".join(parts)
