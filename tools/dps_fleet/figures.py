"""What a run came to: figures, a table, a picture."""

from pathlib import Path
from typing import Any

from dps_fleet.simulation import KINDS, Fleet

BINS = 300  # pieces of time in a series


def figures(fleet: Fleet, start_s: float, floor_s: float) -> dict[str, Any]:
    """The figures of a run whose clock begins at `start_s`, by JSON name."""
    devices = fleet.devices
    waits = sorted(device.done_s - start_s for device in devices if device.done_s is not None)
    number = len(devices)
    dps = fleet.dps
    end_s = max(fleet.now_s, 1.0)
    width_s = int(end_s / BINS) + 1
    hubs = list(fleet.hubs.values())
    requests = sum(device.requests for device in devices)
    refused = sum(device.refused for device in devices)
    writes = [device.identity_writes + device.progress_writes for device in devices]
    connects = [sum(hub.connects.within(at, at + width_s) for hub in hubs) for at in range(0, int(end_s) + 1, width_s)]
    return {
        "devices": number,
        "done": len(waits),
        "floorS": floor_s,
        "timesFloor": round(waits[-1] / floor_s, 3) if len(waits) == number and floor_s else None,
        "timesFloorOf99Percent": round(waits[int(0.99 * (len(waits) - 1))] / floor_s, 3) if waits and floor_s else None,
        "seconds": round(waits[-1], 1) if len(waits) == number else None,
        "requestsADevice": round(requests / number, 2),
        "mostRequestsADevice": max(device.requests for device in devices),
        "refusedPercent": round(100 * refused / requests, 2) if requests else 0.0,
        "challengesADevice": round(sum(device.challenges for device in devices) / number, 3),
        "writesADevice": round(sum(writes) / number, 2),
        "writesOfIdentityADevice": round(sum(device.identity_writes for device in devices) / number, 2),
        "mostWritesADevice": max(writes),
        "connectsADevice": round(sum(device.connects for device in devices) / number, 2),
        "droppedPercent": _percent(sum(hub.dropped.total for hub in hubs), sum(hub.connects.total for hub in hubs)),
        "twinReadsRefusedPercent": _percent(
            sum(hub.twin_refused.total for hub in hubs), sum(hub.twin_reads.total for hub in hubs)
        ),
        "peakRequestsAS": dps.requests.peak(start_s),
        "mostOpenConnections": dps.most_open,
        "pollsTooFast": dps.polls_too_fast,
        "unanswered": dps.unanswered,
        "kinds": dict(zip(KINDS, dps.made, strict=True)),
        "series": {
            "widthS": width_s,
            "requests": dps.requests.sums(width_s, end_s),
            "refused": dps.refused.sums(width_s, end_s),
            "connects": connects,
            "done": fleet.done_at.sums(width_s, end_s),
        },
    }


def peak_to_mean(counts: list[int]) -> float:
    """How much higher the highest of some counts is than their mean."""
    return max(counts) * len(counts) / max(sum(counts), 1)


def _percent(part: int, whole: int) -> float:
    return round(100 * part / whole, 2) if whole else 0.0


def table(found: dict[str, Any]) -> str:
    """The figures for a terminal."""
    shown = [
        ("devices that came back", f"{found['done']} of {found['devices']}"),
        ("the services' floor", f"{found['floorS']:,.0f} s"),
        ("the last device", f"{found['timesFloor'] or '—'} x the floor"),
        ("99 of 100 devices", f"{found['timesFloorOf99Percent'] or '—'} x the floor"),
        ("requests a device", f"{found['requestsADevice']} (most {found['mostRequestsADevice']})"),
        ("refused for want of quota", f"{found['refusedPercent']} %"),
        ("not answered", f"{found['unanswered']}"),
        ("challenges granted a device", found["challengesADevice"]),
        ("flash writes a device", f"{found['writesADevice']} (most {found['mostWritesADevice']})"),
        ("of these, of the identity", found["writesOfIdentityADevice"]),
        ("connections to hubs a device", found["connectsADevice"]),
        ("connections dropped", f"{found['droppedPercent']} %"),
        ("most requests in a second", found["peakRequestsAS"]),
        ("polled faster than 5 in 10 s", f"{found['pollsTooFast']} times"),
    ]
    if found.get("renewalsPeakToMean"):
        of = "their mean, by twelfths of a life, from 0.3 to 0.8 of the tokens' first"
        shown.append(("renewals' peak", f"{found['renewalsPeakToMean']} x {of}"))
    return "\n".join(f"{name:32} {value}" for name, value in shown)


def comparison(found: dict[str, dict[str, Any]]) -> str:
    """The figures of several who wait, by name, a line each."""
    columns = {
        "came back": "done",
        "x the floor": "timesFloor",
        "requests": "requestsADevice",
        "refused %": "refusedPercent",
        "challenges": "challengesADevice",
        "connections": "connectsADevice",
        "writes": "writesADevice",
        "polled too fast": "pollsTooFast",
    }
    rows = {"": list(columns), **{name: [one[key] for key in columns.values()] for name, one in found.items()}}
    return "\n".join(f"{name:18}" + "".join(f"{_shown(cell):>16}" for cell in cells) for name, cells in rows.items())


def _shown(cell: Any) -> str:
    return "—" if cell is None else str(cell)


def picture(found: dict[str, Any], title: str, path: Path) -> None:
    """Requests a second and devices done over time, as SVG or PNG."""
    import matplotlib  # pyright: ignore[reportMissingImports]

    matplotlib.use("Agg")
    from matplotlib import pyplot  # pyright: ignore[reportMissingImports]

    series = found["series"]
    width_s = series["widthS"]
    hours = [place * width_s / 3600 for place in range(len(series["requests"]))]
    shown = {"requests to DPS": series["requests"], "refused": series["refused"], "hub connections": series["connects"]}
    drawing, axes = pyplot.subplots(figsize=(8, 4))
    for name, counts in shown.items():
        if any(counts):
            axes.plot(hours, [count / width_s or None for count in counts], label=name, linewidth=1)
    axes.set(xlabel="hours", ylabel="a second", title=title, yscale="log")
    done = axes.twinx()
    total, shares = 0, []
    for count in series["done"]:
        total += count
        shares.append(100 * total / found["devices"])
    done.plot(hours[: len(shares)], shares, color="black", linewidth=2)
    done.set(ylabel="% of the devices done (black)", ylim=(0, 101))
    axes.legend(loc="center right", frameon=False)
    drawing.tight_layout()
    drawing.savefig(path, dpi=80)
    pyplot.close(drawing)
