"""The metrics of a service: OpenMetrics 1.0 for who asks at the socket, Prometheus' older text for node_exporter.

A scrape costs no TPM command, no request and no write: what is not counted here is the value last known, with its age.
No metric has a label that can have many values, and none holds a secret. Each is one row of `METRICS`.

Sources: OpenMetrics 1.0.0; Prometheus, exposition formats, text format 0.0.4.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, NamedTuple

from dps_agent.lifecycle import TRANSITIONS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any, TypeAlias

    from dps_agent.host.counts import Counts

    Value: TypeAlias = "float | Mapping[tuple[tuple[str, str], ...], float] | None"

STATES = tuple(dict.fromkeys(row.partition(":")[0] for row in TRANSITIONS.strip().splitlines()))
NAMESPACE = "dps_agent"
RUNNING = "running"


class Seen(NamedTuple):
    """What one scrape sees: the document of GET /status, the counts, and the uptime."""

    status: Mapping[str, Any]
    counts: Counts
    now_s: float


class Metric(NamedTuple):
    """One row. `value` is a number, one for each set of labels, or None where it is not known."""

    name: str  # behind NAMESPACE; a counter's has "_total" behind it where its samples stand
    kind: str  # gauge, counter, info or stateset
    unit: str  # of OpenMetrics, and the end of the name; "": a count
    help: str
    value: Callable[[Seen], Value]


def _age(then_s: float | None, now_s: float) -> float | None:
    return None if then_s is None else round(max(now_s - then_s, 0.0), 3)


def _by(label: str, values: Mapping[str, float]) -> Value:
    return {((label, name),): value for name, value in values.items()}


def _left_s(seen: Seen) -> float:
    until_s = seen.status.get("untilUptimeS")
    return round(max(until_s - seen.now_s, 0.0), 3) if until_s is not None else 0.0


def _resident_bytes(_seen: Seen) -> float:
    with open("/proc/self/statm", "rb") as file:  # proc_pid_statm(5): the second number is in pages
        return float(int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE"))


METRICS = (
    Metric(RUNNING, "gauge", "", "Whether the service runs.", lambda _seen: 1.0),
    Metric("", "info", "", "What runs: version, and the way to the TPM.",
           lambda seen: {tuple((name, str(seen.status.get(name, ""))) for name in ("version", "backend")): 1.0}),
    Metric("state", "stateset", "", "Where the device stands.",
           lambda seen: _by(f"{NAMESPACE}_state", {name: float(name == seen.status.get("state")) for name in STATES})),
    Metric("state_age_seconds", "gauge", "seconds", "Since when it stands there.",
           lambda seen: _age(seen.status.get("sinceUptimeS"), seen.now_s)),
    Metric("wait_seconds", "gauge", "seconds", "How long the present wait goes on; 0 where nothing is waited for.",
           _left_s),
    Metric("failed_attempts", "gauge", "", "Registrations in a row that failed.",
           lambda seen: seen.status.get("failedAttempts")),
    Metric("registrations", "counter", "", "Registrations that ended, by how.",
           lambda seen: _by("result", seen.counts.registrations)),
    Metric("connections", "counter", "", "Connections that a hub accepted, renewed tokens included.",
           lambda seen: seen.counts.connections),
    Metric("telemetry", "counter", "", "Messages of programs, by what their senders were answered: accepted by the hub,"
           " refused, or late, without an answer in time; what is late counts again once the hub answers.",
           lambda seen: _by("result", seen.counts.telemetry)),
    Metric("dps_contact_age_seconds", "gauge", "seconds", "Since DPS answered last.",
           lambda seen: _age(seen.counts.dps_heard_at_s, seen.now_s)),
    Metric("hub_contact_age_seconds", "gauge", "seconds", "Since the hub was heard last, pings included.",
           lambda seen: _age(seen.counts.hub_heard_at_s, seen.now_s)),
    Metric("token_expiry_timestamp_seconds", "gauge", "seconds", "Unix time at which the token of the connection ends.",
           lambda seen: seen.counts.token_expires_at_s),
    Metric("tpm_lockout_failures", "gauge", "", "Failures that the TPM counted when it was asked last.",
           lambda seen: seen.counts.tpm.lockout_counter if seen.counts.tpm else None),
    Metric("tpm_lockout_limit", "gauge", "", "The count at which the TPM locks out.",
           lambda seen: seen.counts.tpm.lockout_maximum if seen.counts.tpm else None),
    Metric("tpm_age_seconds", "gauge", "seconds", "Since the TPM was asked for both.",
           lambda seen: _age(seen.counts.tpm_at_s, seen.now_s) if seen.counts.tpm else None),
    Metric("store_generation", "gauge", "", "How often the assignment was stored.",
           lambda seen: seen.counts.generation),
    Metric("store_rollbacks", "counter", "", "Times that an older copy served for a damaged newer one.",
           lambda seen: seen.counts.rollbacks),
    Metric("resident_memory_bytes", "gauge", "bytes", "Memory of the service that is not swapped out.",
           _resident_bytes),
)  # fmt: skip


def open_metrics(status: Mapping[str, Any], counts: Counts, now_s: float) -> str:
    """All metrics of a service that runs, as OpenMetrics; what is not known yet has no sample."""
    seen = Seen(status, counts, now_s)
    lines: list[str] = []
    for metric in METRICS:
        name = family_name(metric)
        lines.append(f"# TYPE {name} {metric.kind}")
        if metric.unit:
            lines.append(f"# UNIT {name} {metric.unit}")
        lines.append(f"# HELP {name} {metric.help}")
        sample = sample_name(metric)
        lines += [f"{sample}{labels} {value:.15g}" for labels, value in _samples(metric.value(seen))]
    return "\n".join([*lines, "# EOF", ""])


def for_text_file(text: str) -> str:
    """OpenMetrics as Prometheus' text format, which has no units and no end, and names counters with all they have."""
    lines = []
    for line in text.splitlines():
        words = line.split(" ", 3)
        if words[:2] in (["#", "UNIT"], ["#", "EOF"]):
            continue
        if words[0] == "#":
            metric = _METRICS[words[2]]
            words[2] = sample_name(metric)
            if words[1] == "TYPE":
                words[3] = "counter" if metric.kind == "counter" else "gauge"
        lines.append(" ".join(words))
    return "\n".join([*lines, ""])


def samples(text: str) -> dict[str, float]:
    """The samples of either text by name and labels."""
    rows = (line.rpartition(" ") for line in text.splitlines() if line and not line.startswith("#"))
    return {name: float(value) for name, _, value in rows}


def text_file_without_service() -> str:
    """The same where no service runs: that alone."""
    name = f"{NAMESPACE}_{RUNNING}"
    return f"# TYPE {name} gauge\n# HELP {name} {METRICS[0].help}\n{name} 0\n"


def _samples(value: Value) -> list[tuple[str, float]]:
    if value is None:
        return []
    if isinstance(value, (int, float)):
        return [("", value)]
    return [(_shown(labels), number) for labels, number in value.items()]


def _shown(labels: tuple[tuple[str, str], ...]) -> str:
    pairs = (f'{name}="{_escaped(value)}"' for name, value in labels)
    return "{" + ",".join(pairs) + "}"


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def family_name(metric: Metric) -> str:
    """Under which OpenMetrics announces it."""
    return f"{NAMESPACE}_{metric.name}" if metric.name else NAMESPACE


def sample_name(metric: Metric) -> str:
    """Under which its samples stand, and under which the textfile announces it."""
    return family_name(metric) + {"counter": "_total", "info": "_info"}.get(metric.kind, "")


_METRICS = {family_name(metric): metric for metric in METRICS}
