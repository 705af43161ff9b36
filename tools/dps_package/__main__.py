"""What `tools/package` does once its environment stands."""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from dps_package.deb import build_full, build_light
from dps_package.distributions import CHECKOUT, BuildFailed, build_distributions, run
from machines.packages.container import CommandFailed, Unavailable, system_archive
from machines.packages.environments import try_distributions
from machines.packages.lifecycle import live_full, live_light, machine

CONTAINER = "container"  # what ALLOW_SKIP may name


def main() -> int:
    """Builds what the command line asks for, tries it, and prints the paths."""
    parser = argparse.ArgumentParser(prog="tools/package")
    for name in ("--deb", "--light", "--wheel", "--test"):
        parser.add_argument(name, action="store_true")
    parser.add_argument("--out", type=Path, default=CHECKOUT / "dist")
    parser.add_argument("--revision", default="1")
    wanted = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that what was started is stopped
    try:
        wanted.out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="dps-package-") as name:
            built = _build(wanted, Path(name))
            if wanted.test:
                _try(built, Path(name))
    except (BuildFailed, CommandFailed, subprocess.SubprocessError) as error:
        print(f"\ntools/package: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ntools/package: interrupted", file=sys.stderr)
        return 1
    except Unavailable as error:
        print(f"\ntools/package: {error}\nALLOW_SKIP={CONTAINER} leaves these steps out", file=sys.stderr)
        return 2
    for path in built:
        print(path)
    return 0


def _build(wanted: argparse.Namespace, work: Path) -> list[Path]:
    """What was asked for, everything by default; `work` is for what is only needed on the way."""
    everything = wanted.test or not (wanted.deb or wanted.light or wanted.wheel)
    built: list[Path] = []
    if everything or wanted.wheel:
        built += build_distributions(wanted.out)
        wheel = next(path for path in built if path.suffix == ".whl")
    else:
        wheel = build_distributions(work, wheel_only=True)[0]
    if everything or wanted.deb:
        built.append(build_full(wanted.out, wheel, wanted.revision))
    if everything or wanted.light:
        built.append(build_light(wanted.out, wheel, wanted.revision))
    return built


def _try(built: list[Path], work: Path) -> None:
    """The life of all that was built, in fresh environments and on a system of its own."""
    wheel, sdist, full, light = (
        next(path for path in built if path.name.endswith(ending))
        for ending in (".whl", ".tar.gz", f"_{_architecture()}.deb", "_all.deb")
    )
    try_distributions(work, wheel, sdist)
    try:
        archive = system_archive([*_needs(full), *_needs(light), _package_of("libtss2-tcti-swtpm.so.0")])
        newer, newer_light = (
            build_full(work, wheel, "2"),
            build_light(work, wheel, "2"),
        )  # the same under a later number
        with machine(archive, work / "tpm-full") as device:
            live_full(device, full, newer)
        with machine(archive, work / "tpm-light") as device:
            live_light(device, light, newer_light, newer)
    except Unavailable as error:
        if CONTAINER not in os.environ.get("ALLOW_SKIP", "").split(","):
            raise
        print(f"skipped, as ALLOW_SKIP allows: the packages' life in a container: {error}")


def _architecture() -> str:
    return run(["dpkg", "--print-architecture"]).strip()


def _needs(package: Path) -> list[str]:
    """The names of the packages that a Debian package depends on."""
    depends = run(["dpkg-deb", "--field", str(package), "Depends"])
    return [re.split(r"[ (]", need.strip())[0] for need in depends.split(",")]


def _package_of(library: str) -> str:
    return run(["dpkg-query", "-S", f"*/{library}"]).partition(":")[0]


if __name__ == "__main__":
    sys.exit(main())
