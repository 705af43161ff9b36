"""The metrics: two texts that their readers take, of what the service has noted anyway."""

import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as read_open_metrics
from prometheus_client.parser import text_string_to_metric_families as read_text_file

from dps_agent.host.counts import Counts
from dps_agent.host.metrics import METRICS, NAMESPACE, STATES, for_text_file, open_metrics, samples
from dps_agent.lifecycle import BOOT, CONNECTED, CONNECTING, HALTED, PROVISIONED, PROVISIONING, WAITING
from dps_hal.contracts import IDENTITY, PROGRESS, StoredRecord, TpmCondition
from support.cloud.emulator import EmulatorInThread
from support.programs.running_agent import RunningAgent
from support.tpm.swtpm import Swtpm
from support.tpm.tap import TpmTap

DEVICE = "press-07"
STATUS = {
    "version": "0.1.0",
    "backend": "wire",
    "state": "waiting",
    "sinceUptimeS": 90.0,
    "untilUptimeS": 130.5,
    "failedAttempts": 3,
}
CONDITION = TpmCondition("IFX", "7.2", 4, 31, 7200, 3, False, False)


def full() -> Counts:
    """Counts of which each is known."""
    counts = Counts()
    counts.note_tpm(CONDITION, 40.0)
    counts.use(SimpleNamespace(heard_at_s=99.0))  # type: ignore[arg-type]
    counts.note(effect("Http"), effect("Reply"), 70.0)
    counts.note(
        effect("Connect", token=SimpleNamespace(expires_at_s=1_800_003_600)), effect("ConnAck", return_code=0), 95.0
    )
    counts.note(effect("LoadRecord", record=IDENTITY), StoredRecord(b"", 7, True), 1.0)
    counts.note(effect("Commit", record=IDENTITY), None, 80.0)
    counts.telemetry["late"] = 2
    return counts


def effect(name: str, **fields: Any) -> Any:
    """An effect, or an answer, of that name."""
    made = type(name, (), {})()
    vars(made).update(fields)
    return made


def values(families: Iterator[Metric]) -> dict[str, float]:
    return {
        sample.name + (str(sample.labels) if sample.labels else ""): sample.value
        for family in families
        for sample in family.samples
    }


def test_both_texts_are_read_by_what_they_are_for_and_say_the_same() -> None:
    text = open_metrics(STATUS, full(), 100.0)
    of_socket = values(read_open_metrics(text))
    of_file = values(read_text_file(for_text_file(text)))
    assert of_socket == of_file and len(samples(text)) == len(of_socket) == len(samples(for_text_file(text)))
    assert of_socket["dps_agent_state{'dps_agent_state': 'waiting'}"] == 1
    assert sum(value for name, value in of_socket.items() if name.startswith("dps_agent_state{")) == 1
    assert of_socket["dps_agent_info{'version': '0.1.0', 'backend': 'wire'}"] == 1
    expected = {
        "running": 1,
        "state_age_seconds": 10,
        "wait_seconds": 30.5,
        "failed_attempts": 3,
        "connections_total": 1,
        "dps_contact_age_seconds": 30,
        "hub_contact_age_seconds": 1,
        "token_expiry_timestamp_seconds": 1_800_003_600,
        "tpm_lockout_failures": 4,
        "tpm_lockout_limit": 31,
        "tpm_age_seconds": 60,
        "store_generation": 8,
        "store_rollbacks_total": 1,
        "telemetry_total{'result': 'late'}": 2,
        "registrations_total{'result': 'failed'}": 0,
    }
    assert {name: of_socket[f"{NAMESPACE}_{name}"] for name in expected} == expected
    assert of_socket["dps_agent_resident_memory_bytes"] > 2**20


def test_what_is_not_known_yet_has_no_sample() -> None:
    found = values(read_open_metrics(open_metrics({}, Counts(), 100.0)))
    missing = ("dps_contact", "hub_contact", "token", "tpm", "store_generation", "state_age", "failed_attempts")
    assert not [name for name in found for part in missing if f"dps_agent_{part}" in name]
    assert found["dps_agent_wait_seconds"] == 0


def test_each_metric_is_one_row_that_open_metrics_allows() -> None:
    families = {family.name: family for family in read_open_metrics(open_metrics(STATUS, full(), 100.0))}
    names = [f"{NAMESPACE}_{metric.name}".removesuffix("_") for metric in METRICS]
    assert 10 <= len(METRICS) <= 20 and list(families) == names
    for metric, name in zip(METRICS, names, strict=True):
        family = families[name]
        assert (family.type, family.unit, family.documentation) == (metric.kind, metric.unit, metric.help)
        assert not metric.unit or name.endswith(f"_{metric.unit}")
        assert family.samples and len(family.samples) <= len(STATES), f"{name} has too many, or none"


def test_every_state_is_one_and_a_label_is_escaped() -> None:
    assert set(STATES) == {BOOT, PROVISIONING, WAITING, HALTED, PROVISIONED, CONNECTING, CONNECTED}
    odd = 'a"b\\c\nd'
    for read, text in ((read_open_metrics, str), (read_text_file, for_text_file)):
        families = read(text(open_metrics({**STATUS, "version": odd}, Counts(), 100.0)))
        labels = next(
            sample.labels for family in families for sample in family.samples if sample.name == "dps_agent_info"
        )
        assert labels["version"] == odd


def test_only_what_says_something_is_noted() -> None:
    counts = Counts()
    for asked, answer in (
        (effect("Http"), effect("NoReply")),
        (effect("Connect"), effect("NoReply")),
        (effect("Connect"), effect("ConnAck", return_code=5)),
        (effect("LoadRecord", record=PROGRESS), StoredRecord(b"", 7, True)),
        (effect("Commit", record=PROGRESS), None),
        (effect("LoadRecord", record=IDENTITY), None),
    ):
        counts.note(asked, answer, 1.0)
    assert open_metrics(STATUS, counts, 2.0) == open_metrics(STATUS, Counts(), 2.0)


def test_what_an_earlier_connection_heard_is_not_forgotten() -> None:
    counts = full()
    counts.use(SimpleNamespace(heard_at_s=None))  # type: ignore[arg-type]
    assert counts.hub_heard_at_s == 99.0


# --- a service that runs


def scraped(agent: RunningAgent) -> tuple[str, str]:
    """Content type and text of GET /metrics."""
    status, content = agent.client.read("GET", "/metrics")
    assert status == 200
    return agent.client.headers["content-type"], content.decode()


def files_of(agent: RunningAgent) -> dict[str, tuple[int, int, int]]:
    """Every file of the service's folders, and what shows that it was written."""
    found = {}
    for folder in (agent.state_dir, agent.runtime_dir):
        for path in folder.rglob("*"):
            status = path.lstat()
            found[str(path)] = (status.st_ino, status.st_mtime_ns, status.st_size)
    return found


def test_a_scrape_sends_no_tpm_command_and_writes_nothing(tmp_path: Path, emulator: EmulatorInThread) -> None:
    with (
        Swtpm(tmp_path / "swtpm") as machine,
        TpmTap(machine.port) as tap,
        RunningAgent(tmp_path, emulator, f'backend = "wire"\ntcti = "{tap.tcti}"') as agent,
    ):
        agent.start()
        agent.await_connected()
        assert agent.client.ask("POST", "/telemetry", b"1")[0] == 200
        assert agent.client.ask("POST", "/telemetry?=", b"1")[0] == 400
        agent.await_status(lambda found: found["since"], "shown")
        commands, requests, files, said = len(tap.exchanges), len(emulator.log), files_of(agent), agent.written
        for _ in range(20):
            kind, text = scraped(agent)
        assert (len(tap.exchanges), len(emulator.log), files_of(agent), agent.written) == (
            commands,
            requests,
            files,
            said,
        )
        assert kind == "application/openmetrics-text; version=1.0.0; charset=utf-8"
        found = values(read_open_metrics(text))
        assert found["dps_agent_state{'dps_agent_state': 'connected'}"] == 1
        assert found["dps_agent_registrations_total{'result': 'assigned'}"] == found["dps_agent_connections_total"] == 1
        results = {
            name: found[f"dps_agent_telemetry_total{{'result': '{name}'}}"] for name in ("accepted", "refused", "late")
        }
        assert results == {"accepted": 1, "refused": 1, "late": 0}
        assert found["dps_agent_store_generation"] == 1 and found["dps_agent_tpm_lockout_limit"] > 0
        for age in ("dps_contact", "hub_contact", "tpm"):
            assert 0 <= found[f"dps_agent_{age}_age_seconds"] < 600
        assert {f"{NAMESPACE}_{metric.name}".removesuffix("_") for metric in METRICS} == {
            family.name for family in read_open_metrics(text) if family.samples
        }
        record = json.dumps(agent.command("status")["deviceId"])
        assert DEVICE not in text and emulator.hub_connect_to not in text and record.strip('"') not in text
        assert agent.end()[0] == 0


def test_the_verb_shows_them_and_replaces_a_file_for_the_collector(tmp_path: Path, emulator: EmulatorInThread) -> None:
    path = tmp_path / "node" / "dps-agent.prom"
    path.parent.mkdir()
    with (
        Swtpm(tmp_path / "swtpm") as machine,
        RunningAgent(tmp_path, emulator, f'backend = "wire"\ntcti = "{machine.tcti}"') as agent,
    ):
        agent.start()
        agent.await_connected()
        assert agent.command("metrics")["samples"]["dps_agent_connections_total"] == 1
        agent.command("metrics", "--textfile", str(path))
        before = path.stat()
        found = values(read_text_file(path.read_text()))
        assert found["dps_agent_running"] == found["dps_agent_connections_total"] == 1
        assert stat.S_IMODE(before.st_mode) == 0o644 and os.listdir(path.parent) == [path.name]
        agent.command("metrics", "--textfile", str(path))
        assert path.stat().st_ino != before.st_ino, "whoever reads the former one reads all of it"
        assert agent.command("metrics", "--textfile", str(tmp_path / "a.txt"), exit_status=2)["code"] == "usage"
        missing = str(tmp_path / "none" / "a.prom")
        assert agent.command("metrics", "--textfile", missing, exit_status=1)["error"]["code"] == "agent.file"
        agent.end()
        assert agent.command("metrics", exit_status=3)["error"]["code"] == "agent.not_running"
        agent.command("metrics", "--textfile", str(path))
        assert values(read_text_file(path.read_text())) == {"dps_agent_running": 0}
