"""`tools/bench`: what it says of numbers that are too large; the numbers themselves are the machine's."""

from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).parents[2] / "tools" / "bench"


@pytest.fixture(scope="module")
def bench() -> Any:
    spec = spec_from_loader("bench", SourceFileLoader("bench", str(BENCH)))
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cost(peak_mib: float, cpu_s: float) -> dict[str, float]:
    return {"peakMib": peak_mib, "cpuS": cpu_s, "cpuPercent": cpu_s / 3}


def test_the_limits_of_run_are_the_promised_ones(bench: Any) -> None:
    assert bench.PEAK_LIMIT_MIB == {"wire": 28, "esys": 45} and bench.CPU_LIMIT_PERCENT == 0.1
    assert bench.over_limits({"wire": cost(28, 0.3), "esys": cost(45, 0.3)}, 300) == []


@pytest.mark.parametrize(
    ("wire", "esys", "said"),
    [((28.1, 0), (1, 0), "wire: a peak"), ((1, 0), (45.1, 0), "esys: a peak"), ((1, 0.32), (1, 0), "wire: 0.1")],
)
def test_each_limit_is_watched(bench: Any, wire: Any, esys: Any, said: str) -> None:
    (text,) = bench.over_limits({"wire": cost(*wire), "esys": cost(*esys)}, 300)
    assert text.startswith(said)
