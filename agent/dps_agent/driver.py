"""What stands between the logic and the world, once for every runner: the policy that neither of them has to know.

    the life -> whoever watches it -> `Driver.drive` -> a runner, which has one table: effect -> how it is done

The logic asks for what it needs (`dps_agent.effects`, `hub_effects`); the driver passes that on, and asks for more
where a device behaves so whatever it runs on:

1. Before a token is made somebody confirms a clock that nobody keeps: the hub's certificate, else DPS's Date.
2. A token that was refused may have been one of another day: unless the clock is confirmed DPS is asked for its Date.
3. Before a long wait and before the hub is dialled TPM and DPS are released, and the hub before DPS is asked what time
   it is: a board has memory for one of them, and a TPM that only one may have open is TLS's next.
4. A life that connects reports who made its TPM, and its session hears whether programs read messages.
5. In the end all is given back, whatever fails; a life that was ended on purpose is no crash, and `progress` says so.

There is no machine here. The driver sees each effect once on its way down and each answer once on its way up, and
remembers one thing: what the session was told of readers on this connection. It pushes the life in one place (4) and
reads its patience in another (5).

What comes back for an effect: its answer, or a DpsError, which is thrown into the exchange where it yielded the effect.
To make a DpsError of any other exception is the runner's business. What is not here either: deadlines, watchdogs, the
end by a signal (a runner closes `drive`, and all that is open in it ends), and what it takes to do an effect.

Pure, as the logic is: no socket, clock or thread. A runner runs `drive`, closes it, and then runs `end`.
"""

from dps_agent.effects import Commit, Http, Uptime, UtcNow
from dps_hal.contracts import PROGRESS
from dps_hal.errors import Broken, DpsError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from typing import Any, NamedTuple

    from dps_agent.effects import NoReply, Reply
    from dps_agent.lifecycle import Lifecycle
    from dps_hal.contracts import TpmCondition, Utc

    Asking = Generator[Any, Any, Any]

    class Release(NamedTuple):
        """Gives back "TPM", "DPS" or "hub": what is open is closed, the next use opens it again; answered by None."""

        what: str

    class Reach(NamedTuple):
        """Verifies the certificate of `hub`, and lets the clock know; answered by None.

        What was reached may serve the Connect that follows.
        """

        hub: str

    class ClockConfirmed(NamedTuple):
        """Answered by whether anybody vouches for the clock to the minute: NTP, or a Date of the last hour."""

    class TpmCall(NamedTuple):
        """One call of the TPM's that the logic knows nothing of; answered by what it returns."""

        call: Callable[[], Any]
else:
    from dps_hal.named import namedtuple

    Release = namedtuple("Release", ("what",))
    Reach = namedtuple("Reach", ("hub",))
    ClockConfirmed = namedtuple("ClockConfirmed", ())
    TpmCall = namedtuple("TpmCall", ("call",))

_RELEASE_FOR_S = 2  # before a longer wait the TPM is released
_CLOSE_FOR_S = 60  # before a longer wait DPS is hung up on


class Driver:
    """The policy for one exchange. Without a `life` it asks for no more than the exchange itself needs.

    Whoever erases a life's records takes the `life` away. `condition()` is the TPM's, whose maker the life is to
    report. `readers()` is how many programs read messages.
    """

    def __init__(
        self,
        life: "Lifecycle | None" = None,
        condition: "Callable[[], TpmCondition] | None" = None,
        readers: "Callable[[], int] | None" = None,
    ) -> None:
        self.life = life
        self._condition = condition
        self._readers = readers
        self._told: bool | None = None  # whether programs read messages, as the session heard on this connection

    def drive(self, exchange: "Asking") -> "Asking":
        """`exchange`, with what the policy adds; ends as it does, and closes it."""
        answer: Any = None
        error: DpsError | None = None
        try:
            while True:
                try:
                    effect = exchange.send(answer) if error is None else exchange.throw(error)
                except StopIteration as end:
                    return end.value
                answer = error = None
                try:
                    answer = yield from self._answer(effect)
                except DpsError as failure:
                    error = failure
        finally:
            exchange.close()

    def end(self, on_purpose: bool) -> "Asking":
        """Gives back all that was used, each thing even where another one fails; raises our own bugs only.

        `on_purpose`: somebody ended the life, so that the connections it began count no more.
        """
        asked: list[Any] = [Release("hub"), Release("TPM"), Release("DPS")]
        progress = self.life.patience.in_order() if on_purpose and self.life else None
        if progress:
            asked.append(Commit(PROGRESS, progress))
        bug: Broken | None = None
        for effect in asked:
            try:
                _: None = yield effect
            except DpsError as failure:  # what is left open the next start opens anew
                if isinstance(failure, Broken):
                    bug = failure
        if bug:
            raise bug

    def _answer(self, effect: "Any") -> "Asking":
        """What answers one effect, with what else is due before and after it.

        Before: 1. `ConfirmClock` is answered here. 2. `Sleep` releases what a long wait does not need. 3. `NextEvent`
        is answered by Readers where that has changed, else it releases as a `Sleep` does. 4. `Connect` releases the TPM
        and hangs up on DPS. After: 5. a refused `Connect` may ask for DPS's Date. 6. The first EK reports who made the
        TPM. Effects go by name: a board that registers has not loaded those of the hub.
        """
        kind = type(effect).__name__
        if kind == "ConfirmClock":
            yield from self._confirm_clock(effect.hub)
            return None
        if kind == "Sleep":
            yield from self._release_for(effect.delay_s)
        elif kind == "NextEvent":
            reads = bool(self._readers()) if self._readers else self._told
            if reads is not self._told:
                from dps_agent.hub_effects import Readers

                self._told = reads
                return Readers(int(reads or 0))
            now_s: float = yield Uptime()
            yield from self._release_for(effect.until_uptime_s - now_s)
        elif kind == "Connect":
            self._told = None
            yield Release("TPM")
            yield Release("DPS")
        answer: Any = yield effect
        if kind == "Connect":
            from dps_agent.hub_effects import NOT_AUTHORIZED

            if getattr(answer, "return_code", 0) in NOT_AUTHORIZED:
                confirmed: bool = yield ClockConfirmed()
                if not confirmed:
                    yield from self._ask_date()
        elif kind == "ReadEndorsementKey" and self.life and self._condition and "tpmMaker" not in self.life.about:
            try:
                condition: TpmCondition = yield TpmCall(self._condition)
                self.life.report("tpmMaker", condition.maker)
            except DpsError as failure:  # nothing depends on it
                if isinstance(failure, Broken):
                    raise
        return answer

    def _confirm_clock(self, hub: str) -> "Asking":
        before: Utc = yield UtcNow()
        if before.believable:
            return
        if hub:
            yield Release("TPM")
            yield Release("DPS")
            yield Reach(hub)
            now: Utc = yield UtcNow()
            if now.believable:
                return
            from dps_agent.hub_effects import Disconnect

            yield Disconnect()  # the hub was perhaps reached all the same, and DPS is next
        yield from self._ask_date()

    def _ask_date(self) -> "Asking":
        """Asks DPS what time it is, for no hub says that; the clock hears of each Date."""
        _: Reply | NoReply = yield Http("GET", "/", b"", None)
        yield Release("DPS")

    def _release_for(self, wait_s: float) -> "Asking":
        if wait_s > _RELEASE_FOR_S:
            yield Release("TPM")
        if wait_s > _CLOSE_FOR_S:
            yield Release("DPS")
