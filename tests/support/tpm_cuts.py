"""Cuts the power of TPM and agent together, between every two effects of a life, with a real swtpm behind it.

The agent's generator runs on `EsysTpm`, a `FileStore` in a folder and the emulator's `DpsService`. After the
n-th effect that leaves a trace swtpm is killed (SIGKILL, no TPM2_Shutdown) and the agent is dropped where it stands,
the answer lost. Both boot again, without an operator, and must end with a hub token that the service
accepts. What a cut inside a commit leaves is the matter of the other sweeps.
"""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dps_agent.assignment import hub_token
from dps_agent.effects import Commit, Http, ImportKey, LoadRecord, ReadEndorsementKey, ReadStorageRootKey, Reply, Sign
from dps_agent.lifecycle import PROVISIONED, Lifecycle
from dps_emulator.enrollments import Enrollment
from dps_emulator.service import DpsService, Request, Settings
from dps_hal.contracts import IDENTITY, PROGRESS
from dps_hal.errors import DpsError
from dps_hal.esys import EsysTpm
from dps_hal.files import FileStore
from support.blocklog import Unavailable
from support.flash import PowerCut, Supply
from support.swtpm import LOCKOUT_COUNTER, Swtpm
from support.world import DEVICE, NOW_S, World, settings

if TYPE_CHECKING:
    from dps_agent.assignment import Assignment

FIRST_HUB, SECOND_HUB = "emulator.azure-devices.net", "second.azure-devices.net"
WRITERS = ("", "evict-first")


class Bench(World):
    """One device with a real TPM, and the service; everything it keeps is in `folder`, `swtpm` and `service`."""

    def __init__(self, folder: Path, swtpm: Swtpm, service: DpsService, cut_at: int = 0, writer: str = "") -> None:
        super().__init__()
        self.service = service
        self.real_tpm = EsysTpm(swtpm.tcti)
        self.files = FileStore(str(folder))
        self.supply = Supply(cut_at)
        self.tokens = 0  # registrations that the service took
        self._evicts = writer == "evict-first"

    def answer(self, effect: Any) -> Any:
        """See `World.answer`; what leaves a trace in TPM, store or service is an event of the supply."""
        if isinstance(effect, LoadRecord):
            return self.files.load(effect.record)
        real = self._real(effect)
        if real is None:
            return super().answer(effect)
        answer = real()
        self.supply.spend()
        return answer

    def _real(self, effect: Any) -> Callable[[], Any] | None:
        match effect:
            case Http():
                return lambda: self._asked(effect)
            case ReadEndorsementKey():
                return self.real_tpm.endorsement_key
            case ReadStorageRootKey():
                return self.real_tpm.storage_root_key
            case ImportKey(activation):
                return lambda: self.real_tpm.import_key(activation)
            case Sign(wrapped_key, message):
                return lambda: self.real_tpm.sign(wrapped_key, message)
            case Commit(record, payload):
                return lambda: self.files.commit(record, payload)
        return None

    def _asked(self, http: Http) -> Reply:
        path, _, query = http.path.partition("?")
        headers = {"content-type": "application/json"}
        if http.authorization is not None:
            headers["authorization"] = http.authorization.header()
        response = self.service.answer(Request(http.method, path, query, headers, http.body), self._now_s())
        if http.method == "PUT" and response.status in (200, 202):
            self.tokens += 1
        if response.status == 401 and self._evicts:
            self.files.erase(IDENTITY)
        return Reply(response.status, {name.lower(): value for name, value in response.headers}, response.body, NOW_S)

    def _now_s(self) -> int:
        return NOW_S + int(self.uptime_s)

    def lived(self, force: bool = False) -> Lifecycle:
        """One life of the agent; waits inside it take no time."""
        life = Lifecycle(settings())
        self.run(life.live(False, force))
        return life

    def refusal(self, assignment: Assignment | None) -> str | None:
        """Why the service refuses a token that the device makes for its hub, or None."""
        if assignment is None:
            return "there is no assignment"
        token = self.run(hub_token(assignment, 3600))
        return self.service.hub_token_refusal(token.header(), self._now_s())

    def recover(self) -> Lifecycle:
        """What a device does that has power again; a hub that refuses its token makes it register again."""
        life = self.lived()
        if life.state == PROVISIONED and self.refusal(life.assignment):
            life = self.lived(force=True)
        return life


class Life(NamedTuple):
    """What is cut: a life of a device that was registered before (`held`) or not, under a service of these settings."""

    name: str
    held: bool
    settings: Settings
    move_to: str = ""
    step: Callable[[Bench], object] = Bench.recover


def _force(bench: Bench) -> None:
    bench.lived(force=True)


def _reset(bench: Bench) -> None:
    """`dps-agent reset`, then a new life; a cut between the two records as well."""
    for record in (IDENTITY, PROGRESS):
        bench.files.erase(record)
        bench.supply.spend()
    bench.lived()


_HUBS = {"hubs": (FIRST_HUB, SECOND_HUB), "retry_after_s": 0}
LIVES = (
    Life("first", False, Settings(**_HUBS)),  # type: ignore[arg-type]
    Life("other-hub", True, Settings(**_HUBS), SECOND_HUB, _force),  # type: ignore[arg-type]
    Life("new-key", True, Settings(**_HUBS, hub_key="rotate"), "", _force),  # type: ignore[arg-type]
    Life("same-key", True, Settings(**_HUBS), "", _force),  # type: ignore[arg-type]
    Life("lockout-key", True, Settings(**_HUBS, hub_key="rotate", no_da=False), "", _force),  # type: ignore[arg-type]
    Life("reset", True, Settings(**_HUBS), "", _reset),  # type: ignore[arg-type]
)


def sweep(writer: str = "", only: str = "", at_first: bool = False) -> tuple[int, list[str]]:
    """Number of states, and the lost ones. Raises Unavailable where there is no swtpm."""
    if shutil.which("swtpm") is None:
        raise Unavailable("this needs swtpm (package swtpm)")
    states = 0
    lost: list[str] = []
    with tempfile.TemporaryDirectory(prefix="powercut-") as text:
        folder = Path(text)
        with Swtpm(folder / "blank") as swtpm:  # its EK and SRK are made once for all
            tpm = EsysTpm(swtpm.tcti)
            tpm.endorsement_key()
            tpm.storage_root_key()
            tpm.release()
        for life in LIVES:
            found_states, found = _sweep_life(life, folder, writer, only, at_first)
            states += found_states
            lost += found
            if at_first and lost:
                break
    return states, lost


def _sweep_life(life: Life, folder: Path, writer: str, only: str, at_first: bool) -> tuple[int, list[str]]:
    state, tpm_state = folder / "state", folder / "tpm"
    kept, kept_tpm = folder / "kept", folder / "kept-tpm"
    service = DpsService(life.settings, {}, {}, os.urandom)
    shutil.rmtree(kept, ignore_errors=True)
    shutil.rmtree(kept_tpm, ignore_errors=True)
    shutil.copytree(folder / "blank", kept_tpm)
    with Swtpm(kept_tpm) as swtpm:
        bench = Bench(kept, swtpm, service)
        ek = bench.real_tpm.endorsement_key()
        service.enroll(Enrollment(DEVICE, ek, hubs=(FIRST_HUB,)))
        if life.held:
            bench.lived()
        bench.real_tpm.release()
    if life.move_to:
        service.move(DEVICE, life.move_to)
    states = 0
    lost = []
    cut = 0
    over = False
    while not over:
        cut += 1
        for old, new in ((kept, state), (kept_tpm, tpm_state)):
            shutil.rmtree(new, ignore_errors=True)
            if old.exists():
                shutil.copytree(old, new)
        with Swtpm(tpm_state) as swtpm:
            one = Bench(state, swtpm, copy.deepcopy(service), cut, writer)
            try:
                life.step(one)
                over = True
            except PowerCut:
                pass
            swtpm.kill()
            one.real_tpm.release()
            name = f"sweep=tpm life={life.name} cut={cut}"
            if only and name != only:
                continue
            states += 1
            swtpm.restart()
            fault = _fault(one, swtpm, state, life, over)
        if fault:
            lost.append(f"{name}: {fault}")
            if at_first:
                break
    return states, lost


def _fault(cut_off: Bench, swtpm: Swtpm, folder: Path, life: Life, over: bool) -> str:
    """What is wrong after the boot, or ""."""
    bench = Bench(folder, swtpm, cut_off.service)
    bench.uptime_s = cut_off.uptime_s
    try:
        end = bench.recover()
        if end.state != PROVISIONED:
            return f"it waits for somebody: {end.state}, {end.reason}"
        refusal = bench.refusal(end.assignment)
        if refusal:
            return f"the hub refuses its token: {refusal}"
    except DpsError as error:
        return f"{error.code} after the reboot: {error}"
    finally:
        bench.real_tpm.release()
    # The old identity is good until the service has taken another registration; then one more may be needed.
    spare = 0 if over or (life.held and life.step is not _reset and not cut_off.tokens) else 1
    if bench.tokens > spare:
        return f"it took {bench.tokens} registrations more where {spare} would do"
    if swtpm.leftovers():
        return f"the TPM still holds {swtpm.leftovers()}"
    if swtpm.property(LOCKOUT_COUNTER) > 1:
        return "one cut counted more than once against the TPM's lockout"
    return ""
