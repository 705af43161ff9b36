"""`tools/demo` says what the machine lacks before it starts anything; what it shows, it checks itself."""

import shutil
import subprocess
import sys
from pathlib import Path

DEMO = Path(__file__).parents[2] / "tools" / "demo"


def test_without_swtpm_the_packages_are_named_before_anything_is_made(tmp_path: Path) -> None:
    found = shutil.which("dpkg-query")
    assert found is not None, "this needs Debian or Ubuntu"
    (tmp_path / "dpkg-query").symlink_to(found)
    done = subprocess.run(
        [sys.executable, str(DEMO), "--swtpm"],
        env={"PATH": str(tmp_path)}, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 1 and "swtpm is not on PATH: apt-get install" in done.stderr, done.stderr
    assert "libtss2-dev" in done.stderr and "2 of 11" not in done.stdout
