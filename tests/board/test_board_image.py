"""What goes into a board's flash: which files, how large, and what runs of them under the other interpreter."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import trustme

from dps_emulator.enrollments import read_enrollments
from dps_hal.platform import sha256
from support.board import CHECKOUT, Image, board_files, der, for_a_board
from support.swtpm import Swtpm

MICROPYTHON = str(Path(sys.executable).with_name("micropython"))
PROGRAMS = {"app.py", "boot.py", "main.py"}  # the firmware engineer's own; not part of the packages
SIZE_LIMITS = {"dps_agent": 40, "dps_hal": 42, "dps_board": 22}  # KiB of .mpy
EK_CERTIFICATE_INDEX = 0x01C00002


def packaged() -> set[tuple[str, str]]:
    return {(root, path) for root, path in board_files() if path not in PROGRAMS}


def test_the_compiled_files_stay_small(image: Image) -> None:
    totals = dict.fromkeys(SIZE_LIMITS, 0)
    for path, size in sorted(image.sizes.items()):
        print(f"{size:6d} {path}")
        if path not in PROGRAMS:
            totals[path.partition("/")[0]] += size
    print(f"{sum(totals.values()):6d} in all: {totals}")
    assert {name: size for name, size in totals.items() if size > SIZE_LIMITS[name] * 1024} == {}


def test_manifest_and_package_name_exactly_what_a_board_loads() -> None:
    frozen: set[tuple[str, str]] = set()
    folder = CHECKOUT / "micropython"

    def package(name: str, files: tuple[str, ...], base_path: str, opt: int) -> None:
        assert opt == 3
        root = str((folder / base_path).resolve().relative_to(CHECKOUT))
        frozen.update((root, f"{name}/{file}") for file in files)

    exec((folder / "manifest.py").read_text(), {"package": package, "include": lambda path: None})
    assert frozen == packaged()
    installed = set()
    for target, source in json.loads((folder / "package.json").read_text())["urls"]:
        root = str((folder / source).resolve().relative_to(CHECKOUT)).removesuffix(f"/{target}")
        installed.add((root, target))
    assert installed == packaged()


def test_nothing_happens_when_a_boards_file_is_loaded(image: Image, tmp_path: Path) -> None:
    """No file, socket, pin or task at import: the modules that could make one are not even there."""
    modules = [path.removesuffix(".py").replace("/", ".").removesuffix(".__init__") for _, path in board_files()]
    program = (
        "import sys, builtins\n"
        "def refuse(*_): raise Exception('at import')\n"
        "import socket, ssl, os, asyncio, select\n"
        "builtins.open = refuse\n"
        "sys.modules['machine'] = sys.modules['network'] = None\n"
        f"for name in {sorted(set(modules) - {'main'})!r}:\n    __import__(name)\n"
        "print(asyncio.core.cur_task, len(sys.modules))\n"
    )
    done = subprocess.run(
        [MICROPYTHON, "-c", program],
        env={**os.environ, "MICROPYPATH": f"{image.folder}:.frozen"},
        cwd=tmp_path, capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.startswith("None "), done.stdout + done.stderr
    assert list(tmp_path.iterdir()) == []


def test_what_only_a_type_checker_reads_is_left_out_line_for_line() -> None:
    source = '"""A."""\n\nTYPE_CHECKING = False\nif TYPE_CHECKING:\n    from typing import Any\nelse:\n    B = 1\n'
    kept = for_a_board(source)
    assert kept == '"""A."""\n\n\nif False:\n    from typing import Any\nelse:\n    B = 1\n'
    for root, path in board_files():
        assert "TYPE_CHECKING" not in for_a_board((CHECKOUT / root / path).read_text()), path


def test_the_pieces_work_under_micropython() -> None:
    pieces = "tests/board/test_board_pieces.py"
    done = subprocess.run(
        [MICROPYTHON, "tests/support/run_shared.py", pieces],
        env={**os.environ, "MICROPYPATH": "micropython:.frozen"},
        cwd=CHECKOUT, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    count = (CHECKOUT / pieces).read_text().count("\ndef test_")
    assert done.stdout.splitlines()[-1:] == [f"{count} passed, 0 failed"], done.stdout + done.stderr


@pytest.fixture
def with_certificate(tmp_path: Path) -> Any:
    with Swtpm(tmp_path / "tpm") as swtpm:
        swtpm.write_nv(EK_CERTIFICATE_INDEX, b"\x30\x03\x02\x01\x01")
        yield swtpm


def test_the_factorys_line_can_be_imported(image: Image, with_certificate: Swtpm, tmp_path: Path) -> None:
    trustme.CA().cert_pem.write_to_path(str(tmp_path / "root.pem"))
    (tmp_path / "roots.der").write_bytes(der(tmp_path / "root.pem"))
    (tmp_path / "config.json").write_text(json.dumps({"id_scope": "0ne0", "tpm": {"tcti": with_certificate.tcti}}))
    done = subprocess.run(
        [MICROPYTHON, "-c", "import dps_board.factory as f; f.print_enrolment()"],
        env={**os.environ, "MICROPYPATH": f"{image.folder}:.frozen"},
        cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (enrolment,) = read_enrollments(done.stdout)
    assert len(enrolment.registration_id) == 52 and len(enrolment.endorsement_key) == 316
    digest = sha256(b"\x30\x03\x02\x01\x01").hex()
    assert done.stdout.splitlines()[1].split(",")[2:] == ["wire", digest]
    assert with_certificate.leftovers() == []
