"""Everything that a release consists of, built once from the checkout that this file lies in.

`tools/release` runs this in two copies of the tag and compares what came out.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping
from email.parser import HeaderParser
from pathlib import Path

from dps_package.deb import build_full, build_light, pins
from dps_package.distributions import CHECKOUT, BuildFailed, build_distributions, build_time_s, run
from dps_package.foreign import FORMS, build_foreign
from dps_package.manual import manual
from dps_package.sbom import write_sbom
from dps_package.site import build_site

SUMS = "SHA256SUMS"
LISTS = ("names", "texts")  # what tools/deploy prints for the reader of a board's errors, other in each release
NOTES = "release-notes.md"
_HEADING = re.compile(r"^## \[(?P<version>[^\]]+)\](?: - (?P<date>\d{4}-\d\d-\d\d))?$", re.MULTILINE)


def notes_of(changelog: str, version: str) -> str:
    """The section of a version in CHANGELOG.md, without its heading; BuildFailed where there is none, or no date."""
    headings = list(_HEADING.finditer(changelog))
    for at, heading in enumerate(headings):
        if heading["version"] == version:
            if not heading["date"]:
                raise BuildFailed(f"CHANGELOG.md: expected a date behind [{version}], such as 2026-11-30")
            end = headings[at + 1].start() if at + 1 < len(headings) else len(changelog)
            return changelog[heading.end() : end].strip() + "\n"
    raise BuildFailed(
        f"CHANGELOG.md: expected a section [{version}]; there are {[each['version'] for each in headings]}"
    )


def packed(files: Mapping[str, bytes], top: str) -> bytes:
    """A tar.gz of files by path, below one folder, with one time and owner for all."""
    epoch_s, packed_bytes = build_time_s(), io.BytesIO()
    with (
        gzip.GzipFile("", "wb", 9, packed_bytes, mtime=epoch_s) as compressed,
        tarfile.open(fileobj=compressed, mode="w", format=tarfile.PAX_FORMAT) as archive,
    ):
        for path, content in sorted(files.items()):
            member = tarfile.TarInfo(f"{top}/{path}")
            member.size, member.mtime, member.mode = len(content), epoch_s, 0o644
            archive.addfile(member, io.BytesIO(content))
    return packed_bytes.getvalue()


def files_below(folder: Path) -> dict[str, bytes]:
    """The files in a folder by their paths in it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def build_all(out: Path, revision: str, pure: bool = False) -> list[Path]:
    """Builds every artefact into `out`, its bill of materials beside it, the sums of all of them and the notes.

    `pure`: without dps-agent as a Debian package, which is for one distribution and takes a compiler.
    """
    built = build_distributions(out)
    wheel, sdist = sorted(built, key=lambda path: path.suffix != ".whl")
    version = wheel.name.split("-")[1]
    notes = notes_of((CHECKOUT / "CHANGELOG.md").read_text(), version)
    light = build_light(out, wheel, revision)
    packages = [light] if pure else [light, build_full(out, wheel, revision)]
    write_sbom(wheel, version, _requirements(wheel))
    write_sbom(sdist, version, _requirements(wheel))
    for package in packages:
        depends = run(["dpkg-deb", "--field", str(package), "Depends"]).strip().split(", ")
        write_sbom(package, version, [each.partition(" ")[0] for each in depends])
    paho = pins()["paho-mqtt"].partition("==")[2].split()[0]
    for path, form in zip(build_foreign(out, light), FORMS, strict=True):
        needs = [re.split(r"[ <>=]", each)[0] for each in form.depends]
        write_sbom(path, version, [*needs, f"paho-mqtt@{paho}"])
    with tempfile.TemporaryDirectory(prefix="dps-artefacts-") as name:
        firmware = _firmware(Path(name), version)
        site = files_below(build_site(Path(name) / "site", version))
    for top, files in ((f"dps-agent-firmware-{version}", firmware), (f"dps-agent-docs-{version}", site)):
        path = out / f"{top}.tar.gz"
        path.write_bytes(packed(files, top))
        write_sbom(path, version)
    (out / "dps-agent.8").write_text(manual(build_time_s()))
    (out / NOTES).write_text(notes)
    artefacts = sorted(path for path in out.iterdir() if path.is_file() and path.name != SUMS)
    sums = "".join(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in artefacts)
    (out / SUMS).write_text(sums)
    return [*artefacts, out / SUMS]


def _requirements(wheel: Path) -> list[str]:
    """What the agent needs of PyPI, extras aside."""
    metadata = run(["unzip", "-p", str(wheel), "*.dist-info/METADATA"])
    needs = HeaderParser().parsestr(metadata).get_all("Requires-Dist") or []
    return [re.split(r"[<>=!]", need)[0] for need in needs if "extra ==" not in need]


def _firmware(folder: Path, version: str) -> dict[str, bytes]:
    """What a firmware freezes, with its manifest, the same compiled as an image of a ROM file system, and its names."""
    frozen, compiled = folder / "frozen", folder / "compiled"
    run([sys.executable, str(CHECKOUT / "tools/deploy"), "--freeze", str(frozen)])
    files = files_below(frozen)
    for path, content in files.items():
        if path.endswith(".mpy"):
            (compiled / path).parent.mkdir(parents=True, exist_ok=True)
            (compiled / path).write_bytes(content)
    image = folder / "dps-agent.romfs"
    run([sys.executable, "-m", "mpremote", "romfs", "--no-mpy", "--output", str(image), "build", str(compiled)])
    lists = {f"{name}.txt": run([sys.executable, str(CHECKOUT / "tools/deploy"), f"--{name}"]) for name in LISTS}
    return {**files, f"dps-agent-{version}.romfs": image.read_bytes(), **{name: lists[name].encode() for name in lists}}


def main() -> int:
    """Builds into the folder that the command line names, and prints the paths."""
    parser = argparse.ArgumentParser(prog="dps_package.artefacts")
    parser.add_argument("out", type=Path)
    parser.add_argument("--revision", default="1")
    parser.add_argument("--pure", action="store_true")
    wanted = parser.parse_args()
    try:
        wanted.out.mkdir(parents=True, exist_ok=True)
        for path in build_all(wanted.out, wanted.revision, wanted.pure):
            print(path)
    except (BuildFailed, subprocess.SubprocessError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
