"""The command line of `tools/fleet`."""

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from dps_agent.fleet import UNKNOWN, dps_spread_s, token_life_s
from dps_agent.host.cli.parser import Suggesting
from dps_agent.settings import API_VERSION, AUTO, KEEP_ALIVE_S, POLL_LOOKUP, TPM, Settings
from dps_emulator.quotas import BUCKET, MINUTE, Gate, Quota
from dps_fleet import wire
from dps_fleet.figures import comparison, figures, peak_to_mean, picture, table
from dps_fleet.peers import PEERS, peer
from dps_fleet.scenarios import SCENARIOS, Order
from dps_fleet.simulation import (
    LOOKUP,
    OPERATION,
    PUT,
    PUT_TOKEN,
    REQUEST_LIMIT_S,
    Dps,
    Fleet,
    Hub,
    agent,
    remember_answers,
)
from dps_fleet.size import HUB_CONNECTS_PER_S, Size, hub_connects_per_s, size

ALL = "all"  # one after the other, in one table
FEWEST_A_MINUTE = 100  # so many requests a minute are as even as the whole fleet's
AZURE = tuple(
    f".{service}.{ending}"
    for service in ("azure-devices-provisioning", "azure-devices")
    for ending in ("net", "cn", "us", "de")
)
COUNTED = {1: (PUT_TOKEN,), 2: (PUT, PUT_TOKEN), 3: (PUT, PUT_TOKEN, LOOKUP, OPERATION)}


def _number(text: str) -> int:
    """A whole number, also as 1e6."""
    try:
        value = float(text)
    except ValueError:
        value = 0
    if value < 1 or value != int(value):
        raise argparse.ArgumentTypeError(f"expected a whole number such as 30000 or 1e6, got {text!r}")
    return int(value)


def _hub(text: str) -> tuple[str, int]:
    tier, _, units = text.partition(":")
    if tier not in HUB_CONNECTS_PER_S or not units.isdecimal() or not int(units):
        raise argparse.ArgumentTypeError(f"expected TIER:UNITS such as S1:10, got {text!r}")
    return tier, int(units)


def _duration(text: str) -> float:
    seconds = {"s": 1, "m": 60, "h": 3600, "d": 86400}
    try:
        return float(text[:-1]) * seconds[text[-1:]]
    except (ValueError, KeyError):
        raise argparse.ArgumentTypeError(f"expected a time such as 8h or 30m, got {text!r}") from None


def _retry_after(text: str) -> int | None:
    if text in ("none", "minute"):
        return None if text == "none" else -1
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected seconds, none or minute, got {text!r}")
    return int(text)


def _url(text: str) -> str:
    wrong = argparse.ArgumentTypeError(f"expected a URL such as https://localhost:8443, got {text!r}")
    try:
        parts = urlsplit(text)
        host, _ = parts.hostname or "", parts.port
    except ValueError:
        raise wrong from None
    if not host or parts.scheme != "https" or parts.path.strip("/") or "@" in parts.netloc:
        raise wrong
    if f".{host.rstrip('.')}".endswith(AZURE):
        raise argparse.ArgumentTypeError(f"{host} is Azure's: load only an emulator or a stand-in of your own")
    return text


def _what_there_is() -> str:
    """A line for each scenario and policy: its docstring."""
    scenarios = {name: scenario.__doc__ for name, (scenario, _) in SCENARIOS.items()}
    policies = {
        "agent": "This agent, as it is set.",
        **{name: registers.__doc__ for name, (registers, *_) in PEERS.items()},
        ALL: "One after the other, in one table.",
    }
    lines = []
    for title, found in (("scenarios", scenarios), ("policies", policies)):
        lines += ["", f"{title}:", *(f"  {name:<19}{text}" for name, text in found.items())]
    return "\n".join(lines[1:])


def _parser() -> argparse.ArgumentParser:
    parser = Suggesting(prog="tools/fleet", description="What a fleet does to its services.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("size", help="the sums: floors, spread, token life, the quota to ask for")
    _add_fleet(command)
    command.add_argument("--back-in", type=_duration, default=28800.0, metavar="TIME", help="default 8h")
    command.add_argument("--json", action="store_true")
    command.set_defaults(run=_size)

    command = commands.add_parser(
        "run",
        help="a fleet of real cores in virtual time",
        epilog=_what_there_is(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = command.add_argument
    add("scenario", choices=list(SCENARIOS), metavar="SCENARIO", help="what happens to all of them, see below")
    _add_fleet(command)
    add("--cores", type=_number, default=3000, metavar="N", help="so many stand for all of them; default 3000")
    add(
        "--policy",
        choices=["agent", *PEERS, ALL],
        default="agent",
        metavar="POLICY",
        help="who waits, see below; default: agent",
    )
    add("--config", type=Path, metavar="FILE", help="the agent's settings; default: its defaults")
    add("--sized", action="store_true", help="the agent knows devices, quota and hub: [fleet] is set to them")
    add("--clockless", action="store_true", help="a device knows no time until DPS has told it, anew after each start")
    add(
        "--clock-after",
        type=_duration,
        default=0.0,
        metavar="TIME",
        help="NTP tells a device the time so long after each start",
    )
    add("--retry-after", type=_retry_after, default=None, metavar="S|none|minute", help="of a 429; default none")
    add(
        "--quota-by",
        choices=(MINUTE, BUCKET),
        default=MINUTE,
        help="how DPS counts; a bucket holds a second of it, at least 1",
    )
    add("--counts", type=int, choices=COUNTED, default=2, help="requests of a registration that count; default 2")
    add("--answers", type=float, metavar="N", help="requests a second that DPS has time for; default: all")
    add("--hub-queue", type=float, default=0.0, metavar="S", help="the hub lets connections wait so long; default 0")
    add("--twins", type=float, metavar="N", help="twin reads a second that the hub takes; default: all")
    add("--within", type=_duration, default=30.0, metavar="TIME", help="all are switched on within it; default 30s")
    add("--seed", type=int, default=1)
    add("--json", type=Path, metavar="FILE", help="write the figures and series here; - is stdout")
    add("--png", type=Path, metavar="FILE", help="draw requests and devices done over time, SVG or PNG")
    command.set_defaults(run=_run)

    command = commands.add_parser("load", help="real cores on real sockets, by locust")
    add = command.add_argument
    add("--url", type=_url, required=True, help="of the emulator, or of a stand-in of your own")
    add("--ca-file", type=Path, required=True, metavar="FILE")
    add("--id-scope", default=wire.SCOPE)
    add("--devices", type=_number, default=500, metavar="N")
    add("--at-once", type=_number, default=100, metavar="N", help="devices that register at a time; default 100")
    add("--within", type=_duration, default=1.0, metavar="TIME", help="so many begin within it; default 1s")
    add("--timeout", type=_duration, default=3600.0, metavar="TIME", help="default 1h")
    add("--json", type=Path, metavar="FILE")
    add("locust", nargs="*", help="more for locust, after --: --processes 2, or --master --expect-workers 2, --worker")
    command.set_defaults(run=_load)
    return parser


def _add_fleet(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--devices", type=_number, default=1_000_000, metavar="N", help="default 1e6")
    add("--dps-quota", type=_number, default=1000, metavar="N", help="registrations a minute; default 1000")
    add("--hub", type=_hub, default=("S1", 1), metavar="TIER:UNITS", help="default S1:1")
    add("--hub-connects", type=_number, metavar="N", help="new connections a second; default: as --hub has")


def _per_s(arguments: argparse.Namespace) -> int:
    return arguments.hub_connects or hub_connects_per_s(*arguments.hub)


def _size(arguments: argparse.Namespace) -> int:
    per_s = _per_s(arguments)
    found = size(arguments.devices, arguments.dps_quota, per_s, arguments.back_in, arguments.hub[0])
    if arguments.json:
        print(json.dumps(found._asdict(), indent=2))
        return 0
    print(_size_text(found, arguments, per_s))
    return 0


def _size_text(found: Size, arguments: argparse.Namespace, per_s: int) -> str:
    devices, per_minute = arguments.devices, arguments.dps_quota
    return f"""\
{devices:,} devices, {per_minute:,} registrations a minute, {per_s:,} new connections a second

all register again: {found.dps_floor_s / 3600:.1f} h at best (2 requests each count); spread {found.dps_spread_s:,} s
all connect again:  {found.hub_floor_s:,.0f} s at best; spread {found.hub_spread_s:,} s
tokens:             {found.token_life_s:,} s; of an hour they keep {found.connected_share_for_an_hour:.0%} connected
to be back in {arguments.back_in / 3600:g} h ask Microsoft for {found.quota_per_min:,} registrations a minute
DPS creates devices in the hub: {found.registry_units} units of {arguments.hub[0]} for {per_minute // 2:,} a minute

[fleet]
devices = {devices}
dps_quota_per_min = {per_minute}
hub_connects_per_s = {per_s}"""


def _settings(arguments: argparse.Namespace) -> Settings:
    """What each simulated device is set to."""
    fleet = UNKNOWN
    if arguments.config:
        from dps_agent.host.config import load

        chosen = load(arguments.config, environ={}, overrides=[f"id_scope={wire.SCOPE}"]).settings()
        return chosen._replace(
            registration_id=wire.DEVICE, endpoint=wire.ENDPOINT, hub_suffixes=(".azure-devices.net",)
        )
    if arguments.sized:
        fleet = (arguments.devices, arguments.dps_quota, _per_s(arguments))
    suffixes = (".azure-devices.net",)
    hub = (fleet, KEEP_ALIVE_S, 0, 0, "", (AUTO,), TPM, "", API_VERSION)
    return Settings(wire.SCOPE, wire.DEVICE, wire.ENDPOINT, POLL_LOOKUP, None, 900, 0, suffixes, *hub)


def _run(arguments: argparse.Namespace) -> int:
    remember_answers()
    if arguments.policy == ALL:
        if arguments.png:
            print("tools/fleet: error: --png draws one policy, not all", file=sys.stderr)
            return 2
        found = {policy: _simulated(arguments, policy) for policy in ("agent", *PEERS)}
        _write(found, arguments, comparison(found))
        return 0 if all(one["done"] == one["devices"] for one in found.values()) else 1
    one = _simulated(arguments, arguments.policy)
    _write(one, arguments, table(one))
    if arguments.png:
        picture(one, _title(arguments), arguments.png)
    return 0 if one["done"] == one["devices"] else 1


def _simulated(arguments: argparse.Namespace, policy: str) -> dict[str, Any]:
    """The figures of the scenario with those who wait in this way."""
    scenario, is_of_the_hub = SCENARIOS[arguments.scenario]
    scale = min(arguments.cores / arguments.devices, 1.0)
    cores = min(arguments.cores, arguments.devices)
    counts = arguments.counts - (policy == "azure-iot-device" and arguments.counts > 1)
    dps_floor_s = min(counts, 2) * 60 * arguments.devices / arguments.dps_quota
    hub_floor_s = arguments.devices / _per_s(arguments)
    fleet = Fleet(random.Random(arguments.seed).random, 6 * max(dps_floor_s, hub_floor_s) + 200_000)
    fleet.clock_after_s = arguments.clock_after if not arguments.clockless else fleet.horizon_s
    quota = Quota(arguments.dps_quota * scale, arguments.quota_by)
    fleet.dps = Dps(fleet, quota, COUNTED[arguments.counts], arguments.retry_after)
    if arguments.answers:
        fleet.dps.gate = Gate(arguments.answers * scale, REQUEST_LIMIT_S)
    for assigned in (wire.FIRST_HUB, wire.SECOND_HUB):
        twins = Quota(arguments.twins * scale * 60, BUCKET) if arguments.twins else None
        gate = Gate(_per_s(arguments) * scale, arguments.hub_queue)
        fleet.hubs[assigned.hub] = Hub(fleet, assigned, gate, twins)
    is_agent = policy == "agent"
    settings = _settings(arguments)
    order = Order(
        agent(settings) if is_agent else peer(policy),
        cores,
        wire.FIRST_HUB if is_agent else None,
        _per_s(arguments) * scale,
        arguments.within,
        _bar(cores),
    )
    began_s = time.monotonic()
    start_s = scenario(fleet, order)
    if sys.stderr.isatty():
        print("\r" + " " * 70 + "\r", end="", file=sys.stderr)
    found = figures(fleet, start_s, hub_floor_s if is_of_the_hub else dps_floor_s)
    found["wallS"] = round(time.monotonic() - began_s, 1)
    found["warning"] = None
    spreads = is_agent and (settings.first_contact_spread_s or dps_spread_s(settings.fleet))
    if spreads and scale < 1 and quota.per_minute < FEWEST_A_MINUTE:
        enough = -(-FEWEST_A_MINUTE * arguments.devices // arguments.dps_quota)
        found["warning"] = (
            f"{quota.per_minute:.3g} requests a minute for {cores:,} cores are uneven in themselves: "
            f"more are refused than of the whole fleet; take --cores {min(enough, arguments.devices)}"
        )
        print(f"tools/fleet: warning: {found['warning']}", file=sys.stderr)
    if arguments.scenario == "renewals":
        life_s = settings.token_life_s or token_life_s(settings.fleet)
        connects = fleet.hubs[wire.FIRST_HUB.hub].connects
        step_s = life_s // 12  # from the first renewal to the end of the first life
        counts_a_step = [connects.within(at, at + step_s) for at in range(int(0.3 * life_s), int(0.8 * life_s), step_s)]
        found["renewalsPeakToMean"] = round(peak_to_mean(counts_a_step), 2)
    return found


def _title(arguments: argparse.Namespace) -> str:
    return f"{arguments.scenario}: {arguments.devices:,} devices, {arguments.dps_quota:,} a minute, {arguments.policy}"


def _write(found: dict[str, Any], arguments: argparse.Namespace, text: str) -> None:
    if arguments.json and str(arguments.json) == "-":
        print(json.dumps(found))
        return
    print(f"{_title(arguments)}\n{text}")
    if arguments.json:
        arguments.json.write_text(json.dumps(found))


def _bar(cores: int) -> Callable[[int, float], None] | None:
    """A progress bar where somebody looks."""
    if not sys.stderr.isatty():
        return None

    def show(done: int, now_s: float) -> None:
        full = 40 * done // cores
        text = f"\r[{'#' * full}{' ' * (40 - full)}] {done}/{cores} {now_s / 3600:.1f} h"
        print(text, end="", file=sys.stderr, flush=True)

    return show


def _load(arguments: argparse.Namespace) -> int:
    from dps_fleet.load import load

    status: int = load(arguments)
    return status


def run(words: Sequence[str]) -> int:
    """Runs the command line; its exit status."""
    arguments = _parser().parse_args(words)
    status: int = arguments.run(arguments)
    return status
