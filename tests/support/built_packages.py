"""What `tools/package` builds, for tests that look into it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
BUILD_DEADLINE_S = 600


def build(out: Path, *options: str, **environ: str) -> list[Path]:
    """Runs `tools/package` with these options; what it has built into `out`, AssertionError with its output."""
    done = subprocess.run(
        [CHECKOUT / "tools/package", *options, "--out", out],
        env={**{name: text for name, text in os.environ.items() if not name.startswith("PYTHON")}, **environ},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=BUILD_DEADLINE_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    built = [Path(line) for line in done.stdout.splitlines() if line.startswith(f"{out}/")]
    assert built and all(path.is_file() for path in built), done.stdout
    return built


def unpacked(package: Path, folder: Path) -> Path:
    """The files of a Debian package below `folder`, its control files in DEBIAN/."""
    subprocess.run(["dpkg-deb", "--raw-extract", package, folder], check=True, timeout=60)
    return folder
