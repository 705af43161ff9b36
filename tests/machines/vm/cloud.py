"""The cloud's side: the emulator on this machine, asked what has arrived there."""

import re
import subprocess
import threading
import time
from pathlib import Path
from queue import Empty, Queue
from typing import Any

from dps_emulator.control_socket import ControlError, call
from dps_emulator.hub import HubLine
from dps_emulator.server import LogLine

ID_SCOPE = "0ne0000BEEF"
HUBS = ("north.azure-devices.net", "south.azure-devices.net")
START_DEADLINE_S = 60
STOP_DEADLINE_S = 10


class Cloud:
    """One running emulator; each registration goes to the other hub and gets another key."""

    def __init__(self, folder: Path, programs: Path) -> None:
        self.state_dir = folder / "cloud"
        self.ca_file = folder / "ca.pem"
        self._program = str(programs / "dps-emulator")
        self._log = folder / "cloud.log"
        self._process = subprocess.Popen(
            [
                *(self._program, "serve", "--id-scope", ID_SCOPE, "--state-dir", str(self.state_dir)),
                *("--ca-file", str(self.ca_file), "--log-file", str(self._log)),
                *(word for hub in HUBS for word in ("--hub", hub)),
                *("--allocation", "rotate", "--hub-key", "rotate", "--assign-after", "1", "--retry-after", "1"),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        lines: Queue[str] = Queue()
        threading.Thread(target=self._forward, args=(lines,), daemon=True).start()
        self.port = self._port(lines, r"listening on https://[^\s:]+:(\d+)")
        self.hub_port = self._port(lines, r"hubs on mqtts://[^\s:]+:(\d+)")

    def _forward(self, lines: "Queue[str]") -> None:
        for line in self._process.stdout or ():
            lines.put(line)

    def _port(self, lines: "Queue[str]", pattern: str) -> int:
        try:
            match = re.search(pattern, lines.get(timeout=START_DEADLINE_S))
        except Empty:
            match = None
        if match is None:
            self.stop()
            raise RuntimeError("the emulator did not start")
        return int(match[1])

    def stop(self) -> None:
        """Ends the emulator; idempotent."""
        self._process.terminate()
        try:
            self._process.wait(STOP_DEADLINE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def call(self, command: str, **request: Any) -> Any:
        """The emulator's answer to one of its commands."""
        return call(self.state_dir, {"command": command, **request})

    def enroll(self, table: str) -> None:
        """Adds the devices of a CSV text with its header."""
        words = [self._program, "enroll-import", "-", "--state-dir", str(self.state_dir)]
        subprocess.run(words, input=table, text=True, check=True, capture_output=True, timeout=START_DEADLINE_S)

    def connected_hub(self) -> str:
        """The hub that a device is connected to, empty if none is."""
        return next((device["hub"] for device in self.call("devices")["devices"] if device["connected"]), "")

    def has_message(self, text: str) -> bool:
        """Whether this text has arrived as telemetry."""
        return any(message.get("payload") == text for message in self.call("messages")["messages"])

    def disconnect(self) -> None:
        """Ends every device's connection."""
        for device in self.call("devices")["devices"]:
            if device["connected"]:
                self.call("disconnect", device=device["deviceId"], hub=device["hub"])

    def log_size(self) -> int:
        """Where the log ends now, for `requests_since` and `events_since`."""
        return self._log.stat().st_size if self._log.exists() else 0

    def _lines_since(self, start: int) -> list[str]:
        with self._log.open("rb") as file:
            file.seek(start)
            return file.read().rpartition(b"\n")[0].decode().splitlines()

    def requests_since(self, start: int) -> list[LogLine]:
        """The requests to DPS that were answered since."""
        found = [LogLine.parse(line) for line in self._lines_since(start)]
        return [line for line in found if line is not None and line.operation]

    def events_since(self, start: int, event: str) -> list[HubLine]:
        """What has happened at the hubs since."""
        found = [HubLine.parse(line) for line in self._lines_since(start)]
        return [line for line in found if line is not None and line.event == event]

    def wait_for_requests(self, start: int, count: int, deadline_s: float) -> bool:
        """Waits until DPS has answered so many requests since; whether it did in time."""
        until_s = time.monotonic() + deadline_s
        while len(self.requests_since(start)) < count:
            if time.monotonic() > until_s:
                return False
            time.sleep(0.01)
        return True


__all__ = ["HUBS", "ID_SCOPE", "Cloud", "ControlError"]
