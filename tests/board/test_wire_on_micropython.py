"""WireTpm under MicroPython against swtpm: the contract of every Tpm, and how much heap an activation takes."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from contracts.tpm import CLAIMS, KEY
from dps_hal.platform import hmac_sha256
from dps_hal.tpm.self_challenge import make_activation
from support.tpm.backends import open_wire
from support.tpm.swtpm import Swtpm

CHECKOUT = Path(__file__).resolve().parents[2]
MICROPYTHON = str(Path(sys.executable).with_name("micropython"))
HEAP_KB = 112  # of a 64-bit build that compiles the sources first; a board has pointers of half the size, and .mpy


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[tuple[Swtpm, Swtpm]]:
    with Swtpm(tmp_path / "first") as first, Swtpm(tmp_path / "second") as second:
        yield first, second


def run(script: str, *arguments: str, heap_kb: int = 1024) -> list[str]:
    """The lines that the script printed under MicroPython; it must have ended well."""
    done = subprocess.run(
        [MICROPYTHON, "-X", f"heapsize={heap_kb}k", f"tests/support/tpm/{script}", *arguments],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


def test_the_contract_holds_under_micropython(machines: tuple[Swtpm, Swtpm]) -> None:
    lines = run("wire_contract.py", *[str(each.port) for each in machines])
    assert lines[-1] == f"{len(CLAIMS)} passed, 0 failed", lines
    assert [each.leftovers() for each in machines] == [[], []]


def test_an_activation_fits_into_a_small_heap(machines: tuple[Swtpm, Swtpm], tmp_path: Path) -> None:
    tpm = open_wire(machines[0].tcti)
    blob = tmp_path / "blob"
    blob.write_bytes(make_activation(tpm.endorsement_key(), tpm.storage_root_key(), KEY))
    tpm.release()
    lines = run("wire_activation.py", str(machines[0].port), str(blob), heap_kb=HEAP_KB)
    print("\n".join(lines))
    assert lines[-1] == hmac_sha256(KEY, bytes(900)).hex()
    assert machines[0].leftovers() == []
