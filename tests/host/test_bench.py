"""`tools/bench`: what it says of numbers, and that what it measures is there; the numbers are the machine's."""

import json
import os
import subprocess
import sys

import pytest

from dps_bench import emulator
from dps_bench.costs import clean_environ, cpu_ms, memory_mib, run
from dps_bench.instructions import counted
from dps_bench.report import Report
from dps_bench.service import CPU_LIMIT_PERCENT, PEAK_LIMIT_MIB, over_limits
from fresh_machine import CHECKOUT


def rows(wire: tuple[float, float], esys: tuple[float, float] = (1, 0)) -> dict[str, dict[str, float]]:
    return {
        name: {"peakMiB": peak_mib, "cpuMs": used_ms}
        for name, (peak_mib, used_ms) in (("wire", wire), ("esys", esys), ("paho alone", (99, 9999)))
    }


def test_the_limits_of_run_are_the_promised_ones() -> None:
    assert PEAK_LIMIT_MIB == {"wire": 28.5, "esys": 46} and CPU_LIMIT_PERCENT == 0.1
    assert over_limits(rows((28.5, 300), (46, 300)), 300) == []


@pytest.mark.parametrize(
    ("wire", "esys", "said"),
    [((28.6, 0), (1, 0), "wire: a peak"), ((1, 0), (46.1, 0), "esys: a peak"), ((1, 320), (1, 0), "wire: 320")],
)
def test_each_limit_is_watched(wire: tuple[float, float], esys: tuple[float, float], said: str) -> None:
    (text,) = over_limits(rows(wire, esys), 300)
    assert text.startswith(said)


def test_a_small_program_s_memory_is_its_own_and_not_that_of_who_measures_it() -> None:
    ballast = bytearray(64 * 1024 * 1024)
    ballast[::4096] = b"x" * len(ballast[::4096])
    cost = run(["/bin/true"])
    assert 0 < cost.peak_mib < 20 and cost.wall_ms > 0, cost
    del ballast


def test_what_the_environment_says_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SSL_CERT_FILE", "SSL_CERT_DIR", "DPS_AGENT_ID_SCOPE", "PYTHONHASHSEED"):
        monkeypatch.setenv(name, "/nowhere")
        assert name not in clean_environ()
        assert clean_environ({name: "here"})[name] == "here"


def test_a_process_s_own_numbers_are_read() -> None:
    before_ms = cpu_ms(os.getpid())
    while cpu_ms(os.getpid()) <= before_ms:
        sum(range(10_000))
    assert memory_mib(os.getpid(), "VmHWM") >= memory_mib(os.getpid(), "VmRSS") > 1


def test_the_instructions_of_a_program_do_not_depend_on_the_neighbours() -> None:
    least, more = counted(["-S", "-c", "pass"], {}), counted(["-S", "-c", "sum(range(100_000))"], {})
    assert abs(counted(["-S", "-c", "pass"], {}) - least) < least / 1000 and more > least * 1.01


def test_the_emulator_is_measured_beside_another_checkout_s(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, small in {"ROUNDS": 1, "REGISTRATIONS": 2, "CONNECTS": 2, "MESSAGES": 40, "IDLE": 2, "WARM": 1}.items():
        monkeypatch.setattr(emulator, name, small)
    report = emulator.measured(10, CHECKOUT)
    kinds = [f"{what}{of}PerS" for what in ("registrations", "connects", "messages") for of in ("", "Clock")]
    for name in ("this", "beside"):
        assert set(report.rows[name]) == {"firstConnectMs", "deviceKiB", *kinds}
        assert all(report.rows[name][kind] > 0 for kind in kinds), report.rows
    assert {f"{kind}, this to beside" for kind in kinds} <= set(report.ratios)


def test_a_key_in_the_tpm_is_measured_beside_one_in_a_file() -> None:
    environ = clean_environ({"PYTHONPATH": f"{CHECKOUT}/tools{os.pathsep}{CHECKOUT}/tests"})
    words = [sys.executable, "-m", "dps_bench", "handshake", "-n", "3", "--json"]
    found = json.loads(subprocess.run(words, env=environ, check=True, capture_output=True, timeout=120).stdout)
    assert set(found["rows"]) == {"key in the TPM", "key in a file"} and len(found["ratios"]) == 2, found


def test_a_report_says_the_same_twice() -> None:
    report = Report("status", "median of 3")
    report.row("wire", {"cpuMs": 30.0, "peakMiB": 12.5})
    report.ratio("wire / floor", 30.0, 20.0)
    report.say("syncs", 3)
    report.absent.append("another client")
    document = json.loads(report.document())
    assert document["schema"] == "dps-bench-status/2"
    assert (document["rows"], document["ratios"]) == ({"wire": {"cpuMs": 30.0, "peakMiB": 12.5}}, {"wire / floor": 1.5})
    text = report.text()
    assert "30.00 ms" in text and "12.50 MiB" in text and "not measured: another client" in text
