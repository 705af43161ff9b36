"""`dps-agent run`: the device's life in the foreground, for ever, under systemd or by hand.

The life itself is `dps_agent.lifecycle`. Here is what a service adds: one generator, `Service._watched`, stands between
the life and its driver. It sees every effect and every change of state, tells systemd, the journal and the state file,
and does what others ask for (signals, the socket) between two effects, where the life could be cut anyway.

There is no machine of its own here: what the service does follows from the life's state, and what it remembers beside
that is what was asked for and not done yet, and what was announced already. Three things ask:

1. A signal handler sets `_stopping` or `_reload_asked`, in the middle of anything.
2. The socket, which has its turns in the loop wherever the runner waits, appends a `Command`, or posts an event for the
   hub's session.
3. The life yields an effect. On the way `_look` notices what the last step has changed, and `_obey` does what 1 and 2
   have asked for.

Who pushes whom. SIGHUP and a command only note and `_wake`: the runner's sleep ends by haste, its wait for an event by
`_WAKE`, an event that says nothing, and a connection that is being made ends where `_connects_in_vain`. All that
follows runs in `_watched`: it asks the life to register (`ask_to_register`), leaves its hub
(`abandon`), or ends it by not going on with it. The life knows nothing of the service.

How a life ends here, and what follows. 1. SIGTERM or SIGINT: the runner stops, and so does the service. 2. Settings
that changed: a new life begins with new equipment (`_next_equipment`). 3. A reset: a new life begins with what there
is. 4. An error that makes going on impossible: the service ends with it. New lives inherit from the former what
outlives an identity: see `Lifecycle`.

Threads: the main one runs `run` from beginning to end, the hub's packets and the socket for programs included;
`dps-worker`, for what may block, and `dps-exit` are the runner's. `_api` is told of the life by values (`Snapshot`).
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import sys
import time
from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple

from dps_agent import __version__
from dps_agent.assignment import difference
from dps_agent.driver import _CLOSE_FOR_S, Driver
from dps_agent.effects import ConfirmClock, Sleep, Uptime
from dps_agent.host import kept_key, memory
from dps_agent.host.config import backend_shown
from dps_agent.host.counts import Counts
from dps_agent.host.error_document import fields_of
from dps_agent.host.journal import ERROR, INFO, NOTICE, WARNING, Journal
from dps_agent.host.local.routes import Command, Snapshot
from dps_agent.host.local.server import LocalServer
from dps_agent.host.local.statefile import FLEET_REFUSED, StateFile, assignment_document
from dps_agent.host.loop import Loop
from dps_agent.host.next_step import next_step
from dps_agent.host.notify import TEXT_LIMIT, Notifier
from dps_agent.host.parts import (
    ROLLED_BACK,
    clock_for,
    dps_connection,
    hub_connection,
    kept_to_ourselves,
    open_device,
    tpm_warnings,
)
from dps_agent.host.printed import printable, utc_text
from dps_agent.host.runner import Erase, Runner
from dps_agent.host.steps import StepLines
from dps_agent.hub_effects import (
    Acknowledge,
    Acknowledged,
    Connect,
    Desired,
    Disconnect,
    MessageDone,
    MethodCall,
    NextEvent,
    Publish,
    Readers,
    ReadTwin,
    RegisterAgain,
    Report,
    SendTelemetry,
    TelemetryDone,
    Tell,
    TwinDone,
)
from dps_agent.lifecycle import BOOT, CONNECTED, CONNECTING, HALTED, PROVISIONED, PROVISIONING, WAITING, Lifecycle
from dps_agent.signing import hub_token
from dps_agent.twin import NOT_SENT
from dps_hal.errors import AskOperator, Broken, DpsError, IdentityStale, RetryLater
from dps_hal.host.codes import REMEDIES
from dps_hal.host.mounts import doubt
from dps_hal.host.state_dir import open_store

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

    from dps_agent.assignment import Assignment
    from dps_agent.effects import Effect
    from dps_agent.host.config import Configuration
    from dps_agent.host.network.mqtt import HubConnection
    from dps_agent.host.remote_methods import RemoteMethods
    from dps_agent.hub_effects import Event, Message
    from dps_agent.settings import Settings
    from dps_hal.contracts import TpmCondition, TpmService

NEWS_EVERY_S = 60.0  # between two reports to the twin of what happened
_NEWS = ("lastError", "lastCheck")
_WAITS = (WAITING, HALTED, PROVISIONED)
_ASSIGNED = (PROVISIONED, CONNECTING, CONNECTED)
_PASSING = (Publish, Tell, Acknowledge)  # what an event leads to; what else it has changed is looked at after them
_ROUTINE = (SendTelemetry, Acknowledged)  # events that change nothing that anybody is shown
_WAKE = MessageDone(0)  # an event that says nothing, for no message has this id


class _Equipment(NamedTuple):
    """What one set of settings leads to."""

    configuration: Configuration
    settings: Settings
    tpm: TpmService
    hub: HubConnection
    runner: Runner


class _Driver(Driver):
    """The policy, where events come by the thousand a second: what was given back is not given back again."""

    _gave_back = False  # TPM and DPS, and nothing was asked for since that may use them

    def _answer(self, effect: Effect) -> Generator[Any, Any, Any]:
        waits = (
            isinstance(effect, NextEvent) and self._gave_back and bool(self._readers and self._readers()) is self._told
        )
        if waits or isinstance(effect, _PASSING):
            return (yield effect)
        self._gave_back = False
        return (yield from super()._answer(effect))

    def _release_for(self, wait_s: float) -> Generator[Any, Any, None]:
        yield from super()._release_for(wait_s)
        self._gave_back = wait_s > _CLOSE_FOR_S


class Service:
    """One run of the service; `read_settings` is called again at SIGHUP.

    `options` are those of the command line that lead to the same settings in another process.
    """

    def __init__(
        self, read_settings: Callable[[], Configuration], journal: Journal, options: Sequence[str] = ()
    ) -> None:
        self._read_settings = read_settings
        self._options = options
        self._remote: RemoteMethods | None = None
        self._news: dict[str, Any] = dict.fromkeys(_NEWS)  # of what happened, for the twin
        self._told_news = self._news.copy()
        self._news_at_s = -math.inf  # before that the twin is not told again
        configuration = read_settings()
        self._journal = journal
        self._notifier = Notifier()
        self._store = open_store(configuration.state_dir)
        self._clock = clock_for(self._store)
        self._counts = Counts()
        self._state_file = StateFile(configuration.runtime_dir)
        self._loop = Loop()  # where the runner of now waits; the socket has its turns there
        self._equipment = self._equip(configuration)
        self._next_equipment: _Equipment | None = None  # what new settings lead to, once the life of now has ended
        self._life = Lifecycle(self._equipment.settings)
        self._api: LocalServer | None = None
        self._commands: deque[Command] = deque()  # the socket's, to be done between two effects
        self._registering: list[Command] = []  # those that are answered when the registration has ended
        self._readers = 0  # programs that read events
        self._woken = False  # _WAKE was posted, and `_next_event` has not looked since
        self._reload_asked = False
        self._stopping = False
        self._hasty = False  # the next wait before another try is skipped
        self._leaving = False  # this life is over
        self._warned: set[str] = set()  # warnings of the TPM that the journal has; each is said once
        self._lacked: tuple[str, list[str]] = ("", [])  # the hub, and what the journal said that it lacks

    def run(self) -> None:
        """Lives until SIGTERM or SIGINT; raises what makes going on impossible."""
        memory.share_one_arena()
        self._install_signals()
        with contextlib.ExitStack() as owned:
            owned.callback(self._notifier.close)
            owned.enter_context(kept_to_ourselves(self._store))
            owned.callback(self._state_file.remove)
            self._begin_life()
            self._api = self._open_api()
            configuration = self._equipment.configuration
            what = f"ID scope {configuration.id_scope}, TPM {backend_shown(configuration)}"
            self._journal.event("started", f"dps-agent {__version__} starts: {what}")
            if doubted := doubt(configuration.state_dir):
                self._journal.event("warning", doubted, WARNING)
            self._notifier.ready()
            self._show(self._life.reason, None)
            if self._api is not None:
                self._loop.served = self._api
                owned.callback(self._end_api, self._api)
            while not self._stopping:
                self._live_once()
                if not self._stopping:
                    self._begin_life()
            self._notifier.stopping()
            self._journal.event("stopped", "dps-agent ends", state=self._life.state)

    # Its parts.

    def _equip(self, configuration: Configuration) -> _Equipment:
        """TPM, connections and runner for these settings, none of them touched yet; raises what is wrong with them."""
        tpm, hub = open_device(configuration), hub_connection(configuration)
        runner = Runner(
            tpm=tpm,
            store=self._store,
            connection=dps_connection(configuration),
            clock=self._clock,
            observe=StepLines(self._journal, True).observe if self._journal.verbose else None,
            watchdog=self._each_second,
            hub=hub,
            tell=self._tell,
            interrupted=self._connects_in_vain,
            loop=self._loop,
        )
        return _Equipment(configuration, configuration.settings(), tpm, hub, runner)

    def _begin_life(self) -> None:
        if self._next_equipment is not None:
            self._equipment, self._next_equipment = self._next_equipment, None
        about = {
            "agentVersion": __version__,
            "runtime": f"CPython {sys.version.split()[0]}",
            "backend": self._equipment.configuration.backend,
        }
        self._counts.use(self._equipment.hub)
        tpm, handle = self._equipment.tpm, self._equipment.configuration.tpm.persist_at
        self._life = Lifecycle(self._equipment.settings, about, lambda: kept_key.entry(tpm, handle), self._life)
        self._told_news = self._news.copy()
        self._life.about.update(self._told_news)
        self._listen_to(self._equipment.configuration.hub.remote_methods)
        self._leaving = False
        self._state = BOOT
        self._since_s = time.monotonic()
        self._announced: Assignment | None = None  # the assignment that was announced
        self._persisted_key = b""  # the wrapped key that was made persistent, or cannot be
        self._shown: tuple[Any, ...] = ()

    def _listen_to(self, methods: Sequence[str]) -> None:
        """These methods are answered here; what none of them needs is not loaded."""
        self._journal.keep("journal" in methods)
        self._remote = None
        if methods:
            from dps_agent.host.remote_methods import RemoteMethods, command_of

            self._remote = RemoteMethods(methods, command_of(self._options), self._journal, self._post, self._checked)

    def _checked(self, found: dict[str, str]) -> None:
        """A check was made from far away, on a thread of its own."""
        self._note_news("lastCheck", found, ("code", "failed", "warning"))

    def _note_news(self, name: str, news: dict[str, str], counts: Sequence[str]) -> None:
        """Something happened, and is news where one of the values that count is another one than before."""
        former = self._news[name] or {}
        if any(news[key] != former.get(key) for key in counts):
            self._news[name] = {**news, "at": utc_text(time.time())}

    def _tell_news(self) -> bool:
        """Has the twin told what happened, at most once in NEWS_EVERY_S; whether there was something."""
        if self._news == self._told_news or time.monotonic() < self._news_at_s:
            return False
        self._news_at_s = time.monotonic() + NEWS_EVERY_S
        former, self._told_news = self._told_news, self._news.copy()
        for name, value in self._told_news.items():
            if value != former[name]:
                self._life.report(name, value)
        return True

    def _open_api(self) -> LocalServer | None:
        configuration = self._equipment.configuration
        path = configuration.socket
        if not path:
            return None
        try:
            return LocalServer(
                path,
                allow_token=configuration.api.allow_token,
                post=self._post,
                command=self._take_command,
                take_back=self._take_back,
                journal=self._journal,
                counts=self._counts,
            )
        except OSError as error:
            text = f"there is no socket for other programs: {path}: {error.strerror}"
            self._journal.event("warning", text, WARNING)
            return None

    def _end_api(self, api: LocalServer) -> None:
        self._loop.served = None
        api.close()

    def _install_signals(self) -> None:
        self._equipment.runner.install_signals(exit_status=0)
        for number in (signal.SIGTERM, signal.SIGINT):
            installed = signal.getsignal(number)

            def on_end(number: int, frame: Any, installed: Any = installed) -> None:
                self._stopping = True
                self._notifier.stopping()
                installed(number, frame)
                self._equipment.runner.stop()  # it may be another one than the first

            signal.signal(number, on_end)
        signal.signal(signal.SIGHUP, self._on_reload)

    def _on_reload(self, _number: int, _frame: object) -> None:
        self._reload_asked = True
        self._wake()

    # For the socket and signal handlers.

    def _post(self, event: Event) -> bool:
        """Whether the session of now gets the event; one of a life that is being left takes nothing more."""
        if isinstance(event, Readers):  # however often they come and go, one event is enough
            self._readers = event.number
            self._post_wake()
            return True
        return not self._leaving and self._equipment.runner.post(event)

    def _take_back(self, asked: Event | Command) -> bool:
        """Drops what nobody has begun with; whether it was that."""
        if not isinstance(asked, Command):
            return self._equipment.runner.take_back(asked)
        with contextlib.suppress(ValueError):
            self._commands.remove(asked)
            return True
        return False

    def _take_command(self, command: Command) -> None:
        self._commands.append(command)
        self._wake()

    def _connects_in_vain(self) -> bool:
        """Whether a connection is to be given up while it is made, for what was asked for just before or meanwhile."""
        if self._reload_asked or self._life.asked_to_register:
            return True
        return any(command.name == "reset" or command.force for command in self._commands)

    def _wake(self) -> None:
        """Ends what the runner waits for, so that `_watched` gets its turn."""
        self._post_wake()
        self._equipment.runner.hasten()

    def _post_wake(self) -> None:
        """Posts one _WAKE, however much there is to look at; it is noted first, for hearing it removes the note."""
        if not self._woken:
            self._woken = True
            if not self._equipment.runner.post(_WAKE):
                self._woken = False  # so many events wait that `_next_event` looks soon anyway

    def _each_second(self) -> None:
        """The runner's watchdog: everything is within its deadline."""
        self._notifier.alive()
        self._state_file.write_if_due()
        if self._life.state == CONNECTED and self._news != self._told_news and time.monotonic() >= self._news_at_s:
            self._post_wake()

    def _tell(self, message: Message) -> bool:
        if self._remote is not None and isinstance(message, MethodCall) and self._remote.take(message):
            return True
        if self._api is None:
            return isinstance(message, Desired)  # nobody wants these, so they need not come again
        return self._api.tell(message)

    # One life.

    def _live_once(self) -> None:
        """Lives until it ends by itself: settings that changed, a reset, a signal."""
        try:
            self._driver = _Driver(self._life, self._condition, lambda: self._readers)
            watched = self._watched(self._life.live(once=False, force=False, connect=True))
            self._equipment.runner.run(watched, self._driver)
        except RetryLater as error:
            if error.code != "agent.interrupted" or not self._stopping:
                raise
        finally:
            if self._api is not None:
                self._api.forget()

    def _condition(self) -> TpmCondition:
        """The TPM's, which the metrics show from then on."""
        condition = self._equipment.tpm.condition()
        self._counts.note_tpm(condition, time.monotonic())
        return condition

    def _watched(self, life: Generator[Effect, Any, None]) -> Generator[Any, Any, None]:
        """`life`, watched: ends where it ends, or between two of its effects."""
        answer: Any = None
        error: DpsError | None = None
        routine = False  # nothing was done since the last look but what such an event leads to
        with contextlib.closing(life):
            while True:
                try:
                    effect = life.send(answer) if error is None else life.throw(error)
                except StopIteration:
                    return
                answer, error = None, None
                if isinstance(effect, Uptime):
                    answer = self._clock.uptime_s()
                    continue
                if not (isinstance(effect, _PASSING) or (routine and isinstance(effect, NextEvent))):
                    yield from self._look(effect)
                    routine = False
                if self._reload_asked or self._commands or self._next_equipment is not None:
                    over = yield from self._obey()
                    if over:
                        return
                try:
                    if isinstance(effect, Sleep):
                        over = yield from self._sleep(effect)
                        if over:
                            return
                    elif isinstance(effect, NextEvent):
                        over, answer = yield from self._next_event(effect)
                        if over:
                            return
                        routine = isinstance(answer, _ROUTINE)
                    else:
                        answer = yield effect
                        if not isinstance(effect, _PASSING):
                            self._counts.note(effect, answer, time.monotonic())
                except DpsError as failure:
                    error = failure
                if isinstance(effect, (Connect, Disconnect)) and self._api is not None:
                    self._api.forget()

    def _sleep(self, sleep: Sleep) -> Generator[Effect, Any, bool]:
        """A wait that commands interrupt and that haste ends; whether the life is over."""
        until_s = time.monotonic() + sleep.delay_s
        self._show(sleep.reason, until_s)
        while True:
            if self._hasty and self._life.state in _WAITS:
                self._hasty = False
                if self._life.state == PROVISIONED or not self._patience_s():
                    return False
            if self._life.spreads and self._registering:
                return False
            left_s = until_s - time.monotonic()
            if left_s <= 0:
                return False
            yield Sleep(left_s, sleep.reason)
            if self._reload_asked or self._commands:
                over = yield from self._obey()
                if over:
                    return True
                self._show(sleep.reason, until_s)

    def _next_event(self, wanted: NextEvent) -> Generator[Effect, Any, tuple[bool, Event | None]]:
        """The hub's next event; whether the life is over."""
        while True:
            self._woken = False  # first: what comes after one of the looks below posts a _WAKE of its own
            if self._reload_asked or self._commands:
                over = yield from self._obey()
                if over:
                    return True, None
            if self._life.asked_to_register:
                return False, RegisterAgain()
            if self._life.state == CONNECTED and self._tell_news():
                return False, None  # so that the session looks what is due
            event: Event | None = yield wanted
            if event is not _WAKE:
                return False, event

    # What was asked for.

    def _obey(self) -> Generator[Effect, Any, bool]:
        """Does what signals and commands ask for; whether the life is over."""
        if self._reload_asked:
            self._reload_asked = False
            self._reload()
        over = self._next_equipment is not None and not self._may_finish()
        while self._commands and not over:
            command = self._commands.popleft()
            try:
                over = yield from self._do(command)
            except Broken as error:
                self._answer(command, 500, _error_of(error))
                raise
            except DpsError as error:
                self._answer(command, 503 if isinstance(error, RetryLater) else 409, _error_of(error))
        if over:
            yield from self._leave_hub()
        return over

    def _leave_hub(self) -> Generator[Effect, Any, None]:
        """Ends the connection with the life: programs that wait for the hub are answered, what is queued is dropped."""
        self._leaving = True
        self._show(self._life.reason, None)
        yield from self._life.abandon()
        yield Disconnect()
        while True:
            event: Event | None = yield NextEvent(0.0)
            if event is None:
                return
            if isinstance(event, SendTelemetry):
                self._tell(TelemetryDone(event.request_id, False, False))
            elif isinstance(event, (Report, ReadTwin)):
                self._tell(TwinDone(event.request_id, NOT_SENT, 0, None, 0.0))

    def _registers(self) -> bool:
        """Whether a registration is under way."""
        return self._life.state == PROVISIONING and not self._life.spreads

    def _may_finish(self) -> bool:
        """Whether the new settings wait for a registration that they do not concern: it may hold a challenge."""
        return (
            self._registers()
            and self._next_equipment is not None
            and _of_registration(self._next_equipment.configuration) == _of_registration(self._equipment.configuration)
        )

    def _reload(self) -> None:
        """Reads the settings again; those that differ are for the next life, `_next_equipment`."""
        self._notifier.reloading()
        before = self._equipment.configuration
        changed = False
        leaves = ""
        try:
            found = self._read_settings()
            for name in ("state_dir", "runtime_dir", "api"):
                if getattr(found, name) != getattr(before, name):
                    raise AskOperator("config.invalid", f"{name} changes with a restart only")
            changed = _values(found) != _values(before)
            self._next_equipment = self._equip(found) if changed else None
            if changed:
                held = self._life.assignment
                if held is not None and (reason := difference(held, found.settings())):
                    leaves = f"; the device leaves {held.assigned_hub}: {reason}"
        except DpsError as error:
            changed = False
            waited, self._next_equipment = self._next_equipment is not None, None
            which = "the old ones go on, not those that were read meanwhile" if waited else "the old ones go on"
            text = f"the new settings are refused, {which}: {error.message}"
            self._journal.event("refused", text, ERROR, state=self._life.state, code=error.code)
        else:
            waits = "; they count once the registration under way has ended" if changed and self._may_finish() else ""
            text = "the settings were read again" + (leaves + waits if changed else ": no change")
            self._journal.event("reloaded", text, WARNING if leaves else INFO, state=self._life.state)
        self._hasty = changed or self._life.state == HALTED  # an operator may have changed something elsewhere
        if not self._stopping:
            self._notifier.ready()

    def _do(self, command: Command) -> Generator[Any, Any, bool]:
        """One command of the socket; whether the life is over."""
        life = self._life
        if command.name == "reset":
            if self._registers():
                raise RetryLater("agent.busy", "a registration is under way")
            try:
                yield from kept_key.withdraw(self._equipment.tpm, self._equipment.configuration.tpm.persist_at)
            except (RetryLater, AskOperator, IdentityStale) as error:
                text = f"the hub key stays at persist_at: {error.message}"
                self._journal.event("warning", text, WARNING, state=self._life.state, code=error.code)
            configuration = self._equipment.configuration
            if os.path.lexists(configuration.issued_key_path):
                from dps_agent.host.issued_keys import remove_key

                remove_key(configuration)  # first: what was cut behind it is another registration
            for record in sorted(configuration.forgotten, reverse=True):  # `progress` first: it is expendable
                yield Erase(record)
            self._driver.life = None  # nothing of it is to be stored any more
            self._journal.event("reset", "the assignment was erased; the device registers again", NOTICE)
            self._answer(command, 200, {"erased": list(configuration.records)})
            return True
        if command.name == "token":
            held = life.assignment
            if held is None:
                raise AskOperator("record.absent", "this device has no hub yet")
            yield ConfirmClock("")
            token = yield from hub_token(held, command.life_s)
            document = {"token": token.header(), "expiresAt": utc_text(token.expires_at_s)}
            self._answer(command, 200, {**document, "assignedHub": held.assigned_hub, "deviceId": held.device_id})
        elif command.name == "status":
            if self._registers():
                raise RetryLater("agent.busy", "a registration is under way")
            self._answer(command, 200, {})  # whoever asks looks it up: to do that here would keep the hub waiting
        elif life.assignment is not None and life.state in _ASSIGNED and not command.force:
            self._answer(command, 200, self._provisioned(already=True))
        elif life.state == PROVISIONING:
            self._registering.append(command)
        elif wait_s := self._patience_s():
            raise RetryLater("dps.throttled", f"DPS asked for patience: it may be asked again in {wait_s} s", wait_s)
        else:
            self._registering.append(command)
            if command.force:
                life.ask_to_register()
            self._hasty = life.state in (CONNECTING, *_WAITS)
        return False

    def _patience_s(self) -> int:
        """Seconds until DPS may be asked again, as it asked for; 0: now."""
        return max(math.ceil(self._life.patience.dps_not_before_s - self._clock.uptime_s()), 0)

    def _answer(self, command: Command, status: int, document: dict[str, Any]) -> None:
        if self._api is not None:
            self._api.answer(command.request_id, status, document)

    def _provisioned(self, already: bool) -> dict[str, Any]:
        held = self._life.assignment
        assert held is not None
        return {**assignment_document(held), "alreadyProvisioned": already}

    def _end_registration(self, status: int, document: dict[str, Any]) -> None:
        for command in self._registering:
            self._answer(command, status, document)
        self._registering.clear()

    # What others see.

    def _look(self, effect: Effect) -> Generator[Any, Any, None]:
        """Notices what the last step of the life has changed."""
        life, former = self._life, self._state
        held = life.assignment
        if held is not None and held != self._announced:
            self._announced = held
            if life.committed:
                self._counts.registrations["assigned"] += 1
                text = f"this device is {held.device_id} at {held.assigned_hub} ({held.substatus or held.status})"
                self._journal.event("assigned", text, NOTICE, state=life.state, hub=held.assigned_hub)
                self._end_registration(200, self._provisioned(already=False))
        # Not while a registration is under way, or waits to be stored: its record says what is at the handle.
        if held is not None and life.state != former and life.state in _ASSIGNED:
            yield from self._persist(held.wrapped_key)
        warnings = tpm_warnings(self._equipment.tpm)
        warnings += [ROLLED_BACK] if life.rolled_back else []
        warnings += [FLEET_REFUSED] if life.fleet_refused else []
        warnings += [life.renewal_trouble] if life.renewal_trouble else []
        for text in warnings:
            if text not in self._warned:
                self._warned.add(text)
                self._journal.event("warning", text, WARNING, state=life.state)
        if life.state != former:
            self._counts.registrations["failed"] += former == PROVISIONING and life.error is not None
            self._state = life.state
            self._since_s = time.monotonic()
            self._hasty = self._hasty and life.state in (BOOT, *_WAITS)
        failure = life.error or life.registration_error
        if failure is not None:
            news = {"code": failure.code, "message": printable(failure.message)[:TEXT_LIMIT]}
            self._note_news("lastError", news, ("code",))
        lacks = life.hub_lacks
        (lacked_of, lacked), hub = self._lacked, held.assigned_hub if held else ""
        self._lacked = (hub, lacks)
        if lacks and lacks != lacked:
            text = f"the hub has no {', '.join(lacks)}; telemetry goes on"
            self._journal.event("lacking", text, NOTICE, state=life.state)
        elif lacked and not lacks and hub == lacked_of:
            self._journal.event("lacking", "the hub lacks nothing any more", NOTICE, state=life.state)
        counts = life.connections, life.patience.failed
        shown = (life.state, self._why(), counts, life.error, held, lacks, life.fleet_refused)
        if shown != self._shown:
            self._shown = shown
            if not isinstance(effect, Sleep):
                self._show(self._why(), None)
        if life.state != former:
            self._announce(former, math.ceil(effect.delay_s) if isinstance(effect, Sleep) else None)

    def _persist(self, wrapped_key: bytes) -> Generator[Any, Any, None]:
        """Makes the stored hub key persistent for other programs, where the settings want that.

        Where that may work later, the next change of state tries again.
        """
        handle = self._equipment.configuration.tpm.persist_at
        if handle and wrapped_key != self._persisted_key:
            try:
                yield from kept_key.persist(self._equipment.tpm, handle)
                self._persisted_key = wrapped_key
            except (RetryLater, AskOperator, IdentityStale) as error:
                if not isinstance(error, RetryLater):
                    self._persisted_key = wrapped_key  # nobody will have mended that so soon
                text = f"the hub key is not at persist_at {handle:#x}: {error.message}"
                self._journal.event("warning", text, WARNING, state=self._life.state, code=error.code)

    def _announce(self, former: str, wait_s: int | None) -> None:
        """One line for a change of state that somebody cares about; `wait_s` is the wait that begins with it."""
        life = self._life
        state, error = life.state, life.error
        code = error.code if error else ""
        request_id = error.request_id if error else ""
        hub = life.assignment.assigned_hub if life.assignment else ""
        if state == PROVISIONING:
            self._journal.event("provisioning", f"registers with DPS: {life.reason}", state=state, hub=hub)
        elif state == CONNECTED:
            level = NOTICE if life.connections == 1 else INFO
            self._journal.event("connected", f"connected to {hub}", level, state=state, hub=hub)
            memory.give_back()  # it may stay as it is for months
        elif state in (WAITING, HALTED):
            event, level = ("halted", ERROR) if state == HALTED else ("waiting", WARNING)
            text = f"{life.reason}; tries again in {wait_s} s"
            if state == HALTED:
                text = f"{life.reason}; {REMEDIES.get(code, '')}; asks again in {wait_s} s"
            self._journal.event(
                event, text, level, state=state, code=code, hub=hub, retry_s=wait_s, request_id=request_id
            )
            if self._registering and error is not None:
                self._end_registration(503 if state == WAITING else 409, _error_of(error, wait_s))
        elif state == PROVISIONED and error is not None and former != BOOT:
            text = f"{life.reason}; {hub} stays the hub" if former == PROVISIONING else life.reason
            text += f"; connects again in {wait_s} s" if wait_s is not None else ""
            self._journal.event(
                "disconnected", text, WARNING, state=state, code=code, hub=hub, retry_s=wait_s, request_id=request_id
            )
            if former == PROVISIONING:
                self._end_registration(503 if isinstance(error, RetryLater) else 409, _error_of(error))
        elif state == PROVISIONED and former == BOOT:
            self._end_registration(200, self._provisioned(already=True))

    def _why(self) -> str:
        """Why the life is where it is, and what goes wrong beside that."""
        why, trouble = self._life.reason, self._life.renewal_trouble
        return f"{why}; {trouble}" if trouble and trouble not in why else why

    def _show(self, reason: str, until_s: float | None) -> None:
        """Tells systemd, the state file and the socket where the device stands, and until when it waits."""
        life, configuration = self._life, self._equipment.configuration
        now_s, utc_s = time.monotonic(), time.time()
        waits = until_s is not None and until_s - now_s >= 1
        until = utc_text(utc_s + until_s - now_s) if until_s is not None and waits else ""
        self._notifier.status(f"{life.state}: {reason}" + (f", until {until}" if until else ""))
        error, held = life.error, life.assignment
        document: dict[str, Any] = {
            "stateDir": os.path.abspath(configuration.state_dir),
            "socket": os.path.abspath(configuration.socket) if self._api is not None else "",
            "version": __version__,
            "backend": configuration.backend,
            "state": life.state,
            "reason": reason,
            "since": utc_text(utc_s - (now_s - self._since_s)),
            "sinceUptimeS": round(self._since_s, 3),
            "until": until,
            "untilUptimeS": round(until_s, 3) if until_s is not None and waits else None,
            "assignedHub": held.assigned_hub if held else "",
            "deviceId": held.device_id if held else "",
            "registrationId": held.registration_id if held else "",
            "substatus": held.substatus if held else "",
            "connections": life.connections,
            "hubLacks": life.hub_lacks,
            "fleetRefused": life.fleet_refused,
            "failedAttempts": life.patience.failed,
            "lastError": fields_of(error) if error else None,
            "next": next_step(life.state, error.code if error else "", waits, self._patience_s() > 0),
        }
        failed_before = self._state_file.failure
        self._state_file.show(document)
        if self._state_file.failure and not failed_before:
            self._journal.event("warning", self._state_file.failure, WARNING)
        if self._api is not None:
            retry_after_s = max(int(until_s - now_s) + 1, 1) if until_s is not None and waits else 5
            assignment = assignment_document(held) if held else None
            connected = life.state == CONNECTED and not self._leaving
            self._api.show(Snapshot(document, assignment, connected, min(retry_after_s, 3600)))


def _error_of(error: DpsError, retry_after_s: int | None = None) -> dict[str, Any]:
    return {"error": fields_of(error, retry_after_s)}


def _values(configuration: Configuration) -> dict[str, Any]:
    """The settings without where they came from."""
    return {name: value for name, value in vars(configuration).items() if name not in ("origins", "files")}


def _of_registration(configuration: Configuration) -> dict[str, Any]:
    """The settings that a registration under way depends on; the others are for the time after it."""
    values = {**_values(configuration), "hub": configuration.hub.hub_suffixes}
    return {name: value for name, value in values.items() if name not in ("fleet", "retry")}
