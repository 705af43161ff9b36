"""Builds a release from a tag twice, as two people on two machines would, and compares the two, byte by byte."""

from __future__ import annotations

import argparse
import filecmp
import hashlib
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from dps_agent import __version__
from dps_package.artefacts import SUMS, notes_of
from dps_package.distributions import CHECKOUT, BuildFailed, run
from dps_package.repository import VARIABLE, build_repository, check_sums, key_from_environment, sign_sums
from dps_package.site import add_to_site

BUILD_DEADLINE_S = 3600
OTHER_USER = "nobody"
SOURCES = ("tools", "agent", "hal", "micropython", "tests")


class Circumstances(NamedTuple):
    """What must not show in what is built."""

    folder: str
    umask: int
    environ: dict[str, str]


FIRST = Circumstances("one", 0o022, {"TZ": "UTC", "LANG": "C.UTF-8"})
SECOND = Circumstances("another/place", 0o077, {"TZ": "Pacific/Kiritimati", "LANG": "C", "COLUMNS": "40"})


def main() -> int:
    """Reads the command line of `tools/release`."""
    parser = argparse.ArgumentParser(prog="tools/release", description=(__doc__ or "").strip())
    parser.add_argument("--out", type=Path, default=CHECKOUT / "dist", metavar="DIR", help="default: dist/")
    parser.add_argument("--untagged", action="store_true", help="the last commit, tag or not, for a trial")
    parser.add_argument("--pure", action="store_true", help="all but dps-agent for this distribution: no compiler runs")
    parser.add_argument("--revision", default="1", metavar="R", help="of the Debian packages, default 1")
    parser.add_argument(
        "--site", type=Path, metavar="DIR", help="the documents as a site in DIR, beside those of other versions"
    )
    parser.add_argument(
        "--apt",
        type=Path,
        metavar="DIR",
        help="a signed APT repository in DIR of the packages in --out, whose sums are signed too",
    )
    wanted = parser.parse_args()
    if not wanted.apt:
        os.environ.pop(VARIABLE, None)  # nothing that is started here needs it
    try:
        if wanted.apt:
            packages = sorted(wanted.out.glob("*.deb"))
            if not packages:
                raise BuildFailed(f"expected Debian packages in {wanted.out}: run tools/release, or tools/package")
            sums = wanted.out / SUMS
            if sums.exists():
                check_sums(sums, packages)
            key = key_from_environment()
            made = build_repository(wanted.apt, packages, key)
            for path in [*made, *([sign_sums(sums, key)] if sums.exists() else [])]:
                print(path)
            return 0
        if wanted.site:
            print(add_to_site(wanted.site, __version__))
            return 0
        return _release(wanted)
    except (BuildFailed, subprocess.SubprocessError) as error:
        print(f"\ntools/release: {error}", file=sys.stderr)
        return 1


def _release(wanted: argparse.Namespace) -> int:
    commit = _commit(wanted.untagged)
    notes_of((CHECKOUT / "CHANGELOG.md").read_text(), __version__)
    with tempfile.TemporaryDirectory(prefix="dps-release-") as name:
        Path(name).chmod(0o755)
        options = ["--revision", wanted.revision, *(["--pure"] if wanted.pure else [])]
        first = _built(Path(name), commit, FIRST, options)
        second = _built(Path(name), commit, SECOND, options)
        differing = different(first, second)
        if differing:
            kept = Path(tempfile.mkdtemp(prefix="dps-release-differs-"))
            shutil.copytree(first, kept / "first")
            shutil.copytree(second, kept / "second")
            raise BuildFailed(f"two builds differ in {', '.join(differing)}: look into {kept}")
        for path in hand_over(first, wanted.out):
            size = path.stat().st_size
            print(f"{size:9} {hashlib.sha256(path.read_bytes()).hexdigest()[:16]} {path}")
    return 0


def hand_over(built: Path, out: Path) -> list[Path]:
    """Copies what was built into `out`, where no signature of earlier sums stays; the paths there."""
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{SUMS}.asc").unlink(missing_ok=True)
    return [Path(shutil.copyfile(path, out / path.name)) for path in sorted(built.iterdir())]


def different(first: Path, second: Path) -> list[str]:
    """The names of the files that are not the same in both folders."""
    names = sorted({path.name for folder in (first, second) for path in folder.iterdir()})
    _, differing, missing = filecmp.cmpfiles(first, second, names, shallow=False)
    return sorted([*differing, *missing])


def _commit(untagged: bool) -> str:
    """The commit to build: the tag's of this version, and nothing changed since."""
    git = ["git", "-C", str(CHECKOUT)]
    commit = run([*git, "rev-parse", "HEAD"]).strip()
    if untagged:
        return commit
    changed = run([*git, "status", "--porcelain"]).strip()
    if changed:
        raise BuildFailed(f"expected a checkout without changes; came\n{changed}\ncommit them, or give --untagged")
    tags = run([*git, "tag", "--points-at", "HEAD"]).split()
    if f"v{__version__}" not in tags:
        raise BuildFailed(f"expected the tag v{__version__} at HEAD; came {tags or 'none'}: tag it, or give --untagged")
    return commit


def _built(work: Path, commit: str, circumstances: Circumstances, options: Sequence[str]) -> Path:
    """A folder with everything, built in a copy of its own."""
    copy, home = work / circumstances.folder / "dps-agent", work / circumstances.folder / "home"
    out = copy.parent / "out"
    home.mkdir(parents=True)
    run(["git", "clone", "--quiet", "--no-checkout", str(CHECKOUT), str(copy)])
    run(["git", "-C", str(copy), "checkout", "--quiet", commit])
    kept = {name: value for name, value in os.environ.items() if name.startswith(("PIP_", "DEB", "SSL_"))}
    environ = {
        **kept,
        **circumstances.environ,
        "HOME": str(home),
        "TMPDIR": str(home),
        # The first takes over what an earlier build has compiled, the second compiles all of it again.
        "DPS_PACKAGE_CACHE": str(Path(sys.prefix).parent if circumstances is FIRST else home),
        "PATH": f"{Path(sys.prefix) / 'bin'}:/usr/bin:/bin:/usr/sbin:/sbin",
        "PYTHONPATH": os.pathsep.join(str(copy / name) for name in SOURCES),
        "PYTHONDONTWRITEBYTECODE": "1",
        "SOURCE_DATE_EPOCH": run(["git", "-C", str(CHECKOUT), "log", "-1", "--format=%ct", commit]).strip(),
    }
    user = _user(circumstances, copy.parent, environ)
    words = [sys.executable, "-m", "dps_package.artefacts", str(out), *options]
    print(f"building {commit[:12]} as {user or 'this user'}, umask {circumstances.umask:03o}", flush=True)
    done = subprocess.run(
        words,
        cwd=copy,
        env=environ,
        user=user,
        group=pwd.getpwnam(user).pw_gid if user else None,
        extra_groups=[] if user else None,
        umask=circumstances.umask,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=BUILD_DEADLINE_S,
        check=False,
    )
    if done.returncode:
        raise BuildFailed(f"{done.stdout}{done.stderr}the build in {copy.parent} failed")
    return out


def _user(circumstances: Circumstances, folder: Path, environ: dict[str, str]) -> str | None:
    """Another user for the second build; None where only root could have it, or that user may not read this Python."""
    if circumstances is FIRST or os.geteuid():
        return None
    pair = pwd.getpwnam(OTHER_USER)
    try:
        subprocess.run([sys.executable, "-c", "import build"], user=OTHER_USER, env=environ, check=True, timeout=60)
    except (OSError, subprocess.CalledProcessError):
        print(f"not tried as another user: {OTHER_USER} may not read {sys.prefix}", file=sys.stderr)
        return None
    for path in (folder, *folder.rglob("*")):
        os.chown(path, pair.pw_uid, pair.pw_gid, follow_symlinks=False)
    return OTHER_USER


if __name__ == "__main__":
    sys.exit(main())
