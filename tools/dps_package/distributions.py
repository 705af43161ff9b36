"""Wheel and sdist, what must be in them, and the time that all builds carry."""

import os
import re
import shlex
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
COMMAND_DEADLINE_S = 900
IMPORT_PACKAGES = ("dps_agent", "dps_text", "dps_hal", "dps_emulator", "dps_enroll")
NOT_ON_DEVICES = ("dps_emulator", "dps_enroll")


class BuildFailed(Exception):
    """Something could not be built or is not as it should be; the text says what."""


def run(words: Sequence[str], environ: Mapping[str, str] | None = None, cwd: Path | None = None) -> str:
    """Runs a program and returns its stdout; BuildFailed with its whole output where it fails."""
    try:
        done = subprocess.run(
            words,
            cwd=cwd,
            env=None if environ is None else dict(environ),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=COMMAND_DEADLINE_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildFailed(f"{shlex.join(words)}: {error}") from error
    if done.returncode != 0:
        raise BuildFailed(f"{done.stdout}{done.stderr}status {done.returncode}: {shlex.join(words)}")
    return done.stdout


def build_time_s() -> int:
    """The time that every file in a package gets: $SOURCE_DATE_EPOCH, else that of the commit, else of CHANGELOG.md."""
    given = os.environ.get("SOURCE_DATE_EPOCH", "")
    if given:
        if not given.isdecimal():
            raise BuildFailed(f"SOURCE_DATE_EPOCH: expected seconds since 1970; came {given!r}")
        return int(given)
    try:
        return int(run(["git", "-C", str(CHECKOUT), "log", "-1", "--format=%ct"]))
    except (BuildFailed, ValueError):  # no git, or an unpacked sdist
        return int((CHECKOUT / "CHANGELOG.md").stat().st_mtime)


def debian_version(version: str, revision: str) -> str:
    """A Python version as Debian writes it: 0.2.0.dev1 sorts before 0.2.0rc1, and that before 0.2.0."""
    released_later = re.sub(r"(a|b|rc)(?=\d)", r"~\1", version)
    return released_later.replace(".dev", "~~dev").replace("+", ".") + f"-{revision}"


def build_distributions(out: Path, wheel_only: bool = False) -> list[Path]:
    """Builds the wheel, and the sdist before it, into `out`; returns their paths."""
    environ = {**os.environ, "SOURCE_DATE_EPOCH": str(build_time_s())}
    kinds = ["--wheel"] if wheel_only else []
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()} if out.is_dir() else {}
    # What the build needs is in this environment: one of its own for each of them would be made anew every time.
    run([sys.executable, "-m", "build", "--no-isolation", *kinds, "--outdir", str(out), str(CHECKOUT)], environ)
    built = sorted(
        path
        for path in out.iterdir()
        if path.name.endswith((".whl", ".tar.gz")) and before.get(path) != path.stat().st_mtime_ns
    )
    if len(built) != (1 if wheel_only else 2):
        raise BuildFailed(f"expected one wheel and one sdist in {out}; came {[path.name for path in built]}")
    for path in built:
        check_content(path)
    return built


def content_of(path: Path) -> set[str]:
    """The names of the files in a wheel, or in an sdist without its folder in front."""
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as wheel:
            return {name for name in wheel.namelist() if not name.endswith("/")}
    with tarfile.open(path) as sdist:
        return {member.name.partition("/")[2] for member in sdist if member.isfile()}


def check_content(path: Path) -> None:
    """BuildFailed unless a wheel or sdist has all that it must have and nothing else."""
    found = content_of(path)
    if path.suffix == ".whl":
        wanted = {f"{package}/__init__.py" for package in IMPORT_PACKAGES}
        wanted |= {f"{package}/py.typed" for package in ("dps_agent", "dps_text", "dps_hal")}
        wanted |= {source for source in _sources() if not source.endswith((".md", ".pyc"))}
        inside = {name for name in found if ".dist-info/" not in name}
        foreign = {name for name in inside if name.partition("/")[0] not in IMPORT_PACKAGES}
        if not any(name.endswith(".dist-info/licenses/LICENSE") for name in found):
            wanted.add("LICENSE in dist-info/licenses")
    else:
        wanted = {"LICENSE", "README.md", "CHANGELOG.md", "pyproject.toml", "PKG-INFO"}
        wanted |= {f"agent/service/{name}" for name in ("config.toml", "dps-agent.service", "dps-agent.catalog")}
        inside = found
        foreign = {name for name in found if name.startswith((".cache/", ".git/", "dist/"))}
    foreign |= {name for name in inside if name.endswith(".pyc") or "__pycache__" in name}
    missing = wanted - found
    if missing or foreign:
        raise BuildFailed(f"{path.name}: lacks {sorted(missing) or 'nothing'}, has too much: {sorted(foreign)}")


def _sources() -> set[str]:
    """All Python files of the import packages, as the wheel names them."""
    roots = {
        name: "tools" if name in NOT_ON_DEVICES else "hal" if name == "dps_hal" else "agent" for name in IMPORT_PACKAGES
    }
    return {
        str(path.relative_to(CHECKOUT / root))
        for package, root in roots.items()
        for path in (CHECKOUT / root / package).rglob("*.py")
    }
