"""Whether what dps-agent brings with it is the newest there is, and whether faults of it are known.

Newest: asked of the index that pip uses here. Faults: by pip-audit, of the service that it asks; where that does not
know the packages, as with a mirror of the index alone, it is said and is no verdict.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from packaging.requirements import Requirement
from packaging.version import Version

from dps_package.deb import TEMPLATES, pins
from dps_package.distributions import CHECKOUT, BuildFailed, run

LIMIT_S = 300
ALL_WELL, AT_FAULT, NOT_ASKED = 0, 1, 2


class Finding(NamedTuple):
    """What is to be said of one pinned package: a line for whoever makes a release, and whether it is well."""

    text: str
    status: int  # ALL_WELL, AT_FAULT or NOT_ASKED


def bounds() -> dict[str, Requirement]:
    """Name -> which versions the project allows, of what it names itself."""
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    lines = project["dependencies"] + project["optional-dependencies"]["tpm"]
    return {requirement.name: requirement for requirement in map(Requirement, lines)}


def freshness(name: str, pinned: str, offered: Sequence[str], allowed: Requirement | None) -> Finding:
    """Whether the pinned version is the newest release that the project allows."""
    versions = [Version(text) for text in offered]
    fits = [each for each in versions if not each.is_prerelease and (allowed is None or each in allowed.specifier)]
    if not fits:
        return Finding(f"{name} {pinned}: the index offers no version that may be used", NOT_ASKED)
    newest = max(fits)
    if newest > Version(pinned):
        return Finding(f"{name} {pinned}: {newest} is there; renew {TEMPLATES.name}/requirements.txt", AT_FAULT)
    return Finding(f"{name} {pinned}: the newest", ALL_WELL)


def faults(document: Mapping[str, Any], pinned: Mapping[str, str]) -> list[Finding]:
    """What pip-audit's JSON says of each pinned package."""
    found = {each["name"]: each for each in document["dependencies"]}
    findings = []
    for name, version in pinned.items():
        each = found.get(name, {"skip_reason": "pip-audit does not name it"})
        known = [
            f"{fault['id']} (mended in {', '.join(fault['fix_versions']) or 'no version'})"
            for fault in each.get("vulns", ())
        ]
        if known:
            findings.append(Finding(f"{name} {version}: known faults: {'; '.join(known)}", AT_FAULT))
        elif "skip_reason" in each:
            findings.append(Finding(f"{name} {version}: nobody was asked for faults: {each['skip_reason']}", NOT_ASKED))
        else:
            findings.append(Finding(f"{name} {version}: no known fault", ALL_WELL))
    return findings


def offered(name: str) -> list[str]:
    """The versions of a package that pip's index has, whatever this Python can use of them."""
    said = run([sys.executable, "-m", "pip", "index", "versions", "--disable-pip-version-check", name])
    match = re.search(r"^Available versions: (.+)$", said, re.MULTILINE)
    if not match:
        raise BuildFailed(f"pip index versions {name}: expected 'Available versions:'; came {said[:200]!r}")
    return match[1].split(", ")


def _pip_audit() -> dict[str, Any]:
    words = ["--format", "json", "--require-hashes", "--disable-pip", "--requirement"]
    done = subprocess.run(
        [sys.executable, "-m", "pip_audit", *words, str(TEMPLATES / "requirements.txt")],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    try:
        document: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        raise BuildFailed(f"pip-audit: expected JSON; came\n{done.stdout}{done.stderr}") from None
    return document


def main() -> int:
    """Prints every finding; the exit status: 1 where one is at fault, 2 where none is and something was not asked."""
    argparse.ArgumentParser(prog="tools/release", description=(__doc__ or "").strip()).parse_args(
        [word for word in sys.argv[1:] if word != "--audit"]
    )
    pinned = {name: pin.split()[0].partition("==")[2] for name, pin in pins().items()}
    allowed = bounds()
    try:
        findings = [freshness(name, version, offered(name), allowed.get(name)) for name, version in pinned.items()]
        findings += faults(_pip_audit(), pinned)
    except (BuildFailed, subprocess.SubprocessError) as error:
        print(f"tools/release: {error}", file=sys.stderr)
        return NOT_ASKED
    for finding in findings:
        print(finding.text)
    statuses = {finding.status for finding in findings}
    return AT_FAULT if AT_FAULT in statuses else NOT_ASKED if NOT_ASKED in statuses else ALL_WELL


if __name__ == "__main__":
    sys.exit(main())
