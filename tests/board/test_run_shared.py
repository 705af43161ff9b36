"""The runner of the shared tests, under both interpreters: a failure can't pass for a success."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]
MICROPYTHON = str(Path(sys.executable).with_name("micropython"))


@pytest.fixture(params=[sys.executable, MICROPYTHON], ids=["cpython", "micropython"])
def interpreter(request: pytest.FixtureRequest) -> str:
    path: str = request.param
    return path


def run(interpreter: str, *folders: Path, share: str = "") -> tuple[int, list[str]]:
    """Exit status and output lines of the runner over `folders`."""
    done = subprocess.run(
        [interpreter, "tests/support/run_shared.py", *map(str, folders)],
        cwd=CHECKOUT,
        env={**os.environ, "DPS_TEST_SHARE": share},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done.returncode, done.stdout.splitlines()


def test_passing_functions_are_counted(interpreter: str, tmp_path: Path) -> None:
    (tmp_path / "test_a.py").write_text("def test_one():\n    pass\ndef test_two():\n    pass\n")
    (tmp_path / "test_b.py").write_text("def test_one():\n    pass\n")
    assert run(interpreter, tmp_path) == (0, ["3 passed, 0 failed"])


def test_a_failing_function_fails_the_run_and_is_named(interpreter: str, tmp_path: Path) -> None:
    (tmp_path / "test_a.py").write_text("def test_one():\n    assert 1 == 2\ndef test_two():\n    pass\n")
    status, lines = run(interpreter, tmp_path)
    assert (status, lines[0], lines[-1]) == (1, f"FAILED {tmp_path}/test_a.py::test_one", "1 passed, 1 failed")


def test_a_file_that_can_not_be_imported_fails_the_run(interpreter: str, tmp_path: Path) -> None:
    (tmp_path / "test_a.py").write_text("import no_such_module\n")
    status, lines = run(interpreter, tmp_path)
    assert (status, lines[-1]) == (1, "0 passed, 1 failed")


def test_a_folder_without_tests_fails_the_run(interpreter: str, tmp_path: Path) -> None:
    assert run(interpreter, tmp_path) == (1, ["0 passed, 0 failed"])


def test_two_files_of_one_name_are_both_run(interpreter: str, tmp_path: Path) -> None:
    for folder, body in (("a", "pass"), ("b", "assert False")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "test_same.py").write_text(f"def test_one():\n    {body}\n")
    status, lines = run(interpreter, tmp_path / "a", tmp_path / "b")
    assert (status, lines[-1]) == (1, "1 passed, 1 failed")


def test_the_parts_of_all_runs_make_up_the_cases_and_none_is_taken_twice(interpreter: str, tmp_path: Path) -> None:
    (tmp_path / "test_a.py").write_text(
        "from support.share import part_of\ndef test_one():\n    print(part_of(range(5)), part_of('ab'))\n"
    )
    assert run(interpreter, tmp_path) == (0, ["[0, 1, 2, 3, 4] ['a', 'b']", "1 passed, 0 failed"])
    assert run(interpreter, tmp_path, share="1/2") == (0, ["[0, 2, 4] ['a']", "1 passed, 0 failed"])
    assert run(interpreter, tmp_path, share="2/2") == (0, ["[1, 3] ['b']", "1 passed, 0 failed"])


def test_a_part_without_a_case_or_a_share_that_is_none_fails_the_run(interpreter: str, tmp_path: Path) -> None:
    (tmp_path / "test_a.py").write_text("from support.share import part_of\ndef test_one():\n    part_of('ab')\n")
    for share in ("3/3", "0/2", "3/2", "1", "a/b", "1/0"):
        status, lines = run(interpreter, tmp_path, share=share)
        assert (status, lines[-1]) == (1, "0 passed, 1 failed"), share
