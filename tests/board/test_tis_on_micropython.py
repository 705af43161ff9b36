"""WireTpm over a simulated TPM on SPI and I2C under MicroPython: the contract of every Tpm, with swtpm behind it."""

import subprocess
import sys
from pathlib import Path

import pytest

from contracts.tpm import CLAIMS
from support.tpm.swtpm import Swtpm

CHECKOUT = Path(__file__).resolve().parents[2]
MICROPYTHON = str(Path(sys.executable).with_name("micropython"))


@pytest.mark.parametrize("bus", ["spi", "i2c"])
def test_the_contract_holds_on_a_bus_under_micropython(bus: str, tmp_path: Path) -> None:
    with Swtpm(tmp_path / "first") as first, Swtpm(tmp_path / "second") as second:
        done = subprocess.run(
            [MICROPYTHON, "-X", "heapsize=1m", "tests/support/tpm/tis_chip.py", bus, str(first.port), str(second.port)],
            cwd=CHECKOUT,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.splitlines()[-2:] == [f"{len(CLAIMS)} passed, 0 failed", "no violations"], done.stdout
        assert first.leftovers() + second.leftovers() == []
