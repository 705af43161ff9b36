"""`tools/fleet run`: what it says of a scaled fleet, of clocks, and of several policies."""

import json
from pathlib import Path
from typing import Any

import pytest

from dps_fleet import cli
from dps_fleet.peers import PEERS

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
    with_clocks, without = (
        found(tmp_path, "cut", *SMALL, "--cores", "1000", "--sized", *more) for more in ((), ("--clockless",))
    )
    assert with_clocks["done"] == without["done"] == 1000
    assert without["refusedPercent"] > with_clocks["refusedPercent"] + 5


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
    assert "flash writes a device till then" in out
