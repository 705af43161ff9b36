"""Cuts the power of TPM and agent together, between every two effects of a life, with a real swtpm behind it.

The agent is a process of its own: the generator on a back end and a `FileStore`. The service, the emulator's
`DpsService`, is in this process. After the n-th effect that leaves a trace the agent waits, and both it and swtpm are
killed (SIGKILL, no TPM2_Shutdown), the answer lost. Each EvictControl counts by itself, as it changes the TPM's NV
memory. Of its folder that is left which was synced. In one of the lives each write and sync of a file counts as well;
after a write all is left, as where another program syncs. Both boot again, without an operator, and must end with a
hub token that the service accepts, and with `persist_at` with the key of that hub at its handle.
"""

from __future__ import annotations

import copy
import multiprocessing
import os
import shutil
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dps_agent.driver import TpmCall
from dps_agent.effects import Commit, Http, ImportKey, LoadRecord, ReadEndorsementKey, ReadStorageRootKey, Reply, Sign
from dps_agent.host import kept_key
from dps_agent.lifecycle import PROVISIONED, Lifecycle
from dps_agent.signing import hub_token
from dps_emulator.enrollments import Enrollment
from dps_emulator.service import DpsService, Request, Settings
from dps_hal.contracts import IDENTITY, PROGRESS
from dps_hal.errors import DpsError
from dps_hal.host.files import FileStore, SystemCalls
from dps_hal.tpm.keys import object_name, unwrap
from support.cloud.memory import PlainRegistrations
from support.disk.blocklog import Unavailable
from support.disk.disk_cuts import ForgetsTheFolder, OnFiles, Writer
from support.disk.faulty_writers import InPlace, Naive, SingleSlot
from support.disk.work_folder import work_folder
from support.tpm.backends import BACK_ENDS
from support.tpm.swtpm import LOCKOUT_COUNTER, Swtpm
from support.world import DEVICE, NOW_S, World, settings

if TYPE_CHECKING:
    from dps_agent.assignment import Assignment

FIRST_HUB, SECOND_HUB = "emulator.azure-devices.net", "second.azure-devices.net"
PERSIST_AT = 0x81000100
EVICTS = "evict-first"  # a faulty agent: gives the old identity up at the challenge
FORGETS = "forgets-its-key"  # another: its records do not say which key of ours is at `persist_at`
WRITERS: dict[str, Writer] = {
    "": FileStore,
    EVICTS: FileStore,
    FORGETS: FileStore,
    "naive": partial(OnFiles, Naive),
    "in-place": partial(OnFiles, InPlace),
    "single-slot": partial(OnFiles, SingleSlot),
    "no-directory-fsync": ForgetsTheFolder,
}
SHOWS_IN = {
    "naive": "first",
    "no-directory-fsync": "first",
    "in-place": "same-key",
    "single-slot": "same-key",
    FORGETS: "persist-wire",
}
PATIENCE_S = 180.0  # for the agent's next word


class DurableCalls(SystemCalls):
    """The real system calls; what is synced of the folder is copied to `durable`, all that a power cut leaves."""

    def __init__(self, durable: Path, changed: Callable[[bool], None]) -> None:
        self._durable = durable
        self._changed = changed
        self._paths: dict[int, Path] = {}
        self._synced: dict[str, bytes] = {}

    def open(self, path: str, flags: int, mode: int = 0) -> int:
        """open(2)."""
        fd = super().open(path, flags, mode)
        self._paths[fd] = Path(path)
        return fd

    def pwrite(self, fd: int, content: bytes, offset: int) -> int:
        """pwrite(2)."""
        taken = super().pwrite(fd, content, offset)
        self._changed(True)
        return taken

    def fsync(self, fd: int) -> None:
        """fsync(2), and the copy."""
        super().fsync(fd)
        path = self._paths[fd]
        if path.is_file():
            self._synced[path.name] = path.read_bytes()
            if (self._durable / path.name).exists():
                (self._durable / path.name).write_bytes(self._synced[path.name])
        elif path.name == STATE:
            for name in os.listdir(path):
                if name in self._synced or not (self._durable / name).exists():
                    (self._durable / name).write_bytes(self._synced.get(name, b""))
        else:
            self._durable.mkdir(exist_ok=True)
        self._changed(False)


STATE, DURABLE, TPM = "state", "durable", "tpm"  # of the work folder: the agent's, what a cut leaves of it, swtpm's


class Bench(World):
    """The agent's process: one device with a real TPM; what is elsewhere it asks for over `link`."""

    def __init__(
        self, folder: Path, tcti: str, link: Connection, uptime_s: float, writer: str, life: Life, cut: bool
    ) -> None:
        super().__init__()
        self.uptime_s = uptime_s
        self.real_tpm = BACK_ENDS[life.backend](tcti)
        evict_control = self.real_tpm._evict_control  # type: ignore[attr-defined]
        self.real_tpm._evict_control = lambda *words: self._and_event(evict_control(*words))  # type: ignore[attr-defined]
        self._link = link
        calls = DurableCalls(folder / DURABLE, self.event if life.inside and cut else lambda _: None)
        self.files = WRITERS[writer](str(folder / STATE), calls)
        self._evicts = writer == EVICTS
        self._forgets = writer == FORGETS
        self._persist_at = life.persist_at

    def _and_event(self, answer: Any) -> Any:
        self.event()
        return answer

    def event(self, all_is_left: bool = False) -> None:
        """Something was done that leaves a trace; the process may end here."""
        self.ask("event", self.uptime_s, all_is_left)

    def ask(self, what: str, *words: Any) -> Any:
        """Says or asks something, and waits for the answer."""
        self._link.send((what, words))
        return self._link.recv()

    def answer(self, effect: Any) -> Any:
        """See `World.answer`; what leaves a trace in TPM, store or service is an event of the supply."""
        if isinstance(effect, LoadRecord):
            return self.files.load(effect.record)
        real = self._real(effect)
        if real is None:
            return super().answer(effect)
        answer = real()
        self.event()
        return answer

    def _real(self, effect: Any) -> Callable[[], Any] | None:
        match effect:
            case Http():
                return lambda: self._asked(effect)
            case ReadEndorsementKey(name):
                return lambda: self.real_tpm.endorsement_key(name)
            case ReadStorageRootKey():
                return self.real_tpm.storage_root_key
            case ImportKey(activation):
                return lambda: self.real_tpm.import_key(activation)
            case Sign(wrapped_key, message):
                return lambda: self.real_tpm.sign(wrapped_key, message)
            case Commit(record, payload):
                return lambda: self.files.commit(record, payload)
            case TpmCall(call):
                return call
        return None

    def _asked(self, http: Http) -> Reply:
        path, _, query = http.path.partition("?")
        headers = {"content-type": "application/json"}
        if http.authorization is not None:
            headers["authorization"] = http.authorization.header()
        response = self.ask("http", Request(http.method, path, query, headers, http.body), self._now_s())
        if response.status == 401 and self._evicts:
            self.files.erase(IDENTITY)
        return Reply(response.status, {name.lower(): value for name, value in response.headers}, response.body, NOW_S)

    def _now_s(self) -> int:
        return NOW_S + int(self.uptime_s)

    def lived(self, force: bool = False) -> Lifecycle:
        """One life of the agent; waits inside it take no time."""
        beside = None if self._forgets else lambda: kept_key.entry(self.real_tpm, self._persist_at)
        life = Lifecycle(settings(), beside=beside)
        self.run(life.live(False, force))
        if self._persist_at and life.state == PROVISIONED:
            self.run(kept_key.persist(self.real_tpm, self._persist_at))
        return life

    def reset(self) -> None:
        """`dps-agent reset`; a cut between the two records as well."""
        self.run(kept_key.withdraw(self.real_tpm, self._persist_at))
        for record in (IDENTITY, PROGRESS):
            self.files.erase(record)
            self.event()

    def dead_key(self, assignment: Assignment | None) -> str:
        """What other programs find instead of the hub key, or ""."""
        if not self._persist_at or assignment is None:
            return ""
        name = self.real_tpm.name_at(self._persist_at)
        return "" if name == object_name(unwrap(assignment.wrapped_key)[0]) else name.hex() or "nothing"

    def refusal(self, assignment: Assignment | None) -> str | None:
        """Why the service refuses a token that the device makes for its hub, or None."""
        if assignment is None:
            return "there is no assignment"
        token = self.run(hub_token(assignment, 3600))
        refusal: str | None = self.ask("refusal", token.header(), self._now_s())
        return refusal

    def recover(self) -> Lifecycle:
        """What a device does that has power again; a hub that refuses its token makes it register again."""
        life = self.lived()
        if life.state == PROVISIONED and self.refusal(life.assignment):
            life = self.lived(force=True)
        return life


class Agent:
    """The agent seen from outside, over the processes that it is; `fault` is what the last one said is wrong, or ""."""

    def __init__(self, folder: Path, swtpm: Swtpm, service: DpsService) -> None:
        self._folder = folder
        self._swtpm = swtpm
        self._service = service
        self.uptime_s = 100.0
        self.tokens = 0  # registrations that the service took
        self.fault = ""
        self.ended = False
        self.all_is_left = False  # of the folder, not only what was synced

    def live(self, life: Life, step: Step, cut_at: int = 0, writer: str = "") -> None:
        """One process does `step`; at its `cut_at`-th event it and the TPM are killed."""
        fork = multiprocessing.get_context("fork")
        ours, theirs = fork.Pipe()
        words = (self._folder, self._swtpm.tcti, theirs, self.uptime_s, writer, life, cut_at > 0)
        process = fork.Process(target=_be_the_agent, args=(ours, step, words), daemon=True)
        process.start()
        theirs.close()
        try:
            self._serve(ours, cut_at)
        finally:
            process.kill()  # SIGKILL; where it has ended by itself nothing happens
            process.join()
            process.close()
            ours.close()

    def _serve(self, link: Connection, cut_at: int) -> None:
        events = 0
        while True:
            if not link.poll(PATIENCE_S):
                raise RuntimeError(f"the agent said nothing for {PATIENCE_S:g} s")
            try:
                what, words = link.recv()
            except EOFError:
                raise RuntimeError("the agent's process ended without a word") from None
            answer: Any = None
            match what:
                case "event":
                    events += 1
                    self.uptime_s, self.all_is_left = words
                    if events == cut_at:
                        return
                case "http":
                    answer = self._service.answer(*words)
                    if words[0].method == "PUT" and answer.status in (200, 202):
                        self.tokens += 1
                case "refusal":
                    answer = self._service.hub_token_refusal(*words)
                case "ended":
                    self.ended = True
                    (self.fault,) = words
                    return
            link.send(answer)


def _be_the_agent(parents: Connection, step: Step, words: tuple[Any, ...]) -> None:
    """The process: does `step`, says what came of it, and ends; also where nobody listens any more."""
    parents.close()
    bench = Bench(*words)
    try:
        try:
            fault = step(bench)
        except DpsError as error:
            fault = f"{error.code}: {error}"
        bench.real_tpm.release()
        bench.ask("ended", fault)
    except (EOFError, OSError):
        pass  # the one that asks has ended, or heard enough


Step = Callable[[Bench], str]


class Life(NamedTuple):
    """What is cut: a life of a device that was registered before (`held`) or not, under a service of these settings."""

    name: str
    held: bool
    settings: Settings
    step: Step
    move_to: str = ""
    keeps: bool = False  # the old hub and key stay good
    inside: bool = False  # cut at each change of a file as well
    backend: str = "esys"
    persist_at: int = 0  # where the hub key is kept for other programs as well
    bare: bool = False  # the TPM has neither EK nor SRK


def _boot(bench: Bench) -> str:
    """Boots, and says what is wrong then, or ""."""
    end = bench.recover()
    if end.state != PROVISIONED:
        return f"it waits for somebody: {end.state}, {end.reason}"
    refusal = bench.refusal(end.assignment)
    if refusal:
        return f"the hub refuses its token: {refusal}"
    found = bench.dead_key(end.assignment)
    return f"other programs find {found} where the hub key should be" if found else ""


def _force(bench: Bench) -> str:
    bench.lived(force=True)
    return ""


def _reset(bench: Bench) -> str:
    """`dps-agent reset`, then a new life."""
    bench.reset()
    bench.lived()
    return ""


_HUBS = {"hubs": (FIRST_HUB, SECOND_HUB), "retry_after_s": 0}
_ROTATES = Settings(**_HUBS, hub_key="rotate")  # type: ignore[arg-type]
LIVES = (
    Life("first", False, Settings(**_HUBS), _boot),  # type: ignore[arg-type]
    Life("other-hub", True, Settings(**_HUBS), _force, SECOND_HUB),  # type: ignore[arg-type]
    Life("new-key", True, Settings(**_HUBS, hub_key="rotate"), _force),  # type: ignore[arg-type]
    Life("same-key", True, Settings(**_HUBS), _force, keeps=True, inside=True),  # type: ignore[arg-type]
    Life("lockout-key", True, Settings(**_HUBS, hub_key="rotate", no_da=False), _force),  # type: ignore[arg-type]
    Life("reset", True, Settings(**_HUBS), _reset),  # type: ignore[arg-type]
    *(
        Life(f"{name}-{backend}", held, _ROTATES, step, backend=backend, persist_at=PERSIST_AT, bare=not held)
        for backend in BACK_ENDS
        for name, held, step in (("first-boot", False, _boot), ("persist", True, _force))
    ),
    Life("persist-reset", True, _ROTATES, _reset, backend="wire", persist_at=PERSIST_AT),
)


def sweep(writer: str = "", only: str = "", at_first: bool = False) -> tuple[int, list[str]]:
    """Number of states, and the lost ones. Raises Unavailable where there is no swtpm."""
    if shutil.which("swtpm") is None:
        raise Unavailable("this needs swtpm (package swtpm)")
    states = 0
    lost: list[str] = []
    with work_folder() as folder:
        with Swtpm(folder / "bare" / TPM, ends_with_thread=True):
            pass  # it has its seeds now
        _copy(folder / "bare", folder / "blank")
        with Swtpm(folder / "blank" / TPM, ends_with_thread=True) as swtpm:  # its EK and SRK are made once for all
            tpm = BACK_ENDS["esys"](swtpm.tcti)
            endorsement_key = tpm.endorsement_key()
            tpm.storage_root_key()
            tpm.release()
        for life in sorted(LIVES, key=lambda life: life.name != SHOWS_IN.get(writer)):  # there it is caught soonest
            if only and not only.startswith(f"sweep=tpm life={life.name} "):
                continue
            found_states, found = _sweep_life(life, folder, endorsement_key, writer, only, at_first)
            states += found_states
            lost += found
            if at_first and lost:
                break
    return states, lost


def _sweep_life(
    life: Life, folder: Path, endorsement_key: bytes, writer: str, only: str, at_first: bool
) -> tuple[int, list[str]]:
    before, now = folder / "before", folder / "now"
    service = DpsService(life.settings, {}, PlainRegistrations(), os.urandom)
    service.enroll(Enrollment(DEVICE, endorsement_key, hubs=(FIRST_HUB,)))
    _copy(folder / ("bare" if life.bare else "blank"), before)
    if life.held:
        with Swtpm(before / TPM, ends_with_thread=True) as swtpm:
            Agent(before, swtpm, service).live(life, _boot)
    if life.move_to:
        service.move(DEVICE, life.move_to)
    states = 0
    lost = []
    cut = 0
    over = False
    while not over:
        cut += 1
        _copy(before, now)
        with Swtpm(now / TPM, ends_with_thread=True) as swtpm:
            agent = Agent(now, swtpm, copy.deepcopy(service))
            agent.live(life, life.step, cut, writer)
            swtpm.kill()
            over = agent.ended
            name = f"sweep=tpm life={life.name} cut={cut}"
            if only and name != only:
                continue
            states += 1
            if not agent.all_is_left or over:
                _copy(now / DURABLE, now / STATE)
            swtpm.restart()
            fault = agent.fault or _fault(agent, swtpm, life, writer)
        if fault:
            lost.append(f"{name}: {fault}")
            if at_first:
                break
    return states, lost


def _copy(old: Path, new: Path) -> None:
    """Makes `new` what `old` is."""
    shutil.rmtree(new, ignore_errors=True)
    if old.exists():
        shutil.copytree(old, new)


def _fault(agent: Agent, swtpm: Swtpm, life: Life, writer: str) -> str:
    """What is wrong after the boot, or ""."""
    # The old identity is good until the service has taken another registration; then one more may be needed.
    old_is_good = life.held and life.step is not _reset and (life.keeps or not agent.tokens)
    spare = 0 if agent.ended or old_is_good else 1
    agent.tokens = 0
    agent.live(life, _boot, writer="" if writer == EVICTS else writer)
    if agent.fault:
        return f"after the reboot {agent.fault}"
    if agent.tokens > spare:
        return f"it took {agent.tokens} registrations more where {spare} would do"
    if swtpm.leftovers():
        return f"the TPM still holds {swtpm.leftovers()}"
    if swtpm.property(LOCKOUT_COUNTER) > 1:
        return "one cut counted more than once against the TPM's lockout"
    return ""
