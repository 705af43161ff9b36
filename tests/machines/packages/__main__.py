"""What `tools/package --test` does: builds everything, then lives with it in fresh environments and in a container."""

from __future__ import annotations

import os
import re
import sys
from typing import TYPE_CHECKING

from dps_package.__main__ import main as build
from dps_package.deb import build_full, build_light
from dps_package.distributions import run
from machines.packages.container import CommandFailed, Unavailable, system_archive
from machines.packages.environments import try_distributions
from machines.packages.lifecycle import live_full, live_light, machine
from machines.packages.repository import repository

if TYPE_CHECKING:
    from pathlib import Path

CONTAINER = "container"  # what ALLOW_SKIP may name


def main() -> int:
    """Exit status 0: everything was built and does what it claims; 1: not; 2: this machine cannot try it."""
    try:
        return build(try_built)
    except CommandFailed as error:
        print(f"\ntools/package: {error}", file=sys.stderr)
        return 1
    except Unavailable as error:
        print(f"\ntools/package: {error}\nALLOW_SKIP={CONTAINER} leaves these steps out", file=sys.stderr)
        return 2


def try_built(built: list[Path], work: Path) -> None:
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
        with machine(archive, work / "tpm-light") as device, repository(work / "repository") as releases:
            live_light(device, releases, light, newer_light, newer)
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
