"""The fleet on real sockets: real cores, the agent's own HTTPS client, simulated TPMs; locust is the engine.

`tools/fleet load` starts locust with this file as its locustfile. Locust's users are places at which devices register,
one after the other, each under an id of its own, until the number that was asked for has begun. All devices of a
process share one simulated TPM, whose RSA keys take long to make.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

from dps_agent import effects
from dps_agent.host.network.https import DpsConnection
from dps_agent.lifecycle import PROVISIONED, Lifecycle
from dps_agent.settings import KEEP_ALIVE_S, POLL_LOOKUP, Settings
from dps_hal.contracts import Utc
from dps_hal.errors import DpsError
from dps_hal.host.simulator import SimulatedTpm

PREFIX = "DPS_FLEET_"


def load(arguments: Namespace) -> int:
    """Runs locust until all devices have registered, and says what it came to; its exit status."""
    with tempfile.TemporaryDirectory(prefix="dps-fleet-") as folder:
        results = Path(folder) / "results"
        results.touch()
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(sys.path),
            f"{PREFIX}CA_FILE": str(arguments.ca_file.resolve()),
            f"{PREFIX}ID_SCOPE": arguments.id_scope,
            f"{PREFIX}EACH": str(arguments.devices // arguments.at_once or 1),
            f"{PREFIX}RESULTS": str(results),
        }
        users = str(arguments.at_once)
        words = ["-f", __file__, "--headless", "--host", arguments.url, "--users", users, "--spawn-rate", users]
        limit = ["--run-time", f"{int(arguments.timeout)}s", "--only-summary"]
        began_s = time.monotonic()
        status = subprocess.call([sys.executable, "-m", "locust", *words, *limit, *arguments.locust], env=environment)
        lines = [json.loads(line) for line in results.read_text().splitlines()]
    found = _summary(lines, time.monotonic() - began_s)
    print("\n".join(f"{name:24} {value}" for name, value in found.items()))
    if arguments.json:
        arguments.json.write_text(json.dumps(found))
    return status if status else int(found["devices"] == 0 or found["failed"] > 0)


def _summary(lines: list[dict[str, Any]], wall_s: float) -> dict[str, Any]:
    number = max(len(lines), 1)
    return {
        "devices": len(lines),
        "failed": sum(not line["registered"] for line in lines),
        "seconds": round(max((line["endedS"] for line in lines), default=0) - _first_s(lines), 1),
        "wallS": round(wall_s, 1),
        "requestsADevice": round(sum(line["requests"] for line in lines) / number, 2),
        "refusedADevice": round(sum(line["refused"] for line in lines) / number, 2),
        "challengesADevice": round(sum(line["challenges"] for line in lines) / number, 3),
    }


def _first_s(lines: list[dict[str, Any]]) -> float:
    return min((float(line["beganS"]) for line in lines), default=0.0)


class Device:
    """One device: its core, its connection, and what it has asked for."""

    def __init__(self, url: str, tpm: SimulatedTpm, sleep: Any, told: Any) -> None:
        self.name = f"fleet-{os.getpid()}-{random.getrandbits(48):x}"
        port = url.rpartition(":")[2].rstrip("/")
        endpoint = "https://localhost"
        self._connection = DpsConnection(
            endpoint, connect_to=f"127.0.0.1:{port}", ca_file=os.environ[f"{PREFIX}CA_FILE"]
        )
        scope = os.environ[f"{PREFIX}ID_SCOPE"]
        suffixes = (".azure-devices.net",)
        self._life = Lifecycle(
            Settings(scope, self.name, endpoint, POLL_LOOKUP, None, 900, 0, suffixes, (0, 0, 0), KEEP_ALIVE_S, 0)
        )
        self._tpm = tpm
        self._sleep = sleep
        self._told = told
        self.counts = {"requests": 0, "refused": 0, "challenges": 0}

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
        with_token = " with token" if http.authorization else ""
        self._told(f"{http.method}{with_token}: {shown}", (time.monotonic() - began_s) * 1000)
        return answer


if "locust" in sys.modules:  # this file is the locustfile
    import gevent
    from locust import User, constant, task  # pyright: ignore[reportMissingImports]

    _TPM = SimulatedTpm(tempfile.mkdtemp(prefix="dps-fleet-tpm-"))
    _WAITING = {"users": 0}

    class Place(User):  # type: ignore[misc]
        """One place at which devices register."""

        wait_time = constant(0)

        def on_start(self) -> None:
            self.left = int(os.environ[f"{PREFIX}EACH"])
            _WAITING["users"] += 1

        @task  # type: ignore[untyped-decorator]
        def register(self) -> None:
            if not self.left:
                _WAITING["users"] -= 1
                if not _WAITING["users"] and self.environment.runner:
                    gevent.spawn(self.environment.runner.quit)
                gevent.sleep(1e6)
            self.left -= 1
            device = Device(str(self.host), _TPM, gevent.sleep, self._tell)
            began_s = time.time()
            registered = device.register()
            line = {"registered": registered, "beganS": began_s, "endedS": time.time(), **device.counts}
            with open(os.environ[f"{PREFIX}RESULTS"], "a") as results:
                results.write(json.dumps(line) + "\n")

        def _tell(self, name: str, took_ms: float) -> None:
            self.environment.events.request.fire(
                request_type="DPS", name=name, response_time=took_ms, response_length=0, exception=None, context={}
            )
