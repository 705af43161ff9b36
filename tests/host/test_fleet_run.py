"""`tools/fleet run`: what it says of a scaled fleet, of clocks, and of several policies."""

import json
from pathlib import Path
from typing import Any

import pytest

from dps_fleet import cli
from dps_fleet.peers import PEERS
from dps_fleet.scenarios import SCENARIOS

SMALL = ("--devices", "1e4", "--dps-quota", "100")


def found(folder: Path, *words: str) -> dict[str, Any]:
    file = folder / "found.json"
    assert cli.run(["run", *words, "--json", str(file)]) == 0
    said: dict[str, Any] = json.loads(file.read_text())
    return said


def test_a_spread_over_too_few_cores_is_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = found(tmp_path, "reset", *SMALL, "--cores", "300", "--sized")
    assert small["refusedPercent"] > 2 and "take --cores 10000" in small["warning"]
    assert capsys.readouterr().err == f"tools/fleet: warning: {small['warning']}\n"
    whole = found(tmp_path, "reset", "--devices", "5e3", "--dps-quota", "1000", "--cores", "5e3", "--sized")
    assert whole["refusedPercent"] <= 1 and whole["warning"] is None, whole["refusedPercent"]
    assert found(tmp_path, "reset", *SMALL, "--cores", "300")["warning"] is None, "nobody spreads without a size"
    assert capsys.readouterr().err == ""


def test_a_quota_of_less_than_one_a_minute_grants_all_in_the_end(tmp_path: Path) -> None:
    few = found(tmp_path, "reset", "--devices", "1e5", "--dps-quota", "500", "--cores", "60")
    assert few["done"] == 60


def test_without_clocks_a_second_cut_costs_the_spread(tmp_path: Path) -> None:
    with_clocks, with_ntp, without = (
        found(tmp_path, "cut", *SMALL, "--cores", "1000", "--sized", *more)
        for more in ((), ("--clock-after", "40s"), ("--clockless",))
    )
    assert with_clocks["done"] == with_ntp["done"] == without["done"] == 1000
    assert without["refusedPercent"] > max(with_clocks["refusedPercent"], with_ntp["refusedPercent"]) + 5


def test_a_dps_that_has_no_time_for_all_leaves_some_unanswered(tmp_path: Path) -> None:
    busy = found(tmp_path, "reset", *SMALL, "--cores", "1000", "--answers", "10")
    assert busy["done"] == 1000 and busy["unanswered"] > 0
    assert found(tmp_path, "reset", *SMALL, "--cores", "1000")["unanswered"] == 0


def test_the_help_says_what_each_scenario_and_each_policy_is(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.run(["run", "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert ended.value.code == 0
    for name in (*SCENARIOS, "agent", *PEERS, "all"):
        (line,) = [line for line in lines if line.startswith(f"  {name} ")]
        assert len(line.split()) > 4 and line.endswith(".") and len(line) <= 140, line


@pytest.mark.parametrize(
    ("words", "meant"),
    [(("run", "resett"), "reset"), (("run", "reset", "--policy", "c_sdk"), "c-sdk"), (("sice",), "size")],
)
def test_a_mistyped_word_is_answered_with_the_one_that_was_meant(
    words: tuple[str, ...], meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.run(words)
    assert ended.value.code == 2 and f"did you mean '{meant}'?" in capsys.readouterr().err


def test_all_policies_stand_in_one_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = found(tmp_path, "reset", "--devices", "100", "--dps-quota", "100", "--policy", "all")
    assert list(said) == ["agent", *PEERS] and all(one["done"] == 100 for one in said.values())
    lines = capsys.readouterr().out.splitlines()[2:]
    assert [line.split()[:2] for line in lines] == [[name, "100"] for name in said]
    assert cli.run(["run", "reset", "--policy", "all", "--png", str(tmp_path / "x.svg")]) == 2
    assert "--png draws one policy" in capsys.readouterr().err


def test_the_table_says_what_its_figures_are_taken_over(capsys: pytest.CaptureFixture[str]) -> None:
    cli.run(["run", "renewals", "--devices", "100", "--cores", "100"])
    out = capsys.readouterr().out
    assert "their mean, by twelfths of a life, from 0.3 to 0.8 of the tokens' first" in out
    assert "flash writes a device" in out and "of these, of the identity" in out


def test_flash_writes_are_counted_until_the_connection_is_steady(tmp_path: Path) -> None:
    one = found(tmp_path, "reset", "--devices", "40", "--dps-quota", "1000")
    assert (one["refusedPercent"], one["connectsADevice"]) == (0, 1)
    of_the_registration = ["it begins", "the identity"]
    of_the_connection = ["it begins", "the hub accepts it", "it is steady"]
    assert one["writesADevice"] == len(of_the_registration + of_the_connection) and one["writesOfIdentityADevice"] == 1
    crowd = found(tmp_path, "reset", "--devices", "1e6", "--cores", "200", "--dps-quota", "10000")
    assert 8 < crowd["writesADevice"] <= 14, crowd["writesADevice"]
