"""What `tools/package` does once its environment stands."""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from dps_package.deb import build_full, build_light
from dps_package.distributions import CHECKOUT, BuildFailed, build_distributions

if TYPE_CHECKING:
    from collections.abc import Callable


def main(try_built: Callable[[list[Path], Path], None] | None = None) -> int:
    """Builds what the command line asks for and prints the paths; `--test` asks for everything, `--foreign` for the
    light package.

    `try_built` gets the paths and a folder to work in, before they are printed.
    """
    parser = argparse.ArgumentParser(prog="tools/package")
    for name in ("--deb", "--light", "--wheel", "--test", "--foreign"):
        parser.add_argument(name, action="store_true")
    parser.add_argument("--out", type=Path, default=CHECKOUT / "dist")
    parser.add_argument("--revision", default="1")
    wanted = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that what was started is stopped
    try:
        wanted.out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="dps-package-") as name:
            built = _build(wanted, Path(name))
            if try_built is not None:
                try_built(built, Path(name))
    except (BuildFailed, subprocess.SubprocessError) as error:
        print(f"\ntools/package: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ntools/package: interrupted", file=sys.stderr)
        return 1
    for path in built:
        print(path)
    return 0


def _build(wanted: argparse.Namespace, work: Path) -> list[Path]:
    """What was asked for, everything by default; `work` is for what is only needed on the way."""
    everything = wanted.test or not (wanted.deb or wanted.light or wanted.wheel or wanted.foreign)
    built: list[Path] = []
    if everything or wanted.wheel:
        built += build_distributions(wanted.out)
        wheel = next(path for path in built if path.suffix == ".whl")
    else:
        wheel = build_distributions(work, wheel_only=True)[0]
    if everything or wanted.deb:
        built.append(build_full(wanted.out, wheel, wanted.revision))
    if everything or wanted.light or wanted.foreign:
        built.append(build_light(wanted.out, wheel, wanted.revision))
    return built


if __name__ == "__main__":
    sys.exit(main())
