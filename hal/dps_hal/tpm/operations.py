"""What carries the calls of a TPM: one operation over a connection, what it holds, and what is flushed when.

Four floors stand on one another, and none knows what is above it: the procedure (which command comes next and what its
answer means), this one (one operation and its end), the `Commands` (one command, repeated while the TPM asks for that),
the transport (bytes there and back). Two small machines are on this floor:

1. The **connection** is open (`_opened`) from the first command of an operation until something ends it, and may last
   over many operations. While it is open, every session and transient object that was made in it is `_held`.
2. An **operation** (`_operate`) is tried until it succeeds, or until a failure counts. It has one time for all tries.

Which events they see: the answer of the procedure's step, a RefusedError from a command, a DpsError of ours. The
operation pushes the connection: `_open` before each try; after a failure `_close` where the connection is lost,
`_end_connection`, which tidies up first, where it is to begin anew. `Doubts` (`dps_hal.tpm.verdicts`) says whether a
failure counts at its first coming. Whoever uses a TPM calls `release`, which ends the connection in order.

What a connection may leave behind, and who cares for it:

- `_held`: what is open now. `_tidy` flushes it.
- `_orphans`: what could not be flushed before the connection ended. The next connection does it in `_open`, and asks
  for an object's name first, for the TPM may have restarted and another program's object may be at that handle.
- `_lost`: what we may have without knowing its handle, since an answer was altered. `_flush_lost` asks the TPM, and
  flushes only where it cannot be anybody else's.
- With `exclusive` whatever is in the TPM at `_open` is ours and goes.

What cannot be flushed is no failure: an operation that succeeded has succeeded, and what is left is tried again at the
next opportunity. Handles and their ranges: TPM 2.0 Library Part 2, 7.2 and 7.4.
"""

from dps_hal.errors import AskOperator, DpsError, IdentityStale, RetryLater
from dps_hal.tpm.commands import Key
from dps_hal.tpm.errors import RC_SEQUENCE, RefusedError
from dps_hal.tpm.rules import (
    COMMAND_LIMIT_S,
    LEFTOVERS,
    LOADED_SESSIONS,
    PT_LOCKOUT_INTERVAL,
    PT_PERMANENT,
    RELEASE_LIMIT_S,
    TRANSIENT,
    kind_of,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, TypeVar

    from dps_hal.tpm.commands import Commands
    from dps_hal.tpm.rules import Passwords

    Answer = TypeVar("Answer")


class Operations:
    """The part of a `TpmProcedure` that knows nothing of keys: time, sessions and objects to be flushed."""

    def __init__(self, commands: "Commands", passwords: "Passwords", exclusive: bool) -> None:
        self._commands = commands
        self._passwords = passwords
        self._exclusive = exclusive
        self._shutdown_due = False  # a key without noDA was used: now a power cut would count as a failed guess
        self._orphans: list[tuple[int, bytes]] = []  # handles and names of what a lost connection left in the TPM
        self.creates_key = False  # `TpmService` says what it is for
        self._opened = False
        self._forget_connection()

    def _forget_connection(self) -> None:
        self._held: list[Any] = []  # every session and transient object that is to be flushed
        self._passwords.restore()
        self._altered = False  # an answer was not the TPM's own
        self._lost: list[int] = []  # TRANSIENT or LOADED_SESSIONS for each of ours whose handle we may not know

    def release(self) -> None:
        """As `Tpm.release`: nothing of ours stays in the TPM but EK and SRK."""
        self.creates_key = False
        for _ in range(2):  # where the connection was lost, a second one does what is left
            if self._opened or self._orphans or self._shutdown_due:
                self._commands.begin(RELEASE_LIMIT_S)
                self._end_connection()

    def _end_connection(self) -> None:
        """Tidies up within the time that is left, and ends the connection."""
        try:
            self._open()
            self._tidy()
        except (RefusedError, DpsError):
            pass  # nobody can act on it; the next connection tries again
        finally:
            self._close()

    def _tidy(self) -> None:
        """Leaves nothing of this connection's: 1. what is held; 2. the shutdown that is due; 3. what is lost."""
        for _ in range(3):  # a TPM that refused to flush once may do it now
            for made in reversed(list(self._held)):
                self._flush(made)
        self._announce_power_off()
        self._flush_lost()

    def _announce_power_off(self) -> None:
        """Shutdown(CLEAR) where a power cut that nobody announced would count as a failed guess.

        At the end of an operation, because the next release, which tries again, may be a whole request away.
        """
        if self._shutdown_due:
            try:
                self._commands.shutdown()
            except (RefusedError, DpsError):
                return
            self._shutdown_due = False

    def _operate(self, operation: "Callable[[], Answer]") -> "Answer":
        """What `operation` gives, tried again where its failure may mean nothing.

        1. It succeeds: its answer. 2. A hierarchy has no password and was shown one: again at once, without. 3. The TPM
        refused a command, or one of our checks did: `Doubts` says whether that counts. If not, again over a new
        connection. 4. A refusal that the TPM has counted as a failed guess: it counts, for another one costs more.
        """
        self._commands.begin(COMMAND_LIMIT_S)
        self.creates_key = False
        doubts: Any = None  # made at the first failure
        while True:
            error: DpsError
            stale = lost = again = counted = False
            try:
                self._open()
                answer = operation()
                self._announce_power_off()
                return answer
            except RefusedError as refused:
                self._altered = self._altered or refused.altered
                if refused.wrong_password and self._goes_without(refused):
                    continue
                stale, lost, counted = refused.stale, refused.connection_lost, refused.counted
                from dps_hal.tpm.verdicts import error_of

                error = error_of(refused, self._locked_out)
            except (AskOperator, IdentityStale, RetryLater) as verdict:
                error = verdict
            if doubts is None:
                from dps_hal.tpm.verdicts import Doubts

                doubts = Doubts()
            if not counted:
                error, again = doubts.weigh(error, stale, self._commands.in_time())
            if lost:
                self._close()
            elif stale or again:
                self._end_connection()
            if not again:
                raise error

    def _goes_without(self, refused: RefusedError) -> bool:
        """Whether the hierarchy that refused its password has none; see `Passwords`."""
        try:
            return self._passwords.go_without(refused, self._commands.properties(PT_PERMANENT, PT_PERMANENT))
        except RefusedError:
            return False  # the first refusal counts

    def _open(self) -> None:
        if self._opened:
            return
        self._opened = True
        self._flush_orphans()
        if self._exclusive:
            for first in LEFTOVERS:
                for handle in self._commands.handles(first):
                    self._flush_handle(handle)

    def _close(self) -> None:
        """Ends the connection; what could not be flushed is left to the next one."""
        if not self._commands.managed:
            self._orphans += [(made.handle, made.name) for made in self._held]
        self._commands.close()
        self._opened = False
        self._forget_connection()

    def _flush_orphans(self) -> None:
        """Flushes what an earlier connection left; a TPM without resource manager keeps it, and has three slots.

        Where the TPM has restarted meanwhile, others may have an object at the handle by now: its name tells. With a
        resource manager (/dev/tpmrm0) nothing was left.
        """
        while self._orphans:
            handle, name = self._orphans[-1]
            if kind_of(handle) == LOADED_SESSIONS or self._has_name(handle, name):
                self._flush_handle(handle)
            self._orphans.pop()

    def _has_name(self, handle: int, name: bytes) -> bool:
        """Whether an object of this name is at a transient handle; with an empty name, whether a sequence is."""
        try:
            found = self._commands.read_public(handle)
        except RefusedError as refused:
            if refused.connection_lost or refused.altered:
                raise refused
            return not name and refused.code == RC_SEQUENCE
        return bool(name) and found.name == name

    def _flush_handle(self, handle: int) -> None:
        try:
            self._commands.flush(Key(handle, b"", b""))
        except RefusedError as refused:
            if refused.connection_lost:
                raise refused

    def _flush_lost(self) -> None:
        """Flushes what an altered answer kept from us."""
        # The handle in an altered answer proves nothing, so it is the TPM that is asked what of that kind is left in
        # it. Where that is more than one others have left something too, and nobody can tell what is whose: all
        # stays. Behind a device node others are at work meanwhile, on /dev/tpm0 too.
        if self._altered and not self._commands.shared:
            for first in self._lost:
                handles = self._commands.handles(first)
                if len(handles) == 1:
                    self._flush_handle(handles[0])
        self._altered = False
        self._lost.clear()

    def _made(self, command: "Callable[..., Any]", *arguments: "Any") -> "Any":
        """What a command makes, a session or an object of the TPM's, which is held until it is flushed."""
        try:
            made = command(*arguments)
        except RefusedError as refused:
            if refused.altered:
                self._lost.append(LOADED_SESSIONS if refused.command == "start_auth_session" else TRANSIENT)
            raise refused
        self._held.append(made)
        return made

    def _flush(self, made: "Any") -> None:
        """Flushes what is still held; where the TPM refuses, release() tries again."""
        if made not in self._held:
            return
        try:
            self._commands.flush(made)
        except DpsError:
            return
        except RefusedError as refused:
            if not refused.unknown_handle and not (self._altered and refused.altered_handle):
                return
            self._lost.append(kind_of(made.handle))
        self._held.remove(made)

    def _locked_out(self, what: str) -> RetryLater:
        from dps_hal.tpm.verdicts import locked_out

        try:
            return locked_out(what, self._commands.properties(PT_LOCKOUT_INTERVAL, PT_LOCKOUT_INTERVAL))
        except (RefusedError, DpsError):
            return locked_out(what, {})
