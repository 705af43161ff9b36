"""The fleet on real sockets: real cores, the agent's own HTTPS client, simulated TPMs; locust is the engine.

`tools/fleet load` starts locust with this file as its locustfile. Locust's users are places at which devices register,
one after the other, each under an id of its own. A place asks locust's master for each device that it begins and tells
it what became of that, in messages of locust's own, so that no more and no fewer begin than were asked for, and the
master knows of all, wherever its workers run. All devices of a process share one simulated TPM, whose RSA keys take
long to make.
"""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from dps_agent import effects
from dps_agent.host.network.https import DpsConnection
from dps_agent.lifecycle import PROVISIONED, Lifecycle
from dps_agent.settings import API_VERSION, AUTO, KEEP_ALIVE_S, POLL_LOOKUP, TPM, Settings
from dps_hal.contracts import Utc
from dps_hal.errors import DpsError
from dps_hal.host.simulator import SimulatedTpm

PREFIX = "DPS_FLEET_"
BUSY_S = 600  # a worker that is not heard for so long is lost
ASK, TURN, END = "fleet-ask", "fleet-turn", "fleet-end"  # messages: a place to the master, its answer, what came of it


def load(arguments: Namespace) -> int:
    """Runs locust until all devices have registered, and says what it came to; its exit status."""
    with tempfile.TemporaryDirectory(prefix="dps-fleet-") as folder:
        results = Path(folder) / "results"
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(sys.path),
            f"{PREFIX}CA_FILE": str(arguments.ca_file.resolve()),
            f"{PREFIX}ID_SCOPE": arguments.id_scope,
            f"{PREFIX}DEVICES": str(arguments.devices),
            f"{PREFIX}TIMEOUT_S": str(arguments.timeout),
            f"{PREFIX}FOLDER": folder,
        }
        begin = ["--users", str(arguments.at_once), "--spawn-rate", str(arguments.at_once / arguments.within)]
        words = ["-f", __file__, "--headless", "--host", arguments.url, *begin]
        command = [sys.executable, "-m", "locust", *words, "--only-summary", *arguments.locust]
        began_s = time.monotonic()
        status = _until_it_ends(command, environment)
        if "--worker" in arguments.locust:
            return status  # what it came to is the master's to say
        lines = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    found = summary(lines, arguments.devices, time.monotonic() - began_s)
    print("\n".join(f"{name:24} {value}" for name, value in found.items()))
    if arguments.json:
        arguments.json.write_text(json.dumps(found))
    return status or int(found["registered"] < arguments.devices)


def _until_it_ends(command: list[str], environment: dict[str, str]) -> int:
    """Runs locust, which SIGTERM and SIGHUP of this process end too; its exit status, as a shell has it."""
    begun: list[subprocess.Popen[bytes]] = []
    asked: list[int] = []

    def end(number: int, frame: object) -> None:
        asked.append(number)
        for process in begun:
            process.terminate()

    heard = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) == signal.SIG_DFL]
    for number in heard:
        signal.signal(number, end)
    try:
        with subprocess.Popen(command, env=environment) as process:
            begun.append(process)
            if asked:  # before there was a process to be told
                process.terminate()
            try:
                status = process.wait()
            except BaseException:  # Ctrl-C, which locust has heard as well
                process.kill()
                raise
    finally:
        for number in heard:
            signal.signal(number, signal.SIG_DFL)
    return status if status >= 0 else 128 - status


def summary(lines: list[dict[str, Any]], asked: int, wall_s: float) -> dict[str, Any]:
    """What it came to: a line for each device that began, of the number that was asked for; times are the master's."""
    number = max(len(lines), 1)
    registered = sum(line["registered"] for line in lines)
    ended_s = sorted(line["endedS"] for line in lines if line["registered"])
    requests, refused = (sum(line[name] for line in lines) for name in ("requests", "refused"))
    return {
        "asked": asked,
        "devices": len(lines),
        "registered": registered,
        "failed": asked - registered,
        "seconds": round(ended_s[-1], 1) if ended_s else 0.0,
        "secondsOf99Percent": round(ended_s[int(0.99 * (registered - 1))], 1) if ended_s else 0.0,
        "wallS": round(wall_s, 1),
        "requestsADevice": round(requests / number, 2),
        "refusedADevice": round(refused / number, 2),
        "refusedPercent": round(100 * refused / max(requests, 1), 2),
        "unansweredADevice": round(sum(line["unanswered"] for line in lines) / number, 3),
        "challengesADevice": round(sum(line["challenges"] for line in lines) / number, 3),
    }


class Device:
    """One device: its core, its connection, and what it has asked for."""

    def __init__(self, url: str, tpm: SimulatedTpm, sleep: Any, told: Any) -> None:
        self.name = f"fleet-{os.getpid()}-{random.getrandbits(48):x}"
        endpoint = f"https://{urlsplit(url).netloc}"
        self._connection = DpsConnection(endpoint, ca_file=os.environ[f"{PREFIX}CA_FILE"])
        scope = os.environ[f"{PREFIX}ID_SCOPE"]
        suffixes = (".azure-devices.net",)
        hub = ((0, 0, 0), KEEP_ALIVE_S, 0, 0, "", (AUTO,), TPM, "", API_VERSION)
        self._life = Lifecycle(Settings(scope, self.name, endpoint, POLL_LOOKUP, None, 900, 0, suffixes, *hub))
        self._tpm = tpm
        self._sleep = sleep
        self._told = told
        self.counts = {"requests": 0, "refused": 0, "challenges": 0, "unanswered": 0}

    def register(self) -> bool:
        """Lives until it is registered; whether it is."""
        exchange = self._life.live(False, False)
        try:
            effect = exchange.send(None)
            while True:
                try:
                    answer = self._answer(effect)
                except DpsError as error:
                    effect = exchange.throw(error)
                else:
                    effect = exchange.send(answer)
        except StopIteration:
            return self._life.state == PROVISIONED
        finally:
            exchange.close()
            self._connection.close()

    def _answer(self, effect: Any) -> Any:
        match effect:
            case effects.Http():
                return self._request(effect)
            case effects.Sleep():
                if effect.delay_s > 60:
                    self._connection.close()
                self._sleep(effect.delay_s)
                return None
            case effects.Uptime():
                return time.monotonic()
            case effects.UtcNow():
                return Utc(int(time.time()), True, "system")
            case effects.Random():
                return random.random()
            case effects.ReadEndorsementKey():
                return self._tpm.endorsement_key()
            case effects.ReadStorageRootKey():
                return self._tpm.storage_root_key()
            case effects.ImportKey():
                return self._tpm.import_key(effect.activation)
            case effects.Sign():
                return self._tpm.sign(effect.wrapped_key, effect.message)
        return None  # the records: this device is a new one, and forgets

    def _request(self, http: effects.Http) -> Any:
        began_s = time.monotonic()
        answer = self._connection.request(*http)
        status = answer.status if isinstance(answer, effects.Reply) else 0
        shown = answer.status if isinstance(answer, effects.Reply) else answer.reason
        self.counts["requests"] += 1
        self.counts["refused"] += status == 429
        self.counts["challenges"] += status == 401
        self.counts["unanswered"] += not status
        with_token = " with token" if http.authorization else ""
        self._told(f"{http.method}{with_token}: {shown}", (time.monotonic() - began_s) * 1000)
        return answer


if "locust" in sys.modules:  # this file is the locustfile
    import gevent
    from gevent import queue
    from locust import User, constant, events, runners, task  # pyright: ignore[reportMissingImports]

    from dps_agent.host.network import dial

    # Thousands of places that shake hands at once keep a worker of a busy machine from its
    # heartbeat: it is busy then, not gone, and to stop its devices would make failures of them.
    runners.HEARTBEAT_LIVENESS = runners.MASTER_HEARTBEAT_TIMEOUT = BUSY_S
    dial._without_codec = str  # type: ignore[assignment]  # gevent's sockets take names as text only
    _TURNS: Any = queue.Queue()  # the master's answers: whether one more device may begin
    _TPMS: list[SimulatedTpm] = []

    def _tpm() -> SimulatedTpm:
        if not _TPMS:
            _TPMS.append(SimulatedTpm(tempfile.mkdtemp(dir=os.environ[f"{PREFIX}FOLDER"])))
        return _TPMS[0]

    class Conductor:
        """What the master knows: how many devices may still begin, and what became of the others."""

        def __init__(self, runner: Any) -> None:
            self._runner = runner
            self._left = self._running = int(os.environ[f"{PREFIX}DEVICES"])
            self._began_s = 0.0
            runner.register_message(ASK, self._asked)
            runner.register_message(END, self._ended)
            gevent.spawn_later(float(os.environ[f"{PREFIX}TIMEOUT_S"]), runner.stop)
            # However it ends, also where locust has no worker left: the places have told by then what they left undone.
            events.test_stop.add_listener(lambda environment, **others: gevent.spawn(runner.quit))

        def _asked(self, environment: Any, msg: Any) -> None:
            self._began_s = self._began_s or time.monotonic()
            may = self._left > 0
            self._left -= may
            self._runner.send_message(TURN, may, msg.node_id)

        def _ended(self, environment: Any, msg: Any) -> None:
            line = {**msg.data, "endedS": time.monotonic() - self._began_s}
            with open(os.path.join(os.environ[f"{PREFIX}FOLDER"], "results"), "a") as results:
                results.write(json.dumps(line) + "\n")
            self._running -= 1
            if not self._running:
                gevent.spawn(self._runner.stop)

    @events.init.add_listener  # type: ignore[untyped-decorator]
    def _begin(environment: Any, **others: Any) -> None:
        runner = environment.runner
        if isinstance(runner, (runners.LocalRunner, runners.WorkerRunner)):
            runner.register_message(TURN, lambda environment, msg: _TURNS.put(msg.data))
        if isinstance(runner, (runners.LocalRunner, runners.MasterRunner)):
            Conductor(runner)

    class Place(User):  # type: ignore[misc]
        """One place at which devices register."""

        wait_time = constant(0)

        @task  # type: ignore[untyped-decorator]
        def register(self) -> None:
            runner = self.environment.runner
            runner.send_message(ASK)
            if not _TURNS.get():
                gevent.sleep(1e6)  # until the master ends the run
            device = Device(str(self.host), _tpm(), gevent.sleep, self._tell)
            registered = False
            try:
                registered = device.register()
            finally:  # the end of the run too ends a device
                runner.send_message(END, {"registered": registered, **device.counts})

        def _tell(self, name: str, took_ms: float) -> None:
            self.environment.events.request.fire(
                request_type="DPS", name=name, response_time=took_ms, response_length=0, exception=None, context={}
            )
