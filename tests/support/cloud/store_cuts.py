"""Kills an emulator's life at every statement to its database, and looks at what is left; `main` prints what is wrong.

The life begins with the files of an earlier release, and is one process: SIGKILL ends it when SQLite begins its n-th
statement, or before the n-th file is deleted that was taken over. What it had acknowledged by then it has told through
a pipe: that must be there afterwards, and what was under way must be there whole or not at all.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import random
import shutil
import signal
import sqlite3
import sys
import tempfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from dps_emulator import mqtt
from dps_emulator.enrollments import Enrollment
from dps_emulator.hub import HubContext, Hubs, Link
from dps_emulator.registrations import StateError
from dps_emulator.service import DpsService, Request, Settings
from dps_emulator.state import open_store
from dps_emulator.store import Store
from emulator.device_side import Device, operation_path, register_path
from support.cloud.emulator import DeviceCredentials

OLD_STATE = Path(__file__).parents[2] / "vectors/old_state"
ONE, TWO = "emulator.azure-devices.net", "two.azure-devices.net"
NOW_S = 1_790_000_000.0
DEVICE = Device.of_the_vectors()
RID = DEVICE.registration_id
DEVICE_ID = "press-07"

Say = Callable[[str, Any], None]


class Wire:
    """A connection that hands the identifier of each PUBACK on."""

    def __init__(self, acknowledged: Callable[[int], None]) -> None:
        self._acknowledged = acknowledged

    def send(self, packet: bytes) -> None:
        """See dps_emulator.hub.Wire."""
        if packet[0] >> 4 == 4:
            self._acknowledged(int.from_bytes(packet[2:4]))

    def drop(self) -> None:
        """See dps_emulator.hub.Wire."""


class Life:
    """What one process does, and tells of."""

    def __init__(self, folder: Path, say: Say) -> None:
        self.say = say
        self.held: list[str] | None = None
        self.store = open_store(folder)
        self.service = DpsService(
            Settings(hubs=(ONE, TWO), retry_after_s=None),
            self.store.enrollments,
            self.store.registrations,
            random.Random(1).randbytes,
        )
        context = HubContext(self.store.messages, random.Random(2).randbytes, 300, lambda line: None)
        self.hubs = Hubs(self.service, self.store.devices, context)

    def run(self) -> None:
        """All of it, from the take-over to the end."""
        self.say("taken over", True)
        with self.store.transaction():
            self.store.enrollments.put((name, Enrollment(name, DEVICE.ek_public)) for name in ("press-10", "press-11"))
        self.say("imported", ["press-10", "press-11"])
        link = self.connect(ONE, self.provision())
        self.speak(link, ONE)
        self.service.move(RID, TWO)
        self.say("to be moved", TWO)
        link = self.connect(TWO, self.provision())
        self.speak(link, TWO)
        self.hubs.find("press-09", ONE).enable("press-09", True, NOW_S)
        self.say("enabled", ["press-09"])
        del self.store.enrollments["press-11"]
        self.say("deleted", ["press-11"])
        self.store.close()

    def ask(self, method: str, path: str, token: str | None = None) -> Any:
        """One request to DPS, as the server hands it on."""
        headers = {"content-type": "application/json"} | ({"authorization": token} if token else {})
        body = b"" if method == "GET" else json.dumps({"registrationId": RID, "tpm": DEVICE.attestation()}).encode()
        with self.store.transaction():
            answer = self.service.answer(Request(method, path, "api-version=2021-10-01", headers, body), NOW_S)
        return json.loads(answer.body)

    def provision(self) -> DeviceCredentials:
        """A whole registration; the hub key is acknowledged with the answer that has it."""
        key = DEVICE.activate(self.ask("PUT", register_path(RID))["authenticationKey"])
        token = key.token(f"0ne00000000%2Fregistrations%2F{RID}", int(NOW_S) + 3600)
        operation = self.ask("PUT", register_path(RID), token)["operationId"]
        state = self.ask("GET", operation_path(RID, operation), token)["registrationState"]
        hub_key = DEVICE.activate(state["tpm"]["authenticationKey"]).key
        self.say("assigned", [state["assignedHub"], base64.b64encode(hub_key).decode()])
        return DeviceCredentials(state["assignedHub"], state["deviceId"], hub_key)

    def connect(self, hub: str, device: DeviceCredentials) -> Link:
        """The device at its hub."""
        password = device.token(NOW_S).encode()
        connect = mqtt.Connect(mqtt.LEVEL, device.device_id, device.user_name, password, clean_session=False)
        link = self.hubs.connect(Wire(lambda number: self.acknowledged(f"{hub} {number}")), connect, hub, NOW_S)
        assert link is not None, f"the key does not get in at {hub}"
        return link

    def acknowledged(self, payload: str) -> None:
        """Tells of an acknowledged message at once, or with the others of the turn."""
        if self.held is None:
            self.say("telemetry", payload)
        else:
            self.held.append(payload)

    def speak(self, link: Link, hub: str) -> None:
        """Telemetry, twin and a message, each acknowledged when the hub has it."""
        events = f"devices/{DEVICE_ID}/messages/events/"
        for number in range(1, 4):
            link.received(mqtt.Publish(events, f"{hub} {number}".encode(), 1, packet_id=number), NOW_S)
        self.held = []
        with self.store.messages.gathered():  # as a connection does with what comes in one piece
            for number in range(4, 7):
                link.received(mqtt.Publish(events, f"{hub} {number}".encode(), 1, packet_id=number), NOW_S)
        held, self.held = self.held, None
        for payload in held:
            self.say("telemetry", payload)
        link.received(
            mqtt.Publish("$iothub/twin/PATCH/properties/reported/?$rid=1", b'{"%s":1}' % hub[:3].encode()), NOW_S
        )
        self.say("reported", hub[:3])
        message_id = self.hubs.find(DEVICE_ID, hub).send(DEVICE_ID, b"x", {}, NOW_S, 3600)
        self.say("queued", [hub, message_id])


def look(folder: Path, told: list[tuple[str, Any]]) -> list[str]:
    """What is missing of what a life had told, or is there in halves."""
    wrong = []

    def claim(what: str, holds: bool) -> None:
        if not holds:
            wrong.append(what)

    with closing(open_store(folder)) as store:
        store.check()
        claim("nothing old is left, and nothing damaged", not any((folder / name).exists() for name in OLD_NAMES))
        claim("the old enrolments are there", {RID, "press-08"} <= set(store.enrollments))
        claim("the old telemetry is there", payloads(store)[:2] == [b"21.5", b"\xff"])
        registration = store.registrations[RID]
        place = registration.assignment
        assert place is not None, "it was assigned before"
        mine = {hub: store.devices(hub).get(DEVICE_ID) for hub in (ONE, TWO)}
        claim(f"one hub has the device, that of DPS: {mine}", [h for h in (ONE, TWO) if mine[h]] == [place.hub])
        device = mine[place.hub]
        claim("the twin came along", device is not None and device.twin.desired == {"b": 2})
        for what, detail in told:
            match what:
                case "imported":
                    gone = {"press-11"} if ("enabled", ["press-09"]) in told else set()
                    claim(f"{detail} enrolled", set(detail) - gone <= set(store.enrollments))
                case "to be moved":
                    claim("the enrolment names the other hub", store.enrollments[RID].hubs == (detail,))
                case "assigned":
                    hub, key = detail
                    is_ours = place.credential.keys == (base64.b64decode(key),)
                    claim(f"the key for {hub}", place.hub != hub or is_ours)
                    claim(f"at {hub} or moved on", place.hub == hub or ("to be moved", TWO) in told)
                case "telemetry":
                    claim(f"telemetry {detail}", detail.encode() in payloads(store))
                case "reported":
                    claim(f"reported {detail}", device is not None and detail in device.twin.reported)
                case "queued":
                    hub, message_id = detail
                    queue = device.queue if device and place.hub == hub else None
                    claim(f"message {message_id}", queue is None or message_id in [m.message_id for m in queue])
                case "enabled":
                    other = store.devices(ONE).get("press-09")
                    claim("press-09 enabled", other is not None and other.enabled)
                case "deleted":
                    claim("press-11 gone", "press-11" not in store.enrollments)
    modes = {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()}
    claim(f"files are private: {modes}", set(modes.values()) == {0o600})
    return wrong


OLD_NAMES = ("enrollments", "registrations", "hubs", "messages.jsonl")


def payloads(store: Store) -> list[bytes]:
    """Of all messages, oldest first."""
    return [kept.message.payload for kept in store.messages.after()]


def die_at(cut: int) -> None:
    """Makes this process end at its `cut`-th statement or deleted file."""
    left = [cut]

    def count(*_: object) -> None:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    connect, unlink = sqlite3.connect, os.unlink

    def traced(*args: Any, **named: Any) -> sqlite3.Connection:
        connection: sqlite3.Connection = connect(*args, **named)
        connection.set_trace_callback(count)
        return connection

    def counted(*args: Any, **named: Any) -> None:
        count()
        unlink(*args, **named)

    sqlite3.connect = traced  # type: ignore[assignment]
    os.unlink = counted


def acknowledged_first(keep: Callable[..., None]) -> Callable[..., None]:
    """A hub that acknowledges telemetry before it keeps it."""

    def kept_later(link: Link, packet: mqtt.Publish, *more: Any) -> None:
        link._wire.send(mqtt.puback(packet.packet_id))
        keep(link, packet, *more)

    return kept_later


def told_by(folder: Path, cut: int) -> tuple[list[tuple[str, Any]], int]:
    """What a life tells that ends at `cut`, and how it ended."""
    readable, writable = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(readable)
            die_at(cut)

            def say(*fact: Any) -> None:
                os.write(writable, json.dumps(fact).encode() + b"\n")

            Life(folder, say).run()
            os._exit(0)
        finally:
            os._exit(1)
    os.close(writable)
    with os.fdopen(readable, "rb") as lines:
        told = [(what, detail) for what, detail in map(json.loads, lines)]
    return told, os.waitpid(child, 0)[1]


def main(planted: str = "") -> int:
    """Sweeps; the exit status is 1 where something was lost. A planted bug ends the sweep at the first loss."""
    if planted == "no-transactions":
        Store.transaction = lambda self: contextlib.nullcontext()  # type: ignore[assignment, method-assign, return-value]
    if planted == "early-acknowledgement":
        Link._keep = acknowledged_first(Link._keep)  # type: ignore[method-assign]
    cut = losses = 0
    ended = signal.SIGKILL.value
    while ended == signal.SIGKILL:
        cut += 1
        with tempfile.TemporaryDirectory(prefix="dps-store-") as place:
            folder = Path(place) / "state"
            shutil.copytree(OLD_STATE, folder)
            folder.chmod(0o700)
            told, ended = told_by(folder, cut)
            try:
                wrong = look(folder, told)
            except StateError as error:
                wrong = [str(error)]
        for what in wrong:
            print(f"cut={cut}: {what}", flush=True)
        losses += len(wrong)
        if losses and planted:
            break
    print(json.dumps({"cuts": cut - 1, "ended": ended, "told": len(told), "losses": losses}))
    return 1 if losses or ended else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
