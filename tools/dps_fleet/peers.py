"""How other clients wait, as generators of the same effects; models of what was read and measured of them.

Each registers at every boot, for none of their samples keeps an assignment across a restart, and then connects. What
systemd waits before it starts a program again that ended is a guess where the client brings no unit.
"""

from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any

from dps_agent import hub_effects
from dps_agent.effects import Http, NoReply, Random, Sleep, Uptime
from dps_agent.sas import SasToken
from dps_fleet import wire
from dps_fleet.simulation import Device

if TYPE_CHECKING:
    from dps_fleet.simulation import Make

_TOKEN = SasToken("r", 0, b"")
_PUT = Http("PUT", "/", b"", None)
_PUT_TOKEN = Http("PUT", "/", b"", _TOKEN)
_GET = Http("GET", "/", b"", _TOKEN)
_START_S = 1.0  # how long a program takes to start
_GOOD = (200, 202, 401)

Steps = Generator[Any, Any, None]


class Ended(Exception):
    """The program ends."""


def _asked(reply: Any, default: float) -> float:
    return min(max(int(reply.headers.get("retry-after") or default), 1), 300)


def _poll(reply: Any, default: float) -> Steps:
    """Polls until assigned, as all of them do."""
    while True:
        yield Sleep(_asked(reply, default), "poll")
        reply = yield _GET
        if isinstance(reply, NoReply) or (reply.status not in _GOOD and reply.status < 429):
            raise Ended
        if reply.status == 200:
            return


def _c_sdk() -> Steps:
    """The C SDK: 429 and 5xx again after a second or Retry-After, for ever; everything else ends the program."""
    for http in (_PUT, _PUT_TOKEN):
        while True:
            reply = yield http
            if isinstance(reply, NoReply):
                raise Ended
            if reply.status < 429:
                break
            yield Sleep(_asked(reply, 1), "retry")
        if reply.status not in _GOOD:
            raise Ended
    yield from _poll(reply, 1)


def _node() -> Steps:
    """The Node SDK: nothing is tried again; systemd starts the program."""
    for http in (_PUT, _PUT_TOKEN):
        reply = yield http
        if isinstance(reply, NoReply) or reply.status not in _GOOD:
            raise Ended
    yield from _poll(reply, 2)


def _python() -> Steps:
    """azure-iot-device: a symmetric key, so one request registers; Retry-After or 2 s, an operation ends after 30 s."""
    began_s: float = yield Uptime()
    while True:
        reply = yield _PUT_TOKEN
        if isinstance(reply, NoReply) or 300 <= reply.status < 429:
            raise Ended
        if reply.status < 300:
            break
        wait_s = _asked(reply, 2)
        now_s: float = yield Uptime()
        left_s = max(began_s + 30 - now_s, 0.0)
        yield Sleep(min(wait_s, left_s), "retry")
        if wait_s > left_s:
            raise Ended
    yield from _poll(reply, 2)


def _aziot() -> Steps:
    """aziot-identityd: 60 to 330 s, then it gives up; Retry-After is ignored."""
    for http in (_PUT, _PUT_TOKEN):
        for base_s, more_s in ((60, 10), (120, 20), (180, 30), (300, 30), (0, 0)):
            reply = yield http
            if isinstance(reply, NoReply):
                raise Ended
            if reply.status != 429:
                break
            if not base_s:
                raise Ended
            random: float = yield Random()
            yield Sleep(base_s + random * more_s, "retry")
        if reply.status not in _GOOD:
            raise Ended
    yield from _poll(reply, 5)


def _azc() -> Steps:
    """The Azure SDK for C, as it advises: 2**n s up to 100 s, and up to 5 s more; Retry-After at least."""
    for http in (_PUT, _PUT_TOKEN):
        tries = 0
        while True:
            reply = yield http
            if not isinstance(reply, NoReply) and reply.status < 429:
                break
            random: float = yield Random()
            wait_s = min(2.0 ** min(tries, 10), 100.0) + 5 * random
            if not isinstance(reply, NoReply):
                wait_s = max(wait_s, int(reply.headers.get("retry-after") or 0))
            yield Sleep(wait_s, "retry")
            tries += 1
        if reply.status not in _GOOD:
            raise Ended
    yield from _poll(reply, 1)


def _shell() -> Steps:
    """A shell loop: nothing is tried again; the program starts once a minute."""
    yield from _node()


# Name -> how it registers, seconds before systemd starts it again, first and last wait between connections.
PEERS: dict[str, tuple[Callable[[], Steps], float, float, float]] = {
    "c-sdk": (_c_sdk, 10.0, 1.0, 30.0),
    "azure-iot-device": (_python, 10.0, 10.0, 10.0),
    "node": (_node, 10.0, 0.1, 10.0),
    "aziot": (_aziot, 5.0, 1.0, 30.0),
    "azc": (_azc, 10.0, 2.0, 100.0),
    "shell-loop": (_shell, 60.0, 60.0, 60.0),
}


def _life(name: str, device: Device) -> Steps:
    """Registers, connects, stays; after ten connections in a row that failed the program ends."""
    registers, restart_s, first_s, last_s = PEERS[name]
    while True:
        yield Sleep(_START_S, "start")
        try:
            yield from registers()
            device.identity = held = device.fleet.dps.hub
            device.fleet.registered(device)
            failures = 0
            while failures < 10:
                answer = yield hub_effects.Connect(held.hub, wire.DEVICE, "u", _TOKEN, 240, True)
                if isinstance(answer, hub_effects.ConnAck) and answer.return_code == 0:
                    failures = 0
                    packet_id = yield hub_effects.Subscribe((("x", 1),))
                    while packet_id is not None:
                        event = yield hub_effects.NextEvent(1e9)
                        if isinstance(event, hub_effects.Gone):
                            break
                    yield hub_effects.Disconnect()
                failures += 1
                random: float = yield Random()
                yield Sleep(min(first_s * 2.0 ** (failures - 1), last_s) * (1 + 0.05 * random), "hub")
        except Ended:
            pass
        device.fleet.dps.close(device)
        yield Sleep(restart_s, "systemd")


def peer(name: str) -> "Make":
    """The client of that name."""
    return lambda device: _life(name, device)
